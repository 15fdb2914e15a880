"""The test bench of matrix classes: ``y = M x`` with M dense, Toeplitz, low rank, … (arXiv 2407.09941, section 2).

Legend: B batch, L length, H heads, P features of a head, N features of a query, state or sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.hydra.layer import Shell, as_mask, check_backend, check_input, check_sizes, initial_dt_bias
from torchgraft.ops.quasiseparable import Backend, quasiseparable, quasiseparable_matrix

__all__ = [
    "Kind",
    "MatrixMixer",
    "attention_matrix",
    "cauchy_matrix",
    "dft_matrix",
    "low_rank_matrix",
    "toeplitz_matrix",
    "toeplitz_product",
    "vandermonde_matrix",
]

Kind = Literal["dense", "toeplitz", "low_rank", "attention", "vandermonde", "cauchy", "quasiseparable"]


def low_rank_matrix(q: Float[Tensor, "... L N"], k: Float[Tensor, "... L N"]) -> Float[Tensor, "... L L"]:
    """``M_ij = q_i . k_j``: linear attention without its normaliser."""
    return q @ k.mT


def attention_matrix(
    q: Float[Tensor, "... L N"], k: Float[Tensor, "... L N"], mask: Tensor | None = None
) -> Float[Tensor, "... L L"]:
    """``M_ij = softmax_j(q_i . k_j / sqrt N)``; columns where ``mask`` (..., 1, L) is False get nothing."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


def cauchy_matrix(
    q: Float[Tensor, "... L N"], k: Float[Tensor, "... L N"], bias: Tensor | float = 0.0
) -> Float[Tensor, "... L L"]:
    """``M_ij = sum_n 1 / (exp q_in + exp k_jn + 2 bias + 1e-8)``."""
    # beyond the largest float the reciprocal is 0, but its gradient 0 times infinity
    most = math.log(torch.finfo(q.dtype).max) - 1
    left, right = q.clamp(max=most).exp() + bias, k.clamp(max=most).exp() + bias
    return (left[..., :, None, :] + right[..., None, :, :] + 1e-8).reciprocal().sum(-1)


def vandermonde_matrix(
    q: Float[Tensor, "... L N"], k: Float[Tensor, "... L N"], step: float = 1.0, sign: float = 1.0
) -> Float[Tensor, "... L L"]:
    """``M_ij = sum_n cos(2 pi step q_in j) + sign cos(2 pi step k_jn i)``."""
    places = 2 * math.pi * step * torch.arange(q.shape[-2], dtype=q.dtype, device=q.device)
    rows = (q[..., None] * places).cos().sum(-2)
    columns = (k[..., None] * places).cos().sum(-2)
    return rows + sign * columns.mT


def dft_matrix(length: int, period: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "L L"]:
    """``M_ij = cos(2 pi i j / period)``, the top left corner of the real part of a Fourier matrix."""
    places = torch.arange(length, device=device)
    # the product reduced first: the cosine of a large angle is worth nothing in float32
    return (2 * math.pi / period * (places[:, None] * places % period).to(dtype)).cos()


def toeplitz_matrix(taps: Float[Tensor, "... T"]) -> Float[Tensor, "... L L"]:
    """``M_ij = w_{i-j}`` from taps ordered from the top right corner, ``w_{-(L-1)}``, to the bottom left one."""
    length = (taps.shape[-1] + 1) // 2
    places = torch.arange(length, device=taps.device)
    return taps[..., places[:, None] - places + length - 1]


def toeplitz_product(taps: Float[Tensor, "... T"], v: Float[Tensor, "... L P"]) -> Float[Tensor, "... L P"]:
    """``toeplitz_matrix(taps) @ v`` by Fourier transforms, in L log L."""
    length = v.shape[-2]
    size = taps.shape[-1] + length - 1
    spectrum = torch.fft.rfft(taps, size)[..., None] * torch.fft.rfft(v, size, dim=-2)
    return torch.fft.irfft(spectrum, size, dim=-2)[..., length - 1 : 2 * length - 1, :]


