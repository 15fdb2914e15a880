import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from torchgraft.layers import flowformer
from torchgraft.layers.flowformer import (
    FlowAttention,
    FlowCache,
    FlowformerConfig,
    FlowformerForCausalLM,
    FlowformerForSequenceClassification,
    register_flow_attention,
)

# Logits and loss of FlowFormer_GPT (flowformergpt/model.py, thuml/Flowformer at
# 61f5d8c83907955a8bc226af03b81b59b2724c8f) with n_layer=2, n_head=2, n_embd=4, vocab_size=5, block_size=6 in eval mode,
# the weights of `_official`, ids 0 3 1 4 2 2 and targets 3 1 4 2 2 -1.
OFFICIAL_LOSS = 2.8973965644836426
OFFICIAL = [
    [2.534945, -2.174985, 1.563696, -0.77171, -0.109447],
    [2.575466, -2.139351, 1.456024, -0.604442, -0.316983],
    [2.496637, -2.143396, 1.542475, -0.76331, -0.104056],
    [2.483632, -2.130888, 1.53191, -0.755908, -0.107439],
    [2.424404, -2.098528, 1.530157, -0.784965, -0.050931],
    [2.552712, -2.184229, 1.563348, -0.761811, -0.127754],
]


def config(**changes):
    small = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=40)
    return FlowformerConfig(**(small | dict(pad_token_id=0, eos_token_id=None, bos_token_id=1) | changes))


def language_model(**changes):
    torch.manual_seed(0)
    model = FlowformerForCausalLM(config(initializer_range=0.6, **changes)).eval()
    # loud positions, so that greedy decoding does not sit on one token
    torch.nn.init.normal_(model.transformer.wpe.weight, std=3)
    return model


def _official(model):
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float32) * 0.7 + len(name)).view_as(p))


def test_logits_and_loss_are_the_official_gpts():
    model = FlowformerForCausalLM(
        config(vocab_size=5, hidden_size=4, max_position_embeddings=6, pad_token_id=None, bos_token_id=None)
    ).eval()
    _official(model)
    ids = torch.tensor([[0, 3, 1, 4, 2, 2]])
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits[0], torch.tensor(OFFICIAL), atol=1e-5, rtol=0)
    assert out.loss.item() == pytest.approx(OFFICIAL_LOSS, abs=1e-5)


def test_a_layer_goes_on_from_a_prompt():
    layer = FlowAttention(8, 2, causal=True).eval().double()
    x = torch.randn(2, 9, 8).double()
    whole = layer(x)
    y, state = layer.prefill(x[:, :4])
    torch.testing.assert_close(y, whole[:, :4])
    for t in range(4, 9):
        y, state = layer.step(x[:, t], state)
        torch.testing.assert_close(y, whole[:, t])
    with pytest.raises(ValueError, match="causal=True"):
        FlowAttention(8, 2).step(x[:, 0].float(), state)


def test_cached_steps_equal_the_whole_and_the_cache_does_not_grow():
    model = language_model()
    ids = torch.arange(2, 26).view(2, 12)
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :5], use_cache=True)
    torch.testing.assert_close(out.logits, whole[:, :5], atol=1e-5, rtol=1e-5)
    before = out.past_key_values.nbytes()
    for t in range(5, 8):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        torch.testing.assert_close(out.logits[:, 0], whole[:, t], atol=1e-5, rtol=1e-5)
    out = model(ids[:, 8:], past_key_values=out.past_key_values)
    torch.testing.assert_close(out.logits, whole[:, 8:], atol=1e-5, rtol=1e-5)
    assert out.past_key_values.nbytes() == before
    assert out.past_key_values.get_seq_length() == 12


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache_agrees(beams):
    model = language_model()
    ids = torch.tensor([[3, 7, 11, 2]])
    how = dict(max_new_tokens=12, do_sample=False, num_beams=beams)
    cached = model.generate(ids, use_cache=True, **how)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **how))
    assert cached.shape == (1, 16)
    assert len(set(cached[0, 4:].tolist())) > 1


def test_a_second_turn_goes_on_from_the_cache():
    model = language_model()
    first = model.generate(torch.tensor([[3, 7, 11, 2]]), max_new_tokens=5, return_dict_in_generate=True)
    whole = torch.cat([first.sequences, torch.tensor([[8, 9]])], 1)
    name = "cache" if "cache" in first else "past_key_values"
    with_cache = model.generate(whole, max_new_tokens=6, **{name: first[name]})
    assert torch.equal(with_cache, model.generate(whole, max_new_tokens=6, use_cache=False))


