"""A model's tiny twin: its class and configuration at sizes small enough to be run for a check.

Every field keeps its value except sizes, which fields' names tell. Per-layer lists keep one layer
of each kind, so that a model which mixes windows, full attention and experts does so still.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ulysses_accel import _private_api

VOCAB = 64
"""Tokens of a shrunk vocabulary; the first ones are special."""
HIDDEN, HEADS = 32, 4
_HEAD_DIM = HIDDEN // HEADS
_LAYERS = 2
_MAX_LAYERS = 6

# The first pattern that matches the whole name of a field decides; None keeps the field's value.
_RULES: tuple[tuple[str, int | float | None], ...] = (
    (r"type_vocab_size|task_type_vocab_size|chunk_size_feed_forward", None),
    (r"(?:classifier|summary)_.*", None),
    (r".*vocab(?:_size\w*)?", VOCAB),
    (r".*(?:dropout|drop|pdrop|jitter)\w*", 0.0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|forced_eos_token_id", 2),
    (r"pad_token_id", 0),
    (r"\w+_(?:token_id|token_index)", 4),
    (r"hidden_size_per_layer_input|pronunciation_embed_dim|shape_embed_dim", 16),
    (r"\w*lora_rank|gated_norm_rank", 16),
    (r"mamba_d_state|ssm_state_size|state_size|adapter_rank|laurel_rank", 8),
    (r"router_hidden_size|mamba_dt_rank", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", HEADS),
    (r"mamba_d_ssm|mamba_expand_size", 2 * HIDDEN),
    (r"hidden_size|d_model|n_embd|embedding_size|emb_dim|lru_width", HIDDEN),
    (r"dim|embedding_dim|backbone_hidden_size|embed_dim|base_channels", HIDDEN),
    (r"projector_hidden_dim|word_embed_proj_dim|attention_hidden_size", HIDDEN),
    (r"(?:in|out)put_embedding_size", HIDDEN),
    (r"num_filters", 1),
    (r"index_head_dim|qk_head_dim", 2 * _HEAD_DIM),
    (r"mamba_\w*head_?(?:dim)?|mamba_d_head", 2 * _HEAD_DIM),
    (r"\w*head_dim|d_head|d_kv|dim_head|v_head_dim|kv_channels", _HEAD_DIM),
    (r"rotary_dim|attention_head_size", _HEAD_DIM),
    (r"(?:\w*num_|n_|swa_num_)?(?:key_value|kv)_heads", HEADS // 2),
    (r"\w*attention_heads|n_heads?|num_heads|linear_num_\w+_heads", HEADS),
    (r"index_n_heads|num_query_groups", HEADS),
    (r"\w*(?:intermediate|ffn|feed_forward|ff)\w*_(?:size|dim)|dim_ff|dff|d_ff|hidden_dim", 48),
    (r"d_inner|n_inner|prompt_mid_dim|intermediate_size_mlp", 48),
    (r"(?:num_|n_routed_|num_local_|moe_num_)experts|zero_expert_num", 4),
    (r"num_experts_per_tok(?:en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|num_expert_group|topk_group|mamba_n_groups|n_groups", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(?:attn|expert)_layer_period", 2),
    (r"(?:attn|expert)_layer_offset", 1),
    (r"moe_layer_end_index", _LAYERS - 1),
    (r"\w*sliding_window(?:_size)?|window_size|attention_window_size", 7),
    (r"local_attention\w*|keep_window_size", 7),
    (r"attention_chunk_size|mamba_chunk_size|chunk_size|index_topk", 8),
    (r"index_block_size|rel_extent", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 128),
    (r"max_\w+_positions|context_length|model_max_length", 128),
    (r"max_window_layers", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
)
_DEPTH = re.compile(
    r"(?:num_|n_|decoder_|encoder_|num_encoder_|num_decoder_)?(?:hidden_)?layers?|num_blocks|depth"
)
_COUNTS_OF_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
_GROUPED = {
    "num_key_value_heads": "num_attention_heads",
    "encoder_num_key_value_heads": "encoder_num_attention_heads",
    "decoder_num_key_value_heads": "decoder_num_attention_heads",
}
_LAYER_INDICES = ("moe_layers", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers")


def build_twin(model_class: Any, config: Any) -> nn.Module:
    """Returns a model of a class at tiny sizes, with random weights in float32 on the CPU.

    Args:
        model_class: of a transformers model.
        config: a configuration that the class takes; stays as it is.
    """
    small = shrink(config)
    for part in configs_of(small):
        _private_api.set_attention(part, "eager")
        _private_api.set_experts(part, "eager")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            # Not `_from_config`, which partitions the weights while DeepSpeed's ZeRO-3 is active.
            twin: nn.Module = model_class(small)
    finally:
        torch.set_default_dtype(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.float().parameters():
            # Gates and norms that start at 0 or 1 would hide what comes after them.
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return twin.eval()


def configs_of(config: Any) -> Iterator[Any]:
    """Yields a configuration, and those of its parts."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from configs_of(getattr(config, name))


