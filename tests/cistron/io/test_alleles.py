from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cistron.errors import InputError
from cistron.io.alleles import Allele, read_alleles

EXPECTED = [Allele(0, "1", 7, "A", "NA"), Allele(1, "X", 9, "AC", "*")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.csv", "chrom,pos,ref,alt\n1,7,A,NA\nX,9,AC,*\n"),
        ("v.tsv", "#CHROM\tid\tPOS\tAlt\tREF\n1\ta\t7\tNA\tA\r\nX\t\t9\t*\tAC\r\n"),
        ("v.txt.gz", "pos\tchrom\tref\talt\n7\t1\tA\tNA\n9\tX\tAC\t*\n"),
        ("v.csv", '\ufeff"chrom","pos","ref","alt"\n"1",7,"A",NA\nX,9,AC,"*"\n'),
    ],
)
def test_text_tables(tmp_path: Path, name: str, text: str):
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert list(read_alleles(tmp_path / name)) == EXPECTED


def test_a_comma_separates_alternatives(tmp_path: Path):
    (tmp_path / "v.tsv").write_text("#CHROM\tPOS\tREF\tALT\n1\t7\tA\tC,G\n1\t8\tA\tT\n")
    assert list(read_alleles(tmp_path / "v.tsv")) == [
        Allele(0, "1", 7, "A", "C"),
        Allele(0, "1", 7, "A", "G"),
        Allele(1, "1", 8, "A", "T"),
    ]


def test_parquet(tmp_path: Path):
    table = pa.table(
        {
            "alt": ["NA", "*"],
            "more": [1, 2],
            "Chrom": ["1", "X"],
            "pos": pa.array([7, 9], pa.int32()),
            "ref": ["A", "AC"],
        }
    )
    pq.write_table(table, tmp_path / "v.parquet")
    assert list(read_alleles(str(tmp_path / "v.parquet"))) == EXPECTED


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v.bed", "1\t2\n", "variants are read from files named .vcf"),
        ("v.csv", "chrom,pos,ref\n1,7,A\n", r"there is no column 'alt' \(found: chrom, pos, ref\)"),
        ("v.csv", "chrom,pos,ref,alt\n1,7,A,C\n1,7,,C\n", "row 2: ref is missing"),
        ("v.csv", "chrom,pos,ref,alt\n1,seven,A,C\n", "invalid value 'seven'"),
        ("v.csv", "chrom,pos,ref,alt\n1,7,A\n", "Expected 4 columns, got 3"),
        ("v.csv", "chrom,pos,ref,alt\n", "Empty CSV file"),
        ("v.parquet", "no parquet", "Parquet"),
        ("v.csv", None, "no such file"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, text: str | None, message: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_alleles(tmp_path / name))
