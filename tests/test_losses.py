"""Each piece of the loss against plain PyTorch, to the number."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_packing import COMMON, tuned_model
from transformers import CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, LlamaForCausalLM, PhiConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune_nb.attention import PACKED, Layout, Segment, attention_of
from finetune_nb.lora_linear import use_one_rounding
from finetune_nb.losses import (
    Batch,
    HeadLoss,
    gradients,
    inner_model,
    mean_loss,
    mixed_precision,
    needs_autocast,
    part_like,
    plain_head,
    recompute_blocks,
    smoothed,
    supervised_states,
    token_losses,
)
from finetune_nb.packing import pack, pad

GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128)


def batch_of(*lengths):
    chats = [{"input_ids": list(range(1, n + 1)), "labels": [-100] * 2 + list(range(3, n + 1))} for n in lengths]
    (batch,) = pad(chats, 10**6)
    return batch


@pytest.mark.parametrize(("dtype", "sum_dtype"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 256])
def test_the_loss_of_the_head_in_pieces_of_any_size(dtype, sum_dtype, biased, chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((7, 5), (11, 5), (11,)))
    targets, share = torch.tensor([0, 10, 3, 3, 7, 1, 9]), torch.arange(1, 8).to(sum_dtype)
    hidden, bias = hidden.requires_grad_(), bias if biased else None
    mine = HeadLoss.apply(hidden, weight, bias, targets, chunk)
    logits = torch.nn.functional.linear(hidden, weight, bias).to(sum_dtype)
    right = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert mine.dtype == sum_dtype and mine.shape == (7,)
    torch.testing.assert_close(mine, right)
    got, expected = (torch.autograd.grad((loss * share).sum(), hidden)[0] for loss in (mine, right))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else None, atol=5e-2 if dtype == torch.bfloat16 else None)
    without = HeadLoss.apply(hidden.detach(), weight, bias, targets, chunk)
    assert torch.equal(without, mine) and without.grad_fn is None


def test_logits_are_made_a_few_hundred_at_a_time_and_no_gradient_where_none_is_asked_for(monkeypatch):
    "A vocabulary of 150,000 times every token of a step would fill the memory."
    sizes, rooms, linear, empty = [], [], torch.nn.functional.linear, torch.empty_like
    monkeypatch.setattr(torch.nn.functional, "linear", lambda hidden, *more: sizes.append(len(hidden)) or linear(hidden, *more))
    monkeypatch.setattr(torch, "empty_like", lambda tensor: rooms.append(len(tensor)) or empty(tensor))
    hidden, weight, targets = torch.randn(600, 3), torch.randn(5, 3), torch.arange(600) % 5
    HeadLoss.apply(hidden, weight, None, targets)
    assert sizes == [256, 256, 88] and rooms == []
    HeadLoss.apply(hidden.requires_grad_(), weight, None, targets)
    assert sizes == [256, 256, 88] * 2 and rooms == [600]


def test_a_last_layer_of_its_own_precision_and_losses_in_one_that_suffices():
    inner, batch = inner_model(tuned_model(LlamaConfig(**COMMON))), batch_of(5, 7)
    right = token_losses(inner, batch)
    inner.get_output_embeddings().float()
    torch.testing.assert_close(token_losses(inner, batch), right.float())
    capped = inner_model(tuned_model(Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=5.0))).bfloat16()
    states, head = supervised_states(capped, batch)
    losses = token_losses(capped, batch)
    assert head is None and states.dtype == torch.bfloat16 and losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(states.float(), batch.targets, reduction="none"))


def test_a_batch_moves_whole():
    layout = Layout([Segment(0, 4)])
    batch = Batch(torch.ones(2, 4, dtype=torch.long), torch.arange(4)[None], None, torch.tensor([1]), torch.tensor([2]), torch.tensor([0]), layout)
    moved = batch.to("meta")
    assert batch.tokens == moved.tokens == 8 and moved.layout is layout and moved.attention_mask is None
    assert {getattr(moved, name).device.type for name in ("input_ids", "position_ids", "at", "targets", "chat")} == {"meta"}


def test_a_batch_is_pinned_whole(monkeypatch):
    "Without a GPU nothing can be pinned, so a copy stands for it."
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batch = batch_of(4, 3)
    pinned = batch.pin_memory()
    for name in ("input_ids", "attention_mask", "at", "targets", "chat"):
        assert torch.equal(getattr(pinned, name), getattr(batch, name)) and getattr(pinned, name) is not getattr(batch, name)
    assert pinned.position_ids is pinned.layout is None


def test_positions_and_masks_reach_the_model():
    "GPT-2 knows positions by their number, and the masked tokens here stand in front."
    model = tuned_model(GPT2).eval()
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    at, targets = torch.tensor([3, 4, 9]), torch.tensor([5, 6, 7])
    for given in ({"position_ids": torch.arange(6)[None] + 20}, {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])}, {}):
        batch = Batch(ids, given.get("position_ids"), given.get("attention_mask"), at, targets, torch.tensor([0, 0, 1]))
        right = torch.nn.functional.cross_entropy(model(input_ids=ids, **given).logits.flatten(0, 1)[at], targets, reduction="none")
        torch.testing.assert_close(token_losses(model, batch), right)
    states, head = supervised_states(model, batch)
    assert states.shape == (3, 32) and head is inner_model(model).get_output_embeddings()
    assert "forward" not in vars(head), "the last layer is itself again"
    asked = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    token_losses(model, batch)
    hook.remove()
    assert asked[0]["use_cache"] is False, "keys and values of a training step are kept for nobody"


def test_a_row_of_several_chats_brings_a_mask_that_takes_no_room():
    "With four dimensions, so that transformers makes none of its own; who sees whom, the layout says."
    model, asked = tuned_model(LlamaConfig(**COMMON)), []
    (row,) = pack([{"input_ids": [1, 2, n], "labels": [1, 2, n]} for n in (3, 4)], 10**6)
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: asked.append(kwargs), with_kwargs=True)
    with attention_of(inner_model(model), PACKED["tree"]):
        token_losses(model, row)
    hook.remove()
    mask = asked[0]["attention_mask"]
    assert tuple(mask.shape) == (1, 1, 1, 1) and mask.dtype == torch.bool and mask.all() and asked[0]["layout"] is row.layout


def test_a_last_layer_with_a_bias():
    inner, batch = inner_model(tuned_model(PhiConfig(**COMMON))), batch_of(5, 7)
    torch.nn.init.normal_(inner.get_output_embeddings().bias)
    right = inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.at]
    assert plain_head(inner)
    torch.testing.assert_close(token_losses(inner, batch), torch.nn.functional.cross_entropy(right, batch.targets, reduction="none"))


def test_the_model_inside_its_wrappers():
    model = tuned_model(LlamaConfig(**COMMON))
    inner = model.get_base_model()
    assert inner_model(model) is inner_model(inner) is inner_model(SimpleNamespace(module=model)) is inner


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (LlamaConfig(**COMMON), True),
        (GraniteConfig(**COMMON, logits_scaling=3.0), False),
        (GraniteConfig(**COMMON, logits_scaling=1.0), True),
        (CohereConfig(**COMMON, logit_scale=0.5), False),
        (Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=5.0), False),
        (Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=1e6), False),  # no difference can be seen in three tokens
        (Gemma2Config(**COMMON, head_dim=8, final_logit_softcapping=None), True),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_which_heads_are_a_product_alone(config, plain, device):
    model = tuned_model(config)
    inner = inner_model(model).to(device)
    before = torch.get_rng_state()
    assert plain_head(inner) is plain_head(inner) is plain and torch.equal(before, torch.get_rng_state())
    assert not inner.get_output_embeddings()._forward_hooks, "nothing stays behind"
    inner.get_output_embeddings().weight.requires_grad_()
    assert plain_head(inner) is False


def test_a_head_of_another_kind_is_asked_for_its_logits():
    class Odd(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) * 2

    inner = inner_model(tuned_model(LlamaConfig(**COMMON)))
    odd = Odd(32, 64, bias=False).double().requires_grad_(False)
    inner.set_output_embeddings(odd)
    batch = batch_of(5, 7)
    right = inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[batch.at]
    states, head = supervised_states(inner, batch)
    assert head is None and not plain_head(inner)
    torch.testing.assert_close(states, right)
    torch.testing.assert_close(token_losses(inner, batch), torch.nn.functional.cross_entropy(right, batch.targets, reduction="none"))


def test_a_model_without_a_head_of_its_own_is_asked_for_its_logits(monkeypatch):
    inner, batch = inner_model(tuned_model(LlamaConfig(**COMMON))), batch_of(5, 7)
    right = token_losses(inner, batch)
    monkeypatch.setattr(inner, "get_output_embeddings", lambda: None)
    states, head = supervised_states(inner, batch)
    assert head is None and states.shape == (len(batch.at), 64)
    torch.testing.assert_close(token_losses(inner, batch), right)


@pytest.fixture
def one_process():
    "A group of one, in which a tensor can lie in parts."
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_gradients_of_weights_in_parts(one_process):
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    whole, other, x = torch.randn(4, 3), torch.randn(2), torch.randn(5, 4)
    for parts in (False, True):
        weight = torch.nn.Parameter(distribute_tensor(whole, one_process, [Shard(0)]) if parts else whole)
        unused = torch.nn.Parameter(other)
        weight.grad = kept = torch.ones_like(weight)
        given = distribute_tensor(x, one_process, [Shard(1)]) if parts else x
        found = gradients((given @ weight).pow(2).sum(), [weight, unused])
        assert weight.grad is kept and unused.grad is None and found[1] is None and isinstance(found[0], DTensor) == parts
        got = found[0].full_tensor() if parts else found[0]
        torch.testing.assert_close(got, 2 * x.T @ (x @ whole))
    own = distribute_tensor(torch.zeros(4, 3), one_process, [Shard(0)])
    with CommDebugMode() as sent:
        part = part_like(whole, own)
    assert sent.get_total_counts() == 0, "each process has the whole one"
    assert isinstance(part, DTensor) and part.placements == own.placements and torch.equal(part.to_local(), whole)
    assert part_like(whole, whole) is whole and part_like(part, own) is part and part_like(other, own) is other


def test_the_first_blocks_are_computed_again():
    model = tuned_model(LlamaConfig(**COMMON))
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for n, expected in ((1, [True, False]), (2, [True, True]), (0, [False, False]), (0, [False, False]), (5, [True, True])):
        recompute_blocks(model, n)
        assert [block.gradient_checkpointing for block in blocks] == expected
    assert blocks[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}, "the other way loses the gradient of a frozen input"


@pytest.mark.parametrize("names", [("activation",), ("gradient",), ("gradient", "activation")])
def test_both_names_of_checkpointing_are_known(names):
    "Of transformers, which is renaming it; the newer one first."
    told = []
    inner = SimpleNamespace(modules=lambda: [], is_activation_checkpointing=True)
    for name in names:
        setattr(inner, f"{name}_checkpointing_enable", lambda given, name=name: told.append((name, given)))
        setattr(inner, f"{name}_checkpointing_disable", lambda name=name: told.append(name))
    recompute_blocks(inner, 1)
    recompute_blocks(inner, 0)
    assert told == [(names[-1], {"use_reentrant": False}), names[-1]]
    inner.is_activation_checkpointing = False
    recompute_blocks(inner, 0)
    del inner.is_activation_checkpointing
    recompute_blocks(inner, 0)
    assert len(told) == 2


def test_what_needs_autocast():
    def tuned(dtype, one_rounding=True, **options):
        base = LlamaForCausalLM(LlamaConfig(**COMMON)).to(dtype)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options))
        if one_rounding:
            use_one_rounding(model)
        return model

    assert not needs_autocast(tuned(torch.float32)) and not needs_autocast(tuned(torch.float32, one_rounding=False))
    assert needs_autocast(tuned(torch.float16)) and needs_autocast(LlamaForCausalLM(LlamaConfig(**COMMON)).to(torch.float16))
    bf16 = tuned(torch.bfloat16)
    assert not needs_autocast(bf16), "the layers' own forward pass sees to it"
    assert needs_autocast(tuned(torch.bfloat16, one_rounding=False))
    norm = next(p for name, p in bf16.named_parameters() if name.endswith("norm.weight"))
    norm.data = norm.data.float()
    assert not needs_autocast(bf16), "it is frozen"
    norm.requires_grad_()
    assert needs_autocast(bf16)
    for model, dtype, on in ((bf16, torch.bfloat16, True), (tuned(torch.float16), torch.float16, True), (tuned(torch.float32), torch.bfloat16, False)):
        context = mixed_precision(model)
        assert (context.device, context.fast_dtype, context._enabled) == ("cpu", dtype, on)


def test_the_mean_is_over_tokens_and_not_over_batches():
    model = tuned_model(LlamaConfig(**COMMON))
    batches = [batch_of(4), batch_of(20, 9)]
    losses = torch.cat([token_losses(model, batch) for batch in batches])
    mean, count = mean_loss(model, iter(batches))
    assert count == len(losses) == 2 + 18 + 7 and mean == pytest.approx(losses.mean().item(), rel=1e-12)
    assert mean_loss(model, []) == (0.0, 0)


def test_smoothed_forgets_a_fifth_at_each_value():
    assert smoothed([0.0, 1.0]) == pytest.approx([0, 0.2 / 0.36])
    assert smoothed([1, 2, 4], 0.5) == pytest.approx([1, 2.5 / 1.5, 5.25 / 1.75])
