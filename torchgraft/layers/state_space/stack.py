"""Blocks of state space layers, attention and feed-forward networks; softmax attention behind the same interface.

Legend: B batch, L length, D features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.state_space.mixer import SequenceMixer, State, inside, last_places

__all__ = ["Attention", "Block", "MixtureOfExperts", "Stack", "ssm_optim_groups"]


class Attention(SequenceMixer):
    """Softmax attention with rotary positions, which the family is compared with and mixed with (Jamba).

    Args:
        d_model: width.
        heads: attention heads, of an even number of features.
        causal: look into the past alone.

    Example:
        >>> y, state = Attention(8, heads=2)(torch.randn(2, 100, 8))
    """

    growing: ClassVar[frozenset[str]] = frozenset({"keys_values", "seen"})

    def __init__(self, d_model: int, *, heads: int = 4, causal: bool = True) -> None:
        super().__init__(d_model, causal=causal)
        if heads < 1 or d_model % (2 * heads):
            raise ValueError(f"d_model must be an even multiple of heads, got {d_model} and {heads}")
        self.heads = heads
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)

    def _empty(self, batch: int, device: torch.device | None, dtype: torch.dtype) -> State:
        return {
            "keys_values": torch.zeros(batch, 0, 2 * self.d_model, device=device, dtype=dtype),
            "seen": torch.zeros(batch, 0, device=device, dtype=torch.bool),
            "position": torch.zeros(batch, device=device, dtype=torch.long),
        }

    def _mix(
        self, x: Tensor, state: State | None, lengths: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        position = torch.zeros(batch, dtype=torch.long, device=x.device) if state is None else state["position"]
        half = q.shape[-1] // 2
        rates = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = (position[:, None] + torch.arange(length, device=x.device))[..., None, None] * rates
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        q, k = (
            torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (t.chunk(2, -1) for t in (q, k))
        )  # fmt: skip
        whole = torch.cat([k, v], -1).flatten(2)
        here = inside(x, lengths)
        seen = torch.ones(batch, length, dtype=torch.bool, device=x.device) if here is None else here
        if state is not None:
            whole = torch.cat([state["keys_values"].to(whole.dtype), whole], 1)
            seen = torch.cat([state["seen"], seen], 1)
        k, v = whole.unflatten(-1, (self.heads, -1)).chunk(2, -1)
        total = whole.shape[1]
        mask = None
        if state is not None or lengths is not None:
            gap = torch.arange(total, device=x.device) - torch.arange(length, device=x.device)[:, None]
            gap = gap - (total - length)
            mask = (seen[:, None] & (gap <= 0) if self.causal else seen[:, None].expand(-1, length, -1)) | (gap == 0)
            mask = mask[:, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
            is_causal=self.causal and mask is None,
        )  # fmt: skip
        y = self.out(y.transpose(1, 2).flatten(2))
        if not return_state:
            return y, None
        ends = None if lengths is None else lengths + total - length
        return y, {
            "keys_values": last_places(whole, total, ends),
            "seen": last_places(seen, total, ends),
            "position": position + (length if lengths is None else lengths),
        }


class MixtureOfExperts(nn.Module):
    """Feed-forward networks of which each place uses the ``top_k`` that a router prefers (Mamba-MoE, Jamba).

    Weights are the router's softmax over all experts, those of the chosen ones, not normalised again. ``balance`` holds
    the load-balancing loss of the last call (Fedus et al., 2021): the number of experts times the sum over experts of
    the share of places and the mean probability; 1 when balanced.

    Args:
        d_model: width.
        d_inner: inner width of an expert.
        experts: E.
        top_k: used by each place.

    Example:
        >>> MixtureOfExperts(8, 16, experts=4, top_k=2)(torch.randn(2, 10, 8)).shape
        torch.Size([2, 10, 8])
    """

    balance: Tensor

    def __init__(self, d_model: int, d_inner: int, experts: int, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k must lie in 1 .. experts, got {top_k} of {experts}")
        self.top_k = top_k
        self.router = nn.Linear(d_model, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d_model, d_inner), nn.GELU(), nn.Linear(d_inner, d_model)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to the same."""
        flat = x.flatten(0, -2)
        probability = self.router(flat).softmax(-1)
        weight, chosen = probability.topk(self.top_k, -1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            row, rank = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, row, expert(flat[row]) * weight[row, rank, None])
        share = F.one_hot(chosen, len(self.experts)).to(x.dtype).mean((0, 1))
        self.balance = len(self.experts) * (share * probability.mean(0)).sum()
        return y.view_as(x)


