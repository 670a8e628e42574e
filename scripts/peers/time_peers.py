"""A training step of another trainer and of ours, side by side: the same weights, pairs and template, in turns.

    python -m venv swift && swift/bin/pip install ms-swift==4.6.0 timm torchvision "torch<2.14"
    python -m venv trl && trl/bin/pip install trl==1.16.0 "torch<2.14"
    python scripts/peers/time_peers.py --swift swift/bin/python --trl trl/bin/python

Both train the whole model but its vision tower on the CPU in fp32, four pairs a step (with pictures, or of text for
TRL), each program as its user would start it. A step's seconds are the trainer's own clock, start-up left out; the
losses of the first step, which sees the same weights in both, must agree. With TRL, whose optimizer is set as ours,
the table shows all losses, and the rewards of both trained folders are compared.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import tyro
from PIL import Image
from transformers import AutoModelForSequenceClassification

from benchmarks.models import FULL, make_model, model_config
from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint, save_tokenizer
from mmrm_fast.data.images import Tiling
from mmrm_fast.files import json_lines, read_json, write_json_lines
from mmrm_fast.machine import this_machine
from mmrm_fast.score.scorer import Scorer
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
BOUND = 1e-4  # of a loss


@dataclass(frozen=True)
class Outcome:
    """One training."""

    losses: list[float]
    margins: list[float]
    seconds: list[float]  # a step
    peak: int  # bytes, of the largest process
    rewards: list[list[float]] = ()  # before the first step, of chosen and rejected


@dataclass(frozen=True)
class Peer:
    """Another trainer: what both are given in a folder, and its own training."""

    name: str
    write: Callable[[Path], None]  # model/, ours.jsonl, theirs.jsonl
    train: Callable[[Path, Path, Path], Outcome]  # of (folder, run folder, interpreter)


def peers(swift: Path | None = None, trl: Path | None = None, turns: int = 3) -> int:
    """Train by both; the status is 1 where the losses differ.

    Args:
        swift: interpreter of an environment with ms-swift.
        trl: and of one with TRL.
        turns: trainings, ours and theirs in turn.
    """
    pythons = {Peer("ms-swift", write_pictures, train_swift): swift, Peer("TRL", write_texts, train_trl): trl}
    return max(side_by_side(peer, python, turns) for peer, python in pythons.items() if python is not None)


def side_by_side(peer: Peer, python: Path, turns: int) -> int:
    """Train and report; 1 where losses differ."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        peer.write(root)
        outcomes: dict[str, list[Outcome]] = {"ours": [], peer.name: []}
        for turn in range(turns):
            name, train = (("ours", train_here), (peer.name, peer.train))[turn % 2]
            outcomes[name].append(train(root, root / f"run-{turn}", python))
        if peer.name == "TRL":
            report_rewards(root, outcomes[peer.name][0])
    report(outcomes)
    count = STEPS if peer.name == "TRL" else 1  # ms-swift's optimizer is not ours
    ours, theirs = (np.array(runs[0].losses[:count]) for runs in outcomes.values())
    return int(np.abs(ours - theirs).max() > BOUND)


def report_rewards(root: Path, theirs: Outcome) -> None:
    """Print how far rewards of the first step, and those of both trained folders, are from TRL's."""
    records = [
        {"prompt": row["prompt"], "responses": [row[side][0]["content"] for side in ("chosen", "rejected")]}
        for _, row in json_lines(root / "theirs.jsonl")
    ]
    before, ours, trained = (
        np.array(sorted(Scorer.from_pretrained(folder, "cpu").score(records)))
        for folder in (root / "model", root / "run-0" / "final", root / "run-1")
    )
    print(f"rewards before training: {np.abs(before - sorted(theirs.rewards)).max():.1e} from TRL's")
    print(f"rewards after training, both folders read here: {np.abs(ours - trained).max():.1e} apart")


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


