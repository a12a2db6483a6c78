"""What `features: cache` looks at: the records that the places of a stage lead to, and those in place of bad ones."""

from pathlib import Path
from typing import Any

import pytest

from minigpt4.data.batches import MAX_ATTEMPTS, Process, SourceBatches
from minigpt4.data.order import Order
from minigpt4.training import feature_needs
from minigpt4.training.feature_needs import NeededRecords, num_places
from minigpt4.training.features import compute_features
from minigpt4.training.processes import processes
from minigpt4.training.stage_data import RunSources
from tests.training.test_features import made_source, prepared, recipe_of

SIZES = (40, 7, 300)


def batches_of(length: int = 30, **changes: Any) -> SourceBatches:
    """Batches of two processes over three sources that nobody reads."""
    order = Order(sizes=SIZES, shares=(1.0, 1.0, 2.0), seed=3, stage=1)
    layout: Any = None
    return SourceBatches(
        [], order, layout, [], length, batch_size=4, process=Process(0, 2), bucket_batches=2, **changes
    )


def records_led_to(batches: SourceBatches, bad: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """What batches look at, place after place, as they themselves would."""
    seen = set()
    for place in range(num_places(batches)):
        source, number = batches.order.pick(place)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            seen.add((source, number))
            if (source, number) not in bad:
                break
            number = batches.order.replacement(place, attempt)
    return seen


@pytest.mark.parametrize("bad_share", [0, 3, 2])
def test_all_records_are_found_that_places_lead_to_and_no_other(bad_share: int) -> None:
    """Every second record bad, or every third, or none."""
    batches = batches_of()
    every = [(source, number) for source, size in enumerate(SIZES) for number in range(size)]
    bad = {record for record in every if bad_share and record[1] % bad_share == 0}
    needed, looked_at = NeededRecords(batches), []
    for _ in every:  # more rounds than there can be
        list(needed.find())
        found = [(int(source), int(number)) for source, number in needed.wanted()]
        assert found == sorted(found)
        for source, number in found:
            needed.note(source, number, bad=(source, number) in bad)
        looked_at += found
    assert not found
    assert len(looked_at) == len(set(looked_at))
    assert set(looked_at) == records_led_to(batches, bad)


def test_who_waits_is_told_of_many_places_until_the_last_and_of_few_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_needs, "TOLD_EVERY", 100)
    told: list[tuple[str, int, int]] = []

    pauses = sum(1 for _ in NeededRecords(batches_of()).find("order", lambda *line: told.append(line)))

    assert told == [("order", 100, 240), ("order", 200, 240), ("order", 240, 240)]
    assert pauses == 3  # the other processes of a run hear from this one meanwhile
    told.clear()
    list(NeededRecords(batches_of(length=10)).find("order", lambda *line: told.append(line)))
    assert told == []


def test_later_rounds_go_through_the_places_of_bad_records_only(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NeededRecords(batches_of())
    list(needed.find())
    for at, (source, number) in enumerate(needed.wanted()):
        needed.note(int(source), int(number), bad=at == 0)
    monkeypatch.setattr(feature_needs, "TOLD_EVERY", 1)

    assert 0 < sum(1 for _ in needed.find()) < 20


def test_features_tell_how_far_the_order_of_a_stage_is_gone_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_needs, "TOLD_EVERY", 10)
    told: list[tuple[str, int, int]] = []
    recipe = recipe_of(tmp_path / "run", made_source(tmp_path / "source"))

    compute_features(recipe, prepared(), processes(), lambda *_: None, RunSources(lambda *line: told.append(line)))

    assert told[:3] == [("which records only reads", done, 24) for done in (10, 20, 24)]
