"""Continue DNA prompts, given as text or as a FASTA file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table

from cistron.config import listed
from cistron.errors import InputError, SequenceError
from cistron.inference.generate import PREFILL_CHUNK, Generation, generate
from cistron.io import storage
from cistron.io.fasta import FastaRecord, read_fasta, write_fasta
from cistron.tokenizers import ByteTokenizer
from cistron_jobs.inference_job import ModelJobConfig, open_model

_LETTERS_SHOWN = 60
_FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".fa.gz", ".fasta.gz", ".fna.gz")


def _known_suffix(path: str) -> str:
    if not path.endswith((".json", *_FASTA_SUFFIXES)):
        raise ValueError(f"the name must end in .json or one of {', '.join(_FASTA_SUFFIXES)}")
    return path


class GenerateConfig(ModelJobConfig):
    """Settings of ``cistron generate``."""

    prompts: str | tuple[str, ...]
    """A list of sequences, one sequence, or a FASTA file."""
    num_tokens: NonNegativeInt
    """Tokens to add to each prompt."""
    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int = 4
    """Choose among the k most likely tokens; 1 is greedy, 0 means all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability; 1 means all."""
    seed: int | None = None
    """With a seed, a prompt's continuation is always the same, whatever the other prompts."""
    allowed: str | None = "ACGT"
    """Letters that may be generated; null allows every token."""
    stop: Annotated[tuple[str | int, ...], BeforeValidator(listed)] = ()
    """Strings, or ids of tokens, that end a continuation."""
    prefill_chunk: PositiveInt = PREFILL_CHUNK
    """Nucleotides of a prompt that enter the model at once; smaller needs less memory."""
    output: Annotated[str, AfterValidator(_known_suffix)] | None = None
    """FASTA (prompt and continuation) or JSON (everything) file; a table on the terminal if not given."""


def run(config: GenerateConfig) -> list[Generation]:
    """Continue every prompt, write or show the result, and return it.

    Raises:
        CistronError: an input that cannot be used; no output is left behind.
    """
    prompts = _prompts(config.prompts)
    generations = generate(
        open_model(config),
        [prompt.sequence for prompt in prompts],
        num_tokens=config.num_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        allowed=config.allowed,
        stop=config.stop,
        prefill_chunk=config.prefill_chunk,
    )
    if config.output is None:
        Console().print(_table(prompts, generations))
    elif config.output.endswith(".json"):
        rows = [{"name": p.name, "prompt": p.sequence, **asdict(g)} for p, g in zip(prompts, generations, strict=True)]
        storage.write_text(config.output, json.dumps(rows, indent=2) + "\n")
    else:
        write_fasta(config.output, _completed(prompts, generations))
    return generations


def _prompts(prompts: str | Sequence[str]) -> list[FastaRecord]:
    """Return the prompts as records; a single string is a file if there is one, else a sequence."""
    if isinstance(prompts, str):
        if not prompts:
            raise InputError("prompts: the request is empty")
        if storage.exists(prompts):
            return list(read_fasta(prompts))
        try:
            prompts = [ByteTokenizer().validate(prompts, name="as a sequence")]
        except SequenceError as error:
            shown = prompts if len(prompts) <= _LETTERS_SHOWN else f"{prompts[:_LETTERS_SHOWN]}..."
            reason = "" if {".", "/"} & set(prompts) else f" ({error})"
            raise InputError(f"prompts: no such file, and not a DNA sequence: {shown}{reason}") from error
    return [FastaRecord(f"prompt_{index}", "", prompt) for index, prompt in enumerate(prompts)]


def _completed(prompts: Sequence[FastaRecord], generations: Sequence[Generation]) -> list[FastaRecord]:
    return [
        FastaRecord(p.name, f"prompt={len(p.sequence)} generated={len(g.token_ids)}", p.sequence + g.text)
        for p, g in zip(prompts, generations, strict=True)
    ]


def _table(prompts: Sequence[FastaRecord], generations: Sequence[Generation]) -> Table:
    table = Table("prompt", "continuation", "tokens", "mean log p", "ended by")
    table.columns[1].overflow = "fold"
    for prompt, generation in zip(prompts, generations, strict=True):
        count = len(generation.token_ids)
        mean = f"{sum(generation.logprobs) / count:.3f}" if count else "-"
        table.add_row(prompt.name, generation.text, str(count), mean, generation.finish_reason)
    return table
