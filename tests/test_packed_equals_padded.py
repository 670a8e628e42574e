"""The core promise: the packed path gives the rewards and gradients of a plain padded forward of the same model."""

import copy
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint as recompute

from benchmarks.baselines import normalize
from mmrm_fast.data.packing import pack_items
from mmrm_fast.data.records import Group, Pairs, parse_group
from mmrm_fast.data.samples import Preparer
from mmrm_fast.model.decoder import read_last_tokens
from mmrm_fast.train.loss import margins, preference_loss

GRADIENT_BOUNDS = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-4, 1e-7)}
REWARD_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}
SHARED = "The picture was taken on a sunny day in the park and it shows several things, among them "


def pairwise(prompt, images, chosen, rejected):
    return Group("test", 0, None, prompt, None, tuple(images), (chosen, rejected), Pairs.of((0, 1)))


def own_images(prompt, images, rejected_images):
    fields = {
        "prompt": prompt,
        "images": images,
        "chosen": "two",
        "rejected": "three",
        "rejected_images": rejected_images,
    }
    return parse_group(fields, source="test")


def kwise(prompt, images, *responses):
    pairs = Pairs.ranked(-np.arange(len(responses)))
    return Group("test", 0, None, prompt, None, tuple(images), responses, pairs)


def batches(pictures):
    """Groups by the kind of batch that they make."""
    wide, photo, tall = pictures["wide"], pictures["photo"], pictures["tall"]
    long_answers = (SHARED + "two", SHARED + "nothing")
    return {
        "pairwise": [
            pairwise("What is this?", [wide], "two red circles", "I think so."),
            pairwise("", [photo], "a", ""),
        ],
        "k-wise": [kwise("What is in the picture?", [tall], "one", "two red", "I think", *long_answers)],
        "text-only": [
            pairwise("Where is it? " * 12, [], "on the left", "on the right"),
            pairwise("Why?", [], "so", "no"),
        ],
        "multi-tile and text-only mixed": [
            pairwise("Describe it.", [photo], "left", "right"),
            pairwise("Where is the picture?", [], "on the left of it", "on the right"),
            kwise("<image>\nand <image>: the same?", [tall, wide], "yes", "no", "I think so."),
        ],
        "duplicate image": [
            pairwise("What is this?", [photo], "two red circles", "three"),
            pairwise("What is this?", [photo], "two blue circles", "two red circles"),
            pairwise("And this?", [photo, photo], "the same", "the same"),
        ],
        "two sides with pictures of their own": [
            own_images("What is this?", [photo], [tall]),
            own_images("What are these?", [tall, wide], [tall, photo, tall]),
            own_images("And this?", [], [wide]),
            own_images("<image>\nand <image>: the same?", [wide, wide], [wide, photo]),
        ],
    }


def pack_groups(checkpoint, groups):
    """The groups' samples, the tiles of each, and both packed."""
    preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling, with_text=True, pairs="all")
    parts = [part for group in groups for part in preparer.parts(group)]
    samples, tiles = zip(*map(preparer.whole, parts), strict=True)
    return samples, tiles, pack_items(preparer, parts, preparer.whole)


def each_ones_tiles(sample, images):
    """The tiles of every response's images, one after another."""
    group = sample.group
    places = [range(len(images)) if group.seen is None else group.seen[place] for place in group.places]
    return [images[place] for own in places for place in own]


def padded_rewards(model, reference, sequences, tiles):
    """One right-padded batch through transformers' own model: every sequence carries its own pixels."""
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(torch.from_numpy(sequence) for sequence in sequences):
        ids[row, : len(sequence)] = sequence.where(sequence >= 0, reference.model.config.image_token_id)
        mask[row, : len(sequence)] = 1
    pixels = None
    if len(tiles):
        pixels = normalize(torch.cat(tiles), model.pixel_mean, model.pixel_std, model.model.dtype)
    hidden = reference.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).last_hidden_state
    last = mask.sum(1) - 1
    return hidden[torch.arange(len(sequences)), last].to(reference.score.weight.dtype) @ reference.score.weight[0]


class Reference(torch.nn.Module):
    """transformers' own model and a score."""

    def __init__(self, model, score):
        super().__init__()
        self.model, self.score = model, copy.deepcopy(score)


def robust_loss(main, proxy, batch):
    """Mean SFC-weighted loss, from the formula."""
    m, b = (rewards[batch.chosen_P] - rewards[batch.rejected_P] for rewards in (main, proxy))
    loss, proxy_loss = (-torch.nn.functional.logsigmoid(x) for x in (m, b))
    weight = ((5e-8 + proxy_loss) / (1e-7 + loss + proxy_loss)).detach()
    return (weight * loss).mean() + proxy_loss.mean()


