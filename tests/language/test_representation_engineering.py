"""Reading vectors, steering, the trade-off and its fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.language.models import Letters, inputs, tiny
from torchgraft.language._access import captured, residual_stream, tokenized
from torchgraft.language.representation_engineering import (
    MultipleChoice,
    OptionContrast,
    OptionLikelihood,
    ReadingVectors,
    TextLikelihood,
    TradeoffCurve,
    TradeoffSweep,
    alignment_bound,
    direction,
    fit_tradeoff,
    helpfulness,
    helpfulness_gaussian,
    residual_norm,
    separability,
    separability_margin,
    steer,
)
from torchgraft.language.representation_engineering.tradeoff import steered_states
from torchgraft.language.representation_engineering.vectors import hidden_at

FAMILIES = ("gpt2", "gpt_neox", "llama", "gemma2", "opt", "phi")
PAIRS = [("good", "bad"), ("fine thing", "poor thing"), ("nice", "nasty"), ("yes", "no"), ("up we go", "down we go")]


def vectors_of(model: Any, *layers: int) -> ReadingVectors:
    draw = torch.Generator().manual_seed(3)
    found = {layer: torch.randn(16, generator=draw) for layer in layers}
    return ReadingVectors({k: v / v.norm() for k, v in found.items()}, model.config.model_type)


def states(n: int = 30, width: int = 8, gap: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    axis = torch.nn.functional.normalize(torch.randn(width, generator=draw), dim=0)
    common = 3 * torch.randn(n, width, generator=draw)
    noise = 0.1 * torch.randn(2, n, width, generator=draw)
    return common + gap * axis + noise[0], common - gap * axis + noise[1], axis


@pytest.mark.parametrize("method", ["pca_center", "mean_diff"])
def test_the_planted_direction_is_found(method: Any) -> None:
    positive, negative, axis = states()
    found = direction(positive, negative, method)
    assert found.norm().item() == pytest.approx(1, abs=1e-6)
    assert found @ axis > 0.99
    assert separability(positive, negative, method) == 1.0
    order = torch.randperm(len(positive), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(direction(positive[order], negative[order], method), found)
    torch.testing.assert_close(direction(negative, positive, method), -found)


def test_pca_center_is_what_random_signs_find_on_average() -> None:
    from sklearn.decomposition import PCA

    positive, negative, _ = states(2000, gap=0.3)
    signs = 2.0 * torch.randint(0, 2, (2000, 1), generator=torch.Generator().manual_seed(0)) - 1
    shuffled = PCA(1).fit((signs * (positive - negative)).numpy()).components_[0]
    assert abs(float(direction(positive, negative).numpy() @ shuffled)) > 0.999


def test_directions_equal_those_of_repeng() -> None:
    """``read_representations`` of vgel/repeng at 0ba7196 on these hidden states gave these numbers."""
    hidden = np.random.RandomState(0).randn(12, 6).astype(np.float32)
    hidden[::2] += np.array([1, 0.5, 0, 0, -1, 0], dtype=np.float32)
    both = torch.from_numpy(hidden[::2]), torch.from_numpy(hidden[1::2])
    recorded = {
        "pca_diff": [0.52060771, -0.03575355, 0.43310335, 0.53749120, 0.44163173, 0.23701316],
        "pca_center": [0.88820666, 0.01644000, 0.31471273, 0.18122452, -0.03327778, -0.27897117],
    }
    for method, expected in recorded.items():
        torch.testing.assert_close(direction(*both, method), torch.tensor(expected), rtol=0, atol=2e-6)  # type: ignore[arg-type]


def test_random_labels_are_told_apart_by_chance() -> None:
    positive, negative, _ = states(400)
    swap = torch.rand(400, 1, generator=torch.Generator().manual_seed(2)) < 0.5
    mixed = torch.where(swap, negative, positive), torch.where(swap, positive, negative)
    assert separability(*mixed, "mean_diff") == pytest.approx(0.5, abs=0.1)


def repeng_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, vocab_size=20
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).sin() * 0.5 + (0 if p.dim() > 1 else 1))
    return model


@pytest.mark.parametrize(
    ("r", "normalize", "expected"),
    [
        (0.0, False, [-0.09457949, -0.07446787, -0.05360284, -0.03219543]),
        (2.0, False, [-0.38500145, -0.34225512, -0.29604593, -0.24684151]),
        (2.0, True, [-0.43028554, -0.38401830, -0.33386588, -0.28033549]),
        (-1.5, True, [0.22666626, 0.22163101, 0.21435344, 0.20490705]),
    ],
)
def test_steered_logits_equal_those_of_repeng(r: float, normalize: bool, expected: list[float]) -> None:
    """``ControlModel`` of vgel/repeng at 0ba7196 gave these logits."""
    vectors = ReadingVectors({1: torch.linspace(-1, 1, 8), 2: torch.ones(8) / 8}, "llama")
    model = repeng_model()
    with torch.no_grad(), steer(model, vectors, r, normalize=normalize):
        found = model(torch.arange(1, 6)[None]).logits[0, -1, :4]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_steering_adds_to_the_outputs_of_layers_and_goes(kind: str) -> None:
    model, given = tiny(kind), inputs()
    vectors = vectors_of(model, 0, 1)
    with torch.no_grad():
        plain, stream = model(**given).logits, residual_stream(model, **given)
        with steer(model, vectors, 0.0):
            assert torch.equal(model(**given).logits, plain)
        with steer(model, vectors, 3.0, [-2]):
            steered = residual_stream(model, **given)
            torch.testing.assert_close(steered[1], stream[1] + 3 * vectors.directions[0].double())
            with steer(model, vectors, -3.0, [0]):
                torch.testing.assert_close(model(**given).logits, plain, rtol=1e-6, atol=1e-8)
            assert (model(**given).logits - plain).abs().max() > 1e-3
        assert torch.equal(model(**given).logits, plain)
        with pytest.raises(RuntimeError, match="inside"), steer(model, vectors, 1.0):
            raise RuntimeError("inside")
        assert torch.equal(model(**given).logits, plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_cache_padding_and_rows(kind: str) -> None:
    model, ids = tiny(kind), inputs()["input_ids"]
    vectors = vectors_of(model, 0, 1)
    with torch.no_grad(), steer(model, vectors, 2.0):
        whole = model(ids[:1]).logits
        begun = model(ids[:1, :4], use_cache=True)
        rest = model(ids[:1, 4:], past_key_values=begun.past_key_values).logits
        torch.testing.assert_close(torch.cat([begun.logits, rest], 1), whole)
        padded = torch.nn.functional.pad(ids[:1], (3, 0))
        mask = (torch.arange(10) >= 3).long()[None]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        torch.testing.assert_close(found, whole)
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            model.generate(ids[:1], **settings)[:, 7:],
            model.generate(padded, attention_mask=mask, **settings)[:, 10:],
        )
    with torch.no_grad(), steer(model, vectors, torch.tensor([2.0, 0.0])):
        torch.testing.assert_close(model(ids).logits[:1], whole)
        rows = model(ids).logits[1:]
    with torch.no_grad():
        torch.testing.assert_close(rows, model(ids[1:]).logits)


def test_the_last_position_alone() -> None:
    model, ids = tiny("llama"), inputs()["input_ids"]
    vectors = vectors_of(model, 1)
    with torch.no_grad():
        plain = model(ids).logits
        with steer(model, vectors, 2.0):
            everywhere = model(ids).logits
        with steer(model, vectors, 2.0, positions="last"):
            last = model(ids).logits
    torch.testing.assert_close(last[:, :-1], plain[:, :-1])
    torch.testing.assert_close(last[:, -1], everywhere[:, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    vectors = ReadingVectors.from_pairs(model, Letters(), PAIRS, [1])
    assert vectors.directions[1].dtype == torch.float32
    with torch.no_grad(), steer(model, vectors, 2.0):
        assert model(**inputs()).logits.dtype == dtype


def test_vectors_of_pairs_and_their_files(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32)
    vectors = ReadingVectors.from_pairs(model, Letters(), PAIRS, [-1, 0], "mean_diff", batch_size=3)
    assert vectors.layers == (0, 1)
    alone = [hidden_at(model, Letters(), [text], [1])[1][0] for pair in PAIRS for text in pair]
    gap = torch.stack(alone[::2]) - torch.stack(alone[1::2])
    torch.testing.assert_close(vectors.directions[1], torch.nn.functional.normalize(gap.mean(0), dim=0))
    first = hidden_at(model, Letters(), ["abc", "abd"], [0], token=0)[0]
    torch.testing.assert_close(first[0], first[1])

    vectors.save(tmp_path / "v.safetensors")
    again = ReadingVectors.load(tmp_path / "v.safetensors")
    assert again.model_type == "llama"
    assert again.method == "mean_diff"
    assert again.separability == vectors.separability
    vectors.to_gguf(tmp_path / "v.gguf")
    for read in (again, ReadingVectors.from_gguf(tmp_path / "v.gguf")):
        for layer in vectors.layers:
            assert torch.equal(read.directions[layer], vectors.directions[layer])


def test_gguf_is_read_by_its_own_library(tmp_path: Path) -> None:
    import gguf

    ReadingVectors({3: torch.arange(4.0)}, "llama").to_gguf(tmp_path / "v.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "v.gguf"))
    assert [t.name for t in reader.tensors] == ["direction.3"]
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"
    assert reader.get_field("controlvector.layer_count").parts[-1][0] == 1


def test_layers_below_the_steered_one_run_once() -> None:
    model = tiny("llama")
    vectors = vectors_of(model, 1)
    batch = tokenized(Letters(), ["abcd", "ab"])
    calls: list[int] = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *a: calls.append(1))
    found = dict(steered_states(model, batch, vectors, [-2.0, 0.0, 2.0]))
    handle.remove()
    assert len(calls) == 1
    for r, hidden in found.items():
        with torch.no_grad(), steer(model, vectors, r), captured(model, [1]) as expected:
            model(**batch)
        torch.testing.assert_close(hidden, expected[1])


def sweep_of(model: Any, vectors: ReadingVectors, coefficients: Any = range(-4, 5)) -> TradeoffSweep:
    align = OptionContrast(Letters(), [("ab", ["x", "y"], ["z"]), ("abcde", ["x"], ["w", "v"])])
    choice = MultipleChoice(
        Letters(), [("q", ["one", "two"], 1), ("what", ["a", "b", "c"], 0)], "{question}{options}", ""
    )
    return TradeoffSweep(
        model, Letters(), vectors, coefficients, align, [choice, TextLikelihood(["hello there", "go"])]
    )


def test_the_sweep_is_the_naive_loop() -> None:
    model = tiny("llama")
    vectors = vectors_of(model, 0, 1)
    curve = sweep_of(model, vectors).run()
    tokenizer = Letters()
    for k, r in enumerate(curve.r):
        with torch.no_grad(), steer(model, vectors, float(r)):
            p = model(torch.tensor([tokenizer("ab")["input_ids"]])).logits[0, -1].softmax(-1)
            x, y, z = (p[3 + ord(c) % 37].item() for c in "xyz")
            assert curve.values["B"][k, 0] == pytest.approx((x + y - z) / (x + y + z), rel=1e-5)
            ids = torch.tensor([tokenizer("hello there")["input_ids"]])
            loss = model(ids, labels=ids).loss.item()
            assert curve.values["log_likelihood"][k, 0] == pytest.approx(-loss, rel=1e-5)
            ids = torch.tensor([tokenizer("qA) one\nB) two")["input_ids"]])
            p = model(ids).logits[0, -1].softmax(-1)
            a, b = (p[3 + ord(c) % 37].item() for c in "AB")
            assert curve.values["H_abs"][k, 0] == pytest.approx(b, rel=1e-5)
            assert curve.values["H_rel"][k, 0] == pytest.approx(b / (a + b), rel=1e-5)
            assert curve.values["accuracy"][k, 0] == float(b > a)
    zero = int(np.argmin(np.abs(curve.r)))
    assert curve.delta_norm[zero] == curve.logit_std[zero] == 0
    assert (np.delete(curve.delta_norm, zero) > 0).all()
    frame = curve.to_pandas()
    assert list(frame["r"]) == list(range(-4, 5))
    assert "B_se" in frame
    assert len(fit_tradeoff(curve, resamples=3).plot(curve).axes) == 2


def test_the_identity_of_helpfulness_on_logits() -> None:
    model, ids = tiny("gpt2"), inputs()["input_ids"]
    vectors = vectors_of(model, 0)
    with torch.no_grad():
        before = model(ids).logits[:, -1]
        with steer(model, vectors, 1.5):
            after = model(ids).logits[:, -1]
    p, right = before.softmax(-1), 7
    others = torch.arange(40) != right
    change = (after - before) - (after - before)[:, right : right + 1]
    found = helpfulness(p[:, right], p[:, others], change[:, others])
    torch.testing.assert_close(found, after.softmax(-1)[:, right], rtol=1e-5, atol=1e-12)


def toy(r: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float, float]:
    """A softmax over 200 tokens whose last state moves along a direction of norm r: behaviour and the bound's parts."""
    draw = torch.Generator().manual_seed(0)
    unembedding = torch.randn(200, 64, generator=draw).double()
    axis = torch.nn.functional.normalize(torch.randn(64, generator=draw).double(), dim=0)
    unembedding[:5] += 4 * axis
    unembedding[5:10] -= 4 * axis
    state = torch.randn(64, generator=draw).double() / 8
    logits = (state + torch.tensor(r)[:, None] * axis) @ unembedding.T
    p = logits.softmax(-1)
    up, down = p[:, :5].sum(1), p[:, 5:10].sum(1)
    margin = separability_margin(axis, unembedding[:5], unembedding[5:10])
    b = ((up - down) / (up + down)).numpy()
    return b, p[:, 50].numpy(), margin, 1.0, float(b[0])


