"""Mixed batches: each sample or token gets what it gets with its adapter alone, and so do the adapters' gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import dora_fx
from dora_fx import DoRA
from dora_fx.cache import parameter_cache
from dora_fx.function import formula, mixture
from tests.hf_models import tiny_hf_model
from tests.mixing import Mixing, Outputs, assert_all_apart, own_gradients, parameters_of
from tests.models import GPT_TARGETS, VOCAB, column, randomize_adapters, tiny_gpt, trainable
from tests.tables import every_case

pytestmark = pytest.mark.usefixtures("world")

SAMPLES, TOKENS = 4, 6
ADAPTERS: dict[str, dict[str, Any]] = {
    "policy": dict(dim=6, alpha=12),
    "reward": dict(dim=4, alpha=4),
    "unused": dict(dim=6, alpha=3),
}
# An adapter of each sample, and of each token of two sequences packed into one.
IDS = ["reward", "policy", None, "policy"]
PACKED = [["reward"] * 5 + ["policy"] * (SAMPLES * TOKENS - 8) + [None] * 3]


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8)).double()


def attach_all(model: nn.Module, targets: list[str], **dora: Any) -> nn.Module:
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        dora_fx.add_adapter(model, name, DoRA(targets, **(settings | dora)))
        dora_fx.set_adapter(model, name)
        randomize_adapters(model, seed)
    return dora_fx.set_adapter(model, "policy")


def gpt(**dora: Any) -> nn.Module:
    torch.manual_seed(0)
    return attach_all(tiny_gpt().double(), GPT_TARGETS, **dora)


def llama(**dora: Any) -> nn.Module:
    model = tiny_hf_model("llama").double()
    model.config.use_cache = False
    return attach_all(model, ["q_proj", "o_proj", "gate_proj", "down_proj"], **dora)


def plain(**dora: Any) -> nn.Module:
    torch.manual_seed(0)
    return attach_all(linears(), ["0", "2"], **dora)


MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": gpt, "llama": llama, "plain": plain}


def caller(kind: str, model: Any, ids: list[Any], seed: int = 3) -> Callable[[], Outputs]:
    """Return a function that calls the model, or what was compiled of it, with a batch of the ids' shape."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SAMPLES, TOKENS) if ids is not PACKED else (1, SAMPLES * TOKENS)
    tokens = torch.randint(0, VOCAB, shape, generator=generator)
    hidden = torch.randn(*shape, 6, generator=generator, dtype=torch.float64)

    # Packed sequences do not see each other.
    own = [[value == other for other in ids[0]] for value in ids[0]] if ids is PACKED else True
    seen = torch.ones(shape[1], shape[1], dtype=torch.bool).tril() & torch.tensor(own)
    positions = torch.arange(shape[1]).expand(shape)

    def call() -> Outputs:
        # The same dropout in every call.
        torch.manual_seed(seed)
        if kind == "gpt":
            return {"logits": model(tokens, positions, ~seen[None, None])}
        if kind == "llama":
            attention_mask = torch.where(seen, 0.0, -1e30).double().expand(shape[0], 1, *seen.shape)
            return {"logits": model(tokens, attention_mask=attention_mask, position_ids=positions).logits}
        return {"logits": model(hidden)}

    return call


def masks(ids: list[Any]) -> dict[str | None, Outputs]:
    rows = ids if ids is PACKED else [[value] for value in ids]
    names = {value for row in rows for value in row}
    return {
        name: {"logits": torch.tensor([[float(value == name) for value in row] for row in rows])[..., None].double()}
        for name in names
    }


def compare(kind: str, ids: list[Any], model: nn.Module, called: Any = None) -> Mixing:
    """Compare a mixed batch with each adapter alone in eager code; `called` is what was compiled of the model."""
    mixing = Mixing(model, caller(kind, model, ids), masks(ids))
    with dora_fx.mixed(model, ids):
        outputs = caller(kind, model if called is None else called, ids)()
    mixing.check(outputs)
    return mixing


