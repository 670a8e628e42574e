"""What every benchmark shares: options, cases, rows, interleaved timing and verification.

A row compares our implementation with one baseline in one process, on the same data and weights. Its results are
compared in the same run; a speed-up whose results differ is a failed row.
"""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

MIN_SAMPLE_SECONDS = 0.05
MODEL_REPEATS = 3  # timed samples of each side of a whole model, at most
SLOW_SECONDS = 20.0  # a call over it is timed twice at most
CPU = torch.device("cpu")
Suite = Literal["ops", "preprocess", "plan", "loader", "train-step", "score", "scale", "end-to-end", "serve", "depth"]


@dataclass(frozen=True)
class Options:
    """Benchmarks of mmrm_fast: every row is timed against a baseline and verified against it in the same run."""

    suite: Suite | None = None
    """Run one suite only."""
    quick: bool = False
    """One repeat of everything, without the slowest cases."""
    full: bool = False
    """448-pixel tiles of 256 tokens in the model suites, instead of a quarter of every length and half the layers.
    Finished cases of an unfinished run are not run again."""
    threads: int = 2
    """Threads of torch and of the C++ ops."""
    json: Path | None = None
    """Where the rows go; default benchmarks/results/<date>-<device>.json, with the options above in the name."""
    model: Path | None = None
    """Reward model that the suite serve loads; default a tiny one, trained for it."""
    compare: Path | None = None
    """An earlier file of rows: list what is slower now."""

    @property
    def repeats(self) -> int:
        """Timed samples of each side of an op."""
        return 1 if self.quick else 5

    @property
    def device(self) -> torch.device:
        """The GPU where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """Rows that are measured together; `name` is unique in its suite."""

    name: str
    run: Callable[[], Iterable["Row"]]


@dataclass(frozen=True)
class Row:
    """One case against one baseline; None is not measured."""

    suite: str
    case: str
    device: str
    dtype: str
    seconds: float | None  # median of a call
    baseline: str  # what `baseline_seconds` is the median of
    baseline_seconds: float | None
    ratio: float | None  # baseline_seconds / seconds
    spread: float | None = None  # (slowest - fastest) / median over the repeats
    baseline_spread: float | None = None
    verified: bool | None = None  # both sides' results are equal within the case's bounds; None where nothing compares
    max_error: float | None = None  # largest relative error of a result; None where that is not finite
    peak_bytes: int | None = None  # memory that a call adds at its peak
    baseline_peak_bytes: int | None = None
    bound_fraction: float | None = None  # a lower bound, which the case's file names, / seconds
    computed: bool = False  # by formula: nothing was timed
    details: dict[str, float | str] = field(default_factory=dict)  # what else the case counts, units in the names


class Check(NamedTuple):
    """A relative error of our results against a baseline's, and what it may be; NaN fails."""

    error: float
    bound: float


@dataclass(frozen=True)
class Baseline:
    """Another way to compute the same."""

    run: Callable[[], object]
    checks: Sequence[Check] = ()  # of our results against its; without one it computes something else
    details: dict[str, float | str] = field(default_factory=dict)  # of its row


@dataclass(frozen=True)
class Bound:
    """What a call cannot be faster than: `scale` times the seconds of `run`, timed in turns with the call."""

    run: Callable[[], object]
    what: str
    scale: float = 1.0
    num_bytes: int = 0  # that `run` reads and writes, for its rate

    def told(self, seconds: float) -> str:
        """What it is, with the rate at which it ran."""
        return self.what + (f" at {self.num_bytes / seconds / 1e9:.0f} GB/s" if self.num_bytes else "")


@dataclass(frozen=True)
class Comparison:
    """A case that is ready to be timed, its results verified already."""

    suite: str
    case: str
    dtype: torch.dtype
    ours: Callable[[], object]
    baselines: dict[str, Baseline]
    device: torch.device = CPU
    bound: Callable[[], Bound] | None = None  # called when memory has been measured
    count: tuple[float, str] | None = None  # what a call handles and its name, for a rate: (8, "responses")
    whole_model: bool = False  # a sample is one call, without warm-up, and the memory of a call is measured


