"""What checkpoints are made of, piece by piece: whole folders, copies, states, and which of them stay. Nothing is trained."""

import errno
import hashlib
import json
import os
import random
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune_nb import checkpoints as module
from finetune_nb import mounts, one_file, whole_folder
from finetune_nb.checkpoints import (
    check_checkpoint,
    check_computed,
    check_room,
    check_unchanged,
    from_plain,
    how_computed,
    load_state,
    newest_checkpoint,
    random_state,
    rotate,
    save_state,
    set_random_state,
    to_plain,
)
from finetune_nb.one_file import load_one_file, save_one_file, scratch_of
from finetune_nb.stop import TrainingError
from finetune_nb.whole_folder import (
    MANIFEST,
    DamageError,
    Part,
    check_whole,
    clear_leftovers,
    file_sha256,
    files_of,
    flush,
    read_about,
    remove_whole,
    write_file,
)
from finetune_nb.whole_folder import whole_folder as whole


def mode(path):
    return os.stat(path).st_mode & 0o777


def handles():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture(autouse=True)
def nothing_open(tmp_path, monkeypatch):
    "Each test leaves no handle open, and has a cache of its own."
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path.parent / f"{tmp_path.name}_cache"))
    before = handles()
    yield
    assert handles() == before


@pytest.fixture
def waited(monkeypatch):
    "What was waited for until it was on the disk: the names, and how large each was then."
    names = []

    def wait(handle):
        names.append((os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size))

    if os.path.isdir("/proc/self/fd"):
        monkeypatch.setattr(whole_folder, "wait_for_disk", wait)
        monkeypatch.setattr(one_file, "wait_for_disk", wait)
    return names


