"""Evidence for talking heads: channels of a small network that learnt induction, and list recall of a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit
from torchgraft.language._access import attention_patterns
from torchgraft.language.talking_heads import (
    Channel,
    ChannelEdit,
    LaundryList,
    accuracy,
    composition_scores,
    head_matrices,
    random_score,
)
from torchgraft.language.talking_heads.tasks import OBJECTS, choices
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("generated",)
WHOLE = "induction: nothing removed"
RANKINGS = {"ranking: best component": True, "ranking: whole matrices": False}
RANK = "rank of the true pair"
WAYS = ("top composition", "lowest composition", "largest singular values", "random")
PLAIN, CHANNEL, RANDOM = "list: unedited", "list: channel edited", "list: random component edited"


def removed(way: str) -> str:
    """The name of the arm from which components are removed in this way."""
    return f"induction: {way} removed"


LEFT = "accuracy left, mean over numbers removed"


def _worse(text: str, against: str, paper: str) -> Claim:
    return Claim(
        text, LEFT, removed("top composition"), removed(against), 0.05, direction="lower", unit="points",
        factor=100, paper=paper,
    )  # fmt: skip


CLAIMS = (
    _worse("Removing components of high composition hurts more than random ones", "random", "in words: most is gone"),
    _worse("and more than those of lowest composition", "lowest composition", "in words: the others change nothing"),
    _worse("and more than the largest singular values", "largest singular values", "in words: rarely the channel"),
    Claim(
        "Components of lowest composition can go without harm", LEFT, removed("lowest composition"), WHOLE, 0.05,
        direction="equal", unit="points", factor=100, paper="in words: the other components change nothing",
    ),
    Claim(
        "The best component ranks the true pair of heads higher than whole matrices do", RANK,
        "ranking: best component", "ranking: whole matrices", 0.5, direction="lower", unit="ranks",
        paper="in words: whole matrices are too noisy",
    ),
    Claim(
        "An edited channel recalls more of lists than the unedited model", "accuracy of the list", CHANNEL, PLAIN, 0.02,
        unit="points", factor=100, paper="64 -> 86 % at three things (unverified; steering three dimensions)",
    ),
    Claim(
        "and more than a random component edited with the same search", "accuracy of the list", CHANNEL, RANDOM, 0.02,
        unit="points", factor=100, paper="in words",
    ),
    Claim(
        "Recall falls with the number of things", "accuracy of short less long lists", PLAIN, 0.0, 0.1, unit="points",
        factor=100, paper="in words: falls with the number, to chance",
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
        sizes: numbers of things whose recall is measured; the middle one is edited for.
        search, test: lists for choosing an edit, and for judging it.
        candidates, scales: channels tried (and as many random components), and what they are multiplied by.
    """

    seeds: int = 3
    data: str = "generated"
    device: str = "cpu"
    width: int = 64
    heads: int = 4
    vocabulary: int = 32
    length: int = 32
    steps: int = 1600
    batch_size: int = 64
    lr: float = 3e-3
    tested: int = 256
    removed: tuple[int, ...] = (4, 8, 12, 16)
    model: str = "smollm2-135m-instruct"
    sizes: tuple[int, ...] = (3, 4, 7)
    search: int = 12
    test: int = 24
    candidates: int = 3
    scales: tuple[float, ...] = (0.0, 2.0)


