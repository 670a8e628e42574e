"""Every text model of a published InternVL, and Mistral: out to other layouts and back, on two ranks as on one.

That what transformers stores of them is loaded, and original checkpoints with the rewards of their architecture, is in
tests/checkpoint; that packed equals padded, values and gradients, in test_packed_equals_padded.py.
"""

from functools import partial

import pytest
import torch
from ranks import run_in_turn
from runs import losses, margins, read
from transformers import InternVLModel

from mmrm_fast.checkpoint.export import convert_folder, export_original
from mmrm_fast.checkpoint.folder import CheckpointFolder, save_checkpoint
from mmrm_fast.train.command import train

TEXTS = ["qwen2", "qwen3", "qwen3_moe", "gpt_oss", "llama", "mistral", "phi3"]


@pytest.fixture
def native(make_checkpoint, tmp_path):
    def save(text):
        save_checkpoint(tmp_path / text, make_checkpoint(text=text, max_length=256))
        return tmp_path / text

    return save


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_saved_is_read_by_plain_transformers_and_here(native, make_checkpoint, text):
    folder, state = native(text), make_checkpoint(text=text).model.state_dict()
    theirs, loading = InternVLModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and loading["unexpected_keys"] == {"score.weight"}
    assert all(torch.equal(value, state["model." + name]) for name, value in theirs.state_dict().items())
    ours = CheckpointFolder(folder).load().model.state_dict()
    assert ours.keys() == state.keys() and all(torch.equal(ours[name], state[name]) for name in state)


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "mistral"])
def test_a_model_goes_to_the_original_layout_and_back(native, tmp_path, text):
    folder = native(text)
    export_original(folder, tmp_path / "original")
    convert_folder(tmp_path / "original", tmp_path / "back")
    first, second = (CheckpointFolder(path).load() for path in (folder, tmp_path / "back"))
    state, again = (checkpoint.model.state_dict() for checkpoint in (first, second))
    assert all(torch.equal(state[name], again[name][: len(state[name])]) for name in state)  # image tokens may be new
    text_config, same = (checkpoint.model.model.config.text_config for checkpoint in (first, second))
    skipped = {"vocab_size", "num_labels", "id2label", "label2id", "problem_type", "architectures", "dtype"}
    fields = text_config.to_dict().keys() - skipped
    assert {name: text_config.to_dict()[name] for name in fields} == {name: same.to_dict()[name] for name in fields}


def test_a_text_model_that_no_original_checkpoint_has_is_refused_with_those_that_they_have(native, tmp_path):
    with pytest.raises(ValueError, match=r"text_config\.model_type 'mistral' has no original layout: InternLM2For"):
        export_original(native("mistral"), tmp_path / "original")


def test_a_robust_step_on_two_ranks_is_that_of_one(native, make_config, subtests):
    runs = {
        (text, world): make_config(f"{text}, {world}", model=native(text), robust=True, max_steps=1, report_to=())
        for text in TEXTS
        for world in (1, 2)
    }
    for text in TEXTS:
        train(runs[text, 1])
    assert run_in_turn([partial(train, runs[text, 2]) for text in TEXTS], world=2) == [0, 0]
    for text in TEXTS:
        one, two = (runs[text, world].run.output_dir for world in (1, 2))
        with subtests.test(text):
            assert losses(two) == pytest.approx(losses(one), abs=1e-5)
            (row,), (same,) = (read(folder / "metrics.jsonl") for folder in (one, two))
            for name in ("grad_norm", "proxy_grad_norm"):
                assert same[name] == pytest.approx(row[name], rel=1e-4)
            assert margins(two) == pytest.approx(margins(one), abs=1e-3)
