"""Bad examples: listed, counted, and too many of them are the end of the run.

The original left them out without a word, and trained on nothing when all were bad.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState

from minigpt4.data.batches import BadSample
from minigpt4.errors import DataError
from minigpt4.text import counted
from minigpt4.training.checkpoint import State
from minigpt4.training.processes import by_the_main_process, summed
from minigpt4.training.recipe import Recipe
from minigpt4.training.run_folder import BAD_SAMPLES_FILE, append_line

WINDOW = 1000
"""So many of the last examples are looked at together."""

GROUP_LIMIT = 20
"""So many bad examples of a shard, and not one good since the first of them, are the shard's own fault."""


@dataclass(frozen=True)
class BadSampleWatch:
    """Looks at what the readers left out.

    Args:
        recipe: Says how many may be bad.
        processes: The processes of the run.
        state: Counts, so that a resumed run stops where an uninterrupted one would have.
    """

    recipe: Recipe
    processes: PartialState
    state: State

    def look_at(self, stage: str, step: int, batches: Sequence[dict[str, Any]]) -> None:
        """Take what the batches of an update left out into account.

        Raises:
            DataError: Too many were bad, or all of a shard.
        """
        bad = [sample for batch in batches for sample in batch.get("bad", [])]
        read = sum(len(batch.get("keys", [])) for batch in batches) + len(bad)
        bad_count, all_read = (int(value) for value in summed([len(bad), read], self.processes))
        self._count_good(batches)
        if bad_count:
            bad = self._gathered(bad)
            by_the_main_process(lambda: self._write(stage, step, bad), self.processes)
            for sample in bad:
                self.state.groups.setdefault(sample.group, [0, 0])[1] += 1
        self.state.recent_bad.append([bad_count, all_read])
        while sum(count for _, count in self.state.recent_bad[1:]) >= WINDOW:
            self.state.recent_bad.pop(0)
        self._judge(bad)

    def _count_good(self, batches: Sequence[dict[str, Any]]) -> None:
        groups = [group for batch in batches for group in batch.get("groups", []) if group in self.state.groups]
        # The same set of groups is known to all processes; whose example was good does not matter.
        known = sorted(self.state.groups)
        counts = summed([float(groups.count(group)) for group in known], self.processes) if known else []
        for group, count in zip(known, counts, strict=True):
            self.state.groups[group][0] += int(count)

    def _gathered(self, bad: list[BadSample]) -> list[BadSample]:
        if self.processes.num_processes == 1:
            return bad
        lists: list[list[BadSample]] = [[] for _ in range(self.processes.num_processes)]
        torch.distributed.all_gather_object(lists, bad)
        return [sample for one in lists for sample in one]

    def _write(self, stage: str, step: int, bad: Sequence[BadSample]) -> None:
        for sample in bad:
            append_line(self.recipe.output / BAD_SAMPLES_FILE, {"stage": stage, "step": step, **asdict(sample)})

    def _judge(self, bad: Sequence[BadSample]) -> None:
        count = sum(bad_count for bad_count, _ in self.state.recent_bad)
        path = self.recipe.output / BAD_SAMPLES_FILE
        if count > self.recipe.max_bad_fraction * WINDOW:
            looked_at = sum(n for _, n in self.state.recent_bad)
            last = f"; the last: {bad[-1].key}: {bad[-1].reason}" if bad else ""
            raise DataError(
                f"{count:,} of the last {counted(looked_at, 'example')} {'is' if count == 1 else 'are'} bad, "
                f"up to {self.recipe.max_bad_fraction:.1%} of {WINDOW:,} are passed over{last}",
                hint=f"{path} lists them; mend the data, or raise max_bad_fraction",
            )
        for group, (good, wrong) in self.state.groups.items():
            if wrong >= GROUP_LIMIT and not good:
                raise DataError(
                    f"the last {wrong} examples of {group} are all bad", hint=f"{path} lists them; mend the data"
                )
