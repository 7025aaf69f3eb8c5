"""The range test and the sweep: the runs of `train`, one base model, nothing trained twice, an honest verdict."""

import gc
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from finetune_nb import sweep as chapter
from finetune_nb import training
from finetune_nb.chat_template import tokenize_chats
from finetune_nb.config import ConfigError, FinetuneConfig
from finetune_nb.data import Chat, Splits
from finetune_nb.locks import LockError
from finetune_nb.lora import add_lora, remove_lora
from finetune_nb.memory import chat_losses
from finetune_nb.models import load_model
from finetune_nb.private import is_private
from finetune_nb.range_test import RangeTest, lr_range_test, make_bare
from finetune_nb.runs import list_runs
from finetune_nb.stop import Stop, TrainingError
from finetune_nb.sweep import combinations, load_sweep, sweep
from finetune_nb.trainer import FinetuneTrainer
from finetune_nb.training import load_base, load_run, train

pytestmark = pytest.mark.usefixtures("one_way")
GRID = {"r": [2, 8], "learning_rate": [1e-4, 1e-2]}


def quiet(line):
    pass


@pytest.fixture
def quick(quick):
    return replace(quick, preflight=False)


@pytest.fixture
def splits(chats):
    return Splits(chats[:24], chats[24:40], [])


@pytest.fixture(scope="module")
def done(tiny_model, tmp_path_factory):
    "A finished sweep, to be read."
    config = FinetuneConfig(
        model_name_or_path=tiny_model, bf16=False, use_cpu=True, num_train_epochs=2, gradient_accumulation_steps=1, logging_steps=1, output_dir=str(tmp_path_factory.mktemp("runs"))
    )
    some = [Chat([{"role": "user", "content": f"What is {i} plus one?"}, {"role": "assistant", "content": f"It is {i + 1}." + " Really." * (i % 5)}], f"chat {i}") for i in range(40)]
    splits = Splits(some[:24], some[24:], [])
    return config, splits, sweep(config, GRID, splits, say=quiet)


def weights(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def copied(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"use_dora": True}, False),
        ({"init_lora_weights": "eva", "target_modules": "all-linear"}, False),
        *(({"modules_to_save": [name]}, tied) for name in ("lm_head", "embed_tokens") for tied in (False, True)),
    ],
    ids=str,
)
def test_a_base_model_is_bare_again_and_trains_the_same(changes, tied, quick, splits, tmp_path):
    "The same weights, the same modules, and a second run on it is the run on a fresh base model."
    if tied:
        model, tokenizer = load_model(quick.model_name_or_path, torch.float32, use_cpu=True)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.save_pretrained(tmp_path / "tied")
        tokenizer.save_pretrained(tmp_path / "tied")
        quick = replace(quick, model_name_or_path=str(tmp_path / "tied"))
    config = replace(quick, num_train_epochs=1, gradient_checkpointing=True, **changes)
    base = load_base(config, quiet)
    before, modules = copied(base[0]), {name: id(module) for name, module in base[0].named_modules()}
    settings = base[0].config.to_dict()
    first = train(config, splits, base=base, say=quiet)
    make_bare(base)
    assert same(before, base[0].state_dict()) and modules == {name: id(module) for name, module in base[0].named_modules()}
    assert base[0].config.to_dict() == settings and not any("forward" in module.__dict__ for module in base[0].modules())
    second, alone = train(config, splits, base=base, say=quiet), train(config, splits, say=quiet)
    assert same(weights(first.folder), weights(alone.folder)) and same(weights(second.folder), weights(alone.folder))


def test_a_half_made_adapter_comes_off(quick, tiny_model):
    model = load_model(tiny_model, torch.float32, use_cpu=True)[0]
    before = copied(model)
    tuned = add_lora(model, quick)
    tuned.base_model.model.model.layers[0].self_attn.q_proj = tuned.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert remove_lora(model) is model and same(before, model.state_dict())
    assert remove_lora(model) is model, "a bare one stays as it is"


def test_what_can_not_be_shared_is_refused(quick, splits):
    base = load_base(quick, quiet)
    for changes, said in (
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa" changes the base weights'),
        ({"bias": "all"}, 'bias="all" changes the base weights'),
        ({"bf16": True}, "not the one that the configuration names"),
        ({"model_name_or_path": "SmolLM2-135M-Instruct"}, "not the one that the configuration names"),
    ):
        with pytest.raises(TrainingError, match=said):
            train(replace(quick, **changes), splits, base=base, say=quiet)
    add_lora(base[0], quick)
    with pytest.raises(TrainingError, match="still has an adapter"):
        train(quick, splits, base=base, say=quiet)


