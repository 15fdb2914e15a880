"""The family as models of transformers, and in place of attention."""

import pytest
import torch

from torchgraft.layers.state_space import (
    FAMILIES,
    SSMConfig,
    SSMForCausalLM,
    SSMForForecasting,
    SSMForImageClassification,
    SSMForSequenceClassification,
    replace_attention,
)
from torchgraft.surgery import NothingMatchedError

SETTINGS = {
    "attention": {"heads": 2}, "window_attention": {"heads": 2, "window": 3}, "spade": {"heads": 2, "window": 3},
    "mamba2": {"head_dim": 4}, "retnet": {"heads": 2}, "gateloop": {"heads": 2},
}  # fmt: skip


def config(*pattern, **changes):
    torch.manual_seed(0)
    return SSMConfig(
        vocab_size=20, hidden_size=8, pattern=pattern, l_max=32, layer_settings=SETTINGS,
        **{"num_hidden_layers": 2, **changes},
    )  # fmt: skip


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(1, 20, (2, 7))


@torch.no_grad()
def test_saved_and_loaded_models_are_the_same(tmp_path, ids):
    causal = [name for name in FAMILIES if name != "hgrn"]
    for pattern in ([*causal, "hgrn"], ["hgrn", "mamba"]):
        model = SSMForCausalLM(config(*pattern, num_hidden_layers=len(pattern), expand=2, num_experts=2)).eval()
        model.save_pretrained(tmp_path)
        again = SSMForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert again.config.pattern == list(pattern)


def test_decoding_with_states_equals_decoding_without(ids):
    model = SSMForCausalLM(config("mamba", "attention", "s4d", num_hidden_layers=3)).eval()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_states = model.generate(ids, **settings)
    assert torch.equal(with_states, model.generate(ids, use_cache=False, **settings))
    alone = model.generate(ids[:1, 3:], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(alone[0, 4:], with_states[0, 7:])
    assert model.generate(ids, num_beams=2, **settings).shape[0] == 2


def test_losses_fall_and_padding_does_not_count(ids):
    model = SSMForCausalLM(config("mamba2", "lru"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for pooling in ("mean", "last"):
        classifier = SSMForSequenceClassification(
            config("s5", pooling=pooling, num_labels=3, bidirectional=True)
        ).eval()
        padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.long)], 1)
        mask = torch.arange(9).expand(2, -1) < 7
        assert torch.allclose(classifier(padded, mask).logits, classifier(ids).logits, atol=1e-5)
        assert classifier(ids, labels=torch.tensor([0, 2])).loss.isfinite()


@pytest.mark.parametrize("inverted", [False, True])
def test_forecasts_move_with_their_series(inverted):
    made = config("s4d", context_length=16, prediction_length=5, patch_length=4, inverted=inverted,
                  bidirectional=inverted)  # fmt: skip
    model, series = SSMForForecasting(made).eval(), torch.randn(2, 16, 3)
    forecast = model(series)
    assert forecast.shape == (2, 5, 3)
    assert torch.allclose(model(3 * series + 7), 3 * forecast + 7, atol=1e-3)
    if not inverted:
        assert torch.allclose(model(series[..., 1:2]), forecast[..., 1:2], atol=1e-5)
    with pytest.raises(ValueError, match="16"):
        model(series[:, 1:])


def test_images_of_any_size_are_classified():
    model = SSMForImageClassification(config("mamba", num_labels=4, directions=2)).eval()
    assert model(torch.randn(2, 3, 16, 12)).logits.shape == (2, 4)
    assert model(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 3])).loss.isfinite()


def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, max_position_embeddings=64, **small)).eval()


def encoder():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 20}
    return BertModel(BertConfig(num_hidden_layers=2, max_position_embeddings=64, **small)).eval()


def test_attention_of_a_decoder_is_replaced_and_put_back(ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20)).eval()
    for model in (decoder(), gpt):
        want = model(ids).logits
        report = replace_attention(model, "mamba", layers=[-1])
        assert len(report.replaced) == 1
        logits = model(ids, use_cache=False).logits
        changed = ids.clone()
        changed[:, -1] = 3
        assert torch.allclose(model(changed, use_cache=False).logits[:, :-1], logits[:, :-1], atol=1e-5)
        with pytest.raises(ValueError, match="use_cache=False"):
            model(ids, use_cache=True)
        report.undo()
        assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("kind", [encoder, decoder])
def test_padding_is_honoured_where_attention_was(kind, ids):
    model = kind()
    replace_attention(model, "lru", d_state=4)
    padded = torch.cat([ids, torch.zeros(2, 2, dtype=torch.long)], 1)
    mask = (torch.arange(9).expand(2, -1) < 7).long()
    extra = {} if kind is encoder else {"use_cache": False}
    whole, alone = model(padded, attention_mask=mask, **extra)[0], model(ids, **extra)[0]
    assert torch.allclose(whole[:, :7], alone, atol=1e-5)


def test_what_cannot_be_replaced_is_said():
    model = decoder()
    with pytest.raises(ValueError, match="within the 2 attention layers"):
        replace_attention(model, "s4d", layers=[2])
    with pytest.raises(ValueError, match="decoder"):
        replace_attention(model, "s4d", bidirectional=True)
    with pytest.raises(ValueError, match="residual"):
        replace_attention(model, "mega")
    with pytest.raises(ValueError, match="hidden_size"):
        replace_attention(torch.nn.Linear(2, 2), "s4d")
    ours = SSMForCausalLM(config("mamba"))
    with pytest.raises(NothingMatchedError):
        replace_attention(ours, "s4d")
    with pytest.raises(ValueError, match="pattern must name families"):
        config("s6")
    with pytest.raises(ValueError, match="causal"):
        SSMForCausalLM(config("s4d", bidirectional=True))
