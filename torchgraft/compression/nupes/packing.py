"""Codes of 2 to 8 bits without a wasted bit."""

from __future__ import annotations

import torch
from jaxtyping import Int8, UInt8
from torch import Tensor

from torchgraft.compression.nupes.quantizer import check_bits, largest_code

__all__ = ["pack_codes", "packed_bytes", "unpack_codes"]


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a row: ``bits`` for every eight columns, the last eight padded."""
    return bits * -(-columns // 8)


def pack_codes(codes: Int8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Pack signed codes -n..n as q + n, ``bits`` bits each.

    A row is cut into eight equal runs of columns (padded by code 0); byte t of a run's place holds bits 8 t .. 8 t + 7
    of the word that the eight codes of this place make. Runs, not neighbours, share a byte: then unpacking is a
    shift and a mask of whole rows.

    Raises:
        ValueError: for codes beyond the bits.

    Example:
        >>> codes = torch.tensor([[-3, 0, 1, 3, 2]], dtype=torch.int8)
        >>> (unpack_codes(pack_codes(codes, 3), 3, 5).int() - 3).tolist()
        [[-3, 0, 1, 3, 2]]
    """
    n = largest_code(bits)
    reach = max(int(codes.max()), -int(codes.min())) if codes.numel() else 0
    if reach > n:
        raise ValueError(f"codes reach {reach}, but {bits} bits end at {n}")
    rows, columns = codes.shape
    run = -(-columns // 8)
    padded = torch.nn.functional.pad(codes, (0, 8 * run - columns))
    # 8 codes of 8 bits fill all 64, the sign bit included
    word = torch.zeros(rows, run, dtype=torch.int64, device=codes.device)
    for place, part in enumerate(padded.unflatten(1, (8, run)).unbind(1)):
        word |= (part.long() + n) << (bits * place)
    return torch.stack([((word >> (8 * t)) & 255).to(torch.uint8) for t in range(bits)], 1).flatten(1)


def unpack_codes(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The codes of ``pack_codes``, as q + n (so that they index a table of levels)."""
    check_bits(bits)
    if packed.shape[1] != packed_bytes(columns, bits):
        raise ValueError(
            f"packed has {packed.shape[1]} bytes a row, but {columns} codes of {bits} bits take "
            f"{packed_bytes(columns, bits)}"
        )
    planes = packed.unflatten(1, (bits, -1))
    if 8 % bits == 0:
        mask = 2**bits - 1
        found = torch.stack([(planes >> s) & mask for s in range(0, 8, bits)], 2)
    else:
        word = sum((planes[:, t].long() << (8 * t) for t in range(1, bits)), planes[:, 0].long())
        found = torch.stack([((word >> (bits * k)) & (2**bits - 1)).to(torch.uint8) for k in range(8)], 1)
    return found.flatten(1)[:, :columns]


def signed_codes(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> Int8[Tensor, "rows columns"]:
    """The codes of ``pack_codes``, -n..n."""
    return (unpack_codes(packed, bits, columns).to(torch.int16) - largest_code(bits)).to(torch.int8)
