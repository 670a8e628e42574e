"""Files of records: JSONL by line, compressed or not, Parquet by row group; limits, folders, globs, workers."""

import gzip
import json
import multiprocessing
import os
import pickle
import resource

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mmrm_fast.data import lines
from mmrm_fast.data.records import RecordError, Records, iter_groups


@pytest.fixture
def write_bytes(tmp_path):
    def write(content: bytes) -> Records:
        path = tmp_path / "records.jsonl"
        path.write_bytes(content)
        return Records(path)

    return write


def test_bytes_that_are_not_utf8_are_an_error(write_bytes):
    with pytest.raises(RecordError, match="not valid JSON"):
        write_bytes(b'{"prompt": "\xff", "responses": ["a"]}\n').group(0)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        Records(tmp_path / "none.jsonl")


# lines


def scoring_line(prompt: str) -> bytes:
    return json.dumps({"prompt": prompt, "responses": ["a"]}).encode()


LINES = {
    "blank lines": (b"\n\n%s\n\n%s\n", [3, 5]),
    "lines of white space": (b"  \t\n%s\n \r\n%s\n   ", [2, 4]),
    "form feeds": (b"%s\n\f\n%s\n\v\n", [1, 3]),
    "CRLF": (b"%s\r\n\r\n%s\r\n", [1, 3]),
    "no newline at the end": (b"%s\n%s", [1, 2]),
    "byte order mark": (b"\xef\xbb\xbf%s\n%s\n", [1, 2]),
    "indented": (b"   %s\n\t%s \n", [1, 2]),
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("scan_bytes", [1, 7, 1 << 24])
def test_records_keep_their_line_numbers(monkeypatch, write_bytes, kind, scan_bytes):
    monkeypatch.setattr(lines, "SCAN_BYTES", scan_bytes)
    form, numbers = LINES[kind]
    file = write_bytes(form % (scoring_line("first"), scoring_line("second")))
    assert [(group.prompt, group.source) for group in iter_groups(file)] == [
        ("first", f"{file.files[0].path}:{numbers[0]}"),
        ("second", f"{file.files[0].path}:{numbers[1]}"),
    ]


def test_a_long_line_of_spaces_is_not_a_record(write_bytes):
    assert len(write_bytes(b" " * 200 + b"\n" + scoring_line("p") + b"\n")) == 1


@pytest.mark.parametrize("content", [b"", b"\n", b"\n\n \n", b"   "])
def test_a_file_of_blank_lines_has_no_records(write_bytes, content):
    assert len(write_bytes(content)) == 0


def test_a_file_longer_than_the_scan_chunk_is_read_whole(monkeypatch, write_bytes):
    monkeypatch.setattr(lines, "SCAN_BYTES", 64)
    prompts = ["x" * length for length in range(150)]
    file = write_bytes(b"\n".join(map(scoring_line, prompts)))
    assert [file.group(index).prompt for index in range(len(file))] == prompts
    assert file.group(149).source.endswith(":150")


# compressed files


PACKERS = {".jsonl.gz": gzip.compress, ".jsonl.zst": lambda content: pa.compress(content, "zstd", asbytes=True)}


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_reads_as_the_plain_one(tmp_path, suffix):
    content = b"\n".join(scoring_line(f"prompt {i}") if i % 3 else b" " for i in range(50))
    plain, packed = tmp_path / "a.jsonl", tmp_path / ("a" + suffix)
    plain.write_bytes(content)
    packed.write_bytes(PACKERS[suffix](content))
    expected, file = Records(plain), Records(packed)
    assert [g.prompt for g in iter_groups(file)] == [g.prompt for g in iter_groups(expected)]
    assert file.group(5).source == expected.group(5).source.replace(str(plain), str(packed))


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_of_several_frames_is_read_to_its_end(tmp_path, suffix):
    path = tmp_path / ("a" + suffix)
    path.write_bytes(b"".join(PACKERS[suffix](scoring_line(f"prompt {i}") + b"\n") for i in range(3)))
    assert len(Records(path)) == 3


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["truncated", "not compressed"])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, suffix, damage):
    noise = json.dumps({"prompt": os.urandom(4000).hex(), "responses": ["a"]}).encode()
    path = tmp_path / ("a" + suffix)
    path.write_bytes(PACKERS[suffix](noise)[:2000] if damage == "truncated" else noise)
    with pytest.raises(ValueError, match=r"a\.jsonl\.\w+: cannot be unpacked"):
        Records(path)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_that_unpacks_to_too_much_is_refused_with_a_remedy(monkeypatch, tmp_path, suffix):
    monkeypatch.setattr(lines, "MAX_UNPACKED_BYTES", 100_000)
    path = tmp_path / ("a" + suffix)
    path.write_bytes(PACKERS[suffix](b" " * 200_000))
    with pytest.raises(ValueError, match="unpacks to over 100000 bytes; unpack it yourself, or set TMPDIR"):
        Records(path)


