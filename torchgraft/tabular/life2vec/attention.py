"""Attention of life2vec: FAVOR+ in the global heads, softmax in blocks in the local heads, or SDPA for both.

B: batch, H: heads, S: positions, D: features of a head, M: random features, W: window, N: blocks of W positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Life2VecAttention",
    "favor_attention",
    "favor_features",
    "local_attention",
    "local_mask",
    "orthogonal_random_features",
]

Heads = Float[Tensor, "B H S D"]
Valid = Bool[Tensor, "B S"]
Kind = Literal["sdpa", "performer"]


def orthogonal_random_features(
    num_features: int, dim: int, generator: torch.Generator | None = None
) -> Float[Tensor, "M D"]:
    """Gaussian random features whose directions are orthogonal within blocks of ``dim`` (Performer, section 3.1).

    Directions are uniform. Those of performer-pytorch, and so of the official code, are not: they keep the signs that
    the QR factorisation happens to choose, and attention keeps an error that more features do not remove.

    Args:
        num_features: M, rows.
        dim: D, columns.
        generator: of the random numbers; torch's global one if not given. On the CPU.

    Returns:
        Shape (M, D), float32. Lengths of the rows are those of Gaussian vectors.

    Raises:
        ValueError: for sizes below 1.

    Example:
        >>> rows = orthogonal_random_features(6, 4)
        >>> bool((rows[0] @ rows[1]).abs() < 1e-5)
        True
    """
    if num_features < 1 or dim < 1:
        raise ValueError(f"num_features and dim must be at least 1, got {num_features} and {dim}")
    blocks = torch.randn(-(-num_features // dim), dim, dim, generator=generator)
    q, r = torch.linalg.qr(blocks)
    # the signs that the factorisation happens to choose would favour some directions, and attention would be biased
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    directions = q.transpose(1, 2).flatten(0, 1)[:num_features]
    lengths = torch.randn(num_features, dim, generator=generator).norm(dim=1, keepdim=True)
    return directions * lengths


def favor_features(
    x: Heads, projection: Float[Tensor, "M D"], is_query: bool, valid: Valid | None = None, eps: float = 1e-4
) -> Float[Tensor, "B H S M"]:
    """Positive random features of the softmax kernel: ``E[f(q) f(k)] = exp(q k / sqrt(D))`` up to a factor.

    The exponent is stabilised by its largest value, of each query, and of all keys of a head together; what is
    subtracted cancels in attention, except in ``eps``.

    Args:
        x: queries or keys.
        projection: from ``orthogonal_random_features``.
        is_query: which of the two.
        valid: of keys, (B, S); the others get zero features and no say in the largest value.
        eps: keeps features positive.
    """
    x = x * x.shape[-1] ** -0.25
    raw = x @ projection.T
    if is_query:
        largest = raw.amax(-1, keepdim=True)
    else:
        seen = raw if valid is None else raw.masked_fill(~valid[:, None, :, None], -torch.inf)
        largest = seen.amax((-1, -2), keepdim=True)
    features = (raw - x.square().sum(-1, keepdim=True) / 2 - largest.detach()).exp() + eps
    if valid is not None:
        features = features.masked_fill(~valid[:, None, :, None], 0.0)
    return features / math.sqrt(projection.shape[0])


def favor_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    projection: Float[Tensor, "M D"],
    valid: Valid | None = None,
    official_masking: bool = False,
) -> Heads:
    """Softmax attention by random features, in time linear in S (FAVOR+, Choromanski et al., 2021).

    Args:
        q, k, v: heads.
        projection: from ``orthogonal_random_features``.
        valid: positions that are not padding, (B, S).
        official_masking: only zero the values of padded positions, as the official code does; their keys then still
            take part in the denominator, so that outputs depend on how much padding there is.

    Returns:
        Shape of ``v``, in its dtype; computed in float32 where that is of half precision.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
        >>> favor_attention(q, k, v, orthogonal_random_features(16, 4)).shape
        torch.Size([1, 2, 5, 4])
    """
    dtype = v.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    projection = projection.to(v.dtype)
    if valid is not None:
        v = v.masked_fill(~valid[:, None, :, None], 0.0)
    features = favor_features(q, projection, True)
    keys = favor_features(k, projection, False, None if official_masking else valid)
    total = features @ keys.sum(2).unsqueeze(-1)
    return (features @ (keys.transpose(-1, -2) @ v) / total).to(dtype)


def local_mask(length: int, window: int, device: torch.device | str = "cpu") -> Bool[Tensor, "S S"]:
    """Which positions see which: those of the own block of ``window``, the one before and the one behind.

    Example:
        >>> local_mask(6, 2).int().sum(1).tolist()
        [4, 4, 6, 6, 4, 4]
    """
    block = torch.arange(length, device=device) // window
    return (block[:, None] - block[None, :]).abs() <= 1


def _never_empty(mask: Bool[Tensor, ...]) -> Bool[Tensor, ...]:
    """Rows that may look nowhere look everywhere: only padding has such rows, and they must not become NaN."""
    return mask | ~mask.any(-1, keepdim=True)


def _dense(length: int, window: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B, 1, S, S)."""
    mask = local_mask(length, window, device)[None, None]
    return mask if valid is None else _never_empty(mask & valid[:, None, None, :])


