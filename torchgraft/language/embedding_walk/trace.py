"""The walk inside one forward pass: positions, steps, and what each step and each token adds to a logit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.language._access import Access, captured, norm_gain, unwrapped
from torchgraft.language.embedding_walk.association import telling_attention
from torchgraft.language.embedding_walk.nulls import Statistic, generator
from torchgraft.surgery import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAMBA = ("mamba", "falcon_mamba", "mamba2")


def widened(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class FrozenNorm:
    """A final norm whose scale is held where it is, which makes it linear: ``gain * scale * (h - mean) + bias``.

    Attributes:
        gain, bias: (D,).
        scale: (..., 1), one over the standard deviation or root mean square.
        centred: whether the mean over D is taken off.
    """

    gain: Tensor
    bias: Tensor
    scale: Tensor
    centred: bool

    def pull(self, direction: Tensor) -> Tensor:
        """What direction (..., D) before the norm reads the same as ``direction`` after it, bias apart."""
        before = direction * self.gain * self.scale
        return before - before.mean(-1, keepdim=True) if self.centred else before


def frozen_norm(norm: nn.Module, hidden: Float[Tensor, "... D"]) -> FrozenNorm:
    """A LayerNorm or RMSNorm with its scale held at ``hidden``.

    Raises:
        TypeError: for a norm that is neither.
    """
    bias: Any = getattr(norm, "bias", None)
    gain = norm_gain(norm, hidden.shape[-1]).detach().to(hidden)
    centred = isinstance(norm, nn.LayerNorm)
    eps = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), None)
    if eps is None:
        raise TypeError(f"the norm must be a LayerNorm or an RMSNorm, got {type(norm).__name__}")
    off = hidden - hidden.mean(-1, keepdim=True) if centred else hidden
    scale = (off.square().mean(-1, keepdim=True) + eps).rsqrt()
    offset = torch.zeros_like(gain) if bias is None else bias.detach().to(hidden.dtype)
    found = FrozenNorm(gain, offset, scale, centred)
    dtype = next((p.dtype for p in norm.parameters()), hidden.dtype)
    with torch.no_grad():
        want, got = widened(norm(hidden.to(dtype))), off * scale * gain + offset
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.05
    if not torch.allclose(want.to(got.dtype), got, rtol=tolerance, atol=tolerance * float(want.abs().max())):
        raise TypeError(
            f"the norm must be a LayerNorm or an RMSNorm, got {type(norm).__name__} that computes otherwise"
        )
    return found


@dataclass(frozen=True)
class Contributions:
    """What adds up to one number at each place: the logit of a token, or the length of the context along itself.

    Attributes:
        total: (T,), the number itself, before soft-capping.
        start: (T,), of the vector before the first layer: token and, in models that add them, position.
        steps: (S, T), of each step of the walk.
        heads: (L, H, T, T), of what head h of layer l takes from place j (last) for place t.
        attention_bias: (L, T), of output biases.
        bias: (T,), of the final norm's bias and the head's.
    """

    total: Tensor
    start: Tensor
    steps: Tensor
    heads: Tensor
    attention_bias: Tensor
    bias: Tensor

    @property
    def by_token(self) -> Tensor:
        """(T, T): what place t takes from place j through attention, all layers and heads together."""
        return self.heads.sum((0, 1))


@dataclass(frozen=True)
class WalkTrace:
    """The walk of every token of a text through the layers.

    Attributes:
        tokens, ids: of the text; names, and (T,).
        positions: (L + 1, T, D), the residual stream before the first layer and after each, before the final norm.
        steps: (S, T, D), displacements whose sum is the last position less the first: what attention and feed-forward
            network of each layer add (S = 2 L); in encoders and Mamba one step a layer (S = L).
        kinds: name of each step.
        contexts: (T, D), the last position after the final norm.
        patterns: (L, H, T, T) attention weights, or None in Mamba.
    """

    tokens: tuple[str, ...]
    ids: Tensor
    positions: Tensor
    steps: Tensor
    kinds: tuple[str, ...]
    contexts: Tensor
    patterns: Tensor | None
    model: nn.Module = field(repr=False)

    def lengths(self) -> Float[Tensor, "S T"]:
        """Length of every step."""
        return self.steps.norm(dim=-1)

    def straightness(self) -> Float[Tensor, " T"]:
        """Net displacement over path length, 1 for a straight walk."""
        return self.steps.sum(0).norm(dim=-1) / self.lengths().sum(0)

    def cosines(self) -> Float[Tensor, "turns T"]:
        """Cosine (S - 1, T) between each step and the next."""
        return F.cosine_similarity(self.steps[:-1], self.steps[1:], dim=-1)

    def curvature(self) -> Float[Tensor, "turns T"]:
        """Angle between each step and the next, in radians."""
        return self.cosines().clamp(-1, 1).arccos()

    def shares(self) -> dict[str, float]:
        """Share of the path's length by kind of step (attention, mlp, or layer)."""
        lengths = self.lengths().sum(1)
        names = [kind.split()[0] for kind in self.kinds]
        return {
            name: float(sum(length for n, length in zip(names, lengths, strict=True) if n == name) / lengths.sum())
            for name in dict.fromkeys(names)
        }

    def statistics(
        self, draws: int = 19, seed: int = 0, skip_first: bool = True, null: Literal["directions", "tokens"] = "tokens"
    ) -> dict[str, Statistic]:
        """Mean straightness and mean cosine of successive steps, beside walks of the same step lengths at random.

        Args:
            draws: of the null model.
            seed: of the draws.
            skip_first: leave out the first token, on which attention rests and whose vectors are far larger.
            null: ``directions`` draws the direction of every step anew, from all of the space, which any drift that
                all tokens share will beat; ``tokens`` takes each step from a token drawn at random, at the step's own
                length, so that what all tokens share stays and what belongs to one walk goes.

        Raises:
            ValueError: for no draws, another null model, or where nothing is left.
        """
        first = int(skip_first)
        if draws < 1 or len(self.ids) <= first:
            raise ValueError(f"draws must be at least 1 and the text longer than {first}, got {draws}, {len(self.ids)}")
        if null not in ("directions", "tokens"):
            raise ValueError(f"null must be 'directions' or 'tokens', got {null!r}")
        steps = self.steps[:, first:].cpu()
        draw = generator(seed)

        def measured(walk: Tensor) -> tuple[float, float]:
            straight = walk.sum(0).norm(dim=-1) / walk.norm(dim=-1).sum(0)
            return straight.mean().item(), F.cosine_similarity(walk[:-1], walk[1:], dim=-1).mean().item()

        found = measured(steps)
        drawn = []
        for _ in range(draws):
            if null == "directions":
                random = torch.randn(steps.shape, generator=draw, dtype=steps.dtype)
            else:
                order = torch.stack([torch.randperm(steps.shape[1], generator=draw) for _ in steps])
                random = steps.gather(1, order[..., None].expand_as(steps))
            drawn.append(measured(F.normalize(random, dim=-1) * steps.norm(dim=-1, keepdim=True)))
        what = {
            "directions": "steps of the same lengths in random directions",
            "tokens": "directions of other tokens' steps",
        }[null]
        straight, cosine = zip(*drawn, strict=True)
        return {
            "straightness": Statistic(found[0], straight, what),
            "successive cosine": Statistic(found[1], cosine, what),
        }

    def _norm(self, hidden: Tensor) -> Tensor:
        norm = parts(self.model)[1]
        if norm is None:
            return hidden
        dtype = next(norm.parameters()).dtype
        with torch.no_grad():
            return widened(norm(hidden.to(dtype)))

    @property
    def _unembedding(self) -> Tensor:
        head = output_head(self.model)
        return widened(head.weight.detach()).to(self.positions.dtype)

    def targets(self) -> Int[Tensor, " T"]:
        """The token that comes next at each place; at the last one the model's own first choice."""
        last = self.contexts[-1] @ self._unembedding.T + head_bias(self.model)
        return torch.cat([self.ids[1:], last.argmax()[None]])

    def lens_ranks(
        self, tokens: Int[Tensor, " T"] | None = None, places: Sequence[int] | None = None
    ) -> Int[Tensor, "layers places"]:
        """Rank, from 1, of a token at each place if the walk ended after each layer (logit lens).

        Args:
            tokens: (T,); each place's final first choice of the model where None.
            places: at which places; at all where None.

        Raises:
            ValueError: for tokens of another shape or outside the vocabulary, or a place that does not exist.
        """
        bias, unembedding = head_bias(self.model), self._unembedding
        shown = self._places(range(len(self.ids)) if places is None else places)
        if tokens is None:
            tokens = (self.contexts[shown] @ unembedding.T + bias).argmax(-1)
        else:
            tokens = self._known(tokens)[shown]
        rows = []
        for position in self.positions:
            logits = self._norm(position[shown]) @ unembedding.T + bias
            rows.append((logits > logits.gather(1, tokens[:, None])).sum(1) + 1)
        return torch.stack(rows)

    def _places(self, places: Sequence[int]) -> list[int]:
        shown, count = list(places), len(self.ids)
        if not shown or not all(0 <= place < count for place in shown):
            raise ValueError(f"places must be some of 0..{count - 1}, got {shown}")
        return shown

    def _known(self, tokens: Tensor) -> Tensor:
        size = len(self._unembedding)
        if tokens.shape != self.ids.shape or not bool(((tokens >= 0) & (tokens < size)).all()):
            raise ValueError(f"tokens must be {tuple(self.ids.shape)} in 0..{size - 1}, got {tuple(tokens.shape)}")
        return tokens

    def distances(self) -> dict[str, Tensor]:
        """Euclidean distance (L + 1, T) of the normed position to the final context, its own and the next token."""
        rows = self._unembedding
        goals = {"context": self.contexts, "own token": rows[self.ids], "next token": rows[self.targets()]}
        normed = [self._norm(position) for position in self.positions]
        return {
            name: torch.stack([(position - goal).norm(dim=-1) for position in normed]) for name, goal in goals.items()
        }

    def contributions(
        self, tokens: Int[Tensor, " T"] | None = None, target: Literal["logit", "context"] = "logit"
    ) -> Contributions:
        """Split a logit, or the context's length along itself, into steps, heads and source tokens.

        The final norm's scale is held where it is, so that parts sum to the whole; heads are contracted with the
        direction asked for before they meet the pattern, so that nothing of size T x T x D comes up.

        Args:
            tokens: (T,), whose logits; what comes next where None, see ``targets``.
            target: ``logit``, or ``context`` for the projection of the last position on its own direction.

        Raises:
            TypeError: for encoders and Mamba, whose steps are not those of heads.
            ValueError: for tokens of another shape or outside the vocabulary.
        """
        if self.patterns is None or len(self.kinds) == len(self.positions) - 1:
            raise TypeError(f"contributions need a causal attention model, got {type(self.model).__name__}")
        if target not in ("logit", "context"):
            raise ValueError(f"target must be 'logit' or 'context', got {target!r}")
        access, dtype = Access(self.model), self.positions.dtype
        rows = self._unembedding
        tokens = self.targets() if tokens is None else self._known(tokens)
        last = self.positions[-1]
        if target == "logit":
            norm = access.final_norm
            assert norm is not None
            frozen = frozen_norm(norm, last)
            direction, bias = frozen.pull(rows[tokens]), rows[tokens] @ frozen.bias
            head = head_bias(self.model)
            bias = bias + (head[tokens] if head.dim() else head)
        else:
            direction = F.normalize(last, dim=-1)
            bias = torch.zeros_like(last[:, 0])
        heads, biases = [], []
        for layer, pattern in enumerate(self.patterns):
            toward = direction
            after, raw = self._after_attention(access, layer)
            if after is not None:
                toward = frozen_norm(after, raw).pull(direction)
            weights = access.head_weights(layer)
            before = access.attention_norm(layer)
            assert before is not None
            with torch.no_grad():
                own = next(before.parameters()).dtype
                x = before(self.positions[layer].to(own)).to(dtype)
            values = torch.einsum("jd,hdk->hjk", x, weights.v.detach().to(dtype))
            values = values + weights.v_bias.detach().to(dtype)[:, None]
            reading = torch.einsum("hkd,td->htk", weights.o.detach().to(dtype), toward)
            heads.append(reading @ values.mT * pattern)
            biases.append(toward @ weights.o_bias.detach().to(dtype))
        return Contributions(
            total=(last * direction).sum(-1) + bias,
            start=(self.positions[0] * direction).sum(-1),
            steps=(self.steps * direction).sum(-1),
            heads=torch.stack(heads),
            attention_bias=torch.stack(biases),
            bias=bias,
        )

    def token_contrib(self, tokens: Int[Tensor, " T"] | None = None) -> Float[Tensor, "T T heads"]:
        """(t, j, layer * heads): what each head takes from place j for the logit at place t."""
        return self.contributions(tokens).heads.flatten(0, 1).permute(1, 2, 0)

    def _after_attention(self, access: Access, layer: int) -> tuple[nn.Module | None, Tensor]:
        """The norm between attention and stream, of Gemma 2 and 3, and what goes into it."""
        if access.family.added[0] != "post_attention_layernorm":
            return None, self.positions[layer]
        weights = access.head_weights(layer)
        dtype = self.positions.dtype
        before = access.attention_norm(layer)
        assert before is not None
        assert self.patterns is not None
        with torch.no_grad():
            x = before(self.positions[layer].to(next(before.parameters()).dtype)).to(dtype)
        values = torch.einsum("jd,hdk->hjk", x, weights.v.detach().to(dtype)) + weights.v_bias.to(dtype)[:, None]
        mixed = torch.einsum("htj,hjk,hkd->td", self.patterns[layer], values, weights.o.detach().to(dtype))
        return access.layer(layer).get_submodule("post_attention_layernorm"), mixed + weights.o_bias.to(dtype)

    def plot(self, pca: int = 2, places: Sequence[int] | None = None) -> Figure:
        """The walks of some places in the plane, or space, of the first principal components of their positions.

        Args:
            pca: 2 or 3.
            places: which tokens; the last six but never the first one where None, for its vectors dwarf the others.

        Raises:
            ValueError: for another number of components, or a place that does not exist.
        """
        from matplotlib.figure import Figure

        if pca not in (2, 3):
            raise ValueError(f"pca must be 2 or 3, got {pca}")
        count = len(self.ids)
        shown = self._places(range(min(1, count - 1), count)[-6:] if places is None else places)
        points = self.positions[:, shown].detach().cpu().double()
        flat = points.flatten(0, 1)
        basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:pca]
        flat = (points - flat.mean(0)) @ basis.T
        figure = Figure(figsize=(7, 5), layout="constrained")
        axes: Any = figure.add_subplot(projection="3d" if pca == 3 else None)
        for column, place in enumerate(shown):
            path = flat[:, column].numpy().T
            axes.plot(*path, "o-", markersize=2.5, linewidth=1, label=f"{place}: {self.tokens[place]!r}")
            axes.plot(*path[:, :1], "ko", markersize=4)
        axes.set(xlabel="first component", ylabel="second component")
        axes.set_title("black: before the first layer", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
        return figure


def parts(model: nn.Module) -> tuple[list[nn.Module], nn.Module | None]:
    """Layers, and the norm after them, of a model that ``Access`` knows or a Mamba.

    Raises:
        TypeError: for another model.
    """
    inner: Any = unwrapped(model)
    if getattr(getattr(inner, "config", None), "model_type", "") in _MAMBA:
        base = getattr(inner, "backbone", inner)
        return list(base.layers), base.norm_f
    access = Access(model)
    return access.layers, access.final_norm


def output_head(model: nn.Module) -> Any:
    """The linear layer that makes logits.

    Raises:
        TypeError: for encoders and models without a head.
    """
    find: Any = getattr(unwrapped(model), "get_output_embeddings", None)
    head = find() if find else None
    if head is None or parts(model)[1] is None:
        raise TypeError(f"model must be a causal language model with a head, got {type(model).__name__}")
    return head


def head_bias(model: nn.Module) -> Tensor:
    """(V,), or a single zero where the head has none."""
    head = output_head(model)
    bias = getattr(head, "bias", None)
    return torch.zeros((), device=head.weight.device) if bias is None else widened(bias.detach())


@torch.no_grad()
def traced(model: nn.Module, ids: Int[Tensor, " T"], names: Sequence[str]) -> WalkTrace:
    """Run a text once and keep its walk; attention is eager meanwhile, which alone tells its weights.

    Raises:
        TypeError: for a model of another kind.
    """
    layers, norm = parts(model)
    inner: Any = unwrapped(model)
    attends = inner.config.model_type not in _MAMBA
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if not attends:
        return _by_layer(model, ids, names, layers, norm, inputs)
    with (
        evaluating(model), telling_attention(model), captured(model, [0], "input") as first, captured(model) as after,
        captured(model, site="attention") as attention, captured(model, site="mlp") as mlp,
    ):  # fmt: skip
        extra = {} if norm is None else {"use_cache": False}
        patterns = torch.cat(list(model(**inputs, **extra, output_attentions=True).attentions))
    count = len(layers)
    positions = widened(torch.stack([first[0], *(after[layer] for layer in range(count))]).squeeze(1))
    if norm is None:
        kinds = tuple(f"layer {layer}" for layer in range(count))
        steps, contexts = positions.diff(dim=0), positions[-1]
    else:
        kinds = tuple(f"{kind} {layer}" for layer in range(count) for kind in ("attention", "mlp"))
        # OPT's feed-forward network sees all tokens of a batch in one row
        each = [site[layer].reshape(ids.shape[0], -1) for layer in range(count) for site in (attention, mlp)]
        steps, contexts = widened(torch.stack(each)), widened(norm(after[count - 1])[0])
    return WalkTrace(tuple(names), ids, positions, steps, kinds, contexts, widened(patterns), model)


def _by_layer(
    model: nn.Module, ids: Tensor, names: Sequence[str], layers: Sequence[nn.Module], norm: Any,
    inputs: Mapping[str, Tensor],
) -> WalkTrace:  # fmt: skip
    found: dict[int, Tensor] = {}

    def keep(at: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[at] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layer.register_forward_hook(keep(at + 1)) for at, layer in enumerate(layers)]
    handles.append(layers[0].register_forward_pre_hook(lambda module, args: found.update({0: args[0]})))
    try:
        with evaluating(model):
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    positions = widened(torch.stack([found[at] for at in range(len(layers) + 1)]).squeeze(1))
    contexts = widened(norm(found[len(layers)].to(norm.weight.dtype))[0])
    kinds = tuple(f"layer {layer}" for layer in range(len(layers)))
    return WalkTrace(tuple(names), ids, positions, positions.diff(dim=0), kinds, contexts, None, model)
