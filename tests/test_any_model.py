"""Architectures, settings and data out of the common way, from the plan to the run."""

import importlib.util
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, small_tokenizer
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
)

from finetune_nb import planning
from finetune_nb.data import Splits
from finetune_nb.lora import AdapterError, add_lora, load_adapter
from finetune_nb.losses import inner_model, mean_loss, token_losses
from finetune_nb.models import ModelError, load_model
from finetune_nb.packing import PackingCollator, check_packing, pack
from finetune_nb.planning import PlanError, estimate, largest_batch, shape_of
from finetune_nb.training import _telling_chats, load_base, train

TOKENS = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=2)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SHAPES = {
    "gpt2 with dropout": GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "bloom": BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4),
    "mixtral": MixtralConfig(**TOKENS, **SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def plain(ids):
    return {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]}


@pytest.mark.parametrize("kind", SHAPES)
def test_what_takes_no_row_of_chats_is_planned_and_trained_all_the_same(kind, chats, quick, tmp_path):
    folder = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[kind]).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    config = replace(quick, model_name_or_path=str(folder), num_train_epochs=1, target_modules="attention")
    run = train(config, Splits(chats[:16], chats[16:20], []))
    assert run.facts["packing"] == ("shared" if kind == "mixtral" else "padded")
    assert run.facts["planned"]["before_the_probe_gib"] > 0 and math.isfinite(run.facts["best_eval_loss"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_that_reaches_into_the_next_chat_is_seen(dtype):
    torch.manual_seed(0)
    config = Lfm2Config(**{**TOKENS, **SMALL, "vocab_size": 64}, layer_types=["conv", "full_attention"])
    model = add_lora(AutoModelForCausalLM.from_config(config, dtype=dtype), planning.FinetuneConfig(r=2, target_modules="attention"))
    rng = random.Random(0)
    beginning = [rng.randrange(3, 64) for _ in range(20)]
    report = check_packing(model, [plain(beginning + [rng.randrange(3, 64) for _ in range(n)]) for n in (12, 20)])
    assert report.mode in ("padded", "single"), str(report)
    assert "other tokens in the other chats change a loss" in str(report)


def test_positions_that_depend_on_the_longest_chat_in_a_row_are_seen():
    "Long RoPE counts otherwise from a length on, for all that is computed at once; so the longest chat is always looked at."
    torch.manual_seed(0)
    long = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 64}
    shape = Phi3Config(**{**TOKENS, **SMALL, "vocab_size": 64}, max_position_embeddings=512, original_max_position_embeddings=64, rope_parameters=long)
    model = add_lora(AutoModelForCausalLM.from_config(shape), planning.FinetuneConfig(r=2, target_modules="attention"))
    rng = random.Random(0)
    rows = Dataset.from_list([plain([rng.randrange(3, 64) for _ in range(n)]) for n in (30, 20, 40, 90)])
    telling = _telling_chats(rows)
    assert [len(row["input_ids"]) for row in telling] == [30, 90]
    assert check_packing(model, telling).mode not in ("shared", "packed")
    assert [len(row["input_ids"]) for row in _telling_chats(rows.select([3, 1]))] == [20, 90]
    assert len(_telling_chats(rows.select([0]))) == 1


@pytest.mark.parametrize("budget", [512, 1024, 4096])
def test_no_row_holds_more_than_the_budget(budget):
    rng = random.Random(0)
    beginnings = [[rng.randrange(100) for _ in range(30)] for _ in range(3)]
    chats = [plain(rng.choice(beginnings) + [rng.randrange(3) for _ in range(rng.randrange(2, 40))]) for _ in range(256)]
    batches = pack(chats, budget)
    assert max(batch.tokens for batch in batches) <= budget
    assert sorted(set(torch.cat([batch.chat for batch in batches]).tolist())) == list(range(256))


def test_the_largest_batch_is_one_of_chats_that_share_little(quick):
    rng = random.Random(0)
    common = [rng.randrange(9) for _ in range(990)]
    rows = [plain(common + [rng.randrange(9) for _ in range(10)]) for _ in range(32)]
    rows += [plain([rng.randrange(9) for _ in range(900)]) for _ in range(40)]
    config = replace(quick, per_device_train_batch_size=16)
    largest = largest_batch(rows, config, 4096).tokens
    steps = [rng.sample(rows, 16) for _ in range(20)]
    assert largest >= max(batch.tokens for step in steps for batch in PackingCollator("shared", 4096).batches(step)) - 900 > 2000


@pytest.mark.parametrize("kind", ["gemma2", "granite", "trained head"])
def test_logits_are_computed_at_the_supervised_places_alone(kind, rows):
    small = {**TOKENS, **SMALL, "vocab_size": 49152}
    shape = Gemma2Config(**small, head_dim=8) if kind == "gemma2" else GraniteConfig(**small, logits_scaling=3.0) if kind == "granite" else LlamaConfig(**small)
    model = add_lora(AutoModelForCausalLM.from_config(shape), planning.FinetuneConfig(modules_to_save=["lm_head"] if kind == "trained head" else [], lora_dropout=0)).eval()
    batch, seen = PackingCollator("padded").batches(rows[:3])[0], []
    whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    handle = inner_model(model).get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape))
    found = token_losses(model, batch)
    handle.remove()
    assert seen[-1] == (1, len(batch.at), 49152)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(whole[batch.at], batch.targets, reduction="none"))


