"""A model of the hub is fetched, taken from the hub's cache without a network, or refused with the reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from minigpt4 import load
from minigpt4.errors import DownloadError, StorageError, WeightsError
from minigpt4.weights.hub import hub_folder, is_hub_id, is_on_hub
from tests import tiny_chat
from tests.weights import hub_server, tiny_nano
from tests.weights.hub_server import COMMIT, Hub


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which has no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model that has no files yet, and a client that may ask it."""
    (tmp_path / "served").mkdir()
    with hub_server.running(tmp_path / "served") as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def one_sentence(error: DownloadError | StorageError) -> bool:
    return "\n" not in error.message and not error.message.endswith(".") and bool(error.hint)


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


def test_full_folder_is_fetched_once_and_works_without_network_afterwards(hub: Hub) -> None:
    tiny_chat.saved(hub.folder)
    said: list[str] = []

    model, _ = load("someone/tiny", device="cpu", report=lambda what, done, total: said.append(what))

    assert model.config.name_or_path.endswith(COMMIT)
    assert said == ["asking the hub for someone/tiny"]
    asked = len(hub.asked)
    assert sum("model.safetensors" in path for path in hub.asked) <= 2  # its size, its content
    assert load("someone/tiny", device="cpu")[0].config.name_or_path == model.config.name_or_path
    assert len(hub.asked) == asked + 1  # whether there is a newer one
    hub.shutdown()
    hub.server_close()
    assert load("someone/tiny", device="cpu")[0].config.name_or_path == model.config.name_or_path


def test_alignment_of_the_hub_is_joined_with_its_parts(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_nano.stand_in_for_the_parts(monkeypatch)
    original = tiny_nano.language_model(tmp_path / "original")
    local = tiny_nano.alignment(tmp_path / "alignment", original)
    for path in local.iterdir():
        path.rename(hub.folder / path.name)
    (hub.folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    (hub.folder / "train.py").write_text("raise SystemExit")

    model, processor = load("someone/tiny", language_model=original, device="cpu")

    assert model.model.language_projection.bias.unique().tolist() == [0.5]
    assert processor.image_token_id == model.config.image_token_id
    assert not any("train.py" in path for path in hub.asked)


@pytest.mark.parametrize("name", ["someone/tiny", "someone/tiny@v2"])
def test_model_that_is_not_here_and_may_not_be_fetched(name: str) -> None:
    with pytest.raises(DownloadError, match=f"^model {name} is not here in full, and HF_HUB_OFFLINE") as told:
        hub_folder(name)

    assert one_sentence(told.value)
    assert "unset HF_HUB_OFFLINE" in told.value.hint


def test_hub_that_cannot_be_reached(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()

    with pytest.raises(DownloadError, match=r"^model someone/tiny is not here in full, and the hub cannot be") as told:
        hub_folder("someone/tiny")

    assert one_sentence(told.value)
    assert "connect to the network" in told.value.hint


def test_model_that_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"^the hub has no model someone/other, or does not show") as told:
        hub_folder("someone/other")

    assert one_sentence(told.value)
    assert "check the name, `hf auth login`" in told.value.hint


def test_revision_that_the_hub_does_not_have(hub: Hub) -> None:
    tiny_chat.saved(hub.folder)

    with pytest.raises(DownloadError, match=r"^model someone/tiny of the hub has no revision v2") as told:
        hub_folder("someone/tiny@v2")

    assert one_sentence(told.value)
    assert "leave out @v2" in told.value.hint


def test_gated_model(hub: Hub) -> None:
    (hub.folder / "config.json").write_text("{}")
    hub.gated = True

    with pytest.raises(DownloadError, match=r"^model someone/tiny is gated") as told:
        hub_folder("someone/tiny")

    assert one_sentence(told.value)
    assert f"conditions on {hub.address}/someone/tiny" in told.value.hint


@pytest.mark.parametrize("status", [403, 503])
def test_hub_that_fails_is_quoted(status: int, hub: Hub) -> None:
    hub.status = status

    with pytest.raises(DownloadError, match=r"^the hub does not give model someone/tiny: .") as told:
        hub_folder("someone/tiny")

    assert one_sentence(told.value)
    assert "HF_TOKEN" in told.value.hint


def test_cache_that_cannot_be_written(hub: Hub, cache: Path) -> None:
    (hub.folder / "config.json").write_text("{}")
    cache.write_text("a file")

    with pytest.raises(StorageError, match=f"^cannot write `{cache}") as told:
        hub_folder("someone/tiny")

    assert one_sentence(told.value)
    assert "HF_HOME" in told.value.hint


def test_a_folder_comes_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "someone" / "tiny").mkdir(parents=True)

    assert not is_on_hub("someone/tiny")
    assert is_on_hub("someone/other")
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
        ("/owner/name", False),
        ("owner/name@", False),
        ("owner/name@-x", False),
        ("owner/name\n", False),
        ("", False),
    ],
)
def test_what_looks_like_an_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
