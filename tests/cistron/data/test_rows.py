from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cistron.data.rows import RowFormat, find_sources, read_rows
from cistron.errors import InputError, SequenceError
from cistron.tokenizers import ProteinTokenizer

DNA = RowFormat(alphabet="dna", row_length=10, sequence_column="sequence")
PROTEIN = RowFormat(alphabet="protein", row_length=10, sequence_column="sequence")


def rows(path, form):
    return [row for source in find_sources([str(path)], form) for row in read_rows(source, form)]


def fasta(folder, text, name="x.fa"):
    path = folder / name
    path.write_text(text)
    return path


def test_dna_rows_keep_case_and_cover_the_record(tmp_path):
    path = fasta(tmp_path, ">a\nACGTacgtNN\nACGTACGTAC\nGGG\n>b\nACGTACGTAC\n")
    got = [(row.name, row.line, row.start, row.tokens) for row in rows(path, DNA)]
    assert got == [
        ("a", 1, 0, b"ACGTacgtNN"),
        ("a", 1, 10, b"ACGTACGTAC"),
        ("a", 1, 20, b"GGG"),
        ("b", 5, 0, b"ACGTACGTAC"),
    ]


def test_rows_never_begin_inside_a_tag(tmp_path):
    text = "ACGTACG|d__X|ACGTACGTACGTACG|p__Y|A"
    got = rows(fasta(tmp_path, f">a\n{text}\n"), DNA)
    assert b"".join(row.tokens for row in got) == text.encode()
    assert [row.start for row in got] == [sum(len(r.tokens) for r in got[:i]) for i in range(len(got))]
    assert all(row.tokens.count(b"|") % 2 == 0 for row in got)
    assert max(len(row.tokens) for row in got) <= 10


def test_a_tag_longer_than_a_row_is_refused(tmp_path):
    with pytest.raises(SequenceError, match="'a': the tag at position 4 is longer than row_length=10"):
        rows(fasta(tmp_path, ">a\nACG|d__BACTERIA|ACGT\n"), DNA)


def test_protein_rows_are_whole_and_upper_case(tmp_path):
    (row,) = rows(fasta(tmp_path, ">p\nMKTAYIAK\nqrqisfvks\n"), PROTEIN)
    assert ProteinTokenizer().decode(list(row.tokens)) == "MKTAYIAKQRQISFVKS"


def test_wrong_letters_name_file_record_and_position(tmp_path):
    path = fasta(tmp_path, ">good\nACGT\n>bad one\nACGTACGTAC\nGTJT\n")
    with pytest.raises(SequenceError, match=r"x\.fa: record 'bad' \(line 3\): letter 'J' at position 13"):
        rows(path, DNA)
    with pytest.raises(
        SequenceError, match=r"record 'p' \(line 1\): letter 'I' at position 6 .*this looks like a protein"
    ):
        rows(fasta(tmp_path, ">p\nMKTAYIAKQR\n"), RowFormat("dna", 10, "sequence"))
    with pytest.raises(SequenceError, match=r"letter '\*' at position 4.*remove the stop"):
        rows(fasta(tmp_path, ">p\nMKT*\n"), PROTEIN)


def test_dna_in_a_corpus_of_proteins_is_refused(tmp_path):
    dna = "ACGTTGCANT" * 6 + "R" + "ACGTTGCANT" * 6
    with pytest.raises(SequenceError, match=r"x\.fa: record 'chr' \(line 3\): this looks like DNA.*translate it first"):
        rows(fasta(tmp_path, f">p\nMKT\n>chr\n{dna}\n"), PROTEIN)
    with pytest.raises(SequenceError, match="this looks like DNA"):
        rows(fasta(tmp_path, f">chr\n{dna.lower()}\n"), PROTEIN)


def test_parquet_rows(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"sequence": ["ACGT" * 4, "GG", "TTT"], "id": ["u", "v", "w"]})
    pq.write_table(table, path, row_group_size=2)
    named = RowFormat("dna", 10, "sequence", "id")
    sources = find_sources([str(path)], named)
    assert [(source.number, source.row_group, source.first_row) for source in sources] == [(0, 0, 0), (0, 1, 2)]
    got = [(row.name, row.line, row.start) for row in rows(path, named)]
    assert got == [("u", 1, 0), ("u", 1, 10), ("v", 2, 0), ("w", 3, 0)]
    assert [row.name for row in rows(path, DNA)] == ["x.parquet:1", "x.parquet:1", "x.parquet:2", "x.parquet:3"]


def test_parquet_faults(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"seq": ["ACGT", None], "n": [1, 2]}), path)
    with pytest.raises(InputError, match=r"no column 'sequence' \(has: seq, n\); set sequence_column"):
        rows(path, DNA)
    with pytest.raises(InputError, match=r"no column 'id' .*; set name_column"):
        rows(path, RowFormat("dna", 10, "seq", "id"))
    with pytest.raises(InputError, match=r"x\.parquet, row 2: column 'seq' holds None, not text"):
        rows(path, RowFormat("dna", 10, "seq"))
    with pytest.raises(InputError, match=r"x\.parquet, row 1: column 'n' holds 1, not text"):
        rows(path, RowFormat("dna", 10, "n"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"x\.parquet: damaged Parquet file"):
        rows(path, DNA)


def test_empty_sequence_in_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"sequence": ["AC", ""]}), path)
    for form in (DNA, PROTEIN):
        with pytest.raises(SequenceError, match=r"record 'x\.parquet:2' \(line 2\): the sequence is empty"):
            rows(path, form)


def test_folders_are_read_by_name_hidden_files_left_out(tmp_path):
    for name in ("b.fa", "a.fa", ".hidden", "_SUCCESS"):
        fasta(tmp_path, ">x\nAC\n", name)
    sources = find_sources([str(tmp_path)], DNA)
    assert [source.path.rpartition("/")[2] for source in sources] == ["a.fa", "b.fa"]
    with pytest.raises(InputError, match="given more than once"):
        find_sources([str(tmp_path), str(tmp_path / "a.fa")], DNA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: the folder holds no files"):
        find_sources([str(tmp_path / "empty")], DNA)
    with pytest.raises(InputError, match=r"absent\.fa: no such file"):
        find_sources([str(tmp_path / "absent.fa")], DNA)
