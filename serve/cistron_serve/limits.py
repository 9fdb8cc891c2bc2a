"""Most that one request may ask; ``GET /v1/models`` shows it and :mod:`cistron_serve.admission` enforces it."""

from __future__ import annotations

from pydantic import Field

from cistron.config import Config


class Limits(Config):
    """Most that one request may ask of a model."""

    max_sequences: int = Field(default=64, ge=1, le=1024)
    """Sequences of one score or embed request."""
    max_prompts: int = Field(default=16, ge=1, le=64)
    """Prompts of one generate request."""
    max_tokens: int = Field(default=131_072, ge=1, le=1 << 24)
    """Letters of one request, over all its sequences; generated ones count unless they are streamed."""
    max_forward_tokens: int = Field(default=4_194_304, ge=1, le=1 << 32)
    """Tokens that one score request runs through the model: a protein of L residues takes L passes of L tokens."""
    max_num_tokens: int = Field(default=8_192, ge=1, le=1 << 20)
    """Tokens generated for one prompt, answered at once."""
    max_num_tokens_stream: int = Field(default=131_072, ge=1, le=1 << 20)
    """Tokens generated for one prompt, streamed."""
    max_response_values: int = Field(default=4_194_304, ge=1, le=1 << 30)
    """Numbers in one answer to an embed request."""
