"""Checks of chapter 04: fine-tuning."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitlib.data.augment import normalise
from vitlib.data.images import channel_statistics
from vitlib.model import ViTModel
from vitlib.weights.checkpoint import ModelCard

from .frame import answer, as_number, call, compare, exercise, expect, number_answer, reject, tensor_answer


@exercise("transfer", (100, 10), (12, 7), (5, 20))
def transfer(learners: Callable, old_classes: int, classes: int) -> None:
    """Check ``transfer(pretrained, num_classes)``: a new model with the pretrained encoder and a new head."""
    pretrained = _tiny_vit(old_classes)
    config, before = dict(pretrained.config), copy.deepcopy(pretrained.state_dict())
    model = answer(learners, pretrained, classes)
    expect(pretrained.config == config, "your function changes `pretrained.config`; make a new dict for the new model")
    expect(isinstance(model, ViTModel), f"a ViTModel is wanted, but a {type(model).__name__} came back")
    expect(model is not pretrained, "that is the pretrained model itself; build a new one and copy the encoder into it")
    head = model.linear_classifier
    expect(isinstance(head, nn.Linear), f"the new head should be one linear layer, but is {type(head).__name__}")
    size, said = len(head.weight), model.config["num_classes"]
    rows = f"the head has {size} rows for {classes} classes"
    faults = {
        f"{rows}, those of the upstream task": size == old_classes,
        f"{rows}: its size must come from num_classes": size != classes,
        f"the head fits, but model.config still says {said} classes, so a saved file could not be loaded; build the "
        "new model with num_classes": said != classes,
        "the new model differs from `pretrained` in more than its head; take all else from pretrained.config": (
            model.config != config | {"num_classes": classes}
        ),
    }
    reject(faults)
    encoder = {name for name in before if name.startswith("vit_encoder.")}
    fresh = encoder & _changed(model, before)
    faults = {
        "the encoder is a fresh one; load the pretrained encoder's state_dict into it": fresh == encoder,
        "only some of the encoder's tensors are those of the checkpoint": fresh,
        "rows of the old head are in the new one; they belong to upstream classes, so start afresh": (
            (head.weight[:, None] == before["linear_classifier.weight"]).all(dim=2).any()
        ),
        "some weights of the new model are frozen (requires_grad is False); fine-tuning trains all of them": (
            not all(parameter.requires_grad for parameter in model.parameters())
        ),
    }
    reject(faults)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    shared = _changed(pretrained, before)
    expect(not shared, "the new model shares tensors with the pretrained one, so training it would change both")


def _changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Return the names of the tensors that are not as ``before``, their type included."""
    now = model.state_dict()
    return {
        name
        for name, tensor in before.items()
        if name not in now or now[name].dtype != tensor.dtype or not torch.equal(now[name], tensor)
    }


@exercise("size of the probe")
def probe_size(learners: Callable) -> None:
    """Check ``probe_size(width, classes)``: how many numbers a linear probe on the CLS token trains."""
    for width, classes in ((96, 10), (256, 3), *torch.randint(20, 900, (2, 2)).tolist()):
        given = number_answer(learners, width, classes)
        right = width * classes + classes
        hint = {
            width * classes: "the biases are missing, one for each class",
            classes: "these are the biases alone; each class also has a weight for every number of the CLS token",
            width + classes: "each class has weights of its own, so width and classes are multiplied",
            width * classes + width: "there is a bias for each class, not for each number of the CLS token",
            width * classes + 1: "each class has a bias of its own",
            width * 100 + 100: "that is the head of the 100 upstream classes; it stays behind",
            65 * width * classes + classes: "the head sees the CLS token alone, not all 65 tokens",
        }.get(given, "count one weight for each number of the CLS token and each class, and the biases")
        expect(given == right, f"{given:,} for width {width} and {classes} classes: {hint}")