def test_every_run_of_a_sweep_is_the_run_alone(quick, splits, tmp_path):
    result = sweep(quick, GRID, splits, say=quiet)
    assert [one.state for one in result.combinations] == ["finished"] * 4
    for one in result.combinations:
        alone = train(replace(quick, output_dir=str(tmp_path / "alone"), **one.settings), splits, say=quiet)
        assert same(weights(one.folder), weights(alone.folder)), one
        assert [row["eval_loss"] for row in load_run(one.folder).history if "eval_loss" in row] == [row["eval_loss"] for row in alone.history if "eval_loss" in row]
    listed = list_runs(result.folder)
    assert {row.name for row in listed.rows} == {one.name for one in result.combinations} and listed.columns == ["r", "learning_rate"]
    assert list_runs(tmp_path / "runs").rows == [], "the folder of a sweep is no run"


@pytest.mark.parametrize("strategy", ["epoch", pytest.param("steps", marks=pytest.mark.slow)])
def test_halving_stops_the_worse_and_changes_nothing_for_the_others(strategy, quick, splits, tmp_path):
    config = replace(quick, num_train_epochs=4, eval_strategy=strategy, eval_steps=4, early_stopping_patience=1)
    result = sweep(config, GRID, splits, rungs=[3, 10], say=quiet)
    steps = {one.name: one.facts["steps"] for one in result.combinations}
    first = 6 if strategy == "epoch" else 4  # the first look from step 3 on
    assert sorted(steps.values())[:2] == [first] * 2 and len(result.finished) == 1
    at = {one.name: next(row["eval_loss"] for row in load_run(one.folder).history if row["step"] == first and "eval_loss" in row) for one in result.combinations}
    assert max(sorted(at.values())[:2]) >= at[result.best.name] and steps[result.best.name] > first
    alone = train(replace(config, output_dir=str(tmp_path / "alone"), **result.best.settings), splits, say=quiet)
    assert same(weights(result.best.folder), weights(alone.folder))
    kept = ("steps", "ended_by", "best_step", "best_eval_loss")
    assert {k: alone.facts[k] for k in kept} == {k: result.best.facts[k] for k in kept}
    assert "Not compared: 3 stopped." in result.verdict and f"stopped after {first} steps" in str(result)
    assert str(sweep(config, GRID, splits, rungs=[3, 10], say=quiet)) == str(result)


def test_there_is_one_base_model_and_it_is_left_as_it_was(quick, splits, monkeypatch):
    loads, seen = [], []

    def counted(*args):
        loads.append(1)
        return load_model(*args)

    def count(line):
        gc.collect()
        seen.append(sum(isinstance(x, LlamaForCausalLM) and x.device.type != "meta" for x in gc.get_objects()))

    monkeypatch.setattr(training, "load_model", counted)
    count("")
    sweep(quick, {"r": [2, 4, 8]}, splits, say=count)
    assert len(loads) == 1 and len(seen) > 6 and max(seen) == seen[0] + 1
    base = load_base(quick, quiet)
    before = copied(base[0])
    sweep(quick, {"r": [1]}, splits, name="other", base=base, say=quiet)
    assert len(loads) == 2 and same(before, base[0].state_dict())


