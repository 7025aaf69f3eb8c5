"""What each sentinel makes of the figures of a step, without a training: when it is silent, counts, tells, or ends the run, and with which words."""

import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_nb.packing import PackingCollator
from finetune_nb.sentinels import (
    MOST_SKIPPED,
    PATIENCE,
    ChangedBaseError,
    NoGradientError,
    NoLossError,
    NonFiniteError,
    SentinelError,
    Sentinels,
    SkippedStepsError,
    Step,
    UnchangedAdapterError,
    _first,
    are_finite,
    base_sums,
    non_finite_chats,
    place_of,
)

NAN, INF = math.nan, math.inf


@pytest.fixture
def model():
    "A model of one block, of which one weight is trained."
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
    for name, p in made.named_parameters():
        p.requires_grad_("q_proj" in name or "k_proj" in name)
    return made


@pytest.fixture
def said():
    return []


def chats_of(n):
    return [{"input_ids": [9 + i] * 6, "labels": [9 + i] * 6, "where": f"chats.jsonl, line {i + 1}"} for i in range(n)]


def step(number=1, **changes):
    first = Step(number, chats_of(2), 10, 2.5, 0.5, 1e-3, PackingCollator("padded", 512))
    return replace(first, **changes)


def weight(model):
    return model.model.layers[0].self_attn.q_proj.weight


def test_a_step_that_is_as_it_should_be_is_passed_over(model, said):
    look = Sentinels(said.append)
    look.begin(model)
    for number in (1, 2):
        look.before_step(model, step(number))
        with torch.no_grad():
            weight(model)[0, 0] += 1
        look.after_step(model, number, False)
    look.check_weights(model, 2)
    look.end(model, 2)
    assert (look.counts, said) == ({}, [])


@pytest.mark.parametrize(("loss", "norm", "may_skip", "words"), [(NAN, 0.5, True, "The loss became nan"), (INF, NAN, False, "The loss became inf"), (2.5, INF, False, "The gradient became inf"), (2.5, NAN, False, "The gradient became nan")])
def test_what_is_no_number_ends_the_run(loss, norm, may_skip, words, model, said):
    for kind in (float, torch.tensor):
        with pytest.raises(NonFiniteError, match=f"^{words} at step 7. Lower learning_rate [(]now 0.01, of which this step took 0.001[)]") as caught:
            Sentinels(said.append).before_step(model, step(7, loss=kind(loss), grad_norm=kind(norm), may_skip=may_skip, configured_rate=0.01))
        assert str(caught.value).endswith("The step was not taken. Its chats: chats.jsonl, line 1; chats.jsonl, line 2.") and "None of them does so alone" in str(caught.value)
        assert str(caught.value.row) == str({"step": 7, "ended_by": "NonFiniteError", "loss": loss, "grad_norm": norm})
    Sentinels(said.append).before_step(model, step(grad_norm=INF, may_skip=True))
    assert said == []


def test_the_chat_that_does_it_is_named(model, said):
    model.train()
    three = chats_of(3)
    with torch.no_grad():
        model.model.embed_tokens.weight[10] = NAN
    model.model.layers[0].self_attn.q_proj.weight.grad = kept = torch.ones(8, 8)
    assert non_finite_chats(model, three, PackingCollator("padded", 512)) == [1]
    assert model.training and model.model.layers[0].self_attn.q_proj.weight.grad is kept and kept.eq(1).all()
    assert non_finite_chats(model.eval(), three, PackingCollator("padded", 512)) == [1] and not model.training
    bad = step(chats=three, loss=NAN)
    with pytest.raises(NonFiniteError, match="Computed alone, it comes from chats.jsonl, line 2: look at it first. The step"):
        Sentinels(said.append).before_step(model, bad)
    with torch.no_grad():
        model.model.embed_tokens.weight[9:] = NAN
    with pytest.raises(NonFiniteError, match="Each of them does so alone: it lies in the base model"):
        Sentinels(said.append).before_step(torch.nn.DataParallel(model), bad)
    with pytest.raises(NonFiniteError, match="it comes from chats.jsonl, line 1, (.*)line 8 and 2 more: look"):
        Sentinels(said.append).before_step(model, replace(bad, chats=[*chats_of(10), {"input_ids": [1, 2], "labels": [1, 2]}]))
    with pytest.raises(NonFiniteError, match="it comes from chats.jsonl, line 1: look"):
        Sentinels(said.append).before_step(model, replace(bad, chats=three[:1]))
    with torch.no_grad():
        weight(model)[0, 0] = INF
    with pytest.raises(NonFiniteError, match="The adapter itself has weights that are no numbers since an earlier step"):
        Sentinels(said.append).before_step(model, bad)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(NonFiniteError, match=f"^After step 5 the adapter has weights that are no numbers: {name}. It is not saved") as caught:
        Sentinels(said.append).check_weights(model, 5)
    assert caught.value.row == {"step": 5, "ended_by": "NonFiniteError"}
    with pytest.raises(NonFiniteError, match="^After step 6 the adapter"):
        Sentinels(said.append).end(model, 6)


