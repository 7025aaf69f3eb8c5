"""The pictures of the panel for README and docs, taken in a real JupyterLab.

    python benchmarks/panel_screenshots.py [--folder nbs/images]

Needs Chromium, playwright and jupyterlab, as the browser tests do. Writes panel_settings.png (light), panel_training.png (dark, while
a run goes on) and panel_narrow.png (480 pixels wide; to be looked at, not kept).
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from browser import Lab, running_chromium, running_server, why_not

CELL = """from finetune_nb import FinetuneConfig, Splits, icd10_chats
from finetune_nb.choices import apply_preset
from finetune_nb.panel import panel

data = icd10_chats()
few = Splits(data.train, data.validation[:8], data.test[:8])
room = panel(apply_preset(FinetuneConfig(max_new_tokens=48), "quick look"), few)
room"""


def take(lab: Lab, path: Path) -> None:
    "The panel alone, with few colours so that the file stays small."
    box = lab.page.locator(".jp-OutputArea-output .fnb").locator("visible=true").first
    picture = Image.open(io.BytesIO(box.screenshot())).convert("RGB")
    picture.crop((0, 0, picture.width, min(picture.height, 1000))).quantize(128).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def main() -> None:
    "Takes them all."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("nbs/images"), help="where they go (default: %(default)s)")
    folder = parser.parse_args().folder
    if reason := why_not("jupyterlab"):
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as home, running_server("lab", Path(home)) as server, running_chromium() as chromium:
        lab = Lab(chromium, server, 1360, 1200, 90)
        lab.open(lab.write("panel.ipynb", CELL))
        lab.run_all()
        lab.see("Fits: ")
        lab.page.wait_for_timeout(1000)
        take(lab, folder / "panel_settings.png")
        lab.theme("JupyterLab Dark")
        lab.click("Train")
        lab.page.locator("button.jupyter-button", has_text="Train").locator("visible=true").first.click()
        lab.see("(2[0-9]|3[0-9]) of 50", 240)
        lab.page.wait_for_timeout(2500)
        take(lab, folder / "panel_training.png")
        lab.page.set_viewport_size({"width": 480, "height": 1200})
        lab.click("Settings")
        lab.page.wait_for_timeout(1000)
        take(lab, folder / "panel_narrow.png")


if __name__ == "__main__":
    main()
