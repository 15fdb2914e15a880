"""Model-adaptive data augmentation, MADAug (Hou, Zhang and Zhou, ICCV 2023, arXiv 2309.04747).

A small policy looks at the task model's features of an image and gives a probability and a strength for every
operation. It is trained by bi-level optimisation: after one virtual step of the task model on policy-augmented images,
the loss of the moved model on validation data is differentiated back into the policy. A curriculum says when: the
share of each batch that is augmented grows from nearly nothing to all.

Legend: B images, K operations, D features.

Facts of the official code (JackHck/MADAug, commit fe5445d; its policy update and its operations were run beside ours on
CPU): the meta pass runs with batch norm in evaluation, as here. Its virtual step also differentiates through the
features that the policy sees, a path that no real step has, since drawn operations have no gradient;
``through_features`` brings it back, and then gradients and Adam step agree to rounding. Its default ``--bi_epochs`` of
300 exceeds its 240 epochs, so the shipped script never trains its policy; here the policy is trained from the first
call on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchgraft.surgery import evaluating
from torchgraft.vision.augmentation_space import AugmentationSpace

__all__ = [
    "AugmentationPolicy",
    "MADAug",
    "MADAugModel",
    "PolicyRecord",
    "curriculum",
    "hold_out",
    "mixed_images",
    "virtual_step",
]


def curriculum(epoch: float, tau: float = 40.0) -> float:
    """Share of a batch that is augmented: ``min(tanh(epoch / tau) + 0.01, 1)``, the monotone curriculum (section 3.3).

    Args:
        epoch: how far training is, fractions allowed.
        tau: epochs after which 77 % are augmented.

    Raises:
        ValueError: for a negative epoch or a tau that is not positive.

    Example:
        >>> [round(curriculum(t), 4) for t in (0, 40, 400)]
        [0.01, 0.7716, 1.0]
    """
    if not epoch >= 0:
        raise ValueError(f"epoch must not be negative, got {epoch}")
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return min(math.tanh(epoch / tau) + 0.01, 1.0)


def hold_out(n: int, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of training and policy-validation examples, disjoint; the policy must not see what the task model learns.

    Args:
        n: how many examples there are.
        share: of the validation part.
        seed: of the shuffle.

    Returns:
        Two int64 tensors.

    Raises:
        ValueError: for a share outside (0, 1), or one that leaves a part empty.

    Example:
        >>> train, validation = hold_out(100, 0.2)
        >>> len(train), len(validation), len(set(train.tolist()) & set(validation.tolist()))
        (80, 20, 0)
    """
    held = round(n * share)
    if not 0 < share < 1 or not 0 < held < n:
        raise ValueError(f"share must leave examples on both sides of {n}, got {share}")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[held:], order[:held]