def test_an_unpacked_copy_leaves_no_file_behind(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(lines.tempfile, "tempdir", str(tmp_path / "scratch"))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(scoring_line("p")))
    assert Records(path).group(0).prompt == "p"
    assert list((tmp_path / "scratch").iterdir()) == []


# Parquet

ROWS = [
    {
        "id": i,
        "prompt": f"prompt {i}",
        "image": {"bytes": bytes([i]), "path": f"{i}.png"},
        "chosen": "a",
        "rejected": "b",
    }
    for i in range(7)
]


@pytest.fixture
def write_parquet(tmp_path):
    def write(rows, name="a.parquet", **options):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name, **options)
        return tmp_path / name

    return write


def test_a_parquet_file_is_read_in_any_order(write_parquet):
    file = Records(write_parquet(ROWS, row_group_size=3), need_pairs=True)
    for index in (6, 0, 3, 2, 5):
        group = file.group(index)
        assert (group.prompt, group.images, group.img_path) == (f"prompt {index}", (bytes([index]),), f"{index}.png")
        assert (group.id, group.source) == (str(index), f"{file.files[0].path}:{index + 1}")


def test_only_columns_that_a_record_can_have_are_read(write_parquet):
    (file,) = Records(write_parquet([{**row, "embedding": [0.0] * 10} for row in ROWS])).files
    assert "embedding" not in file.fields(0)


def test_several_parquet_files_keep_one_row_group_in_memory(write_parquet, tmp_path):
    for name in ("a.parquet", "b.parquet"):
        write_parquet(ROWS, name)
    file = Records(tmp_path / "*.parquet")
    for index in range(len(file)):
        file.group(index)
        assert len(file.files[0].kept) == 1
    assert file.files[0].kept is file.files[1].kept


def test_a_row_group_too_large_to_be_read_at_random_is_refused_with_a_remedy(monkeypatch, write_parquet):
    monkeypatch.setattr(lines, "MAX_ROW_GROUP_BYTES", 10)
    with pytest.raises(ValueError, match=r"a\.parquet: a row group of \d+ bytes is too large .* row_group_size=100"):
        Records(write_parquet(ROWS))


def test_a_file_that_is_not_parquet_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: not a Parquet file"):
        Records(tmp_path / "a.parquet")


# several files, limits, workers


def test_a_folder_and_a_glob_are_their_files_in_order_of_names(tmp_path, write_parquet):
    (tmp_path / "b.jsonl").write_bytes(scoring_line("b"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(scoring_line("a")))
    (tmp_path / "readme.md").write_text("not records")
    (tmp_path / "errors.jsonl").write_text('{"record": 3, "reason": "a scoring run lists what failed here"}')
    write_parquet(ROWS[:1], "c.parquet")
    for spec, prompts in ((tmp_path, ["a", "b", "prompt 0"]), (tmp_path / "?.jsonl*", ["a", "b"])):
        groups = list(iter_groups(Records(spec)))
        assert [group.prompt for group in groups] == prompts
        assert [group.record for group in groups] == list(range(len(prompts)))


@pytest.mark.parametrize("spec", ["", "*.jsonl"])
def test_a_folder_or_glob_without_record_files_is_refused(tmp_path, spec):
    with pytest.raises(ValueError, match=r"expected \.parquet, \.jsonl"):
        Records(tmp_path / spec)


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_array_is_its_items(tmp_path, name):
    content = json.dumps([{"prompt": p, "responses": ["a"]} for p in "pq"] + [7], indent=1).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    first, second, wrong = iter_groups(pickle.loads(pickle.dumps(Records(path))))
    assert [(group.prompt, group.source) for group in (first, second)] == [("p", f"{path}[0]"), ("q", f"{path}[1]")]
    assert str(wrong) == f"{path}[2]: a record is a JSON object, this is a number"


def test_a_large_json_array_is_refused_with_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LIST_BYTES", 10)
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "p", "responses": ["a"]}]))
    with pytest.raises(ValueError, match=r"one JSON array of \d+ bytes; write a record a line: jq -c"):
        Records(tmp_path / "a.json")


