"""Evidence for talking heads: channels of a small network that learnt induction, and list recall of a real one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit
from torchgraft.language._access import Access, attention_patterns, captured
from torchgraft.language.talking_heads import (
    Channel,
    ChannelEdit,
    HeadMatrices,
    LaundryList,
    Prompt,
    accuracy,
    composition_scores,
    head_matrices,
    option_logits,
    random_score,
)
from torchgraft.language.talking_heads.composition import Reading
from torchgraft.language.talking_heads.tasks import OBJECTS
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("generated",)
WHOLE = "induction: nothing removed"
RANKINGS = {"ranking: best component": True, "ranking: whole matrices": False}
CIRCUIT = {"induction heads: best component": True, "induction heads: whole matrices": False}
RANK, PERCENTILE = "rank of the planted pair", "percentile of previous-token heads"
WAYS = ("top composition", "lowest composition", "largest singular values", "random")
PLAIN, CHANNEL, RANDOM = "list: unedited", "list: channel edited", "list: random component edited"
RECALLED, LOSS = "accuracy of the list", "loss on general text"
WITHOUT = "accuracy without the planted path"


def removed(way: str) -> str:
    """The name of the arm from which components are removed in this way."""
    return f"induction: {way} removed"


LEFT = "accuracy left, mean over numbers removed"


def _worse(text: str, against: str, paper: str) -> Claim:
    return Claim(
        text, LEFT, removed("top composition"), removed(against), 5, direction="lower", unit="points",
        factor=100, paper=paper,
    )  # fmt: skip


CLAIMS = (
    Claim(
        "The best component ranks the planted pair of heads first", RANK, "ranking: best component", 1.0, 0.5,
        direction="equal", unit="ranks", paper="in words: components stand out",
    ),
    Claim(
        "and higher than whole matrices do", RANK, "ranking: best component", "ranking: whole matrices", 0.5,
        direction="lower", unit="ranks", paper="in words: whole matrices are too noisy",
    ),
    _worse("Removing components of high composition hurts more than random ones", "random", "in words: most is gone"),
    _worse("and more than those of lowest composition", "lowest composition", "in words: the others change nothing"),
    _worse("and more than the largest singular values", "largest singular values", "in words: rarely the channel"),
    Claim(
        "Components of lowest composition can go without harm", LEFT, removed("lowest composition"), WHOLE, 5,
        direction="equal", unit="points", factor=100, paper="in words: the other components change nothing",
    ),
    Claim(
        "Real model: the best component puts what induction heads read higher than whole matrices do", PERCENTILE,
        "induction heads: best component", "induction heads: whole matrices", 5, unit="points", factor=100,
        paper="in words: whole matrices are too noisy",
    ),
    Claim(
        "Real model: an edited channel recalls more of lists than the unedited model", RECALLED, CHANNEL, PLAIN, 2,
        unit="points", factor=100, paper="64 -> 86 % at three things (unverified; steering three dimensions)",
    ),
    Claim(
        "and more than a random component edited with the same search", RECALLED, CHANNEL, RANDOM, 2,
        unit="points", factor=100, paper="in words",
    ),
    Claim(
        "and leaves general text as it was", LOSS, CHANNEL, PLAIN, 0.02, direction="equal", unit="nats a token",
        paper="none",
    ),
    Claim(
        "Real model: recall falls with the number of things", "accuracy of short less long lists", PLAIN, 0.0, 10,
        unit="points", factor=100, paper="in words: falls with the number, to chance",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many networks, and sets of lists.
        data: nothing but ``generated``.
        device: where to train and run.
        width, heads, vocabulary, length: of the small network and its sequences.
        steps, batch_size, lr: of its training.
        tested: sequences for its accuracy.
        removed: numbers of components removed; the claims are about the mean accuracy over them.
        model: of the lists, see ``language_model``.
        previous, readers: of the model's heads, how many that look one back most, and how many that look at what
            followed last time most, are taken for its induction circuit.
        sizes: numbers of things whose recall is measured; the middle one is edited for.
        search, test: lists for choosing an edit, and for judging it.
        candidates, scales: channels tried (and as many random components), and what they are multiplied by.
        text: general text for the loss, a name of ``datasets``; empty for the lists' own words.
        text_tokens: how much of it.
    """

    seeds: int = 3
    data: str = "generated"
    device: str = "cpu"
    width: int = 64
    heads: int = 4
    vocabulary: int = 32
    length: int = 32
    steps: int = 1200
    batch_size: int = 64
    lr: float = 3e-3
    tested: int = 256
    removed: tuple[int, ...] = (4, 8, 12, 16)
    model: str = "smollm2-135m-instruct"
    previous: int = 8
    readers: int = 12
    sizes: tuple[int, ...] = (3, 4, 7)
    search: int = 12
    test: int = 24
    candidates: int = 3
    scales: tuple[float, ...] = (0.0, 2.0)
    text: str = "wikitext2"
    text_tokens: int = 512


