"""Runs a test function on several ranks: fork + gloo, a hard timeout, and every rank's traceback in
the failure.

The parent must not have started threads that a fork can't survive, so `conftest.py` keeps torch at
one thread.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RankFailure(AssertionError):
    """One or more ranks failed; the message holds every rank's traceback."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    init: bool = True,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Calls `function(*args)` on `world_size` forked ranks and returns what each of them returned.

    Args:
        function: runs on every rank, with torch.distributed up on gloo when `init`; returns
            tensors, numbers, strings, and lists, tuples and dicts of them.
        world_size: number of ranks.
        args: given to the function as they are (forked, nothing is serialized).
        timeout: seconds after which all ranks are killed and the test fails with their stacks.
        init: whether to start torch.distributed before the call; otherwise only torchrun's
            variables are set.
        env: further environment variables for the ranks.

    Raises:
        RankFailure: a rank raised, died or did not finish in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        pids = {
            rank: _fork(function, rank, world_size, port, Path(folder), args, init, env)
            for rank in range(world_size)
        }
        codes = _wait(pids, timeout)
        reports = [_report(Path(folder), rank, codes[rank]) for rank in range(world_size)]
        if any(codes.values()):
            raise RankFailure("\n".join(reports))
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)
        ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    args: tuple[Any, ...],
    init: bool,
    env: dict[str, str] | None,
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = (folder / f"{rank}.log").open("w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        # Under pytest's capture the parent's streams do not end at file descriptors 1 and 2.
        sys.stdout = sys.stderr = log
        faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
        code = _run(function, rank, world_size, port, folder, args, init, env)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    args: tuple[Any, ...],
    init: bool,
    env: dict[str, str] | None,
) -> int:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
        **(env or {}),
    )
    try:
        if init:
            dist.init_process_group(
                "gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
        torch.save(function(*args), folder / f"{rank}.pt")
        if dist.is_initialized():
            dist.barrier()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def _wait(pids: dict[int, int], timeout: float) -> dict[int, int]:
    """Waits for all ranks; once one fails the others get two seconds to say why they fail too."""
    deadline = time.monotonic() + timeout
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for rank, pid in pids.items():
            if rank not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank]:
                        deadline = min(deadline, time.monotonic() + 2.0)
        if time.monotonic() > deadline:
            _kill({rank: pid for rank, pid in pids.items() if rank not in codes})
            codes.update({rank: -signal.SIGKILL for rank in pids if rank not in codes})
        time.sleep(0.005)
    return codes


def _kill(pids: dict[int, int]) -> None:
    for pid in pids.values():
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.2)
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _report(folder: Path, rank: int, code: int) -> str:
    log = folder / f"{rank}.log"
    text = log.read_text(errors="replace")[-6000:] if log.exists() else ""
    return f"----- rank {rank}: exit {code} -----\n{text}"
