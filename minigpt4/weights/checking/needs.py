"""How much memory a model takes in a placement, and the nearest placement that fits.

Arithmetic over sizes, done before anything is loaded. Knows no tensor, no file and no machine; needs no torch, so that
`minigpt4 models` can use the same constants.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

LIBRARIES_BYTES = 400_000_000
"""Measured: what a process takes with torch and transformers loaded and no weights, rounded up."""

ACCELERATOR_CONTEXT_BYTES = 500_000_000
"""What CUDA keeps on a device for itself once a process uses it; drivers differ by a factor of about two."""

NANO_PEAK_BYTES = 1_300_000_000
"""Measured: the peak of `minigpt4 ask` with nano on a CPU in float32."""

NANO_DISK_BYTES = 800_000_000
"""Measured: nano's two parts as they come, the language model converted, and the folder that joins them."""

NANO_CONTEXT = 8192
"""Tokens that nano's language model reads."""

FLOAT32_PER_STORED_BYTE = 2
"""A CPU runs in float32 what is stored in 16 bits, the common case; stored float32 needs half of this."""

MARGIN = 0.25
"""How far the estimate may be from the peak that a process is measured to reach on a CPU; `tests` hold it to this."""

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
PACKED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Of one number of a packed matrix; nf4 keeps a float32 scale for every 64 numbers."""

PACKED_BYTES_ON_CPU = {"int8": 4.0, "nf4": 2.5}
"""Measured with bitsandbytes 0.50: there it keeps an unpacked copy beside the packed one, whole for int8."""

DEFAULT_CONTEXT = 2048
SMALLEST_CONTEXT = 512
PIXEL_VALUES_PER_CHANNEL = 40
"""Numbers that a vision encoder holds at once for each number of a picture, about; 224 pixels give 24 MB."""

VISION, RESAMPLER, PROJECTION, LANGUAGE = "vision encoder", "Q-Former", "projection", "language model"
CACHE, FEATURES, WORKING, LIBRARIES = "cache of the conversation", "pictures", "working space", "libraries"

CACHE_COPIES_ON_CPU = 2
"""Measured: the cache grows by a copy for each new token, and what the copies leave free is too small for the next."""

# How much a user gives up by each change, for choosing the nearest placement that fits.
_LOSS_OF_HALF_BEAMS = 1.0
_LOSS_OF_HALF_CONTEXT = 2.0
_LOSS_OF_16_BITS = 2.5
_LOSS_OF_PACKING = {"int8": 4.0, "nf4": 5.0}
_LOSS_OF_DEVICE = 8.0
_LOSS_OF_ACCELERATOR = 4.0


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that decide how much memory it takes.

    Args:
        parameters: Numbers in each part, by the part's name.
        packable: Those of the language model that quantization packs: its layers' matrices.
        num_layers: Of the language model.
        cached_width: Numbers that one layer caches for a token: keys and values of all heads.
        hidden_size: Width of the language model.
        intermediate_size: Width inside its feed-forward layers.
        num_heads: Its attention heads.
        vocabulary: Its words.
        max_context: Tokens it can read; None where it does not say.
        image_tokens: Places a picture takes; 0 for a language model alone.
        image_size: Pixels along a side; 0 for a language model alone.
    """

    parameters: Mapping[str, int]
    packable: int
    num_layers: int
    cached_width: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocabulary: int
    max_context: int | None = None
    image_tokens: int = 0
    image_size: int = 0


@dataclass(frozen=True)
class Placement:
    """Where and how a model is to run.

    Args:
        device: `"cpu"`, `"cuda:0"`, `"mps"`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        quantize: `"none"`, `"int8"` or `"nf4"`.
        num_beams: Answers followed at once.
        context: Tokens of the conversation and the answer together.
    """

    device: str = "cpu"
    dtype: str = "float32"
    quantize: str = "none"
    num_beams: int = 1
    context: int = DEFAULT_CONTEXT

    def as_options(self, compared_with: "Placement") -> str:
        """Spell what differs from another placement as options of the command line."""
        named = {
            "--device": self.device,
            "--dtype": self.dtype,
            "--quantize": self.quantize,
            "--num-beams": self.num_beams,
            "--context": self.context,
        }
        fields = ("device", "dtype", "quantize", "num_beams", "context")
        pairs = zip(named.items(), fields, strict=True)
        return " ".join(f"{option} {value}" for (option, value), key in pairs if value != getattr(compared_with, key))


@dataclass(frozen=True)
class Need:
    """What a placement takes.

    Args:
        on_device: Bytes on the device, by what they are for.
        loading: Bytes of the computer's own memory while the model is loaded, where the device has memory of its own;
            0 where it has not.
    """

    on_device: Mapping[str, int]
    loading: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.on_device.values())