def test_the_chats_are_tokenised_once(quick, splits, monkeypatch, tmp_path):
    from finetune_nb import chat_template

    work, calls = chat_template._in_processes, []
    monkeypatch.setattr(chat_template, "_in_processes", lambda chats, *rest: calls.append(len(chats)) or work(chats, *rest))
    monkeypatch.setattr(training, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(chapter, "cache_folder", lambda: tmp_path)
    sweep(quick, {"r": [2, 8]}, splits, say=quiet)
    assert sorted(calls) == [16, 24]


def test_what_is_finished_is_read(done, monkeypatch):
    assert is_private(done[2].folder)
    quick, splits, result = done
    written = {one.name: (one.folder / "run.json").stat().st_mtime_ns for one in result.combinations}
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_model", lambda *args: pytest.fail("the base model is loaded"))
        again, loaded = sweep(quick, GRID, splits, say=quiet), load_sweep(result.folder)
    assert written == {one.name: (one.folder / "run.json").stat().st_mtime_ns for one in again.combinations}
    assert str(again) == str(loaded) == str(result) and loaded.best.loss == load_run(result.best.folder).facts["best_eval_loss"]
    larger = sweep(quick, {"r": [2, 8], "learning_rate": [1e-4, 1e-2, 1e-3]}, splits, say=quiet)
    assert len(larger.finished) == 6 and written.items() <= {one.name: (one.folder / "run.json").stat().st_mtime_ns for one in larger.combinations}.items()


class Broken(Exception):
    pass


def broken(model):
    raise Broken


class InTheMiddle(TrainerCallback):
    "Does something at a step of the run with rank 2 and the higher learning rate."

    def __init__(self, at, do):
        self.at, self.do = at, do

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at and model.peft_config["default"].r == 2 and args.learning_rate == 1e-2:
            self.do(model)


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_what_was_broken_off_goes_on_to_the_same_weights(at, quick, splits, tmp_path):
    "Before its first checkpoint a run begins anew, after it it goes on from there."

    with pytest.raises(Broken):
        sweep(quick, GRID, splits, callbacks=[InTheMiddle(at, broken)], say=quiet)
    states = [one.state for one in combinations(quick, GRID)]
    assert states == ["finished", "broken off", "not begun", "not begun"]
    said = []
    result = sweep(quick, GRID, splits, say=said.append)
    assert any("going on" in line for line in said) and any("Going on from checkpoint-6" in line for line in said) == (at == 8)
    one = result.combinations[1]
    alone = train(replace(quick, output_dir=str(tmp_path / "alone"), **one.settings), splits, say=quiet)
    assert same(weights(one.folder), weights(alone.folder)) and len(result.finished) == 4


def test_a_stop_ends_the_sweep_in_good_order(quick, splits):
    stop = Stop()
    result = sweep(quick, GRID, splits, callbacks=[InTheMiddle(3, lambda model: setattr(stop, "wanted", True))], stop=stop, say=quiet)
    assert [one.state for one in result.combinations] == ["finished", "stopped", "not begun", "not begun"]
    assert "Not compared: 1 stopped, 2 not begun." in result.verdict and "stopped after 4 steps" in result._repr_html_()
    assert len(sweep(quick, GRID, splits, say=quiet).finished) == 4


def test_failures_are_rows_and_end_nothing(quick, splits, monkeypatch):
    said, grid = [], {"r": [2], "learning_rate": [1e-2, 1e-7]}

    def poison(model):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data.fill_(float("nan"))

    callbacks = [InTheMiddle(3, poison)]
    result = sweep(quick, grid, splits, callbacks=callbacks, say=said.append)
    assert [one.state for one in result.combinations] == ["failed", "finished"]
    assert "became nan at step 4. Lower learning_rate (now 0.01, of which this step took 0.0097" in result.combinations[0].failure and result.combinations[0].failure in str(result)
    assert "1 failed" in result.verdict and any("failed:" in line for line in said) and "failed" in result._repr_html_()
    said.clear()
    assert str(sweep(quick, grid, splits, say=said.append)) == str(result) and not said, "a failure is not tried again"
    assert len(sweep(quick, grid, splits, retry=True, say=said.append).finished) == 2

    real = training.probe_fit

    def full(model, *rest):
        if model.peft_config["default"].r == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return real(model, *rest)

    monkeypatch.setattr(training, "probe_fit", full)
    result = sweep(quick, {"r": [8, 2]}, splits, name="full", say=quiet)
    assert [one.state for one in result.combinations] == ["failed", "finished"] and "does not fit into the memory" in result.combinations[0].failure
    monkeypatch.setattr(training, "probe_fit", real)
    assert len(sweep(quick, {"r": [8, 2]}, splits, name="full", retry=True, say=quiet).finished) == 2

    step = FinetuneTrainer.training_step

    def short(self, model, *rest):
        if model.peft_config["default"].r == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return step(self, model, *rest)

    monkeypatch.setattr(FinetuneTrainer, "training_step", short)
    result = sweep(quick, {"r": [4, 2]}, splits, name="full", say=quiet)
    assert "There was not enough memory" in result.combinations[0].failure and result.combinations[1].state == "finished"


def test_another_fault_is_not_hidden(quick, splits, monkeypatch):
    monkeypatch.setattr(FinetuneTrainer, "training_step", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sweep(quick, GRID, splits, say=quiet)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({}, "at least one setting"),
        ({"r": []}, "r: a sweep needs a list of values"),
        ({"r": 8}, "r: a sweep needs a list of values"),
        ({"target_modules": "attention"}, "target_modules: a sweep needs a list"),
        ({"rank": [8]}, "unknown setting 'rank'; did you mean 'r'"),
        ({"r": [8, 8]}, "r: a value stands twice"),
        ({"learning_rate": [1, 1.0]}, "learning_rate: a value stands twice"),
        ({"learning_rate": ["fast"]}, "learning_rate: expected a number"),
        ({"train_file": ["a.jsonl", "b.jsonl"]}, "train_file can't be varied"),
        ({"model_name_or_path": ["a"]}, "model_name_or_path can't be varied"),
        ({"eval_strategy": ["epoch", "steps"]}, "eval_strategy can't be varied"),
        ({"init_lora_weights": ["default", "pissa"]}, "change the base weights"),
    ],
)
def test_a_bad_grid_is_one_error(grid, said, quick, splits, tmp_path):
    with pytest.raises(ConfigError, match=said):
        sweep(quick, grid, splits)
    assert not (tmp_path / "runs").exists()


