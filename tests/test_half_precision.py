"A GPU without bf16, such as the T4 of Colab, as far as a CPU can play it: what is chosen there, and that fp16 with a scaled loss passes all that looks at a run."

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from finetune_nb import models, trainer
from finetune_nb.config import FinetuneConfig
from finetune_nb.doctor import Card, check_cards, check_precision
from finetune_nb.lora import add_lora
from finetune_nb.losses import token_losses
from finetune_nb.models import Hardware, dtype_of, hardware, load_model
from finetune_nb.packing import PackingCollator
from finetune_nb.preflight import preflight
from finetune_nb.sentinels import MOST_SKIPPED, Sentinels, SkippedStepsError, Step


@pytest.fixture
def t4(monkeypatch):
    "torch as it answers on a T4 (compute capability 7.5)."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: SimpleNamespace(name="Tesla T4", total_memory=15_828_320_256, major=7, minor=5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    return hardware()


@pytest.fixture
def half(quick, tiny_model):
    "The tiny model in fp16 with an adapter."
    return add_lora(load_model(tiny_model, torch.float16, use_cpu=True, say=lambda text: None)[0], quick)


def test_a_t4_takes_fp16_with_a_scaled_loss(t4, monkeypatch, tmp_path):
    assert (t4.name, t4.bf16, t4.dtype) == ("Tesla T4", False, torch.float16), "emulated bf16 is none"
    assert dtype_of(FinetuneConfig()) == torch.float16 and dtype_of(FinetuneConfig(bf16=False)) == torch.float32
    assert models.hardware(use_cpu=True).device == "cpu"
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "hardware", lambda use_cpu=False: t4)
    for choice, fp16 in ((None, True), (False, False)):
        arguments = trainer.training_arguments(FinetuneConfig(bf16=choice), tmp_path, 100)
        assert (arguments.fp16, arguments.bf16) == (fp16, False)
    assert "7.5" in check_precision("cuda", False, (7, 5)).text
    assert [f.level for f in check_cards([Card("Tesla T4", (7, 5), 14.7, 3.0)], True)] == ["ok", "warning"], "somebody else has most of it"


def test_newer_cards_take_bf16():
    assert Hardware("cuda", "NVIDIA L4", 22, 4, True).dtype == torch.bfloat16 and check_precision("cuda", True, (8, 9)).level == "ok"


def test_a_preflight_in_fp16_finds_nothing_wrong(half, quick, tokenizer, rows, chats):
    report = preflight(half, tokenizer, rows, chats, quick)
    assert report.ok and [check.name for check in report.findings] in ([], ["one chat by heart"]), str(report)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}, "what is trained is not rounded"


def scaled_steps(model, rows, scale, n, growth=2000):
    "Steps as the trainer takes them in fp16, with torch's own scaler; returns the sentinels, and the scale at the end."
    collator, said = PackingCollator("single"), []
    sentinels, scaler = Sentinels(said.append), torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    sentinels.begin(model)
    for number in range(1, n + 1):
        row = rows[number % len(rows)]
        loss = token_losses(model, collator.batches([row])[0]).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm, before = clip_grad_norm_(trained, 1.0), scaler.get_scale()
        sentinels.before_step(model, Step(number, [row], 1, loss.detach(), norm, 1e-3, collator, may_skip=True))
        scaler.step(optimizer)
        scaler.update()
        sentinels.after_step(model, number, skipped=scaler.get_scale() < before)
        optimizer.zero_grad()
    sentinels.end(model, n)
    return sentinels, said, scaler.get_scale()


def test_steps_that_overflow_are_counted_and_the_run_goes_on(half, rows):
    sentinels, said, scale = scaled_steps(half, rows, 2.0**26, 16)
    assert 0 < sentinels.counts["skipped_steps"] < 16 and scale < 2.0**26 and sentinels.moved
    assert len(said) == 1 and "overflowed in float16 and was left out" in said[0], "told once"


def test_a_run_in_which_every_step_overflows_ends(half, rows):
    with pytest.raises(SkippedStepsError, match=f"The last {MOST_SKIPPED} steps.*overflowed in float16"):
        scaled_steps(half, rows, 2.0**120, MOST_SKIPPED + 5)
