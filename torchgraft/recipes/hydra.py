"""Evidence for Hydra: characters of Shakespeare to fill in, and classes of matrices on rows of Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.layers.hydra import HydraMixer, MatrixMixer, weight_decay_groups
from torchgraft.layers.hydra.layer import Shell, initial_dt_bias
from torchgraft.ops.ssd import ssd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("shakespeare", "fashion-mnist")

LOSS, ACCURACY = "masked cross-entropy", "accuracy"
SAME = "attention in the block"


def _filling(text: str, against: str, smallest: float, paper: str) -> Claim:
    return Claim(text, LOSS, "hydra", against, smallest, direction="lower", unit="nats", paper=paper)


def _classes(text: str, arm: str, against: str, paper: str) -> Claim:
    return Claim(text, ACCURACY, arm, against, 0.5, unit="points", factor=100, paper=paper)


_DEPENDENCE = "GLUE, in words: the data-dependent form of each class is better, +1 to +3 points (unverified)"
_JOINS = "in words: quasiseparable is better than adding, concatenating or multiplying two SSMs"
CLAIMS = (
    _filling("Hydra fills in better than a causal Mamba-2", "causal", 0.02, "in words"),
    _filling("The quasiseparable matrix is better than two scans added", "add", 0.01, _JOINS),
    _filling("The quasiseparable matrix is better than two scans concatenated", "concat", 0.01, _JOINS),
    _filling("The quasiseparable matrix is better than two scans multiplied", "multiply", 0.01, _JOINS),
    _filling(
        "Hydra learns faster than a transformer of equal size", "attention", 0.01,
        "GLUE 84.3 against 83.5 (BERT), both trained to the end",
    ),
    _filling(
        "The quasiseparable matrix is better than attention in the same block", SAME, 0.01,
        "in words: quasiseparable is the best class, ahead of attention",
    ),
    *(
        _classes(f"{kind}: a matrix that depends on the data is better", f"{kind} DD", f"{kind} DI", _DEPENDENCE)
        for kind in ("toeplitz", "low_rank", "attention", "vandermonde", "cauchy", "quasiseparable")
    ),
    _classes(
        "The quasiseparable matrix is better than attention, in images", "quasiseparable DD", "attention DD",
        "in words: quasiseparable is the best class, ahead of attention",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        text, images: data; ``built-in`` generates a toy grammar or coloured noise, for where there is no data.
        device: where to train.
        task: ``filling``, ``classes`` or ``both``.
        steps, batch_size, context, layers, width, states, headdim: of the model that fills in characters.
        masked: share of characters that are hidden.
        tune_steps: steps of each trial of its learning rate.
        class_steps, class_batch, qk_dim, tune_class_steps: of the image classifiers, which have one layer.
        learning_rates, class_rates: the grids of the two tasks, which every arm gets.
    """

    seeds: int = 3
    text: str = "shakespeare"
    images: str = "fashion-mnist"
    device: str = "cpu"
    task: Literal["both", "filling", "classes"] = "both"
    steps: int = 300
    batch_size: int = 16
    context: int = 64
    layers: int = 2
    width: int = 64
    states: int = 16
    headdim: int = 32
    masked: float = 0.3
    tune_steps: int = 60
    class_steps: int = 150
    class_batch: int = 64
    qk_dim: int = 8
    tune_class_steps: int = 40
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    class_rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)


SCALES = {
    "smoke": Config(
        seeds=1, text="built-in", images="built-in", steps=3, batch_size=4, context=16, layers=1, width=16, states=4,
        headdim=8, tune_steps=2, class_steps=2, class_batch=8, qk_dim=2, tune_class_steps=1, learning_rates=(1e-2,),
        class_rates=(1e-2,),
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", steps=3000, batch_size=64, context=256, layers=8, width=256, states=64, headdim=64,
        tune_steps=300, class_steps=2000, tune_class_steps=200, learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
        class_rates=(3e-3, 1e-2, 3e-2, 1e-1),
    ),
    "paper": Config(
        device="cuda", task="filling", steps=70_000, batch_size=4096, context=128, layers=23, width=768, states=64,
        headdim=64, tune_steps=2000, learning_rates=(3e-4, 8e-4, 2e-3),
    ),
}  # fmt: skip


