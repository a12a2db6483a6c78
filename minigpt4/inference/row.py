"""One answer in progress: its next token, and the text that is certain of it."""

import time
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from minigpt4.inference.generation import AnswerWriter
from minigpt4.inference.request import Request
from minigpt4.inference.sampling import Sampler


@dataclass(eq=False)
class Row:
    """A request that is being answered.

    Args:
        request: What was asked.
        sampler: Chooses its tokens.
        writer: Writes its text.
        ids: The prompt and what was said; the last was not read yet.
        cache: What was read, where it cannot be read together with others; None in a batch.
    """

    request: Request
    sampler: Sampler
    writer: AnswerWriter
    ids: list[int]
    cache: DynamicCache | None = None

    def say(self, logits: torch.Tensor) -> bool:
        """Choose the next token and hand out its text; returns whether the answer has ended.

        Args:
            logits: `(vocabulary,)`.

        Raises:
            WeightsError: They are no numbers.
        """
        request, answer = self.request, self.request.answer
        token = self.sampler.choose(self.ids, logits)
        self.ids.append(token)
        if not answer.completion_tokens:
            answer.seconds_to_first_token = time.monotonic() - request.asked_at
        answer.completion_tokens += 1
        if text := self.writer.write(token):
            request.deliver(text)
        if token in self.sampler.end_ids or self.writer.ended:
            answer.finish_reason = "stop"
            return True
        answer.finish_reason = "length"
        return answer.completion_tokens >= int(request.options["max_new_tokens"])

    def end(self, *, deliver: bool) -> None:
        """Write the answer down, and hand out what was held back of its text if somebody waits for it."""
        if (text := self.writer.end()) and deliver:
            self.request.deliver(text)
        self.request.answer.text = self.writer.text
