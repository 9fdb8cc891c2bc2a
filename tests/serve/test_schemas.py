from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from cistron.config import resolve
from cistron.errors import ConfigError
from cistron_serve.admission import check_embed, check_generate, check_score
from cistron_serve.app import ServeConfig
from cistron_serve.deployments import ModelSettings, weights_sha256
from cistron_serve.errors import ApiError, from_validation
from cistron_serve.limits import Limits
from cistron_serve.schemas import native


def card(family: str = "evo2", *, max_length: int = 100, **limits: int) -> native.ModelCard:
    return native.ModelCard(
        id="m",
        family=family,
        sha256="0" * 64,
        dtype="float32",
        device="cpu",
        num_parameters=1,
        num_layers=4,
        hidden_size=8,
        max_length=max_length,
        trained_length=8,
        operations=["generate", "score", "embed"] if family == "evo2" else ["score", "embed"],
        limits=Limits(**limits),
    )


def score_request(*sequences: str, **fields: Any) -> native.ScoreRequest:
    return native.ScoreRequest(model="m", sequences=list(sequences), **fields)


def embed_request(*sequences: str, **fields: Any) -> native.EmbedRequest:
    return native.EmbedRequest(model="m", sequences=list(sequences), **fields)


def generate_request(*prompts: str, num_tokens: int = 5, **fields: Any) -> native.GenerateRequest:
    return native.GenerateRequest(model="m", prompts=list(prompts), num_tokens=num_tokens, **fields)


REQUESTS: list[type[BaseModel]] = [native.ScoreRequest, native.EmbedRequest, native.GenerateRequest]
VALID: dict[type[BaseModel], dict[str, Any]] = {
    native.ScoreRequest: {"model": "m", "sequences": ["ACGT"]},
    native.EmbedRequest: {"model": "m", "sequences": ["ACGT"]},
    native.GenerateRequest: {"model": "m", "prompts": ["ACGT"], "num_tokens": 4},
}


def unbounded(schema: dict[str, Any], path: str = "") -> list[str]:
    """Paths of integers, numbers, arrays and strings without an upper bound."""
    bounds = {"integer": "maximum", "number": "maximum", "array": "maxItems", "string": "maxLength"}
    kind = schema.get("type")
    found = []
    if kind in bounds and bounds[kind] not in schema and "enum" not in schema and "const" not in schema:
        found.append(path)
    for key in ("properties", "$defs"):
        for name, inner in schema.get(key, {}).items():
            found += unbounded(inner, f"{path}.{name}")
    for key in ("anyOf", "oneOf"):
        for inner in schema.get(key, []):
            found += unbounded(inner, path)
    return found + (unbounded(schema["items"], f"{path}[]") if "items" in schema else [])


@pytest.mark.parametrize("request_type", REQUESTS)
def test_every_number_list_and_string_of_a_request_has_an_upper_bound(request_type: type[BaseModel]) -> None:
    assert unbounded(request_type.model_json_schema()) == []


def test_the_bound_walk_sees_an_unbounded_field() -> None:
    assert unbounded({"type": "object", "properties": {"a": {"anyOf": [{"type": "integer"}]}}}) == [".a"]


@pytest.mark.parametrize("request_type", REQUESTS)
def test_unknown_fields_and_numbers_in_strings_are_refused(request_type: type[BaseModel]) -> None:
    valid = VALID[request_type]
    request_type.model_validate(valid)
    with pytest.raises(ValidationError, match="extra_forbidden"):
        request_type.model_validate(valid | {"sequnces": ["A"]})
    for name, value in {"num_tokens": "4", "seed": True, "stream": 1, "reduction": 0, "layers": ["", 1.5]}.items():
        if name in request_type.model_fields:
            with pytest.raises(ValidationError):
                request_type.model_validate(valid | {name: value})