class _Joined(HydraMixer):
    """Two scans that both touch the diagonal, joined otherwise than by the quasiseparable matrix."""

    def __init__(self, width: int, how: str, **settings: Any) -> None:
        super().__init__(width, **settings)
        self.how = how

    def mix(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, diagonal: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Both scans over all heads, or each over its half of them."""
        both = [torch.cat([t[:, :, 0], t[:, :, 1].flip(1)]) for t in (dt, B, C)]
        y, _ = ssd(torch.cat([x, x.flip(1)]), both[0], A, both[1], both[2], chunk_size=32)
        forward, backward = y[: len(x)], y[len(x) :].flip(1)
        if self.how == "concat":
            half = self.nheads // 2
            joined = torch.cat([forward[:, :, :half], backward[:, :, half:]], 2)
        else:
            joined = forward + backward if self.how == "add" else forward * backward
        return joined + x * diagonal[..., None]


class _Causal(Shell):
    """Mamba-2 in the same shell: a causal convolution and one scan, with twice the states for the same size."""

    def __init__(self, width: int, d_state: int, headdim: int) -> None:
        heads, self.states = 2 * width // headdim, 2 * d_state
        super().__init__(
            width, 2 * self.states, heads, d_conv=7, expand=2, headdim=headdim, conv_init=None, bias=False,
            conv_bias=True,
        )  # fmt: skip
        self.dt_bias = nn.Parameter(initial_dt_bias(heads, 0.001, 0.1, 1e-4))
        self.A_log, self.D = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.ones(heads))

    def forward(self, u: Tensor) -> Tensor:
        """(B, L, width) to the same."""
        gate, x, dt = self.in_proj(u).split(self.splits, -1)
        conv = self.conv1d
        x = F.conv1d(F.pad(x.mT, (conv.kernel_size[0] - 1, 0)), conv.weight, conv.bias, groups=conv.groups).mT
        x, B, C = F.silu(x).split([self.d_inner, self.states, self.states], -1)
        dt = F.softplus(dt + self.dt_bias)
        y, _ = ssd(self.heads(x), dt, -self.A_log.exp(), B[:, :, None], C[:, :, None], self.D, chunk_size=32)
        return self.close(y.flatten(2), gate)


class _Attention(nn.Module):
    """Softmax attention and an MLP, as wide as makes the layer as large as one of Hydra."""

    def __init__(self, width: int, headdim: int, parameters: int) -> None:
        super().__init__()
        self.headdim = headdim
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        left = parameters - sum(p.numel() for p in self.parameters())
        self.norm = nn.LayerNorm(width)
        hidden = max(1, round(left / (2 * width + 1)))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width), normalised, to what is added to the residual."""
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.headdim)).permute(2, 0, 3, 1, 4)
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y + self.mlp(self.norm(x + y))


FREQUENCIES = "frequencies"
FILLING = ("causal", "add", "concat", "multiply", "hydra", "attention", SAME)
KINDS = ("toeplitz", "low_rank", "attention", "vandermonde", "cauchy", "quasiseparable")
CLASSES = ("dense DI", *(f"{kind} {how}" for kind in KINDS for how in ("DI", "DD")))


def _mixer(name: str, config: Config) -> nn.Module:
    sizes: dict[str, Any] = {"d_state": config.states, "headdim": config.headdim}
    if name == "hydra":
        return HydraMixer(config.width, chunk_size=32, **sizes)
    if name == "causal":
        return _Causal(config.width, **sizes)
    if name == SAME:
        heads = 2 * config.width // config.headdim
        queries = 2 * config.states // heads
        return MatrixMixer("attention", True, config.width, queries, headdim=config.headdim)
    if name == "attention":
        size = sum(p.numel() for p in HydraMixer(config.width, **sizes).parameters())
        return _Attention(config.width, config.headdim, size)
    return _Joined(config.width, name, **sizes)


