"""Fewer patches in vision transformers: score every patch position, choose a number per block, merge the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from torchgraft.compression.optin.blocks import PrunableSpec, call, evaluating, find_blocks, resolve
from torchgraft.compression.optin.losses import kl_loss, patch_loss
from torchgraft.compression.optin.scoring import (
    OptinConfig,
    Session,
    answering,
    balance,
    keep_output,
    model_output,
    repeat,
)
from torchgraft.compression.optin.search import BudgetError

__all__ = ["MergedTokens", "merge_tokens", "optin_patch_scores", "search_tokens", "token_macs"]


def _special(model: nn.Module) -> int:
    """Tokens before the patches: the class token, and DeiT's distillation token."""
    return 2 if any(name.endswith("distillation_token") for name, _ in model.named_parameters()) else 1


def optin_patch_scores(
    model: nn.Module, images: Float[Tensor, "B C H W"], config: OptinConfig | None = None
) -> Float[Tensor, "blocks patches"]:
    """Damage of removing one patch position before one block; zeros in the first block, where nothing is removed.

    The loss compares Gram matrices over the batch, averaged over positions, of all later features (``patch_loss``),
    and the logits, balanced as for heads. How the paper joins these scores with those of heads and neurons is not
    released; here tokens have their own budget, in ``search_tokens`` (reconstructed).

    Args:
        model: a ViT or DeiT classifier of ``transformers``.
        images: one unlabelled batch, at least 2.
        config: ``lambda_``, ``temperature`` and ``copies`` count.

    Raises:
        ValueError: for fewer than 2 images, a model of one block, or one whose blocks have no tokens to remove.
    """
    config = config or OptinConfig()
    if len(images) < 2:
        raise ValueError(f"images must be at least 2, since Gram matrices are taken over the batch, got {len(images)}")
    specs = find_blocks(model)
    special = _special(model)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        session = Session(model, {"pixel_values": images}, specs, config)
        many = len(session.blocks)
        if many < 2:
            raise ValueError("the model has one block; patches are removed from the second on")
        shapes = {tuple(f.shape[1:]) for f in session.features}
        if any(f.ndim != 3 for f in session.features) or len(shapes) != 1:
            raise ValueError(f"patches are removed from models with the same tokens in every block, got {shapes}")
        patches = session.features[0].shape[1] - special
        found = torch.zeros(many, patches)
        for i in range(1, many):
            m, kl = torch.zeros(patches), torch.zeros(patches)
            for at in range(0, patches, config.copies):
                gone = range(special + at, special + min(at + config.copies, patches))
                part = slice(at, at + len(gone))
                m[part], kl[part] = _remove_patches(session, i, gone)
            found[i] = balance(m, kl, config.lambda_)
    return found