def test_behaviour_stays_above_the_bound() -> None:
    r = np.linspace(0, 3, 31)
    b, _, margin, rate, b0 = toy(r)
    assert margin > 0
    # two answers whose log odds move by at least margin * r give tanh of half of that: with summed probabilities the
    # bound on B holds with half the slope that the theorem's two-valued answers have
    assert (b >= alignment_bound(r, margin / 2, rate, b0) - 1e-9).all()
    assert (b[1:] > alignment_bound(r[1:], margin / 2, rate, b0) * 0.999 - 1e-3).all()


def test_the_slope_of_the_bound_is_that_of_a_tanh() -> None:
    h, b0, gain = 1e-6, 0.3, 0.7
    measured = (alignment_bound(h, gain, 1.0, b0) - alignment_bound(0.0, gain, 1.0, b0)) / h
    assert measured == pytest.approx(gain * (1 - b0**2), rel=1e-4)
    assert alignment_bound(1e3, gain, 1.0, b0) == pytest.approx(1)


def test_helpfulness_does_not_move_at_zero_when_changes_are_symmetric() -> None:
    wrong = torch.full((100,), 0.004, dtype=torch.float64)
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    x = torch.cat([x, -x])
    h = 1e-4
    up, down = (helpfulness(torch.tensor(0.6).double(), wrong, s * h * x) for s in (1, -1))
    assert abs((up - down).item() / (2 * h)) < 1e-9


