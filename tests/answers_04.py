"""Right and typically wrong answers to the exercises of chapter 04."""

import copy
import statistics

import numpy as np
import torch
from torch import nn

from vitlib.data.augment import normalise
from vitlib.data.images import channel_statistics
from vitlib.model import ViTModel
from vitlib.weights.checkpoint import transfer_encoder


def repaired(pretrained, num_classes):
    model = ViTModel(**{**pretrained.config, "num_classes": num_classes})
    model.vit_encoder.load_state_dict(pretrained.vit_encoder.state_dict())
    return model


def repaired_and(change):
    """A right transfer, but for what ``change(model, pretrained)`` does afterwards."""

    def transfer(pretrained, num_classes):
        model = repaired(pretrained, num_classes)
        change(model, pretrained)
        return model

    return transfer


def share_encoder(model, pretrained):
    model.vit_encoder = pretrained.vit_encoder


@torch.no_grad()
def keep_rows(model, pretrained):
    new, old = model.linear_classifier.weight, pretrained.linear_classifier.weight
    new[: len(old)] = old[: len(new)]


def fresh_encoder(pretrained, num_classes):
    return ViTModel(**{**pretrained.config, "num_classes": num_classes})


def new_head_in_place(pretrained, num_classes):
    pretrained.linear_classifier = nn.Linear(16, num_classes)
    return pretrained


def embedding_only(pretrained, num_classes):
    model = fresh_encoder(pretrained, num_classes)
    model.vit_encoder.embedding.load_state_dict(pretrained.vit_encoder.embedding.state_dict())
    return model


def in_the_config(pretrained, num_classes):
    pretrained.config["num_classes"] = num_classes
    return repaired(pretrained, num_classes)


def rebuilt(pretrained, num_classes):
    model = copy.deepcopy(pretrained)
    model.linear_classifier = nn.Linear(model.config["em_dim"], num_classes)
    return model


def frozen_copy(model):
    model = copy.deepcopy(model)
    model.vit_encoder.requires_grad_(False)
    return model


def spoilt_and_frozen(model):
    for parameter in model.vit_encoder.parameters():
        nn.init.zeros_(parameter)
    model.vit_encoder.requires_grad_(False)


def weight_of_the_head(model):
    model.requires_grad_(False)
    model.linear_classifier.weight.requires_grad_(True)


def mean_gain(ours, control):
    return sum(ours) / len(ours) - sum(control) / len(control)


def as_tensors(ours, control):
    ours, control = torch.tensor(ours), torch.tensor(control)
    return ours.mean() - control.mean(), (ours[:, None] > control).all()


def rule(judge):
    """A right gain with another second value."""
    return lambda ours, control: (mean_gain(ours, control), judge(ours, control))


def gain(measure):
    """A right second value with another gain."""
    return lambda ours, control: (measure(ours, control), min(ours) > max(control))


def by_hand_of(divisor, order=lambda x, mean, std: (x - mean) / std):
    def answer(images, card):
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (card.mean, card.std))
        return order(images / divisor, mean, std)

    return answer


by_hand = by_hand_of(255)


def image_by_image(images, card):
    return torch.cat([normalise(image, *channel_statistics(image)) for image in images.split(1)])


RIGHT = {
    "transfer": {"repaired": repaired, "vitlib's": transfer_encoder},
    "probe_size": {"weights and biases": lambda width, classes: width * classes + classes},
    "linear_probe": {
        "the module's method": lambda model: model.vit_encoder.requires_grad_(False),
        "all, then the head": lambda model: model.requires_grad_(False).linear_classifier.requires_grad_(True),
    },
    "fair_comparison": {
        "lowest and highest": gain(mean_gain),
        "tensors": as_tensors,
        "rounded": gain(lambda ours, control: round(mean_gain(ours, control), 3)),
        "an array": lambda ours, control: np.array([mean_gain(ours, control), min(ours) > max(control)]),
        "a list": lambda ours, control: [mean_gain(ours, control), min(ours) > max(control)],
    },
    "normalisation": {
        "by hand": by_hand,
        "vitlib's": lambda images, card: normalise(images, card.mean, card.std),
    },
}

