"""Weights from and to the ViTs of torchvision, timm, Hugging Face and Google, for the one class :class:`ViTModel`.

They all compute the same function of the same numbers and differ in what the numbers are called, in whether queries,
keys and values share a matrix, and in the order of axes. So a conversion is a table of names, read in either direction,
and a check that nothing is left over on either side.

Whatever comes back is float32, in eval mode, on the CPU and an independent copy. Only what is on the meta device, where
tensors have a shape and no numbers, stays there. A model that comes in has ``drop=0`` and ``drop_path=0``, which makes
no difference in eval mode: fine-tuning recipes set their own. A model that goes out always has a bias in its patch
embedding, as all others do; for a model with ``patch_bias=False`` it is zero, which is the same function.
"""

import importlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import groupby
from statistics import mode
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.arguments import brief, check, check_choice, check_flag, check_path, check_whole
from vitlib.model import ViTModel
from vitlib.utils import atomic_write, import_torchvision, printable
from vitlib.weights.checkpoint import unwrap

PATCH, POSITIONS = "vit_encoder.embedding.patch_embedding.", "vit_encoder.embedding.position_embedding"
BLOCK, PRE_LOGITS, HEAD = "vit_encoder.encoder.{}.", "pre_logits.0.", "linear_classifier."

_HUGGINGFACE_FRONT = (
    ("vit.embeddings.cls_token", "vit_encoder.embedding.cls_token"),
    ("vit.embeddings.position_embeddings", POSITIONS),
    ("vit.embeddings.patch_embeddings.projection.", PATCH),
)
_HUGGINGFACE_BACK = (
    ("vit.layernorm.", "vit_encoder.layernorm."),
    ("pooler.dense.", PRE_LOGITS),
    ("classifier.", HEAD),
)

