"""Ends what a killed process leaves of its Ray: the agents, which outlive their raylet.

A child of the process waits on a pipe that closes with it, however it dies, and kills whoever has a file of Ray's
session open. It runs this file alone, without the package.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS, EVERY, QUIET = 20.0, 0.5, 4  # it looks for so long at most, and until it has found nobody so many times
DONE = b"."


@contextmanager
def watched(session: str) -> Iterator[None]:
    """While this lasts, our death is that of all processes of Ray's session folder."""
    command = [sys.executable, "-I", __file__, session, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watchdog:
        try:
            yield
        finally:
            watchdog.communicate(DONE)


def of_session(session: str) -> set[int]:
    """Processes of ours that have a file below the folder open, but for this one."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:  # another's, or gone
            continue
        if any(file.startswith(f"{session}/") for file in files):
            found.add(int(process.name))
    return found - {os.getpid()}


def end_all(session: str) -> set[int]:
    """Kill them until none comes after them; who they were."""
    ended, quiet, deadline = set(), 0, time.monotonic() + SECONDS
    while quiet < QUIET and time.monotonic() < deadline:
        alive = of_session(session)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        ended |= alive
        quiet = 0 if alive else quiet + 1
        time.sleep(EVERY)
    return ended


if __name__ == "__main__":
    if not sys.stdin.buffer.read(1):
        pids = " ".join(map(str, sorted(end_all(os.path.realpath(sys.argv[1])))))
        print(f"mmrm-fast: process {sys.argv[2]} was killed; ended what it left of Ray: {pids}", file=sys.stderr)
