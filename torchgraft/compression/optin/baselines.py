"""The scores that OPTIN is compared with: weights, activations, first-order Fisher information, chance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.compression.optin.blocks import (
    PrunableSpec,
    call,
    channel_axis,
    evaluating,
    find_blocks,
    first_tensor,
    resolve,
    trackable,
    width_in,
)
from torchgraft.compression.optin.scoring import OptinScores

__all__ = ["baseline_scores"]


def _in_order(model: nn.Module, batch: Any, specs: Sequence[PrunableSpec]) -> tuple[PrunableSpec, ...]:
    blocks = resolve(model, specs)
    order: list[int] = []
    with torch.no_grad(), ExitStack() as stack:
        for i, block in enumerate(blocks):
            stack.callback(block.feature.register_forward_hook(lambda m, a, o, i=i: order.append(i)).remove)
        call(model, batch)
    if sorted(order) != list(range(len(specs))):
        raise ValueError(f"each of {len(specs)} blocks must run exactly once in one forward pass, got {order}")
    return tuple(specs[i] for i in order)


def baseline_scores(
    model: nn.Module,
    batch: Any,
    kind: Literal["magnitude", "activation", "fisher", "random"],
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    blocks: Sequence[PrunableSpec] | None = None,
) -> OptinScores:
    """Scores by a simpler rule, in the form that ``search_masks`` takes.

    Args:
        model, batch, blocks: as in ``optin_scores``.
        kind: ``magnitude``: sum of absolute weights that read the unit (L1). ``activation``: L2 norm of the unit's
            activations. ``fisher``: squared gradient of the training loss with respect to a mask on the unit, summed
            over examples (Kwon et al. 2022); needs ``labels``. ``random``: uniform.
        labels: class of every example, for ``fisher``.
        seed: of ``random``.

    Raises:
        ValueError: for another kind, or ``fisher`` without labels.
    """
    if kind not in ("magnitude", "activation", "fisher", "random"):
        raise ValueError(f"kind must be 'magnitude', 'activation', 'fisher' or 'random', got {kind!r}")
    if kind == "fisher" and labels is None:
        raise ValueError("kind='fisher' needs labels")
    specs = tuple(blocks) if blocks is not None else find_blocks(model)
    generator = torch.Generator().manual_seed(seed)
    examples = len(first_tensor(batch))
    scores: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), ExitStack() as stack:
        batch = trackable(batch)
        specs = _in_order(model, batch, specs)
        found = resolve(model, specs)
        taken: dict[tuple[int, str], Tensor] = {}
        inputs: dict[tuple[int, str], Tensor] = {}
        places = [(i, k) for i, b in enumerate(found) for k in ("heads", "neurons") if b.count(k)]
        if kind in ("activation", "fisher"):
            for i, k in places:

                def watch(module: nn.Module, args: tuple[Any, ...], at: tuple[int, str] = (i, k)) -> tuple[Any, ...]:
                    # a fresh leaf would cut the graph, so the watched tensor is a sum with zeros that need a gradient
                    slack = torch.zeros_like(args[0], requires_grad=True)
                    taken[at] = slack
                    inputs[at] = args[0].detach()
                    return (args[0] + slack, *args[1:])

                stack.callback(found[i].consumer(k).register_forward_pre_hook(watch).remove)
            out = call(model, batch)
        gradients: dict[tuple[int, str], Tensor] = {}
        if kind == "fisher":
            logits = out if isinstance(out, Tensor) else out.logits
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")  # type: ignore[union-attr]
            gradients = dict(zip(taken, torch.autograd.grad(loss, list(taken.values())), strict=True))
        for i, block in enumerate(found):
            for k in ("heads", "neurons"):
                count = block.count(k)
                if not count:
                    scores[k].append(torch.zeros(0))
                    continue
                module = block.consumer(k)
                size = width_in(module, k) // count
                if kind == "random":
                    scores[k].append(torch.rand(count, generator=generator))
                elif kind == "magnitude":
                    weight: Any = module.weight
                    axis = 0 if type(module).__name__ == "Conv1D" else 1
                    per_feature = weight.detach().float().abs().movedim(axis, 0).flatten(1).sum(1)
                    scores[k].append(per_feature.view(count, size).sum(1).cpu())
                else:
                    h = inputs[i, k]
                    x = (h * gradients[i, k] if kind == "fisher" else h.square()).float()
                    x = x.movedim(channel_axis(module), -1).reshape(examples, -1, count, size).sum((1, 3))
                    scores[k].append((x.square().sum(0) if kind == "fisher" else x.sum(0).sqrt()).detach().cpu())
    passes = {"magnitude": (1, 0), "activation": (2, 0), "fisher": (2, 1), "random": (1, 0)}[kind]
    official = 2 + sum(b.heads + b.width for b in found)
    targets = tuple(k for k in ("heads", "neurons") if any(len(s) for s in scores[k]))
    return OptinScores(tuple(scores["heads"]), tuple(scores["neurons"]), tuple(specs), {}, *passes, official, targets)
