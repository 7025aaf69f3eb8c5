"""Small faults are put into the code, one at a time: do the tests notice?

    python benchmarks/mutation_test.py masks turns [--sample 80] [--seed 0] [--show]

Needs the package mutmut, which makes the faults: another operator, another number, `None` in place of a value, a missing
argument, a condition turned round. It works in a copy, and changes nothing here. Each module is held by the tests that TESTS
names, quick ones (and, with --chapter, by the examples and assertions of its chapter); a fault that only others see counts as unseen.
Without --sample all mutants are run, which takes hours.

Two rates are printed. "That compute" leaves out mutants that do no more than change the wording of a message (`XX` around a
sentence, or its case), and is the one to look at: tests hold what a message has to name, and not its words. "All" has them too. A
mutant that never ends counts as killed, and is shown apart. Equivalent mutants, which change nothing that anybody could see
(`ensure_ascii=None`), stay in both rates as survivors. What mutmut leaves alone is not measured: what stands outside
functions, and what is decorated (properties, context managers, `torch.no_grad`). Mutants of docstrings are not run.

Seen on 2026-11-27 with mutmut 3.8.1, Python 3.11, on a busy machine: the last draw of 40 of each module, with a seed of its own (1127,
2127, 3127 or 4127), made after the tests for what earlier draws of 40 to 150 had shown were written. Killed of those that compute:

    data           chats 37 of 39, reading 36 of 37, rows 34 of 37, formats 36 of 39,
                   sources 36 of 38, data 39 of 40                                           218 of 230, 95 %
    mask           masks 37 of 40, turns 36 of 39                                             73 of 79, 92 %
    loss           losses 36 of 40, packing 39 of 40                                          75 of 80, 94 %
    checkpoints    whole_folder 37 of 39, checkpoints 37 of 39, sentinels 36 of 37,
                   one_file 38 of 40, crash_safe 37 of 40                                    185 of 195, 95 %

All draws with these seeds, also those from which the last tests came: data 322 of 380, mask 248 of 275, loss 145 of 160, checkpoints
354 of 389. Most survivors change nothing that could be seen (`allow_nan=None`, `strict=False` for two lists of one length, no device
on a CPU, the size of the pieces in which a file is read), and count all the same. `run_folder` and `attention` have not been drawn.
"""

import argparse
import ast
import difflib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE = "test_chat_template.py::test_one_row_or_an_error"
DATA = ["test_formats.py", "test_reading.py", "test_data.py"]
RUNS = ["test_checkpoints.py"]
FOLDERS = ["test_whole_folder.py"]
FAR = [f"test_far_mounts.py::test_{name}" for name in (
    "what_was_there_stays_until_the_new_one_is", "a_folder_there_has_the_files_of_the_last_one_alone",
    "a_file_that_is_no_checkpoint_is_opened_nowhere_else", "a_small_file_becomes_no_large_one",
    "a_mount_that_goes_away_is_an_error_of_the_disk",
)]  # fmt: skip
LOSS = ["test_losses.py", "test_packing.py::test_logits_that_are_scaled_under_another_name_are_seen"]
TESTS = {  # by module the tests that hold it: files, or single tests
    "rows": DATA, "chats": DATA, "reading": DATA, "formats": DATA, "sources": DATA, "data": ["test_data.py"],
    "turns": ["test_turns.py"],
    "masks": ["test_masks.py", "test_chat_template.py::test_other_tokenizers_give_the_prompt_of_inference_or_refuse", ONE],
    "packing": ["test_packing.py"], "losses": LOSS, "attention": [*LOSS, "test_packing.py"],
    "checkpoints": FOLDERS, "whole_folder": FOLDERS, "one_file": [*FOLDERS, *FAR], "sentinels": ["test_sentinels_alone.py"],
    "crash_safe": ["test_crash_safe_alone.py"], "run_folder": ["test_runs.py", *RUNS],
}  # fmt: skip
LEFT_OUT = {  # tests of these files that take long; what they hold, quicker ones hold too
    "test_reading.py": "write_read_write_alters_nothing tables_and_data_sets random_damage bomb MiB blank_lines_cost million_problems "
    "what_is_no_regular skip_without imports_nothing hub_names",
    "test_data.py": "demo_data_is_the_same",
    "test_chat_template.py": "any_words_are_taught several_processes all_bad_chats_are_told checks_find_what_goes the_cache the_token_view",
    "test_packing.py": "each_architecture dropout_and long_chats every_chat_is_in",
}
CHAPTER = '''
"The examples and assertions of a chapter, run with what the package exports."
import json, re
from pathlib import Path
import pytest
import finetune_nb.{module} as module


def test_chapter(tmp_path, monkeypatch):
    cells = json.loads((Path(__file__).parent.parent / "nbs" / "{notebook}").read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    space = {{k: v for k, v in vars(module).items() if not k.startswith("__")}} | {{"display": print}}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not re.search(r"^#\\| *(export|eval: *false)|^ *[%!]", source, re.M):
            exec(compile(source, "{notebook}", "exec"), space)
'''


