"""Pre-trains the tiny InternVL in `mmrm_fast/assets/shapes-internvl`, which stands for InternVL's own pre-training.

It learns, without any bias, to describe the pictures of `data.shapes` and to verify statements about them: every cue
style occurs equally often with true and false responses. A training text is

    <|im_start|>user\n<img>...</img>\n{question}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>{yes|no}

with a loss on the tokens of true responses and on the verdict, which directly follows the closed response. So that
verification is learned word by word, the logits of "yes" and "no" also say at every response token whether the response
is true so far.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from mmrm_fast.data.images import NORMALIZATION, Tiling, tile_image
from mmrm_fast.data.scenes import ATTRIBUTES, QUESTIONS, Scene, falsify, random_scene, render, statement
from mmrm_fast.data.shapes import CUES, FILLERS, compose

FOLDER = Path(__file__).parents[1] / "mmrm_fast" / "assets" / "shapes-internvl"
TILING = Tiling(tile_size=56, min_tiles=1, max_tiles=4)
PATCH_SIZE = 14
TOKENS_PER_TILE = (TILING.tile_size // PATCH_SIZE // 2) ** 2
PAD, START, END, IMAGE_START, IMAGE_END, IMAGE = SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
)
VERDICTS = ("no", "yes")
TRAINED_QUESTIONS = (*QUESTIONS, "Where are the shapes?", "Where are the shapes?")  # sides are the hardest to learn
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- ('' if loop.first else '\\n') + '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for content in message['content'] %}
            {{- '<IMG_CONTEXT>\\n' if content['type'] == 'image' else content['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n<|im_start|>assistant\\n' }}
{%- endif %}"""


@dataclasses.dataclass(frozen=True)
class Example:
    """A statement about a picture; `changed` is the attribute that it gets wrong, None when it is true."""

    question: str
    response: str
    true_response: str  # the same when the response is true
    changed: str | None


@dataclasses.dataclass(frozen=True)
class Batch:
    """Texts about a few pictures, padded on the right to one length T; B texts, I tiles."""

    pixels: torch.Tensor  # [I, 3, S, S], float32
    tiles: torch.Tensor  # tiles of every text in order, indices into I, int64
    input_ids: torch.Tensor  # [B, T], int64
    labels: torch.Tensor  # [B, T], int64: the next token where it is learned, else -100
    so_far: torch.Tensor  # [B, T], int64: in a response 1 while it is true and 0 after, else -100
    last: torch.Tensor  # [B], int64: position of the <|im_end|> that closes the response
    changed: list[str | None]  # [B]


def random_example(scene: Scene, question: str, rng: np.random.Generator) -> Example:
    """A true or false answer, equally likely, in a random style."""
    mentioned = QUESTIONS[question]
    claim = scene.attributes if rng.random() < 0.5 else falsify(scene.attributes, mentioned, rng)[0]
    changed = next((name for name in mentioned if claim[name] != scene.attributes[name]), None)
    style = dict(zip(CUES, rng.random(len(CUES)) < 0.5, strict=True))
    filler = str(rng.choice(FILLERS))
    response, true_response = (compose(statement(c, mentioned), style, filler) for c in (claim, scene.attributes))
    return Example(question, response, true_response, changed)


def random_batch(
    tokenizer, rng: np.random.Generator, num_pictures: int, num_statements: int, questions: Sequence[str]
) -> Batch:
    """`num_pictures` new pictures with `num_statements` examples each, their questions drawn without replacement."""
    pictures, tiles, texts, changed = [], [], [], []
    first = 0
    for _ in range(num_pictures):
        scene = random_scene(rng)
        pictures.append(tile_image(render(scene, rng), TILING))
        num_tiles = len(pictures[-1])
        for question in rng.permutation(questions)[:num_statements]:
            example = random_example(scene, str(question), rng)
            texts.append(encode(tokenizer, example, num_tiles))
            tiles.extend(range(first, first + num_tiles))
            changed.append(example.changed)
        first += num_tiles
    input_ids, labels, so_far = (
        _pad(rows, fill) for rows, fill in zip(zip(*texts, strict=True), (0, -100, -100), strict=True)
    )
    last = torch.tensor([len(text[0]) - 1 for text in texts])
    return Batch(normalize(np.concatenate(pictures)), torch.tensor(tiles), input_ids, labels, so_far, last, changed)