@exercise("linear probe")
def linear_probe(learners: Callable) -> None:
    """Check ``linear_probe(model)``: set the model up so that training changes the head alone."""
    model = _tiny_vit(num_classes=3).train()
    before = copy.deepcopy(model.state_dict())
    result = call(learners, model)
    expect(not _changed(model, before), "your function changes the model's weights; freeze them as they are")
    _train_a_step(model)
    moved = _changed(model, before)
    encoder = {f"vit_encoder.{name}" for name, _ in model.vit_encoder.named_parameters()}
    head = {"linear_classifier.weight", "linear_classifier.bias"}
    if moved == head | encoder:
        faults = {
            "`requires_grad = False` on a module only gives it an attribute of that name: call requires_grad_(False), "
            "with the underscore, or set it on each of parameters()": (
                any("requires_grad" in vars(part) for part in model.modules())
            ),
            "an optimiser of the head trains a probe, but the model is not set up: freeze the encoder's "
            "parameters": isinstance(result, torch.optim.Optimizer),
            "the model that came back is another one; freeze the encoder of the one that was given": (
                isinstance(result, ViTModel) and result is not model
            ),
            "eval() switches dropout off, but training still changes the encoder": not model.vit_encoder.training,
            "nothing is frozen: a training step still changes every weight of the encoder": True,
        }
        reject(faults)
    still = moved & encoder
    example = min(still, default="")
    faults = {
        "the head is frozen and the encoder trained; a probe does it the other way round": moved and not moved & head,
        "the head is frozen as well, so nothing would be trained": not moved,
        "a part of the head is frozen; its weight and its bias are both to be trained": head - moved,
        f"{len(still)} of the encoder's {len(encoder)} tensors are still trained, such as {example}": still,
    }
    reject(faults)


def _train_a_step(model: ViTModel) -> None:
    """Take one step with a weight decay, which moves also what has a gradient of 0."""
    loss = nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.arange(6) % 3)
    if loss.requires_grad:
        loss.backward()
        torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()


# One list of runs per arm, ours and the control's. Each pair tells apart rules that agree on the others.
_RUNS = [
    ([0.6, 0.7, 0.65], [0.3, 0.2, 0.25]),  # far apart
    ([0.3, 0.5, 0.4], [0.2, 0.45, 0.35]),  # every pair is won, and still the runs overlap
    ([0.5, 0.3, 0.4], [0.2, 0.45, 0.35]),  # the same runs in another order
    ([0.1, 0.15, 0.9], [0.5, 0.6, 0.55]),  # one lucky run
    ([0.5, 0.5, 0.5], [0.6, 0.2, 0.2]),  # the best run is the control's
    ([0.1, 0.7, 0.8], [0.2, 0.3, 0.3]),  # the worst run is ours
    ([0.2, 0.1, 0.15], [0.3, 0.4, 0.35]),  # worse in every run
    ([0.4, 0.5, 0.6], [0.3, 0.4, 0.25]),  # the closest two are level
]
_RULES: dict[str, Callable] = {
    "each run is compared with the control's run of the same place in the list alone; compare it with all of them": (
        lambda ours, control: all(a > b for a, b in zip(ours, control, strict=True))
    ),
    "only the best runs are compared; our worst must beat the control's best": lambda a, b: max(a) > max(b),
    "only the worst runs are compared; our worst must beat the control's best": lambda a, b: min(a) > min(b),
    "the means are compared; a higher mean does not say that every run is higher": lambda a, b: sum(a) > sum(b),
    "one winning run is enough for you; our worst must beat the control's best": lambda a, b: max(a) > min(b),
    "a run that is level with the control's best does not beat it; use > and not >=": lambda a, b: min(a) >= max(b),
    "the order is swapped: you ask whether the control beats ours": lambda a, b: max(a) < min(b),
}


