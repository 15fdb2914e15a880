"""What training removes or rounds by itself: heads with learned L0 gates, weights of a few values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchgraft import surgery

__all__ = ["L0HeadGates", "finish_low_bits", "low_bit_weights"]

# the hard concrete distribution of Louizos et al. (2018): temperature, and how far it is stretched beyond 0 and 1
_BETA, _LOW, _HIGH = 2 / 3, -0.1, 1.1


class L0HeadGates(nn.Module):
    """A gate on every head that training can close, under a price on open ones (Louizos et al. 2018; Voita et al.).

    A gate is hard concrete: z = clamp(1.2 s - 0.1, 0, 1) with s = sigmoid((log u - log(1 - u) + log a) / beta), u
    uniform, one draw for each sample of the batch; in eval mode s = sigmoid(log a). ``penalty`` is the expected number
    of gates that are not 0, sum sigmoid(log a - beta log(0.1 / 1.1)): train ``loss + price * gates.penalty()`` with the
    parameters of model and gates together. Samples are drawn, and gates are trained, in train mode of *this* module.

    Args:
        outputs: the output projection of each attention, by a name of yours; its inputs are the heads' values in a row.
        heads: heads of each.
        open: chance of a gate to be not 0 at the start.

    Raises:
        ValueError: for no projections, heads that do not divide their inputs, or ``open`` out of range.

    Example:
        >>> out = nn.Linear(8, 8)
        >>> gates = L0HeadGates({"layer 0": out}, heads=2)
        >>> out(torch.randn(3, 5, 8)).shape, gates.penalty().shape
        (torch.Size([3, 5, 8]), torch.Size([]))
        >>> _ = gates.bake()
    """

    def __init__(self, outputs: Mapping[str, nn.Linear], heads: int, open: float = 0.9) -> None:
        super().__init__()
        if not outputs:
            raise ValueError("outputs must not be empty")
        if not 0 < open < 1:
            raise ValueError(f"open must lie between 0 and 1, got {open}")
        for name, layer in outputs.items():
            if heads < 1 or layer.in_features % heads:
                raise ValueError(f"heads must divide the {layer.in_features} inputs of {name!r}, got {heads}")
        self.names, self.heads = list(outputs), heads
        start = math.log(open / (1 - open)) + _BETA * math.log(-_LOW / _HIGH)
        first = next(iter(outputs.values())).weight
        self.log_alpha = nn.Parameter(torch.full((len(outputs), heads), start, device=first.device))
        # not modules of this one: they belong to the model
        self._layers = tuple(outputs.values())
        self._hooks = [layer.register_forward_pre_hook(self._gate(i)) for i, layer in enumerate(self._layers)]

    def _gate(self, row: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            z = self.gates(len(x))[:, row] if self.training else self.gates()[row]
            z = z.view(*z.shape[:-1], *[1] * (x.ndim - z.ndim), self.heads, 1)
            return ((x.unflatten(-1, (self.heads, -1)) * z.to(x)).flatten(-2),)

        return hook

    def gates(self, samples: int | None = None) -> Float[Tensor, "*S L H"]:
        """What stands for a draw in eval mode, (layers, heads); or ``samples`` draws."""
        a: Tensor = self.log_alpha
        if samples is not None:
            u = torch.rand(samples, *a.shape, device=a.device).clamp(1e-6, 1 - 1e-6)
            a = (u.logit() + a) / _BETA
        return (a.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def penalty(self) -> Float[Tensor, ""]:
        """Expected number of gates that are not 0."""
        return (self.log_alpha - _BETA * math.log(-_LOW / _HIGH)).sigmoid().sum()

    def remove(self) -> None:
        """Take the gates off; the model computes as without them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def bake(self) -> list[tuple[str, int]]:
        """Multiply the gates of eval mode into the projections and take them off.

        Returns:
            Name and head of each that is closed; ``torchgraft.compression.optin`` cuts heads out of the tensors.
        """
        found = self.gates()
        for layer, row in zip(self._layers, found, strict=True):
            layer.weight.unflatten(1, (self.heads, -1)).mul_(row[:, None].to(layer.weight))
        self.remove()
        return [(self.names[i], int(head)) for i, head in (found == 0).nonzero().tolist()]


