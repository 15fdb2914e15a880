"""Decoding one token through quantized linear layers, and searching an exponent against Nelder-Mead on all weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchgraft.compression.nupes import PowerLinear, PowerQuantConfig, quantization_error, search_exponent
from torchgraft.experiments import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Weight-only linear layers on one token, and the search of the exponent"
OURS = "torchgraft.compression.nupes"
PEER = "torch's float, int8 and int4 linear kernels; torchao's int8 where it is installed; scipy's Nelder-Mead"

TABLE, KERNEL, SEARCH = "packed 4-bit codes by look-up", "4-bit codes, a = 1/2, int8 kernel", "search"
FLOAT, INT8, INT4, AO = "torch float", "torch int8 kernel", "torch int4 kernel", "torchao int8"
NELDER_MEAD = "Nelder-Mead on all weights"

Work = Callable[[], Any]


def _ours(linear: nn.Linear, way: str, x: torch.Tensor) -> Work:
    layer = PowerLinear.from_float(linear, PowerQuantConfig(exponent=0.5 if way == KERNEL else 0.7))
    return torch.no_grad()(lambda: layer(x))


def _peer(linear: nn.Linear, name: str, x: torch.Tensor) -> Work:
    weight = linear.weight.detach()
    rows, columns = weight.shape
    if name == FLOAT:
        return torch.no_grad()(lambda: linear(x))
    if name == INT8:
        scale = weight.abs().amax(1) / 127
        codes = (weight.float() / scale.float()[:, None]).round().to(torch.int8)
        return lambda: torch._weight_int8pack_mm(x, codes, scale)
    if name == INT4:
        # the kernel's time does not depend on the numbers
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        group = 64
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = torch.rand(columns // group, rows, 2).to(x.dtype)
        return lambda: torch._weight_int4pack_mm_for_cpu(x, packed, group, scales)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, Int8WeightOnlyConfig())
    return torch.no_grad()(lambda: model(x))


def _linear(rows: int, columns: int, dtype: torch.dtype, way: str, name: str) -> tuple[Work, Work]:
    torch.manual_seed(0)
    linear, x = nn.Linear(columns, rows, bias=False).to(dtype), torch.randn(1, columns).to(dtype)
    return _ours(linear, way, x), _peer(linear, name, x)


def _search(side: int) -> tuple[Work, Work]:
    from scipy.optimize import minimize

    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0))

    def published() -> Any:
        return minimize(
            lambda a: quantization_error(weight, float(a[0]), 4), [1.0], method="Nelder-Mead", options={"xatol": 1e-3}
        )

    return lambda: search_exponent([weight], 4), published


def cases(quick: bool, device: str) -> list[Case]:
    """One token through square layers, in float32 by look-up and in bfloat16 by the int8 kernel; the search by size."""
    sizes = [64] if quick else [576, 1536, 4096]
    made = []
    for side in sizes:
        pairs = [(TABLE, torch.float32, FLOAT), (TABLE, torch.bfloat16, FLOAT)]
        pairs += [(KERNEL, torch.bfloat16, name) for name in (FLOAT, INT8, INT4)]
        if find_spec("torchao"):
            pairs.append((KERNEL, torch.bfloat16, AO))
        for way, dtype, name in pairs:
            kind = str(dtype).removeprefix("torch.")
            size = {"work": way, "side": side, "dtype": kind}
            made.append(Case(size, peer_name=name, make=partial(_linear, side, side, dtype, way, name)))
    sides = [32] if quick else [128, 512, 1024]
    searches = [Case({"work": SEARCH, "side": s}, peer_name=NELDER_MEAD, make=partial(_search, s)) for s in sides]
    return made + searches


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time against size: one token through a layer, and the search."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [c for c in record["cases"] if c["size"]["work"] != SEARCH]
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in rows:
        side, kind = case["size"]["side"], case["size"]["dtype"]
        if kind == "bfloat16":
            lines.setdefault(f"ours: {case['size']['work']}", []).append((side, case["ours_s"]))
        lines.setdefault(f"{case['peer']}, {kind}", []).append((side, case["peer_s"]))
    for name, points in lines.items():
        sides = sorted({s for s, _ in points})
        # several cases time the same layer of ours: their median
        level = [
            1e6 * sorted(t for s, t in points if s == side)[sum(s == side for s, _ in points) // 2] for side in sides
        ]
        ours = name.startswith("ours")
        left.loglog(sides, level, "o-" if ours else "s--", label=name, linewidth=1.8 if ours else 1.1, markersize=5)
    left.set(xlabel="columns and rows of the layer", ylabel="one token, microseconds")
    searched = [c for c in record["cases"] if c["size"]["work"] == SEARCH]
    weights = [c["size"]["side"] ** 2 for c in searched]
    right.loglog(
        weights, [c["ours_s"] for c in searched], "o-", color="#0072B2", label="ours: histogram, golden section"
    )
    right.loglog(weights, [c["peer_s"] for c in searched], "s--", color="#D55E00", label=NELDER_MEAD)
    right.set(xlabel="weights", ylabel="searching the exponent, seconds")
    for ax in (left, right):
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    left.set_xticks(
        sorted({c["size"]["side"] for c in rows}), [str(s) for s in sorted({c["size"]["side"] for c in rows})]
    )
    left.minorticks_off()
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"quantized_linear": figure}
