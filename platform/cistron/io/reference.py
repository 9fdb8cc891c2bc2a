"""A reference genome, read by region: a window of a chromosome never needs the chromosome in memory.

A plain FASTA file is read through its ``.fai`` index; without one, the file is indexed here by one pass. A file of
``bgzip`` is read through ``.fai`` and ``.gzi``. Any other file (gzip without index, ragged lines) is held in memory.

**Names.** A contig is found by its exact name. If there is none, ``chr1``, ``1`` and ``NC_000001.11`` count as one name
(as do X, Y and the mitochondrion: ``chrM``, ``M``, ``MT``, ``NC_012920.1``), provided that exactly one record answers
to it. RefSeq accessions are those of the human chromosomes; their version is not looked at, because only the
reference alleles can say whether assembly and variants agree.

**Regions.** A record named ``chr17:41176312-41370000``, as ``samtools faidx`` writes it, holds that part of ``chr17``:
positions stay those of the chromosome.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from cistron.errors import InputError, nearest
from cistron.io import storage
from cistron.io.fasta import read_fasta
from cistron.io.fasta_index import FastaIndex, bgzip_reader, build_index, file_reader, read_index
from cistron.io.storage import PathLike

_REGION: Final = re.compile(r"(.+):(\d+)-(\d+)")
_REFSEQ: Final = re.compile(r"NC_0000(\d\d)\.\d+")
_MITOCHONDRION: Final = re.compile(r"(?:MT?|NC_012920\.\d+)", re.IGNORECASE)
_SEX_CHROMOSOMES: Final = {23: "X", 24: "Y"}

Fetch: TypeAlias = Callable[[str, int, int], str]


@dataclass(frozen=True, slots=True)
class Contig:
    """What the reference holds of one contig.

    Attributes:
        name: of the record.
        start: 0-based position of the first letter that is there.
        stop: position behind the last.
        is_region: whether the contig may go on beyond `start` and `stop`.
    """

    name: str
    start: int
    stop: int
    is_region: bool = False


class ReferenceGenome:
    """Contigs by name, and their letters by position.

    Args:
        lengths: letters of each record, by name.
        fetch: (record name, start, stop) -> letters, positions from 0 at the record's first letter.
        source: what errors call it.
    """

    def __init__(self, lengths: Mapping[str, int], fetch: Fetch, source: str) -> None:
        self.source = source
        self._fetch = fetch
        self._exact = {name: Contig(name, 0, length) for name, length in lengths.items()}
        self._aliases: dict[str, list[Contig]] = defaultdict(list)
        for whole in self._exact.values():
            self._aliases[canonical_name(whole.name)].append(whole)
            if region := _region(whole):
                self._aliases[canonical_name(region[0])].append(region[1])

    def contig(self, name: str) -> Contig:
        """Return the contig of that name, or of the name that means the same.

        Raises:
            InputError: there is none, or several records answer to it.
        """
        if name in self._exact:
            return self._exact[name]
        found = self._aliases.get(canonical_name(name), [])
        if not found:
            raise InputError(f"{self.source} has no sequence named {name!r}{nearest(name, self._exact)}")
        if len(found) > 1:
            records = ", ".join(repr(contig.name) for contig in found)
            raise InputError(f"{self.source}: {name!r} may mean any of {records}; use the exact name")
        return found[0]

    def fetch(self, contig: Contig, start: int, stop: int) -> str:
        """Return the letters of [start, stop), positions on the contig, in upper case: soft-masking is no mutation."""
        assert contig.start <= start <= stop <= contig.stop, (contig, start, stop)
        return self._fetch(contig.name, start - contig.start, stop - contig.start).upper()


def open_reference(source: PathLike | Mapping[str, str]) -> ReferenceGenome:
    """Return the genome of a FASTA file, or of a mapping of names to sequences.

    Raises:
        InputError: no such file, a file that is not FASTA, two records of one name, or an index of another file.
    """
    if isinstance(source, Mapping):
        return _in_memory(source, "the reference")
    index = _index_of(source)
    if index is None:
        return _in_memory(_sequences(source), str(source))
    reader = bgzip_reader(source) if _is_bgzip(source) else file_reader(source)
    lengths = {name: entry.length for name, entry in index.items()}
    return ReferenceGenome(lengths, lambda name, start, stop: index[name].fetch(reader, start, stop), str(source))


def canonical_name(name: str) -> str:
    """Return the spelling that stands for all names of a chromosome.

    >>> [canonical_name(name) for name in ("chr1", "1", "NC_000001.11", "chrM", "NC_000023.10", "scaffold_7")]
    ['1', '1', '1', 'MT', 'X', 'scaffold_7']
    """
    bare = name[3:] if name[:3].lower() == "chr" else name
    if _MITOCHONDRION.fullmatch(bare):
        return "MT"
    refseq = _REFSEQ.fullmatch(bare)
    number = int(refseq[1]) if refseq else 0
    return _SEX_CHROMOSOMES.get(number, str(number)) if 1 <= number <= 24 else bare


def _region(whole: Contig) -> tuple[str, Contig] | None:
    """Return the contig's name and the part of it that a record holds, if its name says so and its length agrees."""
    match = _REGION.fullmatch(whole.name)
    if match is None or int(match[3]) - int(match[2]) + 1 != whole.stop:
        return None
    return match[1], Contig(whole.name, int(match[2]) - 1, int(match[3]), is_region=True)


def _in_memory(sequences: Mapping[str, str], source: str) -> ReferenceGenome:
    lengths = {name: len(sequence) for name, sequence in sequences.items()}
    return ReferenceGenome(lengths, lambda name, start, stop: sequences[name][start:stop], source)


def _sequences(path: PathLike) -> dict[str, str]:
    sequences: dict[str, str] = {}
    for record in read_fasta(path):
        if record.name in sequences:
            raise InputError(f"{path}, line {record.line}: a second record named {record.name!r}")
        sequences[record.name] = record.sequence
    return sequences


def _index_of(path: PathLike) -> FastaIndex | None:
    """Return where the records lie, or None when the file cannot be read by region."""
    has_fai = storage.exists(f"{path}.fai")
    if _is_compressed(path):
        return read_index(path) if has_fai and _is_bgzip(path) else None
    return read_index(path) if has_fai else build_index(path)


def _is_compressed(path: PathLike) -> bool:
    with storage.open_input(path) as stream:
        return bytes(stream.read(2)) == b"\x1f\x8b"


def _is_bgzip(path: PathLike) -> bool:
    return _is_compressed(path) and storage.exists(f"{path}.gzi")
