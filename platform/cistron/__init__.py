"""Train, fine-tune and serve Evo 2 (DNA) and ESM-2 (protein).

Everything in ``__all__`` is kept stable; everything else may move.
"""

from importlib.metadata import version as _version

from cistron.errors import (
    CapabilityError,
    CheckpointError,
    CheckpointNotFoundError,
    CistronError,
    ConfigError,
    InputError,
    SequenceError,
    UnknownNameError,
)
from cistron.inference.contacts import predict_contacts
from cistron.inference.embed import Embedding, embed_sequences
from cistron.inference.generate import Generation, generate
from cistron.inference.masked import pseudo_perplexity
from cistron.inference.score import SequenceScore, score_sequences
from cistron.inference.substitutions import RESIDUE_ORDER, substitution_matrix
from cistron.inference.variants import score_variants
from cistron.models.convert import convert_checkpoint
from cistron.models.outputs import ModelOutput
from cistron.models.registry import list_models, load_model

__version__ = _version("cistron")

__all__ = [
    "RESIDUE_ORDER",
    "CapabilityError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CistronError",
    "ConfigError",
    "Embedding",
    "Generation",
    "InputError",
    "ModelOutput",
    "SequenceError",
    "SequenceScore",
    "UnknownNameError",
    "__version__",
    "convert_checkpoint",
    "embed_sequences",
    "generate",
    "list_models",
    "load_model",
    "predict_contacts",
    "pseudo_perplexity",
    "score_sequences",
    "score_variants",
    "substitution_matrix",
]
