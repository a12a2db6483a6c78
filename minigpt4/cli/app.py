"""The commands' frame: the application they register with, and what several of them share."""

from typing import Annotated

import typer

from minigpt4 import __version__


def examples(*commands: str) -> str:
    """Write a command's examples as its help's last lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)  # \b keeps the line breaks


app = typer.Typer(
    name="minigpt4",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=examples('minigpt4 ask cat.jpg "What is in this picture?"', "minigpt4 chat cat.jpg"),
)

weights_app = typer.Typer(name="weights", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(weights_app)
data_app = typer.Typer(name="data", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also after the command.")] = False,
    version: Version = False,
) -> None:
    """Ask questions about pictures."""


@weights_app.callback()
def _weights() -> None:
    """Prepare, check, import and export weights."""


@data_app.callback()
def _data() -> None:
    """Check and index examples to train on."""