class Block(nn.Module):
    """Norm, mixer, residual; and, where there is one, norm, feed-forward, residual.

    Args:
        mixer: any layer of the family; one that brings its own norm and residual is left alone.
        feed_forward: a module from (..., D) to the same, or ``None``, as Mamba blocks have it.
    """

    def __init__(self, mixer: SequenceMixer, feed_forward: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1: nn.Module = nn.Identity() if mixer.has_residual else nn.LayerNorm(mixer.d_model)
        self.mixer, self.feed_forward = mixer, feed_forward
        self.norm2 = None if feed_forward is None else nn.LayerNorm(mixer.d_model)

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        x = y if self.mixer.has_residual else x + y
        if self.feed_forward is None or self.norm2 is None:
            return x
        return x + self.feed_forward(self.norm2(x))

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, *, return_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """As a mixer."""
        y, new = self.mixer(self.norm1(x), state, mask, return_state=return_state)
        return self._after(x, y), new

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """As a mixer."""
        y, new = self.mixer.step(self.norm1(x_t), state)
        return self._after(x_t, y), new


class Stack(nn.Module):
    """Blocks one after another with a norm behind them; the state is the list of theirs.

    Example:
        >>> from torchgraft.layers.state_space.mamba import Mamba
        >>> stack = Stack([Block(Mamba(8)) for _ in range(2)], 8)
        >>> y, states = stack(torch.randn(2, 100, 8))
        >>> y_next, states = stack.step(torch.randn(2, 8), states)
    """

    def __init__(self, blocks: Iterable[Block], d_model: int) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(d_model)

    @property
    def causal(self) -> bool:
        """Whether every block looks into the past alone."""
        return all(self._mixer(block).causal for block in self.blocks)

    @staticmethod
    def _mixer(block: nn.Module) -> SequenceMixer:
        assert isinstance(block, Block)
        return block.mixer

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> list[State]:
        """One state for each block."""
        return [self._mixer(block).initial_state(batch_size, device, dtype) for block in self.blocks]

    def forward(
        self, x: Tensor, states: Sequence[State] | None = None, mask: Tensor | None = None, *, return_state: bool = True
    ) -> tuple[Tensor, list[Any]]:
        """(B, L, D) to the same, and the states."""
        found = []
        for i, block in enumerate(self.blocks):
            x, new = block(x, None if states is None else states[i], mask, return_state=return_state)
            found.append(new)
        return self.norm(x), found

    def step(self, x_t: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """(B, D) to the same, and the states."""
        found = []
        for block, state in zip(self.blocks, states, strict=True):
            assert isinstance(block, Block)
            x_t, new = block.step(x_t, state)
            found.append(new)
        return self.norm(x_t), found


def ssm_optim_groups(
    model: nn.Module, lr: float, *, ssm_lr: float = 1e-3, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: eigenvalues and step sizes slowly and without weight decay.

    Args:
        model: anything that holds layers of the family.
        lr: of everything else.
        ssm_lr: of the dynamics, never above ``lr``.
        weight_decay: of matrices; vectors (biases, norms) get none.

    Returns:
        Groups without empty ones.

    Example:
        >>> from torchgraft.layers.state_space.linear import S4D
        >>> [round(group["lr"], 4) for group in ssm_optim_groups(S4D(4, 8), lr=0.01)]
        [0.001, 0.01, 0.01]
    """
    slow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, SequenceMixer):
            for name in module.dynamics:
                slow.setdefault(id(module.get_parameter(name)), module.get_parameter(name))
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in slow]
    groups = [
        {"params": [p for p in slow.values() if p.requires_grad], "lr": min(lr, ssm_lr), "weight_decay": 0.0},
        {"params": [p for p in rest if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
