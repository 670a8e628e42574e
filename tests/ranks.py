"""Run a function on several ranks over gloo, each in a process of its own."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import connection

from torch.distributed import TCPStore

TIMEOUT_SECONDS = 60
SECONDS_AFTER_A_FAILURE = 30


def run_ranks(function: Callable, *args, world: int = 2) -> list[int]:
    """Call `function(*args)` on every rank as torchrun would; returns the exit codes, fails on a hang."""
    return run_in_turn([partial(function, *args)], world=world)


def run_in_turn(functions: Sequence[Callable], *, world: int) -> list[int]:
    """Call functions one after the other, each in a group of its own, on the same ranks: torch plans a product once.

    Ranks meet at stores of this process, on ports that it holds: nobody can take one before they listen there.
    """
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in functions]
    ports = [store.port for store in stores]
    context = multiprocessing.get_context("fork")  # no second import of torch
    processes = [context.Process(target=on_rank, args=(rank, world, ports, functions)) for rank in range(world)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS * len(functions)
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        connection.wait([process.sentinel for process in processes if process.is_alive()], timeout=1)
        if any(process.exitcode for process in processes):  # those that wait for it see that soon, or never
            deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    codes = [process.exitcode for process in processes]
    assert not hanging, f"{len(hanging)} ranks still ran, exit codes {codes}"
    return codes


def on_rank(rank: int, world: int, ports: Sequence[int], functions: Sequence[Callable]) -> None:
    for port, function in zip(ports, functions, strict=True):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # it holds the store
        threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
        os.environ.update({name: str(value) for name, value in names.items()}, **torchrun, **threads)
        function()
