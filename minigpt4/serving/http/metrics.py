"""What a server counts, for Prometheus; a registry of its own, so that several servers of a process do not mix."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minigpt4.serving.pictures.pool import PicturePool

if TYPE_CHECKING:  # they load torch
    from minigpt4.inference.engine import Engine
    from minigpt4.inference.request import Request

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The counters of one server.

    Args:
        pool: Counts its own losses.
    """

    def __init__(self, pool: PicturePool) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_PoolCollector(pool))
        self.refused = 0
        """Answers refused for want of room before the engine was asked, which counts those that it refuses."""
        self.requests = Counter(
            "minigpt4_http_requests", "Responses begun, by status; 499: the client had left.", ["method", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "minigpt4_time_to_first_token_seconds",
            "From joining the queue to the first token, of every answer that began.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.answer = Histogram(
            "minigpt4_answer_seconds",
            "From joining the queue to the end, of whole answers; cancelled and failed ones have none.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rate = Histogram(
            "minigpt4_tokens_per_second",
            "Of one answer after its first token; a beam search says all of it at once and is left out.",
            buckets=_RATES, registry=self.registry,
        )  # fmt: skip
        self.image = Histogram(
            "minigpt4_image_encode_seconds", "Vision encoder and Q-Former, for pictures that were not known yet.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "minigpt4_prompt_tokens", "Read for answers that began, cached ones too.", registry=self.registry
        )
        self.cached_tokens = Counter(
            "minigpt4_cached_prompt_tokens", "Not read again: an earlier turn had them.", registry=self.registry
        )
        self.tokens = Counter("minigpt4_completion_tokens", "Said.", registry=self.registry)
        self.images = Counter(
            "minigpt4_images", "Read for answers; hit: was known, though in another conversation.", ["cache"],
            registry=self.registry,
        )  # fmt: skip

    def watch(self, engine: "Engine") -> None:
        """Count what an engine does from now on."""
        self.registry.register(_EngineCollector(engine, self))
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

    def text(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads an engine's own counts when it is asked, and adds whom it never heard of."""

    def __init__(self, engine: "Engine", metrics: Metrics) -> None:
        self.engine = engine
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        counts = self.engine.counts
        yield GaugeMetricFamily("minigpt4_requests_waiting", "In the queue.", counts.waiting)
        yield GaugeMetricFamily("minigpt4_requests_answering", "Being answered.", counts.answering)
        ends = CounterMetricFamily(
            "minigpt4_requests",
            "Answers accepted, and how they ended; refused: 429, never accepted.",
            labels=["outcome"],
        )
        for outcome in ("accepted", "completed", "cancelled", "failed"):
            ends.add_metric([outcome], getattr(counts, outcome))
        ends.add_metric(["refused"], counts.refused + self.metrics.refused)
        yield ends


class _PoolCollector(Collector):
    """Reads a pool's own count: requests beside each other would each count the same child."""

    def __init__(self, pool: PicturePool) -> None:
        self.pool = pool

    def collect(self) -> Iterable[Metric]:
        said = "Children that died or were ended over a picture."
        yield CounterMetricFamily("minigpt4_decoder_deaths", said, self.pool.deaths)
