"""LMUFormer by transformers' conventions, fed by the feature extractor of AST (log-mel, frames of 10 ms)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForAudioClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from torchgraft.layers.lmuformer.memory import LegendreMemory
from torchgraft.layers.lmuformer.model import LMUFormer, Patch

__all__ = ["LMUFormerConfig", "LMUFormerForAudioClassification"]


class LMUFormerConfig(PreTrainedConfig):
    """Sizes of an ``LMUFormer``; the arguments are its own, ``num_labels`` its classes.

    The defaults are the paper's for Speech Commands, for which its authors normalise by mean -6.845978 and twice the
    deviation 5.5654526: ``ASTFeatureExtractor(max_length=128, mean=-6.845978, std=5.5654526)``.

    Example:
        >>> LMUFormerConfig(num_labels=35).hidden_size
        256
    """

    model_type = "lmuformer"

    def __init__(
        self,
        num_mel_bins: int = 128,
        hidden_size: int = 256,
        num_hidden_layers: int = 1,
        mlp_ratio: float = 4.0,
        theta: float = 128,
        spiking: bool = False,
        patch: Patch | None = None,
        causal_conv: bool = False,
        attention_heads: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_mel_bins, self.hidden_size, self.num_hidden_layers = num_mel_bins, hidden_size, num_hidden_layers
        self.mlp_ratio, self.theta, self.spiking, self.patch = mlp_ratio, theta, spiking, patch
        self.causal_conv, self.attention_heads = causal_conv, attention_heads
        super().__init__(**kwargs)


class LMUFormerForAudioClassification(PreTrainedModel):
    """An ``LMUFormer`` that saves, loads and trains as models of transformers do.

    ``model.lmuformer`` is the network; stream with its ``initial_state``, ``step`` and ``finish``.

    Example:
        >>> import torch
        >>> model = LMUFormerForAudioClassification(LMUFormerConfig(num_mel_bins=16, hidden_size=8, num_labels=3))
        >>> model(torch.randn(2, 50, 16), labels=torch.tensor([0, 2])).logits.shape
        torch.Size([2, 3])
    """

    config_class = LMUFormerConfig
    base_model_prefix = "lmuformer"
    main_input_name = "input_values"

    def __init__(self, config: LMUFormerConfig) -> None:
        super().__init__(config)
        self.lmuformer = LMUFormer(
            config.num_mel_bins, config.num_labels, config.hidden_size, config.num_hidden_layers, config.mlp_ratio,
            config.theta, config.spiking, config.patch, config.causal_conv, config.attention_heads,
        )  # fmt: skip
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The network has initialised itself; its fixed matrices are made anew, which loading leaves empty."""
        if isinstance(module, LegendreMemory):
            module._restore(self.device)

    def forward(
        self,
        input_values: Float[Tensor, "B L F"],
        attention_mask: Int[Tensor, "B L"] | None = None,
        labels: Int[Tensor, " B"] | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits, and the cross-entropy with ``labels``.

        Args:
            input_values: spectrograms, (batch, frames, mel bins).
            attention_mask: 1 where there are frames; they must come first in each row.
            labels: classes.
            return_dict: as in transformers.

        Raises:
            ValueError: for a mask with holes or with padding at the left, and as ``LMUFormer``.
        """
        lengths = None
        if attention_mask is not None:
            lengths = attention_mask.sum(1)
            if bool((attention_mask.diff(dim=1) > 0).any()):
                raise ValueError("attention_mask must be ones and then zeros in each row; pad at the right")
        logits = self.lmuformer(input_values, lengths)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(LMUFormerConfig.model_type, LMUFormerConfig, exist_ok=True)
AutoModelForAudioClassification.register(LMUFormerConfig, LMUFormerForAudioClassification, exist_ok=True)
