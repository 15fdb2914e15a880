import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, matthews_corrcoef, roc_auc_score

from tests.tabular.test_life2vec_models import batch, config, loud
from torchgraft.tabular import life2vec as l2v
from torchgraft.tabular.life2vec import TCAV, Life2VecForPreTraining, Life2VecForSequenceClassification


def people(n=200, seed=0, share=0.3):
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < share).astype(int)
    return y, np.round(rng.normal(size=n) + 0.8 * y, 1)


# --- metrics


def test_corrected_metrics_without_correction_are_sklearns():
    y, s = people()
    found = l2v.corrected_metrics(y, s, 0.0, threshold=0.4)
    hit = s >= 0.4
    assert found["c_bacc"] == pytest.approx(balanced_accuracy_score(y, hit))
    assert found["c_f1"] == pytest.approx(f1_score(y, hit))
    assert found["c_mcc"] == pytest.approx(matthews_corrcoef(y, hit))


def test_corrected_metrics_are_the_official_ones():
    # CorrectedF1, CorrectedMCC and CorrectedBAcc with alpha 0.025, beta 0.9; SocialComplexityLab/life2vec at
    # 5601191a08a3feae97b4641776692916400c8ed7
    y = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    s = [0.9, 0.7, 0.2, 0.8, 0.4, 0.3, 0.2, 0.1, 0.05, 0.6]
    found = l2v.corrected_metrics(y, s, 0.025, 0.9)
    assert [found[k] for k in ("c_f1", "c_mcc", "c_bacc")] == pytest.approx([0.5940, 0.4022, 0.7177], abs=1e-4)
    # AUL of the same
    assert l2v.area_under_lift(y, s) == pytest.approx(0.6667, abs=1e-4)


def test_correction_recovers_the_truth():
    rng = np.random.default_rng(0)
    truth = rng.random(400_000) < 0.2
    s = rng.normal(size=400_000) + 1.5 * truth
    seen = truth & (rng.random(400_000) < 0.6)  # four in ten positives go unlabelled
    alpha = (truth & ~seen).sum() / (~seen).sum()
    found = l2v.corrected_metrics(seen, s, alpha, threshold=1.0)
    honest = l2v.corrected_metrics(truth, s, 0.0, threshold=1.0)
    for key in ("c_bacc", "c_f1", "c_mcc", "tpr", "fpr", "prevalence"):
        assert found[key] == pytest.approx(honest[key], abs=0.01)
    naive = l2v.corrected_metrics(seen, s, 0.0, threshold=1.0)
    assert naive["c_mcc"] < honest["c_mcc"] - 0.05


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_area_under_lift_is_its_definition(rows):
    y, s = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    if not y.any():
        with pytest.raises(ValueError, match="no positive"):
            l2v.area_under_lift(y, s)
        return
    pairs = [(p > a) + 0.5 * (p == a) for p in s[y] for a in s]
    found = l2v.area_under_lift(y, s)
    assert found == pytest.approx(np.mean(pairs))
    if not y.all():
        auc = roc_auc_score(y, s)
        assert l2v.area_under_curve(y, s) == pytest.approx(auc)
        assert found == pytest.approx(y.mean() / 2 + (1 - y.mean()) * auc)


def test_the_threshold_is_the_best_of_all():
    y, s = people(60, 3)
    chosen = l2v.threshold_for_mcc(y, s)
    every = [l2v.corrected_metrics(y, s, 0.02, threshold=t)["c_mcc"] for t in s]
    assert l2v.corrected_metrics(y, s, 0.02, threshold=chosen)["c_mcc"] == pytest.approx(max(every))
    assert l2v.corrected_metrics(y, s, 0.0, threshold=99.0)["c_mcc"] == 0.0


def test_recalibration_is_bayes():
    rng = np.random.default_rng(0)
    p = rng.random(50)
    found = l2v.recalibrate(p, 0.08, 0.5)
    odds = p / (1 - p) * (0.08 / 0.92)
    np.testing.assert_allclose(found, odds / (1 + odds))
    np.testing.assert_allclose(l2v.recalibrate(found, 0.5, 0.08), p)


def test_intervals_cover_and_repeat():
    y, s = people()
    low, high = l2v.bootstrap_interval(l2v.area_under_curve, y, s, 300)
    assert low < l2v.area_under_curve(y, s) < high
    assert (low, high) == l2v.bootstrap_interval(l2v.area_under_curve, y, s, 300)
    wide = l2v.bootstrap_interval(l2v.area_under_curve, y[:50], s[:50], 300)
    assert wide[1] - wide[0] > high - low
    # resampled within the classes: the number of positives never changes
    assert l2v.bootstrap_interval(lambda a, b: float(a.sum()), y, s, 20) == (y.sum(), y.sum())


