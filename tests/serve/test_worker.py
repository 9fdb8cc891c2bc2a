"""The model's thread without a model: merging, splitting, retrying alone, streaming and cancelling."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from cistron.errors import SequenceError
from cistron_serve import streaming, worker
from cistron_serve.streaming import Cancelled, Chunk, TokenStream
from cistron_serve.worker import BATCH_SLOTS, Call, Slotted, Worker, run_calls, total_slots


def call(*sequences: str, **options: Any) -> Call:
    return Call.of("score", list(sequences), options, tokens=sum(map(len, sequences)))


@pytest.fixture
def library_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """Replace scoring by the length of the sequence; a Z is refused with its index."""
    calls: list[tuple[list[str], dict[str, Any]]] = []

    def score(_model: Any, sequences: list[str], **options: Any) -> list[int]:
        calls.append((sequences, options))
        for index, sequence in enumerate(sequences):
            if "Z" in sequence:
                raise SequenceError(f"sequence {index}")
        return [len(sequence) for sequence in sequences]

    monkeypatch.setitem(worker._OPERATIONS, "score", score)  # type: ignore[arg-type]
    return calls


def run(*calls: Call) -> list[Any]:
    return run_calls(None, list(calls), token_budget=32)  # type: ignore[arg-type]


def test_calls_with_equal_options_share_one_library_call(library_calls: list[Any]) -> None:
    mean, total = {"reduction": "mean"}, {"reduction": "sum"}
    assert run(call("A", "AC", **mean), call("ACG", **total), call("ACGT", **mean)) == [[1, 2], [3], [4]]
    assert library_calls == [
        (["A", "AC", "ACGT"], mean | {"token_budget": 32}),
        (["ACG"], total | {"token_budget": 32}),
    ]


def test_a_bad_call_fails_alone_and_with_its_own_index(library_calls: list[Any]) -> None:
    first, bad, last = run(call("A", "AC"), call("A", "Z"), call("ACG"))
    assert (first, last) == ([1, 2], [3])
    assert isinstance(bad, SequenceError)
    assert str(bad) == "sequence 1"
    assert len(library_calls) == 4


def test_slots_are_shares_of_the_budget() -> None:
    budget = 640
    shares = [Slotted.of(call("A" * length), token_budget=budget).slots for length in (1, 10, 11, 640, 6400)]
    assert shares == [1, 1, 2, BATCH_SLOTS, BATCH_SLOTS]
    assert total_slots([Slotted.of(call("A" * 11), token_budget=budget)] * 3) == 6


def test_work_runs_in_one_thread_in_order_and_reports_its_wait() -> None:
    async def scenario() -> None:
        waits: list[float] = []
        thread = Worker(on_wait=waits.append)
        seen: list[tuple[int, int]] = []
        release = threading.Event()

        def work(number: int) -> int:
            release.wait(5)
            seen.append((number, threading.get_ident()))
            return number

        jobs = [asyncio.ensure_future(thread.run(lambda number=number: work(number))) for number in range(3)]
        await asyncio.sleep(0.05)  # The event loop runs while the thread is busy.
        jobs[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await jobs[1]
        release.set()
        assert [await jobs[0], await jobs[2]] == [0, 2]
        assert [number for number, _ in seen] == [0, 2]
        assert len({identity for _, identity in seen}) == 1
        assert threading.get_ident() != seen[0][1]
        assert len(waits) == 2
        assert waits[1] >= 0.04

    asyncio.run(scenario())


def test_freed_memory_is_returned_behind_the_answers_and_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    monkeypatch.setattr(worker, "return_freed_memory", lambda: events.append("returned"))

    async def scenario(interval: float, answers: int) -> list[Any]:
        events.clear()
        monkeypatch.setattr(worker, "RETURN_INTERVAL_S", interval)
        thread = Worker(on_wait=lambda seconds: None)
        for number in range(answers):
            await thread.run(lambda number=number: events.append(number))
        await thread.run(lambda: events.append("last"))
        return events[: events.index("last")]

    assert asyncio.run(scenario(0.0, 2)) == [0, "returned", 1, "returned"]
    assert asyncio.run(scenario(60.0, 2)) == [0, 1]


def test_tokens_become_full_chunks_per_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_TOKENS", 3)

    async def scenario() -> list[Chunk | None]:
        stream = TokenStream(2)

        def produce() -> None:
            for step in range(4):
                for index in range(2):
                    stream.push(index, 65 + step, -float(step))
            stream.finish()

        await asyncio.get_running_loop().run_in_executor(None, produce)
        return [chunk async for chunk in stream.chunks()]

    chunks = asyncio.run(scenario())
    assert [(c.index, c.offset, c.text) for c in chunks if c] == [
        (0, 0, "ABC"),
        (1, 0, "ABC"),
        (0, 3, "D"),
        (1, 3, "D"),
    ]
    assert chunks[0] is not None
    assert chunks[0].logprobs == [0.0, -1.0, -2.0]


def test_a_slow_generation_sends_what_it_has_and_a_silent_one_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CHUNK_SECONDS", 0.0)
    monkeypatch.setattr(streaming, "SILENCE_SECONDS", 0.01)

    async def scenario() -> list[Chunk | None]:
        stream = TokenStream(1)
        chunks = stream.chunks()
        received = [await anext(chunks)]
        stream.push(0, 65, -1.0)
        received.append(await anext(chunks))
        stream.finish()
        return received + [chunk async for chunk in chunks]

    silence, chunk = asyncio.run(scenario())
    assert silence is None
    assert chunk == Chunk(0, 0, [65], [-1.0])


def test_a_cancelled_stream_stops_its_producer() -> None:
    async def scenario() -> int:
        stream = TokenStream(1)

        def produce() -> int:
            made = 0
            try:
                while True:
                    stream.push(0, 65, -1.0)
                    made += 1
            except Cancelled:
                stream.finish()
                return made

        producing = asyncio.get_running_loop().run_in_executor(None, produce)
        await anext(stream.chunks())
        stream.cancel()
        return await asyncio.wait_for(producing, 5)

    assert asyncio.run(scenario()) >= streaming.CHUNK_TOKENS
