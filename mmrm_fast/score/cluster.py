"""The Ray cluster that scoring and serving run on: one of our own on this machine, or one to join."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import ray
from ray._private import ray_constants

from mmrm_fast.score.watchdog import end_all, watched

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # what makes all of Ray listen on 127.0.0.1, as it does on a Mac
FOREGROUND = {"RAY_worker_niceness": "0"}  # Ray's 15 lets whatever else runs there go first, our own HTTP too
SECONDS_TO_END = 60.0  # it takes one or two
NEEDS = (
    "Ray needs a HOME that can be written to, for its token; /dev/shm; and a short path in RAY_TMPDIR or TMPDIR, such"
    " as /tmp, for its sockets; with --address a cluster that is there."
)


@contextmanager
def ray_cluster(address: str | None = None, env: Mapping[str, str] | None = None) -> Iterator[None]:
    """Join the Ray cluster at `address`, or start one on this machine; one that is joined already is kept.

    `env` is set in the processes that we start there. One that we start listens on 127.0.0.1 alone, takes only clients
    that know the user's `~/.ray/auth_token` (Ray's default since 2.60), and ends with this process, however it dies.

    Raises:
        OSError: Ray does not start here; what it needs is said.
    """
    if ray.is_initialized():
        yield
        return
    env = dict(env or {})
    if not address:  # all processes inherit ours
        os.environ.update(env)
    try:
        with nullcontext() if address else as_ours():
            context = ray.init(
                address=address or "local",  # None would join what RAY_ADDRESS or an earlier `ray start` names
                runtime_env={"env_vars": env} if address else None,
                log_to_driver=False,
                include_dashboard=False,
                logging_level="ERROR",
            )
    except Exception as error:  # whatever of the machine it does not find
        raise OSError(f"Ray does not start: {error}\n{NEEDS}") from error
    session = context.address_info["session_dir"]
    with nullcontext() if address else watched(session):
        try:
            yield
        finally:
            with nullcontext() if address else killed_after(SECONDS_TO_END, session):
                ray.shutdown()


@contextmanager
def killed_after(seconds: float, session: str) -> Iterator[None]:
    """What is left of Ray's session folder after so long is killed: Ray waits without end for a server that hangs."""
    timer = threading.Timer(seconds, end_all, [session])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def as_ours() -> Iterator[None]:
    """What Ray starts meanwhile listens on 127.0.0.1 and is no background work; ours has read the first at import."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    added = {name: value for name, value in FOREGROUND.items() if name not in os.environ} | LOOPBACK
    os.environ.update(added)
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        for name in added:
            del os.environ[name]


def gpus_each(wanted: float | None) -> float:
    """GPUs of one process: what was asked for, else 1 where there are any. Raises `ValueError` for what cannot be."""
    if wanted is not None and (wanted < 0 or (wanted > 1 and wanted % 1)):
        raise ValueError(f"--gpus-per-actor {wanted:g}: expected a whole number, or a share of one GPU")
    return wanted if wanted is not None else float(bool(ray.cluster_resources().get("GPU")))


def require_gpus(count: int, gpus: float, option: str) -> None:
    """Raise `ValueError` where the cluster lacks GPUs for so many processes with so many each."""
    there = ray.cluster_resources().get("GPU", 0)
    if count * gpus > there:
        raise ValueError(
            f"{count} {option.strip('-')} with {gpus:g} GPUs each: the cluster has {there:g}; "
            f"lower {option} or --gpus-per-actor"
        )
