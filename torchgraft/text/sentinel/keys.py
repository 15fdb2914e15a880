"""What a passkey is turned into: token hashes, an order of the vocabulary, directions. No torch here."""

from __future__ import annotations

import hmac
import random
from collections.abc import Sequence
from hashlib import blake2b, shake_256
from typing import Any, Literal

import numpy as np

__all__ = ["SentinelKey", "pairwise_swaps", "token_hash"]

_HASH_BYTES = 16
_LONGEST_KEY = 64  # bytes, BLAKE2b's own limit
_OFFICIAL_SEEDS = 10_000


def token_hash(key: bytes, token: str) -> str:
    """Keyed BLAKE2b of a vocabulary string: 32 hexadecimal characters (section 3.1 of the paper).

    Example:
        >>> token_hash(b"languagemodel123", "hello")
        'c2122169084a7c37711934dfbddf65f0'
    """
    return blake2b(token.encode("utf-8"), key=key, digest_size=_HASH_BYTES).hexdigest()


def pairwise_swaps(ids: Sequence[int], seed: int) -> dict[int, int]:
    """The re-indexing of the paper's script: an involution that swaps ids in pairs.

    A copy of the sorted ids is shuffled ten times, each time by a generator started anew from the same seed, and cut
    five places behind its middle; the i-th of the first part swaps with the i-th of the second, the rest stays.

    Example:
        >>> swaps = pairwise_swaps(range(100, 120), seed=7)
        >>> all(swaps[swaps[i]] == i for i in swaps), sum(swaps[i] == i for i in swaps)
        (True, 10)
    """
    order = sorted(ids)
    for _ in range(10):
        random.Random(seed).shuffle(order)
    cut = len(order) // 2 + 5
    swaps = {i: i for i in order}
    for a, b in zip(order[:cut], order[cut:], strict=False):
        swaps[a], swaps[b] = b, a
    return swaps


def _problem(passkey: Any, context: Any, scheme: Any) -> Exception | None:
    """What is wrong with the arguments of a key, without a word of the passkey; made here and raised elsewhere."""
    if not isinstance(passkey, (str, bytes)):
        return TypeError(f"passkey must be str or bytes, got {type(passkey).__name__}")
    if not isinstance(context, bytes):
        return TypeError(f"context must be bytes, got {type(context).__name__}")
    if scheme not in ("derived", "official"):
        return ValueError(f"scheme must be 'derived' or 'official', got {scheme!r}")
    if isinstance(passkey, str) and any("\ud800" <= c <= "\udfff" for c in passkey):
        return ValueError("passkey has characters that UTF-8 cannot write")
    length = len(passkey.encode("utf-8") if isinstance(passkey, str) else passkey)
    if not 1 <= length <= _LONGEST_KEY:
        return ValueError(f"passkey must have 1 to {_LONGEST_KEY} bytes, got {length}")
    if scheme == "official" and context:
        return ValueError("context is not part of scheme='official'; leave it empty or use scheme='derived'")
    if scheme == "official" and not isinstance(passkey, str):
        return TypeError("passkey must be str with scheme='official', whose seed is a sum of characters")
    return None


