"""The settings one by one: their names, defaults, legal values, and the sentence that says where
each came from.

Imports neither torch nor accelerate, so that a launcher can check a setting before it starts
anything.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from ulysses_accel.config.batch_schema import BatchSchema
from ulysses_accel.distributed.axes import AXES
from ulysses_accel.errors import ConfigError

Value: TypeAlias = "int | str | bool | None"
SourceKind = Literal[
    "default",
    "yaml",
    "env",
    "launcher",
    "command line",
    "constructor",
    "from_dict",
    "derived",
    "assigned",
]
SOURCE_KINDS: tuple[str, ...] = get_args(SourceKind)

MAX_SIZE = 2**31 - 1
MAX_SEQUENCE_LENGTH = 2**40
MAX_LIMIT = 2**60
AUTO = "auto"
# The sections of a YAML file; in capitals, the prefixes of the variables.
PARALLELISM = "parallelism_config"
MEMORY = "memory_config"
SECTIONS = (PARALLELISM, MEMORY)
# accelerate's words for how keys travel around the ring, and ours.
EXCHANGES = {"alltoall": "p2p", "allgather": "all_gather"}
# How a sequence is shared, in ColossalAI's words.
SEQUENCE_MODES = ("split_gather", "all_to_all", "ring_attn")
ATTENTION_CORES = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "eager")
TRUSTED_KERNEL_ORGANIZATIONS = ("kernels-community",)

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_HUB_KERNEL = re.compile(
    r"(?P<organization>[\w.-]+)/(?P<name>[\w.-]*flash-attn[\w.-]*)(@[\w.-]+)?(:\w+)?", re.ASCII
)
_HEADS = re.compile(r"([1-9][0-9]{0,8})(?:\s*/\s*([1-9][0-9]{0,8}))?", re.ASCII)
_UNSET_WORDS = ("none", "null")
_TRUE = {"true", "yes", "on", "1"}
_FALSE = {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Source:
    """Where a value came from.

    Args:
        kind: the layer of the precedence that set the value.
        detail: the words shown to the user, such as `env PARALLELISM_CONFIG_SP_SIZE`; the kind
            where empty.
    """

    kind: SourceKind
    detail: str = ""

    def __str__(self) -> str:
        return self.detail or self.kind


DEFAULT = Source("default")


@dataclass(frozen=True)
class Setting:
    """A checked value, its source, and what the user wrote where that reads differently.

    Args:
        value: the value that the code acts on.
        source: where it came from.
        written: the user's own word for the value, `None` where it is the value itself.
    """

    value: Value
    source: Source
    written: str | None = None

    def __str__(self) -> str:
        written = "" if self.written is None else f'from "{self.written}", '
        return f"{self.value} ({written}{self.source})"


class _IllegalError(ValueError):
    """The end of an error sentence: what is wrong with a value and what to use instead."""


@dataclass(frozen=True)
class Field:
    """A setting's name, default and parser.

    Args:
        name: the constructor's argument, and the YAML key behind the section's name; unique over
            all sections.
        default: the value where nobody set one.
        parse: turns text or a Python value into the checked value.
        section: the section of a YAML file that the field belongs to.
    """

    name: str
    default: Value
    parse: Callable[[object], Value]
    section: str = PARALLELISM

    @property
    def key(self) -> str:
        """The field's full name: a YAML key, and a name among accelerate's launch arguments."""
        return f"{self.section}_{self.name}"

    @property
    def variable(self) -> str:
        """The environment variable that sets this field."""
        return self.key.upper()

    @property
    def flag(self) -> str:
        """The launcher's command-line flag that sets this field."""
        return f"--{self.key.replace('_', '-')}"

    def settle(self, raw: object, source: Source) -> Setting:
        """Checks a raw value.

        Args:
            raw: text, or a Python value.
            source: where the raw value came from, for the error.

        Returns:
            The checked value with its source.

        Raises:
            ConfigError: the value is not legal for this field.
        """
        try:
            value = self.parse(raw)
        except _IllegalError as illegal:
            raise ConfigError(f"{self.name}={show(raw)} (from {source}) {illegal}") from None
        written = (
            raw.strip()
            if isinstance(raw, str) and isinstance(value, str) and raw.strip() != value
            else None
        )
        return Setting(value, source, written)


