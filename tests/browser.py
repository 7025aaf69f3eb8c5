"""A notebook as a person meets it: JupyterLab, Notebook 7 or Voila as a server, headless Chromium, and hands to work it with.

`conftest.py` makes the fixtures `lab`, `notebook7` and `voila` of these parts. All waiting is for a condition, and whatever is
started here is ended here, the kernels too.
"""

import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import nbformat
import psutil

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "test"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
# News, update checks and notices would cover the page; saving is left to the test, which then knows what is on disk.
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "docmanager-extension/plugin": {"autosave": False},
}
# What the pages complain of by themselves, whatever the notebook: Voila's look for fonts on the internet, and
# those of ipywidgets 7 look there for an old MathJax; where there is no internet, the picture of a Colab badge; and
# Notebook 7 looks for settings that it does not have, and Voila tries to load a part of Notebook 7 that is not for it.
NOISE = re.compile(r"cdn\.jsdelivr\.net/npm/@fortawesome/|reading 'Queue'|colab-badge\.svg|reading 'schema'|getter for the shared module is not a function")

# The splash are the moons that circle over the page while it, or a theme, loads.
IDLE = """() => {
    const panel = window.jupyterapp?.shell?.currentWidget, kernel = panel?.sessionContext?.session?.kernel;
    const idle = kernel?.connectionStatus === 'connected' && kernel.status === 'idle' && !window.cellsRun;
    return panel?.context?.isReady && idle && !document.getElementById('jupyterlab-splash');
}"""
# Never hand a command's promise to Playwright: awaiting it there hangs.
RUN_ALL = """() => {
    window.cellsRun = true;
    jupyterapp.commands.execute('notebook:run-all-cells').finally(() => { window.cellsRun = false; });
}"""
COMMAND = """([name, args]) => {
    window.commandDone = false;
    jupyterapp.commands.execute(name, args).finally(() => { window.commandDone = true; });
}"""
EXECUTE = """code => {
    const notebook = jupyterapp.shell.currentWidget.content, cells = notebook.model.sharedModel, last = cells.cells.length;
    cells.insertCell(last, {cell_type: 'code', source: code});
    notebook.activeCellIndex = last;
    notebook.deselectAll();
    const model = notebook.activeCell.model, began = performance.now();
    window.answer = null;
    jupyterapp.commands.execute('notebook:run-cell').finally(() => {
        window.answer = {seconds: (performance.now() - began) / 1000, outputs: model.outputs.toJSON()};
    });
}"""
CELL_ERRORS = """() => jupyterapp.shell.currentWidget.content.model.sharedModel.cells
    .flatMap(cell => cell.outputs ?? []).filter(output => output.output_type === 'error')
    .map(output => `${output.ename}: ${output.evalue}`)"""


def find_chromium() -> str | None:
    "The browser: named by the environment variable CHROMIUM, or the first on the PATH."
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def why_not(*modules: str) -> str:
    "Why a browser test can't run here, in one sentence; nothing when it can."
    if not find_chromium():
        return "No Chromium on the PATH: install the package chromium, or name the program in the variable CHROMIUM."
    absent = [name for name in ("playwright", *modules) if not importlib.util.find_spec(name)]
    return f"The browser tests need {' and '.join(absent)}, which pip can install." if absent else ""


def until(condition, what: str, seconds: float = 60):
    "The first true answer of the condition; the error says what was waited for."
    end = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited {seconds} s until {what}"
        time.sleep(0.02)  # the pace of asking, not a guess at how long it takes
    return answer


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_notebook(path: Path, *cells: str) -> Path:
    "A notebook of these code cells, for the kernel of this very Python."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path


def end_processes(process: subprocess.Popen) -> None:
    "Ends a process and its descendants, politely first; kernels live in sessions of their own, so no signal to a group does."
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.terminate()
    for member in psutil.wait_procs(family, timeout=5)[1]:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=5)


