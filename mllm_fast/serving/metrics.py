"""Metrics of the server, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from .service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one application.

    Args:
        service: The service whose engine and store are read at each scrape. None reports the requests only.
    """

    def __init__(self, service: Service | None = None):
        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry}
        self.requests = Histogram(
            "mllm_fast_request_seconds",
            "Requests, from first to last byte.",
            ["route", "status"],
            buckets=_SECONDS,
            **made,
        )
        self.first_token = Histogram(
            "mllm_fast_first_token_seconds", "Time to the first words of an answer.", buckets=_SECONDS, **made
        )
        self.prompt_tokens = Counter("mllm_fast_prompt_tokens", "Tokens of prompts.", **made)
        self.cached_tokens = Counter(
            "mllm_fast_cached_tokens", "Of these, tokens read for an earlier question.", **made
        )
        self.answer_tokens = Counter("mllm_fast_answer_tokens", "Tokens of answers.", **made)
        if service is not None:
            self._registry.register(_Looking(service))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Looking(Collector):
    """Reads the counters of the engine and of the store at each scrape."""

    def __init__(self, service: Service):
        engine, store = service.engine, service.store
        self._gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "mllm_fast_queue_depth": ("Requests without a place in the batch.", lambda: engine.waiting),
            "mllm_fast_batch_rows": ("Sequences that are decoded together.", lambda: engine.running),
            "mllm_fast_batch_bytes": ("Bytes of keys and values in the batch.", lambda: engine.nbytes),
            "mllm_fast_contexts": ("Contexts in memory.", store.count),
            "mllm_fast_context_bytes": ("Bytes of contexts in memory.", lambda: store.nbytes),
        }
        self._counters: dict[str, tuple[str, Callable[[], float]]] = {
            "mllm_fast_passes": ("Passes of the batch.", lambda: engine.scheduler.passes),
            "mllm_fast_decoded_tokens": ("Tokens of all passes.", lambda: engine.scheduler.tokens),
            "mllm_fast_context_hits": ("Contexts that were found.", lambda: store.hits),
            "mllm_fast_context_misses": ("Contexts that were made.", lambda: store.misses),
        }

    def collect(self) -> Iterable[Any]:
        for name, (words, value) in self._gauges.items():
            yield GaugeMetricFamily(name, words, value())
        for name, (words, value) in self._counters.items():
            yield CounterMetricFamily(name, words, value())
