"""Convert weights from and to the ViTs of torchvision, timm, Hugging Face and Google.

They compute the same function of the same numbers, except that Google's own code approximates GELU by a tanh, which
moves logits by about 0.001. They differ in names, in whether queries, keys and values share a matrix, and in the order
of axes. So a conversion is a table of names, read in either direction.

``from_...`` converts a module and raises ValueError for entries that do not fit, or if the two models differ in their
outputs for two random images. ``to_...`` builds a module and raises ValueError for an option of :class:`ViTModel` that
the library lacks.

Converted models are float32, in eval mode, on the CPU and independent copies. A :class:`ViTModel` comes back with
``drop=0`` and ``drop_path=0``: fine-tuning recipes set their own. A model that goes out always has a bias in its patch
embedding; for ``patch_bias=False`` it is zero, which is the same function.
"""

import copy
import importlib
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitlib.model import ViTModel
from vitlib.utils import atomic_write, import_torchvision
from vitlib.weights.checkpoint import unwrap

CLS, POSITIONS = "vit_encoder.embedding.cls_token", "vit_encoder.embedding.position_embedding"
PATCH, BLOCK, HEAD = "vit_encoder.embedding.patch_embedding.", "vit_encoder.encoder.{}.", "linear_classifier."
NORM, PRE_LOGITS = "vit_encoder.layernorm.", "pre_logits.0."
_VIT = "vit.embeddings."

# Their names for: CLS token, positions, patch embedding | the start of a block's names, and in it: norm1, qkv or its
# thirds, output, norm2, mlp.0, mlp.3 | final norm, pre-logits, classifier. A name that ends in a separator stands for
# a weight and a bias.
LAYOUTS = {
    "torchvision": (
        ["class_token", "encoder.pos_embedding", "conv_proj."],
        "encoder.layers.encoder_layer_{}.",
        ["ln_1.", "self_attention.in_proj_", "self_attention.out_proj.", "ln_2.", "mlp.0.", "mlp.3."],
        ["encoder.ln.", "heads.pre_logits.", "heads.head."],
    ),
    "timm": (  # and facebookresearch's DeiT, DINO and DINOv2
        ["cls_token", "pos_embed", "patch_embed.proj."],
        "blocks.{}.",
        ["norm1.", "attn.qkv.", "attn.proj.", "norm2.", "mlp.fc1.", "mlp.fc2."],
        ["norm.", None, "head."],
    ),
    "huggingface": (
        [_VIT + "cls_token", _VIT + "position_embeddings", _VIT + "patch_embeddings.projection."],
        "vit.layers.{}.",
        ["layernorm_before.", "attention.q_proj.", "attention.k_proj.", "attention.v_proj.", "attention.o_proj.",
         "layernorm_after.", "mlp.fc1.", "mlp.fc2."],
        ["vit.layernorm.", "pooler.dense.", "classifier."],
    ),
    "npz": (  # github.com/google-research/vision_transformer, flax
        ["cls", "Transformer/posembed_input/pos_embedding", "embedding/"],
        "Transformer/encoderblock_{}/",
        ["LayerNorm_0/", *(f"MultiHeadDotProductAttention_1/{part}/" for part in ("query", "key", "value", "out")),
         "LayerNorm_2/", "MlpBlock_3/Dense_0/", "MlpBlock_3/Dense_1/"],
        ["Transformer/encoder_norm/", "pre_logits/", "head/"],
    ),
}  # fmt: skip
_TODAY = {  # today's names by older ones: of torchvision's published files; of transformers 4 and the files on its hub
    ".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3.", "encoder.layer.": "layers.",
    "attention.attention.query.": "attention.q_proj.", "attention.attention.key.": "attention.k_proj.",
    "attention.attention.value.": "attention.v_proj.", "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.", "output.dense.": "mlp.fc2.",
}  # fmt: skip


