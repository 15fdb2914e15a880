"""What a head and a hidden unit cost, in multiply-accumulate operations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchgraft.compression.optin.blocks import (
    Block,
    PrunableSpec,
    call,
    evaluating,
    find_blocks,
    first_tensor,
    module_at,
    real_tokens,
    resolve,
    width_in,
    width_out,
)

if TYPE_CHECKING:
    from torchgraft.compression.optin.search import PruneMasks

__all__ = ["MacModel"]


@dataclass(frozen=True)
class MacModel:
    """Multiply-accumulate operations of one example, per head and per hidden unit of every block.

    For a transformer with N tokens, hidden size d and head size e: 3Nde + 2N²e + Ned per head and 2Nd per neuron, as in
    the released code; normalisation, embeddings and the classifier are left out. Several are counted as they are:
    grouped keys, gated units, attention in windows, keys of a reduced image, convolutions.

    Attributes:
        head_macs, neuron_macs: one number per block.
        heads, neurons: how many there are in each block.
        fixed: what no pruning removes; counted for images (stem, patch embedding, shortcuts, classifier).
    """

    head_macs: tuple[float, ...]
    neuron_macs: tuple[float, ...]
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    fixed: float = 0.0

    def __post_init__(self) -> None:
        sizes = {len(x) for x in (self.head_macs, self.neuron_macs, self.heads, self.neurons)}
        if len(sizes) != 1:
            raise ValueError(f"head_macs, neuron_macs, heads and neurons have different lengths: {sorted(sizes)}")

    @staticmethod
    def _only(values: Sequence[float], name: str) -> float:
        if len(set(values)) != 1:
            raise ValueError(f"blocks differ in cost; use {name}s, one number per block")
        return values[0]

    @property
    def head_mac(self) -> float:
        """Cost of a head where it is the same in every block."""
        return self._only(self.head_macs, "head_mac")

    @property
    def neuron_mac(self) -> float:
        """Cost of a hidden unit where it is the same in every block."""
        return self._only(self.neuron_macs, "neuron_mac")

    @property
    def base(self) -> float:
        """Cost of the whole model."""
        return self.fixed + sum(
            h * a + n * b for h, a, n, b in zip(self.heads, self.head_macs, self.neurons, self.neuron_macs, strict=True)
        )

    def total(self, masks: PruneMasks) -> float:
        """Cost of what masks keep.

        Raises:
            ValueError: for masks of another model.
        """
        shapes = tuple(len(m) for m in masks.heads), tuple(len(m) for m in masks.neurons)
        if shapes != (self.heads, self.neurons):
            raise ValueError(
                f"the masks are for {shapes} heads and neurons, the costs for {(self.heads, self.neurons)}"
            )
        kept = sum(int(m.sum()) * cost for m, cost in zip(masks.heads, self.head_macs, strict=True))
        return (
            self.fixed
            + kept
            + sum(int(m.sum()) * cost for m, cost in zip(masks.neurons, self.neuron_macs, strict=True))
        )

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        seq_len: float | None = None,
        *,
        batch: Any = None,
        blocks: Sequence[PrunableSpec] | None = None,
    ) -> MacModel:
        """Costs of a model's units.

        Args:
            model: as in ``optin_scores``.
            seq_len: tokens of an example, for text the mean over a data set (SST-2 25.16, MNLI 39.05, QQP 30.55,
                QNLI 50.97, STS-B 31.47, MRPC 53.24, RTE 64.59, CoLA 11.67 in the released code).
            batch: instead of ``seq_len``: with ``input_ids``, the mean number of tokens that are no padding is taken;
                with anything else the model is run once and everything is counted as it is.
            blocks: as in ``optin_scores``; pass the scores' blocks where they may run in another order than they are
                defined in.

        Raises:
            ValueError: when neither or both are given, or ``seq_len`` is not above 0, or cannot tell the cost of a
                convolution.

        Example:
            >>> from transformers import BertConfig, BertModel
            >>> with torch.device("meta"):
            ...     bert = BertModel(BertConfig())
            >>> round(MacModel.from_model(bert, 39.05).neuron_mac)
            59981
        """
        if (seq_len is None) == (batch is None):
            raise ValueError("give seq_len or batch, one of the two")
        if seq_len is not None and not seq_len > 0:
            raise ValueError(f"seq_len must be above 0, got {seq_len}")
        specs = tuple(blocks) if blocks is not None else find_blocks(model)
        with torch.inference_mode(False), evaluating(model):
            found = resolve(model, specs)
            if seq_len is None and not (hasattr(batch, "keys") and "input_ids" in batch):
                return _counted(model, batch, found)
            if seq_len is None:
                real = real_tokens(batch)
                seq_len = float(real.sum(1).double().mean()) if real is not None else float(batch["input_ids"].shape[1])
            return _by_length(model, found, seq_len)


def _modules(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    return [module_at(model, name) for name in names]


def _head_macs(model: nn.Module, block: Block, tokens: Any, keys: float) -> float:
    """One head's share of the projections and of the attention itself."""
    if block.attention_out is None:
        return 0.0
    spec, out = block.spec, block.attention_out
    if not spec.qkv:
        raise ValueError(f"the cost of heads needs qkv in the spec of {spec.attention_out!r}")
    size = width_in(out, "") / spec.n_heads
    made = sum(
        tokens(m) * width_in(m, name) * width_out(m, name) / spec.n_heads
        for m, name in zip(_modules(model, spec.qkv), spec.qkv, strict=True)
    )
    queries = tokens(out)
    return made + 2 * queries * keys * size + queries * size * width_out(out, "")


