"""Pages that stand alone: one HTML file of a template in assets/pages, without a script, nothing fetched."""

from pathlib import Path

import jinja2
import numpy as np

from mmrm_fast.files import ASSETS, write_text
from mmrm_fast.tables import percent


def write_page(path: Path, template: str, **values: object) -> None:
    """Render a template into a file: text is escaped, charts are `plots.svg`'s, a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS / "pages"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = percent
    page = environment.get_template(template).render(values)
    write_text(path, page.encode(errors="replace").decode())  # a file's name may be no Unicode


def colour(value: float | None, worst: float, best: float) -> str:
    """A background on which black text is legible: red at `worst`, white halfway, blue at `best`."""
    if value is None or np.isnan(value):
        return "#eee"
    share = float(np.clip((value - worst) / (best - worst), 0, 1))
    end = (244, 140, 120) if share < 0.5 else (130, 180, 235)
    strength = abs(2 * share - 1)
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in end)
