"""What the records of files hold, as far as they were looked at: pictures or none, fields that were read or not."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from mmrm_fast.data.records import Group, RecordError, Records, iter_groups
from mmrm_fast.data.splits import said_left
from mmrm_fast.data.types import file_of

MAX_KINDS = 10_000  # of records that are told apart
MAX_FILES = 20  # that have a line of their own
PEEKED = 1000  # records that a scoring looks at before it begins, of all files together


class Kind(NamedTuple):
    """What the census tells of a record."""

    file: str
    pictured: bool | None  # None of one that cannot be used
    read: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: Group | RecordError) -> "Kind":
        """That of a record, or of one that cannot be used."""
        if isinstance(record, RecordError):
            return cls(file_of(record.source), None)
        return cls(file_of(record.source), bool(record.images), record.read, record.unread)


Census = Counter[Kind]


def counted(kinds: Iterable[Kind], census: Census | None = None) -> Census:
    """How many records there are of each kind, added to a census; past `MAX_KINDS`, unread fields are one, "..."."""
    census = Counter() if census is None else census
    for kind in kinds:
        census[kind if kind in census or len(census) < MAX_KINDS else kind._replace(unread=("...",))] += 1
    return census


def peek(records: Records) -> Census:
    """The census of the first records of the first files, `PEEKED` of all together at most."""
    edges = records.edges.tolist()[: MAX_FILES + 1]
    share = PEEKED // max(1, len(edges) - 1)
    places = [place for start, stop in pairwise(edges) for place in range(start, stop)[:share]]
    return counted(map(Kind.of, iter_groups(records, places)))


def told(records: Records, census: Census) -> Iterator[str]:
    """Lines that say which files of folders were taken and what their records hold."""
    if left := said_left([file.path for file in records.files], records.left):
        yield left
    if census:
        yield from told_files(census, {str(file.path): len(file) for file in records.files})


def told_files(census: Census, sizes: Mapping[str, int]) -> Iterator[str]:
    """A line a file, of `sizes` records; those over `MAX_FILES` have one together."""
    names = list(sizes)
    for name in names[:MAX_FILES]:
        yield f"{name}: {told_kinds([(kind, n) for kind, n in census.items() if kind.file == name], sizes[name])}"
    if others := set(names[MAX_FILES:]):
        found = [(kind, number) for kind, number in census.items() if kind.file in others]
        yield f"{len(others)} more files: {told_kinds(found, sum(sizes[name] for name in others))}"


def told_kinds(kinds: list[tuple[Kind, int]], size: int) -> str:
    """What kinds of records there are among so many."""
    pictured, fields = Counter(), {"read": Counter(), "not read": Counter()}
    for kind, number in kinds:
        pictured[kind.pictured] += number
        fields["read"].update(dict.fromkeys(kind.read, number))
        fields["not read"].update(dict.fromkeys(kind.unread, number))
    whole, parts = pictured[True] + pictured[False], [f"{size} records"]
    parts += [f"{pictured.total()} looked at"] * (pictured.total() < size)
    parts += [f"{pictured[True]} with pictures", f"{pictured[False]} without"] if whole else []
    parts += [f"{pictured[None]} that cannot be used"] if pictured[None] else []
    told = [", ".join(parts)]
    for what, counts in fields.items():
        by_number = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        names = [name if number == whole else f"{name} ({number})" for name, number in by_number]
        told += [f"{what}: {', '.join(names)}"] if names else []
    return "; ".join(told)
