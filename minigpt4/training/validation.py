"""What a run looks at besides its loss: the same loss on pictures it does not learn from, and sample answers."""

from dataclasses import dataclass

import torch
from accelerate import PartialState

from minigpt4.data.batches import Process, SourceBatches
from minigpt4.data.examples import DEFAULT_PROMPTS
from minigpt4.data.order import Order
from minigpt4.data.record import Record
from minigpt4.errors import DataError, ImageError
from minigpt4.processing.pictures import open_image
from minigpt4.training.objectives import TrainingStep, num_targets
from minigpt4.training.preparing import Prepared
from minigpt4.training.processes import by_the_main_process, summed
from minigpt4.training.recipe import Recipe, StageRecipe, ValidationRecipe
from minigpt4.training.samples import add_round, answer_pictures, make_round
from minigpt4.training.stage_data import layout_of, open_sources
from minigpt4.training.update import PRECISIONS, chosen_precision, to_device

MANY = 10
"""So many times as many records are looked at for pictures that can be opened."""

FIXED_SEED = 0
"""The same examples every time, whatever the run's seed."""


@dataclass
class Validation:
    """Validates a run.

    Args:
        recipe: The run's.
        settings: Its section `validation`.
        prepared: The model and its processor.
        processes: The processes of the run; each looks at its own part.
    """

    recipe: Recipe
    settings: ValidationRecipe
    prepared: Prepared
    processes: PartialState

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared, processes: PartialState) -> "Validation":
        """Make the validation that a recipe asks for."""
        if recipe.validation is None:
            raise ValueError("the recipe has no validation")
        return cls(recipe, recipe.validation, prepared, processes)

    @torch.no_grad()
    def loss(self, module: TrainingStep, stage: StageRecipe, step: int) -> float | None:
        """Return the loss a target token over the validation's batches, and add sample answers, where it is time.

        Random numbers and modes are left as they were found.
        """
        if step % self.settings.every_steps and step != stage.steps:
            return None
        if stage.objective != "language":
            return None
        device = self.processes.device
        precision = PRECISIONS[chosen_precision(self.recipe, device)]
        was_training = module.training
        module.eval()
        total, count = 0.0, 0
        for number in range(self.settings.batches):
            batch = self._batches(stage)[number]
            with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
                total += module(to_device(batch, device)).loss.item()
            count += num_targets(batch)
        module.train(was_training)
        loss, targets = summed([total, count], self.processes)
        if self.processes.num_processes == 1 or self.recipe.parallel == "ddp":  # else no process has the whole model
            by_the_main_process(lambda: self._add_samples(stage, step), self.processes)
        return loss / max(targets, 1)

    def _add_samples(self, stage: StageRecipe, step: int) -> None:
        """Ask about the first pictures, and add the answers to the run's page."""
        batches = self._batches(stage)
        records: list[Record] = []
        for place in range(MANY * self.settings.pictures):
            if len(records) == self.settings.pictures:
                break
            try:
                record = batches.record(*batches.order.pick(place))
                open_image(record.picture or b"")
            except (DataError, ImageError):
                continue  # as the loss, which takes another in its place
            records.append(record)
        if not records:
            return
        pictures = [record.picture or b"" for record in records]
        model, processor = self.prepared.model, self.prepared.processor
        device = self.processes.device
        precision = PRECISIONS[chosen_precision(self.recipe, device)]
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            answers = answer_pictures(model, processor, pictures, self.settings.question, stage.max_text_tokens)
        references = [record.turns[0][1] for record in records]
        title = f"Sample answers of {self.recipe.output.name}: {self.settings.question}"
        add_round(self.recipe.output, title, make_round(stage.name, step, pictures, references, answers))

    def _batches(self, stage: StageRecipe) -> SourceBatches:
        sources = open_sources(self.settings.sources)
        shares = tuple(source.share for source in self.settings.sources)
        order = Order(tuple(len(source) for source in sources), shares, FIXED_SEED, 0)
        return SourceBatches(
            sources=sources,
            order=order,
            layout=layout_of(stage, self.prepared.processor),
            prompts=[] if stage.layout == "original" else DEFAULT_PROMPTS,
            length=self.settings.batches,
            batch_size=stage.batch_size,
            process=Process(self.processes.process_index, self.processes.num_processes),
            crop=False,
        )