class AugmentationPolicy(nn.Module):
    """From features to strengths and probabilities of operations.

    Args:
        feature_dim: D.
        operations: K.
        hidden: widths of hidden layers with ReLU; none in the paper's default.

    Raises:
        ValueError: for widths or a number of operations below one.

    Example:
        >>> policy = AugmentationPolicy(8, 17)
        >>> magnitudes, probabilities = policy(torch.randn(4, 8))
        >>> magnitudes.shape, torch.allclose(probabilities.sum(1), torch.ones(4))
        (torch.Size([4, 17]), True)
    """

    def __init__(self, feature_dim: int, operations: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        widths = (feature_dim, *hidden, operations)
        if min(widths) < 1:
            raise ValueError(f"feature_dim, hidden and operations must be positive, got {widths}")
        self.feature_dim, self.operations = feature_dim, operations
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.projection = nn.Sequential(*layers, nn.Linear(widths[-2], 2 * operations))

    def forward(self, features: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Features (B, D) to magnitudes in (0, 1) and probabilities, (B, K) each.

        Args:
            features: of images without operations.
            temperature: of the softmax; 1 when the policy is trained, higher when it is used.

        Raises:
            ValueError: for features of another shape, or a temperature that is not positive.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(f"features must have shape (B, {self.feature_dim}), got {tuple(features.shape)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        magnitudes, scores = self.projection(features).split(self.operations, 1)
        return magnitudes.sigmoid(), (scores / temperature).softmax(1)


def mixed_images(images: Tensor, magnitudes: Tensor, probabilities: Tensor) -> Tensor:
    """Differentiable stand-in for drawing an operation: the mean of all versions, weighted by their probabilities.

    Each version passes its magnitude's gradient straight through: the operation is taken as if every pixel grew by as
    much as its magnitude (section 3.2).

    Args:
        images: (B, K, ...), every operation's version of each image, no gradient needed.
        magnitudes: (B, K), with which they were made.
        probabilities: (B, K).

    Returns:
        (B, ...).

    Example:
        >>> images = torch.rand(2, 3, 1, 4, 4)
        >>> magnitudes = torch.rand(2, 3, requires_grad=True)
        >>> mixed = mixed_images(images, magnitudes, torch.eye(3)[:2])
        >>> torch.allclose(mixed[1], images[1, 1]), torch.autograd.grad(mixed.sum(), magnitudes)[0].diag().tolist()
        (True, [16.0, 16.0])
    """
    if images.shape[:2] != magnitudes.shape or magnitudes.shape != probabilities.shape:
        raise ValueError(
            f"images must be (B, K, ...) with magnitudes and probabilities (B, K), got {tuple(images.shape)}, "
            f"{tuple(magnitudes.shape)} and {tuple(probabilities.shape)}"
        )
    through = (magnitudes - magnitudes.detach()).view(*magnitudes.shape, *[1] * (images.ndim - 2))
    return torch.einsum("bk,bk...->b...", probabilities.to(images.dtype), images.detach() + through.to(images.dtype))


def virtual_step(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    lr: float,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    named: Mapping[str, nn.Parameter] | None = None,
) -> dict[str, Tensor]:
    """Parameters after a step that is not taken, differentiable in the gradients.

    Args:
        parameters: by name.
        gradients: by name.
        lr: of the step.
        optimizer: with SGD, its weight decay and momentum buffers take part, read and not changed.
        named: the parameters that the optimiser knows, by name.

    Example:
        >>> virtual_step({"w": torch.ones(1)}, {"w": torch.tensor([2.0])}, 0.1)
        {'w': tensor([0.8000])}
    """
    moved = {}
    groups = {}
    if isinstance(optimizer, torch.optim.SGD) and named is not None:
        names = {id(p): name for name, p in named.items()}
        groups = {names[id(p)]: (g, optimizer.state.get(p, {})) for g in optimizer.param_groups for p in g["params"]
                  if id(p) in names}  # fmt: skip
    for name, parameter in parameters.items():
        direction = gradients[name]
        if name in groups:
            group, state = groups[name]
            direction = direction + group["weight_decay"] * parameter
            if group["momentum"]:
                buffer = state.get("momentum_buffer")
                # the first step of SGD takes the gradient as its buffer
                speed = (
                    direction if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * direction
                )
                direction = direction + group["momentum"] * speed if group["nesterov"] else speed
        moved[name] = parameter - lr * direction
    return moved


class PolicyRecord(NamedTuple):
    """What the policy thought at one of its steps.

    Attributes:
        validation_loss: of the moved model.
        probabilities: (K,), mean over the search batch.
        magnitudes: (K,), likewise.
        per_class: class to (probabilities, magnitudes), means over its images.
    """

    validation_loss: float
    probabilities: Tensor
    magnitudes: Tensor
    per_class: dict[int, tuple[Tensor, Tensor]]


class MADAug:
    """Augments batches by a policy that it trains along.

    In your loop: every ``search_every`` batches ``policy_step(x, y)``, and always ``augment(x, epoch)``; or
    ``step(x, y, epoch)``, which does both. Nothing of the task model is changed by either, batch-norm averages and
    optimiser state included.

    Args:
        task_model: images to logits (B, classes), or to an output with ``logits``. Its features are the inputs of its
            last ``nn.Linear``.
        policy: see there; a trained one of another data set may be given, with ``frozen``.
        feature_model: whose features the policy sees; ``task_model`` without it. A policy that moves to other data
            takes the model along that it was trained with.
        ops: the operations.
        validation: batches ``(x, y)`` of held-out examples, gone through again and again (a ``DataLoader``); may be
            ``None`` for a frozen policy.
        optimizer: of the task model; SGD gives the virtual step its learning rate, weight decay and momentum.
        inner_lr: of a virtual step of plain gradient descent, where the optimiser is another one.
        prepare: from [0, 1] to what the task model takes (normalisation), after the operations.
        search_every: batches from one policy step to the next.
        search_batch: images of a policy step.
        temperature: of the probabilities when augmenting.
        k_ops: operations in a row for one image, all different.
        delta: magnitudes are perturbed by up to so much when augmenting.
        tau: of the curriculum, in epochs; ``None`` augments all from the beginning.
        policy_lr, policy_weight_decay: of the policy's Adam.
        loss_fn: mean loss of logits and targets.
        hypergradient: ``"exact"`` by second derivatives, or ``"finite_difference"`` as in DARTS, for models whose
            kernels have none.
        through_features: take the virtual step through the policy's features too, as the official code does; for the
            exact hypergradient, and features of the task model itself.
        frozen: use the policy and do not train it.

    Raises:
        ValueError: for settings out of range, no validation data, a model without a linear head, a policy for another
            number of operations.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> ops = AugmentationSpace.autoaugment17(16)
        >>> validation = [(torch.rand(8, 3, 16, 16), torch.arange(8))]
        >>> madaug = MADAug(model, AugmentationPolicy(8, len(ops)), ops, validation, inner_lr=0.1)
        >>> x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
        >>> madaug.step(x, y, epoch=5).shape, len(madaug.history)
        (torch.Size([8, 3, 16, 16]), 1)
    """

    def __init__(
        self,
        task_model: nn.Module,
        policy: AugmentationPolicy,
        ops: AugmentationSpace,
        validation: Iterable[tuple[Tensor, Tensor]] | None,
        *,
        feature_model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        inner_lr: float | None = None,
        prepare: Callable[[Tensor], Tensor] | None = None,
        search_every: int = 3,
        search_batch: int = 16,
        temperature: float = 3.0,
        k_ops: int = 2,
        delta: float = 0.3,
        tau: float | None = 40.0,
        policy_lr: float = 1e-3,
        policy_weight_decay: float = 1e-3,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        hypergradient: Literal["exact", "finite_difference"] = "exact",
        through_features: bool = False,
        frozen: bool = False,
    ) -> None:
        for name, value in (("search_every", search_every), ("search_batch", search_batch), ("k_ops", k_ops)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if k_ops > len(ops):
            raise ValueError(f"k_ops must be at most the {len(ops)} operations there are, got {k_ops}")
        if policy.operations != len(ops):
            raise ValueError(f"policy is for {policy.operations} operations and ops has {len(ops)}")
        if not temperature > 0 or not 0 <= delta <= 1:
            raise ValueError(f"temperature must be positive and delta in [0, 1], got {temperature} and {delta}")
        if hypergradient not in ("exact", "finite_difference"):
            raise ValueError(f"hypergradient must be 'exact' or 'finite_difference', got {hypergradient!r}")
        if through_features and (hypergradient != "exact" or feature_model not in (None, task_model)):
            raise ValueError("through_features needs hypergradient='exact' and no other feature_model")
        if not frozen:
            if validation is None:
                raise ValueError("validation is None; hold examples out of the training set, for instance by hold_out")
            if inner_lr is None and not isinstance(optimizer, torch.optim.SGD):
                got = "neither" if optimizer is None else f"{type(optimizer).__name__} without inner_lr"
                raise ValueError(f"the virtual step needs an SGD optimizer or inner_lr, a plain step's; got {got}")
            if inner_lr is not None and not inner_lr > 0:
                raise ValueError(f"inner_lr must be positive, got {inner_lr}")
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in policy.parameters()):
                raise TypeError(
                    "policy must stay in float32: its gradient is a second derivative; the task model may not"
                )
        if tau is not None:
            curriculum(0, tau)
        self.task_model, self.policy, self.ops = task_model, policy, ops
        self.feature_model = task_model if feature_model is None else feature_model
        self.head = _last_linear(self.feature_model)
        if self.head.in_features != policy.feature_dim:
            raise ValueError(
                f"policy takes {policy.feature_dim} features, task_model's last linear layer {self.head.in_features}"
            )
        self.prepare, self.loss_fn = prepare or (lambda x: x), loss_fn
        self.optimizer, self.inner_lr = optimizer, inner_lr
        self.search_every, self.search_batch = search_every, search_batch
        self.temperature, self.k_ops, self.delta, self.tau = temperature, k_ops, delta, tau
        self.hypergradient, self.through_features, self.frozen = hypergradient, through_features, frozen
        self.policy_optimizer = torch.optim.Adam(policy.parameters(), policy_lr, weight_decay=policy_weight_decay)
        self.history: list[PolicyRecord] = []
        self.epoch = 0.0
        self._batches = 0
        self._validation = None if validation is None else _again_and_again(validation)

    def features(self, x: Tensor) -> Tensor:
        """(B, D), of images in [0, 1] without operations, the model in evaluation and without gradient."""
        with torch.no_grad():
            return self._features(x)

    def _features(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            with evaluating(self.feature_model):
                self.feature_model(self.prepare(x))
        finally:
            hook.remove()
        if len(found) != 1 or found[0].ndim != 2:
            raise ValueError(
                f"the last linear layer of task_model must be reached once with features (B, D), was reached "
                f"{len(found)} times"
            )
        return found[0]

    def _check(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(f"x and validation must be floats, images in [0, 1], got {x.dtype}; divide bytes by 255")
        if not bool(x.isfinite().all()):
            raise ValueError("x and validation must be finite, got NaN or infinity")
        self.ops.check(x)

    def _seen(self, features: Tensor) -> Tensor:
        """Features in the policy's precision, which is not lowered with the task model's."""
        return features.to(next(self.policy.parameters()).dtype)

    @torch.no_grad()
    def augment(self, x: Tensor, epoch: float | None = None) -> Tensor:
        """Images for the task model to learn from ("exploit"): the first share of the batch gets ``k_ops`` operations.

        Args:
            x: (B, 3, H, W) in [0, 1], a shuffled batch, cropped and flipped if you do so, not normalised.
            epoch: how far training is, for the curriculum; ``self.epoch`` without it.

        Returns:
            A new tensor like ``x``; ``prepare`` is still to be applied.
        """
        self._check(x)
        share = 1.0 if self.tau is None else curriculum(self.epoch if epoch is None else epoch, self.tau)
        n = math.floor(share * len(x))
        if n == 0:
            return x.clone()
        magnitudes, probabilities = self.policy(self._seen(self.features(x[:n])), self.temperature)
        chosen = torch.multinomial(probabilities, self.k_ops)
        out = x.clone()
        for k in range(self.k_ops):
            op = chosen[:, k]
            level = magnitudes.gather(1, op[:, None])[:, 0]
            level = (level + self.delta * (2 * torch.rand_like(level) - 1)).clamp(0, 1)
            out[:n] = self.ops.apply(out[:n], op, level, _signs(level))
        return out

    def policy_step(self, x: Tensor, y: Tensor) -> PolicyRecord:
        """One step of the policy ("explore").

        Args:
            x: (B, 3, H, W) in [0, 1], of the training data.
            y: (B,), classes.

        Returns:
            What it thought, also kept in ``history``.

        Raises:
            ValueError: for a frozen policy, images and targets that are not equally many, or a loss that is not finite.
        """
        if self.frozen or self._validation is None:
            raise ValueError("the policy is frozen; make MADAug with frozen=False and validation data")
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x and y must be equally many and not none, got {len(x)} and {len(y)}")
        self._check(x)
        x, y = x[: self.search_batch], y[: self.search_batch]
        with sdpa_kernel(SDPBackend.MATH):
            features = self._features(x) if self.through_features else self.features(x)
        magnitudes, probabilities = self.policy(self._seen(features))
        with torch.no_grad():
            images = self.ops.apply_all(x, magnitudes, _signs(magnitudes))
            images = self.prepare(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        mixed = mixed_images(images, magnitudes, probabilities)
        held_x, held_y = next(self._validation)
        self._check(held_x)
        held_x, held_y = self.prepare(held_x.to(x.device)), held_y.to(x.device)
        differentiate = self._exact if self.hypergradient == "exact" else self._finite_difference
        # in training batch norm would have a second graph, and averages to move
        with evaluating(self.task_model), sdpa_kernel(SDPBackend.MATH):
            loss = differentiate(mixed, y, held_x, held_y)
        if not math.isfinite(loss):
            raise ValueError(f"the validation loss after the virtual step is {loss}; lower the learning rate")
        self.policy_optimizer.step()
        self.policy_optimizer.zero_grad(set_to_none=True)
        per_class = {int(c): (probabilities[y == c].mean(0).detach(), magnitudes[y == c].mean(0).detach())
                     for c in y.unique()}  # fmt: skip
        record = PolicyRecord(loss, probabilities.mean(0).detach(), magnitudes.mean(0).detach(), per_class)
        self.history.append(record)
        return record

    def step(self, x: Tensor, y: Tensor, epoch: float | None = None) -> Tensor:
        """Train the policy if it is time to, then augment; arguments as of the two."""
        due = self._batches % self.search_every == 0 and not self.frozen
        self._batches += 1
        if due:
            self.policy_step(x, y)
        return self.augment(x, epoch)

    def _moved(self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        lr = self.inner_lr if self.inner_lr is not None else self.optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        named = dict(self.task_model.named_parameters())
        return virtual_step(parameters, gradients, lr, optimizer=self.optimizer, named=named)

    def _loss(self, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.loss_fn(_logits(functional_call(self.task_model, dict(parameters), (x,))), y)

    def _exact(self, mixed: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor) -> float:
        parameters = {k: p for k, p in self.task_model.named_parameters() if p.requires_grad}
        train = self._loss(parameters, mixed, y)
        gradients = torch.autograd.grad(train, list(parameters.values()), create_graph=True, materialize_grads=True)
        moved = self._moved(dict(zip(parameters, gradients, strict=True)), parameters)
        loss = self._loss(moved, held_x, held_y)
        into = torch.autograd.grad(loss, list(self.policy.parameters()))
        for p, g in zip(self.policy.parameters(), into, strict=True):
            p.grad = g
        return loss.item()

    def _finite_difference(self, mixed: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor) -> float:
        """``-lr (dL_train(theta + e v) - dL_train(theta - e v)) / 2 e`` in the policy, v the validation gradient."""
        parameters = {k: p for k, p in self.task_model.named_parameters() if p.requires_grad}
        train = self._loss(parameters, mixed, y)
        gradients = torch.autograd.grad(train, list(parameters.values()), retain_graph=True, materialize_grads=True)
        moved = self._moved(dict(zip(parameters, gradients, strict=True)), parameters)
        moved = {k: v.detach().requires_grad_() for k, v in moved.items()}
        loss = self._loss(moved, held_x, held_y)
        v = torch.autograd.grad(loss, list(moved.values()), materialize_grads=True)
        # what a unit of the gradient does to the moved parameters: lr, and what momentum adds under Nesterov
        unit = self._moved({k: torch.ones(()).to(p) for k, p in parameters.items()}, parameters)
        zero = self._moved({k: torch.zeros(()).to(p) for k, p in parameters.items()}, parameters)
        v = tuple((zero[k] - unit[k]).detach() * g for k, g in zip(parameters, v, strict=True))
        e = 0.01 / max(float(torch.sqrt(sum((g.double().square().sum() for g in v), torch.zeros(())))), 1e-12)
        sides = []
        for sign in (1, -1):
            shifted = {k: (p + sign * e * g).detach() for (k, p), g in zip(parameters.items(), v, strict=True)}
            inner = self._loss(shifted, mixed, y)
            sides.append(torch.autograd.grad(inner, list(self.policy.parameters()), retain_graph=True))
        for p, high, low in zip(self.policy.parameters(), *sides, strict=True):
            p.grad = -(high - low) / (2 * e)
        return loss.item()

    def save_policy(self, path: str | Path) -> None:
        """Store the policy's weights as safetensors, with the names of the operations, to be used on other data."""
        from safetensors.torch import save_file

        save_file(self.policy.state_dict(), str(path), {"operations": ",".join(self.ops.names)})

    def load_policy(self, path: str | Path) -> None:
        """Take weights that ``save_policy`` stored.

        Raises:
            ValueError: for a policy of other operations.
        """
        from safetensors import safe_open

        with safe_open(str(path), "pt") as stored:
            names = (stored.metadata() or {}).get("operations", "")
            if names != ",".join(self.ops.names):
                raise ValueError(f"{path} is a policy for the operations {names or '(none)'}, not {self.ops!r}")
            self.policy.load_state_dict({key: stored.get_tensor(key) for key in stored.keys()})  # noqa: SIM118

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A ``collate_fn``: stacks ``pixel_values`` in [0, 1] and ``labels``, augments, prepares. One process only.

        The policy is not trained by it, as the gradient belongs into the training loop.
        """
        x = torch.stack([torch.as_tensor(e["pixel_values"]) for e in examples])
        y = torch.tensor([int(e["labels"]) for e in examples])
        return {"pixel_values": self.prepare(self.augment(x)), "labels": y}


class MADAugModel(nn.Module):
    """A task model with its augmentation, for transformers' ``Trainer`` as it is.

    In training mode ``forward`` trains the policy when it is due, augments, and returns the loss; in evaluation it is
    the model on prepared images. The policy's weights are in the state dict. Give ``callback()`` to the ``Trainer``, so
    that the curriculum knows the epoch. Afterwards take ``.model``.

    Args:
        madaug: around the model to train.

    Example:
        >>> from transformers import ViTConfig, ViTForImageClassification
        >>> config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...                    image_size=8, patch_size=4, num_labels=3)
        >>> ops = AugmentationSpace.autoaugment17(8)
        >>> held = [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]
        >>> vit = ViTForImageClassification(config)
        >>> model = MADAugModel(MADAug(vit, AugmentationPolicy(16, len(ops)), ops, held, inner_lr=0.1))
        >>> model(pixel_values=torch.rand(4, 3, 8, 8), labels=torch.tensor([0, 1, 2, 0])).loss.ndim
        0
    """

    def __init__(self, madaug: MADAug) -> None:
        super().__init__()
        self.model, self.policy = madaug.task_model, madaug.policy
        # the optimiser of the trainer must not move the policy, which has its own
        for parameter in self.policy.parameters():
            parameter.requires_grad_(True)
        self.madaug = madaug

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        """Images in [0, 1] (B, 3, H, W) and labels (B,) to an ``ImageClassifierOutput``."""
        from transformers.modeling_outputs import ImageClassifierOutput

        if self.training:
            if labels is None:
                raise ValueError("labels are needed in training mode; call eval() for predictions")
            pixel_values = self.madaug.step(pixel_values, labels)
        logits = _logits(self.model(self.madaug.prepare(pixel_values)))
        loss = None if labels is None else self.madaug.loss_fn(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def callback(self) -> Any:
        """A ``TrainerCallback`` that tells the curriculum how far training is."""
        from transformers import TrainerCallback

        madaug = self.madaug

        class Epoch(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                madaug.epoch = float(state.epoch or 0.0)

        return Epoch()


def _last_linear(model: nn.Module) -> nn.Linear:
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"task_model ({type(model).__name__}) has no nn.Linear whose inputs could be the features")
    return linears[-1]


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"task_model must return logits, or an output with .logits, got {type(output).__name__}")
    return logits


def _signs(like: Tensor) -> Tensor:
    return 2.0 * torch.randint_like(like, 0, 2) - 1


def _again_and_again(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        some = False
        for x, y in batches:
            some = True
            yield x, y
        if not some:
            raise ValueError("validation has no batch (an iterator that is used up? give a DataLoader or a list)")
