"""A copy of a VCF file with more in INFO.

Order, header and all other fields stay as they are to the letter, which is why records are not parsed into objects and
printed again.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from cistron.errors import InputError
from cistron.io import storage
from cistron.io.storage import PathLike
from cistron.io.vcf import FIXED_COLUMNS, parse_record, read_lines, require_pysam

_INFO: Final = FIXED_COLUMNS.index("INFO")
_MISSING: Final = "."
_COMPRESSED: Final = (".vcf.gz", ".vcf.bgz")


@dataclass(frozen=True, slots=True)
class InfoField:
    """Declaration of an INFO field with one value per alternative allele (VCF 4.3, section 1.4.2).

    Attributes:
        name: its ID.
        type: ``Float``, ``Integer`` or ``String``.
        description: what it means.
        source: what it was computed from; left out if empty.
        version: of the program that did; left out if empty.
    """

    name: str
    type: str
    description: str
    source: str = ""
    version: str = ""

    @property
    def header(self) -> str:
        """Line of the header."""
        texts = {"Description": self.description, "Source": self.source, "Version": self.version}
        quoted = ",".join(f'{key}="{_escaped(text)}"' for key, text in texts.items() if text)
        return f"##INFO=<ID={self.name},Number=A,Type={self.type},{quoted}>"


def annotate_vcf(
    source: PathLike, destination: PathLike, fields: Sequence[InfoField], values: Iterable[Sequence[object]]
) -> None:
    """Write the records of `source` with more INFO; the file appears whole or not at all.

    A name that ends in ``.gz`` or ``.bgz`` is compressed by blocks, and indexed for ``tabix`` if the records are
    sorted. INFO fields of the same names are replaced.

    Args:
        source: VCF or BCF.
        destination: name that ends in ``.vcf``, ``.vcf.gz`` or ``.vcf.bgz``.
        fields: what is added.
        values: for each alternative allele, in the order of the file, a value of each field; None is missing. A record
            without alternatives stays as it is, and takes no values.

    Raises:
        InputError: as :func:`read_vcf`, another name, or another number of values.
        CapabilityError: compression without pysam.
    """
    check_annotation(source, destination)
    lines = _annotated(source, fields, iter(values))
    if not str(destination).endswith(_COMPRESSED):
        with storage.open_output(destination) as stream:
            _write(stream.write, lines)
        return
    pysam = require_pysam(f"writing {destination}")
    with _scratch(destination) as folder:
        file = folder / "annotated.vcf.gz"
        with pysam.BGZFile(str(file), "wb") as stream:
            is_sorted = _write(stream.write, lines)
        if is_sorted:
            pysam.tabix_index(str(file), preset="vcf", force=True)
        _place(file, destination)
        if is_sorted:
            _place(file.with_name(f"{file.name}.tbi"), f"{destination}.tbi")


def check_annotation(source: PathLike, destination: PathLike) -> None:
    """Check that an annotated file can be written, which a long computation may have to come before.

    Raises:
        InputError: another name than ``.vcf``, ``.vcf.gz`` or ``.vcf.bgz``, or that of the source.
        CapabilityError: compression without pysam.
    """
    if not str(destination).endswith((".vcf", *_COMPRESSED)):
        raise InputError(f"{destination}: an annotated VCF is named .vcf, .vcf.gz or .vcf.bgz")
    if storage.absolute(source) == storage.absolute(destination):
        raise InputError(f"{destination}: the annotated VCF would replace its source; choose another name")
    if str(destination).endswith(_COMPRESSED):
        require_pysam(f"writing {destination}")


def _annotated(source: PathLike, fields: Sequence[InfoField], values: Iterator[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of the annotated file."""
    names = {field.name for field in fields}
    for number, line in read_lines(source):
        text = line.rstrip("\r\n")
        end = line[len(text) :]
        if line.startswith("#CHROM"):
            yield from (f"{field.header}{end}" for field in fields)
        if line.startswith("#"):
            if not any(line.startswith(f"##INFO=<ID={name},") for name in names):
                yield line
            continue
        record = parse_record(source, number, line)
        rows = [next(values, None) for _ in record.alts]
        if None in rows:
            raise InputError(f"{source}, line {number}: there are fewer values than alternative alleles")
        columns = text.split("\t")
        columns[_INFO] = _with_info(columns[_INFO], fields, cast("list[Sequence[object]]", rows))
        yield "\t".join(columns) + end
    if next(values, None) is not None:
        raise InputError(f"{source}: there are more values than alternative alleles")


def _with_info(info: str, fields: Sequence[InfoField], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return info
    names = {field.name for field in fields}
    kept = [item for item in info.split(";") if item not in ("", _MISSING) and item.partition("=")[0] not in names]
    columns = zip(*rows, strict=True)
    added = [f"{field.name}={','.join(map(_formatted, column))}" for field, column in zip(fields, columns, strict=True)]
    return ";".join(kept + added)


def _escaped(text: str) -> str:
    """Return a text as it stands between the quotes of a header line, which has no room for a line's end."""
    return " ".join(text.replace("\\", "\\\\").replace('"', '\\"').splitlines())


def _formatted(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return _MISSING
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _write(write: Callable[[bytes], object], lines: Iterator[str]) -> bool:
    """Write the lines; return whether contigs are in one piece each, and positions in order."""
    is_sorted, seen, chrom, last = True, set[str](), "", -1
    for line in lines:
        write(line.encode("utf-8", errors="surrogateescape"))
        if line.startswith("#"):
            continue
        name, pos = line.split("\t", 2)[:2]
        if name != chrom:
            is_sorted &= name not in seen
            seen.add(name)
            chrom, last = name, -1
        is_sorted &= int(pos) >= last
        last = int(pos)
    return is_sorted


@contextmanager
def _scratch(destination: PathLike) -> Iterator[Path]:
    """Yield a folder that goes away, on the disk of `destination` if that is local."""
    parent = None
    if storage.is_local(destination):
        parent = Path(storage.resolve(destination)[1]).parent
        storage.make_dirs(parent)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".vcf.") as folder:
        yield Path(folder)


def _place(file: Path, destination: PathLike) -> None:
    """Put a finished file at `destination`, whole or not at all."""
    if storage.is_local(destination):
        file.replace(storage.resolve(destination)[1])
        return
    with file.open("rb") as content, storage.open_output(destination) as stream:
        shutil.copyfileobj(content, stream)
