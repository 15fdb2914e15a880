"""Flow-Attention: linear attention with conserved flows (Wu et al., ICML 2022, arXiv 2202.06258, section 3).

Legend: B batch, H heads, L sinks (queries), S sources (keys), D features of queries and keys, E features of values,
C chunk, N chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from torchgraft.ops._precision import autocast_off

FeatureMap = Literal["sigmoid", "relu", "elu"]
Clamp = tuple[float, float] | None


def mapped_features(x: Tensor, name: FeatureMap) -> Tensor:
    """The non-negative map that turns queries and keys into capacities; any shape, shape kept.

    ``sigmoid`` is the paper's. ``relu`` adds 1e-6, as the long-range-arena code of the paper does. ``elu`` is elu + 1,
    the map of the Linear Transformer.
    """
    if name == "sigmoid":
        return x.sigmoid()
    if name == "relu":
        return x.relu() + 1e-6
    if name == "elu":
        return torch.nn.functional.elu(x) + 1
    raise ValueError(f"feature_map must be 'sigmoid', 'relu' or 'elu', got {name!r}")


def check_settings(feature_map: FeatureMap, clamp: Clamp, eps: float = 1e-6) -> None:
    """Raise ``ValueError`` for settings that ``flow_attention`` cannot take."""
    if feature_map not in ("sigmoid", "relu", "elu"):
        raise ValueError(f"feature_map must be 'sigmoid', 'relu' or 'elu', got {feature_map!r}")
    if clamp is not None and not (isinstance(clamp, tuple | list) and len(clamp) == 2 and clamp[0] < clamp[1]):
        raise ValueError(f"clamp must be (low, high) with low < high, or None, got {clamp!r}")
    # written so that NaN is refused too
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, shape: str) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> None:
    _check_tensors(q, k, v, "(batch, heads, length, features)")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q, k and v must agree in batch and heads, k and v in length, got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, v {tuple(v.shape)}; repeat grouped key-value heads first"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same features, got {q.shape[-1]} and {k.shape[-1]}")
    if q.shape[2] == 0 or k.shape[2] == 0:
        raise ValueError(f"q and k must not be empty, got lengths {q.shape[2]} and {k.shape[2]}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"causal flow attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}; "
            "decode one step at a time with flow_attention_step"
        )
    if mask is not None:
        if mask.ndim != 2 or mask.shape != (k.shape[0], k.shape[2]):
            raise ValueError(
                f"key_padding_mask must have shape (batch, source length) = {(k.shape[0], k.shape[2])}, "
                f"True where padded, got {tuple(mask.shape)}; linear attention cannot take an arbitrary attention mask"
            )
        if mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be a boolean tensor, True where padded, got {mask.dtype}")
        # values are not known while torch.compile traces; a sample without a source is NaN there
        if not torch.compiler.is_compiling() and bool(mask.all(-1).any()):
            raise ValueError("key_padding_mask leaves a sample without a single source; drop that sample")


def flow_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S E"],
    *,
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    query_padding_mask: Bool[Tensor, "B L"] | None = None,
    feature_map: FeatureMap = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    eps: float = 1e-6,
    competition: bool = True,
    allocation: bool = True,
    chunk_size: int = 128,
) -> Float[Tensor, "B H L E"]:
    """Flow-Attention in time and memory linear in the length; a stand-in for ``scaled_dot_product_attention``.

    Every value is a source and every output a sink. Fixing the incoming flow of each sink and the outgoing flow of
    each source makes sources compete (a softmax over sources) and sinks be allocated (a gate per sink), section 3.2
    of the paper; causal as in its appendix: each source's competition is normalised at its own time.

    Queries are not scaled by 1/sqrt(D). Half precision is computed in float32 inside, where sums over more than
    65,504 would overflow, and returned in the dtype of ``v``.

    ``clamp`` bounds the conserved outgoing flow before the softmax, as the official core, image and GPT code do; the
    official WikiText-103 code takes (-5, 5), its decision code (-10, 10), its long-range-arena code none. That flow
    has mean 1 in self-attention, so the upper bound 1 is active for about half of the sources and levels the
    competition between them; ``clamp=None`` lets them compete.

    Padding is an extension that the official code lacks: padded sources leave every sum over sources, padded sinks
    every sum over sinks, and the lengths in the formulas become the true ones of each sample. Outputs at padded
    positions are 0. Where ``query_padding_mask`` is not given and L = S, this is taken for self-attention, in which
    padded sources are padded sinks: cross-attention between sequences of one length needs both masks.

    Args:
        q: queries.
        k: keys; grouped heads must be repeated by the caller.
        v: values.
        is_causal: sinks see no later source, nothing depends on the future; needs L = S.
        key_padding_mask: True at padded sources.
        query_padding_mask: True at padded sinks; for cross-attention. Causal attention takes ``key_padding_mask``
            for both.
        feature_map: ``"sigmoid"`` (the paper), ``"relu"`` or ``"elu"``.
        clamp: bounds of the conserved outgoing flow, or ``None``.
        eps: added to both factors of every flow, against division by zero.
        competition: let sources compete; without it every source counts alike.
        allocation: gate the sinks. Without both this is plain normalised linear attention.
        chunk_size: causal only; sources are handled in chunks of this many, which changes speed and memory alone.

    Returns:
        Outputs, in the dtype of ``v``.

    Raises:
        ValueError: for shapes that do not fit, causal with L != S, a mask that is no padding mask, a sample without a
            source (under ``torch.compile`` its outputs are NaN instead), settings out of range.
        TypeError: for tensors of the wrong dtype.

    Example:
        >>> import torch
        >>> q = k = v = torch.randn(2, 4, 100, 16)
        >>> flow_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 4, 100, 16])
    """
    _check(q, k, v, is_causal, key_padding_mask)
    check_settings(feature_map, clamp, eps)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if query_padding_mask is not None:
        if query_padding_mask.shape != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"query_padding_mask must have shape (batch, query length) = {(q.shape[0], q.shape[2])}, "
                f"got {tuple(query_padding_mask.shape)}"
            )
        if query_padding_mask.dtype != torch.bool:
            raise TypeError(
                f"query_padding_mask must be a boolean tensor, True where padded, got {query_padding_mask.dtype}"
            )
        if is_causal and query_padding_mask is not key_padding_mask:
            raise ValueError(
                "query_padding_mask is for cross-attention; causal attention takes key_padding_mask for both"
            )
    if query_padding_mask is None and q.shape[2] == k.shape[2]:
        query_padding_mask = key_padding_mask

    kind = v.dtype
    wide = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    # an autocast region would take the sums back to half precision
    with autocast_off(q):
        sinks = _mapped(q.to(wide), feature_map, query_padding_mask)
        sources = _mapped(k.to(wide), feature_map, key_padding_mask)
        values = v.to(wide)
        if key_padding_mask is not None:
            # what stands in padding, NaN included, must not reach a sum
            values = values.masked_fill(key_padding_mask[:, None, :, None], 0)
        rule = _Rule(clamp, eps, competition, allocation)
        if is_causal:
            y = _causal(sinks, sources, values, key_padding_mask, rule, chunk_size)
        else:
            y = _whole(sinks, sources, values, key_padding_mask, query_padding_mask, rule)
        if query_padding_mask is not None:
            y = y.masked_fill(query_padding_mask[:, None, :, None], 0)
    return y.to(kind)


@dataclass(frozen=True)
class _Rule:
    clamp: Clamp
    eps: float
    competition: bool
    allocation: bool

    def bounded(self, flow: Tensor) -> Tensor:
        return flow if self.clamp is None else flow.clamp(*self.clamp)


def _mapped(x: Tensor, name: FeatureMap, padding: Tensor | None) -> Tensor:
    if padding is None:
        return mapped_features(x, name)
    here = padding[:, None, :, None]
    return mapped_features(x.masked_fill(here, 0), name).masked_fill(here, 0)


def _count(padding: Tensor | None, length: int, like: Tensor) -> Tensor:
    """How many are not padding, of shape (B, 1, 1) or ()."""
    if padding is None:
        return like.new_tensor(float(length))
    return (~padding).sum(-1).to(like.dtype)[:, None, None]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products over the features: (…, L, D) with (…, L, D) or (…, 1, D)."""
    if y.shape[-2] == 1:
        return (x @ y.transpose(-1, -2)).squeeze(-1)
    return (x * y).sum(-1)


