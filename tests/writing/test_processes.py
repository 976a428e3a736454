"""What travels between processes: errors, reports, adapters with all their bytes, whole pools."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers
from pretend_servers import pretending, vllm

import adapterkit
from adapterkit.dtype import DType
from adapterkit.errors import AdapterKitError, LossyConversionError
from adapterkit.notes import Loss
from adapterkit.registry import formats
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet

pytestmark = pytest.mark.slow

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "peft" / "tiny"
DORA = FIXTURES / "peft" / "dora"
BASE = FIXTURES / "peft" / "base"
SPAWN = multiprocessing.get_context("spawn")


def unpickled(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301  (pickled here)


def travelled(thing: Any) -> Any:
    return unpickled(pickle.dumps(thing))


class OfPluginError(AdapterKitError):
    """An error whose constructor takes something else than its text."""

    def __init__(self, number: int, *, hints: list[str]) -> None:
        self.number = number
        self.hints = hints
        super().__init__(f"number {number}", path=Path("a"), where="b")


def errors() -> list[type[AdapterKitError]]:
    found, waiting = [AdapterKitError], [AdapterKitError]
    while waiting:
        subclasses = waiting.pop().__subclasses__()
        found += subclasses
        waiting += subclasses
    return found


def example(kind: type[AdapterKitError]) -> AdapterKitError:
    if kind is OfPluginError:
        return OfPluginError(7, hints=["x"])
    if issubclass(kind, LossyConversionError):
        return kind([Loss("dora", "m", "cannot", (), blocks=True)], path="p")
    return kind("message", path=Path("a/b"), where="w")


@pytest.mark.parametrize("kind", errors(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("travel", [travelled, copy.copy, copy.deepcopy])
def test_errors_travel_whole(kind: type[AdapterKitError], travel: Any) -> None:
    error = example(kind)
    error.add_note("noted")
    again = travel(error)
    assert type(again) is kind
    assert str(again) == str(error) != ""
    assert vars(again) == vars(error)
    assert again.__notes__ == ["noted"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of the fixtures with random weights."""
    config = transformers.AutoConfig.from_pretrained(BASE)
    folder = tmp_path_factory.mktemp("weights")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def results(weights: Path, out: Path) -> dict[str, Any]:
    """What every public function returns."""
    adapter = adapterkit.read(TINY)
    fleet = with_threads(adapterkit.run_fleet, "inspect", [TINY], out / "fleet")
    into = adapterkit.merge_into([TINY], weights, out / "merged")
    return {
        "audit": adapterkit.audit(TINY, TINY, suggest=True, base=weights),
        "bank": adapterkit.bank(TINY, destination=out / "bank.json"),
        "compress": adapterkit.compress(TINY, rank=2),
        "compress_file": adapterkit.compress_file(TINY, out / "compressed", rank=2),
        "convert": adapterkit.convert(TINY, out / "x.gguf", base=BASE),
        "diff": adapterkit.diff(TINY, FIXTURES / "peft" / "tiny-weak"),
        "examine": examined(),
        "extract": adapterkit.extract(weights, out / "merged", out / "extracted"),
        "find_similar": with_threads(adapterkit.find_similar, [TINY]),
        "from_state_dict": adapterkit.from_state_dict(*adapterkit.to_state_dict(adapter)),
        "html_page": adapterkit.html_page(adapterkit.audit(TINY)),
        "inspect": adapterkit.inspect(TINY),
        "load_target": adapterkit.load_target("vllm"),
        "merge": adapterkit.merge([adapter, adapter]),
        "merge_files": adapterkit.merge_files([TINY, TINY], out / "both"),
        "merge_into": into,
        "merge_methods": adapterkit.merge_methods(),
        "open_base": adapterkit.open_base(weights),
        "read": adapter,
        "read_recipe": adapterkit.read_recipe(recipe(out)),
        "run_fleet": fleet,
        "serving_settings": adapterkit.serving_settings(stacked(), "vllm"),
        "suggest": adapterkit.suggest(adapterkit.audit(TINY).adapters[0], rank=2),
        "summarize": adapterkit.summarize(adapter),
        "target_names": adapterkit.target_names(),
        "to_state_dict": adapterkit.to_state_dict(adapter),
        "validate": adapterkit.validate(DORA, base=BASE, targets=("vllm", "llama.cpp")),
        "verify": adapterkit.verify(out / "both"),
        "write": adapterkit.write(adapter, out / "written"),
        "write_fleet_tables": adapterkit.write_fleet_tables(fleet, out / "fleet"),
        "write_html": adapterkit.write_html(adapterkit.audit(TINY), out / "page.html"),
        "write_page": adapterkit.write_page("<!doctype html>", out / "other.html"),
        "lost_beyond_pairs": list(adapterkit.lost_beyond_pairs(adapterkit.read(TINY))),
        "convert_all": adapterkit.convert_all([TINY], out / "all"),
        "for_each": adapterkit.for_each(adapterkit.inspect, [TINY]),
        "validation_page": adapterkit.validation_page(
            adapterkit.for_each(adapterkit.validate, [TINY])
        ),
    }


