"""What steering buys and costs: behaviour and helpfulness against the coefficient, fitted, with advice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft.language._access import Access, captured, final_logits, resumed, tokenized
from torchgraft.language.representation_engineering.steering import steer
from torchgraft.language.representation_engineering.theory import helpfulness_gaussian
from torchgraft.language.representation_engineering.vectors import ReadingVectors
from torchgraft.surgery import evaluating

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

LETTERS = "ABCDEFGHIJ"


@runtime_checkable
class Probe(Protocol):
    """Something measured on texts from what the model says comes next.

    ``texts`` are read by the model. With ``every_token`` false, ``score`` gets log-probabilities (texts, V) after each
    text; otherwise (texts, T, V) after each token, with ``ids`` and ``mask`` (texts, T). It gets some of the texts at a
    time, ``rows`` says which, and returns named values, one for each of them. What needs several texts at once is done
    by a method ``finish``, where there is one: it gets all values, (coefficients, texts) by name, and returns others.
    """

    @property
    def texts(self) -> Sequence[str]:
        """What the model reads."""
        ...

    @property
    def every_token(self) -> bool:
        """Whether log-probabilities after each token are wanted, or after the last alone."""
        ...

    def score(self, log_probs: Tensor, ids: Tensor, mask: Tensor, rows: slice) -> dict[str, Tensor]:
        """Named values, (texts,) each."""
        ...


def _first_tokens(tokenizer: Any, options: Sequence[str]) -> list[int]:
    rows = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
    if not all(rows):
        raise ValueError(f"options must have at least one token each, got {list(options)}")
    found = [row[0] for row in rows]
    if len(set(found)) < len(found):
        raise ValueError(f"options must begin with different tokens, got {list(options)}; try a space before each")
    return found


class OptionContrast:
    """Behaviour between -1 and 1: after each prompt, how much likelier the positive words are than the negative.

    ``B = (P+ - P-) / (P+ + P-)`` over the probabilities of the words' first tokens; with the letters of A/B items as
    words it is ``2 P(matching) - 1`` of contrastive activation addition.

    Args:
        tokenizer: of the model.
        items: (prompt, positive words, negative words); words as they follow the prompt, mostly with a space before.

    Raises:
        ValueError: for no items, an item without words on a side, or words of it that begin with the same token.
    """

    every_token = False

    def __init__(self, tokenizer: Any, items: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> None:
        if not items:
            raise ValueError("items must not be empty")
        self.texts = [prompt for prompt, _, _ in items]
        self._ids = []
        for prompt, positive, negative in items:
            if not positive or not negative or isinstance(positive, str) or isinstance(negative, str):
                raise ValueError(
                    f"an item needs a list of words on either side, got {positive!r} and {negative!r} after {prompt!r}"
                )
            both = _first_tokens(tokenizer, [*positive, *negative])
            self._ids.append((both[: len(positive)], both[len(positive) :]))

    def score(self, log_probs: Tensor, ids: Tensor, mask: Tensor, rows: slice) -> dict[str, Tensor]:
        """``B``, (texts,)."""
        # (P+ - P-) / (P+ + P-) by logarithms, so that probabilities may be smaller than the smallest float
        gaps = [
            row[up].logsumexp(0) - row[down].logsumexp(0)
            for row, (up, down) in zip(log_probs, self._ids[rows], strict=True)
        ]
        return {"B": (torch.stack(gaps) / 2).tanh()}


class MultipleChoice:
    """Helpfulness: the probability of the right letter.

    Args:
        tokenizer: of the model.
        items: (question, options, place of the right one).
        template: with ``{question}`` and ``{options}``; the answer's letter follows.
        space: what stands before that letter.

    Raises:
        ValueError: for no items, fewer than two or more than ten options, or a place that there is not.
    """

    every_token = False

    def __init__(
        self,
        tokenizer: Any,
        items: Sequence[tuple[str, Sequence[str], int]],
        template: str = "Question: {question}\n{options}\nThe answer is",
        space: str = " ",
    ) -> None:
        if not items:
            raise ValueError("items must not be empty")
        self.texts, self._right, self._letters = [], [], []
        letters = _first_tokens(tokenizer, [space + letter for letter in LETTERS])
        for question, options, right in items:
            if not 2 <= len(options) <= len(LETTERS) or not 0 <= right < len(options):
                raise ValueError(f"an item needs 2 to 10 options, one of them right, got {len(options)} and {right}")
            listed = "\n".join(f"{LETTERS[k]}) {option}" for k, option in enumerate(options))
            self.texts.append(template.format(question=question, options=listed))
            self._right.append(right)
            self._letters.append(letters[: len(options)])

    def score(self, log_probs: Tensor, ids: Tensor, mask: Tensor, rows: slice) -> dict[str, Tensor]:
        """``H_abs``: of the right letter; ``H_rel``: among the letters; ``accuracy``; each (texts,)."""
        found = [row[letters] for row, letters in zip(log_probs, self._letters[rows], strict=True)]
        told = list(zip(found, self._right[rows], strict=True))
        right = torch.stack([row[k].exp() for row, k in told])
        shares = torch.stack([row.softmax(0)[k] for row, k in told])
        best = torch.tensor([float(row.argmax() == k) for row, k in told])
        return {"H_abs": right, "H_rel": shares, "accuracy": best}

    def competing(self, log_probs: Tensor, rows: slice) -> Tensor:
        """Log-probabilities of wrong letters less that of the right one, all questions in a row."""
        found = []
        for row, letters, k in zip(log_probs, self._letters[rows], self._right[rows], strict=True):
            gap = row[letters] - row[letters[k]]
            found += [gap[:k], gap[k + 1 :]]
        return torch.cat(found)


class OptionLikelihood:
    """Helpfulness: the probability of the right answer in full, token by token, for models that know no letters.

    Args:
        tokenizer: of the model.
        items: (question, options, place of the right one).
        template: with ``{question}``; the option follows.
        space: what stands before an option.

    Raises:
        ValueError: for no items, fewer than two options, a place that there is not, or an option whose tokens do not
            follow those of the question (mostly for want of a space before it).
    """

    every_token = True

    def __init__(
        self, tokenizer: Any, items: Sequence[tuple[str, Sequence[str], int]],
        template: str = "Question: {question}\nAnswer:", space: str = " ",
    ) -> None:  # fmt: skip
        if not items:
            raise ValueError("items must not be empty")
        self.texts: list[str] = []
        self._begins: list[int] = []
        self._right, self._sizes = [right for _, _, right in items], [len(options) for _, options, _ in items]
        for question, options, right in items:
            if len(options) < 2 or not 0 <= right < len(options):
                raise ValueError(
                    f"an item needs two options or more, one of them right, got {len(options)} and {right}"
                )
            prompt = template.format(question=question)
            head = list(tokenizer(prompt)["input_ids"])
            for option in options:
                ids = list(tokenizer(prompt + space + option)["input_ids"])
                if not head or ids[: len(head)] != head or len(ids) == len(head):
                    raise ValueError(f"the tokens of {option!r} do not follow those of {prompt!r}; try another space")
                self.texts.append(prompt + space + option)
                self._begins.append(len(head))

    def score(self, log_probs: Tensor, ids: Tensor, mask: Tensor, rows: slice) -> dict[str, Tensor]:
        """The log-probability of each option, (texts,); ``finish`` puts those of a question together."""
        begins = torch.tensor(self._begins[rows])
        counted = mask[:, 1:] * (torch.arange(1, ids.shape[1]) >= begins[:, None])
        told = log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * counted
        return {"option": told.sum(1)}

    def finish(self, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``H_answer``: of the right option; ``H_options``: among the options; ``accuracy_options``; (R, items)."""
        from scipy.special import softmax

        ends = np.cumsum(self._sizes)
        answers = np.split(values["option"], ends[:-1], axis=1)
        pairs = list(zip(answers, self._right, strict=True))
        return {
            "H_answer": np.stack([np.exp(found[:, k]) for found, k in pairs], 1),
            "H_options": np.stack([softmax(found, 1)[:, k] for found, k in pairs], 1),
            "accuracy_options": np.stack([(found.argmax(1) == k).astype(float) for found, k in pairs], 1),
        }


