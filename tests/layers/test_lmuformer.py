"""LMUFormer: parallel against streaming, padding, neurons, parity with the official code, checkpoints, errors."""

import copy

import pytest
import torch
from torch import nn

from torchgraft.layers.lmuformer import (
    LegendreMemory,
    LIFNeuron,
    LMUCell,
    LMUFormer,
    LMUFormerConfig,
    LMUFormerForAudioClassification,
    LMUMixer,
    SpikingSelfAttention,
    energy_report,
    lif,
)
from torchgraft.layers.lmuformer.neuron import lif_naive, surrogate_slope
from torchgraft.ops.lmu import lmu_memory_naive

KINDS = {
    "plain": {},
    "causal": {"causal_conv": True},
    "deep": {"depth": 2},
    "spiking": {"spiking": True},
    "spiking eb": {"spiking": True, "patch": "eb"},
    "spiking causal": {"spiking": True, "causal_conv": True},
    "attention": {"spiking": True, "attention_heads": 4},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_causal_kind = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "attention"])


def wave(count, phase):
    return torch.sin(torch.arange(count, dtype=torch.float64) ** 1.3 * 0.37 + phase)


def fill(model, gain):
    """Parameters and statistics by a formula, the same for the official model and ours."""
    buffers = [(name, b) for name, b in model.named_buffers() if "running" in name]
    for phase, (name, t) in enumerate(sorted([*model.named_parameters(), *buffers])):
        w = wave(t.numel(), phase).view(t.shape)
        if "running_var" in name or (("bn" in name.split(".")[-2] or ".3.weight" in name) and name.endswith("weight")):
            w = 1 + 0.5 * w
        elif t.ndim > 1:
            w = gain * w * (3 / (t.numel() / t.shape[0])) ** 0.5
        else:
            w = 0.3 * w
        t.data.copy_(w)


def ready(kind="plain"):
    """A small model in float64, in eval mode, with weights so large that its neurons fire."""
    model = LMUFormer(8, 5, dim=12, theta=20, **KINDS[kind]).double()
    fill(model, 6.0 if KINDS[kind].get("spiking") else 1.0)
    return model.eval()


def sequences(batch=3, length=26, features=8):
    torch.manual_seed(0)
    return torch.randn(batch, length, features, dtype=torch.float64)


@pytest.mark.parametrize(("spiking", "count"), [(False, 1_621_796), (True, 1_689_894)])
def test_parameters_of_the_paper_s_setting(spiking, count):
    assert sum(p.numel() for p in LMUFormer(128, 35, spiking=spiking).parameters()) == count


