"""Evidence for the embedding walk: what association is worth, what closeness says, how straight a walk is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, FitResult, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.language._access import residual_stream, resumed
from torchgraft.language.embedding_walk import (
    ConceptSpace,
    EmbeddingWalk,
    NextTokenMap,
    ablate_association,
    classify_ops,
    distance_profile,
    place_pattern,
    shares,
)
from torchgraft.language.embedding_walk.concepts import NULLS, nearest_other
from torchgraft.language.embedding_walk.nulls import generator
from torchgraft.language.embedding_walk.trace import output_head
from torchgraft.language.embedding_walk.walker import draw_table
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("wikitext2", "shakespeare", "sst2")
UNIFORM, DISTANCE, PLACE, NOTHING = "uniform mean", "by distance", "by place", "nothing"
MODES = {UNIFORM: "uniform", DISTANCE: "position", PLACE: "fixed", NOTHING: "zero"}
TRAINED = {"trained: attention": "none", "trained: learned distances": "position", "trained: uniform mean": "uniform"}
REAL, MIXED, RANDOM, OTHER_STEPS = (
    "walk: text", "walk: shuffled tokens", "walk: random directions", "walk: steps of other tokens"
)  # fmt: skip
DOT, COSINE, EUCLID, OTHERS = "closeness: dot", "closeness: cosine", "closeness: Euclid", "closeness: other tokens' dot"
COUNTS, OTHER_FIRST, LONE = "bigrams: after a start", "bigrams: another first token", "bigrams: the token alone"
SHORT, LONG, FOREIGN = "context: 1 token", "context: longest", "context: longest, mostly another text's"
NONE, RIGHT, WRONG, UNRELATED = (
    "demonstrations: none", "demonstrations: right", "demonstrations: wrong labels", "demonstrations: other text"
)  # fmt: skip
VECTORS = "vectors: tokens"
NULL_VECTORS = {
    "vectors: Gaussian": "gaussian", "vectors: Gaussian of these lengths": "lengths",
    "vectors: shuffled dimensions": "shuffled",
}  # fmt: skip
GAUSSIAN, LENGTHS, SHUFFLED = NULL_VECTORS
LABELS, NO_LABELS = "categories: word lists", "categories: by chance"
OPERATIONS = "operations"

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
        "Trained from scratch on letters, learned distances do at least as well as attention", "validation loss",
        "trained: learned distances", "trained: attention", 0.0, direction="lower", unit="nats",
        paper="potentially redundant",
    ),
    Claim(
        "and better than a uniform mean", "validation loss", "trained: learned distances", "trained: uniform mean",
        0.05, direction="lower", unit="nats", paper="not compared",
    ),
    Claim(
        "Attention alone brings tokens together, once in each layer (aggregating operations)", "aggregates", OPERATIONS,
        1.0, 0.0, direction="equal", paper="two kinds of operation suffice",
    ),
    Claim(
        "Closeness by dot product is probability (least rank correlation)", "least rank correlation", DOT, 0.999, 0.0,
        paper="proximity reflects conditional probability",
    ),
    Claim(
        "closeness to vectors of other tokens is not", "rank correlation", DOT, OTHERS, 0.5, paper="not compared",
    ),
    Claim("and cosine follows it less closely", "rank correlation", DOT, COSINE, 0.01, paper="not compared"),
    Claim("as does Euclidean distance", "rank correlation", DOT, EUCLID, 0.01, paper="not compared"),
    Claim(
        "Closeness after a token tells what follows it in a corpus better than closeness after another token does",
        "rank correlation", COUNTS, OTHER_FIRST, 0.1, paper="proximity reflects conditional probability",
    ),
    Claim(
        "and a start token before it is needed for that", "rank correlation", COUNTS, LONE, 0.1, paper="not compared",
    ),
    Claim(
        "Walks are straighter than random ones of the same step lengths", "straightness", REAL, RANDOM, 0.01,
        paper="not compared",
    ),
    Claim(
        "and than walks of the steps of other tokens of the text", "straightness", REAL, OTHER_STEPS, 0.01,
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
        "and more than one that is mostly of another text", "entropy", LONG, FOREIGN, 0.2, direction="lower",
        unit="nats", paper="contexts select among paths",
    ),
    Claim(
        "Demonstrations narrow the walk", "entropy", RIGHT, NONE, 0.5, direction="lower", unit="nats",
        paper="contexts select among paths",
    ),
    Claim(
        "more than other text of that length does", "entropy", RIGHT, UNRELATED, 0.5, direction="lower", unit="nats",
        paper="contexts select among paths",
    ),
    Claim(
        "and wrong labels as much as right ones", "entropy", WRONG, RIGHT, 0.2, direction="equal", unit="nats",
        paper="no learning in context",
    ),
    Claim(
        "Token vectors are sparser in concepts than Gaussian ones of the same covariance (R2 of vectors held out)",
        "R2", VECTORS, GAUSSIAN, 0.02, paper="some evidence",
    ),
    Claim("than such of the same lengths (R2)", "R2", VECTORS, LENGTHS, 0.02, paper="some evidence"),
    Claim("and than vectors of shuffled dimensions (R2)", "R2", VECTORS, SHUFFLED, 0.02, paper="some evidence"),
    Claim(
        "Nearest neighbours are of one category", "purity", LABELS, NO_LABELS, 0.2, paper="some evidence",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: of what is trained: networks, and dictionaries with draws of tokens. All else is measured once.
        data: of plain text for the model; ``built-in`` (our questions) where there is none.
        letters: of plain text for what is trained from scratch.
        reviews: of demonstrations, ``sst2``, or ``built-in`` for ours.
        device: where to run.
        model: see ``language_model``.
        texts, tokens: to measure loss and walks on, and their length.
        profiled: texts from which average patterns are taken, others than those measured.
        closeness_tokens: of each of these texts, for closeness.
        contexts, lengths: texts of the longest of these lengths, for what a context narrows.
        shots, queries: demonstrations before a review, and reviews.
        lines, firsts, least: of the corpus to count bigrams in, first tokens, and least count of a second one.
        vectors, concepts, sparsity, iterations: of the dictionary; a quarter of the vectors is held out.
        width, steps, batch_size, context, learning_rates: of the networks trained from scratch.
    """

    seeds: int = 3
    data: str = "wikitext2"
    letters: str = "shakespeare"
    reviews: str = "sst2"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    texts: int = 8
    tokens: int = 24
    profiled: int = 20
    closeness_tokens: int = 6
    contexts: int = 16
    lengths: tuple[int, ...] = (1, 4, 8, 32)
    shots: int = 3
    queries: int = 10
    lines: int = 1500
    firsts: int = 24
    least: int = 50
    vectors: int = 1600
    concepts: int = 640
    sparsity: int = 8
    iterations: int = 4
    width: int = 64
    steps: int = 250
    batch_size: int = 8
    context: int = 48
    learning_rates: tuple[float, ...] = (1.5e-3, 5e-3, 1.8e-2, 6e-2, 2e-1)


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", letters="built-in", reviews="built-in", model="toy", texts=2, tokens=8, profiled=2,
        closeness_tokens=5, contexts=4, lengths=(1, 6), shots=2, queries=2, lines=20, firsts=3, least=3, vectors=60,
        concepts=16, sparsity=2, iterations=2, width=16, steps=3, batch_size=2, context=8, learning_rates=(1e-2,),
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