@every_case("kind", list(MODELS))
@every_case("ids", [IDS, PACKED, ["policy"] * SAMPLES, [None] * SAMPLES])
@every_case("dropout", [0.0, 0.3])
def test_each_gets_what_it_does_alone(kind: str, ids: list[Any], dropout: float) -> None:
    model = MODELS[kind](dropout=dropout).train()
    mixing = compare(kind, ids, model)
    assert_all_apart(list(mixing.expected_of.values()))
    assert dora_fx.active_adapter(model) == "policy"
    assert all(site._mixture is None for site in model.modules() if isinstance(site, dora_fx.DoRALinear))


def test_adapters_with_and_without_dropout() -> None:
    model = plain()
    with dora_fx.adapter(model, "reward"):
        for site in (model[0], model[2]):
            site.adapter.dropout = 0.4
    compare("plain", IDS, model.train())
    compare("plain", IDS, model.eval())


def test_numbers_and_tensors_count_the_given_adapters() -> None:
    model, names = plain(), ["unused", "reward", "policy"]
    call = caller("plain", model, IDS)
    with dora_fx.mixed(model, IDS):
        expected = call()["logits"]
    for ids in ([1, 2, -1, 2], torch.tensor([1, 2, -1, 2]), torch.tensor([1, 2, -1, 2], dtype=torch.int32)):
        with dora_fx.mixed(model, ids, adapters=names):
            assert torch.equal(call()["logits"], expected)


def test_samples_in_one_dimension_with_their_tokens() -> None:
    model, flat = plain(), torch.randn(SAMPLES * TOKENS, 6, dtype=torch.float64)
    with dora_fx.mixed(model, IDS):
        expected = model(flat.view(SAMPLES, TOKENS, 6)).flatten(0, 1)
        torch.testing.assert_close(model(flat), expected, rtol=1e-13, atol=1e-13)


def compiled(kind: str, model: nn.Module, inner: str) -> Any:
    if kind in ("llama", "gpt"):
        # One graph of all layers of transformers' kind, and one of a whole Megatron model.
        scope: Any = "layer" if kind == "llama" else "model"
        return dora_fx.compile_model(model, scope, inner_compiler=inner)
    return torch.compile(model, backend="dora_fx", fullgraph=True, options={"inner_compiler": inner})


def check_compiled(kind: str, inner: str, packed: bool) -> None:
    model, ids = MODELS[kind](), PACKED if packed else IDS
    # The first call allocates a buffer of Megatron's, which Dynamo guards on.
    compare(kind, ids, model)
    torch._dynamo.reset()
    counters.clear()
    mixing = Mixing(model, caller(kind, model, ids), masks(ids))
    called = compiled(kind, model, inner)
    others = (
        [[["unused"] * SAMPLES * TOKENS]] if packed else [["unused", "policy", "policy", None], ["reward"] * SAMPLES]
    )
    for active in ("policy", "unused"):
        dora_fx.set_adapter(model, active)
        for each in (ids, *others):
            with dora_fx.mixed(model, each):
                outputs = caller(kind, called, ids)()
            if each is ids:
                mixing.check(outputs)
            else:
                Mixing.loss(outputs).backward()
                for parameters in mixing.parameters.values():
                    own_gradients(parameters)
    assert counters["dora_fx"]["graphs_compiled"] == 1


@every_case("packed", [False, True])
def test_one_graph_for_all_batches_of_the_same_adapters(packed: bool) -> None:
    check_compiled("plain", "aot_eager", packed)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind,inner", [("gpt", "aot_eager"), ("llama", "aot_eager"), ("plain", "inductor")])
def test_one_graph_in_models(kind: str, inner: str, packed: bool) -> None:
    check_compiled(kind, inner, packed)


def test_other_backends_compute_the_same() -> None:
    model = plain()
    compare("plain", IDS, model, torch.compile(model, backend="aot_eager", fullgraph=True))


def test_an_optimizer_of_all_adapters_leaves_those_without_samples_alone() -> None:
    model = plain()
    groups = []
    for name in dora_fx.adapter_names(model):
        with dora_fx.adapter(model, name):
            groups += dora_fx.parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    for ids in (["unused"] * SAMPLES, IDS, IDS):
        before = {name: [p.clone() for p in parameters_of(model, name).values()] for name in ADAPTERS}
        with dora_fx.mixed(model, ids):
            outputs = caller("plain", model, ids)()
        Mixing.loss(outputs).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, values in before.items():
            same = [torch.equal(a, b) for a, b in zip(values, parameters_of(model, name).values(), strict=True)]
            assert all(same) if name not in ids else not any(same)


