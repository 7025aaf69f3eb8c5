"""Constraints for pip that hold every requirement to the lowest release that settings.ini allows.

    python .ci/floors.py > constraints.txt

"transformers>=5.3,<6" becomes "transformers==5.3.*": of the lowest release its last mend. What a user may have installed
is tested with it, as the newest releases are everywhere else. Needs the standard library alone.
"""

import configparser
import re
from pathlib import Path


def floors(
    requirements: str,  # as in settings.ini, separated by spaces
) -> list[str]:
    "The lines that pip takes as constraints, in their order; a requirement without a floor has none."
    found = (re.match(r"([A-Za-z0-9][\w.-]*)>=([^,;\s]+)", word) for word in requirements.split())
    return [f"{match[1]}=={match[2]}.*" for match in found if match]


def main() -> None:
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(Path(__file__).parent.parent / "settings.ini", encoding="utf-8")
    wanted = " ".join(parser["DEFAULT"][f"{extra}requirements"] for extra in ("", "demo_", "retrieval_", "qlora_"))
    print("\n".join(dict.fromkeys(floors(wanted))))


if __name__ == "__main__":
    main()
