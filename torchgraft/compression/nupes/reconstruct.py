"""Learning codes and exponents of one block on calibration data, and the AdaRound baseline in the same loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchgraft.compression.nupes.layers import PowerLayer, float_weight, is_quantizable
from torchgraft.compression.nupes.quantizer import PowerDecode, PowerFakeQuantize, encode, largest_code, soft_round
from torchgraft.compression.nupes.search import rows_and_scales
from torchgraft.surgery import evaluating

__all__ = ["Call", "Reconstruction", "reconstruct_block"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of one call of a block, with one batch."""

FIRST_TEMPERATURE, LAST_TEMPERATURE, SOFT_SHARE = 1.0, 50.0, 0.8
LEAST_EXPONENT, LARGEST_EXPONENT = 0.1, 2.0
# AdaRound (arXiv 2004.10568): the stretched sigmoid, the weight of its regulariser, its exponent, its warm-up
ZETA, GAMMA, REGULARISER, FIRST_BETA, LAST_BETA, WARM_UP = 1.1, -0.1, 0.01, 20.0, 2.0, 0.2


def fresh(value: Any) -> Any:
    """Arguments with tensors of their own, so that a block that works in place leaves what is kept for the next call.

    Tensors in lists, tuples and dictionaries too; anything else as it is.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(fresh(v) for v in value)
    return {k: fresh(v) for k, v in value.items()} if type(value) is dict else value


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no cache of keys and values; restored at the end."""
    held: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    settings = {id(some): some for some in held if getattr(some, "use_cache", None)}
    for some in settings.values():
        some.use_cache = False
    try:
        with evaluating(model), torch.no_grad():
            yield
    finally:
        for some in settings.values():
            some.use_cache = True


@dataclass
class Reconstruction:
    """What the reconstruction of one block did.

    Attributes:
        losses: of every step, on its batch, with soft codes.
        start: loss of rounding to nearest on all calibration data.
        end: the same of what the block holds now: hard codes, as stored.
        learned: loss of the hardened result of learning; where it is above ``start``, rounding to nearest was kept.
        moved: share of codes that differ from rounding to nearest.
        moved_far: share that differ by more than one, which AdaRound cannot.
        exponents: by layer, after learning.
    """

    losses: list[float] = field(default_factory=list)
    start: float = math.nan
    end: float = math.nan
    learned: float = math.nan
    moved: float = 0.0
    moved_far: float = 0.0
    exponents: dict[str, list[float]] = field(default_factory=dict)


