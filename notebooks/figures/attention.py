"""Draws attention.png, the figure of README: where patches look, in the encoder that ships with vitlib.

python notebooks/figures/attention.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from vitlib import plots
from vitlib.data import load_images
from vitlib.data.augment import normalise
from vitlib.weights import load_pretrained

model, card = load_pretrained("shapes100-mini")
test = load_images("shapes100", "test")
names = [test.classes[label] for label in test.labels]
chosen = [names.index(name) for name in ("yellow star", "red heart", "blue ring", "orange arrow")]
with torch.no_grad():
    inside = model.intermediates(normalise(test.images[chosen], card.mean, card.std))
maps = inside["attention"][-1].mean(1)  # last layer, mean of the heads: [4, T, T]

with plt.rc_context(plots.STYLE):
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.7))
    for image, attention, (top, bottom), index in zip(
        test.images[chosen], maps, axes.T, chosen, strict=True
    ):
        top.imshow(image.permute(1, 2, 0))
        top.set_title(test.classes[test.labels[index]])
        bottom.imshow(attention[0, 1:].unflatten(0, (8, 8)), vmin=0)
        for ax in (top, bottom):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("image")
    axes[1, 0].set_ylabel("attention of CLS")
    figure.savefig(Path(__file__).with_name("attention.png"), dpi=110)
