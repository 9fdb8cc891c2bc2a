from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import CapabilityError, InputError, SequenceError
from cistron.inference import contacts as contacts_module
from cistron.inference.contacts import predict_contacts
from cistron.inference.memory import available_bytes
from cistron.models.checkpoint import write_checkpoint
from cistron.models.convert import convert_checkpoint
from cistron.models.registry import load_model

GOLDEN = Path(__file__).parents[2] / "golden"
PROTEINS = ["MKTAYIAKQR", "GSV", "MEEPQ<mask>DPSVEP"]


def test_contacts_come_in_order_without_padding():
    model = tiny_esm2()
    together = predict_contacts(model, PROTEINS)
    assert [contacts.shape for contacts in together] == [(10, 10), (3, 3), (12, 12)]
    for sequence, contacts in zip(PROTEINS, together, strict=True):
        alone = model.predict_contacts(torch.from_numpy(model.tokenizer.encode(sequence))[None])[0].numpy()
        np.testing.assert_allclose(contacts, alone, atol=1e-5)
        np.testing.assert_allclose(contacts, contacts.T, atol=1e-6)
        assert np.ptp(contacts) > 1e-3


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [([], InputError, "the request is empty"), (["MK*"], SequenceError, r"sequence 0: letter '\*' at position 3")],
)
def test_bad_requests(sequences: list[str], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        predict_contacts(tiny_esm2(), sequences)


def test_a_dna_model_has_no_contacts():
    with pytest.raises(InputError, match="contacts need an ESM-2 model, and this is evo2"):
        predict_contacts(tiny_evo2(), ["ACGT"])


def test_contacts_are_those_of_the_reference(tmp_path: Path):
    source = GOLDEN / "esm2_tiny.fair_esm.safetensors"
    model = load_model(convert_checkpoint(source, tmp_path / "model", source_format="fair-esm"))
    golden = load_file(GOLDEN / "esm2_tiny.golden.safetensors")
    proteins = [model.tokenizer.decode(row.numpy()) for row in golden["input_ids"]]
    assert proteins[-1] == "GXBUZO<mask>.-A"
    for contacts, expected in zip(predict_contacts(model, proteins), golden["contacts"].numpy(), strict=True):
        length = len(contacts)
        np.testing.assert_allclose(contacts, expected[:length, :length], atol=1e-4)


def test_a_protein_whose_maps_do_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = tiny_esm2()
    monkeypatch.setattr(contacts_module, "available_bytes", lambda device: 20 << 30)
    monkeypatch.setattr(type(model), "predict_contacts", lambda *args, **kwargs: pytest.fail("nothing may be computed"))
    message = (
        r"sequence 1: contacts of 35,000 residues need about 24,502,800,080 bytes \(22\.8 GiB\), and cpu has 20\.0 GiB"
    )
    with pytest.raises(CapabilityError, match=message):
        predict_contacts(model, ["MKT", "MKTAYIAKQR" * 3500, "MKTAY"])


@pytest.mark.parametrize("left", [5 * 12**2 * 4, None])
def test_a_protein_whose_maps_fit_is_read(monkeypatch: pytest.MonkeyPatch, left: int | None):
    monkeypatch.setattr(contacts_module, "available_bytes", lambda device: left)
    assert predict_contacts(tiny_esm2(), ["MKTAYIAKQR"])[0].shape == (10, 10)


def test_what_is_left_of_the_host_is_known_and_of_other_devices_not():
    left = available_bytes(torch.device("cpu"))
    assert left is None or 0 < left < 1 << 50
    assert available_bytes(torch.device("meta")) is None


def test_what_is_left_in_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("cistron.inference.memory._CGROUP", tmp_path)
    monkeypatch.setattr("cistron.inference.memory._MEMINFO", tmp_path / "meminfo")
    assert available_bytes(torch.device("cpu")) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   4 kB\nHugePages_Total: 0\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(torch.device("cpu")) == 4096
    for name, text in (("max", "9000\n"), ("current", "7000\n"), ("stat", "anon 10\ninactive_file 1000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_bytes(torch.device("cpu")) == 3000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_head_stored_in_few_bits_is_applied_in_fp32(tmp_path: Path, dtype: torch.dtype):
    model = tiny_esm2()
    stored = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    loaded = load_model(write_checkpoint(model.config, stored.items(), tmp_path / "model"))
    found = predict_contacts(loaded, PROTEINS)
    assert {contacts.dtype for contacts in found} == {np.dtype("float32")}
    for contacts, expected in zip(found, predict_contacts(model, PROTEINS), strict=True):
        np.testing.assert_allclose(contacts, expected, atol=0.2 if dtype == torch.bfloat16 else 0.03)