def test_options_are_the_keyword_arguments_of_the_library() -> None:
    import inspect

    from cistron.inference.embed import embed_sequences
    from cistron.inference.generate import generate
    from cistron.inference.score import score_sequences

    for request_type, function in zip(REQUESTS, [score_sequences, embed_sequences, generate], strict=True):
        request: Any = request_type.model_validate(VALID[request_type])
        parameters = inspect.signature(function).parameters
        for name, value in request.options().items():
            default = parameters[name].default
            assert name == "num_tokens" or value == default or list(value) == list(default), name


@pytest.mark.parametrize(
    ("check", "got", "status", "code", "param"),
    [
        (check_score, score_request("ACGT", "ACGJ"), 422, "sequence.invalid", "sequences[1]"),
        (check_score, score_request("A" * 101), 422, "sequence.too_long", "sequences[0]"),
        (check_score, score_request("AC", "|tag|AC", reverse_complement=True), 422, "sequence.invalid", "sequences[1]"),
        (
            check_score,
            score_request("AC", reverse_complement=True, reduction="none"),
            422,
            "request.invalid",
            "reverse_complement",
        ),
        (check_score, score_request("A", "C", "G", "T"), 422, "request.limit_exceeded", "sequences"),
        (check_score, score_request("A" * 60, "C" * 60, "G"), 413, "request.too_large", None),
        (check_score, score_request("A" * 90, reverse_complement=True), 413, "request.too_large", None),
        (check_generate, generate_request("ACGT", num_tokens=60), 422, "request.limit_exceeded", "num_tokens"),
        (check_generate, generate_request("A" * 90, num_tokens=11), 422, "request.limit_exceeded", "num_tokens"),
        (
            check_generate,
            generate_request("A", num_tokens=71, stream=True),
            422,
            "request.limit_exceeded",
            "num_tokens",
        ),
        (check_generate, generate_request("A" * 30, "A" * 31, num_tokens=40), 413, "request.too_large", None),
        (check_generate, generate_request("A", allowed="AĀ"), 422, "request.invalid", "allowed"),
        (check_generate, generate_request("MKL"), 422, "sequence.invalid", "prompts[0]"),
        (check_embed, embed_request("A", layers=[0, 4]), 422, "layer.not_found", "layers[1]"),
        (check_embed, embed_request("A", pooling="cls"), 422, "model.wrong_family", "pooling"),
        (check_embed, embed_request("A", window=4), 422, "model.wrong_family", "window"),
        (check_score, score_request("A", window=4), 422, "model.wrong_family", "window"),
        (check_embed, embed_request("A" * 30, pooling="none"), 413, "request.too_large", None),
    ],
)
def test_the_door_names_what_is_wrong(check: Any, got: Any, status: int, code: str, param: str | None) -> None:
    limits = {"max_sequences": 3, "max_tokens": 120, "max_forward_tokens": 170}
    limits |= {"max_num_tokens": 50, "max_num_tokens_stream": 70, "max_response_values": 200}
    with pytest.raises(ApiError) as refusal:
        check(card(**limits), got)
    assert (refusal.value.status, refusal.value.code, refusal.value.param) == (status, code, param)
    assert "AAAA" not in refusal.value.detail


def test_too_much_for_the_model_says_what_makes_it_less() -> None:
    dna, protein = card(max_forward_tokens=100), card("esm2", max_forward_tokens=100)
    for model, check, request, remedy in (
        (dna, check_score, score_request("A" * 60, reverse_complement=True), "ask for one strand"),
        (dna, check_score, score_request("A" * 60, "C" * 60), "split it into several requests"),
        (protein, check_score, score_request("M" * 30), "ask for a smaller window"),
        (protein, check_embed, embed_request("M" * 36, window=1), "ask for a larger window"),
        (protein, check_embed, embed_request("M" * 40, "M" * 40), "split it into several requests"),
    ):
        with pytest.raises(ApiError, match=f"tokens through the model are more than .* = 100; {remedy}"):
            check(model, request)
    check_score(protein, score_request("M" * 30, window=1))
    check_embed(protein, embed_request("M" * 36, window=8))


