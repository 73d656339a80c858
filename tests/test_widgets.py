"""The widgets, moved without a browser: what a slider does is the same whoever moves it."""

import matplotlib.pyplot as plt
import pytest
import torch

from vitlib import widgets

PNG = b"\x89PNG"


@pytest.fixture
def image():
    return torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def controls_and_picture(box):
    """The controls by their descriptions, and a function that gives the bytes of the picture shown now."""
    *controls, picture = box.children
    return {control.description: control for control in controls}, lambda: bytes(picture.value)


def test_the_patch_size_slider_changes_the_picture(image):
    controls, picture = controls_and_picture(widgets.patch_sizes(image, [4, 8, 16]))
    pictures = set()
    for size in (4, 8, 16):
        controls["patch size"].value = size
        assert picture().startswith(PNG)
        pictures.add(picture())
    assert len(pictures) == 3


def test_the_patch_size_slider_starts_in_the_middle_and_shows_that_picture(image):
    controls, picture = controls_and_picture(widgets.patch_sizes(image, [4, 8, 16]))
    first = picture()
    controls["patch size"].value = 16
    controls["patch size"].value = 8
    assert picture() == first


def test_every_slider_of_the_attention_browser_changes_the_picture(image):
    attention = torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0)).softmax(-1)
    controls, picture = controls_and_picture(widgets.attention_browser(image, attention))
    assert len(controls) == 3
    for control in controls.values():
        before = picture()
        control.value = next(value for value in control.options if value != control.value)
        assert picture().startswith(PNG)
        assert picture() != before, control.description


def test_the_attention_browser_reaches_every_layer_head_and_token(image):
    attention = torch.rand(2, 3, 17, 17).softmax(-1)
    controls, _ = controls_and_picture(widgets.attention_browser(image, attention))
    assert sorted(len(control.options) for control in controls.values()) == [2, 3, 17]


def test_the_stopping_slider_reaches_every_epoch_and_changes_the_picture():
    longer = {"accuracy": [0.1, 0.3, 0.4], "loss": [3.0, 2.0, 2.5]}
    curves = {"longer": longer, "shorter": {"accuracy": [0.2, 0.5], "loss": [2.5, 1.5]}}
    controls, picture = controls_and_picture(widgets.stopping_epoch(curves, stop=2))
    slider = controls["stop after epoch"]
    assert list(slider.options) == [1, 2, 3] and slider.value == 2
    pictures = set()
    for stop in slider.options:
        slider.value = stop
        assert picture().startswith(PNG)
        pictures.add(picture())
    assert len(pictures) == 3


def test_a_redraw_leaves_no_figure_behind(image):
    controls, _ = controls_and_picture(widgets.patch_sizes(image, [4, 8, 16]))
    controls["patch size"].value = 4
    assert plt.get_fignums() == []


def test_an_error_while_drawing_is_not_swallowed():
    with pytest.raises(ValueError, match="broken"):
        widgets.explorer(_broken)


def _broken():
    raise ValueError("broken")
