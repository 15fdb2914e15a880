"""Blocks that the survey lists beside the attentions: found by search, of adaptive depth, with a single head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.efficient_transformers.patterns import _positive
from torchgraft.ops._checks import check_floats

__all__ = ["AdaptiveDepth", "EvolvedBlock", "SHARNNBlock"]


def _heads_divide(width: int, heads: int) -> None:
    _positive(width=width, heads=heads)
    if width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}")


def _check(x: Tensor, width: int) -> None:
    check_floats(x=x)
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != width:
        raise ValueError(f"x must have shape (batch, length, {width}), length at least 1, got {tuple(x.shape)}")


class EvolvedBlock(nn.Module):
    """Encoder block of the Evolved Transformer (So et al. 2019, figure 3): what an evolutionary search found.

    Four pre-norm residual parts: a gated linear unit; a wide position-wise branch (4 W) plus a convolution over 3
    positions (W / 2, zeros for the rest), normalised, through a separable convolution over 9 positions to W / 2 (zeros
    for the rest); softmax attention; a feed-forward layer. Twice the parts of a Transformer layer, so compare two of
    those with one of these. Padded positions are zeros for the convolutions and hidden from attention.

    Args:
        width: W, even.
        heads: of the attention.
        dropout: on every branch.

    Raises:
        ValueError: for an odd width, or heads that do not divide it.

    Example:
        >>> EvolvedBlock(8, heads=2)(torch.randn(2, 10, 8)).shape
        torch.Size([2, 10, 8])
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        _heads_divide(width, heads)
        if width % 2:
            raise ValueError(f"width must be even, got {width}")
        half, wide = width // 2, 4 * width
        self.glu_norm, self.glu = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.conv_norm, self.left = nn.LayerNorm(width), nn.Linear(width, wide)
        self.right = nn.Conv1d(width, half, 3, padding=1)
        self.join_norm = nn.LayerNorm(wide)
        self.depthwise = nn.Conv1d(wide, wide, 9, padding=4, groups=wide, bias=False)
        self.pointwise = nn.Linear(wide, half)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Dropout(dropout), nn.Linear(wide, width))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "B N W"], key_padding_mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N W"]:
        """As a Transformer's layer; True in ``key_padding_mask`` marks padding."""
        _check(x, self.ffn_norm.normalized_shape[0])
        x = x + self.dropout(F.glu(self.glu(self.glu_norm(x))))

        def shown(h: Tensor) -> Tensor:
            return h if key_padding_mask is None else h.masked_fill(key_padding_mask[..., None], 0)

        h = shown(self.conv_norm(x))
        left, right = self.left(h).relu(), self.right(h.mT).mT.relu()
        h = self.dropout(left) + F.pad(self.dropout(right), (0, left.shape[-1] - right.shape[-1]))
        h = self.pointwise(self.depthwise(shown(self.join_norm(h)).mT).mT)
        x = x + self.dropout(F.pad(h, (0, x.shape[-1] - h.shape[-1])))
        h = self.attention_norm(x)
        h, _ = self.attention(h, h, h, key_padding_mask=key_padding_mask, need_weights=False)
        x = x + self.dropout(h)
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


def _coordinates(length: int, step: int, width: int, like: Tensor) -> Tensor:
    """Sinusoids of the position plus sinusoids of the step (Universal Transformers, section 2.1)."""
    rates = 10_000 ** -(torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width)
    places = torch.arange(length, dtype=torch.float64, device=like.device)[:, None] * rates
    steps = (step * rates).expand_as(places)
    both = torch.stack([places.sin() + steps.sin(), places.cos() + steps.cos()], -1).flatten(1)
    return both[:, :width].to(like.dtype)


