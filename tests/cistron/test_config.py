from __future__ import annotations

import pickle
from typing import Annotated, Literal

import pytest
from pydantic import Field, NonNegativeInt, PositiveInt

from cistron.config import Config, help_text, merge, parse_overrides, parse_yaml, resolve, to_yaml
from cistron.errors import ConfigError


class Sharded(Config):
    kind: Literal["sharded"] = "sharded"


class Zero(Config):
    kind: Literal["zero"] = "zero"
    stage: Literal[1, 2, 3] = 2
    """Which ZeRO stage."""


class Train(Config):
    steps: PositiveInt = 1000
    """Optimiser steps."""
    learning_rate: float = 4e-4
    strategy: Annotated[Sharded | Zero, Field(discriminator="kind")] = Sharded()


class Run(Config):
    model: str
    train: Train = Train()


def test_overrides_are_typed_and_nested():
    config = resolve(Run, parse_overrides(["model=m", "train.steps=20", "train.learning_rate=1e-3"]))
    assert config.train.steps == 20
    assert config.train.learning_rate == pytest.approx(1e-3)


def test_command_line_beats_the_file():
    file = parse_yaml("model: a\ntrain: {steps: 5, learning_rate: 1e-3}", source="run.yaml")
    config = resolve(Run, merge(file, parse_overrides(["train.steps=7"])))
    assert (config.model, config.train.steps, config.train.learning_rate) == ("a", 7, 1e-3)


def test_words_that_yaml_calls_booleans_stay_words():
    assert parse_overrides(["sequence=NO"]) == {"sequence": "NO"}


def test_a_word_has_no_comments():
    assert parse_overrides(["sequence=#ACGT"]) == {"sequence": "#ACGT"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=m", "train.stesp=3"], r"train\.stesp: no such setting; did you mean 'steps'\?"),
        (["train.steps=3"], "model: required"),
        (["model=m", "train.steps=-1"], r"train\.steps: .*greater than 0 \(got -1\)"),
        (["model=m", "train.strategy.kind=zero", "train.strategy.stage=7"], r"train\.strategy\.stage: .*1, 2 or 3"),
        (["model=m", "train.strategy.kind=zero", "train.strategy.stag=1"], r"train\.strategy\.stag: .*'stage'"),
        (["model=m", "train.strategy.kind=deep"], r"train\.strategy: .*'sharded', 'zero'"),
        (["model"], "key=value"),
        (["train=1", "train.steps=2"], "cannot be a section"),
    ],
)
def test_faults_name_the_path_and_what_is_allowed(words: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(Run, parse_overrides(words))


def test_every_fault_is_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        resolve(Run, {"train": {"steps": 0, "learning": 1}})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["- a\n- b", "a: [1", "just words"])
def test_yaml_that_is_no_mapping_is_refused_by_name(text: str):
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        parse_yaml(text, source="run.yaml")


def test_resolved_configuration_round_trips_through_yaml():
    config = resolve(Run, {"model": "m", "train": {"strategy": {"kind": "zero", "stage": 3}}})
    assert resolve(Run, parse_yaml(to_yaml(config), source="x")) == config


def test_configuration_is_frozen_and_picklable():
    config = Run(model="m")
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_help_lists_fields_defaults_and_their_help():
    text = help_text(Run)
    assert "train.steps: int = 1000" in text
    assert "Optimiser steps." in text
    assert "train.strategy.stage" in text
    assert "model: str = required" in text


def test_help_shows_the_choices_and_what_a_list_holds():
    class Choices(Config):
        reduction: Literal["mean", "sum"] = "mean"
        layers: tuple[int | str, ...] = (-1,)
        actors: NonNegativeInt | None = None

    text = help_text(Choices)
    assert "actors: int | None = None" in text
    assert "reduction: mean | sum = 'mean'" in text
    assert "layers: tuple[int | str, ...] = (-1,)" in text
