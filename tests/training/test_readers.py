"""Processes that read ahead: in order, quiet, and an error with a name when one of them ends."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from torch.utils.data import Dataset

from minigpt4.errors import DataError
from minigpt4.training.readers import read_ahead, readers_alive

ROOT = Path(__file__).parents[2]


class Numbers(Dataset[int]):
    """0, 1, 2, ...; `bad` is complained of, and at `killed` the process ends that reads."""

    def __init__(self, length: int, bad: int = -1, killed: int = -1) -> None:
        self.length, self.bad, self.killed = length, bad, killed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> int:
        if item == self.bad:
            raise DataError("the list has no end", hint="close it")
        if item == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return item


@pytest.mark.parametrize("workers", [0, 1, 9])
def test_items_come_in_their_order_without_a_warning(workers: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of more readers than cores, for one
        assert list(read_ahead(Numbers(20), workers, ahead=2)) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_complaint_comes_as_it_was_raised_after_what_came_before_it(workers: int) -> None:
    items = read_ahead(Numbers(20, bad=3), workers, ahead=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^the list has no end$") as told:
        next(items)
    assert told.value.hint == "close it"


def test_a_killed_reader_is_told_in_a_sentence() -> None:
    """In a program of its own: the library tells of a killed reader wherever the program happens to be."""
    code = """
import os
from minigpt4.errors import DataError
from minigpt4.training.readers import read_ahead, readers_alive
from tests.training.test_readers import Numbers
try:
    with readers_alive():
        list(read_ahead(Numbers(20, killed=5), 1, ahead=2))
except DataError as error:
    print(error.message, "|", error.hint, flush=True)
    os._exit(2)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout.startswith("a process that reads examples ended: DataLoader worker")
    assert "fewer workers" in done.stdout


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset")])
def test_a_reader_killed_while_it_hands_over_an_item_is_told_likewise(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library meets the broken connection a moment before it misses the reader."""

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", broken)
    with pytest.raises(DataError, match=f"ended: {str(error) or 'EOFError'}"):
        list(read_ahead(Numbers(3), 1, ahead=2))


def test_another_error_of_the_program_is_no_readers_end() -> None:
    with pytest.raises(RuntimeError, match="shapes"), readers_alive():
        raise RuntimeError("shapes do not fit")
