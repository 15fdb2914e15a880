import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from torchgraft.language.eigenshield import (
    EigenShield,
    MarchenkoPastur,
    SpectralFilter,
    attach,
    bbp_threshold,
    calibrate,
    collect_embeddings,
    fit_noise,
    perturb,
    spike_forward,
    spike_inverse,
    tracy_widom_edge,
)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("sigma2", [1.0, 3.0])
def test_the_law_has_its_mass_and_moments(gamma, sigma2):
    law = MarchenkoPastur(gamma, sigma2)
    low, high = law.edges
    assert quad(law.pdf, low, high, limit=200)[0] == pytest.approx(min(1, 1 / gamma), abs=1e-5)
    assert quad(lambda x: x * law.pdf(x), low, high)[0] == pytest.approx(sigma2, rel=1e-5)
    assert quad(lambda x: x**2 * law.pdf(x), low, high)[0] == pytest.approx(sigma2**2 * (1 + gamma), rel=1e-5)
    for x in np.linspace(low, high, 7)[1:-1]:
        assert law.cdf(x) == pytest.approx(law.atom + quad(law.pdf, low, x, limit=200)[0], abs=1e-6)
        assert law.ppf(law.cdf(x)) == pytest.approx(x, rel=1e-8)
    assert law.cdf([high, high + 1, -1]).tolist() == [1, 1, 0]
    assert law.cdf(low / 2) == law.atom


def test_the_spectrum_of_noise_has_its_edges():
    n, p = 2000, 300
    shield = EigenShield(min_components=1).fit(1.5 * np.random.default_rng(0).normal(size=(n, p)))
    low, high = MarchenkoPastur(p / n, 2.25).edges
    assert shield.eigenvalues_[0] == pytest.approx(high, rel=0.02)
    assert shield.eigenvalues_[-1] == pytest.approx(low, rel=0.02)
    assert shield.sigma2_ == pytest.approx(2.25, rel=0.03)
    assert fit_noise(shield.eigenvalues_, p / n, "iterative") == pytest.approx(2.25, rel=0.02)


@pytest.mark.parametrize(("n", "p"), [(200, 60), (60, 150)])
def test_noise_has_no_spikes_in_95_of_100_cases(n, p):
    rng = np.random.default_rng(0)
    largest = []
    for _ in range(300):
        Z = rng.normal(size=(n, p))
        Z -= Z.mean(0)
        largest.append(np.linalg.eigvalsh(Z @ Z.T if n < p else Z.T @ Z)[-1] / n)
    clear = np.mean(np.array(largest) <= tracy_widom_edge(n, p))
    # 2.6 standard deviations of 300 draws at 95 %
    assert clear == pytest.approx(0.95, abs=0.033)
    found = [EigenShield(min_components=1).fit(rng.normal(size=(2 * n, p))).n_spikes_ for _ in range(50)]
    assert np.mean(np.array(found) == 0) >= 0.86


def planted(n, p, thetas, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(p, len(thetas))))[0]
    return rng.normal(size=(n, p)) + rng.normal(size=(n, len(thetas))) * np.sqrt(thetas) @ basis.T, basis


@pytest.mark.parametrize(("n", "p"), [(2000, 500), (600, 750)])
def test_planted_spikes_are_counted_and_measured(n, p):
    gamma = p / n
    thetas = np.array([12.0, 6.0, 3.0]) * bbp_threshold(gamma)
    expected, overlaps = spike_forward(thetas, gamma)
    values, found, strengths = [], [], []
    for seed in range(4):
        Z, basis = planted(n, p, thetas, seed)
        shield = EigenShield(min_components=1).fit(Z)
        assert shield.n_spikes_ == 3
        values.append(shield.eigenvalues_[:3])
        found.append(np.diag((shield.components_ @ basis) ** 2))
        strengths.append(shield.spike_strengths_)
    # planted factors are drawn too: their own variance is off by sqrt(2 / (4 n))
    rtol = 0.05 if n == 2000 else 0.08
    assert np.allclose(np.mean(values, 0), expected, rtol=rtol)
    assert np.allclose(np.mean(found, 0), overlaps, rtol=0.05)
    assert np.allclose(np.mean(strengths, 0), thetas, rtol=1.5 * rtol)


