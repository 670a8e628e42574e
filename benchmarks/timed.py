"""`timed.py FILE COMMAND ...`: run a command of mmrm_fast; write the seconds inside the parts of its training steps."""

import json
import sys
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from mmrm_fast.cli import main
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.train import trainer

seconds: dict[str, float] = defaultdict(float)


def timed(name: str, function):
    """`function`, its seconds added to `name`."""

    @wraps(function)
    def run(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return run


def timed_items(items):
    """The items of an iterator, the wait for each added to `data`."""
    items = iter(items)
    following = timed("data", lambda: next(items, None))
    return iter(following, None)


def evaluated(evaluate):
    """`evaluate`, with what happens inside it counted as evaluation only."""

    def run(*args, **kwargs):
        before, start = dict(seconds), time.perf_counter()
        result = evaluate(*args, **kwargs)
        evaluation = before.get("evaluation", 0.0) + time.perf_counter() - start
        seconds.clear()
        seconds.update({**before, "evaluation": evaluation})
        return result

    return run


if __name__ == "__main__":
    loader = trainer.Trainer.loader
    trainer.Trainer.loader = lambda self, *args, **kwargs: timed_items(loader(self, *args, **kwargs))
    trainer.Trainer.evaluate = evaluated(trainer.Trainer.evaluate)
    RewardModel.forward = timed("forward", RewardModel.forward)
    torch.Tensor.backward = timed("backward", torch.Tensor.backward)
    trainer.Trainer.optimizer_step = timed("optimizer", trainer.Trainer.optimizer_step)
    status = main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(seconds))
    sys.exit(status)
