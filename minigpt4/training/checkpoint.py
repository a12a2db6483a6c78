"""What a run needs to go on after it was stopped: trained tensors, optimizer state, and where it was.

Safetensors and JSON only. The order of the data is a function of stage and step, so it needs no state.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minigpt4.weights.files.atomic import verify_folder, write_folder

FOLDER = "checkpoint"


@dataclass(frozen=True)
class Position:
    """Where a run is: the next step to take, of the stage."""

    stage: int
    step: int


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Replace the run's checkpoint, whole or not at all."""
    parameters = trained_tensors(model)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    moments = {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    with write_folder(output / FOLDER, overwrite=True) as folder:
        save_file({k: v.contiguous() for k, v in parameters.items()}, folder / "trained.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "position.json").write_text(json.dumps(asdict(position)))


def load_position(output: Path) -> Position | None:
    """Return where the run stopped; None for a run that has no checkpoint."""
    if not (output / FOLDER).exists():
        return None
    verify_folder(output / FOLDER)
    return Position(**json.loads((output / FOLDER / "position.json").read_text()))


def load_trained(output: Path, model: nn.Module) -> None:
    """Put the checkpoint's trained tensors into the model."""
    stored = load_file(output / FOLDER / "trained.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(stored.pop(name))


def load_optimizer(output: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the checkpoint's moments into the optimizer."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in load_file(output / FOLDER / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        optimizer.state[parameters[parameter]][key] = value
