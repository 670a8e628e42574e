"""What a server counts, as Prometheus reads it."""

from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mmrm_fast.data.packing import PackedBatch


class Work(NamedTuple):
    """What a replica has computed since it last told."""

    batches: int = 0
    tokens: int = 0
    tokens_unshared: int = 0

    def plus(self, batch: PackedBatch) -> "Work":
        """With one more forward."""
        num_tokens = len(batch.main.source_T)
        return Work(self.batches + 1, self.tokens + num_tokens, self.tokens_unshared + batch.main.num_tokens_unshared)


class Metrics:
    """Prometheus metrics of the server and, as far as they have told, of its replicas."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "mmrm"}
        self.requests = Counter("requests", "Requests by path and status; 499: the client hung up.", ("path", "status"),
                                **own)  # fmt: skip
        self.seconds = Histogram("request_seconds", "Time from request to answer.", ("path",), **own)
        self.in_flight = Gauge("requests_in_flight", "Requests at work.", **own)
        self.responses = Counter("responses", "Responses that got a reward.", **own)
        self.work = Work(
            batches=Counter("batches", "Forwards of the model.", **own),
            tokens=Counter("tokens", "Tokens that went through the model.", **own),
            tokens_unshared=Counter("tokens_unshared", "Tokens as if no prefix were shared.", **own),
        )

    def count(self, num_responses: int, work: Work) -> None:
        """Count an answer and what came with it."""
        self.responses.inc(num_responses)
        for counter, amount in zip(self.work, work, strict=True):
            counter.inc(amount)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
