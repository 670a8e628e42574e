"""Writes a best-of-N set: python scripts/make_candidates.py FOLDER --environment length."""

from pathlib import Path
from typing import Literal

import tyro

from mmrm_fast.study.candidates import make_candidates


def main(
    folder: tyro.conf.Positional[Path],
    environment: Literal["opening", "length", "hedging"] = "opening",
    split: Literal["iid", "neutral", "reversed"] = "iid",
    num_prompts: int = 200,
    num_responses: int = 64,
    right: float = 0.1,
    seed: int = 0,
):
    """Writes candidates.jsonl and images/.

    Args:
        folder: where to write; must not exist or be empty.
        environment: whose cues the responses carry: opening, length or hedging.
        split: which of its relations of cues and truth: iid, neutral or reversed.
        num_prompts: prompts, each about a picture of its own.
        num_responses: responses to each.
        right: probability that a response is entirely right.
        seed: of everything drawn.
    """
    sizes = {"num_prompts": num_prompts, "num_responses": num_responses}
    print(make_candidates(folder, environment, split, **sizes, right=right, seed=seed))


if __name__ == "__main__":
    tyro.cli(main)
