"""What files and folders are that hold weights and are no models of the original's: nano's parts, a run's checkpoint.

Tells them by their first bytes, their names and the names of their tensors.
"""

from pathlib import Path

from minigpt4.errors import WeightsError
from minigpt4.weights.checking.inspection_kinds import Inspection
from minigpt4.weights.files.tensors import TensorFiles
from minigpt4.weights.parts import EFFICIENTNET_LITE0, SMOLLM2

GGUF = b"GGUF"
GGUF_HEADER_BYTES = 24
WHEEL_ENDING = ".whl"
CHECKPOINT_FILES = ("optimizer.safetensors", "trained.safetensors")
"""What a training run goes on from, beside a few numbers."""

_CLASSIFIER = ("_conv_stem.weight", "_fc.weight", "_blocks.0._depthwise_conv.weight")
_ROLES = {"language model": SMOLLM2, "vision encoder": EFFICIENTNET_LITE0}


def gguf_file(path: Path) -> Inspection | None:
    """Describe a GGUF file by its header; None for any other file.

    Raises:
        WeightsError: It is cut short.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(GGUF_HEADER_BYTES)
    if not header.startswith(GGUF):
        return None
    if len(header) < GGUF_HEADER_BYTES:
        raise WeightsError(f"{path} is a GGUF file that is cut short", "fetch it again")
    return Inspection(
        path=str(path),
        kind="GGUF file",
        title="a language model in one file, for llama.cpp",
        version=f"GGUF {int.from_bytes(header[4:8], 'little')}",
        sizes={"tensors": int.from_bytes(header[8:16], "little")},
        fits=_fits_nano(path),
        notes=["as a language model of MiniGPT-4, use the same model's folder of .safetensors or .bin files"],
    )


def wheel(path: Path) -> Inspection | None:
    """Describe a Python package, as nano's frozen parts come in; None for any other file."""
    if path.suffix != WHEEL_ENDING:
        return None
    return Inspection(
        path=str(path),
        kind="Python package",
        title="a Python package; weights in it are inside a compressed archive",
        notes=["nano takes its parts out of such packages by itself, from the folder that MINIGPT4_WHEELS names"],
    )


def classifier(path: Path, tensors: TensorFiles) -> Inspection | None:
    """Describe an EfficientNet-Lite as it was published; None where the tensors are another's."""
    if any(name not in tensors for name in _CLASSIFIER):
        return None
    blocks = {name.split(".")[1] for name in tensors if name.startswith("_blocks.")}
    return Inspection(
        path=str(path),
        kind="image classifier",
        title="an EfficientNet-Lite, trained to name what is in a picture",
        sizes={"blocks": len(blocks), "classes": tensors.shape("_fc.weight")[0]},
        fits=_fits_nano(path),
    )


def training_checkpoint(path: Path) -> Inspection | None:
    """Describe what a training run goes on from; None for any other folder."""
    if any(not (path / name).is_file() for name in CHECKPOINT_FILES):
        return None
    return Inspection(
        path=str(path),
        kind="training checkpoint",
        title="where a training run stands: the trained tensors, the optimizer and the step",
        notes=["run the same `minigpt4 train` again to go on; what can be asked is the alignment in the run's folder"],
    )


def _fits_nano(path: Path) -> list[str]:
    size = path.stat().st_size
    return [
        f"nano: by name and size it is its {role}"
        for role, part in _ROLES.items()
        if (path.name, size) == (Path(part.member).name, part.size)
    ]
