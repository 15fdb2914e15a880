"""Evidence for LMUFormer: spoken digits, heard whole and in part, and images read pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.layers.lmuformer import LMUCell, LMUFormer, LMUMixer, energy_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("spoken-digits", "fashion-mnist", "digits")
OURS, SPIKING, CAUSAL, BARE = "LMUFormer", "spiking LMUFormer", "causal convolutions", "without memory"
ATTENTION, TRANSFORMER, LSTM = "spiking attention", "Transformer", "LSTM"
LMU = "LMU alone"
SHARE = 0.6797
PART = f"LMUFormer, first {100 * SHARE:.0f} %"
SPEECH = (OURS, SPIKING, CAUSAL, BARE, ATTENTION, TRANSFORMER, LSTM)
PIXELS = (OURS, SPIKING, BARE, LMU, TRANSFORMER, LSTM)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, SHARE, 0.8, 0.9, 1.0)

CLAIMS = (
    Claim(
        "Spikes cost little accuracy", "accuracy", SPIKING, OURS, 1.0, direction="equal", unit="points", factor=100,
        paper="Speech Commands: 96.12 against 96.53",
    ),
    Claim(
        "Two thirds of the recording are as good as the whole", "accuracy", PART, OURS, 1.0, direction="equal",
        unit="points", factor=100, paper="in words: nearly the same with 32.03 % less input",
    ),
    Claim(
        "The spiking memory beats spiking attention", "accuracy", SPIKING, ATTENTION, 1.0, unit="points", factor=100,
        paper="Speech Commands: 96.12 against 93.38 of Spikformer",
    ),
    Claim(
        "It comes near a Transformer", "accuracy", OURS, TRANSFORMER, 2.0, direction="equal", unit="points",
        factor=100, paper="Speech Commands: 96.53 against 97.74 (KWT-2), 98.11 (AST)",
    ),
    Claim(
        "The memory helps", "accuracy", OURS, BARE, 1.0, unit="points", factor=100, paper="not compared",
    ),
    Claim(
        "It beats an LSTM on permuted pixels", "accuracy", f"pixels: {OURS}", f"pixels: {LSTM}", 1.0, unit="points",
        factor=100, paper="psMNIST, in words: above LMU and LSTM (numbers unverified)",
    ),
    Claim(
        "The memory helps on permuted pixels", "accuracy", f"pixels: {OURS}", f"pixels: {BARE}", 1.0, unit="points",
        factor=100, paper="not compared",
    ),
    Claim(
        "It beats the LMU alone on permuted pixels", "accuracy", f"pixels: {OURS}", f"pixels: {LMU}", 1.0,
        unit="points", factor=100, paper="psMNIST, in words: above LMU and LSTM (numbers unverified)",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: ``spoken-digits``, ``fashion-mnist`` (as permuted pixels), or ``digits``, which does both: as eight
            frames of eight bands, and as 64 permuted pixels.
        device: where to train.
        dim, depth: channels and blocks of LMUFormer; the others are made about as large.
        images: training images of the permuted pixels.
        held, test: examples that choose learning rates, and for the test.
        side: images are averaged down to this many pixels a side.
        steps, batch_size: of training, for every arm.
        trial: share of the steps that trials of learning rates take.
        learning_rates: the grid of every network; arms that lack a part of LMUFormer take its rate.
    """

    seeds: int = 3
    data: str = "spoken-digits"
    device: str = "cpu"
    dim: int = 32
    depth: int = 1
    images: int = 10_000
    held: int = 300
    test: int = 300
    side: int = 14
    steps: int = 240
    batch_size: int = 32
    trial: float = 0.3
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


SCALES = {
    "smoke": Config(
        seeds=1, data="digits", dim=8, images=100, held=10, test=10, side=8, steps=3, batch_size=8,
        learning_rates=(1e-2,),
    ),
    "laptop": Config(),
    "pixels": Config(data="fashion-mnist", held=1000, test=2000, side=10, steps=160),
    "gpu": Config(device="cuda", dim=256, steps=3000, batch_size=128, learning_rates=(3e-4, 1e-3, 3e-3, 1e-2)),
    "paper": Config(
        data="fashion-mnist", device="cuda", dim=256, images=55_000, held=5000, test=10_000, side=28, steps=25_000,
        batch_size=128, trial=0.1, learning_rates=(3e-4, 1e-3, 2.5e-3, 1e-2),
    ),
}  # fmt: skip


