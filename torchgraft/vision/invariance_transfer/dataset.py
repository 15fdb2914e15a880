"""Transforms-2D: an object on a background under random transformations, as a function of the index (paper, section 3).

Differences from the published code: image i depends on the seeds and on i alone, where there it depends on how many
were drawn before it; a given transform seed is shifted for validation and test too, where there all parts share it;
images come in 0..1, without normalisation (published: mean and standard deviation 0.5).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from torchgraft.vision.invariance_transfer.cutouts import Cutouts, composite, prepared_backgrounds, prepared_objects
from torchgraft.vision.invariance_transfer.draws import Draws
from torchgraft.vision.invariance_transfer.transforms import Transform, transform

Sample = tuple[Tensor, Tensor]
Pair = tuple[Tensor, Tensor, Tensor]
SHIFTS = {"train": 0, "val": 110, "test": 220}
"""What is added to the seeds of each part, as published."""
_BACKGROUNDS = 593
_PIXELS = 131_072  # made at once: fewer need more calls, more need buffers that the system clears anew each time


def _check_whole(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")


def _place(index: Any, length: int) -> int:
    """An index as a list takes it, from the end too."""
    try:
        place = operator.index(index)
    except TypeError:
        got = f"{index!r}; for several images use batch(range(…))"
        raise TypeError(f"an index must be a whole number, got {got}") from None
    if not -length <= place < length:
        raise IndexError(f"index {place} is not within 0..{length - 1}")
    return place % length


def _parts(length: int, batch_size: int) -> tuple[Tensor, ...]:
    """Indices in order, in batches of nearly equal size."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return torch.arange(length).tensor_split(-(-length // batch_size))


