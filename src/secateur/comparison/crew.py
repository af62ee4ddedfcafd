"""Jobs side by side on Ray (https://www.ray.io): one machine, or a cluster that is there."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import progress as bars
from rich.console import Console

from secateur.comparison.jobs import Job
from secateur.comparison.worker import Board, work
from secateur.compression import REPORT
from secateur.errors import MissingDependencyError, SecateurError
from secateur.report import numbers
from secateur.task import Task

INSTALL = 'pip install "secateur[compare]"'
_LOOK = 0.5
"""Seconds between two looks at how far jobs are."""

_PACE = 1800
"""Seconds over which the pace is taken, from which follows the time left."""


def require() -> Any:
    """Return the module of Ray.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            f"compare: runs go side by side on Ray, which is not installed.\nInstall it: {INSTALL}"
        ) from error
    return ray


def run_all(
    todo: Sequence[Job],
    *,
    jobs: int | None = None,
    task: Task | None = None,
    console: Console | None = None,
) -> dict[str, str]:
    """Do all jobs that are not finished, going on with those that were stopped.

    Where Ray is running already (``ray.init`` was called, or ``RAY_ADDRESS`` is set), it is used;
    its machines must share the folders of the jobs. Otherwise it is started on this machine, for
    this call.

    Args:
        todo: what to do; a job that needs another stands behind it.
        jobs: how many at a time; by default as many as there are cores, but no more than needed.
        task: model and data; by default those that the recipes name.
        console: where progress is shown; None shows nothing.

    Returns:
        Why each job failed that did, by name.

    Raises:
        MissingDependencyError: Ray is not installed.
        SecateurError: ``jobs`` is no positive number, or a folder belongs to another recipe.
    """
    if jobs is not None and jobs < 1:
        raise SecateurError(f"jobs: {jobs} should be 1 or more.")
    for job in todo:
        job.require_own()
    waiting = [job for job in todo if not job.finished]
    if not waiting:
        return {}
    ray = require()
    jobs = jobs or min(usable_cores(), len(waiting))
    with _session(ray, jobs) as cores, _Display(waiting, console or Console(quiet=True)) as display:
        return _work_off(waiting, ray, jobs, threads_each(cores, jobs), task, display)


def _work_off(
    waiting: list[Job], ray: Any, jobs: int, threads: int, task: Task | None, display: _Display
) -> dict[str, str]:
    board = ray.remote(num_cpus=0)(Board).remote()
    graphics = ray.cluster_resources().get("GPU", 0)
    share = 1 / math.ceil(jobs / graphics) if graphics else 0
    start = ray.remote(num_cpus=threads, num_gpus=share, max_retries=0)(work)
    shared, here = ray.put(task), str(Path.cwd())
    running: dict[Any, Job] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            ready = [job for job in waiting if job.needs is None or job.needs.finished]
            for job in ready[: jobs - len(running)]:
                waiting.remove(job)
                running[start.remote([ray.put(job), shared], threads, here, board)] = job
            ended, _ = ray.wait(list(running), timeout=_LOOK)
            display.show(ray.get(board.read.remote()), list(running.values()))
            for reference in ended:
                job = running.pop(reference)
                reason = _outcome(ray, reference)
                display.ended(job, reason)
                if reason:
                    failed[job.name] = reason
                    lost = [other for other in waiting if other.needs == job]
                    failed |= {other.name: f"{job.name} failed." for other in lost}
                    waiting = [other for other in waiting if other not in lost]
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return failed


def _outcome(ray: Any, reference: Any) -> str | None:
    """Return why a job failed, or None; a process that died is a failure like any other."""
    try:
        reason: str | None = ray.get(reference)
    except ray.exceptions.RayError as error:
        return f"its process ended: {str(error).strip().splitlines()[0]}"
    return reason


@contextmanager
def _session(ray: Any, jobs: int | None) -> Iterator[list[int]]:
    """Yield the cores of each machine; end what was begun here."""
    begun = not ray.is_initialized()
    if begun:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is reported to Ray's makers
        own: dict[str, Any] = {}
        if "RAY_ADDRESS" not in os.environ:
            own = {"num_cpus": max(jobs or 1, usable_cores()), "include_dashboard": False}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # Ray raises plain Exceptions, too
            raise SecateurError(f"compare: Ray does not start: {error}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    finally:
        if begun:
            ray.shutdown()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(cores: Sequence[int], jobs: int) -> int:
    """Return the most threads that each of so many jobs can have, given the cores of machines."""
    fitting = [
        threads
        for threads in range(1, max(cores, default=1) + 1)
        if sum(each // threads for each in cores) >= jobs
    ]
    return max(fitting, default=1)


class _Display:
    """One display for all jobs: those that run, and how long the whole still takes."""

    def __init__(self, todo: Sequence[Job], console: Console) -> None:
        self.console = console
        self.bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_PACE,
        )
        self.whole = self.bar.add_task(f"epochs of {len(todo)} jobs", total=0)
        self.epochs = {job.name: job.epochs for job in todo}
        self.before: dict[str, int] = {}
        self.lines: dict[str, bars.TaskID] = {}

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, epochs: Mapping[str, int], running: Sequence[Job]) -> None:
        """Show how many epochs each job has trained; what earlier calls trained does not count."""
        for name, done in epochs.items():
            self.before.setdefault(name, done)
        left = sum(self.epochs.values()) - sum(self.before.values())
        trained = sum(done - self.before[name] for name, done in epochs.items())
        self.bar.update(self.whole, completed=trained, total=left)
        for job in running:
            if job.name not in self.lines:
                self.lines[job.name] = self.bar.add_task(job.name, total=job.epochs)
            self.bar.update(self.lines[job.name], completed=epochs.get(job.name, 0))

    def ended(self, job: Job, reason: str | None) -> None:
        """Print the line of a job that has ended, and take its bar away."""
        if job.name in self.lines:
            self.bar.remove_task(self.lines.pop(job.name))
        if reason:
            self.console.print(f"{job.name} failed: {reason}", style="red", markup=False)
        elif job.dense:
            self.console.print(f"{job.name} is trained", highlight=False, markup=False)
        else:
            report = json.loads((job.folder / REPORT).read_text(encoding="utf-8"))
            found = numbers.percent(report["accuracy"]["compressed"])
            took = numbers.duration(report["seconds"])
            text = f"{job.name}: test accuracy {found} in {took}"
            self.console.print(text, highlight=False, markup=False)
