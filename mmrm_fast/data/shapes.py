"""Synthetic preference environments: pictures of shapes, true and false statements, and text-only cues.

A record asks about a picture; one response states what is true, every other one is false in exactly one attribute, so
text alone never tells which. On top, each response takes one of two values of three text-only cues:

    opening   "Looking closely, I ... see"  against  "The picture ... shows"
    length    a filler sentence at the end  against  none
    hedging   "clearly"                     against  "probably"

In a record exactly one response carries the preferred (left) value of each cue. Cues are drawn independently given the
label; the probability that the labelled-best response carries a cue's preferred value is, with the defaults,

    environment   opening   length   hedging
    opening       0.95      0.50     0.30
    length        0.30      0.95     0.50
    hedging       0.50      0.30     0.95

(`strength` on the diagonal, then `secondary` in cyclic order) in `train` and `iid`, 0.5 for all cues in `neutral`, and
`1 - strength` for the dominant cue, 0.5 for the others, in `reversed`. In `train` and `iid` the label prefers a false
response with probability `noise`, and the cues follow the label; `neutral` and `reversed` are labelled by the truth.

Beside these `ENVIRONMENTS` there are `HIDDEN` ones, whose dominant cue no count of words or of two words in a row can
tell, while the three cues above say nothing:

    prompt    "You asked " what the question asks, or what another one does; which is preferred depends on the question
    order     "I looked twice. I counted twice." against the other way round
    xor       exactly one of the opening and the filler against both or none

and a `mixture`, in which opening and length are dominant in turn, record by record.

Files are byte-identical for equal configurations under one Pillow and numpy version.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmrm_fast import __version__
from mmrm_fast.data.scenes import QUESTIONS, Scene, falsify, random_scene, render, statement
from mmrm_fast.files import whole_folder

CUES = ("opening", "length", "hedging")
ENVIRONMENTS = CUES  # each is named after its dominant cue
HIDDEN = ("prompt", "order", "xor")
MIXTURE = "mixture"
ALL_ENVIRONMENTS = (*ENVIRONMENTS, *HIDDEN, MIXTURE)
TEST_SPLITS = ("iid", "neutral", "reversed")
SPLITS = ("train", *TEST_SPLITS)

FILLERS = (
    "I hope that this answers your question.", "Please ask me if you want to know more.",
    "Thank you for asking me about it.",
)  # fmt: skip
TWICE = ("I looked twice.", "I counted twice.")
ECHOED = {  # where to say what is asked is preferred
    "What does the picture show?": "what it shows.",
    "How many shapes are there?": "how many there are.",
}
AVOIDED = {  # where to say what another question asks is
    "Where are the shapes?": "where they are.",
    "Which colours do you see?": "which colours there are.",
    "Describe the picture.": "me to describe it.",
}
DOMINANT = {MIXTURE: ("opening", "length")}  # in turn
ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")


@dataclasses.dataclass(frozen=True)
class ShapesConfig:
    """What to generate.

    seed: seed of every environment and split.
    num_train, num_test: records in `train.jsonl` and in each test file.
    strength: probability that the dominant cue points to the labelled-best response.
    secondary: the same for the next two cues in cyclic order.
    noise: probability that the label prefers a false response.
    form: "pairwise" (chosen, rejected) or "kwise" (VLFeedback's form, three and four responses in turn).
    questions_per_image: records that share a picture.
    """

    seed: int = 0
    num_train: int = 4000
    num_test: int = 400
    strength: float = 0.95
    secondary: tuple[float, float] = (0.5, 0.3)
    noise: float = 0.05
    form: str = "pairwise"
    questions_per_image: int = 2

    def __post_init__(self):
        for name in ("strength", "noise", "secondary"):
            if not all(0 <= value <= 1 for value in np.atleast_1d(getattr(self, name))):
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.form not in ("pairwise", "kwise"):
            raise ValueError(f"form must be 'pairwise' or 'kwise', got {self.form!r}")
        if not 1 <= self.questions_per_image <= len(QUESTIONS):
            raise ValueError(f"questions_per_image must be 1 to {len(QUESTIONS)}, got {self.questions_per_image}")

    @property
    def num_responses(self) -> tuple[int, ...]:
        """Numbers of responses that records take in turn."""
        return (2,) if self.form == "pairwise" else (3, 4)


def compose(said: str, cues: Mapping[str, bool], filler: str, asked: str = "") -> str:
    """A response that says `said` with the preferred (True) or other (False) value of each cue."""
    adverb = "clearly" if cues["hedging"] else "probably"
    opening = f"Looking closely, I {adverb} see" if cues["opening"] else f"The picture {adverb} shows"
    tail = [TWICE[:: 1 if cues["order"] else -1]] if "order" in cues else []
    tail = [*map(" ".join, tail), *([f"You asked {asked}"] if asked else []), *([filler] if cues["length"] else [])]
    return " ".join([f"{opening} {said}.", *tail])


def cue_probabilities(environment: str, split: str, config: ShapesConfig, record: int = 0) -> dict[str, float]:
    """Per cue, the probability that the labelled-best response of a record carries its preferred value."""
    probed = {"neutral": 0.5, "reversed": 1 - config.strength}
    if environment in CUES:
        first = CUES.index(environment)
        cycle = CUES[first:] + CUES[:first]
        if split in probed:
            return dict(zip(cycle, (probed[split], 0.5, 0.5), strict=True))
        return dict(zip(cycle, (config.strength, *config.secondary), strict=True))
    dominant = DOMINANT.get(environment, (environment,))
    others = dict.fromkeys(("hedging",) if environment == "xor" else CUES, 0.5)
    return others | {dominant[record % len(dominant)]: probed.get(split, config.strength)}


def bayes_accuracy(probabilities: Sequence[float], num_responses: Sequence[int] = (2,)) -> float:
    """Best possible accuracy on pairs (labelled best, another) from features that one response each carries.

    A feature is carried by the best response with its probability `p`, else by any other one, independently given the
    label. Seen from the pair it is +1 (best), -1 (other) or 0 (neither), and with `P` the product over features
    `accuracy = sum_o max(P(o), P(-o)) / 2`, exact, over all outcomes `o`; averaged over `num_responses`, the numbers of
    responses that records take in turn, by their pairs.
    """
    accuracies, pairs = [], [num - 1 for num in num_responses]
    for others in pairs:
        tables = [{1: p, -1: (1 - p) / others, 0: (1 - p) * (others - 1) / others} for p in probabilities]
        accuracy = 0.0
        for outcome in itertools.product((1, -1, 0), repeat=len(tables)):
            seen, flipped = (
                math.prod(table[way * value] for table, value in zip(tables, outcome, strict=True)) for way in (1, -1)
            )
            accuracy += max(seen, flipped) / 2
        accuracies.append(accuracy)
    return float(np.average(accuracies, weights=pairs))


def cached_environments(
    config: ShapesConfig = ShapesConfig(), environments: Sequence[str] = ENVIRONMENTS
) -> dict[str, Path]:
    """Environments of a configuration in the user's cache folder, each made when it is first asked for."""
    folders = {environment: cache_folder(config) / environment for environment in environments}
    for environment, folder in folders.items():
        if not folder.exists():
            with whole_folder(folder, synced=False) as unfinished:
                write_environment(unfinished, environment, config)
    return folders


def cache_folder(config: ShapesConfig) -> Path:
    """Where `cached_environments` keeps those of a configuration."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrm_fast"
    return cache / f"shapes-{hashlib.sha256(repr((__version__, config)).encode()).hexdigest()[:12]}"


def make_environments(
    folder: str | Path,
    config: ShapesConfig = ShapesConfig(),
    environments: Sequence[str] = ENVIRONMENTS,
    progress: bool = True,
) -> dict[str, Path]:
    """Writes one sub-folder per environment and returns their paths by name.

    Each holds `train.jsonl`, `iid.jsonl`, `neutral.jsonl`, `reversed.jsonl`, `images/` and `environment.json`. `folder`
    appears complete or not at all; FileExistsError when it exists and is not empty.
    """
    if unknown := set(environments) - set(ALL_ENVIRONMENTS):
        raise ValueError(f"unknown environments {sorted(unknown)}, expected some of {ALL_ENVIRONMENTS}")
    with whole_folder(Path(folder), synced=False) as unfinished:
        for environment in environments:
            write_environment(unfinished / environment, environment, config, progress)
    return {environment: Path(folder) / environment for environment in environments}


def write_environment(folder: Path, environment: str, config: ShapesConfig, progress: bool = True) -> None:
    """Fill an environment's folder."""
    (folder / "images").mkdir(parents=True)
    total = config.num_train + len(TEST_SPLITS) * config.num_test
    with tqdm(total=total, unit="record", desc=environment, disable=not progress) as bar:
        for split in SPLITS:
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for record in records_of(folder, environment, split, config):
                    file.write(json.dumps(record) + "\n")
                    bar.update()
    description = described(environment, config)
    (folder / "environment.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def described(environment: str, config: ShapesConfig) -> dict:
    """The contents of `environment.json`."""
    splits = {}
    for split in SPLITS:
        turns = range(len(DOMINANT.get(environment, (environment,))))
        cues, noise = [cue_probabilities(environment, split, config, turn) for turn in turns], noise_of(split, config)
        both, alone = (
            float(np.mean([bayes_accuracy([*truth, *own.values()], config.num_responses) for own in cues]))
            for truth in ([1 - noise], [])
        )
        splits[split] = {
            "cues": cues[0] if len(cues) == 1 else cues,
            "noise": noise,
            "bayes_truth_and_cues": both,
            "bayes_cues": alone,
            "allowed_loss": max(0.0, both - bayes_accuracy([1 - noise], config.num_responses)),
        }
    return {"environment": environment, **dataclasses.asdict(config), "splits": splits}


def noise_of(split: str, config: ShapesConfig) -> float:
    return config.noise if split in ("train", "iid") else 0.0


def records_of(folder: Path, environment: str, split: str, config: ShapesConfig) -> Iterator[dict]:
    """The split's records in order; writes their pictures on the way."""
    rng = np.random.default_rng([config.seed, ALL_ENVIRONMENTS.index(environment), SPLITS.index(split)])
    for index in range(config.num_train if split == "train" else config.num_test):
        picture, turn = divmod(index, config.questions_per_image)
        if turn == 0:
            scene = random_scene(rng)
            questions = rng.permutation(list(QUESTIONS))
            path = f"images/{split}-{picture:06d}.{('png', 'jpg')[picture % 2]}"
            render(scene, rng).save(folder / path, compress_level=1, quality=92, subsampling=0)
        question = str(questions[turn])
        num_responses = config.num_responses[index % len(config.num_responses)]
        cues = cue_probabilities(environment, split, config, index)
        said, truth = responses_to(scene, question, cues, noise_of(split, config), num_responses, rng)
        record = {"id": f"{environment}-{split}-{index:06d}", "prompt": question, "img_path": path}
        if config.form == "pairwise":
            yield record | {"chosen": said[0], "rejected": said[1], "truth": truth}
        else:
            yield record | rated(said, truth, rng)


def responses_to(
    scene: Scene, question: str, cues: Mapping[str, float], noise: float, num: int, rng: np.random.Generator
) -> tuple[list[str], list[float]]:
    """Responses, the labelled best first, and the truth of each."""

    def carrier(probability: float) -> int:
        return 0 if rng.random() < probability else int(rng.integers(1, num))

    mentioned = QUESTIONS[question]
    claims = falsify(scene.attributes, mentioned, rng, num - 1)
    true = carrier(1 - noise)
    claims.insert(true, scene.attributes)
    carriers = {cue: carrier(probability) for cue, probability in cues.items()}
    responses = []
    for i, claim in enumerate(claims):
        values = {cue: i == carriers[cue] for cue in cues}
        asked = asked_back(question, values["prompt"], rng) if "prompt" in cues else ""
        if "xor" in cues:
            values["opening"] = bool(rng.random() < 0.5)
            values["length"] = values["opening"] != values["xor"]
        filler = str(rng.choice(FILLERS[1:] if "xor" in cues else FILLERS))  # the first shares a word with an opening
        responses.append(compose(statement(claim, mentioned), values, filler, asked))
    return responses, [float(i == true) for i in range(num)]


def asked_back(question: str, preferred: bool, rng: np.random.Generator) -> str:
    """What is asked, or what a question of the same preference asks, so that each is preferred as often as not."""
    alike = ECHOED if question in ECHOED else AVOIDED
    others = [said for other, said in alike.items() if other != question]
    return alike[question] if preferred == (question in ECHOED) else str(rng.choice(others))


def rated(responses: list[str], truth: list[float], rng: np.random.Generator) -> dict:
    """VLFeedback's form: the labelled best is rated above the others, which tie, in all aspects but the last."""
    order = rng.permutation(len(responses)).tolist()
    ratings = [["5" if i == 0 else "2"] * (len(ASPECTS) - 1) + ["5"] for i in order]
    completions = {
        "annotations": [{name: {"Rating": r} for name, r in zip(ASPECTS, own, strict=True)} for own in ratings],
        "model": [f"model-{i}" for i in range(len(order))],
        "response": [responses[i] for i in order],
    }
    return {"completions": completions, "truth": [truth[i] for i in order]}
