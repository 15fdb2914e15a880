"""Find and replace modules in anybody's model, with a report of what changed, and undo."""

from __future__ import annotations

import fnmatch
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType, UnionType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = ["Match", "NothingMatchedError", "Replaced", "Report", "evaluating", "find", "replace"]

Target = type[nn.Module] | tuple[type[nn.Module], ...] | UnionType | str | Callable[[str, nn.Module], bool]


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
        """Numbers of parameters before and after; those of a lazy module that has not run yet are not counted."""
        before, after = (sum(p.numel() for p in m.parameters() if not is_lazy(p)) for m in (self.old, self.new))
        return before, after


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
        """Put the very modules back that were there before, in the mode (training or not) that the model is in now.

        Their device and dtype are what they were: move the model after undoing, not before.

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
            _carry_modes(entry.new, entry.old)
            for name in entry.names:
                _set(self.model, name, entry.old)
        self.undone = True

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.undone:
            return
        try:
            self.undo()
        except RuntimeError as failure:
            if error is None:
                raise
            # the error inside the block is what the user must see first
            error.add_note(f"and the replacement could not be undone: {failure}")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode until the end of the block; then every part goes back to its own mode, also after an exception.

    What is no module, such as a plain function, is left alone.
    """
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _get(model: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = model
    for part in name.split(".") if name else []:
        found = None if found is None else found._modules.get(part)
    return found


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    parent = _get(model, path)
    assert parent is not None
    # straight into the registry: keeps the order, works for ModuleList and ModuleDict alike, runs no user code
    parent._modules[last] = new


def _kinds(target: Target) -> tuple[Any, ...]:
    if isinstance(target, UnionType):
        return get_args(target)
    if isinstance(target, tuple):
        return target
    return (target,) if isinstance(target, type) else ()


def _test(target: Target) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        return lambda name, module: fnmatch.fnmatchcase(name, target)
    kinds = _kinds(target)
    if kinds and all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        return lambda name, module: isinstance(module, kinds)
    if callable(target) and not isinstance(target, type):
        return target
    raise TypeError(
        f"target must be a module type, several of them, a name (with * and ?), or a function of name and module, "
        f"got {target!r}"
    )


def _describe(target: Target) -> str:
    return " or ".join(kind.__name__ for kind in _kinds(target)) or repr(target)


def find(model: nn.Module, target: Target) -> list[Match]:
    """Modules of a model that match, outermost first; what lies inside a match is not looked at.

    Args:
        model: any module.
        target: a type, a tuple of types or ``A | B`` (subclasses count), a dotted name with ``*`` and ``?``, or a
            function ``(name, module) -> bool``. The model itself is not a candidate.

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


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _home(model: nn.Module, name: str, old: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """Where a module lives: device and dtype of most of its floating-point numbers, else of what is around it."""
    around = [old]
    while name:
        name = name.rpartition(".")[0]
        outer = _get(model, name)
        assert outer is not None
        around.append(outer)
    for module in around:
        kinds: Counter[tuple[torch.device, torch.dtype]] = Counter()
        for tensor in _own_tensors(module):
            if tensor.is_floating_point():
                kinds[tensor.device, tensor.dtype] += 1 if is_lazy(tensor) else tensor.numel()
        if kinds:
            return kinds.most_common(1)[0][0]
    return None


def _move(new: nn.Module, old: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Bring what is the new module's own to a device and dtype; what it took over from the old one stays untouched."""
    inherited = {id(tensor) for tensor in _own_tensors(old)}
    kinds = {t.dtype for t in _own_tensors(new) if t.is_floating_point() and id(t) not in inherited}
    moved: dict[int, Tensor] = {}
    for module in new.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None or id(tensor) in inherited:
                    continue
                # several dtypes in one new module were chosen by whoever made it
                to = dtype if tensor.is_floating_point() and len(kinds) == 1 else tensor.dtype
                if tensor.is_meta and device.type != "meta":
                    raise ValueError(
                        f"make returned a {type(new).__name__} on the meta device for a module on {device}"
                    )
                if id(tensor) not in moved and (tensor.device, tensor.dtype) != (device, to):
                    if device.type == "meta":
                        there = tensor.detach().to(device, to)
                        moved[id(tensor)] = (
                            nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
                        )
                    else:
                        # in place, so that whoever holds this tensor (a tie, an optimiser) keeps it
                        tensor.data = tensor.data.to(device, to)
                held[key] = moved.get(id(tensor), tensor)  # type: ignore[assignment]


def _carry_modes(source: nn.Module, target: nn.Module) -> None:
    # each part's own flag, since parts may disagree (frozen batch norm inside a model in training)
    modes = {name: module.training for name, module in source.named_modules()}
    shared = {id(module) for module in source.modules()}
    for name, module in target.named_modules():
        if id(module) not in shared:
            module.training = modes.get(name, source.training)


def _carry_hooks(old: nn.Module, new: nn.Module) -> None:
    if any(module is old for module in new.modules()):
        # inside a wrapper the old module goes on calling them itself
        return
    for kind in _HOOKS:
        held, own = getattr(old, kind, None), getattr(new, kind, None)
        if held:
            # the very dictionary where possible, so that a handle of the old module's hook can still remove it
            new.__dict__[kind] = OrderedDict({**own, **held}) if own else held
    # without this flag torch takes full backward hooks for the old kind and calls none of them
    if old._is_full_backward_hook is not None:
        new._is_full_backward_hook = old._is_full_backward_hook


def _ties(model: nn.Module) -> list[tuple[nn.Parameter, set[str]]]:
    groups: dict[int, tuple[nn.Parameter, set[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), (parameter, set()))[1].add(name)
    return [group for group in groups.values() if len(group[1]) > 1]


def _untied(before: list[tuple[nn.Parameter, set[str]]], entries: tuple[Replaced, ...]) -> list[tuple[str, ...]]:
    """Groups of names that shared one parameter and do not share one now."""
    places = {place: entry.new for entry in entries for place in entry.names}

    def holds(name: str, parameter: nn.Parameter) -> int:
        for place, new in places.items():
            if name.startswith(f"{place}."):
                inside = dict(new.named_parameters(remove_duplicate=False))
                if any(p is parameter for p in inside.values()):
                    return id(parameter)
                # a new parameter in the old one's place, or something else altogether
                return id(inside.get(name.removeprefix(f"{place}."), new))
        return id(parameter)

    return [tuple(sorted(names)) for parameter, names in before if len({holds(n, parameter) for n in names}) > 1]


def replace(model: nn.Module, target: Target, make: Callable[[nn.Module], nn.Module]) -> Report:
    """Replace every match in place and say what changed.

    A module that the model holds several times is made once and put everywhere. The new module gets the old one's
    training flag, its forward and backward hooks, and its device and dtype (those of what surrounds it where the old
    one has no numbers). The dtype is that of floating-point tensors alone, and only where the new module is of one
    dtype: several were chosen by whoever made it. State-dict hooks are not carried, since they speak of the old one's
    parameters. A new module may hold the old one, or parameters of it, inside: these stay as they are, and the old
    one's hooks stay with it.

    Args:
        model: changed in place; may not match itself.
        target: as in ``find``.
        make: makes the new module from the old one.

    Returns:
        The report; ``report.undo()`` restores the model, ``with replace(…):`` does so at the end.

    Raises:
        NothingMatchedError: when nothing matched.
        TypeError: when ``make`` returns no module.
        ValueError: when it returns one on the meta device for a module that has data. Whatever is raised, the model is
            as it was.

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
        if isinstance(model, _kinds(target)):
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
    entries = tuple(Replaced(match.names, match.module, new) for match, new in zip(found, made, strict=True))
    for entry in entries:
        home = _home(model, entry.names[0], entry.old)
        if home is not None:
            _move(entry.new, entry.old, *home)
    for entry in entries:
        _carry_modes(entry.old, entry.new)
        _carry_hooks(entry.old, entry.new)
        for name in entry.names:
            _set(model, name, entry.new)
    return Report(model, entries, tuple(_untied(before, entries)))
