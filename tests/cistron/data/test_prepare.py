from __future__ import annotations

import gzip
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cistron.data.holdout import ClusterSettings
from cistron.data.index import CorpusIndex
from cistron.data.prepare import prepare_corpus
from cistron.errors import ConfigError, InputError, SequenceError
from cistron.io.fasta import FastaRecord, read_fasta, write_fasta
from cistron.tokenizers import ProteinTokenizer

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def random_records(seed, count, *, letters="ACGTacgtN", shortest=5, longest=300):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest, size=count)
    return [FastaRecord(f"r{i}", "", "".join(rng.choice(list(letters), size=int(n)))) for i, n in enumerate(lengths)]


def stored_rows(corpus, split):
    """Every row of a split, read with nothing but pyarrow."""
    files = sorted((corpus / split).glob("shard-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def genomes(tmp_path_factory):
    """Three files, one compressed; the same name occurs in two of them."""
    folder = tmp_path_factory.mktemp("genomes")
    for seed, name in enumerate(["a.fa", "b.fa.gz", "c.fa"]):
        write_fasta(folder / name, random_records(seed, 9))
    return folder


@pytest.fixture(scope="module")
def corpus(genomes):
    output = genomes.parent / "corpus"
    prepare_corpus([genomes], output, alphabet="dna", row_length=64, rows_per_shard=8, validation_fraction=0.25, seed=1)
    return output


def test_every_letter_arrives_once_in_the_order_of_the_input(genomes, corpus):
    splits = {split: stored_rows(corpus, split) for split in ("train", "valid")}
    expected = [
        (record.name, start, record.sequence[start : start + 64].encode())
        for name in ("a.fa", "b.fa.gz", "c.fa")
        for record in read_fasta(genomes / name)
        for start in range(0, len(record.sequence), 64)
    ]
    places = {row: place for place, row in enumerate(expected)}
    assert len(places) == len(expected)
    found = {s: [places[row["name"], row["start"], row["tokens"]] for row in rows] for s, rows in splits.items()}
    assert sorted(found["train"] + found["valid"]) == list(range(len(expected)))
    assert all(order == sorted(order) for order in found.values())
    assert 0.1 < len(found["valid"]) / len(expected) < 0.4


def test_shards_are_even_and_the_index_tells_the_truth(genomes, corpus):
    for split in ("train", "valid"):
        index = CorpusIndex.open(corpus, split)
        index.verify(hashes=True)
        rows = [shard.rows for shard in index.shards]
        assert rows[:-1] == [8] * (len(rows) - 1)
        assert 1 <= rows[-1] <= 8
        stored = stored_rows(corpus, split)
        assert index.lengths.tolist() == [len(row["tokens"]) for row in stored]
        entry = index.manifest.splits[split]
        assert (entry.rows, entry.letters) == (len(stored), sum(len(row["tokens"]) for row in stored))
        assert entry.records == sum(row["start"] == 0 for row in stored)
        table = pq.read_table(corpus / entry.index)
        assert table.column("shard").to_pylist() == [s for s, n in enumerate(rows) for _ in range(n)]
        assert table.column("row").to_pylist() == [r for n in rows for r in range(n)]
    assert index.manifest.sources == (genomes.name,)
    assert not list(corpus.rglob("part-*"))


def test_same_input_same_bytes_other_seed_other_split(genomes, corpus, tmp_path):
    settings = {"alphabet": "dna", "row_length": 64, "rows_per_shard": 8, "validation_fraction": 0.25}
    prepare_corpus([genomes], tmp_path / "again", seed=1, **settings)
    assert contents(tmp_path / "again") == contents(corpus)
    prepare_corpus([genomes], tmp_path / "other", seed=2, **settings)
    assert stored_rows(tmp_path / "other", "valid") != stored_rows(corpus, "valid")


def test_the_split_of_a_row_does_not_depend_on_its_neighbours(genomes, corpus, tmp_path):
    prepare_corpus(
        [genomes / "c.fa"], tmp_path / "alone", alphabet="dna", row_length=64, validation_fraction=0.25, seed=1
    )
    together = {(row["name"], row["start"], row["tokens"]) for row in stored_rows(corpus, "valid")}
    alone = {(row["name"], row["start"], row["tokens"]) for row in stored_rows(tmp_path / "alone", "valid")}
    assert alone < together


def test_proteins_and_parquet_with_names(tmp_path):
    records = random_records(5, 40, letters="ACDEFGHIKLMNPQRSTVWY", longest=60)
    write_fasta(tmp_path / "x.fa", records)
    table = pa.table({"seq": [r.sequence for r in records], "id": [r.name for r in records]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    settings = {"alphabet": "protein", "validation_fraction": 0.2, "rows_per_shard": 10}
    prepare_corpus([tmp_path / "x.fa"], tmp_path / "fasta", **settings)
    prepare_corpus([tmp_path / "x.parquet"], tmp_path / "parquet", sequence_column="seq", name_column="id", **settings)
    tokenizer = ProteinTokenizer()
    for split in ("train", "valid"):
        rows = stored_rows(tmp_path / "fasta", split)
        assert rows == stored_rows(tmp_path / "parquet", split)
        assert all(tokenizer.decode(list(row["tokens"])) == records[int(row["name"][1:])].sequence for row in rows)


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """Sixty proteins of twenty clusters in two FASTA files with a mapping, and in one Parquet file with both ids."""
    folder = tmp_path_factory.mktemp("clustered")
    records = random_records(6, 60, letters="ACDEFGHIKLMNPQRSTVWY", longest=60)
    owners = [f"c{i}" for i in np.random.default_rng(0).permutation(np.arange(60) % 20)]
    write_fasta(folder / "a.fa.gz", records[:35])
    write_fasta(folder / "b.fa", records[35:])
    pairs = zip(owners, records, strict=True)
    (folder / "map.tsv").write_text("".join(f"{cluster}\t{record.name}\n" for cluster, record in pairs))
    columns = {"sequence": [r.sequence for r in records], "ur50_id": owners, "ur90_id": [r.name for r in records]}
    pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=25)
    return folder, dict(zip([r.name for r in records], owners, strict=True))


def test_clusters_from_a_mapping_and_from_the_input_itself(clustered, tmp_path):
    folder, owner = clustered
    settings = {"alphabet": "protein", "validation_fraction": 0.3, "rows_per_shard": 10, "seed": 2}
    fasta, mapping = [folder / "a.fa.gz", folder / "b.fa"], ClusterSettings(clusters=folder / "map.tsv")
    prepare_corpus(fasta, tmp_path / "fasta", clusters=mapping, **settings)
    own = ClusterSettings(cluster_column="ur50_id")
    prepare_corpus([folder / "x.parquet"], tmp_path / "parquet", name_column="ur90_id", clusters=own, **settings)
    seen = {}
    for split in ("train", "valid"):
        stored = stored_rows(tmp_path / "fasta", split)
        assert stored == stored_rows(tmp_path / "parquet", split)
        index = CorpusIndex.open(tmp_path / "fasta", split)
        table = pq.read_table(tmp_path / "fasta" / split / "clusters.parquet").to_pylist()
        for number, row in enumerate(table):
            assert index.clusters.members(number).tolist() == row["rows"]
            assert {owner[stored[member]["name"]] for member in row["rows"]} == {row["cluster"]}
        assert sum(len(row["rows"]) for row in table) == len(stored)
        assert index.manifest.splits[split].clusters.clusters == len(index.clusters) == len(table)
        seen[split] = {row["cluster"] for row in table}
    assert not seen["train"] & seen["valid"]
    assert seen["train"] | seen["valid"] == set(owner.values())


def test_sequences_of_no_cluster(clustered, tmp_path):
    folder, owner = clustered
    short = tmp_path / "short.tsv"
    lines = (folder / "map.tsv").read_text().splitlines(keepends=True)
    short.write_text("".join(lines[:40]))
    settings = {"alphabet": "protein", "validation_fraction": 0}
    inputs, output = [folder / "a.fa.gz", folder / "b.fa"], tmp_path / "out"
    with pytest.raises(InputError, match=r"b\.fa, line \d+: record 'r40' is in no cluster of .*short\.tsv"):
        prepare_corpus(inputs, output, clusters=ClusterSettings(short), **settings)
    assert not output.exists()
    manifest = prepare_corpus(inputs, output, clusters=ClusterSettings(short, unmapped="drop"), **settings)
    assert manifest.splits["train"].records == 40
    assert {row["name"] for row in stored_rows(output, "train")} == set(list(owner)[:40])


def test_members_that_are_missing_or_repeated_leave_nothing_behind(clustered, tmp_path):
    folder, _ = clustered
    settings = {"alphabet": "protein", "validation_fraction": 0, "clusters": ClusterSettings(folder / "map.tsv")}
    with pytest.raises(InputError, match=r"map\.tsv, line 36: member 'r35' of cluster 'c\d+' is not among .*25 of 60"):
        prepare_corpus([folder / "a.fa.gz"], tmp_path / "out", **settings)
    (tmp_path / "again.fa").write_text(">r7\nMKT\n")
    inputs = [folder / "a.fa.gz", folder / "b.fa", tmp_path / "again.fa"]
    match = r"a\.fa\.gz, line \d+, and .*again\.fa, line 1, hold records of one name \('r7'\)"
    with pytest.raises(InputError, match=match):
        prepare_corpus(inputs, tmp_path / "out", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["again.fa"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"alphabet": "dna", "clusters": ClusterSettings("x.tsv")}, "clusters are of proteins, but alphabet=dna"),
        ({"clusters": ClusterSettings(cluster_column="c")}, "cluster_column=c needs name_column"),
        ({"clusters": ClusterSettings(unmapped="drop")}, "unmapped apply to clusters: set clusters"),
        (
            {"name_column": "n", "clusters": ClusterSettings(cluster_column="c", member_column="m")},
            "member_column is of a mapping",
        ),
    ],
)
def test_cluster_settings_that_contradict_each_other(tmp_path, change, match):
    pq.write_table(pa.table({"sequence": ["MKT"], "c": ["a"], "n": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=match):
        prepare_corpus([tmp_path / "x.parquet"], tmp_path / "out", **({"alphabet": "protein"} | change))


def test_no_validation_makes_no_split(tmp_path):
    write_fasta(tmp_path / "x.fa", random_records(0, 3))
    manifest = prepare_corpus([tmp_path / "x.fa"], tmp_path / "out", alphabet="dna", validation_fraction=0)
    assert list(manifest.splits) == ["train"]
    assert manifest.splits["train"].records == 3


def test_a_record_much_longer_than_a_row_is_streamed(tmp_path):
    letters = "ACGTACGTACGTACGA" * 100_000
    with gzip.open(tmp_path / "x.fa.gz", "wt") as stream:
        stream.write(f">chr1\n{letters}\n")
    manifest = prepare_corpus(
        [tmp_path / "x.fa.gz"], tmp_path / "out", alphabet="dna", row_length=4096, validation_fraction=0
    )
    assert manifest.splits["train"].letters == 1_600_000
    assert b"".join(row["tokens"] for row in stored_rows(tmp_path / "out", "train")).decode() == letters


BAD = {
    "empty file": ("", InputError, r"x\.fa: the file is empty"),
    "no header": ("ACGT\n", InputError, r"x\.fa, line 1: the first line of a FASTA file must be a header"),
    "no sequence": (">a\n>b\nAC\n", InputError, r"x\.fa, line 1: record 'a' has no sequence"),
    "wrong letter": (">a\nAC\nGTZ\n", SequenceError, r"x\.fa: record 'a' \(line 1\): letter 'Z' at position 5"),
    "protein as DNA": (">a\nMKTAYIAKQR\n", SequenceError, "letter 'I' at position 6.*looks like a protein"),
    "same name twice": (
        ">a\nAC\n>b\nAC\n>a\nGT\n",
        InputError,
        r"x\.fa: lines 1 and 5 hold records of one name \('a'\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fasta_leaves_nothing_behind(tmp_path, case):
    text, error, match = BAD[case]
    (tmp_path / "good.fa").write_text(">g\nACGT\n")
    (tmp_path / "x.fa").write_text(text)
    with pytest.raises(error, match=match) as caught:
        prepare_corpus(
            [tmp_path / "good.fa", tmp_path / "x.fa"], tmp_path / "out", alphabet="dna", validation_fraction=0
        )
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)  # Ray's own advice is not part of ours.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.fa", "x.fa"]


def test_truncated_gzip_leaves_nothing_behind(tmp_path):
    packed = gzip.compress(b">a\n" + bytes(np.random.default_rng(0).choice(list(b"ACGT"), size=4000).tolist()))
    (tmp_path / "x.fa.gz").write_bytes(packed[:-20])
    with pytest.raises(InputError, match=r"x\.fa\.gz, line \d+: the compressed file is cut short"):
        prepare_corpus([tmp_path / "x.fa.gz"], tmp_path / "out", alphabet="dna", validation_fraction=0)
    assert [path.name for path in tmp_path.iterdir()] == ["x.fa.gz"]


def test_bad_parquet_leaves_nothing_behind(tmp_path):
    pq.write_table(pa.table({"seq": ["ACGT"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: no column 'sequence' \(has: seq\); set sequence_column"):
        prepare_corpus([tmp_path / "x.parquet"], tmp_path / "out", alphabet="dna")
    with pytest.raises(InputError, match=r"absent\.fa: no such file"):
        prepare_corpus([tmp_path / "absent.fa"], tmp_path / "out", alphabet="dna")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_an_existing_output_is_refused_and_untouched(corpus, genomes):
    before = contents(corpus)
    with pytest.raises(InputError, match="corpus already exists"):
        prepare_corpus([genomes], corpus, alphabet="dna")
    assert contents(corpus) == before


def test_too_few_rows_for_validation_make_no_split(tmp_path, caplog):
    (tmp_path / "x.fa").write_text(">a\nACGT\n")
    manifest = prepare_corpus([tmp_path / "x.fa"], tmp_path / "out", alphabet="dna", validation_fraction=0.001)
    assert "no row fell into the split 'valid'" in caplog.text
    assert list(manifest.splits) == ["train"]
    assert not (tmp_path / "out" / "valid").exists()
    with pytest.raises(InputError, match=r"no split 'valid' \(has: train\)"):
        CorpusIndex.open(tmp_path / "out", "valid")


def test_nothing_left_to_train_on_is_refused(tmp_path):
    (tmp_path / "x.fa").write_text(">a\nACGT\n")
    with pytest.raises(InputError, match="no row fell into the split 'train': change validation_fraction"):
        prepare_corpus([tmp_path / "x.fa"], tmp_path / "out", alphabet="dna", validation_fraction=0.999)
    assert [path.name for path in tmp_path.iterdir()] == ["x.fa"]


@pytest.mark.parametrize("change", [{"validation_fraction": 1.0}, {"row_length": 1}, {"inputs": []}])
def test_settings_out_of_range(tmp_path, change):
    settings = {"inputs": [Path("x.fa")], "alphabet": "dna"} | change
    with pytest.raises(ConfigError, match=r"validation_fraction in \[0, 1\)"):
        prepare_corpus(settings.pop("inputs"), tmp_path / "out", **settings)