def _whole(q: Tensor, k: Tensor, v: Tensor, no_source: Tensor | None, no_sink: Tensor | None, rule: _Rule) -> Tensor:
    eps = rule.eps
    n_sinks, n_sources = _count(no_sink, q.shape[2], q), _count(no_source, k.shape[2], k)
    q_sum, k_sum = q.sum(2, keepdim=True), k.sum(2, keepdim=True)
    incoming = _dot(q + eps, k_sum + eps)
    outgoing = _dot(k + eps, q_sum + eps)
    if no_source is not None:
        # k is 0 where padded, so eps alone is left there; 1 keeps the division finite and its gradient away from NaN
        outgoing = outgoing.masked_fill(no_source[:, None], 1)
    if no_sink is not None:
        incoming = incoming.masked_fill(no_sink[:, None], 1)
    if rule.competition:
        conserved = rule.bounded(_dot(k + eps, (q / incoming[..., None]).sum(2, keepdim=True) + eps))
        if no_source is not None:
            conserved = conserved.masked_fill(no_source[:, None], -torch.inf)
        v = v * (n_sources * conserved.softmax(-1))[..., None]
    y = (q / incoming[..., None]) @ (k.transpose(-1, -2) @ v)
    if rule.allocation:
        conserved = _dot(q + eps, (k / outgoing[..., None]).sum(2, keepdim=True) + eps)
        y = y * (conserved * (n_sinks / n_sources)).sigmoid()[..., None]
    return y


