"""Evidence for parsed categoric encodings: passengers by their tickets, cabins and names, processors by their names."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchgraft import datasets
from torchgraft.experiments import Arm, Claim, Measurement, Progress, Result, fit, pick_learning_rate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

DATA = ("titanic", "cpus")
FOREST, LOGISTIC, IMPORTANCE, COLUMNS = "accuracy, forest", "accuracy, logistic", "importance", "columns"
TEXT, ALL, CPUS = "passengers, text alone", "passengers, all columns", "processors, name alone"
TASKS = (TEXT, ALL, CPUS)
ONE_HOT, ORDINAL, TARGET, BINARY, NUMBERS = "one-hot", "ordinal", "target", "1010", "numbers only"
NETWORK = "accuracy, network"
MINHASH, STRINGS = "skrub MinHash", "skrub StringEncoder"
NO_OVERLAPS, SHARED = "or19 without overlaps", "or19, shared parts only"
ENCODINGS = {
    TEXT: (ONE_HOT, ORDINAL, TARGET, BINARY, NUMBERS, MINHASH, STRINGS, SHARED, "or19", "or23", "sp15"),
    ALL: (ONE_HOT, ORDINAL, TARGET, MINHASH, "or19", "or23"),
    CPUS: (
        ONE_HOT, ORDINAL, TARGET, BINARY, NUMBERS, MINHASH, STRINGS, NO_OVERLAPS, SHARED, "or15", "or19", "or21",
        "or23", "sp15",
    ),
}  # fmt: skip
OURS = (SHARED, "or15", "or19", "or21", "or23", "sp15")
NETWORKS = ("ord3", "or19", "or23")
PAPER = "IEEE-CIS fraud, one seed, forest accuracy: one-hot 0.980771, ordinal 0.980602, or19 0.980831, or23 0.980899"


def _better(text: str, task: str, ours: str, other: str, paper: str, metric: str = FOREST, effect: float = 1) -> Claim:
    return Claim(text, metric, f"{task}: {ours}", f"{task}: {other}", effect, unit="points", factor=100, paper=paper)


CLAIMS = (
    _better("or19 beats one-hot on composite text alone", TEXT, "or19", ONE_HOT, PAPER),
    _better("or19 beats ordinal codes on composite text alone", TEXT, "or19", ORDINAL, PAPER),
    _better("or23 beats one-hot on composite text alone", TEXT, "or23", ONE_HOT, PAPER),
    _better("or19 beats one-hot on processor names", CPUS, "or19", ONE_HOT, PAPER),
    _better("or19 beats ordinal codes on processor names", CPUS, "or19", ORDINAL, PAPER),
    _better("or23 beats one-hot on processor names", CPUS, "or23", ONE_HOT, PAPER),
    _better("or19 beats target encoding on composite text alone", TEXT, "or19", TARGET, "not compared"),
    _better("or19 beats target encoding on processor names", CPUS, "or19", TARGET, "not compared"),
    _better("or19 beats skrub's MinHash on composite text alone", TEXT, "or19", MINHASH, "not compared"),
    _better("or19 beats skrub's MinHash on processor names", CPUS, "or19", MINHASH, "not compared"),
    _better("or19 beats skrub's StringEncoder on processor names", CPUS, "or19", STRINGS, "not compared"),
    _better("The overlaps of or19 help, on processor names", CPUS, "or19", NO_OVERLAPS, "not compared"),
    _better("The numbers of or19 help, on processor names", CPUS, "or19", "or15", "not compared"),
    _better("Parsing unseen entries helps (or21), on processor names", CPUS, "or21", "or19", "not compared"),
    _better("or19 suffers from codes that unseen entries do not have", CPUS, SHARED, "or19", "not compared"),
    _better("sp15 beats one-hot on composite text alone", TEXT, "sp15", ONE_HOT, "not compared"),
    _better("sp15 beats one-hot on processor names", CPUS, "sp15", ONE_HOT, "not compared"),
    _better("An embedding network does better on or19 than on codes alone", CPUS, "network on or19",
        "network on ord3", "not compared", NETWORK),
    _better(
        "sp15 beats one-hot in a logistic regression on processor names", CPUS, "sp15", ONE_HOT, "not compared",
        LOGISTIC,
    ),
    Claim(
        "Beside the other columns or19 changes accuracy by less than a point", FOREST, f"{ALL}: or19",
        f"{ALL}: {ONE_HOT}", 1, direction="equal", unit="points", factor=100,
        paper="a gain in the fourth digit: 0.980831 against 0.980771",
    ),
    _better(
        "The forest relies more on or19 than on one-hot of the same columns", ALL, "or19", ONE_HOT,
        "permutation importance of id_30 0.003065 against 0.002337, of id_31 0.009212 against 0.008069",
        IMPORTANCE, 0.05,
    ),
    _better(
        "The forest relies more on or19 than on ordinal codes", ALL, "or19", ORDINAL,
        "permutation importance of id_30 0.003065 against 0.002587, of id_31 0.009212 against 0.007586",
        IMPORTANCE, 0.05,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
        seeds: of the folds and the forest; intervals are over rows, after averaging over seeds.
        data: ``titanic+cpus``; ``built-in`` draws small tables of the same kind, for where there is no data.
        folds: of the cross-validation.
        trees: of the forest.
        leaves: fewest rows in a leaf, chosen by the out-of-bag rows of each training part.
        strengths: C of the logistic regression, chosen by cross-validation within each training part.
        steps, learning_rates: of the network, for every encoding alike; the rate is chosen on a fifth of the first
            training part.
        device: nothing here runs anywhere but on the processor.
    """

    seeds: int = 3
    data: str = "titanic+cpus"
    folds: int = 5
    trees: int = 50
    leaves: tuple[int, ...] = (1, 3)
    strengths: tuple[float, ...] = (0.1, 1.0, 10.0)
    steps: int = 200
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    device: str = "cpu"


