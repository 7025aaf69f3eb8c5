"""Thirty ways in which a fine-tuning goes wrong in silence: each is planted, and what becomes of it is printed.

    python benchmarks/thirty_modes.py [--markdown]
"""

# ruff: noqa: E501
import copy
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

import test_preflight as planted  # noqa: E402
from conftest import save_tiny  # noqa: E402
from peft import get_peft_model_state_dict  # noqa: E402
from test_any_model import SMALL, TOKENS  # noqa: E402
from transformers import AutoModelForCausalLM, Lfm2Config  # noqa: E402

from finetune_nb import lora, trainer, training  # noqa: E402
from finetune_nb import preflight as ahead  # noqa: E402
from finetune_nb.chat_template import NO_LOSS, tokenize_chats  # noqa: E402
from finetune_nb.config import FinetuneConfig, FinetuneError  # noqa: E402
from finetune_nb.data import Chat, Splits, leak_report, load_chats  # noqa: E402
from finetune_nb.fresh import ask_transformers  # noqa: E402
from finetune_nb.memory import chat_losses  # noqa: E402
from finetune_nb.merge import merge_adapter  # noqa: E402
from finetune_nb.models import load_model  # noqa: E402
from finetune_nb.packing import check_packing  # noqa: E402
from finetune_nb.training import resume, train  # noqa: E402
from finetune_nb.verify import ask_evaluated, compare_answers, limits_of, questions_of  # noqa: E402


def chats_of(n: int = 40) -> list[Chat]:
    "Short questions and answers."
    texts = [(f"What is {i} plus one?", f"It is {i + 1}." + " Really." * (i % 5)) for i in range(n)]
    return [Chat([{"role": "user", "content": q}, {"role": "assistant", "content": a}], f"chats.jsonl, line {i + 1}") for i, (q, a) in enumerate(texts)]


class Bench:
    "A tiny model on the real tokenizer, and what it takes to train it."

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, save_tiny(folder / "base")
        self.config = FinetuneConfig(
            model_name_or_path=self.base, bf16=False, use_cpu=True, num_train_epochs=1, learning_rate=5e-3, gradient_accumulation_steps=1, logging_steps=1,
            output_dir=str(folder / "runs"), eval_strategy="no", lora_dropout=0.1,
        )  # fmt: skip
        self.chats = chats_of()

    def model(self) -> tuple:
        base, tokenizer = load_model(self.base, torch.float32, use_cpu=True, say=lambda text: None)
        return lora.add_lora(base, self.config), tokenizer

    def set_out(self) -> SimpleNamespace:
        "All that a preflight takes."
        model, tokenizer = self.model()
        return SimpleNamespace(model=model, tokenizer=tokenizer, rows=list(tokenize_chats(self.chats, tokenizer)), chats=self.chats, config=self.config, collator=None)

    def train(self, **changes) -> dict[str, torch.Tensor]:
        "The weights after a short run."
        with patch.object(training, "fastest_ways", lambda *args: ["tree"]):  # it is measured which is, and they differ in the last bit
            run = train(replace(self.config, **changes), Splits(self.chats[:16], [], []), say=lambda text: None)
        return get_peft_model_state_dict(run.model, save_embedding_layers=False)


def same(one: dict, other: dict, tolerance: float = 0.0) -> bool:
    return all(torch.allclose(one[key], other[key], rtol=0, atol=tolerance) for key in one)


def flown(plant: Callable, bench: Bench) -> str:
    "What the preflight says of a planted fault."
    out = bench.set_out()
    plant(out)
    found = planted.fly(out).findings
    worst = [check for check in found if check.verdict == "error"] or [check for check in found if check.name != "one chat by heart"]
    return f"{'refused' if worst[0].verdict == 'error' else 'warned'}: {worst[0].found}" if worst else ""


def relabelled(change: Callable) -> Callable:
    return lambda bench: flown(lambda out: planted.relabelled(change, out), bench)


def by_preflight(plant: Callable) -> Callable:
    return lambda bench: flown(plant, bench)


# --- what the preflight does not need to see, since something else does


def rewritten_past(bench: Bench) -> str:
    _, tokenizer = bench.model()
    tokenizer.chat_template = tokenizer.chat_template.replace("in messages", "in messages[-2:]")
    tokenize_chats([Chat([*bench.chats[0].messages, *bench.chats[1].messages], "two turns")], tokenizer)
    return ""


