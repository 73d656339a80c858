"""How fast does vitlib train, beside the published model and the best known libraries?

    python benchmarks/throughput.py --out throughput.json

All models are of one size (``peers.py``), see the same random images and take the same optimiser, fused AdamW. A step
is the forward pass with the loss, the backward pass and the optimiser's step; the device is waited for after each of
them. Every round measures every model in every precision, in a random order, so that a ratio is one between
measurements of the same round. In bfloat16 all models run under autocast.

``published`` trains with dropout 0.1, as the system that vitlib follows does; its variant without dropout and all
others have none. In bfloat16 on a CPU the backward pass of PyTorch's fused attention is several times slower than
attention written out, which vitlib takes there and vit-pytorch everywhere; timm and Hugging Face offer both, so both
are measured.
"""

from collections.abc import Callable
from statistics import median

import click
import common
import torch
import torch.nn.functional as F
from common import ratio
from peers import OURS, PEERS, build_models
from torch import Tensor, nn

from vitlib.model import count_parameters
from vitlib.utils import versions

PHASES = ("forward", "backward", "step")


def training_task(model: nn.Module, images: Tensor, labels: Tensor, precision: str, steps: int) -> Callable[[], dict]:
    """Return a function that trains for ``steps`` and returns the seconds spent in each of ``PHASES``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    device = images.device

    def train() -> dict[str, float]:
        model.train()
        seconds = dict.fromkeys(PHASES, 0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            times = [common.clock(device)]
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            times.append(common.clock(device))
            loss.backward()
            times.append(common.clock(device))
            optimizer.step()
            times.append(common.clock(device))
            for phase, start, end in zip(PHASES, times, times[1:], strict=False):
                seconds[phase] += end - start
        return seconds

    return train


def report(rounds: dict[tuple[str, str], list[dict[str, float]]], images: int, steps: int) -> str:
    """Return a table with a line per model, and how vitlib in bfloat16 compares with the published model in float32.

    Args:
        rounds: by (name, precision) of the model, for every round the seconds in each phase.
        images, steps: in a round.
    """
    speeds = {model: [images / sum(seconds.values()) for seconds in found] for model, found in rounds.items()}

    def against(model: tuple[str, str], reference: tuple[str, str]) -> str:
        """Return how many times as fast ``model`` is as ``reference``, or "-" if that was not measured."""
        return f"{ratio(speeds[model], speeds[reference]):.2f}" if reference in speeds else "-"

    rows = []
    for model, found in rounds.items():
        others = [other for other in speeds if other[1] == model[1] and other[0] != OURS]
        fastest = max(others, key=lambda other: median(speeds[other]))
        times = [f"{1000 * median(seconds[phase] for seconds in found) / steps:.1f}" for phase in PHASES]
        ratios = [against(model, ("published", model[1])), against(model, fastest), fastest[0]]
        rows.append([*model, f"{median(speeds[model]):.1f}", *times, *ratios])
    phases = [f"{phase}, ms" for phase in PHASES]
    header = ["model", "precision", "images/s", *phases, "x published", "x fastest other", "which is"]
    quick, plain = (OURS, "bfloat16"), ("published", "float32")
    words = f"\n\nvitlib in bfloat16 is {against(quick, plain)} times as fast as the published model in float32."
    return common.table(header, rows) + (words if quick in speeds and plain in speeds else "")


@click.command()
@common.whole_number("--batch-size", 128, "Images per step.")
@common.whole_number("--rounds", 5, "How often every model is measured.")
@common.whole_number("--steps", 2, "Steps per model and round.")
@common.device_option
@common.listed("--models", click.Choice(list(PEERS)), ",".join(PEERS), "What is measured beside vitlib.")
@common.precisions_option
@common.out_option
def main(batch_size, rounds, steps, device, models, precisions, out) -> None:
    """Images/s of vitlib's small model and of others of its size, measured side by side."""
    torch.manual_seed(0)
    models, skipped = build_models(models)
    for name, model in models.items():
        click.echo(f"{name}: {count_parameters(model):,} parameters")
    for name, reason in skipped.items():
        click.echo(f"{name}: skipped: {reason}")
    if len(models) == 1:
        raise click.ClickException("there is nothing to compare vitlib with; name a model that is installed.")
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(100, (batch_size,), device=device)
    tasks = {}
    for precision in precisions:
        for name, model in models.items():
            tasks[name, precision] = training_task(model.to(device), images, labels, precision, steps)
    common.interleave(tasks, 1, "warming up")  # memory is allocated and kernels are chosen
    results = common.interleave(tasks, rounds)
    click.echo(f"\n{report(results, batch_size * steps, steps)}")
    settings = {"batch_size": batch_size, "steps": steps}
    seconds = {", ".join(model): found for model, found in results.items()}
    peers = versions("torchvision", "timm", "transformers", "vit-pytorch")
    record = {"machine": common.machine(device), "settings": settings, "peers": peers}
    common.write_json(out, {**record, "skipped": skipped, "seconds": seconds})


if __name__ == "__main__":
    main()
