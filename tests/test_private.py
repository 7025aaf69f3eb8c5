"""Permissions of what is kept, and deleting that stays where it is."""

import os
import stat
from pathlib import Path

import pytest

from finetune_nb.config import FinetuneConfig, FinetuneError, replacing, why_not_named
from finetune_nb.data import split_chats
from finetune_nb.private import is_private, make_private, remove_tree
from finetune_nb.run_folder import run_folder
from finetune_nb.runs import TRASH, trash_run
from finetune_nb.runs_view import empty_trash
from finetune_nb.stop import StoppedEarly, TrainingError

posix = pytest.mark.skipif(os.name != "posix", reason="there are no such permissions")


@pytest.fixture
def generous():
    "A umask that would show everything to everybody."
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder):
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in [folder, *folder.rglob("*")]}


@posix
@pytest.mark.trains
def test_a_run_folder_is_its_owners(quick, chats, generous):
    from finetune_nb.evaluation import evaluate_run
    from finetune_nb.training import train

    run = train(quick, split_chats(chats, validation_size=0.2, test_size=0.1, seed=1))
    evaluate_run(run)
    found = modes(run.folder)
    assert len(found) > 10 and not {name: oct(mode) for name, mode in found.items() if mode != (0o700 if (run.folder / name).is_dir() else 0o600)}


@posix
@pytest.mark.trains
def test_a_run_folder_is_its_owners_after_each_save(quick, chats, generous):
    "Not only at the end, to which a run that is killed does not come."
    from transformers import TrainerCallback

    from finetune_nb.training import train

    found = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append(modes(Path(args.output_dir)))

    run = train(quick, split_chats(chats, validation_size=0.2, test_size=0.0, seed=1), [Look()])
    assert len(found) == 2 and {"history.jsonl", "config.yaml", "started.json"} < found[0].keys()
    for seen in found:
        assert not {name: oct(mode) for name, mode in seen.items() if mode != (0o700 if (run.folder / name).is_dir() else 0o600)}


@posix
def test_also_where_a_run_fails_and_before_it_begins(tmp_path, generous):
    config = FinetuneConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError), run_folder(config) as folder:
        assert is_private(folder), "nobody can look in while it is at work"
        (folder / "history.jsonl").write_text("")
        raise ValueError
    assert set(modes(folder).values()) == {0o700, 0o600}


@posix
@pytest.mark.parametrize("name", ["mine", None])
def test_a_folder_is_its_owners_from_the_first_instant(name, tmp_path, generous, monkeypatch):
    "Before it is made private for good; and what is put aside of a run that failed is, too."
    monkeypatch.setattr("finetune_nb.run_folder.make_private", lambda folder: None)
    with pytest.raises(ValueError), run_folder(FinetuneConfig(output_dir=str(tmp_path), run_name=name)) as folder:
        assert is_private(folder)
        (folder / "failed.json").write_text("{}")
        raise ValueError
    assert is_private(tmp_path / ".failed") and (tmp_path / ".failed/failed.json").is_file()


@posix
def test_what_is_written_beside_is_as_usual(tmp_path, generous):
    with replacing(tmp_path / "report.md") as file:
        file.write("a")
    assert stat.S_IMODE((tmp_path / "report.md").stat().st_mode) == 0o666 or is_private(tmp_path)
    tmp_path.chmod(0o700)
    with replacing(tmp_path / "mine.md") as file:
        file.write("a")
    assert stat.S_IMODE((tmp_path / "mine.md").stat().st_mode) == 0o600


@posix
def test_links_are_not_followed_and_odd_mounts_do_no_harm(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").write_text("a")
    (tmp_path / "other").chmod(0o644)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "run" / "own").write_text("a")
    (tmp_path / "run").chmod(0o750)
    assert not is_private(tmp_path / "run") and not is_private(tmp_path / "nowhere")
    make_private(tmp_path / "run")
    assert is_private(tmp_path / "run") and stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o644

    def refuse(*args, **kwargs):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    make_private(tmp_path / "run")
    make_private(tmp_path / "nowhere")
    monkeypatch.setattr(os, "name", "nt")
    make_private(tmp_path / "run")