def test_a_norm_that_is_trained_whole_learns_in_bf16_and_on_a_base_that_was_used_before(quick, rows):
    config = replace(quick, modules_to_save=["norm"], lora_dropout=0)
    base = load_base(replace(quick, bf16=True))[0]
    model = add_lora(add_lora(base, replace(quick, lora_dropout=0)).unload(), config)
    norms = [p for name, p in model.named_parameters() if p.requires_grad and "norm" in name]
    assert norms and all(p.dtype == torch.float32 for p in norms), "a small update is lost in bf16"
    before = [p.detach().clone() for p in norms]
    optimizer = torch.optim.AdamW(norms, lr=2e-4)
    with planning.mixed_precision(model):
        token_losses(model, PackingCollator("padded").batches(rows[:4])[0]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in norms)
    optimizer.step()
    assert all((p - b).abs().max() > 1e-4 for p, b in zip(norms, before, strict=True))


def test_what_is_trained_whole_comes_back_in_the_precision_that_it_was_trained_in(quick, rows, tmp_path):
    config = replace(quick, bf16=True, modules_to_save=["norm"], lora_dropout=0)
    model = add_lora(load_base(config)[0], config).eval()
    for name, p in model.named_parameters():
        if p.requires_grad and "norm" in name:
            p.data += 1e-4  # less than bf16 can tell from 1
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load_adapter(load_base(config)[0], tmp_path / "adapter")
    batches = PackingCollator("padded").batches(rows[:4])
    assert mean_loss(again, batches) == mean_loss(model, batches)
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in model.named_parameters() if "modules_to_save" in name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3}, "init_lora_weights"),
        ({"modules_to_save": ["self_attn"]}, "modules_to_save"),
    ],
)
def test_what_peft_refuses_is_said_in_words(change, said, quick):
    with pytest.raises(AdapterError, match=f"PEFT can't make this adapter: .*{said}"):
        add_lora(load_base(quick)[0], replace(quick, **change))


def test_experts_and_dropout_do_not_go_together(quick):
    shape = DeepseekV3Config(
        **TOKENS, **{**SMALL, "num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=0, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    with pytest.raises(AdapterError, match="set lora_dropout to 0"):
        add_lora(model, replace(quick, target_modules="all-linear", lora_dropout=0.05))


def test_a_missing_attention_kernel_is_named(tiny_model):
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash_attn is here")
    with pytest.raises(ModelError, match="can't be loaded as asked.*attn_implementation"):
        load_model(tiny_model, torch.float32, "flash_attention_2", use_cpu=True)


def test_a_plan_of_nothing_or_with_nonsense_says_so(quick, rows):
    with pytest.raises(PlanError, match="no chats"):
        estimate(quick, [])
    with pytest.raises(PlanError, match="speed"):
        estimate(quick, rows, 0.0)
    with pytest.raises(PlanError, match="available"):
        estimate(quick, rows, math.nan, math.nan)


def test_the_bar_shows_every_part_and_how_far_there_is_room(quick, rows):
    pytest.importorskip("bitsandbytes")
    plan = estimate(replace(quick, load_in_4bit=True), rows, math.nan, available=2**28)
    shown = plan._repr_html_()
    assert len(plan.parts) >= 8 and all(shown.count(f'title="{name}:') == 1 for name in plan.parts)
    widths = [float(width.partition("%")[0]) for width in shown.split("width:")[2:]]
    assert sum(widths[: len(plan.parts)]) == pytest.approx(100, abs=0.1), "what does not fit takes the whole bar"
    assert widths[len(plan.parts)] == pytest.approx(100 * plan.available / plan.bytes, abs=0.1), "and the line says how much there is"


def test_advice_makes_nothing_larger(quick):
    long = [plain([i] * 4000) for i in range(40)]
    config = replace(quick, max_tokens_at_once=256, r=4, target_modules=["q_proj"], init_lora_weights="pissa", max_length=4000)
    whole, bare = estimate(config, long, math.nan, 2**40), estimate(config, long[:1], math.nan, 2**40)
    assert all(whole.parts[name] == n for name, n in bare.parts.items() if name != planning.PROCESS), "a chat of 4,000 tokens is a batch in either"
    for available in (whole.bytes, int(0.97 * whole.bytes), int(0.9 * whole.bytes), 2**20):
        advice = dict(setting.split("=", 1) for setting in estimate(config, long, math.nan, available).advice)
        assert not {"r", "target_modules", "load_in_4bit", "max_tokens_at_once"} & advice.keys(), advice
    assert "max_length" in advice or not advice


def test_the_shape_needs_no_memory(quick):
    assert all(p.is_meta for p in shape_of(quick).parameters())
