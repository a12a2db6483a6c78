"""Validation of a run: the loss on pictures it does not learn from, and sample answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.data.batches import KeptPictures, Process, SourceBatches
from minigpt4.data.record import Record
from minigpt4.errors import DataError, ImageError
from minigpt4.inference.engine import Engine
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing.pictures import PictureSource, content_hash, open_image
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.training.model_setup import Prepared
from minigpt4.training.objectives import TrainingStep, image_features, num_targets
from minigpt4.training.optimizer_step import PRECISIONS, chosen_precision, to_device
from minigpt4.training.processes import by_the_main_process, gathered, is_spread, summed
from minigpt4.training.recipe import Recipe, StageRecipe, ValidationRecipe
from minigpt4.training.samples import add_round, make_round
from minigpt4.training.stage_data import RunSources, context_of, num_sample_places, validation_batches


@dataclass
class Validation:
    """Validation of a run.

    Args:
        recipe: The run's.
        settings: Its section `validation`.
        prepared: The model and its processor.
        processes: The processes of the run; each validates its own part.
        opened: Opens the sources.
        kept: The cached features of the pictures, if they are cached.
    """

    recipe: Recipe
    settings: ValidationRecipe
    prepared: Prepared
    processes: PartialState
    opened: RunSources
    kept: KeptPictures | None = None

    @torch.no_grad()
    def loss(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        """Return the loss per target token over the validation's batches, and add sample answers, if they are due.

        Random numbers and modes are left as they were found.
        """
        if step % self.settings.every_steps and step != stage.steps:
            return None
        if module.objective is not None:  # its loss could not be compared with that of the answers
            return None
        batches = self._batches(stage)
        was_training = module.training
        module.eval()
        total, count = 0.0, 0
        for number in range(len(batches)):
            batch = batches[number]
            with self._computing():
                total += module(to_device(batch, self.processes.device)).loss.item()
            count += num_targets(batch)
        module.train(was_training)
        loss, targets = summed([total, count], self.processes)
        self._add_samples(module, stage, step, batches)
        return loss / max(targets, 1)

    def _add_samples(self, module: TrainingStep, stage: StageRecipe, step: int, batches: SourceBatches) -> None:
        """Ask about the first pictures, and add the answers to the run's page."""
        if not is_spread(module):
            by_the_main_process(lambda: self._write(stage, step, *self._answered(stage, batches)), self.processes)
            return
        with gathered(module):  # each process has a part of the model, so all of them answer
            records, answers = self._answered(stage, batches)
        by_the_main_process(lambda: self._write(stage, step, records, answers), self.processes)

    def _answered(self, stage: StageRecipe, batches: SourceBatches) -> tuple[list[Record], list[str]]:
        """Return the first records with pictures that can be used, and what the model answers about each."""
        records: list[Record] = []
        seen: list[Any] = []
        for place in range(num_sample_places(self.settings)):
            if len(records) == self.settings.pictures:
                break
            try:
                record = batches.record(*batches.order.pick(place))
                open_image(record.picture or b"")
                seen += [self.kept.picture(record)] if self.kept else []
            except (DataError, ImageError):
                continue  # as the loss, which takes another in its place
            records.append(record)
        if not records:
            return [], []
        model, processor = self.prepared.model, self.prepared.processor
        with self._computing():
            answers = answer_pictures(
                model,
                processor,
                [record.picture or b"" for record in records],
                self.settings.question,
                stage.max_text_tokens,
                features=image_features(model, to_device(self.kept.batch(seen), self.processes.device))
                if self.kept
                else None,
            )
        return records, answers

    def _write(self, stage: StageRecipe, step: int, records: list[Record], answers: list[str]) -> None:
        if not records:
            return
        pictures = [record.picture or b"" for record in records]
        references = [record.turns[0][1] for record in records]
        title = f"Sample answers of {self.recipe.output.name}: {self.settings.question}"
        add_round(self.recipe.output, title, make_round(stage.name, step, pictures, references, answers))

    def _batches(self, stage: StageRecipe) -> SourceBatches:
        process = Process(self.processes.process_index, self.processes.num_processes)
        return validation_batches(
            self.recipe, self.settings, self.prepared.processor, stage, process, self.opened, self.kept,
            context_of(self.prepared.model),
        )  # fmt: skip

    def _computing(self) -> Any:  # noqa: ANN401  (a context)
        device = self.processes.device
        precision = PRECISIONS[chosen_precision(self.recipe, device)]
        return torch.autocast(device.type, dtype=precision, enabled=precision is not None)


def answer_pictures(
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    pictures: Sequence[PictureSource],
    question: str,
    max_new_tokens: int,
    *,
    features: BaseModelOutputWithPooling | None = None,
) -> list[str]:
    """Ask one question about each picture by itself, and return the likeliest answers, as `ask` would.

    The modes of the parts (training or evaluation) are as before when it ends.

    Args:
        model: The model, on any device, in any mode. Where each process of a run has a part of it, all of them ask.
        processor: Its processor.
        pictures: The pictures.
        question: The question.
        max_new_tokens: Longest answer.
        features: Image features computed before, `pooler_output` a row a picture; None computes them.

    Raises:
        ImageError: A picture cannot be opened.
        PromptError: The question cannot be turned into a prompt.
    """
    engine = Engine(model, processor, max_concurrent=max(len(pictures), 1))
    opened = [open_image(picture) for picture in pictures]
    keys = [content_hash(picture) for picture in opened]
    if features is not None and features.pooler_output is not None:
        for key, embeds in zip(keys, features.pooler_output, strict=True):
            engine.image_cache.put(key, embeds)
    text = {"type": "text", "text": question}
    conversations: list[Any] = [
        [{"role": "user", "content": [{"type": "image", "image": picture, "key": key}, text]}]
        for key, picture in zip(keys, opened, strict=True)
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return [answer.text for answer in engine.answer_all(conversations, max_new_tokens=max_new_tokens)]
    finally:
        for module, mode in modes:
            module.training = mode