class Encoder(nn.Module):
    """Pre-norm residual mixers, without MLPs; learned positions where they are wanted."""

    def __init__(self, inputs: nn.Module, positions: int, mixers: Sequence[nn.Module], width: int, out: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.places = nn.Parameter(0.5 * torch.randn(positions, width)) if positions else None
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in mixers])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out)

    def features(self, x: Tensor) -> Tensor:
        """(B, L, width)."""
        h = self.inputs(x)
        h = h if self.places is None else h + self.places[: h.shape[1]]
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            h = h + mixer(norm(h))
        return self.norm(h)

    def forward(self, x: Tensor) -> Tensor:
        """A prediction for each token."""
        return self.head(self.features(x))


def _text(config: Config) -> datasets.Text:
    if config.text == "built-in":
        words = ["the cat sat. ", "a dog ran. ", "the sun set. "]
        drawn = torch.randint(0, len(words), (300,), generator=torch.Generator().manual_seed(0)).tolist()
        whole = "".join(words[i] for i in drawn)
        return datasets.Text(whole[:-600], whole[-600:])
    text = datasets.load(config.text)
    if not isinstance(text, datasets.Text):
        raise ValueError(f"text must be a text, got {config.text!r}; use 'shakespeare' or 'built-in'")
    return text


def _optimizer(model: nn.Module, lr: float) -> Callable[[object], torch.optim.Optimizer]:
    return lambda _: torch.optim.AdamW(weight_decay_groups(model, 0.01), lr=lr)


