"""Evidence for the survey of efficient transformers: quality of attentions, drop-in use, and the general methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets, zoo
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.layers.efficient_transformers import (
    EfficientAttention,
    distillation_loss,
    n_of_m_prune,
    prune_magnitude,
    register_efficient_attention,
    share_layers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("digits", "wikitext2")
RIGHT, CHANGE = "accuracy", "cosine error"

ATTENTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "longformer": {"window": 16, "global_tokens": (0,)},
    "bigbird": {"block": 8, "random": 1},
    "linformer": {"rank": 16},
    "performer": {},
    "linear": {},
    "nystrom": {"landmarks": 16},
    "reformer": {"chunk": 16, "hashes": 2, "buckets": 8},
    "fnet": {},
}
"""Options for the 64 pixels of a digit: each sees or keeps about a quarter of them."""
DROP_IN: dict[str, dict[str, Any]] = {
    "longformer": {"window": 64, "global_tokens": (0,)},
    "local": {"window": 32},
    "bigbird": {"block": 16},
    "strided": {},
    "nystrom": {"landmarks": 64},
    "efficient": {},
    "linear": {},
    "performer": {"count": 256},
}
DENSE, SHARED, HALF, MOST, STRUCTURED, INT8 = (
    "softmax", "softmax, shared layers", "softmax, pruned 50 %", "softmax, pruned 90 %", "softmax, pruned 2:4",
    "softmax, int8",
)  # fmt: skip
STUDENT, DISTILLED = "small", "small, distilled"


def _points(text: str, arm: str, against: str, effect: float, paper: str, direction: str = "equal") -> Claim:
    return Claim(text, RIGHT, arm, against, effect, direction=direction, unit="points", factor=100, paper=paper)  # type: ignore[arg-type]


_LRA = "Long Range Arena averages: 54.4 against 50.6 to 55.0 (unverified decimals)"
CLAIMS = (
    *(
        _points(f"{kind} comes within 3 points of full attention", kind, "softmax", 3, _LRA)
        for kind in ATTENTIONS
        if kind != "softmax"
    ),
    *(
        Claim(
            f"Without training, local and global attention changes a pretrained encoder less than {kind}", CHANGE,
            "drop-in: longformer", f"drop-in: {kind}", 0.05, direction="lower",
            paper="local and global where locality holds; kernels need training",
        )
        for kind in ("linear", "performer", "nystrom")
    ),
    _points("Half of the weights go without loss", HALF, DENSE, 2, "combine pruning, quantisation and distillation"),
    _points("Nine tenths of the weights cost accuracy without retraining", MOST, DENSE, 5, "not stated", "lower"),
    _points("8-bit weights and activations cost hardly any accuracy", INT8, DENSE, 1, "hardly any loss"),
    _points(
        "A distilled student beats the same student trained alone", DISTILLED, STUDENT, 0.5,
        "DistilBERT: 40 % smaller, 97 % of GLUE", "higher",
    ),
    _points("Layers that share parameters cost hardly any accuracy", SHARED, DENSE, 2, "ALBERT: 18x fewer parameters"),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; the drop-in arms train nothing and are measured over texts.
        data: text that the encoder reads; ``built-in`` draws random tokens, for where there is no data.
        device: where to train.
        task: ``digits``, ``drop-in`` or ``all``.
        steps, batch_size, layers, width, heads: of the model that reads digits as 64 pixels.
        tune_steps: steps of each trial of the learning-rate grid.
        learning_rates: the grid that every arm gets.
        encoder: ``minilm``, or ``toy``, a small one with random weights.
        texts, tokens: how many windows the encoder reads, and how long they are.
    """

    seeds: int = 3
    data: str = "wikitext2"
    device: str = "cpu"
    task: Literal["all", "digits", "drop-in"] = "all"
    steps: int = 250
    batch_size: int = 32
    layers: int = 2
    width: int = 64
    heads: int = 4
    tune_steps: int = 60
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    encoder: str = "minilm"
    texts: int = 16
    tokens: int = 384


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", steps=2, batch_size=2, layers=1, width=16, heads=2, tune_steps=1,
        learning_rates=(1e-2,), encoder="toy", texts=4, tokens=64,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", steps=3000, batch_size=64, layers=4, width=128, heads=8, tune_steps=400,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2), texts=200, tokens=512,
    ),
}  # fmt: skip
PIXELS, GREYS = 64, 17


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Pixels (B, 64) to the logits of ten digits."""

    def __init__(self, kind: str, width: int, heads: int, layers: int, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(GREYS, width)
        # as loud as the tokens, or a run this short ends before positions are noticed
        self.places = nn.Parameter(0.5 * torch.randn(PIXELS, width))
        if kind != "fnet":
            options["max_length"] = PIXELS
        self.blocks = nn.ModuleList(
            Block(width, EfficientAttention(width, heads, kind, **options)) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) to (B, 10)."""
        h = self.embed(x) + self.places
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


