"""Mapping files: every form reads the same, and every fault names its line."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cistron.data.clusters import ClusterMap
from cistron.data.mapping import Mapping
from cistron.errors import InputError

PAIRS = [("U50_a", "m1"), ("U50_b", "m2"), ("U50_a", "m3"), ("U50_c", "m4"), ("U50_b", "m5")]


def pairs_of(path, **columns):
    return [
        (int(line), cluster, member)
        for pairs in Mapping((str(path),), **columns).read()
        for line, cluster, member in zip(
            pairs.lines, pairs.clusters.to_pylist(), pairs.members.to_pylist(), strict=True
        )
    ]


def test_text_plain_and_compressed(tmp_path):
    lines = [f"{cluster}\t{member}" for cluster, member in PAIRS]
    text = "\n".join(["# cluster member", *lines[:2], "", *lines[2:]])
    (tmp_path / "map.tsv").write_text(text)
    (tmp_path / "map.tsv.gz").write_bytes(gzip.compress(text.replace("\n", "\r\n").encode()))
    expected = [(line, *pair) for line, pair in zip([2, 3, 5, 6, 7], PAIRS, strict=True)]
    assert pairs_of(tmp_path / "map.tsv") == expected
    assert pairs_of(tmp_path / "map.tsv.gz") == expected


def test_parquet_of_pairs_and_of_lists(tmp_path):
    clusters, members = (list(column) for column in zip(*PAIRS, strict=True))
    pq.write_table(pa.table({"ur50_id": clusters, "ur90_id": members}), tmp_path / "pairs.parquet", row_group_size=2)
    assert pairs_of(tmp_path / "pairs.parquet") == [(line, *pair) for line, pair in enumerate(PAIRS, start=1)]
    lists = {"c": ["U50_a", "U50_b", "U50_c"], "m": [["m1", "m3"], ["m2", "m5"], ["m4"]]}
    pq.write_table(pa.table(lists), tmp_path / "lists.parquet")
    got = pairs_of(tmp_path / "lists.parquet", cluster_column="c", member_column="m")
    assert got == [
        (1, "U50_a", "m1"),
        (1, "U50_a", "m3"),
        (2, "U50_b", "m2"),
        (2, "U50_b", "m5"),
        (3, "U50_c", "m4"),
    ]


BAD_TEXT = {
    "no tab": ("a\tm\nb m\n", r"map\.tsv, line 2: a mapping has two columns.*this line has 1: 'b m'"),
    "three columns": ("a\tm\tn\n", r"line 1: .*this line has 3"),
    "no member": ("a\tm\n\nb\t\n", r"line 3: cluster 'b' has no member"),
    "no cluster": ("a\tm\n\tn\n", r"line 2: the cluster has no id"),
    "empty": ("# nothing\n", r"map\.tsv: the mapping is empty"),
    "member twice": (
        "a\tm\nb\tn\nc\tm\n",
        r"map\.tsv, line 3: member 'm' of cluster 'c' already stands in cluster 'a' \(.*map\.tsv, line 1\)",
    ),
    "pair twice": ("a\tm\na\tm\n", r"line 2: member 'm' of cluster 'a' already stands in cluster 'a' \(.*line 1\)"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(tmp_path, case):
    text, match = BAD_TEXT[case]
    (tmp_path / "map.tsv").write_text(text)
    with pytest.raises(InputError, match=match):
        ClusterMap.load(Mapping((str(tmp_path / "map.tsv"),)))


BAD_PARQUET = {
    "no cluster column": ({"c": ["a"], "ur90_id": ["m"]}, r"no column 'ur50_id' \(has: c, ur90_id\); set cluster_col"),
    "no member column": ({"ur50_id": ["a"], "m": ["m"]}, r"no column 'ur90_id' .*; set member_column"),
    "numbers": ({"ur50_id": [1], "ur90_id": ["m"]}, r"column 'ur50_id' holds int64; ids are text"),
    "null": ({"ur50_id": ["a", "b"], "ur90_id": ["m", None]}, r"map\.parquet, line 2: cluster 'b' has no member"),
    "no member": ({"ur50_id": ["a", "b"], "ur90_id": [["m"], []]}, r"map\.parquet, line 2: cluster 'b' has no member"),
    "null in list": ({"ur50_id": ["a"], "ur90_id": [["m", None]]}, r"line 1: cluster 'a' has no member"),
}


@pytest.mark.parametrize("case", BAD_PARQUET)
def test_bad_parquet(tmp_path, case):
    columns, match = BAD_PARQUET[case]
    pq.write_table(pa.table(columns), tmp_path / "map.parquet")
    with pytest.raises(InputError, match=match):
        ClusterMap.load(Mapping((str(tmp_path / "map.parquet"),)))


def test_damaged_or_absent_files(tmp_path):
    pq.write_table(pa.table({"ur50_id": ["a"], "ur90_id": ["m"]}), tmp_path / "map.parquet")
    (tmp_path / "map.parquet").write_bytes((tmp_path / "map.parquet").read_bytes()[:40])
    with pytest.raises(InputError, match=r"map\.parquet: damaged Parquet file"):
        ClusterMap.load(Mapping((str(tmp_path / "map.parquet"),)))
    with pytest.raises(InputError, match=r"absent\.tsv: no such file"):
        ClusterMap.load(Mapping((str(tmp_path / "absent.tsv"),)))
    packed = gzip.compress(b"".join(b"c%d\tm%d\n" % (i, i) for i in range(3000)))
    (tmp_path / "map.tsv.gz").write_bytes(packed[:-20])
    with pytest.raises(InputError, match=r"map\.tsv\.gz, line \d+: the compressed file is cut short"):
        ClusterMap.load(Mapping((str(tmp_path / "map.tsv.gz"),)))
