"""Compile a model of Megatron or transformers through the dora_fx backend, with as few graphs as it can do with."""

from __future__ import annotations

import weakref
from typing import Any, Literal, get_args

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_layer import BaseTransformerLayer
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils._pytree import tree_map_only

from dora_fx.experts_compilation import compile_experts, moe_layers
from dora_fx.megatron import (
    ModelT,
    chunks_of,
    derives_from,
    is_transformers_layer,
    is_transformers_model,
    unwrap,
    walk,
)
from dora_fx.modules import is_grouped_linear, set_call_check
from dora_fx.transformers_calls import compile_layer, compile_whole, leave_out_caches

Scope = Literal["layer", "model"]

_compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compile_model(
    model: ModelT,
    scope: Scope = "layer",
    *,
    fullgraph: bool | None = None,
    dynamic: bool | None = None,
    mode: str | None = None,
    **options: Any,
) -> ModelT:
    """Compile a Megatron or transformers model in place through `backend="dora_fx"`, at its next calls; return it.

    It is compiled in place, so names, state dicts and checkpoints stay as they are. Adapters may be attached before or
    after. All layers of a kind share a graph, and sequence lengths that change cause at most one more. For a Megatron
    model, hooks see to that:

    - the embedding's output is copied, since with one sequence in the batch it is a view, which Megatron copies in
      a way that Dynamo does not trace; with `scope="layer"` it also requires a gradient, as the input of all other
      layers does, at the price of one layer's gradient of its input;
    - with `scope="layer"`, Megatron's buffer for attention scores is allocated before compiled code writes into it;
      rotary positions that Megatron keeps from a call in inference mode are copied for training.

    A mixture-of-experts layer is left uncompiled but for its experts, which share their graphs, and the layers around
    it break their graphs there (`experts_compilation.py`). For grouped experts that is what their adapters add, with
    numbers of tokens that are dynamic whatever `dynamic` is.

    A transformers model is called as it always is. In calls without a cache of keys and values its layers are compiled,
    gradient checkpointing included, and the input of the first one that is trained requires a gradient. Calls with a
    cache (`generate`), or that return hidden states or attentions, run uncompiled. transformers makes a cache in every
    call that does not say; a compiled model makes none in a call in training mode with gradients, nor in one with
    labels, unless `use_cache=True` or a cache is passed. Evaluate with labels or `use_cache=False`.

    Compiling changes settings of Dynamo for the whole process, see `megatron.dynamo_settings`; importing `dora_fx` and
    attaching adapters do not.

    Args:
        model: a model, or a list or a tuple of model chunks, bare or wrapped.
        scope: "layer" compiles each transformer layer by itself: short compilation, whatever the depth. "model" makes
            one graph of each chunk.
        fullgraph: raise where Dynamo would break a graph, in place of running a part uncompiled. The default is to
            raise, but for models with Transformer Engine's attention, which breaks graphs where it chooses to, for
            layers with experts, and for those of transformers, whose code has no such promise.
        dynamic, mode: as in `torch.compile`.
        options: of the backend (`inner_compiler`, `weight_norm`, `unmatched`, `rank_timeout`), or Inductor's.

    Raises:
        ValueError: `scope` is neither, a chunk has no transformer layer to compile, it is compiled already, or it has
            mixture-of-experts layers and `fullgraph` is True, or grouped experts and a `weight_norm` other than
            "once_per_step". Options raise as in `dora_fx.backend.dora_fx`. Nothing is changed then.
    """
    from dora_fx.backend import BackendOptions, dora_fx

    if scope not in get_args(Scope):
        raise ValueError(f"scope: found {scope!r}, expected one of {list(get_args(Scope))}")
    # torch.compile takes a mode or options, and the backend both.
    options = {**options, "mode": mode} if mode is not None else options
    chosen = BackendOptions.of(options)
    chunks = [unwrap(chunk) for chunk in chunks_of(model)]
    for chunk in chunks:
        _check_compilable(chunk, scope, fullgraph, chosen.weight_norm)
    for chunk in chunks:
        is_whole = not _may_break_graphs(chunk) if fullgraph is None else fullgraph
        settings = {"backend": dora_fx, "fullgraph": is_whole, "dynamic": dynamic, "options": options}
        _compile_chunk(chunk, scope, settings)
        # Where norms are computed in the graphs, nobody reads those of a check.
        computes_norms = chosen.weight_norm == "every_call"
        set_call_check(chunk, rank_timeout=chosen.rank_timeout, leaves_it_to_layers=computes_norms)
    return model


def _layers(chunk: nn.Module) -> list[nn.Module]:
    """Return the transformer layers, each inside its activation checkpointing if it has one.

    The checkpointing is compiled with the layer. Around a compiled layer it would compare the tensors that the two
    calls save, and the graphs of the forward pass and of the recomputation save different ones.
    """
    wrappers = {
        unwrap(module): module for module in reversed(list(chunk.modules())) if isinstance(module, ActivationWrapper)
    }
    layers: list[nn.Module] = []
    within: set[nn.Module] = set()
    for named in walk(chunk):
        layer = named.module
        # Some encoders of transformers have stages that are layers by their class, and hold layers.
        if _is_layer(layer) and layer not in within:
            layers.append(layer)
            within.update(layer.modules())
    return [wrappers.get(layer, layer) for layer in layers]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, BaseTransformerLayer) or is_transformers_layer(module)


