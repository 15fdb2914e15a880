"""Evidence for Flow-Attention: a small character model of Shakespeare, and digits read as 64 pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.ops.flow_attention import FeatureMap, flow_attention, flow_attention_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("shakespeare", "digits")

CLAIMS = (
    Claim(
        "Flow-Attention models language better than linear attention", "bits per character", "flow", "linear", 0.01,
        direction="lower", unit="bits", paper="WikiText-103 perplexity 30.8 against 38.4 (Linear Transformer)",
    ),
    Claim(
        "Flow-Attention models language better than softmax attention", "bits per character", "flow", "softmax", 0.01,
        direction="lower", unit="bits", paper="WikiText-103 perplexity 30.8 against 33.0 (Transformer)",
    ),
    Claim(
        "Competition helps", "bits per character", "flow", "flow without competition", 0.005,
        direction="lower", unit="bits", paper="WikiText-103 perplexity 30.8 against 31.2",
    ),
    Claim(
        "Allocation helps", "bits per character", "flow", "flow without allocation", 0.005,
        direction="lower", unit="bits", paper="WikiText-103 perplexity 30.8 against 32.2",
    ),
    Claim(
        "Flow-Attention classifies better than linear attention", "accuracy", "digits: flow", "digits: linear", 0.5,
        unit="points", factor=100, paper="UEA mean accuracy 73.0 against Performer 71.5",
    ),
    Claim(
        "Its attention is less uniform than that of linear attention", "attention entropy", "digits: flow",
        "digits: linear", 0.01, direction="lower", paper="in words: linear attention degenerates to near-uniform",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: text of the character model; ``built-in`` generates a toy grammar, for where there is no data.
        device: where to train.
        task: ``language``, ``digits`` or ``both``.
        steps, batch_size, context, layers, width, heads: of the character model.
        tune_steps: steps of each trial of the learning-rate grid.
        digit_steps, tune_digit_steps: optimiser steps on digits, and of each trial of the grid.
        learning_rates: the grid that every arm gets.
    """

    seeds: int = 3
    data: str = "shakespeare"
    device: str = "cpu"
    task: Literal["both", "language", "digits"] = "both"
    steps: int = 400
    batch_size: int = 16
    context: int = 128
    layers: int = 2
    width: int = 64
    heads: int = 4
    tune_steps: int = 120
    digit_steps: int = 200
    tune_digit_steps: int = 80
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", steps=4, batch_size=4, context=16, layers=1, width=16, heads=2, tune_steps=2,
        digit_steps=4, tune_digit_steps=2, learning_rates=(1e-2,),
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", steps=5000, batch_size=64, context=256, layers=4, width=128, tune_steps=500, digit_steps=2000,
        tune_digit_steps=300, learning_rates=(1e-3, 3e-3, 1e-2),
    ),
    "paper": Config(
        device="cuda", steps=150_000, batch_size=64, context=512, layers=6, width=512, heads=8,
        learning_rates=(3e-4, 1e-3, 3e-3),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """How an arm attends; ``feature_map`` none means softmax."""

    feature_map: FeatureMap | None = "sigmoid"
    competition: bool = True
    allocation: bool = True
    clamp: tuple[float, float] | None = (-1.0, 1.0)

    def switches(self) -> dict[str, object]:
        """Keyword arguments of ``flow_attention``."""
        return {name: getattr(self, name) for name in ("feature_map", "competition", "allocation", "clamp")}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Outputs of shape (B, H, L, E)."""
        if self.feature_map is None:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return flow_attention(q, k, v, is_causal=causal, **self.switches())  # type: ignore[arg-type]

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """The implied attention matrix, non-causal."""
        if self.feature_map is None:
            return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return flow_attention_weights(q, k, **self.switches())  # type: ignore[arg-type]


ATTENTIONS = {
    "softmax": Attention(None),
    "linear": Attention("elu", competition=False, allocation=False),
    "flow": Attention(),
    "flow without competition": Attention(competition=False),
    "flow without allocation": Attention(allocation=False),
    "flow without clamp": Attention(clamp=None),
    "sigmoid map without flows": Attention(competition=False, allocation=False),
}
DIGIT_ARMS = ("softmax", "linear", "flow", "flow without clamp")


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int, attention: Attention, causal: bool) -> None:
        super().__init__()
        self.heads, self.attention, self.causal = heads, attention, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, L, D)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        y = self.attention.attend(*self.heads_of(x), causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Tokens to logits, at every position (causal) or for the whole sequence."""

    def __init__(
        self, tokens: int, length: int, classes: int, config: Config, attention: Attention, causal: bool
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, config.width)
        # as loud as the tokens: with GPT-2's 0.02 a run this short ends before positions are noticed
        self.places = nn.Parameter(0.5 * torch.randn(length, config.width))
        blocks = [Block(config.width, config.heads, attention, causal) for _ in range(config.layers)]
        self.blocks, self.causal = nn.ModuleList(blocks), causal
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) to (B, L, classes) or (B, classes)."""
        h = self.embed(x) + self.places[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return self.head(h if self.causal else h.mean(1))


def _text(config: Config) -> datasets.Text:
    if config.data == "built-in":
        words = ["the cat sat. ", "a dog ran. ", "the sun set. "]
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(0, len(words), (600,), generator=generator).tolist()
        whole = "".join(words[i] for i in drawn)
        return datasets.Text(whole[:-800], whole[-800:])
    text = datasets.load(config.data)
    if not isinstance(text, datasets.Text):
        raise ValueError(f"data must be a text, got {config.data!r}; use 'shakespeare' or 'built-in'")
    return text


def _windows(ids: Tensor, context: int) -> Tensor:
    """Consecutive windows of context + 1 characters."""
    return ids.unfold(0, context + 1, context)


def _optimizer(lr: float):  # type: ignore[no-untyped-def]
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)


def _language(config: Config) -> Mapping[str, Arm]:
    text = _text(config)
    letters = sorted(set(text.train + text.test))
    code = {letter: index for index, letter in enumerate(letters)}
    train, test = (torch.tensor([code[c] for c in part]) for part in (text.train, text.test))
    # the learning rate is chosen on the end of the training text, never on the test text
    cut = len(train) * 19 // 20
    held = _windows(train[cut:], config.context)[:100].to(config.device)
    final = _windows(test, config.context)[:400].to(config.device)
    # every start is a training window, so that epochs do not repeat the same cuts
    train = train[:cut]
    starts = torch.arange(len(train) - config.context - 1)

    def arm_of(name: str) -> Arm:
        def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
            x = torch.stack([train[s : s + config.context + 1] for s in batch[0].tolist()]).to(config.device)
            return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

        def bits(model: nn.Module, windows: Tensor) -> float:
            model.eval()
            total = 0.0
            with torch.no_grad():
                for part in windows.split(50):
                    logits = model(part[:, :-1]).flatten(0, 1)
                    total += nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
            return total / windows[:, 1:].numel() / math.log(2)

        def trained(seed: int, lr: float, steps: int, progress: Progress | None, windows: Tensor):  # type: ignore[no-untyped-def]
            torch.manual_seed(seed)
            model = Model(len(letters), config.context, len(letters), config, ATTENTIONS[name], causal=True)
            found = fit(
                model, (starts,), loss, steps=steps, batch_size=config.batch_size, optimizer=_optimizer(lr),
                schedule="one_cycle", seed=seed, clip=1.0, device=config.device, progress=progress,
                evaluate=lambda m: {"bits per character": bits(m, windows)},
                evaluate_at=sorted({0, *(steps * i // 6 for i in range(1, 7))}),
            )  # fmt: skip
            return model, found

        def run(seed: int, progress: Progress) -> Measurement:
            def score(lr: float) -> float:
                return -trained(1000, lr, config.tune_steps, None, held)[1].history["bits per character"][1][-1]

            picked = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))
            _, found = trained(seed, picked["chosen"], config.steps, progress, final)
            curve = found.history["bits per character"]
            return Measurement(
                {"bits per character": curve[1][-1], "seconds of training": found.seconds},
                curves={"bits per character": curve},
            )

        return run

    return {name: arm_of(name) for name in ATTENTIONS}


def _digits(config: Config) -> Mapping[str, Arm]:
    digits = datasets.load("digits")
    assert isinstance(digits, datasets.Images)

    def sequence(x: Tensor) -> Tensor:
        # digits have 17 levels of grey, spread over 0..255
        return (x.flatten(1).float() * 16 / 255).round().long()

    held = torch.arange(len(digits.train_x)) % 5 == 0
    parts = {
        "train": (sequence(digits.train_x)[~held], digits.train_y[~held]),
        "held": (sequence(digits.train_x)[held], digits.train_y[held]),
        "test": (sequence(digits.test_x), digits.test_y),
    }
    on_device = {key: tuple(t.to(config.device) for t in value) for key, value in parts.items()}

    def arm_of(name: str) -> Arm:
        def accuracy(model: nn.Module, part: str) -> float:
            x, y = on_device[part]
            model.eval()
            with torch.no_grad():
                return (model(x).argmax(-1) == y).float().mean().item()

        def entropy(model: Model) -> float:
            """Mean entropy of the rows of the first block's attention, as a share of the uniform one's."""
            x = on_device["test"][0][:100]
            block = model.blocks[0]
            assert isinstance(block, Block)
            with torch.no_grad():
                q, k, _ = block.heads_of(model.embed(x) + model.places)
                rows = ATTENTIONS[name].weights(q, k)
                rows = rows / rows.sum(-1, keepdim=True)
            return (-(rows * rows.clamp(min=1e-30).log()).sum(-1).mean() / math.log(rows.shape[-1])).item()

        def trained(seed: int, lr: float, steps: int, progress: Progress | None) -> Model:
            torch.manual_seed(seed)
            model = Model(17, 64, 10, config, ATTENTIONS[name], causal=False)
            fit(
                model, parts["train"], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
                steps=steps, batch_size=64, optimizer=_optimizer(lr), schedule="one_cycle", seed=seed,
                clip=1.0, device=config.device, progress=progress,
            )  # fmt: skip
            return model

        def run(seed: int, progress: Progress) -> Measurement:
            def score(lr: float) -> float:
                return accuracy(trained(1000, lr, config.tune_digit_steps, None), "held")

            picked = progress.once(f"lr digits {name}", lambda: pick_learning_rate(config.learning_rates, score))
            model = trained(seed, picked["chosen"], config.digit_steps, progress)
            return Measurement({"accuracy": accuracy(model, "test"), "attention entropy": entropy(model)})

        return run

    return {f"digits: {name}": arm_of(name) for name in DIGIT_ARMS}


def arms(config: Config) -> Mapping[str, Arm]:
    """Every attention on the character model, four of them on digits."""
    found: dict[str, Arm] = {}
    if config.task in ("both", "language"):
        found.update(_language(config))
    if config.task in ("both", "digits"):
        found.update(_digits(config))
    return found


def skips(claim: Claim, config: Config) -> bool:
    """Claims of the task that was not run."""
    return config.task == ("language" if claim.arm.startswith("digits") else "digits")


_COLOURS = ("#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#999999")


def figures(result: Result) -> Mapping[str, Figure]:
    """Bits per character against steps, and entropy against accuracy on digits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ("-", "--", "-", ":", "-.", "--", ":")
    for (name, colour), style in zip(zip(ATTENTIONS, _COLOURS, strict=True), styles, strict=True):
        if name in result.arms:
            x, y = result.curve(name, "bits per character")
            left.plot(x[1:], y.mean(0)[1:], style, color=colour, label=name, linewidth=1.6)
    left.set(xlabel="optimiser steps", ylabel="bits per character, test text")
    left.set_title(f"{result.config.data}, mean of {len(result.seeds)} seeds; lower is better", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    for name, colour, mark in zip(DIGIT_ARMS, _COLOURS, "osD^", strict=False):
        arm = f"digits: {name}"
        if arm in result.arms:
            entropy, accuracy = result.values(arm, "attention entropy"), result.values(arm, "accuracy")
            right.scatter(entropy, 100 * accuracy, color=colour, marker=mark, label=name)
    right.set(xlabel="entropy of attention rows (1 = uniform)", ylabel="test accuracy, %")
    right.set_title("digits as 64 pixels, one point a seed", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    return {"flowformer": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())
    return (
        f"Character model: {c.layers} layers, width {c.width}, {c.heads} heads, context {c.context}, {c.steps} steps "
        f"of {c.batch_size} windows for every arm, AdamW, one-cycle, learning rate of each arm from the same grid of "
        f"{len(c.learning_rates)} by {c.tune_steps}-step trials on held-out training text. Digits: {c.digit_steps} "
        f"steps of 64 images as 64 tokens of 17 greys, same width, {c.tune_digit_steps} a trial. Chosen: {rates}. "
        "'linear' is the elu + 1 map of the Linear Transformer; "
        "'sigmoid map without flows' is Flow-Attention with both flows off. The paper's models are hundreds of times "
        "larger and trained far longer, and at this size an interval over a few seeds is wide: a verdict here is about "
        "this budget, not about WikiText-103."
    )
