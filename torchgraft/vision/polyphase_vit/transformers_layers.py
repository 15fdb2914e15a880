"""transformers' own layers with an anchor in front; parameters and their names stay as they are.

Imported only where a transformers model is at hand.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.deit.modeling_deit import DeiTEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.swin.modeling_swin import SwinEmbeddings, SwinLayer, SwinPatchMerging
from transformers.models.swinv2.modeling_swinv2 import Swinv2Embeddings, Swinv2Layer, Swinv2PatchMerging
from transformers.models.vit.modeling_vit import ViTEmbeddings

from torchgraft.vision.polyphase_vit.anchor import (
    CircularPEG,
    Norm,
    PolyphaseAnchor,
    anchor_tokens,
    check_divides,
    check_pixels,
)

M = TypeVar("M", bound=nn.Module)
Grid = tuple[int, int]


def recast(old: nn.Module, kind: type[M]) -> M:
    """A module of another class with the very parameters, submodules and settings of the old one."""
    new = kind.__new__(kind)
    new.__dict__ = old.__dict__ | {held: dict(old.__dict__[held]) for held in ("_parameters", "_buffers", "_modules")}
    return new


class _Embeddings(nn.Module):
    """What the embeddings of all families share."""

    anchor: PolyphaseAnchor
    peg: CircularPEG | None
    multiple: Grid
    position_embeddings: Tensor | None
    patch_embeddings: Any

    def anchored(self, pixel_values: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        if bool_masked_pos is not None:
            raise ValueError(
                "bool_masked_pos does not go with anchoring: the grid it speaks of is chosen anew for each image"
            )
        check_pixels(pixel_values, self.patch_embeddings.projection.in_channels)
        check_divides((pixel_values.shape[2], pixel_values.shape[3]), self.multiple, "an image")
        return self.anchor(pixel_values)


class _ViTEmbeddings(_Embeddings):
    cls_token: nn.Parameter
    dropout: nn.Module

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool | None = None
    ) -> Tensor:
        x = self.anchored(pixel_values, bool_masked_pos)
        if self.position_embeddings is not None:
            more = {} if isinstance(self, Dinov2Embeddings) else {"interpolate_pos_encoding": interpolate_pos_encoding}
            return super().forward(x, **more)
        tokens = self.patch_embeddings(x)
        if self.peg is not None:
            p, q = self.anchor.patch
            tokens = self.peg(tokens, (x.shape[2] // p, x.shape[3] // q))
        special = [t for t in (self.cls_token, getattr(self, "distillation_token", None)) if t is not None]
        return self.dropout(torch.cat([*(t.expand(len(x), -1, -1) for t in special), tokens], 1))


class PolyViTEmbeddings(_ViTEmbeddings, ViTEmbeddings):
    """ViT."""


class PolyDeiTEmbeddings(_ViTEmbeddings, DeiTEmbeddings):
    """DeiT."""


class PolyDinov2Embeddings(_ViTEmbeddings, Dinov2Embeddings):
    """Dinov2."""


class _SwinEmbeddings(_Embeddings):
    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> tuple[Tensor, tuple[int, int]]:
        x = self.anchored(pixel_values, bool_masked_pos)
        tokens, size = super().forward(x, None, interpolate_pos_encoding)
        return (tokens if self.peg is None else self.peg(tokens, size)), size


class PolySwinEmbeddings(_SwinEmbeddings, SwinEmbeddings):
    """Swin."""


class PolySwinv2Embeddings(_SwinEmbeddings, Swinv2Embeddings):
    """Swin v2."""


class _SwinLayer(nn.Module):
    norm: Norm
    window_size: int

    def get_attn_mask(self, *_: Any, **__: Any) -> None:
        """None: the mask keeps apart what meets at the edges of the map, and on a torus there is no edge."""

    def forward(self, hidden_states: Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any) -> Any:
        check_divides(input_dimensions, (self.window_size,) * 2, "a map of tokens")
        anchored = anchor_tokens(hidden_states, input_dimensions, self.window_size, self.norm)
        return super().forward(anchored, input_dimensions, *args, **kwargs)


class PolySwinLayer(_SwinLayer, SwinLayer):
    """Swin."""


class PolySwinv2Layer(_SwinLayer, Swinv2Layer):
    """Swin v2."""


class _PatchMerging(nn.Module):
    anchor_norm: Norm

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        check_divides(input_dimensions, (2, 2), "a map of tokens")
        return super().forward(anchor_tokens(input_feature, input_dimensions, 2, self.anchor_norm), input_dimensions)


class PolySwinPatchMerging(_PatchMerging, SwinPatchMerging):
    """Swin."""


class PolySwinv2PatchMerging(_PatchMerging, Swinv2PatchMerging):
    """Swin v2."""


EMBEDDINGS: dict[type[nn.Module], type[_Embeddings]] = {
    ViTEmbeddings: PolyViTEmbeddings,
    DeiTEmbeddings: PolyDeiTEmbeddings,
    Dinov2Embeddings: PolyDinov2Embeddings,
    SwinEmbeddings: PolySwinEmbeddings,
    Swinv2Embeddings: PolySwinv2Embeddings,
}
LAYERS: dict[type[nn.Module], type[_SwinLayer]] = {SwinLayer: PolySwinLayer, Swinv2Layer: PolySwinv2Layer}
MERGING: dict[type[nn.Module], type[_PatchMerging]] = {
    SwinPatchMerging: PolySwinPatchMerging,
    Swinv2PatchMerging: PolySwinv2PatchMerging,
}


def multiple_of(model: nn.Module, embeddings: nn.Module, windows: bool) -> Grid:
    """Height and width of the images must be multiples of this: patch, and the windows of every stage of a Swin."""
    patch: Any = embeddings.patch_embeddings
    found, stride = [1, 1], 1
    for module in model.modules() if windows else ():
        if type(module) in LAYERS:
            found = [math.lcm(f, stride * int(module.window_size)) for f in found]  # type: ignore[arg-type]
        elif type(module) in MERGING:
            stride *= 2
            found = [math.lcm(f, stride) for f in found]
    p, q = patch.projection.kernel_size
    return found[0] * p, found[1] * q


def embeddings_of(
    old: nn.Module, multiple: Grid, norm: Norm, invariant: bool, drop_pos_embed: bool, peg: bool
) -> _Embeddings:
    """Anchored embeddings in the place of the old ones."""
    new = recast(old, EMBEDDINGS[type(old)])
    projection = new.patch_embeddings.projection
    new.anchor = PolyphaseAnchor(projection.kernel_size, norm, invariant)
    new.multiple, new.peg = multiple, None
    places = new.position_embeddings
    if not drop_pos_embed or places is None:
        return new
    new.position_embeddings = None
    special = ["cls_token", "distillation_token"] if isinstance(new, PolyDeiTEmbeddings) else ["cls_token"]
    special = special if isinstance(new, _ViTEmbeddings) else []
    with torch.no_grad():
        # what these tokens get is the same wherever the image stands, so it can stay
        for i, name in enumerate(special):
            token = getattr(new, name)
            setattr(new, name, nn.Parameter(token + places[:, i : i + 1], requires_grad=token.requires_grad))
        if peg:
            new.peg = CircularPEG(places.shape[-1]).to(places)
            nn.init.zeros_(new.peg.proj.weight)
            assert new.peg.proj.bias is not None
            # and the mean of the places: the tokens then are what the trained layers are used to
            new.peg.proj.bias.copy_(places[0, len(special) :].mean(0))
    return new


def layer_of(old: nn.Module, norm: Norm) -> nn.Module:
    """An anchored window-attention block or patch merging in the place of the old one."""
    if type(old) in LAYERS:
        layer = recast(old, LAYERS[type(old)])
        layer.norm = norm
        return layer
    merging = recast(old, MERGING[type(old)])
    # the layer has a layer norm of that name
    merging.anchor_norm = norm
    return merging
