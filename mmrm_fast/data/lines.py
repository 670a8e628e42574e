"""Random access to the decoded records of files: JSONL (plain, gzip, zstd), Parquet, CSV, a JSON array.

A JSONL file is indexed by line offset: 16 bytes a line, one pass. A compressed one is first unpacked into an anonymous
temporary file (it vanishes with the process), so that there is one way to read lines. Parquet is read by row group, one
kept at a time, only the columns that a record can have. CSV and arrays are held in memory. Reading is safe in forked
workers.
"""

import csv
import errno
import json
import os
import resource
import shutil
import tempfile
from array import array
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmrm_fast.data.fields import may_say_something
from mmrm_fast.data.splits import CSV
from mmrm_fast.data.types import RecordError

SCAN_BYTES = 1 << 24
MAX_LINE_BYTES = 1 << 28
MAX_UNPACKED_BYTES = 1 << 36
MAX_LIST_BYTES = 1 << 30
MAX_CELL_CHARS = 1 << 27  # of a CSV file, such as an inline image
MAX_ROW_GROUP_BYTES = 1 << 30
PARQUET, PACKED = ".parquet", (".gz", ".zst")
MAX_OPEN = 64


def open_rows(paths: Iterable[Path], columns: Collection[str] = ()) -> list["Rows"]:
    """Open files; of Parquet only `columns`, what a record can hold, are read, and what may have to be refused.

    At most `MAX_OPEN` stay open, and all that are unpacked. Raises `ValueError` where the system allows no more.
    """
    kept: dict = {}
    try:
        return [open_file(path, columns, kept) for path in paths]
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise ValueError(f"more open files than `ulimit -n` ({limit}) allows: raise it, or unpack the files") from None


@lru_cache(MAX_OPEN)
def opened(path: Path, stamp: tuple[int, ...]) -> BinaryIO:
    """A file that is kept open while it is among the last `MAX_OPEN`. Raises `OSError` where it is another by now."""
    file = open(path, "rb")  # noqa: SIM115
    if stamp_of(file.fileno()) != stamp:
        raise OSError(f"{path} has changed since it was opened first")
    return file


