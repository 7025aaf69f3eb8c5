"""The demo's whole verdict: should you, did it help, and what did it cost?

    python benchmarks/icd10_report.py [--run demo/runs/run-001] [--questions 100] [--general 60] [--out icd10_report.json]

Asks the test questions of the ICD-10 demo in every way there is (the plain question, a better prompt, examples, retrieval over
the training chats and over the index of the ICD-10), then the tuned model, on the same questions; measures what was forgotten;
and compares base and tuned on the held-out chats. Without --run it trains first, with the settings of `make demo`; `make demo`
leaves such a run in demo/runs. Prints a Markdown table with the verdicts under it, and writes everything, answers included, as JSON.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_nb.baselines import TUNED, BaselineReport, add_tuned, should_you_finetune
from finetune_nb.config import FinetuneConfig
from finetune_nb.data import ANSWER_PATTERN, Chat, Splits, icd10_chats, icd10_entries
from finetune_nb.evaluation import Comparison, evaluate_run
from finetune_nb.forgetting import Forgetting, measure_forgetting
from finetune_nb.training import Run, kept_sets, load_base, load_run, train
from finetune_nb.ways import Way, few_shot_similar, with_system

PROMPT = (
    "You are a medical coding assistant. Answer with one sentence of this form and nothing else: "
    "The ICD-10 code for TERM is CODE (DESCRIPTION)."
)


def settings(options: argparse.Namespace, folder: str) -> FinetuneConfig:
    "Those of `make demo`."
    return FinetuneConfig(
        target_modules="all-linear",
        lora_dropout=0.0,
        learning_rate=2e-3,
        num_train_epochs=1,
        gradient_accumulation_steps=1,
        attn_implementation="eager",
        answer_pattern=ANSWER_PATTERN,
        max_new_tokens=96,
        max_eval_samples=options.questions,
        generation_batch_size=25,
        seed=options.seed,
        output_dir=folder,
    )


def prompt_and_examples(train_chats: list[Chat]) -> Way:
    "What one would really do: say it, and show similar examples."
    similar, told = few_shot_similar(train_chats), with_system(PROMPT)
    return lambda chat, n: similar(Chat([*told(chat, 0), chat.messages[-1]], chat.where), n)


def ask_base(config: FinetuneConfig, data: Splits, k: int) -> BaselineReport:
    "Every way of asking the base model."
    index = [f"{term}: {entry.code} ({entry.description})" for entry in icd10_entries() for term in (entry.description, *entry.terms)]
    ways = {"prompt and similar examples": prompt_and_examples(data.train)}
    return should_you_finetune(config, data, system=PROMPT, documents=index, k=k, ways=ways, loaded=load_base(config))


def markdown(report: BaselineReport) -> str:
    "The ways and the tuned model as one table."
    rows = [report.head, ("---",) * len(report.head), *report.table()]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def verdicts(before: BaselineReport, after: BaselineReport, comparison: Comparison, forgotten: Forgetting, run: Run) -> list[str]:
    "What to read under the table."
    figures = [f"{name} {base} → {tuned}" for name, base, tuned in comparison.table()]
    return [
        f"Before training: {before.verdict}. {before.reason}",
        f"With the tuned model: {after.verdict}. {after.reason}",
        f"Base → {TUNED}, {len(comparison.base.rows)} held-out chats: {'; '.join(figures)}.",
        f"What was lost ({forgotten.items}): {forgotten.reason}",
        f"Training: {run.facts['steps']} steps in {run.facts['seconds']:.0f} s on {run.facts['hardware']}; {run.facts['parameters']}.",
        *after.notes,
    ]


def everything(before: BaselineReport, after: BaselineReport, comparison: Comparison, forgotten: Forgetting, run: Run) -> dict[str, Any]:
    "All of it as plain values."
    return {
        "should_you": {"verdict": before.verdict, "reason": before.reason},
        "ways": after.to_dict(),
        "base_against_tuned": {name: {"base": base, TUNED: tuned} for name, base, tuned in comparison.table()},
        "forgetting": forgotten.to_dict(),
        "run": {name: run.facts[name] for name in ("steps", "seconds", "hardware", "parameters", "versions", "seed")},
    }


def _aside(run: Run, config: FinetuneConfig, folder: Path) -> Run:
    "The same run with a folder for its reports that is thrown away: those that it has are about other questions."
    (folder / run.folder.name).mkdir()
    return replace(run, config=config, folder=folder / run.folder.name, loaded=(run.model, run.tokenizer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a finished run, such as make demo leaves in demo/runs; without it one is trained")
    parser.add_argument("--chats", type=int, default=1000, help="training chats, without --run (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=100, help="test questions (default: %(default)s)")
    parser.add_argument("--general", type=int, default=60, help="general questions, of 241, for what was forgotten (default: %(default)s)")
    parser.add_argument("--k", type=int, default=3, help="examples or passages in a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", default="icd10_report.json", help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = load_run(options.run) if options.run else None
        config = replace(run.config, max_eval_samples=options.questions) if run else settings(options, folder)
        data = kept_sets(run.folder, config) if run else icd10_chats(n_train=options.chats, seed=options.seed)
        before = ask_base(config, data, options.k)
        run = _aside(run, config, Path(folder)) if run else train(config, data)
        after, comparison = add_tuned(before, run), evaluate_run(run)
        forgotten = measure_forgetting(run, limit=options.general)
    found = (before, after, comparison, forgotten, run)
    print(markdown(after), *verdicts(*found), sep="\n\n")
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump(everything(*found), file, ensure_ascii=False, indent=1)
    print(f"\nEverything, answers included: {options.out}")


if __name__ == "__main__":
    main()
