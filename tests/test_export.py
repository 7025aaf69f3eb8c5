"""Exports: what was trained is what is shipped, to the bit where it can be, and refused where it can't."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import forked
import peft
import pytest
import torch
from conftest import VOCABULARY, save_tiny, some_splits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune_nb.adapter import check_servers, save_adapter
from finetune_nb.config import ExportError
from finetune_nb.lora import ADAPTER_FILES, AdapterError
from finetune_nb.merge import base_files, merge_adapter
from finetune_nb.models import convert_gguf, load_tokenizer
from finetune_nb.training import load_run, train
from finetune_nb.whole_folder import whole_folder

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def judges(request, monkeypatch):
    "The process that judges an export is forked from this one, but for one test."
    if request.node.name != STARTED:
        from finetune_nb import fresh

        monkeypatch.setattr(fresh, "subprocess", SimpleNamespace(run=forked.run_command, DEVNULL=subprocess.DEVNULL))


STARTED = "test_one_call_and_the_command_line_export_check_and_list_what_would_go"


def trained(config, n_test=8, **more):
    splits = some_splits()
    splits = splits._replace(test=splits.test[:n_test])
    run = train(replace(config, num_train_epochs=1, per_device_train_batch_size=8, early_stopping_patience=0, preflight=False, **more), splits, say=lambda line: None)
    run.release()
    return load_run(run.folder)


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def logits(model, ids=(1, 4093, 198, 5, 77, 3000, 2)):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "pissa": {"init_lora_weights": "pissa"},
    "some blocks": {"layers_to_transform": [1]},
    "every linear layer": {"target_modules": "all-linear", "lora_alpha": 7},
    "trained norms": {"modules_to_save": ["norm"]},
    "trained output layer": {"modules_to_save": ["lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.trains
@pytest.mark.parametrize("name", [name if name in ("plain", "dora", "pissa", "trained embedding") else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS])
def test_merged_is_what_peft_merges(quick, name):
    run = trained(quick, **VARIANTS[name])
    merged = merge_adapter(run)
    ours = load_file(merged.folder / "model.safetensors")
    evaluated = logits(run.model)
    assert not torch.equal(evaluated, logits(loaded(run.config.model_name_or_path))), "nothing was learned, so nothing is tested"
    theirs = run.model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) <= 1e-6
    assert (logits(loaded(merged.folder)) - evaluated).abs().max() < 1e-4


@pytest.mark.trains
@pytest.mark.parametrize("bias", [pytest.param("lora_only", marks=pytest.mark.skipif(peft.__version__ < "0.21", reason="PEFT before 0.21 does not save them, and the look before a run says so")), "all"])
def test_trained_biases_are_merged(quick, biased_model, bias):
    run = trained(replace(quick, model_name_or_path=biased_model), bias=bias)
    merged = merge_adapter(run)
    assert merged.whole > 0
    assert (logits(loaded(merged.folder)) - logits(run.model)).abs().max() < 1e-4


@pytest.mark.trains
@pytest.mark.parametrize("more", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]}, {}], ids=str)
def test_tied_embeddings_are_written_apart_when_one_was_trained(quick, tied_model, more):
    run = trained(replace(quick, model_name_or_path=tied_model), **more)
    merged = merge_adapter(run)
    apart = bool(more)
    assert json.loads((merged.folder / "config.json").read_text())["tie_word_embeddings"] is not apart
    assert ("lm_head.weight" in load_file(merged.folder / "model.safetensors")) is apart
    assert (logits(loaded(merged.folder)) - logits(run.model)).abs().max() < 1e-4


@pytest.mark.trains
def test_merged_carries_what_ends_an_answer_and_its_kind(quick, tmp_path):
    folder = Path(save_tiny(tmp_path / "base"))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 0, "temperature": 0.6, "do_sample": True}))
    weights = {key: value.bfloat16() for key, value in load_file(folder / "model.safetensors").items()}
    weights["model.embed_tokens.weight"] = torch.cat([weights["model.embed_tokens.weight"], torch.zeros(16, 32, dtype=torch.bfloat16)])  # resized: more rows than tokens
    weights["lm_head.weight"] = torch.cat([weights["lm_head.weight"], torch.zeros(16, 32, dtype=torch.bfloat16)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 16, "dtype": "bfloat16"}))
    run = trained(replace(quick, model_name_or_path=str(folder)))
    merged = merge_adapter(run)
    said = json.loads((merged.folder / "generation_config.json").read_text())
    assert said["eos_token_id"] == [0, 2] and said["temperature"] == 0.6 and said["pad_token_id"] == 2 and "<|im_end|>" in merged.notes[0]
    assert merged.dtype == "bfloat16" and {value.dtype for value in load_file(merged.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((merged.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (merged.folder / "chat_template.jinja").read_text() == run.tokenizer.chat_template
    assert str(tmp_path) not in "".join(path.read_text() for path in merged.folder.glob("*.json"))
    theirs = run.model.merge_and_unload().state_dict()
    assert all(torch.equal(value, theirs[key].bfloat16()) for key, value in load_file(merged.folder / "model.safetensors").items())


@pytest.mark.trains
def test_shards_stay_those_of_the_base(quick, tmp_path):
    from transformers import AutoModelForCausalLM

    whole = Path(save_tiny(tmp_path / "whole"))
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "cut", max_shard_size="400KB")
    for path in whole.iterdir():
        if path.name != "model.safetensors" and not (tmp_path / "cut" / path.name).exists():
            (tmp_path / "cut" / path.name).write_bytes(path.read_bytes())
    run = trained(replace(quick, model_name_or_path=str(tmp_path / "cut")), modules_to_save=["lm_head"])
    merged = merge_adapter(run)
    assert len(base_files(str(tmp_path / "cut")).shards) > 1
    assert sorted(p.name for p in merged.folder.glob("*.safetensors")) == sorted(p.name for p in (tmp_path / "cut").glob("*.safetensors"))
    assert (logits(loaded(merged.folder)) - logits(run.model)).abs().max() < 1e-4


@pytest.mark.trains
def test_what_can_not_be_merged_is_refused_and_leaves_nothing(quick, tiny_model, tmp_path):
    run = trained(quick)
    settings, weights = (run.folder / "adapter" / name for name in ADAPTER_FILES)
    said, kept = json.loads(settings.read_text()), load_file(weights)
    settings.write_text(json.dumps(said | {"r": 4}))
    with pytest.raises(AdapterError, match="is not as it was written"):
        merge_adapter(run)
    (settings.parent / "MANIFEST.json").unlink()
    with pytest.raises(ExportError, match="bfloat16, or as its base"):
        merge_adapter(run, dtype="int4")
    settings.write_text(json.dumps(said | {"trainable_token_indices": [3]}))
    with pytest.raises(ExportError, match="single tokens"):
        merge_adapter(run)
    settings.write_text(json.dumps(said))
    save_file({key.replace("layers.1", "layers.7"): value for key, value in kept.items()}, weights)
    with pytest.raises(ExportError, match="no place in the files"):
        merge_adapter(run)
    with pytest.raises(AdapterError, match="weights are missing"):
        save_adapter(run)
    save_file(kept | {next(iter(kept)): torch.full_like(kept[next(iter(kept))], torch.nan)}, weights)
    with pytest.raises(ValueError, match="NaN"):
        merge_adapter(run)
    assert not list((run.folder / "exports").iterdir())


@pytest.mark.trains
def test_another_base_under_the_same_name_is_refused(quick, tmp_path):
    folder = Path(save_tiny(tmp_path / "base"))
    run = trained(replace(quick, model_name_or_path=str(folder)))
    weights = load_file(folder / "model.safetensors")
    save_file({key: value + 1 for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    for ship in (merge_adapter, save_adapter):
        with pytest.raises(AdapterError, match="another base model"):
            ship(run)


@pytest.mark.trains
def test_saved_adapter_is_plain_peft_and_names_no_place_of_this_machine(quick, tmp_path):
    from peft import PeftModel
    from transformers import AutoTokenizer

    run = trained(quick, use_rslora=True, r=32)
    saved = save_adapter(run)
    plain = PeftModel.from_pretrained(loaded(run.config.model_name_or_path), saved.folder)
    gap = (logits(plain) - logits(run.model)).abs().max().item()
    assert gap < 1e-5
    assert AutoTokenizer.from_pretrained(saved.folder).chat_template == run.tokenizer.chat_template
    told = "".join(path.read_text() for path in saved.folder.iterdir() if path.suffix in (".json", ".jinja", ".md"))
    assert str(Path(run.config.model_name_or_path).parent) not in told and run.facts["marks"]["base"] in told
    with safe_open(saved.folder / ADAPTER_FILES[1], "pt") as file:
        assert len(list(file.keys())) == saved.keys
    assert "32" in saved.servers["vLLM"][0] and "rsLoRA" in saved.servers["llama.cpp"][0]


def test_servers_are_told_what_they_can_not_do():
    assert check_servers({"r": 16}) == {"vLLM": [], "llama.cpp": []}
    assert "DoRA" in check_servers({"r": 8, "use_dora": True})["vLLM"][0]
    assert "--max-lora-rank 64" in check_servers({"r": 8, "rank_pattern": {"q": 64}})["vLLM"][0]
    assert "biases" in check_servers({"r": 8, "bias": "all"})["llama.cpp"][0]


def checked(run, path, **more):
    from finetune_nb.verify import load_check, verify_export

    check = verify_export(run, path, n=3, **more)
    assert load_check(Path(path) if Path(path).is_dir() else Path(path).parent) == check
    return check


@pytest.mark.trains
def test_exports_answer_as_what_was_evaluated_and_faults_are_told(quick):
    run = trained(quick, modules_to_save=["lm_head"], learning_rate=2e-2)
    adapter, merged = save_adapter(run).folder, merge_adapter(run, dtype="bfloat16").folder
    assert checked(run, adapter).ok
    check = checked(run, merged)
    assert check.ok and check.format == "bfloat16" and check.same_prompts == 3 and "transformers" in check.loader
    weights = load_file(merged / "model.safetensors")
    base = load_file(Path(run.config.model_name_or_path) / "model.safetensors")
    save_file(weights | {"lm_head.weight": base["lm_head.weight"].bfloat16()}, merged / "model.safetensors", {"format": "pt"})
    (merged / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    check = checked(run, merged)
    assert not check.ok and merged.is_dir() and check.headline().startswith("Do not ship it") and "prompts are other tokens" in check.headline() and "loss per token" in check.headline()


def test_each_fault_alone_forbids_to_ship():
    from dataclasses import replace as but

    from finetune_nb.verify import ExportCheck, limits_of

    good = ExportCheck("q8_0", "x", 16, 100, 1.0, 1.01, 0.99, 16, 12, 16, 16, limits_of("q8_0"))
    assert good.ok
    for fault in ({"loss_exported": 1.2}, {"loss_exported": 0.7}, {"loss_exported": float("nan")}, {"agreement": 0.8}, {"same_prompts": 15}, {"ended_exported": 3}):
        assert not but(good, **fault).ok, fault
    coarse = but(good, format="q4_0", limits=limits_of("q4_0"), agreement=0.9)
    assert but(coarse, loss_exported=1.2).ok and "0.390, where 0.190 was evaluated" in but(coarse, loss_evaluated=0.19, loss_exported=0.39).headline()
    assert but(coarse, loss_evaluated=0.01, loss_exported=0.05).ok, "so little is told by no answer"
    with pytest.raises(ExportError, match="no limits"):
        limits_of("q2")


def test_a_gguf_file_says_its_format_itself(tmp_path):
    from finetune_nb.verify import format_of, kind_of

    whole = write_small_gguf(tmp_path / "model-q8_0.gguf", 2)
    assert (kind_of(whole), format_of(whole, "gguf")) == ("gguf", "q4_0")
    silent = write_small_gguf(tmp_path / "silent-q8_0.gguf", None)
    assert format_of(silent, "gguf") == "q8_0"
    whole.write_bytes(whole.read_bytes()[:40])
    with pytest.raises(ExportError, match="model-q8_0.gguf is damaged"):
        format_of(whole, "gguf")


def write_small_gguf(path, file_type):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_name("small")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        write()
    return path


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = save_tiny(tmp_path_factory.mktemp("wide"), tie_word_embeddings=True)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(folder, hidden_size=256, intermediate_size=256, vocab_size=VOCABULARY + 64, head_dim=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.trains
@pytest.mark.parametrize("kind", [pytest.param("bf16", marks=pytest.mark.slow), "q8_0", "q4_k_m"])
def test_gguf_answers_as_what_was_evaluated(quick, wide_model, kind):
    pytest.importorskip("gguf")
    if kind == "q4_k_m":
        pytest.importorskip("llama_cpp", reason="llama.cpp's own quantiser is not installed")
    from finetune_nb.gguf_file import export_gguf, gguf_facts

    run = trained(replace(quick, model_name_or_path=wide_model), target_modules="all-linear")
    written = export_gguf(run, kind)
    check = checked(run, written.path)
    assert check.format == kind and check.same_prompts == 3 and abs(check.loss_exported - check.loss_evaluated) < 0.02, check
    facts = gguf_facts(written.path)
    assert facts["tokenizer.chat_template"] == run.tokenizer.chat_template and facts["tokenizer.ggml.eot_token_id"] == 2 and facts["tokenizer.ggml.padding_token_id"] == 2
    other = run.tokenizer.chat_template + "{# another #}"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):  # of another model, in a folder of downloads
        (written.path.parent / name).write_text(json.dumps({"chat_template": other, "auto_map": {"AutoTokenizer": ["odd.Odd", None]}}))
    assert load_tokenizer(str(convert_gguf(written.path))).chat_template == run.tokenizer.chat_template
    assert len(facts["tokenizer.ggml.tokens"]) == VOCABULARY + 64 and [p.name for p in (run.folder / "exports").iterdir()] == [f"gguf-{kind}"]


SHAPES = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "llama": ("LlamaConfig", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
}


@pytest.mark.parametrize("kind", [kind if kind == "mistral" else pytest.param(kind, marks=pytest.mark.slow) for kind in SHAPES])
def test_architectures_of_gguf_compute_the_same(tmp_path, tokenizer, kind):
    pytest.importorskip("gguf")
    if kind in ("qwen3", "llama"):  # the GGUF reader of transformers knows neither qwen3's head_dim nor the rope factors of Llama 3
        pytest.importorskip("llama_cpp", reason="only llama.cpp reads all that such a file holds")
    import transformers

    from finetune_nb.fresh import Questions, ask_fresh, ask_llama_cpp, ask_transformers
    from finetune_nb.gguf_file import write_gguf

    name, more = SHAPES[kind]
    torch.manual_seed(0)
    shape = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**shape, **more))
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # biases and norms that do something
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model-f32.gguf", "f32", end_of_turn=2)
    ids = list(range(100, 300))
    asked = Questions([[{"role": "user", "content": "Why, in 2024?"}]], [None], [{"input_ids": ids, "labels": ids}], max_new_tokens=2)
    folder = ask_transformers(model, tokenizer, asked)
    file = ask_llama_cpp(tmp_path / "model-f32.gguf", asked, 1) if find_spec("llama_cpp") else ask_fresh("gguf", tmp_path / "model-f32.gguf", asked)
    assert file.prompts == folder.prompts and abs(file.losses[0] - folder.losses[0]) / 199 < 0.01, file.loader
    assert sum(a == b for a, b in zip(file.likeliest[0], folder.likeliest[0], strict=True)) >= 195


def test_what_transformers_overlooks_in_a_gguf_file_is_not_judged_by_it(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    import transformers

    from finetune_nb import fresh
    from finetune_nb.gguf_file import write_gguf

    kinds = {
        "nothing": ("LlamaConfig", {"head_dim": 32}), "biases": ("LlamaConfig", {"mlp_bias": True}), "factors of Llama 3": ("LlamaConfig", SHAPES["llama"][1]),
        "'linear'": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}), "heads of 16 numbers": ("Qwen3Config", {"head_dim": 16}), "none": ("Qwen3Config", {"head_dim": 128}),
    }  # fmt: skip
    monkeypatch.setattr(fresh, "load_llama_cpp", lambda: None)
    tokenizer = sentence_pieces(tmp_path, "prepend", None)  # a small one: a file is written for each
    for why, (name, more) in kinds.items():
        shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**shape, **more)).eval()
        for parameter in model.parameters():
            parameter.data += 0.1
        model.save_pretrained(tmp_path)
        write_gguf(tmp_path, tmp_path / "x-f32.gguf", "f32")
        if why in ("nothing", "none"):
            fresh.validate_judge(tmp_path / "x-f32.gguf")
        else:
            with pytest.raises(fresh.NotJudgedError, match=f"may be right.*{why}.*llama_cpp"):
                fresh.validate_judge(tmp_path / "x-f32.gguf")
        try:
            read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x-f32.gguf", dtype=torch.float32)
            same = torch.allclose(logits(read, range(9, 30)), logits(model, range(9, 30)), atol=1e-3)
        except RuntimeError:  # shapes that are not those of the file
            same = False
        assert same is (why in ("nothing", "none")), f"{why}: what transformers reads has changed"


def sentence_pieces(folder, scheme, template):
    "A tokenizer as SentencePiece makes them: pieces with bytes to fall back on, joined in the order of their rank; every way to join two pieces into a third is a merge."
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    words = Path(__file__).read_text(encoding="utf-8").splitlines()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "[INST]", "[/INST]"]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False))
    vocab = trained.get_vocab()
    merges = [(piece[:i], piece[i:]) for piece in sorted(vocab, key=vocab.get) if piece not in special for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    if scheme == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("scheme", ["prepend", "first", pytest.param("never", marks=pytest.mark.slow)])
def test_sentencepiece_tokenizers_read_the_same_tokens_in_llama_cpp(tmp_path, scheme):
    pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_nb.fresh import Questions, ask_llama_cpp, load_llama_cpp, validate_judge
    from finetune_nb.gguf_file import tokens_of, write_gguf

    template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    tokenizer = sentence_pieces(tmp_path, scheme, template)
    said = tokens_of(tokenizer, len(tokenizer))
    assert said["model"] == "llama" and said["add_space_prefix"] is (scheme == "prepend")
    if load_llama_cpp() is None:
        pytest.skip("only llama.cpp tells which tokens it reads")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "x-f32.gguf", "f32", end_of_turn=2)
    validate_judge(tmp_path / "x-f32.gguf")
    texts = ["What is 3 plus one?", "  two  spaces\n\n\tand a tab", "déjà vu 東京 🙂", "for parameter in model.parameters():", "", "  ", "[brackets] </s> <unk> <0x41>"]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": text}] for text in texts]
    asked = Questions(chats, [None] * len(chats), [{"input_ids": [1, 9, 10], "labels": [-100, 9, 10]}] * len(chats), max_new_tokens=1)
    found = ask_llama_cpp(tmp_path / "x-f32.gguf", asked, 1).prompts
    for text, chat, ids in zip(texts, chats, found, strict=True):
        assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"], text


def test_what_gguf_can_not_say_is_refused_by_name(tokenizer):
    from transformers import GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config

    from finetune_nb.gguf_file import architecture_of, cutting_rule, space_prefix, tokens_of, validate_kind

    pytest.importorskip("gguf")
    with pytest.raises(ExportError, match="gemma is not written"):
        architecture_of(GemmaConfig())
    with pytest.raises(ExportError, match="Positions of the kind 'yarn'"):
        architecture_of(LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}))
    for config in (Qwen2Config(head_dim=32), Qwen3Config(attention_bias=True)):
        with pytest.raises(ExportError, match="llama.cpp loads no qwen"):
            architecture_of(config)
    with pytest.raises(ExportError, match="changes a text by NFKC"):
        space_prefix({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}})
    with pytest.raises(ExportError, match="cuts text"):
        cutting_rule({"pre_tokenizer": {"type": "Metaspace"}})
    with pytest.raises(ExportError, match="no kind of GGUF"):
        validate_kind("iq1")
    assert tokens_of(tokenizer, len(tokenizer))["tokens"][1] == "<|im_start|>"


@pytest.mark.trains
def test_one_call_and_the_command_line_export_check_and_list_what_would_go(quick, capsys, monkeypatch):
    from finetune_nb import upload
    from finetune_nb.cli import main
    from finetune_nb.upload import upload_export

    run = trained(quick, 2, learning_rate=2e-2)
    assert main(["export", str(run.folder), "--formats", "merged", "--upload", "me/coder", "--data-license", "cc0-1.0"]) == 0
    shown = capsys.readouterr().out
    assert "ship" in shown and "Would go to me/coder (private)" in shown and "model.safetensors" in shown
    folder = run.folder / "exports" / "merged"
    card = (folder / "README.md").read_text()
    assert "base_model:" not in card, "a folder's name may be the name of another model on the hub"
    assert "cc0-1.0" in card and "Ship it" in card and run.facts["data"]["train"]["sha256"] in card and "vllm serve" in card
    assert main(["export", str(run.folder), "--formats", "merged", "adapter", "--upload", "me/coder"]) == 2 and "would lie over one another" in capsys.readouterr().err
    sent = upload.contents_of(folder, "me/coder")["README.md"].decode()
    assert "\n# me/coder\n" in sent and "vllm serve me/coder" in sent and "./merged" not in sent and "./merged" in card
    private = [str(run.folder.parent), *(chat.prompt[-1]["content"] for chat in run.test), *(chat.answer for chat in run.test)]
    assert not any(word in card for word in private)
    assert not any(word.encode() in what for what in upload_bytes(folder).values() for word in private)
    assert main(["export", str(run.folder), "--formats", "onnx"]) == 2 and "no format" in capsys.readouterr().err
    for call in ({}, {"dry_run": False, "token": "none", "endpoint": "http://127.0.0.1:9"}):
        if call:
            with pytest.raises(ExportError, match="the hub did not take it"):
                upload_export(folder, "me/coder", **call)
    check = json.loads((folder / "export_check.json").read_text())
    (folder / "export_check.json").write_text(json.dumps(check | {"agreement": 0.1}))
    with pytest.raises(ExportError, match="Do not ship it"):
        upload_export(folder, "me/coder")
    for name in ("train.json", "answers.json", ".env.json", "id_rsa.model", "other.gguf", "notes.jinja"):
        (folder / name).write_text("{}")
        with pytest.raises(ExportError, match=f"{name} is no part of an export"):
            upload_export(folder, "me/coder", unchecked=True)
        (folder / name).unlink()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="not as it was exported"):
        upload_export(folder, "me/coder", unchecked=True)


def upload_bytes(folder):
    from finetune_nb.upload import contents_of

    found = {name: what if isinstance(what, bytes) else what.read_bytes() for name, what in contents_of(folder).items()}
    return {name: what for name, what in found.items() if not name.endswith(".safetensors")}


@pytest.mark.trains
def test_a_run_in_4_bits_is_merged_onto_the_full_base_and_how_far_they_are_apart_is_said(quick, wide_model):
    bnb = pytest.importorskip("bitsandbytes.functional")
    from peft import PeftModel

    from finetune_nb.export import export_run

    run = trained(replace(quick, model_name_or_path=wide_model), load_in_4bit=True, learning_rate=2e-2)
    base, change, size = load_file(Path(wide_model) / "model.safetensors"), 0.0, 0.0
    for name, layer in run.model.named_modules():
        if name.endswith(("q_proj.base_layer", "k_proj.base_layer", "v_proj.base_layer", "o_proj.base_layer")):
            full = base[name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"]
            change += (bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float() - full).square().sum().item()
            size += full.square().sum().item()
    run.release()
    exports = export_run(run, ["merged"], n=3, say=lambda line: None)
    check, folder = exports.items[0].check, exports.items[0].path
    said = f"4 bits, which were {(change / size) ** 0.5:.1%} away"
    assert 0.05 < (change / size) ** 0.5 < 0.15
    assert said in str(exports) and said in str(check) and said in (folder / "README.md").read_text() and said in (folder / "export_check.json").read_text()
    assert check.loss_exported != check.loss_evaluated and "stands beside full ones now" in check.limits.why
    theirs = PeftModel.from_pretrained(loaded(wide_model), run.folder / "adapter").merge_and_unload().state_dict()
    ours = load_file(folder / "model.safetensors")
    assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-6, "merged onto something else than the full base"


@pytest.mark.trains
def test_a_file_that_can_not_be_judged_is_kept_and_not_called_bad(quick, biased_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    from finetune_nb import fresh
    from finetune_nb.cli import main
    from finetune_nb.gguf_file import gguf_facts

    monkeypatch.setattr(fresh, "load_llama_cpp", lambda: None)
    shutil.copytree(biased_model, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    run = trained(replace(quick, model_name_or_path=str(tmp_path / "base")))
    with pytest.raises(SystemExit, match="1"):
        main(["export", str(run.folder), "--formats", "q8_0"])
    shown, folder = capsys.readouterr().out, run.folder / "exports" / "gguf-q8_0"
    assert "not checked" in shown and "could not be judged here" in shown and "not ship" not in shown and "0.0 MB" not in shown
    assert "Not checked" in (folder / "README.md").read_text() and not (folder / "export_check.json").exists()
    assert gguf_facts(next(folder.glob("*.gguf")))["general.license"] == "mit"


def test_a_llama_cpp_that_does_not_load_is_told_before_anything_is_written(tmp_path, monkeypatch):
    from finetune_nb.fresh import load_llama_cpp
    from finetune_nb.gguf_file import validate_kind

    pytest.importorskip("gguf")
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('libggml.so.0: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    for call in (load_llama_cpp, lambda: validate_kind("q4_k_m")):
        with pytest.raises(ExportError, match="can't be loaded .libggml"):
            call()


def test_what_can_not_be_served_is_told(tmp_path, monkeypatch):
    import socket

    from finetune_nb import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(ExportError, match=r"needs uvicorn: pip install .finetune_nb\[serve\]"):
        serve.serve_model(tmp_path)
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    for name, why in (("adapter_config.json", "no whole model"), ("x.gguf", "llama-server")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ExportError, match=why):
            serve.serve_model(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text("{}")
    served = serve.serve_model(tmp_path)
    assert served.command()[3:] == ["serve", tmp_path.name, "--host", "127.0.0.1", "--port", str(served.port), "--device", "auto"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ExportError, match="Port .* can't be had"):
            serve.serve_model(tmp_path, taken.getsockname()[1])


def test_what_was_changed_since_its_export_is_not_served(tmp_path, capsys):
    from finetune_nb.serve import servable

    merged = tmp_path / "run-001" / "exports" / "merged"
    merged.parent.mkdir(parents=True)
    with whole_folder(merged) as part:
        part.write("config.json", b"{}")
    (merged / "export_check.json").write_text("no check")
    with pytest.raises(ExportError, match=r"export_check.json can't be read"):
        servable(merged)
    (merged / "export_check.json").unlink()
    assert servable(merged) == merged
    (merged / "config.json").write_text("[]")
    for place in (merged, tmp_path / "run-001"):
        with pytest.raises(ExportError, match=r"merged is not as it was exported .config.json is not as it was written., and is not served. Export it again"):
            servable(place)
    (merged / "MANIFEST.json").unlink()
    with pytest.raises(ExportError, match=r"merged is not as it was exported .MANIFEST.json is missing"):
        servable(tmp_path / "run-001")
    assert servable(merged) == merged, "a folder from elsewhere has no manifest"


SERVER = """
import socket, sys, time
def main():
    if sys.argv[2] == "slow":
        time.sleep(600)
    with socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))) as server:
        while True:
            with server.accept()[0] as asked:
                asked.recv(1000)
                asked.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
