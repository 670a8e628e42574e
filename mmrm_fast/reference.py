"""The YAML options of the reference implementation (github.com/AlignRM/Generalizable-MM-RM) as ours.

Their meaning is kept, and so are its defaults for what a file does not say. What has no meaning here is named.
"""

from collections.abc import Mapping

MARKS = ("model_name_or_path", "bias_model_path", "dataset_path", "deepspeed", "conv_style", "learning_rate")
DEFAULTS = {
    "freeze_backbone": False,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "max_dynamic_patch": 12,
    "max_length": 8192,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear",
    "lora_dropout": 0.05,
}
RENAMED = {
    "model_name_or_path": "model",
    "dataset_path": "data",
    "num_train_epochs": "epochs",
    "learning_rate": "lr",
    "adam_beta2": "beta2",
    "dataloader_num_workers": "num_workers",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "eval_steps": "eval_every",
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
    "center_rewards_coefficient": "center_rewards",
    "use_llm_lora": "llm_lora",
    "min_dynamic_patch": "min_tiles",
    "use_thumbnail": "thumbnail",
    "use_backbone_lora": "vision_lora",
}
MEANINGLESS = {
    "deepspeed": "FSDP2 shards weights, gradients and optimizer as ZeRO-3 does",
    "conv_style": "the checkpoint's own chat template is used",
    "force_image_size": "the tile size is the checkpoint's",
    "per_device_eval_batch_size": "batches are filled to --tokens-per-micro-batch",
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "logging_strategy": "every step is logged",
    "save_strategy": "see --save-every and --save-minutes",
    "eval_strategy": "see --eval-every",
    "evaluation_strategy": "see --eval-every",
    "bf16": "bfloat16 is the default with a GPU",
    "tf32": "nothing large is computed in float32",
    "remove_unused_columns": "records have no columns",
    "use_data_resampling": "the reference does not use it either",
    "ddp_find_unused_parameters": "FSDP2 needs no such thing",
    "ddp_timeout": "ranks wait 10 minutes for each other",
    "do_train": "the command says it",
    "do_eval": "the command says it",
}
ONLY = {  # options of which one value is supported, with the remedy for others
    "ps_version": ("v2", "checkpoints in transformers' format shuffle pixels as v2"),
    "vision_select_layer": (-1, "the last vision layer is used"),
    "down_sample_ratio": (0.5, "pixels are shuffled 2 x 2"),
    "lora_bias": ("none", "adapters have no bias"),
    "fp16": (False, "use bfloat16 or float32"),
    "adam_beta1": (0.9, "beta1 is 0.9"),
    "warmup_steps": (0, "use warmup_ratio"),
}
CHECKPOINTING = ("grad_checkpoint", "gradient_checkpointing")
TILING = ("dynamic_image_size", "max_dynamic_patch")
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
ABLATIONS = {"use_text_only": "text", "use_image_only": "image"}
COMBINED = (
    *CHECKPOINTING, *TILING, *BATCH, *ABLATIONS,
    "bias_model_path", "drop_path_rate", "lr_scheduler_type", "report_to", "max_steps",
)  # fmt: skip
KEYS = {*RENAMED, *MEANINGLESS, *ONLY, *COMBINED}


def is_reference(options: Mapping) -> bool:
    """Whether a file is one of the reference's."""
    return any(mark in options for mark in MARKS)


def translate(options: Mapping, *, num_ranks: int) -> tuple[dict, dict[str, str]]:
    """A file's options as ours, and why some have no meaning here, by key.

    Args:
        options: the file's keys; those that are no reference keys come back as they are.
        num_ranks: GPUs, by which the reference multiplies its batch.

    Raises:
        ValueError: an option with a value that is not supported.
    """
    options = {**DEFAULTS, **options}
    for key, (value, remedy) in ONLY.items():
        if options.get(key, value) != value:
            raise ValueError(f"{key}: {options[key]!r} is not supported: {remedy}")
    ours = {key: value for key, value in options.items() if key not in KEYS}
    ours |= {RENAMED[key]: value for key, value in options.items() if key in RENAMED}
    ours |= proxy(options) | tiling(options) | batch(options, num_ranks) | optimization(options)
    notes = {key: MEANINGLESS[key] for key in options if key in MEANINGLESS} | drop_path(options)
    return ours, notes


def proxy(options: Mapping) -> dict:
    """The text-only proxy: a file that names one is robust; one that names the model itself follows `--model`."""
    name = options.get("bias_model_path")
    if name is None:
        return {}
    ours = {"robust": True, "proxy_image": "white"}
    return ours if name == options.get("model_name_or_path") else {**ours, "proxy_model": name}


def tiling(options: Mapping) -> dict:
    """Tiles an image: one where dynamic tiling is off."""
    return {"max_tiles": options["max_dynamic_patch"] if options["dynamic_image_size"] else 1}


def batch(options: Mapping, num_ranks: int) -> dict:
    """Steps of a number of pairs, each pair a sample of its own."""
    return {"pairs": "expand", "pairs_per_step": num_ranks * options[BATCH[0]] * options[BATCH[1]]}


def optimization(options: Mapping) -> dict:
    """What is spelt in another way."""
    ours: dict = {"lr_schedule": str(options["lr_scheduler_type"]).removesuffix("_with_warmup")}
    for key in filter(options.get, ABLATIONS):
        ours["inputs"] = ABLATIONS[key]
    if any(options.get(key) for key in CHECKPOINTING):
        ours["activation_checkpointing"] = "full"
    if options.get("report_to") is not None:
        ours["report_to"] = [] if options["report_to"] == "none" else options["report_to"]
    if options.get("max_steps", -1) != -1:
        ours["max_steps"] = options["max_steps"]
    return ours


def drop_path(options: Mapping) -> dict[str, str]:
    """Why stochastic depth has no effect; refused where it would make rewards random."""
    if not options.get("drop_path_rate"):
        return {}
    if not options["freeze_backbone"]:
        raise ValueError(
            "drop_path_rate: a vision tower in training would see different features for chosen and "
            "rejected; set it to 0 or freeze_backbone: true"
        )
    return {"drop_path_rate": "a frozen vision tower runs without noise"}
