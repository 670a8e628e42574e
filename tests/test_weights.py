"""Checkpoints: a training's options for pictures take the place of the folder's own."""

from dataclasses import replace

import pytest

from mmrm_fast.config import TrainConfig
from mmrm_fast.images import NORMALIZATION, Tiling
from mmrm_fast.weights import configured


def test_options_that_are_not_given_leave_the_checkpoint_as_it_is(make_checkpoint):
    checkpoint = make_checkpoint()
    assert configured(checkpoint, TrainConfig()) == checkpoint


def test_options_that_are_given_replace_its_own(make_checkpoint):
    config = TrainConfig(min_tiles=2, max_tiles=4, thumbnail=False, pad2square=True, normalize_type="siglip")
    checkpoint = configured(make_checkpoint(), config)
    assert checkpoint.tiling == Tiling(56, 2, 4, False, True, (127, 127, 127))
    assert (checkpoint.model.pixel_mean, checkpoint.model.pixel_std) == NORMALIZATION["siglip"]


def test_fewer_tiles_at_most_also_lower_the_least(make_checkpoint):
    checkpoint = make_checkpoint()
    checkpoint = configured(replace(checkpoint, tiling=Tiling(56, 3, 6)), TrainConfig(max_tiles=2))
    assert (checkpoint.tiling.min_tiles, checkpoint.tiling.max_tiles) == (2, 2)


def test_impossible_numbers_of_tiles_are_refused(make_checkpoint):
    with pytest.raises(ValueError, match="--min-tiles 8 --max-tiles 6: expected 1 <= least <= most"):
        configured(make_checkpoint(), TrainConfig(min_tiles=8))
