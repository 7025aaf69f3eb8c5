"""The configuration: round trips, ranges, and errors that name place and remedy."""

from dataclasses import fields, replace

import pytest
import yaml

from finetune_nb.config import NICKNAMES, ConfigError, FinetuneConfig, check_replaceable, field_help, load_config, save_config


def test_the_guides_defaults():
    config = FinetuneConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (16, 32, 0.05, "none")
    assert config.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (config.num_train_epochs, config.per_device_train_batch_size, config.gradient_accumulation_steps) == (3, 4, 4)
    assert (config.learning_rate, config.warmup_ratio, config.lr_scheduler_type) == (2e-4, 0.1, "cosine")
    assert (config.logging_steps, config.eval_strategy, config.bf16) == (10, "epoch", None)


def test_names_are_those_of_peft_and_transformers():
    from peft import LoraConfig
    from transformers import TrainingArguments

    known = {f.name for f in fields(LoraConfig)} | {f.name for f in fields(TrainingArguments)}
    ours = {"model_name_or_path", "attn_implementation", "train_file", "validation_file", "test_file", "validation_size", "test_size"}
    ours |= {"max_length", "too_long", "warmup_ratio", "group_by_length", "early_stopping_patience", "max_new_tokens", "generation_batch_size"}
    ours |= {"columns", "on_error", "group_column", "stratify_column", "train_on", "control_tokens", "chat_template_kwargs"}
    ours |= {"packing", "max_tokens_at_once", "load_in_4bit", "loraplus_lr_ratio", "preflight"}
    ours |= {"max_eval_samples", "answer_pattern"}  # of transformers' example scripts, or our own
    assert {f.name for f in fields(FinetuneConfig)} - known <= ours
    assert set(NICKNAMES.values()) <= {f.name for f in fields(FinetuneConfig)}


@pytest.mark.parametrize("field", fields(FinetuneConfig), ids=lambda f: f.name)
def test_every_field_round_trips_and_refuses_nonsense(field, tmp_path):
    config = FinetuneConfig()
    assert field_help(FinetuneConfig)[field.name], "it has help"
    with pytest.raises(ConfigError, match=f"^{field.name}: expected .* got "):
        setattr(config, field.name, {1: 1})
    if field.metadata["low"] is not None:
        for value in (field.metadata["low"], field.metadata["high"]):
            setattr(config, field.name, value)
            assert load_config(save_config(config, tmp_path / "c.yaml")) == config
        for value in (field.metadata["low"] - 1, field.metadata["high"] + 1, float("nan"), True):
            with pytest.raises(ConfigError, match="expected"):
                setattr(config, field.name, value)
    for value in field.metadata["choices"]:
        setattr(config, field.name, value)
        assert load_config(save_config(config, tmp_path / "c.yaml")) == config


def test_names_with_values(tmp_path):
    config = FinetuneConfig(columns={"user": "question"}, chat_template_kwargs={"enable_thinking": False, "tools": ["a"]})
    assert load_config(save_config(config, tmp_path / "c.yaml")) == config
    with pytest.raises(ConfigError, match="columns: expected names with texts, as in {user: question}, got {'user': 1}"):
        config.columns = {"user": 1}


def test_odd_texts_round_trip(tmp_path):
    for text in ("a: b # c", "{x}", "ünï", "'quoted'", "line\nbreak", "2e-4", "null", "\\d+ (?P<code>.)|\t", ""):
        config = FinetuneConfig(answer_pattern=text, run_name=text)
        assert load_config(save_config(config, tmp_path / "c.yaml")) == config