class SentinelKey:
    """What client and provider share. Holds sub-keys only, shows none of them, and cannot be pickled.

    Three independent sub-keys are drawn from the passkey by BLAKE2b, each with a purpose of its own (``person=``): one
    for the token hashes, one for the order of the vocabulary, one for the directions in the embedding space. The same
    passkey and context give the same bits in every process and on every machine.

    A passkey that a person can remember can also be guessed: whoever holds an adapted model or a single known
    token and its hash can try passkeys as fast as BLAKE2b runs. Draw one with ``secrets.token_urlsafe(32)``.

    Args:
        passkey: 1 to 64 bytes; text is taken as UTF-8.
        context: separates tenants that share a passkey; any length.
        scheme: ``"derived"``, as above; or ``"official"``, what the paper's script does: the passkey itself keys the
            hashes and one of 10,000 seeds (the sum of its characters) makes everything else, so that anagrams give
            the same order and directions. For comparison with models that the script made.

    Raises:
        TypeError: when the passkey is neither text nor bytes.
        ValueError: for an empty or too long passkey, an unknown scheme, or a context with the official scheme.

    Example:
        >>> key = SentinelKey("correct horse battery staple", context=b"tenant 7")
        >>> key
        SentinelKey(hidden)
        >>> key == SentinelKey("correct horse battery staple", context=b"tenant 8")
        False
    """

    __slots__ = ("_geometry", "_order", "_seed", "_token")

    def __init__(
        self, passkey: str | bytes, context: bytes = b"", *, scheme: Literal["derived", "official"] = "derived"
    ) -> None:
        if problem := _problem(passkey, context, scheme):
            del passkey  # reports of errors may print the locals of every frame
            raise problem
        secret = passkey.encode("utf-8") if isinstance(passkey, str) else passkey

        def derived(purpose: bytes) -> bytes:
            return blake2b(context, key=secret, person=purpose, digest_size=32).digest()

        self._seed: int | None = None
        self._token, self._order, self._geometry = map(derived, (b"token hash", b"vocabulary order", b"geometry"))
        if scheme == "official":
            self._token, self._seed = secret, sum(map(ord, secret.decode("utf-8"))) % _OFFICIAL_SEEDS

    def token_hashes(self, tokens: Sequence[str]) -> list[str]:
        """The hash of each vocabulary string, 32 hexadecimal characters."""
        ready = blake2b(key=self._token, digest_size=_HASH_BYTES)  # the key is worked in once
        found = []
        for token in tokens:
            one = ready.copy()
            one.update(token.encode("utf-8"))
            found.append(one.hexdigest())
        return found

    def reindexed(self, ids: Sequence[int]) -> dict[int, int]:
        """A permutation of the given ids, from old to new: sorted by keyed hashes, or the official swaps."""
        if self._seed is not None:
            return pairwise_swaps(ids, self._seed)
        places = sorted(ids)
        drawn = {i: blake2b(i.to_bytes(8, "big"), key=self._order, digest_size=16).digest() for i in places}
        return dict(zip(sorted(places, key=drawn.__getitem__), places, strict=True))

    def directions(self, kind: Literal["random", "official"], steps: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Mirror lines and translations of the glide reflections, two float64 arrays of shape (steps, width).

        ``random``: entries of mean 0 and variance 1, each the sum of twelve uniform numbers, which is normal to the
        eye and needs no logarithm, whose last bit may differ between machines. ``official``: every entry of a row is
        the same number from [0, 1). The first steps do not depend on how many follow.
        """
        if kind == "official":
            seed = self._seed if self._seed is not None else int.from_bytes(self._geometry, "big")
            draw = random.Random(seed).random
            scalars = np.array([[draw(), draw()] for _ in range(steps)]).reshape(steps, 2, 1)
            both = np.broadcast_to(scalars, (steps, 2, width)).copy()
        else:
            raw = [
                shake_256(self._geometry + step.to_bytes(4, "big")).digest(2 * width * 12 * 4) for step in range(steps)
            ]
            words = np.frombuffer(b"".join(raw), dtype="<u4").reshape(steps, 2, width, 12)
            both = words.sum(-1, dtype=np.uint64).astype(np.float64) / 2.0**32 - 6.0
        return both[:, 0], both[:, 1]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SentinelKey):
            return NotImplemented
        mine, theirs = (k._token + k._order + k._geometry + str(k._seed).encode() for k in (self, other))
        return hmac.compare_digest(mine, theirs)

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> SentinelKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SentinelKey:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a SentinelKey is not pickled, so that it never reaches a disk; make it anew from the passkey")

    def __repr__(self) -> str:
        return "SentinelKey(hidden)"
