"""Rewards of a folder by ms-swift's own reward plugin (of its GRPO); `check_swift.py` runs it in their environment.

Prints {case: reward, or why there is none} as the last line.
"""

import json
import sys

import torch
from swift.model import get_model_processor
from swift.rewards import rm_plugins
from swift.template import get_template


def main(given: dict) -> dict:
    """All outcomes."""
    model, processor = get_model_processor(
        given["model"], torch_dtype=torch.float32, device_map="cpu", model_type="internvl", task_type="seq_cls",
        num_labels=1, problem_type="regression", attn_impl="sdpa",
    )  # fmt: skip
    template = get_template(processor, template_type="internvl_hf", max_length=given["max_length"])
    template.set_mode("train")  # as their GRPO does
    template.register_post_encode_hook([model])
    plugin = rm_plugins["default"](model=model.eval(), template=template)
    return {name: outcome(plugin, case) for name, case in given["cases"].items()}


def outcome(plugin, case: dict) -> float | str:
    """A reward, or the exception that ends a training."""
    try:
        return float(plugin([case])[0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
