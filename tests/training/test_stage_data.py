"""A recipe's sections become batches as they say: whole batches of one source, one prompt a batch, cleaned captions."""

from pathlib import Path
from typing import Any

import pytest

from minigpt4.data.batches import Process, SourceBatches
from minigpt4.errors import ConfigError
from minigpt4.training.recipe import SourcesData, make_recipe
from minigpt4.training.stage_data import source_batches
from tests import tiny_chat

PROMPTS = ["<Img><ImageHere></Img> First?", "<Img><ImageHere></Img> Second?"]
SHARES = {"a": 3, "b": 1}
ITEMS = 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in SHARES:
        (tmp_path / name).mkdir()
        for number in range(5):
            tiny_chat.picture(number).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text(f"It is {name}! And more.")
    return tmp_path


def batches(folder: Path, process: Process | None = None, **stage: Any) -> SourceBatches:
    """The batches of a stage over two sources."""
    content = {
        "model": "unused",
        "output": "unused",
        "data": {
            "sources": [
                {"path": str(folder / name), "share": share, "captions": "blip"} for name, share in SHARES.items()
            ],
            "prompts": PROMPTS,
            "crop": False,
        },
        "stages": [{"name": "only", "steps": ITEMS, "batch_size": 4, "learning_rate": 1.0, **stage}],
    }
    recipe = make_recipe(content, Path("made up"))
    data = recipe.data_of(recipe.stages[0])
    assert isinstance(data, SourcesData)
    return source_batches(recipe, tiny_chat.processor(), 0, recipe.stages[0], data, process or Process())


def source_of(data: SourceBatches, item: int) -> set[int]:
    return {data.order.pick(place)[0] for place in data._places(item)}


def test_a_sources_captions_are_cut_and_begun_as_it_says(folder: Path) -> None:
    first = {"path": str(folder / "a"), "captions": "blip", "max_words": 2, "caption_prompt": "a photo: "}
    second = {"path": str(folder / "b"), "captions": "blip"}
    data = batches(folder, data={"sources": [first, second]})
    said = {data.record(source, 0).turns[0][1] for source in (0, 1)}
    assert said == {"a photo: it is", "it is b and more"}


def test_whole_batches_come_from_one_source_the_same_in_all_processes(folder: Path) -> None:
    ranks = [batches(folder, Process(rank, 2), mix="batches", bucket_batches=1) for rank in range(2)]
    drawn = [[source_of(data, item) for item in range(ITEMS)] for data in ranks]
    assert drawn[0] == drawn[1]
    assert all(len(sources) == 1 for sources in drawn[0])
    of_the_first = sum(sources == {0} for sources in drawn[0])
    assert of_the_first == pytest.approx(ITEMS * 3 / 4, abs=ITEMS / 8)


def test_prompts_that_cannot_be_read_are_told_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"D\xe9cris.\n")
    for name, reason in (("gone.txt", r"gone\.txt: No such file"), ("latin.txt", r"latin\.txt are no text in UTF-8$")):
        with pytest.raises(ConfigError, match=reason):
            batches(folder, data={"sources": [{"path": str(folder / "a")}], "prompts": str(tmp_path / name)})


def test_a_file_of_prompts_as_windows_writes_it_is_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfWhat is it?\r\n\r\nDescribe it.\r\n")
    sources = {"sources": [{"path": str(folder / "a")}], "prompts": str(tmp_path / "prompts.txt")}

    assert batches(folder, data=sources).prompts == ["What is it?", "Describe it."]


def test_samples_are_mixed_within_a_batch_elsewhere(folder: Path) -> None:
    data = batches(folder)
    assert any(len(source_of(data, item)) == 2 for item in range(10))


@pytest.mark.parametrize(("prompt_for", "kinds"), [("batch", {1}), ("sample", {1, 2})])
def test_a_prompt_is_drawn_for_a_batch_or_for_each_sample(prompt_for: str, kinds: set[int], folder: Path) -> None:
    data = batches(folder, prompt_for=prompt_for, layout="original", bucket_batches=1)
    decode = data.layout.processor.tokenizer.decode
    prompts = [
        {("First?" in decode(row), "Second?" in decode(row)) for row in data[item]["input_ids"]} for item in range(8)
    ]
    assert {len(one) for one in prompts} == kinds
    assert set.union(*prompts) == {(True, False), (False, True)}


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_prompt_with_two_places_for_the_picture_is_refused_where_they_are_read(
    in_a_file: bool, folder: Path, tmp_path: Path
) -> None:
    """The original stops there, too; the second mark would be learnt as text."""
    twice = "<Img><ImageHere></Img> and <Img><ImageHere></Img>?"
    (tmp_path / "prompts.txt").write_text(f"{PROMPTS[0]}\n{twice}\n")
    prompts = {"prompts": str(tmp_path / "prompts.txt") if in_a_file else [PROMPTS[0], twice]}

    with pytest.raises(ConfigError, match="has 2 places for the picture, expected one"):
        batches(folder, layout="original", data=prompts)
    assert len(batches(folder, data=prompts).prompts) == 2


def test_captions_are_cleaned_as_the_original_did_where_a_source_says_so(folder: Path) -> None:
    data = batches(folder)
    decode = data.layout.processor.tokenizer.decode
    learned = {decode(row[row != -100], skip_special_tokens=True) for row in data[0]["labels"]}
    assert learned <= {"it is a and more", "it is b and more"}
