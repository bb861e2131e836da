"""Trains a vision-language model on long rows of images and captions, with a stock
`accelerate.Accelerator`.

    torchrun --nproc-per-node 2 examples/vision/train.py --sp-size 2       # Ulysses
    torchrun --nproc-per-node 2 examples/vision/train.py --cp-size 2       # ring

The model is a tiny Qwen2-VL, made here. A row shows one plain square after another, each followed
by the name of its color; only the names are labels, so that the loss falls as far as the model sees
the images. Nothing but the argument of `Accelerator` says that rows are shared by processes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from ulysses_accel import ParallelismConfig

COLORS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
IMAGE_START, IMAGE, VIDEO, IMAGE_END, FIRST_NAME = 3, 4, 5, 6, 7
# An image of 8 x 8 pixels is 4 x 4 patches of 2 x 2 pixels, of which 2 x 2 become one token.
GRID, PATCH, TOKENS_PER_IMAGE = (1, 4, 4), 2, 4


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(
        cpu=args.cpu,
        parallelism_config=ParallelismConfig(sp_size=args.sp_size, cp_size=args.cp_size),
    )
    set_seed(args.seed)
    model = make_model()
    rows = [make_row(args.images, seed) for seed in range(args.rows)]
    loader = DataLoader(rows, batch_size=args.batch_size, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    seen = count_tokens(model.get_decoder())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step, losses = 0, []
    while step < args.steps:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            step += 1
            if step % 10 == 0:
                accelerator.print(f"step {step} loss {losses[-1]:.4f}")
            if step == args.steps:
                break
    length = rows[0]["input_ids"].shape[0]
    print(
        f"process {accelerator.process_index}: each layer saw {seen[-1]} of a row's {length} "
        "tokens",
        flush=True,
    )
    accelerator.print(f"first loss {losses[0]:.6f}, last loss {losses[-1]:.6f}")
    accelerator.end_training()


def make_model() -> Any:
    """Returns a Qwen2-VL of some ten thousand parameters."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": FIRST_NAME + len(COLORS),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
    )
    return Qwen2VLForConditionalGeneration(config)


def make_row(num_images: int, seed: int) -> dict[str, Tensor]:
    """Returns what the model's processor makes of images with captions.

    Args:
        num_images: n, in the row.
        seed: of their colors and of the noise on them.

    Returns:
        `input_ids`, `mm_token_type_ids`, `labels` `[7 n]`, `pixel_values` `[16 n, 24]` and
        `image_grid_thw` `[n, 3]`.
    """
    generator = torch.Generator().manual_seed(seed)
    colors = torch.randint(len(COLORS), (num_images,), generator=generator)
    names = (FIRST_NAME + colors).tolist()
    ids = torch.tensor(
        [[IMAGE_START, *[IMAGE] * TOKENS_PER_IMAGE, IMAGE_END, name] for name in names]
    )
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    # A patch: 3 channels, 2 (equal) frames, 2 x 2 pixels; [n, 3] -> [16 n, 24]
    plain = torch.tensor(list(COLORS.values()), dtype=torch.float32)[colors]
    pixels = plain.repeat_interleave(GRID[1] * GRID[2], dim=0).repeat_interleave(
        2 * PATCH * PATCH, dim=1
    )
    return {
        "input_ids": ids.flatten(),
        "mm_token_type_ids": (ids == IMAGE).int().flatten(),
        "labels": labels.flatten(),
        "pixel_values": pixels + 0.1 * torch.randn(pixels.shape, generator=generator),
        "image_grid_thw": torch.tensor([GRID] * num_images),
    }


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns a batch: tokens by row, the images of all rows in a list."""
    images = {
        key: torch.cat([row[key] for row in rows]) for key in ("pixel_values", "image_grid_thw")
    }
    return {
        **images,
        **{key: torch.stack([row[key] for row in rows]) for key in rows[0] if key not in images},
    }


def count_tokens(decoder: Any) -> list[int]:
    """Returns a list to which the decoder's first layer adds how many tokens of a row it
    receives.
    """
    seen: list[int] = []
    decoder.layers[0].register_forward_pre_hook(lambda _layer, args: seen.append(args[0].shape[1]))
    return seen


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--sp-size",
        type=int,
        default=None,
        help="Ulysses degree; the launcher's setting where it is left out",
    )
    add("--cp-size", type=int, default=None, help="ring degree")
    add("--images", type=int, default=16, help="images in a row; a row has 7 tokens for each")
    add("--rows", type=int, default=64, help="rows of the data set")
    add("--batch-size", type=int, default=2, help="rows of a batch")
    add("--steps", type=int, default=80, help="optimizer steps")
    add("--learning-rate", type=float, default=3e-3, help="of AdamW")
    add("--seed", type=int, default=0, help="of the weights")
    add("--cpu", action="store_true", help="compute on the CPU even where there is a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
