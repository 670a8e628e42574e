"""What the commands that judge take, a dataclass each; the docstring under a field is its `--help`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mmrm_fast.config import ModelConfig, ReadConfig


@dataclass(frozen=True)
class AuditConfig(ReadConfig):
    """Say what text alone can tell of preference files, before a GPU is booked: shortcuts, wrong labels, duplicates."""

    data: tyro.conf.Positional[tuple[Path, ...]]
    """Preference files of any layout that training reads."""
    model: Path | None = None
    """Folder of an InternVL checkpoint, whose states over text alone are a further proxy."""
    eval: tuple[str, ...] = ()
    """Test sets, NAME=FILE, that are tested on and looked for in the files."""
    output_dir: Path = Path("runs/audit")
    """Folder of audit.json and audit.html."""


@dataclass(frozen=True)
class EvaluateConfig(ReadConfig, ModelConfig):
    """Score a benchmark of the field, or any preference file, and say how far its numbers can be trusted."""

    bench: Literal[
        "vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench", "rewardbench", "rewardbench-2", "pairs"
    ] = "pairs"
    """Layout, groups and metrics: a benchmark as published, or `pairs` for any preference records."""
    data: Path = Path("pairs.jsonl")
    """Parquet, JSONL, JSON or CSV file, or the folder that holds it; of splits the test one, else validation."""
    max_pairs: int = 2048
    """Most pairs of a record: of more so many are drawn, and the others counted."""
    ties: Literal["half", "wrong"] = "half"
    """What a tie counts in the benchmark's figures: a half (a share among several), or nothing, as in RewardBench's."""
    output_dir: Path = Path("runs/evaluate")
    """Folder of results.json, reliability.svg and margins.svg."""


@dataclass(frozen=True)
class BestOfNConfig:
    """True quality of the response that reward models select out of N, as N grows: a curve a model on one plot."""

    scores: tuple[str, ...] = ()
    """Scores of one model each, as `mmrm-fast score` writes them: FILE or NAME=FILE."""
    truth: Path = Path("candidates.jsonl")
    """Records with a list `truth` in the order of the responses, or rows record, response_index, truth."""
    n: str = "1,2,4,...,64"
    """Numbers of responses to choose from; `...` doubles."""
    output_dir: Path = Path("runs/best-of-n")
    """Folder of best-of-n.json, best-of-n.svg and best-of-n.png."""


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML page about runs: curves, margins, calibration, the pairs worth looking at."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, such as runs/robust."""
    out: Path | None = None
    """The page. Default: report.html in the first run's folder."""
