"""Packing changes nothing but the speed: many architectures, in float64, against one chat at a time by transformers itself."""

import hashlib
import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from finetune_nb import packing
from finetune_nb.attention import PACKED, Layout, attention_of
from finetune_nb.chat_template import NO_LOSS
from finetune_nb.config import ConfigError
from finetune_nb.lora import find_target_modules
from finetune_nb.lora_linear import use_one_rounding
from finetune_nb.losses import inner_model, token_losses
from finetune_nb.packing import PackingCollator, PackingReport, check_packing, common_prefix, ordered, pack, pad

COMMON = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0)  # fmt: skip
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
ARCHITECTURES = {  # the configuration, and the mode that it allows
    "llama": (LlamaConfig(**COMMON), "shared"),
    "mistral": (MistralConfig(**COMMON, sliding_window=None, head_dim=8), "shared"),
    "mistral with a window": (MistralConfig(**COMMON, sliding_window=7, head_dim=8), "shared"),
    "qwen2": (Qwen2Config(**COMMON), "shared"),
    "qwen3": (Qwen3Config(**COMMON, head_dim=8), "shared"),
    "gemma2": (Gemma2Config(**COMMON, head_dim=8, sliding_window=7, attn_logit_softcapping=2.0), "shared"),
    "gemma3": (Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=7), "shared"),
    "phi": (PhiConfig(**COMMON), "shared"),
    "phi3": (Phi3Config(**COMMON), "shared"),
    "granite": (GraniteConfig(**COMMON, logits_scaling=3.0, attention_multiplier=0.2), "shared"),
    "cohere": (CohereConfig(**COMMON, logit_scale=0.3), "shared"),
    "gpt-neox": (GPTNeoXConfig(**SMALL, intermediate_size=48, max_position_embeddings=128), "shared"),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128), "padded"),  # drops attention at random in training
    "gpt2 without dropout": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0), "shared"),
    "opt": (OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32, attention_dropout=0.0), "shared"),
    "falcon with alibi": (FalconConfig(**SMALL, alibi=True, new_decoder_architecture=False), "padded"),
    "bloom": (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "padded"),
    "mixtral": (MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2), "shared"),
    "mamba": (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), "padded"),
    "mamba2": (Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=16, n_groups=1), "padded"),
}


def example_chats(seed=0):
    "Five chats: three share 20 tokens, two of these 40, one is another's beginning, one shares nothing."
    rng = random.Random(seed)
    system, more = [rng.randrange(1, 64) for _ in range(20)], [rng.randrange(1, 64) for _ in range(20)]
    ids = [system + more + [5, 6, 7, 8], system + more + [5, 9], system + [rng.randrange(1, 64) for _ in range(9)], system + more, [rng.randrange(1, 64) for _ in range(12)]]
    return [{"input_ids": one, "labels": [NO_LOSS] * 4 + [t if rng.random() < 0.5 or i == len(one) - 5 else NO_LOSS for i, t in enumerate(one[4:])]} for one in ids]


