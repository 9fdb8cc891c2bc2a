"""The folder of an unfinished run: one file per finished part, each there wholly or not at all.

``<output>.parts/run.json`` says which run it is, ``part-00012.parquet`` holds the result of part 12, ``attempts/12``
how often an actor has begun it. A part is written by whoever computed it. Computing one twice replaces the file by an
equal one, so a retry neither loses nor doubles a row.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from cistron.errors import InputError
from cistron.io import storage
from cistron_jobs.bulk.fingerprint import Fingerprint, differences, to_text

logger = logging.getLogger(__name__)

_RUN: Final = "run.json"
_ATTEMPTS: Final = "attempts"
_PART: Final = re.compile(r"part-(\d{5,})\.parquet")


@dataclass(frozen=True, slots=True)
class PartsFolder:
    """Finished parts of the run that makes `output`.

    Attributes:
        output: absolute path or URL.
    """

    output: str

    @property
    def path(self) -> str:
        """Path of the folder."""
        return f"{self.output}.parts"

    def claim(self, run: Fingerprint, *, restart: bool) -> frozenset[int]:
        """Make the folder ready for `run`; return the numbers of the parts that it has finished before.

        Raises:
            InputError: the folder holds parts of another run, or something else.
        """
        started = self._run() if storage.exists(self.path) else None
        if started is None or restart:
            self.remove()
            storage.write_text(storage.join(self.path, _RUN), to_text(run))
            return frozenset()
        if changed := differences(started, run):
            raise InputError(
                f"{self.path} holds the finished parts of a run with other settings: {', '.join(changed)}; "
                "restart=true, or deleting the folder, computes everything anew"
            )
        storage.remove_tree(storage.join(self.path, _ATTEMPTS))
        return self.finished()

    def begin(self, number: int) -> int:
        """Note that part `number` is begun; return how often it has been since the folder was claimed."""
        path = storage.join(self.path, _ATTEMPTS, str(number))
        attempts = 1 + (int(storage.read_text(path)) if storage.exists(path) else 0)
        storage.write_text(path, str(attempts))
        return attempts

    def finished(self) -> frozenset[int]:
        """Return the numbers of the finished parts."""
        numbers = set()
        for path in storage.list_files(self.path):
            match = _PART.fullmatch(storage.name_of(path))
            if match and self._is_readable(path):
                numbers.add(int(match.group(1)))
        return frozenset(numbers)

    def write(self, number: int, table: pa.Table) -> None:
        """Write the result of part `number`, atomically."""
        with storage.open_output(self._part(number)) as stream:
            pq.write_table(table, stream)

    def tables(self, count: int) -> Iterator[pa.Table]:
        """Yield the results of parts 0 to `count` - 1 in order, one row group at a time."""
        for number in range(count):
            with storage.open_input(self._part(number)) as stream:
                file = pq.ParquetFile(stream)
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)

    def remove(self) -> None:
        """Delete the folder."""
        storage.remove_tree(self.path)

    def _part(self, number: int) -> str:
        return storage.join(self.path, f"part-{number:05d}.parquet")

    def _run(self) -> Fingerprint:
        path = storage.join(self.path, _RUN)
        try:
            content = json.loads(storage.read_text(path))
        except (InputError, ValueError) as error:
            raise InputError(f"{self.path} is in the way: it is not the folder of an unfinished run") from error
        return content if isinstance(content, dict) else {}

    def _is_readable(self, path: str) -> bool:
        """Return whether a part is whole: a machine that lost power may have renamed a file and not written it."""
        if not storage.is_local(path):
            return True
        try:
            with storage.open_input(path) as stream:
                pq.read_metadata(stream)
        except pa.ArrowInvalid:
            logger.warning("%s is damaged; its part is computed again", path)
            return False
        return True
