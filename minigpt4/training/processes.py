"""The processes of a run: joining them, spreading the model over them, sums and errors of all of them.

Started by torchrun, every process reads its own part of each batch. `ddp` keeps the whole model in each; `fsdp2` keeps
a part of every layer in each and gathers a layer when it is needed, for frozen models that do not fit one device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minigpt4.errors import MiniGPT4Error, StorageError

TIMEOUT = timedelta(minutes=30)
"""After which a silent process counts as dead. torchrun notices one that ended at once."""


def processes() -> PartialState:
    """Join the other processes that torchrun started, or be the only one.

    Raises:
        MiniGPT4Error: Several processes would share a Mac's one device.
    """
    # By default the library joins no processes on a machine without an accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)
    if state.num_processes > 1 and state.device.type == "mps":
        raise MiniGPT4Error("several processes cannot share the device mps", hint="start one process")
    return state


@contextmanager
def joined() -> Iterator[PartialState]:
    """Join the other processes, and leave the group at the end if it was joined here.

    A program that ends in a group may abort. After an error the group is not left, since leaving waits for the others.

    Raises:
        MiniGPT4Error: See `processes`.
    """
    before = torch.distributed.is_initialized()
    state = processes()
    yield state
    if state.num_processes > 1 and not before:
        state.destroy_process_group()
        PartialState._reset_state()  # so that this program can join another group


def waits_on_the_cpu(parallel: Literal["ddp", "fsdp2"], state: PartialState) -> bool:
    """Whether a model stays on the CPU until it is spread, since a device may not have room for all of it."""
    return parallel == "fsdp2" and state.num_processes > 1


def spread(module: nn.Module, parallel: Literal["ddp", "fsdp2"], state: PartialState) -> nn.Module:
    """Wrap a module for the processes.

    With `fsdp2` one layer after another goes to this process's device and is sharded there, so that a device holds its
    shards, one whole layer, and at last what belongs to no layer.

    Args:
        module: On this process's device, or on the CPU for `fsdp2`.
        parallel: `ddp` or `fsdp2`.
        state: The processes.
    """
    # Ours, and not accelerate's Accelerator: its fsdp2 wants the names of layer classes, which differ with every tower.
    if state.num_processes == 1:
        return module
    if parallel == "ddp":
        device_ids = [state.device] if state.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=device_ids)
    policy = MixedPrecisionPolicy()
    for layer in _layers(module):
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    return module


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers of all stacks of layers of one class: almost all of a transformer."""
    stacks = [child for child in module.modules() if isinstance(child, nn.ModuleList) and len(child) > 1]
    return [layer for stack in stacks for layer in stack if len({type(other) for other in stack}) == 1]


def is_spread(module: nn.Module) -> bool:
    """Whether each process has a part of the module only."""
    return isinstance(module, FSDPModule)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the parameters outside of layers, so that inner modules can be called; in all processes together.

    Layers gather themselves when they are called.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def gather_parameters(module: nn.Module) -> None:
    """Replace a module's own sharded parameters by whole ones, for reading; in all processes together."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, DTensor):
            setattr(module, name, nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad))


def unsynchronised(module: nn.Module, last: bool) -> Any:  # noqa: ANN401  (a context)
    """Let gradients add up in each process until the last batch of an update."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def summed(values: list[float], state: PartialState) -> list[float]:
    """Add up numbers over all processes."""
    if state.num_processes == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64).to(state.device)
    torch.distributed.all_reduce(tensor)
    result: list[float] = tensor.tolist()
    return result


@contextmanager
def others_alive(state: PartialState) -> Iterator[None]:
    """Turn the libraries' errors about another process that ended into one sentence.

    Raises:
        MiniGPT4Error: Another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        if state.num_processes == 1 or not any(word in str(error) for word in ("gloo", "NCCL", "TCPStore")):
            raise
        raise MiniGPT4Error(
            f"process {state.process_index} of {state.num_processes} lost another process of the run",
            hint="the message of the process that ended first says why; the same command goes on",
        ) from error


def full_norm(norm: Tensor) -> float:
    """Return the norm of gradients that may be sharded."""
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def by_the_main_process(work: Callable[[], None], state: PartialState) -> None:
    """Do work in the main process while the others wait; if it fails, all of them fail.

    Raises:
        MiniGPT4Error: The main process's error; in the others, that it had one.
    """
    failure: Exception | None = None
    if state.is_main_process:
        try:
            work()
        except (MiniGPT4Error, OSError) as error:
            failure = error
    [failed] = summed([float(failure is not None)], state)
    if failure is not None:
        raise failure
    if failed:
        raise StorageError("the main process could not go on", hint="its own message says more")
