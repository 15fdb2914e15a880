"""Adapting an embedding matrix against a loop over its rows; hashed texts against plain ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchgraft import datasets, zoo
from torchgraft.experiments import Case
from torchgraft.text.sentinel import SentinelKey, SentinelTokenizer, adapt, glide, toy_model, toy_reviews

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "What hashing costs: adapting the matrix, the client, the server's tokenizer, the model"
OURS = "torchgraft.text.sentinel"
PEER = "numpy.apply_along_axis over rows; the plain tokenizer; the plain model"

ROWS, TOKENIZER, MODEL = "a loop over rows", "the plain tokenizer", "the plain model"
Pair = tuple[Callable[[], Any], Callable[[], Any]]
KEY = SentinelKey("the passkey of this bench")


def _geometry(rows: int, width: int, steps: int) -> Pair:
    table = torch.randn(rows, width)
    lines, shifts = KEY.directions("random", steps, width)

    def by_rows() -> Any:
        def mirrored(w: Any, line: Any, square: Any) -> Any:
            return w - 2 * (w @ line) / square * line

        moved = table.numpy()
        for line, shift in zip(lines, shifts, strict=True):
            moved = np.apply_along_axis(mirrored, 1, moved, line, line @ line) + shift
        return moved

    return partial(glide, table, torch.from_numpy(lines), torch.from_numpy(shifts)), by_rows


def _client(tokenizer: Any, texts: list[str]) -> Pair:
    client = SentinelTokenizer(tokenizer, KEY)
    return partial(client.encrypt_batch, texts), partial(tokenizer, texts)


def _server(tokenizer: Any, texts: list[str]) -> Pair:
    client = SentinelTokenizer(tokenizer, KEY)
    return partial(client.as_server_tokenizer(), client.encrypt_batch(texts)), partial(tokenizer, texts)


def _forward(model: Any, tokenizer: Any, texts: list[str], device: str) -> Pair:
    adapted, server, _ = adapt(model, tokenizer, KEY)
    sent = SentinelTokenizer(tokenizer, KEY).encrypt_batch(texts)
    plain, hashed = (
        t(x, padding=True, return_tensors="pt").to(device) for t, x in ((tokenizer, texts), (server, sent))
    )
    model, adapted = model.to(device), adapted.to(device)
    return torch.no_grad()(lambda: adapted(**hashed)), torch.no_grad()(lambda: model(**plain))


def cases(quick: bool, device: str) -> list[Case]:
    """Rows of three numbers and two widths, then texts through the client, the server and the model."""
    if quick:
        model, tokenizer = toy_model("bert")
        texts, tables = toy_reviews(20, 0)[0], [(200, 16, 2)]
    else:
        model, tokenizer = zoo.load("minilm")
        texts = list(datasets.load("sst2").train[:1000])
        tables = [(2000, 768, 2), (8000, 768, 2), (30522, 384, 2), (30522, 768, 2)]
    made = []
    for rows, width, steps in tables:
        size: dict[str, Any] = {"work": "glides", "rows": rows, "width": width, "steps": steps}
        make = partial(_geometry, rows, width, steps)
        made.append(Case(size, peer_name=ROWS, make=make, repeats=3))
    few = texts[:16]
    return [
        *made,
        Case({"work": "client", "texts": len(texts)}, peer_name=TOKENIZER, make=partial(_client, tokenizer, texts)),
        Case({"work": "server", "texts": len(texts)}, peer_name=TOKENIZER, make=partial(_server, tokenizer, texts)),
        Case({"work": "model", "texts": len(few)}, peer_name=MODEL,
             make=partial(_forward, model, tokenizer, few, device)),
    ]  # fmt: skip


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Seconds of the glides against rows, and the ratios of the rest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    glides = [c for c in record["cases"] if c["size"]["work"] == "glides"]
    widest = max(c["size"]["width"] for c in glides)
    rows = [c for c in glides if c["size"]["width"] == widest]
    for name, label, colour in (("peer_s", ROWS, "#D55E00"), ("ours_s", "glide", "#0072B2")):
        left.plot([c["size"]["rows"] for c in rows], [c[name] for c in rows], "-o", color=colour, label=label)
    left.set(xscale="log", yscale="log", xlabel=f"rows of {widest} numbers", ylabel="seconds, two glides")
    left.set_xticks([c["size"]["rows"] for c in rows], [f"{c['size']['rows']:,}" for c in rows])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=9)
    rest = [c for c in record["cases"] if c["size"]["work"] != "glides"]
    labels = {"client": "client: text to hashes", "server": "server: hashes to ids", "model": "model, forward"}
    for place, case in enumerate(rest):
        low, high = case["ratio_spread"]
        right.barh(place, case["ratio"], color="#0072B2", alpha=0.8)
        right.plot([low, high], [place, place], color="black", linewidth=1)
        right.annotate(f" {case['ratio']:.2f}", (max(high, case["ratio"]), place), va="center")
    right.set_yticks(range(len(rest)), [labels[c["size"]["work"]] for c in rest])
    right.invert_yaxis()
    right.axvline(1, color="#999999", linestyle=":")
    right.set(xlabel="time, hashed ÷ plain (line: least and greatest)")
    right.set_xlim(0, 1.25 * max(c["ratio_spread"][1] for c in rest))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"sentinel": figure}
