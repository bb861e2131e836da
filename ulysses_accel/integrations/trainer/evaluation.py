"""What a Trainer's metrics need of sharded batches: predictions and labels whole, in token order,
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

_WHOLE = "evaluation_batch"


@dataclass(frozen=True)
class WholeEntries:
    """What metrics are given of a batch as it came from the collate function.

    Args:
        entries: labels and the model's main input, by name.
        length: tokens S of the batch, before padding.
    """

    entries: dict[str, Any]
    length: int


@dataclass(frozen=True)
class KeepWhole:
    """A collate function whose batches keep some entries whole; every rank of a sequence group
    draws them anyway.

    Args:
        collate_fn: the loader's own.
        names: entries to keep, where a batch has them.
    """

    collate_fn: Callable[[Any], Any]
    names: Sequence[str]

    def __call__(self, samples: Any) -> dict[str, Any]:
        """Returns the batch of the samples."""
        batch = self.collate_fn(samples)
        entries = {name: batch[name] for name in self.names if batch.get(name) is not None}
        tokens = next(
            batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None
        )
        return {**batch, _WHOLE: WholeEntries(entries, tokens.shape[1])}


def take_evaluation(inputs: Any) -> WholeEntries | None:
    """Takes what `KeepWhole` put into a batch out of it."""
    whole: WholeEntries | None = inputs.pop(_WHOLE, None)
    return whole


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
            own = max(
                0, min(len(labels), state.remainder - groups.data_parallel_rank * len(labels))
            )
            inputs[name] = labels.clone()
            inputs[name][own:] = IGNORE_INDEX


def presented(inputs: dict[str, Any], label_names: Sequence[str]) -> dict[str, Any]:
    """Returns a sharded batch in which stock code finds labels by their names."""
    shifted = inputs.get("shift_labels")
    if "labels" in label_names and "labels" not in inputs and shifted is not None:
        return {**inputs, "labels": shifted}
    return dict(inputs)


@dataclass(frozen=True)
class Evaluation:
    """One evaluated batch.

    Args:
        whole: what was kept of it; None for a loader that the Trainer did not make.
        description: of the batch.
        group: the ranks that share it.
        of_samples: whether the model's head is one of whole samples, whose logits every rank has.
    """

    whole: WholeEntries | None
    description: SequenceDescription
    group: ProcessGroup
    of_samples: bool

    def entry(self, name: str) -> Any:
        """Returns an entry of the batch as it came from the collate function.

        Raises:
            BatchError: nothing was kept of the batch.
        """
        if self.whole is None:
            raise BatchError(
                "predictions were asked for of a loader that is not from get_eval_dataloader or "
                "get_test_dataloader, "
                "whose labels are not kept whole. Override one of these, or use "
                "prediction_loss_only=True."
            )
        return self.whole.entries.get(name)

    def joined(
        self, logits: Any, label_names: Sequence[str], prepare: Callable[[Any, Any], Any] | None
    ) -> tuple[Any, Any]:
        """Returns predictions and labels of the whole batch.

        Args:
            logits: the model's outputs, tensors `[B, S / P, ...]`, in tuples.
            label_names: the batch's entries that are labels.
            prepare: makes predictions of outputs and labels, token by token; None keeps the
                outputs.

        Raises:
            ShapeError: a tensor does not have one entry for each of this rank's tokens.
        """
        found = [self.entry(name) for name in label_names]
        labels: Any = tuple(found) if found and all(entry is not None for entry in found) else None
        labels = labels[0] if labels is not None and len(labels) == 1 else labels
        if prepare is not None:
            logits = prepare(logits, labels if self.of_samples else self._sharded(labels, logits))
        return self._whole(
            logits,
            "predictions" if prepare is None else "what preprocess_logits_for_metrics returns",
        ), labels

    def _sharded(self, labels: Any, like: Any) -> Any:
        """Returns this rank's part of labels `[B, S]`."""
        if isinstance(labels, tuple):
            return tuple(self._sharded(part, like) for part in labels)
        if not isinstance(labels, Tensor):
            return labels
        device = next(tensor.device for tensor in _tensors(like))
        padded = pad_sequence_dim(labels.to(device), self.description.sequence_length, IGNORE_INDEX)
        return shard_sequence(padded, self.description, self.group)

    def _whole(self, value: Any, what: str) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self._whole(part, what) for part in value)
        if isinstance(value, Mapping):
            return {name: self._whole(part, what) for name, part in value.items()}
        if not isinstance(value, Tensor) or value.ndim == 0 or self.of_samples:
            return value
        expected = (self.description.batch_size, self.description.shard_length)
        if tuple(value.shape[:2]) != expected:
            raise ShapeError(
                f"{what}: a tensor of shape {list(value.shape)} does not begin with this rank's "
                f"{expected[0]} rows and "
                f"{expected[1]} tokens, so it can't be joined over the ranks of the sequence. "
                "Leave it out with "
                f"ignore_keys, or return one entry for each token."
            )
        # [B, S/P, ...] -> [B, S, ...]
        joined = gather_sequence(value.contiguous(), self.description, self.group)
        assert self.whole is not None
        return joined.narrow(1, 0, self.whole.length)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, (tuple, list))
        else ()
    )
    return [tensor for part in parts for tensor in _tensors(part)]
