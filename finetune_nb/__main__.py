"""The command `finetune_nb`, and `python -m finetune_nb`, by which torchrun and `accelerate launch` start it."""

import sys


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
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
