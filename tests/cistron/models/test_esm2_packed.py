"""The promise of packing, over many random batches: what shares a batch with a protein does not change its numbers."""

import torch
from tests.cistron.models.test_esm2 import MASK, packed, padded, proteins, random_model, tiny_config

BATCHES = 200
SHORT, LONG = 40, 160
LAYERS = ("embedding", "blocks.0", "final_norm")


def random_lengths(batch, generator):
    """Draw lengths in any order; some batches are sorted, or of one length, or hold one much longer protein."""
    lengths = torch.randint(1, SHORT + 1, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
    if batch % 8 in (0, 4):
        lengths, _ = lengths.sort(descending=True)
    if batch % 8 == 1:
        lengths[:] = lengths[0]
    if batch % 8 == 2:
        lengths[len(lengths) // 2] = LONG
    return lengths.tolist()


def found(output):
    return [output.logits, *output.hidden_states.values()]


@torch.inference_mode()
def test_packed_equals_padded_equals_single_over_random_batches():
    model = random_model(tiny_config(hidden_size=32, num_attention_heads=2), seed=1)
    generator = torch.Generator().manual_seed(2)
    worst, shares = 0.0, set()
    for batch in range(BATCHES):
        rows = proteins(random_lengths(batch, generator), seed=batch)
        ids, offsets = packed(rows)
        in_pack = found(model(ids, cu_seqlens=offsets, hidden_states=LAYERS))
        in_rows = found(model(padded(rows), hidden_states=LAYERS))
        shares |= {(row == MASK).float().mean().item() for row in rows}
        for i, (row, start, stop) in enumerate(zip(rows, offsets[:-1], offsets[1:], strict=True)):
            alone = found(model(row[None], hidden_states=LAYERS))
            for want, of_pack, of_rows in zip(alone, in_pack, in_rows, strict=True):
                worst = max(worst, (of_pack[start:stop] - want[0]).abs().max().item())
                worst = max(worst, (of_rows[i, : len(row)] - want[0]).abs().max().item())
    assert worst < 1e-5
    assert in_pack[0].std() > 0.1, "logits that are all alike prove nothing"
    assert len(shares) > 50, "token dropout must differ between the rows"