def test_spikes_just_above_the_threshold_are_found_more_often_than_not():
    # exact only as p grows: the gap to the edge grows as sqrt(p) against the fluctuation of the eigenvalue
    n, p = 1200, 300
    counts = [
        EigenShield(min_components=1).fit(planted(n, p, [t * (p / n) ** 0.5], seed)[0]).n_spikes_
        for t in (0.5, 2.0)
        for seed in range(4)
    ]
    assert sum(counts[:4]) <= 1
    assert counts[4:] == [1, 1, 1, 1]


def test_spikes_below_the_threshold_leave_no_trace():
    gamma = 0.5
    eigenvalue, overlap = spike_forward([0.9 * gamma**0.5, gamma**0.5 + 1e-9], gamma)
    assert np.allclose(eigenvalue, (1 + gamma**0.5) ** 2)
    assert np.allclose(overlap, 0, atol=1e-6)
    assert spike_inverse((1 + gamma**0.5) ** 2, gamma) == 0
    thetas = np.linspace(0.8, 20, 30)
    assert np.allclose(spike_inverse(spike_forward(thetas, gamma, 2.0)[0], gamma, 2.0), thetas)


def test_the_projector():
    Z, _ = planted(500, 40, [20, 10, 5])
    shield = EigenShield().fit(Z)
    V = shield.components_
    assert np.allclose(V @ V.T, np.eye(3), atol=1e-10)
    out = shield.transform(Z)
    naive = shield.mean_ + sum(np.outer((Z - shield.mean_) @ v, v) for v in V)
    assert np.allclose(out, naive)
    assert np.allclose(shield.transform(out), out)
    assert np.allclose((Z - out) @ V.T, 0, atol=1e-9)
    assert np.linalg.matrix_rank(out - shield.mean_) == 3
    energy = ((Z - out) ** 2).sum(1) / ((Z - shield.mean_) ** 2).sum(1)
    assert np.allclose(shield.score_samples(Z), energy)
    shield.set_params(center=False)
    assert np.allclose(shield.transform(Z), Z @ V.T @ V)
    shield.set_params(center=True, strength=0.25)
    assert np.allclose(shield.transform(Z), Z + 0.25 * (out - Z))
    shield.set_params(strength=1.0, rescale=True)
    assert np.allclose(np.linalg.norm(shield.transform(Z), axis=1), np.linalg.norm(Z, axis=1))


def test_both_solvers_agree_and_follow_rotations_and_shifts():
    Z, _ = planted(60, 60, [40, 20])
    square = EigenShield(min_components=2).fit(Z)
    _, s, vt = np.linalg.svd(Z - Z.mean(0))
    assert np.allclose(square.eigenvalues_, s[:59] ** 2 / 60)
    wide = np.hstack([Z, np.zeros((60, 1))])
    shield = EigenShield(noise=1.0).fit(wide)
    assert np.allclose(
        np.abs(shield.components_[:, :60] @ vt[: len(shield.components_)].T), np.eye(len(shield.components_)), atol=1e-6
    )
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(60, 60)))[0]
    turned = EigenShield(min_components=2).fit(Z @ Q)
    assert np.allclose(turned.transform(Z @ Q), square.transform(Z) @ Q)
    moved = EigenShield(min_components=2).fit(Z + 7)
    assert np.allclose(moved.transform(Z + 7), square.transform(Z) + 7)


def test_the_directions_that_move_are_dropped():
    Z, basis = planted(800, 50, [30, 25, 20, 15])
    rng = np.random.default_rng(3)
    Zp = Z + rng.normal(size=(800, 1)) * 8 @ basis[:, 2:3].T
    shield = EigenShield(alpha=0.45).fit(Z, Z_perturbed=Zp)
    assert shield.n_spikes_ == 4
    overlap = (shield.components_ @ basis) ** 2
    assert overlap[:, 2].max() < 0.1
    assert sorted(overlap.argmax(1)) == [0, 1, 3]
    by_hand = [(((Zp - Z) @ v) ** 2).mean() / ((Z - Z.mean(0)) @ v).var() for v in shield.components_]
    assert np.allclose(shield.rbns_[shield.causal_mask_], by_hand)
    everything = EigenShield(alpha=0).fit(Z, Z_perturbed=Zp)
    assert everything.causal_mask_.all()
    with pytest.raises(ValueError, match="every one of 4 spikes is rejected"):
        EigenShield(alpha=1.5).fit(Z, Z_perturbed=Zp)


