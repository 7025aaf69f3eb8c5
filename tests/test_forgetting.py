"""What tuning cost: exact figures, items that can be trusted, nothing left switched off."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finetune_nb.baselines import should_you_finetune
from finetune_nb.chat import Shelf
from finetune_nb.chat_template import tokenize_chats
from finetune_nb.config import ConfigError, FinetuneConfig, FinetuneError
from finetune_nb.data import Chat, Splits
from finetune_nb.evaluation import evaluate, evaluate_run, generate
from finetune_nb.forgetting import (
    Forgetting,
    ItemDrift,
    category_of,
    drift_figures,
    forgetting_items,
    item_check,
    measure_forgetting,
    says,
    token_drift,
)
from finetune_nb.lora import AdapterError, add_lora, put_adapter, without_adapter
from finetune_nb.models import load_model
from finetune_nb.packing import PackingCollator
from finetune_nb.training import load_run, train


@pytest.fixture
def base(tiny_model):
    return load_model(tiny_model, torch.float32, use_cpu=True, say=lambda line: None)


@pytest.fixture
def stirred(base):
    "The tiny model with an adapter that does something."
    return with_adapter(base[0]), base[1]


def with_adapter(model, **settings):
    tuned = add_lora(model, FinetuneConfig(r=4, **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    return tuned


def test_the_items_are_many_distinct_and_right_by_their_own_checks():
    items = forgetting_items()
    assert len(items) >= 200 and len({chat.prompt[-1]["content"] for chat in items}) == len(items)
    assert {category_of(chat) for chat in items} == {"general knowledge", "arithmetic", "instructions", "refusal", "languages"}
    assert len({chat.extra["language"] for chat in items if "language" in chat.extra}) >= 6
    for chat in items:
        check = item_check(chat)
        assert check is None or (check(chat.answer) and not check("")), chat.where


def test_no_item_calls_the_answer_of_another_question_right():
    items = [chat for chat in forgetting_items(["general knowledge"]) if item_check(chat)]
    wrong = [(a.where, b.where) for a, b in zip(items, items[1:] + items[:1], strict=True) if item_check(a)(b.answer)]
    assert len(wrong) <= 1, "two neighbours have the same answer, green"


@pytest.mark.parametrize("answer", ["Sure! First take a bag and then go in.", "Of course, here is how: step one."])
def test_what_is_to_be_refused_tells_refusals_from_help(answer):
    refuse, help_ = forgetting_items(["refusal"])[:20], forgetting_items(["refusal"])[20:]
    assert not any(item_check(chat)(answer) for chat in refuse) and all(item_check(chat)(answer) for chat in help_)
    for refusal in ("I'm sorry, but I can't assist with that.", "I cannot help with this request."):
        assert all(item_check(chat)(refusal) for chat in refuse) and not any(item_check(chat)(refusal) for chat in help_)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("It's 1,000.", "1,000", True), ("1,000", "1", False), ("-4", "-4", True), ("5-4", "-4", False), ("4.", "4", True), ("4.5", "4", False),
        ("(12)", "12", True), ("x12", "12", False), ("H2O", "h2o", True), ("小さい犬です", "犬", True), ("十二个月", "十二", True), ("答案是12。", "12", True),
        ("СЕМЬ дней", "семь", True), ("семьдесят", "семь", False), ("", "a", False), ("a.b", "a.b", True), ("aXb", "a.b", False),
    ],
)  # fmt: skip
def test_what_counts_as_said(answer, expected, right):
    assert says(answer, expected) is right


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=["plain", "trained head", "adapted head"])
def test_loss_and_kl_equal_a_direct_computation(base, settings):
    reference, tokenizer = base
    state = {name: weight.clone() for name, weight in reference.state_dict().items()}
    chats = forgetting_items()[:200:29]
    rows = list(tokenize_chats(chats, tokenizer, train_on="last"))
    tuned = with_adapter(reference, **settings)
    (batch,) = PackingCollator("padded", 10**6).batches(rows)
    loss_before, loss_after, kl = token_drift(tuned, batch, chunk=7)
    untouched = load_model(reference.name_or_path, torch.float32, use_cpu=True, say=lambda line: None)[0]
    assert all(torch.equal(weight, state[name]) for name, weight in untouched.state_dict().items())
    for n, row in enumerate(rows):
        ids, at = torch.tensor([row["input_ids"]]), [i - 1 for i, label in enumerate(row["labels"]) if i and label != -100]
        right = torch.tensor(row["labels"])[[i + 1 for i in at]]
        with torch.no_grad():
            p, q = (model(ids).logits[0, at].double().log_softmax(-1) for model in (untouched, tuned))
        mine = batch.chat == n
        for got, want in ((loss_before, F.nll_loss(p, right, reduction="none")), (loss_after, F.nll_loss(q, right, reduction="none")), (kl, (p.exp() * (p - q)).sum(-1))):
            torch.testing.assert_close(got[mine].double(), want, rtol=0, atol=1e-5)
        assert kl[mine].mean() > 1e-3, "the adapter does something"


def test_the_report_adds_up_to_the_tokens(stirred):
    model, tokenizer = stirred
    chats = forgetting_items()[::12]
    report = measure_forgetting(model, tokenizer, chats, answers=False, max_tokens=100)
    rows = list(tokenize_chats(chats, tokenizer, train_on="last"))
    sums = sum(token_drift(model, batch).double().sum(1) for batch in PackingCollator("single").batches(rows))
    figures = report.figures["all items"]
    assert figures.tokens == sum(label != -100 for row in rows for label in row["labels"])
    assert math.log(figures.perplexity_before) == pytest.approx(sums[0].item() / figures.tokens, abs=1e-5)
    assert math.log(figures.perplexity_after) == pytest.approx(sums[1].item() / figures.tokens, abs=1e-5)
    assert figures.kl[0] == pytest.approx(sums[2].item() / figures.tokens, abs=1e-5)
    assert figures.drift.mean == pytest.approx((sums[1] - sums[0]).item() / figures.tokens, abs=1e-5)
    assert figures.kl[1] < figures.kl[0] < figures.kl[2] and figures.changed is None and report.rows[0].before is None


def test_an_adapter_without_effect_costs_nothing(base):
    model, tokenizer = base
    tuned = add_lora(model, FinetuneConfig(r=4))
    report = measure_forgetting(tuned, tokenizer, limit=50, max_new_tokens=3)
    figures = report.figures["all items"]
    assert figures.drift.mean == figures.kl[0] == figures.changed.passed == 0 and report.verdict == "kept"


def test_the_model_is_left_as_it_was(stirred):
    model, tokenizer = stirred
    pointers = [weight.data_ptr() for weight in model.parameters()]
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    before = model.eval()(torch.tensor([[1, 2, 3]])).logits
    model.train()
    measure_forgetting(model, tokenizer, limit=5, max_new_tokens=2)
    assert model.training and pointers == [weight.data_ptr() for weight in model.parameters()]
    assert trainable == [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert model.active_adapters == ["default"] and torch.equal(before, model.eval()(torch.tensor([[1, 2, 3]])).logits)


def test_answers_are_those_of_each_model_and_are_checked(stirred):
    from finetune_nb.evaluation import generate

    model, tokenizer = stirred
    chats = [Chat([{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "one"}], "mine, line 1", {"pattern": "(?s).*"})]
    chats += forgetting_items()[:3]
    report = measure_forgetting(model, tokenizer, chats, max_new_tokens=4)
    with model.disable_adapter():
        base = [answer.text for answer in generate(model, tokenizer, chats, 4)]
    assert [row.before for row in report.rows] == base
    assert [row.after for row in report.rows] == [answer.text for answer in generate(model, tokenizer, chats, 4)]
    assert (report.rows[0].right_before, report.rows[0].right_after) == (True, True) and report.rows[0].category == "other"


def test_a_sample_is_told_repeatable_and_in_proportion(stirred):
    model, tokenizer = stirred
    one, same, other = (measure_forgetting(model, tokenizer, limit=24, seed=seed, answers=False) for seed in (3, 3, 4))
    assert "a sample of 24 (seed 3) of the 241 items" in one.items and one.items in str(one) and one.items in one._repr_html_()
    assert [r.where for r in one.rows] == [r.where for r in same.rows] != [r.where for r in other.rows]
    counts = {name: figures.n for name, figures in one.figures.items()}
    assert counts["all items"] == 24 and all(abs(counts[name] - 24 * n / 241) <= 1 for name, n in {"languages": 71, "arithmetic": 40, "refusal": 28}.items())
    some = measure_forgetting(model, tokenizer, categories=["refusal"], answers=False)
    assert some.items == "28 items that ship with the package, of refusal only" and {r.category for r in some.rows} == {"refusal"}


def test_a_regression_set_of_ones_own(stirred, tmp_path):
    model, tokenizer = stirred
    lines = [{"prompt": "2 + 2?", "completion": "4", "expected": 4}, {"prompt": "Hi", "completion": "Hello", "category": "manners"}]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    report = measure_forgetting(model, tokenizer, file, max_new_tokens=2)
    assert report.items == "2 items of mine.jsonl, answers of at most 2 tokens" and report.rows[0].where == "mine.jsonl, line 1"
    assert [row.right_before for row in report.rows] == [False, None] and set(report.figures) == {"all items", "other", "manners"}


@pytest.mark.parametrize("extra", [{"pattern": "("}, {"pattern": 3}, {"expected": {}}, {"expected": [""]}, {"expected": [["x"]]}, {"expected": True}], ids=str)
def test_items_that_cannot_be_checked_are_named_before_anything_is_computed(extra):
    chat = Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "mine.jsonl, line 7", extra)
    with pytest.raises(ConfigError, match=r"mine.jsonl, line 7: .*'expected' is a text or a list of texts"):
        item_check(chat)


def test_what_cannot_be_measured_says_why(base, tiny_model):
    model, tokenizer = base
    cases = [
        ({"categories": ["maths"]}, "no category 'maths'"), ({"categories": "maths"}, "no category 'maths'"), ({"items": []}, "no items"), ({"items": ["a"]}, "expected chats"),
        ({"limit": 0}, "at least one item"), ({"limit": 2.5}, "at least one item"), ({"warn_at": 0.5}, "warn_at=0.5"), ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"batch_size": 0}, "batch_size=0"),
    ]  # fmt: skip
    for wrong, said in cases:
        with pytest.raises(ConfigError, match=said):
            measure_forgetting(model, tokenizer, **wrong)
    with pytest.raises(FinetuneError, match="no adapter to switch off"):
        measure_forgetting(model, tokenizer, limit=1)
    tuned = add_lora(model, FinetuneConfig(r=4))
    with pytest.raises(FinetuneError, match="needs its tokenizer"):
        measure_forgetting(tuned, limit=1)
    tuned.peft_config["default"].bias = "all"
    with pytest.raises(FinetuneError, match="bias='all'"):
        measure_forgetting(tuned, tokenizer, limit=1)


@pytest.mark.parametrize("start", ["default", "pissa"])
def test_the_base_of_a_fresh_run_is_the_untouched_base_model(quick, chats, start, tiny_model):
    config = replace(quick, init_lora_weights=start, target_modules=["q_proj"], r=4, max_steps=3, eval_strategy="no")
    run = train(config, Splits(chats[:12], [], []), say=lambda line: None)
    report, kept = (measure_forgetting(x, limit=6, answers=False) for x in (run, load_run(run.folder)))
    rows = list(tokenize_chats([c for c in forgetting_items() if c.where in {r.where for r in report.rows}], run.tokenizer, train_on="last"))
    model = load_model(tiny_model, torch.float32, use_cpu=True, say=lambda line: None)[0]
    for row, again, tokens in zip(report.rows, kept.rows, rows, strict=True):
        with torch.no_grad():
            loss = model(torch.tensor([tokens["input_ids"]]), labels=torch.tensor([tokens["labels"]])).loss.item()
        assert row.loss_before == pytest.approx(loss, abs=1e-4) == again.loss_before and row.loss_after == pytest.approx(again.loss_after, abs=1e-3)
    assert report.name == run.folder.name


def made(n, gain, right_after=True, noise=0.01):
    return [ItemDrift(f"line {i}", "a", "<i>q</i>", "g", 10, 2.0, 2.0 + gain + noise * (-1) ** i, 0.1, "x", "<script>", True, right_after or i % 3 > 0) for i in range(n)]


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [(made(50, 0.0), "kept"), (made(50, 0.05), "kept"), (made(50, 0.2), "forgot"), (made(50, 0.09, noise=0.3), "can't tell"), (made(60, 0.0, False), "forgot"), (made(1, 0.0), "can't tell"), (made(9, 0.5), "can't tell"), (made(10, 0.5), "forgot"), (made(50, -0.5), "kept")],
)  # fmt: skip
def test_the_verdict(rows, verdict):
    assert Forgetting("x", "made up", rows).verdict == verdict


def test_the_report_is_escaped_and_json():
    report = Forgetting("<b>run", "made up", made(60, 0.2, False))
    page = report._repr_html_()
    assert "<script>" not in page and "<i>" not in page and "<b>run" not in page and "&lt;script&gt;" in page
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["verdict"] == "forgot" and len(plain["rows"]) == 60 and plain["figures"]["all items"]["drift"]["n"] == 60
    assert json.dumps(Forgetting("x", "y", made(1, 0.1)).to_dict(), allow_nan=False)


def test_a_category_of_few_items_is_named_only_when_it_is_sure():
    rows = made(100, 0.0) + [replace(row, category="b") for row in made(20, 0.4)]
    report = Forgetting("x", "y", rows)
    assert report.verdict == "forgot" and report.forgot_alone == ["b"] and "by itself: b (×1." in report.reason and drift_figures(rows[100:]).ratio[1] > 1.1
    assert Forgetting("x", "y", rows[:109]).forgot_alone == [], "nine items are too few"


def test_a_category_that_is_called_like_all_items():
    rows = [replace(row, category="all items") for row in made(20, 0.4)] + [replace(row, category="b") for row in made(100, 0.0)]
    report = Forgetting("x", "y", rows)
    assert report.figures["all items"].n == 120 and report.figures["(all items)"].n == 20 and report.forgot_alone == ["(all items)"]
    assert [line[:2] for line in report.table()] == [("all items", "120"), ("(all items)", "20"), ("b", "100")] and "(all items) (×1." in report.reason
    odd = Forgetting("x", "y", [*rows, *(replace(row, category="(all items)") for row in made(5, 0.0))])
    assert [f.n for f in odd.figures.values()] == [125, 20, 100, 5]


def test_a_category_whose_right_answers_went_is_forgotten():
    rows = made(200, 0.0) + [replace(row, category="refusal", right_before=i < 20, right_after=i < 8) for i, row in enumerate(made(31, 0.02))]
    report = Forgetting("x", "y", rows)
    assert report.figures["all items"].ratio[2] < 1.1 and report.forgot_alone == ["refusal"] and "right answers from 20 to 8 of 31" in report.reason


def test_categories_are_seldom_forgotten_by_chance():
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(40):
        rows = [replace(row, category=str(i % 8), loss_after=row.loss_before + rng.normal(0, 0.3), right_before=bool(rng.random() < 0.7), right_after=bool(rng.random() < 0.7)) for i, row in enumerate(made(160, 0.0))]
        alarms += bool(Forgetting("x", "y", rows).forgot_alone)
    assert alarms <= 6


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_base_beside_trained_biases_is_the_untouched_base_model(quick, chats, biased_model, bias):
    config = replace(quick, model_name_or_path=biased_model, bias=bias, max_steps=4, eval_strategy="no")
    run = train(config, Splits(chats[6:], [], chats[:6]), say=lambda line: None)
    fresh, tokenizer = load_model(biased_model, torch.float32, use_cpu=True, say=lambda line: None)
    ids, items = torch.tensor([[1, 2, 3, 4]]), forgetting_items()[:3]
    with torch.no_grad():
        own, learned = fresh(ids).logits, run.model(ids).logits
        with run.model.disable_adapter():
            assert not torch.allclose(run.model(ids).logits, own, atol=1e-5), "by PEFT it is neither the one nor the other"
    untouched, asked = evaluate(fresh, tokenizer, chats[:6], max_new_tokens=8), generate(fresh, tokenizer, items, 4)
    for one in (run, load_run(run.folder)):
        with torch.no_grad(), without_adapter(one.model) as model:
            torch.testing.assert_close(model(ids).logits, own)
        base = evaluate_run(one).base
        assert [row.answer for row in base.rows] == [row.answer for row in untouched.rows] and base.loss == pytest.approx(untouched.loss, rel=1e-5)
        report = measure_forgetting(one, items=items, max_new_tokens=4)
        assert [row.before for row in report.rows] == [answer.text for answer in asked] and report.figures["all items"].kl[0] > 0
        ways = should_you_finetune(config, Splits(chats[6:], [], chats[:6]), k=1, run=one)
        assert [a.text for a in ways.results[0].answers] == [row.answer for row in untouched.rows]
        with torch.no_grad():
            torch.testing.assert_close(one.model(ids).logits, learned)
    shelf = Shelf(config, lambda line: None)
    with torch.no_grad(), shelf.using(run.folder) as model:
        torch.testing.assert_close(model(ids).logits, learned)
    with torch.no_grad(), shelf.using(None) as model:
        torch.testing.assert_close(model(ids).logits, own)
    with pytest.raises(AdapterError, match=f"bias={bias!r}, which changes the base model itself"):
        put_adapter(shelf.model, run.folder / "adapter", "second")


def test_biases_come_back_after_an_error(biased_model):
    model = add_lora(load_model(biased_model, torch.float32, use_cpu=True, say=lambda line: None)[0], FinetuneConfig(r=4, bias="all"))
    weights = [p for p in model.parameters() if p.requires_grad]
    for p in weights:
        torch.nn.init.ones_(p)
    with pytest.raises(KeyboardInterrupt), without_adapter(model):
        raise KeyboardInterrupt
    assert all((p == 1).all() for p in weights)


def test_an_item_that_the_model_cannot_read_is_named(stirred):
    long = Chat([{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "x"}], "mine.jsonl, line 2")
    with pytest.raises(ConfigError, match=r"mine.jsonl, line 2: 30\d\d tokens, and the model can read 2048"):
        measure_forgetting(*stirred, [*forgetting_items()[:2], long])


def test_an_adapter_of_no_numbers_is_told_and_not_averaged(stirred):
    model, tokenizer = stirred
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(math.nan)
    with pytest.raises(FinetuneError, match=r"10 of 10 items have a loss that is no finite number, the first of them .*: the tuned model is broken"):
        measure_forgetting(model, tokenizer, limit=10)