def test_a_step_without_labels_is_counted(model, said):
    look = Sentinels(said.append)
    for number in (1, 2):
        look.before_step(model, step(number, supervised=0, loss=0.0, grad_norm=0.0))
    assert look.counts == {"steps_without_label": 2} and look.before is None
    assert said == ["Step 1 has no supervised token and teaches nothing: chats.jsonl, line 1; chats.jsonl, line 2. Such steps are counted in the history as steps_without_label."]
    look.end(model, 3)
    Sentinels().end(model, 0)
    with pytest.raises(NoLossError, match="^None of the 2 steps had a supervised token: nothing was learned. Look at show_labels") as caught:
        look.end(model, 2)
    assert caught.value.row == {"step": 2, "ended_by": "NoLossError", "loss": 0.0}


def test_a_loss_of_zero(model, said):
    look = Sentinels(said.append)
    with pytest.raises(NoLossError, match="^The loss of the first step is exactly 0, though 1,234 tokens are supervised: chats.jsonl, line 1; .*Look at show_labels") as caught:
        look.before_step(model, step(loss=0.0, supervised=1234))
    assert caught.value.row == {"step": 1, "ended_by": "NoLossError", "loss": 0.0, "grad_norm": 0.5}
    for number in range(2, 3 * PATIENCE):
        look.before_step(model, step(number, loss=0.0, grad_norm=0.0))
    assert look.counts == {"steps_with_zero_loss": 3 * PATIENCE - 2} and len(said) == 1 and said[0].startswith("The loss of step 2 is exactly 0: ")


def test_a_gradient_of_zero(model, said):
    with pytest.raises(NoGradientError, match="^The gradient is exactly 0 at step 1, though the loss is 2.5: nothing reaches the adapter") as caught:
        Sentinels(said.append).before_step(model, step(grad_norm=0.0))
    assert caught.value.row == {"step": 1, "ended_by": "NoGradientError", "loss": 2.5, "grad_norm": 0.0}
    look = Sentinels(said.append)
    for number in range(2, PATIENCE + 1):
        look.before_step(model, step(number, grad_norm=0.0))
    look.before_step(model, step(PATIENCE + 1))  # one that has a gradient: they are counted anew
    for number in range(PATIENCE + 2, 2 * PATIENCE + 1):
        look.before_step(model, step(number, grad_norm=0.0))
    assert look.counts == {"steps_with_zero_gradient": 2 * PATIENCE - 2} and said[1:] == [f"The gradient of step 2 is exactly 0, though its loss is 2.5. Such steps are counted in the history as {next(iter(look.counts))}."]
    with pytest.raises(NoGradientError, match=f"at step {2 * PATIENCE + 1},"):
        look.before_step(model, step(2 * PATIENCE + 1, grad_norm=0.0))


def test_steps_that_are_left_out(model, said):
    look = Sentinels(said.append)
    for number in range(1, MOST_SKIPPED):
        for _ in range(2):  # asked twice, counted once
            look.before_step(model, step(number, grad_norm=INF, may_skip=True))
            look.after_step(model, number, True)
    assert look.counts == {"skipped_steps": MOST_SKIPPED - 1}
    look.before_step(model, step(50))
    with torch.no_grad():
        weight(model)[0, 0] += 1
    look.after_step(model, 50, False)
    for number in range(100, 99 + MOST_SKIPPED):
        look.after_step(model, number, True)
    assert said == ["Step 1 overflowed in float16 and was left out; the next one is scaled by half as much. Such steps are counted in the history as skipped_steps."]
    with pytest.raises(SkippedStepsError, match=f"^The last {MOST_SKIPPED} steps, up to step 200, overflowed") as caught:
        look.after_step(model, 200, True)
    assert caught.value.row == {"step": 200, "ended_by": "SkippedStepsError"}


