"""Weights of single heads as the residual stream sees them, and their singular components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchgraft.language._access import Access, norm_gain

# letters of shapes: L layers, H heads, D model width, d head width


@dataclass(frozen=True)
class HeadMatrices:
    """Projections of all heads, for row vectors: ``x @ v @ o`` is what a head writes on reading x with weight 1.

    Attributes:
        q, k, v: (L, H, D, d), the gain of the norm before the attention folded in; with fewer key and value heads than
            query heads they are repeated.
        o: (L, H, d, D); where the next reader's norm takes the mean away, rows have mean zero.
        rotary: whether positions turn queries and keys. The turn is orthogonal: norms of what queries or keys take in
            are the same without it; products of queries and keys are those at distance 0.
    """

    q: Float[Tensor, "L H D d"]
    k: Float[Tensor, "L H D d"]
    v: Float[Tensor, "L H D d"]
    o: Float[Tensor, "L H d D"]
    rotary: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Layers, heads, model width, head width."""
        layers, heads, width, head = self.q.shape
        return layers, heads, width, head

    def check(self, layer: int, head: int) -> None:
        """Refuse a head that there is not.

        Raises:
            ValueError: naming what there is.
        """
        check_head(*self.shape[:2], layer, head)


def check_head(layers: int, heads: int, layer: int, head: int) -> None:
    """Refuse a head that there is not."""
    if not 0 <= layer < layers or not 0 <= head < heads:
        raise ValueError(f"head must be (0..{layers - 1}, 0..{heads - 1}), got ({layer}, {head})")


def head_matrices(model: nn.Module, *, fold: bool = True) -> HeadMatrices:
    """Projections of all heads, in float32 or the model's own dtype where that is finer.

    Biases are left out, as in scores of composition. Queries and keys of Qwen3 and Gemma 3 are normalised after their
    projection: the gain of that norm is folded in, its division is not, which leaves directions as they are. Gemma 2
    and 3 normalise what the attention adds: that gain goes into ``o``, its division does not.

    Args:
        model: a transformers model of a family of the language room, also inside a peft model.
        fold: fold the gains of norms into the projections, and take the mean away from what is written where the model
            has LayerNorms; otherwise weights are as stored.

    Raises:
        TypeError: for a model of another kind.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> head_matrices(toy_model()[0]).shape
        (2, 2, 32, 16)
    """
    access = Access(model)
    layers = [layer_matrices(access, index, fold=fold) for index in range(len(access.layers))]
    q, k, v, o = (torch.stack(parts) for parts in zip(*layers, strict=True))
    return HeadMatrices(q, k, v, o, rotary=access.family.rotary)


def layer_matrices(access: Access, index: int, *, fold: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``q, k, v, o`` of one layer, as in ``HeadMatrices``."""
    weights = access.head_weights(index)
    q, k, v, o = (
        w.detach().to(torch.promote_types(w.dtype, torch.float32)) for w in (weights.q, weights.k, weights.v, weights.o)
    )
    if not fold:
        return q, k, v, o
    norm = access.attention_norm(index)
    gain = norm_gain(norm, access.hidden_size).detach().to(q)[:, None]
    q, k, v = gain * q, gain * k, gain * v
    if access.family.normed:
        attention = access.attention(index)
        q, k = (
            part * norm_gain(attention.get_submodule(name), access.head_dim).detach().to(part)
            for part, name in ((q, "q_norm"), (k, "k_norm"))
        )
    added = added_gain(access, index)
    if added is not None:
        o = o * added.to(o)
    if isinstance(norm, nn.LayerNorm):
        o = o - o.mean(-1, keepdim=True)
    return q, k, v, o


def added_gain(access: Access, index: int) -> Tensor | None:
    """Gain (D,) of the norm that what the attention adds passes in Gemma 2 and 3; None elsewhere."""
    if access.family.added[0] != "post_attention_layernorm":
        return None
    return norm_gain(access.site(index, "attention"), access.hidden_size).detach()


class Components(NamedTuple):
    """Singular components of one head or many: ``read @ diag(strength) @ write``.

    Attributes:
        read: (..., D, d), columns along which a component reads.
        strength: (..., d), singular values, falling.
        write: (..., d, D), rows along which it writes (of ``qk``: what its keys are read along).
    """

    read: Tensor
    strength: Tensor
    write: Tensor


def _product_svd(left: Tensor, right: Tensor) -> Components:
    """SVD of ``left @ right`` (..., D, d) (..., d, D) from d x d numbers alone; nothing of D x D is formed."""
    if not (left.isfinite().all() and right.isfinite().all()):
        raise ValueError("the model's weights must be finite, got NaN or infinity in a head")
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT)
    return Components(q_left @ u, s, vh @ q_right.mT)


def head_svd(model: nn.Module | HeadMatrices, layer: int, head: int, kind: Literal["ov", "qk"] = "ov") -> Components:
    """Singular components of what a head writes (``ov``) or of how it scores (``qk``), section 3 of the paper.

    Signs come in pairs: ``read`` and ``write`` of a component may both be turned around.

    Args:
        model: as in ``head_matrices``, or its result.
        layer, head: which.
        kind: ``W_V W_O`` or ``W_Q W_K^T``.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for a head that there is not, another kind, or weights that are not finite.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> read, strength, write = head_svd(toy_model()[0], 0, 1)
        >>> read.shape, strength.shape, write.shape
        (torch.Size([32, 16]), torch.Size([16]), torch.Size([16, 32]))
    """
    if kind not in ("ov", "qk"):
        raise ValueError(f"kind must be 'ov' or 'qk', got {kind!r}")
    if isinstance(model, HeadMatrices):
        model.check(layer, head)
        q, k, v, o = (part[layer, head] for part in (model.q, model.k, model.v, model.o))
    else:
        access = Access(model)
        check_head(len(access.layers), access.heads, layer, head)
        q, k, v, o = (part[head] for part in layer_matrices(access, layer))
    return _product_svd(v, o) if kind == "ov" else _product_svd(q, k.mT)


def written(matrices: HeadMatrices) -> Components:
    """Components of what all heads write, (L, H, ...) each."""
    return _product_svd(matrices.v, matrices.o)
