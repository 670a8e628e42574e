"""TRL's RewardTrainer on a folder and a file of pairs, as `time_peers.py` runs it, in an environment of its own."""

import argparse
import json
import resource
import time

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer


class Recorder(RewardTrainer):
    """Keeps the rewards of the first step, before any weight has changed."""

    rewards = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if self.rewards is None:
            self.rewards = torch.stack(outputs.logits.detach().squeeze(-1).chunk(2), 1).tolist()
        return (loss, outputs) if return_outputs else loss


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("pairs", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    options = parser.parse_args()
    config = RewardConfig(
        output_dir=options.out, per_device_train_batch_size=options.pairs, max_steps=options.steps,
        learning_rate=options.lr, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        gradient_checkpointing=False, bf16=False, max_length=4096, use_cpu=True,
    )  # fmt: skip
    clock = Clock()
    data = load_dataset("json", data_files=options.data, split="train")
    trainer = Recorder(model=options.model, args=config, train_dataset=data, callbacks=[clock])
    trainer.train()
    trainer.save_model(options.out)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    outcome = {
        "losses": [row["loss"] for row in rows],
        "margins": [row["margin"] for row in rows],
        "seconds": clock.seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rewards": trainer.rewards,
    }
    with open(f"{options.out}/outcome.json", "w") as file:
        json.dump(outcome, file)


if __name__ == "__main__":
    main()
