"""Where models come from: no code, no pickles, no way out of the folder, no mix-up of names."""

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from conftest import ROOT
from packaging.version import Version

from finetune_nb import origin
from finetune_nb.config import FinetuneConfig, field_help, save_config
from finetune_nb.models import EMBEDDED_MODEL, ModelError, find_model, load_model, load_tokenizer
from finetune_nb.origin import FLOORS, INDEX, check_index, check_model_files, check_versions, is_hub_name, read_settings, trust_remote_code
from finetune_nb.planning import base_shape

CODE = "from pathlib import Path\nPath({!r}).write_text('ran')\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\nclass OddConfig(C):\n    model_type = 'odd'\nclass OddModel(M):\n    config_class = OddConfig\n"


@pytest.fixture
def model(tiny_model, tmp_path):
    "A copy of the tiny model to spoil."
    return Path(shutil.copytree(tiny_model, tmp_path / "a-model"))


@pytest.fixture
def nobody_trusted(monkeypatch):
    monkeypatch.setattr(origin, "_TRUSTED", set())


def change(file, **more):
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def with_code(model, canary, model_type):
    "Puts Python code beside the weights, which leaves a canary when it is run."
    (model / "odd.py").write_text(CODE.format(str(canary)))
    change(model / "config.json", model_type=model_type, auto_map={"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"})
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["odd.OddTokenizer", None]})
    return str(model)


@pytest.mark.parametrize("model_type", ["odd", "llama"])
def test_code_of_a_model_is_not_run(model_type, model, tmp_path, nobody_trusted):
    name = with_code(model, tmp_path / "canary", model_type)
    for load in (load_model, load_tokenizer, lambda n: base_shape(FinetuneConfig(model_name_or_path=n))):
        try:
            load(name)
        except ModelError as error:
            assert model_type == "odd" and "comes with Python code of its own, which was not run" in str(error) and f"trust_remote_code({name!r})" in str(error)
    assert not (tmp_path / "canary").exists() and not [m for m in sys.modules if "odd" in m.split(".")[-1:]]


def test_it_runs_for_the_one_model_that_was_named(model, tmp_path):
    name = with_code(model, tmp_path / "canary", "odd")
    (model / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in json.loads((model / "tokenizer_config.json").read_text()).items() if k != "auto_map"}))
    other = shutil.copytree(model, tmp_path / "other")
    code = (
        "import sys\nfrom finetune_nb.models import load_model, find_model, ModelError\nfrom finetune_nb import trust_remote_code\n"
        f"trust_remote_code({name!r})\nprint(type(load_model({name!r}, use_cpu=True)[0]).__name__, find_model({name!r}).facts()['remote_code'])\n"
        f"try: load_model({str(other)!r})\nexcept ModelError as error: print(error)"
    )
    said = forked.run(code).stdout
    assert "OddModel True" in said and (tmp_path / "canary").exists() and f"{other} comes with Python code of its own" in said


def test_trust_is_no_setting_and_is_not_saved(tmp_path, nobody_trusted):
    trust_remote_code("owner/name")
    config = FinetuneConfig(model_name_or_path="owner/name")
    assert not [name for name in field_help(FinetuneConfig) if "trust" in name or "remote" in name]
    assert "trust" not in save_config(config, tmp_path / "c.yaml").read_text() and "remote_code" not in (tmp_path / "c.yaml").read_text()
    with pytest.raises(ModelError, match="Name the one model"):
        trust_remote_code(True)
    told = "from finetune_nb.origin import may_run_code; print(may_run_code('owner/name'))"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout == "False\n"


def test_code_in_another_model_has_to_be_named_too(model, nobody_trusted):
    change(model / "config.json", auto_map={"AutoConfig": "evil/repo--odd.OddConfig"})
    trust_remote_code(str(model))
    with pytest.raises(ModelError, match="its code lies in another model, 'evil/repo'"):
        load_model(str(model))


def test_the_command_line_names_a_model(monkeypatch, nobody_trusted, capsys):
    from finetune_nb import cli

    assert cli.main(["--trust-remote-code", "owner/name", "train", "missing.yaml"]) == 2
    assert origin.may_run_code("owner/name") and not origin.may_run_code("owner/other")


def test_old_versions_are_refused_where_models_are_loaded():
    with pytest.raises(ModelError, match=r"torch 2\.9\.1\+cpu \(needed: 2\.10 or newer\).*pip install -U"):
        check_versions(installed=lambda name: {"torch": "2.9.1+cpu"}.get(name, "99"))
    check_versions(installed=lambda name: {"torch": "2.10.0a0+git", "jinja2": "3.1.10"}.get(name, "99.0"))
    code = (
        "import importlib.metadata as m\nreal = m.version\nm.version = lambda name: '5.2.0' if name == 'transformers' else real(name)\n"
        "try: import finetune_nb.models\nexcept Exception as error: print(type(error).__name__, error)"
    )
    assert "ModelError With transformers 5.2.0 (needed: 5.3 or newer)" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_floors_are_those_that_pip_keeps():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    required = dict(re.match(r"([\w-]+)>=([\d.]+)", word).groups() for word in parser["DEFAULT"]["requirements"].split())
    assert all(Version(required[name]) >= Version(floor) for name, floor in FLOORS.items())
    assert FLOORS["transformers"] >= "5.3" and FLOORS["jinja2"] >= "3.1.6"


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "C:x.safetensors", "model.bin", "", ".", "..", "x\0.safetensors"])
def test_an_index_stays_in_its_folder(file, model):
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": file}}))
    with pytest.raises(ModelError, match="points out of its folder|no safetensors file"):
        load_model(str(model))