def test_the_margin_score_keeps_what_tells_classes_apart():
    rng = np.random.default_rng(0)
    texts = np.zeros((2, 30))
    texts[0, 0], texts[1, 0] = 1, -1
    y = rng.integers(0, 2, 600)
    Z = rng.normal(size=(600, 30)) + 6 * texts[y]
    Z[:, 1] += rng.normal(size=600) * 3
    shield = EigenShield(nonconformity="margin", alpha=0.7).fit(Z, y, Z + 0.1 * rng.normal(size=Z.shape), texts)
    assert shield.n_spikes_ == 2
    assert np.abs(shield.components_[0, 0]) > 0.9
    with pytest.raises(ValueError, match="needs y"):
        EigenShield(nonconformity="margin").fit(Z, Z_perturbed=Z)


def test_outliers_lie_outside_the_subspace():
    Z, _ = planted(600, 40, [40, 30])
    shield = EigenShield().fit(Z[:400])
    assert shield.is_outlier(Z[400:], 0.1).mean() < 0.2
    off = Z[400:] + 10 * np.random.default_rng(1).normal(size=(200, 40))
    assert shield.is_outlier(off, 0.1).mean() > 0.5
    with pytest.raises(ValueError, match="level must lie"):
        shield.is_outlier(Z, 0.001)


def test_clean_rows_are_flagged_no_more_often_than_promised():
    rates = []
    for seed in range(30):
        Z, _ = planted(700, 20, [40, 30], seed)
        shield = EigenShield().fit(Z[:300]).conformalize(Z[300:400])
        rates.append(shield.is_outlier(Z[400:], 0.1).mean())
    # the mean over calibrations is ceil(101 * 0.9) / 101 below, 0.0990 above
    assert np.mean(rates) == pytest.approx(0.099, abs=0.015)


def test_fresh_spikes():
    alarms, caught = 0, 0
    for seed in range(40):
        Z, basis = planted(900, 60, [400, 30, 3], seed)
        shield = EigenShield().fit(Z[:600])
        alarms += shield.fresh_spikes(Z[600:]).count > 0
        rng = np.random.default_rng(seed)
        new = np.linalg.qr(np.hstack([basis, rng.normal(size=(60, 1))]))[0][:, 3]
        moved = Z[600:] + 2.0 * rng.normal(size=(300, 1)) * new
        found = shield.fresh_spikes(moved)
        caught += found.count == 1 and abs(found.strengths[0] - 4) < 2
    assert alarms <= 4
    assert caught >= 36
    assert shield.fresh_spikes(Z[600:] + 2 * new).count == 1
    with pytest.raises(ValueError, match="no room"):
        EigenShield(min_components=60).fit(Z).fresh_spikes(Z)


def test_a_stream_is_the_whole():
    Z, basis = planted(500, 30, [30, 20, 10])
    Z += 100
    moved = Z + np.random.default_rng(1).normal(size=(500, 1)) * 5 @ basis[:, :1].T
    for settings_ in ({}, {"whiten": True}, {"solver": "lanczos", "noise": "iterative", "max_spikes": 8}):
        whole = EigenShield(alpha=0.5, **settings_).fit(Z, Z_perturbed=moved)
        stream = EigenShield(alpha=0.5, **settings_)
        for part in (slice(0, 1), slice(1, 50), slice(50, 400)):
            stream.partial_fit(Z[part], Z_perturbed=moved[part], solve=False)
        with pytest.raises(ValueError, match="not fitted"):
            stream.transform(Z)
        stream.partial_fit(Z[400:], Z_perturbed=moved[400:])
        assert np.allclose(stream.eigenvalues_[:8], whole.eigenvalues_[:8])
        assert np.allclose(stream.rbns_, whole.rbns_)
        assert np.allclose(stream.transform(Z), whole.transform(Z))
        assert stream.n_samples_seen_ == 500
        with pytest.raises(ValueError, match="conformalize"):
            stream.is_outlier(Z)
        assert stream.conformalize(Z).is_outlier(Z).mean() < 0.06
    with pytest.raises(ValueError, match="every partial_fit"):
        stream.partial_fit(Z)
    with pytest.raises(ValueError, match="all rows at once"):
        EigenShield(nonconformity="margin").partial_fit(Z, Z_perturbed=moved)
    assert EigenShield().partial_fit(Z).fit(Z).partial_fit(Z[:100]).n_samples_seen_ == 100


