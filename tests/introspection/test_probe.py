"""Whether tokens see each other outside of attention is found out by running a model, wherever its
code comes from.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.helpers.architectures import ARCHITECTURES, GROUPED, build
from tests.helpers.engine_jobs import error_of
from tests.helpers.parity_jobs import Engine
from tests.helpers.ranks import run_ranks
from ulysses_accel import ParallelismConfig, supports
from ulysses_accel.introspection.probe import Probe, probe
from ulysses_accel.introspection.profile import profile_of
from ulysses_accel.introspection.structure import ModelReading

PLACES = ("", "model", "model.layers.1", "model.layers.0.mlp")


def two() -> ParallelismConfig:
    """A config of its own for each call: one that lives on is taken for a later accelerator's."""
    return ParallelismConfig(sp_size=2)


def llama(device: str = "cpu", **changes: Any) -> Any:
    with torch.device(device):
        return hf.LlamaForCausalLM(hf.LlamaConfig(**{**GROUPED, **changes}))


def result_of(model: Any) -> Probe:
    return probe(model, ModelReading(model).around_sharded)


def mixed(output: Any) -> Any:
    """The output of a forward, with the mean over its tokens added."""
    if isinstance(output, Tensor):
        return output + output.mean(1, keepdim=True)
    name = "logits" if "logits" in output else "last_hidden_state"
    output[name] = mixed(output[name])
    return output


def plain(output: Any) -> Any:
    return output


def by_closure(module: Any, change: Callable[[Any], Any]) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: change(original(*args, **kwargs))


def by_wraps(module: Any, change: Callable[[Any], Any]) -> None:
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return change(original(*args, **kwargs))

    module.forward = forward


def mixing_method(self: Any, *args: Any, **kwargs: Any) -> Any:
    return mixed(type(self).forward(self, *args, **kwargs))


def plain_method(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)


def by_method(module: Any, change: Callable[[Any], Any]) -> None:
    module.forward = MethodType(mixing_method if change is mixed else plain_method, module)


@pytest.mark.parametrize("patch", [by_closure, by_wraps, by_method])
@pytest.mark.parametrize("name", PLACES)
def test_a_forward_set_on_an_instance(name: str, patch: Callable[..., None]) -> None:
    model = llama()
    patch(model.get_submodule(name), plain)
    assert supports(model, two()) == []
    model = llama()
    patch(model.get_submodule(name), mixed)
    (finding,) = supports(model, two())
    assert finding.where == (name or "forward")
    assert "lets tokens see each other outside of attention" in finding.fact


@pytest.mark.parametrize("name", PLACES)
def test_without_weights_only_what_a_twin_can_have_is_run(name: str) -> None:
    for change, count in ((plain, 0), (mixed, 1)):
        model = llama("meta")
        by_method(model.get_submodule(name), change)
        assert len(supports(model, two())) == count
    model = llama("meta")
    by_closure(model.get_submodule(name), plain)
    (finding,) = supports(model, two())
    assert finding.where == (name or "forward")
    assert "is not its architecture's" in finding.fact
    assert "this rank does not hold all of its parameters" in finding.fact


def executed(body: str, base: type[nn.Module], arguments: str = "x") -> Any:
    """A class whose source can't be had."""
    names: dict[str, Any] = {"Base": base}
    exec(f"class Executed(Base):\n    def forward(self, {arguments}):\n        {body}\n", names)
    return names["Executed"]


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("out = Base.forward(self, x); return out + out.mean(1, keepdim=True)", 1),
        ("out = Base.forward(self, x); return out + out.mean()", 1),
        ("return Base.forward(self, x).cumsum(1)", 1),
        ("return Base.forward(self, x).flip(1)", 1),
        ("return 2 * Base.forward(self, x)", 0),
    ],
)
def test_a_class_without_source(body: str, count: int) -> None:
    model = llama()
    model.model.layers[1].mlp = executed(body, LlamaMLP)(model.config)
    findings = supports(model, two())
    assert [finding.where for finding in findings] == ["model.layers.1.mlp"] * count
    with torch.device("meta"):
        model = llama("meta")
        model.model.layers[1].mlp = executed(body, LlamaMLP)(model.config)
    (finding,) = supports(model, two())
    assert "is not its architecture's" in finding.fact


@pytest.mark.parametrize(("change", "count"), [("cumsum(1)", 1), ("exp()", 0)])
def test_a_model_without_source(change: str, count: int) -> None:
    body = (
        "out = Base.forward(self, input_ids, position_ids=position_ids, labels=labels, **kwargs); "
        f"out.logits = out.logits.{change}; return out"
    )
    arguments = "input_ids=None, position_ids=None, labels=None, **kwargs"
    model = executed(body, hf.LlamaForCausalLM, arguments)(hf.LlamaConfig(**GROUPED))
    assert [finding.where for finding in supports(model, two())] == ["forward"] * count


