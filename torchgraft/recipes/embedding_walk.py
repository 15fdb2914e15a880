"""Evidence for the embedding walk: what association is worth, what closeness says, how straight a walk is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, FitResult, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.language._access import residual_stream, resumed
from torchgraft.language.embedding_walk import (
    ConceptSpace,
    EmbeddingWalk,
    NextTokenMap,
    ablate_association,
    distance_profile,
    neighbour_purity,
    place_pattern,
)
from torchgraft.language.embedding_walk.nulls import gaussian_like, generator, shuffled_dimensions
from torchgraft.language.embedding_walk.trace import output_head
from torchgraft.language.embedding_walk.walker import draw_table
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("wikitext2", "shakespeare")
UNIFORM, DISTANCE, PLACE, NOTHING = "uniform mean", "by distance", "by place", "nothing"
MODES = {UNIFORM: "uniform", DISTANCE: "position", PLACE: "fixed", NOTHING: "zero"}
TRAINED = {"trained: attention": "none", "trained: learned distances": "position", "trained: uniform mean": "uniform"}
REAL, MIXED, RANDOM = "walk: text", "walk: shuffled tokens", "walk: random directions"
DOT, COSINE, EUCLID, OTHERS = "closeness: dot", "closeness: cosine", "closeness: Euclid", "closeness: other tokens' dot"
COUNTS, CHANCE = "bigrams: counts", "bigrams: shuffled counts"
SHORT, LONG = "context: 1 token", "context: longest"
NONE, RIGHT, WRONG = "demonstrations: none", "demonstrations: right", "demonstrations: wrong labels"
VECTORS, GAUSSIAN, SHUFFLED = "vectors: tokens", "vectors: Gaussian", "vectors: shuffled dimensions"
LABELS, NO_LABELS = "categories: word lists", "categories: shuffled"

CLAIMS = (
    Claim(
        "The steps of the walk sum to its end (largest relative error)", "identity error", REAL, 1e-4, 0.0,
        direction="lower", paper="exact, by construction",
    ),
    Claim(
        "One layer's association is redundant: by distance alone it adds at most 0.05 nats (mean over layers)",
        "added, one layer", DISTANCE, 0.05, 0.0, direction="lower", unit="nats", paper="potentially redundant",
    ),
    Claim(
        "One layer's association is redundant: by place alone it adds at most 0.05 nats (mean over layers)",
        "added, one layer", PLACE, 0.05, 0.0, direction="lower", unit="nats", paper="potentially redundant",
    ),
    Claim(
        "Weights by distance cost less than a uniform mean in one layer", "added, one layer", DISTANCE, UNIFORM, 0.02,
        direction="lower", unit="nats", paper="not compared",
    ),
    Claim(
        "All association at once is redundant: by place alone adds at most 0.5 nats", "added, all layers", PLACE, 0.5,
        0.0, direction="lower", unit="nats", paper="potentially redundant",
    ),
    Claim(
        "Late layers bear the loss of association better than early ones (by place; early less late)",
        "early less late", PLACE, 0.0, 0.02, unit="nats", paper="not compared",
    ),
    Claim(
        "Trained from scratch, learned distances do as well as attention", "validation loss",
        "trained: learned distances", "trained: attention", 0.05, direction="equal", unit="nats",
        paper="potentially redundant",
    ),
    Claim(
        "Closeness by dot product is probability (rank correlation)", "rank correlation", DOT, 0.999, 0.0,
        paper="proximity reflects conditional probability",
    ),
    Claim(
        "closeness to vectors of other tokens is not", "rank correlation", DOT, OTHERS, 0.5, paper="not compared",
    ),
    Claim("and cosine follows it less closely", "rank correlation", DOT, COSINE, 0.01, paper="not compared"),
    Claim("as does Euclidean distance", "rank correlation", DOT, EUCLID, 0.01, paper="not compared"),
    Claim(
        "Closeness after one token orders the tokens that follow it in a corpus", "rank correlation", COUNTS, CHANCE,
        0.1, paper="proximity reflects conditional probability",
    ),
    Claim(
        "Walks are straighter than random ones of the same step lengths", "straightness", REAL, RANDOM, 0.02,
        paper="not compared",
    ),
    Claim(
        "Walks of text are straighter than those of its shuffled tokens", "straightness", REAL, MIXED, 0.01,
        paper="not compared",
    ),
    Claim(
        "Shuffled tokens leave the next one less certain", "entropy", MIXED, REAL, 0.2, unit="nats",
        paper="training shapes the probability of paths",
    ),
    Claim(
        "A longer context narrows the walk", "entropy", LONG, SHORT, 0.5, direction="lower", unit="nats",
        paper="contexts select among paths",
    ),
    Claim(
        "Demonstrations narrow the walk", "entropy", RIGHT, NONE, 0.5, direction="lower", unit="nats",
        paper="contexts select among paths",
    ),
    Claim(
        "with wrong labels as much as with right ones", "entropy", WRONG, RIGHT, 0.2, direction="equal", unit="nats",
        paper="no learning in context",
    ),
    Claim(
        "Token vectors are sparser in concepts than Gaussian ones of the same covariance (R2)", "R2", VECTORS,
        GAUSSIAN, 0.01, paper="some evidence",
    ),
    Claim("and than vectors of shuffled dimensions (R2)", "R2", VECTORS, SHUFFLED, 0.01, paper="some evidence"),
    Claim(
        "Nearest neighbours are of one category", "purity", LABELS, NO_LABELS, 0.2, paper="some evidence",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; each has texts, tokens and random numbers of its own.
        data: of plain text for the model; ``built-in`` (our questions) where there is none.
        letters: of plain text for what is trained from scratch.
        device: where to run.
        model: see ``language_model``.
        texts, tokens: to measure loss on, and their length.
        profiled: texts from which average patterns are taken, others than those measured.
        walks, closeness_tokens: texts for walks, and tokens of the one text for closeness.
        lengths: of contexts.
        lines: of the corpus to count bigrams in.
        vectors, concepts, sparsity, iterations: of the dictionary.
        width, steps, batch_size, context, learning_rates: of the networks trained from scratch.
    """

    seeds: int = 3
    data: str = "wikitext2"
    letters: str = "shakespeare"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    texts: int = 4
    tokens: int = 48
    profiled: int = 6
    walks: int = 4
    closeness_tokens: int = 12
    lengths: tuple[int, ...] = (1, 4, 8, 32)
    lines: int = 400
    vectors: int = 900
    concepts: int = 384
    sparsity: int = 8
    iterations: int = 4
    width: int = 64
    steps: int = 150
    batch_size: int = 8
    context: int = 48
    learning_rates: tuple[float, ...] = (2e-3, 6e-3, 2e-2, 6e-2)


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", letters="built-in", model="toy", texts=2, tokens=8, profiled=2, walks=2,
        closeness_tokens=5, lengths=(1, 4), lines=20, vectors=60, concepts=16, sparsity=2, iterations=2, width=16,
        steps=3, batch_size=2, context=8, learning_rates=(1e-2,),
    ),
    "laptop": Config(),
}  # fmt: skip