def _causal(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, rule: _Rule, chunk: int) -> Tensor:
    length, eps = q.shape[2], rule.eps
    if padding is None:
        position = torch.arange(1, length + 1, device=q.device, dtype=q.dtype)
    else:
        position = (~padding).cumsum(-1).clamp(min=1).to(q.dtype)[:, None]

    def until(x: Tensor) -> Tensor:
        return x.cumsum(2)

    def safe(flow: Tensor) -> Tensor:
        return flow if padding is None else flow.masked_fill(padding[:, None], 1)

    incoming = safe(_dot(q + eps, until(k) + eps))
    if rule.competition:
        scaled = q * (position / incoming)[..., None]
        conserved = rule.bounded(_dot(k + eps, until(scaled) + eps) / position)
        if padding is not None:
            conserved = conserved.masked_fill(padding[:, None], -torch.inf)
        v = v * (position * _running_softmax(conserved))[..., None]
    y = _causal_product(q / incoming[..., None], k, v, chunk)
    if rule.allocation:
        outgoing = safe(_dot(k + eps, until(q) + eps))
        conserved = _dot(q + eps, until(k * (position / outgoing)[..., None]) + eps) / position
        y = y * conserved.sigmoid()[..., None]
    return y


def _running_softmax(x: Tensor) -> Tensor:
    """``exp(x_i) / sum_{j<=i} exp(x_j)`` along the last axis, without overflow for any clamp; 0 where x is -inf."""
    total = x.logcumsumexp(-1)
    # before the first source that is not padding the sum is empty
    return (x - total.masked_fill(total == -torch.inf, 0)).exp()


def _causal_product(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """``y_i = q_i . sum_{j<=i} k_j v_j^T`` in chunks: a masked product inside, a carried (D, E) state between."""
    length = q.shape[2]
    chunk = min(chunk, length)
    short = -length % chunk
    if short:
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, short)) for x in (q, k, v))
    # (B, H, N, C, D)
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))
    inside = (q @ k.transpose(-1, -2)).tril() @ v
    if q.shape[2] > 1:
        states = k[:, :, :-1].transpose(-1, -2) @ v[:, :, :-1]
        carried = torch.nn.functional.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))
        inside = inside + q @ carried
    return inside.flatten(2, 3)[:, :, :length]


def flow_attention_weights(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H S D"],
    *,
    is_causal: bool = False,
    feature_map: FeatureMap = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    eps: float = 1e-6,
    competition: bool = True,
    allocation: bool = True,
) -> Float[Tensor, "B H L S"]:
    """The matrix that ``flow_attention`` implies, written out as in the paper: quadratic, for looking at and tests.

    Its rows need not sum to 1. Takes what ``flow_attention`` takes, without padding, half precision as there, and
    returns the dtype of ``q``.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 10, 4).unbind()
        >>> torch.allclose(flow_attention_weights(q, k) @ v, flow_attention(q, k, v), atol=1e-5)
        True
    """
    _check(q, k, k, is_causal, None)
    check_settings(feature_map, clamp, eps)
    kind = q.dtype
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    with autocast_off(q):
        rule = _Rule(clamp, eps, competition, allocation)
        return _written_out(q.to(wide), k.to(wide), is_causal, feature_map, rule).to(kind)