def test_groups():
    y, s = people()
    old = np.arange(200) < 120
    found = l2v.metrics_by_group(y, s, {"old": old, "nobody": np.zeros(200, bool)})
    assert found["old"] == {
        "people": 120,
        "positives": int(y[:120].sum()),
        "value": pytest.approx(roc_auc_score(y[:120], s[:120])),
    }
    assert np.isnan(found["nobody"]["value"])
    with pytest.raises(ValueError, match="mask of group 'x'"):
        l2v.metrics_by_group(y, s, {"x": old[:5]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: l2v.area_under_lift([1, 0], [1.0]), "one length"),
        (lambda: l2v.area_under_lift([2, 0], [1.0, 2.0]), "y must be 1"),
        (lambda: l2v.area_under_lift([1, 0], [np.nan, 2.0]), "s holds 1 NaN"),
        (lambda: l2v.area_under_curve([1, 1], [1.0, 2.0]), "both classes"),
        (lambda: l2v.corrected_metrics([1, 0], [1.0, 2.0], 0.5, 0.5), "0 <= alpha < beta <= 1"),
        (lambda: l2v.corrected_metrics([1, 1], [1.0, 2.0], 0.0), "positives and others"),
        (lambda: l2v.threshold_for_mcc([1, 1], [1.0, 2.0]), "positives and others"),
        (lambda: l2v.recalibrate([1.2], 0.1, 0.5), "p must lie in"),
        (lambda: l2v.recalibrate([0.2], 0.0, 0.5), "strictly between"),
        (lambda: l2v.bootstrap_interval(l2v.area_under_lift, [1, 0], [1.0, 0.0], 1), "resamples"),
    ],
)
def test_wrong_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- concept space


def test_concepts_and_their_neighbours():
    model = loud(Life2VecForPreTraining(config()))
    matrix = l2v.concept_matrix(model)
    np.testing.assert_allclose(matrix[10:].mean(0) * 30 + matrix[[1, 2, 3, 9]].sum(0), 0, atol=1e-5)
    tokens = [*l2v.GENERAL_TOKENS, *(f"T_{i}" for i in range(30))]
    matrix[15] = 3 * matrix[20] + 0.01
    ranked = l2v.concept_neighbors(matrix, tokens, "T_5", 30)
    assert ranked[0][0] == "T_10"
    assert ranked[0][1] > 0.99
    assert not {name for name, _ in ranked} & {"T_5", *l2v.GENERAL_TOKENS}
    assert [c for _, c in ranked] == sorted([c for _, c in ranked], reverse=True)
    with pytest.raises(ValueError, match="no token 'x'"):
        l2v.concept_neighbors(matrix, tokens, "x")
    with pytest.raises(ValueError, match="k must be at least 1, got -1"):
        l2v.concept_neighbors(matrix, tokens, "T_5", -1)
    with pytest.raises(ValueError, match="do not belong together"):
        l2v.concept_neighbors(matrix, tokens[:-1], "T_5")
    with pytest.raises(ValueError, match="no life2vec token embedding"):
        l2v.concept_matrix(torch.nn.Linear(2, 2))


def test_robustness_is_spearman_with_a_permutation_test():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    space = rng.normal(size=(30, 6))
    turned = space @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    noisy = space + 0.5 * rng.normal(size=(30, 6))
    found = l2v.embedding_robustness([space, turned, noisy], permutations=199)
    by = {(r.first, r.second): r for r in found}
    assert set(by) == {(0, 1), (0, 2), (1, 2), (0, "permuted"), (0, "random")}
    assert by[0, 1].correlation == pytest.approx(1)

    def distances(m):
        m = m / np.linalg.norm(m, axis=1, keepdims=True)
        return (1 - m @ m.T)[np.triu_indices(30, 1)]

    assert by[0, 2].correlation == pytest.approx(spearmanr(distances(space), distances(noisy)).statistic)
    assert by[0, 2].p_value == pytest.approx(1 / 200)
    assert abs(by[0, "permuted"].correlation) < 0.2
    assert by[0, "random"].p_value > 0.01
    # Benjamini and Hochberg by hand: three times 0.005 of five, then the two others
    p = sorted(r.p_value for r in found)
    expected = [min(min(p[j] * 5 / (j + 1) for j in range(i, 5)), 1) for i in range(5)]
    assert sorted(r.adjusted for r in found) == pytest.approx(expected)
    assert np.isnan(l2v.embedding_robustness([space], permutations=0)[0].p_value)
    with pytest.raises(ValueError, match="same tokens"):
        l2v.embedding_robustness([space, space[:-1]])
    with pytest.raises(ValueError, match="permutations must be at least 0, got -3"):
        l2v.embedding_robustness([space], permutations=-3)
    with pytest.raises(ValueError, match="not finite"):
        l2v.embedding_robustness([np.where(space > 2, np.nan, space)])


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_keep_neighbours(method):
    rng = np.random.default_rng(0)
    centres = 5 * rng.normal(size=(2, 8))
    rows = np.concatenate([centres[i] + rng.normal(size=(15, 8)) for i in range(2)])
    found = l2v.project(rows, method)
    assert found.shape == (30, 2)
    apart = np.linalg.norm(found[:15].mean(0) - found[15:].mean(0))
    assert apart > 2 * found[:15].std()
    with pytest.raises(ValueError, match="at least 3 rows"):
        l2v.project(rows[:2])