class AdaptiveDepth(nn.Module):
    """One layer applied again and again, each position as often as it wants (Universal Transformer, section 2.2).

    Adaptive computation time (Graves 2016): a unit gives the chance p of stopping at each step; a position stops once
    its chances sum to 1 - ``epsilon``, or after ``max_steps``, and its last chance is what is missing to 1. The output
    is the sum of its states weighted by these chances. tensor2tensor instead blends each state into the output so far,
    y (1 - p) + p s, which weighs early states less; we follow the formula of Graves. Positions that have stopped keep
    their last state, which others still attend to.

    After a call ``steps`` (B, N) holds how many each position took, and ``ponder`` the mean over positions of steps
    plus remainder: add ``0.01 * layer.ponder`` to the loss, so that computation has a price.

    Args:
        layer: from (B, N, W) to the same, such as an encoder layer; called with the further arguments of ``forward``.
        width: W.
        max_steps: the most steps.
        epsilon: a position stops at a sum of 1 - epsilon, so that one step can suffice.
        bias: of the stopping unit at the start; 1 as in tensor2tensor makes early stops likely.

    Raises:
        ValueError: for settings out of range.

    Example:
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> layer = AdaptiveDepth(block, width=8, max_steps=4)
        >>> layer(torch.randn(2, 5, 8)).shape, layer.steps.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5]))
    """

    steps: Tensor
    ponder: Tensor

    def __init__(
        self, layer: Callable[..., Tensor], width: int, max_steps: int = 6, epsilon: float = 0.01, bias: float = 1.0
    ) -> None:
        super().__init__()
        _positive(width=width, max_steps=max_steps)
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
        self.layer, self.max_steps, self.epsilon = layer, max_steps, epsilon
        self.stop = nn.Linear(width, 1)
        nn.init.constant_(self.stop.bias, bias)
        self.steps, self.ponder = torch.zeros(0), torch.zeros(())

    def forward(
        self, x: Float[Tensor, "B N W"], padding: Bool[Tensor, "B N"] | None = None, **kwargs: Any
    ) -> Float[Tensor, "B N W"]:
        """Weighted states; True in ``padding`` marks positions that never run and give zeros.

        ``kwargs`` go to the layer, which needs the padding under its own name.
        """
        _check(x, self.stop.in_features)
        running = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if padding is None else ~padding
        real = running
        spent = torch.zeros(x.shape[:2], dtype=torch.float32, device=x.device)
        steps, remainder, y = torch.zeros_like(spent), torch.zeros_like(spent), torch.zeros_like(x)
        for step in range(self.max_steps):
            moved = self.layer(x + _coordinates(x.shape[1], step, x.shape[2], x), **kwargs)
            x = torch.where(running[..., None], moved, x)
            chance = self.stop(x).squeeze(-1).float().sigmoid()
            last = running & ((spent + chance >= 1 - self.epsilon) | (step == self.max_steps - 1))
            weight = torch.where(last, 1 - spent, chance) * running
            y = y + weight[..., None].to(x.dtype) * x
            remainder = remainder + (1 - spent) * last
            steps, spent = steps + running, spent + weight
            running = running & ~last
            if not bool(running.any()):
                break
        self.steps = steps.detach().long()
        self.ponder = (steps + remainder)[real].sum() / real.sum().clamp(min=1)
        return y

    def __getstate__(self) -> dict[str, Any]:
        # what hangs on a graph can neither be copied nor saved
        return {**self.__dict__, "ponder": self.ponder.detach()}


class SHARNNBlock(nn.Module):
    """One layer of the single-headed attention RNN (Merity 2019): an LSTM, one causal head, a 'boom' layer.

    Pre-norm residual parts: an LSTM of the same width; softmax attention with a single head, whose queries alone are
    projected by a matrix, keys and values only scaled feature by feature by gates that do not depend on the input; a
    feed-forward layer that widens to ``boom`` W and comes back by summing the parts, without a second matrix. Cost of
    the attention is quadratic in the length, its memory linear (SDPA).

    Our reading of sections 2 and 3 (reconstructed): the paper's text gives these parts and their order; details of its
    code, such as mixed norms and its over-parametrised gates, are left out.

    Args:
        width: W.
        boom: how many times wider the inner layer is.

    Raises:
        ValueError: for sizes below 1, or a state of the wrong shape.

    Example:
        >>> block = SHARNNBlock(8)
        >>> y, state = block(torch.randn(2, 10, 8))
        >>> y.shape, block(torch.randn(2, 3, 8), state)[0].shape
        (torch.Size([2, 10, 8]), torch.Size([2, 3, 8]))
    """

    def __init__(self, width: int, boom: int = 4) -> None:
        super().__init__()
        _positive(width=width, boom=boom)
        self.boom = boom
        self.lstm_norm, self.lstm = nn.LayerNorm(width), nn.LSTM(width, width, batch_first=True)
        self.query_norm, self.memory_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.gates = nn.Parameter(torch.zeros(3, width))
        self.ffn_norm, self.wide = nn.LayerNorm(width), nn.Linear(width, boom * width)

    def forward(
        self, x: Float[Tensor, "B N W"], state: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B N W"], tuple[Tensor, Tensor, Tensor]]:
        """Outputs, and the state with which the next piece of the sequence goes on: LSTM's two, and the memory."""
        _check(x, self.query.in_features)
        if state is not None and (state[2].ndim != 3 or state[2].shape[::2] != x.shape[::2]):
            raise ValueError(
                f"state is of memory {tuple(state[2].shape)}, x of {tuple(x.shape)}: batch or width differ"
            )
        h, (hidden, cell) = self.lstm(self.lstm_norm(x), None if state is None else state[:2])
        x = x + h
        memory = self.memory_norm(x)
        memory = memory if state is None else torch.cat([state[2], memory], 1)
        gates = self.gates.sigmoid()
        q, k, v = gates[0] * self.query(self.query_norm(x)), gates[1] * memory, gates[2] * memory
        before = memory.shape[1] - x.shape[1]
        # only a piece that goes on from others needs a mask of its own: for a whole sequence it would be n x n
        seen = (
            torch.ones(x.shape[1], memory.shape[1], dtype=torch.bool, device=x.device).tril(before) if before else None
        )
        read = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], seen, is_causal=seen is None)
        x = x + read[:, 0]
        x = x + F.gelu(self.wide(self.ffn_norm(x))).unflatten(-1, (self.boom, -1)).sum(-2)
        return x, (hidden, cell, memory)