def _layer_macs(module: nn.Module, places: float) -> float:
    """Multiply-accumulate operations of a linear layer or convolution at so many places of its output."""
    if isinstance(module, nn.Conv2d):
        return places * module.weight.numel()
    if isinstance(module, nn.BatchNorm2d):
        return 0.0
    return places * width_in(module, "") * width_out(module, "")


def _by_length(model: nn.Module, blocks: list[Block], n: float) -> MacModel:
    head_macs, neuron_macs = [], []
    for block in blocks:
        layers = [*_modules(model, block.spec.ffn_in), *([block.ffn_out] if block.ffn_out is not None else [])]
        if any(isinstance(layer, nn.Conv2d) for layer in layers):
            raise ValueError("seq_len cannot tell the cost of convolutions; give batch= instead")
        head_macs.append(_head_macs(model, block, lambda _: n, n))
        neuron_macs.append(sum(_layer_macs(layer, n) for layer in layers) / max(block.width, 1))
    return MacModel(
        tuple(head_macs), tuple(neuron_macs), tuple(b.heads for b in blocks), tuple(b.width for b in blocks)
    )


def _counted(model: nn.Module, batch: Any, blocks: list[Block]) -> MacModel:
    """Everything as it runs: tokens, windows and places of every linear layer and convolution."""
    places: dict[nn.Module, float] = {}
    lengths: dict[nn.Module, int] = {}
    examples = len(first_tensor(batch))

    def count(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        channels = out.shape[1] if isinstance(module, nn.Conv2d) else out.shape[-1]
        places[module] = places.get(module, 0.0) + out.numel() / max(channels, 1) / examples
        lengths[module] = args[0].shape[-2]

    kinds = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) or type(m).__name__ == "Conv1D"]
    with torch.no_grad(), ExitStack() as stack:
        for module in kinds:
            stack.callback(module.register_forward_hook(count).remove)
        call(model, batch)
    head_macs, neuron_macs, prunable = [], [], set[nn.Module]()
    for block in blocks:
        layers = [*_modules(model, block.spec.ffn_in), *([block.ffn_out] if block.ffn_out is not None else [])]
        qkv = _modules(model, block.spec.qkv) if block.heads else []
        keys = lengths[qkv[min(1, len(qkv) - 1)]] if qkv else 0
        head_macs.append(_head_macs(model, block, lambda m: places[m], keys))
        neuron_macs.append(sum(_layer_macs(layer, places.get(layer, 0.0)) for layer in layers) / max(block.width, 1))
        prunable.update(layers, qkv, [block.attention_out] if block.attention_out is not None else [])
    fixed = sum(_layer_macs(m, n) for m, n in places.items() if m not in prunable)
    sizes = tuple(b.heads for b in blocks), tuple(b.width for b in blocks)
    return MacModel(tuple(head_macs), tuple(neuron_macs), *sizes, fixed)
