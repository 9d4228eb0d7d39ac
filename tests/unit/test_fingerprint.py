"""A change of bits shows, in the fingerprint of its own group alone where there are many."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dora_fx.cache import fingerprint as module
from dora_fx.cache import freshness
from dora_fx.cache.fingerprint import digest, fingerprint, fingerprints, sampled_rows
from tests.tables import every_case


def groups() -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        [torch.randn(6, 8, generator=draw)[::2], torch.randn(3, generator=draw)],
        [torch.randn(5, 7, generator=draw, dtype=torch.float64)],
        [torch.randn(4, 4, generator=draw).bfloat16(), torch.randn((), generator=draw), torch.randn(9, generator=draw)],
        # Rows that are whole words, and rows that are not.
        [sampled_rows(torch.randn(24, 4, generator=draw)), sampled_rows(torch.randn(24, 3, generator=draw))],
    ]


@every_case("words_at_once", [1, 40, 2**20])
def test_together_and_alone(monkeypatch, words_at_once):
    alone = torch.stack([fingerprint(group) for group in groups()])
    monkeypatch.setattr(module, "_WORDS_AT_ONCE", words_at_once)
    assert torch.equal(fingerprints(groups()), alone)


@every_case("changed", range(4))
def test_a_change_shows_in_its_group_alone(changed):
    now = groups()
    # Of two signs, which a sum of words would not tell.
    now[changed][0][0, :2].neg_()
    differ = fingerprints(now) != fingerprints(groups())
    assert differ.tolist() == [index == changed for index in range(4)]


def test_a_sample_has_the_fingerprint_of_its_copy():
    rows = sampled_rows(torch.randn(24, 4))
    assert torch.equal(fingerprint([rows]), fingerprint([rows.clone()]))


class CountLaunches(TorchDispatchMode):
    """Counts the operations that are no views, each of which an accelerator launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def launches_of_a_record(num_sites: int) -> int:
    """Those of recording sites on a device that has shapes alone."""
    entries = []
    for number in range(num_sites):
        lora_a, lora_b, magnitude = (torch.empty(shape, device="meta") for shape in ((4, 24), (32, 4), (32,)))
        scaling, delta, weight = (torch.empty(shape, device="meta") for shape in ((1,), (32,), (32, 24)))
        sources = [lora_a, lora_b, magnitude, scaling]
        entries.append(freshness.CacheEntry(f"site {number}", delta, sources))
        entries.append(freshness.CacheEntry(f"weight {number}", torch.empty_like(delta), [weight], frozen=True))
    with CountLaunches() as launches:
        freshness.record(entries)
    return launches.count


def test_launches_do_not_grow_with_sites():
    most = launches_of_a_record(50)
    # Constants of a length are made once.
    assert launches_of_a_record(50) == launches_of_a_record(2) < most


@every_case("changed", range(4))
def test_a_change_shows_on_a_cpu(changed):
    now = groups()
    now[changed][0][0, :2].neg_()
    differ = [digest(then) != digest(later) for then, later in zip(groups(), now, strict=True)]
    assert differ == [index == changed for index in range(4)]


@every_case("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
@every_case("shape", [(), (0,), (3, 5)])
def test_every_parameter_has_a_digest(dtype, shape):
    """Alone in its memory, as a view of more, and while it takes a gradient."""
    wide = torch.ones(*shape, 2).to(dtype)
    view = wide[..., 0]
    assert digest([view]) == digest([view.clone()])
    assert digest([torch.nn.Parameter(view)]) == digest([view])


@every_case("num_rows", [1, 7, 8, 9, 100])
@every_case("dtype", [torch.float32, torch.bfloat16])
def test_digest_of_a_sample(num_rows, dtype):
    weight = torch.randn(num_rows, 5).to(dtype)
    rows = digest([sampled_rows(weight)])
    assert digest([weight], sampled=True) == rows
    assert digest([weight.t().clone().t()], sampled=True) == rows
    weight[-1 if num_rows < 8 else 0].neg_()
    assert digest([weight], sampled=True) != rows