@pytest.mark.parametrize(("n", "p"), [(400, 150), (150, 400)])
def test_the_largest_eigenvalues_alone_give_the_same_filter(n, p):
    Z, _ = planted(n, p, [60, 30, 20])
    exact = EigenShield(noise="iterative").fit(Z)
    top = EigenShield(noise="iterative", solver="lanczos", max_spikes=10).fit(Z)
    assert top.n_spikes_ == exact.n_spikes_ == 3
    assert len(top.eigenvalues_) == 11
    assert np.allclose(top.eigenvalues_, exact.eigenvalues_[:11])
    assert top.sigma2_ == pytest.approx(exact.sigma2_)
    assert np.allclose(top.transform(Z), exact.transform(Z))
    with pytest.raises(ValueError, match="more than max_spikes=2"):
        EigenShield(noise="iterative", solver="lanczos", max_spikes=2).fit(Z)


def test_features_of_unequal_noise_are_whitened():
    Z, _ = planted(1200, 150, [6, 5])
    scale = np.geomspace(0.1, 10, 150)
    assert EigenShield().fit(Z * scale).n_spikes_ > 2
    shield = EigenShield(whiten=True).fit(Z * scale)
    assert shield.n_spikes_ == 2
    out = shield.transform(Z * scale)
    assert np.allclose(shield.transform(out), out)
    same = EigenShield(whiten=True).fit(Z)
    assert np.allclose(out, same.transform(Z) * scale)
    assert np.allclose(shield.score_samples(Z * scale), same.score_samples(Z))
    z = torch.from_numpy(Z * scale)
    assert np.allclose(SpectralFilter(shield, torch.float64)(z).numpy(), out)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.floats(0, 1.2))
def test_the_quantile_keeps_the_right_number(scores, alpha):
    from fractions import Fraction

    scores = np.array(scores, dtype=float)
    alpha = round(alpha, 2)
    shield = EigenShield()
    shield.rbns_ = scores
    (mask,) = shield.sweep([alpha]).values()
    k = -int(-((len(scores) + 1) * (1 - Fraction(str(alpha)))) // 1)
    if k < 1:
        assert not mask.any()
    else:
        # ties are kept together
        tau = np.sort(scores)[min(k, len(scores)) - 1]
        assert mask.tolist() == (scores <= tau).tolist()


def test_quantile_edges():
    Z, _ = planted(400, 30, [40])
    moved = Z + np.random.default_rng(0).normal(size=Z.shape)
    only = EigenShield().fit(Z, Z_perturbed=moved)
    assert (only.n_spikes_, only.causal_mask_.tolist()) == (1, [True])
    Z, _ = planted(400, 30, [40, 30, 20, 10])
    shield = EigenShield(alpha=0.5).fit(Z, Z_perturbed=Z + np.random.default_rng(0).normal(size=Z.shape))
    assert [int(m.sum()) for m in shield.sweep([0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 2.0]).values()] == [
        4,
        4,
        4,
        3,
        2,
        1,
        0,
        0,
    ]
    again = EigenShield(alpha=0.7).fit(Z, Z_perturbed=Z + np.random.default_rng(0).normal(size=Z.shape))
    assert np.array_equal(shield.reselect(0.7).components_, again.components_)
    with pytest.raises(ValueError, match="every one of 4"):
        shield.reselect(1.0)
    assert (shield.alpha, len(shield.components_)) == (0.7, 2)


def test_a_failed_fit_leaves_no_mixture():
    Z, _ = planted(200, 20, [20])
    shield = EigenShield().fit(Z)
    with pytest.raises(ValueError, match="no spike"):
        shield.fit(np.random.default_rng(2).normal(size=(200, 20)))
    with pytest.raises(ValueError, match="not fitted"):
        shield.transform(Z)


def test_embeddings_without_a_bulk_are_refused():
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 40))
    with pytest.raises(ValueError, match="varies in 5 of 40 directions"):
        EigenShield().fit(Z)
    assert EigenShield(noise=1e-3).fit(Z).n_spikes_ == 5
    with pytest.raises(ValueError, match="varies in 0 of 3"):
        EigenShield(min_components=1).fit(np.ones((10, 3)))


@pytest.mark.parametrize("n", [400, 50])
@pytest.mark.parametrize("solver", ["exact", "lanczos"])
def test_directions_without_variance_are_no_dimensions(n, solver):
    options = {"noise": "iterative", "solver": solver, "max_spikes": 10}
    for seed in range(3):
        Z, _ = planted(n, 60, [60.0], seed)
        plain = EigenShield(**options).fit(Z)
        # every third feature is dead, as behind a ReLU
        dead = EigenShield(**options).fit(np.hstack([Z, np.full((n, 30), 7.0)]))
        assert dead.n_spikes_ == plain.n_spikes_ == 1
        assert dead.gamma_ == plain.gamma_
        assert dead.sigma2_ == pytest.approx(plain.sigma2_)
        assert np.allclose(dead.transform(np.hstack([Z, np.full((n, 30), 7.0)]))[:, :60], plain.transform(Z))
        stream = EigenShield(**options).partial_fit(np.hstack([Z, np.full((n, 30), 7.0)]))
        assert (stream.n_spikes_, stream.gamma_) == (1, plain.gamma_)


