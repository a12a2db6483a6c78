"""Turning examples into the tensors that an objective reads; the frozen vision encoder runs here.

A `NanoBatches` is a data set of whole batches, one a step, made in a loader's worker: the worker draws, encodes and
tokenizes step `n + 1` while the trainer learns from step `n`, and the batch of a step never depends on which worker
made it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from minigpt4.errors import DataError
from minigpt4.model import EfficientNetLiteModel
from minigpt4.model.vision_efficientnet_lite import EfficientNetLiteOutput
from minigpt4.processing.prompts import TEMPLATES
from nano.mixture import Example, NanoMixture

IGNORED = -100


@dataclass
class NanoBatches(Dataset[dict[str, Any]]):
    """The batches of one stage, by step.

    Args:
        mixture: Where examples come from.
        vision_model: The frozen encoder.
        tokenizer: The language model's.
        image_token_id: Its id for an image token.
        stage: Number of the stage.
        steps: Batches in it.
        batch_size: Examples in a batch.
        turns: Most questions about one picture.
        objective: `"words"` or `"language"`.
        num_image_tokens: Image tokens a picture.
        num_word_places: How many of them, the last ones, are taught a caption's words.
    """

    mixture: NanoMixture
    vision_model: EfficientNetLiteModel
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    stage: int
    steps: int
    batch_size: int
    turns: int
    objective: str
    num_image_tokens: int
    num_word_places: int

    def __len__(self) -> int:
        """Steps in the stage."""
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Make the batch of a step."""
        examples = [self._example(step, row) for row in range(self.batch_size)]
        if self.objective == "words":
            examples = [part for example in examples for part in example.parts if part.caption]
            if not examples:
                raise DataError(f"no example of step {step} has a caption", hint="lower share_unsure for this stage")
            return {"vision_outputs": self._see(examples), **self._words(examples)}
        pictures = [part for example in examples for part in example.parts]
        return {"vision_outputs": self._see(pictures), **self._conversations(examples)}

    def _example(self, step: int, row: int) -> Example:
        turns = int(np.random.default_rng([self.mixture.seed, self.stage, step, row, 1]).integers(1, self.turns + 1))
        return self.mixture.example(self.stage, step, row, turns)

    @torch.no_grad()
    def _see(self, examples: list[Example]) -> EfficientNetLiteOutput:
        """Encode the pictures; an imagined one keeps the maps and changes the words."""
        size = self.vision_model.config.image_size
        # One by one: a batch's feature maps do not fit a core's cache, which costs twice the time.
        outputs = [self.vision_model(_pixels(example.picture, size).unsqueeze(0)) for example in examples]
        tokens = torch.cat([output.last_hidden_state for output in outputs])
        logits = torch.cat([output.logits for output in outputs])
        for row, example in enumerate(examples):
            if example.picture is None:
                tokens[row, :, : -self.vision_model.config.position_channels] = 0
            if example.imagined is not None:
                logits[row] = _imagined_logits(example.imagined, logits.shape[1])
        return EfficientNetLiteOutput(last_hidden_state=tokens, concept_embeds=self.vision_model.concepts(logits))

    def _words(self, examples: list[Example]) -> dict[str, Tensor]:
        ids = torch.full((len(examples), self.num_word_places), IGNORED)
        for row, example in zip(ids, examples, strict=True):
            pieces = self.tokenizer(f" {example.caption}.", add_special_tokens=False).input_ids[: len(row)]
            row[: len(pieces)] = torch.tensor(pieces)
        return {"labels": nn.functional.pad(ids, (1, 0), value=IGNORED), "distractor_ids": self._distractors()}

    def _distractors(self) -> Tensor:
        names = [f" {word}" for word in self.mixture.words]
        return torch.tensor([i for ids in self.tokenizer(names, add_special_tokens=False).input_ids for i in ids])

    def _conversations(self, examples: list[Example]) -> dict[str, Tensor]:
        rows = [self._conversation(example) for example in examples]
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        for row, (ids, answered) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)] = torch.where(torch.tensor(answered) == 1, torch.tensor(ids), IGNORED)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _conversation(self, example: Example) -> tuple[list[int], list[int]]:
        messages: list[dict[str, Any]] = []
        for part in example.parts:
            for number, (question, answer) in enumerate(part.turns):
                text = {"type": "text", "text": question}
                messages.append({"role": "user", "content": [{"type": "image"}, text] if number == 0 else [text]})
                messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        prompt = TEMPLATES["chatml"].encode(
            self.tokenizer,
            messages,
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens,
            add_generation_prompt=False,
            return_assistant_mask=True,
        )
        end = max(place for place, answered in enumerate(prompt.assistant_mask, 1) if answered)
        return prompt.input_ids[:end], prompt.assistant_mask[:end]


def _pixels(picture: Image.Image | None, size: int) -> Tensor:
    if picture is None:
        return torch.zeros(3, size, size)
    resized = picture.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy((np.asarray(resized, dtype=np.float32) - 127) / 128).permute(2, 0, 1)


def _imagined_logits(imagined: tuple[tuple[int, float], ...], num_classes: int) -> Tensor:
    """Spread what the named classes leave evenly over the rest."""
    probabilities = torch.full((num_classes,), (1 - sum(p for _, p in imagined)) / num_classes + 1e-9)
    for number, probability in imagined:
        probabilities[number] += probability
    return probabilities.log()
