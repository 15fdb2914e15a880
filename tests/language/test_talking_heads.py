"""Head matrices, composition scores, edits and tasks of talking heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.language.models import CONFIGS, inputs, tiny
from torchgraft import zoo
from torchgraft.language._access import Access, attention_patterns, captured
from torchgraft.language.set_based_prompting import toy_model
from torchgraft.language.talking_heads import (
    IOI,
    ChannelEdit,
    HeadMatrices,
    LaundryList,
    SubspaceSteer,
    accuracy,
    attention_to,
    channel_activations,
    composition_scores,
    head_matrices,
    head_svd,
    inhibition_score,
    random_score,
    search_coords,
)
from torchgraft.language.talking_heads.composition import Kind

FAMILIES = ("gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "opt", "bert")


def random_matrices(layers: int = 3, heads: int = 2, width: int = 24, head: int = 4, seed: int = 0) -> HeadMatrices:
    draw = torch.Generator().manual_seed(seed)

    def part(*shape: int) -> Tensor:
        return torch.randn(layers, heads, *shape, generator=draw, dtype=torch.float64)

    return HeadMatrices(part(width, head), part(width, head), part(width, head), part(head, width), rotary=False)


def dense(matrices: HeadMatrices, layer: int, head: int, kind: str) -> Tensor:
    q, k, v, o = (getattr(matrices, name)[layer, head] for name in "qkvo")
    return {"q": q @ k.T, "k": k @ q.T, "v": v @ o}[kind]


@pytest.mark.parametrize("kind", FAMILIES)
def test_folded_weights_give_the_scores_of_the_model(kind: str) -> None:
    model, given = tiny(kind), inputs()
    access, matrices = Access(model), head_matrices(model)
    with torch.no_grad(), captured(model, [1], "input") as before:
        pattern = attention_patterns(model, **given)[1]
    x = before[1]
    norm = access.attention_norm(1)
    if isinstance(norm, torch.nn.LayerNorm):
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps)
    elif norm is not None:
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    weights = access.head_weights(1)
    shift = norm.bias if isinstance(norm, torch.nn.LayerNorm) else torch.zeros(16).double()
    plain = access.head_weights(1)
    v = torch.einsum("btd,hde->bhte", x, matrices.v[1])
    v = v + (torch.einsum("d,hde->he", shift, plain.v) + plain.v_bias)[:, None]
    written = torch.einsum("bhqk,bhke,hed->bqd", pattern, v, plain.o)
    found: list[Tensor] = []
    handle = access.output_projection(1).register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        model(**given)
    handle.remove()
    torch.testing.assert_close(written + weights.o_bias, found[0], rtol=1e-5, atol=1e-6)
    if not access.family.rotary:
        q, k = (
            torch.einsum("btd,hde->bhte", x, getattr(matrices, name)[1])
            + (torch.einsum("d,hde->he", shift, getattr(plain, name)) + getattr(plain, f"{name}_bias"))[:, None]
            for name in "qk"
        )
        scores = q @ k.mT / math.sqrt(access.head_dim)
        if kind != "bert":
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), pattern, rtol=1e-5, atol=1e-7)


def test_what_is_written_is_centred_for_layer_norms_alone() -> None:
    assert head_matrices(tiny("gpt2")).o.mean(-1).abs().max() < 1e-12
    assert head_matrices(tiny("llama")).o.mean(-1).abs().max() > 1e-3
    model = tiny("gpt2")
    assert torch.equal(head_matrices(model, fold=False).o[0, 0], Access(model).head_weights(0).o[0])


def test_components_add_up_and_are_ordered() -> None:
    matrices = random_matrices()
    for kind, whole in (("ov", "v"), ("qk", "q")):
        read, strength, write = head_svd(matrices, 1, 1, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(read @ strength.diag() @ write, dense(matrices, 1, 1, whole))
        torch.testing.assert_close(read.T @ read, torch.eye(4).double())
        torch.testing.assert_close(write @ write.T, torch.eye(4).double())
        assert (strength.diff() <= 0).all()


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_scores_equal_the_dense_formula(kind: Kind) -> None:
    matrices = random_matrices()
    table, whole = composition_scores(matrices, [kind]), composition_scores(matrices, [kind], decomposed=False)
    scores = table.scores[kind]
    assert scores[~scores.isnan()].min() >= 0
    assert scores[~scores.isnan()].max() <= 1
    for l1 in range(3):
        for h1 in range(2):
            write, first = head_svd(matrices, l1, h1).write, dense(matrices, l1, h1, "v")
            for l2 in range(3):
                for h2 in range(2):
                    found = scores[l1, h1, :, l2, h2]
                    if l2 <= l1:
                        assert found.isnan().all()
                        continue
                    second = dense(matrices, l2, h2, kind)
                    torch.testing.assert_close(
                        found.double(), (write @ second).norm(dim=1) / second.norm(), rtol=1e-5, atol=1e-6
                    )
                    full = (first @ second).norm() / (first.norm() * second.norm())
                    assert whole.scores[kind][l1, h1, 0, l2, h2].item() == pytest.approx(full.item(), rel=1e-5)


def test_scores_do_not_know_the_basis() -> None:
    matrices = random_matrices()
    draw = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=draw).double()).Q
    stream = torch.linalg.qr(torch.randn(24, 24, generator=draw).double()).Q
    inner = HeadMatrices(matrices.q @ turn, matrices.k @ turn, matrices.v @ turn, turn.T @ matrices.o, rotary=False)
    outer = HeadMatrices(*(stream.T @ getattr(matrices, name) for name in "qkv"), matrices.o @ stream, rotary=False)  # type: ignore[arg-type]
    expected = composition_scores(matrices)
    for other in (inner, outer):
        found = composition_scores(other)
        for kind in ("q", "k", "v"):
            torch.testing.assert_close(found.scores[kind], expected.scores[kind], equal_nan=True, rtol=1e-4, atol=1e-5)


def turned(matrices: HeadMatrices, distance: float) -> HeadMatrices:
    """Queries as rotary positions leave them so far behind the key."""
    half = matrices.q.shape[-1] // 2
    angle = distance * 0.3 ** torch.arange(half).double()
    first, second = matrices.q[..., :half], matrices.q[..., half:]
    q = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    return HeadMatrices(q, matrices.k, matrices.v, matrices.o, rotary=True)


@pytest.mark.parametrize("kind", ["q", "k"])
def test_rotary_positions_change_products_and_not_what_one_side_reads(kind: Kind) -> None:
    near, far = turned(random_matrices(), 0), turned(random_matrices(), 5)
    found = [composition_scores(m, [kind]).scores[kind] for m in (near, far)]
    torch.testing.assert_close(found[0], found[1], equal_nan=True)
    write, side = head_svd(near, 0, 1).write, getattr(near, kind)[2, 0]
    torch.testing.assert_close(found[0][0, 1, :, 2, 0].double(), (write @ side).norm(dim=1) / side.norm())
    # as the dense product at that distance
    products = [composition_scores(m, [kind], reading="product").scores[kind] for m in (near, far)]
    second = dense(far, 2, 0, kind)
    torch.testing.assert_close(products[1][0, 1, :, 2, 0].double(), (write @ second).norm(dim=1) / second.norm())
    assert (products[0] - products[1]).nan_to_num().abs().max() > 0.01
    assert head_matrices(tiny("llama")).rotary
    assert not head_matrices(tiny("gpt2")).rotary


# all_composition_scores of TransformerLens 2.16.1 (TransformerLensOrg/TransformerLens), of the first two layers' heads
# with the third's, on the matrices that the test makes, without norms and biases
LENS = {
    "q": [[0.2464368, 0.315757], [0.201509, 0.2518741], [0.1759652, 0.2913564], [0.2351236, 0.2375924]],
    "k": [[0.2786033, 0.3626062], [0.205536, 0.3111312], [0.2378141, 0.2578828], [0.1388707, 0.2486066]],
    "v": [[0.2287167, 0.1947464], [0.2140189, 0.266522], [0.1652706, 0.2296883], [0.2919771, 0.2547077]],
}


@pytest.mark.parametrize("kind", ["q", "k", "v"])
def test_whole_scores_are_those_of_transformer_lens(kind: Kind) -> None:
    n = torch.arange(4 * 3 * 2 * 12 * 3, dtype=torch.float64)
    q, k, v, o = torch.sin(n * n * 0.37 + n).view(4, 3, 2, 12, 3)
    found = composition_scores(HeadMatrices(q, k, v, o.mT, rotary=False), [kind], decomposed=False).scores[kind]
    torch.testing.assert_close(found[:2, :, 0, 2].flatten(0, 1), torch.tensor(LENS[kind]), rtol=0, atol=1e-6)


def test_random_directions_score_as_chance_says() -> None:
    scores = composition_scores(random_matrices(2, 8, 64, 8), ["v"]).scores["v"]
    squares = scores[~scores.isnan()].square()
    spread = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - random_score(64) ** 2) < 4 * spread


def test_a_planted_channel_stands_out() -> None:
    matrices = random_matrices(2, 4, 64, 8)
    write = head_svd(matrices, 0, 2).write
    # a reader of rank one that reads along one component alone
    matrices.q[1, 3] = write[5][:, None] * torch.eye(8).double()[0]
    matrices.k[1, 3] = torch.randn(64, 8, generator=torch.Generator().manual_seed(5)).double()
    table = composition_scores(matrices)
    found = table.scores["q"][0, 2, :, 1, 3]
    torch.testing.assert_close(found, torch.eye(8)[5], rtol=0, atol=1e-5)
    best = table.top(1)[0]
    assert (best.writer, best.component, best.reader, best.kind) == ((0, 2), 5, (1, 3), "q")
    assert best.z > 4
    assert best.score == pytest.approx(1, abs=1e-5)
    assert [c.z for c in table.top(30)] == sorted((c.z for c in table.top(30)), reverse=True)
    assert next(iter(table.to_pandas(3)["component"])) == 5
    assert len(table.heatmap("q").axes) == 2
    only = composition_scores(matrices, ["q"], readers=[(1, 3)]).scores["q"]
    torch.testing.assert_close(only[0, :, :, 1, 3], table.scores["q"][0, :, :, 1, 3])
    assert only[0, :, :, 1, 0].isnan().all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_edit_scales_the_component_that_scores_name(kind: str) -> None:
    model = tiny(kind)
    before = head_matrices(model)
    read, strength, write = head_svd(model, 1, 2)
    with ChannelEdit(model, (1, 2), [1], 3.0):
        after = head_matrices(model)
    expected = read @ (strength * torch.tensor([1.0, 3.0, 1.0, 1.0])).diag() @ write
    torch.testing.assert_close(after.v[1, 2] @ after.o[1, 2], expected)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(after.o[others], before.o[others])


@pytest.mark.parametrize("kind", FAMILIES)
def test_edits_of_weights(kind: str) -> None:
    model, given = tiny(kind), inputs()
    before = {name: p.clone() for name, p in model.named_parameters()}
    access = Access(model)

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**given).logits
            return found

    plain = logits()
    with ChannelEdit(model, (0, 1), [0, 2], scale=1.0):
        torch.testing.assert_close(logits(), plain)
    with ChannelEdit(model, (0, 1), range(access.head_dim), scale=0.0):  # type: ignore[arg-type]
        gone = logits()
        # the mean, which the next norm takes away, stays
        assert head_matrices(model).o[0, 1].abs().max() < 1e-12
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    # the head cut out of what enters the output projection
    def cut(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., access.head_dim : 2 * access.head_dim] = 0
        return (x, *args[1:])

    handle = access.output_projection(0).register_forward_pre_hook(cut)
    torch.testing.assert_close(logits(), gone)
    handle.remove()
    assert (gone - plain).abs().max() > 1e-4

    # the component is the one that scores speak of: norms folded in
    read, strength, write = head_svd(model, 0, 1)
    edit = ChannelEdit(model, (0, 1), [1], scale=0.25).apply_()
    changed = head_matrices(model)
    expected = read @ (strength * torch.tensor([1, 0.25, 1, 1])).diag() @ write
    torch.testing.assert_close(changed.v[0, 1] @ changed.o[0, 1], expected)
    others = {name: p for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert len(others) == 1
    stored = next(iter(others.values()))
    width = slice(access.head_dim, 2 * access.head_dim)
    plain_head = stored.data[width] if kind == "gpt2" else stored.data[:, width]
    plain_head.copy_(before[next(iter(others))][width] if kind == "gpt2" else before[next(iter(others))][:, width])
    assert torch.equal(stored, before[next(iter(others))])
    plain_head.copy_(edit._stored[1])  # type: ignore[index]
    with pytest.raises(RuntimeError, match="applied already"):
        edit.apply_()
    edit.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="not applied"):
        edit.undo()
    with pytest.raises(RuntimeError, match="inside"), ChannelEdit(model, (0, 1), [0]):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_steering_one_head(kind: str) -> None:
    model, given = tiny(kind), inputs()
    channels = [(0, 1, 0), (0, 1, 2)]
    write = head_svd(model, 0, 1).write[[0, 2]]
    there = channel_activations(model, channels, **given)
    with torch.no_grad():
        plain = model(**given).logits
        with SubspaceSteer(model, 0, write, there, head=1):
            torch.testing.assert_close(model(**given).logits, plain)
        # putting zero in is taking the components' part at that token away
        with SubspaceSteer(model, 0, write, torch.zeros(2), head=1), captured(model, [0], "attention") as now:
            gone = model(**given).logits
        with ChannelEdit(model, (0, 1), [0, 2], 0.0), captured(model, [0], "attention") as edited_weights:
            model(**given)
    torch.testing.assert_close(now[0][:, -1], edited_weights[0][:, -1])
    assert (gone - plain).abs().max() > 1e-4
    # a patch: the other row's activation
    with torch.no_grad():
        with captured(model, [0], "attention") as before:
            model(**given)
        with SubspaceSteer(model, 0, write, there.flip(0), head=1), captured(model, [0], "attention") as now:
            model(**given)
    torch.testing.assert_close(now[0][:, -1] - before[0][:, -1], (there.flip(0) - there) @ write)
    with pytest.raises(ValueError, match="at least one"):
        channel_activations(model, [], **given)
    with pytest.raises(ValueError, match=r"component must be 0\.\.3"):
        channel_activations(model, [(0, 1, 4)], **given)
    with pytest.raises(ValueError, match="within 7 tokens"):
        channel_activations(model, [(0, 1, 3)], 7, **given)
    with pytest.raises(ValueError, match="head must be"):
        SubspaceSteer(model, 0, write, torch.zeros(2), head=4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_steering_a_subspace(kind: str) -> None:
    model, given = tiny(kind), inputs()
    basis = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad(), captured(model, [0], "attention") as there:
        plain = model(**given).logits
    steer = SubspaceSteer(model, 0, basis, torch.zeros(3))
    own = steer.coordinates(there[0][:, -1])
    with torch.no_grad():
        with SubspaceSteer(model, 0, basis, own):
            torch.testing.assert_close(model(**given).logits, plain)
        wanted = torch.tensor([1.0, -2.0, 0.5])
        with SubspaceSteer(model, 0, basis, wanted) as steer, captured(model, [0], "attention") as now:
            steered = model(**given).logits
        torch.testing.assert_close(steer.coordinates(now[0][:, -1]), wanted.double().expand(2, 3))
        rest = now[0] - there[0]
        assert rest[:, :-1].abs().max() == 0
        outside = rest[:, -1] - steer.coordinates(rest[:, -1]) @ steer.basis
        assert outside.abs().max() < 1e-9
        assert (steered - plain).abs().max() > 1e-3
        torch.testing.assert_close(model(**given).logits, plain, rtol=0, atol=0)


def test_search_takes_the_best() -> None:
    grid = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, -1.0]])
    best, score = search_coords(lambda c: -(c - torch.tensor([1.0, 2.1])).norm().item(), grid)
    assert best.tolist() == [1.0, 2.0]
    assert score == pytest.approx(-0.1, abs=1e-6)


class Words:
    """A tokenizer of one token for each word."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = text.replace(",", " ,").replace(".", " .").split()
        return {"input_ids": [3 + self.known.setdefault(word, len(self.known)) for word in words]}