# (theirs, ours). A name that ends in a separator stands for a weight and a bias, {} for the number of a block. Three
# names for one of ours are its thirds, from top to bottom.
_TABLES = {
    "torchvision": (
        ("class_token", "vit_encoder.embedding.cls_token"),
        ("encoder.pos_embedding", POSITIONS),
        ("conv_proj.", PATCH),
        ("encoder.layers.encoder_layer_{}.ln_1.", BLOCK + "norm1."),
        ("encoder.layers.encoder_layer_{}.self_attention.in_proj_", BLOCK + "attention.qkv."),
        ("encoder.layers.encoder_layer_{}.self_attention.out_proj.", BLOCK + "attention.output."),
        ("encoder.layers.encoder_layer_{}.ln_2.", BLOCK + "norm2."),
        ("encoder.layers.encoder_layer_{}.mlp.0.", BLOCK + "mlp.0."),
        ("encoder.layers.encoder_layer_{}.mlp.3.", BLOCK + "mlp.3."),
        ("encoder.ln.", "vit_encoder.layernorm."),
        ("heads.pre_logits.", PRE_LOGITS),
        ("heads.head.", HEAD),
    ),
    "timm": (
        ("cls_token", "vit_encoder.embedding.cls_token"),
        ("pos_embed", POSITIONS),
        ("patch_embed.proj.", PATCH),
        ("blocks.{}.norm1.", BLOCK + "norm1."),
        ("blocks.{}.attn.qkv.", BLOCK + "attention.qkv."),
        ("blocks.{}.attn.proj.", BLOCK + "attention.output."),
        ("blocks.{}.norm2.", BLOCK + "norm2."),
        ("blocks.{}.mlp.fc1.", BLOCK + "mlp.0."),
        ("blocks.{}.mlp.fc2.", BLOCK + "mlp.3."),
        ("norm.", "vit_encoder.layernorm."),
        ("head.", HEAD),
    ),
    "huggingface": (  # since transformers 5
        *_HUGGINGFACE_FRONT,
        ("vit.layers.{}.layernorm_before.", BLOCK + "norm1."),
        ("vit.layers.{}.attention.q_proj.", BLOCK + "attention.qkv."),
        ("vit.layers.{}.attention.k_proj.", BLOCK + "attention.qkv."),
        ("vit.layers.{}.attention.v_proj.", BLOCK + "attention.qkv."),
        ("vit.layers.{}.attention.o_proj.", BLOCK + "attention.output."),
        ("vit.layers.{}.layernorm_after.", BLOCK + "norm2."),
        ("vit.layers.{}.mlp.fc1.", BLOCK + "mlp.0."),
        ("vit.layers.{}.mlp.fc2.", BLOCK + "mlp.3."),
        *_HUGGINGFACE_BACK,
    ),
    "huggingface4": (  # transformers 4, and the files of the model hub
        *_HUGGINGFACE_FRONT,
        ("vit.encoder.layer.{}.layernorm_before.", BLOCK + "norm1."),
        ("vit.encoder.layer.{}.attention.attention.query.", BLOCK + "attention.qkv."),
        ("vit.encoder.layer.{}.attention.attention.key.", BLOCK + "attention.qkv."),
        ("vit.encoder.layer.{}.attention.attention.value.", BLOCK + "attention.qkv."),
        ("vit.encoder.layer.{}.attention.output.dense.", BLOCK + "attention.output."),
        ("vit.encoder.layer.{}.layernorm_after.", BLOCK + "norm2."),
        ("vit.encoder.layer.{}.intermediate.dense.", BLOCK + "mlp.0."),
        ("vit.encoder.layer.{}.output.dense.", BLOCK + "mlp.3."),
        *_HUGGINGFACE_BACK,
    ),
    "npz": (
        ("cls", "vit_encoder.embedding.cls_token"),
        ("Transformer/posembed_input/pos_embedding", POSITIONS),
        ("embedding/", PATCH),
        ("Transformer/encoderblock_{}/LayerNorm_0/", BLOCK + "norm1."),
        ("Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/query/", BLOCK + "attention.qkv."),
        ("Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/key/", BLOCK + "attention.qkv."),
        ("Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/value/", BLOCK + "attention.qkv."),
        ("Transformer/encoderblock_{}/MultiHeadDotProductAttention_1/out/", BLOCK + "attention.output."),
        ("Transformer/encoderblock_{}/LayerNorm_2/", BLOCK + "norm2."),
        ("Transformer/encoderblock_{}/MlpBlock_3/Dense_0/", BLOCK + "mlp.0."),
        ("Transformer/encoderblock_{}/MlpBlock_3/Dense_1/", BLOCK + "mlp.3."),
        ("Transformer/encoder_norm/", "vit_encoder.layernorm."),
        ("pre_logits/", PRE_LOGITS),
        ("head/", HEAD),
    ),
}
LAYOUTS = tuple(_TABLES)
_LIBRARIES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "huggingface": "Hugging Face",
    "huggingface4": "Hugging Face",
    "npz": "Google's .npz format",
}


def names(layout: str, num_layers: int = 12, *, head: bool = True, pre_logits: bool = False) -> list[tuple[str, str]]:
    """What another library calls the entries of our state dict.

    Args:
        layout: one of ``LAYOUTS``; "huggingface" is the spelling of transformers 5, "huggingface4" the one before.
        num_layers: encoder blocks.
        head: whether the model has a classifier. Without one Hugging Face's class is another (``ViTModel`` in place of
            ``ViTForImageClassification``), whose names have no ``vit.`` in front.
        pre_logits: whether the model has the hidden layer before the classifier.

    Returns:
        Pairs ``(theirs, ours)``. Three of theirs with one of ours are its thirds along the first axis: queries, keys
        and values.

    Raises:
        ValueError: for an unknown layout, or one that has no such ``pre_logits``.

    >>> names("torchvision", num_layers=1)[0]
    ('class_token', 'vit_encoder.embedding.cls_token')
    """
    table = _table(layout)
    check_whole("num_layers", num_layers)
    check_flag("head", head)
    check_flag("pre_logits", pre_logits)
    if pre_logits and not _has_pre_logits(layout, head):
        raise ValueError(f"layout={layout!r} with head={head} has no pre_logits; leave it out.")
    left_out = {HEAD: not head, PRE_LOGITS: not pre_logits}
    pairs = []
    for in_block, group in groupby(table, lambda row: "{}" in row[0]):
        rows = [row for row in group if not left_out.get(row[1])]
        for block in range(num_layers if in_block else 1):
            for theirs, ours in rows:
                theirs = theirs if head else theirs.removeprefix("vit.")
                pairs += [(t.format(block), o.format(block)) for t, o in _leaves(theirs, ours)]
    return pairs


