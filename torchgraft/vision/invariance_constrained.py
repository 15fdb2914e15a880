"""Invariance-constrained learning (Hounie, Chamon and Ribeiro, ICML 2023, arXiv 2209.15031): augment as much as needed.

Training minimises the loss on clean data subject to a bound on the loss on hard transformations of it. A multiplier
grows while the bound is violated and shrinks to zero while it holds, so that training itself decides how much to
augment; which transformation an example gets is sampled in proportion to its loss by Metropolis and Hastings, which
needs no gradients of the transformations.

Legend: B examples, S proposals of a chain, C chains of an example, K groups of operations with a multiplier each.

Facts of the official code (ihounie/daug, commit 3fcb9b9, ``train_pd_batch.py``; its loop, run beside ours on the same
proposals and draws, gives the same operations, multipliers and weights to rounding): proposals are scored in train
mode; the transformed loss that drives the multiplier is the one of the weights before the step, with the mixture that
of the scores. With one proposal it scores it too, which here happens with the mixture only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.surgery import evaluating
from torchgraft.vision.augmentation_space import AugmentationSpace

__all__ = [
    "DualVariable",
    "InvarianceConstrainedModel",
    "InvarianceConstrainedTrainer",
    "InvarianceConstraint",
    "StepInfo",
    "SymmetryReport",
    "mh_sample",
    "symmetry_report",
]

LEVELS = 30
"""Levels are 1/30, ..., 1; no proposal is drawn at level zero, as in the official code."""


def mh_sample(losses: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Run independence chains whose stationary distribution is proportional to the loss (section 4, algorithm 1).

    The state begins at the first proposal and moves to proposal s with probability ``min(1, loss_s / loss_state)``.
    From a loss of zero every positive loss is accepted; zero against zero stays.

    Args:
        losses: (S, C, B), not negative; of the proposals, which were drawn from the base measure.
        generator: of the device of ``losses``.

    Returns:
        (C, B), int64: the index of the proposal in which each chain ends.

    Raises:
        ValueError: for another rank, no proposals, or losses that are negative or NaN.

    Example:
        >>> mh_sample(torch.tensor([[[1.0, 1.0]], [[3.0, 0.0]]]))
        tensor([[1, 0]])
    """
    if losses.ndim != 3 or len(losses) == 0:
        raise ValueError(f"losses must have shape (proposals, chains, batch), got {tuple(losses.shape)}")
    if not bool((losses >= 0).all()):
        raise ValueError(
            f"losses must not be negative or NaN, the acceptance ratio is one of losses; the least is "
            f"{float(losses.min()):g}; use a loss bounded below by zero, such as cross-entropy"
        )
    state, loss = torch.zeros_like(losses[0], dtype=torch.int64), losses[0]
    for s in range(1, len(losses)):
        draw = torch.rand(loss.shape, generator=generator, device=loss.device, dtype=loss.dtype)
        # as a product, so that nothing is divided by zero
        accepted = (draw * loss < losses[s]) & (losses[s] > 0)
        state, loss = torch.where(accepted, s, state), torch.where(accepted, losses[s], loss)
    return state


class DualVariable(nn.Module):
    """Multipliers of inequality constraints, raised by violation and never negative (algorithm 1, dual ascent).

    Args:
        n: how many.
        lr: step of the ascent.
        init: first value of each.
        max: upper bound; reaching it is warned of once, for it means that the margin cannot be met.

    Raises:
        ValueError: for a number of multipliers below one, a negative start, or a step or bound that is not positive.

    Example:
        >>> dual = DualVariable(1, lr=0.1, init=0.5)
        >>> dual.update(torch.tensor([2.0])), dual.update(torch.tensor([-9.0]))
        (tensor([0.7000]), tensor([0.]))
    """

    value: Tensor

    def __init__(self, n: int = 1, lr: float = 1e-4, init: float = 0.0, max: float | None = None) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not init >= 0:
            raise ValueError(f"init must not be negative, got {init}")
        if max is not None and not max > 0:
            raise ValueError(f"max must be positive, got {max}")
        self.lr, self.max = lr, max
        self.register_buffer("value", torch.full((n,), float(init)))

    @torch.no_grad()
    def update(self, slack: Tensor) -> Tensor:
        """Ascend by ``lr * slack``, where slack is the loss minus its margin, averaged over processes.

        Args:
            slack: (n,).

        Returns:
            A copy of the new values.

        Raises:
            ValueError: for another shape, or NaN.
        """
        if slack.shape != self.value.shape:
            raise ValueError(f"slack must have shape {tuple(self.value.shape)}, got {tuple(slack.shape)}")
        if bool(slack.isnan().any()):
            raise ValueError("slack is NaN: the loss on transformed data diverged; lower the learning rate or dual_lr")
        slack = slack.detach().to(self.value)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(slack)
            slack = slack / torch.distributed.get_world_size()
        self.value.add_(self.lr * slack).clamp_(min=0)
        if self.max is not None and bool((self.value > self.max).any()):
            self.value.clamp_(max=self.max)
            warnings.warn(
                f"a multiplier reached its bound of {self.max:g}: the margin is below what this model can reach on "
                "transformed data; raise the margin or weaken the transformations",
                stacklevel=2,
            )
        return self.value.clone()


