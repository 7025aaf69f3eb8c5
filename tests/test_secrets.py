"""Keys of this machine are nowhere in what a run leaves and says, and working offline opens no connection."""

import json
import traceback
from dataclasses import replace
from urllib.parse import quote

import pytest
from canaries import PLANTED, run_with_canaries
from conftest import some_splits

from finetune_nb import export, redact
from finetune_nb.config import ConfigError, FinetuneConfig, load_config
from finetune_nb.data import check_chats
from finetune_nb.evaluation import evaluate_run
from finetune_nb.redact import holds_key, keys_here, no_key_raised, redacted, without_keys
from finetune_nb.run_folder import read_facts, write_facts
from finetune_nb.training import train


@pytest.fixture(scope="module", params=[True, False], ids=["offline", "a local model"])
def left(request, tiny_model, tmp_path_factory):
    "A folder in which runs were trained, failed and reported with keys all around, and what was said."
    folder = tmp_path_factory.mktemp("canaries")
    done = run_with_canaries(folder, tiny_model, request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


@pytest.mark.trains
@pytest.mark.parametrize("where", PLANTED)
def test_a_key_is_found_nowhere(left, where):
    folder, done = left
    written = [path for path in folder.rglob("*") if path.is_file() and "home" not in path.parts and ".git" not in path.parts]
    assert len([p for p in written if "runs" in p.parts]) > 20 and any(p.name == "failed.json" for p in written) and any(p.name == "report.html" for p in written)
    key = PLANTED[where]
    assert not [p for p in written if key.encode() in p.read_bytes()]
    assert key not in done.stdout and "could not reach" in done.stdout
    cached = [p for p in (folder / "home").rglob("*") if p.is_file() and p.name not in ("token", "stored_tokens", ".netrc", ".git-credentials")]
    assert not [p for p in cached if key.encode() in p.read_bytes()]


@pytest.mark.trains
def test_no_connection_is_made(left):
    assert json.loads((left[0] / "work" / "connections.json").read_text()) == []


def test_keys_of_this_machine_are_known(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "Plain-Words-As-Key")
    monkeypatch.setenv("MY_SWITCH_TOKEN", "true")
    monkeypatch.setenv("KEYBOARD", "not-a-key-at-all")
    assert "Plain-Words-As-Key" in keys_here() and "true" not in keys_here() and "not-a-key-at-all" not in keys_here()
    assert redacted("said Plain-Words-As-Key twice: Plain-Words-As-Key") == "said Pla•••••• twice: Pla••••••"
    assert holds_key("x Plain-Words-As-Key") == "a key of this machine" and not holds_key("a plain sentence with nothing in it")


def test_facts_are_written_without_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "Canary-In-The-Facts")
    sha = "0123456789abcdef" * 4
    write_facts({"words": "with Canary-In-The-Facts", "deep": [{"Canary-In-The-Facts": 1}], "sha256": sha, "n": 1.5}, tmp_path / "run.json")
    assert read_facts(tmp_path) == {"words": "with Can••••••", "deep": [{"Can••••••": 1}], "sha256": sha, "n": 1.5}
    assert without_keys(None) is None


@pytest.mark.parametrize("name", ["model_name_or_path", "train_file", "output_dir", "run_name", "group_column", "revision"])
def test_a_setting_holds_no_key(name, tmp_path):
    key = "hf_" + "CanaryOfASetting0123456789ab"
    with pytest.raises(ConfigError, match=f"{name} holds what looks like a Hugging Face token.*HF_TOKEN") as caught:
        FinetuneConfig(**{name: f"https://me:{key}@host/x"[-200:] if name == "train_file" else key})
    assert key not in str(caught.value)
    (tmp_path / "c.yaml").write_text(f"{name}: {key}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert key not in str(caught.value)
    with pytest.raises(ConfigError, match="chat_template_kwargs holds"):
        FinetuneConfig(chat_template_kwargs={"a": [{"b": key}]})


def test_keys_in_chats_stay_the_users_and_are_warned_about(chats):
    key = "hf_" + "CanaryOfAChat0123456789abcdef"
    chats[3].messages[0]["content"] += f" Use {key}."
    report = check_chats(chats)
    assert report.rows("secrets") == [3] and key not in repr(report) + report._repr_html_()


def test_an_error_of_the_hub_shows_no_key(monkeypatch, tmp_path):
    import traceback

    from finetune_nb import models

    def fail(*args, **kwargs):
        raise OSError("403 for https://me:Canary-Hub-Pass-12@hub/x")

    monkeypatch.setattr(models, "find_model", fail)
    with pytest.raises(models.ModelError) as caught:
        models.load_tokenizer("owner/name")
    assert "Canary-Hub-Pass-12" not in "".join(traceback.format_exception(caught.value))


def test_unreadable_files_are_no_obstacle(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").mkdir()
    (tmp_path / ".gitconfig").write_bytes(b"\xff\0://:@")
    assert isinstance(redact._keys.__wrapped__(0, "", frozenset()), list)


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("hub/token", "{}"),
        ("home/.huggingface/token", "{}"),
        ("hub/stored_tokens", "[mine]\nhf_token = {}"),
        ("home/.netrc", "machine example.org login me password {}"),
        ("home/.git-credentials", "https://me:{}@example.org"),
        ("home/.gitconfig", '[url "https://me:{}@example.org/"]\n'),
        ("work/.git/config", '[remote "origin"]\n\turl = https://me:{}@example.org/x.git'),
    ],
)
def test_a_key_is_known_from_each_place(place, text, tmp_path, monkeypatch):
    "Each place alone, so that none is known through another."
    for folder in ("home", "hub", "work/inside"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "work/inside")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(text.format("Only-In-This-Place-1"))
    assert "Only-In-This-Place-1" in keys_here()