def _table(layout: str) -> tuple[tuple[str, str], ...]:
    check_choice("layout", layout, LAYOUTS)
    return _TABLES[layout]


def _leaves(theirs: str, ours: str) -> list[tuple[str, str]]:
    if not ours.endswith("."):
        return [(theirs, ours)]
    weight = "weight" if not theirs.endswith("/") else "scale" if "norm" in ours else "kernel"  # flax's words
    return [(theirs + weight, ours + "weight"), (theirs + "bias", ours + "bias")]


def _has_pre_logits(layout: str, head: bool) -> bool:
    """timm gave the layer up, Hugging Face has it (as the pooler) only where there is no classifier."""
    return layout in ("torchvision", "npz") or (layout.startswith("huggingface") and not head)


def from_state_dict(
    state: Mapping[str, Tensor], layout: str, *, num_heads: int, norm_eps: float = 1e-6, pooling: str = "cls"
) -> ViTModel:
    """A model from another library's state dict; its sizes follow from the shapes of the entries.

    Args:
        state: entries by the other library's names; without a classifier the model gets ``num_classes=0``.
        layout: one of ``LAYOUTS``.
        num_heads, norm_eps, pooling: of :class:`ViTModel`; no shape tells them.

    Raises:
        ValueError: listing the entries that are missing, unknown or of a shape that does not go with the others.
    """
    theirs_of = {ours: theirs for theirs, ours in _table(layout)}
    is_state = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    check("state", state, is_state, "a state dict: tensors by their names")
    check_whole("num_heads", num_heads)
    # "vit." is in front of Hugging Face's names only where a classifier stands beside
    head = any(name.startswith((theirs_of[HEAD], "vit.")) for name in state)
    pre_logits = _has_pre_logits(layout, head) and any(name.startswith(theirs_of[PRE_LOGITS]) for name in state)
    start = theirs_of[BLOCK + "norm1."].partition("{}")[0].removeprefix("" if head else "vit.")
    blocks = {match[1] for match in map(re.compile(rf"{re.escape(start)}(\d+)").match, state) if match}
    pairs = names(layout, max(1, len(blocks)), head=head, pre_logits=pre_logits)
    known = {theirs for theirs, _ in pairs}
    _check_entries(layout, missing=[name for name in known if name not in state], unknown=[*state.keys() - known])

    config = _sizes(state, pairs, layout) | {"num_heads": num_heads, "norm_eps": norm_eps, "pooling": pooling}
    with torch.device("meta"):  # spares time and memory for random weights that are replaced at once
        model = ViTModel(**config, drop=0.0, patch_bias=True)
    expected = _renamed(model.state_dict(), pairs, layout, num_heads)
    shapes = [(name, list(state[name].shape), list(expected[name].shape)) for name in known]
    _check_entries(
        layout, misshapen=[f"{name} {given} in place of {due}" for name, given, due in shapes if given != due]
    )

    parts = {}
    for theirs, ours in pairs:
        part = _from_flax(theirs, state[theirs]) if layout == "npz" else state[theirs]
        parts.setdefault(ours, []).append(part)
    model.load_state_dict({ours: _copy(torch.cat(thirds)) for ours, thirds in parts.items()}, assign=True)
    return model.eval()