@exercise("fair comparison")
def fair_comparison(learners: Callable) -> None:
    """Check ``compare_arms(ours, control)``, lists of accuracies, one per seed: the gain in mean accuracy, and whether
    every run beats every run of the control."""
    scale, shift = torch.rand(2).tolist()
    runs = [
        [[(0.5 + 0.1 * scale) * share + 0.3 * shift for share in arm] for arm in (ours, control)]
        for ours, control in _RUNS
    ]
    results = [answer(learners, list(ours), list(control)) for ours, control in runs]
    results = [result.tolist() if hasattr(result, "tolist") else result for result in results]
    for result in results:
        expect(isinstance(result, tuple | list) and len(result) == 2, "two values are wanted: return gain, beaten")
        expect(result[1] in (True, False), "the second value says whether every run is beaten: True or False")
    _judge_gains([as_number(gain) for gain, _ in results], runs)
    right = torch.tensor([min(ours) > max(control) for ours, control in runs])
    slips = {mistake: torch.tensor([rule(*arms) for arms in runs]) for mistake, rule in _RULES.items()}
    otherwise = "the second value is not whether each run of ours is higher than each run of the control"
    compare(torch.tensor([bool(beaten) for _, beaten in results]), right, slips, otherwise)


def _judge_gains(gains: Sequence[float], runs: Sequence) -> None:
    runs = torch.tensor(runs, dtype=torch.float64)
    (ours, control), (best, best_control) = runs.mean(2).T, runs.amax(2).T
    right = ours - control
    slips = {
        "the order is swapped: a gain is ours minus the control, positive when ours is better": -right,
        "that is in percent; give a share, so that 0.05 are five points": 100 * right,
        "a loss is a gain below 0; keep its sign": right.abs(),
        "only the best runs are compared; take the mean of each arm": best - best_control,
        "that is our worst run minus the control's best; take the mean of each arm": runs[:, 0].amin(1) - best_control,
        "that is the sum over the seeds; divide by their number": 3 * right,
    }
    otherwise = "the gain is the mean of ours minus the mean of the control, and that is not what came back"
    compare(torch.tensor(gains), right, slips, otherwise, tolerance=6e-4)  # rounded to three digits is right too


@exercise("normalisation", (4, 8), (2, 5), (1, 6))
def normalisation(learners: Callable, batch: int, side: int) -> None:
    """Check ``normalisation(images, card)``: downstream images as the encoder with this card expects them."""
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    mean, std = (0.3 + 0.3 * torch.rand(2, 3)).tolist()
    card = ModelCard(("a", "b"), mean=tuple(mean), std=tuple(std))
    given = tensor_answer(learners, images, card)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (card.mean, card.std))
    own_mean, own_std = channel_statistics(images)
    shares = images.float() / 255
    own = torch.cat([normalise(image, *channel_statistics(image)) for image in images.split(1)])
    slips = {
        "those are the statistics of the images themselves; the encoder has only seen images normalised with its "
        "card's": normalise(images, own_mean, own_std),
        "each image is normalised with its own statistics, so its brightness is lost; use the card's": own,
        "the mean is that of these images; mean and std must both be the card's": normalise(images, own_mean, card.std),
        "the std is that of these images; mean and std must both be the card's": normalise(images, card.mean, own_std),
        "the images are still in 0 to 255, but mean and std are in 0 to 1; divide by 255 first": (images - mean) / std,
        "mean and std have changed places": (shares - std) / mean,
    }
    otherwise = "these are not (x / 255 - mean) / std with the card's numbers, channel by channel"
    compare(given, (shares - mean) / std, slips, otherwise)


def _tiny_vit(num_classes: int) -> ViTModel:
    """Return a small ViT of random width and depth, for images of 8 x 8 pixels."""
    layers, heads, factor = torch.randint(1, 3, (3,)).tolist()
    sizes = {"image_size": 8, "patch_size": 4, "num_layers": layers, "em_dim": 16, "num_heads": heads}
    model = ViTModel(num_classes, **sizes, ff_dim=8 * factor, drop=0.0)
    with torch.no_grad():  # no tensor keeps its usual starting value, so that a fresh one can be told apart
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
