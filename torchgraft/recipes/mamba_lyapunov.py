"""Evidence for the stability of Mamba: exponents, growth of a change, and what low precision does, in training too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.language.mamba_lyapunov import (
    Tuning,
    finetune_stability,
    lyapunov_spectrum,
    mamba_lora_config,
    perturbation_growth,
    precision_divergence,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("shakespeare",)
MAMBA, TRANSFORMER, RNN, LSTM = "Mamba", "Transformer", "tanh RNN, gain 2", "LSTM"
WAYS = ("bf16", "bf16 + LoRA")


def _strays(text: str, metric: str, paper: str) -> Claim:
    return Claim(text, metric, MAMBA, TRANSFORMER, 0.1, direction="lower", paper=paper)


CLAIMS = (
    Claim(
        "The exponents of a trained Mamba are not positive", "exponent", MAMBA, 0.0, 0.0, direction="lower",
        paper="theorem",
    ),
    Claim(
        "A tanh network of large weights is chaotic before training", "exponent before training", RNN, 0.0, 0.0,
        paper="not in the paper",
    ),
    Claim(
        "A change of Mamba's state is gone after 32 tokens (slowest state of all)", "state left after 32", MAMBA, 0.5,
        0.0, direction="lower", paper="in words: decays exponentially",
    ),
    Claim(
        "A change of the input leaves less behind in Mamba than in the Transformer", "input left after 32", MAMBA,
        TRANSFORMER, 0.01, direction="lower", paper="not compared",
    ),
    _strays(
        "In bfloat16 Mamba strays less from float32 (log10 of the KL divergence)", "log10 KL in bf16",
        "in words: markedly smaller",
    ),
    _strays(
        "Fine-tuned in bfloat16 it strays less from its twin in float32 (log10 KL)", "log10 KL after bf16",
        "in words: markedly smaller, never drastic",
    ),
    _strays(
        "and with LoRA, too (log10 KL)", "log10 KL after bf16 + LoRA", "in words: the Transformer is off with LoRA too",
    ),
    Claim(
        "The loss after fine-tuning in bfloat16 is that of float32 (nats)", "loss off after bf16", MAMBA, 0.0, 0.01,
        direction="equal", paper="in words: close to full precision",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many.
        data: ``shakespeare``, or ``built-in`` (our questions) where there is none.
        device: where to train.
        width, depth, state, length: of Mamba and of sequences; the Transformer is made as large as Mamba.
        steps, batch_size: of training, on the first half of the text.
        learning_rates, trial: the grid of every arm, and the share of the steps that its trials take.
        tune_steps, tune_lr, lora_lr: fine-tuning on the second half.
        tested: sequences for losses and divergences.
    """

    seeds: int = 3
    data: str = "shakespeare"
    device: str = "cpu"
    width: int = 48
    depth: int = 2
    state: int = 8
    length: int = 64
    steps: int = 200
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    trial: float = 0.25
    tune_steps: int = 40
    tune_lr: float = 1e-3
    lora_lr: float = 3e-3
    tested: int = 16


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", width=16, depth=1, state=4, length=40, steps=2, batch_size=2,
        learning_rates=(3e-3,), tune_steps=1, tested=2,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", width=512, depth=8, state=16, length=256, steps=2000, batch_size=64,
        learning_rates=(3e-4, 1e-3, 3e-3), tune_steps=500, tested=64,
    ),
}  # fmt: skip


