"""One figure grammar: original | perturbed | perturbation x k | reference, with distance and verdict below."""

import base64
import io

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from IPython.display import display

MARKERS = "os^Dv*"  # lines differ by marker and dash too, so that they can be told apart in grey
DASHES = ["-", "--", ":", "-."]


def theme():
    """seaborn's paper look with fonts that stay readable at page width."""
    sns.set_theme("notebook", style="ticks", palette="colorblind")
    plt.rcParams.update({"figure.dpi": 90, "axes.titlesize": 11, "figure.constrained_layout.use": True})


def picture(axis, image, title="", below=""):
    """One image (3, H, W) in [0, 1] on an axis, without ticks, ``below`` under it."""
    axis.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[], title=title, xlabel=below)
    sns.despine(ax=axis, left=True, bottom=True)


def grid(images, titles=None, columns=10, size=1.1):
    """Images (N, 3, H, W) in rows of ``columns``, with an optional title each."""
    rows = -(-len(images) // columns)
    height = size * (1.25 if titles else 1.0)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes.flat, images)):
        picture(axis, image, titles[i] if titles else "")
    return figure


def attacks(original, perturbed, reference, captions, k=10, size=1.9):
    """A row per image: original | perturbed | perturbation x k around grey | reference.

    Images (N, 3, H, W); captions: N pairs of text below the original and the perturbed image.
    """
    figure, axes = plt.subplots(len(original), 4, figsize=(4 * size, 1.18 * size * len(original)), squeeze=False)
    for row, (x, y, z, (before, after)) in enumerate(zip(original, perturbed, reference, captions)):
        heads = ("original", "perturbed", f"perturbation × {k}", "compared with") if row == 0 else ("",) * 4
        picture(axes[row, 0], x, heads[0], before)
        picture(axes[row, 1], y, heads[1], after)
        picture(axes[row, 2], 0.5 + k * (y - x), heads[2])
        picture(axes[row, 3], z, heads[3])
    return figure


def curves(axis, x, series):
    """Lines with 95 % bands: series is {label: list of (mean, low, high)} over x."""
    for i, (label, points) in enumerate(series.items()):
        mean, low, high = np.array(points, dtype=float).T
        (line,) = axis.plot(x, mean, marker=MARKERS[i % 6], linestyle=DASHES[i % 4], label=label)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=axis)


def sweep(table, parameter, names, label=None):
    """How some numbers of a sweep's table (``run.sweep``) follow one parameter, with their intervals."""
    figure, axis = plt.subplots(figsize=(6, 3))
    for i, name in enumerate(names):
        rows = table[table["name"] == name].astype({parameter: float}).sort_values(parameter)
        axis.plot(rows[parameter], rows["value"], DASHES[i % 4], marker=MARKERS[i % 6], label=name)
        axis.fill_between(
            rows[parameter], rows["low"].astype(float), rows["high"].astype(float), alpha=0.15, linewidth=0
        )
    axis.set(xlabel=parameter, ylabel=label or rows["unit"].iloc[0])
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=axis)
    figure.set_layout_engine("tight")  # or the legend would be cut off in a file
    return figure


def signed(gradient):
    """A gradient (3, H, W) as a picture: grey is zero, its 99th percentile reaches black or white."""
    scale = torch.quantile(gradient.abs().flatten(), 0.99).clamp_min(1e-12)
    return 0.5 + 0.5 * gradient / scale


def slider(images, labels, description, still):
    """A slider over precomputed images; where there is no kernel, the figure ``still`` takes its place.

    Both travel in one output, and each viewer shows the best it can.
    """
    frames = [_png(image) for image in images]
    picture = ipywidgets.Image(value=frames[0], format="png", width=280)
    control = ipywidgets.SelectionSlider(options=list(zip(labels, range(len(frames)))), description=description)
    control.observe(lambda change: setattr(picture, "value", frames[change["new"]]), names="value")
    box = ipywidgets.VBox([control, picture])
    file = io.BytesIO()
    still.savefig(file, format="png")
    plt.close(still)
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    display(
        {
            "application/vnd.jupyter.widget-view+json": view,
            "image/png": base64.b64encode(file.getvalue()).decode(),
            "text/plain": description,
        },
        raw=True,
    )


def _png(image):
    file = io.BytesIO()
    plt.imsave(file, image.clamp(0, 1).permute(1, 2, 0).numpy(), format="png")
    return file.getvalue()