def to_state_dict(model: nn.Module, layout: str) -> dict[str, Tensor]:
    """The weights of a :class:`ViTModel`, wrapped or not, under another library's names.

    Args:
        layout: one of ``LAYOUTS``.

    Raises:
        ValueError: naming the options of the model that the other library does not have.
    """
    _table(layout)  # an unknown one is refused first
    model = unwrap(model)
    config = model.config
    head, pre_logits = config["num_classes"] > 0, config["pre_logits"] is not None
    parts = []
    if not config["norm_first"]:
        parts.append("norm_first=False")
    if config["pooling"] != "cls" and layout != "timm":
        parts.append(f"pooling={config['pooling']!r}")
    if pre_logits and not _has_pre_logits(layout, head):
        parts.append(f"pre_logits={config['pre_logits']}" + (" before a classifier" if head else ""))
    if layout == "npz" and _norm_eps(model) != 1e-6:  # such a file holds weights only, and Google's code has one eps
        parts.append(f"norm_eps={_norm_eps(model)}")
    if parts:
        raise ValueError(
            f"{_LIBRARIES[layout]} has no counterpart of {', '.join(parts)}; keep such a model with "
            "vitlib.weights.checkpoint.save_checkpoint."
        )
    pairs = names(layout, config["num_layers"], head=head, pre_logits=pre_logits)
    state = model.state_dict()
    state.setdefault(PATCH + "bias", state[PATCH + "weight"].new_zeros(config["em_dim"]))
    return {name: _copy(part) for name, part in _renamed(state, pairs, layout, config["num_heads"]).items()}


def _renamed(state: Mapping[str, Tensor], pairs: list[tuple[str, str]], layout: str, num_heads: int) -> dict:
    """Our entries as views under their names and with their axes."""
    theirs_of = {}
    for theirs, ours in pairs:
        theirs_of.setdefault(ours, []).append(theirs)
    renamed = {}
    for ours, thirds in theirs_of.items():
        for theirs, part in zip(thirds, state[ours].chunk(len(thirds)), strict=True):
            renamed[theirs] = _to_flax(theirs, part, num_heads) if layout == "npz" else part
    return renamed


def _to_flax(theirs: str, tensor: Tensor, num_heads: int) -> Tensor:
    """PyTorch has a layer's outputs on the first axis; flax has them on the last, and heads on an axis of their own."""
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)  # [D, C, P, P] to [P, P, C, D]
    if tensor.ndim == 2:
        tensor = tensor.T
    if re.search("/(query|key|value)/", theirs):
        return tensor.unflatten(-1, (num_heads, -1))  # [D, H, K], a bias [H, K]
    return tensor.unflatten(0, (num_heads, -1)) if theirs.endswith("/out/kernel") else tensor  # [H, K, D]


def _from_flax(theirs: str, tensor: Tensor) -> Tensor:
    """The inverse of :func:`_to_flax`."""
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    if re.search("/(query|key|value)/", theirs):
        tensor = tensor.flatten(-2)
    elif theirs.endswith("/out/kernel"):
        tensor = tensor.flatten(0, 1)
    return tensor.T if tensor.ndim == 2 else tensor


def _copy(tensor: Tensor) -> Tensor:
    device = "meta" if tensor.is_meta else "cpu"
    return tensor.detach().to(device, torch.float32).clone(memory_format=torch.contiguous_format)


def _sizes(state: Mapping[str, Tensor], pairs: list[tuple[str, str]], layout: str) -> dict[str, int | None]:
    """ViTModel's sizes as most entries have them, so that a wrong one is found by comparison with the others."""
    theirs_of = {ours: theirs for theirs, ours in pairs}

    def size(ours: str, axis: int = 0) -> int | None:
        return (*state[theirs_of[ours]].shape, 1, 1, 1, 1)[axis] if ours in theirs_of else None

    patch_axis, channel_axis = (0, 2) if layout == "npz" else (2, 1)
    patch_size = size(PATCH + "weight", patch_axis)
    num_layers = sum(ours.endswith("norm1.weight") for ours in theirs_of)
    return {
        "num_classes": size(HEAD + "bias") or 0,
        "num_layers": num_layers,
        "image_size": patch_size * math.isqrt(max(1, size(POSITIONS, 1) - 1)),
        "patch_size": patch_size,
        "num_channels": size(PATCH + "weight", channel_axis),
        "em_dim": mode(size(ours) for ours in theirs_of if re.search(r"norm\d?\.weight", ours)),
        "ff_dim": mode(size(BLOCK.format(block) + "mlp.0.bias") for block in range(num_layers)),
        "pre_logits": size(PRE_LOGITS + "bias"),
    }


