"""The two forms of Evo 2's filters, and conversions that never hold more than a few tensors."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.cistron.models.evo2_formats import NATIVE, PROVIDER, SAVANNA, mbridge, random_layers, savanna, vortex
from tests.cistron.models.test_evo2_mbridge import save

from cistron.errors import CheckpointError, InputError, UnknownNameError
from cistron.models import dcp, sources
from cistron.models.checkpoint import iterate_checkpoint, load_checkpoint, read_config, save_checkpoint
from cistron.models.convert import convert_checkpoint
from cistron.models.evo2.config import Evo2Config
from cistron.models.evo2.forms import to_inference_form, to_training_form
from cistron.models.evo2.mbridge import mbridge_spelling
from cistron.models.evo2.model import Evo2
from cistron.models.evo2.savanna import savanna_spelling
from cistron.models.evo2.vortex import vortex_spelling
from cistron.models.registry import get_spec
from cistron.models.streaming import SafetensorsWriter

GOLDEN = Path(__file__).parents[2] / "golden"
TINY = GOLDEN / "evo2_tiny.vortex.safetensors"


def tokens(length):
    return torch.randint(60, 90, (2, length), generator=torch.Generator().manual_seed(length))


def logits(config, tensors, length=300):
    model = Evo2(config)
    model.load_state_dict(dict(tensors))
    with torch.inference_mode():
        return model(tokens(length)).logits


@pytest.mark.parametrize("source", ["evo2_tiny", "evo2_tiny_longrope"])
def test_the_inference_form_becomes_a_training_form_of_the_same_function(source, tmp_path):
    directory = convert_checkpoint(
        GOLDEN / f"{source}.vortex.safetensors", tmp_path / "model", source_format="vortex", parametrization="training"
    )
    plain = convert_checkpoint(GOLDEN / f"{source}.vortex.safetensors", tmp_path / "plain", source_format="vortex")
    model, reference = load_checkpoint(directory), load_checkpoint(plain)
    assert model.config.parametrization == "training"
    with torch.inference_mode():
        got, expected = model(tokens(300)).logits, reference(tokens(300)).logits
    # Rounding of gamma to fp32 moves a pole by a part in a million.
    assert 0 < (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_poles_agree_to_a_part_in_a_million_and_taps_exactly():
    config = Evo2Config(**NATIVE)
    state = Evo2(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith("log_poles"):  # From nearly constant to nearly instantaneous.
            tensor.copy_(-torch.exp(torch.empty(tensor.shape).uniform_(-18, 4, generator=generator)))
        elif name.endswith("filter.taps"):
            state[name] = tensor.bfloat16()
    trained, factors = to_training_form(config, state.items())
    factors = dict(factors)
    assert factors.keys() == Evo2(trained, device="meta").state_dict().keys()
    assert (factors["blocks.2.mixer.filter.p"] == -1).all()
    assert (factors["blocks.1.mixer.filter.decay"] == 1).all()
    assert factors["blocks.1.mixer.filter.taps"].dtype == torch.float32
    again, back = to_inference_form(trained, factors.items())
    assert again == config
    for name, tensor in back:
        if name.endswith("log_poles"):
            assert ((tensor - state[name]) / state[name]).abs().max() < 2e-6
        else:
            assert torch.equal(tensor.float(), state[name].float()), name


def test_a_training_form_stays_what_it_is():
    config = Evo2Config(**NATIVE, parametrization="training")
    state = Evo2(config).state_dict()
    same, tensors = to_training_form(config, state.items())
    assert same == config
    assert all(tensor is state[name] for name, tensor in tensors)


def test_a_fresh_embedding_may_be_wider_than_the_other_matrices():
    narrow, wide = (Evo2(Evo2Config(**NATIVE, embedding_init_std=std)) for std in (None, 1.0))
    assert wide.embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)
    assert narrow.embedding.weight.std().item() == pytest.approx((2 / (5 * 32)) ** 0.5, rel=0.05)
    assert torch.equal(narrow.state_dict()["blocks.0.mlp.gate.weight"], wide.state_dict()["blocks.0.mlp.gate.weight"])


@pytest.mark.parametrize("pole", [0.0, 0.1, float("nan")])
def test_a_filter_that_does_not_decay_has_no_training_form(pole):
    config = Evo2Config(**NATIVE)
    state = Evo2(config).state_dict()
    state["blocks.2.mixer.filter.log_poles"][3, 1] = pole
    with pytest.raises(CheckpointError, match=r"blocks\.2\.mixer\.filter\.log_poles: .*a log pole is not below 0"):
        dict(to_training_form(config, state.items())[1])


def test_the_form_of_the_target_is_the_sources_unless_asked(tmp_path):
    model = Evo2(Evo2Config(**NATIVE, parametrization="training"))
    source = save_checkpoint(model, tmp_path / "source")
    for asked, form in ((None, "training"), ("training", "training"), ("inference", "inference")):
        options = {"source_format": "cistron", "parametrization": asked}
        target = convert_checkpoint(source, tmp_path / f"{asked}", **options)
        assert read_config(target).parametrization == form
        assert torch.equal(load_checkpoint(target)(tokens(50)).logits, model(tokens(50)).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_format": "vortex", "parametrization": "training"}, InputError, "vortex holds the inference form"),
        ({"target_format": "savanna", "parametrization": "inference"}, InputError, "savanna holds the training form"),
        ({"target_format": "mbridge", "parametrization": "inference"}, InputError, "mbridge holds the training form"),
        ({"parametrization": "trained"}, UnknownNameError, "unknown form 'trained' .known: inference, training"),
        ({"source": GOLDEN / "esm2_tiny.fair_esm.safetensors", "parametrization": "training"}, InputError, "is esm"),
    ],
)
def test_a_form_that_the_target_does_not_know_is_refused(options, error, message, tmp_path):
    options = {"source": TINY, "source_format": "fair-esm" if "source" in options else "vortex", **options}
    with pytest.raises(error, match=message):
        convert_checkpoint(destination=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_writing_factors_that_are_not_known_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="cistron"):
        convert_checkpoint(TINY, tmp_path / "x.pt", source_format="vortex", target_format="savanna")
    assert "the factors of the filters are not known" in caplog.text


def source_of(source_format, folder):
    layers = random_layers()
    if source_format == "vortex":
        return TINY, None
    if source_format == "savanna":
        save_file(savanna(layers), folder / "x.safetensors", metadata={"config": json.dumps(SAVANNA)})
        return folder / "x.safetensors", None
    if source_format == "mbridge":
        return save(folder / "iter_0000001", mbridge(layers)), PROVIDER
    return save_checkpoint(Evo2(Evo2Config(**NATIVE)), folder / "native"), None


@pytest.mark.parametrize("target_format", ["cistron", "vortex", "savanna", "mbridge"])
@pytest.mark.parametrize("source_format", ["vortex", "savanna", "mbridge"])
def test_a_tensor_is_written_before_the_next_are_read(source_format, target_format, tmp_path, monkeypatch):
    source, config = source_of(source_format, tmp_path)
    waiting, most = 0, 0

    def counted(load):
        def wrapped(*arguments):
            nonlocal waiting, most
            waiting += 1
            most = max(most, waiting)
            return load(*arguments)

        return wrapped

    def added(self, name, tensor):
        nonlocal waiting
        waiting = 0
        return original(self, name, tensor)

    original = SafetensorsWriter.add
    monkeypatch.setattr(sources, "_load_safetensor", counted(sources._load_safetensor))
    monkeypatch.setattr(dcp, "_load_tensor", counted(dcp._load_tensor))
    monkeypatch.setattr(SafetensorsWriter, "add", added)
    convert_checkpoint(
        source, tmp_path / "out.pt", source_format=source_format, target_format=target_format, config=config
    )
    assert 1 <= most <= 3  # Two factors make one filter.


@pytest.mark.parametrize("name", ["evo2_1b_base", "evo2_20b", "evo2_40b"])
@pytest.mark.parametrize(
    ("spelling", "form"),
    [(vortex_spelling, "inference"), (savanna_spelling, "training"), (mbridge_spelling, "training")],
)
def test_released_models_have_a_name_for_every_tensor_and_lay_it_out_both_ways(name, spelling, form):
    config = get_spec(name).config.model_copy(update={"parametrization": form, "fp8_scales": True})
    spelled, shared = spelling(config), Counter()
    for native, tensor in Evo2(config, device="meta").state_dict().items():
        shared[spelled.name(native)] += 1
        if not native.endswith("_scale"):
            assert spelled.decode(native, spelled.encode(native, tensor)).shape == tensor.shape
    together = {foreign for foreign, count in shared.items() if count > 1 and foreign is not None}
    assert all(foreign.endswith(("linear_fc1.weight", "_extra_state")) for foreign in together)
    assert {shared[foreign] for foreign in together} == {2}


@pytest.mark.parametrize("first", ["vortex", "savanna", "mbridge"])
def test_a_tour_of_the_formats_comes_back_bit_equal(first, tmp_path):
    """Training forms go round unchanged; what vortex loses on the way is lost once."""
    source, config = source_of(first, tmp_path)
    start = convert_checkpoint(source, tmp_path / "start", source_format=first, config=config)
    place, place_format = start, "cistron"
    for number, target in enumerate(("savanna", "mbridge", "savanna", "cistron")):
        options = {"config": read_config(start).to_json()} if place_format != "cistron" else {}
        out = tmp_path / f"{number}.safetensors"
        place = convert_checkpoint(place, out, source_format=place_format, target_format=target, **options)
        place_format = target
    parametrization = read_config(start).parametrization
    back = convert_checkpoint(place, tmp_path / "back", source_format="cistron", parametrization=parametrization)
    before, after = dict(iterate_checkpoint(start)), dict(iterate_checkpoint(back))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("log_poles"):
            assert ((after[name] - tensor) / tensor).abs().max() < 2e-6
        else:
            assert torch.equal(after[name].float(), tensor.float()), name


def test_vortex_stays_bit_equal_when_it_is_written_twice(tmp_path):
    layers = random_layers()
    save_file(vortex(layers), tmp_path / "a.safetensors")
    again = convert_checkpoint(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        source_format="vortex",
        target_format="vortex",
        config=NATIVE,
    )
    written = dict(sources.from_safetensors([again]).shapes)
    assert written.keys() == vortex(layers).keys()
    loaded = sources.from_safetensors([again])
    for name, tensor in vortex(layers).items():
        assert torch.equal(loaded.load(name), tensor), name
        assert loaded.load(name).dtype == tensor.dtype, name
