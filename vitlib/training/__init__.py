"""Training: the loop, the two stages of the course, and the recipes."""

from vitlib.training.devices import PRECISIONS, hardware, resolve_device, resolve_precision
from vitlib.training.history import History
from vitlib.training.loop import evaluate, fit, predict
from vitlib.training.recipes import FINETUNING, RECIPES, Recipe
from vitlib.training.stages import Trained, finetune, pretrain, record_test
from vitlib.training.trainer import Trainer, TrainingOptions
