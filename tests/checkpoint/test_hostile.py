"""Broken and hostile folders: each an error that names the file and what is wrong, in bounded time and memory."""

import json

import pytest
from sentencepiece import sentencepiece_model_pb2

from mmrm_fast.checkpoint.folder import CheckpointFolder
from mmrm_fast.checkpoint.tokenizer import read_sentencepiece
from mmrm_fast.data import chat
from mmrm_fast.score.scorer import Scorer

LOOPS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
MACRO = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"
TEMPLATES = {
    LOOPS: "it took over 0.5 seconds",
    MACRO: "RecursionError",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}": "it took over",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' * 10**15 }}": "MemoryError",
    "{{ messages[0].content.__class__.__mro__ }}": "unsafe",
    "{% for m in messages %}": "Unexpected end of template",
    "{{ messages[7].content + 1 }}": "has no element|undefined",
    "{{ 'a' * 70000 }}": "it renders 70000 characters, more than 65536",
    "nothing of it": "does not render the text of user, assistant",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_fails_or_never_ends_is_an_error(model_folder, monkeypatch, template):
    is_endless = TEMPLATES[template].startswith("it took over")
    monkeypatch.setattr(chat.RENDERING, "seconds", 0.5 if is_endless else 60)  # others fail sooner on any machine
    monkeypatch.setattr(chat, "MAX_CHARS", 1 << 16)
    (model_folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=TEMPLATES[template]):
        Scorer.from_pretrained(model_folder, "cpu")


def test_a_template_that_loops_over_certain_texts_alone_costs_their_record_alone(model_folder, monkeypatch):
    path = model_folder / "chat_template.jinja"
    path.write_text("{% if 'bad' in messages[0].content %}" + LOOPS + "{% endif %}" + path.read_text())
    scorer = Scorer.from_pretrained(model_folder, "cpu")
    monkeypatch.setattr(chat.RENDERING, "seconds", 0.5)
    with pytest.raises(ValueError, match=r"records\[0\]: prompt: the chat template .* it took over 0\.5 seconds"):
        scorer.score([{"prompt": "bad", "responses": ["a"]}])
    assert scorer.score([{"prompt": "good", "responses": ["a"]}])


SETTINGS = [
    ([], "it is"), ({"model_type": []}, "model_type"), ({"vision_config": "x"}, "vision_config"),
    ({"text_config": 3}, "text_config"), ({"downsample_ratio": 0}, "downsample_ratio"),
    ({"downsample_ratio": "x"}, "downsample_ratio"),
    *(({"text_config": {name: value}}, name) for name, value in (
        ("num_hidden_layers", 2**40), ("num_hidden_layers", "2"), ("hidden_size", -1),
        ("vocab_size", 2**60), ("hidden_act", "os.system"), ("hidden_act", ["x"]), ("rms_norm_eps", "x"),
        ("rms_norm_eps", float("nan")),
    )),
    *(({"vision_config": {name: value}}, name) for name, value in (
        ("patch_size", 0), ("patch_size", [14, "x"]), ("image_size", 2**20), ("num_attention_heads", 0),
        ("num_channels", 10**6),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "name"), SETTINGS, ids=str)
def test_settings_that_cannot_be_are_refused_by_name_before_anything_is_built(model_folder, changes, name):
    path = model_folder / "config.json"
    before = json.loads(path.read_text())
    merged = changes or []
    if changes:
        merged = before | {
            key: {**before[key], **value} if isinstance(value, dict) else value for key, value in changes.items()
        }
    path.write_text(json.dumps(merged))
    with pytest.raises(ValueError, match=rf"(config\.json|{model_folder}).*({name})"):
        CheckpointFolder(model_folder).load()


TOKENIZERS = {
    "tokenizer_config.json": ["[]", '{"model_max_length": "x"}', '{"model_max_length": -1}', '{"eos_token": 3}',
                              '{"added_tokens_decoder": [1]}', '{"added_tokens_decoder": {"x": {}}}',
                              '{"chat_template": [1]}'],
    "tokenizer.json": ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'],
    "preprocessor_config.json": ["[]", '{"image_std": [0, 1, 1]}', '{"max_patches": 1000000}', '{"compat": "other"}',
                                 '{"size": 10000000}', '{"image_mean": "x"}'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, own in TOKENIZERS.items() for content in own])
def test_a_broken_file_beside_the_weights_is_a_value_error(model_folder, name, content):
    path = model_folder / name
    if content.startswith('{"') and name != "tokenizer.json":
        content = json.dumps(json.loads(path.read_text()) | json.loads(content))
    path.write_text(content)
    (model_folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=str(model_folder)):
        CheckpointFolder(model_folder).load().prompt_encoder()


def test_normalizers_that_blow_a_text_up_are_refused(model_folder):
    path = model_folder / "tokenizer.json"
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    bomb = {"type": "Sequence", "normalizers": [replace] * 5}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": bomb}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: normalizer is .*; expected at most 256 times a text"):
        CheckpointFolder(model_folder).load()


def sentencepiece(piece):
    model = sentencepiece_model_pb2.ModelProto()
    model.pieces.add(piece="<unk>", type=2)
    model.pieces.add(piece=piece, type=1)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x0a" + b"\x80" * 3_000_000, "not a sentencepiece model"),
        (b"\x80" * 3_000_000, "not a sentencepiece model"),
        (sentencepiece("a" * 3_000_000), "a piece of 3000000 characters, over the limit of 1024"),
    ],
    ids=["a length without end", "a tag without end", "a piece without end"],
)
def test_a_sentencepiece_model_that_would_take_for_ever_is_refused(tmp_path, content, reason):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_sentencepiece(tmp_path / "tokenizer.model")
