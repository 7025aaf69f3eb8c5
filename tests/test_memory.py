"""A device that takes so many tokens at once and no more: the same loss, gradient and answers in smaller pieces, or an error that says what would fit."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import small_tokenizer
from datasets import Dataset
from full_device import From, limited
from test_any_model import SHAPES, SMALL, TOKENS
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, TrainerCallback

from finetune_nb.data import Splits
from finetune_nb.generation import continuations
from finetune_nb.lora import add_lora, remove_lora
from finetune_nb.losses import inner_model
from finetune_nb.memory import NoRoomError, chat_losses, in_words_of_pieces
from finetune_nb.models import load_model
from finetune_nb.packing import PackingCollator
from finetune_nb.trainer import make_trainer
from finetune_nb.training import load_base, train

pytestmark = pytest.mark.usefixtures("one_way")


@contextmanager
def room_for(model, most, well=0):
    table, hook = limited(model, most, well)
    try:
        yield table
    finally:
        hook.remove()


@pytest.fixture(scope="module", params=["llama", "bloom"])
def kind(request, tiny_model, tmp_path_factory):
    "A base model, by folder; the second takes no row of chats."
    if request.param == "llama":
        return tiny_model, "shared"
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[request.param]).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder), "padded"


@pytest.fixture
def made(kind, quick, rows, tmp_path):
    "A trainer, with an adapter that is not zero, and how its chats are computed where there is room."
    config = replace(quick, model_name_or_path=kind[0], target_modules="attention", lora_dropout=0.1, eval_strategy="epoch")
    model = add_lora(load_model(kind[0], torch.float32, use_cpu=True)[0], config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    sets = {"train": Dataset.from_list(rows[:24]), "validation": Dataset.from_list(rows[24:])}
    return make_trainer(config, model, PackingCollator(kind[1], 4096, 2), sets, tmp_path)


def step_of(trainer, chats, most, drops, well=0, inputs=None):
    "Loss and gradient of one step, where a forward pass takes `most` tokens after `well` of any size; and the random numbers after it."
    model = trainer.model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1 if drops else 0.0
    trainer.create_optimizer()
    torch.manual_seed(3)
    model.zero_grad()
    with trainer.data_collator.attention(model), room_for(model, most, well) as device:
        loss = trainer.training_step(model, inputs or trainer.data_collator(chats))
    return loss, [p.grad.clone() for p in model.parameters() if p.requires_grad], device.sizes, torch.get_rng_state()


def test_a_step_in_smaller_pieces_has_the_same_loss_and_gradient(made, rows):
    "Also where the second pass is the first that does not fit, and where the chats were packed before it was known that less fits."
    made.data_collator = replace(made.data_collator, max_tokens=120)
    packed = made.data_collator(rows[:8])
    loss, gradient, whole, _ = step_of(made, rows[:8], 10**9, False)
    told = []
    made.on_less = lambda collator, step, what: told.append((step, what))
    again, pieces, sizes, _ = step_of(made, rows[:8], max(whole) // 2, False, well=1)
    assert told == [(1, "Step 1")] and sizes[0] == whole[0] > max(whole) // 2 and len(sizes) > len(whole) > 1 and max(sizes[1:]) <= max(whole) // 2
    _, _, sizes, _ = step_of(made, rows[:8], max(whole) // 2, False, inputs=packed)
    assert len(told) == 1 and sizes == [batch.tokens for batch in made.data_collator.batches(rows[:8])], "what was packed before is packed anew"
    assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    square = sum((a.double() - b).square().sum() for a, b in zip(pieces, gradient, strict=True))
    assert (square / sum(b.double().square().sum() for b in gradient)).sqrt() < 1e-6


def test_a_second_try_draws_what_a_first_one_would_have_drawn(made, rows):
    "Dropout in pieces is that of a run that had these pieces from the start, to the bit; nothing of the failed attempt is left."
    most = max(step_of(made, rows[:8], 10**9, True)[2]) // 2
    loss, gradient, sizes, state = step_of(made, rows[:8], most, True)
    fitting = made.data_collator
    assert fitting.max_tokens < 4096
    once, first, same, after = step_of(made, rows[:8], most, True)
    assert made.data_collator is fitting and sizes == same, "it did not have to be tried again"
    assert torch.equal(loss, once) and all(map(torch.equal, gradient, first)) and torch.equal(state, after)


def test_losses_and_looks_in_smaller_pieces_are_the_same(made, rows):
    with made.data_collator.attention(made.model):
        expected, whole = chat_losses(made.model, rows, made.data_collator), made.evaluate()["eval_loss"]
    told, made.on_less = [], lambda collator, step, what: told.append(what)
    with room_for(made.model, 64) as device:
        losses, tokens = chat_losses(made.model.train(), rows, made.data_collator)
        assert max(device.sizes) <= 64 and made.model.training
        assert tokens == expected[1] and losses == pytest.approx(expected[0], rel=1e-6)
        with made.data_collator.attention(made.model):
            assert made.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-6)
    assert told[0] == "The look at the validation chats after step 0" and made.data_collator.max_tokens <= 64
    with room_for(made.model, 8), pytest.raises(NoRoomError, match=r"chats.jsonl, line [0-9]+: this chat alone \([0-9]+ tokens\) does not fit"):
        chat_losses(made.model.train(), rows, made.data_collator)
    assert made.model.training


def test_answers_are_the_same_with_fewer_texts_at_once(made, rows):
    settings = GenerationConfig(max_new_tokens=6, eos_token_id=[2], pad_token_id=2, do_sample=False)
    prompts, base = [row["input_ids"][:-4] for row in rows[:6]], inner_model(made.model)
    expected = continuations(base, prompts, settings)
    alone = max(map(len, prompts))
    with room_for(base, alone) as device:
        assert continuations(base, prompts, settings, batch_size=6) == expected
        assert max(device.sizes) <= alone
    with room_for(base, 12), pytest.raises(NoRoomError, match=r"a prompt of up to [0-9]+ tokens and 6 new ones do not fit.*Lower max_new_tokens.*load_in_4bit"):
        continuations(base, prompts, settings, batch_size=6)
    assert continuations(base, prompts, settings) == expected, "the model is as it was"


def test_a_run_whose_device_fills_up_goes_on_as_it_was(kind, quick, chats, tmp_path):
    "The same weights, up to rounding, as a run that had room; what happened is told and recorded, and a run that goes on keeps to it."
    config, splits = replace(quick, model_name_or_path=kind[0], target_modules="attention", lora_dropout=0.0, num_train_epochs=1, learning_rate=1e-3), Splits(chats[:24], chats[24:32], [])
    base = load_base(config, lambda text: None)
    for module in base[0].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    whole = train(config, splits, base=base, say=lambda text: None)
    losses = [row["loss"] for row in whole.history if "loss" in row]
    remove_lora(base[0])
    table, _ = limited(base[0], 10**9)
    said = []
    run = train(config, splits, [From(table, 2, 64)], base=base, say=said.append)
    assert [row["loss"] for row in run.history if "loss" in row] == pytest.approx(losses, rel=1e-5)
    assert run.facts["out_of_memory"][0] == {"step": 3, "max_tokens_at_once": run.facts["out_of_memory"][0]["max_tokens_at_once"]}
    assert [line for line in said if line.startswith("Step 3 did not fit into the memory; it was computed again with at most") and line.endswith("Loss and gradient are the same up to rounding.")]
    assert run.facts["max_tokens_at_once"] == run.facts["out_of_memory"][-1]["max_tokens_at_once"] <= 64


def test_what_smaller_pieces_change_is_said():
    "With dropout other masks are drawn, and the losses are others; without it they are the same."
    made = lambda p: torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ModuleDict({"default": torch.nn.Dropout(p)}))  # noqa: E731
    assert in_words_of_pieces(made(0.0)) == "Loss and gradient are the same up to rounding."
    assert in_words_of_pieces(made(0.05)).startswith("Dropout draws other numbers for other pieces, so the losses that follow are a little different")


def with_a_long_one(chats, n):
    "The last of the training chats is much longer than the others."
    long = type(chats[0])([chats[23].messages[0], {"role": "assistant", "content": "It is long." * n}], "chats.jsonl, line 24")
    return Splits([*chats[:23], long], chats[24:32], [])


def test_the_longest_chat_is_tried_before_the_first_step(quick, chats):
    "It fits alone, and not with a second one: packing is shown on shorter chats, and the run goes through."
    base, said = load_base(quick, lambda text: None), []
    table, _ = limited(base[0], 282)
    run = train(replace(quick, num_train_epochs=1, gradient_accumulation_steps=4), with_a_long_one(chats, 60), base=base, say=said.append)
    told = "\n".join(said)
    assert "it did not suffice to compare the longest chats" in told and "architecture does not take it" not in told
    assert "The largest batch did not fit with" in told and "it does. Dropout draws other numbers" in told and max(table.sizes) <= 282
    assert run.facts["packing"] == "shared" and run.facts["steps"] == 2


def test_a_run_that_can_not_fit_fails_before_its_first_step_with_the_plan(quick, chats, tmp_path):
    "The plan is that of `estimate`, for less memory than it reckoned with: here, wide blocks that are computed twice in place of being kept."
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**TOKENS, **SMALL | {"intermediate_size": 8192, "num_hidden_layers": 4})).save_pretrained(tmp_path / "wide")
    small_tokenizer().save_pretrained(tmp_path / "wide")
    config, looked = replace(quick, model_name_or_path=str(tmp_path / "wide")), []
    base = load_base(config, lambda text: None)

    class Looks(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            looked.append("it began")

    table, _ = limited(base[0], 100)
    with pytest.raises(NoRoomError, match=r"chats.jsonl, line 24: this chat alone \([0-9]+ tokens\) does not fit.*was reckoned to need [0-9.]+ GiB") as caught:
        train(config, with_a_long_one(chats, 220), [Looks()], base=base, say=lambda text: None)
    assert "By `estimate` this would need less: " in str(caught.value) and "gradient_checkpointing=True" in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError) and not looked and max(table.sizes) <= 100
