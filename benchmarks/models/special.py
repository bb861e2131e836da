"""What the fields' names do not tell the shrinking of a configuration: lengths that must fit each
other, per type.
"""

from __future__ import annotations

from typing import Any

HIDDEN = 32
LAYERS = 2

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
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ROPE_BY_KIND = {"full_attention": _ROPE, "sliding_attention": _ROPE}
# What the names do not tell: lengths that must fit each other, per model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE_BY_KIND}},
    "cohere_compass_text": {"rope_parameters": _ROPE_BY_KIND},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 48,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
    "emu3": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
            "moe_intermediate_size": [48, 48],
        }
    },
    "esm": {"vocab_size": 64, "pad_token_id": 0, "mask_token_id": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm5_next": {"text_config": {"index_kpool": 4, "head_dim": 0, "qk_rope_head_dim": 0}},
    "granite_docling": {"vision_config": {"out_hidden_size": HIDDEN}},
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": _NO_OWN_KEYS},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": LAYERS, **_TWO_KINDS}},
    "gemma3n_text": _SHARED_KEYS,
    "gemma4_text": _SHARED_KEYS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mistral4": {"head_dim": 16},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "muse_spark": {
        "projector_hidden_size": HIDDEN,
        "audio_config": {"out_hidden_size": HIDDEN, "hidden_sizes": [8, 8, 8, 8]},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "neomme": {"head_dim": 16},
    "paddleocr_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 4},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 4},
    "step3p7": {"text_config": {"sliding_window": 7}},
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
        "attention_hidden_size": 2 * HIDDEN,
    },
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
