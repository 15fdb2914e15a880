"""Robust inference by crop selection, RICS (Shifman and Weiss, ECCV 2024, arXiv 2404.07153).

A fixed rule chooses a crop inside the image by what the image shows, and only that crop is classified. Where the image
moves by a pixel, the rule mostly chooses the same scene content, so the answer is the same to the last bit, for any
classifier and without training.

Letters: B images, C channels, H W size of the image, h w size of the crop, K L candidate positions (H-h+1, W-w+1).

The official repository keeps its code in an archive that we have not read. The rule (argmax of a local score over
crops) is the paper's; the exact filter of its score is not known to us, so the scores here are our choice
(reconstructed), and so are the closed forms of ``consistency_bound``, which the tests check against simulation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.surgery import evaluating

__all__ = [
    "SCORES",
    "CropSelector",
    "RICSImageProcessor",
    "RICSModel",
    "TranslationReport",
    "consistency_bound",
    "crop_scores",
    "crop_size_for",
    "select_offsets",
    "take_crops",
    "translation_report",
]

SCORES = ("random3x3", "laplacian", "abs_laplacian", "grey")
"""Built-in scores, each of one to nine pixels at the centre of the crop."""

Score = str | nn.Module | Callable[[Tensor], Tensor]
Size = int | tuple[int, int]
Kind = Literal["realistic", "zero", "cyclic"]
Window = Callable[[Tensor, int, int, tuple[int, int]], Tensor]
Offsets = tuple[tuple[int, int], ...]


def _pair(value: Size, name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, Integral) or isinstance(v, bool) or v < 1 for v in pair):
        raise ValueError(f"{name} must be a positive int or a pair of them, got {value!r}")
    return int(pair[0]), int(pair[1])


def _as_float(images: Tensor) -> Tensor:
    """Floats, whole numbers 0..255 scaled to 0..1."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor of shape (B, C, H, W), got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    if not images.shape[1]:
        raise ValueError(f"images must have at least one channel, got shape {tuple(images.shape)}")
    if images.is_complex() or images.dtype == torch.bool:
        raise TypeError(f"images must be floats or whole numbers 0..255, got {images.dtype}")
    if images.is_floating_point():
        return images
    if images.dtype != torch.uint8 and images.numel():
        low, high = (int(v) for v in images.long().aminmax())
        if low < 0 or high > 255:
            raise ValueError(f"whole numbers must lie in 0..255, got {low} to {high}; give floats for other ranges")
    return images.to(torch.get_default_dtype()) / 255


def _checked(images: Tensor) -> Tensor:
    """The same, refused where a pixel is NaN or infinite, also one that no score looks at."""
    images = _as_float(images)
    if images.numel() and not all(bool(v.isfinite()) for v in images.aminmax()):
        raise ValueError("images have NaN or infinite pixels")
    return images


def _check_fits(images: Tensor, size: tuple[int, int]) -> None:
    H, W = images.shape[-2:]
    if size[0] > H or size[1] > W:
        raise ValueError(f"crop_size {size} is larger than the image, {(H, W)}; choose at most the image's size")


def _kernel(score: str, channels: int, seed: int) -> Tensor:
    """Weights (C, 3, 3) of a score, or (C, 1, 1) for one pixel."""
    if score == "random3x3":
        kernel = torch.randn(channels, 3, 3, generator=torch.Generator().manual_seed(seed))
        # without its mean, a constant image has no winner and brightness does not matter
        kernel = kernel - kernel.mean()
        return kernel / kernel.norm()
    if score in ("laplacian", "abs_laplacian"):
        plus = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        return plus.expand(channels, 3, 3) / channels
    if score == "grey":
        return torch.full((channels, 1, 1), 1 / channels)
    raise ValueError(f"score must be one of {', '.join(SCORES)}, a module or a callable, got {score!r}")


def _response(images: Tensor, kernel: Tensor) -> Tensor:
    """Correlation (B, H', W') with a small kernel, no padding.

    A sum of shifted images, term after term: every pixel is computed by the same sequence of roundings wherever it
    stands. A convolution of a library may sum in another order at an edge or in a tail of a vector register, and then
    a tie of two crops could break differently before and after a shift.
    """
    rows, columns = kernel.shape[1:]
    H, W = images.shape[-2] - rows + 1, images.shape[-1] - columns + 1
    out = images.new_zeros(images.shape[0], H, W)
    for c, plane in enumerate(kernel.tolist()):
        for i, row in enumerate(plane):
            for j, weight in enumerate(row):
                if weight:
                    out += images[:, c, i : i + H, j : j + W] * weight
    return out


