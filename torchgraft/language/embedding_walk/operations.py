"""Two kinds of operation: those that work on each token alone, and those that bring tokens together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchgraft.surgery import evaluating

Kind = Literal["filter", "aggregate", "data-dependent aggregate", "no tokens"]


@dataclass(frozen=True)
class Operation:
    """One module.

    Attributes:
        name, type: in the model, and its class.
        kind: ``filter`` works on each token alone; ``aggregate`` brings tokens together by fixed weights, and
            ``data-dependent aggregate`` by weights that come from the data; ``no tokens`` has no axis of tokens in its
            input.
        parameters: its own, those of operations inside it left out.
        flops: of one run on the example, likewise; as far as torch counts them (products of matrices, convolutions and
            attention).
        norm: mean length of what it gives for a token.
    """

    name: str
    type: str
    kind: Kind
    parameters: int
    flops: int
    norm: float


@dataclass
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def _main(output: Any) -> Tensor | None:
    """The tensor that a module gives: itself, or the first of a tuple or of a transformers output."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return _main(output[0]) if isinstance(output, tuple) and output else None


def _axis(x: Tensor, length: int, name: str) -> int | None:
    # the first axis is the batch
    found = [axis for axis in range(1, x.dim()) if x.shape[axis] == length]
    if len(found) > 1:
        raise ValueError(
            f"example must have a number of tokens that no other axis has, got {length} and {tuple(x.shape)} in "
            f"{name or 'the model'}"
        )
    return found[0] if found else None


def _out_axis(module: nn.Module, output: Tensor, length: int, name: str) -> int | None:
    # a causal convolution pads both sides, and its caller cuts off what is too much
    if isinstance(module, nn.Conv1d) and output.dim() == 3 and output.shape[2] >= length:
        return 2
    return _axis(output, length, name)


def _place(call: _Call, length: int, name: str) -> tuple[Any, Tensor, int] | None:
    """Where the tokens come in: key of the argument, tensor, axis."""
    for key, value in [*enumerate(call.args), *call.kwargs.items()]:
        if isinstance(value, Tensor) and value.dtype != torch.bool and "mask" not in str(key):
            axis = _axis(value, length, name)
            if axis is not None:
                return key, value, axis
    return None


def _again(module: nn.Module, call: _Call, key: Any, new: Tensor) -> Tensor:
    args, kwargs = list(call.args), dict(call.kwargs)
    if isinstance(key, int):
        args[key] = new
    else:
        kwargs[key] = new
    found = _main(module(*args, **kwargs))
    assert found is not None
    return found


def _moved(x: Tensor, axis: int, place: int, draw: torch.Generator) -> Tensor:
    """Another token at one place."""
    new = x.clone()
    row = new.select(axis, place)
    if x.is_floating_point():
        noise = torch.randn(row.shape, generator=draw, dtype=torch.float64).to(x)
        row += noise * x.float().std().clamp(min=1e-3).to(x)
    else:
        row.copy_((row == 0).to(x.dtype))
    return new


