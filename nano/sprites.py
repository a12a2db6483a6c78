"""Named cut-out drawings (emoji of several artists) that scenes are composed of: building the folder and reading it.

A sprite folder holds `sprites.json` and one WebP picture with transparency per drawing. Knows nothing of scenes.
"""

import hashlib
import importlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minigpt4.errors import DataError
from nano.scenes.colours import dominant_colour
from nano.sprite_names import ALWAYS_TRAINED, SPRITE_NAMES

INDEX = "sprites.json"


@dataclass(frozen=True)
class Drawing:
    """One artist's picture of a concept.

    Args:
        style: Name of the set it comes from.
        file: Name of its picture inside the folder.
        colour: The one colour word that clearly dominates its pixels, or None.
        licence: SPDX name of its licence.
    """

    style: str
    file: str
    colour: str | None
    licence: str


@dataclass(frozen=True)
class Concept:
    """A thing with an everyday name and one or more drawings.

    Args:
        hexcode: Its Unicode code points, `-` between them.
        kind: Name in the singular.
        plural: Name in the plural.
        category: `"animal"`, `"fruit"`, ... or `"object"`.
        tags: Other words for it or about it.
        held_out: Whether it is kept from training, to test unseen things.
        drawings: Its pictures.
    """

    hexcode: str
    kind: str
    plural: str
    category: str
    tags: frozenset[str]
    held_out: bool
    drawings: tuple[Drawing, ...]


def is_held_out(kind: str, hexcode: str) -> bool:
    """Whether a concept is among the tenth kept from training: by its code points, the commonest names excepted."""
    return kind not in ALWAYS_TRAINED and int(hashlib.sha1(hexcode.encode()).hexdigest(), 16) % 10 == 1


class Sprites:
    """The drawings of a folder, kept in memory in compressed form.

    Args:
        folder: A folder written by `build_sprites`.
        held_out: True reads only the concepts kept from training, False only the others, None all.
        styles: Only drawings of these styles; None for all.

    Raises:
        DataError: If the folder, its index or a picture is missing or malformed, or no drawing remains.
    """

    def __init__(self, folder: Path, held_out: bool | None = False, styles: frozenset[str] | None = None) -> None:
        self._pictures: dict[str, bytes] = {}
        concepts = []
        for concept in _read_index(folder):
            drawings = tuple(drawing for drawing in concept.drawings if styles is None or drawing.style in styles)
            if held_out in (None, concept.held_out) and drawings:
                concepts.append(replace(concept, drawings=drawings))
                for drawing in drawings:
                    self._pictures[drawing.file] = _read_bytes(folder / drawing.file)
        if not concepts:
            raise DataError(f"no drawing in {folder} fits the wanted styles and split", "check the names of the styles")
        self.concepts: tuple[Concept, ...] = tuple(concepts)

    def picture(self, drawing: Drawing) -> Image.Image:
        """Decode one drawing as RGBA."""
        return Image.open(io.BytesIO(self._pictures[drawing.file])).convert("RGBA")

    def sample(self, rng: np.random.Generator, count: int) -> list[Concept]:
        """Draw `count` different concepts, every one equally likely."""
        chosen = rng.choice(len(self.concepts), size=min(count, len(self.concepts)), replace=False)
        return [self.concepts[int(index)] for index in chosen]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "build the sprite folder again") from error