def tuned_model(config):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    base = base if config.model_type == "mixtral" else base.double()  # its experts know no float64
    targets = ["in_proj"] if "mamba" in type(base).__name__.lower() else find_target_modules(base, "attention")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    use_one_rounding(model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def reference(model, chats):
    "Summed loss and gradient by transformers' own forward pass, one chat at a time, every logit computed."
    trained = [p for p in model.parameters() if p.requires_grad]
    losses, total = [], [torch.zeros_like(p) for p in trained]
    for chat in chats:
        logits = model(torch.tensor([chat["input_ids"]]), use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(chat["labels"][1:]), reduction="sum")
        losses.append(loss.item())
        for one, part in zip(total, torch.autograd.grad(loss, trained, allow_unused=True), strict=True):
            if part is not None:
                one += part
    return losses, total


def computed(model, chats, batches):
    trained = [p for p in model.parameters() if p.requires_grad]
    losses, total = torch.zeros(len(chats), dtype=torch.double), [torch.zeros_like(p) for p in trained]
    for batch in batches:
        found = token_losses(model, batch)
        losses.index_add_(0, batch.chat, found.detach().double())
        for one, part in zip(total, torch.autograd.grad(found.sum(), trained, allow_unused=True), strict=True):
            if part is not None:
                one += part
    return losses.tolist(), total


@pytest.mark.parametrize("way", ["tree", "masked"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_is_exact_in_its_mode(name, way):
    config, expected = ARCHITECTURES[name]
    model, chats = tuned_model(config), example_chats()
    report = check_packing(model, chats, ways=(way,))
    assert report.mode == expected and report.way == way, str(report)
    model.eval()
    losses, gradient = reference(model, chats)
    for max_tokens in (10**6, 60):  # in one row, and in several
        collator = PackingCollator(report.mode, max_tokens, way=way)
        with collator.attention(model):
            mine, my_gradient = computed(model, chats, collator.batches(chats))
        assert mine == pytest.approx(losses, rel=1e-7 if model.dtype == torch.double and expected == "shared" else 1e-5)
        scale = max(g.abs().max() for g in gradient)
        assert max((a - b).abs().max() for a, b in zip(gradient, my_gradient, strict=True)) < 1e-5 * scale


def test_dropout_and_checkpointing_leave_packing_exact():
    "Recomputed in the backward pass, the layout is still there."
    model, chats = tuned_model(LlamaConfig(**COMMON)), example_chats()
    losses, gradient = reference(model, chats)
    model.enable_input_require_grads()
    inner_model(model).gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with attention_of(inner_model(model), PACKED["tree"]):
        mine, my_gradient = computed(model, chats, pack(chats, 10**6))
    assert mine == pytest.approx(losses, rel=1e-7)
    assert max((a - b).abs().max() for a, b in zip(gradient, my_gradient, strict=True)) < 1e-6 * max(g.abs().max() for g in gradient)


def test_long_chats_are_computed_in_blocks():
    "Longer than a block of queries and than the keys whose probabilities are kept."
    config = LlamaConfig(**(COMMON | {"max_position_embeddings": 2048}))
    rng = random.Random(1)
    system = [rng.randrange(1, 64) for _ in range(300)]
    ids = [system + [rng.randrange(1, 64) for _ in range(n)] for n in (5, 400, 700)]
    chats = [{"input_ids": one, "labels": [NO_LOSS] * 10 + one[10:]} for one in ids]
    model = tuned_model(config)
    losses, gradient = reference(model, chats)
    with attention_of(inner_model(model), PACKED["tree"]):
        mine, my_gradient = computed(model, chats, pack(chats, 10**6))
    assert mine == pytest.approx(losses, rel=1e-7)
    assert max((a - b).abs().max() for a, b in zip(gradient, my_gradient, strict=True)) < 1e-6 * max(g.abs().max() for g in gradient)


texts = st.lists(st.integers(1, 2), min_size=1, max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.lists(texts, min_size=1, max_size=8), st.sampled_from([1, 20, 50, 10**6]), st.booleans())
def test_every_chat_is_in_its_rows_whole(ids, max_tokens, share):
    "Walked back along the tree, each prediction has its own chat before it, and none is lost or made twice."
    chats = [{"input_ids": one, "labels": one} for one in ids]
    seen = []
    for batch in pack(chats, max_tokens, share):
        mask, row = batch.layout.mask(), batch.input_ids[0]
        if len({*batch.chat.tolist()}) > 1:
            assert batch.tokens <= max_tokens
        for place, target, number in zip(batch.at.tolist(), batch.targets.tolist(), batch.chat.tolist(), strict=True):
            before = row[mask[place]].tolist()
            position = batch.position_ids[0, place].item()
            assert before == ids[number][: position + 1] and target == ids[number][position + 1]
            assert batch.position_ids[0][mask[place]].tolist() == list(range(position + 1))
            seen.append((number, position))
    assert sorted(seen) == [(n, i) for n, one in enumerate(ids) for i in range(len(one) - 1)]


def test_sharing_pays_and_rows_are_even():
    rng = random.Random(0)
    system = [rng.randrange(1000) for _ in range(800)]
    chats = [{"input_ids": system + [rng.randrange(1000) for _ in range(60)], "labels": [1] * 860} for _ in range(16)]
    assert sum(b.tokens for b in pack(chats, 10**6)) == 800 + 16 * 60
    sizes = [b.tokens for b in pack(chats, 1300)]
    assert len(sizes) == 2 and max(sizes) - min(sizes) <= 60
    assert sum(b.tokens for b in pack(chats, 10**6, share_prefixes=False)) == 16 * 860
    assert all(b.tokens <= 2000 for b in pad(chats, 2000)) and len(pad(chats, 2000)) == 8


def test_a_model_that_sees_its_neighbours_is_found_out(monkeypatch):
    "The mask taken away, as in packing without one: the comparison has to notice, in float64 and in bf16."
    from finetune_nb import packing
    from finetune_nb.attention import Layout, Segment

    right = packing._packed

    def leaky(*args):
        row = right(*args)
        row.layout = Layout([Segment(0, row.tokens)])
        return row

    monkeypatch.setattr(packing, "_packed", leaky)
    for dtype in (torch.double, torch.bfloat16):
        model = tuned_model(LlamaConfig(**COMMON)).to(dtype)
        report = check_packing(model, example_chats())
        assert report.mode == "padded" and "not exact" in report.differences["shared"]


@pytest.mark.parametrize("fastest", ["shared", "padded", "single"])
def test_chats_without_a_label_are_an_error_in_words(fastest):
    model, chats = tuned_model(LlamaConfig(**COMMON)), example_chats()[:2]
    masked = [{"input_ids": chat["input_ids"], "labels": [chat["input_ids"][0]] + [NO_LOSS] * (len(chat["labels"]) - 1)} for chat in chats]  # the first token is never predicted
    for none in (masked, []):
        with pytest.raises(ConfigError, match=f"None of the {len(none)} chats has a label.*train_on"):
            check_packing(model, none, fastest)
    check_packing(model, [masked[0], chats[1]], fastest)


def test_ways_are_measured_and_one_that_fails_is_left_out(monkeypatch, tmp_path):
    "And what was measured stays so: a choice that changes with the clock would change the last bits of a run."
    from finetune_nb import attention
    from finetune_nb.packing import fastest_ways, measured_ways

    model, chats = tuned_model(LlamaConfig(**COMMON)), example_chats()
    (row,) = pack(chats, 10**6)
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "one"))
    assert sorted(measured_ways(model, row)) == ["masked", "tree"], "FlexAttention has no backward pass on a CPU"
    slow = attention._tree

    def slower(*args):
        for _ in range(20):
            slow(*args)
        return slow(*args)

    monkeypatch.setitem(attention.WAYS, "tree", slower)
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "two"))
    assert measured_ways(model, row)[0] == "masked"
    assert fastest_ways(model, row) == ["tree", "masked"], "on a CPU no clock decides about the last bit"
    monkeypatch.setitem(attention.WAYS, "tree", slow)
    assert measured_ways(model, row)[0] == "masked", "as it was"
    (kept,) = tmp_path.glob("two/attention/*.json")
    for damaged in ('["masked", "gone"]', "["):
        kept.write_text(damaged)
        assert sorted(measured_ways(model, row)) == ["masked", "tree"] == sorted(json.loads(kept.read_text()))
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "three"))

    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(attention.WAYS, "masked", broken)
    assert measured_ways(model, row) == ["tree"]
    assert measured_ways(model, pad(chats, 100)[0]) == ["tree"], "rows of their own have no layout"