def test_the_laundry_list() -> None:
    tokenizer = Words()
    made = LaundryList(tokenizer, 4, seed=1).prompts(8)
    assert [prompt.answer for prompt in made] == [0, 1, 2, 3, 0, 1, 2, 3]
    for prompt in made:
        listed, again = prompt.text.split(". ")
        for k, item in enumerate(prompt.options):
            assert f"the {item}" in listed
            assert (f"the {item}" in again) == (k != prompt.answer)
            assert len(prompt.places[k]) == (1 if k == prompt.answer else 2)
        assert prompt.text.endswith("and the")
    same = LaundryList(tokenizer, 3).permutations(5)
    assert len({frozenset(p.options) for p in same}) == 1
    assert len({p.options[p.answer] for p in same}) == 1
    assert len({p.text for p in same}) > 1
    by_hand = LaundryList(tokenizer, 3).prompt(["key", "hat", "cup"], ["cup", "key"])
    assert by_hand.text == "Mary packed the key, the hat and the cup. Then Mary took out the cup, the key and the"
    with pytest.raises(ValueError, match="one is not mentioned"):
        LaundryList(tokenizer, 3).prompt(["key", "hat", "cup"], ["cup"])
    with pytest.raises(ValueError, match="different"):
        LaundryList(tokenizer, 3).prompt(["key", "key", "cup"], ["key", "key"])
    with pytest.raises(ValueError, match="single-token"):
        LaundryList(tokenizer, 3).prompt(["keyring", "hat", "cup"], ["cup", "hat"])
    with pytest.raises(ValueError, match="at least 2"):
        LaundryList(tokenizer, 1)
    with pytest.raises(ValueError, match="and 41 are needed"):
        LaundryList(tokenizer, 41)
    with pytest.raises(ValueError, match="0 names of one token"):
        IOI(toy_model()[1])