"""
SERVE = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from finetune_nb import cli, serve; serve.find_spec = str; sys.exit(cli.main(['serve', sys.argv[1], '--port', sys.argv[2]]))"


@pytest.fixture
def stand_in(tmp_path):
    "A server that loads nothing, where transformers is looked for; the folder of a model, and one that is long in the loading."
    for name, text in (("__init__", ""), ("cli/__init__", ""), ("cli/transformers", SERVER)):
        (file := tmp_path / "lib" / "transformers" / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for name in ("model", "slow"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    return {"PYTHONPATH": str(tmp_path / "lib")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")
@pytest.mark.parametrize("name, number, ended", [("model", signal.SIGTERM, 128 + signal.SIGTERM), ("model", signal.SIGINT, 0), ("slow", signal.SIGTERM, 128 + signal.SIGTERM), ("slow", signal.SIGINT, 0)])
def test_a_server_ends_with_the_command_that_started_it(name, number, ended, stand_in, tmp_path):
    import psutil

    from finetune_nb.serve import free_port

    command = forked.Forked(SERVE, str(tmp_path / name), str(free_port()), env=stand_in)
    for line in command.stdout:
        if (name == "model" and "answers at" in line) or (name == "slow" and "Loading" in line):
            break
    (server,) = psutil.Process(command.pid).children()
    os.kill(command.pid, number)
    _, errors = command.communicate()
    assert command.returncode == ended and errors == "" and not server.is_running()


@pytest.mark.skipif(os.name == "nt", reason="there it does not listen")
def test_a_server_ends_when_nobody_holds_it_any_more(stand_in, tmp_path, monkeypatch):
    from finetune_nb.serve import ServedModel, free_port

    monkeypatch.setenv("PYTHONPATH", stand_in["PYTHONPATH"])
    before = signal.getsignal(signal.SIGTERM)
    with ServedModel(tmp_path / "model", free_port()) as served:
        served.wait()
        served.process.stdin.close()  # as the system closes it after a process that is killed
        assert served.process.wait(30) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_nothing_that_is_no_part_of_an_export_goes(tmp_path):
    from finetune_nb.upload import contents_of

    tmp_path = tmp_path / "merged"
    with whole_folder(tmp_path) as part:
        part.write("config.json", b"{}")
    assert list(contents_of(tmp_path)) == ["config.json"]
    (tmp_path / "README.md").write_text("token: hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH")
    with pytest.raises(ExportError, match="looks like a key"):
        contents_of(tmp_path)
    (tmp_path / "README.md").unlink()
    for name in ("train.jsonl", "notes.txt", "optimizer.pt"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ExportError, match=name):
            contents_of(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("chat", [[("user", "Hi")], [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "  spaces \n\n and {{ braces }}")]], ids=len)
def test_the_template_for_ollama_gives_the_very_prompt(tokenizer, chat):
    from finetune_nb.modelfile import find_pieces, go_template

    messages = [{"role": role, "content": content} for role, content in chat]
    pieces = find_pieces(tokenizer, [messages])
    assert pieces.render(messages) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert go_template(pieces, tokenizer).startswith('{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system')
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    trimmed = find_pieces(tokenizer, [messages])
    assert (trimmed is None) is (len(chat) > 1), "a template that trims is not the same for a chat with spaces"


def test_a_system_block_that_is_always_there_is_there_in_ollama_too(tokenizer):
    from finetune_nb.modelfile import _how_exact, find_pieces, go_template

    block = "<|im_start|>system\\nToday: DATE\\n"
    template = """{% set own = messages[0].content if messages[0].role == 'system' else '' %}BLOCK{{ own }}<|im_end|>{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"""
    tokenizer.chat_template = template.replace("BLOCK", block.replace("\\n", "\n"))
    pieces = find_pieces(tokenizer)
    assert pieces.system == ""
    assert go_template(pieces, tokenizer).startswith('{{ if ne (index .Messages 0).Role "system" }}<|im_start|>system\nToday: DATE\n<|im_end|>{{ end }}{{ range .Messages }}')
    assert _how_exact(pieces, "", tokenizer, 2)[0] and not _how_exact(pieces, 'a """ b', tokenizer, 2)[0] and not _how_exact(None, None, tokenizer, 2)[0]
    tokenizer.chat_template = tokenizer.chat_template.replace("DATE", "{{ strftime_now('%Y') }}")
    exact, notes = _how_exact(find_pieces(tokenizer), "", tokenizer, 2)
    assert not exact and "dated with the day of this export" in notes[-1]


def test_nothing_but_an_earlier_export_of_the_same_run_is_replaced(quick, tmp_path):
    from finetune_nb.export import export_run

    run = trained(quick, 2, learning_rate=2e-2)
    base = Path(run.config.model_name_or_path)
    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    (tmp_path / "mine" / "adapter" / "thesis.txt").write_text("precious")
    refused = {
        tmp_path / "mine" / "adapter": "holds thesis.txt, which is no part of an export", run.folder: "belongs to the run itself", run.folder.parent: "belongs to the run itself",
        run.folder / "adapter": "belongs to the run itself", base: "holds the base model", base / "config.json": "is a file",
    }  # fmt: skip
    for place, why in refused.items():
        before = sorted(path.as_posix() for path in place.parent.rglob("*"))
        for write in (save_adapter, merge_adapter):
            with pytest.raises(ExportError, match=f"{why}.*Name another folder"):
                write(run, place)
        assert sorted(path.as_posix() for path in place.parent.rglob("*")) == before
    found = export_run(run, ["adapter"], tmp_path / "mine", check=False, say=lambda line: None)
    assert not found.ok and "holds thesis.txt" in str(found) and (tmp_path / "mine/adapter/thesis.txt").read_text() == "precious"
    place = tmp_path / "theirs"
    assert save_adapter(run, place).folder == save_adapter(run, place).folder == place, "an earlier one of its own"
    (place / "README.md").write_text("a card")
    save_adapter(run, place)
    other = trained(replace(quick, run_name="other"), 2, learning_rate=1e-2)
    with pytest.raises(ExportError, match="holds an export of another run"):
        save_adapter(other, place)
    (place / "notes.md").write_text("mine")
    with pytest.raises(ExportError, match=r"holds notes\.md"):
        save_adapter(run, place)


def test_a_model_that_lost_its_end_is_not_shipped(quick):
    from dataclasses import replace as but

    run = trained(quick, 2, learning_rate=2e-2)
    merged = merge_adapter(run).folder
    assert "No answer was short enough" in checked(run, merged).headline() or checked(run, merged).ended_evaluated
    for name in ("generation_config.json", "config.json"):
        said = json.loads((merged / name).read_text())
        (merged / name).write_text(json.dumps(said | {"eos_token_id": 7}))
    check = checked(run, merged)
    assert not check.ok and "do not name the token with which answers ended" in check.headline()
    one = but(check, knows_end=True, chats=1, same_prompts=1, ended_evaluated=1, ended_exported=0)
    assert "it ends 0 of 1 answers" in one.headline() and but(one, ended_exported=1).ok


def test_a_killed_export_leaves_nothing_and_a_base_without_prefix_is_converted(quick, monkeypatch):
    from finetune_nb import gguf_file

    base = Path(quick.model_name_or_path)
    bare = base.with_name("bare")
    if not bare.exists():
        shutil.copytree(base, bare)
        save_file({name.removeprefix("model."): weight.clone() for name, weight in load_file(base / "model.safetensors").items()}, bare / "model.safetensors", {"format": "pt"})
    run = trained(replace(quick, model_name_or_path=str(bare)), 2, learning_rate=2e-2)
    work = run.folder / "exports" / ".gguf-f32.work"
    work.mkdir(parents=True)
    (work / "of-one-that-died").write_text("")
    written = gguf_file.export_gguf(run, "f32")
    assert written.bytes > 0 and [path.name for path in (run.folder / "exports").iterdir()] == ["gguf-f32"]
    assert checked(run, written.path).ok
