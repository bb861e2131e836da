"""Every private name of another library that this package uses, and nothing else.

A name with a leading underscore may change in any release. Each is here once, behind a name that
says what it is used for, with what would be used instead if it vanished;
`tests/test_private_api.py` has a test of each. All were checked on torch 2.13.0, transformers
5.23.0, accelerate 1.15.0 and deepspeed 0.19.8; flash-attn's only on stand-ins with its signatures.

Nothing is imported before it is used: the launcher reads this module without torch.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor, nn
    from torch.autograd.graph import Node
    from torch.distributed.device_mesh import DeviceMesh

# --- Python -----------------------------------------------------------------------------------


def parser_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Returns a parser's arguments (`ArgumentParser._actions`; Python 3.10 to 3.13).

    accelerate's launcher hands out its parser with the arguments added. Instead: the texts of
    `parser.format_help()`.
    """
    return parser._actions


def global_of(function: Callable[..., Any], name: str) -> Any:
    """Returns what `name` means in the module that a function was written in, None where it means
    nothing (`__globals__` of the undecorated function).

    Models call helpers of their own module, such as `shift_tokens_right`, which their module's name
    need not lead to: remote code has none. Instead: `sys.modules[function.__module__]`.
    """
    return inspect.unwrap(function).__globals__.get(name)


# --- torch: autograd and tensors ----------------------------------------------------------------


def is_in_backward() -> bool:
    """Returns whether this thread runs a backward pass (`torch._C._current_graph_task_id`).

    In a module's forward this means that a checkpoint computes it again. Instead: a context
    variable set around the checkpoint's function.
    """
    import torch

    return bool(torch._C._current_graph_task_id() != -1)


def running_node() -> Node | None:
    """Returns the node of the graph whose backward runs in this thread, if one does
    (`torch._C._current_autograd_node`). Instead: hooks on every module's output.
    """
    import torch

    node: Node | None = torch._C._current_autograd_node()
    return node


def sequence_number(node: Node) -> int:
    """Returns a node's number; a thread numbers its nodes in the order of forward
    (`Node._sequence_nr`). Instead: a custom autograd function at each module's exit.
    """
    return node._sequence_nr()


def next_sequence_number() -> int:
    """Returns the number that this thread's next node will get
    (`torch._C._autograd._get_sequence_nr`). Instead: as for `sequence_number`.
    """
    import torch

    return int(torch._C._autograd._get_sequence_nr())


def call_after_backward(callback: Callable[[], None]) -> None:
    """Has a function called when the running backward pass ends
    (`torch.autograd.Variable._execution_engine.queue_callback`, as DDP and FSDP2 do).

    Instead: a hook on the leaf that autograd reaches last.
    """
    import torch

    torch.autograd.Variable._execution_engine.queue_callback(callback)


def tensor_version(tensor: Tensor) -> int:
    """Returns how often a tensor was modified in place (`Tensor._version`, which autograd's own
    check of saved tensors reads). Instead: `torch.autograd.graph.saved_tensors_hooks`.
    """
    return tensor._version


def view_base(tensor: Tensor) -> Tensor | None:
    """Returns the tensor that this one is a view of (`Tensor._base`). Instead: nothing; the mark on
    a shard would have to be set on every view.
    """
    return tensor._base


def storage_key(storage: Any) -> int:
    """Returns a number that is the same for all Python objects of one storage, as long as it lives
    (`UntypedStorage._cdata`, `TypedStorage._cdata`).

    `data_ptr()` is 0 for all empty and all meta storages. Instead: the tracker would keep storages
    by weak reference.
    """
    return int(storage._cdata)


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether a tensor keeps its data in inner tensors that `__tensor_flatten__` names
    (`torch.utils._python_dispatch.is_traceable_wrapper_subclass`, which torch documents for
    subclasses). Instead: `hasattr(tensor, "__tensor_flatten__")`.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(tensor))


def is_wrapper_class(kind: type) -> bool:
    """Returns `is_wrapper` of a class's tensors
    (`torch.utils._python_dispatch.is_traceable_wrapper_subclass_type`).
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

    return bool(is_traceable_wrapper_subclass_type(kind))


def tree_leaves(tree: Any) -> list[Any]:
    """Returns the leaves of nested lists, tuples and dicts (`torch.utils._pytree.tree_leaves`).
    Instead: a recursive function over these three.
    """
    from torch.utils import _pytree

    return _pytree.tree_leaves(tree)


def dispatch_mode() -> Any:
    """Returns the base class of modes that see every operator
    (`torch.utils._python_dispatch.TorchDispatchMode`, documented under this private path). Instead:
    nothing; `torch.overrides.TorchFunctionMode` does not see the backward pass.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


