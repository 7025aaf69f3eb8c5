"A job is `train` and `resume` behind the notebook: the same weights, and it can be looked at, stopped, found and continued."

import os
import signal
import threading
import time
from dataclasses import replace

import forked
import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

from finetune_nb import jobs
from finetune_nb.config import FinetuneConfig, FinetuneError, save_config
from finetune_nb.data import Chat, save_chats
from finetune_nb.jobs import (
    JOBS,
    SHELVES,
    WATCHERS,
    Job,
    JobError,
    Pace,
    Watched,
    _looks_between,
    active_job,
    best_look,
    continue_job,
    find_job,
    patience_left,
    read_samples,
    seconds_left,
    start_alone,
    start_job,
)
from finetune_nb.locks import STOP
from finetune_nb.losses import smoothed
from finetune_nb.run_folder import last_checkpoint
from finetune_nb.runs import read_run, trash_run
from finetune_nb.stop import TrainingError
from finetune_nb.tasks import ACTIVE, Task, in_words
from finetune_nb.training import load_run, load_splits, resume, train

pytestmark = pytest.mark.usefixtures("one_way")


@pytest.fixture(autouse=True)
def no_jobs():
    "As in a kernel that has just begun."
    JOBS.clear()
    WATCHERS.clear()
    yield
    assert active_job() is None
    JOBS.clear()


@pytest.fixture(scope="module")
def begun(tiny_model, tmp_path_factory):
    "Eight steps with dropout, never ended early, over a file of chats; and those chats."
    folder = tmp_path_factory.mktemp("jobs")
    made = [Chat([{"role": "user", "content": f"What is {i} plus one?"}, {"role": "assistant", "content": f"It is {i + 1}." + " Really." * (i % 5)}]) for i in range(20)]
    config = FinetuneConfig(
        model_name_or_path=tiny_model, bf16=False, use_cpu=True, num_train_epochs=2, learning_rate=5e-3, gradient_accumulation_steps=1, logging_steps=1,
        output_dir=str(folder / "runs"), max_new_tokens=4, lora_dropout=0.1, early_stopping_patience=0, train_file=str(save_chats(made, folder / "chats.jsonl")),
    )  # fmt: skip
    return config, load_splits(config)


@pytest.fixture(scope="module")
def whole(begun):
    "The run of `train`, which a job has to equal."
    return train(*begun, say=lambda line: None)


@pytest.fixture
def splits(begun):
    return begun[1]


@pytest.fixture
def steady(begun, tmp_path):
    return replace(begun[0], output_dir=str(tmp_path / "runs"))


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def last_weights(run):
    return load_file(last_checkpoint(run.folder) / "adapter_model.safetensors")


class At:
    "A listener that acts once, at a step."

    def __init__(self, step, act):
        self.step, self.act, self.job = step, act, None

    def __call__(self):
        self.job = self.job or active_job()
        if self.job.step >= self.step and self.job.state == "training":
            self.step = float("inf")
            self.act()


def stopped(config, splits, step=5, **more):
    "A job that was stopped after a step."
    return start_job(config, splits, False, [At(step, lambda: active_job().stop())], **more)


@pytest.mark.parametrize(("questions", "background"), [(0, False), (2, True)])
def test_a_job_is_the_run_of_train(questions, background, steady, splits, whole):
    job = start_job(steady, splits, background, questions=questions)
    run = job.wait()
    assert job.state == "finished" and job.config == steady and job.folder == run.folder
    assert same(adapter(whole.folder), adapter(run.folder)) and same(last_weights(whole), last_weights(run))
    assert [row.get("loss", row.get("eval_loss")) for row in run.history] == [row.get("loss", row.get("eval_loss")) for row in whole.history]
    assert job.history == load_run(run.folder).history and (job.step, job.steps) == (8, 8)
    assert sorted({sample.step for sample in job.samples}) == ([0, 4, 8] if questions else [])
    if questions:
        assert [(s.question, s.expected) for s in job.samples[:2]] == [(c.messages[0]["content"], c.answer) for c in splits.validation[:2]]


