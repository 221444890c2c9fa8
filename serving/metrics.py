"""What the service counts, in Prometheus' words."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """
    Counters of one service, in a registry of their own.

    Attributes:
        inside: requests that are being answered.
        waiting: queries in the queue.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        PlatformCollector(registry=self.registry)
        own = {"registry": self.registry}
        self._requests = Counter("altmoe_requests", "Searches answered, by HTTP status.", ["status"], **own)
        self._seconds = Histogram("altmoe_request_seconds", "From a request to its answer.", buckets=SECONDS, **own)
        self._stages = Histogram(
            "altmoe_stage_seconds",
            "One stage: read a request, or encode, connect, search a batch.",
            ["stage"],
            buckets=SECONDS,
            **own,
        )
        self._batches = Histogram("altmoe_batch_size", "Queries a batch.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **own)
        self.inside = Gauge("altmoe_requests_inside", "Searches being answered now.", **own)
        self.waiting = Gauge("altmoe_queue_length", "Queries that wait for the next batch.", **own)

    def request(self, status: int, seconds: float) -> None:
        """A request was answered; status 0 where its client had gone."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        """A stage took so long."""
        self._stages.labels(name).observe(seconds)

    def batch(self, size: int, seconds: dict[str, float]) -> None:
        """A batch was answered."""
        self._batches.observe(size)
        for name, value in seconds.items():
            self.stage(name, value)

    def text(self) -> bytes:
        """All of it, for `GET /metrics`."""
        return generate_latest(self.registry)