@contextmanager
def _localised(modules: Iterable[tuple[nn.Module, _Call]], length: int, place: int, base: bool) -> Iterator[None]:
    """Aggregating modules pass on nothing but what a token does to its own place.

    ``base`` records what they give; without it all other places, and what has no tokens, are put back to the record.
    """
    handles = []
    for module, call in modules:

        def hook(module: nn.Module, args: Any, output: Any, call: _Call = call) -> Any:
            found = _main(output)
            assert found is not None
            if base:
                call.output = found
                return None
            axis = _out_axis(module, found, length, "")
            new = call.output.clone()
            if axis is not None:
                new.select(axis, place).copy_(found.select(axis, place))
            if isinstance(output, Mapping):
                changed: Any = copy.copy(output)
                changed[next(iter(output))] = new
                return changed
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handles.append(module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _response(
    module: nn.Module, call: _Call, length: int, name: str, inside: Sequence[tuple[nn.Module, _Call]], x: Tensor,
    key: Any, axis: int, draw: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a change at one place does to the outputs at all others, and the output before it."""
    place = length // 2
    with _localised(inside, length, place, base=True):
        before = _again(module, call, key, x).clone()
    with _localised(inside, length, place, base=False):
        after = _again(module, call, key, _moved(x, axis, place, draw))
    change = (after - before).double()
    out = _out_axis(module, change, length, name)
    if out is None:
        return change, before
    return change.index_fill(out, torch.tensor([place], device=change.device), 0.0), before


def _kind(module: nn.Module, call: _Call, length: int, name: str, inside: Sequence[tuple[nn.Module, _Call]]) -> Kind:
    found = _place(call, length, name)
    if found is None:
        return "no tokens"
    key, x, axis = found
    draw = torch.Generator().manual_seed(0)
    first, before = _response(module, call, length, name, inside, x, key, axis, draw)
    if first.abs().max() <= 1e-5 * before.abs().max().double().clamp(min=1e-12):
        return "filter"
    if not x.is_floating_point():
        return "data-dependent aggregate"
    # the same change among other tokens
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) * x.float().std().to(x)
    change = _moved(x, axis, length // 2, torch.Generator().manual_seed(0)) - x
    place = length // 2
    with _localised(inside, length, place, base=True):
        other = _again(module, call, key, x + noise).clone()
    with _localised(inside, length, place, base=False):
        after = _again(module, call, key, x + noise + change)
    second = (after - other).double()
    out = _out_axis(module, second, length, name)
    if out is not None:
        second = second.index_fill(out, torch.tensor([place], device=x.device), 0.0)
    low = x.dtype in (torch.float16, torch.bfloat16)
    return (
        "data-dependent aggregate" if (second - first).norm() > (0.1 if low else 1e-3) * first.norm() else "aggregate"
    )


@torch.no_grad()
def classify_ops(model: nn.Module, example: Tensor | Mapping[str, Any]) -> list[Operation]:
    """Tell each module of a model: does it filter or aggregate, and do its weights depend on the data (section 7).

    A module is told by what it does: one token is changed, and it aggregates if outputs at other places change; it is
    data dependent if they change otherwise among other tokens. Modules without parts are listed, and those with parts
    that bring tokens together themselves (attention, scans), which is told by keeping what their aggregating parts
    carry to other places still.

    A recurrence with a nonlinearity counts as data dependent: what one token does to the next depends on the state.

    Args:
        model: any module that takes a batch first.
        example: inputs, a tensor (B, T, ...) or keyword arguments with one; T must differ from every other size in the
            model, which tells the axis of tokens apart, also where the model transposes.

    Returns:
        A row for each operation in the order of ``named_modules``. Parts that are called more than once are told by
        their last call.

    Raises:
        ValueError: for an example without tokens, or a number of tokens that is also another size.

    Example:
        >>> from torch import nn
        >>> [op.kind for op in classify_ops(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.randn(2, 7, 4))]
        ['filter', 'filter']
    """
    given = example if isinstance(example, Mapping) else None
    first = next((v for v in given.values() if isinstance(v, Tensor)), None) if given is not None else example
    if not isinstance(first, Tensor) or first.dim() < 2 or first.shape[1] < 3:
        raise ValueError("example must be a tensor (B, T, ...) with at least 3 tokens, or hold one")
    length = first.shape[1]
    calls: dict[nn.Module, _Call] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = _main(output)
        if found is not None and found.is_floating_point():
            calls[module] = _Call(args, kwargs, found)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in model.modules()]
    counter = FlopCounterMode(display=False)
    try:
        # of fused attention torch counts nothing on some devices
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
            if given is not None:
                # a cache would grow when modules are run again
                cacheless = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
                model(**cacheless, **given)
            else:
                model(example)
    finally:
        for handle in handles:
            handle.remove()
    flops = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    root = type(model).__name__

    def counted(name: str) -> int:
        return flops.get(f"{root}.{name}" if name else root, 0)

    found: dict[str, Kind] = {}
    names = {name: module for name, module in model.named_modules() if module in calls}
    with evaluating(model):
        # parts before the modules that hold them
        for name in sorted(names, key=lambda n: -n.count(".") - (n != "")):
            module = names[name]
            below = [other for other in found if other != name and (not name or other.startswith(name + "."))]
            inside = [(names[other], calls[other_module]) for other in below if "aggregate" in found[other]
                      for other_module in [names[other]]]  # fmt: skip
            kind = _kind(module, calls[module], length, name, inside)
            if not any(True for _ in module.children()) or "aggregate" in kind:
                found[name] = kind
    rows = []
    for name in (n for n in names if n in found):
        below = [other for other in found if other != name and (not name or other.startswith(name + "."))]
        # of operations inside operations the inner one counts once
        direct = [o for o in below if not any(o != p and o.startswith(p + ".") for p in below)]
        inner = {id(p) for other in direct for p in names[other].parameters()}
        out = calls[names[name]].output
        axis = _out_axis(names[name], out, length, name)
        norm = out.movedim(axis, 1).flatten(2).float().norm(dim=-1).mean().item() if axis is not None else float("nan")
        rows.append(
            Operation(
                name,
                type(names[name]).__name__,
                found[name],
                sum(p.numel() for p in names[name].parameters() if id(p) not in inner),
                counted(name) - sum(map(counted, direct)),
                norm,
            )
        )
    return rows


def shares(operations: Sequence[Operation]) -> dict[str, dict[str, float]]:
    """Share of parameters and flops, and mean output norm, of each kind."""
    parameters = sum(op.parameters for op in operations) or 1
    flops = sum(op.flops for op in operations) or 1
    result: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(op.kind for op in operations):
        rows = [op for op in operations if op.kind == kind]
        norms = torch.tensor([op.norm for op in rows])
        result[kind] = {
            "operations": float(len(rows)),
            "parameters": sum(op.parameters for op in rows) / parameters,
            "flops": sum(op.flops for op in rows) / flops,
            "norm": float(norms.nanmean()),
        }
    return result
