"""Sliced models against the whole ones, and the scores against one removal after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchgraft import zoo
from torchgraft.compression.optin import MacModel, OptinConfig, apply_masks, baseline_scores, optin_scores, search_masks
from torchgraft.experiments import Case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Pruned models against whole and masked ones, and scoring against one removal after the other"
OURS = "torchgraft.compression.optin"
PEER = "the whole model; the same masks without slicing; one full forward pass per unit"

WHOLE, MASKED, RELEASED = "the whole model", "masked, not sliced", "one full pass per unit"


def _text(model: nn.Module, examples: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, model.config.vocab_size, (examples, length), generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr,arg-type]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _runs(model: nn.Module, batch: Any, ratio: float, peer: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    # which units go does not matter for the time of a given number of operations; scores by weights are quick
    scores = baseline_scores(model, batch, "magnitude")
    cost = MacModel.from_model(model, batch=batch, blocks=scores.blocks)
    masks = search_masks(scores, cost, ratio, layout="uniform")
    ours = apply_masks(model, masks)
    other = model if peer == WHOLE else apply_masks(model, masks, "mask")

    def work(model: nn.Module) -> Any:
        with torch.inference_mode():
            return model(**batch) if isinstance(batch, Mapping) else model(batch)

    return partial(work, ours), partial(work, other)


def _scoring(hidden: int, neurons: int, layers: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": neurons,
    }  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=100)).eval()
    batch = _text(model, 4, 8)
    config = OptinConfig(probes=16)

    def released() -> None:
        with torch.inference_mode():
            for layer in model.bert.encoder.layer:
                for place, count in ((layer.attention.output.dense, 2), (layer.output.dense, neurons)):
                    size = place.in_features // count
                    for unit in range(count):

                        def off(module: nn.Module, args: Any, at: int = unit * size, size: int = size) -> Any:
                            x = args[0].clone()
                            x[..., at : at + size] = 0
                            return (x,)

                        handle = place.register_forward_pre_hook(off)
                        model(**batch)
                        handle.remove()

    return lambda: optin_scores(model, batch, config), released


def cases(quick: bool, device: str) -> list[Case]:
    """MiniLM with one sentence and with many, ResNet-20, and the cost of the scores."""
    ratios: tuple[float, ...]
    texts: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    if quick:
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
        encoder: nn.Module = BertModel(BertConfig(**sizes, vocab_size=30)).eval().to(device)
        image: nn.Module = zoo.CifarResNet(8, 10).eval().to(device)
        ratios, texts, images, widths = (0.6,), ((1, 8),), (1,), (8,)
    else:
        encoder, image = zoo.load("minilm", device=device)[0], zoo.load("resnet20-cifar10", device=device)
        ratios, texts, images, widths = (0.8, 0.6, 0.4), ((1, 25), (16, 25)), (16,), (64, 128, 256)
    made = []
    for examples, length in texts:
        batch = {k: v.to(device) for k, v in _text(encoder, examples, length).items()}
        for ratio in ratios:
            size = {"model": "MiniLM", "examples": examples, "tokens": length, "operations": ratio}
            made.append(Case(size, peer_name=WHOLE, make=partial(_runs, encoder, batch, ratio, WHOLE)))
    size = {"model": "MiniLM", "examples": texts[-1][0], "tokens": texts[-1][1], "operations": 0.6}
    made.append(Case(size, peer_name=MASKED, make=partial(_runs, encoder, batch, 0.6, MASKED)))
    for examples in images:
        x = torch.randn(examples, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
        for ratio in ratios:
            size = {"model": "ResNet-20", "examples": examples, "operations": ratio}
            made.append(Case(size, peer_name=WHOLE, make=partial(_runs, image, x, ratio, WHOLE)))
    for neurons in widths:
        size = {"work": "scores", "layers": 2, "neurons": neurons}
        made.append(Case(size, peer_name=RELEASED, make=partial(_scoring, 32, neurons, 2)))
    return made


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Speed against operations kept, and time of the scores against the number of units."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in record["cases"]:
        if case["peer"] == WHOLE:
            size = case["size"]
            groups.setdefault(f"{size['model']}, {size['examples']} a batch", []).append(case)
    for colour, (name, rows) in zip(("#D55E00", "#E69F00", "#0072B2"), groups.items(), strict=False):
        x = [100, *(100 * c["size"]["operations"] for c in rows)]
        left.plot(x, [1, *(1 / c["ratio"] for c in rows)], "o-", color=colour, label=name)
    budget = torch.linspace(35, 100, 40).tolist()
    left.plot(budget, [100 / b for b in budget], ":", color="#777777", label="in proportion to operations")
    left.invert_xaxis()
    left.set(xlabel="operations kept, %", ylabel="throughput, times the whole model")
    left.legend(frameon=False, fontsize=8)
    scores = [c for c in record["cases"] if c["peer"] == RELEASED]
    for key, colour, label in (("ours_s", "#D55E00", "ours, 16 probes"), ("peer_s", "#777777", RELEASED)):
        right.plot([c["size"]["neurons"] for c in scores], [c[key] for c in scores], "o-", color=colour, label=label)
    right.set(xscale="log", yscale="log", xlabel="neurons of each of two layers", ylabel="seconds for all scores")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"optin": figure}
