"""Records to token keys: the template tokenised at once, user text literal, images as negative keys, length limits."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmrm_fast.prompt import PromptEncoder, PromptError, split_images, without_images

TOKENS_PER_TILE = 4
UNICODE = {
    "combining accent": "cafe\u0301",
    "emoji with a joiner": "👩\u200d🔬 ok",
    "zero-width space": "a\u200bb",
    "Chinese": "图片中有什么？",
    "Arabic": "ما هذا؟",
    "odd white space": "\n\n a \t\n ",
}


@pytest.fixture
def make_encoder(tokenizer):
    def make(max_length=4096, **options):
        return PromptEncoder(tokenizer, tokens_per_tile=TOKENS_PER_TILE, max_length=max_length, **options)

    return make


def conversation(prompt, response):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def whole(tokenizer, prompt, response, tiles_per_image=(), end="<|im_end|>"):
    """The rendered template, image placeholders written out, tokenised at once up to the end of the response."""
    for tiles in tiles_per_image:
        prompt = prompt.replace("<image>", "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * tiles) + "</img>", 1)
    rendered = tokenizer.apply_chat_template(conversation(prompt, response), tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    return ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(end))]


def with_image_token(tokenizer, sequence):
    """A sequence with every image row as the placeholder's id."""
    return np.where(sequence < 0, tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), sequence).tolist()


def written(tokenizer, sequence):
    """The text of a sequence."""
    return decoders.ByteLevel().decode(tokenizer.convert_ids_to_tokens(with_image_token(tokenizer, sequence)))


# image slots


@pytest.mark.parametrize(
    ("prompt", "num_images", "pieces"),
    [
        ("What?", 0, ["What?"]),
        ("What?", 1, ["", "\nWhat?"]),
        ("", 1, ["", "\n"]),
        ("What?", 3, ["", "\n", "\n", "\nWhat?"]),
        ("<image>\nWhat?", 1, ["", "\nWhat?"]),
        ("a <image> b", 1, ["a ", " b"]),
        ("<image> and <image>", 2, ["", " and ", ""]),
        ("<IMAGE>", 0, ["<IMAGE>"]),
    ],
)
def test_slots_stand_where_the_prompt_has_them_or_are_prepended(prompt, num_images, pieces):
    assert split_images(prompt, num_images) == [("user", pieces)]


@pytest.mark.parametrize(("prompt", "num_images"), [("<image>", 0), ("<image>", 2), ("<image><image>", 1)])
def test_any_other_number_of_slots_is_an_error_of_the_prompt(prompt, num_images):
    with pytest.raises(PromptError, match=f"<image> for {num_images} images") as caught:
        split_images(prompt, num_images)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("prompt", "num_images", "text"),
    [
        ("What?", 0, "What?"),
        ("What?", 1, "What?"),
        ("What?", 2, "What?"),
        ("<image>\nWhat?", 1, "What?"),
        ("a <image> b", 1, "a  b"),
        ("<image>\n\nWhat?", 1, "\nWhat?"),
        ("<image>\n<image>\nWhat?", 2, "What?"),
    ],
)
def test_the_proxy_sees_neither_placeholder_nor_its_newline(prompt, num_images, text):
    assert without_images(split_images(prompt, num_images)) == [("user", [text])]


def test_a_slot_in_a_response_is_literal_text(make_encoder, tokenizer):
    encoded = make_encoder().encode("What?", ("an <image> here",), (1,))
    assert (encoded.sequences[0] < 0).sum() == TOKENS_PER_TILE
    assert "an <image> here" in written(tokenizer, encoded.sequences[0])


# the ids


@pytest.mark.parametrize(
    ("prompt", "response", "tiles_per_image"),
    [
        ("What is in the picture?", "two red circles", ()),
        ("", "two", ()),
        ("What?", "", ()),
        ("", "", ()),
        ("What?", "\n\n starts with white space", ()),
        ("<image>\nWhat is in the picture?", "two red circles", (1,)),
        ("compare <image> with <image>: which?", "the first", (3, 1)),
        ("<image>", "", (7,)),
        *[(f"<image>\n{text}", text, (1,)) for text in UNICODE.values()],
    ],
)
def test_a_sequence_is_the_rendered_template_tokenised_at_once(
    make_encoder, tokenizer, prompt, response, tiles_per_image
):
    encoded = make_encoder().encode(prompt, (response,), tiles_per_image)
    assert with_image_token(tokenizer, encoded.sequences[0]) == whole(tokenizer, prompt, response, tiles_per_image)


def test_an_added_token_that_swallows_white_space_does_so_in_the_template(tokenizer):
    wrapped = swallowing_tokenizer(tokenizer)
    encoder = PromptEncoder(wrapped, tokens_per_tile=TOKENS_PER_TILE, max_length=100)
    sequence = encoder.encode("What?", ("two",)).sequences[0]
    assert sequence.tolist() == whole(wrapped, "What?", "two", end="<|end|>")