class Transforms2D(Dataset[Sample]):
    """Labelled images of transformed objects on backgrounds.

    ``dataset[i]`` is ``(image, label)``, float32 (3, S, S) in 0..1 and int64 (). A ``DataLoader`` fetches whole batches
    at once through ``__getitems__``, in any order and any number of workers; ``batch`` and ``batches`` do without one.

    Args:
        foregrounds: one entry for each class: a square RGBA image, or a sequence of them of which one is drawn each
            time. Tensors (4, h, w), uint8 or floats in 0..1, or Pillow images.
        backgrounds: square RGB images (N, 3, h, w) or a sequence of them; ``"noise"`` draws uniform bytes for every
            image; ``"black"``.
        transforms: names of ``TRANSFORMS`` or modules from ``transform``, applied in this order; none leaves objects as
            they are.
        n_samples: how many images.
        img_size: of the square canvas, in pixels.
        sampling_seed: of classes and backgrounds.
        transforms_seed: of the transformations alone; two sets that differ in it alone are twins. None takes
            ``sampling_seed``.
        fg_bg_correlation: probability that an object takes the class of its background.
        fg_availability: probability that an object is pasted at all.
        label: the class of the ``foreground`` or of the ``background``.
        background_labels: (N,) int64, the classes of the backgrounds, where they have any.
        object_scale: size of an object within the canvas.
        device: where images are made.

    Raises:
        TypeError, ValueError: for images of a wrong rank, dtype, range, channel count or shape, NaN pixels, an unknown
            transformation or one that the canvas is too small for, probabilities outside 0..1, and settings that
            contradict each other.

    Example:
        >>> from torchgraft.vision.invariance_transfer import shape_objects
        >>> data = Transforms2D(shape_objects(5), "noise", ["rotate", "blur"], n_samples=100)
        >>> image, label = data[3]
        >>> image.shape, 0 <= int(label) < 5
        (torch.Size([3, 32, 32]), True)
        >>> images, labels = data.batch(range(64))
        >>> bool((images[3] == image).all())
        True
    """

    def __init__(
        self,
        foregrounds: Sequence[Any],
        backgrounds: Tensor | Sequence[Any] | Literal["noise", "black"],
        transforms: Sequence[str | Transform] = (),
        n_samples: int = 50_000,
        img_size: int = 32,
        *,
        sampling_seed: int = 0,
        transforms_seed: int | None = None,
        fg_bg_correlation: float = 0.0,
        fg_availability: float = 1.0,
        label: Literal["foreground", "background"] = "foreground",
        background_labels: Tensor | None = None,
        object_scale: float = 0.7,
        device: str | torch.device = "cpu",
    ) -> None:
        _check_whole(n_samples=n_samples, img_size=img_size, sampling_seed=sampling_seed)
        if transforms_seed is not None:
            _check_whole(transforms_seed=transforms_seed)
        if n_samples < 1 or img_size < 2:
            raise ValueError(f"want at least 1 sample of at least 2 pixels, got {n_samples} of {img_size}")
        for name, value in (("fg_bg_correlation", fg_bg_correlation), ("fg_availability", fg_availability)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability, 0..1, got {value}")
        if label not in ("foreground", "background"):
            raise ValueError(f"label must be 'foreground' or 'background', got {label!r}")
        if fg_availability < 1 and label == "foreground":
            raise ValueError("an image without an object has no foreground label; use label='background'")
        if not 0 < object_scale <= 1:
            raise ValueError(f"object_scale must lie in (0, 1], got {object_scale}")
        if len(foregrounds) == 0:
            raise ValueError("foregrounds is empty; give at least one object")
        classes = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in foregrounds]
        if not all(classes):
            raise ValueError(f"class {[len(c) for c in classes].index(0)} of foregrounds has no image")
        self.device = torch.device(device)
        objects = prepared_objects([image for members in classes for image in members], img_size, object_scale)
        self._objects = Cutouts(*(part.to(self.device) for part in objects))
        self._counts = torch.tensor([len(members) for members in classes], device=self.device)
        self._starts = self._counts.cumsum(0) - self._counts
        self._backgrounds: Tensor | str
        if isinstance(backgrounds, str):
            if backgrounds not in ("noise", "black"):
                raise ValueError(f"backgrounds must be images, 'noise' or 'black', got {backgrounds!r}")
            self._backgrounds = backgrounds
        else:
            if len(backgrounds) == 0:
                raise ValueError("backgrounds is empty; give images, 'noise' or 'black'")
            self._backgrounds = prepared_backgrounds(backgrounds, img_size).to(self.device)
        self._background_labels = self._checked_labels(background_labels, label, fg_bg_correlation)
        self.n_samples, self.img_size = n_samples, img_size
        self.sampling_seed, self.transforms_seed = sampling_seed, transforms_seed
        self.fg_bg_correlation, self.fg_availability = fg_bg_correlation, fg_availability
        self.label, self.object_scale = label, object_scale
        self.transforms = self._checked_transforms(transforms)

    def _checked_labels(self, labels: Tensor | None, label: str, correlation: float) -> Tensor | None:
        if labels is None:
            if label == "background" or correlation > 0:
                wants = "label='background'" if label == "background" else "fg_bg_correlation"
                raise ValueError(f"{wants} needs background_labels, the classes of the backgrounds")
            return None
        if isinstance(self._backgrounds, str):
            raise ValueError(f"background_labels were given, but {self._backgrounds} backgrounds have no classes")
        if not isinstance(labels, Tensor):
            raise TypeError(f"background_labels must be an int64 tensor, got {type(labels).__name__}")
        if labels.dtype != torch.int64 or tuple(labels.shape) != (len(self._backgrounds),):
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"background_labels must be int64 of shape ({len(self._backgrounds)},), got {got}")
        if int(labels.min()) < 0 or (correlation > 0 and int(labels.max()) >= len(self._counts)):
            got = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"background_labels run from {got}; there are {len(self._counts)} object classes")
        return labels.to(self.device)

    def _checked_transforms(self, transforms: Sequence[str | Transform]) -> tuple[Transform, ...]:
        if isinstance(transforms, str):
            raise TypeError(
                f"transforms must be a sequence of names or modules, got {transforms!r}; use [{transforms!r}]"
            )
        if not isinstance(transforms, Iterable) or isinstance(transforms, AbstractSet | Mapping):
            # a set would be in another order in another process
            raise TypeError(
                f"transforms must be a list or tuple, in order, got {transforms!r} ({type(transforms).__name__})"
            )
        made = tuple(transform(entry) if isinstance(entry, str) else entry for entry in transforms)
        for entry in made:
            if not isinstance(entry, Transform):
                raise TypeError(
                    f"a transformation is a name or comes from transform() or Wrapped(), got {type(entry).__name__}"
                )
            entry.check_size(self.img_size)
        return made

    @property
    def n_classes(self) -> int:
        """Number of classes of the label."""
        if self.label == "foreground":
            return len(self._counts)
        assert self._background_labels is not None
        return int(self._background_labels.max()) + 1

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, index: int) -> Sample:
        images, labels = self.batch([_place(index, len(self))])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return list(zip(*self.batch(indices), strict=True))

    def _indices(self, indices: Sequence[int] | Tensor) -> Int64[Tensor, " B"]:
        given = list(indices) if isinstance(indices, range) else indices
        # no index at all would be a tensor of floats
        kind = None if len(given) else torch.int64
        index = torch.as_tensor(given, dtype=kind, device=self.device)
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"indices must be whole numbers in a sequence, got {index.dtype} {tuple(index.shape)}")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"indices must lie in 0..{len(self) - 1}, got {int(index.min())} … {int(index.max())}")
        return index.long()

    def _scene(self, index: Tensor) -> tuple[Cutouts, UInt8[Tensor, "B 3 S S"], Tensor, Tensor]:
        """Objects before their transformations, backgrounds, labels, and which objects are shown."""
        seed, size = self.sampling_seed, self.img_size
        behind = Draws(seed + _BACKGROUNDS, "background", index)
        front = Draws(seed, "foreground", index)
        kind, prototype = front.choice(len(self._counts)), front.uniform()
        follows, shown = front.chance(self.fg_bg_correlation), front.chance(self.fg_availability)
        label = kind
        if isinstance(self._backgrounds, Tensor):
            which = behind.choice(len(self._backgrounds))
            under = self._backgrounds.index_select(0, which)
            if self._background_labels is not None:
                label = self._background_labels[which]
                kind = torch.where(follows, label, kind)
        elif self._backgrounds == "noise":
            under = behind.shorts(3 * size * size).to(torch.uint8).view(-1, 3, size, size)
        else:
            under = torch.zeros(len(index), 3, size, size, dtype=torch.uint8, device=self.device)
        chosen = self._starts[kind] + (prototype * self._counts[kind]).long()
        return self._objects.at(chosen), under, kind if self.label == "foreground" else label, shown

    def _transformed(self, cutouts: Cutouts, index: Tensor, seed: int) -> Cutouts:
        for place, change in enumerate(self.transforms):
            cutouts = change(cutouts, Draws(seed, f"transform {place} {type(change).__name__}", index))
        return cutouts

    def _pasted(self, cutouts: Cutouts, under: Tensor, shown: Tensor) -> Float32[Tensor, "B 3 S S"]:
        if self.fg_availability < 1:
            cutouts = Cutouts(cutouts.rgba * shown[:, None, None, None], cutouts.box)
        return composite(cutouts, under).div_(255)

    @property
    def _seed(self) -> int:
        return self.sampling_seed if self.transforms_seed is None else self.transforms_seed

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Float32[Tensor, "B 3 S S"], Int64[Tensor, " B"]]:
        """Images and labels of several indices at once.

        Raises:
            ValueError: for indices that are no whole numbers.
            IndexError: for indices outside the set.
        """
        return self._drawn(indices, (self._seed,))  # type: ignore[return-value]

    def _drawn(self, indices: Sequence[int] | Tensor, seeds: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Images under each of several seeds of the transformations, and labels."""
        parts = []
        for index in self._indices(indices).split(max(_PIXELS // self.img_size**2, 1)):
            cutouts, under, label, shown = self._scene(index)
            images = (self._pasted(self._transformed(cutouts, index, seed), under, shown) for seed in seeds)
            parts.append((*images, label))
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

    def batches(self, batch_size: int = 256) -> Iterator[Sample]:
        """The whole set in order, in batches of nearly equal size."""
        for index in _parts(len(self), batch_size):
            yield self.batch(index)

    def tensors(self) -> tuple[Float32[Tensor, "N 3 S S"], Int64[Tensor, " N"]]:
        """The whole set at once."""
        parts = list(self.batches())
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def replace(
        self,
        *,
        transforms: Sequence[str | Transform] | None = None,
        n_samples: int | None = None,
        sampling_seed: int | None = None,
        transforms_seed: int | None = None,
    ) -> Transforms2D:
        """The same objects and backgrounds with other transformations, another size or other seeds."""
        given = {"n_samples": n_samples, "sampling_seed": sampling_seed, "transforms_seed": transforms_seed}
        _check_whole(**{name: value for name, value in given.items() if value is not None})
        other = copy.copy(self)
        if transforms is not None:
            other.transforms = self._checked_transforms(transforms)
        if n_samples is not None:
            if n_samples < 1:
                raise ValueError(f"n_samples must be at least 1, got {n_samples}")
            other.n_samples = n_samples
        if sampling_seed is not None:
            other.sampling_seed = sampling_seed
        if transforms_seed is not None:
            other.transforms_seed = transforms_seed
        return other

    def split(self, part: Literal["train", "val", "test"], n_samples: int | None = None) -> Transforms2D:
        """The set with the seeds of a part: training, validation (+ 110) or test (+ 220).

        Raises:
            ValueError: for another part.
        """
        if part not in SHIFTS:
            raise ValueError(f"part must be one of {', '.join(SHIFTS)}, got {part!r}")
        shift = SHIFTS[part]
        transforms_seed = None if self.transforms_seed is None else self.transforms_seed + shift
        return self.replace(
            n_samples=n_samples, sampling_seed=self.sampling_seed + shift, transforms_seed=transforms_seed
        )

    def twins(self, seed: int = 1) -> Twins:
        """Pairs of one object on one background under two draws of the transformations.

        Args:
            seed: what the second draw's seed is more than the first's; not 0.
        """
        return Twins(self, seed)


class Twins(Dataset[Pair]):
    """Pairs of images that differ in the draw of the transformations alone: ``(image, image, label)``.

    Args:
        data: what the first images come from.
        seed: added to the seed of its transformations for the second; not 0.

    Raises:
        ValueError: for a shift of 0, which would give each image twice.

    Example:
        >>> from torchgraft.vision.invariance_transfer import shape_objects
        >>> pairs = Transforms2D(shape_objects(5), "noise", ["translate"], n_samples=100).twins()
        >>> one, other, label = pairs[0]
        >>> one.shape == other.shape, bool((one == other).all())
        (True, False)
    """

    def __init__(self, data: Transforms2D, seed: int = 1) -> None:
        _check_whole(seed=seed)
        if seed == 0:
            raise ValueError("seed must not be 0: both images would be the same draw")
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Pair:
        one, other, labels = self.batch([_place(index, len(self))])
        return one[0], other[0], labels[0]

    def __getitems__(self, indices: list[int]) -> list[Pair]:
        return list(zip(*self.batch(indices), strict=True))

    def batch(self, indices: Sequence[int] | Tensor) -> Pair:
        """Pairs of several indices at once: two float32 (B, 3, S, S) and int64 (B,)."""
        first = self.data._seed
        return self.data._drawn(indices, (first, first + self.seed))  # type: ignore[return-value]

    def batches(self, batch_size: int = 256) -> Iterator[Pair]:
        """All pairs in order, in batches of nearly equal size."""
        for index in _parts(len(self), batch_size):
            yield self.batch(index)
