"""Evidence for implicit instruction tuning: ranking, the three rules on SmolLM2, and a small world trained anew."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate
from torchgraft.language.implicit_instruction import (
    RULES,
    ChatFormat,
    ImplicitInstructProcessor,
    ResponseCollator,
    default_token_bias,
    response_loss,
    response_only,
    response_ranking,
    training_examples,
)
from torchgraft.recipes._language import language_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA = ("instructions",)
WON = "comparisons won"
RANK, SUMMED, SHUFFLED = "ranking", "ranking: summed", "ranking: shuffled"
PLAIN, ALL = "no rules", "all rules"
STOPPED, REPEATED, SCORED_DOWN, ECHOED = "stopped", "repeated 4-grams", "scored-down tokens", "tags echoed"
BASE, PAIRED, RESPONSE, LORA, SINGLE, CONTROL = (
    "toy: base", "toy: paired", "toy: response-tuned", "toy: response-tuned, LoRA", "toy: single task",
    "toy: wrong responses",
)  # fmt: skip
EXACT, STOPS, RIGHT = "exact match", "stop rate", "right sentence"
KNOWN = "right in the pretraining format"


def _points(text: str, metric: str, arm: str, against: str | float, effect: float, **more: Any) -> Claim:
    return Claim(text, metric, arm, against, effect, unit="points", factor=100, **more)


CLAIMS = (
    _points(
        "SmolLM2 finds the right response likelier than a random one, in a chat format that it does not know", WON,
        RANK, 0.5, 10, paper="80.4 % base and 77.4 % tuned Llama-2-7B, 74.5 % and 74.3 % OLMo-7B",
    ),
    _points(
        "It owes that to the instruction: with another pair's it finds it less often", WON, RANK, SHUFFLED, 10,
        paper="not reported",
    ),
    _points(
        "The rules together raise the share of answers that end", STOPPED, ALL, PLAIN, 10,
        paper="in words: the first rule's purpose",
    ),
    _points(
        "Without the EOS rule fewer answers end", STOPPED, "no eos rule", ALL, 10, direction="lower",
        paper="win rate 10.4 instead of 24.4",
    ),
    _points(
        "Without the diversity rule more 4-grams repeat", REPEATED, ALL, "no diversity rule", 1, direction="lower",
        paper="win rate 14.3 instead of 24.4",
    ),
    _points(
        "Without the uniform rule more of the tokens that it scores down appear", SCORED_DOWN, ALL, "no uniform rule",
        0.1, direction="lower", paper="win rate 16.3 instead of 24.4",
    ),
    _points(
        "Response tuning makes a model answer held-out questions", EXACT, RESPONSE, BASE, 20,
        paper="win rate 43.3 against 2.4 for the base, Llama-2-7B",
    ),
    _points(
        "Tuning on pairs makes it answer more of them", EXACT, PAIRED, RESPONSE, 1,
        paper="win rate 43.3 of response tuning against the paired twin, that is 6.7 points below even",
    ),
    _points(
        "Tuning on questions with the responses of others does harm, which tuning on responses alone does not", EXACT,
        RESPONSE, CONTROL, 20, paper="not compared",
    ),
    _points(
        "Tuning on one kind of question makes it answer the others", "exact match, other tasks", SINGLE, BASE, 20,
        paper="win rates of 2.1 (chess) to 23.7 (GSM) against 2.4",
    ),
    _points(
        "Low-rank response tuning does as well as that of all weights", EXACT, LORA, RESPONSE, 10, direction="equal",
        paper="not compared",
    ),
    _points(
        "Response tuning leaves the ranking as it was", WON, RESPONSE, BASE, 5, direction="equal",
        paper="77.4 % against 80.4 %, Llama-2-7B",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: how many; each has its own small world and its own model of it. Ranking and rules on the real model
            are without chance and the same for every seed.
        data: ``instructions``, or ``built-in`` (our questions) where there is none.
        device: where to run.
        model: of ranking and rules, see ``language_model``.
        dtype: of that model.
        pairs, distractors: ranked pairs, and random responses for each.
        characters: longest response ranked; prompts may have twice as many.
        prompts, new_tokens: of generation.
        names, width, layers: of the small world and the model trained on it from nothing.
        steps, batch_size, learning_rate: of its pretraining.
        tune_steps, tune_batch: of every finetuning, trials of the learning rate included.
        learning_rates, lora_learning_rates: the grids.
        rate_worlds: on the validation questions of how many seeds' worlds learning rates are chosen.
    """

    seeds: int = 4
    data: str = "instructions"
    device: str = "cpu"
    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    pairs: int = 48
    distractors: int = 3
    characters: int = 120
    prompts: int = 16
    new_tokens: int = 80
    names: int = 16
    width: int = 128
    layers: int = 2
    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 3e-3
    tune_steps: int = 20
    tune_batch: int = 16
    learning_rates: tuple[float, ...] = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
    lora_learning_rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    rate_worlds: int = 2


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", model="toy", pairs=4, distractors=2, characters=40, prompts=2, new_tokens=6, names=4,
        width=16, layers=1, steps=2, batch_size=2, tune_steps=1, tune_batch=2, learning_rates=(1e-3,),
        lora_learning_rates=(1e-3,), rate_worlds=1,
    ),
    "laptop": Config(),
    "gpu": Config(
        device="cuda", model="HuggingFaceTB/SmolLM2-360M", dtype="bfloat16", pairs=80, distractors=5, prompts=60,
        names=48, width=256, steps=4000, batch_size=64, tune_steps=100,
    ),
    "paper": Config(
        device="cuda", model="meta-llama/Llama-2-7b-hf", dtype="bfloat16", pairs=200, distractors=5, characters=2000,
        prompts=200, names=48, width=256, steps=4000, batch_size=64, tune_steps=100,
    ),
}  # fmt: skip


