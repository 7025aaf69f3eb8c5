"""Checkpoints on a mount that is no disk: what is written there is compared, and what can't be trusted is not gone on from."""

import errno
import io
import json
import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import crashing
import pytest
from conftest import some_splits
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune_nb import mounts, one_file, sentinels
from finetune_nb.checkpoints import check_checkpoint, check_room, newest_checkpoint
from finetune_nb.lora import AdapterError
from finetune_nb.mounts import why_it_may_lie
from finetune_nb.one_file import load_one_file
from finetune_nb.run_folder import checkpoints, last_checkpoint, read_history
from finetune_nb.sentinels import NonFiniteError
from finetune_nb.stop import Stop, TrainingError
from finetune_nb.training import load_run, resume, train
from finetune_nb.whole_folder import DamageError, check_whole, clear_leftovers, whole_folder

pytestmark = pytest.mark.usefixtures("one_way")


@pytest.fixture
def drive(tmp_path, monkeypatch):
    "A folder that is a mount of Google Drive, by what the system says."
    place = tmp_path / "drive"
    place.mkdir()
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mounts, "mounts", lambda: [("/", "ext4"), (str(place.resolve()), "fuse.drive")])
    return place


def test_mounts_that_may_lie_are_known(tmp_path, monkeypatch):
    kinds = {"near": "ext4", "near/far": "nfs4", "near/far/near": "fuse.fuse-overlayfs", "bucket": "fuse.gcsfuse", "wsl": "9p"}
    for name in kinds:
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(mounts, "mounts", lambda: [("/", "overlay"), *((str(tmp_path.resolve() / name), kind) for name, kind in kinds.items())])
    found = {name: why_it_may_lie(tmp_path / name).rpartition(" ")[2] for name in kinds}
    assert found == {"near": "", "near/far": "nfs4", "near/far/near": "", "bucket": "fuse.gcsfuse", "wsl": "9p"}
    (tmp_path / "link").symlink_to(tmp_path / "bucket")
    (tmp_path / "near/Dropbox").mkdir()
    assert "fuse.gcsfuse" in why_it_may_lie(tmp_path / "link") and "folder of a cloud (Dropbox)" in why_it_may_lie(tmp_path / "near/Dropbox")


def flip(path):
    "Another bit in its middle."
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def losing():
    "Names of files that the mount loses a bit of, each once."
    return set()


@pytest.fixture
def lying(drive, losing, monkeypatch):
    "The mount loses a bit of each second checkpoint that is put there under another name, and of what is in `losing`; says nothing, and can't rename folders."
    replace, rename, lost = os.replace, os.rename, []

    def lose(source, target):
        replace(source, target)
        name = Path(target).name
        if drive in Path(target).parents and (name.endswith(".tar") or name in losing):
            lost.extend([name] if name not in losing else [])
            if name in losing or len(lost) % 2 == 0:
                flip(Path(target))
            losing.discard(name)

    def refuse(source, target):
        if Path(source).is_dir() and drive in Path(target).parents and "checkpoint" in str(target):
            raise OSError(5, "no folder is renamed here")
        rename(source, target)

    monkeypatch.setattr(os, "replace", lose)
    monkeypatch.setattr(os, "rename", refuse)
    return drive


class Lines(TrainerCallback):
    "Loses the last line of the history after one step; `seen` is what it holds when a later one begins."

    def __init__(self, lose, look):
        self.lose, self.look, self.seen = lose, look, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.lose:
            path = Path(args.output_dir, "history.jsonl")
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]) + "\0\0}\n")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.look:
            self.seen = read_history(args.output_dir), [{"step": row["step"], **row} for row in state.log_history]


