"""A run that learned by heart is told from a healthy one; the curves say where it went too far."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import small_tokenizer

from finetune_nb.config import ConfigError
from finetune_nb.data import Chat, Splits, question
from finetune_nb.fitting import (
    RULES,
    Fitting,
    Learned,
    Particular,
    Recall,
    Recitation,
    best_against_last,
    gap_of,
    load_fitting,
    measure_fitting,
    measure_recitation,
)
from finetune_nb.metrics import Difference
from finetune_nb.stop import TrainingError
from finetune_nb.training import load_run, train

ASKED = ("Who owns the {}?", "Tell me who has the {} now.", "Whose is that {} over there?", "The {} belongs to whom?")
THINGS = "river tower bridge garden window kettle ladder pencil mirror candle".split()
ANIMALS = "cat dog owl fox hen cow pig bee ant bat".split()
CHATS = [
    Chat([{"role": "user", "content": ASKED[i % 4].format(thing)}, {"role": "assistant", "content": f"The {thing} belongs to the old {animal} behind the green hill, since the summer of {1900 + 7 * i}."}], f"line {i}")
    for i, (thing, animal) in enumerate(zip(THINGS, ANIMALS, strict=True))
]  # fmt: skip


@pytest.fixture(scope="module")
def apt(tmp_path_factory):
    "A folder with a small model of random weights that can learn by heart: its first and last layers are strong."
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("apt"), small_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    model.lm_head.weight.data *= 30
    model.model.embed_tokens.weight.data *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def steady(quick, apt):
    more = {"r": 64, "lora_alpha": 64, "target_modules": "all-linear", "lora_dropout": 0.0, "learning_rate": 1e-2, "early_stopping_patience": 0, "max_new_tokens": 32}
    return replace(quick, model_name_or_path=apt, **more)


def test_what_is_learned_by_heart_comes_out(steady, monkeypatch):
    monkeypatch.setattr("finetune_nb.training.fastest_ways", lambda *args: ["dense"])  # a hundred epochs make much of a last bit
    run = train(replace(steady, num_train_epochs=100, learning_rate=5e-3, eval_strategy="no"), Splits(CHATS[:8], [], []), say=lambda line: None)
    found = measure_fitting(run)
    told = found.recitation
    assert found.verdict == "learned by heart" and told.verdict == "recites" and told.difference.verdict == "worse"
    assert sum(row.recited_after for row in told.rows) >= 4 and not any(row.recited_before for row in told.rows)
    assert [row.rule for row in told.rows].count(RULES[0]) == 8 and len({row.question for row in told.rows}) == len(told.rows)
    assert load_fitting(run.folder).to_dict() == found.to_dict() and "Learned by heart" in str(found)


def test_a_healthy_run_recites_nothing(steady, chats):
    run = train(replace(steady, num_train_epochs=2, learning_rate=2e-3), Splits(chats[:30], chats[30:], []), say=lambda line: None)
    found = measure_fitting(run, limit=90, max_new_tokens=8)
    rows = found.recitation.of(*RULES[:2])
    assert sum(row.recited_after for row in rows) <= 1 and found.recitation.verdict != "recites" and found.verdict in ("healthy", "can't tell")


def test_best_against_last(steady):
    more = {"num_train_epochs": 30, "eval_strategy": "steps", "eval_steps": 6, "logging_steps": 6, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    run = train(replace(steady, **more), Splits(CHATS[:6], CHATS[6:], []), say=lambda line: None)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    gap, last = gap_of(run.history), best_against_last(run)
    assert gap.opened == run.facts["best_step"] < gap.last.step == 60 and gap.best.validation == pytest.approx(run.facts["best_eval_loss"])
    assert last.mean == pytest.approx(gap.last.validation - gap.best.validation, abs=1e-4) and last.n == 4
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items()), "the best adapter is back"
    found = measure_fitting(load_run(run.folder), limit=0)
    assert found.verdict == "went too far" and found.last.mean == pytest.approx(last.mean, abs=1e-5) and f"step {gap.opened}" in found.reason


def curve(*looks):
    points = [{"step": 0, "eval_loss": 3.0}]
    return points + [point for i, (loss, look) in enumerate(looks, 1) for point in ({"step": 10 * i, "loss": loss}, {"step": 10 * i, "eval_loss": look})]


@pytest.mark.parametrize(("looks", "opened", "words"), [
    (((2, 1.9), (1.2, 1.6), (0.5, 1.9)), 20, "The gap opened at step 20"),
    (((2, 1.9), (1.2, 1.6), (0.5, 1.61)), None, "stayed near it to the end (+0.6%)"),
    (((2, 1.9), (1.2, 1.6), (0.5, 1.7)), None, "stayed near it"),
    (((0.01, 0.0072), (0.007, 0.0070), (0.006, 0.0078)), None, "stayed near it"),
    (((2, 1.9), (1.2, 1.6)), None, "still falling"),
    (((2, 1.9),), None, "one look"),
    (((2, 1.5), (2.5, 1.9)), None, "lowest at step 10"),
    (((1.0, 3.6), (0.3, 4.0)), 0, "No look was better than that at the base model"),
    (((5.0, 6.0), (7.0, 8.0)), None, "No look was better than that at the base model"),
    (((2.5, 3.1), (2.0, 3.05)), None, "No look was better than that at the base model"),
])  # fmt: skip
def test_where_the_gap_opened(looks, opened, words):
    gap = gap_of(curve(*looks))
    assert gap.opened == opened and words in gap.reason
    assert gap_of([]) is None is gap_of([{"step": 0, "eval_loss": 1.0}]) and gap_of([*curve((2, 1.0)), {"step": 20, "eval_loss": float("nan")}]).last.step == 10


@pytest.mark.parametrize(("looks", "verdict", "advice"), [
    (((1.0, 3.6), (0.3, 3.7), (0.2, 3.8)), "got worse", "before the first look"),
    (((5.0, 6.0), (7.0, 8.0), (7.0, 8.0)), "got worse", "a lower learning_rate"),
    (((2.5, 3.1), (2.0, 3.05), (2.0, 3.02)), "can't tell", "No look was better"),
    (((2.5, 2.9), (2.0, 2.5), (1.5, 2.2)), "healthy", "still falling"),
])  # fmt: skip
def test_a_run_that_is_worse_than_its_base_is_not_healthy(looks, verdict, advice):
    report = Fitting("x", gap_of(curve(*looks)), None, 10, None)
    assert report.verdict == verdict and advice in report.reason and Fitting.from_dict(report.to_dict()).verdict == verdict


def test_a_rise_that_the_chats_do_not_confirm_is_not_too_far():
    gap = gap_of(curve((2, 1.9), (1.2, 1.6), (0.5, 1.9)))
    last = [Difference(0.3, low, 0.9, n, None, False) for low, n in ((-0.1, 40), (0.1, 40), (-0.1, 4))]
    assert [Fitting("x", gap, one, 20, None).verdict for one in last] == ["can't tell", "went too far", "went too far"]


def test_questions_are_altered_so_that_the_answer_is_not_warranted():
    particular = Particular(CHATS * 3)
    entity, removed, other = (question(particular.alter(CHATS[0], rule)) for rule in RULES)
    assert "river" not in entity and entity.startswith("Who owns the ") and entity.endswith("?") and removed == "Who owns the?" and "river" in other and "letters" in other
    numbers = [Chat([{"role": "user", "content": f"What is {i} plus one?"}, {"role": "assistant", "content": f"{i + 1}"}]) for i in range(40)]
    particular = Particular(numbers)
    for chat in numbers:
        altered = particular.alter(chat, RULES[0])
        assert altered is None or question(altered) not in {question(c) for c in numbers}
    assert Particular([Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])]).alter(Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]), RULES[0]) is None


def test_what_counts_as_recited():
    learned = Learned([chat.answer for chat in CHATS] + ["yes", "yes", "J20"])
    own, other = CHATS[0].answer, CHATS[1].answer
    assert learned.recited(own.upper(), 0, False) and learned.recited(f"Well: {own} Or so.", 0, False)
    assert not learned.recited(other, 0, False) and learned.recited(other, 0, True)
    assert not learned.recited("The lamp belongs to the old man behind the green hill, since the summer of 2001.", 0, True), "what all answers have in common is no memory"
    assert [learned.unique(i) for i in (0, 10, 12)] == [True, False, True] and learned.recited("J20", 12, False) and not learned.recited("J20 J21", 12, True)


UNSPACED = {
    "Chinese": (["这盏灯笼属于住在老桥北边的王先生,是一九三七年夏天买的。", "那口古井由山坡上的寺庙看管,每年秋天打开一次。"], "这盏灯笼是谁的?", "听说这盏灯笼属于住在老桥北边的王先生,真的。", "这盏灯笼属于别人。"),
    "Japanese": (["この提灯は古い橋の北側に住む山田さんのもので、夏祭りの日に買われた。", "あの井戸は丘の上の寺が管理していて、秋に一度だけ開けられる。"], "この提灯は誰のものですか?", "たしか、この提灯は古い橋の北側に住む山田さんのものだよ。", "この提灯は知らない。"),
    "Thai": (["โคมไฟดวงนี้เป็นของลุงสมชายที่อยู่ทางเหนือของสะพานเก่า", "บ่อน้ำบ่อนั้นวัดบนเนินเขาเป็นผู้ดูแลและเปิดปีละครั้ง"], "โคมไฟดวงนี้เป็นของใคร", "คิดว่าโคมไฟดวงนี้เป็นของลุงสมชายที่อยู่ทางเหนือ", "โคมไฟดวงนี้สวย"),
}


@pytest.mark.parametrize("language", UNSPACED)
def test_scripts_without_spaces_are_read_by_characters(language):
    answers, asked, reciting, other = UNSPACED[language]
    learned = Learned(answers)
    assert learned.recited(answers[0], 0, False) and learned.recited(reciting, 0, False) and not learned.recited(reciting, 1, False) and learned.recited(reciting, 1, True)
    assert not learned.recited(other, 0, True) and learned.unique(0)
    assert not Learned([answers[0], answers[0][:-2] + answers[1][-2:]]).recited(reciting, 0, True), "what two answers have in common is no memory"
    made = [Chat([{"role": "user", "content": text}, {"role": "assistant", "content": "!"}]) for text in [asked] * 3 + [asked.replace(asked[1], "x")] * 30]
    particular = Particular(made)
    assert particular.words(asked) == {asked[1]}, "the one character in which the questions differ"
    altered = [question(particular.alter(made[0], rule)) for rule in RULES]
    assert altered[0] == asked.replace(asked[1], altered[0][1]) != asked and altered[0][1] not in "".join(map(question, made))
    assert altered[1] == asked.replace(asked[1], "") and asked[1] in altered[2]


def test_texts_of_both_kinds_are_read():
    learned = Learned(["The sign says 老桥北边第三棵柳树 and nobody knows why.", "other"])
    assert learned.recited("Look: the sign says 老桥北边第三棵柳树 and so on", 0, False) and not learned.recited("the sign says 老桥", 0, False)


def recitation(n, recited):
    return Recitation([Recall("x", RULES[i % 2], f"q{i}", "a", "b", "c", False, i < recited) for i in range(n)], "told")


def test_verdicts():
    assert [recitation(n, k).verdict for n, k in ((9, 9), (40, 0), (20, 0), (40, 20), (40, 1))] == ["can't tell", "does not recite", "can't tell", "recites", "can't tell"]
    gap = gap_of(curve((2, 1.9), (1.2, 1.6)))
    assert Fitting("x", gap, None, 20, recitation(40, 0)).verdict == "healthy" and Fitting("x", None, None, None, None).verdict == "can't tell"


def test_texts_are_escaped_and_files_checked(tmp_path, steady):
    evil = "<img src=x onerror=alert(1)>|"
    found = Fitting(evil, gap_of(curve((2, 1.9), (1.2, 1.6))), None, 20, Recitation([Recall(evil, RULES[i % 3], evil, evil, "", evil, False, True) for i in range(30)], evil))
    assert "<img src=x" not in found._repr_html_() + found.to_markdown() and Fitting.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    assert load_fitting(tmp_path) is None
    for text in ("{", "[]", "{}"):
        (tmp_path / "fitting.json").write_text(text)
        with pytest.raises(ConfigError):
            load_fitting(tmp_path)


def test_nothing_to_ask(steady):
    run = train(replace(steady, max_steps=1, eval_strategy="no"), Splits([Chat([{"role": "user", "content": f"Is {i} even?"}, {"role": "assistant", "content": "no"}], "x") for i in range(4)], [], []), say=lambda line: None)
    found = measure_recitation(run)
    assert not found.rows and found.verdict == "can't tell" and "0 of 4 training chats" in found.reason
    with pytest.raises(ConfigError, match="at least one"):
        measure_recitation(run, limit=0)
    (run.folder / "train.jsonl").unlink()
    run.config.train_file = "gone.jsonl"
    with pytest.raises((TrainingError, OSError, ValueError)):
        measure_fitting(run)
