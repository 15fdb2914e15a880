"""Training on edited images: the amounts are drawn, searched, or climbed by gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.surgery import evaluating
from torchgraft.vision.natra.directions import Directions, edit, logits_of
from torchgraft.vision.natra.generator import GeneratorAdapter
from torchgraft.vision.natra.inversion import InversionResult, invert

Model = Callable[..., Any]
Prepare = Callable[[Tensor], Tensor] | None
Mode = Literal["reconstruction", "random", "search", "pgd"]


class NaturalEdit(NamedTuple):
    """What ``NaTraAugment.attack`` found.

    Attributes:
        images: (B, C, H, W), detached; the original where an image is excluded.
        amounts: (B, K), zero where an image is excluded.
        loss: (B,) cross-entropy of the edited image in eval mode; NaN where no classifier was asked.
        start: (B,) the same for the first candidate, which is what random amounts would have given.
    """

    images: Float[Tensor, "B C H W"]
    amounts: Float[Tensor, "B K"]
    loss: Float[Tensor, " B"]
    start: Float[Tensor, " B"]


class NaTraAugment(nn.Module):
    """Natural variations of training images, called like an augmentation.

    Args:
        adapter: the generator.
        directions: of ``discover_directions``, preferably filtered.
        store: inversions of the training set; needed to call with indices.
        mode: ``random`` draws amounts evenly from the box of radii; ``search`` draws ``candidates`` and keeps for each
            image the one of the largest loss, without gradients through the generator; ``pgd`` climbs the loss by
            ``steps`` sign steps of 2.5 r / steps from a random start, projected on the box, and keeps the best point on
            the way (reconstructed); ``reconstruction`` moves nothing: the control for what inversion alone does.
        candidates, steps: of ``search`` and ``pgd``.
        radius: factor on the radii of the directions.
        encoder: inverts images that are given as such, in one pass.
        prepare: from the generator's images to the classifier's input, for instance another normalisation.

    Raises:
        ValueError: for an unknown mode, no directions, or counts and radii that cannot be.

    The classifier is in eval mode while edits are sought (reconstructed), and its modes are put back.
    """

    def __init__(
        self,
        adapter: GeneratorAdapter,
        directions: Directions,
        store: InversionResult | None = None,
        mode: Mode = "search",
        candidates: int = 8,
        radius: float = 1.0,
        *,
        steps: int = 5,
        encoder: Callable[[Tensor], Tensor] | None = None,
        prepare: Prepare = None,
    ) -> None:
        super().__init__()
        if mode not in ("reconstruction", "random", "search", "pgd"):
            raise ValueError(f"mode must be 'reconstruction', 'random', 'search' or 'pgd', got {mode!r}")
        if candidates < 1 or steps < 1 or not radius > 0:
            raise ValueError(
                f"candidates and steps must be at least 1, radius positive, got {candidates}, {steps}, {radius}"
            )
        if not len(directions):
            raise ValueError("directions are empty; discover at least one")
        self.adapter, self.directions, self.store, self.mode = adapter, directions, store, mode
        self.candidates, self.radius, self.steps = candidates, radius, steps
        self.encoder, self.prepare = encoder, prepare

    def _rows(self, inputs: Tensor) -> InversionResult:
        if inputs.is_floating_point():
            if self.encoder is None:
                raise ValueError("images need encoder=, to invert them in one pass; or call with indices into a store")
            return invert(self.adapter, inputs, self.encoder, steps=0, shift="image")
        if self.store is None:
            raise ValueError("indices need a store; give store=invert(...) of the training set")
        if inputs.dtype != torch.int64 or inputs.ndim != 1:
            raise TypeError(f"indices must be int64 (B,), got {inputs.dtype} {tuple(inputs.shape)}")
        if len(inputs) and not (int(inputs.min()) >= 0 and int(inputs.max()) < len(self.store)):
            raise ValueError(f"indices must lie in 0..{len(self.store) - 1}, got up to {int(inputs.max())}")
        return self.store[inputs]

    def attack(self, inputs: Tensor, labels: Tensor | None = None, model: Model | None = None) -> NaturalEdit:
        """Edited images with their amounts and losses.

        Args:
            inputs: int64 (B,) indices into the store, or images (B, C, H, W).
            labels: int64 (B,); needed by ``search`` and ``pgd``.
            model: the classifier under training; needed by ``search`` and ``pgd``.

        Raises:
            ValueError: for what the mode needs and did not get, and indices beyond the store.
            TypeError: when the classifier returns no logits.
        """
        with torch.no_grad():
            rows = self._rows(inputs)
        adversarial = self.mode in ("search", "pgd")
        if adversarial and (labels is None or model is None):
            raise ValueError(f"mode {self.mode!r} looks for the worst edit and needs labels and model")
        if adversarial and labels is not None and len(labels) != len(rows):
            raise ValueError(f"{len(labels)} labels do not belong to {len(rows)} images")
        box = self.radius * self.directions.radii

        def draw() -> Tensor:
            return (2 * torch.rand(len(rows), len(box), device=box.device, dtype=box.dtype) - 1) * box

        def losses(amounts: Tensor) -> tuple[Tensor, Tensor]:
            images = edit(self.adapter, rows, self.directions, amounts)
            assert model is not None
            assert labels is not None
            seen = images if self.prepare is None else self.prepare(images)
            return F.cross_entropy(logits_of(model, seen), labels, reduction="none"), images

        if not adversarial:
            amounts = draw() if self.mode == "random" else torch.zeros(len(rows), len(box)).to(box)
            with torch.no_grad():
                images = edit(self.adapter, rows, self.directions, amounts)
            loss = start = amounts.new_full((len(rows),), torch.nan)
        else:
            assert model is not None
            # looking for hard edits must move no batch norm
            with evaluating(model):
                found = self._searched(draw, losses) if self.mode == "search" else self._climbed(draw(), losses, box)
            amounts, images, loss, start = found
        kept = rows.kept
        whole = torch.where(kept[:, None, None, None], images, rows.images.to(images))
        return NaturalEdit(whole, amounts * kept[:, None], loss, start)

    @torch.no_grad()
    def _searched(
        self, draw: Callable[[], Tensor], losses: Callable[..., Any]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        amounts = draw()
        loss, images = losses(amounts)
        start = loss
        for _ in range(self.candidates - 1):
            other = draw()
            found, pictures = losses(other)
            worse = found > loss
            amounts, loss = torch.where(worse[:, None], other, amounts), torch.where(worse, found, loss)
            images = torch.where(worse[:, None, None, None], pictures, images)
        return amounts, images, loss, start

    def _climbed(
        self, amounts: Tensor, losses: Callable[..., Any], box: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        best: tuple[Tensor, Tensor, Tensor] | None = None
        start = amounts.new_zeros(len(amounts))
        for step in range(self.steps + 1):
            with torch.enable_grad():
                here = amounts.detach().requires_grad_(True)
                loss, images = losses(here)
                # of the amounts alone: neither the generator nor the classifier gets a gradient
                slope = torch.autograd.grad(loss.sum(), here)[0] if step < self.steps else None
            loss, images = loss.detach(), images.detach()
            if best is None:
                best, start = (here.detach(), images, loss), loss
            else:
                worse = loss > best[2]
                best = (
                    torch.where(worse[:, None], here.detach(), best[0]),
                    torch.where(worse[:, None, None, None], images, best[1]),
                    torch.where(worse, loss, best[2]),
                )
            if slope is not None:
                amounts = (here.detach() + 2.5 * box / self.steps * slope.sign()).clamp(-box, box)
        assert best is not None
        return *best, start

    def forward(self, inputs: Tensor, labels: Tensor | None = None, model: Model | None = None) -> Tensor:
        """Edited images (B, C, H, W) in the generator's range, detached; see ``attack``."""
        return self.attack(inputs, labels, model).images

    def pool(self, labels: Tensor | None = None, model: Model | None = None, batch_size: int = 256) -> Tensor:
        """An edited image of every one in the store, to draw from for an epoch and then make anew."""
        if self.store is None:
            raise ValueError("a pool is made of the store; give store=invert(...) of the training set")
        every = torch.arange(len(self.store), device=self.store.codes.device)
        return torch.cat([self(i, None if labels is None else labels[i], model) for i in every.split(batch_size)])


