"""How nbdev makes the tables of parameters on this site; named in settings.ini under `procs`.

nbdev's own `exec_show_docs` runs every cell of a chapter that has an import in it. Ours have, trainings too, and others miss
what the cells between them defined. The module is exported already, so its names are taken from there.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from execnb.shell import CaptureShell
from nbdev.process import Processor

ROOT = Path(__file__).resolve().parent.parent


class show_documents(Processor):
    "Runs the cells `show_doc(name)` of a page with the names of its module."

    def begin(self) -> None:
        "Imports the module that is exported from this page, if one is."
        if any(map(_asked, self.nb.cells)):
            self.module, self.shell = _module_of(Path(self.nb.path_).stem), CaptureShell()
            self.shell.run_cell("from nbdev.showdoc import show_doc")
            self.shell.user_ns.update(vars(self.module))

    def cell(self, cell: Any) -> None:
        "Runs it, and keeps what it shows; where nbdev can't show something, its heading and its docstring."
        if not (name := _asked(cell)):
            return
        self.shell.cell(cell)
        thing = getattr(self.module, name)
        if self.shell.exc:
            text = f"### {name}\n\n*{inspect.getdoc(thing) or ''}*"
            cell.outputs = [{"output_type": "display_data", "metadata": {}, "data": {"text/markdown": text.splitlines(True)}}]
        for output in cell.outputs:  # nbdev finds no line for a name with its module before it
            lines = output.get("data", {}).get("text/markdown", [])
            lines[:] = [line.replace("#LNone", f"#L{inspect.getsourcelines(thing)[1]}") if "#LNone" in line else line for line in lines]


def _asked(cell: Any) -> str:
    "The name that a cell shows the documentation of."
    found = re.search(r"^show_doc\((\w+)\)", cell.source or "", re.M) if cell.cell_type == "code" else None
    return found[1] if found else ""


def _module_of(stem: str) -> ModuleType:
    "The module that is exported from the notebook of this name, with what it imports for annotations alone."
    mark = f"File to edit: ../nbs/{stem}.ipynb"
    path = next(path for path in (ROOT / "finetune_nb").glob("*.py") if mark in path.read_text(encoding="utf-8"))
    module = importlib.import_module(f"finetune_nb.{path.stem}")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), path.name, "exec"), vars(module))
    return module
