"""Exports: what was trained is what is shipped, to the bit where it can be, and refused where it can't."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_tiny, some_splits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune_nb.adapter import ExportError, check_servers, save_adapter
from finetune_nb.lora import ADAPTER_FILES, AdapterError
from finetune_nb.merge import base_files, merge_adapter
from finetune_nb.training import load_run, train

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(config, **more):
    run = train(replace(config, num_train_epochs=1, per_device_train_batch_size=8, early_stopping_patience=0, **more), some_splits(), say=lambda line: None)
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
@pytest.mark.parametrize("name", VARIANTS)
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
@pytest.mark.parametrize("bias", ["lora_only", "all"])
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
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "cut", max_shard_size="4MB")
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
