"""What a Trainer's metrics need of sharded batches: full predictions and labels, in token order,
each sample once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ulysses_accel.distributed.mesh import SequenceGroups
from ulysses_accel.errors import BatchError, ShapeError
from ulysses_accel.sequence.description import SequenceDescription
from ulysses_accel.sequence.gather import gather_sequence, shard_sequence
from ulysses_accel.sequence.labels import IGNORE_INDEX
from ulysses_accel.sequence.sharding import pad_sequence_dim

_FULL = "evaluation_batch"


@dataclass(frozen=True)
class FullEntries:
    """What metrics get of a batch as the collate function returned it.

    Args:
        entries: labels and the model's main input, by name.
        length: tokens S of the batch, before padding.
    """

    entries: dict[str, Any]
    length: int


@dataclass(frozen=True)
class KeepFull:
    """A collate function whose batches keep some entries in full; every rank of a sequence group
    draws them anyway.

    Args:
        collate_fn: the loader's.
        names: entries to keep, where a batch has them.
    """

    collate_fn: Callable[[Any], Any]
    names: Sequence[str]

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Returns the batch of the samples."""
        batch = self.collate_fn(samples)
        entries = {name: batch[name] for name in self.names if batch.get(name) is not None}
        tokens = batch.get("input_ids")
        if tokens is None:
            tokens = batch["inputs_embeds"]
        return {**batch, _FULL: FullEntries(entries, tokens.shape[1])}


def take_evaluation(inputs: Any) -> FullEntries | None:
    """Takes what `KeepFull` put into a batch out of it."""
    full: FullEntries | None = inputs.pop(_FULL, None)
    return full


def ignore_repeated_rows(inputs: dict[str, Any], state: Any, groups: SequenceGroups) -> None:
    """Ignores the labels of samples that were drawn again to fill the last batches; metrics are cut
    to the others.

    Args:
        inputs: this rank's shard; its labels are replaced.
        state: accelerate's gradient state, which knows how many samples the last batches of all
            ranks have.
        groups: this rank's place in the mesh.
    """
    if not state.end_of_dataloader or state.remainder <= 0:
        return
    for name in ("labels", "shift_labels"):
        labels = inputs.get(name)
        if labels is not None:
            before_this_rank = groups.data_parallel_rank * len(labels)
            num_new = max(0, min(len(labels), state.remainder - before_this_rank))
            inputs[name] = labels.clone()
            inputs[name][num_new:] = IGNORE_INDEX


def present(inputs: dict[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """Returns a sharded batch in which the Trainer finds labels by their names."""
    shifted = inputs.get("shift_labels")
    if "labels" in label_names and "labels" not in inputs and shifted is not None:
        return {**inputs, "labels": shifted}
    return dict(inputs)


@dataclass(frozen=True)
class Evaluation:
    """One evaluated batch.

    Args:
        full: what was kept of it; None for a loader that the Trainer did not build.
        description: of the batch.
        group: the ranks that share it.
        of_samples: whether the model's head is one of samples, whose logits every rank has.
    """

    full: FullEntries | None
    description: SequenceDescription
    group: ProcessGroup
    of_samples: bool

    def entry(self, name: str) -> Any:
        """Returns an entry of the batch as the collate function returned it.

        Raises:
            BatchError: nothing was kept of the batch.
        """
        if self.full is None:
            raise BatchError(
                "predictions were requested of a loader that is not from get_eval_dataloader or "
                "get_test_dataloader, whose labels are not kept in full. Override one of these, or "
                "use prediction_loss_only=True."
            )
        return self.full.entries.get(name)

    def joined(
        self, logits: Any, label_names: Sequence[str], prepare: Callable[[Any, Any], Any] | None
    ) -> tuple[Any, Any]:
        """Returns predictions and labels of the full batch.

        Args:
            logits: the model's outputs, tensors `[B, S / P, ...]`, in tuples.
            label_names: the batch's entries that are labels.
            prepare: turns outputs and labels into predictions, token by token; None keeps the
                outputs.

        Raises:
            ShapeError: a tensor does not have one entry for each of this rank's tokens.
        """
        labels = self._labels(label_names)
        if prepare is None:
            return self._gathered(logits, "predictions"), labels
        logits = prepare(logits, labels if self.of_samples else self._sharded(labels, logits))
        return self._gathered(logits, "what preprocess_logits_for_metrics returns"), labels

    def _labels(self, names: Sequence[str]) -> Any:
        entries = [self.entry(name) for name in names]
        if not entries or any(entry is None for entry in entries):
            return None
        return entries[0] if len(entries) == 1 else tuple(entries)

    def _sharded(self, labels: Any, like: Any) -> Any:
        """Returns this rank's shard of labels `[B, S]`."""
        if isinstance(labels, tuple):
            return tuple(self._sharded(part, like) for part in labels)
        if not isinstance(labels, Tensor):
            return labels
        device = next(tensor.device for tensor in _tensors(like))
        padded = pad_sequence_dim(labels.to(device), self.description.sequence_length, IGNORE_INDEX)
        return shard_sequence(padded, self.description, self.group)

    def _gathered(self, value: Any, what: str) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._gathered(part, what) for part in value)
        if isinstance(value, Mapping):
            return {name: self._gathered(part, what) for name, part in value.items()}
        if not isinstance(value, Tensor) or value.ndim == 0 or self.of_samples:
            return value
        expected = (self.description.batch_size, self.description.shard_length)
        if tuple(value.shape[:2]) != expected:
            raise ShapeError(
                f"{what}: a tensor of shape {list(value.shape)} does not begin with this rank's "
                f"{expected[0]} rows and {expected[1]} tokens, so it can't be gathered over the "
                "ranks of the sequence. Leave it out with ignore_keys, or return one entry for "
                "each token."
            )
        # [B, S/P, ...] -> [B, S, ...]
        padded = gather_sequence(value.contiguous(), self.description, self.group)
        assert self.full is not None
        return padded.narrow(1, 0, self.full.length)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = list(value.values()) if isinstance(value, Mapping) else value
    tensors: list[Tensor] = []
    if isinstance(parts, (tuple, list)):
        for part in parts:
            tensors += _tensors(part)
    return tensors
