"""Two ways to a new task that leave the network alone: reprogramming its input, and a linear layer on its features.

Dimensions: B images, C channels, S source classes, K target classes, d features.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.compression.lottery_reprogramming import backbones
from torchgraft.compression.lottery_reprogramming.calibration import fit_temperature
from torchgraft.compression.lottery_reprogramming.mapping import (
    IterativeLabelMapping,
    _check_room,
    check_labels,
    frequency_label_mapping,
    map_logits,
    mapping_counts,
    random_label_mapping,
)
from torchgraft.compression.lottery_reprogramming.prompting import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisualPrompt,
    check_normalisation,
    normalize,
    prepare_images,
)

Data = backbones.Batches
MappingName = Literal["ilm", "flm", "rlm"]
Precision = Literal["no", "bf16", "fp16"]
Solver = Literal["adam", "lbfgs"]
Watch = Callable[[int, int], object]
T = TypeVar("T", bound="_Frozen")


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if precision not in get_args(Precision):
        raise ValueError(f"mixed_precision must be 'no', 'bf16' or 'fp16', got {precision!r}")
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def _check_training(epochs: int, lr: float, batch_size: int) -> None:
    if epochs < 1 or batch_size < 1 or not lr > 0:
        raise ValueError(
            f"epochs and batch_size must be at least 1 and lr positive, got epochs={epochs}, batch_size={batch_size}, "
            f"lr={lr}"
        )


class _Frozen(nn.Module):
    """A network that stays as it is, and the few numbers around it that are trained."""

    temperature: Tensor
    history_: dict[str, list[float]]

    def __init__(self, backbone: nn.Module, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.backbone, self.num_classes = backbone, num_classes
        self.from_transformers = backbones.is_transformers(backbone)
        self.register_buffer("temperature", torch.ones(()))
        self.history_ = {}

    def train(self: T, mode: bool = True) -> T:
        """Train mode for everything but the backbone, which stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        tensors = itertools.chain(self.backbone.parameters(), self.backbone.buffers())
        return next((t.device for t in tensors), torch.device("cpu"))

    @property
    def config(self) -> Any:
        """The config of a transformers backbone; None for others."""
        return getattr(self.backbone, "config", None)

    def _like_backbone(self, x: Tensor) -> Tensor:
        sample = next((p for p in self.backbone.parameters() if p.is_floating_point()), None)
        return x if sample is None or torch.is_autocast_enabled(x.device.type) else x.to(sample.dtype)

    def prepare(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        """Images as the first layer of this classifier wants them."""
        raise NotImplementedError

    def logits(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the target classes."""
        raise NotImplementedError

    def forward(self, pixel_values: Shaped[Tensor, "B C H W"], labels: Int[Tensor, " B"] | None = None) -> Any:
        """Logits (B, K); of a transformers backbone its ``ImageClassifierOutput``, with a loss when there are labels.

        Args:
            pixel_values: images of any size, bytes or numbers in 0..1, not normalised.
            labels: for transformers backbones.
        """
        logits = self.logits(pixel_values)
        if not self.from_transformers:
            if labels is not None:
                raise ValueError("labels are for transformers backbones; take cross_entropy(model(images), labels)")
            return logits
        from transformers.modeling_outputs import ImageClassifierOutput

        loss = None
        if labels is not None:
            check_labels(labels, *logits.shape)
            loss = F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def predict_logits(self, x: Shaped[Tensor, "N C H W"], batch_size: int = 256) -> Float[Tensor, "N K"]:
        """Logits in batches, on the CPU."""
        return torch.cat([self.logits(part.to(self.device)).float().cpu() for part in x.split(batch_size)])

    def predict_proba(self, x: Shaped[Tensor, "N C H W"], batch_size: int = 256) -> Float[Tensor, "N K"]:
        """Probabilities of the target classes: softmax of the K logits over the temperature (1 unless calibrated)."""
        return (self.predict_logits(x, batch_size) / self.temperature.cpu()).softmax(1)

    def calibrate(self, x: Shaped[Tensor, "N C H W"], y: Int[Tensor, " N"]) -> float:
        """Temperature scaling on images that neither training nor testing sees; returns the temperature.

        Example:
            >>> probe = LinearProbe(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval(), 2, size=2)
            >>> x, y = torch.rand(8, 3, 2, 2), torch.arange(8) % 2
            >>> probe.calibrate(x, y) == probe.temperature.item()
            True
        """
        found = fit_temperature(self.predict_logits(x), y)
        self.temperature.fill_(found)
        return self.temperature.item()

    def _trained(self) -> dict[str, Tensor]:
        """State that is not the backbone's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    def save_adapter(self, path: str | Path) -> None:
        """Write what is not the backbone's (prompt and mapping, or the linear layer, and the temperature)."""
        from safetensors.torch import save_file

        save_file({name: value.cpu().contiguous() for name, value in self._trained().items()}, str(path))

    def load_adapter(self: T, path: str | Path) -> T:
        """Read what ``save_adapter`` wrote.

        Raises:
            ValueError: when it is of another kind or other shapes, holds numbers that are not finite, or maps to
                source classes that this network does not have. Nothing is changed then.
        """
        from safetensors.torch import load_file

        state, mine = load_file(str(path)), self._trained()
        shapes = {name: tuple(value.shape) for name, value in mine.items()}
        if {name: tuple(value.shape) for name, value in state.items()} != shapes:
            raise ValueError(f"{path} does not hold an adapter of these shapes: {shapes}")
        for name, value in state.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{path} has numbers in {name!r} that are not finite")
        self._check_adapter(state)
        self.load_state_dict({**self.state_dict(), **state})
        return self

    def _check_adapter(self, state: dict[str, Tensor]) -> None:
        """Refuse an adapter of the right shapes that this network cannot use."""

    def _optimise(
        self,
        parameters: list[nn.Parameter],
        batches: Callable[[torch.Generator], Iterator[tuple[Tensor, Tensor]]],
        logits: Callable[[Tensor, Tensor], Tensor],
        *,
        epochs: int,
        lr: float,
        seed: int,
        precision: Precision,
        validate: Callable[[], float] | None,
        before_epoch: Callable[[int], None] = lambda epoch: None,
        progress: Watch | None = None,
    ) -> None:
        """Adam, a tenth of the rate from 50 % and again from 72 % of the epochs; the best epoch on validation stays.

        What is trained is as it was when training fails.
        """
        optimizer = torch.optim.Adam(parameters, lr=lr)
        # a milestone at 0 would divide the rate of a single epoch before its first step
        milestones = [m for m in (int(0.5 * epochs), int(0.72 * epochs)) if m]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
        scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        generator = torch.Generator().manual_seed(seed)
        self.history_ = {"loss": [], "accuracy": []}
        if validate is not None:
            self.history_["validation accuracy"] = []
        before = {name: value.clone() for name, value in self._trained().items()}
        best, kept = -1.0, before
        try:
            for epoch in range(epochs):
                before_epoch(epoch)
                seen, right, total = 0, 0.0, 0.0
                for x, y in batches(generator):
                    check_labels(y, len(x), self.num_classes)
                    x, y = x.to(self.device), y.to(self.device).long()
                    with _autocast(precision, self.device):
                        z = logits(x, y).float()
                    loss = F.cross_entropy(z, y)
                    optimizer.zero_grad(set_to_none=True)
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    seen += len(x)
                    total += float(loss.detach()) * len(x)
                    right += float((z.detach().argmax(1) == y).sum())
                if not math.isfinite(total):
                    raise FloatingPointError(f"the loss is {total / seen} in epoch {epoch + 1} of {epochs}; lower lr")
                scheduler.step()
                self.history_["loss"].append(total / seen)
                self.history_["accuracy"].append(right / seen)
                if validate is not None:
                    self.history_["validation accuracy"].append(score := validate())
                    if score > best:
                        best, kept = score, {name: value.clone() for name, value in self._trained().items()}
                if progress is not None:
                    progress(epoch + 1, epochs)
        except Exception:
            self.load_state_dict({**self.state_dict(), **before})
            raise
        if validate is not None:
            self.load_state_dict({**self.state_dict(), **kept})
        self.eval()


class ReprogrammedClassifier(_Frozen):
    """A frozen classifier on another task: a visual prompt before it, a map between classes behind it.

    Nothing of the network is trained: gradients go through it to the pixels of the prompt.

    Args:
        backbone: from images to logits of S source classes: a module that returns them, or a transformers model for
            image classification. It is frozen and put in eval mode in place.
        prompt: makes its input, see ``VisualPrompt``.
        mapping: ``"ilm"`` (frequency mapping again before every epoch), ``"flm"`` (once, with the untrained prompt),
            ``"rlm"`` (random, drawn now with ``seed``), an ``IterativeLabelMapping``, or a mapping as a tensor (K,) or
            (K, M), which stays.
        num_classes: K; not needed with a tensor.
        per_class: source classes per target class, M.
        seed: of the random mapping.

    Attributes:
        mapping: tensor (K,) or (K, M); -1 until it is made.
        history_: per epoch of the last ``fit``: loss, accuracy, and validation accuracy if asked for.

    Raises:
        ValueError: when K * M exceeds S, and for mappings that are not of distinct source classes.
        TypeError: for a backbone that gives no logits.

    Warns:
        UserWarning: when the backbone was in train mode.

    Example:
        >>> net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 10)).eval()
        >>> prompt = VisualPrompt(out_size=16, in_size=8)
        >>> model = ReprogrammedClassifier(net, prompt, "ilm", num_classes=3)
        >>> x, y = torch.rand(12, 3, 8, 8), torch.arange(12) % 3
        >>> model.fit((x, y), epochs=2).predict_proba(x).shape
        torch.Size([12, 3])
    """

    mapping: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        prompt: VisualPrompt,
        mapping: MappingName | IterativeLabelMapping | Tensor = "ilm",
        num_classes: int | None = None,
        *,
        per_class: int = 1,
        seed: int = 0,
    ) -> None:
        if not isinstance(prompt, VisualPrompt):
            raise TypeError(f"prompt must be a VisualPrompt, got {type(prompt).__name__}")
        if isinstance(mapping, Tensor):
            if mapping.ndim not in (1, 2):
                raise ValueError(f"mapping must have shape (K,) or (K, M), got {tuple(mapping.shape)}")
            num_classes = len(mapping) if num_classes is None else num_classes
            per_class = 1 if mapping.ndim == 1 else mapping.shape[1]
        elif not isinstance(mapping, IterativeLabelMapping) and mapping not in get_args(MappingName):
            raise ValueError(
                f"mapping must be 'ilm', 'flm', 'rlm', an IterativeLabelMapping or a tensor, got {mapping!r}"
            )
        if num_classes is None:
            raise ValueError("num_classes is needed: a few-shot set may lack classes, so labels do not tell it")
        with backbones.freezing(backbone):
            super().__init__(backbone, num_classes)
            probe = torch.zeros(1, prompt.channels, prompt.out_size, prompt.out_size, device=self.device)
            with torch.no_grad():
                self.num_source = backbones.logits_of(backbone(self._like_backbone(probe))).shape[1]
            _check_room(self.num_source, num_classes, per_class)
            if isinstance(mapping, Tensor):
                self._check_mapping(mapping)
        self.prompt, self.per_class = prompt.to(self.device), per_class
        self.schedule = mapping if isinstance(mapping, IterativeLabelMapping) else None
        self.fixed = isinstance(mapping, Tensor) or mapping == "rlm"
        if isinstance(mapping, Tensor):
            made = mapping.long()
        elif mapping == "rlm":
            made = random_label_mapping(self.num_source, num_classes, per_class, torch.Generator().manual_seed(seed))
        else:
            made = torch.full((num_classes,) if per_class == 1 else (num_classes, per_class), -1)
            self.schedule = IterativeLabelMapping() if mapping == "ilm" else self.schedule
        self.register_buffer("mapping", made.to(self.device))

    def _check_mapping(self, mapping: Tensor) -> None:
        flat = mapping.flatten()
        whole = not mapping.is_floating_point() and len(mapping) == self.num_classes
        if not whole or len(flat.unique()) != len(flat) or int(flat.min()) < 0 or int(flat.max()) >= self.num_source:
            raise ValueError(
                f"mapping must hold distinct source classes in 0..{self.num_source - 1}, shape (K,) or (K, M) with "
                f"K={self.num_classes}, got {mapping.tolist()}"
            )

    def _check_adapter(self, state: dict[str, Tensor]) -> None:
        # an adapter that was saved before it was fitted has -1 everywhere
        if bool((state["mapping"] != -1).any()):
            self._check_mapping(state["mapping"])

    def prepare(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        """Images in 0..1 of the size that the prompt takes."""
        return prepare_images(x, self.prompt.in_size, self.prompt.channels)

    def source_logits(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B S"]:
        """Logits of the source classes, prompt included."""
        if any(module.training for module in self.backbone.modules()):
            backbones.freeze(self.backbone)
        return backbones.logits_of(self.backbone(self._like_backbone(self.prompt(self.prepare(x)))))

    def logits(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the target classes.

        Raises:
            RuntimeError: before there is a mapping.
        """
        if not torch.compiler.is_compiling() and bool((self.mapping < 0).any()):
            raise RuntimeError("there is no label mapping yet; call fit, or update_mapping with training images")
        return map_logits(self.source_logits(x), self.mapping)

    @torch.no_grad()
    def counts(self, data: Data, batch_size: int = 256) -> Int[Tensor, "S K"]:
        """How often each source class is on top for each target class, with the prompt as it is now.

        Args:
            data: a loader, or (images, labels).
            batch_size: for tensors.
        """
        backbones.check_data(data)
        found = torch.zeros(self.num_source, self.num_classes, dtype=torch.long)
        for x, y in backbones.batches_of(data, batch_size):
            found += mapping_counts(self.source_logits(x.to(self.device)).float(), y, self.num_classes).cpu()
        return found

    def update_mapping(self, data: Data, batch_size: int = 256) -> Int[Tensor, " K"] | Int[Tensor, "K M"]:
        """Frequency label mapping of training data with the prompt as it is now; sets and returns ``mapping``."""
        self._map(self.counts(data, batch_size))
        return self.mapping

    def _map(self, counts: Tensor) -> None:
        self.mapping.copy_(frequency_label_mapping(counts, per_class=self.per_class))

    def fit(
        self,
        data: Data,
        epochs: int = 100,
        lr: float = 0.01,
        *,
        batch_size: int = 128,
        validation: Data | None = None,
        seed: int = 0,
        mixed_precision: Precision = "no",
        progress: Watch | None = None,
    ) -> ReprogrammedClassifier:
        """Train the prompt, mapping before epochs as ``mapping`` says.

        Cross-entropy on the mapped logits, Adam, the rate divided by ten at 50 % and at 72 % of the epochs (a single
        epoch has the whole rate; in the official script a hundredth of it).

        Args:
            data: (images, labels), shuffled here; or a loader of such pairs, gone through once per epoch and, unless
                the mapping is fixed or running, once more to count.
            epochs, lr: as published.
            batch_size: for tensors.
            validation: the best epoch on these is kept instead of the last. (The official scripts choose on the test
                set.)
            seed: of the order of tensors.
            mixed_precision: of the backbone; prompt and loss stay in float32.
            progress: called with (epochs done, epochs).

        Raises:
            ValueError: for labels outside 0..K-1 and settings that cannot be met.
            FloatingPointError: when the loss is not finite; prompt and mapping are then as they were.
        """
        _check_training(epochs, lr, batch_size)
        _autocast(mixed_precision, self.device)
        for given in (data, validation):
            if given is not None:
                backbones.check_data(given)
        ready = (self.prepare(data[0]), data[1]) if isinstance(data, tuple) else data
        held = (self.prepare(validation[0]), validation[1]) if isinstance(validation, tuple) else validation
        running = self.schedule is not None and self.schedule.running
        gathered = torch.zeros(self.num_source, self.num_classes, dtype=torch.long)

        def before_epoch(epoch: int) -> None:
            due = epoch == 0 if self.schedule is None else self.schedule.due(epoch)
            if self.fixed or not due:
                return
            if running and epoch:
                self._map(gathered)
                gathered.zero_()
            else:
                with _autocast(mixed_precision, self.device):
                    self.update_mapping(ready, batch_size)

        def logits(x: Tensor, y: Tensor) -> Tensor:
            source = self.source_logits(x)
            if running:
                gathered.add_(mapping_counts(source.detach().float(), y, self.num_classes).cpu())
            return map_logits(source, self.mapping)

        def validate() -> float:
            assert held is not None
            return self._accuracy(held, batch_size)

        self._optimise(
            list(self.prompt.parameters()), lambda g: backbones.batches_of(ready, batch_size, g), logits,
            epochs=epochs, lr=lr, seed=seed, precision=mixed_precision, before_epoch=before_epoch,
            validate=None if held is None else validate, progress=progress,
        )  # fmt: skip
        return self

    @torch.no_grad()
    def _accuracy(self, data: Data, batch_size: int) -> float:
        right = seen = 0
        for x, y in backbones.batches_of(data, batch_size):
            check_labels(y, len(x), self.num_classes)
            right += int((self.logits(x.to(self.device)).argmax(1).cpu() == y.cpu()).sum())
            seen += len(y)
        return right / seen


class LinearProbe(_Frozen):
    """A new linear layer on the features of a frozen classifier, those that go into its own last linear layer.

    Features are computed once, and the layer is trained on them. The result is that of running the network in every
    epoch, as the official script does, as long as images are not augmented.

    Args:
        backbone: a classifier: a plain module or a transformers model. Frozen and put in eval mode in place; its own
            last layer stays there, unused.
        num_classes: K.
        size: side of the network's input; images are resized to it.
        mean, std: normalisation of the network's input, per channel; ``None`` for both leaves 0..1.
        channels: of the network's input.
        head: name of the network's last linear layer, where it is not the last one that the modules list.
        seed: of the first weights.

    Attributes:
        classifier: the linear layer.
        history_: as that of ``ReprogrammedClassifier``; empty after ``solver="lbfgs"``.

    Example:
        >>> net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
        >>> x, y = torch.rand(12, 3, 8, 8), torch.arange(12) % 3
        >>> probe = LinearProbe(net, 3, size=16).fit((x, y), epochs=5)
        >>> probe.features(x).shape, probe.predict_proba(x).shape
        (torch.Size([12, 20]), torch.Size([12, 3]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        size: int = 224,
        mean: tuple[float, ...] | None = IMAGENET_MEAN,
        std: tuple[float, ...] | None = IMAGENET_STD,
        channels: int = 3,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        if size < 1 or channels < 1:
            raise ValueError(f"size and channels must be positive, got {size} and {channels}")
        check_normalisation(mean, std, channels)
        with backbones.freezing(backbone):
            super().__init__(backbone, num_classes)
            self.head, layer = backbones.find_head(backbone, head)
        self.size, self.mean, self.std, self.channels = size, mean, std, channels
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.classifier = nn.Linear(layer.in_features, num_classes).to(self.device)

    def prepare(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        """Normalised images of the network's size."""
        x = prepare_images(x, self.size, self.channels)
        return normalize(x, self.mean, self.std)

    def features(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B d"]:
        """What goes into the network's last linear layer."""
        if any(module.training for module in self.backbone.modules()):
            backbones.freeze(self.backbone)
        layer = self.backbone.get_submodule(self.head)
        assert isinstance(layer, nn.Linear)
        return backbones.features_of(self.backbone, layer, self._like_backbone(self.prepare(x)))

    def logits(self, x: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the target classes."""
        return self.classifier(self.features(x).to(self.classifier.weight.dtype))

    @torch.no_grad()
    def extract(
        self, data: Data, batch_size: int = 256, mixed_precision: Precision = "no"
    ) -> tuple[Float[Tensor, "N d"], Int[Tensor, " N"]]:
        """Features and labels of all examples, in order, in one pass."""
        backbones.check_data(data)
        found = []
        for x, y in backbones.batches_of(data, batch_size):
            with _autocast(mixed_precision, self.device):
                found.append((self.features(x.to(self.device)).float(), y.to(self.device)))
        return torch.cat([z for z, _ in found]), torch.cat([y for _, y in found])

    def fit(
        self,
        data: Data,
        epochs: int = 100,
        lr: float = 0.01,
        *,
        solver: Solver = "adam",
        C: float = 1.0,
        batch_size: int = 128,
        validation: Data | None = None,
        seed: int = 0,
        mixed_precision: Precision = "no",
        progress: Watch | None = None,
    ) -> LinearProbe:
        """Train the linear layer on features computed once.

        Args:
            data: (images, labels), or a loader of such pairs, gone through once.
            epochs, lr, batch_size, validation, seed, progress: of ``solver="adam"``, as in ``ReprogrammedClassifier``.
            solver: ``"adam"`` as published, or ``"lbfgs"``: scikit-learn's ``LogisticRegression`` to its optimum.
                A class without examples then has probability zero, with a warning.
            C: inverse strength of the penalty of ``"lbfgs"``.
            mixed_precision: of the backbone.

        Raises:
            ValueError: for labels outside 0..K-1, an unknown solver, and settings that cannot be met.
        """
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be 'adam' or 'lbfgs', got {solver!r}")
        _check_training(epochs, lr, batch_size)
        z, y = self.extract(data, batch_size, mixed_precision)
        check_labels(y, len(z), self.num_classes)
        if solver == "lbfgs":
            if validation is not None:
                raise ValueError("validation chooses an epoch, and solver='lbfgs' has none; choose C with it yourself")
            self._solve(z, y, C)
            return self
        held = None if validation is None else self.extract(validation, batch_size, mixed_precision)
        if held is not None:
            check_labels(held[1], len(held[0]), self.num_classes)

        def validate() -> float:
            assert held is not None
            with torch.no_grad():
                return float((self.classifier(held[0]).argmax(1) == held[1]).double().mean())

        self._optimise(
            list(self.classifier.parameters()), lambda g: backbones.batches_of((z, y), batch_size, g),
            lambda x, _: self.classifier(x), epochs=epochs, lr=lr, seed=seed, precision="no",
            validate=None if held is None else validate, progress=progress,
        )  # fmt: skip
        return self

    def _solve(self, z: Tensor, y: Tensor, C: float) -> None:
        from sklearn.linear_model import LogisticRegression

        present = y.unique().cpu()
        if len(present) < 2:
            raise ValueError("solver='lbfgs' needs examples of at least two classes; use solver='adam'")
        if len(present) < self.num_classes:
            absent = sorted(set(range(self.num_classes)) - set(present.tolist()))
            warnings.warn(f"classes {absent} have no example; their probability is zero", stacklevel=3)
        found = LogisticRegression(C=C, max_iter=2000).fit(z.double().cpu().numpy(), y.cpu().numpy())
        weight, bias = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
        if len(present) == 2:
            # scikit-learn keeps one row of differences for two classes
            weight, bias = (torch.cat([torch.zeros_like(v), v]) for v in (weight, bias))
        with torch.no_grad():
            self.classifier.weight.zero_()
            # finite, so that the likelihood of an example of such a class is too
            self.classifier.bias.fill_(-1e4)
            self.classifier.weight[present] = weight.to(self.classifier.weight)
            self.classifier.bias[present] = bias.to(self.classifier.bias)
        self.history_ = {}
        self.eval()
