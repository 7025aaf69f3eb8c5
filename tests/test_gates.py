"""What the package never does, read from its source: no pickles, no shell, no markup past the one place that escapes."""

import ast
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

SOURCES = sorted((ROOT / "finetune_nb").glob("*.py"))
NO_IMPORT = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty", "telnetlib", "http.server", "socketserver", "xml.etree.ElementTree"}
NO_CALL = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "os.spawnvp", "torch.load", "torch.save", "pd.read_pickle", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "input", "tempfile.mktemp", "push_to_hub", "upload_file", "upload_folder", "create_repo", "create_commit"}  # fmt: skip
DISPLAYS = {"HTML", "Markdown", "Javascript", "JSON", "Image", "SVG", "IFrame", "display_html", "display_javascript"}  # of IPython: some read a file of the given name


def name_of(node):
    "`a.b.c` of what is called."
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else ["?"]), *reversed(parts)])


def offences(source):
    "What a module must not do: (line, what)."
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name in NO_IMPORT or a.name.split(".")[0] in NO_IMPORT]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, node.module)] if node.module in NO_IMPORT or str(node.module).split(".")[0] in NO_IMPORT else []
            if node.module == "IPython.display":
                found += [(node.lineno, a.name) for a in node.names if a.name in DISPLAYS]
        elif isinstance(node, ast.Call):
            name, options = name_of(node.func), {k.arg: k.value for k in node.keywords}
            if name in NO_CALL or name.rpartition(".")[2] in {n for n in NO_CALL if "." not in n and n not in ("eval", "exec", "compile", "input")}:
                found.append((node.lineno, name))
            for option, bad in (("shell", True), ("allow_pickle", True), ("weights_only", False), ("verify", False)):
                if option in options and getattr(options[option], "value", bad) == bad:
                    found.append((node.lineno, f"{option}={bad}"))
            if name.rpartition(".")[2] == "load" and name.split(".")[0] in ("np", "numpy", "torch"):
                found.append((node.lineno, name))
            if "trust_remote_code" in options and isinstance(options["trust_remote_code"], ast.Constant) and options["trust_remote_code"].value is not False:
                found.append((node.lineno, "trust_remote_code"))
            if name.rpartition(".")[2] == "from_pretrained" and name.rpartition(".")[0] in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "kind") and not {"trust_remote_code", None} & options.keys():
                found.append((node.lineno, f"{name} that might ask whether code is to be run"))
            if name.startswith("subprocess.") and node.args and not isinstance(node.args[0], (ast.List, ast.Name)):
                found.append((node.lineno, f"{name} without a list"))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_the_package_does_none_of_it(path):
    found = offences(path.read_text(encoding="utf-8"))
    assert [what for _, what in found] == (["api.create_repo", "api.create_commit"] if path.stem == "upload" else []), "only the explicit upload writes to a hub"


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import dill as d", "import joblib", "import shelve", "eval('1')", "exec(x)", "import os\nos.system('a')", "os.popen('a')",
    "torch.load('a')", "torch.load('a', weights_only=True)", "np.load('a')", "np.load('a', allow_pickle=True)", "f(weights_only=False)", "subprocess.run('a', shell=True)", "subprocess.run(f'a {b}')",
    "yaml.load(x)", "from IPython.display import HTML", "from IPython.display import display, Markdown", "model.push_to_hub('a')", "api.upload_folder('a')", "f(trust_remote_code=True)", "requests.get(u, verify=False)", "f(shell=x)",
    "AutoTokenizer.from_pretrained(folder)", "AutoModelForCausalLM.from_pretrained(a, dtype=b)",
])  # fmt: skip
def test_the_gate_shuts(source):
    assert offences(source), source


def test_what_is_fine_is_let_through():
    fine = "model.eval()\nsubprocess.call([a, b])\njson.load(f)\nre.compile('a')\nyaml.safe_load(x)\nfrom IPython.display import display\nf(trust_remote_code=False)\nf(weights_only=True)\nAutoConfig.from_pretrained(a, **options)\nAutoConfig.from_pretrained(a, trust_remote_code=b)"
    assert offences(fine) == []


