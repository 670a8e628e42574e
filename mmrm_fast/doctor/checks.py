"""A check, and what comes of it: one that fails or raises stops no other, one that hangs ends the process."""

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

SECONDS, COMPILING = 60.0, 300.0  # that a check may take, and one that compiles
GRACE = 5.0  # seconds in which every rank says where it hangs


class Found(NamedTuple):
    """What came of a check on one rank."""

    figure: float | None
    bound: float | None  # the most that a judged figure may be, else what it was computed to be
    unit: str = ""  # none of a share
    passed: bool | None = None  # None of what is not judged
    note: str = ""


class Check(NamedTuple):
    """Something that can be wrong."""

    name: str
    run: Callable[[], Found]
    seconds: float = SECONDS


def judged(figure: float, bound: float) -> Found:
    """What must not be over a bound, nor NaN."""
    return Found(figure, bound, passed=figure <= bound)


def left_out(why: str) -> Found:
    """What cannot be checked here."""
    return Found(None, None, note=why)


def outcome(check: Check, rank: int) -> Found:
    """What comes of a check, whatever it raises."""
    with watched(f"rank {rank}: {check.name}", check.seconds):
        try:
            return check.run()
        except Exception as error:
            return Found(None, None, passed=False, note=f"{type(error).__name__}: {error}")


@contextmanager
def watched(name: str, seconds: float, grace: float = GRACE) -> Iterator[None]:
    """End the process with the stacks of its threads, under a name, where what is inside takes longer.

    A thread writes them at once and then gives the other ranks time for theirs, as a launcher kills those when one
    ends. Where it cannot run, as something holds the interpreter's lock, they come without the name.
    """
    timer = threading.Timer(seconds, end, (name, seconds, grace))
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + 2 * grace, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def end(name: str, seconds: float, grace: float) -> None:
    """Write where this process is, in one piece, and end it with status 1."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        os.write(2, f"{name}: not done after {seconds:g} s; the stacks:\n".encode() + file.read())
    time.sleep(grace)
    os._exit(1)
