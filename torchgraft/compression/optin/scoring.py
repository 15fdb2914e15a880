"""Scores of heads and hidden units: what their removal does to all later features and to the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from torchgraft.compression.optin.blocks import (
    Block,
    PrunableSpec,
    call,
    channel_axis,
    evaluating,
    find_blocks,
    first_tensor,
    real_tokens,
    resolve,
    trackable,
    width_in,
)
from torchgraft.compression.optin.losses import kl_loss, manifold_loss, mean_loss, patch_loss, squared_loss

__all__ = ["OptinConfig", "OptinScores", "balance", "optin_scores", "rebalanced", "removal_damage"]

Kind = Literal["heads", "neurons"]
_OFFICIAL = {
    "include_padding": True,
    "fresh_rows": True,
    "keep_last_head_off": True,
    "last_layer_decay": 0.5,
    "head_decay": 0.5,
    "head_index_prior": 10.0,
    "neuron_index_prior": 100.0,
}


@dataclass(frozen=True)
class OptinConfig:
    """How groups are scored.

    Attributes:
        lambda_: how far the divergence is kept below the trajectory, as a factor.
        temperature: T; the divergence is multiplied by T² and, as in the released code, nothing else.
        aggregate: ``sum`` or ``mean`` over the entries of a difference of Gram matrices.
        max_tokens: rows of a Gram matrix, drawn once per block; None takes every token.
        targets: ``heads``, ``neurons`` (hidden units, or channels of a convolutional network), or both.
        features: whose features count: of all ``later`` blocks (the paper's trajectory), of the ``last`` block alone,
            or of ``none``. In the last block its own feature counts.
        output: whether the divergence of the output counts.
        loss: ``gram``, or for images ``mean`` (the paper's for convolutional networks) or ``patch``.
        method: of neurons; heads are always removed one by one. ``exact`` removes every neuron, too, in as many passes
            as there are neurons, started behind the last undamaged block. ``probes`` takes the same loss to second
            order in what the neuron adds, with random probes: one forward pass and ``probes`` backward passes for all
            neurons together. Neither uses labels or the gradient of a training loss.
        probes: of that method; the relative standard error of a score is about sqrt(2 / probes).
        copies: damaged models per forward pass when groups are removed one by one.
        include_padding: of the released code: padding counts like tokens.
        fresh_rows: of the released code: new rows for every comparison, not the same ones.
        keep_last_head_off: of the released code: while heads are scored, the last head of every earlier layer is off.
        last_layer_decay: of the released code: factor of the last block's scores.
        head_decay: of the released code: factor of all heads' scores.
        head_index_prior, neuron_index_prior: of the released code: scores are multiplied by a factor that falls
            geometrically from this to 1 with the index in the layer, whatever the unit does.
        official: sets the seven fields before to the released values (True, True, True, 0.5, 0.5, 10, 100). The order
            in which units happen to be stored then decides much of what is kept.
        seed: of rows and probes.

    Raises:
        ValueError: for values out of range, and for ``official=True`` beside another value of one of the seven.
    """

    lambda_: float = 10.0
    temperature: float = 4.0
    aggregate: Literal["sum", "mean"] = "sum"
    max_tokens: int | None = 768
    targets: tuple[str, ...] = ("heads", "neurons")
    features: Literal["later", "last", "none"] = "later"
    output: bool = True
    loss: Literal["gram", "mean", "patch"] = "gram"
    method: Literal["probes", "exact"] = "probes"
    probes: int = 64
    copies: int = 8
    include_padding: bool = False
    fresh_rows: bool = False
    keep_last_head_off: bool = False
    last_layer_decay: float = 1.0
    head_decay: float = 1.0
    head_index_prior: float = 1.0
    neuron_index_prior: float = 1.0
    official: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "aggregate": ("sum", "mean"), "features": ("later", "last", "none"), "loss": ("gram", "mean", "patch"),
            "method": ("probes", "exact"),
        }  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("lambda_", "temperature", "last_layer_decay", "head_decay"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("head_index_prior", "neuron_index_prior", "probes", "copies"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, or None for all, got {self.max_tokens}")
        if not self.targets or set(self.targets) - {"heads", "neurons"}:
            raise ValueError(f"targets must be 'heads', 'neurons' or both, got {self.targets!r}")
        if self.features == "none" and not self.output:
            raise ValueError("features='none' with output=False leaves nothing to score by")
        if self.official:
            defaults = {field.name: field.default for field in fields(self)}
            for name, value in _OFFICIAL.items():
                if getattr(self, name) not in (defaults[name], value):
                    raise ValueError(
                        f"official=True sets {name} to {value}; leave it out, or set the fields one by one"
                    )
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class OptinScores:
    """Scores of all units, at least 0, larger for what matters more; one tensor per block, in order of execution.

    Attributes:
        heads: per block, shape (heads,); empty where the block has none.
        neurons: per block, shape (neurons,).
        blocks: the specs the scores belong to.
        details: ``heads/features``, ``heads/output``, ``neurons/features`` and ``neurons/output``: the trajectory
            term M and the divergence of every unit before they are balanced, where they were taken.
        forward_passes: forward passes of the whole batch through the whole model that the scores took.
        backward_passes: backward passes, to activations alone, each of about as many operations as a forward pass.
        official_passes: forward passes that the released code takes, one per unit and two for the baseline.
        targets: what was scored; the rest is always kept.
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]
    blocks: tuple[PrunableSpec, ...]
    details: Mapping[str, tuple[Tensor, ...]]
    forward_passes: float
    backward_passes: float
    official_passes: int
    targets: tuple[str, ...] = ("heads", "neurons")

    def __post_init__(self) -> None:
        if not len(self.heads) == len(self.neurons) == len(self.blocks):
            raise ValueError(f"{len(self.heads)}, {len(self.neurons)} scores for {len(self.blocks)} blocks")
        for name, parts in (("heads", self.heads), ("neurons", self.neurons)):
            for i, part in enumerate(parts):
                if part.numel() and not bool(torch.isfinite(part).all() and (part >= 0).all()):
                    raise ValueError(f"scores of {name} in block {i} are not all finite and at least 0")

    def of(self, kind: Kind) -> tuple[Tensor, ...]:
        """Scores of ``heads`` or ``neurons``."""
        return self.heads if kind == "heads" else self.neurons


def balance(
    features: Float[Tensor, units], output: Float[Tensor, units], lambda_: float = 10.0
) -> Float[Tensor, units]:
    """Trajectory term plus the divergence, which is brought about ``lambda_`` times below it by a power of ten.

    Where the divergence is the larger of the two, or one is 0, the power is the mean of those of the units before; the
    released code does the same. The exponent is truncated towards zero.

    Example:
        >>> balance(torch.tensor([1000.0]), torch.tensor([1.0]))
        tensor([1100.])
    """
    factors: list[float] = []
    made = []
    for m, kl in zip(features.double().tolist(), output.double().tolist(), strict=True):
        if m > kl > 0:
            factors.append(10.0 ** int(math.log10(m) - math.log10(kl) - math.log10(lambda_)))
            made.append(factors[-1])
        else:
            made.append(float(np.mean(factors)) if factors else 1.0)
    return (features.double() + torch.tensor(made, dtype=torch.float64, device=features.device) * output).to(
        features.dtype
    )


@dataclass(frozen=True)
class _Output:
    """What a model says, as (examples, values), and whether these are scores of classes."""

    values: Tensor
    classes: bool
    examples: int


def model_output(out: Any, real: Tensor | None) -> _Output:
    """Class scores if there are any, else features.

    One row per example, per token that is no padding, or per pixel; Mask2Former's masks and classes are joined into
    the scores of every pixel first.
    """
    z = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if z is None and getattr(out, "masks_queries_logits", None) is not None:
        classes = out.class_queries_logits.softmax(-1)[..., :-1]
        z = torch.einsum("bqc,bqhw->bchw", classes, out.masks_queries_logits.sigmoid()).clamp(min=1e-6).log()
    classes = z is not None and z.ndim in (2, 3, 4) and z.shape[1 if z.ndim == 4 else -1] > 1
    if z is None:
        z = getattr(out, "last_hidden_state", None)
    if z is None:
        z = out[0] if isinstance(out, tuple) and isinstance(out[0], Tensor) else None
    if z is None:
        raise TypeError(f"the model returns a {type(out).__name__} without a tensor, logits or last_hidden_state")
    # a plain tensor with tokens is taken for features, not for scores of classes
    classes = classes and not (isinstance(out, Tensor) and z.ndim == 3)
    examples = z.shape[0]
    z = z.movedim(1, -1) if z.ndim == 4 else z[:, None] if z.ndim == 1 else z
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    if real is not None and z.ndim == 3 and z.shape[:2] == real.shape:
        # rows of padding say nothing in either model
        z = torch.where(real[..., None], z, torch.zeros((), dtype=z.dtype, device=z.device))
    return _Output(z.reshape(-1, z.shape[-1]), classes, examples)


def keep_output(found: dict[int, list[Any]], i: int, module: nn.Module, args: Any, out: Any) -> None:
    """Hook that notes what a module gave."""
    found.setdefault(i, []).append(out)


class Session:
    """One model, one batch, its blocks in order of execution, and what the undamaged model did with the batch."""

    def __init__(self, model: nn.Module, batch: Any, specs: Sequence[PrunableSpec], config: OptinConfig) -> None:
        self.examples = len(first_tensor(batch))
        if config.loss == "patch" and config.features != "none" and self.examples < 2:
            raise ValueError("loss='patch' compares examples; give a batch of at least 2, got 1")
        batch = trackable(batch)
        self.model, self.batch, self.config = model, batch, config
        self.real = real_tokens(batch)
        self.forwards = self.backwards = 0.0
        blocks = resolve(model, specs)
        features: dict[int, list[Any]] = {}
        outputs: dict[int, list[Any]] = {}
        with torch.no_grad(), ExitStack() as stack:
            for i, block in enumerate(blocks):
                stack.callback(block.feature.register_forward_hook(partial(keep_output, features, i)).remove)
                if block.module is not None:
                    stack.callback(block.module.register_forward_hook(partial(keep_output, outputs, i)).remove)
            said = call(model, batch)
        self.forwards += 1
        for i, block in enumerate(blocks):
            times = len(features.get(i, []))
            if times != 1:
                name = block.spec.ffn_out or block.spec.attention_out
                raise ValueError(f"{name!r} ran {times} times in one forward pass; each block must run exactly once")
        # a dictionary keeps the order in which its keys came, here that of execution
        self.blocks = [blocks[i] for i in features]
        self.features: list[Tensor] = [seen[0] for seen in features.values()]
        self.outputs = [outputs[i][0] if i in outputs else None for i in features]
        for block, feature in zip(self.blocks, self.features, strict=True):
            if not bool(torch.isfinite(feature).all()):
                raise ValueError(
                    f"features behind {block.spec.ffn_out or block.spec.attention_out!r} are not all finite"
                )
        self.said = model_output(said, self._mask)
        if not bool(torch.isfinite(self.said.values).all()):
            raise ValueError("the model's output on this batch is not all finite")
        self._fixed = [self._draw(i, torch.Generator().manual_seed(config.seed + i)) for i in range(len(self.blocks))]
        self._fresh = torch.Generator().manual_seed(config.seed)

    @property
    def _mask(self) -> Tensor | None:
        return None if self.config.include_padding else self.real

    def _tokens(self, i: int, feature: Tensor, copies: int) -> Tensor:
        """Features of block ``i`` as (copies, examples, positions, features)."""
        x = feature.movedim(1, -1) if channel_axis(self.blocks[i].feature) == 1 else feature
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return x.reshape(copies, self.examples, -1, x.shape[-1])

    def _draw(self, i: int, generator: torch.Generator) -> Tensor:
        """Rows of the Gram matrix of block ``i``."""
        _, examples, positions, _ = self._tokens(i, self.features[i], 1).shape
        mask = self._mask
        if mask is not None and mask.shape == (examples, positions):
            rows = mask.flatten().nonzero()[:, 0].cpu()
        else:
            rows = torch.arange(examples * positions)
        if len(rows) < 2:
            raise ValueError(
                f"the batch has {len(rows)} token; with fewer than 2 the Gram matrix is always 1, whatever is removed"
            )
        most = self.config.max_tokens
        if most is not None and len(rows) > most:
            rows = rows[torch.randperm(len(rows), generator=generator)[:most]]
        return rows.to(self.features[i].device)

    def rows(self, i: int) -> Tensor:
        """The same rows of block ``i`` every time, or new ones as in the released code."""
        return self._draw(i, self._fresh) if self.config.fresh_rows else self._fixed[i]

    def feature_loss(self, i: int, feature: Tensor, copies: int) -> Tensor:
        """How far features of block ``i`` went, one number per copy."""
        before, after = self._tokens(i, self.features[i], 1)[0], self._tokens(i, feature, copies)
        if self.config.loss == "gram":
            rows = self.rows(i)
            return manifold_loss(
                before.flatten(0, 1)[rows], after.flatten(1, 2)[:, rows], aggregate=self.config.aggregate
            )
        if self.real is not None and not bool(self.real.all()):
            raise ValueError(f"loss={self.config.loss!r} is for images; batches with padding need loss='gram'")
        return (mean_loss if self.config.loss == "mean" else patch_loss)(before, after)

    def output_loss(self, out: Any, copies: int) -> Tensor:
        """How far the output went, one number per copy."""
        mask = None if self._mask is None else self._mask.repeat(copies, 1)
        values = model_output(out, mask).values.unflatten(0, (copies, -1))
        loss = kl_loss if self.said.classes else squared_loss
        return loss(self.said.values, values, self.config.temperature)

    def later(self, i: int) -> list[int]:
        """Blocks whose features count for a unit of block ``i``."""
        last = len(self.blocks) - 1
        if self.config.features == "none":
            return []
        if self.config.features == "last" or i == last:
            return [last]
        return list(range(i + 1, last + 1))


def repeat(value: Any, copies: int, examples: int) -> Any:
    """A structure of tensors with ``copies`` of the examples one after the other."""
    if isinstance(value, Tensor):
        whole = value.ndim > 0 and value.shape[0] % examples == 0
        return value.repeat(copies, *[1] * (value.ndim - 1)) if whole else value
    if isinstance(value, Mapping):
        return {key: repeat(v, copies, examples) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(repeat(v, copies, examples) for v in value)
    return value


@contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Within this context a module does not compute but gives a fixed answer."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before


def _zero(per_unit: int, units: Sequence[int], module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hook that zeroes another unit of a layer's input in every copy."""
    x = args[0].clone()
    for copy, unit in zip(x.unflatten(0, (len(units), -1)), units, strict=True):
        copy.narrow(channel_axis(module), unit * per_unit, per_unit).zero_()
    return (x, *args[1:])


def _per_unit(block: Block, kind: Kind) -> int:
    return width_in(block.consumer(kind), kind) // block.count(kind)


def _compare(
    session: Session, i: int, copies: int, found: list[Tensor], module: nn.Module, args: Any, out: Tensor
) -> None:
    """Hook that notes how far a feature went."""
    found.append(session.feature_loss(i, out, copies))


def _remove(session: Session, i: int, kind: Kind, units: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Trajectory term and divergence when each of some units of block ``i`` is off alone."""
    blocks, config, examples = session.blocks, session.config, session.examples
    copies = len(units)
    found: list[Tensor] = []
    tampered = config.keep_last_head_off and kind == "heads"
    restart = i if not tampered and all(block.module is not None for block in blocks[:i]) else 0
    with torch.no_grad(), ExitStack() as stack:
        for j in range(restart):
            module = blocks[j].module
            assert module is not None
            stack.enter_context(answering(module, repeat(session.outputs[j], copies, examples)))
        off = partial(_zero, _per_unit(blocks[i], kind), units)
        stack.callback(blocks[i].consumer(kind).register_forward_pre_hook(off).remove)
        for block in blocks[:i] if tampered else ():
            if block.heads:
                last = partial(_zero, _per_unit(block, "heads"), [block.heads - 1] * copies)
                stack.callback(block.consumer("heads").register_forward_pre_hook(last).remove)
        for j in session.later(i):
            compare = partial(_compare, session, j, copies, found)
            stack.callback(blocks[j].feature.register_forward_hook(compare).remove)
        out = call(session.model, repeat(session.batch, copies, examples))
    session.forwards += copies * (len(blocks) - restart) / len(blocks)
    zero = torch.zeros(copies, device=session.said.values.device)
    m = torch.stack(found).sum(0) if found else zero
    return m, session.output_loss(out, copies) if config.output else zero


def _one_by_one(session: Session, i: int, kind: Kind, units: Sequence[int]) -> tuple[Tensor, Tensor]:
    size = session.config.copies
    parts = [_remove(session, i, kind, units[at : at + size]) for at in range(0, len(units), size)]
    m, kl = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    return m, kl


def _pull_back(module: nn.Module, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Gradient at the input of a linear layer or convolution from that at its output."""
    if isinstance(module, nn.Linear):
        return gradient @ module.weight
    if isinstance(module, nn.Conv2d):
        return conv2d_input(
            hidden.shape,
            module.weight,
            gradient,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
        )
    return gradient @ cast(Tensor, module.weight).mT


def _effects(block: Block, hidden: Tensor, gradient: Tensor, examples: int) -> Float[Tensor, "examples units"]:
    """First-order change, per example, of what ``gradient`` belongs to when each hidden unit goes."""
    assert block.ffn_out is not None
    x = (hidden * _pull_back(block.ffn_out, hidden, gradient)).movedim(channel_axis(block.ffn_out), -1)
    return x.reshape(examples, -1, x.shape[-1]).sum(1)


def _probe(session: Session, i: int, feature: Tensor, generator: torch.Generator) -> Tensor:
    """A random functional of what ``feature_loss`` compares, whose squared change is that loss on average."""
    x = F.normalize(session._tokens(i, feature, 1)[0], dim=-1)
    if session.config.loss == "gram":
        rows = session.rows(i)
        f = x.flatten(0, 1)[rows]
        # a Gaussian matrix of tokens x tokens, as a sum of products of vectors so that it need not be stored
        rank = 32
        left, right = (torch.randn(rank, len(f), generator=generator).to(x) @ f for _ in range(2))
        scale = math.sqrt(rank) * (len(f) if session.config.aggregate == "mean" else 1)
        return (left * right).sum() / scale
    if session.real is not None and not bool(session.real.all()):
        raise ValueError(f"loss={session.config.loss!r} is for images; batches with padding need loss='gram'")
    if session.config.loss == "mean":
        return (x.mean(0) * torch.randn(x.shape[1:], generator=generator).to(x)).sum()
    v = torch.randn(x.shape[0], x.shape[0], generator=generator).to(x)
    return torch.einsum("bnd,bc,cnd->", x, v, x) / x.shape[1]


def _tap(
    i: int,
    last: bool,
    hidden: dict[int, Tensor],
    slack: dict[int, Tensor],
    seen: dict[int, Tensor],
    module: nn.Module,
    args: Any,
    out: Tensor,
) -> Tensor:
    """Hook that notes a block's hidden units and feature, and lets gradients with respect to its output be taken."""
    hidden[i], slack[i] = args[0].detach(), torch.zeros_like(out, requires_grad=True)
    changed = out + slack[i]
    # the feature is read before the change of its own block, except in the last one
    seen[i] = changed if last else out
    return changed


def _by_probes(session: Session) -> tuple[list[Tensor], list[Tensor]]:
    """Trajectory term and divergence of all hidden units to second order, from one forward pass."""
    blocks, config, examples = session.blocks, session.config, session.examples
    last = len(blocks) - 1
    hidden: dict[int, Tensor] = {}
    slack: dict[int, Tensor] = {}
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for i, block in enumerate(blocks):
            tap = partial(_tap, i, i == last, hidden, slack, seen)
            stack.callback(block.feature.register_forward_hook(tap).remove)
        said = model_output(call(session.model, session.batch), session._mask)
    session.forwards += 1
    inputs = [slack[i] for i in range(last + 1)]
    wanted = [i for i, block in enumerate(blocks) if block.width]
    generator = torch.Generator().manual_seed(config.seed + 1)
    m = {i: torch.zeros(blocks[i].width, device=inputs[i].device) for i in wanted}
    kl = {i: torch.zeros_like(m[i]) for i in wanted}

    def effects(target: Tensor) -> Iterator[tuple[int, Tensor]]:
        session.backwards += 1
        gradients = torch.autograd.grad(target, inputs, retain_graph=True, allow_unused=True)
        for i in wanted:
            if gradients[i] is not None:
                yield i, _effects(blocks[i], hidden[i], gradients[i], examples).float()

    if config.features != "none":
        watched = [last] if config.features == "last" or last == 0 else range(1, last + 1)
        for _ in range(config.probes):
            target = torch.stack([_probe(session, j, seen[j], generator) for j in watched]).sum()
            for i, effect in effects(target):
                m[i] += effect.sum(0).square() / config.probes
    if config.output:
        z = said.values
        p = session.said.values.softmax(-1)
        scale = config.temperature**2
        if session.said.classes and z.shape[0] == said.examples and z.shape[1] <= config.probes:
            # few classes: the change of every logit of every example, and the divergence of the changed logits
            moved = [dict(effects(z[:, k].sum())) for k in range(z.shape[1])]
            for i in wanted:
                if i in moved[0]:
                    after = session.said.values[None] - torch.stack([m_[i] for m_ in moved], -1).transpose(0, 1)
                    kl[i] = kl_loss(session.said.values, after, config.temperature)
        else:
            for _ in range(config.probes):
                v = torch.randn(z.shape, generator=generator).to(z)
                if session.said.classes:
                    v = p.sqrt() * v
                    v = math.sqrt(scale / 2) * (v - p * v.sum(-1, keepdim=True))
                else:
                    v = math.sqrt(scale) * v
                for i, effect in effects((z * v).sum()):
                    kl[i] += effect.sum(0).square() / config.probes
    empty = torch.zeros(0)
    return [m.get(i, empty) for i in range(last + 1)], [kl.get(i, empty) for i in range(last + 1)]


def _score(config: OptinConfig, kind: Kind, features: Sequence[Tensor], output: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Balanced scores with the released code's factors, where these are on."""
    sizes = [len(m) for m in features]
    m, kl = torch.cat(list(features)), torch.cat(list(output))
    if config.features == "none":
        joined = kl
    else:
        joined = balance(m, kl, config.lambda_) if config.output else m
    made = list(joined.split(sizes))
    prior = config.head_index_prior if kind == "heads" else config.neuron_index_prior
    for i, score in enumerate(made):
        score = score * (config.head_decay if kind == "heads" else 1.0)
        score = score * (config.last_layer_decay if i == len(made) - 1 else 1.0)
        if len(score):
            made[i] = score * torch.from_numpy(np.geomspace(prior, 1, len(score), dtype=np.float32))
    return tuple(made)


def rebalanced(scores: OptinScores, config: OptinConfig) -> OptinScores:
    """The same measured damage, weighted by another configuration; costs nothing.

    Of ``config`` count ``lambda_``, ``output``, ``features="none"`` (the divergence alone), and the decays and priors
    of the released code.

    Raises:
        ValueError: for scores without the ``details`` that are asked for, such as those of ``baseline_scores``.
    """
    needed = (*(("features",) if config.features != "none" else ()), *(("output",) if config.output else ()))
    made = {}
    for kind in scores.targets:
        absent = [f"{kind}/{part}" for part in needed if f"{kind}/{part}" not in scores.details]
        if absent:
            raise ValueError(f"scores have no details {absent}; they must come from optin_scores that took them")
        nothing = tuple(torch.zeros_like(s) for s in scores.of(kind))  # type: ignore[arg-type]
        parts = (scores.details.get(f"{kind}/{part}", nothing) for part in ("features", "output"))
        made[kind] = _score(config, kind, *parts)  # type: ignore[arg-type]
    return replace(scores, **made)  # type: ignore[arg-type]


def optin_scores(
    model: nn.Module,
    batch: Any,
    config: OptinConfig | None = None,
    *,
    blocks: Sequence[PrunableSpec] | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> OptinScores:
    """Score every head and hidden unit by what its removal does (Khaki and Plataniotis 2024, section 3).

    score = M + c · KL, where M sums the change of the Gram matrices of all later blocks' features and KL is the
    divergence of the output; ``balance`` says what c is. The model is left as it was: weights, mode, hooks.

    Args:
        model: any model of a family that ``find_blocks`` knows, or one described by ``blocks``.
        batch: one unlabelled batch: keyword arguments as a mapping, or one tensor. Padding is told from
            ``attention_mask``. Class scores are the output's ``logits`` (for Mask2Former its per-pixel scores); one
            logit, or features where there are no logits, are compared by their squared error instead.
        config: how; by default the paper's score with none of the released code's extra factors.
        blocks: where the units are; looked for by default.
        progress: told how many blocks of how many are scored.

    Raises:
        ValueError: for a batch of one token, features or outputs that are not finite, blocks that do not run exactly
            once, or a model of no known family.
        TypeError: for layers of a kind that cannot be cut, or an output without tensors.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> scores = optin_scores(nn.TransformerEncoder(layer, 2), torch.randn(4, 6, 8))
        >>> len(scores.heads), scores.neurons[0].shape
        (2, torch.Size([16]))
    """
    config = config or OptinConfig()
    specs = tuple(blocks) if blocks is not None else find_blocks(model)
    if not specs:
        raise ValueError("blocks is empty; give at least one PrunableSpec")
    with torch.inference_mode(False), evaluating(model):
        session = Session(model, batch, specs, config)
        many = len(session.blocks)
        empty = torch.zeros(0)
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for kind in ("heads", "neurons"):
            if kind not in config.targets or not any(block.count(kind) for block in session.blocks):
                continue
            if kind == "neurons" and config.method == "probes":
                with torch.enable_grad():
                    found[kind] = list(zip(*_by_probes(session), strict=True))
                continue
            found[kind] = []
            for i, block in enumerate(session.blocks):
                n = block.count(kind)
                found[kind].append(_one_by_one(session, i, kind, range(n)) if n else (empty, empty))
                if progress is not None:
                    progress(i + 1, many)
    if not found:
        raise ValueError(f"the model has none of the targets {config.targets}")
    details: dict[str, tuple[Tensor, ...]] = {}
    scores: dict[str, tuple[Tensor, ...]] = {}
    official = 0
    for kind, parts in found.items():
        features, output = (tuple(part[k].detach().float().cpu() for part in parts) for k in (0, 1))
        scores[kind] = _score(config, kind, features, output)  # type: ignore[arg-type]
        taken = {"features": (features, config.features != "none"), "output": (output, config.output)}
        details |= {f"{kind}/{name}": values for name, (values, on) in taken.items() if on}
        official += 1 + sum(block.count(kind) for block in session.blocks)
    nothing = (empty,) * many
    return OptinScores(
        scores.get("heads", nothing), scores.get("neurons", nothing),
        tuple(block.spec for block in session.blocks), details, session.forwards, session.backwards, official,
        tuple(found),
    )  # fmt: skip


def removal_damage(
    model: nn.Module,
    batch: Any,
    block: int,
    kind: Literal["heads", "neurons"],
    units: Sequence[int],
    config: OptinConfig | None = None,
    *,
    blocks: Sequence[PrunableSpec] | None = None,
) -> tuple[Float[Tensor, units], Float[Tensor, units]]:
    """Trajectory term and divergence of some units of one block, each really removed; a check on ``method="probes"``.

    Args:
        model, batch, config, blocks: as in ``optin_scores``.
        block: number of the block, in order of execution.
        kind: ``heads`` or ``neurons``.
        units: which of them.

    Raises:
        ValueError: for a block or unit that is not there.
    """
    specs = tuple(blocks) if blocks is not None else find_blocks(model)
    with torch.inference_mode(False), evaluating(model):
        session = Session(model, batch, specs, config or OptinConfig())
        if not 0 <= block < len(session.blocks):
            raise ValueError(f"block must be 0..{len(session.blocks) - 1}, got {block}")
        count = session.blocks[block].count(kind)
        if not units or min(units) < 0 or max(units) >= count:
            raise ValueError(f"units must be some of 0..{count - 1}, got {list(units)[:5]}")
        m, kl = _one_by_one(session, block, kind, list(units))
    return m.cpu(), kl.cpu()