def test_what_else_can_not_be(quick, splits, tmp_path):
    for grid, options, said in ((GRID, {"rungs": 4}, "rungs: expected a list"), (["r"], {}, "by setting, as in")):
        with pytest.raises(ConfigError, match=said):
            sweep(quick, grid, splits, **options)
    for options, said in (({"rungs": [5, 5]}, "rungs are numbers"), ({"rungs": [0]}, "rungs are"), ({"keep": 1.0}, "keep is the share"), ({"name": "../x"}, "plain name")):
        with pytest.raises(ConfigError, match=said):
            sweep(quick, GRID, splits, **options)
    with pytest.raises(ConfigError, match='set eval_strategy to "epoch"'):
        sweep(replace(quick, eval_strategy="no"), GRID, splits)
    with pytest.raises(TrainingError, match="there are none. Set validation_size above 0"):
        sweep(quick, GRID, splits._replace(validation=[]))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(TrainingError, match="sweep.json is missing"):
        load_sweep(tmp_path)
    sweep(quick, {"r": [2]}, splits, say=quiet)
    with pytest.raises(TrainingError, match="holds a run with another seed, lora_alpha|holds a run with another lora_alpha, seed"):
        sweep(replace(quick, seed=1, lora_alpha=7), {"r": [2]}, splits, say=quiet)
    with pytest.raises(TrainingError, match="holds a run on other chats"):
        sweep(quick, {"r": [2]}, splits._replace(train=splits.train[1:]), say=quiet)


def test_names_are_plain_and_differ(quick):
    made = combinations(quick, {"target_modules": [["q_proj", "v_proj"], ["q_proj-v_proj"], "all-linear"], "learning_rate": [1e-5, 2e-4]})
    names = [one.name for one in made]
    assert len(set(names)) == 6 and all(len(name) < 120 and not set(name) & set('<>:"/\\|?*, ') for name in names)
    assert names[-1] == "target_modules=all-linear_learning_rate=0.0002"
    assert names == [one.name for one in combinations(quick, {"target_modules": [["q_proj", "v_proj"], ["q_proj-v_proj"], "all-linear"], "learning_rate": [1e-5, 2e-4]})]


def planted(result, losses, base):
    "A sweep whose runs have these losses on the validation chats."
    for one, own in zip(result.combinations, losses, strict=True):
        facts = json.loads((one.folder / "run.json").read_text())
        (one.folder / "run.json").write_text(json.dumps(facts | {"best_eval_loss": float(np.mean(own))}))
        (one.folder / "validation_losses.json").write_text(json.dumps({"losses": list(own), "tokens": [1] * len(own)}))
    notes = json.loads((result.folder / "sweep.json").read_text())
    (result.folder / "sweep.json").write_text(json.dumps(notes | {"base_losses": list(base), "tokens": [1] * len(base)}))
    return load_sweep(result.folder)


