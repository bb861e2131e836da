"""Small models that attend by themselves, built as the remote code of Baichuan and of ChatGLM is:
names, order of dims, who makes masks and positions. Nothing in them knows of sequence parallelism
or of transformers' AttentionInterface.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class BaichuanConfig(PreTrainedConfig):
    """Of either size: rotary positions, or ALiBi."""

    model_type = "baichuan"

    def __init__(self, alibi: bool = False, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_attention_heads, self.num_hidden_layers = (
            64,
            32,
            4,
            2,
        )
        self.uses_distances = alibi
        super().__init__(**kwargs)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor]:
    cos, sin = (table.squeeze(1).squeeze(0)[position_ids].unsqueeze(1) for table in (cos, sin))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class RotaryEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        rates = 1e4 ** (-torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), rates)
        table = torch.cat([angles, angles], -1)[None, None].to(x.dtype)
        return table.cos(), table.sin()


class Attention(nn.Module):
    """The 7B's: rotary, with the mask that the model makes."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.config, self.num_heads = config, config.num_attention_heads
        self.hidden_size, self.head_dim = (
            config.hidden_size,
            config.hidden_size // config.num_attention_heads,
        )
        self.W_pack = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=False)
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.rotary_emb = RotaryEmbedding(self.head_dim)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None, None]:
        batch, length, _size = hidden_states.shape
        packed = (
            self.W_pack(hidden_states)
            .unflatten(-1, (3, self.hidden_size))
            .unsqueeze(0)
            .transpose(0, -2)
            .squeeze(-2)
        )
        query, key, value = (
            part.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in packed
        )
        cos, sin = self.rotary_emb(value, seq_len=length)
        assert position_ids is not None
        query, key = apply_rotary_pos_emb(query, key, cos, sin, position_ids)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, self.hidden_size)), None, None


class BaichuanAttention(nn.Module):
    """The 13B's: all it knows of positions is in the mask."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.config, self.num_heads = config, config.num_attention_heads
        self.hidden_size, self.head_dim = (
            config.hidden_size,
            config.hidden_size // config.num_attention_heads,
        )
        self.W_pack = nn.Linear(self.hidden_size, 3 * self.hidden_size, bias=False)
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None, None]:
        batch, length, _size = hidden_states.shape
        packed = (
            self.W_pack(hidden_states)
            .unflatten(-1, (3, self.hidden_size))
            .unsqueeze(0)
            .transpose(0, -2)
            .squeeze(-2)
        )
        query, key, value = (
            part.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for part in packed
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(self.head_dim)
        assert attention_mask is not None
        out = (scores + attention_mask).softmax(-1) @ value
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, self.hidden_size)), None, None


class Layer(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config) if config.uses_distances else Attention(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.hidden_size)
        )

    def forward(self, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        hidden = (
            hidden
            + self.self_attn(self.norm(hidden), attention_mask=mask, position_ids=position_ids)[0]
        )
        return hidden + self.mlp(hidden)


class BaichuanModel(nn.Module):
    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.config = config
        self.alibi_mask: Tensor | None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing, self.alibi_mask = False, None
        if config.uses_distances:
            self.get_alibi_mask = self._get_alibi_mask

    def _prepare_decoder_attention_mask(
        self, attention_mask: Tensor | None, hidden: Tensor
    ) -> Tensor:
        length = hidden.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None, :]
        return torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(
            ~seen, torch.finfo(hidden.dtype).min
        )

    def _get_alibi_mask(self, tensor: Tensor, length: int) -> Tensor:
        number = self.config.num_attention_heads
        slopes = torch.tensor(
            [2.0 ** (-8.0 * (head + 1) / number) for head in range(number)], dtype=tensor.dtype
        )
        biases = slopes[:, None, None] * (torch.arange(length) - length + 1).to(tensor.dtype)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        return biases.expand(number, length, length).masked_fill(
            later, torch.finfo(tensor.dtype).min
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        if self.config.uses_distances:
            if self.alibi_mask is None or self.alibi_mask.shape[-1] != input_ids.shape[1]:
                self.alibi_mask = self.get_alibi_mask(hidden, input_ids.shape[1])
            mask = self.alibi_mask
            if attention_mask is not None:
                padding = (attention_mask == 0)[:, None, None, :]
                mask = mask.masked_fill(padding, torch.finfo(hidden.dtype).min)
        else:
            mask = self._prepare_decoder_attention_mask(attention_mask, hidden)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, mask, position_ids, use_reentrant=False)
            else:
                hidden = layer(hidden, mask, position_ids)
        return hidden


class BaichuanForCausalLM(PreTrainedModel):
    """The 7B's; it shifts labels by itself, in its own dtype."""

    config_class = BaichuanConfig

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        logits = self.lm_head(self.model(input_ids, attention_mask, position_ids))
        return outcome(logits, labels, return_dict)


