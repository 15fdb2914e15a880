"""life2vec's exact attention against FAVOR+ as published, against BERT, and what batches of alike lengths save."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.experiments import Case
from torchgraft.tabular import life2vec as l2v

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "life2vec: exact and FAVOR+ attention, BERT of equal size, bucketed batches"
OURS = "torchgraft.tabular.life2vec (attention='sdpa')"
PEER = "attention='performer'; transformers BERT (sdpa); batches padded to the maximum; logits at every position"

PERFORMER, BERT, PADDED, EVERYWHERE = "performer", "BERT (sdpa)", "padded to 512", "logits at all positions"
VOCABULARY = 2043
Work = Callable[[], object]


def _sizes(quick: bool) -> dict[str, int]:
    """Of the paper, with two layers instead of five: every layer costs the same."""
    if quick:
        return {"hidden_size": 20, "intermediate_size": 30, "num_layers": 1, "num_heads": 4, "num_local_heads": 2}
    return {"hidden_size": 280, "intermediate_size": 2210, "num_layers": 2, "num_heads": 10, "num_local_heads": 7}


def _config(quick: bool, attention: str = "sdpa") -> l2v.Life2VecConfig:
    # without dropout: with it torch has no fused attention on a CPU, and BERT neither
    silent = {f"{part}_dropout": 0.0 for part in ("embedding", "attention", "feedforward", "decoder")}
    return l2v.Life2VecConfig.from_dict({"vocab_size": VOCABULARY, "attention": attention, **_sizes(quick), **silent})


def _ids(batch: int, length: int, device: str) -> Tensor:
    torch.manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (batch, 4, length)).float()
    ids[:, 1:3] = torch.rand(batch, 2, length) * 80
    ids[:, 3] = torch.randint(1, 4, (batch, length)).float()
    return ids.to(device)


def _pass(forward: Callable[[], Tensor], model: nn.Module, backward: bool) -> Work:
    def inference() -> object:
        with torch.no_grad():
            return forward()

    def training() -> object:
        return torch.autograd.grad(
            forward().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )

    return training if backward else inference


def _encoder(kind: str, length: int, backward: bool, quick: bool, device: str) -> Work:
    ids = _ids(1, length, device)
    mask = torch.ones(1, length, dtype=torch.bool, device=device)
    if kind != BERT:
        model = l2v.Life2VecModel(_config(quick, kind)).to(device)
        return _pass(lambda: model(ids, mask).last_hidden_state, model, backward)
    from transformers import BertConfig, BertModel

    sizes = _sizes(quick)
    bert = BertModel(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=sizes["hidden_size"], num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"], intermediate_size=sizes["intermediate_size"],
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=length,
            attn_implementation="sdpa",
        ),
        add_pooling_layer=False,
    ).to(device)  # fmt: skip
    tokens = ids[:, 0].long()
    return _pass(lambda: bert(tokens, attention_mask=mask.long()).last_hidden_state, bert, backward)


def _compared(length: int, backward: bool, peer: str, quick: bool, device: str) -> Case:
    return Case(
        {"length": length, "pass": "forward+backward" if backward else "forward"},
        peer_name=peer,
        make=lambda: (
            _encoder("sdpa", length, backward, quick, device),
            _encoder(peer, length, backward, quick, device),
        ),
    )


def _buckets(quick: bool, device: str) -> Case:
    """One pass over people whose lengths are spread as in registries: batches of alike lengths, or all padded."""
    longest, people, size = (32, 8, 4) if quick else (512, 64, 16)

    def make() -> tuple[Work, Work]:
        model = l2v.Life2VecModel(_config(quick)).to(device)
        lengths = np.random.default_rng(0).lognormal(np.log(longest / 8), 0.8, people).clip(8, longest).astype(int)
        whole = _ids(people, longest, device)

        def run(batches: list[list[int]], pad: bool) -> Work:
            parts = []
            for batch in batches:
                width = longest if pad else int(lengths[batch].max())
                valid = torch.arange(width)[None] < torch.tensor(lengths[batch])[:, None]
                parts.append((whole[batch][:, :, :width] * valid[:, None].to(device), valid.to(device)))

            def step() -> object:
                total = torch.stack([model(ids, valid).last_hidden_state.sum() for ids, valid in parts]).sum()
                return torch.autograd.grad(total, list(model.parameters()), allow_unused=True)

            return step

        return run(l2v.length_buckets(lengths, size), False), run(np.arange(people).reshape(-1, size).tolist(), True)

    return Case({"length": longest, "people": people, "pass": "forward+backward"}, peer_name=PADDED, make=make)


def _head(quick: bool, device: str) -> Case:
    """Pre-training loss with logits at the 30 % that are predicted, or at every position."""
    length = 16 if quick else 512

    def make() -> tuple[Work, Work]:
        model = l2v.Life2VecForPreTraining(_config(quick)).to(device)
        ids = _ids(2, length, device)
        spots = torch.rand(2, length, device=device).argsort(1)[:, : int(0.3 * length)]
        targets = ids[:, 0].long().gather(1, spots)
        sparse = torch.zeros(2, length, dtype=torch.long, device=device).scatter(1, spots, targets)

        def everywhere() -> Tensor:
            return F.cross_entropy(model(ids).logits.flatten(0, 1), sparse.flatten(), ignore_index=0)

        def gathered() -> Tensor:
            return model(ids, target_pos=spots, target_tokens=targets).mlm_loss

        return _pass(gathered, model, True), _pass(everywhere, model, True)

    return Case({"length": length, "pass": "forward+backward"}, peer_name=EVERYWHERE, make=make)


def cases(quick: bool, device: str) -> list[Case]:
    """Both other encoders in training at every length and in inference at two; bucketed batches; masked tokens."""
    lengths = [40] if quick else [64, 128, 256, 512, 1024, 2560]
    sizes = [(length, True) for length in lengths] + [(length, False) for length in lengths[3::2]]
    found = [
        _compared(length, backward, peer, quick, device)
        for peer, (length, backward) in itertools.product((PERFORMER, BERT), sizes)
    ]
    return [*found, _buckets(quick, device), _head(quick, device)]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Time and peak memory against length, forward+backward; the two savings as numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    chosen = [c for c in record["cases"] if c["size"]["pass"] == "forward+backward"]
    styles = {PERFORMER: ("#D55E00", "s--"), BERT: ("#555555", "^:")}
    for ax, key, scale, label in (
        (axes[0], "{}_s", 1e3, "milliseconds"),
        (axes[1], "peak_bytes_{}", 2**-20, "peak memory, MiB"),
    ):
        for peer, (colour, style) in styles.items():
            rows = [c for c in chosen if c["peer"] == peer]
            xs = [c["size"]["length"] for c in rows]
            if peer == PERFORMER:
                ours = [c[key.format("ours")] * scale for c in rows]
                ax.loglog(xs, ours, "o-", color="#0072B2", label="life2vec, sdpa")
            name = "life2vec, performer" if peer == PERFORMER else peer
            ax.loglog(xs, [c[key.format("peer")] * scale for c in rows], style, color=colour, label=name)
        ax.set(xlabel="length", ylabel=label)
        ax.set_xticks(xs, [str(x) for x in xs])
        ax.minorticks_off()
        ax.grid(True, which="major", alpha=0.3)
        ax.legend(frameon=False)
    savings = ", ".join(
        f"{c['ratio']:.2f} of the time of '{c['peer']}'" for c in chosen if c["peer"] in (PADDED, EVERYWHERE)
    )
    figure.suptitle(
        f"forward+backward, batch 1, width 280, 2 layers, float32, {record['device']}, "
        f"threads: {record['environment']['threads']}\nbucketed batches and gathered logits: {savings}",
        fontsize=10,
    )
    return {"life2vec": figure}
