import pytest
import torch
import transformers
from torch import nn

from torchgraft.layers.flowformer import FlowAttention, register_flow_attention
from torchgraft.ops.flow_attention import flow_attention

# Outputs of Flow_Attention(3, 4, 2, n_heads=2) and Flow_Attention_Causal(3, 4, 2, n_heads=2) of Flow_Attention.py,
# thuml/Flowformer at 61f5d8c83907955a8bc226af03b81b59b2724c8f, in eval mode, with the weights and input of `_official`.
OFFICIAL = {
    False: [[1.533194, -0.465152], [1.428033, -0.427198], [1.477513, -0.435223], [1.554254, -0.500419]],
    True: [[0.946778, 0.025697], [1.268148, -0.268113], [1.412871, -0.378125], [1.523699, -0.482343]],
}


def _official(module):
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float32) * 0.7 + len(name)).view_as(p))
    return torch.cos(torch.arange(12, dtype=torch.float32) * 1.3).view(1, 4, 3)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_official_layer(causal):
    layer = FlowAttention(4, 2, d_input=3, d_output=2, causal=causal).eval()
    x = _official(layer)
    torch.testing.assert_close(layer(x)[0], torch.tensor(OFFICIAL[causal]), atol=1e-5, rtol=0)


def test_official_names_and_round_trip(tmp_path):
    from safetensors.torch import load_file, save_file

    layer = FlowAttention(8, 2)
    names = {f"{n}_projection.{p}" for n in ("query", "key", "value", "out") for p in ("weight", "bias")}
    assert set(layer.state_dict()) == names
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = FlowAttention(8, 2)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(2, 6, 8)
    assert torch.equal(layer.eval()(x), other.eval()(x))


def test_cross_attention_and_padding_equal_each_sample_alone():
    layer = FlowAttention(8, 2).eval().double()
    x, y = torch.randn(2, 5, 8).double(), torch.randn(2, 7, 8).double()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    together = layer(x, y, key_padding_mask=padding)
    torch.testing.assert_close(together[1:], layer(x[1:], y[1:, :4]))
    torch.testing.assert_close(together[:1], layer(x[:1], y[:1]))


def test_cross_attention_of_equal_lengths_keeps_its_queries():
    layer = FlowAttention(8, 2).eval().double()
    x, y = torch.randn(2, 7, 8).double(), torch.randn(2, 7, 8).double()
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    torch.testing.assert_close(layer(x, y, key_padding_mask=padding)[1:], layer(x[1:], y[1:, :4]))
    # the call of the official code, three times the same tensor, is self-attention
    own = layer(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(own[1:, :4], layer(x[1:, :4]))


def test_dropout_falls_on_the_output():
    layer = FlowAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 50, 8)
    share = (layer(x) == 0).float().mean()
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    layer = FlowAttention(8, 2).to(dtype)
    assert layer(torch.randn(1, 4, 8, dtype=dtype)).dtype == dtype


def test_settings_are_checked_when_the_layer_is_made(without_shape_checks):
    with pytest.raises(ValueError, match="num_heads must divide"):
        FlowAttention(10, 3)
    with pytest.raises(ValueError, match="'sigmoid', 'relu' or 'elu'"):
        FlowAttention(8, 2, feature_map="exp")
    with pytest.raises(ValueError, match="low < high"):
        FlowAttention(8, 2, clamp=(1.0, -1.0))


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
DECODER = SMALL | dict(vocab_size=50, use_cache=False)
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, use_cache=False)
    ),
    "llama-grouped": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, num_key_value_heads=2)),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)),
}


def build(name):
    torch.manual_seed(0)
    register_flow_attention()
    return MODELS[name]().eval()


