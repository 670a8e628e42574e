"""The reward server on Ray Serve: replicas of one scorer behind one port, drained before they end."""

import logging
import os
import signal
import tempfile
import threading
from dataclasses import replace

import ray
import torch
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle

from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.config import ServeConfig
from mmrm_fast.config_file import options
from mmrm_fast.score.cluster import gpus_each, ray_cluster
from mmrm_fast.score.scorer import Scorer, batch_spread
from mmrm_fast.serve.api import RewardService, make_app
from mmrm_fast.serve.guard import MAX_BODY, Limits

APP = "mmrm_fast"
LOCAL = ("127.0.0.1", "localhost", "::1")
CPUS_PER_REPLICA = 2
PROXY_SECONDS = 5.0  # that the proxy waits longer than a replica may take: the replica's answer says more
LOAD_SECONDS = 5  # that a load lasts before a copy of the model is added
HEALTH_SECONDS = 2  # between checks: a replica that died is missed so soon, and started again


@ray_serve.ingress()
class Replica:
    """One copy of the model and its API."""

    def __init__(self, config: ServeConfig, token: str | None, num_threads: int):
        torch.set_num_threads(num_threads)
        os.makedirs(os.environ["PROMETHEUS_MULTIPROC_DIR"], exist_ok=True)  # on another machine than the first
        scorer = Scorer.from_pretrained(config.model, **options(config.batch))
        dtype = str(scorer.model.model.dtype).removeprefix("torch.")
        self.precision, self.token = f"{dtype}, rewards within {batch_spread(scorer):.1g}", token
        self.service = RewardService(
            scorer, config.model.name, limits=Limits(requests=config.max_requests, seconds=config.timeout),
            image_root=config.image_root, max_delay=config.max_delay_ms / 1000,
        )  # fmt: skip

    def say_precision(self) -> str:
        """The dtype that the model computes in, and how far a reward moves with what shares its batch."""
        return self.precision

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self.service, self.token)


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first."""
    config = checked(config)
    token = read_token(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with (
        tempfile.TemporaryDirectory(prefix="mmrm-metrics-") as metrics,
        ray_cluster(config.address, environment(metrics, config)),
    ):
        replicas = start_replicas(config, token)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
            signal.signal(number, lambda *_: stop.set())
        precision = replicas.say_precision.remote().result()
        print(f"computing in {precision} whatever shares their batch", flush=True)
        print(f"serving {config.model} on http://{config.host}:{config.port} (API: /docs)", flush=True)
        stop.wait()
        print("draining", flush=True)
        ray_serve.delete(APP)  # answers what is under way; shutdown alone would drop it


def checked(config: ServeConfig) -> ServeConfig:
    """The config with absolute paths. Raises `ValueError` for what can be known to fail."""
    paths = {name: getattr(config, name) for name in ("model", "image_root", "token_file")}
    resolved = {name: path.resolve() for name, path in paths.items() if path is not None}
    config = replace(config, **resolved)
    CheckpointFolder(config.model).require_reward_model()
    if config.image_root is not None and not config.image_root.is_dir():
        raise ValueError(f"{config.image_root}: no such folder for --image-root")
    if config.replicas < 1 or (config.max_replicas or config.replicas) < config.replicas:
        raise ValueError(f"--replicas must be at least 1 and --max-replicas not less, got {config.replicas}")
    return config


def read_token(config: ServeConfig) -> str | None:
    """The token of the file; a warning where strangers could ask without one."""
    if config.token_file is None:
        if config.host not in LOCAL:
            logging.warning("anyone who reaches %s:%d can use this server; see --token-file", config.host, config.port)
        return None
    token = config.token_file.read_text(encoding="utf-8").strip()
    if not token:
        raise ValueError(f"{config.token_file}: the token file is empty")
    return token


def environment(metrics: str, config: ServeConfig) -> dict[str, str]:
    """What replicas and proxy find in their environment; `metrics` is a folder for what the replicas count."""
    return {
        MAX_BODY: str(Limits().body),
        "PROMETHEUS_MULTIPROC_DIR": metrics,
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "mmrm_fast.serve.guard.proxy_middleware",
        "MALLOC_ARENA_MAX": "2",  # else glibc keeps what bodies and activations of dozens of threads once took
        "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    }


def start_replicas(config: ServeConfig, token: str | None) -> DeploymentHandle:
    """Deploy the replicas; returns a handle to them when the first are ready."""
    gpus = gpus_each()
    count, most = config.replicas, config.max_replicas or config.replicas
    threads = max(1, min(int(ray.cluster_resources()["CPU"] / most), CPUS_PER_REPLICA))
    scaling = {"num_replicas": count}
    if most > count:
        target = max(1, config.max_requests // 8)
        bounds = {"min_replicas": count, "max_replicas": most, "target_ongoing_requests": target}
        seconds = {"upscale_delay_s": LOAD_SECONDS, "look_back_period_s": LOAD_SECONDS}
        scaling = {"autoscaling_config": bounds | seconds}
    deployment = ray_serve.deployment(
        Replica,
        name="reward",
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        max_ongoing_requests=2 * config.max_requests,  # so that the replica itself refuses, with a reason
        max_queued_requests=config.max_requests,
        graceful_shutdown_timeout_s=config.timeout,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
        **scaling,
    )
    http_options = {"host": config.host, "port": config.port, "request_timeout_s": config.timeout + PROXY_SECONDS}
    ray_serve.start(http_options=http_options, logging_config={"log_level": "WARNING"})
    return ray_serve.run(deployment.bind(config, token, threads), name=APP, route_prefix="/")