def test_what_a_layer_norm_takes_away_is_no_dimension():
    Z, _ = planted(400, 60, [60.0])
    shield = EigenShield().fit(Z - Z.mean(1, keepdims=True))
    assert (shield.n_spikes_, shield.gamma_, len(shield.eigenvalues_)) == (1, 59 / 400, 59)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_of_any_precision_are_fitted(dtype):
    Z = torch.from_numpy(planted(300, 20, [30, 20])[0]).to(dtype)
    shield = EigenShield().fit(Z, Z_perturbed=Z + 1)
    assert np.array_equal(shield.components_, EigenShield().fit(Z.double().numpy()).components_)
    assert shield.transform(Z).dtype == np.float64
    assert shield.transform(Z.float().numpy()).dtype == np.float32


@parametrize_with_checks([EigenShield(min_components=1)])
def test_scikit_learn_conventions(estimator, check, without_shape_checks):
    check(estimator)


def test_pickle():
    Z, _ = planted(200, 20, [20])
    shield = EigenShield().fit(Z)
    assert np.array_equal(pickle.loads(pickle.dumps(shield)).transform(Z), shield.transform(Z))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"rescale": True, "strength": 0.7}, {"center": False}, {"min_components": 20}])
def test_the_filter_is_the_transform(dtype, options, tmp_path):
    Z, _ = planted(300, 24, [20, 10])
    shield = EigenShield(**options).fit(Z)
    z = torch.from_numpy(Z[:12]).to(dtype).view(3, 4, 24)
    filtering = SpectralFilter(shield, torch.promote_types(dtype, torch.float32))
    # beyond p / 2 directions one product with the whole projector is cheaper
    assert len(filtering.up) == (0 if "min_components" in options else 2)
    out = filtering(z)
    assert (out.dtype, out.shape, out.device) == (dtype, z.shape, z.device)
    expected = torch.from_numpy(shield.transform(z.double().view(12, 24).numpy())).view(3, 4, 24)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 5e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    filtering.save(tmp_path / "filter.safetensors")
    assert torch.equal(SpectralFilter.load(tmp_path / "filter.safetensors")(z), out)
    other = SpectralFilter(shield)
    other.load_state_dict(SpectralFilter(shield).state_dict())
    assert torch.equal(other(z), SpectralFilter(shield)(z))


@pytest.mark.parametrize("rescale", [False, True])
def test_the_filter_compiles_as_one_graph(rescale, without_shape_checks):
    torch._dynamo.reset()
    filtering = SpectralFilter(EigenShield(rescale=rescale).fit(planted(300, 24, [20, 10])[0]))
    z = torch.randn(3, 4, 24)
    torch.testing.assert_close(torch.compile(filtering, backend="eager", fullgraph=True)(z), filtering(z))


def test_a_row_that_loses_everything_is_not_divided_by_zero():
    Z, _ = planted(300, 6, [20])
    shield = EigenShield(center=False, rescale=True).fit(Z)
    off = np.linalg.svd(shield.components_)[2][-1]
    assert np.isfinite(shield.transform(np.stack([0 * off, off]))).all()
    assert torch.equal(SpectralFilter(shield)(torch.zeros(1, 6)), torch.zeros(1, 6))


def test_only_its_own_files_are_loaded(tmp_path):
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"SpectralFilter\.save"):
        SpectralFilter.load(tmp_path / "other.safetensors")


def test_the_filter_has_the_gradient_of_a_projection():
    Z, _ = planted(300, 6, [20, 10])
    filtering = SpectralFilter(EigenShield().fit(Z)).double()
    assert torch.autograd.gradcheck(filtering, torch.randn(2, 6, dtype=torch.float64, requires_grad=True))


SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
)


