"""Processes of a test, forked by a server that has imported byrote once: one starts in a tenth of a second, not in 7.

Their functions must lie in a module that can be imported; the server has no threads, so that they start with one each.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

forked: Any = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["byrote.lab.studies.runner"])


def on_ranks(worker: Callable[..., None], arguments: tuple[Any, ...], world: int) -> None:
    """`worker(rank, *arguments)` in `world` processes; an error in one is raised here."""
    torch.multiprocessing.start_processes(worker, arguments, nprocs=world, start_method="forkserver")
