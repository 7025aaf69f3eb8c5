"""Constraints for pip from what Colab's image holds.

    python .ci/colab.py pip-freeze.gpu.txt > constraints.txt

The freeze is that of github.com/googlecolab/backend-info. Lines of packages with a version are kept, without the build
of CUDA ("2.11.0+cu128" becomes "2.11.0"); packages from an address or a local file are left out. With constraints, pip
installs what a project asks for, and where the image has it, in the image's version.

Needs the standard library alone.
"""

import re
import sys
from pathlib import Path


def constraints(
    freeze: str,  # what `pip freeze` printed
) -> list[str]:
    "The lines that pip takes as constraints, in the order of the freeze."
    found = (re.match(r"([A-Za-z0-9][\w.-]*)==([^\s+;]+)", line) for line in freeze.splitlines())
    return [f"{match[1]}=={match[2]}" for match in found if match]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: colab.py FREEZE")
    if not (lines := constraints(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        sys.exit(f"{sys.argv[1]} holds no line such as torch==2.11.0; give the pip-freeze.gpu.txt of googlecolab/backend-info.")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