def swallowing_tokenizer(tokenizer):
    """Phi-3's convention: `<|end|>` and its like also take the white space that follows them (`rstrip`)."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    wrapped.add_tokens([AddedToken(name, rstrip=True, special=True) for name in names])
    wrapped.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    return wrapped


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>user\n", "<img>", "<IMG_CONTEXT>", "</img>", "<pad>"])
@pytest.mark.parametrize("place", ["prompt", "response"])
def test_special_tokens_in_user_text_are_literal(make_encoder, tokenizer, text, place):
    prompt, response = ("say " + text, "yes") if place == "prompt" else ("say", text + " yes")
    (sequence,) = make_encoder().encode(prompt, (response,)).sequences
    (plain,) = make_encoder().encode("say", ("yes",)).sequences
    specials = set(tokenizer.all_special_ids)
    assert [key for key in sequence if key in specials] == [key for key in plain if key in specials]
    assert text in written(tokenizer, sequence)


@pytest.mark.parametrize("response", ["", "two", "two\n", "<|im_end|>", "a <|im_end|> b"])
def test_a_sequence_ends_with_the_end_token_and_nothing_after(make_encoder, tokenizer, response):
    (sequence,) = make_encoder().encode("What?", (response,)).sequences
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sequence[-1] == end
    assert (sequence == end).sum() == 2  # the user's turn and the assistant's


def test_image_rows_are_numbered_through_the_record(make_encoder):
    (sequence,) = make_encoder().encode("<image> and <image>", ("same",), (3, 1)).sequences
    assert sequence[sequence < 0].tolist() == list(range(-1, -1 - 4 * TOKENS_PER_TILE, -1))


def test_each_image_stands_between_its_marks(make_encoder, tokenizer):
    (sequence,) = make_encoder().encode("<image><image>", ("same",), (1, 2)).sequences
    start, end = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    starts, ends = np.flatnonzero(sequence == start), np.flatnonzero(sequence == end)
    assert (ends - starts - 1).tolist() == [TOKENS_PER_TILE, 2 * TOKENS_PER_TILE]


def test_a_text_only_prompt_has_no_image_rows(make_encoder):
    assert (make_encoder().encode("What?", ("two",)).sequences[0] >= 0).all()


def test_all_responses_share_the_prefix(make_encoder):
    encoded = make_encoder().encode("What?", ("two", "", "red circles"), (1,))
    prefix = encoded.sequences[1][: encoded.prefix_length]
    assert all(np.array_equal(sequence[: encoded.prefix_length], prefix) for sequence in encoded.sequences)
    assert encoded.prefix_length == len(encoded.sequences[1]) - 1  # an empty response is its end token alone


def test_no_responses_give_no_sequences(make_encoder):
    assert make_encoder().encode("What?", ()).sequences == ()


# length


def test_a_response_that_just_fits_is_whole(make_encoder):
    (sequence,) = make_encoder().encode("What?", ("two red circles",)).sequences
    encoded = make_encoder(max_length=len(sequence)).encode("What?", ("two red circles",))
    assert encoded.sequences[0].tolist() == sequence.tolist()
    assert encoded.truncated == (False,)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_an_overlong_response_is_cut_and_keeps_its_end_token(make_encoder, missing):
    (sequence,) = make_encoder().encode("What?", ("two red circles on the left",), (1,)).sequences
    encoded = make_encoder(max_length=len(sequence) - missing).encode(
        "What?", ("two red circles on the left", "a"), (1,)
    )
    assert encoded.sequences[0].tolist() == [*sequence[: -1 - missing], sequence[-1]]
    assert encoded.truncated == (True, False)


@pytest.mark.parametrize("tiles_per_image", [(), (7,)])
def test_a_prefix_that_leaves_no_room_for_a_response_is_an_error(make_encoder, tiles_per_image):
    prefix_length = make_encoder().encode("What?", ("",), tiles_per_image).prefix_length
    make_encoder(max_length=prefix_length + 2).encode("What?", ("two",), tiles_per_image)
    with pytest.raises(PromptError, match=f"is {prefix_length} tokens with its images") as caught:
        make_encoder(max_length=prefix_length + 1).encode("What?", ("two",), tiles_per_image)
    assert caught.value.field == "prompt"


# what a tokenizer must bring


def test_a_tokenizer_without_image_tokens_is_refused(make_encoder):
    with pytest.raises(ValueError, match="lacks the image tokens"):
        make_encoder(image_tokens=("<picture>", "<IMG_CONTEXT>", "</picture>"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0]['content'] }}<|im_end|>", "does not render"),
        ("{{ messages[0]['content'] }}: {{ messages[1]['content'] }}\n", "no special token after the response"),
    ],
)
def test_a_template_that_a_reward_cannot_be_read_from_is_refused(template, reason):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>"]})
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason):
        PromptEncoder(tokenizer, tokens_per_tile=TOKENS_PER_TILE, max_length=100)