def int8_(model: nn.Module) -> None:
    """Linear layers whose weights are rounded to 8 bits per output and whose inputs are rounded to 8 bits per token.

    What dynamic int8 kernels compute, in floating point: for accuracy, not for speed.
    """

    def rounded(x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (x / step).round() * step

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            with torch.no_grad():
                layer.weight.copy_(rounded(layer.weight))
            layer.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))


_SHARES = tuple(range(10, 100, 10))
_COMPRESSED: dict[str, Callable[[nn.Module], object]] = {
    **{f"softmax, pruned {share} %": partial(prune_magnitude, sparsity=share / 100) for share in _SHARES},
    STRUCTURED: n_of_m_prune,
    INT8: int8_,
}
"""What is done to a trained model without training it further."""


def _digits(config: Config) -> Mapping[str, Arm]:
    digits = datasets.load("digits")
    assert isinstance(digits, datasets.Images)

    def sequence(x: Tensor) -> Tensor:
        # digits have 17 levels of grey, spread over 0..255
        return (x.flatten(1).float() * 16 / 255).round().long()

    held = torch.arange(len(digits.train_x)) % 5 == 0
    x, y = sequence(digits.train_x), digits.train_y
    parts = {
        name: (a.to(config.device), b.to(config.device))
        for name, a, b in (
            ("train", x[~held], y[~held]), ("held", x[held], y[held]),
            ("test", sequence(digits.test_x), digits.test_y),
        )
    }  # fmt: skip

    def accuracy(model: nn.Module, part: str) -> float:
        model.eval()
        with torch.no_grad():
            return (model(parts[part][0]).argmax(-1) == parts[part][1]).float().mean().item()

    def made(kind: str) -> Model:
        return Model(kind, config.width, config.heads, config.layers, **ATTENTIONS[kind])

    def shared() -> Model:
        model = made("softmax")
        share_layers(model.blocks)
        return model

    def small() -> Model:
        return Model("softmax", config.width // 2, config.heads, 1)

    def trained(
        name: str, make: Callable[[], Model], seed: int, progress: Progress, teacher: nn.Module | None = None
    ) -> tuple[Model, float]:
        """The model, trained at the learning rate that its arm chose, and how long that took."""

        def loss(m: nn.Module, batch: Sequence[Tensor]) -> Tensor:
            if teacher is None:
                return F.cross_entropy(m(batch[0]), batch[1])
            with torch.no_grad():
                target = teacher(batch[0])
            return distillation_loss(m(batch[0]), target, batch[1], temperature=3.0)

        def once(seed: int, lr: float, steps: int, progress: Progress | None) -> tuple[Model, float]:
            torch.manual_seed(seed)
            model = make()
            found = fit(
                model, parts["train"], loss, steps=steps, batch_size=config.batch_size, schedule="one_cycle",
                optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.01), seed=seed, clip=1.0,
                device=config.device, progress=progress,
            )  # fmt: skip
            return model.eval(), found.seconds

        picked = progress.once(
            f"lr {name}",
            lambda: pick_learning_rate(
                config.learning_rates, lambda lr: accuracy(once(1000, lr, config.tune_steps, None)[0], "held")
            ),
        )
        return once(seed, picked["chosen"], config.steps, progress)

    def reading(model: nn.Module, seconds: float | None = None) -> Measurement:
        used = sum(int((p != 0).sum()) for p in model.parameters())
        found = {RIGHT: accuracy(model, "test"), "non-zero parameters": float(used)}
        return Measurement(found if seconds is None else {**found, "seconds of training": seconds})

    def attention(kind: str) -> Arm:
        return lambda seed, progress: reading(*trained(kind, lambda: made(kind), seed, progress))

    def compressed(seed: int, progress: Progress) -> Mapping[str, Measurement]:
        teacher, seconds = trained(DENSE, lambda: made("softmax"), seed, progress)
        found = {DENSE: reading(teacher, seconds)}
        for name, change in _COMPRESSED.items():
            model = copy.deepcopy(teacher)
            change(model)
            found[name] = reading(model)
        for name, source in ((STUDENT, None), (DISTILLED, teacher)):
            found[name] = reading(*trained(name, small, seed, progress, source))
        found[SHARED] = reading(*trained(SHARED, shared, seed, progress))
        return found

    return {"softmax": compressed, **{kind: attention(kind) for kind in ATTENTIONS if kind != "softmax"}}