def write_pictures(root: Path) -> None:
    """A model and the same pairs with pictures twice; ms-swift puts the newline behind a picture itself."""
    write_model(root / "model")
    rng, rows = np.random.default_rng(0), []
    for number, size in enumerate(SIZES):
        path = root / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC).save(path)
        question, chosen, rejected = (" ".join(rng.choice(WORDS, count)) for count in (20, 100, 60 + 30 * number))
        rows.append((str(path), question, chosen, rejected))
    for name, slot in (("ours", "<image>\n"), ("theirs", "<image>")):
        write_json_lines(root / f"{name}.jsonl", [pair(slot, *row) for row in rows])


def write_texts(root: Path) -> None:
    """A sequence classifier, and pairs whose two responses share a prompt."""
    tiny = CheckpointFolder(TINY_CHECKPOINT).tokenizer
    tiny.chat_template = CHATML
    config = model_config(replace(FULL, vocab_size=len(tiny))).text_config
    config.num_labels, config.pad_token_id = 1, tiny.pad_token_id
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():  # large enough that attention is not uniform
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(root / "model")
    save_tokenizer(root / "model", tiny)
    rng, rows = np.random.default_rng(0), []
    for number in range(PAIRS):
        question, chosen, rejected = (" ".join(rng.choice(WORDS, count)) for count in (300, 100, 60 + 30 * number))
        named = {"prompt": question, "chosen": chosen, "rejected": rejected}
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows.append({name: [{"role": roles[name], "content": text}] for name, text in named.items()})
    for name in ("ours", "theirs"):
        write_json_lines(root / f"{name}.jsonl", rows)


def pair(slot: str, path: str, question: str, chosen: str, rejected: str) -> dict:
    """A preference in ms-swift's layout, which is read here too."""
    turns = [{"role": "user", "content": slot + question}, {"role": "assistant", "content": chosen}]
    return {"messages": turns, "rejected_response": rejected, "images": [path]}


def train_here(root: Path, run: Path, python: Path) -> Outcome:
    """Our training."""
    options = {
        "model": root / "model", "data": root / "ours.jsonl", "pairs-per-step": PAIRS, "max-steps": STEPS,
        "epochs": STEPS, "lr": LR, "lr-schedule": "constant", "warmup-ratio": 0, "output-dir": run,
        "weight-decay": 0, "beta2": 0.999,
        "tokens-per-micro-batch": 65_536, "save-minutes": 0, "report-to": (),
    }  # fmt: skip
    peak = timed([sys.executable, "-m", "mmrm_fast.cli", "train", *flags(options)], run.with_suffix(".log"))
    rows = [row for _, row in json_lines(run / "metrics.jsonl") if "loss" in row]
    return Outcome(*([row[key] for row in rows] for key in ("loss", "margin", "seconds")), peak)


def train_swift(root: Path, run: Path, python: Path) -> Outcome:
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


def train_trl(root: Path, run: Path, python: Path) -> Outcome:
    """TRL's."""
    options = {
        "model": root / "model",
        "data": root / "theirs.jsonl",
        "out": run,
        "pairs": PAIRS,
        "steps": STEPS,
        "lr": LR,
    }
    timed([str(python), str(Path(__file__).with_name("trl_rewards.py")), *flags(options)], run.with_suffix(".log"))
    return Outcome(**read_json(run / "outcome.json"))


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
    rows = []
    for name, runs in outcomes.items():
        losses, margin = " ".join(f"{loss:.6f}" for loss in runs[0].losses), f"{runs[0].margins[0]:+.4f}"
        times, peak = seconds[name] / seconds["ours"], max(run.peak for run in runs) / 2**30
        rows.append([name, f"{seconds[name]:.1f}", f"{times:.2f}", f"{peak:.1f}", losses, margin])
    heads = ["trainer", "seconds a step", "times ours", "peak GiB", "losses", "first margin"]
    print_table(f"Four pairs a step on {this_machine().cpu}", heads, rows)
    print(json.dumps({name: [run.__dict__ for run in runs] for name, runs in outcomes.items()}))


if __name__ == "__main__":
    sys.exit(tyro.cli(peers, description=__doc__))
