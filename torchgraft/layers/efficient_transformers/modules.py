"""The attentions as layers that hold what they learn.

Legend: B batch, N length, W width, H heads, D features of a head, L longest length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.efficient_transformers import clustering, mixing
from torchgraft.layers.efficient_transformers.attention import KINDS, efficient_attention
from torchgraft.layers.efficient_transformers.kernels import gaussian_features
from torchgraft.layers.efficient_transformers.patterns import _positive
from torchgraft.ops._checks import check_floats

__all__ = ["LAYER_KINDS", "CompressiveMemory", "EfficientAttention"]


@dataclass(frozen=True)
class Shape:
    """What a core is made for; ``max_length`` only where it fixes the size of a parameter."""

    width: int
    heads: int
    head_dim: int
    max_length: int | None = None

    def longest(self, kind: str) -> int:
        """The longest length, which this kind cannot do without."""
        if self.max_length is None or self.max_length < 1:
            raise ValueError(f"{kind} has parameters for every position: give max_length=, at least 1")
        return self.max_length


class Core(nn.Module):
    """Attention over given q, k and v with the parameters of its kind; ``x`` is what they were projected from."""

    def __init__(self, kind: str, shape: Shape, **options: Any) -> None:
        super().__init__()
        self.kind, self.shape, self.options = kind, shape, options
        if kind in KINDS:
            unknown = [name for name in options if name not in KINDS[kind].options]
            if unknown:
                known = ", ".join(KINDS[kind].options) or "none"
                raise ValueError(f"{kind} has no option {unknown[0]!r}; those of the attention itself are {known}")

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        """Tensors handed to ``efficient_attention`` beside the options."""
        return {}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, causal: bool = False,
        key_padding_mask: Tensor | None = None, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, H, N, D) each, x (B, N, W), to (B, H, N, D)."""
        options = {**self.options, **self.learned(q, k, x, key_padding_mask)}
        return efficient_attention(
            q, k, v, self.kind, causal=causal, key_padding_mask=key_padding_mask, scale=scale, **options
        )

    def extra_repr(self) -> str:
        """Kind and options."""
        return ", ".join([self.kind, *(f"{k}={v!r}" for k, v in self.options.items() if not isinstance(v, Tensor))])


def _zero_padding(v: Tensor, padding: Tensor | None) -> Tensor:
    return v if padding is None else v.masked_fill(padding[:, None, :, None], 0)


class _Softmax(Core):
    def forward(self, q, k, v, x, *, causal=False, key_padding_mask=None, scale=None):  # type: ignore[no-untyped-def]
        if key_padding_mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        mask = ~key_padding_mask[:, None, None]
        if causal:
            mask = mask & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        some = mask.any(-1, keepdim=True)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, scale=scale)
        return y.masked_fill(~some, 0)


class _Linformer(Core):
    """``sharing``: ``"none"`` (E and F of each head), ``"headwise"`` (one E, one F), ``"kv"`` (one for both)."""

    def __init__(self, kind: str, shape: Shape, *, rank: int = 128, sharing: str = "headwise") -> None:
        super().__init__(kind, shape)
        longest = shape.longest(kind)
        _positive(rank=rank)
        if sharing not in ("none", "headwise", "kv"):
            raise ValueError(f"sharing must be 'none', 'headwise' or 'kv', got {sharing!r}; layerwise: assign one core")
        size = (shape.heads, rank, longest) if sharing == "none" else (rank, longest)
        # means of all positions are as loud as one position
        self.e = nn.Parameter(torch.randn(size) / math.sqrt(longest))
        self.f = self.e if sharing == "kv" else nn.Parameter(torch.randn(size) / math.sqrt(longest))

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        return {"e": self.e, "f": self.f}


class _Nystrom(Core):
    def __init__(self, kind: str, shape: Shape, *, conv_width: int = 33, **options: Any) -> None:
        super().__init__(kind, shape, **options)
        if conv_width < 0 or (conv_width and conv_width % 2 == 0):
            raise ValueError(f"conv_width must be odd, or 0 for no convolution, got {conv_width}")
        self.conv = nn.Parameter(torch.empty(shape.heads, conv_width).uniform_(-1, 1) / math.sqrt(conv_width or 1))

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        return {"conv": self.conv} if self.conv.shape[1] else {}