def _check_entries(layout: str, **wrong: list[str]) -> None:
    if not any(wrong.values()):
        return
    faults = "; ".join(f"{kind}: {_listed(sorted(entries))}" for kind, entries in wrong.items() if entries)
    raise ValueError(
        f"This state dict is not that of a plain ViT of {_LIBRARIES[layout]} ({faults}); give the whole state dict, "
        "with nothing added."
    )


def _listed(entries: list[str], most: int = 10) -> str:
    more = f" and {len(entries) - most} more" if len(entries) > most else ""
    return ", ".join(entries[:most]) + more


# ---- torchvision


def from_torchvision(module: nn.Module) -> ViTModel:
    """A model from torchvision's ``VisionTransformer`` (``vit_b_16`` and its family).

    A ``representation_size`` becomes ``pre_logits``; ``heads`` or ``heads.head`` replaced by an ``nn.Identity`` become
    ``num_classes=0``.

    Raises:
        ValueError: naming what :class:`ViTModel` does not have, such as ``conv_stem_configs``, or listing entries that
            do not fit.
        ModuleNotFoundError: if torchvision is not installed.
    """
    peer = _library("torchvision.models.vision_transformer")
    _check_class(module, peer.VisionTransformer)
    blocks = list(module.encoder.layers)
    _check_parts(
        "torchvision",
        [
            *(["conv_stem_configs"] if not isinstance(module.conv_proj, nn.Conv2d) else _patch_parts(module.conv_proj)),
            *_norm_parts(module.encoder.ln, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))),
            *_activation_parts(block.mlp[1] for block in blocks),
        ],
    )
    heads = blocks[0].self_attention.num_heads
    return from_state_dict(module.state_dict(), "torchvision", num_heads=heads, norm_eps=_norm_eps(module))


def to_torchvision(model: nn.Module) -> nn.Module:
    """torchvision's ``VisionTransformer`` with the weights of a :class:`ViTModel`.

    What its constructor does not offer is put in afterwards, as its users do: ``nn.Identity`` in place of
    ``heads.head`` for ``num_classes=0``, and another convolution for images that do not have three channels.

    Raises:
        ValueError: naming the options of the model that torchvision does not have: ``norm_first=False`` and
            ``pooling="mean"``.
        ModuleNotFoundError: if torchvision is not installed.
    """
    peer = _library("torchvision.models.vision_transformer")
    model = unwrap(model)
    config = model.config
    with torch.device("meta"):
        module = peer.VisionTransformer(
            config["image_size"],
            config["patch_size"],
            config["num_layers"],
            config["num_heads"],
            config["em_dim"],
            config["ff_dim"],
            num_classes=config["num_classes"] or 1,
            representation_size=config["pre_logits"],
            norm_layer=partial(nn.LayerNorm, eps=_norm_eps(model)),
        )
        if not config["num_classes"]:
            module.heads.head = nn.Identity()
        if config["num_channels"] != 3:
            module.conv_proj = nn.Conv2d(
                config["num_channels"], config["em_dim"], config["patch_size"], config["patch_size"]
            )
    module.load_state_dict(to_state_dict(model, "torchvision"), assign=True)
    return module.eval()


# ---- timm


