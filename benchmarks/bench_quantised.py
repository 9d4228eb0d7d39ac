r"""What does a training step of a base in 4 bits cost, beside PEFT's LoRA and DoRA on the same base?

Four layers of SmolLM2-135M's shape with random weights in NF4 with double quantisation, measured as
`bench_transformers.py` measures its models; each round gives ratios to eager LoRA, which is what most people run.

    python -m pip install bitsandbytes
    python benchmarks/bench_quantised.py --json benchmarks/results/quantised.json
    python benchmarks/bench_quantised.py --quick
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from bench_model import DTYPES
from bench_transformers import LORA_EAGER, SMOLLM2, base_model, measure, parse, saved_options
from measuring import save, show

REFERENCE = LORA_EAGER


def quantised_model(folder: Path, options: argparse.Namespace, device: str) -> Any:
    """The model in a folder in NF4, every variant's alike."""
    dtype = DTYPES[options.dtype]
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=dtype, device_map=device
    )
    return model.train()


def main() -> None:
    options = parse(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        base_model(SMOLLM2, options, "cpu").save_pretrained(folder)
        make_base = partial(quantised_model, Path(folder), options, device)
        comparison = measure(make_base, REFERENCE, options, device)
    title = f"training step, {SMOLLM2} in NF4"
    print(f"\n{title}")
    show(comparison, REFERENCE)
    if options.json:
        save(options.json, {title: comparison}, bitsandbytes=bitsandbytes.__version__, **saved_options(options))


if __name__ == "__main__":
    main()
