"""Every collective's backward is its exact adjoint: <A x, y> = <x, A^T y>, summed over the group's
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.helpers.ranks import run_ranks
from ulysses_accel.distributed import collectives
from ulysses_accel.errors import ShapeError

# A float64 sum of at most a few thousand products of numbers near one.
EXACT = 1e-12
Case = dict[str, Any]

SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3)
MATRICES = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=2, max_size=2)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A collective with shapes for two ranks; `matrix[i][j]` are the rows that rank i sends to rank
    j.
    """
    kind = draw(
        st.sampled_from(["all_to_all", "uneven", "all_gather", "reduce_scatter", "all_reduce"])
    )
    shape = draw(SHAPES)
    if kind in ("all_gather", "reduce_scatter") and shape:
        return {"kind": kind, "shape": shape, "dim": draw(st.integers(-len(shape), len(shape) - 1))}
    return {
        "kind": kind if kind != "reduce_scatter" else "all_gather",
        "shape": shape,
        "matrix": draw(MATRICES),
    }


def drawn_cases(count: int) -> list[Case]:
    """Draws in the parent, once and the same in every run, so that one fork computes them all."""
    found: list[Case] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


FIXED: list[Case] = [
    {"kind": "all_to_all", "shape": [3, 2]},
    {"kind": "uneven", "shape": [2], "matrix": [[0, 0], [0, 0]]},
    {"kind": "uneven", "shape": [], "matrix": [[0, 3], [1, 0]]},
    {"kind": "uneven", "shape": [2], "matrix": [[2, 0], [2, 0]]},
    {"kind": "all_gather", "shape": []},
    {"kind": "all_gather", "shape": [2, 3, 4], "dim": -1},
    {"kind": "reduce_scatter", "shape": [2, 3, 4], "dim": 1},
    {"kind": "all_reduce", "shape": []},
]


def apply(case: Case, group: ProcessGroup) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """Returns the operator and the shape of this rank's input."""
    kind, shape, rank, size = case["kind"], list(case["shape"]), group.rank(), group.size()
    if kind == "all_to_all":
        return lambda x: collectives.all_to_all(x, group), [2 * size, *shape]
    if kind == "uneven":
        send = case["matrix"][rank]
        receive = [row[rank] for row in case["matrix"]]
        return lambda x: collectives.all_to_all(x, group, send, receive), [sum(send), *shape]
    if kind == "all_gather":
        return lambda x: collectives.all_gather(x, group, case.get("dim", 0)), shape
    if kind == "reduce_scatter":
        shape[case["dim"]] *= size
        return lambda x: collectives.reduce_scatter(x, group, case["dim"]), shape
    return lambda x: collectives.all_reduce(x, group), shape


def adjoint_error(case: Case, group: ProcessGroup) -> float:
    operator, shape = apply(case, group)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    result = operator(x)
    y = torch.randn_like(result)
    (pulled,) = torch.autograd.grad(result, x, y)
    sides = torch.stack([(result * y).sum(), (x * pulled).sum()]).detach()
    dist.all_reduce(sides, group=group)
    scale = torch.stack([(result * y).abs().sum()]).detach()
    dist.all_reduce(scale, group=group)
    assert pulled.shape == x.shape
    return float((sides[0] - sides[1]).abs() / scale.clamp(min=1.0))


def subgroups() -> ProcessGroup:
    """Returns this rank's of the groups {0, 2} and {1, 3}: one of them does not hold global
    rank 0.
    """
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return groups[dist.get_rank() % 2]


def all_errors(given_cases: list[Case]) -> list[float]:
    group = subgroups()
    torch.manual_seed(dist.get_rank())
    return [adjoint_error(case, group) for case in given_cases]


def test_backward_is_the_adjoint_on_subgroups() -> None:
    chosen = FIXED + drawn_cases(120)
    assert {case["kind"] for case in chosen} == {
        *("all_to_all", "uneven", "all_gather", "reduce_scatter", "all_reduce"),
    }
    for errors in run_ranks(all_errors, 4, chosen):
        assert len(errors) == len(chosen)
        assert max(errors) <= EXACT, chosen[max(range(len(errors)), key=errors.__getitem__)]


def values() -> dict[str, Any]:
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    rows = torch.arange(4.0) + 10 * rank
    own = torch.tensor(float(rank))
    return {
        "all_to_all": collectives.all_to_all(rows, group).tolist(),
        "uneven": collectives.all_to_all(
            rows, group, [1, 3], [1, 1] if rank == 0 else [3, 3]
        ).tolist(),
        "gathered": collectives.all_gather(own, group).tolist(),
        "columns": collectives.all_gather(rows.view(2, 2), group, dim=1).tolist(),
        "scattered": collectives.reduce_scatter(rows, group).tolist(),
        "reduced": collectives.all_reduce(rows, group).tolist(),
        "input": rows.tolist(),
    }


def test_values() -> None:
    first, second = run_ranks(values, 2)
    assert (first["all_to_all"], second["all_to_all"]) == (
        [0.0, 1.0, 10.0, 11.0],
        [2.0, 3.0, 12.0, 13.0],
    )
    assert (first["uneven"], second["uneven"]) == ([0.0, 10.0], [1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
    assert first["gathered"] == second["gathered"] == [0.0, 1.0]
    assert first["columns"] == [[0.0, 1.0, 10.0, 11.0], [2.0, 3.0, 12.0, 13.0]]
    assert (first["scattered"], second["scattered"]) == ([10.0, 12.0], [14.0, 16.0])
    assert first["reduced"] == [10.0, 12.0, 14.0, 16.0]
    assert (first["input"], second["input"]) == ([0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0])


def refusals() -> None:
    group = dist.group.WORLD
    assert group is not None
    with pytest.raises(
        ShapeError, match=r"3 rows .* can't be split evenly over 2 ranks. Give send_sizes"
    ):
        collectives.all_to_all(torch.zeros(3), group)
    with pytest.raises(ShapeError, match=r"send_sizes=\[1, 1\] .* do not split 3 rows"):
        collectives.all_to_all(torch.zeros(3), group, [1, 1], [1, 1])
    with pytest.raises(
        ShapeError, match=r"dim 1 of shape \(2, 3\) can't be split over 2 ranks. Pad it"
    ):
        collectives.reduce_scatter(torch.zeros(2, 3), group, dim=1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    assert run_ranks(refusals, 2) == [None, None]


def compiled() -> dict[str, float]:
    """The exchange inside of a compiled function, where an operator that fills a buffer would lose
    its gradient.
    """
    group = subgroups()
    torch.manual_seed(dist.get_rank())
    send, receive = ([1, 3], [1, 2]) if group.rank() == 0 else ([2, 2], [3, 2])
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        exchanged = collectives.all_to_all(x @ weight, group, send, receive)
        return (collectives.all_to_all(exchanged.sin(), group, receive, send) * x).square().sum()

    found = {}
    eager = torch.autograd.grad(function(x, weight), (x, weight))
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(fast(x, weight), (x, weight))
    for name, expected, gradient in zip(("x", "weight"), eager, again):
        found[name] = float((gradient - expected).norm() / expected.norm())
        found[f"norm of {name}"] = float(expected.norm())
    return found


def test_compiled_gradients_are_the_eager_ones() -> None:
    for rank in run_ranks(compiled, 4):
        assert max(rank["x"], rank["weight"]) <= EXACT
        assert min(rank["norm of x"], rank["norm of weight"]) > 0.1
