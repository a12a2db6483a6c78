"""The one family of errors a user can meet.

Every error says in one sentence what happened, where, and what was expected; `hint` names the cure.
The class carries the exit status of the command line and the HTTP status of the API, so the two cannot disagree.
"""


class MiniGPT4Error(Exception):
    """Base of every error that is the user's to mend.

    Args:
        message: One sentence, without a full stop: what, where, what was expected.
        hint: The cure, as a command or an instruction; empty when there is none.
    """

    exit_status = 2
    http_status = 500

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type["MiniGPT4Error"], tuple[str, str]]:
        """Keep the hint when the error crosses a process border."""
        return type(self), (self.message, self.hint)


class UsageError(MiniGPT4Error):
    """A command, an option or an argument that makes no sense."""

    http_status = 400


class ConfigError(MiniGPT4Error):
    """A configuration that contradicts itself, the weights or the machine."""


class WeightsError(MiniGPT4Error):
    """A weight file or model folder that is missing, damaged, foreign or does not fit."""


class DownloadError(WeightsError):
    """A frozen part that is not here and cannot be fetched."""


class StorageError(MiniGPT4Error):
    """A place on disk that cannot be read or written, or that is full."""


class ImageError(MiniGPT4Error):
    """A picture that cannot be opened, or that exceeds a limit."""

    http_status = 400


class PromptError(MiniGPT4Error):
    """A conversation that cannot be turned into a prompt."""

    http_status = 400


class ContextOverflowError(PromptError):
    """A conversation longer than the language model's context."""


class DataError(MiniGPT4Error):
    """Training or evaluation data that cannot be used."""


class ServerBusyError(MiniGPT4Error):
    """The server has no free place in its queue."""

    http_status = 429
