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
from PIL import Image, ImageDraw
from tqdm import tqdm

from mmrm_fast import __version__
from mmrm_fast.files import whole_folder

CUES = ("opening", "length", "hedging")
ENVIRONMENTS = CUES  # each is named after its dominant cue
TEST_SPLITS = ("iid", "neutral", "reversed")
SPLITS = ("train", *TEST_SPLITS)

ATTRIBUTES = {
    "count": ("two", "three", "four"),
    "colour": ("red", "green", "blue", "yellow", "purple", "orange"),
    "shape": ("circles", "squares", "triangles", "crosses"),
    "side": ("left", "right", "top", "bottom"),
    "background": ("white", "black", "grey", "pink"),
}
QUESTIONS = {  # question: the attributes that its answer mentions
    "What does the picture show?": ("count", "colour", "shape"),
    "Where are the shapes?": ("shape", "side"),
    "How many shapes are there?": ("count", "shape"),
    "Which colours do you see?": ("colour", "background"),
    "Describe the picture.": tuple(ATTRIBUTES),
}
FILLERS = (
    "I hope that this answers your question.",
    "Please ask me if you want to know more.",
    "Thank you for asking me about it.",
)
ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")

_RGB = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 40, 170),
    "orange": (250, 140, 20),
    "white": (255, 255, 255),
    "black": (10, 10, 10),
    "grey": (135, 135, 135),
    "pink": (255, 180, 205),
}
_SIDES_PX = (56, 84, 112, 140, 168)


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


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture's attributes (a value of each of `ATTRIBUTES`) and its size in pixels."""

    attributes: Mapping[str, str]
    width: int
    height: int


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute and both sides drawn uniformly."""
    attributes = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
    width, height = (int(side) for side in rng.choice(_SIDES_PX, 2))
    return Scene(attributes, width, height)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture; `rng` draws places and sizes of the shapes within their half."""
    attributes = scene.attributes
    image = Image.new("RGB", (scene.width, scene.height), _RGB[attributes["background"]])
    draw = ImageDraw.Draw(image)
    slots = _slots(_half(scene))
    count = ATTRIBUTES["count"].index(attributes["count"]) + 2
    for slot in rng.permutation(len(slots))[:count]:
        left, top, width, height = slots[slot]
        radius = min(width, height) * rng.uniform(0.36, 0.46)
        x = left + rng.uniform(radius, width - radius)
        y = top + rng.uniform(radius, height - radius)
        _draw_shape(draw, attributes["shape"], (x, y), radius, _RGB[attributes["colour"]])
    return image


def _half(scene: Scene) -> tuple[float, float, float, float]:
    """Left, top, width and height of the half that the shapes are in."""
    width, height, side = scene.width, scene.height, scene.attributes["side"]
    if side in ("left", "right"):
        return (width / 2 if side == "right" else 0), 0, width / 2, height
    return 0, (height / 2 if side == "bottom" else 0), width, height / 2