# --- torch: attention that returns its log-sum-exp ----------------------------------------------

_ATTENTION_OPERATORS = {
    "flash": "_scaled_dot_product_flash_attention",
    "flash_backward": "_scaled_dot_product_flash_attention_backward",
    "cpu_flash": "_scaled_dot_product_flash_attention_for_cpu",
    "cpu_flash_backward": "_scaled_dot_product_flash_attention_for_cpu_backward",
    "efficient": "_scaled_dot_product_efficient_attention",
    "efficient_backward": "_scaled_dot_product_efficient_attention_backward",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "cudnn_backward": "_scaled_dot_product_cudnn_attention_backward",
}


def attention_operator(name: str) -> Any:
    """Returns one of torch's kernels behind scaled dot product attention, or its backward
    (`torch.ops.aten._scaled_dot_product_..._attention...`).

    The public function returns no log-sum-exp, and joining a ring's partial results needs it.
    Instead: `torch.nn.attention.flex_attention` with its log-sum-exp, or the chunked kernel of this
    package, which uses matrix products only.

    Args:
        name: a key of the table above.
    """
    import torch

    return getattr(torch.ops.aten, _ATTENTION_OPERATORS[name])


# --- torch: modules -----------------------------------------------------------------------------

# Keys of a module's `__dict__`. Instead: `register_parameter` and its siblings on a new module; but
# a module's copy with tiny weights is built without running the constructor of its class.
MODULE_PARAMETERS = "_parameters"
MODULE_BUFFERS = "_buffers"
MODULE_CHILDREN = "_modules"
# Attributes that hold a module's hooks, by handle id. Instead: nothing says whether a module has
# hooks.
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A module's attribute with the names of the parameters that DDP neither broadcasts nor averages;
# `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model` writes it too. Instead:
# detached parameters while DDP is constructed.
DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"


def module_parameters(module: nn.Module) -> dict[str, Any]:
    """Returns a module's dict of parameters, without its children's (`Module._parameters`).

    `named_parameters(recurse=False)` leaves out those that are None, and is no dict to write to.
    """
    return module._parameters


def module_buffers(module: nn.Module) -> dict[str, Any]:
    """Returns a module's dict of buffers, without its children's (`Module._buffers`)."""
    return module._buffers


def module_children(module: nn.Module) -> dict[str, Any]:
    """Returns a module's dict of children (`Module._modules`); `named_children` leaves out those
    that are None.
    """
    return module._modules


# --- torch: distributed and the GPU's allocator -------------------------------------------------


def process_group(name: str) -> dist.ProcessGroup:
    """Returns a process group by its name (`distributed_c10d._resolve_process_group`, which torch's
    functional collectives call). Instead: a table of our own from names to groups.
    """
    from torch.distributed import distributed_c10d

    group: dist.ProcessGroup = distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return group


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Returns a mesh with all its axes joined to one (`DeviceMesh._flatten`); asked again, the same
    one.

    Torch deprecates `mesh[name]` for such an axis. Instead: `dist.new_group` over the mesh's ranks.
    """
    return mesh._flatten(name)


def has_comm_hook(ddp: Any) -> bool:
    """Returns whether DDP has a communication hook (`DistributedDataParallel._comm_hooks`).
    Instead: catching what registering a second one raises.
    """
    return bool(ddp._comm_hooks)


def replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Averages a module's gradients over a mesh, DTensor parameters included
    (`torch.distributed._composable.replicate_with_fsdp`).

    DDP takes no DTensor parameters.
    Instead: `fully_shard` over a mesh whose sharded axis has one rank.
    """
    from torch.distributed._composable import replicate_with_fsdp

    replicate_with_fsdp.replicate(module, mesh=mesh)


def set_allocator_settings(settings: str) -> None:
    """Changes the settings of the GPU's caching allocator in a running process
    (`torch.cuda.memory._set_allocator_settings`). Instead: PYTORCH_ALLOC_CONF in the environment,
    before the process starts.
    """
    import torch

    torch.cuda.memory._set_allocator_settings(settings)


# --- torch: data and schedules ------------------------------------------------------------------


def live_iterator(loader: Any) -> Any:
    """Returns the iterator that a `DataLoader` with persistent workers keeps, None before its first
    epoch (`DataLoader._iterator`). Instead: noting that the loader was iterated.
    """
    return getattr(loader, "_iterator", None)


def scheduler_step_count(scheduler: Any) -> int:
    """Returns how often a learning rate scheduler was stepped, its constructor included
    (`LRScheduler._step_count`). Instead: `last_epoch + 1`, which a call `step(epoch)` changes.
    """
    return int(scheduler._step_count)


