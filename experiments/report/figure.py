"""What all figures share: their description, colours and style, and how they are saved."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

_TAG = re.compile(r"<[^>]+>")
_DECIMALS = re.compile(r"(\d\d\.\d|\d\.\d\d)\d+")
_INDENTATION = re.compile(r" *\n *")
INK = "#3b4252"  # text and axes
GRID = "#d8dee9"

COLOURS = {
    "MicroAdam": "#d9480f",
    "MicroAdam, m = 20": "#f08c00",
    "Adam": "#1971c2",
    "Adam-8bit": "#15aabf",
    "CAME": "#9c36b5",
    "GaLore": "#b08900",
    "SGD": "#868e96",
    "Adafactor": "#2f9e44",
    "Lion": "#c2255c",
}

STYLE: dict[Any, Any] = {  # matplotlib's type for it lists every key
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # searchable text, and half the bytes
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    sentence: str  # what it shows
    files: list[Path]  # png, svg


def save(drawing: Drawing, figures_dir: Path, name: str, title: str, sentence: str) -> Figure:
    """Writes the drawing as PNG and SVG, byte for byte reproducibly."""
    figures_dir.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            files.append(figures_dir / f"{name}.{suffix}")
            drawing.savefig(files[-1], dpi=160, metadata=metadata)
    png, svg = files
    # Tenths of a point are precise enough for places; text is outside the tags, so untouched.
    shorter = _TAG.sub(lambda tag: _DECIMALS.sub(r"\1", tag[0]), svg.read_text(encoding="utf-8"))
    svg.write_text(_INDENTATION.sub("\n", shorter), encoding="utf-8")
    with Image.open(png) as image:
        palette = image.convert("RGB").quantize(128)  # enough for a drawing, in half the bytes
    palette.save(png, optimize=True)
    return Figure(name, title, sentence, files)
