import math
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from torchgraft.vision.position_prediction import (
    MP3Config,
    MP3ForPreTraining,
    adapt,
    plot_position_map,
    position_confusion,
    position_leak,
    restore,
    sample_context,
)

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def vit(cls=transformers.ViTModel, **more):
    kind = transformers.DeiTConfig if cls is transformers.DeiTModel else transformers.ViTConfig
    return cls(kind(**SMALL, image_size=16, patch_size=4, **more))


def ast(**more):
    strides = dict(patch_size=4, frequency_stride=4, time_stride=4) | more
    return transformers.ASTModel(transformers.ASTConfig(**SMALL, max_length=16, num_mel_bins=8, **strides))


def words(kind="bert"):
    if kind == "bert":
        config = transformers.BertConfig(**SMALL, **NO_DROPOUT, vocab_size=30, max_position_embeddings=12)
        return transformers.BertModel(config)
    config = transformers.RobertaConfig(
        **SMALL, **NO_DROPOUT, vocab_size=30, max_position_embeddings=14, pad_token_id=1
    )
    return transformers.RobertaModel(config)


def waves(cls=transformers.Wav2Vec2Model, stable=False, **more):
    kind = transformers.HubertConfig if cls is transformers.HubertModel else transformers.Wav2Vec2Config
    off = dict(hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, activation_dropout=0.0, layerdrop=0.0)
    norm = dict(do_stable_layer_norm=stable, feat_extract_norm="layer" if stable else "group")
    conv = dict(conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(4, 2))
    positions = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return cls(kind(**(SMALL | off | norm | conv | positions | more)))


def plain(batch_first=True, norm_first=False, norm=None, dropout=0.0):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)