SCALES = {
    "smoke": Config(
        seeds=1, width=16, heads=2, steps=3, batch_size=8, tested=8, removed=(2, 4), model="toy", sizes=(2, 3, 4),
        search=2, test=3, candidates=1, scales=(0.0,),
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", model="Qwen/Qwen2.5-1.5B-Instruct", sizes=(3, 6, 12), search=200, test=400, candidates=20,
        scales=(0.0, 0.5, 2.0, 4.0),
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
        x, _ = sequences(config.batch_size * config.steps, config, torch.Generator().manual_seed(seed))
        history = fit(
            model, (x,), lambda m, batch: m(batch[0], labels=batch[0]).loss, steps=config.steps,
            batch_size=config.batch_size, seed=seed, device=config.device, progress=progress, schedule="one_cycle",
            clip=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=config.lr, weight_decay=0.01),
        )  # fmt: skip
        test, period = sequences(config.tested, config, torch.Generator().manual_seed(10_000 + seed))
        test, period = test.to(config.device), period.to(config.device)
        back, after = _roles(model, test, period)
        table = composition_scores(model)
        # root mean square over all heads of the second layer and all that they can make of it
        scores = torch.stack([found[0, :, :, 1] for found in table.scores.values()]).square().mean((0, 3)).sqrt()
        strength = table.strength[0]
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
            curve = ([0.0, *map(float, config.removed)], [induction_accuracy(model, test, period), *left])
            found[removed(way)] = Measurement({LEFT: float(np.mean(left))}, curves={"left": curve})
        metrics = {
            LEFT: induction_accuracy(model, test, period),
            "looks one back": back.max().item(),
            "looks at what followed": after.max().item(),
        }
        pair = int(back.argmax()), int(after.argmax())
        for ranking, decomposed in RANKINGS.items():
            keys_read = composition_scores(model, ["k"], decomposed=decomposed).scores["k"][0, :, :, 1].amax(1)
            found[ranking] = Measurement({RANK: 1.0 + int((keys_read > keys_read[pair]).sum())})
        extra = {
            "scores": scores.tolist(),
            "chance": random_score(config.width),
            "pair": list(pair),
            "back": back.tolist(),
            "after": after.tolist(),
        }
        found[WHOLE] = Measurement(metrics, curves=history.history, extra=extra)
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

        def judged(edit: ChannelEdit | None) -> Tensor:
            if edit is None:
                return (choices(model, tokens, test) == right).float()
            with edit:
                return (choices(model, tokens, test) == right).float()

        def best(candidates: Sequence[tuple[tuple[int, int], int]], started: int) -> tuple[ChannelEdit, float]:
            tried = []
            for writer, component in candidates:
                for scale in config.scales:
                    edit = ChannelEdit(model, writer, [component], scale)
                    with edit:
                        tried.append((accuracy(model, tokens, search), edit))
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
            (PLAIN, None, float("nan")),
            (CHANNEL, chosen, on_search),
            (RANDOM, other, other_on_search),
        ):
            answers = judged(edit)
            by_place = [answers[right == place].mean().item() for place in range(middle) if (right == place).any()]
            metrics = {"accuracy of the list": answers.mean().item(), "spread over places": float(np.std(by_place))}
            if edit is None:
                metrics["accuracy of short less long lists"] = curve[0] - curve[-1]
            else:
                metrics["accuracy when chosen"] = score
            extra = (
                {"edit": [list(edit.writer), edit.components[0], edit.scale]} if edit else {"layers": scan["layers"]}
            )
            readings[name] = Measurement(
                metrics, curves={"recall": ([float(n) for n in config.sizes], curve)}, extra=extra
            )
        return readings

    return {"induction": induction, "lists": lists}


class _Bytes:
    """A tokenizer of bytes told to leave out the space before a word, so that single letters are words."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return self._tokenizer(text if add_special_tokens else text.strip(), add_special_tokens=add_special_tokens)


def _scan(model: nn.Module, config: Config) -> dict[str, Any]:
    """The channels of greatest z, each writer's component once; and the greatest z between any two layers."""
    table = composition_scores(model, ["q", "k"])
    found: dict[tuple[Any, int], Channel] = {}
    for channel in table.top(50 * config.candidates):
        found.setdefault((channel.writer, channel.component), channel)
    between = torch.stack([table.z(kind).nan_to_num(-torch.inf).amax((1, 2, 4)) for kind in table.scores]).amax(0)
    layers = [[round(z, 2) if z > -torch.inf else None for z in row] for row in between.tolist()]
    return {"channels": [vars(c) for c in list(found.values())[: config.candidates]], "layers": layers}


