"""Packing changes nothing but the speed: many architectures, in float64, against one chat at a time by transformers itself."""

import json
import random

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

from finetune_nb.attention import PACKED, attention_of
from finetune_nb.chat_template import NO_LOSS
from finetune_nb.config import ConfigError
from finetune_nb.lora import find_target_modules
from finetune_nb.lora_linear import use_one_rounding
from finetune_nb.losses import inner_model, token_losses
from finetune_nb.packing import PackingCollator, check_packing, pack, pad

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
    from finetune_nb.packing import fastest_ways

    model, chats = tuned_model(LlamaConfig(**COMMON)), example_chats()
    (row,) = pack(chats, 10**6)
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "one"))
    assert sorted(fastest_ways(model, row)) == ["masked", "tree"], "FlexAttention has no backward pass on a CPU"
    slow = attention._tree

    def slower(*args):
        for _ in range(20):
            slow(*args)
        return slow(*args)

    monkeypatch.setitem(attention.WAYS, "tree", slower)
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "two"))
    assert fastest_ways(model, row)[0] == "masked"
    monkeypatch.setitem(attention.WAYS, "tree", slow)
    assert fastest_ways(model, row)[0] == "masked", "as it was"
    (kept,) = tmp_path.glob("two/attention/*.json")
    for damaged in ('["masked", "gone"]', "["):
        kept.write_text(damaged)
        assert sorted(fastest_ways(model, row)) == ["masked", "tree"] == sorted(json.loads(kept.read_text()))
    monkeypatch.setenv("FINETUNE_NB_CACHE", str(tmp_path / "three"))

    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(attention.WAYS, "masked", broken)
    assert fastest_ways(model, row) == ["tree"]
    assert fastest_ways(model, pad(chats, 100)[0]) == ["tree"], "rows of their own have no layout"


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
