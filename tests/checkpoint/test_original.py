"""Original checkpoints of every architecture: rewards equal those of the architecture written out in plain torch."""

import random

import numpy as np
import pytest
import torch
from original import LLM, original_config, reward, write_checkpoint

from mmrm_fast.data.records import Group
from mmrm_fast.score.scorer import Scorer

BOUND = 2e-5
WORDS = ("the", "red", "circle", "is", "on", "a", "blue", "and", "yellow", "background", "left", "right", ".", "What")


def prose(count):
    draw = random.Random(count)
    return " ".join(draw.choices(WORDS, k=count))


def group(images, *responses, prompt="What is in the picture?"):
    return Group("test", 0, None, prompt, None, tuple(images), responses)


@pytest.fixture
def groups(pictures):
    """Records on both sides of the RoPE thresholds of 200 tokens."""
    return [
        group([pictures["wide"]], "the red circle", "", prose(60)),
        group([pictures["photo"]], prose(80), prose(81), "left", prompt=prose(30)),
        group([], "a", prose(120)),
        group([pictures["square"]], prose(20), prose(21)),
    ]


def scorer_of(folder):
    return Scorer.from_pretrained(folder, device="cpu", dtype="float32")


def expected_rewards(state, config, scorer, groups):
    """Every reward by the plain forward of the sequence alone, and the longest sequence."""
    rewards, longest = [], 0
    for sample, images in map(scorer.preparer.whole, groups):
        tiles = np.concatenate(images) if images else []
        rewards.append([reward(state, config, sequence, tiles) for sequence in sample.main.sequences])
        longest = max(longest, *map(len, sample.main.sequences))
    return rewards, longest


def check(folder, config, groups, **options):
    state = write_checkpoint(folder, config, **options)
    scorer = scorer_of(folder)
    expected, longest = expected_rewards(state, config, scorer, groups)
    assert longest > 200
    for one, rewards in zip(scorer.score_groups(groups), expected, strict=True):
        assert one.rewards == pytest.approx(rewards, abs=BOUND)
    return scorer


@pytest.mark.parametrize("vision", ["300M", "6B"])
@pytest.mark.parametrize("llm", LLM)
def test_rewards_are_those_of_the_original_architecture(tmp_path, groups, llm, vision):
    check(tmp_path, original_config(llm, vision, 578), groups)


@pytest.mark.parametrize(
    "changes",
    [
        {"ps_version": "v1"},
        {"select_layer": -2},
        {"downsample_ratio": 0.25},
        {"force_image_size": 112},
        {"dynamic_image_size": False},
        {"use_thumbnail": False},
    ],
    ids=str,
)
def test_rewards_with_other_vision_settings(tmp_path, groups, changes):
    check(tmp_path, original_config("Qwen2", "300M", 578, **changes), groups)


@pytest.mark.parametrize("llm", ["InternLM2 dynamic", "Phi3 su", "GptOss"])
def test_a_long_response_does_not_change_its_neighbours_rewards(tmp_path, pictures, llm):
    write_checkpoint(tmp_path, original_config(llm, "300M", 578))
    scorer = scorer_of(tmp_path)
    short, long = group([pictures["wide"]], "the red circle", "left"), group([pictures["wide"]], "left", prose(150))
    (alone,), together = scorer.score_groups([short]), scorer.score_groups([long, short])
    after = scorer.score_groups([short])
    assert together[1].rewards == pytest.approx(alone.rewards, abs=1e-5)
    assert after[0].rewards == alone.rewards
    (pair,) = scorer.score_groups([group([pictures["wide"]], "left")])
    assert together[0].rewards[0] == pytest.approx(pair.rewards[0], abs=1e-5)


def test_new_tokens_get_the_mean_of_the_old_embeddings(tmp_path, groups):
    config = original_config("Phi3", "300M", 565)  # the nine image tokens are new
    state = write_checkpoint(tmp_path, config)
    scorer = scorer_of(tmp_path)
    table = scorer.model.model.get_input_embeddings().weight
    old = state["language_model.model.embed_tokens.weight"].float()
    assert len(table) == 574 and torch.equal(table[:565], old)
    torch.testing.assert_close(table[565:], old.mean(0).expand(9, -1))
