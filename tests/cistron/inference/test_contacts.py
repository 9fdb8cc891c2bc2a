from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import InputError, SequenceError
from cistron.inference.contacts import predict_contacts

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