def _written_out(q: Tensor, k: Tensor, is_causal: bool, feature_map: FeatureMap, rule: _Rule) -> Tensor:
    eps = rule.eps
    source, sink = _mapped(k, feature_map, None), _mapped(q, feature_map, None)
    n_sinks, n_sources = q.shape[2], k.shape[2]
    sees = torch.ones(n_sinks, n_sources, dtype=q.dtype, device=q.device)
    if is_causal:
        sees = sees.tril()
    # row i of `before` marks what a sum "until i" takes: everything, or the past
    before, behind = sees, sees if is_causal else sees.T
    number = sees.sum(-1) if is_causal else torch.ones(n_sinks, dtype=q.dtype, device=q.device)
    incoming = ((sink + eps) * (before @ source + eps)).sum(-1)
    outgoing = ((source + eps) * (behind @ sink + eps)).sum(-1)
    weights = (sink / incoming[..., None]) @ source.transpose(-1, -2) * sees
    if rule.competition:
        scale = number / incoming if is_causal else 1 / incoming
        conserved = ((source + eps) * (behind @ (sink * scale[..., None]) + eps)).sum(-1)
        if is_causal:
            e = rule.bounded(conserved / number).exp()
            weights = weights * (number * e / e.cumsum(-1))[..., None, :]
        else:
            weights = weights * (n_sources * rule.bounded(conserved).softmax(-1))[..., None, :]
    if rule.allocation:
        scale = number / outgoing if is_causal else 1 / outgoing
        conserved = ((sink + eps) * (before @ (source * scale[..., None]) + eps)).sum(-1)
        conserved = conserved / number if is_causal else conserved * (n_sinks / n_sources)
        weights = weights * conserved.sigmoid()[..., None]
    return weights


@dataclass
class FlowState:
    """All that causal flow attention remembers, of a size that does not grow with the length.

    Attributes:
        keys: sum of mapped keys, (B, H, D); likewise ``queries``.
        keys_scaled: sum of keys by their outgoing flow; ``queries_scaled`` of queries by their incoming flow.
        total: log of the sum of exponentials of the conserved outgoing flows, (B, H).
        memory: sum of key-value products, (B, H, D, E).
        position: how many tokens were seen, (B, 1).
    """

    keys: Tensor
    queries: Tensor
    keys_scaled: Tensor
    queries_scaled: Tensor
    total: Tensor
    memory: Tensor
    position: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, features: int, value_features: int, like: Tensor) -> FlowState:
        """The state before the first token, on the device of ``like``; float32 unless ``like`` is wider."""
        kind = torch.promote_types(like.dtype, torch.float32)
        flat = torch.zeros(batch, heads, features, dtype=kind, device=like.device)
        total = torch.full((batch, heads), -torch.inf, dtype=kind, device=like.device)
        memory = torch.zeros(batch, heads, features, value_features, dtype=kind, device=like.device)
        seen = torch.zeros(batch, 1, dtype=kind, device=like.device)
        return cls(flat, flat.clone(), flat.clone(), flat.clone(), total, memory, seen)

    def select(self, rows: Tensor) -> FlowState:
        """The states of these rows of the batch, in this order; a row may come several times (beam search)."""
        return FlowState(*(getattr(self, f.name).index_select(0, rows.to(self.memory.device)) for f in fields(self)))