# ----------------------------------------------------------------- drop-in use


@lru_cache(maxsize=1)
def _encoder(name: str, device: str) -> tuple[Any, Any]:
    if name == "minilm":
        model, tokenizer = zoo.load("minilm", device=device)
        return model, tokenizer
    if name != "toy":
        raise ValueError(f"encoder must be 'minilm' or 'toy', got {name!r}")
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return BertModel(config).to(device).eval(), None


@lru_cache(maxsize=1)
def _exact(config: Config) -> tuple[Tensor, Tensor]:
    """Windows of token ids (texts, tokens), and the last hidden states under exact attention."""
    model, tokenizer = _encoder(config.encoder, config.device)
    if tokenizer is None:
        ids = torch.randint(0, 100, (config.texts, config.tokens), generator=torch.Generator().manual_seed(0))
    else:
        text = datasets.load(config.data).test
        whole = torch.tensor(tokenizer(text[: config.texts * config.tokens * 8], add_special_tokens=False)["input_ids"])
        ids = whole.unfold(0, config.tokens - 2, config.tokens - 2)[: config.texts]
        if len(ids) < config.texts:
            raise ValueError(f"the text has {len(ids)} windows of {config.tokens} tokens, got texts={config.texts}")
        first, last = (torch.full((len(ids), 1), t) for t in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        ids = torch.cat([first, ids, last], 1)
    model.set_attn_implementation("sdpa")
    return ids, _states(model, ids, config.device)


def _states(model: Any, ids: Tensor, device: str) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=part.to(device)).last_hidden_state.cpu() for part in ids.split(8)])


def _drop_in(config: Config) -> Mapping[str, Arm]:
    @cache  # seeds change nothing here
    def away(kind: str) -> list[float]:
        model, _ = _encoder(config.encoder, config.device)
        ids, exact = _exact(config)
        model.set_attn_implementation(register_efficient_attention(kind, f"tg_recipe_{kind}", **DROP_IN[kind]))
        found = _states(model, ids, config.device)
        model.set_attn_implementation("sdpa")
        return (1 - F.cosine_similarity(found, exact, dim=-1).mean(1)).double().tolist()

    def arm_of(kind: str) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            values = away(kind)
            progress(1, 1, kind)
            return Measurement({CHANGE: sum(values) / len(values)}, examples={CHANGE: values})

        return run

    return {f"drop-in: {kind}": arm_of(kind) for kind in DROP_IN}


def arms(config: Config) -> Mapping[str, Arm]:
    """Attentions and general methods on digits, attentions put into a pretrained encoder."""
    found: dict[str, Arm] = {}
    for task, make in (("digits", _digits), ("drop-in", _drop_in)):
        if config.task in ("all", task):
            found.update(make(config))
    return found


