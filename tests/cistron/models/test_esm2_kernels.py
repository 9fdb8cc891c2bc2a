"""ESM-2 with every op on its Triton kernels, in the interpreter, against the same model in PyTorch."""

from __future__ import annotations

import pytest
import torch
from tests.cistron.models.test_esm2 import packed, padded, proteins, random_model, tiny_config

from cistron_kernels.dispatch import Backend, override

pytest.importorskip("triton")

NAMES = ["blocks.0", "blocks.1.mixer", "blocks.1.mlp", "final_norm"]


def run(form: str, backend: Backend) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return logits and representations of the real tokens, and all gradients."""
    model = random_model(tiny_config(hidden_size=24, num_attention_heads=3))
    rows = proteins([5, 1, 9])
    with override(backend):
        if form == "packed":
            ids, offsets = packed(rows)
            output, real = model(ids, cu_seqlens=offsets, hidden_states=NAMES), torch.ones_like(ids, dtype=torch.bool)
        else:
            ids = padded(rows)
            output, real = model(ids, hidden_states=NAMES), ids != 1
        loss = torch.nn.functional.cross_entropy(output.logits[real], ids[real])
        loss.backward()
    found = {name: tensor[real].detach() for name, tensor in (output.hidden_states | {"logits": output.logits}).items()}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, grads


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_kernels_change_no_output_and_no_gradient(form: str):
    (want, want_grads), (got, got_grads) = run(form, "torch"), run(form, "triton")
    assert got_grads.keys() == want_grads.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    scale = torch.stack([grad.norm() for grad in want_grads.values()]).max()
    for name, grad in want_grads.items():
        assert (got_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name
    assert not all(torch.equal(got[name], tensor) for name, tensor in want.items())  # The kernels did run.
