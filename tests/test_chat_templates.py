"""The masks of real template families, against expectations written by hand."""

import copy
import warnings

import pytest
from chat_templates import FAMILIES
from tokenizers import Regex, pre_tokenizers

from finetune_nb.chat_template import NO_LOSS, TemplateError, check_template, end_of_turn_id, render_prompt, tokenize_chats
from finetune_nb.data import Chat
from finetune_nb.models import load_tokenizer

CASES = [pytest.param(family, case, id=f"{family.name}: {case.name}") for family in FAMILIES for case in family.cases]


@pytest.fixture(scope="module")
def tokenizer_of():
    embedded, made = load_tokenizer(), {}

    def of(family):
        if family.name not in made:
            tokenizer = copy.deepcopy(embedded)
            tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
            tokenizer.add_tokens(list(family.plain))
            tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
            tokenizer.chat_template = family.template
            if family.split:
                cut = pre_tokenizers.Split(Regex(family.split), "isolated")
                tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
            made[family.name] = tokenizer
        return made[family.name]

    return of


def taught(row):
    "The runs of supervised ids, each with the ids before it."
    starts = [k for k, label in enumerate(row["labels"]) if label != NO_LOSS and (k == 0 or row["labels"][k - 1] == NO_LOSS)]
    for start in starts:
        end = next((k for k in range(start, len(row["labels"])) if row["labels"][k] == NO_LOSS), len(row["labels"]))
        assert row["labels"][start:end] == row["input_ids"][start:end]
        yield start, row["input_ids"][start:end]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_the_mask_is_what_was_written_by_hand(family, case, tokenizer_of):
    tokenizer = tokenizer_of(family)
    chat = Chat(case.messages, "chats.jsonl, line 3", {"tools": case.tools} if case.tools else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of several rows
        if case.refused:
            with pytest.raises(TemplateError, match=f"(?s)chats.jsonl, line 3.*{case.refused}"):
                tokenize_chats([chat], tokenizer, chat_template_kwargs=case.kwargs)
            return
        rows = tokenize_chats([chat], tokenizer, 10_000, chat_template_kwargs=case.kwargs).to_list()
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [row.text for row in case.rows]
    assert [tuple(tokenizer.decode(ids) for _, ids in taught(row)) for row in rows] == [row.taught for row in case.rows]
    spoken = iter([i for i, m in enumerate(case.messages) if m["role"] == "assistant"])
    for row in rows:
        for start, _ in taught(row):
            prompt = render_prompt(case.messages[: next(spoken)], tokenizer, case.tools, case.kwargs)
            assert row["input_ids"][:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_checks_agree_with_the_masks(family, tokenizer_of):
    tokenizer = tokenizer_of(family)
    good = [case for case in family.cases if not case.refused]
    for case in good:
        chat = Chat(case.messages, "c", {"tools": case.tools} if case.tools else {})
        report = check_template(tokenizer, [chat], chat_template_kwargs=case.kwargs)
        assert report.ok, report
        assert end_of_turn_id(tokenizer, case.kwargs) == tokenizer.convert_tokens_to_ids(case.rows[-1].taught[-1][case.rows[-1].taught[-1].rindex(family_stop(family, case)) :])


def family_stop(family, case):
    return max((token for token in family.special if case.rows[-1].taught[-1].endswith(token)), key=len)


def test_there_are_enough_families():
    assert len(FAMILIES) >= 25 and len({f.template for f in FAMILIES}) >= 25
    assert sum(len([m for m in c.messages if m["role"] == "assistant"]) > 1 for f in FAMILIES for c in f.cases) >= 25
