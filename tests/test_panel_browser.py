"""The panel as a person meets it: the tutorial in JupyterLab, and the panel alone in Voila, on the embedded model."""

import json
import re
import shutil
from itertools import product

import pytest
from browser import Lab
from conftest import ROOT

SLOW = 300  # seconds that what trains or answers may take where the machine has other things to do
BAD = "<img src=x onerror=window.hacked=1>"
PICTURE = "() => [...document.querySelectorAll('img.widget-image')].filter(i => i.offsetParent)[0]?.src"
CARD = """name => [...document.querySelectorAll('.fnb-card')].filter(card => card.offsetParent)
    .find(card => card.querySelector('span').textContent === name)?.querySelector('b').textContent"""


POOR = """() => {
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
    const ground = e => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .9) return c; } return [255, 255, 255]; };
    return [...document.querySelectorAll('.fnb *')].filter(e => e.offsetParent && !e.closest(':disabled') && [...e.childNodes].some(n => n.nodeType === 3 && /\\w/.test(n.textContent))).filter(e => {
        const pair = [light(numbers(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => b - a);
        return (pair[0] + .05) / (pair[1] + .05) < 4.5;
    }).map(e => e.textContent.slice(0, 60));
}"""
# by tab, a label that stands there alone
TABS = {"Data": "Upload a file", "Settings": "run_name", "Train": "smoothing", "Compare": "judged by", "Chat": r"tokens\s", "Runs": "Bring back", "Export": "Copy the adapter"}
FEW = """from finetune_nb import FinetuneConfig, Splits, icd10_chats
from finetune_nb.panel import panel

data = icd10_chats(n_train=48)
room = panel(FinetuneConfig(), Splits(data.train, data.validation[:4], data.test[:4]))
room"""


@pytest.fixture(autouse=True)
def no_runs_of_other_tests(request):
    for name in ("lab", "notebook7", "voila"):
        if name in request.fixturenames:
            shutil.rmtree(request.getfixturevalue(name).folder / "runs", ignore_errors=True)