def test_the_verdict(quick, splits):
    result = sweep(replace(quick, max_steps=1, eval_strategy="steps"), {"r": [2, 4, 8], "learning_rate": [1e-3]}, splits, say=quiet)
    rng = np.random.default_rng(0)
    hard, base = rng.random(100), rng.random(100) + 3
    told = planted(result, [hard + 1 + rng.normal(0, 0.02, 100), hard + 0.505 + rng.normal(0, 0.1, 100), hard + 0.5 + rng.normal(0, 0.1, 100)], base)
    low, mid, high = told.combinations
    assert told.best is high and told.not_told_apart == [high, mid] and told.advice is mid
    assert told.differences[low.name].verdict == "worse" and told.differences[low.name].mean == pytest.approx(0.5, abs=0.05)
    assert "r=8, learning_rate=0.001 is the best of 3" in told.verdict and "Not to be told from it on 100 validation chats: r=4" in told.verdict
    assert "Take r=4, learning_rate=0.001: it can't be told from the best, with an adapter of" in told.verdict and "The 2 verdicts against the best hold together (Holm" in told.verdict and "as good" not in told.verdict and "r=8 is the highest that was tried" in told.verdict
    told = planted(result, [hard + 1, hard + 0.4, hard + 0.9], base)
    assert told.not_told_apart == [told.combinations[1]] and "Every other one is worse by more than chance" in told.verdict and "may lie beyond" not in told.verdict
    told = planted(result, [hard, hard + 0.01 * rng.normal(0, 1, 100), hard + 0.2], hard + 0.01 * rng.normal(0, 1, 100))
    assert told.gain.verdict == "can't tell" and "Whether that is better than the base model 100 validation chats can't tell" in told.verdict and "Take" not in told.verdict
    told = planted(result, [hard, hard + 0.1, hard + 0.2], hard - 0.5)
    assert "worse than the base model: none of these settings is worth training" in told.verdict and "Take" not in told.verdict


def test_many_settings_that_change_nothing_are_rarely_told_apart(quick, splits):
    result = sweep(replace(quick, max_steps=1, eval_strategy="steps"), {"r": [2, 3, 4, 5, 6, 7, 8, 9]}, splits, say=quiet)
    told = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        hard = rng.random(60)
        found = planted(result, [hard + rng.normal(0, 0.3, 60) for _ in result.combinations], hard + 3)
        told.append(len(found.not_told_apart) == 8)
    assert np.mean(told) >= 0.75, "one by one, the luckiest of eight is told from some other more often than not"


def test_the_losses_of_chats_are_those_of_the_run(done, tokenizer):
    _, splits, result = done
    for one in result.combinations:
        kept = json.loads((one.folder / "validation_losses.json").read_text())
        assert np.average(kept["losses"], weights=kept["tokens"]) == pytest.approx(one.loss, rel=1e-6)
        singly = [chat_losses(load_run(one.folder).model, tokenize_chats([chat], tokenizer))[0][0] for chat in splits.validation[:3]]
        assert kept["losses"][:3] == pytest.approx(singly, rel=1e-5)
    first = next(row["eval_loss"] for row in load_run(one.folder).history if "eval_loss" in row)
    assert np.average(result.base_losses, weights=result.tokens) == pytest.approx(first, rel=1e-6)


def test_it_shows_itself(done, quick, splits):
    result = done[2]
    page = result._repr_html_()
    assert result.plot()._repr_png_()[:4] == b"\x89PNG" and page.count("<tr") == 5 and "data:image/png;base64" in page and (result.folder / "sweep.png").is_file()
    three = sweep(replace(quick, max_steps=1, eval_strategy="steps"), {"r": [2], "learning_rate": [1e-3], "lora_alpha": [4, 8]}, splits, name="three", say=quiet)
    assert three.plot()._repr_png_()[:4] == b"\x89PNG"


def test_a_range_test_finds_where_it_runs_away(quick, splits, tmp_path):
    model, tokenizer = load_model(quick.model_name_or_path, torch.float32, use_cpu=True)
    model.lm_head.weight.data *= 40  # or an adapter could not do much harm
    model.save_pretrained(tmp_path / "strong")
    tokenizer.save_pretrained(tmp_path / "strong")
    quick = replace(quick, model_name_or_path=str(tmp_path / "strong"), target_modules="all-linear", lora_alpha=320.0)
    base = load_base(quick, quiet)
    before, settings = copied(base[0]), replace(quick)
    found = lr_range_test(quick, splits, 1e-4, 1, 60, base=base, say=quiet)
    assert found.ended_by == "divergence" and len(found.losses) < 60 and 1e-4 < found.suggestion <= found.rates[found.lowest] / 10 * 1.05
    assert found.rates == pytest.approx(np.geomspace(1e-4, 1, 60)[: len(found.rates)])
    assert "ran away at" in str(found) and f"Suggested: {found.suggestion:.1e}" in found._repr_html_() and found.plot()._repr_png_()[:4] == b"\x89PNG"
    assert same(before, base[0].state_dict()) and quick == settings and not (tmp_path / "runs").exists()
    assert found == lr_range_test(quick, splits, 1e-4, 1, 60, say=quiet), "the same with a base model of its own"