SCALES = {
    "smoke": Config(
        seeds=1, data="built-in", folds=2, trees=3, leaves=(1,), strengths=(1.0,), steps=3, learning_rates=(1e-2,)
    ),
    "laptop": Config(),
}


@dataclass(frozen=True)
class Task:
    """A table, its labels, and which columns are text, numbers and plain categories."""

    frame: DataFrame
    labels: np.ndarray
    text: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


def _built_in() -> Mapping[str, Task]:
    import pandas

    draw = random.Random(0)
    kinds = [draw.choice(["PC ", "A/5 ", "STON/O2. "]) for _ in range(40)]
    frame = pandas.DataFrame({"ticket": [f"{kind}{draw.randint(100, 999)}" for kind in kinds]})
    frame["age"] = [draw.random() * 80 if draw.random() < 0.8 else None for _ in kinds]
    frame["sex"] = [draw.choice(["m", "f"]) for _ in kinds]
    labels = np.array([int(kind == "PC ") ^ (draw.random() < 0.1) for kind in kinds])
    return {
        TEXT: Task(frame, labels, ("ticket",)),
        ALL: Task(frame, labels, ("ticket",), ("age",), ("sex",)),
        CPUS: Task(frame, labels, ("ticket",)),
    }


@lru_cache(maxsize=1)
def _tasks(data: str) -> Mapping[str, Task]:
    if data == "built-in":
        return _built_in()
    if data != "titanic+cpus":
        raise ValueError(f"data must be 'titanic+cpus' or 'built-in', got {data!r}")
    passengers, cpus = datasets.load("titanic"), datasets.load("cpus")
    survived = passengers.frame[passengers.target].to_numpy()
    watts = cpus.frame[cpus.target].to_numpy()
    text = ("Ticket", "Cabin", "Name")
    numbers, plain = ("Pclass", "Age", "SibSp", "Parch", "Fare"), ("Sex", "Embarked")
    return {
        TEXT: Task(passengers.frame, survived, text),
        ALL: Task(passengers.frame, survived, text, numbers, plain),
        CPUS: Task(cpus.frame, (watts > np.median(watts)).astype(int), ("name",)),
    }


