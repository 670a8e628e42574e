"""Records to token keys: the template tokenised at once, user text literal, images as negative keys, length limits."""

import pickle

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmrm_fast.data.prompt import PromptEncoder, split_images, without_images
from mmrm_fast.data.types import FieldError, Message

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
    assert [(turn.role, turn.pieces) for turn in split_images(prompt, num_images)] == [("user", pieces)]


@pytest.mark.parametrize(("prompt", "num_images"), [("<image>", 0), ("<image>", 2), ("<image><image>", 1)])
def test_any_other_number_of_slots_is_an_error_of_the_prompt(prompt, num_images):
    with pytest.raises(FieldError, match=f"<image> for {num_images} images") as caught:
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
    assert [turn.pieces for turn in without_images(split_images(prompt, num_images))] == [[text]]


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


# conversations

TURNS = (
    Message("system", "Be <image> brief."),
    Message("user", "<image>\nWhat?"),
    Message("assistant", "two <image>"),
    Message("user", "And <image>?"),
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nInternVL<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def whole_conversation(tokenizer, turns, response):
    messages = [{"role": turn.role, "content": turn.content} for turn in (*turns, Message("assistant", response))]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    return ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))]


def test_a_conversation_is_the_rendered_template_tokenised_at_once(make_encoder, tokenizer):
    turns = (Message("user", "What?"), Message("assistant", "two"), Message("user", "red?"))
    (sequence,) = make_encoder().encode(turns, ("so",)).sequences
    assert sequence.tolist() == whole_conversation(tokenizer, turns, "so")


def test_a_lone_turn_is_the_same_as_its_text(make_encoder):
    as_text, as_turns = make_encoder().encode("What?", ("so",), (1,)), make_encoder().encode(TURNS[1:2], ("so",), (1,))
    assert as_text.sequences[0].tolist() == as_turns.sequences[0].tolist()


def test_slots_of_a_conversation_are_those_of_its_users(make_encoder, tokenizer):
    (sequence,) = make_encoder().encode(TURNS, ("so",), (1, 2)).sequences
    assert (sequence < 0).sum() == 3 * TOKENS_PER_TILE
    text = written(tokenizer, sequence)
    assert "Be <image> brief." in text
    assert "two <image><|im_end|>" in text


def test_slots_are_prepended_to_the_first_user_turn():
    turns = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    pieces = [turn.pieces for turn in split_images(turns, 2)]
    assert pieces == [["s"], ["", "\n", "\na"], ["b"], ["c"]]


def test_a_system_message_replaces_that_of_the_template(tokenizer):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    wrapped.chat_template = DEFAULT_SYSTEM
    encoder = PromptEncoder(wrapped, tokens_per_tile=TOKENS_PER_TILE, max_length=400)
    for turns, system in ((TURNS[1:2], "InternVL"), (TURNS[:2], "Be <image> brief.")):
        (sequence,) = encoder.encode(turns, ("so",), (1,)).sequences
        assert written(tokenizer, sequence).startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user")


def test_turns_that_the_template_does_not_take_are_an_error_of_the_prompt(tokenizer):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    wrapped.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + DEFAULT_SYSTEM
    )
    encoder = PromptEncoder(wrapped, tokens_per_tile=TOKENS_PER_TILE, max_length=400)
    with pytest.raises(FieldError, match="does not take the turns system, user: one turn only"):
        encoder.encode(TURNS[:2], ("so",), (1,))


@pytest.mark.parametrize(("prompt", "response"), [(" What?\n", " two \n"), ("", "  "), ("\n", "\ttwo")])
@pytest.mark.parametrize("tiles_per_image", [(), (1,)])
def test_a_template_that_trims_texts_trims_them_here(tokenizer, prompt, response, tiles_per_image):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    wrapped.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    encoder = PromptEncoder(wrapped, tokens_per_tile=TOKENS_PER_TILE, max_length=400)
    (sequence,) = encoder.encode(prompt, (response,), tiles_per_image).sequences
    asked = "<image>\n" * len(tiles_per_image) + prompt
    assert with_image_token(wrapped, sequence) == whole(wrapped, asked, response, tiles_per_image)


def test_a_space_before_the_first_word_of_a_sequence_is_not_put_before_each_run(tokenizer):
    backend = Tokenizer(models.BPE({"<e>": 0, "▁": 1, "a": 2, "b": 3, "<i>": 4}, [], unk_token="▁"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend)
    wrapped.add_special_tokens({"additional_special_tokens": ["<e>", "<i>"]})
    wrapped.chat_template = "{% for m in messages %}<e>{{ m['content'] }}{% endfor %}<e>"
    encoder = PromptEncoder(wrapped, tokens_per_tile=1, max_length=99, image_tokens=("<i>", "<i>", "<i>"))
    assert encoder.encode("a", ("b",)).sequences[0].tolist() == wrapped("<e>a<e>b<e>").input_ids == [0, 2, 0, 3, 0]


@pytest.mark.parametrize("compat", [None, "reference"])
def test_an_encoder_encodes_the_same_in_another_process(make_encoder, compat):
    encoder = make_encoder(compat=compat)
    copy = pickle.loads(pickle.dumps(encoder))
    texts = ("say <|im_end|>", ("<|im_end|>",), (1,))
    assert copy.encode(*texts).sequences[0].tolist() == encoder.encode(*texts).sequences[0].tolist()


# the reference's habits


def test_reference_special_tokens_in_user_text_are_parsed(make_encoder, tokenizer):
    (sequence,) = make_encoder(compat="reference").encode("say <|im_end|>", ("a <|im_end|> b",)).sequences
    assert (sequence == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 4


def test_reference_slots_are_always_prepended_and_a_typed_one_is_text(make_encoder, tokenizer):
    encoder = make_encoder(compat="reference")
    (sequence,) = encoder.encode("is <image> a slot?", ("no",), (1,)).sequences
    assert with_image_token(tokenizer, sequence) == whole(tokenizer, "<image>\nis <image> a slot?", "no", (1,))
    assert encoder.encode("<image><image>", ("no",), (1,)).sequences


def test_reference_cuts_on_the_right_whatever_stands_there(make_encoder):
    (sequence,) = make_encoder().encode("What?", ("two red circles",), (1,)).sequences
    for length in (len(sequence) - 2, 5):
        encoded = make_encoder(max_length=length, compat="reference").encode("What?", ("two red circles", ""), (1,))
        assert encoded.sequences[0].tolist() == sequence[:length].tolist()
        assert encoded.truncated == (True, length == 5)
        assert encoded.prefix_length <= length


def test_reference_ends_no_empty_response(tokenizer):
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    wrapped.chat_template = tokenizer.chat_template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    encoder = PromptEncoder(wrapped, tokens_per_tile=TOKENS_PER_TILE, max_length=400, compat="reference")
    empty, answered = encoder.encode("What?", ("", "two"), (1,)).sequences
    assert written(tokenizer, empty).endswith("What?<|im_end|>\n<|im_start|>assistant\n")
    assert written(tokenizer, answered) == written(tokenizer, empty) + "two<|im_end|>"


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
    with pytest.raises(FieldError, match=f"is {prefix_length} tokens with its images") as caught:
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
