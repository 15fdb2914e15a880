"""Twins-SVT with anchoring before every window attention, strided convolution and patch embedding (paper, 3.2).

Facts of the network (Chu et al., arXiv 2104.13840) and the names of its parameters are those of timm, so that its
weights load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.vision.polyphase_vit.anchor import Norm, anchor_tokens, check_divides, check_norm, check_pixels

__all__ = ["PolyTwinsConfig", "PolyTwinsSVT"]

Grid = tuple[int, int]


@dataclass(frozen=True)
class PolyTwinsConfig:
    """Sizes of a Twins-SVT.

    Args:
        embed_dims, depths, num_heads, window_sizes, sr_ratios: one number a stage; ``sr_ratios`` are the strides of
            the sub-sampled keys.
        mlp_ratio: width of the feed-forward layer over that of the tokens.
        patch_size: of the first embedding; the others halve.
        in_chans, num_classes: of the task.
        drop_path: rate of the last block's stochastic depth; grows linearly up to it.
        anchored: anchors, and convolutions that go round; without it, the plain network.
        norm: as in ``polyphase_offsets``; the official code has ``"l2"``.

    Example:
        >>> PolyTwinsConfig.base(num_classes=10).embed_dims
        (96, 192, 384, 768)
    """

    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 10, 4)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    window_sizes: tuple[int, ...] = (7, 7, 7, 7)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    mlp_ratio: float = 4.0
    patch_size: int = 4
    in_chans: int = 3
    num_classes: int = 1000
    drop_path: float = 0.0
    anchored: bool = True
    norm: Norm = "filtered"

    def __post_init__(self) -> None:
        stages = {k: len(getattr(self, k)) for k in ("embed_dims", "depths", "num_heads", "window_sizes", "sr_ratios")}
        if len(set(stages.values())) != 1:
            raise ValueError(f"the stages must be as many in every setting, got {stages}")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"embed_dims {dim} cannot be shared out between {heads} heads")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {self.drop_path}")
        check_norm(self.norm)

    @classmethod
    def small(cls, **settings: object) -> PolyTwinsConfig:
        """Twins-SVT-S."""
        return replace(cls(), **settings)  # type: ignore[arg-type]

    @classmethod
    def base(cls, **settings: object) -> PolyTwinsConfig:
        """Twins-SVT-B."""
        sizes = cls(embed_dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
        return replace(sizes, **settings)  # type: ignore[arg-type]

    @classmethod
    def large(cls, **settings: object) -> PolyTwinsConfig:
        """Twins-SVT-L."""
        sizes = cls(embed_dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
        return replace(sizes, **settings)  # type: ignore[arg-type]

    @property
    def multiple(self) -> int:
        """Height and width of the images must be multiples of this."""
        strides = [self.patch_size * 2**i for i in range(len(self.depths))]
        grids = zip(strides, self.window_sizes, self.sr_ratios, self.depths, strict=True)
        return math.lcm(*(stride * math.lcm(ws, sr if depth > 1 else 1) for stride, ws, sr, depth in grids))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


class _Local(nn.Module):
    """Attention within windows."""

    def __init__(self, dim: int, heads: int, ws: int) -> None:
        super().__init__()
        self.heads, self.ws = heads, ws
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        B, N, C = x.shape
        rows, columns = size[0] // self.ws, size[1] // self.ws
        windows = x.view(B, rows, self.ws, columns, self.ws, C).transpose(2, 3).reshape(B, -1, self.ws**2, C)
        q, k, v = (_heads(part, self.heads) for part in self.qkv(windows).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).reshape(B, rows, columns, self.ws, self.ws, C)
        return self.proj(y.transpose(2, 3).reshape(B, N, C))


class _Global(nn.Module):
    """Attention of all tokens to a grid that was made smaller by a strided convolution."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.ratio = heads, ratio
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if ratio > 1:
            self.sr, self.norm = nn.Conv2d(dim, dim, ratio, ratio), nn.LayerNorm(dim)

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        seen = x
        if self.ratio > 1:
            seen = self.norm(self.sr(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2))
        k, v = (_heads(part, self.heads) for part in self.kv(seen).chunk(2, -1))
        return self.proj(F.scaled_dot_product_attention(_heads(self.q(x), self.heads), k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop: float, ws: int, sr: int) -> None:
        super().__init__()
        self.drop = drop
        # the grid that the attention lays over the tokens
        self.grid = ws if ws else sr
        self.attn = _Local(dim, heads, ws) if ws else _Global(dim, heads, sr)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop
        return branch * kept / (1 - self.drop)

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        x = x + self._dropped(self.attn(self.norm1(x), size))
        return x + self._dropped(self.mlp(self.norm2(x)))


class _PatchEmbed(nn.Module):
    def __init__(self, inputs: int, outputs: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj, self.norm = nn.Conv2d(inputs, outputs, patch, patch), nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class _PosBlock(nn.Module):
    def __init__(self, dim: int, padding_mode: Literal["circular", "zeros"]) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, padding_mode=padding_mode))

    def forward(self, x: Tensor, size: Grid) -> Tensor:
        return x + self.proj(x.transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / out))
        assert module.bias is not None
        nn.init.zeros_(module.bias)