_COLOURS = dict(zip(WAYS, ("#D55E00", "#009E73", "#0072B2", "#999999"), strict=True))


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy against components removed, scores of components, and recall of lists."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (left, middle), (right, heat) = figure.subplots(2, 2)
    for way in WAYS:
        x, y = result.curve(removed(way), "left")
        left.plot(x, 100 * y.mean(0), "o-", color=_COLOURS[way], markersize=4, label=way)
        left.fill_between(x, 100 * y.min(0), 100 * y.max(0), color=_COLOURS[way], alpha=0.15, linewidth=0)
    left.set(xlabel="components of the first layer removed", ylabel="accuracy of induction, %", ylim=(0, 100))
    left.legend(frameon=False, fontsize=8)
    left.set_title("a network of two layers; bands = seeds", fontsize=10)

    extra = result.measurements[WHOLE][result.seeds[0]].extra
    for head, scores in enumerate(extra["scores"]):
        middle.plot(range(len(scores)), scores, "o-", markersize=4, label=f"head {head}")
    middle.axhline(extra["chance"], color="grey", linestyle=":", linewidth=1)
    middle.set(xlabel="component, strongest first", ylabel="composition with the second layer", ylim=(0, None))
    middle.legend(frameon=False, fontsize=8)
    middle.set_title("first seed; dotted: a random direction", fontsize=10)

    x, y = result.curve(PLAIN, "recall")
    right.plot(x, 100 * y.mean(0), "o-", color="black", label="unedited")
    size = result.config.sizes[len(result.config.sizes) // 2]
    for name, colour in ((PLAIN, "black"), (CHANNEL, "#D55E00"), (RANDOM, "#999999")):
        values = 100 * result.values(name, "accuracy of the list")
        right.plot([size] * len(values), values, "_", color=colour, markersize=14, label=name.removeprefix("list: "))
    right.plot(x, 100 / x, ":", color="grey", linewidth=1, label="chance")
    right.set(xlabel="things in the list", ylabel="recalled, %", ylim=(0, 100))
    right.legend(frameon=False, fontsize=8)
    right.set_title(f"{result.config.model}; dashes: a seed's test lists", fontsize=10)
    for axes in (left, middle, right):
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
    back, after = (result.values(WHOLE, name).mean() for name in ("looks one back", "looks at what followed"))
    ranks = [" ".join(f"{rank:.0f}" for rank in result.values(name, RANK)) for name in RANKINGS]
    spread = ", ".join(
        f"{name.removeprefix('list: ')} {result.values(name, 'spread over places').mean():.2f}"
        for name in (PLAIN, CHANNEL, RANDOM)
    )
    return (
        f"Induction: two layers of attention alone (width {c.width}, {c.heads} heads), sequences of {c.length} tokens "
        f"out of {c.vocabulary} that repeat with a period of 6 to {c.length // 2}, {c.steps} steps of {c.batch_size}. "
        f"Attention one back of the best first head {back:.2f}, to what followed last time of the best second head "
        f"{after:.2f}; these two are taken for the true pair, which among the {c.heads**2} pairs ranks "
        f"{ranks[0]} by the best component's key composition and {ranks[1]} by whole matrices, seed by seed. Other "
        "heads share the roles (the attention of all is in the record), so components of the whole first layer are "
        "ranked by composition (root mean square over queries, keys and values of all second heads), and as many as "
        f"the figure shows, out of {c.width}, are removed from the weights together. "
        f"Lists: {c.model}, our wording; an edit is chosen out of {c.candidates} "
        f"channels of the greatest z (query and key composition) times {len(c.scales)} scales on {c.search} lists of "
        f"{c.sizes[len(c.sizes) // 2]} things and judged on {c.test} others; as many random components get the same "
        f"search. Chosen channels: {edits[CHANNEL]}; random: {edits[RANDOM]}. Standard deviation of accuracy over the "
        f"answer's place in the list: {spread}. Few lists: a list more or less is {100 / c.test:.0f} points. The paper "
        "steers three dimensions of four known heads of GPT-2 small, which is not reachable here; `SubspaceSteer` does "
        "that."
    )
