"""Embed the sequences of a FASTA file: one vector, or one per token, and one column per layer."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, PositiveInt

from cistron.config import listed
from cistron.inference.embed import Embedding, Layer, embed_sequences
from cistron.inference.pooling import Pooling
from cistron.inference.protein_windows import check_window
from cistron.models.base import SequenceModel
from cistron.models.naming import canonical_layer
from cistron_jobs.inference_job import RecordJobConfig, run_record_job
from cistron_jobs.model_config import model_shell


class EmbedConfig(RecordJobConfig):
    """Settings of ``cistron embed``."""

    layers: Annotated[tuple[int | str, ...], BeforeValidator(listed)] = (-1,)
    """Layers by index or name (embedding, blocks.3, final_norm); -1 is final_norm."""
    pooling: Pooling = "mean"
    """mean, cls (ESM-2) or last: one vector per record; none: one per nucleotide or residue. Those of a part are in
    memory at once: with none, letters_per_part decides how much that is."""
    window: PositiveInt | None = None
    """Proteins: residues that the model sees at once; longer ones are read in overlapping windows whose vectors are
    averaged. As many as it saw in training (1022) unless given."""


def run(config: EmbedConfig) -> str:
    """Embed every record into columns record, name, num_tokens and one per layer; return the output.

    A layer's column has its full name.

    Raises:
        CistronError: an input that cannot be used; no output is left behind.
    """
    shell = model_shell(config)
    check_window(shell, config.window)
    for layer in config.layers:  # An unknown one fails now, and not after the model is loaded.
        canonical_layer(layer, num_layers=len(shell.blocks))
    run_record_job("embed", config, partial(_embedded, config=config))
    return config.output


def _embedded(model: SequenceModel, records: pa.Table, *, config: EmbedConfig) -> pa.Table:
    embeddings = embed_sequences(
        model,
        records["sequence"].to_pylist(),
        layers=config.layers,
        pooling=config.pooling,
        window=config.window,
        token_budget=config.token_budget,
    )
    columns = {
        "name": records["name"],
        "num_tokens": pa.array([embedding.num_tokens for embedding in embeddings], pa.int64()),
    }
    for layer in config.layers:
        name = canonical_layer(layer, num_layers=len(model.blocks))
        columns[name] = _vectors(embeddings, layer, per_token=config.pooling == "none")
    return pa.table(columns)


def _vectors(embeddings: list[Embedding], layer: Layer, *, per_token: bool) -> pa.Array:
    """Return one fixed-size float32 list per record, or with `per_token` a list of such per record."""
    arrays = [np.atleast_2d(embedding.vectors[layer]) for embedding in embeddings]
    width = arrays[0].shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(arrays).ravel()), width)
    if not per_token:
        return vectors
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(offsets, vectors)
