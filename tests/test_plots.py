"""Figures have the panels that they promise, of images on any device, and a slider has a still beside it."""

import base64
import io
import sys

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from faceadv import plots


class Away(torch.Tensor):
    """A tensor as on a GPU: NumPy cannot read it, and it does not mix with tensors that are at home."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            places = {type(thing) for thing in args if isinstance(thing, torch.Tensor) and thing.ndim}
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert a tensor that is away to NumPy")
        if len(places) > 1:
            raise RuntimeError("tensors on two devices")
        made = super().__torch_function__(function, types, args, kwargs or {})
        return made.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else made


@pytest.fixture
def images():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def shown(axis):
    (picture,) = axis.get_images()
    return torch.from_numpy(np.asarray(picture.get_array())).permute(2, 0, 1)


def elsewhere(images):
    return [images, images.as_subclass(Away), images.double(), images.bfloat16().requires_grad_()]


@pytest.mark.parametrize("where", range(4), ids=["home", "away", "double", "bfloat16"])
def test_a_grid_has_every_image_with_its_title(images, where):
    given = elsewhere(images)[where]
    assert plots.grid(given, list("abcde"), columns=2) is None
    figure = plt.gcf()
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes] == ["a", "b", "c", "d", "e", ""]
    for axis, image in zip(figure.axes, images):
        torch.testing.assert_close(shown(axis).float(), image, rtol=0, atol=0.004)
    assert not figure.axes[5].get_images()


@pytest.mark.parametrize("where", range(4), ids=["home", "away", "double", "bfloat16"])
def test_attacks_show_four_panels_in_each_row(images, where):
    x, z = images[:2], images[2:4]
    y = (x + 0.01).clamp(0, 1)
    assert plots.attacks(elsewhere(x)[where], y, elsewhere(z)[where], [("1", "2"), ("3", "4")], k=5) is None
    figure = plt.gcf()
    axes = np.array(figure.axes).reshape(2, 4)
    assert [axis.get_title() for axis in axes[0]] == ["original", "perturbed", "perturbation × 5", "compared with"]
    assert [axis.get_xlabel() for axis in axes.flat] == ["1", "2", "", "", "3", "4", "", ""]
    for row in range(2):
        wanted = (x[row], y[row], 0.5 + 5 * (y - x)[row], z[row])
        for axis, image in zip(axes[row], wanted):
            torch.testing.assert_close(shown(axis).float(), image, rtol=0, atol=0.02)


def test_curves_have_a_line_a_band_and_a_name_for_each_series():
    _, axis = plt.subplots()
    away = torch.tensor([0.5, 0.4, 0.6]).as_subclass(Away)
    plots.curves(axis, [1, 2], {"one": [(0.1, 0.0, 0.2), (0.3, None, None)], "two": [tuple(away), tuple(away)]})
    one, two = axis.get_lines()
    assert one.get_ydata().tolist() == [0.1, 0.3]
    assert two.get_ydata().tolist() == pytest.approx([0.5, 0.5])
    assert (one.get_marker(), one.get_linestyle()) != (two.get_marker(), two.get_linestyle())
    assert len(axis.collections) == 2
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", "two"]


def test_a_pipeline_has_pictures_boxes_and_marks(images):
    assert plots.pipeline([(images[0], "photo"), ("network", "frozen"), ("same?", "verdict")], {1: "attacker"}) is None
    (axis,) = plt.gcf().axes
    texts = [text.get_text() for text in axis.texts]
    assert len(axis.images) == 1
    assert {"photo", "network", "frozen", "same?", "verdict", "attacker"} <= set(texts)


def test_dots_have_a_line_for_each_row_and_a_series_for_each_name():
    rows = {"PGD": {"dlib": (90, 80, 95), "judge": (20, 10, 35)}, "FGSM": {"dlib": (50, 40, 60)}}
    axis = plt.subplots()[1]
    plots.dots(axis, rows)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["PGD", "FGSM"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["dlib", "judge"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first row is the upper one
    plots.dots(axis, {"PGD": {"dlib": (0, 3e-15, 46), "judge": (np.nan, np.nan, np.nan)}})  # a record of before may


def test_a_sweep_is_drawn_in_the_order_of_its_parameter():
    rows = [("accuracy", "4", 0.4, 0.3, 0.5), ("accuracy", "1", 0.1, 0.0, 0.2), ("other", "1", 9.0, None, None)]
    table = pd.DataFrame(rows, columns=["name", "eps", "value", "low", "high"]).assign(unit="%")
    (axis,) = plots.sweep(table, "eps", ["accuracy", "other"]).axes
    first, second = axis.get_lines()
    assert (first.get_xdata().tolist(), first.get_ydata().tolist()) == ([1, 4], [0.1, 0.4])
    assert second.get_ydata().tolist() == [9]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("eps", "%")
    assert [band.get_facecolor()[0, :3].tolist() for band in axis.collections] == [
        list(plt.matplotlib.colors.to_rgb(line.get_color())) for line in (first, second)
    ]


def test_a_signed_picture_is_grey_at_zero():
    gradient = torch.zeros(3, 10, 10)
    gradient[0, 0] = torch.linspace(-2, 2, 10)
    for given in (gradient, gradient.as_subclass(Away), gradient.half()):
        picture = plots.signed(given).cpu()
        assert (picture[1:] == 0.5).all()
        assert picture[0, 0, 0] <= 0
        assert picture[0, 0, -1] >= 1
    assert (plots.signed(torch.zeros(3, 4, 4)) == 0.5).all()


@pytest.mark.parametrize("where", range(4), ids=["home", "away", "double", "bfloat16"])
def test_a_slider_shows_its_images_and_falls_back_to_the_still(images, where, monkeypatch):
    sent = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: sent.append((data, options)))
    plots.grid(images[:2], columns=2)
    still = plt.gcf()
    file = io.BytesIO()
    still.savefig(file, format="png")
    plots.slider([image - 0.2 for image in elsewhere(images[:3])[where]], ["a", "b", "c"], "strength")
    ((data, options),) = sent
    assert options == {"raw": True}
    assert data["text/plain"] == "strength"
    fallback = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert fallback.tobytes() == Image.open(file).tobytes()
    assert not plt.fignum_exists(still.number)
    key = data["application/vnd.jupyter.widget-view+json"]["model_id"]
    control, picture = ipywidgets.widgets.widget._instances[key].children
    assert [label for label, _ in control.options] == ["a", "b", "c"]
    for place in (0, 2, 1):
        control.value = place
        seen = np.asarray(Image.open(io.BytesIO(picture.value)).convert("RGB"), dtype=float) / 255
        wanted = (images[place] - 0.2).clamp(0, 1).permute(1, 2, 0).numpy()
        assert np.abs(seen - wanted).max() < 0.006


def test_the_theme_lets_sentences_in_tables_be_read():
    with pd.option_context("display.max_colwidth", 50), plt.rc_context():
        plots.theme()
        assert "x" * 80 in pd.DataFrame({"note": ["x" * 80]}).to_html()


def test_without_widgets_the_still_is_all(images, monkeypatch):
    """As on a bare machine with a GPU, where the cells are run without Jupyter."""
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    plots.grid(images[:2], columns=2)
    still = plt.gcf()
    plots.slider(images[:2], ["a", "b"], "strength")
    assert plt.fignum_exists(still.number)  # left open, to be shown
    plt.close(still)
