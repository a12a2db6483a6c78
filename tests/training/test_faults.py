"""What goes wrong while training: nothing is lost, nothing is half written, and a sentence says what it was."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.data.batches import BadSample
from minigpt4.data.sources.faults import NO_PICTURE
from minigpt4.errors import ConfigError, DataError, StorageError
from minigpt4.training import checkpoint as checkpoints
from minigpt4.training.checkpoint import last_checkpoint
from minigpt4.training.loop import Progress, train
from minigpt4.training.processes import processes
from minigpt4.training.recipe import StageRecipe
from minigpt4.training.run_folder import BAD_SAMPLES_FILE, CHECKPOINT_FOLDER, check_recipe, metrics_path, only_run
from minigpt4.training.stopping import stop_requests
from tests.training import toy
from tests.training.test_loop import same, tensors, trained

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def killing(folder: Path, kills: int, *options: str) -> dict[str, int]:
    """Kill runs, each of which ends with the bits of a whole one; returns how many fell among each stage's updates."""
    command = [sys.executable, "-m", "tests.training.killing", str(folder), "--kills", str(kills), *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = re.match(r"(\d+) kills .*\(first (\d+), second (\d+), elsewhere \d+\), each equal to the bit", done.stdout)
    assert found is not None, done.stdout
    return dict(zip(("all", "first", "second"), map(int, found.groups()), strict=True))


def test_runs_killed_in_both_stages_end_with_the_same_bits(tmp_path: Path) -> None:
    fell = killing(tmp_path, 6)

    assert fell["all"] >= 6 and fell["first"] >= 1 and fell["second"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("processes_", [1, 2])
@pytest.mark.parametrize("accumulation", ["1", "4"])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_many_more_are(processes_: int, accumulation: str, workers: str, tmp_path: Path) -> None:
    """With the other cases of this test 200 kills."""
    options = ("--accumulation", accumulation, "--workers", workers, "--processes", str(processes_))
    fell = killing(tmp_path, 25, *options)

    assert fell["all"] >= 25 and fell["first"] >= 1 and fell["second"] >= 1


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_run_told_to_stop_finishes_its_update_saves_and_goes_on_later(
    number: signal.Signals, ends: type[BaseException], tmp_path: Path
) -> None:
    whole, _ = trained(toy.longer(tmp_path / "whole", 6))
    recipe = toy.longer(tmp_path / "told", 6)
    recipe.output.mkdir()

    class Teller(toy.Watcher):
        def update(self, progress: Progress) -> None:
            super().update(progress)
            if len(self.steps) == 2:
                os.kill(os.getpid(), number)

    watcher = Teller()
    with pytest.raises(ends) as told:
        train(recipe, toy.model(), toy.ToyBatches, watcher, processes())

    assert number == signal.SIGINT or told.value.code == 143  # type: ignore[attr-defined]
    assert watcher.told == 1
    found = last_checkpoint(recipe.output)
    assert found is not None and found[1].step == 3  # told during the second, it stopped after the third
    resumed, rest = trained(recipe)
    assert len(rest) == 3
    assert same(tensors(resumed), tensors(whole))


KILLED_READER = """
import os, signal, sys
from pathlib import Path
from minigpt4.errors import DataError
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


TOLD_GROUP = """
import os, signal, sys
from pathlib import Path
from minigpt4.training.loop import train
from minigpt4.training.processes import processes
from tests.training import toy

class Teller(toy.Watcher):
    def update(self, progress):
        super().update(progress)
        if len(self.steps) == 2:
            os.killpg(os.getpgid(0), signal.SIGTERM)

recipe = toy.longer(Path(sys.argv[1]), 12).model_copy(update={"workers": 2})
train(recipe, toy.model(), toy.ToyBatches, Teller(), processes())
"""


def test_the_readers_outlive_a_signal_to_the_whole_group_so_that_the_trainer_can_save(tmp_path: Path) -> None:
    """As schedulers and torchrun send it."""
    done = subprocess.run(
        [sys.executable, "-c", TOLD_GROUP, str(tmp_path)],
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
            assert request.asked
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_reader_killed_while_it_hands_over_a_batch_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library meets the broken connection a moment before it misses the reader."""

    def broken(*_: object, **__: object) -> None:
        raise EOFError

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", broken)
    with pytest.raises(DataError, match="a process that reads examples ended: EOFError"):
        train(toy.recipe(tmp_path, workers=1), toy.model(), toy.ToyBatches, toy.Watcher(), processes())


def test_a_killed_reader_is_an_error_and_no_hang(tmp_path: Path) -> None:
    """In a program of its own: the library tells of a killed reader wherever the program happens to be."""
    command = [sys.executable, "-c", KILLED_READER, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)

    assert done.returncode == 2, done.stderr
    assert "a process that reads examples ended" in done.stdout and "memory" in done.stdout
    recipe = toy.recipe(tmp_path, checkpoint_steps=1)
    resumed, _ = trained(recipe)
    whole, _ = trained(toy.recipe(tmp_path / "whole"))
    assert same(tensors(resumed), tensors(whole))


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "replace", "mkdir"])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_failing_disk_leaves_the_checkpoint_before(
    call: str, which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call on the files of the third save fails once; the run then ends as one that was never disturbed."""
    whole, _ = trained(toy.recipe(tmp_path / "whole", checkpoint_steps=1))
    recipe = toy.recipe(tmp_path / "run", checkpoint_steps=1)
    with pytest.raises(toy.PowerFailureError):
        trained(recipe, 3)  # two checkpoints are there
    before = last_checkpoint(recipe.output)
    real, calls = getattr(os, call), 0

    def failing(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == which:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    def save(*arguments: Any) -> Any:  # noqa: ANN401
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            return checkpoints.write_checkpoint(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("minigpt4.training.loop.write_checkpoint", save)
        try:
            trained(recipe)
        except StorageError as error:
            assert error.exit_status == 3
            after = last_checkpoint(recipe.output)
            assert before is not None and after is not None
            assert (after[1].stage, after[1].step) >= (before[1].stage, before[1].step)

    resumed, _ = trained(recipe)
    assert same(tensors(resumed), tensors(whole))
    names = [path.name for path in (recipe.output / CHECKPOINT_FOLDER).iterdir()]
    assert not [name for name in names if name.startswith(".")], names


@pytest.mark.parametrize("file", ["metrics.jsonl", BAD_SAMPLES_FILE])
def test_a_line_that_finds_no_room_ends_the_run_as_a_checkpoint_would(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it is written, as a full disk does; the run then goes on as one that was never disturbed."""
    data = with_bad({3: 1})
    whole = toy.model()
    (tmp_path / "whole").mkdir()
    train(toy.longer(tmp_path / "whole", 6), whole, data, toy.Watcher(), processes())
    recipe = toy.longer(tmp_path / "run", 6).model_copy(update={"checkpoint_steps": 1})
    recipe.output.mkdir()
    real = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:  # noqa: ANN401
        if path.name == file and mode == "a" and len(watcher.steps) >= 2:
            with real(path, "a", encoding="utf-8") as begun:
                begun.write('{"stage": "on')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, **options)

    watcher = toy.Watcher()
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=f"{file}: No space left") as told:
        patch.setattr(Path, "open", full)
        train(recipe, toy.model(), data, watcher, processes())
    assert told.value.exit_status == 3

    resumed = toy.model()
    train(recipe, resumed, data, toy.Watcher(), processes())

    assert same(tensors(resumed), tensors(whole))
    for name in ("metrics.jsonl", BAD_SAMPLES_FILE):
        kept = [json.loads(line) for line in (recipe.output / name).read_text().splitlines()]
        assert [line["step"] for line in kept] == [4] if name == BAD_SAMPLES_FILE else [1, 2, 3, 4, 5, 6]