def _read_index(folder: Path) -> list[Concept]:
    raw = _read_bytes(folder / INDEX)
    try:
        rows = json.loads(raw)["concepts"]
        return [
            Concept(
                hexcode=row["hexcode"],
                kind=row["kind"],
                plural=row["plural"],
                category=row["category"],
                tags=frozenset(row["tags"]),
                held_out=row["held_out"],
                drawings=tuple(Drawing(**drawing) for drawing in row["drawings"]),
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / INDEX} is not an index of sprites: {error}", "build the folder again") from error


@dataclass(frozen=True)
class _Source:
    """A published set of drawings: the archive's name pattern, licence, and whom to credit."""

    style: str
    archive: str
    licence: str
    credit: str


_SOURCES = (
    _Source("fluent-3d", "lobehub-fluent-emoji-3d-*.tgz", "MIT", "Microsoft Fluent Emoji, packaged by LobeHub"),
    _Source("noto", "iconify-json-noto-*.tgz", "Apache-2.0", "Noto Emoji, Google Inc"),
    _Source("twemoji", "iconify-json-twemoji-*.tgz", "CC-BY-4.0", "Twemoji, Twitter, Inc and other contributors"),
)
_GOLD = 0.55
_NAMES_ARCHIVE = "emojibase-data-*.tgz"


def build_sprites(source_dir: Path, out_dir: Path, side: int = 128) -> int:
    """Render every named emoji of the published sets into a sprite folder.

    Args:
        source_dir: Where the archives lie as `npm pack` writes them: `@lobehub/fluent-emoji-3d`, `@iconify-json/noto`,
            `@iconify-json/twemoji` and `emojibase-data`.
        out_dir: Folder to write, created when missing.
        side: Longest side of a drawing in pixels.

    Returns:
        The number of concepts written.

    Raises:
        DataError: If an archive is missing or does not hold what it should.
    """
    emoji = json.loads(_member(_archive(source_dir, _NAMES_ARCHIVE), "package/en/data.json"))
    readers = [(source, _reader(source, _archive(source_dir, source.archive), side)) for source in _SOURCES]
    out_dir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for entry in emoji:
        name = SPRITE_NAMES.get(entry["label"])
        if name is None:
            continue
        hexcode = entry["hexcode"].lower().replace("-fe0f", "")
        row = rows.setdefault(
            name.kind,
            {
                "hexcode": hexcode,
                "kind": name.kind,
                "plural": name.plural,
                "category": name.category,
                "tags": [],
                "held_out": is_held_out(name.kind, hexcode),
                "drawings": [],
            },
        )
        row["tags"] = sorted({*row["tags"], *entry.get("tags", ()), *entry["label"].lower().split()})
        for source, read in readers:
            picture = read(hexcode)
            if picture is not None:
                row["drawings"] += _write(picture, source, hexcode, name.category, out_dir)
    concepts = [row for row in rows.values() if row["drawings"]]
    sources = [
        {**vars(source), "archive": _archive(source_dir, source.archive).name, "sha256": _digest(source_dir, source)}
        for source in _SOURCES
    ]
    index = {"sources": sources, "names": "emojibase-data (MIT)", "concepts": concepts}
    (out_dir / INDEX).write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
    return len(concepts)


def _write(
    picture: Image.Image, source: _Source, hexcode: str, category: str, out_dir: Path
) -> list[dict[str, str | None]]:
    """Store one drawing and describe it; a shape without one clear colour is left out."""
    pixels = np.asarray(picture)
    colour = _clear_colour(pixels[pixels[..., 3] > 200][:, :3])
    if category == "shape" and colour is None:
        return []
    file = f"{source.style}-{hexcode}.webp"
    picture.save(out_dir / file, "WEBP", quality=92, method=4)
    return [{"style": source.style, "file": file, "colour": colour, "licence": source.licence}]


def _clear_colour(pixels: NDArray[np.uint8]) -> str | None:
    """The dominant colour word; None for the gold of coins and keys, which some call orange and some yellow."""
    word = dominant_colour(pixels)
    if word == "orange":
        red, green, blue = np.median(pixels, axis=0)
        return None if green - blue > _GOLD * (red - blue) else word
    return word


def _archive(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise DataError(
            f"{folder} holds {len(found)} files named {pattern}, expected one",
            f"fetch it with: npm pack {_package(pattern)}",
        )
    return found[0]


def _package(pattern: str) -> str:
    stem = pattern.removesuffix("-*.tgz")
    for scope in ("lobehub", "iconify-json"):
        if stem.startswith(f"{scope}-"):
            return f"@{scope}/{stem.removeprefix(f'{scope}-')}"
    return stem


def _digest(folder: Path, source: _Source) -> str:
    return hashlib.sha256(_archive(folder, source.archive).read_bytes()).hexdigest()


def _member(archive: Path, name: str) -> bytes:
    members = _members(archive, lambda path: path == name)
    if name not in members:
        raise DataError(f"{archive} holds no {name}", "fetch the archive again")
    return members[name]


def _members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    try:
        with tarfile.open(archive, "r:gz") as opened:
            found = {}
            for member in opened:
                stream = opened.extractfile(member) if member.isfile() and wanted(member.name) else None
                if stream is not None:
                    found[member.name] = stream.read()
            return found
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{archive} cannot be read as an archive: {error}", "fetch it again") from error


def _reader(source: _Source, archive: Path, side: int) -> Callable[[str], Image.Image | None]:
    """Return a function from code points to the drawing, scaled, or None where the set has none."""
    if source.style == "fluent-3d":
        raw = _members(archive, lambda path: path.startswith("package/assets/") and path.endswith(".webp"))
        files = {Path(name).stem.lower().replace("-fe0f", ""): data for name, data in raw.items()}
        return lambda code: _scaled(files[code], side) if code in files else None
    icons = json.loads(_member(archive, "package/icons.json"))
    names = json.loads(_member(archive, "package/chars.json"))
    return lambda code: _rendered(icons, names[code], side) if code in names else None


def _scaled(data: bytes, side: int) -> Image.Image:
    """Crop to the visible pixels and bring the longer side to `side`."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = side / max(picture.size)
    width, height = (max(1, round(extent * scale)) for extent in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _rendered(icons: dict[str, Any], name: str, side: int) -> Image.Image:
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    resvg = _resvg()
    return _scaled(bytes(resvg.svg_to_bytes(svg_string=svg, width=2 * side, height=2 * side)), side)


def _resvg() -> ModuleType:
    try:
        return importlib.import_module("resvg_py")
    except ImportError as error:
        raise DataError("rendering vector drawings needs resvg-py", "pip install resvg-py") from error
