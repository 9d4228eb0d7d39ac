"""The Triton source that Inductor generates for an H100, on a machine without a GPU.

Forward and backward are traced on the CPU, the graphs' tensors are replaced by fake ones on a CUDA device, and Inductor
lowers those; it asks for the device's properties, which are given here.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
import subprocess
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from functorch.compile import aot_function, make_boxed_func
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

H100 = dict(
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)


@contextlib.contextmanager
def h100_at_hand() -> Iterator[None]:
    """Within the context torch answers questions about an H100 as if there were one; nothing can run on it."""
    more = {"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448, "L2_cache_size": 50 << 20}
    properties = types.SimpleNamespace(
        **H100, **more, major=9, minor=0, name="H100", total_memory=80 << 30, gcnArchName=""
    )
    described = DeviceProperties(type="cuda", index=0, cc=90, major=9, **H100)
    with (
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(DeviceProperties, "create", classmethod(lambda cls, device: described)),
        mock.patch("torch._inductor.scheduler.has_triton", lambda *_, **__: True),
        mock.patch("torch.utils._triton.triton_hash_with_backend", lambda *_, **__: "no backend"),
    ):
        yield


@dataclass(frozen=True)
class Generated:
    """The ATen graph of a forward or backward pass, with fake values, and the code generated for it."""

    graph: fx.GraphModule
    source: str


def triton_source(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> tuple[str, str]:
    """Generated code of the forward and the backward pass of a function of CPU tensors, as for CUDA tensors."""
    forward, backward = generate_for_h100(function, inputs)
    return forward.source, backward.source


def generate_for_h100(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[Generated]:
    """Forward and backward pass of a function of CPU tensors, as for CUDA tensors."""
    generated: list[Generated] = []
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def lower(is_backward: bool) -> Callable[..., Any]:
        def compiler(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
            generated.append(_lower_for_cuda(copy.deepcopy(gm), example_inputs, mode, is_backward))
            return make_boxed_func(gm)

        return compiler

    compiled = aot_function(
        function,
        fw_compiler=lower(False),
        bw_compiler=lower(True),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with mode:
        output = compiled(*(mode.from_tensor(tensor) for tensor in inputs))
        output.backward(torch.empty_like(output))
    return generated


def _lower_for_cuda(
    gm: fx.GraphModule, example_inputs: list[torch.Tensor], mode: FakeTensorMode, is_backward: bool
) -> Generated:
    for node in gm.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    with mode:
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in example_inputs]
    FakeTensorProp(gm, mode).propagate(*inputs)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), h100_at_hand():
        lowering = GraphLowering(gm, example_inputs=inputs, is_inference=False, is_backward=is_backward)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            wrapper, _ = lowering.codegen()
    return Generated(gm, getattr(wrapper, "value", wrapper))


def kernel_sources(source: str) -> dict[str, str]:
    """Name -> source of the Triton kernels that generated code defines."""
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.DOTALL)
    return dict(found)


def kernel_kinds(source: str) -> list[str]:
    """What the kernels are, in the order they are called: pointwise, reduction, or a persistent one."""
    calls = source[source.index("def call(") :]
    kinds = {"poi": "pointwise", "red": "reduction", "per": "persistent reduction"}
    return [kinds[kind] for kind in re.findall(r"^\s+triton_(poi|red|per)_\w+\.run\(", calls, re.MULTILINE)]


@dataclass(frozen=True)
class CompiledKernel:
    """What NVIDIA's assembler says of one kernel on sm_90."""

    name: str
    registers: int
    spilled_bytes: int


def compile_for_h100(name: str, source: str, folder: Path) -> CompiledKernel:
    """Compile one kernel of `kernel_sources` with Triton and its own assembler; needs no driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    # Inductor's decorators choose block sizes on the device; here they only hand over what they were given.
    plain = re.sub(r"@triton_heuristics\.\w+\(", "@with_settings(", source)
    plain = plain.replace("triton_helpers.set_driver_to_gpu()", _WITH_SETTINGS)
    path = folder / f"{name}.py"
    path.write_text(plain)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, name)
    meta = kernel.settings["triton_meta"]
    [attributes] = meta["configs"]
    blocks = {"XBLOCK": 64, "R0_BLOCK": 64} if "r0_" in kernel.settings["size_hints"] else {"XBLOCK": 512}
    constants = {key: blocks[key] for key, kind in meta["signature"].items() if kind == "constexpr"}
    compiled = triton.compile(
        ASTSource(kernel, meta["signature"], constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8},
    )
    ptx = folder / f"{name}.ptx"
    ptx.write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "-arch=sm_90a", str(ptx), "-o", str(folder / f"{name}.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    [registers] = re.findall(r"Used (\d+) registers", report)
    return CompiledKernel(name, int(registers), sum(map(int, spills)))


_WITH_SETTINGS = """
def with_settings(**settings):
    def keep(kernel):
        kernel.settings = settings
        return kernel
    return keep
"""
