"""Pictures, drawn without a window (needs matplotlib)."""

import importlib
from pathlib import Path
from typing import Any

from sumus.errors import ExperimentError, extra


def colormap(name: str, count: int) -> Any:
    """Return `count` colors of a colormap, as different as the map allows."""
    return importlib.import_module("matplotlib").colormaps[name].colors[:count]


def figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure. width, height: in inches."""
    try:
        canvas: Any = importlib.import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
        made: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    except ImportError as error:
        raise ExperimentError(f"plot() needs matplotlib: {extra('report')}") from error
    canvas(made)
    return made


def check_path(path: str | Path) -> None:
    """Refuse a file name that does not end like a picture's, before any long work begins."""
    if (ending := Path(path).suffix.lower()) not in ("", ".png", ".pdf", ".svg", ".jpg", ".jpeg"):
        raise ExperimentError(f"{path}: pictures end in .png, .pdf, .svg or .jpg, not in {ending}")


def save(picture: Any, path: str | Path) -> Path:
    """Write a picture to a file, and return its path. The folder is made if it does not exist."""
    check_path(path)
    target = Path(path) if Path(path).suffix else Path(f"{path}.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(target, dpi=120)
    return target
