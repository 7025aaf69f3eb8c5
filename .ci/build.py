"""Brings everything that is made from the notebooks up to date: the package, the clean notebooks, the site, the README.

    python .ci/build.py

Needs no Quarto: the README is made from nbs/index.ipynb with nbconvert. Run it before every commit; CI checks that it
changes nothing.
"""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbdev.quarto import refresh_quarto_yml
from site_pages import make_site

ROOT = Path(__file__).resolve().parent.parent


def make_readme() -> None:
    "README.md from nbs/index.ipynb: the same text, with links and pictures that work from the top folder."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if not re.search(r"^#\| *hide", c.source, re.M)]
    for cell in notebook.cells:
        cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"\]\((images/|tutorials/|howto/|explain/|\w+\.ipynb)", r"](nbs/\1", text)
    text = "<!-- made from nbs/index.ipynb by `make build`; edit that -->\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    nbdev_export()
    make_site(ROOT)
    nbdev_clean()
    refresh_quarto_yml()
    make_readme()
