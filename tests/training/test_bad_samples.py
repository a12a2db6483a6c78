"""Bad examples are counted over a window of the last ones, and by shard: what is over counts no more."""

import json
from pathlib import Path
from typing import Any

import pytest

from minigpt4.data.batches import BadSample
from minigpt4.data.sources.faults import NO_PICTURE
from minigpt4.errors import DataError
from minigpt4.training.bad_samples import GROUP_LIMIT, WINDOW, BadSampleWatch
from minigpt4.training.checkpoint import State
from minigpt4.training.processes import processes
from minigpt4.training.run_folder import BAD_SAMPLES_FILE
from tests.training import toy

GOOD, BAD = "good.tar", "bad.tar"


def update(good: int, bad: int, *, of: str = BAD) -> list[dict[str, Any]]:
    """The batch of an update with so many examples; the bad ones are of a shard."""
    samples = [BadSample("source", of, f"{of}:{n}", "it has no picture", NO_PICTURE) for n in range(bad)]
    return [{"keys": ["key"] * good, "groups": [GOOD] * good, "bad": samples}]


def watch(output: Path, state: State, **changes: Any) -> BadSampleWatch:
    return BadSampleWatch(toy.recipe(output, **changes), processes(), state)


def test_one_percent_of_the_window_is_passed_over_and_one_more_is_not(tmp_path: Path) -> None:
    watched = watch(tmp_path, State())
    watched.look_at("one", 1, update(90, 10))

    with pytest.raises(DataError, match=r"^11 of the last 110 examples are bad, up to 1\.0% of 1,000 are passed over"):
        watched.look_at("one", 2, update(9, 1))

    assert len((tmp_path / BAD_SAMPLES_FILE).read_text().splitlines()) == 11


def test_what_lies_before_the_last_thousand_counts_no_more(tmp_path: Path) -> None:
    state = State()
    watched = watch(tmp_path, state)
    watched.look_at("one", 1, update(90, 10))
    for step in range(2, 2 + WINDOW // 100):
        watched.look_at("one", step, update(100, 0))

    watched.look_at("one", 12, update(90, 10, of="other.tar"))  # ten again, and the first ten are over

    assert sum(bad for bad, _ in state.recent_bad) == 10
    lines = [json.loads(line) for line in (tmp_path / BAD_SAMPLES_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 10 + [12] * 10


def test_counts_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    state = State()
    watch(tmp_path, state).look_at("one", 1, update(90, 10))

    with pytest.raises(DataError, match="11 of the last 110 examples are bad"):
        watch(tmp_path, State(**json.loads(json.dumps(state.__dict__)))).look_at("one", 2, update(9, 1))


@pytest.mark.parametrize("one_is_good", [True, False])
def test_a_shard_with_one_good_example_is_not_given_up(one_is_good: bool, tmp_path: Path) -> None:
    watched = watch(tmp_path, State(), max_bad_fraction=1.0)
    watched.look_at("one", 1, update(1, 1, of=GOOD if one_is_good else BAD))
    batch = update(1, GROUP_LIMIT, of=GOOD if one_is_good else BAD)

    if one_is_good:
        watched.look_at("one", 2, batch)
    else:
        with pytest.raises(DataError, match=rf"the last {GROUP_LIMIT + 1} examples of bad\.tar are all bad"):
            watched.look_at("one", 2, batch)
