"""Composition scores: how much of what one head writes another reads, matrix by matrix or component by component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchgraft.language.talking_heads.weights import HeadMatrices, head_matrices, written

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Kind = Literal["q", "k", "v"]
Reading = Literal["one-sided", "product"]
KINDS: tuple[Kind, ...] = ("q", "k", "v")
TITLES = {"q": "query", "k": "key", "v": "value"}
Head = tuple[int, int]


def _triangle(x: Tensor) -> Tensor:
    """R of a QR decomposition, (..., d, d): ``x`` up to an orthogonal turn on the left."""
    return torch.linalg.qr(x, mode="r").R


def reading_factors(matrices: HeadMatrices, kind: Kind, reading: Reading | None = None) -> Float[Tensor, "L H D d"]:
    """Per head a D x d matrix of the same row norms as the D x D one that the head reads with.

    ``W_Q W_K^T`` for queries, its transpose for keys, ``W_V W_O`` for values: an orthogonal turn of the d columns
    changes no norm, so the second factor can be replaced by its triangle. One-sided, ``W_Q`` and ``W_K`` themselves.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be 'q', 'k' or 'v', got {kind!r}")
    if reading not in (None, "one-sided", "product"):
        raise ValueError(f"reading must be 'one-sided', 'product' or None, got {reading!r}")
    if reading is None:
        reading = "one-sided" if matrices.rotary else "product"
    if reading == "one-sided" and kind != "v":
        return matrices.q if kind == "q" else matrices.k
    first, second = {
        "q": (matrices.q, matrices.k),
        "k": (matrices.k, matrices.q),
        "v": (matrices.v, matrices.o.mT),
    }[kind]
    return first @ _triangle(second).mT


@dataclass(frozen=True)
class Channel:
    """One component of a writer and a reader of it.

    Attributes:
        kind: what the reader makes of it: queries (``q``), keys (``k``) or values (``v``).
        writer, reader: (layer, head).
        component: of the writer's OV matrix, 0 is the strongest.
        score: between 0 and 1.
        z: how many standard deviations above the mean of all components that this reader could read.
        strength: the component's singular value.
    """

    kind: str
    writer: Head
    component: int
    reader: Head
    score: float
    z: float
    strength: float


