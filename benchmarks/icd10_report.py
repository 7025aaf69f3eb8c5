"""The demo's whole verdict: should you, did it help, what did it cost, and what went wrong?

    python benchmarks/icd10_report.py [--run demo/runs/run-001] [--questions 100] [--general 241] [--out icd10_report]

Asks the test questions of the ICD-10 demo in every way there is (the plain question, a better prompt, examples, retrieval over
the training chats and over the index of the ICD-10), then the tuned model, on the same questions; compares base and tuned on them;
measures what was forgotten and what was learned by heart; and looks for what went wrong. Without --run it trains first, with the
settings of `make demo`; `make demo` leaves such a run in demo/runs. The run and its report (report.html, report.md, report.json)
go to the folder --out; the verdict and the table of all ways of asking are printed.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from finetune_nb.baselines import BaselineReport, add_tuned, should_you_finetune
from finetune_nb.config import FinetuneConfig
from finetune_nb.data import ANSWER_PATTERN, Chat, Splits, icd10_chats, icd10_entries
from finetune_nb.display import text_table
from finetune_nb.evaluation import evaluate_run
from finetune_nb.fitting import measure_fitting
from finetune_nb.forgetting import measure_forgetting
from finetune_nb.report import write_report
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


def copied(run: Run, config: FinetuneConfig, folder: Path) -> Run:
    "The same run in a folder of its own, without the reports that it has, which are about other questions."
    made = shutil.ignore_patterns("checkpoint-*", "report.*", "answers.jsonl", "baselines.json", "fitting.json", "forgetting*.json")
    return replace(run, config=config, folder=shutil.copytree(run.folder, folder / run.folder.name, ignore=made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a finished run, such as make demo leaves in demo/runs; without it one is trained")
    parser.add_argument("--chats", type=int, default=1000, help="training chats, without --run (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=100, help="test questions (default: %(default)s)")
    parser.add_argument("--general", type=int, default=241, help="general questions, of 241, for what was forgotten (default: %(default)s)")
    parser.add_argument("--k", type=int, default=3, help="examples or passages in a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", default="icd10_report", help="folder of the run with its report (default: %(default)s)")
    options = parser.parse_args()
    run = load_run(options.run) if options.run else None
    config = replace(run.config, max_eval_samples=options.questions) if run else settings(options, options.out)
    data = kept_sets(run.folder, config) if run else icd10_chats(n_train=options.chats, seed=options.seed)
    before = ask_base(config, data, options.k)
    run = copied(run, config, Path(options.out)) if run else train(config, data)
    asked = add_tuned(before, run)
    evaluate_run(run)
    measure_forgetting(run, limit=options.general)
    measure_fitting(run)
    report = write_report(run)
    print(f"\n{report.found.headline()}\nBefore training: {before.verdict}.\n")
    print(*text_table(asked.head, asked.table()), sep="\n")
    print(f"\nReport: {run.folder / 'report.html'} (also .md and .json)")


if __name__ == "__main__":
    main()