class _Latent:
    """What is learned of one layer, and the weight that it stands for."""

    def __init__(self, layer: PowerLayer, weight: Tensor, method: str, codes: bool, exponent: bool) -> None:
        self.layer, self.method, self.codes = layer, method, codes
        self.n = largest_code(layer.bits)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.x, _ = rows_and_scales(weight.detach().reshape(layer.shape[0], -1).to(wide), layer.group_size)
        self.scale = layer.scale.detach().to(wide)[..., None]
        self.a = layer.exponent.to(wide).view(-1, 1, 1).requires_grad_(exponent)
        z = encode(self.x, self.a.detach(), self.n, self.scale)
        if method == "adaround":
            # a weight on the last code has nowhere to round up to
            self.floor = z.floor().clamp(max=self.n - 1)
            rest = (z - self.floor).clamp(1e-4, 1 - 1e-4)
            self.z = -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)
        else:
            self.z = z
        self.z.requires_grad_(codes)

    def up(self) -> Tensor:
        """AdaRound's share of rounding up, 0 to 1."""
        return (torch.sigmoid(self.z) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def shaped(self, grouped: Tensor) -> Tensor:
        return grouped.flatten(1)[:, : self.layer.columns].reshape(self.layer.shape)

    def weight(self, temperature: float | None) -> Tensor:
        """The soft weight, or with hard rounding passed straight through where ``temperature`` is ``None``."""
        if not self.codes:
            return self.shaped(PowerFakeQuantize.apply(self.x, self.a, self.scale, self.n, True))
        if self.method == "adaround":
            r = self.floor + self.up()
        else:
            z = self.z.clamp(-self.n, self.n)
            r = z + (z.round() - z).detach() if temperature is None else soft_round(z, temperature)
        return self.shaped(PowerDecode.apply(r, self.a, self.scale, self.n))

    def hard(self) -> Tensor:
        """Whole codes (out, columns), int8."""
        with torch.no_grad():
            if not self.codes:
                # nearest on the grid of the exponent as it will be stored
                q = encode(self.x, self.a.float().to(self.x.dtype), self.n, self.scale).round()
            elif self.method == "adaround":
                q = self.floor + (self.up() >= 0.5)
            else:
                q = self.z.clamp(-self.n, self.n).round()
            return q.to(torch.int8).flatten(1)[:, : self.layer.columns]

    @torch.no_grad()
    def project(self) -> None:
        """Back into the ranges after a step."""
        self.a.clamp_(LEAST_EXPONENT, LARGEST_EXPONENT)
        if self.method != "adaround":
            self.z.clamp_(-self.n, self.n)


def first_tensor(output: Any) -> Tensor:
    """The hidden states of what a block returned."""
    found = (
        output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, Mapping) else output))
    )
    if not isinstance(found, Tensor):
        raise TypeError(f"a block must return a tensor first, got {type(found).__name__}")
    return found


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error summed over channels (dimension 1 of images, else the last), averaged over everything else."""
    channel = 1 if found.ndim == 4 else -1
    return (found - wanted).float().square().sum(channel).mean()


def as_calls(inputs: Tensor | Sequence[Tensor | Call], batch_size: int) -> list[Call]:
    """Calls of a block; a tensor is cut into batches."""
    parts = inputs.split(batch_size) if isinstance(inputs, Tensor) else inputs
    return [((part,), {}) if isinstance(part, Tensor) else part for part in parts]


def reconstruct_block(
    block_fp: nn.Module,
    block_q: nn.Module,
    inputs: Tensor | Sequence[Tensor | Call],
    steps: int = 2000,
    lr_codes: float = 1e-2,
    lr_exponent: float = 1e-3,
    *,
    targets: Sequence[Tensor] | None = None,
    method: Literal["nupes", "adaround"] = "nupes",
    learn_codes: bool = True,
    learn_exponent: bool = True,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Learn the codes and exponents of a block's quantized layers: minimise || Y - block_q(X) ||^2 over a few batches.

    NUPES (arXiv 2308.05600), data-driven mode. Each weight has a latent z, at first its code before rounding, free in
    -n..n; ``soft_round`` turns it into a code, from nearly the identity (temperature 1) to nearly rounding (50) over
    80 % of the steps, then hard rounding is passed straight through. A weight may so move by several codes, where
    AdaRound's moves by one. Exponents are learned beside, held to 0.1..2; scales are not (learned together with the
    exponent they drift). Adam, both rates on a cosine to zero. Schedules are this project's design, since the paper's
    could not be checked.

    ``method="adaround"`` is the baseline: the same data, steps, optimiser and grid, but only rounding up or down,
    with the published stretched sigmoid and regulariser.

    The result is what is stored: hard codes. Where their loss on all calibration data is above that of rounding to
    nearest, rounding to nearest is kept. Both blocks run in evaluation mode.

    Args:
        block_fp: the float block.
        block_q: the same block with quantized layers; changed in place.
        inputs: what the block receives in the quantized network: a tensor (N, …), or for each batch a tensor or
            ``(args, kwargs)``.
        steps: of the optimiser, each on one batch.
        lr_codes, lr_exponent: of Adam; codes in units of codes.
        targets: outputs to reach, one for each batch; ``None`` takes ``block_fp(inputs)``.
        method: ``"nupes"`` or ``"adaround"``.
        learn_codes, learn_exponent: what is learned; AdaRound learns no exponent.
        batch_size: where ``inputs`` is a tensor.
        seed: of the order of batches.
        progress: called with ``(done, steps)``.

    Raises:
        ValueError: when there is no quantized layer, nothing to learn, no batch or an empty one, or when ``block_fp``
            lacks a layer of ``block_q``.
        FloatingPointError: when the loss is not finite.
    """
    found, _ = reconstruct(
        block_fp, block_q, as_calls(inputs, batch_size), steps, lr_codes, lr_exponent, targets, method, learn_codes,
        learn_exponent, seed, progress,
    )  # fmt: skip
    return found


