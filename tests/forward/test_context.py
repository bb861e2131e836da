"""The running batch: each forward sees its own, whatever is nested in it, raises, runs in another
thread or is compiled; and the forward that sees to it is to others what the model's was.
"""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import torch
import torch._dynamo  # imported before the fork, once for all ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers.models import build
from tests.helpers.parity_jobs import Engine
from tests.helpers.ranks import run_ranks
from ulysses_accel.forward.override import override_forward
from ulysses_accel.installation import Installation
from ulysses_accel.sequence.running import running_batch, running_description


def full_batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(8, 60, (1, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def loss_and_gradient(model: Any, **batch: Any) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    embeddings = model.get_input_embeddings().weight
    return float(loss), embeddings.grad.clone()


def prepared(**options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Returns an accelerator, its unwrapped model and a sharded batch."""
    accelerator = Engine().accelerator(sp_size=2, **options)
    loader: Any = DataLoader(
        [full_batch(0)],  # type: ignore[arg-type]
        batch_size=1,
        collate_fn=lambda rows: rows[0],
    )
    model, loader = accelerator.prepare(build("llama"), loader)
    (batch,) = list(loader)
    return accelerator, model.module, batch


def is_equal(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> bool:
    return one[0] == other[0] and one[1].equal(other[1])


class Interruption(RuntimeError):
    pass


def contexts() -> dict[str, Any]:
    _, model, batch = prepared()
    layer = model.model.layers[1]
    alone, ordinary = loss_and_gradient(model, **batch), float(model(**full_batch(1)).loss)
    found: dict[str, Any] = {"repeated": is_equal(alone, loss_and_gradient(model, **batch))}

    inside: list[Any] = []

    def run_others(*_: Any) -> None:
        if inside:
            return
        inside.append(None)
        other = build("llama")
        with torch.no_grad():
            inside[:] = [float(model(**full_batch(1)).loss), float(other(**full_batch(1)).loss)]
        thread = threading.Thread(target=lambda: inside.append(running_batch()))
        thread.start()
        thread.join()
        inside.append(running_description() is batch["sequence_description"])

    handle = layer.register_forward_pre_hook(run_others)
    found["around others"] = is_equal(alone, loss_and_gradient(model, **batch))
    found["inside"] = inside == [ordinary, ordinary, None, True]
    handle.remove()

    def interrupt(*_: Any) -> None:
        raise Interruption

    handle = layer.register_forward_pre_hook(interrupt)
    try:
        model(**batch)
    except Interruption:
        found["after a failure"] = running_batch() is None
    handle.remove()
    found["whole after a failure"] = float(model(**full_batch(1)).loss) == ordinary
    found["sharded after a failure"] = is_equal(alone, loss_and_gradient(model, **batch))

    compiled = torch.compile(model, backend="aot_eager")
    loss, gradient = loss_and_gradient(compiled, **batch)
    # The same float64 operations; the compiler may reorder sums.
    found["compiled"] = abs(loss - alone[0]) < 1e-12 and bool((gradient - alone[1]).norm() < 1e-12)
    return found


def test_each_forward_sees_its_own_batch() -> None:
    for found in run_ranks(contexts, 2, init=False, timeout=240):
        assert all(found.values()), found
        assert len(found) == 7


def faces() -> dict[str, Any]:
    accelerator, model, batch = prepared(mixed_precision="bf16")
    stock = inspect.signature(build("llama").forward)
    found: dict[str, Any] = {"signature": inspect.signature(model.forward) == stock}
    loss = float(model(**batch).loss)
    # accelerate removes its wrapper of the forward, and would remove everything that it wraps.
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    found["unwrapped"] = unwrapped is model and "_original_forward" not in vars(model)
    found["still sharded"] = abs(float(model(**batch).loss) - loss) < 0.05
    found["signature, unwrapped"] = inspect.signature(model.forward) == stock
    return found


def test_the_forward_is_what_others_expect() -> None:
    for found in run_ranks(faces, 2, init=False):
        assert all(found.values()), found


class Doubling(nn.Module):
    def forward(self, number: int, extra: int = 0) -> int:
        return 2 * number + extra


def around(_module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
    return -forward(*args, **kwargs)


def test_overrides_nest_and_close() -> None:
    module, first, second = Doubling(), Installation(), Installation()
    before = dict(vars(module))
    override_forward(module, around, first)
    assert inspect.signature(module.forward) == inspect.signature(Doubling().forward)
    assert module(2, extra=1) == -5
    override_forward(module, lambda _, forward, args, kwargs: (forward(*args, **kwargs),), second)
    assert module(2) == (-4,)
    second.close()
    first.close()
    assert module(2) == 4
    assert vars(module) == before


def test_a_wrapper_that_came_later_stays() -> None:
    module, changes = Doubling(), Installation()
    override_forward(module, around, changes)
    inner = module.forward
    module.forward = lambda number: ("wrapped", inner(number))  # type: ignore[method-assign, assignment]
    changes.close()
    assert module(2) == ("wrapped", 4)


def test_a_copy_computes_with_itself() -> None:
    module = nn.Linear(1, 1)
    override_forward(module, around, Installation())
    clone = copy.deepcopy(module)
    with torch.no_grad():
        clone.weight.add_(1.0)
    one = torch.ones(1)
    assert clone(one).equal(-nn.functional.linear(one, clone.weight, clone.bias))
    assert not clone(one).equal(module(one))
