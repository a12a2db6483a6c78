"""Kills, signals and full disks while training: nothing is lost, and the run then ends as an undisturbed one."""

import errno
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.data.batches import BadSample
from minigpt4.data.sources.safe_files import NO_PICTURE
from minigpt4.errors import StorageError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.checkpoint import best_checkpoint, last_checkpoint
from minigpt4.training.loop import Progress, train
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.processes import processes
from minigpt4.training.recipe import StageRecipe
from minigpt4.training.run_folder import BAD_SAMPLES_FILE, CHECKPOINT_FOLDER, check_recipe
from minigpt4.weights.files.disk import make_folder
from tests.training import toy
from tests.training.test_loop import same, tensors, trained
from tests.weights.files.faults import Fault

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def killing(folder: Path, kills: int, *options: str) -> dict[str, int]:
    """Kill runs, each of which ends with the bits of a whole one; returns how many fell among each stage's updates."""
    command = [sys.executable, "-m", "tests.training.killing", str(folder), "--kills", str(kills), *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    fell: dict[str, int] = json.loads(done.stdout)
    return fell


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
        def on_update(self, progress: Progress) -> None:
            super().on_update(progress)
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


LOSSES = {1: 3.0, 2: 2.0, 3: 4.0}
DIED, WRONG = 9, 1
EVERY = 5
"""Of the calls of a run; the writers are tested with a fault at each in `tests/weights/files`."""


class Validated(toy.Watcher):
    """Knows a validation loss for every update; the smallest is neither the first nor the last."""

    def on_validation(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        return LOSSES[step]


def trained_with(output: Path) -> MiniGPT4ForConditionalGeneration:
    """Train, or go on."""
    recipe = toy.longer(output, len(LOSSES))
    recipe = recipe.model_copy(update={"checkpoint_steps": 1, "keep_checkpoints": 1})
    make_folder(output)
    model = toy.model()
    check_recipe(recipe, 1, force=False)
    train(recipe, model, toy.ToyBatches, Validated(), processes())
    return model


def result(output: Path) -> dict[str, Any]:
    """Train, or go on; returns what must be equal in the end."""
    model = trained_with(output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    best = best_checkpoint(output)
    return {
        "tensors": [p.detach().numpy().tobytes().hex() for p in model.parameters() if p.requires_grad],
        "figures": [{k: v for k, v in line.items() if k not in ("seconds", "memory_bytes")} for line in lines],
        "kept": sorted(n for n in os.listdir(output / CHECKPOINT_FOLDER) if not n.endswith(".lock")),  # harmless
        "best": best.name if best and best.exists() else None,
    }


def in_a_child(work: Callable[[], None]) -> int:
    """Do something in a process of its own; returns its status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(WRONG)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_calls(kind: str, folder: str) -> None:
    """Train with a fault at the k-th call, then go on, for every `EVERY`-th k. Prints how many calls there were."""
    torch.set_num_threads(1)
    whole = Path(folder, "whole.json")

    def undisturbed() -> None:
        whole.write_text(json.dumps(result(Path(folder, "whole"))))

    assert in_a_child(undisturbed) == 0
    expected = json.loads(whole.read_text())
    assert expected["best"] == "stage0-step0000002" and expected["kept"] == [
        "best.json", "stage0-step0000002", "stage1-step0000000"
    ]  # fmt: skip
    number, reached = 1 - EVERY, True
    while reached:
        number += EVERY
        output = Path(folder, str(number))

        def disturbed(output: Path = output, number: int = number) -> None:
            act = die if kind == "death" else fail
            with Fault(number, act) as fault:
                try:
                    trained_with(output)
                except StorageError as error:
                    assert error.hint and (error.exit_status == 3 or not output.exists())
            os._exit(DIED if fault.count >= number else 0)

        def again(output: Path = output, number: int = number) -> None:
            found = result(output)
            assert found == expected, (number, {k: found[k] for k in ("figures", "kept", "best")})

        status = in_a_child(disturbed)
        assert status in (0, DIED), number
        reached = status == DIED
        assert in_a_child(again) == 0, number
    print(number)


def die(place: object) -> None:
    os._exit(DIED)


def fail(place: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["death", "error"])
def test_a_run_disturbed_at_a_call_goes_on_and_ends_like_one_that_was_not(kind: str, tmp_path: Path) -> None:
    code = f"import sys; from {__name__} import at_calls; at_calls(*sys.argv[1:])"
    command = [sys.executable, "-c", code, kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
