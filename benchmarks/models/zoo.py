"""Any architecture of the installed transformers, shrunk to a tiny configuration without any
download.

Sizes are replaced by what the fields' names say. Per-layer lists keep one layer of each kind, so
that a model which mixes windows, full attention and experts does so still, at two to six layers.
What no rule knows stands in `special.py`.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from benchmarks.models.heads import Architecture
from benchmarks.models.special import HIDDEN, LAYERS, SPECIAL

VOCAB = 64
MAX_LAYERS = 6

# The first pattern that matches a whole field name decides; None keeps the default.
_RULES: tuple[tuple[str, int | float | None], ...] = (
    (r"type_vocab_size|task_type_vocab_size", None),
    (r"chunk_size_feed_forward|(?:classifier|summary)_.*", None),
    (r".*vocab(?:_size\w*)?", VOCAB),
    (r".*(?:dropout|drop|pdrop|jitter)\w*", 0.0),
    (r"bos_token_id|decoder_start_token_id", 1),
    (r"eos_token_id|forced_eos_token_id", 2),
    (r"pad_token_id", 0),
    (r"\w+_(?:token_id|token_index)", 4),
    (
        r"hidden_size_per_layer_input|pronunciation_embed_dim|shape_embed_dim|\w*lora_rank|gated_norm_rank",
        16,
    ),
    (
        r"mamba_d_state|ssm_state_size|state_size|adapter_rank|laurel_rank|router_hidden_size|mamba_dt_rank",
        8,
    ),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_ssm|mamba_expand_size", 64),
    (
        r"hidden_size|d_model|n_embd|embedding_size|emb_dim|lru_width|embedding_dim|backbone_hidden_size",
        HIDDEN,
    ),
    (r"embed_dim|base_channels|projector_hidden_dim", HIDDEN),
    (r"num_filters", 1),
    (r"word_embed_proj_dim|(?:in|out)put_embedding_size|attention_hidden_size", HIDDEN),
    (r"index_head_dim|qk_head_dim", 16),
    (r"mamba_\w*head_?(?:dim)?|mamba_d_head", 16),
    (r"\w*head_dim|d_head|dim_head|v_head_dim|kv_channels|rotary_dim|attention_head_size", 8),
    (r"(?:\w*num_|n_|swa_num_)?(?:key_value|kv)_heads", 2),
    (
        r"\w*attention_heads|n_heads?|num_heads|linear_num_\w+_heads|index_n_heads|num_query_groups",
        4,
    ),
    (
        r"\w*(?:intermediate|ffn|feed_forward|ff)\w*_(?:size|dim)|dim_ff|dff|d_inner|n_inner|prompt_mid_dim",
        48,
    ),
    (r"intermediate_size_mlp", 48),
    (r"(?:num_|n_routed_|num_local_|moe_num_)experts|zero_expert_num", 4),
    (r"num_experts_per_tok(?:en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|num_expert_group|topk_group|mamba_n_groups|n_groups", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(?:attn|expert)_layer_period", 2),
    (r"(?:attn|expert)_layer_offset", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (
        r"\w*sliding_window(?:_size)?|window_size|attention_window_size|local_attention\w*|keep_window_size",
        7,
    ),
    (r"attention_chunk_size|mamba_chunk_size|chunk_size|index_topk|index_block_size|rel_extent", 8),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_\w+_positions|context_length|model_max_length",
        128,
    ),
    (r"original_max_position_embeddings", 128),
    (r"max_window_layers", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
)
_DEPTH = re.compile(
    r"(?:num_|n_|decoder_|encoder_|num_encoder_|num_decoder_)?(?:hidden_)?layers?|num_blocks|depth"
)
_SPARSE_LISTS = (
    "moe_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "ple_layer_ids",
)


def tiny_config(architecture: Architecture, key_value_heads: int = 2) -> Any:
    """Returns an architecture's configuration at tiny sizes.

    Args:
        architecture: of `heads.architectures`.
        key_value_heads: 2, or 4 for models whose keys can't be grouped.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[architecture.model_type]
    overrides = _shrink(_defaults(config_class, architecture.model_type), key_value_heads)
    special = {**SPECIAL.get(architecture.model_type, {}), **architecture.overrides}
    return _finish(
        config_class(**_merge(overrides, special)), decodes=architecture.head in ("causal", "rope")
    )


