import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from torchgraft import datasets
from torchgraft.datasets import DATASETS, DatasetNotFoundError, Images, MultipleChoice, Question, Text, load

needs_data = pytest.mark.skipif(
    datasets.available()["cifar10"] is None, reason="TORCHGRAFT_DATA does not point at a folder with the data"
)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHGRAFT_DATA", raising=False)
    monkeypatch.setenv("TORCHGRAFT_CACHE", str(tmp_path))
    return tmp_path


def check_images(images, train, test, shape):
    for x, y, n in ((images.train_x, images.train_y, train), (images.test_x, images.test_y, test)):
        assert x.shape == (n, *shape)
        assert x.dtype == torch.uint8
        assert (y.dtype, len(y)) == (torch.int64, n)
        assert set(y.tolist()) == set(range(10))


def test_digits_split_every_class_alike(nowhere):
    digits = load("digits")
    # scikit-learn documents 174 to 183 images a digit; a fifth of each, rounded down, makes 355
    check_images(digits, 1442, 355, (1, 8, 8))
    assert digits.train_x.max() == 255
    tests = Counter(digits.test_y.tolist())
    assert max(tests.values()) - min(tests.values()) <= 2


def test_our_questions_are_well_formed(nowhere):
    items = load("questions").items
    assert len(items) >= 60
    assert len({item.question for item in items}) == len(items)
    for item in items:
        assert len(set(item.options)) == 5, item
        assert item.question.endswith("?")
        assert all(option == option.strip() and option for option in item.options)
    places = Counter(item.answer for item in items)
    assert max(places.values()) - min(places.values()) <= 1


@needs_data
def test_cifar10_is_lossless_and_the_right_way_up():
    cifar = load("cifar10")
    assert isinstance(cifar, Images)
    check_images(cifar, 20000, 10000, (3, 32, 32))
    # natural images vary less between neighbours than between far pixels, in every axis and channel
    x = cifar.test_x[:500].float()
    near = (x[..., 1:, :] - x[..., :-1, :]).abs().mean(), (x[..., 1:] - x[..., :-1]).abs().mean()
    far = (x - x.roll((16, 16), (2, 3))).abs().mean()
    assert max(near) < far / 3
    assert cifar.classes[cifar.test_y[0]] == "cat"


@needs_data
def test_fashion_mnist():
    fashion = load("fashion-mnist")
    check_images(fashion, 60000, 10000, (1, 28, 28))
    assert Counter(fashion.train_y.tolist()) == dict.fromkeys(range(10), 6000)
    assert fashion.classes[fashion.train_y[0]] == "Boot"


@needs_data
def test_shakespeare_and_commonsenseqa():
    text = load("shakespeare")
    assert isinstance(text, Text)
    assert text.train.startswith("First Citizen:")
    assert len(text.train) + len(text.test) == 1115394
    choice = load("commonsenseqa")
    assert isinstance(choice, MultipleChoice)
    assert len(choice.items) == 500
    item = next(i for i in choice.items if i.question.startswith("The sanctions against the school"))
    assert item.options[item.answer] == "ignore"
    assert len(set(Counter(i.answer for i in choice.items))) == 5, "the right option must not stand in one place"


def test_a_folder_of_the_user_is_found(monkeypatch, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/shakespeare.txt").write_text("abcdefghij" * 10)
    monkeypatch.setenv("TORCHGRAFT_DATA", str(tmp_path))
    assert load("shakespeare") == Text("abcdefghij" * 9, "abcdefghij")
    assert datasets.available()["shakespeare"] == str(tmp_path)


@pytest.mark.parametrize("name", [n for n, s in DATASETS.items() if s.files])
def test_what_is_absent_names_the_three_ways(nowhere, name):
    assert datasets.available()[name] is None
    with pytest.raises(DatasetNotFoundError) as caught:
        load(name)
    for way in ("TORCHGRAFT_DATA", str(nowhere), DATASETS[name].hub, DATASETS[name].files[0]):
        assert way in str(caught.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'fashion-mnist'"):
        load("fashion_mnist")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "damaged"),
        (gzip.compress(b"xx", mtime=0), "not an IDX file"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x09\x01", mtime=0), "should hold"),
    ],
)
def test_damaged_files_are_refused(monkeypatch, tmp_path, content, message):
    monkeypatch.setenv("TORCHGRAFT_DATA", str(tmp_path))
    for name in DATASETS["fashion-mnist"].files:
        path = Path(tmp_path / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("fashion-mnist")


def test_images_and_labels_must_belong_together():
    x, y = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="2 labels"):
        Images(x, y[:2], x, y, ("a", "b", "c"))
    with pytest.raises(ValueError, match="labels run from"):
        Images(x, y, x, y, ("a", "b"))
    with pytest.raises(ValueError, match="not one of the 2 options"):
        Question("q", ("a", "b"), 2)


def test_questions_ship_as_plain_json():
    raw = (Path(datasets.__file__).parent / "questions.json").read_text()
    assert isinstance(json.loads(raw), list)
