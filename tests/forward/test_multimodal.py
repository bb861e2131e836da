"""Images and sound merged before the cut: what the decoder is given, forwards before one backward,
what is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ulysses_accel
from tests.helpers.architectures import GROUPED, Batch, InDouble
from tests.helpers.architectures import build as build_text
from tests.helpers.engine_jobs import error_of
from tests.helpers.parity_jobs import EXACT, Engine, Grads, compare, zero_gradients
from tests.helpers.ranks import run_ranks
from tests.helpers.support import Support
from tests.helpers.vision_models import IMAGE, MERGERS, build, make_batch
from ulysses_accel import supports
from ulysses_accel.introspection.requirements import rules_of
from ulysses_accel.introspection.structure import ModelReading, merging_of
from ulysses_accel.sequence.gather import shard_sequence

QWEN = "qwen3_vl"


def first(samples: list[Batch]) -> Batch:
    return samples[0]


def loader(*batches: Batch) -> DataLoader[Any]:
    whole: Any = list(batches)
    return DataLoader(whole, batch_size=1, collate_fn=first)


def packed() -> Batch:
    """Returns two documents in a row, each with an image, told apart by the first of four planes of
    positions.
    """
    batch = make_batch(QWEN, "right")
    del batch["attention_mask"]
    tokens = batch["input_ids"][:1].clone()
    tokens[0, :16] = torch.arange(16) + 8
    tokens[0, 1:5] = tokens[0, 9:13] = IMAGE
    labels = tokens.masked_fill(tokens == IMAGE, -100)
    labels[0, 7] = -100
    text = torch.tensor([*range(7), *range(9)])
    planes = torch.stack([text, text, text + 1, text + 2])[:, None]
    types = (tokens == IMAGE).int()
    return {
        **batch,
        "input_ids": tokens,
        "labels": labels,
        "position_ids": planes,
        "mm_token_type_ids": types,
    }


def steps_of(
    model: nn.Module,
    batches: list[Batch],
    backward: Callable[[Tensor], None],
    in_double: bool = True,
) -> tuple[float, Grads]:
    """Returns the sum of the losses of batches that are all forwarded before the one backward, and
    its gradients.
    """
    zero_gradients(model)
    with InDouble() if in_double else nullcontext():
        loss = torch.stack([model(**batch).loss for batch in batches]).sum()
        backward(loss)
    named = ((key.removeprefix("module."), own.grad) for key, own in model.named_parameters())
    return float(loss.detach()), {key: grad.clone() for key, grad in named if grad is not None}


def plans() -> dict[str, tuple[float, Grads]]:
    def backward(loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    both, one = (
        [make_batch(QWEN, "border"), make_batch(QWEN, "text")],
        [{**packed(), "use_cache": False}],
    )
    return {
        "two forwards": steps_of(build(QWEN), both, backward),
        "packed": steps_of(build(QWEN), one, backward),
    }


def apart(found: tuple[float, Grads], expected: tuple[float, Grads]) -> float:
    difference = compare(*found, *expected)
    return max(difference.loss, difference.grad, abs(difference.ratio))


def sharded(expected: dict[str, tuple[float, Grads]]) -> dict[str, Any]:
    def distance(name: str, batches: list[Batch]) -> float:
        return apart(steps_of(model, batches, accelerator.backward), expected[name])

    accelerator = Engine().accelerator(sp_size=1, cp_size=2)
    batches = loader(make_batch(QWEN, "border"), make_batch(QWEN, "text"), packed())
    model, batches = accelerator.prepare(build(QWEN), batches)
    inner = accelerator.unwrap_model(model)
    images, text, documents = list(batches)
    found: dict[str, Any] = {"two forwards": distance("two forwards", [images, text])}
    found["packed"] = distance("packed", [documents])
    # A recompute does not see that all is computed in float64, so both are as they come.
    kept = steps_of(model, [images, text], accelerator.backward, in_double=False)
    inner.gradient_checkpointing_enable()
    found["checkpointed"] = apart(
        steps_of(model, [images, text], accelerator.backward, in_double=False), kept
    )
    inner.gradient_checkpointing_disable()
    found["positions"] = positions_given(accelerator, inner, images)
    tokens = shard_sequence(
        images["input_ids"], images["sequence_description"], accelerator.sequence_parallel.group
    )
    found["sharded tokens"] = error_of(model, **{**images, "input_ids": tokens})
    lost = {key: value for key, value in images.items() if key != "sequence_description"}
    found["lost"] = error_of(model, **lost)
    accelerator.sequence_parallel.close()
    found["hooks left"] = sum(len(module._forward_pre_hooks) for module in inner.modules())
    return found


def positions_given(accelerator: Any, inner: Any, images: Batch) -> list[bool]:
    """Returns whether the decoder's positions are this rank's part of the whole ones that the model
    makes.
    """
    seen: list[Tensor] = []
    rotary = inner.get_decoder().rotary_emb
    handle = rotary.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
    with torch.no_grad():
        inner(**images)
    handle.remove()
    whole, _ = inner.model.get_rope_index(
        images["input_ids"], images["mm_token_type_ids"], image_grid_thw=images["image_grid_thw"]
    )
    description, group = images["sequence_description"], accelerator.sequence_parallel.group
    return [own.equal(shard_sequence(whole, description, group, dim=-1)) for own in seen]


def test_forwards_positions_and_hooks(support: Support) -> None:
    for found in run_ranks(sharded, 2, plans(), init=False):
        assert max(found["two forwards"], found["packed"], found["checkpointed"]) <= EXACT
        assert found["positions"] == [True]
        assert found["sharded tokens"].startswith(
            "BatchError: the batch has (2, 8) rows and tokens on this rank"
        )
        assert (
            "says (2, 16) (16 tokens over 2 ranks, in full beside images or audio)"
            in found["sharded tokens"]
        )
        assert "came without its sequence_description" in found["lost"]
        assert found["hooks left"] == 0
    code = "model(**batch)  # position_ids [4, B, S], text positions first, start over in each document"
    support("batch", "packed documents with images", "cp", code=code)
    support(
        "batch",
        "mRoPE ids [3, B, S] and [4, B, S]",
        "cp",
        code="model(**batch)  # position_ids [3, B, S]",
    )


def with_less_memory() -> float:
    """Returns how far a step with all that saves memory is from the same without."""
    found = []
    for memory in (
        None,
        ulysses_accel.MemoryConfig(tiled_mlp=True, tiled_loss=True, checkpoint=True),
    ):
        AcceleratorState._reset_state(True)
        config = ulysses_accel.ParallelismConfig(sp_size=2, memory_config=memory)
        accelerator = Accelerator(cpu=True, parallelism_config=config)
        model, batches = accelerator.prepare(
            build("qwen2_vl"), loader(make_batch("qwen2_vl", "border"))
        )
        found.append(steps_of(model, list(batches), accelerator.backward, in_double=False))
    return apart(found[1], found[0])


def test_what_saves_memory_works_beside_images() -> None:
    # Loss and norms are in float32.
    assert max(run_ranks(with_less_memory, 2, init=False)) <= 1e-5


def _siglip() -> Any:
    return hf.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )


def paligemma() -> Any:
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**GROUPED),
        vision_config=_siglip(),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return hf.PaliGemmaForConditionalGeneration._from_config(config)


def mllama() -> Any:
    text = {**GROUPED, "cross_attention_layers": [1]}
    vision = {
        "hidden_size": 16,
        "attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 1,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
    }
    return hf.MllamaForConditionalGeneration._from_config(
        hf.MllamaConfig(text_config=text, vision_config=vision)
    )


def refusals() -> dict[str, str]:
    batch = make_batch("gemma3", "border")
    types = (batch["input_ids"] == IMAGE).long()
    cases: dict[str, tuple[Callable[[], Any], Batch]] = {
        "gemma3": (lambda: build("gemma3"), {**batch, "token_type_ids": types}),
        "mllama": (
            mllama,
            {**make_batch("llava", "text"), "pixel_values": torch.randn(2, 1, 1, 3, 8, 8)},
        ),
    }
    found = {}
    for name, (make, whole) in cases.items():
        accelerator = Engine().accelerator(sp_size=2)
        model, batches = accelerator.prepare(make(), loader(whole))
        found[name] = error_of(model, **next(iter(batches)))
    return found


def test_refusals_by_name(support: Support) -> None:
    for found in run_ranks(refusals, 2, init=False):
        assert found["gemma3"].startswith(
            "UnsupportedModelError: by the batch's token_type_ids the model lets tokens"
        )
        assert "Leave token_type_ids out" in found["gemma3"]
        assert found["mllama"].startswith(
            "BatchError: the batch has pixel_values beside sharded tokens"
        )
    # Gemma 3 is causal without token_type_ids, PaliGemma never.
    (finding,) = supports(paligemma(), ulysses_accel.ParallelismConfig(sp_size=2))
    assert "its decoder lets the tokens of an image and its prompt see each other" in finding.fact
    blocks = "image tokens see each other in both directions"
    support.refused("model", "PaliGemma, and Gemma 3 with token_type_ids", "sp", blocks)
    support.refused("model", "Mllama with images", "sp", "images come in by cross-attention")


@pytest.mark.parametrize("name", MERGERS)
def test_where_models_merge(name: str) -> None:
    model = build(name)
    merging = merging_of(ModelReading(model))
    assert merging is not None
    assert rules_of(model).merges
    names = {module: name for name, module in model.named_modules()}
    assert names[merging.decoder] in ("model.language_model", "model.text_model")
    (tower,) = (names[module] for module in merging.towers)
    assert tower in (
        "model.visual",
        "model.vision_tower",
        "model.vision_model",
        "model.audio_tower",
    )
    assert merging.has_blocks == (name == "gemma3")


def test_other_models_merge_nothing() -> None:
    for name in ("llama_dynamic", "bert", "bart", "whisper"):
        assert merging_of(ModelReading(build_text(name))) is None
    assert merging_of(ModelReading(mllama())) is None
