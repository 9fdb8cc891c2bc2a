from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny_models import tiny_esm2, tiny_evo2

from cistron.errors import CapabilityError, InputError, SequenceError
from cistron.inference.generate import Generation, generate

PROMPTS = ["ACGTACGTTGCA", "G", "TTACGNacgtRYACGATCGATCGGATCGATTAGCA", "CA", "|d__Bacteria|ACG"]


def next_log_probs(text: str) -> torch.Tensor:
    """Log-probabilities after `text` from the parallel form, without a cache."""
    with torch.no_grad():
        return tiny_evo2()(torch.tensor([list(text.encode("latin-1"))])).logits[0, -1].log_softmax(-1)


def assert_same(a: Generation, b: Generation):
    assert (a.text, a.token_ids, a.finish_reason) == (b.text, b.token_ids, b.finish_reason)
    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_greedy_takes_the_most_likely_allowed_letter_at_each_step():
    for prompt, generation in zip(PROMPTS, generate(tiny_evo2(), PROMPTS, num_tokens=12, top_k=1), strict=True):
        text = prompt
        for logprob in generation.logprobs:
            log_probs = next_log_probs(text)
            letter = max("ACGT", key=lambda letter, lp=log_probs: lp[ord(letter)].item())
            assert logprob == pytest.approx(log_probs[ord(letter)].item(), abs=1e-4)
            text += letter
        assert prompt + generation.text == text
        assert generation.token_ids == list(generation.text.encode())
        assert generation.finish_reason == "length"


@pytest.mark.parametrize("prefill_chunk", [1, 5, 8192])
def test_mixed_lengths_and_chunks_change_nothing(prefill_chunk: int):
    model = tiny_evo2()
    together = generate(model, PROMPTS, num_tokens=8, seed=3, top_k=0, prefill_chunk=prefill_chunk)
    for prompt, generation in zip(PROMPTS, together, strict=True):
        assert_same(generation, generate(model, [prompt], num_tokens=8, seed=3, top_k=0)[0])


def test_log_probabilities_are_of_the_unmodified_distribution():
    options: dict[str, Any] = {"temperature": 0.5, "top_k": 2, "top_p": 0.9, "seed": 1}
    generation = generate(tiny_evo2(), ["ACGT"], num_tokens=5, **options)[0]
    expected = [next_log_probs("ACGT" + generation.text[:i])[ord(c)].item() for i, c in enumerate(generation.text)]
    assert generation.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_seed_repeats_and_other_seeds_differ():
    model = tiny_evo2()
    first, second, other = (generate(model, ["ACGT"], num_tokens=30, seed=seed, top_k=0)[0].text for seed in (5, 5, 6))
    assert first == second
    assert first != other
    a, b = generate(model, ["ACGT", "ACGT"], num_tokens=30, seed=5, top_k=0)
    assert a.text == first
    assert b.text != first, "a repeated prompt asks for another sample"
    c, d = generate(model, ["ACGT", "ACGT"], num_tokens=30, seed=[6, 5], top_k=0)
    assert (c.text, d.text) == (other, first)


def test_more_prompts_than_one_batch_holds(monkeypatch: pytest.MonkeyPatch):
    whole = generate(tiny_evo2(), PROMPTS, num_tokens=6, seed=2, top_k=0)
    monkeypatch.setattr("cistron.inference.generate._MAX_ROWS", 2)
    for a, b in zip(generate(tiny_evo2(), PROMPTS, num_tokens=6, seed=2, top_k=0), whole, strict=True):
        assert_same(a, b)


def test_only_allowed_letters_appear():
    text = "".join(g.text for g in generate(tiny_evo2(), PROMPTS, num_tokens=20, allowed="AN", top_k=0, seed=0))
    assert set(text) == {"A", "N"}


def test_without_an_alphabet_any_token_can_appear():
    generation = generate(tiny_evo2(), ["ACGT"], num_tokens=60, allowed=None, top_k=0, temperature=5.0, seed=0)[0]
    assert max(generation.token_ids) > 255
    assert "\ufffd" in generation.text
    assert len(generation.text) == len(generation.token_ids) == 60


def test_a_stop_string_ends_its_own_prompt_only():
    model = tiny_evo2()
    free = generate(model, PROMPTS, num_tokens=20, seed=4, top_k=0)
    stop = free[0].text[5:8]
    for before, after in zip(free, generate(model, PROMPTS, num_tokens=20, seed=4, top_k=0, stop=stop), strict=True):
        end = before.text.find(stop)
        assert after.text == (before.text[: end + 3] if end >= 0 else before.text)
        assert after.finish_reason == ("stop" if end >= 0 else "length")
        assert len(after.logprobs) == len(after.token_ids) == len(after.text)


