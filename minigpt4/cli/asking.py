"""`minigpt4 ask` and `minigpt4 chat`."""

import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt4.cli.app import AsJson, app, examples
from minigpt4.cli.conversing import carry_out, lines
from minigpt4.cli.generating import (
    LengthPenalty,
    MaxNewTokens,
    MinLength,
    NumBeams,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopP,
    check_context,
    checked_generation,
)
from minigpt4.cli.original import CfgPath, GpuId, Options, from_the_original
from minigpt4.cli.pictures import QUESTION_HINT, open_all
from minigpt4.cli.terminal import complain, note, parts_bar, patience, quiet
from minigpt4.errors import MiniGPT4Error, UsageError

if TYPE_CHECKING:
    from minigpt4.inference.chat import ChatSession

DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "nf4")

Model = Annotated[str, typer.Option("--model", "-m", help="nano, a model or alignment folder, or owner/name of a hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[str, typer.Option(help="none, int8 or nf4: the language model in fewer bits.")]
LanguageModel = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Another copy of nano's language model, such as one from a hub.")
]


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
    chat = _session(**_placed(locals()))
    loaded = time.monotonic() - started
    for picture in opened:
        chat.add_image(picture)
    stream(chat, question, generation, show=not as_json)
    if as_json:
        print(json.dumps(_as_json(chat, str(cfg_path or model), loaded), ensure_ascii=False))
    if chat.answer.finish_reason == "cancelled":
        sys.exit(130)


@app.command(
    epilog=examples(
        "minigpt4 chat cat.jpg",
        "printf 'What is this?\\nWhat colour is it?\\n' | minigpt4 chat cat.jpg",
    )
)
def chat(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="Belong to the first question.")
    ] = None,
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
) -> None:
    """Hold a conversation; /help in it says more."""
    generation = checked_generation(locals())
    if sys.stdin is None:
        raise UsageError("standard input is closed, and chat reads questions from it", "ask answers one question")
    check_placement(device, dtype, quantize)
    opened = open_all(pictures or [], stdin_taken=True)
    session = _session(**_placed(locals()))
    for picture in opened:
        session.add_image(picture)
    lacking = "" if opened else ", without a picture: /image PATH adds one"
    note(f"{cfg_path or model} is ready{lacking}; /help lists the commands")
    for line in lines():
        try:
            if line.startswith("/"):
                if carry_out(session, line) is False:
                    return
            elif line.strip():
                check_question(line)
                stream(session, line, generation)
        except MiniGPT4Error as error:
            complain(error)


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


def check_placement(device: str, dtype: str, quantize: str) -> None:
    """Refuse names that no machine knows, before torch, which knows this machine, has to load."""
    if not DEVICE.fullmatch(device):
        raise UsageError(f"there is no device {device!r}", "expected auto, cpu, cuda, cuda:N or mps")
    if dtype not in DTYPES:
        raise UsageError(f"there is no number type {dtype!r}", f"expected one of {', '.join(DTYPES)}")
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"there is no quantization {quantize!r}", f"expected one of {', '.join(QUANTIZATIONS)}")


def quiet_for(model: str) -> None:
    """Keep the libraries quiet, and off the network unless the model comes from the hub."""
    from minigpt4.weights.hub import is_on_hub

    quiet(hub=is_on_hub(model))


def _placed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take out of a command's arguments what `_session` wants."""
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


def _session(
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