class Server:
    "JupyterLab, Notebook or Voila over a folder, with settings, configuration and kernel of its own."

    COMMANDS = {
        "lab": "jupyterlab --allow-root --ip=127.0.0.1 --IdentityProvider.token={token} --ServerApp.root_dir={folder} "
        "--ServerApp.port_retries=0 --LabApp.expose_app_in_browser=True",
        "notebook": "notebook --allow-root --ip=127.0.0.1 --IdentityProvider.token={token} --ServerApp.root_dir={folder} "
        "--ServerApp.port_retries=0 --JupyterNotebookApp.expose_app_in_browser=True",
        "voila": "voila {folder} --Voila.ip=127.0.0.1 --token={token} --Voila.port_retries=0 --VoilaConfiguration.show_tracebacks=True",
    }

    def __init__(self, kind: str, home: Path):
        self.folder, self.home, self.port = home / "notebooks", home, free_port()
        for name in ("notebooks", "settings", "workspaces", "config", "runtime", "data", "ipython"):
            (home / name).mkdir(parents=True)
        self._write_settings()
        self._write_kernel()
        words = [word.format(token=TOKEN, folder=self.folder) for word in self.COMMANDS[kind].split()]
        command = [sys.executable, "-m", *words, "--no-browser", f"--port={self.port}"]
        self.log = home / "server.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _write_settings(self) -> None:
        "The settings of the page that differ from what a newcomer has."
        for name, values in SETTINGS.items():
            path = self.home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))

    def _write_kernel(self) -> None:
        "A kernel named python3 that is this very Python: one installed for the user could come first otherwise."
        folder = self.home / "data" / "kernels" / "python3"
        folder.mkdir(parents=True)
        words = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (folder / "kernel.json").write_text(json.dumps({"argv": words, "display_name": "Python 3", "language": "python"}))

    def _environment(self) -> dict:
        "This process's variables, with every folder of Jupyter a temporary one and this checkout first on the path."
        folders = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config"}
        folders |= {"JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "data", "IPYTHONDIR": "ipython"}
        given = [str(Path(folder).resolve()) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
        # other widgets on the path bring their own half in the page, which has to come before the installed one
        shares = [str(self.home / "data"), *(str(Path(folder) / "share" / "jupyter") for folder in given)]
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), *given]), "JUPYTER_PATH": os.pathsep.join(shares)}
        return os.environ | {name: str(self.home / folder) for name, folder in folders.items()} | paths

    def ask(self, method: str, path: str):
        "The server's answer to a request, or None while it doesn't answer."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)  # urllib would go by way of a proxy
        try:
            connection.request(method, path, headers={"Authorization": f"token {TOKEN}"})
            body = connection.getresponse().read()
            return json.loads(body) if body.startswith((b"{", b"[")) else body.decode()
        except OSError:
            return None
        finally:
            connection.close()

    def wait(self) -> "Server":
        "Waits until it answers; if it ends instead, says its last words."

        def answers():
            assert self.process.poll() is None, "the server ended:\n" + self.log.read_text()[-2000:]
            return self.ask("GET", "/api") is not None

        until(answers, "the server answers")
        return self

    def url(self, path: str, *flags: str) -> str:
        "The address of a page, with the token."
        return f"http://127.0.0.1:{self.port}/{quote(path)}?" + "&".join([f"token={TOKEN}", *flags])

    def end_kernels(self) -> None:
        "Ends the kernels, so that one test leaves nothing to the next."
        for kernel in self.ask("GET", "/api/kernels") or []:
            self.ask("DELETE", f"/api/kernels/{kernel['id']}")


@contextmanager
def running_server(kind: str, home: Path):
    "A server that answers, ended afterwards with all its kernels."
    server = Server(kind, home)
    try:
        yield server.wait()
    finally:
        end_processes(server.process)


@contextmanager
def running_chromium():
    "Headless Chromium, ended afterwards."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Answer:
    "What a cell printed or returned, and the seconds from pressing Run until it stood there."

    text: str
    seconds: float


def text_of_outputs(outputs: list) -> str:
    "Outputs as one text: what was printed, the last value, or the error."
    parts = [o.get("text") or o.get("data", {}).get("text/plain") or o.get("evalue") or "" for o in outputs]
    return "".join("".join(part) for part in parts).strip()


