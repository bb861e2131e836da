"""Leak police: a test leaves the environment, the process group and transformers' registries as it
found them.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.support import Claim, Support, difference, render

torch.set_num_threads(1)

_TABLE = Path(__file__).parent.parent / "docs" / "support.md"
_claims = pytest.StashKey[list[Claim]]()
_proved = pytest.StashKey[list[Claim]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support", action="store_true", help="run the tests behind docs/support.md, and write it"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_proved] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--support"):
        others = [item for item in items if "support" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "support" in getattr(item, "fixturenames", ())]


@pytest.fixture
def support(request: pytest.FixtureRequest) -> Support:
    """Lets a test say which cells of docs/support.md it proves."""
    found = Support()
    request.node.stash[_claims] = found.claims
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: Any
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.passed:
        item.config.stash[_proved] += item.stash.get(_claims, [])
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    is_whole = (
        config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    )
    if exitstatus or not session.testscollected or config.option.collectonly:
        return
    text = render(config.stash[_proved])
    if config.getoption("--support"):
        _TABLE.write_text(text)
        return
    found = difference(_TABLE.read_text() if _TABLE.exists() else "", text) if is_whole else []
    if found:
        lines = "\n".join(found)
        print(
            "\ndocs/support.md is not what the tests have just proved; run `make "
            f"support`.\n{lines}"
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _registered() -> set[str]:
    return set(ALL_ATTENTION_FUNCTIONS._global_mapping)


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = dict(os.environ)
    registered = _registered()
    yield
    # accelerate keeps its state in the process, which forked ranks of later tests would inherit.
    if AcceleratorState._shared_state or PartialState._shared_state:
        AcceleratorState._reset_state(True)
    if GradientState._shared_state:
        GradientState._reset_state()
    after = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    before.pop("PYTEST_CURRENT_TEST", None)
    leaked = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    for key in leaked:
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]
    assert _registered() == registered, (
        "the test left attention functions in transformers' registry"
    )
    assert not leaked, f"the test changed environment variables: {sorted(leaked)}"
    assert not dist.is_initialized(), "the test left a process group behind"
