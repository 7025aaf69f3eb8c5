"""Parity over formats: the demo is trained, exported in each format, and each export is asked in a fresh process.

    python benchmarks/export_parity.py [--chats 200] [--questions 16] [--no-4bit] [--folder runs]

Prints loss difference, agreement, size and time as Markdown. K-quants need llama.cpp's Python binding, and without it GGUF
files are unpacked by transformers, which the table says. The last rows are of a run in 4 bits (QLoRA), merged onto the
full-precision base model.
Figures of 2026-11-26 stand in nbs/10_export.ipynb, with what they say about bf16. Where llama.cpp was built without its
libraries' place in it, LD_LIBRARY_PATH has to name the folder llama_cpp/lib.
"""

# ruff: noqa: E501
import argparse
import tempfile
from dataclasses import replace
from importlib.util import find_spec

from finetune_nb.config import FinetuneConfig
from finetune_nb.data import icd10_chats
from finetune_nb.export import export_run
from finetune_nb.training import train


def parity(config: FinetuneConfig, chats: int, questions: int, formats: list[str]) -> None:
    "Trains, exports and prints the table."
    splits = icd10_chats("bare", n_train=chats, n_validation=16)
    run = train(config, splits._replace(test=splits.test[:questions]), say=lambda line: None)
    found = export_run(run, formats, n=questions, card=False, say=lambda line: None)
    print(f"\n{run.facts['dtype']}{', base in 4 bits' if config.load_in_4bit else ''}, {chats} training chats, {questions} test chats, {run.facts['hardware']}\n")
    print(found.to_markdown())
    print("\n".join(found.notes()), flush=True)


def main() -> None:
    "Reads the options and prints both tables."
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--chats", type=int, default=200)
    options.add_argument("--questions", type=int, default=16)
    options.add_argument("--no-4bit", action="store_true")
    options.add_argument("--folder")
    given = options.parse_args()
    folder = given.folder or tempfile.mkdtemp()
    config = FinetuneConfig(use_cpu=True, num_train_epochs=1, logging_steps=50, output_dir=folder, max_new_tokens=32, eval_strategy="no", preflight=False)
    formats = ["adapter", "merged", "f16", "q8_0", *["q4_k_m"] * (find_spec("llama_cpp") is not None)]
    parity(config, given.chats, given.questions, formats)
    if not given.no_4bit and find_spec("bitsandbytes"):
        parity(replace(config, load_in_4bit=True), given.chats, given.questions, ["adapter", "merged", "q8_0"])


if __name__ == "__main__":
    main()
