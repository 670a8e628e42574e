"""A training step of another trainer and of ours, side by side: the same weights, pairs and template, in turns.

    python -m venv swift && swift/bin/pip install ms-swift==4.6.0 timm torchvision "torch<2.14"
    python scripts/peers/time_swift.py --python swift/bin/python

Both train the whole model but its vision tower on the CPU in fp32, four pairs with pictures a step, each program as
its user would start it. A step's seconds are the trainer's own clock, start-up left out; the losses of the first step,
which sees the same weights in both, must agree.
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks.models import FULL, make_model
from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.data.images import Tiling
from mmrm_fast.files import json_lines, write_json_lines
from mmrm_fast.machine import this_machine
from mmrm_fast.tables import print_table
from mmrm_fast.train.command import TINY_CHECKPOINT

PAIRS, STEPS, MAX_TILES, LR = 4, 3, 4, 1e-5
SIZES = ((448, 448), (896, 448), (896, 896), (448, 1344))  # pixels: 1, 3, 5 and 4 tiles with the thumbnail
WORDS = ("the", "picture", "shows", "two", "red", "circles", "left", "blue", "squares")
CHATML = (
    "{%- for message in messages %}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
    "{%- endfor %}"
)
BOUND = 1e-4  # of the first loss


@dataclass(frozen=True)
class Outcome:
    """One training."""

    losses: list[float]
    margins: list[float]
    seconds: list[float]  # a step
    peak: int  # bytes, of the largest process


def peers(python: Path, turns: int = 3) -> int:
    """Train by both; the status is 1 where the first losses differ.

    Args:
        python: interpreter of an environment with ms-swift.
        turns: trainings, ours and theirs in turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_model(root / "model")
        write_pairs(root)
        outcomes = {"ours": [], "ms-swift": []}
        for turn in range(turns):
            name = ("ours", "ms-swift")[turn % 2]
            train = train_here if name == "ours" else train_there
            outcomes[name].append(train(root, root / f"run-{turn}", python))
    report(outcomes)
    first = [runs[0].losses[0] for runs in outcomes.values() if runs]
    return int(max(first) - min(first) > BOUND)


def write_model(folder: Path) -> None:
    """The benchmarks' model with 448-pixel tiles, read at the template's last token as ms-swift does."""
    tiny = CheckpointFolder(TINY_CHECKPOINT).load()
    tiny.tokenizer.chat_template = CHATML
    sizes = replace(FULL, vocab_size=len(tiny.tokenizer))
    model = make_model(sizes)
    model.model.config.image_token_id = tiny.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    model.model.config.text_config.pad_token_id = tiny.tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight.normal_(std=0.05)
    tiling = Tiling(448, 1, MAX_TILES, pad_colour=tiny.tiling.pad_colour)
    tokens = sizes.tokens_per_tile
    save_checkpoint(
        folder, replace(tiny, model=model, tiling=tiling, tokens_per_tile=tokens, max_length=4096, reward_token="last")
    )


def write_pairs(root: Path) -> None:
    """ours.jsonl and theirs.jsonl: the same pairs; ms-swift puts the newline behind a picture itself."""
    rng, rows = np.random.default_rng(0), []
    for number, size in enumerate(SIZES):
        path = root / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC).save(path)
        question, chosen, rejected = (" ".join(rng.choice(WORDS, count)) for count in (20, 100, 60 + 30 * number))
        rows.append((str(path), question, chosen, rejected))
    for name, slot in (("ours", "<image>\n"), ("theirs", "<image>")):
        write_json_lines(root / f"{name}.jsonl", [pair(slot, *row) for row in rows])


def pair(slot: str, path: str, question: str, chosen: str, rejected: str) -> dict:
    """A preference in ms-swift's layout, which is read here too."""
    turns = [{"role": "user", "content": slot + question}, {"role": "assistant", "content": chosen}]
    return {"messages": turns, "rejected_response": rejected, "images": [path]}


