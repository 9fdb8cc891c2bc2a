"""The promise of packing, over many random batches: what shares a pack with a protein does not change its numbers."""

import torch
from tests.cistron.models.test_esm2 import packed, proteins, random_model, tiny_config

BATCHES = 200
LONGEST = 40


@torch.inference_mode()
def test_packed_equals_single_over_random_batches():
    config = tiny_config(hidden_size=32, num_attention_heads=2)
    model = random_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for batch in range(BATCHES):
        size = int(torch.randint(1, 9, (), generator=generator))
        lengths = torch.randint(1, LONGEST + 1, (size,), generator=generator)
        if batch % 4 == 0:
            lengths, _ = lengths.sort(descending=True)
        if batch % 8 == 1:
            lengths[:] = lengths[0]
        rows = proteins(lengths.tolist(), seed=batch)
        ids, offsets = packed(rows)
        together = model(ids, cu_seqlens=offsets, hidden_states=["blocks.0", "final_norm"])
        for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True):
            alone = model(row[None], hidden_states=["blocks.0", "final_norm"])
            found = [together.logits, *together.hidden_states.values()]
            want = [alone.logits, *alone.hidden_states.values()]
            worst = max(worst, *((f[start:stop] - w[0]).abs().max().item() for f, w in zip(found, want, strict=True)))
    assert worst < 1e-5
    assert together.logits.std() > 0.1
