"""Run a function on several ranks over gloo, each in a process of its own."""

import multiprocessing
import os
import socket
from collections.abc import Callable

TIMEOUT_SECONDS = 60


def run_ranks(function: Callable, *args, world: int = 2) -> list[int]:
    """Call `function(*args)` on every rank as torchrun would; returns the exit codes, fails on a hang."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")  # no second import of torch
    processes = [context.Process(target=on_rank, args=(rank, world, port, function, args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_SECONDS)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} ranks still ran after {TIMEOUT_SECONDS} s"
    return [process.exitcode for process in processes]


def on_rank(rank: int, world: int, port: int, function: Callable, args: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, OMP_NUM_THREADS="1", GOMP_SPINCOUNT="1000")
    function(*args)