def _check_compilable(chunk: nn.Module, scope: Scope, fullgraph: bool | None, weight_norm: str) -> None:
    if scope == "layer" and not _layers(chunk):
        raise ValueError(
            f"model: found no transformer layer in a {type(chunk).__name__}, expected at least one; "
            "scope='model' compiles it as a whole"
        )
    if chunk in _compiled:
        raise ValueError(f"model: found a {type(chunk).__name__} that is compiled already, expected one that is not")
    if fullgraph and (layers := [named.whole_path for named in walk(chunk) if moe_layers([named.module])]):
        raise ValueError(
            f"{layers[0]}: found fullgraph=True and a mixture-of-experts layer, expected None or False: a graph ends "
            "where tokens are routed to experts"
        )
    grouped = [named.whole_path for named in walk(chunk) if is_grouped_linear(named.module)]
    if grouped and weight_norm != "once_per_step":
        raise ValueError(
            f"{grouped[0]}: found weight_norm={weight_norm!r} and a layer that holds several experts, expected "
            "'once_per_step': what is compiled for it reads cached norms"
        )


def _may_break_graphs(chunk: nn.Module) -> bool:
    """Return whether a model has Transformer Engine's attention, or layers of transformers."""
    return any(
        derives_from(module, "TEDotProductAttention") or is_transformers_model(module) for module in chunk.modules()
    )


def _compile_chunk(chunk: nn.Module, scope: Scope, settings: dict[str, Any]) -> None:
    _compiled.add(chunk)
    _prepare_megatron_modules(chunk, scope)
    compile_experts(moe_layers(chunk.modules()), settings)
    if scope == "model" and is_transformers_model(chunk):
        compile_whole(chunk, settings)
    elif scope == "model":
        chunk.compile(**_settings_for(chunk, settings))
    else:
        leave_out_caches(chunk)
        for layer in _layers(chunk):
            if is_transformers_layer(unwrap(layer)):
                compile_layer(layer, settings)
            else:
                layer.compile(**_settings_for(layer, settings))


def _settings_for(module: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a module's graphs, which end where tokens are routed to experts."""
    return {**settings, "fullgraph": False} if moe_layers(module.modules()) else settings


def _prepare_megatron_modules(chunk: nn.Module, scope: Scope) -> None:
    """Register the hooks that `compile_model` documents, where a chunk has the modules that they are for."""
    modules = [named.module for named in walk(chunk)]
    embedding_hook = as_a_fresh_tensor if scope == "model" else like_a_layer_output
    for module in modules:
        if isinstance(module, LanguageModelEmbedding):
            module.register_forward_hook(embedding_hook)
        # Buffers that grow are part of a whole model's graph, and cause no further recompilations.
        if isinstance(module, RotaryEmbedding) and scope == "layer":
            module.register_forward_hook(_as_ordinary_tensors)
    if scope == "layer" and any(isinstance(module, DotProductAttention) for module in modules):
        chunk.register_forward_pre_hook(_allocate_buffers, with_kwargs=True)


def as_a_fresh_tensor(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Copy the hidden states, which with one sequence in the batch are a view: a transposed embedding.

    Megatron would copy a view itself, through `torch.empty(..., requires_grad=True)`, which Dynamo does not trace.
    """
    return output.clone(memory_format=torch.contiguous_format)


def like_a_layer_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Give the first layer's input what the other layers' inputs have, so that one graph serves them all.

    That is a gradient, which a frozen embedding does not ask for, and the strides of a tensor that is no view.
    """
    output = as_a_fresh_tensor(module, inputs, output)
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _as_ordinary_tensors(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Copy what Megatron keeps from a call in inference mode, which autograd does not take in a later one."""
    if torch.is_inference_mode_enabled():
        return output
    return tree_map_only(Tensor, lambda kept: kept.clone() if kept.is_inference() else kept, output)


@torch.inference_mode(False)
def _allocate_buffers(chunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the buffer that Megatron shares among attentions and gathers be large enough before it is traced.

    Megatron's local attention takes its scores `[b * heads/tp, s, s]`, and a gather its output `[s, b, h]`, from one
    buffer that grows when it must. Dynamo guards on what it was.
    """
    tokens = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() == 2]
    attentions = [module for module in chunk.modules() if isinstance(module, DotProductAttention)]
    if not tokens or not attentions:
        return
    batch, sequence = tokens[0].shape
    for attention in attentions:
        config, heads = attention.config, attention.num_attention_heads_per_partition
        size = max(batch * heads * sequence * sequence, sequence * batch * config.hidden_size)
        parallel_state.get_global_memory_buffer().get_tensor((size,), config.params_dtype, "mpu")
