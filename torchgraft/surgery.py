"""Find and replace modules in anybody's model, with a report of what changed, and undo."""

from __future__ import annotations

import fnmatch
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

__all__ = ["Match", "NothingMatchedError", "Replaced", "Report", "find", "replace"]

Target = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]


class NothingMatchedError(ValueError):
    """Nothing in the model matched; the message names what the model has instead."""


@dataclass(frozen=True)
class Match:
    """A module that was found.

    Attributes:
        names: every dotted name under which the model holds it; several when it is shared.
        module: the module.
    """

    names: tuple[str, ...]
    module: nn.Module


@dataclass(frozen=True)
class Replaced:
    """One replacement: the names it stands under, the module that was there and the one that is there now."""

    names: tuple[str, ...]
    old: nn.Module
    new: nn.Module

    @property
    def parameters(self) -> tuple[int, int]:
        """Numbers of parameters before and after."""
        return sum(p.numel() for p in self.old.parameters()), sum(p.numel() for p in self.new.parameters())


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass
class Report:
    """What a replacement changed. As a context manager it undoes the replacement at the end.

    Attributes:
        replaced: one entry for each module replaced.
        untied: names of parameters that were one tensor before and are not any more.
    """

    model: nn.Module = field(repr=False)
    replaced: tuple[Replaced, ...]
    untied: tuple[tuple[str, ...], ...] = ()
    undone: bool = False

    def __str__(self) -> str:
        lines = []
        for entry in self.replaced:
            before, after = entry.parameters
            kinds = f"{type(entry.old).__name__} -> {type(entry.new).__name__}"
            lines.append(f"{', '.join(entry.names)}: {kinds}, {before:,} -> {after:,} parameters")
        lines += [f"no longer tied: {', '.join(names)}" for names in self.untied]
        return "\n".join(lines)

    def undo(self) -> None:
        """Put the very modules back that were there before.

        Raises:
            RuntimeError: when it was undone already, or somebody replaced one of the modules since; nothing is changed.
        """
        if self.undone:
            raise RuntimeError("this replacement was undone already")
        for entry in self.replaced:
            for name in entry.names:
                if _get(self.model, name) is not entry.new:
                    raise RuntimeError(f"{name!r} was replaced again since; undo that replacement first")
        for entry in self.replaced:
            for name in entry.names:
                _set(self.model, name, entry.old)
        self.undone = True

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.undone:
            self.undo()


def _get(model: nn.Module, name: str) -> Any:
    for part in name.split("."):
        model = model._modules[part]  # type: ignore[assignment]
    return model


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    *path, last = name.split(".")
    parent = _get(model, ".".join(path)) if path else model
    # straight into the registry: keeps the order, works for ModuleList and ModuleDict alike, runs no user code
    parent._modules[last] = new


def _test(target: Target) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        return lambda name, module: fnmatch.fnmatchcase(name, target)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return lambda name, module: isinstance(module, target)
    if isinstance(target, tuple) and target and all(isinstance(t, type) and issubclass(t, nn.Module) for t in target):
        return lambda name, module: isinstance(module, target)
    if callable(target) and not isinstance(target, type):
        return target
    raise TypeError(
        f"target must be a module type, a tuple of them, a name (with * and ?), or a function of name and module, "
        f"got {target!r}"
    )


def _describe(target: Target) -> str:
    if isinstance(target, type):
        return target.__name__
    if isinstance(target, tuple):
        return " or ".join(t.__name__ for t in target)
    return repr(target)


def find(model: nn.Module, target: Target) -> list[Match]:
    """Modules of a model that match, outermost first; what lies inside a match is not looked at.

    Args:
        model: any module.
        target: a type or tuple of types (subclasses count), a dotted name with ``*`` and ``?``, or a function
            ``(name, module) -> bool``. The model itself is not a candidate.

    Raises:
        TypeError: for a target of another kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> [match.names for match in find(model, nn.Linear)]
        [('0',), ('2',)]
    """
    matches = _test(target)
    names: OrderedDict[int, list[str]] = OrderedDict()
    modules: dict[int, nn.Module] = {}

    def walk(module: nn.Module, prefix: str, above: frozenset[int]) -> None:
        for key, child in module._modules.items():
            # a module that holds itself, as some wrappers do, is entered once
            if child is None or id(child) in above:
                continue
            name = f"{prefix}{key}"
            if matches(name, child):
                names.setdefault(id(child), []).append(name)
                modules[id(child)] = child
            else:
                walk(child, f"{name}.", above | {id(child)})

    walk(model, "", frozenset({id(model)}))
    return [Match(tuple(found), modules[key]) for key, found in names.items()]