@settings(deadline=None, max_examples=20)
@given(st.floats(0.02, 0.5), st.floats(-0.8, 0.8), st.floats(0.05, 0.4), st.floats(0.2, 0.9))
def test_the_fit_finds_what_made_the_curves(slope: float, offset: float, s: float, h0: float) -> None:
    r = np.linspace(-6, 6, 13)
    one = np.ones((1, 3))
    values = {"B": np.tanh(slope * r + offset)[:, None] * one, "H_rel": helpfulness_gaussian(r, h0, s)[:, None] * one}
    fit = fit_tradeoff(TradeoffCurve(r, values, 0 * r, 0 * r), resamples=0)
    assert fit.slope == pytest.approx(slope, rel=0.02)
    assert pytest.approx(math.tanh(offset), abs=0.01) == fit.B0
    assert fit.s == pytest.approx(s, rel=0.02)
    assert pytest.approx(h0, rel=0.02) == fit.H0
    low, high = fit.efficient_range(0.1)
    assert low == -high
    if high < 6:
        assert fit.helpfulness(high) == pytest.approx(0.9 * fit.H0, rel=1e-6)
    assert fit.advise_coefficient(0.1) == pytest.approx(high)
    assert fit.recommend(1, 0) == 6
    assert abs(fit.recommend(0, 1)) < 0.01


