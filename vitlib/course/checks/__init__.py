"""Checks of the exercises: each takes what the learner wrote, tries it on fresh random input, and names the mistake.

A check shows one line. It never stops the notebook: an exercise that was not attempted yet, or that crashes, is a line
like any other.

There is a module for each chapter; notebooks import ``checks`` and call, for instance, ``checks.patchify(patchify)``.
The docstring of a check has the signature of the learner's function, under its name in the notebook.
"""

from .chapter_00 import model_input
from .chapter_01 import interpolation, patch_embedding, patch_numbers, patchify, tokens
from .chapter_02 import PRE_NORM_LINES, attend, attention, block_order, equivariance, split_heads
from .chapter_03 import evaluation, first_loss, sound_model, split, top1
from .chapter_04 import fair_comparison, linear_probe, normalisation, probe_size, transfer
from .chapter_05 import deletion, distance, rollout, share_on_object, without_a_model
from .chapter_06 import attention_flops, confident_mistakes, google_kernel, parameters
from .frame import ALL, VERDICT