@pytest.mark.parametrize("name", ["vit", "clip", "siglip"])
def test_transformers_vision_models(name):
    torch.manual_seed(0)
    model = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL)),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)),
    }[name]().eval()
    batches = [torch.randn(16, 3, 16, 16) for _ in range(4)]
    part = next(n for n, m in model.named_modules() if type(m).__name__.endswith("Encoder") or n == "layers")
    module = dict(model.named_modules())[part]
    if isinstance(module, nn.ModuleList):
        part = f"{part}.1"
    Z = collect_embeddings(model, part, [{"pixel_values": b} for b in batches])
    assert Z.shape == (64, 16)
    shield = EigenShield(min_components=2).fit(Z)
    before = model(batches[0]).last_hidden_state
    with attach(model, part, shield):
        during = model(batches[0]).last_hidden_state
        again = collect_embeddings(model, part, [batches[0]], pool="tokens")
        assert np.linalg.matrix_rank(again - shield.mean_, tol=1e-3) == len(shield.components_)
    assert not torch.allclose(before, during)
    assert torch.equal(model(batches[0]).last_hidden_state, before)
    with pytest.raises(RuntimeError), attach(model, part, shield):
        raise RuntimeError
    assert torch.equal(model(batches[0]).last_hidden_state, before)


TEXT = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
    vocab_size=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL), text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=39, vision_feature_layer=-1,
    )  # fmt: skip
    ids = torch.tensor([[1, 39, 39, 39, 39, 5, 6]]).expand(6, -1)
    batches = [{"pixel_values": torch.randn(6, 3, 16, 16), "input_ids": ids} for _ in range(8)]
    return transformers.LlavaForConditionalGeneration(config), "model.multi_modal_projector", batches


def qwen2_vl():
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config=dict(
            depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        image_token_id=39, vision_start_token_id=37, vision_end_token_id=38,
    )  # fmt: skip
    ids = torch.tensor([[1, 37, 39, 39, 39, 39, 38, 5]]).expand(6, -1)
    grid = torch.tensor([[1, 4, 4]]).expand(6, -1)
    batches = [
        {
            "pixel_values": torch.randn(96, 96), "image_grid_thw": grid, "input_ids": ids,
            "mm_token_type_ids": (ids == 39).long(),
        }
        for _ in range(8)
    ]  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config), "model.visual.merger", batches


def idefics3():
    config = transformers.Idefics3Config(
        vision_config=SMALL | {"num_hidden_layers": 1}, text_config=transformers.LlamaConfig(**TEXT), scale_factor=2,
        image_token_id=39, pad_token_id=0,
    )  # fmt: skip
    ids = torch.tensor([[1, 39, 5, 6]]).expand(6, -1)
    batches = [{"pixel_values": torch.randn(6, 1, 3, 16, 16), "input_ids": ids} for _ in range(8)]
    return transformers.Idefics3ForConditionalGeneration(config), "model.connector", batches


@pytest.mark.parametrize("make", [llava, qwen2_vl, idefics3])
def test_projectors_of_vision_language_models(make, tmp_path):
    torch.manual_seed(0)
    model, part, batches = make()
    model.eval()
    keys = list(model.state_dict())
    shield = calibrate(
        model, part, batches, "fgsm", 0.05, shield=EigenShield(min_components=3, alpha=0.5), pool="tokens", stride=2
    )
    assert len(shield.components_) < len(shield.spikes_)
    with torch.no_grad():
        before = model(**batches[0]).logits
        handle = attach(model, part, shield)
        during = model(**batches[0]).logits
        tokens = collect_embeddings(model, part, batches[:1], "tokens")
        generated = model.generate(**batches[0], max_new_tokens=2, do_sample=False)
        model.save_pretrained(tmp_path)
        assert list(model.state_dict()) == keys
        handle.remove()
        handle.remove()
        after = model(**batches[0]).logits
    assert np.allclose(shield.transform(tokens), tokens, atol=1e-5)
    assert generated.shape[1] > batches[0]["input_ids"].shape[1]
    assert not torch.allclose(before, during)
    assert torch.equal(before, after)
    assert all(p.grad is None for p in model.parameters())
    with attach(model.to(torch.bfloat16), part, shield):
        half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batches[0].items()}
        assert model(**half).logits.dtype == torch.bfloat16


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_no_hook_is_left_behind_by_an_exception(without_shape_checks):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(60, 4)
    narrow = EigenShield(min_components=1).fit(np.random.default_rng(0).normal(size=(60, 5)))
    before = model(x)
    for failing, words in (
        (lambda: attach(model, "9", narrow), "no module"),
        (lambda: collect_embeddings(model, "0", [x, torch.randn(2, 7)]), "shapes"),
        (lambda: perturb(model, "2", torch.randn(2, 7), "pgd"), "shapes"),
        (lambda: calibrate(model, "0", [x, torch.randn(2, 7)], "fgsm"), "shapes"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=words):
            failing()
        assert hooks(model) == 0
    with (
        pytest.raises(ValueError, match="'0' returns 8 features, but the shield was fitted on 5"),
        attach(model, "0", narrow),
    ):
        model(x)
    assert hooks(model) == 0
    assert torch.equal(model(x), before)


Pair = namedtuple("Pair", "words states mask")


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.inner, self.make = nn.Identity(), make
        self.inner.forward = make

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (None, x, 1),
        lambda x: [x, "words"],
        lambda x: {"states": x, "mask": None},
        lambda x: Pair(None, x, x),
        lambda x: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x),
    ],
)
def test_the_first_tensor_of_any_output_is_filtered(make):
    Z, _ = planted(100, 6, [20])
    shield = EigenShield(min_components=1).fit(Z)
    model, x = Returns(make), torch.from_numpy(Z[:5]).float()
    plain = make(x)
    with attach(model, "inner", shield):
        out = model(x)
    assert type(out) is type(plain)
    pairs = list(zip(*(o.values() if hasattr(o, "values") else o for o in (plain, out)), strict=True))
    changed = [b for a, b in pairs if a is not b]
    assert len(changed) == 1
    torch.testing.assert_close(changed[0], SpectralFilter(shield)(x))


