"""What a server counts, as Prometheus reads it."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

WORK = {
    "responses": "Responses that got a reward.",
    "batches": "Forwards of the model.",
    "tokens": "Tokens that went through the model.",
    "tokens_unshared": "Tokens as if no prefix were shared.",
}


class Metrics:
    """Prometheus metrics of the server and, as far as they have told, of its replicas."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "mmrm"}
        labels = ("path", "status")
        self.requests = Counter("requests", "Requests by path and status; 499: the client hung up.", labels, **own)
        self.seconds = Histogram("request_seconds", "Time from request to answer.", ("path",), **own)
        self.in_flight = Gauge("requests_in_flight", "Requests at work.", **own)
        self.work = {name: Counter(name, what, **own) for name, what in WORK.items()}

    def count(self, work: Mapping[str, int]) -> None:
        for name, amount in work.items():
            self.work[name].inc(amount)
