"""A run that is killed, or whose disk fails, goes on to the very same weights; damage is found and named."""

import os

import crashing
import pytest
import torch

from finetune_nb.data import Splits

pytestmark = [pytest.mark.usefixtures("one_way"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture
def splits(chats):
    return Splits(chats[:24], chats[24:32], chats[32:])


@pytest.fixture(scope="module")
def alone():
    "One thread, so that a child that is forked can compute."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory, alone):
    from conftest import some_chats

    chats, folder = some_chats(), tmp_path_factory.mktemp("undisturbed")
    config = crashing.config_of(tiny_model, folder)
    log = folder / "log"
    counting = crashing.counted(crashing.begin(config, Splits(chats[:24], chats[24:32], chats[32:]), log), folder / "run", lambda *seen: None)
    assert crashing.wait(crashing.start(counting, log)) == 0, log.read_text()
    events = int(log.read_text().rpartition("EVENTS ")[2])
    return crashing.Outcome.of(folder / "run"), events


def test_an_undisturbed_run_is_the_same_again(tiny_model, splits, tmp_path, undisturbed):
    assert crashing.to_the_end(crashing.config_of(tiny_model, tmp_path), splits, tmp_path / "log") == undisturbed[0]


@pytest.mark.parametrize("part", range(8))
def test_a_run_that_dies_at_a_write_goes_on_to_the_same_weights(part, tiny_model, splits, tmp_path, undisturbed):
    "The eighth parts of the run; `benchmarks/kill_test.py` tries every single write."
    outcome, events = undisturbed
    config, log = crashing.config_of(tiny_model, tmp_path), tmp_path / "log"
    number = events * (2 * part + 1) // 16
    work = crashing.counted(crashing.begin(config, splits, log), tmp_path / "run", crashing.die_at(number))
    assert crashing.wait(crashing.start(work, log)) == crashing.DIED
    assert crashing.to_the_end(config, splits, log) == outcome
