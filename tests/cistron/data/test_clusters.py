"""Clusters: look-ups, the held-out part, and a member drawn at every visit."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.cistron.data.corpora import make_corpus

from cistron.data.clusters import ClusterMap
from cistron.data.hashing import hash_names
from cistron.data.holdout import TRAIN, VALID, choose_holdout
from cistron.data.index import CorpusIndex
from cistron.data.mapping import Mapping
from cistron.data.plan import SamplePlan, worker_block
from cistron.data.samples import iterate_samples
from cistron.errors import InputError
from cistron.tokenizers import ProteinTokenizer


def load(folder, pairs):
    path = folder / "map.tsv"
    path.write_text("".join(f"{cluster}\t{member}\n" for cluster, member in pairs))
    return ClusterMap.load(Mapping((str(path),)))


def random_pairs(seed, members, clusters):
    rng = np.random.default_rng(seed)
    chosen = [*range(clusters), *rng.integers(clusters, size=members - clusters).tolist()]
    rng.shuffle(chosen)
    order = rng.permutation(members).tolist()
    return [(f"c{chosen[member]}", f"record{member}") for member in order]


@pytest.fixture
def corpus(tmp_path):
    """Thirty proteins in eight clusters of unequal size, one of them of one member, one with a long protein."""
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), size=int(n))) for n in rng.integers(5, 40, size=30)]
    pairs = random_pairs(1, 30, 8)
    index = make_corpus(tmp_path / "corpus", sequences, alphabet="protein", clusters=load(tmp_path, pairs))
    return index, pairs


def plan_of(index, **settings):
    return SamplePlan(index, **({"objective": "masked", "max_length": 40, "seed": 0} | settings))


def row_of(index, sample):
    return int(index.row_offsets[sample.shard]) + sample.row


def test_find_equals_a_dictionary(tmp_path):
    clusters = load(tmp_path, random_pairs(3, 200, 40))
    names = [f"record{i}" for i in np.random.default_rng(0).integers(400, size=300)]
    places = clusters.find(hash_names(names))
    owner = {member: cluster for cluster, member in random_pairs(3, 200, 40)}
    found = [None if place < 0 else clusters.names[int(clusters.clusters[place])].as_py() for place in places]
    assert found == [owner.get(name) for name in names]


def test_the_index_groups_rows_by_cluster_in_the_order_of_the_mapping(corpus):
    index, pairs = corpus
    expected = {}
    for cluster, member in pairs:
        expected.setdefault(cluster, []).append(int(member.removeprefix("record")))
    assert [index.clusters.members(i).tolist() for i in range(len(index.clusters))] == list(expected.values())


def test_each_epoch_visits_each_cluster_once_by_one_of_its_members(corpus):
    index, pairs = corpus
    owner = {int(member.removeprefix("record")): cluster for cluster, member in pairs}
    plan = plan_of(index)
    assert plan.samples_per_epoch == 8
    draws = []
    for epoch in range(5):
        samples = [plan.locate(8 * epoch + i) for i in range(8)]
        assert {sample.epoch for sample in samples} == {epoch}
        rows = [row_of(index, sample) for sample in samples]
        assert sorted(owner[row] for row in rows) == sorted(set(owner.values()))
        draws.append({owner[row]: row for row in rows})
    assert all(earlier != later for earlier, later in pairwise(draws))


def test_members_are_drawn_uniformly(tmp_path):
    sizes = [1, 2, 5, 12]
    pairs = [(f"c{c}", f"record{sum(sizes[:c]) + i}") for c, size in enumerate(sizes) for i in range(size)]
    index = make_corpus(tmp_path / "c", ["MKT"] * 20, alphabet="protein", clusters=load(tmp_path, pairs))
    plan, epochs = plan_of(index, seed=7), 1500
    drawn = Counter(row_of(index, plan.locate(i)) for i in range(4 * epochs))
    for first, size in zip([0, 1, 3, 8], sizes, strict=True):
        counts = np.array([drawn[row] for row in range(first, first + size)])
        assert counts.sum() == epochs, "each cluster once in an epoch, whatever its size"
        expected = epochs / size
        freedom = size - 1
        assert ((counts - expected) ** 2 / expected).sum() <= freedom + 5 * np.sqrt(2 * freedom)


def test_draws_depend_on_seed_and_number_only(corpus):
    index, _ = corpus

    def stream(*, start, workers, seed=0):
        """Samples of a run that begins at a cursor, as its workers read them."""
        plan = plan_of(CorpusIndex.open(index.path, "train"), seed=seed)
        blocks = [
            worker_block(block, start=start, rank=rank, num_workers=workers, samples_per_block=2)
            for rank in range(workers)
            for block in range((48 - start) // (2 * workers))
        ]
        return {
            sample.sample_index: (sample.input_ids.tolist(), sample.targets.tolist())
            for block in blocks
            for sample in iterate_samples(plan, block)
        }

    whole = stream(start=0, workers=1)
    assert sorted(whole) == list(range(48))
    assert stream(start=0, workers=2) == stream(start=0, workers=4) == whole
    assert stream(start=16, workers=2) == {number: whole[number] for number in range(16, 48)}
    assert stream(start=0, workers=1, seed=1) != whole


def test_a_drawn_member_is_cropped_to_1022_residues_anew_at_every_visit(tmp_path):
    rng = np.random.default_rng(2)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), size=n)) for n in (1500, 1022, 1023)]
    clusters = load(tmp_path, [("a", "record0"), ("a", "record1"), ("a", "record2")])
    index = make_corpus(tmp_path / "c", sequences, alphabet="protein", clusters=clusters)
    plan = plan_of(index, max_length=1022)
    starts = {}
    for sample in (plan.locate(i) for i in range(60)):
        row = row_of(index, sample)
        assert sample.length == 1022
        assert 0 <= sample.start <= len(sequences[row]) - 1022
        starts.setdefault(row, set()).add(sample.start)
    assert len(starts[0]) > 10
    assert starts[1] == {0}
    assert starts[2] == {0, 1}
    tokenizer = ProteinTokenizer()
    for number, sample in enumerate(iterate_samples(plan, range(5))):
        place = plan.locate(number)
        ids = np.where(sample.targets >= 0, sample.targets, sample.input_ids)
        assert tokenizer.decode(ids) == sequences[row_of(index, place)][place.start : place.start + 1022]


def test_the_fingerprint_knows_the_clusters(corpus, tmp_path):
    index, pairs = corpus
    (tmp_path / "other").mkdir()
    swapped = load(tmp_path / "other", [(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1]), *pairs[2:]])
    rows = [row["tokens"] for row in read_rows_of(index)]
    sequences = [ProteinTokenizer().decode(list(tokens)) for tokens in rows]
    other = make_corpus(tmp_path / "other" / "corpus", sequences, alphabet="protein", clusters=swapped)
    assert plan_of(index).fingerprint != plan_of(other).fingerprint


def read_rows_of(index):
    return [row for shard in index.shards for row in pq.read_table(f"{index.path}/{shard.file}").to_pylist()]


def test_no_cluster_is_in_both_splits(tmp_path):
    pairs = random_pairs(5, 600, 150)
    clusters = load(tmp_path, pairs)
    holdout = choose_holdout(clusters, seed=3, fraction=0.3, paths=["x.fa"], unmapped="error")
    names = [member for _, member in pairs]
    parts = {split: holdout.select(rows(names), split).column("name").to_pylist() for split in (TRAIN, VALID)}
    owner = {member: cluster for cluster, member in pairs}
    train, valid = ({owner[name] for name in parts[split]} for split in (TRAIN, VALID))
    assert not train & valid
    assert sorted(parts[TRAIN] + parts[VALID]) == sorted(names)
    assert 0.15 < len(valid) / 150 < 0.45
    # The draw does not depend on what else is in the mapping.
    (tmp_path / "part").mkdir()
    some = load(tmp_path / "part", pairs[:50])
    alone = choose_holdout(some, seed=3, fraction=0.3, paths=["x.fa"], unmapped="error")
    assert {owner[n] for n in alone.select(rows(names[:50]), VALID).column("name").to_pylist()} <= valid
    other = choose_holdout(clusters, seed=4, fraction=0.3, paths=["x.fa"], unmapped="error")
    assert {owner[n] for n in other.select(rows(names), VALID).column("name").to_pylist()} != valid


def rows(names):
    return pa.table({"file": [0] * len(names), "line": list(range(1, len(names) + 1)), "name": names})


def test_a_sequence_of_no_cluster_is_refused_or_dropped(tmp_path):
    clusters = load(tmp_path, [("a", "m1"), ("b", "m2")])
    strict, lenient = (
        choose_holdout(clusters, seed=0, fraction=0.0, paths=["x.fa"], unmapped=u) for u in ("error", "drop")
    )
    match = r"x\.fa, line 2: record 'm9' is in no cluster of .*map\.tsv; .*unmapped=drop"
    with pytest.raises(InputError, match=match):
        strict.select(rows(["m1", "m9", "m2"]), TRAIN)
    assert lenient.select(rows(["m1", "m9", "m2"]), TRAIN).column("name").to_pylist() == ["m1", "m2"]


def test_a_mapping_that_names_an_unknown_member_is_refused(tmp_path):
    pairs = [("a", "record0"), ("b", "record7"), ("b", "record1"), ("c", "record8")]
    clusters = load(tmp_path, pairs)
    match = r"map\.tsv, line 2: member 'record7' of cluster 'b' is not among the sequences \(2 of 4 members are not\)"
    with pytest.raises(InputError, match=match):
        make_corpus(tmp_path / "c", ["MKT"] * 2, alphabet="protein", clusters=clusters)


def test_a_damaged_cluster_table_is_named(corpus):
    index, _ = corpus
    file = Path(index.path) / "train" / "clusters.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"clusters\.parquet: the content is not what index\.json says"):
        CorpusIndex.open(index.path, "train")
