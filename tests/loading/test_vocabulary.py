"""One vocabulary: a word of the library's functions means the same thing in all of them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import pytest

import adapterkit

ADAPTER = "AdapterTensorSet | Path | str"
BASE = "BaseModel | Path | str"
# A word, and what it takes in every function that has it: where it may be left out, None too.
VOCABULARY = {
    "source": ADAPTER,
    "destination": "Path | str",
    "base": BASE,
    "to": "str",
    "for_engine": "str",
    "outtype": "str",
    "dtype": "DType | str",
    "moe_layout": "str",
    "dialect": "str",
    "alpha": "float",
    "as_format": "str",
    "unverified": "bool",
    "allow_lossy": "bool",
    "force": "bool",
    "jobs": "int",
    "seed": "int",
    "progress": "Callable[[int, int], None]",
    "tol": "float",
    "energy": "float",
    "weights": "Sequence[float]",
}
# Words for the same things that people come with; none of the functions has them.
OTHERS = {
    "adapters",
    "fmt",
    "format",
    "input",
    "lossy",
    "out",
    "output",
    "overwrite",
    "path",
    "paths",
    "threads",
    "verbose",
    "workers",
}
# What takes less, and why.
NARROWER = {
    ("read", "source"): "gives the adapter itself",
    ("verify", "source"): "a proof is of the bytes of a file",
    ("examine", "source"): "a server has loaded a file",
    ("extract", "base"): "both checkpoints are opened as a pair",
    ("find_similar", "base"): "every process opens it for itself",
    ("open_base", "base"): "gives the base itself",
}
# What many adapters are: named, since each answer has the name of its source.
NAMED = {"run_fleet", "find_similar"}
# What only looks at headers, or at what is in memory already.
QUICK = {"read", "to_state_dict"}

FUNCTIONS = {
    name: inspect.signature(item)
    for name in dir(adapterkit)
    if inspect.isfunction(item := getattr(adapterkit, name))
    if not name.startswith("_") and item.__module__.startswith("adapterkit")
}
METHODS = {
    "AdapterStack": inspect.signature(adapterkit.AdapterStack),
    "AdapterStack.load": inspect.signature(adapterkit.AdapterStack.load),
}
EVERY = FUNCTIONS | METHODS


def meant(parameter: inspect.Parameter) -> str:
    """Return what a parameter takes, None aside."""
    return str(parameter.annotation).removesuffix(" | None")


@pytest.mark.parametrize("word", VOCABULARY)
def test_a_word_means_the_same_in_every_function(word: str) -> None:
    found = {
        name: meant(signature.parameters[word])
        for name, signature in EVERY.items()
        if word in signature.parameters and (name, word) not in NARROWER
    }
    assert found
    assert set(found.values()) == {VOCABULARY[word]}, found


def test_a_word_of_several_functions_has_one_type() -> None:
    types: defaultdict[str, set[Any]] = defaultdict(set)
    for name, signature in FUNCTIONS.items():
        for parameter in signature.parameters.values():
            if (name, parameter.name) not in NARROWER:
                types[parameter.name].add(meant(parameter))
    # A plan has one rank for all; a merge and an extraction may find it.
    several = {word for word, found in types.items() if len(found) > 1}
    assert several == {"rank", "report", "sources"}
    assert not types.keys() & OTHERS


def test_everything_that_reads_adapters_takes_a_path_or_an_adapter() -> None:
    for name, signature in EVERY.items():
        sources = signature.parameters.get("sources")
        if sources is not None:
            assert (ADAPTER in str(sources.annotation)) == (name not in NAMED), name


def test_everything_that_may_take_long_tells_how_far_it_is() -> None:
    for name, signature in FUNCTIONS.items():
        if {"source", "sources"} & signature.parameters.keys() and name not in QUICK:
            assert signature.parameters["progress"].default is None, name


def test_what_is_optional_is_named() -> None:
    for name, signature in FUNCTIONS.items():
        for parameter in signature.parameters.values():
            optional = parameter.default is not inspect.Parameter.empty
            if optional:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (name, parameter.name)
