"""What GET /metrics tells, in a registry of its own, so that several apps in one process do not mix."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from jaxembed.types import Bucket

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self._requests = Counter("jaxembed_requests_total", "Requests answered", ["route", "status"], registry=own)
        self._latency = Histogram(
            "jaxembed_request_seconds", "Time from request to answer", ["route"], buckets=LATENCY, registry=own
        )
        # To look labels up costs more than to count.
        self._answers: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._tokens = Counter("jaxembed_tokens_total", "Real tokens run on the device", registry=own)
        self._padded = Counter("jaxembed_padded_tokens_total", "Tokens computed, padding included", registry=own)
        self._batches = Counter("jaxembed_batches_total", "Batches run", ["bucket"], registry=own)
        self._rows = Histogram("jaxembed_batch_rows", "Real rows of a batch", buckets=ROWS, registry=own)
        self._seconds = Histogram("jaxembed_batch_seconds", "Device time of a batch", buckets=LATENCY, registry=own)
        self._queued = Gauge("jaxembed_queue_tokens", "Tokens admitted and not yet answered", registry=own)
        self._ready = Gauge("jaxembed_ready", "1 while the server takes requests", registry=own)
        self._buckets = Gauge("jaxembed_compiled_buckets", "Shapes compiled", registry=own)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        found = self._answers.get((route, status))
        if found is None:
            found = self._requests.labels(route, str(status)), self._latency.labels(route)
            self._answers[route, status] = found
        counter, latency = found
        counter.inc()
        latency.observe(seconds)

    def batch(self, bucket: Bucket, rows: int, tokens: int, computed: int, seconds: float) -> None:
        """A batch was run."""
        self._batches.labels(str(bucket)).inc()
        self._rows.observe(rows)
        self._tokens.inc(tokens)
        self._padded.inc(computed)
        self._seconds.observe(seconds)

    def watch(self, *, queued: Callable[[], float], ready: Callable[[], float], buckets: Callable[[], float]) -> None:
        """Read these when /metrics is asked for."""
        for gauge, read in ((self._queued, queued), (self._ready, ready), (self._buckets, buckets)):
            gauge.set_function(read)

    def page(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)
