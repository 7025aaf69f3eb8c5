"""The pictures of the panel for README and docs, taken in a real JupyterLab.

    python benchmarks/panel_screenshots.py [--folder nbs/images] [--all]

Needs Chromium, playwright and jupyterlab, as the browser tests do. Writes panel_settings.png (light), panel_training.png (dark, while a
run goes on) and panel_compare.png (light). `--all` writes every tab in both themes, and 480 pixels wide, to be looked at.
"""

import argparse
import io
import re
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from browser import Lab, running_chromium, running_server, why_not

CELL = """from finetune_nb import FinetuneConfig, Splits, icd10_chats
from finetune_nb.choices import apply_preset
from finetune_nb.data import ANSWER_PATTERN
from finetune_nb.panel import panel

data = icd10_chats()
few = Splits(data.train[:160], data.validation[:8], data.test[:16])
config = apply_preset(FinetuneConfig(max_new_tokens=48, answer_pattern=ANSWER_PATTERN), "quick look")
config.max_steps, config.num_train_epochs, config.eval_strategy, config.eval_steps = -1, 1, "steps", 10
room = panel(config, few)
room"""
ANSWERED = "() => [...document.querySelectorAll('[aria-live] pre')].filter(e => e.offsetParent && e.innerText.trim() !== '…').length === 2"
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
KEPT = {"settings light": "panel_settings", "running dark": "panel_training", "compare light": "panel_compare"}


class Album:
    "Takes pictures of the panel under names like `settings light`."

    def __init__(self, lab: Lab, folder: Path, everything: bool):
        self.lab, self.folder, self.everything = lab, folder, everything

    def press(self, text: str) -> None:
        "Presses a button inside the visible tab."
        buttons = self.lab.page.locator("button.jupyter-button:not(.widget-toggle-button)", has_text=re.compile(rf"^\s*{text}\s*$"))
        buttons.locator("visible=true").first.click()

    def take(self, name: str) -> None:
        "The panel alone, with few colours so that the file stays small."
        if not self.everything and name not in KEPT:
            return
        self.lab.page.wait_for_timeout(800)  # a picture has no end to wait for
        box = self.lab.page.locator(".jp-OutputArea-output .fnb").locator("visible=true").first
        picture = Image.open(io.BytesIO(box.screenshot())).convert("RGB")
        path = self.folder / f"{KEPT.get(name, name.replace(' ', '_'))}.png"
        picture.crop((0, 0, picture.width, min(picture.height, 1100))).quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB", flush=True)

    def both(self, state: str) -> None:
        "A state in both themes, and on a narrow page."
        for theme, name in ((LIGHT, "light"), (DARK, "dark")):
            if self.everything or f"{state} {name}" in KEPT:
                self.lab.theme(theme)
                self.take(f"{state} {name}")
        if self.everything:
            self.lab.page.set_viewport_size({"width": 480, "height": 1200})
            self.take(f"{state} narrow")
            self.lab.page.set_viewport_size({"width": 1360, "height": 1200})


def go_through(album: Album, lab: Lab) -> None:
    "One state after the other."
    lab.see("Fits: ")
    album.both("settings")
    lab.click("Data")
    album.both("data")
    lab.click("Train")
    album.press("Train")
    lab.see("1[2-9] of 40", 240)
    album.both("running")
    album.press("Stop")
    lab.see("Stopped and saved", 120)
    album.both("stopped")
    lab.click("Compare")
    album.press("Answer the test set")
    lab.see("16 test questions", 240)
    album.both("compare")
    if not album.everything:
        return
    lab.click("Chat")
    lab.fill("question", "Which code for a cough? Entry: cough: R05 (Cough)")
    lab.move_slider("tokens", 90, "ArrowLeft")
    album.press("Ask")
    lab.wait(ANSWERED, "both have answered", seconds=120)
    album.both("chat")
    for tab in ("Runs", "Export"):
        lab.click(tab)
        album.both(tab.lower())


def main() -> None:
    "Takes them all."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("nbs/images"), help="where they go (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every tab, in both themes and narrow")
    options = parser.parse_args()
    if reason := why_not("jupyterlab"):
        sys.exit(reason)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, running_server("lab", Path(home)) as server, running_chromium() as chromium:
        lab = Lab(chromium, server, 1360, 1200, 90)
        lab.open(lab.write("panel.ipynb", CELL))
        lab.command("application:toggle-left-area")
        lab.command("statusbar:toggle")  # it would lie over the lower edge
        lab.run_all()
        go_through(Album(lab, options.folder, options.all), lab)


if __name__ == "__main__":
    main()