def from_timm(module: nn.Module) -> ViTModel:
    """A model from timm's ``VisionTransformer`` (``vit_*_patch*`` and ``deit_*_patch*`` without extras).

    ``global_pool="avg"`` with ``fc_norm=False`` becomes ``pooling="mean"``.

    Raises:
        ValueError: naming what :class:`ViTModel` does not have, such as ``init_values`` or a distillation token, or
            listing entries that do not fit.
        ModuleNotFoundError: if timm is not installed.
    """
    peer = _library("timm.models.vision_transformer")
    if isinstance(module, peer.VisionTransformer):
        _check_parts("timm", [*_timm_parts(module)])
    _check_class(module, peer.VisionTransformer)
    return from_state_dict(
        module.state_dict(),
        "timm",
        num_heads=module.blocks[0].attn.num_heads,
        norm_eps=_norm_eps(module),
        pooling="mean" if module.global_pool == "avg" else "cls",
    )


def to_timm(model: nn.Module) -> nn.Module:
    """timm's ``VisionTransformer`` with the weights of a :class:`ViTModel`.

    Raises:
        ValueError: naming the options of the model that timm does not have: ``norm_first=False`` and ``pre_logits``.
        ModuleNotFoundError: if timm is not installed.
    """
    peer = _library("timm.models.vision_transformer")
    model = unwrap(model)
    config = model.config
    with torch.device("meta"):
        module = peer.VisionTransformer(
            img_size=config["image_size"],
            patch_size=config["patch_size"],
            in_chans=config["num_channels"],
            num_classes=config["num_classes"],
            global_pool="token" if config["pooling"] == "cls" else "avg",
            fc_norm=False,
            embed_dim=config["em_dim"],
            depth=config["num_layers"],
            num_heads=config["num_heads"],
            mlp_ratio=(config["ff_dim"] + 0.5) / config["em_dim"],  # timm rounds the product down
            norm_layer=partial(nn.LayerNorm, eps=_norm_eps(model)),
        )
    module.load_state_dict(to_state_dict(model, "timm"), assign=True)
    return module.eval()


def _timm_parts(module: nn.Module) -> Iterator[str]:
    """The arguments of timm's VisionTransformer that ViTModel has no counterpart of, as far as they are in use."""
    layers, peer = importlib.import_module("timm.layers"), importlib.import_module("timm.models.vision_transformer")
    embed, blocks = module.patch_embed, list(module.blocks)

    def used(name: str, *modules: nn.Module) -> bool:  # timm has nn.Identity in place of what is switched off
        return any(not isinstance(getattr(module, name, nn.Identity()), nn.Identity) for module in modules)

    in_use = {
        "class_token=False": not module.has_class_token,
        f"reg_tokens={module.num_reg_tokens}": module.num_reg_tokens > 0,
        "dist_token (a distilled DeiT)": hasattr(module, "dist_token"),
        "pos_embed='none'": module.pos_embed is None,
        "no_embed_class=True": module.no_embed_class,
        "pre_norm=True": used("norm_pre", module),
        "dynamic_img_size=True": module.dynamic_img_size,
        f"global_pool={module.global_pool!r}": module.global_pool not in ("token", "avg"),
        "pool_include_prefix=True": module.global_pool == "avg" and getattr(module, "pool_include_prefix", False),
        "fc_norm=True (the last norm after the pooling)": used("fc_norm", module),
        "final_norm=False": not used("norm", module) and not used("fc_norm", module),
        "init_values (LayerScale)": used("ls1", *blocks) or used("ls2", *blocks),
    }
    yield from (part for part, is_used in in_use.items() if is_used)
    attentions, mlps = ([getattr(block, name, None) for block in blocks] for name in ("attn", "mlp"))
    kinds = {
        "embed_layer": (layers.PatchEmbed, [embed]),
        "block_fn": (peer.Block, blocks),
        "attn_layer": (layers.Attention, attentions),
        "mlp_layer": (layers.Mlp, mlps),
    }
    foreign = {
        f"{argument}={type(part).__name__}": None  # a dict keeps their order, and each once
        for argument, (plain, parts) in kinds.items()
        for part in parts
        if part is not None and type(part) is not plain
    }
    if foreign:
        yield from foreign
        return  # what is inside of them goes by other names
    in_use = {
        "embed_norm_layer": used("norm", embed),
        "dynamic_img_pad=True": embed.dynamic_img_pad,
        "qk_norm=True": used("q_norm", *attentions) or used("k_norm", *attentions),
        "scale_attn_norm=True": used("norm", *attentions),
        "scale_mlp_norm=True": used("norm", *mlps),
        "qkv_bias=False": any(attention.qkv.bias is None for attention in attentions),
        "proj_bias=False": any(attention.proj.bias is None for attention in attentions),
    }
    yield from (part for part, is_used in in_use.items() if is_used)
    yield from _patch_parts(embed.proj)
    yield from _image_parts("img_size", embed.img_size, embed.patch_size)
    norms = [norm for norm in (module.norm, module.fc_norm) if not isinstance(norm, nn.Identity)]
    yield from _norm_parts(*norms, *(norm for block in blocks for norm in (block.norm1, block.norm2)))
    yield from _activation_parts(mlp.act for mlp in mlps)


