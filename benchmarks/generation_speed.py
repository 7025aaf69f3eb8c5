"""Answers per second on the ICD-10 test set: ours and transformers' pipeline, same model, settings, batch size and chat template, in turn.

    python benchmarks/generation_speed.py [--questions 48] [--rounds 3] [--models base tuned] [--adapter FOLDER]
        [--system-tokens 0 300] [--max-new-tokens 64] [--batch-size 16] [--threads 1] [--dtype float32]

`tuned` is the embedded model with the adapter in the folder given with `--adapter`, where one is trained for `--steps` steps and kept
when there is none yet. Ours runs twice: as `generate` does in an evaluation, where the right answers serve as guesses too, and
`blind`, where they are not known. Prints for each engine the median seconds over the rounds (CPU time of the process, which other
work on the machine disturbs least, and by the clock), answers per second, the ratio to the pipeline, how many answers are the
pipeline's to the token, and for ours the steps, the tokens computed, and how many guesses were right. Greedy; each engine answers
a question before it is timed. In fp32 all answers are to be the same; in bfloat16, which an evaluation uses where the machine has
it, what is computed together decides the last bit, and with it now and then a word, in the pipeline too: `--again 1` asks it once
more with batches of one, and says how many of its answers stay the same.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from finetune_nb import generation
from finetune_nb.chat_template import end_of_turn_id, render_prompt
from finetune_nb.config import FinetuneConfig
from finetune_nb.data import Chat, icd10_chats
from finetune_nb.losses import inner_model
from finetune_nb.models import load_model

WORDS = "code note entry patient report list rule left right acute chronic first second other part same over under with of a in".split()


def tuned_adapter(folder: Path, steps: int) -> Path:
    "The folder of an adapter; trained when it is not there."
    if not (folder / "adapter_config.json").exists():
        from finetune_nb.training import train

        settings = dict(bf16=False, use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=4, eval_strategy="no")
        run = train(FinetuneConfig(max_steps=steps, output_dir=str(folder.parent), run_name=folder.name, **settings), icd10_chats())
        return run.folder / "adapter"
    return folder


def questions(n: int, system_tokens: int) -> list[Chat]:
    "Chats drawn evenly from the test set; with a system prompt of about so many tokens more."
    test = icd10_chats().test
    chats = [test[i * len(test) // n] for i in range(n)]
    if not system_tokens:
        return chats
    rules = " ".join(WORDS[i * 7 % len(WORDS)] for i in range(system_tokens))
    return [
        Chat([{"role": "system", "content": f"{chat.messages[0]['content']} {rules}."}, *chat.messages[1:]], chat.where) for chat in chats
    ]


def by_pipeline(model: Any, tokenizer: Any, chats: list[Chat], most: int, batch_size: int) -> tuple[list[str], str]:
    from transformers import pipeline

    tokenizer.padding_side = "left"
    inner = inner_model(model)  # the layers of an adapter are in it
    pipe = pipeline("text-generation", model=inner, tokenizer=tokenizer, batch_size=batch_size)
    settings = generation.greedy(model, tokenizer, most)
    out = pipe([chat.prompt for chat in chats], generation_config=settings, return_full_text=False)
    return [one[0]["generated_text"].strip() for one in out], ""


def by_slots(model: Any, tokenizer: Any, chats: list[Chat], most: int, batch_size: int, blind: bool) -> tuple[list[str], str]:
    writers: list[Any] = []
    make = generation._Writer
    generation._Writer = lambda *options: writers.append(make(*options)) or writers[0]
    try:
        prompts = [tokenizer(render_prompt(chat.prompt, tokenizer), add_special_tokens=False)["input_ids"] for chat in chats]
        end, settings = end_of_turn_id(tokenizer), generation.greedy(model, tokenizer, most)
        hoped = None if blind else [[*tokenizer(chat.answer, add_special_tokens=False)["input_ids"], end] for chat in chats]
        said = generation.continuations(model, prompts, settings, hoped, batch_size)
    finally:
        generation._Writer = make
    (w,) = writers
    effort = (
        f"{w.steps} steps, {w.computed} tokens for {sum(map(len, prompts))} + {sum(map(len, said))}, {w.right} of {w.guessed} guesses right"
    )
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said], effort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["base", "tuned"], choices=["base", "tuned"])
    parser.add_argument(
        "--adapter", type=Path, default=Path("runs/generation-speed"), help="folder of a trained adapter, made when missing"
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps when the adapter is missing")
    parser.add_argument("--system-tokens", type=int, nargs="+", default=[0, 300])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--again", type=int, default=0, help="a batch size in which the pipeline is asked once more, untimed")
    options = parser.parse_args()
    adapter = tuned_adapter(options.adapter, options.steps) if "tuned" in options.models else None
    torch.set_num_threads(options.threads)
    engines = {
        "pipeline": by_pipeline,
        "ours": lambda *given: by_slots(*given, blind=False),
        "ours, blind": lambda *given: by_slots(*given, blind=True),
    }
    for name in options.models:
        model, tokenizer = load_model(dtype=getattr(torch, options.dtype), use_cpu=True, say=lambda line: None)
        if name == "tuned":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        model.eval()
        for system in options.system_tokens:
            chats = questions(options.questions, system)
            print(
                f"\n{name}, {len(chats)} questions, system prompt {'as it is' if not system else f'longer by about {system} tokens'}",
                flush=True,
            )
            _compare(engines, options, model, tokenizer, chats)


def _compare(engines: dict[str, Any], options: argparse.Namespace, model: Any, tokenizer: Any, chats: list[Chat]) -> None:
    "All engines in turn, and a line for each."
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    said: dict[str, tuple[list[str], str]] = {}
    for engine in engines.values():
        engine(model, tokenizer, chats[:1], 2, options.batch_size)  # whatever is done once for a model is not timed
    for turn in range(options.rounds):
        for name in list(engines)[:: 1 if turn % 2 == 0 else -1]:
            cpu, clock = time.process_time(), time.perf_counter()
            said[name] = engines[name](model, tokenizer, chats, options.max_new_tokens, options.batch_size)
            times[name].append((time.process_time() - cpu, time.perf_counter() - clock))
            print(f"    {name}: {times[name][-1][0]:.1f} s CPU", flush=True)
    middle = {name: [statistics.median(one[i] for one in pairs) for i in (0, 1)] for name, pairs in times.items()}
    for name, (cpu, clock) in middle.items():
        same = sum(a == b for a, b in zip(said[name][0], said["pipeline"][0], strict=True))
        ratios = f"{middle['pipeline'][0] / cpu:.2f}x by CPU time, {middle['pipeline'][1] / clock:.2f}x by the clock"
        figures = f"{cpu:7.1f} s CPU {clock:7.1f} s clock {len(chats) / clock:6.2f} answers/s  {ratios}"
        print(
            f"  {name:<12} {figures}  same answers {same}/{len(chats)}  {said[name][1]}",
            flush=True,
        )
    if options.again:
        alone = by_pipeline(model, tokenizer, chats, options.max_new_tokens, options.again)[0]
        same = sum(a == b for a, b in zip(alone, said["pipeline"][0], strict=True))
        print(f"  the pipeline in batches of {options.again}: same answers {same}/{len(chats)}", flush=True)


if __name__ == "__main__":
    main()
