"""`mmrm-fast convert`: a checkpoint made native, and the reward that it gives before and after."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmrm_fast.checkpoint.export import convert_folder
from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.config import ConvertConfig
from mmrm_fast.data.records import Group, RecordError
from mmrm_fast.score.scorer import Scorer


def convert(config: ConvertConfig) -> int:
    """Convert a folder; returns the exit status, 1 where the rewards differ."""
    convert_folder(config.source, config.target)
    if not config.check:
        return 0
    before, after = sample_reward(config.source), sample_reward(config.target)
    print(f"reward of a sample record: {before:.6f} before, {after:.6f} after, difference {abs(before - after):.1e}")
    return 0 if before == after else 1


def sample_reward(folder: Path) -> float:
    """The reward that a folder gives a sample record; without a score head the same random one is read."""
    shades = np.add.outer(np.arange(300), np.arange(500))
    picture = io.BytesIO()
    Image.fromarray(np.stack([shades, shades // 2, shades // 4], -1).astype(np.uint8)).save(picture, "png")
    group = Group("sample", 0, None, "What is in it?", None, (picture.getvalue(),), ("Stripes of many colours.",))
    torch.manual_seed(0)
    (scored,) = Scorer(CheckpointFolder(folder).load(), torch.device("cpu")).score_groups([group])
    if isinstance(scored, RecordError):
        raise scored
    return scored.rewards[0]
