"""What TRL's GRPO trainer gets of a reward server for given cases; `check_clients.py` runs it in TRL's environment.

Prints {client: {case: reward, or why there is none}} as the last line.
"""

import json
import sys
import tempfile

from datasets import Dataset, Image, List
from trl import GRPOConfig, GRPOTrainer

from mmrm_fast.client import RewardClient


class Rewarded(Exception):
    """The rewards are there; no step is taken."""


class Policy(GRPOTrainer):
    """Says one response."""

    response = ""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        tokenizer = self.processing_class.tokenizer
        ids = [*tokenizer(self.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return [ids] * len(prompt_ids), None


def outcome(case: dict, given: dict) -> float | str:
    """The reward of a response, or the error that ends the training."""
    kept = []

    def reward_func(**columns):
        kept.extend(RewardClient(given["url"]).reward_func(**columns))
        raise Rewarded

    rows = Dataset.from_list([{"prompt": case["messages"], **({"images": case["images"]} if case["images"] else {})}])
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=1, num_generations=2, per_device_train_batch_size=2, report_to="none",
            bf16=False, use_cpu=True,
        )  # fmt: skip
        policy = Policy(
            model=given["model"], reward_funcs=reward_func, args=config,
            train_dataset=rows.cast_column("images", List(Image())) if case["images"] else rows,
        )  # fmt: skip
        policy.response = case["response"]
        try:
            policy.train()
        except Rewarded:
            return kept[0]
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def main(given: dict) -> dict:
    """All outcomes; TRL always sends the pictures that it shows, and cuts no prompt."""
    cases = {name: case for name, case in given["cases"].items() if not case["cut"]}
    cases = {name: case for name, case in cases.items() if len(case["images"]) == len(case["labelled"])}
    for case in cases.values():
        if case["foreign"]:
            case["messages"] = [*case["messages"], {"role": "assistant", "content": "It is"}]
    return {"TRL": {name: outcome(case, given) for name, case in cases.items()}}


if __name__ == "__main__":
    print(json.dumps(main(json.load(sys.stdin))))