def test_a_vector_that_points_the_other_way() -> None:
    r = np.linspace(-6, 6, 13)
    values = {
        "B": np.tanh(-0.2 * r)[:, None].repeat(4, 1),
        "H_rel": helpfulness_gaussian(r, 0.5, 0.3)[:, None].repeat(4, 1),
    }
    fit = fit_tradeoff(TradeoffCurve(r, values, 0 * r, 0 * r), resamples=5)
    assert fit.slope < 0
    assert fit.advise_coefficient(0.1) < 0
    assert fit.r2_quadratic > 0.9 > fit.r2_linear + 0.5


def test_residual_norm_counts_what_is_not_padding() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [100.0, 0.0]]])
    assert residual_norm(hidden, torch.tensor([[1, 0]])) == 5


def test_wrong_input_is_refused(without_shape_checks: None) -> None:
    model = tiny("llama")
    vectors = vectors_of(model, 0, 1)
    other = tiny("gpt2")
    with pytest.raises(ValueError, match="of a 'llama' model, and the model is 'gpt2'"), steer(other, vectors, 1.0):
        pass
    narrow = ReadingVectors({0: torch.ones(3)}, "llama")
    with pytest.raises(ValueError, match="width 3, the model 16"), steer(model, narrow, 1.0):
        pass
    with pytest.raises(ValueError, match="layer must be in"), steer(model, vectors_of(model, 7), 1.0):
        pass
    with pytest.raises(ValueError, match="among those with a vector"), steer(model, vectors_of(model, 0), 1.0, [1]):
        pass
    with pytest.raises(ValueError, match="finite number"), steer(model, vectors, math.nan):
        pass
    with pytest.raises(ValueError, match="positions must be"), steer(model, vectors, 1.0, positions="first"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="one for each of 2 rows, got 3"), steer(model, vectors, torch.ones(3)):
        model(**inputs())
    assert not any(m._forward_hooks for m in model.modules())

    make = ReadingVectors.from_pairs
    with pytest.raises(ValueError, match="at least two pairs, got 0"):
        make(model, Letters(), [])
    with pytest.raises(TypeError, match="pairs must be"):
        make(model, Letters(), ["ab", "cd"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="are the same"):
        make(model, Letters(), [("a", "a"), ("b", "b")])
    with pytest.raises(ValueError, match="layer must be in"):
        make(model, Letters(), PAIRS, [2])
    with pytest.raises(ValueError, match="place in every text"):
        make(model, Letters(), PAIRS, token=9)
    with pytest.raises(ValueError, match="method must be one of"):
        make(model, Letters(), PAIRS, method="best")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="transformers model"):
        make(torch.nn.Linear(2, 2), Letters(), PAIRS)
    with pytest.raises(ValueError, match="must be finite"):
        ReadingVectors({0: torch.tensor([math.inf])}, "llama")
    with pytest.raises(ValueError, match="must not be empty"):
        ReadingVectors({}, "llama")

    with pytest.raises(ValueError, match="at least five, 0 among them"):
        sweep_of(model, vectors, [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match="at least five, 0 among them"):
        sweep_of(model, vectors, [-1, 0, 1])
    with pytest.raises(ValueError, match="different tokens"):
        OptionContrast(Letters(), [("a", ["x"], ["xy"])])
    with pytest.raises(ValueError, match="2 to 10 options"):
        MultipleChoice(Letters(), [("a", ["x"], 0)], space="")
    with pytest.raises(ValueError, match="no measurement 'H'"):
        sweep_of(model, vectors).run().mean("H")
    r = np.arange(-3.0, 4)
    certain = TradeoffCurve(r, {"B": np.ones((7, 2)), "H_rel": np.ones((7, 2)) / 2}, r, r)
    with pytest.raises(ValueError, match="cannot be told"):
        fit_tradeoff(certain)
    with pytest.raises(ValueError, match="five coefficients in the window, got 3"):
        fit_tradeoff(certain, window=1)
    with pytest.raises(ValueError, match=r"for r >= 0 and -1 < b0 < 1"):
        alignment_bound(1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"for r >= 0 and -1 < b0 < 1"):
        alignment_bound(-1.0, 1.0, 1.0, 0.0)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not hold reading vectors"):
        ReadingVectors.load(tmp_path / "w.safetensors")


def dropping() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=128, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
    )
    return transformers.GPT2LMHeadModel(config)


