"""Which settings suit the demo? Trains each on the same chats and judges it on the validation set, never on the test set.

    python benchmarks/demo_settings.py [--group settings|regret|qlora] [--chats 600] [--losses-only] [--out settings.json]

Prints a Markdown table row as soon as a setting is done. The tables in the tutorial, the LoRA and the QLoRA chapter come from here:
"regret" holds the guide's defaults against the advice of "LoRA Without Regret", "qlora" a base model in four bits against the same
in full.
"""

import argparse
import json
import tempfile

from finetune_nb.config import FinetuneConfig, changed_settings
from finetune_nb.data import ANSWER_PATTERN, Splits, icd10_chats
from finetune_nb.evaluation import evaluate, pattern_checks
from finetune_nb.training import train

GUIDE = ["q_proj", "k_proj", "v_proj", "o_proj"]
BEST = {"target_modules": "all-linear", "r": 16, "learning_rate": 2e-3}
SETTINGS = [
    {"target_modules": "all-linear", "r": 16, "learning_rate": 1e-3},
    {"target_modules": "all-linear", "r": 16, "learning_rate": 2e-3},
    {"target_modules": GUIDE, "r": 16, "learning_rate": 2e-4},
    {"target_modules": GUIDE, "r": 16, "learning_rate": 2e-3},
    {"target_modules": "all-linear", "r": 64, "learning_rate": 1e-3},
    {"target_modules": "all-linear", "r": 16, "learning_rate": 2e-3, "num_train_epochs": 2, "chats": 0.5},
]
REGRET = [
    {"target_modules": GUIDE, "learning_rate": 2e-4, "gradient_accumulation_steps": 4},
    {"target_modules": GUIDE, "learning_rate": 2e-3, "gradient_accumulation_steps": 4},
    {"target_modules": "all-linear", "learning_rate": 2e-4, "gradient_accumulation_steps": 4},
    {"target_modules": "all-linear", "learning_rate": 2e-3, "gradient_accumulation_steps": 4},
    {"target_modules": "all-linear", "learning_rate": 2e-3, "gradient_accumulation_steps": 1},
]
GROUPS = {"settings": SETTINGS, "regret": REGRET, "qlora": [BEST, {**BEST, "load_in_4bit": True}]}
FIXED = {
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
}


def run_setting(setting: dict, chats: int, losses_only: bool) -> dict:
    "Trains one setting and returns its row."
    setting = dict(setting)
    data = icd10_chats()
    chosen = data.train[: round(chats * setting.pop("chats", 1.0))]
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(**{**FIXED, **setting, "output_dir": folder})
        run = train(config, Splits(chosen, data.validation, []))
        checks = pattern_checks(ANSWER_PATTERN)
        report = None if losses_only else evaluate(run.model, run.tokenizer, data.validation, checks, "tuned", 96, generation_batch_size=40)
    answers = {"exact match": f"{report.shares['exact match']:.0%}", "right code": f"{report.shares['right code']:.0%}"} if report else {}
    return {
        "layers": "all-linear" if config.target_modules == "all-linear" else "q, k, v, o",
        "r": config.r,
        "learning_rate": config.learning_rate,
        "chats x epochs": f"{len(chosen)} x {config.num_train_epochs:g}",
        "chats a step": config.per_device_train_batch_size * config.gradient_accumulation_steps,
        "base weights": "4 bits" if config.load_in_4bit else str(run.model.dtype).removeprefix("torch."),
        "trained in": f"{run.facts['seconds']:.0f} s",
        "peak memory": f"{run.facts['peak_memory_gib']:.2f} GiB",
        "validation loss": f"{run.facts['best_eval_loss']:.4f}",
        **answers,
        "changed": changed_settings(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=600, help="training chats for each setting (default: %(default)s)")
    parser.add_argument("--group", choices=list(GROUPS), default="settings", help="which settings (default: %(default)s)")
    parser.add_argument("--losses-only", action="store_true", help="do not answer the validation questions")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings to run, from 0")
    parser.add_argument("--out", help="a JSON file for the rows")
    options = parser.parse_args()
    rows = []
    for number in options.only if options.only is not None else range(len(GROUPS[options.group])):
        rows.append(run_setting(GROUPS[options.group][number], options.chats, options.losses_only))
        shown = {key: value for key, value in rows[-1].items() if key != "changed"}
        if len(rows) == 1:
            print("|", " | ".join(shown), "|\n|", " | ".join("---" for _ in shown), "|", flush=True)
        print("|", " | ".join(map(str, shown.values())), "|", flush=True)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
