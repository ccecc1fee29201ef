# SPDX-License-Identifier: Apache-2.0
"""The same on a Ray cluster: each worker is an actor that stays alive. Only this file imports ray.

Scheduling, placement and restarts are Ray's: an actor that dies is started again, and so is its task, once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darekit.errors import PlanError, Unsupported
from darekit.pools.processes import Lost, Make, Pool, Work, open_processes

RESTARTS = 10  # of one actor
RETRIES = 1  # of one task whose actor died
STORE = 1 << 27  # bytes for what travels between workers
PATIENCE = 5.0  # seconds for a cluster's head to answer


@dataclass(frozen=True)
class Cluster:
    """Where to work.

    Attributes:
        address: of a running cluster's head; None: the one that RAY_ADDRESS names, else one that is started here.
        gpus: for each worker; None: one where the cluster has some, else none. A fraction shares one.
        workers: how many; None: as many as there are GPUs for, or without GPUs one for each machine.
    """

    address: str | None = None
    gpus: float | None = None
    workers: int | None = None


def cluster_of(ray: str | bool | None, gpus: float | None, jobs: int | None) -> Cluster | None:
    """What callers say -> where to work; None: not on a cluster.

    Args:
        ray: an address; True or "auto": the one that RAY_ADDRESS names, or a new one; "local": a new one; None or
            False: none.
        gpus: for each worker.
        jobs: workers; None: what the cluster has room for.
    """
    if not ray:
        return None
    return Cluster(None if ray is True or ray == "auto" else ray, gpus, jobs)


@contextmanager
def open_pool(make: Make, jobs: int | None, cluster: Cluster | None) -> Iterator[Pool]:
    """Workers on a cluster, where one is asked for, else processes of this machine (None: this one)."""
    opened = open_processes(make, jobs or 1) if cluster is None else open_cluster(make, cluster)
    with opened as pool:
        yield pool


def require_ray() -> None:
    """Complain where it is missing.

    Raises:
        Unsupported: it is.
    """
    if find_spec("ray") is None:
        raise Unsupported("--ray needs Ray, which is not installed: pip install 'darekit[ray]', or use --jobs N")


@contextmanager
def open_cluster(make: Make, cluster: Cluster) -> Iterator[Pool]:
    """Workers on a Ray cluster; the actors are gone on leaving, and so is a cluster that was started here.

    Raises:
        Unsupported: Ray is not installed.
        PlanError: the cluster cannot be reached, or has no room for a worker.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody else's business
    import ray

    started = not ray.is_initialized()
    if started:
        _connect(ray, cluster)
    actors: list[Any] = []
    try:
        resources = ray.cluster_resources()
        gpus = _gpus(resources, cluster)
        count = cluster.workers or _room(ray, resources, gpus)
        actor = ray.remote(max_restarts=RESTARTS, max_task_retries=RETRIES, num_cpus=1, num_gpus=gpus)(_Actor)
        # What it holds is made on its first task: a mistake there must not be taken for a machine that is lost.
        actors = [actor.remote(make, str(Path.cwd())) for _ in range(count)]
        yield _Actors(ray, actors)
    finally:
        for one in actors:
            ray.kill(one)
        if started:
            ray.shutdown()


def _connect(ray: Any, cluster: Cluster) -> None:
    address = cluster.address or os.environ.get("RAY_ADDRESS") or None
    address = None if address == "local" else address
    if address is not None:
        _refuse_silence(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            wanted = max(cluster.workers or 1, os.cpu_count() or 1)
            # On this machine alone: nothing listens to others. Recipes and scores are small.
            ray.init(
                "local", num_cpus=wanted, object_store_memory=STORE, include_dashboard=False,
                _node_ip_address="127.0.0.1", **quiet,
            )  # fmt: skip
        else:
            ray.init(address=address, **quiet)
    except Exception as error:  # Ray's, grpc's, the system's
        where = f"the Ray cluster at {address} cannot be reached" if address else "Ray cannot be started"
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        start = "start one with `ray start --head`, or write --ray without an address"
        hint = start if address else "--jobs N needs no Ray"
        raise PlanError(f"{where}: {line.rstrip('.')}; {hint}") from error


def _refuse_silence(address: str) -> None:
    """Ray waits for minutes for a head that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # Ray's own words, such as auto
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise PlanError(
            f"the Ray cluster at {address} cannot be reached: {error.strerror or error}; start one with "
            "`ray start --head`, or write --ray without an address"
        ) from None


def _gpus(resources: Mapping[str, float], cluster: Cluster) -> float:
    """For each worker."""
    there = resources.get("GPU", 0.0)
    if cluster.gpus is None:
        return 1.0 if there else 0.0
    if cluster.gpus > there:
        raise PlanError(
            f"{cluster.gpus:g} GPUs for each worker, but the cluster has {there:g}; use a smaller --gpus-per-worker"
        )
    return cluster.gpus


def _room(ray: Any, resources: Mapping[str, float], gpus: float) -> int:
    if gpus:
        return max(1, int(resources.get("GPU", 0.0) / gpus + 1e-9))
    return max(1, sum(bool(node["Alive"]) for node in ray.nodes()))


class _Actor:
    """One worker's life."""

    def __init__(self, make: Make, folder: str) -> None:
        self._make = make
        self._folder = folder
        self._work: Work | None = None

    def do(self, task: Any) -> Any:
        """One task."""
        if self._work is None:
            if not Path(self._folder).is_dir():
                return Lost(f"{self._folder} is not on {socket.gethostname()}: Ray's machines must share the folders")
            os.chdir(self._folder)  # relative names mean here what they mean there
            self._work = self._make()
        return self._work(task)


class _Actors:
    """Actors that wait for work."""

    def __init__(self, ray: Any, actors: Sequence[Any]) -> None:
        self._ray, self._actors = ray, actors
        self.size = len(actors)

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting = list(reversed(range(len(tasks))))
        idle = list(self._actors)
        busy: dict[Any, tuple[int, Any]] = {}
        while waiting or busy:
            while waiting and idle:
                at, actor = waiting.pop(), idle.pop()
                busy[actor.do.remote(tasks[at])] = at, actor
            [ready], _ = self._ray.wait(list(busy), num_returns=1)
            at, actor = busy.pop(ready)
            idle.append(actor)
            yield at, self._result(ready)

    def _result(self, ready: Any) -> Any:
        try:
            return self._ray.get(ready)
        except self._ray.exceptions.RayActorError as error:
            line = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
            return Lost(f"its Ray actor died twice ({line.rstrip('.')})")
        except self._ray.exceptions.RayError as error:
            return Lost(f"Ray: {str(error).splitlines()[-1]}")
