"""The tiny model with the page at a given port, a little slower than it could be: `python -m ... PORT`.

A test kills it in the middle of an answer, which one in the test's own process would not survive.
"""

import sys
import time

from minigpt4.serving.page import read_page
from tests.inference.slowness import slow_steps
from tests.serving.live import live

SECONDS = 0.06
"""For a token: slow enough to be seen arriving; the tiny model says some fifty of them."""


if __name__ == "__main__":
    with live(page=read_page(), port=int(sys.argv[1])) as server:
        slow_steps(server.engine, SECONDS)
        print("ready", flush=True)
        while True:
            time.sleep(1)