# --- flash-attn ---------------------------------------------------------------------------------


def flash_attn_2(direction: Literal["forward", "backward"]) -> Callable[..., Any]:
    """Returns the flash-attn package's kernel (`flash_attn_interface._flash_attn_forward` and
    `_flash_attn_backward`, as of release 2.7).

    The public function's backward uses the log-sum-exp of its own call, and a ring's must use that
    of all its calls. Instead: torch's own flash attention.
    """
    from flash_attn import flash_attn_interface

    function: Callable[..., Any] = getattr(flash_attn_interface, f"_flash_attn_{direction}")
    return function


def flash_attn_3(direction: Literal["forward", "backward"]) -> Callable[..., Any]:
    """Returns the flash-attn 3 package's kernel (`flash_attn_interface._flash_attn_forward` and
    `_flash_attn_backward` of its own top module). Instead: as for 2.
    """
    from importlib import import_module

    function: Callable[..., Any] = getattr(
        import_module("flash_attn_interface"), f"_flash_attn_{direction}"
    )
    return function


def parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the names of a function's parameters; a custom op's are those of the function that it
    was made of (`torch.library.CustomOpDef._init_fn`). Instead: the op's schema.
    """
    return tuple(inspect.signature(getattr(function, "_init_fn", function)).parameters)


# --- transformers: models -----------------------------------------------------------------------


def has_attention_setting(config: Any) -> bool:
    """Returns whether an object is a transformers config, which names the attention of its model
    (`PretrainedConfig._attn_implementation_internal`). Instead: `isinstance`, which fails for
    configs of remote code and wrappers.
    """
    return hasattr(config, "_attn_implementation_internal")


def set_attention(config: Any, implementation: str) -> None:
    """Sets the attention that a config's model calls, without transformers' checks of the name
    (`PretrainedConfig._attn_implementation_internal`).

    `config._attn_implementation = name` sets it in all sub-configs too, which are copied one by one
    here. Instead: `model.set_attn_implementation`.
    """
    config._attn_implementation_internal = implementation


def set_experts(config: Any, implementation: str) -> None:
    """Sets how a config's model computes its experts, without transformers' checks of the name
    (`PretrainedConfig._experts_implementation_internal`).

    transformers 5 chooses "grouped_mm", which torch 2.13 lacks on some devices and dtypes. Instead:
    `model.set_experts_implementation`.
    """
    config._experts_implementation_internal = implementation


def is_transformers_model(model: Any) -> bool:
    """Returns whether a module, or a class of modules, is transformers'
    (`PreTrainedModel._can_set_attn_implementation`). Instead: `isinstance(..., PreTrainedModel)`,
    which would import transformers.
    """
    return hasattr(model, "_can_set_attn_implementation")


def can_set_attention(model: Any) -> bool:
    """Returns whether a model's layers call attention through transformers' registry, as its class
    says (`PreTrainedModel._can_set_attn_implementation()`). Instead: reading its attention layers'
    source.
    """
    return bool(model._can_set_attn_implementation())


def supports_sdpa(model: Any) -> bool:
    """Returns whether a model's class says that it can attend with sdpa
    (`PreTrainedModel._supports_sdpa`). Instead: setting it, and catching the refusal.
    """
    return bool(getattr(model, "_supports_sdpa", False))


def model_from_config(kind: Any, config: Any) -> Any:
    """Constructs a model of a class and a config, with random weights
    (`PreTrainedModel._from_config`). Instead: the class's constructor, which ignores the config's
    dtype.
    """
    return kind._from_config(config)


def recorded_outputs(model: Any) -> dict[str, Any]:
    """Returns which of its modules' outputs a model's class collects, by the name in the model's
    output (`PreTrainedModel._can_record_outputs`, read by transformers' `check_model_inputs`).
    Instead: reading the router's module from the forward's source.
    """
    return getattr(model, "_can_record_outputs", None) or {}


def unregister_attention(registry: Any, implementation: str) -> None:
    """Removes a name from one of transformers' registries of attention and mask functions, if it is
    there (`GeneralInterface._global_mapping`; `del` on an instance sees its local names only).
    Instead: leaving it registered.
    """
    registry._global_mapping.pop(implementation, None)


def flash_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Calls transformers' flash attention of any release and kernel
    (`modeling_flash_attention_utils._flash_attention_forward`).

    The public `flash_attention_forward` reads the module that calls it. Instead: that one, with a
    small module.
    """
    from transformers import modeling_flash_attention_utils

    out: Tensor = modeling_flash_attention_utils._flash_attention_forward(*args, **kwargs)
    return out


# The attribute with which transformers' layers checkpoint themselves, which
# `gradient_checkpointing_enable` sets. Instead: hooks that replace the layers' forward.
CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
# The method in which older models' own code builds its causal mask.
DECODER_MASK_METHOD = "_prepare_decoder_attention_mask"

# --- transformers: Trainer ----------------------------------------------------------------------

# Methods of a Trainer that an attached one overrides: how it counts the step's labels, what it
# writes, and how it counts input tokens. Instead: a subclass of Trainer that users would have to
# choose.
TRAINER_COUNT_ITEMS = "_get_num_items_in_batch"
TRAINER_SAVE = "_save"
TRAINER_SAVE_OPTIMIZER = "_save_optimizer_and_scheduler"
TRAINER_COUNT_INPUT_TOKENS = "_track_num_input_tokens"


def train_batch_size(trainer: Any) -> int:
    """Returns the samples of one process's batch, as `auto_find_batch_size` has set it
    (`Trainer._train_batch_size`). Instead: `args.train_batch_size`, which that does not change.
    """
    return int(trainer._train_batch_size)


def on_trainers_device(trainer: Any, value: Any) -> Any:
    """Returns nested tensors on a Trainer's device, in DeepSpeed's dtype
    (`Trainer._prepare_input`). Instead: `accelerate.utils.send_to_device`.
    """
    return trainer._prepare_input(value)


# --- accelerate ---------------------------------------------------------------------------------


def prepared_loaders(accelerator: Any) -> list[Any]:
    """Returns an accelerator's own list of prepared loaders, to read and to add to
    (`Accelerator._dataloaders`): `save_state` and `free_memory` go through it. Instead: a list of
    our own, and hooks of `save_state`.
    """
    loaders: list[Any] = accelerator._dataloaders
    return loaders


def prepared_optimizers(accelerator: Any) -> list[Any]:
    """Returns an accelerator's own list of prepared optimizers (`Accelerator._optimizers`).
    Instead: an override of `prepare_optimizer`.
    """
    optimizers: list[Any] = accelerator._optimizers
    return optimizers


def prepared_schedulers(accelerator: Any) -> list[Any]:
    """Returns an accelerator's own list of prepared schedulers, to read and to change
    (`Accelerator._schedulers`). Instead: an override of `prepare_scheduler`.
    """
    schedulers: list[Any] = accelerator._schedulers
    return schedulers


def is_prepared(value: Any) -> bool:
    """Returns whether an accelerator has prepared an object (`_is_accelerate_prepared`, which
    `prepare` sets on it). Instead: looking for it in the accelerator's lists.
    """
    return bool(getattr(value, "_is_accelerate_prepared", False))


def mark_prepared(value: Any) -> None:
    """Marks an object as prepared, so that an accelerator leaves it alone
    (`_is_accelerate_prepared`).
    """
    value._is_accelerate_prepared = True


# Settings of accelerate's loaders that a loader for the rest of an epoch is rebuilt with. Instead:
# `accelerate.skip_first_batches`, around our loader.
SHARD_LOADER_ATTRIBUTES = ("_drop_last", "_non_blocking")


def accelerator_state() -> dict[str, Any]:
    """Returns what all accelerators of this process share, empty before the first one
    (`AcceleratorState._shared_state`). Instead: constructing the state, which starts it.
    """
    from accelerate.state import AcceleratorState

    shared: dict[str, Any] = AcceleratorState._shared_state
    return shared


def set_axis_size(config: Any, axis: str, size: int) -> None:
    """Sets the size of a `ParallelismConfig`'s axis after construction
    (`ParallelismConfig._set_size`, which also updates what accelerate derives from the sizes).
    Instead: a new config.
    """
    config._set_size(axis, size)


def merged_launch_arguments(arguments: argparse.Namespace) -> tuple[argparse.Namespace, Any, bool]:
    """Returns the arguments of `accelerate launch` with its config file's values, that file, and
    whether the precision came from it (`commands.launch._validate_launch_command`). Instead:
    running the `accelerate launch` command with the flags as text.

    Raises:
        ValueError: accelerate refuses the arguments.
    """
    from accelerate.commands import launch

    merged: tuple[argparse.Namespace, Any, bool] = launch._validate_launch_command(arguments)
    return merged


# --- DeepSpeed ----------------------------------------------------------------------------------

# A module's attribute that makes ZeRO-3 gather the parameters of its children around its own
# forward and backward. Instead: `deepspeed.utils.set_z3_leaf_module`, which sets it and would
# import DeepSpeed.
ZERO3_LEAF = "_z3_leaf"