def test_a_model_in_training_is_measured_without_dropout_and_trains_on() -> None:
    model = dropping().train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    vectors = ReadingVectors.from_pairs(model, Letters(), PAIRS)
    curve = sweep_of(model, vectors).run()
    assert [m.training for m in model.modules()] == modes
    again = ReadingVectors.from_pairs(model.eval(), Letters(), PAIRS)
    for layer in vectors.layers:
        torch.testing.assert_close(vectors.directions[layer], again.directions[layer])
    np.testing.assert_allclose(curve.mean("B"), sweep_of(model, vectors).run().mean("B"), atol=1e-6)


def test_behaviour_is_told_from_probabilities_below_the_smallest_float() -> None:
    log_probs, nothing = torch.full((1, 128), -200.0), torch.ones(1, 1)
    log_probs[0, 5] = 0.0
    probe = OptionContrast(Letters(), [("a", ["x"], ["y"])])
    up, down = probe._ids[0]
    log_probs[0, up], log_probs[0, down] = -150.0, -150.0 - math.log(3)
    assert probe.score(log_probs, nothing, nothing, slice(0, 1))["B"].item() == pytest.approx(0.5, abs=1e-4)
    choice = MultipleChoice(Letters(), [("q", ["x", "y"], 0)], space="")
    a, b = choice._letters[0]
    log_probs[0, a], log_probs[0, b] = -150.0, -150.0 - math.log(3)
    told = choice.score(log_probs, nothing, nothing, slice(0, 1))
    assert told["H_rel"].item() == pytest.approx(0.75, abs=1e-4)


