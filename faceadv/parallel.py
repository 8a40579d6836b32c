"""The same function on many items: in this process, in several, or on several machines, by Dask."""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from unittest import mock

import torch

from faceadv.errors import Failed, Invalid
from faceadv.store import cache, progress, threads, weights

__all__ = ["compute"]

# what a worker must have as this process has it, because its results will be taken for results of this code
CODE = cache.key(sorted(weights.SHIPPED.parent.rglob("*.py")), weights.shipped(), cache.versions())
PATIENCE = 12  # seconds in which a scheduler must answer, and for which it may have no worker


def compute(
    function: Callable, items: Iterable, scheduler: str = "single", workers: int | None = None, **options: object
) -> Iterator[tuple]:
    """Yield ``(item, function(item, **options))``, in the order in which they are done.

    An item whose worker dies is given to another worker. An item that has lost four workers is tried once more at the
    end, alone, because an item beside it may have been the cause.

    Parameters
    ----------
    function, options : what to compute; its first argument is an item
    items : all of them, of any type
    scheduler : "single" (this process), "local" (several processes on this machine), or the address of a Dask
        scheduler, whose workers must have the data, and this package and its libraries in the same versions
    workers : how many processes "local" has; by default one for each processor that this process may use

    Raises
    ------
    Invalid : for fewer than one worker
    Failed : if the scheduler does not answer, has no workers, loses them all or goes away, if a worker has another
        version of this package or of a library, or if an item kills its worker again when it is alone
    Exception : whatever the function raises
    """
    if workers is not None and workers < 1:
        raise Invalid(f"The number of workers must be 1 or more, not {workers}.")
    items = list(items)
    if scheduler == "single" or not items:
        for item in items:
            yield item, function(item, **options)
        return
    with _client(scheduler, min(workers or threads.cores(), len(items))) as (client, share):
        arguments = {"function": function, "share": share, "options": options, "code": CODE, "pure": False}
        try:
            yield from _results(client, items, arguments)
        except CancelledError as e:
            raise Failed(f'The Dask scheduler at "{scheduler}" went away: start it, and run this again.') from e


@contextlib.contextmanager
def _client(scheduler, workers):
    """A client of the scheduler, and how many threads each worker shall use (None on other machines)."""
    import dask
    import distributed  # takes a second

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))  # Dask leaves settings in it
        cluster = None
        if scheduler == "local":
            threads.settle()  # before the workers import torch
            # Dask would give workers, and this process, OMP_NUM_THREADS=1; and on a busy machine they start slowly.
            # Some time after a worker died Dask looks once, and closes for good what is just starting again by then.
            patience = {"distributed.nanny.pre-spawn-environ": {}, "distributed.comm.timeouts.connect": "5m"}
            patience["distributed.deploy.lost-worker-timeout"] = "1w"
            stack.enter_context(dask.config.set(patience))
            # any free port, because the usual one may be in use, and no dashboard on it
            options = {"dashboard_address": ":0", "scheduler_kwargs": {"dashboard": False}}
            options |= {"n_workers": workers, "threads_per_worker": 1, "silence_logs": 50, "memory_limit": 0}
            made = distributed.LocalCluster(**options)
            cluster = stack.enter_context(made)
        try:
            if not cluster:  # in a thread, because a notebook's own one has a loop already
                there = distributed.rpc(scheduler, connection_args=distributed.Security().get_connection_args("client"))
                ThreadPoolExecutor(1).submit(asyncio.run, _workers(there)).result()
            client = distributed.Client(cluster or scheduler, timeout="5s", set_as_default=False)
        except Exception as e:  # another program that listens there may answer anything
            if cluster:
                raise
            raise Failed(f'No Dask scheduler answers at "{scheduler}", or it has no `dask worker`: start both.') from e
        # each worker has a share of the cores; two that took all of them would be slower than one
        cores = min(torch.get_num_threads(), threads.cores())
        yield stack.enter_context(client), max(1, cores // workers) if cluster else None


async def _workers(scheduler):
    """Wait until the scheduler has one. A client would wait for ever, and for a word of whatever else listens there."""
    async with scheduler, asyncio.timeout(PATIENCE):
        while not (await scheduler.identity(n_workers=-1))["workers"]:
            await asyncio.sleep(0.2)


def _results(client, items, arguments):
    import distributed

    whose = dict(zip(client.map(_task, items, **arguments), items))
    suspects, killers = [], []
    for future in _finished(client, whose, not arguments["share"]):
        try:
            yield whose[future], future.result()
        except distributed.KilledWorker:
            suspects.append(whose[future])
    for item in suspects:
        try:
            (future,) = _finished(client, [client.submit(_task, item, **arguments)], not arguments["share"])
            yield item, future.result()
        except distributed.KilledWorker:
            killers.append(str(item))
    if killers:
        raise Failed(f"{', '.join(killers)} killed its worker again and again (memory?).")


def _finished(client, futures, elsewhere):
    """The futures as they finish. ``Failed`` without workers, unless they are ours, which are started again."""
    import distributed

    left, seen = distributed.as_completed(futures, loop=client.loop), time.monotonic()
    while not left.is_empty():
        if left.has_ready():
            yield next(left)
            continue
        with contextlib.suppress(OSError):  # a scheduler that dies: all futures are cancelled soon
            seen = time.monotonic() if client.nthreads() else seen
        if elsewhere and time.monotonic() - seen > PATIENCE:
            raise Failed("All workers of the Dask scheduler went away: start some, and run this again.")
        time.sleep(0.2)


def _task(item, function, share, options, code):
    if code != CODE:
        raise Failed("A Dask worker has another version of faceadv or of a library: install the same, and restart it.")
    if share:
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)  # for what it starts, such as a notebook's kernel
    progress.quiet()
    return function(item, **options)
