"""The vision path of the reward model is transformers' own: features, gradients, and what it refuses."""

import copy

import pytest
import torch

from benchmarks.baselines import normalize
from mmrm_fast.data.images import NORMALIZATION
from mmrm_fast.model.reward_model import RewardModel

FEATURE_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}
GRADIENT_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}


@pytest.fixture
def make_model(make_checkpoint):
    """A tiny reward model whose every vision parameter matters, with another projector epsilon."""

    def make(dtype):
        model = make_checkpoint(dtype=dtype).model
        vision = (model.model.vision_tower, model.model.multi_modal_projector)
        for parameter in (p for part in vision for p in part.parameters()):
            torch.nn.init.normal_(parameter, mean=0.1, std=parameter.shape[-1] ** -0.5)
        model.model.multi_modal_projector.layer_norm.eps = 0.1
        return model

    return make


def random_tiles(num_tiles, side=56):
    return torch.randint(256, (num_tiles, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def transformers_features(model, tiles):
    pixels = normalize(tiles, model.pixel_mean, model.pixel_std, model.model.dtype)
    return model.model.get_image_features(pixels).pooler_output.flatten(0, 1)


def relative_error(actual, expected):
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("dtype", FEATURE_BOUNDS, ids=str)
@pytest.mark.parametrize(("num_tiles", "side"), [(3, 56), (1, 56), (2, 112)], ids=["3", "1", "other size"])
def test_image_features_are_those_of_transformers(make_model, num_tiles, side, dtype):
    model, tiles = make_model(dtype), random_tiles(num_tiles, side)
    features, expected = model.image_features(tiles), transformers_features(model, tiles)
    assert features.dtype == dtype and features.shape == expected.shape
    assert (features - expected).abs().max() <= FEATURE_BOUNDS[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", GRADIENT_BOUNDS, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained tower", "frozen tower"])
def test_gradients_are_those_of_transformers(make_model, frozen, dtype):
    model, tiles = make_model(dtype), random_tiles(2)
    model.model.vision_tower.requires_grad_(not frozen)
    twin = copy.deepcopy(model)
    slope = torch.randn(2 * 4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    (model.image_features(tiles) * slope).sum().backward()
    (transformers_features(twin, tiles) * slope).sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    assert any("patch_embeddings" in name for name in actual) != frozen
    scale = max(g0.norm() for g0 in expected.values())
    for name, g0 in expected.items():  # a key bias has no true gradient
        assert (actual[name] - g0).norm() <= GRADIENT_BOUNDS[dtype] * (g0.norm() + 1e-3 * scale), name


def test_bfloat16_features_stay_near_float32(make_model):
    model, tiles = make_model(torch.float32), random_tiles(3)
    expected = transformers_features(model, tiles)
    model.model.to(torch.bfloat16)
    features = model.image_features(tiles)
    assert features.dtype == torch.bfloat16
    torchs = relative_error(transformers_features(model, tiles).float(), expected)
    assert relative_error(features.float(), expected) <= 2 * torchs + 1e-3


def test_bfloat16_gradients_of_the_projectors_norm_are_summed_in_float32(make_model):
    model = make_model(torch.float32)
    norm = model.model.multi_modal_projector.layer_norm
    rows, slope = torch.randn(2, 4000, 96, generator=torch.Generator().manual_seed(0)).bfloat16()

    def gradients(dtype):
        statistics = copy.deepcopy(norm).to(dtype)
        (statistics(rows.to(dtype)) * slope.to(dtype)).sum().backward()
        return statistics.weight.grad, statistics.bias.grad

    for actual, expected in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert relative_error(actual.double(), expected) < 2**-8


def test_tower_with_a_final_norm_and_without_positions(make_model):
    model, tiles = make_model(torch.float32), random_tiles(2)
    tower = model.model.vision_tower
    tower.layernorm = torch.nn.LayerNorm(24)
    tower.embeddings.position_embeddings = None
    torch.testing.assert_close(model.image_features(tiles), transformers_features(model, tiles), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 1, 2])
def test_any_layer_of_the_tower_may_be_read(make_model, layer):
    model, tiles = make_model(torch.float32), random_tiles(2)
    backbone = model.model
    backbone.config.vision_feature_layer = layer
    model, tower = RewardModel(backbone, *NORMALIZATION["imagenet"]), backbone.vision_tower
    hidden = [tower.embeddings(normalize(tiles, model.pixel_mean, model.pixel_std, torch.float32))]
    for block in tower.encoder.layer:
        hidden.append(block(hidden[-1]))
    grid = hidden[layer][:, 1:].unflatten(1, (4, 4))
    expected = backbone.multi_modal_projector(backbone.pixel_shuffle(grid, 0.5).flatten(0, 2))
    torch.testing.assert_close(model.image_features(tiles), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_other_pixel_shuffles_are_those_of_transformers(make_model, ratio):
    backbone, tiles = make_model(torch.float32).model, random_tiles(2)
    backbone.config.downsample_ratio = ratio
    torch.manual_seed(0)
    backbone.multi_modal_projector = type(backbone.multi_modal_projector)(backbone.config)
    model = RewardModel(backbone, *NORMALIZATION["imagenet"])
    torch.testing.assert_close(model.image_features(tiles), transformers_features(model, tiles), rtol=1e-5, atol=1e-5)


def test_the_first_pixel_shuffle_leaves_the_grid_transposed(make_model):
    backbone, tiles = make_model(torch.float32).model, random_tiles(2, 112)
    expected = transformers_features(RewardModel(backbone, *NORMALIZATION["imagenet"]), tiles)
    backbone.config.internvl_chat = {"ps_version": "v1"}
    features = RewardModel(backbone, *NORMALIZATION["imagenet"]).image_features(tiles)
    expected = expected.unflatten(0, (2, 4, 4)).transpose(1, 2).flatten(0, 2)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("model", "vision_feature_layer", 3, "vision_feature_layer must be one layer of 2, got 3"),
        ("model", "vision_feature_layer", [-1, -2], r"one layer of 2, got \[-1, -2\]"),
        ("model", "vision_feature_select_strategy", "full", "must be 'default', got 'full'"),
        ("model", "downsample_ratio", 0.3, "multiple of 3.33333 patches of 14 pixels, got 56"),
        ("vision", "num_channels", 1, "num_channels must be 3, got 1"),
        ("vision", "image_size", (56, 112), "image_size must be square, got 56 x 112"),
        ("vision", "patch_size", (14, 7), "patch_size must be square, got 14 x 7"),
        ("vision", "image_size", (42, 42), "image_size must be a multiple of 2 patches of 14 pixels, got 42"),
    ],
)
def test_unsupported_vision_is_refused(make_model, part, name, value, message):
    backbone = make_model(torch.float32).model
    setattr(backbone.config if part == "model" else backbone.config.vision_config, name, value)
    with pytest.raises(ValueError, match=message):
        RewardModel(backbone, *NORMALIZATION["imagenet"])