class StepInfo(NamedTuple):
    """What one step did.

    Attributes:
        loss: the Lagrangian, to be minimised.
        clean_loss: mean loss on the clean examples, detached.
        aug_loss: (K,), mean loss on the transformed examples of each group, detached; with ``mixture`` as scored.
        dual: (K,), the multipliers that the loss was made with.
        accept_rate: share of the chains that ended away from their first proposal; NaN with one proposal.
        op_ids: (K, C, B), the sampled operations, indices into the names of the space.
        levels: (K, C, B), their levels.
        logits: (B, classes), of the clean examples, detached; with ``mixture`` of what was trained on.
    """

    loss: Tensor
    clean_loss: Tensor
    aug_loss: Tensor
    dual: Tensor
    accept_rate: float
    op_ids: Tensor
    levels: Tensor
    logits: Tensor


class _Sampled(NamedTuple):
    """Views (C * B, ...) where the chains of a group end, their operations, levels and scores (C, B); the rate."""

    views: Tensor
    op_ids: Tensor
    levels: Tensor
    losses: Tensor | None
    rate: float


class SymmetryReport(NamedTuple):
    """What the multipliers and the sampled operations say of the symmetries of the data.

    Attributes:
        groups: names.
        dual: (steps, K), the multipliers after each step. A large one marks an invariance that the data refuses.
        operations: name to how often it was sampled. Hard operations are sampled more.
        levels: name to (30,), how often at each level.
    """

    groups: tuple[str, ...]
    dual: Tensor
    operations: dict[str, int]
    levels: dict[str, Tensor]


