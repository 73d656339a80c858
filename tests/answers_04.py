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


def another_width(pretrained, num_classes):
    return ViTModel(**{**pretrained.config, "num_classes": num_classes, "em_dim": 32})


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
        "100 rows for 10 classes": lambda old, _: repaired(old, old.config["num_classes"]),
        "the encoder is a fresh one": fresh_encoder,
        "in more than its head": another_width,
        "only some of the encoder's tensors": embedding_only,
        "encoder's state_dict into it": lambda pretrained, num_classes: repaired(pretrained, num_classes).double(),
        "shares tensors": repaired_and(share_encoder),
        "model.config still says": rebuilt,
        "your function changes the model that it is given": new_head_in_place,
        "your function changes `pretrained.config`": in_the_config,
        "rows of the old head are in the new one": repaired_and(keep_rows),
        "new model are frozen": repaired_and(lambda model, _: model.vit_encoder.requires_grad_(False)),
        "must come from num_classes": lambda pretrained, _: repaired(pretrained, 10),
    },
    "probe_size": {
        "biases are missing": lambda width, classes: width * classes,
        "these are the biases alone": lambda width, classes: classes,
        "width and classes are multiplied": lambda width, classes: width + classes,
        "a bias for each class, not for each": lambda width, classes: width * classes + width,
        "a bias of its own": lambda width, classes: width * classes + 1,
        "the 100 upstream classes": lambda width, classes: 100 * width + 100,
        "not all 65 tokens": lambda width, classes: 65 * width * classes + classes,
        "count one weight for each number": lambda width, classes: 970,
    },
    "linear_probe": {
        "the head is frozen as well": lambda model: model.requires_grad_(False),
        "are still trained": lambda model: model.vit_encoder.embedding.requires_grad_(False),
        "the other way round": lambda model: model.linear_classifier.requires_grad_(False),
        "its weight and its bias": weight_of_the_head,
        "an attribute of that name": lambda model: setattr(model.vit_encoder, "requires_grad", False),
        "model is not set up": lambda model: torch.optim.SGD(model.linear_classifier.parameters()),
        "the model that came back is another one": frozen_copy,
        "your function changes the model's weights": spoilt_and_frozen,
        "nothing is frozen": lambda model: model.vit_encoder.zero_grad(),
        "eval() switches dropout off": lambda model: model.vit_encoder.eval(),
    },
    "fair_comparison": {
        "of the same place in the list": rule(lambda a, b: all(x > y for x, y in zip(a, b, strict=True))),
        "only the best runs are compared; our worst": rule(lambda a, b: max(a) > max(b)),
        "only the worst runs are compared": rule(lambda a, b: min(a) > min(b)),
        "the means are compared": rule(lambda a, b: sum(a) > sum(b)),
        "one winning run is enough for you": rule(lambda a, b: max(a) > min(b)),
        "use > and not >=": rule(lambda a, b: min(a) >= max(b)),
        "whether the control beats ours": rule(lambda a, b: min(b) > max(a)),
        "not whether each run of ours is higher": rule(lambda a, b: True),
        "True or False": rule(lambda a, b: "yes"),
        "a gain is ours minus the control": gain(lambda a, b: mean_gain(b, a)),
        "that is in percent": gain(lambda a, b: 100 * mean_gain(a, b)),
        "keep its sign": gain(lambda a, b: abs(mean_gain(a, b))),
        "take the mean of each arm": gain(lambda a, b: max(a) - max(b)),
        "our worst run minus the control's best": gain(lambda a, b: min(a) - max(b)),
        "sum over the seeds": gain(lambda a, b: sum(a) - sum(b)),
        "a list came back": gain(lambda a, b: [x - y for x, y in zip(a, b, strict=True)]),
        "two values are wanted": mean_gain,
        "is not what came back": gain(lambda a, b: statistics.median(a) - statistics.median(b)),
    },
    "normalisation": {
        "statistics of the images themselves": lambda x, card: normalise(x, *channel_statistics(x)),
        "each image is normalised with its own": image_by_image,
        "divide by 255 first": by_hand_of(1),
        "changed places": by_hand_of(255, lambda x, mean, std: (x - std) / mean),
        "the mean is that of these": lambda x, card: normalise(x, channel_statistics(x)[0], card.std),
        "the std is that of these": lambda x, card: normalise(x, card.mean, channel_statistics(x)[1]),
        "channel by channel": lambda x, card: (x / 255 - card.mean[0]) / card.std[0],
    },
}