# name: (model, its input, positions to be told)
FAMILIES = {
    "vit": (vit, lambda: {"pixel_values": torch.rand(3, 3, 16, 16)}, None),
    "deit": (lambda: vit(transformers.DeiTModel), lambda: {"pixel_values": torch.rand(3, 3, 16, 16)}, None),
    "ast": (ast, lambda: {"input_values": torch.rand(3, 16, 8)}, None),
    "bert": (words, lambda: {"input_ids": torch.randint(2, 30, (3, 12))}, None),
    "roberta": (lambda: words("roberta"), lambda: {"input_ids": torch.randint(2, 30, (3, 12))}, None),
    "wav2vec2": (waves, lambda: {"input_values": torch.randn(3, 80)}, 10),
    "hubert": (
        lambda: waves(transformers.HubertModel, stable=True), lambda: {"input_values": torch.randn(3, 80)}, 10,
    ),
    "plain": (plain, lambda: {"inputs_embeds": torch.randn(3, 10, 16)}, 10),
    "plain, sequence first": (
        lambda: plain(False, True, nn.LayerNorm(16)), lambda: {"inputs_embeds": torch.randn(3, 10, 16)}, 10,
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


def pretraining(family, config=None):
    make, inputs, positions = FAMILIES[family]
    return MP3ForPreTraining(make(), config, positions), inputs()


def tokens_of(model, inputs):
    (name, value), *_ = inputs.items()
    return value if name == "inputs_embeds" else model.encoder.embed(value).detach()


def attend(q, k, v, heads):
    """Textbook attention of (N, D) queries to (M, D) keys."""
    out = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        out.append((a @ b.T / math.sqrt(a.shape[1])).softmax(1) @ c)
    return torch.cat(out, 1)


def naive_vit(model, tokens, context):
    """Section 3 of the paper for one example: all ask, the context answers, in each layer anew."""
    h = tokens
    for layer in model.layers:
        x, a = layer.layernorm_before(h), layer.attention
        answer = x[context]
        h = h + a.o_proj(attend(a.q_proj(x), a.k_proj(answer), a.v_proj(answer), 2))
        h = h + layer.mlp(layer.layernorm_after(h))
    return model.layernorm(h)


def test_the_formula_in_float64():
    model = MP3ForPreTraining(vit().double()).eval()
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    out = model(x, generator=torch.Generator().manual_seed(1))
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(3, 16, -1)
    projection = model.encoder.model.embeddings.patch_embeddings.projection
    tokens = patches @ projection.weight.flatten(1).T + projection.bias
    for b in range(3):
        logits = naive_vit(model.encoder.model, tokens[b], out.context_mask[b]) @ model.head.weight.T
        torch.testing.assert_close(out.logits[b], logits)
    picked = out.logits.log_softmax(-1).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(out.loss, -picked.mean())
    torch.testing.assert_close(out.accuracy.item(), (out.logits.argmax(-1) == torch.arange(16)).float().mean().item())
    masked = MP3ForPreTraining(model.encoder, MP3Config(loss_on="masked"))
    masked.head.weight = model.head.weight
    again = masked(x, context_mask=out.context_mask)
    torch.testing.assert_close(again.loss, -picked[~out.context_mask].mean())


def test_gathered_keys_equal_masked_keys_and_so_do_gradients():
    gathered, masked = vit().double(), vit().double()
    masked.load_state_dict(gathered.state_dict())
    x, context = torch.rand(4, 3, 16, 16, dtype=torch.float64), sample_context(16, 4, 0.75)
    encoder = adapt(gathered)
    a = encoder(encoder.embed(x), context)
    h = masked.embeddings.patch_embeddings(x)
    for layer in masked.layers:
        h = layer(h, context[:, None, None].expand(-1, 1, 16, -1))
    b = masked.layernorm(h)
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for (name, p), q in zip(gathered.named_parameters(), masked.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None, name
        else:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


@every_family
def test_rows_with_different_numbers_of_context_tokens(family):
    model, inputs = pretraining(family)
    tokens, N = tokens_of(model, inputs), model.encoder.num_positions
    context = torch.arange(N) < torch.tensor([[2], [N], [5]])
    context = torch.stack([row[torch.randperm(N)] for row in context])
    encoder = model.encoder.eval()
    together = encoder(tokens, context)
    alone = torch.cat([encoder(tokens[i : i + 1], context[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@every_family
def test_the_encoder_sees_no_position(family):
    model, inputs = pretraining(family)
    model.eval()
    tokens, N = tokens_of(model, inputs), model.encoder.num_positions
    context, order = sample_context(N, 3), torch.randperm(N)
    logits = model(inputs_embeds=tokens, context_mask=context).logits
    moved = model(inputs_embeds=tokens[:, order], context_mask=context[:, order]).logits
    torch.testing.assert_close(moved, logits[:, order], atol=1e-5, rtol=1e-4)
    assert position_leak(model, **inputs) < 1e-5
    # all of that would hold for constant logits too
    assert logits.std(1).max() > 1e-4


@every_family
def test_only_context_is_read(family):
    model, inputs = pretraining(family)
    encoder = model.encoder.eval()
    tokens, N = tokens_of(model, inputs), encoder.num_positions
    context = sample_context(N, 3)
    before = encoder(tokens, context)
    for row in range(3):
        inside, outside = context[row].nonzero()[0, 0], (~context[row]).nonzero()[0, 0]
        for token, expected in ((outside, 1), (inside, N)):
            other = tokens.clone()
            other[row, token] = torch.randn(tokens.shape[-1]) * 3
            changed = (encoder(other, context) - before).abs().amax(-1) > 1e-6
            assert changed[row, token]
            assert changed.sum() == expected


def test_without_masking_it_is_the_plain_model_without_positions():
    with_positions = vit(**NO_DROPOUT).eval()
    model = MP3ForPreTraining(with_positions, MP3Config(masking_ratio=0)).eval()
    x = torch.rand(2, 3, 16, 16)
    ours = model.encoder(model.encoder.embed(x), model(x).context_mask)
    assert model(x).context_mask.all()
    h = with_positions.embeddings.patch_embeddings(x)
    for layer in restore(model, "none").layers:
        h = layer(h)
    torch.testing.assert_close(ours, with_positions.layernorm(h))


@every_family
def test_loss_begins_at_chance_and_falls(family):
    model, inputs = pretraining(family)
    first = model(**inputs).loss
    assert first.item() == pytest.approx(math.log(model.encoder.num_positions), abs=0.2)
    learnable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnable, 1e-2)
    for _ in range(5):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in learnable)
        optimizer.step()
    assert loss < first - 0.02


class Leaky(nn.Module):
    """Content with a position embedding left on, in front of the head."""

    def __init__(self, model):
        super().__init__()
        self.model, self.table = model, nn.Parameter(torch.randn(16, 16) * 0.02)

    def forward(self, tokens):
        return self.model(inputs_embeds=tokens + self.table)


def test_constant_content_stays_at_chance_unless_position_leaks():
    x = torch.rand(4, 3, 1, 1).expand(-1, -1, 16, 16)
    results = {}
    for leak in (False, True):
        model = MP3ForPreTraining(vit())
        trained = Leaky(model) if leak else model
        optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], 2e-2)
        for _ in range(20):
            out = trained(model.encoder.embed(x)) if leak else trained(x)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            if not leak:
                assert out.loss > math.log(16) - 1e-4
        results[leak] = out.accuracy.item()
        if not leak:
            assert position_leak(model, pixel_values=x) < 1e-4
    assert results[False] <= 2 / 16
    assert results[True] > 0.9


def test_the_leak_is_seen():
    class Padded(nn.Module):
        """Patches by a convolution with zero padding: the border is darker."""

        def __init__(self):
            super().__init__()
            self.projection = nn.Conv2d(3, 16, 4, 4, padding=1)
            self.image_size, self.patch_size = (16, 16), (4, 4)

        def forward(self, x):
            return self.projection(x).flatten(2).mT

    backbone = vit()
    backbone.embeddings.patch_embeddings = Padded()
    with pytest.warns(UserWarning, match="marks the border"):
        model = MP3ForPreTraining(backbone)
    assert position_leak(model, pixel_values=torch.rand(2, 3, 16, 16) + 1) > 1e-3
    assert model.training


def test_identical_tokens_get_identical_logits():
    model, inputs = pretraining("vit")
    tokens = tokens_of(model, inputs)
    tokens[:, 7] = tokens[:, 2]
    logits = model.eval()(inputs_embeds=tokens).logits
    torch.testing.assert_close(logits[:, 7], logits[:, 2])


@pytest.mark.parametrize(("n", "ratio"), [(16, 0.5), (49, 0.5), (196, 0.75), (10, 0.3), (5, 0.0)])
def test_context_has_its_size_and_follows_the_generator(n, ratio):
    draw = sample_context(n, 32, ratio, torch.Generator().manual_seed(3))
    assert draw.dtype == torch.bool
    assert draw.sum(1).tolist() == [round((1 - ratio) * n)] * 32
    assert torch.equal(draw, sample_context(n, 32, ratio, torch.Generator().manual_seed(3)))
    assert ratio == 0 or len({tuple(row.tolist()) for row in draw}) > 5


def test_context_is_uniform():
    rate = sample_context(8, 8000, 0.75).double().mean(0)
    # four standard errors
    torch.testing.assert_close(rate, torch.full((8,), 0.25, dtype=torch.float64), atol=0.02, rtol=0)


def test_padding_is_in_neither_context_nor_loss():
    model, inputs = pretraining("bert")
    model.eval()
    ids, mask = inputs["input_ids"], torch.arange(12) < torch.tensor([[12], [7], [4]])
    context = sample_context(12, 3, 0.5, attention_mask=mask)
    assert context.sum(1).tolist() == [6, 4, 2]
    assert not (context & ~mask).any()
    out = model(input_ids=ids, attention_mask=mask.long(), context_mask=context)
    other = model(input_ids=torch.where(mask, ids, 3), attention_mask=mask.long(), context_mask=context)
    torch.testing.assert_close(out.loss, other.loss)
    places = torch.arange(12).expand(3, -1)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[mask], places[mask]))
    short = model(input_ids=ids[1:2, :7], context_mask=context[1:2, :7])
    torch.testing.assert_close(short.logits[0], out.logits[1, :7], atol=1e-5, rtol=1e-4)
    # drawn inside
    drawn = model(input_ids=ids, attention_mask=mask.long(), generator=torch.Generator().manual_seed(0)).context_mask
    assert drawn.sum(1).tolist() == [6, 4, 2]
    assert not (drawn & ~mask).any()


def test_padding_of_waves_is_counted_in_frames():
    model, inputs = pretraining("wav2vec2")
    samples = torch.arange(80) < torch.tensor([[80], [48], [24]])
    out = model(**inputs, attention_mask=samples.long())
    assert out.context_mask.sum(1).tolist() == [5, 3, 2]
    assert not out.context_mask[2, 3:].any()


HEADS = {
    "vit": (transformers.ViTForImageClassification, "vit", lambda: vit().config),
    "deit": (transformers.DeiTForImageClassification, "deit", lambda: vit(transformers.DeiTModel).config),
    "ast": (transformers.ASTForAudioClassification, "audio_spectrogram_transformer", lambda: ast().config),
    "bert": (transformers.BertForSequenceClassification, "bert", lambda: words().config),
    "roberta": (transformers.RobertaForSequenceClassification, "roberta", lambda: words("roberta").config),
    "wav2vec2": (transformers.Wav2Vec2ForSequenceClassification, "wav2vec2", lambda: waves().config),
    "hubert": (
        transformers.HubertForSequenceClassification, "hubert",
        lambda: waves(transformers.HubertModel, stable=True).config,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", HEADS)
def test_the_ordinary_class_comes_back(family, tmp_path):
    kind, attribute, config = HEADS[family]
    classifier = kind(config())
    for name, parameter in classifier.named_parameters():
        # some families begin with zeros, and nothing would change
        if "position_embeddings" in name:
            nn.init.normal_(parameter)
    names, gradients = list(classifier.state_dict()), {n: p.requires_grad for n, p in classifier.named_parameters()}
    before = classifier.config._attn_implementation
    model = MP3ForPreTraining(getattr(classifier, attribute), None, FAMILIES[family][2])
    inputs = FAMILIES[family][1]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    weights = {k: v.clone() for k, v in classifier.state_dict().items()}
    assert restore(model) is getattr(classifier, attribute)
    assert list(classifier.state_dict()) == names
    assert classifier.config._attn_implementation == before
    assert {n: p.requires_grad for n, p in classifier.named_parameters()} == gradients
    changed = {n for n, v in classifier.state_dict().items() if not torch.equal(v, weights[n])}
    assert changed
    assert all("pos" in n for n in changed)
    classifier.eval().save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, classifier(**inputs).logits)
    with pytest.raises(RuntimeError, match="restored"):
        model(**inputs)
    # and the new position embedding learns
    classifier.train()(**inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    table = next(p for n, p in classifier.named_parameters() if n in changed)
    assert table.grad.abs().max() > 0


def test_kinds_of_position_embedding():
    for how in ("zeros", "random", "sincos", "none"):
        table = restore(adapt(vit()), how).embeddings.position_embeddings
        assert table.requires_grad == (how in ("zeros", "random"))
        assert not table[:, 0].any()
        if how in ("zeros", "none"):
            assert not table.any()
        if how == "random":
            assert 0.01 < table[:, 1:].std() < 0.03
        if how == "sincos":
            angle = 2 * 10_000 ** (-torch.arange(4) / 4)
            # patch 11 of a grid of 4 x 4 stands in row 2, column 3
            expected = torch.cat([angle.sin(), angle.cos(), (1.5 * angle).sin(), (1.5 * angle).cos()])
            torch.testing.assert_close(table[0, 1 + 11], expected)
    roberta = restore(adapt(words("roberta")), "sincos").embeddings.position_embeddings.weight
    assert not roberta[:2].any()
    torch.testing.assert_close(roberta[2, 8:], torch.ones(8))
    # without positions, the order of patches cannot matter
    bare = restore(adapt(vit(**NO_DROPOUT)), "none").eval()
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(bare(x).pooler_output, bare(x.roll(4, 3)).pooler_output)
    wave = restore(adapt(waves(), 10), "none").eval()
    assert not wave.encoder.pos_conv_embed(torch.randn(1, 10, 16)).any()


def test_smoothing_spreads_the_target_on_the_grid():
    encoder = adapt(vit().double())
    model = MP3ForPreTraining(encoder, MP3Config(smoothing_sigma=1.5))
    out = model(torch.rand(2, 3, 16, 16, dtype=torch.float64))
    expected = 0.0
    for i in range(16):
        distance = torch.tensor([(i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2 for j in range(16)])
        target = torch.exp(-distance / 1.5**2).double()
        expected -= (out.logits[:, i].log_softmax(-1) * target / target.sum()).sum(-1).mean() / 16
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)
    sharp = MP3ForPreTraining(encoder, MP3Config(smoothing_sigma=1e-3))
    sharp.head = model.head
    hard = MP3ForPreTraining(encoder)
    hard.head = model.head
    x, context = torch.rand(2, 3, 16, 16, dtype=torch.float64), sample_context(16, 2)
    torch.testing.assert_close(sharp(x, context_mask=context).loss, hard(x, context_mask=context).loss)


@every_family
def test_bfloat16_and_state(family):
    model, inputs = pretraining(family)
    half = {k: v.bfloat16() if k == "inputs_embeds" else v for k, v in inputs.items()}
    out = model.bfloat16()(**half)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.loss.isfinite()
    fresh, _ = pretraining(family)
    fresh.bfloat16().load_state_dict(model.state_dict())
    same = fresh.eval()(**half, context_mask=out.context_mask).logits
    torch.testing.assert_close(same, model.eval()(**half, context_mask=out.context_mask).logits)


def test_gradcheck():
    layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, norm_first=True, activation="gelu")
    model = MP3ForPreTraining(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double(), None, 5)
    x, context = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True), sample_context(5, 2)
    assert torch.autograd.gradcheck(lambda t: model(inputs_embeds=t, context_mask=context).loss, x)


def test_gradient_checkpointing_uses_the_same_context():
    backbone = vit(**NO_DROPOUT)
    model = MP3ForPreTraining(backbone).train()
    x, context = torch.rand(2, 3, 16, 16), sample_context(16, 2)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            backbone.gradient_checkpointing_enable()
        model.zero_grad()
        model(x, context_mask=context).loss.backward()
        found.append(backbone.layers[0].attention.k_proj.weight.grad.clone())
    torch.testing.assert_close(*found)


def test_the_trainer_takes_it(tmp_path):
    model, _ = pretraining("vit")
    data = [{"pixel_values": torch.rand(3, 16, 16)} for _ in range(8)]
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    before = model.head.weight.clone()
    trainer = transformers.Trainer(model, options, train_dataset=data)
    trainer.train()
    assert not torch.equal(before, model.head.weight)


def test_confusion():
    logits = torch.full((2, 6, 6), -20.0)
    for token, told in enumerate([0, 1, 2, 3, 4, 2]):
        logits[:, token, told] = 20.0
    found = position_confusion(logits, (2, 3))
    assert found.top1 == pytest.approx(5 / 6)
    # position 5 is row 1, column 2; it was told as row 0, column 2
    assert found.grid_error == pytest.approx(1 / 6, abs=1e-5)
    assert found.matrix[5].argmax() == 2
    torch.testing.assert_close(found.expected_positions()[5], torch.tensor([0.0, 2.0]))
    assert position_confusion(torch.zeros(1, 6, 6), (6,)).grid_error == pytest.approx(35 / 18)
    part = position_confusion(logits, (2, 3), torch.arange(6).expand(2, -1) > 3)
    assert part.top1 == 0.5
    assert part.matrix[0].isnan().all()
    import matplotlib

    matplotlib.use("Agg")
    assert plot_position_map(found).get_xlabel() == "column"
    with pytest.raises(ValueError, match="9 positions"):
        position_confusion(logits, (3, 3))


def test_leaks_are_warned_about():
    with pytest.warns(UserWarning, match="overlap at a stride"):
        adapt(ast(frequency_stride=2))
    with pytest.warns(UserWarning, match="share samples"):
        adapt(waves(conv_kernel=(6, 2)), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(ast())
        adapt(waves(), 10)


def test_models_that_cannot_be_adapted(without_shape_checks):
    swin = transformers.SwinConfig(embed_dim=8, depths=[1], num_heads=[2], image_size=16, window_size=2)
    with pytest.raises(TypeError, match="rotary or relative"):
        adapt(transformers.SwinModel(swin))
    with pytest.raises(TypeError, match=r"pass its backbone, model\.vit"):
        adapt(transformers.ViTForImageClassification(vit().config))
    decoder = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=9, is_decoder=True))
    with pytest.raises(ValueError, match="causal mask"):
        adapt(decoder)
    for make in (waves, plain):
        with pytest.raises(ValueError, match="num_positions, the longest sequence"):
            adapt(make())
    with pytest.raises(ValueError, match="the model has 16"):
        adapt(vit(), 9)
    with pytest.raises(ValueError, match=r"1\.\.12"):
        adapt(words(), 13)
    backbone = vit()
    adapt(backbone)
    with pytest.raises(ValueError, match="adapted already"):
        adapt(backbone)


