"""Death and errors at every call of a run to the operating system: started again, it ends as if none had been.

Of a whole run: its lines of figures, its checkpoints, the removal of old ones and the mark of the best. Parts of a
checkpoint that a library writes (safetensors) are calls of their own in `tests/weights/files/test_atomic.py`.
"""

import errno
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.errors import StorageError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.checkpoint import best_checkpoint
from minigpt4.training.loop import train
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.processes import processes
from minigpt4.training.recipe import StageRecipe
from minigpt4.training.run_folder import CHECKPOINT_FOLDER, check_recipe
from minigpt4.weights.files.disk import make_folder
from tests.training import toy
from tests.weights.files.faults import Fault

ROOT = Path(__file__).resolve().parents[2]
LOSSES = {1: 3.0, 2: 2.0, 3: 4.0}
DIED, WRONG = 9, 1


class Watcher(toy.Watcher):
    """Knows a validation loss for every update; the smallest is neither the first nor the last."""

    def validation_loss(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        return LOSSES[step]


def trained(output: Path) -> MiniGPT4ForConditionalGeneration:
    """Train, or go on."""
    recipe = toy.longer(output, len(LOSSES))
    recipe = recipe.model_copy(update={"checkpoint_steps": 1, "keep_checkpoints": 1})
    make_folder(output)
    model = toy.model()
    check_recipe(recipe, 1, force=False)
    train(recipe, model, toy.ToyBatches, Watcher(), processes())
    return model


def result(output: Path) -> dict[str, Any]:
    """Train, or go on; returns what must be equal in the end."""
    model = trained(output)
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


def at_every_call(kind: str, folder: str) -> None:
    """Train with a fault at the k-th call, then go on, for every k. Prints how many calls there were."""
    torch.set_num_threads(1)
    whole = Path(folder, "whole.json")

    def undisturbed() -> None:
        whole.write_text(json.dumps(result(Path(folder, "whole"))))

    assert in_a_child(undisturbed) == 0
    expected = json.loads(whole.read_text())
    assert expected["best"] == "stage0-step0000002" and expected["kept"] == [
        "best.json", "stage0-step0000002", "stage1-step0000000"
    ]  # fmt: skip
    number, reached = 0, True
    while reached:
        number += 1
        output = Path(folder, str(number))

        def disturbed(output: Path = output, number: int = number) -> None:
            act = die if kind == "death" else fail
            with Fault(number, act) as fault:
                try:
                    trained(output)
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
    print(number - 1)


def die(place: object) -> None:
    os._exit(DIED)


def fail(place: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["death", "error"])
def test_a_run_disturbed_at_any_call_goes_on_and_ends_like_one_that_was_not(kind: str, tmp_path: Path) -> None:
    code = f"import sys; from {__name__} import at_every_call; at_every_call(*sys.argv[1:])"
    command = [sys.executable, "-c", code, kind, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
