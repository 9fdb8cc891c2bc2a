from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

from cistron.errors import CapabilityError, InputError
from cistron.io.alleles import Allele, read_alleles
from cistron.io.vcf import VcfRecord, read_vcf
from cistron.io.vcf_annotation import InfoField, annotate_vcf

HEADER = """##fileformat=VCFv4.3
##source=a "tool", with; odd = letters
##contig=<ID=chr1>
##contig=<ID=chr2>
##FILTER=<ID=q10,Description="q">
##FILTER=<ID=s50,Description="s">
##INFO=<ID=AF,Number=A,Type=Float,Description="Frequency">
##INFO=<ID=DB,Number=0,Type=Flag,Description="known">
##INFO=<ID=END,Number=1,Type=Integer,Description="end">
##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">
##FORMAT=<ID=DP,Number=1,Type=Integer,Description="depth">
#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS1
"""
RECORDS = """chr1\t3\trs1\tA\tC,<DEL>\t29.50\tPASS\tAF=0.10,1e-3;DB\tGT:DP\t0/1:007
chr1\t5\t.\tG\t.\t.\t.\t.\tGT\t./.
chr1\t5\tx;y\tGA\tG\t.\tq10;s50\t.\tGT\t1|1
chr2\t1\t.\tn\t*\t1e3\tPASS\tEND=4;;AF=.\tGT\t0
"""
FIELDS = (InfoField("EVO2_DELTA", "Float", "change"), InfoField("EVO2_STATUS", "String", "why"))
VALUES = [(-0.123456789, "scored"), (None, "symbolic_allele"), (2.0, "scored"), (float("nan"), "symbolic_allele")]