def test_the_kernel_stays_usable(steady, splits):
    "The training waits in its thread until the main thread has had its turn."
    here, go = threading.Event(), threading.Event()
    job = start_job(steady, splits, True, [At(2, lambda: (here.set(), go.wait(60)))])
    assert job.state in ACTIVE and here.wait(60)
    assert threading.current_thread() is threading.main_thread() and job.active and torch.ones(3).sum() == 3
    assert job.step == 2 and job.wait(0.01) is None and not job.error
    go.set()
    assert job.wait().facts["steps"] == 8


@pytest.mark.parametrize("where", ["same job", "folder", "folder of given chats"])
def test_a_stopped_job_goes_on_to_the_same_weights(where, steady, splits, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = stopped(replace(steady, output_dir="runs"), splits if where == "folder of given chats" else None)
    assert job.state == "stopped" and job.result.facts["ended_by"] == "the user" and job.step < 8
    assert last_checkpoint(job.folder).name == f"checkpoint-{job.step}" and job.history[-1]["step"] == job.step
    before = job.samples[:]
    if where == "same job":
        again = continue_job(job, True)
        assert again is job
    else:  # as after the kernel was started again
        JOBS.clear()
        again, before = continue_job(job.folder if where == "folder" else str(job.folder.resolve()), True), []
        assert again is not job and JOBS == [again]
    run = again.wait()
    assert again.state == "finished" and run.facts["steps"] == 8
    assert same(last_weights(run), last_weights(whole))
    losses = [[row["loss"] for row in one.history if "loss" in row] for one in (run, whole)]
    assert losses[0] == losses[1] and again.samples[: len(before)] == before and again.samples[-1].step == 8


def test_a_job_is_found_by_its_folder(steady, splits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = replace(steady, max_steps=1, eval_strategy="no", output_dir="runs")
    assert find_job("runs") is None and active_job() is None
    seen = []
    one = start_job(short, splits, False, [lambda: seen.append((active_job(), find_job("runs"), find_job("elsewhere")))])
    assert seen[0] == (one, one, one), 'the one at work is found wherever it stands'
    assert find_job('elsewhere') is None and active_job() is None
    two = start_job(short, splits, False)
    assert find_job("runs") is find_job(tmp_path / "runs") is find_job("runs/../runs") is two and find_job("others") is None
    JOBS.clear()
    job = stopped(replace(steady, output_dir="old"), splits, 2)
    os.rename("old", "new")
    JOBS.clear()
    again = continue_job(tmp_path / "new" / job.folder.name, False)
    assert find_job("new") is again and again.state == "finished", "where it is counts, not where it began"


def test_one_job_at_a_time_and_refusals_change_nothing(steady, splits):
    said = []

    def try_others():
        job = active_job()
        for act in (lambda: start_job(steady, splits), lambda: continue_job(job), lambda: continue_job(job.folder)):
            with pytest.raises(JobError, match="A run is at work .*Stop it first"):
                act()
        said.append(len(JOBS))
        job.stop()  # which it must still hear

    job = start_job(steady, splits, False, [At(2, try_others)])
    assert said == [1] and job.state == "stopped"
    continue_job(job, False)
    run = job.result
    for act in (lambda: continue_job(job), lambda: continue_job(job.folder)):
        with pytest.raises(JobError, match="was not stopped: it was ended by the plan after 8 steps"):
            act()
    assert job.state == "finished" and job.result is run and len(JOBS) == 1


def test_what_never_began_can_not_go_on(steady, splits, tmp_path):
    job = start_job(replace(steady, model_name_or_path="no-such/model"), splits, False)
    assert job.state == "failed" and job.folder is None and "neither in a package" in job.error
    assert not list((tmp_path / "runs").glob("*")), "nothing is left of it"
    with pytest.raises(JobError, match="never began"):
        continue_job(job)
    with pytest.raises(FinetuneError, match="is no run any more"):
        continue_job(tmp_path / "none")
    with pytest.raises(FinetuneError, match="neither in a package"):
        job.wait()


class Boom(Exception):
    pass


def failing_at(step, monkeypatch, error=None):
    "Training breaks inside a step."
    from finetune_nb.trainer import FinetuneTrainer

    whole, kept = FinetuneTrainer.training_step, monkeypatch

    def broken(self, *args, **kwargs):
        if self.state.global_step == step:
            kept.setattr(FinetuneTrainer, "training_step", whole)
            raise error or Boom("the cable\nand more")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(FinetuneTrainer, "training_step", broken)


def test_a_failure_is_told_in_words_and_what_was_saved_goes_on(steady, splits, whole, monkeypatch):
    failing_at(6, monkeypatch)
    job = start_job(steady, splits, True)
    with pytest.raises(FinetuneError, match="Boom: the cable .*none of the errors that we know"):
        job.wait()
    assert job.state == "failed" and "Traceback" in job.trace and "and more" in job.trace and "\n" not in job.error
    assert job.folder.is_dir() and last_checkpoint(job.folder).name == "checkpoint-4" and not (job.folder / "run.json").exists()
    run = continue_job(job, True).wait()
    assert job.state == "finished" and not job.error and not job.trace
    assert same(adapter(run.folder), adapter(whole.folder))
    steps = [sample.step for sample in job.samples]
    assert steps == sorted(steps) and steps == [0, 0, 4, 4, 8, 8]


def test_a_failure_before_the_first_point_leaves_no_folder(steady, splits, monkeypatch, tmp_path):
    failing_at(0, monkeypatch)
    job = start_job(replace(steady, eval_strategy="no"), splits, False)
    assert job.state == "failed" and [p.name for p in (tmp_path / "runs").iterdir()] == [".failed"]
    with pytest.raises(JobError, match="folder is gone"):
        continue_job(job)


def test_a_loss_that_is_no_number(steady, splits, monkeypatch):
    from finetune_nb.trainer import FinetuneTrainer

    monkeypatch.setattr(FinetuneTrainer, "training_step", lambda self, *args, **kwargs: torch.tensor(float("nan"), requires_grad=True))
    job = start_job(steady, splits, False)
    assert job.state == "failed" and "became nan at step 1. Lower learning_rate" in job.error
    assert patience_left(job.history, 2) == 2 and best_look(job.history) is None


def test_who_looks_on_breaks_nothing(steady, splits, whole):
    calls = []

    def broken():
        calls.append(1)
        raise ValueError("a closed page")

    def leaves():
        job = active_job()
        job.listeners.remove(leaves)
        raise ValueError("gone already")

    job = start_job(steady, splits, False, [broken, leaves])
    assert job.state == "finished" and same(adapter(job.folder), adapter(whole.folder))
    assert len(calls) > 5 and job.listeners == [broken], "it is asked again: the next look may go well"
    assert [line for line in job.lines if "A view could not show" in line] == ["A view could not show this: ValueError: a closed page", "A view could not show this: ValueError: gone already"]


def test_a_stop_in_the_moment_of_the_end_changes_nothing(quick, monkeypatch):
    job = Job(quick)
    pressed = threading.Thread(target=job.stop)

    def ended():
        pressed.start()
        time.sleep(0.2)  # the stop sees a job at work, and waits
        return "finished"

    monkeypatch.setattr(job, "_ended", ended)
    job.work = lambda say: None
    job.start(background=False)
    pressed.join()
    assert job.state == "finished" and not job.active


@pytest.mark.parametrize(
    ("changes", "step", "steps", "epoch", "looks"),
    [
        ({}, 0, 30, 0.0, 3),
        ({}, 10, 30, 1.0, 2),
        ({}, 29, 30, 2.9, 1),
        ({}, 30, 30, 3.0, 0),
        ({"num_train_epochs": 2.5}, 5, 25, 0.5, 3),  # the half epoch is looked at too
        ({"max_steps": 50}, 5, 50, 0.005, 1),  # within the first epoch: once, at the end
        ({"max_steps": 50}, 5, 50, 0.25, 3),
        ({"max_steps": 50}, 0, 50, 0.0, 1),
        ({"eval_strategy": "steps", "eval_steps": 8}, 8, 30, 0.8, 2),
        ({"eval_strategy": "no"}, 8, 30, 0.8, 0),
    ],
)
def test_the_looks_that_are_to_come(changes, step, steps, epoch, looks, quick):
    assert _looks_between(replace(quick, **{"num_train_epochs": 3} | changes), step, steps, epoch) == looks


@pytest.mark.trains
def test_the_looks_that_were_to_come_came(steady, splits):
    "An epoch that is cut short is looked at, too."
    config, foretold = replace(steady, max_steps=5, eval_strategy="epoch", eval_steps=None, early_stopping_patience=0), []

    def listen():
        job = active_job()
        if job is not None and job.state == "training" and job.step == 1 and not foretold:
            foretold.append(_looks_between(job.config, job.step, job.steps, job.epoch))

    job = start_job(config, splits, False, [listen])
    assert foretold == [sum("eval_loss" in row and row["step"] > 1 for row in job.history)]


def test_going_on_with_what_is_gone_says_so(quick, tmp_path):
    with pytest.raises(JobError, match="is no run any more.*trash"):
        continue_job(tmp_path / "gone")


def test_questions_that_can_not_be_answered_cost_no_run(steady, splits, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no answer")

    monkeypatch.setattr(jobs, "generate", broken)
    job = start_job(steady, splits, False)
    assert job.state == "finished" and not job.samples and sum("no answer" in line for line in job.lines) == 1


def test_the_configuration_may_be_turned_meanwhile(steady, splits):
    config = replace(steady)
    job = start_job(config, splits, False, [At(1, lambda: setattr(config, "learning_rate", 0.5))])
    assert job.config.learning_rate == load_run(job.folder).config.learning_rate == steady.learning_rate


def test_only_the_last_run_keeps_its_model(steady, splits):
    short = replace(steady, max_steps=1, eval_strategy="no")
    one = start_job(short, splits, False)
    weights = {key: value.clone() for key, value in adapter(one.folder).items()}
    assert one.result.loaded
    two = start_job(short, splits, False)
    assert one.result.loaded is None and two.result.loaded
    loaded = {key: value for key, value in one.result.model.state_dict().items() if "lora_" in key}
    assert all(torch.equal(loaded[key.replace(".weight", ".default.weight")], value) for key, value in weights.items()), "asked for, it is there again"


def test_an_interrupt_in_the_foreground(steady, splits):
    before = signal.getsignal(signal.SIGINT)
    job = start_job(steady, splits, False, [At(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert job.state == "stopped" and 3 <= job.step < 8 and (job.folder / "run.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before
    assert continue_job(job, False).state == "finished"


def test_an_interrupt_while_getting_ready_leaves_nothing(steady, splits, tmp_path):
    def interrupt():
        if active_job().state == "preparing":
            raise KeyboardInterrupt

    job = start_job(steady, splits, False, [interrupt])
    assert job.state == "failed" and "Interrupted" in job.error and not active_job()
    assert not list((tmp_path / "runs").glob("*"))


def stop_when(said):
    "A listener that asks for a stop once something was told."

    def look():
        job = active_job()
        if job is not None and any(said in line for line in job.lines):
            job.stop()

    return look


@pytest.mark.parametrize("said", ["No question of one set", "trainable", "tokens: about"])
def test_a_stop_while_getting_ready_ends_there(said, steady, splits, tmp_path, monkeypatch):
    from finetune_nb.trainer import FinetuneTrainer

    monkeypatch.setattr(FinetuneTrainer, "training_step", lambda *args: pytest.fail("a step was taken"))
    job = start_job(steady, splits, False, [stop_when(said)])
    assert job.state == "stopped" and job.folder is None and job.result is None and not job.history and "nothing was trained" in job.error
    assert not list((tmp_path / "runs").glob("*")), "nothing is left of it"
    with pytest.raises(JobError, match="never began"):
        continue_job(job)


def test_a_stop_during_the_look_at_the_base_model(steady, splits, tmp_path):
    job = start_job(steady, splits, False, [lambda: active_job() and active_job().history and active_job().stop()])
    assert job.state == "stopped" and job.folder is None and not list((tmp_path / "runs").glob("*"))


def test_a_stop_while_going_on_is_made_ready_loses_nothing(steady, splits, whole):
    job = stopped(steady, splits, 4)
    continue_job(job, False, [stop_when("Going on from")])
    assert job.state == "stopped" and "nothing was lost" in job.error and job.folder.is_dir()
    job.listeners.clear()
    continue_job(job, False)
    assert job.state == "finished" and same(adapter(job.folder), adapter(whole.folder))


def test_one_training_at_a_time(steady, splits, whole):
    refused = []

    def both():
        for act in (lambda: train(steady, splits), lambda: resume(active_job().folder)):
            try:
                act()
            except TrainingError as error:
                refused.append(str(error))

    job = start_job(steady, splits, False, [At(2, both)])
    assert len(refused) == 2 and all("at work in this process already" in text for text in refused)
    assert same(adapter(job.folder), adapter(whole.folder)), "it has not been disturbed"


HOLD = """
import sys, time
from transformers import TrainerCallback
from finetune_nb.config import load_config
from finetune_nb.training import train

class Wait(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            print("there", flush=True)
            time.sleep(600)

train(load_config(sys.argv[1]), callbacks=[Wait()], say=lambda line: None)
"""


@pytest.mark.skipif(os.name == "nt", reason="kills by SIGKILL")
def test_a_run_of_another_process_is_looked_at_only_until_it_is_killed(steady, tmp_path):
    save_config(replace(steady, run_name="theirs"), tmp_path / "config.yaml")
    other = forked.Forked(HOLD, str(tmp_path / "config.yaml"))
    folder = tmp_path / "runs/theirs"
    try:
        assert other.stdout.readline().strip() == "there"
        row = read_run(folder)
        assert row.state == "at work elsewhere" and not row.can_go_on
        for act in (lambda: resume(folder), lambda: continue_job(folder), lambda: trash_run(folder)):
            with pytest.raises(FinetuneError, match=f"at work in process {other.pid}"):
                act()
        (folder / STOP).write_text('{"mark": "of an earlier holder"}')
        seen = Watched(folder)
        assert seen.state == "elsewhere" and seen.step >= 4 and seen.steps == 8 and not seen.active
    finally:
        other.kill()
        other.wait()
    seen.refresh()
    assert seen.state == "broken off" and read_run(folder).state == "broken off" and read_run(folder).can_go_on
    assert continue_job(folder, False).state == "finished"


SLOW = HOLD.replace("if state.global_step == 5:", "if True:").replace("time.sleep(600)", "time.sleep(0.6)")


def test_a_run_of_another_process_is_asked_to_stop_and_goes_on_as_if_it_had_not(steady, whole, tmp_path, capsys):
    from finetune_nb.cli import main

    save_config(replace(steady, run_name="theirs"), tmp_path / "config.yaml")
    other, folder = forked.Forked(SLOW, str(tmp_path / "config.yaml")), tmp_path / "runs/theirs"
    try:
        assert other.stdout.readline().strip() == "there"
        assert main(["stop", str(folder)]) == 0 and "was asked to stop" in capsys.readouterr().out
        assert Watched(folder).state == "stopping elsewhere"
        assert other.wait() == 0
    except BaseException:
        other.kill()
        raise
    assert read_run(folder).state == "stopped" and read_run(folder).facts["steps"] < 8 and not (folder / STOP).exists()
    assert main(["stop", str(folder)]) == 2 and "not at work in another process" in capsys.readouterr().err
    assert continue_job(folder, False).state == "finished" and same(adapter(folder), adapter(whole.folder))


def test_answers_are_kept_and_what_came_after_a_checkpoint_is_left_out(steady, splits):
    job = stopped(steady, splits, 4)
    kept = read_samples(job.folder)
    assert kept == job.samples and kept
    with (job.folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 99, "question": "q", "expected": "", "answer": "later"}\n{"step": "x"}\n{"st')
    with pytest.warns(UserWarning, match="1 of .* lines are no answers"):
        assert [sample.step for sample in read_samples(job.folder)][-1] == 99
    (job.folder / "samples.jsonl").write_text("{broken}")
    with pytest.warns(UserWarning, match="can't be shown: .*samples.jsonl"):
        assert read_samples(job.folder) == []


@pytest.mark.parametrize("look", ["no", "epoch"])
def test_questions_of_ones_own(look, steady, splits, whole):
    job = start_job(replace(steady, eval_strategy=look), splits, False, ask=["One?", "<b>Two</b>?"])
    steps = [sample.step for sample in job.samples if sample.question == "One?"]
    assert steps == ([2, 4, 6, 8] if look == "no" else [0, 4, 8]) and {s.question for s in job.samples} == {"One?", "<b>Two</b>?"}
    assert read_samples(job.folder) == job.samples
    assert same(last_weights(job.result), last_weights(whole)), "to ask changes nothing"


def test_the_pace_of_steps_and_looks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace()
    assert pace.left(5, 1) != pace.left(5, 1), "unknown before the first step"
    pace.looked()
    now[0] = 100.0  # the look at the base model
    for _ in range(2):
        pace.begins()
        now[0] += 1.0
        pace.ends()
    assert pace.left(10, 0) == pytest.approx(10) and pace.left(10, 1) == pytest.approx(110)


def test_stop_is_for_what_is_at_work(steady, splits):
    job = jobs.Job(steady, splits)
    job.stop()
    assert job.state == "waiting" and not job.active
    done = start_job(replace(steady, max_steps=1), splits, False)
    done.stop()
    assert done.state == "finished"


LOSSES = [
    [], [1.0], [3, 2, 1], [1, 2, 3], [2, 2, 2], [3, 1, 2, 1, 0.5, 4], [1, float("nan"), 0.5], [float("nan"), 1, 0.5], [2.0, 1.5, 1.6, 1.7], [5, 4, 6, 3, 3, 3],
]  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from transformers import Trainer, TrainingArguments

    folder = str(tmp_path_factory.mktemp("trainer"))
    args = TrainingArguments(output_dir=folder, metric_for_best_model="eval_loss", greater_is_better=False, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", use_cpu=True)
    return Trainer(torch.nn.Linear(1, 1), args, eval_dataset=[{}])


@pytest.mark.parametrize("base", [0.1, 100.0])
@pytest.mark.parametrize("losses", LOSSES, ids=str)
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_is_counted_as_transformers_does(losses, patience, base, trainer):
    "The look before the first step is at the base model, which the run does not have to beat."
    callback, control, history = EarlyStoppingCallback(patience), TrainerControl(), [{"step": 0, "eval_loss": base}]
    state = trainer.state = TrainerState()
    callback.on_evaluate(trainer.args, state, control, {"eval_loss": base})
    for step, loss in enumerate(losses, 1):
        state.global_step = step
        history += [{"step": step, "loss": 1.0}, {"step": step, "eval_loss": loss}]
        callback.on_evaluate(trainer.args, state, control, {"eval_loss": loss})
        trainer._determine_best_metric({"eval_loss": loss}, None)
        assert patience_left(history, patience) == max(patience - callback.early_stopping_patience_counter, 0)
        assert (patience_left(history, patience) == 0) == control.should_training_stop
        if control.should_training_stop:
            break


def test_no_look_is_left_when_a_run_ends_early(steady, splits):
    job = start_job(replace(steady, num_train_epochs=30, learning_rate=0.3, early_stopping_patience=2), splits, False, questions=0)
    assert job.result.facts["ended_by"] == "early stopping" and patience_left(job.history, 2) == 0
    assert best_look(job.history)["eval_loss"] == job.result.facts["best_eval_loss"] and best_look(job.history)["step"] == job.result.facts["best_step"]


def test_best_look():
    rows = [{"step": 0, "eval_loss": 0.1}, {"step": 1, "loss": 0.0}, {"step": 2, "eval_loss": float("nan")}, {"step": 3, "eval_loss": 2.0}, {"step": 4, "eval_loss": 1.0}, {"step": 5, "eval_loss": 1.0}]
    assert best_look(rows) == rows[4] and best_look(rows[:3]) is None and best_look([]) is None


def test_smoothed():
    assert smoothed([]) == [] and smoothed([3, 1, 2], 0) == [3, 1, 2]
    assert smoothed([5.0] * 4, 0.95) == pytest.approx([5.0] * 4)
    assert smoothed([1, 2], 0.5) == pytest.approx([1, (0.5 * 1 + 2) / 1.5])
    rough = smoothed([1.0, float("nan"), 1.0], 0.5)
    assert rough[0] == 1 and rough[1] != rough[1]


def test_time_left(steady, splits):
    left = []
    job = start_job(steady, splits, False, [lambda: left.append((active_job() or job_of()).state and seconds_left(job_of()))])
    assert left[0] != left[0] and left[-1] == 0 and all(one >= 0 for one in left if one == one) and seconds_left(job) == 0


def job_of():
    return JOBS[-1]


class NoMemory(MemoryError):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TrainingError("Do this."), "^Do this.$"),
        (KeyboardInterrupt(), "Interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"), "device is full. Lower max_tokens_at_once.*Tried to allocate\\)$"),
        (MemoryError(), "machine is full"),
        (NoMemory("std::bad_alloc"), "NoMemory: std::bad_alloc"),
        (OSError(28, "No space left on device"), "disk is full"),
        (PermissionError(13, "Permission denied", "/x"), "Choose an output_dir that is yours"),
        (OSError("We couldn't connect to the hub"), "hub can't be reached"),
        (ModuleNotFoundError("No module named 'x'"), "A package is missing"),
        (FileNotFoundError(2, "No such file or directory", "a.jsonl"), "a.jsonl"),
        (ValueError(), "^ValueError: no further words"),
        (ValueError("\n\n"), "^ValueError: no further words"),
        (RuntimeError("x" * 9999), "^RuntimeError: x{500} This is none"),
        (AssertionError(), "^AssertionError: no further words"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, BaseException) else "",
)
def test_in_words(error, said):
    import re

    assert re.search(said, in_words(error))


def test_a_task_keeps_what_it_says_and_what_went_wrong():
    heard = []
    task = Task(lambda say: (say("one"), say("two"))[0] or 5)
    task.listeners.append(lambda: heard.append((task.state, len(task.lines))))
    assert task.start().wait() == 5 and task.lines == ["one", "two"] and heard == [("running", 0), ("running", 1), ("running", 2), ("finished", 2)]
    failed = Task(lambda say: 1 / 0).start(False)
    assert failed.state == "failed" and not failed.active and "ZeroDivisionError" in failed.trace
    with pytest.raises(FinetuneError, match="ZeroDivisionError: division by zero"):
        failed.wait()
    assert Task(lambda say: (_ for _ in ()).throw(SystemExit(1))).start().start(False).state == "failed"


def test_a_run_waits_for_no_heavy_task_and_takes_the_memory_of_shelves(steady, splits):
    "Also from a cell, where no panel looks on."
    began, goes_on = threading.Event(), threading.Event()
    task = Task(lambda say: began.set() or goes_on.wait(60), "A question is being answered")
    start_alone(task)
    assert began.wait(60)
    with pytest.raises(JobError, match="A question is being answered. Stop that first"):
        start_job(steady, splits, False)
    assert JOBS == []
    goes_on.set()
    task.wait(60)
    shelf = type("Shelf", (), {"released": 0, "release": lambda self: setattr(self, "released", self.released + 1)})()
    SHELVES.add(shelf)
    assert start_job(replace(steady, max_steps=1, num_train_epochs=1, eval_strategy="no"), splits, False, questions=0).state == "finished" and shelf.released == 1
