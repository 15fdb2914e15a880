"""Evidence for power quantization: a CIFAR-10 network, a sentence encoder and a language model at 4, 3 and 2 bits."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from torchgraft import datasets, zoo
from torchgraft.compression.nupes import (
    PowerQuantConfig,
    codebook_round,
    dequantize_model,
    normal_float_levels,
    quantize_model,
)
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("cifar10", "sst2", "wikitext2")
UNIFORM, POWER, NORMAL, HALF = "uniform", "power", "normal float", "power of 1/2"
ADAROUND, AROUND_POWER = "AdaRound", "AdaRound on the power grid"
CODES, EXPONENT, BOTH = "NUPES, codes alone", "NUPES, exponent alone", "NUPES"
DATA_FREE, LEARNED = (UNIFORM, POWER, NORMAL), (ADAROUND, AROUND_POWER, CODES, EXPONENT, BOTH)
CHANNEL, GROUP = "channel", "group"
FLOAT = "float"


def _points(text: str, bits: int, arm: str, against: str, effect: float, paper: str) -> Claim:
    return Claim(
        text, "accuracy", f"resnet20 W{bits} {arm}", f"resnet20 W{bits} {against}", effect, unit="points",
        factor=100, paper=paper,
    )  # fmt: skip


def _nats(text: str, bits: int, scale: str, against: str) -> Claim:
    return Claim(
        text, "nats a token", f"SmolLM2 W{bits} {scale} {POWER}", f"SmolLM2 W{bits} {scale} {against}", 0.01,
        direction="lower", unit="nats", paper="in words: better than uniform W4A16 on LLMs (not checked)",
    )  # fmt: skip


CLAIMS = (
    _points("Without data, the power grid beats the uniform one at 3 bits", 3, POWER, UNIFORM, 1,
            "data-free W4A4 ResNet-50 near 70 % against 76.15 % in float (not checked)"),
    _points("Without data, the power grid beats the uniform one at 4 bits", 4, POWER, UNIFORM, 0.2,
            "data-free W4A4 ResNet-50 near 70 % against 76.15 % in float (not checked)"),
    _points("The power grid beats a normal-float codebook at 3 bits", 3, POWER, NORMAL, 1, "not compared"),
    _points("NUPES beats AdaRound at 3 bits", 3, BOTH, ADAROUND, 0.2, "better than AdaRound (numbers not checked)"),
    _points("NUPES beats AdaRound at 2 bits", 2, BOTH, ADAROUND, 0.5, "better than AdaRound (numbers not checked)"),
    _points("NUPES beats AdaRound on the same power grid at 3 bits", 3, BOTH, AROUND_POWER, 0.2,
            "in words: the whole quantized space"),
    _points("Learning the exponent adds to learning the codes at 3 bits", 3, BOTH, CODES, 0.2,
            "in words: both are learned"),
    Claim("NUPES at 3 bits is within 2 points of float", "below float", f"resnet20 W3 {BOTH}", 0.0, 2,
          direction="equal", unit="points", factor=100, paper="not compared at this size"),
    Claim("Sentence embeddings of MiniLM stay closer to float on the power grid, 4 bits a channel", "cosine",
          f"MiniLM W4 {CHANNEL} {POWER}", f"MiniLM W4 {CHANNEL} {UNIFORM}", 0.002, paper="not compared"),
    Claim("and than with a normal-float codebook", "cosine", f"MiniLM W4 {CHANNEL} {POWER}",
          f"MiniLM W4 {CHANNEL} {NORMAL}", 0.002, paper="not compared"),
    _nats("SmolLM2 loses less on the power grid than on the uniform one, 4 bits a channel", 4, CHANNEL, UNIFORM),
    _nats("SmolLM2 loses less on the power grid than on the uniform one, 4 bits in groups", 4, GROUP, UNIFORM),
    _nats("SmolLM2 loses less on the power grid than on the uniform one, 3 bits in groups", 3, GROUP, UNIFORM),
    _nats("SmolLM2 loses less on the power grid than with a normal-float codebook, 4 bits in groups", 4, GROUP, NORMAL),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: of the order of calibration batches in the learned arms. Each tests on its own equal share of the test
            images, so that all seeds together see all of them once; nothing else depends on a seed.
        data: real, or ``built-in`` (random images, tokens and weights), for where there is no data.
        device: where to run.
        bits: of the CIFAR-10 network, data-free.
        learned_bits: at which the arms of ``learned`` run; at 2 only NUPES and AdaRound.
        learned: arms that learn.
        ends: bits of its first and last layer, in every arm.
        calibration: training images to learn on, without labels.
        validation: other training images, on whose logits the learning rate is chosen.
        steps: of the reconstruction of each block, for AdaRound and NUPES alike.
        batch_size: of a step.
        learning_rates: the grid that every learned arm climbs, from a start near its best, until neither neighbour is
            better. An exponent that is learned beside codes has a tenth.
        test_images: 0 takes the whole test set.
        sentences: of SST-2's test part, for MiniLM.
        window, windows: tokens of WikiText-2's test text, for SmolLM2.
        encoder_bits: of MiniLM, with a scale for each channel; those in ``group_bits`` in groups too.
        channel_bits: of SmolLM2 with a scale for each channel.
        group_bits: of both language models in groups.
        group_size: columns that share a scale in the arms named ``group``.
    """

    seeds: int = 3
    data: str = "cifar10, sst2, wikitext2"
    device: str = "cpu"
    bits: tuple[int, ...] = (4, 3, 2)
    learned_bits: tuple[int, ...] = (3,)
    learned: tuple[str, ...] = (ADAROUND, CODES, BOTH)
    ends: int = 8
    calibration: int = 96
    validation: int = 200
    steps: int = 32
    batch_size: int = 8
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    test_images: int = 0
    sentences: int = 100
    window: int = 256
    windows: int = 4
    encoder_bits: tuple[int, ...] = (8, 4, 3)
    channel_bits: tuple[int, ...] = (4,)
    group_bits: tuple[int, ...] = (4, 3)
    group_size: int = 128


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", learned=LEARNED, calibration=8, validation=4, steps=2, batch_size=4,
        learning_rates=(0.1,), test_images=8, sentences=4, window=8, windows=1, group_size=16,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", learned=LEARNED, calibration=1024, steps=2000, batch_size=32,
        learning_rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3), sentences=999, window=1024, windows=63,
        channel_bits=(4, 3),
    ),
    "paper": Config(
        device="cuda", learned=LEARNED, calibration=1024, steps=10_000, batch_size=32,
        learning_rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1), sentences=999, window=2048, windows=120,
        learned_bits=(4, 3, 2), channel_bits=(4, 3),
    ),
}  # fmt: skip


