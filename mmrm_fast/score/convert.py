"""`mmrm-fast convert`: a checkpoint made native, and the reward that it gives before and after."""

import io
from pathlib import Path

import torch
from PIL import Image

from mmrm_fast.checkpoint.export import convert_folder
from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.config import ConvertConfig
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
    picture = io.BytesIO()
    Image.radial_gradient("L").resize((500, 300)).save(picture, "png")
    record = {"prompt": "What is in it?", "images": [picture.getvalue()], "responses": ["A circle of many shades."]}
    torch.manual_seed(0)
    ((reward,),) = Scorer(CheckpointFolder(folder).load()).score([record])
    return reward
