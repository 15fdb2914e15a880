"""Directions of change, found without labels (UADM), and the filter that keeps those which leave the class alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from torchgraft.vision.natra.generator import GeneratorAdapter
from torchgraft.vision.natra.inversion import InversionResult

Method = Literal["pca", "sefa", "feature_pca", "random"]


def logits_of(model: Callable[..., Any], images: Tensor) -> Float[Tensor, "B N"]:
    """What a classifier says: its tensor, or ``.logits`` of its output.

    Raises:
        TypeError: when there are no logits (B, classes).
        FloatingPointError: when they are not finite, as where training diverged.
    """
    out = model(images)
    out = out if isinstance(out, Tensor) else getattr(out, "logits", out)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(images):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"the classifier must return logits ({len(images)}, classes), or .logits of that shape; {got}")
    if not bool(out.isfinite().all()):
        raise FloatingPointError("the classifier's logits are NaN or infinite; look at its weights and input range")
    return out


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions with their natural size and how far one may go.

    Attributes:
        vectors: (K, L, d) of codes, or (K, c, ...) of feature maps at the split; unit norm.
        scales: (K,) standard deviation of samples along each.
        radii: (K,) largest amount, in standard deviations.
        space: what the vectors are added to.
        keep_rates: (K,) share of edits that kept the label in the filter, or None.
    """

    vectors: Float[Tensor, "K ..."]
    scales: Float[Tensor, " K"]
    radii: Float[Tensor, " K"]
    space: Literal["code", "feature"] = "code"
    keep_rates: Float[Tensor, " K"] | None = None

    def __len__(self) -> int:
        return len(self.scales)

    def _chosen(self, rows: Tensor, **changes: Any) -> Directions:
        rates = None if self.keep_rates is None else self.keep_rates[rows]
        found = Directions(self.vectors[rows], self.scales[rows], self.radii[rows], self.space, rates)
        return dataclasses.replace(found, **changes)

    def offset(self, amounts: Float[Tensor, "B K"]) -> Float[Tensor, "B ..."]:
        """Sum of ``a_k sigma_k v_k``."""
        if amounts.ndim != 2 or amounts.shape[1] != len(self):
            raise ValueError(f"amounts must have shape (B, {len(self)}), got {tuple(amounts.shape)}")
        if not bool(amounts.isfinite().all()):
            raise ValueError("amounts must be finite, got NaN or infinity")
        flat = (amounts * self.scales) @ self.vectors.flatten(1)
        return flat.view(-1, *self.vectors.shape[1:])

    @torch.no_grad()
    def filter(
        self,
        adapter: GeneratorAdapter,
        classifier: Callable[..., Any],
        store: InversionResult,
        labels: Int64[Tensor, " B"] | None = None,
        tau: float = 0.95,
        *,
        radius: float = 3.0,
        min_radius: float = 0.25,
        points: int = 4,
        bisections: int = 5,
    ) -> Directions:
        """Keep what leaves the class alone: the automatic filter of UADM (reconstructed).

        A direction holds at radius r when the label of at least ``tau`` of the edits by ``points`` amounts spread
        evenly over -r..r is that of the unedited reconstruction. The radius is halved in by bisection until it holds;
        a direction that does not hold at ``min_radius`` is dropped. Each direction is judged alone: where several are
        moved together fewer labels hold than ``tau`` says.

        Args:
            adapter: the generator.
            classifier: an independent reference, or your own oracle: images to logits. Not the classifier under
                training, whose mistakes are the very edits that training needs; and not one that fails on the variation
                you want, for it will drop that variation.
            store: inverted images that serve nothing else.
            labels: if given, only images whose reconstruction the reference gets right have a vote.
            tau: share of labels to hold.
            radius, min_radius: largest and smallest radius, in standard deviations.
            points: amounts a direction, an even number (zero is left out).
            bisections: how finely the radius is sought.

        Returns:
            The directions that passed, with their radii and keep rates.

        Raises:
            ValueError: when no direction passes (with a table), when no image has a vote, or for settings that cannot
                be.
            TypeError: when the classifier returns no logits.
        """
        if not 0 < tau <= 1 or not 0 < min_radius <= radius or points < 2 or points % 2:
            raise ValueError(
                f"want 0 < tau <= 1, 0 < min_radius <= radius and an even number of points, got tau={tau}, "
                f"min_radius={min_radius}, radius={radius}, points={points}"
            )
        if labels is not None:
            if len(labels) != len(store):
                raise ValueError(f"{len(labels)} labels do not belong to {len(store)} images")
            labels = labels[store.kept]
        store = store[store.kept]
        own = logits_of(classifier, store.recon).argmax(1) if len(store) else torch.zeros(0, dtype=torch.long)
        if labels is not None:
            right = own == labels
            store, own = store[right], own[right]
        if not len(store):
            raise ValueError("no image has a vote: none is kept, or the reference is wrong on every reconstruction")
        grid = torch.linspace(-1, 1, points + 1, device=own.device)
        grid = grid[grid != 0]

        every = torch.arange(len(store), device=own.device).repeat(points)
        spread = grid.repeat_interleave(len(store))[:, None]

        def rate(k: int, r: float) -> float:
            alone = self._chosen(torch.tensor([k], device=own.device))
            moved = edit(adapter, store[every], alone, (r * spread).to(alone.scales))
            return logits_of(classifier, moved).argmax(1).eq(own[every]).float().mean().item()

        radii, rates, rows = [], [], []
        for k in range(len(self)):
            best, seen = _widest(lambda r, k=k: rate(k, r), tau, min_radius, radius, bisections)  # type: ignore[misc]
            rows.append(f"{k:4d}  {float(self.scales[k]):8.3f}  {best:6.2f}  {seen:9.3f}")
            radii.append(best)
            rates.append(seen)
        kept = torch.tensor([r > 0 for r in radii])
        if not bool(kept.any()):
            table = "\n".join(["   k     scale  radius  keep rate", *rows])
            raise ValueError(
                f"no direction keeps the label of {tau:g} of the edits at min_radius={min_radius:g}; lower tau or "
                f"min_radius, or give a better reference classifier\n{table}"
            )
        like = self.scales
        found = self._chosen(kept.nonzero()[:, 0].to(like.device))
        return dataclasses.replace(found, radii=like.new_tensor(radii)[kept], keep_rates=like.new_tensor(rates)[kept])


