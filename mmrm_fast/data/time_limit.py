"""A time limit on Python code of somebody else, such as a chat template: an exception in the thread that runs it."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

EVERY_SECONDS = 0.5


class Overtime(Exception):
    """It took longer than it may."""


class TimeLimit:
    """Calls functions that may loop without end; one that is inside a single long operation ends behind that alone.

    A thread looks at the clock while there is something to look at: a call costs two microseconds.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the threads, which a fork does not have."""
        self.process, self.lock, self.watcher = os.getpid(), threading.Lock(), None
        self.deadlines: dict[int, float] = {}  # by thread

    def __call__(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """What the function returns or raises; `Overtime` where it takes too long."""
        if self.process != os.getpid():
            self.begin_anew()
        thread = threading.get_ident()
        with self.lock:
            self.deadlines[thread] = time.monotonic() + self.seconds
            if self.watcher is None:
                self.watcher = threading.Thread(target=self.watch, daemon=True)
                self.watcher.start()
        try:
            return function(*arguments, **options)
        finally:
            with self.lock:
                self.deadlines.pop(thread, None)

    def watch(self) -> None:
        """Interrupt what is over its time, until there is nothing left to watch."""
        while True:
            time.sleep(EVERY_SECONDS)
            with self.lock:
                if not self.deadlines:
                    self.watcher = None
                    return
                late = [thread for thread, deadline in self.deadlines.items() if deadline < time.monotonic()]
                for thread in late:
                    del self.deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Overtime))