def show(raw: object) -> str:
    """Writes a value for an error message: short, on one line, printable on any terminal."""
    if isinstance(raw, str) and _WHOLE.fullmatch(raw):
        return raw[:40]
    if raw is None or isinstance(raw, (str, int, float, bool)):
        text = ascii(raw[:80] if isinstance(raw, str) else raw)
        return text if len(text) <= 80 else text[:77] + "..."
    return f"<{type(raw).__name__}>"


def _whole(raw: object) -> int | None:
    if isinstance(raw, bool) or raw is None:
        return None
    if isinstance(raw, str):
        text = raw.strip()
        return int(text) if _WHOLE.fullmatch(text) and len(text) <= 40 else None
    try:
        return operator.index(cast(int, raw))
    except TypeError:
        return None


def _size(raw: object) -> Value:
    size = _whole(raw)
    if size is None:
        raise _IllegalError(
            "must be a whole number. Use the number of processes along this axis, such as 1, 2 or "
            "8."
        )
    if size < 1:
        raise _IllegalError("must be at least 1. Use 1 to switch this axis off.")
    if size > MAX_SIZE:
        raise _IllegalError(
            f"must be at most {MAX_SIZE}. Use the number of processes along this axis."
        )
    return size


def _size_or_auto(raw: object) -> Value:
    if isinstance(raw, str) and raw.strip().lower() == AUTO:
        return AUTO
    return _size(raw)


def _is_unset(raw: object) -> bool:
    return raw is None or (isinstance(raw, str) and raw.strip().lower() in _UNSET_WORDS)


def _chunks(raw: object) -> Value:
    number = _whole(raw)
    if number is None or not 1 <= number <= MAX_SIZE:
        raise _IllegalError(
            "must be a whole number of at least 1. Use 1 to exchange all heads at once, or 2, 4, "
            "... for less memory."
        )
    return number


def _stride(raw: object) -> Value:
    if _is_unset(raw):
        return None
    number = _whole(raw)
    if number is None or not 1 <= number <= MAX_SIZE:
        raise _IllegalError(
            "must be a whole number of key/value heads, at least 1. Use 1 for the least memory, or "
            "None for all heads "
            "at once."
        )
    return number


def _heads(raw: object) -> Value:
    if _is_unset(raw):
        return None
    found = _HEADS.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if found is None:
        raise _IllegalError(
            "must be the model's query and key/value heads. Write them as '32/8', or as '32' where "
            "both are equal."
        )
    queries, keys = int(found[1]), int(found[2] or found[1])
    if queries % keys:
        raise _IllegalError(
            f"has {keys} key/value heads, which do not divide {queries} query heads. Use whole "
            "groups."
        )
    return f"{queries}/{keys}"


def _length(raw: object) -> Value:
    if _is_unset(raw):
        return None
    length = _whole(raw)
    if length is None or length < 1 or length > MAX_SEQUENCE_LENGTH:
        raise _IllegalError(
            f"must be a whole number of tokens from 1 to {MAX_SEQUENCE_LENGTH}. Use the length of "
            "the whole sequence, "
            "or None where batches differ in length."
        )
    return length


def _count(unit: str, least: int = 1) -> Callable[[object], Value]:
    def parse(raw: object) -> Value:
        number = _whole(raw)
        if number is None or not least <= number <= MAX_SIZE:
            raise _IllegalError(
                f"must be a whole number of {unit} from {least} to {MAX_SIZE}. Use {least} or more."
            )
        return number

    return parse


def _schema(raw: object) -> Value:
    if _is_unset(raw):
        return None
    try:
        # No number or word like all other values; it is only passed on, and written as text.
        return cast(Value, BatchSchema(raw))
    except ValueError as error:
        raise _IllegalError(str(error)) from None


def _limit(unit: str, unset: str) -> Callable[[object], Value]:
    def parse(raw: object) -> Value:
        number = None if _is_unset(raw) else _whole(raw)
        if not _is_unset(raw) and (number is None or not 1 <= number <= MAX_LIMIT):
            raise _IllegalError(
                f"must be a whole number of {unit} from 1 to {MAX_LIMIT}. Leave it out, or use "
                f"None, {unset}."
            )
        return number

    return parse


def _flag(raw: object) -> Value:
    if isinstance(raw, bool):
        return raw
    text = str(raw).strip().lower() if isinstance(raw, (str, int)) else ""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise _IllegalError("must be true or false. Use true, yes, on, 1, false, no, off or 0.")


