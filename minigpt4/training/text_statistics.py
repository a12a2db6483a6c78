"""How long the texts of a stage are, and how many lose their end: told before training, when it can still be mended."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from minigpt4.data.batches import SourceBatches
from minigpt4.data.side_by_side import answers_of
from minigpt4.errors import DataError, PromptError
from minigpt4.plurals import counted

LOOKED_AT = 200
"""So many examples are looked at, the first of the stage's order."""

WORTH_A_WARNING = 0.01


@dataclass(frozen=True)
class TextStatistics:
    """What the texts of a stage are like.

    Args:
        lengths: Tokens of answers in each text that was looked at; end symbols included.
        cut: How many of them lose the end of an answer, or further turns.
        limit: `max_text_tokens` of the stage.
    """

    lengths: Sequence[int]
    cut: int
    limit: int

    def sentence(self, stage: str) -> str:
        """Say it in one line."""
        if not self.lengths:
            return f"stage {stage}: none of its first examples can be used"
        shortest, longest = min(self.lengths), max(self.lengths)
        middle, high = (quantiles([*self.lengths, self.lengths[0]], n=20, method="inclusive")[at] for at in (9, 18))
        line = (
            f"stage {stage}: answers of {counted(longest, 'token')}"
            if shortest == longest
            else f"stage {stage}: answers of {shortest} to {counted(longest, 'token')}, "
            f"half of them at most {middle:.0f}, 95 % at most {high:.0f}"
        )
        line += f" ({counted(len(self.lengths), 'example')} looked at)"
        share = self.cut / len(self.lengths)
        if share <= WORTH_A_WARNING:
            return line
        return f"{line}; WARNING: {share:.0%} lose their end, max_text_tokens is {self.limit}"


def text_statistics(batches: SourceBatches) -> TextStatistics:
    """Look at the first examples of a stage, without opening a picture."""
    lengths, cut = [], 0
    for place in range(min(LOOKED_AT, len(batches) * batches.batch_size)):
        try:
            example = batches.text(place)
        except (DataError, PromptError):
            continue  # counted when it is read for training
        answers = answers_of(example)
        lengths += answers
        cut += min(example.cut, len(answers))
    return TextStatistics(lengths, cut, batches.layout.max_text_tokens)
