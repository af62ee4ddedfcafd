"""What happens in another process: one job of a comparison. Light to import, see the package."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from secateur.memory import keep_freed

if TYPE_CHECKING:
    from rich.console import Console

    from secateur.comparison.jobs import Job
    from secateur.task import Task


class Board:
    """Where jobs write how far they are; one process of its own."""

    def __init__(self) -> None:
        self.epochs: dict[str, int] = {}

    def tell(self, name: str, epochs: int) -> None:
        """Note how many epochs a job has trained."""
        self.epochs[name] = epochs

    def read(self) -> dict[str, int]:
        """Return the epochs of all jobs that have begun."""
        return self.epochs


def work(sealed: list[Any], threads: int, folder: str, board: Any) -> str | None:
    """Do a job.

    Args:
        sealed: references to the job and the task (or None), not opened before threads know how to
            wait, for what is in them imports torch.
        threads: of torch.
        folder: that paths in recipes are relative to.
        board: the actor of :class:`Board`.

    Returns:
        None, or why it failed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed()
    os.chdir(folder)
    import ray

    job, task = ray.get(sealed)
    import torch
    from filelock import FileLock
    from rich.console import Console

    from secateur.errors import SecateurError

    torch.set_num_threads(threads)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    # Where a comparison was killed, its worker may live on for a while and still write there.
    alone = FileLock(job.log.with_suffix(".lock"))
    with alone, open(job.log, "a", buffering=1, encoding="utf-8") as log:
        try:
            _train(job, task, Console(file=log, width=120), board)
        except Exception as error:  # whatever ends one run must not end the others
            log.write(traceback.format_exc())
            own = isinstance(error, SecateurError)
            reason = str(error) if own else f"{type(error).__name__}: {error}"
            return f"{reason}\nThe whole of it is in {job.log}."
    return None


def _train(job: Job, task: Task | None, console: Console, board: Any) -> None:
    from secateur.compression import compress, train_dense
    from secateur.engine.progress import Progress

    class Told(Progress):
        """Writes to the log, and tells the board."""

        @contextmanager
        def running(self, epochs: int, done: int) -> Iterator[None]:
            self.done = done
            board.tell.remote(job.name, done)
            with super().running(epochs, done):
                yield

        def epoch(self, entry: dict[str, Any], epochs: int) -> None:
            super().epoch(entry, epochs)
            self.done += 1
            board.tell.remote(job.name, self.done)

    progress = Told(console)
    if job.dense:
        train_dense(task, job.recipe, out=job.folder, progress=progress)
    else:
        compress(task, job.recipe, out=job.folder, resume=True, console=console, progress=progress)