SENTENCE = "The capital of France is Paris, and the capital of Italy is Rome"
WORDS = {
    "month": "January February March April June July August September October November December",
    "number": "one two three four five six seven eight nine ten twenty thirty",
    "colour": "red blue green yellow black white brown orange purple pink grey",
    "country": "France Germany Italy Spain China Japan India Russia Canada Brazil Mexico",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "name": "John Mary James David Sarah Michael Robert Thomas Peter Paul",
}
REVIEWS = (
    ("A warm and funny film", "positive"), ("Dull from start to end", "negative"), ("I loved every minute", "positive"),
    ("A waste of money", "negative"), ("The best book this year", "positive"), ("The food was cold", "negative"),
    ("Friendly staff and great rooms", "positive"), ("It broke after a week", "negative"),
    ("The music is beautiful", "positive"), ("The plot makes no sense", "negative"),
    ("A joy to use", "positive"), ("I want my evening back", "negative"),
)  # fmt: skip
QUERIES = ("The acting was good", "A terrible noise all night", "Simple, quick and cheap", "Nobody answered my call")


def _plain(name: str) -> tuple[str, str]:
    """Text to learn from, and text to measure on."""
    if name == "built-in":
        questions = datasets.load("questions")
        assert isinstance(questions, datasets.MultipleChoice)
        text = "\n".join(q.question + " " + ", ".join(q.options) for q in questions.items)
        return text, text
    text = datasets.load(name)
    if not isinstance(text, datasets.Text):
        raise ValueError(f"data must be text, got {name!r}; use 'wikitext2', 'shakespeare' or 'built-in'")
    return text.train, text.test


