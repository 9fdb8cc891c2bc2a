from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.tiny_models import tiny_esm2

import cistron
from cistron.config import parse_overrides, resolve
from cistron.errors import SequenceError, UnknownNameError
from cistron.models.checkpoint import save_checkpoint
from cistron_jobs.embed import EmbedConfig, run

PROTEINS = {"a": "MKTAYIAKQR", "b": "GSV", "c": "MEEPQSDPSVEP"}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_checkpoint(tiny_esm2(), tmp_path / "esm2")
    (tmp_path / "in.faa").write_text("".join(f">{name}\n{sequence}\n" for name, sequence in PROTEINS.items()))
    return tmp_path


def config(files: Path, *words: str) -> EmbedConfig:
    given = [f"model={files / 'esm2'}", f"input={files / 'in.faa'}", f"output={files / 'out.parquet'}", *words]
    return resolve(EmbedConfig, parse_overrides(given))


@pytest.mark.parametrize("records_per_part", [2, 100])
def test_one_column_per_layer(files: Path, records_per_part: int):
    run(config(files, "layers=[-1, 1, embedding]", f"records_per_part={records_per_part}"))
    table = pq.read_table(files / "out.parquet")
    assert table.column_names == ["record", "name", "num_tokens", "final_norm", "blocks.1", "embedding"]
    assert table["name"].to_pylist() == list(PROTEINS)
    assert table["num_tokens"].to_pylist() == [10, 3, 12]
    expected = cistron.embed_sequences(tiny_esm2(), list(PROTEINS.values()), layers=(-1, 1, "embedding"))
    for column, layer in (("final_norm", -1), ("blocks.1", 1), ("embedding", "embedding")):
        want = np.stack([embedding.vectors[layer] for embedding in expected])
        np.testing.assert_allclose(np.stack(table[column].to_numpy()), want, atol=1e-5)


def test_a_vector_per_residue(files: Path):
    run(config(files, "pooling=none", "layers=[blocks.0]", "records_per_part=2"))
    column = pq.read_table(files / "out.parquet")["blocks.0"]
    expected = cistron.embed_sequences(tiny_esm2(), list(PROTEINS.values()), layers=("blocks.0",), pooling="none")
    for got, want in zip(column.to_pylist(), expected, strict=True):
        np.testing.assert_allclose(np.array(got), want.vectors["blocks.0"], atol=1e-5)


def test_long_proteins_are_read_in_windows(files: Path):
    run(config(files, "window=4"))
    vectors = np.stack(pq.read_table(files / "out.parquet")["final_norm"].to_numpy())
    expected = cistron.embed_sequences(tiny_esm2(), list(PROTEINS.values()), window=4)
    np.testing.assert_allclose(vectors, np.stack([embedding.vectors[-1] for embedding in expected]), atol=1e-5)


def test_records_of_one_name_each_keep_their_row(files: Path, caplog: pytest.LogCaptureFixture):
    (files / "in.faa").write_text(">a\nMKTAY\n>b x\nGS\nV\n>a\nMEEPQSD\n>b\nMK\n>c\nMKT\n>a\nG\n")
    run(config(files, "records_per_part=2"))
    table = pq.read_table(files / "out.parquet")
    assert table["name"].to_pylist() == ["a", "b", "a", "b", "c", "a"]
    assert table["num_tokens"].to_pylist() == [5, 3, 7, 2, 3, 1]
    assert table["record"].to_pylist() == [0, 1, 2, 3, 4, 5]
    (warning,) = [record.getMessage() for record in caplog.records if "name of an earlier one" in record.getMessage()]
    assert f"embed: 3 of 6 records of {files / 'in.faa'} have the name of an earlier one" in warning
    assert (
        "the first: 'a' (lines 1 and 6, records 0 and 2), 'b' (lines 3 and 8, records 1 and 3), 'a' (lines 1 "
        in warning
    )


def test_names_of_their_own_are_no_reason_to_warn(files: Path, caplog: pytest.LogCaptureFixture):
    run(config(files, "records_per_part=2"))
    assert pq.read_table(files / "out.parquet")["record"].to_pylist() == [0, 1, 2]
    assert "earlier one" not in caplog.text


def test_a_failure_leaves_no_output(files: Path):
    with pytest.raises(UnknownNameError, match=r"unknown layer 'blocks\.7'"):
        run(config(files, "layers=[blocks.7]"))
    (files / "in.faa").write_text(">a\nMKT\n>b\nMK*\n")
    with pytest.raises(SequenceError, match=r"line 3, record 'b': letter '\*' at position 3"):
        run(config(files, "records_per_part=1"))
    assert {path.name for path in files.iterdir()} == {"esm2", "in.faa"}


@pytest.mark.parametrize("layer", ["-1", "blocks.1"])
def test_one_layer_needs_no_brackets(files: Path, layer: str):
    assert config(files, f"layers={layer}").layers == config(files, f"layers=[{layer}]").layers


def test_int8_is_asked_for_and_its_error_is_logged(files: Path, caplog: pytest.LogCaptureFixture):
    run(config(files, "layers=embedding"))
    exact = pq.read_table(files / "out.parquet")
    with caplog.at_level("INFO"):
        run(config(files, f"output={files / 'int8.parquet'}", "device=cpu", "precision=int8", "layers=[embedding, -1]"))
    assert "19 linear layers in int8: logits differ by" in caplog.text
    assert "int8 on cpu" in caplog.text
    table = pq.read_table(files / "int8.parquet")
    assert table["embedding"].equals(exact["embedding"])
    want = np.stack([e.vectors[-1] for e in cistron.embed_sequences(tiny_esm2(), list(PROTEINS.values()))])
    difference = np.abs(np.stack(table["final_norm"].to_numpy()) - want).max()
    assert 0 < difference < 0.3 * want.std()