class Recurrent(nn.Module):
    """Characters through a recurrent network of torch."""

    def __init__(self, kind: str, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.net: nn.RNNBase = nn.LSTM(width, width, batch_first=True) if kind == LSTM else nn.RNN(
            width, width, batch_first=True
        )  # fmt: skip
        self.head = nn.Linear(width, vocabulary)
        if kind == RNN:
            nn.init.normal_(self.net.all_weights[0][1], std=2 * width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        return self.head(self.net(self.embedding(ids))[0])


def _text(config: Config) -> tuple[Tensor, Tensor, int]:
    if config.data == "built-in":
        found = datasets.load("questions")
        assert isinstance(found, datasets.MultipleChoice)
        text = " ".join(q.question for q in found.items)
    else:
        text_set = datasets.load(config.data)
        if not isinstance(text_set, datasets.Text):
            raise ValueError(f"data must be text, got {config.data!r}; use 'shakespeare' or 'built-in'")
        text = text_set.train
    letters = {c: k for k, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    rows = ids[: len(ids) // config.length * config.length].view(-1, config.length)
    return rows[: len(rows) // 2], rows[len(rows) // 2 :], len(letters)


def _model(name: str, config: Config, vocabulary: int, seed: int) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "hidden_size": config.width, "num_hidden_layers": config.depth, "vocab_size": vocabulary, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    if name == MAMBA:
        return MambaForCausalLM(MambaConfig(state_size=config.state, **shared))
    if name == TRANSFORMER:
        # 4 D^2 of attention and as many of the feed-forward layers as bring it to Mamba's number of parameters
        wide = sum(p.numel() for n, p in _model(MAMBA, config, vocabulary, seed).named_parameters() if "layers" in n)
        inner = max(config.width, round((wide / config.depth - 4 * config.width**2) / (2 * config.width)))
        heads = max(1, config.width // 16)
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(num_attention_heads=heads, intermediate_size=inner, tie_word_embeddings=True, **shared)
        )
    return Recurrent(name, vocabulary, config.width)


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    if isinstance(model, Recurrent):
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def _exponent(model: nn.Module, name: str, ids: Tensor) -> float:
    if name == MAMBA:
        return lyapunov_spectrum(model, ids).max
    assert isinstance(model, Recurrent)
    with torch.no_grad():
        read = model.embedding(ids[:2])
    # the recurrence alone, read from the text
    return lyapunov_spectrum(model.net, inputs_embeds=read, method="tangent", burn_in=ids.shape[1] // 4).max


def arms(config: Config) -> Mapping[str, Arm]:
    """Each network, trained on one half of the text and, where it comes from transformers, fine-tuned on the other."""
    first, second, vocabulary = _text(config)

    def trained(name: str, seed: int, lr: float, steps: int, progress: Any) -> nn.Module:
        model = _model(name, config, vocabulary, seed)
        fit(
            model, (first,), lambda m, batch: _loss(m, batch[0]), steps=steps, batch_size=config.batch_size, seed=seed,
            device=config.device, progress=progress, schedule="one_cycle", clip=1.0,
            optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.01),
        )  # fmt: skip
        return model.eval()

    def arm_of(name: str) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            held = second[-config.tested :].to(config.device)

            def score(lr: float) -> float:
                model = trained(name, 1000, lr, max(1, round(config.trial * config.steps)), None)
                with torch.no_grad():
                    return -_loss(model, second[-2 * config.tested : -config.tested].to(config.device)).item()

            lr = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))["chosen"]
            model = trained(name, seed, lr, config.steps, progress)
            with torch.no_grad():
                metrics = {"loss": _loss(model, held).item()}
            curves: dict[str, tuple[list[float], list[float]]] = {}
            if name != TRANSFORMER:
                fresh = _model(name, config, vocabulary, seed).to(config.device)
                metrics["exponent before training"] = _exponent(fresh, name, held)
                metrics["exponent"] = _exponent(model, name, held)
            if name in (MAMBA, TRANSFORMER):
                at = config.length // 4
                places = [float(k) for k in range(config.length - at)]
                growth = perturbation_growth(model, held, 1e-3, at)
                curves["input"] = (places, growth.after.tolist())
                metrics["input left after 32"] = (growth.after[min(32, len(places) - 1)] / growth.after[0]).item()
                found = precision_divergence(model, [held], ("bf16", "fp16"))
                for dtype, divergence in found.items():
                    metrics[f"log10 KL in {dtype}"] = float(np.log10(divergence.kl[:-1].mean().item()))
                curves["kl"] = ([float(k) for k in range(config.length)], found["bf16"].kl.tolist())
                batches = _batches(second, config, seed)
                for way, lora, rate in (("bf16", None, config.tune_lr), ("bf16 + LoRA", _lora(name), config.lora_lr)):
                    pair = {dtype: Tuning(dtype, lora, rate) for dtype in ("fp32", "bf16")}
                    tuned = finetune_stability(lambda: copy.deepcopy(model), batches, held, pair, "fp32")
                    metrics[f"log10 KL after {way}"] = float(np.log10(tuned["bf16"].kl))
                    metrics[f"loss off after {way}"] = tuned["bf16"].loss - tuned["fp32"].loss
            extra: dict[str, Any] = {}
            if name == MAMBA:
                state = perturbation_growth(model, held, at=config.length // 4, where="state")
                after = state.deviation[:, config.length // 4 :]
                metrics["state left after 32"] = after[:, min(32, after.shape[1] - 1)].max().item()
                curves["state"] = (places, after.amax(0).tolist())
                report = lyapunov_spectrum(model, held)
                extra["decay times"] = torch.cat([layer.decay_times.flatten() for layer in report.layers]).tolist()
            return Measurement(metrics, curves=curves, extra=extra)

        return run

    return {name: arm_of(name) for name in (MAMBA, TRANSFORMER, RNN, LSTM)}


def _batches(rows: Tensor, config: Config, seed: int) -> list[Tensor]:
    order = torch.randperm(len(rows) - 2 * config.tested, generator=torch.Generator().manual_seed(seed))
    chosen = rows[order[: config.tune_steps * config.batch_size]].to(config.device)
    return list(chosen.split(config.batch_size))


def _lora(name: str) -> Callable[[nn.Module], Any]:
    def of_transformer(model: nn.Module) -> Any:
        from peft import LoraConfig

        names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        return LoraConfig(r=8, lora_alpha=32, target_modules=names)

    return of_transformer if name == TRANSFORMER else lambda model: mamba_lora_config(model, "buffers", dropout=0.0)


_COLOURS = {MAMBA: "#D55E00", TRANSFORMER: "#0072B2", RNN: "#999999", LSTM: "#009E73"}


def figures(result: Result) -> Mapping[str, Figure]:
    """Exponents, what is left of a change, divergence by position, and how long Mamba's states remember."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    exponents, left, kl, times = figure.subplots(1, 4)
    for place, name in enumerate((MAMBA, LSTM, RNN)):
        for offset, metric, mark in ((-0.1, "exponent before training", "o"), (0.1, "exponent", "s")):
            values = result.values(name, metric)
            exponents.plot(values, [place + offset] * len(values), mark, color=_COLOURS[name], markersize=5)
    exponents.axvline(0, color="grey", linewidth=0.8)
    exponents.set_yticks(range(3), (MAMBA, LSTM, "tanh RNN,\ngain 2"))
    exponents.invert_yaxis()
    exponents.set(xlabel="maximal exponent (circle: before, square: after training)")
    for name in (MAMBA, TRANSFORMER):
        x, y = result.curve(name, "input")
        left.semilogy(x, y.mean(0), color=_COLOURS[name], label=f"{name}, input")
        x, y = result.curve(name, "kl")
        kl.semilogy(x[:-1], y.mean(0)[:-1], color=_COLOURS[name], label=name)
    x, y = result.curve(MAMBA, "state")
    left.semilogy(x, y.mean(0), "--", color=_COLOURS[MAMBA], label="Mamba, slowest state")
    left.set(xlabel="tokens after the change", ylabel="deviation / change")
    kl.set(xlabel="position", ylabel="KL(float32 || bfloat16)")
    for axes in (left, kl):
        axes.legend(frameon=False, fontsize=8)
    found = np.concatenate([m.extra["decay times"] for m in result.measurements[MAMBA].values()])
    times.hist(np.log10(found), bins=30, color=_COLOURS[MAMBA])
    times.set(xlabel="log10 of tokens until an error is 1/e", ylabel="states")
    for axes in (exponents, left, kl, times):
        axes.grid(alpha=0.3)
    return {"mamba_lyapunov": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = ", ".join(f"{key.removeprefix('lr ')} {value['chosen']:g}" for key, value in result.tuned.items())
    losses = ", ".join(f"{name} {result.values(name, 'loss').mean():.2f}" for name in result.arms)
    lost = ", ".join(
        f"{name} {way} {result.values(name, f'loss off after {way}').mean():+.4f}"
        for name in (MAMBA, TRANSFORMER)
        for way in WAYS
    )
    return (
        f"Characters of {c.data}, sequences of {c.length}, width {c.width}, {c.depth} layers, {c.steps} steps of "
        f"{c.batch_size} on the first half; the Transformer (GPT-NeoX) has as many parameters as Mamba, the recurrent "
        f"networks have one layer. Learning rates by trials of {c.trial:g} of the steps over a grid of "
        f"{len(c.learning_rates)}: {rates}. Loss on the second half, nats a character: {losses}. Exponents are over "
        f"{c.tested} sequences of the second half: Mamba's from its own decays, others' by tangents along the text. "
        "The input's change is of 1e-3 in one embedding and measured at the last layer, in the whole network; the "
        "state's is that of the slowest state with all else the same. Divergences are of autocast on this machine, "
        f"which leaves more in float32 than a GPU does. Fine-tuning: {c.tune_steps} steps of {c.batch_size} on the "
        f"second half in the same order, AdamW {c.tune_lr:g} ({c.lora_lr:g} with LoRA, r 8), each against its twin in "
        f"float32; losses less float32's: {lost}. The "
        "paper fine-tunes pretrained models of 130 M to 2.8 B parameters and compares benchmark scores, which is out "
        "of reach here."
    )