def compare(comparison: Comparison, options: Options) -> Iterator[Row]:
    """Time ours, the baselines and the bound in turns; one row a baseline."""
    baselines = comparison.baselines
    runs = [comparison.ours, *(baseline.run for baseline in baselines.values())]
    our_peak, *peaks = [peak_bytes(run) if comparison.whole_model else None for run in runs]
    bound = comparison.bound and comparison.bound()
    ours, *others = interleaved(
        [*runs, *([bound.run] if bound else [])],
        repeats=min(options.repeats, MODEL_REPEATS if comparison.whole_model else options.repeats),
        min_seconds=0 if comparison.whole_model else MIN_SAMPLE_SECONDS,
    )
    seconds, fraction, details = median(ours), None, {}
    if bound:
        fraction, details["bound"] = bound.scale * median(others[-1]) / seconds, bound.told(median(others[-1]))
    if comparison.count:
        number, unit = comparison.count
        details[f"{unit}/s"] = number / seconds
    for (name, baseline), theirs, peak in zip(baselines.items(), others, peaks, strict=False):
        yield Row(
            comparison.suite, comparison.case, comparison.device.type, str(comparison.dtype).removeprefix("torch."),
            seconds, name, median(theirs), median(theirs) / seconds, spread(ours), spread(theirs),
            *verdict(baseline.checks), our_peak, peak, fraction, details={**details, **baseline.details},
        )  # fmt: skip


def verdict(checks: Sequence[Check]) -> tuple[bool | None, float | None]:
    """Whether a row is verified and its largest error; a row without checks is not: its sides compute other things."""
    errors = [check.error for check in checks]
    if not errors:
        return None, None
    return all(error <= bound for error, bound in checks), max(errors) if all(map(math.isfinite, errors)) else None


def check(
    errors: Callable[[Any, Any], Iterable[float]], ours: Any, theirs: Any, exact: Any, *, bounds: Sequence[float],
    floors: Sequence[float],
) -> list[Check]:  # fmt: skip
    """Ours against theirs; where there are `exact` results, both against those: ours may err twice as much."""
    if exact is None:
        return list(map(Check, errors(ours, theirs), bounds))
    limits = [2 * error + floor for error, floor in zip(errors(theirs, exact), floors, strict=True)]
    return list(map(Check, errors(ours, exact), limits))


def lone_row(suite: str, case: str, samples: Sequence[float], options: Options, details: dict) -> Row:
    """A row without a baseline; `samples` are seconds."""
    own = median(samples), "none", None, None, spread(samples)
    return Row(suite, case, options.device.type, "float32", *own, details=details)


def interleaved(
    functions: Sequence[Callable], *, repeats: int, min_seconds: float = MIN_SAMPLE_SECONDS
) -> list[list[float]]:
    """Seconds a call of functions in turns, A B A B ..., so that a disturbance of the machine meets all of them.

    Args:
        functions: called without arguments.
        repeats: samples of each.
        min_seconds: a sample is as many calls as take this long; 0 for one call, and no warm-up.
    """
    numbers = [calls_per_sample(function, min_seconds) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats):
        if repeat >= 2 and max(map(max, samples)) > SLOW_SECONDS:
            break
        for function, number, seconds in zip(functions, numbers, samples, strict=True):
            seconds.append(time_calls(function, number) / number)
    return samples


def spread(samples: Sequence[float]) -> float | None:
    """(slowest - fastest) / median; None of a single sample."""
    return (max(samples) - min(samples)) / median(samples) if len(samples) > 1 else None


def calls_per_sample(function: Callable, min_seconds: float) -> int:
    """How many calls take at least `min_seconds`; one untimed call goes first."""
    if not min_seconds:
        return 1
    function()
    number = 1
    while (seconds := time_calls(function, number)) < min_seconds:
        number = max(2 * number, math.ceil(number * min_seconds / seconds))
    return number


def time_calls(function: Callable, number: int) -> float:
    """Seconds of `number` calls."""
    start = time.perf_counter()
    for _ in range(number):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def relative_error(result: Tensor, expected: Tensor, *, least: float = 0.0) -> float:
    """Largest absolute error over the largest absolute expected value; over `least` where that is larger."""
    if torch.equal(result, expected):
        return 0.0
    return float((result - expected).abs().max() / expected.abs().max().clamp(min=least))


def gradient_error(gradients: dict[str, Tensor], expected: dict[str, Tensor], *, floor: float = 1e-3) -> float:
    """Largest `|g - g0| / (|g0| + floor max|g0|)` over parameters, |.| the norm of one parameter's gradient.

    A bound of 1e-4 on it is `|g - g0| <= 1e-4 |g0| + 1e-7 max|g0|`: some true gradients, such as key biases, are zero.
    Both sides must have gradients of the same parameters, otherwise the error is infinite.
    """
    if gradients.keys() != expected.keys():
        return math.inf
    largest = max(float(g0.norm()) for g0 in expected.values())
    errors = [
        float((gradients[name] - g0).norm()) / (float(g0.norm()) + floor * largest) for name, g0 in expected.items()
    ]
    return max(errors)


def peak_bytes(function: Callable) -> int | None:
    """Memory that one call adds at its peak: of the GPU where there is one, elsewhere resident memory.

    None without a GPU but on Linux with glibc.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that freed memory that is still resident does not hide the peak
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from here
    except OSError:
        return None
    before = resident_bytes("VmRSS")
    function()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
