"""Every causal language model of the installed transformers, shrunk to a tiny configuration without any download.

Sizes are replaced by what the fields' names say. Per-layer lists keep one layer of each kind, so that a model which
mixes windows, full attention and experts does so still, at two to six layers. What no rule knows stands in `SPECIAL`.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

VOCAB = 64
HIDDEN = 32
LAYERS = 2
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
    (r"hidden_size_per_layer_input|pronunciation_embed_dim|shape_embed_dim|\w*lora_rank|gated_norm_rank", 16),
    (r"mamba_d_state|ssm_state_size|state_size|adapter_rank|laurel_rank|router_hidden_size|mamba_dt_rank", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_ssm|mamba_expand_size", 64),
    (r"hidden_size|d_model|n_embd|embedding_size|emb_dim|lru_width|embedding_dim|backbone_hidden_size", HIDDEN),
    (r"word_embed_proj_dim|(?:in|out)put_embedding_size|attention_hidden_size", HIDDEN),
    (r"index_head_dim|qk_head_dim", 16),
    (r"mamba_\w*head_?(?:dim)?|mamba_d_head", 16),
    (r"\w*head_dim|d_head|dim_head|v_head_dim|kv_channels|rotary_dim|attention_head_size", 8),
    (r"(?:\w*num_|n_|swa_num_)?(?:key_value|kv)_heads", 2),
    (r"\w*attention_heads|n_heads?|num_heads|linear_num_\w+_heads|index_n_heads|num_query_groups", 4),
    (r"\w*(?:intermediate|ffn|feed_forward|ff)\w*_(?:size|dim)|dim_ff|dff|d_inner|n_inner|prompt_mid_dim", 48),
    (r"intermediate_size_mlp", 48),
    (r"(?:num_|n_routed_|num_local_|moe_num_)experts|zero_expert_num", 4),
    (r"num_experts_per_tok(?:en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|num_expert_group|topk_group|mamba_n_groups|n_groups", 1),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(?:attn|expert)_layer_period", 2),
    (r"(?:attn|expert)_layer_offset", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"\w*sliding_window(?:_size)?|window_size|attention_window_size|local_attention\w*|keep_window_size", 7),
    (r"attention_chunk_size|mamba_chunk_size|chunk_size|index_topk|index_block_size|rel_extent", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_\w+_positions|context_length|model_max_length", 128),
    (r"original_max_position_embeddings", 128),
    (r"max_window_layers", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
)
_DEPTH = re.compile(r"(?:num_|n_|decoder_|encoder_|num_encoder_|num_decoder_)?(?:hidden_)?layers?|num_blocks|depth")
_SPARSE_LISTS = ("moe_layers", "full_attn_idxs", "hybrid_layer_ids", "mlp_only_layers", "ple_layer_ids")

# An assistant reads the keys of the model that it assists.
_TWO_KINDS = {"num_hidden_layers": LAYERS, "layer_types": ["sliding_attention", "full_attention"]}
_NO_OWN_KEYS = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": LAYERS,
    **_TWO_KINDS,
}
_SHARED_KEYS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "ple_embed_dim": 8,
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 2,
}
# What the names do not tell: lengths that must fit each other, per model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": _NO_OWN_KEYS},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": LAYERS, **_TWO_KINDS}},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def causal_types() -> dict[str, str]:
    """Model types with a causal language model head in the installed transformers, and the class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def tiny_config(model_type: str, key_value_heads: int = 2) -> Any:
    """Returns the type's configuration at tiny sizes.

    Args:
        model_type: transformers' name of the architecture.
        key_value_heads: 2, or 4 for models whose keys can't be grouped.
    """
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    overrides = _shrink(_defaults(config_class, model_type), key_value_heads)
    return _finish(config_class(**_merge(overrides, SPECIAL.get(model_type, {}))))


def _merge(values: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with the special ones put in, sub-configurations by their fields."""
    merged = {**values, **copy.deepcopy(special)}
    for name in set(values) & set(special):
        if isinstance(values[name], dict) and "model_type" in values[name]:
            merged[name] = _merge(values[name], special[name])
    return merged


def _defaults(config_class: Any, model_type: str) -> dict[str, Any]:
    """Returns the default fields; of types whose defaults contradict each other, the special ones put them right."""
    try:
        values: dict[str, Any] = config_class().to_dict()
    except Exception:
        values = config_class(**copy.deepcopy(SPECIAL.get(model_type, {}))).to_dict()
    return values


def _finish(config: Any) -> Any:
    """Makes an encoder's configuration that of a decoder, as its causal head demands; experts stay in plain torch."""
    if hasattr(config, "is_decoder") and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
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
                changed[name] = {"model_type": value["model_type"], **_shrink(value, key_value_heads)}
            elif "rope_type" in str(value):
                changed[name] = _shrink_rope(value)
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
    changed.update(dict.fromkeys(set(changed) & {"num_key_value_heads", "num_kv_heads"}, key_value_heads))
    return changed


def _shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    nested = {key: _shrink_rope(value) if isinstance(value, dict) else value for key, value in rope.items()}
    if "mrope_section" in nested:
        nested["mrope_section"] = [2, 1, 1]
        nested["partial_rotary_factor"] = 1.0
    if "original_max_position_embeddings" in nested:
        nested["original_max_position_embeddings"] = 16
    return nested


def _rule(name: str) -> int | float | None:
    return next((value for pattern, value in _RULES if re.fullmatch(pattern, name)), None)


def _num_layers(values: dict[str, Any]) -> int:
    found = [values.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers")]
    return next((value for value in found if isinstance(value, int)), 0)


def _representative_layers(values: dict[str, Any]) -> list[int]:
    """Indices of layers that show every combination of the per-layer lists once; two layers where there is no list."""
    count = _num_layers(values)
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    if not lists or count <= LAYERS:
        return list(range(LAYERS))
    kinds: dict[str, int] = {}
    for index in range(count):
        kinds.setdefault(str([entries[index] for entries in lists]), index)
    chosen = sorted(kinds.values())[:MAX_LAYERS]
    return chosen if len(chosen) > 1 else [chosen[0], chosen[0] + 1]


def build(config: Any, seed: int = 0) -> nn.Module:
    """Returns the model in float64 and training mode, without dropout and with every parameter away from its start.

    Args:
        config: of `tiny_config`.
        seed: of the parameters.
    """
    torch.manual_seed(seed)
    model: nn.Module = _model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            # Gates and norms that start at 0 or 1 would hide what is behind them.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def _model(config: Any) -> Any:
    """The causal model of a configuration, or of the part of it that the model's class takes."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    implementation = "sdpa" if getattr(model_class, "_supports_sdpa", False) else None
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    taken = [part for part in parts if isinstance(part, model_class.config_class)]
    if taken and not isinstance(config, model_class.config_class):
        return model_class._from_config(taken[0], attn_implementation=implementation)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
