"""One figure grammar: original | perturbed | perturbation x k | reference, with distance and verdict below.

Images are tensors in [0, 1], on any device and of any float type. What makes a figure of its own leaves it to pyplot
and returns nothing, so that as the last line of a cell it is shown once by every tool.
"""

import base64
import io
import sys
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from faceadv.images import to_pil

__all__ = [
    *("DASHES", "MARKERS", "array", "attacks", "curves", "grid", "picture", "pipeline", "signed", "slider"),
    *("sweep", "theme"),
]

MARKERS = "os^Dv*"  # lines differ by marker and dash too, so that they can be told apart in grey
DASHES = ["-", "--", ":", "-."]


def theme() -> None:
    """seaborn's paper look with fonts that stay readable at page width. Sentences in tables are shown whole.

    What a label's function returns is not shown below a cell.
    """
    sns.set_theme("notebook", style="ticks", palette="colorblind")
    plt.rcParams.update({"figure.dpi": 90, "axes.titlesize": 11, "figure.constrained_layout.use": True})
    pd.set_option("display.max_colwidth", None)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell:
        shell.display_formatter.ipython_display_formatter.for_type(Text, lambda text: None)


def array(values: torch.Tensor) -> np.ndarray:
    """Values of any device as an array, to be drawn."""
    return values.detach().cpu().numpy()


def picture(axis: Axes, image: torch.Tensor, title: str = "", below: str = "") -> None:
    """One image on an axis, without ticks.

    Parameters
    ----------
    axis : to draw on
    image : (3, H, W)
    title, below : texts above and below the image
    """
    axis.imshow(image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy(), vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[], title=title, xlabel=below)
    sns.despine(ax=axis, left=True, bottom=True)


def grid(images: torch.Tensor, titles: Sequence[str] | None = None, columns: int = 10, size: float = 1.1) -> None:
    """Images in rows.

    Parameters
    ----------
    images : (N, 3, H, W)
    titles : N texts, above the images
    columns : images per row
    size : width of an image in inches
    """
    rows, height = -(-len(images) // columns), size * (1.25 if titles else 1.0)
    _, axes = plt.subplots(rows, columns, figsize=(size * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, images)):
        picture(axis, image, titles[i] if titles else "")


def attacks(
    original: torch.Tensor,
    perturbed: torch.Tensor,
    reference: torch.Tensor,
    captions: Sequence[tuple[str, str]],
    k: float = 10,
) -> None:
    """One row per image: original | perturbed | perturbation x k around grey | reference.

    Parameters
    ----------
    original, perturbed, reference : (N, 3, H, W) each
    captions : N pairs of texts, below the first and the second image
    k : how many times the perturbation is enlarged
    """
    size = 1.9  # of an image, in inches
    _, axes = plt.subplots(len(original), 4, figsize=(4 * size, 1.18 * size * len(original)), squeeze=False)
    images = (part.detach().cpu() for part in (original, perturbed, reference))
    for row, (x, y, z, (before, after)) in enumerate(zip(*images, captions)):
        panels = ("original", x, before), ("perturbed", y, after)
        panels += (f"perturbation × {k}", 0.5 + k * (y - x), ""), ("compared with", z, "")
        for axis, (head, image, below) in zip(axes[row], panels):
            picture(axis, image, head if row == 0 else "", below)


def pipeline(
    stages: Sequence[tuple[torch.Tensor | str, str]], marks: Mapping[int, str] | None = None, size: float = 1.6
) -> None:
    """The way of a photo through a system, from left to right.

    Parameters
    ----------
    stages : pairs of an image (3, H, W), or words that stand in a box, and the words below it
    marks : for some positions of ``stages``, words above it with an arrow: who attacks there, or what is trained
    size : width of a stage in inches
    """
    _, axis = plt.subplots(figsize=(size * len(stages), 1.45 * size))
    for i, (what, below) in enumerate(stages):
        x = 1.6 * i
        if isinstance(what, str):
            box = {"boxstyle": "round,pad=0.6", "facecolor": "0.93", "edgecolor": "0.3"}
            axis.text(x, 0, what, ha="center", va="center", fontsize=10, bbox=box)
        else:
            axis.imshow(array(what.float().clamp(0, 1).permute(1, 2, 0)), extent=(x - 0.5, x + 0.5, -0.5, 0.5))
        axis.text(x, -0.6, below, ha="center", va="top", fontsize=10)
        if i:
            axis.annotate("", (x - 0.56, 0), (x - 1.04, 0), arrowprops={"arrowstyle": "-|>", "color": "0.3"})
        if i in (marks or {}):
            arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.8}
            axis.annotate(marks[i], (x, 0.55), (x, 0.95), ha="center", fontsize=10, fontweight="bold", arrowprops=arrow)
    axis.set(xlim=(-0.8, 1.6 * len(stages) - 0.8), ylim=(-1.05, 1.25), aspect="equal")
    axis.axis("off")