@torch.inference_mode(False)
def reconstruct(
    block_fp: nn.Module,
    block_q: nn.Module,
    calls: list[Call],
    steps: int,
    lr_codes: float,
    lr_exponent: float,
    targets: Sequence[Tensor] | None,
    method: Literal["nupes", "adaround"],
    learn_codes: bool,
    learn_exponent: bool,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Reconstruction, list[Tensor]]:
    """``reconstruct_block``, and what the block puts out now on each batch."""
    layers = {name: module for name, module in block_q.named_modules() if isinstance(module, PowerLayer)}
    if not layers:
        raise ValueError(f"block_q ({type(block_q).__name__}) has no quantized layer; use quantize_model first")
    learn_exponent = learn_exponent and method != "adaround"
    if not (learn_codes or learn_exponent):
        raise ValueError("nothing to learn: learn_codes and learn_exponent are both off")
    if not calls or steps < 1:
        raise ValueError(f"reconstruction needs inputs and at least one step, got {len(calls)} batches, {steps} steps")
    floats = dict(block_fp.named_modules())
    for name, layer in layers.items():
        held = float_weight(floats[name]) if name in floats and is_quantizable(floats[name]) else None
        if held is None or held.shape != layer.shape:
            raise ValueError(
                f"block_fp must hold the float layer of {name!r}, a weight of {layer.shape}, got "
                f"{None if held is None else tuple(held.shape)}; give the block that block_q was quantized from"
            )
    latents = {
        name: _Latent(layer, float_weight(floats[name]), method, learn_codes, learn_exponent)
        for name, layer in layers.items()
    }
    if targets is None:
        with still(block_fp):
            targets = _outputs(block_fp, calls)
    wanted = list(targets)
    if len(wanted) != len(calls) or not all(y.numel() for y in wanted):
        raise ValueError(f"targets has {len(wanted)} batches, inputs {len(calls)}, and none may be empty")
    nearest = {name: (layer.signed_codes(), layer.exponent) for name, layer in layers.items()}
    before = _stored_outputs(block_q, layers, calls)
    result = Reconstruction(start=_loss(before, wanted))
    groups: list[dict[str, Any]] = []
    if learn_codes:
        groups.append({"params": [latent.z for latent in latents.values()], "lr": lr_codes})
    if learn_exponent:
        groups.append({"params": [latent.a for latent in latents.values()], "lr": lr_exponent})
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    order = torch.Generator().manual_seed(seed)
    places: list[int] = []

    def take(step: int) -> None:
        places[:] = places or torch.randperm(len(calls), generator=order).tolist()
        (args, kwargs), y = calls[at := places.pop()], wanted[at]
        share = step / steps
        ratio = LAST_TEMPERATURE / FIRST_TEMPERATURE
        temperature = FIRST_TEMPERATURE * ratio ** (share / SOFT_SHARE) if share < SOFT_SHARE else None
        for name, layer in layers.items():
            layer.learning = latents[name].weight(temperature)
        loss = _distance(first_tensor(block_q(*fresh(args), **fresh(kwargs))), y)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the reconstruction loss is {value} at step {step}; lower the learning rates")
        result.losses.append(value)
        if method == "adaround" and share >= WARM_UP:
            loss = loss + REGULARISER * _regulariser(latents.values(), (share - WARM_UP) / (1 - WARM_UP))
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
        optimizer.step()
        schedule.step()
        for latent in latents.values():
            latent.project()

    try:
        with still(block_q), torch.enable_grad():
            for step in range(steps):
                take(step)
                if progress is not None:
                    progress(step + 1, steps)
    finally:
        for layer in layers.values():
            layer.learning = None

    for name, layer in layers.items():
        layer.assign(latents[name].hard(), layer.scale, latents[name].a.detach().flatten())
    after = _stored_outputs(block_q, layers, calls)
    result.learned = result.end = _loss(after, wanted)
    if not result.learned <= result.start:
        for name, layer in layers.items():
            layer.assign(nearest[name][0], layer.scale, nearest[name][1])
        result.end, after = result.start, before
    change = torch.cat([(layers[k].signed_codes() - q).abs().flatten() for k, (q, _) in nearest.items()])
    result.moved, result.moved_far = float((change > 0).float().mean()), float((change > 1).float().mean())
    result.exponents = {name: layer.exponent.tolist() for name, layer in layers.items()}
    return result, after


def _outputs(block: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    return [first_tensor(block(*fresh(args), **fresh(kwargs))) for args, kwargs in calls]


def _stored_outputs(block: nn.Module, layers: Mapping[str, PowerLayer], calls: Sequence[Call]) -> list[Tensor]:
    """Outputs of the block with its codes as stored, each weight decoded once."""
    with still(block):
        for layer in layers.values():
            layer.learning = layer.dequantized_weight()
        try:
            return _outputs(block, calls)
        finally:
            for layer in layers.values():
                layer.learning = None


def _loss(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return float(torch.stack([_distance(y, z) for y, z in zip(found, wanted, strict=True)]).mean())


def _regulariser(latents: Any, share: float) -> Tensor:
    beta = FIRST_BETA + (LAST_BETA - FIRST_BETA) * share
    return sum((1 - (2 * latent.up() - 1).abs().pow(beta)).sum() for latent in latents)
