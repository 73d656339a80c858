"""The optimiser Muon, in a precision that the device computes fast."""

import math

import torch
from torch import Tensor

from vitlib.training.devices import resolve_precision

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024; also torch.optim.Muon has these


class Muon(torch.optim.Muon):
    """``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")``, in float32 where bfloat16 is slow.

    torch's orthogonalises in bfloat16 everywhere. On a CPU that does not compute in it, a training step takes six times
    as long for that (RESULTS.md, "Speed"). Where bfloat16 is native, the two are the same to the last bit.
    Only ``lr``, ``weight_decay`` and ``momentum`` can be chosen.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(matrix.grad.lerp(average, group["momentum"]))  # Nesterov's momentum
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                # elements as large as those of AdamW's updates (Liu et al. 2025, arXiv:2502.16982)
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, and singular values near 1, by five steps."""
    dtype = getattr(torch, resolve_precision("auto", matrix.device))
    is_tall = matrix.size(0) > matrix.size(1)
    wide = (matrix.T if is_tall else matrix).to(dtype)
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if is_tall else wide
