"""Whole models: exponents, ranges of inputs, swapping the layers in, and reconstruction block by block."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft import surgery
from torchgraft.compression.nupes.config import PowerQuantConfig
from torchgraft.compression.nupes.layers import (
    PowerActivation,
    PowerConv,
    PowerLayer,
    float_weight,
    is_quantizable,
    layer_class,
)
from torchgraft.compression.nupes.quantizer import check_finite
from torchgraft.compression.nupes.reconstruct import Call, Reconstruction, first_tensor, fresh, reconstruct, still
from torchgraft.compression.nupes.search import search_exponent

__all__ = [
    "LayerSummary",
    "choose_exponents",
    "dequantize_model",
    "prepare_model",
    "quantize_model",
    "summary",
]

RECIPROCALS = (1.0, 1 / 2, 1 / 3, 1 / 4)


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """One quantized layer: its name, bits, exponents, weights, and bytes as stored."""

    name: str
    bits: int
    exponents: tuple[float, ...]
    weights: int
    bytes: int


def summary(model: nn.Module) -> list[LayerSummary]:
    """What is quantized in a model, in its order; what is missing here is in floating point.

    Example:
        >>> model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), PowerQuantConfig(exponent=0.5))
        >>> [(row.name, row.bits, row.exponents) for row in summary(model)]
        [('0', 4, (0.5,))]
    """
    return [
        LayerSummary(name, m.bits, tuple(m.exponent.tolist()), m.shape[0] * m.columns, m.bytes())
        for name, m in model.named_modules()
        if isinstance(m, PowerLayer)
    ]


def _targets(model: nn.Module, config: PowerQuantConfig) -> dict[str, nn.Module]:
    """Modules to quantize by their first name: not skipped, and no weight that somebody else holds too."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add(id(module))

    def wanted(name: str, module: nn.Module) -> bool:
        return is_quantizable(module) and not config.skips(name) and len(holders[id(module.weight)]) == 1

    # attribute look-ups such as attention.out_proj.weight in torch's fast path would bypass a quantized layer
    opaque = surgery.find(model, lambda name, module: isinstance(module, nn.MultiheadAttention))
    inside = [f"{name}." for match in opaque for name in match.names]
    found = surgery.find(model, wanted)
    return {m.names[0]: m.module for m in found if not any(n.startswith(p) for n in m.names for p in inside)}


def choose_exponents(modules: Mapping[str, nn.Module], config: PowerQuantConfig) -> dict[str, Tensor]:
    """Exponents by layer, float64 (1,) or (out,): given, or searched on the weights alone."""
    weights = {name: float_weight(module).detach() for name, module in modules.items()}

    def spread(name: str, a: float) -> Tensor:
        return torch.full((len(weights[name]) if config.granularity == "channel" else 1,), a, dtype=torch.float64)

    if isinstance(config.exponent, (int, float)):
        return {name: spread(name, float(config.exponent)) for name in weights}
    candidates = RECIPROCALS if config.integer_only and config.lut_bits is None else None
    by_bits: dict[int, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        by_bits.setdefault(config.bits_of(name), {})[name] = weight
    chosen: dict[str, Tensor] = {}
    for bits, some in by_bits.items():
        found = search_exponent(some, bits, config.p, config.granularity, config.group_size, candidates)
        for name in some:
            value = found if isinstance(found, float) else found[name]
            chosen[name] = value if isinstance(value, Tensor) else spread(name, value)
    return chosen


def _batches(calibration: Any, batch_size: int) -> list[Any]:
    if isinstance(calibration, Tensor):
        return list(calibration.split(batch_size)) if calibration.numel() else []
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration must be a tensor (N, …) or batches of inputs, such as a list of one batch: [batch]; got one "
            f"{type(calibration).__name__}"
        )
    batches = list(calibration)
    odd = {type(b).__name__ for b in batches if not isinstance(b, (Tensor, Mapping, tuple, list))}
    if odd:
        raise TypeError(
            f"batches of calibration must be tensors, tuples of arguments or mappings of keyword arguments, got {odd}"
        )
    return batches


def _run(model: nn.Module, batch: Any) -> Any:
    batch = fresh(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _run_all(model: nn.Module, batches: Sequence[Any], handles: Sequence[Any]) -> None:
    """Every batch through the model with its hooks on; they go afterwards, also after an exception."""
    try:
        with still(model):
            for batch in batches:
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def input_ranges(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any]
) -> dict[str, tuple[float, bool]]:
    """Largest magnitude of each module's input over calibration batches, and whether it was ever negative."""
    seen: dict[str, tuple[float, bool]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            check_finite(x, f"input of layer {name!r}")
            largest, negative = seen.get(name, (0.0, False))
            seen[name] = max(largest, float(x.abs().max())), negative or bool((x < 0).any())

        return hook

    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in modules.items()]
    _run_all(model, batches, handles)
    unseen = [name for name in modules if name not in seen]
    if unseen:
        raise ValueError(
            f"calibration data never reached layers {unseen}; skip them (skip_modules=) or give other data"
        )
    return {name: (largest or 1.0, negative) for name, (largest, negative) in seen.items()}


