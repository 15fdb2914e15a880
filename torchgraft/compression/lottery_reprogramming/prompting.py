"""Visual prompts: learned pixels around (or on the border of) images that are not the network's own.

Dimensions: B images, C channels, H and W of the images that come in, S the side of the network's input.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Mode = Literal["expansive", "additive"]
Init = Literal["zero", "randn"]


def _check_range(x: Tensor) -> None:
    if not x.numel():
        return
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    # NaN fails both comparisons
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise ValueError(
            f"images must lie in 0..1 before normalisation, got {low:.4g}..{high:.4g}; "
            "normalisation belongs after the prompt (mean=, std=), and bytes are divided by 255"
        )


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> None:
    """Refuse a mean without a deviation, other than one number per channel, and deviations that are not positive."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together; give both or None for both")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise ValueError(f"{name} must have one number per channel ({channels}), got {values}")
    if std is not None and not all(value > 0 for value in std):
        raise ValueError(f"std must be positive, got {std}")


def normalize(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """``(x - mean) / std`` per channel; ``x`` itself without them."""
    if mean is None or std is None:
        return x
    middle, spread = (x.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    return (x - middle) / spread


def prepare_images(x: Shaped[Tensor, "B C H W"], size: int, channels: int = 3) -> Float[Tensor, "B C2 size size"]:
    """Images of any size, bytes or numbers in 0..1, grey or coloured, as a network or a prompt wants them.

    Sizes change by bilinear interpolation with antialiasing, as torchvision's ``Resize`` does.

    Args:
        x: shape (B, C, H, W); bytes (0..255), or floating-point numbers in 0..1.
        size: side of the result.
        channels: of the result; grey images are repeated, with a warning.

    Returns:
        Shape (B, channels, size, size), floating point.

    Raises:
        TypeError: for whole numbers that are not bytes.
        ValueError: for another shape, numbers outside 0..1, and channels that cannot be made.

    Example:
        >>> prepare_images(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), 12).shape
        torch.Size([2, 3, 12, 12])
    """
    if x.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(x.shape)}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if x.dtype == torch.uint8:
        x = x.float() / 255
    elif not x.is_floating_point():
        raise TypeError(f"images must be bytes (torch.uint8) or floating point in 0..1, got {x.dtype}")
    # on an accelerator this would wait for the device at every batch
    elif x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(x)
    if x.shape[1] != channels:
        if x.shape[1] != 1:
            raise ValueError(f"images have {x.shape[1]} channels, wanted {channels}; convert them first")
        warnings.warn(f"grey images are repeated to {channels} channels", stacklevel=3)
        x = x.expand(-1, channels, -1, -1)
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x


class VisualPrompt(nn.Module):
    """Learned pixels of a fixed place, the same for every image (sections on visual prompting of the paper and of ILM).

    ``"expansive"``: the image stays as it is, in the middle of a larger canvas, and the frame around it is
    ``sigmoid(program)``, which starts grey. ``"additive"``: the image has the network's own size, and ``program`` is
    added on a border of ``pad`` pixels, starting from nothing. Normalisation comes after the prompt. Where the frame is
    not of even width, the extra pixel is left and above.

    Parameter ``program`` and buffer ``mask`` have the names and shapes of the official code, so its checkpoints
    (``visual_prompt_dict``) load. Unlike there, normalisation is part of the additive prompt too, and images are not
    changed in place.

    Args:
        out_size: S, side of the network's input.
        in_size: side of the images in the middle; 32 for expansive prompts, ``out_size`` for additive ones.
        mode: ``"expansive"`` or ``"additive"``.
        pad: width of the border of an additive prompt, at most half of ``out_size``.
        mean, std: per channel, applied last; ``None`` for both leaves pixels in 0..1.
        init: ``"zero"`` or ``"randn"`` for ``program``.
        channels: of the network's input.

    Raises:
        ValueError: for sizes that leave no pixel to learn, and arguments that do not go together; when called, for
            images of another size, another number of channels, or outside 0..1 (checked on CPU only).

    Example:
        >>> prompt = VisualPrompt(out_size=16, in_size=8, mean=None, std=None)
        >>> out = prompt(torch.zeros(2, 3, 8, 8))
        >>> out.shape, out[0, 0, 0, 0].item(), out[0, 0, 4, 4].item()
        (torch.Size([2, 3, 16, 16]), 0.5, 0.0)
    """

    def __init__(
        self,
        out_size: int = 224,
        in_size: int | None = None,
        mode: Mode = "expansive",
        pad: int | None = None,
        mean: Sequence[float] | None = IMAGENET_MEAN,
        std: Sequence[float] | None = IMAGENET_STD,
        init: Init = "zero",
        channels: int = 3,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be 'expansive' or 'additive', got {mode!r}")
        if init not in get_args(Init):
            raise ValueError(f"init must be 'zero' or 'randn', got {init!r}")
        if out_size < 1 or channels < 1:
            raise ValueError(f"out_size and channels must be positive, got {out_size} and {channels}")
        check_normalisation(mean, std, channels)
        mask = torch.ones(channels, out_size, out_size)
        if mode == "expansive":
            if pad is not None:
                raise ValueError("pad belongs to mode='additive'; an expansive frame has the width that in_size leaves")
            in_size = 32 if in_size is None else in_size
            if not 0 < in_size < out_size:
                raise ValueError(
                    f"in_size must be positive and smaller than out_size={out_size}, or no pixel is left to learn, "
                    f"got {in_size}"
                )
            first = (out_size - in_size + 1) // 2
            inside = slice(first, first + in_size)
        else:
            if pad is None:
                raise ValueError("mode='additive' needs pad=, the width of the border in pixels")
            if in_size not in (None, out_size):
                raise ValueError(f"an additive prompt takes images of out_size={out_size}, got in_size={in_size}")
            if not 0 < pad <= out_size // 2:
                raise ValueError(f"pad must lie in 1..{out_size // 2} (half of out_size), got {pad}")
            in_size, first, inside = out_size, 0, slice(pad, out_size - pad)
        mask[:, inside, inside] = 0
        self.out_size, self.in_size, self.mode, self.pad, self.channels = out_size, in_size, mode, pad, channels
        # the extra pixel of an odd frame lies left and above
        self._margin = (first, out_size - in_size - first)
        self.program = nn.Parameter(torch.zeros_like(mask) if init == "zero" else torch.randn_like(mask))
        self.register_buffer("mask", mask)
        self.mask: Tensor
        self.mean = None if mean is None else tuple(float(v) for v in mean)
        self.std = None if std is None else tuple(float(v) for v in std)

    @classmethod
    def from_processor(cls, processor: Any, in_size: int | None = None, **kwargs: Any) -> VisualPrompt:
        """With size, mean and deviation of a transformers image processor.

        Args:
            processor: for instance ``AutoImageProcessor.from_pretrained(…)``; its ``crop_size`` or else ``size``,
                ``image_mean`` and ``image_std`` are read.
            in_size: as in the class.
            kwargs: further arguments of the class.

        Raises:
            ValueError: when the processor does not say one square size.
        """
        cropped = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None) is not None
        size = processor.crop_size if cropped else processor.size
        sides = {v for v in (size.get("height"), size.get("width"), size.get("shortest_edge")) if v is not None}
        if len(sides) != 1:
            raise ValueError(f"the processor's size {dict(size)} is not one square; pass VisualPrompt(out_size=…)")
        given = {"mean": processor.image_mean, "std": processor.image_std} if processor.do_normalize else {}
        return cls(sides.pop(), in_size, **({"mean": None, "std": None} | given | kwargs))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C S S"]:
        """(B, C, in_size, in_size) in 0..1 to (B, C, out_size, out_size), normalised."""
        if x.shape[1:] != (self.channels, self.in_size, self.in_size):
            raise ValueError(
                f"images must have shape (B, {self.channels}, {self.in_size}, {self.in_size}), got {tuple(x.shape)}; "
                "prepare_images resizes and repeats grey ones"
            )
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(x)
        if self.mode == "expansive":
            x = F.pad(x, self._margin * 2) + torch.sigmoid(self.program) * self.mask
        else:
            x = x + self.program * self.mask
        return normalize(x, self.mean, self.std)

    def extra_repr(self) -> str:
        """Sizes."""
        border = f", pad={self.pad}" if self.mode == "additive" else f", in_size={self.in_size}"
        return f"{self.mode}, out_size={self.out_size}{border}"