def names(layout: str, num_layers: int = 12, *, head: bool = True, pre_logits: bool = False) -> list[tuple[str, str]]:
    """Return the names of another library for the entries of our state dict.

    Args:
        layout: one of ``LAYOUTS``.
        num_layers: encoder blocks.
        head: whether the model has a classifier. Without one Hugging Face's class is another, ``ViTModel``, whose
            names have no ``vit.`` in front.
        pre_logits: whether the model has the hidden layer before the classifier.

    Returns:
        Pairs ``(theirs, ours)``. Where three of theirs go with the same one of ours, they are its queries, keys and
        values: its thirds along the first axis.

    Raises:
        ValueError: for an unknown layout.

    >>> names("torchvision", num_layers=1)[0]
    ('class_token', 'vit_encoder.embedding.cls_token')
    """
    front, block, parts, (norm, hidden, classifier) = _layout(layout)
    thirds = len(parts) - 5  # 1 for queries, keys and values in one matrix
    ours = ("norm1.", *thirds * ("attention.qkv.",), "attention.output.", "norm2.", "mlp.0.", "mlp.3.")
    rows = [*zip(front, (CLS, POSITIONS, PATCH), strict=True)]
    for number in range(num_layers):
        start, our_start = block.format(number), BLOCK.format(number)
        rows += [(start + theirs, our_start + name) for theirs, name in zip(parts, ours, strict=True)]
    rows += [(norm, NORM), *([(hidden, PRE_LOGITS)] if pre_logits else []), *([(classifier, HEAD)] if head else [])]
    return [pair for theirs, name in rows for pair in _leaves(theirs if head else theirs.removeprefix("vit."), name)]


def _layout(name: str) -> tuple:
    if name not in LAYOUTS:
        raise ValueError(f"layout={name!r} is not known; choose one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def layout_of(state: Mapping[str, Tensor]) -> str | None:
    """Return the layout, one of ``LAYOUTS``, whose encoder these names contain, or None."""
    found = {_plain(name) for name in state}
    for layout in LAYOUTS:
        if found.issuperset(theirs for theirs, _ in names(layout, 1, head=False)):
            return layout
    return None


def _leaves(theirs: str, ours: str) -> list[tuple[str, str]]:
    if not ours.endswith("."):
        return [(theirs, ours)]
    weight = "weight" if not theirs.endswith("/") else "scale" if "norm" in ours else "kernel"  # flax's words
    return [(theirs + weight, ours + "weight"), (theirs + "bias", ours + "bias")]


def _has_pre_logits(layout: str, head: bool) -> bool:
    """Return whether the layout has pre-logits: timm has none; Hugging Face has them only without a classifier."""
    return layout in ("torchvision", "npz") or (layout == "huggingface" and not head)


def from_state_dict(
    state: Mapping[str, Tensor], layout: str, *, num_heads: int, norm_eps: float = 1e-6, pooling: str = "cls"
) -> ViTModel:
    """Build a model from another library's state dict; its sizes follow from the shapes of the entries.

    What wrappers put before the names, such as ``module.`` or ``backbone.``, is stripped. LayerScale is multiplied into
    the layers before it.

    Args:
        state: entries by the other library's names; without a classifier the model gets ``num_classes=0``.
        layout: one of ``LAYOUTS``.
        num_heads, norm_eps, pooling: of :class:`ViTModel`; no shape tells them.

    Raises:
        ValueError: listing the entries that are missing or unknown, or naming the first that does not fit.
    """
    _, _, (norm1, *_), (_, hidden, classifier) = _layout(layout)
    given, state = state, {_plain(name): value for name, value in state.items()}
    if len(state) < len(given):
        raise ValueError("This state dict holds several models, behind different prefixes; give the entries of one.")
    if layout == "timm":
        state = _without_layer_scale(state)
    head = any(name.startswith(classifier) for name in state)
    pre_logits = _has_pre_logits(layout, head) and any(name.startswith(hidden) for name in state)
    num_layers = max(1, sum(name.endswith(norm1 + "bias") for name in state))
    pairs = names(layout, num_layers, head=head, pre_logits=pre_logits)
    pairs = [(_plain(theirs), ours) for theirs, ours in pairs]
    known = {theirs for theirs, _ in pairs}
    for kind, wrong in (("missing", known - state.keys()), ("unknown", state.keys() - known)):
        if wrong:
            others = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                f"This is not the state dict of a plain ViT in the layout {layout} ({kind}: "
                f"{', '.join(sorted(wrong)[:5])}{others}); give the whole state dict, with nothing added."
            )
    try:
        parts = {}
        for theirs, name in pairs:
            parts.setdefault(name, []).append(_from_flax(theirs, state[theirs]) if layout == "npz" else state[theirs])
        ours = {name: _copy(torch.cat(thirds)) for name, thirds in parts.items()}
        em_dim, channels, patch_size, _ = ours[PATCH + "weight"].shape
        with torch.device("meta"):  # spares time and memory for random weights that are replaced at once
            model = ViTModel(
                num_classes=len(ours[HEAD + "bias"]) if head else 0, num_layers=num_layers,
                image_size=patch_size * math.isqrt(ours[POSITIONS].shape[1] - 1), patch_size=patch_size,
                num_channels=channels, em_dim=em_dim, drop=0.0, num_heads=num_heads,
                ff_dim=len(ours[BLOCK.format(0) + "mlp.0.bias"]), patch_bias=True, pooling=pooling, norm_eps=norm_eps,
                pre_logits=len(ours[PRE_LOGITS + "bias"]) if pre_logits else None,
            )  # fmt: skip
        model.load_state_dict(ours, assign=True)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ViTModel: ").rstrip(".")
        raise ValueError(f"The entries of this state dict do not fit together: {reason:.200}.") from error
    return model.eval()


