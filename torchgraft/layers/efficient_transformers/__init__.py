"""The attentions and general methods of "A Practical Survey on Faster and Lighter Transformers" (arXiv 2103.14636)."""

from torchgraft.layers.efficient_transformers.attention import (
    DROP_IN,
    KINDS,
    attention_pattern,
    efficient_attention,
    flex_block_mask,
    register_efficient_attention,
    register_efficient_attentions,
)
from torchgraft.layers.efficient_transformers.blocks import AdaptiveDepth, EvolvedBlock, SHARNNBlock
from torchgraft.layers.efficient_transformers.convert import Converted, convert_attention
from torchgraft.layers.efficient_transformers.costs import Advice, CostModel, Costs, advise
from torchgraft.layers.efficient_transformers.dense import dense_equivalent
from torchgraft.layers.efficient_transformers.gates import L0HeadGates, finish_low_bits, low_bit_weights
from torchgraft.layers.efficient_transformers.general import (
    ChunkedFFN,
    EarlyExit,
    LayerDrop,
    MovementPruner,
    PrimerConv,
    ReversibleBlock,
    SquaredReLU,
    SwitchFFN,
    checkpointed,
    chunk_ffn,
    cubic_sparsity,
    distil,
    distillation_loss,
    factorise_embedding,
    head_importance,
    make_reversible,
    n_of_m_prune,
    prune_heads,
    prune_magnitude,
    replaced_token_loss,
    share_layers,
    switch_balance,
)
from torchgraft.layers.efficient_transformers.kernels import gaussian_features, kernel_attention, kernel_step
from torchgraft.layers.efficient_transformers.mixing import fourier_mixing, light_convolution
from torchgraft.layers.efficient_transformers.modules import LAYER_KINDS, CompressiveMemory, EfficientAttention

__all__ = [
    "DROP_IN", "KINDS", "LAYER_KINDS", "AdaptiveDepth", "Advice", "ChunkedFFN", "CompressiveMemory", "Converted",
    "CostModel", "Costs", "EarlyExit", "EfficientAttention", "EvolvedBlock", "L0HeadGates", "LayerDrop",
    "MovementPruner", "PrimerConv", "ReversibleBlock", "SHARNNBlock", "SquaredReLU", "SwitchFFN", "advise",
    "attention_pattern", "checkpointed", "chunk_ffn", "convert_attention", "cubic_sparsity", "dense_equivalent",
    "distil", "distillation_loss", "efficient_attention", "factorise_embedding", "finish_low_bits",
    "flex_block_mask", "fourier_mixing", "gaussian_features", "head_importance", "kernel_attention", "kernel_step",
    "light_convolution", "low_bit_weights", "make_reversible", "n_of_m_prune", "prune_heads", "prune_magnitude",
    "register_efficient_attention", "register_efficient_attentions", "replaced_token_loss", "share_layers",
    "switch_balance",
]  # fmt: skip
