"""Checkpoints on a mount that is no disk: what is written there is compared, and what can't be trusted is not gone on from."""

import io
import os
import tarfile
from pathlib import Path

import crashing
import pytest
from conftest import some_splits
from transformers import TrainerCallback

from finetune_nb import mounts, one_file
from finetune_nb.checkpoints import check_checkpoint, newest_checkpoint
from finetune_nb.mounts import why_it_may_lie
from finetune_nb.one_file import load_one_file
from finetune_nb.run_folder import checkpoints, last_checkpoint
from finetune_nb.stop import Stop
from finetune_nb.training import resume, train
from finetune_nb.whole_folder import DamageError, clear_leftovers, whole_folder

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


@pytest.fixture
def lying(drive, monkeypatch):
    "The mount loses a bit of each second file that is put there under another name, says nothing, and can't rename folders."
    replace, rename, lost = os.replace, os.rename, []

    def lose(source, target):
        replace(source, target)
        if str(target).endswith(".tar") and drive in Path(target).parents:
            lost.append(Path(target).name)
            if len(lost) % 2 == 0:
                data = bytearray(Path(target).read_bytes())
                data[len(data) // 2] ^= 1
                Path(target).write_bytes(data)

    def refuse(source, target):
        if Path(source).is_dir() and drive in Path(target).parents and "checkpoint" in str(target):
            raise OSError(5, "no folder is renamed here")
        rename(source, target)

    monkeypatch.setattr(os, "replace", lose)
    monkeypatch.setattr(os, "rename", refuse)
    return drive


def test_a_run_on_a_mount_that_lies(tiny_model, lying, tmp_path):
    "What was lost on the way is told; the last good checkpoint is gone on from to the weights of a run that had a disk."
    said, config = [], crashing.config_of(tiny_model, lying)
    run = train(config, some_splits(), say=said.append)
    told = "\n".join(said)
    assert f"{lying.resolve()} is a mount of kind fuse.drive, which may not hold what was written" in told
    assert "The checkpoint of step 8 could not be written: it reads back otherwise than it was written. checkpoint-4.tar is kept" in told
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-4.tar", "checkpoint-12.tar"] and last_checkpoint(run.folder).name == "checkpoint-12.tar"
    assert [check_checkpoint(path) for path in checkpoints(run.folder)] == [[], []]
    assert not list(run.folder.glob("checkpoint-*/")) and not list(run.folder.glob(".checkpoint*"))
    whole = crashing.config_of(tiny_model, tmp_path / "disk")
    other = train(whole, some_splits(), say=lambda text: None)
    assert (run.folder / "adapter/adapter_model.safetensors").read_bytes() == (other.folder / "adapter/adapter_model.safetensors").read_bytes()


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
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    said = []
    again = resume(run.folder, say=said.append)
    assert any("checkpoint-9.tar is passed over: " in line and "not as it was written" in line for line in said) and "Going on from checkpoint-8." in said
    assert again.facts["ended_by"] == "the plan" and again.facts["steps"] == 12
    assert newest_checkpoint(run.folder).name == "checkpoint-12"


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
