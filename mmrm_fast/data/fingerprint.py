"""What files of records hold, in a few numbers: a run that goes on can tell whether they have changed, and how."""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from mmrm_fast.data.lines import LineFile, Rows

WHOLE_BYTES = 1 << 30  # of a larger file, samples are looked at
BLOCKS = 64  # that a file is cut into
SAMPLES, MORE_SAMPLES = 64, 1024  # records looked at by themselves: of a file that is read whole, of a larger one
PIECE_BYTES = 4096  # taken for a record where a file has no lines


def fingerprints(files: Sequence[Rows]) -> dict[str, dict]:
    """Size, number of records and CRC-32 of spans of bytes of each file, by its name; as JSON has them.

    The spans are all of a file in blocks of records, of one over `WHOLE_BYTES` its first and last ones; and single
    records drawn at random, for every file of its size the same.
    """
    return {str(rows.path): fingerprint(rows) for rows in files}


def differences(before: dict[str, dict], files: Sequence[Rows]) -> list[str]:
    """How files differ from what `fingerprints` was of them, a line each. It reads no more than that did."""
    names = {str(rows.path) for rows in files}
    changes = {str(rows.path): difference(before[str(rows.path)], rows) for rows in files if str(rows.path) in before}
    lines = [f"{name}: {change}" for name, change in changes.items() if change]
    lines += [f"{name}: was not there" for name in sorted(names - before.keys())]
    return lines + [f"{name}: is not read any more" for name in before if name not in names]


def fingerprint(rows: Rows) -> dict:
    """The fingerprint of a file."""
    with content(rows) as (file, size, edges):
        count, is_whole = len(edges) - 1, size <= WHOLE_BYTES
        cuts = np.unique(np.linspace(0, count, BLOCKS + 1).astype(int)).tolist()
        blocks = list(pairwise(cuts)) if is_whole else [(0, BLOCKS), (count - BLOCKS, count)]
        number = min(count, SAMPLES if is_whole else MORE_SAMPLES)
        drawn = np.sort(np.random.default_rng(0).choice(count, number, replace=False)).tolist() if count else []
        sums = [span_sum(file, edges[start], edges[stop]) for start, stop in blocks]
        samples = [span_sum(file, edges[index], edges[index + 1]) for index in drawn]
        return {"size": size, "records": len(rows), "blocks": sums, "samples": samples}


def difference(before: dict, rows: Rows) -> str | None:
    """How a file differs from what its fingerprint was made of; None where it does not."""
    with content(rows) as (file, size, edges):
        counts = f"{len(rows)} records where {before['records']} were"
        changed = {
            kind: [span for span in before[kind] if span[1] <= size and span_sum(file, *span[:2]) != span]
            for kind in ("blocks", "samples")
        }
        if any(changed.values()) or (size == before["size"] and len(rows) != before["records"]):
            moved = {crc for *_, crc in changed["samples"]} if len(rows) == before["records"] else set()
            lines = pairwise(edges) if moved and isinstance(rows, LineFile) else ()
            is_moved = moved and moved <= {span_sum(file, *line)[2] for line in lines}
            return "reordered" if is_moved else f"changed, {counts}"
        if size != before["size"]:
            return f"{'truncated' if size < before['size'] else 'appended to'}, {counts}"
        return None


@contextmanager
def content(rows: Rows) -> Iterator[tuple[int, int, list[int]]]:
    """A file, unpacked where that is how it is read, as a descriptor; its size; where records begin, and its end."""
    is_lines = isinstance(rows, LineFile)
    file = os.dup(rows.content().fileno()) if is_lines else os.open(rows.path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        yield file, size, [*(rows.offsets.tolist() if is_lines else range(0, size, PIECE_BYTES)), size]
    finally:
        os.close(file)


def span_sum(file: int, start: int, stop: int) -> list[int]:
    """Where a span begins, where what is not white space in it ends, and the CRC-32 of that."""
    data = os.pread(file, stop - start, start).rstrip()
    return [start, start + len(data), zlib.crc32(data)]
