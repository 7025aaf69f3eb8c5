"""The pages of the site in a browser: as nbconvert shows them, and where Quarto is, as they are."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_site import NBS, PAGES, PROSE, site_pages


def test_pages_fit_a_telephone(chromium, tmp_path):
    "The prose pages, as HTML by nbconvert with the site's own style: nothing is wider than the screen but what scrolls by itself."
    from nbconvert import HTMLExporter

    style, exporter = (NBS / "styles.css").read_text(encoding="utf-8"), HTMLExporter(template_name="basic")
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.route("http*://**", lambda route: route.abort())
    wide = []
    for name in PROSE:
        body, _ = exporter.from_filename(NBS / f"{name}.ipynb")
        for picture in re.findall(r'src="((?:\.\./)*images/[^"]+)"', body):
            body = body.replace(picture, ((NBS / name).parent / picture).resolve().as_uri())
        (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8><style>pre{{overflow-x:auto}}{style}</style><main>{body}</main>", encoding="utf-8")
        page.goto((tmp_path / "page.html").as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        wide += [f"{name}: {width} pixels"] if width > 390 else []
    page.close()
    assert not wide


@pytest.mark.skipif(not shutil.which("quarto"), reason="the site is rendered by Quarto, which is not on the PATH")
def test_the_rendered_site(chromium, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "demo", "runs", "_proc", "_docs", "__pycache__"))
    subprocess.run([Path(sys.executable).parent / "nbdev_docs"], cwd=copy, check=True, capture_output=True)
    docs = copy / "_docs"
    pages = [docs / site_pages.address(page) for page in PAGES]
    assert [page for page in pages if not page.is_file()] == [] and (docs / "llms.txt").is_file() and (docs / "search.json").is_file()
    assert [page for page in pages if not page.with_name(f"{page.name}.md").is_file()] == [], "llms.txt leads to these"
    page, complaints = chromium.new_page(viewport={"width": 1280, "height": 900}), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    for name in PAGES:
        page.goto((docs / site_pages.address(name)).as_uri())
        assert page.locator("img:not([alt])").count() == 0, name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
    page.locator(".quarto-color-scheme-toggle").first.click()
    assert page.evaluate("document.body.classList.contains('quarto-dark')") and not complaints
    page.close()