def _built_in(config: Config) -> bool:
    return config.data == "built-in"


@lru_cache(maxsize=1)
def _images(config: Config) -> dict[str, tuple[Tensor, Tensor]]:
    """Normalised images and labels: calibration, validation (both from training images) and test."""
    if _built_in(config):
        made = torch.Generator().manual_seed(0)
        some = torch.rand(2 * config.calibration + config.test_images, 3, 32, 32, generator=made)
        x, y = zoo.CifarResNet.normalize(some), torch.arange(len(some)) % 10
        cut = 2 * config.calibration
        found = {"calibration": (x[: config.calibration],) * 2, "test": (x[cut:], y[cut:])}
        return {**found, "validation": (x[config.calibration : cut], y[config.calibration : cut])}
    images = datasets.load("cifar10")
    assert isinstance(images, datasets.Images)
    chosen = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(0))
    parts = {
        "calibration": (images.train_x, images.train_y, chosen[: config.calibration]),
        "validation": (images.train_x, images.train_y, chosen[config.calibration :][: config.validation]),
        "test": (images.test_x, images.test_y, torch.arange(config.test_images or len(images.test_x))),
    }
    return {k: (zoo.CifarResNet.normalize(x[i].float() / 255), y[i]) for k, (x, y, i) in parts.items()}