class TextLikelihood:
    """Helpfulness of the plainest kind: mean log-probability of a token of ordinary text, ``log_likelihood``."""

    every_token = True

    def __init__(self, texts: Sequence[str]) -> None:
        if not texts:
            raise ValueError("texts must not be empty")
        self.texts = list(texts)

    def score(self, log_probs: Tensor, ids: Tensor, mask: Tensor, rows: slice) -> dict[str, Tensor]:
        """(texts,), natural logarithm."""
        count = mask[:, 1:].sum(1)
        if not bool((count > 0).all()):
            short = [text for text, n in zip(self.texts[rows], count.tolist(), strict=True) if not n]
            raise ValueError(f"texts must have at least two tokens, got {short[0]!r}")
        told = log_probs[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        return {"log_likelihood": told.sum(1) / count}


@torch.no_grad()
def steered_states(
    model: nn.Module, batch: dict[str, Tensor], vectors: ReadingVectors, coefficients: Sequence[float],
    layers: Sequence[int] | None = None,
) -> Iterator[tuple[float, Tensor]]:  # fmt: skip
    """The residual stream (B, T, D) after the last layer, for one coefficient after the other.

    Layers below the first steered one do not depend on the coefficient and run once.
    """
    access = Access(model)
    count = len(access.layers)
    first = min(vectors.layers if layers is None else (layer % count for layer in layers))
    with captured(model, [first], "input") as below:
        access.base(**batch, use_cache=False)
    start = below[first]
    for r in coefficients:
        with resumed(model, first, start), steer(model, vectors, r, layers), captured(model, [count - 1]) as after:
            access.base(**batch, use_cache=False)
        yield r, after[count - 1]


@dataclass(frozen=True)
class TradeoffCurve:
    """A sweep over coefficients.

    Attributes:
        r: (R,), increasing.
        values: named measurements, (R, texts of that probe) each.
        delta_norm: (R,), mean length of the change of the last normed hidden state at the last token of help texts.
        logit_std: (R,), standard deviation of the change of wrong letters' logits less the right one's, over questions.
            Both are nan without a help probe that reads last tokens.
    """

    r: np.ndarray
    values: dict[str, np.ndarray]
    delta_norm: np.ndarray
    logit_std: np.ndarray

    def mean(self, name: str) -> np.ndarray:
        """Mean over texts, (R,)."""
        if name not in self.values:
            raise ValueError(f"no measurement {name!r}; there are {', '.join(self.values)}")
        return self.values[name].mean(1)

    def error(self, name: str) -> np.ndarray:
        """Standard error of the mean over texts, (R,)."""
        self.mean(name)
        return self.values[name].std(1, ddof=1) / self.values[name].shape[1] ** 0.5

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each coefficient: r, every measurement with its standard error, delta_norm, logit_std."""
        import pandas as pd

        columns: dict[str, np.ndarray] = {"r": self.r}
        for name in self.values:
            columns[name], columns[f"{name}_se"] = self.mean(name), self.error(name)
        return pd.DataFrame(columns | {"delta_norm": self.delta_norm, "logit_std": self.logit_std})


class TradeoffSweep:
    """Measure behaviour and helpfulness for every coefficient.

    Args:
        model: a causal model of a family of this room.
        tokenizer: its tokenizer.
        vectors: of this model.
        coefficients: at least five, 0 among them.
        align: what is steered, for instance ``OptionContrast``; its values must be called ``B``.
        help: what should stay, for instance ``MultipleChoice`` and ``TextLikelihood``.
        layers: as in ``steer``.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: for fewer than five coefficients, none that is 0, vectors of another model, or missing layers.

    Example:
        >>> sweep = TradeoffSweep(model, tokenizer, vectors, range(-12, 13, 2), align, [help])  # doctest: +SKIP
        >>> fit_tradeoff(sweep.run()).advise_coefficient(max_loss=0.05)  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, vectors: ReadingVectors, coefficients: Sequence[float], align: Probe,
        help: Sequence[Probe] = (), *, layers: Sequence[int] | None = None, batch_size: int = 16,
    ) -> None:  # fmt: skip
        self.coefficients = sorted({float(r) for r in coefficients})
        if len(self.coefficients) < 5 or 0.0 not in self.coefficients or not np.isfinite(self.coefficients).all():
            raise ValueError(f"coefficients must be at least five, 0 among them, and finite, got {list(coefficients)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        # says what is wrong with vectors and layers now, rather than in the middle of a run
        with steer(model, vectors, 0.0, layers):
            pass
        self.model, self.tokenizer, self.vectors, self.layers = model, tokenizer, vectors, layers
        self.align, self.help, self.batch_size = align, list(help), batch_size

    @torch.no_grad()
    def run(self, progress: Any = None) -> TradeoffCurve:
        """All coefficients, without dropout.

        Args:
            progress: called with (done, total) after every batch of texts.

        Raises:
            ValueError: when behaviour leaves [-1, 1], or a measurement is not finite.
        """
        probes = [self.align, *self.help]
        values: dict[str, np.ndarray] = {}
        norms: list[np.ndarray] = []
        gaps: list[np.ndarray] = []
        total = sum(-(-len(probe.texts) // self.batch_size) for probe in probes)
        done = 0
        for probe in probes:
            parts: list[list[dict[str, Tensor]]] = [[] for _ in self.coefficients]
            for start in range(0, len(probe.texts), self.batch_size):
                rows = slice(start, start + self.batch_size)
                with evaluating(self.model):
                    self._batch(probe, rows, parts, norms if probe is not self.align else [], gaps)
                done += 1
                if progress is not None:
                    progress(done, total)
            found = {
                name: np.stack([torch.cat([p[name] for p in part]).double().numpy() for part in parts])
                for name in parts[0][0]
            }
            if finish := getattr(probe, "finish", None):
                found = finish(found)
            if twice := sorted(found.keys() & values.keys()):
                raise ValueError(f"two probes measure {twice[0]!r}")
            values |= found
        if "B" not in values or np.abs(values["B"]).max() > 1 + 1e-6:
            raise ValueError("align must measure 'B', from -1 to 1")
        broken = [name for name, found in values.items() if not np.isfinite(found).all()]
        if broken:
            raise ValueError(f"{', '.join(broken)} not finite; use smaller coefficients or float32")
        nothing = np.full(len(self.coefficients), np.nan)
        moved = np.concatenate(norms, 1).mean(1) if norms else nothing
        spread = np.concatenate(gaps, 1).std(1) if gaps else nothing
        return TradeoffCurve(np.array(self.coefficients), values, moved, spread)

    def _batch(
        self, probe: Probe, rows: slice, parts: list[list[dict[str, Tensor]]],
        norms: list[np.ndarray], gaps: list[np.ndarray],
    ) -> None:  # fmt: skip
        """Scores of some texts for all coefficients, and what happens to last states and competing logits, appended."""
        access = Access(self.model)
        batch = tokenized(self.tokenizer, probe.texts[rows], access.unembedding.device)
        ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu()
        every, last = torch.arange(len(ids)), mask.sum(1) - 1
        states: list[Tensor] = []
        competing: list[Tensor] = []
        swept = steered_states(self.model, batch, self.vectors, self.coefficients, self.layers)
        for k, (_, hidden) in enumerate(swept):
            chosen = hidden if probe.every_token else hidden[every.to(hidden.device), last.to(hidden.device)]
            log_probs = final_logits(self.model, chosen).float().log_softmax(-1).cpu()
            parts[k].append(probe.score(log_probs, ids, mask, rows))
            if not probe.every_token:
                assert access.final_norm is not None
                states.append(access.final_norm(chosen).float().cpu())
            if isinstance(probe, MultipleChoice):
                competing.append(probe.competing(log_probs, rows))
        zero = self.coefficients.index(0.0)
        if states:
            norms.append((torch.stack(states) - states[zero]).norm(dim=-1).numpy())
        if competing:
            gaps.append((torch.stack(competing) - competing[zero]).numpy())


@dataclass(frozen=True)
class TradeoffFit:
    """Curves fitted to a sweep, with 95 % intervals from resampling texts.

    Attributes:
        slope, offset: of ``B(r) = tanh(slope r + offset)``; the slope is the paper's Delta lambda.
        slope_interval: of the slope.
        s, H0: of ``H(r) = H0 / (H0 + (1 - H0) exp(s^2 r^2 / 2))``.
        s_interval: of s.
        r2_linear, r2_quadratic: shares of the variance of H over r that a line and a parabola explain.
        help: which measurement H is.
        r: the coefficients that were measured.
    """

    slope: float
    offset: float
    slope_interval: tuple[float, float]
    s: float
    H0: float
    s_interval: tuple[float, float]
    r2_linear: float
    r2_quadratic: float
    help: str
    r: tuple[float, ...]

    @property
    def B0(self) -> float:
        """Behaviour without steering, as fitted."""
        return float(np.tanh(self.offset))

    def behaviour(self, r: float | np.ndarray) -> Any:
        """Fitted B."""
        return np.tanh(self.slope * np.asarray(r) + self.offset)

    def helpfulness(self, r: float | np.ndarray) -> Any:
        """Fitted H."""
        return helpfulness_gaussian(r, self.H0, self.s)

    def efficient_range(self, eps: float = 0.05) -> tuple[float, float]:
        """Coefficients at which no more than the share ``eps`` of H(0) is lost, within those that were measured."""
        return self._range(eps, self.s)

    def _range(self, eps: float, s: float) -> tuple[float, float]:
        if not 0 < eps < 1:
            raise ValueError(f"the share that may be lost must be between 0 and 1, got {eps}")
        kept = (1 - eps) * self.H0
        # H(r) = kept solved for r; s = 0 loses nothing anywhere
        odds = np.log(self.H0 * (1 - kept) / (kept * (1 - self.H0)))
        edge = float(np.sqrt(2 * odds) / s) if s > 0 else float("inf")
        return max(-edge, min(self.r)), min(edge, max(self.r))

    def advise_coefficient(self, max_loss: float = 0.05) -> float:
        """The coefficient that aligns most while losing at most a share ``max_loss`` of helpfulness.

        On the cautious side: the loss is taken at the upper end of the interval of s, and never beyond what was
        measured. Negative where the vector's behaviour falls with r.
        """
        low, high = self._range(max_loss, self.s_interval[1])
        return high if self.slope >= 0 else low

    def recommend(self, w_align: float = 1.0, w_help: float = 1.0) -> float:
        """The coefficient within what was measured at which ``w_align B + w_help H`` is greatest.

        Raises:
            ValueError: for weights that are negative.
        """
        if w_align < 0 or w_help < 0:
            raise ValueError(f"weights must not be negative, got {w_align} and {w_help}")
        fine = np.linspace(min(self.r), max(self.r), 2001)
        return float(fine[np.argmax(w_align * self.behaviour(fine) + w_help * self.helpfulness(fine))])

    def plot(self, curve: TradeoffCurve) -> Figure:
        """Behaviour and helpfulness against the coefficient, measured and fitted."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        fine = np.linspace(min(self.r), max(self.r), 200)
        for axes, name, fitted in zip(
            figure.subplots(1, 2), ("B", self.help), (self.behaviour, self.helpfulness), strict=True
        ):
            axes.errorbar(curve.r, curve.mean(name), curve.error(name), fmt="o", markersize=4)
            axes.plot(fine, fitted(fine))
            axes.set(xlabel="coefficient r", ylabel="behaviour B" if name == "B" else name)
            axes.grid(alpha=0.3)
        return figure


def _r2(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    total = ((y - y.mean()) ** 2).sum()
    return float(1 - ((np.polyval(np.polyfit(x, y, degree), x) - y) ** 2).sum() / total) if total > 0 else 0.0


def fit_tradeoff(
    curve: TradeoffCurve, help: str = "H_rel", *, window: float | None = None, resamples: int = 200, seed: int = 0
) -> TradeoffFit:
    """Fit a tanh to behaviour and the Gaussian model to helpfulness.

    Args:
        curve: a sweep.
        help: the measurement that is helpfulness, a probability (``H_rel``, ``H_options``, ``accuracy``, …) or
            ``log_likelihood``, which is turned into the probability of a token by the exponential.
        window: fit behaviour within ``|r| <= window`` alone; the tanh saturates, and below it stops short of -1.
        resamples: of the texts, for the intervals; 0 gives intervals of no width.
        seed: of these.

    Raises:
        ValueError: for an unknown measurement or one that is no probability, fewer than five coefficients (in the
            window too), or behaviour that is -1 or 1 without steering, from which no slope can be told.
    """
    from scipy.optimize import curve_fit

    r, near = curve.r, np.abs(curve.r) <= (np.inf if window is None else window)
    if near.sum() < 5:
        raise ValueError(f"need at least five coefficients in the window, got {int(near.sum())}")
    told = curve.mean(help)
    b0 = float(curve.mean("B")[r == 0][0])
    if abs(b0) > 1 - 1e-9:
        raise ValueError(f"behaviour without steering is {b0}; its slope cannot be told, choose other prompts")

    def fitted(b: np.ndarray, h: np.ndarray) -> tuple[float, float, float, float]:
        scale = np.abs(r).max()
        (slope, offset), _ = curve_fit(lambda x, a, c: np.tanh(a * x + c), r[near] / scale, b[near], (0.5, 0.0))
        h0 = float(np.clip(h[r == 0][0], 1e-9, 1 - 1e-9))
        start = np.sqrt(2 * max(np.log(h0 / np.clip(h.min(), 1e-9, h0)), 1e-3))
        (s, level), _ = curve_fit(
            lambda x, s, level: helpfulness_gaussian(x, level, s), r / scale, h, (start, h0),
            bounds=([0, 1e-12], [np.inf, 1 - 1e-12]), x_scale=(1.0, h0),
        )  # fmt: skip
        return float(slope / scale), float(offset), float(s / scale), float(level)

    def probability(values: np.ndarray) -> np.ndarray:
        return np.exp(values) if help == "log_likelihood" else values

    level = probability(told)
    if not ((level >= 0) & (level <= 1 + 1e-6)).all() or not (level[r == 0] > 0).all():
        raise ValueError(
            f"{help!r} must be a probability, above 0 without steering, got {level.min():.3g} to {level.max():.3g}"
        )
    slope, offset, s, h0 = fitted(curve.mean("B"), level)
    draw = np.random.default_rng(seed)
    again = []
    for _ in range(resamples):
        b, h = (
            curve.values[name][:, draw.integers(0, curve.values[name].shape[1], curve.values[name].shape[1])].mean(1)
            for name in ("B", help)
        )
        again.append(fitted(b, probability(h)))
    spread = np.array(again if again else [(slope, offset, s, h0)])

    def interval(column: int) -> tuple[float, float]:
        low, high = np.percentile(spread[:, column], [2.5, 97.5])
        return float(low), float(high)

    return TradeoffFit(
        slope, offset, interval(0), s, h0, interval(2), _r2(r, told, 1), _r2(r, told, 2), help,
        tuple(float(x) for x in r),
    )  # fmt: skip
