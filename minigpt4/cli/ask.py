"""`minigpt4 ask`, and what `chat` shares with it: loading a model and streaming an answer."""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4.cli.console import note, patience
from minigpt4.cli.options import (
    QUESTION_HINT,
    AsJson,
    CfgPath,
    Device,
    Dtype,
    GpuId,
    LanguageModel,
    LengthPenalty,
    MaxNewTokens,
    MinLength,
    Model,
    NumBeams,
    Options,
    Quantize,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopP,
    app,
    check_context,
    check_placement,
    checked_generation,
    examples,
    from_the_original,
    open_all,
    quiet_for,
)
from minigpt4.cli.progress import parts_bar
from minigpt4.errors import UsageError

if TYPE_CHECKING:
    from minigpt4.inference.chat import ChatSession


@app.command(
    epilog=examples(
        'minigpt4 ask cat.jpg "What is in this picture?"',
        'curl -s https://example.org/cat.jpg | minigpt4 ask - "What animal is this?" --json',
    )
)
def ask(
    pictures: Annotated[list[str] | None, typer.Argument(metavar="PICTURE", help="Files; - is stdin.")] = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In quotes.")] = "",
    model: Model = "nano",
    max_new_tokens: MaxNewTokens = 300,
    num_beams: NumBeams = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    length_penalty: LengthPenalty = None,
    min_length: MinLength = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = "none",
    language_model: LanguageModel = None,
    cfg_path: CfgPath = None,
    options: Options = None,
    gpu_id: GpuId = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question about pictures."""
    generation = checked_generation(locals())
    if not pictures or question == "-":  # standard input is a picture
        raise UsageError("ask needs a picture and a question", QUESTION_HINT)
    check_question(question)
    if os.path.isfile(question):
        raise UsageError(f"the last argument, {question!r}, is a file, expected a question", QUESTION_HINT)
    check_placement(device, dtype, quantize)
    opened = open_all(pictures)  # before the model: a wrong picture is told at once
    started = time.monotonic()
    chat = load_session(**loading_options(locals()))
    loaded = time.monotonic() - started
    for picture in opened:
        chat.add_image(picture)
    stream(chat, question, generation, show=not as_json)
    if as_json:
        print(json.dumps(_as_json(chat, str(cfg_path or model), loaded), ensure_ascii=False))
    if chat.answer.finish_reason == "cancelled":
        sys.exit(130)


def check_question(question: str) -> None:
    """Refuse what is no question, before anything is loaded for it."""
    from minigpt4.processing.messages import MAX_MESSAGE_CHARACTERS

    if not question.strip():
        raise UsageError("the question is empty", QUESTION_HINT)
    if len(question) > MAX_MESSAGE_CHARACTERS:
        raise UsageError(
            f"the question has {len(question)} characters, expected at most {MAX_MESSAGE_CHARACTERS}", "shorten it"
        )
    if any("\ud800" <= character <= "\udfff" for character in question):
        raise UsageError("the question is not valid UTF-8", "type it anew, or set the terminal to UTF-8")


def loading_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take out of a command's arguments what `load_session` wants."""
    names = (
        "model",
        "max_new_tokens",
        "device",
        "dtype",
        "quantize",
        "language_model",
        "cfg_path",
        "options",
        "gpu_id",
    )
    return {name: arguments[name] for name in names}


def load_session(
    *,
    model: str,
    max_new_tokens: int,
    device: str,
    dtype: str,
    quantize: str,
    language_model: Path | None,
    cfg_path: Path | None,
    options: list[str] | None,
    gpu_id: int | None,
) -> "ChatSession":
    """Load a model to talk to; what the command line says about it is checked first."""
    quiet_for(model)
    folder, device, quantize = from_the_original(
        cfg_path, options, gpu_id, model=model, device=device, quantize=quantize, language_model=language_model
    )
    check_context(folder, max_new_tokens)
    with parts_bar() as report, _no_collection(), patience(f"loading {cfg_path or model}"):
        from minigpt4.inference.chat import ChatSession
        from minigpt4.weights import load

        return ChatSession(
            *load(folder, device=device, dtype=dtype, quantize=quantize, language_model=language_model, report=report)
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Leave out the collector of reference cycles: what loads stays, and looking through it takes a second of five."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def stream(chat: "ChatSession", question: str, options: dict[str, Any], show: bool = True) -> None:
    """Print an answer as it comes; Ctrl-C ends the answer and keeps what was said."""
    before = signal.signal(signal.SIGINT, lambda *_: chat.cancel())
    try:
        for piece in chat.stream(question, **options):
            if show:
                print(piece, end="", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    if show:
        print(flush=True)
    if chat.answer.finish_reason == "cancelled":
        note("stopped")
    elif chat.answer.finish_reason == "length":
        note(f"the answer reached {options['max_new_tokens']} tokens and was cut; --max-new-tokens raises it")
    elif show and not chat.answer.text.strip():
        note("the model said nothing; ask in other words")


def _as_json(chat: "ChatSession", model: str, loaded: float) -> dict[str, Any]:
    answer = chat.answer
    return {
        "answer": answer.text,
        "model": model,
        "finish_reason": answer.finish_reason,
        "tokens": {
            "prompt": answer.prompt_tokens,
            "cached": answer.cached_tokens,
            "completion": answer.completion_tokens,
        },
        "seconds": {
            "load": round(loaded, 3),
            "first_token": round(answer.seconds_to_first_token, 3),
            "total": round(answer.seconds, 3),
        },
    }
