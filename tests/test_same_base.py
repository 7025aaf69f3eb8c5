"""The base model is the one that was meant: every weight, every place of it, its configuration, and nothing underneath."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finetune_nb import models
from finetune_nb.data import Splits
from finetune_nb.lora import AdapterError, add_lora, load_adapter, put_adapter, remove_lora, save_base_mark
from finetune_nb.models import ModelError, base_difference, base_mark, changed_weights, convert_gguf, load_model, load_tokenizer, mark_of
from finetune_nb.sentinels import ChangedBaseError, base_sums
from finetune_nb.stop import TrainingError
from finetune_nb.training import train
from finetune_nb.weight_sums import BLOCK, block_sums, computed_with, file_marks, marks_of, sum_mark

KEY = "model.layers.0.mlp.up_proj.weight"


def quiet(line):
    pass


def mark(tensor):
    return sum_mark(block_sums(tensor))


@pytest.fixture
def other(tiny_model, tmp_path):
    "A copy of the tiny model, to be changed."
    return Path(shutil.copytree(tiny_model, tmp_path / "other"))


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def configure(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    "A saved adapter of the tiny model, without a manifest."
    from finetune_nb.config import FinetuneConfig

    folder = tmp_path_factory.mktemp("adapter")
    tuned = add_lora(load_model(tiny_model, torch.float32, use_cpu=True, say=quiet)[0], FinetuneConfig(r=4, target_modules=["q_proj"]))
    tuned.save_pretrained(folder)
    save_base_mark(tuned, folder)
    return folder


@pytest.fixture
def edited(adapter, tmp_path):
    "Makes a copy of the adapter with other settings."

    def make(**settings):
        folder = Path(shutil.copytree(adapter, tmp_path / "edited"))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return make


# ── sums


@pytest.mark.parametrize("words", [1, 5, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_every_bit_and_every_swap_is_seen(words, bit):
    "Also where the numbers that trade places differ in one bit only, the highest one included."
    values = torch.randint(-(2**62), 2**62, (words,))
    for place in {0, words // 2, words - 1}:
        changed = values.clone()
        changed[place] ^= -(2**63) if bit == 63 else 2**bit
        assert mark(changed) != mark(values)
        for to in {0, words // 3, words - 1} - {place}:
            one = values.clone()
            one[to] = changed[place]
            swapped = one.clone()
            swapped[to], swapped[place] = one[place], one[to]
            one[place] = values[place]
            assert mark(swapped) != mark(one)


def test_a_sum_does_not_depend_on_where_a_tensor_lies(tmp_path):
    whole = torch.randn(400, 700)
    part = whole[3:333, 5:605]  # in pieces
    odd = whole.bfloat16().view(-1)[1:1000]  # begins between two numbers of 64 bits
    flags, empty = whole[:3, :3] > 0, whole[:0]
    for name, t in {"part": part, "odd": odd, "flags": flags, "empty": empty, "one": whole[0, 0]}.items():
        save_file({name: t.contiguous().clone()}, tmp_path / name)
        assert file_marks(tmp_path / name)[name].split()[-1] == mark(t) == mark(t.clone()), name
    assert len({mark(t) for t in (part, part.flip(0), part.flip(1), part.T, part[:-1])}) == 5


# ── the mark of a base model


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[KEY].view(torch.int32)[-1].__setitem__(-1, w[KEY].view(torch.int32)[-1, -1] ^ 1),
        lambda w: w[KEY].copy_(w[KEY].flip(0)),
        lambda w: w[KEY].__setitem__([2, 5], w[KEY][[5, 2]].clone()),
    ],
    ids=["a bit", "upside down", "two rows"],
)
def test_a_mark_sees_all_of_a_weight(change, tiny_model, other):
    rewrite(other, change)
    assert base_mark(str(other)) != base_mark(tiny_model)


@pytest.mark.parametrize("settings", [{"rms_norm_eps": 0.5}, {"hidden_act": "relu"}, {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}}], ids=lambda s: next(iter(s)))
def test_a_mark_sees_the_configuration(settings, tiny_model, other):
    configure(other, **settings)
    assert base_mark(str(other)) != base_mark(tiny_model)


def test_a_mark_sees_no_names_and_no_versions(tiny_model, other):
    configure(other, _name_or_path="/elsewhere", transformers_version="9.9", use_cache=False, dtype="bfloat16", something_new=None)
    assert base_mark(str(other)) == base_mark(tiny_model)


def test_a_mark_of_before_is_refused_clearly(tiny_model):
    now = base_mark(tiny_model)
    assert base_difference(now, now) == base_difference(None, now) == base_difference(now, None) == ""
    assert "older release" in base_difference("0123456789abcdef", now) and now in base_difference("w2-0", now)


# ── a base model that is handed over, and an adapter that is loaded


def test_a_base_model_of_other_weights_is_not_trained(tiny_model, other, quick, chats):
    splits = Splits(chats[:24], chats[24:32], chats[32:])
    rewrite(other, lambda w: w[KEY].mul_(2))
    base = load_model(str(other), torch.float32, use_cpu=True, say=quiet)
    by_hand = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32), base[1]
    changed = load_model(tiny_model, torch.float32, use_cpu=True, say=quiet)
    changed[0].get_parameter(KEY).data[7, 7] += 1e-6
    for handed, said in ((base, f"{base_mark(tiny_model)}, now {base_mark(str(other))}"), (by_hand, "is not .* which the configuration names"), (changed, f"other weights than the files of .*: {KEY}. Load it anew")):
        with pytest.raises(TrainingError, match=said):
            train(quick, splits, base=handed, say=quiet)
    assert changed_weights(by_hand[0], str(other)) == [] and not Path(quick.output_dir).exists()


def test_files_that_change_after_loading_are_not_those_of_the_model(other):
    model, _ = load_model(str(other), torch.float32, use_cpu=True, say=quiet)
    rewrite(other, lambda w: w[KEY].mul_(2))
    assert "changed since it was loaded" in mark_of(model)


def test_an_adapter_belongs_to_one_base_model(adapter, tiny_model, other):
    rewrite(other, lambda w: w[KEY].mul_(2))
    right, wrong = (load_model(str(place), torch.float32, use_cpu=True, say=quiet)[0] for place in (tiny_model, other))
    by_hand = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    for model in (wrong, by_hand):
        with pytest.raises(AdapterError, match="trained on another base model than this one .*say other_base=True"):
            load_adapter(model, adapter)
        assert not hasattr(model, "peft_config")
    tuned = load_adapter(wrong, adapter, other_base=True)
    with pytest.raises(AdapterError, match="trained on another base model than this one"):
        put_adapter(tuned, adapter, "second")
    put_adapter(tuned, adapter, "second", other_base=True)
    put_adapter(load_adapter(right, adapter), adapter, "second")


def test_a_run_keeps_the_mark_beside_its_adapter(quick, chats, other):
    config = replace(quick, max_steps=1, eval_strategy="no", model_name_or_path=str(other))
    run = train(config, Splits(chats[:24], [], []), say=quiet)
    assert json.loads((run.folder / "adapter/base.json").read_text())["marks"]["base"] == run.facts["marks"]["base"] == base_mark(str(other))
    path = run.folder / "adapter/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    base = remove_lora(run.model)
    with pytest.raises(AdapterError, match=r"adapter_config.json has .* if the change is meant, remove MANIFEST.json"):
        load_adapter(base, run.folder / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": -1}, {"r": 2**40}, {"r": "4"}, {"r": None}, {"r": True}, {"rank_pattern": {"q_proj": 2**30}}, {"rank_pattern": [4]}, {"lora_alpha": float("nan")}, {"lora_alpha": "8"},
        {"alpha_pattern": {"q_proj": float("inf")}}, {"lora_dropout": 7}, {"target_modules": 5}, {"target_modules": "(a+)+$"}, {"target_modules": [1]}, {"modules_to_save": [1]}, {"peft_type": "VERA"},
        {"task_type": "SEQ_CLS"}, {"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, {"layers_to_transform": "x"}, {"exclude_modules": 7}, {"trainable_token_indices": [10**12]},
        {"bias": "x"}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "olora"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_an_adapter_that_can_not_be(settings, edited, bare):
    before = marks_of(computed_with(bare))
    with pytest.raises(AdapterError, match=r"adapter_config\.json|does not fit|can be read"):
        load_adapter(bare, edited(**settings))
    assert marks_of(computed_with(remove_lora(bare))) == before


@pytest.fixture(scope="module")
def bare(tiny_model):
    return load_model(tiny_model, torch.float32, use_cpu=True, say=quiet)[0]


def test_how_an_adapter_began_is_history(edited, bare):
    tuned = load_adapter(bare, edited(init_lora_weights="eva"))
    assert tuned.peft_config["default"].init_lora_weights is True
    remove_lora(bare)


# ── nothing underneath


def test_a_base_model_with_an_adapter_beside_it_is_refused(adapter, other):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, other)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="holds an adapter beside the base model.*Move the adapter's files"):
            load(str(other))


def test_an_adapter_beside_a_model_of_the_hub_is_refused(adapter, other, monkeypatch, tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "hub/models--owner--name/snapshots" / commit
    shutil.copytree(other, snapshot)
    refs = tmp_path / "hub/models--owner--name/refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = {name: str(snapshot / name) for name in ("config.json", "adapter_config.json")}
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *args, **kwargs: found["config.json"])
    monkeypatch.setattr(models, "cached_file", lambda name, file, **kwargs: found.get(file))
    with pytest.raises(ModelError, match="owner/name holds an adapter beside the base model"):
        load_model("owner/name")


# ── while it is trained


def test_sums_see_places_buffers_and_packed_weights(tiny_model):
    model, _ = load_model(tiny_model, torch.bfloat16, use_cpu=True, say=quiet)
    model.requires_grad_(False)
    before, weight, buffer = base_sums(model), model.get_parameter(KEY), model.model.rotary_emb.inv_freq
    weight.data[[1, 2]] = weight.data[[2, 1]]
    buffer.mul_(1.5)
    assert {name for name, n in base_sums(model).items() if n != before[name]} == {KEY, "model.rotary_emb.inv_freq"}
    model.model.rotary_emb.rope_type = "dynamic"  # which changes its frequencies by itself
    assert "model.rotary_emb.inv_freq" not in base_sums(model)


def test_scales_of_packed_weights_are_summed_up():
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    weight.data, weight.quant_state = bnb.functional.quantize_4bit(torch.randn(128, 128), quant_type="nf4", compress_statistics=True)
    layer = torch.nn.Module()
    layer.weight = weight
    before = marks_of(computed_with(layer))
    weight.quant_state.state2.absmax[0] *= 2
    assert [name for name, n in marks_of(computed_with(layer)).items() if n != before[name]] == ["weight.state2.absmax"]


@pytest.mark.parametrize("what", ["rows", "frequencies"])
def test_a_run_of_which_the_base_model_changes_ends(what, quick, chats):
    from transformers import TrainerCallback

    class Writes(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            part = model.get_base_model().model
            if what == "rows" and state.global_step == 3:
                part.layers[1].mlp.down_proj.weight.data[:2] = part.layers[1].mlp.down_proj.weight.data[:2].flip(0)
            elif what == "frequencies":
                part.rotary_emb.inv_freq.mul_(1.5)

    named = "down_proj.weight" if what == "rows" else "rotary_emb.inv_freq"
    config, at = replace(quick, max_steps=6, eval_strategy="steps", eval_steps=3), 3 if what == "rows" else 2  # a checkpoint; the first step with a learning rate
    with pytest.raises(ChangedBaseError, match=f"By step {at} the weights of the base model had changed: .*{named}"):
        train(config, Splits(chats[:24], chats[24:32], []), [Writes()], say=quiet)


# ── the cache of converted models


def test_a_converted_model_that_is_not_as_it_was_written_is_made_anew(tiny_model, tmp_path, monkeypatch, capsys):
    file, made = tmp_path / "m.gguf", []
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_save_unquantised", lambda file, folder: (made.append(1), shutil.copytree(tiny_model, folder, dirs_exist_ok=True)))
    folder = convert_gguf(file)
    assert convert_gguf(file) == folder and len(made) == 1
    rewrite(folder, lambda w: w[KEY].view(torch.int32)[-1].__setitem__(-1, 1))
    assert convert_gguf(file, weights=False) == folder and len(made) == 1, "who wants the tokenizer alone does not wait for the weights"
    assert convert_gguf(file) == folder and len(made) == 2 and "model.safetensors is not as it was written" in capsys.readouterr().out
    configure(folder, rms_norm_eps=0.5)
    assert convert_gguf(file) == folder and len(made) == 3 and base_mark(str(folder)) == base_mark(tiny_model)
    (folder / "MANIFEST.json").unlink()
    assert convert_gguf(file) == folder and len(made) == 4
    monkeypatch.setattr(models, "version", lambda name: "another")
    monkeypatch.setattr(models, "_save_unquantised", lambda file, folder: (made.append(1), save_file({"a": torch.ones(1)}, folder / "model.safetensors")))
    folders, written = {folder, convert_gguf(file)}, file.stat().st_mtime_ns
    monkeypatch.setattr(models, "_CONVERSION", "another")
    folders.add(convert_gguf(file))
    for data, later, place in ((b"GGUF", 1, file), (b"GGUF, longer", 1, file), (b"GGUF, longer", 1, tmp_path / "elsewhere" / "m.gguf")):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(data)
        os.utime(place, ns=(written, written + later))
        folders.add(convert_gguf(place))
    assert len(folders) == 6 and len(made) == 9, "other releases, another conversion, another time, size or place of the file"
