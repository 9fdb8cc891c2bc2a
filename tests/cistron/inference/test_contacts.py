from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError, SequenceError
from cistron.inference.contacts import predict_contacts
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