def test_norms_are_computed_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, computed = plain(), []
    complete = parameter_cache.complete_parameters
    monkeypatch.setattr(
        parameter_cache, "complete_parameters", lambda sites: computed.append(len(sites)) or complete(sites)
    )
    for _ in range(3):
        for ids in (IDS, ["unused"] * SAMPLES):
            with dora_fx.mixed(model, ids):
                Mixing.loss(caller("plain", model, ids)()).backward()
    # Two layers of three adapters.
    assert sum(computed) == 6


def test_an_adapter_that_is_not_finite_leaves_other_samples_alone() -> None:
    model = plain()
    mixing = Mixing(model, caller("plain", model, IDS), masks(IDS))
    with torch.no_grad():
        for parameter in parameters_of(model, "reward").values():
            parameter.fill_(float("nan"))
    with dora_fx.mixed(model, IDS):
        outputs = caller("plain", model, IDS)()["logits"]
    Mixing.loss({"logits": outputs}).backward()
    assert outputs[0].isnan().all()
    torch.testing.assert_close(outputs[1:].detach(), mixing.outputs["logits"][1:], rtol=1e-13, atol=1e-13)
    for key, expected in mixing.gradients["policy"].items():
        found = parameters_of(model, "policy")[key].grad
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_generation_with_a_cache() -> None:
    model = llama().eval()
    prompts = torch.randint(0, VOCAB, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(3))

    def answers(num_beams: int = 1) -> torch.Tensor:
        return model.generate(prompts, max_new_tokens=4, do_sample=False, num_beams=num_beams, use_cache=True)

    with dora_fx.mixed(model, IDS):
        found = answers()
        with pytest.raises(ValueError, match="found an input of 8 samples, expected one that fits the ids"):
            answers(num_beams=2)
    for index, name in enumerate(IDS):
        with dora_fx.disable_adapter(model) if name is None else dora_fx.adapter(model, name):
            assert torch.equal(answers()[index], found[index])


def test_without_gradients() -> None:
    model = plain()
    for enter in (torch.no_grad, torch.inference_mode):
        with enter(), dora_fx.mixed(model, IDS):
            within = caller("plain", model, IDS)()["logits"]
        with dora_fx.mixed(model, IDS), enter():
            assert torch.equal(caller("plain", model, IDS)()["logits"], within)
    compare("plain", IDS, model)


def test_a_frozen_adapter_stays_frozen() -> None:
    model = plain()
    for parameter in parameters_of(model, "reward").values():
        parameter.requires_grad_(False)
    with dora_fx.mixed(model, IDS):
        outputs = caller("plain", model, IDS)()
    Mixing.loss(outputs).backward()
    with dora_fx.adapter(model, "reward"):
        assert not trainable(model) and all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in parameters_of(model, "policy").values())


@every_case("use_reentrant", [False, True])
def test_a_batch_that_ends_before_the_backward_pass_of_a_checkpoint(use_reentrant: bool) -> None:
    model = plain()
    x = torch.randn(SAMPLES, TOKENS, 6, dtype=torch.float64, requires_grad=True)

    def loss() -> torch.Tensor:
        return checkpoint(model, x, use_reentrant=use_reentrant).square().sum()

    with dora_fx.mixed(model, IDS):
        model(x).square().sum().backward()
        expected, x.grad = x.grad, None
        loss().backward()
        assert torch.equal(x.grad, expected)
        late = loss()
    with pytest.raises(RuntimeError, match=r"found adapter 'policy' active where .* repeats a call of 'mixed batch"):
        late.backward()
    with dora_fx.mixed(model, IDS):
        late = loss()
    with (
        dora_fx.mixed(model, ["policy"] * SAMPLES),
        pytest.raises(RuntimeError, match=r"found adapter 'mixed batch \d+' active where .* of 'mixed batch \d+'"),
    ):
        late.backward()
    late = loss()
    with dora_fx.mixed(model, IDS), pytest.raises(RuntimeError, match="repeats a call of 'policy'"):
        late.backward()


