"""The output of a scoring run on disk: a shard and a note for each chunk of records, complete or not there at all.

A chunk is done when its note is there. Both files are written aside and renamed, the note last; whoever scores a chunk
twice (a killed worker, a resumed run) puts the same files in the same places. So a run can be killed at any moment and
started again, and every response is there exactly once: records are known by their position in data whose content is
the same, responses by their place in the record.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from pyarrow import parquet

from mmrm_fast.data.messages import MESSAGE_EXTRAS
from mmrm_fast.files import LOCK, aside_of, file_sum, read_json, recover, whole_file, write_json, write_text

RECORDS_PER_CHUNK = 64
SAMPLED_BYTES = 1 << 20
TEXT, TEXTS, INTEGER, NUMBER = pyarrow.string(), pyarrow.list_(pyarrow.string()), pyarrow.int64(), pyarrow.float64()
MESSAGE = pyarrow.struct(dict.fromkeys(("role", "content", *MESSAGE_EXTRAS), TEXT))
TURNS = pyarrow.list_(MESSAGE)
SCORES = pyarrow.schema({
    "id": TEXT, "record": INTEGER, "response_index": INTEGER, "prompt": TEXT, "img_path": TEXT, "response": TEXT,
    "score": NUMBER, "truncated": pyarrow.bool_(), "tools": TEXT,
})  # fmt: skip
PAIRS = pyarrow.schema({  # to be read again
    "id": TEXT, "record": INTEGER, "prompt": TURNS, "img_path": TEXTS, "chosen": TURNS, "rejected": TURNS,
    "reward_margin": NUMBER, "rejected_images": TEXTS, "tools": TEXT,
})  # fmt: skip


@dataclass(frozen=True)
class Shards:
    """The shards of one run in a folder; `kind` is jsonl or parquet, `schema` that of a Parquet shard."""

    folder: Path
    kind: str
    num_records: int
    schema: pyarrow.Schema = SCORES

    @property
    def num_chunks(self) -> int:
        return -(-self.num_records // RECORDS_PER_CHUNK)

    def records(self, chunk: int) -> range:
        return range(chunk * RECORDS_PER_CHUNK, min((chunk + 1) * RECORDS_PER_CHUNK, self.num_records))

    def shard(self, chunk: int) -> Path:
        return self.folder / f"part-{chunk:06d}.{self.kind}"

    def note(self, chunk: int) -> Path:
        return self.folder / ".done" / f"{chunk:06d}.json"

    def open(self, identity: dict) -> list[str]:
        """Begin the run, or go on with it; says which chunks are scored again, as their shards are not as written.

        Raises:
            ValueError: the folder holds scores of something else.
        """
        description, done = self.folder / ".done" / "run.json", self.done()
        if description.is_file() and done:
            before = read_json(description)
            changed = [name for name in identity if before.get(name) != identity[name]]
            if changed:
                raise ValueError(
                    f"{self.folder}: holds a run with other {', '.join(changed)}; delete it or choose another --out"
                )
        elif not description.parent.is_dir() and self.folder.is_dir() and set(os.listdir(self.folder)) - {LOCK}:
            raise ValueError(f"{self.folder}: is not empty and no scoring run; choose another --out")
        else:
            shutil.rmtree(description.parent, ignore_errors=True)  # notes of nobody knows what
        description.parent.mkdir(parents=True, exist_ok=True)
        recover(self.folder)
        write_json(description, identity)
        return [problem for chunk in self.done() if (problem := self.refused(chunk))]

    def done(self) -> list[int]:
        """Chunks that have a note."""
        return sorted(int(note.stem) for note in (self.folder / ".done").glob("[0-9]*.json"))

    def refused(self, chunk: int) -> str | None:
        """Remove the note of a chunk whose shard is not the one that it was written for, and say so."""
        try:
            size, crc = read_json(self.note(chunk))["shard"]
            if file_sum(self.shard(chunk)) == [size, crc]:
                return None
            problem = "is not what was written"
        except FileNotFoundError:
            problem = "is gone"
        except (ValueError, KeyError, TypeError):
            problem = "has a damaged note"
        self.note(chunk).unlink()
        return f"{self.shard(chunk)} {problem}: its records are scored again"

    def todo(self) -> list[int]:
        return sorted(set(range(self.num_chunks)).difference(self.done()))

    def write(self, chunk: int, rows: Sequence[dict], note: dict) -> None:
        """Write a chunk's rows, then, when they are on the disk, its note."""
        with whole_file(self.shard(chunk), "wb") as file:
            if self.kind == "parquet":
                parquet.write_table(table(rows, self.schema), file)
            else:
                file.writelines((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode() for row in rows)
        write_text(self.note(chunk), json.dumps({**note, "shard": file_sum(self.shard(chunk))}))

    def notes(self) -> Iterator[dict]:
        yield from (read_json(self.note(chunk)) for chunk in self.done())

    def join(self, path: Path) -> None:
        """Put JSONL shards together in one file and remove the folder, all of it at once."""
        recover(path.parent, path.name)
        with whole_file(path, "wb") as whole:
            for chunk in range(self.num_chunks):
                with open(self.shard(chunk), "rb") as shard:
                    shutil.copyfileobj(shard, whole)
        removed = aside_of(self.folder, "removed")
        os.replace(self.folder, removed)
        shutil.rmtree(removed)


def table(rows: Sequence[dict], schema: pyarrow.Schema) -> pyarrow.Table:
    """Rows as a table of one schema, whatever the rows of other shards hold.

    Lists and conversations of scores become JSON. Pairs are records to read again: all their texts are messages, all
    images lists.
    """
    columns = {field.name: [in_column(row.get(field.name), field.type, field.name) for row in rows] for field in schema}
    return pyarrow.table(columns, schema=schema)


def in_column(value: object, kind: pyarrow.DataType, name: str) -> object:
    """A value as the column of this name holds it; a text that becomes a message is the user's in a prompt."""
    if kind == TEXT and isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    if kind not in (TEXTS, TURNS) or value is None:
        return value
    items = value if isinstance(value, list) else [value]
    if kind == TEXTS:
        return items
    role = "user" if name == "prompt" else "assistant"
    turns = [item if isinstance(item, dict) else {"role": role, "content": item} for item in items]
    return [{key: in_column(item, TEXT, key) for key, item in turn.items()} for turn in turns]


def fingerprint(paths: Iterable[Path], *, sampled: bool = False) -> str:
    """A hash of files' names, sizes and content; `sampled` reads 64 pieces of a large file (weights) instead of all."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            step = max(size // 64, SAMPLED_BYTES) if sampled else SAMPLED_BYTES
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