def test_missing_map_packages_are_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pacmap", None)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="pip install pacmap"):
        l2v.project(np.eye(4), "pacmap")
    with pytest.raises(ImportError, match="pip install umap-learn"):
        l2v.project(np.eye(4), "umap")


def test_unknown_maps_are_named(without_shape_checks):
    with pytest.raises(ValueError, match="method must be"):
        l2v.project(np.eye(4), "mds")


# --- people


def given(rows=6, seed=0):
    ids, mask = batch(rows, 16, 4, seed)
    return {"input_ids": ids, "padding_mask": mask}


def classifier(**changes):
    return loud(Life2VecForSequenceClassification(config(**changes)))


def test_saliency_is_input_times_gradient():
    model = classifier().double()
    b = given(3)
    raw = l2v.saliency(model, b, normalize=False)
    assert (raw[~b["padding_mask"]] == 0).all()
    x = model.transformer.embed(b["input_ids"]).detach()
    # directional derivative along the embedding of one token, by finite differences
    for row, place in ((0, 3), (1, 7), (2, 0)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = x.clone()
            moved[row, place] *= 1 + step
            ends.append(model(inputs_embeds=moved, padding_mask=b["padding_mask"]).logits[row, 1])
        torch.testing.assert_close(raw[row, place], (ends[0] - ends[1]) / 2e-5, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(l2v.saliency(model, b).norm(dim=1), torch.ones(3).double())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"target must lie in 0\.\.1"):
        l2v.saliency(model, b, target=2)


def test_looking_leaves_the_model_as_it_was():
    model = classifier().train()
    model.decoder.out.bias.requires_grad_(False)
    model.transformer.eval()
    l2v.saliency(model, given())
    l2v.person_summaries(model, [given()])
    TCAV(model).gradients([given()])
    assert model.training
    assert model.decoder.training
    assert not any(part.training for part in model.transformer.modules())
    assert not model.decoder.out.bias.requires_grad
    assert model.decoder.out.weight.requires_grad


def test_summaries_are_what_the_classifier_reads():
    model = classifier()
    b = given()
    found = l2v.person_summaries(model, [b, b])
    assert found.shape == (12, 16)
    logits = model.decoder.out(torch.from_numpy(found[:6]))
    torch.testing.assert_close(logits, model(**b).logits)
    plain = classifier(pooling="cls")
    cls = plain.transformer(**b).last_hidden_state[:, 0]
    np.testing.assert_allclose(l2v.person_summaries(plain, [b]), cls.detach(), rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2, "pooled"])
def test_gradients_are_derivatives_of_moving_the_whole_layer(layer):
    model = classifier().double()
    tcav = TCAV(model, layer)
    b = given(4)
    gradients = tcav.gradients([b])
    vector = torch.randn(16, dtype=torch.float64)
    state, onward = tcav._states(b["input_ids"], b["padding_mask"])
    move = vector * b["padding_mask"][..., None] if state.ndim == 3 else vector
    ends = [onward(state + step * move)[:, 1] for step in (1e-5, -1e-5)]
    expected = ((ends[0] - ends[1]) / 2e-5).detach().numpy()
    np.testing.assert_allclose(gradients @ vector.numpy(), expected, rtol=1e-4, atol=1e-8)
    if layer == "pooled":
        assert np.ptp(gradients, axis=0).max() < 1e-12


