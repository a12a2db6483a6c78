"""Workers read in order, survive what the trainer must, and end with an error; bad examples are counted and listed."""

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from minigpt4.data.batches import BadSample
from minigpt4.data.sources.safe_files import NO_PICTURE
from minigpt4.errors import DataError
from minigpt4.training.checkpoint import State, last_checkpoint
from minigpt4.training.data_loader import BAD_GROUP_LIMIT, BAD_WINDOW, BadSamples, read_ahead, stop_requests
from minigpt4.training.loop import train
from minigpt4.training.processes import processes
from minigpt4.training.run_folder import BAD_SAMPLES_FILE
from tests.training import toy
from tests.training.test_faults import ENVIRONMENT, with_bad
from tests.training.test_loop import same, tensors, trained

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
        warnings.simplefilter("error")  # of more workers than cores, for one
        assert list(read_ahead(Numbers(20), workers, ahead=2)) == list(range(20))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_complaint_comes_as_it_was_raised_after_what_came_before_it(workers: int) -> None:
    items = read_ahead(Numbers(20, bad=3), workers, ahead=2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"^the list has no end$") as told:
        next(items)
    assert told.value.hint == "close it"


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("reset")])
def test_a_worker_killed_while_it_hands_over_an_item_is_told_likewise(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library meets the broken connection a moment before it misses the worker."""

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", broken)
    with pytest.raises(DataError, match=f"ended: {str(error) or 'EOFError'}"):
        list(read_ahead(Numbers(3), 1, ahead=2))


KILLED_WORKER = """
import os, signal, sys
from pathlib import Path
from minigpt4.data.batches import BadSample
from minigpt4.data.sources.safe_files import NO_PICTURE
from minigpt4.errors import DataError
from minigpt4.training.checkpoint import State, last_checkpoint
from minigpt4.training.loop import train
from minigpt4.training.processes import processes
from tests.training import toy

class Victim(toy.ToyBatches):
    def __getitem__(self, item):
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)

try:
    train(toy.recipe(Path(sys.argv[1]), workers=1, checkpoint_steps=1), toy.model(), Victim, toy.Watcher(), processes())
except DataError as error:
    print(error.message, "|", error.hint, flush=True)
    os._exit(2)
"""


SIGNALLED_GROUP = """
import os, signal, sys
from pathlib import Path
from minigpt4.training.loop import train
from minigpt4.training.processes import processes
from tests.training import toy

class Teller(toy.Watcher):
    def on_update(self, progress):
        super().on_update(progress)
        if len(self.steps) == 2:
            os.killpg(os.getpgid(0), signal.SIGTERM)

recipe = toy.longer(Path(sys.argv[1]), 12).model_copy(update={"workers": 2})
train(recipe, toy.model(), toy.ToyBatches, Teller(), processes())
"""


def test_workers_survive_a_signal_to_the_whole_group_so_that_the_trainer_can_save(tmp_path: Path) -> None:
    """As schedulers and torchrun send it."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED_GROUP, str(tmp_path)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120, start_new_session=True,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (143, "")
    found = last_checkpoint(tmp_path)
    assert found is not None and found[1].step == 3


