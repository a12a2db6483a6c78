"""A whole run: from a recipe over a folder of pictures to an alignment that answers, and on from there."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from safetensors.torch import load_file

import minigpt4
from minigpt4.errors import ConfigError, DataError, StorageError, WeightsError
from minigpt4.training.recipe import Recipe
from minigpt4.training.run import Reports, run
from minigpt4.weights.files.atomic import write_folder
from minigpt4.weights.folder import load_processor
from tests import tiny_chat
from tests.data.sources.source_files import samples, shard
from tests.training.whole_run import model_folder, pictures, recipe

__all__ = ["model_folder", "pictures"]  # fixtures

STAGE = {"name": "a", "steps": 1, "batch_size": 1, "learning_rate": 0.1}


def test_a_projection_is_trained_and_answers_over_its_model(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    folder = run(recipe(model_folder, pictures, tmp_path / "run"))

    assert {name for name in load_file(folder / "alignment.safetensors")} == {
        "language_projection.weight",
        "language_projection.bias",
    }
    model, processor = minigpt4.load(folder, device="cpu")
    base, _ = minigpt4.load(model_folder, device="cpu")
    changed = {
        n for (n, a), b in zip(model.named_parameters(), base.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed == {"model.language_projection.weight", "model.language_projection.bias"}
    chat = minigpt4.ChatSession(model, processor)
    chat.add_image(pictures / "red.png")
    assert isinstance(chat.ask("What is it?", max_new_tokens=5), str)


def test_a_second_stage_goes_on_from_the_first_ones_alignment(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    first = run(recipe(model_folder, pictures, tmp_path / "one", trainable=["language_projection", "query_tokens"]))

    second = run(recipe(first, pictures, tmp_path / "two"))

    description = json.loads((second / "alignment.json").read_text())
    assert description["frozen_parts"] == str(model_folder.resolve())
    one, two = (load_file(folder / "alignment.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    assert torch.equal(one["query_tokens"], two["query_tokens"])  # kept, though it did not learn any more
    assert not torch.equal(one["language_projection.weight"], two["language_projection.weight"])


def test_runs_one_after_another_over_composed_parts_can_be_moved_together(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """As where the first run's model is put together in its own folder, and its alignment names it from there."""
    first = run(recipe(model_folder, pictures, tmp_path / "runs/one"))
    model_folder.rename(tmp_path / "runs/one/model")
    description = json.loads((first / "alignment.json").read_text())
    content = (first / "alignment.safetensors").read_bytes()
    with write_folder(first, overwrite=True) as folder:
        (folder / "alignment.json").write_text(json.dumps({**description, "frozen_parts": "../model"}))
        (folder / "alignment.safetensors").write_bytes(content)

    second = run(recipe(first, pictures, tmp_path / "runs/two"))
    third = run(recipe(second, pictures, tmp_path / "runs/later/three"))

    assert json.loads((second / "alignment.json").read_text())["frozen_parts"] == "../../one/model"
    assert json.loads((third / "alignment.json").read_text())["frozen_parts"] == "../../../one/model"
    expected = [minigpt4.load(folder, device="cpu")[0].state_dict() for folder in (second, third)]
    (tmp_path / "runs/two").rename(tmp_path / "alone")
    minigpt4.load(tmp_path / "alone/alignment", device="cpu")  # moved by itself, it finds them where they were
    (tmp_path / "alone").rename(tmp_path / "runs/two")
    (tmp_path / "runs").rename(tmp_path / "moved")
    for name, tensors in zip(("two", "later/three"), expected, strict=True):
        moved = minigpt4.load(tmp_path / "moved" / name / "alignment", device="cpu")[0].state_dict()
        assert all(torch.equal(moved[key], tensor) for key, tensor in tensors.items())


