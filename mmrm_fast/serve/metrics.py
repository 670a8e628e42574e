"""What a server counts, as Prometheus reads it."""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess, values

from mmrm_fast.data.packing import PackedBatch


class Metrics:
    """Prometheus metrics; with `PROMETHEUS_MULTIPROC_DIR` they are those of all replicas on the machine."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "mmrm"}
        self.requests = Counter("requests", "Requests by path and status.", ("path", "status"), **own)
        self.seconds = Histogram("request_seconds", "Time from request to answer.", ("path",), **own)
        self.in_flight = Gauge("requests_in_flight", "Requests at work.", multiprocess_mode="livesum", **own)
        self.responses = Counter("responses", "Responses that got a reward.", **own)
        self.tokens = Counter("tokens", "Tokens that went through the model.", **own)
        self.tokens_unshared = Counter("tokens_unshared", "Tokens as if no prefix were shared.", **own)
        self.batches = Counter("batches", "Forwards of the model.", **own)

    def count_batch(self, batch: PackedBatch) -> None:
        """Count one forward."""
        self.batches.inc()
        self.tokens.inc(len(batch.main.source_T))
        self.tokens_unshared.inc(batch.main.num_tokens_unshared)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        registry = self.registry
        if values.ValueClass is not values.MutexValue:
            registry = CollectorRegistry()
            forget_dead(os.environ["PROMETHEUS_MULTIPROC_DIR"])
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)


def forget_dead(folder: str) -> None:
    """Drop the gauges of replicas that were killed: what they had at work is no longer."""
    for path in Path(folder).glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            multiprocess.mark_process_dead(pid, folder)
