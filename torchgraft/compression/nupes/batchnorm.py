"""What BatchNorm knows: folding it into the layer before, and ranges of inputs without any data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchgraft import surgery
from torchgraft.compression.nupes.layers import is_quantizable

__all__ = ["batchnorm_ranges", "fold_batchnorm"]


def _traced(model: nn.Module) -> Any:
    try:
        return torch.fx.symbolic_trace(model).graph
    except Exception as error:  # tracing runs the model's own code, which may fail in any way
        raise ValueError(
            f"{type(model).__name__} cannot be traced ({type(error).__name__}: {str(error)[:120]}); pass calibration "
            "data, and fold BatchNorm with torch.nn.utils.fuse_conv_bn_eval yourself"
        ) from error


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold each BatchNorm that directly follows a convolution into its weight and bias, in place.

    By torch's ``fuse_conv_bn_eval``; the BatchNorm becomes an identity. Those that keep no running statistics stay,
    and so do those behind linear layers, which may normalise another dimension than the features.

    Raises:
        ValueError: when the model, or a layer to fold, is in training mode, or it cannot be traced by torch.fx.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        >>> fold_batchnorm(net)[1]
        Identity()
    """
    from torch.nn.utils import fuse_conv_bn_eval

    if model.training:
        raise ValueError("model is in training mode, where BatchNorm cannot be folded; call model.eval() first")
    modules = dict(model.named_modules())
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    uses: dict[str, int] = {}
    pairs = []
    for node in _traced(model).nodes:
        if node.op != "call_module":
            continue
        uses[node.target] = uses.get(node.target, 0) + 1
        before = node.args[0] if node.args else None
        if isinstance(modules[node.target], norms) and before is not None and before.op == "call_module":
            layer, norm = modules[before.target], modules[node.target]
            known = norm.running_mean is not None
            if type(layer) in (nn.Conv1d, nn.Conv2d) and len(before.users) == 1 and known:
                pairs.append((before.target, node.target))
    folded: dict[int, nn.Module] = {}
    for conv, norm in pairs:
        if uses[conv] == uses[norm] == 1:
            layer, bn = modules[conv], modules[norm]
            if layer.training or bn.training:
                raise ValueError(f"{conv!r} or {norm!r} is in training mode; call model.eval() first")
            folded[id(layer)], folded[id(bn)] = fuse_conv_bn_eval(layer, bn), nn.Identity()
    if folded:
        surgery.replace(model, lambda name, module: id(module) in folded, lambda old: folded[id(old)])
    return model


def batchnorm_ranges(model: nn.Module, k: float = 6.0) -> dict[str, tuple[float, bool]]:
    """Ranges of layer inputs without data: max over channels of |mean + k std| as the BatchNorm before says.

    PowerQuant's data-free mode; k between 4 and 6 (unverified in the paper). A BatchNorm gives mean and standard
    deviation (its bias and weight) of what leaves it; sums add both (an upper bound of the deviation); ReLU, pooling,
    padding, dropout, flattening and slicing pass them on. Use it before ``fold_batchnorm``, and pass the result
    as ``input_range``.

    Returns:
        By name of each Linear, Conv1d or Conv2d: the largest magnitude, and whether it can be negative. Layers whose
        input comes from no BatchNorm (the first) are missing: give these yourself.

    Raises:
        ValueError: when the model cannot be traced by torch.fx, or for k below 0.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
        >>> batchnorm_ranges(net, k=6)
        {'3': (6.0, False)}
    """
    if not 0 <= k < float("inf"):
        raise ValueError(f"k must be a number of standard deviations, finite and at least 0, got {k}")
    modules = dict(model.named_modules())
    known: dict[Any, tuple[float, float, bool]] = {}  # largest mean, largest mean + k std, can be negative
    found: dict[str, tuple[float, bool]] = {}
    unknown: set[str] = set()
    passing = (
        nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Flatten,
        nn.Identity, nn.ReLU, nn.ReLU6,
    )  # fmt: skip
    for node in _traced(model).nodes:
        sources = [known.get(arg) for arg in node.all_input_nodes]
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_module":
            module = modules[node.target]
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
                mean, std = module.bias.detach().abs(), module.weight.detach().abs()
                known[node] = float(mean.max()), float((mean + k * std).max()), True
            elif is_quantizable(module) and (not sources or sources[0] is None):
                unknown.add(node.target)
            elif is_quantizable(module) and sources[0] is not None:
                # a layer that stands in several places takes the widest of their ranges
                largest, negative = found.get(node.target, (0.0, False))
                found[node.target] = max(largest, sources[0][1]), negative or sources[0][2]
            elif isinstance(module, passing) and sources and sources[0] is not None:
                relu = isinstance(module, (nn.ReLU, nn.ReLU6))
                known[node] = (*sources[0][:2], sources[0][2] and not relu)
        elif sources and all(s is not None for s in sources):
            given = [s for s in sources if s is not None]
            if name in ("add", "iadd", "add_"):
                known[node] = sum(s[0] for s in given), sum(s[1] for s in given), any(s[2] for s in given)
            elif name in ("relu", "relu_"):
                known[node] = (*given[0][:2], False)
            elif name in ("getitem", "pad", "mean", "flatten", "view", "reshape", "max_pool2d", "avg_pool2d"):
                known[node] = given[0]
    return {name: some for name, some in found.items() if name not in unknown}