def _chosen(config: Config, count: int, every: bool = False) -> list[tuple[str, str]]:
    """Short pairs, always the same."""
    if config.data == "built-in":
        found = datasets.load("questions")
        assert isinstance(found, datasets.MultipleChoice)
        items = [(q.question, q.options[q.answer]) for q in found.items]
    else:
        loaded = datasets.load(config.data)
        if not isinstance(loaded, datasets.Instructions):
            raise ValueError(f"data must be 'instructions' or 'built-in', got {config.data!r}")
        items = list(loaded.items)
    short = [(a, b) for a, b in items if len(a) <= 2 * config.characters and (every or len(b) <= config.characters)]
    # of equal responses the first alone: the others could only tie
    unique = list({answer: (asked, answer) for asked, answer in reversed(short)}.values())
    if count > len(unique):
        raise ValueError(f"{config.data} has {len(unique)} short pairs, not {count}")
    return [unique[i] for i in np.random.default_rng(0).permutation(len(unique))[:count]]


def _conversations(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


def _won(per_item: np.ndarray) -> Measurement:
    return Measurement({WON: float(per_item.mean())}, examples={WON: per_item.tolist()})


@lru_cache(maxsize=1)
def _ranked(config: Config) -> dict[str, Measurement]:
    model, tokenizer = language_model(config.model, config.dtype, config.device)
    pairs = _chosen(config, config.pairs)
    found = response_ranking(model, tokenizer, pairs, config.distractors, "sum")
    summed, others = found["scores"], found["distractors"]
    rows = training_examples(_conversations(pairs), tokenizer)
    lengths = np.array([sum(label >= 0 for label in row["labels"]) for row in rows])
    mean = summed / np.concatenate([lengths[:, None], lengths[others]], 1)
    # two responses of other pairs: the first is the right one of another instruction
    shuffled = (mean[:, 1:2] > mean[:, 2:]).mean(1)
    return {
        RANK: _won((mean[:, :1] > mean[:, 1:]).mean(1)), SUMMED: _won(found["per_item"]), SHUFFLED: _won(shuffled),
    }  # fmt: skip


RULE_ARMS: dict[str, tuple[str, ...]] = {
    PLAIN: (), ALL: RULES, **{f"no {rule} rule": tuple(r for r in RULES if r != rule) for rule in RULES},
}  # fmt: skip


@lru_cache(maxsize=len(RULE_ARMS))
def _generated(config: Config, rules: tuple[str, ...]) -> Measurement:
    model, tokenizer = language_model(config.model, config.dtype, config.device)
    asked = [instruction for instruction, _ in _chosen(config, config.prompts, every=True)]
    prompts = ChatFormat().prompts(tokenizer, asked).to(config.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the smoke run's vocabulary of bytes lacks some strings
        processors = [ImplicitInstructProcessor(tokenizer, prompts, rules=rules)] if rules else []
    end = tokenizer.eos_token_id
    out = model.generate(
        **prompts.inputs, max_new_tokens=config.new_tokens, do_sample=False, logits_processor=processors,
        eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    answers = out[:, prompts.input_ids.shape[1] :].tolist()
    down = {token for token, score in default_token_bias(tokenizer).values.items() if score < 0}
    examples: dict[str, list[float]] = {name: [] for name in (STOPPED, REPEATED, SCORED_DOWN, ECHOED, "tokens")}
    for ids in answers:
        said = ids[: ids.index(end)] if end in ids else ids
        fours = [tuple(said[i : i + 4]) for i in range(len(said) - 3)]
        examples[STOPPED].append(float(end in ids))
        examples[REPEATED].append(1 - len(set(fours)) / len(fours) if fours else 0.0)
        examples[SCORED_DOWN].append(sum(token in down for token in said) / max(1, len(said)))
        examples[ECHOED].append(float("<|" in tokenizer.decode(said)))
        examples["tokens"].append(len(said))
    texts = [tokenizer.decode(ids[: ids.index(end)] if end in ids else ids) for ids in answers[:2]]
    said_to = [{"asked": a, "said": t} for a, t in zip(asked, texts, strict=False)]
    metrics = {name: float(np.mean(values)) for name, values in examples.items()}
    return Measurement(metrics, examples=examples, extra={"first": said_to})


# The small world: things of four kinds with one property each, told as questions with answers, statements and tables.
# Sizes, steps, grids and how rates are chosen were settled on other worlds, of other kinds, sentences, names and facts;
# this one was written down afterwards and first asked for the record.
KINDS = {
    "drink": ("what does {} pour ?", "a glass of {} .", "tea milk wine cider water juice cocoa coffee"),
    "beast": ("who guards {} ?", "the {} does .", "wolf bear lion fox hawk crow stag boar"),
    "cloth": ("which cloth covers {} ?", "sheets of {} .", "silk wool linen cotton velvet satin felt tweed"),
    "doors": ("how many doors has {} ?", "it has {} .", "two three four five six seven eight nine"),
}
FIRST_WORLD = 200
END, UNKNOWN = "[end]", "[?]"
Fact = tuple[str, str, str]


@dataclass(frozen=True)
class _World:
    """Which thing has which property, and which facts are for tuning, choosing the learning rate, and testing."""

    tokenizer: Any
    facts: list[Fact]
    tune: list[Fact]
    validation: list[Fact]
    test: list[Fact]


def _asked(fact: Fact) -> tuple[str, str]:
    kind, name, value = fact
    question, answer, _ = KINDS[kind]
    return question.format(name), answer.format(value)


@lru_cache(maxsize=4)
def _world(names: int, seed: int) -> _World:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw = np.random.default_rng(FIRST_WORLD + seed)
    things = {kind: [f"{kind}{i}" for i in range(names)] for kind in KINDS}
    facts = [(kind, name, str(draw.choice(KINDS[kind][2].split()))) for kind in KINDS for name in things[kind]]
    words = {word for fact in facts for text in _asked(fact) for word in text.split()}
    words |= {value for _, _, values in KINDS.values() for value in values.split()}
    vocabulary = [END, UNKNOWN, "\n", "<", "|", ">", "user", "assistant", *sorted(words)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"[\n<|>]"), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END, unk_token=UNKNOWN)
    order = [facts[i] for i in draw.permutation(len(facts))]
    a, b = len(order) // 2, len(order) * 11 // 16
    return _World(tokenizer, facts, order[:a], order[a:b], order[b:])


def _corpus(world: _World, tokens: int, seed: int) -> torch.Tensor:
    """Documents of 8 to 24 passages; only their ends are marked, and no passage is a conversation.

    Between question and answer stands a line break or a few random signs: text of the world knows many formats.
    """
    draw, lines = np.random.default_rng(seed), []
    count = 0
    while count < tokens:
        passages = []
        kind_of_text = draw.choice(["questions", "statements", "table"], p=[0.5, 0.3, 0.2])
        for _ in range(draw.integers(8, 25)):
            question, answer = _asked(fact := world.facts[draw.integers(len(world.facts))])
            side = draw.choice(["user", "assistant"])
            signs = " ".join(draw.choice(["\n", "<", "|", ">"], draw.integers(1, 7)))
            between = "\n" if draw.random() < 0.5 else f" {signs} "
            if kind_of_text == "questions":
                passages.append(f"{question}{between}{answer}\n")
            elif kind_of_text == "statements":
                passages.append(f"{fact[1]}|{answer}\n")
            else:
                passages.append(f"<|{side}|>{fact[1]}|{fact[2]}\n")
        ids = [*world.tokenizer("".join(passages))["input_ids"], world.tokenizer.eos_token_id]
        lines += ids
        count += len(ids)
    return torch.tensor(lines[:tokens])


CONTEXT = 64


@lru_cache(maxsize=4)
def _pretrained(config: Config, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    world = _world(config.names, seed)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(world.tokenizer), hidden_size=config.width, intermediate_size=2 * config.width,
            num_hidden_layers=config.layers, num_attention_heads=4, max_position_embeddings=2 * CONTEXT,
            bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
        )
    )  # fmt: skip
    rows = config.steps * config.batch_size
    corpus = _corpus(world, rows * CONTEXT, FIRST_WORLD + seed).view(rows, CONTEXT)
    fit(
        model, (corpus,), lambda m, batch: m(input_ids=batch[0], labels=batch[0]).loss, steps=config.steps,
        batch_size=config.batch_size,
        optimizer=lambda p: torch.optim.AdamW(p, lr=config.learning_rate, betas=(0.9, 0.95)),
        schedule="one_cycle", seed=seed, clip=1.0, device=config.device,
    )  # fmt: skip
    return model.eval()


def _chats(facts: Sequence[Fact]) -> list[dict[str, Any]]:
    return _conversations([_asked(fact) for fact in facts])


@torch.no_grad()
def _answered(model: Any, world: _World, facts: Sequence[Fact], device: str) -> dict[str, float]:
    """Shares of questions whose answer is right to the last token and ends, begins right, and ends."""
    end = world.tokenizer.eos_token_id
    prompts = ChatFormat().prompts(world.tokenizer, [_asked(fact)[0] for fact in facts]).to(device)
    out = model.eval().generate(
        **prompts.inputs, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    exact, right, stops = [], [], []
    for fact, said in zip(facts, out[:, prompts.input_ids.shape[1] :].tolist(), strict=True):
        answer = world.tokenizer(_asked(fact)[1])["input_ids"]
        stops.append(end in said)
        right.append(said[: len(answer)] == answer)
        exact.append(right[-1] and said[len(answer) : len(answer) + 1] == [end])
    return {EXACT: float(np.mean(exact)), RIGHT: float(np.mean(right)), STOPS: float(np.mean(stops))}


@torch.no_grad()
def _known(model: Any, world: _World, device: str) -> float:
    """Share of the test's questions answered right after a bare line break, as in the pretraining text."""
    right = []
    for fact in world.test:
        question, answer = _asked(fact)
        ids = torch.tensor([world.tokenizer(f"{question}\n")["input_ids"]], device=device)
        wanted = world.tokenizer(answer)["input_ids"]
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(wanted), do_sample=False,
            pad_token_id=world.tokenizer.eos_token_id,
        )  # fmt: skip
        right.append(out[0, ids.shape[1] :].tolist() == wanted)
    return float(np.mean(right))


class _Rows(Dataset[dict[str, list[int]]]):
    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def _tuned(config: Config, seed: int, examples: list[dict[str, list[int]]], lr: float, lora: bool) -> Any:
    model = copy.deepcopy(_pretrained(config, seed))
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    fit(
        model, _Rows(examples),
        lambda m, batch: response_loss(m(**batch).logits, batch["labels"]),
        steps=config.tune_steps, batch_size=config.tune_batch,
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0), schedule="linear", seed=seed, clip=1.0,
        device=config.device, collate=ResponseCollator(),
    )  # fmt: skip
    return model


