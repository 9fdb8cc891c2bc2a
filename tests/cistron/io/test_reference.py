from __future__ import annotations

import random
from pathlib import Path

import pytest

from cistron.errors import InputError
from cistron.io.fasta_index import build_index
from cistron.io.reference import open_reference

pysam = pytest.importorskip("pysam", reason="pysam is not installed: no other indexer to compare with")

CONTIGS = {
    name: "".join(random.Random(name).choices("ACGTacgtN", k=size))
    for name, size in (("a", 1), ("chr2", 997), ("x", 60))
}


def fasta(path: Path, *, end: str = "\n", width: int = 60) -> Path:
    lines = []
    for name, sequence in CONTIGS.items():
        lines += [f">{name} text", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    path.write_bytes((end.join(lines) + end).encode())
    return path


def whole(path: Path, name: str) -> str:
    genome = open_reference(path)
    contig = genome.contig(name)
    return genome.fetch(contig, contig.start, contig.stop)


def check(path: Path) -> None:
    genome, source = open_reference(path), random.Random(0)
    for name, sequence in CONTIGS.items():
        contig = genome.contig(name)
        assert (contig.start, contig.stop) == (0, len(sequence))
        for _ in range(30):
            start, stop = sorted(source.choices(range(len(sequence) + 1), k=2))
            assert genome.fetch(contig, start, stop) == sequence[start:stop].upper()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("width", [7, 60, 2000])
def test_regions_of_a_plain_file(tmp_path: Path, end: str, width: int):
    path = fasta(tmp_path / "g.fa", end=end, width=width)
    check(path)
    built = build_index(path)
    pysam.faidx(str(path))
    assert built is not None
    text = "".join(
        f"{name}\t{entry.length}\t{entry.offset}\t{entry.line_letters}\t{entry.line_bytes}\n"
        for name, entry in built.items()
    )
    assert text == Path(f"{path}.fai").read_text()
    check(path)


def test_regions_of_a_bgzip_file(tmp_path: Path):
    big = dict(CONTIGS)
    CONTIGS["big"] = "".join(random.Random(1).choices("ACGT", k=200_000))
    try:
        plain, path = fasta(tmp_path / "g.fa"), tmp_path / "g.fa.gz"
        pysam.tabix_compress(str(plain), str(path))
        check(path)  # Without an index it is read whole.
        pysam.faidx(str(path))
        assert Path(f"{path}.gzi").exists()
        check(path)
    finally:
        CONTIGS.clear()
        CONTIGS.update(big)


@pytest.mark.parametrize(
    "text",
    [">a\nACG\nACGT\n>chr2\nAC\n", ">a\nACGT\n\nACG\n>chr2\nA\n"],
)
def test_ragged_lines_are_read_whole(tmp_path: Path, text: str):
    (tmp_path / "g.fa").write_text(text)
    assert build_index(tmp_path / "g.fa") is None
    genome = open_reference(tmp_path / "g.fa")
    assert genome.fetch(genome.contig("a"), 0, 3)[:2] == "AC"


def test_blank_lines_between_records(tmp_path: Path):
    (tmp_path / "g.fa").write_text(">a\nACGT\nAC\n\n>b\nGG\n\n")
    assert build_index(tmp_path / "g.fa") is not None
    genome = open_reference(tmp_path / "g.fa")
    assert [genome.fetch(genome.contig(name), 0, length) for name, length in (("a", 6), ("b", 2))] == ["ACGTAC", "GG"]


@pytest.mark.parametrize(
    ("text", "index", "message"),
    [
        (">a\nACGT\n>a\nAC\n", None, "two records are named 'a'"),
        (">a\nACG\nACGT\n>a\nAC\n", None, "second record named 'a'"),
        (">a\nACGT\n", "a\t4\t3\n", r"g.fa.fai, line 1: not a line of a FASTA index"),
        (">a\nACGT\n", "a\t4\t3\t0\t0\n", "not a line of a FASTA index"),
        (">a\nACGT\n", "a\t4\t3\t4\t5\na\t4\t3\t4\t5\n", "line 2: a second record"),
        (">a\nACGT\n", "a\t40\t3\t40\t41\n", "does not fit its file"),
        (">a\nACGT\n>b\nACGT\n", "a\t9\t3\t20\t21\n", "does not fit its file"),
        ("", None, "the file is empty"),
        ("ACGT\n", None, "must be a header"),
    ],
)
def test_bad_references(tmp_path: Path, text: str, index: str | None, message: str):
    (tmp_path / "g.fa").write_text(text)
    if index is not None:
        (tmp_path / "g.fa.fai").write_text(index)
    with pytest.raises(InputError, match=message):
        whole(tmp_path / "g.fa", "a")


def test_a_damaged_block_index(tmp_path: Path):
    pysam.tabix_compress(str(fasta(tmp_path / "g.fa")), str(tmp_path / "g.fa.gz"))
    pysam.faidx(str(tmp_path / "g.fa.gz"))
    (tmp_path / "g.fa.gz.gzi").write_bytes(b"\x05\0\0\0\0\0\0\0")
    with pytest.raises(InputError, match="not an index of bgzip"):
        open_reference(tmp_path / "g.fa.gz")