def _plain(name: str) -> str:
    """Return a name as it is written today, without the prefixes of wrappers and of models around the encoder."""
    name = re.sub(r"^((module|_orig_mod|model|net|backbone|vit)\.)+", "", name)
    for before, today in _TODAY.items():
        name = name.replace(before, today)
    return name


def _without_layer_scale(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply LayerScale into the layer before it: ``g * (W x + b)`` is ``(g W) x + g b``.

    The mask token of DINOv2, which replaces patches in its pretraining, goes too.
    """
    scales = {name: state[name] for name in state if re.search(r"\.ls[12]\.gamma$", name)}
    plain = {name: value for name, value in state.items() if name not in scales and name != "mask_token"}
    for name, scale in scales.items():
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        for part in {f"{layer}.weight", f"{layer}.bias"} & plain.keys():
            plain[part] = plain[part] * (scale[:, None] if part.endswith("weight") else scale)
    return plain


def to_state_dict(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """Return the weights of a :class:`ViTModel`, wrapped or not, under another library's names.

    Raises:
        ValueError: for a layout that is not in ``LAYOUTS``, and naming the options of the model that the layout lacks.
    """
    model = unwrap(model)
    config = model.config
    head, pre_logits = config["num_classes"] > 0, config["pre_logits"] is not None
    lacking = {
        "norm_first=False": not config["norm_first"],
        "pooling='mean'": config["pooling"] == "mean" and layout != "timm",
        f"pre_logits={config['pre_logits']}": pre_logits and not _has_pre_logits(layout, head),
        # such a file holds weights only, and Google's code has one eps
        f"norm_eps={_norm_eps(model)}": layout == "npz" and _norm_eps(model) != 1e-6,
    }
    if any(lacking.values()):
        raise ValueError(
            f"The layout {layout} has no {', '.join(part for part, lacks in lacking.items() if lacks)}; keep such a "
            "model with vitlib.weights.save_checkpoint."
        )
    state, theirs_of, renamed = model.state_dict(), {}, {}
    state.setdefault(PATCH + "bias", state[PATCH + "weight"].new_zeros(config["em_dim"]))
    for theirs, ours in names(layout, config["num_layers"], head=head, pre_logits=pre_logits):
        theirs_of.setdefault(ours, []).append(theirs)
    for ours, thirds in theirs_of.items():
        for theirs, part in zip(thirds, state[ours].chunk(len(thirds)), strict=True):
            renamed[theirs] = _copy(_to_flax(theirs, part, config["num_heads"]) if layout == "npz" else part)
    return renamed


def _to_flax(theirs: str, tensor: Tensor, num_heads: int) -> Tensor:
    """Move a layer's outputs from the first axis, as in PyTorch, to the last, and give heads an axis of their own."""
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)  # [D, C, P, P] to [P, P, C, D]
    if tensor.ndim == 2:
        tensor = tensor.T
    if re.search("/(query|key|value)/", theirs):
        return tensor.unflatten(-1, (num_heads, -1))  # [D, H, K], a bias [H, K]
    return tensor.unflatten(0, (num_heads, -1)) if theirs.endswith("/out/kernel") else tensor  # [H, K, D]


