"""Files that want to harm whoever opens them, made byte by byte, and a process of its own in which to open them."""

import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
STORAGE = b"\0" * 16
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

OPENER = """
import json, resource, sys, time
from pathlib import Path
from minigpt4.errors import MiniGPT4Error
from minigpt4.weights.files.tensor_files import open_tensors

folder = Path(sys.argv[1])
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.", "import",
             "os.mkdir", "os.remove", "os.rename", "os.putenv", "exec", "compile", "pickle.find_class", "ctypes.")
seen = []

def watch(event, arguments):
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3):
            seen.append(f"open {arguments[0]} for writing")
    elif event.startswith(FORBIDDEN):
        seen.append(f"{event} {str(arguments)[:80]}")

def opened(path):
    start = time.process_time()
    try:
        tensors = open_tensors(path)
        for name in tensors:
            tensors.read(name).sum()
        said, hint, kind = f"{len(tensors)} tensors", "", "opened"
    except MiniGPT4Error as error:
        said, hint, kind = error.message, error.hint, "refused"
    except BaseException as error:
        said, hint, kind = str(error), "", type(error).__name__
    return {"kind": kind, "said": said, "hint": hint, "seconds": time.process_time() - start}

for path in sorted(folder.glob("sound*")):
    assert opened(path)["kind"] == "opened", opened(path)  # whatever the libraries load at first use is loaded now
virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**30, virtual + 2**30))
sys.addaudithook(watch)
reports = {}
for path in sorted(folder.iterdir()):
    seen.clear()
    report = opened(path)
    reports[path.name] = {**report, "events": list(seen)}
json.dump(reports, sys.stdout)
"""


def open_apart(folder: Path) -> dict[str, dict[str, Any]]:
    """Open every file of a folder in another process that may use 1 GB more than it has, and note what it does.

    Returns:
        By file name: `kind` (`opened`, `refused`, or the name of another exception), what was `said`, the `hint`, the
        `seconds` of the processor, and forbidden `events`: programs, sockets, imports, files opened for writing.
    """
    command = [sys.executable, "-c", OPENER, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reports: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return reports


def plain(value: object) -> bytes:
    """Instructions that put a plain value on the stack."""
    return pickle.dumps(value, protocol=2)[2:-1]


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def tensor(
    *,
    key: object = "0",
    count: object = 4,
    offset: object = 0,
    shape: object = (4,),
    strides: object = (1,),
    storage: bytes = b"ctorch\nFloatStorage\n",
    bare: bool = False,
) -> bytes:
    """Instructions that put a tensor on the stack."""
    view = plain(None) if bare else b""
    place = b"(" + plain("storage") + storage + plain(key) + plain("cpu") + plain(count) + view + b"tQ"
    rest = plain(offset) + plain(shape) + plain(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + rest + b"tR"


def named(*values: bytes, name: object = "a") -> bytes:
    """A whole pickle: a dictionary of values under the names `a`, `a1`, ..."""
    names = [name, *(f"{name}{number}" for number in range(1, len(values)))]
    return program(b"}(" + b"".join(plain(key) + value for key, value in zip(names, values, strict=True)) + b"u")


def archive(
    content: bytes,
    members: Mapping[str, bytes] | None = None,
    *,
    pickle_name: str = "a/data.pkl",
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """An archive as torch writes it, with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(pickle_name, content)
        file.writestr("a/version", b"3")
        for name, data in (members if members is not None else {"a/data/0": STORAGE}).items():
            file.writestr(name, data)
    return buffer.getvalue()


def bare(content: bytes, storages: Mapping[str, bytes] | None = None, counts: Mapping[str, int] | None = None) -> bytes:
    """A bare pickle as torch wrote it before 1.6."""
    storages = {"0": STORAGE} if storages is None else storages
    system = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(value, protocol=2) for value in (MAGIC, PROTOCOL, system)]
    parts += [content, pickle.dumps(list(storages), protocol=2)]
    for key, data in storages.items():
        parts += [((counts or {}).get(key, len(data) // 4)).to_bytes(8, "little"), data]
    return b"".join(parts)


def safetensors(header: object, data: bytes = STORAGE, *, length: int | None = None) -> bytes:
    """A safetensors file with a header of one's own, given as text or as what becomes JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def changed(content: bytes, place: bytes, at: int, new: bytes, *, last: bool = False) -> bytes:
    """Content with some bytes replaced, at a distance from the first (or last) occurrence of others."""
    start = (content.rindex if last else content.index)(place) + at
    return content[:start] + new + content[start + len(new) :]


Maker = Callable[[], bytes]
