"""Evidence for SentinelLMs: accuracy on hashed sentences after fine-tuning, and what attackers read of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft import datasets, zoo
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.text.sentinel import (
    SentinelKey,
    SentinelTokenizer,
    adapt,
    frequency_attack,
    known_plaintext_attack,
    recovery_attack,
    toy_model,
    toy_reviews,
)
from torchgraft.text.sentinel.attacks import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("sst2", "wikitext2")
FROZEN_ATTACKS: tuple[Metric, ...] = ("l2", "cosine", "centered")
TUNED_ATTACKS: tuple[Metric, ...] = ("l2", "centered")
FAR_ATTACKS: tuple[Metric, ...] = (*TUNED_ATTACKS, "gram", "procrustes")
PLAIN, MIRRORED, HASHED, FAR = "plain", "hashed, mirrored only", "hashed", "hashed, far"
BRUTE = "frozen: hashes, original tokenizer"
MAJORITY, FROZEN = "majority class", "frozen: plain"
LM, LM_SHUFFLED, LM_GLIDED, LM_WRONG = (
    f"language model: {name}" for name in ("plain", "hashed, no glide", "hashed, two glides", "wrong key")
)
FREQUENCY = "reader: counts words"
NEAR_SHIFT, FAR_SHIFT = 1.0, 8.0


def frozen(shift: float, steps: int = 2) -> str:
    """The arm of a model with these glides and no fine-tuning."""
    return f"frozen: {steps} glides, translation {shift:g}"


def reader(known: int) -> str:
    """The arm of an attacker who has seen this many sentences beside their hashes."""
    return f"reader: {known} known sentences"


def _found(metric: str) -> str:
    return f"rows found by {metric}"


def _equal(text: str, metric: str, arm: str, against: str | float, effect: float, paper: str) -> Claim:
    return Claim(text, metric, arm, against, effect, direction="equal", unit="points", factor=100, paper=paper)


_PARITY = "parity, about a point either way (cells unverified)"
_HIDDEN = "near zero (cells unverified)"
CLAIMS = (
    _equal("A model that reads hashes is as accurate as the plain one after fine-tuning", "accuracy", HASHED, PLAIN,
           2, _PARITY),
    _equal("and so is one whose rows were mirrored but not moved", "accuracy", MIRRORED, PLAIN, 2, _PARITY),
    _equal("and so is one whose rows were moved as far as the script moves them", "accuracy", FAR, PLAIN, 2, _PARITY),
    Claim("A model moved that far and left frozen loses accuracy under a new head", "accuracy", frozen(FAR_SHIFT),
          FROZEN, 2, direction="lower", unit="points", factor=100, paper="not reported"),
    _equal("Hashes cut by the original tokenizer teach it nothing", "accuracy", BRUTE, MAJORITY, 3, "not reported"),
    _equal("The nearest row does not say which word it is", _found("l2"), HASHED, 0.0, 5, _HIDDEN),
    _equal("nor where rows were moved as far as the script moves them", _found("l2"), FAR, 0.0, 5, _HIDDEN),
    _equal("nor after the mean row is taken out of both tables", _found("centered"), FAR, 0.0, 5, "not tried"),
    _equal("nor by what no isometry changes", _found("gram"), FAR, 0.0, 5, "not tried"),
    _equal("nor with 50 known words", _found("procrustes"), FAR, 0.0, 5, "not tried"),
    Claim("Rows are harder to find after three glides than after one", _found("l2"), frozen(NEAR_SHIFT, 3),
          frozen(NEAR_SHIFT, 1), 5, direction="lower", unit="points", factor=100, paper="lower with more steps"),
    _equal("Who has seen sentences beside their hashes reads nothing of others", "tokens read", reader(1000), 0.0, 5,
           "not tried"),
    _equal("nor does who counts words", "tokens read", FREQUENCY, 0.0, 5, "not tried"),
    Claim("Without glides a Llama computes what it did", "loss", LM_SHUFFLED, LM, 1e-3, direction="equal",
          unit="nats a token", paper="encoders only"),
    Claim("With the wrong key it knows nothing of the text", "loss", LM_WRONG, LM, 1.0, unit="nats a token",
          paper="not reported"),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; each has its own passkey, head, order of sentences and windows of text.
        data: ``sst2``, or ``toy`` for made-up reviews.
        device: where to train.
        model, layers: encoder, a name of the zoo or a folder or ``toy``; how many of its layers are kept.
        language_model: the decoder, likewise.
        max_tokens: longer sentences are left out, so that nothing is cut off.
        train, held, test: sentences for training, for choosing learning rates, for the results.
        probe: sentences that the head of a frozen model is fitted to.
        steps, tune_steps, batch_size: of every fine-tuning, and of every trial of a learning rate.
        learning_rates: the grid of every arm.
        dropout: of all dropout layers while fine-tuning.
        head_rate: the new head's learning rate, as a multiple of the encoder's.
        shifts: translations of the frozen arms, in multiples of the embedding's own spread.
        sample: rows that each attack tries.
        known: numbers of sentences that the reader has seen.
        windows, window: pieces of text for the language model, and tokens in each.
    """

    seeds: int = 3
    data: str = "sst2"
    device: str = "cpu"
    model: str = "minilm"
    layers: int = 2
    language_model: str = "smollm2-135m-instruct"
    max_tokens: int = 16
    train: int = 768
    held: int = 300
    test: int = 400
    probe: int = 300
    steps: int = 80
    tune_steps: int = 25
    batch_size: int = 16
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    dropout: float = 0.0
    head_rate: float = 20.0
    shifts: tuple[float, ...] = (0.0, NEAR_SHIFT, 3.0, FAR_SHIFT)
    sample: int = 200
    known: tuple[int, ...] = (1, 10, 100, 1000)
    windows: int = 1
    window: int = 64