def _widest(
    rate: Callable[[float], float], tau: float, smallest: float, largest: float, bisections: int
) -> tuple[float, float]:
    """Largest radius found that holds, and its rate; radius 0 and the rate at ``smallest`` when none does."""
    seen = rate(largest)
    if seen >= tau:
        return largest, seen
    seen = rate(smallest)
    if seen < tau:
        return 0.0, seen
    low, high = smallest, largest
    for _ in range(bisections):
        middle = (low + high) / 2
        found = rate(middle)
        if found >= tau:
            low, seen = middle, found
        else:
            high = middle
    return low, seen


def _latent_weights(adapter: GeneratorAdapter, names: Sequence[str] | None) -> list[Tensor]:
    """Matrices (out, d) of the layers that act on a code."""
    owners = adapter.owners
    parameters = {name: p for owner in owners for name, p in owner.named_parameters()}
    if names is not None:
        unknown = [name for name in names if name not in parameters]
        if unknown:
            raise ValueError(f"weights {unknown} are not parameters of the generator")
        chosen: list[Tensor] = [parameters[name] for name in names]
    else:
        d = adapter.features
        takes = [p for m in (owners[0].modules() if owners else ()) for p in [_input_last(m)] if p.shape[-1] == d]
        chosen = takes if adapter.layers > 1 else takes[:1]
        if not chosen:
            raise ValueError(f"no layer of the generator takes {d} features; name its weights with weights=")
    return [p.detach().reshape(-1, p.shape[-1]) if p.ndim != 2 else p.detach() for p in chosen]


