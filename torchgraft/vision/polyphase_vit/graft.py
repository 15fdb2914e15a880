"""Making a model that somebody else wrote and trained indifferent to cyclic shifts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from torchgraft import surgery
from torchgraft.vision.polyphase_vit.anchor import Norm, check_norm
from torchgraft.vision.polyphase_vit.twins import PolyTwinsSVT

__all__ = ["load_shift_equivariant", "make_shift_equivariant"]

M = TypeVar("M", bound=nn.Module)
_KEY = "polyphase"


def make_shift_equivariant(
    model: M,
    drop_pos_embed: bool = True,
    *,
    peg: bool = True,
    norm: Norm = "filtered",
    invariant: bool = False,
) -> M:
    """Anchor every strided or windowed operation of a vision transformer (paper, 3), weights kept.

    - ViT, DeiT, Dinov2: anchor before the patch embedding; absolute position embeddings go, and a ``CircularPEG`` that
      does nothing yet comes in their place. What position embeddings give to class tokens, and their mean over the
      patches, does not depend on where the image stands and is kept, so that trained layers find what they know. The
      layer norm that the official code adds after the embedding is left out, since trained layers do not expect it.
    - Swin, Swin v2: besides, an anchor before each block's window partition and each patch merging. Relative position
      biases and Swin's own cyclic shift stay; the mask that keeps windows from reaching over the edge of the map goes
      (as in the official code), since cyclic shifts know no edge.
    - ``PolyTwinsSVT`` without anchors: gets them, and convolutions that go round; takes ``norm`` alone.

    What a trained model loses with its position embeddings or masks has to be trained back; the evidence says how far.

    Args:
        model: changed in place. A transformers model of these families, with or without a head, or a module around it.
        drop_pos_embed: ``False`` keeps absolute position embeddings, and with them only part of the effect: answers are
            then the same for shifts within a patch alone, if the grid wins. Warns.
        peg: ``False`` leaves the tokens without any word of position.
        norm: as in ``polyphase_offsets``. ``"l2"`` is the paper's, which ties on images of few grey levels and, after a
            layer norm, on nearly all tokens.
        invariant: instead of all this, roll each image to one place before the model, which is otherwise left as it
            is. All cyclic shifts then give the same answer to the last bit, with position embeddings and all; but the
            model sees images cut open where it was not trained to.

    Returns:
        The same model. Its outputs and calling convention are as before; images need a size that is a multiple of the
        patch (and, in Swin, of the windows of all stages), and any such size, also one that is not square, will do.
        Patch tokens stand on the anchored grid; for dense outputs of a ViT anchor first yourself, see
        ``polyphase_unanchor``.

    Raises:
        TypeError: for a model of another family.
        ValueError: for one that was made so already, an unknown norm, or settings that a ``PolyTwinsSVT`` does not
            have. The model is then as it was.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4)).eval()
        >>> model = make_shift_equivariant(model)
        >>> x = torch.rand(2, 3, 16, 16)
        >>> torch.allclose(model(x).logits, model(x.roll((3, 5), (2, 3))).logits, atol=1e-5)
        True
    """
    check_norm(norm)
    if isinstance(model, PolyTwinsSVT):
        if model.config.anchored:
            raise ValueError("model is anchored already")
        if invariant or not (drop_pos_embed and peg):
            raise ValueError(
                "a PolyTwinsSVT takes norm alone: it has no absolute position embeddings, and its own convolutions say "
                "where tokens stand. For invariant=True put a PolyphaseAnchor(patch, invariant=True) before it"
            )
        model.anchor_(norm)
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    families = "ViT, DeiT, Dinov2, Swin and Swinv2 models of transformers, and PolyTwinsSVT"
    try:
        from torchgraft.vision.polyphase_vit import transformers_layers as layers
    except ImportError as missing:
        raise ImportError(f"make_shift_equivariant works on {families}; pip install transformers") from missing
    if surgery.find(model, tuple(layers.EMBEDDINGS.values())):
        raise ValueError("model is anchored already")
    found = surgery.find(model, lambda _, module: type(module) in layers.EMBEDDINGS)
    if not found:
        raise TypeError(f"model must be one of, or hold one of, {families}; nothing in {type(model).__name__} is known")
    if not drop_pos_embed and not invariant:
        warnings.warn(
            "with its absolute position embeddings kept, the model's answer may change with every shift; drop them, or "
            "choose invariant=True",
            UserWarning,
            stacklevel=2,
        )
    drop = drop_pos_embed and not invariant
    multiple = layers.multiple_of(model, found[0].module, windows=not invariant)

    def target(_: str, module: nn.Module) -> bool:
        inner = not invariant and (type(module) in layers.LAYERS or type(module) in layers.MERGING)
        return type(module) in layers.EMBEDDINGS or inner

    def make(old: nn.Module) -> nn.Module:
        if type(old) in layers.EMBEDDINGS:
            return layers.embeddings_of(old, multiple, norm, invariant, drop, peg)
        return layers.layer_of(old, norm)

    surgery.replace(model, target, make)
    if hasattr(model, "config"):
        settings = {"drop_pos_embed": drop_pos_embed, "peg": peg, "norm": norm, "invariant": invariant}
        setattr(model.config, _KEY, settings)
    return model


def load_shift_equivariant(kind: type[M], folder: str | Path, **kwargs: Any) -> M:
    """Load what ``save_pretrained`` wrote of a model that ``make_shift_equivariant`` changed.

    ``kind.from_pretrained`` by itself would make the plain model and find other parameters than it has.

    Args:
        kind: class of the model, such as ``transformers.ViTForImageClassification``.
        folder: given to ``save_pretrained``.
        kwargs: for ``from_pretrained``, for instance ``dtype``.

    Raises:
        ValueError: for a folder without such a model, or one in which parameters are missing or unknown.
    """
    config = Path(folder) / "config.json"
    if not config.is_file() or _KEY not in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(f"{folder} holds no model that make_shift_equivariant changed and save_pretrained wrote")
    settings = json.loads(config.read_text(encoding="utf-8"))[_KEY]

    class Changed(kind):  # type: ignore[valid-type, misc]
        def __init__(self, config: Any, *args: Any, **more: Any) -> None:
            super().__init__(config, *args, **more)
            with warnings.catch_warnings():
                # whoever saved it was told
                warnings.simplefilter("ignore", UserWarning)
                make_shift_equivariant(self, **settings)

    # the names in the file may be older than those in the class, and from_pretrained knows both
    model, found = Changed.from_pretrained(folder, output_loading_info=True, **kwargs)
    wrong = {what: sorted(found[what]) for what in ("missing_keys", "unexpected_keys") if found[what]}
    if wrong:
        raise ValueError(f"{folder} does not hold the parameters of {kind.__name__}: {wrong}")
    model.__class__ = kind
    return model
