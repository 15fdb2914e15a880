"""What an attacker gets: from the rows of a stolen model, from a few known texts, and from counting.

The attacker of the first holds the adapted model and the public one it was made from; that of the others sees hashed
texts only. Every function needs the truth to count with, which the attacker does not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchgraft.text.sentinel.adaptation import _embedding, _finite
from torchgraft.text.sentinel.tokenizer import SentinelTokenizer

__all__ = ["TextAttack", "frequency_attack", "gram_fingerprint", "known_plaintext_attack", "recovery_attack"]

Metric = Literal["l2", "cosine", "centered", "gram", "procrustes"]
_METRICS = ("l2", "cosine", "centered", "gram", "procrustes")


def gram_fingerprint(rows: Float[Tensor, "V D"], powers: int = 8) -> Float[Tensor, "V {powers}"]:
    """Numbers of each row that no rotation, reflection or translation of all rows changes.

    With the mean row taken out, entry ``p`` is the logarithm of ``x C^p x``, where ``C`` is the covariance of the
    rows, scaled to a largest eigenvalue of 1: the diagonal of the (p + 1)-th power of their Gram matrix, without
    building that matrix.

    Example:
        >>> rows = torch.randn(50, 4, dtype=torch.float64)
        >>> turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
        >>> torch.allclose(gram_fingerprint(rows @ turn + 3.0), gram_fingerprint(rows))
        True
    """
    x = rows.double()
    x = x - x.mean(0)
    # in the eigenvectors' coordinates every power of the covariance is diagonal
    values, vectors = torch.linalg.eigh(x.T @ x)
    scaled = (values.clamp_min(0) / values[-1])[:, None] ** torch.arange(powers, device=x.device)
    return ((x @ vectors).square() @ scaled).clamp_min(1e-300).log()


def _table(name: str, model: Any) -> Tensor:
    if isinstance(model, nn.Module):
        model = _embedding(model).weight
    if not isinstance(model, Tensor):
        raise TypeError(f"{name} must be a model or its embedding matrix, got {type(model).__name__}")
    if model.ndim != 2 or not _finite(model):
        raise ValueError(f"{name} must be a matrix of finite numbers (V, D), got shape {tuple(model.shape)}")
    return model.detach().float().cpu()


def _ranks(queries: Tensor, table: Tensor, right: Tensor) -> Tensor:
    """How many rows of ``table`` are at least as near to each query as the right one."""
    squares, found = table.square().sum(-1), []
    for part, answer in zip(queries.split(256), right.split(256), strict=True):
        distance = torch.addmm(squares[None], part, table.T, alpha=-2)  # less the query's own square, the same for all
        found.append((distance <= distance.gather(1, answer[:, None])).sum(1) - 1)
    return torch.cat(found)


def _gram_ranks(base: Tensor, adapted: Tensor, places: Tensor, right: Tensor, most: int) -> Tensor:
    from scipy.spatial import cKDTree

    theirs, ours = gram_fingerprint(base), gram_fingerprint(adapted)
    scale = theirs.std(0).clamp_min(1e-12)
    most = min(most, len(base))
    _, nearest = cKDTree((theirs / scale).numpy()).query((ours[places] / scale).numpy(), k=most)
    hit = torch.from_numpy(nearest).view(len(places), most) == right[:, None]
    return torch.where(hit.any(1), hit.int().argmax(1), torch.tensor(len(base)))


def recovery_attack(
    base_model: Any,
    adapted_model: Any,
    truth: Int[Tensor, " n"],
    k: Sequence[int] = (1, 5, 10),
    metric: Metric = "l2",
    *,
    known_pairs: int = 50,
    sample: int = 1000,
    seed: int = 0,
) -> dict[int, float]:
    """Match the rows of an adapted model to the public model's (section 5 of the paper, and what it left out).

    Args:
        base_model: the public model, or its embedding matrix (V, D).
        adapted_model: the adapted model, fine-tuned or not, or its matrix.
        truth: new id of each original id, ``SentinelTokenizer.permutation``; for counting only.
        k: count a token as found when its row is among the ``k`` nearest.
        metric: how the attacker compares. ``l2`` and ``cosine``: the rows as they are, as the paper did.
            ``centered``: L2 after each table's own mean row is taken out; translations are gone then, and K reflections
            change a row in K directions only. ``gram``: by ``gram_fingerprint``, which no isometry changes.
            ``procrustes``: some words and their ids are known, and the best orthogonal map between the two spans is
            used.
        known_pairs: how many, for ``procrustes``; these are not counted.
        sample: how many tokens to try, drawn at random; all when there are fewer.
        seed: of both draws.

    Returns:
        Share of tokens found for each ``k``, 0 to 1. A row of which the public model has an exact copy counts as not
        found at rank 1.

    Raises:
        TypeError: when either is neither a model nor a matrix.
        ValueError: for an unknown metric, tables of different shapes or not finite, a ``truth`` that does not fit them,
            or ``k`` or ``sample`` below 1.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric must be one of {', '.join(_METRICS)}, got {metric!r}")
    base, adapted = _table("base_model", base_model), _table("adapted_model", adapted_model)
    if base.shape != adapted.shape:
        raise ValueError(
            f"the two embedding matrices must have one shape, got {tuple(base.shape)} and {tuple(adapted.shape)}"
        )
    truth = torch.as_tensor(truth)
    if truth.dtype != torch.int64 or truth.ndim != 1 or len(truth.unique()) != len(truth) or not len(truth):
        raise ValueError("truth must be a permutation, one int64 number a token: SentinelTokenizer.permutation")
    if int(truth.min()) < 0 or max(int(truth.max()) + 1, len(truth)) > len(base):
        raise ValueError(f"truth has {len(truth)} ids up to {int(truth.max())}, the matrices have {len(base)} rows")
    if not k or not all(isinstance(n, int) and n >= 1 for n in k):
        raise ValueError(f"k must hold whole numbers from 1, got {tuple(k)}")
    if sample < 1:
        raise ValueError(f"sample must be at least 1, got {sample}")
    if metric == "procrustes" and not 2 <= known_pairs < len(truth):
        raise ValueError(f"known_pairs must be 2 to {len(truth) - 1}, got {known_pairs}")
    drawn = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    known, tried = drawn[:known_pairs], drawn[known_pairs : known_pairs + sample]
    if metric != "procrustes":
        known, tried = drawn[:0], drawn[:sample]
    places = truth[tried]
    if metric == "gram":
        ranks = _gram_ranks(base, adapted, places, tried, max(k))
    else:
        if metric == "cosine":
            base, adapted = (nn.functional.normalize(t, dim=-1) for t in (base, adapted))
        elif metric == "centered":
            base, adapted = (t - t.mean(0) for t in (base, adapted))
        elif metric == "procrustes":
            base, adapted = _aligned(base, adapted, known, truth[known])
        ranks = _ranks(adapted[places], base, tried)
    return {n: float((ranks < n).double().mean()) for n in k}