def skips(claim: Claim, config: Config) -> bool:
    """Whether a claim is about the task that this data does not have."""
    return config.data != "digits" and claim.arm.startswith("pixels") != (config.data == "fashion-mnist")


class Silent(LMUMixer):
    """A mixer that adds nothing."""

    def _run(
        self, x: Tensor, state: dict[str, Tensor] | None, inside: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros_like(x), {}


def mean_of(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the true steps of each row."""
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return x.masked_fill(~inside[..., None], 0).sum(1) / lengths[:, None]


class Recurrent(nn.Module):
    """An LSTM, or the cell of an LMU, with the mean over time and a linear layer."""

    def __init__(self, cell: nn.LSTM | LMUCell, width: int, classes: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, L, F) to (B, classes)."""
        return self.head(mean_of(self.cell(x)[0], lengths))


class Transformer(nn.Module):
    """One pre-norm encoder layer on projected steps with sines for positions, the mean over time, a linear layer."""

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.embed, self.width = nn.Linear(features, width), width
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, L, F) to (B, classes)."""
        place = torch.arange(x.shape[1], device=x.device)
        angle = place[:, None] * 0.01 ** (torch.arange(self.width // 2, device=x.device) / (self.width // 2))
        h = self.embed(x) + torch.cat([angle.sin(), angle.cos()], 1)
        return self.head(mean_of(self.norm(self.layer(h, src_key_padding_mask=place >= lengths[:, None])), lengths))


def _built(name: str, config: Config, features: int, length: int, classes: int) -> nn.Module:
    dim = config.dim
    if name == LSTM:
        return Recurrent(nn.LSTM(features, 2 * dim, batch_first=True), 2 * dim, classes)
    if name == LMU:
        return Recurrent(LMUCell(features, 3 * dim, 4 * dim, theta=length), 3 * dim, classes)
    if name == TRANSFORMER:
        return Transformer(features, 3 * dim // 2, classes)
    model = LMUFormer(
        features, classes, dim, config.depth, theta=length, spiking=name in (SPIKING, ATTENTION),
        causal_conv=name == CAUSAL, attention_heads=4 if name == ATTENTION else None,
    )  # fmt: skip
    if name == BARE:
        for block in model.block:
            block.attn = Silent(dim, theta=length)
            block.attn.requires_grad_(False)
    return model


@dataclass(frozen=True)
class _Task:
    """Padded sequences (N, L, F), lengths and labels, of three parts; and the window of the memory."""

    train: tuple[Tensor, Tensor, Tensor]
    held: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    theta: int
    classes: int


def _log_mel(waves: Sequence[Tensor], rate: int) -> list[Tensor]:
    """40 bands, windows of 32 ms, a frame every 16 ms."""
    from transformers.audio_utils import mel_filter_bank

    bank = torch.from_numpy(mel_filter_bank(129, 40, 50.0, 4000.0, rate)).float()
    window = torch.hann_window(256)
    return [
        (torch.stft(wave, 256, 128, window=window, return_complex=True).abs().square().mT @ bank + 1e-6).log()
        for wave in waves
    ]


def _split(config: Config, x: Tensor, lengths: Tensor, y: Tensor, test: tuple[Tensor, ...], theta: int) -> _Task:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, train = order[: config.held], order[config.held :]
    inside = torch.arange(x.shape[1]) < lengths[train, None]
    mean, deviation = x[train][inside].mean(0), x[train][inside].std(0) + 1e-3

    def part(x: Tensor, lengths: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ((x - mean) / deviation).to(config.device), lengths.to(config.device), y.to(config.device)

    trained, chosen = (part(x[i], lengths[i], y[i]) for i in (train, held))
    tested = part(*(t[: config.test] for t in test))
    return _Task(trained, chosen, tested, theta, int(y.max()) + 1)


def _speech(config: Config) -> _Task:
    raw = datasets.load(config.data)
    if isinstance(raw, datasets.Sounds):
        # the publisher's test recordings, in an order that mixes digits and speakers
        order = torch.randperm(len(raw.test), generator=torch.Generator().manual_seed(0)).tolist()
        frames = [_log_mel(part, raw.rate) for part in (raw.train, [raw.test[i] for i in order])]
        labels = raw.train_y, raw.test_y[order]
    else:
        frames = [list(part.float().squeeze(1)) for part in (raw.train_x, raw.test_x)]
        labels = raw.train_y, raw.test_y
    padded = nn.utils.rnn.pad_sequence(frames[0] + frames[1], batch_first=True)
    lengths = torch.tensor([len(f) for part in frames for f in part])
    cut = len(frames[0])
    # the window of the memory is that of nearly all recordings, not of the longest
    theta = int(lengths[:cut].float().quantile(0.95))
    return _split(config, padded[:cut], lengths[:cut], labels[0], (padded[cut:], lengths[cut:], labels[1]), theta)


def _pixels(config: Config) -> _Task:
    raw = datasets.load(config.data)
    if not isinstance(raw, datasets.Images):
        raise ValueError(f"data must be images to be read as pixels, got {config.data!r}")
    count = config.side**2
    disorder = torch.randperm(count, generator=torch.Generator().manual_seed(0))

    def sequence(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x.float(), config.side).flatten(1)[:, disorder, None]

    chosen = torch.randperm(len(raw.train_x), generator=torch.Generator().manual_seed(1))[: config.images + config.held]
    x, test = sequence(raw.train_x[chosen]), sequence(raw.test_x)
    whole, tested = (torch.full((len(part),), count) for part in (x, test))
    return _split(config, x, whole, raw.train_y[chosen], (test, tested, raw.test_y), count)


def _accuracy(model: nn.Module, part: tuple[Tensor, Tensor, Tensor], share: float = 1.0) -> float:
    """Of sequences that end after this share of theirs, as if nothing came after."""
    model.eval()
    right = 0.0
    with torch.no_grad():
        for x, lengths, y in zip(*(t.split(100) for t in part), strict=True):
            seen = (lengths * share).ceil().long().clamp(min=1)
            right += float((model(x[:, : int(seen.max())], seen).argmax(1) == y).sum())
    return right / len(part[0])


def arms(config: Config) -> Mapping[str, Arm]:
    """Every network on the task that the data has."""
    found: dict[str, Arm] = {}
    if config.data != "fashion-mnist":
        found |= _arms(config, _speech(config), SPEECH, "")
    if config.data != "spoken-digits":
        found |= _arms(config, _pixels(config), PIXELS, "pixels: ")
    return found


def _arms(config: Config, task: _Task, names: Sequence[str], prefix: str) -> Mapping[str, Arm]:
    def loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        x, lengths, y = batch
        return F.cross_entropy(model(x[:, : int(lengths.max())], lengths), y)

    def trained(name: str, share: float, lr: float, seed: int, progress: Progress | None) -> tuple[nn.Module, float]:
        torch.manual_seed(seed)
        model = _built(name, config, task.train[0].shape[2], task.theta, task.classes)
        found = fit(
            model, tuple(t.cpu() for t in task.train), loss, steps=max(1, round(share * config.steps)),
            batch_size=config.batch_size, seed=seed, schedule="one_cycle", clip=1.0, device=config.device,
            optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.01), progress=progress,
        )  # fmt: skip
        return model, found.seconds

    def arm_of(name: str) -> Arm:
        # the arms that show what a part does are trained as the whole is
        tuned = OURS if name in (CAUSAL, BARE) else name

        def run(seed: int, progress: Progress) -> Mapping[str, Measurement]:
            def score(lr: float) -> float:
                return _accuracy(trained(tuned, config.trial, lr, 1000, None)[0], task.held)

            picked = progress.once(f"lr {prefix}{tuned}", lambda: pick_learning_rate(config.learning_rates, score))
            lr = picked["chosen"]
            model, seconds = trained(name, 1.0, lr, seed, progress)
            curve = [_accuracy(model, task.test, share) for share in SHARES]
            size = sum(p.numel() for p in model.parameters() if p.requires_grad)
            metrics = {"accuracy": curve[-1], "parameters": size, "seconds of training": seconds}
            if name in (OURS, SPIKING):
                x, lengths, _ = task.test
                # without padding: those that are long enough, cut to the length of the shortest quarter
                shortest = int(lengths.sort()[0][len(x) // 4])
                report = energy_report(model, x[lengths >= shortest][:50, :shortest])
                metrics["nanojoules a step"] = report.picojoules / 1000
                metrics["spike rate"] = report.spike_rate
            measured = Measurement(metrics, {"accuracy": (list(SHARES), curve)})
            if name != OURS or prefix:
                return {prefix + name: measured}
            return {OURS: measured, PART: Measurement({"accuracy": curve[SHARES.index(SHARE)]})}

        return run

    return {prefix + name: arm_of(name) for name in names}


_LOOKS = {
    OURS: ("#0072B2", "o-"), SPIKING: ("#56B4E9", "s-"), CAUSAL: ("#009E73", "^--"), BARE: ("#999999", "v:"),
    ATTENTION: ("#CC79A7", "D--"), TRANSFORMER: ("#D55E00", "x--"), LSTM: ("#000000", "+-."), LMU: ("#E69F00", "v--"),
}  # fmt: skip


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy against the part of the sequence that was seen, and at its end, seed by seed."""
    from matplotlib.figure import Figure

    prefixes = [p for p in ("", "pixels: ") if f"{p}{OURS}" in result.arms]
    figure = Figure(figsize=(11, 4.3 * len(prefixes)), layout="constrained")
    rows = figure.subplots(len(prefixes), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), prefix in zip(rows, prefixes, strict=True):
        names = [n for n in _LOOKS if f"{prefix}{n}" in result.arms]
        for place, name in enumerate(names):
            colour, style = _LOOKS[name]
            x, y = result.curve(f"{prefix}{name}", "accuracy")
            left.plot(100 * x, 100 * y.mean(0), style, color=colour, label=name, markersize=4, linewidth=1.3)
            values = 100 * result.values(f"{prefix}{name}", "accuracy")
            right.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3)
            right.plot(values, [place] * len(values), "o", color=colour, markersize=5)
        if not prefix:
            left.axvline(100 * SHARE, color="#999999", linewidth=0.8)
        left.set(xlabel="part of the sequence seen, %", ylabel="test accuracy, %")
        left.legend(frameon=False, fontsize=8)
        left.grid(alpha=0.3)
        kind = "permuted pixels" if prefix else "cut there as if that were the end"
        left.set_title(f"{result.config.data}, {kind}; mean of {len(result.seeds)} seeds", fontsize=10)
        right.set_yticks(range(len(names)), names)
        right.invert_yaxis()
        right.grid(axis="x", alpha=0.3)
        right.set(xlabel="test accuracy at the end, %; line = mean, dot = seed")
    return {"lmuformer": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']:g}" for key, value in result.tuned.items())
    frames = (
        f"{c.data}: 40 log-mel bands, windows of 32 ms, a frame every 16 ms, recordings at their own lengths; "
        "LMUFormer's convolutions look 5 frames (80 ms) ahead, those of the causal arm none. "
        if c.data == "spoken-digits"
        else f"{c.data}: {c.side} x {c.side} pixels in one fixed disorder, one a step. "
    )
    parts = (
        "'without memory' keeps LMUFormer's convolutions and feed-forward, 'spiking attention' is the official SSA in "
        "the place of the memory. "
        if c.data == "spoken-digits"
        else f"LMUFormer's memory has {c.dim} coefficients, the spiking one twice as many; 'LMU alone', one cell "
        f"with a read-out, has {4 * c.dim} of {c.side**2} pixels. "
    )
    return (
        f"{frames}{c.steps} steps of {c.batch_size} for every arm, AdamW, one-cycle, no augmentation; learning rate "
        f"from a grid of {len(c.learning_rates)}, by trials of {c.trial:g} of the steps on {c.held} held-out examples: "
        f"{rates}; arms that lack a part of LMUFormer take its rate. A part of a sequence is given to each network as "
        "if it ended there, so look-ahead is charged: no step behind the cut is seen. Every network averages its "
        f"features over time. {parts}nanojoules a step: 4.6 pJ a multiplication, 0.9 pJ an addition, counted, not "
        "measured. Seconds of training are those of a shared machine. "
        f"{c.test} test examples and {len(result.seeds)} seeds make wide intervals, and this is a small part of the "
        "paper's training (200 epochs of Speech Commands, 50 of psMNIST): above all neurons learn slower."
    )
