"""Each private name of another library is there, and behaves as the package relies on.

A test that fails here after an upgrade names what to replace; its docstring in `_private_api.py`
says with what.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralModel,
    Trainer,
    TrainingArguments,
)
from transformers import modeling_flash_attention_utils as upstream
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.own_attention import BaichuanModel
from tests.helpers.ranks import run_ranks
from tests.helpers.sources import PACKAGE, ROOT
from ulysses_accel import _private_api


def tiny_llama() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, num_hidden_layers=1, max_position_embeddings=16, **sizes)
    return LlamaForCausalLM(config)


def test_every_entry_has_a_test() -> None:
    tested = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "_private_api"
    }
    entries = set()
    for node in ast.parse((PACKAGE / "_private_api.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            entries.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            entries.add(node.targets[0].id)
    assert {name for name in entries if not name.startswith("_")} <= tested


def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys; from ulysses_accel import _private_api; "
        "print(sorted({'torch', 'accelerate', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- Python -----------------------------------------------------------------------------------


def test_parser_options() -> None:
    parser = argparse.ArgumentParser()
    option = parser.add_argument("--some-flag")
    assert option in _private_api.parser_options(parser)


def test_global_of() -> None:
    @torch.no_grad()
    def decorated() -> None: ...

    assert _private_api.global_of(decorated, "run_ranks") is run_ranks
    assert _private_api.global_of(decorated, "no such name") is None


# --- torch: autograd and tensors ----------------------------------------------------------------


def test_is_in_backward() -> None:
    seen = []

    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(_private_api.is_in_backward())
        return (x * 2).sin()

    checkpoint(double, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_running_node_and_its_number() -> None:
    seen: list[Any] = []
    x = torch.ones(2, requires_grad=True)
    before = _private_api.next_sequence_number()
    product = x * 2
    after = _private_api.next_sequence_number()
    product.register_hook(lambda grad: seen.append(_private_api.running_node()))
    product.sin().sum().backward()
    assert before <= _private_api.sequence_number(product.grad_fn) < after
    assert _private_api.running_node() is None
    assert len(seen) == 1
    assert before <= _private_api.sequence_number(seen[0])


class _Callback(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, calls: list[str]) -> torch.Tensor:
        ctx.calls = calls
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        _private_api.call_after_backward(partial(ctx.calls.append, "after"))
        return grad, None


def test_call_after_backward() -> None:
    calls: list[str] = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: calls.append("leaf"))
    _Callback.apply(x * 1, calls).sum().backward()
    assert calls == ["leaf", "after"]


def test_tensor_version_and_view_base() -> None:
    x = torch.zeros(4)
    before = _private_api.tensor_version(x)
    x.add_(1)
    assert _private_api.tensor_version(x) > before
    assert _private_api.view_base(x[1:]) is x
    assert _private_api.view_base(x) is None


def test_storage_key() -> None:
    x, other = torch.zeros(0), torch.zeros(0)
    key = _private_api.storage_key(x.untyped_storage())
    assert key == _private_api.storage_key(x.view(0).untyped_storage())
    assert key != _private_api.storage_key(other.untyped_storage())
    assert isinstance(_private_api.storage_key(torch.TypedStorage(2)), int)


def _is_dtensor_a_wrapper() -> bool:
    mesh = init_device_mesh("cpu", (1,))
    return _private_api.is_wrapper(distribute_tensor(torch.ones(2), mesh, [Replicate()]))


def test_is_wrapper() -> None:
    assert run_ranks(_is_dtensor_a_wrapper, 1) == [True]
    assert _private_api.is_wrapper_class(DTensor)
    assert not _private_api.is_wrapper(torch.ones(2))
    assert not _private_api.is_wrapper_class(torch.Tensor)


def test_tree_leaves() -> None:
    assert _private_api.tree_leaves(([1, (2,)], {"key": 3})) == [1, 2, 3]


def test_dispatch_mode() -> None:
    names = []

    class Mode(_private_api.dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Mode():
        x.sin().sum().backward()
    assert "sin" in names
    assert "cos" in names  # the backward pass is seen


@pytest.mark.parametrize("name", sorted(_private_api._ATTENTION_OPERATORS))
def test_attention_operator(name: str) -> None:
    schema = _private_api.attention_operator(name).default._schema
    names = [argument.name for argument in schema.arguments]
    assert {"query", "key", "value", "dropout_p", "is_causal", "scale"} <= set(names)
    if name.endswith("_backward"):
        assert names[0].startswith("grad_out")
        assert "logsumexp" in names
    else:
        assert schema.returns[0].name == "output"
        assert schema.returns[1].name.startswith("log")


# --- torch: modules -----------------------------------------------------------------------------


def test_module_dicts() -> None:
    module = nn.BatchNorm1d(4, affine=False)
    assert vars(module)[_private_api.MODULE_PARAMETERS] == {"weight": None, "bias": None}
    assert _private_api.module_parameters(module) == {"weight": None, "bias": None}
    assert set(_private_api.module_buffers(module)) >= {"running_mean", "running_var"}
    assert set(vars(module)[_private_api.MODULE_BUFFERS]) >= {"running_mean", "running_var"}
    module.register_module("child", None)
    assert _private_api.module_children(module) == {"child": None}
    assert vars(module)[_private_api.MODULE_CHILDREN] == {"child": None}


def test_module_hooks() -> None:
    module = nn.Linear(2, 2)
    kinds = _private_api.MODULE_HOOKS
    assert not any(getattr(module, kind) for kind in kinds)
    module.register_forward_hook(print)
    module.register_forward_pre_hook(print)
    module.register_full_backward_hook(print)
    module.register_full_backward_pre_hook(print)
    assert all(getattr(module, kind) for kind in kinds)


def _ddp() -> list[bool]:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    setattr(module, _private_api.DDP_IGNORED, ["0.weight", "0.bias"])
    module[0].weight.data.fill_(dist.get_rank())
    ddp = DistributedDataParallel(module)
    before = _private_api.has_comm_hook(ddp)
    ddp.register_comm_hook(None, lambda state, bucket: _averaged(bucket))
    ddp(torch.full((1, 2), float(dist.get_rank()))).sum().backward()
    ignored = bool((module[0].weight == dist.get_rank()).all())
    return [before, _private_api.has_comm_hook(ddp), ignored]


def _averaged(bucket: Any) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_ddp_leaves_ignored_parameters_and_counts_hooks() -> None:
    assert run_ranks(_ddp, 2) == [[False, True, True]] * 2


# --- torch: distributed and the GPU's allocator -------------------------------------------------


def _groups_and_meshes() -> list[bool]:
    world = dist.group.WORLD
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    joint = _private_api.flattened(mesh["a", "b"], "a_b")
    return [
        _private_api.process_group(world.group_name) is world,
        joint.size() == 4,
        _private_api.flattened(mesh["a", "b"], "a_b") == joint,
    ]


def test_process_group_and_flattened() -> None:
    assert run_ranks(_groups_and_meshes, 4) == [[True] * 3] * 4


def _replicated_gradient() -> torch.Tensor:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    module = nn.Linear(2, 1, bias=False)
    weight = distribute_tensor(torch.ones(1, 2), mesh["tp"], [Replicate()])
    module.weight = nn.Parameter(weight)
    _private_api.replicate(module, mesh["dp"])
    x = torch.full((1, 2), float(dist.get_rank()))
    module(DTensor.from_local(x, mesh["tp"], [Replicate()])).to_local().sum().backward()
    gradient = module.weight.grad
    while isinstance(gradient, DTensor):
        gradient = gradient.to_local()
    return gradient


def test_replicate_averages_gradients_of_dtensors() -> None:
    for gradient in run_ranks(_replicated_gradient, 2):
        assert_close(gradient, torch.full((1, 2), 0.5))


def test_set_allocator_settings() -> None:
    # Without a GPU nothing can be seen of it; the name and its one argument are checked.
    assert list(_private_api.parameter_names(torch.cuda.memory._set_allocator_settings))[:1] == [
        "env"
    ]
    assert callable(_private_api.set_allocator_settings)


# --- torch: data and schedules ------------------------------------------------------------------


def test_live_iterator() -> None:
    loader: Any = DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert _private_api.live_iterator(loader) is None
    list(loader)
    assert _private_api.live_iterator(loader) is not None
    loader._iterator._shutdown_workers()


def test_scheduler_step_count() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=3)
    assert _private_api.scheduler_step_count(scheduler) == 1
    optimizer.step()
    scheduler.step()
    assert _private_api.scheduler_step_count(scheduler) == 2


# --- flash-attn ---------------------------------------------------------------------------------


def test_flash_attn_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    interface, package = ModuleType("flash_attn_interface"), ModuleType("flash_attn")
    interface._flash_attn_forward = forward = object()  # type: ignore[attr-defined]
    interface._flash_attn_backward = backward = object()  # type: ignore[attr-defined]
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", interface)
    for kernel in (_private_api.flash_attn_2, _private_api.flash_attn_3):
        assert kernel("forward") is forward
        assert kernel("backward") is backward


def test_parameter_names_of_a_custom_op() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.__annotations__ = {"x": torch.Tensor, "return": torch.Tensor}
    op = torch.library.custom_op("ulysses_accel_test::double", double, mutates_args=())
    assert _private_api.parameter_names(op) == ("x",)
    assert _private_api.parameter_names(double) == ("x",)


# --- transformers: models -----------------------------------------------------------------------


def test_attention_of_a_model() -> None:
    model = tiny_llama()
    assert _private_api.has_attention_setting(model.config)
    assert not _private_api.has_attention_setting(object())
    _private_api.set_attention(model.config, "not registered")
    assert model.config._attn_implementation == "not registered"
    assert _private_api.is_transformers_model(model)
    assert _private_api.is_transformers_model(type(model))
    assert not _private_api.is_transformers_model(nn.Linear(2, 2))
    assert _private_api.can_set_attention(model)
    assert _private_api.supports_sdpa(model)
    assert not _private_api.supports_sdpa(nn.Linear(2, 2))


def test_experts_of_a_model() -> None:
    config = MixtralConfig()
    _private_api.set_experts(config, "eager")
    assert config._experts_implementation == "eager"


def test_model_from_config() -> None:
    config = tiny_llama().config
    config.dtype = torch.bfloat16
    model = _private_api.model_from_config(LlamaForCausalLM, config)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_recorded_outputs() -> None:
    assert "router_logits" in _private_api.recorded_outputs(MixtralModel)
    assert _private_api.recorded_outputs(nn.Linear(2, 2)) == {}


def test_unregister_attention() -> None:
    ALL_ATTENTION_FUNCTIONS.register("ulysses_accel_test", print)
    assert "ulysses_accel_test" in ALL_ATTENTION_FUNCTIONS.valid_keys()
    _private_api.unregister_attention(ALL_ATTENTION_FUNCTIONS, "ulysses_accel_test")
    _private_api.unregister_attention(ALL_ATTENTION_FUNCTIONS, "ulysses_accel_test")
    assert "ulysses_accel_test" not in ALL_ATTENTION_FUNCTIONS.valid_keys()


def test_flash_attention_takes_our_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    names = _private_api.parameter_names(upstream._flash_attention_forward)
    assert names[:4] == ("query_states", "key_states", "value_states", "attention_mask")
    keywords = {"query_length", "is_causal", "dropout", "softmax_scale", "softcap"}
    assert keywords | {"attn_implementation"} <= set(names)
    # Its kernels need a GPU.
    monkeypatch.setattr(
        upstream, "_flash_attention_forward", lambda *args, **kwargs: (args, kwargs)
    )
    assert _private_api.flash_attention(1, dropout=0.0) == ((1,), {"dropout": 0.0})


def test_checkpoint_function() -> None:
    model = tiny_llama()
    name = _private_api.CHECKPOINT_FUNCTION
    assert not any(name in vars(module) for module in model.modules())
    model.gradient_checkpointing_enable()
    assert name in vars(model.model.layers[0])


def test_decoder_mask_method() -> None:
    # It is in the code that older models bring along: transformers' own calls its masking functions.
    assert not hasattr(LlamaForCausalLM, _private_api.DECODER_MASK_METHOD)
    assert hasattr(BaichuanModel, _private_api.DECODER_MASK_METHOD)


# --- transformers: Trainer ----------------------------------------------------------------------


def test_methods_of_a_trainer() -> None:
    assert _private_api.parameter_names(getattr(Trainer, _private_api.TRAINER_COUNT_ITEMS)) == (
        "self",
        "batch_samples",
        "device",
    )
    save = _private_api.parameter_names(getattr(Trainer, _private_api.TRAINER_SAVE))
    assert save == ("self", "output_dir", "state_dict")
    save = _private_api.parameter_names(getattr(Trainer, _private_api.TRAINER_SAVE_OPTIMIZER))
    assert save == ("self", "output_dir")
    track = getattr(Trainer, _private_api.TRAINER_COUNT_INPUT_TOKENS)
    assert _private_api.parameter_names(track) == ("self", "inputs")


def test_batches_of_a_trainer(tmp_path: Path) -> None:
    # Its arguments set variables of the environment.
    assert run_ranks(_train_batches, 1, str(tmp_path), init=False) == [True]


def _train_batches(folder: str) -> bool:
    args = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=3, use_cpu=True, report_to=[]
    )
    trainer = Trainer(tiny_llama(), args)
    assert _private_api.train_batch_size(trainer) == 3
    value = {"key": [torch.ones(2)]}
    assert_close(_private_api.on_trainers_device(trainer, value), value)
    return True


# --- accelerate ---------------------------------------------------------------------------------


def test_lists_of_an_accelerator() -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters())
    scheduler: Any = torch.optim.lr_scheduler.ConstantLR(optimizer)
    loader: Any = DataLoader([1, 2])
    assert not _private_api.is_prepared(loader)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    assert _private_api.prepared_loaders(accelerator) == [loader]
    assert _private_api.prepared_optimizers(accelerator) == [optimizer]
    assert _private_api.prepared_schedulers(accelerator) == [scheduler]
    assert all(map(_private_api.is_prepared, (model, optimizer, scheduler, loader)))
    # The lists are the accelerator's own: what is added is freed with the rest.
    _private_api.prepared_loaders(accelerator).append(loader)
    assert len(_private_api.prepared_loaders(accelerator)) == 2
    accelerator.free_memory()
    assert _private_api.prepared_loaders(accelerator) == []


def test_mark_prepared() -> None:
    accelerator = Accelerator(cpu=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    )
    _private_api.mark_prepared(scheduler)
    assert accelerator.prepare_scheduler(scheduler) is scheduler


@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher])
def test_attributes_of_accelerates_loaders(kind: Any) -> None:
    Accelerator(cpu=True)
    loader = kind(DataLoader([1, 2]).dataset, _drop_last=True, _non_blocking=True)
    assert [getattr(loader, name) for name in _private_api.SHARD_LOADER_ATTRIBUTES] == [True, True]


def test_accelerator_state() -> None:
    assert "parallelism_config" not in _private_api.accelerator_state()
    Accelerator(cpu=True)
    assert _private_api.accelerator_state()["parallelism_config"] is None
    assert _private_api.accelerator_state() is AcceleratorState._shared_state


def test_set_axis_size() -> None:
    config = ParallelismConfig(dp_replicate_size=2)
    _private_api.set_axis_size(config, "dp_replicate", 4)
    assert config.dp_replicate_size == config.total_size == 4


def test_merged_launch_arguments(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\n"
        "num_machines: 1\nnum_processes: 1\nuse_cpu: true\n"
    )
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    merged, config, from_file = _private_api.merged_launch_arguments(arguments)
    assert merged.mixed_precision == config.mixed_precision == "bf16"
    assert from_file is not None


# --- DeepSpeed ----------------------------------------------------------------------------------


def _zero3_leaf() -> bool:
    from deepspeed.utils import set_z3_leaf_module

    module = nn.Linear(2, 2)
    set_z3_leaf_module(module, True)
    return bool(vars(module)[_private_api.ZERO3_LEAF])


def test_zero3_leaf() -> None:
    # Importing DeepSpeed sets variables of the environment.
    assert run_ranks(_zero3_leaf, 1, init=False) == [True]
