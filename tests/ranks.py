"""Run a function on several ranks over gloo, each in a process of its own."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

TIMEOUT_SECONDS = 60


def run_ranks(function: Callable, *args, world: int = 2) -> list[int]:
    """Call `function(*args)` on every rank as torchrun would; returns the exit codes, fails on a hang."""
    return run_in_turn([partial(function, *args)], world=world)


def run_in_turn(functions: Sequence[Callable], *, world: int) -> list[int]:
    """Call functions one after the other, each in a group of its own, on the same ranks: torch plans a product once."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in functions]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in sockets]
    context = multiprocessing.get_context("fork")  # no second import of torch
    processes = [context.Process(target=on_rank, args=(rank, world, ports, functions)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS * len(functions)
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"{len(hanging)} ranks still ran after {TIMEOUT_SECONDS * len(functions)} s"
    return [process.exitcode for process in processes]


def on_rank(rank: int, world: int, ports: Sequence[int], functions: Sequence[Callable]) -> None:
    for port, function in zip(ports, functions, strict=True):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
        os.environ.update({name: str(value) for name, value in names.items()}, **threads)
        function()