SCALES = {
    "smoke": Config(
        seeds=1, width=16, heads=2, steps=3, batch_size=8, tested=8, removed=(2, 4), model="toy", previous=2, readers=2,
        sizes=(2, 3, 4), search=2, test=3, candidates=1, scales=(0.0,), text="", text_tokens=32,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", steps=1600, model="Qwen/Qwen2.5-1.5B-Instruct", sizes=(3, 6, 12), search=200, test=400,
        candidates=20, scales=(0.0, 0.5, 2.0, 4.0), text_tokens=1024,
    ),
}  # fmt: skip


class Nothing(nn.Module):
    """Takes the place of a feed-forward network, so that attention is all there is."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


def _network(config: Config, seed: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_embd=config.width, n_head=config.heads, vocab_size=config.vocabulary,
            n_positions=config.length, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    for block in model.transformer.h:
        block.mlp = Nothing()
    # GPT-2's weights of 0.02 are made for widths above 700; at this one attention would stay uniform, and the network
    # find a way through averages instead of the textbook's two heads
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 if "wte" in name or "wpe" in name else config.width**-0.5)
    return model


def planted_pair(config: Config, seed: int) -> tuple[int, int]:
    """The one head of each layer whose queries and keys are trained."""
    draw = torch.Generator().manual_seed(seed)
    first, second = torch.randint(config.heads, (2,), generator=draw).tolist()
    return first, second


def _plant(model: Any, pair: tuple[int, int]) -> None:
    """Leave queries and keys of all other heads as they are drawn: where they look is noise, what they write is not.

    With all heads free several share both roles, and there is no true pair for a score to find.
    """
    width = model.config.n_embd
    size = width // model.config.n_head
    for block, head in zip(model.transformer.h, pair, strict=True):
        trained = torch.zeros(3, width)
        trained[:2, head * size : (head + 1) * size] = 1
        trained[2] = 1
        mask = trained.flatten()
        for parameter in (block.attn.c_attn.weight, block.attn.c_attn.bias):
            parameter.register_hook(lambda slope, mask=mask: slope * mask.to(slope))


def sequences(count: int, config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens that repeat with a random period of 6 to half the length, and the periods."""
    period = torch.randint(6, config.length // 2 + 1, (count,), generator=generator)
    once = torch.randint(0, config.vocabulary, (count, config.length), generator=generator)
    places = torch.arange(config.length) % period[:, None]
    return once.gather(1, places), period


def induction_accuracy(model: nn.Module, x: Tensor, period: Tensor) -> float:
    """Share of next tokens that are right, where the sequence has been through one period."""
    model.eval()
    with torch.no_grad():
        right = model(x).logits[:, :-1].argmax(-1) == x[:, 1:]
    seen = torch.arange(1, x.shape[1], device=x.device) > period[:, None]
    return right[seen].float().mean().item()


def _roles(model: nn.Module, x: Tensor, period: Tensor) -> tuple[Tensor, Tensor]:
    """How much each head of the first layer looks one back, and each of the second at what followed last time."""
    with torch.no_grad():
        first, second = attention_patterns(model, input_ids=x)
    back = first.diagonal(-1, 2, 3).mean((0, 2))
    rows = torch.arange(x.shape[1], device=x.device)
    after = (rows - period[:, None] + 1).clamp(min=0)
    looked = second.gather(3, after[:, None, :, None].expand(-1, second.shape[1], -1, 1))[..., 0]
    seen = (rows >= period[:, None])[:, None].expand_as(looked)
    return back, torch.stack([looked[:, h][seen[:, h]].mean() for h in range(second.shape[1])])


def _without_paths(model: Any, x: Tensor, period: Tensor) -> Tensor:
    """Accuracy when one head of the second layer gets keys made without what one of the first wrote, (writer, reader).

    Path patching: what the writer wrote is replaced by its mean over the batch, in those keys alone.
    """
    first, second = model.transformer.h
    heads, width = model.config.n_head, model.config.n_embd
    size = width // heads
    with captured(model, [1], "input") as stream, torch.no_grad():
        mixed: list[Tensor] = []
        handle = first.attn.c_proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
        model(x)
        handle.remove()
    found = torch.zeros(heads, heads)
    for writer in range(heads):
        part = slice(writer * size, (writer + 1) * size)
        with torch.no_grad():
            wrote = mixed[0][..., part] @ first.attn.c_proj.weight[part]
            without = second.attn.c_attn(second.ln_1(stream[1] - wrote + wrote.mean(0)))
        for reader in range(heads):
            keys = slice(width + reader * size, width + (reader + 1) * size)

            def patch(module: nn.Module, args: Any, out: Tensor, keys: slice = keys, new: Tensor = without) -> Tensor:
                return torch.cat([out[..., : keys.start], new[..., keys], out[..., keys.stop :]], -1)

            handle = second.attn.c_attn.register_forward_hook(patch)
            found[writer, reader] = induction_accuracy(model, x, period)
            handle.remove()
    return found


def _removed(model: nn.Module, order: Sequence[tuple[int, int]], x: Tensor, period: Tensor) -> float:
    """Accuracy without these components (head, component) of the first layer."""
    edits = [
        ChannelEdit(model, (0, head), [c for h, c in order if h == head])
        for head in sorted({head for head, _ in order})
    ]
    for edit in edits:
        edit.apply_()
    found = induction_accuracy(model, x, period)
    for edit in edits:
        edit.undo()
    return found


def arms(config: Config) -> Mapping[str, Arm]:
    """Planted induction, and lists of a real model."""

    def induction(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        model = _network(config, seed)
        writer, reader = pair = planted_pair(config, seed)
        _plant(model, pair)
        x, _ = sequences(config.batch_size * config.steps, config, torch.Generator().manual_seed(seed))
        history = fit(
            model, (x,), lambda m, batch: m(batch[0], labels=batch[0]).loss, steps=config.steps,
            batch_size=config.batch_size, seed=seed, device=config.device, progress=progress, schedule="one_cycle",
            clip=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=config.lr, weight_decay=0.01),
        )  # fmt: skip
        test, period = sequences(config.tested, config, torch.Generator().manual_seed(10_000 + seed))
        test, period = test.to(config.device), period.to(config.device)
        back, after = _roles(model, test, period)
        whole, paths = induction_accuracy(model, test, period), _without_paths(model, test, period)
        table = composition_scores(model, ["k"])
        scores, strength = table.scores["k"][0, :, :, 1, reader], table.strength[0]
        draw = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
        keys = {
            "top composition": scores, "lowest composition": -scores, "largest singular values": strength,
            "random": draw,
        }  # fmt: skip
        found = {}
        for way, key in keys.items():
            places = key.flatten().argsort(descending=True).tolist()
            order = [divmod(place, scores.shape[1]) for place in places]
            left = [_removed(model, order[:count], test, period) for count in config.removed]
            curve = ([0.0, *map(float, config.removed)], [whole, *left])
            found[removed(way)] = Measurement({LEFT: float(np.mean(left))}, curves={"left": curve})
        pairs = {}
        for ranking, decomposed in RANKINGS.items():
            by_pair = composition_scores(model, ["k"], decomposed=decomposed).scores["k"][0, :, :, 1].amax(1)
            found[ranking] = Measurement({RANK: 1.0 + int((by_pair > by_pair[pair]).sum())})
            pairs[ranking] = by_pair.tolist()
        others = paths.clone()
        others[pair] = 1.0
        metrics = {
            LEFT: whole,
            "looks one back": back[writer].item(),
            "looks at what followed": after[reader].item(),
            WITHOUT: paths[pair].item(),
            "least without another path": others.min().item(),
        }
        extra = {
            "scores": scores.tolist(),
            "chance": random_score(config.width),
            "pair": list(pair),
            "pairs": pairs,
            "paths": paths.tolist(),
            "back": back.tolist(),
            "after": after.tolist(),
        }
        found[WHOLE] = Measurement(metrics, curves=history.history, extra=extra)
        return found

    def circuit(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        model, _ = language_model(config.model, device=config.device)
        writers, readers = _induction_circuit(model, config, seed)
        found = {}
        for name, decomposed in CIRCUIT.items():
            table = composition_scores(model, ["k"], decomposed=decomposed, readers=readers).scores["k"].amax(2)
            shares = []
            for layer, head in readers:
                earlier = table[:layer, :, layer, head]
                places = [at for at in writers if at[0] < layer]
                shares.append(float(np.mean([(earlier < earlier[at]).float().mean().item() for at in places])))
            found[name] = Measurement(
                {PERCENTILE: float(np.mean(shares))}, examples={PERCENTILE: shares},
                extra={"writers": writers, "readers": readers},
            )  # fmt: skip
        return found

    def lists(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        model, tokenizer = language_model(config.model, device=config.device)
        words = OBJECTS if config.model != "toy" else ()

        def drawn(n: int, count: int, draw: int) -> Any:
            if words:
                return LaundryList(tokenizer, n, seed=draw, words=words).prompts(count)
            return LaundryList(_Bytes(tokenizer), n, seed=draw, words=tuple("abcdefgh")).prompts(count)

        tokens = tokenizer if words else _Bytes(tokenizer)
        curve = []
        for n in config.sizes:
            curve.append(accuracy(model, tokens, drawn(n, config.search, 100 + seed)))
            progress(len(curve), len(config.sizes) + 2 * config.candidates * len(config.scales) + 3)
        middle = config.sizes[len(config.sizes) // 2]
        search, test = drawn(middle, config.search, 200 + seed), drawn(middle, config.test, 300 + seed)
        right = torch.tensor([prompt.answer for prompt in test])
        text = _general_text(tokenizer, config, search)

        def confidence(logits: Sequence[Tensor], prompts: Sequence[Prompt]) -> float:
            pairs = zip(logits, prompts, strict=True)
            return float(np.mean([each.log_softmax(0)[prompt.answer].item() for each, prompt in pairs]))

        def judged(edit: ChannelEdit | None) -> tuple[Tensor, float, float]:
            with edit or nullcontext(), torch.no_grad():
                loss = model(text, labels=text).loss.item()
                logits = option_logits(model, tokens, test)
            answers = torch.tensor([int(each.argmax()) for each in logits])
            return (answers == right).float(), confidence(logits, test), loss

        def best(candidates: Sequence[tuple[tuple[int, int], int]], started: int) -> tuple[ChannelEdit, float]:
            tried = []
            for writer, component in candidates:
                for scale in config.scales:
                    edit = ChannelEdit(model, writer, [component], scale)
                    with edit:
                        tried.append((confidence(option_logits(model, tokens, search), search), edit))
                    progress(started + len(tried), len(config.sizes) + 2 * config.candidates * len(config.scales) + 3)
            score, edit = max(tried, key=lambda pair: pair[0])
            return edit, score

        scan = progress.once("channels", lambda: _scan(model, config))
        found = [Channel(**{**c, "writer": tuple(c["writer"]), "reader": tuple(c["reader"])}) for c in scan["channels"]]
        done = len(config.sizes)
        chosen, on_search = best([(c.writer, c.component) for c in found], done)
        rng = np.random.default_rng(seed)
        layers, heads, _, head_width = head_matrices(model).shape
        anywhere = [
            ((int(rng.integers(layers)), int(rng.integers(heads))), int(rng.integers(head_width))) for _ in found
        ]
        other, other_on_search = best(anywhere, done + len(found) * len(config.scales))
        readings = {}
        for name, edit, score in (
            (PLAIN, None, confidence(option_logits(model, tokens, search), search)),
            (CHANNEL, chosen, on_search),
            (RANDOM, other, other_on_search),
        ):
            answers, log_probability, loss = judged(edit)
            by_place = [answers[right == place].mean().item() for place in range(middle) if (right == place).any()]
            metrics = {
                RECALLED: answers.mean().item(),
                "spread over places": float(np.std(by_place)),
                "log-probability of the right thing": log_probability,
                "log-probability when chosen": score,
                LOSS: loss,
            }
            if edit is None:
                metrics["accuracy of short less long lists"] = curve[0] - curve[-1]
            extra = {"edit": [list(edit.writer), edit.components[0], edit.scale]} if edit else scan
            readings[name] = Measurement(
                metrics, curves={"recall": ([float(n) for n in config.sizes], curve)}, extra=extra
            )
        return readings

    return {"induction": induction, "circuit": circuit, "lists": lists}


class _Bytes:
    """A tokenizer of bytes told to leave out the space before a word, so that single letters are words."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return self._tokenizer(text if add_special_tokens else text.strip(), add_special_tokens=add_special_tokens)


def _general_text(tokenizer: Any, config: Config, prompts: Sequence[Any]) -> Tensor:
    """Tokens (1, T) of text that has nothing to do with lists."""
    if not config.text:
        ids = [token for prompt in prompts for token in tokenizer(prompt.text)["input_ids"]]
    else:
        found = datasets.load(config.text)
        if not isinstance(found, datasets.Text):
            raise ValueError(f"text must be plain text, got {config.text!r}")
        # four characters a token is more than enough
        ids = tokenizer(found.test[: 8 * config.text_tokens])["input_ids"]
    return torch.tensor([ids[: config.text_tokens]], device=config.device)


def _induction_circuit(model: nn.Module, config: Config, seed: int) -> tuple[list[Any], list[Any]]:
    """Heads that look one back most, and later heads that look at what followed last time most: (layer, head) each.

    On random tokens that come twice.
    """
    access, length = Access(model), 24
    vocabulary, shared = access.base.config.vocab_size, access.heads // access.kv_heads
    draw = torch.Generator().manual_seed(20_000 + seed)
    once = torch.randint(vocabulary // 10, vocabulary, (8, length), generator=draw).to(config.device)
    with torch.no_grad():
        patterns = torch.stack(attention_patterns(model, input_ids=torch.cat([once, once], 1)))
    back = patterns.diagonal(-1, 3, 4).mean((1, 3)).cpu()
    after = patterns.diagonal(1 - length, 3, 4)[..., 2:].mean((1, 3)).cpu()

    def strongest(scores: Tensor) -> list[tuple[int, int]]:
        return [divmod(place, scores.shape[1]) for place in scores.flatten().argsort(descending=True).tolist()]

    # one that is in no later layer than all readers, so that each has one to read
    writers = [at for at in strongest(back) if at[0] < len(back) - 1][: config.previous]
    first = min(layer for layer, _ in writers)
    # heads that share keys read the same: the strongest speaks for them
    readers: dict[tuple[int, int], tuple[int, int]] = {}
    for layer, head in strongest(after):
        if layer > first:
            readers.setdefault((layer, head // shared), (layer, head))
    return writers, list(readers.values())[: config.readers]


def _scan(model: nn.Module, config: Config) -> dict[str, Any]:
    """The channels of greatest z, each writer's component once; and the greatest z between any two layers."""
    started = time.process_time()
    matrices = head_matrices(model)
    table = composition_scores(matrices)
    seconds = time.process_time() - started
    found: dict[tuple[Any, int], Channel] = {}
    for kind in ("q", "k"):
        for channel in table.top(50 * config.candidates, kind):
            found.setdefault((channel.writer, channel.component), channel)
    strongest = sorted(found.values(), key=lambda channel: -channel.z)[: config.candidates]
    between = torch.stack([table.z(kind).nan_to_num(-torch.inf).amax((1, 2, 4)) for kind in ("q", "k")]).amax(0)
    layers = [[round(z, 2) if z > -torch.inf else None for z in row] for row in between.tolist()]
    return {
        "channels": [vars(c) for c in strongest], "layers": layers, "seconds": round(seconds, 1),
        "rotary": _rotary_effect(model, matrices),
    }  # fmt: skip


DISTANCES = (0, 1, 16, 256)


def _rotary_effect(model: nn.Module, matrices: HeadMatrices) -> list[float]:
    """Rank correlation of one-sided query scores with those of the product at ``DISTANCES``, for the last layer."""
    last, heads = matrices.shape[0] - 1, matrices.shape[1]
    readers = [(last, head) for head in range(heads)]
    rotary: Any = getattr(Access(model).base, "rotary_emb", None)
    if rotary is None:
        return []

    def ranks(m: HeadMatrices, reading: Reading) -> Tensor:
        scores = composition_scores(m, ["q"], readers=readers, reading=reading).scores["q"][:last, :, :, last]
        return scores.flatten().argsort().argsort().double()

    alone, found = ranks(matrices, "one-sided"), []
    for distance in DISTANCES:
        cos, sin = rotary(matrices.q, torch.tensor([[distance]], device=matrices.q.device))
        first, second = matrices.q.chunk(2, -1)
        turned = matrices.q * cos[0, 0] + torch.cat([-second, first], -1) * sin[0, 0]
        product = ranks(replace(matrices, q=turned), "product")
        found.append(round(torch.corrcoef(torch.stack([alone, product]))[0, 1].item(), 3))
    return found


_COLOURS = dict(zip(WAYS, ("#D55E00", "#009E73", "#0072B2", "#999999"), strict=True))


def figures(result: Result) -> Mapping[str, Figure]:
    """The planted pair: removal, components, paths; the real model: its circuit, its channels, recall of lists."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8.2), layout="constrained")
    (left, middle, paths), (dots, heat, right) = figure.subplots(2, 3)
    for way in WAYS:
        x, y = result.curve(removed(way), "left")
        left.plot(x, 100 * y.mean(0), "o-", color=_COLOURS[way], markersize=4, label=way)
        left.fill_between(x, 100 * y.min(0), 100 * y.max(0), color=_COLOURS[way], alpha=0.15, linewidth=0)
    left.set(xlabel="components of the first layer removed", ylabel="accuracy of induction, %", ylim=(0, 100), xticks=x)
    left.legend(frameon=False, fontsize=8)
    left.set_title("planted pair: what removal leaves; bands = seeds", fontsize=10)

    extra = result.measurements[WHOLE][result.seeds[0]].extra
    for head, scores in enumerate(extra["scores"]):
        planted = head == extra["pair"][0]
        middle.plot(
            range(len(scores)), scores, "o-", markersize=4, color="#D55E00" if planted else f"{0.4 + 0.12 * head}",
            label=f"head {head}" + (", planted" if planted else ""),
        )  # fmt: skip
    middle.axhline(extra["chance"], color="black", linestyle=":", linewidth=1)
    middle.set(xlabel="component, strongest first", ylabel="key composition with the planted reader", ylim=(0, None))
    middle.legend(frameon=False, fontsize=8)
    middle.set_title("planted pair, first seed; dotted: a random direction", fontsize=10)

    for name, mark in zip(RANKINGS, "ox", strict=True):
        for seed in result.seeds:
            seen = result.measurements[WHOLE][seed]
            at = tuple(seen.extra["pair"])
            scores, drop = np.array(seen.extra["pairs"][name]), seen.metrics[LEFT] - np.array(seen.extra["paths"])
            others = np.ones(scores.shape, dtype=bool)
            others[at] = False
            label = name.removeprefix("ranking: ") if seed == result.seeds[0] else None
            paths.plot(scores[others], 100 * drop[others], mark, color="#999999", markersize=5)
            paths.plot(scores[at], 100 * drop[at], mark, color="#D55E00", markersize=7, label=label)
    paths.set(xlabel="key composition of a pair", ylabel="accuracy lost without its path, points")
    paths.legend(frameon=False, fontsize=8)
    paths.set_title("planted pairs (orange) among all, every seed", fontsize=10)

    names = list(CIRCUIT)
    shares = [100 * result.examples(name, PERCENTILE) for name in names]
    labels = ["{}.{}".format(*at) for at in result.measurements[names[0]][result.seeds[0]].extra["readers"]]
    for values, colour, name in zip(shares, ("#D55E00", "#0072B2"), names, strict=True):
        dots.plot(values, range(len(values)), "o", color=colour, label=name.removeprefix("induction heads: "))
    dots.hlines(range(len(labels)), *shares, color="#cccccc", zorder=0)
    dots.axvline(50, color="black", linestyle=":", linewidth=1)
    dots.set_yticks(range(len(labels)), labels)
    dots.invert_yaxis()
    dots.set(xlabel="percentile of previous-token heads (dotted: chance)", ylabel="induction head", xlim=(0, 102))
    dots.legend(frameon=False, fontsize=8)
    dots.set_title(f"{result.config.model}: key composition", fontsize=10)

    x, y = result.curve(PLAIN, "recall")
    right.plot(x, 100 * y.mean(0), "o-", color="black", label="unedited, by length")
    size = result.config.sizes[len(result.config.sizes) // 2]
    for place, (name, colour) in enumerate(((PLAIN, "black"), (CHANNEL, "#D55E00"), (RANDOM, "#999999"))):
        values = 100 * result.values(name, RECALLED)
        at = size + 0.25 * (place + 1)
        right.plot([at] * len(values), values, "_", color=colour, markersize=11, label=name.removeprefix("list: "))
    right.plot(x, 100 / x, ":", color="grey", linewidth=1, label="chance")
    right.set(xlabel="things in the list", ylabel="recalled, %", ylim=(0, 100), xticks=x)
    right.legend(frameon=False, fontsize=8)
    right.set_title(f"dashes: a seed's test lists of {size}, beside the tick", fontsize=10)
    for axes in (left, middle, paths, dots, right):
        axes.grid(alpha=0.3)

    between = np.array(result.measurements[PLAIN][result.seeds[0]].extra["layers"], dtype=float)
    shown = heat.imshow(between, cmap="viridis")
    figure.colorbar(shown, ax=heat, label="greatest z of a component and a reader")
    heat.set(xlabel="layer that reads (queries or keys)", ylabel="layer that writes")
    heat.set_title(f"channels of {result.config.model}", fontsize=10)
    return {"talking_heads": figure}


def notes(result: Result) -> str:
    """What was done, and what the numbers cannot say."""
    c = result.config
    edits = {
        name: ", ".join(
            "head {0[0]}.{0[1]} component {1} x {2:g}".format(*m.extra["edit"])
            for m in result.measurements[name].values()
        )
        for name in (CHANNEL, RANDOM)
    }

    def mean(metric: str) -> float:
        return 100 * result.values(WHOLE, metric).mean()

    scan = result.measurements[PLAIN][result.seeds[0]].extra
    confidence = ", ".join(
        f"{name.removeprefix('list: ')} {result.values(name, 'log-probability when chosen').mean():.2f}"
        for name in (PLAIN, CHANNEL, RANDOM)
    )
    rotary = ", ".join(f"{r:.2f}" for r in scan["rotary"])
    ranks = [" ".join(f"{rank:.0f}" for rank in result.values(name, RANK)) for name in RANKINGS]
    shares = [100 * result.values(name, PERCENTILE).mean() for name in CIRCUIT]
    return (
        f"Planted pair: two layers of attention alone (width {c.width}, {c.heads} heads), sequences of {c.length} "
        f"tokens out of {c.vocabulary} that repeat with a period of 6 to {c.length // 2}, {c.steps} steps of "
        f"{c.batch_size}. One head of each layer, drawn for each seed, learns where to look; queries and keys of the "
        "others stay as drawn but for weight decay (with all free several heads share both roles, and there is no true "
        f"pair). The pair is the circuit: accuracy is {mean(LEFT):.0f} %, {mean(WITHOUT):.0f} % when the reader's keys "
        f"alone are made without the writer, and at least {mean('least without another path'):.0f} % without any other "
        f"path. By key composition it ranks {ranks[0]} of {c.heads**2} by the best component and {ranks[1]} by whole "
        "matrices. "
        f"Components of the first layer ({c.width} in all) are removed from the weights together, ranked by key "
        "composition with the planted reader. The channel fills many components of its head (see the figure), since "
        f"{c.vocabulary} tokens have to be told apart: unlike the paper's of one or two. "
        f"Real model, {c.model}: on random tokens that come twice, the {c.previous} heads that look one back most and "
        f"the {c.readers} that look at what followed last time most (of those that share keys the first), by "
        f"attention; percentile of the former among all heads before a reader: {shares[0]:.0f} by the best component, "
        f"{shares[1]:.0f} by whole matrices (chance 50). "
        f"All components with all later readers, three kinds: {scan['seconds']:g} s of one processor. "
        + (
            "Rotary positions: rank correlation of one-sided query scores of the last layer with those of the product "
            f"at distances {', '.join(map(str, DISTANCES))}: {rotary}. "
            if rotary
            else ""
        )
        + f"Lists: our wording; an edit is chosen out of {c.candidates} "
        f"channels of the greatest z (query and key composition) times {len(c.scales)} scales, by the mean "
        f"log-probability of the right thing on {c.search} lists of {c.sizes[len(c.sizes) // 2]} things, and judged on "
        f"{c.test} others; as many random components get the same search. Chosen channels: {edits[CHANNEL]}; random: "
        f"{edits[RANDOM]}; log-probability on the lists they were chosen by: {confidence}. Few lists: a list more or "
        f"less is {100 / c.test:.0f} points. The paper steers three dimensions of four known heads of GPT-2 small, "
        "which is not reachable here; `SubspaceSteer` does that."
    )
