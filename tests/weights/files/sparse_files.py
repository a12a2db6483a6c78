"""Weight files of full size that take no room: a true header, and holes where the numbers would be.

Whoever reads the numbers gets zeros, or ones for the tensors that are named.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


def write_sparse(path: Path, shapes: Shapes, ones: Sequence[str] = ()) -> Path:
    """Write a `.safetensors` file of float16 tensors.

    Args:
        path: The file.
        shapes: Of the tensors, by name.
        ones: Those that hold ones.
    """
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in ones:
            start, _ = header[name]["data_offsets"]  # type: ignore[index]
            file.seek(8 + len(text) + start)
            file.write(np.ones(shapes[name], np.float16).tobytes())
    return path
