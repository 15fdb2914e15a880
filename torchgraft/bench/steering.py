"""A generated token with steering against the same token without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torchgraft.experiments import Case
from torchgraft.language.representation_engineering import ReadingVectors, steer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "A generated token with steering against the same token without"
OURS = "torchgraft.language.representation_engineering.steer"
PEER = "the model without steering"


def _pair(
    width: int, depth: int, steered: int, batch: int, context: int, device: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        intermediate_size=8 * width // 3, vocab_size=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).eval()
    direction = torch.nn.functional.normalize(torch.randn(width), dim=0)
    vectors = ReadingVectors(dict.fromkeys(range(depth - steered, depth), direction), "llama")
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.randint(0, 4096, (batch, context), device=device), past_key_values=cache)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def plain() -> None:
        model(token, past_key_values=cache)
        cache.crop(-1)

    def ours() -> None:
        with steer(model, vectors, 2.0):
            plain()

    return ours, plain


def cases(quick: bool, device: str) -> list[Case]:
    """The width and depth of SmolLM2-135M, and a wider one; one, five and all layers steered, entering counted."""
    sizes = [(64, 2, 1, 1, 8)] if quick else [(576, 30, 1, 1, 64), (576, 30, 5, 1, 64), (576, 30, 30, 1, 64)]
    if not quick:
        sizes += [(576, 30, 5, 8, 64), (1024, 16, 5, 1, 64)]
    names = ("width", "depth", "steered", "batch", "context")
    return [
        Case(dict(zip(names, size, strict=True)), peer_name="without steering", make=partial(_pair, *size, device))
        for size in sizes
    ]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time added to a token, in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    rows = record["cases"]
    for y, row in enumerate(rows):
        over, (low, high) = 100 * (row["ratio"] - 1), (100 * (r - 1) for r in row["ratio_spread"])
        axes.plot([low, high], [y, y], "-", color="#999999", linewidth=1.2)
        axes.plot([over], [y], "o", color="#D55E00")
        axes.annotate(f"{over:.1f} %", (over, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    named = [row["size"] for row in rows]
    axes.set_yticks(
        range(len(rows)),
        [f"{s['steered']} of {s['depth']} layers, width {s['width']}, batch {s['batch']}" for s in named],
    )
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.axvline(3, color="#999999", linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    axes.set(xlabel="time added to a token, % (line: least and greatest ratio)")
    axes.set_title(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"steering": figure}
