"""The survey's general methods, which fit any network: memory, sharing, pruning, distillation, experts, early exits.

What well-kept libraries do is left to them: mixed precision (``torch.autocast``, accelerate), quantisation (torchao, or
``torchgraft.compression``), adapters (peft), 8-bit optimisers (bitsandbytes), removing heads for good
(``torchgraft.compression.optin``), FlashAttention and its kin (``scaled_dot_product_attention``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint_sequential

from torchgraft import surgery

__all__ = [
    "ChunkedFFN", "EarlyExit", "LayerDrop", "MovementPruner", "PrimerConv", "ReversibleBlock", "SquaredReLU",
    "SwitchFFN", "checkpointed", "chunk_ffn", "cubic_sparsity", "distil", "distillation_loss", "factorise_embedding",
    "head_importance", "make_reversible", "n_of_m_prune", "prune_heads", "prune_magnitude", "replaced_token_loss",
    "share_layers", "switch_balance",
]  # fmt: skip

# ----------------------------------------------------------------- memory


class _Reversible(torch.autograd.Function):
    """A stack of reversible blocks that keeps its output alone and walks back through the inverses."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, blocks: Sequence[ReversibleBlock], *parameters: Tensor) -> Any:
        ctx.blocks, ctx.states, device = blocks, [], x1.device.type
        # the meta device, on which costs are counted, has no autocast
        given = None if x1.is_meta else (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.autocast = given
        with torch.no_grad():
            for block in blocks:
                first = torch.get_rng_state()
                x1 = x1 + block.f(x2)
                ctx.states.append((first, torch.get_rng_state()))
                x2 = x2 + block.g(x1)
        ctx.save_for_backward(x1.detach(), x2.detach())
        ctx.parameters = parameters
        return x1, x2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g1, g2 = grads
        y1, y2 = ctx.saved_tensors
        found: dict[int, Tensor] = {}

        def pull(work: nn.Module, at: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
            """Value of ``work`` at a point, and the gradient there; those of its parameters are kept."""
            own = [p for p in work.parameters() if p.requires_grad]
            with torch.enable_grad():
                at = at.detach().requires_grad_()
                value = work(at)
                first, *rest = torch.autograd.grad(value, [at, *own], grad, allow_unused=True)
            for p, g in zip(own, rest, strict=True):
                if g is not None:
                    found[id(p)] = found[id(p)] + g if id(p) in found else g
            return value.detach(), torch.zeros_like(at) if first is None else first

        for block, (before_f, before_g) in zip(reversed(ctx.blocks), reversed(ctx.states), strict=True):
            # dropout draws what it drew in the forward pass, and autocast rounds as it rounded there
            cast = nullcontext() if ctx.autocast is None else torch.autocast(*ctx.autocast)
            with torch.random.fork_rng(devices=[]), cast:
                torch.set_rng_state(before_g)
                value, extra = pull(block.g, y1, g2)
                x2, g1 = y2 - value, g1 + extra
                torch.set_rng_state(before_f)
                value, extra = pull(block.f, x2, g1)
            y1, y2, g2 = y1 - value, x2, g2 + extra
        return g1, g2, None, *(found.get(id(p)) for p in ctx.parameters)


class ReversibleBlock(nn.Module):
    """y1 = x1 + f(x2), y2 = x2 + g(y1); ``inverse`` undoes it (Gomez et al. 2017; Reformer)."""

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves, of the same shape."""
        y1 = x1 + self.f(x2)
        return y1, x2 + self.g(y1)

    def inverse(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """What ``forward`` came from, to rounding."""
        x2 = y2 - self.g(y1)
        return y1 - self.f(x2), x2


class _ReversibleStack(nn.Module):
    def __init__(self, blocks: Iterable[ReversibleBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, to the same."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum(_Reversible.apply(x, x, list(self.blocks), *parameters)) / 2


def make_reversible(pairs: Iterable[tuple[nn.Module, nn.Module]]) -> nn.Module:
    """A stack of residual layers whose activations are not stored: memory does not grow with depth.

    The input is taken twice, as both halves, and the output is their mean (Reformer, section 3). Inputs are computed
    back from outputs in the backward pass, to rounding. ``f`` and ``g`` must be functions of their input alone up to
    dropout, which is drawn again alike (on CPU); batch normalisation would count every batch twice.

    Args:
        pairs: ``(f, g)`` of each layer, such as attention and feed-forward with their norms, without the residual.

    Raises:
        ValueError: for no pairs, or a batch normalisation in them.

    Example:
        >>> stack = make_reversible([(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)])
        >>> stack(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """
    blocks = [ReversibleBlock(f, g) for f, g in pairs]
    if not blocks:
        raise ValueError("pairs must not be empty")
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for block in blocks for m in block.modules()):
        raise ValueError("pairs must not hold batch normalisation, whose statistics would see every batch twice")
    return _ReversibleStack(blocks)


def checkpointed(layers: Sequence[nn.Module], x: Tensor, segments: int | None = None) -> Tensor:
    """``layers`` in a row, keeping activations at sqrt(N) places (Chen et al. 2016); gradients are the same.

    Raises:
        ValueError: for no layers, or segments that they cannot be cut into.

    Example:
        >>> checkpointed([nn.Linear(2, 2) for _ in range(9)], torch.ones(1, 2, requires_grad=True)).shape
        torch.Size([1, 2])
    """
    count = max(1, round(math.sqrt(len(layers)))) if segments is None else segments
    if not 1 <= count <= len(layers):
        raise ValueError(f"segments must lie in 1..{len(layers)}, the number of layers, got {count}")
    return checkpoint_sequential(nn.Sequential(*layers), count, x, use_reentrant=False)


class ChunkedFFN(nn.Module):
    """A module that works position by position, run on ``chunks`` parts of the length after each other; exact."""

    def __init__(self, module: nn.Module, chunks: int) -> None:
        super().__init__()
        self.module, self.chunks = module, chunks

    def forward(self, x: Float[Tensor, "B N W"]) -> Tensor:
        """(B, N, W) to (B, N, …)."""
        return torch.cat([self.module(part) for part in x.chunk(self.chunks, dim=1)], dim=1)


def chunk_ffn(model: nn.Module, target: surgery.Target, chunks: int = 4) -> surgery.Report:
    """Run the feed-forward modules that match in chunks of the length, which lowers their peak memory in inference.

    Raises:
        NothingMatchedError: when nothing matched.
        ValueError: for less than one chunk.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)))
        >>> _ = chunk_ffn(model, nn.Sequential, chunks=2)
        >>> model(torch.ones(1, 6, 4)).shape
        torch.Size([1, 6, 4])
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    return surgery.replace(model, target, lambda old: ChunkedFFN(old, chunks))