class Page:
    "A page in the browser, what a person does there, and what the console complained of."

    OUTPUT = "body"  # where `see` looks

    def __init__(self, browser, server: Server, width: int = 1280, height: int = 1000, seconds: float = 30):
        self.server, self.folder, self.seconds = server, server.folder, seconds
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(seconds * 1000)
        self.console: list[str] = []
        self.page.on("console", lambda m: self.console.append(f"{m.text} ({m.location['url']})") if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("dialog", lambda dialog: dialog.accept())  # leaving a page with unsaved changes asks back

    def close(self) -> None:
        "Closes the page."
        self.page.context.close()

    def write(self, name: str, *cells: str) -> str:
        "Writes a notebook of these code cells into the server's folder; the answer is what `open` takes."
        return write_notebook(self.folder / name, *cells).name

    def wait(self, condition: str, what: str, argument=None, seconds: float | None = None):
        "Waits for a condition in JavaScript; the error says what was waited for and what the page showed."
        from playwright.sync_api import TimeoutError

        try:
            return self.page.wait_for_function(condition, arg=argument, timeout=1000 * (seconds or self.seconds)).json_value()
        except TimeoutError:
            notes = self.page.locator("[role=status], .fnb-note").locator("visible=true").all_inner_texts()  # a long page ends far from them
            shown = "\n".join([*notes, self.page.locator("body").inner_text()[-1500:]])
            raise AssertionError(f"waited {seconds or self.seconds} s until {what}; console: {self.console}; the page shows:\n{shown}") from None

    def see(self, pattern: str, seconds: float | None = None) -> str:
        "Waits until the outputs show what the pattern (a regular expression of JavaScript) finds, and returns that."
        condition = """([pattern, output]) => {
            const texts = [...document.querySelectorAll(output)].map(element => element.innerText);
            return texts.join('\\n').match(new RegExp(pattern))?.[0];
        }"""
        return self.wait(condition, f"the outputs show {pattern!r}", [pattern, self.OUTPUT], seconds)

    def text_of(self, selector: str) -> str:
        "The text of the first visible element that the selector finds."
        return self.page.locator(selector).locator("visible=true").first.inner_text()

    def control(self, label: str):
        "The widget with this description or aria-label, as a Playwright locator."
        exact, named = re.compile(rf"^\s*{re.escape(label)}\s*$"), f"[aria-label={json.dumps(label)}]"
        described = self.page.locator(".widget-label, .widget-label-basic", has_text=exact).or_(self.page.locator(named))
        # boxes around the widget match too: the innermost one comes last
        return self.page.locator(".jupyter-widgets", has=described).locator("visible=true").last

    def move_slider(self, label: str, presses: int = 1, key: str = "ArrowRight") -> str:
        "Moves the first handle of a slider by keys and returns the value that it then shows."
        handle = self.control(label).locator(".noUi-handle, .ui-slider-handle").first  # of ipywidgets 8, and of 7
        handle.focus()
        for _ in range(presses):
            handle.press(key)
        return self.shown(label)

    def press_slider(self, label: str, share: float) -> str:
        "Presses the mouse on a slider, at a share of its length, and returns the value that it then shows."
        track = self.control(label).locator(".noUi-base, .ui-slider").first
        track.scroll_into_view_if_needed()
        box = track.bounding_box()
        track.click(position={"x": share * box["width"], "y": box["height"] / 2}, force=True)
        return self.shown(label)

    def shown(self, label: str) -> str:
        "The value that a control shows: a slider's readout, a choice, a text, or whether it is ticked."
        return self.control(label).evaluate(
            """widget => {
                const readout = widget.querySelector('.widget-readout'), field = widget.querySelector('select, textarea, input');
                if (readout) return readout.textContent.trim();
                if (field?.type === 'checkbox') return String(field.checked);
                return field?.tagName === 'SELECT' ? field.selectedOptions[0]?.textContent.trim() : field?.value ?? widget.innerText;
            }"""
        )

    def fill(self, label: str, value: str | bool) -> None:
        "Chooses an option, ticks or unticks a box, or types a text and leaves the field, which sends it."
        field = self.control(label).locator("select, textarea, input").first
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(str(value))
        elif field.get_attribute("type") == "checkbox":
            field.set_checked(bool(value))
        else:
            field.fill(str(value))
            field.press("Tab")

    def click(self, text: str) -> None:
        "Clicks the widget with this text: a button, a tab or the head of a fold."
        heads = "button.jupyter-button, .widget-tab .lm-TabBar-tab, .widget-tab .p-TabBar-tab, .jupyter-widget-Collapse-header, .p-Collapse-header"
        self.page.locator(heads, has_text=re.compile(rf"^\s*{re.escape(text)}\s*$")).locator("visible=true").first.click()

    def screenshot(self, path: str | Path) -> None:
        "Writes what the window shows as PNG."
        self.page.screenshot(path=str(path))

    def errors(self) -> list[str]:
        "What the console complained of, without what JupyterLab and Voila say of themselves."
        return [message for message in self.console if not NOISE.search(message)]


class Lab(Page):
    "A notebook in JupyterLab."

    OUTPUT = ".jp-Notebook .jp-OutputArea"  # a cell's code often holds the same words
    PATH = "lab/tree"

    def close(self) -> None:
        "Closes the page and ends its kernel, which would go on without it."
        super().close()
        self.server.end_kernels()

    def open(self, notebook: str) -> None:
        "Opens a notebook of the server's folder in a fresh workspace and waits for its kernel."
        self.page.goto(self.server.url(f"{self.PATH}/{notebook}", "reset"))
        self.wait_idle()

    def reload(self) -> None:
        "Loads the page anew, as F5 does, and waits for the kernel that goes on."
        self.page.reload()
        self.wait_idle()

    def wait_idle(self, seconds: float | None = None) -> None:
        "Waits until the notebook is open, its kernel is connected and idle, and no cell waits to be run."
        self.wait(IDLE, "the notebook is open and its kernel idle", seconds=max(seconds or 0, 300))  # a kernel may start late on a busy machine

    def command(self, name: str, args: dict | None = None) -> None:
        "Runs a command of JupyterLab to its end."
        self.page.evaluate(COMMAND, [name, args or {}])
        self.wait("() => window.commandDone", f"the command {name} is done")

    def run_all(self, seconds: float = 120) -> None:
        "Runs all cells to the end; a cell that fails is an error here too."
        self.page.evaluate(RUN_ALL)
        self.wait_idle(seconds)
        assert not (failed := self.page.evaluate(CELL_ERRORS)), failed

    def execute(self, code: str, seconds: float | None = None) -> Answer:
        "Runs code in a new cell at the end."
        self.page.evaluate(EXECUTE, code)
        answer = self.wait("() => window.answer", f"{code!r} is answered", seconds=seconds)
        return Answer(text_of_outputs(answer["outputs"]), answer["seconds"])

    def save(self) -> None:
        "Saves the notebook with its outputs."
        self.command("docmanager:save")

    def restart_kernel(self) -> None:
        "Restarts the kernel without the dialog."
        self.page.evaluate("() => { window.restarted = false; jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart().finally(() => { window.restarted = true; }); }")
        self.wait("() => window.restarted", "the kernel is restarted")
        self.wait_idle()

    def theme(self, name: str = "JupyterLab Dark") -> None:
        "Changes the theme and waits until the page wears it."
        self.command("apputils:change-theme", {"theme": name})
        worn = "name => document.body.dataset.jpThemeName === name && !document.getElementById('jupyterlab-splash')"
        self.wait(worn, f"the theme is {name}", name)


class Notebook7(Lab):
    "A notebook in Jupyter Notebook 7, which is made of JupyterLab's parts."

    PATH = "notebooks"


class Voila(Page):
    "A notebook as a page of Voila, its cells hidden."

    def open(self, notebook: str) -> None:
        "Opens the page; its cells run meanwhile, so wait for what they show with `see`."
        self.page.goto(self.server.url(f"voila/render/{notebook}"))

    def reload(self) -> None:
        "Loads the page anew; Voila gives it a new kernel."
        self.page.reload()