class Wrapped(nn.Module):
    """torch's convolution in the place of a block."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(size, size, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed: Tensor = self.inner(hidden.transpose(1, 2)).transpose(1, 2)
        return mixed


def test_modules_that_were_put_into_a_model() -> None:
    model = llama()
    model.model.layers[0].mlp = Wrapped(32)
    (finding,) = supports(model, two())
    assert finding.where == "model.layers.0.mlp.inner"
    model = llama()
    model.model.layers[0].mlp = nn.GRU(32, 32, batch_first=True)
    # Its output is a tuple, which a layer can't add.
    assert not result_of(model).ran
    model = llama()
    model.model.layers[0].mlp = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    assert supports(model, two()) == []
    model = llama()
    mamba = hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)
    model.model.layers[0].mlp = hf.MambaModel(mamba).layers[0].mixer
    (finding,) = supports(model, two())
    assert finding.where == "model.layers.0.mlp"


class Neighbours(hf.LlamaForCausalLM):  # type: ignore[misc]
    """Adds to each token's embedding the one before it, in a way that no rule for sources knows."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        embedded = embedded + embedded.roll(1, dims=1)
        kwargs |= {"position_ids": position_ids, "labels": labels}
        return super().forward(inputs_embeds=embedded, **kwargs)


def test_a_class_of_the_user() -> None:
    (finding,) = supports(Neighbours(hf.LlamaConfig(**GROUPED)), two())
    assert finding.where == "forward"


def test_a_class_whose_forward_is_replaced_after_it_was_probed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert supports(llama(), two()) == []
    stock = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: mixed(stock(self, x)))
    (finding,) = supports(llama(), two())
    assert finding.where == "model.layers.0.mlp"
    monkeypatch.undo()
    assert supports(llama(), two()) == []


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_models_that_are_exact_mix_nothing(name: str) -> None:
    result = result_of(build(name))
    assert (result.ran, result.mixing) == (True, None), result.failure


@pytest.mark.parametrize(
    "config",
    [
        hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
        hf.Qwen3NextConfig(**GROUPED, linear_num_key_heads=2, linear_num_value_heads=4),
        hf.FNetConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2),
    ],
)
def test_models_that_mix(config: Any) -> None:
    mappings = (hf.MODEL_FOR_CAUSAL_LM_MAPPING, hf.MODEL_FOR_MASKED_LM_MAPPING)
    (model,) = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    assert result_of(model(config)).mixing is not None


def state_of(model: nn.Module) -> list[Any]:
    """Everything that a probe could leave behind."""
    modules = list(model.modules())
    return [
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        [module.training for module in modules],
        [len(module._forward_hooks) for module in modules],
        [id(getattr(module, "config", None)) for module in modules],
        [set(vars(module)) for module in modules],
        [(name, id(buffer), buffer.tolist()) for name, buffer in model.named_buffers()],
        [(name, id(part), part.tolist()) for name, part in model.named_parameters()],
        sorted(ALL_ATTENTION_FUNCTIONS._global_mapping),
        sorted(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping),
    ]


@pytest.mark.parametrize("patch", [None, by_closure, by_method])
def test_nothing_is_left_behind(patch: Callable[..., None] | None) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = llama(rope_parameters=rope, max_position_embeddings=8).train()
    model.model.layers[0].eval()
    model.register_buffer("calls", torch.zeros(()))
    if patch is not None:
        patch(model.model.layers[1], plain)
    config = copy.deepcopy(model.config).to_dict()
    before = state_of(model)
    profile = profile_of(model, 2)
    assert profile.findings == ()
    assert profile.decided_by == "probe"
    assert profile.needs_agreement is (patch is by_closure)
    assert state_of(model) == before
    assert model.config.to_dict() == config


def test_a_failing_forward_leaves_nothing_behind() -> None:
    def fail(_: Any) -> Any:
        raise ValueError("not now")

    model = llama()
    by_closure(model.model.layers[1], fail)
    before = state_of(model)
    (finding,) = supports(model, two())
    assert "ValueError: not now" in finding.fact
    assert state_of(model) == before


def test_the_twin_is_run_once_for_a_class_and_configuration() -> None:
    first = result_of(llama())
    assert result_of(llama()) is first
    assert result_of(llama(num_hidden_layers=3)) is not first


def prepared(patch: Callable[..., None], change: Callable[[Any], Any], on_meta: bool) -> str:
    accelerator = Engine("ddp").accelerator(sp_size=2)
    # As FSDP2 loads models: the first rank alone has the weights.
    device = "meta" if on_meta and not accelerator.is_main_process else "cpu"
    model = llama(device)
    patch(model, change)
    return error_of(accelerator.prepare, model)


def test_prepare_refuses_what_trained_wrongly() -> None:
    for patch in (by_closure, by_method):
        for error in run_ranks(prepared, 2, patch, mixed, False, init=False):
            assert "LlamaForCausalLM can't be trained exactly with sp_size=2" in error
            assert "its forward (LlamaForCausalLM) lets tokens see each other" in error
        assert run_ranks(prepared, 2, patch, plain, False, init=False) == ["", ""]


def test_ranks_that_find_different_things_refuse_together() -> None:
    first, second = run_ranks(prepared, 2, by_closure, plain, True, init=False)
    assert "rank 1 failed" in first
    assert "this rank does not hold all of its parameters" in first
    assert first == second