Data = Callable[[_World], list[dict[str, Any]]]


def _rate(config: Config, name: str, data: Data, lora: bool, progress: Progress) -> float:
    """The learning rate that answers most of the first worlds' validation questions."""
    seeds = range(min(config.rate_worlds, config.seeds))

    def score(lr: float) -> float:
        right = []
        for seed in seeds:
            world = _world(config.names, seed)
            model = _tuned(config, seed, training_examples(data(world), world.tokenizer), lr, lora)
            right.append(_answered(model, world, world.validation, config.device)[EXACT])
        return float(np.mean(right))

    grid = config.lora_learning_rates if lora else config.learning_rates
    return float(progress.once(name.replace(": ", "-"), lambda: pick_learning_rate(grid, score))["chosen"])


def _toy(
    config: Config, name: str, data: Data | None, lora: bool = False, rate_from: tuple[str, Data] | None = None
) -> Arm:
    def run(seed: int, progress: Progress) -> Measurement:
        world = _world(config.names, seed)
        if data is None:
            model = _pretrained(config, seed)
        else:
            lr = _rate(config, *(rate_from or (name, data)), lora, progress)
            model = _tuned(config, seed, training_examples(data(world), world.tokenizer), lr, lora)
        progress(1, 2, "trained")
        metrics = _answered(model, world, world.test, config.device)
        others = [fact for fact in world.test if fact[0] != next(iter(KINDS))]
        metrics["exact match, other tasks"] = _answered(model, world, others, config.device)[EXACT]
        pairs = [_asked(fact) for fact in world.test]
        distractors = min(5, len(pairs) - 1)
        metrics[KNOWN] = _known(model, world, config.device)
        metrics[WON] = response_ranking(model, world.tokenizer, pairs, distractors, seed=seed)["accuracy"]
        return Measurement(metrics)

    return run


