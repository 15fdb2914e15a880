"""What NaTra is compared with: adversarial pixels, and codes mixed between images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from torchgraft.surgery import evaluating
from torchgraft.vision.natra.directions import logits_of
from torchgraft.vision.natra.generator import GeneratorAdapter
from torchgraft.vision.natra.inversion import InversionResult


def pixel_pgd(
    model: Callable[..., Any],
    x: Float[Tensor, "B C H W"],
    y: Int64[Tensor, " B"],
    *,
    epsilon: float = 8 / 255,
    steps: int = 7,
    image_range: tuple[float, float] = (-1.0, 1.0),
) -> Float[Tensor, "B C H W"]:
    """Adversarial pixels by projected gradient steps (Madry et al., 2018), L-infinity.

    Args:
        model: images to logits; in eval mode meanwhile.
        x: images in ``image_range``.
        y: labels.
        epsilon: largest change as a share of the range.
        steps: each of 2.5 epsilon / steps.
        image_range: to stay in.

    Returns:
        Images, detached.

    Raises:
        TypeError: for whole numbers.
        ValueError: for images outside the range.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floats in {image_range}, got {x.dtype}")
    low, high = image_range
    if not bool(x.isfinite().all()) or float(x.min()) < low - 1e-3 or float(x.max()) > high + 1e-3:
        raise ValueError(f"x must lie in {low:g}..{high:g}, got {float(x.min()):g}..{float(x.max()):g}")
    size = epsilon * (high - low)
    found = (x + (2 * torch.rand_like(x) - 1) * size).clamp(low, high)
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            found.requires_grad_(True)
            slope = torch.autograd.grad(F.cross_entropy(logits_of(model, found), y, reduction="sum"), found)[0]
            moved = found.detach() + 2.5 * size / steps * slope.sign()
            found = torch.minimum(torch.maximum(moved, x - size), x + size).clamp(low, high)
    return found.detach()


@torch.no_grad()
def latent_mix(
    adapter: GeneratorAdapter,
    store: InversionResult,
    indices: Int64[Tensor, " B"],
    layers: Sequence[int],
    labels: Int64[Tensor, " B"] | None = None,
    model: Callable[..., Any] | None = None,
    *,
    mode: Literal["random", "search"] = "search",
    candidates: int = 8,
) -> Float[Tensor, "B C H W"]:
    """Images whose codes of some layers come from other images; their labels are taken to hold.

    In the manner of AdvMix (Gowal et al., 2020), which swaps the codes of the fine layers and looks for the worst
    ones; here partners are drawn from the store and the worst of several is kept (reconstructed).

    Args:
        adapter: a generator of several layers.
        store: inversions of the training set.
        indices: which images to mix.
        layers: whose codes are swapped.
        labels, model: for ``search``.
        mode: ``random`` takes the first partner.
        candidates: partners that ``search`` tries.

    Raises:
        ValueError: for a generator of one layer, layers that do not exist or are all of them, and a search without
            labels and model.
    """
    moved = list(layers)
    if not 0 < len(set(moved)) < adapter.layers or not set(moved) <= set(range(adapter.layers)):
        raise ValueError(f"layers must be some and not all of 0..{adapter.layers - 1}, got {moved}")
    if mode not in ("random", "search"):
        raise ValueError(f"mode must be 'random' or 'search', got {mode!r}")
    if mode == "search" and (labels is None or model is None):
        raise ValueError("mode 'search' needs labels and model")
    rows = store[indices]

    def mixed() -> Tensor:
        partner = store[torch.randint(len(store), (len(rows),), device=rows.codes.device)]
        codes = rows.codes.clone()
        codes[:, :, moved] = partner.codes[:, :, moved]
        return torch.where(rows.kept[:, None, None, None], adapter.decode_mixed(codes, rows.alphas), rows.images)

    if mode == "random":
        return mixed()
    assert labels is not None
    assert model is not None
    images, worst = rows.recon, torch.full((len(rows),), -torch.inf, device=rows.codes.device)
    with evaluating(model):
        for _ in range(candidates):
            found = mixed()
            loss = F.cross_entropy(logits_of(model, found), labels, reduction="none")
            images = torch.where((loss > worst)[:, None, None, None], found, images)
            worst = torch.maximum(loss, worst)
    return images
