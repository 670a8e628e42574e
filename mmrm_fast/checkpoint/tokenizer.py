"""Tokenizers of checkpoint folders, built from their data files alone: no class of the folder is ever run.

`tokenizer.json` is read as it is. The files of slow tokenizers become the fast tokenizer with the same ids:
`tokenizer.model` (sentencepiece BPE: InternLM2, Llama, Phi-3) and `vocab.json` + `merges.txt` (byte-level BPE: Qwen2).
"""

from pathlib import Path

from google.protobuf.message import DecodeError
from jinja2 import TemplateError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmrm_fast.checkpoint.schema import check_settings, check_tokenizer
from mmrm_fast.data.chat import rendered
from mmrm_fast.data.prompt import SPACE
from mmrm_fast.files import ASSETS, read_json, refuse_pointer

IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MAX_PIECE = 1 << 10
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
SLOW_ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # a slow Llama tokenizer's defaults
TEMPLATES = ASSETS / "templates"
FLAGS = ("lstrip", "rstrip", "single_word", "special")


def load_tokenizer(
    folder: str | Path, *, template: str | None = None, original: bool = False
) -> PreTrainedTokenizerFast:
    """A folder's tokenizer.

    Args:
        folder: holds tokenizer_config.json and tokenizer.json, tokenizer.model or vocab.json + merges.txt.
        template: name of an InternVL template (`template_names`); None takes the folder's own chat template.
        original: as code for original checkpoints does, take the slow tokenizer's files where there are both, and add
            InternVL's nine image tokens where the vocabulary lacks them.

    Raises:
        ValueError: a file is missing or not of these kinds.
    """
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no {path.name}; expected the tokenizer's files beside the weights")
    settings = check_settings(read_json(path), path)
    declared = added_tokens(folder, settings)
    backend, begins, spaced = build_backend(folder, settings, declared, slow=original)
    if original:
        present = backend.get_vocab()
        backend.add_special_tokens([AddedToken(token) for token in IMAGE_TOKENS if token not in present])
    named = {role: content_of(settings[role]) for role in ROLES if settings.get(role)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read_template(folder, settings) if template is None else named_template(template),
        model_max_length=settings.get("model_max_length"),
        clean_up_tokenization_spaces=False,
        **named,
    )
    if spaced and tokenizer.chat_template and not begins_with(tokenizer, mapped_tokens(folder, settings)):
        tokenizer.chat_template = SPACE + tokenizer.chat_template
    if begins and template is not None:
        tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
    return tokenizer


def added_tokens(folder: Path, settings: dict) -> dict[int, AddedToken]:
    """Tokens that the folder adds to, or renames in, its vocabulary, by id; matched in text as it is written."""
    tokens = {
        int(id): AddedToken(fields["content"], normalized=False, **{flag: fields.get(flag, False) for flag in FLAGS})
        for id, fields in settings.get("added_tokens_decoder", {}).items()
    }
    path = folder / "added_tokens.json"
    if path.is_file():
        for content, id in read_json(path).items():
            tokens.setdefault(id, AddedToken(content, normalized=False, special=True))
    return dict(sorted(tokens.items()))


def mapped_tokens(folder: Path, settings: dict) -> tuple[str, ...]:
    """The folder's special tokens map: what a slow tokenizer calls its special tokens, whatever else is marked so."""
    path = folder / "special_tokens_map.json"
    stored = read_json(path) if path.is_file() else {}
    settings = SLOW_ROLES | (settings if "added_tokens_decoder" in settings else stored | settings)
    roles = [*settings.get("additional_special_tokens", ()), *(settings[role] for role in ROLES if settings.get(role))]
    return tuple({content_of(token) for token in roles})


def begins_with(tokenizer: PreTrainedTokenizerFast, tokens: tuple[str, ...]) -> bool:
    """Whether conversations begin with one of these tokens. Raises `ValueError` where some do and others do not."""
    turns = [{"role": role, "content": "text"} for role in ("system", "user", "assistant")]
    begins, problem = set(), None
    for conversation in (turns, turns[1:]):
        try:
            begins.add(rendered(tokenizer, conversation).startswith(tokens))
        except TemplateError as error:  # it takes no system turn
            problem = error
    if not begins:
        raise ValueError(f"the chat template takes no conversation: {problem}")
    if len(begins) != 1:
        raise ValueError(f"the chat template begins with one of {', '.join(tokens)} in some conversations only")
    return begins.pop()


def content_of(token: str | dict) -> str:
    """A special token's text, which settings give as a string or an object."""
    return token if isinstance(token, str) else token["content"]