def _from_flax(theirs: str, tensor: Tensor) -> Tensor:
    """Invert :func:`_to_flax`."""
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    if re.search("/(query|key|value)/", theirs):
        tensor = tensor.flatten(-2)
    elif theirs.endswith("/out/kernel"):
        tensor = tensor.flatten(0, 1)
    return tensor.T if tensor.ndim == 2 else tensor


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def _norm_eps(module: nn.Module) -> float:
    return next((part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)), 1e-6)


# ---- modules of the libraries


def _library(module: str) -> ModuleType:
    import_torchvision()  # timm and transformers import it too, and may need the same help
    return importlib.import_module(module)


def _convert(
    module: nn.Module, layout: str, num_heads: int, pooling: str = "cls", output: Callable = lambda given: given
) -> ViTModel:
    """Convert a module, and compare its ``output`` with the model's.

    No list of options that :class:`ViTModel` lacks would do: libraries add options with every release.
    """
    state, eps = module.state_dict(), _norm_eps(module)
    model = from_state_dict(state, layout, num_heads=num_heads, norm_eps=eps, pooling=pooling)
    config, generator = model.config, torch.Generator().manual_seed(0)
    images = torch.randn(2, *model.vit_encoder.embedding.image_shape, generator=generator)
    # both with one random head: behind a head of zeros, as torchvision starts with, all models are the same
    head = torch.randn(config["num_classes"], config["pre_logits"] or config["em_dim"], generator=generator)

    def outputs(model: nn.Module, classifier: str):
        weights = {classifier + "weight": head} if len(head) else {}
        return functional_call(model, weights, (images,), tie_weights=False)

    with torch.inference_mode():
        ours = outputs(model, HEAD)
        peer = copy.deepcopy(module).to("cpu", torch.float32).eval()
        theirs = output(outputs(peer, LAYOUTS[layout][-1][-1]))
    difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else math.inf
    if not difference <= 1e-4 * max(1.0, ours.abs().max().item()):
        raise ValueError(
            f"With the same weights {type(module).__name__} and ViTModel give outputs that differ by {difference:.2g}; "
            "it has a part that ViTModel lacks, such as another activation, pooling or norm. Give a plain ViT."
        )
    return model


def _check_class(module: nn.Module, *classes: type) -> None:
    if not isinstance(module, classes):
        expected = " or ".join(f"{kind.__name__} of {kind.__module__.partition('.')[0]}" for kind in classes)
        raise ValueError(f"{type(module).__name__} cannot be converted; give the class {expected}.")


def from_torchvision(module: nn.Module) -> ViTModel:
    """Convert torchvision's ``VisionTransformer`` (``vit_b_16`` and its family)."""
    _check_class(module, _library("torchvision.models.vision_transformer").VisionTransformer)
    return _convert(module, "torchvision", module.encoder.layers[0].num_heads)


def to_torchvision(model: nn.Module) -> nn.Module:
    """Convert to torchvision's ``VisionTransformer``, which lacks ``norm_first=False`` and ``pooling="mean"``.

    Its constructor always makes a classifier and three channels; for other models these parts are replaced.
    """
    peer, model = _library("torchvision.models.vision_transformer"), unwrap(model)
    config, state = model.config, to_state_dict(model, "torchvision")
    with torch.device("meta"):
        module = peer.VisionTransformer(
            config["image_size"], config["patch_size"], config["num_layers"], config["num_heads"], config["em_dim"],
            config["ff_dim"], num_classes=config["num_classes"] or 1, representation_size=config["pre_logits"],
            norm_layer=partial(nn.LayerNorm, eps=_norm_eps(model)),
        )  # fmt: skip
        if not config["num_classes"]:
            module.heads.head = nn.Identity()
        if config["num_channels"] != 3:
            patch_size = config["patch_size"]
            module.conv_proj = nn.Conv2d(config["num_channels"], config["em_dim"], patch_size, patch_size)
    module.load_state_dict(state, assign=True)
    return module.eval()


