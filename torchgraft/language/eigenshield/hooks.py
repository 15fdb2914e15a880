"""The filter inside somebody's model: attach it, collect what it is fitted on, and perturb inputs for that."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import clone
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from torchgraft.language.eigenshield.shield import EigenShield, blended

Attack = Literal["noise", "fgsm", "pgd"] | Callable[[nn.Module, Any], Any]
Call = Callable[[nn.Module, Any], Any]


class SpectralFilter(nn.Module):
    """A fitted ``EigenShield`` on tensors (..., p), of any dtype and device; computed in float32 at least.

    Two thin products, 4 p kept operations a row; one of p x p where more than p / 2 directions are kept.

    Args:
        shield: fitted.
        dtype: of the buffers; ``torch.float64`` where z is.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> Z = rng.normal(size=(200, 20)); Z[:, 0] *= 5
        >>> SpectralFilter(EigenShield().fit(Z))(torch.randn(2, 7, 20)).shape
        torch.Size([2, 7, 20])
    """

    mean: Tensor
    down: Tensor
    up: Tensor

    def __init__(self, shield: EigenShield, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        check_is_fitted(shield, "components_")
        down, up = shield.components_ / shield.scale_, shield.components_ * shield.scale_
        if 2 * len(down) > down.shape[1]:
            down, up = up.T @ down, np.zeros((0, down.shape[1]))
        for name, value in (("mean", shield.mean_), ("down", down), ("up", up)):
            self.register_buffer(name, torch.from_numpy(np.array(value)).to(dtype))
        self.center, self.rescale, self.strength = shield.center, shield.rescale, shield.strength

    def forward(self, z: Float[Tensor, "*rows p"]) -> Float[Tensor, "*rows p"]:
        """Filtered embeddings, in the dtype of ``z``."""
        if z.shape[-1] != len(self.mean):
            raise ValueError(f"z must have {len(self.mean)} features, those of the fit, got {z.shape[-1]}")
        wide = torch.promote_types(z.dtype, torch.float32)
        mean, down, up = (buffer.to(z.device, wide) for buffer in (self.mean, self.down, self.up))
        rows = z.to(wide)
        kept = nn.functional.linear(rows - mean if self.center else rows, down)
        if len(up):
            kept = kept @ up
        return blended(rows, kept, mean if self.center else 0.0, self.rescale, self.strength).to(z.dtype)

    def save(self, path: str | Path) -> None:
        """Write buffers and options to one safetensors file."""
        from safetensors.torch import save_file

        options = {"center": self.center, "rescale": self.rescale, "strength": self.strength}
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, path, metadata={"torchgraft.eigenshield": json.dumps(options)})

    @classmethod
    def load(cls, path: str | Path) -> SpectralFilter:
        """Read what ``save`` wrote.

        Raises:
            ValueError: for a safetensors file of something else.
        """
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            options = (file.metadata() or {}).get("torchgraft.eigenshield")
            if options is None or set(file.keys()) != {"mean", "down", "up"}:
                raise ValueError(f"{path} is not a file that SpectralFilter.save wrote")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name, value in state.items():
            made.register_buffer(name, value)
        chosen = json.loads(options)
        made.center, made.rescale, made.strength = chosen["center"], chosen["rescale"], chosen["strength"]
        return made


def _place(output: Any) -> tuple[Any, Tensor]:
    """Where in an output the first tensor stands (None: it is the output), and that tensor."""
    if isinstance(output, Tensor):
        places: list[tuple[Any, Any]] = [(None, output)]
    elif isinstance(output, Mapping):
        places = list(output.items())
    elif isinstance(output, tuple | list):
        places = list(enumerate(output))
    else:
        places = []
    for place, found in places:
        if isinstance(found, Tensor):
            if found.is_floating_point() and found.ndim >= 2:
                return place, found
            break
    raise ValueError(f"the module must return a float tensor (..., features) first, got {_described(output)}")


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor of shape {tuple(output.shape)}"
    return type(output).__name__


def _put(output: Any, place: Any, tensor: Tensor) -> Any:
    if place is None:
        return tensor
    if isinstance(output, Mapping):
        changed: dict[str, Any] = {**output, place: tensor}
        return type(output)(**changed)
    changed_items = (*output[:place], tensor, *output[place + 1 :])
    return type(output)(*changed_items) if hasattr(output, "_fields") else type(output)(changed_items)


def _module(model: nn.Module, module: str | nn.Module) -> tuple[str, nn.Module]:
    names = dict(model.named_modules())
    if isinstance(module, nn.Module):
        for name, found in names.items():
            if found is module:
                return name, found
        raise ValueError(f"module {type(module).__name__} is not part of the model")
    if module not in names:
        near = difflib.get_close_matches(module, names, 1)
        raise ValueError(
            f"no module {module!r} in {type(model).__name__}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return module, names[module]


class Attached:
    """A filter at work in a model. ``remove()`` or the end of a ``with`` block takes it out.

    Attributes:
        filter: the ``SpectralFilter``; it is not a submodule, so that the model's state dict stays as it was.
    """

    def __init__(self, model: nn.Module, module: str | nn.Module, filtering: SpectralFilter) -> None:
        name, found = _module(model, module)
        self.filter = filtering

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            place, z = _place(output)
            if z.shape[-1] != len(filtering.mean):
                raise ValueError(
                    f"{name or type(found).__name__!r} returns {z.shape[-1]} features, but the shield was fitted on "
                    f"{len(filtering.mean)}; collect embeddings from this very module"
                )
            if filtering.mean.device != z.device:
                filtering.to(z.device)
            return _put(output, place, filtering(z))

        self._handle = found.register_forward_hook(hook)

    def remove(self) -> None:
        """Take the filter out; the model is what it was, to the last bit. Twice does no harm."""
        self._handle.remove()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def attach(model: nn.Module, module: str | nn.Module, shield: EigenShield | SpectralFilter) -> Attached:
    """Filter what a module returns, from now until the handle is removed.

    Args:
        model: any network.
        module: part of it, or its name: a vision tower, or the projector of a vision-language model (LLaVA:
            ``model.multi_modal_projector``, Qwen2-VL: ``model.visual.merger``, Idefics: ``model.connector``). The first
            tensor of its output, (B, p) or (B, T, p), is filtered. Choose the part whose output goes on: a whole CLIP
            tower returns ``last_hidden_state`` first and computes ``pooler_output`` before the filter sees anything.
        shield: fitted on such embeddings.

    Raises:
        ValueError: for a module that the model has not, here; for an output that cannot be filtered, when the model
            runs.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
        >>> Z = collect_embeddings(net, "0", [torch.randn(200, 20)])
        >>> with attach(net, "0", EigenShield(min_components=2).fit(Z)):
        ...     net(torch.randn(2, 20)).shape
        torch.Size([2, 3])
    """
    return Attached(model, module, shield if isinstance(shield, SpectralFilter) else SpectralFilter(shield))


def _run(model: nn.Module, batch: Any, call: Call | None) -> None:
    if call is not None:
        call(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch)


@contextmanager
def _listening(model: nn.Module, module: str | nn.Module) -> Iterator[list[Tensor]]:
    heard: list[Tensor] = []
    handle = _module(model, module)[1].register_forward_hook(lambda _m, _i, output: heard.append(_place(output)[1]))
    try:
        yield heard
    finally:
        handle.remove()


def _pooled(z: Tensor, pool: str, stride: int) -> Tensor:
    if pool == "mean":
        return z.flatten(1, -2).mean(1) if z.ndim > 2 else z
    return z.flatten(1, -2)[:, ::stride].flatten(0, 1) if z.ndim > 2 else z[::stride]


def _check_pool(pool: str, stride: int) -> None:
    if pool not in ("mean", "tokens"):
        raise ValueError(f"pool must be 'mean' or 'tokens', got {pool!r}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if stride > 1 and pool == "mean":
        raise ValueError(f"stride={stride} thins tokens, and pool='mean' takes all of them; use pool='tokens'")


def collect_embeddings(
    model: nn.Module,
    module: str | nn.Module,
    batches: Iterable[Any],
    pool: Literal["mean", "tokens"] = "mean",
    stride: int = 1,
    call: Call | None = None,
) -> np.ndarray:
    """What a module returns for batches, as rows (n, p) of float64 for ``EigenShield.fit``.

    Args:
        model: any network; its mode is left alone.
        module: part of it, or its name.
        batches: tensors, or mappings of keyword arguments.
        pool: ``mean`` over tokens gives one row per input; ``tokens`` stacks them all, though tokens of one image are
            not independent, and gamma = p / n then promises more than there is. An output (N, p) is N rows either way,
            as of Qwen2-VL, which gives the tokens of all images in one row of tokens.
        stride: with ``tokens``, every so-manieth token alone, which makes rows less dependent.
        call: ``(model, batch) -> anything`` instead of calling the model with the batch.

    Raises:
        ValueError: when there are no batches, or the module is not run. Hooks are gone whatever is raised.
    """
    _check_pool(pool, stride)
    rows: list[Tensor] = []
    with torch.no_grad(), _listening(model, module) as heard:
        for batch in batches:
            heard.clear()
            _run(model, batch, call)
            rows += [_pooled(z.cpu().double(), pool, stride) for z in heard]
    if not rows:
        raise ValueError("nothing was collected: batches is empty, or the model does not run that module")
    return torch.cat(rows).numpy()


def perturb(
    model: nn.Module,
    module: str | nn.Module,
    batch: Any,
    attack: Attack = "noise",
    epsilon: float = 8 / 255,
    *,
    steps: int = 10,
    bounds: tuple[float, float] | None = None,
    key: str = "pixel_values",
    call: Call | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """A batch of the same kind whose input lies within ``epsilon`` of it in every number.

    Args:
        model: any network; neither its mode nor the gradients of its parameters are touched.
        module: whose output the gradient attacks move, as far as they can from what it was (no labels).
        batch: a tensor, or a mapping with the input under ``key``.
        attack: ``noise`` of random sign; ``fgsm``, one step from a random start, since at the clean input itself the
            drift has no gradient; ``pgd``, ``steps`` steps of ``2.5 epsilon / steps`` (Madry et al. 2018); or
            ``(model, batch) -> batch``.
        epsilon: in units of the input: of normalised pixels where pixels are normalised.
        steps: of ``pgd``.
        bounds: smallest and largest number that an input may hold.
        key: of the input in a mapping.
        call: as in ``collect_embeddings``.
        generator: of the random signs, on the CPU.

    Raises:
        ValueError: for an unknown attack, a mapping without the key, an input that is not of floats, or a module that
            the input does not reach.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> x = torch.randn(3, 4)
        >>> print(f"{(perturb(net, '0', x, 'pgd', 0.1) - x).abs().max():.4f}")
        0.1000
    """
    if callable(attack):
        return attack(model, batch)
    if attack not in ("noise", "fgsm", "pgd"):
        raise ValueError(f"attack must be 'noise', 'fgsm', 'pgd' or a function, got {attack!r}")
    if not epsilon > 0 or steps < 1:
        raise ValueError(f"epsilon must be positive and steps at least 1, got {epsilon} and {steps}")
    if isinstance(batch, Mapping) and key not in batch:
        raise ValueError(f"the batch has no {key!r} to perturb; it has {', '.join(map(repr, batch))}; pass key=")
    clean = batch[key] if isinstance(batch, Mapping) else batch
    if not isinstance(clean, Tensor) or not clean.is_floating_point():
        raise ValueError(f"the input to perturb must be a float tensor, got {_described(clean)}")

    def within(x: Tensor) -> Tensor:
        x = torch.minimum(torch.maximum(x, clean - epsilon), clean + epsilon)
        return x if bounds is None else x.clamp(*bounds)

    def replaced(x: Tensor) -> Any:
        return {**batch, key: x} if isinstance(batch, Mapping) else x

    sign = torch.randint(0, 2, clean.shape, generator=generator).to(clean) * 2 - 1
    if attack == "noise":
        return replaced(within(clean + epsilon * sign))
    x = within(clean + 0.5 * epsilon * sign)
    rounds, step = (1, epsilon) if attack == "fgsm" else (steps, 2.5 * epsilon / steps)
    with _listening(model, module) as heard:
        with torch.no_grad():
            _run(model, batch, call)
        targets = [z.detach() for z in heard]
        for _ in range(rounds):
            heard.clear()
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                _run(model, replaced(x), call)
                drift = sum(((z - t) ** 2).float().sum() for z, t in zip(heard, targets, strict=True))
            if not isinstance(drift, Tensor) or not drift.requires_grad:
                raise ValueError("the input does not reach that module, so that no gradient says how to move it")
            (slope,) = torch.autograd.grad(drift, x)
            x = within(x.detach() + step * slope.sign())
    return replaced(x.detach())


def calibrate(
    model: nn.Module,
    module: str | nn.Module,
    batches: Iterable[Any],
    attack: Attack = "noise",
    epsilon: float = 8 / 255,
    *,
    shield: EigenShield | None = None,
    labels: Any = None,
    text_embeddings: Any = None,
    pool: Literal["mean", "tokens"] = "mean",
    stride: int = 1,
    steps: int = 10,
    bounds: tuple[float, float] | None = None,
    key: str = "pixel_values",
    call: Call | None = None,
    seed: int = 0,
) -> EigenShield:
    """Collect embeddings of clean and of perturbed batches, and fit.

    Keep the attack of your test out of the calibration where you claim that the filter does not depend on it.

    Args:
        model, module, batches, pool, stride, call: as in ``collect_embeddings``.
        attack, epsilon, steps, bounds, key: as in ``perturb``.
        shield: settings, copied; the default is ``EigenShield()``.
        labels, text_embeddings: for ``nonconformity="margin"``, as in ``EigenShield.fit``.
        seed: of the random signs.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 3))
        >>> shield = calibrate(net, "0", [torch.randn(200, 20)], "fgsm", 0.1, shield=EigenShield(min_components=4))
        >>> shield.rbns_.shape == (len(shield.spikes_),)
        True
    """
    _check_pool(pool, stride)
    generator = torch.Generator().manual_seed(seed)
    clean: list[np.ndarray] = []
    moved: list[np.ndarray] = []
    for batch in batches:
        other = perturb(
            model, module, batch, attack, epsilon, steps=steps, bounds=bounds, key=key, call=call, generator=generator
        )
        for found, rows in ((batch, clean), (other, moved)):
            rows.append(collect_embeddings(model, module, [found], pool, stride, call))
    if not clean:
        raise ValueError("nothing was collected: batches is empty")
    made = clone(shield) if shield is not None else EigenShield()
    return made.fit(np.concatenate(clean), labels, np.concatenate(moved), text_embeddings)
