"""From images to codes: batch inverse encoding and shifting (BIES), and several codes an image (LCE)."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from torchgraft.vision.natra.generator import GeneratorAdapter, check_eval

Shift = str | float | None
Perceptual = Callable[[Tensor, Tensor], Tensor]


def psnr(a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"], span: float = 2.0) -> Float[Tensor, " B"]:
    """Peak signal to noise ratio of each image in dB.

    Args:
        a, b: images.
        span: largest value minus smallest; 2 for images in -1..1.

    Example:
        >>> psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.2))
        tensor([20.])
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return 10 * torch.log10(span**2 / (a - b).square().flatten(1).mean(1))


class FeatureDistance(nn.Module):
    """Perceptual distance: squared difference of unit features of a fixed network, summed over its stages.

    The form of LPIPS without its learned weights. Do not use features of the classifier under training.

    Args:
        stages: modules applied one after the other; features are compared behind each.

    Example:
        >>> distance = FeatureDistance(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)).eval()
        >>> distance(torch.ones(2, 1, 8, 8), torch.ones(2, 1, 8, 8)).tolist()
        [0.0, 0.0]
    """

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__()
        if not stages:
            raise ValueError("stages is empty; give at least one module")
        self.stages = nn.ModuleList(stages)

    def forward(self, a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
        """Distance of each pair.

        Raises:
            ValueError: when the network is in train mode.
        """
        check_eval(self.stages, "network of the perceptual distance")
        total = a.new_zeros(len(a))
        for stage in self.stages:
            a, b = stage(a), stage(b)
            unit_a, unit_b = (nn.functional.normalize(h, dim=1, eps=1e-6) for h in (a, b))
            total = total + (unit_a - unit_b).square().sum(1).flatten(1).mean(1)
        return total


@dataclass(frozen=True, eq=False)
class InversionResult:
    """Codes of images; indexing takes some of them.

    Attributes:
        codes: (B, n, L, d).
        alphas: (B, n, c) weights of the feature channels, or None for one code.
        recon: (B, C, H, W), decoded from the codes.
        psnr: (B,) of ``recon`` in dB.
        kept: (B,) false where the reconstruction is worse than the floor; those images are never edited.
        images: (B, C, H, W), what was inverted.
        psi: (B,) share of the distance from the mean code that the shift left.
    """

    codes: Float[Tensor, "B n L d"]
    alphas: Float[Tensor, "B n c"] | None
    recon: Float[Tensor, "B C H W"]
    psnr: Float[Tensor, " B"]
    kept: Bool[Tensor, " B"]
    images: Float[Tensor, "B C H W"]
    psi: Float[Tensor, " B"]

    def _map(self, change: Callable[[Tensor], Tensor]) -> InversionResult:
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {k: None if v is None else change(v) for k, v in found.items()}
        return InversionResult(**changed)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Tensor | slice) -> InversionResult:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: str | torch.device) -> InversionResult:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, floats as float16 (half the size; codes need no more)."""
        from safetensors.torch import save_file

        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        save_file(
            {
                name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
                for name, tensor in found.items()
                if tensor is not None
            },
            path,
        )

    @classmethod
    def load(cls, path: str | Path) -> InversionResult:
        """Read what ``save`` wrote, as float32.

        Raises:
            ValueError: for a file without the tensors of an inversion.
        """
        from safetensors.torch import load_file

        found = load_file(path)
        missing = {f.name for f in dataclasses.fields(cls)} - {"alphas"} - set(found)
        if missing:
            raise ValueError(f"{path} is not a stored inversion: it lacks {', '.join(sorted(missing))}")
        read: dict[str, Any] = {"alphas": None}
        read |= {name: t.float() if t.is_floating_point() else t for name, t in found.items()}
        return cls(**read)


def shift_codes(
    adapter: GeneratorAdapter, codes: Float[Tensor, "B n L d"], shift: Shift = "quantile"
) -> tuple[Float[Tensor, "B n L d"], Float[Tensor, " B"]]:
    """Move codes towards the mean code, into the region where edits keep their meaning (reconstructed).

    ``w <- mean + psi (w - mean)``.

    Args:
        adapter: gives the mean code and the distances of sampled codes from it.
        codes: of the images.
        shift: ``quantile`` takes one psi for the batch, so that the 0.95 quantile of its distances is at most that of
            sampled codes; ``image`` takes one for each image, so that no code is farther out than that quantile (the
            result does not depend on which images come together); a number in (0, 1] is psi; None moves nothing.

    Returns:
        The codes, and psi of each image.

    Raises:
        ValueError: for another ``shift``.
    """
    one = codes.new_ones(len(codes))
    if shift is None:
        return codes, one
    mean = adapter.mean_code()
    if isinstance(shift, (int, float)) and not isinstance(shift, bool) and 0 < shift <= 1:
        psi = one * shift
    elif shift in ("quantile", "image"):
        limit = adapter.code_distances().quantile(0.95)
        far = (codes - mean).float().flatten(2).norm(dim=2)
        # the farthest code of an image; dividing by at least `limit` leaves psi at one inside
        outer = far.quantile(0.95).expand(len(far)) if shift == "quantile" else far.amax(1)
        psi = (limit / outer.clamp(min=limit)).to(codes.dtype)
    else:
        raise ValueError(f"shift must be 'quantile', 'image', a number in (0, 1] or None, got {shift!r}")
    return mean + psi[:, None, None, None] * (codes - mean), psi


def _start(
    adapter: GeneratorAdapter, images: Tensor, encoder: Callable[[Tensor], Tensor] | None, n_codes: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    shape = (len(images), adapter.layers, adapter.features)
    if encoder is None:
        first = adapter.mean_code().expand(shape)
    else:
        if isinstance(encoder, nn.Module):
            check_eval(encoder, "encoder")
        first = encoder(images)
        if isinstance(first, Tensor) and first.numel() == shape[0] * shape[2] and first.ndim == 2:
            first = first[:, None].expand(shape)
        elif isinstance(first, Tensor) and first.numel() == torch.Size(shape).numel():
            first = first.reshape(shape)
        else:
            got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(f"encoder must return codes of shape {shape}, got {got}")
    if n_codes == 1:
        return first[:, None].clone(), None
    # further codes start as samples without weight, so that the optimiser sets out from the single code
    others = adapter.sample_codes(len(images) * (n_codes - 1), seed).view(len(images), n_codes - 1, *shape[1:])
    codes = torch.cat([first[:, None], others], 1)
    alphas = codes.new_zeros(len(images), n_codes, adapter.g1(codes[:1, 0]).shape[1])
    alphas[:, 0] = 1
    return codes, alphas


def _optimise(
    adapter: GeneratorAdapter,
    images: Tensor,
    codes: Tensor,
    alphas: Tensor | None,
    steps: int,
    lr: float,
    perceptual: Perceptual | None,
    weights: tuple[float, float, float],
) -> tuple[Tensor, Tensor | None]:
    pixel, perceptive, close = weights
    mean = adapter.mean_code()
    free = [codes.detach().clone(), *([] if alphas is None else [alphas.detach().clone()])]
    for tensor in free:
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(free, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for step in range(steps):
        with torch.enable_grad():
            recon = adapter.decode_mixed(free[0], free[1] if len(free) > 1 else None)
            loss = pixel * (recon - images).square().flatten(1).mean(1)
            if perceptual is not None:
                loss = loss + perceptive * perceptual(recon, images)
            loss = loss + close * (free[0] - mean).square().flatten(1).mean(1)
            # summed, so that an image's gradient does not depend on how many others are in the batch
            total = loss.sum()
        if not bool(total.isfinite()):
            raise FloatingPointError(f"the inversion loss is {float(total)} at step {step}; lower lr")
        # gradients of the codes alone: the generator's weights get none
        for tensor, grad in zip(free, torch.autograd.grad(total, free), strict=True):
            tensor.grad = grad
        optimizer.step()
        schedule.step()
    found = [tensor.detach() for tensor in free]
    return found[0], found[1] if alphas is not None else None


@torch.no_grad()
def invert(
    adapter: GeneratorAdapter,
    images: Float[Tensor, "B C H W"],
    encoder: Callable[[Tensor], Tensor] | None = None,
    *,
    steps: int = 200,
    n_codes: int = 1,
    perceptual: Perceptual | None = None,
    shift: Shift = "quantile",
    lr: float = 0.05,
    weights: tuple[float, float, float] = (1.0, 0.8, 1e-3),
    min_psnr: float = 12.0,
    batch_size: int = 256,
    seed: int = 0,
) -> InversionResult:
    """Find codes whose decoded images are the images (BIES, and LCE for several codes).

    (reconstructed) Codes start at the encoder's guess or the mean code, are optimised together by Adam with a cosine
    schedule, and are shifted towards the mean code. With ``n_codes > 1`` an image is a sum of feature maps of several
    codes, weighted by channel; codes and weights are optimised together. Inversion is the costly part: do it once.

    Args:
        adapter: the generator; with a split layer for several codes.
        images: of the generator's shape and range.
        encoder: from images to codes (B, L, d), (B, d) for all layers, or the latent's own shape.
        steps: of Adam; 0 takes the start as it is.
        n_codes: codes an image.
        perceptual: ``(recon, images) -> (B,)``, such as ``FeatureDistance``; not of the classifier under training.
        shift: as in ``shift_codes``.
        lr: first learning rate, in units of the codes.
        weights: of pixels (mean square), perceptual distance, and squared distance of the codes from the mean code.
        min_psnr: floor in dB; images reconstructed worse are marked in ``kept`` and never edited.
        batch_size: images optimised together.
        seed: of the further codes' start.

    Returns:
        Codes and reconstructions, detached.

    Raises:
        TypeError, ValueError: for images that are not the generator's, a generator in train mode, no split layer for
            several codes, settings that cannot be.
        FloatingPointError: when the optimisation diverges.

    Warns:
        UserWarning: for images below the floor, or that seem to lie in 0..1 where the generator draws in -1..1.
    """
    adapter.check_images(images)
    if n_codes < 1 or steps < 0 or batch_size < 1:
        raise ValueError(f"n_codes and batch_size must be at least 1 and steps 0, got {n_codes}, {batch_size}, {steps}")
    if not lr > 0 or len(weights) != 3 or min(weights) < 0:
        raise ValueError(f"lr must be positive and weights three numbers from 0 on, got {lr} and {weights}")
    low, high = adapter.image_range
    if low < 0 and float(images.min()) >= 0:
        warnings.warn(
            f"all pixels are at least 0, but the generator draws in {low:g}..{high:g}; scale the images if they are in "
            "0..1",
            stacklevel=2,
        )
    found = []
    for part in images.split(batch_size):
        codes, alphas = _start(adapter, part, encoder, n_codes, seed)
        found.append(_optimise(adapter, part, codes, alphas, steps, lr, perceptual, weights))
    codes, psi = shift_codes(adapter, torch.cat([c for c, _ in found]), shift)
    alphas = None if n_codes == 1 else torch.cat([a for _, a in found if a is not None])
    recon = torch.cat(
        [
            adapter.decode_mixed(codes[i : i + batch_size], None if alphas is None else alphas[i : i + batch_size])
            for i in range(0, len(codes), batch_size)
        ]
    )
    quality = psnr(recon, images, high - low)
    kept = quality >= min_psnr
    if not bool(kept.all()):
        warnings.warn(
            f"{int((~kept).sum())} of {len(kept)} images are reconstructed worse than min_psnr={min_psnr:g} dB (worst "
            f"{float(quality.min()):.1f}) and will not be edited; take more steps, more codes or a better generator",
            stacklevel=2,
        )
    return InversionResult(codes, alphas, recon, quality, kept, images, psi)


def encoder_loss(
    adapter: GeneratorAdapter,
    encoder: Callable[[Tensor], Tensor],
    codes: Float[Tensor, "B L d"],
    images: Float[Tensor, "b C H W"] | None = None,
    *,
    perceptual: Perceptual | None = None,
    weights: tuple[float, float] = (0.8, 1.0),
) -> Float[Tensor, ""]:
    """Loss to train an encoder for a generator that has none (reconstructed).

    ``|G(E(x)) - x|^2 + weights[0] * perceptual + weights[1] * |E(G(w)) - w|^2``, means over elements.

    Args:
        adapter: the generator; only the encoder's weights need be given to the optimiser.
        encoder: from images to codes (B, L, d).
        codes: sampled, ``adapter.sample_codes(n, seed)``.
        images: real ones; images of ``codes`` unless given.
        perceptual: as in ``invert``.
        weights: of the perceptual distance and of the codes.
    """
    with torch.no_grad():
        drawn = adapter.decode(codes)
    guess = encoder(drawn).reshape(codes.shape)
    real = drawn if images is None else images
    shape = (len(real), adapter.layers, adapter.features)
    recon = adapter.decode(guess if images is None else encoder(real).reshape(shape))
    loss = (recon - real).square().mean() + weights[1] * (guess - codes).square().mean()
    return loss if perceptual is None else loss + weights[0] * perceptual(recon, real).mean()
