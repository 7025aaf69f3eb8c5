"Seconds for all checks on 100,000 chats: python benchmarks/quality_speed.py [number of chats]"

import random
import resource
import sys
import time

from finetune_nb.chats import Chat
from finetune_nb.data import icd10_entries
from finetune_nb.quality import check_chats

n, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000, random.Random(0)
names = [e.description for e in icd10_entries()]
asks = [f"What is the code for {rng.choice(names)} with {rng.choice(names)}? The visit was number {i}." for i in range(n)]
texts = [[("user", q), ("assistant", f"The code for {rng.choice(names)} is {i}; see {rng.choice(names)}.")] for i, q in enumerate(asks)]
chats = [Chat([{"role": r, "content": c} for r, c in t], f"row {i}") for i, t in enumerate(texts)]
wall, cpu = time.perf_counter(), time.process_time()
report = check_chats(chats, max_length=512)
print(f"{n:,} chats: {time.perf_counter() - wall:.1f} s, {time.process_time() - cpu:.1f} CPU seconds")
print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB. {report.verdict}")