def _wrong(world: _World) -> list[dict[str, Any]]:
    """Every question with the answer of another."""
    rows = _chats(world.tune)
    answers = [row["messages"][1] for row in rows]
    return [
        {"messages": [row["messages"][0], answer]} for row, answer in zip(rows, [*answers[1:], answers[0]], strict=True)
    ]


def arms(config: Config) -> Mapping[str, Arm]:
    """Ranking, generation with the rules and without each, and the small world's finetunings."""

    def generation(rules: tuple[str, ...]) -> Arm:
        return lambda seed, progress: _generated(config, rules)

    def responses(world: _World) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = response_only(_chats(world.tune))
        return found

    def pairs(world: _World) -> list[dict[str, Any]]:
        return _chats(world.tune)

    first = next(iter(KINDS))
    made: dict[str, Arm] = {RANK: lambda seed, progress: _ranked(config)}
    made |= {name: generation(rules) for name, rules in RULE_ARMS.items()}
    made[BASE] = _toy(config, BASE, None)
    made[RESPONSE] = _toy(config, RESPONSE, responses)
    made[PAIRED] = _toy(config, PAIRED, pairs)
    made[SINGLE] = _toy(config, SINGLE, lambda world: _chats([f for f in world.tune if f[0] == first]))
    # no rate makes wrong responses right: the control differs from its twin in nothing but the pairing
    made[CONTROL] = _toy(config, CONTROL, _wrong, rate_from=(PAIRED, pairs))
    made[LORA] = _toy(config, LORA, responses, lora=True)
    return made


