"""Take the removed units out of the weights, keep the result, and read it back."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from torchgraft.compression.optin.blocks import (
    Block,
    Emptied,
    NoChannels,
    OpenAttention,
    PrunableSpec,
    module_at,
    open_attention,
    resolve,
    width_in,
    width_out,
)
from torchgraft.compression.optin.search import PruneMasks

__all__ = ["apply_masks", "load_pruned", "save_pruned"]

_FILE, _WEIGHTS = "optin.json", "optin.safetensors"


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    before = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().clone(), before.requires_grad))


def _cut_out(module: Any, name: str, kept: Tensor) -> None:
    """Keep some rows of what a layer makes; a fused layer makes the same units several times over."""
    times = width_out(module, name) // len(kept)
    rows = kept.repeat(times).nonzero()[:, 0]
    if isinstance(module, NoChannels):
        # the block before, which this layer also ends, lost all its units
        module.channels = len(rows)
        if module.bias is not None:
            _set(module, "bias", module.bias[rows])
        return
    if isinstance(module, nn.BatchNorm2d):
        for part in ("weight", "bias"):
            if getattr(module, part) is not None:
                _set(module, part, getattr(module, part)[rows])
        for part in ("running_mean", "running_var"):
            if getattr(module, part) is not None:
                setattr(module, part, getattr(module, part)[rows].clone())
        module.num_features = len(rows)
        return
    conv1d = type(module).__name__ == "Conv1D"
    weight: Tensor = module.weight
    _set(module, "weight", weight[:, rows] if conv1d else weight[rows])
    if module.bias is not None:
        _set(module, "bias", module.bias[rows])
    if isinstance(module, nn.Conv2d):
        if module.groups not in (1, module.in_channels):
            raise TypeError(f"{name!r} is a convolution in {module.groups} groups, which cannot be cut")
        if module.groups > 1:
            module.groups = module.in_channels = len(rows)
        module.out_channels = len(rows)
    elif conv1d:
        module.nf = len(rows)
    else:
        module.out_features = len(rows)


def _cut_in(module: Any, kept: Tensor) -> None:
    """Keep some of what a layer takes."""
    columns = kept.nonzero()[:, 0]
    weight: Tensor = module.weight
    if isinstance(module, nn.Linear):
        _set(module, "weight", weight[:, columns])
        module.in_features = len(columns)
    elif isinstance(module, nn.Conv2d):
        _set(module, "weight", weight[:, columns])
        module.in_channels = len(columns)
    else:
        _set(module, "weight", weight[columns])
        module.nx = len(columns)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    module_at(model, parent)._modules[last] = new.train(module_at(model, name).training)


def _empty_attention(model: nn.Module, block: Block) -> None:
    """No head is left: queries, keys and values go, the bias of the output projection stays."""
    spec, out = block.spec, cast(Any, block.attention_out)
    if not spec.attention:
        raise ValueError(f"to empty {spec.attention_out!r} of heads its spec must name the module `attention`")
    if spec.attention_out.startswith(f"{spec.attention}."):
        features = width_out(out, spec.attention_out)
        new = Emptied(out.bias, True, True, features)
    else:
        _cut_in(out, torch.zeros(width_in(out, spec.attention_out), dtype=torch.bool))
        new = Emptied(None, False, True, 0)
    device, dtype = out.weight.device, out.weight.dtype
    _replace(model, spec.attention, new.to(device=device, dtype=dtype))


_COUNTS = (
    "num_attention_heads", "num_heads", "n_heads", "num_key_value_heads", "all_head_size", "split_size",
)  # fmt: skip


def _cut_heads(model: nn.Module, block: Block, kept: Tensor) -> None:
    spec, out = block.spec, block.attention_out
    assert out is not None
    if not spec.qkv:
        raise ValueError(f"slicing heads needs qkv in the spec of {spec.attention_out!r}; mode='mask' does without")
    if not bool(kept.any()) and not isinstance(module_at(model, spec.attention), OpenAttention):
        _empty_attention(model, block)
        return
    for name in spec.qkv:
        module = module_at(model, name)
        times = 3 if len(spec.qkv) == 1 else 1
        size = width_out(module, name) // (spec.n_heads * times)
        _cut_out(module, name, kept.repeat_interleave(size))
    _cut_in(out, kept.repeat_interleave(width_in(out, spec.attention_out) // spec.n_heads))
    for name in spec.per_head:
        parent, _, last = name.rpartition(".")
        owner = module_at(model, parent)
        _set(owner, last, getattr(owner, last)[..., kept])
    if spec.attention:
        attention = module_at(model, spec.attention)
        for attribute in _COUNTS:
            value = getattr(attention, attribute, None)
            if isinstance(value, int):
                setattr(attention, attribute, value * int(kept.sum()) // spec.n_heads)


def _cut_neurons(model: nn.Module, block: Block, kept: Tensor) -> None:
    spec, out = block.spec, cast(Any, block.ffn_out)
    if not spec.ffn_in:
        raise ValueError(f"slicing hidden units needs ffn_in in the spec of {spec.ffn_out!r}; mode='mask' does without")
    if not bool(kept.any()):
        # convolutions and batch norms do not run without channels
        for name in spec.ffn_in:
            if isinstance(module_at(model, name), (nn.Conv2d, nn.BatchNorm2d)):
                _replace(model, name, NoChannels(module_at(model, name), 0))
        if isinstance(out, nn.Conv2d):
            _replace(model, spec.ffn_out, NoChannels(out, out.out_channels))
        elif not isinstance(out, nn.Linear):
            # unlike nn.Linear, Conv1D does not run without inputs
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                layer = nn.Linear(0, width_out(out, spec.ffn_out), device="meta")
            layer.weight = nn.Parameter(out.weight.detach()[:0].mT.clone(), out.weight.requires_grad)
            layer.bias = out.bias
            _replace(model, spec.ffn_out, layer)
        out = module_at(model, spec.ffn_out)
    for name in spec.ffn_in:
        _cut_out(module_at(model, name), name, kept)
    if width_in(out, spec.ffn_out):
        _cut_in(out, kept)


def _check(blocks: Sequence[Block], masks: PruneMasks) -> None:
    if not len(masks.heads) == len(masks.neurons) == len(blocks):
        raise ValueError(f"masks are for {len(masks.heads)} blocks, the model has {len(blocks)}")
    for i, block in enumerate(blocks):
        for kind, mask in (("heads", masks.heads[i]), ("neurons", masks.neurons[i])):
            if mask.dtype != torch.bool or mask.shape != (block.count(kind),):
                raise ValueError(
                    f"the mask of {kind} in block {i} must be bool of shape ({block.count(kind)},), "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )


def _sizes(model: nn.Module) -> dict[str, Any] | None:
    """What an earlier slice noted: the specs of the whole model, and how much of every block is left."""
    config = getattr(model, "config", None)
    noted = getattr(config, "optin", None) if hasattr(config, "to_dict") else getattr(model, "optin", None)
    return noted if isinstance(noted, dict) else None


def _note(model: nn.Module, masks: PruneMasks) -> None:
    """Note per-block sizes beside the model, so that it can be built again from the whole one."""
    before = _sizes(model)
    entries = {
        entry["spec"]["ffn_out"] or entry["spec"]["attention_out"]: entry for entry in (before or {}).get("blocks", [])
    }
    noted = []
    for spec, heads, neurons in zip(masks.blocks, masks.heads, masks.neurons, strict=True):
        old = entries.pop(spec.ffn_out or spec.attention_out, None)
        kept = {"heads": int(heads.sum()), "neurons": int(neurons.sum())}
        noted.append({"spec": asdict(spec) if old is None else old["spec"], **kept})
    value = {"blocks": [*noted, *entries.values()]}
    config: Any = getattr(model, "config", None)
    holder: Any = config if hasattr(config, "to_dict") else model
    holder.optin = value


def _slice(model: nn.Module, masks: PruneMasks) -> None:
    """Cut in place."""
    open_attention(model)
    blocks = resolve(model, masks.blocks)
    _check(blocks, masks)
    for block, heads, neurons in zip(blocks, masks.heads, masks.neurons, strict=True):
        if block.attention_out is not None and not bool(heads.all()):
            _cut_heads(model, block, heads)
        if block.ffn_out is not None and not bool(neurons.all()):
            _cut_neurons(model, block, neurons)
    _note(model, masks)


def apply_masks(model: nn.Module, masks: PruneMasks, mode: Literal["slice", "mask"] = "slice") -> nn.Module:
    """A copy of a model without the units that masks leave out; the model itself is not touched.

    Args:
        model: the model that was scored.
        masks: what to keep.
        mode: ``slice`` takes rows and columns out of the weights, so that the copy is smaller and faster. It is a plain
            model of its own library with two exceptions: where a block lost all heads or all channels a small module
            of ours gives what is left, the bias; and in PyTorch's encoder layers an attention of ours stands where
            ``nn.MultiheadAttention`` was, which cannot lose heads. ``mask`` sets the weights that read the removed
            units to zero: same outputs, same size, same speed.

    Raises:
        ValueError: for another mode, masks of other sizes, or a spec that lacks what slicing needs.
        TypeError: for layers of a kind that cannot be cut.
    """
    if mode not in ("slice", "mask"):
        raise ValueError(f"mode must be 'slice' or 'mask', got {mode!r}")
    # weights made in inference mode could never be trained
    with torch.inference_mode(False):
        made = copy.deepcopy(model)
        (_slice if mode == "slice" else _mask)(made, masks)
    return made


def _mask(made: nn.Module, masks: PruneMasks) -> None:
    """Zero weights of a copy."""
    # the output projection of nn.MultiheadAttention has the same name open or closed
    blocks = resolve(made, masks.blocks)
    _check(blocks, masks)
    with torch.no_grad():
        for block, heads, neurons in zip(blocks, masks.heads, masks.neurons, strict=True):
            for out, kept, count in ((block.attention_out, heads, block.heads), (block.ffn_out, neurons, block.width)):
                if out is None or not count or bool(kept.all()):
                    continue
                weight = cast(Tensor, out.weight)
                size = width_in(out, "") // count
                gone = (~kept).repeat_interleave(size).nonzero()[:, 0].to(weight.device)
                # a new parameter, since another layer may share this one
                _set(out, "weight", weight.index_fill(0 if type(out).__name__ == "Conv1D" else 1, gone, 0.0))


def save_pruned(model: nn.Module, folder: str | Path) -> None:
    """Save a sliced model: weights as safetensors, and how much of every block is left.

    The sizes go into the configuration of a ``transformers`` model (``config.optin``), else into ``optin.json``.

    Raises:
        ValueError: for a model that was not sliced.
    """
    sizes = _sizes(model)
    if sizes is None:
        raise ValueError("the model was not sliced by apply_masks; save it as you would without torchgraft")
    from safetensors.torch import save_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / _WEIGHTS))
    kept: Any = model
    if hasattr(model, "save_pretrained"):
        config = kept.config
        config.architectures, config.dtype = [type(model).__name__], kept.dtype
        # rotary frequencies, for instance, stay in single precision in a model of bfloat16
        buffers = {name: str(b.dtype).removeprefix("torch.") for name, b in model.named_buffers()}
        config.optin = sizes | {"buffers": buffers}
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None and kept.can_generate():
            kept.generation_config.save_pretrained(folder)
    else:
        (folder / _FILE).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _first(sizes: dict[str, Any], blocks: list[PrunableSpec]) -> PruneMasks:
    """Masks that keep the first units of every block; which ones they are does not matter before weights are read."""
    masks: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
    for entry, spec in zip(sizes["blocks"], blocks, strict=True):
        for kind, total in (("heads", spec.n_heads), ("neurons", entry["whole"])):
            masks[kind].append(torch.arange(total, device="cpu") < entry[kind])
    return PruneMasks(tuple(masks["heads"]), tuple(masks["neurons"]), tuple(blocks), math.nan, math.nan)


def _shrink(model: nn.Module, sizes: dict[str, Any]) -> None:
    """Cut a whole model to noted sizes."""

    def read(spec: dict[str, Any]) -> PrunableSpec:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()}
        return PrunableSpec(**values)

    blocks = [read(entry["spec"]) for entry in sizes["blocks"]]
    open_attention(model)
    for entry, block in zip(sizes["blocks"], resolve(model, blocks), strict=True):
        entry["whole"] = block.width
    _slice(model, _first(sizes, blocks))


def _cast(model: nn.Module, dtype: torch.dtype, noted: dict[str, str]) -> None:
    """Bring parameters to a precision, and floating-point buffers to the one noted, or to the same."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in list(model.named_buffers()):
        wanted = getattr(torch, noted[name], None) if name in noted else dtype
        if not isinstance(wanted, torch.dtype):
            raise ValueError(f"the buffer {name!r} is noted as {noted[name]!r}, which is no dtype")
        if buffer.is_floating_point():
            parent, _, last = name.rpartition(".")
            module_at(model, parent)._buffers[last] = buffer.to(wanted)


