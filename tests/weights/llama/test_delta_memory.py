"""Merging a model of 4 GB takes no more memory than merging a small one.

The inputs are holes in files, which take no room; the output is written whole.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.weights.files.sparse_files import write_sparse
from tests.weights.llama.delta_files import TOKENIZER

WIDTH, MLP, ROWS, LAYERS = 2048, 5504, 32000, 40
LARGEST_TENSOR_MB = ROWS * WIDTH * 2 / 1e6
CODE = """
import sys
from pathlib import Path
from minigpt4.weights.llama.delta import apply_delta
apply_delta(*map(Path, sys.argv[1:4]), trust=True, file_format=sys.argv[4])
# ru_maxrss would count what the parent had before this process became its own.
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(int(line.split()[1]) * 1024 / 1e6)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    layer |= {"mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH), "mlp.down_proj": (WIDTH, MLP)}
    layers = {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in layer.items()}
    ends = {"model.embed_tokens.weight": (ROWS, WIDTH), "lm_head.weight": (ROWS, WIDTH)}
    return {**ends, **layers, "model.norm.weight": (WIDTH,)}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(file_format: str, tmp_path: Path) -> None:
    for side in ("base", "delta"):
        (tmp_path / side).mkdir()
        path = write_sparse(tmp_path / side / "model.safetensors", shapes())
        (tmp_path / side / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        (tmp_path / side / "tokenizer.json").write_text(TOKENIZER, encoding="utf-8")
    assert path.stat().st_size > 4e9

    arguments = [str(tmp_path / name) for name in ("base", "delta", "out")]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments, file_format], capture_output=True, text=True, check=True
    )

    assert float(done.stdout) < LARGEST_TENSOR_MB + 300
    for file in (tmp_path / "out").iterdir():
        file.unlink()
