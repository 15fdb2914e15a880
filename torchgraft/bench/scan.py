"""Mamba and Mamba-2 against transformers' PyTorch paths and mambapy: whole layers, forward and backward, and steps.

``pip install mambapy`` adds that peer; without it its cases are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchgraft.experiments import Case
from torchgraft.layers.state_space import Mamba, Mamba2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Mamba and Mamba-2 layers against transformers and mambapy"
OURS = "torchgraft.layers.state_space.Mamba, Mamba2"
PEER = "transformers' PyTorch paths; mambapy"

THEIRS, MAMBAPY = "transformers", "mambapy"


def _their_mixer(version: int, width: int) -> tuple[nn.Module, Any]:
    if version == 1:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer

        config = MambaConfig(hidden_size=width, num_hidden_layers=1)
        return MambaMixer(config, 0), config
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=width, num_hidden_layers=1, state_size=64, head_dim=64, num_heads=2 * width // 64, n_groups=1
    )
    return Mamba2Mixer(config, 0), config


def _our_layer(version: int, width: int) -> nn.Module:
    return Mamba(width) if version == 1 else Mamba2(width, 64, head_dim=64)


def _both(layer: Callable[[Tensor], Any], parameters: list[nn.Parameter], x: Tensor) -> Callable[[], object]:
    def work() -> object:
        y = layer(x)
        return torch.autograd.grad((y[0] if isinstance(y, tuple) else y).sum(), [x, *parameters])

    return work


def _case(version: int, peer: str, length: int, width: int, device: str) -> Case:
    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        ours = _our_layer(version, width).to(device)
        x = torch.randn(1, length, width, device=device, requires_grad=True)
        mine = _both(lambda t: ours(t, return_state=False), list(ours.parameters()), x)
        if peer == MAMBAPY:
            from mambapy.mamba import MambaBlock, MambaConfig

            other: nn.Module = MambaBlock(MambaConfig(d_model=width, n_layers=1)).to(device)
        else:
            other = _their_mixer(version, width)[0].to(device)
        return mine, _both(other, list(other.parameters()), x)

    size = {"layer": f"mamba-{version}", "length": length, "width": width, "pass": "forward+backward"}
    slow = version == 1 and peer == THEIRS and length > 1000
    return Case(size, peer_name=peer, make=make, repeats=1 if slow else None, memory=not slow)


def _step_case(version: int, width: int, device: str) -> Case:
    def make() -> tuple[Callable[[], object], Callable[[], object]]:
        from transformers import DynamicCache

        ours = _our_layer(version, width).to(device).eval()
        other, config = _their_mixer(version, width)
        other.to(device).eval()
        prompt, x = torch.randn(1, 16, width, device=device), torch.randn(1, 1, width, device=device)
        with torch.no_grad():
            _, state = ours(prompt)
            cache = DynamicCache(config=config)
            other(prompt, cache=cache)

        def mine() -> object:
            with torch.no_grad():
                return ours.step(x[:, 0], state)  # type: ignore[operator]

        def theirs() -> object:
            with torch.no_grad():
                return other(x, cache=cache)

        return mine, theirs

    size = {"layer": f"mamba-{version}", "length": 1, "width": width, "pass": "step"}
    return Case(size, peer_name=THEIRS, make=make)


def cases(quick: bool, device: str) -> list[Case]:
    """The loop of transformers' Mamba as far as it ends within a minute; the others from 512 to 8,192 places."""
    width = 64 if quick else 128
    lengths = [64] if quick else [512, 2048, 8192]
    found = [_case(1, THEIRS, length, width, device) for length in ([32] if quick else [64, 128, 256, 512, 1024, 2048])]
    if find_spec("mambapy") is not None:
        found += [_case(1, MAMBAPY, length, width, device) for length in lengths]
    found += [_case(2, THEIRS, length, width, device) for length in lengths]
    return found + [_step_case(version, width, device) for version in (1, 2)]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time and peak memory against length, ours and each peer's, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, layer in enumerate(["mamba-1", "mamba-2"]):
        chosen = [c for c in record["cases"] if c["size"]["layer"] == layer and "+" in c["size"]["pass"]]
        for row, (key, scale, label) in enumerate([("{}_s", 1e3, "milliseconds"), ("peak_bytes_{}", 2**-20, "MiB")]):
            ax = axes[row][column]
            chosen = [c for c in chosen if c[key.format("ours")] is not None]
            ours = sorted({c["size"]["length"]: c[key.format("ours")] * scale for c in chosen}.items())
            ax.loglog(*zip(*ours, strict=True), "o-", color="#0072B2", label="torchgraft")
            for peer, colour, style in ((THEIRS, "#D55E00", "s--"), (MAMBAPY, "#555555", "^:")):
                rows = [(c["size"]["length"], c[key.format("peer")] * scale) for c in chosen if c["peer"] == peer]
                if rows:
                    ax.loglog(*zip(*rows, strict=True), style, color=colour, label=peer)
            ax.set_ylabel(label if row == 0 else f"peak memory, {label}")
            ax.set_title(layer if row == 0 else "")
            ax.grid(True, which="major", alpha=0.3)
            ax.legend(frameon=False)
            if row:
                ax.set_xlabel("length")
    width = record["cases"][0]["size"]["width"]
    threads = record["environment"]["threads"]
    figure.suptitle(
        f"one layer, forward+backward, batch 1, width {width}, float32, {record['device']}, threads: {threads}"
    )
    return {"scan": figure}