def _choice(words: dict[str, str]) -> Callable[[object], Value]:
    def parse(raw: object) -> Value:
        word = raw.strip().lower() if isinstance(raw, str) else ""
        if word not in words:
            raise _IllegalError(f"must be one of {', '.join(words)}. Use {next(iter(words))}.")
        return words[word]

    return parse


def _mode(raw: object) -> Value:
    return None if _is_unset(raw) else _choice({word: word for word in SEQUENCE_MODES})(raw)


def _attention(raw: object) -> Value:
    name = raw.strip() if isinstance(raw, str) else ""
    kernel = _HUB_KERNEL.fullmatch(name)
    if name in ATTENTION_CORES or (
        kernel and kernel["organization"] in TRUSTED_KERNEL_ORGANIZATIONS
    ):
        return name
    if "/" in name:
        # A hub kernel is code that runs with the user's rights: only organizations named here may
        # supply it.
        raise _IllegalError(
            "is not a trusted hub kernel: it would run code from the hub. Use "
            f"{TRUSTED_KERNEL_ORGANIZATIONS[0]}"
            "/flash-attn2 or another flash-attn kernel of "
            f"{', '.join(TRUSTED_KERNEL_ORGANIZATIONS)}, or one of "
            f"{', '.join(ATTENTION_CORES)}."
        )
    raise _IllegalError(
        f"must be one of {', '.join(ATTENTION_CORES)}, or a hub kernel such as "
        f"{TRUSTED_KERNEL_ORGANIZATIONS[0]}/flash-attn2. Use sdpa, which needs no extra package."
    )


def _fields() -> dict[str, Field]:
    sizes = [
        Field(f"{axis}_size", 1, _size_or_auto if axis in ("cp", "sp") else _size) for axis in AXES
    ]
    rest = [
        Field("ep_size", 1, _size),
        Field("sp_backend", "ulysses", _choice({"ulysses": "ulysses", "deepspeed": "ulysses"})),
        Field("cp_backend", "ring", _choice({"ring": "ring", "torch": "ring"})),
        Field(
            "cp_layout",
            "zigzag",
            _choice({word: word for word in ("zigzag", "contiguous", "striped")}),
        ),
        Field("cp_exchange", "p2p", _choice({word: word for word in ("p2p", "all_gather")})),
        Field("cp_head_stride", None, _stride),
        Field("cp_comm_strategy", "alltoall", _choice({word: word for word in EXCHANGES})),
        Field("sp_seq_length", None, _length),
        Field("sp_seq_length_is_variable", True, _flag),
        Field("sp_attn_implementation", "sdpa", _attention),
        Field("sp_head_chunks", 1, _chunks),
        Field("sp_auto_heads", None, _heads),
        Field("batch_schema", None, _schema),
        Field("sequence_parallelism_mode", None, _mode),
    ]
    return {field.name: field for field in (*sizes, *rest)}


def _memory_fields() -> dict[str, Field]:
    rows: tuple[tuple[str, Value, Callable[[object], Value]], ...] = (
        ("tiled_mlp", False, _flag),
        ("tiled_mlp_bytes", None, _limit("bytes", "for a size that fits the model")),
        ("tiled_norm", False, _flag),
        ("tiled_loss", False, _flag),
        ("tiled_loss_tokens", None, _limit("tokens", "for a size that fits the vocabulary")),
        ("use_liger_loss", False, _flag),
        ("checkpoint", False, _flag),
        ("checkpoint_every_n_layers", 1, _count("layers")),
        ("checkpoint_offload", False, _flag),
        ("checkpoint_keep_last", 1, _count("layers", least=0)),
        ("save_attention", "no", _choice({word: word for word in ("no", "device", "host")})),
        ("save_exchange", False, _flag),
        ("save_attention_bytes", None, _limit("bytes", "to save every layer's attention")),
        ("expandable_segments", False, _flag),
        ("bf16_gradient_reduction", False, _flag),
    )
    return {name: Field(name, default, parse, MEMORY) for name, default, parse in rows}


MEMORY_FIELDS: dict[str, Field] = _memory_fields()
FIELDS: dict[str, Field] = {**_fields(), **MEMORY_FIELDS}
HANDLER_FIELDS = (
    "sp_seq_length",
    "sp_seq_length_is_variable",
    "sp_attn_implementation",
    "sp_head_chunks",
)
# The settings that the ring's handler holds, each under its attribute.
RING_FIELDS = {"cp_layout": "layout", "cp_exchange": "exchange", "cp_head_stride": "head_stride"}
