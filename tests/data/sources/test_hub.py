"""A data set of the hub is taken from the hub's cache without a network, and its absence is one sentence."""

from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from minigpt4.data.sources import open_source
from minigpt4.data.sources.hub import FILES
from minigpt4.data.sources.safe_files import BadRecordError
from minigpt4.errors import DownloadError
from tests.data.sources.source_files import picture, samples, shard, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set `someone/cats` in the cache of the hub's client, which has no network; its files are links."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "datasets--someone--cats"
    write(repository / "refs" / "main", COMMIT)
    write(tmp_path / "secret.jpg", b"secret")
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def link(snapshot: Path, name: str, content: bytes) -> None:
    blob = write(snapshot.parents[1] / "blobs" / name.replace("/", "-"), content)
    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
    (snapshot / name).symlink_to(blob)


@pytest.mark.parametrize("name", ["hub:someone/cats", "hub:someone/cats@main", f"hub:someone/cats@{COMMIT}"])
def test_folder_of_pictures_is_read_through_the_caches_links(name: str, snapshot: Path) -> None:
    link(snapshot, "metadata.csv", b"file_name,text\ntrain/a.jpg,a cat\nb.jpg,outside\n")
    link(snapshot, "train/a.jpg", picture())
    (snapshot / "b.jpg").symlink_to(snapshot.parents[2] / "secret.jpg")

    source = open_source(name)

    assert source.name == name
    assert source.read(0).picture == picture()
    with pytest.raises(BadRecordError, match="is a link out of the folder"):
        source.read(1)


def test_shards_in_a_folder_of_the_data_set_are_read(snapshot: Path, tmp_path: Path) -> None:
    link(snapshot, "data/train-0.tar", shard(tmp_path / "x.tar", samples(2)).read_bytes())
    link(snapshot, "data/test-0.tar", b"")

    source = open_source("hub:someone/cats")

    assert source.read(1).key == "data/train-0.tar:000000001"


def test_files_are_fetched_in_large_and_small_letters_and_nothing_that_runs() -> None:
    there = ["a/1.JPG", "1.gif", "a.Parquet", "README.md", "load.py", "x.jpg.exe", "b.ndjson"]

    assert list(filter_repo_objects(there, allow_patterns=FILES)) == ["a/1.JPG", "1.gif", "a.Parquet", "b.ndjson"]


@pytest.mark.parametrize("name", ["hub:someone/dogs", "hub:someone/cats@v2"])
def test_data_set_that_is_not_here_is_one_sentence(name: str, snapshot: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"^the data set someone/.* is not here, and the hub does not give it: ."
    ) as told:
        open_source(name)

    assert "\n" not in told.value.message and told.value.hint


@pytest.mark.parametrize("name", ["hub:", "hub:cats", "hub:a/b/c", "hub:../x", "hub:a/b@"])
def test_name_that_is_no_id_is_refused(name: str) -> None:
    with pytest.raises(DownloadError, match="is no id of a hub, expected hub:owner/name"):
        open_source(name)
