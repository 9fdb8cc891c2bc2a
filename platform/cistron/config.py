"""One spelling for every setting: YAML files, ``key=value`` words, job and Serve arguments.

A setting is a field of a frozen pydantic model. The field holds its only default, and the string below it is its help.
``resolve`` turns a YAML mapping plus dotted overrides into such a model, or raises one ``ConfigError`` that lists every
fault with its dotted path, what was got and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cistron.errors import ConfigError, nearest

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Turn ``["train.steps=20", "model=evo2_1b_base"]`` into a nested mapping; values are read as YAML scalars.

    Raises:
        ConfigError: a word has no ``=``, or one key is both a value and a section.
    """
    tree: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"cannot read {word!r}; write settings as key=value, for example train.steps=20")
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {section!r} was already given a value, so it cannot be a section")
        node[leaf] = _yaml_value(key, value)
    return tree


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Read a YAML document that must be a mapping; `source` names it in errors."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must hold a mapping of settings, got a {type(data).__name__}")
    return data


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `override` laid over it, section by section."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def resolve(cls: type[ConfigT], settings: Mapping[str, Any]) -> ConfigT:
    """Validate `settings` against `cls`.

    Raises:
        ConfigError: one line per fault: dotted path, what was got, what is allowed.
    """
    try:
        return cls.model_validate(dict(settings))
    except ValidationError as error:
        faults = [_explain(cls, fault) for fault in error.errors()]
        raise ConfigError("\n".join(faults)) from error


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML, in field order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def help_text(cls: type[Config], *, prefix: str = "") -> str:
    """List every field as ``name: type = default`` with its help, sections indented by their dotted names."""
    lines = []
    for name, field in cls.model_fields.items():
        nested = _config_types(field.annotation)
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        if nested and not field.is_required():
            default = ""
        kind = " | ".join(kind.__name__ for kind in nested) or _spelt(field.annotation)
        lines.append(f"  {prefix}{name}: {kind}{' = ' + default if default else ''}")
        if field.description:
            lines.append(f"      {' '.join(field.description.split())}")
        lines += [help_text(kind, prefix=f"{prefix}{name}.") for kind in nested]
    return "\n".join(lines)


def listed(value: Any) -> Any:
    """Return a list of one for a single value, so that ``layers=-1`` means ``layers=[-1]``; for ``BeforeValidator``."""
    return value if isinstance(value, list | tuple) else [value]


def _spelt(annotation: Any) -> str:
    """Return a type as the help shows it, choices included."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is Annotated:
        return _spelt(arguments[0])
    if origin in (Union, UnionType):
        return " | ".join("None" if kind is NoneType else _spelt(kind) for kind in arguments)
    is_plain = isinstance(annotation, type) and not get_args(annotation)
    return annotation.__name__ if is_plain else str(annotation).replace("typing.", "")


def _yaml_value(key: str, value: str) -> Any:
    """Read one override's value; sequences such as ``ACGT`` stay strings, and so do the words YAML calls booleans."""
    # A comment means nothing in a word, and "#" is a letter of Evo 2's alphabet.
    if value.lower() in {"yes", "no", "on", "off", "y", "n"} or value.startswith("#"):
        return value
    try:
        return yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        return value


def _explain(cls: type[Config], fault: Any) -> str:
    """One line for one pydantic fault."""
    location, section = _walk(cls, fault["loc"])
    path = ".".join(location) or "configuration"
    if fault["type"] == "extra_forbidden":
        known = sorted({name for candidate in section for name in candidate.model_fields})
        return f"{path}: no such setting{nearest(location[-1], known)} (allowed: {', '.join(known)})"
    if fault["type"] == "missing":
        return f"{path}: required, but not given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], dict):
        return f"{path}: {message}"  # Settings that contradict each other; the message names them.
    return f"{path}: {message} (got {fault['input']!r})"


def _walk(cls: type[Config], location: Sequence[str | int]) -> tuple[list[str], list[type[Config]]]:
    """Return the path as the user writes it, and the classes of its last section.

    pydantic puts the tag of a tagged union into the location (``strategy.deepspeed.zero_stage``); nobody types that.
    """
    path: list[str] = []
    section = [cls]
    for place, part in enumerate(location):
        tagged = [kind for kind in section if part in _tags(kind)]
        if tagged and not any(part in kind.model_fields for kind in section):
            section = tagged
            continue
        path.append(str(part))
        fields = [kind.model_fields[str(part)] for kind in section if part in kind.model_fields]
        below = [kind for field in fields for kind in _config_types(field.annotation)]
        section = below if below and place < len(location) - 1 else section
    return path, section


def _tags(cls: type[Config]) -> list[Any]:
    """Values of the literal fields of a member of a tagged union."""
    return [value for field in cls.model_fields.values() for value in get_args(field.annotation)]


def _config_types(annotation: Any) -> list[type[Config]]:
    """Configuration classes inside an annotation, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _config_types(inner)]
