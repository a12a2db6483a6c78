"""Metrics of a server for Prometheus, in a registry of its own, so that several servers of a process do not mix."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minigpt4.serving.pictures import PicturePool

if TYPE_CHECKING:  # they load torch
    from minigpt4.inference.engine import Engine
    from minigpt4.inference.request import Request

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics(Collector):
    """Metrics of one server: its own, and the counts of engine and decoders, read when they are asked for.

    Args:
        pool: Counts its lost decoders.
    """

    def __init__(self, pool: PicturePool) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.pool = pool
        self.engine: Engine | None = None
        self.refused = 0
        """Requests refused before the engine was asked, which counts those that it refuses itself."""
        self.requests = self._counter(
            "http_requests", "Responses begun, by status; 499: the client had left.", "method", "status"
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From joining the queue to the first token, of every answer that began."
        )
        self.answer = self._histogram(
            "answer_seconds",
            "From joining the queue to the end, of whole answers; cancelled and failed ones have none.",
        )
        self.rate = self._histogram(
            "tokens_per_second", "Of one answer after its first token; a beam search says all at once and is left out.",
            _RATES,
        )  # fmt: skip
        self.image = self._histogram(
            "image_encode_seconds", "Vision encoder and Q-Former, for pictures that were not known yet."
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Read for answers that began, cached ones too.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Not read again: an earlier turn had them.")
        self.tokens = self._counter("completion_tokens", "Said.")
        self.images = self._counter(
            "images", "Read for answers; hit: was known, though in another conversation.", "cache"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"minigpt4_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"minigpt4_{name}", text, buckets=buckets, registry=self.registry)

    def watch(self, engine: "Engine") -> None:
        """Count what an engine does from now on."""
        self.engine = engine
        engine.on_image = self.saw_image

    def saw_image(self, seconds: float, cached: bool) -> None:
        """Count a picture."""
        self.images.labels("hit" if cached else "miss").inc()
        if not cached:
            self.image.observe(seconds)

    def answered(self, request: "Request", error: BaseException | None) -> None:
        """Count an answer that the engine has ended: whole, cancelled or failed.

        Args:
            request: With its answer, which the engine changes no more.
            error: Why it failed.
        """
        answer = request.answer
        self.tokens.inc(answer.completion_tokens)
        if error is None and answer.finish_reason != "cancelled":
            self.answer.observe(answer.seconds)
        if not answer.completion_tokens:
            return  # nothing of it was read, or nothing came of it
        self.prompt_tokens.inc(answer.prompt_tokens)
        self.cached_tokens.inc(answer.cached_tokens)
        self.first_token.observe(answer.seconds_to_first_token)
        saying = answer.seconds - answer.seconds_to_first_token
        if answer.completion_tokens > 1 and saying > 0 and request.options["num_beams"] == 1:
            self.rate.observe((answer.completion_tokens - 1) / saying)

    def collect(self) -> Iterable[Metric]:
        """Yield the counts of others."""
        text = "Children that died or were ended over a picture."
        yield CounterMetricFamily("minigpt4_decoder_deaths", text, self.pool.deaths)
        if self.engine is None:
            return
        counts = self.engine.counts
        yield GaugeMetricFamily("minigpt4_requests_waiting", "In the queue.", counts.waiting)
        yield GaugeMetricFamily("minigpt4_requests_answering", "Being answered.", counts.answering)
        text = "Answers accepted, and how they ended; refused: 429, never accepted."
        ends = CounterMetricFamily("minigpt4_requests", text, labels=["outcome"])
        for outcome in ("accepted", "completed", "cancelled", "failed"):
            ends.add_metric([outcome], getattr(counts, outcome))
        ends.add_metric(["refused"], counts.refused + self.refused)
        yield ends

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