def _ties(model: nn.Module) -> list[set[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]


def _fit_in(old: nn.Module, new: nn.Module) -> None:
    """Give the new module the old one's device, dtype, training flag and hooks."""
    sample = next((p for p in [*old.parameters(), *old.buffers()] if p.is_floating_point()), None)
    if sample is not None:
        inherited = {id(t) for t in [*old.parameters(), *old.buffers()]}
        mine = [t for t in [*new.parameters(), *new.buffers()] if id(t) not in inherited]
        if any(t.device != sample.device or (t.is_floating_point() and t.dtype != sample.dtype) for t in mine):
            if sample.device.type == "meta":
                new.to_empty(device=sample.device)
            # casts floating-point tensors alone; whole numbers of quantised layers stay as they are
            new.to(device=sample.device, dtype=sample.dtype)
    # each part's own flag, since parts may disagree (frozen batch norm inside a model in training)
    modes = {name: module.training for name, module in old.named_modules()}
    shared = {id(module) for module in old.modules()}
    for name, module in new.named_modules():
        if id(module) not in shared:
            module.training = modes.get(name, old.training)
    if new is not old:
        for kind in _HOOKS:
            if held := getattr(old, kind, None):
                getattr(new, kind).update(held)
        # without this flag torch takes full backward hooks for the old kind and calls none of them
        if old._is_full_backward_hook is not None:
            new._is_full_backward_hook = old._is_full_backward_hook


def replace(model: nn.Module, target: Target, make: Callable[[nn.Module], nn.Module]) -> Report:
    """Replace every match in place and say what changed.

    A module that the model holds several times is made once and put everywhere. The new module gets the old one's
    device, dtype (floating-point tensors alone), training flag, and forward and backward hooks; state-dict hooks are
    not carried, since they speak of the old one's parameters. A new module may hold the old one inside.

    Args:
        model: changed in place; may not match itself.
        target: as in ``find``.
        make: makes the new module from the old one.

    Returns:
        The report; ``report.undo()`` restores the model, ``with replace(…):`` does so at the end.

    Raises:
        NothingMatchedError: when nothing matched.
        TypeError: when ``make`` returns no module. Whatever ``make`` raises leaves the model as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> report = replace(model, nn.ReLU, lambda old: nn.GELU())
        >>> print(report)
        1: ReLU -> GELU, 0 -> 0 parameters
        >>> report.undo()
        >>> model[1]
        ReLU()
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = find(model, target)
    if not found:
        if not isinstance(target, str) and _test(target)("", model):
            raise NothingMatchedError(
                f"only the model itself ({type(model).__name__}) is {_describe(target)}, and a module cannot be "
                "replaced inside itself; wrap it, or assign the new module to your variable"
            )
        kinds = Counter(type(module).__name__ for module in model.modules() if module is not model)
        has = ", ".join(f"{name} ({count})" for name, count in kinds.most_common(8)) or "no submodules"
        raise NothingMatchedError(f"nothing in {type(model).__name__} matches {_describe(target)}; it has {has}")
    made = []
    for match in found:
        new = make(match.module)
        if not isinstance(new, nn.Module):
            raise TypeError(f"make must return a torch.nn.Module, got {type(new).__name__} for {match.names[0]!r}")
        made.append(new)
    before = _ties(model)
    for match, new in zip(found, made, strict=True):
        with torch.no_grad():
            _fit_in(match.module, new)
        for name in match.names:
            _set(model, name, new)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    untied = []
    for names in before:
        left = [name for name in sorted(names) if name in parameters]
        if len({id(parameters[name]) for name in left}) > 1 or len(left) < len(names):
            untied.append(tuple(sorted(names)))
    entries = tuple(Replaced(match.names, match.module, new) for match, new in zip(found, made, strict=True))
    return Report(model, entries, tuple(untied))