@lru_cache(maxsize=1)
def _resnet(config: Config) -> Any:
    if not _built_in(config):
        return zoo.load("resnet20-cifar10", device=config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return zoo.CifarResNet(8, 10).eval()


def _logits(model: nn.Module, x: Tensor, config: Config) -> Tensor:
    # on a CPU 25 images and what they become fit its cache
    size = 25 if torch.device(config.device).type == "cpu" else 500
    with torch.no_grad():
        parts = [model(b.to(config.device, memory_format=torch.channels_last)).cpu() for b in x.split(size)]
    return torch.cat(parts)


def _right(model: nn.Module, part: tuple[Tensor, Tensor], config: Config) -> np.ndarray:
    """1 for each image that is classified right, by the weights that the packed codes stand for."""
    x, y = part
    model = copy.deepcopy(model)
    if hasattr(model, "power_quant_config"):
        dequantize_model(model)
    for block in model.modules():
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(block, conv):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())
    return (_logits(model, x, config).argmax(1) == y).double().numpy()


def skips(claim: Claim, config: Config) -> bool:
    """Whether a claim is about an arm that this configuration leaves out."""
    return AROUND_POWER in str(claim.against) and AROUND_POWER not in config.learned


def _normal_float(model: nn.Module, bits: Callable[[str], int], group_size: int | None, skip: str = "lm_head") -> None:
    """Linear and convolution weights at the nearest level of a normal-float codebook, in place."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name != skip:
            levels = normal_float_levels(bits(name))
            module.weight.data = codebook_round(module.weight.detach(), levels, group_size)


ENDS = ("conv1", "linear")


def _quantized_resnet(config: Config, bits: int, kind: str, seed: int = 0, lr: float = 0.0) -> Any:
    model = copy.deepcopy(_resnet(config))
    ends = dict.fromkeys(ENDS, config.ends)
    if kind == FLOAT:
        return model
    if kind == NORMAL:
        _normal_float(model, lambda name: ends.get(name, bits), None)
        return model
    settings: dict[str, Any] = {"weight_bits": bits, "module_bits": ends}
    if kind in (UNIFORM, ADAROUND):
        settings["exponent"] = 1.0
    if kind in (EXPONENT, BOTH):
        settings["exponent"] = "learn"
    if kind in LEARNED:
        settings |= {
            "method": "adaround" if kind in (ADAROUND, AROUND_POWER) else "nupes", "learn_codes": kind != EXPONENT,
            "seed": 100 * seed, "steps": config.steps, "batch_size": config.batch_size, "lr_codes": lr,
            "lr_exponent": lr if kind == EXPONENT else lr / 10,
        }  # fmt: skip
    calibration = None
    if kind in LEARNED:
        calibration = _images(config)["calibration"][0].to(config.device, memory_format=torch.channels_last)
    return quantize_model(model, PowerQuantConfig(**settings), calibration)


@cache
def _data_free_right(config: Config, bits: int, kind: str) -> np.ndarray:
    return _right(_quantized_resnet(config, bits, kind), _images(config)["test"], config)


@cache
def _float_logits(config: Config) -> Tensor:
    return _logits(_resnet(config), _images(config)["validation"][0], config)


def _climb(grid: Sequence[float], start: float, score: Callable[[float], float]) -> dict[str, Any]:
    """The rate of a grid that neither neighbour betters, as ``pick_learning_rate`` gives it."""
    tried: dict[int, float] = {}
    here = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / start)))
    while True:
        for i in (here - 1, here, here + 1):
            if 0 <= i < len(grid) and i not in tried:
                tried[i] = score(grid[i])
        best = max((i for i in tried if abs(i - here) <= 1), key=lambda i: tried[i])
        if best == here:
            return {"chosen": grid[here], "scores": {str(grid[i]): tried[i] for i in sorted(tried)}}
        here = best


# where earlier runs over wide grids found the best of each arm; AdaRound learns in logits, not in codes
START = {ADAROUND: 0.1, AROUND_POWER: 0.1, CODES: 0.03, EXPONENT: 0.03, BOTH: 0.03}


def _resnet_arm(config: Config, bits: int, kind: str, seed: int, progress: Progress) -> Measurement:
    plain = _data_free_right(config, 32, FLOAT)
    if kind not in LEARNED:
        right = _data_free_right(config, bits, kind)
        metrics = {"accuracy": right.mean(), "below float": (plain - right).mean()}
        return Measurement(metrics, examples={"accuracy": right.tolist()})

    def score(lr: float) -> float:
        tried = _quantized_resnet(config, bits, kind, 1000, lr)
        x = _images(config)["validation"][0]
        return -float((_logits(tried, x, config) - _float_logits(config)).square().mean())

    picked = progress.once(f"lr W{bits} {kind}", lambda: _climb(config.learning_rates, START[kind], score))
    model = _quantized_resnet(config, bits, kind, seed, picked["chosen"])
    x, y = _images(config)["test"]
    size = len(x) // config.seeds
    # the last seed takes what is left over
    mine = slice(seed * size, (seed + 1) * size if seed + 1 < config.seeds else None)
    right = _right(model, (x[mine], y[mine]), config)
    history = model.power_quant_history
    extra: dict[str, Any] = {
        "images": len(right),
        "start": [h.start for h in history.values()], "end": [h.end for h in history.values()],
        "moved": float(np.mean([h.moved for h in history.values()])),
        "moved far": float(np.mean([h.moved_far for h in history.values()])),
        "exponents": [a for h in history.values() for found in h.exponents.values() for a in found],
    }  # fmt: skip
    metrics = {"accuracy": right.mean(), "below float": (plain[mine] - right).mean()}
    return Measurement(metrics, extra=extra)


@lru_cache(maxsize=1)
def _minilm(config: Config) -> tuple[Any, list[dict[str, Tensor]]]:
    """The encoder and its inputs, in batches."""
    if _built_in(config):
        from transformers import BertConfig, BertModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = BertModel(BertConfig(vocab_size=50, **shape)).eval()
        ids = torch.arange(7 * config.sentences).reshape(-1, 7) % 50
        return model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    model, tokenizer = zoo.load("minilm", device=config.device)
    sentences = datasets.load("sst2")
    assert isinstance(sentences, datasets.Sentences)
    texts = sorted(sentences.test[: config.sentences], key=len)
    batches = [texts[i : i + 25] for i in range(0, len(texts), 25)]
    return model, [dict(tokenizer(b, padding=True, return_tensors="pt").to(config.device)) for b in batches]


def _embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    found = []
    with torch.no_grad():
        for batch in batches:
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def _rounded(model: nn.Module, config: Config, bits: int, scale: str, kind: str) -> tuple[Any, float]:
    """A copy of a language model with rounded weights, and the seconds of processor time that this took."""
    model = copy.deepcopy(model)
    group = config.group_size if scale == GROUP else None
    if kind == NORMAL:
        _normal_float(model, lambda _: bits, group)
        return model, 0.0
    exponent: Any = {UNIFORM: 1.0, HALF: 0.5, POWER: "search"}[kind]
    settings = PowerQuantConfig(weight_bits=bits, granularity="layer", group_size=group, exponent=exponent)
    began = time.process_time()
    quantize_model(model, settings)
    seconds = time.process_time() - began
    # what the packed codes stand for, decoded once and not for every batch
    return dequantize_model(model), seconds


@lru_cache(maxsize=1)
def _minilm_plain(config: Config) -> Tensor:
    return _embeddings(*_minilm(config))


@cache
def _minilm_found(config: Config, bits: int, scale: str, kind: str) -> tuple[np.ndarray, float, float]:
    """Cosines with the float embeddings; Spearman's correlation of pair similarities; squared error of the weights."""
    from scipy.stats import spearmanr

    model, batches = _minilm(config)
    rounded, _ = _rounded(model, config, bits, scale, kind)
    plain, found = _minilm_plain(config), _embeddings(rounded, batches)
    upper = torch.triu_indices(len(plain), len(plain), 1)
    similarities = [(e @ e.t())[upper[0], upper[1]].cpu().numpy() for e in (plain, found)]
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    kept = {n: (model.get_submodule(n).weight.detach(), rounded.get_submodule(n).weight.detach()) for n in names}
    loss = sum(float((w - found).square().sum()) for w, found in kept.values())
    cosines = (plain * found).sum(1).double().cpu().numpy()
    return cosines, float(spearmanr(*similarities).statistic), loss