def test_a_way_that_is_not_exact_gives_way_to_the_next(monkeypatch):
    from finetune_nb import attention

    wrong = attention._masked
    monkeypatch.setitem(attention.WAYS, "masked", lambda *args: wrong(*args[:3], attention.Layout([attention.Segment(0, len(args[3].last))]), *args[4:]))
    report = check_packing(tuned_model(LlamaConfig(**COMMON)), example_chats(), ways=("masked", "tree"))
    assert (report.mode, report.way) == ("shared", "tree") and "not exact" in report.differences["shared"], str(report)


def test_logits_that_are_scaled_under_another_name_are_seen(monkeypatch):
    "The last layer's product is used only where it is the logits."
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    right = LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        out = right(self, *args, **kwargs)
        out.logits = out.logits * 3
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    model, chats = tuned_model(LlamaConfig(**COMMON)), example_chats()
    losses, _ = reference(model, chats)
    with attention_of(inner_model(model), PACKED["tree"]):
        assert computed(model, chats, pack(chats, 10**6))[0] == pytest.approx(losses, rel=1e-6)


# --- the pieces, each by itself


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 127, 128, 200])
def test_a_common_beginning_is_counted_to_the_token(n):
    same = list(range(n))
    assert common_prefix(same, same) == n == common_prefix(same + [1000], same) == common_prefix(same, same + [1000]) == common_prefix(same + [1000, 3], same + [1001, 3])
    assert common_prefix([1000, *same], [1001, *same]) == 0


