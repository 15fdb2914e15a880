"""One small training loop on accelerate: the same on one CPU, one GPU, or several processes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

Schedule = Callable[[Optimizer, int], LRScheduler] | Literal["one_cycle", "cosine", "constant", "linear"]


@dataclass
class FitResult:
    """What training left behind besides the trained model.

    Attributes:
        history: each metric that ``evaluate`` returned, as ``(steps, values)``.
        losses: training loss of every optimiser step, averaged over processes.
        seconds: wall-clock time of the optimiser steps alone, evaluation and checkpoints excluded.
    """

    history: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


class _Batches(Sampler[list[int]]):
    """Batches of one process, from step ``start`` on, as a function of seed and step alone.

    Epoch ``e`` is the permutation drawn from ``(seed, e)``; a batch may run over the end of an epoch, so every batch
    is full. Each process takes its contiguous share of the global batch.
    """

    def __init__(self, size: int, batch: int, steps: int, seed: int, start: int, rank: int, world: int) -> None:
        self.size, self.batch, self.steps, self.seed, self.start = size, batch, steps, seed, start
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch // self.world
        drawn: dict[int, np.ndarray] = {}

        def epoch(number: int) -> np.ndarray:
            if number not in drawn:
                drawn.clear()
                drawn[number] = np.random.default_rng([self.seed, number]).permutation(self.size)
            return drawn[number]

        for step in range(self.start, self.steps):
            first = step * self.batch + self.rank * share
            yield [int(epoch(at // self.size)[at % self.size]) for at in range(first, first + share)]


def _scheduler(schedule: Schedule | None, optimizer: Optimizer, steps: int) -> LRScheduler:
    lr = torch.optim.lr_scheduler
    if callable(schedule):
        return schedule(optimizer, steps)
    if schedule is None or schedule == "constant":
        return lr.LambdaLR(optimizer, lambda step: 1.0)
    if schedule == "cosine":
        return lr.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))
    if schedule == "linear":
        return lr.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.0))
    if schedule == "one_cycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        # total_steps counts the scheduler's own first step too
        return lr.OneCycleLR(optimizer, max_lr=peaks, total_steps=steps + 1)
    raise ValueError(
        f"schedule must be a callable, None, 'one_cycle', 'cosine', 'linear' or 'constant', got {schedule!r}"
    )


def _save(state: dict[str, Any], folder: Path) -> None:
    """Store a checkpoint so that a crash at any moment leaves either the old or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f".checkpoint.{os.getpid()}.tmp"
    torch.save(state, fresh)
    with fresh.open("rb") as handle:
        os.fsync(handle.fileno())
    fresh.replace(folder / "checkpoint.pt")


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": repr(random.getstate()[1])}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def fit(
    model: nn.Module,
    dataset: Dataset[Any] | tuple[Tensor, ...],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    batch_size: int,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    schedule: Schedule | None = None,
    seed: int = 0,
    clip: float | None = None,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    device: str = "cpu",
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    evaluate_at: Sequence[int] = (),
    progress: Callable[[float, float, str], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> FitResult:
    """Train ``model`` in place for a fixed number of optimiser steps.

    The order of the batches depends on ``seed`` alone, so that arms with the same seed see the same data. Under
    ``accelerate launch`` the global batch is shared out between the processes and gradients are averaged.

    Args:
        model: trained in place, left in train mode on ``device``.
        dataset: a map-style dataset, or tensors of equal length.
        loss: ``loss(model, batch)``, a scalar; ``model`` is the wrapped one when several processes train.
        steps: optimiser steps in all.
        batch_size: examples per step over all processes together.
        optimizer: makes the optimiser from the trainable parameters.
        schedule: a name or ``(optimizer, steps) -> scheduler``, stepped once an optimiser step; names start from the
            optimiser's own learning rate (``one_cycle`` peaks at it). ``None`` keeps it constant.
        seed: of the batch order; random numbers inside the model come from torch's global generator, seeded here.
        clip: largest total gradient norm, or ``None``.
        mixed_precision: as in ``accelerate.Accelerator``.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; under ``accelerate launch`` the launcher's choice wins.
        evaluate: ``evaluate(model)`` in eval mode without gradients; returns numbers to keep as history.
        evaluate_at: steps after which to evaluate; 0 is before training.
        progress: called with ``(done, total, note)``.
        checkpoint: folder for a checkpoint; when it holds one of the same settings, training continues from it.
        checkpoint_every: steps between checkpoints; required with ``checkpoint``.
        collate: collate function of the data loader.

    Returns:
        History, losses and seconds.

    Raises:
        ValueError: for settings that cannot be met, and for a checkpoint of other settings.
        FloatingPointError: when the loss is not finite; the message names the step.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 64)[:, None]
        >>> line = torch.nn.Linear(1, 1)
        >>> result = fit(
        ...     line, (x, 3 * x), lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        ...     steps=200, batch_size=16, optimizer=lambda p: torch.optim.SGD(p, lr=0.3),
        ... )
        >>> round(line.weight.item(), 2)
        3.0
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got steps={steps}, batch_size={batch_size}")
    beyond = [step for step in evaluate_at if not 0 <= step <= steps]
    if beyond:
        raise ValueError(f"evaluate_at must lie in 0..{steps}, got {beyond}")
    if evaluate_at and evaluate is None:
        raise ValueError("evaluate_at is given, but evaluate is not; pass evaluate=, a function of the model")
    if (checkpoint is None) != (checkpoint_every is None):
        raise ValueError("checkpoint (a folder) and checkpoint_every (steps) go together; pass both or neither")

    if isinstance(dataset, tuple):
        dataset = TensorDataset(*dataset)
    size = len(dataset)  # type: ignore[arg-type]
    if size == 0:
        raise ValueError("dataset is empty; fit needs at least one example")

    # accelerate keeps one process-wide state: settings of an earlier fit must not leak into this one
    AcceleratorState._reset_state(reset_partial_state=False)
    on_cpu = torch.device(device).type == "cpu"
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed_precision)
    rank, world = accelerator.process_index, accelerator.num_processes
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared out between {world} processes evenly")
    target = torch.device(device) if world == 1 else accelerator.device

    torch.manual_seed(seed + 7919 * rank)
    model.to(target).train()
    made = optimizer([p for p in model.parameters() if p.requires_grad])
    scheduler = _scheduler(schedule, made, steps)
    wrapped, made = accelerator.prepare(model, made, device_placement=[False, False])

    settings = json.dumps([size, steps, batch_size, seed, clip, mixed_precision, world, str(type(made.optimizer))])
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    result, start = FitResult(), 0
    if checkpoint is not None and (checkpoint / "checkpoint.pt").exists():
        state = torch.load(checkpoint / "checkpoint.pt", map_location=target, weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise ValueError(
                f"the checkpoint in {checkpoint} was made with other settings; remove that folder to start again"
            )
        model.load_state_dict(state["model"])
        made.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if "scaler" in state and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        _set_random_state(state["random"][rank])
        start, result.losses, result.seconds = state["step"], state["losses"], state["seconds"]
        result.history = {name: (list(x), list(y)) for name, (x, y) in state["history"].items()}

    def measure(step: int) -> None:
        if evaluate is None or step not in evaluate_at:
            return
        model.eval()
        with torch.no_grad():
            for name, value in evaluate(model).items():
                xs, ys = result.history.setdefault(name, ([], []))
                xs.append(float(step))
                ys.append(float(value))
        model.train()

    loader = DataLoader(
        dataset,
        batch_sampler=_Batches(size, batch_size, steps, seed, start, rank, world),
        collate_fn=collate,
        # the loader draws a seed from its generator: the global one must go on as if training had never stopped
        generator=torch.Generator().manual_seed(seed),
    )
    if start == 0:
        measure(0)
    for step, batch in enumerate(loader, start=start + 1):
        began = time.perf_counter()
        value = loss(wrapped, _to(batch, target))
        if value.ndim != 0:
            raise ValueError(f"loss must return a scalar tensor, got shape {tuple(value.shape)}")
        accelerator.backward(value)
        if clip is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip)
        made.step()
        if not made.step_was_skipped:
            scheduler.step()
        made.zero_grad(set_to_none=True)
        number = float(accelerator.reduce(value.detach().float(), reduction="mean"))
        if not math.isfinite(number):
            raise FloatingPointError(
                f"loss is {number} at step {step} of {steps}; lower the learning rate or set clip="
            )
        result.losses.append(number)
        result.seconds += time.perf_counter() - began
        measure(step)
        if progress is not None:
            progress(step, steps, f"loss {number:.3f}")
        if checkpoint is not None and checkpoint_every is not None and step % checkpoint_every == 0 and step < steps:
            states = [_random_state()]
            if world > 1:
                gathered: list[Any] = [None] * world
                torch.distributed.all_gather_object(gathered, states[0])
                states = gathered
            if accelerator.is_main_process:
                bundle = {
                    "fingerprint": fingerprint,
                    "step": step,
                    "model": model.state_dict(),
                    "optimizer": made.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "random": states,
                    "losses": result.losses,
                    "seconds": result.seconds,
                    "history": {name: [x, y] for name, (x, y) in result.history.items()},
                }
                if accelerator.scaler is not None:
                    bundle["scaler"] = accelerator.scaler.state_dict()
                _save(bundle, checkpoint)
            accelerator.wait_for_everyone()
    return result


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_to(value, device) for value in batch]
    return batch


def pick_learning_rate(grid: Sequence[float], score: Callable[[float], float]) -> dict[str, Any]:
    """Try every learning rate of a grid and say which was best.

    Args:
        grid: learning rates; every arm of a comparison gets the same grid.
        score: ``score(lr)`` on validation data, higher is better. A NaN, or a ``FloatingPointError`` from ``fit``
            (the loss diverged), ranks last and is recorded as null.

    Returns:
        ``{"chosen": lr, "scores": {lr: score}}``, plain JSON.

    Raises:
        ValueError: for an empty grid, or when every rate diverged.

    Example:
        >>> pick_learning_rate([0.1, 0.3, 1.0], lambda lr: -abs(lr - 0.25))["chosen"]
        0.3
    """
    if not grid:
        raise ValueError("grid is empty; give at least one learning rate")
    scores: dict[float, float] = {}
    for lr in grid:
        try:
            scores[lr] = float(score(lr))
        except FloatingPointError:
            scores[lr] = math.nan
    finite = {lr: value for lr, value in scores.items() if not math.isnan(value)}
    if not finite:
        raise ValueError(f"training diverged at every learning rate of the grid {list(grid)}; try smaller ones")
    return {
        "chosen": max(finite, key=lambda lr: finite[lr]),
        "scores": {str(lr): None if math.isnan(value) else value for lr, value in scores.items()},
    }