def _lines(config: Config, walker: EmbeddingWalk, seed: int, count: int, tokens: int, salt: int) -> list[Tensor]:
    """Beginnings of lines, of so many tokens each; another salt gives others."""
    least = tokens if config.model == "toy" else 6 * tokens
    lines = [line.strip() for line in _plain(config.data)[1].splitlines()]
    lines = [line for line in lines if len(line) >= least][salt::3]
    found = []
    for index in np.random.default_rng(seed).permutation(len(lines)):
        ids = walker.ids(lines[index][: 12 * tokens])
        if len(ids) >= tokens:
            found.append(ids[:tokens])
        if len(found) == count:
            return found
    raise ValueError(f"{config.data} has {len(found)} texts of {tokens} tokens, not {count}")


def _walker(config: Config) -> EmbeddingWalk:
    return EmbeddingWalk(*language_model(config.model, "float32", config.device))


@torch.no_grad()
def _ablated(config: Config, name: str, seed: int, progress: Progress) -> Measurement:
    walker = _walker(config)
    model: Any = walker.model
    ids = torch.stack(_lines(config, walker, seed, config.texts, config.tokens, 0))
    others = _lines(config, walker, seed, config.profiled, config.tokens, 1)
    decoded = [walker.tokenizer.decode(row) for row in others]
    mode: Any = MODES[name]
    make = {"position": distance_profile, "fixed": place_pattern}.get(mode)
    pattern = None
    if make is not None:
        found = make(model, walker.tokenizer, decoded)
        # decoding and encoding again may join a token
        longest = config.tokens - found.shape[-1]
        if longest > 0:
            ids = ids[:, : found.shape[-1]]
        pattern = found

    def loss() -> float:
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)

    layers = model.config.num_hidden_layers
    stream = residual_stream(model, input_ids=ids, use_cache=False)
    base, one = loss(), []
    for layer in range(layers):
        with resumed(model, layer, stream[layer]), ablate_association(model, mode, [layer], pattern):
            one.append(loss() - base)
        progress(layer + 1, 2 * layers, name)
    depths = sorted({max(1, round(share * layers)) for share in (0.1, 0.25, 0.5, 1)})
    cumulative: dict[str, list[float]] = {"bottom": [], "top": []}
    for depth in depths:
        for side, chosen in (("bottom", range(depth)), ("top", range(layers - depth, layers))):
            if depth == layers and side == "top":
                cumulative[side].append(cumulative["bottom"][-1])
                continue
            with ablate_association(model, mode, chosen, pattern):
                cumulative[side].append(loss() - base)
    third = max(1, layers // 3)
    early, late = float(np.mean(one[:third])), float(np.mean(one[-third:]))
    metrics = {
        "added, one layer": float(np.mean(one)), "added, one layer, median": float(np.median(one)),
        "added, early third": early, "added, late third": late, "early less late": early - late,
        "added, all layers": cumulative["bottom"][-1], "loss before": base,
    }  # fmt: skip
    curves = {"one": (list(range(layers)), one)} | {side: (depths, found) for side, found in cumulative.items()}
    return Measurement(metrics, curves={k: ([float(v) for v in x], y) for k, (x, y) in curves.items()})


class _Letters(nn.Module):
    """A small Llama whose attention may be replaced by weights of the distance that are learnt."""

    def __init__(self, config: Config, vocabulary: int, mode: str, seed: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        torch.manual_seed(seed)
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=vocabulary,
                max_position_embeddings=config.context,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.mode: Any = mode
        if mode == "position":
            # heads begin by looking at different distances
            distance = torch.arange(config.context).float()
            slopes = torch.tensor([0.02, 0.1, 0.5, 2.0])
            self.scores = nn.Parameter((-slopes[:, None] * distance).expand(2, 4, -1).clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Mean loss."""
        pattern = (self.scores - self.scores.amax(-1, keepdim=True)).exp() if self.mode == "position" else None
        with ablate_association(self.model, self.mode, None, pattern):
            found: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return found


def _from_scratch(config: Config, name: str, seed: int, progress: Progress) -> Measurement:
    train, test = _plain(config.letters)
    letters = sorted(set(train + test))
    code = {letter: index for index, letter in enumerate(letters)}

    def pieces(text: str, most: int) -> Tensor:
        ids = torch.tensor([code[letter] for letter in text])
        whole = ids[: len(ids) // config.context * config.context].view(-1, config.context)
        step = max(1, len(whole) // most)
        return whole[::step][:most]

    data = pieces(train, config.steps * config.batch_size)
    chosen_on, judged_on = pieces(test[: len(test) // 2], 100), pieces(test[len(test) // 2 :], 100)

    def trained(rate: float, at: int, on: Tensor) -> tuple[float, FitResult]:
        model = _Letters(config, len(letters), TRAINED[name], at)
        done = fit(
            model, (data,), lambda m, batch: m(batch[0]), steps=config.steps, batch_size=config.batch_size,
            optimizer=lambda p: torch.optim.AdamW(p, lr=rate), schedule="one_cycle", clip=1.0, seed=at,
            device=config.device, progress=progress,
        )  # fmt: skip
        with torch.no_grad():
            return float(model.eval()(on)), done

    picked = progress.once(
        f"lr {name}", lambda: pick_learning_rate(config.learning_rates, lambda lr: -trained(lr, 1000, chosen_on)[0])
    )
    loss, done = trained(picked["chosen"], seed, judged_on)
    return Measurement({"validation loss": loss, "seconds of training": done.seconds})


def _walked(config: Config, seed: int) -> dict[str, Measurement]:
    walker = _walker(config)
    texts = _lines(config, walker, seed, config.walks, config.tokens, 0)
    draw = generator(seed)
    mixed = [ids[torch.randperm(len(ids), generator=draw)] for ids in texts]
    found: dict[str, Measurement] = {}
    null: list[float] = []
    for name, walked in ((REAL, texts), (MIXED, mixed)):
        rows: dict[str, list[float]] = {}
        ranks, lengths = [], []
        for ids in walked:
            trace = walker.walk(ids)
            told = trace.statistics(draws=5, seed=seed)
            end, start = trace.positions[-1], trace.positions[0]
            error = ((start + trace.steps.sum(0) - end).norm(dim=-1) / end.norm(dim=-1)).max()
            values = {
                "straightness": told["straightness"].value,
                "successive cosine": told["successive cosine"].value,
                "path length": float(trace.lengths()[:, 1:].sum(0).mean()),
                "entropy": float(walker.path(ids).entropies[1:].mean()),
                "share of attention": trace.shares()["attention"],
                "straightness with the first token": float(trace.straightness().mean()),
            }
            rows.setdefault("error", []).append(float(error))
            for key, value in values.items():
                rows.setdefault(key, []).append(value)
            if name == REAL:
                null.append(told["straightness"].null_mean)
            ranks.append(trace.lens_ranks()[:, 1:].float().log10().mean(1))
            lengths.append(trace.lengths()[:, 1:].mean(1))
        metrics = {key: float(np.mean(value)) for key, value in rows.items() if key != "error"}
        metrics["identity error"] = max(rows["error"])
        lens, step = torch.stack(ranks).mean(0).tolist(), torch.stack(lengths).mean(0).tolist()
        curves = {
            "log10 rank": ([float(i) for i in range(len(lens))], lens),
            "step length": ([float(i) for i in range(len(step))], step),
        }
        found[name] = Measurement(metrics, curves=curves)
    found[RANDOM] = Measurement({"straightness": float(np.mean(null))})
    shown = walker.ids(SENTENCE)
    best, trace = walker.next_tokens(shown, 5), walker.walk(shown)
    places = list(range(max(1, len(shown) - 6), len(shown)))
    points = trace.positions[:, places].double()
    flat = points.flatten(0, 1)
    basis = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:2]
    found[REAL].extra = {
        "tokens": list(best.tokens), "next": [list(row) for row in best.next_tokens],
        "probabilities": best.probabilities.tolist(), "places": places,
        "walk": ((points - flat.mean(0)) @ basis.T).tolist(),
        "taken": trace.contributions().by_token.tolist(),
    }  # fmt: skip
    return found


def _close(config: Config, seed: int) -> dict[str, Measurement]:
    walker = _walker(config)
    (ids,) = _lines(config, walker, seed, 1, config.closeness_tokens, 0)
    found = walker.proximity(ids, draws=5, seed=seed)
    arms = {DOT: found["dot"].value, COSINE: found["cosine"].value, EUCLID: found["euclid"].value}
    arms[OTHERS] = found["dot"].null_mean
    counted = walker.bigrams(_corpus(config, walker, seed), draws=19, seed=seed)
    arms[COUNTS], arms[CHANCE] = counted["conditional"].value, counted["conditional"].null_mean
    result = {name: Measurement({"rank correlation": value}) for name, value in arms.items()}
    for name in ("pmi", "pmi, context"):
        result[COUNTS].metrics[name], result[CHANCE].metrics[name] = counted[name].value, counted[name].null_mean
    return result


def _corpus(config: Config, walker: EmbeddingWalk, seed: int) -> list[Tensor]:
    lines = [line.strip() for line in _plain(config.data)[1].splitlines() if len(line) > 20]
    order = np.random.default_rng(seed).permutation(len(lines))[: config.lines]
    most = 32 if config.model == "toy" else 256
    return [walker.ids(lines[k][: 4 * most])[:most] for k in order]


def _narrowed(config: Config, seed: int) -> dict[str, Measurement]:
    walker = _walker(config)
    texts = _lines(config, walker, seed, 4 * config.walks, max(config.lengths), 0)
    entropy = walker.narrowing(texts, config.lengths).mean(0).tolist()
    curve = {"entropy": ([float(n) for n in config.lengths], entropy)}
    found = {
        SHORT: Measurement({"entropy": entropy[0]}),
        LONG: Measurement({"entropy": entropy[-1]}, curves=curve),
    }
    order = np.random.default_rng(seed).permutation(len(REVIEWS))
    other = {"positive": "negative", "negative": "positive"}
    few = 8 if config.model != "toy" else 2

    def prompts(count: int, wrong: bool) -> list[str]:
        shown = [REVIEWS[k] for k in order[:count]]
        head = "".join(f"Review: {t}\nSentiment: {other[label] if wrong else label}\n\n" for t, label in shown)
        return [f"{head}Review: {query}\nSentiment:" for query in QUERIES]

    for name, count, wrong in ((NONE, 0, False), (RIGHT, few, False), (WRONG, few, True)):
        found[name] = Measurement({"entropy": float(walker.narrowing(prompts(count, wrong)).mean())})
    return found


def _concepts(config: Config, seed: int) -> dict[str, Measurement]:
    walker = _walker(config)
    rows = output_head(walker.model).weight.detach().double().cpu()
    counts = Counter(i for ids in _corpus(config, walker, 0) for i in ids.tolist())
    frequent = [token for token, _ in counts.most_common(3 * config.vectors)]
    frequent += [i for i in range(len(rows)) if i not in counts][: max(0, config.vectors - len(frequent))]
    chosen = np.random.default_rng(seed).permutation(frequent)[: config.vectors]
    x, draw = rows[torch.from_numpy(chosen)], generator(seed)
    sets = {VECTORS: x, GAUSSIAN: gaussian_like(x, draw), SHUFFLED: shuffled_dimensions(x, draw)}
    found = {}
    for name, vectors in sets.items():
        space = ConceptSpace(config.concepts, "dictionary", config.sparsity, config.iterations, random_state=seed)
        found[name] = Measurement({"R2": space.fit(vectors.numpy()).score(vectors.numpy())})
    tokens, labels = [], []
    for label, words in WORDS.items():
        for word in words.split():
            ids = walker.ids(" " + word)
            if len(ids) == 1 or config.model == "toy":
                tokens.append(int(ids[-1]))
                labels.append(label)
    # a draw of four words in five, so that seeds differ
    kept = np.random.default_rng(seed).permutation(len(tokens))[: math.ceil(0.8 * len(tokens))]
    purity = neighbour_purity(rows[[tokens[k] for k in kept]], [labels[k] for k in kept], seed=seed)
    found[LABELS] = Measurement({"purity": purity.value, "words": len(kept)})
    found[NO_LABELS] = Measurement({"purity": purity.null_mean})
    return found


def arms(config: Config) -> Mapping[str, Arm]:
    """What is replaced, what is trained without association, and each statistic with its null model."""

    def ablated(name: str) -> Arm:
        return lambda seed, progress: _ablated(config, name, seed, progress)

    def trained(name: str) -> Arm:
        return lambda seed, progress: _from_scratch(config, name, seed, progress)

    return {
        **{name: ablated(name) for name in MODES},
        **{name: trained(name) for name in TRAINED},
        "walks": lambda seed, progress: _walked(config, seed),
        "closeness": lambda seed, progress: _close(config, seed),
        "narrowing": lambda seed, progress: _narrowed(config, seed),
        "concepts": lambda seed, progress: _concepts(config, seed),
    }


_COLOURS = {UNIFORM: "#E69F00", DISTANCE: "#0072B2", PLACE: "#009E73", NOTHING: "#999999"}


def _bars(axes: Any, result: Result, names: Sequence[str], metric: str, title: str) -> None:
    for y, name in enumerate(reversed(names)):
        values = result.values(name, metric)
        axes.barh(y, values.mean(), color="#0072B2" if y else "#999999", height=0.6)
        axes.plot(values, [y] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(names)), [name.split(": ", 1)[-1] for name in reversed(names)], fontsize=8)
    axes.set_title(title, fontsize=10)


def figures(result: Result) -> Mapping[str, Figure]:
    """What replacing costs by layer, what narrows, and one text's walk and next tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.2), layout="constrained")
    (one, some, scratch, near), (lens, narrow, straight, sparse) = figure.subplots(2, 4)
    for name, colour in _COLOURS.items():
        x, y = result.curve(name, "one")
        one.plot(x, y.mean(0), "o-", markersize=2.5, color=colour, label=name)
        one.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
        for side, style in (("bottom", "-"), ("top", "--")):
            x, y = result.curve(name, side)
            some.plot(x, y.mean(0), style, marker="o", markersize=2.5, color=colour)
    one.set(xlabel="layer replaced", ylabel="added loss, nats", yscale="symlog")
    one.set_yscale("symlog", linthresh=0.1)
    one.set_title("one layer's attention replaced", fontsize=10)
    one.legend(frameon=False, fontsize=8)
    some.set(xlabel="layers replaced")
    some.set_title("from the bottom (lines), from the top (dashed)", fontsize=10)
    _bars(scratch, result, list(TRAINED), "validation loss", "trained from scratch: loss, nats")
    _bars(near, result, [DOT, COSINE, EUCLID, OTHERS], "rank correlation", "closeness and log-probability")
    for name, colour in ((REAL, "#0072B2"), (MIXED, "#D55E00")):
        x, y = result.curve(name, "log10 rank")
        lens.plot(x, 10 ** y.mean(0), color=colour, label=name.split(": ")[1])
        lens.fill_between(x, 10 ** y.min(0), 10 ** y.max(0), color=colour, alpha=0.15, linewidth=0)
    lens.set(xlabel="layers walked", yscale="log")
    lens.set_title("rank of the final first choice", fontsize=10)
    lens.legend(frameon=False, fontsize=8)
    x, y = result.curve(LONG, "entropy")
    narrow.plot(x, y.mean(0), "o-", color="#0072B2")
    narrow.fill_between(x, y.min(0), y.max(0), color="#0072B2", alpha=0.15, linewidth=0)
    narrow.set(xlabel="tokens of context", xscale="log")
    narrow.set_title("entropy of the next token, nats", fontsize=10)
    _bars(straight, result, [REAL, MIXED, RANDOM], "straightness", "straightness of walks")
    _bars(sparse, result, [VECTORS, GAUSSIAN, SHUFFLED], "R2", "R2 of sparse dictionaries")
    figure.suptitle(f"{result.config.model}; bands and dots = seeds, grey = null model or least", fontsize=10)

    told = result.measurements[REAL][result.seeds[0]].extra
    walk = Figure(figsize=(14, 4.6), layout="constrained")
    plane, taken, table = walk.subplots(1, 3, width_ratios=(3, 3, 4))
    points = np.array(told["walk"])
    for column, place in enumerate(told["places"]):
        plane.plot(*points[:, column].T, "o-", markersize=2, linewidth=1, label=f"{place}: {told['tokens'][place]!r}")
        plane.plot(*points[0, column], "ko", markersize=4)
    plane.set(xlabel="first component", ylabel="second component")
    plane.set_title("walks through the layers (black: start)", fontsize=10)
    plane.legend(frameon=False, fontsize=7)
    parts = np.array(told["taken"])
    most = np.abs(parts).max()
    taken.imshow(parts, cmap="RdBu_r", vmin=-most, vmax=most)
    names = [repr(name)[1:-1] for name in told["tokens"]]
    taken.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    taken.set_yticks(range(len(names)), names, fontsize=7)
    taken.set_title(f"logit of the next token, taken from where (up to {most:.1f})", fontsize=10)
    shown = NextTokenMap(
        tuple(told["tokens"]), tuple(tuple(row) for row in told["next"]), torch.zeros(0),
        torch.tensor(told["probabilities"]), torch.zeros(0), torch.zeros(0),
    )  # fmt: skip
    draw_table(table, shown, range(max(0, len(names) - 10), len(names)))
    return {"embedding_walk": figure, "embedding_walk-text": walk}


def notes(result: Result) -> str:
    """Data, choices, and what the numbers cannot say."""
    c = result.config

    def mean(arm: str, metric: str) -> float:
        return float(result.values(arm, metric).mean())

    added = "; ".join(
        f"{name} {mean(name, 'added, one layer, median'):.3f} in the median layer, "
        f"{mean(name, 'added, all layers'):.1f} in all"
        for name in MODES
    )
    rates = ", ".join(f"{name.split(': ')[1]} {result.tuned[f'lr {name}']['chosen']:g}" for name in TRAINED)
    return (
        f"{c.model}, float32, nothing of it trained; each of {len(result.seeds)} seeds draws its own texts ({c.data}), "
        f"tokens and random numbers, and intervals are over seeds. Loss: {c.texts} texts of {c.tokens} tokens, "
        f"{mean(UNIFORM, 'loss before'):.2f} nats a token before; short texts, on which a uniform mean is mildest. "
        f"Patterns by distance and by place are means over {c.profiled} other texts. Added nats: {added}. Weights by "
        "distance cannot look at the first token as such, on which many heads rest; weights by place can. Early and "
        "late are the first and last third of the layers. Trained from scratch: a two-layer Llama of letters, width "
        f"{c.width}, {c.steps} steps of {c.batch_size} x {c.context} letters ({c.letters}), learning rates chosen from "
        f"{', '.join(f'{r:g}' for r in c.learning_rates)} on other validation text and another seed: {rates}; queries "
        "and keys stay in the replaced ones and do nothing. Walks: without the first token, whose vectors dwarf the "
        f"others (with it, straightness {mean(REAL, 'straightness with the first token'):.3f} instead of "
        f"{mean(REAL, 'straightness'):.3f}). Attention makes {100 * mean(REAL, 'share of attention'):.0f} % of the "
        f"path. Pointwise mutual information and token vectors' inner product: {mean(COUNTS, 'pmi'):.3f} (shuffled "
        f"{mean(CHANCE, 'pmi'):.3f}); with the context vector {mean(COUNTS, 'pmi, context'):.3f}; it is largest for "
        "rare followers, which a model of few words of context does not expect (our guess, not tested). Dictionary: "
        f"{c.vectors} frequent tokens, {c.concepts} concepts, {c.sparsity} for each token, R2 of the fit itself, each "
        "set fitted anew. Dot product 1 is arithmetic, not a finding: logits are dot products. That entropy falls with "
        "context says nothing about learning, and none of this measures intelligence. Demonstrations: "
        f"{len(QUERIES)} queries of ours, wrong labels are all labels turned round; without demonstrations the prompts "
        "are the same for all seeds, and word categories are draws of mostly the same words, so those intervals are "
        "too narrow. A context of one token is the first token, on which heads rest and whose vectors are of another "
        "kind; why shuffled tokens walk straighter is not known to us. The networks trained from scratch are far from "
        "trained."
    )