@pytest.fixture
def outside(tmp_path):
    "A folder that nobody may delete, and one with runs beside it."
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "kept.txt").write_text("kept")
    (tmp_path / "runs").mkdir()
    yield tmp_path / "outside"
    assert (tmp_path / "outside" / "deep" / "kept.txt").read_text() == "kept" and len(list((tmp_path / "outside").rglob("*"))) == 2


def test_deleting_stays_inside(outside, tmp_path):
    run = tmp_path / "runs" / "run-001"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(outside)
    (tmp_path / "runs" / "all").symlink_to(outside)
    remove_tree(run, run.parent)
    remove_tree(tmp_path / "runs" / "all", tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "runs" / "up").symlink_to(tmp_path)
    for path in (tmp_path / "runs" / "up" / "outside", tmp_path / "runs" / ".." / "outside", outside, tmp_path / "runs"):
        with pytest.raises(PermissionError, match="nothing was deleted"):
            remove_tree(path, tmp_path / "runs")


def test_a_run_that_fails_writes_nothing_through_a_link(outside, tmp_path):
    (tmp_path / "runs" / ".failed").symlink_to(outside)
    config = FinetuneConfig(output_dir=str(tmp_path / "runs"))
    with pytest.raises(StoppedEarly), run_folder(config) as folder:
        (folder / "config.yaml").write_text("a")
        (folder / "failed.json").write_text("{}")
        raise StoppedEarly("stopped")
    assert not (tmp_path / "runs" / ".failed").is_symlink() and (tmp_path / "runs" / ".failed" / "config.yaml").is_file()


def test_a_run_whose_folder_has_become_a_link_deletes_the_link(outside, tmp_path):
    with pytest.raises(StoppedEarly), run_folder(FinetuneConfig(output_dir=str(tmp_path / "runs"), run_name="mine")) as folder:
        folder.rename(tmp_path / "runs" / "moved")
        folder.symlink_to(outside)
        raise StoppedEarly("stopped")
    assert not folder.is_symlink() and not folder.exists()


def test_the_trash_is_no_link(outside, tmp_path):
    run = tmp_path / "runs" / "run-001"
    run.mkdir()
    (run / "config.yaml").write_text("")
    (tmp_path / "runs" / TRASH).symlink_to(outside)
    with pytest.raises(FinetuneError, match="is a link to elsewhere"):
        trash_run(run)
    with pytest.raises(FinetuneError):
        empty_trash(tmp_path / "runs", ["deep"])
    (tmp_path / "runs" / TRASH).unlink()
    (run / "inside").symlink_to(outside)
    trashed = trash_run(run)
    empty_trash(tmp_path / "runs", [trashed.name])
    assert not trashed.exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text("")
    trashed.symlink_to(tmp_path / "elsewhere")
    empty_trash(tmp_path / "runs", [trashed.name])
    assert not trashed.is_symlink() and (tmp_path / "elsewhere" / "config.yaml").is_file()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", ".x", "a\0b", "x" * 300, "CON", "nul.txt", "LPT1", "a.", "a ", "a\\b", "..\\x", "a\nb", "a\x1bb", "evil\u202egpj"])
def test_a_run_name_is_a_name(name, tmp_path):
    assert why_not_named(name)
    with pytest.raises(TrainingError, match="run_name"), run_folder(FinetuneConfig(output_dir=str(tmp_path / "runs"), run_name=name)):
        pass
    assert not [p for p in tmp_path.rglob("*") if p.name not in ("runs",)]


@pytest.mark.parametrize("name", ["run-001", "a b", "Größe", "..a"[2:], "console", "r=16,lr=2e-4", "漢字", "a․․b"])
def test_plain_names_are_allowed(name, tmp_path):
    with run_folder(FinetuneConfig(output_dir=str(tmp_path), run_name=name)) as folder:
        assert folder == Path(tmp_path / name)