KEY = "Zr7-canary-9182"  # nothing in its form says that it is one


@pytest.mark.parametrize("name", [
    "PGPASSWORD", "MYSQL_PWD", "NGROK_AUTHTOKEN", "DB_PASS", "SECRETKEY", "GITHUBTOKEN", "MY_TOKENS", "STRIPE_SK", "LOGIN_PASSWORD", "SMTP_PASSWD", "APP_SECRETS", "OPENAI_APIKEY",
    "clientSecret", "API_KEYS", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "TOKEN_2", "GITHUB_PAT", "REDIS_PASS_1", "SECRET_KEY_BASE",
])  # fmt: skip
def test_a_variable_that_is_called_a_key_is_one(name, monkeypatch):
    monkeypatch.setenv(name, KEY)
    assert KEY in keys_here() and KEY not in redacted(f"could not log in with {KEY}.") and holds_key(KEY) and KEY not in str(without_keys({"a": [KEY]}))


@pytest.mark.parametrize(("name", "value"), [
    ("PATH", KEY), ("PWD", KEY), ("OLDPWD", KEY), ("TOKENIZERS_PARALLELISM", KEY), ("MAX_TOKENS", "1048576000"), ("PASSENGER_APP_ENV", KEY), ("KEYBOARD", KEY), ("MONKEY", KEY), ("SECRETARY", KEY),
    ("COMPASS", KEY), ("BYPASS_CACHE", KEY), ("SSH_AUTH_SOCK", "/run/user/1000/agent"), ("DB_PASSWORD", "false"), ("PASSWORD_FILE", "/run/secrets/password"), ("EOS_TOKEN", "<|im_end|>"), ("SORT_KEYS", "alphabetical"), ("DB_PASSWORD", "abc"),
])  # fmt: skip
def test_what_is_not_called_a_key_is_none(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert value not in keys_here() and redacted(f"it says {value} here") == f"it says {value} here"


def test_a_password_that_is_a_word_is_taken_out_as_a_word(monkeypatch):
    monkeypatch.setenv("LOGIN_PASSWORD", "correcthorse")
    monkeypatch.setenv("DB_PWD", "horses")
    said = redacted("user:correcthorse and horses, not seahorses nor correcthorse_2")
    assert "correcthorse " not in said and " horses" not in said and said.endswith("not seahorses nor correcthorse_2")


def test_keys_in_the_settings_of_a_connection_and_in_hex(monkeypatch):
    monkeypatch.setenv("AZURE_CONN", "AccountName=me;AccountKey=Zr7azurecanary9182+abc==;EndpointSuffix=x")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    assert "Zr7azure" not in redacted("403 with Zr7azurecanary9182+abc==")
    found = without_keys({"key": "0123456789abcdef0123456789abcdef01234567", "sha": "f123456789abcdef0123456789abcdef01234567"})
    assert found["sha"] == "f123456789abcdef0123456789abcdef01234567" and "cdef0123" not in found["key"]


class Odd(Exception):
    "Makes its words of something else than its arguments."

    def __str__(self):
        return f"no way with {KEY}"


def test_no_error_gets_out_with_a_key(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", KEY)

    @no_key_raised()
    def fails(error, cause=None, group=None):
        try:
            if cause:
                raise cause
        except Exception as caught:
            raise error from caught
        raise error

    given = [RuntimeError(f"401 {KEY}"), OSError(2, f"no {KEY}", f"/x/{KEY}"), Odd("x"), ConfigError(f"x {KEY}"), KeyError(KEY), ValueError(("a", [KEY]))]
    for error in given:
        for cause in (None, ConnectionError(f"https://me:{KEY}@host"), Odd("y")):
            with pytest.raises(Exception) as caught:
                fails(error, cause)
            assert KEY not in "".join(traceback.format_exception(caught.value)).replace('KEY = "', "") and KEY not in repr(caught.value)
            assert caught.value is error or isinstance(error, (Odd, ValueError)), "the error stays the one that it was"
    plain = ValueError("nothing in it", 7)
    with pytest.raises(ValueError) as caught:
        fails(plain)
    assert caught.value is plain and plain.args == ("nothing in it", 7)


@pytest.mark.parametrize("shown", [repr, json.dumps, lambda key: json.dumps(key, ensure_ascii=False), quote, lambda key: quote(key, safe="")], ids=["repr", "JSON", "JSON with letters", "address", "part of an address"])
def test_a_key_is_known_however_it_is_written(shown, monkeypatch):
    key = "Can5\\ry\"p'ä/$$1"
    monkeypatch.setenv("MY_DB_PASSWORD", key)
    said = shown(key).strip("'\"")
    assert said[2:] not in redacted(f"no way in with {said} today")
    with pytest.raises(KeyError) as caught, no_key_raised():
        raise KeyError(key)
    assert said[2:] not in repr(caught.value)


@pytest.mark.trains
def test_no_error_of_what_comes_after_training_has_a_key(quick, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", KEY)
    run = train(replace(quick, max_steps=1, preflight=False), some_splits(), say=lambda text: None)

    def judge(*asked):
        raise RuntimeError(f"401 for {KEY}")

    with pytest.raises(Exception, match="401 for") as caught:
        evaluate_run(run, checks={"judge": judge})
    assert KEY not in "".join(traceback.format_exception(caught.value)).replace('KEY = "', "")
    monkeypatch.setattr(export, "save_adapter", lambda *args: judge())
    monkeypatch.setattr(export, "ExportError", RuntimeError)
    shown = export.export_run(run, ("adapter",), check=False, card=False, say=lambda text: None)
    assert "401 for" in str(shown) and KEY not in str(shown) + shown._repr_html_()