def test_integrated_gradients_add_up_to_the_difference():
    model = classifier().double()
    tcav = TCAV(model, 0)
    b = given(2)
    b = {k: v[:1] for k, v in b.items()}
    # one token alone: moving it and moving all tokens is the same
    b = {"input_ids": b["input_ids"][..., :1], "padding_mask": b["padding_mask"][:, :1]}
    x = model.transformer.embed(b["input_ids"])
    whole = tcav.gradients([b], steps=80) @ x[0, 0].detach().numpy()
    zero = model(inputs_embeds=torch.zeros_like(x), padding_mask=b["padding_mask"]).logits[0, 1]
    assert whole[0] == pytest.approx((model(**b).logits[0, 1] - zero).item(), rel=1e-3)


def test_concept_vectors_find_a_planted_direction():
    rng = np.random.default_rng(0)
    planted = np.eye(16)[3]
    scale = np.geomspace(0.01, 100, 16)  # raw activations are never of one size
    concept = (rng.normal(size=(150, 16)) + 2 * planted) * scale
    random = rng.normal(size=(150, 16)) * scale
    tcav = TCAV(classifier(), bootstraps=10)
    vectors = tcav.vectors(concept, random)
    assert vectors.shape == (10, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1)
    # the direction in units of each feature's spread
    assert (np.abs((vectors * scale).argmax(1) - 3) == 0).all()
    up = tcav.score(np.tile(planted, (5, 1)) * 2.0, vectors)
    assert (up.share == 1).all()
    assert (up.magnitude == 1).all()
    mixed = tcav.score(np.array([planted * 3, -planted]), np.array([planted]))
    assert (mixed.share[0], mixed.magnitude[0]) == (0.5, 0.75)
    with pytest.raises(ValueError, match="at least 2 people on each side"):
        tcav.vectors(concept[:1], random)


def test_a_concept_that_the_answer_hangs_on_beats_random_ones():
    torch.manual_seed(0)
    model = classifier()
    b = [given(40, seed) for seed in range(4)]
    tcav = TCAV(model, bootstraps=4)
    activations, gradients = tcav.activations(b), tcav.gradients(b)
    assert activations.shape == gradients.shape == (160, 16)
    logits = torch.cat([model(**one).logits[:, 1] for one in b]).detach().numpy()
    high = logits > np.median(logits)
    score = tcav.score(gradients, tcav.vectors(activations[high], activations[~high])).share.mean()
    chance = tcav.random_scores(gradients, activations, 80, concepts=4)
    assert score > chance.max()
    assert np.array_equal(chance, tcav.random_scores(gradients, activations, 80, concepts=4))
    with pytest.raises(ValueError, match="size must leave"):
        tcav.random_scores(gradients, activations, 159)


def test_models_of_half_precision_can_be_looked_into():
    model, exact = classifier().bfloat16(), classifier()
    b = given()
    np.testing.assert_allclose(l2v.person_summaries(model, [b]), l2v.person_summaries(exact, [b]), atol=0.1)
    np.testing.assert_allclose(TCAV(model, 0).activations([b]), TCAV(exact, 0).activations([b]), atol=0.1)
    assert TCAV(model).gradients([b]).dtype == np.float32


@pytest.mark.parametrize("kind", [Life2VecForPreTraining, l2v.Life2VecForOrdinal, l2v.Life2VecModel])
def test_models_that_are_no_classifiers_are_named(kind):
    model = kind(config())
    for look in (lambda: l2v.saliency(model, given()), lambda: l2v.person_summaries(model, [given()]),
                 lambda: TCAV(model)):  # fmt: skip
        with pytest.raises(TypeError, match=f"must be a Life2VecForSequenceClassification, got {kind.__name__}"):
            look()


def test_wrong_ways_of_looking_are_named(without_shape_checks):
    tcav = TCAV(classifier())
    for target in (-1, 2):
        with pytest.raises(ValueError, match=r"target must lie in 0\.\.1"):
            tcav.gradients([given()], target=target)
    for steps in (0, -2):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            tcav.gradients([given()], steps=steps)
    with pytest.raises(ValueError, match="batches is empty"):
        tcav.activations([])
    with pytest.raises(ValueError, match="batches is empty"):
        l2v.person_summaries(classifier(), [])


def test_wrong_layers_are_named(without_shape_checks):
    with pytest.raises(ValueError, match="layer must be"):
        TCAV(classifier(), True)
    with pytest.raises(ValueError, match=r"layer must be 0\.\.2 or 'pooled'"):
        TCAV(classifier(), 3)
    with pytest.raises(ValueError, match="pooling='attention'"):
        TCAV(classifier(pooling="cls"), "pooled")
    with pytest.raises(ValueError, match="bootstraps"):
        TCAV(classifier(), bootstraps=0)
