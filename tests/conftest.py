"""What every test may count on: one thread, a home of its own, and no network unless it asks.

A test that fetches a frozen part of a model carries the marker `network`. It alone keeps the machine's own
`MINIGPT4_HOME`, so that a part is fetched once and not once a test.
"""

import os
import signal

# Read by torch and the tokenizers when they are first imported, so it comes before any test module:
# pytest-xdist runs one process per core, and sums are bit-equal only for one number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
from hypothesis import settings

# A shell starts what runs in its background with SIGINT ignored, and programs that tests start would take it over.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A time limit per example would measure what else the machine is doing.
settings.register_profile("project", deadline=None)
if "CI" not in os.environ:  # there hypothesis chooses its own profile: fixed examples, no deadline
    settings.load_profile("project")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Open the network to the tests that are marked for it."""
    for item in items:
        if item.get_closest_marker("network"):
            item.add_marker(pytest.mark.enable_socket)


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The folder in which the package keeps what it fetches: empty for each test, the machine's for `network`."""
    if request.node.get_closest_marker("network"):
        return None
    folder = tmp_path_factory.mktemp("home")
    request.getfixturevalue("monkeypatch").setenv("MINIGPT4_HOME", str(folder))
    return folder
