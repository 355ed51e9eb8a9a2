"""What /metrics tells: the engine's own counters read at scrape time, and the latencies that clients see.

The names are vLLM's behind `cadenza:`, so that existing dashboards need only a new prefix.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cadenza.decoding.request import Delta, Event

if TYPE_CHECKING:
    from cadenza.decoding import EngineStats
    from cadenza.server.service import Service

_GAUGES = {
    "num_requests_running": ("Requests that hold a place in the batch.", "num_running"),
    "num_requests_waiting": ("Requests that wait for a place.", "num_waiting"),
    "kv_cache_usage_perc": ("Share of the KV cache in use, 0 to 1.", "kv_cache_usage"),
}
_COUNTERS = {
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prefix_cache_queries"),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
    "prompt_tokens": ("Prompt tokens processed.", "prompt_tokens_total"),
    "generation_tokens": ("Tokens generated.", "generation_tokens_total"),
    "num_preemptions": ("Requests put back because the KV cache was full.", "num_preemptions"),
    "spec_decode_num_drafts": ("Times that tokens were drafted.", "spec_decode_num_drafts"),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", "spec_decode_num_draft_tokens"),
    "spec_decode_num_accepted_tokens": (
        "Drafted tokens that the model confirmed.",
        "spec_decode_num_accepted_tokens",
    ),
}
_FIRST_TOKEN_BUCKETS = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_REQUEST_BUCKETS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0)


class _EngineCollector(Collector):
    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        engine = self._service.loaded
        if engine is None:
            return
        stats: EngineStats = engine.stats()
        labels = [self._service.model_names[0]]
        for name, (help_text, attribute) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"cadenza:{name}", help_text, labels=["model_name"])
            gauge.add_metric(labels, float(getattr(stats, attribute)))
            yield gauge
        for name, (help_text, attribute) in _COUNTERS.items():
            counter = CounterMetricFamily(f"cadenza:{name}", help_text, labels=["model_name"])
            counter.add_metric(labels, float(getattr(stats, attribute)))
            yield counter
        info = engine.description.cache_config
        gauge = GaugeMetricFamily(
            "cadenza:cache_config_info",
            "How the KV cache is divided; always 1.",
            labels=["model_name", *info],
        )
        gauge.add_metric([*labels, *info.values()], 1.0)
        yield gauge
        if engine.adapters is not None:
            yield _adapters(stats, engine.config.max_loras)


def _adapters(stats: "EngineStats", max_loras: int) -> Metric:
    """vLLM's gauge, which routers choose a server by: names in labels, the time as its value."""
    gauge = GaugeMetricFamily(
        "cadenza:lora_requests_info",
        "Adapters that requests run or wait with, and how many a step has room for; the value is the time.",
        labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
    )
    names = [",".join(sorted(set(each))) for each in (stats.running_adapters, stats.waiting_adapters)]
    gauge.add_metric([*names, str(max_loras)], time.time())
    return gauge


class ServerMetrics:
    """One registry per server, so that two servers in one process do not mix their numbers."""

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(service))
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one choice.", _TOKEN_BUCKETS
        )
        self.request_latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_BUCKETS
        )

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"cadenza:{name}", help_text, ["model_name"], buckets=buckets, registry=self._registry
        )

    @property
    def model_name(self) -> str:
        return self._service.model_names[0]

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class RequestTimer:
    """The latencies of one prompt's choices. Deltas that bring several tokens count as so many intervals."""

    def __init__(self, metrics: ServerMetrics) -> None:
        name = metrics.model_name
        self._first_token = metrics.time_to_first_token.labels(name)
        self._between_tokens = metrics.inter_token_latency.labels(name)
        self._whole = metrics.request_latency.labels(name)
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}

    def observe(self, event: Event) -> None:
        if not isinstance(event, Delta) or not event.token_ids:
            return
        now = time.perf_counter()
        if not self._last:
            self._first_token.observe(now - self._start)
        if event.index in self._last:
            interval = (now - self._last[event.index]) / len(event.token_ids)
            for _ in event.token_ids:
                self._between_tokens.observe(interval)
        self._last[event.index] = now

    def finish(self) -> None:
        self._whole.observe(time.perf_counter() - self._start)