def _hide(x: Tensor, share: float, mask_token: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Inputs with a share of the tokens replaced by the mask, and where."""
    hidden = torch.rand(x.shape, generator=generator) < share
    return x.masked_fill(hidden, mask_token), hidden


def _filling_arms(config: Config) -> Mapping[str, Arm]:
    text = _text(config)
    letters = sorted(set(text.train + text.test))
    code = {letter: index for index, letter in enumerate(letters)}
    train, test = (torch.tensor([code[c] for c in part]) for part in (text.train, text.test))
    cut, length = len(train) * 19 // 20, config.context

    def windows(ids: Tensor, most: int) -> tuple[Tensor, ...]:
        """Windows side by side, with the same characters hidden for every arm and seed."""
        x = ids.unfold(0, length, length)[:most]
        return tuple(t.to(config.device) for t in (x, *_hide(x, config.masked, len(letters), _fixed())))

    # the learning rate is chosen on the end of the training text, never on the test text
    held, final = windows(train[cut:], 100), windows(test, 400)
    train = train[:cut]
    starts = torch.arange(len(train) - length)

    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        x = train[batch[0].cpu()[:, None] + torch.arange(length)]
        seen, hidden = _hide(x, config.masked, len(letters), None)
        logits = model(seen.to(config.device))
        return F.cross_entropy(logits[hidden.to(config.device)], x[hidden].to(config.device))

    def measured(model: nn.Module, data: tuple[Tensor, ...]) -> float:
        total = sum(
            float(F.cross_entropy(model(seen)[hidden], x[hidden], reduction="sum"))
            for x, seen, hidden in zip(*(t.split(50) for t in data), strict=True)
        )
        return total / int(data[2].sum())

    def arm_of(name: str) -> Arm:
        def trained(seed: int, lr: float, steps: int, progress: Progress | None, data: tuple[Tensor, ...]):  # type: ignore[no-untyped-def]
            torch.manual_seed(seed)
            model = Encoder(
                nn.Embedding(len(letters) + 1, config.width), length if name in ("attention", SAME) else 0,
                [_mixer(name, config) for _ in range(config.layers)], config.width, len(letters),
            )  # fmt: skip
            found = fit(
                model, (starts,), loss, steps=steps, batch_size=config.batch_size, optimizer=_optimizer(model, lr),
                schedule="one_cycle", seed=seed, clip=1.0, device=config.device, progress=progress,
                evaluate=lambda m: {LOSS: measured(m, data)},
                evaluate_at=sorted({steps * i // 5 for i in range(1, 6)} - {0}) if progress else [steps],
            )  # fmt: skip
            return model, found

        def run(seed: int, progress: Progress) -> Measurement:
            def score(lr: float) -> float:
                return -trained(1000, lr, config.tune_steps, None, held)[1].history[LOSS][1][-1]

            picked = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))
            model, found = trained(seed, picked["chosen"], config.steps, progress, final)
            curve = found.history[LOSS]
            size = sum(p.numel() for p in model.parameters())
            return Measurement(
                {LOSS: curve[1][-1], "parameters": size, "seconds of training": found.seconds}, curves={LOSS: curve}
            )

        return run

    def guessing(seed: int, progress: Progress) -> Measurement:
        """Every hidden character by how often it stands in the training text."""
        often = torch.bincount(train, minlength=len(letters)).float().add(1)
        return Measurement(
            {LOSS: float(F.cross_entropy(often.log().expand(int(final[2].sum()), -1), final[0][final[2]]))}
        )

    return {**{name: arm_of(name) for name in FILLING}, FREQUENCIES: guessing}


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _images(config: Config) -> datasets.Images:
    if config.images == "built-in":
        y = torch.arange(80) % 4
        noise = torch.randint(0, 60, (80, 1, 12, 12), generator=_fixed())
        x = (noise + 50 * y[:, None, None, None]).to(torch.uint8)
        return datasets.Images(x[:60], y[:60], x[60:], y[60:], ("0", "1", "2", "3"))
    images = datasets.load(config.images)
    if not isinstance(images, datasets.Images):
        raise ValueError(f"images must be labelled images, got {config.images!r}; use 'fashion-mnist' or 'built-in'")
    return images


def _class_arms(config: Config) -> Mapping[str, Arm]:
    images = _images(config)

    def rows(x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, H, W * C): each row of pixels is a token."""
        return x.float().div(255).sub(0.5).permute(0, 2, 3, 1).flatten(2)

    cut = len(images.train_x) * 9 // 10
    train = rows(images.train_x[:cut]), images.train_y[:cut]
    held = rows(images.train_x[cut:][:2000]).to(config.device), images.train_y[cut:][:2000].to(config.device)
    test = rows(images.test_x[:4000]).to(config.device), images.test_y[:4000].to(config.device)
    length, pixels = train[0].shape[1:]

    class Classifier(Encoder):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x).mean(1))

    def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        model.eval()
        with torch.no_grad():
            answers = torch.cat([model(x).argmax(-1) for x in data[0].split(500)])
        return float((answers == data[1]).float().mean())

    def arm_of(name: str) -> Arm:
        kind, how = name.split()

        def trained(seed: int, lr: float, steps: int, progress: Progress | None) -> nn.Module:
            torch.manual_seed(seed)
            mixer = MatrixMixer(kind, how == "DD", config.width, config.qk_dim, length, headdim=config.headdim)  # type: ignore[arg-type]
            model = Classifier(nn.Linear(pixels, config.width), length, [mixer], config.width, len(images.classes))
            fit(
                model, train, lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps=steps, batch_size=config.class_batch,
                optimizer=_optimizer(model, lr), schedule="one_cycle", seed=seed, clip=1.0, device=config.device,
                progress=progress,
            )  # fmt: skip
            return model

        def run(seed: int, progress: Progress) -> Measurement:
            def score(lr: float) -> float:
                return accuracy(trained(1000, lr, config.tune_class_steps, None), held)

            picked = progress.once(f"lr {name}", lambda: pick_learning_rate(config.class_rates, score))
            model = trained(seed, picked["chosen"], config.class_steps, progress)
            size = sum(p.numel() for p in model.parameters())
            return Measurement({ACCURACY: accuracy(model, test), "parameters": size})

        return run

    return {name: arm_of(name) for name in CLASSES}


def arms(config: Config) -> Mapping[str, Arm]:
    """Seven ways of filling in beside guessing, and thirteen classes of matrices."""
    found: dict[str, Arm] = {}
    if config.task in ("both", "filling"):
        found.update(_filling_arms(config))
    if config.task in ("both", "classes"):
        found.update(_class_arms(config))
    return found


def skips(claim: Claim, config: Config) -> bool:
    """Claims of the task that was not run."""
    return config.task == ("classes" if claim.metric == LOSS else "filling")


_COLOURS = ("#999999", "#E69F00", "#CC79A7", "#56B4E9", "#0072B2", "#000000", "#D55E00")


