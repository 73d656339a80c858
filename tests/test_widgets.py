"""The explorer, moved without a browser: a slider does the same whoever moves it."""

from unittest import mock

import ipywidgets
import matplotlib.pyplot as plt
import torch

from vitlib import plots
from vitlib.widgets import explorer

IMAGE = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cut(patch_size):
    return plots.patch_grid(IMAGE, patch_size)


def test_controls_start_at_the_defaults_and_redraw():
    seen = []

    def draw(patch_size=8, colour="grey"):
        seen.append((patch_size, colour))
        return cut(patch_size)

    box = explorer(draw, "An image in patches.", patch_size=[4, 8, 16], colour=["grey", "red"])
    slider, menu, picture = box.children
    assert isinstance(slider, ipywidgets.SelectionSlider) and isinstance(menu, ipywidgets.Dropdown)
    assert slider.description == "patch size" and list(slider.options) == [4, 8, 16]
    slider.value, menu.value = 16, "red"
    assert seen == [(8, "grey"), (16, "grey"), (16, "red")]
    assert bytes(picture.value) == plots.png(cut(16))
    assert plt.get_fignums() == []


def test_a_page_without_a_kernel_shows_the_first_choice():
    shown = []
    with mock.patch("vitlib.widgets.display", lambda bundle, **named: shown.append((bundle, named["metadata"]))):
        box = explorer(cut, "In patches.", patch_size=[4, 8])
        box._ipython_display_()
    ((bundle, metadata),) = shown
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == box.model_id
    assert bundle["image/png"] == plots.png(cut(4)) and bundle["text/plain"] == "In patches."
    assert metadata == {"image/png": {"alt": "In patches."}}
