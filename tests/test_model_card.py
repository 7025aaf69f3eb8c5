"""The model card: what it says to type runs what was evaluated, and where nothing can, it says why."""

import json
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
from conftest import some_splits

from finetune_nb.adapter import save_adapter
from finetune_nb.gguf_file import known_license
from finetune_nb.model_card import UNKNOWN, _front, base_license, how_to_run, write_model_card
from finetune_nb.training import train

VLLM, CPP, SERVER = "vLLM", "llama.cpp", "A server for any OpenAI client, by llama.cpp"


@pytest.mark.parametrize("settings, word", [({"use_dora": True}, "DoRA"), ({"modules_to_save": ["lm_head"]}, "modules trained whole"), ({"bias": "all"}, "trained biases")], ids=lambda x: str(x)[:20])
def test_a_server_that_can_not_use_the_adapter_gets_a_reason_and_no_command(settings, word):
    said = how_to_run("adapter", "me/x", "org/base", adapter={"r": 8, **settings})
    for place, way in ((VLLM, "merged"), (CPP, "q8_0")):
        assert said[place].startswith(f"# {place}: it knows no {word}: merge the adapter") and said[place].endswith(f"finetune_nb export RUN --formats {way})")
        assert "\n" not in said[place]


def test_what_a_server_has_to_be_told_of_the_adapter_stands_in_its_command():
    said = how_to_run("adapter", "me/x", "org/base", "abc", {"r": 8, "rank_pattern": {"q_proj": 40}, "use_rslora": True})
    assert said[VLLM] == "vllm serve org/base --enable-lora --lora-modules tuned=me/x --revision abc --max-lora-rank 64"
    assert said[CPP].startswith("# llama.cpp: it does not read the scale of rsLoRA")
    assert how_to_run("adapter", "me/x", "org/base", adapter={"r": 8})[CPP].startswith("python convert_lora_to_gguf.py me/x  #")
    assert "--base '/path/to/my base'" in how_to_run("adapter", "me/x", "/path/to/my base", adapter={"r": 8})[CPP], "its name means nothing on the hub"


def test_a_base_in_a_gguf_file_is_loaded_as_one_and_not_served_by_what_can_not():
    said = how_to_run("adapter", "./adapter", "/path/to/base.gguf", adapter={"r": 8})
    assert "from_pretrained('/path/to', gguf_file='base.gguf'" in said["Python"] and "from_pretrained('/path/to/base.gguf'" not in said["Python"]
    assert said[VLLM].startswith("# vLLM: it puts adapters beside a base model that is not quantised")
    assert said[CPP].startswith("# llama.cpp: its converter reads config.json")


VARIABLES = {"enable_thinking": False, "note": "it's", "budget": None}


def test_the_variables_of_the_template_are_passed_or_it_is_said_that_they_can_not_be():
    for kind, place, option in (("gguf", SERVER, "--chat-template-kwargs"), ("gguf", CPP, "--chat-template-kwargs"), ("merged", VLLM, "--default-chat-template-kwargs"), ("adapter", VLLM, "--default-chat-template-kwargs")):
        words = shlex.split(how_to_run(kind, "x", "base", adapter={"r": 8}, variables=VARIABLES)[place])
        assert json.loads(words[words.index(option) + 1]) == VARIABLES, (kind, place)
    for kind in ("adapter", "merged"):
        assert _asked(how_to_run(kind, "x", "base", adapter={"r": 8}, variables=VARIABLES)["Python"]).items() >= VARIABLES.items()
        assert not _asked(how_to_run(kind, "x", "base", adapter={"r": 8})["Python"]).keys() & VARIABLES.keys()
    said = how_to_run("gguf", "x.gguf", variables={"enable_thinking": False, "budget": None})
    assert "{%- set enable_thinking = false %}{%- set budget = none %}" in said["LM Studio"]
    assert said["Python"].startswith("# create_chat_completion passes no variables") and "TEMPLATE" in said["Ollama"]
    assert not any("template" in what for what in how_to_run("gguf", "x.gguf").values())


def _asked(code):
    "What the lines of the card give to the chat template."
    told = {}
    line = next(line for line in code.splitlines() if line.startswith("asked ="))
    exec(line, {"tokenizer": SimpleNamespace(apply_chat_template=lambda messages, **given: told.update(given))})
    return told