def crop_scores(
    images: Float[Tensor, "B C H W"],
    crop_size: Size,
    score: str = "random3x3",
    *,
    circular: bool = False,
    seed: int = 0,
) -> Float[Tensor, "B K L"]:
    """Score of every crop: the response of a small fixed kernel at the crop's centre.

    A score must depend on nothing but the pixels of its crop, and should hardly be correlated between neighbouring
    crops: sums over the whole crop are smooth, their maximum sits on the border of the candidates, and it moves with
    every shift.

    Args:
        images: not padded and not normalised by statistics of the image itself. Half precision is scored in float32.
        crop_size: (h, w), at least 3 for the 3 x 3 kernels.
        score: ``random3x3`` (seeded, zero mean, over all channels), ``laplacian`` and ``abs_laplacian`` (of the mean
            over channels), or ``grey`` (the centre pixel; smoother, so less consistent; for comparison).
        circular: the image goes on at the other side; a crop may then begin at each of the H x W pixels.
        seed: of the random kernel.

    Returns:
        Scores (B, H-h+1, W-w+1), or (B, H, W) if ``circular``.

    Raises:
        ValueError: for a crop that is larger than the image or smaller than the kernel, or an unknown score.

    Example:
        >>> crop_scores(torch.rand(2, 3, 32, 32), 28).shape
        torch.Size([2, 5, 5])
    """
    images = _as_float(images)
    if images.dtype in (torch.float16, torch.bfloat16):
        # few numbers are left between two of theirs, and scores would tie
        images = images.float()
    h, w = _pair(crop_size, "crop_size")
    _check_fits(images, (h, w))
    kernel = _kernel(score, images.shape[1], seed)
    size = kernel.shape[-1]
    if min(h, w) < size:
        raise ValueError(f"crop_size {(h, w)} is smaller than the {size} x {size} kernel of {score!r}")
    top, left = h // 2 - size // 2, w // 2 - size // 2
    if circular:
        images = images.roll((-top, -left), (-2, -1))
        H, W = images.shape[-2:]
        images = torch.cat([images, images[..., : size - 1, :]], -2)
        images = torch.cat([images, images[..., : size - 1]], -1)
        response = _response(images, kernel)[:, :H, :W]
    else:
        K, L = images.shape[-2] - h + 1, images.shape[-1] - w + 1
        response = _response(images[..., top : top + K + size - 1, left : left + L + size - 1], kernel)
    return response.abs() if score == "abs_laplacian" else response