class PolyTwinsSVT(nn.Module):
    """A Twins-SVT image classifier whose answer no cyclic shift changes.

    Every stage embeds patches, then alternates attention within windows and attention to sub-sampled tokens; a
    convolution after the first block says where tokens stand. Each of these that lays a grid over its input gets the
    input anchored, and convolutions go round at the edges. The residual branch is anchored with the block, nothing is
    rolled back, and the mean over all tokens forgets what shift by whole grid cells remains.

    The official code anchors the first patch embedding alone, since in Twins-S, -B and -L the last block of a stage is
    anchored at an even stride already. Here a later embedding is anchored where that is not so. With ``norm="l2"`` and
    these layouts both compute the same function.

    Args:
        config: sizes; ``PolyTwinsConfig.small()``, ``.base()``, ``.large()``.

    Raises:
        ValueError: in ``forward``, for images whose size is no multiple of ``config.multiple`` (224 for S, B, L).

    Example:
        >>> sizes = dict(embed_dims=(16, 32), depths=(2, 2), num_heads=(2, 4), window_sizes=(2, 2), sr_ratios=(2, 1))
        >>> model = PolyTwinsSVT(PolyTwinsConfig(**sizes, patch_size=2, num_classes=5)).eval()
        >>> x = torch.rand(1, 3, 16, 24)
        >>> torch.allclose(model(x), model(x.roll((3, 5), (2, 3))), atol=1e-5)
        True
    """

    def __init__(self, config: PolyTwinsConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or PolyTwinsConfig()
        patches = [c.patch_size] + [2] * (len(c.depths) - 1)
        widths = [c.in_chans, *c.embed_dims]
        self.patch_embeds = nn.ModuleList(_PatchEmbed(i, o, p) for (i, o), p in zip(pairwise(widths), patches))  # noqa: B905
        rates = iter(torch.linspace(0, c.drop_path, sum(c.depths)).tolist())
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                _Block(dim, heads, c.mlp_ratio, next(rates), 0 if j % 2 else ws, sr)  # every other block is global
                for j in range(depth)
            )
            for dim, heads, depth, ws, sr in zip(
                c.embed_dims, c.num_heads, c.depths, c.window_sizes, c.sr_ratios, strict=True
            )
        )
        mode: Literal["circular", "zeros"] = "circular" if c.anchored else "zeros"
        self.pos_block = nn.ModuleList(_PosBlock(dim, mode) for dim in c.embed_dims)
        self.norm = nn.LayerNorm(c.embed_dims[-1], eps=1e-6)
        self.head = nn.Linear(c.embed_dims[-1], c.num_classes) if c.num_classes else nn.Identity()
        self.apply(_initialise)

    def anchor_(self, norm: Norm = "filtered") -> PolyTwinsSVT:
        """Turn a plain network into an anchored one, weights kept; changes the model and returns it."""
        self.config = replace(self.config, anchored=True, norm=norm)
        for block in self.pos_block:
            block.proj[0].padding_mode = "circular"  # type: ignore[index, union-attr]
        return self

    def forward_features(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Tokens of the last stage, normalised."""
        c = self.config
        x = pixel_values
        check_pixels(x, c.in_chans)
        check_divides((x.shape[2], x.shape[3]), (c.multiple,) * 2, "an image")
        size = (x.shape[2], x.shape[3])
        tokens = x.flatten(2).transpose(1, 2)
        on_grid = 1

        def anchored(tokens: Tensor, grid: int) -> Tensor:
            return anchor_tokens(tokens, size, grid, c.norm) if c.anchored and grid > 1 else tokens

        for i, (embed, blocks, position) in enumerate(zip(self.patch_embeds, self.blocks, self.pos_block, strict=True)):
            assert isinstance(embed, _PatchEmbed)
            assert isinstance(blocks, nn.ModuleList)
            if i == 0 or on_grid % embed.patch:
                tokens = anchored(tokens, embed.patch)
            tokens = embed(tokens.transpose(1, 2).unflatten(2, size))
            size = (size[0] // embed.patch, size[1] // embed.patch)
            on_grid = 1
            for j, block in enumerate(blocks):
                assert isinstance(block, _Block)
                tokens = block(anchored(tokens, block.grid), size)
                on_grid = block.grid if block.grid > 1 else on_grid
                if j == 0:
                    tokens = position(tokens, size)
        return self.norm(tokens)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.head(self.forward_features(pixel_values).mean(1))