@pytest.mark.parametrize(("shared", "tokens"), [(15, 34), (16, 20), (17, 21)])
def test_a_beginning_is_shared_from_sixteen_tokens_on(shared, tokens):
    chats = [{"input_ids": [*range(shared), *end], "labels": [*range(shared), *end]} for end in ([50, 51], [60, 61])]
    (row,) = pack(chats, 10**6)
    assert row.tokens == tokens and row.input_ids[0].tolist() == ([*range(shared), 50, 51] + ([] if shared > 15 else [*range(shared)]) + [60, 61])
    assert row.position_ids[0].tolist() == [*range(shared + 2), *(range(shared, shared + 2) if shared > 15 else range(shared + 2))]
    assert PackingCollator().sizes(chats) == [tokens] and PackingCollator("packed").sizes(chats) == [2 * shared + 4]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 15, 16, 17, 40]), st.sampled_from([16, 17, 30]), st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=9), st.sampled_from([1, 60, 90, 200, 10**6]), st.sampled_from(packing.MODES))
def test_sizes_are_those_of_the_batches(parts, max_tokens, mode):
    "Trees of beginnings in beginnings; what each mode predicts is the same."
    chats = [{"input_ids": [7] * a + [8] * b + [n] * c, "labels": [NO_LOSS] * a + [8] * b + [n] * c} for a, b, c, n in parts]
    collator = PackingCollator(mode, max_tokens, pad_token_id=9)
    batches = collator.batches(chats)
    sizes = [batch.tokens for batch in batches]
    assert collator.sizes(chats) == sizes and collator.computed(chats) == sum(sizes)
    assert all(size <= max_tokens or len(set(batch.chat.tolist())) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert sum(sizes) <= sum(len(chat["input_ids"]) for chat in chats) or mode == "padded"
    found = sorted((n, t) for batch in batches for n, t in zip(batch.chat.tolist(), batch.targets.tolist(), strict=True))
    assert found == sorted((n, t) for n, chat in enumerate(chats) for t in chat["labels"][1:] if t != NO_LOSS)
    whole = collator(chats)
    assert whole["supervised"] == len(found) and whole["tokens"] == sum(len(chat["input_ids"]) for chat in chats) and whole["chats"].rows is chats
    assert whole["sha256"] == hashlib.sha256(str([chat["input_ids"] for chat in chats]).encode()).hexdigest() and len(whole["batches"]) == len(batches)


def test_rows_are_as_few_and_as_even_as_can_be():
    def sizes(lengths, max_tokens):
        return [batch.tokens for batch in pack([{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths, 1)], max_tokens, False)]

    assert sizes([10] * 8, 70) == [40, 40] and sizes([10] * 7, 70) == [70] and sizes([10] * 7, 69) == [40, 30]
    assert sizes([30, 10, 20], 30) == [30, 30] and sizes([50, 10], 30) == [10, 50]
    assert [sizes([1] * n, 10**6) for n in (256, 257, 300)] == [[256], [129, 128], [151, 149]], "no more than 256 chats in a row"
    assert pack([], 10) == [] and PackingCollator().sizes([]) == []


def test_rows_of_their_own_are_filled_up_at_the_end():
    chats = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5, 6], "labels": [3, NO_LOSS, 5, 6]}, {"input_ids": [7, 8, 9], "labels": [7, NO_LOSS, 9]}]
    first, second = pad(chats, 8, pad_token_id=60)
    assert first.input_ids.tolist() == [[3, 4, 5, 6], [7, 8, 9, 60]] and first.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert (first.at.tolist(), first.targets.tolist(), first.chat.tolist()) == ([1, 2, 5], [5, 6, 9], [1, 1, 2]) and first.position_ids is first.layout is None
    assert second.input_ids.tolist() == [[1, 2]] and (second.at.tolist(), second.targets.tolist(), second.chat.tolist()) == ([0], [2], [0])
    assert [len(batch.input_ids) for batch in pad(chats, 7)] == [1, 2] and [len(batch.input_ids) for batch in pad(chats, 12)] == [3]
    assert [batch.tokens for batch in PackingCollator("single").batches(chats)] == [4, 3, 2] and pad(chats, 8)[0].input_ids[1, 3] == 0


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        ({"tree": 1.0, "masked": 0.9}, ["tree", "masked"]),  # less than a fifth better
        ({"tree": 1.0, "masked": 0.79}, ["masked", "tree"]),
        ({"tree": 1.0, "masked": 0.8}, ["masked", "tree"]),
        ({"masked": 2.0, "flex": 1.0}, ["flex", "masked"]),
        ({"masked": 0.9, "flex": 0.85, "tree": 1.0}, ["tree", "flex", "masked"]),
        ({}, []),
    ],
)
def test_another_way_has_to_be_a_fifth_faster(seconds, order):
    assert ordered(seconds) == order