def put_tutorial(page):
    "The tutorial in the server's folder, on few chats and with few steps."
    notebook = json.loads((ROOT / "nbs/tutorials/finetune.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            source += "\nn_train, n_validation, max_eval_samples = 48, 4, 3"
        cell["source"] = source.replace("seed=seed,\n)", 'seed=seed,\n    preflight=False,\n    max_steps=12,\n    eval_strategy="steps",\n    eval_steps=6,\n    logging_steps=1,\n)')
        cell["source"] = cell["source"].replace("max_new_tokens=96", "max_new_tokens=24")
    (page.folder / "finetune.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    return "finetune.ipynb"


def card(page, name):
    "The figure with this label that is seen."
    return page.wait(CARD, f"there is a figure {name!r}", name)


def until_card(page, name, pattern, seconds=SLOW):
    "Waits until the figure with this label is as the pattern says."
    condition = f"([name, pattern]) => new RegExp(pattern).test(({CARD})(name) ?? '')"
    page.wait(condition, f"{name} is like {pattern!r}", [name, pattern], seconds)


def choose(page, tab):
    "Brings a tab to the front and waits for what stands on it alone."
    page.click(tab)
    page.see(TABS[tab])


def press(page, text):
    "A button inside the visible tab; `click` would find the tab of the same name."
    page.page.locator("button.jupyter-button:not(.widget-toggle-button)", has_text=re.compile(rf"^\s*{text}\s*$")).locator("visible=true").first.click()


def put_answered_run(page):
    "A run that has answered its test set, named and filled with markup."
    run = page.folder / "runs" / "run-666"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (run / "config.yaml").write_text(f'run_name: "{BAD}"\n')
    rows = [{"model": model, "where": BAD, "question": BAD, "expected": BAD, "answer": BAD + model, "passed": {BAD: False}, "loss": 1, "tokens": 1} for model in ("base", "tuned")]
    (run / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (run / "history.jsonl").write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 9)))


def test_the_tutorial_by_hand(lab):
    lab.open(put_tutorial(lab))
    lab.run_all(SLOW)
    choose(lab, "Settings")
    lab.see("Fits: ", SLOW)
    # the plan follows the sliders
    before = card(lab, "trained parameters")
    assert lab.move_slider("r", 2) == "64"
    until_card(lab, "trained parameters", f"^{4 * int(before.replace(',', '')):,}$")
    assert lab.move_slider("r", 4, "ArrowLeft") == "4"
    assert lab.move_slider("learning_rate", 1, "ArrowLeft") == "0.0015"
    assert float(lab.move_slider("num_train_epochs", 1)) == 1.5
    lab.see("Not used: max_steps=12")
    # a run, watched
    choose(lab, "Train")
    press(lab, "Train")
    until_card(lab, "step", "^[1-9]")
    picture = lab.wait(PICTURE, "there is a curve")
    assert lab.execute("room.train.job.state, 6 * 7").text == "('training', 42)"  # how fast: benchmarks/panel_speed.py
    lab.wait(f"before => ({PICTURE})() !== before", "the curve has grown", picture, SLOW)
    press(lab, "Stop")
    lab.see("Stopped and saved", SLOW)
    step = card(lab, "step")
    press(lab, "Continue")
    lab.see("Finished. run-001", SLOW)
    assert int(card(lab, "step").split()[0]) == 12 >= int(step.split()[0])
    # compared and asked
    choose(lab, "Compare")
    press(lab, "Answer the test set")
    lab.see("3 test questions", SLOW)
    lab.fill("show", "changed")
    lab.see(r"\d of \d shown, 3 in all", SLOW)
    choose(lab, "Chat")
    lab.fill("question", "Which code for a cough? Entry: cough: R05 (Cough)")
    lab.move_slider("tokens", 1, "Home")
    press(lab, "Ask")
    lab.wait("() => [...document.querySelectorAll('[aria-live] pre')].filter(e => e.offsetParent && e.innerText.trim() !== '…').length === 2", "both have answered", seconds=SLOW)
    # found again
    lab.save()
    lab.reload()
    choose(lab, "Train")
    lab.see("Finished. run-001", SLOW)
    assert card(lab, "step").startswith("12")
    assert lab.execute("again = panel(config, data); again.train.job is room.train.job, again.train.job.state, len(again.train.job.history) > 12").text == "(True, 'finished', True)"
    assert lab.errors() == []


def test_no_text_becomes_markup(lab):
    "In chats, settings, names of runs, answers and errors."
    put_answered_run(lab)
    chats = [{"messages": [{"role": "user", "content": f"{BAD} {i}"}, {"role": "assistant", "content": BAD * 2}]} for i in range(30)]
    (lab.folder / "bad.jsonl").write_text("\n".join(map(json.dumps, chats)))
    code = f"""
from finetune_nb import FinetuneConfig
from finetune_nb.panel import panel

room = panel(FinetuneConfig(train_file="bad.jsonl"))
room.form.controls["target_modules"].value = {BAD!r}
room.form.path.value = {BAD!r}
room.form.load.click()
room.form.show_code.click()
room.chat.question.value = {BAD!r}
room.data.filter.value = "img"
room"""
    lab.open(lab.write("bad.ipynb", code))
    lab.run_all()
    for tab in ("Data", "Settings", "Train", "Compare", "Chat", "Runs", "Export"):
        choose(lab, tab)
        if tab == "Data":
            lab.see("onerror=window.hacked=1>")
            press(lab, "Read the chats")
        if tab == "Settings":
            for name in ("run_name", "model_name_or_path"):
                lab.fill(name, BAD)
        if tab == "Compare":
            lab.see("1 of 1 shown")
        if tab in ("Train", "Chat"):
            press(lab, "Ask" if tab == "Chat" else "Train")
        assert lab.execute(f"'{tab}'").text == f"'{tab}'"
    assert lab.page.evaluate("() => window.hacked") is None
    assert lab.page.evaluate("() => document.querySelectorAll('img[src=\"x\"]').length") == 0


@pytest.fixture(scope="module")
def room(chromium, lab_server):
    "The panel alone, on few chats, beside a run that has answered its test set: a page for all tests that only look at it."
    shutil.rmtree(lab_server.folder / "runs", ignore_errors=True)
    page = Lab(chromium, lab_server)
    put_answered_run(page)
    page.open(page.write("alone.ipynb", FEW))
    page.run_all()
    choose(page, "Settings")
    page.see("Fits: ", SLOW)
    page.save()
    yield page
    page.close()


@pytest.fixture
def alone(room):
    "It, at the settings, from their beginning."
    room.page.set_viewport_size({"width": 1280, "height": 1000})
    choose(room, "Settings")
    room.page.evaluate("() => [...document.querySelectorAll('.fnb')].find(e => e.offsetParent).scrollIntoView({block: 'start'})")
    return room


def test_everything_has_a_name(alone):
    "As a screen reader would say it: every control by its label, every picture by its description."
    for tab in TABS:
        choose(alone, tab)
        nameless = alone.page.evaluate(
            """() => [...document.querySelectorAll('.fnb input, .fnb select, .fnb textarea, .fnb button, .fnb [role=slider], .fnb img')].filter(e => e.offsetParent).filter(e => {
                const widget = e.closest('.jupyter-widgets'), label = widget?.querySelector('.widget-label, .widget-label-basic');
                return !(e.getAttribute('aria-label') || e.alt || e.labels?.length || e.innerText?.trim() || e.title || label?.textContent.trim());
            }).map(e => e.outerHTML.slice(0, 200))"""
        )
        assert nameless == [], tab
        cut = alone.page.evaluate("""() => [...document.querySelectorAll('.fnb .widget-label, .fnb .widget-label-basic, .fnb button')]
            .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)""")
        assert cut == [], tab


def test_the_plan_stays_in_sight(alone):
    "While sliders far below it are turned, where it stands beside them."
    places = "() => [...document.querySelector('.fnb-columns').children].map(column => column.getBoundingClientRect()).map(box => [box.top, box.height])"
    (form_top, _), (plan_top, height) = alone.page.evaluate(places)
    assert form_top == plan_top
    alone.page.evaluate("() => [...document.querySelectorAll('.fnb-columns .widget-label')].find(e => e.textContent == 'learning_rate').scrollIntoView({block: 'center'})")
    alone.page.wait_for_function("() => document.querySelector('.fnb-columns').getBoundingClientRect().top < -100")
    (form_top, _), (plan_top, now) = alone.page.evaluate(places)
    assert 0 <= plan_top < 200 and now == height, (form_top, plan_top)


def test_everything_can_be_reached_by_keys(alone):
    alone.page.locator("button.jupyter-button", has_text="the guide's").locator("visible=true").focus()
    reached = []
    for _ in range(30):
        alone.page.keyboard.press("Tab")
        reached.append(alone.page.evaluate("() => document.activeElement.closest('.jupyter-widgets')?.querySelector('.widget-label, .widget-label-basic')?.textContent.trim() || document.activeElement.innerText"))
    assert {"small GPU", "Save", "r", "learning_rate", "num_train_epochs"} <= set(reached), reached


@pytest.mark.parametrize("theme", [pytest.param("JupyterLab Light", marks=pytest.mark.slow), "JupyterLab Dark"])
def test_words_can_be_read(alone, theme):
    "Ink and ground of every visible text differ enough (WCAG: 4.5 to 1), also on a narrow page, where nothing sticks out."
    alone.theme(theme)
    tops = alone.page.evaluate("() => [...document.querySelector('.fnb-columns').children].map(column => column.getBoundingClientRect().top)")
    assert tops[0] == tops[1], "the plan stands beside the settings"
    for tab in TABS:
        choose(alone, tab)
        assert alone.page.evaluate(POOR) == [], tab
    alone.command("application:toggle-left-area")
    for width, tab in product((480, 400), TABS):
        alone.page.set_viewport_size({"width": width, "height": 1000})
        choose(alone, tab)
        wide = alone.page.evaluate("""() => { const box = [...document.querySelectorAll('.jp-OutputArea-output .fnb')].find(e => e.offsetParent);
            return [...box.querySelectorAll('*')].filter(e => e.offsetParent && !e.closest('.fnb-scroll *') && e.getBoundingClientRect().right > box.getBoundingClientRect().right + 1).map(e => e.outerHTML.slice(0, 160)); }""")
        assert wide == [], (width, tab)
    alone.command("application:toggle-left-area")


HOST = """([body, theme, ground]) => {
    const page = document.body, root = document.documentElement, style = document.createElement('style');
    page.removeAttribute('data-jp-theme-light');
    page.classList.add(...body);
    theme ? root.setAttribute('theme', theme) : root.removeAttribute('theme');
    style.textContent = `.jp-Notebook, .jp-WindowedPanel-outer, .jp-Cell, .jp-OutputArea-output { background: ${ground} !important }`;
    document.head.append(style);
}"""
HOSTS = {"VS Code": (["vscode-dark"], "", "#1e1e1e"), "Colab": ([], "dark", "#383838"), "docs": (["quarto-dark"], "", "#222222"), "a plain page": ([], "", "#ffffff")}


@pytest.mark.parametrize("host", [host if host == "Colab" else pytest.param(host, marks=pytest.mark.slow) for host in HOSTS])
def test_words_can_be_read_where_only_the_light_colours_of_widgets_are(alone, host):
    "Pages that say in their own way that they are dark, with the colours of JupyterLab's light theme at the root, as ipywidgets brings them."
    alone.theme("JupyterLab Light")
    alone.reload()
    alone.page.emulate_media(color_scheme="dark")
    alone.page.evaluate(HOST, list(HOSTS[host]))
    for tab in TABS:
        choose(alone, tab)
        assert alone.page.evaluate(POOR) == [], tab


@pytest.mark.slow
def test_the_panel_in_notebook_7(notebook7):
    "A run is started and found again after the page was loaded anew; the plan follows the mouse before and after (the notebook keeps the arrow keys for itself)."
    settings = "target_modules='all-linear', max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1, eval_strategy='no', logging_steps=1"
    notebook7.open(notebook7.write("alone.ipynb", FEW.replace("FinetuneConfig()", f"FinetuneConfig({settings})")))
    notebook7.run_all()
    for moved, rank in (("before", "64"), ("after", "4")):
        choose(notebook7, "Settings")
        notebook7.see("Fits: ", SLOW)
        count = card(notebook7, "trained parameters")
        assert notebook7.press_slider("r", (int(rank).bit_length() - 1) / 8) == rank
        notebook7.wait(f"before => ({CARD})('trained parameters') !== before", f"the plan has followed {moved} the run", count)
        choose(notebook7, "Train")
        if moved == "before":
            press(notebook7, "Train")
        notebook7.see("Finished. run-001", SLOW)
        notebook7.save()
        notebook7.reload()
    assert notebook7.errors() == []


@pytest.mark.slow
def test_the_panel_alone_in_voila(voila):
    notebook = json.loads((ROOT / "nbs/tutorials/panel.ipynb").read_text(encoding="utf-8"))
    cell = next(c for c in notebook["cells"] if "room = panel()" in "".join(c["source"]))
    settings = "target_modules='all-linear', max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=1, eval_strategy='no', logging_steps=1"
    cell["source"] = "".join(cell["source"]).replace("panel()", f"panel(FinetuneConfig({settings}), few)").replace(
        "from finetune_nb.panel", "from finetune_nb import FinetuneConfig, Splits, icd10_chats\n\ndata = icd10_chats()\nfew = Splits(data.train[:12], data.validation[:2], data.test[:2])\nfrom finetune_nb.panel"
    )
    (voila.folder / "panel.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    voila.open("panel.ipynb")
    voila.see("Fits: ", SLOW)
    before = card(voila, "trained parameters")
    voila.move_slider("r", 1)
    voila.wait(f"before => ({CARD})('trained parameters') !== before", "the plan has followed", before)
    choose(voila, "Train")
    press(voila, "Train")
    voila.see("Finished. run-001", SLOW)
    assert voila.errors() == []