def _minilm_arm(config: Config, bits: int, scale: str, kind: str, seed: int, progress: Progress) -> Measurement:
    cosines, rank, error = _minilm_found(config, bits, scale, kind)
    error /= _minilm_found(config, bits, scale, UNIFORM)[2]
    metrics = {"cosine": cosines.mean(), "rank correlation": rank, "weight error, uniform = 1": error}
    return Measurement(metrics, examples={"cosine": cosines.tolist()})


@lru_cache(maxsize=1)
def _smollm(config: Config) -> tuple[nn.Module, Tensor]:
    """The language model and token windows."""
    count = config.window * config.windows
    if _built_in(config):
        from transformers import LlamaConfig, LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=True, **shape)).eval()
        return model, torch.arange(count).reshape(config.windows, -1) % 50
    model, tokenizer = zoo.load("smollm2-135m-instruct", device=config.device)
    text = datasets.load("wikitext2")
    assert isinstance(text, datasets.Text)
    # a token takes at least one character, and rarely more than eight
    ids = tokenizer(text.test[: 8 * count + 1000], return_tensors="pt").input_ids[0]
    return model, ids[:count].reshape(config.windows, config.window).to(config.device)


TORCHAO = "torchao int4"


@cache
def _smollm_found(config: Config, bits: int, scale: str, kind: str) -> tuple[np.ndarray, float]:
    """Negative log-likelihood of every token but each window's first, (windows, tokens); seconds of the search."""
    model, windows = _smollm(config)
    seconds = 0.0
    if kind == TORCHAO:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        model = copy.deepcopy(model)
        # groups must divide the columns there: 64 divides 576 and 1536
        settings = IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(16 if _built_in(config) else 64),
        )
        quantize_(
            model, settings,
            filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
        )  # fmt: skip
    elif kind != FLOAT:
        model, seconds = _rounded(model, config, bits, scale, kind)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
        nll = nn.functional.cross_entropy(logits.transpose(1, 2).float(), windows[:, 1:], reduction="none")
    return nll.double().cpu().numpy(), seconds