def train_here(root: Path, run: Path, python: Path) -> Outcome:
    """Our training."""
    options = {
        "model": root / "model", "data": root / "ours.jsonl", "pairs-per-step": PAIRS, "max-steps": STEPS,
        "epochs": STEPS, "lr": LR, "lr-schedule": "constant", "warmup-ratio": 0, "output-dir": run,
        "tokens-per-micro-batch": 65_536, "save-minutes": 0, "report-to": (),
    }  # fmt: skip
    peak = timed([sys.executable, "-m", "mmrm_fast.cli", "train", *flags(options)], run.with_suffix(".log"))
    rows = [row for _, row in json_lines(run / "metrics.jsonl") if "loss" in row]
    return Outcome(*([row[key] for row in rows] for key in ("loss", "margin", "seconds")), peak)


def train_there(root: Path, run: Path, python: Path) -> Outcome:
    """ms-swift's."""
    options = {
        "rlhf_type": "rm", "model": root / "model", "model_type": "internvl", "template": "internvl_hf",
        "dataset": root / "theirs.jsonl", "per_device_train_batch_size": PAIRS, "gradient_accumulation_steps": 1,
        "max_steps": STEPS, "torch_dtype": "float32", "logging_steps": 1, "tuner_type": "full", "freeze_vit": "true",
        "freeze_aligner": "false", "learning_rate": LR, "lr_scheduler_type": "constant", "warmup_ratio": 0,
        "output_dir": run, "save_strategy": "no", "eval_strategy": "no", "split_dataset_ratio": 0, "use_cpu": "true",
        "gradient_checkpointing": "false", "attn_impl": "sdpa", "max_length": 8192, "center_rewards_coefficient": 0,
        "report_to": "none",
    }  # fmt: skip
    peak = timed([str(python.parent / "swift"), "rlhf", *flags(options)], run.with_suffix(".log"))
    (log,) = run.glob("*/logging.jsonl")
    rows = [row for _, row in json_lines(log) if "loss" in row]
    totals = [0.0, *(row["train_speed(s/it)"] * number for number, row in enumerate(rows, 1))]
    seconds = [after - before for before, after in pairwise(totals)]
    return Outcome([row["loss"] for row in rows], [row["rewards/margins"] for row in rows], seconds, peak)


def flags(options: dict) -> list[str]:
    """`--name value` of each; a tuple is several values."""
    pairs = ((name, value if isinstance(value, tuple) else (value,)) for name, value in options.items())
    return [word for name, values in pairs for word in (f"--{name}", *map(str, values))]


def timed(command: Sequence[str], log: Path) -> int:
    """Run a command; the peak memory in bytes of its largest process. Raises `RuntimeError` with its last lines."""
    with open(log, "w") as file:
        process = os.posix_spawn(
            command[0], command, os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n" + "\n".join(log.read_text().splitlines()[-20:]))
    return usage.ru_maxrss * 1024


def report(outcomes: dict[str, list[Outcome]]) -> None:
    """Print a row a trainer, of the steps after the first."""
    seconds = {name: median(s for run in runs for s in run.seconds[1:]) for name, runs in outcomes.items()}
    rows = [
        [
            name, f"{seconds[name]:.1f}", f"{seconds[name] / seconds['ours']:.2f}",
            f"{max(run.peak for run in runs) / 2**30:.1f}", f"{runs[0].losses[0]:.4f}", f"{runs[0].margins[0]:+.4f}",
        ]
        for name, runs in outcomes.items()
    ]  # fmt: skip
    heads = ["trainer", "seconds a step", "times ours", "peak GiB", "first loss", "first margin"]
    print_table(f"Four pairs a step on {this_machine().cpu}", heads, rows)
    print(json.dumps({name: [run.__dict__ for run in runs] for name, runs in outcomes.items()}))


if __name__ == "__main__":
    sys.exit(tyro.cli(peers, description=__doc__))