class InvarianceConstraint(nn.Module):
    """Loss of invariance-constrained training; its state holds the multipliers.

    In training mode every call also takes the dual step, so ``constraint(model, x, y).loss.backward()`` and a step of
    your optimiser are all of an iteration. In evaluation mode the multipliers stay.

    Args:
        transforms: the operations to be invariant to. Operations named ``identity`` are never proposed.
        margin: bound on the mean loss on transformed examples, in units of the loss; one number, or one for each group
            by name. A label smoothing or mixup raises the loss that can be reached. ``inf`` turns a constraint off.
        dual_lr: step of the dual ascent. 1e-4 is the paper's, for tens of thousands of steps.
        dual_init: first multipliers.
        dual_max: bound of the multipliers; reaching it warns.
        mh_steps: proposals of a chain (S); 1 samples uniformly.
        threshold: transformations are sampled in proportion to ``[loss - threshold]_+``, the general form of the paper,
            whose experiments use 0 (unverified).
        chains: transformations of each example (C).
        groups: name to operation names; each group has its own constraint and multiplier. One group of all without it.
        mixture: train on each example either clean or transformed, with odds 1 to the multiplier, in one pass
            (the paper's stochastic mixture). For one group and one chain.
        loss_fn: ``(logits, targets, reduction="none") -> (B,)``, not negative.
        prepare: what happens to every view after its transformation, clean ones too, drawn anew for each: crops,
            flips, normalisation, cutout.
        proposal_mode: ``"train"`` scores proposals as the official code does, by batch statistics, which also moves
            running averages; ``"eval"`` leaves the model's batch norms alone.
        joint_forward: pass clean and transformed examples together. Cheaper, but they share their batch statistics.

    Raises:
        ValueError: for settings out of range, unknown groups or operations, or nothing to propose.

    Example:
        >>> space = AugmentationSpace.trivial(8)
        >>> constraint = InvarianceConstraint(space, margin=0.5, dual_lr=0.1)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        >>> info = constraint(model, torch.rand(4, 3, 8, 8), torch.arange(4))
        >>> info.loss.shape, info.op_ids.shape, bool(constraint.dual.value > 0)
        (torch.Size([]), torch.Size([1, 1, 4]), True)
    """

    def __init__(
        self,
        transforms: AugmentationSpace,
        *,
        margin: float | Mapping[str, float] = 0.6,
        dual_lr: float = 1e-4,
        dual_init: float = 0.0,
        dual_max: float | None = None,
        mh_steps: int = 2,
        threshold: float = 0.0,
        chains: int = 1,
        groups: Mapping[str, Sequence[str]] | None = None,
        mixture: bool = False,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        prepare: Callable[[Tensor], Tensor] | None = None,
        proposal_mode: Literal["train", "eval"] = "train",
        joint_forward: bool = False,
    ) -> None:
        super().__init__()
        for name, number in (("mh_steps", mh_steps), ("chains", chains)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 0 <= threshold < float("inf"):
            raise ValueError(f"threshold must be a loss, not negative and finite, got {threshold}")
        if proposal_mode not in ("train", "eval"):
            raise ValueError(f"proposal_mode must be 'train' or 'eval', got {proposal_mode!r}")
        groups = {"all": transforms.names} if groups is None else dict(groups)
        if mixture and (chains > 1 or len(groups) > 1):
            raise ValueError(f"mixture takes one chain and one group, got {chains} and {len(groups)}")
        self.transforms, self.groups = transforms, {name: tuple(ops) for name, ops in groups.items()}
        self._choices = [self._indices(name, ops) for name, ops in self.groups.items()]
        if not isinstance(margin, int | float | Mapping):
            raise TypeError(f"margin must be a number, or one for each group by name, got {margin!r}")
        margins = dict.fromkeys(self.groups, margin) if isinstance(margin, int | float) else dict(margin)
        if margins.keys() != self.groups.keys():
            raise ValueError(f"margin must name the groups {', '.join(self.groups)}, got {', '.join(margins)}")
        if not all(value >= 0 for value in margins.values()):
            raise ValueError(f"margin must not be negative, got {margin}")
        self.margins = tuple(float(margins[name]) for name in self.groups)
        self.dual = DualVariable(len(self.groups), dual_lr, dual_init, dual_max)
        self.mh_steps, self.chains, self.mixture, self.threshold = mh_steps, chains, mixture, threshold
        self.loss_fn, self.prepare = loss_fn, prepare or _unchanged
        self.proposal_mode, self.joint_forward = proposal_mode, joint_forward
        self.register_buffer("counts", torch.zeros(len(transforms), LEVELS, dtype=torch.int64))
        self.counts: Tensor
        self._history: list[Tensor] = []

    def _indices(self, group: str, operations: Sequence[str]) -> Tensor:
        unknown = [name for name in operations if name not in self.transforms.names]
        if unknown:
            raise ValueError(
                f"groups[{group!r}] has {', '.join(unknown)}; there are {', '.join(self.transforms.names)}"
            )
        chosen = [self.transforms.names.index(name) for name in operations if name != "identity"]
        if not chosen:
            raise ValueError(f"groups[{group!r}] has no operation to propose; identity is never proposed")
        return torch.tensor(chosen)

    @property
    def history(self) -> Tensor:
        """(steps, K), the multipliers after each step."""
        return torch.stack(self._history) if self._history else torch.empty(0, len(self.groups))

    def get_extra_state(self) -> Tensor:
        """The trajectory of the multipliers, a tensor so that safetensors takes it."""
        return self.history

    def set_extra_state(self, state: Tensor) -> None:
        """Take a trajectory back."""
        self._history = list(state.cpu())

    def propose(self, x: Tensor, group: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Draw from the base measure: uniform operation of the group, uniform level, random sign.

        Args:
            x: (B, ...).
            group: index.
            generator: of the device of ``x``.

        Returns:
            Transformed examples (S * C * B, ...), operations and levels of the same number.
        """
        n = self.mh_steps * self.chains * len(x)
        choices = self._choices[group].to(x.device)

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (n,), generator=generator, device=x.device)

        op = choices[draw(0, len(choices))]
        level = draw(1, LEVELS + 1) / LEVELS
        sign = 2.0 * draw(0, 2) - 1
        repeated = x.repeat(self.mh_steps * self.chains, *[1] * (x.ndim - 1))
        return self.transforms.apply(repeated, op, level, sign), op, level

    def forward(
        self, model: Callable[[Tensor], Any], x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> StepInfo:
        """The Lagrangian of a batch, and in training mode the dual step.

        Args:
            model: examples to logits (B, classes), or to an output with ``logits``.
            x: (B, ...), clean; images of the ready spaces in [0, 1] and not normalised.
            y: (B,) classes, or whatever ``loss_fn`` takes with a first axis of B.
            generator: for proposals and acceptance, of the device of ``x``.

        Raises:
            ValueError: for examples and targets that are not equally many, or losses that are not per example,
                negative or NaN.
            TypeError: for a model that gives no logits.
        """
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x and y must be equally many and not none, got {len(x)} and {len(y)}")
        sampled = [self._sample(model, x, y, k, generator) for k in range(len(self.groups))]
        images = [s.views for s in sampled]
        op_ids, levels = torch.stack([s.op_ids for s in sampled]), torch.stack([s.levels for s in sampled])
        dual = self.dual.value.clone()
        clean = self.prepare(x)
        targets = y.repeat(self.chains, *[1] * (y.ndim - 1))
        if self.mixture:
            loss, clean_loss, aug_loss, logits = self._mixed(model, clean, sampled[0], y, float(dual), generator)
        else:
            if self.joint_forward:
                out = logits_of(model(torch.cat([clean, *images])))
                first, others = out[: len(x)], list(out[len(x) :].split(self.chains * len(x)))
            else:
                first = logits_of(model(clean))
                # where no multiplier is positive, nothing can flow back from here
                with torch.set_grad_enabled(torch.is_grad_enabled() and bool((dual > 0).any())):
                    others = [logits_of(model(view)) for view in images]
            clean_each = self._losses(first, y)
            transformed = torch.stack([self._losses(other, targets).mean() for other in others])
            loss = clean_each.mean() + (dual[dual > 0] * transformed[dual > 0]).sum()
            clean_loss, aug_loss, logits = clean_each.mean().detach(), transformed.detach(), first.detach()
        if self.training:
            slack = aug_loss - aug_loss.new_tensor(self.margins)
            # an infinite margin leaves its multiplier at zero rather than moving it by infinity
            self.dual.update(slack.clamp(min=torch.finfo(slack.dtype).min))
            self._count(op_ids, levels)
        rates = [s.rate for s in sampled]
        return StepInfo(loss, clean_loss, aug_loss, dual, sum(rates) / len(rates), op_ids, levels, logits)

    def _sample(
        self, model: Callable[[Tensor], Any], x: Tensor, y: Tensor, group: int, generator: torch.Generator | None
    ) -> _Sampled:
        proposals, op, level = self.propose(x, group, generator)
        proposals = self.prepare(proposals)
        shape = (self.mh_steps, self.chains, len(x))
        if self.mh_steps == 1 and not self.mixture:
            return _Sampled(proposals, op.view(shape)[0], level.view(shape)[0], None, float("nan"))
        with torch.no_grad(), nullcontext() if self.proposal_mode == "train" else evaluating(model):
            targets = y.repeat(self.mh_steps * self.chains, *[1] * (y.ndim - 1))
            losses = self._losses(logits_of(model(proposals)), targets).view(shape)
        scores = losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses
        # what is below zero is negative by itself, not by the threshold, and must be refused
        scores = (scores - self.threshold).clamp(min=0) if self.threshold and bool((scores >= 0).all()) else scores
        final = mh_sample(scores, generator=generator)
        rows = torch.arange(losses[0].numel(), device=x.device).view(shape[1:]) + final * losses[0].numel()
        rate = (final != 0).float().mean().item() if self.mh_steps > 1 else float("nan")
        return _Sampled(proposals[rows.flatten()], op[rows], level[rows], losses.flatten()[rows], rate)

    def _mixed(
        self, model: Callable[[Tensor], Any], clean: Tensor, sampled: _Sampled, y: Tensor, dual: float,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        keep = torch.rand(len(y), generator=generator, device=clean.device) < 1 / (1 + dual)
        logits = logits_of(model(torch.where(keep.view(-1, *[1] * (clean.ndim - 1)), clean, sampled.views)))
        losses = self._losses(logits, y)
        assert sampled.losses is not None
        clean_loss = losses.detach()[keep].mean() if bool(keep.any()) else losses.new_tensor(torch.nan)
        # the scores cover every example, also where none drew a transformation and the multiplier could never rise
        return losses.mean(), clean_loss, sampled.losses.mean()[None], logits.detach()

    def _losses(self, logits: Tensor, y: Tensor) -> Tensor:
        losses = self.loss_fn(logits, y, reduction="none")
        if losses.shape != (len(logits),):
            raise ValueError(
                f"loss_fn must give one loss for each of {len(logits)} examples with reduction='none', "
                f"got shape {tuple(losses.shape)}"
            )
        return losses

    @torch.no_grad()
    def _count(self, op_ids: Tensor, levels: Tensor) -> None:
        place = op_ids * LEVELS + (levels * LEVELS).round().long() - 1
        self.counts += torch.bincount(place.flatten(), minlength=self.counts.numel()).view_as(self.counts)
        self._history.append(self.dual.value.detach().cpu().clone())


def _unchanged(x: Tensor) -> Tensor:
    return x


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output.

    Raises:
        TypeError: for an output that is no tensor and has none.
        ValueError: for logits that have no class axis.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model must return logits, or an output with .logits, got {type(output).__name__}")
    if logits.ndim < 2:
        raise ValueError(f"model must return logits of shape (batch, classes), got {tuple(logits.shape)}")
    return logits


class InvarianceConstrainedTrainer:
    """A training step of your model and optimiser under an ``InvarianceConstraint``.

    Args:
        model: examples to logits.
        optimizer: of its parameters.
        constraint: the loss.
        clip: bound of the gradient norm, 5 in the paper; ``None`` for none.

    Raises:
        ValueError: for a bound that is not positive.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = InvarianceConstrainedTrainer(
        ...     model, optimizer, InvarianceConstraint(AugmentationSpace.trivial(8), margin=0.5, dual_lr=1e-2)
        ... )
        >>> info = trainer.step(torch.rand(4, 3, 8, 8), torch.arange(4))
        >>> sorted(trainer.state_dict())
        ['constraint', 'model', 'optimizer']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        constraint: InvarianceConstraint,
        *,
        clip: float | None = 5.0,
    ) -> None:
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive or None, got {clip}")
        self.model, self.optimizer, self.constraint, self.clip = model, optimizer, constraint, clip

    def step(self, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> StepInfo:
        """One primal step and one dual step; arguments as of the constraint."""
        self.model.train()
        self.constraint.train()
        self.optimizer.zero_grad(set_to_none=True)
        info = self.constraint(self.model, x, y, generator=generator)
        info.loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return info._replace(loss=info.loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Model, optimiser and multipliers."""
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "constraint": self.constraint}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for name in ("model", "optimizer", "constraint"):
            getattr(self, name).load_state_dict(state[name])


class InvarianceConstrainedModel(nn.Module):
    """A classifier of transformers under a constraint, for its ``Trainer`` and for accelerate as they are.

    In training mode ``forward`` returns the Lagrangian as ``loss``; in evaluation it is the model. The multipliers are
    in the state dict, so checkpoints hold them. After training take ``.model``.

    Args:
        model: called with ``pixel_values``, returning an output with ``logits``.
        constraint: the loss.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_labels=3)
        >>> model = InvarianceConstrainedModel(
        ...     ViTForImageClassification(config), InvarianceConstraint(AugmentationSpace.trivial(8))
        ... )
        >>> model(pixel_values=torch.rand(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.ndim
        0
    """

    def __init__(self, model: nn.Module, constraint: InvarianceConstraint) -> None:
        super().__init__()
        self.model, self.constraint = model, constraint

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Images in [0, 1] (B, 3, H, W) and labels (B,) to an ``ImageClassifierOutput``.

        Raises:
            ValueError: in training mode without labels.
        """
        from transformers.modeling_outputs import ImageClassifierOutput

        if not self.training:
            logits = logits_of(self.model(self.constraint.prepare(pixel_values)))
            loss = None if labels is None else self.constraint._losses(logits, labels).mean()
            return ImageClassifierOutput(loss=loss, logits=logits)
        if labels is None:
            raise ValueError("labels are needed in training mode; call eval() for predictions")
        info = self.constraint(self.model, pixel_values, labels)
        return ImageClassifierOutput(loss=info.loss, logits=info.logits)


def symmetry_report(
    trained: InvarianceConstraint | InvarianceConstrainedTrainer | InvarianceConstrainedModel,
) -> SymmetryReport:
    """Which invariances the data accepts: multipliers over training, and what was sampled.

    Args:
        trained: the constraint, or what holds it.

    Example:
        >>> constraint = InvarianceConstraint(AugmentationSpace.trivial(8).subset("rotate", "color"))
        >>> symmetry_report(constraint).operations
        {'rotate': 0, 'color': 0}
    """
    constraint = trained if isinstance(trained, InvarianceConstraint) else trained.constraint
    counts = constraint.counts.cpu()
    return SymmetryReport(
        tuple(constraint.groups),
        constraint.history,
        {name: int(n.sum()) for name, n in zip(constraint.transforms.names, counts, strict=True)},
        dict(zip(constraint.transforms.names, counts.clone(), strict=True)),
    )