def test_two_configurations_share_nothing():
    one, two = FinetuneConfig(), FinetuneConfig()
    one.target_modules.append("x")
    assert two.target_modules == FinetuneConfig().target_modules != one.target_modules
    assert replace(two, r=4).r == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank: 8", r"c.yaml, line 1: unknown setting 'rank'; did you mean 'r'"),
        ("\nlearnin_rate: 1", r"line 2: .*did you mean 'learning_rate'"),
        ("r: eight", r"line 1: r: expected an integer from 1 to 1024, got 'eight'"),
        ("r: 0", r"got 0"),
        ("bias: lora", r"expected one of 'none', 'all', 'lora_only'"),
        ("group_by_length: 1", r"expected true or false, got 1"),
        ("target_modules: [1]", r"a list of names or a text, got \[1\]"),
        ("r: 4\nr: 5", r"line 2: 'r' stands here and in line 1"),
        ("- r", r"line 1: expected lines such as"),
        ("r: [1", r"line 1, column \d+: not valid YAML"),
        ("r: 0\nlr: 1\nbias: x", r"(?s)line 1.*line 2.*line 3"),
        ("? [a]\n: 1", r"unknown setting"),
        ("zzzzzzzz: 1", r"Known: model_name_or_path"),
        ("r: 2026-13-45", r"not valid YAML: month must be in 1..12"),
        ("[" * 2_000, r"not valid YAML"),
    ],
)
def test_mistakes_in_a_file(text, said, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("run_name: ü".encode("cp1252"))
    with pytest.raises(ConfigError, match="byte 10: not UTF-8"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == FinetuneConfig()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_config(FinetuneConfig(r=8), tmp_path / "c.yaml")
    monkeypatch.setattr("finetune_nb.config.yaml_value", lambda value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_config(FinetuneConfig(r=9), path)
    assert load_config(path).r == 8 and [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


PATHS = ("model_name_or_path", "train_file", "validation_file", "test_file", "output_dir")


@pytest.mark.parametrize("name", PATHS)
def test_the_home_folder_in_every_path(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert getattr(FinetuneConfig(**{name: "~/a b/*.x"}), name) == f"{tmp_path}/a b/*.x"
    (tmp_path / "c.yaml").write_text(f"{name}: ~/here\n")
    assert getattr(load_config("~/c.yaml"), name) == f"{tmp_path}/here", "also of a file, and the file itself"
    for text in ("a/~/b", "x~", "~nobody-of-this-name/x", "~\0/x"):
        assert getattr(FinetuneConfig(**{name: text}), name) == text
    assert save_config(FinetuneConfig(), "~/d.yaml") == tmp_path / "d.yaml"


def test_only_paths_have_a_home():
    assert {f.name for f in fields(FinetuneConfig) if f.metadata["path"]} == set(PATHS)
    assert FinetuneConfig(answer_pattern="~/x", run_name="~").answer_pattern == "~/x"


def test_what_may_be_replaced(tmp_path):
    path = save_config(FinetuneConfig(r=8), tmp_path / "c.yaml")
    assert check_replaceable(path) == path.read_text() and check_replaceable(tmp_path / "none.yaml") == "" == check_replaceable("a\0b")
    (tmp_path / "c.json").write_text('{"r": 8}')
    assert check_replaceable(tmp_path / "c.json") == '{"r": 8}'
    (tmp_path / "link.yaml").symlink_to(tmp_path / "nowhere")
    for bad, why in ((tmp_path, "it is a folder"), (tmp_path / "link.yaml", "no plain file"), ("/dev/null", "no plain file")):
        with pytest.raises(ConfigError, match=f"not replaced. Choose another name .*{why}"):
            check_replaceable(bad)
    (tmp_path / "chats.jsonl").write_text('{"messages": []}')
    with pytest.raises(ConfigError, match="is not replaced.*is a file of chats"):
        check_replaceable(tmp_path / "chats.jsonl")


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_the_slow_loader_is_asked_for_errors_only(tmp_path, monkeypatch):
    "Forty runs take half a second by the loader in Python."
    asked = []
    monkeypatch.setattr(yaml, "SafeLoader", type("Counted", (yaml.SafeLoader,), {"__init__": lambda self, text, kind=yaml.SafeLoader: (asked.append(1), kind.__init__(self, text))[1:] and None}))
    path = save_config(FinetuneConfig(r=8), tmp_path / "c.yaml")
    assert load_config(path).r == 8 and not asked
    path.write_text("r: [")
    with pytest.raises(ConfigError, match="line 1, column 5: not valid YAML: expected the node content"):
        load_config(path)
    assert asked
