"""Every rule finds the run that is really broken in its way, and none speaks of a run that is well."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import broken
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_nb.config import FinetuneConfig, FinetuneError
from finetune_nb.curve_rules import RULES, is_gibberish, not_falling, overfitted, rate_too_high, still_learning
from finetune_nb.diagnosis import Diagnosis, diagnose
from finetune_nb.models import base_mark
from finetune_nb.record import RunRecord, read_record
from finetune_nb.rules import never_stops
from finetune_nb.stop import Stop, StoppedEarly
from finetune_nb.training import load_run, resume


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "Makes runs on a tiny model that was taught two ways of answering."
    folder = tmp_path_factory.mktemp("shop")
    model = broken.teach_tiny_model(folder / "model")
    gc.collect()
    gc.freeze()  # as in `tiny_model`
    return broken.Workshop(folder, model)


@pytest.fixture
def well(shop):
    "A copy of the folder of a run that is well."
    return shop.copy()


@pytest.mark.parametrize("planted", broken.FAULTS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_broken_is_named_first(planted, shop):
    rule, make = broken.FAULTS[planted]
    found = diagnose(make(shop))
    assert found.names[:1] == [rule], found
    assert ("gibberish" in found.names) is (planted == "adapter far too strong"), found
    causes = [found for rule, found in found.findings if not rule.symptom]
    assert all(one.cause and one.evidence and one.remedy for one in causes)


@pytest.mark.parametrize("what", [what if i < 4 else pytest.param(what, marks=pytest.mark.slow) for i, what in enumerate(broken.HEALTHY)])
def test_a_run_that_is_well_is_left_alone(what, shop):
    run = shop.train(**broken.HEALTHY[what])
    assert diagnose(run.folder).healthy
    said = diagnose(broken.evaluated(run))
    assert said.healthy and not said.blind, said
    assert "Nothing was found." in repr(said) and "12 answers" in repr(said) and all(rule.name in repr(said) for rule in RULES)


@pytest.mark.parametrize(("steps", "warm", "points", "top"), [(10, 0.0, [(1, 0.0), (10, 6e-6)], 2e-4), (10, 1.0, [], 0.9 * 2e-4), (100, 0.1, [(100, 1e-9)], 2e-4), (0, 0.1, [], 0.0)])
def test_the_highest_rate_is_not_that_of_the_points_alone(steps, warm, points, top):
    "With a point each ten steps, which is the default, the curve may never show it."
    history = [{"step": at, "loss": 2.0, "learning_rate": rate} for at, rate in points]
    facts = {"steps": steps, "planned": {"steps": steps}}
    record = RunRecord(Path(), FinetuneConfig(learning_rate=2e-4, warmup_ratio=warm), "finished", facts=facts, history=history)
    assert record.top_rate == pytest.approx(top)


def test_every_rule_has_a_planted_fault():
    assert {rule.name for rule in RULES} == {rule for rule, _ in broken.FAULTS.values()} | {"gibberish"}, "a symptom, which stands behind its cause"


def test_what_could_not_be_looked_for_is_said(well, shop):
    assert "Not looked for, no test answers yet: evaluate_run(run): adapter not at work, gibberish." in repr(diagnose(well))
    elsewhere = replace(read_record(well), marks={})
    assert elsewhere.adapter.norm == pytest.approx(load_run(well).facts["adapter_norm"]) and elsewhere.adapter.dtype == "float32"
    run = load_run(well)
    assert diagnose(run).healthy and diagnose(str(well)).healthy


def test_runs_of_before_are_still_read(well):
    "What is kept now and was not then is only not looked at."
    for name in ("started.json", "run.json"):
        facts = json.loads((well / name).read_text())
        for new in ("marks", "template", "dtype", "adapter_norm"):
            facts.pop(new, None)
        for data in facts["data"].values():
            for new in ("different_chats", "different_answers", "rows", "masked_rows", "ended_rows", "dropped_chats"):
                data.pop(new, None)
        (well / name).write_text(json.dumps(facts))
    assert diagnose(well).healthy


SCRIPT = "<script>alert(1)</script> | a *b* [c](javascript:d) `e`\n\n# f"


def test_what_others_wrote_is_shown_as_text(well):
    (well / "run.json").unlink()
    (well / "failed.json").write_text(json.dumps({"kind": "OSError", "words": SCRIPT, "cause": SCRIPT, "step": 3}))
    found = diagnose(well)
    html, markdown = found._repr_html_(), found.to_markdown()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert "<script" not in markdown and r"\[c\](javascript:d)" in markdown and r"\*b\*" in markdown and "\n# f" not in markdown
    assert markdown.startswith("**copy") and "1. **Run refused or failed.**" in markdown and "**To do:**" in markdown


@pytest.mark.parametrize("name", ["started.json", "run.json", "failed.json", "answers.jsonl", "samples.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"])
@pytest.mark.parametrize("content", ["{", "[1]", '{"data": 5, "planned": [], "leaks": 3, "marks": "x", "template": [1], "step": {}, "words": null, "kind": 7}'])
def test_damaged_files_are_no_crash(name, content, well):
    (well / name).write_text(content)
    try:
        found = diagnose(well)
        assert isinstance(found, Diagnosis) and found._repr_html_() and repr(found) and found.to_markdown()
    except FinetuneError as error:
        assert "can't be read" in str(error)


def test_folders_that_are_no_run(well, tmp_path):
    with pytest.raises(FinetuneError, match="not the folder of a run"):
        diagnose(tmp_path)
    with pytest.raises(FinetuneError, match=f"It holds .*{well.name}"):
        diagnose(well.parent)


def test_why_a_run_failed_is_kept_until_it_goes_on(shop):
    folder = shop.failing(callbacks=[broken.Breaks(OSError("the cable fell out"), 14)])
    kept = json.loads((folder / "failed.json").read_text())
    assert (kept["kind"], kept["words"], kept["step"]) == ("OSError", "the cable fell out", 14)
    assert read_record(folder).state == "failed"
    assert resume(folder, shop.splits(), say=lambda line: None).facts["ended_by"] == "the plan"
    assert not (folder / "failed.json").exists() and diagnose(folder).healthy


def test_a_run_that_never_began_leaves_only_why(shop):
    first, folder = (shop.failing(eval_strategy="no", callbacks=[broken.Breaks(OSError(text), 0)]) for text in ("one", "two"))
    assert first == folder == Path(shop.config.output_dir) / ".failed"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "started.json", "failed.json"}
    assert "two" in read_record(folder).failure["words"]
    with pytest.raises(FinetuneError, match="is kept in .*failed"):
        diagnose(folder.parent / "run-999")
    shutil.rmtree(folder)
    stop = Stop()
    stop.wanted = True
    with pytest.raises(StoppedEarly):
        broken.training.train(shop.config, shop.splits(), stop=stop, say=lambda line: None)
    assert not folder.exists(), "a stop is no failure"


def test_a_run_knows_what_it_learned_from(well):
    facts = load_run(well).facts
    data = facts["data"]["train"]
    assert (data["chats"], data["rows"], data["different_chats"], data["different_answers"]) == (24, 24, 24, 24)
    assert (data["ended_rows"], data["masked_rows"], data["dropped_chats"]) == (24, 0, 0)
    assert facts["dtype"] == "float32" and facts["marks"].keys() == {"base", "tokenizer", "chat template"}


def test_the_mark_of_a_base_model(shop, tmp_path):
    from finetune_nb.training import load_base

    model, _ = load_base(shop.config, say=lambda line: None)
    model.save_pretrained(tmp_path / "cut", max_shard_size="200KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert base_mark(str(tmp_path / "cut")) == base_mark(shop.model) != base_mark(shop.other_model(lambda folder: broken.change_weights(folder, lambda name, w: w + 1e-3)))
    save_file({"x": torch.zeros(())}, tmp_path / "cut/more.safetensors")
    assert base_mark(str(tmp_path / "cut")) == base_mark(shop.model), "what the index does not name is not loaded"
    assert base_mark(str(tmp_path)) is None and base_mark("nobody/nowhere") is None
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    assert base_mark(str(tmp_path)) is None
    assert len(load_file(Path(shop.model) / "model.safetensors")) > 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("Yes.", False),
        ("It is 122, no doubt.", False),
        ("no no no", False),
        ("The ICD-10 code for acute bronchitis is J20.9 (Acute bronchitis, unspecified).", False),
        ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12", False),
        ("我不知道这个问题的答案。", False),
        ("https://example.org/a/very/long/path", False),
        ("................", True),
        ("aaaaaaaaaaaaaaaa", True),
        ("the the the the the the the the the of", True),
        ("it was it was it was it was it was it was it was", True),
        ("\ufffd\ufffd\ufffd\x02", True),
        ("x" * 30 + "y" * 40, True),
        ("ItItItItItItItItIt,ItItItIt", True),
        ("Hahahaha, that is a good one, and I will tell it.", False),
        ("1010101010101010", False),
    ],
)
def test_gibberish(text, expected):
    assert is_gibberish(text) is expected


def record_of(losses, looks=(), rate=2e-4, **facts):
    points = [{"step": i, "loss": loss, "learning_rate": rate, "grad_norm": 1.0} for i, loss in enumerate(losses, 1)]
    history = sorted(points + [{"step": step, "eval_loss": loss} for step, loss in looks], key=lambda row: row["step"])
    return RunRecord(Path("run"), FinetuneConfig(), "finished", {"steps": len(losses)} | facts, history)


def test_jumps_of_a_curve_are_no_rise():
    torch.manual_seed(0)
    for _ in range(100):
        noise = (1 + 0.3 * torch.randn(60)).clamp(0.2)
        curve = (2 * torch.exp(-torch.arange(60) / 10) + 0.5) * noise
        assert rate_too_high(record_of(curve.tolist())) is None
    for n, noise in ((8, 0.5), (15, 0.6), (40, 0.8), (200, 0.8)):
        alarms = sum(rate_too_high(record_of((0.5 + 2 * torch.exp(-torch.arange(n) / (n / 4)) + noise * torch.randn(n)).clamp(0.01).tolist())) is not None for _ in range(200))
        assert alarms <= 4, f"{alarms} of 200 curves of {n} points"
    assert rate_too_high(record_of([2, 1.5, 1, 0.9, 0.9, 1, 1.5, 2, 2.5, 3]))
    for climb in (2.0, 4.0):
        seen = sum(rate_too_high(record_of([2.0] * 20 + torch.cat([torch.linspace(2, 1, 30), torch.linspace(1, 1 + climb, 30)]).add(0.2 * torch.randn(60)).tolist())) is not None for _ in range(50))
        assert seen == 50


def test_overfitting_is_a_turn_of_validation_with_training_going_on():
    fell = [2 - 0.03 * i for i in range(60)]
    turned = [(0, 2.2), (20, 1.5), (40, 1.7), (60, 1.9)]
    assert still_learning(record_of([5 - 0.3 * i for i in range(8)], [(0, 5.0), (8, 2.9)], ended_by="the plan")), "a short run with one look is judged by its training loss"
    for quiet in ([5, 4, 3, 2.9, 2.9, 2.9, 2.9, 2.9], [5 - 0.3 * i for i in range(7)]):
        assert not still_learning(record_of(quiet, [(0, 5.0), (8, 2.9)], ended_by="the plan")), "it had learned; or too few points to tell"
    assert not still_learning(record_of([5 - 0.3 * i for i in range(8)], [(0, 5.0), (8, 2.9)], ended_by="the user"))
    assert overfitted(record_of(fell, turned)) and not overfitted(record_of(fell, [(0, 2.2), (20, 1.5), (40, 1.52), (60, 1.53)]))
    assert not overfitted(record_of([2.0] * 60, turned)), "both rise: that is no learning by heart"


def test_overfitting_before_the_first_look_is_no_loss_that_does_not_fall():
    fell, worse = record_of([2 - 0.03 * i for i in range(60)], [(0, 2.2), (30, 2.6), (60, 3.0)]), record_of([2.0] * 60, [(0, 2.2), (60, 2.3)])
    assert "before the first look at step 30" in overfitted(fell).cause and not_falling(fell) is None
    assert overfitted(worse) is None and not_falling(worse)


def test_whether_the_base_model_stopped_is_part_of_never_stopping():
    row = lambda model, ended: {"model": model, "expected": "yes", "answer": "yes yes yes", "passed": {"ended by itself": ended}}  # noqa: E731
    learned = {"data": {"train": {"rows": 10, "ended_rows": 10}}}
    for before, words in ((True, "where the base model did"), (False, "as the base model did not")):
        found = never_stops(replace(record_of([1.0] * 20, **learned), answers=[row(model, ended) for model, ended in (("tuned", False), ("base", before)) for _ in range(8)]))
        assert words in found.cause and f"of the base model {0 if before else 8} of 8" in found.evidence["answers that went on to the limit"]
