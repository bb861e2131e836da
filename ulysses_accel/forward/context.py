"""The running batch, and what a part of a sharded forward can do with it.

Whoever acts within a forward (hooks on its modules, a checkpoint's recompute) reads the running
batch from `sequence.running`'s context variable, and from nowhere else. The variable lives there
because attention, which must not import this folder, reads the batch's description from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ulysses_accel.attention import InstalledAttention
from ulysses_accel.installation import Installation
from ulysses_accel.introspection.profile import ModelProfile
from ulysses_accel.sequence.running import DescribedBatch, running_batch

if TYPE_CHECKING:
    from ulysses_accel.forward.router_loss import RouterRecord
    from ulysses_accel.forward.sample_heads import SampleView


@dataclass(eq=False)
class RunningBatch(DescribedBatch):
    """One batch of a prepared model, from the beginning of its forward to the end of its backward.

    Args:
        description: of the sharded sequences; None for an ordinary batch.
        is_in_forward: whether the forward still runs; afterwards modules run only for a recompute.
        positions: `[B, S / P]` of this rank's tokens, by their name in the batch.
        merges: whether the model merges images or audio of the batch into its tokens, so that they
            are full until its decoder.
        decoder_positions: `[B, S / P]`, for that decoder; None where the batch has positions of
            its own.
        labels: `[B, S / P]` that the loss counts, or those of samples.
        has_loss: whether the model computes a loss.
        num_items_in_batch: what the sum of losses is divided by; None for the mean over this batch.
        router: what its routers did, where their loss is requested.
        samples: the full batch as the head of whole samples sees it.
        counted_before: attention layers and attention calls counted before this forward.
    """

    is_in_forward: bool = True
    positions: dict[str, Tensor] = field(default_factory=dict)
    merges: bool = False
    decoder_positions: Tensor | None = None
    labels: Tensor | None = None
    has_loss: bool = False
    num_items_in_batch: Tensor | int | None = None
    router: RouterRecord | None = None
    samples: SampleView | None = None
    counted_before: tuple[int, int] = (0, 0)


def sharded_batch() -> RunningBatch | None:
    """Returns the sharded batch of a prepared model that is running; None for an ordinary one."""
    batch = running_batch()
    if isinstance(batch, RunningBatch) and batch.description is not None:
        return batch
    return None


@dataclass(frozen=True)
class ModelToShard:
    """A model while its sharded forward is installed; nothing that outlives that keeps it.

    Args:
        model: the module that is called with batches.
        profile: what is known of the transformers model in it.
        attention: its installed attention.
        group: the ranks that share each sequence.
        world_group: the ranks that `num_items_in_batch` is counted over.
        num_steps: returns the micro-steps that the engine divides a loss by.
    """

    model: nn.Module
    profile: ModelProfile
    attention: InstalledAttention
    group: ProcessGroup
    world_group: ProcessGroup
    num_steps: Callable[[], int]


class ForwardFeature:
    """One part of a sharded forward.

    Its constructor installs what it needs on the model's modules. A feature belongs to the model
    and keeps no reference to it or its modules: a cycle would keep a deleted model alive until the
    garbage collector runs.

    Args:
        target: the model.
        changes: takes over what is installed.
    """

    def __init__(self, target: ModelToShard, changes: Installation) -> None:
        pass

    def before(self, model: nn.Module, batch: RunningBatch, kwargs: dict[str, Any]) -> None:
        """Prepares a sharded forward.

        Args:
            model: the module that is called.
            batch: the running one, to be added to.
            kwargs: the forward's arguments, to be changed in place.
        """

    def after(self, model: nn.Module, batch: RunningBatch, output: Any) -> Any:
        """Returns the output of a sharded forward, changed or not."""
        return output
