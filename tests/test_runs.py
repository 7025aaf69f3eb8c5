"The table of runs is read from folders, whatever lies in them; what goes to the trash comes back."

import io
import json
from dataclasses import replace

import pytest

from finetune_nb import runs
from finetune_nb.config import FinetuneConfig, FinetuneError, load_config, save_config
from finetune_nb.jobs import start_job
from finetune_nb.runs import SORTS, TRASH, differences, list_runs, plot_runs, read_run, restore_run, trash_run

EVIL = "<img src=x onerror=alert(1)>"
HISTORY = [{"step": 0, "eval_loss": 1.0}, {"step": 1, "loss": 2.0, "learning_rate": 0.1}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.2}, {"step": 4, "eval_loss": 1.4}]


def lay(parent, name, config=None, started=None, ended=None, history=HISTORY, checkpoint=None):
    "A folder as a run leaves it."
    folder = parent / name
    folder.mkdir(parents=True)
    save_config(config or FinetuneConfig(output_dir=str(parent)), folder / "config.yaml")
    (folder / "started.json").write_text(json.dumps({"started": "2026-11-25T10:00:00+00:00"} | (started or {})))
    if ended:
        (folder / "run.json").write_text(json.dumps({"started": "2026-11-25T10:00:00+00:00"} | (started or {}) | ended))
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    if checkpoint:
        (folder / f"checkpoint-{checkpoint}").mkdir()
        (folder / f"checkpoint-{checkpoint}" / "MANIFEST.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path):
    "One of each kind."
    lay(tmp_path, "done", ended={"ended_by": "the plan", "steps": 4, "seconds": 65.0, "peak_memory_gib": 1.25})
    lay(tmp_path, "early", FinetuneConfig(r=4), {"started": "2026-11-25T11:00:00+00:00"}, {"ended_by": "early stopping", "steps": 1234, "seconds": 5.0})
    lay(tmp_path, "stopped", FinetuneConfig(r=8), ended={"ended_by": "the user", "steps": 2, "seconds": 9.0}, checkpoint=2)
    lay(tmp_path, "killed", checkpoint=2)
    lay(tmp_path, "killed at once", history=[])
    lay(tmp_path, ".hidden")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("no run")
    (tmp_path / "file").write_text("no folder")
    return tmp_path


def test_a_run_is_what_its_folder_says(folder):
    rows = {row.name: row for row in list_runs(folder).rows}
    assert {name: row.state for name, row in rows.items()} == {"done": "finished", "early": "finished", "stopped": "stopped", "killed": "broken off", "killed at once": "broken off"}
    assert {name for name, row in rows.items() if row.can_go_on} == {"stopped", "killed"}
    assert rows["done"].best == 1.2, "the base model, at step 0, is not what the run reached"
    assert rows["killed at once"].best is None
    head, lines = list_runs(folder, "name").cells()
    assert head == ["run", "state", "steps", "best validation loss", "time", "peak memory", "r"]
    assert lines[0] == ["done", "finished", "4", "1.2000", "1:05", "1.25 GiB", "16"]
    assert [line[2] for line in lines] == ["4", "1,234", "4 so far", "", "2"]


BROKEN = {
    "config.yaml": ["r: [broken", "unknown: 1", "r: many", "\xff", "- a\n- b", "r: 1\nr: 2"],
    "started.json": ["{", "[1]", "null", '"x"'],
    "run.json": ["", "{'a': 1}", "[]", '{"steps": "many"}', '{"seconds": null}', '{"peak_memory_gib": []}', '{"ended_by": {}}', "[" * 100_000],
    "history.jsonl": ["{broken}", "{}", '{"loss": 1}', '{"step": "x"}', '{"step": 1, "loss": "x"}', '{"step": 1, "eval_loss": null}', '{"step": 2, "learning_rate": {}}'],
}


@pytest.mark.parametrize(("file", "text"), [(file, text) for file, texts in BROKEN.items() for text in texts], ids=lambda part: part[:24])
def test_what_can_not_be_read_says_so_and_harms_no_other(file, text, folder):
    (folder / "done" / file).write_text(text, encoding="latin-1")
    assert read_run(folder / "done").state == "unreadable"
    for sort in SORTS:
        table = list_runs(folder, sort)
        assert len(table.rows) == 5 and "unreadable" in str(table) and "unreadable" in table._repr_html_()
    plot_runs({row.name: row.history for row in table.rows}, 0.6, learning_rate=True)._repr_png_()


def test_a_beginning_that_can_not_be_is_not_read(folder):
    (folder / "killed" / "started.json").write_text('{"started": 5}')
    assert read_run(folder / "killed").state == "unreadable"


@pytest.mark.parametrize("file", ["started.json", "run.json", "history.jsonl"])
def test_a_file_that_is_missing_is_no_fault(file, folder):
    (folder / "done" / file).unlink()
    assert read_run(folder / "done").state == ("broken off" if file == "run.json" else "finished")
    assert list_runs(folder).cells() and not read_run(folder / "nothing there").history


def test_a_line_that_was_being_written_is_left_out(folder):
    with (folder / "killed" / "history.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    assert read_run(folder / "killed").history == HISTORY


def test_no_folder_and_no_runs(tmp_path):
    for where in (tmp_path, tmp_path / "none"):
        table = list_runs(where)
        assert not table.rows and table._repr_html_() == "<p>No runs yet.</p>" and str(table) and table.columns == []


def test_only_what_differs_is_a_column():
    one = FinetuneConfig(output_dir="a", run_name="x")
    assert differences([]) == differences([None]) == differences([one]) == differences([one, replace(one, output_dir="b", run_name="y"), None]) == []
    assert differences([one, replace(one, learning_rate=1e-3, r=4), None, replace(one, target_modules="all-linear")]) == ["r", "target_modules", "learning_rate"]
    assert differences([one, replace(one, columns={"user": "q"})]) == ["columns"]


def test_orders(folder):
    assert [row.name for row in list_runs(folder, "name").rows] == ["done", "early", "killed", "killed at once", "stopped"]
    assert list_runs(folder, "newest first").rows[0].name == "early"
    assert [row.name for row in list_runs(folder, "fastest").rows][:3] == ["early", "stopped", "done"]
    save_history = [{"step": 1, "eval_loss": 0.5}]
    lay(folder, "best", history=save_history)
    best = list_runs(folder, "lowest validation loss")
    assert best.rows[0].name == "best" and best.rows[-1].name == "killed at once"
    assert best._repr_html_().count("font-weight:bold") == 1
    with pytest.raises(FinetuneError, match="there is no order 'best'; there are newest first"):
        list_runs(folder, "best")


def test_nothing_of_a_run_is_html(tmp_path):
    lay(tmp_path, EVIL, FinetuneConfig(run_name=EVIL, model_name_or_path=EVIL), ended={"ended_by": EVIL, "steps": 1})
    lay(tmp_path, "other")
    html = list_runs(tmp_path)._repr_html_()
    assert "<img" not in html and html.count("&lt;img src=x onerror=alert(1)&gt;") == 2


@pytest.mark.parametrize("smooth", [0, 0.6])
@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(
    "histories",
    [
        {}, {"a": []}, {"a": [], "b": HISTORY}, {"a": HISTORY}, {"a": [{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0, "learning_rate": 0.0}]}, {"a": [{"step": 1, "eval_loss": 0.0}]},
        {"a": [{"step": 1, "loss": float("nan"), "learning_rate": 1e-3}, {"step": 2, "loss": float("inf")}]}, {"a": [{"step": 1, "loss": 1e30}, {"step": 2, "loss": -1.0}]}, {"a": [{"step": 1, "grad_norm": 2.0}]},
        {"$x_$ \\frac{": HISTORY, "_hidden": HISTORY, EVIL: HISTORY}, {str(n): HISTORY for n in range(10)},
    ],
    ids=lambda histories: ",".join(histories)[:20] or "none",
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_curves_of_anything(histories, log, smooth):
    figure = plot_runs(histories, smooth, log, learning_rate=True)
    assert figure._repr_png_().startswith(b"\x89PNG")
    if "_hidden" in histories:
        assert "_hidden" in " ".join(text.get_text() for text in figure.axes[0].get_legend().get_texts())


@pytest.mark.parametrize("name", ["run-001", "my (best) run", "run (2)", "a (1) (2)", EVIL])
def test_the_trash_gives_back_what_it_was_given(name, tmp_path):
    first = lay(tmp_path, name, history=HISTORY[:1])
    one = trash_run(first)
    assert one.parent == tmp_path / TRASH and not list_runs(tmp_path).rows
    two = trash_run(lay(tmp_path, name, history=HISTORY[:2]))
    three = trash_run(lay(tmp_path, name, history=HISTORY[:3]))
    assert len({one, two, three}) == 3
    for n, gone in ((2, two), (1, one), (3, three)):
        assert restore_run(gone) == first
        assert read_run(first).history == HISTORY[:n], "each comes back as itself, under its own name"
        trash_run(first)


def test_the_trash_takes_runs_only_and_overwrites_none(tmp_path, folder):
    for nothing in (folder / "foreign", folder / "file", folder / "none"):
        with pytest.raises(FinetuneError, match="not the folder of a run, and stays"):
            trash_run(nothing)
    gone = trash_run(folder / "done")
    lay(folder, "done")
    with pytest.raises(FinetuneError, match="There is a run done again"):
        restore_run(gone)
    assert gone.is_dir()
    for nothing in (folder / "done", folder / TRASH / "none"):
        with pytest.raises(FinetuneError, match="not in the trash"):
            restore_run(nothing)
    assert (folder / "foreign" / "notes.txt").is_file()


def test_a_run_at_work_is_seen_as_such(quick, chats):
    from finetune_nb.data import Splits

    seen = []
    job = start_job(replace(quick, max_steps=3), Splits(chats[:8], chats[8:10], []), False, [lambda: seen.append([(row.state, row.can_go_on) for row in list_runs(quick.output_dir).rows])])
    assert [("at work", False)] in seen and job.state == "finished"
    assert [row.state for row in list_runs(quick.output_dir).rows] == ["finished"]


def test_a_folder_is_read_again_only_where_it_has_changed(tmp_path, monkeypatch):
    for name in "ab":
        lay(tmp_path, name, FinetuneConfig(output_dir=str(tmp_path), r=4 if name == "a" else 8))
    read, compared = [], []
    monkeypatch.setattr(runs, "load_config", lambda path: read.append(path.parent.name) or load_config(path))
    monkeypatch.setattr(runs, "differences", lambda configs: compared.append(1) or differences(configs))
    table = list_runs(tmp_path)
    assert table.cells() and len(compared) == 1, "once for the table, not once a row"
    list_runs(tmp_path).rows[0].history.clear()
    assert read == ["a", "b"] and list_runs(tmp_path).rows[0].history, "what a caller does with it is his own"
    (tmp_path / "a" / "run.json").write_text('{"ended_by": "the user", "steps": 2}')
    assert {row.name: row.state for row in list_runs(tmp_path).rows} == {"a": "stopped", "b": "broken off"} and read == ["a", "b", "a"]


@pytest.mark.parametrize("facts", [{"seconds": float("inf")}, {"seconds": float("nan")}, {"seconds": -1}, {"steps": 10**20}, {"peak_memory_gib": float("inf")}, {"started": 3}])
def test_facts_that_can_not_be_are_not_read(facts, tmp_path):
    lay(tmp_path, "odd", ended={"ended_by": "the plan", "steps": 4} | facts)
    [row] = list_runs(tmp_path).rows
    assert row.state == "unreadable" and "odd" in str(list_runs(tmp_path)) and "odd" in list_runs(tmp_path)._repr_html_()


@pytest.mark.parametrize("step", [float("inf"), float("nan"), -1, "one"])
def test_points_that_can_not_be_are_not_read(step, tmp_path):
    lay(tmp_path, "odd", history=[{"step": step, "loss": 1.0}])
    assert list_runs(tmp_path).rows[0].state == "unreadable"


@pytest.mark.parametrize("loss", [1e308, -1e308, float("inf"), float("nan")])
@pytest.mark.parametrize("log", [True, False])
def test_a_loss_beyond_all_bounds_is_a_gap(loss, log, tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": loss}, {"step": 3, "loss": 1.0}, {"step": 3, "eval_loss": loss}]
    picture = plot_runs({"odd": history}, 0.5, log)
    assert picture._repr_png_().startswith(b"\x89PNG") and picture.axes[0].get_ylim()[1] < 100


def test_forty_curves_leave_room_for_themselves():
    "Forty names beside the curves took all of the plot."
    figure = plot_runs({f"run-{n:03}": HISTORY for n in range(40)})
    figure.savefig(io.BytesIO(), format="png")
    axes = figure.axes[0]
    assert axes.get_window_extent().height > 0.6 * figure.bbox.height
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [f"run-{n:03}" for n in range(12)] and legend.get_title().get_text() == "and 28 more"
    assert legend.get_window_extent().height < axes.get_window_extent().height
    assert plot_runs({f"run-{n}": HISTORY for n in range(12)}).axes[0].get_legend().get_title().get_text() == ""


def test_what_was_read_is_nobody_elses_to_change(tmp_path):
    lay(tmp_path, "one", FinetuneConfig(r=4))
    list_runs(tmp_path).rows[0].config.r = 99
    assert list_runs(tmp_path).rows[0].config.r == 4
