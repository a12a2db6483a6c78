"""How long the texts of a stage are, and how many lose their end: told before training, when it can still be mended."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from minigpt4.data.batches import SourceBatches
from minigpt4.data.side_by_side import answers_of
from minigpt4.errors import DataError, PromptError
from minigpt4.text import counted

LOOKED_AT = 200
"""So many examples are looked at, the first of the stage's order."""

WORTH_A_WARNING = 0.01


@dataclass(frozen=True)
class TextStatistics:
    """What the texts of a stage are like.

    Args:
        lengths: Tokens of answers in each text that was looked at; end symbols included.
        cut: How many of them lose the end of an answer.
        limit: `max_text_tokens` of the stage.
        fewer: How many of them lose turns.
        turns: So many of a text are learnt, at most.
    """

    lengths: Sequence[int]
    cut: int
    limit: int
    fewer: int = 0
    turns: int = 1

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
        if (share := self.cut / len(self.lengths)) > WORTH_A_WARNING:
            line += f"; WARNING: {share:.0%} lose their end, max_text_tokens is {self.limit}"
        if (share := self.fewer / len(self.lengths)) > WORTH_A_WARNING:
            line += f"; WARNING: {share:.0%} lose what follows their first {counted(self.turns, 'question')}"
        return line


def text_statistics(batches: SourceBatches) -> TextStatistics:
    """Look at the first examples of a stage, without opening a picture."""
    lengths, cut, fewer = [], 0, 0
    for place in range(min(LOOKED_AT, len(batches) * batches.batch_size)):
        try:
            example = batches.text(place)
        except (DataError, PromptError):
            continue  # counted when it is read for training
        answers = answers_of(example)
        lengths += answers
        cut += min(example.cut - example.turns_left_out, len(answers))
        fewer += min(example.turns_left_out, len(answers))
    layout = batches.layout
    return TextStatistics(
        lengths, cut, layout.max_text_tokens, fewer, 1 if layout.kind == "original" else layout.max_turns
    )
