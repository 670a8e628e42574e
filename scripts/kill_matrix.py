"""Kills trainings and scorings at random moments, goes on each time, and compares the end with that of whole runs.

    python scripts/kill_matrix.py --kills 200 --seed 0

A kill is a SIGKILL: before a drawn one of all that is synced, renamed or told of a run, or after a drawn time. Of a
training every step must be there once, with bitwise the losses and weights of the run that nobody killed; of a scoring
every response once, with the same score. A tenth of the kills are of scorings on Ray: of the driver, or of its actors.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import psutil
import torch
import tyro
from safetensors.torch import load_file

from mmrm_fast.config import ScoreConfig, TrainConfig
from mmrm_fast.config_file import with_options
from mmrm_fast.score import command as scoring
from mmrm_fast.train.command import TINY_CHECKPOINT, train

NUM_PAIRS, NUM_RECORDS, NUM_RESPONSES = 24, 300, 3
LIMIT_SECONDS = 300  # of one run


def main(kills: int = 200, seed: int = 0) -> int:
    """Kill so often; the exit status, 1 where a run did not end as one that nobody killed.

    Args:
        kills: of trainings and of scorings together.
        seed: of all that is drawn; times are not the same again, drawn places are.
    """
    torch.set_num_threads(1)  # forks do not have the threads of this process
    draw, tally = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as folder:
        root = Path(folder)
        write_records(root)
        expected = root / "whole"
        assert in_child(partial(train, train_config(root, expected))) == 0
        on_ray, alone = kills // 10, (kills - kills // 10) // 2
        print(f"seed {seed}: {kills - on_ray - alone} kills of trainings, {alone} of scorings, {on_ray} on Ray")
        killed_trainings(root, kills - on_ray - alone, draw, tally)
        assert in_child(partial(score_here, score_config(root, root / "whole.jsonl"))) == 0
        killed_scorings(root, alone, draw, tally, dies_in_child)
        killed_scorings(root, on_ray, draw, tally, dies_on_ray)
    print(", ".join(f"{number} {what}" for what, number in tally.items()))
    return int(tally["runs that ended otherwise"] > 0)


def write_records(root: Path) -> None:
    """Pairs to train on and responses to score, all different."""
    pairs = ({"prompt": f"Question {i}?", "chosen": f"yes {i}", "rejected": f"no no {i}"} for i in range(NUM_PAIRS))
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    records = ({"prompt": f"Question {i}?", "responses": responses(i)} for i in range(NUM_RECORDS))
    (root / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def responses(record: int) -> list[str]:
    """The responses of a record to score."""
    return [f"answer {number} to {record}" for number in range(NUM_RESPONSES)]


def train_config(root: Path, folder: Path, **options) -> TrainConfig:
    """A short training with a checkpoint after every step."""
    return with_options(
        TrainConfig(), model=TINY_CHECKPOINT, data=(str(root / "pairs.jsonl"),), output_dir=folder, report_to=(),
        pairs_per_step=4, robust=True, save_every=1, keep=1, lr=1e-3, eval=(f"own={root / 'pairs.jsonl'}",),
        eval_every=3, **options,
    )  # fmt: skip


def score_config(root: Path, out: Path) -> ScoreConfig:
    """A scoring by the model that the whole training left."""
    return ScoreConfig(model=root / "whole" / "final", data=root / "records.jsonl", out=out)


def killed_trainings(root: Path, kills: int, draw: random.Random, tally: Counter) -> None:
    """Trainings, killed until there were so many kills; each goes on until it ends."""
    left = kills
    for number in count():
        folder = root / f"training-{number}"
        config = train_config(root, folder, resume="auto")
        while left and dies_in_child(partial(train_and_tell, config), draw, 60):
            left -= 1
            tally["kills of trainings"] += 1
        status = in_child(partial(train, config))
        note(tally, status == 0 and same_training(root / "whole", folder), folder)
        if not left:
            return


def same_training(whole: Path, folder: Path) -> bool:
    """Whether two run folders hold the same steps, losses and weights."""
    rows = [[json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()] for own in (whole, folder)]
    steps, losses = ([[row[name] for row in own] for own in rows] for name in ("step", "loss"))
    for name in ("final", "proxy"):
        one, two = (load_file(own / name / "model.safetensors") for own in (whole, folder))
        if one.keys() != two.keys() or not all(torch.equal(one[key], two[key]) for key in one):
            return False
    return steps[0] == steps[1] == list(range(1, len(steps[0]) + 1)) and losses[0] == losses[1]


def killed_scorings(root: Path, kills: int, draw: random.Random, tally: Counter, dies: Callable) -> None:
    """Scorings, killed until there were so many kills; each goes on until it ends."""
    left = kills
    for number in count():
        out = root / f"{dies.__name__}-{number}.jsonl"
        config = score_config(root, out)
        while left and not has_ended(out) and dies(partial(score_here, config), draw, 40, out):
            left -= 1
            tally["kills of scorings"] += 1
        status = 0 if has_ended(out) else in_child(partial(score_here, config))
        rows = [json.loads(line) for line in out.read_text().splitlines()] if status == 0 else []
        note(tally, rows == [json.loads(line) for line in (root / "whole.jsonl").read_text().splitlines()], out)
        if not left:
            return


def has_ended(out: Path) -> bool:
    """Whether a scoring is done, killed though it may have been on its way out: it would not be done over."""
    return out.exists() and not out.with_name(out.name + ".parts").exists()


def note(tally: Counter, is_same: bool, place: Path) -> None:
    """Count a run that has ended, and say where one ended otherwise."""
    tally["runs that ended as whole ones"] += is_same
    tally["runs that ended otherwise"] += not is_same
    if not is_same:
        print(f"{place.name}: NOT as the run that nobody killed")


def train_and_tell(config: TrainConfig, tick: Callable[[], None]) -> None:
    """Train, with every event a moment to die at."""
    train(config, lambda event, trainer: tick())


def score_here(config: ScoreConfig, tick: Callable[[], None] = lambda: None) -> None:
    """Score in this process: what is written, without Ray."""

    def chunks(config, shards, todo) -> Iterator[Counter]:
        actor = scoring.ScoringActor(config, shards, num_threads=1)
        for chunk in todo:
            tick()
            yield actor.score(chunk)

    scoring.scored_chunks = chunks
    assert scoring.score(config) == 0


def dies_in_child(run: Callable, draw: random.Random, moments: int, place: object = "training") -> bool:
    """Run in a child that is killed at a drawn moment or after a drawn time; whether it was, before it ended."""
    by_time, moment, seconds = draw.random() < 0.5, draw.randrange(moments), draw.uniform(0.1, 8)
    started = time.monotonic()
    status = in_child(partial(run, tick=lambda: None), seconds) if by_time else in_child(partial(dying, run, moment))
    what = f"after {seconds:.2f} s" if by_time else f"at moment {moment}"
    died = status == -signal.SIGKILL
    print(f"{getattr(place, 'name', place)}: {'killed ' + what if died else f'ended with {status}'}"
          f" ({time.monotonic() - started:.1f} s)", flush=True)  # fmt: skip
    assert died or status == 0, status
    return died


def dying(run: Callable, moment: int) -> None:
    """Run, and die at the so-manyth of what is told, synced and renamed."""
    left = iter(range(moment))

    def tick() -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(function: Callable) -> Callable:
        return lambda *arguments: (tick(), function(*arguments))[1]

    os.replace, os.fsync = ticking(os.replace), ticking(os.fsync)
    run(tick=tick)


def in_child(run: Callable, seconds: float = LIMIT_SECONDS) -> int:
    """Run in a fork, with what it prints put away, and kill it after some time; its exit status."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(run,))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        assert seconds < LIMIT_SECONDS, "hangs"
    return process.exitcode


