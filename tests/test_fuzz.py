"""A short fuzzing of all that is read; `benchmarks/fuzz.py` does as much of it as one likes."""

import importlib.util
import random
import time

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_nb.config import FinetuneConfig, FinetuneError, load_config
from finetune_nb.data import load_chats
from finetune_nb.origin import check_index, is_hub_name
from finetune_nb.redact import redacted
from finetune_nb.sandbox import RenderLimits, render_chats

spec = importlib.util.spec_from_file_location("fuzz", ROOT / "benchmarks" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)
quickly = settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3), max_leaves=8)


@pytest.mark.filterwarnings("ignore")  # of rows that are left out
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutations_end_in_words(name, tmp_path):
    from jinja2 import TemplateError

    one, outcomes, until = fuzz.TARGETS[name](tmp_path), [], time.monotonic() + 6
    allowed = (FinetuneError, *((TemplateError, TypeError, ArithmeticError) if name == "template" else ()))
    for seed in range(1_000_000, 1_000_400):
        begun = time.monotonic()
        try:
            one(random.Random(f"{name} {seed}"))
            outcomes.append("read")
        except allowed as error:
            assert str(error).strip(), seed
            outcomes.append("refused")
        assert time.monotonic() - begun < 20, f"seed {seed} takes too long"
        if time.monotonic() > until:
            break
    assert {"read", "refused"} == set(outcomes) and len(outcomes) > 20


def test_the_mutations_are_the_same_each_time():
    assert fuzz.mutate(b"some bytes", random.Random("a")) == fuzz.mutate(b"some bytes", random.Random("a")) != b"some bytes"


@quickly
@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".zip", ".yaml"]))
def test_any_bytes(tmp_path, data, suffix):
    (tmp_path / f"x{suffix}").write_bytes(data)
    with pytest.raises(FinetuneError) if suffix != ".yaml" else __import__("contextlib").suppress(FinetuneError):
        load_config(tmp_path / f"x{suffix}") if suffix == ".yaml" else load_chats(tmp_path / f"x{suffix}")


@quickly
@given(json_values, json_values)
def test_any_index(value, deeper):
    for index in ({"weight_map": value}, {"weight_map": {"a": deeper}}):
        try:
            files = check_index(index, "m")
        except FinetuneError:
            continue
        assert all(file.endswith(".safetensors") and "/" not in file and "\\" not in file for file in files)


@quickly
@given(st.text(max_size=60))
def test_any_text(tokenizer, text):
    assert is_hub_name(text) in (True, False) and isinstance(redacted(text), str)
    chat = [{"role": "user", "content": text}]
    assert render_chats(tokenizer, [chat], RenderLimits()) == [tokenizer.apply_chat_template(chat, tokenize=False)]
    try:
        assert FinetuneConfig(run_name=text).run_name == text
    except FinetuneError:
        pass