def test_an_adapter_that_does_not_move(model, said):
    look = Sentinels(said.append)
    for quiet in (step(1, learning_rate=0.0), step(2, grad_norm=INF, may_skip=True)):
        look.before_step(model, quiet)
        look.after_step(model, quiet.number, False)
    look.before_step(model, step(3))
    with pytest.raises(UnchangedAdapterError, match="^Step 3 had a gradient and a learning rate, and yet") as caught:
        look.after_step(model, 3, False)
    assert caught.value.row == {"step": 3, "ended_by": "UnchangedAdapterError"}
    look.before_step(model, step(4))
    look.after_step(model, 4, False)  # looked at once


def test_a_base_model_that_changes_is_seen(model, said):
    look = Sentinels(said.append)
    look.check_base(model, 1)  # that was not begun with
    look.begin(model)
    assert look.base == base_sums(torch.nn.DataParallel(model)) and not any("q_proj" in name for name in look.base) and len(look.base) == 12, "ten weights, and two buffers of the rotary embedding"
    look.check_base(model, 1)
    model.register_buffer("later", torch.ones(2))
    look.check_base(model, 1)  # what was not there before the first step can't have changed
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    look.before_step(model, step(4))
    with torch.no_grad():
        weight(model)[0, 0] += 1
    for do in (lambda: look.after_step(model, 4, False), lambda: look.end(model, 4)):
        with pytest.raises(ChangedBaseError, match=r"^By step 4 the weights of the base model had changed: lm_head.weight\. An adapter") as caught:
            do()
        assert caught.value.row == {"step": 4, "ended_by": "ChangedBaseError"}
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    with pytest.raises(ChangedBaseError, match=r"had changed: [\w.]+(, [\w.]+){3} and [0-9]+ more\. An"):
        look.check_base(model, 4)


def test_each_bit_is_in_the_sum():
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(n, dtype=kind), False) for n in (1, 3, 4, 9) for kind in (torch.float16, torch.float32)])
    model.append(torch.nn.Parameter(torch.zeros(20, dtype=torch.int8)[3:], False))
    before = base_sums(model)
    assert len(set(before.values())) == 1, "zeros have one sum"
    for name, p in model.named_parameters():
        for at in range(len(p)):
            p.data.view(torch.int8 if p.element_size() == 1 else torch.int16 if p.element_size() == 2 else torch.int32)[at] ^= 1
            assert {other for other, n in base_sums(model).items() if n != before[other]} == {name}
            p.data.zero_()


def test_a_gradient_alone_is_enough(model):
    "The loss is a number, and one of the weights takes no part in it."
    model.unused = torch.nn.Parameter(torch.ones(2))
    assert non_finite_chats(model, chats_of(2), PackingCollator("padded", 512)) == []
    weight(model).register_hook(lambda gradient: gradient * INF)
    assert non_finite_chats(model, chats_of(2), PackingCollator("padded", 512)) == [0, 1]


def test_small_things():
    assert SentinelError("words", loss=1.5).row == {"step": 0, "ended_by": "SentinelError", "loss": 1.5}
    assert (_first("abcdef", 4), _first("abcd", 4), _first("", 4)) == ("a, b, c, d and 2 more", "a, b, c, d", "")
    assert are_finite([]) and are_finite([torch.tensor([1, 2])]) and are_finite([torch.empty(0), torch.ones(2)]) and are_finite([torch.full((2,), 3e38)] * 3)
    assert not are_finite([torch.ones(2), torch.tensor([1.0, NAN])]) and not are_finite([torch.tensor(INF)])
    assert (place_of({"where": "a, line 2"}), place_of({}), place_of({"where": ""}, 3)) == ("a, line 2", "chat 1 of the step", "chat 4 of the step")
    assert step().rates == step(configured_rate=1e-3).rates == "now 0.001" and step(configured_rate=0.25).rates == "now 0.25, of which this step took 0.001"
    many = step(chats=chats_of(18)).places()
    assert many.count("; ") == 16 and many.endswith("line 16; … and 2 more") and "more" not in step(chats=chats_of(16)).places() and step(chats=chats_of(3)).places(1) == "chats.jsonl, line 1; … and 2 more"
    assert re.fullmatch("chat 1 of the step; chat 2 of the step", step(chats=[{}, {}]).places())