@pytest.mark.parametrize("make", [lambda x: None, lambda x: x.long(), lambda x: (1, 2), lambda x: x.sum()])
def test_outputs_that_cannot_be_filtered_are_named(make):
    model = Returns(make)
    shield = EigenShield().fit(planted(100, 6, [20])[0])
    with attach(model, model.inner, shield), pytest.raises(ValueError, match="must return a float tensor"):
        model(torch.randn(2, 6))
    assert hooks(model) == 0


@pytest.mark.parametrize("attack", ["noise", "fgsm", "pgd"])
def test_perturbations_stay_within_their_bounds_and_move_embeddings(attack):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4)).train()
    x = torch.rand(10, 3, 4, 4)
    moved = perturb(model, "2", x, attack, 0.1, bounds=(0, 1), generator=torch.Generator().manual_seed(0))
    assert not moved.requires_grad
    assert (moved - x).abs().max() <= 0.1 + 1e-6
    assert 0 <= moved.min() <= moved.max() <= 1
    assert model.training
    assert all(p.grad is None for p in model.parameters())

    def drift(y):
        return (model[:3](y) - model[:3](x)).square().sum().item()

    noise = perturb(model, "2", x, "noise", 0.1, bounds=(0, 1), generator=torch.Generator().manual_seed(1))
    if attack != "noise":
        assert drift(moved) > 2 * drift(noise)
    if attack == "pgd":
        assert drift(moved) > drift(perturb(model, "2", x, "fgsm", 0.1, bounds=(0, 1)))
    batch = {"pixels": x, "other": 1}
    with_key = perturb(lambda_model(), "inner", batch, attack, 0.1, key="pixels", call=lambda m, b: m(b["pixels"]))
    assert (with_key["other"], batch["pixels"] is x) == (1, True)
    assert perturb(model, "2", x, lambda m, b: b + 1).equal(x + 1)


def lambda_model():
    return Returns(lambda x: x.flatten(1) * 2)


def test_calibration_is_collecting_perturbing_and_fitting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    batches = list(torch.randn(4, 50, 12))
    settings_ = EigenShield(min_components=4, alpha=0.5)
    shield = calibrate(model, "1", batches, "pgd", 0.2, shield=settings_, seed=3)
    generator = torch.Generator().manual_seed(3)
    moved = [perturb(model, "1", b, "pgd", 0.2, generator=generator) for b in batches]
    by_hand = EigenShield(min_components=4, alpha=0.5).fit(
        collect_embeddings(model, "1", batches), Z_perturbed=collect_embeddings(model, "1", moved)
    )
    assert np.array_equal(shield.rbns_, by_hand.rbns_)
    assert not hasattr(settings_, "mean_")
    texts = np.random.default_rng(0).normal(size=(3, 12))
    y = np.random.default_rng(0).integers(0, 3, 200)
    margin = EigenShield(min_components=4, nonconformity="margin")
    found = calibrate(model, "1", batches, labels=y, text_embeddings=texts, shield=margin)
    assert ((found.rbns_ > 0) & (found.rbns_ < 1)).all()


