"Tasks of lm-eval: pairs from what it returns, and, where it is installed, the real thing on local files."

import json
import math
import sys

import pytest
import torch

from finetune_nb.config import ConfigError, FinetuneConfig, FinetuneError
from finetune_nb.lm_eval_tasks import TaskReport, TaskScore, lm_eval, paired_scores
from finetune_nb.lora import add_lora, without_adapter
from finetune_nb.models import load_model


def sample(n, filter="none", **scores):
    return {"doc_id": n, "doc_hash": f"hash {n}", "filter": filter, "metrics": list(scores), **scores}


def found(*samples, better=True):
    return {"samples": {"t": list(samples)}, "higher_is_better": {"t": {"acc": better}}}


@pytest.fixture
def stirred(tiny_model):
    model, tokenizer = load_model(tiny_model, torch.float32, use_cpu=True, say=lambda line: None)
    model = add_lora(model, FinetuneConfig(r=4)).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model, tokenizer


def test_questions_are_paired_whatever_their_order():
    scores, left_out = paired_scores(found(sample(0, acc=1), sample(1, acc=0.0)), found(sample(1, acc=1.0), sample(0, acc=True)))
    assert [(s.task, s.score, s.base, s.tuned) for s in scores] == [("t", "acc", [1.0, 0.0], [1.0, 1.0])] and not left_out


def test_filters_are_scores_of_their_own_and_what_is_no_number_is_told():
    one = found(sample(0, "strict", acc=0, bleu="x"), sample(0, "loose", acc=1, bleu="x"))
    scores, left_out = paired_scores(one, one)
    assert [(s.score, s.base) for s in scores] == [("acc (strict)", [0.0]), ("acc (loose)", [1.0])] and len(left_out) == 2 and "bleu (strict)" in left_out[0]
    assert paired_scores(found(sample(0, acc=math.nan)), found(sample(0, acc=1.0)))[0] == []


def test_other_questions_are_refused():
    with pytest.raises(FinetuneError, match="not asked the same questions"):
        paired_scores(found(sample(0, acc=1)), found(sample(1, acc=1)))


def test_a_perplexity_that_falls_is_better():
    rows = [sample(n, acc=5.0 + n % 3) for n in range(40)], [sample(n, acc=4.0 + n % 2) for n in range(40)]
    (score,), _ = paired_scores(*(found(*samples, better=False) for samples in rows))
    assert score.difference.mean < 0 and score.difference.verdict == "better"


def test_the_report_is_escaped_and_json():
    report = TaskReport("<b>run", [TaskScore("<script>", "acc", [0.0, 1.0] * 20, [1.0] * 40), TaskScore("one", "acc", [0.0], [1.0])], ["<i>said"], "1")
    page = report._repr_html_()
    assert not any(tag in page for tag in ("<script>", "<b>run", "<i>")) and "better" in page and "<script>" in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["scores"][0]["verdict"] == "better"


def test_a_missing_harness_says_how_to_get_it(monkeypatch, stirred):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'finetune_nb\[lm_eval\]'"):
        lm_eval(stirred[0], "arc_easy", tokenizer=stirred[1])


# --- the real thing


@pytest.fixture
def sums(tmp_path):
    pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
    lines = [{"question": f"What is {i} plus {i}?", "choices": [str(2 * i), str(2 * i + 1), "many"], "right": i % 3} for i in range(1, 21)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return {
        "task": "sums", "output_type": "multiple_choice", "test_split": "test",
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


@pytest.mark.parametrize("chat", [True, False])
def test_choices_are_those_of_the_likelihoods_computed_directly(stirred, sums, chat):
    model, tokenizer = stirred
    report = lm_eval(model, sums, tokenizer=tokenizer, apply_chat_template=chat)
    (score,) = report.scores
    expected = []
    for switch in (without_adapter, lambda model: torch.no_grad()):
        with switch(model), torch.no_grad():
            expected.append([float(_choice(model, tokenizer, i, chat) == i % 3) for i in range(1, 21)])
    assert [score.base, score.tuned] == expected and 0 < sum(expected[0]) < 20 and score.difference.n == 20


def _choice(model, tokenizer, i, chat):
    "Which of the three answers is the likeliest, as lm-eval defines it: the sum over its tokens."
    question, answers = f"What is {i} plus {i}?", [str(2 * i), str(2 * i + 1), "many"]
    start = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True) if chat else question
    said = []
    for answer in answers:
        before = tokenizer(start, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tokenizer(start + ("" if chat else " ") + answer, add_special_tokens=False)["input_ids"]])
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        said.append(logp[len(before) - 1 :].sum().item())
    return max(range(3), key=said.__getitem__)


def test_limits_and_tasks_from_yaml(stirred, sums, tmp_path):
    (tmp_path / "tasks").mkdir()
    written = {**sums, "task": "from_yaml", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2}}
    written.pop("doc_to_choice")
    written["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    (tmp_path / "tasks" / "mine.yaml").write_text(json.dumps(written))
    model, tokenizer = stirred
    model.train()
    report = lm_eval(model, ["from_yaml", sums], limit=3, tokenizer=tokenizer, folder=tmp_path / "tasks")
    assert any(s.base != s.tuned for s in lm_eval(model, sums, tokenizer=tokenizer).scores)
    assert [(s.task, s.score, len(s.base)) for s in report.scores] == [("from_yaml", "exact_match", 3), ("sums", "acc", 3)]
    assert "first 3 questions" in str(report) and model.training and sums["task"] == "sums"


def test_what_cannot_be_asked_says_why(stirred, sums, tmp_path):
    model, tokenizer = stirred
    cases = [
        (lambda: lm_eval(model, "no-such-task", tokenizer=tokenizer), "knows no task 'no-such-task'"),
        (lambda: lm_eval(model, [], tokenizer=tokenizer), "name one task at least"),
        (lambda: lm_eval(model, sums, limit=0, tokenizer=tokenizer), "at least one question"),
        (lambda: lm_eval(model, sums), "needs its tokenizer"),
        (lambda: lm_eval(model.get_base_model(), sums, tokenizer=tokenizer), "no adapter to switch off"),
        (lambda: lm_eval(model, sums, tokenizer=tokenizer, folder=tmp_path / "none"), "is no folder"),
        (lambda: lm_eval(model, {**sums, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}}}, tokenizer=tokenizer), "can't be had"),
    ]
    for ask, said in cases:
        with pytest.raises(FinetuneError, match=said):
            ask()
