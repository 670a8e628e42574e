"""`mmrm-fast train`: a training, or what it would need."""

import os

from mmrm_fast.config import TrainConfig
from mmrm_fast.train.dry_run import dry_run
from mmrm_fast.train.refusals import refuse
from mmrm_fast.train.trainer import train


def run(config: TrainConfig) -> None:
    """Train, or with `--dry-run` say what it takes. Raises `ValueError` for options that cannot be."""
    refuse(config, num_ranks=config.memory.num_gpus or int(os.environ.get("WORLD_SIZE", "1")))
    if config.memory.dry_run:
        dry_run(config)
    else:
        train(config)
