"""GRPO with TRL against a reward server: `mmrm-fast serve --model runs/robust/final`, then this.

    python scripts/examples/grpo_trl.py --model Qwen/Qwen2.5-0.5B-Instruct --data prompts.jsonl

The data has a column `prompt` (text or a conversation) and, for multimodal policies, `image` or `images`.
"""

import argparse

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from mmrm_fast.client import RewardClient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="policy to train")
    parser.add_argument("--data", required=True, help="JSONL of prompts")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="URL of the reward server")
    parser.add_argument("--output-dir", default="runs/grpo", help="where the policy goes")
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps, -1 for one epoch")
    parser.add_argument("--num-generations", type=int, default=8, help="completions a prompt")
    parser.add_argument("--max-completion-length", type=int, default=256, help="tokens of a completion")
    options = parser.parse_args()
    config = GRPOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        num_generations=options.num_generations,
        per_device_train_batch_size=options.num_generations,
        max_completion_length=options.max_completion_length,
        bf16=torch.cuda.is_available(),
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=RewardClient(options.server).reward_func,
        args=config,
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
