"""SVG: drawings that follow the page's colours and font, light or dark.

Drawn by matplotlib's objects without pyplot, so that no figure and no setting of the user's is
touched. Each colour here is a mark that stands for a variable of the page's style sheet.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, GRID, MAIN, BAD, MARK, CARD = (f"#0{number}ec0{number}" for number in range(1, 8))
_VARIABLES = {
    INK: "ink",
    SOFT: "soft",
    GRID: "grid",
    MAIN: "main",
    BAD: "bad",
    MARK: "mark",
    CARD: "card",
}
_DOTS_PER_INCH = 72  # so that a point is a pixel
_WIDTH, _HEIGHT = 410, 235
_FONT = re.compile(r"font(?:-size)?: ([\d.]+)px(?: |; font-family: )[^;]+")
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tlm_tracing",
    "font.size": 12,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
    "timezone": "UTC",
}


@dataclass(frozen=True)
class Chart:
    """A drawing.

    Attributes:
        name: A word for it, unique on its page.
        title: What it shows.
        description: The same in words and numbers, for those who can't see it.
        svg: An ``svg`` element.
    """

    name: str
    title: str
    description: str
    svg: str


def chart(
    name: str, title: str, description: str, draw: Callable[[Axes], None], height: int = _HEIGHT
) -> Chart:
    """Draw a chart.

    Args:
        name: A word for it, unique on its page.
        title: What it shows.
        description: The same in words and numbers.
        draw: What draws it.
        height: In pixels.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Of letters that matplotlib's own font lacks: the page's will have them.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        size = (_WIDTH / _DOTS_PER_INCH, height / _DOTS_PER_INCH)
        figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = _inline(file.getvalue(), name, title, description)
    return Chart(name, title, description, svg)


def _inline(svg: str, name: str, title: str, description: str) -> str:
    """What may stand in a page: its colours, its font, ids that are nobody else's."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _of_page(key, value, name)
            for key, value in element.attrib.items()
        }
    for wanted in ("metadata", "defs/style/.."):
        for element in root.findall(wanted):
            root.remove(element)
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        label = ElementTree.Element(tag, id=f"{name}-{tag}")
        label.text = text
        root.insert(place, label)
    root.attrib = {
        "role": "img",
        "aria-labelledby": f"{name}-title",
        "aria-describedby": f"{name}-desc",
        "viewBox": root.attrib["viewBox"],
    }
    return ElementTree.tostring(root, encoding="unicode")


def _of_page(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "style":
        value = _FONT.sub(r"font-size: \1px", value)
    for colour, variable in _VARIABLES.items():
        value = value.replace(colour, f"var(--{variable})")
    return re.sub(r"^#|(?<=url\()#", f"#{name}-", value)
