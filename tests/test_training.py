"""The run: right loss, right checkpoints, nothing half done, nothing lost."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from finetune_nb.baselines import should_you_finetune
from finetune_nb.chat_template import TemplateError, tokenize_chats
from finetune_nb.config import ConfigError, FinetuneConfig, FinetuneError
from finetune_nb.data import Chat, Splits, fingerprint, icd10_chats, save_chats
from finetune_nb.diagnosis import diagnose
from finetune_nb.evaluation import evaluate_run
from finetune_nb.fitting import measure_fitting
from finetune_nb.forgetting import measure_forgetting
from finetune_nb.lora import AdapterError, add_lora, load_adapter
from finetune_nb.losses import mean_loss, token_losses
from finetune_nb.models import load_model
from finetune_nb.packing import PackingCollator
from finetune_nb.report import write_report
from finetune_nb.run_folder import last_checkpoint
from finetune_nb.stop import Stop, TrainingError
from finetune_nb.training import load_base, load_run, load_splits, resume, total_steps, train

pytestmark = pytest.mark.usefixtures("one_way")


@pytest.fixture(autouse=True)
def interrupts_stay_as_they_were():
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def splits(chats):
    return Splits(chats[:24], chats[24:32], chats[32:])


def batches_of(chats, tokenizer, size=4):
    rows = list(tokenize_chats(chats, tokenizer))
    collator = PackingCollator("padded", pad_token_id=tokenizer.pad_token_id)
    return [batch for i in range(0, len(rows), size) for batch in collator.batches(rows[i : i + size])]


def test_a_run_is_whole_and_comes_back_the_same(quick, splits):
    run = train(quick, splits)
    names = {p.name for p in run.folder.iterdir()}
    assert {"config.yaml", "run.json", "history.jsonl", "adapter", "loss.png", "test.jsonl"} <= names
    again = load_run(run.folder)
    assert again.config == run.config and again.history == run.history and again.facts == run.facts
    assert fingerprint(again.test) == fingerprint(splits.test) == run.facts["data"]["test"]["sha256"]
    batches = batches_of(splits.test, run.tokenizer)
    assert abs(mean_loss(run.model, batches)[0] - mean_loss(again.model, batches)[0]) < 1e-4
    assert {"torch", "transformers", "peft", "finetune_nb"} <= run.facts["versions"].keys()
    assert run.facts["steps"] == total_steps(quick, 24) == 12 and run.facts["ended_by"] == "the plan"
    assert "trained on" in str(again) and "<table>" in again._repr_html_()


@pytest.mark.parametrize("cache", [True, False])
def test_the_model_of_a_run_keeps_its_cache_as_it_was(cache, quick, splits):
    "The Trainer turns it off in the model's own configuration, and generation would be slow for whoever gets run.model."
    model, tokenizer = load_base(quick, print)
    model.config.use_cache = cache
    run = train(quick, splits, base=(model, tokenizer))
    assert run.model.config.use_cache is cache and run.model.get_base_model().config.use_cache is cache


def test_the_embedded_model_keeps_its_loss_in_bf16(tmp_path):
    "The promise of the issue on the real model, in the precision that the hardware has."
    data = icd10_chats()
    config = FinetuneConfig(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, eval_strategy="no", learning_rate=1e-3, output_dir=str(tmp_path), use_cpu=True, preflight=False)
    run = train(config, Splits(data.train[:4], [], data.test[:2]))
    batches = batches_of(data.test[:2], run.tokenizer)
    assert abs(mean_loss(run.model, batches)[0] - mean_loss(load_run(run.folder).model, batches)[0]) < 1e-4
    assert run.folder.as_posix() not in (run.folder / "adapter/adapter_config.json").read_text()
    assert json.loads((run.folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == config.model_name_or_path


def test_nothing_is_pickled_in_the_adapter_and_no_arguments_in_checkpoints(quick, splits):
    run = train(quick, splits)
    assert {p.suffix for p in (run.folder / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    assert not list(run.folder.rglob("training_args.bin"))


def test_same_seed_same_adapter(quick, splits):
    one, two, other = (train(replace(quick, seed=seed), splits) for seed in (1, 1, 2))
    weights = [load_file(run.folder / "adapter/adapter_model.safetensors") for run in (one, two, other)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_the_best_adapter_is_kept_not_the_last(quick, splits):
    run = train(replace(quick, num_train_epochs=4, learning_rate=0.3, early_stopping_patience=0, save_total_limit=9), splits)
    looks = {row["step"]: row["eval_loss"] for row in run.history if "eval_loss" in row and row["step"]}
    best = min(looks, key=looks.get)
    assert run.facts["best_step"] == best
    kept = load_file(run.folder / "adapter/adapter_model.safetensors")
    assert all(torch.equal(kept[k], w) for k, w in load_file(run.folder / f"checkpoint-{best}/adapter_model.safetensors").items())
    measured, _ = mean_loss(run.model, batches_of(splits.validation, run.tokenizer))
    assert measured == pytest.approx(looks[best], abs=1e-5), "the validation loss is the mean over tokens"


def test_early_stopping(quick, splits):
    run = train(replace(quick, num_train_epochs=50, learning_rate=1.0, early_stopping_patience=1), splits)
    assert run.facts["ended_by"] == "early stopping" and run.facts["steps"] < total_steps(replace(quick, num_train_epochs=50), 24)


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (1, 8), (2, 4), (3, 2)])
def test_accumulation_changes_nothing(size, accumulate, quick, splits):
    "One step over chats with very unequal answers: the same adapter, however the step is cut up; with a short last batch too."
    config = replace(quick, max_steps=1, eval_strategy="no", lora_dropout=0.0, warmup_ratio=0, group_by_length=False, optim="sgd", learning_rate=1)
    chats = [c for c in splits.train if c][: 8 if size != 3 else 5]
    runs = [train(replace(config, per_device_train_batch_size=s, gradient_accumulation_steps=a), Splits(chats, [], [])) for s, a in ((len(chats), 1), (size, accumulate))]
    one, two = (load_file(run.folder / "adapter/adapter_model.safetensors") for run in runs)
    change = max((w.abs().max() for k, w in one.items() if "lora_B" in k))
    assert change > 0 and all((one[k] - two[k]).abs().max() < 1e-5 * max(change, 1) for k in one)


def test_loss_at_supervised_places_is_the_whole_loss(tiny_model, splits):
    model, tokenizer = load_model(tiny_model, torch.float32, use_cpu=True)
    rows = list(tokenize_chats(splits.train[:6], tokenizer))
    for row, batch in zip(rows, batches_of(splits.train[:6], tokenizer, 1), strict=True):
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        losses = token_losses(model, batch)
        assert losses.mean().item() == pytest.approx(model(ids, labels=labels).loss.item(), abs=1e-6)
        assert len(losses) == (labels[:, 1:] != -100).sum()


def test_gradients_reach_every_adapter(tiny_model, quick, splits):
    for checkpointing in (False, True):
        run = train(replace(quick, max_steps=1, eval_strategy="no", warmup_ratio=0, gradient_checkpointing=checkpointing), splits)
        weights = load_file(run.folder / "adapter/adapter_model.safetensors")
        assert all(w.abs().max() > 0 for k, w in weights.items() if "lora_B" in k)


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)


def test_an_interrupt_stops_in_good_order(quick, splits):
    run = train(quick, splits, callbacks=[Interrupt()])
    assert run.facts["ended_by"] == "the user" and 3 <= run.facts["steps"] <= 4
    assert run.facts["best_eval_loss"] is not None and load_run(run.folder).model is not None


def test_training_works_outside_the_main_thread(quick, splits):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(quick, splits)))
    thread.start()
    thread.join()
    assert found[0].facts["steps"] == 12


class Break(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise OSError("no space left on device")


def test_a_run_that_fails_at_once_leaves_nothing(quick, splits, tmp_path):
    with pytest.raises(OSError, match="no space"):
        train(replace(quick, eval_strategy="no"), splits, callbacks=[Break(0)])
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [".failed"]
    with pytest.raises(OSError, match="no space"):
        train(replace(quick, eval_strategy="no"), splits, callbacks=[Break(5)])
    assert (tmp_path / "runs/run-001/history.jsonl").exists(), "what was seen is kept"
    with pytest.raises(TrainingError, match="run.json is missing"):
        load_run(tmp_path / "runs/run-001")


class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(float("nan"))


def test_a_loss_that_is_no_number_ends_the_run(quick, splits):
    with pytest.raises(TrainingError, match="became nan at step 3. Lower learning_rate"):
        train(replace(quick, eval_strategy="no"), splits, callbacks=[Poison()])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_name_or_path": "no-such-org/none"}, "neither in a package"),
        ({"train_file": "none.jsonl"}, "does not exist"),
        ({"max_length": 12}, "longer than max_length=12"),
        ({"target_modules": ["q_proj", "qkv"]}, "no linear layer called qkv; it has down_proj"),
        ({"run_name": "../out"}, "A name, not a path"),
        ({"run_name": ".trash"}, "found nowhere again"),
        ({"run_name": "taken"}, "exists and is not overwritten"),
    ],
)
def test_what_fails_early_leaves_no_run(changes, said, quick, splits, tmp_path):
    if changes.get("run_name") == "taken":
        (tmp_path / "runs/taken").mkdir(parents=True)
    given = None if "train_file" in changes else splits
    with pytest.raises(Exception, match=said):
        train(replace(quick, **changes), given)
    assert {p.name for p in (tmp_path / "runs").glob("*")} <= {"taken"}


def test_runs_are_numbered(quick, splits):
    short = replace(quick, max_steps=1, eval_strategy="no")
    assert [train(short, splits).folder.name for _ in range(2)] == ["run-001", "run-002"]


def test_splits_from_files(quick, chats, tmp_path):
    one, two = save_chats(chats[:30], tmp_path / "a.jsonl"), save_chats(chats[25:], tmp_path / "b.jsonl")
    splits = load_splits(replace(quick, train_file=str(one)))
    assert tuple(map(len, splits)) == (24, 3, 3)
    splits = load_splits(replace(quick, train_file=str(one), test_file=str(two), validation_size=0, eval_strategy="no"))
    assert tuple(map(len, splits)) == (30, 0, 15)


def test_splits_by_columns(quick, chats, tmp_path):
    rows = [Chat(c.messages, extra={"patient": i // 5, "topic": "ab"[i % 2]}) for i, c in enumerate(chats)]
    file = save_chats(rows, tmp_path / "a.jsonl")
    splits = load_splits(replace(quick, train_file=str(file), group_column="patient"))
    patients = [{c.extra["patient"] for c in part} for part in splits]
    assert all(patients) and not (patients[0] & patients[1] or patients[0] & patients[2] or patients[1] & patients[2])
    splits = load_splits(replace(quick, train_file=str(file), stratify_column="topic"))
    assert [[c.extra["topic"] for c in part].count("a") for part in splits] == [16, 2, 2]
    with pytest.raises(ConfigError, match="a.jsonl, line 1: this row has no column 'patiant'; it has 'patient', 'topic'"):
        load_splits(replace(quick, train_file=str(file), group_column="patiant"))


def test_the_test_set_is_never_trained_on(quick, splits, monkeypatch):
    "Its chats would not even survive the tokenizer, and no batch has any of them."
    poisoned = [Chat([c.messages[0], c.messages[1] | {"content": "<|im_end|>"}], f"test {i}") for i, c in enumerate(splits.test)]
    seen, collate = set(), PackingCollator.batches

    def look(self, rows):
        seen.update(row["where"] for row in rows if "where" in row)
        return collate(self, rows)

    monkeypatch.setattr(PackingCollator, "batches", look)
    run = train(replace(quick, num_train_epochs=1), splits._replace(test=poisoned))
    assert seen == {c.where for c in [*splits.train, *splits.validation]}
    assert len(run.test) == len(poisoned)


def test_leaks_are_shown_and_kept(quick, splits, capsys):
    short = replace(quick, max_steps=1, eval_strategy="no")
    assert train(short, splits).facts["leaks"] == []
    assert "No question of one set stands in another." in capsys.readouterr().out
    leaky = splits._replace(test=[*splits.test, splits.train[0], Chat([m | {"content": m["content"].upper()} for m in splits.train[1].messages], "t")])
    with pytest.warns(UserWarning, match=r"2 of 10 test chats ask what a train chat asks \(1 exact, 1 normalised\)"):
        run = train(short, leaky)
    assert len(run.facts["leaks"]) == 1 and "test memory" in str(run)


def test_a_run_says_what_is_odd_about_the_template(quick, splits, capsys):
    train(replace(quick, max_steps=1, eval_strategy="no"), splits)
    assert "Chat template, note    system message: without one in the chat, the template writes its own" in capsys.readouterr().out
    told = [[Chat([{"role": "system", "content": "Add."}, *c.messages], c.where) for c in part] for part in splits]
    train(replace(quick, max_steps=1, eval_strategy="no"), Splits(*told))
    assert "Chat template" not in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["train_on", "control_tokens"])
def test_choices_of_the_mask_reach_the_run(choice, quick, splits):
    short = replace(quick, max_steps=1, eval_strategy="no")
    if choice == "train_on":
        longer = [Chat([*c.messages, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}], c.where) for c in splits.train]
        tokens = [train(replace(short, train_on=on), splits._replace(train=longer)).facts["data"]["train"]["supervised_tokens"] for on in ("all", "last")]
        assert tokens[1] == 3 * len(longer) < tokens[0]
    else:
        forged = [Chat([m | {"content": m["content"] + "<|im_end|>"} for m in c.messages], c.where) for c in splits.test[:2]]
        with pytest.raises(TemplateError, match="control token"):
            train(short, splits._replace(train=forged))
        with pytest.warns(UserWarning, match="broken by a space"):
            run = train(replace(short, control_tokens="neutralise"), splits._replace(train=forged, test=forged))
        assert evaluate_run(run).tuned.rows[0].expected.endswith("< |im_end|>")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("config.yaml",), r"Expected a FinetuneConfig, got a str. Give load_config\('config.yaml'\)"),
        (({"r": 8},), r"got a dict. Give FinetuneConfig\(\*\*settings\)"),
        ((FinetuneConfig(), [[], [], []]), r"Expected chats as Splits\(train, validation, test\), got a list"),
        ((FinetuneConfig(), "chats.jsonl"), "got a str. Give Splits with three lists"),
    ],
)
def test_what_is_no_configuration_is_told(given, said):
    for ask in (train, should_you_finetune):
        with pytest.raises(ConfigError, match=said):
            ask(*given)


def test_a_run_is_given_as_such_or_by_its_folder(tmp_path):
    for ask in (evaluate_run, measure_forgetting, measure_fitting, write_report):
        with pytest.raises(TrainingError, match="nowhere does not exist"):
            ask(tmp_path / "nowhere")
    (tmp_path / "run-001").mkdir()
    (tmp_path / "run-001" / "run.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"run-9 does not exist\. .* holds the runs run-001; name one of them"):
        evaluate_run(tmp_path / "run-9")
    with pytest.raises(TrainingError, match="run.json is missing. It holds the runs run-001; name one of them"):
        evaluate_run(tmp_path)
    with pytest.raises(FinetuneError, match="Expected a run, its folder, or the error with which it was refused; got a FinetuneConfig"):
        diagnose(FinetuneConfig())
    for ask in (evaluate_run, measure_fitting, write_report):
        with pytest.raises(TrainingError, match=r"Expected a finished run, as train\(config\) and load_run\(folder\) return it, or its folder; got a FinetuneConfig"):
            ask(FinetuneConfig())


def test_adapter_keys_that_do_not_match_raise(quick, splits, tiny_model):
    run = train(replace(quick, max_steps=1, eval_strategy="no"), splits)
    file = run.folder / "adapter/adapter_model.safetensors"
    (file.parent / "MANIFEST.json").unlink()  # which knows that they are other ones
    weights = {name: weight.clone() for name, weight in load_file(file).items()}  # which may be the file itself
    first = next(iter(weights))
    missing = {name: weight for name, weight in weights.items() if name != first}
    surplus = weights | {first.replace("layers.0", "layers.9"): weights[first].clone()}
    renamed = {f"x.{name}": weight for name, weight in weights.items()}
    for damaged in (missing, surplus, weights | {first: torch.zeros(3, 3)}, renamed, {}):
        save_file(damaged, file)
        with pytest.raises(AdapterError, match="does not fit this model"):
            load_run(run.folder).model  # noqa: B018


def test_an_adapter_folder_without_weights(tmp_path, tiny_model):
    model, _ = load_model(tiny_model, torch.float32, use_cpu=True)
    with pytest.raises(AdapterError, match="adapter_config.json is missing"):
        load_adapter(model, tmp_path)


def test_adapters_are_fp32_over_a_bf16_base(tiny_model):
    model, _ = load_model(tiny_model, torch.bfloat16, use_cpu=True)
    tuned = add_lora(model, FinetuneConfig(target_modules="all-linear"))
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    assert len([n for n, p in tuned.named_parameters() if p.requires_grad]) == 2 * 7 * 2


class StopAt(TrainerCallback):
    "Asks for a stop at a step."

    def __init__(self, stop, step):
        self.stop, self.step = stop, step

    def on_step_end(self, args, state, control, **kwargs):
        self.stop.wanted |= state.global_step == self.step - 1  # it is heard after the next one


def adapter_of(run):
    return load_file(run.folder / "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"eval_strategy": "steps", "eval_steps": 3, "packing": "padded"}, {"init_lora_weights": "pissa"}, {"loraplus_lr_ratio": 4.0}])
def test_a_stopped_run_goes_on_to_the_same_weights(quick, splits, changes):
    config = replace(quick, lora_dropout=0.1, early_stopping_patience=0, **changes)
    whole = train(replace(config, run_name="whole"), splits)
    stop, said = Stop(), []
    part = train(replace(config, run_name="part"), splits, [StopAt(stop, 7)], stop, said.append)
    assert part.facts["ended_by"] == "the user" and part.facts["steps"] == 7 and len(said) > 3
    again = resume(part.folder)
    assert again.facts["ended_by"] == "the plan" and again.facts["steps"] == whole.facts["steps"]
    assert again.facts["seconds"] > part.facts["seconds"] and again.facts["started"] == part.facts["started"]
    one, other = adapter_of(whole), adapter_of(again)
    last = f"checkpoint-{whole.facts['steps']}"
    weights = [load_file(run.folder / last / "adapter_model.safetensors") for run in (whole, again)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    losses = [[row["loss"] for row in run.history if "loss" in row] for run in (whole, again)]
    assert losses[0] == losses[1]
    assert whole.facts["best_step"] == again.facts["best_step"] and whole.facts["best_eval_loss"] == again.facts["best_eval_loss"]
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert load_run(again.folder).history == again.history


@pytest.mark.parametrize(("step", "changes"), [(7, {}), (8, {}), (7, {"eval_strategy": "steps", "eval_steps": 4}), (8, {"eval_strategy": "steps", "eval_steps": 4}), (7, {"eval_strategy": "no"})])
def test_a_stop_leaves_no_trace_in_what_is_gone_on_from(step, changes, quick, splits):
    "The checkpoint knows what a run without a stop would know there: its best look, and for how long none was better."
    config = replace(quick, early_stopping_patience=1, per_device_train_batch_size=len(splits.train) // 4, num_train_epochs=4, **changes)
    stop = Stop()
    run = train(config, splits, [StopAt(stop, step)], stop)
    state = json.loads((run.folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    looks = [row["step"] for row in run.history if "eval_loss" in row]
    if config.eval_strategy == "no":
        assert looks == [] and run.facts["best_step"] == step
        return
    counted = [row["eval_loss"] for row in run.history if "eval_loss" in row and 0 < row["step"] and row["step"] % 4 == 0]
    assert looks == sorted({0, 4, 8 if step == 8 else 7}), "one look at each"
    assert state["best_global_step"] == 4 * (1 + counted.index(min(counted))) and state["best_metric"] == min(counted)
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"] == len(counted) - 1 - counted.index(min(counted))
    kept = load_file(run.folder / f"checkpoint-{run.facts['best_step']}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in adapter_of(run).items())
    assert run.facts["best_eval_loss"] == min(row["eval_loss"] for row in run.history if row.get("step") and "eval_loss" in row)


def test_a_run_whose_process_ended_goes_on(quick, splits):
    "There is no run.json then; the last checkpoint is all that counts."

    class Killed(BaseException):
        pass

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise Killed

    whole = train(replace(quick, run_name="whole"), splits)
    with pytest.raises(Killed):
        train(replace(quick, run_name="part"), splits, [Kill()])
    folder = whole.folder.parent / "part"
    assert not (folder / "run.json").exists() and last_checkpoint(folder).name == "checkpoint-6"
    again = resume(folder)
    assert [row.get("loss") for row in again.history] == [row.get("loss") for row in whole.history]


def test_what_can_not_go_on_says_why(quick, splits, tmp_path):
    with pytest.raises(TrainingError, match="config.yaml is missing"):
        resume(tmp_path)
    run = train(quick, splits)
    with pytest.raises(TrainingError, match="ended by the plan after 12 steps"):
        resume(run.folder)
    stop = Stop()
    part = train(quick, splits, [StopAt(stop, 2)], stop)
    with pytest.raises(TrainingError, match="The train chats are not those"):
        resume(part.folder, splits._replace(train=splits.train[:20]))


def test_each_point_of_the_curve_knows_speed_and_memory(quick, splits):
    points = [row for row in train(quick, splits).history if "loss" in row]
    assert all(point["memory_gib"] > 0.1 and point["tokens_per_second"] > 0 and point["learning_rate"] >= 0 for point in points[:-1])
