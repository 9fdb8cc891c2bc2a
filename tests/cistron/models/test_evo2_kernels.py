"""Evo 2 with the Triton kernels computes what it computes without them."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.harness import assert_close

from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.model import Evo2
from cistron_kernels.dispatch import override

pytest.importorskip("triton", reason="needs triton's interpreter")


def test_logits_and_gradients_equal_those_of_pytorch():
    torch.manual_seed(0)
    config = Evo2Config(
        hidden_size=16,
        layer_pattern="SDH*",
        num_attention_heads=2,
        mlp_size=32,
        num_filter_groups=1,
        hcm_filter_length=16,
        vocab_size=32,
        max_length=64,
    )
    model = Evo2(config)
    input_ids = torch.randint(32, (1, 32))
    want, want_grads = logits_and_gradients(model, input_ids, "torch")
    got, got_grads = logits_and_gradients(model, input_ids, "triton")
    assert_close(got, want, 1e-4, "logits")
    for name, grad in want_grads.items():
        assert_close(got_grads[name], grad, 1e-3, name)


def logits_and_gradients(model, input_ids, backend):
    model.zero_grad()
    with override(backend):
        logits = model(input_ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
