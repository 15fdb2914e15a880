"""Score, search and slice in one call; and the optional fit of what is left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchgraft import surgery
from torchgraft.compression.optin.blocks import PrunableSpec, call, evaluating, resolve, width_in
from torchgraft.compression.optin.cost import MacModel
from torchgraft.compression.optin.scoring import OptinConfig, OptinScores, optin_scores
from torchgraft.compression.optin.search import LatencyResult, PruneMasks, search_latency, search_masks
from torchgraft.compression.optin.slicing import apply_masks

__all__ = ["PruneReport", "prune", "seconds_per_batch", "tune_masks"]


@dataclass(frozen=True)
class PruneReport:
    """What was done.

    Attributes:
        masks: what is kept.
        scores: of all units.
        cost: of all units.
        parameters: before and after.
        latency: of a search by time, else None.
    """

    masks: PruneMasks
    scores: OptinScores
    cost: MacModel
    parameters: tuple[int, int]
    latency: LatencyResult | None = None

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [
            str(self.masks),
            f"{before:,} -> {after:,} parameters",
            f"scored in {self.scores.forward_passes:.0f} forward, {self.scores.backward_passes:.0f} backward passes; "
            f"the released code takes {self.scores.official_passes:,} forward passes",
        ]
        if self.latency is not None:
            ratio = self.latency.seconds / self.latency.dense_seconds
            lines.append(f"{self.latency.dense_seconds:.4f} s -> {self.latency.seconds:.4f} s a batch ({ratio:.2f})")
        return "\n".join(lines)


def seconds_per_batch(model: nn.Module, batch: Any, repeats: int = 5) -> float:
    """Median time of a forward pass in eval mode, after one that is not timed; CUDA is synchronised."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = []
    with surgery.evaluating(model), torch.inference_mode():
        for _ in range(repeats + 1):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            call(model, batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def prune(
    model: nn.Module,
    batch: Any,
    flop_ratio: float | None = None,
    *,
    latency_ratio: float | None = None,
    config: OptinConfig | None = None,
    seq_len: float | None = None,
    round_to: int = 1,
    per_operation: bool = False,
    tune: bool = False,
    blocks: Sequence[PrunableSpec] | None = None,
) -> tuple[nn.Module, PruneReport]:
    """A smaller copy of a trained model under a budget, without labels or training; the model itself is not touched.

    Args:
        model: trained; of a family that ``find_blocks`` knows, or described by ``blocks``.
        batch: one unlabelled batch, 128 examples in the paper; a mapping of keyword arguments or a tensor.
        flop_ratio: share of the multiply-accumulate operations to keep, in (0, 1].
        latency_ratio: instead: share of the measured time of a forward pass of ``batch``, on the model's device.
        config: of the scores.
        seq_len: tokens of an example in the cost model; by default those of ``batch``.
        round_to: hidden units in multiples of this; 8 or 16 suit matrix hardware.
        per_operation: rank units by score over cost, for networks whose blocks differ in cost (see ``search_masks``).
        tune: rescale the kept units, block by block, so that the outputs of every block are closest to before
            (an extension: least squares on ``batch``, see ``tune_masks``).
        blocks: where the units are.

    Returns:
        The sliced copy, in the mode the model is in, and a report.

    Raises:
        ValueError: when not exactly one budget is given, or it lies outside (0, 1], and as in ``optin_scores``.
        BudgetError: for a budget that cannot be met; says the nearest that can.
    """
    if (flop_ratio is None) == (latency_ratio is None):
        raise ValueError("give flop_ratio or latency_ratio, one of the two")
    ratio = flop_ratio if flop_ratio is not None else latency_ratio
    assert ratio is not None
    if not 0 < ratio <= 1:
        name = "flop_ratio" if flop_ratio is not None else "latency_ratio"
        raise ValueError(f"{name} must lie above 0 and at most at 1, got {ratio}")
    scores = optin_scores(model, batch, config, blocks=blocks)
    cost = MacModel.from_model(model, seq_len, batch=None if seq_len is not None else batch, blocks=scores.blocks)
    latency = None
    if flop_ratio is not None:
        masks = search_masks(scores, cost, flop_ratio, round_to=round_to, per_operation=per_operation)
    else:

        def measure(masks: PruneMasks | None) -> float:
            return seconds_per_batch(model if masks is None else apply_masks(model, masks), batch)

        latency = search_latency(
            scores, cost, measure, latency_ratio=ratio, round_to=round_to, per_operation=per_operation
        )
        masks = latency.masks
    chosen = tune_masks(model, masks, batch) if tune else model
    made = apply_masks(chosen, masks)
    parameters = tuple(sum(p.numel() for p in m.parameters()) for m in (model, made))
    return made, PruneReport(masks, scores, cost, (parameters[0], parameters[1]), latency)


def _fit(inputs: Tensor, weight: Tensor, wanted: Tensor, groups: int, ridge: float) -> Tensor:
    """Factors of groups of input features with which a linear layer comes closest to ``wanted``.

    The normal equations need only products of features x features: the contributions of two features have the inner
    product of their activations times that of their weights.
    """
    x, w = inputs.double(), weight.double()
    gram = (x.T @ x) * (w.T @ w)
    target = ((wanted.double() @ w) * x).sum(0)
    size = len(target) // groups
    gram = gram.view(groups, size, groups, size).sum((1, 3))
    target = target.view(groups, size).sum(1)
    # pulled towards 1, where the data do not say otherwise
    weight_of_one = ridge * gram.diagonal().mean().clamp(min=1e-12)
    eye = torch.eye(groups, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + weight_of_one * eye, target + weight_of_one)


def tune_masks(model: nn.Module, masks: PruneMasks, batch: Any, *, ridge: float = 0.01) -> nn.Module:
    """A copy whose kept units are rescaled so that every block's outputs are closest to those of the whole model.

    An extension after Kwon et al. 2022, not part of OPTIN: block after block, attention before feed-forward, ridge
    regression towards 1 on one unlabelled batch. The factors are folded into the weights; slice the copy afterwards.

    Raises:
        ValueError: for masks of another model.
        TypeError: for convolutions.
    """
    tuned = apply_masks(model, masks, "mask")
    blocks = resolve(tuned, masks.blocks)
    if any(isinstance(m, nn.Conv2d) for block in blocks for m in (block.attention_out, block.ffn_out)):
        raise TypeError("tune_masks fits linear layers; convolutional networks are pruned without it")
    with torch.no_grad(), evaluating(model), evaluating(tuned):
        whole = resolve(model, masks.blocks)
        for i, block in enumerate(blocks):
            for kind, mask in (("heads", masks.heads[i]), ("neurons", masks.neurons[i])):
                if not len(mask) or bool(mask.all()) or not bool(mask.any()):
                    continue
                layer = block.consumer(kind)
                wanted = _taken(model, whole[i].consumer(kind), batch)[1]
                inputs = _taken(tuned, layer, batch)[0]
                conv1d = type(layer).__name__ == "Conv1D"
                stored = cast(Tensor, layer.weight)
                weight = stored.mT if conv1d else stored
                size = width_in(layer, kind) // len(mask)
                features = mask.repeat_interleave(size).to(weight.device)
                bias: Any = layer.bias if layer.bias is not None else 0.0
                factors = _fit(inputs[:, features], weight[:, features], wanted - bias, int(mask.sum()), ridge)
                weight[:, features] *= factors.repeat_interleave(size).to(weight.dtype)
    return tuned


def _taken(model: nn.Module, layer: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """What a layer takes and makes, as rows of tokens."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        hook = layer.register_forward_hook(lambda m, args, out: found.extend((args[0], out)))
        stack.callback(hook.remove)
        call(model, batch)
    return found[0].flatten(0, -2), found[1].flatten(0, -2)
