"""Attentions with parameters of their own, put into models of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.layers._interface import register_attention
from torchgraft.layers.efficient_transformers.modules import LAYER_KINDS, Core, Shape, check_layer, make_core
from torchgraft.surgery import NothingMatchedError

__all__ = ["Converted", "convert_attention"]

_PLACE = "efficient_core"


@dataclass
class Converted:
    """What ``convert_attention`` changed; ``undo()`` puts the attention back that was there."""

    model: Any = field(repr=False)
    kind: str
    names: tuple[str, ...]
    before: str = field(repr=False)
    hooks: list[Any] = field(repr=False, default_factory=list)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {self.kind}" for name in self.names)

    def undo(self) -> None:
        """Remove the cores and use the attention that was in use before."""
        if not self.names:
            raise RuntimeError("this conversion was undone already")
        self.model.set_attn_implementation(self.before)
        self.take_out()

    def take_out(self) -> None:
        """Remove the cores alone, for a model that does not use them."""
        for name in self.names:
            delattr(self.model.get_submodule(name), _PLACE)
        for hook in self.hooks:
            hook.remove()
        self.names = ()


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _first(module: nn.Module, *names: str) -> Any:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            if (found := getattr(holder, name, None)) is not None:
                return found
    raise ValueError(f"{type(module).__name__} has none of {', '.join(names)}; its attention cannot be converted")


def _projections(module: nn.Module) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weight (out, in) and bias of queries, keys and values, as common models name them."""
    for names in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin")):
        layers = [getattr(module, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            return [(layer.weight, layer.bias) for layer in layers]  # type: ignore[union-attr]
    fused = getattr(module, "c_attn", None)
    if fused is not None and fused.weight.shape[1] == 3 * fused.weight.shape[0]:
        weights, biases = fused.weight.T.chunk(3), fused.bias.chunk(3)
        return list(zip(weights, biases, strict=True))
    return None


def _start_from(core: Core, module: nn.Module, copy_weights: bool) -> None:
    if core.kind != "longformer":
        return
    if "position_embeddings" in inspect.signature(inspect.unwrap(type(module).forward)).parameters:
        raise ValueError(
            f"{type(module).__name__} turns queries and keys by rotary embeddings, which global projections of their "
            "own would lack; use register_efficient_attention('longformer', global_tokens=…), which shares them"
        )
    found = _projections(module) if copy_weights else None
    if copy_weights and found is None:
        raise ValueError(f"{type(module).__name__} has no projections that can be copied; pass copy_weights=False")
    for layer, given in zip((core.query_global, core.key_global, core.value_global), found or (), strict=False):
        assert isinstance(layer, nn.Linear)
        weight, bias = given
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


def convert_attention(
    model: Any, kind: str, *, max_length: int | None = None, copy_weights: bool = True, **options: Any
) -> Converted:
    """Give every attention of a transformers model the parameters of a kind, and make it attend so.

    The model keeps its projections. The new parameters are part of ``state_dict()``, under ``efficient_core`` of each
    attention: to load a saved model, make it, convert it in the same way, and load the state dict. Works for models
    that go through transformers' attention interface; kinds without parameters go this way too, and a decoder is
    converted only to kinds that can be causal.

    Args:
        model: changed in place.
        kind: one of ``LAYER_KINDS`` but ``fnet``, ``transformer_xl`` and ``reformer`` with keys of its own.
        max_length: the longest sequence, for kinds with parameters for every position; the model's own by default.
        copy_weights: ``longformer``: global projections start as copies of the local ones, as its authors advise.
        options: of the kind, as for ``EfficientAttention``.

    Returns:
        What was converted, with ``undo()``.

    Raises:
        NothingMatchedError: when no module of the model goes through the interface.
        ValueError: for kinds and options that do not fit; the model is as it was.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = BertModel(small)
        >>> print(convert_attention(model, "linformer", max_length=128, rank=8))
        encoder.layer.0.attention.self: linformer
    """
    if kind in ("fnet", "transformer_xl"):
        raise ValueError(
            f"{kind} does not fit into the attention of a given model; use EfficientAttention, or transformers' own "
            + ("FNetModel" if kind == "fnet" else "recurrence")
        )
    found = {name: module for name, module in model.named_modules() if _uses_interface(module)}
    if not found:
        raise NothingMatchedError(f"no module of {type(model).__name__} uses transformers' attention interface")
    if any(hasattr(module, _PLACE) for module in found.values()):
        raise ValueError(f"{type(model).__name__} was converted already; undo that conversion first")
    cores = {}
    for name, module in found.items():
        check_layer(kind, bool(getattr(module, "is_causal", False)))
        heads = _first(module, "num_attention_heads", "num_heads", "n_heads")
        width = _first(module, "hidden_size", "embed_dim", "dim")
        head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None) or width // heads
        longest = getattr(model.config, "max_position_embeddings", None) if max_length is None else max_length
        core = make_core(kind, Shape(width, heads, head_dim, longest), **options)
        _start_from(core, module, copy_weights)
        weight = next(module.parameters())
        cores[name] = core.to(weight.device, weight.dtype).train(module.training)
    report = Converted(model, kind, tuple(cores), model.config._attn_implementation)
    for name, core in cores.items():
        found[name].add_module(_PLACE, core)
        report.hooks.append(found[name].register_forward_pre_hook(_remember, with_kwargs=True))
    name = f"tg_converted_{kind}"
    register_attention(name, kind, _attend)
    try:
        model.set_attn_implementation(name)
    except Exception:
        report.take_out()
        raise
    return report


def _remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # the interface hands over queries, keys and values; some kinds need what they were projected from
    module.__dict__["_efficient_input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, module: Any, **shared: Any) -> Tensor:
    x = module.__dict__.pop("_efficient_input")
    core: Callable[..., Tensor] = getattr(module, _PLACE)
    return core(q, q if core.kind == "reformer" else k, v, x, **shared)  # type: ignore[attr-defined]


CONVERTIBLE = tuple(kind for kind in LAYER_KINDS if kind not in ("fnet", "transformer_xl"))
"""Kinds that ``convert_attention`` takes."""
