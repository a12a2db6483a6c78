"""How answers are generated, as `ask` and `chat` take it, and what is refused of it before a model loads."""

from typing import Annotated, Any

import typer

from minigpt4.errors import UsageError

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
NumBeams = Annotated[int, typer.Option(min=1, help="Answers followed at once; above 1 the text comes whole.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest answer; above: drawn.")]
TopP = Annotated[
    float | None, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total; with --temperature.")
]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes repetition less likely.")]
LengthPenalty = Annotated[float | None, typer.Option(help="Above 0 favours longer answers; with --num-beams.")]
MinLength = Annotated[int | None, typer.Option(min=0, help="Shortest answer, in tokens.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes drawn answers repeatable; with --temperature.")]

_NAMES = ("max_new_tokens", "num_beams", "temperature", "top_p", "repetition_penalty", "length_penalty", "min_length")


def checked_generation(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take a command's generation options out of its arguments.

    Raises:
        UsageError: One is out of its range, or changes nothing without another that was not given.
    """
    from minigpt4.inference.sampling import generation_options

    options = {name: arguments[name] for name in (*_NAMES, "seed")}
    generation_options(options, as_typed)
    if not options["temperature"]:
        for name in ("top_p", "seed"):
            if options[name] is not None:
                raise UsageError(
                    f"{as_typed(name)} changes nothing in the likeliest answer, only in one that is drawn",
                    f"give --temperature too, for example 0.7, or leave {as_typed(name)} out",
                )
    if options["num_beams"] == 1 and options["length_penalty"] is not None:
        raise UsageError(
            "--length-penalty changes nothing unless several answers are followed at once",
            "give --num-beams too, for example 5, or leave --length-penalty out",
        )
    return options


def check_context(model: str, max_new_tokens: int) -> None:
    """Refuse an answer that is as long as all that the language model reads; its configuration tells.

    Raises:
        UsageError: There would be no room for a question.
    """
    from minigpt4.weights.checking.models import context_of

    context = context_of(model)
    if context is not None and max_new_tokens >= context:
        raise UsageError(
            f"an answer may have {max_new_tokens} tokens, and the language model reads {context}, question and answer "
            "together",
            "give a lower --max-new-tokens",
        )


def as_typed(name: str) -> str:
    """Write an option's name as it is typed."""
    return f"--{name.replace('_', '-')}"
