"""Forked gloo ranks for the benchmarks: each runs one function and hands back one JSON object."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Work = Callable[[int, int, dict[str, Any]], dict[str, Any]]

GRACE_SECONDS = 3.0


class RanksFailedError(RuntimeError):
    """A rank raised, died, or did not finish in time."""


def run_ranks(
    work: Work, world_size: int, options: dict[str, Any], *, timeout: float = 120.0
) -> list[dict[str, Any]]:
    """Fork `world_size` ranks, run `work(rank, world_size, options)` in each, return their results
    by rank.

    Raises `RanksFailedError` with the first failing rank's traceback; no rank outlives `timeout`.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [
            context.Process(
                target=_rank_main, args=(work, rank, world_size, options, folder, port, timeout)
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        _wait(ranks, time.monotonic() + timeout)
        return _collect(Path(folder), ranks)


def _rank_main(
    work: Work,
    rank: int,
    world_size: int,
    options: dict[str, Any],
    folder: str,
    port: int,
    timeout: float,
) -> None:
    failed = False
    _silence(Path(folder) / f"{rank}.log")
    try:
        _describe_rank(rank, world_size, port)
        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = work(rank, world_size, options)
    except BaseException as error:
        failed = True
        result = {
            "error": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
            "at": time.monotonic(),
        }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    # Peers leave threads and atexit hooks behind; the result is on disk, so nothing is left to wait
    # for.
    os._exit(1 if failed else 0)


def _silence(log: Path) -> None:
    """Send what this rank prints, native code included, to a file: the tables stay readable."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _describe_rank(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(ranks: list[BaseProcess], deadline: float) -> None:
    """Join all ranks; once one has failed, the others get a short grace and are then killed."""
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode not in (None, 0) for process in ranks):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for process in ranks:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    for process in ranks:
        process.join()


def _collect(folder: Path, ranks: list[BaseProcess]) -> list[dict[str, Any]]:
    """All results by rank; of several failures the earliest is raised, the others are its echo."""
    results: list[dict[str, Any]] = []
    for rank, process in enumerate(ranks):
        path = folder / f"{rank}.json"
        log = (folder / f"{rank}.log").read_text(errors="replace")[-2000:]
        lost = {
            "error": "lost",
            "traceback": f"{log}\nno result (exit code {process.exitcode})",
            "at": 0.0,
        }
        results.append(json.loads(path.read_text()) if path.exists() else lost)
    failed = [(result["at"], rank) for rank, result in enumerate(results) if "error" in result]
    if failed:
        _, rank = min(failed)
        raise RanksFailedError(f"rank {rank}: {results[rank]['traceback']}")
    return results