# ---- Hugging Face


def from_huggingface(module: nn.Module) -> ViTModel:
    """A model from Hugging Face's ``ViTForImageClassification`` or ``ViTModel``, of transformers 4 or 5.

    A ``ViTModel`` has no classifier and becomes ``num_classes=0``; its pooler, a dense layer with tanh, becomes
    ``pre_logits``. What our model then gives is their ``pooler_output``, or ``last_hidden_state[:, 0]`` without pooler.

    Raises:
        ValueError: naming what :class:`ViTModel` does not have, such as another activation or a mask token, or listing
            entries that do not fit.
        ModuleNotFoundError: if transformers is not installed.
    """
    peer = _library("transformers")
    _check_class(module, peer.ViTForImageClassification, peer.ViTModel)
    config = module.config
    if isinstance(module, peer.ViTForImageClassification) and isinstance(module.classifier, nn.Identity):
        module = module.vit
    base = getattr(module, "vit", module)
    parts = [
        *([f"hidden_act={config.hidden_act!r}"] if config.hidden_act != "gelu" else []),
        *(["qkv_bias=False"] if not config.qkv_bias else []),
        *(["use_mask_token=True"] if base.embeddings.mask_token is not None else []),
        *_patch_parts(base.embeddings.patch_embeddings.projection),
        *_image_parts("image_size", config.image_size, config.patch_size),
    ]
    if base.pooler is not None and (activation := getattr(config, "pooler_act", "tanh")) != "tanh":
        parts.append(f"pooler_act={activation!r}")
    _check_parts("Hugging Face", parts)
    state = module.state_dict()
    heads = config.num_attention_heads
    return from_state_dict(state, _spelling(state), num_heads=heads, norm_eps=_norm_eps(module))


def to_huggingface(model: nn.Module) -> nn.Module:
    """Hugging Face's ``ViTForImageClassification`` with the weights of a :class:`ViTModel`, or their ``ViTModel`` for
    ``num_classes=0``, with a pooler for ``pre_logits``.

    Raises:
        ValueError: naming the options of the model that Hugging Face does not have: ``norm_first=False``,
            ``pooling="mean"``, and ``pre_logits`` before a classifier.
        ModuleNotFoundError: if transformers is not installed.
    """
    peer = _library("transformers")
    model = unwrap(model)
    config = model.config
    theirs = peer.ViTConfig(
        hidden_size=config["em_dim"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_heads"],
        intermediate_size=config["ff_dim"],
        layer_norm_eps=_norm_eps(model),
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        num_channels=config["num_channels"],
        num_labels=config["num_classes"],
        pooler_output_size=config["pre_logits"],
    )
    with torch.device("meta"):
        if config["num_classes"]:
            module = peer.ViTForImageClassification(theirs)
        else:
            module = peer.ViTModel(theirs, add_pooling_layer=config["pre_logits"] is not None)
    module.load_state_dict(to_state_dict(model, _spelling(module.state_dict())), assign=True)
    return module.eval()


def _spelling(state: Mapping[str, Tensor]) -> str:
    return "huggingface4" if any("encoder.layer." in name for name in state) else "huggingface"


# ---- Google


def from_npz(path: str | os.PathLike) -> ViTModel:
    """A model from a ``.npz`` file of Google's ViTs (github.com/google-research/vision_transformer, flax).

    The heads have an axis of their own there; the image size follows from the position embedding, which is that of a
    square image. The files of big_vision have other names and are refused. No code of the file is run: a file that
    would need it is refused too.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no whole ``.npz`` file, or listing the entries that do not fit.
    """
    import zipfile

    import numpy as np

    check_path("path", path)
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: torch.from_numpy(file[name]) for name in file.files}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file at {printable(path)}; check the path.") from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{printable(path)} is not a whole .npz file of arrays ({error}); download it again."
        ) from error
    queries = [value for name, value in state.items() if name.endswith("_1/query/bias") and value.ndim]
    heads = mode(query.shape[0] for query in queries) if queries else 1  # without queries the error lists them
    return from_state_dict(state, "npz", num_heads=heads)


