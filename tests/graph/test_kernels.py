"""DoRA's elementwise work is fused: it costs no kernel more than LoRA forward, and one more backward."""

from __future__ import annotations

import pytest
import torch

from benchmarks.variants import with_dora, with_lora
from tests.graph.kernel_counts import KernelCounts, kernel_counts
from tests.graph.sites import DIM, IN, OneLinear, column, row

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layer", [column, row])
def test_kernels_of_a_site(tensor_parallel, layer):
    tensor_parallel(1)
    x = torch.randn(6, 2, IN, requires_grad=True)
    lora = kernel_counts(with_lora(OneLinear(layer()), DIM, ["linear"]), x, backend="inductor")
    dora = kernel_counts(with_dora(OneLinear(layer()), DIM, ["linear"]), x, backend="dora_fx")
    # Forward: the low-rank product's scaling, and everything that follows the products. Backward: what follows the
    # gradient of the output, the scaling again, and the sum of the two input gradients.
    assert lora == (KernelCounts(3, 2, 0), KernelCounts(5, 2, 0))
    assert dora == (KernelCounts(3, 2, 0), KernelCounts(5, 3, 1))
