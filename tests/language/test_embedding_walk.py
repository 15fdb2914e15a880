"""Walks add up, paths multiply, patterns are replaced and put back; on every family that the room knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import spearmanr
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from tests.language.models import BIDIRECTIONAL, CONFIGS, SMALL, Letters, inputs, tiny
from torchgraft.language._access import Access, attention_patterns, captured
from torchgraft.language.embedding_walk import (
    ConceptSpace,
    EmbeddingWalk,
    ablate_association,
    analogy_accuracy,
    anisotropy,
    axis_privilege,
    classify_ops,
    compositionality,
    distance_profile,
    neighbour_purity,
    place_pattern,
    shares,
)
from torchgraft.language.embedding_walk.concepts import sparse_codes
from torchgraft.language.embedding_walk.nulls import gaussian_like, gaussian_of_lengths, rotation, shuffled_dimensions

CAUSAL = [kind for kind in CONFIGS if kind not in BIDIRECTIONAL]
IDS = [5, 9, 17, 4, 30, 12, 8]
TEXT = torch.tensor(IDS)


def mamba(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=40, state_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return transformers.MambaForCausalLM(config).eval().to(dtype)


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Weights, hooks, modes and attention are afterwards what they were."""

    def state() -> Any:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        modes = [m.training for m in model.modules()]
        return hooks, modes, model.config._attn_implementation

    # transformers puts hooks of its own in a model, once, when it is first asked for what goes on inside
    if not model.config.model_type.startswith("mamba"):
        with torch.no_grad():
            model(TEXT[None], output_hidden_states=True, output_attentions=True)
    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    try:
        yield
    finally:
        assert state() == before
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", CAUSAL)
def test_steps_and_contributions_add_up(kind: str) -> None:
    model = tiny(kind)
    model.train()
    with untouched(model):
        trace = EmbeddingWalk(model, Letters()).walk(TEXT)
        model.eval()
        with torch.no_grad():
            out = model(TEXT[None], output_hidden_states=True)
        parts = trace.contributions()
        model.train()
    total = trace.positions[0] + trace.steps.sum(0)
    torch.testing.assert_close(total, trace.positions[-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(trace.positions[1:] - trace.positions[:-1], trace.steps[0::2] + trace.steps[1::2])
    # of some families the norm is computed in float32
    torch.testing.assert_close(trace.contexts, out.hidden_states[-1][0], rtol=1e-6, atol=1e-6)
    cap = getattr(model.config, "final_logit_softcapping", None)
    logit = parts.total if cap is None else cap * torch.tanh(parts.total / cap)
    expected = out.logits[0].gather(1, trace.targets()[:, None])[:, 0]
    torch.testing.assert_close(logit, expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.start + parts.steps.sum(0) + parts.bias, parts.total, rtol=1e-10, atol=1e-10)
    attention = parts.heads.sum((1, 3)) + parts.attention_bias
    torch.testing.assert_close(attention, parts.steps[0::2], rtol=1e-5, atol=1e-5)
    assert parts.heads.triu(1).abs().max() == 0
    assert trace.token_contrib().shape == (7, 7, 8)
    torch.testing.assert_close(trace.token_contrib().sum(-1), parts.by_token)
    along = trace.contributions(target="context")
    torch.testing.assert_close(along.start + along.steps.sum(0), trace.positions[-1].norm(dim=-1))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt_neox", {"use_parallel_residual": False}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
     ("phi", {"qk_layernorm": True})],
)  # fmt: skip
def test_variants_of_a_family_add_up(kind: str, settings: dict[str, Any]) -> None:
    model = tiny(kind, **settings)
    trace = EmbeddingWalk(model, Letters()).walk(TEXT)
    parts = trace.contributions()
    torch.testing.assert_close(trace.positions[1:] - trace.positions[:-1], trace.steps[0::2] + trace.steps[1::2])
    with torch.no_grad():
        expected = model(TEXT[None]).logits[0].gather(1, trace.targets()[:, None])[:, 0]
    torch.testing.assert_close(parts.total, expected, rtol=1e-6, atol=1e-6)
    attention = parts.heads.sum((1, 3)) + parts.attention_bias
    torch.testing.assert_close(attention, parts.steps[0::2], rtol=1e-6, atol=1e-6)