def figures(result: Result) -> Mapping[str, Figure]:
    """Loss against steps, and accuracy of every class of matrices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour, style in zip(FILLING, _COLOURS, (":", "--", "-.", ":", "-", "--", "-."), strict=True):
        if name in result.arms:
            x, y = result.curve(name, LOSS)
            left.plot(x, y.mean(0), style, color=colour, label=name, linewidth=1.8)
    if FREQUENCIES in result.arms:
        floor = result.values(FREQUENCIES, LOSS).mean()
        left.axhline(floor, color="#bbbbbb", linewidth=1, zorder=0, label="frequencies of characters")
    left.set(xlabel="optimiser steps", ylabel="cross-entropy of hidden characters, nats")
    left.set_title(f"{result.config.text}, mean of {len(result.seeds)} seeds; lower is better", fontsize=10)
    left.legend(frameon=False, fontsize=8, ncols=2, loc="upper right", bbox_to_anchor=(1, 0.93))
    kinds = ("dense", *KINDS)
    for how, mark, colour in (("DI", "o", "#D55E00"), ("DD", "s", "#0072B2")):
        label = {"DI": "not data-dependent", "DD": "data-dependent"}[how]
        for place, kind in enumerate(kinds):
            if f"{kind} {how}" in result.arms:
                values = 100 * result.values(f"{kind} {how}", ACCURACY)
                shown = label if kind == "toeplitz" else None
                at = [place + (0.12 if how == "DD" else -0.12)] * len(values)
                right.scatter(at, values, color=colour, marker=mark, s=28, alpha=0.8, label=shown)
    right.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right", fontsize=8)
    right.set(ylabel="test accuracy, %")
    right.set_title(f"{result.config.images}, rows as tokens, one point a seed", fontsize=10)
    right.grid(axis="y", alpha=0.3)
    if any(name in result.arms for name in CLASSES):
        right.legend(frameon=False, fontsize=8)
    return {"hydra": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']}" for key, value in result.tuned.items())
    ends = [
        key.removeprefix("lr ")
        for key, value in result.tuned.items()
        for grid in [c.learning_rates if key.removeprefix("lr ") in FILLING else c.class_rates]
        if len(grid) > 1 and value["chosen"] in (grid[0], grid[-1])
    ]
    reached = ""
    if FREQUENCIES in result.arms:
        floor, attention = (result.values(name, LOSS).mean() for name in (FREQUENCIES, "attention"))
        reached = (
            f"Guessing by frequency costs {floor:.2f} nats and 'attention' ends at {attention:.2f}: how much of a lead "
            f"over it is the mixer's and how much its slow start, {c.steps} steps cannot say. "
        )
    return (
        f"{reached}Filling in: {c.layers} pre-norm layers, width {c.width}, {c.states} states, heads of {c.headdim}, "
        f"context {c.context}, {c.masked:.0%} hidden, {c.steps} steps of {c.batch_size} windows, no MLP; 'attention' "
        "has learned positions (0.5 at the start) and an MLP that brings each layer to the size of a Hydra layer; "
        f"'{SAME}' is softmax attention with the convolution, gate and norm of Hydra around it, and positions; "
        "'causal' has twice the states for the same size. 'add', 'concat' (each direction on half of the heads) and "
        "'multiply' are our reading of the paper's alternatives, with the same data-dependent skip weight as Hydra. "
        f"Classes: one MatrixMixer, queries of {c.qk_dim}, learned positions, {c.class_steps} steps of "
        f"{c.class_batch}; DI learns tables over positions where DD projects the input, so their sizes differ. "
        "Rows of an image always stand at the same places, which suits tables: where DI is ahead, that says little of "
        "text, or of lengths that vary, where the paper has DD ahead. "
        "AdamW, one-cycle, a learning rate for each arm from the grid of its task, "
        f"{len(c.learning_rates)} and {len(c.class_rates)} rates, by trials of "
        f"{c.tune_steps} and {c.tune_class_steps} steps on held-out training data. Chosen: {rates}."
        + (f" At an end of its grid: {', '.join(ends)}." if ends else "")
        + " The paper pre-trains 110M parameters on C4; a verdict here is about this budget."
    )
