"Reads everything from settings.ini, and puts the tutorial notebooks into the wheel."
import configparser
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = configparser.ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): value.split()
    for key, value in cfg.items()
    if key.endswith("_requirements")
}


class BuildWithTutorials(build_py):
    "`finetune_nb notebook` and `finetune_nb demo` need the tutorials where there is no checkout."

    def run(self):
        super().run()
        if self.editable_mode:
            return  # a checkout has them in nbs/tutorials
        target = Path(self.build_lib) / cfg["lib_name"] / "tutorials"
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted((root / cfg["nbs_path"] / "tutorials").glob("*.ipynb")):
            shutil.copy(notebook, target)


def long_description():
    "The README with links that lead somewhere from PyPI, too."
    text, raw = (root / "README.md").read_text(encoding="utf-8"), cfg["git_url"].replace("//github.com/", "//raw.githubusercontent.com/")
    text = re.sub(r"\]\((nbs/images/)", rf"]({raw}/{cfg['branch']}/\1", text)
    return re.sub(r"\]\((nbs/)", rf"]({cfg['git_url']}/blob/{cfg['branch']}/\1", text)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Issues": f"{cfg['git_url']}/issues",
    },
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    package_data={cfg["lib_name"]: ["py.typed", "forgetting.jsonl", "museum.jsonl"]},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithTutorials},
    zip_safe=False,
)