class BaichuanAlibiForCausalLM(BaichuanForCausalLM):
    """The 13B's, whose forward takes no positions."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        logits = self.lm_head(self.model(input_ids, attention_mask))
        loss = None
        if labels is not None:
            shift_logits, shift_labels = (
                logits[..., :-1, :].contiguous(),
                labels[..., 1:].contiguous(),
            )
            loss = F.cross_entropy(
                shift_logits.view(-1, shift_logits.shape[-1]), shift_labels.view(-1)
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits) if return_dict else (logits,)


def outcome(logits: Tensor, labels: Tensor | None, return_dict: bool) -> Any:
    loss = None
    if labels is not None:
        shift_logits, shift_labels = logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
        loss = F.cross_entropy(shift_logits.view(-1, shift_logits.shape[-1]), shift_labels.view(-1))
    if not return_dict:
        return (logits,) if loss is None else (loss, logits)
    return CausalLMOutputWithPast(loss=loss, logits=logits)


class ChatGLMConfig(PreTrainedConfig):
    model_type = "chatglm"

    def __init__(self, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size, self.num_attention_heads, self.num_layers = 64, 32, 4, 2
        self.multi_query_group_num, self.seq_length = 2, 64
        super().__init__(**kwargs)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """`[s, b, n, D]`, of which the first half is rotated, by pairs of neighbours; `[s, b, D / 4,
    2]`.
    """
    width = 2 * table.shape[-2]
    turned, rest = x[..., :width].unflatten(-1, (-1, 2)), x[..., width:]
    cos, sin = table[..., 0].unsqueeze(2), table[..., 1].unsqueeze(2)
    pairs = [
        turned[..., 0] * cos - turned[..., 1] * sin,
        turned[..., 1] * cos + turned[..., 0] * sin,
    ]
    return torch.cat([torch.stack(pairs, -1).flatten(-2), rest], -1)


class CoreAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.attention_dropout = nn.Dropout(0.0)

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: Any
    ) -> Tensor:
        query, key, value = (
            layer.permute(1, 2, 0, 3) for layer in (query_layer, key_layer, value_layer)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        later = (
            torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            if attention_mask is None
            else attention_mask
        )
        weights = self.attention_dropout(
            scores.masked_fill(later, torch.finfo(scores.dtype).min).softmax(-1)
        )
        # [b, n, s, D] -> [s, b, n * D]
        return (weights @ value).permute(2, 0, 1, 3).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.multi_query_attention = True
        self.heads, self.num_multi_query_groups_per_partition = (
            config.num_attention_heads,
            config.multi_query_group_num,
        )
        self.size = config.hidden_size // self.heads
        width = config.hidden_size + 2 * self.size * self.num_multi_query_groups_per_partition
        self.query_key_value = nn.Linear(config.hidden_size, width)
        self.core_attention = CoreAttention(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: Any, rotary_pos_emb: Tensor) -> Tensor:
        groups = self.num_multi_query_groups_per_partition
        widths = [self.heads * self.size, groups * self.size, groups * self.size]
        parts = self.query_key_value(hidden_states).split(widths, -1)
        query, key, value = (part.unflatten(-1, (-1, self.size)) for part in parts)
        query, key = rotate_pairs(query, rotary_pos_emb), rotate_pairs(key, rotary_pos_emb)
        key, value = (part.repeat_interleave(self.heads // groups, 2) for part in (key, value))
        return self.dense(self.core_attention(query, key, value, attention_mask))


class GLMBlock(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size)
        self.self_attention = SelfAttention(config)
        self.mlp = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, mask: Any, rotary: Tensor) -> Tensor:
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), mask, rotary)
        return hidden + self.mlp(hidden)


class GLMTransformer(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config) for _ in range(config.num_layers))
        self.gradient_checkpointing = False

    def forward(self, hidden: Tensor, attention_mask: Any, rotary_pos_emb: Tensor) -> Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(
                    layer, hidden, attention_mask, rotary_pos_emb, use_reentrant=False
                )
            else:
                hidden = layer(hidden, attention_mask, rotary_pos_emb)
        return hidden


class ChatGLMForConditionalGeneration(PreTrainedModel):
    """Tokens come first inside; masks are made for padding alone."""

    config_class = ChatGLMConfig

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        length = input_ids.shape[1]
        rates = 1e4 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
        angles = torch.outer(torch.arange(self.config.seq_length, dtype=torch.float64), rates)
        table = torch.stack([angles.cos(), angles.sin()], -1)
        rotary = table[position_ids] if position_ids is not None else table[None, :length]
        mask = None
        if attention_mask is not None and not attention_mask.all():
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            mask = later | (attention_mask == 0)[:, None, None, :]
        hidden = self.embedding(input_ids).transpose(0, 1)
        hidden = self.encoder(hidden, mask, rotary_pos_emb=rotary.transpose(0, 1))
        logits = self.output_layer(hidden).transpose(0, 1).contiguous()
        loss = None
        if labels is not None:
            shift_logits, shift_labels = (
                logits[..., :-1, :].contiguous(),
                labels[..., 1:].contiguous(),
            )
            loss = F.cross_entropy(
                shift_logits.view(-1, shift_logits.shape[-1]), shift_labels.view(-1)
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits) if return_dict else (logits,)
