"""The trainer's checkpoints on a model of a few numbers: what they hold, what going on from them makes, and what is said where that can't be."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from test_packing import COMMON, example_chats, tuned_model
from transformers import LlamaConfig, TrainerCallback
from transformers.trainer_callback import ExportableState

from finetune_nb import crash_safe
from finetune_nb.checkpoints import check_checkpoint, load_state
from finetune_nb.config import FinetuneConfig
from finetune_nb.lora import AdapterError
from finetune_nb.one_file import scratch_of
from finetune_nb.packing import PackingCollator
from finetune_nb.stop import TrainingError
from finetune_nb.trainer import make_trainer
from finetune_nb.whole_folder import Part, read_about, whole_folder

TIMES = ("runtime", "per_second", "memory_gib")
CHATS = [{**chat, "where": f"line {n}"} for seed in range(3) for n, chat in enumerate(example_chats(seed))]
ROWS = {"train": Dataset.from_list(CHATS[:10]), "validation": Dataset.from_list(CHATS[10:])}


def trainer_of(folder, said=None, callbacks=(), resumed=False, changed=(), **settings):
    "A trainer of six steps in two epochs, with a look and a checkpoint at each second one; the learning rate falls."
    known = dict(bf16=False, use_cpu=True, max_steps=6, per_device_train_batch_size=3, gradient_accumulation_steps=1, learning_rate=5e-2, lr_scheduler_type="linear", warmup_ratio=0.0, logging_steps=1, eval_strategy="steps", eval_steps=2, early_stopping_patience=0, save_total_limit=9)
    model = tuned_model(LlamaConfig(**COMMON, attention_dropout=0.0))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return make_trainer(FinetuneConfig(**known | settings), model, PackingCollator("padded", 10**6), ROWS, folder, list(callbacks), resumed, {"chats": "some"}, changed, (said if said is not None else []).append)


class At(TrainerCallback):
    "Does something at the end of a step."

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


def stopping(control):
    control.should_training_stop = control.should_save = True


def outcome(trainer):
    "What a run came to, without what depends on the clock."
    history = [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in trainer.state.log_history]
    return {name: weight.tolist() for name, weight in trainer._weights().items()}, history, trainer.rows_sha256, trainer.state.best_global_step, trainer.state.best_metric


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder)
    trainer.train()
    return trainer, folder


@pytest.fixture
def folder(whole_run, tmp_path):
    "Its checkpoints, as if it had died after the fifth step."
    shutil.copytree(whole_run[1], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-6"))
    return tmp_path / "run"


@pytest.mark.parametrize("step", [2, 4])
def test_going_on_makes_what_was_to_come(step, whole_run, folder):
    trainer = trainer_of(folder, resumed=True)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert outcome(trainer) == outcome(whole_run[0]) and trainer.checkpoint == folder / f"checkpoint-{step}"
    assert check_checkpoint(folder / "checkpoint-6") == [] and trainer.state.best_model_checkpoint.startswith(str(folder))
    for name in ("adapter_model.safetensors", "training.json", "training.safetensors", "random-0.json"):
        assert (folder / "checkpoint-6" / name).read_bytes() == (whole_run[1] / "checkpoint-6" / name).read_bytes()


def test_a_stop_between_two_looks_goes_on_too(tmp_path):
    "The mean loss of a point of the curve counts the steps before."
    right, stopped = trainer_of(tmp_path / "right", logging_steps=4, eval_steps=3), trainer_of(tmp_path / "run", callbacks=[At(2, stopping)], logging_steps=4, eval_steps=3)
    right.train(), stopped.train()
    trainer = trainer_of(tmp_path / "run", resumed=True, logging_steps=4, eval_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert outcome(trainer)[:3] == outcome(right)[:3]


def test_what_a_checkpoint_holds(tmp_path):
    trainer, folder = trainer_of(tmp_path), tmp_path
    trainer.train()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    best = trainer.state.best_global_step
    for step in (2, 4, 6):
        place = folder / f"checkpoint-{step}"
        names = {path.name for path in place.iterdir()}
        weights, state, kept = load_file(place / "adapter_model.safetensors"), json.loads((place / "trainer_state.json").read_text()), load_state(place, "training")
        assert names == {"MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "random-0.json", "random-0.safetensors", "trainer_state.json", "training.json", "training.safetensors"} | ({"best.safetensors"} if state["best_global_step"] != step else set())
        for name in names & {"adapter_model.safetensors", "best.safetensors"}:
            with safe_open(place / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}, "other libraries ask for it"
        assert read_about(place) == {"chats": "some", "step": step} and {os.stat(path).st_mode & 0o777 for path in place.iterdir()} == {0o600} and check_checkpoint(place) == []
        assert kept.keys() == {"optimizer", "scheduler", "scaler", "losses", "rows_sha256"} and kept["scaler"] is None and kept["scheduler"]["last_epoch"] == step and kept["losses"]["logged_at"] == step
        assert state["global_step"] == step and state["best_model_checkpoint"] == str(place) and len(kept["optimizer"]["state"]) == len(weights) and "TrainerControl" in state["stateful_callbacks"]
    assert best in (2, 4, 6) and {name: w.tolist() for name, w in trainer.best_weights.items()} == {name: w.tolist() for name, w in load_file(folder / f"checkpoint-{best}" / "adapter_model.safetensors").items()}
    assert all(torch.equal(w, trainer.best_weights[name]) for name, w in trainer._weights().items()), "the best one is in the model at the end"
    assert all(w.device.type == "cpu" and w.is_contiguous() and not w.requires_grad for w in trainer.best_weights.values())
    name = next(iter(trainer.best_weights))
    trainer._weights()[name].fill_(7)
    assert not (trainer._weights()[name] == 7).any(), "it is a copy"


def test_the_best_adapter_is_kept_though_its_checkpoint_is_gone(tmp_path):
    "The learning rate is so high that the first look is the best."
    trainer = trainer_of(tmp_path, learning_rate=1.0, lr_scheduler_type="constant", save_total_limit=2)
    trainer.train()
    assert trainer.state.best_global_step == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    best = load_file(tmp_path / "checkpoint-6" / "best.safetensors")
    assert all(torch.equal(w, best[name]) for name, w in trainer._weights().items()) and json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())["best_model_checkpoint"] == str(tmp_path / "checkpoint-6")
    again = trainer_of(tmp_path, resumed=True, learning_rate=1.0, lr_scheduler_type="constant", save_total_limit=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert outcome(again) == outcome(trainer)
    cannot_be_read(again, tmp_path / "checkpoint-6" / "best.safetensors")


def test_a_full_disk_is_told_and_costs_one_checkpoint(tmp_path, monkeypatch, whole_run):
    real, said = Part.finish, []

    def full(self, about):
        if about["step"] == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if about["step"] == 6:
            raise OSError("a bare one")
        return real(self, about)

    monkeypatch.setattr(Part, "finish", full)
    trainer = trainer_of(tmp_path, said)
    trainer.train()
    assert outcome(trainer) == outcome(whole_run[0]) and [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert said == [
        f"The checkpoint of step 4 could not be written: No space left on device. checkpoint-2 is kept, and the run goes on. Make room in {tmp_path}, or bring it back.",
        f"The checkpoint of step 6 could not be written: a bare one. checkpoint-2 is kept, and the run goes on. Make room in {tmp_path}, or bring it back.",
    ]


def test_each_thing_that_can_fail_is_told(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for place, name in ((crash_safe, "Part"), (crash_safe, "save_state"), (crash_safe, "make_private")):
        said = []
        with monkeypatch.context() as patch:
            patch.setattr(place, name, refuse if name != "Part" else lambda target, make=True: refuse() if make else SimpleNamespace(folder=tmp_path, write=lambda *given: None))
            trainer_of(tmp_path / name, said, max_steps=2).train()
        assert len(said) == 1 and said[0].startswith("The checkpoint of step 2 could not be written: Read-only file system. " + ("checkpoint-2 is kept" if name == "make_private" else "There is none before it")), said
        assert not (tmp_path / name).is_dir() or {path.name for path in (tmp_path / name).iterdir()} <= {"checkpoint-2"}
    said, real = [], crash_safe.save_state
    monkeypatch.setattr(crash_safe, "save_state", lambda part, name, state: None if name.startswith("random") else real(part, name, state))
    trainer_of(tmp_path / "other", said, max_steps=2).train()
    assert said[0].startswith("The checkpoint of step 2 could not be written: process 0 could not write its part.") and not list((tmp_path / "other").iterdir())


def test_a_lock_that_is_gone_ends_the_run_before_it_writes(tmp_path, monkeypatch):
    def gone(folder):
        raise crash_safe.LockError(f"the lock of {Path(folder).name} is gone")

    monkeypatch.setattr(crash_safe, "validate_held", gone)
    with pytest.raises(TrainingError, match="^the lock of run is gone$"):
        trainer_of(tmp_path / "run").train()
    assert not list((tmp_path / "run").glob("*"))


def test_a_mount_that_may_lie_gets_one_file(tmp_path, monkeypatch, whole_run):
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "cache"))
    trainer = trainer_of(tmp_path / "run")
    trainer.far = "it is a mount"
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2.tar", "checkpoint-4.tar", "checkpoint-6.tar"] and not list((tmp_path / "cache").glob("checkpoints/*"))
    assert check_checkpoint(tmp_path / "run/checkpoint-6.tar") == [] and outcome(trainer) == outcome(whole_run[0]) and trainer.state.best_model_checkpoint == str(scratch_of(tmp_path / "run") / "checkpoint-6")
    said = []
    again = trainer_of(tmp_path / "other", said, max_steps=2)
    again.far = "it is a mount"
    monkeypatch.setattr(crash_safe, "save_one_file", lambda *given: (_ for _ in ()).throw(OSError(errno.EIO, "it reads back otherwise")))
    again.train()
    assert said[0].startswith("The checkpoint of step 2 could not be written: it reads back otherwise. There is none before it") and not list((tmp_path / "cache").glob("checkpoints/*/checkpoint*"))


def cannot_be_read(trainer, path):
    for damage in (lambda: path.write_bytes(b"x"), path.unlink):
        damage()
        with pytest.raises(TrainingError, match=f"^{path} can't be read: .+ Go on from another checkpoint.$"):
            trainer._load_from_checkpoint(str(path.parent))


def test_an_adapter_that_can_not_be_read_is_told(folder):
    cannot_be_read(trainer_of(folder, resumed=True), folder / "checkpoint-4" / "adapter_model.safetensors")


def test_a_checkpoint_of_another_adapter_is_told_by_its_name(folder):
    with whole_folder(folder / "checkpoint-9") as part:
        part.write("adapter_model.safetensors", to_safetensors({"base_model.model.other.lora_A.weight": torch.ones(1)}))
    with pytest.raises(AdapterError, match=f"^{folder / 'checkpoint-9'} does not fit this model"):
        trainer_of(folder, resumed=True)._load_from_checkpoint(str(folder / "checkpoint-9"))


def test_another_precision_is_told(folder):
    trainer = trainer_of(folder, resumed=True)
    trainer.accelerator.scaler = SimpleNamespace()
    with pytest.raises(TrainingError, match=r"checkpoint-4 was written with another precision \(bf16, fp16 or fp32\) than the run has now. Go on as it was"):
        trainer._load_optimizer_and_scheduler(str(folder / "checkpoint-4"))
    assert trainer._load_optimizer_and_scheduler(None) is None and trainer._load_rng_state(None) is None


def test_the_scale_of_float16_is_kept(tmp_path):
    trainer, got = trainer_of(tmp_path), []
    trainer.create_optimizer_and_scheduler(6)
    trainer.accelerator.scaler = SimpleNamespace(state_dict=lambda: {"scale": 2.0}, load_state_dict=got.append)
    trainer._tr_loss, trainer._total_loss_scalar, trainer._globalstep_last_logged = torch.tensor(0.0), 0.0, 0
    with whole_folder(tmp_path / "checkpoint-0") as part:
        trainer._write_state(part, trainer._weights(), trainer.optimizer.state_dict())
    trainer._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-0"))
    assert got == [{"scale": 2.0}]
    with pytest.raises(TrainingError, match="written with another precision"):
        trainer_of(tmp_path)._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-0"))


def test_each_weight_and_its_state_lie_as_those_of_the_model(folder, monkeypatch):
    "Which may lie in parts; here the parts are twice what they were, so that they can be told."
    trainer = trainer_of(folder, resumed=True)
    trainer.create_optimizer_and_scheduler(6)
    own, asked = {p.shape for p in trainer.optimizer.param_groups[0]["params"]}, []
    monkeypatch.setattr(crash_safe, "part_like", lambda tensor, own: asked.append((tensor.shape, own.shape)) or tensor * 2)
    trainer._load_from_checkpoint(str(folder / "checkpoint-4"))
    read = load_file(folder / "checkpoint-4/adapter_model.safetensors")
    assert {name: w.tolist() for name, w in trainer._weights().items()} == {name: (w * 2).tolist() for name, w in read.items()} and len(asked) == len(read) and all(one == other for one, other in asked)
    kept = load_state(folder / "checkpoint-4", "training")["optimizer"]["state"]
    trainer._load_optimizer_and_scheduler(str(folder / "checkpoint-4"))
    states = [trainer.optimizer.state[p] for group in trainer.optimizer.param_groups for p in group["params"]]
    assert own and all(torch.equal(state["exp_avg"], kept[i]["exp_avg"] * 2) for i, state in enumerate(states)) and len(states) == len(kept)
    trainer._set_weights(trainer.model, read, "somewhere")
    with pytest.raises(AdapterError, match="^somewhere does not fit this model: 1 weights are missing"):
        trainer._set_weights(trainer.model, dict(list(read.items())[1:]), "somewhere")
    with pytest.raises(AdapterError, match="^somewhere does not fit this model: 1 weights have no place"):
        trainer._set_weights(trainer.model, read | {"more": torch.ones(1)}, "somewhere")


def test_another_process_writes_its_part_alone(tmp_path, monkeypatch):
    trainer, place = trainer_of(tmp_path), Part(tmp_path / "checkpoint-0")
    (place.folder / "of the main one").write_text("x")
    trainer.create_optimizer_and_scheduler(6)
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    monkeypatch.setattr(type(trainer.args), "process_index", 1)
    trainer._save_checkpoint(trainer.model, None)
    assert {path.name for path in place.folder.iterdir()} == {"of the main one", "random-1.json", "random-1.safetensors"} and [path.name for path in tmp_path.iterdir()] == [".checkpoint-0.part"]


def test_a_change_that_was_allowed_counts_from_there_on(folder):
    rates = lambda trainer: [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]  # noqa: E731
    trainer = trainer_of(folder, resumed=True, changed=["learning_rate"], learning_rate=1e-2, weight_decay=0.5)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert rates(trainer)[4:] == pytest.approx([1e-2 * 2 / 6, 1e-2 / 6]) and rates(trainer)[:4] == pytest.approx([5e-2 * (6 - n) / 6 for n in range(4)])
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} >= {0.5}
    fresh = trainer_of(folder, resumed=True, changed=["weight_decay"], weight_decay=0.5)
    fresh.create_optimizer_and_scheduler(6)
    fresh._load_optimizer_and_scheduler(str(folder / "checkpoint-4"))
    groups = fresh.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} >= {0.5} and fresh.lr_scheduler.get_last_lr() == [group["lr"] for group in groups] == pytest.approx([5e-2 * 2 / 6] * len(groups))
    assert fresh.lr_scheduler.last_epoch == 4 and len(fresh.optimizer.state) > 0 and fresh.rows_sha256 == load_state(folder / "checkpoint-4", "training")["rows_sha256"] != ""


def test_random_numbers_of_a_process_more_are_those_of_the_first(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(crash_safe, "set_random_state", drawn.append)
    first = load_state(folder / "checkpoint-4", "random-0")
    for index, changed, found in ((0, [], True), (0, ["processes"], True), (1, ["processes"], True), (1, [], False)):
        trainer = trainer_of(folder, resumed=True, changed=changed)
        monkeypatch.setattr(type(trainer.args), "process_index", index)
        if found:
            trainer._load_rng_state(str(folder / "checkpoint-4"))
            assert str(drawn.pop()) == str(first)
        else:
            with pytest.raises(TrainingError, match="random-1"):
                trainer._load_rng_state(str(folder / "checkpoint-4"))
    with whole_folder(folder / "checkpoint-9") as part:
        crash_safe.save_state(part, "random-0", first)
        crash_safe.save_state(part, "random-1", {"own": 1})
    monkeypatch.setattr(type(trainer.args), "process_index", 1)
    trainer.changed = ["processes"]
    trainer._load_rng_state(str(folder / "checkpoint-9"))
    assert drawn == [{"own": 1}], "its own, where there is one"


def test_callbacks_keep_what_they_want_to_keep():
    class One(TrainerCallback, ExportableState):
        def __init__(self, n):
            self.n = n

        def state(self):
            return {"n": self.n}

    class Two(One):
        pass

    assert crash_safe._states([One(1), TrainerCallback(), Two(2), One(3)]) == {"One": [{"n": 1}, {"n": 3}], "Two": {"n": 2}} and crash_safe._states([]) == {}


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_other_ways_to_divide_a_model_are_left_to_transformers(name, tmp_path, monkeypatch):
    trainer, seen = trainer_of(tmp_path), []
    monkeypatch.setattr("transformers.Trainer._save_checkpoint", lambda self, *given: seen.append(given))
    setattr(trainer, name, True)
    trainer._save_checkpoint("model", None)
    assert seen == [("model", None)] and not list(tmp_path.iterdir())