def _measured(examples: Mapping[str, Sequence[float]], **more: Any) -> Measurement:
    """Means of numbers of which there is one for each text, place, token, word or layer."""
    kept = {name: [float(v) for v in values] for name, values in examples.items()}
    metrics = {name: float(np.mean(values)) for name, values in kept.items()}
    return Measurement(metrics | more.pop("metrics", {}), examples=kept, **more)


_DONE: dict[tuple[Config, str], Mapping[str, Measurement]] = {}


def _once(config: Config, name: str, compute: Callable[[], Mapping[str, Measurement]]) -> Mapping[str, Measurement]:
    """What does not depend on the seed, computed once."""
    if (config, name) not in _DONE:
        _DONE[config, name] = compute()
    return _DONE[config, name]


@torch.no_grad()
def _ablated(config: Config, name: str, progress: Progress) -> dict[str, Measurement]:
    walker = _walker(config)
    model: Any = walker.model
    ids = torch.stack(_lines(config, walker, 0, config.texts, config.tokens, 0))
    others = _lines(config, walker, 0, config.profiled, config.tokens, 1)
    mode: Any = MODES[name]
    make = {"position": distance_profile, "fixed": place_pattern}.get(mode)
    pattern = None if make is None else make(model, walker.tokenizer, others)

    def loss() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        return F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none").mean(1)

    layers = model.config.num_hidden_layers
    stream = residual_stream(model, input_ids=ids, use_cache=False)
    base, rows = loss(), []
    for layer in range(layers):
        with resumed(model, layer, stream[layer]), ablate_association(model, mode, [layer], pattern):
            rows.append(loss() - base)
        progress(layer + 1, 1.3 * layers, name)
    one = torch.stack(rows).cpu()
    depths = sorted({max(1, round(share * layers)) for share in (0.1, 0.4, 1)})
    cumulative: dict[str, list[float]] = {"bottom": [], "top": []}
    for depth in depths:
        for side, chosen in (("bottom", range(depth)), ("top", range(layers - depth, layers))):
            if depth == layers and side == "top":
                cumulative[side].append(cumulative["bottom"][-1])
                continue
            with ablate_association(model, mode, chosen, pattern):
                every = loss() - base
                cumulative[side].append(float(every.mean()))
    third = max(1, layers // 3)
    early, late = one[:third].mean(0), one[-third:].mean(0)
    examples = {
        "added, one layer": one.mean(0), "added, early third": early, "added, late third": late,
        "early less late": early - late, "added, all layers": every, "loss before": base,
    }  # fmt: skip
    curves: dict[str, tuple[Sequence[float], list[float]]] = {
        "one": (range(layers), one.mean(1).tolist()),
        **{side: (depths, found) for side, found in cumulative.items()},
    }  # fmt: skip
    return {
        name: _measured(
            {key: value.tolist() for key, value in examples.items()},
            metrics={"added, one layer, median": float(one.mean(1).median())},
            curves={k: ([float(v) for v in x], y) for k, (x, y) in curves.items()},
        )
    }


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


def _walked(config: Config) -> dict[str, Measurement]:
    walker = _walker(config)
    texts = _lines(config, walker, 0, config.texts, config.tokens, 0)
    draw = generator(0)
    mixed = [ids[torch.randperm(len(ids), generator=draw)] for ids in texts]
    last = list(range(max(1, config.tokens - 8), config.tokens))
    found: dict[str, Measurement] = {}
    for name, walked in ((REAL, texts), (MIXED, mixed)):
        rows: dict[str, list[float]] = {}
        ranks, lengths = [], []
        for ids in walked:
            trace = walker.walk(ids)
            end, start = trace.positions[-1], trace.positions[0]
            told = trace.statistics(draws=3, null="tokens")
            values = {
                "straightness": told["straightness"].value,
                "successive cosine": told["successive cosine"].value,
                "path length": trace.lengths()[:, 1:].sum(0).mean(),
                "entropy": walker.path(ids).entropies[1:].mean(),
                "share of attention": trace.shares()["attention"],
                "straightness with the first token": trace.straightness().mean(),
                "identity error": ((start + trace.steps.sum(0) - end).norm(dim=-1) / end.norm(dim=-1)).max(),
            }
            for key, value in values.items():
                rows.setdefault(key, []).append(float(value))
            if name == REAL:
                random = trace.statistics(draws=3, null="directions")
                for other, statistics in ((RANDOM, random), (OTHER_STEPS, told)):
                    for key, statistic in statistics.items():
                        rows.setdefault(f"{other}|{key}", []).append(statistic.null_mean)
            ranks.append(trace.lens_ranks(places=last).float().log10().mean(1))
            lengths.append(trace.lengths()[:, 1:].mean(1))
        lens, step = torch.stack(ranks).mean(0).tolist(), torch.stack(lengths).mean(0).tolist()
        curves = {
            "log10 rank": ([float(i) for i in range(len(lens))], lens),
            "step length": ([float(i) for i in range(len(step))], step),
        }
        found[name] = _measured({key: value for key, value in rows.items() if "|" not in key}, curves=curves)
        if name == REAL:
            for other in (RANDOM, OTHER_STEPS):
                found[other] = _measured({key: rows[f"{other}|{key}"] for key in ("straightness", "successive cosine")})
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


def _close(config: Config) -> dict[str, Measurement]:
    walker = _walker(config)
    near: dict[str, list[float]] = {name: [] for name in (DOT, COSINE, EUCLID, OTHERS)}
    for ids in _lines(config, walker, 0, config.texts, config.closeness_tokens, 0):
        found = walker.proximity(ids, draws=2)
        for name, key in ((DOT, "dot"), (COSINE, "cosine"), (EUCLID, "euclid")):
            near[name].append(found[key].value)
        near[OTHERS].append(found["dot"].null_mean)
    corpus = _corpus(config, walker)
    # a token beyond the text that stands before every first one; models without a start token have none to give
    after = walker.bigrams(corpus, config.firsts, config.least, draws=19)
    alone = EmbeddingWalk(walker.model, _Bare(walker.tokenizer)).bigrams(corpus, config.firsts, config.least, draws=19)
    names = {"rank correlation": "conditional", "pmi": "pmi", "pmi, context": "pmi, context"}
    least = {"least rank correlation": min(near[DOT])}
    return {name: _measured({"rank correlation": values}) for name, values in near.items()} | {
        DOT: _measured({"rank correlation": near[DOT]}, metrics=least),
        COUNTS: _measured({name: after[key].each for name, key in names.items()}),
        OTHER_FIRST: _measured({name: after[key].null_each for name, key in names.items()}),
        LONE: _measured({name: alone[key].each for name, key in names.items()}),
    }


class _Bare:
    """A tokenizer that has no start token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> Any:
        return self.tokenizer(text)


def _corpus(config: Config, walker: EmbeddingWalk) -> list[Tensor]:
    lines = [line.strip() for line in _plain(config.data)[1].splitlines() if len(line) > 20]
    order = np.random.default_rng(0).permutation(len(lines))[: config.lines]
    most = 32 if config.model == "toy" else 256
    return [walker.ids(lines[k][: 4 * most])[:most] for k in order]


def _reviews(name: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Labelled reviews to show, and others to ask about."""
    if name == "built-in":
        return list(REVIEWS[:8]), [text for text, _ in REVIEWS[8:]]
    found = datasets.load(name)
    if not isinstance(found, datasets.Sentences):
        raise ValueError(f"reviews must be labelled sentences, got {name!r}; use 'sst2' or 'built-in'")
    words = ("negative", "positive")
    labelled = [(t, words[int(y)]) for t, y in zip(found.train, found.train_y, strict=True) if len(t.split()) < 15]
    return labelled, [t for t in found.dev if len(t.split()) < 15]


def _narrowed(config: Config) -> dict[str, Measurement]:
    walker = _walker(config)
    longest = max(config.lengths)
    texts = _lines(config, walker, 0, config.contexts, longest, 0)
    entropy = walker.narrowing(texts, config.lengths)
    own = min(4, longest // 2)
    foreign = [torch.cat([b[:-own], a[-own:]]) for a, b in zip(texts, [*texts[1:], texts[0]], strict=True)]
    curve = {"entropy": ([float(n) for n in config.lengths], entropy.mean(0).tolist())}
    found = {
        SHORT: _measured({"entropy": entropy[:, 0].tolist()}),
        LONG: _measured({"entropy": entropy[:, -1].tolist()}, curves=curve),
        FOREIGN: _measured({"entropy": walker.narrowing(foreign, [longest])[:, 0].tolist()}),
    }
    shown, asked = _reviews(config.reviews)
    draw = np.random.default_rng(0)
    other = {"positive": "negative", "negative": "positive"}
    plain = _plain(config.data)[1]
    prompts: dict[str, list[Tensor]] = {name: [] for name in (NONE, RIGHT, WRONG, UNRELATED)}
    for index in draw.permutation(len(asked))[: config.queries]:
        query = f"Review: {asked[index]}\nSentiment:"
        chosen = [shown[k] for k in draw.permutation(len(shown))[: config.shots]]
        right = "".join(f"Review: {text}\nSentiment: {label}\n\n" for text, label in chosen)
        wrong = "".join(f"Review: {text}\nSentiment: {other[label]}\n\n" for text, label in chosen)
        at = int(draw.integers(0, max(1, len(plain) - 2 * len(right))))
        length = len(walker.ids(right))
        aside = walker.ids(plain[at : at + 2 * len(right)])[:length]
        prompts[NONE].append(walker.ids(query))
        prompts[RIGHT].append(walker.ids(right + query))
        prompts[WRONG].append(walker.ids(wrong + query))
        prompts[UNRELATED].append(torch.cat([aside, walker.ids(query)]))
    return found | {
        name: _measured({"entropy": walker.narrowing(rows)[:, 0].tolist()}) for name, rows in prompts.items()
    }


def _operations(config: Config) -> dict[str, Measurement]:
    walker = _walker(config)
    model: Any = walker.model
    # eleven tokens: a number that no size in the model has
    found = classify_ops(model, {"input_ids": walker.ids(list(range(3, 14)))[None]})
    layers = range(model.config.num_hidden_layers)
    mixing = [sum("aggregate" in op.kind and f".{layer}." in f".{op.name}." for op in found) for layer in layers]
    share = shares(found)
    filters = share["filter"]
    metrics = {f"filters, {name}": filters[name] for name in ("operations", "parameters", "flops", "norm")}
    metrics["aggregates, norm"] = share["data-dependent aggregate"]["norm"]
    return {OPERATIONS: _measured({"aggregates": [float(n) for n in mixing]}, metrics=metrics)}


def _categories(config: Config) -> dict[str, Measurement]:
    walker = _walker(config)
    tokens, labels = [], []
    for label, words in WORDS.items():
        for word in words.split():
            ids = walker.ids(" " + word)
            if len(ids) == 1 or config.model == "toy":
                tokens.append(int(ids[-1]))
                labels.append(label)
    near = nearest_other(output_head(walker.model).weight.detach()[tokens]).tolist()
    same = [float(labels[k] == label) for k, label in zip(near, labels, strict=True)]
    # what shuffled labels come to in the mean
    chance = [(labels.count(label) - 1) / (len(labels) - 1) for label in labels]
    return {
        LABELS: _measured({"purity": same}, metrics={"words": len(labels)}),
        NO_LABELS: _measured({"purity": chance}),
    }


def _concepts(config: Config, seed: int) -> dict[str, Measurement]:
    walker = _walker(config)
    rows = output_head(walker.model).weight.detach().double().cpu()
    counts = Counter(i for ids in _corpus(config, walker) for i in ids.tolist())
    frequent = [token for token, _ in counts.most_common(2 * config.vectors)]
    frequent += [i for i in range(len(rows)) if i not in counts][: max(0, config.vectors - len(frequent))]
    chosen = np.random.default_rng(seed).permutation(frequent)[: config.vectors]
    x, found = rows[torch.from_numpy(chosen)], {}
    kept = round(0.75 * len(x))
    for name, null in {VECTORS: "", **NULL_VECTORS}.items():
        vectors = (NULLS[null](x, generator(seed)) if null else x)[torch.randperm(len(x), generator=generator(seed))]
        space = ConceptSpace(config.concepts, "dictionary", config.sparsity, config.iterations, random_state=seed)
        space.fit(vectors[:kept].numpy())
        found[name] = Measurement(
            {"R2": space.score(vectors[kept:].numpy()), "R2 of the fit": space.score(vectors[:kept].numpy())}
        )
    return found


def arms(config: Config) -> Mapping[str, Arm]:
    """What is replaced, what is trained without association, and each statistic with its null model."""

    def ablated(name: str) -> Arm:
        return lambda seed, progress: _once(config, name, lambda: _ablated(config, name, progress))

    def once(name: str, compute: Callable[[Config], Mapping[str, Measurement]]) -> Arm:
        return lambda seed, progress: _once(config, name, lambda: compute(config))

    def trained(name: str) -> Arm:
        return lambda seed, progress: _from_scratch(config, name, seed, progress)

    return {
        **{name: ablated(name) for name in MODES},
        **{name: trained(name) for name in TRAINED},
        "walks": once("walks", _walked),
        "closeness": once("closeness", _close),
        "narrowing": once("narrowing", _narrowed),
        "operations": once("operations", _operations),
        "categories": once("categories", _categories),
        "concepts": lambda seed, progress: _concepts(config, seed),
    }


_COLOURS = {UNIFORM: "#E69F00", DISTANCE: "#0072B2", PLACE: "#009E73", NOTHING: "#999999"}


def _bars(axes: Any, result: Result, names: Sequence[str], metric: str, title: str, nulls: int = 0) -> None:
    """Means as bars, the last ``nulls`` of them grey, with the values that they are means of."""
    for y, name in enumerate(reversed(names)):
        first = next(iter(result.measurements[name].values()))
        values = np.array(first.examples.get(metric) or result.values(name, metric))
        axes.barh(y, values.mean(), color="#999999" if y < nulls else "#0072B2", height=0.6)
        axes.plot(values, [y] * len(values), "k.", markersize=3, alpha=0.5)
    short = [name if name.startswith("bigrams") else name.split(": ", 1)[-1] for name in reversed(names)]
    axes.set_yticks(range(len(names)), short, fontsize=7)
    axes.set_title(title, fontsize=10)


def figures(result: Result) -> Mapping[str, Figure]:
    """What replacing costs by layer, what narrows, and one text's walk and next tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.6), layout="constrained")
    (one, some, scratch, near), (lens, narrow, straight, sparse) = figure.subplots(2, 4)
    for name, colour in _COLOURS.items():
        x, y = result.curve(name, "one")
        one.plot(x, y.mean(0), "o-", markersize=2.5, color=colour, label=name)
        for side, style in (("bottom", "-"), ("top", "--")):
            x, y = result.curve(name, side)
            some.plot(x, y.mean(0), style, marker="o", markersize=2.5, color=colour)
    one.set(xlabel="layer replaced", ylabel="added loss, nats")
    one.set_yscale("symlog", linthresh=0.1)
    one.set_title("one layer's attention replaced", fontsize=10)
    one.legend(frameon=False, fontsize=8)
    some.set(xlabel="layers replaced", ylabel="added loss, nats")
    some.set_title("from the bottom (solid), from the top (dashed)", fontsize=10)
    for row, name in enumerate(reversed(TRAINED)):
        losses = result.values(name, "validation loss")
        scratch.plot(losses, [row] * len(losses), "o", color="#0072B2", alpha=0.6)
    scratch.set_yticks(range(len(TRAINED)), [name.split(": ")[1] for name in reversed(TRAINED)], fontsize=7)
    scratch.margins(x=0.1, y=0.3)
    scratch.set_title("trained from scratch: loss, nats", fontsize=10)
    closeness = [DOT, COSINE, EUCLID, COUNTS, LONE, OTHER_FIRST, OTHERS]
    _bars(near, result, closeness, "rank correlation", "rank correlations", 2)
    for name, colour in ((REAL, "#0072B2"), (MIXED, "#D55E00")):
        x, y = result.curve(name, "log10 rank")
        lens.plot(x, 10 ** y.mean(0), color=colour, label=name.split(": ")[1])
    lens.set(xlabel="layers walked", yscale="log")
    lens.set_title("rank of the final first choice", fontsize=10)
    lens.legend(frameon=False, fontsize=8)
    x, y = result.curve(LONG, "entropy")
    order = [f"{n:g} of a text" for n in x[:-1]] + [f"{x[-1]:g} of a text", f"{x[-1]:g}, mostly another's"]
    values = [*y.mean(0), result.values(FOREIGN, "entropy").mean()]
    for name in (NONE, UNRELATED, WRONG, RIGHT):
        order.append(name)
        values.append(result.values(name, "entropy").mean())
    colours = ["#0072B2"] * len(x) + ["#999999", "#0072B2", "#999999", "#0072B2", "#0072B2"]
    narrow.barh(range(len(order)), values, color=colours, height=0.6)
    narrow.set_yticks(range(len(order)), order, fontsize=7)
    narrow.invert_yaxis()
    narrow.set_title("entropy of what follows a context, nats", fontsize=10)
    _bars(straight, result, [REAL, MIXED, RANDOM, OTHER_STEPS], "straightness", "straightness of walks", 2)
    _bars(sparse, result, [VECTORS, *NULL_VECTORS], "R2", "R2 of sparse dictionaries, held out", 3)
    figure.suptitle(
        f"{result.config.model}; lines = means of {result.config.texts} texts, dots = seeds, texts or tokens, "
        "grey bars = null model", fontsize=10,
    )  # fmt: skip

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
    taken.set(xlabel="taken from", ylabel="place")
    taken.set_title(f"attention's part of the next logit: -{most:.1f} (blue) to {most:.1f} (red)", fontsize=9)
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
        f"{c.model}, float32, nothing of it trained; what it says is measured once on texts ({c.data}), so that its "
        f"rows are the same for all seeds and its intervals are a bootstrap over texts, places, tokens, layers or "
        f"words. Loss: {c.texts} texts of {c.tokens} tokens, {mean(UNIFORM, 'loss before'):.2f} nats a token before; "
        "short texts, on which a uniform mean is mildest; few of them, so that a bootstrap is somewhat too narrow. "
        f"Patterns by distance and by place are means over {c.profiled} other texts, for each layer and head. Added "
        f"nats: {added}. Weights by distance cannot look at the first token as such, on which many heads rest; weights "
        "by place can. Early and late are the first and last third of the layers. Trained from scratch: a two-layer "
        f"Llama of letters, width {c.width}, {c.steps} steps of {c.batch_size} x {c.context} letters ({c.letters}), "
        f"learning rates chosen from {', '.join(f'{r:g}' for r in c.learning_rates)} on other validation text and "
        f"another seed: {rates}. Learned distances begin with heads that look at different distances, attention must "
        "learn as much from rotary positions, and letters hang on the nearest few: in longer training attention comes "
        "nearer (try --set steps=1500), and tasks that need a look-up by content were not tried. Queries and keys stay "
        "in the replaced ones and do nothing. Walks: without the first token, whose vectors dwarf the others (with it, "
        f"straightness {mean(REAL, 'straightness with the first token'):.3f} instead of "
        f"{mean(REAL, 'straightness'):.3f}). Any drift that all tokens share beats random directions; walks put "
        "together from the steps of other tokens of the text tell whether more is straight than the drift. Attention "
        f"makes {100 * mean(REAL, 'share of attention'):.0f} % of the path. Bigrams: the {c.firsts} most frequent "
        f"tokens and all that come second at least {c.least} times, also where they never follow; ranks have many "
        "ties, so that even true probabilities would not reach 1. What frequency alone explains is in the null model. "
        "Attention rests on whatever comes first: a token alone says little of what follows it, so a start token "
        "stands before one, and before contexts that are cut. Pointwise mutual information and token vectors' inner "
        f"product: {mean(COUNTS, 'pmi'):.3f} (other first token {mean(OTHER_FIRST, 'pmi'):.3f}); with the context "
        f"vector {mean(COUNTS, 'pmi, context'):.3f} ({mean(OTHER_FIRST, 'pmi, context'):.3f}). Dictionary: {c.vectors} "
        f"frequent tokens, a quarter held out, {c.concepts} concepts, {c.sparsity} for each token, every set fitted "
        f"anew; of the vectors fitted to themselves R2 is {mean(VECTORS, 'R2 of the fit'):.2f}, of Gaussian ones of "
        f"the same lengths {mean(LENGTHS, 'R2 of the fit'):.2f}. Dot product 1 is arithmetic, not a finding: logits "
        "are dot products. Operations: each is a filter or an aggregate by definition; filters hold "
        f"{100 * mean(OPERATIONS, 'filters, parameters'):.1f} % of the parameters and "
        f"{100 * mean(OPERATIONS, 'filters, flops'):.1f} % of the multiplications. "
        f"Demonstrations: {c.shots} before each of {c.queries} reviews ({c.reviews}), wrong labels are all labels "
        "turned round. That entropy falls says nothing about learning, and none of this measures intelligence."
    )
