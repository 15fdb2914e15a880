"""LMUFormer, plain and spiking: trained in parallel, run one step at a time (Liu et al., ICLR 2024, arXiv 2402.04882).

Legend: B batch, L length, F features of a step, C channels, D channels after a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from torchgraft.layers.lmuformer.memory import (
    Conv,
    LMUCell,
    LMUMixer,
    SpikingSelfAttention,
    Variant,
    check_eval,
    check_input,
    check_state,
    fire,
    named,
    normalised,
    part,
)
from torchgraft.layers.lmuformer.neuron import LIFNeuron, State

__all__ = ["EnergyReport", "LMUFormer", "Patch", "energy_report"]

Patch = Literal["tokenizer", "eb", "ebms"]


class Embedding(nn.Module):
    """Four convolutions of three taps, and a fifth that is added: a learned relative position.

    ``"tokenizer"``: convolution, ReLU, batch norm. ``"eb"`` and ``"ebms"``: convolution, batch norm, neuron; in the
    latter the fourth convolution's output is summed as it is, before its norm and neuron. Named as in the official
    ``Tokenizer``, ``Conv1d4EB``, ``Conv1d4EBMs``.
    """

    def __init__(self, in_channels: int, dim: int, patch: Patch, causal: bool) -> None:
        super().__init__()
        self.in_channels, self.dim, self.patch, self.causal = in_channels, dim, patch, causal
        widths = [in_channels, dim, dim, dim, dim]
        if patch == "tokenizer":
            self.conv_layers = nn.Sequential(
                *[
                    nn.Sequential(Conv(a, b, 3, bias=False), nn.ReLU(), nn.Identity(), nn.BatchNorm1d(b))
                    for a, b in pairwise(widths)
                ]
            )
        else:
            for i, (a, b) in enumerate(pairwise(widths)):
                setattr(self, f"proj_conv{i or ''}", Conv(a, b, 3, bias=False))
                setattr(self, f"proj_bn{i or ''}", nn.BatchNorm1d(b))
                setattr(self, f"proj_lif{i or ''}", LIFNeuron())
        self.rpe_conv = Conv(dim, dim, 3, bias=False)
        if patch == "eb":
            self.rpe_bn, self.rpe_lif = nn.BatchNorm1d(dim), LIFNeuron()

    def _begin(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        # what stands before the first place: one zero for a centred convolution, two for a causal one
        past = 2 if self.causal else 1
        found = {f"conv{i}": zeros(past, self.dim if i else self.in_channels) for i in range(4)}
        found |= {"rpe": zeros(past, self.dim), "delayed": zeros(0, self.dim)}
        if self.patch != "tokenizer":
            found |= {f"lif{i}": zeros(self.dim) for i in range(4)}
        if self.patch == "eb":
            found["rpe_lif"] = zeros(self.dim)
        return found

    def _convolved(self, conv: Conv, x: Tensor, state: State | None, name: str, new: State, last: bool) -> Tensor:
        """Every place whose neighbours are known; what is needed for the next ones is kept."""
        past = 2 if self.causal else 1
        pieces = [x.new_zeros(len(x), past, x.shape[2]) if state is None else state[name].to(x.dtype), x]
        if last and not self.causal:
            pieces.append(x.new_zeros(len(x), 1, x.shape[2]))
        x = torch.cat(pieces, 1)
        new[name] = x[:, -2:]
        return conv(x) if x.shape[1] > 2 else x.new_zeros(len(x), 0, conv.out_channels)

    def _run(self, x: Tensor, state: State | None, inside: Tensor | None, last: bool) -> tuple[Tensor, State]:
        new: State = {}
        if inside is not None:
            x = x.masked_fill(~inside[..., None], 0)
        for i in range(4):
            if self.patch == "tokenizer":
                layers = self.conv_layers[i]
                assert isinstance(layers, nn.Sequential)
                conv, norm = layers[0], layers[3]
                assert isinstance(conv, Conv)
                assert isinstance(norm, nn.BatchNorm1d)
                x = normalised(norm, F.relu(self._convolved(conv, x, state, f"conv{i}", new, last)), inside)
                continue
            conv, norm, neuron = (getattr(self, f"proj_{kind}{i or ''}") for kind in ("conv", "bn", "lif"))
            current = self._convolved(conv, x, state, f"conv{i}", new, last)
            x = fire(neuron, normalised(norm, current, inside), state, f"lif{i}", new)
        relative = self._convolved(self.rpe_conv, x, state, "rpe", new, last)
        if self.patch == "eb":
            relative = fire(self.rpe_lif, normalised(self.rpe_bn, relative, inside), state, "rpe_lif", new)
        # the sum waits for the fifth convolution, which is a place behind
        summed = current if self.patch == "ebms" else x
        if state is not None:
            summed = torch.cat([state["delayed"].to(summed.dtype), summed], 1)
        new["delayed"] = summed[:, relative.shape[1] :]
        y = summed[:, : relative.shape[1]] + relative
        return y if inside is None else y.masked_fill(~inside[..., None], 0), new


class FeedForward(nn.Module):
    """The channel mixer: two 1 x 1 convolutions with batch norms and activations (``ConvFFN``, ``ConvFFNMs``)."""

    def __init__(self, dim: int, hidden: int, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.fc1_conv, self.fc2_conv = Conv(dim, hidden, 1), Conv(hidden, dim, 1)
        widths = (dim, hidden) if variant == "ms" else (hidden, dim)
        self.fc1_bn, self.fc2_bn = (nn.BatchNorm1d(n) for n in widths)
        if variant != "plain":
            self.fc1_lif, self.fc2_lif = LIFNeuron(), LIFNeuron()

    def _begin(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        if self.variant == "plain":
            return {}
        sizes = {"fc1": self.fc1_bn.num_features, "fc2": self.fc2_bn.num_features}
        return {name: torch.zeros(batch, size, device=device, dtype=dtype) for name, size in sizes.items()}

    def _run(self, x: Tensor, state: State | None, inside: Tensor | None) -> tuple[Tensor, State]:
        new: State = {}
        if self.variant == "plain":
            x = F.gelu(normalised(self.fc1_bn, self.fc1_conv(x), inside))
            return F.relu(normalised(self.fc2_bn, self.fc2_conv(x), inside)), new
        if self.variant == "eb":
            x = fire(self.fc1_lif, normalised(self.fc1_bn, self.fc1_conv(x), inside), state, "fc1", new)
            return fire(self.fc2_lif, normalised(self.fc2_bn, self.fc2_conv(x), inside), state, "fc2", new), new
        x = self.fc1_conv(fire(self.fc1_lif, normalised(self.fc1_bn, x, inside), state, "fc1", new))
        x = self.fc2_conv(fire(self.fc2_lif, normalised(self.fc2_bn, x, inside), state, "fc2", new))
        # its bias would stand in the padding too
        return x if inside is None else x.masked_fill(~inside[..., None], 0), new


class Block(nn.Module):
    """A mixer over time and one over channels, each with a shortcut."""

    def __init__(self, dim: int, hidden: int, theta: float, variant: Variant, num_heads: int | None) -> None:
        super().__init__()
        self.attn: LMUMixer | SpikingSelfAttention = (
            LMUMixer(dim, theta=theta, variant=variant) if num_heads is None else SpikingSelfAttention(dim, num_heads)
        )
        self.mlp = FeedForward(dim, hidden, variant)

    def _begin(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        assert isinstance(self.attn, LMUMixer)
        mlp = named("mlp", self.mlp._begin(batch, device, dtype))
        return named("attn", self.attn._begin(batch, device, dtype)) | mlp

    def _run(self, x: Tensor, state: State | None, inside: Tensor | None) -> tuple[Tensor, State]:
        new: State = {}
        if isinstance(self.attn, LMUMixer):
            y, after = self.attn._run(x, part(state, "attn"), inside, None)
            x, new = x + y, named("attn", after)
        else:
            x = x + self.attn(x, inside)
        y, after = self.mlp._run(x, part(state, "mlp"), inside)
        return x + y, new | named("mlp", after)


class LMUFormer(nn.Module):
    """A classifier of sequences that trains in parallel and runs one step at a time.

    Convolutions embed the steps, a Legendre memory mixes them, and logits are averaged over time. With the paper's
    sizes (128 mel bands, 35 classes) it has 1,621,796 parameters, the spiking one 1,689,894.

    Each of the five convolutions looks one step ahead, so streamed logits are ``look_ahead`` = 5 steps late (50 ms at
    frames of 10 ms). ``causal_conv=True`` shifts them into the past: no delay, another model to train.

    State dicts of the official code load into it; see ``LMUCell`` for what they hold besides. Differences: padded
    batches give what each row alone would, batch statistics included; any length is taken, where the official code
    takes 128 alone; streaming follows the parallel path, which the official ``forward_recurrent`` of the spiking cell
    does not; the embedding ``"eb"`` takes any sizes, where the official one is always 128 to 256; the option to keep
    the last step alone (``use_all_h=False``, used nowhere) is not built.

    Args:
        in_channels: F.
        num_classes: logits.
        dim: C.
        depth: blocks.
        mlp_ratio: hidden channels of the feed-forward, in multiples of C.
        theta: window of the memory in steps.
        spiking: leaky integrate-and-fire neurons instead of ReLU and GELU, their time being the sequence.
        patch: embedding, ``"tokenizer"`` for the plain model, ``"ebms"`` (default) or ``"eb"`` for the spiking one.
            ``"eb"`` adds up spikes, ``"ebms"`` currents.
        causal_conv: convolutions look into the past alone.
        attention_heads: in place of the memory, spiking self-attention with so many heads: the baseline of the paper.
            It looks at the whole sequence and cannot be streamed.

    Raises:
        ValueError: for sizes below one, or an embedding that does not go with the rest.

    Example:
        >>> model = LMUFormer(in_channels=40, num_classes=10, dim=32, theta=64).eval()
        >>> x = torch.randn(2, 60, 40)
        >>> logits = model(x)
        >>> state = model.initial_state(2)
        >>> for x_t in x.unbind(1):
        ...     running, state = model.step(x_t, state)  # None for the first model.look_ahead steps
        >>> torch.allclose(model.finish(state)[:, -1], logits, atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        dim: int = 256,
        depth: int = 1,
        mlp_ratio: float = 4,
        theta: float = 128,
        spiking: bool = False,
        patch: Patch | None = None,
        causal_conv: bool = False,
        attention_heads: int | None = None,
    ) -> None:
        super().__init__()
        patch = patch if patch is not None else ("ebms" if spiking else "tokenizer")
        if patch not in (("ebms", "eb") if spiking else ("tokenizer",)):
            raise ValueError(
                f"patch must be {'ebms or eb' if spiking else 'tokenizer'} with spiking={spiking}, got {patch!r}"
            )
        if min(in_channels, num_classes, dim, depth, int(mlp_ratio * dim)) < 1:
            raise ValueError(
                "in_channels, num_classes, dim, depth and mlp_ratio * dim must be at least 1, got "
                f"{in_channels}, {num_classes}, {dim}, {depth} and {mlp_ratio * dim}"
            )
        if attention_heads is not None and patch != "ebms":
            raise ValueError(f"attention_heads needs spiking=True and patch='ebms', got spiking={spiking}, {patch!r}")
        variant: Variant = "plain" if not spiking else ("ms" if patch == "ebms" else "eb")
        self.in_channels, self.dim, self.variant = in_channels, dim, variant
        self.causal = attention_heads is None
        self.patch_embed = Embedding(in_channels, dim, patch, causal_conv)
        self.block = nn.ModuleList(
            Block(dim, int(mlp_ratio * dim), theta, variant, attention_heads) for _ in range(depth)
        )
        if variant == "ms":
            self.head_bn, self.head_lif = nn.BatchNorm1d(dim), LIFNeuron()
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def look_ahead(self) -> int:
        """Steps of the future that an output depends on."""
        return 0 if self.patch_embed.causal else 5

    def _check(self, x: Tensor) -> None:
        check_input(x, self.in_channels)
        if not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
            raise ValueError("x must be finite, got NaN or infinity; batch norm and spikes would hide it")

    def _check_stream(self, what: str) -> None:
        if not self.causal:
            raise ValueError(f"{what} needs a causal mixer; spiking self-attention looks at the whole sequence")
        check_eval(self, what)

    def _run(self, x: Tensor, state: State | None, inside: Tensor | None, last: bool) -> tuple[Tensor, State]:
        x, after = self.patch_embed._run(x, part(state, "embed"), inside, last)
        new = named("embed", after)
        if x.shape[1] == 0:
            assert state is not None
            return x, state | new
        for i, block in enumerate(self.block):
            assert isinstance(block, Block)
            x, after = block._run(x, part(state, f"block.{i}"), inside)
            new |= named(f"block.{i}", after)
        if self.variant == "ms":
            x = fire(self.head_lif, normalised(self.head_bn, x, inside), state, "head", new)
        return x, new

    def _inside(self, x: Tensor, lengths: Tensor | None) -> Tensor | None:
        if lengths is None:
            return None
        if lengths.is_floating_point() or lengths.shape != x.shape[:1]:
            raise ValueError(
                f"lengths must be whole numbers of shape ({len(x)},), got {lengths.dtype} of {tuple(lengths.shape)}"
            )
        if not torch.compiler.is_compiling() and not bool(((lengths >= 1) & (lengths <= x.shape[1])).all()):
            raise ValueError(f"lengths must lie in 1..{x.shape[1]}, got {lengths.tolist()}")
        return torch.arange(x.shape[1], device=x.device) < lengths[:, None]

    def forward_features(
        self, x: Float[Tensor, "B L F"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B L C"]:
        """Features of every step, before the head; zero behind the length of a row."""
        inside = self._inside(x, lengths)
        if inside is not None:
            # what padding holds may be anything
            x = x.masked_fill(~inside[..., None], 0)
        self._check(x)
        y, _ = self._run(x, None, inside, True)
        return y if inside is None else y.masked_fill(~inside[..., None], 0)

    def forward(
        self, x: Float[Tensor, "B L F"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B classes"]:
        """Logits of whole sequences.

        Args:
            x: sequences of any length; the memory spans their last ``theta`` steps.
            lengths: true length of each row of a padded batch, 1..L. Rows give what each alone would give.

        Returns:
            (B, num_classes), the mean over the steps.

        Raises:
            ValueError: for shapes that do not fit, length zero, lengths out of range, or numbers that are not finite.
            TypeError: for tensors that are not floating-point.
        """
        features = self.forward_features(x, lengths)
        count = x.shape[1] if lengths is None else lengths[:, None]
        # the head is linear: the mean of its logits is its logits of the mean
        return self.head(features.sum(1) / count)

    def running_logits(
        self, x: Float[Tensor, "B L F"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B L classes"]:
        """Logits after every step, each the mean over the steps so far (official ``test_mode="all_seq"``).

        Behind the length of a row its last logits stay.
        """
        features = self.forward_features(x, lengths)
        count = torch.arange(1, x.shape[1] + 1, device=x.device).expand(len(x), -1)
        if lengths is not None:
            count = torch.minimum(count, lengths[:, None])
        return self.head(features.cumsum(1) / count[..., None])

    def _begin(self, batch: int, device: torch.device | str | None, dtype: torch.dtype) -> State:
        found = named("embed", self.patch_embed._begin(batch, device, dtype))
        for i, block in enumerate(self.block):
            assert isinstance(block, Block)
            found |= named(f"block.{i}", block._begin(batch, device, dtype))
        if self.variant == "ms":
            found["head"] = torch.zeros(batch, self.dim, device=device, dtype=dtype)
        found["sum"] = torch.zeros(batch, self.dim, device=device, dtype=dtype)
        found["count"] = torch.zeros((), device=device, dtype=torch.long)
        return found

    def initial_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> State:
        """State before the first step, on the device of the parameters unless told; float32 at least.

        Raises:
            ValueError: for a model with spiking self-attention, which cannot be streamed.
        """
        self._check_stream("initial_state")
        where = self.head.weight.device if device is None else device
        return self._begin(batch_size, where, torch.promote_types(dtype, torch.float32))

    def stream(
        self, x: Float[Tensor, "B L F"], state: State | None = None
    ) -> tuple[Float[Tensor, "B M classes"], State]:
        """Running logits of the next piece of a sequence.

        They are ``look_ahead`` steps late: the first pieces give as many steps less than they hold. ``finish`` gives
        those that are due at the end. Cut anywhere, all of them are ``running_logits`` of the whole.

        Args:
            x: the piece.
            state: what the last call returned; nothing at the beginning.

        Raises:
            ValueError: as ``forward``; in train mode; with spiking self-attention; for a state of another model.
        """
        self._check_stream("stream")
        self._check(x)
        state = self.initial_state(len(x), x.device) if state is None else state
        self._check_state(state, len(x))
        return self._streamed(x, state, False)

    def step(self, x_t: Float[Tensor, "B F"], state: State) -> tuple[Float[Tensor, "B classes"] | None, State]:
        """One step of ``stream``: running logits, or None while the first ``look_ahead`` steps come in."""
        if x_t.ndim != 2:
            raise ValueError(f"x_t must have shape (batch, {self.in_channels}), got {tuple(x_t.shape)}")
        logits, state = self.stream(x_t[:, None], state)
        return logits[:, 0] if logits.shape[1] else None, state

    def finish(self, state: State) -> Float[Tensor, "B M classes"]:
        """Running logits of the last ``look_ahead`` steps, once the sequence is known to be over.

        The last of them are the logits of the whole. There are fewer for shorter sequences, and none, (B, 0, classes),
        for causal convolutions.

        Raises:
            ValueError: for the state of another model; in train mode; with spiking self-attention.
        """
        self._check_stream("finish")
        batch = len(state["sum"]) if isinstance(state, dict) and "sum" in state else 1
        self._check_state(state, batch)
        nothing = self.head.weight.new_zeros(batch, 0, self.in_channels)
        return self._streamed(nothing, state, True)[0]

    def _check_state(self, state: State, batch: int) -> None:
        wanted = self._begin(batch, "meta", torch.float32)
        if isinstance(state, dict) and state.keys() == wanted.keys():
            for name, tensor in wanted.items():
                # what a centred convolution holds back grows at the beginning
                if name.startswith("embed.") and tensor.ndim == state[name].ndim == 3:
                    wanted[name] = tensor.new_empty(batch, state[name].shape[1], tensor.shape[2])
        check_state(state, wanted)

    def _streamed(self, x: Tensor, state: State, last: bool) -> tuple[Tensor, State]:
        features, new = self._run(x, state, None, last)
        if features.shape[1] == 0:
            return self.head(features), new
        sums = state["sum"][:, None] + features.cumsum(1)
        count = state["count"] + torch.arange(1, features.shape[1] + 1, device=features.device)
        new |= {"sum": sums[:, -1], "count": count[-1]}
        return self.head((sums / count[:, None]).to(features.dtype)), new


@dataclass(frozen=True)
class EnergyReport:
    """What a step of the streamed model costs, and how often neurons fire.

    Attributes:
        macs: multiplications with addition, a step, of inputs that are real numbers.
        additions: additions alone, a step, where inputs are spikes: as many as spikes meet weights.
        spike_rates: share of steps with a spike, by name of the neuron.
    """

    macs: float
    additions: float
    spike_rates: dict[str, float]

    @property
    def spike_rate(self) -> float:
        """Mean over the neurons' layers; zero for a plain model."""
        return sum(self.spike_rates.values()) / len(self.spike_rates) if self.spike_rates else 0.0

    @property
    def picojoules(self) -> float:
        """Energy of a step with 4.6 pJ a multiplication and 0.9 pJ an addition (float32 at 45 nm)."""
        return 4.6 * self.macs + 0.9 * self.additions


def energy_report(model: nn.Module, x: Float[Tensor, "B L F"]) -> EnergyReport:
    """Count the operations of a model on real inputs, layer by layer.

    Counted are linear layers, convolutions and memories (``Q^2 + Q`` a step as a recurrence, the one part of the
    spiking model that has real-valued inputs besides the first convolution). Norms, activations and memory traffic are
    not, so this is an estimate in the manner of the literature, not a measurement. The model is left as it is.

    Args:
        model: an ``LMUFormer``, or any network of its layers.
        x: inputs, without padding.

    Raises:
        ValueError: for a model in train mode.

    Example:
        >>> report = energy_report(LMUFormer(8, 4, dim=16, spiking=True).eval(), torch.randn(2, 50, 8))
        >>> report.additions < report.macs and 0 <= report.spike_rate <= 1
        True
    """
    check_eval(model, "energy_report")
    steps = x.shape[0] * x.shape[1]
    macs = additions = 0.0
    rates: dict[str, float] = {}

    def weights(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, additions
        (given,) = inputs
        taps = layer.kernel_size[0] if isinstance(layer, Conv) else 1
        places = output[..., 0].numel() if output.ndim == 3 else 0
        if places == 0:
            # the head is read once a sequence here, and once a step when streaming
            macs += steps * layer.weight.numel()
        elif bool(((given == 0) | (given == 1)).all()):
            length = output.shape[1]
            additions += sum(float(given[:, i : i + length].sum()) for i in range(taps)) * output.shape[-1]
        else:
            macs += places * layer.weight.numel()

    modules = dict(model.named_modules())
    handles = []
    for name, module in modules.items():
        if isinstance(module, LIFNeuron):
            handles.append(
                module.register_forward_hook(lambda m, i, o, name=name: rates.__setitem__(name, float(o[0].mean())))
            )
        elif isinstance(module, (Conv, nn.Linear)):
            handles.append(module.register_forward_hook(weights))
    try:
        with torch.no_grad():
            model(x)
        for name, cell in modules.items():
            if not isinstance(cell, LMUCell):
                continue
            macs += steps * cell.memory_size**2
            if cell.spiking:
                additions += steps * rates[f"{name}.f_u"] * cell.memory_size
            else:
                # read-outs and inputs are multiplied with the weights outside of the layer that holds them
                macs += steps * (cell.memory_size + cell.W_h.weight.numel())
    finally:
        for handle in handles:
            handle.remove()
    return EnergyReport(macs / steps, additions / steps, rates)
