"""How measured figures are shown: as text in tables, and as bars."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from sumus.plotting import colormap, figure, save

DOCS = Path(__file__).resolve().parents[1] / "docs"


def three_digits(value: float) -> str:
    """Return three significant digits: 0.0345, 5.60, 182; from a thousand on, an integer."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def times(value: float | None) -> str:
    """Return a ratio as text; empty if there is none."""
    return "" if value is None else f"{value:.2f}" if value < 9.995 else f"{value:.0f}"


def megabytes(value: float | None) -> str:
    """Return bytes in MB of 2²⁰; empty if the system gives none."""
    return "" if value is None else f"{value / 2**20:,.0f}"


def reason(error: str) -> str:
    """Return why there is no figure, for a published table: short, without paths or addresses of this machine."""
    return re.sub(r"\w+://\S+|(?<!\w)/[\w.+-]+(/[\w.+-]+)+", "…", error).replace("|", "/")[:120]


def bars(path: Path, panels: Mapping[str, Mapping[str, float]], label: str, marked: Sequence[str]) -> Path:
    """Draw one panel for each workload, with one bar for each variant, on a logarithmic axis from 1: left is faster.

    Args:
        path: The picture's file.
        panels: Title → variant → its seconds over those of the variant that `label` names.
        label: The axis's label.
        marked: Variants in another colour.
    """
    columns = min(3, len(panels))
    lines, rows = -(-len(panels) // columns), max(map(len, panels.values()))
    picture = figure(1.2 + 3.4 * columns, lines * (1.1 + 0.32 * rows))
    blue, orange = colormap("tab10", 2)
    axes = picture.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, values) in zip(axes, panels.items(), strict=False):
        for row, (name, value) in enumerate(values.items()):
            axis.barh(row, value - 1, left=1, color=orange if name in marked else blue, height=0.7)
            offset, side = (4, "left") if value >= 1 else (-4, "right")
            place = {"xytext": (offset, 0), "textcoords": "offset points", "va": "center", "ha": side}
            axis.annotate(times(value), (value, row), fontsize=8, **place)
        low, high = min(1.0, *values.values()) / 2.5, max(1.0, *values.values()) * 2.5
        axis.set(xscale="log", title=title, xlabel=label, xlim=(low, high), ylim=(rows - 0.4, -0.6))
        axis.set_yticks(range(len(values)), list(values), fontsize=8)
        ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if low < tick < high]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    return save(picture, path)