def _first_of_largest(scores: Tensor) -> Tensor:
    best = scores.flatten(1).argmax(1)
    return torch.stack([best // scores.shape[2], best % scores.shape[2]], 1)


def select_offsets(scores: Float[Tensor, "B K L"]) -> Int64[Tensor, "B 2"]:
    """Row and column of the largest score of each image, the first in row-major order where several are equal.

    ``CropSelector`` breaks such ties by the pixels of the crops instead.

    Raises:
        ValueError: for scores that are not numbers.

    Warns:
        UserWarning: when all scores of an image are equal (a constant image, say): the choice then says nothing about
            the content, and there is no consistency to expect.
    """
    if scores.isnan().any():
        raise ValueError("scores contain NaN; look for NaN in the images, or in the score function")
    flat = scores.flatten(1)
    if flat.shape[1] > 1 and bool((flat == flat[:, :1]).all(1).any()):
        warnings.warn("all crops of an image have the same score; the first was taken", UserWarning, stacklevel=2)
    return _first_of_largest(scores)


def take_crops(
    images: Float[Tensor, "B C H W"], offsets: Int64[Tensor, "B 2"], crop_size: Size, *, circular: bool = False
) -> Float[Tensor, "B C h w"]:
    """The crop of each image that begins at its offset (row, column).

    Args:
        images: batch.
        offsets: of the upper left corner, within the image unless ``circular``.
        crop_size: (h, w).
        circular: go on at the other side of the image.

    Raises:
        ValueError: for crops that leave the image.

    Example:
        >>> image = torch.arange(16.0).view(1, 1, 4, 4)
        >>> take_crops(image, torch.tensor([[3, 3]]), 2, circular=True)[0, 0].tolist()
        [[15.0, 12.0], [3.0, 0.0]]
    """
    h, w = _pair(crop_size, "crop_size")
    _check_fits(images, (h, w))
    H, W = images.shape[-2:]
    if not circular:
        if len(offsets) and bool(((offsets < 0) | (offsets > offsets.new_tensor([H - h, W - w]))).any()):
            raise ValueError(f"offsets must lie in 0..{H - h} and 0..{W - w}, got up to {offsets.amax(0).tolist()}")
        if len(images) and images.device.type == "cpu":
            # rows are copied whole, which is many times faster than pixel by pixel
            places = zip(images, offsets.tolist(), strict=True)
            return torch.stack([image[:, r : r + h, c : c + w] for image, (r, c) in places])
    rows = offsets[:, :1] + torch.arange(h, device=images.device)
    columns = offsets[:, 1:] + torch.arange(w, device=images.device)
    if circular:
        rows, columns = rows % H, columns % W
    each = torch.arange(len(images), device=images.device)[:, None, None]
    # indexed with channels last, so that whole pixels are copied
    return images.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _crop_marks(images: Tensor, size: tuple[int, int], circular: bool) -> Int64[Tensor, "B K L"]:
    """A number for the pixels of each crop, to break ties: what is equal in it is equal in all (but for chance, 2^-40).

    Sums of whole numbers that wrap round at 2^64 are exact, so a crop has the same mark wherever it stands.
    """
    x = images.float() if images.element_size() < 4 else images
    # the bits of the pixels, of which no difference is lost; adding 0 makes one zero of two
    bits = (x + 0.0).view(torch.int32 if x.dtype == torch.float32 else torch.int64).long()
    generator = torch.Generator().manual_seed(0)

    def summed(parts: Callable[[int], Tensor], count: int) -> Tensor:
        factors = (2 * torch.randint(2**61, (count,), generator=generator) + 1).tolist()
        total = parts(0) * factors[0]
        for i in range(1, count):
            total += parts(i) * factors[i]
        return total

    marks = summed(lambda c: bits[:, c], bits.shape[1])
    for axis, side in ((1, size[0]), (2, size[1])):
        if circular:
            marks = torch.cat([marks, marks.narrow(axis, 0, side - 1)], axis)
        places = marks.shape[axis] - side + 1
        marks = summed(lambda i, m=marks, a=axis, n=places: m.narrow(a, i, n), side)  # type: ignore[misc]
    return marks


class CropSelector(nn.Module):
    """Chooses the crop of the largest score in each image (the paper's rule).

    Where several crops of an image share the largest score, as on drawings of few colours, their pixels decide, so that
    the choice still depends on the crop alone: the first of them in row-major order would change with the shift.

    Args:
        crop_size: (h, w) or one number; at most the image's size.
        score: a name of ``SCORES``, or a module or callable from images (B, C, H, W) to scores (B, H-h+1, W-w+1), or
            (B, H, W) if ``circular``. It must depend on the pixels of the crop alone.
        circular: images are periodic; then every whole cyclic shift gives the same crop.
        seed: of ``random3x3``.

    Raises:
        TypeError: for a score that cannot be called, images that are no tensor of numbers.
        ValueError: for a size or score that cannot be, a crop larger than the image, scores of a wrong shape or NaN,
            images of a wrong rank, pixels that are NaN or infinite, whole numbers outside 0..255.

    Example:
        >>> crops, offsets = CropSelector(28)(torch.rand(2, 3, 32, 32))
        >>> crops.shape, offsets.shape
        (torch.Size([2, 3, 28, 28]), torch.Size([2, 2]))
    """

    def __init__(self, crop_size: Size, score: Score = "random3x3", *, circular: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.crop_size = _pair(crop_size, "crop_size")
        if isinstance(score, str):
            _kernel(score, 1, seed)
        elif not callable(score):
            raise TypeError(f"score must be one of {', '.join(SCORES)}, a module or a callable, got {score!r}")
        self.score, self.circular, self.seed = score, circular, seed

    def scores(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K L"]:
        """Score of every candidate crop."""
        images = _as_float(images)
        _check_fits(images, self.crop_size)
        if isinstance(self.score, str):
            return crop_scores(images, self.crop_size, self.score, circular=self.circular, seed=self.seed)
        found = self.score(images)
        H, W = images.shape[-2:]
        h, w = self.crop_size
        wanted = (len(images), H, W) if self.circular else (len(images), H - h + 1, W - w + 1)
        if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"score must return a tensor of shape {wanted}, one score per crop, got {got}")
        return found

    def offsets(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, "B 2"]:
        """Upper left corner of the crop that is chosen in each image."""
        return self._offsets(_checked(images))

    @torch.no_grad()
    def _offsets(self, images: Tensor) -> Tensor:
        scores = self.scores(images)
        offsets = select_offsets(scores)
        largest = scores == scores.amax((1, 2), keepdim=True)
        tied = (largest.sum((1, 2)) > 1).nonzero()[:, 0]
        if len(tied):
            marks = _crop_marks(images[tied], self.crop_size, self.circular)
            offsets[tied] = _first_of_largest(marks.where(largest[tied], torch.iinfo(torch.int64).min))
        return offsets

    def forward(self, images: Tensor) -> tuple[Float[Tensor, "B C h w"], Int64[Tensor, "B 2"]]:
        """Crops and where they begin. Whole numbers 0..255 are taken as such and divided by 255."""
        images = _checked(images)
        offsets = self._offsets(images)
        return take_crops(images, offsets, self.crop_size, circular=self.circular), offsets

    def extra_repr(self) -> str:
        """Settings."""
        return f"crop_size={self.crop_size}, circular={self.circular}, seed={self.seed}"


def _resized(images: Tensor, size: tuple[int, int] | None, interpolation: str) -> Tensor:
    if size is None or tuple(images.shape[-2:]) == size:
        return images
    smooth = {"bilinear", "bicubic"}
    return F.interpolate(images, size, mode=interpolation, antialias=interpolation in smooth)


def _owner(model: Any) -> Any:
    """The module that a bound method belongs to; anything else as it is."""
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, nn.Module) else model


class RICSModel(nn.Module):
    """A classifier or encoder behind a crop selector; its calling convention and outputs stay as they are.

    Selection sees the images before normalisation and resizing, as they come from the camera.

    Args:
        model: anything that takes images (B, C, h, w) first: a plain module, a transformers image classifier or vision
            encoder, or a bound method such as ``clip.get_image_features``, whose module is moved and put into eval mode
            along with this one.
        selector: of the crop.
        resize_to: size that the model wants; ``None`` gives it the crop as it is.
        mean, std: per channel, taken off after the crop; images must then lie in 0..1. ``None`` does not normalise.
        interpolation: ``bicubic`` and ``bilinear`` are antialiased, ``nearest`` is not.

    Raises:
        TypeError, ValueError: for what is no model, selector, size, mean or standard deviation; in ``forward``, for
            images that ``CropSelector`` refuses, for a number of channels that mean and std do not have, and for
            images far outside 0..1 where these are given.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 10))
        >>> RICSModel(net, CropSelector(28))(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        selector: CropSelector,
        resize_to: Size | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
    ) -> None:
        super().__init__()
        if not callable(model):
            raise TypeError(f"model must be a module or a function of images, got {type(model).__name__}")
        if not isinstance(selector, CropSelector):
            raise TypeError(f"selector must be a CropSelector, got {type(selector).__name__}")
        if interpolation not in ("bicubic", "bilinear", "nearest"):
            raise ValueError(f"interpolation must be 'bicubic', 'bilinear' or 'nearest', got {interpolation!r}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together; give both or neither")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and not isinstance(values, Sequence):
                raise TypeError(f"{name} must be a sequence, one number per channel, got {values!r}")
        if std is not None and not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, got {tuple(std)}")
        self.model, self.selector = model, selector
        owner = _owner(model)
        if owner is not model:
            self.owner = owner
        self.resize_to = None if resize_to is None else _pair(resize_to, "resize_to")
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.interpolation = interpolation

    def classify(self, crops: Float[Tensor, "B C h w"], **kwargs: Any) -> Any:
        """What the model says to crops that were chosen already."""
        if self.mean is not None and crops.numel():
            low, high = (float(v) for v in crops.aminmax())
            # an antialiased resize of the user's may overshoot a little
            if low < -0.5 or high > 1.5:
                raise ValueError(
                    f"images must lie in 0..1, before mean and std are taken off, got {low:.4g} to {high:.4g}; give "
                    "uint8, or floats that are not normalised yet"
                )
        x = _resized(crops, self.resize_to, self.interpolation)
        if self.mean is not None and self.std is not None:
            if len(self.mean) not in (1, x.shape[1]) or len(self.std) not in (1, x.shape[1]):
                raise ValueError(f"mean and std must have {x.shape[1]} values, one per channel, got {self.mean}")
            x = (x - x.new_tensor(self.mean).view(-1, 1, 1)) / x.new_tensor(self.std).view(-1, 1, 1)
        return self.model(x, **kwargs)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Outputs of the model for the chosen crops of images (B, C, H, W), not yet normalised."""
        return self.classify(self.selector(pixel_values)[0], **kwargs)


class RICSImageProcessor:
    """A transformers image processor that first chooses the crop; for PIL images, arrays and tensors, of any sizes.

    The short side is resized to ``window``, the crop is chosen there, and the processor resizes and normalises it. A
    centre crop of the processor is left out, since the crop is already taken.

    Args:
        processor: a transformers image processor.
        selector: of the crop.
        window: short side at which crops are chosen; ``None`` leaves the image at the size it has, which is what the
            guarantee wants: a resize after the camera has moved by a pixel shifts by less than a pixel.

    Raises:
        TypeError, ValueError: for what is no processor, and a window smaller than the crop; at a call, for images of
            another kind, rank or number of channels (1 or 3), floats outside 0..1, NaN, and images that are smaller
            than the crop.

    Example:
        >>> from transformers import ViTImageProcessor
        >>> processor = RICSImageProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), CropSelector(28))
        >>> processor([torch.rand(3, 40, 48)], return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 32, 32])
    """

    def __init__(self, processor: Any, selector: CropSelector, window: int | None = None) -> None:
        if not callable(processor):
            raise TypeError(f"processor must be an image processor of transformers, got {type(processor).__name__}")
        if window is not None and window < min(selector.crop_size):
            raise ValueError(f"window {window} is smaller than the crop {selector.crop_size}")
        self.processor, self.selector, self.window = processor, selector, window

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "processor" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.processor, name)

    def _crop(self, image: Any) -> Any:
        import numpy as np

        if not isinstance(image, Tensor):
            if not isinstance(image, np.ndarray) and not hasattr(image, "convert"):
                raise TypeError(f"an image must be a PIL image, an array or a tensor, got {type(image).__name__}")
            array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
            image = torch.from_numpy(array.copy())
            image = image.movedim(-1, 0) if image.ndim == 3 and image.shape[0] not in (1, 3) else image
        if image.ndim != 3:
            raise ValueError(f"an image must have shape (C, H, W) or be a PIL image, got {tuple(image.shape)}")
        if image.shape[0] not in (1, 3):
            raise ValueError(f"an image must have 1 or 3 channels, got shape {tuple(image.shape)}")
        x = _checked(image[None])
        low, high = (float(v) for v in x.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"an image has floats from {low:.4g} to {high:.4g}; scale them to 0..1, or give uint8")
        if self.window is not None:
            scale = self.window / min(x.shape[-2:])
            size = tuple(max(self.window, round(s * scale)) for s in x.shape[-2:])
            x = _resized(x, (size[0], size[1]), "bicubic").clamp(0, 1)
        # bytes again, which is what processors rescale
        return (self.selector(x)[0][0] * 255).round().to(torch.uint8).movedim(0, -1).numpy()

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        """As the processor's own call."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, **kwargs: Any) -> Any:
        """As the processor's own, which some callers use."""
        several = isinstance(images, (list, tuple)) or (isinstance(images, Tensor) and images.ndim == 4)
        crops = [self._crop(image) for image in (images if several else [images])]
        if getattr(self.processor, "do_center_crop", False):
            kwargs = {"do_center_crop": False, "size": dict(_given(self.processor.crop_size))} | kwargs
        return self.processor(crops, **kwargs)


def _given(size: Any) -> Mapping[str, int]:
    return {key: size[key] for key in ("height", "width")}


def _steps(shift: Any) -> tuple[int, int]:
    if not isinstance(shift, Sequence) or len(shift) != 2 or not all(isinstance(v, int) for v in shift):
        raise ValueError(f"shift must be one or two whole numbers of pixels, got {shift!r}")
    return shift[0], shift[1]


def consistency_bound(n: Size, m: Size, shift: int | tuple[int, int] = 1, *, worst_case: bool = False) -> float:
    """Probability that the same crop is chosen before and after a shift, for an exchangeable score.

    With K candidate positions per axis in each window, the two windows share ``(K-|a|)(L-|b|)`` candidates of
    ``2KL - (K-|a|)(L-|b|)`` in all, and agree exactly when the best of all is among the shared ones. Equality holds
    where every candidate is as likely to be the best; on photos, whose neighbouring scores resemble each other, it is
    a little less. That predictions agree is at least as likely. This closed form is our derivation.

    Args:
        n: size of the image.
        m: size of the crop.
        shift: (rows, columns), or one number for a shift along one axis.
        worst_case: the same crop for all shifts of at most ``|a|`` rows and ``|b|`` columns at once (one number: both).

    Raises:
        ValueError: for a crop larger than the image, or a shift by less than a pixel.

    Example:
        >>> round(consistency_bound(256, 224), 3), round(consistency_bound(256, 192, worst_case=True), 3)
        (0.941, 0.884)
    """
    N, M = _pair(n, "n"), _pair(m, "m")
    if M[0] > N[0] or M[1] > N[1]:
        raise ValueError(f"the crop {m} is larger than the image {n}")
    a, b = (shift, shift if worst_case else 0) if isinstance(shift, int) else _steps(shift)
    K, L = N[0] - M[0] + 1, N[1] - M[1] + 1
    if worst_case:
        # the best of the union of all windows has to lie in their intersection
        inner = max(K - 2 * abs(a), 0) * max(L - 2 * abs(b), 0)
        return inner / ((K + 2 * abs(a)) * (L + 2 * abs(b)))
    shared = max(K - abs(a), 0) * max(L - abs(b), 0)
    return shared / (2 * K * L - shared)


def crop_size_for(n: int, level: float, shift: int | tuple[int, int] = 1, *, worst_case: bool = False) -> int:
    """Largest square crop whose ``consistency_bound`` reaches a level.

    Raises:
        ValueError: for an image that is not square, a level outside 0..1, or one that no crop of at least 3 pixels
            reaches; names the best.

    Example:
        >>> crop_size_for(256, 0.9695)
        192
    """
    if not isinstance(n, int):
        raise ValueError(f"n must be one number, the side of a square image, got {n!r}")
    if not 0 <= level <= 1:
        raise ValueError(f"level must lie in 0..1, got {level}")
    for m in range(n, 2, -1):
        if consistency_bound(n, m, shift, worst_case=worst_case) >= level:
            return m
    best = consistency_bound(n, min(3, n), shift, worst_case=worst_case)
    raise ValueError(f"no crop of an image of {n} pixels reaches {level}; the smallest, 3 pixels, reaches {best:.4f}")


@dataclass(frozen=True)
class TranslationReport:
    """What small shifts do to a model, over N images and the offsets in ``offsets``.

    Attributes:
        offsets: (rows, columns) of each shift; (0, 0) is among them.
        predictions: class of each image at each offset, int64 (N, offsets); ``None`` for embeddings.
        agrees: whether the answer at the offset is that of the image which is not shifted, bool (N, offsets).
        same_crop: whether the chosen crop shows the same content, bool (N, offsets); ``None`` without a selector, or
            for shifts of your own, of which it is not known where they bring a place.
        right: whether the answer is right where nothing is shifted, bool (N,); ``None`` without labels.
    """

    offsets: tuple[tuple[int, int], ...]
    predictions: Tensor | None
    agrees: Tensor
    same_crop: Tensor | None
    right: Tensor | None

    def _moved(self) -> list[int]:
        return [i for i, offset in enumerate(self.offsets) if offset != (0, 0)]

    @property
    def accuracy(self) -> float | None:
        """Share of right answers without a shift."""
        return None if self.right is None else self.right.double().mean().item()

    @property
    def mean_consistency(self) -> float:
        """Share of shifted images that are answered as without the shift."""
        return self.agrees[:, self._moved()].double().mean().item()

    @property
    def fooled(self) -> Tensor:
        """Whether some shift changes the answer, bool (N,)."""
        return ~self.agrees.all(1)

    @property
    def adversarial_consistency(self) -> float:
        """Share of images whose answer no shift changes."""
        return 1 - self.fooled.double().mean().item()

    @property
    def same_crop_rate(self) -> float | None:
        """Share of shifted images in which the same content was chosen."""
        return None if self.same_crop is None else self.same_crop[:, self._moved()].double().mean().item()

    def per_offset(self) -> dict[tuple[int, int], float]:
        """Share of images answered as without a shift, for each offset."""
        return dict(zip(self.offsets, self.agrees.double().mean(0).tolist(), strict=True))


def shifted_window(images: Tensor, dy: int, dx: int, size: tuple[int, int], kind: Kind) -> Tensor:
    """What a window in the middle of the images shows after a shift; see ``translation_report``."""
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    if kind == "realistic":
        return images[..., top + dy : top + dy + size[0], left + dx : left + dx + size[1]]
    centre = images[..., top : top + size[0], left : left + size[1]]
    rolled = centre.roll((-dy, -dx), (-2, -1))
    if kind == "zero":
        if dy:
            rolled[..., -dy:, :] = 0 if dy > 0 else rolled[..., -dy:, :]
            if dy < 0:
                rolled[..., :-dy, :] = 0
        if dx > 0:
            rolled[..., -dx:] = 0
        elif dx < 0:
            rolled[..., :-dx] = 0
    return rolled


def answers_of(found: Any, images: int, similarity: float | None) -> Tensor:
    """Logits or features (B, K) out of what a model gave for so many images."""
    got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    names = ("logits", "image_embeds", "pooler_output")
    held = {name: found.get(name) if isinstance(found, Mapping) else getattr(found, name, None) for name in names}
    name = next((name for name in names if held[name] is not None), None)
    values = found if name is None else held[name]
    if name == "pooler_output" and isinstance(values, Tensor):
        # convolutional encoders of transformers pool to (B, K, 1, 1)
        values = values.flatten(1)
    if not isinstance(values, Tensor) or values.ndim != 2:
        got += f" with {name} {tuple(values.shape)}" if isinstance(values, Tensor) and name is not None else ""
        raise ValueError(f"model must return logits or features of shape (B, K), got {got}")
    if len(values) != images:
        raise ValueError(f"model must return a row for each of {images} images, got {tuple(values.shape)}")
    if similarity is None and name not in (None, "logits"):
        raise ValueError(f"model returns features ({name}) and no logits; give similarity to compare these")
    if similarity is None and values.shape[1] < 2:
        raise ValueError("model returns one logit, of which the largest is always the first; return one per class")
    if values.isnan().any():
        raise ValueError("model returns NaN, of which every answer would look alike")
    return values


def _asked_once(
    model: RICSModel, moved: Callable[[int, int], Tensor], offsets: Offsets, realistic: bool, batch_size: int
) -> tuple[list[Any], Tensor, Tensor]:
    """Outputs for crops that differ; which of them belongs to image and offset; where the crops are (N, offsets, 2)."""
    places, rows = [], []
    distinct: list[Tensor] = []
    known: dict[tuple[int, ...], int] = {}
    for o, offset in enumerate(offsets):
        chosen = [model.selector(x) for x in moved(*offset).split(batch_size)]
        places.append(torch.cat([place for _, place in chosen]))
        row = []
        for i, (crop, place) in enumerate(
            zip((c for crops, _ in chosen for c in crops), places[o].tolist(), strict=True)
        ):
            # where content is the same only if the place is: zeros that enter, and one's own shifts, are not
            key = (i, place[0] + offset[0], place[1] + offset[1]) if realistic else (i, o)
            if key not in known:
                known[key] = len(distinct)
                distinct.append(crop.clone())
            row.append(known[key])
        rows.append(row)
    answers = [
        (model.classify(torch.stack(distinct[i : i + batch_size])), len(distinct[i : i + batch_size]))
        for i in range(0, len(distinct), batch_size)
    ]
    return answers, torch.tensor(rows).T, torch.stack(places, 1)


@torch.no_grad()
def translation_report(
    model: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor | None = None,
    *,
    max_shift: int = 1,
    kind: Kind | Window = "realistic",
    window: Size | None = None,
    similarity: float | None = None,
    batch_size: int = 32,
) -> TranslationReport:
    """Ask a model about every shift of at most ``max_shift`` pixels in each direction, in eval mode.

    Args:
        model: from images (B, C, n, n) to logits or features (B, K), or a transformers output or mapping that has them.
            For a ``RICSModel``, equal crops are computed once. Its mode is put back.
        images: (N, C, H, W). ``realistic`` moves a window over them, so they must be larger than it.
        labels: (N,), for accuracy.
        max_shift: t; there are (2t+1)^2 offsets.
        kind: ``realistic`` (new content enters at one side), ``zero`` (zeros enter), ``cyclic`` (what leaves at one
            side enters at the other), or a callable ``(images, dy, dx, size) -> window``.
        window: size n; by default what leaves room for the shifts (``realistic``), or the whole image.
        similarity: for features instead of logits: answers agree where the cosine similarity to the image which is not
            shifted is at least this.
        batch_size: images per pass.

    Raises:
        TypeError, ValueError: when the images leave no room for the shifts, have NaN or infinite pixels or are no
            images; labels do not fit; the model returns no logits (without ``similarity``), a single one, or NaN.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must have shape (N, C, H, W) with N >= 1, got {got}")
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"labels must have shape ({len(images)},), got {tuple(labels.shape)}")
    if similarity is not None and labels is not None:
        raise ValueError("labels belong to classes; leave them out, or similarity")
    if similarity is not None and not -1 <= similarity <= 1:
        raise ValueError(f"similarity is a cosine, -1..1, got {similarity}")
    if max_shift < 0:
        raise ValueError(f"max_shift must not be negative, got {max_shift}")
    if isinstance(kind, str) and kind not in ("realistic", "zero", "cyclic"):
        raise ValueError(f"kind must be 'realistic', 'zero', 'cyclic' or a callable, got {kind!r}")
    H, W = images.shape[-2:]
    room = 2 * max_shift if kind == "realistic" else 0
    if min(H, W) <= room:
        raise ValueError(f"images of {H} x {W} leave no room for shifts of {max_shift} pixels")
    size = (H - room, W - room) if window is None else _pair(window, "window")
    if size[0] + room > H or size[1] + room > W:
        raise ValueError(
            f"a window of {size} that moves by {max_shift} needs images of {size[0] + room} or more pixels"
        )
    images = _checked(images)
    steps = range(-max_shift, max_shift + 1)
    offsets = tuple((dy, dx) for dy in steps for dx in steps)
    centre = offsets.index((0, 0))

    def moved(dy: int, dx: int) -> Tensor:
        return kind(images, dy, dx, size) if callable(kind) else shifted_window(images, dy, dx, size, kind)

    same = None
    with evaluating(_owner(model)):
        if isinstance(model, RICSModel):
            answers, index, where = _asked_once(model, moved, offsets, kind == "realistic", batch_size)
            found = torch.cat([answers_of(found, count, similarity) for found, count in answers])[index]
            if not callable(kind):
                where = where + where.new_tensor(offsets)
                where = where % where.new_tensor(size) if model.selector.circular else where
                same = (where == where[:, centre, None]).all(-1)
        else:
            rows = [[answers_of(model(x), len(x), similarity) for x in moved(*o).split(batch_size)] for o in offsets]
            found = torch.stack([torch.cat(row) for row in rows], 1)
    if similarity is None:
        predictions = found.argmax(-1)
        right = None if labels is None else predictions[:, centre] == labels
        return TranslationReport(offsets, predictions, predictions == predictions[:, centre, None], same, right)
    near = F.cosine_similarity(found, found[:, centre, None], dim=-1) >= similarity
    # the cosine of equal features may be rounded to less than one
    agrees = near | (found == found[:, centre, None]).all(-1)
    return TranslationReport(offsets, None, agrees, same, None)