def _aligned(base: Tensor, adapted: Tensor, known: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables in coordinates of the span of the known rows, turned onto each other there."""
    x, y = base[known].double(), adapted[places].double()
    mine, theirs = x.mean(0), y.mean(0)
    u, s, v = torch.linalg.svd((y - theirs).T @ (x - mine), full_matrices=False)
    rank = int((s > 1e-9 * s[0]).sum())
    rank = min(rank, len(known) - 1)
    return (base - mine.float()) @ v[:rank].T.float(), (adapted - theirs.float()) @ u[:, :rank].float()


@dataclass(frozen=True)
class TextAttack:
    """What was read of hashed texts.

    Attributes:
        tokens: share of the running tokens, special ones left out, that the attacker names rightly.
        types: the same over different hashes.
        guesses: the attacker's dictionary, from hash to vocabulary string.
    """

    tokens: float
    types: float
    guesses: dict[str, str]


def _check_texts(client: Any, **texts: Any) -> None:
    if not isinstance(client, SentinelTokenizer):
        raise TypeError(f"client must be a SentinelTokenizer, got {type(client).__name__}")
    for name, value in texts.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(t, str) for t in value):
            raise TypeError(f"{name} must be a sequence of texts, got {type(value).__name__}")
        if not value:
            raise ValueError(f"{name} is empty; give at least one text")


def _scored(guesses: dict[str, int], encrypted: Sequence[str], client: SentinelTokenizer) -> TextAttack:
    truth = client.truth()
    seen = Counter(part for text in encrypted for part in text.split() if part in truth)
    if not seen:
        raise ValueError("encrypted holds no hash of this client; give texts that client.encrypt made")
    right = {part for part in seen if guesses.get(part) == truth[part]}
    names = client.tokenizer.convert_ids_to_tokens(list(guesses.values()))
    return TextAttack(
        tokens=sum(seen[part] for part in right) / seen.total(),
        types=len(right) / len(seen),
        guesses=dict(zip(guesses, names, strict=True)),
    )


def known_plaintext_attack(client: SentinelTokenizer, known: Sequence[str], encrypted: Sequence[str]) -> TextAttack:
    """The attacker has seen the texts ``known`` beside their hashes, and reads on.

    The original tokenizer is public, so text and hashes pair up token by token; each pair is right for ever.

    Args:
        client: whose key made the hashes.
        known: readable texts that the attacker knows.
        encrypted: further hashed texts, of the same key.

    Raises:
        TypeError, ValueError: for anything but sequences of texts, and when no hash of this client is among them.
    """
    _check_texts(client, known=known, encrypted=encrypted)
    hashed = client.encrypt_batch(list(known))
    ids = client._encode(list(known))["input_ids"]
    guesses = {
        part: i for text, row in zip(hashed, ids, strict=True) for part, i in zip(text.split(), row, strict=True)
    }
    guesses = {part: i for part, i in guesses.items() if i not in client.special}
    return _scored(guesses, encrypted, client)


def frequency_attack(client: SentinelTokenizer, public: Sequence[str], encrypted: Sequence[str]) -> TextAttack:
    """The attacker has readable texts of the same kind, and matches the n-th most frequent hash to their n-th token.

    Ties are in alphabetical order on both sides. Better counting (pairs of neighbours, language models) reads more.

    Args:
        client: whose key made the hashes; the attacker uses its public tokenizer only.
        public: readable texts, for instance of a public dataset.
        encrypted: the hashed texts.

    Raises:
        TypeError, ValueError: for anything but sequences of texts, and when no hash of this client is among them.
    """
    _check_texts(client, public=public, encrypted=encrypted)
    base = client.tokenizer
    special = client.special
    common = Counter(i for row in client._encode(list(public))["input_ids"] for i in row if i not in special)
    readable = set(special.values())
    seen = Counter(part for text in encrypted for part in text.split() if part not in readable)
    names = dict(zip(common, base.convert_ids_to_tokens(list(common)), strict=True))
    tokens = sorted(common, key=lambda i: (-common[i], names[i]))
    hashes = sorted(seen, key=lambda part: (-seen[part], part))
    return _scored(dict(zip(hashes, tokens, strict=False)), encrypted, client)
