"""Every README is true: its commands parse, its Python runs, its records read, its links and figures hold."""

import json
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import reward_server
import tyro
from PIL import Image

from benchmarks.harness import Options
from benchmarks.report import RESULTS, read_rows
from mmrm_fast.cli import COMMANDS
from mmrm_fast.config_file import parse
from mmrm_fast.data.records import Records

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("mmrm_fast/**/README.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)?(?:#([\w-]+))?\)")
OTHERS = ("git", "cd", "vllm")  # programs that are not ours


def blocks(kind):
    """(README, text) of every fenced block of a language."""
    found = [(path, text) for path in READMES for own, text in BLOCK.findall(path.read_text()) if own == kind]
    return [pytest.param(text, id=f"{path.parent.name}-{place}") for place, (path, text) in enumerate(found)]


def inline_commands():
    """Commands between backticks of running text."""
    for path in READMES:
        text = BLOCK.sub("", path.read_text())
        yield from re.findall(r"`((?:mmrm-fast [a-z]|python |torchrun )[^`]+)`", text)


def commands(text):
    """The commands of a shell block, as words."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def check_command(words):
    """Fail where a command would be refused for what it is called with."""
    program, *rest = words
    if program == "torchrun":
        program, *rest = rest[next(i for i, word in enumerate(rest) if not word.startswith("-")) :]
    elif program == "python":
        program, *rest = rest
    if program in OTHERS:
        return
    script = Path(program).stem
    if program == "mmrm-fast":
        name, *rest = rest
        assert name in COMMANDS
        if rest != ["--help"]:
            parse(COMMANDS[name][0], rest, prog=name)
    elif program in ("pip", "pytest"):
        wanted = re.findall(r"\.\[(\w+)\]", " ".join(rest))
        said = (ROOT / "pyproject.toml").read_text()
        assert all(f"\n{extra} = [" in said for extra in wanted)
    elif program == "curl":
        assert "-d" in rest
    else:
        assert (ROOT / program).is_file(), program
        if program == "benchmarks/run.py":
            tyro.cli(Options, args=[word for word in rest if word != "..."])
        elif script in COMMANDS:
            parse(COMMANDS[script][0], rest, prog=script)


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_are_taken_as_they_stand(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(text):
        check_command(words)


def test_commands_in_sentences_are_taken_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    for text in inline_commands():
        check_command(shlex.split(text.replace("...", "").removesuffix(", ")))


@pytest.mark.parametrize("text", blocks("python"))
def test_python_runs(text, scorer, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 60), "red").save("cat.png")
    for run in ("mine", "robust"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "final").symlink_to(model_folder)
    with reward_server.running(scorer) as url:
        exec(compile(text.replace("http://127.0.0.1:8000", url), "README", "exec"), {})


def test_requests_are_answered(scorer):
    asked = [words for block in blocks("bash") for words in commands(block.values[0]) if words[0] == "curl"]
    with reward_server.running(scorer) as url:
        for _, address, *rest in asked:
            body = json.loads(rest[rest.index("-d") + 1])
            answer = httpx.post(url + urlsplit(address).path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
    assert len(asked) >= 3


@pytest.mark.parametrize("text", [*blocks("jsonl")])
def test_records_read_as_they_stand(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, line in enumerate(text.splitlines()):
        path = tmp_path / f"{place}.jsonl"
        path.write_text(line + "\n")
        group = Records(path, need_pairs=True).group(0)
        assert len(group.responses) >= 2 and group.prompt, line


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(path):
    for target, heading in LINK.findall(path.read_text()):
        if target.startswith("http"):
            continue
        place = (path.parent / target).resolve() if target else path
        assert place.exists(), target
        titles = (
            [
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in place.read_text().splitlines()
                if line.startswith("#")
            ]
            if heading
            else []
        )
        assert not heading or heading in titles, heading


def figures(path):
    """(case, dtype, ours, baseline, ratio) of every row of benchmark tables."""
    header = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "ours" in cells and "baseline" in cells:
            header = ["case", *cells[1:]]
        elif not cells:
            header = []
        elif header and not cells[0].startswith("---"):
            row = dict(zip(header, cells, strict=True))
            yield row["case"], row.get("dtype", "fp32"), row["ours"], row["baseline"], row["ratio"]


def seconds_of(text):
    """(what stands before a time, seconds)."""
    name, number, unit = re.fullmatch(r"(.*?)\s*([\d.]+) (s|ms|µs)", text).groups()
    return name, float(number) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit]


@pytest.mark.parametrize("path", READMES[:2], ids=lambda path: path.parent.name)
def test_figures_are_those_of_a_results_file(path):
    measured = {}
    for file in RESULTS.glob("*.json"):
        for row in read_rows(file):
            short = {"float32": "fp32", "bfloat16": "bf16"}.get(row.dtype, row.dtype)
            measured.setdefault((row.case, short, row.baseline), []).append(row)
    rows = list(figures(path))
    assert len(rows) >= 4
    for case, dtype, ours, baseline, ratio in rows:
        name, baseline_seconds = seconds_of(baseline)
        told = [seconds_of(ours)[1], baseline_seconds, float(ratio.removesuffix("x"))]
        found = [[row.seconds, row.baseline_seconds, row.ratio] for row in measured[case, dtype, name]]
        assert any(own == pytest.approx(told, rel=0.06) for own in found), (case, dtype, name)


def test_the_front_page_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.split()) <= 1800
    assert max(line.count("|") - 1 for line in text.splitlines() if line.startswith("|")) <= 5
