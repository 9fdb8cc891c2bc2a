from __future__ import annotations

import inspect

import pytest

import cistron

SURFACE = {
    "load_model": "source, *, device=None, dtype=None, trust_pickle=False, precision='auto'",
    "convert_checkpoint": (
        "source, destination, *, source_format, target_format='cistron', config=None, trust_pickle=False, "
        "parametrization=None"
    ),
    "score_sequences": (
        "model, sequences, *, reduction='mean', reverse_complement=False, prepend_bos=False, vortex_compat=False, "
        "window=None, token_budget=16384"
    ),
    "embed_sequences": "model, sequences, *, layers=(-1,), pooling='mean', window=None, token_budget=16384",
    "generate": (
        "model, prompts, *, num_tokens, temperature=1.0, top_k=4, top_p=1.0, seed=None, allowed='ACGT', stop=(), "
        "on_token=None, prefill_chunk=8192, extend_context=False"
    ),
    "score_variants": (
        "model, variants, reference, *, window=None, strategy=None, reverse_complement=False, token_budget=16384"
    ),
    "predict_contacts": "model, sequences",
    "pseudo_perplexity": "model, sequences, *, window=None, token_budget=16384",
    "substitution_matrix": (
        "model, sequence, *, strategy='masked-marginal', positions=None, window=None, token_budget=16384"
    ),
    "list_models": "",
    "SequenceScore": "score, num_tokens, per_token=None",
    "Generation": "text, token_ids, logprobs, finish_reason",
    "Embedding": "vectors, num_tokens",
}


def test_the_surface_is_exactly_all():
    public = {
        name
        for name, value in vars(cistron).items()
        if not inspect.ismodule(value) and (not name.startswith("_") or name == "__version__")
    }
    assert public == set(cistron.__all__)
    errors = {name for name in public if name.endswith("Error")}
    assert public - errors == {*SURFACE, "ModelOutput", "RESIDUE_ORDER", "__version__"}


@pytest.mark.parametrize("name", SURFACE)
def test_signatures_are_stable(name: str):
    signature = inspect.signature(getattr(cistron, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    got = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert got == f"({SURFACE[name]})"


def test_every_error_is_a_cistron_error():
    errors = [getattr(cistron, name) for name in cistron.__all__ if name.endswith("Error")]
    assert len(errors) == 8
    assert all(issubclass(error, cistron.CistronError) for error in errors)


def test_everything_is_explained():
    for name in cistron.__all__:
        if name != "__version__":
            assert inspect.getdoc(getattr(cistron, name)), name
