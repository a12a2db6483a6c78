"""Train nano on pictures of your own with transformers' `Trainer`, in place of `minigpt4 train`.

    python examples/train_with_trainer.py FOLDER OUTPUT

FOLDER holds pictures, and beside each a text file of the same name with its caption. The model that comes out answers
with `minigpt4 ask PICTURE QUESTION -m OUTPUT`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

import minigpt4

QUESTION = "Describe this image in detail."


def train(
    model: minigpt4.MiniGPT4ForConditionalGeneration,
    processor: minigpt4.MiniGPT4Processor,
    pairs: Sequence[tuple[Path, str]],
    output: Path,
    **options: Any,
) -> Trainer:
    """Train what the model's configuration lets learn; `options` are those of `TrainingArguments`."""

    def collate(examples: Sequence[tuple[Path, str]]) -> dict[str, Any]:
        asked = [[{"type": "image", "path": str(path)}, {"type": "text", "text": QUESTION}] for path, _ in examples]
        turns = [
            [{"role": "user", "content": parts}, {"role": "assistant", "content": caption}]
            for parts, (_, caption) in zip(asked, examples, strict=True)
        ]
        kinds = {"return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
        batch = processor.apply_chat_template(turns, tokenize=True, **kinds)
        answers = batch.pop("assistant_masks").bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~answers, -100)}  # the loss is of answers alone

    # Trainer stores the whole model with each checkpoint, frozen parts and all, where `minigpt4 train` stores what
    # learns: hence no checkpoints here. Columns are kept since the examples are pairs, not columns.
    settings = {
        "remove_unused_columns": False,
        "save_strategy": "no",
        "learning_rate": 3e-4,
        "report_to": [],
        **options,
    }
    trainer = Trainer(model, TrainingArguments(str(output), **settings), data_collator=collate, train_dataset=pairs)
    trainer.train()
    return trainer


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: train_with_trainer.py PICTURES_FOLDER OUTPUT")
    folder, output = map(Path, sys.argv[1:])
    captions = sorted(folder.glob("*.txt"))
    pictures = {path.stem: path for path in folder.iterdir() if path.suffix != ".txt"}
    model, processor = minigpt4.load("nano", dtype="float32")
    train(
        model, processor, [(pictures[path.stem], path.read_text(encoding="utf-8").strip()) for path in captions], output
    )
    model.save_pretrained(output)
    processor.save_pretrained(output)