def mix(ids: Any, adapters: Any = None, model: nn.Module | None = None, x: Any = None) -> None:
    """Mix a batch of `SAMPLES` samples, or of the given input."""
    model = plain() if model is None else model
    with dora_fx.mixed(model, ids, adapters):
        model(torch.randn(SAMPLES, TOKENS, 6, dtype=torch.float64) if x is None else x)


def within(action: Callable[[nn.Module], Any]) -> None:
    model = plain()
    with dora_fx.mixed(model, IDS):
        action(model)


def with_other_targets() -> nn.Module:
    return dora_fx.add_adapter(plain(), "first layer", DoRA(["0"], dim=2))


def with_a_wrapper_of_one() -> nn.Module:
    model = gpt()
    DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    return model


def gradients_within() -> None:
    model = plain()
    with torch.no_grad(), dora_fx.mixed(model, IDS), torch.enable_grad():
        caller("plain", model, IDS)()


def merged_mix() -> None:
    model = plain()
    with dora_fx.merged(model):
        mix(IDS, model=model)


def disabled_mix() -> None:
    model = plain()
    with dora_fx.disable_adapter(model):
        mix(IDS, model=model)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (lambda: mix(["polic"] * SAMPLES), "ids: found 'polic', expected one of .*'policy'"),
    "unknown adapter": (lambda: mix(IDS, ["polic"]), "adapter 'polic': found no such adapter"),
    "not among": (lambda: mix(IDS, ["policy"]), "ids: found 'reward', expected one of"),
    "twice": (lambda: mix(IDS, ["policy", "policy"]), "adapters: found .* expected a list of different names"),
    "a name": (lambda: mix(IDS, "policy"), "adapters: found 'policy', expected a list"),
    "no adapters": (lambda: mix(IDS, model=linears()), "adapters: found none"),
    "numbers alone": (lambda: mix([0] * SAMPLES), "ids: found the number 0, expected names, or `adapters`"),
    "number": (lambda: mix([3] * SAMPLES, list(ADAPTERS)), "ids: found 3, expected one of"),
    "negative": (lambda: mix([-2] * SAMPLES, list(ADAPTERS)), "ids: found -2, expected one of"),
    "bool": (lambda: mix([True] * SAMPLES, list(ADAPTERS)), "ids: found True, expected one of"),
    "floats": (lambda: mix(torch.zeros(SAMPLES), list(ADAPTERS)), "ids: found a tensor of torch.float32"),
    "one id": (lambda: mix("policy"), "ids: found 'policy', expected a list or tensor"),
    "empty": (lambda: mix([]), r"ids: found \[\], expected a list or tensor"),
    "ragged": (lambda: mix([["policy"], ["policy"] * 2]), "ids: found .* expected a list or tensor"),
    "three dimensions": (lambda: mix([[["policy"]]]), r"ids: found \['policy'\], expected one of"),
    "length": (lambda: mix(IDS[:3]), r"^0: found an input of 4 samples, expected one that fits the ids .* \(3,\)"),
    "tokens": (lambda: mix([["policy"] * 7] * SAMPLES), r"^0: found an input of \(4, 6\) tokens, expected .* \(4, 7\)"),
    "flat": (lambda: mix(IDS, x=torch.randn(7, 6).double()), r"^0: found an input of shape \(7, 6\)"),
    "targets": (lambda: mix(IDS, model=with_other_targets()), "^2: found no adapter 'first layer' here"),
    "wrapper": (lambda: mix(IDS, model=with_a_wrapper_of_one()), "found Megatron's DistributedDataParallel made for"),
    "gradients within": (gradients_within, "^0: found gradients enabled, expected them to be when the context"),
    "merged": (merged_mix, "found the adapter merged into it"),
    "off": (disabled_mix, "found its adapter switched off"),
    "set within": (lambda: within(lambda model: dora_fx.set_adapter(model, "reward")), "model: found a mixed batch"),
    "add within": (lambda: within(lambda model: dora_fx.add_adapter(model, "new", DoRA(["0"]))), "found a mixed batch"),
    "delete within": (lambda: within(lambda model: dora_fx.delete_adapter(model, "reward")), "found a mixed batch"),
    "merge within": (lambda: within(lambda model: dora_fx.merge(model, keep_adapter=True)), "found a mixed batch"),
    "mixed within": (lambda: within(lambda model: mix(IDS, model=model)), "found a mixed batch"),
}


