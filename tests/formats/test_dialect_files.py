"""A dialect's own file: the builtin ones are whole, and a mistake is refused at its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from dialect_cases import SOUND

from adapterkit.errors import (
    FormatError,
    UsageError,
)
from adapterkit.formats.handwritten.dialects import builtin, load
from adapterkit.formats.handwritten.dialects.loading import names


def test_telling_a_dialect_imports_neither_torch_nor_yaml() -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from adapterkit.formats.handwritten.dialects import *\n"
        "document = open_document(Path(sys.argv[1]))\n"
        "assert isinstance(explain(load('loralib'), document), Explanation)\n"
        "assert not {'torch', 'yaml'} & set(sys.modules)"
    )
    source = str(SOUND / "loralib.safetensors")
    subprocess.run([sys.executable, "-c", code, source], check=True, timeout=60)


@pytest.mark.parametrize("name", names())
def test_every_builtin_dialect_is_whole(name: str) -> None:
    dialect = next(dialect for dialect in builtin() if dialect.name == name)
    assert dialect.title
    assert not dialect.title.endswith(".")
    parents = {other.name for other in builtin()}
    assert dialect.extends is None or dialect.extends in parents


MINIMAL = """
title = "mine"
containers = ["safetensors"]
scale = "alpha/r"
[[tensor]]
match = '(?P<module>.+)[.]down'
axes = "r in"
[[tensor]]
match = '(?P<module>.+)[.]up'
axes = "out r"
"""
# a change of the minimal file -> what is said of it
WRONG = {
    "oops = 1\n" + MINIMAL: "oops: unknown field; known are title",
    MINIMAL.replace('"mine"', "3"): "title: expects text, has 3",
    MINIMAL.replace('title = "mine"', ""): "title: is missing",
    MINIMAL.replace(
        "alpha/r", "alpha*r"
    ): "scale: expects one of alpha/r, alpha/sqrt(r), alpha, 1, has 'alpha*r'",
    MINIMAL.replace(
        '["safetensors"]', '["zip"]'
    ): "containers[0]: expects one of torch, npz, safetensors, has 'zip'",
    MINIMAL.replace('["safetensors"]', '"npz"'): "containers: expects a list of 1 to 3 (one of",
    MINIMAL.replace('"r in"', '"r out in"'): "tensor[0].axes: 'r out in' are no axes",
    MINIMAL.replace('"out r"', '"r r"'): "tensor[1].axes: 'r r' are no axes",
    MINIMAL.replace("(?P<module>.+)[.]up", ".+"): "tensor[1].match: '.+' has no group (?P<module>",
    MINIMAL.replace("[.]up", "("): "is no regular expression",
    MINIMAL + 'role = "full"\n': "tensor[1].axes: a rule has either axes or a role",
    MINIMAL.replace('axes = "out r"', 'role = "up"'): "tensor[1].role: 'up' is none of",
    MINIMAL + 'unless = "{layer}"\n': "tensor[1].unless: '{layer}' makes no sense here",
    'alpha = ["alpha.txt"]\n' + MINIMAL: "alpha: 'alpha.txt' is no source",
    'alpha = ["beside:../x.json:a"]\n' + MINIMAL: "is no source",
    "detect = 1\n" + MINIMAL: "detect: expects true or false, has 1",
    "stride = 0\n" + MINIMAL: "stride: expects a whole number from 1 to 1048576, has 0",
    "tensor = 3\n" + MINIMAL.partition("[[")[0]: "tensor: expects a list (a mapping each), has 3",
    MINIMAL.partition("[[")[0]: "tensor: no rule has axes",
    MINIMAL + "[weight]\nname = 'x'\n": "weight.name: 'x' does not hold {module}",
    MINIMAL + "[weight]\nname = '{module}'\naxes = 'in'\n": "weight.axes: is neither",
    "weight = 3\n" + MINIMAL: "weight: expects a mapping, has 3",
    MINIMAL + "[[blocks]]\nmatch = '.+'\n": "blocks[0].slots: is empty",
    MINIMAL + "[[blocks]]\nmatch = '.+'\nslots = ['q']\nenabled = ['k']\n": "'k' is none of the",
    MINIMAL + "[[blocks]]\nmatch = '.+'\nslots = ['q']\n[blocks.sizes]\n": "sizes: has no 'q'",
    MINIMAL + "[[blocks]]\nmatch='.+'\nslots=['q']\nnumbers='beside:a.json'\nsizes={q='2 **'}\n": (
        "blocks[0].sizes.q: '2 **' makes no sense"
    ),
    MINIMAL
    + "[[convolution]]\nmatch = '.+'\nkernel = 0\n": "kernel: expects a whole number from 1",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = '{b}'\n": "rename[0].to: '{b}' makes no sense",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = 'b'\nslot = 1\n": "1 is not below slots = 1",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = 'b'\nrows = {llama = 'spin(2)'}\n": "no row order",
    MINIMAL + "[[rename]]\nmatch = 'a'\nto = 'b'\nrows = 3\n": "rows: expects a mapping of names",
    MINIMAL
    + "[[expect]]\nsource = 'file:a'\nvalues = 3\nmessage = ''\n": "values: expects a list of 1 to",
    'extends = "nothing"\n' + MINIMAL: "extends: 'nothing' is no built-in dialect",
    "modules = 3\n" + MINIMAL: "modules: expects a mapping of names",
    "title = ": "is not readable TOML",
    "#" * ((1 << 20) + 1): "the most is 1048576",
}


@pytest.mark.parametrize("text", WRONG, ids=list(WRONG.values()))
def test_a_dialect_file_with_a_mistake_is_refused_at_its_place(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        load(str(path))
    assert WRONG[text] in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_dialect_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'rashka'; known dialects: .*raschka-alpha"):
        load("rashka")


def _blocks(size: str) -> str:
    return (
        '[[blocks]]\nmatch = "(?P<module>.+)"\nslots = ["q"]\nnumbers = "metadata:k"\n'
        f'sizes = {{q = "{size}"}}'
    )


HOSTILE_RULES = {
    "width": '[weight]\nname = "{module:>8000000000}.weight"',
    "nested width": '[weight]\nname = "{module:{module}}.weight"',
    "attribute": '[weight]\nname = "{module}{module.__class__}"',
    "conversion": '[weight]\nname = "{module!r}{module}"',
    "no end": '[weight]\nname = "{module"',
    "many holes": f'[weight]\nname = "{"{module}" * 5000}"',
    "width of unless": '[[tensor]]\nmatch = "(?P<module>.+)B"\naxes = "out r"\n'
    'unless = "{module:>8000000000}"',
    "width of to": '[[rename]]\nmatch = "(?P<module>.+)"\nto = "{module:>8000000000}"',
    "signs": _blocks("-" * 900 + "1"),
    "many signs": _blocks("-" * 60_000 + "1"),
    "brackets": _blocks("(" * 400 + "1" + ")" * 400),
    "many brackets": _blocks("(" * 30_000 + "1" + ")" * 30_000),
    "products": _blocks("*".join(["9007199254740992"] * 50)),
    "digits": _blocks("9" * 900),
    "NUL": _blocks("1\\u0000"),
    "items": _blocks("a" + "[0]" * 300),
    "text": _blocks("'a' * 8000000000"),
}


@pytest.mark.parametrize("name", HOSTILE_RULES)
def test_a_rule_that_would_fill_memory_or_the_stack_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    sound = (
        'title = "x"\ncontainers = ["safetensors"]\nscale = "1"\n',
        '[[tensor]]\nmatch = "(?P<module>.+)A"\naxes = "r in"\n',
    )
    path.write_text("\n".join(sound))
    load(str(path))
    path.write_text(f"{sound[0]}{HOSTILE_RULES[name]}\n{sound[1]}")
    with pytest.raises(FormatError) as caught:
        load(str(path))
    assert len(str(caught.value)) < 2000
