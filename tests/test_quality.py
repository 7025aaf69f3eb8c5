"The quality checklist names the right rows, and shows no secrets."

import json
import random

import pytest

from finetune_nb.chats import Chat
from finetune_nb.config import ConfigError
from finetune_nb.data import icd10_chats
from finetune_nb.personal import find_personal, masked
from finetune_nb.planted import PERSONAL, SECRETS, clean_chats, plant
from finetune_nb.quality import check_chats


def chat(question, answer, where=""):
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], where)


@pytest.mark.parametrize("secret", SECRETS + PERSONAL)
def test_secrets_are_found_and_never_shown(secret, tmp_path):
    assert len(list(find_personal(f"Take {secret} for it."))) == 1 and secret not in masked(f"Take {secret} for it.")
    report = check_chats([chat(f"Take {secret} for it.", f"I noted {secret} down, thank you.")])
    shown = repr(report) + report._repr_html_() + report.to_markdown() + report.to_json()
    assert secret not in shown and (report.rows("secrets") or report.rows("personal_data")) == [0]


@pytest.mark.parametrize("text", ["Order 4111 1111 1111 1112", "version 1.2.3.4", "password: <your_password>", "me@example.com", "call 911", "E11.9 and I10", "000-12-3456"])
def test_what_is_no_secret(text):
    assert list(find_personal(text)) == []


@pytest.mark.parametrize("kind", range(5))
def test_planted_faults_are_found(kind):
    rng = random.Random(kind)
    chats, planted = plant(clean_chats(kind, rng, 600), kind, rng, each=12)
    report = check_chats(chats)
    for name, rows in planted.items():
        check = name.split(":")[0].replace("near", "near_duplicates")
        least = {"near: reworded": 0.9, "contradictions: near": 0.9, "near: another hand": 0.6}.get(name, 1.0)
        assert len(rows & set(report.rows(check))) >= least * len(rows), name
    everything = set().union(*planted.values())
    near = set(report.rows("near_duplicates")) | set(report.rows("contradictions"))
    assert len(near - everything) <= 0.1 * len(near)


def test_a_clean_set_comes_out_clean():
    report = check_chats(icd10_chats().train, max_length=512)
    assert [f.check for f in report if f.severity != "note"] == []


def test_the_whole_prompt_is_the_question():
    def talk(system):
        return Chat([{"role": "system", "content": system}, *chat("And now what follows?", system + " it is.").messages])

    assert not check_chats([talk("Speak of winter weather"), talk("Write about summer holidays")])["contradictions"]


def test_rows_leave_and_stay():
    chats = [chat("What is the way to Rome?", "Go south."), chat("What is the way to Rome?", "Go south."), chat("Who are you?", "Sorry, no idea.")]
    report = check_chats(chats)
    assert report.without("exact_duplicates").removed == chats[1:2] and report.only("refusals").chats == chats[2:]
    assert "1 of 3" in report.without("exact_duplicates").summary
    with pytest.raises(ConfigError, match="near_duplicates"):
        report.rows("duplicates")


def test_reports_are_written(tmp_path):
    report = check_chats([chat("<script>x</script>", "I'm sorry <b>you</b> | no", "<i>a</i>")])
    assert "<script>x" not in report._repr_html_() and "<b>you" not in report._repr_html_() and "<i>a" not in report._repr_html_()
    assert json.loads(report.save(tmp_path / "r.json").read_text())["chats"] == 1
    assert report.save(tmp_path / "r.html").read_text().startswith("<!doctype")
    with pytest.raises(ConfigError, match=r"\.md"):
        report.save(tmp_path / "r.txt")


def test_lengths_tell_lost_answers():
    report = check_chats([chat("word " * 90, "Yes."), chat("Hi there", "word " * 90), chat("Hi", "Yes.")], max_length=60)
    assert report.rows("tokens") == [0, 1] and "1 would lose" in report["tokens"].message and report["tokens"].severity == "error"


def test_patterns_and_schemas():
    chats = [chat("a", '{"x": 1}'), chat("b", '{"x": "1"}'), chat("c", "no")]
    assert check_chats(chats, pattern=r"\{.*\}").rows("pattern") == [2]
    pytest.importorskip("jsonschema")
    assert check_chats(chats, schema={"properties": {"x": {"type": "number"}}}).rows("schema") == [1, 2]


def test_what_cannot_be_checked():
    with pytest.raises(ConfigError, match="no chats"):
        check_chats([])
    with pytest.raises(ConfigError, match="regular expression"):
        check_chats([chat("a", "b")], pattern="(")
