from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import cistron
import cistron_kernels

MODULES = sorted(
    module.name
    for package in (cistron, cistron_kernels)
    for module in pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")
    if not module.name.endswith(".kernel")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name: str):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) > 5