def examined() -> adapterkit.DoctorReport:
    with pretending(vllm) as url:
        return adapterkit.examine(url)


def with_threads(function: Callable[..., Any], *arguments: Any) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return function(*arguments, executor=pool)


def stacked() -> adapterkit.AdapterStack:
    stack = adapterkit.AdapterStack(BASE)
    stack.load(TINY, name="tiny")
    return stack


def recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"adapters: [{{path: {TINY}}}]\nmethod: svd\n")
    return path


def test_what_public_functions_return_travels(weights: Path, tmp_path: Path) -> None:
    found = results(weights, tmp_path)
    public = {name for name in adapterkit.__all__ if isfunction(getattr(adapterkit, name))}
    assert found.keys() == public - {"watched"}  # gives a context, which stays where it is
    for name, result in found.items():
        for again in (travelled(result), copy.deepcopy(result)):
            assert type(again) is type(result), name
            assert repr(again) == repr(result), name


def test_a_stack_travels() -> None:
    stack = adapterkit.AdapterStack(BASE)
    stack.load(TINY, name="tiny", scale=0.5)
    again = travelled(stack)
    assert pickle.dumps(again) == pickle.dumps(travelled(again))


def every_fixture(weights: Path, settings_file: Path) -> list[AdapterTensorSet]:
    """Every adapter of the fixtures that can be read, with a base or settings if it needs them."""
    found: list[AdapterTensorSet] = []
    choices: list[dict[str, Any]] = [
        {},
        {"alpha": 8.0},
        {"dialect": "raschka-alpha", "alpha": 8.0},
        {"base": weights},
        {"base": weights, "dialect": str(settings_file)},
        {"base": FIXTURES / "tuners" / "base"},
    ]
    for path in sorted(FIXTURES.rglob("*")):
        if "hostile" in path.parts:
            continue
        for settings in choices:
            try:
                found.append(adapterkit.read(path, **settings))
            except AdapterKitError:
                continue
            break
    return found


def content(adapter: AdapterTensorSet) -> list[tuple[str, str]]:
    """Digests of every tensor, and of every update to its last bit."""
    found = [
        (str(key), hashlib.sha256(tensor.tobytes()).hexdigest())
        for key, tensor in adapter.tensors.items()
    ]
    for pair in adapter.pairs():
        a, b = (side.numpy().astype(np.float64) for side in (pair.a, pair.b))
        if a.shape[-2:-1] != b.shape[-1:]:
            continue  # a broken one, or a convolution
        # Not BLAS, whose last bits depend on its threads.
        update = pair.scale * np.einsum("...or,...ri->...oi", b, a)
        found.append((pair.module, hashlib.sha256(update).hexdigest()))
    return found


