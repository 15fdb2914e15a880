"""One call for all of them, the patterns as masks, and registration with transformers' attention interface."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from torchgraft.layers._interface import register_attention
from torchgraft.layers.efficient_transformers import clustering, kernels, low_rank, mixing, patterns
from torchgraft.ops._checks import check_floats
from torchgraft.ops._precision import autocast_off

__all__ = [
    "DROP_IN", "KINDS", "attention_pattern", "efficient_attention", "flex_block_mask", "register_efficient_attention",
    "register_efficient_attentions",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One attention.

    Attributes:
        work: ``work(q, k, v, causal=, keep=, …)``.
        causal: whether it can be causal.
        cross: whether queries may be of another sequence than keys.
        paper: who published it.
        cost: against the length n.
    """

    work: Callable[..., Tensor]
    causal: bool
    cross: bool
    paper: str
    cost: str

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """What it takes beyond the arguments that all take."""
        shared = ("q", "k", "v", "causal", "keep", "scale")
        return {n: p for n, p in inspect.signature(self.work).parameters.items() if n not in shared}

    @property
    def needs(self) -> list[str]:
        """Options without a default: learned tensors."""
        return [name for name, p in self.options.items() if p.default is inspect.Parameter.empty]


def _of_pattern(make: Callable[..., patterns.Pattern]) -> Callable[..., Tensor]:
    def work(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None, scale: float,
        relative_keys: Tensor | None = None, rows: tuple[Tensor, Tensor, Tensor] | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        pattern = _pattern(make, q.shape[2], causal, options)
        return patterns.pattern_attention(
            pattern, q, k, v, keep=keep, scale=scale, relative_keys=relative_keys, rows=rows
        )

    own = [p for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]
    shared = [p for p in inspect.signature(work).parameters.values() if p.kind is not p.VAR_KEYWORD]
    work.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    return work


def _pattern(make: Callable[..., patterns.Pattern], n: int, causal: bool, options: dict[str, Any]) -> patterns.Pattern:
    # tensors and lists as what can be looked up; under torch.compile the cache would be passed by anyway
    plain = tuple(sorted((name, _plain(value)) for name, value in options.items()))
    return (_made.__wrapped__ if torch.compiler.is_compiling() else _made)(make, n, causal, plain)


@lru_cache(maxsize=64)
def _made(
    make: Callable[..., patterns.Pattern], n: int, causal: bool, options: tuple[tuple[str, Any], ...]
) -> patterns.Pattern:
    return make(n, causal, **dict(options))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(_plain(v) for v in value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _kinds() -> dict[str, Kind]:
    causal_patterns = {"local", "strided", "fixed", "longformer"}
    papers = {
        "local": "Local attention; Qiu et al. 2020", "blockwise": "BlockBERT, Qiu et al. 2020",
        "strided": "Sparse Transformer, Child et al. 2019", "fixed": "Sparse Transformer, Child et al. 2019",
        "longformer": "Beltagy et al. 2020", "bigbird": "Zaheer et al. 2020", "star": "Guo et al. 2019",
        "etc": "Ainslie et al. 2020",
    }  # fmt: skip
    costs = {"strided": "n sqrt n", "fixed": "n sqrt n"}
    found = {
        name: Kind(_of_pattern(make), name in causal_patterns, False, papers[name], costs.get(name, "n"))
        for name, make in patterns.PATTERNS.items()
    }
    others: list[tuple[Callable[..., Tensor], bool, bool, str, str]] = [
        (clustering.routing, True, False, "Routing Transformer, Roy et al. 2021", "n sqrt n"),
        (clustering.reformer, True, False, "Kitaev et al. 2020", "n log n"),
        (clustering.sinkhorn, True, False, "Tay et al. 2020", "n"),
        (low_rank.linformer, False, True, "Wang et al. 2020", "n"),
        (low_rank.nystrom, False, False, "Nystromformer, Xiong et al. 2021", "n"),
        (kernels.linear, True, True, "Linear Transformer, Katharopoulos et al. 2020", "n"),
        (kernels.performer, True, True, "Choromanski et al. 2021", "n"),
        (kernels.rfa, True, True, "Random Feature Attention, Peng et al. 2021", "n"),
        (kernels.efficient, False, True, "Efficient attention, Shen et al. 2021", "n"),
        (mixing.adaptive_span, True, False, "Sukhbaatar et al. 2019", "n span"),
        (mixing.transformer_xl, True, False, "Dai et al. 2019; Rae et al. 2020 with compressed memory", "n (n + m)"),
        (low_rank.induced, False, True, "Set Transformer, Lee et al. 2019; Perceiver", "n"),
        (low_rank.funnel, False, False, "Dai et al. 2020", "n^2 / stride"),
        (low_rank.poolingformer, False, False, "Zhang et al. 2021", "n^2 / stride"),
        (mixing.aft, True, False, "Attention Free Transformer, Zhai et al. 2021", "n; n^2 with position biases"),
    ]  # fmt: skip
    return found | {row[0].__name__: Kind(*row) for row in others}


KINDS = _kinds()
"""Every attention of queries, keys and values, by name."""

_SHORTER = ("funnel",)
DROP_IN = tuple(name for name, kind in KINDS.items() if not kind.needs and name not in _SHORTER)
"""Kinds without parameters of their own, whose output is as long as the queries."""


def kind_named(name: str) -> Kind:
    """The kind of that name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]


def _check(
    name: str, kind: Kind, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, options: dict[str, Any]
) -> None:
    check_floats(q=q, k=k, v=v)
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{label} must have shape (batch, heads, length, features), none 0, got {tuple(x.shape)}")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q, k and v must agree in batch and heads, q and k in features, k and v in length, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; repeat grouped key-value heads first"
        )
    memory = name == "transformer_xl"
    if q.shape[2] != k.shape[2] and not memory and (causal or not kind.cross):
        allowed = ", ".join(n for n, other in KINDS.items() if other.cross)
        raise ValueError(
            f"{name}{', causal,' if causal else ''} needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}; "
            f"attention across sequences, not causal, is taken by {allowed}"
        )
    if causal and not kind.causal:
        can = ", ".join(n for n, other in KINDS.items() if other.causal)
        raise ValueError(f"{name} mixes all positions and cannot be causal; causal kinds are {can}")
    unknown = [option for option in options if option not in kind.options]
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(kind.options) or 'none'}")
    missing = [option for option in kind.needs if options.get(option) is None]
    if missing:
        raise ValueError(
            f"{name} has parameters of its own and needs {' and '.join(missing)}; EfficientAttention and "
            "convert_attention hold them for you"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be a boolean tensor, True where padded, got {mask.dtype}")
        if mask.shape != (k.shape[0], k.shape[2]):
            raise ValueError(f"key_padding_mask must have shape {(k.shape[0], k.shape[2])}, got {tuple(mask.shape)}")
        if not torch.compiler.is_compiling() and bool(mask.all(-1).any()):
            raise ValueError("key_padding_mask leaves a sample without a single key; drop that sample")


def efficient_attention(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S E"],
    kind: str = "longformer",
    *,
    causal: bool = False,
    key_padding_mask: Bool[Tensor, "B S"] | None = None,
    scale: float | None = None,
    **options: Any,
) -> Float[Tensor, "B H L E"]:
    """Attention of one of the kinds that Fournier et al. survey (ACM Computing Surveys 2023, section 4).

    Half precision is computed in float32 inside, where sums, exponents and inverses need it, and returned in the dtype
    of ``v``. Kinds that are for self-attention alone give 0 at padded positions. Nothing is dropped out.

    Args:
        q: queries.
        k: keys; grouped heads must be repeated by the caller, rotary embeddings applied.
        v: values.
        kind: one of ``KINDS``; the options of each are those of the function of that name in this package.
        causal: see no later position.
        key_padding_mask: True where padded.
        scale: of the scores, 1 / sqrt(D) by default; kinds that do not scale ignore it (``linear``, ``rfa``,
            ``efficient``, ``reformer``, ``aft``).
        options: of the kind.

    Returns:
        Outputs in the dtype of ``v``, as many as queries (``funnel``: one for each ``stride`` of them).

    Raises:
        ValueError: for an unknown kind or option, shapes that do not fit, an empty sequence, causal use of a kind that
            mixes all positions, cross-attention of one that cannot, a length beyond a fixed maximum, a sample that is
            all padding.
        TypeError: for tensors that are not floating-point, or a mask that is not boolean.

    Example:
        >>> q = k = v = torch.randn(2, 4, 300, 16)
        >>> efficient_attention(q, k, v, "longformer", window=64, global_tokens=[0]).shape
        torch.Size([2, 4, 300, 16])
    """
    chosen = kind_named(kind)
    options = {name: value for name, value in options.items() if value is not None}
    _check(kind, chosen, q, k, v, causal, key_padding_mask, options)
    wide = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    keep = None if key_padding_mask is None else ~key_padding_mask
    if "scale" in inspect.signature(chosen.work).parameters:
        options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    q_wide = q.to(wide)
    k_wide = q_wide if k is q else k.to(wide)
    values = v.to(wide)
    if keep is not None:
        # what stands in padding, NaN included, must not reach a sum
        here = ~keep[:, None, :, None]
        if not chosen.cross and k.shape[2] == q.shape[2]:
            q_wide = q_wide.masked_fill(here, 0)
        k_wide = q_wide if k is q else k_wide.masked_fill(here, 0)
        values = values.masked_fill(here, 0)
    # an autocast region would take the sums back to half precision
    with autocast_off(q):
        y = chosen.work(q_wide, k_wide, values, causal=causal, keep=keep, **options)
    if keep is not None and not chosen.cross and y.shape[2] == keep.shape[1]:
        y = y.masked_fill(~keep[:, None, :, None], 0)
    return y.to(v.dtype)


def attention_pattern(kind: str, n: int, *, causal: bool = False, **options: Any) -> Bool[Tensor, "n n"]:
    """Which query (row) may look at which key (column) in a kind that is a pattern.

    Raises:
        ValueError: for a kind that is not a pattern, or causal use of one that cannot be.

    Example:
        >>> attention_pattern("longformer", 4, window=2, causal=True).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    rule, at = _rule(kind, n, causal, options), torch.arange(n)
    return rule(at[:, None], at[None])


def _rule(kind: str, n: int, causal: bool, options: dict[str, Any]) -> patterns.Rule:
    if kind not in patterns.PATTERNS:
        raise ValueError(f"kind must be a pattern, one of {', '.join(patterns.PATTERNS)}, got {kind!r}")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if causal and not KINDS[kind].causal:
        raise ValueError(f"{kind} cannot be causal")
    unknown = [option for option in options if option not in KINDS[kind].options]
    if unknown:
        raise ValueError(f"{kind} has no option {unknown[0]!r}; it has {', '.join(KINDS[kind].options)}")
    return _pattern(patterns.PATTERNS[kind], n, causal, options).allowed


def flex_block_mask(
    kind: str, n: int, *, causal: bool = False, device: torch.device | str = "cpu", **options: Any
) -> Any:
    """The pattern as a block mask for ``torch.nn.attention.flex_attention``, which skips empty blocks on a GPU.

    Example:
        >>> mask = flex_block_mask("longformer", 256, window=32)
        >>> type(mask).__name__
        'BlockMask'
    """
    from torch.nn.attention.flex_attention import create_block_mask

    rule = _rule(kind, n, causal, options)
    return create_block_mask(lambda b, h, i, j: rule(i, j), None, None, n, n, device=str(device))


# ----------------------------------------------------------------- transformers


def register_efficient_attention(kind: str, name: str | None = None, **options: Any) -> str:
    """Make ``model.set_attn_implementation("tg_<kind>")`` work in transformers, with these options.

    For models that go through transformers' attention interface (BERT, ViT, GPT-2, Llama, …), with padding masks.
    Pretrained weights stand for softmax over all positions: patterns keep most of it, kernels need training. Refused
    with a ``ValueError`` at the first forward pass: causal use of a kind that cannot, decoding with a key-value cache
    (pass ``use_cache=False``), masks other than padding, sliding windows, sinks, soft caps and position biases.
    ``reformer`` uses queries as keys. Dropout of attention weights has no effect.

    Args:
        kind: one of ``DROP_IN``; others have parameters, for which there is ``convert_attention``.
        name: ``"tg_" + kind`` by default.
        options: of the kind.

    Returns:
        The name.

    Raises:
        ValueError: for a kind with parameters of its own, or an unknown option.

    Example:
        >>> register_efficient_attention("longformer", window=64)
        'tg_longformer'
    """
    chosen = kind_named(kind)
    if kind not in DROP_IN:
        why = f"has parameters ({', '.join(chosen.needs)}): use convert_attention" if chosen.needs else "is shorter"
        raise ValueError(f"{kind} cannot be registered, it {why}; drop-in kinds are {', '.join(DROP_IN)}")
    unknown = [option for option in options if option not in chosen.options]
    if unknown:
        raise ValueError(f"{kind} has no option {unknown[0]!r}; it has {', '.join(chosen.options) or 'none'}")
    name = f"tg_{kind}" if name is None else name

    def attend(q: Tensor, k: Tensor, v: Tensor, module: Any, **shared: Any) -> Tensor:
        _warn_of_softmax_weights(module, kind)
        return efficient_attention(q, q if kind == "reformer" else k, v, kind, **shared, **options)

    register_attention(name, kind, attend)
    return name


def register_efficient_attentions() -> tuple[str, ...]:
    """Register every kind of ``DROP_IN`` with its defaults, as ``tg_<kind>``.

    Example:
        >>> "tg_performer" in register_efficient_attentions()
        True
    """
    return tuple(register_efficient_attention(kind) for kind in DROP_IN)


def _warn_of_softmax_weights(module: Any, kind: str) -> None:
    origin = getattr(getattr(module, "config", None), "_name_or_path", "")
    if origin and not module.training and kind not in patterns.PATTERNS:
        warnings.warn(
            f"{kind} attention runs on the weights of {origin!r}, which were trained for softmax attention; train the "
            "model further, or use a pattern",
            stacklevel=2,
        )
