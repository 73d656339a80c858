"""Training: one loop, the two stages of the course, and the recipes."""

from vitlib.training.recipes import FINETUNING, RECIPES, Recipe
from vitlib.training.stages import (
    PRECISIONS,
    History,
    Trained,
    Training,
    evaluate,
    finetune,
    fit,
    hardware,
    predict,
    pretrain,
    record_test,
    resolve_device,
    resolve_precision,
)
