"""Tiny Hugging Face models with random weights: every supported architecture, and a directory with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from dora_fx.checkpoint import read_adapters

SHAPE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    # Frequencies on both sides of where the scaling begins, and between.
    rope_theta=5e5,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)

# Every one differs from the others in something that the conversion must carry over.
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama_tied": (transformers.LlamaConfig, dict(tie_word_embeddings=True)),
    "llama_wide_heads": (transformers.LlamaConfig, dict(head_dim=16)),
    "llama_one_group": (transformers.LlamaConfig, dict(num_key_value_heads=1)),
    "llama_rope_base": (
        transformers.LlamaConfig,
        dict(rope_parameters=dict(rope_type="default", rope_theta=123.0)),
    ),
    "llama_rope_llama3": (transformers.LlamaConfig, dict(rope_parameters=_LLAMA3_ROPE)),
    "llama_rope_linear": (
        transformers.LlamaConfig,
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0)),
    ),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=16)),
    # Its own default is a token that the tiny vocabulary has not.
    "phi3": (transformers.Phi3Config, dict(pad_token_id=None, eos_token_id=0)),
}
# With experts in every layer. The size of a dense MLP, which no layer has, is another than theirs.
_EXPERTS: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, head_dim=16)
MOE_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen3_moe": (transformers.Qwen3MoeConfig, dict(_EXPERTS, norm_topk_prob=True)),
    # Of probabilities that do not sum to one.
    "qwen3_moe_unnormalised": (transformers.Qwen3MoeConfig, dict(_EXPERTS, norm_topk_prob=False)),
    "mixtral": (transformers.MixtralConfig, dict(num_local_experts=4, num_experts_per_tok=2)),
}


def tiny_hf_config(kind: str = "llama", **overrides: Any) -> Any:
    """A transformers config from `CONFIGS` or `MOE_CONFIGS`."""
    config_class, settings = (CONFIGS | MOE_CONFIGS)[kind]
    return config_class(**(SHAPE | settings | overrides))


def tiny_hf_model(kind: str = "llama", seed: int = 3, **overrides: Any) -> Any:
    """A transformers model with random weights, norms and biases among them, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_config(
        tiny_hf_config(kind, **overrides), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0 + 0.3 * noise)
    return model.eval()


def finetune_inputs(folder: Path, *options: object, kind: str = "llama", **overrides: Any) -> list[str]:
    """Write a tiny base model and a text to learn; return the `dora-fx finetune` options that use them, and `options`.

    `overrides` are for the model's config.
    """
    save_tiny_checkpoint(folder / "base", kind, **overrides)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 30)
    inputs = ["--base", folder / "base", "--data", folder / "text.txt", "--device", "cpu"]
    sizes = ["--sequence-length", 32, "--batch-size", 2, "--sample-tokens", 4]
    return [str(part) for part in (*inputs, *sizes, *options)]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    """The whole adapter tensors of a run's checkpoint, by their names in the Megatron model."""
    layers = read_adapters(run / "checkpoint")
    return {f"{path}.adapter.{name}": value for path, layer in layers.items() for name, value in layer.tensors.items()}


def tiny_tokenizer(template: str = "$A") -> Any:
    """A tokenizer whose tokens are the commonest ASCII characters, 63 in all.

    Args:
        template: of what `tokenizer(text)` gives, with <b> for the start token and <e> for the end token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    characters = "<e>", *" \n.,-'()abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", "?", "<b>"
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = [(token, vocabulary[token]) for token in ("<b>", "<e>") if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<b>", eos_token="<e>", unk_token="?"
    )


def save_tiny_checkpoint(folder: Path, kind: str = "llama", seed: int = 3, **overrides: Any) -> Path:
    """Write a tiny model with 64 tokens and its tokenizer."""
    tiny_tokenizer().save_pretrained(folder)
    tiny_hf_model(kind, seed, **overrides).save_pretrained(folder)
    return folder