def test_attention_and_inhibition() -> None:
    tokenizer, model = Words(), tiny("gpt2", vocab_size=200)
    prompts = IOI(tokenizer).prompts(4)
    for k, prompt in enumerate(prompts):
        assert (prompt.places[0][0] < prompt.places[1][0]) == (k % 2 == 0)
        assert len(prompt.places[1]) == 2
    ids = torch.tensor([tokenizer(prompts[0].text)["input_ids"]])
    found = attention_to(model, ids, 1, 2, -1, [0, 3])
    torch.testing.assert_close(found, attention_patterns(model, input_ids=ids)[1][:, 2, -1][:, [0, 3]])
    none = inhibition_score(model, tokenizer, prompts, ChannelEdit(model, (0, 0), [0], scale=1.0), (1, 1))
    assert none.abs().max() < 1e-9
    some = inhibition_score(model, tokenizer, prompts, ChannelEdit(model, (0, 0), [0, 1, 2, 3], scale=0.0), (1, 1))
    assert some.shape == (4,)
    assert some.abs().max() > 1e-4
    assert 0 <= accuracy(model, tokenizer, prompts, batch_size=3) <= 1


def test_wrong_input_is_refused(without_shape_checks: None) -> None:
    model = tiny("llama")
    with pytest.raises(TypeError, match="transformers model"):
        composition_scores(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"head must be \(0\.\.1, 0\.\.3\), got \(2, 0\)"):
        head_svd(model, 2, 0)
    with pytest.raises(ValueError, match="kind must be"):
        head_svd(model, 0, 0, "vo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind must be 'q', 'k' or 'v'"):
        composition_scores(model, ["o"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="reading must be"):
        composition_scores(model, reading="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kinds must be"):
        composition_scores(model, [])
    with pytest.raises(ValueError, match="finite"):
        composition_scores(HeadMatrices(*(x * math.nan for x in torch.ones(4, 2, 1, 4, 4)), rotary=False))
    with pytest.raises(ValueError, match="at least one"):
        accuracy(model, Words(), [])
    three = LaundryList(Words(), 3).prompts(1)
    with pytest.raises(ValueError, match="two options"):
        inhibition_score(model, Words(), three, ChannelEdit(model, (0, 0), [0]), (1, 0))
    with pytest.raises(ValueError, match="later than the first layer"):
        composition_scores(model, readers=[(0, 1)])
    table = composition_scores(model)
    with pytest.raises(ValueError, match="at least 1"):
        table.top(0)
    with pytest.raises(ValueError, match="kind must be one of"):
        table.z("x")  # type: ignore[arg-type]
    for components, message in (([4], "some of 0..3"), ([], "some of 0..3"), ([1, 1], "different")):
        with pytest.raises(ValueError, match=message):
            ChannelEdit(model, (0, 0), components)
    for wrong in ([1.0], [True]):
        with pytest.raises(TypeError, match="whole numbers"):
            ChannelEdit(model, (0, 0), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be finite"):
        ChannelEdit(model, (0, 0), [0], math.inf)
    with pytest.raises(ValueError, match="head must be"):
        ChannelEdit(model, (0, 9), [0])
    eye = torch.eye(16)
    with pytest.raises(ValueError, match="layer must be in"):
        SubspaceSteer(model, 5, eye[:2], torch.zeros(2))
    with pytest.raises(ValueError, match=r"basis must be \(k, 16\)"):
        SubspaceSteer(model, 0, torch.eye(4), torch.zeros(4))
    with pytest.raises(ValueError, match="independent"):
        SubspaceSteer(model, 0, torch.ones(2, 16), torch.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        SubspaceSteer(model, 0, eye[:2] * math.nan, torch.zeros(2))
    for steer, message in (
        (SubspaceSteer(model, 0, eye[:2], torch.zeros(2), position=9), "within 7 tokens"),
        (SubspaceSteer(model, 0, eye[:2], torch.zeros(3, 2)), "3 rows, got 2"),
    ):
        with pytest.raises(ValueError, match=message), steer:
            model(**inputs())
        assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match=r"coords must be \(2,\)"):
        SubspaceSteer(model, 0, eye[:2], torch.zeros(3))
    ids = inputs()["input_ids"]
    with pytest.raises(ValueError, match=r"no head \(0, 4\)"):
        attention_to(model, ids, 0, 4, -1, [0])
    with pytest.raises(ValueError, match="within 7 tokens"):
        attention_to(model, ids, 0, 0, 7, [0])
    with pytest.raises(ValueError, match="at least one row"):
        search_coords(lambda c: 0.0, torch.zeros(0, 2))
    with pytest.raises(ValueError, match="nan"):
        search_coords(lambda c: math.nan, torch.zeros(1, 2))


def test_a_real_model() -> None:
    try:
        model, tokenizer = zoo.load("smollm2-135m-instruct")
    except zoo.ModelNotFoundError as error:
        pytest.skip(str(error))
    table = composition_scores(model, ["q"], readers=[(2, 0)])
    assert table.scores["q"].shape == (30, 9, 64, 30, 9)
    assert accuracy(model, tokenizer, IOI(tokenizer).prompts(4)) > 0.5


def test_edits_of_weights_that_an_adapter_adds_to() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    model, given = peft.get_peft_model(tiny("llama"), config).double(), inputs()
    with ChannelEdit(model, (0, 1), [1], scale=0.25), torch.no_grad():
        found = model(**given).logits
    merged = model.merge_and_unload()
    with ChannelEdit(merged, (0, 1), [1], scale=0.25), torch.no_grad():
        torch.testing.assert_close(found, merged(**given).logits)


def test_edits_in_the_wrong_order_are_not_undone() -> None:
    model = tiny("llama")
    before = Access(model).head_weights(0).o[1].clone()
    first, second = (ChannelEdit(model, (0, 1), [c]) for c in (0, 1))
    first.apply_()
    second.apply_()
    with pytest.raises(RuntimeError, match="changed since"):
        first.undo()
    second.undo()
    first.undo()
    assert torch.equal(Access(model).head_weights(0).o[1], before)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text"])
def test_edits_in_half_precision_are_undone_to_the_bit_and_saved(kind: str, tmp_path: Path) -> None:
    model = tiny(kind, torch.bfloat16).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    edit = ChannelEdit(model, (1, 2), [0], 0.0).apply_()
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == 1
    head, whole = head_svd(model, 1, 2), model.state_dict()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(whole[name], value) for name, value in again.state_dict().items())
    edit.undo()
    # a component is gone: of rank 3, as far as half precision goes
    assert head.strength[-1] < 0.02 * head_svd(model, 1, 2).strength[-1] + 0.01 * head.strength[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.training