def from_timm(module: nn.Module) -> ViTModel:
    """Convert timm's ``VisionTransformer`` (``vit_*_patch*``, ``deit_*_patch*``, DINO and DINOv2 without registers)."""
    _check_class(module, _library("timm.models.vision_transformer").VisionTransformer)
    return _convert(module, "timm", module.blocks[0].attn.num_heads, "mean" if module.global_pool == "avg" else "cls")


def to_timm(model: nn.Module) -> nn.Module:
    """Convert to timm's ``VisionTransformer``, which lacks ``norm_first=False`` and ``pre_logits``."""
    peer, model = _library("timm.models.vision_transformer"), unwrap(model)
    config, state = model.config, to_state_dict(model, "timm")
    with torch.device("meta"):
        module = peer.VisionTransformer(
            img_size=config["image_size"], patch_size=config["patch_size"], in_chans=config["num_channels"],
            num_classes=config["num_classes"], global_pool="token" if config["pooling"] == "cls" else "avg",
            fc_norm=False, embed_dim=config["em_dim"], depth=config["num_layers"], num_heads=config["num_heads"],
            mlp_ratio=(config["ff_dim"] + 0.5) / config["em_dim"],  # timm rounds the product down
            norm_layer=partial(nn.LayerNorm, eps=_norm_eps(model)),
        )  # fmt: skip
    module.load_state_dict(state, assign=True)
    return module.eval()


def from_huggingface(module: nn.Module) -> ViTModel:
    """Convert Hugging Face's ``ViTForImageClassification`` or ``ViTModel``, of transformers 4 or 5.

    A ``ViTModel`` has no classifier and becomes ``num_classes=0``; its pooler, a dense layer with tanh, becomes
    ``pre_logits``. Our model then returns their ``pooler_output``, or ``last_hidden_state[:, 0]`` without pooler.
    """
    peer = _library("transformers")
    _check_class(module, peer.ViTForImageClassification, peer.ViTModel)

    def output(given) -> Tensor:
        if "logits" in given:
            return given.logits
        return given.last_hidden_state[:, 0] if given.pooler_output is None else given.pooler_output

    return _convert(module, "huggingface", module.config.num_attention_heads, output=output)


def to_huggingface(model: nn.Module) -> nn.Module:
    """Convert to Hugging Face's ``ViTForImageClassification``, or their ``ViTModel`` for ``num_classes=0``.

    They lack ``norm_first=False``, ``pooling="mean"``, and ``pre_logits`` before a classifier.
    """
    peer, model = _library("transformers"), unwrap(model)
    config = model.config
    theirs = peer.ViTConfig(
        hidden_size=config["em_dim"], num_hidden_layers=config["num_layers"], num_attention_heads=config["num_heads"],
        intermediate_size=config["ff_dim"], layer_norm_eps=_norm_eps(model), image_size=config["image_size"],
        patch_size=config["patch_size"], num_channels=config["num_channels"], num_labels=config["num_classes"],
        pooler_output_size=config["pre_logits"],
    )  # fmt: skip
    with torch.device("meta"):
        if config["num_classes"]:
            module = peer.ViTForImageClassification(theirs)
        else:
            module = peer.ViTModel(theirs, add_pooling_layer=config["pre_logits"] is not None)
    state = {_plain(name): value for name, value in to_state_dict(model, "huggingface").items()}
    module.load_state_dict({name: state[_plain(name)] for name in module.state_dict()}, assign=True)
    return module.eval()


def to_npz(model: nn.Module, path: str | os.PathLike) -> None:
    """Write one of Google's ``.npz`` files (github.com/google-research/vision_transformer), atomically.

    It cannot hold ``norm_first=False``, ``pooling="mean"`` or another ``norm_eps`` than 1e-6.
    """
    state = {name: tensor.numpy() for name, tensor in to_state_dict(model, "npz").items()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **state)
