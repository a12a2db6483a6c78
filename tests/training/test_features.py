"""Frozen parts look at each picture once, and training on what they saw is training on the pictures."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from minigpt4.data.batches import Process, SourceBatches
from minigpt4.data.examples import pixel_values
from minigpt4.data.record import Record
from minigpt4.errors import ConfigError, DataError, StorageError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training import feature_store, features
from minigpt4.training.feature_store import FeatureStore, Fingerprint, create_store
from minigpt4.training.features import CachedPictures, cached_pictures, compute_features, run_fingerprint, store_folder
from minigpt4.training.loop import train
from minigpt4.training.model_setup import Prepared
from minigpt4.training.objectives import TrainingStep
from minigpt4.training.processes import processes
from minigpt4.training.recipe import Recipe, SourcesData
from minigpt4.training.stage_data import RunSources, source_batches, stage_data
from minigpt4.weights.alignment import Origin
from tests import tiny_chat
from tests.model import tiny
from tests.training.toy import PowerFailureError, Watcher

PICTURES = 9
ROUNDING = 1e-5  # float32; the sums of a product depend on how many pictures it is of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return made_source(tmp_path / "source")


def made_source(folder: Path, *, first: int = 0, pictures: int = PICTURES) -> Path:
    """A folder of pictures with captions of different lengths; one more is a copy, and one is broken."""
    folder.mkdir()
    lines = ["file_name,caption"]
    for number in range(first, first + pictures):
        tiny_chat.picture(number).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'ab ' * (1 + number % 4)}{number}")
    shutil.copy(folder / f"{first}.png", folder / "copy.png")
    lines.append("copy.png,again")
    (folder / "bad.png").write_bytes((folder / f"{first}.png").read_bytes()[:60])
    lines.append("bad.png,nothing")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def recipe_of(output: Path, *sources: Path, **changes: Any) -> Recipe:
    stage = {"name": "only", "steps": 5, "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1, "bucket_batches": 2}
    stage |= {key: changes.pop(key) for key in list(changes) if key in ("steps", "batch_size", "bucket_batches")}
    values: dict[str, Any] = {
        "model": "tiny",
        "output": output,
        "data": {"sources": [{"path": str(source)} for source in sources], "crop": False},
        "stages": [stage],
        "precision": "fp32",
        "workers": 0,
        "features": "cache",
        "max_bad_fraction": 1.0,
    }
    return Recipe.model_validate({**values, **changes})


def prepared(*trainable: str, vision: str = "blip_2_vision_model", qformer: bool = True) -> Prepared:
    """A tiny random model in which some parts learn; the projection, where none is named."""
    if qformer:
        model = tiny_chat.model(vision=vision)
    else:
        words = len(tiny_chat.tokenizer())
        model = tiny.model(qformer=False, vision=vision)
        model.resize_token_embeddings(words)
        model.config.image_token_id = tiny_chat.processor().image_token_id
    model.config.trainable_parts = list(trainable or ("language_projection",))
    model.freeze()
    processor = tiny_chat.processor()
    processor.num_image_tokens = model.config.num_image_tokens
    return Prepared(model, processor, Origin("tiny"))


def cached(recipe: Recipe, made: Prepared) -> CachedPictures:
    return cached_pictures(recipe, made, processes())


def batches(recipe: Recipe, made: Prepared, kept: CachedPictures | None = None) -> SourceBatches:
    data = recipe.data_of(recipe.stages[0])
    assert isinstance(data, SourcesData)
    return source_batches(recipe, made.processor, 0, recipe.stages[0], data, Process(), kept)


def store_of(recipe: Recipe, made: Prepared) -> FeatureStore:
    fingerprint = run_fingerprint(recipe, made, processes())
    return FeatureStore(store_folder(fingerprint), fingerprint)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were computed, call by call."""
    counted: list[int] = []
    make = features.make_features

    def counting(
        model: MiniGPT4ForConditionalGeneration, pixels: torch.Tensor, fingerprint: Fingerprint
    ) -> dict[str, torch.Tensor]:
        counted.append(len(pixels))
        return make(model, pixels, fingerprint)

    monkeypatch.setattr(features, "make_features", counting)
    return counted