def _refuse_nothing(model: nn.Module, config: PowerQuantConfig) -> None:
    kind = type(model).__name__
    if is_quantizable(model):
        raise surgery.NothingMatchedError(
            f"the model itself is a {kind}, and a module cannot be replaced inside itself; use "
            "PowerLinear.from_float or PowerConv.from_float, or wrap it in nn.Sequential"
        )
    held = [name for name, module in model.named_modules() if is_quantizable(module)]
    if held:
        raise surgery.NothingMatchedError(
            f"nothing to quantize in {kind}: {held[:8]} are named by skip_modules={config.skip_modules}, share their "
            "weight with another module, or lie inside nn.MultiheadAttention"
        )
    kinds = Counter(type(module).__name__ for module in model.modules() if module is not model)
    has = ", ".join(f"{name} ({count})" for name, count in kinds.most_common(8)) or "no submodules"
    raise surgery.NothingMatchedError(
        f"nothing to quantize in {kind}: no nn.Linear, nn.Conv1d, nn.Conv2d or Conv1D with a weight of its own; it has "
        f"{has}"
    )


def _check_model(model: nn.Module, config: PowerQuantConfig, modules: Mapping[str, nn.Module]) -> None:
    """Raise for what would go wrong later, or silently; everything is still as it was."""
    done = [name for name, module in model.named_modules() if isinstance(module, PowerLayer)]
    if done:
        raise ValueError(
            f"{len(done)} layers are quantized already ({done[:4]} …); give all settings at once, bits of single "
            "layers by module_bits=, or take it back by dequantize_model first"
        )
    if not modules:
        _refuse_nothing(model, config)
    unknown = sorted(set(config.module_bits) - set(modules))
    if unknown:
        raise ValueError(f"module_bits names {unknown}, which are not quantized here; there are {list(modules)}")
    names = [name for name, _ in model.named_modules()]
    usual = PowerQuantConfig().skip_modules
    idle = [s for s in config.skip_modules if s not in usual and not any(n == s or n.endswith(f".{s}") for n in names)]
    if idle:
        warnings.warn(f"skip_modules names {idle}, which this model does not have", UserWarning, stacklevel=4)
    if config.act_bits is not None:
        outer = [n for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
        inside = [n for n in modules if any(n.startswith(f"{o}.") or not o for o in outer)]
        if inside:
            raise ValueError(
                f"act_bits cannot be kept in layers {inside}: the fast path of nn.TransformerEncoderLayer reads their "
                "weights and passes their inputs by; use act_bits=None or skip_modules="
            )
    for name, module in modules.items():
        check_finite(float_weight(module), f"weight of layer {name!r}")


@torch.inference_mode(False)
def quantize_model(
    model: nn.Module,
    config: PowerQuantConfig,
    calibration: Any = None,
    *,
    input_range: Mapping[str, tuple[float, bool]] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> nn.Module:
    """Replace the linear and convolution layers of a model by quantized ones, in place.

    nn.Linear, nn.Conv1d, nn.Conv2d and transformers' Conv1D are replaced wherever they stand, except those that
    ``skip_modules`` names, those inside ``nn.MultiheadAttention`` (which reads their weights itself), those whose
    weight is shared with another module (tied embeddings), computed from other parameters (weight norm,
    parametrizations, pruning masks) or empty. ``summary(model)`` lists what was quantized; the
    configuration with the names filled in is ``model.power_quant_config``. A transformers model can be saved by
    ``save_pretrained`` afterwards.

    Args:
        model: any module; CNNs want their BatchNorm folded first where inputs are quantized (``fold_batchnorm``).
        config: what and how.
        calibration: a tensor (N, …), or batches: tensors, tuples of arguments, or mappings of keyword arguments.
            Needed to learn, and for ``act_bits`` unless ``input_range`` is given. Never labels, never test data.
        input_range: largest magnitude of each layer's input, and whether it can be negative, by name; see
            ``batchnorm_ranges`` for ranges without data.
        progress: called with ``(blocks done, blocks, name)``.

    Returns:
        The model.

    Raises:
        ValueError: for NaN or infinite weights, exponents that the settings do not allow (naming the layer), missing
            calibration data, ranges that are no ranges, unknown names in ``module_bits``, layers that are quantized
            already, or nothing to quantize.
        TypeError: for calibration data that are no batches. Whatever is raised, the model is as it was.
    """
    modules = _targets(model, config)
    _check_model(model, config, modules)
    learns = config.method != "data_free"
    if calibration is None and (learns or (config.act_bits is not None and input_range is None)):
        raise ValueError(
            f"method={config.method!r} with act_bits={config.act_bits} needs calibration data: pass calibration=, a "
            "tensor or batches of inputs"
        )
    batches = [] if calibration is None else _batches(calibration, config.batch_size)
    if calibration is not None and not batches:
        raise ValueError("calibration is empty; give at least one batch")
    exponents = choose_exponents(modules, config)
    made: dict[int, PowerLayer] = {}
    ranges = dict(input_range or {})
    if config.act_bits is not None and input_range is None:
        ranges = input_ranges(model, modules, batches)
    for name, module in modules.items():
        kind, bits = layer_class(module), config.bits_of(name)
        kind.check(module, name, bits, exponents[name], config)
        layer = kind.like(module, bits, config)
        layer.quantize_(module, exponents[name])
        if config.act_bits is not None:
            if name not in ranges:
                raise ValueError(f"input_range has no layer {name!r}; it has {sorted(ranges)}")
            largest, negative = ranges[name]
            if not 0 < largest < float("inf"):
                raise ValueError(f"input_range[{name!r}] must be finite and above 0, got {largest}")
            a = config.act_exponent if config.act_exponent is not None else float(exponents[name][0])
            layer.input_quantizer = PowerActivation(a, config.act_bits, largest, signed=negative).to(layer.scale.device)
        made[id(module)] = layer
    originals = {id(module) for module in modules.values()}
    plan = _Plan.of(model, modules, batches) if learns else None
    report = surgery.replace(model, lambda name, module: id(module) in originals, lambda old: made[id(old)])
    try:
        if plan is not None:
            history = plan.learn(model, report, config, progress)
            model.power_quant_history = history  # type: ignore[assignment]
        resolved = dataclasses.replace(config, quantized={name: config.bits_of(name) for name in modules})
        _remember(model, resolved)
    except BaseException:
        report.undo()
        raise
    return model


def _remember(model: nn.Module, config: PowerQuantConfig) -> None:
    model.power_quant_config = config
    if _is_pretrained(model):
        from torchgraft.compression.nupes.hf import attach

        attach(model, config)


def _is_pretrained(model: nn.Module) -> bool:
    """Whether this is a model of transformers, which is imported already where it is."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


def prepare_model(model: nn.Module, config: PowerQuantConfig) -> nn.Module:
    """Empty quantized layers where ``config.quantized`` names them, ready for ``load_state_dict``; in place.

    Raises:
        ValueError: when the configuration names nothing, or modules that the model does not have.

    Example:
        >>> net = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small = quantize_model(net(), PowerQuantConfig())
        >>> again = prepare_model(net(), small.power_quant_config)
        >>> again.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    if not config.quantized:
        raise ValueError("config.quantized is empty; use model.power_quant_config of a quantized model")
    modules: dict[str, nn.Module] = {}
    for name in config.quantized:
        try:
            modules[name] = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"config.quantized names {name!r}, which this model does not have") from None
        if not is_quantizable(modules[name]):
            raise ValueError(f"{name!r} is a {type(modules[name]).__name__}, which cannot be quantized")
    made: dict[int, PowerLayer] = {}
    for name, module in modules.items():
        layer = layer_class(module).like(module, config.quantized[name], config)
        if config.act_bits is not None:
            layer.input_quantizer = PowerActivation(1.0, config.act_bits, 1.0).to(layer.scale.device)
        made[id(module)] = layer
    surgery.replace(model, lambda name, module: id(module) in made, lambda old: made[id(old)])
    _remember(model, config)
    return model


def blocks_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Units of reconstruction: members of a list, or of a sequence where they are more than sequences; else layers."""
    units: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        for key, child in module._modules.items():
            name = f"{prefix}{key}"
            inside = [m for m in modules if m == name or m.startswith(f"{name}.")]
            if child is None or not inside:
                continue
            member = isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            stage = isinstance(module, nn.Sequential) and not isinstance(
                child, (nn.ModuleList, nn.ModuleDict, nn.Sequential)
            )
            if name in modules or member or stage:
                units.append(name)
            else:
                walk(child, f"{name}.")

    walk(model, "")
    return units


class _Stop(Exception):
    pass


def _calls(model: nn.Module, unit: nn.Module, batches: Sequence[Any]) -> list[Call]:
    """What a block receives, by running the model as far as the block."""
    found: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Stop

    handle = unit.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with still(model):
            for batch in batches:
                with suppress(_Stop):
                    _run(model, batch)
    finally:
        handle.remove()
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return type(a) is type(b)


@dataclasses.dataclass
class _Plan:
    """What the float network does on the calibration data: order of blocks, their inputs and outputs."""

    units: list[str]
    batches: list[Any]
    calls: dict[str, list[Call]]
    outputs: dict[str, list[Tensor]]

    @classmethod
    def of(cls, model: nn.Module, modules: Mapping[str, nn.Module], batches: list[Any]) -> _Plan:
        units = blocks_of(model, modules)
        calls: dict[str, list[Call]] = {}
        outputs: dict[str, list[Tensor]] = {}
        handles = []
        for unit in units:

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, unit: str = unit) -> None:
                calls.setdefault(unit, []).append((args, kwargs))
                outputs.setdefault(unit, []).append(first_tensor(output).clone())

            handles.append(model.get_submodule(unit).register_forward_hook(hook, with_kwargs=True))
        _run_all(model, batches, handles)
        odd = {unit: len(some) for unit, some in calls.items() if len(some) != len(batches)}
        if odd:
            raise ValueError(f"blocks must run once a batch to be learned one by one; calls of {len(batches)}: {odd}")
        missed = [unit for unit in units if unit not in calls]
        if missed:
            warnings.warn(
                f"calibration data never reached {missed}; they are rounded to nearest", UserWarning, stacklevel=4
            )
        return cls(list(calls), batches, calls, outputs)

    def learn(
        self,
        model: nn.Module,
        report: surgery.Report,
        config: PowerQuantConfig,
        progress: Callable[[int, int, str], None] | None,
    ) -> dict[str, Reconstruction]:
        """Reconstruct block after block, inputs from the quantized network, targets from the float one."""
        floats = {name: entry.old for entry in report.replaced for name in entry.names}
        history: dict[str, Reconstruction] = {}
        before: list[Tensor] | None = None
        for number, unit in enumerate(self.units):
            block = model.get_submodule(unit)
            calls = self._inputs(model, block, unit, before)
            history[unit], before = reconstruct(
                _Floats({name.removeprefix(f"{unit}.") if name != unit else "": module for name, module in
                         floats.items() if name == unit or name.startswith(f"{unit}.")}),
                block, calls, config.steps, config.lr_codes, config.lr_exponent, self.outputs[unit],
                "adaround" if config.method == "adaround" else "nupes", config.learn_codes,
                config.exponent == "learn", config.seed + number, None,
            )  # fmt: skip
            if progress is not None:
                progress(number + 1, len(self.units), unit)
        return history

    def _inputs(self, model: nn.Module, block: nn.Module, unit: str, before: list[Tensor] | None) -> list[Call]:
        """Inputs in the quantized network; the outputs of the block before where they are passed on unchanged."""
        if before is not None and self.calls[unit][0][0]:
            chained = [((y, *args[1:]), kw) for y, (args, kw) in zip(before, self.calls[unit], strict=True)]
            if _same(_calls(model, block, self.batches[:1]), chained[:1]):
                return chained
        return _calls(model, block, self.batches)


class _Floats(nn.Module):
    """The float layers of a block by name, as ``reconstruct`` looks them up."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.held = dict(modules)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The layers."""
        yield from self.held.items()


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace quantized layers by float ones that hold the decoded weights, in place; input quantizers go.

    transformers' Conv1D comes back as the nn.Linear that computes the same.

    Example:
        >>> model = quantize_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), PowerQuantConfig())
        >>> dequantize_model(model)[0]
        Linear(in_features=8, out_features=8, bias=True)
    """

    def plain(layer: nn.Module) -> nn.Module:
        assert isinstance(layer, PowerLayer)
        has_bias = layer.bias is not None
        kind = dtype or layer.scale.dtype
        made: nn.Module
        if isinstance(layer, PowerConv):
            make: Any = nn.Conv1d if len(layer.shape) == 3 else nn.Conv2d
            made = make(
                layer.shape[1] * layer.groups, layer.shape[0], layer.shape[2:], layer.stride, layer.padding,
                layer.dilation, layer.groups, has_bias, layer.padding_mode, dtype=kind, device="meta",
            )  # fmt: skip
        else:
            made = nn.Linear(layer.shape[1], layer.shape[0], has_bias, dtype=kind, device="meta")
        made.weight = nn.Parameter(layer.dequantized_weight(kind), requires_grad=False)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().to(kind), requires_grad=layer.bias.requires_grad)
        return made

    surgery.replace(model, PowerLayer, plain)
    for left in ("power_quant_config", "power_quant_history"):
        if hasattr(model, left):
            delattr(model, left)
    if _is_pretrained(model):
        from torchgraft.compression.nupes.hf import detach

        detach(model)
    return model