class _Ternary(nn.Module):
    """Signs of the weights above 0.7 of their mean size, times the mean size of those (Li et al. 2016, TernaryBERT)."""

    def forward(self, weight: Tensor) -> Tensor:
        size = weight.detach().abs()
        kept = size > 0.7 * size.mean(1, keepdim=True)
        scale = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        return scale * weight.detach().sign() * kept + (weight - weight.detach())


class _Binary(nn.Module):
    """Signs of the weights times their mean size (Rastegari et al. 2016, BinaryBERT)."""

    def forward(self, weight: Tensor) -> Tensor:
        fixed = weight.detach()
        scale = fixed.abs().mean(1, keepdim=True)
        return torch.where(fixed < 0, -scale, scale) + (weight - fixed)


class _LearnedStep(nn.Module):
    """Integers of ``bits`` bits times a step that is trained (LSQ, Esser et al. 2020)."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        size = weight.detach().abs().mean(1, keepdim=True)
        # outputs whose weights are all 0 have no size of their own: that of the layer, or of a fresh one
        usual = size.mean() if bool(size.any()) else size.new_tensor(1 / math.sqrt(weight.shape[1]))
        self.step = nn.Parameter(2 * torch.where(size > 0, size, usual) / math.sqrt(self.high))

    def forward(self, weight: Tensor) -> Tensor:
        # the step's gradient is scaled so that it moves as fast, relative to its size, as the weights (section 2.2)
        share = 1 / math.sqrt(weight.shape[1] * self.high)
        step = self.step * share + (self.step * (1 - share)).detach()
        inside = (weight / step).clamp(self.low, self.high)
        return (inside.detach().round() + (inside - inside.detach())) * step


def low_bit_weights(model: nn.Module, target: surgery.Target = nn.Linear, bits: int | str = "ternary") -> int:
    """Train with weights of a few values: the forward pass sees them rounded, gradients pass straight through.

    Quantisation for speed is torchao's part (its int8 and int4 kernels, its QAT); this is for the values that the
    survey lists and torchao has no training for. Scales, and steps of LSQ, are one for each output.

    Args:
        model: changed in place by ``torch.nn.utils.parametrize``; make the optimiser afterwards.
        target: which linear layers, as in ``torchgraft.surgery``.
        bits: ``"binary"``, ``"ternary"``, or 2 to 8 for a learned step (LSQ).

    Returns:
        How many layers.

    Raises:
        NothingMatchedError: when nothing matched.
        TypeError: when something that matched is no linear layer.
        ValueError: for other ``bits``, or weights that are rounded or masked already.

    Example:
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> low_bit_weights(model, nn.Linear, "ternary")
        1
        >>> finish_low_bits(model)
        >>> [len(row.abs().unique()) <= 2 for row in model[0].weight]
        [True, True, True, True]
    """
    if bits not in ("binary", "ternary") and not (isinstance(bits, int) and 2 <= bits <= 8):
        raise ValueError(f"bits must be 'binary', 'ternary' or 2 to 8, got {bits!r}")
    found = [match.module for match in surgery.find(model, target)]
    if not found:
        raise surgery.NothingMatchedError(f"nothing in {type(model).__name__} matched {target!r}")
    chosen = [module for module in found if isinstance(module, nn.Linear)]
    for module in found:
        if not isinstance(module, nn.Linear):
            raise TypeError(f"target must match linear layers only, got {type(module).__name__}")
    if any(parametrize.is_parametrized(module, "weight") for module in chosen):
        raise ValueError("model has parametrized weights already, rounded or masked; finish that first")
    for module in chosen:
        rounded: nn.Module = (
            _LearnedStep(module.weight.detach(), bits)
            if isinstance(bits, int)
            else {"binary": _Binary, "ternary": _Ternary}[bits]()
        )
        parametrize.register_parametrization(module, "weight", rounded)
    return len(chosen)


def finish_low_bits(model: nn.Module) -> None:
    """Leave the rounded values as plain weights.

    Raises:
        ValueError: when no weight of the model is rounded.
    """
    rounded = (_Binary, _Ternary, _LearnedStep)
    found = [
        m for m in model.modules()
        if parametrize.is_parametrized(m, "weight") and isinstance(m.parametrizations["weight"][0], rounded)  # type: ignore[index]
    ]  # fmt: skip
    if not found:
        raise ValueError("model has no weights of low_bit_weights")
    for module in found:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
