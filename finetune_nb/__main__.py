"""The command `finetune_nb`, and `python -m finetune_nb`, by which torchrun and `accelerate launch` start it."""

import sys
import warnings
from pathlib import Path


def main() -> int:
    "Runs the command; where the package was installed without what it needs, says so in a sentence."
    try:
        from finetune_nb.cli import main as run
    except ModuleNotFoundError as error:
        if sys.argv[1:] == ["--version"]:
            from finetune_nb import __version__

            print(__version__)
            return 0
        print(f"finetune_nb: the package {error.name} is missing, since finetune_nb was installed without what it needs. Install it again, without --no-deps.", file=sys.stderr)
        return 2
    warnings.formatwarning = _as_line
    return run()


def _as_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    "A warning of this package as the sentence that it is, without a place in the code; one of another package as ever."
    from finetune_nb.display import visible

    if category is UserWarning and Path(filename).parent == Path(__file__).parent:
        return f"finetune_nb: {visible(str(message))}\n"
    return _FORMAT(message, category, filename, lineno, line)


_FORMAT = warnings.formatwarning


if __name__ == "__main__":
    raise SystemExit(main())
