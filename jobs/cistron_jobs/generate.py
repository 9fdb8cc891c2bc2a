"""Continue DNA prompts, given as text or as a FASTA file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat, tee
from typing import Annotated, Any, Final, TypeAlias

import pyarrow as pa
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt

from cistron.config import listed
from cistron.errors import InputError, SequenceError
from cistron.inference.batching import checked_sequences, length_limit
from cistron.inference.generate import PREFILL_CHUNK, generate
from cistron.inference.generation_request import check_room, no_room
from cistron.inference.sampling import prompt_seeds
from cistron.io import storage
from cistron.io.fasta import FastaRecord
from cistron.models.base import SequenceModel
from cistron.tokenizers import ByteTokenizer
from cistron_jobs.bulk.config import BulkConfig
from cistron_jobs.bulk.cut import cut
from cistron_jobs.bulk.run import BulkJob, run_bulk
from cistron_jobs.generate_output import GENERATION_FIELDS, known_suffix, show, write
from cistron_jobs.inference_job import checked_records, records_table
from cistron_jobs.model_config import model_shell, open_model

_LETTERS_SHOWN: Final = 60
_SAMPLING: Final = ("temperature", "top_k", "top_p", "seed", "allowed", "stop", "prefill_chunk", "extend_context")
_Prompt: TypeAlias = tuple[FastaRecord, int | None]


class GenerateConfig(BulkConfig):
    """Settings of ``cistron generate``."""

    prompts: str | tuple[str, ...]
    """A list of sequences, one sequence, or a FASTA file. A file with an output runs in parts, resumable, on `actors`;
    anything else at once, in this process."""
    num_tokens: NonNegativeInt
    """Tokens to add to each prompt."""
    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int = 4
    """Choose among the k most likely tokens; 1 is greedy, 0 means all."""
    top_p: float = 1.0
    """Choose among the most likely tokens that together reach this probability; 1 means all."""
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    """With a seed, a prompt's continuation is always the same, whatever the other prompts."""
    allowed: str | None = "ACGT"
    """Letters that may be generated; null allows every token."""
    stop: Annotated[tuple[str | int, ...], BeforeValidator(listed)] = ()
    """Strings, or ids of tokens, that end a continuation."""
    prefill_chunk: PositiveInt = PREFILL_CHUNK
    """Nucleotides of a prompt that enter the model at once; smaller needs less memory."""
    extend_context: bool = False
    """Let a prompt and its continuation be longer than the model was trained for."""
    output: Annotated[str, AfterValidator(known_suffix)] | None = None
    """FASTA (prompt and continuation), JSON or Parquet (everything) file; a table on the terminal if not given."""


def run(config: GenerateConfig) -> str | None:
    """Continue every prompt; write the result and return its path, or show it.

    Raises:
        CistronError: an input that cannot be used; no output is left behind.
    """
    # The settings of a run without tokens are checked all the same, and a model without weights suffices for it.
    shell = model_shell(config)
    generate(shell, ["A"], num_tokens=0, **_sampling(config))
    from_file = isinstance(config.prompts, str) and bool(config.prompts) and storage.exists(config.prompts)
    if from_file and config.output is not None:
        parts, compute = partial(_parts, config), partial(_continued, config=config)
        run_bulk(config, BulkJob("generate", config.output, ("prompts",), parts, compute, write))
        return config.output
    records = list(_from_file(config)) if from_file else _from_text(config, shell)
    generations = _continued(open_model(config), _table(list(_seeded(records, config.seed))), config=config)
    if config.output is None:
        show(generations)
    else:
        write(config.output, [generations], {})
    return config.output


def _parts(config: GenerateConfig) -> Iterator[pa.Table]:
    """Yield the prompts of a file, one table per part."""
    for prompts in cut(
        _seeded(_from_file(config), config.seed),
        max_items=config.records_per_part,
        max_weight=config.letters_per_part,
        weight=lambda prompt: len(prompt[0].sequence) + config.num_tokens,
    ):
        yield _table(prompts)


def _from_file(config: GenerateConfig) -> Iterator[FastaRecord]:
    """Yield the records of the file of prompts, which all leave room for the new tokens."""
    limit = None if config.extend_context else length_limit(model_shell(config))

    def check(sequence: str, place: str) -> None:
        if limit is not None and (excess := no_room(len(sequence), config.num_tokens, limit)):
            raise SequenceError(f"{place}: {excess}; extend_context=true generates beyond it")

    return checked_records(config, str(config.prompts), check, limited=False)


def _from_text(config: GenerateConfig, shell: SequenceModel) -> list[FastaRecord]:
    """Return prompts that are not a file as records, which all can be continued."""
    prompts: str | Sequence[str] = config.prompts
    if isinstance(prompts, str):
        if not prompts:
            raise InputError("prompts: the request is empty")
        try:
            prompts = [ByteTokenizer().validate(prompts, name="as a sequence")]
        except SequenceError as error:
            shown = prompts if len(prompts) <= _LETTERS_SHOWN else f"{prompts[:_LETTERS_SHOWN]}..."
            reason = "" if {".", "/"} & set(prompts) else f" ({error})"
            raise InputError(f"prompts: no such file, and not a DNA sequence: {shown}{reason}") from error
    checked = checked_sequences(shell, prompts, what="prompt", limited=False)
    limit = length_limit(shell)
    if limit is not None and not config.extend_context:
        check_room(checked, config.num_tokens, limit, extend_context=False)
    return [FastaRecord(f"prompt_{index}", "", prompt) for index, prompt in enumerate(checked)]


def _seeded(records: Iterable[FastaRecord], seed: int | None) -> Iterator[_Prompt]:
    """Pair each record with its own seed, so that neither the parts nor the actors show in a continuation."""
    if seed is None:
        return zip(records, repeat(None))
    records, twins = tee(records)
    return zip(records, prompt_seeds((record.sequence for record in twins), seed), strict=True)


def _table(prompts: Sequence[_Prompt]) -> pa.Table:
    """Return columns name, sequence and seed."""
    seeds = pa.array([seed for _, seed in prompts], pa.uint64())
    return records_table([record for record, _ in prompts]).append_column("seed", seeds)


def _continued(model: SequenceModel, prompts: pa.Table, *, config: GenerateConfig) -> pa.Table:
    """Return columns name, prompt and the fields of a generation."""
    settings = _sampling(config)
    if config.seed is not None:
        settings["seed"] = prompts["seed"].to_pylist()
    sequences = prompts["sequence"]
    generations = generate(model, sequences.to_pylist(), num_tokens=config.num_tokens, **settings)
    columns = {"name": prompts["name"], "prompt": sequences}
    for field, kind in GENERATION_FIELDS.items():
        columns[field] = pa.array([getattr(generation, field) for generation in generations], kind)
    return pa.table(columns)


def _sampling(config: GenerateConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SAMPLING}