@pytest.mark.parametrize(("under_torchrun", "signals"), [(False, 1), (True, 2)])
def test_a_request_that_torchrun_passed_on_is_the_same_request(
    under_torchrun: bool, signals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler sends it to all processes, torchrun too, which sends it to its own again; one more is another."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop_requests(lambda: None) as request:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.signal == signal.SIGTERM
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_killed_worker_is_an_error_and_no_hang(tmp_path: Path) -> None:
    """In a program of its own: the library tells of a killed worker wherever the program happens to be."""
    command = [sys.executable, "-c", KILLED_WORKER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 2, done.stderr
    assert "a process that reads examples ended" in done.stdout and "memory" in done.stdout
    recipe = toy.recipe(tmp_path, checkpoint_steps=1)
    resumed, _ = trained(recipe)
    whole, _ = trained(toy.recipe(tmp_path / "whole"))
    assert same(tensors(resumed), tensors(whole))


COMPLAINT = """
import sys
from pathlib import Path
from minigpt4.data.batches import BadSample
from minigpt4.data.sources.safe_files import NO_PICTURE
from minigpt4.errors import DataError
from minigpt4.training.checkpoint import State, last_checkpoint
from minigpt4.training.loop import train
from minigpt4.training.processes import processes
from tests.training import toy

class Batches(toy.ToyBatches):
    def __getitem__(self, item):
        if sys.argv[2] == "worker":
            raise DataError("too many are bad")
        return super().__getitem__(item)

class Watcher(toy.Watcher):
    def on_update(self, progress):
        raise DataError("too many are bad")

try:
    train(toy.recipe(Path(sys.argv[1]), workers=2), toy.model(), Batches, Watcher(), processes())
except DataError as error:
    print(error.message, flush=True)
    sys.exit(2)
"""


@pytest.mark.parametrize("where", ["worker", "trainer"])
def test_an_error_ends_the_program_and_does_not_wait_for_the_workers(where: str, tmp_path: Path) -> None:
    """In a program of its own, which holds the error while it ends, as the command line does."""
    done = subprocess.run(
        [sys.executable, "-c", COMPLAINT, str(tmp_path), where],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip

    assert (done.returncode, done.stdout, done.stderr) == (2, "too many are bad\n", "")


def test_only_the_main_thread_listens_to_signals(tmp_path: Path) -> None:
    """A run in another thread works, and leaves the program's own handling of signals alone."""
    handler = signal.getsignal(signal.SIGTERM)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            trained(toy.recipe(tmp_path))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert signal.getsignal(signal.SIGTERM) is handler


GOOD, BAD = "good.tar", "bad.tar"


def update(good: int, bad: int, *, of: str = BAD) -> list[dict[str, Any]]:
    """The batch of an update with so many examples; the bad ones are of a shard."""
    samples = [BadSample("source", of, f"{of}:{n}", "it has no picture", NO_PICTURE) for n in range(bad)]
    return [{"keys": ["key"] * good, "groups": [GOOD] * good, "bad": samples}]


def watch(output: Path, state: State, **changes: Any) -> BadSamples:
    return BadSamples(toy.recipe(output, **changes), processes(), state)


def test_one_percent_of_the_window_is_passed_over_and_one_more_is_not(tmp_path: Path) -> None:
    watched = watch(tmp_path, State())
    watched.add("one", 1, update(90, 10))

    with pytest.raises(DataError, match=r"^11 of the last 110 examples are bad, up to 1\.0% of 1,000 are passed over"):
        watched.add("one", 2, update(9, 1))

    assert len((tmp_path / BAD_SAMPLES_FILE).read_text().splitlines()) == 11


def test_what_lies_before_the_last_thousand_counts_no_more(tmp_path: Path) -> None:
    state = State()
    watched = watch(tmp_path, state)
    watched.add("one", 1, update(90, 10))
    for step in range(2, 2 + BAD_WINDOW // 100):
        watched.add("one", step, update(100, 0))

    watched.add("one", 12, update(90, 10, of="other.tar"))  # ten again, and the first ten are over

    assert sum(bad for bad, _ in state.recent_bad) == 10
    lines = [json.loads(line) for line in (tmp_path / BAD_SAMPLES_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 10 + [12] * 10


def test_counts_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    state = State()
    watch(tmp_path, state).add("one", 1, update(90, 10))

    with pytest.raises(DataError, match="11 of the last 110 examples are bad"):
        watch(tmp_path, State(**json.loads(json.dumps(state.__dict__)))).add("one", 2, update(9, 1))


@pytest.mark.parametrize("one_is_good", [True, False])
def test_a_shard_with_one_good_example_is_not_given_up(one_is_good: bool, tmp_path: Path) -> None:
    watched = watch(tmp_path, State(), max_bad_fraction=1.0)
    watched.add("one", 1, update(1, 1, of=GOOD if one_is_good else BAD))
    batch = update(1, BAD_GROUP_LIMIT, of=GOOD if one_is_good else BAD)

    if one_is_good:
        watched.add("one", 2, batch)
    else:
        with pytest.raises(DataError, match=rf"the last {BAD_GROUP_LIMIT + 1} examples of bad\.tar are all bad"):
            watched.add("one", 2, batch)


def test_bad_examples_are_listed_once_also_after_a_resume(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, checkpoint_steps=2)
    tmp_path.mkdir(exist_ok=True)
    data = with_bad({0: 2, 2: 1})
    with pytest.raises(toy.PowerFailureError):
        train(recipe, toy.model(), data, toy.Watcher(3), processes())

    train(recipe, toy.model(), data, toy.Watcher(), processes())

    lines = [json.loads(line) for line in (tmp_path / BAD_SAMPLES_FILE).read_text().splitlines()]
    assert [(line["step"], line["key"], line["reason"], line["kind"]) for line in lines] == [
        (1, "bad 0.0", "it has no picture", NO_PICTURE),
        (1, "bad 0.1", "it has no picture", NO_PICTURE),
        (3, "bad 2.0", "it has no picture", NO_PICTURE),
    ]