def shrink(config: Any) -> Any:
    """Returns a copy of a transformers configuration with tiny sizes; the original is unchanged.

    Args:
        config: of any model, possibly with configurations of its parts in it.
    """
    shrunk = copy.deepcopy(config)
    _shrink_fields(shrunk)
    return shrunk


def _shrink_fields(config: Any) -> None:
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    for part in parts:
        if part is not None:
            _shrink_fields(part)
    fields = dict(vars(config))
    kept = _representative_layers(fields)
    ungrouped = [
        name
        for name, heads in _GROUPED.items()
        if fields.get(name) and fields[name] == fields.get(heads)
    ]
    for name, value in fields.items():
        if name.startswith("_") or any(value is part for part in parts):
            continue
        new = _shrunk(name, value, kept, _num_layers(fields))
        if isinstance(new, dict) and "mrope_section" in _keys_of_rope(config):
            new["mrope_section"] = [2, 1, 1]
        if new is not value:
            setattr(config, name, new)
    for name in ungrouped:
        # Some attention modules can't have fewer heads of keys than of queries.
        setattr(config, name, HEADS)


def _keys_of_rope(config: Any) -> tuple[str, ...]:
    """Returns the keys of rotary parameters that a configuration's class knows beside the usual."""
    return tuple(getattr(type(config), "ignore_keys_at_rope_validation", None) or ())


def _shrunk(name: str, value: Any, kept: list[int], num_layers: int) -> Any:
    """Returns the value that a field gets; the one it has where no rule is for it.

    Args:
        name: of the field.
        value: that it has.
        kept: indices of the layers that stay.
        num_layers: that the model has.
    """
    if isinstance(value, dict) and "rope_type" in str(value):
        return _shrunk_rope(value)
    if isinstance(value, list | tuple):
        if name in _LAYER_INDICES:
            return type(value)([len(kept) - 1] if value else [])
        if len(value) == num_layers > len(kept):
            return type(value)(value[index] for index in kept)
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number:
        return value
    if _DEPTH.fullmatch(name):
        return min(len(kept), value)
    for pattern, size in _RULES:
        if re.fullmatch(pattern, name):
            return value if size is None or value == 0 else size
    return value


def _shrunk_rope(rope: dict[str, Any]) -> dict[str, Any]:
    shrunk = {
        key: _shrunk_rope(value) if isinstance(value, dict) else value
        for key, value in rope.items()
    }
    if "mrope_section" in shrunk:
        shrunk["mrope_section"] = [2, 1, 1]
        shrunk["partial_rotary_factor"] = 1.0
    for name in ("long_factor", "short_factor"):
        factors: Any = shrunk.get(name)
        if isinstance(factors, list):
            # One factor for each pair of channels of a head.
            shrunk[name] = factors[: _HEAD_DIM // 2]
    return shrunk


def _num_layers(fields: dict[str, Any]) -> int:
    counts = [fields.get(name) for name in _COUNTS_OF_LAYERS]
    return next((count for count in counts if isinstance(count, int)), 0)


def _representative_layers(fields: dict[str, Any]) -> list[int]:
    """Returns the indices of layers that show every combination of the per-layer lists once; of two
    layers where there is no list.
    """
    count = _num_layers(fields)
    lists = [
        value
        for name, value in fields.items()
        if isinstance(value, list | tuple) and len(value) == count and name not in _LAYER_INDICES
    ]
    if not lists or count <= _LAYERS:
        return list(range(min(_LAYERS, count) if count else _LAYERS))
    first_of_kind: dict[str, int] = {}
    for index in range(count):
        first_of_kind.setdefault(str([entries[index] for entries in lists]), index)
    chosen = sorted(first_of_kind.values())[:_MAX_LAYERS]
    return chosen if len(chosen) > 1 else [chosen[0], chosen[0] + 1]