def test_an_array_that_is_not_json_is_refused_by_name(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "p"},')
    with pytest.raises(ValueError, match=r"a\.json: not valid JSON"):
        Records(tmp_path / "a.json")


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_a_csv_file_is_its_rows_by_the_names_in_its_first_line(tmp_path, mark):
    path = tmp_path / "a.csv"
    path.write_text(mark + 'prompt,chosen,rejected\n"two\nlines",a,b\nq,c,d\n', encoding="utf-8")
    groups = list(iter_groups(Records(path)))
    assert [group.prompt for group in groups] == ["two\nlines", "q"]
    assert [group.source for group in groups] == [f"{path}:3", f"{path}:4"]


def test_a_csv_file_that_is_not_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(ValueError, match=r"a\.csv: .*utf-8"):
        Records(tmp_path / "a.csv")


def test_a_line_over_the_limit_is_an_error_of_that_record(monkeypatch, write_bytes):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    file = write_bytes(scoring_line("p") + b"\n" + scoring_line("p" * 200) + b"\n" + scoring_line("q"))
    assert [type(result) is RecordError for result in iter_groups(file)] == [False, True, False]
    with pytest.raises(RecordError, match="over the limit of 100"):
        file.group(1)


def test_the_index_of_a_file_takes_16_bytes_a_line(write_bytes):
    file = write_bytes(b"{}\n" * 100_000)
    (lines,) = file.files
    assert (lines.offsets.nbytes + lines.line_numbers.nbytes) / len(file) == 16


def read_prompts(file, indices, answers):
    answers.put([file.group(index).prompt for index in indices])


@pytest.mark.parametrize("kind", ["plain", "gzip", "parquet"])
def test_forked_readers_do_not_disturb_each_other(tmp_path, write_parquet, kind):
    rows = [{"prompt": f"prompt {i}", "responses": ["a"]} for i in range(400)]
    if kind == "parquet":
        path = write_parquet(rows, row_group_size=10)
    else:
        content = b"\n".join(json.dumps(row).encode() for row in rows)
        path = tmp_path / ("a.jsonl.gz" if kind == "gzip" else "a.jsonl")
        path.write_bytes(gzip.compress(content) if kind == "gzip" else content)
    file = Records(path)
    orders = [np.random.default_rng(seed).permutation(400).tolist() for seed in range(2)]
    context = multiprocessing.get_context("fork")
    answers = [context.SimpleQueue() for _ in orders]
    for order, answer in zip(orders, answers, strict=True):
        context.Process(target=read_prompts, args=(file, order, answer), daemon=True).start()
    for order, answer in zip(orders, answers, strict=True):
        assert answer.get() == [f"prompt {i}" for i in order]


@pytest.mark.parametrize("kind", ["plain", "parquet"])
def test_a_pickled_file_opens_again(write_bytes, write_parquet, kind):
    file = write_bytes(scoring_line("prompt 0")) if kind == "plain" else Records(write_parquet(ROWS))
    assert pickle.loads(pickle.dumps(file)).group(0) == file.group(0)


def read_many(folder, num_files):
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    records = Records(folder)
    order = np.random.default_rng(0).permutation(len(records))
    assert [records.group(index).prompt for index in order] == [f"row {index}" for index in order.tolist()]
    assert len(records) == num_files


def test_a_folder_of_more_files_than_may_be_open_is_read(tmp_path):
    rows = [{"prompt": f"row {index}", "responses": ["a"]} for index in range(500)]
    for index, row in enumerate(rows):
        if index % 2:
            (tmp_path / f"{index:03d}.jsonl").write_text(json.dumps(row) + "\n")
        else:
            parquet.write_table(pa.Table.from_pylist([row]), tmp_path / f"{index:03d}.parquet")
    process = multiprocessing.get_context("fork").Process(target=read_many, args=(tmp_path, 500))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_a_file_that_was_replaced_while_others_were_read_is_an_error_of_its_records(tmp_path):
    for index in range(lines.MAX_OPEN + 2):
        (tmp_path / f"{index:03d}.jsonl").write_text(json.dumps({"prompt": "p", "responses": ["a"]}) + "\n")
    records = Records(tmp_path)
    for index in range(len(records)):
        records.group(index)
    (tmp_path / "000.jsonl").write_text(json.dumps({"prompt": "other", "responses": ["a"]}) + "\n")
    with pytest.raises(RecordError, match=r"000\.jsonl:1: cannot be read \(.* has changed since it was opened first"):
        records.group(0)


def open_packed(folder):
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    with pytest.raises(ValueError, match=r"more open files than `ulimit -n` \(256\) allows: raise it"):
        Records(folder)


def test_unpacked_files_that_are_more_than_may_be_open_are_refused_with_the_remedy(tmp_path):
    for index in range(300):
        (tmp_path / f"{index:03d}.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "p", "responses": ["a"]}\n'))
    process = multiprocessing.get_context("fork").Process(target=open_packed, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
