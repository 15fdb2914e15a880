"""Composition scores of all pairs of heads: from triangles of factors against products pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from torchgraft.experiments import Case
from torchgraft.language.talking_heads import HeadMatrices, composition_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Query composition of all pairs of heads"
OURS = "torchgraft.language.talking_heads.composition_scores, by component"
PEER = "products of whole matrices; TransformerLens' all_composition_scores where version 2 is installed"
DENSE, LENS = "products of whole matrices", "TransformerLens"

Work = Callable[[], Any]


def _matrices(layers: int, heads: int, width: int, head: int, device: str) -> HeadMatrices:
    draw = torch.Generator().manual_seed(0)
    q, k, v, o = (torch.randn(layers, heads, width, head, generator=draw).to(device) for _ in range(4))
    return HeadMatrices(q, k, v, o.mT.contiguous(), rotary=False)


@torch.no_grad()
def dense_scores(m: HeadMatrices) -> torch.Tensor:
    """``||W1 W2|| / (||W1|| ||W2||)`` with every W written out, (L, H, L, H), of all pairs as in TransformerLens."""
    first, second = m.v @ m.o, m.q @ m.k.mT
    norms = [w.flatten(2).norm(dim=-1) for w in (first, second)]
    rows = [(w @ second).flatten(2).norm(dim=-1) / norms[1] for w in first.flatten(0, 1)]
    return torch.stack(rows).unflatten(0, first.shape[:2]) / norms[0][..., None, None]


def _lens(m: HeadMatrices) -> Work:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    layers, heads, width, head = m.shape
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=layers, d_model=width, n_ctx=8, d_head=head, n_heads=heads, d_vocab=8, attn_only=True,
            normalization_type=None, init_weights=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            for name, w in (("W_Q", m.q), ("W_K", m.k), ("W_V", m.v), ("W_O", m.o)):
                getattr(block.attn, name).copy_(w[layer])
    return torch.no_grad()(lambda: model.all_composition_scores("Q"))


def _pair(peer: str, layers: int, heads: int, width: int, head: int, device: str) -> tuple[Work, Work]:
    m = _matrices(layers, heads, width, head, device)
    other = _lens(m) if peer == LENS else partial(dense_scores, m)
    return partial(composition_scores, m, ["q"]), other


def cases(quick: bool, device: str) -> list[Case]:
    """Growing models; ours gives a score for each component, the peers one for each pair."""
    sizes = [(2, 2, 16, 4)] if quick else [(4, 4, 256, 64), (6, 6, 384, 64), (6, 8, 512, 64)]
    lens = not quick and device == "cpu" and find_spec("transformer_lens") is not None
    return [
        Case(
            dict(zip(("layers", "heads", "width", "head"), size, strict=True)),
            peer_name=peer,
            make=partial(_pair, peer, *size, device),
        )
        for peer in ([DENSE, LENS] if lens else [DENSE])
        for size in sizes
    ]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Seconds against the number of pairs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    marks = {DENSE: ("s--", "#000000"), LENS: ("^--", "#0072B2")}
    for peer, (mark, colour) in marks.items():
        rows = [row for row in record["cases"] if row["peer"] == peer]
        pairs = [(row["size"]["layers"] * row["size"]["heads"]) ** 2 for row in rows]
        if rows:
            axes.loglog(pairs, [row["peer_s"] for row in rows], mark, color=colour, label=peer)
        if peer == DENSE:
            axes.loglog(pairs, [row["ours_s"] for row in rows], "o-", color="#D55E00", label="ours, by component")
    axes.set(xlabel="pairs of heads", ylabel="seconds")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.set_title(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"composition": figure}