RENDERS = {"apply_chat_template", "render_jinja_template", "_compile_jinja_template", "from_string", "jinja2", "SandboxedEnvironment", "ImmutableSandboxedEnvironment"}
MAY_RENDER = {"sandbox": RENDERS, "lm_eval_tasks": {"apply_chat_template"}, "turns": {"jinja2"}}  # lm-eval renders by itself; the last one reads an error


def renders(source):
    "What in a module renders a template: calls, what is imported, and settings of calls that let others do it."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found |= {name_of(node.func).rpartition(".")[2], *(k.arg for k in node.keywords)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {str(getattr(node, "module", "")).partition(".")[0], *(a.name.partition(".")[0] for a in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found & RENDERS


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_templates_are_rendered_behind_the_wall_alone(path):
    assert renders(path.read_text(encoding="utf-8")) <= MAY_RENDER.get(path.stem, set()), "use render_chats, render_ids, render_template or render_marks"


def test_the_gate_of_templates_shuts():
    for source in ("t.apply_chat_template(c)", "f = t.apply_chat_template", "from jinja2 import Template", "from a.b import render_jinja_template", "import jinja2.sandbox", "f(apply_chat_template=True)"):
        assert renders(source), source
    assert not renders("render_chats(t, c)\nt.chat_template")


def test_markup_is_made_by_modules_that_escape():
    "A module that writes tags around a value imports `escape`, or writes through one that does."
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if re.search(r"f['\"][^'\"\n]*<(?:td|p|pre|li|b|h\d|div|span|summary)\b[^>]*>\{", text):
            assert "from html import escape" in text, path.name


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_may_do_little(path):
    flow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert flow["permissions"] == {"contents": "read"} and "pull_request_target" not in path.read_text(encoding="utf-8")
    for name, job in flow["jobs"].items():
        more = set(job.get("permissions", {}).items()) - {("contents", "read")}
        assert more <= {"deploy": {("pages", "write"), ("id-token", "write")}, "publish": {("id-token", "write")}}.get(name, set()), f"{name} may {more}"
        for step in job.get("steps", []):  # none where another workflow is called
            assert "${{ github.event" not in step.get("run", ""), "an event's text in a shell"
            if step.get("uses", "").startswith("actions/checkout"):
                assert step["with"]["persist-credentials"] is False


def test_what_is_promised_is_written_down():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "report" in text.lower() and "SECURITY.md" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.trains
def test_nothing_is_listened_to_or_unpickled_where_the_package_is_imported():
    code = (
        "import sys\nseen = []\nsys.addaudithook(lambda e, a: seen.append(e) if e in ('pickle.find_class', 'socket.bind', 'socket.connect', 'os.system') else None)\n"
        "import pkgutil, importlib, finetune_nb\n"
        "for m in [m for m in pkgutil.iter_modules(finetune_nb.__path__) if m.name != '__main__']: importlib.import_module('finetune_nb.' + m.name)\nprint(seen)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


def made_in_any_precision(source):
    "Tensors of numbers that are made in torch's default precision, which transformers changes for all threads while it makes a model."
    makers = {f"torch.{name}" for name in ("zeros", "ones", "randn", "rand", "empty", "linspace", "full", "eye", "normal")}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and name_of(node.func) in makers]
    return [node.lineno for node in calls if "dtype" not in {k.arg for k in node.keywords}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_tensors_have_a_precision_of_their_own(path):
    assert made_in_any_precision(path.read_text(encoding="utf-8")) == []


def test_the_gate_of_precision_shuts():
    assert made_in_any_precision("x = torch.zeros(3)\ntorch.rand(2, device=d)") == [1, 2] and made_in_any_precision("torch.zeros(3, dtype=d)\ntorch.zeros_like(x)\nmath.full(3)") == []
