"""How much does a small model learn by heart? The guide's bare question, without entries to look at.

    python benchmarks/bare_question.py [--epochs 3]

Trains on questions about 200 ICD-10 codes, five phrasings each, and tests the same 200 codes in phrasings that training
never used: a good result would be memory. Prints the comparison.
"""

import argparse
import tempfile

from finetune_nb.config import FinetuneConfig
from finetune_nb.data import ANSWER_PATTERN, icd10_chats
from finetune_nb.evaluation import evaluate_run
from finetune_nb.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=3, help="passes over the 1,000 chats (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=100, help="test questions to answer (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(
            train_file="icd10-bare",
            target_modules="all-linear",
            lora_dropout=0.0,
            learning_rate=2e-3,
            num_train_epochs=options.epochs,
            gradient_accumulation_steps=1,
            attn_implementation="eager",
            answer_pattern=ANSWER_PATTERN,
            max_new_tokens=64,
            generation_batch_size=32,
            max_eval_samples=options.questions,
            output_dir=folder,
        )
        run = train(config, icd10_chats("bare"))
        print(run)
        print(evaluate_run(run))


if __name__ == "__main__":
    main()