SCALES = {
    "smoke": Config(
        seeds=1, data="toy", model="toy", layers=1, language_model="toy", train=16, held=8, test=16, probe=12, steps=2,
        tune_steps=1, batch_size=8, learning_rates=(1e-3,), shifts=(NEAR_SHIFT, FAR_SHIFT), sample=20,
        windows=1, window=12,
    ),
    "laptop": Config(),
    "llama": Config(model="smollm2-135m-instruct"),
    "gpu": Config(
        device="cuda", model="google-bert/bert-base-uncased", layers=12, max_tokens=64, train=6000, held=800,
        test=1800, probe=2000, steps=560, tune_steps=140, batch_size=32, learning_rates=(1e-5, 3e-5, 1e-4, 3e-4),
        windows=32, window=512,
    ),
    "paper": Config(
        device="cuda", model="google-bert/bert-base-uncased", layers=12, max_tokens=128, train=6900, held=800,
        test=1800, probe=6000, steps=648, tune_steps=648, batch_size=32, dropout=0.1,
        learning_rates=(1e-5, 2e-5, 5e-5, 1e-4),
        windows=128, window=1024,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def _encoder(name: str, layers: int) -> tuple[Any, Any]:
    """The first layers of an encoder, or of a decoder without its head."""
    if name == "toy":
        model, tokenizer = toy_model("bert")
    elif name in zoo.MODELS:
        model, tokenizer = zoo.load(name)
    else:
        from transformers import AutoModel, AutoTokenizer

        model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    model = getattr(model, "base_model", model)
    if hasattr(model, "encoder"):
        model.encoder.layer = model.encoder.layer[:layers]
    else:
        model.layers = model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model.eval(), tokenizer


@lru_cache(maxsize=1)
def _decoder(name: str) -> tuple[Any, Any]:
    if name == "toy":
        return toy_model("llama", "ForCausalLM", tie_word_embeddings=True)
    if name in zoo.MODELS:
        return zoo.load(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


Labelled = tuple[Sequence[str], Tensor]


@lru_cache(maxsize=1)
def _sentences(config: Config) -> dict[str, Labelled]:
    """Sentences that fit, in the publisher's order; ``train``, ``held`` and ``test`` do not overlap."""
    if config.data == "toy":
        texts, labels = toy_reviews(4 * (config.train + config.held + config.test), 1)
        pools: dict[str, Labelled] = {"train": (texts, labels)}
    else:
        loaded = datasets.load(config.data)
        pools = {"train": (loaded.train, loaded.train_y), "test": (loaded.test, loaded.test_y)}
    _, tokenizer = _encoder(config.model, config.layers)

    def fitting(texts: Sequence[str], labels: Tensor) -> tuple[list[str], Tensor]:
        lengths = [len(row) for row in tokenizer(list(texts))["input_ids"]]
        rows = [i for i, length in enumerate(lengths) if length <= config.max_tokens]
        return [texts[i] for i in rows], labels[rows]

    fits = {name: fitting(*pool) for name, pool in pools.items()}
    texts, labels = fits["train"]
    cuts = {"train": slice(0, config.train), "held": slice(config.train, config.train + config.held)}
    found: dict[str, Labelled] = {name: (texts[cut], labels[cut]) for name, cut in cuts.items()}
    rest = slice(config.train + config.held, None)
    texts, labels = fits.get("test", (texts[rest], labels[rest]))
    found["test"] = (texts[: config.test], labels[: config.test])
    for name, (some, _) in found.items():
        if len(some) != getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)} sentences wanted, {config.data} has {len(some)} that fit")
    return found


class Classifier(nn.Module):
    """Mean of the last hidden states, standardised, and a linear layer.

    A translation makes all sentences' means alike but for a small part, which a head cannot learn from as it is.
    """

    def __init__(self, encoder: nn.Module, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.head = encoder, nn.Linear(width, 2)
        self.norm = nn.BatchNorm1d(width, affine=False, momentum=None)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Pooled hidden states."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of two classes."""
        return self.head(self.norm(self.features(ids, mask)))

    def settle(self, features: Tensor) -> None:
        """Standardise by these features, of training sentences, from now on; the running ones lag behind."""
        self.norm.reset_running_stats()
        self.norm.train()(features)
        self.norm.eval()


@dataclass(frozen=True)
class Made:
    """A model of an arm, how its texts become tensors, and the client (or none)."""

    encoder: Any
    tensors: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    client: SentinelTokenizer | None


def _key(seed: int) -> SentinelKey:
    return SentinelKey("the passkey of this evidence", context=str(seed).encode())


@lru_cache(maxsize=1)
def _made(config: Config, seed: int, kind: str, shift: float = NEAR_SHIFT, steps: int = 2) -> Made:
    """``kind``: ``plain``, ``hashed``, or ``brute``, where the plain tokenizer and model are given hashes."""
    base, tokenizer = _encoder(config.model, config.layers)
    client = SentinelTokenizer(tokenizer, _key(seed)) if kind != "plain" else None
    model, reads = base, tokenizer
    if kind == "hashed":
        model, reads, _ = adapt(base, tokenizer, _key(seed), steps, translation=shift)
    tensors = {}
    for name, (texts, labels) in _sentences(config).items():
        sent = client.encrypt_batch(list(texts)) if client is not None else list(texts)
        # a hash is about twenty pieces for a tokenizer that does not know it
        longest = 2 * config.max_tokens if kind == "brute" else config.max_tokens
        how = {"padding": "max_length", "truncation": True, "max_length": longest, "return_tensors": "pt"}
        inputs = reads(sent, **how)
        tensors[name] = (inputs["input_ids"], inputs["attention_mask"], labels)
    return Made(model, tensors, client)


@torch.no_grad()
def _in_batches(run: Any, ids: Tensor, mask: Tensor, device: str) -> Tensor:
    parts = zip(ids.split(64), mask.split(64), strict=True)
    return torch.cat([run(i.to(device), m.to(device)).cpu() for i, m in parts])


Tensors = tuple[Tensor, Tensor, Tensor]


def _accuracy(model: Classifier, tensors: Mapping[str, Tensors], part: str, device: str) -> float:
    model.eval()
    ids, mask, _ = (t[:128] for t in tensors["train"])
    model.settle(_in_batches(model.features, ids, mask, device).to(device))
    ids, mask, labels = tensors[part]
    return float((_in_batches(model, ids, mask, device).argmax(-1) == labels).double().mean())


def _attacks(config: Config, rows: Any, client: SentinelTokenizer, seed: int, metrics: Sequence[Metric]) -> Any:
    base, _ = _encoder(config.model, config.layers)
    how: dict[str, Any] = {"k": (1,), "sample": config.sample, "seed": seed}
    return {_found(m): recovery_attack(base, rows, client.permutation, metric=m, **how)[1] for m in metrics}


def _occurring(encoder: Any, tensors: Mapping[str, Tensors]) -> tuple[Tensor, dict[str, Tensors]]:
    """Cut the embedding down to the rows that occur, and the ids to match: the others get no gradient anyway."""
    table = encoder.get_input_embeddings()
    used = torch.cat([ids.flatten() for ids, _, _ in tensors.values()]).unique()
    padding = (used == table.padding_idx).nonzero() if table.padding_idx is not None else used[:0]
    small = nn.Embedding.from_pretrained(
        table.weight.detach()[used], freeze=False, padding_idx=int(padding) if len(padding) else None
    )
    encoder.set_input_embeddings(small)
    return used, {name: (torch.searchsorted(used, ids), mask, y) for name, (ids, mask, y) in tensors.items()}


def _trained(config: Config, name: str, kind: str, shift: float) -> Arm:
    def train(seed: int, lr: float, steps: int, part: str, progress: Progress | None) -> tuple[float, Tensor, Made]:
        made = _made(config, seed, kind, shift)
        encoder = copy.deepcopy(made.encoder)
        rows = made.encoder.get_input_embeddings().weight.detach().cpu().clone()
        used, tensors = _occurring(encoder, made.tensors)
        model = Classifier(encoder, encoder.config.hidden_size, seed)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
        groups: list[dict[str, Any]] = [
            {"params": model.encoder.parameters()},
            {"params": model.head.parameters(), "lr": config.head_rate * lr},
        ]
        fit(
            model, tensors["train"], lambda m, b: nn.functional.cross_entropy(m(b[0], b[1]), b[2]), steps=steps,
            batch_size=config.batch_size, optimizer=lambda _: torch.optim.AdamW(groups, lr=lr, fused=True),
            schedule="linear", seed=seed, clip=1.0, device=config.device, progress=progress,
        )  # fmt: skip
        rows[used] = encoder.get_input_embeddings().weight.detach().cpu()
        return _accuracy(model, tensors, part, config.device), rows, made

    def run(seed: int, progress: Progress) -> Measurement:
        def score(lr: float) -> float:
            return train(1000, lr, config.tune_steps, "held", None)[0]

        picked = progress.once(f"lr {name}", lambda: pick_learning_rate(config.learning_rates, score))
        accuracy, rows, made = train(seed, picked["chosen"], config.steps, "test", progress)
        metrics = {"accuracy": accuracy}
        if made.client is not None:
            metrics |= _attacks(config, rows, made.client, seed, FAR_ATTACKS if name == FAR else TUNED_ATTACKS)
        return Measurement(metrics)

    return run


def _probed(config: Config, kind: str, shift: float = 0.0) -> Arm:
    def run(seed: int, progress: Progress) -> Measurement:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        made = _made(config, seed, kind, shift)
        model = Classifier(made.encoder, made.encoder.config.hidden_size, seed).to(config.device).eval()
        ids, mask, labels = made.tensors["train"]
        # sentences of their own for each seed, where there are enough
        drawn = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[: config.probe]
        train = _in_batches(model.features, ids[drawn], mask[drawn], config.device).numpy()
        test = _in_batches(model.features, *made.tensors["test"][:2], config.device).numpy()
        head = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(train, labels[drawn])
        metrics = {"accuracy": float(head.score(test, made.tensors["test"][2].numpy()))}
        if kind == "hashed" and made.client is not None:
            metrics |= _attacks(config, made.encoder, made.client, seed, FROZEN_ATTACKS)
        return Measurement(metrics)

    return run


def _searched(config: Config, steps: int, seed: int, progress: Progress) -> Measurement:
    made = _made(config, seed, "hashed", NEAR_SHIFT, steps)
    assert made.client is not None
    return Measurement(_attacks(config, made.encoder, made.client, seed, ("l2",)))


def _majority(config: Config, seed: int, progress: Progress) -> Measurement:
    labels = {name: y for name, (_, y) in _sentences(config).items()}
    return Measurement({"accuracy": float((labels["test"] == labels["train"].mode().values).double().mean())})


def _readers(config: Config, seed: int, progress: Progress) -> Mapping[str, Measurement]:
    client = SentinelTokenizer(_encoder(config.model, config.layers)[1], _key(seed))
    if config.data == "toy":
        public, secret = toy_reviews(50, 2)[0], toy_reviews(20, 3)[0]
    else:
        loaded = datasets.load(config.data)
        public, secret = list(loaded.train), list(loaded.test)
    sent = client.encrypt_batch(secret)
    order = np.random.default_rng(seed).permutation(len(public))
    found = {}
    for number in config.known:
        attack = known_plaintext_attack(client, [public[i] for i in order[:number]], sent)
        found[reader(number)] = Measurement({"tokens read": attack.tokens, "words read": attack.types})
    attack = frequency_attack(client, public, sent)
    return found | {FREQUENCY: Measurement({"tokens read": attack.tokens, "words read": attack.types})}


def _language_model(config: Config, seed: int, progress: Progress) -> Mapping[str, Measurement]:
    """Loss of the tokens that are really there, whatever the model is given to read."""
    base, tokenizer = _decoder(config.language_model)
    text = " ".join(toy_reviews(60, 4)[0]) if config.data == "toy" else datasets.load("wikitext2").test
    width = 8 * config.window
    starts = np.random.default_rng(seed).integers(0, len(text) - width, config.windows)
    texts = [text[start : start + width] for start in starts]
    client, other = (SentinelTokenizer(tokenizer, key) for key in (_key(seed), _key(seed + 1000)))

    @torch.no_grad()
    def loss(model: Any, read: Sequence[Sequence[int]], meant: Sequence[Sequence[int]]) -> float:
        model.to(config.device)
        ids, target = (
            torch.tensor([row[: config.window] for row in rows], device=config.device) for rows in (read, meant)
        )
        logits = torch.cat([model(input_ids=row[None]).logits[:, :-1] for row in ids])
        return float(nn.functional.cross_entropy(logits.flatten(0, 1).float(), target[:, 1:].flatten()))

    plain = tokenizer(texts)["input_ids"]
    found = {LM: loss(base, plain, plain)}
    for name, steps in ((LM_SHUFFLED, 0), (LM_GLIDED, 2)):
        model, server, _ = adapt(base, tokenizer, _key(seed), steps)
        sent = server(client.encrypt_batch(texts))["input_ids"]
        found[name] = loss(model, sent, sent)
        if steps == 0:
            found[LM_WRONG] = loss(model, server(other.encrypt_batch(texts))["input_ids"], sent)
        del model
        progress(len(found), 4, name)
    return {name: Measurement({"loss": value}) for name, value in found.items()}


def arms(config: Config) -> Mapping[str, Arm]:
    """Fine-tuned, frozen, readers of hashed text, and a language model."""
    found: dict[str, Arm] = {
        PLAIN: _trained(config, PLAIN, "plain", 0.0),
        MIRRORED: _trained(config, MIRRORED, "hashed", 0.0),
        HASHED: _trained(config, HASHED, "hashed", NEAR_SHIFT),
        FAR: _trained(config, FAR, "hashed", FAR_SHIFT),
        MAJORITY: partial(_majority, config),
        FROZEN: _probed(config, "plain"),
        BRUTE: _probed(config, "brute"),
    }
    for shift in config.shifts:
        found[frozen(shift)] = _probed(config, "hashed", shift)
    for steps in (1, 3):
        found[frozen(NEAR_SHIFT, steps)] = partial(_searched, config, steps)
    found["reader"] = partial(_readers, config)
    found["language model"] = partial(_language_model, config)
    return found


_COLOURS: dict[Metric, str] = {
    "l2": "#D55E00",
    "cosine": "#E69F00",
    "centered": "#0072B2",
    "gram": "#009E73",
    "procrustes": "#CC79A7",
}
_NAMES = {
    "l2": "nearest by L2", "cosine": "by cosine", "centered": "mean row taken out", "gram": "Gram fingerprint",
    "procrustes": "50 known words",
}  # fmt: skip
_STARS = {"l2": "*", "centered": "*", "gram": "D", "procrustes": "^"}


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy of every arm, rows found against how far they were moved, tokens read against sentences known."""
    from matplotlib.figure import Figure

    c = result.config
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1, 0.8])
    names = [PLAIN, MIRRORED, HASHED, FAR, FROZEN, *(frozen(shift) for shift in c.shifts), BRUTE, MAJORITY]
    for place, name in enumerate(names):
        values = 100 * result.values(name, "accuracy")
        tuned = name in (PLAIN, MIRRORED, HASHED, FAR)
        left.plot(
            values, [place] * len(values), "o" if tuned else "D", color="#0072B2" if tuned else "#999999", alpha=0.6
        )
        left.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color="black", linewidth=1.5)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel="accuracy on the test sentences, %", title="one point a seed; blue: fine-tuned")
    for metric, colour in _COLOURS.items():
        if metric in FROZEN_ATTACKS:
            found = [100 * result.values(frozen(shift), _found(metric)).mean() for shift in c.shifts]
            style = "--s" if metric == "cosine" else "-o"
            middle.plot(c.shifts, found, style, color=colour, label=_NAMES[metric], markersize=5, alpha=0.85)
        if metric in FAR_ATTACKS:
            moved = ((MIRRORED, 0.0), (HASHED, NEAR_SHIFT), (FAR, FAR_SHIFT))[0 if metric in TUNED_ATTACKS else 2 :]
            after = [100 * result.values(name, _found(metric)).mean() for name, _ in moved]
            label = None if metric in FROZEN_ATTACKS else _NAMES[metric]
            middle.plot(
                [shift for _, shift in moved], after, _STARS[metric], color=colour, markersize=10, label=label,
                markeredgecolor="black", markeredgewidth=0.5, linestyle="none",
            )  # fmt: skip
    middle.set(xlabel="translation, × spread of the embedding", ylabel="rows found, %", ylim=(-4, 104))
    middle.set_title("two random glides; black rims: after fine-tuning", fontsize=10)
    middle.legend(frameon=False, fontsize=8, loc="lower left")
    read = [100 * result.values(reader(n), "tokens read").mean() for n in c.known]
    right.plot(c.known, read, "-o", color="#0072B2", label="sentences known")
    counted = 100 * result.values(FREQUENCY, "tokens read").mean()
    right.axhline(counted, color="#D55E00", linestyle="--", label="only counts words")
    right.set(
        xscale="log", xlabel="sentences seen beside their hashes", ylabel="tokens read of others, %", ylim=(0, 104)
    )
    right.set_title("texts alone", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for ax in (left, middle, right):
        ax.title.set_fontsize(10)
        ax.spines[["top", "right"]].set_visible(False)
    return {"sentinel": figure}


def notes(result: Result) -> str:
    """Budget, choices, and what the numbers cannot say."""
    c = result.config
    rates = "; ".join(
        f"{key.removeprefix('lr ')}: {tried['chosen']}, there {tried['scores'][str(tried['chosen'])]:.2f} right, and "
        f"{min(filter(None, tried['scores'].values())):.2f} at the worst"
        for key, tried in result.tuned.items()
    )
    loss = {name: result.values(name, "loss").mean() for name in (LM, LM_SHUFFLED, LM_GLIDED, LM_WRONG)}
    return (
        f"Encoder: the first {c.layers} layers of {c.model}, mean of the hidden states, standardised, and a linear "
        f"head; {c.data} sentences of at most {c.max_tokens} tokens, {c.train} for training, {c.test} for testing. "
        f"Every fine-tuned arm: {c.steps} steps of {c.batch_size}, AdamW, all weights, linear decay, dropout "
        f"{c.dropout:g}, learning rate from the same grid {c.learning_rates} ({c.head_rate:g} times that for the head) "
        f"by {c.tune_steps}-step trials on {c.held} other sentences ({rates}). The paper trains for three epochs, many "
        f"times as long. Every seed has its own key. Translation is in multiples of the embedding's spread: "
        f"'mirrored only' has 0, 'hashed' {NEAR_SHIFT:g}, 'far' {FAR_SHIFT:g}, about what the script's numbers from "
        f"[0, 1) amount to for MiniLM, but in random directions, since along the script's own no BERT changes at all. "
        f"Norms behind the embedding shrink moved words to a small part of a vector that all have in common: dropout "
        f"then drowns them and a head learns from the common part, unless its inputs are standardised, as they are "
        f"here in every arm. The usual dropout of 0.1 can be had by --set dropout=0.1. Frozen: a logistic head on "
        f"{c.probe} sentences, standardised too; the original tokenizer cuts hashes into pieces, of which "
        f"{2 * c.max_tokens} are read: the first words, whose pieces never change. Rows found: the nearest public row "
        f"is the right one, {c.sample} rows tried; for fine-tuned arms in the fine-tuned model, with 50 known words "
        f"for Procrustes. L2 fails after a far translation only because it was not taken out: the mean row shows it, "
        f"and two reflections change two directions of the space. Readers: {c.data} training sentences are known or "
        f"public, test sentences are read, whole; counting matches ranks only, and better counting reads more. "
        f"Language model: {c.language_model}, {c.windows} x {c.window} tokens a seed, nothing trained; loss "
        f"{loss[LM]:.3f} plain, {loss[LM_SHUFFLED]:.3f} hashed without glides, {loss[LM_GLIDED]:.3f} with two glides "
        f"before any fine-tuning, {loss[LM_WRONG]:.3f} when the text comes with another key."
    )