def vcf(folder: Path, *, text: str = HEADER + RECORDS, name: str = "in.vcf") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["in.vcf", "in.vcf.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_records_in_order(tmp_path: Path, name: str, end: str):
    path = vcf(tmp_path, text=(HEADER + RECORDS).replace("\n", end), name=name)
    assert list(read_vcf(path)) == [
        VcfRecord("chr1", 3, "A", ("C", "<DEL>")),
        VcfRecord("chr1", 5, "G", ()),
        VcfRecord("chr1", 5, "GA", ("G",)),
        VcfRecord("chr2", 1, "n", ("*",)),
    ]


def test_alleles_one_by_one(tmp_path: Path):
    expected = [
        Allele(0, "chr1", 3, "A", "C"),
        Allele(0, "chr1", 3, "A", "<DEL>"),
        Allele(1, "chr1", 5, "G", "."),
        Allele(2, "chr1", 5, "GA", "G"),
        Allele(3, "chr2", 1, "n", "*"),
    ]
    assert list(read_alleles(vcf(tmp_path))) == expected


def test_annotation_adds_to_info_and_changes_nothing_else(tmp_path: Path):
    annotate_vcf(vcf(tmp_path), tmp_path / "out.vcf", FIELDS, VALUES)
    before, after = (HEADER + RECORDS).splitlines(), (tmp_path / "out.vcf").read_text().splitlines()
    declared = [line for line in after if "EVO2_" in line and line.startswith("##")]
    assert declared == [
        '##INFO=<ID=EVO2_DELTA,Number=A,Type=Float,Description="change">',
        '##INFO=<ID=EVO2_STATUS,Number=A,Type=String,Description="why">',
    ]
    assert after.index('##INFO=<ID=EVO2_DELTA,Number=A,Type=Float,Description="change">') == 11
    kept = [line for line in after if line not in declared]
    infos = [line.split("\t")[7] for line in kept[12:]]
    assert infos == [
        "AF=0.10,1e-3;DB;EVO2_DELTA=-0.12345679,.;EVO2_STATUS=scored,symbolic_allele",
        ".",
        "EVO2_DELTA=2;EVO2_STATUS=scored",
        "END=4;AF=.;EVO2_DELTA=.;EVO2_STATUS=symbolic_allele",
    ]
    for old, new in zip(before, kept, strict=True):
        assert old.split("\t")[:7] == new.split("\t")[:7]
        assert old.split("\t")[8:] == new.split("\t")[8:]


def test_annotating_again_replaces_the_fields(tmp_path: Path):
    annotate_vcf(vcf(tmp_path), tmp_path / "once.vcf", FIELDS, [(9.0, "old")] * 4)
    annotate_vcf(tmp_path / "once.vcf", tmp_path / "twice.vcf", FIELDS, VALUES)
    annotate_vcf(vcf(tmp_path), tmp_path / "direct.vcf", FIELDS, VALUES)
    assert (tmp_path / "twice.vcf").read_bytes() == (tmp_path / "direct.vcf").read_bytes()


@pytest.mark.parametrize("count", [3, 5])
def test_a_wrong_number_of_values_leaves_no_file(tmp_path: Path, count: int):
    with pytest.raises(InputError, match="fewer values" if count == 3 else "more values"):
        annotate_vcf(vcf(tmp_path), tmp_path / "out.vcf", FIELDS, (VALUES * 2)[:count])
    assert [path.name for path in tmp_path.iterdir()] == ["in.vcf"]


def test_bgzip_tabix_and_bcf(tmp_path: Path):
    pysam = pytest.importorskip("pysam", reason="pysam is not installed")
    annotate_vcf(vcf(tmp_path), tmp_path / "new" / "out.vcf.gz", FIELDS, VALUES)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.vcf.gz", "out.vcf.gz.tbi"]
    with pysam.VariantFile(str(tmp_path / "new" / "out.vcf.gz")) as file:
        records = list(file.fetch("chr1", 4, 5))
        assert [record.info.get("EVO2_DELTA") for record in records] == [None, (2.0,)]
        with pysam.VariantFile(str(tmp_path / "out.bcf"), "wb", header=file.header) as binary:
            for record in file.fetch():
                binary.write(record)
    assert list(read_vcf(tmp_path / "out.bcf")) == list(read_vcf(tmp_path / "in.vcf"))
    annotate_vcf(tmp_path / "out.bcf", tmp_path / "again.vcf", FIELDS, VALUES)
    assert list(read_vcf(tmp_path / "again.vcf")) == list(read_vcf(tmp_path / "in.vcf"))


def test_the_header_says_where_values_come_from(tmp_path: Path):
    pysam = pytest.importorskip("pysam", reason="pysam is not installed")
    field = InfoField("EVO2_DELTA", "Float", 'the "change"', source='a\\b "c"\nd', version="cistron 1")
    annotate_vcf(vcf(tmp_path), tmp_path / "out.vcf.bgz", [field], [value[:1] for value in VALUES])
    assert (tmp_path / "out.vcf.bgz.tbi").exists()
    with pysam.VariantFile(str(tmp_path / "out.vcf.bgz")) as file:
        [declared] = [record for record in file.header.records if record.get("ID") == "EVO2_DELTA"]
        assert dict(declared)["Source"] == '"a\\\\b \\"c\\" d"'
        assert dict(declared)["Version"] == '"cistron 1"'
        assert [record.info.get("EVO2_DELTA") for record in file.fetch("chr1", 4, 5)] == [None, (2.0,)]


def test_unsorted_records_keep_their_order_and_have_no_index(tmp_path: Path):
    pytest.importorskip("pysam", reason="pysam is not installed")
    text = HEADER + "".join(reversed(RECORDS.splitlines(keepends=True)))
    annotate_vcf(vcf(tmp_path, text=text), tmp_path / "out.vcf.gz", FIELDS, VALUES)
    assert [record.pos for record in read_vcf(tmp_path / "out.vcf.gz")] == [1, 5, 5, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.vcf", "out.vcf.gz"]


def test_without_pysam_text_is_still_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pysam", None)
    path = vcf(tmp_path, name="in.vcf.gz")
    annotate_vcf(path, tmp_path / "out.vcf", FIELDS, VALUES)
    with pytest.raises(CapabilityError, match=r"needs pysam: pip install 'cistron\[bio\]'"):
        annotate_vcf(path, tmp_path / "out.vcf.gz", FIELDS, VALUES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a VCF file"),
        ("chr1\t3\t.\tA\tC\t.\t.\t.\n", "not a VCF file: it has no line that begins with #CHROM POS"),
        (HEADER + "chr1\t3\t.\tA\tC\n", "line 13: a record has 8 columns or more"),
        (HEADER + "chr1\tx\t.\tA\tC\t.\t.\t.\n", "line 13: POS must be a whole number, got 'x'"),
        (HEADER + RECORDS + "chr1 7 . A C . . .\n", "line 17: a record has 8 columns"),
    ],
)
def test_files_that_are_no_vcf(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=message):
        list(read_vcf(vcf(tmp_path, text=text)))


def test_a_compressed_file_that_is_cut_short(tmp_path: Path):
    path = vcf(tmp_path, name="in.vcf.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cut short"):
        list(read_vcf(path))


def test_a_byte_order_mark_and_bytes_that_are_no_utf8_survive(tmp_path: Path):
    path = tmp_path / "in.vcf"
    body = RECORDS.encode().replace(b"rs1", b"r\xe9")
    path.write_bytes(b"\xef\xbb\xbf" + HEADER.encode() + body)
    annotate_vcf(path, tmp_path / "out.vcf", FIELDS, VALUES)
    assert b"\tr\xe9\t" in (tmp_path / "out.vcf").read_bytes()
    with pytest.raises(InputError, match=r"named \.vcf, \.vcf\.gz or \.vcf\.bgz"):
        annotate_vcf(path, tmp_path / "out.txt", FIELDS, VALUES)
    with pytest.raises(InputError, match="would replace its source"):
        annotate_vcf(path, f"{tmp_path}/./in.vcf", FIELDS, VALUES)
