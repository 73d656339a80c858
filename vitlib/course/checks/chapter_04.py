"""Checks of chapter 04: fine-tuning."""

from collections.abc import Callable, Sequence

import torch

from vitlib.data.augment import normalise
from vitlib.data.images import channel_statistics
from vitlib.model import ViTModel
from vitlib.weights.checkpoint import ModelCard

from .frame import Mistake, NotAttempted, answer, as_number, call, compare, exercise, expect, tensor_answer


@exercise("transfer")
def transfer(learners: Callable) -> None:
    """Of ``transfer(pretrained, num_classes)``: a new model with the pretrained encoder and a new head."""
    pretrained = _tiny_vit(num_classes=100)
    before = {name: tensor.clone() for name, tensor in pretrained.state_dict().items()}
    model = answer(learners, pretrained, 10)
    expect(isinstance(model, ViTModel), f"a ViTModel is wanted, but a {type(model).__name__} came back")
    expect(model is not pretrained, "that is the pretrained model itself; build a new one and copy the encoder into it")
    rows = model.linear_classifier.weight.shape[0]
    expect(rows != 100, "the head still has 100 rows for 10 classes: the first loss is near ln 100, not ln 10")
    expect(rows == 10, f"the head has {rows} rows for 10 classes")
    encoder = model.vit_encoder.state_dict()
    same = [torch.equal(tensor, before[f"vit_encoder.{name}"]) for name, tensor in encoder.items()]
    expect(any(same), "the encoder is a fresh one; load the pretrained encoder's state_dict into it")
    expect(all(same), "only some of the encoder's tensors are those of the checkpoint")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    unchanged = all(torch.equal(tensor, before[name]) for name, tensor in pretrained.state_dict().items())
    expect(unchanged, "the new model shares tensors with the pretrained one, so training it would change both")
    rows = answer(learners, pretrained, 7).linear_classifier.weight.shape[0]
    expect(rows == 7, f"the head has {rows} rows for 7 classes: its size must come from num_classes")


@exercise("size of the probe")
def probe_size(learners: Callable) -> None:
    """Of ``probe_size(width, classes)``: how many numbers a linear probe on the CLS token trains."""
    for width, classes in ((96, 10), (256, 3), *torch.randint(20, 900, (2, 2)).tolist()):
        given = answer(learners, width, classes)
        expect(isinstance(given, int), f"a whole number is wanted, but a {type(given).__name__} came back")
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
    """Of ``linear_probe(model)``: set the model up so that training changes the head alone."""
    model = _tiny_vit(num_classes=3)
    call(learners, model)
    encoder = {name: parameter.requires_grad for name, parameter in model.vit_encoder.named_parameters()}
    trained = [name for name, trains in encoder.items() if trains]
    head = [parameter.requires_grad for parameter in model.linear_classifier.parameters()]
    if len(trained) == len(encoder) and all(head):
        expect(model.vit_encoder.training, "eval() switches dropout off, but training still changes the encoder")
        raise NotAttempted
    expect(any(head) or not trained, "the head is frozen and the encoder trained; a probe does it the other way round")
    expect(any(head), "the head is frozen as well, so nothing would be trained")
    expect(all(head), "a part of the head is frozen; its weight and its bias are both to be trained")
    expect(
        not trained, f"{len(trained)} of the encoder's {len(encoder)} tensors are still trained, such as {trained[:1]}"
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.arange(6) % 3).backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    expect(
        moved == {"linear_classifier.weight", "linear_classifier.bias"}, f"after a step {sorted(moved)} have changed"
    )


# One list of runs per arm, ours and the control's. Each pair tells apart rules that agree on the others.
_RUNS = [
    ([0.6, 0.7, 0.65], [0.3, 0.2, 0.25]),  # far apart
    ([0.3, 0.5, 0.4], [0.2, 0.45, 0.35]),  # every pair is won, and still the runs overlap
    ([0.5, 0.3, 0.4], [0.2, 0.45, 0.35]),  # the same runs in another order
    ([0.1, 0.15, 0.9], [0.5, 0.6, 0.55]),  # one lucky run
    ([0.5, 0.5, 0.5], [0.6, 0.2, 0.2]),  # the best run is the control's
    ([0.1, 0.7, 0.8], [0.2, 0.3, 0.3]),  # the worst run is ours
    ([0.2, 0.1, 0.15], [0.3, 0.4, 0.35]),  # worse in every run
    ([0.4, 0.5, 0.6], [0.3, 0.4, 0.2]),  # the closest two are level
]
_RULES: dict[str, Callable] = {
    "each run is compared with the control's run of the same place in the list alone; compare it with all of them": (
        lambda ours, control: all(a > b for a, b in zip(ours, control, strict=True))
    ),
    "only the best runs are compared; the worst of ours must beat the best of the control": (
        lambda ours, control: max(ours) > max(control)
    ),
    "only the worst runs are compared; the worst of ours must beat the best of the control": (
        lambda ours, control: min(ours) > min(control)
    ),
    "the means are compared; a higher mean does not say that every run is higher": (
        lambda ours, control: sum(ours) > sum(control)
    ),
    "one winning run is enough for you; every run of ours must beat every run of the control": (
        lambda ours, control: max(ours) > min(control)
    ),
    "a run that is level with the control's best does not beat it; use > and not >=": (
        lambda ours, control: min(ours) >= max(control)
    ),
    "the order is swapped: you ask whether the control beats ours": lambda ours, control: max(ours) < min(control),
}


