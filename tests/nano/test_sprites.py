"""Sprite folders: built from published archives, read back, and drawn into scenes under their own names."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minigpt4.errors import DataError
from nano.scenes.drawing import caption, draw_scene, questions
from nano.sprite_names import ALWAYS_TRAINED, NEAR_NAMES, SPRITE_NAMES, regular_plural
from nano.sprites import Sprites, build_sprites, is_held_out
from tests.nano.scene_checker import check, check_caption

pytest.importorskip("resvg_py", reason="vector drawings are rendered by resvg-py")

EMOJI = (
    {"label": "dog face", "hexcode": "1F436", "tags": ["pet"]},
    {"label": "red apple", "hexcode": "1F34E", "tags": ["fruit"]},
    {"label": "bus", "hexcode": "1F68C", "tags": ["vehicle"]},
    {"label": "tomato", "hexcode": "1F345", "tags": ["vegetable"]},
    {"label": "red heart", "hexcode": "2764-FE0F", "tags": ["love"]},
    {"label": "panda", "hexcode": "1F43C", "tags": ["bear"]},
    {"label": "grinning face", "hexcode": "1F600", "tags": []},
)
CODES = [str(entry["hexcode"]).lower().replace("-fe0f", "") for entry in EMOJI]


def pack(folder: Path, name: str, members: dict[str, bytes]) -> None:
    with tarfile.open(folder / name, "w:gz") as archive:
        for path, data in members.items():
            entry = tarfile.TarInfo(f"package/{path}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def disc(colour: str) -> bytes:
    picture = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(picture).ellipse((20, 60, 236, 196), fill=colour)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", lossless=True)
    return stream.getvalue()


def icons(colour: str) -> dict[str, bytes]:
    body = {"body": f'<rect x="4" y="8" width="28" height="14" fill="{colour}"/>'}
    table = {"width": 36, "height": 36, "icons": {f"i{code}": body for code in CODES[1:]}}
    named = {**table, "aliases": {f"i{CODES[0]}": {"parent": f"i{CODES[1]}"}}}
    characters = {code: f"i{code}" for code in CODES}
    return {"icons.json": json.dumps(named).encode(), "chars.json": json.dumps(characters).encode()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    pictures = {f"assets/{code}{'-fe0f' if code == '2764' else ''}.webp": disc("#e01020") for code in CODES}
    pack(folder, "lobehub-fluent-emoji-3d-1.0.0.tgz", pictures)
    pack(folder, "iconify-json-noto-1.0.0.tgz", icons("#1020f0"))
    pack(folder, "iconify-json-twemoji-1.0.0.tgz", icons("#806000"))
    pack(folder, "emojibase-data-1.0.0.tgz", {"en/data.json": json.dumps(EMOJI).encode()})
    return folder


@pytest.fixture(scope="module")
def folder(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sprites")
    assert build_sprites(archives, folder, side=96) == 6
    return folder


def test_drawings_carry_an_everyday_name_a_measured_colour_and_their_licence(folder: Path) -> None:
    concepts = {concept.kind: concept for concept in Sprites(folder, held_out=None).concepts}
    assert set(concepts) == {"dog", "apple", "bus", "tomato", "heart", "panda"}
    assert concepts["tomato"].plural == "tomatoes" and concepts["bus"].plural == "buses"
    assert concepts["dog"].category == "animal" and "pet" in concepts["dog"].tags
    drawings = {drawing.style: drawing for drawing in concepts["dog"].drawings}
    assert {style: drawing.licence for style, drawing in drawings.items()} == {
        "fluent-3d": "MIT",
        "noto": "Apache-2.0",
        "twemoji": "CC-BY-4.0",
    }
    assert drawings["fluent-3d"].colour == "red" and drawings["noto"].colour == "blue"


def test_a_shape_without_a_clear_colour_is_left_out(folder: Path) -> None:
    (heart,) = (concept for concept in Sprites(folder, held_out=None).concepts if concept.kind == "heart")
    assert {drawing.colour for drawing in heart.drawings} == {"red", "blue"}


def test_the_index_records_where_every_set_came_from(folder: Path) -> None:
    sources = json.loads((folder / "sprites.json").read_text(encoding="utf-8"))["sources"]
    assert [source["archive"] for source in sources] == [
        "lobehub-fluent-emoji-3d-1.0.0.tgz",
        "iconify-json-noto-1.0.0.tgz",
        "iconify-json-twemoji-1.0.0.tgz",
    ]
    assert all(len(source["sha256"]) == 64 and source["licence"] and source["credit"] for source in sources)


def test_drawings_fill_their_picture_and_keep_transparency(folder: Path) -> None:
    sprites = Sprites(folder)
    for concept in sprites.concepts:
        for drawing in concept.drawings:
            picture = sprites.picture(drawing)
            assert picture.mode == "RGBA" and max(picture.size) == 96
            assert picture.getchannel("A").getbbox() == (0, 0, *picture.size)


def test_training_never_meets_the_concepts_that_are_held_out(folder: Path) -> None:
    trained = {concept.kind for concept in Sprites(folder).concepts}
    assert {concept.kind for concept in Sprites(folder, held_out=True).concepts} == {"panda"}
    assert trained == {"dog", "apple", "bus", "tomato", "heart"}
    for seed in range(60):
        _, scene = draw_scene(np.random.default_rng(seed), Sprites(folder))
        assert "panda" not in {thing.kind for thing in scene.objects} | {kind for kind, _ in scene.absent}


def test_about_a_tenth_is_held_out_but_nothing_common() -> None:
    codes = [f"{code:x}" for code in range(0x1F300, 0x1F700)]
    assert 0.07 < sum(is_held_out("thing", code) for code in codes) / len(codes) < 0.13
    assert not any(is_held_out("dog", code) for code in codes)


def test_styles_can_be_chosen(folder: Path) -> None:
    sprites = Sprites(folder, styles=frozenset({"noto"}))
    assert {drawing.style for concept in sprites.concepts for drawing in concept.drawings} == {"noto"}
    with pytest.raises(DataError, match="no drawing"):
        Sprites(folder, styles=frozenset({"oil"}))


def test_scenes_with_sprites_are_described_truly(folder: Path) -> None:
    sprites = Sprites(folder)
    categories = set()
    for seed in range(250):
        rng = np.random.default_rng(seed)
        picture, scene = draw_scene(rng, sprites)
        assert picture.size == (224, 224)
        check_caption(scene, caption(scene))
        check_caption(scene, caption(scene, rng))
        for item in questions(scene, rng):
            check(scene, *item)
        categories |= {thing.category for thing in scene.objects}
    assert categories >= {"animal", "fruit", "vehicle", "food", "shape"}


def test_a_sprite_covers_its_recorded_box(folder: Path) -> None:
    sprites = Sprites(folder)
    checked = 0
    for seed in range(200):
        picture, scene = draw_scene(np.random.default_rng(seed), sprites)
        if scene.background != "white" or any(thing.category == "shape" for thing in scene.objects):
            continue
        seen = np.abs(np.asarray(picture).astype(int) - np.asarray(picture)[0, 0]).max(axis=-1) > 60
        for left, top, right, bottom in (thing.box for thing in scene.objects):
            rows, columns = np.nonzero(seen[top:bottom, left:right])
            # Half-transparent edge pixels may fall below the threshold of either side.
            assert rows.min() <= 2 and columns.min() <= 2
            assert rows.max() >= bottom - top - 3 and columns.max() >= right - left - 3
        for left, top, right, bottom in (thing.box for thing in scene.objects):
            seen[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = False
        assert not seen.any()
        checked += 1
    assert checked > 10


def test_a_missing_archive_is_named_with_its_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="emojibase-data") as error:
        build_sprites(tmp_path, tmp_path / "out")
    assert error.value.hint == "fetch it with: npm pack emojibase-data"


def test_a_damaged_archive_is_refused(archives: Path, tmp_path: Path) -> None:
    for archive in archives.iterdir():
        (tmp_path / archive.name).write_bytes(archive.read_bytes())
    (tmp_path / "iconify-json-noto-1.0.0.tgz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match=r"noto.*cannot be read as an archive"):
        build_sprites(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("index", [b"{", b'{"concepts": [{"kind": "dog"}]}', b"[]"])
def test_a_malformed_index_is_refused(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "sprites.json").write_bytes(index)
    with pytest.raises(DataError, match="not an index of sprites"):
        Sprites(tmp_path)


def test_a_missing_folder_or_picture_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        Sprites(tmp_path / "nowhere")
    (tmp_path / "sprites.json").write_bytes((folder / "sprites.json").read_bytes())
    with pytest.raises(DataError, match=r"\.webp cannot be read"):
        Sprites(tmp_path)


def test_names_are_short_lower_case_and_have_plurals() -> None:
    for name in SPRITE_NAMES.values():
        assert name.kind == name.kind.lower() or name.kind == "t-shirt"
        assert len(name.kind.split()) <= 4 and name.plural
    assert regular_plural("box") == "boxes" and regular_plural("butterfly") == "butterflies"
    assert regular_plural("monkey") == "monkeys"
    assert {"dog", "cat", "apple", "car"} <= ALWAYS_TRAINED


def test_names_that_are_near_each_other_exist() -> None:
    kinds = {name.kind for name in SPRITE_NAMES.values()} | {"ring", "crescent"}
    assert {name for group in NEAR_NAMES for name in group} <= kinds