@every_case("case", list(REFUSED))
def test_refusals(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_routed_experts_are_refused() -> None:
    model = nn.ModuleDict({"linear_fc1": column(is_expert=True)})
    for name in ("one", "two"):
        dora_fx.add_adapter(model, name, DoRA(["linear_fc1"], dim=2))
    with pytest.raises(ValueError, match=r"^linear_fc1: found an expert's layer"), dora_fx.mixed(model, ["one"]):
        pass


def test_other_parameters_within_a_batch_are_refused() -> None:
    model = linears()
    for name in ("one", "two"):
        dora_fx.add_adapter(model, name, DoRA(["0", "2"], dim=4))
    ids = ["one", "two", None, "two"]
    run = caller("plain", model, ids)
    with dora_fx.mixed(model, ids):
        run()
        factor = next(module for module in model.modules() if isinstance(module, dora_fx.DoRALinear)).adapter.linear_out
        factor.weight = nn.Parameter(factor.weight.detach().clone())
        with pytest.raises(RuntimeError, match=r"^0: found other parameters than when the mixed batch began"):
            run()


def test_one_adapter_beside_the_base() -> None:
    model = linears()
    DoRA(["0", "2"], dim=4)(model)
    randomize_adapters(model)
    ids = ["default", None, "default", None]
    compare("plain", ids, model)
    with dora_fx.disable_adapter(model):
        expected = caller("plain", model, ids)()["logits"]
    with dora_fx.mixed(model, ids):
        assert torch.equal(caller("plain", model, ids)()["logits"][1], expected[1])
    assert len(trainable(model)) == 6


def _neighbour(samples: mixture.Samples) -> mixture.Samples:
    """Ids of which the first two adapters take each other's place."""
    turn = lambda ids: torch.where(ids < 2, 1 - ids, ids)  # noqa: E731
    return samples._replace(ids=turn(samples.ids), own_ids=turn(samples.own_ids))


def _delta_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    rows = formula.rows_of
    patch.setattr(formula, "rows_of", lambda table, samples, own: rows(table, _neighbour(samples), own=own))


def _magnitudes_not_summed_by_id(patch: pytest.MonkeyPatch) -> None:
    rows = formula.rows_of

    def of_the_first(table: torch.Tensor, samples: mixture.Samples, own: bool) -> torch.Tensor:
        zeros = samples._replace(ids=samples.ids * 0, own_ids=samples.own_ids * 0)
        return rows(table, zeros if table.requires_grad else samples, own=own)

    patch.setattr(formula, "rows_of", of_the_first)


def _mask_by_a_wrong_id(patch: pytest.MonkeyPatch) -> None:
    rows = mixture.rows_of
    patch.setattr(mixture, "rows_of", lambda table, samples, own: rows(table, _neighbour(samples), own=own))


def _factors_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    each = mixture._each
    patch.setattr(mixture, "_each", lambda x, factors, samples: each(x, factors, _neighbour(samples)))


FAULTS = [_delta_of_the_neighbour, _magnitudes_not_summed_by_id, _mask_by_a_wrong_id]
# Packed tokens are told apart by their columns alone, so that the last fault changes nothing of them.
FAULTS_OF_BATCHES = [*itertools.product(FAULTS, (IDS, PACKED)), (_factors_of_the_neighbour, IDS)]


@every_case("fault, ids", FAULTS_OF_BATCHES)
def test_planted_faults_are_noticed(
    fault: Callable[[pytest.MonkeyPatch], None], ids: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dora_fx.delete_adapter(plain(), "unused")
    with monkeypatch.context() as patch:
        fault(patch)
        with pytest.raises(AssertionError):
            compare("plain", ids, model)
    for name in dora_fx.adapter_names(model):
        own_gradients(parameters_of(model, name))
    compare("plain", ids, model)
