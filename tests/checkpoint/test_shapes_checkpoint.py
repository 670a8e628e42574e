"""The pre-trained checkpoint for the synthetic environments, read with plain transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import mmrm_fast
from mmrm_fast.data.images import Tiling, tile_image
from mmrm_fast.data.scenes import QUESTIONS, falsify, random_scene, render, statement
from mmrm_fast.data.shapes import CUES, FILLERS, compose

FOLDER = Path(mmrm_fast.__path__[0]) / "assets" / "shapes-internvl"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def processor():
    return GotOcr2ImageProcessorPil.from_pretrained(FOLDER)


def chat(tokenizer, question, response, num_tokens):
    image = "<img>" + "<IMG_CONTEXT>" * num_tokens + "</img>\n"
    messages = [{"role": "user", "content": image + question}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


@torch.no_grad()
def test_verifies_statements_about_new_pictures(tokenizer, processor):
    model = InternVLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    rng = np.random.default_rng(12345)
    pixels, texts, truth = [], [], []
    for _ in range(80):
        scene = random_scene(rng)
        image = processor(render(scene, rng), return_tensors="pt")["pixel_values"]
        for question, mentioned in QUESTIONS.items():
            truth.append(rng.random() < 0.5)
            claim = scene.attributes if truth[-1] else falsify(scene.attributes, mentioned, rng)[0]
            style = dict(zip(CUES, rng.random(3) < 0.5, strict=True))
            response = compose(statement(claim, mentioned), style, FILLERS[0])
            texts.append(chat(tokenizer, question, response, len(image) * model.config.image_seq_length))
            pixels.append(image)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    hidden = model.model(**inputs, pixel_values=torch.cat(pixels)).last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    logits = model.lm_head(hidden[torch.arange(len(texts)), last])
    no, yes = tokenizer.convert_tokens_to_ids(["no", "yes"])
    says_true = (logits[:, yes] > logits[:, no]).numpy()
    assert (says_true == np.array(truth)).mean() >= 0.97


def test_the_closing_token_is_last(tokenizer):
    ids = tokenizer(chat(tokenizer, "What?", "This.", 4))["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")) == 4


def test_any_text_survives_tokenisation(tokenizer):
    for text in ("plain ASCII ~!@#$%^&*()", "héllo 世界 🎉", "\t two  spaces\n\nlines "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_image_settings_are_the_tiling_of_the_package(processor):
    rng = np.random.default_rng(0)
    tiling = Tiling(processor.size["height"], processor.min_patches, processor.max_patches)
    for _ in range(20):
        image = render(random_scene(rng), rng)
        assert len(processor(image)["pixel_values"]) == len(tile_image(image, tiling))


def test_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000
