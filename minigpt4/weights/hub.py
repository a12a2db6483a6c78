"""Model folders from the Hugging Face hub: an id, at a revision or the newest, becomes a folder on this machine.

The hub's own client fetches and keeps the files, so its settings hold (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE`); it reads them when it is first imported, which is why that happens inside the functions here. Only
tensors, JSON and texts are taken: nothing that could run.

Knows nothing of what is in a folder.
"""

import re
from collections.abc import Callable
from pathlib import Path

from minigpt4.errors import DownloadError, MiniGPT4Error, StorageError
from minigpt4.text import first_line

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.md"]

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much; bytes, or 0 of 0 where nothing is known."""


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form `owner/name` or `owner/name@revision`."""
    return HUB_ID.fullmatch(name) is not None


def is_on_hub(name: str) -> bool:
    """Tell whether a model of this name is looked for on the hub: an id, and no file or folder here is called so."""
    return is_hub_id(name) and not Path(name).exists()


def hub_folder(name: str, report: Report | None = None) -> Path:
    """Return the folder of a model of the hub, fetching what is not here yet.

    Without a network, or where the hub fails, the newest copy that is here is taken.

    Args:
        name: `owner/name` or `owner/name@revision`; see `is_hub_id`.
        report: Told that the hub is asked.

    Raises:
        DownloadError: The hub has no such model or revision, does not show it to this user, or cannot be reached, and
            it is not here from before.
        StorageError: The client's cache cannot be written, or is full.
    """
    from huggingface_hub import constants, snapshot_download

    match = HUB_ID.fullmatch(name)
    if match is None:
        raise DownloadError(
            f"{name!r} is no id of a hub, expected owner/name or owner/name@revision",
            hint="copy the id from the model's page; a folder of this machine begins with ./ or /",
        )
    here_only = constants.HF_HUB_OFFLINE  # said again below: older clients look for a commit on the hub all the same
    if report and not here_only:
        report(f"asking the hub for {name}", 0, 0)
    try:
        folder = snapshot_download(
            match["repository"], revision=match["revision"], allow_patterns=FILES, local_files_only=here_only
        )
    except (OSError, ValueError, _http_error()) as error:  # the client's own errors are kinds of these
        raise _explained(error, name, match["repository"], match["revision"]) from error
    return Path(folder)


def _http_error() -> type[Exception]:
    """Return the base of what the client's library for HTTP raises: httpx's, or httpx2's in newer clients."""
    from huggingface_hub import errors

    base: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # that library's, not the client's
    return base


def _explained(error: Exception, name: str, repository: str, revision: str | None) -> MiniGPT4Error:
    """Say in one sentence why the client did not give a model."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the hub was of no use; the error itself says that no copy is here either
    page = f"{constants.ENDPOINT}/{repository}"
    match error:
        case errors.GatedRepoError():  # before RepositoryNotFoundError, of which it is a kind
            hint = f"accept its conditions on {page}, then `hf auth login`, or name a folder"
            return DownloadError(f"model {repository} is gated, and the hub does not know that you may have it", hint)
        case errors.RepositoryNotFoundError():
            hint = "check the name, `hf auth login` for a private model, or name a folder"
            return DownloadError(f"the hub has no model {repository}, or does not show it to you", hint)
        case errors.RevisionNotFoundError():
            hint = f"leave out @{revision} for the newest, or look for its name on {page}"
            return DownloadError(f"model {repository} of the hub has no revision {revision}", hint)
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():  # the latter has no reason but this
            hint = "unset HF_HUB_OFFLINE to fetch it, or name a folder"
            return DownloadError(f"model {name} is not here in full, and HF_HUB_OFFLINE forbids fetching it", hint)
        case errors.HfHubHTTPError():
            hint = "try again later, check HF_TOKEN and HF_ENDPOINT, or name a folder"
            return DownloadError(f"the hub does not give model {name}: {first_line(error)}", hint)
        case _ if isinstance(error, (_http_error(), ConnectionError, TimeoutError)):
            hint = "connect to the network, check the proxy and HF_ENDPOINT; if a folder is meant, it is not there"
            return DownloadError(f"model {name} is not here in full, and the hub cannot be reached", hint)
        case OSError(errno=int(), filename=place):
            hint = "free some space there or allow writing, or set HF_HOME to another folder"
            return StorageError(f"cannot write `{place or constants.HF_HUB_CACHE}`: {error.strerror}", hint)
    hint = "check the name, the network and HF_ENDPOINT, or name a folder"
    return DownloadError(f"the hub does not give model {name}: {first_line(error)}", hint)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".:") or type(error).__name__