def test_an_axis_that_points_anywhere_is_refused() -> None:
    with pytest.raises(ValueError, match="pca_diff takes away"):
        direction(2 * torch.ones(4, 3), torch.ones(4, 3), "pca_diff")
    with pytest.raises(ValueError, match="pca_diff takes away"):
        direction(0.3 * torch.ones(4, 3), 0.1 * torch.ones(4, 3), "pca_diff")
    positive, negative, _ = states(2)
    with pytest.raises(ValueError, match="at least 3 pairs to judge pca_diff"):
        separability(positive, negative, "pca_diff")
    with pytest.raises(ValueError, match="at least 2 pairs"):
        separability(positive[:1], negative[:1], "mean_diff")
    with pytest.raises(ValueError, match="must be finite"):
        direction(torch.full((4, 3), math.nan), torch.ones(4, 3))


def test_more_wrong_input_is_refused(without_shape_checks: None) -> None:
    model = tiny("llama")
    vectors = vectors_of(model, 0, 1)
    with pytest.raises(ValueError, match="layers must be whole numbers from 0, got -1"):
        ReadingVectors({-1: torch.ones(16)}, "llama")
    with pytest.raises(TypeError, match="must be tensors"):
        ReadingVectors({0: [1.0]}, "llama")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="batch_size must be"):
        ReadingVectors.from_pairs(model, Letters(), PAIRS, batch_size=0)
    with pytest.raises(ValueError, match="at least one block"):
        ReadingVectors.from_pairs(model, Letters(), PAIRS, layers=[])
    with pytest.raises(ValueError, match="words on either side"):
        OptionContrast(Letters(), [("a", [], ["x"])])
    with pytest.raises(ValueError, match="words on either side"):
        OptionContrast(Letters(), [("a", "good", "bad")])
    with pytest.raises(ValueError, match="and finite"):
        sweep_of(model, vectors, [0, 1, 2, 3, math.nan])
    mood = OptionContrast(Letters(), [("a", ["x"], ["y"])])
    with pytest.raises(ValueError, match="layer must be in"):
        TradeoffSweep(model, Letters(), vectors, range(-2, 3), mood, layers=[99])
    with pytest.raises(ValueError, match="batch_size must be"):
        TradeoffSweep(model, Letters(), vectors, range(-2, 3), mood, batch_size=0)
    with pytest.raises(ValueError, match="at least two tokens, got 'a'"):
        TradeoffSweep(model, Letters(), vectors, range(-2, 3), mood, [TextLikelihood(["long", "a"])]).run()
    r = np.arange(-3.0, 4)
    for level in (0.0, 3.0, -1.0):
        curve = TradeoffCurve(r, {"B": np.tanh(r / 3)[:, None].repeat(2, 1), "H": np.full((7, 2), level)}, r, r)
        with pytest.raises(ValueError, match="must be a probability"):
            fit_tradeoff(curve, "H", resamples=0)