def _drop(gone: Sequence[int], examples: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook that takes another token away in every copy."""
    x = args[0].unflatten(0, (len(gone), examples))
    kept = [[p for p in range(x.shape[2]) if p != g] for g in gone]
    return (torch.cat([x[c][:, k] for c, k in enumerate(kept)]), *args[1:])


def _remove_patches(session: Session, i: int, gone: Sequence[int]) -> tuple[Tensor, Tensor]:
    copies, examples = len(gone), session.examples
    blocks = session.blocks
    found: dict[int, list[Tensor]] = {}

    with ExitStack() as stack:
        for j in range(i):
            module = blocks[j].module
            assert module is not None
            stack.enter_context(answering(module, repeat(session.outputs[j], copies, examples)))
        start = blocks[i].module
        assert start is not None
        stack.callback(start.register_forward_pre_hook(partial(_drop, gone, examples)).remove)
        for j in session.later(i):
            stack.callback(blocks[j].feature.register_forward_hook(partial(keep_output, found, j)).remove)
        out = call(session.model, repeat(session.batch, copies, examples))
    values = model_output(out, None).values.unflatten(0, (copies, -1))
    kl = kl_loss(session.said.values, values, session.config.temperature)
    m = sum(patch_loss(session.features[j], x[0].unflatten(0, (copies, examples))) for j, x in found.items())
    return torch.as_tensor(m).cpu(), kl.cpu()


def token_macs(
    heads: Sequence[int], neurons: Sequence[int], hidden: int, head_size: int, tokens: Sequence[float]
) -> float:
    """Multiply-accumulate operations of a transformer whose blocks have so many heads, neurons and tokens.

    Example:
        >>> token_macs([1], [1], 768, 64, [196.0]) == 4 * 196 * 768 * 64 + 2 * 196**2 * 64 + 2 * 196 * 768
        True
    """
    if not len(heads) == len(neurons) == len(tokens):
        raise ValueError(f"heads, neurons and tokens have {len(heads)}, {len(neurons)} and {len(tokens)} blocks")
    return sum(
        h * (4 * n * hidden * head_size + 2 * n * n * head_size) + f * 2 * n * hidden
        for h, f, n in zip(heads, neurons, tokens, strict=True)
    )


def search_tokens(
    scores: Float[Tensor, "blocks patches"], price: Callable[[tuple[int, ...]], float], budget: float
) -> tuple[int, ...]:
    """How many patches to keep in every block: removals in order of damage until the price fits (reconstructed).

    A position removed before a block is gone in all later ones, so the numbers never grow.

    Args:
        scores: of ``optin_patch_scores``.
        price: cost of numbers of patches per block, for instance by ``token_macs``; must not rise as they fall.
        budget: what the price may be.

    Raises:
        BudgetError: when even one patch per block from the second on costs more; ``nearest`` is that price.
    """
    blocks, patches = scores.shape
    order = scores[1:].flatten().argsort(stable=True).tolist()
    # a position's first block of removal when the k least harmful removals are made
    counts = [[patches] * blocks]
    first = [blocks] * patches
    for unit in order:
        block, patch = unit // patches + 1, unit % patches
        if block < first[patch]:
            left = list(counts[-1])
            for j in range(block, first[patch]):
                left[j] -= 1
            if min(left) < 1:
                break
            first[patch] = block
            counts.append(left)
    low, high = 0, len(counts) - 1
    least = price(tuple(counts[high]))
    if least > budget:
        raise BudgetError(
            f"budget {budget:.4g} cannot be met by fewer patches; the nearest that can be met is {least:.4g}", least
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if price(tuple(counts[middle])) <= budget else (middle + 1, high)
    return tuple(counts[low])


def _merge(x: Float[Tensor, "B N d"], fewer: int, special: int) -> Float[Tensor, "B M d"]:
    """Bipartite soft matching (Bolya et al. 2023): every second token may join its nearest one of the others."""
    unit = F.normalize(x, dim=-1)
    similar = unit[:, ::2] @ unit[:, 1::2].mT
    similar[:, 0] = float("-inf")
    if special == 2:
        similar[:, :, 0] = float("-inf")
    best, partner = similar.max(-1)
    order = best.argsort(-1, descending=True)
    joining, staying = order[:, :fewer], order[:, fewer:].sort(-1).values
    width = x.shape[-1]

    def pick(tokens: Tensor, index: Tensor) -> Tensor:
        return tokens.gather(1, index[..., None].expand(-1, -1, width))

    source, target = x[:, ::2], x[:, 1::2]
    to = partner.gather(1, joining)[..., None].expand(-1, -1, width)
    target = target.scatter_reduce(1, to, pick(source, joining), "mean", include_self=True)
    stayed = pick(source, staying)
    if special == 2:
        return torch.cat([stayed[:, :1], target[:, :1], stayed[:, 1:], target[:, 1:]], 1)
    return torch.cat([stayed, target], 1)


class MergedTokens:
    """Token merging on a model; ``remove()``, or the end of a ``with`` block, takes it off.

    Attributes:
        tokens: patches per block.
    """

    def __init__(self, tokens: tuple[int, ...], handles: Sequence[RemovableHandle]) -> None:
        self.tokens, self._handles = tokens, list(handles)

    def remove(self) -> None:
        """Take the merging off."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> MergedTokens:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def merge_tokens(
    model: nn.Module, tokens: Sequence[int], *, blocks: Sequence[PrunableSpec] | None = None
) -> MergedTokens:
    """Merge the most similar tokens before every block down to a number of patches; hooks, no change of weights.

    Class and distillation tokens are never merged. As in the released code sizes of merged tokens are not tracked.

    Args:
        model: a ViT or DeiT of ``transformers``, pruned or not.
        tokens: patches per block, not growing; those of ``search_tokens``.
        blocks: of the model.

    Raises:
        ValueError: for numbers that grow, lie below 1, or are not one per block; and by the model, when it runs, for
            more patches than it has.
    """
    found = resolve(model, blocks or find_blocks(model))
    wanted = tuple(int(n) for n in tokens)
    if len(wanted) != len(found):
        raise ValueError(f"tokens has {len(wanted)} numbers, the model {len(found)} blocks")
    if min(wanted) < 1 or any(b > a for a, b in pairwise(wanted)):
        raise ValueError(f"tokens must be at least 1 and not grow from block to block, got {wanted}")
    special = _special(model)
    handles = []
    for block, number in zip(found, wanted, strict=True):
        if block.module is None:
            raise ValueError("merging needs the name of every block in its spec")

        def hook(module: nn.Module, args: tuple[Any, ...], number: int = number) -> tuple[Any, ...]:
            x = args[0]
            if x.shape[1] - special < number:
                raise ValueError(f"tokens asks for {number} patches where only {x.shape[1] - special} are left")
            while (surplus := x.shape[1] - special - number) > 0:
                # at most every second token can go at a time; the class token stays
                x = _merge(x, min(surplus, (x.shape[1] + 1) // 2 - 1), special)
            return (x, *args[1:])

        handles.append(block.module.register_forward_pre_hook(hook))
    return MergedTokens(wanted, handles)