def made(folder, **files):
    with whole(folder, {"step": 4}) as part:
        for name, data in (files or {"a": b"first", "b": b"second"}).items():
            part.write(name, data)
    return folder


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_file_is_written_to_its_end(tmp_path, monkeypatch, waited):
    write, path = os.write, tmp_path / "file"
    path.write_bytes(b"something longer")
    path.chmod(0o600)
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    write_file(path, b"0123456789")
    assert path.read_bytes() == b"0123456789" and waited == [(str(path), 10)]
    write_file(tmp_path / "other", b"x")
    assert mode(tmp_path / "other") == 0o600
    monkeypatch.setattr(os, "write", lambda handle, data: 0)
    with pytest.raises(OSError, match="nothing was written") as caught:
        write_file(path, b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    write_file(path, b"")
    waited.clear()
    flush(tmp_path)
    assert [name for name, _ in waited] == [str(tmp_path)]


def test_a_large_file_has_its_hash(tmp_path):
    (tmp_path / "file").write_bytes(data := os.urandom(2**20 + 7))
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_folder_is_what_was_meant(tmp_path, waited):
    (tmp_path / ".one.part").mkdir()
    (tmp_path / ".one.part/old").write_text("of one that died")
    with whole(tmp_path / "one", {"step": 4}) as part:
        part.write("a", b"first")
        (part.folder / "sub").mkdir()
        (part.folder / "sub/b").write_bytes(b"of another")
        (part.folder / "sub/b").chmod(0o644)
        assert mode(part.folder) == 0o700 and part.folder == tmp_path / ".one.part"
    body = json.loads((tmp_path / "one" / MANIFEST).read_text())
    digest = {name: hashlib.sha256(data).hexdigest() for name, data in (("a", b"first"), ("sub/b", b"of another"))}
    assert body["files"] == {"a": {"bytes": 5, "sha256": digest["a"]}, "sub/b": {"bytes": 10, "sha256": digest["sub/b"]}} and body["about"] == {"step": 4}
    assert [*body] == ["about", "files", "sha256"] and (tmp_path / "one" / MANIFEST).read_text().endswith("}\n")
    assert files_of(str(tmp_path / "one")) == {"a", "sub/b"} and read_about(tmp_path / "one") == {"step": 4} and check_whole(tmp_path / "one") == [] and [p.name for p in tmp_path.iterdir()] == ["one"]
    assert {mode(path) for path in (tmp_path / "one").rglob("*") if path.is_file()} == {0o600}
    assert [Path(name).name for name, _ in waited] == ["a", "b", MANIFEST, ".one.part", tmp_path.name]
    assert read_about(made(tmp_path / "two", a=b"")) == {"step": 4} and whole(tmp_path / "three").__enter__().target == tmp_path / "three"


def test_what_another_process_has_made_stays(tmp_path):
    first = Part(tmp_path / "one")
    first.write("random-0", b"a")
    second = Part(tmp_path / "one", make=False)
    second.write("random-1", b"b")
    first.finish({})
    assert tree(tmp_path / "one").keys() == {"random-0", "random-1", MANIFEST} and read_about(tmp_path / "one") == {}
    Part(tmp_path / "never", make=False)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_folder_that_is_not_finished_changes_nothing(error, tmp_path):
    before = tree(made(tmp_path / "one"))
    with pytest.raises(error), whole(tmp_path / "one") as part:
        part.write("a", b"new")
        if error is ValueError:
            remove_whole(part.folder)  # by somebody else
        raise error
    assert tree(tmp_path / "one") == before and [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_disk_that_writes_something_else_is_found_out(tmp_path, monkeypatch):
    before, dropped = tree(made(tmp_path / "one")), []
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *args: dropped.append((os.fstat(handle).st_size, args)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    check_whole(tmp_path / "one")
    assert dropped == []
    with pytest.raises(OSError, match=r"it reads back otherwise than it was written \(b is not as it was written; c is missing\)") as caught, whole(tmp_path / "one") as part:
        for name in "abc":
            part.write(name, b"a new one")
        (part.folder / "b").write_bytes(b"a old one")
        real = whole_folder.write_file
        monkeypatch.setattr(whole_folder, "write_file", lambda path, data: ((part.folder / "c").unlink(), real(path, data)))
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(tmp_path / "one")) and tree(tmp_path / "one") == before
    assert dropped == [(9, (0, 0, 4))] * 2, "the disk was asked"


def test_a_rename_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    before, rename = tree(made(tmp_path / "one")), os.rename
    (tmp_path / ".one.gone").mkdir()
    (tmp_path / ".one.gone/x").write_text("of one that died")

    def refuse(source, target):
        if Path(source).name.endswith(".part"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    for name in ("one", "new"):
        with pytest.raises(OSError, match="^no$"):
            made(tmp_path / name, a=b"new")
    assert tree(tmp_path / "one") == before and [path.name for path in tmp_path.iterdir()] == ["one"]
    monkeypatch.setattr(os, "rename", rename)
    assert tree(made(tmp_path / "one", a=b"new"))["a"] == b"new" and [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("renames", "found"), [(1, b"first"), (2, b"new")])
def test_killed_between_the_renames(renames, found, tmp_path):
    "There is a time in which no folder has the name; what was there is put back by whoever looks next."
    made(tmp_path / "one")
    if not (child := os.fork()):
        rename, done = os.rename, []

        def dies(source, target):
            rename(source, target)
            done.append(target)
            if len(done) == renames:
                os._exit(9)

        os.rename = dies
        made(tmp_path / "one", a=b"new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9 and (tmp_path / "one").exists() == (renames == 2)
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and check_whole(tmp_path / "one") == [] and (tmp_path / "one" / "a").read_bytes() == found


def test_each_bit_of_a_manifest_counts(tmp_path):
    path = made(tmp_path / "one") / MANIFEST
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        assert check_whole(tmp_path / "one") == [f"{MANIFEST} is not as it was written"]
    bodies = ({"files": {}, "about": {}}, {"files": {"a": {"bytes": 1, "sha256": ""}}, "about": []}, {"files": {"a": {"bytes": "1", "sha256": ""}}, "about": {}})
    bodies += ({"files": {"a": {"bytes": 1, "sha256": 2}}, "about": {}}, {"files": {"a": {}}, "about": {}}, {"files": [], "about": {}}, {"about": {}}, [], {"files": {"a": {"bytes": 1, "sha256": ""}}})
    for body in bodies:
        path.write_bytes(whole_folder._manifest(body) if isinstance(body, dict) else b"[]")
        with pytest.raises(DamageError, match=f"^{MANIFEST} is not as it was written$"):
            read_about(tmp_path / "one")
    path.write_text("[" * 10**5)
    assert check_whole(tmp_path / "one") == [f"{MANIFEST} is not as it was written"]


def test_a_manifest_is_a_file_and_no_more(tmp_path, monkeypatch):
    path = made(tmp_path / "one") / MANIFEST
    data = path.read_bytes()
    monkeypatch.setattr(whole_folder, "_LONGEST_MANIFEST", len(data))
    assert check_whole(tmp_path / "one") == []
    path.write_bytes(data + b" ")
    assert check_whole(tmp_path / "one") == [f"{MANIFEST} is no manifest"]
    path.unlink()
    assert check_whole(tmp_path / "one") == [f"{MANIFEST} is missing"] == check_whole(tmp_path / "nowhere")
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    assert check_whole(tmp_path / "one") == [f"{MANIFEST} is no manifest"]
    monkeypatch.setattr(os, "lstat", lambda path: (_ for _ in ()).throw(PermissionError(13, "not for you")))
    assert check_whole(tmp_path / "one") == [f"{MANIFEST} can't be read: not for you"]
    monkeypatch.setattr(os, "lstat", lambda path: (_ for _ in ()).throw(OSError("a bare one")))
    assert check_whole(tmp_path / "one") == [f"{MANIFEST} can't be read: a bare one"]


def test_each_fault_of_a_file_is_named(tmp_path, monkeypatch):
    one, data = made(tmp_path / "one", **{name: bytes(1234) for name in "abcdef"}), bytes(1234)
    (one / "a").unlink()
    (one / "b").write_bytes(bytes(1235))
    (one / "c").write_bytes(data[:-1] + b"1")
    (one / "d").unlink()
    (one / "d").symlink_to(one / "f")
    (one / "e").unlink()
    (one / "e").mkdir()
    found = ["a is missing", "b has 1,235 bytes, not 1,234", "c is not as it was written", "d is no file", "e is no file"]
    assert check_whole(one) == check_whole(str(one), cached=False) == found
    for error, words in ((PermissionError(13, "not for you"), "not for you"), (OSError("a bare one"), "a bare one")):
        monkeypatch.setattr(whole_folder, "file_sha256", lambda path, error=error: (_ for _ in ()).throw(error))
        assert check_whole(one)[-1] == f"f can't be read: {words}"


def test_what_is_removed_is_gone_and_no_more(tmp_path, monkeypatch):
    keep = made(tmp_path / "keep")
    (tmp_path / "link").symlink_to(keep)
    (tmp_path / "file").write_text("x")
    made(tmp_path / "one")
    (tmp_path / ".one.gone").mkdir()
    (tmp_path / ".one.gone/x").write_text("of one that died")
    for name in ("link", "file", "one", "nowhere"):
        remove_whole(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["keep"] and check_whole(keep) == []
    monkeypatch.setattr(os, "rename", lambda *args: (_ for _ in ()).throw(OSError("no")))
    remove_whole(keep)
    assert check_whole(keep) == []


def test_leftovers_are_cleared_or_put_back(tmp_path):
    for name in ("replaced", "there", "damaged", "removed"):
        made(tmp_path / name)
        os.rename(tmp_path / name, tmp_path / f".{name}.gone")
    made(tmp_path / "there", a=b"new")
    (tmp_path / ".damaged.gone/a").unlink()
    for name in ("replaced", "there", "damaged", "new"):
        (tmp_path / f".{name}.part").mkdir()
        (tmp_path / f".{name}.part/x").write_text("half")
    (tmp_path / ".checkpoint-4.tar.part").write_bytes(b"half")
    (tmp_path / ".odd.gone").write_bytes(b"no folder")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".odd.gone", "replaced", "there"] and tree(tmp_path / "there")["a"] == b"new" and check_whole(tmp_path / "replaced") == []


def test_one_file_is_the_same_whoever_makes_it(tmp_path, waited):
    made(tmp_path / "checkpoint-4", a=b"x" * (2**20 + 9), b=b"y")
    for name, at in (("one.tar", 10**9), ("two.tar", 10**6)):
        for path in (tmp_path / "checkpoint-4").iterdir():
            os.utime(path, (at, at))
        save_one_file(str(tmp_path / "checkpoint-4"), str(tmp_path / name))
    one = tmp_path / "one.tar"
    assert one.read_bytes() == (tmp_path / "two.tar").read_bytes() and mode(one) == 0o600
    with tarfile.open(one) as archive:
        assert [(e.name, e.uid, e.gid, e.mtime, e.uname, e.gname) for e in archive] == [(name, 0, 0, 0, "", "") for name in (MANIFEST, "a", "b")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "one.tar", "two.tar"]
    size = one.stat().st_size
    assert (str(tmp_path / ".one.tar.part"), size) in waited and str(tmp_path) in dict(waited)
    (tmp_path / "opened").mkdir()
    (tmp_path / "opened/old").write_text("x")
    assert load_one_file(str(one), str(tmp_path / "opened")) == tmp_path / "opened"
    assert tree(tmp_path / "opened") == tree(tmp_path / "checkpoint-4") and mode(tmp_path / "opened") == 0o700


def test_what_is_wrong_with_one_file_is_said(tmp_path):
    one = made(tmp_path / "checkpoint-4")
    save_one_file(one, tmp_path / "good.tar")
    (one / "a").write_bytes(b"other")
    (one / "b").unlink()
    save_one_file(one, tmp_path / "other.tar")
    with tarfile.open(tmp_path / "good.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo(".hidden"))
    (tmp_path / "no.tar").write_bytes(b"PK" * 400)
    words = {"other": "^a is not as it was written; b is missing$", "good": "^'.hidden' in it is no file of a checkpoint$", "no": "^it can't be opened [(].+[)]$", "nowhere": "^it can't be opened"}
    for name, said in words.items():
        with pytest.raises(DamageError, match=said):
            load_one_file(tmp_path / f"{name}.tar", tmp_path / "opened")
        assert not (tmp_path / "opened").exists()


def test_what_can_not_be_packed_leaves_nothing(tmp_path):
    for name in ("checkpoint-9", "nowhere/checkpoint-9"):
        with pytest.raises(FileNotFoundError, match="checkpoint-9"):
            save_one_file(tmp_path / name, tmp_path / "one.tar")
    assert not list(tmp_path.iterdir())


def test_a_copy_is_written_through_no_link(tmp_path):
    (tmp_path / "source").write_text("new")
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "there").mkdir()
    (tmp_path / "there/.file.part").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="it is a link to elsewhere"):
        one_file.save_copies({tmp_path / "there/file": tmp_path / "source"})
    assert (tmp_path / "precious").read_text() == "kept" and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("far", [False, True])
def test_a_file_is_there_whole_or_not_at_all(far, tmp_path, monkeypatch):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.write_text("kept")
    (place / "file").symlink_to(elsewhere)
    if far:
        monkeypatch.setattr(mounts, "mounts", lambda: [(str(place.resolve()), "fuse.drive")])
    else:
        (place / ".file.part").mkdir()
        (place / ".file.part/file").write_text("of one that died")
    with one_file.file_there(str(place / "file")) as path:
        assert path.name == "file" and mode(path.parent) == 0o700 and not path.exists() and path.parent == (scratch_of(place) if far else place / ".file.part")
        path.write_text("new")
    with pytest.raises(ZeroDivisionError), one_file.file_there(place / "file") as path:
        path.write_text("half")
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError), one_file.file_there(place / "file"):
        pass
    assert not (place / "file").is_symlink() and tree(place) == {"file": b"new"} and elsewhere.read_text() == "kept"
    assert [path.name for path in place.iterdir()] == ["file"] and not list(scratch_of(place).iterdir())


@pytest.mark.parametrize("far", [False, True])
def test_a_folder_is_there_whole_or_not_at_all(far, tmp_path, monkeypatch):
    if far:
        monkeypatch.setattr(mounts, "mounts", lambda: [(str(tmp_path.resolve()), "fuse.drive")])
    (tmp_path / "one/old").mkdir(parents=True)
    (tmp_path / "one/old/x").write_text("of another")
    with one_file.folder_there(str(tmp_path / "one")) as part:
        part.write("a", b"new")
        assert (part.folder.parent == scratch_of(tmp_path)) == far and part.target.name == "one"
    with pytest.raises(ZeroDivisionError), one_file.folder_there(tmp_path / "one") as part:
        part.write("a", b"half")
        1 / 0  # noqa: B018
    assert check_whole(tmp_path / "one") == [] and tree(tmp_path / "one").keys() == {"a", MANIFEST} and tree(tmp_path / "one")["a"] == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["one"] and not list(scratch_of(tmp_path).iterdir())
    with one_file.folder_there(tmp_path / "two") as part:
        part.write("b", b"x")
    assert mode(tmp_path / "two") == 0o700 and {mode(path) for path in (tmp_path / "two").iterdir()} == {0o600}


def test_each_run_has_a_place_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = scratch_of("run")
    assert place == scratch_of(tmp_path / "run") == scratch_of(tmp_path / "x" / ".." / "run") != scratch_of("other")
    assert mode(place) == 0o700 and re.fullmatch("[0-9a-f]{16}", place.name) and place.parent.name == "checkpoints" and str(place).startswith(os.environ["FINETUNE_NB_CACHE"])


@pytest.mark.parametrize("far", [False, True])
def test_a_text_is_written_where_it_is_another(far, tmp_path, monkeypatch):
    if far:
        monkeypatch.setattr(mounts, "mounts", lambda: [(str(tmp_path.resolve()), "fuse.drive")])
    copied, real = [], one_file.save_copies
    monkeypatch.setattr(one_file, "save_copies", lambda files: (copied.append([*files]), real(files)))
    for text in ("ä\n", "ä\n", "b\n"):
        one_file.save_there(text, str(tmp_path / "file"))
        assert (tmp_path / "file").read_bytes() == text.encode()
    assert copied == [[tmp_path / "file"]] * 2 * far and [path.name for path in tmp_path.iterdir()] == ["file"]


TREE = {"a": [1, 2.5, "x", None, True, {"b": (1, float("inf"))}], 7: (torch.arange(6).view(2, 3).T, {"c": torch.ones(2)}), "": {}, "z": [[], ()]}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return [*one] == [*other] and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


def test_a_state_comes_back_as_it_was(tmp_path):
    tensors = {}
    plain = to_plain(TREE, tensors)
    assert tensors.keys() == {"7.0", "7.1.c"} and tensors["7.0"].is_contiguous() and same(TREE, from_plain(json.loads(json.dumps(plain)), tensors))
    tensors["7.1.c"] += 1
    assert TREE[7][1]["c"].sum() == 2, "they are copies"
    for value in (float("nan"), float("-inf")):
        assert repr(from_plain(to_plain([value], {}), {})) == repr([value])
    tensors = {}
    pair = (torch.ones(1, requires_grad=True), [torch.ones(1)])
    assert same(pair, from_plain(to_plain(pair, tensors), tensors)) and to_plain({7: None}, {}) == {"dict": [[7, None]]}
    assert tensors.keys() == {"0", "1.0"} and not tensors["0"].requires_grad
    with pytest.raises(TypeError, match="^a.b.1: a set can't be kept without a pickle$"):
        to_plain({"a": {"b": [1, {2}]}}, {})
    with whole(tmp_path / "one") as part:
        save_state(part, "training", TREE)
    assert tree(tmp_path / "one").keys() == {"training.json", "training.safetensors", MANIFEST} and same(TREE, load_state(tmp_path / "one", "training"))
    for name, data in (("training.json", b"{"), ("training.json", json.dumps({"tensor": "no"}).encode()), ("training.safetensors", b"x")):
        kept = (tmp_path / "one" / name).read_bytes()
        (tmp_path / "one" / name).write_bytes(data)
        with pytest.raises(TrainingError, match=f"^{tmp_path / 'one'}: the state 'training' can't be read [(].*go on from another checkpoint"):
            load_state(tmp_path / "one", "training")
        (tmp_path / "one" / name).write_bytes(kept)
    (tmp_path / "one/training.safetensors").unlink()
    with pytest.raises(TrainingError, match="the state 'training' can't be read"):
        load_state(tmp_path / "one", "training")


def test_random_numbers_go_on_where_they_stood(monkeypatch):
    def drawn():
        return random.random(), np.random.random(), np.random.standard_normal(), torch.rand(3).tolist()

    np.random.standard_normal()  # half of a pair
    tensors = {}
    state = from_plain(json.loads(json.dumps(to_plain(random_state(), tensors))), tensors)
    assert state.keys() >= {"python", "numpy", "torch"} and ("cuda" in state) == torch.cuda.is_available()
    first = drawn()
    assert drawn() != first
    set_random_state(state)
    assert drawn() == first
    for name, device in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        with monkeypatch.context() as patch:
            patch.setattr(device, "is_available", lambda: True)
            with pytest.raises(TrainingError, match=f"no random state for {name}: it was written on other hardware"):
                set_random_state({k: v for k, v in state.items() if k not in ("cuda", "mps")})
            got = []
            patch.setattr(torch.cuda, "get_rng_state", lambda: "stood there")
            patch.setattr(torch.mps, "get_rng_state", lambda: "stood there")
            patch.setattr(getattr(torch, name), "set_rng_state", got.append)
            assert (now := random_state())[name] == "stood there"
            set_random_state(now)
            assert got == ["stood there"]


def kept(folder, *steps):
    for step in steps:
        with whole(folder / f"checkpoint-{step}", {"step": step}) as part:
            part.write("a", b"x")


def there(folder):
    return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    kept(tmp_path, 4, 8, 12, 100)
    said = []
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-100" and said == []
    (tmp_path / "checkpoint-100/a").write_bytes(b"y")
    os.rename(tmp_path / "checkpoint-12", tmp_path / "checkpoint-13")
    assert check_checkpoint(tmp_path / "checkpoint-8") == [] and check_checkpoint(tmp_path / "checkpoint-13") == ["it is that of step 12"]
    assert newest_checkpoint(tmp_path, said.append) == tmp_path / "checkpoint-8"
    assert len(said) == 2 and "checkpoint-100 is passed over: a is not as it was written" in said[0] and "checkpoint-13 is passed over: it is that of step 12" in said[1]
    save_one_file(tmp_path / "checkpoint-8", tmp_path / "checkpoint-20.tar")
    save_one_file(tmp_path / "checkpoint-8", tmp_path / "checkpoint-8.tar")
    assert check_checkpoint(tmp_path / "checkpoint-20.tar") == ["it is that of step 8"] and check_checkpoint(tmp_path / "checkpoint-8.tar") == []
    for name, keep, stays in (("checkpoint-8", False, False), ("checkpoint-8", True, True), ("checkpoint-20", True, False)):
        with module.opened(tmp_path / f"{name}.tar", keep) as (place, faults):
            assert place == scratch_of(tmp_path) / name and place.is_dir() and bool(faults) == (name == "checkpoint-20")
        assert place.exists() == stays
    with module.opened(tmp_path / "checkpoint-8") as (place, faults):
        assert place == tmp_path / "checkpoint-8" and not faults
    assert place.is_dir()
    (tmp_path / "checkpoint-8.tar").write_bytes(b"x")
    assert check_checkpoint(tmp_path / "checkpoint-8.tar")[0].startswith("it can't be opened")
    assert newest_checkpoint(tmp_path / "nowhere", said.append) is None
    kept(tmp_path, 200)
    save_one_file(tmp_path / "checkpoint-200", tmp_path / "checkpoint-200.tar")
    remove_whole(tmp_path / "checkpoint-200")
    newest = newest_checkpoint(tmp_path, said.append)
    assert newest == scratch_of(tmp_path) / "checkpoint-200" and check_whole(newest) == [], "it is opened, and stays so for whoever goes on from it"


def test_the_last_ones_stay_and_a_good_one_always(tmp_path):
    kept(tmp_path, 4, 8, 12, 16, 20)
    rotate(tmp_path, 3)
    assert there(tmp_path) == [12, 16, 20]
    rotate(tmp_path, 1)
    assert there(tmp_path) == [16, 20]
    rotate(tmp_path, 2)
    assert there(tmp_path) == [16, 20]
    kept(tmp_path, 4, 8, 12)
    for step in (12, 16):
        (tmp_path / f"checkpoint-{step}/a").unlink()
    rotate(tmp_path, 2)
    assert there(tmp_path) == [8, 16, 20], "the newest of the good ones"
    kept(tmp_path, 4, 8, 24)
    rotate(tmp_path, 2)
    assert there(tmp_path) == [20, 24]


def test_what_is_different_is_listed():
    before, now = {"a": 1, "b": "x" * 60, "c": 3, "d": None}, {"a": 1, "b": "y" * 59, "c": 4, "e": 5}
    assert check_unchanged(before, now, ["b", "c", "e"]) == ["b", "c", "e"] and check_unchanged(before, dict(before)) == []
    with pytest.raises(TrainingError) as caught:
        check_unchanged(before, now, ["c"], "run/checkpoint-4")
    assert str(caught.value).splitlines()[:3] == ["run/checkpoint-4 was made with something else than what is there now:", f"  b: {'x' * 57}…, now {'y' * 59}", "  e: not there, now 5"]
    assert 'resume(folder, allow_change=["b", "e"])' in str(caught.value)
    with pytest.raises(TrainingError, match="^The checkpoint was made"):
        check_unchanged(before, now)
    with pytest.raises(TrainingError, match=r"^allow_change: there is no 'f'. Known: a, b, c, d, e\.$"):
        check_unchanged(before, now, ["g", "f", "e"])


@pytest.mark.parametrize(("keep", "copies"), [(0, 3), (2, 3), (5, 6)])
def test_the_room_for_checkpoints_is_asked_for(keep, copies, tmp_path):
    "Four numbers for each trained one in a checkpoint, one more being written, and the adapter at the end."
    numbers = 10**6
    needed = copies * (16 * numbers + 2**20) + 4 * numbers
    check_room(tmp_path, numbers, keep, needed)
    with pytest.raises(TrainingError, match=rf"need {needed / 2**20:,.0f} MiB, and {(needed - 1) / 2**20:,.0f} MiB are free"):
        check_room(tmp_path, numbers, keep, needed - 1)
    check_room(tmp_path, 1, 2)
    with pytest.raises(TrainingError, match="are free"):
        check_room(tmp_path, 2**60, 2)


def test_room_is_asked_for_on_both_disks_of_a_mount_that_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "mounts", lambda: [(str(tmp_path.resolve()), "fuse.drive")])
    one = 16 * 10**6 + 2**20
    for free, said in ((3 * one + 4 * 10**6, None), (3 * one - 1, str(tmp_path))):
        asked = {Path(tmp_path): 10 * one, scratch_of(tmp_path): free}
        monkeypatch.setattr("shutil.disk_usage", lambda place, asked=asked: SimpleNamespace(free=asked[Path(place)]))
        if said is None:
            check_room(tmp_path, 10**6, 2)
            continue
        with pytest.raises(TrainingError, match=rf"^{scratch_of(tmp_path)}: the checkpoints of this run need {3 * one / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free\. They are made there before they are copied"):
            check_room(tmp_path, 10**6, 2)


HOW = {"packing": "shared", "attention": "tree", "max_tokens_at_once": 512, "recomputed_blocks": 0}


def test_how_a_run_is_computed_is_what_its_checkpoint_says(tmp_path):
    path = tmp_path / "started.json"
    assert how_computed({"seed": 1} | HOW) == HOW and how_computed({"seed": 1}) == {} and how_computed({"packing": "padded"}) == {"packing": "padded"}
    less = {"max_tokens_at_once": 128, "out_of_memory": [{"step": 1, "max_tokens_at_once": 256}, "no row", {"step": 2, "max_tokens_at_once": 128}]}
    for started, kept in (({}, {}), ({}, HOW), ({"seed": 1}, {}), (HOW, {}), (HOW, HOW), (HOW | less, HOW), (HOW | {"out_of_memory": "nothing"}, HOW), (HOW | {"attention": "masked", "recomputed_blocks": 2, "packing": "single"}, {})):
        check_computed(started, kept, path)
    for started, kept, said in (
        ({"seed": 1}, HOW, "packing can't be not there"), ({"packing": "padded"}, {}, "attention can't be not there"), (HOW | {"packing": "odd"}, {}, "packing can't be odd"), (HOW | {"packing": ["shared"]}, {}, "packing can't be"),
        (HOW | {"attention": {}}, {}, "attention can't be"), (HOW | {"attention": "odd"}, HOW, "attention can't be odd"), (HOW | {"max_tokens_at_once": 0}, {}, "max_tokens_at_once can't be 0"), (HOW | {"max_tokens_at_once": True}, {}, "max_tokens_at_once can't be True"),
        (HOW | {"recomputed_blocks": -1}, {}, "recomputed_blocks can't be -1"), (HOW | {"recomputed_blocks": 1.0}, {}, "recomputed_blocks can't be 1.0"), (HOW | {"recomputed_blocks": 1}, HOW, "recomputed_blocks is 1, and the checkpoint was computed with 0"),
        (HOW | less | {"max_tokens_at_once": 64}, HOW, "max_tokens_at_once is 64, and the checkpoint was computed with 512"), (HOW | {"packing": "padded", "out_of_memory": [{"max_tokens_at_once": "padded"}]}, HOW, "packing is padded, and the checkpoint was computed with shared"),
        (HOW | {"max_tokens_at_once": 256, "out_of_memory": {"max_tokens_at_once": 256}}, HOW, "max_tokens_at_once is 256, and"), (HOW, HOW | {"attention": "masked"}, "attention is tree, and the checkpoint was computed with masked"),
    ):  # fmt: skip
        with pytest.raises(DamageError, match=f"started.json is not as a run writes it: {re.escape(said)}"):
            check_computed(started, kept, path)