def test_the_door_opens_at_the_limits_and_counts_passes() -> None:
    assert check_score(card(max_sequences=2, max_tokens=200), score_request("A" * 100, "C" * 100)) == 200
    assert check_score(card(), score_request("A" * 10, reverse_complement=True)) == 20
    assert check_score(card("esm2"), score_request("MKAV")) == 4 * 6
    assert check_score(card("esm2"), score_request("MKAVA" * 2)) == 10 * (8 + 2)
    assert check_score(card("esm2"), score_request("MKAVA" * 2, window=4)) == 10 * (4 + 2)
    assert check_embed(card("esm2", max_length=4), embed_request("MK<mask>V")) == 4 + 2
    assert check_embed(card("esm2"), embed_request("MKAVAMKAVAM")) == 2 * (8 + 2)
    assert check_embed(card("esm2"), embed_request("MKAVAMKAVAM", window=4)) == 5 * (4 + 2)
    assert check_generate(card(max_num_tokens=60), generate_request("A" * 40, num_tokens=60)) == 40


@pytest.mark.parametrize(("check", "request_"), [(check_score, score_request), (check_embed, embed_request)])
def test_a_window_is_at_most_what_was_seen_in_training(check: Any, request_: Any) -> None:
    with pytest.raises(ApiError, match="window: 9 is more than the 8 residues that m was trained on") as refusal:
        check(card("esm2"), request_("MKAVAMKAVAM", window=9))
    assert (refusal.value.code, refusal.value.param) == ("request.limit_exceeded", "window")


def test_a_mask_cannot_be_scored() -> None:
    with pytest.raises(ApiError, match=r"sequences\[1\]: <mask> at position 2") as refusal:
        check_score(card("esm2"), score_request("MK", "M<mask>"))
    assert refusal.value.param == "sequences[1]"


@pytest.mark.parametrize("option", ["reverse_complement", "prepend_bos"])
def test_dna_options_are_refused_for_proteins(option: str) -> None:
    with pytest.raises(ApiError, match="DNA models") as refusal:
        check_score(card("esm2"), score_request("MKV", **{option: True}))
    assert (refusal.value.code, refusal.value.param) == ("model.wrong_family", option)


def test_validation_errors_never_repeat_the_request() -> None:
    secret = "GATTACA" * 3
    with pytest.raises(ValidationError) as faults:
        native.ScoreRequest.model_validate({"model": secret + "!", "sequences": [secret, 3], "reduction": secret})
    error = from_validation(faults.value.errors())
    assert (error.status, error.param) == (422, "model")
    assert "sequences[1]" in error.detail
    assert "GATTACA" not in error.detail


def test_the_configuration_takes_short_and_long_models_and_refuses_misspelt_keys() -> None:
    config = resolve(ServeConfig, {"models": {"a": "some/dir", "b": {"source": "x", "num_replicas": 2}}})
    assert config.models["a"] == ModelSettings(source="some/dir")
    assert config.models["b"].num_replicas == 2
    with pytest.raises(ConfigError, match=r"models\.b\.num_replica: no such setting; did you mean 'num_replicas'"):
        resolve(ServeConfig, {"models": {"b": {"source": "x", "num_replica": 2}}})
    with pytest.raises(ConfigError, match="models"):
        resolve(ServeConfig, {"models": {"bad name": "x"}})
    with pytest.raises(ConfigError, match="models"):
        resolve(ServeConfig, {"models": {}})


@pytest.mark.parametrize("name", ["one-model.yaml", "dna-and-protein.yaml"])
def test_the_serve_files_are_valid(name: str, pytestconfig: pytest.Config) -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (pytestconfig.rootpath / "serve" / "configs" / name).read_text()
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    for application in schema.applications:
        assert application.import_path == "cistron_serve.app:build"
        resolve(ServeConfig, application.args)


def test_the_hash_of_sharded_weights_covers_every_shard(tmp_path: Any) -> None:
    from cistron.models.manifest import write_manifest

    def digest(second: bytes) -> str | None:
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"one")
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(second)
        write_manifest(tmp_path, {})
        return weights_sha256(str(tmp_path))

    assert digest(b"two") == digest(b"two") != digest(b"six")
    assert weights_sha256(str(tmp_path / "nothing")) is None
