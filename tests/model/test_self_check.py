"""A transformers release that computes a layer otherwise never changes a reward in silence: its own modules stay."""

import pytest
import torch
from transformers import InternVLModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.internvl import modeling_internvl
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP

from benchmarks.baselines import normalize
from mmrm_fast.data.images import NORMALIZATION
from mmrm_fast.data.packing import pack_items
from mmrm_fast.data.records import parse_group
from mmrm_fast.data.samples import Preparer
from mmrm_fast.model.decoder import GatedMLP
from mmrm_fast.model.reward_model import RewardModel
from mmrm_fast.model.self_check import compare
from mmrm_fast.model.vision import NAME

RECORD = {"prompt": "What is this?", "chosen": "two red circles", "rejected": "I think so."}


@pytest.fixture(autouse=True)
def compared_anew():
    compare.cache_clear()
    yield
    compare.cache_clear()


@pytest.fixture
def release(monkeypatch):
    """Let a class of transformers compute `change` of what it computes."""

    def patch(kind, change):
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *args, **kw: change(forward(self, *args, **kw)))

    return patch


def tilted(output):
    """Hidden states, or those of an encoder's output, more of the last channels; no norm takes that back."""
    if not isinstance(output, torch.Tensor):
        output.last_hidden_state = tilted(output.last_hidden_state)
        return output
    return output * torch.linspace(1, 2, output.shape[-1])


def packed_rewards(checkpoint, picture):
    """The record's rewards, its sample and its tiles."""
    preparer = Preparer(checkpoint.prompt_encoder(), checkpoint.tiling)
    group = parse_group({**RECORD, "img_path": picture}, source="test", record=0)
    sample, tiles = preparer.whole(group)
    batch = pack_items(preparer, [group], preparer.whole).batch
    return checkpoint.model(batch.main, batch.tiles), sample, tiles


def plain_rewards(model, backbone, sample, tiles):
    """Sequence by sequence through transformers' own forward, as the release has it."""
    pixels = normalize(torch.from_numpy(tiles[0]), model.pixel_mean, model.pixel_std, torch.float32)
    rewards = []
    for sequence in map(torch.from_numpy, sample.main.sequences):
        ids = sequence.where(sequence >= 0, backbone.config.image_token_id)[None]
        hidden = backbone(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
        rewards.append(hidden[0, -1] @ model.score.weight[0])
    return torch.stack(rewards)


def what_is_used(model):
    """Whether tile attention, the gated product and a last layer of last tokens are."""
    attention = model.model.vision_tower.config._attn_implementation
    mlps = [type(layer.mlp) is GatedMLP for layer in model.model.language_model.layers]
    return attention == NAME, all(mlps), model.reads_last_tokens


def check_rewards(checkpoint, pristine, picture):
    """Rewards are those of transformers' own modules, as this release has them."""
    with torch.no_grad():
        rewards, sample, tiles = packed_rewards(checkpoint, picture)
        expected = plain_rewards(checkpoint.model, pristine(checkpoint.model.model), sample, tiles)
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-6)


def test_with_the_release_that_is_here_everything_is_used(make_checkpoint, recwarn):
    assert what_is_used(make_checkpoint().model) == (True, True, True)
    assert not [warning for warning in recwarn if "computes otherwise" in str(warning.message)]


@pytest.mark.parametrize(("kind", "used"), [(Qwen2DecoderLayer, (True, True, False)), (Qwen2MLP, (True, False, True))])
def test_a_layer_that_computes_otherwise_stays_transformers_own(
    make_checkpoint, pristine, pictures, release, kind, used
):
    release(kind, tilted)
    with pytest.warns(UserWarning, match="computes otherwise with .* its own modules stay"):
        checkpoint = make_checkpoint()
    assert what_is_used(checkpoint.model) == used
    check_rewards(checkpoint, pristine, pictures["photo"])


def test_tiles_that_attend_otherwise_keep_transformers_own_attention(make_checkpoint, pristine, pictures, monkeypatch):
    class Causal:
        """A release in which patches attend to those before them."""

        @staticmethod
        def get_interface(name, default):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, default)
            return lambda *args, **options: attend(*args, **{**options, "is_causal": True})

    monkeypatch.setattr(modeling_internvl, "ALL_ATTENTION_FUNCTIONS", Causal)
    with pytest.warns(UserWarning, match="computes otherwise with use_tile_attention"):
        checkpoint = make_checkpoint()
    assert what_is_used(checkpoint.model) == (False, True, True)
    check_rewards(checkpoint, pristine, pictures["photo"])


@pytest.mark.parametrize(
    "kind",
    [
        modeling_internvl.InternVLVisionPatchEmbeddings,
        modeling_internvl.InternVLVisionEncoder,
        modeling_internvl.InternVLMultiModalProjector,
    ],
)
def test_the_rest_of_the_vision_part_is_transformers_own(make_checkpoint, pristine, pictures, release, kind):
    release(kind, tilted)
    check_rewards(make_checkpoint(), pristine, pictures["photo"])


def test_image_tokens_that_come_about_in_another_way_are_refused(make_checkpoint, monkeypatch):
    features = InternVLModel.get_image_features

    def doubled(self, pixels, **options):
        outputs = features(self, pixels, **options)
        outputs.pooler_output = 2 * outputs.pooler_output
        return outputs

    monkeypatch.setattr(InternVLModel, "get_image_features", doubled)
    with pytest.raises(ValueError, match=r"InternVLModel computes more than attention .* differ by "):
        make_checkpoint()


def test_a_layer_whose_parts_have_other_names_stays_transformers_own(make_checkpoint, monkeypatch):
    """The rewritten last layer reads `attention.scaling`, which this release computes in its forward."""
    forward = Qwen2Attention.forward

    def scaled_there(self, *args, **kwargs):
        self.scaling = self.head_dim**-0.5
        try:
            return forward(self, *args, **kwargs)
        finally:
            del self.scaling

    monkeypatch.setattr(Qwen2Attention, "forward", scaled_there)
    with pytest.warns(UserWarning, match="with read_last_tokens: .* AttributeError: .* no attribute 'scaling'"):
        model = make_checkpoint().model
    assert what_is_used(model) == (True, True, False)


def test_a_decoder_with_sinks_and_windows_uses_everything_but_the_gated_product(make_checkpoint, recwarn):
    assert what_is_used(make_checkpoint(text="gpt_oss").model) == (True, False, True)
    assert not [warning for warning in recwarn if "computes otherwise" in str(warning.message)]


def test_the_check_leaves_torch_s_random_numbers_alone(make_checkpoint):
    backbone = make_checkpoint().model.model
    torch.manual_seed(0)
    score, after = torch.randn(1, 32) / 33, torch.randn(5)
    torch.manual_seed(0)
    assert torch.equal(RewardModel(backbone, *NORMALIZATION["imagenet"]).score.weight, score)
    assert torch.equal(torch.randn(5), after)


def test_a_failure_of_our_own_code_is_the_cause_that_is_given(make_checkpoint, monkeypatch):
    def renamed(*_, **__):
        raise TypeError("incompatible function arguments")

    monkeypatch.setattr("mmrm_fast.model.decoder.trie_attention", renamed)
    with pytest.raises(ValueError, match=r"Qwen2Model is not supported: TypeError: incompatible function") as caught:
        make_checkpoint()
    assert isinstance(caught.value.__cause__, TypeError)
