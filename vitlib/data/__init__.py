"""Images in: the drawn data sets, CIFAR, folders, and what is done to images in training."""

from vitlib.data.images import (
    LabelledImages,
    channel_statistics,
    draw_evenly,
    load_images,
    train_validation_split,
)