@every_causal_kind
def test_streaming_equals_the_whole(kind):
    model, x = ready(kind), sequences()
    whole = model.running_logits(x)
    assert whole.std() > 1e-3
    state, found = model.initial_state(3, dtype=torch.float64), []
    for t, x_t in enumerate(x.unbind(1)):
        logits, state = model.step(x_t, state)
        assert (logits is None) == (t < model.look_ahead)
        found += [] if logits is None else [logits[:, None]]
    rest = model.finish(state)
    assert rest.shape[1] == model.look_ahead
    torch.testing.assert_close(torch.cat([*found, rest], 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(model(x), whole[:, -1], atol=1e-10, rtol=0)


@every_causal_kind
@pytest.mark.parametrize("cuts", [[1, 2, 3], [25], [4, 20]])
def test_pieces_equal_the_whole(kind, cuts):
    model, x = ready(kind), sequences()
    state, found = None, []
    for piece in x.tensor_split(cuts, 1):
        logits, state = model.stream(piece, state)
        found.append(logits)
    torch.testing.assert_close(torch.cat([*found, model.finish(state)], 1), model.running_logits(x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 4, 6])
def test_sequences_shorter_than_the_look_ahead(length):
    model, x = ready("spiking eb"), sequences(2, length)
    begin, state = model.stream(x)
    assert begin.shape[1] == max(0, length - 5)
    found = torch.cat([begin, model.finish(state)], 1)
    torch.testing.assert_close(found, model.running_logits(x), atol=1e-10, rtol=0)


@every_causal_kind
def test_look_ahead_is_exact(kind):
    model, x = ready(kind), sequences(batch=1)
    features = model.forward_features(x)
    reach = model.look_ahead
    assert reach == (0 if "causal" in kind else 5)
    moved = x.clone()
    moved[0, 11 + reach :] += 3
    torch.testing.assert_close(model.forward_features(moved)[0, :11], features[0, :11], atol=1e-12, rtol=0)
    if kind == "plain":
        # and no less: the farthest step it claims to look at does matter
        moved = x.clone()
        moved[0, 10 + reach] += 3
        assert (model.forward_features(moved)[0, 10] - features[0, 10]).abs().max() > 1e-6


@every_kind
def test_padded_rows_are_what_each_is_alone(kind):
    model = ready(kind)
    x, lengths = sequences(), torch.tensor([26, 13, 1])
    padded = x.clone()
    padded[1, 13:], padded[2, 1:] = torch.nan, 7.0
    alone = torch.cat([model(x[i : i + 1, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(model(padded, lengths), alone, atol=1e-10, rtol=0)
    running = model.running_logits(padded, lengths)
    torch.testing.assert_close(running[1, :13], model.running_logits(x[1:2, :13])[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(running[1, 25], running[1, 12])


def test_padding_does_not_enter_the_statistics_in_training():
    model = ready().train()
    twin = copy.deepcopy(model)
    x = sequences(batch=2)
    model(x[:, :10])
    twin(torch.cat([x[:, :10], 100 * x[:, 10:]], 1), torch.tensor([10, 10]))
    for name, ours in model.state_dict().items():
        torch.testing.assert_close(ours, twin.state_dict()[name], msg=name)


GOLDEN = {
    # lmu_rnn_conv1d, slmu_rnn_ms_conv1d, slmu_rnn_conv1d and attn_ms_conv1d of zeyuliu1037/LMUFormer, src/lmu_rnn.py,
    # commit 5debadd, filled by ``fill``: logits; those of test_mode="all_seq" at steps 9 and 63 of the first row;
    # in train mode, the gradient of the sum of squared logits at three inputs
    "plain": (
        {}, 16, 1.0,
        [[-4.05067873, -1.63470483, 1.04529738], [-4.44069052, -1.59287393, 1.40403581]],
        [[-3.74992180, -1.66122043, 0.97156835], [-4.14281034, -1.70187593, 1.10716188]],
        [-0.05634540, -0.05499633, -0.06386720],
    ),
    "ms": (
        {"spiking": True}, 16, 6.0,
        [[1.56179714, 1.82124209, -0.66566402], [1.60487866, 1.37246871, -0.24384090]],
        [[0.74297851, 1.42342091, -1.27681541], [1.19484472, 1.40707707, -0.48079890]],
        [-0.00178307, -0.00065691, -0.00075228],
    ),
    "eb": (
        {"spiking": True, "patch": "eb"}, 256, 6.0,
        [[-10.59491730, 1.19442606, -1.32560611], [-10.79997444, 0.54322445, -1.15907717]],
        [[-11.58409977, 1.32457101, 2.12401199], [-11.58038044, 1.05848825, -0.40984544]],
        [0.04316036, 0.19472519, 0.13124625],
    ),
    "attention": (
        {"spiking": True, "attention_heads": 4}, 16, 6.0,
        [[2.73160791, 1.22362125, -1.09225094], [2.10294604, -0.23350854, 0.15123555]],
        [[3.01613307, 1.53906155, -1.24241042], [3.06643414, 1.68577123, -1.56608200]],
        [-0.00049262, 0.00020260, -0.00018354],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_official_code(name):
    options, dim, gain, logits, running, gradient = GOLDEN[name]
    features = 128 if dim == 256 else 8
    model = LMUFormer(features, 3, dim, mlp_ratio=2, **options)
    fill(model, gain)
    model.eval()
    x = wave(2 * 128 * features, 0).view(2, 128, features).float() * 1.5
    torch.testing.assert_close(model(x), torch.tensor(logits), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.running_logits(x)[0, [9, 63]], torch.tensor(running), atol=1e-5, rtol=1e-5)
    model.train()
    x.requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found[0, 60, :3], torch.tensor(gradient), atol=1e-5, rtol=1e-3)


def test_official_checkpoints_load_and_others_are_refused():
    cell = LMUCell(6, 8, 8, theta=128)
    official = dict(cell.state_dict()) | {
        "A": cell.memory.A, "B": cell.memory.B[:, None], "H": cell.memory.H, "fft_H": torch.fft.rfft(cell.memory.H),
    }  # fmt: skip
    fresh = LMUCell(6, 8, 8, theta=128)
    fresh.load_state_dict(official)
    x = torch.randn(2, 9, 6)
    assert torch.equal(fresh(x)[0], cell(x)[0])
    with pytest.raises(RuntimeError, match="theta=50"):
        LMUCell(6, 8, 8, theta=50).load_state_dict(official)


def test_names_of_the_state_dict():
    plain, spiking = LMUFormer(4, 3, dim=8).state_dict(), LMUFormer(4, 3, dim=8, spiking=True).state_dict()
    for name in ("patch_embed.conv_layers.3.3.weight", "patch_embed.rpe_conv.weight", "block.0.attn.lmu.W_u.bias",
                 "block.0.attn.proj_bn.running_var", "block.0.mlp.fc2_conv.weight", "head.bias"):  # fmt: skip
        assert name in plain
    for name in ("patch_embed.proj_conv.weight", "patch_embed.proj_bn3.bias", "block.0.attn.prev_bn.weight",
                 "block.0.attn.lmu.bn_m.weight", "block.0.mlp.fc1_bn.weight", "head_bn.weight"):  # fmt: skip
        assert name in spiking


@pytest.mark.parametrize("hidden", [4, 12])
def test_cell_is_its_definition_folded_or_not(hidden):
    cell, x = LMUCell(3, hidden, 8, theta=15).double(), sequences(2, 30, 3)
    h, state = cell(x)
    u = cell.W_u(x).relu()[..., 0]
    m, last = lmu_memory_naive(u, cell.memory.A, cell.memory.B)
    torch.testing.assert_close(h, cell.W_h(torch.cat([m, x], -1)).relu(), atol=1e-10, rtol=0)
    torch.testing.assert_close(state["memory"], last, atol=1e-10, rtol=0)
    if hidden == 4:
        leaves = [x[:1, :4].clone().requires_grad_(), cell.W_h.weight, cell.W_u.weight]
        assert torch.autograd.gradcheck(lambda x, *_: cell(x)[0], leaves)


@pytest.mark.parametrize("variant", ["plain", "eb", "ms"])
def test_mixer_cut_stepped_and_masked(variant):
    mixer = LMUMixer(6, theta=12, variant=variant).double()
    fill(mixer, 6.0)
    mixer.eval()
    x = 2 * sequences(2, 30, 6)
    y, last = mixer(x)
    begin, state = mixer(x[:, :11])
    middle, state = mixer(x[:, 11:29], state)
    end, state = mixer.step(x[:, 29], state)
    torch.testing.assert_close(torch.cat([begin, middle, end[:, None]], 1), y, atol=1e-10, rtol=0)
    mask = torch.rand(2, 30) < 0.6
    kept, after = mixer(x.masked_fill(~mask[..., None], 5.0), mixer.initial_state(2, dtype=torch.float64), mask)
    assert (kept[~mask] == 0).all()
    for row in range(2):
        alone, alone_after = mixer(x[row : row + 1, mask[row]])
        torch.testing.assert_close(kept[row, mask[row]], alone[0], atol=1e-10, rtol=0)
        for name, value in alone_after.items():
            torch.testing.assert_close(after[name][row], value[0], atol=1e-10, rtol=0)
    assert last.keys() == state.keys() == mixer.initial_state(2).keys()


@pytest.mark.parametrize(("tau", "threshold", "reset"), [(2.0, 1.0, 0.0), (3.5, 0.5, -0.25), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("surrogate", ["sigmoid", "atan"])
def test_neurons_equal_their_definition_with_gradients(tau, threshold, reset, surrogate):
    constants = dict(tau=tau, threshold=threshold, reset=reset, surrogate=surrogate)
    x = (2 * sequences(2, 45, 4)).requires_grad_()
    state = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    found, wanted = (f(x, initial_state=state, **constants) for f in (lif, lif_naive))
    assert torch.equal(found[0], wanted[0])
    assert 0.05 < found[0].mean() < 0.95
    torch.testing.assert_close(found[1], wanted[1])
    weights = torch.randn_like(found[0]), torch.randn_like(found[1])
    gradients = [
        torch.autograd.grad((s * weights[0]).sum() + (v * weights[1]).sum(), (x, state)) for s, v in (found, wanted)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradient_of_a_neuron_by_hand():
    # 0.75, then 0.375 + 1.5 / 2 = 1.125 fires; then 0.75 again
    x = torch.full((1, 3, 1), 1.5, dtype=torch.float64, requires_grad=True)
    spikes, _ = lif(x)
    assert spikes.flatten().tolist() == [0, 1, 0]
    (found,) = torch.autograd.grad(spikes.sum(), x)
    slope = surrogate_slope(torch.tensor([0.75, 1.125, 0.75]).double() - 1, "sigmoid")
    # the first potential feeds the second by half; the second, reset, feeds nothing, and the reset has no gradient
    wanted = torch.stack([slope[0] / 2 + slope[1] / 4, slope[1] / 2, slope[2] / 2])
    torch.testing.assert_close(found.flatten(), wanted)


def test_neurons_of_spikingjelly():
    # spikes of MultiStepLIFNode(tau=2.0) of spikingjelly 0.0.0.0.12 for currents 3 sin(t), t = 0 .. 19
    x = (3 * torch.arange(20).sin())[None, :, None]
    assert lif(x)[0].flatten().int().tolist() == [0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_silence_gives_no_spikes_and_pieces_equal_the_whole():
    assert lif(torch.zeros(2, 30, 4))[0].sum() == 0
    neuron, x = LIFNeuron(), 2 * sequences(2, 40, 4)
    whole, last = neuron(x)
    state, found = neuron.initial_state(2, dtype=torch.float64, features=4), []
    for piece in x.tensor_split([7, 27, 39], 1):
        spikes, state = neuron(piece, state)
        found.append(spikes)
    assert torch.equal(torch.cat(found, 1), whole)
    assert torch.equal(state["potential"], last["potential"])
    one, _ = neuron.step(x[:, 0], neuron.initial_state(2, dtype=torch.float64, features=4))
    assert torch.equal(one, whole[:, 0])


def test_neurons_skip_masked_places():
    x, mask = 2 * sequences(2, 40, 4), torch.rand(2, 40) < 0.6
    spikes, last = lif(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
    assert (spikes[~mask] == 0).all()
    for row in range(2):
        want, want_last = lif(x[row : row + 1, mask[row]])
        assert torch.equal(spikes[row, mask[row]], want[0])
        assert torch.equal(last[row], want_last[0])


def test_compiled_without_breaks(without_shape_checks):
    # the operations themselves are traced further in the tests beside this one
    for layer, x in ((ready().train(), sequences(2, 12)), (LMUMixer(3, theta=9, variant="ms"), torch.randn(2, 5, 3))):
        found = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(found, layer(x))


def test_neurons_are_one_operation_to_the_compiler(without_shape_checks):
    from torchgraft.layers.lmuformer import neuron

    x, state = sequences(2, 6, 3).requires_grad_(), torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(neuron._integrate, (2 * x, state, 0.5, 0.0, 1.0))
    compiled = torch.compile(lambda x: lif(2 * x)[0], fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, lambda x: lif(2 * x)[0])]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["plain", "spiking"])
def test_half_precision(kind):
    model = ready(kind).float()
    low = LMUFormer(8, 5, dim=12, theta=20, **KINDS[kind]).bfloat16().eval()
    low.load_state_dict(model.state_dict())
    assert low.block[0].attn.lmu.memory.A.dtype == torch.float32
    assert torch.equal(low.block[0].attn.lmu.memory.H, model.block[0].attn.lmu.memory.H)
    x = sequences().float()
    y = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # a spike that flips is a whole one: only the order of size stays in the spiking model
    scale = model(x).abs().max()
    assert (y - model(x)).abs().max() < (0.05 if kind == "plain" else 0.5) * scale


def test_memory_as_a_layer():
    memory = LegendreMemory(12, theta=100)
    assert not memory.state_dict()
    u = torch.sin(torch.arange(300) / 25).expand(2, 3, -1).mT
    m, _ = memory(u)
    assert m.shape == (2, 300, 3, 12)
    again, _ = memory.step(u[:, 0], memory.initial_state(2, signals=3))
    torch.testing.assert_close(again, m[:, 0], atol=1e-6, rtol=0)
    more, _ = memory(u[:, 200:], memory(u[:, :200])[1])
    torch.testing.assert_close(more, m[:, 200:], atol=1e-5, rtol=0)
    read = memory.decode(m[:, -1], torch.tensor([10.5, 50.5]) / 100)
    torch.testing.assert_close(read, u[:, [289, 249]].mT, atol=2e-3, rtol=0)
    exact = copy.deepcopy(memory).half().double()
    assert (exact.A - memory.A).abs().max() < 1e-7
    assert (exact.A - memory.A).abs().max() > 0


def test_energy_counts_by_hand():
    model = ready()
    x = sequences()
    report = energy_report(model, x)
    # per step: convolutions, W_u, memory, W_h, projection, feed-forward, head
    assert report.macs == 3 * 8 * 12 + 4 * 3 * 144 + 12 + (144 + 12) + 2 * 144 + 144 + 2 * 4 * 144 + 5 * 12
    assert (report.additions, report.spike_rate) == (0, 0)
    spiking = energy_report(ready("spiking"), x)
    assert spiking.additions > 0
    assert all(0 <= rate <= 1 for rate in spiking.spike_rates.values())
    assert any(rate > 0.05 for rate in spiking.spike_rates.values())
    assert spiking.picojoules == pytest.approx(4.6 * spiking.macs + 0.9 * spiking.additions)
    assert not model.block[0].attn.lmu.W_u._forward_hooks


def test_transformers_model_saves_and_loads(tmp_path):
    from transformers import ASTFeatureExtractor, AutoModelForAudioClassification

    extractor = ASTFeatureExtractor(max_length=128, num_mel_bins=128, mean=-6.845978, std=5.5654526)
    values = extractor([torch.randn(16000).numpy(), torch.randn(9000).numpy()], sampling_rate=16000,
                       return_tensors="pt")["input_values"]  # fmt: skip
    model = LMUFormerForAudioClassification(LMUFormerConfig(hidden_size=16, num_labels=3)).eval()
    out = model(values, labels=torch.tensor([0, 2]))
    out.loss.backward()
    model.save_pretrained(tmp_path)
    again = AutoModelForAudioClassification.from_pretrained(tmp_path)
    assert torch.equal(again(values).logits, out.logits)
    mask = torch.ones(2, 128, dtype=torch.long)
    mask[1, 60:] = 0
    torch.testing.assert_close(again(values, mask).logits[1], again(values[1:, :60]).logits[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="pad at the right"):
        again(values, mask.flip(1))


def test_learns_what_only_memory_can_tell():
    """The class is the sign of the first step; a model without memory sees nothing of it later."""
    torch.manual_seed(0)
    x = torch.randn(64, 30, 1)
    y = (x[:, 0, 0] > 0).long()
    model = LMUFormer(1, 2, dim=12, theta=30)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_longer_than_the_window_is_taken():
    model = ready()
    assert model.forward_features(sequences(1, 90)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m(x[:, :0]), ValueError, "batch and length at least 1"),
        (lambda m, x: m(x[:0]), ValueError, "batch and length at least 1"),
        (lambda m, x: m(x[..., :3]), ValueError, r"x must have shape \(batch, length, 8\)"),
        (lambda m, x: m(x.long()), TypeError, "floating-point"),
        (lambda m, x: m(x / 0), ValueError, "finite"),
        (lambda m, x: m(x, torch.tensor([1, 2])), ValueError, "lengths must be whole numbers"),
        (lambda m, x: m(x, torch.tensor([0, 2, 3])), ValueError, r"lengths must lie in 1\.\.26"),
        (lambda m, x: m(x, torch.tensor([1, 2, 27])), ValueError, r"lengths must lie in 1\.\.26"),
        (lambda m, x: m.train().stream(x), ValueError, r"\.eval\(\)"),
        (lambda m, x: m.step(x, m.initial_state(3)), ValueError, "x_t must have shape"),
        (lambda m, x: m.step(x[:, 0], m.initial_state(2)), ValueError, "must have shape"),
        (lambda m, x: m.step(x[:, 0], {"sum": x}), ValueError, "state must hold"),
        (lambda m, x: m.finish({}), ValueError, "state must hold"),
        (lambda m, x: LMUFormer(8, 5, patch="ebms"), ValueError, "patch must be tokenizer"),
        (lambda m, x: LMUFormer(8, 5, spiking=True, patch="tokenizer"), ValueError, "patch must be ebms or eb"),
        (lambda m, x: LMUFormer(8, 0), ValueError, "at least 1"),
        (lambda m, x: LMUFormer(8, 5, attention_heads=2), ValueError, "spiking=True"),
        (lambda m, x: LMUFormer(8, 5, theta=0), ValueError, "theta"),
        (lambda m, x: SpikingSelfAttention(8, 3), ValueError, "num_heads must divide"),
        (lambda m, x: LMUMixer(8, variant="x"), ValueError, "variant must be"),
        (lambda m, x: LMUMixer(8)(torch.zeros(1, 2, 8), {"lmu.memory": x}), ValueError, "must have shape"),
        (lambda m, x: LMUMixer(8)(torch.zeros(1, 2, 8), {"memory": x}), ValueError, "state must hold"),
        (lambda m, x: LMUMixer(8).step(torch.zeros(1, 8), LMUMixer(8).initial_state(1)), ValueError, "eval"),
        (lambda m, x: LMUCell(0), ValueError, "input_size"),
        (lambda m, x: LIFNeuron(tau=0.5), ValueError, "tau"),
        (lambda m, x: LIFNeuron(threshold=-1.0), ValueError, "threshold must be above"),
        (lambda m, x: LIFNeuron(surrogate="relu"), ValueError, "surrogate"),
        (lambda m, x: lif(x[:, :0]), ValueError, "length of at least 1"),
        (lambda m, x: lif(x, initial_state=x[:, 0, :3]), ValueError, "initial_state must have shape"),
        (lambda m, x: lif(x, mask=x[..., 0]), TypeError, "boolean"),
        (lambda m, x: energy_report(m.train(), x), ValueError, "eval"),
    ],
)
def test_wrong_input_is_named(call, error, message, without_shape_checks):
    with pytest.raises(error, match=message):
        call(ready(), sequences())


@pytest.mark.parametrize("call", ["initial_state", "stream", "finish"])
def test_attention_cannot_be_streamed(call, without_shape_checks):
    model = LMUFormer(8, 5, dim=16, spiking=True, attention_heads=4).eval()
    given = {"initial_state": 2, "stream": torch.zeros(1, 3, 8), "finish": {}}[call]
    with pytest.raises(ValueError, match="needs a causal mixer"):
        getattr(model, call)(given)
