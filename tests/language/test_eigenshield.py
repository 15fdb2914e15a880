import pickle

import numpy as np
import pytest
import torch
import transformers
from scipy.integrate import quad
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from torchgraft.language.eigenshield import (
    EigenShield,
    MarchenkoPastur,
    SpectralFilter,
    attach,
    bbp_threshold,
    collect_embeddings,
    fit_noise,
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


def test_the_spectrum_of_noise_has_its_edges_and_no_spikes():
    none = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n, p = (2000, 300) if seed == 0 else (400, 60)
        Z = 1.5 * rng.normal(size=(n, p))
        shield = EigenShield(min_components=1).fit(Z)
        none += shield.n_spikes_ == 0
        assert shield.sigma2_ == pytest.approx(2.25, rel=0.03)
        assert fit_noise(shield.eigenvalues_, p / n, "iterative") == pytest.approx(2.25, rel=0.02)
        if seed == 0:
            low, high = MarchenkoPastur(p / n, 2.25).edges
            assert shield.eigenvalues_[0] == pytest.approx(high, rel=0.02)
            assert shield.eigenvalues_[-1] == pytest.approx(low, rel=0.02)
    assert none >= 18


def planted(n, p, thetas, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(p, len(thetas))))[0]
    return rng.normal(size=(n, p)) + rng.normal(size=(n, len(thetas))) * np.sqrt(thetas) @ basis.T, basis


@pytest.mark.parametrize(("n", "p"), [(4000, 800), (1200, 1500)])
def test_planted_spikes_are_counted_and_measured(n, p):
    gamma = p / n
    thetas = np.array([12.0, 6.0, 3.0]) * bbp_threshold(gamma)
    Z, basis = planted(n, p, thetas)
    shield = EigenShield(min_components=1).fit(Z)
    assert shield.n_spikes_ == 3
    eigenvalues, overlaps = spike_forward(thetas, gamma)
    assert np.allclose(shield.eigenvalues_[:3], eigenvalues, rtol=0.1)
    found = ((shield.components_ @ basis) ** 2).max(1)
    assert np.allclose(found, overlaps, atol=0.05)
    assert np.allclose(spike_inverse(shield.eigenvalues_[:3], gamma, shield.sigma2_), thetas, rtol=0.15)


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


@parametrize_with_checks([EigenShield(min_components=1)])
def test_scikit_learn_conventions(estimator, check, without_shape_checks):
    check(estimator)


def test_pickle():
    Z, _ = planted(200, 20, [20])
    shield = EigenShield().fit(Z)
    assert np.array_equal(pickle.loads(pickle.dumps(shield)).transform(Z), shield.transform(Z))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_filter_is_the_transform(dtype, rescale):
    Z, _ = planted(300, 24, [20, 10])
    shield = EigenShield(rescale=rescale, strength=0.7).fit(Z)
    z = torch.from_numpy(Z[:12]).to(dtype).view(3, 4, 24)
    out = SpectralFilter(shield)(z)
    assert (out.dtype, out.shape) == (dtype, z.shape)
    expected = torch.from_numpy(shield.transform(z.double().view(12, 24).numpy())).view(3, 4, 24)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    other = SpectralFilter(shield)
    other.load_state_dict(SpectralFilter(shield).state_dict())
    assert torch.equal(other(z), out)


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
