"""`ParallelismConfig`: accelerate's class with every value checked and every source known.

It subclasses accelerate's, so that a stock `Accelerator` and `Trainer` accept it, but does not run
its constructor.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import ParallelismConfig as _StockParallelismConfig
from accelerate.utils import TorchContextParallelConfig, TorchTensorParallelConfig

from ulysses_accel import _private_api
from ulysses_accel.config.auto import Cluster, choose_degrees, is_auto
from ulysses_accel.config.batch_schema import BatchSchema
from ulysses_accel.config.handlers import (
    STOCK_SEQUENCE_CONFIG,
    DeepSpeedSequenceParallelConfig,
    RingAttentionConfig,
    check_handler,
    handler_layer,
    handler_values,
    ring_values,
)
from ulysses_accel.config.memory import MemoryConfig, dict_layer, memory_from_settings
from ulysses_accel.config.mesh_sizes import (
    MeshAxes,
    describe_sizes,
    legal_factorizations,
    sizes_of_mode,
    warn_of_earlier_accelerator,
)
from ulysses_accel.config.settings import (
    AUTO,
    FIELDS,
    HANDLER_FIELDS,
    MEMORY_FIELDS,
    RING_FIELDS,
    Setting,
    Source,
)
from ulysses_accel.config.sources import (
    Layer,
    argument_layer,
    environment_layer,
    resolve,
    yaml_layer,
)
from ulysses_accel.distributed.axes import AXES
from ulysses_accel.errors import ConfigError, MeshError, closest
from ulysses_accel.sequence.layout import multiple_of

_ATTACH_POINT = "ulysses_accel.integrations.attach"
_CONSTRUCTOR = Source("constructor")
# Configs that no accelerator has attached yet, in the order of their construction.
_UNATTACHED: list[weakref.ref[ParallelismConfig]] = []
_WORDS = ("cp_backend", "sp_backend", "batch_schema", "sequence_parallelism_mode")
_OWN_FIELDS = (*(f"{axis}_size" for axis in AXES), "ep_size", *_WORDS)
_HANDLERS = ("tp_handler", "cp_handler", "sp_handler", "memory_config")
_NOBODY = ("default", "launcher")

__all__ = ["DeepSpeedSequenceParallelConfig", "ParallelismConfig", "RingAttentionConfig"]


@dataclass(repr=False)
class ParallelismConfig(MeshAxes, _StockParallelismConfig):  # type: ignore[misc]
    """The sizes of the mesh axes and how each axis works; pass it to
    `accelerate.Accelerator(parallelism_config=...)`.

    A value that is `None` here is taken from the environment (`PARALLELISM_CONFIG_*`), then from
    the default. Sizes count processes; the product of all sizes is the number of processes.

    Args:
        dp_replicate_size: copies of the parameters that see different batches.
        dp_shard_size: processes that see different batches and share one copy of the parameters.
        tp_size: tensor parallel degree; between the layers whose weights are sharded, the sequence
            is sharded over the same processes.
        cp_size: ring attention degree; `"auto"` chooses it, as for `sp_size`.
        cp_backend: `ring`; accelerate's `torch` is read as `ring`.
        sp_size: Ulysses degree; `"auto"` chooses it, and a ring degree that was left out, so that
            the product of all sizes is the launcher's `WORLD_SIZE`: the split whose bytes take the
            least time.
        sp_backend: `ulysses`; accelerate's `deepspeed` is read as `ulysses`.
        tp_handler: accelerate's `TorchTensorParallelConfig`.
        cp_handler: a `RingAttentionConfig`, or accelerate's `TorchContextParallelConfig`.
        sp_handler: a `DeepSpeedSequenceParallelConfig`, ours or accelerate's.
        memory_config: techniques that save memory; `None` where no memory setting was set.
        ep_size: processes that the experts of each layer are partitioned over; adds no mesh axis:
            they are neighbouring ranks of the others.
        batch_schema: how tensors of a batch are sharded, by key: the number of their sequence dim,
            `"shard"` (the second), `"replicate"` (none), or a function `f(tensor, description,
            rank)` of the full tensor as the collate function returned it, the batch's
            `SequenceDescription` and this process's rank in its sequence group, which returns this
            rank's shard. In a file or the environment: `my_key=replicate, other=2`. Known
            keys need none.
        sequence_parallelism_mode: ColossalAI's word: `split_gather` (over tp_size), `all_to_all`
            (Ulysses) or `ring_attn` (of degree sp_size or cp_size); see `mesh_sizes.sizes_of_mode`.
            `None`: the sizes decide.
        model: for `"auto"`, a transformers model, its config or its name; the setting
            `sp_auto_heads` ("32/8") where there is none.

    Raises:
        ConfigError: a value is not legal, or two values contradict each other.
    """

    dp_replicate_size: int = None  # type: ignore[assignment]
    dp_shard_size: int = None  # type: ignore[assignment]
    tp_size: int = None  # type: ignore[assignment]
    cp_size: int = None  # type: ignore[assignment]
    cp_backend: str = None  # type: ignore[assignment]
    sp_size: int = None  # type: ignore[assignment]
    sp_backend: str = None  # type: ignore[assignment]
    tp_handler: Any = None
    cp_handler: RingAttentionConfig = None  # type: ignore[assignment]
    sp_handler: DeepSpeedSequenceParallelConfig = None  # type: ignore[assignment]
    memory_config: MemoryConfig | None = None
    ep_size: int = None  # type: ignore[assignment]
    batch_schema: Any = None
    sequence_parallelism_mode: str | None = None
    model: InitVar[Any] = None

    def __post_init__(self, model: Any) -> None:
        arguments = {name: getattr(self, name) for name in _OWN_FIELDS}
        handlers = (self.tp_handler, self.cp_handler, self.sp_handler, self.memory_config)
        self._apply(
            (environment_layer(), argument_layer(arguments, _CONSTRUCTOR)), *handlers, model
        )
        warn_of_earlier_accelerator(self.cp_size, self.sp_size)

    @classmethod
    def from_layers(
        cls,
        *layers: Layer,
        tp_handler: object = None,
        cp_handler: object = None,
        sp_handler: object = None,
        memory_config: MemoryConfig | None = None,
        model: Any = None,
        cluster: Cluster | None = None,
    ) -> ParallelismConfig:
        """Builds a config from settings alone; of the environment only the number of processes is
        read, for "auto".

        Args:
            layers: mappings from field name to setting, the weakest first; see
                `ulysses_accel.config.sources`.
            tp_handler: as for the constructor.
            cp_handler: as for the constructor.
            sp_handler: as for the constructor; the values set on it take precedence over the
                layers.
            memory_config: as for `sp_handler`.
            model: as for the constructor.
            cluster: the job's ranks, for `"auto"`; what the launcher's environment says where
                `None`.

        Returns:
            The config.

        Raises:
            ConfigError: as for the constructor.
        """
        config = cls.__new__(cls)
        config._apply(layers, tp_handler, cp_handler, sp_handler, memory_config, model, cluster)
        return config

    @classmethod
    def for_model(
        cls, model: Any, *, cluster: Cluster | None = None, **arguments: Any
    ) -> ParallelismConfig:
        """Builds a config whose ring and Ulysses degrees are chosen for a model; `explain()` says
        why.

        Args:
            model: a transformers model, its config or its name.
            cluster: number of processes, processes on a node, and bandwidths; the launcher's where
                `None`.
            arguments: the constructor's, and those of its handlers (`sp_seq_length`, `tiled_mlp`,
                ...).

        Returns:
            The config.

        Raises:
            ConfigError: as for the constructor.
        """
        handlers = {name: arguments.pop(name, None) for name in _HANDLERS}
        layers = (environment_layer(), argument_layer({"sp_size": AUTO, **arguments}, _CONSTRUCTOR))
        return cls.from_layers(*layers, **handlers, model=model, cluster=cluster)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> ParallelismConfig:
        """Builds a config from a YAML file, the environment and arguments; later ones take
        precedence.

        Args:
            path: an accelerate config file, of which the sections `parallelism_config:` and
                `memory_config:` are read.
            overrides: constructor arguments, and those of its handlers (`sp_seq_length`,
                `tiled_mlp`, ...).

        Returns:
            The config.

        Raises:
            ConfigError: the file can't be read, or as for the constructor.
        """
        handlers = {name: overrides.pop(name, None) for name in (*_HANDLERS, "model")}
        layers = (yaml_layer(path), environment_layer(), argument_layer(overrides, _CONSTRUCTOR))
        return cls.from_layers(*layers, **handlers)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ParallelismConfig:
        """Builds a config from what `to_dict` returned; values that are left out come from the
        environment.

        Args:
            values: field name to value, and handler name to a mapping of its fields or `None`.

        Returns:
            The config.

        Raises:
            ConfigError: a key is unknown, or as for the constructor.
        """
        source = Source("from_dict")
        legal = {*_OWN_FIELDS, *_HANDLERS}
        for name in values:
            if name not in legal:
                raise ConfigError(
                    f"unknown key {str(name)[:100]!r} in "
                    f"from_dict.{closest(str(name)[:100], legal)}"
                )
        layer = argument_layer({name: values.get(name) for name in _OWN_FIELDS}, source)
        handler_fields = {
            **ring_values(values),
            **handler_values(values, "sp_handler", HANDLER_FIELDS),
        }
        tensor = handler_values(values, "tp_handler", ("enable_async_tp",))
        layer.update(argument_layer(handler_fields, source))
        layer.update(dict_layer(handler_values(values, "memory_config", tuple(MEMORY_FIELDS))))
        for name in {"sp_seq_length", "cp_head_stride"} & set(handler_fields):
            # Unlike an argument that was left out, a None that to_dict wrote is a value.
            layer[name] = FIELDS[name].check(handler_fields[name], source)
        return cls.from_layers(
            environment_layer(),
            layer,
            tp_handler=TorchTensorParallelConfig(**tensor)
            if values.get("tp_handler") is not None
            else None,
        )

    def _apply(
        self,
        layers: tuple[Layer, ...],
        tp_handler: object,
        cp_handler: object,
        sp_handler: object,
        memory_config: MemoryConfig | None,
        model: Any = None,
        cluster: Cluster | None = None,
    ) -> None:
        check_handler("tp_handler", tp_handler, TorchTensorParallelConfig)
        check_handler("cp_handler", cp_handler, RingAttentionConfig, TorchContextParallelConfig)
        check_handler("sp_handler", sp_handler, STOCK_SEQUENCE_CONFIG)
        check_handler("memory_config", memory_config, MemoryConfig)
        handlers = (handler_layer(handler) for handler in (cp_handler, sp_handler, memory_config))
        self._settings = resolve(*layers, *handlers)
        self._settings.update(sizes_of_mode(self._settings))
        if is_auto(self._settings):
            self._settings.update(
                choose_degrees(self._settings, model, cluster or Cluster.from_environment())
            )
        for name in _OWN_FIELDS:
            setattr(self, name, self._settings[name].value)
        self.tp_handler = tp_handler or (TorchTensorParallelConfig() if self.tp_size > 1 else None)
        self.cp_handler = RingAttentionConfig._from_settings(self._settings)
        self.sp_handler = DeepSpeedSequenceParallelConfig._from_settings(self._settings)
        self.memory_config = memory_from_settings(self._settings, memory_config)
        self._check_sequence_length()
        # A plugin that is passed to Accelerator sets the variable later than the launcher.
        self._follows_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        _UNATTACHED.append(weakref.ref(self, _UNATTACHED.remove))

    def attach_to_accelerator(self) -> ParallelismConfig | None:
        """Notes that an accelerator has this config.

        Returns:
            A config of other sizes that was built for an accelerator and never attached, where this
            one is attached again: accelerate keeps the first config and drops later ones.
        """
        others = [reference() for reference in _UNATTACHED]
        _UNATTACHED[:] = [reference for reference in _UNATTACHED if reference() is not self]
        is_first, self._is_attached = not self._is_attached, True
        if is_first:
            return None
        sizes = (self.cp_size, self.sp_size, self.tp_size)
        for config in reversed(others):
            if config is not None and (config.cp_size, config.sp_size, config.tp_size) != sizes:
                return config
        return None

    def _check_sequence_length(self) -> None:
        handler, layout = self.sp_handler, self.cp_handler.layout
        # Each shard is sharded once more over the tensor parallel ranks.
        multiple = math.lcm(
            multiple_of(self.cp_size, layout, self.sp_size), self.non_data_parallel_size
        )
        if (
            handler.sp_seq_length_is_variable
            or handler.sp_seq_length is None
            or handler.sp_seq_length % multiple == 0
        ):
            return
        below = handler.sp_seq_length // multiple * multiple
        lengths = f"{below} or {below + multiple}" if below else f"{multiple}"
        needs = ""
        if self.cp_size > 1:
            needs = f", in {layout} layout, so must be a multiple of {multiple}"
        if self.tp_size > 1:
            needs += f", times tp_size={self.tp_size}"
        raise ConfigError(
            f"sp_seq_length={handler.sp_seq_length} ({self._settings['sp_seq_length'].source}) is "
            f"not divisible by cp_size × sp_size = {self.cp_size} × {self.sp_size} = "
            f"{self.sequence_parallel_size} (sp_size: {self.source_of('sp_size')}){needs}. Use "
            f"{lengths} tokens, or sp_seq_length_is_variable=True, which pads every batch."
        )

    # ---- what accelerate calls -------------------------------------------------------------------

    def build_device_mesh(self, device_type: str) -> Any:
        """Builds the mesh of this config.

        Args:
            device_type: `cpu`, `cuda`, ...

        Returns:
            The device mesh, or `None` where there is one process.
        """
        # An upward import by name: accelerate hands the Accelerator to its config, and only the
        # integrations know what to do with it.
        return importlib.import_module(_ATTACH_POINT).build_mesh(self, device_type)

    def get_device_mesh(self, device_type: str | None = None) -> Any:
        """Returns the mesh, building it at the first call.

        Args:
            device_type: needed at the first call; later it must be the same or `None`.

        Returns:
            The device mesh.

        Raises:
            ConfigError: no device type at the first call, or another one than the mesh has.
        """
        if self.device_mesh is None:  # type: ignore[has-type]
            if device_type is None:
                raise ConfigError(
                    "the device mesh is not built yet and no device type was passed. Pass 'cpu' or "
                    "'cuda'."
                )
            self.device_mesh = self.build_device_mesh(device_type)
        elif device_type is not None and self.device_mesh.device_type != device_type:
            raise ConfigError(
                f"the device mesh was built for device type '{self.device_mesh.device_type}' and "
                "is now requested "
                f"for '{device_type}'. Use one ParallelismConfig for each device type."
            )
        return self.device_mesh

    def _validate_accelerator(self, accelerator: Any) -> None:
        importlib.import_module(_ATTACH_POINT).attach(self, accelerator)

    def fit_world_size(
        self, world_size: int, *, axis: Literal["dp_replicate", "dp_shard"] = "dp_replicate"
    ) -> None:
        """Checks the product of the sizes, or derives the data parallel size where it was left out.

        Args:
            world_size: the number of processes.
            axis: the axis that gets a derived size.

        Raises:
            MeshError: the product is not the number of processes.
        """
        if self.total_size == world_size:
            return
        unset = frozenset(name for name in AXES if self.source_of(f"{name}_size").kind in _NOBODY)
        others = self.non_data_parallel_size
        if (
            {"dp_replicate", "dp_shard"} <= unset
            and self.data_parallel_size == 1
            and world_size % others == 0
        ):
            derived = Source(
                "derived", f"derived: {world_size} processes / {others} on the cp, sp and tp axes"
            )
            _private_api.set_axis_size(self, axis, world_size // others)
            self._settings[f"{axis}_size"] = Setting(world_size // others, derived)
            return
        product = " × ".join(str(size) for size in self.sizes.values())
        requested = "; ".join(
            f"{name}_size={size} ({self.source_of(f'{name}_size')})"
            for name, size in self.sizes.items()
        )
        legal = "; ".join(
            describe_sizes(sizes) for sizes in legal_factorizations(world_size, self.sizes, unset)
        )
        raise MeshError(
            f"{' × '.join(f'{name}_size' for name in AXES)} = {product} = {self.total_size}, but "
            "the number of "
            f"processes is {world_size}: {requested}. Start {self.total_size} processes, or use "
            f"sizes (1 where not named) such as: {legal}."
        )

    # ---- what users read ----------------------------------------------------------------------

    def source_of(self, name: str) -> Source:
        """Says where a value came from.

        Args:
            name: a field, such as `sp_size` or `sp_seq_length`.

        Returns:
            The source; of kind `assigned` where the attribute was changed after construction.

        Raises:
            ConfigError: there is no such field.
        """
        if name not in self._settings:
            raise ConfigError(f"unknown setting {name[:100]!r}.{closest(name[:100], FIELDS)}")
        setting = self._settings[name]
        return (
            setting.source
            if self._live(name) == setting.value
            else Source("assigned", "assigned after construction")
        )

    @property
    def settings(self) -> dict[str, Setting]:
        """Every field's value and source, as they are now."""
        return {
            name: setting
            if self.source_of(name) is setting.source
            else Setting(self._live(name), self.source_of(name))
            for name, setting in self._settings.items()
        }

    def _live(self, name: str) -> Any:
        if name in HANDLER_FIELDS:
            return getattr(self.sp_handler, name)
        if name in RING_FIELDS or name == "cp_comm_strategy":
            return getattr(self.cp_handler, RING_FIELDS.get(name, name))
        if name in MEMORY_FIELDS:
            return getattr(self.memory_config, name, FIELDS[name].default)
        return getattr(self, name) if name in _OWN_FIELDS else self._settings[name].value

    def explain(self) -> str:
        """Returns one line for each setting: its value and where it came from."""
        product = " × ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return "\n".join(
            [
                f"{self.total_size} processes = {product}",
                *(f"{name} = {setting}" for name, setting in self.settings.items()),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that `from_dict` turns into an equal config."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _OWN_FIELDS}
        values["batch_schema"] = (
            BatchSchema(self.batch_schema).plain if self.batch_schema is not None else None
        )
        for name in _HANDLERS:
            handler = getattr(self, name)
            values[name] = None if handler is None else dataclasses.asdict(handler)
        return values

    def to_json(self) -> str:
        """Returns `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self)
        )
        return f"ParallelismConfig({fields}, total_size={self.total_size})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelismConfig:
        # A mesh holds process groups, which can't be copied: the copy shares them.
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            setattr(other, name, value if name == "device_mesh" else copy.deepcopy(value, memo))
        return other
