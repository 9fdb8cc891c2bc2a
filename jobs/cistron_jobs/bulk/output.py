"""The one file that a job leaves: its finished parts, in order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Annotated, Final, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator

from cistron.io import storage
from cistron_jobs.bulk.fingerprint import Fingerprint, to_text

_FINGERPRINT: Final = b"cistron"
"""Key of the fingerprint in a Parquet file's metadata."""


def _is_parquet(path: str) -> str:
    if not path.endswith(".parquet"):
        raise ValueError("the output is a Parquet file, so its name must end in .parquet")
    return path


ParquetPath: TypeAlias = Annotated[str, AfterValidator(_is_parquet)]


def write_parquet(path: str, tables: Iterable[pa.Table], run: Fingerprint) -> None:
    """Write tables of one schema as row groups of a file that names the run it comes from."""
    with storage.open_output(path) as stream, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for table in tables:
            if writer is None:
                schema = table.schema.with_metadata({_FINGERPRINT: to_text(run)})
                writer = stack.enter_context(pq.ParquetWriter(stream, schema))
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))


def fingerprint_of(path: str) -> Fingerprint | None:
    """Return which run made the file at `path`; None when there is no file, or it does not say."""
    if not path.endswith(".parquet") or not storage.exists(path):
        return None
    try:
        with storage.open_input(path) as stream:
            metadata = pq.read_schema(stream).metadata or {}
    except pa.ArrowInvalid:
        return None
    content = json.loads(metadata.get(_FINGERPRINT, b"null"))
    return content if isinstance(content, dict) else None
