"""Plain text models as reward models: transformers' sequence classifiers of one label, and what becomes one.

Such a folder is computed as InternVL's language model is, without a vision part, and written as
`AutoModelForSequenceClassification` reads it.
"""

from transformers import CONFIG_MAPPING, InternVLConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from mmrm_fast.checkpoint.internvl_chat import LM_HEAD, SCORE

CLASSIFIER = "ForSequenceClassification"
HEADS = (CLASSIFIER, "ForCausalLM", "Model")  # how the architectures end that are known


def is_text_model(kind: object) -> bool:
    """Whether a model type is a text model with a sequence classifier in transformers."""
    return isinstance(kind, str) and kind in CLASSIFIERS and not CONFIG_MAPPING[kind].sub_configs


def shell(settings: dict, tokenizer: PreTrainedTokenizerBase | None) -> InternVLConfig:
    """InternVL's config around a text model's, with the padding token that TRL would give it where it has none.

    Raises:
        ValueError: a head that is no reward's.
    """
    text = CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
    found = settings.get("architectures") or ["Model"]
    if not (isinstance(found, list) and len(found) == 1 and str(found[0]).endswith(HEADS)):
        raise ValueError(f"architectures is {found}; expected [{CLASSIFIERS[text.model_type]}] or a causal LM alone")
    if found[0].endswith(CLASSIFIER) and text.num_labels != 1:
        raise ValueError(f"num_labels is {text.num_labels}; expected 1, a reward")
    if text.pad_token_id is None and tokenizer:
        own = tokenizer.pad_token_id
        text.pad_token_id = tokenizer.eos_token_id if own is None else own
    return InternVLConfig(text_config=text, vision_config={"num_hidden_layers": 1})


def native_name(name: str) -> str:
    """A stored tensor's name as `InternVLModel` has it."""
    name = name.removeprefix("model.")
    return name if name in (LM_HEAD, SCORE) else f"language_model.{name}"


def stored_name(name: str) -> str:
    """The inverse."""
    return name.replace("language_model.", "model.", 1)


def as_classifier(config: PreTrainedConfig) -> PreTrainedConfig:
    """A text model's config as that of its sequence classifier."""
    config.architectures = [CLASSIFIERS[config.model_type]]
    return config
