"""Random numbers as a function of seed, stream and index, so that image 17 is the same in any batch, order or worker.

A counter goes through the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): there is no state to advance,
a whole batch is drawn at once, and a GPU draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    # the shifts of int64 carry the sign along, which the masks take away
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


class Draws:
    """The random numbers of a batch of images, taken one after the other.

    Args:
        seed: any whole number.
        stream: what the numbers are for; streams of one seed are independent.
        index: (B,) int64, which image each row is.

    Example:
        >>> one, other = Draws(0, "angle", torch.tensor([7])), Draws(0, "angle", torch.tensor([3, 7]))
        >>> bool(one.uniform()[0] == other.uniform()[1])
        True
    """

    def __init__(self, seed: int, stream: str, index: Int64[Tensor, " B"]) -> None:
        digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
        self._state = _mix(index * _STEP + int.from_bytes(digest, "little", signed=True))
        self._used = 0

    def __len__(self) -> int:
        return len(self._state)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self._state.device

    def at(self, rows: Int64[Tensor, " b"]) -> Draws:
        """The numbers that these rows have still to come."""
        part = object.__new__(Draws)
        part._state, part._used = self._state[rows], self._used
        return part

    def words(self, count: int) -> Int64[Tensor, "B count"]:
        """64 random bits each."""
        places = torch.arange(self._used + 1, self._used + count + 1, device=self._state.device)
        self._used += count
        return _mix(self._state[:, None] + places * _STEP)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Float64[Tensor, " B"]:
        """One number of [low, high) for each image."""
        whole = (self.words(1)[:, 0] >> 11) & (2**53 - 1)
        return low + (high - low) * (whole.double() * 2.0**-53)

    def chance(self, p: float) -> Bool[Tensor, " B"]:
        """True with probability p."""
        return self.uniform() < p

    def choice(self, count: int) -> Int64[Tensor, " B"]:
        """One of 0 … count - 1."""
        return (self.uniform() * count).long()

    def shorts(self, count: int) -> Int64[Tensor, "B count"]:
        """Whole numbers 0 … 65,535, four to a word: for fields of noise."""
        words = self.words(-(-count // 4))
        return words.view(torch.int16)[:, :count].long() & 0xFFFF