def skips(claim: Claim, config: Config) -> bool:
    """Claims of a task that was not run."""
    task = "drop-in" if claim.arm.startswith("drop-in") else "digits"
    return config.task not in ("all", task)


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy against training time, change of a pretrained encoder, accuracy against what is left of a model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for mark, kind in zip("oPsD^v<>X", ATTENTIONS, strict=True):
        if kind in result.arms:
            x, y = result.values(kind, "seconds of training"), 100 * result.values(kind, RIGHT)
            spread = y.std(ddof=1) if len(y) > 1 else 0.0
            colour = "#000000" if kind == "softmax" else None
            left.errorbar(x.mean(), y.mean(), spread, fmt=mark, color=colour, capsize=3, label=kind)
    left.set(xlabel="seconds of training", ylabel="accuracy on digits, %")
    left.set_title("digits as 64 pixels, bars: standard deviation over seeds", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    names = [n for n in result.arms if n.startswith("drop-in")]
    names.sort(key=lambda n: float(result.values(n, CHANGE).mean()))
    for place, name in enumerate(names):
        values = result.examples(name, CHANGE)
        middle.barh(place, values.mean(), color="#0072B2", height=0.6)
        middle.plot(values, [place] * len(values), ".", color="#333333", markersize=2)
    middle.set_yticks(range(len(names)), [n.removeprefix("drop-in: ") for n in names])
    middle.invert_yaxis()
    middle.set(xlabel="1 - cosine to the exact token states")
    middle.set_title(f"{result.config.encoder}, nothing trained, {result.config.tokens} tokens", fontsize=10)
    if DENSE in result.arms:
        pruned = [DENSE, *(f"softmax, pruned {s} %" for s in _SHARES)]
        found = [100 * result.values(name, RIGHT) for name in pruned]
        shares = [0, *_SHARES]
        right.plot(shares, [v.mean() for v in found], "o-", color="#000000", label="pruned by magnitude, not retrained")
        right.fill_between(shares, [v.min() for v in found], [v.max() for v in found], color="#000000", alpha=0.15)
        for name, colour, style in (
            (STRUCTURED, "#009E73", "--"), (INT8, "#D55E00", "-."), (SHARED, "#CC79A7", ":"), (STUDENT, "#56B4E9", ":"),
            (DISTILLED, "#0072B2", "--"),
        ):  # fmt: skip
            right.axhline(100 * result.values(name, RIGHT).mean(), linestyle=style, color=colour, label=name)
        right.set(xlabel="linear weights removed, %", ylabel="accuracy on digits, %")
        right.legend(frameon=False, fontsize=8, loc="lower left")
    return {"efficient_transformers": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())
    ends = [
        key.removeprefix("lr ")
        for key, value in result.tuned.items()
        if len(c.learning_rates) > 1 and value["chosen"] in (c.learning_rates[0], c.learning_rates[-1])
    ]
    return (
        f"Digits: scikit-learn's, read as {PIXELS} tokens of {GREYS} greys; {c.layers} layers, width {c.width}, "
        f"{c.heads} heads, {c.steps} steps of {c.batch_size} images for every trained arm, AdamW, one-cycle, learning "
        f"rate of each arm from the same grid of {len(c.learning_rates)} by {c.tune_steps}-step trials on held-out "
        "training images. Long Range Arena reads CIFAR-10 so, at 1024 pixels; the survey's text task needs thousands "
        "of bytes. At so short a length no attention saves time (the bench has times against length), and the budget "
        "ends before all have converged: an attention that learns faster looks better. Filling in masked characters "
        "of Shakespeare was tried first, and dropped: within 200 steps all arms but nystrom, which has a convolution, "
        "predicted the space everywhere, which compares nothing. Pruning and int8 change the trained model and "
        "retrain nothing; int8 is computed in floating point as dynamic int8 kernels round, without their speed; "
        "'small' is one layer of half the width. Zeros save no time without sparse kernels. "
        f"Drop-in: {c.texts} windows of {c.tokens} tokens of {c.data} through {c.encoder} with its weights as they "
        "are; 1 - cosine of the last token states, bootstrap over windows. Times are of this machine during the run. "
        f"Chosen rates: {rates}." + (f" At an end of the grid: {', '.join(ends)}." if ends else "")
    )
