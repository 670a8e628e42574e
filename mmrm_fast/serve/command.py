"""The reward server: HTTP in this process, replicas of one scorer on Ray Serve behind it, drained before they end."""

import asyncio
import logging
import signal
import threading
from dataclasses import replace

import ray
import torch
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.config import ServeConfig
from mmrm_fast.config_file import options
from mmrm_fast.score.cluster import gpus_each, ray_cluster, require_gpus
from mmrm_fast.score.scorer import Scorer, batch_spread
from mmrm_fast.serve.api import Front, make_app
from mmrm_fast.serve.connections import listen, serving
from mmrm_fast.serve.conversation import ConversationReader
from mmrm_fast.serve.guard import Limits, Refused
from mmrm_fast.serve.protocols import read_index
from mmrm_fast.serve.service import Answer, RewardService

APP = "mmrm_fast"
LOCAL = ("127.0.0.1", "localhost", "::1")
CPUS_PER_REPLICA = 2
PROBE_SECONDS = 5.0  # that a replica may take to say that it is ready
LOAD_SECONDS = 5  # that a load lasts before a copy of the model is added
HEALTH_SECONDS = 2  # between checks: a replica that died is missed so soon, and started again
ENVIRONMENT = {
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",  # what is to replace `metrics_interval_s`
    "MALLOC_ARENA_MAX": "2",  # else glibc keeps what bodies and activations of dozens of threads once took
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
}


class Replica(RewardService):
    """One copy of the model."""

    def __init__(self, config: ServeConfig, num_threads: int):
        torch.set_num_threads(num_threads)
        scorer = Scorer.from_pretrained(config.model, **options(config.batch))
        dtype = str(scorer.model.model.dtype).removeprefix("torch.")
        self.precision = f"{dtype}, rewards within {batch_spread(scorer):.1g}"
        limits = Limits(requests=config.max_requests, seconds=config.timeout)
        super().__init__(scorer, limits=limits, image_root=config.image_root)

    async def say_precision(self) -> str:
        """The dtype that the model computes in, and how far a reward moves with what shares its batch."""
        return self.precision


class RayReplicas:
    """The replicas behind a handle of Ray Serve, whose own refusals become ours."""

    def __init__(self, handle: DeploymentHandle):
        self.handle, self.probe = handle, None

    async def score(self, records: list[dict], client: str) -> Answer | Refused:
        """An answer of one of them."""
        answer = self.handle.score.remote(records, client)
        try:
            return await answer
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except BackPressureError:
            return Refused(503, "the replicas are all busy; try again later")
        except RayTaskError:
            raise
        except (RayError, RayServeException):
            return Refused(503, "no replica answered: it ended, or none is ready yet; try again")

    async def ready(self) -> Refused | None:
        """None where one is ready; however many ask, one question is under way."""
        if self.probe is None or self.probe.done():
            self.probe = asyncio.ensure_future(self.ask())
        return await asyncio.shield(self.probe)

    async def ask(self) -> Refused | None:
        answer = self.handle.say_precision.remote()
        try:
            await asyncio.wait_for(answer, PROBE_SECONDS)
        except Exception:  # whatever kept it from answering
            answer.cancel()
            return Refused(503, "no replica is ready; try again")
        return None


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first."""
    config = checked(config)
    token, index, bound = read_token(config), read_index(config.image_index), listen(config.host, config.port)
    places = config.max_requests * (config.max_replicas or config.replicas)
    limits = Limits(requests=places, seconds=config.timeout)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    checkpoint = CheckpointFolder(config.model).load(with_weights=False)
    reader = ConversationReader(checkpoint.prompt_encoder().chat, checkpoint.tokenizer)
    with bound, ray_cluster(config.address, ENVIRONMENT):
        handle = start_replicas(config)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray has set its own
            signal.signal(number, lambda *_: stop.set())
        precision = handle.say_precision.remote().result()
        front = Front(RayReplicas(handle), reader, config.model.name, index)
        app = make_app(front, limits=limits, token=token, hosts=(config.host, *config.allowed_host))
        with serving(app, bound, limits, on_end=stop.set):
            print(f"computing in {precision} whatever shares their batch", flush=True)
            print(f"serving {config.model} on http://{config.host}:{config.port} (API: /docs)", flush=True)
            stop.wait()
            print("draining", flush=True)
        ray_serve.delete(APP)


def checked(config: ServeConfig) -> ServeConfig:
    """The config with absolute paths. Raises `ValueError` for what can be known to fail."""
    paths = {name: getattr(config, name) for name in ("model", "image_root", "image_index", "token_file")}
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


def start_replicas(config: ServeConfig) -> DeploymentHandle:
    """Deploy the replicas; returns a handle to them when the first are ready."""
    gpus, count, most = gpus_each(config.gpus_per_actor), config.replicas, config.max_replicas or config.replicas
    require_gpus(count, gpus, "--replicas")
    threads = max(1, min(int(ray.cluster_resources()["CPU"] / most), CPUS_PER_REPLICA))
    scaling = {"num_replicas": count}
    if most > count:
        target = max(1, config.max_requests // 8)
        bounds = {"min_replicas": count, "max_replicas": most, "target_ongoing_requests": target}
        seconds = {"upscale_delay_s": LOAD_SECONDS, "look_back_period_s": LOAD_SECONDS, "metrics_interval_s": 1}
        scaling = {"autoscaling_config": bounds | seconds}
    deployment = ray_serve.deployment(
        Replica,
        name="reward",
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        max_ongoing_requests=config.max_requests + 1,  # a probe beside them
        max_queued_requests=config.max_requests * most + 1,
        graceful_shutdown_timeout_s=config.timeout,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
        **scaling,
    )
    ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
    try:
        return ray_serve.run(deployment.bind(config, threads), name=APP, route_prefix=None)
    except RuntimeError as error:
        said = ray_serve.status().applications[APP].deployments["reward"].message.strip().splitlines()
        reasons = (line.partition("Error: ")[2] for line in said[::-1] if "Error: " in line)
        raise ValueError(f"no replica starts: {next(reasons, error)}") from error
