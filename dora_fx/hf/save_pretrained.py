"""`save_pretrained` of an adapted transformers model.

transformers would save base and adapter in one file, and load that as the base alone: it has no place for the
adapter's tensors. Adapted models get a `save_pretrained` of their own, which does what transformers does with PEFT's
adapters: it saves the adapter, and `from_pretrained` of the folder loads the base and the adapter.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_fx.attach import adapted_layers, on_attach, was_quantised
from dora_fx.hf.adapter_source import AdapterSource
from dora_fx.hf.export_adapter import checked_source
from dora_fx.hf.model_record import model_record
from dora_fx.hf.peft_files import PeftModule, write_peft_adapter
from dora_fx.megatron import NamedModule, is_transformers_model
from dora_fx.modules import quantised_weight_maybe

logger = logging.getLogger(__name__)

# What `Trainer` loads into a model when it resumes, or takes the best checkpoint.
TRAINER_FILE = "model.safetensors"


class AdapterSaver:
    """Stands in for the method `save_pretrained` of one model; of a model without adapters it is that method."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> None:
        """Save the adapter in PEFT's format, and once more under the model's own names for `Trainer` to resume from.

        Parameters that are trained beside adapters are not saved, and named in a warning.

        Args:
            save_directory: is made where it is missing; files of these names in it are replaced.
            is_main_process: else nothing is written.
            state_dict: without adapters, such as that of `iter_merged`, it is saved as the model. With adapters they
                have to be the model's, which are saved.
            settings: those of transformers' method. `max_shard_size` and what says how to talk to a hub concern no
                adapter.

        Raises:
            ValueError: a setting asks for what an adapter cannot be saved as, the adapters have several dropouts, or
                one has NaN or inf; or some layers are quantised and others merged.
        """
        record = model_record([self.model])
        if not record.sites or (state_dict is not None and not any(".adapter." in name for name in state_dict)):
            with _as_it_is_saved(self.model, state_dict):
                type(self.model).save_pretrained(
                    self.model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **settings
                )
            return
        for name, found in settings.items():
            if name in _REFUSED and found != _REFUSED[name]:
                raise ValueError(
                    f"save_pretrained: found {name}={found!r} for a model with DoRA adapters, expected "
                    f"{_REFUSED[name]!r}; dora_fx.export_hf writes the adapter alone, and within dora_fx.merged(model) "
                    "the merged model is saved"
                )
        own = _adapter_tensors(record.sites)
        _check_given(own, state_dict or {})
        source = checked_source(record, "save_pretrained")
        if is_main_process:
            modules: dict[str, PeftModule] = {}
            for layer in source.layers:
                modules.update(layer)
            _write(Path(save_directory), own, modules, source)


_REFUSED = {"push_to_hub": False, "variant": None, "save_peft_format": True, "distributed_checkpoint": False}


@on_attach
def save_adapters_with(chunk: nn.Module) -> None:
    """Give `AdapterSaver` to every transformers model in a chunk that has adapters."""
    for module in chunk.modules():
        if is_transformers_model(module) and any(True for _ in adapted_layers([module])):
            # An attribute of the instance: copies get their own, and the class is left alone.
            module.save_pretrained = AdapterSaver(module)  # type: ignore[assignment]
            if getattr(module, "is_quantized", False):
                # transformers' mark of a model with adapters, without which its Trainer refuses a quantised one.
                module._hf_peft_config_loaded = True  # type: ignore[assignment]


@contextmanager
def _as_it_is_saved(model: Any, state_dict: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Within the context transformers takes a model for one without adapters, and for a plain one if it is saved so.

    Raises:
        ValueError: some layers are quantised and others, which were merged, are not: transformers loads no such model.
    """
    quantised = [path for path, module in model.named_modules() if quantised_weight_maybe(module) is not None]
    if state_dict is not None:
        quantised = [path for path in quantised if not _is_plain(state_dict.get(f"{path}.weight"))]
    hidden = [(model, "_hf_peft_config_loaded")]
    if getattr(model, "is_quantized", False) and not quantised:
        hidden += [(model, "hf_quantizer"), (model.config, "quantization_config")]
    elif quantised and any(map(was_quantised, model.modules())):
        raise ValueError(
            f"save_pretrained: found {quantised[0]} quantised beside layers that are merged and dense, expected all of "
            "a kind, to be loaded again; pass state_dict=dict(dora_fx.iter_merged(model)) of the adapted model"
        )
    found = [(holder, name, vars(holder)[name]) for holder, name in hidden if name in vars(holder)]
    for holder, name, _ in found:
        delattr(holder, name)
    try:
        yield
    finally:
        for holder, name, value in found:
            setattr(holder, name, value)


def _is_plain(weight: Tensor | None) -> bool:
    """Return whether a weight to be saved is a matrix of numbers, and not what stands for it in a quantised layer.

    HQQ's layers have no entry of this name.
    """
    if weight is None or type(weight) not in (Tensor, nn.Parameter):
        return False
    return weight.dim() == 2 and weight.is_floating_point()


def _adapter_tensors(sites: Sequence[NamedModule]) -> dict[str, Tensor]:
    """The adapters' entries of the model's state dict, without the names of wrappers."""
    return {
        f"{named.path}.adapter.{name}": parameter.detach()
        for named in sites
        for name, parameter in named.module.adapter.named_parameters()
    }


def _check_given(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for name, tensor in given.items():
        if name in own and not torch.equal(tensor.to(own[name]), own[name]):
            raise ValueError(
                f"save_pretrained: found another {name} in state_dict than in the model, expected the same; load it "
                "into the model first"
            )


def _write(folder: Path, own: Mapping[str, Tensor], modules: Mapping[str, PeftModule], source: AdapterSource) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_peft_adapter(
        folder,
        modules,
        all_paths=source.all_paths,
        dropout=source.dropout,
        base_model=source.base_model,
        task_type=source.task_type,
        for_transformers=True,
    )
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in own.items()}, folder / TRAINER_FILE, {"format": "pt"}
    )
    if source.base_model is None:
        logger.warning(
            "%s: the model has no name that its base could be loaded by; from_pretrained needs base_model_name_or_path "
            "in adapter_config.json",
            folder,
        )
