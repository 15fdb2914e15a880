"""Whole models: exponents, ranges of inputs, swapping the layers in, and reconstruction block by block."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
from torchgraft.compression.nupes.reconstruct import Call, Reconstruction, first_tensor, reconstruct_block
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
        return list(calibration.split(batch_size))
    return list(calibration)


def _run(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _run_all(model: nn.Module, batches: Sequence[Any], handles: Sequence[Any]) -> None:
    """Every batch through the model with its hooks on; they go afterwards, also after an exception."""
    try:
        with _still(model):
            for batch in batches:
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no cache of keys and values; restored at the end."""
    modes = {module: module.training for module in model.modules()}
    settings = getattr(model, "config", None)
    cache = getattr(settings, "use_cache", None)
    model.eval()
    if cache:
        settings.use_cache = False  # type: ignore[union-attr]
    try:
        with torch.no_grad():
            yield
    finally:
        if cache:
            settings.use_cache = cache  # type: ignore[union-attr]
        for module, mode in modes.items():
            module.training = mode


def input_ranges(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any]
) -> dict[str, tuple[float, bool]]:
    """Largest magnitude of each module's input over calibration batches, and whether it was ever negative."""
    seen: dict[str, tuple[float, bool]] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0].detach()
            check_finite(x, f"input of layer {name!r}")
            largest, negative = seen.get(name, (0.0, False))
            seen[name] = max(largest, float(x.abs().max())), negative or bool((x < 0).any())

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    _run_all(model, batches, handles)
    unseen = [name for name in modules if name not in seen]
    if unseen:
        raise ValueError(
            f"calibration data never reached layers {unseen}; skip them (skip_modules=) or give other data"
        )
    return {name: (largest or 1.0, negative) for name, (largest, negative) in seen.items()}


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
    ``skip_modules`` names, those inside ``nn.MultiheadAttention`` (which reads their weights itself), and those whose
    weight is shared with another module (tied embeddings). ``summary(model)`` lists what was quantized; the
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
            calibration data, unknown names in ``module_bits``, or nothing to quantize. The model is then as it was.
    """
    modules = _targets(model, config)
    if not modules:
        surgery.replace(model, lambda name, module: False, lambda old: old)  # raises, and says what the model has
    unknown = sorted(set(config.module_bits) - set(modules))
    if unknown:
        raise ValueError(f"module_bits names {unknown}, which are not quantized here; there are {list(modules)}")
    for name, module in modules.items():
        check_finite(float_weight(module), f"weight of layer {name!r}")
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
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        from torchgraft.compression.nupes.hf import attach

        attach(model, config)


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
    model.power_quant_config = config
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
        with _still(model):
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
                f"calibration data never reached {missed}; they are rounded to nearest", UserWarning, stacklevel=3
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
            with _still(model), torch.enable_grad():
                history[unit] = reconstruct_block(
                    _Floats({name.removeprefix(f"{unit}.") if name != unit else "": module for name, module in
                             floats.items() if name == unit or name.startswith(f"{unit}.")}),
                    block, calls, config.steps, config.lr_codes, config.lr_exponent, targets=self.outputs[unit],
                    method="adaround" if config.method == "adaround" else "nupes", learn_codes=config.learn_codes,
                    learn_exponent=config.exponent == "learn", seed=config.seed + number,
                )  # fmt: skip
            with _still(model):
                before = [first_tensor(block(*args, **kwargs)) for args, kwargs in calls]
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
    """The float layers of a block by name, as ``reconstruct_block`` looks them up."""

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
    if hasattr(model, "power_quant_config"):
        del model.power_quant_config
    return model
