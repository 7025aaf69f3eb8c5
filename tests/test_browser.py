"""Widgets in a real JupyterLab and in Voila: sliders, a background thread, a reload."""

import sys

import ipywidgets
import pytest
from browser import ROOT

SLIDER = """
import ipywidgets as widgets
from IPython.display import display

slider = widgets.IntSlider(value=3, min=0, max=20, description="Rows")
label = widgets.Label("3 rows")
slider.observe(lambda change: setattr(label, "value", f"{change.new} rows"), "value")
display(widgets.VBox([slider, label]))
"""

# Each picture is one pixel wider than the one before, so the browser can tell which it shows.
WORKER = """
import io, threading
from PIL import Image

counter, picture, button = widgets.HTML("no step"), widgets.Image(format="png"), widgets.Button(description="Start")
pause, workers = threading.Event(), []

def png(width):
    file = io.BytesIO()
    Image.new("RGB", (width, 10), "teal").save(file, "PNG")
    return file.getvalue()

def work():
    for step in range(1, 11):
        counter.value, picture.value = f"step <b>{step}</b> of 10", png(step)
        pause.wait(0.3)

def start(_):
    workers.append(threading.Thread(target=work))
    workers[-1].start()

button.on_click(start)
display(widgets.VBox([button, counter, picture]))
"""
CONTROLS = """
import ipywidgets as widgets
from IPython.display import display

model = widgets.Dropdown(options=["small", "large"], description="Model")
folder = widgets.Text("runs", description="Folder")
steps = widgets.IntText(10, description="Steps")
packing = widgets.Checkbox(True, description="Packing")
rate = widgets.FloatLogSlider(value=1e-4, min=-5, max=-2, description="Rate")
said = widgets.HTML()
button = widgets.Button(description="Say", icon="play")
button.on_click(lambda _: setattr(said, "value", f"{model.value}, {folder.value}, {steps.value}, {packing.value}"))
tabs = widgets.Tab([widgets.VBox([model, folder]), widgets.VBox([steps, packing, rate])])
tabs.set_title(0, "Where")
tabs.set_title(1, "How")
display(widgets.VBox([tabs, button, said]))
"""
PICTURE = "width => [...document.querySelectorAll('img.widget-image')].some(image => image.naturalWidth === width)"


def open_and_run(lab):
    "The notebook of slider and worker, run."
    lab.open(lab.write("smoke.ipynb", SLIDER, WORKER))
    lab.run_all()


def test_a_slider_moves_its_label_and_survives_a_reload(lab):
    open_and_run(lab)
    assert lab.shown("Rows") == "3"
    assert lab.move_slider("Rows", 4) == "7" and lab.see("7 rows")
    assert lab.move_slider("Rows", 2, "ArrowLeft") == "5" and lab.see("5 rows")
    lab.save()
    lab.reload()
    assert lab.see("5 rows") and lab.shown("Rows") == "5"
    assert lab.move_slider("Rows") == "6" and lab.see("6 rows")
    assert lab.execute("slider.value").text == "6"
    assert lab.errors() == []


def test_a_thread_updates_widgets_while_other_cells_run(lab):
    open_and_run(lab)
    lab.click("Start")
    lab.see(r"step [1-9] of 10")
    assert lab.execute("workers[-1].is_alive(), 6 * 7").text == "(True, 42)"
    lab.see("step 10 of 10")
    lab.wait(PICTURE, "the tenth picture shows", 10)
    assert lab.errors() == []


def test_the_kernel_is_this_python_with_this_checkout(lab):
    lab.open(lab.write("kernel.ipynb"))
    answer = lab.execute("import sys, finetune_nb, ipywidgets; print(sys.executable, finetune_nb.__file__, ipywidgets.__version__)")
    assert answer.text == f"{sys.executable} {ROOT / 'finetune_nb' / '__init__.py'} {ipywidgets.__version__}"


def test_errors_of_cells_and_of_the_console_are_seen(lab):
    lab.open(lab.write("failing.ipynb", "1 / 0"))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        lab.run_all()
    lab.page.evaluate("() => console.error('ours')")
    assert "ours" in lab.errors()[0]


def test_the_page_wears_the_dark_theme(lab, tmp_path):
    open_and_run(lab)
    lab.theme("JupyterLab Dark")
    lab.screenshot(tmp_path / "dark.png")
    assert lab.page.evaluate("() => document.body.dataset.jpThemeLight") == "false"
    assert (tmp_path / "dark.png").stat().st_size > 10_000


def test_a_page_of_voila_is_alive(voila):
    voila.open(voila.write("smoke.ipynb", SLIDER, WORKER))
    voila.see("3 rows")
    assert voila.move_slider("Rows", 2) == "5" and voila.see("5 rows")
    voila.click("Start")
    voila.see(r"step [1-9] of 10")
    assert voila.errors() == []


def test_controls_are_found_read_and_set(voila):
    voila.open(voila.write("controls.ipynb", CONTROLS))
    voila.see("Model")
    assert [voila.shown("Model"), voila.shown("Folder")] == ["small", "runs"]
    voila.fill("Model", "large")
    voila.fill("Folder", "elsewhere")
    voila.click("How")
    assert [voila.shown("Steps"), voila.shown("Packing")] == ["10", "true"]
    voila.fill("Steps", "25")
    voila.fill("Packing", False)
    assert float(voila.move_slider("Rate", 3)) > 1e-4
    voila.click("Say")
    voila.see("large, elsewhere, 25, False")
    assert voila.errors() == []
