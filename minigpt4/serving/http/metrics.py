"""What a server counts, for Prometheus; a registry of its own, so that several servers of a process do not mix."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # they load torch
    from minigpt4.chat import Answer
    from minigpt4.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_RATES = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "minigpt4_http_requests", "Responses sent.", ["method", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "minigpt4_time_to_first_token_seconds", "From the request to the first token of its answer.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.answer = Histogram(
            "minigpt4_answer_seconds", "From the request to the end of its answer.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rate = Histogram(
            "minigpt4_tokens_per_second", "Of one answer, after its first token.",
            buckets=_RATES, registry=self.registry,
        )  # fmt: skip
        self.image = Histogram(
            "minigpt4_image_encode_seconds", "Vision encoder and Q-Former, for pictures that were not known yet.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("minigpt4_prompt_tokens", "Read, cached ones too.", registry=self.registry)
        self.cached_tokens = Counter(
            "minigpt4_cached_prompt_tokens", "Not read again: an earlier turn had them.", registry=self.registry
        )
        self.tokens = Counter("minigpt4_completion_tokens", "Said.", registry=self.registry)
        self.images = Counter("minigpt4_images", "Asked about.", ["cache"], registry=self.registry)
        self.decoder_deaths = Counter(
            "minigpt4_decoder_deaths", "Children that died or were ended over a picture.", registry=self.registry
        )

    def watch(self, engine: "Engine") -> None:
        """Count what an engine does from now on."""
        self.registry.register(_EngineCollector(engine))
        engine.on_image = self.saw_image

    def saw_image(self, seconds: float, cached: bool) -> None:
        """Count a picture."""
        self.images.labels("hit" if cached else "miss").inc()
        if not cached:
            self.image.observe(seconds)

    def answered(self, answer: "Answer") -> None:
        """Count an answer that has ended."""
        self.prompt_tokens.inc(answer.prompt_tokens)
        self.cached_tokens.inc(answer.cached_tokens)
        self.tokens.inc(answer.completion_tokens)
        self.answer.observe(answer.seconds)
        if answer.completion_tokens:
            self.first_token.observe(answer.seconds_to_first_token)
        saying = answer.seconds - answer.seconds_to_first_token
        if answer.completion_tokens > 1 and saying > 0:
            self.rate.observe((answer.completion_tokens - 1) / saying)

    def text(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads an engine's own counts when it is asked."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        counts = self.engine.counts
        yield GaugeMetricFamily("minigpt4_requests_waiting", "In the queue.", counts.waiting)
        yield GaugeMetricFamily("minigpt4_requests_answering", "Being answered.", counts.answering)
        ends = CounterMetricFamily("minigpt4_requests", "Requests by how they ended.", labels=["outcome"])
        for outcome in ("accepted", "completed", "cancelled", "failed", "refused"):
            ends.add_metric([outcome], getattr(counts, outcome))
        yield ends
