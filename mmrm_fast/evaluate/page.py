"""Pages that stand alone: one HTML file of a template in assets/pages, without a script, nothing fetched."""

from pathlib import Path

import jinja2
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex

from mmrm_fast.files import ASSETS, write_text
from mmrm_fast.tables import percent

HEAT = LinearSegmentedColormap.from_list("heat", ["#f48c78", "white", "#82b4eb"])


def write_page(path: Path, template: str, **values: object) -> None:
    """Render a template into a file: text is escaped, charts are `plots.svg`'s, a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS / "pages"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "colour": colour}
    page = environment.get_template(template).render(values)
    write_text(path, page.encode(errors="replace").decode())  # a file's name may be no Unicode


def colour(value: float | None, worst: float, best: float) -> str:
    """A background on which black text is legible: red at `worst`, white halfway, blue at `best`."""
    return "#eee" if value is None or np.isnan(value) else to_hex(HEAT((value - worst) / (best - worst)))
