"""Every family by name: what it is, what it can do, and how to make one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torchgraft.layers.state_space.convolution import TNN, Hyena, LongConv, SGConv
from torchgraft.layers.state_space.gated import GSS, H3, SPADE, LiquidS4, WindowAttention
from torchgraft.layers.state_space.linear import DSS, S4, S4D
from torchgraft.layers.state_space.mamba import Mamba, Mamba2
from torchgraft.layers.state_space.mega import EMA, Mega
from torchgraft.layers.state_space.mixer import SequenceMixer
from torchgraft.layers.state_space.recurrent import HGRN, RGLRU, RWKV, GateLoop, RetNet
from torchgraft.layers.state_space.s5 import LRU, S5
from torchgraft.layers.state_space.stack import Attention

__all__ = ["FAMILIES", "Family", "build_ssm"]


@dataclass(frozen=True)
class Family:
    """One entry of the registry.

    Attributes:
        layer: the class.
        kind: of the survey: ``structural``, ``gated`` or ``recurrent``; ``attention`` for what they are compared with.
        data_dependent: whether the map from inputs to outputs changes with the inputs.
        both_ways: whether it can look into the future too.
        constant_step: whether a step costs the same however long the past is.
        state_argument: name of the argument that ``d_state`` of ``build_ssm`` sets, if any.
        needs_length: whether it must be told the longest sequence, as ``l_max``.
        source: paper, and official code whose parameters load.
    """

    layer: type[SequenceMixer]
    kind: Literal["structural", "gated", "recurrent", "attention"]
    data_dependent: bool
    both_ways: bool
    constant_step: bool
    state_argument: str | None
    needs_length: bool
    source: str


FAMILIES: dict[str, Family] = {
    "s4": Family(S4, "structural", False, True, True, "d_state", False, "2111.00396; state-spaces/s4 S4Block"),
    "s4d": Family(S4D, "structural", False, True, True, "d_state", False, "2206.11893; state-spaces/s4 S4D, S4Block"),
    "dss": Family(DSS, "structural", False, False, True, "d_state", False, "2203.14343"),
    "s5": Family(S5, "structural", False, False, True, "d_state", False, "2208.04933; lindermanlab/S5 S5SSM"),
    "liquid_s4": Family(LiquidS4, "structural", True, False, True, "d_state", False, "2209.12951"),
    "sgconv": Family(SGConv, "structural", False, True, False, None, True, "2210.09298; ctlllll/SGConv GConv"),
    "long_conv": Family(LongConv, "structural", False, True, False, None, True, "2302.06646; safari LongConv"),
    "spade": Family(SPADE, "structural", True, False, True, "d_state", False, "2212.08136"),
    "gss": Family(GSS, "gated", True, False, True, "d_state", False, "2206.13947"),
    "h3": Family(H3, "gated", True, False, True, "d_state", False, "2212.14052"),
    "hyena": Family(Hyena, "gated", True, False, False, None, True, "2302.10866; safari HyenaOperator"),
    "ema": Family(EMA, "gated", False, True, True, "averages", False, "2209.10655; mega MultiHeadEMA"),
    "mega": Family(Mega, "gated", True, True, False, "d_state", False, "2209.10655; mega MovingAverageGatedAttention"),
    "tnn": Family(TNN, "gated", True, True, False, None, False, "2305.04749; tnn-pytorch Gtu"),
    "retnet": Family(RetNet, "gated", True, False, True, None, False, "2307.08621"),
    "gateloop": Family(GateLoop, "gated", True, False, True, None, False, "2311.01927"),
    "mamba": Family(Mamba, "gated", True, False, True, "d_state", False, "2312.00752; transformers MambaMixer"),
    "mamba2": Family(Mamba2, "gated", True, False, True, "d_state", False, "2405.21060; transformers Mamba2Mixer"),
    "lru": Family(LRU, "recurrent", False, False, True, "d_state", False, "2303.06349; minimal-LRU"),
    "rg_lru": Family(RGLRU, "recurrent", True, False, True, None, False, "2402.19427; transformers RecurrentGemma"),
    "hgrn": Family(HGRN, "recurrent", True, False, True, None, False, "2311.04823"),
    "rwkv": Family(RWKV, "recurrent", True, False, True, None, False, "2305.13048; transformers RwkvSelfAttention"),
    "window_attention": Family(WindowAttention, "attention", True, False, True, None, False, "SPADE's local branch"),
    "attention": Family(Attention, "attention", True, True, False, None, False, "1706.03762"),
}


def build_ssm(name: str, d_model: int, d_state: int | None = None, **settings: Any) -> SequenceMixer:
    """A layer of the family by name.

    Args:
        name: a key of ``FAMILIES``.
        d_model: width.
        d_state: states of a channel, for families that have them; their own default without it.
        settings: of the layer. ``l_max``, the longest sequence, is needed where ``needs_length`` says so and is taken
            by the others where they have a use for it, ignored where they have none.

    Raises:
        ValueError: for an unknown name, a ``d_state`` for a family without states, a missing ``l_max``.
        TypeError: for settings that the layer does not have.

    Example:
        >>> import torch
        >>> layer = build_ssm("mamba", 16, d_state=8)
        >>> y, state = layer(torch.randn(2, 50, 16))
        >>> sorted(FAMILIES)[:4]
        ['attention', 'dss', 'ema', 'gateloop']
    """
    if name not in FAMILIES:
        raise ValueError(f"name must be one of {', '.join(FAMILIES)}, got {name!r}")
    family = FAMILIES[name]
    if d_state is not None:
        if family.state_argument is None:
            raise ValueError(f"{name} has no d_state to set, got {d_state}")
        settings[family.state_argument] = d_state
    if family.needs_length and "l_max" not in settings:
        raise ValueError(f"{name} must be told the longest sequence: pass l_max=")
    known = inspect.signature(family.layer.__init__).parameters
    if "l_max" in settings and "l_max" not in known:
        settings.pop("l_max")
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise TypeError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(list(known)[2:])}")
    return family.layer(d_model, **settings)
