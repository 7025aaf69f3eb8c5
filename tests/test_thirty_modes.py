"Thirty ways to go wrong in silence are planted, each in a run that is otherwise healthy."

import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import thirty_modes  # noqa: E402


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return thirty_modes.Bench(tmp_path_factory.mktemp("modes"))


@pytest.mark.parametrize("mode", thirty_modes.MODES, ids=lambda mode: mode.name)
def test_a_silent_fault_is_caught(mode, bench):
    assert thirty_modes.found(mode, bench) != "not caught"


def test_there_are_thirty():
    assert len(thirty_modes.MODES) == 30
    for file in {mode.test.partition(":")[0] for mode in thirty_modes.MODES} - {"none"}:
        assert (ROOT / "tests" / file).is_file(), file


@pytest.mark.parametrize("mode", [mode for mode in thirty_modes.MODES if ": " in mode.test], ids=lambda mode: mode.name)
def test_the_test_that_is_named_is_there(mode):
    file, _, name = mode.test.partition(": ")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