def test_how_far_losses_and_gradients_differ():
    chats = [{"labels": [1, 2, 3]}, {"labels": [1, NO_LOSS, NO_LOSS]}]
    t = torch.tensor
    assert packing._difference(t([2.0, 2.0]), t([2.0, 2.0]), chats) == 0
    assert packing._difference(t([2.0, 2.0]), t([2.0, 3.0]), chats) == pytest.approx(0.25), "over all"
    assert packing._difference(t([2.0, 2.0]), t([1.7, 2.3]), chats) == pytest.approx(0.05), "a third of the largest, where they make up for each other"
    assert packing._difference(t([0.1, 10.0]), t([0.16, 9.94]), chats) == pytest.approx(0.06 / 0.2 / 3), "relative to a tenth of a nat for each of two tokens"
    assert packing._difference(t([10.0, 0.01]), t([9.94, 0.07]), chats) == pytest.approx(0.06 / 0.1 / 3), "of one, where nothing is learned"
    assert packing._difference(t([0.0, 0.0]), t([0.0, 1e-6]), chats) == pytest.approx(1)
    one, other = [t([3.0, 0.0]), t([[4.0]])], [t([0.0, 5.0]), t([[0.0]])]
    assert packing._angle(one, one) == 0 and packing._angle(one, other) == pytest.approx(1)
    assert packing._angle(one, [t([-3.0, 0.0]), t([[-4.0]])]) == pytest.approx(2)
    assert packing._angle(one, [t([6.0, 0.0]), t([[8.0]])]) == pytest.approx(0.5), "twice as long"
    assert packing._angle(one, [t([3.3, 0.0]), t([[4.4]])]) == pytest.approx(0.005)
    nothing = [t([0.0, 0.0]), t([[0.0]])]
    assert all(angle != angle for angle in (packing._angle(one, nothing), packing._angle(nothing, one)))


def test_a_model_is_stirred_and_left_as_it_was():
    base = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    halves = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    kept = next(iter(halves))
    halves[kept].data.fill_(0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError), packing._stirred(model):
            assert not model.training and all(0.001 < p.std() < 0.02 for name, p in halves.items() if name != kept)
            assert (halves[kept] == 0.5).all() and all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name not in halves)
            torch.rand(3)
            raise RuntimeError
        assert model.training is training and torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("mode", "words"), [("shared", "packed, common beginnings computed once"), ("packed", "packed, common beginnings computed for each chat"), ("padded", "filled up to the longest of those at once"), ("single", "one chat at a time")])
def test_a_report_says_the_mode_and_why(mode, words):
    assert str(PackingReport(mode, {"shared": "not possible: x", "packed, masked": "exact"})) == f"Chats are {words}.\n  shared: not possible: x\n  packed, masked: exact"


