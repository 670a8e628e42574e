"""Pictures of coloured shapes, and what can be said of them, truly or falsely in one attribute."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

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
RGB = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (245, 220, 40),
    "purple": (140, 40, 170), "orange": (250, 140, 20), "white": (255, 255, 255), "black": (10, 10, 10),
    "grey": (135, 135, 135), "pink": (255, 180, 205),
}  # fmt: skip
SIDES_PX = (56, 84, 112, 140, 168)


@dataclass(frozen=True)
class Scene:
    """A picture's attributes (a value of each of `ATTRIBUTES`) and its size in pixels."""

    attributes: Mapping[str, str]
    width: int
    height: int


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute and both sides drawn uniformly."""
    attributes = {name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()}
    width, height = (int(side) for side in rng.choice(SIDES_PX, 2))
    return Scene(attributes, width, height)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as an RGB picture; `rng` draws places and sizes of the shapes within their half."""
    attributes = scene.attributes
    image = Image.new("RGB", (scene.width, scene.height), RGB[attributes["background"]])
    draw = ImageDraw.Draw(image)
    slots = shape_slots(scene)
    count = ATTRIBUTES["count"].index(attributes["count"]) + 2
    for slot in rng.permutation(len(slots))[:count]:
        left, top, width, height = slots[slot]
        radius = min(width, height) * rng.uniform(0.36, 0.46)
        x = left + rng.uniform(radius, width - radius)
        y = top + rng.uniform(radius, height - radius)
        draw_shape(draw, attributes["shape"], (x, y), radius, RGB[attributes["colour"]])
    return image


def shape_slots(scene: Scene) -> list[tuple[float, float, float, float]]:
    """Left, top, width and height of the four equal parts of the half that the shapes are in, as square as can be."""
    width, height, side = scene.width, scene.height, scene.attributes["side"]
    left, top = (width / 2 if side == "right" else 0), (height / 2 if side == "bottom" else 0)
    width, height = (width / 2, height) if side in ("left", "right") else (width, height / 2)
    columns = min((1, 2, 4), key=lambda columns: abs(math.log((width / columns) / (height / (4 // columns)))))
    rows = 4 // columns
    width, height = width / columns, height / rows
    return [(left + i % columns * width, top + i // columns * height, width, height) for i in range(4)]


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, fill: tuple) -> None:
    """Draw one shape whose circle has this centre and radius."""
    x, y = centre
    third, box = radius / 3, (x - radius, y - radius, x + radius, y + radius)
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