def test_left_padded_generation_equals_one_by_one():
    model = language_model()
    long, short = torch.tensor([[3, 7, 11, 2, 9]]), torch.tensor([[5, 6, 8]])
    batch = torch.cat([long, torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    how = dict(max_new_tokens=8, do_sample=False)
    together = model.generate(batch, attention_mask=mask, **how)
    assert torch.equal(together[:1, 5:], model.generate(long, **how)[:, 5:])
    assert torch.equal(together[1:, 5:], model.generate(short, **how)[:, 3:])
    sampled = model.generate(long, do_sample=True, max_new_tokens=5, num_return_sequences=3)
    assert sampled.shape == (3, 10)


@pytest.mark.parametrize("auto", [True, False])
def test_save_and_load(tmp_path, auto):
    model = language_model(clamp=None)
    model.save_pretrained(tmp_path)
    again = (AutoModelForCausalLM if auto else FlowformerForCausalLM).from_pretrained(tmp_path)
    assert type(again) is FlowformerForCausalLM
    assert again.config.clamp is None
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_fresh_weights_are_scaled_as_gpt2s():
    torch.manual_seed(0)
    model = FlowformerForCausalLM(config(hidden_size=128))
    block = model.transformer.h[0]
    assert block.attn.query_projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp["c_proj"].weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)
    assert block.attn.out_projection.bias.abs().max() == 0
    assert model.lm_head.weight is not model.transformer.wte.weight
    tied = FlowformerForCausalLM(config(tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.transformer.wte.weight


def test_it_learns_to_copy_what_repeats():
    torch.manual_seed(0)
    model = FlowformerForCausalLM(config(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)).train()
    ids = torch.arange(2, 12).repeat(2)[None].repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = last = None
    for _ in range(30):
        last = model(ids, labels=ids).loss
        first = last.item() if first is None else first
        last.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert last.item() < first / 5


def test_classification_ignores_padding_and_round_trips(tmp_path):
    torch.manual_seed(0)
    model = FlowformerForSequenceClassification(config(num_labels=3)).eval()
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 0, 0]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    out = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3)
    assert torch.isfinite(out.loss)
    torch.testing.assert_close(out.logits[1:], model(ids[1:, :3]).logits, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, out.logits)
    # bidirectional: the first position sees the last
    hidden = model.transformer(ids[:1]).last_hidden_state
    changed = model.transformer(torch.tensor([[4, 5, 6, 7, 20]])).last_hidden_state
    assert not torch.allclose(hidden[0, 0], changed[0, 0])


def test_bfloat16():
    model = language_model().to(torch.bfloat16)
    out = model(torch.arange(10)[None], use_cache=True)
    assert out.logits.dtype == torch.bfloat16
    assert torch.isfinite(out.logits).all()
    # sums are kept wide
    assert out.past_key_values.states[0].memory.dtype == torch.float32


def test_wrong_inputs_say_what_would_work(without_shape_checks):
    model = language_model()
    with pytest.raises(ValueError, match="max_position_embeddings is 40"):
        model(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="FlowCache, got DynamicCache"):
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 1, 3, 3))
    for asked in (model, FlowformerForSequenceClassification(config())):
        with pytest.raises(ValueError, match=r"\(batch, length\) = \(1, 3\), .* got \(1, 5\)"):
            asked(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(torch.zeros(1, 3, dtype=torch.long), labels=torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="num_attention_heads must divide"):
        FlowformerConfig(hidden_size=10, num_attention_heads=3)
    cache = model(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    assert isinstance(cache, FlowCache)
    mask = torch.tensor([[1, 1, 1, 0]])
    with pytest.raises(ValueError, match="padding after a cache"):
        model(torch.zeros(1, 1, dtype=torch.long), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="the shape that state was made for"):
        model(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flowformer.nothing  # noqa: B018


def test_softmax_weights_under_flow_are_warned_of(tmp_path):
    register_flow_attention()
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=30)
    transformers.BertModel(transformers.BertConfig(**small)).save_pretrained(tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="flow").eval()
    with pytest.warns(UserWarning, match="trained further with flow attention"):
        model(torch.arange(5)[None])


def test_hidden_states_are_those_of_the_blocks():
    model, ids = language_model(), torch.arange(2, 14).view(2, 6)
    out = model(ids, output_hidden_states=True)
    assert [h.shape for h in out.hidden_states] == [(2, 6, 16)] * 3
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    without = model(ids, use_cache=False, output_hidden_states=True)
    for a, b in zip(out.hidden_states, without.hidden_states, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    last = model.transformer.ln_f(model.transformer.h[1](without.hidden_states[1], None))
    torch.testing.assert_close(last, without.hidden_states[2])
    classifier = FlowformerForSequenceClassification(config(output_hidden_states=True)).eval()
    assert len(classifier(ids).hidden_states) == 3
    assert len(classifier(ids, return_dict=False)) == 2


def test_gradient_checkpointing_changes_no_gradient():
    model = language_model(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    ids = torch.arange(2, 14).view(2, 6)

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    # transformers 5.24 renamed it
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert any(getattr(block, "gradient_checkpointing", False) for block in model.transformer.h)
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_cannot_be_given_is_refused():
    model = language_model()
    with pytest.raises(ValueError, match="never forms an attention matrix"):
        model(torch.arange(2, 6)[None], output_attentions=True)
    with pytest.raises(ValueError, match="at least one token"):
        model(torch.zeros(2, 0, dtype=torch.long))