def _encoding(name: str) -> Any:
    """A transformer of text columns, and whether it takes one column at a time."""
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, TargetEncoder

    from torchgraft.tabular.automunge import FamilyTree

    if name == ONE_HOT:
        return OneHotEncoder(handle_unknown="ignore")
    if name == ORDINAL:
        return OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2)
    if name == TARGET:
        return TargetEncoder(cv=StratifiedKFold(5, shuffle=True, random_state=0))
    if name == NUMBERS:
        return FamilyTree("nmcm")
    if name == NO_OVERLAPS:
        return FamilyTree("or19", trees={"or19": {"parents": ["or19"], "children": ["nmc8"], "coworkers": ["1010"]}})
    if name == SHARED:
        # what is left of or19 when nothing in it tells training entries apart that share their parts
        return FamilyTree("or19", trees={"or19": {"parents": ["or19"], "children": ["nmc8", "spl5"]}})
    return FamilyTree(name)


def _columns(task: Task, name: str) -> Any:
    """The same pipeline for every encoding: only what is done to the text columns differs."""
    import skrub
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import OneHotEncoder

    text = list(task.text)
    if name in (MINHASH, STRINGS):
        one = skrub.MinHashEncoder if name == MINHASH else partial(skrub.StringEncoder, random_state=0)
        parts: list[tuple[str, Any, Any]] = [
            (column, one(n_components=min(30, len(task.frame) // 4)), column) for column in text
        ]
    else:
        parts = [("text", _encoding(name), text)]
    if task.numbers:
        parts.append(("numbers", SimpleImputer(add_indicator=True), list(task.numbers)))
        parts.append(("plain", OneHotEncoder(handle_unknown="ignore"), list(task.plain)))
    return ColumnTransformer(parts)


def _dense_if_small(table: Any) -> Any:
    return table.toarray() if hasattr(table, "toarray") and table.shape[1] < 300 else table


def _forest(config: Config, seed: int, x: Any, y: np.ndarray) -> Any:
    """A forest whose smallest leaf was chosen by the rows that each tree did not see."""
    from sklearn.ensemble import RandomForestClassifier

    tried = [
        RandomForestClassifier(config.trees, min_samples_leaf=leaf, oob_score=True, random_state=seed).fit(x, y)
        for leaf in config.leaves
    ]
    return max(tried, key=lambda forest: forest.oob_score_)


def _logistic(config: Config, x: Any, y: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    model = LogisticRegressionCV(
        Cs=list(config.strengths), cv=2, solver="liblinear", scoring="accuracy", l1_ratios=(0.0,),
        use_legacy_attributes=False,
    )  # fmt: skip
    return make_pipeline(MaxAbsScaler(), model).fit(x, y)


def _evaluate(config: Config, task: Task, name: str, seed: int) -> Measurement:
    """Every row predicted once, by models that saw none of its fold."""
    from sklearn.model_selection import StratifiedKFold

    rows = len(task.labels)
    right = {metric: np.zeros(rows) for metric in (FOREST, LOGISTIC, IMPORTANCE)}
    widths = []
    draw = np.random.default_rng(seed)
    for train, test in StratifiedKFold(config.folds, shuffle=True, random_state=seed).split(task.frame, task.labels):
        y = task.labels
        encoder = _columns(task, name)
        x = _dense_if_small(encoder.fit_transform(task.frame.iloc[train], y[train]))
        held_out = task.frame.iloc[test]
        z = _dense_if_small(encoder.transform(held_out))
        forest = _forest(config, seed, x, y[train])
        right[FOREST][test] = forest.predict(z) == y[test]
        right[LOGISTIC][test] = _logistic(config, x, y[train]).predict(z) == y[test]
        shuffled = held_out.copy()
        shuffled[list(task.text)] = held_out[list(task.text)].to_numpy()[draw.permutation(len(test))]
        without = forest.predict(_dense_if_small(encoder.transform(shuffled))) == y[test]
        right[IMPORTANCE][test] = right[FOREST][test] - without
        widths.append(x.shape[1])
    metrics = {metric: float(values.mean()) for metric, values in right.items()}
    return Measurement(
        metrics | {COLUMNS: float(np.mean(widths))}, examples={m: values.tolist() for m, values in right.items()}
    )


class Network(nn.Module):
    """An embedding for every column of codes, beside the numbers, into one hidden layer."""

    def __init__(self, cardinalities: tuple[int, ...], floats: int, width: int = 64) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 8) for n in cardinalities)
        self.norm = nn.BatchNorm1d(floats)
        inside = 8 * len(cardinalities) + floats
        self.layers = nn.Sequential(nn.Linear(inside, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2))

    def forward(self, codes: Tensor, floats: Tensor) -> Tensor:
        """Logits (B, 2)."""
        parts = [table(codes[:, i]) for i, table in enumerate(self.tables)]
        return self.layers(torch.cat([*parts, self.norm(floats)], 1))


def _fit_network(
    config: Config, task: Task, name: str, seed: int, rate: float, train: np.ndarray, test: np.ndarray
) -> np.ndarray:
    """Whether each test row is predicted right by a network that saw the training rows."""
    from torchgraft.tabular.automunge import FamilyTree, TabularTorch

    text = task.frame[list(task.text)]
    encoder = TabularTorch(FamilyTree(name)).fit(text.iloc[train])
    rows = encoder.transform(text.iloc[train])
    torch.manual_seed(seed)
    network = Network(rows.cardinalities, rows.floats.shape[1])
    labels = torch.from_numpy(task.labels.astype(np.int64))
    fit(
        network,
        (rows.codes, rows.floats, labels[train]),
        lambda model, batch: nn.functional.cross_entropy(model(batch[0], batch[1]), batch[2]),
        steps=config.steps,
        batch_size=min(64, len(train)),
        optimizer=lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=1e-2),
        schedule="cosine",
        seed=seed,
    )
    held_out = encoder.transform(text.iloc[test])
    with torch.no_grad():
        predicted = network.eval()(held_out.codes, held_out.floats).argmax(1)
    return (predicted == labels[test]).numpy()


def _tuned(
    config: Config, task: Task, name: str, seed: int, fewer: np.ndarray, validation: np.ndarray
) -> dict[str, Any]:
    def score(rate: float) -> float:
        return float(_fit_network(config, task, name, seed, rate, fewer, validation).mean())

    return pick_learning_rate(config.learning_rates, score)


def _network(config: Config, task: Task, name: str, seed: int, progress: Progress, key: str) -> Measurement:
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(config.folds, shuffle=True, random_state=seed).split(task.frame, task.labels)
    right = np.zeros(len(task.labels))
    for train, test in folds:
        fewer, validation = train[len(train) // 5 :], train[: len(train) // 5]

        tune = partial(_tuned, config, task, name, seed, fewer, validation)
        rate = progress.once(key, tune)["chosen"]
        right[test] = _fit_network(config, task, name, seed, rate, train, test)
    return Measurement({NETWORK: float(right.mean())}, examples={NETWORK: right.tolist()})


def arms(config: Config) -> Mapping[str, Arm]:
    """Every task with every encoding of its text columns."""

    def arm(task: str, encoding: str) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            with warnings.catch_warnings():
                # a fold may hold a column without shared sub-strings, and categories the training part has not
                warnings.simplefilter("ignore", UserWarning)
                return _evaluate(config, _tasks(config.data)[task], encoding, seed)

        return run

    def network(task: str, encoding: str) -> Arm:
        def run(seed: int, progress: Progress) -> Measurement:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                key = f"network-{TASKS.index(task)}-{encoding}"
                return _network(config, _tasks(config.data)[task], encoding, seed, progress, key)

        return run

    made = {
        f"{task}: {encoding}": arm(task, encoding) for task, encodings in ENCODINGS.items() for encoding in encodings
    }
    return made | {
        f"{task}: network on {encoding}": network(task, encoding) for task in (TEXT, CPUS) for encoding in NETWORKS
    }


def figures(result: Result) -> Mapping[str, Figure]:
    """Accuracy of every encoding, forest and logistic regression, one panel a task; beside it the columns it makes."""
    from matplotlib.figure import Figure

    from torchgraft.experiments.statistics import bootstrap_interval

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    rows = ENCODINGS[CPUS]
    for ax, task in zip(panels, TASKS, strict=True):
        for encoding in ENCODINGS[task]:
            y = rows.index(encoding)
            arm = f"{task}: {encoding}"
            colour = "#D55E00" if encoding in OURS else "#777777"
            for metric, mark, shift in ((FOREST, "o", -0.12), (LOGISTIC, "^", 0.12)):
                per_row = np.mean([m.examples[metric] for m in result.measurements[arm].values()], 0)
                low, high = bootstrap_interval(100 * per_row) or (100 * per_row.mean(),) * 2
                ax.plot([low, high], [y + shift] * 2, "-", color=colour, linewidth=1)
                ax.plot([100 * per_row.mean()], [y + shift], mark, color=colour, markersize=5)
            width = result.values(arm, COLUMNS).mean()
            ax.annotate(f"{width:.0f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
        ax.set(xlabel="accuracy, %", title=task)
        ax.title.set_fontsize(10)
        ax.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].invert_yaxis()
    forest = panels[0].plot([], [], "o", color="#444444", label="random forest")
    logistic = panels[0].plot([], [], "^", color="#444444", label="logistic regression")
    figure.legend(handles=forest + logistic, frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    figure.suptitle("Lines: 95 % bootstrap over rows. At the right of each panel: number of columns", fontsize=10)
    return {"automunge": figure}


def _unseen(config: Config, task: Task, column: str) -> float:
    """Share of held-out entries that the training part does not have, over the folds of the first seed."""
    from sklearn.model_selection import StratifiedKFold

    values, unseen, held_out = task.frame[column], 0, 0
    for train, test in StratifiedKFold(config.folds, shuffle=True, random_state=0).split(task.frame, task.labels):
        entries = values.iloc[test].dropna()
        unseen += int((~entries.isin(values.iloc[train])).sum())
        held_out += len(entries)
    return unseen / held_out


def notes(result: Result) -> str:
    """What was measured, and what the numbers cannot say."""
    c = result.config
    shares = ", ".join(
        f"{column} {100 * _unseen(c, _tasks(c.data)[task], column):.0f} %"
        for task in (TEXT, CPUS)
        for column in _tasks(c.data)[task].text
    )
    sizes = {task: len(_tasks(c.data)[task].labels) for task in TASKS}
    return (
        f"{c.folds}-fold cross-validation, {c.seeds} seeds, every row predicted by models that saw none of its fold; "
        f"rows: {', '.join(f'{task} {n}' for task, n in sizes.items())}. One pipeline for all encodings: encoder, then "
        f"a forest of {c.trees} trees (smallest leaf from {list(c.leaves)} by out-of-bag rows) or a logistic "
        f"regression (C from {list(c.strengths)} by cross-validation inside the training part). Passengers: survival, "
        "from Ticket, Cabin and Name alone, or with class, age, fare, family, sex and port. Processors: whether the "
        "design power is above the median, from the model name alone. 'importance': loss of the forest's accuracy when "
        "the text columns of the held-out rows are shuffled together. 'network': embeddings of the codes beside the "
        f"numbers, one hidden layer, {c.steps} steps, the learning rate chosen per encoding. Intervals are a paired "
        "bootstrap over rows, after averaging over seeds; they do not cover the choice of another table. Why or19 does "
        "badly here: it gives every training entry a code of its own (1010, and ord3 of what shares nothing), and "
        "unseen entries the code 0, by the official design (test as train); a forest learns the codes by heart and "
        f"does not find them again. Unseen among the held-out entries: {shares}. 'Shared parts only' keeps the number "
        "and the longest known part, and no code of the entry. The paper's columns, operating systems and browsers in "
        "590,000 fraud records, repeat their entries, so hardly any should be unseen (not checked: that table is not "
        "free to use); its gains, of one seed, are in the fourth digit, far below what tables of this size can show."
    )
