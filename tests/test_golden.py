"""Rewards of the public reference implementation, reproduced from its own checkpoints on its own records."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from mmrm_fast.checkpoint import internvl_chat
from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.data.packing import pack_items
from mmrm_fast.data.records import Records, iter_groups
from mmrm_fast.data.samples import Preparer
from mmrm_fast.score.scorer import Scorer
from mmrm_fast.train.loss import margins, preference_loss

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("InternLM2ForCausalLM", "Qwen2ForCausalLM")
CHECKPOINTS = [*product(MODELS, ("checkpoint", "robust_checkpoint")), ("Phi3ForCausalLM", "checkpoint")]
EXPECTED = {4096: "expected.json", 512: "expected_maxlen512.json"}
BOUND = 2e-5


def load(folder, **options):
    return Scorer.from_pretrained(folder, device="cpu", dtype="float32", compat="reference", **options)


def records(name):
    lines = (GOLDEN / name / "records.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{**row, "img_path": str(GOLDEN / name / row["img_path"])} for row in rows]


@pytest.mark.parametrize("max_length", EXPECTED)
@pytest.mark.parametrize(("name", "checkpoint"), CHECKPOINTS)
def test_rewards_are_those_of_the_reference(name, checkpoint, max_length):
    rewards = load(GOLDEN / name / checkpoint, max_length=max_length).score(records(name))
    items = json.loads((GOLDEN / name / EXPECTED[max_length]).read_text())["items"]
    assert len(items) == 17 == sum(map(len, rewards))
    for item in items:
        assert rewards[item["record"]][item["response"]] == pytest.approx(item["reward"], abs=BOUND)


def trained_batch(name, folder, *, robust):
    """One step over the pairs: both models with their gradients, the batch, the rewards and the loss."""
    main = CheckpointFolder(GOLDEN / name / folder).load(compat="reference", max_length=4096)
    proxy = CheckpointFolder(GOLDEN / name / folder, proxy=True).load(compat="reference") if robust else None
    preparer = Preparer(main.prompt_encoder(), main.tiling, with_text=robust, proxy_image="white")
    samples = list(iter_groups(Records(GOLDEN / name / "pairs.jsonl")))
    batch = pack_items(preparer, samples, preparer.whole).batch
    models = [checkpoint.model for checkpoint in (main, proxy) if checkpoint]
    for model in models:
        model.model.vision_tower.requires_grad_(False)
    rewards = models[0](batch.main, batch.tiles)
    proxy_rewards = models[1](batch.text, batch.text_tiles) if robust else None
    loss = preference_loss(rewards, margins(proxy_rewards, batch) if robust else None, batch, sfc_mode="reference")
    ((loss.main + loss.proxy if robust else loss.main) / len(samples)).backward()
    return models, batch, rewards.detach(), proxy_rewards, loss


def original_gradients(model):
    """Gradients by original name, packed tensors put together again."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            where = internvl_chat.source(name.removeprefix("model."), model.model.config)
            gradients.setdefault(where.name, []).append((where.spans, parameter.grad))
    return {name: internvl_chat.packed(parts) for name, parts in gradients.items()}


def check_gradients(expected, models):
    actual = original_gradients(models[0])
    if len(models) > 1:
        actual |= {"bias_reward_model." + name: value for name, value in original_gradients(models[1]).items()}
    listed = [row for row in expected["gradients"] if row["name"] in actual]
    assert len(listed) == len(expected["gradients"]) > 10
    for row in listed:
        gradient = actual[row["name"]]
        norm = float(gradient.norm())
        assert norm == pytest.approx(row["l2"], rel=1e-4), row["name"]
        assert float(gradient.double().sum()) == pytest.approx(row["sum"], abs=1e-4 * norm), row["name"]
        assert gradient.flatten()[:5].tolist() == pytest.approx(row["first5"], abs=1e-4 * norm), row["name"]
        if "row" in row:
            assert gradient[row["row"]][:5].tolist() == pytest.approx(row["row_first5"], abs=1e-4 * norm)
            assert int(gradient.any(1).sum()) == row["rows_with_gradient"]
    total = torch.stack([gradient.norm() for gradient in actual.values()]).norm()
    assert float(total) == pytest.approx(expected["total_grad_l2"], rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_the_standard_loss_is_that_of_the_reference(name):
    expected = json.loads((GOLDEN / name / "expected_standard.json").read_text())
    models, batch, rewards, _, loss = trained_batch(name, "checkpoint", robust=False)
    assert rewards[batch.chosen_P].tolist() == pytest.approx(expected["rewards_chosen"], abs=BOUND)
    assert rewards[batch.rejected_P].tolist() == pytest.approx(expected["rewards_rejected"], abs=BOUND)
    assert float(loss.main.detach()) / 4 == pytest.approx(expected["loss"], abs=BOUND)
    check_gradients(expected, models)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_the_shortcut_aware_loss_is_that_of_the_reference(name):
    expected = json.loads((GOLDEN / name / "expected_robust.json").read_text())
    models, batch, rewards, proxy_rewards, loss = trained_batch(name, "robust_checkpoint", robust=True)
    for branch, values in (("main", rewards), ("bias", proxy_rewards)):
        for side in ("chosen", "rejected"):
            actual = values[getattr(batch, f"{side}_P")].tolist()
            assert actual == pytest.approx(expected[f"rewards_{side}_{branch}"], abs=BOUND), (branch, side)
    assert float((loss.main + loss.proxy).detach()) / 4 == pytest.approx(expected["loss"], abs=BOUND)
    assert loss.sfc.tolist() == pytest.approx(expected["scale_1"], abs=BOUND)
    check_gradients(expected, models)