def merged_border(out: SimpleNamespace) -> None:
    "Prompt and answer tokenised as one text, across a space at the end of the prompt."
    out.tokenizer = copy.deepcopy(out.tokenizer)
    out.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    rows = []
    for chat in out.chats:
        text = out.tokenizer.apply_chat_template(chat.messages, tokenize=False)
        made = out.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        border = text.index("assistant: ") + len("assistant: ")
        labels = [i if end > border else NO_LOSS for i, (_, end) in zip(made["input_ids"], made["offset_mapping"], strict=True)]
        rows.append({"input_ids": made["input_ids"], "labels": labels, "where": chat.where})
    out.rows = rows


def cut_to_the_prompt(bench: Bench) -> str:
    tokenize_chats(bench.chats, bench.model()[1], 12, "truncate")
    return ""


def cut_ends(out: SimpleNamespace) -> None:
    length = min(len(row["input_ids"]) for row in out.rows) - 2
    out.rows = list(tokenize_chats(out.chats, out.tokenizer, length, "truncate"))
    out.config = replace(out.config, max_length=length, too_long="truncate")


def forged_turn(bench: Bench) -> str:
    tokenize_chats([Chat([{"role": "user", "content": "Go<|im_end|>"}, bench.chats[0].messages[1]], "line 1")], bench.model()[1])
    return ""


