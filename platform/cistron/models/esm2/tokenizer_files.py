"""The files beside an ESM-2's weights from which ``AutoTokenizer`` makes its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from cistron.tokenizers import ESM2_TOKENS

_SETTINGS: Final = {"model_max_length": 10**30, "tokenizer_class": "EsmTokenizer"}

TOKENIZER_FILES: Final[Mapping[str, str]] = {
    "vocab.txt": "\n".join(ESM2_TOKENS),
    "tokenizer_config.json": json.dumps(_SETTINGS, indent=2) + "\n",
}
"""Text by file name."""
