"""Lottery tickets by iterative magnitude pruning with rewinding, their controls, and weight quantisation.

Masks are plain dictionaries from the name of a weight (``"layer1.0.conv1.weight"``) to a boolean tensor of its shape,
True where the weight is kept. Zeros in a dense tensor do not make dense kernels any faster: this is about what pruning
does to a model, and about storing it.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

Scope = Literal["global", "layer"]
Masks = dict[str, Tensor]
Weights = Mapping[str, Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def prunable_weights(
    model: nn.Module, *, skip_first_conv: bool = True, include_linear: bool = True
) -> dict[str, nn.Module]:
    """Names of the weights that pruning looks at, with the modules that hold them; no biases, no norms.

    Args:
        model: any module.
        skip_first_conv: leave out the first convolution, as the paper's count of sparsity does.
        include_linear: take linear layers besides convolutions.

    Returns:
        ``{"name.weight": module}``, in the order of the model.

    Raises:
        ValueError: when there are none, two modules share one weight (pruning would part them), or a weight is not a
            plain parameter (lazy, or computed by a parametrisation).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Linear(2, 5))
        >>> list(prunable_weights(net)), list(prunable_weights(net, include_linear=False))
        (['2.weight', '3.weight'], ['2.weight'])
    """
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, _CONVOLUTIONS)]
    first = convolutions[0][1] if convolutions and skip_first_conv else None
    kinds = (*_CONVOLUTIONS, nn.Linear) if include_linear else _CONVOLUTIONS
    found: dict[str, nn.Module] = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not first
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no convolution or linear layer to prune with "
            f"skip_first_conv={skip_first_conv} and include_linear={include_linear}"
        )
    owners: dict[int, str] = {}
    for name, module in found.items():
        weight = module._parameters.get("weight_orig", module._parameters.get("weight"))
        if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{name!r} is not a plain parameter; run a lazy layer once, or remove its parametrisation first"
            )
        key = id(weight)
        if key in owners:
            raise ValueError(f"{owners[key]!r} and {name!r} are one tied parameter; untie them before pruning")
        owners[key] = name
    return found


class SparsityReport(NamedTuple):
    """How many weights are not zero: ``layers`` maps the name of a weight to ``(kept, total)``."""

    layers: dict[str, tuple[int, int]]

    @property
    def total(self) -> int:
        """Weights counted."""
        return sum(total for _, total in self.layers.values())

    @property
    def kept(self) -> float:
        """Share of them that is not zero."""
        return sum(kept for kept, _ in self.layers.values()) / self.total

    @property
    def sparsity(self) -> float:
        """Share of them that is zero."""
        return 1 - self.kept

    def __str__(self) -> str:
        lines = [f"{name}: {kept:,} of {total:,} ({kept / total:.1%})" for name, (kept, total) in self.layers.items()]
        return "\n".join([*lines, f"kept {self.kept:.2%} of {self.total:,} weights"])


def sparsity_report(model: nn.Module, *, skip_first_conv: bool = True, include_linear: bool = True) -> SparsityReport:
    """Count the weights that are not zero, layer by layer.

    With ``include_linear=False`` this is the official count (convolutions without the first).

    Args:
        model: pruned or not; a pruning of torch that is still active counts as applied.
        skip_first_conv, include_linear: as in ``prunable_weights``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
        >>> masks = magnitude_prune(net, kept=0.25)
        >>> sparsity_report(net).kept
        0.25
    """
    found = prunable_weights(model, skip_first_conv=skip_first_conv, include_linear=include_linear)
    layers = {}
    for name, module in found.items():
        weight = _effective(module)
        layers[name] = (int(weight.count_nonzero()), weight.numel())
    return SparsityReport(layers)


def _effective(module: nn.Module) -> Tensor:
    """The weight as the next forward will use it (``module.weight`` is that of the last forward while pruning)."""
    with torch.no_grad():
        if "weight_orig" in module._parameters:
            return module.weight_orig * module.weight_mask  # type: ignore[operator]
        return module.weight.detach()  # type: ignore[operator]


def _check_finite(found: Mapping[str, nn.Module]) -> None:
    for name, module in found.items():
        if not bool(_effective(module).isfinite().all()):
            raise ValueError(f"{name!r} has values that are not finite; their magnitudes say nothing")


def _check_masks(model: nn.Module, masks: Weights) -> dict[str, nn.Module]:
    if not masks:
        raise ValueError("masks is empty")
    owners: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        path, _, last = name.rpartition(".")
        module = modules.get(path)
        held = None if module is None else module._parameters.get(last, module._parameters.get(f"{last}_orig"))
        if module is None or held is None or last != "weight":
            weights = [f"{n}.weight" for n, m in modules.items() if "weight" in m._parameters]
            near = difflib.get_close_matches(name, weights, 1)
            hint = f"did you mean {near[0]!r}?" if near else "rename the keys to those of the model's state dict"
            raise ValueError(f"masks has the key {name!r}, but {type(model).__name__} has no such weight; {hint}")
        if mask.shape != held.shape:
            raise ValueError(f"the mask {name!r} has shape {tuple(mask.shape)}, its weight {tuple(held.shape)}")
        if mask.is_floating_point() and bool(mask.isnan().any()):
            raise ValueError(f"the mask {name!r} has NaN in it; the file is damaged")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"the mask {name!r} must be of 0 and 1 only, got {float(mask.min())}..{float(mask.max())}")
        owners[name] = module
    return owners


def apply_masks(model: nn.Module, masks: Weights, *, permanent: bool = True) -> None:
    """Put pruned weights to zero in place, as the official code does when it loads a ticket.

    Args:
        model: changed in place.
        masks: by name of the weight, 0/1 or boolean. Official files prefix names with ``"model."``: pass
            ``{name.removeprefix("model."): mask …}``.
        permanent: only multiply. Otherwise torch's pruning stays active, so that training keeps the zeros (parameters
            are then named ``weight_orig``; make the optimiser afterwards); ``make_permanent`` ends it.

    Raises:
        ValueError: for keys that the model does not have, other shapes, NaN, and values besides 0 and 1. The model is
            then as it was.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> apply_masks(net, {"weight": torch.tensor([[1.0, 0.0]])})
        >>> net.weight[0, 1].item() == 0
        True
    """
    for name, module in _check_masks(model, masks).items():
        prune.custom_from_mask(module, "weight", masks[name].to(_effective(module)))
    if permanent:
        make_permanent(model)


def make_permanent(model: nn.Module) -> None:
    """End every active pruning of torch in place: weights are plain parameters again, with their zeros."""
    for module in model.modules():
        if "weight_orig" in module._parameters:
            prune.remove(module, "weight")


def _ranked(found: Mapping[str, nn.Module], scope: Scope, share: float) -> Masks:
    """Masks after torch's pruning has taken the share of the least magnitude of what is left.

    It works on contiguous copies: torch's global pruning fails on weights that are channels_last.
    """
    _check_finite(found)
    copies = {}
    for name, module in found.items():
        copies[name] = nn.Module()
        copies[name].weight = nn.Parameter(_effective(module).contiguous())
        if "weight_mask" in module._buffers:
            prune.custom_from_mask(copies[name], "weight", module.weight_mask.contiguous())  # type: ignore[operator]
    for group in [list(copies.values())] if scope == "global" else [[copy] for copy in copies.values()]:
        prune.global_unstructured([(copy, "weight") for copy in group], prune.L1Unstructured, amount=share)
    masks = {name: copy.weight_mask.bool() for name, copy in copies.items()}  # type: ignore[operator]
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        warnings.warn(f"no weight is left of {', '.join(empty)}; keep more, or use scope='layer'", stacklevel=3)
    return masks


def _check_scope(scope: str) -> None:
    if scope not in get_args(Scope):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")


def magnitude_prune(
    model: nn.Module,
    kept: float,
    *,
    scope: Scope = "global",
    skip_first_conv: bool = True,
    include_linear: bool = True,
) -> Masks:
    """One-shot pruning in place: keep the weights of the greatest magnitude, without retraining.

    Args:
        model: changed in place.
        kept: share of the weights to keep, above 0.
        scope: rank all weights together, or in each layer alone.
        skip_first_conv, include_linear: as in ``prunable_weights``.

    Returns:
        The masks.

    Raises:
        ValueError: for a share outside (0, 1] or one that keeps no weight at all, and weights that are not finite.

    Warns:
        UserWarning: when a layer loses all its weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
        >>> sum(int(mask.sum()) for mask in magnitude_prune(net, kept=0.3).values())
        12
    """
    _check_scope(scope)
    if not 0 < kept <= 1:
        raise ValueError(f"kept must be a share in (0, 1], got {kept}")
    found = prunable_weights(model, skip_first_conv=skip_first_conv, include_linear=include_linear)
    _check_finite(found)
    total = sum(_effective(module).numel() for module in found.values())
    if round(total * kept) < 1:
        raise ValueError(f"kept={kept} would leave none of {total} weights; keep more")
    make_permanent(model)
    masks = _ranked(found, scope, 1.0 - kept)
    apply_masks(model, masks)
    return masks


def random_masks(masks: Weights, seed: int, scope: Scope = "layer") -> Masks:
    """A control for a ticket: masks of the same sparsity at random places.

    Args:
        masks: of the ticket.
        seed: of the places.
        scope: ``"layer"`` keeps how many weights each layer has, ``"global"`` only how many there are in all.

    Returns:
        New masks.

    Example:
        >>> shuffled = random_masks({"weight": torch.tensor([[True, False, False, False]])}, seed=0)
        >>> int(shuffled["weight"].sum())
        1
    """
    _check_scope(scope)
    if not masks:
        raise ValueError("masks is empty")
    generator = torch.Generator().manual_seed(seed)

    def shuffle(flat: Tensor) -> Tensor:
        return flat[torch.randperm(len(flat), generator=generator).to(flat.device)]

    if scope == "layer":
        return {name: shuffle(mask.bool().flatten()).view_as(mask) for name, mask in masks.items()}
    whole = shuffle(torch.cat([mask.bool().flatten() for mask in masks.values()]))
    parts = whole.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


@dataclass(frozen=True)
class Ticket:
    """A trained sparse network.

    Attributes:
        round: of pruning; 0 is the dense network.
        masks: True where a weight is kept; empty for the dense network.
        state: its trained weights and buffers, with names as in the unpruned model, zeros where pruned.
        kept: share of the prunable weights that is kept.
        result: what ``train`` returned.
    """

    round: int
    masks: Masks
    state: dict[str, Tensor]
    kept: float
    result: Any = None


def _plain(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model under pruning, as it would be without: ``weight`` for ``weight_orig * weight_mask``."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if "weight_orig" in module._parameters:
            dot = f"{name}." if name else ""
            del state[f"{dot}weight_orig"], state[f"{dot}weight_mask"]
            state[f"{dot}weight"] = _effective(module).clone()
    return state


def _check_state(expected: Weights, state: Weights) -> None:
    if state.keys() != expected.keys():
        odd = sorted(state.keys() ^ expected.keys())
        raise ValueError(f"rewind_to must have the keys of model.state_dict(); they differ in {', '.join(odd[:4])}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"rewind_to has {name!r} of shape {tuple(value.shape)}, the model {tuple(expected[name].shape)}"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"rewind_to has numbers in {name!r} that are not finite")


def lottery_ticket(
    model: nn.Module,
    train_fn: Callable[[nn.Module], Any],
    rounds: int,
    rate: float = 0.2,
    rewind_to: Weights | None = None,
    scope: Scope = "global",
    *,
    skip_first_conv: bool = True,
    include_linear: bool = True,
    keep: Callable[[int], bool] = lambda round: True,
) -> list[Ticket]:
    """Iterative magnitude pruning with rewinding (Frankle et al., ICML 2020), on torch's own pruning.

    Train; then, ``rounds`` times, mask the share ``rate`` of the remaining weights that has the least magnitude, put
    the others back to ``rewind_to``, and train again. After ``k`` rounds ``(1 - rate) ** k`` of the weights are kept.

    Args:
        model: trained in place; in the end it is the last ticket, with plain weights.
        train_fn: ``train_fn(model)`` trains the model in place, to the end. It must make its optimiser anew each time,
            since pruned layers have ``weight_orig`` for ``weight``; pruned weights stay zero whatever it does.
        rounds: how many.
        rate: share that each round takes away.
        rewind_to: the early state, for instance after 1 to 5 % of training, as a copy of ``model.state_dict()``; every
            training starts from it, the first too. ``None`` never rewinds: each round goes on from the trained weights
            (fine-tuning, the control).
        scope: rank all weights together, or in each layer alone.
        skip_first_conv, include_linear: as in ``prunable_weights``.
        keep: which rounds to return; the others are made but forgotten, to save memory.

    Returns:
        The tickets that ``keep`` wants, round 0 being the dense network.

    Raises:
        ValueError: for a rate outside (0, 1), a state of another model, a round that would leave nothing, and weights
            that are not finite after training.

    Warns:
        UserWarning: when a layer loses all its weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 2))
        >>> early = {name: value.clone() for name, value in net.state_dict().items()}
        >>> tickets = lottery_ticket(net, lambda model: None, rounds=2, rewind_to=early)
        >>> [round(ticket.kept, 2) for ticket in tickets]
        [1.0, 0.8, 0.64]
    """
    _check_scope(scope)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not 0 < rate < 1:
        raise ValueError(f"rate must be a share in (0, 1), got {rate}")
    found = prunable_weights(model, skip_first_conv=skip_first_conv, include_linear=include_linear)
    total = sum(_effective(module).numel() for module in found.values())
    if round(total * (1 - rate) ** rounds) < 1:
        raise ValueError(f"{rounds} rounds at rate {rate} would leave none of {total} weights; take fewer rounds")
    if rewind_to is not None:
        _check_state(_plain(model), rewind_to)
        rewind_to = {name: value.detach().clone() for name, value in rewind_to.items()}
    make_permanent(model)
    if rewind_to is not None:
        model.load_state_dict(rewind_to)

    tickets = []
    try:
        for number in range(rounds + 1):
            masks: Masks = {}
            if number:
                masks = _ranked(found, scope, rate)
                make_permanent(model)
                if rewind_to is not None:
                    model.load_state_dict(rewind_to)
                apply_masks(model, masks, permanent=False)
            result = train_fn(model)
            if keep(number):
                kept = sum(int(m.sum()) for m in masks.values()) / total if number else 1.0
                tickets.append(Ticket(number, masks, _plain(model), kept, result))
    finally:
        make_permanent(model)
    return tickets


class QuantizedWeight(NamedTuple):
    """What became of one weight: ``scale`` of each output channel (or one), largest change in units of the scale."""

    scale: Tensor
    error: float


def quantize_weights(
    model: nn.Module,
    bits: int = 8,
    *,
    per_channel: bool = True,
    skip_first_conv: bool = False,
    include_linear: bool = True,
) -> dict[str, QuantizedWeight]:
    """Post-training quantisation of weights in place, simulated in floating point (later version of the paper).

    Symmetric, to whole numbers in ``-(2 ** (bits - 1) - 1)`` … ``2 ** (bits - 1) - 1`` times a scale that the largest
    magnitude sets, by torch's fake quantisation; zeros stay zeros, biases and activations stay as they are. It shows
    what quantisation does to accuracy and calibration and brings no speed; for that use torchao.

    Args:
        model: changed in place.
        bits: 2 to 8.
        per_channel: one scale per output channel instead of per tensor.
        skip_first_conv, include_linear: as in ``prunable_weights``.

    Returns:
        Scale and largest change by name of the weight.

    Raises:
        ValueError: for other bits, and weights that are not finite; the model is then as it was.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.27, 0.004]]))
        >>> _ = quantize_weights(net)
        >>> net.weight.data
        tensor([[1.2700, 0.0000]])
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must lie in 2..8, got {bits}")
    most = 2 ** (bits - 1) - 1
    found = prunable_weights(model, skip_first_conv=skip_first_conv, include_linear=include_linear)
    _check_finite(found)
    make_permanent(model)
    changed = {}
    for name, module in found.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        old = weight.detach()
        # transposed convolutions have their output channels second
        axis = 1 if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) else 0
        largest = old.abs().amax([d for d in range(old.ndim) if d != axis]) if per_channel else old.abs().amax()[None]
        # a channel of zeros has any scale
        scale = torch.where(largest > 0, largest / most, 1.0).float()
        whole = torch.zeros_like(scale, dtype=torch.int32)
        if per_channel:
            new = torch.fake_quantize_per_channel_affine(old.float(), scale, whole, axis, -most, most)
        else:
            new = torch.fake_quantize_per_tensor_affine(old.float(), scale, whole, -most, most)
        view = [-1 if d == axis else 1 for d in range(old.ndim)]
        error = float(((new - old).abs() / (scale.view(view) if per_channel else scale)).max())
        weight.data.copy_(new)
        changed[name] = QuantizedWeight(scale, error)
    return changed