class _Class(nn.Module):
    """One class of matrices: how many channels it takes from the input, its parameters, its matrix and product.

    ``convolved`` and ``plain`` count channels beside the inputs; ``silu`` says whether the convolved ones get the
    activation. ``residual`` is whether the identity is added to the matrix.
    """

    convolved = plain = 0
    silu = residual = True

    def __init__(self, heads: int, qk_dim: int, longest: int | None) -> None:
        super().__init__()
        self.nheads, self.qk_dim, self.longest = heads, qk_dim, longest

    def tables(self, *shape: int) -> nn.Parameter:
        """A free parameter, xavier normal as in the official code."""
        return nn.Parameter(nn.init.xavier_normal_(torch.empty(*shape)))

    def scale(self, v: Tensor, mask: Tensor | None, times: float) -> Tensor | float:
        """1 / sqrt(times * length) with the length that the mixer was made for, else that of each row."""
        if self.longest is not None or mask is None:
            return 1 / math.sqrt(times * (self.longest or v.shape[1]))
        return (times * mask.sum(1).clamp(min=1)).to(v.dtype).rsqrt()[:, None, None, None]

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B or 1, H, L, L), the scale included and the residual not; ``v`` is (B, L, H, P), zero in padding."""
        raise NotImplementedError

    def mix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The product with ``v``, (B, L, H, P)."""
        return (self.matrix(extra, plain, v, mask) @ v.transpose(1, 2)).transpose(1, 2)

    def per_head(self, channels: Tensor) -> Tensor:
        """(B, L, H * N) to (B, H, L, N)."""
        return channels.unflatten(-1, (self.nheads, -1)).transpose(1, 2)


class Dense(_Class):
    """A free matrix for each head."""

    def __init__(self, heads: int, qk_dim: int, longest: int) -> None:
        super().__init__(heads, qk_dim, longest)
        self.M = self.tables(heads, longest, longest)

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        length = v.shape[1]
        return self.scale(v, mask, 1) * self.M[None, :, :length, :length].to(v.dtype)


class Toeplitz(_Class):
    """One number for each distance; from the tokens (two channels a head) or free."""

    def __init__(self, heads: int, qk_dim: int, longest: int | None, dependent: bool, official_indexing: bool) -> None:
        super().__init__(heads, qk_dim, longest)
        self.official_indexing = official_indexing
        self.convolved = 2 * heads if dependent else 0
        if not dependent:
            assert longest is not None
            self.conv_params = nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, 2 * longest - 1)))

    def taps(self, extra: Tensor, v: Tensor) -> Tensor:
        """(B or 1, H, 2L - 1), from the top right corner to the bottom left one."""
        if self.convolved:
            below, above = extra.to(v.dtype).mT.split(self.nheads, 1)
            taps = torch.cat([above[..., 1:].flip(-1), below], -1)
        else:
            taps = self.conv_params[None].to(v.dtype)
        if self.official_indexing:
            taps = taps.roll(-1, -1)
        # a table for longer sequences has the same middle
        cut = (taps.shape[-1] + 1) // 2 - v.shape[1]
        return taps[..., cut : taps.shape[-1] - cut]

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.scale(v, mask, 4) * toeplitz_matrix(self.taps(extra, v))

    def mix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return (self.scale(v, mask, 4) * toeplitz_product(self.taps(extra, v), v.transpose(1, 2))).transpose(1, 2)


