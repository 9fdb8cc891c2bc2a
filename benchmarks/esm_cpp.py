"""esm-cpp as a peer: it runs in an environment of its own, asked over a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from cistron.models.esm2.model import Esm2

_THREADS: Final = "2"

_PROGRAM: Final = """
import json, sys
import numpy as np
import esm_cpp
folder = sys.argv[1]
model = esm_cpp.Model.load_from_safetensors(folder + "/model.safetensors")
model.quantize_weights()
print("ready", flush=True)
for line in sys.stdin:
    rows = [np.array(row, dtype=np.int32) for row in json.loads(line)]
    np.save(folder + "/logits.npy", np.concatenate([found.reshape(len(row), -1)
        for row, found in zip(rows, model.forward_batch(rows))]))
    print("done", flush=True)
"""


class EsmCpp:
    """A running esm-cpp with int8 weights."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder
        self._answer()

    @classmethod
    @contextmanager
    def started(cls, model: Esm2) -> Iterator[EsmCpp | None]:
        """Start it with the weights of a model, or give None where no environment for it is named."""
        python = os.environ.get("CISTRON_ESM_CPP_PYTHON")
        if python is None:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            _save(model, Path(folder))
            environment = {**os.environ, "OMP_NUM_THREADS": _THREADS}
            command = [python, "-c", _PROGRAM, folder]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with subprocess.Popen(command, env=environment, **pipes) as process:
                try:
                    yield cls(process, Path(folder))
                finally:
                    assert process.stdin is not None
                    process.stdin.close()  # ends it

    def logits(self, rows: Sequence[np.ndarray[Any, Any]]) -> dict[int, torch.Tensor]:
        """Return the logits of each row of ids; it packs them itself."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([row.tolist() for row in rows]) + "\n")
        self._process.stdin.flush()
        self._answer()
        found = torch.from_numpy(np.load(self._folder / "logits.npy")).split([len(row) for row in rows])
        return dict(enumerate(found))

    def _answer(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise AssertionError("esm-cpp ended early")


def _save(model: Esm2, folder: Path) -> None:
    """Write the tensor names of older Hugging Face files, which esm-cpp reads: frequencies in every layer."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    tensors["lm_head.decoder.weight"] = tensors["esm.embeddings.word_embeddings.weight"].clone()
    for i in range(model.config.num_layers):
        name = f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq"
        tensors[name] = tensors["esm.rotary_embeddings.inv_freq"].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_json()))