def forbid(monkeypatch: pytest.MonkeyPatch, model: MiniGPT4ForConditionalGeneration, *parts: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a frozen part was run")

    for part in parts:
        monkeypatch.setattr(getattr(model.model, part), "forward", refuse)


def loss_and_gradients(made: Prepared, batch: dict[str, Any]) -> list[torch.Tensor]:
    made.model.train(False)  # dropout aside
    learning = [p for p in made.model.parameters() if p.requires_grad]
    loss = TrainingStep(made.model)(batch).loss
    return [loss.detach(), *torch.autograd.grad(loss, learning)]


KINDS = [
    (("language_projection",), "blip_2_vision_model", True, "qformer_outputs"),
    (("language_projection",), "efficientnet_lite", True, "qformer_outputs"),
    (("language_projection",), "blip_2_vision_model", False, "qformer_outputs"),
    (("language_projection", "query_tokens"), "efficientnet_lite", True, "vision_outputs"),
    (("language_projection", "qformer"), "blip_2_vision_model", True, "vision_outputs"),
]


@pytest.mark.parametrize(("trainable", "vision", "qformer", "kind"), KINDS)
def test_loss_and_gradients_are_those_of_the_pictures(
    trainable: tuple[str, ...], vision: str, qformer: bool, kind: str, source: Path, tmp_path: Path
) -> None:
    made = prepared(*trainable, vision=vision, qformer=qformer)
    recipe = recipe_of(tmp_path / "run", source)
    seen, kept = batches(recipe, made), batches(recipe, made, cached(recipe, made))
    for item in range(len(seen)):
        batch = kept[item]
        assert kind in batch and "pixel_values" not in batch
        for got, expected in zip(loss_and_gradients(made, batch), loss_and_gradients(made, seen[item]), strict=True):
            torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("trainable", ["language_projection", "query_tokens"])
def test_one_picture_at_a_time_gives_the_same_bits(trainable: str, source: Path, tmp_path: Path) -> None:
    made = prepared(trainable)
    recipe = recipe_of(tmp_path / "run", source, batch_size=1)
    seen, kept = batches(recipe, made), batches(recipe, made, cached(recipe, made))
    for item in range(len(seen)):
        for got, expected in zip(
            loss_and_gradients(made, kept[item]), loss_and_gradients(made, seen[item]), strict=True
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("trainable", "unused"),
    [("language_projection", ("vision_model", "qformer")), ("qformer", ("vision_model",))],
)
def test_training_runs_no_part_that_is_cached(
    trainable: str, unused: tuple[str, ...], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(trainable)
    recipe = recipe_of(tmp_path, source)
    kept = cached(recipe, made)
    forbid(monkeypatch, made.model, *unused)
    watcher = Watcher()
    train(recipe, made.model, stage_data(recipe, made, processes(), kept), watcher, processes())
    assert [progress.images for progress in watcher.steps] == [4] * 5


def test_bf16_keeps_half_the_bytes_and_the_same_bits(source: Path, tmp_path: Path) -> None:
    made = prepared()
    recipe = recipe_of(tmp_path / "run", source, precision="bf16", batch_size=1)
    seen, kept = batches(recipe, made), batches(recipe, made, cached(recipe, made))
    for item in range(len(seen)):
        batch = kept[item]
        assert batch["qformer_outputs"].dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(TrainingStep(made.model)(batch).loss, TrainingStep(made.model)(seen[item]).loss)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_picture_is_looked_at_once_by_all_runs(
    workers: int, source: Path, tmp_path: Path, looks: list[int]
) -> None:
    made = prepared()
    cached(recipe_of(tmp_path / "first", source, workers=workers), made)
    assert sum(looks) == PICTURES  # of eleven records one is a copy, and one is bad
    cached(recipe_of(tmp_path / "second", source, batch_size=3, steps=30), made)
    assert sum(looks) == PICTURES
    other = made_source(tmp_path / "other", first=PICTURES - 2)
    cached(recipe_of(tmp_path / "third", source, other, steps=12), made)
    assert sum(looks) == 2 * PICTURES - 2  # they have two in common


def test_what_a_run_does_not_reach_is_not_computed(source: Path, tmp_path: Path, looks: list[int]) -> None:
    cached(recipe_of(tmp_path / "run", source, steps=1, batch_size=3, bucket_batches=1), prepared())
    assert 0 < sum(looks) <= 3


def test_a_known_picture_is_not_opened(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def opening(record: Record, *arguments: Any) -> torch.Tensor:
        opened.append(record.key)
        return pixel_values(record, *arguments)

    monkeypatch.setattr(features, "pixel_values", opening)
    shutil.copy(source / "0.png", source / "1.png")
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    compute_features(recipe, made, processes(), lambda *_: None)
    assert len(set(opened)) == PICTURES  # the broken one as well, the copies not
    assert all(opened.count(key) == 1 for key in opened if key != "bad.png")
    opened.clear()
    compute_features(recipe, made, processes(), lambda *_: None)
    assert set(opened) == {"bad.png"}


def test_what_stands_in_for_bad_pictures_is_computed(tmp_path: Path, looks: list[int]) -> None:
    source = made_source(tmp_path / "source", pictures=40)
    for number in range(0, 40, 2):
        (source / f"{number}.png").write_bytes(b"no picture")
    made, recipe = prepared(), recipe_of(tmp_path / "run", source, steps=3, bucket_batches=1)
    seen, kept = batches(recipe, made), batches(recipe, made, cached(recipe, made))
    assert sum(len(seen[item]["bad"]) for item in range(3)) > 3
    assert [kept[item]["keys"] for item in range(3)] == [seen[item]["keys"] for item in range(3)]
    assert sum(looks) <= 12


def test_what_stands_in_for_a_picture_with_one_bad_text_among_several_is_computed(tmp_path: Path) -> None:
    """The second text of every other picture has no words once it is cleaned."""
    source = made_source(tmp_path / "source", pictures=40)
    rows = [(f"{number}.png", text) for number in range(40) for text in ("a", "..." if number % 2 else "b")]
    (source / "captions.csv").write_text("file_name,caption\n" + "".join(f"{name},{text}\n" for name, text in rows))
    listed = {"path": str(source), "captions": "blip", "texts_per_picture": 2}
    made = prepared()
    recipe = recipe_of(tmp_path / "run", steps=3, bucket_batches=1, data={"sources": [listed], "crop": False})
    seen, kept = batches(recipe, made), batches(recipe, made, cached(recipe, made))
    assert sum(len(seen[item]["bad"]) for item in range(3)) > 3
    assert [kept[item]["keys"] for item in range(3)] == [seen[item]["keys"] for item in range(3)]


def test_the_order_of_a_long_stage_is_reported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "REPORT_EVERY", 10)
    told: list[tuple[str, int, int]] = []
    opened = RunSources(lambda *line: told.append(line))
    compute_features(recipe_of(tmp_path / "run", source), prepared(), processes(), lambda *_: None, opened)
    assert told[:3] == [("which records only reads", done, 24) for done in (10, 20, 24)]


def test_a_finished_work_is_not_read_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    cached(recipe, made)
    monkeypatch.setattr(features, "read_ahead", lambda *_: pytest.fail("the source was read"))
    assert len(cached(recipe, made).store) == PICTURES


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
def test_batches_name_the_same_examples_and_the_same_bad_ones(workers: int, source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "bad.png", source / "1.png")
    (source / "2.png").write_bytes(b"no picture")
    made = prepared("query_tokens", vision="efficientnet_lite")
    recipe = recipe_of(tmp_path / "run", source, steps=8, workers=workers)
    kept = batches(recipe, made, cached(recipe, made))
    expected = [batches(recipe, made)[item] for item in range(8)]
    found = list(DataLoader(kept, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers))
    assert any(batch["bad"] for batch in expected)
    for got, want in zip(found, expected, strict=True):
        assert (got["keys"], got["bad"], got["groups"]) == (want["keys"], want["bad"], want["groups"])
        assert torch.equal(got["input_ids"], want["input_ids"])
        alone = [made.model.model.vision_model(pixels[None]).last_hidden_state for pixels in want["pixel_values"]]
        assert torch.equal(got["vision_outputs"].last_hidden_state, torch.cat(alone))


def test_a_resumed_run_ends_with_the_same_bits(source: Path, tmp_path: Path) -> None:
    def trained(output: Path, *stops: int | None) -> dict[str, torch.Tensor]:
        output.mkdir()
        for stop in stops:
            made = prepared("language_projection", "qformer")
            recipe = recipe_of(output, source, checkpoint_steps=2)
            watcher = Watcher(stop_after=stop)
            kept = cached(recipe, made)
            try:
                train(recipe, made.model, stage_data(recipe, made, processes(), kept), watcher, processes())
            except PowerFailureError:
                continue
        return {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}

    whole, resumed = trained(tmp_path / "whole", None), trained(tmp_path / "torn", 3, None)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def killed(work: Callable[[], None]) -> None:
    """Do something in a process of its own, which shall be killed by it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def shards(folder: Path) -> dict[str, dict[str, bytes]]:
    return {
        path.name: {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
        for path in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize(("where", "name"), [(feature_store, "save"), (os, "replace")])
@pytest.mark.parametrize("calls", [2, 4])
def test_a_kill_loses_at_most_one_shard(
    where: ModuleType,
    name: str,
    calls: int,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    looks: list[int],
) -> None:
    monkeypatch.setattr(feature_store, "SHARD_PICTURES", 2)
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "whole"))
    expected = shards(cached(recipe, made).store.folder)
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "torn"))

    def die() -> None:
        real, left = getattr(where, name), calls

        def dying(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(where, name, dying)
        cached(recipe, made)

    killed(die)
    before = shards(store_of(recipe, made).folder)
    assert len(before) == calls - (2 if name == "replace" else 1)  # the first file that is put in place is no shard
    assert before.items() <= expected.items()
    looks.clear()
    assert shards(cached(recipe, made).store.folder) == expected
    assert sum(looks) <= PICTURES - 2 * len(before) + 1  # the bad picture may be in any of them


def test_anew_looks_through_everything_again(source: Path, tmp_path: Path, looks: list[int]) -> None:
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    _, counts = compute_features(recipe, made, processes(), lambda *_: None)
    assert (counts.computed, counts.known, counts.bad) == (PICTURES, 1, 1)
    looks.clear()
    _, counts = compute_features(recipe, made, processes(), lambda *_: None)
    assert (counts.computed, counts.known, counts.bad, looks) == (0, PICTURES + 1, 1, [])


def test_a_picture_that_was_not_looked_at_is_told_with_the_cure(source: Path, tmp_path: Path) -> None:
    store = cached(recipe_of(tmp_path / "run", source), prepared()).store
    with pytest.raises(StorageError, match=r"sha256 0{16}\.\.\.\) are not in") as caught:
        store.read(bytes(32))
    assert "minigpt4 data features" in caught.value.hint


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("told", ["by Pillow", "by torch"])
def test_a_picture_there_was_no_memory_for_is_not_bad_and_is_computed_later(
    told: str, workers: int, source: Path, tmp_path: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "CHUNK", 1)
    made, recipe = prepared(), recipe_of(tmp_path / "run", source, workers=workers)

    def no_memory(record: Record, *arguments: Any) -> torch.Tensor:
        if not record.key.startswith("5"):
            return pixel_values(record, *arguments)
        if told == "by torch":
            return torch.empty(2**60, dtype=torch.uint8)
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "load", lambda _: bytearray(2**62))
            return pixel_values(record, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(features, "pixel_values", no_memory)
        with pytest.raises(DataError, match=rf"not enough memory for record \d+ of {source}$") as caught:
            cached(recipe, made)
    assert "the same command goes on" in caught.value.hint
    before = store_of(recipe, made)
    assert len(before) == sum(looks) == 5
    assert len(cached(recipe, made).store) == PICTURES == sum(looks)


def test_what_a_removed_shard_held_is_computed_again(
    source: Path, tmp_path: Path, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "SHARD_PICTURES", 4)
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    folder = cached(recipe, made).store.folder
    expected = shards(folder)
    removed = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    removed.unlink()
    looks.clear()
    assert len(cached(recipe, made).store) == PICTURES
    assert sum(looks) == len(expected[removed.name]["digests"]) // 32 < PICTURES
    looks.clear()
    assert len(cached(recipe, made).store) == PICTURES
    assert looks == []


def test_every_bit_that_flips_is_noticed(tmp_path: Path) -> None:
    rows = {"b": torch.arange(8.0).view(2, 4), "a": torch.zeros(2, 3, 2, dtype=torch.bfloat16)}
    writer = feature_store.ShardWriter(tmp_path)
    writer.add([b"\1" * 32, b"\2" * 32], rows)
    writer.write()
    [shard] = tmp_path.glob("*.safetensors")
    whole = shard.read_bytes()
    for place in range(len(whole)):
        damaged(shard, place)
        list(feature_store.remove_damaged(tmp_path, thorough=True))
        assert not shard.exists(), place
        shard.write_bytes(whole)
    list(feature_store.remove_damaged(tmp_path, thorough=True))
    assert shard.exists()


def damaged(shard: Path, place: int) -> None:
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)


def test_a_shard_that_cannot_be_opened_is_computed_again_with_a_notice(
    source: Path, tmp_path: Path, looks: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    folder = cached(recipe, made).store.folder
    expected = shards(folder)
    [shard] = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StorageError, match=rf"{shard.name} is damaged"):
        store_of(recipe, made)
    looks.clear()
    assert shards(cached(recipe, made).store.folder) == expected
    assert sum(looks) == PICTURES
    assert caplog.messages == [f"{shard} is damaged, and what it held is computed again"]


def test_a_damaged_picture_is_noticed_when_it_is_read_and_no_other(source: Path, tmp_path: Path) -> None:
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    store = cached(recipe, made).store
    [shard] = store.folder.glob("*.safetensors")
    digests = load_file(shard)["digests"].numpy()
    content = shard.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    damaged(shard, header_end + json.loads(content[8:header_end])["qformer_outputs"]["data_offsets"][0])
    with pytest.raises(StorageError, match=rf"{shard.name} is damaged"):
        store.read(digests[0].tobytes())
    for digest in digests[1:]:
        store.read(digest.tobytes())
    shard.unlink()
    with pytest.raises(StorageError, match=rf"{shard.name} is gone"):
        store.read(digests[1].tobytes())


def scaled(made: Prepared, name: str) -> Prepared:
    with torch.no_grad():
        dict(made.model.model.named_parameters())[name].mul_(1.5)
    return made


CHANGED: list[tuple[str, Callable[[], Prepared], dict[str, Any]]] = [
    ("weights", lambda: scaled(prepared(), "vision_model.post_layernorm.bias"), {}),
    ("weights", lambda: scaled(prepared(), "query_tokens"), {}),
    ("weights", lambda: scaled(prepared(), "qformer.layernorm.weight"), {}),
    ("kind", lambda: prepared("qformer"), {}),
    ("precision", prepared, {"precision": "bf16"}),
]


@pytest.mark.parametrize(("what", "other", "changes"), CHANGED)
def test_features_of_another_model_are_refused_with_both_named(
    what: str, other: Callable[[], Prepared], changes: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    first = run_fingerprint(recipe_of(tmp_path / "run", source), prepared(), processes())
    second = run_fingerprint(recipe_of(tmp_path / "run", source, **changes), other(), processes())
    create_store(tmp_path / "store", first)
    before, now = (str(one.as_dict()[what])[:16] for one in (first, second))
    with pytest.raises(ConfigError, match=rf"{what} {before}, here {now}"):
        FeatureStore(tmp_path / "store", second)
    with pytest.raises(ConfigError, match="were made by something else"):
        create_store(tmp_path / "store", second)
    assert store_folder(first) != store_folder(second)


def test_features_of_another_preprocessing_are_refused(source: Path, tmp_path: Path) -> None:
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    create_store(tmp_path / "store", run_fingerprint(recipe, made, processes()))
    made.processor.image_processor.image_mean = (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r'preprocessing .*0\.48145.*, here .*"image_mean": \[0\.5, 0\.5, 0\.5\]'):
        FeatureStore(tmp_path / "store", run_fingerprint(recipe, made, processes()))


def test_what_learns_is_no_part_of_the_fingerprint(source: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "run", source)
    for trainable, name in [("language_projection", "language_projection.weight"), ("qformer", "query_tokens")]:
        before = run_fingerprint(recipe, prepared(trainable), processes())
        assert run_fingerprint(recipe, scaled(prepared(trainable), name), processes()) == before


def test_a_saved_model_has_the_same_fingerprint(source: Path, tmp_path: Path) -> None:
    made, recipe = prepared(), recipe_of(tmp_path / "run", source)
    made.model.save_pretrained(tmp_path / "model")
    made.processor.save_pretrained(tmp_path / "model")
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = type(made.processor).from_pretrained(tmp_path / "model")
    again = run_fingerprint(recipe, Prepared(model, processor, made.origin), processes())
    assert again == run_fingerprint(recipe, made, processes())


def test_what_changes_every_time_is_refused(source: Path, tmp_path: Path) -> None:
    made = prepared()
    for data in ({"sources": [{"path": str(source)}], "crop": True}, None):
        recipe = recipe_of(tmp_path / "run", data=data)
        with pytest.raises(ConfigError, match=r"stage only crops it anew each time|the recipe has none"):
            cached(recipe, made)
    for norm in (m for m in made.model.model.vision_model.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.requires_grad_(True)
    with pytest.raises(ConfigError, match="the vision encoder learns"):
        cached(recipe_of(tmp_path / "run", source), made)
