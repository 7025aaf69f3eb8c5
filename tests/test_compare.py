"""Comparing, asking and exporting: what is loaded, stopped, refused and let go; the panel's other parts are in test_panel.py."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from finetune_nb import models
from finetune_nb.config import FinetuneConfig
from finetune_nb.lora import add_lora, load_adapter
from finetune_nb.models import EMBEDDED_MODEL
from finetune_nb.runs_view import loading_code
from finetune_nb.training import load_base

# --- the program that loads an adapter elsewhere

TAIL = """
import json, torch
ids = tokenizer("What is 3 plus one?", return_tensors="pt")["input_ids"].to(model.device)
with torch.no_grad():
    print("LOGITS", json.dumps(model(input_ids=ids).logits[0, -1].float().tolist()))
"""


def make_adapter(config, folder):
    "An adapter that changes what its base model says; returns what base and tuned make of a question."
    base, tokenizer = load_base(config, lambda line: None)
    ids = tokenizer("What is 3 plus one?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base(input_ids=ids).logits[0, -1].float()
        model = add_lora(base, config)
        torch.manual_seed(1)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.5)
        model.save_pretrained(folder, save_embedding_layers=False)
        tuned = load_adapter(load_base(config, lambda line: None)[0], folder)(input_ids=ids).logits[0, -1].float()
    assert (plain - tuned).abs().max() > 0.1
    return plain, tuned


@pytest.fixture(scope="module")
def wider_model(tiny_model, tmp_path_factory):
    "The tiny model with rows of 64: what bitsandbytes computes on a CPU needs whole blocks."
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wider")
    shape = LlamaConfig.from_pretrained(tiny_model)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**shape.to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def hub_with(folder, cache):
    "The cache of a hub that knows the model in a folder, as somebody/tiny."
    snapshot = cache / "hub/models--somebody--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    return "somebody/tiny"


@pytest.mark.parametrize(("kind", "changes"), [
    ("hub", {"bf16": False}), ("folder", {"bf16": None}), ("folder", {"bf16": True}), ("folder", {"bf16": False, "load_in_4bit": True}),
    ("gguf", {"bf16": False}), ("gguf", {"bf16": False, "load_in_4bit": True}), ("embedded", {"bf16": False}),
])  # fmt: skip
def test_the_loading_code_loads_what_was_trained(kind, changes, tiny_model, wider_model, tmp_path):
    if changes.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    name = {"hub": tiny_model, "folder": wider_model, "gguf": str(models._embedded_gguf()), "embedded": EMBEDDED_MODEL}[kind]
    config = FinetuneConfig(model_name_or_path=name, use_cpu=True, r=2, target_modules="attention", **changes)
    plain, tuned = make_adapter(config, tmp_path / "it's an adapter")
    if kind == "hub":
        config = replace(config, model_name_or_path=hub_with(tiny_model, tmp_path / "cache"))
    code = loading_code(config, tmp_path / "it's an adapter")
    assert ("finetune_nb" in code) == (kind == "embedded" or (kind == "gguf" and bool(changes.get("load_in_4bit"))))
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    if kind == "hub":
        variables["HF_HOME"] = str(tmp_path / "cache")
    made = subprocess.run([sys.executable, "-c", code + TAIL], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    logits = torch.tensor(json.loads(made.stdout.rpartition("LOGITS ")[2]))
    near = (logits - tuned).abs().max()
    assert near < (1e-3 if changes.get("bf16") is False else 0.1 * (plain - tuned).abs().max()), near
    if kind in ("hub", "folder") and changes.get("bf16") is False and not changes.get("load_in_4bit"):
        assert near < 1e-5


def test_the_loading_code_knows_no_tilde(tmp_path):
    for name in ("~/models/m.gguf", "~/models/m"):
        code = loading_code(FinetuneConfig(model_name_or_path=name), tmp_path)
        assert "~" not in code and str(Path.home() / "models") in code
    assert "base = '.'" in loading_code(FinetuneConfig(model_name_or_path="m.gguf"), tmp_path)