def _smollm_arm(config: Config, bits: int, scale: str, kind: str, seed: int, progress: Progress) -> Measurement:
    nll, seconds = _smollm_found(config, bits, scale, kind)
    metrics = {"nats a token": nll.mean(), "perplexity": math.exp(nll.mean())}
    return Measurement(metrics, examples={"nats a token": nll.flatten().tolist()}, extra={"seconds": seconds})


def arms(config: Config) -> Mapping[str, Arm]:
    """resnet20 at every number of bits and grid, learned arms, MiniLM and SmolLM2 by channel and by group."""
    made: dict[str, Arm] = {f"resnet20 {FLOAT}": partial(_resnet_arm, config, 32, FLOAT)}
    for bits in config.bits:
        # at 2 bits the levels are -m, 0 and m whatever the exponent
        for kind in DATA_FREE if bits > 2 else (UNIFORM,):
            made[f"resnet20 W{bits} {kind}"] = partial(_resnet_arm, config, bits, kind)
    for bits in sorted({*config.learned_bits, 2}, reverse=True):
        for kind in config.learned if bits in config.learned_bits else (ADAROUND, BOTH):
            made[f"resnet20 W{bits} {kind}"] = partial(_resnet_arm, config, bits, kind)
    by_group = [(bits, GROUP, DATA_FREE) for bits in config.group_bits]
    by_channel = [(b, CHANNEL, (*DATA_FREE, HALF) if b < 8 else (UNIFORM, POWER, HALF)) for b in config.encoder_bits]
    for bits, scale, kinds in by_channel + by_group:
        for kind in kinds:
            made[f"MiniLM W{bits} {scale} {kind}"] = partial(_minilm_arm, config, bits, scale, kind)
    made[f"SmolLM2 {FLOAT}"] = partial(_smollm_arm, config, 32, CHANNEL, FLOAT)
    for bits, scale, kinds in [(bits, CHANNEL, DATA_FREE) for bits in config.channel_bits] + by_group:
        for kind in kinds:
            made[f"SmolLM2 W{bits} {scale} {kind}"] = partial(_smollm_arm, config, bits, scale, kind)
    if _torchao():
        made[f"SmolLM2 W4 group of 64 {TORCHAO}"] = partial(_smollm_arm, config, 4, GROUP, TORCHAO)
    return made


