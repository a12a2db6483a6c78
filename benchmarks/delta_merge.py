"""How long `apply-delta` takes, and how much memory, beside the original's two ways and beside the disk itself.

    python benchmarks/delta_merge.py --folder /somewhere/with/room --gigabytes 4 --rounds 3 --json figures.json

A LLaMA of a 7B's width and as many layers as fill `--gigabytes` is made up, and a delta for it, both as `.bin` files:
the base in one per layer, the delta in two. Every way runs in a process of its own, with the inputs out of the
system's cache, and ends with its output on the disk (fsync):

- floor: read both inputs and write as many bytes as the output has, without arithmetic; it reads while it writes.
- ours: `minigpt4.weights.llama.delta.apply_delta`, which also makes the digests of the manifest.
- load all: read both models into memory, add, save.
- split: what the original's `--low-cpu-mem` does: both models copied into small files, then added file by file, with a
  search through the delta's files for a tensor that the one at hand lacks.

Memory is the peak of the process, of which Python and the libraries, loaded and idle, are `idle`. Every round begins
with another way, so that none has the quiet disk to itself.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.weights.files.model_writer import PIECE_BYTES, Entry, write_torch_archive
from minigpt4.weights.llama.delta import apply_delta

WIDTH, MLP, ROWS = 4096, 11008, 32000
DELTA_FILES = 2
SPLIT_BYTES = 2**28  # the original's 4 GB for 7B's 13.5 GB; smaller here, as the models are
READ_BYTES = 2**22
DTYPE = torch.float16
TOKENIZER = b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Run:
    """What one run took.

    Args:
        seconds: Wall time.
        cpu_seconds: Time of the processor, over all threads, for the program and for the system.
        peak_mb: Peak memory of the process.
    """

    seconds: float
    cpu_seconds: float
    peak_mb: float


def shapes_of(gigabytes: float) -> Shapes:
    """Size a model: tables as a 7B has, and layers until it is large enough."""
    table = ROWS * WIDTH * DTYPE.itemsize
    layer = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"}
    layer |= {"mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP)}
    norms = ("input_layernorm", "post_attention_layernorm")
    layer_bytes = sum(rows * columns for rows, columns in layer.values()) * DTYPE.itemsize
    count = max(1, round((gigabytes * 1e9 - 2 * table) / layer_bytes))
    shapes: Shapes = {"model.embed_tokens.weight": (ROWS, WIDTH)}
    for number in range(count):
        here = f"model.layers.{number}"
        shapes |= {f"{here}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"{here}.{name}.weight": (WIDTH,) for name in norms}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (ROWS, WIDTH)}


def make_model(folder: Path, groups: Sequence[Shapes], scale: float, norm: float, seed: int) -> None:
    """Make a model's folder up, a file for each group of tensors; the numbers repeat, which no way profits from."""
    folder.mkdir(parents=True)
    noise = torch.randn(PIECE_BYTES // DTYPE.itemsize, generator=torch.Generator().manual_seed(seed)).mul(scale)
    numbers = noise.to(DTYPE)
    index: dict[str, str] = {}

    def pieces(entry: Entry) -> Iterator[Tensor]:
        count = entry.count
        constant = torch.full((min(count, len(numbers)),), norm, dtype=DTYPE)
        source = constant if entry.name.endswith("norm.weight") else numbers
        for first in range(0, count, len(source)):
            yield source[: count - first]

    for number, shapes in enumerate(groups, start=1):
        file = f"pytorch_model-{number:05}-of-{len(groups):05}.bin"
        write_torch_archive(folder / file, [Entry(name, DTYPE, shape) for name, shape in shapes.items()], pieces)
        index |= dict.fromkeys(shapes, file)
    config = {"model_type": "llama", "vocab_size": ROWS, "hidden_size": WIDTH, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes(TOKENIZER)


def by_layer(shapes: Shapes) -> list[Shapes]:
    """Group tensors as the original converter did: a file for each layer, and one for the rest."""
    groups: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "", {})[name] = shape
    return list(groups.values())


def in_parts(shapes: Shapes, count: int) -> list[Shapes]:
    names = list(shapes)
    step = -(-len(names) // count)
    return [{name: shapes[name] for name in names[first : first + step]} for first in range(0, len(names), step)]


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def floor(base: Path, delta: Path, target: Path) -> None:
    target.mkdir()
    with ThreadPoolExecutor(1) as thread:
        for file in weight_files(base):
            with file.open("rb", buffering=0) as source, (target / file.name).open("wb", buffering=0) as output:
                writing = thread.submit(output.write, b"")
                while data := source.read(READ_BYTES):
                    writing.result()
                    writing = thread.submit(output.write, data)
                writing.result()
                os.fsync(output.fileno())
    for file in weight_files(delta):
        with file.open("rb", buffering=0) as source:
            while source.read(READ_BYTES):
                pass


def ours(base: Path, delta: Path, target: Path) -> None:
    apply_delta(base, delta, target)


def load(file: Path) -> dict[str, Tensor]:
    content: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return content


def save(content: Mapping[str, Tensor], file: Path) -> None:
    torch.save(dict(content), file)
    with file.open("rb") as saved:
        os.fsync(saved.fileno())


def load_all(base: Path, delta: Path, target: Path) -> None:
    target.mkdir()
    model = {name: tensor for file in weight_files(base) for name, tensor in load(file).items()}
    change = {name: tensor for file in weight_files(delta) for name, tensor in load(file).items()}
    for name, tensor in model.items():
        tensor += change[name]
    save(model, target / "pytorch_model.bin")


def split(base: Path, delta: Path, target: Path) -> None:
    target.mkdir()
    parts = [split_files(side, target / f"split-{side.name}") for side in (base, delta)]
    current: dict[str, Tensor] = {}
    for file in parts[0]:
        model = load(file)
        for name, tensor in model.items():
            if name not in current:
                current = next(content for part in parts[1] if name in (content := load(part)))
            tensor += current[name]
        save(model, target / file.name)
    for side in (base, delta):
        shutil.rmtree(target / f"split-{side.name}")


def split_files(folder: Path, target: Path) -> list[Path]:
    """Copy a model into files of at most `SPLIT_BYTES`, as far as its tensors allow."""
    target.mkdir()
    written: list[Path] = []
    for file in weight_files(folder):
        part: dict[str, Tensor] = {}
        filled = 0
        for name, tensor in load(file).items():
            size = tensor.numel() * tensor.itemsize
            if part and filled + size > SPLIT_BYTES:
                written.append(target / f"pytorch_model-{len(written)}.bin")
                torch.save(part, written[-1])
                part, filled = {}, 0
            part[name] = tensor.clone()
            filled += size
        written.append(target / f"pytorch_model-{len(written)}.bin")
        torch.save(part, written[-1])
    return written


def idle(base: Path, delta: Path, target: Path) -> None:
    """Do nothing: what the libraries alone need."""


WAYS: dict[str, Callable[[Path, Path, Path], None]] = {
    "idle": idle,
    "floor": floor,
    "ours": ours,
    "load all": load_all,
    "split": split,
}


def measured(way: str, base: Path, delta: Path, target: Path, results: "multiprocessing.Queue[Run]") -> None:
    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    WAYS[way](base, delta, target)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    results.put(Run(seconds, cpu, peak_bytes() / 1e6))


def peak_bytes() -> int:
    """The peak of this process; `ru_maxrss`, where there is nothing better, counts what its parent had, too."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(way: str, base: Path, delta: Path, target: Path) -> Run:
    """Run one way in a new process, its inputs out of the cache."""
    for file in (*weight_files(base), *weight_files(delta)):
        forget(file)
    shutil.rmtree(target, ignore_errors=True)
    spawning = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Run] = spawning.Queue()
    process = spawning.Process(target=measured, args=(way, base, delta, target, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{way} ended with status {process.exitcode}")
    shutil.rmtree(target, ignore_errors=True)
    return results.get()


def forget(file: Path) -> None:
    """Drop a file from the system's cache, where the system has such a call."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summary(runs: Mapping[str, Sequence[Run]], shapes: Shapes) -> dict[str, object]:
    """Put the medians side by side."""
    sizes = [torch.Size(shape).numel() * DTYPE.itemsize / 1e6 for shape in shapes.values()]
    table = {
        way: Run(
            statistics.median(run.seconds for run in all_runs),
            statistics.median(run.cpu_seconds for run in all_runs),
            max(run.peak_mb for run in all_runs),
        )
        for way, all_runs in runs.items()
    }
    mine = table["ours"]
    figures: dict[str, object] = {
        "model_mb": sum(sizes),
        "largest_tensor_mb": max(sizes),
        "peak_over_largest_tensor_mb": mine.peak_mb - max(sizes),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "ways": {way: asdict(taken) for way, taken in table.items()},
    }
    for way in ("floor", "load all", "split"):
        if way in table:
            figures[f"ours_of_{way.replace(' ', '_')}"] = {
                "seconds": mine.seconds / table[way].seconds,
                "cpu_seconds": mine.cpu_seconds / table[way].cpu_seconds,
                "peak_mb": mine.peak_mb / table[way].peak_mb,
            }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the models are made, and removed again")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    place = arguments.folder / "delta-merge"
    shapes = shapes_of(arguments.gigabytes)
    runs: dict[str, list[Run]] = {way: [] for way in WAYS if way in {*arguments.ways, "ours"}}
    try:
        make_model(place / "base", by_layer(shapes), scale=0.02, norm=1.0, seed=0)
        make_model(place / "delta", in_parts(shapes, DELTA_FILES), scale=0.001, norm=0.0, seed=1)
        for number in range(arguments.rounds):
            first = number % len(runs)
            for way in [*runs][first:] + [*runs][:first]:
                runs[way].append(run(way, place / "base", place / "delta", place / "target"))
                print(f"round {number + 1}: {way:9} {runs[way][-1]}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    text = json.dumps(summary(runs, shapes), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
