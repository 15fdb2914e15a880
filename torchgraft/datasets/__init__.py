"""Real data by name: a folder of yours (``TORCHGRAFT_DATA``), else the cache, else the hub.

Example:
    >>> digits = load("digits")
    >>> digits.train_x.shape, digits.train_x.dtype, len(digits.classes)
    (torch.Size([1442, 1, 8, 8]), torch.uint8, 10)
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["DATASETS", "Images", "MultipleChoice", "Question", "Source", "Text", "available", "load"]


@dataclass(frozen=True)
class Images:
    """Labelled images: ``*_x`` uint8 of shape (N, C, H, W) in 0..255, ``*_y`` int64 of shape (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for x, y in ((self.train_x, self.train_y), (self.test_x, self.test_y)):
            if len(x) != len(y):
                raise ValueError(f"{len(x)} images have {len(y)} labels; the files do not belong together")
            if y.numel() and not (int(y.min()) >= 0 and int(y.max()) < len(self.classes)):
                raise ValueError(f"labels run from {int(y.min())} to {int(y.max())}, want 0..{len(self.classes) - 1}")


@dataclass(frozen=True)
class Text:
    """Plain text, cut in two at a fixed place."""

    train: str
    test: str


@dataclass(frozen=True)
class Question:
    """A question, its options, and the index of the right one."""

    question: str
    options: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        if not 0 <= self.answer < len(self.options):
            raise ValueError(f"answer {self.answer} is not one of the {len(self.options)} options")


@dataclass(frozen=True)
class MultipleChoice:
    """Multiple-choice questions."""

    items: tuple[Question, ...]


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from.

    Attributes:
        files: paths below ``TORCHGRAFT_DATA`` or the cache; empty for what ships with a package.
        hub: name of the dataset on the hub, empty when it has none.
        licence: as its publisher states it.
        read: from the folder that holds ``files`` to the data.
    """

    files: tuple[str, ...]
    hub: str
    licence: str
    read: Callable[[Path], Images | Text | MultipleChoice]


def cache_folder() -> Path:
    """``TORCHGRAFT_CACHE``, else ``torchgraft`` in the user's cache folder."""
    if chosen := os.environ.get("TORCHGRAFT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchgraft"


def _idx(path: Path) -> Tensor:
    """An IDX file of bytes, gzipped, as a uint8 tensor."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}; put the publisher's file there again") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{path} should hold {shape} bytes, but has {values.size}")
    return torch.from_numpy(values.reshape(shape).copy())


def _digits(_: Path) -> Images:
    from sklearn.datasets import load_digits

    raw = load_digits()
    # every fifth image of each class is for testing: a split that depends on nothing but the data
    order = np.argsort(raw.target, kind="stable")
    place = np.empty(len(order), int)
    for digit in range(10):
        members = order[raw.target[order] == digit]
        place[members] = np.arange(len(members))
    test = torch.from_numpy(place % 5 == 4)
    x = torch.from_numpy(np.round(raw.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(raw.target.astype(np.int64))
    return Images(x[~test], y[~test], x[test], y[test], tuple(str(d) for d in range(10)))


def _fashion(folder: Path) -> Images:
    def part(name: str) -> tuple[Tensor, Tensor]:
        images = _idx(folder / f"images/fashion-mnist/{name}-images-idx3-ubyte.gz")
        labels = _idx(folder / f"images/fashion-mnist/{name}-labels-idx1-ubyte.gz")
        return images[:, None], labels.long()

    names = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"
    return Images(*part("train"), *part("t10k"), tuple(names.split()))


def _cifar10(folder: Path) -> Images:
    from PIL import Image

    root = folder / "images/cifar10"

    def part(pngs: list[str], labels: str) -> tuple[Tensor, Tensor]:
        pictures = []
        for name in pngs:
            with Image.open(root / name) as image:
                rows = np.asarray(image.convert("RGB"))
            if rows.shape != (10000, 1024, 3):
                raise ValueError(f"{root / name} should be 1024 x 10000 pixels, one image a row, got {rows.shape}")
            pictures.append(torch.from_numpy(rows.copy()).view(10000, 32, 32, 3).permute(0, 3, 1, 2))
        x = torch.cat(pictures).contiguous()
        y = torch.tensor(json.loads((root / labels).read_text(encoding="utf-8")))
        # the label file lists the whole training set in order; the pictures are its beginning
        return x, y[: len(x)]

    train = part(["data_batch_1.png", "data_batch_2.png"], "train_lables.json")
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    return Images(*train, *part(["test_batch.png"], "test_lables.json"), tuple(names.split()))


def _shakespeare(folder: Path) -> Text:
    whole = (folder / "text/shakespeare.txt").read_text(encoding="utf-8")
    cut = len(whole) * 9 // 10
    return Text(whole[:cut], whole[cut:])


def _commonsenseqa(folder: Path) -> MultipleChoice:
    """The published file lists the right option first; here options stand in alphabetical order."""
    items = []
    for row in json.loads((folder / "text/commonsenseqa-500.json").read_text(encoding="utf-8")):
        right, wrong = row["prompt_metadata"]["label"], row["prompt_metadata"]["incorrect_answers"]
        options = tuple(sorted([right, *wrong]))
        question = row["prompt"].split("<|start_2d|>")[0].strip()
        items.append(Question(question, options, options.index(right)))
    return MultipleChoice(tuple(items))


def _questions(_: Path) -> MultipleChoice:
    rows = json.loads((Path(__file__).parent / "questions.json").read_text(encoding="utf-8"))
    return MultipleChoice(tuple(Question(r["question"], tuple(r["options"]), r["answer"]) for r in rows))


_FASHION = tuple(
    f"images/fashion-mnist/{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
_CIFAR = tuple(
    f"images/cifar10/{name}"
    for name in ("data_batch_1.png", "data_batch_2.png", "test_batch.png", "train_lables.json", "test_lables.json")
)

DATASETS = {
    "digits": Source((), "", "BSD-3-Clause, ships with scikit-learn", _digits),
    "questions": Source((), "", "Apache-2.0, ours, ships with torchgraft", _questions),
    "fashion-mnist": Source(_FASHION, "zalando-datasets/fashion_mnist", "MIT", _fashion),
    "cifar10": Source(_CIFAR, "uoft-cs/cifar10", "none stated", _cifar10),
    "shakespeare": Source(("text/shakespeare.txt",), "karpathy/tiny_shakespeare", "public domain", _shakespeare),
    "commonsenseqa": Source(("text/commonsenseqa-500.json",), "tau/commonsense_qa", "MIT", _commonsenseqa),
}


class DatasetNotFoundError(FileNotFoundError):
    """A dataset is not on this machine; the message says how to bring it."""


def _roots() -> list[Path]:
    chosen = os.environ.get("TORCHGRAFT_DATA")
    return [*([Path(chosen)] if chosen else []), cache_folder() / "data"]


def _where(source: Source) -> Path | None:
    for root in _roots():
        if all((root / name).is_file() for name in source.files):
            return root
    return None


def available() -> dict[str, str | None]:
    """Where each dataset would be read from, without reading it; ``None`` for what is not on this machine."""
    found: dict[str, str | None] = {}
    for name, source in DATASETS.items():
        root = _where(source)
        found[name] = "ships with a package" if not source.files else None if root is None else str(root)
    return found


def load(name: str) -> Images | Text | MultipleChoice:
    """Load a dataset by name.

    ``digits`` and ``questions`` are always there. The others are read from the folder ``TORCHGRAFT_DATA``, else from
    the cache; ``DATASETS`` names their files, licences and hub names.

    Args:
        name: one of ``DATASETS``.

    Returns:
        ``Images`` (digits, fashion-mnist, cifar10: the first 20,000 training images and all 10,000 test images,
        lossless), ``Text`` (shakespeare: first nine tenths and last tenth), or ``MultipleChoice``.

    Raises:
        ValueError: for an unknown name (the nearest is suggested) and for damaged files.
        DatasetNotFoundError: when the files are nowhere; names the ways to bring them.
    """
    if name not in DATASETS:
        import difflib

        near = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(DATASETS)}"
        raise ValueError(f"no dataset {name!r}; {hint}")
    source = DATASETS[name]
    root = _where(source)
    if root is None:
        raise DatasetNotFoundError(
            f"dataset {name!r} is not on this machine. Three ways to bring it: (1) export TORCHGRAFT_DATA=FOLDER, a "
            f"folder that holds {', '.join(source.files)}; (2) put those files below {cache_folder() / 'data'}; "
            f"(3) take it from the hub, where it is {source.hub!r}, and store it under those names."
        )
    return source.read(root)
