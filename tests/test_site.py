"""The site holds together: no dead link, no picture without words, every page found, every command and name there.

What is looked at are the pages as nbdev hands them to Quarto, except for the tables of parameters, which need each module
imported; three chapters are made with theirs. `test_site_browser.py` looks at pages in a browser.
"""

import ast
import configparser
import re
import shlex
import sys
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT

NBS = ROOT / "nbs"
sys.path.append(str(ROOT / ".ci"))
import site_pages  # noqa: E402

PAGES = site_pages.pages(NBS)
PROSE = [page for page in PAGES if page.startswith(("howto/", "explain/")) or page in ("index", "ten_minutes", "comparison", "reference")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
NOT_OURS = set("llama_cpp q8_0 q4_k_m q4_0 num_ctx repeat_penalty too_few near_duplicates input_ids input_text base_url".split())


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@pytest.fixture(scope="module")
def processed():
    "Page to the cells that Quarto gets, its text outside of code, and its anchors."
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults

    class WithoutRunning(FilterDefaults):
        def xtra_procs(self):
            return []

    found = {}
    for page in PAGES:
        book = read_nb(NBS / f"{page}.ipynb")
        WithoutRunning()(book)
        prose = "\n\n".join(c.source for c in book.cells if c.cell_type == "markdown")
        bare = re.sub(r"`[^`\n]+`", "``", FENCE.sub("", prose))
        anchors = {slug(text) for text in re.findall(r"^#+ +(.+)$", FENCE.sub("", prose), re.M)}
        found[page] = SimpleNamespace(cells=book.cells, prose=prose, bare=bare, anchors=anchors)
    return found


def slug(heading):
    "The anchor that Pandoc gives a heading."
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
    text = re.sub(r"[^\w\s.-]", "", text.lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def listed_in(contents):
    for entry in contents:
        yield from listed_in(entry["contents"]) if isinstance(entry, dict) else [entry.removesuffix(".ipynb")]


@pytest.mark.parametrize("page, name", [("00_config", "load_config"), ("01b_masks", "tokenize_chat"), ("07e_pictures", "Picture")])
def test_parameters_are_shown_with_their_comments_and_source(page, name):
    "Of a plain function, of one whose annotations are imported for checkers alone, and of what nbdev itself can't show."
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults

    book = read_nb(NBS / f"{page}.ipynb")
    FilterDefaults()(book)
    cell = next(c for c in book.cells if f"show_doc({name})" in c.source)
    text = "".join(line for o in cell.outputs for line in o["data"]["text/markdown"])
    assert f"### {name}" in text and "LNone" not in text
    if name != "Picture":
        lines = (ROOT / f"finetune_nb/{page.partition('_')[2]}.py").read_text(encoding="utf-8").splitlines()
        assert lines[int(re.search(r"\.py#L(\d+)", text)[1]) - 1].startswith(f"def {name}(") and " # " in text


def test_links_and_anchors_lead_somewhere(processed):
    site, repo, dead = settings()["doc_host"] + settings()["doc_baseurl"] + "/", settings()["git_url"] + "/blob/main/", []
    by_address = {site_pages.address(page): page for page in PAGES}
    assert len(by_address) == len(PAGES), "two pages would overwrite each other"
    for page, found in processed.items():
        for target in re.findall(r"\]\(([^)\s]+)", found.bare):
            path, _, anchor = target.partition("#")
            if target.startswith(repo):
                ok = (ROOT / path.removeprefix(repo)).exists()
            elif target.startswith(site):  # made by nbdev of a name in backticks; its anchor comes with the tables of parameters
                ok = path.removeprefix(site) in by_address
            elif re.match(r"https?:|mailto:", target):
                continue
            else:
                there = (NBS / page).parent / path if path else NBS / f"{page}.ipynb"
                other = str(PurePosixPath(there.resolve().relative_to(NBS.resolve())).with_suffix("")) if NBS.resolve() in there.resolve().parents else ""
                ok = there.exists() and (not anchor or other in processed and anchor in processed[other].anchors)
            if not ok:
                dead.append(f"{page}: {target}")
    assert not dead


def test_rows_of_a_table_have_as_many_cells_as_its_head(processed):
    "A bar within code would end a cell, and the table would be shown as bars and dashes."
    for page, found in processed.items():
        for head, rows in re.findall(r"^(\|.+)\n\|(?: *:?-+:? *\|)+\n((?:\|.*\n?)*)", FENCE.sub("", found.prose), re.M):
            cells = {len(re.findall(r"(?<!\\)\|", row)) for row in [head, *rows.splitlines()]}
            assert len(cells) == 1, f"{page}: {head}"


def test_slugs_are_pandocs():
    assert slug("What is said *twice*, or `nearly`?") == "what-is-said-twice-or-nearly"
    assert slug("1. The data") == "the-data"


def test_no_link_lies_within_a_link(processed):
    "nbdev makes links of names in backticks, and in the text of a link that would break it."
    for page, found in processed.items():
        assert not (broken := re.findall(r"\[[^][\n]*\[``\]\([^)]*\)[^][\n]*\]\([^)]*\)", found.bare)), f"{page}: {broken[0]}"


def test_every_picture_has_words(processed):
    for page, found in processed.items():
        assert not re.findall(r"!\[\]\(", found.bare), page
        for cell in found.cells:
            outputs = cell.get("outputs", [])
            if any(kind.startswith("image/") for o in outputs for kind in o.get("data", {})):
                alt = re.search(r'^#\| *fig-alt: *"(.+)"', cell.source, re.M)
                assert alt and len(alt[1]) > 20, f"{page}: a plot needs a line `#| fig-alt: \"what it shows\"`:\n{cell.source}"
            for html in ["".join(o.get("data", {}).get("text/html", "")) for o in outputs]:
                silent = [tag for tag in re.findall(r"<img\b[^>]*>", html) if not re.search(r"\balt=", tag)]
                assert not silent, f"{page}: {silent[0][:80]}"
                assert all(re.search(r"aria-|role=", tag) for tag in re.findall(r"<svg\b[^>]*>", html)), page


def test_no_plot_is_only_its_name(processed):
    for page, found in processed.items():
        for output in [o for cell in found.cells for o in cell.get("outputs", [])]:
            data = output.get("data", {})
            assert not "".join(data.get("text/plain", "")).startswith("<Figure") or "image/png" in data, f"{page}: use matplotlib.pyplot, so that the figure is shown"


def test_every_page_is_in_the_sidebar_once_and_opens_in_colab(processed):
    sidebar = yaml.safe_load((NBS / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    assert [group["section"] for group in sidebar] == ["Start", "How to", "Explanations", "Chapters", "Reference"]
    assert sorted(listed_in(sidebar)) == sorted(PAGES)
    for page, found in processed.items():
        link = site_pages.colab_link("tutorials/finetune" if page == "index" else page, settings())
        assert f"[![Open in Colab]({site_pages.BADGE})]({link})" in found.prose, page


def test_a_cell_that_installs_is_whole_on_the_page(processed):
    for page, found in processed.items():
        for cell in [c for c in found.cells if c.cell_type == "code" and "On Colab: install first" in c.source]:
            assert "%pip install" in cell.source and "sys.modules" in cell.source, page


def test_titles_are_told_apart():
    heads = [site_pages.head(NBS / f"{page}.ipynb") for page in PAGES]
    titles, subtitles = zip(*heads, strict=True)
    assert len(set(titles)) == len(titles), sorted(t for t in titles if titles.count(t) > 1)
    assert len(set(subtitles)) == len(subtitles)


def test_llms_txt_names_every_page():
    text = (NBS / "llms.txt").read_text(encoding="utf-8")
    site = settings()["doc_host"] + settings()["doc_baseurl"]
    assert re.match(r"# \S+\n\n> .+\n", text)
    entries = re.findall(rf"^- \[(.+)\]\({re.escape(site)}/(\S+)\.md\): (.+)$", text, re.M)
    assert sorted(where for _, where, _ in entries) == sorted(map(site_pages.address, PAGES))
    by_address = {site_pages.address(page): page for page in PAGES}
    assert all(title == site_pages.head(NBS / f"{by_address[where]}.ipynb")[0] for title, where, _ in entries)
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert "llms.txt" in quarto["project"]["resources"] and "commonmark" in quarto["format"], "the Markdown that it leads to"


def commands(text):
    "The commands of a block as lists of words, without comments."
    for line in text.splitlines():
        words = shlex.split(line, comments=True) if line.startswith("finetune_nb ") else []
        if words:
            yield words[1:]


def test_every_command_is_understood(processed):
    from finetune_nb.cli import _with_changes, make_parser
    from finetune_nb.config import FinetuneConfig

    parser, seen = make_parser(), 0
    for page in PAGES:
        for language, block in FENCE.findall(processed[page].prose):
            for words in commands(block) if not language else []:
                try:
                    options = parser.parse_args(words)
                except SystemExit:
                    pytest.fail(f"{page}: finetune_nb {' '.join(words)} is not understood")
                _with_changes(FinetuneConfig(), getattr(options, "set", []))
                seen += 1
    assert seen > 20


def test_every_setting_and_name_is_there(processed):
    import finetune_nb
    from finetune_nb.config import FinetuneConfig, field_help

    known = {"finetune_nb"} | set(field_help(FinetuneConfig)) | set(finetune_nb.__all__) | NOT_OURS
    for path in (ROOT / "finetune_nb").glob("*.py"):
        known |= {f"finetune_nb.{path.stem}", *re.findall(r"^ *(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.M)}
    for page in PROSE:
        blocks = FENCE.findall(processed[page].prose)
        for text in [block for language, block in blocks if language == "yaml"]:
            for name, value in yaml.safe_load(text).items():
                setattr(FinetuneConfig(), name, value)
        for tree in [ast.parse(block) for language, block in blocks if language == "python"]:
            for node in ast.walk(tree):
                names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) and node.module == "finetune_nb" else []
                assert set(names) <= set(finetune_nb.__all__), (page, names)
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "FinetuneConfig":
                    assert {k.arg for k in node.keywords} <= set(field_help(FinetuneConfig)), page
        for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", processed[page].prose)):
            name = re.fullmatch(r"([a-z]+(?:_[a-z0-9_]+)+|finetune_nb\.\w+)(\(.*\))?", span)
            assert not name or name[1] in known, f"{page}: `{span}` is nothing that there is"
