"""Data sets of the Hugging Face hub: `owner/name` or `owner/name@revision` becomes a folder on this machine.

The hub's own client fetches and keeps the files, with its settings (`HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, ...).
Lists, tables, shards and pictures are taken, and nothing that could run.
"""

from pathlib import Path

from minigpt4.data.sources.formats import Report
from minigpt4.data.sources.safe_files import PICTURE_SUFFIXES
from minigpt4.errors import DownloadError
from minigpt4.text import first_line
from minigpt4.weights.hub import HUB_ID

_ENDINGS = (".parquet", ".tar", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", *PICTURE_SUFFIXES)
FILES = ["*" + "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in ending) for ending in _ENDINGS]
"""Patterns of what is fetched, in large or small letters."""


def dataset_folder(name: str, report: Report | None = None) -> Path:
    """Return the folder of a data set of the hub, fetching what is not here yet.

    Args:
        name: `owner/name` or `owner/name@revision`.
        report: Called when the hub is asked.

    Raises:
        DownloadError: There is no such data set, or it is not here and cannot be fetched.
    """
    match = HUB_ID.fullmatch(name)
    if match is None:
        raise DownloadError(
            f"hub:{name} is no id of a hub, expected hub:owner/name or hub:owner/name@revision",
            "the id is in the address of the data set's page; a folder here is named without hub:",
        )
    # The client reads its settings when it is first imported.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, as it was built

    if report and not constants.HF_HUB_OFFLINE:
        report(f"asking the hub for {name}", 0, 0)
    try:
        folder = snapshot_download(
            match["repository"], repo_type="dataset", revision=match["revision"], allow_patterns=FILES
        )
    except (OSError, ValueError, HTTPError) as error:  # the client's own errors are kinds of these
        raise DownloadError(
            f"the data set {name} is not here, and the hub does not give it: {first_line(error)}",
            "check the name, the network and HF_HUB_OFFLINE, `hf auth login` for private ones, or name a folder",
        ) from error
    return Path(folder)


def cache_of(snapshot: Path) -> Path:
    """Return the folder in which the client keeps a data set's files: those of a snapshot are links into it."""
    return snapshot.parents[1]
