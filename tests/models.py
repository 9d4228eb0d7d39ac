"""Builders: a model of every kind of linear layer, and a tiny Megatron GPT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import nn

import dora_fx
from dora_fx import DoRALinear

IN, OUT, DIM = 24, 40, 6
VOCAB, SEQUENCE = 64, 12


def config(**overrides: Any) -> TransformerConfig:
    """The least configuration that Megatron's layers accept on a CPU."""
    settings = dict(num_layers=1, hidden_size=IN, num_attention_heads=1, use_cpu_initialization=True)
    return TransformerConfig(**(settings | overrides))


def column(**kwargs: Any) -> ColumnParallelLinear:
    """A ColumnParallelLinear `[OUT, IN]`, without bias unless asked."""
    settings = dict(config=config(), init_method=nn.init.normal_, bias=False)
    return ColumnParallelLinear(IN, OUT, **(settings | kwargs))


def row(**kwargs: Any) -> RowParallelLinear:
    """A RowParallelLinear `[OUT, IN]`, without bias unless asked."""
    settings = dict(config=config(), init_method=nn.init.normal_, bias=False, input_is_parallel=True)
    return RowParallelLinear(IN, OUT, **(settings | {"skip_bias_add": True} | kwargs))


LINEAR_KINDS: dict[str, Callable[[], nn.Module]] = {
    "column": column,
    "column_bias_added": lambda: column(bias=True),
    "column_bias_returned": lambda: column(bias=True, skip_bias_add=True),
    "column_gather_output": lambda: column(bias=True, gather_output=True),
    "row": row,
    "row_bias_added": lambda: row(bias=True, skip_bias_add=False),
    "row_bias_returned": lambda: row(bias=True),
    "row_split_input": lambda: row(input_is_parallel=False),
    "linear": lambda: nn.Linear(IN, OUT, bias=False),
    "linear_bias": lambda: nn.Linear(IN, OUT),
    "untied_output_layer": lambda: column(gather_output=False),
    "output_layer": lambda: column(skip_weight_param_allocation=True),
}


class LinearZoo(nn.Module):
    """One layer of every kind, each with an input and an output of its own; `output_layer` is tied to `embedding`."""

    def __init__(self, kinds: list[str] | None = None) -> None:
        super().__init__()
        self.kinds = kinds or list(LINEAR_KINDS)
        self.adds_returned_bias = True
        self.embedding = nn.Embedding(OUT, IN)
        for kind in self.kinds:
            self.add_module(kind, LINEAR_KINDS[kind]())
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=1.0 if name.endswith("bias") else IN**-0.5)

    def shared_embedding_or_output_weight(self) -> nn.Parameter:
        return self.embedding.weight

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {kind: self.call_layer(kind, x) for kind, x in inputs.items()}

    def call_layer(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        """Output of one layer, with the bias that it may return apart unless `adds_returned_bias` is off."""
        kwargs = {"weight": self.embedding.weight} if kind == "output_layer" else {}
        returned = getattr(self, kind)(x, **kwargs)
        if not isinstance(returned, tuple):
            return returned
        output, bias = returned
        return output + bias if bias is not None and self.adds_returned_bias else output


def adapt_zoo(zoo: LinearZoo, *, dropout: float = 0.0) -> LinearZoo:
    """Adapt every layer and move the adapters away from the identity."""
    dora_fx.DoRA(target_modules=zoo.kinds, dim=DIM, alpha=2 * DIM, dropout=dropout)(zoo)
    randomize_adapters(zoo)
    return zoo


def sites(model: nn.Module) -> dict[str, DoRALinear]:
    """The adapted layers of a model by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, DoRALinear)}


@torch.no_grad()
def randomize_adapters(model: nn.Module, seed: int = 1) -> None:
    """Give every adapter a B that is not zero and a magnitude between half and one and a half of the norm."""
    generator = torch.Generator().manual_seed(seed)
    for site in sites(model).values():
        adapter = site.adapter
        lora_b, magnitude = adapter.linear_out.weight, adapter.weight_magnitude
        # In float64 whatever the model's dtype, so that twins of different precision get the same values.
        noise = torch.randn(lora_b.shape, generator=generator, dtype=torch.float64)
        gain = 0.5 + torch.rand(magnitude.shape, generator=generator, dtype=torch.float64)
        lora_b.copy_(noise * lora_b.shape[1] ** -0.5 * 0.3)
        magnitude.copy_(site._get_weight_norm().double() * gain.to(magnitude.device))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


GPT_TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


# SwiGLU, RMSNorm and grouped queries.
GPT_SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=F.silu,
    add_bias_linear=False,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)


def tiny_gpt(
    *, tied: bool = False, num_layers: int = 2, chunk: dict[str, Any] | None = None, **overrides: Any
) -> GPTModel:
    """A GPT as small as it gets with SwiGLU, RMSNorm, grouped queries and rotary positions, local layer spec.

    `chunk` says which part of a pipeline it is, in GPTModel's own arguments.
    """
    gpt_config = config(**(dict(num_layers=num_layers) | GPT_SHAPE | overrides))
    return GPTModel(
        config=gpt_config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=gpt_config.normalization),
        vocab_size=VOCAB,
        max_sequence_length=4 * SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        **(chunk or {}),
    )


def token_ids(length: int = SEQUENCE, batch: int = 2, seed: int = 5) -> torch.Tensor:
    """Random tokens `[batch, length]`."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Callable[..., torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[batch, length, vocabulary]` of a Megatron GPT, compiled or not."""
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return model(tokens, positions, future)
