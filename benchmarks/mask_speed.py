"""How long do masks take, beside rendering and tokenising alone, and beside TRL?

    python benchmarks/mask_speed.py [--chats 20000] [--rounds 3]

The same chats, the same tokenizer, in turn: rendering and tokenising without any mask (the least that anybody has to do),
`tokenize_chats`, and, where TRL is installed, TRL's `SFTTrainer` preparing the same data with assistant-only loss, for which it
needs a template with generation tags. Prints the median seconds of each and the ratios.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from finetune_nb.chat_template import tokenize_chats
from finetune_nb.data import Chat, icd10_chats
from finetune_nb.models import load_model, load_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=20_000, help="how many chats (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all of them in turn (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = load_tokenizer()
    base = icd10_chats().train
    chats = [Chat(base[i % len(base)].messages, f"row {i}") for i in range(options.chats)]

    def alone() -> int:
        n = 0
        for start in range(0, len(chats), 256):
            texts = tokenizer.apply_chat_template([chat.messages for chat in chats[start : start + 256]], tokenize=False)
            n += sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        return n

    def ours() -> int:
        return sum(map(len, tokenize_chats(chats, tokenizer)["input_ids"]))

    jobs: dict[str, Callable[[], int]] = {"rendering and tokenising alone": alone, "tokenize_chats": ours}
    try:
        jobs["TRL SFTTrainer"] = _trl(chats)
    except ImportError:
        print("TRL is not installed: pip install trl")
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(options.rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            n = job()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s, {n:,} tokens", flush=True)
    least = statistics.median(seconds["rendering and tokenising alone"])
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"{name}: median {median:.2f} s for {options.chats:,} chats, {median / least:.2f} times the least")


def _trl(chats: list[Chat]) -> Callable[[], int]:
    from datasets import Dataset, disable_caching
    from trl import SFTConfig, SFTTrainer

    disable_caching()
    model, tokenizer = load_model()
    tokenizer.chat_template = MARKED

    def job() -> int:
        data = Dataset.from_list([{"messages": chat.messages} for chat in chats])
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(folder, assistant_only_loss=True, report_to="none", bf16=False, use_cpu=True, max_length=1024)
            trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
        return sum(map(len, trainer.train_dataset["input_ids"]))

    return job


if __name__ == "__main__":
    main()