def test_an_adapter_walks_too() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config).double().eval()
    walker = EmbeddingWalk(model, Letters())
    parts = walker.walk(TEXT).contributions()
    attention = parts.heads.sum((1, 3)) + parts.attention_bias
    torch.testing.assert_close(attention, parts.steps[0::2], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        out = model(input_ids=TEXT[None], labels=TEXT[None])
        with ablate_association(model, "zero"):
            assert not torch.allclose(model(input_ids=TEXT[None]).logits, out.logits)
        assert torch.equal(model(input_ids=TEXT[None]).logits, out.logits)
    assert walker.path_logprob(IDS) == pytest.approx(-float(out.loss) * 6, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_model_that_breaks_is_left_as_it_was(kind: str) -> None:
    model = tiny(kind)
    model.train()
    walker, layer = EmbeddingWalk(model, Letters()), Access(model).layers[1]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("broken")

    calls = (
        walker.walk, walker.path, walker.path_logprob, walker.proximity, walker.next_tokens,
        lambda t: walker.reachable(t, 2), lambda t: walker.sample_paths(t, 2, 2), lambda t: walker.narrowing([t]),
        lambda t: walker.bigrams([t, t], least=1), lambda t: classify_ops(model, {"input_ids": t.repeat(2)[None, :11]}),
        lambda t: distance_profile(model, Letters(), [t]), lambda t: place_pattern(model, Letters(), [t]),
    )  # fmt: skip
    with untouched(model):
        layer.forward = broken
        try:
            for call in calls:
                with pytest.raises(OSError, match="broken"):
                    call(TEXT.repeat(2))
            with pytest.raises(OSError, match="broken"), ablate_association(model, "uniform"):
                model(TEXT[None])
        finally:
            del layer.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_add_up_to_their_rounding(dtype: torch.dtype) -> None:
    trace = EmbeddingWalk(tiny("llama", dtype), Letters()).walk(TEXT)
    last, total = trace.positions[-1], trace.positions[0] + trace.steps.sum(0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    assert (total - last).norm() <= tolerance * last.norm()


@pytest.mark.parametrize("make", [lambda: tiny("bert"), lambda: tiny("roberta"), mamba])
def test_encoders_and_mamba_walk_by_layer(make: Any) -> None:
    model = make()
    with untouched(model):
        trace = EmbeddingWalk(model, Letters()).walk(TEXT)
        with torch.no_grad():
            out = model(TEXT[None], output_hidden_states=True)
        torch.testing.assert_close(trace.contexts, out.hidden_states[-1][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(trace.positions[0] + trace.steps.sum(0), trace.positions[-1])
        with pytest.raises(TypeError, match="contributions need"):
            trace.contributions()


def test_encoders_have_no_paths() -> None:
    walker = EmbeddingWalk(tiny("bert"), Letters())
    for call in (walker.path, walker.path_logprob, walker.sample_paths, walker.proximity, walker.next_tokens):
        with pytest.raises(TypeError, match="causal"):
            call(TEXT)
    with pytest.raises(TypeError, match="causal"):
        walker.reachable(TEXT, 2)
    with pytest.raises(TypeError, match="causal"), ablate_association(tiny("roberta"), "uniform"):
        pass


@pytest.mark.parametrize("make", [*(lambda kind=kind: tiny(kind) for kind in ("gpt2", "llama", "gemma2")), mamba])
def test_paths_follow_the_chain_rule(make: Any) -> None:
    model = make()
    walker = EmbeddingWalk(model, Letters())
    with untouched(model), torch.no_grad():
        out = model(TEXT[None], labels=TEXT[None])
        found = walker.path_logprob(IDS)
        assert found == pytest.approx(-float(out.loss) * 6, rel=1e-5)
        last = float(out.logits[0, -2].double().log_softmax(-1)[IDS[-1]])
        assert found - walker.path_logprob(IDS[:-1]) == pytest.approx(last, rel=1e-5)
        assert walker.path_logprob(IDS, given=6) == pytest.approx(last, rel=1e-5)
        path = walker.path(IDS, k=40)
    torch.testing.assert_close(path.top_mass, torch.ones_like(path.top_mass))
    p = out.logits[0].double().softmax(-1)
    torch.testing.assert_close(path.entropies.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path.branching, path.entropies.exp())


@pytest.mark.parametrize("make", [*(lambda kind=kind: tiny(kind) for kind in ("gpt2", "llama", "qwen2")), mamba])
def test_the_tree_holds_all_that_is_reachable(make: Any) -> None:
    model = make()
    walker = EmbeddingWalk(model, Letters())
    with untouched(model):
        tree = walker.reachable(IDS[:3], 2, eps=2e-3, batch=4)
        plain = walker.reachable(IDS[:3], 2, eps=2e-3, use_cache=False)
    assert float(tree.probabilities.sum()) + tree.remainder == pytest.approx(1, abs=1e-6)
    assert set(tree.paths) == set(plain.paths)
    torch.testing.assert_close(tree.probabilities, plain.probabilities, rtol=1e-6, atol=1e-9)
    assert all(
        float(p) == pytest.approx(np.exp(walker.path_logprob([*IDS[:3], *tokens], 3)), rel=1e-5)
        for tokens, p in list(zip(tree.paths, tree.probabilities, strict=True))[:10]
    )
    # naively, every pair
    pairs = torch.cartesian_prod(torch.arange(40), torch.arange(40))
    with torch.no_grad():
        whole = torch.cat([TEXT[:3].expand(1600, -1), pairs], 1)
        logp = model(whole).logits.double().log_softmax(-1)
    joint = (logp[:, 2].gather(1, pairs[:, :1]) + logp[:, 3].gather(1, pairs[:, 1:])).exp()[:, 0]
    assert {tuple(p) for p in pairs[joint > 2e-3].tolist()} == set(tree.paths)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_samples_come_as_often_as_they_are_probable(kind: str) -> None:
    model = tiny(kind)
    walker = EmbeddingWalk(model, Letters())
    with untouched(model):
        drawn = walker.sample_paths(IDS, n=4000, length=1, seed=3)
        long = walker.sample_paths(IDS, n=3, length=4, seed=3)
    with torch.no_grad():
        p = model(TEXT[None]).logits[0, -1].softmax(-1)
    often = torch.bincount(drawn.ids[:, 0], minlength=40) / 4000
    # 5 standard errors, which fall as 1 / sqrt(N)
    assert ((often - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()
    for row in range(3):
        whole = torch.cat([TEXT, long.ids[row]])
        expected = walker.path(whole).logprobs[6:]
        torch.testing.assert_close(long.logprobs[row], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(long.contexts[row], walker.walk(whole).contexts[6:-1], rtol=1e-5, atol=1e-6)
    assert float(long.spread()[0]) == pytest.approx(1)


def test_temperature_and_cut_offs_shorten_the_step() -> None:
    walker = EmbeddingWalk(tiny("gpt2"), Letters())
    assert bool((walker.sample_paths(IDS, 5, 3, top_k=2).support == 2).all())
    few = walker.sample_paths(IDS, 5, 3, top_p=0.5)
    assert bool((few.support < 40).all())
    assert bool((few.drawn_logprobs >= few.logprobs - 1e-6).all())
    cold = walker.sample_paths(IDS, 5, 3, temperature=1e-3)
    assert len(cold.ids.unique(dim=0)) == 1
    for bad in ({"n": 0}, {"length": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"top_k": 0}):
        with pytest.raises(ValueError, match="must be"):
            walker.sample_paths(IDS, **bad)


def test_closeness_is_probability_for_the_dot_product_alone() -> None:
    for kind in ("llama", "gpt2", "gemma2", "phi"):
        found = EmbeddingWalk(tiny(kind), Letters()).proximity(TEXT)
        assert found["dot"].value == pytest.approx(1) if kind != "phi" else found["dot"].value < 1  # Phi's head: bias
        assert found["cosine"].value < 1
        assert abs(found["dot"].null_mean) < 0.2
        assert found["dot"].p_value == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["gemma2", "phi", "opt"])
def test_maps_and_narrowing(kind: str) -> None:
    model = tiny(kind)
    walker = EmbeddingWalk(model, Letters())
    found = walker.next_tokens(TEXT, k=3)
    with torch.no_grad():
        p = model(TEXT[None]).logits[0].double().softmax(-1).topk(3)
    assert torch.equal(found.ids, p.indices)
    torch.testing.assert_close(found.probabilities.double(), p.values, rtol=1e-5, atol=1e-7)
    assert found.token_points.shape == (7, 3, 2)
    assert len(found.plot().axes) == 2
    assert len(walker.walk(TEXT).plot(3).axes) == 1
    columns = walker.narrowing([TEXT, TEXT.flip(0)], [1, 7])
    torch.testing.assert_close(columns[:, 1], walker.narrowing([TEXT, TEXT.flip(0)])[:, 0])
    torch.testing.assert_close(columns[0, 0], walker.path([IDS[-1]]).entropies[0])
    started = walker.narrowing([TEXT], [1], start=3)
    torch.testing.assert_close(started[0, 0], walker.path([3, IDS[-1]]).entropies[-1])
    # dropout stays out of it
    model.train()
    assert torch.equal(walker.next_tokens(TEXT, k=3).probabilities, found.probabilities)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text"])
def test_the_lens_ends_at_the_model_itself(kind: str) -> None:
    trace = EmbeddingWalk(tiny(kind), Letters()).walk(TEXT)
    assert bool((trace.lens_ranks()[-1] == 1).all())
    assert torch.equal(trace.lens_ranks(places=[2, 5]), trace.lens_ranks()[:, [2, 5]])
    assert torch.equal(trace.lens_ranks(trace.targets(), [4]), trace.lens_ranks(trace.targets())[:, [4]])
    assert float(trace.distances()["context"][-1].max()) < 1e-5
    straight = trace.straightness()
    assert bool(((straight > 0) & (straight <= 1)).all())
    torch.testing.assert_close(trace.curvature().cos(), trace.cosines())
    assert sum(trace.shares().values()) == pytest.approx(1)
    assert trace.statistics(draws=3)["straightness"].null_mean < 0.8


def test_a_drift_that_all_tokens_share_beats_random_directions_alone() -> None:
    trace = EmbeddingWalk(tiny("llama"), Letters()).walk(TEXT)
    draw = torch.Generator().manual_seed(0)
    drift = torch.randn(4, 1, 16, generator=draw).double().abs()
    own = 0.5 * torch.randn(4, 7, 16, generator=draw).double()
    shared = replace(trace, steps=drift + own)
    assert shared.statistics(draws=19, null="directions")["straightness"].p_value == pytest.approx(0.05)
    assert shared.statistics(draws=19, null="tokens")["straightness"].p_value > 0.05
    # a direction of each token's own
    straight = replace(trace, steps=torch.randn(1, 7, 16, generator=draw).double() + own)
    assert straight.statistics(draws=19)["straightness"].p_value == pytest.approx(0.05)


@pytest.mark.parametrize("kind", ["llama", "phi", "gpt2"])
def test_counts_of_a_corpus(kind: str) -> None:
    walker = EmbeddingWalk(tiny(kind), Letters())
    drawn = list(walker.sample_paths([5], n=100, length=8, seed=1).ids)
    found = walker.bigrams(drawn, contexts=4, least=3, draws=9)
    assert set(found) == {"conditional", "pmi", "pmi, context"}
    # by hand
    pairs = [pair for row in drawn for pair in pairwise(row.tolist())]
    often, firsts = Counter(b for _, b in pairs), Counter(a for a, _ in pairs)
    seconds = sorted(token for token, n in often.items() if n >= 3)
    each = []
    for first in sorted(firsts, key=lambda token: (-firsts[token], token))[:4]:
        follows = Counter(b for a, b in pairs if a == first)
        with torch.no_grad():
            logits = walker.model(torch.tensor([[first]])).logits[0, 0, seconds]
        each.append(spearmanr([follows[b] for b in seconds], logits.numpy()).statistic)
    np.testing.assert_allclose(found["conditional"].each, each, atol=1e-5)
    assert found["conditional"].value == pytest.approx(np.mean(each), abs=1e-5)
    counts = walker.bigrams(drawn, contexts=4, least=3, draws=9, null="counts")
    assert counts["conditional"].value == found["conditional"].value
    # the corpus is the model's own, so that what follows a token is nearer to it than to others
    assert found["conditional"].excess > 0.1
    assert abs(counts["conditional"].null_mean) < 0.1
    with pytest.raises(ValueError, match="come second"):
        walker.bigrams([[3, 4]])


def test_what_frequency_explains_is_in_the_null_model() -> None:
    # a model that ignores what came before, and a corpus of draws from it
    model = tiny("llama")
    with torch.no_grad(), ablate_association(model, "zero"):
        for layer in Access(model).layers:
            layer.mlp.down_proj.weight.zero_()
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight[:1].expand(40, -1))
        walker = EmbeddingWalk(model, Letters())
        drawn = list(walker.sample_paths([5], n=300, length=10, temperature=0.3).ids)
        plain = walker.bigrams(drawn, contexts=4, draws=19, null="counts")["conditional"]
        held = walker.bigrams(drawn, contexts=4, draws=19)["conditional"]
    assert plain.excess > 0.2
    assert abs(held.excess) < 0.1


def _naive(model: Any, layer: int, rows: torch.Tensor) -> torch.Tensor:
    """What attention adds with given patterns (H, T, T), from the weights."""
    access = Access(model)
    with torch.no_grad(), captured(model, [layer], "input") as found:
        model(TEXT[None], use_cache=False)
    norm = access.attention_norm(layer)
    assert norm is not None
    x, w = norm(found[layer])[0], access.head_weights(layer)
    values = torch.einsum("td,hdk->htk", x, w.v) + w.v_bias[:, None]
    return torch.einsum("htj,hjk,hkd->td", rows, values, w.o) + w.o_bias


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("gpt2", "eager"), ("gemma2", "eager"), ("opt", "eager"), ("llama", "sdpa"), ("gpt_neox", "sdpa"),
     ("phi3", "sdpa")],
)  # fmt: skip
def test_replaced_attention_is_the_pattern_times_the_values(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention)
    access = Access(model)
    even = torch.ones(7, 7, dtype=torch.float64).tril()
    uniform = (even / even.sum(1, keepdim=True)).expand(4, 7, 7)
    found: list[torch.Tensor] = []
    with untouched(model), torch.no_grad():
        plain = model(TEXT[None]).logits
        with ablate_association(model, "none"):
            assert torch.equal(model(TEXT[None]).logits, plain)
        own = torch.cat(attention_patterns(model, input_ids=TEXT[None], use_cache=False))
        handle = access.output_projection(1).register_forward_hook(lambda m, a, out: found.append(out))
        for mode, pattern, rows in (
            ("uniform", None, uniform),
            ("identity", None, torch.eye(7, dtype=torch.float64).expand(4, 7, 7)),
            ("zero", None, torch.zeros(4, 7, 7, dtype=torch.float64)),
            ("position", torch.rand(2, 4, 9, dtype=torch.float64), None),
            ("fixed", own, own[1].double()),
        ):
            if rows is None:
                distance = (torch.arange(7)[:, None] - torch.arange(7)).clamp(min=0)
                assert pattern is not None
                rows = pattern[1][:, distance].tril()
                rows = rows / rows.sum(-1, keepdim=True)
            with ablate_association(model, mode, [1], pattern):
                logits = model(TEXT[None]).logits
            torch.testing.assert_close(found[-1][0].flatten(0, -2), _naive(model, 1, rows), rtol=1e-5, atol=1e-5)
            if mode == "fixed":
                torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert torch.equal(model(TEXT[None]).logits, plain)


def test_heads_nesting_padding_cache_and_exceptions() -> None:
    model = tiny("llama")
    with untouched(model), torch.no_grad():
        plain = model(TEXT[None]).logits
        with ablate_association(model, "uniform", {0: [0, 1, 2, 3]}):
            heads = model(TEXT[None]).logits
        with ablate_association(model, "zero", [0]), ablate_association(model, "uniform", [0]):
            nested = model(TEXT[None]).logits
        with ablate_association(model, "uniform", [0]):
            whole = model(TEXT[None]).logits
            padded = model(
                torch.cat([torch.zeros(2, dtype=torch.int64), TEXT])[None],
                attention_mask=torch.tensor([[0] * 2 + [1] * 7]),
                position_ids=torch.tensor([[0, 0, *range(7)]]),
            ).logits[:, 2:]
            cache = model(TEXT[None, :4], use_cache=True)
            rest = model(TEXT[None, 4:], past_key_values=cache.past_key_values).logits
        torch.testing.assert_close(heads, whole)
        torch.testing.assert_close(nested, whole)
        torch.testing.assert_close(padded, whole)
        torch.testing.assert_close(rest, whole[:, 4:])
        with pytest.raises(ZeroDivisionError), ablate_association(model, "uniform"):
            _ = 1 / 0
        assert torch.equal(model(TEXT[None]).logits, plain)


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gpt2", "eager"), ("opt", "sdpa")])
def test_places_count_from_the_first_token_in_every_cache(kind: str, attention: str) -> None:
    model = tiny(kind, attn_implementation=attention)
    draw = torch.Generator().manual_seed(0)
    table = torch.rand(2, 4, 12, generator=draw)
    padded = torch.cat([torch.zeros(2, dtype=torch.int64), TEXT])[None]
    mask, places = torch.tensor([[0] * 2 + [1] * 7]), torch.tensor([[0, 0, *range(7)]])
    for mode, pattern in (
        ("uniform", None), ("identity", None), ("position", table), ("fixed", torch.rand(2, 4, 12, 12, generator=draw)),
    ):  # fmt: skip
        with torch.no_grad(), ablate_association(model, mode, None, pattern):
            whole = model(TEXT[None]).logits
            # OPT counts places from the mask itself
            given = {} if kind == "opt" else {"position_ids": places}
            left = model(padded, attention_mask=mask, **given).logits[:, 2:]
            torch.testing.assert_close(left, whole)
            for cache in (transformers.DynamicCache(), transformers.StaticCache(model.config, max_cache_len=14)):
                parts = [
                    model(part, past_key_values=cache, use_cache=True).logits
                    for part in (TEXT[None, :4], TEXT[None, 4:5], TEXT[None, 5:])
                ]
                torch.testing.assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_replaced_attention_is_seen_by_walks_and_profiles(kind: str) -> None:
    model = tiny(kind, attn_implementation="eager" if kind == "gemma2" else "sdpa")
    even = torch.ones(7, 7, dtype=torch.float64).tril()
    walker = EmbeddingWalk(model, Letters())
    with untouched(model), torch.no_grad(), ablate_association(model, "uniform", {0: [0, 1, 2, 3], 1: [2]}):
        trace = walker.walk(TEXT)
        hidden = model(TEXT[None], output_hidden_states=True).hidden_states[-1][0]
        profile = distance_profile(model, Letters(), [IDS])
        torch.testing.assert_close(walker.path(TEXT).logprobs, walker.next_tokens(TEXT, 40).probabilities[:-1].gather(
            1, (walker.next_tokens(TEXT, 40).ids[:-1] == TEXT[1:, None]).int().argmax(1, keepdim=True)
        )[:, 0].log())  # fmt: skip
    torch.testing.assert_close(trace.contexts, hidden, rtol=1e-6, atol=1e-6)
    assert trace.patterns is not None
    rows = (even / even.sum(1, keepdim=True)).expand(4, 7, 7)
    torch.testing.assert_close(trace.patterns[0].double(), rows)
    torch.testing.assert_close(trace.patterns[1, 2].double(), rows[0])
    assert not torch.allclose(trace.patterns[1, 0].double(), rows[0])
    torch.testing.assert_close(profile[0, 0, 6], torch.tensor(1 / 7))
    parts = trace.contributions()
    attention = parts.heads.sum((1, 3)) + parts.attention_bias
    torch.testing.assert_close(attention, parts.steps[0::2], rtol=1e-5, atol=1e-5)


def test_blocks_may_overlap() -> None:
    model = tiny("llama")
    with untouched(model), torch.no_grad():
        plain = model(TEXT[None]).logits
        with ablate_association(model, "zero", [1]):
            second = model(TEXT[None]).logits
        with ExitStack() as later:
            with ExitStack() as sooner:
                sooner.enter_context(ablate_association(model, "uniform", [0]))
                later.enter_context(ablate_association(model, "zero", [1]))
            assert torch.equal(model(TEXT[None]).logits, second)
            with ablate_association(model, "uniform", [1]):
                assert not torch.equal(model(TEXT[None]).logits, second)
            assert torch.equal(model(TEXT[None]).logits, second)
        assert torch.equal(model(TEXT[None]).logits, plain)


def test_beam_search_takes_the_pattern_along() -> None:
    model, settings = tiny("qwen2"), {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with torch.no_grad(), ablate_association(model, "position", None, torch.rand(2, 4, 20)):
        found = [model.generate(TEXT[None], use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*found)


def test_a_fixed_pattern_is_refused_where_a_window_crops_the_cache() -> None:
    model = tiny("mistral", sliding_window=3)
    with torch.no_grad(), ablate_association(model, "fixed", None, torch.rand(2, 4, 9, 9)):
        cache = model(TEXT[None, :5], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="use_cache=False"):
            model(TEXT[None, 5:6], past_key_values=cache)


def test_a_window_is_kept() -> None:
    model = tiny("mistral", sliding_window=3)
    seen = torch.ones(7, 7, dtype=torch.float64).tril().triu(-2)
    found: list[torch.Tensor] = []
    handle = Access(model).output_projection(1).register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad(), ablate_association(model, "uniform", [1]):
        model(TEXT[None])
    handle.remove()
    rows = (seen / seen.sum(1, keepdim=True)).expand(4, 7, 7)
    torch.testing.assert_close(found[0][0], _naive(model, 1, rows), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_a_replaced_layer() -> None:
    model = tiny("llama")
    with ablate_association(model, "uniform"):
        model(TEXT[None], labels=TEXT[None]).loss.backward()
    attention: Any = Access(model).attention(0)
    assert float(attention.v_proj.weight.grad.abs().sum()) > 0
    assert attention.q_proj.weight.grad is None or float(attention.q_proj.weight.grad.abs().sum()) == 0


def test_profiles_are_averages_of_patterns() -> None:
    model, text = tiny("gpt2"), "abcdefg"
    ids = torch.tensor(Letters()(text)["input_ids"])
    own = torch.cat(attention_patterns(model, input_ids=ids[None]))
    profile, places = distance_profile(model, Letters(), [text]), place_pattern(model, Letters(), [text])
    torch.testing.assert_close(places, own.float())
    torch.testing.assert_close(profile[1, 2, 3], own[1, 2].diagonal(-3).mean().float())


@pytest.mark.usefixtures("without_shape_checks")
def test_wrong_input_is_told() -> None:
    model = tiny("llama")
    walker = EmbeddingWalk(model, Letters())
    with untouched(model):
        with pytest.raises(TypeError, match="got Linear"):
            EmbeddingWalk(nn.Linear(2, 2), Letters())
        with pytest.raises(TypeError, match="tokenizer"):
            EmbeddingWalk(model, None)
        for bad in ([], [40], [-1], list(range(33))):
            with pytest.raises(ValueError, match="text must have"):
                walker.walk(bad)
        with pytest.raises(TypeError, match="token ids"):
            walker.walk([0.5])
        with pytest.raises(ValueError, match="given"):
            walker.path_logprob(IDS, 9)
        with pytest.raises(ValueError, match="eps"):
            walker.reachable(IDS, 2, 0.0)
        with pytest.raises(ValueError, match="lengths"):
            walker.narrowing([IDS], [9])
        with pytest.raises(ValueError, match="tokens must be"):
            walker.walk(IDS).contributions(torch.tensor([1]))
        with pytest.raises(ValueError, match="tokens must be"):
            walker.walk(IDS).lens_ranks(torch.full((7,), 40))
        with pytest.raises(ValueError, match="places must be"):
            walker.walk(IDS).lens_ranks(places=[7])
        for words in (None, ["a"], [[1], [2, 3]]):
            with pytest.raises(TypeError, match="string or token ids"):
                walker.walk(words)
        # one text in the place of several would be read letter by letter
        for call in (walker.narrowing, walker.bigrams, lambda text: place_pattern(model, Letters(), text)):
            with pytest.raises(TypeError, match="several texts"):
                call("abc")
        for settings in ({"length": 27}, {"n": 2.5}, {"temperature": float("inf")}):
            with pytest.raises((ValueError, TypeError), match="must"):
                walker.sample_paths(IDS, **settings)
        with pytest.raises(ValueError, match="positions"):
            walker.reachable(IDS, 27)
        for call in (walker.walk(IDS).statistics, lambda null: walker.bigrams([IDS], null=null)):
            with pytest.raises(ValueError, match="null must be"):
                call(null="rubbish")
        for k in (0, 41):
            with pytest.raises(ValueError, match="k must be"):
                walker.next_tokens(IDS, k)
        for layers, pattern in (("a", None), (1, None), (None, [[1.0]])):
            mode: Any = "uniform" if pattern is None else "position"
            with pytest.raises(TypeError, match="must be"), ablate_association(model, mode, layers, pattern):  # type: ignore[arg-type]
                pass
        for mode, layers, pattern, message in (
            ("rubbish", None, None, "mode"), ("uniform", [2], None, "layer"), ("uniform", {0: [4]}, None, "heads"),
            ("position", None, None, "pattern"), ("position", None, torch.rand(2, 3, 9), "pattern"),
            ("position", None, -torch.rand(2, 4, 9), "negative"), ("uniform", None, torch.rand(2, 4, 9), "pattern"),
            ("position", None, torch.full((2, 4, 9), torch.inf), "finite"),
            ("fixed", None, torch.rand(2, 4, 9, 5), "pattern must be"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message), ablate_association(model, mode, layers, pattern):
                pass
        with (
            pytest.raises(ValueError, match="covers 3"),
            ablate_association(model, "position", None, torch.rand(2, 4, 3)),
        ):
            model(TEXT[None])


class Mixer(nn.Module):
    """MLP-Mixer's step over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(7, 10), nn.GELU(), nn.Linear(10, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.act(self.first(x.mT))).mT


class Fourier(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft2(x).real


class Causal(nn.Module):
    """A convolution padded on both sides and cut off on the right, and a gate, as in Mamba's mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(4, 4, 3, padding=2, groups=4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.mT)[..., : x.shape[1]].mT * self.gate(x).sigmoid()


class Convolution(nn.Module):
    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.mT).mT


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        (nn.Linear(4, 4), {"": "filter"}),
        (nn.LayerNorm(4), {"": "filter"}),
        (nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4)), {"0": "filter", "1": "filter", "2": "filter"}),
        (Convolution(3), {"conv": "aggregate"}),
        (Convolution(1), {"conv": "filter"}),
        (Causal(), {"conv": "aggregate", "gate": "filter"}),
        (Fourier(), {"": "aggregate"}),
        (nn.LSTM(4, 4, batch_first=True), {"": "data-dependent aggregate"}),
    ],
)
def test_operations(module: nn.Module, kinds: dict[str, str]) -> None:
    torch.manual_seed(0)
    assert {op.name: op.kind for op in classify_ops(module.double(), torch.randn(2, 7, 4).double())} == kinds


def test_operations_of_a_mixer() -> None:
    torch.manual_seed(0)
    found = {op.name: op.kind for op in classify_ops(Mixer().double(), torch.randn(2, 7, 4).double())}
    assert found["first"] == "aggregate"
    assert "" not in found


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_operations_of_a_transformer(kind: str) -> None:
    model = tiny(kind)
    ids = torch.randint(3, 40, (1, 11), generator=torch.Generator().manual_seed(0))
    with untouched(model):
        found = classify_ops(model, {"input_ids": ids})
    mixing = {op.name for op in found if "aggregate" in op.kind}
    attention = {name for name, module in model.named_modules() if module in map(Access(model).attention, (0, 1))}
    assert mixing == attention
    assert {op.kind for op in found if op.name in mixing} == {"data-dependent aggregate"}
    # 2 products of T x T x D a layer, twice as many operations, in every implementation of attention
    assert {op.flops for op in found if op.name in mixing} == {2 * 2 * 11 * 11 * 16}
    total = shares(found)
    assert sum(row["parameters"] for row in total.values()) == pytest.approx(1)
    tied = {id(p): p.numel() for p in model.parameters()}
    assert sum(op.parameters for op in found) >= 0.9 * sum(tied.values())


def test_operations_of_mamba() -> None:
    model = mamba()
    with untouched(model):
        found = {op.name: op.kind for op in classify_ops(model, {"input_ids": torch.tensor([IDS])})}
    assert found["backbone.layers.0.mixer"] == "data-dependent aggregate"
    assert found["backbone.layers.0.mixer.in_proj"] == "filter"


def test_the_axis_of_tokens_must_be_plain() -> None:
    with pytest.raises(ValueError, match="no other axis"):
        classify_ops(nn.Linear(4, 4), torch.randn(2, 4, 4))


def _planted() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(12, 10))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((800, 12))
    for row in codes:
        row[rng.choice(12, 2, replace=False)] = rng.normal(size=2) + rng.choice([-1, 1], 2)
    return codes @ atoms, atoms


def test_a_planted_dictionary_is_found() -> None:
    x, atoms = _planted()
    space = ConceptSpace(12, sparsity=2, max_iter=40, n_init=4).fit(x)
    assert np.abs(atoms @ space.components_.T).max(1).min() > 0.95
    assert space.score(x) > 0.98
    codes = space.transform(x)
    np.testing.assert_allclose(space.inverse_transform(codes), codes @ space.components_ + x.mean(0))
    best = space.top_tokens(3)
    assert best.shape == (12, 3)
    assert (np.take_along_axis(codes, best.T, 0)[0] == codes.max(0)).all()


def test_matching_pursuit_is_scikit_learns() -> None:
    from sklearn.decomposition import sparse_encode

    x, _ = _planted()
    x = x[:50] + 0.1 * np.random.default_rng(1).normal(size=(50, 10))
    space = ConceptSpace(12, sparsity=3).fit(x)
    expected = sparse_encode(x - x.mean(0), space.components_, algorithm="omp", n_nonzero_coefs=3)
    np.testing.assert_allclose(space.transform(x), expected, atol=1e-6)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("method", ["dictionary", "nmf", "ica"])
def test_concept_space_is_an_estimator(method: str) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(ConceptSpace(n_concepts=1, method=method, max_iter=2, sparsity=1))


def test_null_models() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=draw).double() @ torch.randn(4, 4, generator=draw).double() + 3
    other = gaussian_like(x, draw)
    torch.testing.assert_close(other.mean(0), x.mean(0))
    torch.testing.assert_close(other.T.cov(), x.T.cov())
    stretched = x * torch.linspace(0.1, 5, 50)[:, None].double()
    alike = gaussian_of_lengths(stretched, draw)
    lengths = (stretched - stretched.mean(0)).norm(dim=1)
    torch.testing.assert_close((alike - stretched.mean(0)).norm(dim=1), lengths)
    mixed = shuffled_dimensions(x, draw)
    torch.testing.assert_close(mixed.sort(0).values, x.sort(0).values)
    turn = rotation(4, draw)
    torch.testing.assert_close(turn @ turn.T, torch.eye(4).double())


def test_p_values_of_gaussian_vectors_are_uniform() -> None:
    p = []
    for seed in range(32):
        x = np.random.default_rng(seed).normal(size=(24, 3))
        p.append(ConceptSpace(6, sparsity=1, max_iter=2).null_test(x, "gaussian", draws=3, seed=seed).p_value)
    # four values equally probable: counts of each within 4 standard deviations
    counts = np.bincount(np.round(np.array(p) * 4).astype(int), minlength=5)[1:]
    assert counts.sum() == 32
    assert np.abs(counts - 8).max() <= 4 * np.sqrt(32 * 0.25 * 0.75)
    x, _ = _planted()
    assert ConceptSpace(12, sparsity=2, max_iter=5).null_test(x[:200], draws=4).p_value == pytest.approx(0.2)


def test_lengths_alone_are_no_concepts() -> None:
    draw = torch.Generator().manual_seed(0)
    # Gaussian directions, a few of which are long
    x = torch.randn(150, 6, generator=draw).double() * torch.exp(1.5 * torch.randn(150, 1, generator=draw)).double()
    space = ConceptSpace(12, sparsity=1, max_iter=3)
    assert space.null_test(x.numpy(), "gaussian", draws=9, held_out=0).p_value == pytest.approx(0.1)
    assert space.null_test(x.numpy(), "lengths", draws=9, held_out=0).p_value > 0.1
    planted, _ = _planted()
    assert ConceptSpace(12, sparsity=2, max_iter=8).null_test(planted[:300], "lengths").p_value == pytest.approx(0.1)
    for bad in (-0.1, 1.0, 0.999):
        with pytest.raises(ValueError, match="held_out"):
            space.null_test(x.numpy(), held_out=bad)
    with pytest.raises(ValueError, match="finite"):
        space.null_test(np.full((4, 2), np.nan))


def test_codes_solve_the_least_squares_of_their_atoms() -> None:
    draw = torch.Generator().manual_seed(0)
    x, atoms = torch.randn(20, 6, generator=draw).double(), torch.randn(15, 6, generator=draw).double()
    atoms = nn.functional.normalize(atoms, dim=1)
    for row, codes in zip(x, sparse_codes(x, atoms, 3), strict=True):
        chosen = codes.nonzero()[:, 0]
        expected = torch.linalg.lstsq(atoms[chosen].T, row[:, None]).solution[:, 0]
        torch.testing.assert_close(codes[chosen], expected, rtol=1e-6, atol=1e-8)


def test_statistics_of_vectors() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 8, generator=draw).double()
    groups = noise * 0.1 + torch.eye(8).double()[torch.arange(40) % 4]
    labels = [i % 4 for i in range(40)]
    found = neighbour_purity(groups, labels)
    assert found.value == 1
    assert found.p_value == pytest.approx(0.01)
    turn = rotation(8, draw)
    assert neighbour_purity(groups @ turn, labels).value == 1
    before, after = anisotropy(groups, draws=2)["mean cosine"], anisotropy(groups @ turn, draws=2)["mean cosine"]
    assert before.value == pytest.approx(after.value)
    assert anisotropy(groups + 5, draws=2)["mean cosine"].value > 0.9
    assert abs(anisotropy(groups + 5, centred=True, draws=2)["mean cosine"].value) < 0.1
    assert anisotropy(groups, removed=3, draws=2)["effective rank"].value < 8
    assert axis_privilege(torch.randn(200, 8, generator=draw).double() ** 3).p_value == pytest.approx(0.05)
    a, offset = noise[:10], torch.ones(8).double()
    pairs = torch.cat([a, a + 3 * offset])
    quads = torch.tensor([[i, 10 + i, (i + 1) % 10, 10 + (i + 1) % 10] for i in range(10)])
    assert analogy_accuracy(pairs, quads, draws=9).excess > 0.3
    whole = 0.7 * noise[:20] + 0.2 * noise[20:]
    for statistic in (axis_privilege, anisotropy, lambda v: neighbour_purity(v, [0, 1])):
        with pytest.raises(ValueError, match="finite"):
            statistic(torch.full((2, 3), float("nan")))
    assert compositionality(whole, noise[:20], noise[20:], draws=9).value == pytest.approx(1)


def test_a_batch_is_not_needed_for_the_same_answer() -> None:
    # the walk of a text alone is what the model says to it among others
    model, given = tiny("llama"), inputs()
    trace = EmbeddingWalk(model, Letters()).walk(given["input_ids"][1])
    with torch.no_grad():
        out = model(**given, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(trace.contexts, out[1], rtol=1e-6, atol=1e-6)
    assert SMALL["vocab_size"] == 40