def test_what_was_tried_is_told():
    model, chats = tuned_model(LlamaConfig(**COMMON)), example_chats()[:2]
    model.train()
    exact = r"loss differs by \d\.\de[-+]\d\d, gradient by \d\.\de[-+]\d\d \(1 - cosine\): exact"
    for fastest, ways, name in (("shared", ("tree",), "shared"), ("packed", ("masked", "tree"), "packed"), ("padded", ("tree", "masked"), "padded")):
        report = check_packing(model, chats, fastest, ways=ways)
        assert (report.mode, report.way, list(report.differences)) == (fastest, ways[0], [name]) and re.fullmatch(exact, report.differences[name])
    assert check_packing(model, chats, "single") == PackingReport("single", {}) and model.training
    refusing = tuned_model(LlamaConfig(**COMMON, attention_dropout=0.5))
    report = check_packing(refusing, chats, ways=("tree", "masked"))
    assert report.mode == "padded" and list(report.differences) == ["shared", "shared, masked", "packed", "packed, masked", "padded"]
    assert all(said.startswith("not possible: ") and "does not take it" not in said for name, said in report.differences.items() if name != "padded")


def test_one_chat_at_a_time_is_what_remains(monkeypatch):
    monkeypatch.setattr(packing, "_difference", lambda *given: 1.0)
    report = check_packing(tuned_model(LlamaConfig(**COMMON)), example_chats()[:2])
    assert (report.mode, report.way, list(report.differences)) == ("single", "tree", ["shared", "packed", "padded"])
    assert all("loss differs by 1.0e+00" in said and said.endswith("not exact") for said in report.differences.values())


def test_chats_that_see_each_other_a_little_are_not_exact_on_a_cpu(monkeypatch):
    monkeypatch.setattr(packing, "_leak", lambda *given: 1e-7)
    report = check_packing(tuned_model(LlamaConfig(**COMMON)), example_chats()[:2])
    assert report.mode == "padded" and all(said.endswith("not exact; other tokens in the other chats change a loss by 1.0e-07") for name, said in report.differences.items() if name != "padded")


def test_experts_are_known_by_their_names(monkeypatch):
    kinds = [type(name, (torch.nn.Module,), {}) for name in ("MyMoEBlock", "Experts", "Dense")]
    assert [packing._has_experts(torch.nn.Sequential(torch.nn.Linear(1, 1), kind())) for kind in kinds] == [True, True, False]
    monkeypatch.setattr(packing, "_kept_ways", lambda asked: [])
    assert packing.measured_ways(tuned_model(LlamaConfig(**COMMON)), pack(example_chats(), 10**6)[0]) == ["tree"], "where none could be measured"


def test_which_heads_a_model_has():
    models = {"llama": (4, 2), "gpt2": (4, 4), "mamba": (1, 1)}
    assert {name: packing._heads_of(AutoModelForCausalLM.from_config(ARCHITECTURES[name][0])) for name in models} == models


def test_ways_are_measured_for_the_shape_of_the_model(monkeypatch):
    asked = []
    monkeypatch.setattr(packing, "_kept_ways", lambda given: asked.append(given) or ["masked"])
    (row,) = pack(example_chats(), 10**6)
    for config, shape in ((LlamaConfig(**COMMON, head_dim=16), (4, 2, 16)), (ARCHITECTURES["gpt2"][0], (4, 4, 8))):
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        assert packing.measured_ways(model, row, 7) == ["masked"] and asked.pop() == (*shape, row.layout, torch.device("cpu"), torch.bfloat16, 14)
        packing.measured_ways(model, row)
        assert asked.pop()[-1] == 200
        for unfit in (pad(example_chats(), 10**6)[0],):
            assert packing.measured_ways(model, unfit) == packing.fastest_ways(model, unfit) == ["tree"] and not asked
    odd = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    odd.config.num_key_value_heads = 3
    assert packing.measured_ways(odd, row) == packing.fastest_ways(odd, row) == ["tree"] and not asked
    monkeypatch.setattr(packing, "inner_model", lambda model: model)
    elsewhere = SimpleNamespace(device=torch.device("meta"), dtype=torch.bfloat16, config=model.config)
    assert packing.fastest_ways(elsewhere, row, 3) == ["masked"] and asked.pop()[-3:] == (torch.device("meta"), torch.bfloat16, 6)