def local_attention(
    q: Heads,
    k: Heads,
    v: Heads,
    window: int,
    valid: Valid | None = None,
    dropout: float = 0.0,
    backend: Literal["auto", "mask", "blocks"] = "auto",
) -> Heads:
    """Softmax attention within blocks of ``window`` positions and their neighbours, without relative positions.

    Args:
        q, k, v: heads.
        window: W; position i sees j where ``|i // W - j // W| <= 1``.
        valid: positions that are not padding, (B, S).
        dropout: of the weights.
        backend: ``mask`` is one SDPA with a band mask, quadratic in S; ``blocks`` computes 3 W scores a position;
            ``auto`` takes blocks where they are fewer than half of the scores.

    Raises:
        ValueError: for a window below 1 or an unknown backend.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
        >>> local_attention(q, k, v, window=2).shape
        torch.Size([1, 2, 5, 4])
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if backend not in ("auto", "mask", "blocks"):
        raise ValueError(f"backend must be 'auto', 'mask' or 'blocks', got {backend!r}")
    batch, heads, length, dim = q.shape
    if backend == "mask" or (backend == "auto" and length <= 6 * window):
        return F.scaled_dot_product_attention(q, k, v, _dense(length, window, valid, q.device), dropout)
    rest = -length % window
    blocks = (length + rest) // window
    q = F.pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, window)).flatten(1, 2)

    def around(x: Tensor) -> Tensor:
        wide = F.pad(x, (0, 0, window, window + rest))
        return wide.unfold(2, 3 * window, window).transpose(-1, -2).flatten(1, 2)

    seen = torch.ones(1, length, dtype=torch.bool, device=q.device) if valid is None else valid
    seen = F.pad(seen, (window, window + rest)).unfold(1, 3 * window, window)
    mask = _never_empty(seen)[:, None].expand(-1, heads, -1, -1).flatten(1, 2).unsqueeze(2)
    out = F.scaled_dot_product_attention(q, around(k), around(v), mask, dropout)
    return out.view(batch, heads, blocks * window, dim)[:, :, :length]


class _Projection(nn.Module):
    """Holds the random features of one layer, under the name that the official weights have."""

    projection_matrix: Tensor

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("projection_matrix", torch.zeros(num_features, dim))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        rows, dim = self.projection_matrix.shape
        self.projection_matrix.copy_(orthogonal_random_features(rows, dim, generator))


class Life2VecAttention(nn.Module):
    """Self-attention whose first heads look everywhere and whose last heads look around themselves.

    Args:
        dim: width; ``heads`` must divide it.
        heads: in all.
        local_heads: how many of them, the last ones, are local.
        window: of the local heads.
        num_features: random features of the global heads, for ``kind="performer"``.
        dropout: of the output, and of the attention weights, which FAVOR+ does not have.
        kind: ``sdpa`` is exact softmax in the global heads; ``performer`` is FAVOR+, as published.
        official_masking: as in ``favor_attention``.

    Raises:
        ValueError: for sizes that do not fit together.

    Example:
        >>> layer = Life2VecAttention(8, heads=2, local_heads=1, window=4)
        >>> layer(torch.randn(1, 10, 8), torch.ones(1, 10, dtype=torch.bool))[0].shape
        torch.Size([1, 10, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        local_heads: int,
        window: int,
        num_features: int = 436,
        dropout: float = 0.0,
        kind: Kind = "sdpa",
        official_masking: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got heads={heads}, dim={dim}")
        if not 0 <= local_heads <= heads:
            raise ValueError(f"local_heads must lie in 0..heads, got {local_heads} of {heads}")
        if kind not in ("sdpa", "performer"):
            raise ValueError(f"kind must be 'sdpa' or 'performer', got {kind!r}")
        self.heads, self.local_heads, self.window = heads, local_heads, window
        self.kind, self.official_masking = kind, official_masking
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        if kind == "performer" and local_heads < heads:
            self.fast_attention = _Projection(num_features, dim // heads)
            self.fast_attention.redraw()

    def forward(
        self, x: Float[Tensor, "B S E"], valid: Valid, output_weights: bool = False
    ) -> tuple[Float[Tensor, "B S E"], Float[Tensor, "B L S S"] | None]:
        """(B, S, dim) to the same, and the weights of the local heads where they are asked for."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        drop = self.dropout.p if self.training else 0.0
        first = self.heads - self.local_heads
        length = x.shape[1]
        valid = _never_empty(valid)
        everywhere = valid[:, None, None, :]
        if self.kind == "sdpa" and length <= 2 * self.window:
            # every block is a neighbour of every other: all heads are the same kind of softmax
            out = F.scaled_dot_product_attention(q, k, v, everywhere, drop)
        else:
            parts = []
            if first and self.kind == "sdpa":
                parts.append(F.scaled_dot_product_attention(q[:, :first], k[:, :first], v[:, :first], everywhere, drop))
            elif first:
                projection = self.fast_attention.projection_matrix
                parts.append(
                    favor_attention(
                        q[:, :first], k[:, :first], v[:, :first], projection, valid, self.official_masking
                    )
                )  # fmt: skip
            if self.local_heads:
                parts.append(local_attention(q[:, first:], k[:, first:], v[:, first:], self.window, valid, drop))
            out = torch.cat(parts, 1)
        weights = None
        if output_weights:
            scores = q[:, first:] @ k[:, first:].transpose(-1, -2) / math.sqrt(q.shape[-1])
            mask = _dense(length, self.window, valid, x.device)
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return self.dropout(self.to_out(out.transpose(1, 2).flatten(2))), weights