class _Paired(_Class):
    """A matrix of queries and keys, from the tokens or free."""

    def __init__(self, heads: int, qk_dim: int, longest: int | None, dependent: bool) -> None:
        super().__init__(heads, qk_dim, longest)
        self.convolved = 2 * heads * qk_dim if dependent else 0
        if not dependent:
            assert longest is not None
            self.free(longest)

    def free(self, longest: int) -> None:
        """Make the tables of queries and keys, (L, H, N)."""
        self.q_matrix, self.k_matrix = (self.tables(longest, self.nheads, self.qk_dim) for _ in range(2))

    def pair(self, extra: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, (B or 1, H, L, N)."""
        if self.convolved:
            q, k = (self.per_head(part) for part in extra.to(v.dtype).chunk(2, -1))
            return q, k
        q, k = (table[None, : v.shape[1]].transpose(1, 2).to(v.dtype) for table in (self.q_matrix, self.k_matrix))
        return q, k


class LowRank(_Paired):
    """``q_i . k_j``."""

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.scale(v, mask, self.qk_dim) * low_rank_matrix(*self.pair(extra, v))

    def mix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k = self.pair(extra, v)
        return (self.scale(v, mask, self.qk_dim) * (q @ (k.mT @ v.transpose(1, 2)))).transpose(1, 2)


class Attention(_Paired):
    """Softmax of ``q_i . k_j``."""

    silu = False

    def seen(self, mask: Tensor | None) -> Tensor | None:
        """(B, 1, 1, L); a row that is all padding sees all of it, rather than a softmax over nothing."""
        return None if mask is None else (mask | ~mask.any(1, keepdim=True))[:, None, None]

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention_matrix(*self.pair(extra, v), self.seen(mask))

    def mix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k = (t.expand(len(v), -1, -1, -1) for t in self.pair(extra, v))
        return F.scaled_dot_product_attention(q, k, v.transpose(1, 2), self.seen(mask)).transpose(1, 2)


class Vandermonde(_Paired):
    """Sums of cosines of places times numbers; without data, the Fourier matrix or learned numbers."""

    silu = False
    STEP = 1e-3

    def __init__(self, heads: int, qk_dim: int, longest: int | None, dependent: bool, dft: bool) -> None:
        self.dft = dft and not dependent
        super().__init__(heads, qk_dim, longest, dependent)

    def free(self, longest: int) -> None:
        if not self.dft:
            self.q_bias, self.k_bias = (nn.Parameter(torch.zeros(self.nheads, self.qk_dim, longest)) for _ in range(2))

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.dft:
            assert self.longest is not None
            return self.scale(v, mask, 1) * dft_matrix(v.shape[1], self.longest, v.dtype, v.device)[None, None]
        if self.convolved:
            found = vandermonde_matrix(*self.pair(extra, v), self.STEP, -1.0)
        else:
            q, k = (table[None, ..., : v.shape[1]].mT.to(v.dtype) for table in (self.q_bias, self.k_bias))
            found = vandermonde_matrix(q, k)
        return self.scale(v, mask, 2 * self.qk_dim) * found


class Cauchy(_Paired):
    """Sums of reciprocals of ``exp q_i + exp k_j``."""

    silu = False

    def __init__(self, heads: int, qk_dim: int, longest: int | None, dependent: bool) -> None:
        super().__init__(heads, qk_dim, longest, dependent)
        self.bias = nn.Parameter(torch.tensor(0.5)) if dependent else None

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = 0.0 if self.bias is None else self.bias.to(v.dtype)
        return self.scale(v, mask, self.qk_dim) * cauchy_matrix(*self.pair(extra, v), bias)


class Quasiseparable(_Class):
    """Hydra with input and output vectors that both directions share."""

    residual = False
    NO_WEIGHT_DECAY = Shell.NO_WEIGHT_DECAY

    def __init__(
        self, heads: int, qk_dim: int, longest: int | None, dependent: bool, headdim: int, chunk_size: int,
        backend: Backend,
    ) -> None:  # fmt: skip
        super().__init__(heads, qk_dim, longest)
        self.chunk_size, self.backend = chunk_size, backend
        self.d_state = heads * qk_dim
        self.convolved, self.plain = (2 * self.d_state, 2 * heads) if dependent else (0, 0)
        if not dependent:
            assert longest is not None
            self.BC = self.tables(longest, 2 * self.d_state)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads, 0.001, 0.1, 1e-4))
        self.A_log, self.D = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.ones(heads))
        self.fc_D = nn.Linear(heads * headdim, heads, bias=False)

    def parameters_of(self, extra: Tensor, plain: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Step sizes, decays, input and output vectors, diagonal, as ``quasiseparable`` takes them."""
        batch, length = v.shape[:2]
        if self.convolved:
            vectors, dt = extra.to(v.dtype), plain.to(v.dtype).unflatten(-1, (2, self.nheads))
        else:
            vectors = self.BC[:length].expand(batch, -1, -1).to(v.dtype)
            dt = v.new_zeros(batch, length, 2, self.nheads)
        B, C = vectors[:, :, None, None].expand(-1, -1, 2, -1, -1).chunk(2, -1)
        diagonal = F.linear(v.flatten(2), self.fc_D.weight.to(v.dtype), self.D.to(v.dtype))
        return F.softplus(dt + self.dt_bias.to(v.dtype)), -self.A_log.to(v.dtype).exp(), B, C, diagonal

    def matrix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return quasiseparable_matrix(*self.parameters_of(extra, plain, v))

    def mix(self, extra: Tensor, plain: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        given = self.parameters_of(extra, plain, v)
        return quasiseparable(v, *given, mask=mask, chunk_size=self.chunk_size, backend=self.backend)


class MatrixMixer(Shell):
    """One class of mixing matrices in the shell of Hydra: the ablation bench of section 2 (official ``MatrixMixer``).

    ``data_dependent`` matrices are made from the tokens, row and column i from token i (the paper's sequence
    alignment), and so exist for any length; the others are parameters, and end at ``max_seq_len``.

    ===============  =====================================================================  ===================
    kind             M of a head                                                            scale
    ===============  =====================================================================  ===================
    dense            free (never data-dependent)                                            1 / sqrt(L)
    toeplitz         ``f_{i-j}`` for i >= j, ``r_{j-i}`` for i < j                          1 / (2 sqrt(L))
    low_rank         ``q_i . k_j``                                                          1 / sqrt(L N)
    attention        ``softmax_j(q_i . k_j / sqrt N)``                                      1
    vandermonde      ``sum_n cos(2 pi e q_in j) - cos(2 pi e k_jn i)`` with e = 1/1000;     1 / sqrt(2 L N)
                     not data-dependent: ``cos(2 pi i j / L)``, or learned with +           1 / sqrt(L)
    cauchy           ``sum_n 1 / (exp q_in + exp k_jn + 2 bias)``                           1 / sqrt(L N)
    quasiseparable   Hydra whose directions share B and C, N states times heads             none
    ===============  =====================================================================  ===================

    All but the quasiseparable one add the identity to the scaled matrix. L in a scale is ``max_seq_len``, or without
    one the length of the row. Toeplitz, low rank and quasiseparable never form the matrix; Cauchy and Vandermonde
    form it, with N numbers for each entry on the way. Positions are counted from the start of a row: pad on the right.

    State dicts of the official module load into it (of a Fourier Vandermonde without its buffer ``dft_matrix``, which
    is computed here). Differences from the official code, where it does not do what the paper says: its Toeplitz
    matrix is shifted by one position (``official_indexing=True`` gives that one, for sequences of ``max_seq_len``);
    its attention that does not depend on the data raises; its learned Vandermonde that does not depend on the data
    scales tokens and mixes nothing. Here both follow the formula. The minus in the data-dependent Vandermonde and
    the plus in the other one are as there.

    Args:
        kind: class of matrices.
        data_dependent: made from the tokens, or free.
        d_model: features of input and output.
        qk_dim: N, features of queries and keys, or states for each head.
        max_seq_len: longest sequence; needed by what is not data-dependent, and sets the scale of what is.
        d_conv, expand, headdim, conv_init, bias, conv_bias: as in ``HydraMixer``.
        dft: Fourier matrix rather than a learned one, for a Vandermonde that does not depend on the data.
        official_indexing: as in the official Toeplitz.
        chunk_size, backend: of the quasiseparable scan.

    Raises:
        ValueError: for an unknown kind, sizes that do not go together, a dense matrix that depends on the data, or no
            ``max_seq_len`` where it is needed.

    Example:
        >>> layer = MatrixMixer("cauchy", True, 32, qk_dim=4, headdim=16)
        >>> layer(torch.randn(2, 10, 32)).shape, layer.matrix(torch.randn(2, 10, 32)).shape
        (torch.Size([2, 10, 32]), torch.Size([2, 4, 10, 10]))
    """

    def __init__(
        self,
        kind: Kind,
        data_dependent: bool,
        d_model: int,
        qk_dim: int = 16,
        max_seq_len: int | None = None,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 128,
        *,
        conv_init: float | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        dft: bool = True,
        official_indexing: bool = False,
        chunk_size: int = 64,
        backend: Backend = "auto",
    ) -> None:
        check_sizes(d_model, expand, headdim, d_conv)
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if kind == "dense" and data_dependent:
            raise ValueError("a dense matrix cannot depend on the data; pass data_dependent=False")
        if not data_dependent and (max_seq_len is None or max_seq_len < 1):
            raise ValueError(
                f"max_seq_len must be at least 1 for a {kind} matrix that does not depend on the data, "
                f"got {max_seq_len}"
            )
        if max_seq_len is not None and max_seq_len < 1:
            raise ValueError(f"max_seq_len must be at least 1, or None, got {max_seq_len}")
        if official_indexing and kind != "toeplitz":
            raise ValueError(f"official_indexing is of toeplitz matrices, not of {kind}")
        check_backend(backend, chunk_size)
        if qk_dim < 1:
            raise ValueError(f"qk_dim must be at least 1, got {qk_dim}")
        heads = expand * d_model // headdim
        made: dict[str, Callable[[], _Class]] = {
            "dense": lambda: Dense(heads, qk_dim, max_seq_len or 0),
            "toeplitz": lambda: Toeplitz(heads, qk_dim, max_seq_len, data_dependent, official_indexing),
            "low_rank": lambda: LowRank(heads, qk_dim, max_seq_len, data_dependent),
            "attention": lambda: Attention(heads, qk_dim, max_seq_len, data_dependent),
            "vandermonde": lambda: Vandermonde(heads, qk_dim, max_seq_len, data_dependent, dft),
            "cauchy": lambda: Cauchy(heads, qk_dim, max_seq_len, data_dependent),
            "quasiseparable": lambda: Quasiseparable(
                heads, qk_dim, max_seq_len, data_dependent, headdim, chunk_size, backend
            ),
        }
        mixer = made[kind]()
        super().__init__(
            d_model, mixer.convolved, mixer.plain, d_conv=d_conv, expand=expand, headdim=headdim, conv_init=conv_init,
            bias=bias, conv_bias=conv_bias,
        )  # fmt: skip
        self.kind, self.data_dependent, self.max_seq_len = kind, data_dependent, max_seq_len
        self.matrix_mixer = mixer

    def forward(self, x: Float[Tensor, "B L D"], attention_mask: Tensor | None = None) -> Float[Tensor, "B L D"]:
        """Mix a batch of sequences; ``attention_mask`` (B, L) is 1 or True where there is data.

        Raises:
            ValueError: for a wrong shape, length zero, or a sequence longer than a free matrix.
            TypeError: for inputs that are not floating-point, or a mask that is.
        """
        gate, extra, plain, v, mask = self._parts(x, attention_mask)
        y = self.matrix_mixer.mix(extra, plain, v, mask)
        return self.close(self._with_residual(y, v, mask).flatten(2), gate)

    def _with_residual(self, y: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y = y + v if self.matrix_mixer.residual else y
        return y if mask is None else y.masked_fill(~mask[..., None, None], 0)

    def _parts(self, u: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Gate, channels of the matrix, those past the convolution, inputs of the heads, mask."""
        check_input(u, self.d_model)
        if not self.data_dependent and self.max_seq_len is not None and u.shape[1] > self.max_seq_len:
            raise ValueError(
                f"x has length {u.shape[1]}, but a {self.kind} matrix that does not depend on the data ends at "
                f"max_seq_len={self.max_seq_len}; make it longer, or use data_dependent=True"
            )
        mask = as_mask(attention_mask, u)
        gate, convolved, plain = self.project(u, mask)
        v, extra = convolved.split([self.d_inner, self.splits[1] - self.d_inner], -1)
        extra = F.silu(extra) if self.matrix_mixer.silu else extra
        v = self.heads(F.silu(v)).to(torch.promote_types(torch.float32, v.dtype))
        if mask is not None:
            v = v.masked_fill(~mask[..., None, None], 0)
        return gate, extra, plain, v, mask

    def matrix(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B H L L"]:
        """The matrix of each head that multiplies what the convolution gives, scale and identity included.

        Example:
            >>> layer = MatrixMixer("quasiseparable", True, 32, qk_dim=4, headdim=16)
            >>> layer.matrix(torch.randn(1, 10, 32)).shape
            torch.Size([1, 4, 10, 10])
        """
        _, extra, plain, v, mask = self._parts(x, None)
        found = self.matrix_mixer.matrix(extra, plain, v, mask)
        if self.matrix_mixer.residual:
            found = found + torch.eye(v.shape[1], dtype=found.dtype, device=found.device)
        return found.expand(len(v), self.nheads, -1, -1)

    def extra_repr(self) -> str:
        """What the parts do not show."""
        return f"kind={self.kind!r}, data_dependent={self.data_dependent}, max_seq_len={self.max_seq_len}"
