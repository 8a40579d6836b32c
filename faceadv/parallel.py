"""The same function on many items: in this process, in several, or on several machines, by Dask."""

import contextlib
import os

import torch

from faceadv.errors import Failed


def compute(function, items, scheduler="single", workers=None, **options):
    """Yield ``(item, function(item, **options))`` as they are done.

    scheduler: "single", this process; "local", a Dask cluster of processes on this machine, ``workers`` of them (one a
    core by default); or the address of a Dask scheduler, whose workers must have this package and the data. An item
    whose worker dies is given to another; those whose workers died four times are tried again at the end, each alone,
    as it may have been the neighbour's fault, and given up if that fails too: ``RuntimeError``, when all others are
    done, as if the address does not answer. An error of the function is raised as it is.
    """
    items = list(items)
    if scheduler == "single" or not items:
        for item in items:
            yield item, function(item, **options)
        return
    import dask
    import distributed  # takes a second

    cluster, before = None, dict(os.environ)
    try:
        if scheduler == "local":
            workers = min(workers or os.cpu_count(), len(items))
            # Dask would give workers, and this process, OMP_NUM_THREADS=1
            with dask.config.set({"distributed.nanny.pre-spawn-environ": {}}):
                cluster = distributed.LocalCluster(
                    n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=50, memory_limit=0
                )
        client = distributed.Client(cluster or scheduler, timeout="5s", set_as_default=False)
    except OSError as e:
        raise Failed(f'No Dask scheduler answers at "{scheduler}": start one with `dask scheduler`.') from e
    with _environment(before), cluster or client, client:
        # each worker has a share of the cores; two that took all of them would be slower than one
        threads = max(1, torch.get_num_threads() // workers) if cluster else None
        arguments = {"function": function, "threads": threads, "options": options, "pure": False}
        futures = client.map(_task, items, **arguments)
        whose = {future.key: item for future, item in zip(futures, items)}
        suspects, killers = [], []
        for future in distributed.as_completed(futures, loop=client.loop):
            try:
                yield whose[future.key], future.result()
            except distributed.KilledWorker:
                suspects.append(whose[future.key])
        for item in suspects:
            try:
                yield item, client.submit(_task, item, **arguments).result()
            except distributed.KilledWorker:
                killers.append(str(item))
        if killers:
            raise Failed(f"{', '.join(killers)} killed its worker again and again (memory?).")


@contextlib.contextmanager
def _environment(before):
    """Put back what Dask leaves in this process's environment."""
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _task(item, function, threads, options):
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for what it starts, such as a notebook's kernel
    os.environ["FACEADV_QUIET"] = "1"
    return function(item, **options)