def flow_attention_state(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B H L D"],
    v: Float[Tensor, "B H L E"],
    *,
    key_padding_mask: Bool[Tensor, "B L"] | None = None,
    feature_map: FeatureMap = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    eps: float = 1e-6,
    competition: bool = True,
) -> FlowState:
    """What causal ``flow_attention`` remembers after a prompt, so that ``flow_attention_step`` can go on from there.

    Padding, on either side, leaves no trace in the state. Takes what ``flow_attention`` takes and raises what it does.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 2, 6, 4)
        >>> state = flow_attention_state(x[:, :, :5], x[:, :, :5], x[:, :, :5])
        >>> last, state = flow_attention_step(x[:, :, 5], x[:, :, 5], x[:, :, 5], state)
        >>> torch.allclose(last, flow_attention(x, x, x, is_causal=True)[:, :, 5], atol=1e-5)
        True
    """
    _check(q, k, v, True, key_padding_mask)
    check_settings(feature_map, clamp, eps)
    rule = _Rule(clamp, eps, competition, True)
    wide = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    with autocast_off(q):
        sinks = _mapped(q.to(wide), feature_map, key_padding_mask)
        sources = _mapped(k.to(wide), feature_map, key_padding_mask)
        values = v.to(wide)
        seen = torch.ones(q.shape[0], q.shape[2], dtype=wide, device=q.device)
        if key_padding_mask is not None:
            seen = (~key_padding_mask).to(wide)
            values = values.masked_fill(key_padding_mask[:, None, :, None], 0)
        position = seen.cumsum(-1).clamp(min=1)[:, None]
        incoming = _dot(sinks + eps, sources.cumsum(2) + eps)
        outgoing = _dot(sources + eps, sinks.cumsum(2) + eps)
        if key_padding_mask is not None:
            # mapped padding is 0, so what is divided is 0 too; 1 keeps 0 / 0 away where eps is 0
            incoming, outgoing = (x.masked_fill(key_padding_mask[:, None], 1) for x in (incoming, outgoing))
        queries_scaled = (sinks * (position / incoming)[..., None]).cumsum(2)
        keys_scaled = (sources * (position / outgoing)[..., None]).sum(2)
        total = torch.full_like(position[..., -1], -torch.inf).expand(q.shape[:2])
        if competition:
            conserved = rule.bounded(_dot(sources + eps, queries_scaled + eps) / position)
            if key_padding_mask is not None:
                conserved = conserved.masked_fill(key_padding_mask[:, None], -torch.inf)
            values = values * (position * _running_softmax(conserved))[..., None]
            total = conserved.logsumexp(-1)
        memory = sources.transpose(-1, -2) @ values
    return FlowState(
        sources.sum(2), sinks.sum(2), keys_scaled, queries_scaled[:, :, -1], total, memory, seen.sum(-1, keepdim=True)
    )


def flow_attention_step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B H D"],
    v: Float[Tensor, "B H E"],
    state: FlowState,
    *,
    feature_map: FeatureMap = "sigmoid",
    clamp: Clamp = (-1.0, 1.0),
    eps: float = 1e-6,
    competition: bool = True,
    allocation: bool = True,
) -> tuple[Float[Tensor, "B H E"], FlowState]:
    """One token of causal ``flow_attention``: its output and the state after it; O(D E) time, no growth.

    Raises:
        ValueError: for shapes that do not fit each other or the state, settings out of range.
        TypeError: for tensors of the wrong dtype.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 2, 5, 4)
        >>> state, steps = FlowState.empty(1, 2, 4, 4, x), []
        >>> for t in x.unbind(2):
        ...     y, state = flow_attention_step(t, t, t, state)
        ...     steps.append(y)
        >>> torch.allclose(torch.stack(steps, 2), flow_attention(x, x, x, is_causal=True), atol=1e-5)
        True
    """
    _check_tensors(q, k, v, "(batch, heads, features)")
    check_settings(feature_map, clamp, eps)
    for x, found, needed in (
        ("q", q.shape, state.queries.shape),
        ("k", k.shape, state.keys.shape),
        ("v", v.shape, state.memory.shape[:2] + state.memory.shape[3:]),
    ):
        if found != needed:
            raise ValueError(f"{x} must have the shape that state was made for, {tuple(needed)}, got {tuple(found)}")
    kind, wide = v.dtype, state.memory.dtype
    rule = _Rule(clamp, eps, competition, allocation)
    sink, source = _mapped(q.to(wide), feature_map, None), _mapped(k.to(wide), feature_map, None)
    position = state.position + 1
    keys, queries = state.keys + source, state.queries + sink
    incoming = ((sink + eps) * (keys + eps)).sum(-1)
    outgoing = ((source + eps) * (queries + eps)).sum(-1)
    keys_scaled = state.keys_scaled + source * (position / outgoing)[..., None]
    queries_scaled = state.queries_scaled + sink * (position / incoming)[..., None]
    value, total = v.to(wide), state.total
    if competition:
        conserved = rule.bounded(((source + eps) * (queries_scaled + eps)).sum(-1) / position)
        total = torch.logaddexp(total, conserved)
        value = value * (position * (conserved - total).exp())[..., None]
    memory = state.memory + source[..., :, None] * value[..., None, :]
    # an autocast region would take the product to half precision
    with autocast_off(q):
        y = torch.einsum("bhd,bhde->bhe", sink / incoming[..., None], memory)
    if allocation:
        y = y * (((sink + eps) * (keys_scaled + eps)).sum(-1) / position).sigmoid()[..., None]
    return y.to(kind), FlowState(keys, queries, keys_scaled, queries_scaled, total, memory, position)