def test_tokens_are_pooled_stacked_or_thinned():
    model = Returns(lambda x: x)
    x = torch.arange(24.0).view(2, 4, 3)
    assert np.allclose(collect_embeddings(model, "inner", [x]), x.mean(1))
    assert np.allclose(collect_embeddings(model, "inner", [x], "tokens"), x.view(8, 3))
    assert np.allclose(collect_embeddings(model, "inner", [x], "tokens", 2), x[:, ::2].reshape(4, 3))
    assert np.allclose(collect_embeddings(model, "inner", [x[0]]), x[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda Z: EigenShield().fit(Z[:1]), "minimum of 2"),
        (lambda Z: EigenShield().fit(np.where(Z > 2, np.nan, Z)), "NaN"),
        (lambda Z: EigenShield().fit(Z), "no spike found"),
        (lambda Z: EigenShield(min_components=1).fit(Z, Z_perturbed=Z[:-1]), "must be paired"),
        (lambda Z: EigenShield(min_components=1).fit(Z, Z_perturbed=Z * np.inf), "NaN or infinity"),
        (lambda Z: EigenShield(min_components=1).fit(Z).transform(Z[:, :-1]), "features"),
        (lambda Z: EigenShield(alpha=-1).fit(Z), "alpha"),
        (lambda Z: EigenShield(margin="wide").fit(Z), "tracy-widom"),
        (lambda Z: EigenShield(nonconformity="best").fit(Z), "sensitivity"),
        (lambda Z: EigenShield(strength=2).fit(Z), "strength"),
        (lambda Z: EigenShield(temperature=0).fit(Z), "temperature"),
        (lambda Z: EigenShield(noise="mode").fit(Z), "median"),
        (lambda Z: EigenShield(noise=-1.0).fit(Z), "positive"),
        (lambda Z: EigenShield(solver="fast").fit(Z), "lanczos"),
        (lambda Z: EigenShield(solver="lanczos").fit(Z), "iterative"),
        (lambda Z: EigenShield(max_spikes=0).fit(Z), "max_spikes"),
        (lambda Z: EigenShield(min_components=-1).fit(Z), "min_components"),
        (lambda Z: EigenShield().partial_fit(Z[:1]), "minimum of 2"),
        (lambda Z: EigenShield(min_components=1).fit(Z).reselect(-1), "alpha"),
        (lambda Z: perturb(nn.Identity(), "", torch.ones(2, 2), "cw"), "attack"),
        (lambda Z: perturb(nn.Identity(), "", torch.ones(2, 2), "pgd", 0.0), "epsilon"),
        (lambda Z: perturb(nn.Identity(), "", {"x": torch.ones(2, 2)}), "'pixel_values'"),
        (lambda Z: perturb(nn.Identity(), "", torch.ones(2, 2).long()), "float tensor"),
        (lambda Z: perturb(Returns(lambda x: x.detach()), "inner", torch.ones(2, 2), "pgd"), "does not reach"),
        (lambda Z: calibrate(nn.Identity(), "", []), "nothing was collected"),
        (lambda Z: collect_embeddings(nn.Identity(), "", [torch.ones(1, 2)], "tokens", 0), "stride"),
        (lambda Z: collect_embeddings(nn.Identity(), "", [torch.ones(1, 2)], stride=2), "pool='tokens'"),
        (lambda Z: MarchenkoPastur(0), "gamma"),
        (lambda Z: MarchenkoPastur(1).ppf(2), "0..1"),
        (lambda Z: tracy_widom_edge(1, 5), "at least 2"),
        (lambda Z: fit_noise([], 0.5), "one row"),
        (lambda Z: SpectralFilter(EigenShield(min_components=1).fit(Z))(torch.randn(2, 3)), "features"),
        (lambda Z: collect_embeddings(nn.Sequential(nn.Linear(2, 2)), "1", []), "no module"),
        (lambda Z: collect_embeddings(nn.Sequential(nn.Linear(2, 2)), "0", []), "nothing was collected"),
        (lambda Z: collect_embeddings(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), []), "not part of"),
        (lambda Z: collect_embeddings(nn.Sequential(nn.Linear(2, 2)), "0", [torch.ones(1, 2)], pool="max"), "pool"),
    ],
)
def test_wrong_inputs(call, words, without_shape_checks):
    with pytest.raises(ValueError, match=words):
        call(np.random.default_rng(0).normal(size=(200, 20)))
