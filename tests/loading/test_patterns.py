"""Patterns of files mean what PEFT makes of them, and none takes longer than it is allowed."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from terminal import ROOT

from adapterkit import merge, patterns, validate
from adapterkit.errors import FormatError, UncheckableError, UsageError
from adapterkit.files import read
from adapterkit.lora_config.selection import selection
from adapterkit.patterns import Allowance, Expression, ending

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SOUND = ROOT / "fixtures" / "validation" / "sound"
BASE = ROOT / "fixtures" / "validation" / "bases" / "llama"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
    r"\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:q_proj|k_proj|v_proj|o_proj))"
)
WRITTEN = [
    UNSLOTH,
    r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r"^(?!.*(lm_head|visual)).*\.(q_proj|k_proj|down_proj)$",
    r".*language_model.*\.(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj)",
    r"model\.layers\.(1[6-9]|2[0-9])\.self_attn\.(q|k|v)_proj",
    r"(?i)MODEL\..*Q_PROJ",
    r"(?P<stack>model|visual)\..*(?<!k)_proj",
    r".*\.(?:q_proj|v_proj)\Z",
    r"(?s:.+)\.layers\.\d+\.(\w+)\.(?>q|k|v)_proj",
    r"(?:[a-z_]+\.)++\d++\.(?:\w+\.)*q_proj",
    r".*([a-z])_proj.*\1?",
    r"(?x) model \. .* q_proj  # all of them",
    r"[^.]+(\.[^.]+){2,5}",
    r"a{e<=1}|.*[[:alpha:]]_proj",
    r"q_proj|v_proj",
    "q_proj",
    "self_attn.q_proj",
    r"^model\.layers\.0\.mlp\.down_proj",
    r"layers\.\d\.mlp\.down_proj$",
    "",
]
NAMES = [
    *(
        f"{stack}.layers.{layer}.{part}"
        for stack, layer, part in product(
            ("model", "model.language_model", "visual.blocks", "language_model.model"),
            (0, 7, 17, 24),
            ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "self_attnXq_proj"),
        )
    ),
    *("lm_head", "q_proj", "v_proj", "k_proj\n", "model.embed_tokens", "Model.0.Q_PROJ", "a{e<=1}"),
]
ENDLESS = [
    "(.*?,){11}P",
    "(?:[a-z._0-9,]?)" * 60 + "ZZ",
    "(?x)(a # )\n+)+$",
    "(?:a{1,9}){1,99}" * 9,
]
COMMAS = ",a" * 50


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("pattern", WRITTEN)
def test_an_end_of_a_path_is_what_peft_takes_for_one(pattern: str) -> None:
    if pattern.startswith(("(?i)", "(?x)")):
        with pytest.raises(re.error):
            get_pattern_key([pattern], NAMES[0])
        with pytest.raises(UncheckableError, match="is no regular expression"):
            ending(pattern, Allowance()).fits(NAMES[0])
        return
    theirs = [get_pattern_key([pattern], name) == pattern for name in NAMES if name != pattern]
    own = ending(pattern, Allowance(60))
    assert [own.fits(name) for name in NAMES if name != pattern] == theirs


@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
@pytest.mark.parametrize("pattern", WRITTEN)
@pytest.mark.parametrize(
    "more", [{}, {"exclude_modules": r".*layers\.(7|17)\..*"}, {"modules_to_save": ["v_proj"]}]
)
def test_targets_are_those_that_peft_selects(pattern: str, more: dict[str, Any]) -> None:
    check_selection(
        {"target_modules": pattern, **more} if pattern else {"target_modules": [], **more}
    )


@pytest.mark.parametrize("layers", [None, 0, [7, 24], []])
@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", r"h|layers"], r"(?:\w+)"])
@pytest.mark.parametrize("excluded", [None, ["mlp.down_proj"]])
def test_layers_are_those_that_peft_selects(layers: Any, pattern: Any, excluded: Any) -> None:
    targets = ["q_proj", "down_proj", "model.layers.24.self_attn.v_proj"]
    fields = {"layers_to_transform": layers, "layers_pattern": pattern}
    if layers is None:
        fields = {}
    check_selection({"target_modules": targets, "exclude_modules": excluded, **fields})


def check_selection(fields: dict[str, Any]) -> None:
    # PEFT makes sets of lists; files hold lists.
    config = LoraConfig(**fields)
    theirs = [bool(check_target_module_exists(config, name)) for name in NAMES]
    found = selection(fields)
    assert found is not None
    # An excluded module is an object that is true.
    kinds = [type(check_target_module_exists(config, name)).__name__ for name in NAMES]
    theirs = [t and k != "_ExcludedModule" for t, k in zip(theirs, kinds, strict=True)]
    assert [found.selects(name) for name in NAMES] == theirs


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_takes_too_long_is_ended_and_said(pattern: str) -> None:
    begin = time.monotonic()
    with pytest.raises(UncheckableError, match=r"takes (more than 0\.5 s|too much memory)"):
        Expression(pattern).fits("a" * 200 + COMMAS)
    assert time.monotonic() - begin < 10
    # And the next question is answered.
    assert Expression("(a|b)+").fits("ab")


@pytest.mark.parametrize(
    "pattern", ["(", "a**", r"\p{L}", "(?P<a>x)(?P<a>y)", "(" * 30000, "a{1" + "0" * 99 + "}"]
)
def test_what_python_does_not_compile_is_said(pattern: str) -> None:
    for expression in (Expression(pattern), ending(pattern, Allowance())):
        with pytest.raises(UncheckableError, match="is no regular expression"):
            expression.fits("a")
    with pytest.raises(UncheckableError):
        _ = Expression(pattern).groupindex


def test_expressions_of_one_file_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(text: str, _: str | None, *, whole: bool) -> dict[str, Any]:
        asked.append(text)
        return {"groups": {} if whole else None, "seconds": 0.7}

    monkeypatch.setattr(patterns._ENGINE, "ask", ask)
    allowance = Allowance(2.0)
    expressions = [Expression(f"{place}.*", allowance) for place in range(5)]
    with pytest.raises(UncheckableError, match=r"'3\.\*' was not evaluated"):
        _ = [expression.fits("a") for expression in expressions]
    assert len(asked) == 3


def test_names_and_their_ends_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns._ENGINE, "ask", None)
    for plain in ("q_proj", "self_attn.q_proj", r"^model\.layers\.0\.mlp", "lm-head", "a$"):
        assert ending(plain, Allowance()).fits("x") is False


def test_expressions_travel_and_threads_share_the_process() -> None:
    expression = pickle.loads(pickle.dumps(Expression(r"(?P<n>\d+)x*", Allowance(60))))  # noqa: S301
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(expression.fullmatch, [f"{n}x" for n in range(200)]))
    assert [match.groupdict() for match in found] == [{"n": str(n)} for n in range(200)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_leaves_the_process_to_its_parent() -> None:
    code = (
        "import os; from adapterkit.patterns import Expression\n"
        "assert Expression('a+').fits('aa')\n"
        "child = os.fork()\n"
        "assert Expression('b+').fits('bb')\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_killed_process_is_replaced() -> None:
    assert Expression("a+").fits("a")
    process = patterns._ENGINE._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(UncheckableError):
        Expression("a+b*").fits("a")
    assert Expression("a+b*").fits("a")


def test_a_frozen_program_says_that_it_has_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns._ENGINE, "_process", None)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(UncheckableError, match="could not be evaluated"):
        Expression("a+").fits("a")


def adapter(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    for file in SOUND.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(q_proj", "(?:[a-z._0-9]?)" * 60 + "ZZ"])
def test_a_scale_that_is_not_known_is_refused(tmp_path: Path, field: str, pattern: str) -> None:
    with pytest.raises(FormatError, match=f"{field}: pattern .*; the scale depends on it"):
        read(adapter(tmp_path / "a", **{field: {pattern: 2}}))


@pytest.mark.parametrize("pattern", ["(q_proj", "(?:[a-z._0-9]?)" * 60 + "ZZ"])
def test_targets_that_were_not_evaluated_are_unchecked(tmp_path: Path, pattern: str) -> None:
    path = adapter(tmp_path / "a", target_modules=pattern)
    report = validate(path, base=BASE, targets=["peft"])
    assert [finding.code for finding in report.findings] == ["AK118"]
    assert report.exit_code == 5
    assert [(c.modules, c.verdict) for c in report.targets] == [((), None)]


def test_an_expression_as_people_write_it_is_evaluated(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", target_modules=r"^(?!.*self_attn)(?:.*?a?)+?(?:q_proj|v_proj)")
    report = validate(path, base=BASE, targets=["peft"])
    assert {finding.code for finding in report.findings} == {"AK108", "AK501"}
    assert report.exit_code == 1


def test_a_recipe_says_which_pattern_it_cannot_use() -> None:
    loaded = read(SOUND)
    for pattern in ("(q_proj", "(?:[a-z._0-9]?)" * 60 + "ZZ"):
        with pytest.raises(UsageError, match=r"module pattern .* (is no regular|takes more)"):
            merge([loaded, loaded], module_weights=[{pattern: 0.5}, {}])
