"""One object around a model and its tokenizer that measures its walks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.language.embedding_walk import paths
from torchgraft.language.embedding_walk.association import most_tokens, token_ids, token_rows
from torchgraft.language.embedding_walk.nulls import Statistic, generator
from torchgraft.language.embedding_walk.trace import WalkTrace, head_bias, output_head, parts, traced, widened
from torchgraft.surgery import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("dot", "cosine", "euclid")


def closeness(context: Float[Tensor, "T D"], rows: Float[Tensor, "V D"]) -> dict[str, Float[Tensor, "T V"]]:
    """How near context vectors are to token vectors: inner product, cosine, and minus the Euclidean distance."""
    return {
        "dot": context @ rows.T,
        "cosine": F.normalize(context, dim=-1) @ F.normalize(rows, dim=-1).T,
        "euclid": -torch.cdist(context, rows),
    }


@dataclass(frozen=True)
class NextTokenMap:
    """The most probable next tokens at each place of a text, and where they and the context vectors lie.

    Attributes:
        tokens: of the text.
        next_tokens: (T, k) names.
        ids, probabilities: (T, k), most probable first.
        context_points, token_points: (T, 2), (T, k, 2), on the first two principal components of the directions of
            all of them.
    """

    tokens: tuple[str, ...]
    next_tokens: tuple[tuple[str, ...], ...]
    ids: Tensor
    probabilities: Tensor
    context_points: Tensor
    token_points: Tensor

    def plot(self, places: Sequence[int] | None = None) -> Figure:
        """Table of next tokens, shaded by probability, and the map of directions.

        Args:
            places: which; the last eight where None.
        """
        from matplotlib.figure import Figure

        count, k = self.ids.shape
        shown = list(range(max(0, count - 8), count)) if places is None else list(places)
        if not shown or not all(0 <= place < count for place in shown):
            raise ValueError(f"places must be some of 0..{count - 1}, got {shown}")
        figure = Figure(figsize=(13, 0.5 * len(shown) + 2), layout="constrained")
        table, plane = figure.subplots(1, 2, width_ratios=(3, 2))
        draw_table(table, self, shown)
        for place in shown:
            x, y = self.context_points[place].tolist()
            for best in range(min(3, k)):
                u, v = self.token_points[place, best].tolist()
                share = float(self.probabilities[place, best])
                plane.plot([x, u], [y, v], color="#0072B2", alpha=max(0.1, share), linewidth=2)
                plane.annotate(repr(self.next_tokens[place][best])[1:-1], (u, v), fontsize=7, parse_math=False)
            plane.plot(x, y, "o", color="#D55E00", markersize=4)
            plane.annotate(str(place), (x, y), fontsize=8, color="#D55E00")
        plane.set(xlabel="first component", ylabel="second component")
        plane.set_title("orange: contexts by place, lines to the three likeliest tokens", fontsize=9)
        return figure


def draw_table(axes: Any, found: NextTokenMap, places: Sequence[int], columns: int = 5) -> None:
    """Next tokens as a heat map with names in it."""
    shown = found.probabilities[list(places), :columns].float()
    axes.imshow(shown.cpu().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, place in enumerate(places):
        for column in range(shown.shape[1]):
            share = float(shown[row, column])
            name = repr(found.next_tokens[place][column])[1:-1]
            colour = "white" if share > 0.6 else "black"
            label = f"{name}  {share:.2f}"
            axes.text(column, row, label, ha="center", va="center", fontsize=7, color=colour, parse_math=False)
    axes.set_yticks(range(len(places)), [f"{place}: {found.tokens[place]!r}" for place in places], parse_math=False)
    axes.set_xticks(range(shown.shape[1]), [f"next {column + 1}" for column in range(shown.shape[1])])
    axes.set_title("next tokens and their probability", fontsize=9)


class EmbeddingWalk:
    """Measure a language model as a walker in its embedding space (Singh, arXiv 2308.10874).

    Nothing is learnt and nothing stays changed: weights, hooks, attention implementation and training modes are after
    every call what they were before, also after an exception. Numbers below float32 are widened to it after the model.

    Args:
        model: a transformers language model of a family that ``torchgraft.language`` knows (GPT-2, GPT-NeoX, Llama,
            Mistral, Qwen, Gemma, Phi, OPT), or a Mamba. Encoders (BERT, RoBERTa) can ``walk`` only.
        tokenizer: called with a text, gives ``input_ids``; ``decode`` names tokens where it has one.

    Raises:
        TypeError: for a model of another kind.

    Example:
        >>> from torchgraft.language.set_based_prompting import toy_model
        >>> walker = EmbeddingWalk(*toy_model())
        >>> trace = walker.walk("to be")
        >>> trace.positions.shape, trace.steps.shape
        (torch.Size([3, 5, 32]), torch.Size([4, 5, 32]))
        >>> bool(torch.allclose(trace.positions[0] + trace.steps.sum(0), trace.positions[-1], atol=1e-4))
        True
        >>> tree = walker.reachable("to be", depth=2, eps=0.01)
        >>> round(float(tree.probabilities.sum()) + tree.remainder, 6)
        1.0
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        parts(model)
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be callable, got {type(tokenizer).__name__}")
        self.model, self.tokenizer = model, tokenizer

    def ids(self, text: str | Sequence[int] | Tensor) -> Int[Tensor, " T"]:
        """Token ids of a text, or as given.

        Raises:
            TypeError: for what is neither text nor whole numbers.
            ValueError: for no tokens, ids outside the vocabulary, or more tokens than the model has positions.
        """
        return token_ids(self.model, self.tokenizer, text)

    def _names(self, ids: Tensor) -> tuple[str, ...]:
        decode = getattr(self.tokenizer, "decode", None)
        return tuple(str(decode([i])) if decode else str(i) for i in ids.tolist())

    def _start(self, start: int | None) -> Tensor:
        found = getattr(self.tokenizer, "bos_token_id", None) if start is None else start
        if found is None:
            return self.ids([0])[:0]
        return self.ids([found])

    def _causal(self, text: str | Sequence[int] | Tensor) -> Tensor:
        output_head(self.model)
        return self.ids(text)

    def walk(self, text: str | Sequence[int] | Tensor) -> WalkTrace:
        """The walk of every token of a text through the layers."""
        ids = self.ids(text)
        return traced(self.model, ids, self._names(ids))

    def _fits(self, prompt: Tensor, more: int) -> None:
        most = most_tokens(self.model)
        if most is not None and len(prompt) + more - 1 > most:
            raise ValueError(f"text and {more} more tokens must fit in {most} positions, got {len(prompt)} + {more}")

    def path(self, text: str | Sequence[int] | Tensor, k: int = 10) -> paths.Path:
        """Surprisals, entropies, and the mass of the ``k`` nearest tokens, all where there are fewer, along a text."""
        paths.checked_counts(k=k)
        return paths.path(self.model, self._causal(text), k)

    def path_logprob(self, text: str | Sequence[int] | Tensor, given: int = 1) -> float:
        """Natural logarithm of the probability of a text, its first ``given`` tokens taken as given.

        Raises:
            TypeError: for encoders, whose next token is not defined.
            ValueError: unless ``given`` is in 1 .. T.
        """
        ids = self._causal(text)
        paths.checked_counts(given=given)
        if given > len(ids):
            raise ValueError(f"given must be in 1..{len(ids)}, got {given}")
        return float(paths.path(self.model, ids).logprobs[given - 1 :].double().sum())

    def sample_paths(
        self, prompt: str | Sequence[int] | Tensor, n: int = 64, length: int = 32, temperature: float = 1.0,
        top_p: float | None = None, top_k: int | None = None, seed: int = 0,
    ) -> paths.SampledPaths:  # fmt: skip
        """Random walks from a prompt, with the context vectors that they go through; the end token ends nothing.

        Raises:
            TypeError: for encoders.
            ValueError: for counts below 1, temperatures or cut-offs that cannot be, or more tokens than positions.
        """
        paths.checked_draws(n, length, temperature, top_k, top_p)
        ids = self._causal(prompt)
        self._fits(ids, length)
        return paths.sample(self.model, ids, n, length, temperature, top_k, top_p, seed)

    def reachable(
        self, prompt: str | Sequence[int] | Tensor, depth: int, eps: float = 1e-4, batch: int = 64,
        use_cache: bool = True,
    ) -> paths.ReachableTree:  # fmt: skip
        """Every continuation of ``depth`` tokens that is more probable than ``eps``, with its exact probability.

        There are at most 1 / eps at every depth.

        Raises:
            TypeError: for encoders.
            ValueError: for counts below 1, an ``eps`` outside 0..1, or more tokens than positions.
        """
        paths.checked_counts(depth=depth, batch=batch)
        if not 0 < eps < 1:
            raise ValueError(f"eps must be within 0..1, got {eps}")
        ids = self._causal(prompt)
        self._fits(ids, depth)
        return paths.reachable(self.model, ids, depth, eps, batch, use_cache)

    @torch.no_grad()
    def proximity(
        self, text: str | Sequence[int] | Tensor, draws: int = 9, seed: int = 0, skip_first: bool = True
    ) -> dict[str, Statistic]:
        """Rank correlation of closeness and log-probability over the vocabulary, mean over places (section 5).

        For the inner product it is 1 where the head has no bias. Null: token vectors that belong to other tokens.
        """
        ids = self._causal(text)
        first = int(skip_first)
        if draws < 1 or len(ids) <= first:
            raise ValueError(f"draws must be at least 1 and the text longer than {first}, got {draws}, {len(ids)}")
        trace = self.walk(ids)
        rows = widened(output_head(self.model).weight).to(trace.contexts.dtype)
        logits = trace.contexts[first:] @ rows.T + head_bias(self.model)
        draw, found = generator(seed), {}
        for name, near in closeness(trace.contexts[first:], rows).items():
            ranks = [torch.stack([_ranks(row) for row in x.cpu()]) for x in (near, logits)]
            orders = [torch.randperm(len(rows), generator=draw) for _ in range(draws)]
            drawn = torch.stack([_correlations(ranks[0][:, order], ranks[1]) for order in orders])
            found[name] = _statistic(_correlations(*ranks), drawn, "token vectors of other tokens")
        return found

    def narrowing(
        self, prompts: Sequence[str | Sequence[int] | Tensor], lengths: Sequence[int] | None = None,
        start: int | None = None,
    ) -> Float[Tensor, "N lengths"]:  # fmt: skip
        """Entropy, in nats, of the next token after each prompt; how contexts narrow the walk.

        Args:
            prompts: at least one.
            lengths: run on so many last tokens of each prompt, a column each; on the whole where None (one column).
            start: a token put before those: many models' attention rests on whatever comes first, which then says
                little itself. The tokenizer's start token where None, nothing where it has none.

        Raises:
            ValueError: for no prompts, or a length that a prompt does not have.
        """
        output_head(self.model)
        rows = token_rows(self.model, self.tokenizer, prompts, "prompts")
        shortest = min(map(len, rows))
        if lengths is not None and (not lengths or not all(1 <= n <= shortest for n in lengths)):
            raise ValueError(f"lengths must be in 1..{shortest}, the shortest prompt, got {list(lengths)}")
        columns = [None] if lengths is None else list(lengths)
        first = rows[0][:0] if lengths is None else self._start(start)
        return torch.stack(
            [
                paths.entropies(self.model, [ids if n is None else torch.cat([first, ids[-n:]]) for ids in rows])
                for n in columns
            ],
            1,
        )

    @torch.no_grad()
    def next_tokens(self, text: str | Sequence[int] | Tensor, k: int = 5) -> NextTokenMap:
        """The ``k`` most probable next tokens at each place, and a plane in which they lie.

        Raises:
            TypeError: for encoders.
            ValueError: unless ``k`` is in 1 .. vocabulary.
        """
        ids = self._causal(text)
        paths.checked_counts(k=k)
        trace = self.walk(ids)
        rows = widened(output_head(self.model).weight).to(trace.contexts.dtype)
        if k > len(rows):
            raise ValueError(f"k must be in 1..{len(rows)}, got {k}")
        with evaluating(self.model):
            logits = widened(self.model(input_ids=ids[None], use_cache=False).logits[0]).to(rows.dtype)
        best = logits.softmax(-1).topk(k)
        points = F.normalize(torch.cat([trace.contexts, rows[best.indices].flatten(0, 1)]), dim=-1)
        points = points - points.mean(0)
        flat = points @ torch.linalg.svd(points, full_matrices=False)[2][:2].T
        names = self._names(best.indices.flatten())
        table = tuple(names[at : at + k] for at in range(0, len(names), k))
        count = len(ids)
        token_points = flat[count:].unflatten(0, (count, k))
        return NextTokenMap(trace.tokens, table, best.indices, best.values, flat[:count], token_points)

    @torch.no_grad()
    def bigrams(
        self, texts: Sequence[str | Sequence[int] | Tensor], contexts: int = 20, least: int = 5, draws: int = 99,
        seed: int = 0, null: Literal["contexts", "counts"] = "contexts", start: int | None = None,
    ) -> dict[str, Statistic]:  # fmt: skip
        """Does closeness tell what a corpus does? (section 5).

        ``conditional``: for each of the most frequent tokens, the rank correlation of how often each frequent token
        follows it in the texts, which may be never, and of the log-probability after it alone, mean over tokens.
        ``pmi``: of pointwise mutual information of these pairs of neighbours and their token vectors' inner product,
        and ``pmi, context``: of the first one's context vector with the second's token vector.

        Args:
            texts: to count in.
            contexts: how many of the most frequent tokens; at least two.
            least: a token is frequent that comes second so often; counts of rarer ones say little.
            draws, seed: of the null model.
            null: ``contexts`` holds counts after one token against closeness after another, so that what frequency
                alone explains stays; ``counts`` shuffles the counts among the second tokens.
            start: a token put before the first one, as in ``narrowing``.

        Raises:
            TypeError: for encoders.
            ValueError: for counts below 1, another null model, or texts in which too little repeats.
        """
        paths.checked_counts(contexts=contexts, least=least, draws=draws)
        if null not in ("contexts", "counts"):
            raise ValueError(f"null must be 'contexts' or 'counts', got {null!r}")
        unembedding, bias = widened(output_head(self.model).weight), head_bias(self.model)
        rows = token_rows(self.model, self.tokenizer, texts, "texts")
        before, after = torch.cat([torch.stack([row[:-1], row[1:]]) for row in rows], 1)
        size = len(unembedding)
        often = torch.bincount(after, minlength=size)
        seconds = (often >= least).nonzero()[:, 0]
        counts: list[Tensor] = []
        firsts: list[int] = []
        for token in torch.bincount(before, minlength=size).argsort(descending=True, stable=True).tolist():
            found = torch.bincount(after[before == token], minlength=size)[seconds]
            if len(found) < 3 or len(found.unique()) < 2:
                break
            counts.append(found.double())
            firsts.append(token)
            if len(firsts) == contexts:
                break
        if len(firsts) < 2:
            raise ValueError(f"texts must hold two tokens, and three that come second {least} times, got fewer")
        alone = [torch.cat([self._start(start), after.new_tensor([token])]) for token in firsts]
        context = torch.stack([self.walk(ids).contexts[-1] for ids in alone]).to(unembedding.dtype)
        goals = unembedding[seconds]
        logits = context @ goals.T
        near = unembedding[torch.tensor(firsts, device=unembedding.device)] @ goals.T
        follows = torch.stack(counts)
        # of what never follows it is minus infinity, the last rank
        pmi = (follows / often[seconds]).log()
        draw = generator(seed)

        def measured(x: Tensor, y: Tensor) -> Statistic:
            x, y = (torch.stack([_ranks(row) for row in v.cpu()]) for v in (x, y))
            drawn = []
            for _ in range(draws):
                if null == "counts":
                    other = torch.stack([row[torch.randperm(x.shape[1], generator=draw)] for row in x])
                else:
                    # a token never meets itself
                    order = torch.randperm(len(x), generator=draw)
                    other = torch.empty_like(x)
                    other[order] = x[order.roll(1)]
                drawn.append(_correlations(other, y))
            return _statistic(_correlations(x, y), torch.stack(drawn), f"{null} of other tokens")

        return {
            "conditional": measured(follows, logits + bias.expand(size)[seconds]),
            "pmi": measured(pmi, near),
            "pmi, context": measured(pmi, logits),
        }


def _ranks(x: Tensor) -> Tensor:
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(x.double().numpy()))


def _correlations(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each row of ranks."""
    x, y = (v - v.mean(1, keepdim=True) for v in (x, y))
    return F.cosine_similarity(x, y, dim=1)


def _statistic(each: Tensor, drawn: Tensor, what: str) -> Statistic:
    null = tuple(drawn.mean(1).tolist())
    return Statistic(each.mean().item(), null, what, True, tuple(each.tolist()), tuple(drawn.mean(0).tolist()))