def unpickled_content(data: bytes) -> tuple[list[tuple[str, str]], bytes]:
    adapter: AdapterTensorSet = unpickled(data)
    return content(adapter), pickle.dumps(adapter)


def test_adapters_of_every_format_travel(weights: Path, tmp_path: Path) -> None:
    settings_file = tmp_path / "tinylora.json"
    settings_file.write_text('{"frozen_rank": 2, "alpha": 1.0, "tie_mode": "tiled"}')
    adapters = every_fixture(weights, settings_file)
    read = {adapter.provenance.format for adapter in adapters if adapter.provenance}
    assert read == {known.name for known in formats() if known.reads}
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        there = list(pool.map(unpickled_content, map(pickle.dumps, adapters), chunksize=20))
    for adapter, (found, sent_back) in zip(adapters, there, strict=True):
        wanted = content(adapter)
        assert found == wanted
        for again in (unpickled(sent_back), copy.copy(adapter), copy.deepcopy(adapter)):
            assert content(again) == wanted
            assert (again.scales, again.settings) == (adapter.scales, adapter.settings)
            assert (again.metadata, again.base) == (adapter.metadata, adapter.base)
            assert again.source == adapter.source
            with pytest.raises(TypeError):
                again.tensors[None] = None


def test_ranges_of_files_travel_as_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    adapter = adapterkit.read("adapter")
    tensor = next(iter(adapter.tensors.values()))
    stored = bytes(tensor.tobytes())
    data = pickle.dumps(adapter)
    assert stored not in data
    monkeypatch.chdir(FIXTURES)
    assert next(iter(unpickled(data).tensors.values())).tobytes() == stored
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(adapterkit.NotFoundError, match="safetensors: no such file"):
        next(iter(unpickled(data).tensors.values())).tobytes()


def test_computed_values_travel_as_their_bytes() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = LazyTensor.of(array).map(lambda x: x + 1).cast(DType.BF16)
    again = travelled(tensor)
    assert again == tensor
    assert bytes(again.tobytes()) == bytes(tensor.tobytes())
    assert bytes(again.rows(1, 2).tobytes()) == bytes(tensor.rows(1, 2).tobytes())
    assert pickle.dumps(travelled(again)) == pickle.dumps(again)


def test_the_repr_of_an_adapter_is_short() -> None:
    shown = repr(adapterkit.read(TINY))
    assert shown == "<AdapterTensorSet: 6 modules, 12 tensors, peft, base 'example/tiny-llama'>"


def converted(source: Path, destination: Path) -> int:
    return adapterkit.convert(source, destination, base=BASE).modules


def test_a_pool_of_conversions_survives_its_refusals(tmp_path: Path) -> None:
    sources: list[tuple[Path, type[Exception] | None]] = []
    whole = (TINY / "adapter_model.safetensors").read_bytes()
    for number in range(200):
        folder = tmp_path / f"{number}"
        refused = number % 5 == 1
        shutil.copytree(DORA if refused else TINY, folder)
        kind: type[Exception] | None = LossyConversionError if refused else None
        if number % 5 == 2:
            (folder / "adapter_model.safetensors").write_bytes(whole[: number * 10])
            kind = adapterkit.TruncatedFileError
        elif number % 5 == 3:
            (folder / "adapter_config.json").write_text("{" * number)
            kind = adapterkit.FormatError
        elif number % 50 == 4:
            shutil.rmtree(folder)
            kind = adapterkit.NotFoundError
        sources.append((folder, kind))
    with ProcessPoolExecutor(2, mp_context=SPAWN) as pool:
        futures = [pool.submit(converted, path, path.with_suffix(".gguf")) for path, _ in sources]
    for (path, kind), future in zip(sources, futures, strict=True):
        error = future.exception()
        assert type(error) is (kind or type(None))
        if error is None:
            assert future.result() == 6
        else:
            assert str(path) in str(error)
        assert path.with_suffix(".gguf").exists() == (error is None)
