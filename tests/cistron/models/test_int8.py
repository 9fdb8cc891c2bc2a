import copy
from dataclasses import fields

import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2
from torch import nn
from torch.nn import functional

from cistron.errors import CapabilityError, InputError
from cistron.inference.score import score_sequences
from cistron.models.layers import int8
from cistron.models.layers.int8 import Int8Linear, quantize_linears
from cistron.models.layers.linear import GeluLinear

PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "GSV", "MEEPQSDPSVEPPLSQETFSDLWK"]


def rounded(x):
    """One scale per row, in double precision: what is left of each number."""
    scale = x.double().abs().amax(1, keepdim=True) / 127
    return (x.double() / scale).round() * scale


@pytest.mark.parametrize("kind", [nn.Linear, GeluLinear])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_equals_its_definition(kind, bias):
    torch.manual_seed(0)
    layer = kind(48, 20, bias=bias or kind is GeluLinear)
    x = torch.randn(2, 7, 48) * torch.logspace(-3, 3, 7)[:, None]
    got = Int8Linear(layer)(x)
    want = rounded(x.flatten(0, 1)) @ rounded(layer.weight).T
    want = want if layer.bias is None else want + layer.bias.double()
    want = functional.gelu(want) if kind is GeluLinear else want
    torch.testing.assert_close(got, want.detach().float().view(2, 7, 20), atol=1e-5, rtol=1e-4)


def test_zeros_stay_finite():
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    got = Int8Linear(layer)(torch.zeros(2, 8))
    torch.testing.assert_close(got, layer.bias.detach().expand(2, 4))


@torch.inference_mode()
def test_a_token_does_not_depend_on_its_batch():
    model = tiny_esm2()
    quantize_linears(model)
    rows = [torch.from_numpy(model.tokenizer.encode(protein)) for protein in PROTEINS]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    together = model(torch.cat(rows), cu_seqlens=offsets).logits
    for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True):
        torch.testing.assert_close(together[start:stop], model(row[None]).logits[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_report_is_what_was_lost():
    exact = tiny_esm2(hidden_size=64)
    quantized = copy.deepcopy(exact)
    report = quantize_linears(quantized, sample=PROTEINS)
    assert report.num_layers == 3 * 6 + 1
    assert not [name for name, module in quantized.named_modules() if isinstance(module, nn.Linear)]
    rows = [exact.tokenizer.encode(protein) for protein in PROTEINS]
    found, losses = [], []
    for row in rows:
        ids = torch.from_numpy(row).clone()
        targets = ids[1:-1:7].clone()
        ids[1:-1:7] = exact.tokenizer.mask_id
        logits = torch.stack([model(ids[None]).logits[0, 1:-1] for model in (exact, quantized)])
        found.append(logits)
        losses.append(torch.stack([-half[::7].log_softmax(-1).gather(1, targets[:, None])[:, 0] for half in logits]))
    before, after = torch.cat(found, dim=1)
    perplexities = torch.cat(losses, dim=1).mean(dim=1).exp()
    want = [19, (after - before).norm() / (before - before.mean()).norm(), (after - before).abs().max(), *perplexities]
    for field, value in zip(fields(report), want, strict=True):
        assert getattr(report, field.name) == pytest.approx(float(value), rel=1e-4), field.name
    assert 1e-3 < report.relative_error < 0.1
    assert f"{report.relative_error:.1%}" in str(report)


def test_scores_stay_near_and_contacts_stay_exact_at_the_head():
    exact = tiny_esm2(hidden_size=64)
    quantized = copy.deepcopy(exact)
    quantize_linears(quantized)
    for mine, theirs in zip(score_sequences(quantized, PROTEINS), score_sequences(exact, PROTEINS), strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=0.1)
        assert mine.score != theirs.score
    kept = {
        name: tensor for name, tensor in exact.state_dict().items() if "contact_head" in name or "embeddings" in name
    }
    for name, tensor in kept.items():
        assert torch.equal(quantized.get_parameter(name) if "word" in name else quantized.get_buffer(name), tensor)


def test_an_int8_model_is_not_saved_and_not_trained():
    model = tiny_esm2()
    quantize_linears(model)
    with pytest.raises(
        CapabilityError, match=r"layer\.0\.attention\.self\.query is in int8 and has no weights to save"
    ):
        model.state_dict()
    assert not model(torch.tensor([[0, 5, 2]])).logits.requires_grad


def test_refusals(monkeypatch):
    with pytest.raises(CapabilityError, match="int8 is for ESM-2, and this is evo2"):
        quantize_linears(tiny_evo2())
    with pytest.raises(CapabilityError, match="these are bfloat16 on cpu"):
        quantize_linears(tiny_esm2().bfloat16())
    with pytest.raises(InputError, match="at least one protein"):
        quantize_linears(tiny_esm2(), sample=[])
    model = tiny_esm2()
    quantize_linears(model)
    with pytest.raises(InputError, match="in int8 already"):
        quantize_linears(model)
    monkeypatch.setattr(int8, "_products_are_exact", lambda: False)
    with pytest.raises(CapabilityError, match="not exact on this processor"):
        quantize_linears(tiny_esm2())
