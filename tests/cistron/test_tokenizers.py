from __future__ import annotations

import numpy as np

from cistron.tokenizers import ESM2_TOKENS, TOKENIZERS, ByteTokenizer, ProteinTokenizer


def test_bytes_are_their_own_ids():
    tokenizer = ByteTokenizer()
    text = "".join(chr(i) for i in range(256))
    assert tokenizer.encode(text).tolist() == list(range(256))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_padding_rows_of_the_embedding_decode_to_the_replacement_character():
    assert ByteTokenizer().decode([65, 256, 511]) == "A\ufffd\ufffd"


def test_protein_vocabulary_has_the_published_order():
    assert len(ESM2_TOKENS) == 33
    assert [ESM2_TOKENS.index(t) for t in ("<cls>", "<pad>", "<eos>", "<unk>", "L", "C", "X", "-", "<mask>")] == [
        *(0, 1, 2, 3, 4, 23, 24, 30, 32)
    ]


def test_protein_round_trip_with_masks_at_the_ends():
    tokenizer = ProteinTokenizer()
    text = "<mask>MK<mask><mask>A<mask>"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 32, 20, 15, 32, 32, 5, 32, 2]
    assert tokenizer.decode(ids) == text


def test_letters_are_nucleotides_or_residues():
    assert TOKENIZERS["esm2"].num_letters("<mask>MK-<mask>") == 5
    assert TOKENIZERS["evo2"].num_letters("ACGT@N") == 6
    assert {name: type(tokenizer) for name, tokenizer in TOKENIZERS.items()} == {
        "evo2": ByteTokenizer,
        "esm2": ProteinTokenizer,
    }


def test_letters_outside_the_vocabulary_become_unknown():
    assert ProteinTokenizer().encode("J")[1] == ProteinTokenizer.unk_id
