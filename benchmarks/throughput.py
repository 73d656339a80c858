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
from dataclasses import dataclass

import click
import common
import torch
import torch.nn.functional as F
from common import Spread, ratio
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


@dataclass(frozen=True)
class Results:
    """What was measured.

    Args:
        rounds: by (name, precision) of the model, for every round the seconds in each phase.
        batch_size, steps: the images in a step and the steps in a round.
    """

    rounds: dict[tuple[str, str], list[dict[str, float]]]
    batch_size: int
    steps: int

    @property
    def precisions(self) -> list[str]:
        return list(dict.fromkeys(precision for _, precision in self.rounds))

    def speeds(self, model: tuple[str, str]) -> list[float]:
        """Return images/s, round by round."""
        return [self.batch_size * self.steps / sum(seconds.values()) for seconds in self.rounds[model]]

    def fastest_other(self, precision: str) -> tuple[str, str]:
        """Return the model in this precision with the highest median, vitlib's apart."""
        others = [model for model in self.rounds if model[1] == precision and model[0] != OURS]
        return max(others, key=lambda model: Spread.of(self.speeds(model)).median)

    def against(self, model: tuple[str, str], reference: tuple[str, str]) -> str:
        """Return how many times as fast ``model`` is as ``reference``, or "-" if one was not measured."""
        if model not in self.rounds or reference not in self.rounds:
            return "-"
        return f"{ratio(self.speeds(model), self.speeds(reference)):.2f}"

    def table(self) -> str:
        """Return a line per model: speed, milliseconds per step, and ratios to others in the same precision."""
        header = ["model", "precision", "images/s", *(f"{phase}, ms" for phase in PHASES)]
        rows = []
        for model, rounds in self.rounds.items():
            medians = [Spread.of([seconds[phase] for seconds in rounds]).median for phase in PHASES]
            times = [f"{1000 * median / self.steps:.1f}" for median in medians]
            references = ("published", model[1]), self.fastest_other(model[1])
            ratios = [self.against(model, reference) for reference in references]
            rows.append([*model, f"{Spread.of(self.speeds(model)).median:.1f}", *times, *ratios])
        return common.table([*header, "x published", "x fastest other"], rows)

    def conclusion(self) -> str:
        """Return one sentence: vitlib's speed divided by the fastest other's and by the published model's."""
        parts = []
        for precision in self.precisions:
            fastest = self.fastest_other(precision)
            factor = self.against((OURS, precision), fastest)
            parts.append(f"in {precision} {factor} times as fast as the fastest other, {fastest[0]}")
        pairs = [(precision, precision) for precision in self.precisions] + [("bfloat16", "float32")]
        for ours, theirs in pairs:
            if (OURS, ours) in self.rounds and ("published", theirs) in self.rounds:
                factor = self.against((OURS, ours), ("published", theirs))
                parts.append(f"in {ours} {factor} times as fast as the published model in {theirs}")
        return f"vitlib is {'; '.join(parts)}."


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
    results = Results(common.interleave(tasks, rounds), batch_size, steps)
    click.echo(f"\n{results.table()}\n\n{results.conclusion()}")
    settings = {"batch_size": batch_size, "steps": steps}
    seconds = {", ".join(model): rounds for model, rounds in results.rounds.items()}
    peers = versions("torchvision", "timm", "transformers", "vit-pytorch")
    record = {"machine": common.machine(device), "settings": settings, "peers": peers}
    common.write_json(out, {**record, "skipped": skipped, "seconds": seconds})


if __name__ == "__main__":
    main()
