"""Hidden states of a word in answers that are read in one pass, against answers generated token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from torchgraft.experiments import Case
from torchgraft.language.representation_shift import collect_states

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Hidden states of a word: one pass over given answers against generation"
OURS = "torchgraft.language.representation_shift.collect_states"
PEER = "transformers' generate with output_hidden_states"


class _Word:
    """A tokenizer that knows one word."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [7]}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return "word"

    def get_vocab(self) -> dict[str, int]:
        return {"word": 7}


def _pair(
    width: int, depth: int, batch: int, prompt: int, answer: int, device: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        intermediate_size=8 * width // 3, vocab_size=4096, eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).eval()
    ids = torch.randint(8, 4096, (batch, prompt + answer), device=device)
    ids[:, -1] = 7
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    asked = {key: v[:, :prompt] for key, v in given.items()}

    def ours() -> None:
        collect_states(model, [given], [-1, "norm"], "word", tokenizer=_Word())

    @torch.no_grad()
    def peer() -> None:
        output = model.generate(
            **asked, max_new_tokens=answer, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        # the states that produced the last token
        [step[-1][:, -1].cpu() for step in output.hidden_states[-1:]]

    return ours, peer


def cases(quick: bool, device: str) -> list[Case]:
    """Answers of growing length after a prompt of 16 tokens, and two batch sizes."""
    sizes = [(64, 2, 2, 4, 4)] if quick else [(384, 8, 16, 16, n) for n in (4, 8, 16, 32)]
    if not quick:
        sizes += [(384, 8, 1, 16, 16), (576, 30, 4, 16, 16)]
    names = ("width", "depth", "batch", "prompt", "answer")
    return [
        Case(dict(zip(names, size, strict=True)), peer_name="generation", make=partial(_pair, *size, device))
        for size in sizes
    ]


def figures(record: Mapping[str, Any]) -> Mapping[str, Figure]:
    """Seconds against the length of the answer, and the ratio of every case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = record["cases"]
    grown = [row for row in rows if (row["size"]["batch"], row["size"]["width"]) == (16, 384)]
    for key, label, colour in (("peer_s", "generation", "#999999"), ("ours_s", "one pass", "#0072B2")):
        left.plot([r["size"]["answer"] for r in grown], [r[key] for r in grown], "o-", color=colour, label=label)
    left.set(xlabel="tokens of the answer", ylabel="seconds for a batch")
    left.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    left.set_title("width 384, depth 8, batch 16", fontsize=10)
    for y, row in enumerate(rows):
        low, high = (1 / r for r in row["ratio_spread"])
        right.plot([low, high], [y, y], "-", color="#999999", linewidth=1.2)
        right.plot([1 / row["ratio"]], [y], "o", color="#D55E00")
    sizes = [row["size"] for row in rows]
    right.set_yticks(range(len(rows)), [f"{s['answer']} tokens, batch {s['batch']}, width {s['width']}" for s in sizes])
    right.set(xlabel="times faster (line: least and greatest ratio)")
    right.axvline(1, color="#999999", linestyle=":", linewidth=1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"{record['device']}, threads: {record['environment']['threads']}", fontsize=10)
    return {"concept_states": figure}