def mutmut():
    "What of mutmut is needed; says how to get it."
    if importlib.util.find_spec("mutmut") is None:
        raise SystemExit('mutmut is missing. Install it: pip install "finetune_nb[mutation]"')
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.stats import status_by_exit_code

    return mutate_file_contents, status_by_exit_code


@dataclass
class Mutant:
    "One fault, and what came of it."

    name: str
    diff: str
    only_words: bool  # no more than the wording of a message
    status: str = ""

    @property
    def killed(self) -> bool:
        return self.status in ("killed", "timeout", "segfault")


def chapter_of(module: str) -> str:
    "The file name of a module's notebook."
    return re.search(r"File to edit: \.\./nbs/(\S+)\.$", (ROOT / "finetune_nb" / f"{module}.py").read_text(encoding="utf-8"), re.M)[1]


def make_copy(module: str, folder: Path, with_chapter: bool) -> None:
    "A copy of the repository in which mutmut finds its configuration, and a test that runs the chapter."
    ignored = shutil.ignore_patterns(".*", "demo", "runs", "_proc", "_docs", "*.egg-info", "__pycache__", "mutants")
    shutil.copytree(ROOT, folder, ignore=ignored)
    files = [f"tests/{name}" for name in TESTS[module]]
    if with_chapter:
        (folder / "tests" / "test_chapter.py").write_text(CHAPTER.format(module=module, notebook=chapter_of(module)), encoding="utf-8")
        files.append("tests/test_chapter.py")
    slow = [word for name in TESTS[module] for word in LEFT_OUT.get(name, "").split()]
    settings = {
        "source_paths": ["finetune_nb"], "only_mutate": [f"finetune_nb/{module}.py"],
        "also_copy": ["nbs", "benchmarks", "settings.ini", "README.md"],
        "pytest_add_cli_args_test_selection": files,
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-k", f"not ({' or '.join([*slow, 'nothing_else'])})"],
        "process_isolation": "fork",  # with one thread each, which is set below: torch has more, and a fork does not take them along
        "timeout_multiplier": 15.0, "timeout_constant": 4.0,
        "use_setproctitle": False, "track_dependencies": False, "use_git_change_detection": False,
    }  # fmt: skip
    with (folder / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("\n[tool.mutmut]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))


def mutants_of(module: str, mutate_file_contents) -> list[Mutant]:
    "All mutants of a module but those of docstrings, with their diffs."
    path = f"finetune_nb/{module}.py"
    made = mutate_file_contents(path, Path(path).read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(ast.parse(made.code)) if isinstance(node, ast.FunctionDef)}
    found = []
    for name in made.mutant_names:
        before, after = functions[re.sub(r"__mutmut_\d+$", "__mutmut_orig", name)], functions[name]
        if ast.get_docstring(before) == ast.get_docstring(after):
            found.append(Mutant(f"finetune_nb.{module}.{name}", difference(before, after), words_alone(before, after)))
    return found


def difference(before: ast.FunctionDef, after: ast.FunctionDef) -> str:
    "The lines in which two functions differ."
    old, new = (re.sub(r"x\S*__mutmut_(orig|\d+)\(", "(", ast.unparse(node), count=1).splitlines() for node in (before, after))
    return "\n".join(line for line in difflib.unified_diff(old, new, lineterm="", n=0) if not line.startswith(("---", "+++", "@@")))


def words_alone(before: ast.FunctionDef, after: ast.FunctionDef) -> bool:
    "Whether two functions differ in nothing but the wording of one sentence: a text with two words or more."
    old, new = ([n.value for n in ast.walk(f) if isinstance(n, ast.Constant) and isinstance(n.value, str)] for f in (before, after))
    changed = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    if len(old) != len(new) or len(changed) != 1:
        return False
    a, b = changed[0]
    return bool(re.search(r"[A-Za-z]{2,}[,;:.)'!?]* [('\"{<]*[A-Za-z]|[a-z]\.$", a)) and (a.lower() == b.lower() or "XX" in b)


def run(module: str, sample: int | None, seed: int, folder: Path, with_chapter: bool) -> list[Mutant]:
    "The mutants of a module, or some of them, with what came of each."
    mutate_file_contents, status_by_exit_code = mutmut()
    make_copy(module, folder, with_chapter)
    os.chdir(folder)
    mutants = mutants_of(module, mutate_file_contents)
    print(f"{module}: {len(mutants)} mutants, {sum(m.only_words for m in mutants)} of them of words alone", flush=True)
    if sample is not None and sample < len(mutants):
        mutants = random.Random(seed).sample(mutants, sample)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", "run", "--max-children", "1", *(m.name for m in mutants)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    (folder / "mutmut.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"mutmut failed for {module}:\n{done.stdout[-3000:]}\n{done.stderr[-2000:]}")
    codes = json.loads(Path(f"mutants/finetune_nb/{module}.py.meta").read_text(encoding="utf-8"))["exit_code_by_key"]
    for mutant in mutants:
        mutant.status = status_by_exit_code[codes[mutant.name]]
    return mutants


def rate(mutants: list[Mutant]) -> str:
    killed = sum(m.killed for m in mutants)
    return f"{killed} of {len(mutants)} killed ({killed / max(len(mutants), 1):.1%})"


def report(title: str, mutants: list[Mutant]) -> str:
    computing = [m for m in mutants if not m.only_words]
    counts = ", ".join(f"{status}: {n}" for status, n in Counter(m.status for m in mutants).most_common())
    return f"{title}: that compute: {rate(computing)}; all: {rate(mutants)} ({counts})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=TESTS, metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, help="so many mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--show", action="store_true", help="what each survivor changes, and each that never ended")
    parser.add_argument("--chapter", action="store_true", help="the examples and assertions of the chapter count as a test too")
    parser.add_argument("--keep", type=Path, help="keep the copies in this folder, for `mutmut show` and `mutmut browse`")
    options = parser.parse_args()
    mutmut()
    seen: list[Mutant] = []
    with tempfile.TemporaryDirectory() as temporary:
        for module in options.modules:
            place = (options.keep or Path(temporary)).resolve() / module
            mutants = run(module, options.sample, options.seed, place, options.chapter)
            print(report(module, mutants), flush=True)
            for mutant in mutants:
                if options.show and mutant.status != "killed":
                    print(f"\n{mutant.name.partition('.')[2]} {mutant.status}{', words alone' if mutant.only_words else ''}\n{mutant.diff}")
            seen += mutants
        os.chdir(ROOT)
    if len(options.modules) > 1:
        print(report("together", seen))