def stamp_of(file: int | Path) -> tuple[int, ...]:
    """What tells a file, given as a path or descriptor, from another one, or a changed one, of its name."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_file(path: Path, columns: Collection[str], kept: dict) -> "Rows":
    """One file, by its suffix and first byte. Raises `ValueError` where it is not what it says it is."""
    if path.name.endswith(PARQUET):
        return RowFile(path, columns, kept)
    if path.suffix == CSV:
        return ListFile(path, csv_rows(path))
    file = open_lines(path)
    if ".json" not in path.suffixes or file.read(SCAN_BYTES).lstrip()[:1] != b"[":
        return LineFile(path, file)
    if (size := os.fstat(file.fileno()).st_size) > MAX_LIST_BYTES:
        remedy = f"write a record a line: jq -c '.[]' {path} > records.jsonl"
        raise ValueError(f"{path}: one JSON array of {size} bytes; {remedy}")
    return ListFile(path, json_rows(path, file))


class ListFile:
    """A CSV file or a JSON array, held in memory."""

    unread = ()

    def __init__(self, path: Path, rows: Iterable[tuple[str, object]]):
        self.path, self.rows = path, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, row: int) -> str:
        """Where the record stands: "file.csv:12", or the place in an array, "file.json[11]"."""
        return self.rows[row][0]

    def fields(self, row: int) -> object:
        """The decoded row."""
        return self.rows[row][1]


def csv_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a CSV file, by the names in its first line."""
    csv.field_size_limit(MAX_CELL_CHARS)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in (reader := csv.DictReader(file)):
                yield f"{path}:{reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def json_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    """The items of a JSON array."""
    file.seek(0)
    try:
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(json.load(file)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


class LineFile:
    """A JSONL file read by line offset; blank lines are not records."""

    unread = ()

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.stamp = path, stamp_of(file.fileno())
        self.unpacked = file if path.suffix in PACKED else None
        self.size = os.fstat(file.fileno()).st_size
        self.offsets, self.line_numbers = scan_lines(file)

    def __reduce__(self):
        return open_file, (self.path, (), {})

    def __len__(self) -> int:
        return len(self.offsets)

    def source(self, row: int) -> str:
        """Where the record stands: "file.jsonl:12"."""
        return f"{self.path}:{self.line_numbers[row]}"

    def content(self) -> BinaryIO:
        """Its bytes, unpacked; only to be read at a place. Raises `OSError` where the file has changed."""
        return self.unpacked or opened(self.path, self.stamp)

    def fields(self, row: int) -> object:
        """The decoded JSON of a line. Raises `RecordError`."""
        start = int(self.offsets[row])
        length = int(self.offsets[row + 1] if row + 1 < len(self.offsets) else self.size) - start
        try:
            if length > MAX_LINE_BYTES:
                raise OSError(f"a line of {length} bytes is over the limit of {MAX_LINE_BYTES}")
            return json.loads(os.pread(self.content().fileno(), length, start).strip())  # blank lines may follow
        except OSError as error:
            raise RecordError(self.source(row), "", f"cannot be read ({error})") from None
        except (ValueError, RecursionError) as error:
            raise RecordError(self.source(row), "", f"not valid JSON ({error})") from None


def open_lines(path: Path) -> BinaryIO:
    """The file itself, or an anonymous temporary one that holds what it unpacks to."""
    if path.suffix not in PACKED:
        return open(path, "rb")
    import pyarrow

    limit = min(MAX_UNPACKED_BYTES, shutil.disk_usage(tempfile.gettempdir()).free // 2)
    packed, plain = pyarrow.input_stream(str(path)), tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with packed:
            while chunk := packed.read(SCAN_BYTES):
                plain.write(chunk)
                if plain.tell() > limit:
                    remedy = "unpack it yourself, or set TMPDIR to a larger disk"
                    raise ValueError(f"{path}: unpacks to over {limit} bytes; {remedy}")
    except OSError as error:
        raise ValueError(f"{path}: cannot be unpacked ({error})") from None
    plain.seek(0)
    return plain


def scan_lines(file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Byte offsets (int64) and 1-based line numbers (int64) of a file's non-blank lines."""
    offsets, numbers = array("q"), array("q")
    start, stop, number, is_blank = 0, 0, 1, True
    file.seek(0)
    while piece := file.readline(SCAN_BYTES):  # of a line, however long it is
        stop += len(piece)
        if is_blank and not piece.isspace():
            is_blank = False
            offsets.append(start)
            numbers.append(number)
        if piece.endswith(b"\n"):
            start, number, is_blank = stop, number + 1, True
    return np.frombuffer(offsets, np.int64), np.frombuffer(numbers, np.int64)


class RowFile:
    """A Parquet file read by row group; the last one read is kept, one for all files that share `kept`."""

    def __init__(self, path: Path, columns: Collection[str], kept: dict):
        import pyarrow
        from pyarrow import parquet

        self.path, self.all_columns, self.kept = path, columns, kept
        try:
            self.stamp = stamp_of(path)
            with parquet.ParquetFile(path) as file:
                self.metadata, names = file.metadata, file.schema_arrow.names
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: not a Parquet file that can be read ({error})") from None
        self.columns = [name for name in names if name in columns or may_say_something(name)]
        self.unread = tuple(name for name in names if name not in self.columns)
        groups = [self.metadata.row_group(index) for index in range(self.metadata.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_ROW_GROUP_BYTES:
            why = f"a row group of {largest} bytes is too large to be read at random; write row_group_size=100"
            raise ValueError(f"{path}: {why}")
        self.edges = np.cumsum([0, *(group.num_rows for group in groups)])

    def __reduce__(self):
        return RowFile, (self.path, self.all_columns, {})

    def __len__(self) -> int:
        return int(self.edges[-1])

    def source(self, row: int) -> str:
        """Where the record stands: "file.parquet:12", the row counted from 1."""
        return f"{self.path}:{row + 1}"

    def fields(self, row: int) -> object:
        """A row as a dictionary. Raises `RecordError`."""
        import pyarrow
        from pyarrow import parquet

        group = int(np.searchsorted(self.edges, row, side="right")) - 1
        key = (self.path, group)
        try:
            if key not in self.kept:
                self.kept.clear()
                if stamp_of(self.path) != self.stamp:
                    raise OSError("it has changed since it was opened first")
                with parquet.ParquetFile(self.path, metadata=self.metadata) as file:
                    self.kept[key] = file.read_row_group(group, columns=self.columns, use_threads=False)
            return self.kept[key].slice(row - self.edges[group], 1).to_pylist()[0]
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise RecordError(self.source(row), "", f"not a row that can be read ({error})") from None


Rows = LineFile | RowFile | ListFile