def need(size: ModelSize, placement: Placement) -> Need:
    """Return what a placement takes.

    On a CPU the estimate is of what the process holds at its fullest, within `MARGIN`. A process seems to take more
    while it reads its weight file: those pages of the file are the system's to take back.
    """
    number = DTYPE_BYTES[placement.dtype]
    on_device = {part: round(count * number) for part, count in size.parameters.items()}
    if placement.quantize != "none":
        table = PACKED_BYTES_ON_CPU if placement.device == "cpu" else PACKED_BYTES
        on_device[LANGUAGE] -= round(size.packable * max(0.0, number - table[placement.quantize]))
    copies = CACHE_COPIES_ON_CPU if placement.device == "cpu" else 1
    sequences = placement.context * placement.num_beams
    on_device[CACHE] = round(copies * sequences * size.num_layers * size.cached_width * number)
    if size.image_size:
        pixels = 3 * size.image_size**2
        embedded = size.image_tokens * size.hidden_size
        on_device[FEATURES] = round(number * (PIXEL_VALUES_PER_CHANNEL * pixels + embedded))
    on_device[WORKING] = _working_bytes(size, placement, number)
    if placement.device in ("cpu", "mps"):
        return Need({**on_device, LIBRARIES: LIBRARIES_BYTES})
    weights = 0 if placement.quantize != "none" else round(sum(size.parameters.values()) * number)
    return Need({**on_device, LIBRARIES: ACCELERATOR_CONTEXT_BYTES}, loading=LIBRARIES_BYTES + weights)


def _working_bytes(size: ModelSize, placement: Placement, number: float) -> int:
    """Estimate what reading the whole conversation at once takes beside the weights and the cache.

    One layer works at a time: its feed-forward part holds three numbers of its inner width for a token, the rest about
    six of the model's width, and its part of the cache is copied when it grows. The scores of all words are in float32,
    a few copies of them for each beam.
    """
    sequences = placement.context * placement.num_beams
    a_token = 6 * size.hidden_size + 3 * size.intermediate_size + size.cached_width
    scores = placement.num_beams * size.vocabulary * 4 * 4
    return round(sequences * a_token * number + scores)


def fits(size: ModelSize, placement: Placement, free: Mapping[str, int]) -> bool:
    """Whether a placement fits the memory that is free.

    Args:
        size: The model's.
        placement: Where and how it is to run.
        free: Bytes by device; `"cpu"` is the computer's own memory.
    """
    wanted = need(size, placement)
    return wanted.total <= free.get(placement.device, 0) and wanted.loading <= free["cpu"]


def nearest_fit(size: ModelSize, wanted: Placement, free: Mapping[str, int]) -> Placement | None:
    """Return the placement that fits and gives up the least of what was wanted; None where none fits.

    What is given up, the least first: beams, length of the conversation, 32 bits, 16 bits, the device.
    """
    candidates = sorted(_alternatives(size, wanted, free), key=lambda pair: pair[0])
    return next((placement for _, placement in candidates if fits(size, placement, free)), None)


def _alternatives(size: ModelSize, wanted: Placement, free: Mapping[str, int]) -> Iterator[tuple[float, Placement]]:
    """Yield every placement that gives up something, with how much that is."""
    beams = [(n * _LOSS_OF_HALF_BEAMS, count) for n, count in enumerate(_halved(wanted.num_beams, 1))]
    least = min(wanted.context, SMALLEST_CONTEXT + size.image_tokens)
    contexts = [(n * _LOSS_OF_HALF_CONTEXT, count) for n, count in enumerate(_halved(wanted.context, least))]
    dtypes = [(0.0, wanted.dtype)] + ([(_LOSS_OF_16_BITS, "bfloat16")] if wanted.dtype == "float32" else [])
    packings = [(0.0, wanted.quantize)]
    now = PACKED_BYTES.get(wanted.quantize, 4.0)
    packings += [(_LOSS_OF_PACKING[name], name) for name, number in PACKED_BYTES.items() if number < now]
    devices = [(_loss_of_moving(wanted.device, device), device) for device in free]
    for choice in itertools.product(beams, contexts, dtypes, packings, devices):
        (_, num_beams), (_, context), (_, dtype), (_, quantize), (_, device) = choice
        if quantize != wanted.quantize and device in ("cpu", "mps"):
            continue  # it saves little there, or does not run at all
        changed = replace(wanted, num_beams=num_beams, context=context, dtype=dtype, quantize=quantize, device=device)
        yield sum(loss for loss, _ in choice), changed


def _loss_of_moving(wanted: str, device: str) -> float:
    if device == wanted:
        return 0.0
    return _LOSS_OF_DEVICE + (_LOSS_OF_ACCELERATOR if device == "cpu" else 0.0)


def _halved(start: int, least: int) -> list[int]:
    """List a number and its halves down to the least."""
    values = [start]
    while values[-1] // 2 >= least:
        values.append(values[-1] // 2)
    return values
