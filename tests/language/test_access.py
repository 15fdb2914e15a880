"""Access to the insides of language models: nine families, tiny and random, and two real ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.language.models import BIDIRECTIONAL, CONFIGS, inputs, tiny
from torchgraft import zoo
from torchgraft.language._access import (
    FAMILIES,
    Access,
    attention_patterns,
    captured,
    edited,
    final_logits,
    residual_stream,
    resumed,
)


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("kind", CONFIGS)
def test_heads_add_up_to_the_attention(kind: str) -> None:
    model, given = tiny(kind), inputs()
    access = Access(model)
    with torch.no_grad(), captured(model, [1], "input") as before:
        patterns = attention_patterns(model, **given)
    x = before[1]
    norm = access.attention_norm(1)
    x = x if norm is None else norm(x)
    w = access.head_weights(1)
    values = torch.einsum("btd,hde->bhte", x, w.v) + w.v_bias[:, None]
    expected = torch.einsum("bhqk,bhke,hed->bqd", patterns[1], values, w.o) + w.o_bias
    found: list[torch.Tensor] = []
    handle = access.output_projection(1).register_forward_hook(lambda m, a, out: found.append(out))
    with torch.no_grad():
        model(**given)
    handle.remove()
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)  # softmax of some is in float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_queries_and_keys_make_the_pattern(kind: str) -> None:
    model, given = tiny(kind), inputs()
    access = Access(model)
    with torch.no_grad(), captured(model, [0], "input") as before:
        pattern = attention_patterns(model, **given)[0]
    norm = access.attention_norm(0)
    x = before[0] if norm is None else norm(before[0])
    w = access.head_weights(0)
    q = torch.einsum("btd,hde->bhte", x, w.q) + w.q_bias[:, None]
    k = torch.einsum("btd,hde->bhte", x, w.k) + w.k_bias[:, None]
    if not access.family.rotary:
        scores = q @ k.mT / math.sqrt(access.head_dim)
        if kind not in BIDIRECTIONAL:
            scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        torch.testing.assert_close(pattern, scores.softmax(-1), rtol=1e-5, atol=1e-7)
    elif access.family.fused != "no":
        # a turn changes scores but no norm: the fused layout is checked on what the module itself projects
        fused = access.attention(0).get_submodule(access.family.projections[0])(x)
        if access.family.fused == "heads":
            own_q, own_k, _ = fused.unflatten(2, (4, 3, 4)).unbind(3)
        else:
            own_q, own_k = fused[..., :16].unflatten(2, (4, 4)), fused[..., 16:24].unflatten(2, (2, 4))
            own_k = own_k.repeat_interleave(2, 2)
        torch.testing.assert_close(q, own_q.transpose(1, 2))
        torch.testing.assert_close(k, own_k.transpose(1, 2))
    else:
        own = access.attention(0).get_submodule("k_proj")(x).unflatten(2, (-1, 4)).transpose(1, 2)
        torch.testing.assert_close(k, own.repeat_interleave(4 // own.shape[1], 1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_stream_and_what_is_added(kind: str) -> None:
    model, given = tiny(kind), inputs()
    with torch.no_grad(), captured(model, site="attention") as attention, captured(model, site="mlp") as mlp:
        stream = residual_stream(model, **given)
    published = model(**given, output_hidden_states=True)
    assert len(stream) == 3
    torch.testing.assert_close(stream[1], published.hidden_states[1])
    if kind in BIDIRECTIONAL:
        torch.testing.assert_close(stream[2], published.hidden_states[2])
    else:
        for layer in range(2):
            added = attention[layer] + mlp[layer].reshape(2, 7, -1)
            torch.testing.assert_close(stream[layer + 1], stream[layer] + added)
        torch.testing.assert_close(final_logits(model, stream[2]), published.logits)


@pytest.mark.parametrize("kind", CONFIGS)
def test_resumed_from_the_middle(kind: str) -> None:
    model, given = tiny(kind), inputs()
    plain, stream = model(**given).logits, residual_stream(model, **given)
    calls: list[int] = []
    handle = Access(model).attention(0).register_forward_hook(lambda *a: calls.append(1))
    with resumed(model, 1, stream[1]):
        torch.testing.assert_close(model(**given, use_cache=False).logits, plain, rtol=0, atol=0)
    assert not calls
    torch.testing.assert_close(model(**given).logits, plain, rtol=0, atol=0)
    handle.remove()
    assert calls


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("site", ["input", "output", "attention", "mlp"])
def test_edits_reach_the_answer_and_leave(kind: str, site: Any) -> None:
    model, given = tiny(kind), inputs()
    plain = model(**given).logits
    with edited(model, {-1: lambda h: h.clone()}, site):
        torch.testing.assert_close(model(**given).logits, plain, rtol=0, atol=0)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(2)).double()
    with edited(model, {-1: lambda h: h + direction}, site):
        assert (model(**given).logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(model(**given).logits, plain, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_after_an_exception(without_shape_checks: None) -> None:
    model, given = tiny("llama"), inputs()

    def fails(h: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), edited(model, {0: fails}):
        model(**given)
    with pytest.raises(ValueError, match="edit of layer 0 must return"), edited(model, {0: lambda h: h[:1]}):
        model(**given)
    with pytest.raises(ValueError, match=r"layer must be in -2\.\.1, got 5"), edited(model, {0: fails, 5: fails}):
        pass
    with pytest.raises(ValueError, match="site must be"), edited(model, {0: fails}, "nowhere"):  # type: ignore[arg-type]
        pass
    with pytest.raises(TypeError, match="whole number"):
        Access(model).layer("1")  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_compiled_models_are_edited_too(without_shape_checks: None) -> None:
    model, given = tiny("gpt2", torch.float32), inputs()
    compiled: Any = torch.compile(model, backend="eager")
    plain = compiled(**given).logits
    stream = residual_stream(compiled, **given)
    torch.testing.assert_close(stream[1], residual_stream(model, **given)[1])
    push = torch.randn(16, generator=torch.Generator().manual_seed(2))  # a norm would take a constant away
    with edited(compiled, {0: lambda h: h + push}, "attention"):
        assert (compiled(**given).logits - plain).abs().max() > 1e-3
    with resumed(compiled, 1, stream[1] + push):
        assert (compiled(**given, use_cache=False).logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(compiled(**given).logits, plain)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"one of gpt2, .* got Linear"):
        Access(nn.Linear(2, 2))
    t5 = transformers.T5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=1, vocab_size=10)
    with pytest.raises(TypeError, match="got T5ForConditionalGeneration of type 't5'"):
        Access(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(TypeError, match="opt-350m"):
        Access(tiny("opt", do_layer_norm_before=False))


def test_attention_implementation_is_put_back() -> None:
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="input_ids"):
        attention_patterns(model)
    assert model.config._attn_implementation == "sdpa"
    assert attention_patterns(model, **inputs())[0].shape == (2, 4, 7, 7)
    assert model.config._attn_implementation == "sdpa"


def test_through_peft() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    plain = residual_stream(model, **inputs())
    weights = Access(model).head_weights(0).v
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"])).double()
    torch.testing.assert_close(residual_stream(wrapped, **inputs())[2], plain[2])
    torch.testing.assert_close(Access(wrapped).head_weights(0).v, weights)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_adapters_are_in_the_weights(kind: str) -> None:
    peft = pytest.importorskip("peft")
    names = {
        "llama": ["v_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"]
    }[kind]  # fmt: skip
    config = peft.LoraConfig(
        target_modules=names, init_lora_weights=False, fan_in_fan_out=kind == "gpt2", modules_to_save=None
    )
    before = Access(tiny(kind)).head_weights(1)
    model = peft.get_peft_model(tiny(kind), config).double()
    found = Access(model).head_weights(1)
    assert (found.v - before.v).abs().max() > 1e-3
    assert (found.o - before.o).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(Access(model).head_weights(1).o, before.o)
    model.merge_adapter()
    torch.testing.assert_close(Access(model).head_weights(1).o, found.o)
    torch.testing.assert_close(Access(model.merge_and_unload()).head_weights(1).v, found.v)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_adapters_must_be_merged(settings: dict[str, bool]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("phi"), peft.LoraConfig(target_modules=["v_proj"], **settings))
    with pytest.raises(TypeError, match="plain LoRA"):
        Access(model).head_weights(0)
    scaled = peft.get_peft_model(tiny("llama"), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    with pytest.raises(TypeError, match="must be LoRA or merged"):
        Access(scaled).head_weights(0)


def test_resumed_leaves_what_others_put_in_the_place_of_forward() -> None:
    model, given = tiny("llama"), inputs()
    stream = residual_stream(model, **given)
    first: Any = Access(model).layer(0)
    calls: list[int] = []
    own = first.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    first.forward = counted
    with resumed(model, 1, stream[1]):
        model(**given, use_cache=False)
    assert not calls
    model(**given)
    assert calls == [1]


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "minilm"])
def test_real_models(name: str) -> None:
    try:
        model, tokenizer = zoo.load(name)
    except zoo.ModelNotFoundError as error:
        pytest.skip(str(error))
    given = tokenizer(["The capital of France is", "a"], return_tensors="pt", padding=True)
    with torch.no_grad():
        stream = residual_stream(model, **given)
        published = model(**given, output_hidden_states=True)
    torch.testing.assert_close(stream[3], published.hidden_states[3])
