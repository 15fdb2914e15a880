"""Where autocast must keep out."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of ``x`` until the end of the block; on the meta device there is none to keep out."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