def _torchao() -> bool:
    from importlib.util import find_spec

    return find_spec("torchao") is not None


_COLOURS = {
    UNIFORM: "#777777", POWER: "#D55E00", NORMAL: "#0072B2", ADAROUND: "#000000", AROUND_POWER: "#56B4E9",
    CODES: "#E69F00", EXPONENT: "#CC79A7", BOTH: "#009E73",
}  # fmt: skip


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy against bits, distance of sentence embeddings, and perplexity."""
    from matplotlib.figure import Figure

    config = result.config
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    marks = dict(zip(_COLOURS, "so^DdvpP", strict=True))
    quiet: Any = {"fontsize": 8, "color": "#777777"}
    bits = sorted({*config.bits, *config.learned_bits, 2}, reverse=True)
    for place, kind in enumerate(_COLOURS):
        held = [(i, f"resnet20 W{b} {kind}") for i, b in enumerate(bits) if f"resnet20 W{b} {kind}" in result.arms]
        if not held:
            continue
        values = [100 * result.values(arm, "accuracy") for _, arm in held]
        x = [i + 0.09 * (place - 3) for i, _ in held]
        for at, some in zip(x, values, strict=True):
            left.plot([at] * len(some), some, ".", color=_COLOURS[kind], markersize=3, alpha=0.6)
        means = [v.mean() for v in values]
        left.plot(x, means, marks[kind], color=_COLOURS[kind], label=kind, markersize=7, linestyle="none")
    reference = 100 * result.values(f"resnet20 {FLOAT}", "accuracy").mean()
    left.axhline(reference, color="#999999", linestyle=":", linewidth=1)
    left.text(0.98, reference, "float", transform=left.get_yaxis_transform(), ha="right", va="bottom", **quiet)
    left.set_xticks(range(len(bits)), [f"W{b}" for b in bits])
    left.set(ylabel="CIFAR-10 test accuracy, %", xlim=(-0.5, len(bits) - 0.5))
    left.set_title("resnet20; small dots: seeds of what is learned", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    by_group = [(b, GROUP) for b in config.group_bits]
    language = [(b, CHANNEL) for b in config.channel_bits] + by_group
    encoder = [(b, CHANNEL) for b in config.encoder_bits if b < 8] + by_group
    drawn = ((middle, "MiniLM", "cosine", encoder), (right, "SmolLM2", "perplexity", language))
    for ax, model, metric, groups in drawn:
        for place, kind in enumerate(DATA_FREE):
            found = [result.values(f"{model} W{b} {s} {kind}", metric)[0] for b, s in groups]
            height = [1 - v if metric == "cosine" else v for v in found]
            x = [i + 0.2 * (place - 1) for i in range(len(groups))]
            ax.plot(x, height, marks[kind], color=_COLOURS[kind], label=kind, linestyle="none", markersize=7)
        ax.set_yscale("log")
        ax.set_xticks(range(len(groups)), [f"W{b}\n{s}" for b, s in groups], fontsize=8)
    plain = result.values(f"SmolLM2 {FLOAT}", "perplexity")[0]
    right.axhline(plain, color="#999999", linestyle=":", linewidth=1)
    right.text(0.01, plain, "float", transform=right.get_yaxis_transform(), va="bottom", **quiet)
    name = f"SmolLM2 W4 group of 64 {TORCHAO}"
    if name in result.arms:
        level = result.values(name, "perplexity")[0]
        right.plot([language.index((4, GROUP)) + 0.4], [level], "x", color="#000000", label=f"{TORCHAO}, groups of 64")
    middle.set(ylabel="1 - cosine with the float embedding")
    middle.set_title("MiniLM sentence embeddings; lower is better", fontsize=10)
    right.set(ylabel="perplexity, WikiText-2 test")
    right.set_title("SmolLM2-135M; lower is better", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for ax in (left, middle, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3)
    return {"nupes": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    first = result.seeds[0]
    rates = "; ".join(f"{k.removeprefix('lr ')} {v['chosen']:g}" for k, v in sorted(result.tuned.items()))
    main = result.measurements[f"resnet20 W{c.learned_bits[0]} {BOTH}"]
    learned = main[first].extra
    around = result.measurements[f"resnet20 W{c.learned_bits[0]} {ADAROUND}"][first].extra
    at_two = result.measurements[f"resnet20 W2 {BOTH}"][first].extra
    slowest = max(m[first].extra["seconds"] for m in result.measurements.values() if "seconds" in m[first].extra)
    why = (
        " Hardly a code went further than one, so at this budget a lead over AdaRound is one of the grid and of the "
        "annealed rounding, not of the larger space."
        if learned["moved far"] < 1e-3
        else ""
    )
    ends = {min(c.learning_rates), max(c.learning_rates)}
    at_end = [k.removeprefix("lr ") for k, v in result.tuned.items() if v["chosen"] in ends]
    edges = f" Chosen at an end of the grid, so perhaps not the best: {'; '.join(at_end)}." if at_end else ""
    shares = [m.extra["images"] for m in main.values()]
    tokens = len(result.examples(f"SmolLM2 {FLOAT}", "nats a token"))
    return (
        f"resnet20: weights only, a scale for each output channel, first and last layer at {c.ends} bits in every arm, "
        f"the whole test set of {sum(shares)} images. Arms that learn nothing are measured once on all of it and "
        "compared by a paired bootstrap over images; of learned arms each seed has its own order of batches and tests "
        f"on its own share of {shares[0]} images (the same for every arm, so that pairs are of one seed and one "
        "share), and intervals are Student's over seeds. 'below float' is the accuracy of the float network on the "
        "same images less that of the arm. 'power' is one exponent for the network (PowerQuant); for MiniLM and "
        f"SmolLM2 one a layer. Learned arms: the same {c.calibration} training images without labels, {c.steps} steps "
        f"a block of {c.batch_size} images (the AdaRound paper takes 10,000 of 32), Adam on a cosine, every arm its "
        f"own rate from the grid {', '.join(map(str, c.learning_rates))} (exponents beside codes a tenth of it), "
        "the one that neither neighbour betters by the distance to the float logits of "
        f"{c.validation} other training images (chosen: {rates}).{edges} Accuracy is that of hard, packed codes. In "
        f"seed {first} at {c.learned_bits[0]} bits NUPES "
        f"moved {100 * learned['moved']:.1f} % of the codes ({100 * learned['moved far']:.2f} % by more than one) and "
        f"AdaRound {100 * around['moved']:.1f} %; learned exponents from {min(learned['exponents']):.2f} to "
        f"{max(learned['exponents']):.2f}.{why} At 2 bits NUPES moved {100 * at_two['moved']:.1f} %, "
        f"{100 * at_two['moved far']:.2f} % by more than one (from -m to m). Scales stay at the largest magnitude in "
        "every arm. At 2 bits the grid is -m, 0, m and an exponent only moves the threshold. A normal-float codebook "
        "has 2^b levels, uniform and power grids 2^b - 1. "
        f"SmolLM2: {tokens} tokens of the beginning of WikiText-2's test text in windows of {c.window}, intervals over "
        "tokens as if they were independent; its weights come from a 4-bit GGUF file where no other checkpoint is at "
        f"hand, so they lie on a 4-bit grid of groups of 32 already. Groups are of {c.group_size} columns. Searching "
        f"its exponents, one a layer, rounding and packing took at most {slowest:.1f} s of processor time; what loses "
        "least of the weights need not lose least likelihood, and a larger exponent may serve better there."
    )
