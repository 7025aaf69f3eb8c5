"""Sixty texts that want to be markup, through every view, read by a real parser of HTML."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import ipywidgets as widgets
import nbformat
import pytest
from markup import PAYLOADS, live_in_markdown, live_nodes
from test_report import asked, compared, fitted, forgot

from finetune_nb.chat_template import TemplateCheck, TemplateReport, show_labels, tokenize_chats
from finetune_nb.compare_view import answers_html, marked, said
from finetune_nb.config import FinetuneConfig
from finetune_nb.controls import cards, note
from finetune_nb.data import Chat, Splits, check_chats
from finetune_nb.display import html_table, markdown_table, md_cell
from finetune_nb.evaluation import html_page, to_html
from finetune_nb.lm_eval_tasks import TaskReport, TaskScore
from finetune_nb.pictures import inlined
from finetune_nb.progress import Progress
from finetune_nb.report import Findings, RunReport, answers_to
from finetune_nb.runs import list_runs

EVERY = pytest.mark.parametrize("text", PAYLOADS, ids=range(len(PAYLOADS)))


@pytest.mark.parametrize("text", PAYLOADS[:50], ids=range(50))
def test_the_detector_sees_them(text):
    assert live_nodes(f"<table><tr><td><pre>{text}</pre></td></tr></table>") or text.startswith(("<!", "-->", "<scr<"))
    assert not live_nodes("<h1>a</h1><img alt='pwn' src='data:image/png;base64,AA'><p title='pwn'>pwn()</p>")


@EVERY
def test_pieces(text, tokenizer, chats):
    spoilt = Chat([{"role": "system", "content": text}, {"role": "user", "content": text}, {"role": "assistant", "content": text}], text)
    pieces = [
        html_table([text], [[text]]), html_table((), [(text, text)]), html_page(text, [html_table([text], [[text]])]), note(text, "error"), cards({text: text}), said(text),
        *marked(text, f"{text} and {text}"), spoilt._repr_html_(), inlined(b"x", text),
        TemplateReport([TemplateCheck(text, "error", text, text)])._repr_html_(),
        TaskReport(text, [TaskScore(text, "acc", [0.0, 1.0] * 20, [1.0] * 40)], [text], "1")._repr_html_(),
    ]  # fmt: skip
    progress = Progress(text, 3)
    progress.update(1, text)
    pieces.append(progress._repr_html_())
    assert not live_nodes("".join(pieces)), [live_nodes(piece) for piece in pieces]
    assert not live_in_markdown(markdown_table([text], [[text]]) + "\n\n" + md_cell(text))


@EVERY
def test_labels(text, tokenizer):
    rows = tokenize_chats([Chat([{"role": "user", "content": text}, {"role": "assistant", "content": text}])], tokenizer)
    assert not live_nodes(show_labels(rows[0], tokenizer)._repr_html_())


@pytest.mark.parametrize("text", ["\n".join(PAYLOADS[i::12]) for i in range(12)], ids=range(12))  # a report draws pictures, which takes time
def test_reports(text):
    found = Findings(compared(name=text, text=text), [forgot(0.5, text)], asked(20, text=text), fitted(20, text))
    parts = (found.comparison, *found.forgetting, found.baselines, found.fitting)
    report = RunReport(text, found, answers_to(found, None), {f"{text}{i}": part for i, part in enumerate(parts)})
    assert not live_nodes(report.to_html()) and not live_nodes(to_html(found.comparison))
    assert not [piece for part in parts if hasattr(part, "_repr_html_") and (piece := live_nodes(part._repr_html_()))]
    assert not live_in_markdown(report.to_markdown())


def spoilt_chats(n=60):
    "A chat with each payload, in each of its places."
    more = lambda i, text: [{"role": "system", "content": text}] * (i % 3 == 0)  # noqa: E731
    return [Chat([*more(i, text), {"role": "user", "content": f"{i} {text}"}, {"role": "assistant", "content": f"{text} {i}"}], f"{text}.jsonl, line {i}") for i, text in enumerate(PAYLOADS[:n])]


def test_the_data_report(chats, tmp_path):
    twice = [*spoilt_chats(), *spoilt_chats(), Chat(chats[0].messages, "x")]
    report = check_chats(twice)
    assert len(report.findings) > 2
    assert not live_nodes(report._repr_html_()) and not live_in_markdown(report.to_markdown())
    for ending in ("html", "md"):
        try:
            text = report.save(tmp_path / f"r.{ending}").read_text()
        except Exception as error:  # a form that there is none of
            assert "r." in str(error)
            continue
        assert not (live_nodes(text) if ending == "html" else live_in_markdown(text))


def states(widget, seen):
    "The texts of a widget and of those below that a browser reads as HTML."
    if id(widget) in seen:
        return
    seen.add(id(widget))
    if isinstance(widget, (widgets.HTML, widgets.HTMLMath)):
        yield widget.value
    assert not getattr(widget, "description_allow_html", False) and not getattr(widget, "tooltip_allow_html", False)
    for child in getattr(widget, "children", ()):
        yield from states(child, seen)


def exported(room):
    "The page that nbconvert makes of a notebook with the widgets' state saved."
    from ipywidgets.embed import dependency_state
    from nbconvert import HTMLExporter

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", data={"text/html": "x"})])])
    with mock.patch("ipywidgets.embed.add_resolved_links"):  # it goes over the widgets of all tests, closed ones too
        state = {"version_major": 2, "version_minor": 0, "state": dependency_state(room, drop_defaults=False)}
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": state}
    return HTMLExporter().from_notebook_node(notebook)[0]


@pytest.mark.trains
def test_the_panel_and_its_saved_state(quick, tmp_path, monkeypatch):
    from finetune_nb.jobs import JOBS, read_samples
    from finetune_nb.panel import Panel
    from finetune_nb.train_view import job_words, samples_html
    from finetune_nb.training import train

    monkeypatch.chdir(tmp_path)
    chats = spoilt_chats()
    splits = Splits(chats[:40], chats[40:50], chats[50:])
    run = train(replace(quick, num_train_epochs=1, max_length=4096, run_name="<img src=x onerror=pwn()>", control_tokens="neutralise", too_long="truncate"), splits, say=lambda line: None)
    (run.folder / "samples.jsonl").write_text("".join(json.dumps({"step": 1, "question": t, "expected": t, "answer": t}) + "\n" for t in PAYLOADS))
    facts = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(facts | {"hardware": PAYLOADS[0], "leaks": list(PAYLOADS), "parameters": PAYLOADS[10], "ended_by": PAYLOADS[17]}))
    room = Panel(replace(quick, output_dir=quick.output_dir), splits)
    found = [*states(room.widget, set()), *(view.still() for view in room.views), room.still(), list_runs(quick.output_dir)._repr_html_(), run._repr_html_()]
    assert sum("pwn" in html for html in found) >= 4, "the payloads were shown"
    for html in found:
        assert not [node for node in live_nodes(html) if node[0] != "style" or "pwn" in str(node)], live_nodes(html)
    page = exported(room.widget)
    assert "pwn" in page and not [node for node in live_nodes(page.partition('<script type="application/vnd.jupyter.widget-state+json">')[2].partition("</script>")[2])]
    job = SimpleNamespace(state="failed", active=False, folder=None, error=" ".join(PAYLOADS), trace="\n".join(PAYLOADS), progress=None, result=None)
    job.samples = read_samples(run.folder)
    assert len(job.samples) == 60 and not live_nodes(job_words(job)) and not live_nodes(samples_html(job))
    JOBS.clear()


@EVERY
def test_answers_side_by_side(text):
    assert not live_nodes(answers_html({text: text}, [text], {text: [{"role": text, "content": text}]}))


def test_the_configuration_as_a_table():
    config = FinetuneConfig(run_name="a", group_column="x|<img src=x onerror=pwn()>", answer_pattern="<script>pwn()</script>|y")
    assert not live_in_markdown(config._repr_markdown_())


def test_no_view_reads_a_file_by_its_name():
    "IPython's HTML('/etc/passwd') reads the file; so nothing of ours is shown by those classes, and a text that looks like a path stays one."
    for text in ("/etc/passwd", "file:///etc/passwd", "http://pwn.example/x.html"):
        for shown in (html_table((), [(text, text)]), note(text), said(text), Chat([{"role": "user", "content": text}, {"role": "assistant", "content": text}], text)._repr_html_()):
            assert "root:" not in shown and text in shown and shown.startswith("<")
