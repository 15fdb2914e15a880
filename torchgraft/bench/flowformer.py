"""Flow-Attention against softmax attention (SDPA) and against its own causal formula as published."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchgraft.experiments import Case
from torchgraft.ops.flow_attention import flow_attention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Flow-Attention against SDPA and the published causal formula"
OURS = "torchgraft.ops.flow_attention"
PEER = "torch SDPA; the causal formula as published"

HEADS, FEATURES = 8, 32
SDPA, PUBLISHED = "SDPA", "published causal formula"


def published_causal(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """The causal equations computed as published: a state of D x E for every token, then its cumulative sum.

    Written from the equations; equal to ``Flow_Attention_Causal`` of thuml/Flowformer without its projections.
    """
    q, k = q.sigmoid(), k.sigmoid()
    n = torch.arange(1, q.shape[2] + 1, dtype=q.dtype, device=q.device)
    into = n / ((q + eps) * (k.cumsum(2) + eps)).sum(-1)
    out = n / ((k + eps) * (q.cumsum(2) + eps)).sum(-1)
    sink = ((q + eps) * ((k * out[..., None]).cumsum(2) + eps)).sum(-1) / n
    source = (((k + eps) * ((q * into[..., None]).cumsum(2) + eps)).sum(-1) / n).clamp(-1, 1).exp()
    competition = source / source.cumsum(-1) * n
    states = (k[..., :, None] * (v * competition[..., None])[..., None, :]).cumsum(2)
    return ((q * (into / n)[..., None])[..., None, :] @ states).squeeze(-2) * sink.sigmoid()[..., None]


def _work(attend: Callable[..., Tensor], length: int, backward: bool, device: str) -> Callable[[], object]:
    q, k, v = torch.randn(3, 1, HEADS, length, FEATURES, device=device).unbind()
    leaves = [x.clone().requires_grad_(backward) for x in (q, k, v)]

    def forward() -> object:
        with torch.no_grad():
            return attend(*leaves)

    def both() -> object:
        return torch.autograd.grad(attend(*leaves).sum(), leaves)

    return both if backward else forward


def _case(length: int, causal: bool, backward: bool, peer: str, device: str) -> Case:
    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flow_attention(q, k, v, is_causal=causal)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    other = sdpa if peer == SDPA else published_causal
    size = {"length": length, "causal": causal, "pass": "forward+backward" if backward else "forward"}
    return Case(
        size,
        peer_name=peer,
        make=lambda: (_work(ours, length, backward, device), _work(other, length, backward, device)),
    )


def cases(quick: bool, device: str) -> list[Case]:
    """SDPA at every length, causal and not; the published formula where its states fit into memory."""
    lengths = [64, 128] if quick else [256, 512, 1024, 2048, 4096, 8192, 16384]
    passes = [True] if quick else [False, True]
    found = [
        _case(length, causal, backward, SDPA, device)
        for causal, backward, length in itertools.product([False, True], passes, lengths)
    ]
    return found + [
        _case(length, True, backward, PUBLISHED, device)
        for backward, length in itertools.product(passes, [n for n in lengths if n <= 8192])
    ]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time and peak memory against length, forward+backward, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, causal in enumerate([False, True]):
        chosen = [c for c in record["cases"] if c["size"]["causal"] is causal and "+" in c["size"]["pass"]]
        for row, (key, scale, label) in enumerate([("{}_s", 1e3, "milliseconds"), ("peak_bytes_{}", 2**-20, "MiB")]):
            ax = axes[row][column]
            for peer, style in ((SDPA, "s--"), (PUBLISHED, "^:")):
                rows = [c for c in chosen if c["peer"] == peer]
                xs = [c["size"]["length"] for c in rows]
                if peer == SDPA:
                    ax.loglog(xs, [c[key.format("ours")] * scale for c in rows], "o-", color="#0072B2", label="flow")
                if rows:
                    color = "#D55E00" if peer == SDPA else "#555555"
                    ax.loglog(xs, [c[key.format("peer")] * scale for c in rows], style, color=color, label=peer)
            ax.set_ylabel(label if row == 0 else f"peak memory, {label}")
            ax.set_title(("causal" if causal else "non-causal") if row == 0 else "")
            ax.grid(True, which="major", alpha=0.3)
            ax.legend(frameon=False)
            if row:
                ax.set_xlabel("length")
    where = record["environment"]
    figure.suptitle(
        f"forward+backward, batch 1, {HEADS} heads of {FEATURES}, float32, "
        f"{record['device']}, threads: {where['threads']}"
    )
    return {"flowformer": figure}
