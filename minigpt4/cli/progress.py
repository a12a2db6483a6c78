"""Progress on standard error: bars on a terminal, else lines; of training, of downloads, of anything counted."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from minigpt4.cli.console import is_watched, note
from minigpt4.text import counted

if TYPE_CHECKING:
    from minigpt4.training.loop import Progress

    Show = Callable[[Progress, str, list[str]], None]


WINDOW = 50
"""Rates are those of so many last steps."""

LINE_SECONDS = 60.0
SECONDS_A_LINE = 30.0
"""Seconds between lines of progress where there is no terminal."""


@contextmanager
def training_bar(line_seconds: float = LINE_SECONDS) -> "Iterator[Callable[[Progress], None]]":
    """Show a run's progress on standard error: a bar a stage on a terminal, else lines.

    Args:
        line_seconds: Without a terminal, a line after so many seconds of steps, and for a stage's first and last step.

    Yields:
        To be told of every step.
    """
    recent: deque[Progress] = deque(maxlen=WINDOW)
    shown: list[Show] = []
    beside = _Beside()
    with ExitStack() as stack:

        def report(progress: "Progress") -> None:
            if not shown:  # not before the first step: until then the terminal belongs to what loads
                shown.append(stack.enter_context(_bars()) if is_watched() else _lines(line_seconds))
            if recent and recent[-1].stage != progress.stage:
                recent.clear()
            if not recent:
                beside.begin()
            recent.append(progress)
            shown[0](progress, time_left(recent, beside.seconds(progress)), figures(recent))

        yield report


def figures(recent: "deque[Progress]") -> list[str]:
    """Write what is worth knowing of the last step, and the rates of the last steps; what is not known is left out."""
    last = recent[-1]
    seconds = sum(step.seconds for step in recent)
    shown = [f"loss {last.loss:.3f}" + (" (skipped)" if last.skipped else ""), f"accuracy {last.accuracy:.0%}"]
    if seconds > 0:
        rates = {"steps": len(recent), "images": sum(s.images for s in recent), "tokens": sum(s.tokens for s in recent)}
        shown += [f"{_three_digits(count / seconds)} {name}/s" for name, count in rates.items() if count]
    if last.memory_bytes:
        shown.append(f"{last.memory_bytes / 1e9:.1f} GB")
    return shown


class _Beside:
    """What a step takes besides its own time on average: its share of validations, checkpoints and the like."""

    def begin(self) -> None:
        """Count from the first step that is told of a stage, whose own beginning nobody saw."""
        self._began = time.monotonic()
        self._own = 0.0
        self._steps = -1

    def seconds(self, progress: "Progress") -> float:
        """Return it, once a step is done."""
        self._steps += 1
        if not self._steps:
            return 0.0
        self._own += progress.seconds
        return max(time.monotonic() - self._began - self._own, 0.0) / self._steps


def time_left(recent: "deque[Progress]", beside: float = 0.0) -> str:
    """Write how long the rest of the stage will take at the rate of the last steps, `beside` a step not their own."""
    last = recent[-1]
    if last.step == last.steps:
        return "done"
    own = sum(step.seconds for step in recent) / len(recent)
    seconds = round((last.steps - last.step) * (own + beside))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02} left"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _lines(line_seconds: float) -> "Show":
    silent: dict[str, float] = {}  # seconds of each stage since its last line

    def show(progress: "Progress", left: str, shown: list[str]) -> None:
        first = progress.stage not in silent  # the first of this start of the run
        silent[progress.stage] = silent.get(progress.stage, 0.0) + progress.seconds
        if first or silent[progress.stage] >= line_seconds or progress.step == progress.steps:
            silent[progress.stage] = 0.0
            note(", ".join([f"{progress.stage} {progress.step:,} of {progress.steps:,}", *shown, left]))

    return show


@contextmanager
def _bars() -> "Iterator[Show]":
    """Show a bar a stage, and below the last one the figures, which have a line of their own in a narrow terminal."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    bars = Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    below = Text("", no_wrap=True, overflow="ellipsis")
    tasks: dict[str, Any] = {}
    with Live(Group(bars, below), console=Console(stderr=True), refresh_per_second=4):

        def show(progress: "Progress", left: str, shown: list[str]) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, total=progress.steps, left=left)
            bars.update(tasks[progress.stage], completed=progress.step, left=left)
            below.plain = "  ".join(shown)

        yield show


@contextmanager
def counting_bar(unit: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Show on standard error how much is done of what takes long, how fast, and the time left.

    On a terminal a bar, which goes when all is done, so that the terminal is free for others. Elsewhere a line now and
    then: nothing of what is soon done, unless it is something that people count.

    Args:
        unit: The name of one of what people count, such as a picture; empty where it is no matter.
    """
    begun: dict[str, tuple[float, int]] = {}
    told: dict[str, float] = {}
    tasks: dict[str, Any] = {}
    with ExitStack() as stack:
        bar = _counting_columns(unit) if is_watched() else None
        if bar is not None:
            stack.callback(bar.stop)

        def report(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            began, before = begun.setdefault(what, (now, done))
            seconds = now - began
            rate = (done - before) / seconds if seconds > 0 else 0.0
            if bar is not None:
                if not tasks:
                    bar.start()  # not before: the terminal belongs to others
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total or None, rate=0.0)
                bar.update(tasks[what], completed=done, total=total or None, rate=rate)
                if done == total:
                    bar.remove_task(tasks.pop(what))
                if not tasks:
                    bar.stop()
            elif now - told.get(what, began) > SECONDS_A_LINE or (done == total and (unit or what in told)):
                told[what] = now
                left = f", {(total - done) / rate:.0f} s left" if done < total and rate else ""
                of = f" of {counted(total, unit) if unit else f'{total:,}'}" if total else ""
                note(f"{what}  {done:,}{of}" + (f"  {rate:.1f} a second{left}" if rate else ""))
            if done == total:
                begun.pop(what)
                told.pop(what, None)

        yield report


def _counting_columns(unit: str) -> Any:  # noqa: ANN401  (rich.progress.Progress, which loads here)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} " + (f"{unit}s/s" if unit else "a second"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


@contextmanager
def parts_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show fetching and converting on standard error: a bar on a terminal, else a line for each thing done."""
    tasks: dict[str, Any] = {}
    with ExitStack() as stack:

        def report(what: str, done: int, total: int) -> None:
            if not is_watched():
                if tasks.setdefault(what, done) is done:
                    note(what)
                return
            if not tasks:
                tasks[""] = stack.enter_context(_download_bar())
            bar = tasks[""]
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total or None)
            bar.update(tasks[what], completed=done, total=total or None)

        yield report


def _download_bar() -> Any:  # noqa: ANN401  (rich.progress.Progress, which loads here)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    return Progress(*columns, console=Console(stderr=True), transient=True)
