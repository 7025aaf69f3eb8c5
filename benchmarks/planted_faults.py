"""Recall and precision of every check on seeded data sets with planted faults.

    python benchmarks/planted_faults.py [number of seeds]
"""

import sys

from finetune_nb.planted import measure, show

if __name__ == "__main__":
    print(show(measure(range(int(sys.argv[1]) if len(sys.argv) > 1 else 10))))