def test_whole_answers_are_scored_token_by_token() -> None:
    model, tokenizer = tiny("llama"), Letters()
    vectors = vectors_of(model, 0)
    items = [("what", ["one", "three", "x"], 1), ("who", ["nobody", "me"], 0)]
    probe = OptionLikelihood(tokenizer, items, "{question}:")
    mood = OptionContrast(tokenizer, [("a", ["x"], ["y"])])
    # batches that cut through a question
    curve = TradeoffSweep(model, tokenizer, vectors, range(-2, 3), mood, [probe], batch_size=2).run()
    for k, r in enumerate(curve.r):
        for row, (question, options, right) in enumerate(items):
            told = []
            for option in options:
                head = tokenizer(f"{question}:")["input_ids"]
                ids = tokenizer(f"{question}: {option}")["input_ids"]
                with torch.no_grad(), steer(model, vectors, float(r)):
                    p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                told.append(sum(p[t - 1, ids[t]].item() for t in range(len(head), len(ids))))
            share = np.exp(told) / np.exp(told).sum()
            assert curve.values["H_options"][k, row] == pytest.approx(share[right], rel=1e-4)
            assert curve.values["H_answer"][k, row] == pytest.approx(np.exp(told[right]), rel=1e-4)
            assert curve.values["accuracy_options"][k, row] == float(np.argmax(told) == right)
    assert fit_tradeoff(curve, "H_options", resamples=2).help == "H_options"


def test_answers_that_cannot_be_told_apart_from_their_question() -> None:
    for message, items in (
        ("must not be empty", []),
        ("two options or more", [("q", ["a"], 0)]),
        ("two options or more", [("q", ["a", "b"], 2)]),
        ("do not follow those of", [("q", ["a", ""], 0)]),
    ):
        with pytest.raises(ValueError, match=message):
            OptionLikelihood(Letters(), items, space="")
    with pytest.raises(ValueError, match="at least one token each"):
        OptionContrast(Letters(), [("a", [""], ["x"])])


def test_advice_stays_within_what_was_measured_and_on_the_cautious_side() -> None:
    r = np.linspace(-6, 6, 13)
    b = np.tanh(0.2 * r)[:, None].repeat(12, 1)
    mild = helpfulness_gaussian(r, 0.5, 0.01)[:, None].repeat(12, 1)
    fit = fit_tradeoff(TradeoffCurve(r, {"B": b, "H_rel": mild}, 0 * r, 0 * r), resamples=3)
    assert fit.efficient_range(0.1) == (-6, 6)
    assert fit.advise_coefficient(0.1) == 6
    # texts that lose unequally: the advice counts on those that lose more
    slopes = np.linspace(0.2, 0.6, 12)
    unequal = np.stack([helpfulness_gaussian(r, 0.5, s) for s in slopes], 1)
    fit = fit_tradeoff(TradeoffCurve(r, {"B": b, "H_rel": unequal}, 0 * r, 0 * r), resamples=50)
    low, high = fit.s_interval
    assert 0.2 < low < fit.s < high < 0.6
    assert fit.advise_coefficient(0.1) < fit.efficient_range(0.1)[1]
    assert helpfulness_gaussian(fit.advise_coefficient(0.1), fit.H0, high) == pytest.approx(0.9 * fit.H0)