def test_the_steps_of_a_range_test_are_steps_of_a_training(quick, splits, tmp_path):
    "With hardly any rise it is a training at a constant learning rate."
    found = lr_range_test(quick, splits, 1e-3, 1.0000001e-3, 12, say=quiet)
    config = replace(quick, lr_scheduler_type="constant", warmup_ratio=0, learning_rate=1e-3, max_steps=12, eval_strategy="no")
    assert found.losses == pytest.approx([row["loss"] for row in train(config, splits, say=quiet).history if "loss" in row], rel=1e-5)


def test_a_range_test_without_a_fall_suggests_nothing(quick, splits):
    found = lr_range_test(quick, splits, 1e-8, 1e-7, 10, say=quiet)
    assert found.suggestion is None and found.ended_by == "the plan" and "fell by 0." in str(found) and "which is less than the " in str(found) and found.plot()._repr_png_()
    falling = RangeTest([10.0**-k for k in range(6, 0, -1)] * 4, [5 - i / 10 for i in range(24)], "the plan")
    assert falling.suggestion is not None and "try a larger high" in str(falling)
    broken = RangeTest(falling.rates, [*falling.losses[:-1], float("nan")], "divergence")
    assert broken.lowest == 22 and broken.suggestion == RangeTest(falling.rates[:-1], falling.losses[:-1], "divergence").suggestion and broken.plot()._repr_png_()
    assert RangeTest(falling.rates, [float("nan")] * 24, "divergence").suggestion is None


def test_noise_suggests_no_learning_rate():
    rates, suggested, found = list(np.geomspace(1e-6, 1e-1, 100)), [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        suggested.append(RangeTest(rates, list(rng.normal(2, 0.2, 100)), "the plan").suggestion)
        falls = RangeTest(rates, list(2 - 1 / (1 + np.exp(-np.linspace(-7, 7, 100))) + rng.normal(0, 0.2, 100)), "the plan")
        found.append(falls.suggestion is not None and falls.suggestion >= rates[0])
    assert sum(one is not None for one in suggested) <= 5 and all(one is None or one >= rates[0] for one in suggested)
    assert sum(found) >= 98, "a loss that falls by half is seen through the same noise"


def test_a_loss_that_is_no_number_ends_a_range_test(quick, splits, monkeypatch):
    step, calls = FinetuneTrainer.training_step, []

    def poisoned(self, model, *rest):
        calls.append(1)
        return step(self, model, *rest) * (float("nan") if len(calls) == at else 1)

    monkeypatch.setattr(FinetuneTrainer, "training_step", poisoned)
    at = 12
    found = lr_range_test(quick, splits, 1e-4, 1e-1, 30, say=quiet)
    assert found.ended_by == "divergence" and len(found.losses) == 11
    at = len(calls) + 1
    with pytest.raises(TrainingError, match="became nan at step 1"):  # that is not the learning rate's fault
        lr_range_test(quick, splits, 1e-4, 1e-1, 30, say=quiet)


def test_a_range_test_that_can_not_be(quick, splits):
    for options, said in (({"low": 1e-2, "high": 1e-3}, "from low to a higher high"), ({"steps": 5}, "at least 10 steps"), ({"high": 7}, "learning_rate: expected"), ({"low": 0}, "learning_rate: expected")):
        with pytest.raises(ConfigError, match=said):
            lr_range_test(quick, splits, **options)
    with pytest.raises(TrainingError, match="no training chats"):
        lr_range_test(quick, Splits([], [], []))


HOLDER = "import sys, time\nfrom finetune_nb.locks import hold\nwith hold(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.mark.parametrize("of", ["the sweep", "a run"])
def test_what_is_at_work_elsewhere_is_left_alone(of, quick, splits):
    one = combinations(quick, {"r": [2]}, "race")[0]
    one.folder.mkdir(parents=True)
    (one.folder / "history.jsonl").write_text("")
    held = one.folder if of == "a run" else one.folder.parent
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(held)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockError, match=f"is at work in process {other.pid}"):
            sweep(quick, {"r": [2]}, splits, name="race", say=quiet)
        other.kill()
    assert (one.folder / "history.jsonl").exists() and not (one.folder / "config.yaml").exists()
    assert sweep(replace(quick, max_steps=2), {"r": [2]}, splits, name="race", say=quiet).best is not None, "what has died holds nothing"


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_record_of_a_sweep_is_named(text, tmp_path):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(TrainingError, match=r"sweep\.json (can't be read|does not say)"):
        load_sweep(tmp_path)