_COLOURS = {RANK: "#0072B2", PLAIN: "#000000", ALL: "#D55E00"}


def figures(result: Result) -> Mapping[str, Figure]:
    """Ranking, the three numbers that the rules are about, and the small world's finetunings."""
    from matplotlib.figure import Figure

    from torchgraft.experiments.statistics import bootstrap_interval

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    panels = figure.subplots(1, 5, width_ratios=(1.1, 1, 1, 1, 1.5))

    def shares(ax: Any, names: Sequence[str], metric: str, label: str) -> None:
        for y, name in enumerate(names):
            values = 100 * result.examples(name, metric)
            low, high = bootstrap_interval(values) or (values.mean(), values.mean())
            colour = _COLOURS.get(name, "#777777")
            ax.plot([low, high], [y, y], "-", color=colour, linewidth=1.5)
            ax.plot([values.mean()], [y], "o", color=colour)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
        ax.set_xlabel(label, fontsize=9)

    shares(panels[0], (RANK, SUMMED, SHUFFLED), WON, "right response likelier, %")
    panels[0].axvline(50, color="#000000", linewidth=0.8, linestyle=":")
    for ax, metric, label in (
        (panels[1], STOPPED, f"ended by {result.config.new_tokens} tokens, %"),
        (panels[2], REPEATED, "repeated 4-grams, %"),
        (panels[3], SCORED_DOWN, "scored-down tokens, %"),
    ):
        shares(ax, list(RULE_ARMS), metric, label)
    for ax in panels[2:4]:
        ax.set_yticks(range(len(RULE_ARMS)), [""] * len(RULE_ARMS))
    toys = (BASE, CONTROL, RESPONSE, LORA, SINGLE, PAIRED)
    for shift, metric, colour in ((-0.25, EXACT, "#0072B2"), (0.0, RIGHT, "#56B4E9"), (0.25, STOPS, "#999999")):
        values = [100 * result.values(name, metric) for name in toys]
        rows = np.arange(len(toys)) + shift
        panels[4].barh(rows, [v.mean() for v in values], 0.22, color=colour, label=metric)
        for y, per_seed in zip(rows, values, strict=True):
            panels[4].plot(per_seed, [y] * len(per_seed), "|", color="#000000", markersize=6)
    panels[4].set_yticks(range(len(toys)), [name.removeprefix("toy: ") for name in toys])
    panels[4].invert_yaxis()
    panels[4].set(xlabel="held-out questions of the small world, %", xlim=(0, 102))
    panels[4].legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    figure.suptitle(
        f"{result.config.model} (left four panels; lines: 95 % bootstrap), a model trained from nothing (right; ticks: "
        "seeds)", fontsize=10,
    )  # fmt: skip
    return {"implicit_instruction": figure}


