"""`mmrm-fast train`: a training, or what it would need."""

from mmrm_fast.config import TrainConfig
from mmrm_fast.train.dry_run import dry_run
from mmrm_fast.train.trainer import train


def run(config: TrainConfig) -> None:
    """Train, or with `--dry-run` say what it takes."""
    if config.memory.dry_run:
        dry_run(config)
    else:
        train(config)