def test_special_ids_stop_only_when_asked():
    model = tiny_evo2()
    options: dict[str, Any] = {"num_tokens": 3, "allowed": "\x00\x01", "top_k": 1}
    free = generate(model, ["ACGT"], **options)[0]
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 3
    asked = generate(model, ["ACGT"], stop=[chr(0), chr(1)], **options)[0]
    assert asked.finish_reason == "stop"
    assert len(asked.token_ids) == 1


def test_tokens_are_reported_as_they_are_made():
    seen: list[tuple[int, int, float]] = []
    generations = generate(tiny_evo2(), PROMPTS, num_tokens=4, seed=0, on_token=lambda *token: seen.append(token))
    assert [index for index, _, _ in seen[:5]] != [0] * 5, "prompts of a batch advance together"
    for index, generation in enumerate(generations):
        mine = [(token, logprob) for i, token, logprob in seen if i == index]
        assert mine == list(zip(generation.token_ids, generation.logprobs, strict=True))


def test_no_tokens_is_an_empty_continuation():
    assert generate(tiny_evo2(), ["ACGT"], num_tokens=0)[0] == Generation("", [], [], "length")


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([], {}, InputError, "prompts: the request is empty"),
        ("ACGT", {}, InputError, "prompts: give a list"),
        (["ACGT", ""], {}, SequenceError, "prompt 1: the sequence is empty"),
        (["AC", "AC-"], {}, SequenceError, "prompt 1: letter '-' at position 3"),
        (["MKTAYIAKQR"], {}, SequenceError, "looks like a protein"),
        (["ACGT"], {"num_tokens": -1}, InputError, "num_tokens must be a whole number, at least 0, got -1"),
        (["AC", "A" * 250], {"num_tokens": 7}, SequenceError, "prompt 1: 250 nt and 7 new .* 256; extend_context=True"),
        (["A" * 300], {"num_tokens": 0}, SequenceError, "prompt 0: 300 nt .* extend_context=True generates beyond it"),
        (["ACGT"], {"temperature": 0}, InputError, "temperature must be above 0"),
        (["ACGT"], {"top_k": -2}, InputError, "top_k must be from 0"),
        (["ACGT"], {"top_k": 600}, InputError, "top_k must be from 0"),
        (["ACGT"], {"top_p": 2.0}, InputError, "top_p must be above 0"),
        (["ACGT"], {"allowed": ""}, InputError, "allowed must name at least one letter"),
        (["ACGT"], {"stop": [""]}, InputError, "stop: an empty string"),
        (["ACGT"], {"num_tokens": 1.5}, InputError, "num_tokens must be a whole number, at least 0, got 1.5"),
        (["ACGT"], {"prefill_chunk": 0}, InputError, "prefill_chunk must be a whole number, at least 1"),
        (["ACGT"], {"seed": -4}, InputError, "seed must be from 0"),
        (["ACGT"], {"seed": [1.5]}, InputError, "seed must be from 0 to .*, got 1.5"),
        (["ACGT"], {"seed": 1.5}, InputError, "seed must be a whole number, or one per prompt, got 1.5"),
    ],
)
def test_bad_requests(prompts: list[str], options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        generate(tiny_evo2(), prompts, **{"num_tokens": 5, **options})


def test_a_masked_model_does_not_generate():
    with pytest.raises(InputError, match="esm2 does not generate"):
        generate(tiny_esm2(), ["MKT"], num_tokens=5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_reported_instead_of_sampled(bad: float):
    model = tiny_evo2(tie_embeddings=False)
    with torch.no_grad():
        # Row T of the output layer makes one logit bad; greedy decoding would take an infinite one without noticing.
        model.get_parameter("unembed.weight")[ord("T"), 0] = bad
    with pytest.raises(CapabilityError, match="returned NaN or infinity"):
        generate(model, ["ACGT"], num_tokens=2, top_k=1)


def test_a_token_id_stops_when_asked_for():
    options: dict[str, Any] = {"num_tokens": 40, "seed": 2, "top_k": 0, "allowed": "AC\x00\x01"}
    free = generate(tiny_evo2(), ["ACGT"], **options)[0]
    first = free.token_ids.index(1)
    for stop in ((1, "GG"), 1, np.int64(1), np.array([1])):
        stopped = generate(tiny_evo2(), ["ACGT"], **options, stop=stop)[0]
        assert stopped.token_ids == free.token_ids[: first + 1]
        assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("stop", [(512,), (-1,), (1.5,), (84.0,), (None,)])
def test_a_stop_that_is_neither_text_nor_token_is_refused(stop: Any):
    with pytest.raises(InputError, match=r"stop: .* is neither a string nor a token id from 0 to 511"):
        generate(tiny_evo2(), ["ACGT"], num_tokens=1, stop=stop)


@pytest.mark.parametrize("pattern", ["S", "D", "H", "*", "SDH*"])
def test_prompts_of_one_to_eight_tokens_continue_as_the_whole_form_says(pattern: str):
    model = tiny_evo2(layer_pattern=pattern)
    prompts = ["ACGTTGCA"[:length] for length in range(1, 9)]
    for prompt, generation in zip(prompts, generate(model, prompts, num_tokens=8, top_k=1), strict=True):
        whole = torch.tensor([list((prompt + generation.text).encode())])
        with torch.no_grad():
            log_probs = model(whole).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert generation.token_ids == (log_probs[:, list(b"ACGT")].argmax(-1).apply_(lambda i: b"ACGT"[i])).tolist()
        expected = log_probs.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        assert generation.logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_rows_that_end_leave_the_batch_and_the_others_go_on_unchanged():
    model, steps = tiny_evo2(), []
    free = generate(model, PROMPTS, num_tokens=24, seed=4, top_k=0)
    model.register_forward_pre_hook(lambda _module, args, _kwargs: steps.append(args[0].shape), with_kwargs=True)
    stopped = generate(model, PROMPTS, num_tokens=24, seed=4, top_k=0, stop=("AC", "TT"))
    rows = [shape[0] for shape in steps if shape[1] == 1]
    alive = [sum(len(g.token_ids) > step for g in stopped) for step in range(1, 24)]
    assert rows == [count for count in alive if count]
    assert min(rows) < len(PROMPTS), "no prompt ended early, so the test shows nothing"
    for a, b in zip(free, stopped, strict=True):
        assert b.logprobs == pytest.approx(a.logprobs[: len(b.token_ids)], abs=1e-4)
        assert a.text.startswith(b.text)


def test_a_short_prompt_does_not_pay_for_a_long_one_and_no_chunk_exceeds_the_budget():
    model, shapes = tiny_evo2(), []
    prompts = ["ACGT" * 60, "AC", "GT" * 100]
    alone = [generate(model, [prompt], num_tokens=4, seed=0)[0] for prompt in prompts]
    model.register_forward_pre_hook(lambda _module, args, _kwargs: shapes.append(args[0].shape), with_kwargs=True)
    for a, b in zip(alone, generate(model, prompts * 4, num_tokens=4, seed=0, prefill_chunk=64), strict=False):
        assert_same(a, b)
    assert all(rows * length <= 64 for rows, length in shapes)


def test_the_context_is_extended_only_when_asked(caplog: pytest.LogCaptureFixture):
    model, longer = tiny_evo2(), tiny_evo2(max_length=1000)
    prompts = ["ACGTTGCA" * 40, "AC"]
    extended = generate(model, prompts, num_tokens=5, seed=1, extend_context=True)
    assert [g.text for g in extended] == [g.text for g in generate(longer, prompts, num_tokens=5, seed=1)]
    assert [r.message for r in caplog.records] == [
        "prompt 0: 320 nt and 5 new tokens exceed the model's limit of 256, as extend_context allows"
    ]


def test_a_stop_string_is_found_across_the_blocks_in_which_random_numbers_are_drawn():
    free = generate(tiny_evo2(), ["ACGT"], num_tokens=140, seed=3, top_k=0)[0]
    stop = free.text[58:70]
    assert free.text.find(stop) == 58
    stopped = generate(tiny_evo2(), ["ACGT"], num_tokens=140, seed=3, top_k=0, stop=stop)[0]
    assert stopped.text == free.text[:70]


def test_what_the_callback_raises_ends_the_generation():
    seen: list[int] = []

    def stop_after_two(_index: int, token: int, _logprob: float) -> None:
        seen.append(token)
        if len(seen) == 2:
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        generate(tiny_evo2(), ["ACGT"], num_tokens=50, on_token=stop_after_two)
    assert len(seen) == 2


def test_the_vocabulary_is_that_of_the_model():
    model = tiny_evo2(vocab_size=128)
    assert len(generate(model, ["ACGT"], num_tokens=3, top_k=128, allowed=None)[0].token_ids) == 3
    for options, message in (
        ({"top_k": 129}, "top_k must be from 0 .all. to the vocabulary's 128, got 129"),
        ({"allowed": "AC\x80"}, r"allowed: '\\x80' is not among the model's 128 tokens"),
        ({"stop": [128]}, "stop: 128 is neither a string nor a token id from 0 to 127"),
    ):
        with pytest.raises(InputError, match=message):
            generate(model, ["ACGT"], num_tokens=3, **options)


def test_a_stop_that_cannot_be_generated_is_mentioned(caplog: pytest.LogCaptureFixture):
    generate(tiny_evo2(), ["ACGT"], num_tokens=1, stop=("TAA,TAG", "TAA", 67, 0))
    assert [record.message for record in caplog.records] == [
        "stop: 'TAA,TAG' can never be generated, as only the letters ACGT are allowed",
        "stop: 0 can never be generated, as only the letters ACGT are allowed",
    ]
    caplog.clear()
    generate(tiny_evo2(), ["ACGT"], num_tokens=1, stop=("tag", 0), allowed=None)
    assert not caplog.records
