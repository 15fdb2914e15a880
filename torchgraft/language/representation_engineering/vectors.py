"""Reading vectors: directions of the residual stream in which two kinds of text differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchgraft.language._access import Access, captured, tokenized
from torchgraft.surgery import evaluating

Method = Literal["pca_center", "pca_diff", "mean_diff", "random"]
METHODS: tuple[Method, ...] = ("pca_center", "pca_diff", "mean_diff", "random")


@torch.no_grad()
def hidden_at(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], layers: Iterable[int], token: int = -1, batch_size: int = 32
) -> dict[int, Tensor]:
    """Outputs of layers at one token of each text: (texts, D) in float32, by layer; without dropout.

    Args:
        model: see ``ReadingVectors.from_pairs``.
        tokenizer: of transformers.
        texts: read one by one, in batches.
        layers: indices of blocks, from 0.
        token: its place among the tokens of the text, -1 for the last.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: when a text is too short for ``token``, or for batches of less than one text.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    access, layers = Access(model), list(layers)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    device = access.unembedding.device
    for start in range(0, len(texts), batch_size):
        batch = tokenized(tokenizer, texts[start : start + batch_size], device)
        lengths = batch["attention_mask"].sum(1)
        if not (-lengths.min() <= token < lengths.min()):
            raise ValueError(f"token must be a place in every text, got {token} for one of {int(lengths.min())} tokens")
        place = lengths + token if token < 0 else torch.full_like(lengths, token)
        with evaluating(model), captured(model, layers) as outputs:
            access.base(**batch)
        for layer in layers:
            found[layer].append(outputs[layer][torch.arange(len(place)), place].float())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def direction(positive: Tensor, negative: Tensor, method: Method = "pca_center", seed: int = 0) -> Tensor:
    """A unit vector (D,) along which ``positive`` (n, D) lies above ``negative`` (n, D), row against row.

    - ``pca_center``: principal axis of the pairs about their middles, which is that of their uncentred differences.
      RepE (section 3.1 there) draws the sign of each difference at random before a PCA; this is the same for all signs
      at once. Called so in repeng.
    - ``pca_diff``: principal axis of the differences after their mean is taken away, as in repeng. What all pairs have
      in common is the mean, so this finds what distinguishes the pairs among each other; kept for parity.
    - ``mean_diff``: the mean of the differences.
    - ``random``: a direction of ``seed`` that knows nothing of the pairs, as a control; its sign is left as drawn.

    The sign of the axes is that by which more pairs have their positive text above, and of ties the mean's.

    Raises:
        ValueError: for an unknown method, shapes that differ, states that are not finite, or differences that are all
            zero (``pca_diff``: all the same, which leaves it nothing).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if positive.shape != negative.shape or positive.dim() != 2 or len(positive) < 1:
        raise ValueError(f"need pairs of states (n, D), got {tuple(positive.shape)} and {tuple(negative.shape)}")
    if not (positive.isfinite().all() and negative.isfinite().all()):
        raise ValueError("states must be finite; in float16 they may overflow, use float32 or bfloat16")
    if method == "random":
        drawn = torch.randn(positive.shape[1], generator=torch.Generator().manual_seed(seed))
        return drawn / drawn.norm()
    differences = (positive - negative).double()
    mean = differences.mean(0)
    if method == "mean_diff":
        axis = mean
    else:
        centred = differences - mean if method == "pca_diff" else differences
        # up to rounding: what is left of equal differences points anywhere
        if method == "pca_diff" and centred.norm() <= 1e-6 * differences.norm():
            raise ValueError(
                "pca_diff takes away what all pairs have in common, and these pairs differ in nothing else; give more "
                "pairs, or use pca_center or mean_diff"
            )
        axis = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        above = (differences @ axis).sign().sum()
        if above < 0 or (above == 0 and mean @ axis < 0):
            axis = -axis
    if not differences.any() or not axis.norm() > 0:
        raise ValueError("positive and negative states are the same; give pairs of texts that differ")
    return (axis / axis.norm()).float()


def separability(positive: Tensor, negative: Tensor, method: Method, seed: int = 0) -> float:
    """The share of pairs that a direction found without them puts in the right order, over up to five folds.

    One half is chance: directions are never judged on the pairs that they came from.

    Raises:
        ValueError: for fewer than two pairs (``pca_diff``: three).
    """
    n = len(positive)
    if n < (least := 3 if method == "pca_diff" else 2):
        raise ValueError(f"need at least {least} pairs to judge {method} on pairs that it was not found on, got {n}")
    folds = torch.arange(n) % min(5, n)
    right = []
    for fold in folds.unique():
        away = folds == fold
        axis = direction(positive[~away], negative[~away], method, seed)
        gap = (positive[away] - negative[away]) @ axis
        right.append((gap > 0).float() + 0.5 * (gap == 0))
    return torch.cat(right).mean().item()


@dataclass(frozen=True)
class ReadingVectors:
    """Unit directions by layer.

    Attributes:
        directions: (D,) float32 for each block at whose output it was read and is to be added, counted from 0.
        separability: for each of these the share of pairs told apart by a direction found without them; 0.5 is chance.
        model_type: ``config.model_type`` of the model that they belong to.
        method: how they were found.
    """

    directions: Mapping[int, Tensor]
    model_type: str
    separability: Mapping[int, float] = field(default_factory=dict)
    method: str = "given"

    def __post_init__(self) -> None:
        if not self.directions:
            raise ValueError("directions must not be empty")
        for layer, v in self.directions.items():
            if not isinstance(v, Tensor):
                raise TypeError(f"directions must be tensors, got {type(v).__name__} for layer {layer}")
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ValueError(f"layers must be whole numbers from 0, got {layer!r}")
        widths = {tuple(v.shape) for v in self.directions.values()}
        if len(widths) > 1 or len(next(iter(widths))) != 1:
            raise ValueError(f"directions must be vectors of one width, got shapes {sorted(widths)}")
        if not all(torch.isfinite(v).all() for v in self.directions.values()):
            raise ValueError("directions must be finite")

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have a direction."""
        return tuple(sorted(self.directions))

    @property
    def width(self) -> int:
        """D."""
        return len(next(iter(self.directions.values())))

    @classmethod
    def from_pairs(
        cls,
        model: nn.Module,
        tokenizer: Any,
        pairs: Sequence[tuple[str, str]],
        layers: Sequence[int] | None = None,
        method: Method = "pca_center",
        *,
        token: int = -1,
        batch_size: int = 32,
        seed: int = 0,
    ) -> ReadingVectors:
        """Find directions from pairs of texts that differ in what is to be steered.

        Args:
            model: a transformers language model of a family of this room (GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma,
                Phi, OPT, BERT), also inside a peft model.
            tokenizer: its tokenizer.
            pairs: (positive, negative) texts, at least two (``pca_diff``: three).
            layers: blocks, negative ones counted from the end; all where None. The paper takes the fifth to last fifth
                (blocks -18 to -22 of 7B and 8B models).
            method: see ``direction``.
            token: whose state is read; -1 is the last.
            batch_size: texts in a forward pass.
            seed: of ``random``.

        Returns:
            Directions, with how well they tell pairs apart that they were not found on.

        Raises:
            TypeError: for a model of another kind, or pairs that are not pairs of texts.
            ValueError: for fewer than two pairs, a missing layer, or pairs whose states are all the same.

        Example:
            >>> pairs = [("I feel happy", "I feel sad"), ("what a joy", "what a pity")]
            >>> vectors = ReadingVectors.from_pairs(model, tokenizer, pairs, layers=[-2])  # doctest: +SKIP
        """
        access, pairs = Access(model), list(pairs)
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                raise TypeError(f"pairs must be (positive, negative) texts, got {pair!r}")
        if len(pairs) < 2:
            raise ValueError(f"need at least two pairs, got {len(pairs)}")
        count = len(access.layers)
        chosen = range(count) if layers is None else layers
        if not len(chosen):
            raise ValueError("layers must name at least one block, got none")
        for layer in chosen:
            access.layer(layer)
        chosen = sorted({layer % count for layer in chosen})
        texts = [text for pair in pairs for text in pair]
        states = hidden_at(model, tokenizer, texts, chosen, token, batch_size)
        sides = {layer: (h[::2].cpu(), h[1::2].cpu()) for layer, h in states.items()}
        return cls(
            {layer: direction(*both, method, seed) for layer, both in sides.items()},
            access.base.config.model_type,
            {layer: separability(*both, method, seed) for layer, both in sides.items()},
            method,
        )

    def check(self, model: nn.Module) -> None:
        """Whether these belong to a model.

        Raises:
            ValueError: for vectors of another kind of model, another width, or layers that it lacks.
        """
        access = Access(model)
        kind = access.base.config.model_type
        if self.model_type != kind:
            raise ValueError(f"these vectors are of a {self.model_type!r} model, and the model is {kind!r}")
        if self.width != access.hidden_size:
            raise ValueError(f"vectors have width {self.width}, the model {access.hidden_size}")
        for layer in self.layers:
            access.layer(layer)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        about = {
            "model_type": self.model_type,
            "method": self.method,
            "separability": json.dumps({str(k): v for k, v in self.separability.items()}),
        }
        save_file({f"direction.{k}": v.contiguous() for k, v in self.directions.items()}, path, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> ReadingVectors:
        """Read what ``save`` wrote.

        Raises:
            ValueError: for a safetensors file that holds something else.
        """
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            names = list(file.keys())
            if "model_type" not in about or not all(n.removeprefix("direction.").isdigit() for n in names):
                raise ValueError(f"{path} does not hold reading vectors; its tensors are {names[:5]}")
            directions = {int(name.removeprefix("direction.")): file.get_tensor(name) for name in names}
        told = {int(k): float(v) for k, v in json.loads(about.get("separability", "{}")).items()}
        return cls(directions, about["model_type"], told, about.get("method", "given"))

    def to_gguf(self, path: str | Path) -> None:
        """Write a control vector as repeng and llama.cpp read it: ``direction.LAYER``, of layer outputs from 0."""
        import gguf

        writer = gguf.GGUFWriter(str(path), "controlvector")
        writer.add_string("controlvector.model_hint", self.model_type)
        writer.add_uint32("controlvector.layer_count", len(self.directions))
        for layer in self.layers:
            writer.add_tensor(f"direction.{layer}", self.directions[layer].float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @classmethod
    def from_gguf(cls, path: str | Path) -> ReadingVectors:
        """Read a control vector of repeng; lengths are kept as they are there.

        Raises:
            ValueError: for a file that is not a control vector.
        """
        import gguf

        reader = gguf.GGUFReader(str(path))
        hint = reader.get_field("controlvector.model_hint")
        directions = {}
        for tensor in reader.tensors:
            _, _, layer = tensor.name.partition("direction.")
            if layer.isdigit():
                directions[int(layer)] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        if hint is None or not directions:
            raise ValueError(f"{path} is not a control vector: no controlvector.model_hint or no direction.LAYER")
        return cls(directions, bytes(hint.parts[-1]).decode(), method="gguf")