def output(model, **inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_models_take_it(name):
    model = build(name)
    inputs = (
        dict(pixel_values=torch.randn(2, 3, 16, 16)) if name == "vit" else dict(input_ids=torch.arange(20).view(2, 10))
    )
    before = output(model, **inputs)
    model.set_attn_implementation("flow")
    after = output(model, **inputs)
    assert after.shape == before.shape
    assert not torch.allclose(before, after, atol=1e-4)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(output(model, **inputs), before)


def test_inside_bert_it_is_flow_attention_of_the_projections():
    model = build("bert")
    model.set_attn_implementation("flow")
    attention = model.encoder.layer[0].attention.self
    x = torch.randn(2, 6, 32)

    def heads(y):
        return y.view(2, 6, 4, 8).transpose(1, 2)

    expected = flow_attention(heads(attention.query(x)), heads(attention.key(x)), heads(attention.value(x)))
    got = attention(x)[0]
    torch.testing.assert_close(got, expected.transpose(1, 2).reshape(2, 6, 32))


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped"])
def test_decoders_stay_causal(name):
    model = build(name)
    model.set_attn_implementation("flow")
    ids = torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 8:] = 3
    a, b = output(model, input_ids=ids), output(model, input_ids=changed)
    assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.allclose(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-grouped"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_transformers_equals_each_sample_alone(name, side):
    model = build(name)
    model.set_attn_implementation("flow")
    short = torch.tensor([[7, 8, 9, 10]])
    pad = torch.zeros(1, 3, dtype=torch.long)
    ids = torch.cat([pad, short] if side == "left" else [short, pad], dim=1)
    mask = torch.cat([pad, torch.ones_like(short)] if side == "left" else [torch.ones_like(short), pad], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = torch.cat([ids, torch.arange(20, 27)[None]])
    everything = torch.cat([mask, torch.ones_like(mask)])
    where = torch.cat([positions, torch.arange(7)[None]])
    together = output(model, input_ids=batch, attention_mask=everything, position_ids=where)
    torch.testing.assert_close(together[:1][mask.bool()], output(model, input_ids=short)[0], atol=1e-5, rtol=1e-5)


def test_cross_attention_in_transformers_keeps_its_queries():
    register_flow_attention()
    ids, memory, mask = torch.arange(6)[None], torch.randn(1, 6, 32), torch.tensor([[1, 1, 1, 1, 0, 0]])
    decoders = [
        transformers.BertModel(transformers.BertConfig(**DECODER, is_decoder=True, add_cross_attention=True)),
        transformers.GPT2Model(
            transformers.GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=50, add_cross_attention=True, use_cache=False
            )
        ),
    ]
    for model in decoders:
        model.eval().set_attn_implementation("flow")
        padded = output(model, input_ids=ids, encoder_hidden_states=memory, encoder_attention_mask=mask)
        cut = output(
            model,
            input_ids=ids,
            encoder_hidden_states=memory[:, :4],
            encoder_attention_mask=torch.ones_like(mask[:, :4]),
        )
        torch.testing.assert_close(padded, cut, atol=1e-5, rtol=1e-5)
    bart = transformers.BartModel(
        transformers.BartConfig(
            vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, use_cache=False,
        )
    ).eval()  # fmt: skip
    bart.set_attn_implementation("flow")
    padded = output(bart, input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    cut = output(bart, input_ids=ids[:, :4], decoder_input_ids=ids)
    torch.testing.assert_close(padded, cut, atol=1e-5, rtol=1e-5)


def test_packed_sequences_are_refused_rather_than_mixed():
    model = build("llama-grouped")
    model.set_attn_implementation("flow")
    with pytest.raises(ValueError, match="packed into a row"):
        output(model, input_ids=torch.arange(6)[None], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_a_mask_longer_than_the_keys_is_refused():
    model = build("llama-grouped")
    model.set_attn_implementation("flow")
    with pytest.raises(ValueError, match="each of the 5 keys, got 8"):
        output(model, input_ids=torch.arange(5)[None], attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))


def test_training_under_flow_lowers_the_loss():
    model = build("llama-grouped").train()
    model.set_attn_implementation("flow")
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_sliding_windows_are_refused():
    register_flow_attention()
    config = transformers.MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=4)
    model = transformers.MistralForCausalLM(config).eval()
    model.set_attn_implementation("flow")
    with pytest.raises(ValueError, match="sliding window"):
        output(model, input_ids=torch.arange(10)[None])


def test_a_cache_is_refused_rather_than_wrong():
    model = build("llama-grouped")
    model.set_attn_implementation("flow")
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False, use_cache=True)
    done = model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False, use_cache=False)
    assert done.shape == (1, 8)


def test_masks_that_are_not_padding_are_refused():
    model = build("bert")
    model.set_attn_implementation("flow")
    with pytest.raises(ValueError, match="only padding"):
        output(model, input_ids=torch.arange(5)[None], attention_mask=torch.zeros(1, 1, 5, 5))


def test_it_is_a_module_like_any_other():
    assert isinstance(FlowAttention(8, 2), nn.Module)
    assert "num_heads=2" in repr(FlowAttention(8, 2))