@exercise("fair comparison")
def fair_comparison(learners: Callable) -> None:
    """Of ``compare_arms(ours, control)``: the gain in mean accuracy, and whether every run beats every run of the
    control. Both are lists of accuracies, one per seed."""
    scale, shift = torch.rand(2).tolist()
    runs = [
        [[(0.5 + 0.1 * scale) * share + 0.3 * shift for share in arm] for arm in (ours, control)]
        for ours, control in _RUNS
    ]
    results = [answer(learners, list(ours), list(control)) for ours, control in runs]
    for result in results:
        expect(isinstance(result, tuple | list) and len(result) == 2, "two values are wanted: return gain, beaten")
        if all(value is Ellipsis for value in result):
            raise NotAttempted
        expect(result[1] in (True, False), "the second value says whether every run is beaten: True or False")
    _judge_gains([as_number(gain) for gain, _ in results], runs)
    verdicts = [bool(beaten) for _, beaten in results]
    if verdicts == [min(ours) > max(control) for ours, control in runs]:
        return
    for mistake, rule in _RULES.items():
        expect(verdicts != [rule(ours, control) for ours, control in runs], mistake)
    raise Mistake("the second value is not whether each run of ours is higher than each run of the control")


def _judge_gains(gains: Sequence[float], runs: Sequence) -> None:
    pairs = [(torch.tensor(ours).double(), torch.tensor(control).double()) for ours, control in runs]
    right = torch.stack([ours.mean() - control.mean() for ours, control in pairs])
    slips = {
        "the order is swapped: a gain is ours minus the control, positive when ours is better": -right,
        "that is in percent; give a share, so that 0.05 are five points": 100 * right,
        "that is the mean of the differences' sizes; where the control wins, the difference counts as a loss": (
            torch.stack([(ours - control).abs().mean() for ours, control in pairs])
        ),
        "a loss is a gain below 0; keep its sign": right.abs(),
        "only the best runs are compared; take the mean of each arm": (
            torch.stack([ours.max() - control.max() for ours, control in pairs])
        ),
        "that is the smallest gain, our worst run minus the control's best; take the mean of each arm": (
            torch.stack([ours.min() - control.max() for ours, control in pairs])
        ),
        "that is the sum over the seeds; divide by their number": 3 * right,
        "that is the ratio of the two means; a gain is their difference": (
            torch.stack([ours.mean() / control.mean() for ours, control in pairs])
        ),
        "that is the mean of ours; the control's has to be taken off": torch.stack([ours.mean() for ours, _ in pairs]),
    }
    otherwise = "the gain is the mean of ours minus the mean of the control, and that is not what came back"
    compare(torch.tensor(gains), right, slips, otherwise)


@exercise("normalisation")
def normalisation(learners: Callable) -> None:
    """Of ``normalisation(images, card)``: downstream images as the encoder with this card expects them."""
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    card = ModelCard(("a", "b"), mean=(0.52, 0.4, 0.31), std=(0.2, 0.25, 0.3))
    result = tensor_answer(learners, images, card, shape=(4, 3, 8, 8))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (card.mean, card.std))
    shares = images.float() / 255
    own = torch.stack([normalise(image[None], *channel_statistics(image[None]))[0] for image in images])
    slips = {
        "those are the statistics of the images themselves; the encoder has only seen images normalised with its "
        "card's": normalise(images, *channel_statistics(images)),
        "each image is normalised with its own statistics, so its brightness is lost; use the card's": own,
        "the images are still in 0 to 255, but mean and std are in 0 to 1; divide by 255 first": (images - mean) / std,
        "that only divides by 255; subtract the mean, divide by the std": shares,
        "the mean is subtracted, but nothing is divided by the std": shares - mean,
        "divided by the std, but the mean is not subtracted": shares / std,
        "mean and std have changed places": (shares - std) / mean,
        "divided first and subtracted then; it is (x / 255 - mean) / std": shares / std - mean,
        "a byte goes from 0 to 255, so divide by 255 and not by 256": (images / 256 - mean) / std,
    }
    right = (shares - mean) / std
    compare(result, right, slips, "these are not (x / 255 - mean) / std with the card's numbers, channel by channel")


def _tiny_vit(num_classes: int) -> ViTModel:
    model = ViTModel(num_classes, num_layers=1, image_size=8, patch_size=4, em_dim=16, num_heads=2, ff_dim=16, drop=0.0)
    with torch.no_grad():  # no tensor keeps its usual starting value, so that a fresh one can be told apart
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