@dataclass(frozen=True)
class ChannelTable:
    """Scores of every component of every head with every later head.

    Attributes:
        scores: by kind, (L, H, d, L, H): writer's layer, head and component, reader's layer and head; nan where the
            reader is not later. Without decomposition d is 1.
        strength: (L, H, d), singular values; without decomposition the Frobenius norm.
    """

    scores: Mapping[Kind, Tensor]
    strength: Tensor

    def z(self, kind: Kind) -> Tensor:
        """Scores against each reader's own: less the mean, divided by the standard deviation, over all it could read.

        Readers of the first layer that has any have few, those later have many; a reader with fewer than two gives nan.
        """
        found = self._of(kind)
        rows = found.flatten(0, 2)
        there = ~rows.isnan()
        count = there.sum(0)
        mean = rows.nansum(0) / count
        deviation = ((rows - mean).square().nansum(0) / (count - 1)).sqrt()
        return (found - mean) / deviation

    def _of(self, kind: Kind) -> Tensor:
        if kind not in self.scores:
            raise ValueError(f"kind must be one of {', '.join(self.scores)}, got {kind!r}")
        return self.scores[kind]

    def top(self, k: int = 20, kind: Kind | None = None, by: Literal["z", "score"] = "z") -> list[Channel]:
        """The k channels that stand out most.

        Raises:
            ValueError: for an unknown kind, or k below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        found: list[Channel] = []
        for each in self.scores if kind is None else [kind]:
            scores, z = self._of(each), self.z(each)
            order = (z if by == "z" else scores).nan_to_num(-torch.inf).flatten()
            for place in order.topk(min(k, int((~scores.isnan()).sum()))).indices.tolist():
                l1, h1, c, l2, h2 = (int(i) for i in torch.unravel_index(torch.tensor(place), scores.shape))
                at = (l1, h1, c, l2, h2)
                found.append(
                    Channel(
                        each, (l1, h1), c, (l2, h2), scores[at].item(), z[at].item(), self.strength[l1, h1, c].item()
                    )
                )
        return sorted(found, key=lambda channel: -getattr(channel, by))[:k]

    def to_pandas(self, k: int = 1000) -> pandas.DataFrame:
        """The top k channels as a table."""
        import pandas as pd

        return pd.DataFrame([vars(channel) for channel in self.top(k)])

    def heatmap(self, kind: Kind = "q", by: Literal["z", "score"] = "z") -> Figure:
        """Writers against readers, the greatest value over the writer's components; the five greatest are named.

        Colours end at the greatest but one in a thousand, so that a few outliers do not leave the rest dark. A row that
        is bright throughout is a direction that all read, rather than a channel.
        """
        from matplotlib.figure import Figure

        table = self.z(kind) if by == "z" else self._of(kind)
        layers, heads = table.shape[:2]
        best = table.nan_to_num(-torch.inf).amax(2).flatten(2).flatten(0, 1)
        there = best[best > -torch.inf]
        figure = Figure(figsize=(7.4, 6.4), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(
            best.masked_fill(best == -torch.inf, torch.nan).numpy(), cmap="viridis", aspect="auto",
            interpolation="none", vmax=there.quantile(0.999).item() if len(there) else None,
        )  # fmt: skip
        figure.colorbar(shown, label="greatest z" if by == "z" else "greatest score", extend="max")
        lines = []
        for rank, place in enumerate(best.flatten().topk(min(5, len(there))).indices.tolist(), 1):
            writer, reader = divmod(place, best.shape[1])
            axes.plot(reader, writer, "o", markersize=10, markerfacecolor="none", markeredgecolor="#D55E00")
            axes.annotate(
                str(rank), (reader, writer), xytext=(6, 4), textcoords="offset points", color="white", fontsize=9,
                bbox={"facecolor": "#D55E00", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
            lines.append("{}: {}.{} to {}.{}".format(rank, *divmod(writer, heads), *divmod(reader, heads)))
        # below the diagonal nothing is drawn
        axes.text(0.02, 0.02, "\n".join(lines), transform=axes.transAxes, fontsize=9, va="bottom")
        marks = [heads * layer + (heads - 1) / 2 for layer in range(0, layers, max(1, layers // 10))]
        names = [str(layer) for layer in range(0, layers, max(1, layers // 10))]
        axes.set_xticks(marks, names)
        axes.set_yticks(marks, names)
        axes.set(xlabel="reader: layer, its heads in order", ylabel="writer: layer, its heads in order")
        axes.set_title(f"{TITLES[kind]} composition (numbered: the greatest, layer.head)", fontsize=10)
        return figure


@torch.no_grad()
def composition_scores(
    model: nn.Module | HeadMatrices,
    kinds: Sequence[Kind] = KINDS,
    *,
    decomposed: bool = True,
    readers: Sequence[Head] | None = None,
    reading: Reading | None = None,
) -> ChannelTable:
    """Composition scores of all pairs of heads, from weights alone (sections 2.2 and 3 of the paper).

    Of a component with write direction w, and a reader with matrix W: ``||w W|| / ||W||``, in 0..1, where a random
    direction has ``1 / sqrt(D)`` on average (root mean square). Of whole matrices: ``||W1 W2|| / (||W1|| ||W2||)``
    (Elhage et al., 2021), which is the mean of the components' scores, weighted by their squared singular values.

    Heads of one layer do not compose, and are left out. Heads that share keys (grouped queries) tie in what they read
    with those alone.

    Rotary positions put a turn between ``W_Q`` and ``W_K^T`` that depends on the distance of the two tokens, so that
    there is no one ``W_Q W_K^T``. What one side takes in, ``||w W_Q|| / ||W_Q||``, does not change with the turn, which
    is orthogonal: this is what is scored there.

    Args:
        model: as in ``head_matrices``, or its result.
        kinds: which compositions.
        decomposed: by component of the writer; otherwise by matrix, the baseline that the paper finds noisy.
        readers: (layer, head) of those wanted; the rest of the table is nan.
        reading: of queries and keys. ``product`` reads with ``W_Q W_K^T``, with rotary positions that of distance 0;
            ``one-sided`` with ``W_Q`` or ``W_K``. The default is ``one-sided`` for models with rotary positions and
            ``product``, the paper's, for others.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for an unknown kind or reading, no kinds, weights that are not finite, a head that there is not, or
            a reader in the first layer.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> table = composition_scores(toy_model()[0])
        >>> table.scores["q"].shape, len(table.top(5))
        (torch.Size([2, 2, 16, 2, 2]), 5)
    """
    matrices = model if isinstance(model, HeadMatrices) else head_matrices(model)
    if not kinds:
        raise ValueError("kinds must be some of 'q', 'k' and 'v', got none")
    layers, heads, _, components = matrices.shape
    wanted = {layer: list(range(heads)) for layer in range(1, layers)}
    if readers is not None:
        wanted = {}
        for layer, head in readers:
            matrices.check(layer, head)
            if layer == 0:
                raise ValueError(f"readers must be later than the first layer, got {(layer, head)}")
            wanted.setdefault(layer, []).append(head)
    parts = written(matrices)
    scores: dict[Kind, Tensor] = {}
    for kind in kinds:
        factors = reading_factors(matrices, kind, reading)
        found = torch.full((layers, heads, components, layers, heads), torch.nan)
        for layer, some in wanted.items():
            reader = factors[layer, some]
            # (writers and components, D) times (D, readers and d): one product for a layer of readers
            taken = parts.write[:layer].flatten(0, 2) @ reader.movedim(0, 1).flatten(1)
            norms = taken.unflatten(1, (len(some), -1)).norm(dim=-1) / reader.flatten(1).norm(dim=1)
            found[:layer, :, :, layer, some] = norms.unflatten(0, (layer, heads, components)).cpu().float()
        scores[kind] = found
    strength = parts.strength.cpu().float()
    if decomposed:
        return ChannelTable(scores, strength)
    weights = strength.square() / strength.square().sum(2, keepdim=True)
    whole = {
        kind: (found.square() * weights[..., None, None]).sum(2, keepdim=True).sqrt() for kind, found in scores.items()
    }
    return ChannelTable(whole, strength.norm(dim=2, keepdim=True))


def random_score(width: int) -> float:
    """Root mean square of the score of a random direction: ``1 / sqrt(D)``."""
    return width**-0.5