def _input_last(module: nn.Module) -> Tensor:
    """A layer's weight with its input axis last; nothing for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
        return torch.zeros(0)
    if isinstance(module, nn.ConvTranspose2d):
        return weight.permute(1, 2, 3, 0)
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1)


def _signed(vectors: Tensor) -> Tensor:
    """The largest entry of each row positive, so that a direction has one sign everywhere."""
    top = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * top.sign()


@torch.no_grad()
def discover_directions(
    adapter: GeneratorAdapter,
    method: Method = "pca",
    k: int = 10,
    *,
    layers: Sequence[int] | None = None,
    samples: int = 10_000,
    weights: Sequence[str] | None = None,
    radius: float = 3.0,
    seed: int = 0,
) -> Directions:
    """Find directions of the generator without labels (UADM).

    Args:
        adapter: the generator.
        method: ``pca``: principal axes of sampled codes (as GANSpace); ``sefa``: top right singular vectors of the
            first weights that act on a code, stacked over layers (as SeFa); ``feature_pca``: principal axes of feature
            maps at the split; ``random``: a control.
        k: how many.
        layers: which codes may move; all unless given. Not for ``feature_pca``.
        samples: of codes or feature maps.
        weights: names of the generator's parameters for ``sefa``, each (out, d); found by their input size otherwise.
        radius: largest amount of each, in standard deviations, until ``Directions.filter`` sets them.
        seed: of the samples and of ``random``.

    Returns:
        Directions of unit norm; scales are standard deviations of the samples along them.

    Raises:
        ValueError: for an unknown method, more directions than there are, layers that do not exist, weights that are
            not found, and ``feature_pca`` without a split.

    Example:
        >>> decoder = nn.Sequential(nn.Linear(4, 64), nn.Unflatten(1, (1, 8, 8))).eval()
        >>> discover_directions(GeneratorAdapter(decoder, (4,)), "sefa", k=2).vectors.shape
        torch.Size([2, 1, 4])
    """
    if method not in ("pca", "sefa", "feature_pca", "random"):
        raise ValueError(f"method must be 'pca', 'sefa', 'feature_pca' or 'random', got {method!r}")
    every = list(range(adapter.layers))
    moved = every if layers is None else list(layers)
    if not moved or any(layer not in every for layer in moved) or (method == "feature_pca" and layers is not None):
        raise ValueError(f"layers must be some of {every}, and are not for feature_pca, got {layers}")
    codes = adapter.sample_codes(samples, seed)
    if method == "feature_pca":
        cloud = torch.cat([adapter.g1(part) for part in codes.split(256)])
        shape, taken = cloud.shape[1:], cloud.flatten(1)
    else:
        shape, taken = codes.shape[1:], codes[:, moved].flatten(1)
    most = min(taken.shape[1], samples - 1) if method in ("pca", "feature_pca") else taken.shape[1]
    most = min(most, adapter.features) if method == "sefa" else most
    if not 1 <= k <= most:
        raise ValueError(f"k must lie in 1..{most} for {method!r} here, got {k}")
    centred = (taken - taken.mean(0)).double()
    if method in ("pca", "feature_pca"):
        vectors = torch.linalg.svd(centred, full_matrices=False).Vh[:k]
    elif method == "sefa":
        stacked = torch.cat(_latent_weights(adapter, weights)).double()
        one = torch.linalg.svd(stacked, full_matrices=False).Vh[:k]
        vectors = one.repeat(1, len(moved)) / len(moved) ** 0.5
    else:
        noise = torch.randn(k, taken.shape[1], generator=torch.Generator().manual_seed(seed)).to(centred)
        vectors = noise / noise.norm(dim=1, keepdim=True)
    vectors = _signed(vectors)
    scales = (centred @ vectors.T).std(0).to(codes.dtype)
    vectors = vectors.to(codes.dtype)
    if method != "feature_pca":
        whole = vectors.new_zeros(k, *shape)
        whole[:, moved] = vectors.view(k, len(moved), -1)
        vectors = whole
    space: Literal["code", "feature"] = "feature" if method == "feature_pca" else "code"
    return Directions(vectors.reshape(k, *shape), scales, torch.full_like(scales, radius), space)


def edit(
    adapter: GeneratorAdapter, store: InversionResult, directions: Directions, amounts: Float[Tensor, "B K"]
) -> Float[Tensor, "B C H W"]:
    """Images of codes moved by ``sum_k a_k sigma_k v_k``; gradients reach the amounts.

    All codes of an image move by the same offset. Amounts of zero give the reconstruction. Nothing is clamped: clamp
    for display only.

    Args:
        adapter: the generator.
        store: the inverted images to edit.
        directions: of codes or of feature maps.
        amounts: in standard deviations.

    Raises:
        ValueError: for amounts of another shape.
    """
    if len(amounts) != len(store):
        raise ValueError(f"amounts are for {len(amounts)} images, the store has {len(store)}")
    moved = directions.offset(amounts)
    if directions.space == "feature":
        return adapter.g2(adapter.mixed_features(store.codes, store.alphas) + moved, store.codes[:, 0])
    return adapter.decode_mixed(store.codes + moved[:, None], store.alphas)