WRONG = {
    "transfer": {
        "old head": (lambda old, _: repaired(old, old.config["num_classes"]), "100 rows for 10 classes"),
        "nothing loaded": (fresh_encoder, "the encoder is a fresh one"),
        "half loaded": (embedding_only, "only some of the encoder's tensors"),
        "encoder shared": (repaired_and(share_encoder), "shares tensors"),
        "on a copy": (rebuilt, "model.config still says"),
        "in place": (new_head_in_place, "your function changes the model that it is given"),
        "its config": (in_the_config, "your function changes `pretrained.config`"),
        "old rows": (repaired_and(keep_rows), "rows of the old head are in the new one"),
        "frozen": (repaired_and(lambda model, _: model.vit_encoder.requires_grad_(False)), "new model are frozen"),
        "fixed size": (lambda pretrained, _: repaired(pretrained, 10), "must come from num_classes"),
    },
    "probe_size": {
        "no bias": (lambda width, classes: width * classes, "biases are missing"),
        "biases alone": (lambda width, classes: classes, "these are the biases alone"),
        "added": (lambda width, classes: width + classes, "width and classes are multiplied"),
        "bias of the width": (lambda width, classes: width * classes + width, "a bias for each class, not for each"),
        "one bias": (lambda width, classes: width * classes + 1, "a bias of its own"),
        "old head": (lambda width, classes: 100 * width + 100, "the 100 upstream classes"),
        "all tokens": (lambda width, classes: 65 * width * classes + classes, "not all 65 tokens"),
        "fixed": (lambda width, classes: 970, "count one weight for each number"),
    },
    "linear_probe": {
        "all frozen": (lambda model: model.requires_grad_(False), "the head is frozen as well"),
        "embedding": (lambda model: model.vit_encoder.embedding.requires_grad_(False), "are still trained"),
        "wrong part": (lambda model: model.linear_classifier.requires_grad_(False), "the other way round"),
        "no bias": (weight_of_the_head, "its weight and its bias"),
        "an attribute": (lambda model: setattr(model.vit_encoder, "requires_grad", False), "an attribute of that name"),
        "an optimiser": (lambda model: torch.optim.SGD(model.linear_classifier.parameters()), "model is not set up"),
        "a copy": (frozen_copy, "the model that came back is another one"),
        "spoilt": (spoilt_and_frozen, "your function changes the model's weights"),
        "to inference": (lambda model: model.vit_encoder.zero_grad(), "nothing is frozen"),
        "eval": (lambda model: model.vit_encoder.eval(), "eval() switches dropout off"),
    },
    "fair_comparison": {
        "pairs": (rule(lambda a, b: all(x > y for x, y in zip(a, b, strict=True))), "of the same place in the list"),
        "best": (rule(lambda a, b: max(a) > max(b)), "only the best runs are compared; our worst"),
        "worst": (rule(lambda a, b: min(a) > min(b)), "only the worst runs are compared"),
        "means": (rule(lambda a, b: sum(a) > sum(b)), "the means are compared"),
        "any": (rule(lambda a, b: max(a) > min(b)), "one winning run is enough for you"),
        "ties": (rule(lambda a, b: min(a) >= max(b)), "use > and not >="),
        "control first": (rule(lambda a, b: min(b) > max(a)), "whether the control beats ours"),
        "always": (rule(lambda a, b: True), "not whether each run of ours is higher"),
        "in words": (rule(lambda a, b: "yes"), "True or False"),
        "order swapped": (gain(lambda a, b: mean_gain(b, a)), "a gain is ours minus the control"),
        "percent": (gain(lambda a, b: 100 * mean_gain(a, b)), "that is in percent"),
        "without sign": (gain(lambda a, b: abs(mean_gain(a, b))), "keep its sign"),
        "gain of the best": (gain(lambda a, b: max(a) - max(b)), "take the mean of each arm"),
        "smallest gain": (gain(lambda a, b: min(a) - max(b)), "our worst run minus the control's best"),
        "sum": (gain(lambda a, b: sum(a) - sum(b)), "sum over the seeds"),
        "no number": (gain(lambda a, b: [x - y for x, y in zip(a, b, strict=True)]), "a list came back"),
        "the gain alone": (mean_gain, "two values are wanted"),
        "another mean": (gain(lambda a, b: statistics.median(a) - statistics.median(b)), "is not what came back"),
    },
    "normalisation": {
        "batch": (lambda x, card: normalise(x, *channel_statistics(x)), "statistics of the images themselves"),
        "each image": (image_by_image, "each image is normalised with its own"),
        "bytes": (by_hand_of(1), "divide by 255 first"),
        "changed places": (by_hand_of(255, lambda x, mean, std: (x - std) / mean), "changed places"),
        "own mean": (lambda x, card: normalise(x, channel_statistics(x)[0], card.std), "the mean is that of these"),
        "own std": (lambda x, card: normalise(x, card.mean, channel_statistics(x)[1]), "the std is that of these"),
        "one channel's": (lambda x, card: (x / 255 - card.mean[0]) / card.std[0], "channel by channel"),
    },
}