def dots(axis: Axes, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Numbers as dots with their 95 % intervals, one line of dots for each row: easier to compare than a table.

    Parameters
    ----------
    axis : to draw on; label and limits of its horizontal axis are left to the caller
    rows : for each row, from the top, a mapping of series to (value, low, high), where NaN stands for "no number"
    """
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    for i, name in enumerate(series):
        places = [k for k, row in enumerate(rows.values()) if name in row]
        value, low, high = np.array([[float(v) for v in row[name]] for row in rows.values() if name in row]).T
        y = np.array(places) + 0.22 * (i - (len(series) - 1) / 2)
        away = np.maximum((value - low, high - value), 0)
        axis.errorbar(value, y, xerr=away, fmt=MARKERS[i % 6], capsize=3, label=name)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    if len(series) > 1:
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=axis)


def curves(axis: Axes, x: Sequence[float], series: Mapping[str, Sequence[tuple]]) -> None:
    """Lines with 95 % bands.

    Parameters
    ----------
    axis : to draw on
    x : positions of the points
    series : for each label a list of (mean, low, high), where None or NaN stands for "no number"
    """
    for i, (label, points) in enumerate(series.items()):
        numbers = [[np.nan if value is None else float(value) for value in point] for point in points]
        _line(axis, i, label, x, *np.array(numbers).T)


def sweep(table: pd.DataFrame, parameter: str, names: Sequence[str]) -> Figure:
    """How some numbers of a sweep depend on one parameter.

    Parameters
    ----------
    table : of ``course.run.sweep``
    parameter : the column of the table that is the horizontal axis
    names : of the numbers, all of one unit
    """
    figure, axis = plt.subplots(figsize=(6, 3))
    for i, name in enumerate(names):
        rows = table[table["name"] == name].astype({parameter: float, "low": float, "high": float})
        rows = rows.sort_values(parameter)
        _line(axis, i, name, rows[parameter], rows["value"], rows["low"], rows["high"])
    axis.set(xlabel=parameter, ylabel=rows["unit"].iloc[0])
    figure.set_layout_engine("tight")  # or the legend would be cut off in a file
    return figure


def _line(axis, i, label, x, mean, low, high):
    (line,) = axis.plot(x, mean, marker=MARKERS[i % 6], linestyle=DASHES[i % 4], label=label)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=axis)


def signed(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient (3, H, W) as a picture: grey is zero, and its 99th percentile reaches black or white."""
    gradient = gradient.detach().float()
    scale = torch.quantile(gradient.abs().flatten(), 0.99).clamp_min(1e-12)
    return 0.5 + 0.5 * gradient / scale


def slider(
    images: Sequence[torch.Tensor], labels: Sequence[str], description: str, still: Figure | None = None
) -> None:
    """A slider over images; where there is no kernel, a figure takes its place.

    Both are in one output, and each viewer shows the best that it can.

    Parameters
    ----------
    images : (3, H, W) each, one for each position of the slider
    labels : one text for each position
    description : the text before the slider
    still : the figure, by default the last one; it is closed, so that it is not shown twice
    """
    try:
        import ipywidgets
        from IPython.display import display
    except ImportError:  # a bare machine with a GPU, where cells are run without Jupyter
        return
    frames = [to_pil(image.float().clamp(0, 1))._repr_png_() for image in images]
    picture = ipywidgets.Image(value=frames[0], format="png", width=280)
    control = ipywidgets.SelectionSlider(options=list(zip(labels, range(len(frames)))), description=description)
    control.observe(lambda change: setattr(picture, "value", frames[change["new"]]), names="value")
    box = ipywidgets.VBox([control, picture])
    file, still = io.BytesIO(), still or plt.gcf()
    still.savefig(file, format="png")
    plt.close(still)
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    views = {"application/vnd.jupyter.widget-view+json": view, "text/plain": description}
    display(views | {"image/png": base64.b64encode(file.getvalue()).decode()}, raw=True)
