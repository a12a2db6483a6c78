"""Train nano on pictures of your own with transformers' `Trainer`, in place of `minigpt4 train`.

    python examples/train_with_trainer.py FOLDER OUTPUT

FOLDER holds pictures, and beside each a text file of the same name with its caption. The model that comes out answers
with `minigpt4 ask PICTURE QUESTION -m OUTPUT`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import minigpt4

QUESTION = "Describe this image in detail."
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


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
        "dataloader_pin_memory": torch.cuda.is_available(),  # else a warning that there is nothing to pin for
        "save_strategy": "no",
        "learning_rate": 3e-4,
        "report_to": [],
        **options,
    }
    trainer = Trainer(model, TrainingArguments(str(output), **settings), data_collator=collate, train_dataset=pairs)
    trainer.train()
    return trainer


def pairs_in(folder: Path) -> list[tuple[Path, str]]:
    """Return a folder's pictures with their captions; one without the other is left out."""
    captions = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))}
    pictures = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
    return [(pictures[name], caption) for name, caption in captions.items() if name in pictures]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: train_with_trainer.py FOLDER OUTPUT")
    folder, output = map(Path, sys.argv[1:])
    pairs = pairs_in(folder) if folder.is_dir() else []
    if not pairs:
        sys.exit(f"{folder} holds no picture with a caption of its name beside it, such as cat.jpg and cat.txt")
    model, processor = minigpt4.load("nano", dtype="float32")
    train(model, processor, pairs, output)
    model.save_pretrained(output)
    processor.save_pretrained(output)