def unknown_role(bench: Bench) -> str:
    load_chats([{"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]}])
    return ""


def plain_text(bench: Bench) -> str:
    load_chats([{"text": "Once upon a time"}])
    return ""


def leaking_rows(bench: Bench) -> str:
    shape = Lfm2Config(**{**TOKENS, **SMALL, "vocab_size": 64}, layer_types=["conv", "full_attention"])
    torch.manual_seed(0)
    model = lora.add_lora(AutoModelForCausalLM.from_config(shape), FinetuneConfig(r=2, target_modules="attention"))
    start, *rests = (torch.randint(3, 64, (n,)).tolist() for n in (20, 12, 20))
    rows = [{"input_ids": start + rest, "labels": [NO_LOSS] * 16 + start[16:] + rest} for rest in rests]
    report = check_packing(model, rows)
    return f"refused: chats are computed {report.mode}; {next(iter(report.differences.values())).split('; ')[-1]}" if report.mode not in ("shared", "packed") else ""


def mean_of_means(bench: Bench) -> str:
    "Each batch its own mean, as when accumulation divides by the number of batches."
    real = trainer.token_losses
    whole = [bench.train(packing=mode, lora_dropout=0.0, run_name=f"whole {mode}") for mode in ("padded", "single")]
    assert same(*whole, 1e-5)
    with patch.object(trainer, "token_losses", lambda model, batch: real(model, batch) * (100 / len(batch.at))):
        faulty = [bench.train(packing=mode, lora_dropout=0.0, run_name=f"means {mode}") for mode in ("padded", "single")]
    return "" if same(*faulty, 1e-5) else "seen by a test: two ways of laying out one step no longer give the same weights; without the fault they do"


def older_checkpointing(bench: Bench) -> str:
    def older(model, n):
        inner = planted.inner_model(model)
        inner.gradient_checkpointing_enable({"use_reentrant": True}) if n else inner.gradient_checkpointing_disable()
        if n and hasattr(inner, "_require_grads_hooks"):
            inner.disable_input_require_grads()

    with patch.object(ahead, "recompute_blocks", older):
        return flown(lambda out: None, bench)


def another_rate_on_resume(bench: Bench) -> str:
    stop = training.Stop()
    config = replace(bench.config, run_name="rate", num_train_epochs=2, lr_scheduler_type="constant")
    run = train(config, Splits(bench.chats[:16], [], []), [planted_stop(stop)], stop, say=lambda text: None)
    file = run.folder / "config.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.005", "learning_rate: 0.001"))
    resume(run.folder, say=lambda text: None)
    return ""


def planted_stop(stop: training.Stop) -> training.TrainerCallback:
    class AtTwo(training.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            stop.wanted |= state.global_step == 1

    return AtTwo()


def unseeded(bench: Bench) -> str:
    assert same(bench.train(run_name="seed 1"), bench.train(run_name="seed 2"))
    with patch.object(lora.torch, "manual_seed", lambda seed: torch.default_generator):
        weights = [bench.train(run_name=f"unseeded {k}") for k in range(2)]
    return "" if same(*weights) else "seen by a test: two runs of one seed no longer end alike; without the fault they do, to the bit"


def half_an_adapter(bench: Bench) -> str:
    model, _ = bench.model()
    weights = get_peft_model_state_dict(model)
    lora.set_adapter_weights(model, dict(list(weights.items())[::2]))
    return ""


def another_base(bench: Bench) -> str:
    own = bench.folder / "base-of-its-own"
    shutil.copytree(bench.config.model_name_or_path, own)
    config = replace(bench.config, run_name="other-base", model_name_or_path=str(own), max_steps=1, eval_strategy="no")
    run = train(config, Splits(bench.chats[:16], [], []), say=lambda text: None)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(run.model.get_base_model().config).save_pretrained(own)
    run.release()
    assert run.model
    return ""


def merged(bench: Bench) -> str:
    run = train(replace(bench.config, run_name="merged", max_steps=4, eval_strategy="no", modules_to_save=["lm_head"]), Splits(bench.chats[:16], [], []), say=lambda text: None)
    asked = questions_of(run, bench.chats[:6], max_new_tokens=4)
    before = ask_evaluated(run, asked)
    model = AutoModelForCausalLM.from_pretrained(merge_adapter(run, dtype="bfloat16").folder, dtype=torch.float32)
    for p in model.parameters():  # into 3 bits, and back
        p.data = (p.data / p.data.abs().max() * 3).round() * p.data.abs().max() / 3
    check = compare_answers("bfloat16", asked, before, ask_transformers(model, run.tokenizer, asked), limits_of("bfloat16"))
    return "" if check.ok else f"warned: {check.headline()}"


def in_train_mode(bench: Bench) -> str:
    model, tokenizer = bench.model()
    rows = list(tokenize_chats(bench.chats, tokenizer))
    for p in model.parameters():
        p.data += 0.01 * p.requires_grad
    found = [chat_losses(model.train(training), rows, at_once=n)[0] for training, n in ((True, 1), (False, 3), (True, 8))]
    return "without effect: losses are the same in either mode, at 1, 3 and 8 at once" if all(torch.allclose(torch.tensor(f), torch.tensor(found[0]), atol=1e-5) for f in found) else ""


def leaked(bench: Bench) -> str:
    return "warned: " + " ".join(leak_report(Splits(bench.chats[:20], [], [replace(bench.chats[3], where="test, line 1")])))


def stale_cache(bench: Bench) -> str:
    _, tokenizer = bench.model()
    first = tokenize_chats(bench.chats, tokenizer, cache_dir=bench.folder / "cache")["input_ids"]
    tokenizer.chat_template = tokenizer.chat_template.replace("You are a helpful AI assistant named SmolLM", "You are another")
    second = tokenize_chats(bench.chats, tokenizer, cache_dir=bench.folder / "cache")["input_ids"]
    return "without effect: another template gives other rows from the same cache" if first[:] != second[:] else ""


@dataclass(frozen=True)
class Mode:
    "One way to go wrong."

    name: str
    guard: str  # module.function that sees it
    test: str  # holds the guard
    plant: Callable[[Bench], str]  # what is said of the planted fault; empty: nothing; an error of ours counts as refused


PLANTED = "test_preflight.py: test_a_planted_fault_is_named_and_ends_the_run"
MODES = [
    Mode("the end of turn is masked, because it is the pad token", "preflight: batches", PLANTED, by_preflight(lambda out: planted.collated_by(planted.ByToken, out))),
    Mode("the end of turn lies outside the mask", "preflight: ends of answers; masks", PLANTED, relabelled(planted.without_stop)),
    Mode("the mask is all zero", "preflight: labels; packing.check_packing", PLANTED, relabelled(planted.nothing)),
    Mode("the mask is off by one", "preflight: prompts", PLANTED, relabelled(planted.one_early)),
    Mode("the template does not keep the beginning", "turns.rows_of", "test_chat_template.py: test_templates_that_are_refused", rewritten_past),
    Mode("another template in training than in use", "preflight: prompts; curve_rules: template mismatch", PLANTED, by_preflight(planted.another_template)),
    Mode("two beginnings of text", "preflight: beginning of text; check_template", PLANTED, by_preflight(planted.begins_twice)),
    Mode("a token across the border of the answer", "masks; preflight: prompts", "test_chat_template.py: test_other_tokenizers_give_the_prompt_of_inference_or_refuse", by_preflight(merged_border)),
    Mode("cutting removes all labels", "chat_template.tokenize_chats", "test_chat_template.py: test_long_chats_are_never_cut_in_silence", cut_to_the_prompt),
    Mode("cutting removes the end", "preflight: ends of answers", "test_preflight.py: test_an_answer_that_was_cut_is_a_warning", by_preflight(cut_ends)),
    Mode("control tokens in the data", "masks.Controls; preflight: prompts", "test_chat_template.py: test_forged_control_tokens_are_refused_or_neutralised", forged_turn),
    Mode("an unknown role", "formats.check_messages", "test_reading.py", unknown_role),
    Mode("plain text without an end", "formats.recognise: chats only", "test_reading.py", plain_text),
    Mode("tokens that the model does not know", "preflight: vocabulary; load_model; check_template", PLANTED, by_preflight(planted.unknown_tokens)),
    Mode("packed chats see each other", "packing.check_packing", "test_any_model.py: test_a_convolution_that_reaches_into_the_next_chat_is_seen", leaking_rows),
    Mode("accumulation takes a mean of means", "trainer.training_step", "test_training.py: test_accumulation_changes_nothing", mean_of_means),
    Mode("recomputed blocks give no gradient", "preflight: recomputation", "test_preflight.py: test_recomputed_blocks_without_gradients_of_their_inputs_are_seen", older_checkpointing),
    Mode("bf16 rounds small steps away", "preflight: precision; lora.add_lora", PLANTED, by_preflight(planted.in_bf16)),
    Mode("what is trained is fp16", "preflight: precision; models.hardware", PLANTED, by_preflight(planted.in_fp16)),
    Mode("trained and not saved", "preflight: what is saved", PLANTED, by_preflight(planted.not_saved)),
    Mode("LoRA beside no such layer", "lora.add_lora; preflight: target modules", PLANTED, by_preflight(planted.a_layer_that_is_not_there)),
    Mode("another learning rate on resume", "checkpoints.check_unchanged", "test_checkpoints.py: test_changed_settings_are_refused_by_name", another_rate_on_resume),
    Mode("the seed comes after the draw", "lora.add_lora", "test_training.py: test_same_seed_same_adapter", unseeded),
    Mode("a loss that is no number", "preflight: gradients; trainer.Watch", PLANTED, by_preflight(planted.not_a_number)),
    Mode("half of an adapter's keys", "lora.set_adapter_weights", "test_training.py: test_adapter_keys_that_do_not_match_raise", half_an_adapter),
    Mode("an adapter on another base", "training.Run", "test_thirty_modes.py", another_base),
    Mode("merged into another precision", "verify.compare_answers; merge.merge_adapter", "test_export.py: test_merged_is_what_peft_merges", merged),
    Mode("evaluated in training mode or with padding", "memory.chat_losses; evaluation", "test_evaluation.py: test_answers_and_losses_do_not_depend_on_the_batch", in_train_mode),
    Mode("test questions among the training chats", "data.leak_report", "test_data.py: test_leaks_of_every_kind_are_found", leaked),
    Mode("a stale cache of rows", "chat_template.tokenize_chats", "test_chat_template.py: test_the_cache_never_gives_what_is_out_of_date", stale_cache),
]  # fmt: skip


def found(mode: Mode, bench: Bench) -> str:
    "What becomes of a planted fault, in words; \"not caught\" when nothing does."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return mode.plant(bench) or "not caught"
        except FinetuneError as error:
            return f"refused: {error}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = [(number, mode, " ".join(found(mode, bench).replace(folder, "").split())[:170]) for number, mode in enumerate(MODES, 1)]
    if "--markdown" in sys.argv:
        print("| | goes wrong | seen by | planted | held by |\n| --- | --- | --- | --- | --- |")
    for number, mode, said in rows:
        said = said.replace("|", "¦") if "--markdown" in sys.argv else said
        print(f"| {number} | {mode.name} | {mode.guard} | {said} | {mode.test} |" if "--markdown" in sys.argv else f"{number:2} {mode.name}: {said}")
    caught = sum(said != "not caught" for *_, said in rows)
    print(f"\n{caught} of {len(rows)} are caught.", "" if "--markdown" in sys.argv else json.dumps([n for n, _, said in rows if said == "not caught"]))


if __name__ == "__main__":
    main()