def test_a_run_on_a_mount_that_lies(tiny_model, lying, losing, tmp_path):
    "What was lost on the way is told; the last good checkpoint is gone on from to the weights of a run that had a disk; what comes of it is compared."
    said, config, lines = [], crashing.config_of(tiny_model, lying), Lines(7, 10)
    losing.add("adapter_config.json")
    run = train(config, some_splits(), [lines], say=said.append)
    assert lines.seen[0] == lines.seen[1] and len(lines.seen[0]) > 4, "the history is put right at each checkpoint"
    assert said[-1].startswith(f"The run could not be written into {run.folder}: it reads back otherwise than it was written. It is still in memory")
    assert not list((run.folder / "adapter").iterdir()) and not (run.folder / "run.json").exists()
    for name in ("history.jsonl", "loss.png", "run.json"):
        flip(run.folder / "history.jsonl")
        losing.add(name)
        with pytest.raises(OSError, match="reads back otherwise"):
            run.save()
        assert load_adapter_file(run) and not (run.folder / "run.json").exists()
    run.save()
    assert not list(Path(os.environ["FINETUNE_NB_CACHE"]).glob("checkpoints/*/*")), "what was made and opened on this machine is gone"
    again = load_run(run.folder)
    assert (again.facts, again.history, check_whole(run.folder / "adapter")) == (json.loads(json.dumps(run.facts)), run.history, [])
    told = "\n".join(said)
    assert f"{lying.resolve()} is a mount of kind fuse.drive, which may not hold what was written" in told
    assert "The checkpoint of step 8 could not be written: it reads back otherwise than it was written. checkpoint-4.tar is kept" in told
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-4.tar", "checkpoint-12.tar"] and last_checkpoint(run.folder).name == "checkpoint-12.tar"
    assert [check_checkpoint(path) for path in checkpoints(run.folder)] == [[], []]
    assert not list(run.folder.glob("checkpoint-*/")) and not list(run.folder.glob(".checkpoint*"))
    whole = crashing.config_of(tiny_model, tmp_path / "disk")
    other = train(whole, some_splits(), say=lambda text: None)
    assert (run.folder / "adapter/adapter_model.safetensors").read_bytes() == (other.folder / "adapter/adapter_model.safetensors").read_bytes()


def load_adapter_file(run):
    return load_file(run.folder / "adapter/adapter_model.safetensors")


def test_what_was_there_stays_until_the_new_one_is(drive, lying, losing, tmp_path):
    "One of several files is lost as it is put there, another as it is written: all are what they were."
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("new " * 9)
    (drive / "a.txt").write_text("old")
    (drive / "b.txt").write_text("old")
    copies, before = {drive / name: tmp_path / name for name in ("a.txt", "b.txt", "c.txt")}, sorted(tmp_path.rglob("*"))
    losing.add("c.txt")
    with pytest.raises(OSError, match="reads back otherwise") as caught:
        one_file.save_copies(copies)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(drive / "c.txt"))
    assert [(drive / "a.txt").read_text(), (drive / "b.txt").read_text()] == ["old", "old"] and sorted(tmp_path.rglob("*")) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_file, "wait_for_disk", lambda handle: os.pwrite(handle, b"N", 0))
        with pytest.raises(OSError, match="reads back otherwise"):
            one_file.save_copies(copies)
    assert [(drive / "a.txt").read_text(), (drive / "b.txt").read_text()] == ["old", "old"] and sorted(tmp_path.rglob("*")) == before
    one_file.save_copies(copies)
    assert {path.name: path.read_text() for path in drive.iterdir()} == dict.fromkeys(("a.txt", "b.txt", "c.txt"), "new " * 9)