def build_backend(
    folder: Path, settings: dict, added: dict[int, AddedToken], *, slow: bool
) -> tuple[Tokenizer, bool, bool]:
    """The fast tokenizer, whether its sequences begin with the bos token, and whether a space goes before a whole text.

    That space is the habit of slow Llama tokenizers with `legacy` off: it stays a token of its own before an added
    token, unless that is one of the special tokens map.
    """
    fast, sentencepiece = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file() and not (slow and sentencepiece.is_file()):
        check_tokenizer(read_json(fast), fast)
        backend = Tokenizer.from_file(str(fast))
        backend.no_truncation(), backend.no_padding()
        known = backend.get_vocab()
        backend.add_tokens([token for token in added.values() if token.content not in known])
        start = backend.encode("").tokens
        return backend, bool(start), SPACE in start
    if sentencepiece.is_file():
        legacy = settings.get("legacy") in (None, True)
        backend = sentencepiece_backend(sentencepiece, added, prefixed=legacy)
        spaced = not legacy and settings.get("add_prefix_space") in (None, True)
        return backend, settings.get("add_bos_token", True), spaced
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return qwen2_backend(folder, added), False, False
    raise ValueError(f"{folder}: no tokenizer.json, tokenizer.model or vocab.json with merges.txt")


def with_added(model: models.BPE, added: dict[int, AddedToken]) -> Tokenizer:
    """A tokenizer over a model whose vocabulary already holds the added tokens."""
    backend = Tokenizer(model)
    backend.add_tokens(list(added.values()))
    return backend


def qwen2_backend(folder: Path, added: dict[int, AddedToken]) -> Tokenizer:
    """Byte-level BPE as Qwen2's slow tokenizer: NFC, its word pattern, no prefix space."""
    vocab = read_json(folder / "vocab.json")
    vocab |= {token.content: id for id, token in added.items()}
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    backend = with_added(models.BPE(vocab, merges), added)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_backend(path: Path, added: dict[int, AddedToken], *, prefixed: bool) -> Tokenizer:
    """A sentencepiece BPE model as a fast tokenizer; `prefixed` puts a space before every run of text."""
    model = read_sentencepiece(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    plain = not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces)
    if trainer.model_type != trainer.BPE or not plain or not normalizer.escape_whitespaces:
        raise ValueError(f"{path}: only BPE models without text normalisation are supported")
    fixed = {
        id: piece.piece for id, piece in enumerate(model.pieces) if piece.type in (piece.CONTROL, piece.USER_DEFINED)
    }
    added = {id: AddedToken(text, normalized=False, special=True) for id, text in fixed.items()} | added
    vocab = {piece.piece: id for id, piece in enumerate(model.pieces) if id not in added}
    vocab |= {token.content: id for id, token in added.items()}
    unknown = next(piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN)
    backend = with_added(
        models.BPE(vocab, merges_of(model), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback),
        added,
    )
    prepend = [normalizers.Prepend(SPACE)] if prefixed and normalizer.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", len(prepend), 0)]
    )
    return backend


def merges_of(model: ModelProto) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE model: every split of a piece into two pieces, best score first."""
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == piece.NORMAL}
    merges = []
    for text in sorted(normal, key=normal.get, reverse=True):
        splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [(left, right) for left, right in splits if left in normal and right in normal]
    return merges


def read_sentencepiece(path: Path) -> ModelProto:
    """A `tokenizer.model`."""
    refuse_pointer(path)
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise ValueError(f"{path}: not a sentencepiece model") from None
    longest = max((len(piece.piece) for piece in model.pieces), default=0)
    if longest > MAX_PIECE:
        raise ValueError(f"{path}: has a piece of {longest} characters, over the limit of {MAX_PIECE}")
    if not any(piece.type == piece.UNKNOWN for piece in model.pieces):
        raise ValueError(f"{path}: not a sentencepiece model: it has no piece for what is unknown")
    return model


def template_names() -> list[str]:
    """InternVL's conversation templates, by the names that original checkpoints give them."""
    return sorted(path.stem for path in TEMPLATES.iterdir())


def named_template(name: str) -> str:
    """An InternVL template."""
    if name not in template_names():
        raise ValueError(f"template {name!r} is not one of {', '.join(template_names())}")
    return TEMPLATES.joinpath(f"{name}.jinja").read_text(encoding="utf-8")


def read_template(folder: Path, settings: dict) -> str | None:
    """The folder's own chat template: a file of it, or a setting, of several the one called default."""
    for name in ("chat_template.jinja", "chat_template.json"):
        path = folder / name
        if path.is_file():
            return read_json(path)["chat_template"] if path.suffix == ".json" else path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {entry["name"]: entry["template"] for entry in template}
    if "default" not in named:
        raise ValueError(f"{folder}: the chat templates {', '.join(named)}, none of them 'default'")
    return named["default"]