def test_an_alignment_whose_model_is_gone_says_where_it_is_expected(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = run(recipe(model_folder, pictures, tmp_path / "run"))
    model_folder.rename(tmp_path / "elsewhere")

    for look in (minigpt4.load, load_processor):
        with pytest.raises(WeightsError, match=f"over the frozen parts of {model_folder}, which is not") as told:
            look(folder)
        assert told.value.hint == f"move that model along, to {model_folder}"


def test_adapters_are_part_of_the_alignment(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    trainable = ["language_projection", "lora"]
    said: list[str] = []
    wanted = recipe(model_folder, pictures, tmp_path / "run", trainable=trainable, lora={"rank": 2})
    folder = run(wanted, Reports(say=said.append))

    assert said[0].endswith("numbers learn, in language_projection, lora")
    stored = load_file(folder / "alignment.safetensors")
    assert any(".lora_B." in name and tensor.abs().sum() > 0 for name, tensor in stored.items())
    model, _ = minigpt4.load(folder, device="cpu")
    parameters = dict(model.model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in stored.items())
    again = run(recipe(folder, pictures, tmp_path / "again", trainable=trainable, lora={"rank": 2}))
    assert load_file(again / "alignment.safetensors").keys() == stored.keys()
    with pytest.raises(ConfigError, match=r"lora\.rank is 4, and .* has adapters with 2, which go on"):
        run(recipe(folder, pictures, tmp_path / "other", trainable=trainable, lora={"rank": 4}))


def test_norms_of_the_vision_encoder_can_learn(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    folder = run(recipe(model_folder, pictures, tmp_path / "run", trainable=["vision_layernorms"]))

    stored = load_file(folder / "alignment.safetensors")
    assert stored and all(name.startswith("vision_model.") for name in stored)
    assert all("norm" in name for name in stored)


def test_what_learns_and_how_long_texts_are_is_said_before(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    said: list[str] = []
    stages = [{"name": "short", "steps": 1, "batch_size": 6, "learning_rate": 1e-3, "max_text_tokens": 5}]
    run(recipe(model_folder, pictures, tmp_path / "run", stages=stages), Reports(say=said.append))

    assert said[0].endswith("numbers learn, in language_projection")
    assert said[-1] == f"curves: {tmp_path / 'run/metrics.png'}" and (tmp_path / "run/metrics.png").exists()
    assert said[1].startswith("stage short: answers of ")
    assert "WARNING: 50% lose their end, max_text_tokens is 5" in said[1]
    assert said[2].startswith("stage short: WARNING: the learning rate rises over 50 updates (warmup_steps)")


def test_examples_that_others_stood_in_for_are_told_of_at_the_end(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "red.png").write_bytes(b"nothing")
    said: list[str] = []
    run(recipe(model_folder, pictures, tmp_path / "run"), Reports(say=said.append))

    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    times = f"{len(lines)} time{'s' if len(lines) > 1 else ''}"
    assert lines and f"another example stood in for a bad one {times}: {tmp_path / 'run'}" in said[-2]


@pytest.mark.parametrize("features", ["compute", "cache"])
def test_an_example_longer_than_the_language_model_reads_is_a_bad_one(
    features: str, model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    asked = {"red.png": "what " * tiny_chat.CONTEXT, "green.png": "what?", "blue.png": "what?"}
    turns = {
        name: [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "it"}]
        for name, text in asked.items()
    }
    rows = [{"id": name, "image": name, "conversations": said} for name, said in turns.items()]
    (pictures / "conversations.json").write_text(json.dumps(rows))
    sources = [{"path": str(pictures / "conversations.json"), "images": str(pictures), "format": "conversations"}]
    changes = {
        "data": {"sources": sources, "crop": False},
        "validation": {"sources": sources, "batches": 1, "pictures": 0},
        "features": features,
        "max_bad_fraction": 1.0,
    }
    run(recipe(model_folder, pictures, tmp_path / "run", **changes))

    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert lines and all("the language model reads 1,024" in line["reason"] for line in lines)


def test_a_finished_run_is_not_trained_again(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    wanted = recipe(model_folder, pictures, tmp_path / "run")
    first = (run(wanted) / "alignment.safetensors").read_bytes()
    steps: list[object] = []
    said: list[str] = []

    assert (run(wanted, Reports(update=steps.append, say=said.append)) / "alignment.safetensors").read_bytes() == first
    assert steps == []
    output = tmp_path / "run"
    told = f"all updates of {output} were made before; to learn more, set another output, and {output}/alignment as the"
    assert f"{told} model" in said


def stopped_after_an_update(wanted: Recipe) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(wanted, Reports(lambda done: os.kill(os.getpid(), signal.SIGINT) if done.step == 1 else None))


def test_a_run_does_not_go_on_over_more_or_fewer_examples_unless_told_to(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    """The order is a function of their number: some would come twice, others never."""
    wanted, said = recipe(model_folder, pictures, tmp_path / "run"), list[str]()
    stopped_after_an_update(wanted)
    table = pictures / "captions.csv"
    whole = table.read_text()
    table.write_text(whole + "red.png,it is red again\n")

    with pytest.raises(ConfigError, match=r"pictures had 6 records when the run in .*run began, and now has 7"):
        run(wanted)
    run(wanted, Reports(say=said.append), force=True)
    assert any(sentence.startswith("goes on") for sentence in said)
    table.write_text(whole)
    run(wanted)  # it has ended and reads nothing any more


def test_what_a_source_passes_over_is_said_before(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    said: list[str] = []
    table = pictures / "captions.csv"
    header, *rows = table.read_text().splitlines()
    rows = [f"{row},{split}" for row, split in zip(rows, ["test", *["train"] * (len(rows) - 1)], strict=True)]
    table.write_text("\n".join([f"{header},split", *rows]))
    run(recipe(model_folder, pictures, tmp_path / "run"), Reports(say=said.append))

    assert said[0] == f"{pictures} passes over 1 x row of another split"


def test_a_run_goes_on_over_examples_that_were_mended_and_says_so(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    wanted, said = recipe(model_folder, pictures, tmp_path / "run"), list[str]()
    stopped_after_an_update(wanted)
    table = pictures / "captions.csv"
    table.write_text(table.read_text().replace("it is blue", "it is a deep blue"))

    run(wanted, Reports(say=said.append))

    assert f"{pictures} has other records than when the run began" in said


def test_a_run_that_has_made_more_updates_than_the_recipe_says_now_tells_so_and_ends(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    wanted, said = recipe(model_folder, pictures, tmp_path / "run"), list[str]()
    stopped_after_an_update(wanted)
    fewer = recipe(model_folder, pictures, tmp_path / "run", stages=[{**STAGE, "name": "only", "steps": 1}])

    assert (run(fewer, Reports(say=said.append), force=True) / "alignment.safetensors").exists()

    assert "goes on behind stage only: 2 updates of it were made, the recipe says 1" in said


def test_a_run_stopped_by_a_person_says_once_where_it_is_saved(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    reports = Reports(lambda done: os.kill(os.getpid(), signal.SIGINT) if done.step == 1 else None, say=said.append)
    with pytest.raises(KeyboardInterrupt, match=r"stopped and saved in .*run; the same command goes on"):
        run(recipe(model_folder, pictures, tmp_path / "run"), reports)
    assert not [sentence for sentence in said if "stopped and saved" in sentence]
    assert not [sentence for sentence in said if sentence.startswith("goes on")]

    run(recipe(model_folder, pictures, tmp_path / "run"), Reports(say=said.append))
    went_on = [sentence for sentence in said if sentence.startswith("goes on")]
    assert went_on == ["goes on after 2 of 4 updates of stage only"]


def test_gradient_checkpointing_changes_nothing(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    plain = run(recipe(model_folder, pictures, tmp_path / "plain"))
    frugal = run(recipe(model_folder, pictures, tmp_path / "frugal", gradient_checkpointing=True))

    one, two = (load_file(folder / "alignment.safetensors") for folder in (plain, frugal))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_joining_parts_can_begin_anew(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    stages = [{"name": "only", "steps": 1, "batch_size": 3, "learning_rate": 1e-9}]
    folder = run(recipe(model_folder, pictures, tmp_path / "run", joining_parts="new", stages=stages))

    weight = load_file(folder / "alignment.safetensors")["language_projection.weight"]
    trained, _ = minigpt4.load(model_folder, device="cpu")
    assert not torch.allclose(weight, trained.model.language_projection.weight, atol=1e-3)
    assert weight.std() == pytest.approx(trained.config.initializer_range, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": ["lora"], "lora": {"target_modules": ["no_such"]}}, "no modules for adapters"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    changes: dict[str, Any], words: str, model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(recipe(model_folder, pictures, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"sources": [{"path": "nowhere"}]}}, "nowhere does not exist"),
        ({"validation": {"sources": [{"path": "nowhere"}]}}, "nowhere does not exist"),
        ({"stages": [STAGE, {**STAGE, "name": "b", "data": {"sources": [{"path": "later"}]}}]}, "later does not exist"),
        ({"stages": [{**STAGE, "data": {"prompts": "nowhere.txt"}}]}, "cannot read the prompts nowhere.txt"),
        ({"report_to": ["tensorboard"]}, "tensorboard, which is not installed"),
        ({"trainable": ["lora"]}, "need peft"),
        ({"quantize": "int8"}, "needs bitsandbytes"),
    ],
)
def test_what_a_run_lacks_is_told_before_its_model_is_loaded(
    changes: dict[str, Any], words: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no model of that name, which would be told as soon as it is looked for."""
    if "installed" in words or "need" in words:
        monkeypatch.setattr("minigpt4.training.reports.find_spec", lambda _: None)
        monkeypatch.setattr("minigpt4.weights.alignment.find_spec", lambda _: None)
        monkeypatch.setattr("minigpt4.weights.folder.importlib.util.find_spec", lambda _: None)

    with pytest.raises((ConfigError, DataError), match=words):
        run(recipe(tmp_path / "no model", pictures, tmp_path / "new/run", **changes))
    assert not (tmp_path / "new").exists()


def test_a_start_that_is_refused_leaves_what_was_there_before(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mine/run"
    output.mkdir(parents=True)
    with pytest.raises(WeightsError, match="no model"):
        run(recipe(tmp_path / "no model", pictures, output, report_to=["tensorboard"]))
    assert list(output.iterdir()) == []

    (output / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="nowhere does not exist"):
        run(recipe(model_folder, tmp_path / "nowhere", output))
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_refused_start_leaves_an_earlier_run_as_it_was(model_folder: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(recipe(model_folder, pictures, output))
    there = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    (pictures / "captions.csv").rename(tmp_path / "captions.csv")
    with pytest.raises(DataError):
        run(recipe(model_folder, pictures, output))

    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == there


def test_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match="file/run"):
        run(recipe(tmp_path / "no model", pictures, tmp_path / "file/run"))


def test_a_tracker_that_is_not_logged_in_is_told_before_the_model_is_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    wandb.teardown()  # it reads the environment once

    with pytest.raises(ConfigError, match="Weights & Biases cannot be opened: No API key"):
        run(recipe(tmp_path / "no model", pictures, tmp_path / "run", report_to=["wandb"]))
    wandb.teardown()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["no captions", "no tar"])
def test_a_shard_that_gives_nothing_is_refused_before_the_model_is_loaded(fault: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(3):
        members = samples(4, first=4 * number)
        if number == 1:
            members = {name: content for name, content in members.items() if name.endswith(".jpg")}
        shard(tmp_path / f"train/{number}.tar", members)
    if fault == "no tar":
        (tmp_path / "train/1.tar").write_bytes(b"garbage" * 100)

    with pytest.raises(DataError, match=r"train: no sample of 1\.tar can be used$") as told:
        run(recipe(tmp_path / "no model", tmp_path / "train", tmp_path / "run"))

    assert told.value.hint.startswith(f"`minigpt4 data check {tmp_path / 'train'}`")


def test_shards_without_an_index_are_read_once_and_it_is_told(model_folder: Path, tmp_path: Path) -> None:
    for name in ("train", "look"):
        (tmp_path / name).mkdir()
        for number in range(2):
            shard(tmp_path / name / f"{number}.tar", samples(4, first=4 * number))
    told: list[tuple[str, int, int]] = []
    validation = {"sources": [{"path": str(tmp_path / "look")}], "every_steps": 2, "batches": 2, "pictures": 1}

    run(
        recipe(model_folder, tmp_path / "train", tmp_path / "run", validation=validation),
        Reports(sources=lambda *what: told.append(what)),
    )

    assert told == 2 * [("reading shards", 1, 2), ("reading shards", 2, 2)]