def test_what_was_measured_is_kept_for_the_like_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path))
    measured, (row, other) = [], (pack(example_chats(seed), 10**6)[0].layout for seed in (0, 1))
    monkeypatch.setattr(packing, "seconds_by_way", lambda *asked: measured.append(asked) or {"tree": 2.0, "masked": 1.0})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU of number {device.index}")
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    different = [(4, 2, 8, row, cpu, bf16, 100), (2, 2, 8, row, cpu, bf16, 100), (4, 1, 8, row, cpu, bf16, 100), (4, 2, 16, row, cpu, bf16, 100), (4, 2, 8, Layout(row.segments[:2]), cpu, bf16, 100), (4, 2, 8, row, cpu, torch.float32, 100), (4, 2, 8, row, cpu, bf16, 1), (4, 2, 8, row, torch.device("cuda", 0), bf16, 100), (4, 2, 8, row, torch.device("cuda", 1), bf16, 100)]
    for n, asked in enumerate(different, 1):
        assert packing._kept_ways(asked) == packing._kept_ways(asked) == ["masked", "tree"] and measured[-1] == asked and len(measured) == n
    for patch in (lambda: monkeypatch.setattr(torch, "__version__", "9"), lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 99), lambda: monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")):
        patch()
        packing._kept_ways(different[0]), packing._kept_ways(different[0])
    assert len(measured) == len(different) + 3 == len(list((tmp_path / "attention").glob("*.json")))
    assert {path.read_text() for path in (tmp_path / "attention").iterdir()} == {'["masked", "tree"]'}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "file"))
    assert packing._kept_ways(different[0]) == ["masked", "tree"], "nothing can be kept there"
    assert packing._kept_ways((*different[0][:3], other, *different[0][4:])) == ["masked", "tree"]


def test_attention_is_exchanged_for_rows_of_several_chats_alone():
    model = tuned_model(LlamaConfig(**COMMON))
    before = inner_model(model).config._attn_implementation
    for mode, name in (("shared", PACKED["masked"]), ("packed", PACKED["masked"]), ("padded", before), ("single", before)):
        with PackingCollator(mode, way="masked").attention(model):
            assert inner_model(model).config._attn_implementation == name
    assert inner_model(model).config._attn_implementation == before != PACKED["masked"]


@pytest.mark.parametrize("mode", packing.MODES)
def test_chats_without_a_label_make_batches_without_a_prediction(mode):
    (batch, *_) = PackingCollator(mode).batches([{"input_ids": [1, 2], "labels": [NO_LOSS] * 2}])
    assert [(t.dtype, tuple(t.shape)) for t in (batch.at, batch.targets, batch.chat)] == [(torch.long, (0,))] * 3


@pytest.mark.parametrize("mode", packing.MODES)
def test_losses_and_gradient_are_those_of_transformers(mode):
    model, chats = tuned_model(LlamaConfig(**COMMON)), example_chats()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    losses, gradient = reference(model, chats)
    mine, my_gradient = packing._losses_and_gradient(model, chats, PackingCollator(mode, 60))
    assert mine.dtype == torch.float64 and mine.tolist() == pytest.approx(losses, rel=1e-7)
    scale = max(g.abs().max() for g in gradient)
    assert scale > 0 and max((a - b).abs().max() for a, b in zip(my_gradient, gradient, strict=True)) < 1e-6 * scale