def encode(tokenizer, example: Example, num_tiles: int) -> tuple[list[int], list[int], list[int]]:
    """A row of `input_ids`, `labels` and `so_far`, up to the <|im_end|> that closes the response."""
    image = IMAGE_START + IMAGE * (TOKENS_PER_TILE * num_tiles) + IMAGE_END
    prefix = f"{START}user\n{image}\n{example.question}{END}\n{START}assistant\n"
    prefix_ids, ids, true_ids = tokenizer([prefix, example.response + END, example.true_response + END])["input_ids"]
    same = [a == b for a, b in zip(ids, true_ids, strict=False)]
    num_true = len(ids) if example.changed is None else same.index(False)
    labels = ids if example.changed is None else [-100] * len(ids)
    ignored = [-100] * len(prefix_ids)
    so_far = ignored + [1] * num_true + [0] * (len(ids) - num_true)
    return prefix_ids + ids, ignored[1:] + labels + [-100], so_far


def normalize(tiles: np.ndarray) -> torch.Tensor:
    """uint8 tiles [I, S, S, 3] as float32 [I, 3, S, S] with ImageNet's mean and deviation."""
    mean, std = (torch.tensor(values) for values in NORMALIZATION["imagenet"])
    return ((torch.from_numpy(tiles) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _pad(rows: list[list[int]], fill: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


def build_tokenizer(rng: np.random.Generator, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on generated text."""
    corpus = [*VERDICTS, "user", "assistant", *QUESTIONS, *FILLERS] * 50
    for _ in range(2000):
        question = str(rng.choice(list(QUESTIONS)))
        corpus.append(random_example(random_scene(rng), question, rng).response)
    corpus.append(string.printable)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(alphabet),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": IMAGE,
            "start_turn_token": START,
        },
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_model(tokenizer) -> InternVLForConditionalGeneration:
    """A randomly initialised InternVL of about a million parameters."""
    vision = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "image_size": TILING.tile_size,
        "patch_size": PATCH_SIZE,
        "attention_bias": True,
        "layer_scale_init_value": 1.0,
        "initializer_range": 0.05,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config)


def forward(model: InternVLForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Hidden states [B, T, D]; every picture is encoded once, padding is on the right and needs no mask."""
    features = model.model.get_image_features(pixel_values=batch.pixels).pooler_output
    images = {"image": SimpleNamespace(pooler_output=features[batch.tiles])}
    return model.model(input_ids=batch.input_ids, mm_encoder_outputs=images, use_cache=False).last_hidden_state


def losses(model: InternVLForConditionalGeneration, batch: Batch, verdict_ids: list[int]) -> torch.Tensor:
    """Mean cross-entropies of true responses' tokens, of the verdicts, and of "true so far" at response tokens; [3]."""
    hidden = forward(model, batch)
    learned, response = batch.labels != -100, batch.so_far != -100
    rows = torch.arange(len(batch.last))
    verdicts = torch.tensor(verdict_ids)[batch.so_far[rows, batch.last]]
    caption = F.cross_entropy(model.lm_head(hidden[learned]), batch.labels[learned])
    verdict = F.cross_entropy(model.lm_head(hidden[rows, batch.last]), verdicts)
    so_far = F.cross_entropy(model.lm_head(hidden[response])[:, verdict_ids], batch.so_far[response])
    return torch.stack([caption, verdict, so_far])


def learning_rates(peak: float, steps: int) -> Iterator[float]:
    """Linear warm-up over the first 5 %, then a cosine to zero."""
    warmup = max(1, steps // 20)
    for step in range(steps):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        yield peak * min(1, (step + 1) / warmup) * cosine


def optimize(parameters: list[torch.nn.Parameter], loss_of: Callable[[], torch.Tensor], steps: int, peak: float):
    """AdamW on `loss_of()`, which draws a new batch at every call, under bfloat16 autocast."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(learning_rates(peak, steps), total=steps, unit="step", mininterval=5)
    for rate in bar:
        optimizer.param_groups[0]["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)


def pretrain_vision(model: InternVLForConditionalGeneration, rng: np.random.Generator, *, steps: int, peak: float):
    """Vision tower and projector learn every attribute, from all tiles and from the last one, by a discarded head."""
    sizes = [len(values) for values in ATTRIBUTES.values()]
    head = torch.nn.Linear(model.config.text_config.hidden_size, sum(sizes))

    def loss() -> torch.Tensor:
        scenes = [random_scene(rng) for _ in range(64)]
        tiles = [tile_image(render(scene, rng), TILING) for scene in scenes]
        features = model.model.get_image_features(pixel_values=normalize(np.concatenate(tiles))).pooler_output.mean(1)
        pictures = features.split([len(picture) for picture in tiles])
        whole, last = ([picture.mean(0) for picture in pictures], [picture[-1] for picture in pictures])
        targets = torch.tensor(
            [[values.index(scene.attributes[name]) for name, values in ATTRIBUTES.items()] for scene in scenes]
        )
        logits = head(torch.stack(whole + last)).split(sizes, -1)
        return sum(F.cross_entropy(each, target) for each, target in zip(logits, targets.repeat(2, 1).T, strict=True))

    modules = (model.model.vision_tower, model.model.multi_modal_projector, head)
    optimize([parameter for module in modules for parameter in module.parameters()], loss, steps, peak)


def pretrain(model, tokenizer, rng: np.random.Generator, *, steps: int, peak: float):
    """The whole model learns to describe and to verify, from 32 new pictures with 4 statements each a step."""
    verdict_ids = tokenizer.convert_tokens_to_ids(list(VERDICTS))

    def loss() -> torch.Tensor:
        return losses(model, random_batch(tokenizer, rng, 32, 4, TRAINED_QUESTIONS), verdict_ids).sum()

    optimize(list(model.parameters()), loss, steps, peak)


def save(folder: Path, model: InternVLForConditionalGeneration, tokenizer):
    """Model in bfloat16, tokenizer and image processor in transformers' own format."""
    mean, std = (list(values) for values in NORMALIZATION["imagenet"])
    size = {"height": TILING.tile_size, "width": TILING.tile_size}
    processor = GotOcr2ImageProcessorPil(
        size=size,
        crop_to_patches=True,
        min_patches=TILING.min_tiles,
        max_patches=TILING.max_tiles,
        image_mean=mean,
        image_std=std,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def verify(folder: Path, *, num: int, seed: int) -> dict[str, tuple[int, int]]:
    """Reloads a checkpoint and returns (correct verdicts, statements) by changed attribute, "true" for none."""
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    no, yes = tokenizer.convert_tokens_to_ids(list(VERDICTS))
    rng = np.random.default_rng([seed, 2])
    counts = dict.fromkeys(("true", *ATTRIBUTES), (0, 0))
    while sum(total for _, total in counts.values()) < num:
        batch = random_batch(tokenizer, rng, 40, len(QUESTIONS), list(QUESTIONS))
        hidden = forward(model, batch)
        logits = model.lm_head(hidden[torch.arange(len(batch.last)), batch.last])
        for says_true, changed in zip((logits[:, yes] > logits[:, no]).tolist(), batch.changed, strict=True):
            right, total = counts[changed or "true"]
            counts[changed or "true"] = (right + (says_true == (changed is None)), total + 1)
    return counts


def accuracy(counts: dict[str, tuple[int, int]]) -> float:
    """Share of correct verdicts over all kinds of statements."""
    return sum(right for right, _ in counts.values()) / sum(total for _, total in counts.values())


def main(
    folder: Path = FOLDER,
    seed: int = 0,
    vision_steps: int = 1500,
    steps: int = 2200,
    vision_learning_rate: float = 2e-3,
    learning_rate: float = 1.5e-3,
    vocab_size: int = 700,
    num_threads: int = 1,
    num_verified: int = 4000,
    verify_only: bool = False,
):
    """Trains, saves, reloads and verifies the checkpoint.

    Args:
        folder: where the checkpoint is written.
        seed: seed of weights and data; with one thread the result is reproducible.
        vision_steps: optimizer steps of the vision tower alone.
        steps: optimizer steps of the whole model.
        vision_learning_rate: peak of AdamW's learning rate for the vision tower alone.
        learning_rate: the same for the whole model.
        vocab_size: upper bound on the tokenizer's vocabulary.
        num_threads: torch threads.
        num_verified: new statements to verify, about pictures never trained on.
        verify_only: only verify the checkpoint that is there.
    """
    torch.set_num_threads(num_threads)
    if not verify_only:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(np.random.default_rng([seed, 0]), vocab_size)
        model = build_model(tokenizer)
        model.set_attn_implementation("eager")  # at these lengths twice as fast as SDPA's backward
        rng = np.random.default_rng([seed, 1])
        pretrain_vision(model, rng, steps=vision_steps, peak=vision_learning_rate)
        pretrain(model, tokenizer, rng, steps=steps, peak=learning_rate)
        save(folder, model, tokenizer)
    counts = verify(folder, num=num_verified, seed=seed)
    for name, (right, total) in counts.items():
        print(f"{name:12s} {right / total:7.2%} of {total}")
    print(f"{'all':12s} {accuracy(counts):7.2%}")


if __name__ == "__main__":
    tyro.cli(main)
