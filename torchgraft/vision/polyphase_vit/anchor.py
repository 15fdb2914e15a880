"""Adaptive polyphase anchoring: the grid of a strided operation is laid where the image says (arXiv 2306.07470, 3).

Letters: B images, C channels, H W size, N = H W, p q size of a patch (or window, or stride), K = p q grid offsets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

__all__ = [
    "CircularPEG",
    "PolyPatchEmbed",
    "PolyphaseAnchor",
    "anchor_tokens",
    "polyphase_anchor",
    "polyphase_norms",
    "polyphase_offsets",
    "polyphase_unanchor",
]

Size = int | tuple[int, int]
Norm = Literal["filtered", "l2"] | float

# any nine numbers do that have no symmetry and no sum: then flat regions and brightness do not count
_KERNEL = ((0.37, -0.81, 0.59), (-0.23, 0.94, -0.46), (0.68, -0.15, -0.93))
_ODD = 0x9E3779B97F4A7C15
# normalised images stay within a few units
_FAR = 32.0
# pixels: so few channels are summed in a fixed order
_FEW = 4


def _pair(value: Size, name: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or any(not isinstance(v, int) or isinstance(v, bool) or v < 1 for v in pair):
        raise ValueError(f"{name} must be a positive int or a pair of them, got {value!r}")
    return pair[0], pair[1]


def check_norm(norm: Norm) -> Norm:
    """The norm itself, or an error that says which there are."""
    number = isinstance(norm, int | float) and not isinstance(norm, bool)
    known = norm in ("filtered", "l2") if isinstance(norm, str) else number and 0 < norm < math.inf
    if not known:
        raise ValueError(f"norm must be 'filtered', 'l2' or a finite p > 0 of a p-norm, got {norm!r}")
    return norm


def check_divides(size: tuple[int, int], patch: tuple[int, int], what: str) -> None:
    """Raise unless a grid of patches covers the size; says which size would do."""
    if any(s % p or s == 0 for s, p in zip(size, patch, strict=True)):
        fits = tuple(max(1, math.ceil(s / p)) * p for s, p in zip(size, patch, strict=True))
        raise ValueError(
            f"{what} of {size[0]} x {size[1]} is not a whole number of {patch[0]} x {patch[1]} patches or windows; the "
            f"smallest size that is: {fits[0]} x {fits[1]}. Resize the images: padding them breaks cyclic equivariance"
        )


def check_pixels(x: Tensor, channels: int) -> None:
    """Raise for what cannot be a batch of normalised images."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"pixel_values must have shape (B, {channels}, H, W), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"pixel_values must be floating point, got {x.dtype}; bytes want x / 255, then normalising")
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
        return
    low, high = (float(v) for v in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixel_values have NaN or infinite values")
    if max(-low, high) > _FAR:
        raise ValueError(
            f"pixel_values run from {low:.4g} to {high:.4g}, which looks like bytes; divide by 255 and normalise as "
            "the model's image processor does"
        )


def _response(x: Tensor) -> Tensor:
    """Response (B, H, W) of a fixed 3 x 3 filter over all channels, going round at the edges.

    Products and sums one after the other: a fused multiply-add, or a convolution of a library, may round otherwise at
    the end of a row than in its middle.
    """
    H, W = x.shape[2:]
    mix = torch.cos(torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float64).square()).to(x.dtype)
    flat = _channel_sum(x, mix) if x.shape[1] <= _FEW else torch.einsum("bchw,c->bhw", x, mix)
    around = nn.functional.pad(flat[:, None], (1, 1, 1, 1), "circular")[:, 0]
    out = torch.zeros_like(flat)
    for i, row in enumerate(_KERNEL):
        for j, weight in enumerate(row):
            out = out + around[:, i : i + H, j : j + W] * weight
    return out


def _channel_sum(x: Tensor, weights: Tensor) -> Tensor:
    out = x[:, 0] * weights[0]
    for c in range(1, x.shape[1]):
        out = out + x[:, c] * weights[c]
    return out