def test_a_leak_is_seen_and_how_large_it_is(monkeypatch):
    "Zero to the bit where a chat sees itself alone; what it must not see is every token but its own."
    model, chats, collator = tuned_model(LlamaConfig(**COMMON)).eval(), example_chats(), PackingCollator("shared", 10**6)
    assert packing._leak(model, chats, collator) == 0.0
    seen, real = [], packing.token_losses
    monkeypatch.setattr(packing, "token_losses", lambda model, batch: seen.append(batch) or real(model, batch) + 0.25 * (len(seen) - 1))
    (batch,) = collator.batches(chats)
    learned = (batch.chat == batch.chat[-1]).sum().item()
    leak = packing._leak(model, chats, collator)
    with collator.attention(model):
        loss = real(model, batch)[batch.chat == batch.chat[-1]].sum().item()
    assert leak == pytest.approx(0.25 * learned / loss)
    last = batch.layout.segments[-1]
    own = [i for start, end in (*last.before, (last.start, last.end)) for i in range(start, end)]
    assert torch.equal(seen[0].input_ids, batch.input_ids) and torch.equal(seen[1].input_ids[0, own], batch.input_ids[0, own]) and 0 < len(own) < batch.tokens
    assert {*seen[1].input_ids[0, [i for i in range(batch.tokens) if i not in own]].tolist()} == {batch.input_ids[0, 0].item()}


def test_what_an_architecture_has_against_a_mode_is_told(monkeypatch):
    real = packing._try_in_training
    errors = {"shared": packing.NotPackable("it has no place for it\nand more"), "packed": KeyError("x" * 200), "padded": RuntimeError("odd")}

    def refuse(model, chat, collator):
        real(model, chat, collator)
        model.train()
        raise errors[collator.mode]

    monkeypatch.setattr(packing, "_try_in_training", refuse)
    model, modes = tuned_model(LlamaConfig(**COMMON)).eval(), []
    report = check_packing(model, example_chats()[:2])
    assert report == PackingReport("single", {"shared": "not possible: it has no place for it", "packed": f"not possible: this architecture does not take it ({KeyError('x' * 200)!r:.100})", "padded": "not possible: this architecture does not take it (RuntimeError('odd'))"})
    assert not model.training
    errors["shared"] = torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError):
        check_packing(model, example_chats()[:2])
    monkeypatch.setattr(packing, "_try_in_training", lambda model, chat, collator: modes.append(model.train()) or real(model, chat, collator))
    assert check_packing(model, example_chats()[:2]).mode == "shared" and len(modes) == 1 and not model.training


def test_low_precision_is_held_against_the_attention_of_equal_steps(monkeypatch):
    "In bf16 fused attention rounds otherwise than a tree does; each chat alone is then computed step by step, too."
    used, real = [], packing.attention_of
    monkeypatch.setattr(packing, "attention_of", lambda model, name: used.append(name) or real(model, name))
    for dtype, way, fastest, names in ((torch.bfloat16, "tree", "shared", ["eager"]), (torch.bfloat16, "masked", "shared", []), (torch.double, "tree", "shared", []), (torch.bfloat16, "tree", "padded", [])):
        used.clear()
        model = tuned_model(LlamaConfig(**COMMON)).to(dtype)
        check_packing(model, example_chats()[:2], fastest, ways=(way,))
        assert [name for name in used if name not in PACKED.values()] == names


def test_how_exact_a_mode_has_to_be(monkeypatch):
    model, chats, far = tuned_model(LlamaConfig(**COMMON)), example_chats()[:2], {}
    for name in ("_difference", "_angle", "_leak"):
        monkeypatch.setattr(packing, name, lambda *given, name=name: far.get(name, 0.0))
    monkeypatch.setattr(packing, "_has_experts", lambda model: far.get("experts", False))

    def exact(dtype=torch.double, **off):
        far.clear()
        far.update(off)
        return check_packing(model.to(dtype), chats).mode == "shared"

    assert exact(_difference=1e-5, _angle=1e-8) and not exact(_difference=1.1e-5) and not exact(_angle=1.1e-8) and not exact(_leak=1e-9)
    assert exact(_leak=1e-5, experts=True) and not exact(_leak=1.1e-5, experts=True)
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(packing, "_losses_and_gradient", lambda *given: (torch.ones(2), []))
        monkeypatch.setattr(packing, "_try_in_training", lambda *given: None)
        assert exact(dtype, _difference=5e-3, _angle=1e-3) and not exact(dtype, _difference=5.1e-3) and not exact(dtype, _angle=1.1e-3) and exact(dtype, _leak=5e-3, experts=True)
