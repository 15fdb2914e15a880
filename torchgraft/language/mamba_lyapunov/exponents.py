"""Lyapunov exponents of recurrent models: exact for Mamba's diagonal recurrences, by tangents for any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.surgery import evaluating

# letters of shapes: B rows, T tokens, D channels (heads in Mamba-2), N states of a channel


@dataclass(frozen=True)
class LayerExponents:
    """Exponents of one layer's recurrence.

    Attributes:
        name: of the mixer in the model.
        per_channel: (D, N), mean over tokens of ``Delta A``; N is 1 in Mamba-2, where a head has one decay.
        time_series: (T,), the largest exponent over channels of the first t tokens, mean over rows.
    """

    name: str
    per_channel: Tensor
    time_series: Tensor

    @property
    def max(self) -> float:
        """The maximal exponent; at most zero for any weights."""
        return self.per_channel.max().item()

    @property
    def decay_times(self) -> Tensor:
        """(D, N), in how many tokens an error falls to 1/e: ``-1 / exponent``."""
        return -1 / self.per_channel


@dataclass(frozen=True)
class LyapunovReport:
    """Exponents of all recurrent layers.

    Attributes:
        layers: in the order of the model.
        method: ``analytic`` or ``tangent``.
    """

    layers: tuple[LayerExponents, ...]
    method: str

    @property
    def per_layer(self) -> Tensor:
        """(L,), the maximal exponent of each layer."""
        return torch.tensor([layer.max for layer in self.layers])

    @property
    def max(self) -> float:
        """The maximal exponent of all."""
        return self.per_layer.max().item()


def is_selective(module: nn.Module) -> bool:
    """Whether a module is a selective state space mixer as transformers has them."""
    return isinstance(getattr(module, "A_log", None), Tensor) and (
        hasattr(module, "x_proj") or isinstance(getattr(module, "dt_bias", None), Tensor)
    )


def _decay(mixer: Any) -> Tensor:
    """A (D, N), negative; (D, 1) for Mamba-2."""
    a = -mixer.A_log.detach().float().exp()
    return a if a.dim() == 2 else a[:, None]


def _weight_of(module: Any) -> tuple[Tensor, Tensor]:
    inner = getattr(module, "base_layer", module)
    bias = inner.bias if inner.bias is not None else torch.zeros(len(inner.weight))
    return inner.weight.detach().float(), bias.detach().float()


def _step_sizes(mixer: Any, projected: Tensor) -> Tensor:
    """Delta (B, T, D) from what ``x_proj`` (Mamba) or ``in_proj`` (Mamba-2) gave.

    ``dt_proj`` is never called in transformers, its weight is read; so its output is made again here.
    """
    projected = projected.detach()
    if hasattr(mixer, "x_proj"):
        low = projected[..., : mixer.time_step_rank]
        norm = getattr(mixer, "dt_layernorm", None)
        low = (low if norm is None else norm(low)).float()
        weight, bias = _weight_of(mixer.dt_proj)
        return F.softplus(low @ weight.T.to(low.device) + bias.to(low.device))
    heads = mixer.dt_bias.shape[0]
    steps = F.softplus(projected[..., -heads:].float() + mixer.dt_bias.detach().float())
    least, most = getattr(mixer, "time_step_limit", (0.0, float("inf")))
    return steps.clamp(least, most)


@contextmanager
def step_sizes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Delta (B, T, D) of every selective mixer of the last forward pass inside the block, by the mixer's name.

    The model is in eval mode inside the block: in training, fused kernels do not call the projections that are watched.

    Raises:
        TypeError: for a model without such a mixer.
    """
    mixers = {name: module for name, module in model.named_modules() if is_selective(module)}
    if not mixers:
        raise TypeError(
            f"model must have Mamba or Mamba-2 mixers (Mamba, Mamba2, FalconMamba, Jamba, Bamba), and "
            f"{type(model).__name__} has none; use method='tangent' for other recurrences, perturbation_growth for all"
        )
    found: dict[str, Tensor] = {}

    def keep(name: str, mixer: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = _step_sizes(mixer, output)

        return hook

    with ExitStack() as undo:
        undo.enter_context(evaluating(model))
        for name, mixer in mixers.items():
            watched: Any = mixer.x_proj if hasattr(mixer, "x_proj") else mixer.in_proj
            undo.callback(watched.register_forward_hook(keep(name, mixer)).remove)
        yield found


def _check_finite(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"parameter {name!r} has values that are not finite")


def lyapunov_spectrum(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    method: Literal["analytic", "tangent"] = "analytic",
    k: int = 1,
    burn_in: int = 0,
) -> LyapunovReport:
    """Maximal Lyapunov exponents of the recurrences in a model (section 4 of Halloran et al., TMLR 2025).

    ``analytic``: a selective state space layer has the diagonal recurrence ``x_t = exp(Delta_t A) x_(t-1) + ...``, and
    its exponents are the means of ``Delta_t A``, all negative. Costs nothing beside the forward pass. This is the
    exponent of the state: convolution, gates, residual stream and the dependence of Delta, B and C on what earlier
    layers say are outside of it; measure those with ``perturbation_growth``.

    ``tangent``: for ``nn.RNN``, ``nn.LSTM``, ``nn.GRU``, and any module with ``step(x_t, state)`` and
    ``initial_state(batch, device, dtype)``: k tangent vectors go along with the state and are made orthonormal at each
    step. Exponents then are those of the whole module, (1, k) in a report of one layer.

    Args:
        model: see above.
        input_ids: (B, T).
        inputs_embeds: (B, T, F) instead; the input of the recurrence for ``tangent``.
        attention_mask: (B, T), padding is left out (``analytic``).
        method: see above.
        k: how many exponents (``tangent``).
        burn_in: tokens at the beginning that are not counted.

    Raises:
        TypeError: for a model that the method does not fit, such as one with attention alone.
        ValueError: for fewer than two tokens after burn-in, weights that are not finite, or both or none of the inputs.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50))
        >>> bool(lyapunov_spectrum(model, torch.randint(0, 50, (1, 12))).max < 0)
        True
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if given.shape[1] - burn_in < 2 or burn_in < 0:
        raise ValueError(f"need at least two tokens after burn_in, got {given.shape[1]} tokens and burn_in {burn_in}")
    _check_finite(model)
    if method == "tangent":
        return _by_tangents(model, inputs_embeds, k, burn_in)
    if method != "analytic":
        raise ValueError(f"method must be 'analytic' or 'tangent', got {method!r}")
    named = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    with step_sizes(model) as found, torch.no_grad():
        model(**{name: value for name, value in named.items() if value is not None}, use_cache=False)
    mixers = dict(model.named_modules())
    counted = torch.ones(given.shape[:2], device=given.device) if attention_mask is None else attention_mask.float()
    counted = counted.clone()
    counted[:, :burn_in] = 0
    if counted.sum(1).min() < 2:
        raise ValueError("a row has fewer than two tokens that count; drop it, or lower burn_in")
    layers = []
    for name, delta in found.items():
        a = _decay(mixers[name]).to(delta.device)
        weighed = delta * counted[..., None]
        mean = weighed.sum((0, 1)) / counted.sum()
        # the slowest state of a channel has the largest exponent at every time, since Delta is shared by its states
        running = weighed.cumsum(1) * a.amax(1) / counted.cumsum(1).clamp(min=1)[..., None]
        layers.append(LayerExponents(name, (mean[:, None] * a).cpu(), running.amax(2).mean(0).cpu()))
    return LyapunovReport(tuple(layers), "analytic")


def assert_stable(report: LyapunovReport) -> None:
    """Raise when an exponent is positive, naming the layer.

    Raises:
        ValueError: with the largest exponent and how fast a deviation doubles.
    """
    for layer in report.layers:
        if not layer.max <= 0:
            doubling = 0.6931 / layer.max if layer.max == layer.max else float("nan")
            raise ValueError(
                f"{layer.name or 'the recurrence'} has a Lyapunov exponent of {layer.max:.4g}: "
                f"deviations double every {doubling:.3g} tokens"
            )


def _by_tangents(model: nn.Module, inputs: Tensor | None, k: int, burn_in: int) -> LyapunovReport:
    if inputs is None:
        raise ValueError("method='tangent' needs inputs_embeds (B, T, F), what the recurrence reads")
    step, state = _recurrence(model, inputs)
    found = tangent_exponents(step, state, inputs.transpose(0, 1), k, burn_in)
    return LyapunovReport((LayerExponents("", found.exponents[None], found.time_series),), "tangent")


Step = Callable[[Tensor, Tensor], Tensor]
"""``step(state, x_t)``: the state as (B, S), all of it in one row, to the next one."""


def _recurrence(model: nn.Module, inputs: Tensor) -> tuple[Step, Tensor]:
    """A module's recurrence on flattened states, and its first state."""
    batch = len(inputs)
    if isinstance(model, nn.RNNBase):
        if model.bidirectional:
            raise TypeError("a bidirectional network is not a recurrence forward in time; give each direction alone")
        parts = 2 if isinstance(model, nn.LSTM) else 1
        shape = (parts, model.num_layers, batch, model.hidden_size)

        def of_torch(flat: Tensor, x: Tensor) -> Tensor:
            state = flat.view(batch, parts, model.num_layers, model.hidden_size).permute(1, 2, 0, 3).contiguous()
            x = x[None] if not model.batch_first else x[:, None]
            _, after = model(x, tuple(state) if parts == 2 else state[0])
            whole = torch.stack(after) if parts == 2 else after[None]
            return whole.permute(2, 0, 1, 3).reshape(batch, -1)

        return of_torch, inputs.new_zeros(shape).permute(2, 0, 1, 3).reshape(batch, -1)
    if not (hasattr(model, "step") and hasattr(model, "initial_state")):
        raise TypeError(
            f"{type(model).__name__} is not a recurrence: method='tangent' takes nn.RNN, nn.LSTM, nn.GRU and modules "
            "with step(x_t, state) and initial_state(...); use perturbation_growth for any other model"
        )
    stepping: Any = model
    first = stepping.initial_state(batch, inputs.device, inputs.dtype)
    leaves, form = torch.utils._pytree.tree_flatten(first)
    shapes = [leaf.shape for leaf in leaves]

    def of_ours(flat: Tensor, x: Tensor) -> Tensor:
        sizes = [shape[1:].numel() for shape in shapes]
        parts = [p.view(shape) for p, shape in zip(flat.split(sizes, 1), shapes, strict=True)]
        _, after = stepping.step(x, torch.utils._pytree.tree_unflatten(parts, form))
        return torch.cat([leaf.flatten(1) for leaf in torch.utils._pytree.tree_flatten(after)[0]], 1)

    return of_ours, torch.cat([leaf.flatten(1) for leaf in leaves], 1)


def _pushed(step: Step, state: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
    """The next state (B, S), and the Jacobian's product with each of the tangents (B, S, k).

    By two backward passes: the gradient of ``v J`` in v is J's product; fused cells have no rule for forward mode.
    """
    with torch.enable_grad():
        here = state.detach().requires_grad_(True)
        after = step(here, x)
        v = torch.zeros_like(after, requires_grad=True)
        (back,) = torch.autograd.grad(after, here, v, create_graph=True)
        columns = [
            torch.autograd.grad(back, v, tangents[..., j], retain_graph=True)[0] for j in range(tangents.shape[2])
        ]
    return after.detach(), torch.stack(columns, 2).detach()


@dataclass(frozen=True)
class TangentExponents:
    """What ``tangent_exponents`` found: exponents (k,), falling, and the largest of the first t steps, (T,)."""

    exponents: Tensor
    time_series: Tensor


def tangent_exponents(step: Step, state: Tensor, inputs: Tensor, k: int = 1, burn_in: int = 0) -> TangentExponents:
    """The k largest exponents of ``state -> step(state, x_t)`` along a sequence, by QR of tangents (Benettin et al.).

    Args:
        step: takes a state (B, S) and an input (B, ...), gives the next state; differentiable.
        state: (B, S), the first.
        inputs: (T, B, ...).
        k: at most S.
        burn_in: steps before growth is counted; tangents turn into the fast directions meanwhile.

    Raises:
        ValueError: for k outside 1..S, or no steps to count.
    """
    batch, size = state.shape
    if not 1 <= k <= size:
        raise ValueError(f"k must be 1 to {size}, the size of the state, got {k}")
    if len(inputs) - burn_in < 1:
        raise ValueError(f"no steps are left of {len(inputs)} after burn_in {burn_in}")
    generator = torch.Generator().manual_seed(0)
    tangents = torch.randn(batch, size, k, generator=generator, dtype=torch.float64).to(state)
    tangents = torch.linalg.qr(tangents).Q
    sums = torch.zeros(batch, k, dtype=torch.float64)
    series = []
    for t, x in enumerate(inputs):
        state, tangents = _pushed(step, state, x, tangents)
        tangents, r = torch.linalg.qr(tangents)
        if t >= burn_in:
            sums += r.diagonal(dim1=1, dim2=2).abs().log().double().cpu()
            series.append(sums[:, 0].mean() / (t - burn_in + 1))
    return TangentExponents((sums / (len(inputs) - burn_in)).mean(0), torch.stack(series))