class _Longformer(Core):
    """Global tokens through projections of their own."""

    def __init__(self, kind: str, shape: Shape, **options: Any) -> None:
        super().__init__(kind, shape, **options)
        out = shape.heads * shape.head_dim
        self.query_global, self.key_global, self.value_global = (nn.Linear(shape.width, out) for _ in range(3))

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        if not len(self.options.get("global_tokens", ())):
            return {}
        layers = (self.query_global, self.key_global, self.value_global)
        rows = [layer(x).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2) for layer in layers]
        # what stands in padding, NaN included, must not reach a sum
        return {"rows": tuple(_zero_padding(r, padding).to(torch.promote_types(r.dtype, torch.float32)) for r in rows)}


class _Features(Core):
    """Performer and RFA: random directions as a buffer, redrawn in training alone."""

    features: Tensor

    def __init__(
        self, kind: str, shape: Shape, *, count: int | None = None, orthogonal: bool = True, seed: int | None = 0,
        redraw_every: int | None = None, gated: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(kind, shape, **options)
        d = shape.head_dim
        self.count = max(1, round(d * math.log(d))) if count is None else count
        self.orthogonal = orthogonal
        _positive(count=self.count, redraw_every=1 if redraw_every is None else redraw_every)
        self.redraw_every, self.calls = redraw_every, 0
        self.register_buffer("features", gaussian_features(self.count, d, orthogonal=orthogonal, seed=seed))
        if gated and kind != "rfa":
            raise ValueError(f"gated is an option of rfa, not of {kind}")
        self.gate = nn.Linear(shape.width, shape.heads) if gated else None

    def redraw(self) -> None:
        """New directions, from torch's global generator."""
        features = gaussian_features(self.count, self.shape.head_dim, orthogonal=self.orthogonal, seed=None)
        self.features.copy_(features)

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        if self.training and self.redraw_every is not None:
            if self.calls and self.calls % self.redraw_every == 0:
                self.redraw()
            self.calls += 1
        found = {"features": self.features}
        return found if self.gate is None else found | {"gate": self.gate(x).sigmoid().transpose(1, 2)}


class _Routing(Core):
    """Centroids as a buffer that follows queries and keys in training."""

    centroids: Tensor

    def __init__(
        self, kind: str, shape: Shape, *, clusters: int | None = None, decay: float = 0.999, seed: int = 0,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(kind, shape, **options)
        if clusters is None and shape.max_length is None:
            raise ValueError("routing needs clusters=, or max_length= to take its square root")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in 0..1, 1 excluded, got {decay}")
        self.decay = decay
        made = clustering.default_centroids(
            shape.heads, shape.max_length or 1, shape.head_dim, torch.zeros(()), clusters, seed
        )
        self.register_buffer("centroids", made)

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        before = self.centroids
        if self.training:
            before = before.clone()
            self._follow(q, k, padding)
        return {"centroids": before}

    @torch.no_grad()
    def _follow(self, q: Tensor, k: Tensor, padding: Tensor | None) -> None:
        means = []
        for t in (q, k):
            t = F.layer_norm(t.float(), t.shape[-1:])
            nearest = torch.einsum("bhnd,hkd->bhnk", t, self.centroids.float()).argmax(-1)
            chosen = F.one_hot(nearest, self.centroids.shape[1]).float()
            chosen = chosen if padding is None else chosen.masked_fill(padding[:, None, :, None], 0)
            t = _zero_padding(t, padding)
            counts = chosen.sum((0, 2))[..., None]
            mean = torch.einsum("bhnk,bhnd->hkd", chosen, t) / counts.clamp(min=1)
            means.append(torch.where(counts > 0, mean, self.centroids.float()))
        self.centroids.lerp_(((means[0] + means[1]) / 2).to(self.centroids.dtype), 1 - self.decay)


class _Sinkhorn(Core):
    def __init__(self, kind: str, shape: Shape, **options: Any) -> None:
        super().__init__(kind, shape, **options)
        self.sort = nn.Parameter(torch.eye(shape.head_dim).repeat(shape.heads, 1, 1))

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        return {"sort": self.sort}


class _Induced(Core):
    def __init__(self, kind: str, shape: Shape, *, count: int = 32) -> None:
        super().__init__(kind, shape)
        _positive(count=count)
        self.latents = nn.Parameter(torch.randn(shape.heads, count, shape.head_dim))

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        return {"latents": self.latents}


class _Span(Core):
    """One learned span a head, between 0 and ``longest``."""

    def __init__(
        self, kind: str, shape: Shape, *, longest: int | None = None, start: float = 0, **options: Any
    ) -> None:
        super().__init__(kind, shape, **options)
        self.longest = longest if longest is not None else shape.longest(kind)
        if not 0 <= start <= self.longest:
            raise ValueError(f"start must lie in 0..longest, got start={start}, longest={self.longest}")
        self.options["longest"] = self.longest
        self.z = nn.Parameter(torch.full((shape.heads,), float(start)))

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        # the gradient passes the ends, or a span that a step took below 0 would stay there for good
        return {"z": self.z.detach().clamp(0, self.longest) + (self.z - self.z.detach())}

    def penalty(self, weight: float = 2e-6) -> Tensor:
        """To add to the loss: ``weight`` times the mean span of the heads."""
        return weight * self.z.clamp(0, self.longest).mean()


class _RelativeKeys(Core):
    """ETC: a learned vector for each clipped distance."""

    def __init__(self, kind: str, shape: Shape, *, distances: int = 12, **options: Any) -> None:
        super().__init__(kind, shape, **options)
        _positive(distances=distances)
        self.relative_keys = nn.Parameter(torch.zeros(2 * distances + 1, shape.head_dim))

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        return {"relative_keys": self.relative_keys}


class _AFT(Core):
    """``rank`` of the position biases; 0 has none (AFT-simple), ``"full"`` is not factorised."""

    def __init__(self, kind: str, shape: Shape, *, rank: int | str = 0, **options: Any) -> None:
        super().__init__(kind, shape, **options)
        if isinstance(rank, str) and rank != "full":
            raise ValueError(f"rank must be a whole number or 'full', got {rank!r}")
        if not isinstance(rank, str) and rank < 0:
            raise ValueError(f"rank must not be negative, got {rank}")
        self.rank = rank
        if rank:
            longest = shape.longest(kind)
            size = (shape.heads, longest, longest if isinstance(rank, str) else rank)
            self.u = nn.Parameter(0.1 * torch.randn(size))
            self.z = nn.Parameter(0.1 * torch.randn(size)) if rank != "full" else None

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        if not self.rank:
            return {}
        return {"bias": self.u} if self.z is None else {"bias_factors": (self.u, self.z)}


class _TransformerXL(Core):
    def __init__(self, kind: str, shape: Shape, **options: Any) -> None:
        super().__init__(kind, shape, **options)
        self.position = nn.Linear(shape.width, shape.heads * shape.head_dim, bias=False)
        self.content_bias, self.position_bias = (
            nn.Parameter(0.02 * torch.randn(shape.heads, shape.head_dim)) for _ in range(2)
        )

    def learned(self, q: Tensor, k: Tensor, x: Tensor, padding: Tensor | None) -> dict[str, Any]:
        width, weight = self.shape.width, self.position.weight
        rate = 10000 ** -(torch.arange(0, width, 2, device=x.device) / width)
        angle = torch.arange(k.shape[2], device=x.device)[:, None] * rate
        encoding = torch.cat([angle.sin(), angle.cos()], -1)[:, :width].to(weight.dtype)
        relative = self.position(encoding).unflatten(-1, (self.shape.heads, -1)).transpose(0, 1)
        return {"relative": relative, "content_bias": self.content_bias, "position_bias": self.position_bias}


class _Synthesizer(Core):
    """``variant``: ``"dense"``, ``"random"``, ``"factorised_dense"`` or ``"factorised_random"`` (of ``rank``)."""

    def __init__(self, kind: str, shape: Shape, *, variant: str = "dense", rank: int = 8) -> None:
        super().__init__(kind, shape)
        longest, h, d = shape.longest(kind), shape.heads, shape.head_dim
        _positive(rank=rank)
        self.variant, self.options = variant, {"variant": variant}
        if variant == "dense":
            self.hidden = nn.Linear(shape.width, h * d)
            self.logits = nn.Parameter(torch.randn(h, longest, d) / math.sqrt(d))
        elif variant == "random":
            self.logits = nn.Parameter(torch.randn(h, longest, longest))
        elif variant == "factorised_dense":
            self.sides = (math.ceil(math.sqrt(longest)), math.ceil(longest / math.ceil(math.sqrt(longest))))
            self.first, self.second = (nn.Linear(shape.width, h * side) for side in self.sides)
        elif variant == "factorised_random":
            self.left, self.right = (nn.Parameter(torch.randn(h, longest, rank) / rank**0.25) for _ in range(2))
        else:
            raise ValueError(
                f"variant must be 'dense', 'random', 'factorised_dense' or 'factorised_random', got {variant!r}"
            )

    def forward(self, q, k, v, x, *, causal=False, key_padding_mask=None, scale=None):  # type: ignore[no-untyped-def]
        n, keep = v.shape[2], None if key_padding_mask is None else ~key_padding_mask
        if n > self.shape.longest(self.kind):
            raise ValueError(f"synthesizer was made for at most {self.shape.max_length} positions, got {n}")
        v, how = _zero_padding(v, key_padding_mask), {"causal": causal, "keep": keep}

        def of_x(layer: nn.Module) -> Tensor:
            return layer(x).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)

        if self.variant == "dense":
            return mixing.synthesizer(of_x(self.hidden).relu(), self.logits, v, **how)
        if self.variant == "random":
            return mixing.synthesizer_random(self.logits, v, **how)
        if self.variant == "factorised_dense":
            return mixing.synthesizer_factorised(of_x(self.first), of_x(self.second), v, **how)
        return mixing.synthesizer(self.left[None, :, :n], self.right, v, **how)


class _Convolution(Core):
    """``lightconv`` has one kernel a head, ``dynamicconv`` makes one from every position."""

    def __init__(self, kind: str, shape: Shape, *, kernel_size: int = 7) -> None:
        super().__init__(kind, shape)
        _positive(kernel_size=kernel_size)
        self.options = {"kernel_size": kernel_size}
        if kind == "lightconv":
            self.weight = nn.Parameter(torch.randn(shape.heads, kernel_size))
        else:
            self.of_x = nn.Linear(shape.width, shape.heads * kernel_size)

    def forward(self, q, k, v, x, *, causal=False, key_padding_mask=None, scale=None):  # type: ignore[no-untyped-def]
        if self.kind == "lightconv":
            weights = self.weight
        else:
            weights = self.of_x(x).unflatten(-1, (self.shape.heads, -1)).transpose(1, 2)
        return mixing.light_convolution(v, weights, causal=causal, key_padding_mask=key_padding_mask)


class _Mixer(Core):
    """MLP-Mixer's token mixing on the values: W2 GELU(W1 v) along positions, the same for every feature."""

    def __init__(self, kind: str, shape: Shape, *, hidden: int | None = None) -> None:
        super().__init__(kind, shape)
        longest = shape.longest(kind)
        hidden = max(1, longest // 2) if hidden is None else hidden
        _positive(hidden=hidden)
        self.first, self.second = nn.Linear(longest, hidden), nn.Linear(hidden, longest)

    def forward(self, q, k, v, x, *, causal=False, key_padding_mask=None, scale=None):  # type: ignore[no-untyped-def]
        n = v.shape[2]
        if n > self.shape.longest(self.kind):
            raise ValueError(f"mlp_mixer was made for at most {self.shape.max_length} positions, got {n}")
        along = _zero_padding(v, key_padding_mask).transpose(-1, -2)
        hidden = F.gelu(F.linear(along, self.first.weight[:, :n], self.first.bias))
        return F.linear(hidden, self.second.weight[:n], self.second.bias[:n]).transpose(-1, -2)


_CORES: dict[str, type[Core]] = {
    "softmax": _Softmax, "linformer": _Linformer, "nystrom": _Nystrom, "longformer": _Longformer,
    "performer": _Features, "rfa": _Features, "routing": _Routing, "sinkhorn": _Sinkhorn, "induced": _Induced,
    "adaptive_span": _Span, "etc": _RelativeKeys, "aft": _AFT, "transformer_xl": _TransformerXL,
    "synthesizer": _Synthesizer, "lightconv": _Convolution, "dynamicconv": _Convolution, "mlp_mixer": _Mixer,
}  # fmt: skip
LAYER_KINDS = tuple(sorted({*KINDS, *_CORES, "fnet"} - {"funnel"}))
"""Kinds that ``EfficientAttention`` takes."""
CAUSAL_LAYERS = {"softmax", "synthesizer", "lightconv", "dynamicconv"} | {n for n, kind in KINDS.items() if kind.causal}


def check_layer(kind: str, causal: bool) -> None:
    """Raise ``ValueError`` for a kind that is no layer, or cannot be causal."""
    if kind not in LAYER_KINDS:
        raise ValueError(f"kind must be one of {', '.join(LAYER_KINDS)}, got {kind!r}")
    if causal and kind not in CAUSAL_LAYERS:
        raise ValueError(
            f"{kind} mixes all positions and cannot be causal; causal kinds are {', '.join(sorted(CAUSAL_LAYERS))}"
        )


def make_core(kind: str, shape: Shape, **options: Any) -> Core:
    """The core of a kind.

    Raises:
        ValueError: for options that it does not have, or a ``max_length`` that it needs and was not given.
    """
    try:
        return _CORES.get(kind, Core)(kind, shape, **options)
    except TypeError as error:
        raise ValueError(f"{kind}: {error}") from error


class EfficientAttention(nn.Module):
    """Multi-head attention of any kind of the survey, with its projections and parameters.

    ``fnet`` has neither heads nor projections; ``reformer`` has no projection of keys. ``softmax`` is exact attention,
    as a baseline of the same form.

    Args:
        embed_dim: width of input and output.
        num_heads: heads; must divide ``embed_dim``.
        kind: one of ``LAYER_KINDS``.
        causal: see no later position.
        max_length: the longest sequence, for kinds with parameters for every position.
        bias: of the projections.
        options: of the kind: those of ``efficient_attention``; and ``rank``, ``sharing`` (linformer), ``conv_width``
            (nystrom), ``count``, ``orthogonal``, ``seed``, ``redraw_every`` (performer, rfa), ``gated`` (rfa),
            ``clusters``, ``decay`` (routing), ``count`` (induced), ``longest``, ``start`` (adaptive_span),
            ``distances`` (etc), ``rank`` (aft), ``variant``, ``rank`` (synthesizer), ``kernel_size`` (lightconv,
            dynamicconv), ``hidden`` (mlp_mixer).

    Raises:
        ValueError: for heads that do not divide the width, an unknown kind or option, causal use of a kind that cannot
            be, or a missing ``max_length``.

    Example:
        >>> layer = EfficientAttention(32, 4, "linformer", max_length=512, rank=16)
        >>> layer(torch.randn(2, 100, 32)).shape
        torch.Size([2, 100, 32])
    """

    def __init__(
        self, embed_dim: int, num_heads: int, kind: str, *, causal: bool = False, max_length: int | None = None,
        bias: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got num_heads={num_heads}, embed_dim={embed_dim}")
        check_layer(kind, causal)
        if kind == "transformer_xl" and not causal:
            raise ValueError("transformer_xl is causal; pass causal=True")
        self.kind, self.causal, self.num_heads, self.embed_dim = kind, causal, num_heads, embed_dim
        if kind == "fnet":
            if options:
                raise ValueError(f"fnet has no option {next(iter(options))!r}; it has no parameters at all")
            return
        self.core = make_core(kind, Shape(embed_dim, num_heads, embed_dim // num_heads, max_length), **options)
        self.query = nn.Linear(embed_dim, embed_dim, bias)
        self.key = None if kind == "reformer" else nn.Linear(embed_dim, embed_dim, bias)
        self.value = nn.Linear(embed_dim, embed_dim, bias)
        self.out = nn.Linear(embed_dim, embed_dim, bias)

    def forward(
        self,
        x: Float[Tensor, "B N W"],
        context: Float[Tensor, "B S W"] | None = None,
        key_padding_mask: Bool[Tensor, "B _"] | None = None,
        memory: Float[Tensor, "B M W"] | None = None,
    ) -> Float[Tensor, "B N W"]:
        """Attend from ``x`` to itself, or to ``context`` where the kind allows.

        ``memory`` (``transformer_xl`` alone) holds earlier inputs of the layer; its gradient is stopped and it is not
        padded. ``key_padding_mask`` is True where padded.

        Raises:
            ValueError: for shapes that do not fit, an empty sequence, or a memory or context that the kind has no use
                for.
            TypeError: for inputs that are not floating-point, or a mask that is not boolean.
        """
        if memory is not None and self.kind != "transformer_xl":
            raise ValueError(f"memory is for transformer_xl, not for {self.kind}")
        if context is not None and not (self.kind == "softmax" or (self.kind in KINDS and KINDS[self.kind].cross)):
            raise ValueError(f"{self.kind} is self-attention alone and takes no context")
        self._check(key_padding_mask, x=x, context=context, memory=memory)
        if self.kind == "fnet":
            return mixing.fourier_mixing(x, key_padding_mask)
        source = x if context is None else context
        if memory is not None:
            source = torch.cat([memory.detach(), source], dim=1)
            if key_padding_mask is not None:
                key_padding_mask = F.pad(key_padding_mask, (memory.shape[1], 0))

        def heads(layer: nn.Module, t: Tensor) -> Tensor:
            return layer(t).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q = heads(self.query, x)
        k = q if self.key is None else heads(self.key, source)
        y = self.core(q, k, heads(self.value, source), x, causal=self.causal, key_padding_mask=key_padding_mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _check(self, mask: Tensor | None, *, x: Tensor, context: Tensor | None, memory: Tensor | None) -> None:
        check_floats(x=x, context=context, memory=memory)
        for name, t in (("x", x), ("context", context), ("memory", memory)):
            if t is not None and (t.ndim != 3 or t.shape[0] != x.shape[0] or t.shape[2] != self.embed_dim):
                raise ValueError(
                    f"{name} must have shape (batch, length, {self.embed_dim}) of one batch, got {tuple(t.shape)}"
                )
            if t is not None and t.shape[1] == 0 and name != "memory":
                raise ValueError(f"{name} must not be empty, got shape {tuple(t.shape)}")
        keys = x if context is None else context
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be a boolean tensor, True where padded, got {mask.dtype}")
        if mask is not None and mask.shape != keys.shape[:2]:
            raise ValueError(f"key_padding_mask must have shape {tuple(keys.shape[:2])}, got {tuple(mask.shape)}")


class CompressiveMemory(nn.Module):
    """Transformer-XL's memory, and the Compressive Transformer's: what falls out of it goes on, compressed.

    A call takes the memory and the segment that was just read and returns the next memory, oldest first. The published
    model trains the compression with a loss of its own, which this one does not have: it compresses by means, unless
    you train its weights. ``EfficientAttention`` stops the gradient of the memory that it reads, so nothing reaches
    them from there, as in the paper.

    Args:
        width: of the hidden states.
        length: recent positions kept as they are.
        compressed: compressed positions kept, 0 for Transformer-XL.
        rate: positions of the memory for one compressed; must divide ``length`` and the segments.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> remember = CompressiveMemory(8, length=6, compressed=4, rate=3)
        >>> memory = None
        >>> for _ in range(4):
        ...     memory = remember(memory, torch.randn(1, 6, 8))
        >>> memory.shape
        torch.Size([1, 10, 8])
    """

    def __init__(self, width: int, length: int, compressed: int = 0, rate: int = 3) -> None:
        super().__init__()
        if length < 1 or compressed < 0 or rate < 1 or (compressed and length % rate):
            raise ValueError(
                f"length must be a positive multiple of rate and compressed not negative, got length={length}, "
                f"rate={rate}, compressed={compressed}"
            )
        self.length, self.compressed, self.rate = length, compressed, rate
        if compressed:
            self.compress = nn.Conv1d(width, width, rate, stride=rate, bias=False)
            with torch.no_grad():
                # starts as a mean
                self.compress.weight.copy_(torch.eye(width)[..., None].expand(-1, -1, rate) / rate)

    def forward(self, memory: Float[Tensor, "B M W"] | None, x: Float[Tensor, "B N W"]) -> Float[Tensor, "B P W"]:
        """The memory after ``x``."""
        x = x.detach()
        old = x[:, :0] if memory is None else memory.detach()
        recent = torch.cat([old[:, max(old.shape[1] - self.length, 0) :], x], dim=1)
        early = old[:, : max(old.shape[1] - self.length, 0)]
        falls = max(recent.shape[1] - self.length, 0)
        if self.compressed and falls:
            if falls % self.rate:
                raise ValueError(f"{falls} positions leave the memory, which rate={self.rate} does not divide")
            squeezed = self.compress(recent[:, :falls].transpose(1, 2)).transpose(1, 2)
            early = torch.cat([early, squeezed], dim=1)[:, -self.compressed :]
        return torch.cat([early, recent[:, falls:]], dim=1)
