"""Best-of-N sets on the pictures of shapes: many responses to a prompt, each with its true quality.

A response says every attribute as it is with probability `right`, otherwise between one and all of them wrongly; its
truth is the share of the mentioned attributes that it gets right. Cues follow a split of an environment: a response
that is entirely right carries the preferred value of a cue with the probability that the labelled-best response of a
pair has there, any other one with the opposite probability.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmrm_fast.data import scenes, shapes
from mmrm_fast.files import whole_folder


def make_candidates(
    folder: Path, environment: str, split: str = "iid", *, num_prompts: int = 200, num_responses: int = 64,
    right: float = 0.1, seed: int = 0,
) -> Path:  # fmt: skip
    """Write `candidates.jsonl` (records of `prompt`, `img_path`, `responses`, `truth`) and `images/`; returns the file.

    `folder` appears complete or not at all; FileExistsError when it exists and is not empty.
    """
    cues = shapes.cue_probabilities(environment, split, shapes.ShapesConfig())
    rng = np.random.default_rng([seed, shapes.ENVIRONMENTS.index(environment), shapes.TEST_SPLITS.index(split)])
    with whole_folder(folder, synced=False) as unfinished:
        (unfinished / "images").mkdir()
        with open(unfinished / "candidates.jsonl", "w", encoding="utf-8") as file:
            for index in tqdm(range(num_prompts), unit=" prompts", delay=2):
                record = {"id": f"{environment}-{index:06d}", "img_path": f"images/{index:06d}.png"}
                scene = scenes.random_scene(rng)
                scenes.render(scene, rng).save(unfinished / record["img_path"], compress_level=1)
                record["prompt"] = str(rng.choice(list(scenes.QUESTIONS)))
                mentioned = scenes.QUESTIONS[record["prompt"]]
                drawn = [candidate(scene.attributes, mentioned, cues, right, rng) for _ in range(num_responses)]
                record["responses"], record["truth"] = zip(*drawn, strict=True)
                file.write(json.dumps(record) + "\n")
    return folder / "candidates.jsonl"


def candidate(
    attributes: Mapping[str, str], mentioned: Sequence[str], cues: Mapping[str, float], right: float,
    rng: np.random.Generator,
) -> tuple[str, float]:  # fmt: skip
    """One response and its truth."""
    num_wrong = 0 if rng.random() < right else int(rng.integers(1, len(mentioned) + 1))
    said = dict(attributes)
    for name in rng.choice(mentioned, num_wrong, replace=False):
        said[name] = str(rng.choice([value for value in scenes.ATTRIBUTES[name] if value != attributes[name]]))
    values = {cue: bool(rng.random() < (p if num_wrong == 0 else 1 - p)) for cue, p in cues.items()}
    text = shapes.compose(scenes.statement(said, mentioned), values, str(rng.choice(shapes.FILLERS)))
    return text, 1 - num_wrong / len(mentioned)