def gradient_error(model, reference, bounds):
    """Largest excess of a parameter's gradient error over its bound, as a share of the bound."""
    relative, floor = bounds
    grads = {
        name: (p.grad, q.grad) for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True)
    }
    scale = max(g0.norm() for _, g0 in grads.values() if g0 is not None)
    worst = 0.0
    for name, (g, g0) in grads.items():
        assert (g is None) == (g0 is None) or max(x.norm() for x in (g, g0) if x is not None) == 0, name
        if g is not None and g0 is not None:
            worst = max(worst, float((g - g0).norm() / (relative * g0.norm() + floor * scale)))
    return worst


KINDS = list(batches(dict.fromkeys(("wide", "photo", "tall", "square"), "-")))
CASES = [
    *product(["qwen2", "llama", "qwen3_moe", "qwen2 with windows", "mistral", "gpt_oss"], KINDS),
    *product(["qwen3", "phi3"], ["multi-tile and text-only mixed"]),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("text", "kind"), CASES)
def test_packed_equals_padded(make_checkpoint, pristine, pictures, kind, text, dtype):
    """In float64 the norms of both sides are exact: transformers' own round to fp32, which would hide errors."""
    checkpoint = make_checkpoint(text=text, dtype=dtype)
    proxy = make_checkpoint(text=text, dtype=dtype).model.drop_vision()
    samples, images, packed = pack_groups(checkpoint, batches(pictures)[kind])
    batch = packed.batch
    reference, reference_proxy = (Reference(pristine(m.model), m.score) for m in (checkpoint.model, proxy))

    main_rewards = checkpoint.model(batch.main, batch.tiles)
    proxy_rewards = proxy(batch.text)
    loss = preference_loss(main_rewards, margins(proxy_rewards, batch), batch, sfc_mode="paper")
    ((loss.main + loss.proxy) / len(batch.chosen_P)).backward()

    tiles = [torch.from_numpy(t) for s, own in zip(samples, images, strict=True) for t in each_ones_tiles(s, own)]
    sequences, texts = ([q for s in samples for q in getattr(s, name).sequences] for name in ("main", "text"))
    expected = padded_rewards(checkpoint.model, reference, sequences, tiles)
    expected_proxy = padded_rewards(proxy, reference_proxy, texts, [])
    robust_loss(expected, expected_proxy, batch).backward()

    for rewards, wanted in ((main_rewards, expected), (proxy_rewards, expected_proxy)):
        assert (rewards - wanted).abs().max() <= REWARD_BOUNDS[dtype] * wanted.abs().max()
    assert gradient_error(checkpoint.model, reference, GRADIENT_BOUNDS[dtype]) <= 1
    assert gradient_error(proxy, reference_proxy, GRADIENT_BOUNDS[dtype]) <= 1


def test_sharing_saves_tokens(make_checkpoint, pictures):
    _, _, packed = pack_groups(make_checkpoint(), batches(pictures)["duplicate image"])
    plan = packed.batch.main
    assert len(plan.source_T) < 0.55 * plan.num_tokens_unshared
    assert len(packed.batch.tiles) == 7  # three records, one picture of 3 x 2 tiles and its thumbnail


def rewards_and_gradients(model, batch):
    model.zero_grad()
    rewards = model(batch.main, batch.tiles)
    (rewards * torch.arange(1, len(rewards) + 1)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return rewards.detach(), gradients


@pytest.mark.parametrize("variant", ["checkpointed", "every token in the last layer"])
def test_leaving_out_what_no_reward_reads_changes_nothing(make_checkpoint, pictures, variant):
    """The last layer's queries and MLP are those of last tokens alone, under activation checkpointing too."""
    checkpoint = make_checkpoint(dtype=torch.float64)
    model = checkpoint.model.train()
    batch = pack_groups(checkpoint, batches(pictures)["k-wise"])[2].batch
    rewards, gradients = rewards_and_gradients(model, batch)
    if variant == "checkpointed":
        for layer in model.model.language_model.layers:
            layer.forward = partial(recompute, layer.forward, use_reentrant=False)
    else:
        model.reads_last_tokens = False
        del model.model.language_model.layers[-1].forward
    same_rewards, same_gradients = rewards_and_gradients(model, batch)
    torch.testing.assert_close(rewards, same_rewards, rtol=1e-12, atol=0)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, same_gradients[name], rtol=1e-9, atol=1e-12)


def test_a_last_layer_of_another_kind_computes_every_token(make_checkpoint):
    language_model = make_checkpoint().model.model.language_model
    layer = language_model.layers[-1]
    layer.__class__ = type("OtherLayer", (type(layer),), {})
    assert not read_last_tokens(language_model)
