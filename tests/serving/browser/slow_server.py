"""The tiny model with the page at a given port, a little slower than it could be: `python -m ... PORT`.

A test kills it in the middle of an answer, which one in the test's own process would not survive.
"""

import sys
import time
from typing import Any

from minigpt4.serving.engine import Engine
from minigpt4.serving.page import read_page
from tests.serving.live import live

SECONDS = 0.06
"""For a token: slow enough to be seen arriving; the tiny model says some fifty of them."""


def slow_down(engine: Engine, seconds: float = SECONDS) -> None:
    step = engine._batch.step

    def slowly(*arguments: Any) -> Any:  # noqa: ANN401
        time.sleep(seconds)
        return step(*arguments)

    engine._batch.step = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    with live(page=read_page(), port=int(sys.argv[1])) as server:
        slow_down(server.engine)
        print("ready", flush=True)
        while True:
            time.sleep(1)