def natra_loss(
    model: Model,
    x: Float[Tensor, "B ..."],
    y: Int64[Tensor, " B"],
    x_nat: Float[Tensor, "B ..."] | None,
    weight: float = 1.0,
    consistency: float = 0.0,
) -> Float[Tensor, ""]:
    """``CE(f(x), y) + weight * CE(f(x'), y) + consistency * KL(f(x) || f(x'))`` (weight and consistency reconstructed).

    With both at zero it is the ordinary loss, and the model is not asked about ``x_nat``.

    Args:
        model: images to logits, or to an object with ``.logits``.
        x: images as the model takes them.
        y: labels.
        x_nat: edited images as the model takes them; may be None where both factors are zero.
        weight: of the edited images.
        consistency: of the divergence between the two answers.

    Raises:
        ValueError: for negative factors, no images, numbers of images and labels that differ, or none of the edited
            images where they are needed.
        TypeError: when the model returns no logits.
    """
    if weight < 0 or consistency < 0:
        raise ValueError(f"weight and consistency must not be negative, got {weight} and {consistency}")
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"x and y must be equally many and not none, got {len(x)} and {len(y)}")
    clean = logits_of(model, x)
    loss = F.cross_entropy(clean, y)
    if weight == 0 and consistency == 0:
        return loss
    if x_nat is None:
        raise ValueError("x_nat is needed where weight or consistency is positive")
    if len(x_nat) != len(x):
        raise ValueError(f"x_nat must hold an edited image for each of the {len(x)} of x, got {len(x_nat)}")
    edited = logits_of(model, x_nat)
    loss = loss + weight * F.cross_entropy(edited, y)
    if consistency:
        before, after = clean.log_softmax(1), edited.log_softmax(1)
        loss = loss + consistency * F.kl_div(after, before, reduction="batchmean", log_target=True)
    return loss