def _fixed_point(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, float]:
    """What the p-th power of the norm sums at each pixel, as whole numbers (B, H, W); their unit (B,); and p.

    Whole numbers, since their sum does not depend on the order: a shifted copy has the very same sums.
    """
    x = x.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    power = 2.0 if isinstance(norm, str) else float(norm)
    if norm == "filtered":
        values = _response(x).double().square()
    else:
        powers = x.square() if power == 2 else x.abs() ** power
        few = x.shape[1] <= _FEW
        values = _channel_sum(powers.double(), x.new_ones(x.shape[1])) if few else powers.sum(1, dtype=torch.float64)
    peak = values.amax((1, 2))
    if not torch.compiler.is_compiling() and x.device.type == "cpu" and not bool(peak.isfinite().all()):
        what = "values too large for this norm" if bool(x.isfinite().all()) else "NaN or infinite values"
        raise ValueError(f"the input has {what}; there is no largest polyphase component then")
    # all values together stay below 2^62
    unit = peak * 2.0 ** (math.ceil(math.log2(x.shape[2] * x.shape[3])) - 62)
    return (values / torch.where(unit > 0, unit, 1.0)[:, None, None]).round().long(), unit, power


def _phase_sums(whole: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, H, W) summed over each of the K grids: (B, K)."""
    B, H, W = whole.shape
    return whole.view(B, H // patch[0], patch[0], W // patch[1], patch[1]).sum((1, 3)).flatten(1)


def _scrambled(whole: Tensor) -> Tensor:
    for shift in (29, 31):
        whole = (whole ^ (whole >> shift)) * (_ODD - (1 << 64))
    return whole


def _views(x: Tensor) -> Tensor:
    """A number for the whole image as it looks from each pixel, (B, H, W); equal only where the views are equal."""
    x = x.detach()
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    seen = x if x.shape[1] <= _FEW else _response(x)[:, None]
    # the bits themselves, of which no difference is lost; adding 0 makes one zero of two
    bits = (seen + 0.0).view(torch.int32 if x.dtype == torch.float32 else torch.int64).long()
    whole = torch.zeros_like(bits[:, 0])
    for c in range(bits.shape[1]):
        whole = _scrambled(whole + bits[:, c])
    for axis in (1, 2):
        step, factor = 1, _ODD
        while step < whole.shape[axis]:
            # whole numbers wrap round at 2^64, which is exact arithmetic too
            whole = whole + whole.roll(-step, axis) * (factor - (1 << 64) if factor >> 63 else factor)
            step, factor = 2 * step, factor * factor % (1 << 64)
    return _scrambled(whole)


def _first_of_largest(keys: Tensor, breaker: Tensor | None) -> Tensor:
    """Index of the largest key in each row (B,); among equal ones of the largest breaker, then the first."""
    if breaker is None:
        return keys.argmax(1)
    lowest = torch.iinfo(breaker.dtype).min
    return torch.where(keys == keys.amax(1, keepdim=True), breaker, lowest).argmax(1)


def _check_map(x: Tensor, patch: tuple[int, int]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor of shape (B, C, H, W), got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    if not x.shape[1]:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}; whole numbers 0..255 want x / 255")
    check_divides((x.shape[2], x.shape[3]), patch, "a map")


def polyphase_norms(x: Float[Tensor, "B C H W"], patch: Size, norm: Norm = "filtered") -> Tensor:
    """Norm of each polyphase component ``x[:, :, a::p, b::q]``.

    Args:
        x: images or feature maps, H and W multiples of the patch.
        patch: (p, q) or one number.
        norm: ``"l2"`` or a number p for the p-norm of the values themselves (the paper's choice is 2), ``"filtered"``
            for the 2-norm of a fixed filter's response to them.

    Returns:
        float64 (B, p, q).

    Example:
        >>> polyphase_norms(torch.tensor([[[[3.0, 0.0], [4.0, 1.0]]]]), 2, "l2")[0].tolist()
        [[3.0, 0.0], [4.0, 1.0]]
    """
    p, q = _pair(patch, "patch")
    _check_map(x, (p, q))
    whole, unit, power = _fixed_point(x, check_norm(norm))
    return (_phase_sums(whole, (p, q)) * unit[:, None]).pow(1 / power).unflatten(1, (p, q))


def polyphase_offsets(
    x: Float[Tensor, "B C H W"], patch: Size, norm: Norm = "filtered", *, invariant: bool = False
) -> Int64[Tensor, "B 2"]:
    """Row and column at which the grid of patches begins in each image: the largest polyphase component (3.1).

    With ``norm="filtered"`` a tie is broken by what the whole image looks like from the places that are tied, so that
    what remains tied is equal up to a cyclic shift, and the choice among it does not matter. On pixels the choice is
    exact to the last bit: it follows every cyclic shift, whatever the image. With other norms the first of equal ones
    is taken, as in the official code; on images of few grey levels that is often the wrong one after a shift.

    Args:
        x: images or feature maps; may be half precision, everything is summed in 64 bits.
        patch: (p, q) or one number.
        norm: as in ``polyphase_norms``.
        invariant: choose, besides the grid, the patch that is put first, the largest of the component. Rolled there,
            all cyclic shifts of an image are one and the same image.

    Returns:
        int64 (B, 2), within the patch, or within the image if ``invariant``.

    Raises:
        ValueError: for sizes that are no multiple of the patch, an unknown norm, NaN or infinite values (the last only
            on CPU and outside ``torch.compile``, where looking costs nothing).

    Example:
        >>> x = torch.zeros(1, 1, 4, 4)
        >>> x[0, 0, 3, 2] = 1
        >>> polyphase_offsets(x, 2, "l2").tolist(), polyphase_offsets(x, 2, "l2", invariant=True).tolist()
        ([[1, 0]], [[3, 2]])
    """
    p, q = _pair(patch, "patch")
    _check_map(x, (p, q))
    B, _, H, W = x.shape
    check_norm(norm)
    if (p, q) == (1, 1) and not invariant:
        return torch.zeros(B, 2, dtype=torch.long, device=x.device)
    whole, _, _ = _fixed_point(x, norm)
    sums = _phase_sums(whole, (p, q))
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()

    def tied(keys: Tensor) -> bool:
        # asking costs a wait on an accelerator, and more than the answer saves
        return not eager or bool(((keys == keys.amax(1, keepdim=True)).sum(1) > 1).any())

    views = None
    if norm == "filtered" and tied(sums):
        views = _views(x)
    best = _first_of_largest(sums, None if views is None else _phase_sums(views, (p, q)))
    offsets = torch.stack([best // q, best % q], 1)
    if not invariant:
        return offsets
    index = _rolled(offsets, H, W)

    def component(values: Tensor) -> Tensor:
        return values.flatten(1).gather(1, index).view(B, H, W)[:, ::p, ::q].flatten(1)

    keys = component(whole)
    if norm == "filtered" and views is None and tied(keys):
        views = _views(x)
    first = _first_of_largest(keys, None if views is None else component(views))
    return offsets + torch.stack([first // (W // q) * p, first % (W // q) * q], 1)


def _rolled(offsets: Tensor, H: int, W: int) -> Tensor:
    """Flat indices (B, N) that roll a map so that the offset comes first."""
    rows = (torch.arange(H, device=offsets.device) + offsets[:, :1]) % H
    columns = (torch.arange(W, device=offsets.device) + offsets[:, 1:]) % W
    return (rows[:, :, None] * W + columns[:, None, :]).flatten(1)


def _roll(x: Tensor, offsets: Tensor) -> Tensor:
    B, C, H, W = x.shape
    index = _rolled(offsets, H, W)[:, None].expand(B, C, H * W)
    return x.flatten(2).gather(2, index).view(B, C, H, W)


@overload
def polyphase_anchor(
    x: Tensor, patch: Size, norm: Norm = ..., *, invariant: bool = ..., return_offsets: Literal[False] = ...
) -> Tensor: ...
@overload
def polyphase_anchor(
    x: Tensor, patch: Size, norm: Norm = ..., *, invariant: bool = ..., return_offsets: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def polyphase_anchor(
    x: Float[Tensor, "B C H W"],
    patch: Size,
    norm: Norm = "filtered",
    *,
    invariant: bool = False,
    return_offsets: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Roll each image so that its largest polyphase component lies on the grid (the paper's operator A_p).

    Cyclic shifts of an image come out as shifts of each other by whole patches, so that a convolution with kernel and
    stride p, or attention in windows of p, becomes equivariant. Anchoring twice is anchoring once. Gradients are rolled
    back; the choice itself has none.

    Args:
        x: images or feature maps.
        patch: patch, window or stride; (p, q) or one number.
        norm: as in ``polyphase_offsets``; the official code has the 2-norm of the values alone.
        invariant: roll the largest patch to the corner as well; all cyclic shifts then give the same tensor.
        return_offsets: also return the offsets (B, 2), for ``polyphase_unanchor``.

    Raises:
        ValueError, TypeError: as ``polyphase_offsets``.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> a, b = polyphase_anchor(x, 8, invariant=True), polyphase_anchor(x.roll((3, 5), (2, 3)), 8, invariant=True)
        >>> torch.equal(a, b)
        True
    """
    offsets = polyphase_offsets(x, patch, norm, invariant=invariant)
    out = _roll(x, offsets)
    return (out, offsets) if return_offsets else out


def polyphase_unanchor(
    y: Float[Tensor, "B C h w"], offsets: Int64[Tensor, "B 2"], stride: int = 1
) -> Float[Tensor, "B C h w"]:
    """Roll a dense output back to where the image stood before anchoring.

    The offset of a patch embedding is less than a patch, so its output has to be brought to pixels first (for instance
    ``y.repeat_interleave(p, 2).repeat_interleave(p, 3)``); then f(shifted x) is exactly f(x) shifted.

    Args:
        y: (B, C, h, w), at 1/stride of the resolution that was anchored.
        offsets: of ``polyphase_anchor(..., return_offsets=True)``.
        stride: by which y is smaller; the offsets must be multiples of it.

    Raises:
        ValueError: for offsets that are no multiples of the stride, or not one pair an image.

    Example:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> anchored, offsets = polyphase_anchor(x, 4, return_offsets=True)
        >>> torch.equal(polyphase_unanchor(anchored, offsets), x)
        True
    """
    if y.ndim != 4 or offsets.shape != (len(y), 2):
        raise ValueError(f"y must be (B, C, h, w) with offsets (B, 2), got {tuple(y.shape)} and {tuple(offsets.shape)}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets must be int64, as polyphase_anchor returns them, got {offsets.dtype}")
    if stride < 1:
        raise ValueError(f"stride must be positive, got {stride}")
    if stride > 1 and bool((offsets % stride).any()):
        raise ValueError(
            f"offsets up to {offsets.amax(0).tolist()} are no multiples of stride {stride}; bring y to the resolution "
            f"that was anchored first, for instance by repeating every value {stride} times along both axes"
        )
    back = -torch.div(offsets, stride, rounding_mode="floor")
    return _roll(y, back % offsets.new_tensor(y.shape[2:]))


def anchor_tokens(
    tokens: Float[Tensor, "B N C"], size: tuple[int, int], patch: Size, norm: Norm = "filtered"
) -> Float[Tensor, "B N C"]:
    """``polyphase_anchor`` for tokens in rows: before window attention, a strided convolution, or patch merging.

    Args:
        tokens: (B, H W, C).
        size: (H, W).
        patch: window or stride in tokens.
        norm: ``"filtered"`` sees differences that the plain norm does not: after a layer norm all tokens have the same
            length, and what a plain norm then compares is rounding.

    Example:
        >>> anchor_tokens(torch.rand(2, 36, 8), (6, 6), 3).shape
        torch.Size([2, 36, 8])
    """
    H, W = size
    if tokens.ndim != 3 or tokens.shape[1] != H * W:
        raise ValueError(f"tokens must have shape (B, {H * W}, C) for a grid of {H} x {W}, got {tuple(tokens.shape)}")
    offsets = polyphase_offsets(tokens.unflatten(1, size).permute(0, 3, 1, 2), patch, norm)
    return tokens.gather(1, _rolled(offsets, H, W)[..., None].expand_as(tokens))


class PolyphaseAnchor(nn.Module):
    """``polyphase_anchor`` as a layer without parameters.

    Args:
        patch: of the operation that follows; (p, q) or one number.
        norm: as in ``polyphase_offsets``.
        invariant: all cyclic shifts of an image give the same tensor, so that whatever follows is invariant, position
            embeddings and padding included.

    Example:
        >>> invariant = nn.Sequential(PolyphaseAnchor(4, invariant=True), nn.Flatten(), nn.Linear(64, 3))
        >>> x = torch.rand(1, 1, 8, 8)
        >>> torch.equal(invariant(x), invariant(x.roll(1, 2)))
        True
    """

    def __init__(self, patch: Size, norm: Norm = "filtered", invariant: bool = False) -> None:
        super().__init__()
        self.patch, self.norm, self.invariant = _pair(patch, "patch"), check_norm(norm), invariant

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Anchored images."""
        return polyphase_anchor(x, self.patch, self.norm, invariant=self.invariant)

    def extra_repr(self) -> str:
        """Settings."""
        return f"patch={self.patch}, norm={self.norm!r}, invariant={self.invariant}"


class CircularPEG(nn.Module):
    """Position from what is around: tokens plus a depth-wise 3 x 3 convolution of them that goes round at the edges.

    Takes the place of absolute position embeddings (paper, 3.3; PEG is arXiv 2102.10882 with zeros at the edges).

    Args:
        dim: width of the tokens.

    Example:
        >>> CircularPEG(8)(torch.rand(2, 12, 8), (3, 4)).shape
        torch.Size([2, 12, 8])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, padding_mode="circular")

    def forward(self, tokens: Float[Tensor, "B N C"], size: tuple[int, int]) -> Float[Tensor, "B N C"]:
        """Tokens (B, H W, C) of a grid (H, W), class tokens left out."""
        if tokens.ndim != 3 or tokens.shape[1] != size[0] * size[1]:
            want = f"(B, {size[0] * size[1]}, {self.proj.in_channels})"
            raise ValueError(
                f"tokens of a {size[0]} x {size[1]} grid must have shape {want}, got {tuple(tokens.shape)}"
            )
        return tokens + self.proj(tokens.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)


class PolyPatchEmbed(nn.Module):
    """Anchored patch embedding: anchoring, convolution with kernel = stride = patch, layer norm.

    Args:
        patch_size: (p, q) or one number.
        in_chans: channels of the images.
        embed_dim: width of the tokens.
        norm_layer: ``nn.LayerNorm`` as in the official code, which a plain ViT does not have; ``None`` for none.
        norm: as in ``polyphase_offsets``.

    Example:
        >>> PolyPatchEmbed(4, 3, 16)(torch.rand(2, 3, 8, 12)).shape
        torch.Size([2, 6, 16])
    """

    def __init__(
        self,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: type[nn.Module] | None = nn.LayerNorm,
        norm: Norm = "filtered",
    ) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size, "patch_size")
        self.anchor = PolyphaseAnchor(self.patch_size, norm)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Tokens, row by row."""
        return self.norm(self.proj(self.anchor(pixel_values)).flatten(2).transpose(1, 2))