def _merge(values: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the special ones put in, sub-configurations by their fields."""
    merged = {**values, **copy.deepcopy(special)}
    for name in set(values) & set(special):
        if isinstance(values[name], dict) and "model_type" in values[name]:
            merged[name] = _merge(values[name], special[name])
    return merged


def _defaults(config_class: Any, model_type: str) -> dict[str, Any]:
    """Returns the default fields; of types whose defaults contradict each other, the special ones
    put them right.
    """
    try:
        values: dict[str, Any] = config_class().to_dict()
    except Exception:
        values = config_class(**copy.deepcopy(SPECIAL.get(model_type, {}))).to_dict()
    return values


def _finish(config: Any, *, decodes: bool) -> Any:
    """Makes an encoder's configuration that of a decoder where its causal head demands it; experts
    stay in torch.
    """
    if (
        decodes
        and hasattr(config, "is_decoder")
        and not getattr(config, "is_encoder_decoder", False)
    ):
        config.is_decoder = True
    if getattr(config, "is_encoder_decoder", False):
        for name, token in (("decoder_start_token_id", 1), ("pad_token_id", 0)):
            if getattr(config, name, None) is None:
                setattr(config, name, token)
    for part in (
        config,
        *(getattr(config, name, None) for name in getattr(config, "sub_configs", {})),
    ):
        if part is not None:
            part._experts_implementation = "eager"
    return config


def _shrink(values: dict[str, Any], key_value_heads: int) -> dict[str, Any]:
    """Returns the fields of one configuration that get another value."""
    kept = _representative_layers(values)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if "model_type" in value:
                flags = {
                    flag: True for flag in ("is_decoder", "add_cross_attention") if value.get(flag)
                }
                changed[name] = {
                    "model_type": value["model_type"],
                    **flags,
                    **_shrink(value, key_value_heads),
                }
            elif "rope_type" in str(value):
                changed[name] = _shrink_rope({**_sections(values), **value})
        elif name in _SPARSE_LISTS:
            changed[name] = [] if not value else [len(kept) - 1]
        elif isinstance(value, list) and len(value) == _num_layers(values) > 2:
            changed[name] = [value[index] for index in kept]
        elif value is None and name in ("head_dim", "num_key_value_heads", "moe_intermediate_size"):
            changed[name] = _rule(name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            new = len(kept) if _DEPTH.fullmatch(name) else _rule(name)
            if new is not None:
                changed[name] = new
    changed.update(
        dict.fromkeys(set(changed) & {"num_key_value_heads", "num_kv_heads"}, key_value_heads)
    )
    return changed


def _sections(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the key that deals positions of several planes, for types that know it and default it
    in the model.
    """
    from transformers import CONFIG_MAPPING

    config_class: Any = (
        CONFIG_MAPPING[values["model_type"]] if values.get("model_type") in CONFIG_MAPPING else None
    )
    known = getattr(config_class, "ignore_keys_at_rope_validation", None) or ()
    return {"mrope_section": []} if "mrope_section" in known else {}


def _shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _shrink_rope(value) if isinstance(value, dict) else value
        for key, value in rope.items()
    }
    if "mrope_section" in nested:
        nested["mrope_section"] = [2, 1, 1]
        nested["partial_rotary_factor"] = 1.0
    if "original_max_position_embeddings" in nested:
        nested["original_max_position_embeddings"] = 16
    return nested


def _rule(name: str) -> int | float | None:
    return next((value for pattern, value in _RULES if re.fullmatch(pattern, name)), None)


def _num_layers(values: dict[str, Any]) -> int:
    found = [
        values.get(name)
        for name in ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")
    ]
    return next((value for value in found if isinstance(value, int)), 0)


def _representative_layers(values: dict[str, Any]) -> list[int]:
    """Indices of layers that show every combination of the per-layer lists once; two layers where
    there is no list.
    """
    count = _num_layers(values)
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    if not lists or count <= LAYERS:
        return list(range(LAYERS))
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(str([entries[index] for entries in lists]), index)
    chosen = sorted(kinds.values())[:MAX_LAYERS]
    return chosen if len(chosen) > 1 else [chosen[0], chosen[0] + 1]


def build(architecture: Architecture, config: Any, seed: int = 0) -> nn.Module:
    """Returns the model in float64 and training mode, without dropout and with every parameter away
    from its start.

    Args:
        architecture: of `heads.architectures`.
        config: its `tiny_config`.
        seed: of the parameters.
    """
    torch.manual_seed(seed)
    model: nn.Module = _model(architecture, config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Gates and norms that start at 0 or 1 would hide what is behind them.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def _model(architecture: Architecture, config: Any) -> Any:
    """The model of a configuration, or of the part of it that the model's class takes."""
    from transformers.models.auto import modeling_auto

    model_class: Any = getattr(modeling_auto, architecture.mapping)[type(config)]
    model_class = model_class[0] if isinstance(model_class, (tuple, list)) else model_class
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    taken = [part for part in parts if isinstance(part, model_class.config_class)]
    if taken and not isinstance(config, model_class.config_class):
        config = taken[0]
    implementation = "sdpa" if getattr(model_class, "_supports_sdpa", False) else None
    try:
        return model_class._from_config(config, attn_implementation=implementation)
    except ValueError:
        # Some part of it does not know sdpa.
        return model_class._from_config(config, attn_implementation="eager")