def test_the_folder_of_a_run_belongs_to_it_alone(tmp_path: Path) -> None:
    program = "import sys, time\nfrom pathlib import Path\nfrom minigpt4.training.run_folder import only_run\n"
    program += "with only_run(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match="another process trains in"),
            only_run(tmp_path),
        ):
            pass
        other.kill()
    with only_run(tmp_path):  # a killed run leaves nothing that would stand in the way
        pass


@pytest.mark.parametrize("content", ["", '{"seed": 1', "[]"])
def test_a_damaged_recipe_of_a_run_is_told(content: str, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()
    (tmp_path / "recipe.json").write_text(content)

    with pytest.raises(ConfigError, match=r"recipe\.json is damaged") as told:
        check_recipe(recipe, 1, force=True)

    assert "delete that file" in told.value.hint
    (tmp_path / "recipe.json").unlink()
    check_recipe(recipe, 1, force=False)


def test_a_changed_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    check_recipe(recipe.model_copy(update={"seed": 8}), 1, force=False)  # nothing is learnt yet: a typo, mended
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()
    stages = [stage.model_copy(update={"learning_rate": 0.5}) for stage in recipe.stages]
    changed = recipe.model_copy(update={"seed": 9, "stages": stages, "workers": 2})

    with pytest.raises(ConfigError) as told:
        check_recipe(changed, 1, force=False)

    assert "seed (1, now 9)" in told.value.message
    assert "stages.0.learning_rate (0.01, now 0.5)" in told.value.message
    assert "workers" not in told.value.message
    assert "--force" in told.value.hint
    check_recipe(changed, 1, force=True)
    check_recipe(changed, 1, force=False)  # it is the run's recipe now


COMPLAINT = """
import sys
from pathlib import Path
from minigpt4.errors import DataError
from minigpt4.training.loop import train
from minigpt4.training.processes import processes
from tests.training import toy

class Batches(toy.ToyBatches):
    def __getitem__(self, item):
        if sys.argv[2] == "reader":
            raise DataError("too many are bad")
        return super().__getitem__(item)

class Watcher(toy.Watcher):
    def update(self, progress):
        raise DataError("too many are bad")

try:
    train(toy.recipe(Path(sys.argv[1]), workers=2), toy.model(), Batches, Watcher(), processes())
except DataError as error:
    print(error.message, flush=True)
    sys.exit(2)
"""


@pytest.mark.parametrize("where", ["reader", "trainer"])
def test_an_error_ends_the_program_and_does_not_wait_for_the_readers(where: str, tmp_path: Path) -> None:
    """In a program of its own, which holds the error while it ends, as the command line does."""
    done = subprocess.run(
        [sys.executable, "-c", COMPLAINT, str(tmp_path), where],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip

    assert (done.returncode, done.stdout, done.stderr) == (2, "too many are bad\n", "")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_data_complains_of_is_told_as_it_is(workers: int, tmp_path: Path) -> None:
    class Complaining(toy.ToyBatches):
        def __getitem__(self, step: int) -> dict[str, Any]:
            raise DataError("nothing here is a picture", "look at it")

    with pytest.raises(DataError) as told:
        train(toy.recipe(tmp_path, workers=workers), toy.model(), Complaining, toy.Watcher(), processes())

    assert (told.value.message, told.value.hint) == ("nothing here is a picture", "look at it")


def test_what_learns_cannot_be_changed_by_force_and_the_run_goes_on_as_it_began(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()

    with pytest.raises(ConfigError, match=r"trainable.* now 'qformer'") as told:
        check_recipe(recipe.model_copy(update={"trainable": ["qformer"]}), 1, force=True)

    assert told.value.hint == "its checkpoints hold other numbers: set another output, or undo it"
    check_recipe(recipe, 1, force=False)


def test_a_changed_recipe_is_not_forced_on_a_run_that_has_ended(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()
    last = len(recipe.stages)
    for stage, hint in ((last - 1, "by --force"), (last, "that run has ended and learns no more: set another output")):
        checkpoints.write_checkpoint(tmp_path, {}, {}, checkpoints.State(stage=stage))

        changed = recipe.model_copy(update={"seed": 9})
        with pytest.raises(ConfigError) as told:
            check_recipe(changed, 1, force=stage == last)

        assert hint in told.value.hint
        assert ("--force" in told.value.hint) == (stage < last)


def test_changes_of_a_stage_that_was_made_are_said_to_come_too_late(tmp_path: Path) -> None:
    recipe, said = toy.recipe(tmp_path), list[str]()
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()
    checkpoints.write_checkpoint(tmp_path, {}, {}, checkpoints.State(stage=1))
    longer = [stage.model_copy(update={"steps": 9, "learning_rate": 0.5}) for stage in recipe.stages]

    check_recipe(recipe.model_copy(update={"stages": longer}), 1, force=True, say=said.append)

    assert said == ["stage first was made before and is not made again: learning_rate, steps of it changed in vain"]


def poisoned(steps: set[tuple[int, int]]) -> Callable[[int, StageRecipe], toy.ToyBatches]:
    class Poisoned(toy.ToyBatches):
        def __getitem__(self, item: int) -> dict[str, Any]:
            batch = super().__getitem__(item)
            if (self.number, item) in steps:
                batch["vision_outputs"].last_hidden_state[0] = math.nan
            return batch

    return Poisoned


def test_an_update_whose_loss_is_no_number_is_left_out(tmp_path: Path) -> None:
    watcher, model = toy.Watcher(), toy.model()
    train(toy.recipe(tmp_path), model, poisoned({(1, 1)}), watcher, processes())

    assert [step.skipped for step in watcher.steps] == [False] * 4 + [True, False]
    assert all(value.isfinite().all() for value in tensors(model).values())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[4]["loss"] is None and lines[4]["skipped"]


def test_a_loss_that_stays_no_number_names_the_examples(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, max_skipped_steps=1)
    with pytest.raises(DataError, match="2 updates in a row, the last at step 2"):
        train(recipe, toy.model(), poisoned({(0, 0), (0, 1)}), toy.Watcher(), processes())

    line = json.loads((tmp_path / "not_a_number.jsonl").read_text())
    assert sorted(line["keys"]) == [f"picture {n}" for n in range(4)]


def with_bad(bad: dict[int, int]) -> Callable[[int, StageRecipe], toy.ToyBatches]:
    """Toy batches that name so many bad examples, by item of the first stage."""

    class WithBad(toy.ToyBatches):
        def __getitem__(self, item: int) -> dict[str, Any]:
            batch = super().__getitem__(item)
            batch["keys"] = [f"{item}.{row}" for row in range(toy.NUM_EXAMPLES)]
            batch["groups"] = ["photos: 0.tar"] * toy.NUM_EXAMPLES
            count = bad.get(item, 0) if self.number == 0 else 0
            batch["bad"] = [
                BadSample("photos", "photos: 1.tar", f"bad {item}.{n}", "it has no picture", NO_PICTURE)
                for n in range(count)
            ]
            return batch

    return WithBad


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


def test_too_many_bad_examples_stop_the_run(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, max_bad_fraction=0.005)
    with pytest.raises(DataError, match=r"6 of the last \d+ examples are bad, up to 0\.5% of 1,000 are passed over"):
        train(recipe, toy.model(), with_bad({0: 3, 1: 3}), toy.Watcher(), processes())


def test_the_one_bad_example_that_is_too_many_is_no_plural(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, max_bad_fraction=0)
    with pytest.raises(
        DataError, match=r"^1 of the last 5 examples is bad, up to 0\.0% of 1,000 are passed over; the last"
    ):
        train(recipe, toy.model(), with_bad({0: 1}), toy.Watcher(), processes())


def test_a_shard_without_one_good_example_stops_the_run(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, max_bad_fraction=0.5)
    with pytest.raises(DataError, match=r"the last 24 examples of photos: 1\.tar are all bad"):
        train(recipe, toy.model(), with_bad({0: 8, 1: 16}), toy.Watcher(), processes())


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
    assert torch.is_grad_enabled()