CARDS = {
    'license: "apache-2.0"': "apache-2.0",
    "license: mit\nlicense_name: none of them": "mit",
    "license: other\nlicense_name: llama3.1\nlicense_link: https://example.org/l": "llama3.1 (https://example.org/l)",
    "license: other\nlicense_link: LICENSE": "other (LICENSE)",
    "license: other\nlicense_name: own": "own (other)",
    "license: other": "other",
    "license:\n- mit\n- apache-2.0": "mit, apache-2.0",
    "tags: [a]\n---\nlicense: mit": None,
    "tags: [a]\n---\n```\nlicense: mit\n```": None,
    "license: [mit": None,
    "just words": None,
}


def test_a_licence_is_what_the_head_of_the_readme_says(tmp_path):
    for head, license in CARDS.items():
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\nlicense: gpl-3.0\n")
        assert known_license(str(tmp_path)) == license, head
    for whole in ("# A model\n\nlicense: mit\n", "# A model\n---\nlicense: mit\n---\n", ""):
        (tmp_path / "README.md").write_text(whole)
        assert known_license(str(tmp_path)) is None, whole
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert base_license(str(tmp_path)) == UNKNOWN


def test_the_licence_of_a_fetched_model_is_read_from_the_hub_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert known_license("org/base") is None
    old, new = "a" * 40, "b" * 40
    for commit, license in ((old, "mit"), (new, "apache-2.0")):
        folder = tmp_path / "models--org--base" / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    (tmp_path / "models--org--base" / "refs").mkdir()
    (tmp_path / "models--org--base" / "refs" / "main").write_text(new)
    assert (known_license("org/base"), known_license("org/base", old)) == ("apache-2.0", "mit")
    assert known_license("org/base", "c" * 40) is None and known_license("no/such/name") is None


def test_the_head_of_the_card_calls_a_licence_as_a_hub_reads_it():
    assert "license: other\nlicense_name: llama3.1\nlicense_link: https://example.org/l" in _front("merged", None, "llama3.1 (https://example.org/l)")
    own = _front("merged", None, "own (other)")
    assert "license: other\nlicense_name: own" in own and "license_link" not in own
    assert "license: mit\n" in _front("merged", None, "mit") and "license" not in _front("merged", None, UNKNOWN)


@pytest.mark.trains
def test_the_card_names_the_base_that_it_was_merged_onto_and_what_the_answers_were_evaluated_with(quick, tmp_path, monkeypatch):
    from finetune_nb import fresh
    from finetune_nb.export import export_run

    monkeypatch.setattr(fresh, "subprocess", SimpleNamespace(run=forked.run_command, DEVNULL=subprocess.DEVNULL))
    splits = some_splits()
    config = replace(quick, num_train_epochs=1, per_device_train_batch_size=8, preflight=False, chat_template_kwargs={"enable_thinking": False})
    run = train(config, splits._replace(test=splits.test[:2]), say=lambda line: None)
    other = tmp_path / "other-base"
    shutil.copytree(run.config.model_name_or_path, other)
    (other / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\nlicense_link: https://example.org/l\n---\n")
    for check in (True, False):
        item = export_run(run, ["merged"], folder=tmp_path / str(check), base=str(other), check=check, say=lambda line: None).items[0]
        card = (item.path / "README.md").read_text()
        assert "| merged onto | other-base |" in card and "other-base was named as the full-precision base model" in card
        assert "license_name: llama3.1" in card and "base model that it was merged onto | llama3.1" in card
        told = [card, *((item.path / name).read_text() for name in ("export_check.json",) if check)]
        assert not any(str(place) in text for text in told for place in (tmp_path, Path(run.config.model_name_or_path).parent))
        assert ("other-base" in told[-1]) and (card.count("was named as the full-precision") == 1)
    assert 'evaluated with these variables of the chat template: {"enable_thinking": false}' in card
    assert "--default-chat-template-kwargs '{\"enable_thinking\": false}'" in card and "return_tensors='pt', enable_thinking=False)" in card
    folder = save_adapter(run, tmp_path / "adapter").folder
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"r": 2 * run.config.r}))  # as PiSSA is saved
    card = write_model_card(run, folder).read_text()
    assert run.config.r == 16 and "--max-lora-rank 32" in card and "merged onto" not in card
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    card = write_model_card(run, folder).read_text()
    assert "vllm serve" not in card and "convert_lora" not in card and "it knows no DoRA" in card