def load_pruned(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read back what ``save_pruned`` wrote; in eval mode, on the CPU.

    Args:
        folder: where it is.
        model: a whole model of the same architecture, whose weights do not matter; needed for models that are not of
            ``transformers``. It is cut and filled in place and returned.

    Raises:
        FileNotFoundError: when the folder holds no sliced model.
        ValueError: for a model of another architecture, or none where one is needed.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {_WEIGHTS}; save_pruned writes it")
    if (folder / _FILE).is_file():
        if model is None:
            raise ValueError(f"{folder} holds a model that is not of transformers; give a whole one as model=")
        sizes = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    else:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        sizes = getattr(config, "optin", None)
        if not isinstance(sizes, dict):
            raise ValueError(f"{folder / 'config.json'} has no field optin; load it with from_pretrained")
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise ValueError(f"{folder / 'config.json'} names the architecture {config.architectures}, not known here")
        model = kind(config)
        if config.dtype is not None:
            _cast(model, config.dtype, sizes.get("buffers", {}))
        made: Any = model
        if made.can_generate() and (folder / "generation_config.json").is_file():
            made.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    _shrink(model, sizes)
    try:
        load_model(model, str(folder / _WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{folder / _WEIGHTS} does not fit a {type(model).__name__}: {error}") from None
    return model.eval()