def quietly(run: Callable) -> None:
    """Run without a word but for what goes wrong."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        sys.stderr = nowhere
        try:
            run()
        except Exception as error:
            sys.__stderr__.write(f"{error!r}\n")
            raise


def dies_on_ray(run: Callable, draw: random.Random, moments: int, out: Path) -> bool:
    """Score on Ray, and kill the driver, or an actor and then the driver, some time after an actor is there."""
    config, victims, seconds = run.args[0], draw.choice(["driver", "actor", "all"]), draw.uniform(0, 5)
    command = [sys.executable, "-m", "mmrm_fast.cli", "score", "--actors", "1"]
    command += [f"--{name}={getattr(config, name)}" for name in ("model", "data", "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver, deadline = psutil.Process(process.pid), time.monotonic() + LIMIT_SECONDS
    while process.poll() is None and not actors_of(driver):
        assert time.monotonic() < deadline, "no actor"
        time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    targets = [] if process.poll() is not None else actors_of(driver) if victims != "driver" else []
    for target in targets:
        with suppress(psutil.NoSuchProcess):
            target.kill()
    others = below(driver)
    if victims != "actor":
        process.kill()
    status = process.wait(LIMIT_SECONDS)
    for left in others:  # of Ray, which outlives its driver for a while
        with suppress(psutil.NoSuchProcess):
            left.kill()
    print(f"{out.name}: {victims} killed {seconds:.2f} s after the start of an actor, ended with {status}", flush=True)
    return status == -signal.SIGKILL or bool(targets and status == 0)


def actors_of(driver: psutil.Process) -> list[psutil.Process]:
    """The scoring processes below a driver."""
    found = []
    for process in below(driver):
        with suppress(psutil.NoSuchProcess):
            found += [process] * ("ray::ScoringActor" in " ".join(process.cmdline()))
    return found


def below(driver: psutil.Process) -> list[psutil.Process]:
    """The processes below a driver, none where it has ended."""
    with suppress(psutil.NoSuchProcess):
        return driver.children(recursive=True)
    return []


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