def test_the_weights_are_merged_that_were_loaded(model, tmp_path):
    from finetune_nb.merge import base_files

    shutil.copyfile(model / "model.safetensors", model / "other.safetensors")
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "other.safetensors"}}))
    load_model(str(model))  # transformers takes the one file where there is an index beside it
    assert list(base_files(str(model)).shards) == ["model.safetensors"]
    shutil.copyfile(model / "model.safetensors", tmp_path / "mine.safetensors")
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": str(tmp_path / "mine.safetensors")}}))
    for reads in (load_model, base_files):
        with pytest.raises(ModelError, match="points out of its folder"):
            reads(str(model))


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_says_what_is_where(index):
    with pytest.raises(ModelError, match="does not say which file holds which weight"):
        check_index(index, "m")
    assert check_index({"weight_map": {"a": "b.safetensors", "c": "b.safetensors"}}, "m") == ["b.safetensors"]


def test_a_model_in_several_files_is_loaded_and_a_missing_one_named(tiny_model, model):
    from transformers import AutoModelForCausalLM

    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(model, max_shard_size="100KB")
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1 and load_model(str(model), use_cpu=True)
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"{shards[0].name} is missing"):
        load_model(str(model))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "tf_model.h5"])
def test_only_pickles_are_refused_by_name(name, model):
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(ModelError, match=f"not in safetensors but in {name}. Only safetensors and GGUF are read, since a pickle can run code"):
        load_model(str(model))
    assert load_tokenizer(str(model)), "its tokenizer is no pickle"


@pytest.mark.parametrize("text", ["", "[1]", "{", "\0", "[" * 100_000])
def test_settings_that_are_none(text, model):
    (model / "config.json").write_text(text)
    with pytest.raises(ModelError, match="config.json can't be read"):
        check_model_files(model, "m")


@pytest.mark.parametrize("name", ["../x", "./x", "/x", "~/x", "a/b/c", "a/../b", "a\\b", "a:b", "", "a b", "a\nb", "-a/b", "a/b--c", "a/b..c", "ünï/x", "https://x/y", "a/.."])
def test_what_is_no_name_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name(name)
    if name:
        with pytest.raises(ModelError, match="is not a model folder"):
            find_model(name)


def test_a_folder_with_the_name_of_a_model_is_told(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    (model.parent / "owner").mkdir()
    shutil.copytree(model, "owner/name")
    shutil.copytree(model, EMBEDDED_MODEL)
    for name, told in (("owner/name", "is a folder here and is taken, not what the hub may have"), (EMBEDDED_MODEL, "means the embedded model"), ("./owner/name", "")):
        said = []
        load_model(name, use_cpu=True, say=said.append)
        assert any(told in line for line in said) if told else not [line for line in said if "folder" in line]
        assert find_model(name).kind == ("embedded" if name == EMBEDDED_MODEL else "folder")


def in_a_hub_cache(tiny_model, home, commit):
    "The tiny model as if it had been fetched from the hub."
    repo = home / "hub" / "models--owner--name"
    shutil.copytree(tiny_model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)


HUB = "from huggingface_hub import constants\nassert constants.HF_HUB_OFFLINE\nconstants.HF_HUB_CACHE = {!r}\n"  # where HF_HOME puts it when it is imported


def test_the_commit_of_the_hub_is_recorded_and_can_be_asked_for(tiny_model, tmp_path):
    first, second = "a" * 40, "b" * 40
    in_a_hub_cache(tiny_model, tmp_path / "home", first)
    shutil.copytree(tiny_model, tmp_path / "home/hub/models--owner--name/snapshots" / second)
    change(tmp_path / "home/hub/models--owner--name/snapshots" / second / "config.json", max_position_embeddings=77)
    code = (
        "import json\nfrom finetune_nb.models import find_model, load_model, load_tokenizer\n"
        "said = []\nload_model('owner/name', use_cpu=True, say=said.append)\nprint(json.dumps([said[0], find_model('owner/name').facts(), find_model('owner/name', 'b' * 40).facts()]))\n"
        "said = []\nmodel, _ = load_model('owner/name', use_cpu=True, say=said.append, revision='b' * 40)\nprint(json.dumps([len(said), model.config.max_position_embeddings]))\n"
    )
    done = forked.run(HUB.format(str(tmp_path / "home/hub")) + code)
    assert done.returncode == 0, done.stderr
    (told, floating, pinned), (lines, loaded) = map(json.loads, done.stdout.splitlines())
    assert f"commit {first} of the hub, which is main as of now" in told and floating == {"kind": "hub", "revision": first, "commit": first, "remote_code": False}
    assert pinned["commit"] == second and loaded == 77 and lines == 1, "what is pinned needs no note"


def test_an_index_on_the_hub_stays_in_its_folder_too(tiny_model, tmp_path):
    commit = "c" * 40
    in_a_hub_cache(tiny_model, tmp_path / "home", commit)
    snapshot = tmp_path / "home/hub/models--owner--name/snapshots" / commit
    (snapshot / "model.safetensors").rename(tmp_path / "home/hub/x.safetensors")
    (snapshot / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../../../x.safetensors"}}))
    code = "from finetune_nb.models import load_model\ntry: load_model('owner/name')\nexcept Exception as error: print(error)"
    done = forked.run(HUB.format(str(tmp_path / "home/hub")) + code)
    assert "points out of its folder" in done.stdout, done.stderr


def test_a_huge_file_of_settings_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama"}))
    with file.open("r+") as sparse:  # takes no room on the disk, and would be read as spaces if it were read
        sparse.seek(65 << 20)
        sparse.write(" ")
    with pytest.raises(ModelError, match="config.json can't be read \\(larger than any such file\\)"):
        read_settings(file, "mine")
