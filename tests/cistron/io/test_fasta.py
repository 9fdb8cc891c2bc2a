from __future__ import annotations

import gzip
import tracemalloc

import pytest

from cistron.errors import InputError
from cistron.io.fasta import FastaRecord, read_fasta, scan_fasta, write_fasta


def put(folder, content, name="x.fa"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_records_names_descriptions_and_lines(tmp_path):
    path = put(tmp_path, ">a first one\nACGT\nac\n\n>b\tsecond\r\nNN\r\n  GG  \n>c\nT")
    assert list(read_fasta(path)) == [
        FastaRecord("a", "first one", "ACGTac", 1),
        FastaRecord("b", "second", "NNGG", 5),
        FastaRecord("c", "", "T", 8),
    ]


def test_compression_is_seen_in_the_bytes_not_the_name(tmp_path):
    text = b">a\nACGT\n>b\nGG\n"
    # Two members: what bgzip and `cat a.gz b.gz` write.
    packed = put(tmp_path, gzip.compress(text[:5]) + gzip.compress(text[5:]), "packed.fa")
    plain = put(tmp_path, text, "plain.fa.gz")
    assert list(read_fasta(packed)) == list(read_fasta(plain)) == list(read_fasta(put(tmp_path, text)))


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path):
    text = b"\xef\xbb\xbf>a\nACGT\n"
    for content in (text, gzip.compress(text)):
        assert list(read_fasta(put(tmp_path, content))) == [FastaRecord("a", "", "ACGT", 1)]


def test_a_long_line_is_read_in_pieces(tmp_path):
    letters = "ACGTN" * 500_000
    path = put(tmp_path, f">a\n{letters}\n>b\n{letters[:70]}\n")
    pieces = list(scan_fasta(path))
    assert len(pieces) > 3
    assert max(len(piece.letters) for piece in pieces) <= (1 << 20) + (1 << 16)
    assert "".join(piece.letters for piece in pieces if piece.header.name == "a") == letters
    assert [record.line for record in read_fasta(path)] == [1, 3]


def test_scanning_does_not_hold_a_record(tmp_path):
    path = tmp_path / "big.fa.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b">chromosome\n")
        for _ in range(400):
            stream.write(b"ACGTACGTAC" * 10_000 + b"\n")
    tracemalloc.start()
    total = sum(len(piece.letters) for piece in scan_fasta(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 40_000_000
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"x\.fa: the file is empty"),
        (b"\n\n", r"x\.fa: the file is empty"),
        (b"\nACGT\n>a\nA\n", r"x\.fa, line 2: the first line of a FASTA file must be a header"),
        (b">a\n>b\nAC\n", r"x\.fa, line 1: record 'a' has no sequence"),
        (b">a\nAC\n>b\n\n", r"x\.fa, line 3: record 'b' has no sequence"),
        (b">a\nAC\n> \nAC\n", r"x\.fa, line 3: the header has no name"),
        (gzip.compress(b""), r"x\.fa: the file is empty"),
    ],
)
def test_malformed_files(tmp_path, content, match):
    with pytest.raises(InputError, match=match):
        list(read_fasta(put(tmp_path, content)))


def test_truncated_and_damaged_gzip(tmp_path):
    whole = gzip.compress(b">a\n" + b"\n".join(b"%012d" % i for i in range(5000)))
    with pytest.raises(InputError, match=r"cut\.gz, line \d+: the compressed file is cut short"):
        list(read_fasta(put(tmp_path, whole[: len(whole) // 2], "cut.gz")))
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    with pytest.raises(InputError, match=r"broken\.gz, line \d+: the compressed file is (damaged|cut short)"):
        list(read_fasta(put(tmp_path, bytes(broken), "broken.gz")))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"absent\.fa: no such file"):
        list(read_fasta(tmp_path / "absent.fa"))
    with pytest.raises(InputError, match="is a folder"):
        list(read_fasta(tmp_path))


@pytest.mark.parametrize("name", ["out.fa", "out.fa.gz"])
def test_write_then_read(tmp_path, name):
    records = [FastaRecord("a", "one two", "ACGT" * 61), FastaRecord("b", "", "m" * 80)]
    path = tmp_path / "deep" / name
    write_fasta(path, records)
    got = list(read_fasta(path))
    assert [(r.name, r.description, r.sequence) for r in got] == [(r.name, r.description, r.sequence) for r in records]
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")
    content = path.read_bytes()
    write_fasta(path, records)
    assert path.read_bytes() == content


def test_failed_write_leaves_nothing(tmp_path):
    def records():
        yield FastaRecord("a", "", "ACGT")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_fasta(tmp_path / "out.fa", records())
    assert list(tmp_path.iterdir()) == []