def test_wrong_inputs(without_shape_checks):
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            MP3Config(masking_ratio=ratio)
    with pytest.raises(ValueError, match="needs masked tokens"):
        MP3Config(masking_ratio=0, loss_on="masked")
    with pytest.raises(ValueError, match="'all' or 'masked'"):
        MP3Config(loss_on="some")
    with pytest.raises(ValueError, match="smoothing_sigma"):
        MP3Config(smoothing_sigma=0.0)
    with pytest.raises(ValueError, match="without context"):
        sample_context(4, 2, 0.9)
    with pytest.raises(ValueError, match="the shortest has 1"):
        sample_context(4, 1, 0.6, attention_mask=torch.tensor([[True, False, False, False]]))
    model, inputs = pretraining("vit")
    x = inputs["pixel_values"]
    with pytest.raises(ValueError, match="got none"):
        model()
    with pytest.raises(ValueError, match="got pixel_values, inputs_embeds"):
        model(x, inputs_embeds=torch.randn(3, 16, 16))
    with pytest.raises(ValueError, match="25 tokens"):
        model(torch.rand(1, 3, 20, 20))
    with pytest.raises(ValueError, match="9 tokens"):
        model(torch.rand(1, 3, 12, 12))
    with pytest.raises(ValueError, match="row without context"):
        model(x, context_mask=torch.zeros(3, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape \(3, 16\)"):
        model(x, context_mask=torch.ones(3, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match="holds padding"):
        model(x, context_mask=torch.ones(3, 16, dtype=torch.bool), attention_mask=torch.arange(16).expand(3, -1) < 4)
    with pytest.raises(ValueError, match="leave some out"):
        MP3ForPreTraining(model.encoder, MP3Config(loss_on="masked"))(
            x, context_mask=torch.ones(3, 16, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="has no embeddings"):
        MP3ForPreTraining(plain(), None, 5)(pixel_values=x)
    with pytest.raises(ValueError, match="one of zeros"):
        restore(model, "rope")
    wave = adapt(waves(), 10)
    for encoder, how in ((wave, "sincos"), (adapt(plain(), 4), "zeros")):
        frozen = {n for n, p in encoder.named_parameters() if not p.requires_grad}
        with pytest.raises(ValueError, match=f"{how}'"):
            restore(encoder, how)
        assert {n for n, p in encoder.named_parameters() if not p.requires_grad} == frozen
    assert restore(wave, "random").encoder.pos_conv_embed.conv.bias.requires_grad


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"pixel_values": torch.rand(3, 16, 16)}, ValueError, "pixel_values must have shape"),
        ({"pixel_values": torch.rand(0, 3, 16, 16)}, ValueError, "holds nothing"),
        ({"pixel_values": torch.full((1, 3, 16, 16), torch.nan)}, ValueError, "NaN or infinity"),
        ({"pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, TypeError, "must be floats"),
        ({"inputs_embeds": torch.rand(1, 16, 15)}, ValueError, "16 wide"),
        ({"inputs_embeds": torch.full((1, 16, 16), torch.inf)}, ValueError, "NaN or infinity"),
        ({"pixel_values": torch.rand(1, 3, 16, 16), "context_mask": torch.ones(1, 16)}, TypeError, "must be bool"),
    ],
)
def test_content_that_cannot_be_learnt_from_is_refused(without_shape_checks, inputs, error, message):
    model, _ = pretraining("vit")
    with pytest.raises(error, match=message):
        model(**inputs)


def test_ids_must_be_integers(without_shape_checks):
    model, _ = pretraining("bert")
    with pytest.raises(TypeError, match="input_ids must be integers"):
        model(input_ids=torch.rand(1, 4))


def test_spoken_digits_are_read_from_their_archive(tmp_path, monkeypatch):
    import io
    import tarfile
    import wave

    from torchgraft import datasets

    (tmp_path / "speech").mkdir()

    def archive(rate):
        with tarfile.open(tmp_path / "speech/fsdd-recordings.tar.gz", "w:gz") as tar:
            for name, length in (("3_ann_0", 5), ("3_ann_5", 7), ("0_bob_12", 6)):
                held = io.BytesIO()
                with wave.open(held, "wb") as sound:
                    sound.setnchannels(1)
                    sound.setsampwidth(2)
                    sound.setframerate(rate)
                    sound.writeframes(torch.arange(length, dtype=torch.int16).mul(2**12).numpy().tobytes())
                info = tarfile.TarInfo(f"recordings/{name}.wav")
                info.size = held.tell()
                held.seek(0)
                tar.addfile(info, held)

    monkeypatch.setenv("TORCHGRAFT_DATA", str(tmp_path))
    archive(8000)
    sounds = datasets.load("spoken-digits")
    assert [len(wave) for wave in sounds.train] == [6, 7]
    assert sounds.train_y.tolist() == [0, 3]
    assert sounds.test[0].tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert sounds.test_y.tolist() == [3]
    archive(16000)
    with pytest.raises(ValueError, match="16 bits at 8 kHz"):
        datasets.load("spoken-digits")


def wave_filled(*shape, phase):
    return (torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + phase) / 3).view(*shape)


def test_the_loss_of_a_public_reimplementation():
    # MP3.forward of vit_pytorch/mp3.py, lucidrains/vit-pytorch at 69d24fe, with the weights and tokens below, masking
    # ratio 0.75 and these contexts. Its keys come from the raw tokens in every layer, so with one layer it is ours.
    contexts, theirs = [[1, 5, 3, 0], [11, 12, 3, 14], [10, 6, 14, 3]], (3.407625600477713, 0.13409942116222656)
    config = SMALL | dict(num_hidden_layers=1, qkv_bias=False, layer_norm_eps=1e-5)
    backbone = transformers.ViTModel(transformers.ViTConfig(**config, image_size=16, patch_size=4)).double()
    (layer,) = backbone.layers
    keys_and_values = wave_filled(32, 16, phase=2)
    model = MP3ForPreTraining(backbone, MP3Config(0.75)).eval()
    weights = {
        layer.attention.q_proj: wave_filled(16, 16, phase=1),
        layer.attention.k_proj: keys_and_values[:16],
        layer.attention.v_proj: keys_and_values[16:],
        layer.attention.o_proj: wave_filled(16, 16, phase=3),
        layer.mlp.fc1: wave_filled(32, 16, phase=4),
        layer.mlp.fc2: wave_filled(16, 32, phase=5),
        model.head: wave_filled(16, 16, phase=6),
    }
    for linear, weight in weights.items():
        linear.weight.data.copy_(weight)
        if linear.bias is not None:
            linear.bias.data.zero_()
    tokens = (wave_filled(3, 16, 16, phase=7) * 3).requires_grad_()
    context = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, torch.tensor(contexts), True)
    loss = model(inputs_embeds=tokens, context_mask=context).loss
    loss.backward()
    assert loss.item() == pytest.approx(theirs[0], rel=1e-12)
    assert tokens.grad.norm().item() == pytest.approx(theirs[1], rel=1e-12)
