"""What files of records hold, in a few numbers: a run that goes on can tell whether they have changed, and how."""

import os
import zlib
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from typing import BinaryIO

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
    with closing(content(rows)) as file:
        size = os.fstat(file.fileno()).st_size
        edges, is_whole = record_edges(rows, size), size <= WHOLE_BYTES
        count = len(edges) - 1
        cuts = np.unique(np.linspace(0, count, BLOCKS + 1).astype(int)).tolist()
        blocks = list(pairwise(cuts)) if is_whole else [(0, BLOCKS), (count - BLOCKS, count)]
        number = min(count, SAMPLES if is_whole else MORE_SAMPLES)
        drawn = np.sort(np.random.default_rng(0).choice(count, number, replace=False)).tolist() if count else []
        sums = [span_sum(file, edges[start], edges[stop]) for start, stop in blocks]
        samples = [span_sum(file, edges[index], edges[index + 1]) for index in drawn]
        return {"size": size, "records": len(rows), "blocks": sums, "samples": samples}


def difference(before: dict, rows: Rows) -> str | None:
    """How a file differs from what its fingerprint was made of; None where it does not."""
    with closing(content(rows)) as file:
        size, counts = os.fstat(file.fileno()).st_size, f"{len(rows)} records where {before['records']} were"
        changed = {
            kind: [span for span in before[kind] if span[1] <= size and span_sum(file, *span[:2]) != span]
            for kind in ("blocks", "samples")
        }
        if any(changed.values()) or (size == before["size"] and len(rows) != before["records"]):
            moved = len(rows) == before["records"] and {crc for *_, crc in changed["samples"]}
            return "reordered" if moved and moved <= line_sums(rows, file) else f"changed, {counts}"
        if size != before["size"]:
            return f"{'truncated' if size < before['size'] else 'appended to'}, {counts}"
        return None


def line_sums(rows: Rows, file: BinaryIO) -> set[int]:
    """CRC-32 of every line; of none where a file has no lines."""
    if not isinstance(rows, LineFile):
        return set()
    edges = pairwise(record_edges(rows, os.fstat(file.fileno()).st_size))
    return {span_sum(file, start, stop)[2] for start, stop in edges}


def content(rows: Rows) -> BinaryIO:
    """The bytes of a file, unpacked where that is how it is read."""
    if isinstance(rows, LineFile):
        return os.fdopen(os.dup(rows.content().fileno()), "rb")
    return open(rows.path, "rb")


def record_edges(rows: Rows, size: int) -> list[int]:
    """Where a file's records begin in its bytes, and their end."""
    starts = rows.offsets.tolist() if isinstance(rows, LineFile) else range(0, size, PIECE_BYTES)
    return [*starts, size]


def span_sum(file: BinaryIO, start: int, stop: int) -> list[int]:
    """Where a span begins, where what is not white space in it ends, and the CRC-32 of that."""
    data = os.pread(file.fileno(), stop - start, start).rstrip()
    return [start, start + len(data), zlib.crc32(data)]
