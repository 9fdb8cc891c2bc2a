"""ESM-2 (35M shape, random weights) on 2 CPU threads: packed fp32 and int8 beside Hugging Face and esm-cpp.

CISTRON_PROTEINS names a FASTA file to draw from instead of the packaged sample. CISTRON_ESM_CPP_PYTHON names the
interpreter of an environment with esm-cpp, which needs another NumPy than this one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import torch
import transformers

from benchmarks.esm_cpp import EsmCpp
from benchmarks.proteins import proteins_file
from cistron.inference.batching import length_sorted_batches, packed
from cistron.io.fasta import read_fasta
from cistron.models.esm2.config import Esm2Config
from cistron.models.esm2.model import Esm2
from cistron.models.layers.int8 import QuantizationReport, quantize_linears
from cistron.models.layers.linear import reorder_weights

SHAPE: Final = Esm2Config(hidden_size=480, num_hidden_layers=12, num_attention_heads=20)
SEQUENCES: Final = 96
HUGGING_FACE_BATCH: Final = 8
PACK: Final = 2048
"""Tokens in a pack: what one layer makes of them stays in the processor's cache, nearly; 1,024 are 5 % slower."""
ASKED: Final = {"packed fp32": (5.0, 1.6), "packed int8": (7.0, 2.2)}
"""Times Hugging Face eager in input order and SDPA sorted by length, on the UniRef-like mix."""
TOLERANCE: Final = 1e-5
INT8_TOLERANCE: Final = 0.1
"""Of the logits' spread; random weights come out at 0.04, a wrong scale at 1."""

Logits: TypeAlias = dict[int, torch.Tensor]
Pieces: TypeAlias = Sequence[Callable[[], Logits]]


def run() -> list[dict[str, Any]]:
    """Return one row per mix and program; wrong logits are an error, not a row."""
    torch.set_num_threads(2)
    ours, int8 = _model(), _model()
    report = quantize_linears(int8)
    theirs = {attention: _hugging_face(ours, attention) for attention in ("eager", "sdpa")}
    rows = []
    reorder_weights(ours)  # As the workers of jobs and of the service do.
    with EsmCpp.started(ours) as esm_cpp, torch.inference_mode():
        for mix, proteins in _mixes().items():
            ids = [ours.tokenizer.encode(protein) for protein in proteins]
            tensors = [torch.from_numpy(row) for row in ids]
            by_length = sorted(range(SEQUENCES), key=[-len(row) for row in ids].__getitem__)
            programs: dict[str, Pieces] = {
                "Hugging Face eager, input order": _padded(theirs["eager"], tensors, list(range(SEQUENCES))),
                "Hugging Face SDPA, sorted": _padded(theirs["sdpa"], tensors, by_length),
                "packed fp32": _packs(ours, ids),
                "packed int8": _packs(int8, ids),
                **({"esm-cpp int8": [partial(esm_cpp.logits, ids)]} if esm_cpp else {}),
            }
            rows += _compared(mix, _race(programs), sum(map(len, ids)), report)
    return rows


def _model() -> Esm2:
    model = Esm2(SHAPE).eval()
    model.init_weights(seed=0)
    return model


def _hugging_face(model: Esm2, attention: str) -> torch.nn.Module:
    config = transformers.EsmConfig.from_dict(model.config.to_json())
    config._attn_implementation = attention
    twin = transformers.EsmForMaskedLM(config).eval()
    decoder = model.esm.embeddings.word_embeddings.weight.detach()
    twin.load_state_dict({**model.state_dict(), "lm_head.decoder.weight": decoder})
    return twin


def _mixes() -> dict[str, list[str]]:
    """Draw both mixes: cropped as in training, and of the length of an antibody's variable domain."""
    proteins = [record.sequence for record in read_fasta(proteins_file())]
    generator = random.Random(0)
    long = [protein for protein in proteins if len(protein) >= 130]
    return {
        "UniRef-like": [protein[: SHAPE.max_length] for protein in generator.sample(proteins, SEQUENCES)],
        "antibody-like": [protein[: generator.randint(105, 130)] for protein in generator.sample(long, SEQUENCES)],
    }


def _padded(model: torch.nn.Module, rows: Sequence[torch.Tensor], order: Sequence[int]) -> Pieces:
    """Return the forward passes over padded batches of rows in an order."""

    def logits(batch: Sequence[int]) -> Logits:
        ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True, padding_value=1)
        found = model(ids, attention_mask=(ids != 1).long()).logits
        return {i: found[row, : len(rows[i])] for row, i in enumerate(batch)}

    starts = range(0, len(order), HUGGING_FACE_BATCH)
    return [partial(logits, order[start : start + HUGGING_FACE_BATCH]) for start in starts]


def _packs(model: Esm2, rows: Sequence[Any]) -> Pieces:
    """Return the forward passes over packs."""

    def logits(batch: Sequence[int]) -> Logits:
        ids, cu_seqlens = packed([rows[i] for i in batch], device=model.device)
        found = model(ids, cu_seqlens=cu_seqlens).logits
        return dict(zip(batch, found.split([len(rows[i]) for i in batch]), strict=True))

    return [partial(logits, pack) for pack in length_sorted_batches([len(row) for row in rows], token_budget=PACK)]


def _race(programs: dict[str, Pieces]) -> dict[str, tuple[float, Logits]]:
    """Return each program's seconds and logits; their pieces take turns, so that a noisy minute hurts all alike."""
    for pieces in programs.values():
        pieces[-1]()
    turns = sorted((i / len(pieces), name, i) for name, pieces in programs.items() for i in range(len(pieces)))
    seconds = dict.fromkeys(programs, 0.0)
    logits: dict[str, Logits] = {name: {} for name in programs}
    for _, name, i in turns:
        start = time.perf_counter()
        found = programs[name][i]()
        seconds[name] += time.perf_counter() - start
        logits[name].update(found)
    return {name: (seconds[name], logits[name]) for name in programs}


def _compared(
    mix: str, race: dict[str, tuple[float, Logits]], num_tokens: int, report: QuantizationReport
) -> list[dict[str, Any]]:
    eager, sdpa = (seconds for name, (seconds, _) in race.items() if name.startswith("Hugging Face"))
    want = _joined(race["Hugging Face SDPA, sorted"][1])
    rows = []
    for name, (seconds, logits) in race.items():
        difference = (_joined(logits) - want).norm() / (want - want.mean()).norm()
        if difference > (INT8_TOLERANCE if "int8" in name else TOLERANCE):
            raise AssertionError(f"{name} differs by {difference:.1e} on the {mix} mix: no speed is reported")
        asked = ASKED.get(name, ("", "")) if mix == "UniRef-like" else ("", "")
        drift = report.perplexity_int8 - report.perplexity
        rows.append(
            {
                "mix": mix,
                "program": name,
                "tokens_per_second": round(num_tokens / seconds),
                "times_eager": round(eager / seconds, 2),
                "asked_times_eager": asked[0],
                "times_sdpa": round(sdpa / seconds, 2),
                "asked_times_sdpa": asked[1],
                "relative_difference": float(f"{difference:.1e}"),
                "perplexity_drift": round(drift, 3) if name == "packed int8" else "",
            }
        )
    return rows


def _joined(logits: Logits) -> torch.Tensor:
    return torch.cat([logits[i] for i in sorted(logits)])