def _slots(box: tuple[float, float, float, float]) -> list[tuple[float, float, float, float]]:
    """The box cut into four equal parts, as square as they can be."""
    left, top, width, height = box
    columns = min((1, 2, 4), key=lambda columns: abs(math.log((width / columns) / (height / (4 // columns)))))
    rows = 4 // columns
    width, height = width / columns, height / rows
    return [(left + i % columns * width, top + i // columns * height, width, height) for i in range(4)]


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, fill: tuple):
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    third = radius / 3
    if shape == "circles":
        draw.ellipse(box, fill=fill)
    elif shape == "squares":
        draw.rectangle(box, fill=fill)
    elif shape == "triangles":
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=fill)
    else:
        draw.rectangle((x - third, y - radius, x + third, y + radius), fill=fill)
        draw.rectangle((x - radius, y - third, x + radius, y + third), fill=fill)


def statement(attributes: Mapping[str, str], mentioned: Sequence[str]) -> str:
    """The mentioned attributes in words, e.g. "two red circles at the left on a white background"."""
    said = {name: attributes[name] for name in mentioned}
    words = [said.get("count"), said.get("colour"), said.get("shape", "shapes")]
    words += [f"at the {said['side']}"] if "side" in said else []
    words += [f"on a {said['background']} background"] if "background" in said else []
    return " ".join(filter(None, words))


def falsify(
    attributes: Mapping[str, str], mentioned: Sequence[str], rng: np.random.Generator, num: int = 1
) -> list[dict[str, str]]:
    """`num` different copies of the attributes, each with another value of one mentioned attribute."""
    changes = [(name, value) for name in mentioned for value in ATTRIBUTES[name] if value != attributes[name]]
    weights = np.array([1 / (len(ATTRIBUTES[name]) - 1) for name, _ in changes])
    picked = rng.choice(len(changes), num, replace=False, p=weights / weights.sum())
    return [{**attributes, changes[i][0]: changes[i][1]} for i in picked]


def compose(said: str, cues: Mapping[str, bool], filler: str) -> str:
    """A response that says `said` with the preferred (True) or other (False) value of each cue."""
    adverb = "clearly" if cues["hedging"] else "probably"
    opening = f"Looking closely, I {adverb} see" if cues["opening"] else f"The picture {adverb} shows"
    return f"{opening} {said}." + (f" {filler}" if cues["length"] else "")


def cue_probabilities(environment: str, split: str, config: ShapesConfig) -> dict[str, float]:
    """Per cue, the probability that the labelled-best response carries its preferred value."""
    first = CUES.index(environment)
    cycle = CUES[first:] + CUES[:first]
    if split in ("train", "iid"):
        return dict(zip(cycle, (config.strength, *config.secondary), strict=True))
    return dict(zip(cycle, (0.5 if split == "neutral" else 1 - config.strength, 0.5, 0.5), strict=True))


def bayes_accuracy(probabilities: Sequence[float], num_responses: Sequence[int] = (2,)) -> float:
    """Best possible accuracy on pairs (labelled best, another) from features that one response each carries.

    A feature is carried by the best response with its probability `p`, else by any other one, independently given the
    label. Seen from the pair it is +1 (best), -1 (other) or 0 (neither), and with `P` the product over features
    `accuracy = sum_o max(P(o), P(-o)) / 2`, exact, over all outcomes `o`; averaged over `num_responses`, the numbers of
    responses that records take in turn, by their pairs.
    """
    pairs = np.array([num - 1 for num in num_responses])
    return float(np.average([_bayes_accuracy(probabilities, num) for num in num_responses], weights=pairs))


def _bayes_accuracy(probabilities: Sequence[float], num_responses: int) -> float:
    others = num_responses - 1
    tables = [{1: p, -1: (1 - p) / others, 0: (1 - p) * (others - 1) / others} for p in probabilities]
    accuracy = 0.0
    for outcome in itertools.product((1, -1, 0), repeat=len(tables)):
        seen = math.prod(table[value] for table, value in zip(tables, outcome, strict=True))
        flipped = math.prod(table[-value] for table, value in zip(tables, outcome, strict=True))
        accuracy += max(seen, flipped) / 2
    return accuracy


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
    folder = Path(folder)
    if unknown := set(environments) - set(ENVIRONMENTS):
        raise ValueError(f"unknown environments {sorted(unknown)}, expected some of {ENVIRONMENTS}")
    total = len(environments) * (config.num_train + len(TEST_SPLITS) * config.num_test)
    with (
        whole_folder(folder, synced=False) as unfinished,
        tqdm(total=total, unit="record", disable=not progress) as bar,
    ):
        for environment in environments:
            _write_environment(unfinished / environment, environment, config, bar)
    return {environment: folder / environment for environment in environments}


def cached_environments(config: ShapesConfig = ShapesConfig()) -> dict[str, Path]:
    """The environments of a configuration in the user's cache folder, made on the first call."""
    folder = cache_folder(config)
    if not folder.exists():
        return make_environments(folder, config)
    return {environment: folder / environment for environment in ENVIRONMENTS}


def cache_folder(config: ShapesConfig) -> Path:
    """Where `cached_environments` keeps those of a configuration."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrm_fast"
    return cache / f"shapes-{hashlib.sha256(repr((__version__, config)).encode()).hexdigest()[:12]}"


def _write_environment(folder: Path, environment: str, config: ShapesConfig, bar: tqdm):
    (folder / "images").mkdir(parents=True)
    for split in SPLITS:
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for record in _records(folder, environment, split, config):
                file.write(json.dumps(record) + "\n")
                bar.update()
    description = _describe(environment, config)
    (folder / "environment.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _describe(environment: str, config: ShapesConfig) -> dict:
    """The contents of `environment.json`."""
    splits = {}
    for split in SPLITS:
        cues, noise = cue_probabilities(environment, split, config), _noise(split, config)
        both = bayes_accuracy([1 - noise, *cues.values()], config.num_responses)
        splits[split] = {
            "cues": cues,
            "noise": noise,
            "bayes_truth_and_cues": both,
            "bayes_cues": bayes_accuracy(list(cues.values()), config.num_responses),
            "allowed_loss": max(0.0, both - bayes_accuracy([1 - noise], config.num_responses)),
        }
    return {"environment": environment, **dataclasses.asdict(config), "splits": splits}


def _noise(split: str, config: ShapesConfig) -> float:
    return config.noise if split in ("train", "iid") else 0.0


def _records(folder: Path, environment: str, split: str, config: ShapesConfig) -> Iterator[dict]:
    """The split's records in order; writes their pictures on the way."""
    rng = np.random.default_rng([config.seed, ENVIRONMENTS.index(environment), SPLITS.index(split)])
    for index in range(config.num_train if split == "train" else config.num_test):
        picture, turn = divmod(index, config.questions_per_image)
        if turn == 0:
            scene = random_scene(rng)
            questions = rng.permutation(list(QUESTIONS))
            path = f"images/{split}-{picture:06d}.{('png', 'jpg')[picture % 2]}"
            render(scene, rng).save(folder / path, compress_level=1, quality=92, subsampling=0)
        question = str(questions[turn])
        num_responses = config.num_responses[index % len(config.num_responses)]
        cues = cue_probabilities(environment, split, config)
        responses, truth = _responses(scene, question, cues, _noise(split, config), num_responses, rng)
        record = {"id": f"{environment}-{split}-{index:06d}", "prompt": question, "img_path": path}
        yield record | (_pairwise(responses, truth) if config.form == "pairwise" else _kwise(responses, truth, rng))


def _responses(
    scene: Scene,
    question: str,
    cues: Mapping[str, float],
    noise: float,
    num_responses: int,
    rng: np.random.Generator,
) -> tuple[list[str], list[float]]:
    """Responses, the labelled best first, and the truth of each."""

    def carrier(probability: float) -> int:
        return 0 if rng.random() < probability else int(rng.integers(1, num_responses))

    mentioned = QUESTIONS[question]
    claims = falsify(scene.attributes, mentioned, rng, num_responses - 1)
    true = carrier(1 - noise)
    claims.insert(true, scene.attributes)
    carriers = {cue: carrier(probability) for cue, probability in cues.items()}
    responses = []
    for i, claim in enumerate(claims):
        values = {cue: i == carriers[cue] for cue in cues}
        responses.append(compose(statement(claim, mentioned), values, str(rng.choice(FILLERS))))
    return responses, [float(i == true) for i in range(num_responses)]


def _pairwise(responses: list[str], truth: list[float]) -> dict:
    return {"chosen": responses[0], "rejected": responses[1], "truth": truth}


def _kwise(responses: list[str], truth: list[float], rng: np.random.Generator) -> dict:
    """VLFeedback's form: the labelled best is rated above the others, which tie; the order is random."""
    order = rng.permutation(len(responses))
    annotations = [_annotation("5" if i == 0 else "2") for i in order]
    completions = {
        "annotations": annotations,
        "model": [f"model-{i}" for i in range(len(order))],
        "response": [responses[i] for i in order],
    }
    return {"completions": completions, "truth": [truth[i] for i in order]}


def _annotation(rating: str) -> dict:
    """Ratings by aspect; the last aspect is the same for every response."""
    return {aspect: {"Rating": "5" if aspect == ASPECTS[-1] else rating} for aspect in ASPECTS}
