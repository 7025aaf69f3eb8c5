"""What an installation must hold. Run by the Python of an environment that has finetune_nb, outside of a checkout:

    python installed.py

Needs nothing but what finetune_nb itself needs.
"""

import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

LIGHT = ("finetune_nb", "finetune_nb.config", "finetune_nb.data", "finetune_nb.cli")  # promised to import without these:
HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib")


def main() -> None:
    import finetune_nb

    package = files("finetune_nb")
    assert not (Path(finetune_nb.__file__).parent.parent / "settings.ini").exists(), "this is the checkout, not an installation"
    assert finetune_nb.__version__ == version("finetune_nb")
    for name in ("py.typed", "forgetting.jsonl", "museum.jsonl", "tutorials/finetune.ipynb"):
        assert (package / name).is_file(), f"{name} is missing"
    for module in LIGHT:
        code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert said == "[]", f"{module} imports {said}"
    command = [str(path) for path in Path(sys.executable).parent.glob("finetune_nb*")]  # .exe on Windows
    said = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert said == finetune_nb.__version__, said
    print(f"finetune_nb {said} is whole, on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
