"""Full folders from the Hugging Face hub: an id, at a revision or the newest, becomes a folder on this machine.

The hub's own client fetches and keeps the files, so its settings hold (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE`). Only tensors, JSON and texts are taken: nothing that could run.
"""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from minigpt4.errors import DownloadError

HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.md"]


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form `owner/name` or `owner/name@revision`."""
    return HUB_ID.fullmatch(name) is not None


def hub_folder(name: str) -> Path:
    """Return the folder of a model of the hub, fetching what is not here yet.

    Args:
        name: `owner/name` or `owner/name@revision`; see `is_hub_id`.

    Raises:
        DownloadError: The hub has no such model, does not show it to this user, or cannot be reached, and it is not
            here from before.
    """
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise DownloadError(f"{name!r} is no id of a hub, expected owner/name or owner/name@revision")
    try:
        return Path(snapshot_download(match["repository"], revision=match["revision"], allow_patterns=FILES))
    except (OSError, ValueError) as error:  # the client's own errors are kinds of these
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__
        raise DownloadError(
            f"model {name} is not here and the hub does not give it: {reason}",
            hint="check the name and the network, `hf auth login` for private models, or name a folder",
        ) from error