def test_a_mount_that_goes_away_is_an_error_of_the_disk(drive, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("new")
    (drive / "a.txt").write_text("old")
    monkeypatch.setattr(os, "replace", lambda source, target: shutil.rmtree(drive))
    with pytest.raises(FileNotFoundError):
        one_file.save_copies({drive / "a.txt": tmp_path / "a.txt"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_a_folder_there_has_the_files_of_the_last_one_alone(drive):
    for names in ("ab", "bc"):
        with one_file.folder_there(drive / "adapter") as part:
            for name in names:
                part.write(name, names.encode())
    assert {path.name for path in (drive / "adapter").iterdir()} == {"b", "c", "MANIFEST.json"} and not check_whole(drive / "adapter")
    assert [path.name for path in drive.iterdir()] == ["adapter"] and not list(one_file.scratch_of(drive).iterdir())
    with pytest.raises(ZeroDivisionError), one_file.folder_there(drive / "adapter"):
        1 / 0  # noqa: B018
    assert not check_whole(drive / "adapter") and not list(one_file.scratch_of(drive).iterdir())


def test_the_last_good_adapter_is_compared_too(tiny_model, lying, losing, monkeypatch):
    "A run that a sentinel ends: its words say whether the adapter is kept."
    real = sentinels.Sentinels.before_step

    def planted(self, model, step):
        real(self, model, replace(step, loss=float("nan")) if step.number == 3 else step)

    monkeypatch.setattr(sentinels.Sentinels, "before_step", planted)
    said = []
    for name in ("adapter_model.safetensors", "none"):
        losing.add(name)
        with pytest.raises(NonFiniteError) as caught:
            train(replace(crashing.config_of(tiny_model, lying, preflight=False), run_name=name.partition(".")[0]), some_splits(), say=said.append)
        assert ("could not be written into" if losing == set() else "is kept in the run's folder") in str(caught.value)
    assert not (lying / "adapter_model/adapter/adapter_model.safetensors").exists() and not check_whole(lying / "none/adapter")


class At(TrainerCallback):
    "Asks for a stop in a step."

    def __init__(self, step, stop):
        self.step, self.stop = step, stop

    def on_step_begin(self, args, state, control, **kwargs):
        self.stop.wanted = self.stop.wanted or state.global_step + 1 == self.step


def test_a_run_goes_on_from_one_file_and_passes_over_a_damaged_one(tiny_model, drive):
    stop = Stop()
    run = train(crashing.config_of(tiny_model, drive), some_splits(), [At(9, stop)], stop, lambda text: None)
    assert [path.name for path in checkpoints(run.folder)][-2:] == ["checkpoint-8.tar", "checkpoint-9.tar"]
    newest = run.folder / "checkpoint-9.tar"
    flip(newest)
    said = []
    again = resume(run.folder, say=said.append)
    assert any("checkpoint-9.tar is passed over: " in line and "not as it was written" in line for line in said) and "Going on from checkpoint-8." in said
    assert again.facts["ended_by"] == "the plan" and again.facts["steps"] == 12
    assert newest_checkpoint(run.folder).name == "checkpoint-12"
    flip(run.folder / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterError, match="adapter is not as it was written: adapter_model.safetensors .*train it again"):
        load_run(run.folder).model  # noqa: B018


EVIL = {"../out": b"x", "/tmp/out": b"x", "a/b": b"x", ".hidden": b"x"}


@pytest.mark.parametrize("name", [*EVIL, "link", "pipe", "half", "other"])
def test_a_file_that_is_no_checkpoint_is_opened_nowhere_else(name, tmp_path):
    with whole_folder(tmp_path / "checkpoint-4", {"step": 4}) as part:
        part.write("a.json", b"{}" * 600)
    one_file.save_one_file(tmp_path / "checkpoint-4", tmp_path / "far.tar")
    if name == "half":
        os.truncate(tmp_path / "far.tar", 900)
    elif name == "other":
        (tmp_path / "far.tar").write_bytes(b"PK" * 400)
    else:
        with tarfile.open(tmp_path / "far.tar", "a") as archive:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = {"link": (tarfile.SYMTYPE, "/etc/passwd", 0), "pipe": (tarfile.FIFOTYPE, "", 0)}.get(name, (tarfile.REGTYPE, "", 1))
            archive.addfile(entry, io.BytesIO(EVIL.get(name, b"")))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DamageError):
        load_one_file(tmp_path / "far.tar", tmp_path / "opened")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_copy_that_was_cut_short_is_cleared_away(tmp_path):
    (tmp_path / ".checkpoint-4.tar.part").write_bytes(b"half")
    (tmp_path / ".checkpoint-8.part").mkdir()
    clear_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["holes", "holes told beside", "a length"])
def test_a_small_file_becomes_no_large_one(kind, tmp_path):
    "Of a file with holes, of which a few bytes say that it is 3 GiB, and of one that is said to be longer than what holds it."
    entry = tarfile.TarInfo("adapter_model.safetensors")
    if kind == "holes":
        entry.type = tarfile.GNUTYPE_SPARSE
        head = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
        head[386:398], head[398:410], head[483:495] = b"%011o\0" % (3 * 2**30), b"%011o\0" % 0, b"%011o\0" % (3 * 2**30)
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
    elif kind == "holes told beside":
        entry.pax_headers = {"GNU.sparse.size": str(3 * 2**30), "GNU.sparse.map": f"{3 * 2**30},0", "GNU.sparse.numblocks": "1"}
        head = entry.tobuf(tarfile.PAX_FORMAT)
    else:
        entry.size = 3 * 2**30
        head = entry.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "checkpoint-5.tar").write_bytes(bytes(head) + bytes(1024))
    with pytest.raises(DamageError, match="is no file of a checkpoint|longer than all of it"):
        load_one_file(tmp_path / "checkpoint-5.tar", tmp_path / "opened")
    assert not (tmp_path / "opened").exists()


def test_room_is_asked_for_where_checkpoints_are_made(drive, monkeypatch):
    "The mount has enough, the disk of the machine has not."
    usage = shutil.disk_usage(drive)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2**50 if Path(place) == drive else 2**20))
    with pytest.raises(TrainingError, match="FINETUNE_NB_CACHE"):
        check_room(drive, 460_000, 2)
