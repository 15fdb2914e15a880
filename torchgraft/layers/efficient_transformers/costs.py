"""What a model costs at a length: counted, and timed on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.layers.efficient_transformers.attention import DROP_IN, KINDS, register_efficient_attention

__all__ = ["Advice", "CostModel", "Costs", "advise"]

Inputs = Callable[[int, int], Mapping[str, Tensor]]
"""From length and batch to the keyword arguments of the model."""


@dataclass(frozen=True)
class Costs:
    """Counts for one batch.

    Attributes:
        flops: of a forward pass; a training step takes about three times as many.
        activation_bytes: tensors that the backward pass keeps, parameters excluded.
        kv_cache_bytes: keys and values of a decoder's cache; 0 where the model has none.
        parameter_bytes: of the model.
    """

    flops: int
    activation_bytes: int
    kv_cache_bytes: int
    parameter_bytes: int


def _tokens(model: Any) -> Inputs:
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    if words is None:
        raise ValueError(f"{type(model).__name__} takes no tokens that its config knows of; pass inputs=")
    return lambda n, batch: {"input_ids": torch.arange(n).remainder(words).expand(batch, -1).clone()}


class CostModel:
    """Counts operations and memory of a model without running it: on the meta device.

    Args:
        model: a transformers model, or any module with ``inputs``. It is copied; yours is not touched.
        inputs: from length and batch to keyword arguments; token ids by default.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> costs = CostModel(BertModel(small))
        >>> costs.estimate(256, 1).flops > 2 * costs.estimate(128, 1).flops
        True
    """

    def __init__(self, model: nn.Module, inputs: Inputs | None = None) -> None:
        self.inputs = inputs or _tokens(model)
        self.model = copy.deepcopy(model).to("meta").train()
        self.config = getattr(model, "config", None)

    def estimate(self, n: int, batch: int = 1) -> Costs:
        """Costs at length ``n``.

        FLOPs are those of matrix products, convolutions and attention, as ``torch.utils.flop_counter`` counts them.

        Raises:
            ValueError: for a length or batch below 1.
        """
        from torch.utils.flop_counter import FlopCounterMode

        if n < 1 or batch < 1:
            raise ValueError(f"n and batch must be at least 1, got n={n}, batch={batch}")
        own = {p.untyped_storage()._cdata for p in self.model.parameters()}
        kept: dict[int, tuple[int, Any]] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                # the storage itself, so that its address is not given to another one
                kept[storage._cdata] = (storage.nbytes(), storage)
            return x

        given = {name: x.to("meta") for name, x in self.inputs(n, batch).items()}
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            self.model(**given)
        return Costs(
            counter.get_total_flops(),
            sum(size for size, _ in kept.values()),
            self._cache(n, batch),
            sum(p.numel() * p.element_size() for p in self.model.parameters()),
        )

    def _cache(self, n: int, batch: int) -> int:
        c = self.config
        if not any(getattr(m, "is_causal", False) for m in self.model.modules()) or c is None:
            return 0
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        size = next(self.model.parameters()).element_size()
        return 2 * c.num_hidden_layers * heads * head_dim * n * batch * size


@dataclass(frozen=True)
class Advice:
    """One row of ``advise``.

    Attributes:
        kind: the attention; ``"eager"`` and ``"sdpa"`` are exact.
        seconds: median of the repetitions.
        peak_bytes: most memory that tensors held at once beyond the model.
        change: 1 - cosine between this output and the exact one, with the weights as they are.
    """

    kind: str
    seconds: float
    peak_bytes: int
    change: float


def _peak(work: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = trace.profiler.kineto_results.events()
    held = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        peak = max(peak, held)
    return peak


def advise(
    model: Any,
    n: int,
    causal: bool,
    target: str = "latency",
    *,
    kinds: Sequence[str] | None = None,
    batch: int = 1,
    training: bool = False,
    repeats: int = 3,
    inputs: Inputs | None = None,
) -> list[Advice]:
    """Time a transformers model with each attention at a length, on its device, and rank them.

    Lower complexity is not faster by itself, so nothing here is computed from formulas. ``change`` warns: an attention
    that changes the output much needs training. The model is left as it was.

    Args:
        model: goes through transformers' attention interface.
        n: length.
        causal: whether the model is a decoder; kinds that cannot be causal are left out.
        target: ``"latency"`` or ``"memory"``, what to rank by.
        kinds: of ``DROP_IN``; all that fit by default. Exact attention is always measured too.
        batch: how many sequences.
        training: time forward and backward, else forward alone.
        repeats: timed repetitions, kinds in turn.
        inputs: from length and batch to keyword arguments; token ids by default.

    Returns:
        Rows, best first.

    Raises:
        ValueError: for an unknown target or kind, or a length below 1.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> rows = advise(BertModel(small), 64, causal=False, kinds=["local", "linear"])
        >>> sorted(row.kind for row in rows)
        ['eager', 'linear', 'local', 'sdpa']
    """
    if target not in ("latency", "memory"):
        raise ValueError(f"target must be 'latency' or 'memory', got {target!r}")
    if n < 1 or batch < 1 or repeats < 1:
        raise ValueError(f"n, batch and repeats must be at least 1, got {n}, {batch} and {repeats}")
    chosen = [k for k in DROP_IN if KINDS[k].causal or not causal] if kinds is None else list(kinds)
    wrong = [k for k in chosen if k not in DROP_IN or (causal and not KINDS[k].causal)]
    if wrong:
        raise ValueError(f"{wrong[0]} cannot be tried here; there are {', '.join(DROP_IN)}, causal ones for decoders")
    names = {"eager": "eager", "sdpa": "sdpa"} | {k: register_efficient_attention(k, f"tg_advise_{k}") for k in chosen}
    device = next(model.parameters()).device
    given = {name: x.to(device) for name, x in (inputs or _tokens(model))(n, batch).items()}
    if causal:
        given["use_cache"] = False  # type: ignore[assignment]
    before, mode, asked = model.config._attn_implementation, model.training, _grads(model)
    outputs: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {kind: [] for kind in names}
    peaks: dict[str, int] = {}

    def work() -> Tensor:
        with torch.set_grad_enabled(training):
            y = model(**given)[0]
        if training:
            y.float().square().mean().backward()
        return y.detach()

    try:
        # dropout off: outputs are compared
        model.eval()
        for kind, name in names.items():
            model.set_attn_implementation(name)
            outputs[kind] = work().float().flatten()
            peaks[kind] = _peak(work, device)
        for _ in range(repeats):
            for kind, name in names.items():
                model.set_attn_implementation(name)
                _wait(device)
                began = time.perf_counter()
                work()
                _wait(device)
                seconds[kind].append(time.perf_counter() - began)
    finally:
        model.set_attn_implementation(before)
        model.train(mode)
        for p, grad in asked:
            p.grad = grad
    exact = outputs["eager"]
    rows = [
        Advice(
            kind, statistics.median(seconds[kind]), peaks[kind],
            1 - float(nn.functional.cosine_similarity(outputs[kind], exact, dim=0)),
        )
        for kind in names
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row.seconds if target == "latency" else row.peak_bytes)


def _grads(model: nn.Module) -> list[tuple[nn.Parameter, Tensor | None]]:
    return [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