def to_npz(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the weights of a :class:`ViTModel` as one of Google's ``.npz`` files, whole or not at all.

    Raises:
        ValueError: naming the options of the model that such a file cannot hold: ``norm_first=False``,
            ``pooling="mean"`` and a ``norm_eps`` other than 1e-6; or if the model is on the meta device.
    """
    import numpy as np

    check_path("path", path)
    state = to_state_dict(model, "npz")
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("A model on the meta device has no weights to write; build it on the CPU.")
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})


# ---- what the converters share


def _library(module: str) -> ModuleType:
    import_torchvision()  # timm and transformers import it too, and may need the same help
    name = module.partition(".")[0]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        message = f"{name} is not installed; install it with `pip install {name}`."
        raise ModuleNotFoundError(message, name=name) from error
    return importlib.import_module(module)


def _check_class(module: nn.Module, *classes: type) -> None:
    if type(module) not in classes:  # a subclass may compute anything
        expected = " or ".join(f"{kind.__name__} of {kind.__module__.partition('.')[0]}" for kind in classes)
        named = f"{type(module).__module__}.{type(module).__name__}" if isinstance(module, nn.Module) else brief(module)
        raise ValueError(f"module={named} cannot be converted; give the class {expected}.")


def _check_parts(library: str, parts: list[str]) -> None:
    if parts:
        raise ValueError(
            f"This model of {library} has {', '.join(parts)}, which ViTModel does not have; give a plain ViT: CLS "
            "token, learned positions, pre-norm blocks with biases and GELU, one norm before the head."
        )


def _patch_parts(convolution: nn.Conv2d) -> Iterator[str]:
    plain = convolution.stride == convolution.kernel_size and convolution.padding == (0, 0)
    if not plain or convolution.dilation != (1, 1) or convolution.groups != 1:
        yield f"a patch embedding that is not a convolution with its stride equal to its kernel ({convolution})"


def _image_parts(name: str, image: int | tuple[int, int], patch: int | tuple[int, int]) -> Iterator[str]:
    sides, patch_sides = ([size] * 2 if isinstance(size, int) else list(size) for size in (image, patch))
    if len({*sides}) > 1 or len({*patch_sides}) > 1:
        yield f"{name}={image} and patch_size={patch}, which are not square"
    elif sides[0] % patch_sides[0]:
        yield f"{name}={sides[0]}, which is not a multiple of patch_size={patch_sides[0]}"


def _norm_parts(*norms: nn.Module) -> Iterator[str]:
    if others := {type(norm).__name__ for norm in norms if not isinstance(norm, nn.LayerNorm)}:
        yield f"norm_layer={', '.join(sorted(others))}"
    elif len({norm.eps for norm in norms}) > 1:
        yield "layer norms with different eps"


def _activation_parts(activations: Iterator[nn.Module]) -> Iterator[str]:
    x = torch.linspace(-3, 3, 61)
    if others := {repr(activation) for activation in activations if not torch.equal(activation(x), F.gelu(x))}:
        yield f"act_layer={', '.join(sorted(others))}"


def _norm_eps(module: nn.Module) -> float:
    return next(part.eps for part in module.modules() if isinstance(part, nn.LayerNorm))
