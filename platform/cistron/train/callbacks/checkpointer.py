"""When checkpoints are written, and what makes one complete."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

from cistron.parallel.strategy import PendingSave
from cistron.train.callbacks.callback import Callback, Run
from cistron.train.checkpoint import CheckpointStore, Manifest, random_state

Publish: TypeAlias = Callable[[Manifest, Callable[[], None]], None]
"""Tells the outside that a checkpoint is on its way; the second argument returns when it is complete."""


class Checkpointer(Callback):
    """Saves every ``checkpoint_every`` steps and at the end; the writing goes on beside the next steps."""

    def __init__(self, store: CheckpointStore, publish: Publish | None = None, *, corpus: str) -> None:
        self._store = store
        self._publish = publish
        self._corpus = corpus
        self._commit: _Commit | None = None
        self._saved_step = 0

    def on_start(self, run: Run) -> None:
        """Sweep away what a crash left half written."""
        self._saved_step = run.step
        if run.world.is_main:
            self._store.discard_torn()
        run.world.barrier()

    def on_step(self, run: Run) -> None:
        """Save when it is time."""
        if run.step % run.config.train.checkpoint_every == 0:
            self._save(run)

    def on_end(self, run: Run) -> None:
        """Save what is not saved yet, and wait."""
        if run.step > self._saved_step:
            self._save(run)
        self._finish()
        run.world.barrier()

    def _save(self, run: Run) -> None:
        self._finish()
        folder = run.config.train.strategy.checkpoint_folder
        pending = run.strategy.save(f"{self._store.directory(run.step)}/{folder}")
        manifest = Manifest(
            step=run.step,
            cursor=run.cursor,
            tokens=run.tokens,
            world_size=run.world.size,
            folder=folder,
            rng=tuple(run.world.gather(random_state(run.world.device))),
            config=run.config.model_dump(mode="json"),
            corpus=self._corpus,
        )
        store = self._store if run.world.is_main else None
        self._commit = _Commit(pending, store, manifest, keep=run.config.train.keep_checkpoints)
        self._saved_step = run.step
        if self._publish is not None:
            self._publish(manifest, self._commit)

    def _finish(self) -> None:
        if self._commit is not None:
            self._commit()


class _Commit:
    """Waits for the shards, writes the manifest, deletes old ones; whoever calls first does it, on whatever thread."""

    def __init__(self, pending: PendingSave, store: CheckpointStore | None, manifest: Manifest, *, keep: int) -> None:
        self._pending = pending
        self._store = store
        self._manifest = manifest
        self._keep = keep
        self._lock = threading.Lock()
        self._done = False

    def __call__(self) -> None:
        with self._lock:
            if self._done:
                return
            self._pending.wait()
            if self._store is not None:
                self._store.write(self._manifest)
                self._store.prune(self._keep)
            self._done = True
