"""Checkpoints of a run: trained tensors, optimizer state, position and counts.

Safetensors and JSON only, each checkpoint a folder of its own that appears whole or not at all. The order of the data
and the random numbers are functions of seed, stage and step, so they need no state.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from minigpt4.errors import DataError, MiniGPT4Error, StorageError, WeightsError
from minigpt4.training.recipe import Recipe
from minigpt4.training.run_folder import CHECKPOINT_FOLDER, newest_first, place_of
from minigpt4.weights.files.atomic import MANIFEST_NAME, clean_stale, verify_folder, write_file, write_folder
from minigpt4.weights.files.disk import storing

BEST_FILE = "best.json"
LARGEST_WEIGHT = math.sqrt(torch.finfo(torch.float32).max)
"""Squares of larger weights are infinite, and with them every norm and attention after them."""

_OTHER_MODEL = "the run began with another model: name that one, or set another output"

logger = logging.getLogger(__name__)


@dataclass
class State:
    """Position and counts of a run.

    Args:
        stage: Number of the stage.
        step: The next update to make in it.
        skipped: Updates in a row that were left out because of a loss or gradient that is not a number.
        recent_bad: Bad examples of each of the last updates, as `[bad, read]`.
        groups: Good and bad examples of each shard, since its first bad one.
        best_loss: The smallest validation loss of the stage so far.
        best: Name of the checkpoint that had it, or of the last that had a stage's before.
        scaler: Of the loss, in `fp16`.
    """

    stage: int = 0
    step: int = 0
    skipped: int = 0
    recent_bad: list[list[int]] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    best_loss: float | None = None
    best: str | None = None
    scaler: dict[str, Any] = field(default_factory=dict)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name; sharded ones are gathered, in all processes together."""
    return {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's moments as `PARAMETER/MOMENT`, gathered likewise."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    return {
        f"{names[id(parameter)]}/{key}": whole(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole one, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def name_of(state: State) -> str:
    """Return the name of the checkpoint of a state."""
    return f"stage{state.stage}-step{state.step:07d}"


def write_checkpoint(output: Path, tensors: dict[str, Tensor], moments: dict[str, Tensor], state: State) -> Path:
    """Add a checkpoint to a run.

    Raises:
        StorageError: It cannot be written; what was there before stays.
    """
    target = output / CHECKPOINT_FOLDER / name_of(state)
    if target.exists() and not (target / MANIFEST_NAME).exists():  # damaged, passed over, and made again now
        with storing(target):
            shutil.rmtree(target)
    with write_folder(target, overwrite=True) as folder:
        save_file(tensors, folder / "trained.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    return target


def remove_old(output: Path, state: State, keep: int) -> None:
    """Remove all checkpoints but the last ones, up to that of a state just written, and the best.

    Later ones are damaged and were skipped: they do not count.

    Raises:
        StorageError: One cannot be removed.
    """
    so_far = [folder for folder in newest_first(output) if place_of(folder) <= [state.stage, state.step]]
    for folder in so_far[keep:]:
        if folder.name != state.best:
            with storing(folder):
                shutil.rmtree(folder)


def mark_best(output: Path, name: str) -> None:
    """Record which checkpoint had the smallest validation loss.

    Raises:
        StorageError: It cannot be written.
    """
    with write_file(output / CHECKPOINT_FOLDER / BEST_FILE, "w") as file:
        file.write(json.dumps(name))


def best_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint with the smallest validation loss; None where nothing was validated.

    Raises:
        StorageError: The file that says so cannot be read.
    """
    path = output / CHECKPOINT_FOLDER / BEST_FILE
    with storing(path, doing="read"):
        return output / CHECKPOINT_FOLDER / json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_trained(checkpoint: Path) -> dict[str, Tensor]:
    """Return a checkpoint's trained tensors.

    Raises:
        StorageError: It cannot be read.
        WeightsError: It is damaged.
    """
    verify_folder(checkpoint)
    return load_file(checkpoint / "trained.safetensors")


def last_checkpoint(output: Path) -> tuple[Path, State] | None:
    """Return a run's last checkpoint that is whole, with its state; None for a run that has none.

    A damaged one is skipped with a warning.

    Raises:
        WeightsError: There are checkpoints, and all are damaged.
    """
    if (output / CHECKPOINT_FOLDER).exists():
        clean_stale(output / CHECKPOINT_FOLDER)
    reason: MiniGPT4Error | None = None
    for folder in newest_first(output):
        try:
            verify_folder(folder)
            return folder, State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        except (StorageError, WeightsError) as error:
            reason = error
            logger.warning("the checkpoint %s is damaged and passed over: %s", folder.name, error.message)
    if reason is not None:
        raise WeightsError(f"no checkpoint of {output} is whole: {reason.message}", hint="start anew in another folder")
    return None


def check_finite(trained: Mapping[str, Tensor], moments: Mapping[str, Tensor], recipe: Recipe, state: State) -> None:
    """Refuse weights and moments that are not finite, or too large to compute with, before they are written.

    Args:
        trained: The trained tensors by name.
        moments: The optimizer's.
        recipe: The run's.
        state: After the last update.

    Raises:
        DataError: Names the tensor, the update, and the last checkpoint.
    """
    for tensors, largest in ((trained, LARGEST_WEIGHT), (moments, torch.finfo(torch.float32).max)):
        for name, tensor in tensors.items():
            if tensor.numel() == 0:
                continue
            worst = max((abs(float(end)) for end in tensor.aminmax()), key=lambda size: (math.isnan(size), size))
            if worst <= largest:
                continue
            # A state after a stage is at the beginning of the next one.
            stage = recipe.stages[state.stage if state.step else state.stage - 1]
            raise DataError(
                f"{name.removeprefix('model.')} came to {worst:.3g} after step {state.step or stage.steps} of stage "
                f"{stage.name}, at most {largest:.3g} can be computed with",
                hint=f"lower the learning rate; {_how_to_go_on(recipe, state)}",
            )


def _how_to_go_on(recipe: Recipe, state: State) -> str:
    so_far = (folder for folder in newest_first(recipe.output) if place_of(folder) <= [state.stage, state.step])
    last = next(so_far, None)
    if last is None:
        return "nothing was saved, so --force or another output begins anew"
    return f"then --force goes on from the last checkpoint, {last}, or another output begins anew"


def load_trained(checkpoint: Path, model: nn.Module) -> None:
    """Put a checkpoint's trained tensors into the model.

    Raises:
        WeightsError: The model trains other tensors.
    """
    stored = load_file(checkpoint / "trained.safetensors")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if stored.keys() != parameters.keys():
        odd = sorted(stored.keys() ^ parameters.keys())[0]
        raise WeightsError(
            f"the checkpoint {checkpoint} and the model differ in the trained tensor {odd}", hint=_OTHER_MODEL
        )
    for name, parameter in parameters.items():
        if stored[name].shape != parameter.shape:
            raise WeightsError(
                f"the checkpoint {checkpoint} and the model differ in the shape of {name}: {list(stored[name].shape)}, "
                f"now {list(parameter.shape)}",
                hint=_OTHER_MODEL,
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_sharded_like(stored[name], parameter))


def load_optimizer(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's moments into the optimizer."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in load_file(checkpoint / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        of = parameters[parameter]
        optimizer.state[of][key] = value if key == "step" else _sharded_like(value, of)


def _sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
