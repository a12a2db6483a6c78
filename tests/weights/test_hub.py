"""A model of the hub is taken from the hub's cache without a network, and its absence is one sentence."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from minigpt4 import load
from minigpt4.errors import DownloadError, WeightsError
from minigpt4.weights.hub import is_hub_id
from tests import tiny_chat

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which has no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def put(cache: Path, revision: str) -> Path:
    """Lay a snapshot of `someone/tiny` into the cache as the hub's client does; return its folder."""
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("name", "revision"), [("someone/tiny", "main"), ("someone/tiny@v1", "v1"), (f"someone/tiny@{COMMIT}", "main")]
)
def test_model_in_the_cache_is_loaded(name: str, revision: str, cache: Path) -> None:
    snapshot = put(cache, revision)
    for path in tiny_chat.saved(cache / "full").iterdir():
        path.rename(snapshot / path.name)

    model, processor = load(name, device="cpu")

    assert Path(model.config.name_or_path) == snapshot
    assert processor.num_image_tokens == model.config.num_image_tokens


@pytest.mark.parametrize("name", ["someone/tiny", "someone/tiny@v2", "some--one/tiny"])
def test_model_that_is_not_here_is_refused_in_one_sentence(name: str, cache: Path) -> None:
    with pytest.raises(DownloadError, match=f"^model {name} is not here and the hub does not give it: .") as told:
        load(name)

    assert "\n" not in told.value.message
    assert not told.value.message.endswith(".")
    assert "name a folder" in told.value.hint


def test_model_of_another_revision_is_not_taken(cache: Path) -> None:
    put(cache, "main")

    with pytest.raises(DownloadError, match="someone/tiny@v2 is not here"):
        load("someone/tiny@v2")


def test_snapshot_that_is_no_model_is_refused(cache: Path) -> None:
    (put(cache, "main") / "README.md").write_text("a data set")

    with pytest.raises(WeightsError, match="someone/tiny on the hub is not a model folder"):
        load("someone/tiny")


def test_a_folder_comes_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "someone" / "tiny").mkdir(parents=True)

    with pytest.raises(WeightsError, match="someone/tiny is not a model folder: it has neither"):
        load("someone/tiny")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", True),
        ("owner/na.me-1_2@refs/pr/3", True),
        ("name", False),
        ("a/b/c", False),
        ("../name", False),
        ("/root/name", False),
        ("owner/name@", False),
        ("owner/name@-x", False),
        ("owner/name\n", False),
        ("", False),
    ],
)
def test_what_looks_like_an_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
