from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import CheckpointError, CheckpointNotFoundError
from cistron.models.checkpoint import save_checkpoint
from cistron.models.convert import convert_checkpoint
from cistron.models.detect import detect_format

ESM2 = {"hf": "hf", "bionemo-te": "te", "fair-esm": "esm2.pt"}
EVO2 = {"vortex": "vortex.pt", "savanna": "savanna.pt", "mbridge": "mbridge"}


@pytest.mark.parametrize(("family", "formats"), [(tiny_esm2, ESM2), (tiny_evo2, EVO2)])
def test_every_format_is_told(family: Any, formats: dict[str, str], tmp_path: Path):
    native = save_checkpoint(family(), tmp_path / "native")
    assert detect_format(native) == "cistron"
    for name, file in formats.items():
        out = convert_checkpoint(native, tmp_path / name / file, source_format="auto", target_format=name)
        assert detect_format(out) == name
        if out.suffix == ".pt":
            out.rename(out.with_name("without_suffix"))
            assert detect_format(out.with_name("without_suffix")) == name
            bare = convert_checkpoint(
                native, tmp_path / name / "x" / "x.safetensors", source_format="cistron", target_format=name
            )
            assert detect_format(bare) == detect_format(bare.parent) == name


def test_a_file_in_parts_is_told(tmp_path: Path):
    native = save_checkpoint(tiny_evo2(), tmp_path / "native")
    whole = convert_checkpoint(native, tmp_path / "whole.pt", source_format="cistron", target_format="vortex")
    content = whole.read_bytes()
    (tmp_path / "cut").mkdir()
    for number, start in enumerate((0, len(content) // 2)):
        (tmp_path / "cut" / f"m.pt.part{number}").write_bytes(content[start : start + len(content) // 2 + 1])
    parts = [tmp_path / "cut" / name for name in ("m.pt", "m.pt.part0", "m.pt.part1")]
    for source in (tmp_path / "cut", *parts):
        assert detect_format(source) == "vortex"
    (tmp_path / "cut" / "config.json").write_text('{"architectures": ["Evo2"]}')
    assert detect_format(tmp_path / "cut") == "vortex"


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_is_unpickled(archive: bool, tmp_path: Path):
    source = Path(__file__).parents[2] / "golden" / "esm2_tiny.fair_esm.safetensors"
    content = {"bomb": Bomb(tmp_path / "boom"), "model": load_file(source)}
    torch.save(content, tmp_path / "m.pt", pickle_module=pickle, _use_new_zipfile_serialization=archive)
    assert detect_format(tmp_path / "m.pt") == "fair-esm"
    assert not (tmp_path / "boom").exists()


def test_what_is_like_nothing_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError, match="nowhere does not exist"):
        detect_format(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    for source in (tmp_path, tmp_path / "x.pt"):
        with pytest.raises(CheckpointError, match=r"cannot tell the format.*source_format"):
            convert_checkpoint(source, tmp_path / "out", source_format="auto")
    assert not (tmp_path / "out").exists()
