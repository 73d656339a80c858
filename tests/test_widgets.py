"""The explorer, moved without a browser: a slider does the same whoever moves it."""

import time
from unittest import mock

import ipywidgets
import matplotlib.pyplot as plt
import pytest
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


def test_without_a_default_the_first_choice_is_shown():
    box = explorer(cut, "In patches.", patch_size=range(4, 12, 4))
    assert box.children[0].value == 4 and bytes(box.picture.value) == plots.png(cut(4))


def test_a_page_without_a_kernel_shows_the_first_picture():
    shown = []
    with mock.patch("vitlib.widgets.display", lambda bundle, **named: shown.append((bundle, named["metadata"]))):
        box = explorer(cut, "In patches.", patch_size=[4, 8])
        box._ipython_display_()
    ((bundle, metadata),) = shown
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == box.model_id
    assert bundle["image/png"] == plots.png(cut(4)) and bundle["text/plain"] == "In patches."
    assert metadata == {"image/png": {"alt": "In patches."}}


def test_an_error_while_drawing_is_not_swallowed():
    def broken(number):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        explorer(broken, "", number=[1, 2])


def test_a_slider_answers_at_once():
    photo = torch.randint(256, (3, 512, 512), dtype=torch.uint8)
    box = explorer(lambda patch_size: plots.patch_grid(photo, patch_size), "", patch_size=[128, 64, 32, 16])
    taken = []
    for value in (64, 32, 16):
        start = time.process_time()
        box.children[0].value = value
        taken.append(time.process_time() - start)
    # the goal is 0.2 s from hand to eye on a quiet machine (RESULTS.md); a busy one computes half as fast
    assert min(taken) < 0.4, f"{min(taken):.2f} s of computing"