# ----------------------------------------------------------------- sharing


def share_layers(layers: nn.ModuleList, groups: int = 1) -> None:
    """Make layers of a list the same module, in ``groups`` consecutive groups (ALBERT: one).

    Layers that know their own index, as decoders with a cache do, cannot be shared: use this for encoders.

    Raises:
        ValueError: for groups that do not fit, layers of several types, or layers with an index of their own.

    Example:
        >>> layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        >>> share_layers(layers)
        >>> sum(p.numel() for p in layers.parameters())
        12
    """
    if not 1 <= groups <= len(layers):
        raise ValueError(f"groups must lie in 1..{len(layers)}, got {groups}")
    kinds = {type(layer).__name__ for layer in layers}
    if len(kinds) > 1:
        raise ValueError(f"layers must be of one type, got {', '.join(sorted(kinds))}")
    if any(getattr(m, "layer_idx", None) is not None and getattr(m, "is_causal", False) for m in layers.modules()):
        raise ValueError("these layers count themselves (layer_idx) for a key-value cache; share those of encoders")
    for i in range(len(layers)):
        # the first layer of its group, which stands before i and is itself already
        layers[i] = layers[-(-(i * groups // len(layers)) * len(layers) // groups)]


def factorise_embedding(embedding: nn.Embedding, rank: int) -> nn.Sequential:
    """V x H as V x E and E x H (ALBERT), the best such product by singular values.

    Raises:
        ValueError: for a rank below 1 or above one of the sizes.

    Example:
        >>> factorise_embedding(nn.Embedding(100, 32), 8)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 32])
    """
    words, width = embedding.weight.shape
    if not 1 <= rank <= min(words, width):
        raise ValueError(f"rank must lie in 1..{min(words, width)}, got {rank}")
    weight = embedding.weight.detach()
    # half precision has no decomposition
    u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    small = nn.Embedding(words, rank, padding_idx=embedding.padding_idx, dtype=u.dtype, device=u.device)
    wide = nn.Linear(rank, width, bias=False, dtype=u.dtype, device=u.device)
    with torch.no_grad():
        small.weight.copy_(u[:, :rank] * s[:rank].sqrt())
        wide.weight.copy_(v[:rank].T * s[:rank].sqrt())
    return nn.Sequential(small, wide).to(weight.dtype)


class LayerDrop(nn.Module):
    """A residual layer left out with probability ``p`` in training (Fan et al. 2020): the input goes through."""

    def __init__(self, layer: nn.Module, p: float = 0.2) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must lie in 0..1, 1 excluded, got {p}")
        self.layer, self.p = layer, p

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the layer."""
        if self.training and torch.rand(()) < self.p:
            return x
        return self.layer(x, *args, **kwargs)


# ----------------------------------------------------------------- pruning


def cubic_sparsity(step: int, steps: int, start: float = 0.0, end: float = 0.9) -> float:
    """Share of weights removed after ``step`` of ``steps``: end + (start - end)(1 - t / T)^3 (Zhu and Gupta 2017).

    Example:
        >>> [round(cubic_sparsity(t, 4), 2) for t in range(5)]
        [0.0, 0.52, 0.79, 0.89, 0.9]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return end + (start - end) * (1 - min(max(step / steps, 0), 1)) ** 3


def _linears(model: nn.Module) -> list[nn.Linear]:
    found = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not found:
        raise surgery.NothingMatchedError(f"{type(model).__name__} has no linear layer to prune")
    return found


def _share(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in 0..1, 1 excluded, got {sparsity}")


def prune_magnitude(model: nn.Module, sparsity: float, *, keep_masks: bool = False) -> None:
    """Set the smallest weights of all linear layers to 0, together ranked (``torch.nn.utils.prune``).

    With ``keep_masks`` the masks stay, so that training goes on with them and a later call removes more, up to
    ``sparsity`` in all (``cubic_sparsity`` is a schedule for that); without, weights are plain again. Zeros save no
    time without sparse kernels.

    Raises:
        NothingMatchedError: for a model without linear layers.
        ValueError: for a sparsity out of range, or below that of masks that were kept.

    Example:
        >>> model = nn.Linear(10, 10)
        >>> prune_magnitude(model, 0.5)
        >>> int((model.weight == 0).sum())
        50
    """
    _share(sparsity)
    linears = _linears(model)
    # torch counts a share of what earlier masks left, and a number of weights beyond them
    masks = [mask for m in linears if isinstance(mask := getattr(m, "weight_mask", None), Tensor)]
    gone = sum(int((mask == 0).sum()) for mask in masks)
    more = round(sparsity * sum(m.weight.numel() for m in linears)) - gone
    if more < 0:
        raise ValueError(f"masks that were kept remove {gone} weights already, more than sparsity={sparsity} asks for")
    torch_prune.global_unstructured([(m, "weight") for m in linears], torch_prune.L1Unstructured, amount=more)
    if not keep_masks:
        for module in linears:
            torch_prune.remove(module, "weight")


def n_of_m_prune(model: nn.Module, n: int = 2, m: int = 4) -> None:
    """Keep the ``n`` largest of every ``m`` consecutive inputs of each output, as sparse tensor cores want (2:4).

    Layers whose inputs ``m`` does not divide are an error.
    """
    if not 1 <= n <= m:
        raise ValueError(f"n must lie in 1..m, got n={n}, m={m}")
    linears = _linears(model)
    for module in linears:
        if module.in_features % m:
            raise ValueError(f"m={m} does not divide the {module.in_features} inputs of a layer")
    for module in linears:
        groups = module.weight.detach().abs().unflatten(1, (-1, m))
        mask = torch.zeros_like(groups).scatter(-1, groups.topk(n, dim=-1).indices, 1).flatten(1)
        with torch.no_grad():
            module.weight.mul_(mask)


class _Through(torch.autograd.Function):
    """The masked weight; its full gradient, of removed weights too, goes to the scores."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.score = score
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, mask = ctx.saved_tensors
        ctx.score.sub_(weight * grads[0])
        return grads[0] * mask, None, None


class _Masked(nn.Module):
    mask: Tensor
    score: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight))
        self.register_buffer("score", torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return _Through.apply(weight, self.mask, self.score)


class MovementPruner:
    """Movement pruning: weights that training moves towards 0 go, whatever their size (Sanh et al. 2020).

    Every backward pass adds -w dL/dw to the scores, of removed weights too, which may so come back. ``step``, after
    each optimiser step, keeps the highest scores of all linear layers together, under the cubic schedule. ``finish``
    makes the masked weights plain ones.

    Args:
        model: its linear layers are masked, by ``torch.nn.utils.parametrize``; make the optimiser afterwards.
        steps: optimiser steps until ``sparsity`` is reached.
        sparsity: share of the weights removed in the end.
        warmup: steps before any is.

    Raises:
        NothingMatchedError: for a model without linear layers.
        ValueError: for settings out of range, or a model that another pruner masks already.

    Example:
        >>> model = nn.Linear(4, 4)
        >>> pruner = MovementPruner(model, steps=10, sparsity=0.5)
        >>> for _ in range(10):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     sparsity = pruner.step()
        >>> pruner.finish()
        >>> int((model.weight == 0).sum())
        8
    """

    def __init__(self, model: nn.Module, steps: int, sparsity: float = 0.9, warmup: int = 0) -> None:
        _share(sparsity)
        if not 0 <= warmup < steps:
            raise ValueError(f"warmup must lie in 0..steps - 1, got warmup={warmup}, steps={steps}")
        self.linears = _linears(model)
        if any(parametrize.is_parametrized(m, "weight") for m in self.linears):
            raise ValueError(
                "model has parametrized weights already, of another pruner or of low_bit_weights; finish that"
            )
        self.masks = [_Masked(m.weight) for m in self.linears]
        for module, mask in zip(self.linears, self.masks, strict=True):
            parametrize.register_parametrization(module, "weight", mask)
        self.steps, self.sparsity, self.warmup, self.done = steps, sparsity, warmup, 0

    @torch.no_grad()
    def step(self) -> float:
        """Choose anew what is removed; returns its share."""
        self.done += 1
        wanted = cubic_sparsity(self.done - self.warmup, self.steps - self.warmup, 0.0, self.sparsity)
        flat = torch.cat([m.score.flatten() for m in self.masks])
        # by rank, since scores tie: what never moved is all 0
        gone = flat.argsort(stable=True)[: round(wanted * flat.numel())]
        kept = torch.ones_like(flat).scatter_(0, gone, 0).split([m.mask.numel() for m in self.masks])
        for mask, part in zip(self.masks, kept, strict=True):
            mask.mask.copy_(part.view_as(mask.mask))
        return wanted

    def finish(self) -> None:
        """Leave plain weights with zeros in them."""
        for module in self.linears:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def head_importance(
    outputs: Mapping[str, nn.Linear], heads: int, losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """|dL / d gate| of every head, with a gate of 1 on each (Michel et al. 2019), summed over ``losses``.

    Args:
        outputs: the output projection of each attention, by a name of yours.
        heads: heads of each.
        losses: functions that run the model and return a loss, one a batch.

    Returns:
        For each name a tensor (heads,).
    """
    gates = {name: torch.ones(heads, requires_grad=True) for name in outputs}

    def gate(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            return ((x.unflatten(-1, (heads, -1)) * gates[name].to(x)[:, None]).flatten(-2),)

        return hook

    for name, layer in outputs.items():
        if layer.in_features % heads:
            raise ValueError(f"heads must divide the {layer.in_features} inputs of {name!r}, got {heads}")
    hooks = [layer.register_forward_pre_hook(gate(name)) for name, layer in outputs.items()]
    total = {name: torch.zeros(heads) for name in outputs}
    try:
        for loss in losses:
            found = torch.autograd.grad(loss(), list(gates.values()))
            for name, grad in zip(gates, found, strict=True):
                total[name] += grad.abs()
    finally:
        for hook in hooks:
            hook.remove()
    return total


def prune_heads(
    outputs: Mapping[str, nn.Linear], importance: Mapping[str, Tensor], count: int
) -> list[tuple[str, int]]:
    """Silence the ``count`` least important heads by zeros in the output projections; shapes stay.

    Returns:
        Name and head of each. Heads are cut out of the tensors by ``torchgraft.compression.optin``.
    """
    ranked = sorted((float(v), name, head) for name, scores in importance.items() for head, v in enumerate(scores))
    if not 0 <= count <= len(ranked):
        raise ValueError(f"count must lie in 0..{len(ranked)}, got {count}")
    gone = [(name, head) for _, name, head in ranked[:count]]
    with torch.no_grad():
        for name, head in gone:
            outputs[name].weight.unflatten(1, (len(importance[name]), -1))[:, head] = 0
    return gone


# ----------------------------------------------------------------- distillation


def distillation_loss(
    student: Float[Tensor, "*B C"],
    teacher: Float[Tensor, "*B C"],
    labels: Int[Tensor, "*B"] | None = None,
    *,
    temperature: float = 2.0,
    soft_weight: float = 0.5,
    student_hidden: Float[Tensor, "*P W"] | None = None,
    teacher_hidden: Float[Tensor, "*P W"] | None = None,
    hidden: str = "cosine",
    hidden_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """``soft_weight`` T^2 KL(teacher | student) at temperature T, plus the rest of the weight on cross-entropy.

    With hidden states it adds ``hidden_weight`` times 1 - cosine (DistilBERT) or the squared error (``hidden="mse"``,
    TinyBERT). Without labels the soft part counts fully.

    Raises:
        ValueError: for settings out of range, or one hidden state without the other.
    """
    if not temperature > 0 or not 0 <= soft_weight <= 1:
        raise ValueError(f"temperature must be positive and soft_weight in 0..1, got {temperature} and {soft_weight}")
    if (student_hidden is None) != (teacher_hidden is None) or hidden not in ("cosine", "mse"):
        raise ValueError(f"hidden must be 'cosine' or 'mse' and hidden states come in pairs, got {hidden!r}")
    s, t = (x.flatten(0, -2).float() / temperature for x in (student, teacher.detach()))
    soft = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean") * temperature**2
    loss = soft if labels is None else soft_weight * soft
    if labels is not None:
        loss = loss + (1 - soft_weight) * F.cross_entropy(student.flatten(0, -2).float(), labels.flatten())
    if student_hidden is not None and teacher_hidden is not None:
        target = teacher_hidden.detach()
        away = (
            1 - F.cosine_similarity(student_hidden, target, dim=-1).mean()
            if hidden == "cosine"
            else F.mse_loss(student_hidden, target)
        )
        loss = loss + hidden_weight * away
    return loss


def distil(
    teacher: nn.Module,
    student: nn.Module,
    loader: Iterable[Any],
    *,
    lr: float = 1e-3,
    temperature: float = 2.0,
    soft_weight: float = 0.5,
) -> list[float]:
    """Train ``student`` on the soft targets of ``teacher``, once over ``loader``; the losses.

    The teacher runs in eval mode and the student in train mode; afterwards both are in the mode that they came in.

    Args:
        teacher: from inputs to logits, or to an output with ``logits``.
        student: trained in place.
        loader: batches ``(inputs, labels)``.
        lr: of AdamW.
        temperature: as in ``distillation_loss``.
        soft_weight: as in ``distillation_loss``.
    """
    modes = [(m, m.training) for model in (teacher, student) for m in model.modules()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    losses = []
    try:
        teacher.eval()
        student.train()
        for x, y in loader:
            with torch.no_grad():
                target = _logits(teacher(x))
            loss = distillation_loss(_logits(student(x)), target, y, temperature=temperature, soft_weight=soft_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    finally:
        for module, mode in modes:
            module.training = mode
    return losses


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


# ----------------------------------------------------------------- experts, early exits


def switch_balance(chances: Float[Tensor, "T E"], chosen: Int[Tensor, T], weight: float = 0.01) -> Float[Tensor, ""]:
    """alpha N sum_e f_e P_e: share of tokens sent to each expert times its mean chance; ``weight`` when uniform."""
    experts = chances.shape[1]
    share = F.one_hot(chosen, experts).to(chances.dtype).mean(0)
    return weight * experts * (share * chances.mean(0)).sum()


class SwitchFFN(nn.Module):
    """Mixture of experts, each token to one (Switch Transformer, Fedus et al. 2022).

    Each expert takes at most ``capacity`` times its even share; tokens beyond that give 0, so that the residual around
    this layer carries them. ``balance`` holds the auxiliary loss of the last call, ``dropped`` their share.

    Example:
        >>> layer = SwitchFFN(8, 16, experts=4)
        >>> layer(torch.randn(2, 10, 8)).shape
        torch.Size([2, 10, 8])
    """

    def __init__(
        self, width: int, hidden: int, experts: int, capacity: float = 1.25, balance_weight: float = 0.01
    ) -> None:
        super().__init__()
        if experts < 1 or not capacity > 0:
            raise ValueError(f"experts must be at least 1 and capacity positive, got {experts} and {capacity}")
        expert = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.experts = nn.ModuleList(copy.deepcopy(expert) for _ in range(experts))
        for layer in self.experts.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        self.router = nn.Linear(width, experts)
        self.capacity, self.balance_weight = capacity, balance_weight
        self.balance: Tensor | None = None
        self.dropped = 0.0

    def forward(self, x: Float[Tensor, "B N W"]) -> Float[Tensor, "B N W"]:
        """Each token through its expert, times the chance of that expert."""
        flat = x.flatten(0, 1)
        if not len(flat):
            raise ValueError(f"x must hold at least one token, got shape {tuple(x.shape)}")
        # routing in float32, as the paper's selective precision
        chances = self.router(flat).float().softmax(-1)
        best, chosen = chances.max(-1)
        self.balance = switch_balance(chances, chosen, self.balance_weight)
        room = math.ceil(self.capacity * len(flat) / len(self.experts))
        y, kept = torch.zeros_like(flat), 0
        for number, expert in enumerate(self.experts):
            at = (chosen == number).nonzero()[:room, 0]
            kept += len(at)
            y = y.index_add(0, at, (expert(flat[at]) * best[at, None]).to(y.dtype))
        self.dropped = 1 - kept / len(flat)
        return y.view_as(x)

    def __getstate__(self) -> dict[str, Any]:
        # what hangs on a graph can neither be copied nor saved
        return {**self.__dict__, "balance": None}


class EarlyExit(nn.Module):
    """Layers with a classifier behind each; inference stops where the prediction is sure (entropy below a threshold).

    In training all classifiers are returned, (layers, B, classes), to be trained together. In eval mode a sample leaves
    at the first layer whose entropy, in nats, is below ``threshold``; ``exits`` says where each left.

    Example:
        >>> net = EarlyExit([nn.Linear(4, 4), nn.Linear(4, 4)], [nn.Linear(4, 3), nn.Linear(4, 3)], threshold=0.5)
        >>> net.eval()(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(self, layers: Iterable[nn.Module], heads: Iterable[nn.Module], threshold: float) -> None:
        super().__init__()
        self.layers, self.heads, self.threshold = nn.ModuleList(layers), nn.ModuleList(heads), threshold
        if len(self.layers) != len(self.heads) or not len(self.layers):
            raise ValueError(f"every layer needs a head, got {len(self.layers)} layers and {len(self.heads)} heads")
        self.exits = torch.zeros(0, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) to (B, classes), or (layers, B, classes) in training."""
        if self.training:
            found = []
            for layer, head in zip(self.layers, self.heads, strict=True):
                x = layer(x)
                found.append(head(x))
            return torch.stack(found)
        left, y = torch.arange(len(x), device=x.device), None
        exits = torch.full((len(x),), len(self.layers) - 1, device=x.device)
        for number, (layer, head) in enumerate(zip(self.layers, self.heads, strict=True)):
            x = layer(x)
            logits = head(x)
            y = torch.zeros(len(exits), logits.shape[-1], dtype=logits.dtype, device=x.device) if y is None else y
            chance = logits.softmax(-1)
            sure = -(chance * chance.clamp(min=1e-30).log()).sum(-1) < self.threshold
            if number == len(self.layers) - 1:
                sure = torch.ones_like(sure)
            y[left[sure]], exits[left[sure]] = logits[sure], number
            x, left = x[~sure], left[~sure]
            if not len(left):
                break
        self.exits = exits
        assert y is not None
        return y


# ----------------------------------------------------------------- found by search; sample-efficient


class SquaredReLU(nn.Module):
    """relu(x)^2 (Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x.relu().square()


class PrimerConv(nn.Module):
    """Primer's causal depthwise convolution over ``width`` positions, for queries, keys or values after projection."""

    def __init__(self, channels: int, width: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, width, groups=channels)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """No position sees a later one."""
        x = F.pad(x.transpose(1, 2), (self.conv.kernel_size[0] - 1, 0))
        return self.conv(x).transpose(1, 2)


def replaced_token_loss(
    generator: Float[Tensor, "B N V"],
    discriminator: Float[Tensor, "B N"],
    tokens: Int[Tensor, "B N"],
    sampled: Int[Tensor, "B N"],
    masked: Bool[Tensor, "B N"],
    weight: float = 50.0,
    padding: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, ""]:
    """ELECTRA: cross-entropy of the generator at masked positions plus ``weight`` times detection at all.

    Args:
        generator: its logits.
        discriminator: one logit a position, high where it takes the token for replaced.
        tokens: the original ones.
        sampled: what the discriminator saw; a token sampled right counts as original.
        masked: where the generator filled in.
        weight: of the detection.
        padding: True where padded; these positions count for nothing.

    Raises:
        ValueError: when nothing is masked.
    """
    real = torch.ones_like(masked) if padding is None else ~padding
    masked = masked & real
    if not bool(masked.any()):
        raise ValueError("masked marks no position, so that the generator has nothing to learn from")
    guess = F.cross_entropy(generator[masked].float(), tokens[masked])
    detect = F.binary_cross_entropy_with_logits(discriminator[real].float(), (sampled != tokens)[real].float())
    return guess + weight * detect
