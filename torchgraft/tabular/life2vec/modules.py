"""Parts of life2vec: time and token embeddings, ReZero, ScaleNorm, feed-forward, and the heads.

B: batch, S: positions, E: width, V: vocabulary, P: positions to predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.tabular.life2vec.losses import sig_softmax

__all__ = [
    "AttentionPooling",
    "ContextPooling",
    "EventEmbedding",
    "FeedForward",
    "FlatHead",
    "MaskedTokenHead",
    "OrderHead",
    "ReZero",
    "ScaleNorm",
    "Time2Vec",
    "TokenEmbedding",
    "center_tokens",
    "time2vec",
]

IGNORED = (0, 4, 5, 6, 7, 8)
"""[PAD] and the placeholders: rows that are zero and do not count for the mean."""


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1. In float16 the usual 1e-12 is 0, and the zero rows of a token matrix would become NaN."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def center_tokens(
    weight: Float[Tensor, "V E"], ignored: Sequence[int] = IGNORED, normalize: bool = False
) -> Float[Tensor, "V E"]:
    """Token matrix as the model sees it: without the mean of its rows, ignored rows zero, rows of length 1 if asked.

    Args:
        weight: the matrix that is learnt; not changed.
        ignored: rows that neither count for the mean nor are used.
        normalize: divide rows by their length (zero rows stay zero), as for the output.

    Example:
        >>> center_tokens(torch.tensor([[9.0], [1.0], [3.0]]), ignored=(0,)).flatten().tolist()
        [0.0, -1.0, 1.0]
    """
    keep = weight.new_ones(len(weight), 1)
    keep[list(ignored)] = 0
    centered = (weight - (weight * keep).sum(0) / keep.sum()) * keep
    return _unit(centered) if normalize else centered


def time2vec(
    t: Float[Tensor, ...],
    w: Float[Tensor, "1 F"],
    b: Float[Tensor, "1 F"],
    w0: Float[Tensor, "1 1"],
    b0: Float[Tensor, "1 1"],
    wave: Callable[[Tensor], Tensor],
) -> Float[Tensor, "... E"]:
    """``[wave(t w + b), t w0 + b0]`` (Kazemi et al., 2019), the linear feature last.

    Example:
        >>> one = torch.ones(1, 1)
        >>> time2vec(torch.tensor([0.0, 2.0]), one, 0 * one, one, one, torch.cos).tolist()
        [[1.0, 1.0], [-0.416146844625473, 3.0]]
    """
    t = t.unsqueeze(-1)
    return torch.cat([wave(t * w[0] + b[0]), t * w0[0] + b0[0]], -1)


class ReZero(nn.Module):
    """``x + weights * y`` with one learnt scalar that begins at 0 (Bachlechner et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum."""
        return x + y * self.weights


class ScaleNorm(nn.Module):
    """``g x / |x|`` with one learnt g that begins at the square root of the width (Nguyen and Salazar, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.g = nn.Parameter(torch.tensor([math.sqrt(dim)]))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled."""
        return x * (self.g / x.norm(dim=-1, keepdim=True).clamp(min=self.eps))


class Time2Vec(nn.Module):
    """``time2vec`` with its parameters, all uniform in -0.01..0.01.

    Args:
        dim: width of the outcome.
        wave: cosine for ages, sine for absolute positions.
    """

    def __init__(self, dim: int, wave: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.wave = wave
        self.w0, self.b0 = nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1, 1))
        self.w, self.b = nn.Parameter(torch.zeros(1, dim - 1)), nn.Parameter(torch.zeros(1, dim - 1))

    def forward(self, t: Float[Tensor, "B S"]) -> Float[Tensor, "B S E"]:
        """(B, S) to (B, S, dim)."""
        return time2vec(t, self.w, self.b, self.w0, self.b0, self.wave)


class _Original(nn.Module):
    """Holds the token matrix under the name that the official weights have."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.original = nn.Parameter(torch.zeros(rows, dim))


class TokenEmbedding(nn.Module):
    """Embedding whose matrix is centred on every use, see ``center_tokens``."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = vocab_size, dim
        self.parametrizations = nn.ModuleDict({"weight": _Original(vocab_size, dim)})

    @property
    def original(self) -> nn.Parameter:
        """The matrix that is learnt, (V, E)."""
        return self.parametrizations["weight"].original  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The matrix that is used, (V, E)."""
        return center_tokens(self.original)

    def forward(self, tokens: Int[Tensor, "B S"], matrix: Float[Tensor, "V E"] | None = None) -> Float[Tensor, "B S E"]:
        """Rows of the centred matrix, which may be handed in where it is known already."""
        return F.embedding(tokens, self.weight if matrix is None else matrix)


class EventEmbedding(nn.Module):
    """Tokens plus age, absolute position and segment, each added through a ReZero scalar.

    Args:
        vocab_size: V.
        dim: E.
        background_length: ages and positions are left out at [CLS] and this many tokens behind it.
        dropout: of the sum.
    """

    def __init__(self, vocab_size: int, dim: int, background_length: int, dropout: float) -> None:
        super().__init__()
        self.background_length = background_length
        self.token = TokenEmbedding(vocab_size, dim)
        self.age, self.abspos = Time2Vec(dim, torch.cos), Time2Vec(dim, torch.sin)
        self.segment = nn.Embedding(4, dim, padding_idx=0)
        self.res_age, self.res_abs, self.res_seg = ReZero(), ReZero(), ReZero()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Int[Tensor, "B S"],
        position: Float[Tensor, "B S"],
        age: Float[Tensor, "B S"],
        segment: Int[Tensor, "B S"],
        matrix: Float[Tensor, "V E"] | None = None,
    ) -> Float[Tensor, "B S E"]:
        """The sum, (B, S, E)."""
        timed = torch.arange(tokens.shape[1], device=tokens.device) > self.background_length
        x = self.token(tokens, matrix)
        # half precision has no day between 4096 and 4112
        exact = torch.promote_types(x.dtype, torch.float32)
        x = self.res_age(x, (self.age(age.to(exact)) * timed[:, None]).to(x.dtype))
        x = self.res_abs(x, (self.abspos(position.to(exact)) * timed[:, None]).to(x.dtype))
        return self.dropout(self.res_seg(x, self.segment(segment)))


class FeedForward(nn.Module):
    """Linear, dropout, swish, linear."""

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.hidden2ff, self.dropout, self.ff2hidden = nn.Linear(dim, inner), nn.Dropout(dropout), nn.Linear(inner, dim)

    def forward(self, x: Float[Tensor, "B S E"]) -> Float[Tensor, "B S E"]:
        """Position by position."""
        return self.ff2hidden(F.silu(self.dropout(self.hidden2ff(x))))


# --- heads ------------------------------------------------------------------------------------------------------------


class MaskedTokenHead(nn.Module):
    """Scaled cosines between ``tanh(V h)`` and the rows of the token matrix, centred and of length 1.

    Only the positions to predict are gathered and computed. The matrix is that of the embedding, not a copy.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.V, self.dropout = nn.Linear(dim, dim), nn.Dropout(dropout)
        self.g = nn.Parameter(torch.tensor([math.sqrt(dim)]))

    def forward(
        self, hidden: Float[Tensor, "B S E"], positions: Int[Tensor, "B P"], matrix: Float[Tensor, "V E"]
    ) -> Float[Tensor, "B P V"]:
        """Logits; ``matrix`` is the centred one, (V, E)."""
        h = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        h = self.dropout(_unit(self.V(self.dropout(h)).tanh()))
        return self.g * (h @ _unit(matrix).T)


class OrderHead(nn.Module):
    """Linear, swish, ScaleNorm, dropout, linear: of [CLS], for the order task and classifiers that do not pool."""

    def __init__(self, dim: int, classes: int, dropout: float, first: str = "in_layer", norm: str = "norm") -> None:
        super().__init__()
        self.first, self.named = first, norm
        self.add_module(first, nn.Linear(dim, dim))
        self.add_module(norm, ScaleNorm(dim))
        self.dropout, self.out_layer = nn.Dropout(dropout), nn.Linear(dim, classes)

    def forward(self, x: Float[Tensor, "B E"]) -> Float[Tensor, "B C"]:
        """Logits."""
        return self.out_layer(self.dropout(self.get_submodule(self.named)(F.silu(self.get_submodule(self.first)(x)))))


class AttentionPooling(nn.Module):
    """Swish of a linear, ScaleNorm, AlphaDropout; a mean weighted by SigSoftmax of ``c tanh(W h)``; linear.

    ``summary`` gives the person's summary, and ``weights`` where it comes from.
    """

    def __init__(self, dim: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.ff = nn.Linear(dim, dim)
        self.pool = nn.Linear(dim, dim // 2)
        self.context = nn.Parameter(torch.randn(dim // 2))
        self.norm, self.dropout = ScaleNorm(dim), nn.AlphaDropout(dropout)
        self.out = nn.Linear(dim, classes)

    def weights(self, h: Float[Tensor, "B S E"], valid: Tensor) -> Float[Tensor, "B S"]:
        """Weight of each position, of states that went through the first layer."""
        return sig_softmax((self.pool(h).tanh() * self.context).sum(-1), valid)

    def summary(self, x: Float[Tensor, "B S E"], valid: Tensor) -> Float[Tensor, "B E"]:
        """The person's summary."""
        h = self.dropout(self.norm(F.silu(self.ff(x))))
        return (h * self.weights(h, valid).unsqueeze(-1)).sum(1)

    def forward(self, x: Float[Tensor, "B S E"], valid: Tensor) -> Float[Tensor, "B C"]:
        """Logits."""
        return self.out(self.summary(x, valid))


class ContextPooling(nn.Module):
    """As ``AttentionPooling`` with several contexts whose summaries are joined by a linear; logits of ordinal items."""

    def __init__(self, dim: int, items: int, levels: int, contexts: int, dropout: float) -> None:
        super().__init__()
        self.items, self.levels = items, levels
        self.ff, self.pool = nn.Linear(dim, dim), nn.Linear(dim, dim // 2)
        self.post, self.out = nn.Linear(dim * contexts, dim), nn.Linear(dim, items * levels)
        self.context = nn.Parameter(torch.randn(contexts, dim // 2))
        self.norm, self.dropout = ScaleNorm(dim), nn.AlphaDropout(dropout)

    def forward(self, x: Float[Tensor, "B S E"], valid: Tensor) -> Float[Tensor, "B I C"]:
        """Logits (B, items, levels)."""
        h = self.dropout(self.norm(F.silu(self.ff(x))))
        scores = self.context @ self.pool(h).tanh().transpose(1, 2)
        weights = sig_softmax(scores, valid[:, None, :].expand_as(scores))
        return self.out(self.post((weights @ h).flatten(1))).unflatten(-1, (self.items, self.levels))


class FlatHead(nn.Module):
    """Logits of ordinal items from [CLS]: swish, linear, swish, LayerNorm, linear, swish, linear, with dropout."""

    def __init__(self, dim: int, inner: int, items: int, levels: int, dropout: float) -> None:
        super().__init__()
        self.items, self.levels = items, levels
        self.ff, self.ff2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.norm, self.out = nn.LayerNorm(inner), nn.Linear(dim, items * levels, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B S E"], valid: Tensor) -> Float[Tensor, "B I C"]:
        """Logits (B, items, levels)."""
        h = self.dropout(F.silu(x[:, 0]))
        h = self.dropout(self.norm(F.silu(self.ff(h))))
        return self.out(F.silu(self.ff2(h))).unflatten(-1, (self.items, self.levels))