def notes(result: Result) -> str:
    """What was measured, and what the numbers cannot say."""
    c = result.config

    def percent(arm: str, metric: str) -> str:
        return f"{100 * result.values(arm, metric).mean():.1f} %"

    def each(arm: str, metric: str) -> str:
        return ", ".join(f"{100 * value:.0f}" for value in result.values(arm, metric))

    rates = "; ".join(f"{name.removeprefix('toy-')} {found['chosen']:g}" for name, found in result.tuned.items())
    return (
        f"{c.model}, {c.dtype}, nothing trained and distractors drawn once, so every seed gives the same; prompts in "
        "the tags of Tulu, which it was not trained on. It is an instruction-tuned model, the paper's are base models, "
        "so only what the rules do to its text is measured, not how good answers become: no judge was at hand. "
        f"Ranking: {c.pairs} pairs ({c.data}), responses of at most {c.characters} characters, {c.distractors} "
        "responses of other pairs beside each, mean log-probability a token with EOS as in the official code; "
        "'summed' is plain probability as in the paper's text. 'Shuffled' compares two responses of other pairs, as if "
        "the instruction belonged to one of them; half is what chance gives. "
        f"Generation: {c.prompts} prompts, greedy, at most "
        f"{c.new_tokens} tokens (the official runs go on to 8,192, those without the EOS rule to 512), one batch "
        "padded on the left. 'Scored-down tokens' are the seven that the uniform rule takes from. Tags echoed: "
        f"{percent(PLAIN, ECHOED)} without rules, {percent(ALL, ECHOED)} with all. Pairs share responses, and "
        f"{c.prompts} prompts are few for a bootstrap: both intervals are somewhat too narrow. "
        f"Small world: {len(KINDS)} kinds of {c.names} things with one property each; a Llama of {c.layers} layers "
        f"and width {c.width} is trained from nothing for {c.steps} steps on questions with answers, statements and "
        "tables, whose passages follow each other without an end mark, with a line break or random signs between "
        "question and answer; it never sees a conversation. Half of the facts serve tuning, 3 in 16 the choice of the "
        f"learning rate (on the first {c.rate_worlds} worlds), the rest the test: all of them were in the pretraining "
        "text, so answering is recalling, and what tuning has to bring is the format and the end; the name alone tells "
        f"the answer. Every tuning has {c.tune_steps} steps of {c.tune_batch} conversations, and so have the trials of "
        f"its learning rate; chosen: {rates}. Sizes, steps, grids and the choice of rates were settled on two earlier "
        "worlds, of other kinds, sentences, names and facts: the first, whose test questions were looked at while the "
        "experiment was shaped, and the second, on which, with rates chosen on one world and three seeds, the "
        "seeds differed too much to tell responses from pairs. This one was written down afterwards, and its questions "
        "were first asked in this run. 'Exact match' wants the whole sentence and then the end; 'right sentence' does "
        "not mind what follows. "
        f"The model before tuning begins with the right sentence in {percent(BASE, RIGHT)}. "
        f"After a bare line break, as in its own text, it answers {percent(BASE, KNOWN)}, the ceiling for any tuning, "
        f"and in the tags it wins {percent(BASE, WON)} of the comparisons of responses (half would be chance); after "
        f"response tuning {percent(RESPONSE, WON)}. By seed, response-tuned models answer "
        f"{each(RESPONSE, EXACT)} %, paired ones {each(PAIRED, EXACT)} %, and the models before tuning began right in "
        f"{each(BASE, RIGHT)} %: worlds differ more than {len(result.seeds)} seeds can average out. "
        "'Wrong responses' pairs each question with another question's answer and has the learning rate of 'paired'. "
        f"'Single task' sees questions about one kind alone ({next(iter(KINDS))}), a quarter of the data."
    )
