"""LoRA of convolutions, as PEFT trains it: every command against PEFT's own outputs and algebra."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from adapterkit import (
    AdapterTensorSet,
    Kind,
    LossyConversionError,
    Update,
    audit,
    compress,
    compress_file,
    convert,
    diff,
    inspect,
    merge,
    merge_files,
    merge_into,
    merge_methods,
    read,
    validate,
)
from adapterkit.errors import FormatError, IncompatibleBaseError, UnsupportedError
from adapterkit.keys import Role, TensorKey
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

RANKS = {"line": 4, "image": 4, "volume": 3, "point": 2}
KERNELS = {"line": (6,), "image": (3, 2), "volume": (2, 1, 3), "point": ()}
SHAPES = {"line": (10, 6, 6), "image": (10, 4, 3, 2), "volume": (5, 3, 2, 1, 3), "point": (7, 9)}


class Convolutions(nn.Module):
    """A layer of each number of dimensions, and a linear one; run one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        # The kernel of the first is as wide as its inputs, and the rank its outputs elsewhere.
        self.line = nn.Conv1d(6, 10, 6, padding=2)
        self.image = nn.Conv2d(4, 10, (3, 2), stride=2)
        self.volume = nn.Conv3d(3, 5, (2, 1, 3))
        self.point = nn.Linear(9, 7)
        self.double()

    def forward(self, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [getattr(self, name)(value) for name, value in x.items()]


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {"line": (2, 6, 11), "image": (2, 4, 9, 8), "volume": (2, 3, 4, 4, 5), "point": (2, 9)}
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
    }


def trained(path: Path, seed: int, base: str | None = None, **settings: Any) -> Path:
    """Save an adapter of random factors, as PEFT saves one, in float64."""
    config = LoraConfig(
        **{
            "target_modules": list(RANKS),
            "r": 4,
            "lora_alpha": 6,
            "rank_pattern": {name: rank for name, rank in RANKS.items() if rank != 4},
            "base_model_name_or_path": base,
            **settings,
        }
    )
    model = get_peft_model(cast("Any", Convolutions()), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    model.save_pretrained(path)
    return path


def outputs(*paths: Path, weights: tuple[float, ...] = ()) -> list[torch.Tensor]:
    """Return what PEFT's live models give: the base's, and Σ wᵢ of what each adapter adds."""
    with torch.no_grad():
        plain = Convolutions()(inputs())
        total = [each.clone() for each in plain]
        for path, weight in zip(paths, weights or (1.0,) * len(paths), strict=True):
            model = PeftModel.from_pretrained(cast("Any", Convolutions()), str(path))
            changed = cast("list[torch.Tensor]", model.double()(inputs()))
            for place, (new, old) in enumerate(zip(changed, plain, strict=True)):
                total[place] += weight * (new - old)
    return total


def apart(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Return the largest relative distance of two lists of outputs, the base's part left out."""
    with torch.no_grad():
        plain = Convolutions()(inputs())
    return max(
        float((a - b).norm() / (a - base).norm())
        for a, b, base in zip(first, second, plain, strict=True)
    )


def deltas(adapter: AdapterTensorSet) -> dict[str, np.ndarray[Any, Any]]:
    """Return ΔW by torch's einsum over the stored factors."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for pair in adapter.pairs():
        a, b = pair.a.numpy().astype(float), pair.b.numpy().astype(float)
        b = b.reshape(b.shape[:2])
        found[pair.module] = pair.scale * np.einsum("or,r...->o...", b, a)
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("convolutions")
    return trained(folder / "a", 1), trained(folder / "b", 2)


def test_the_reader_says_what_they_are(pair: tuple[Path, Path]) -> None:
    adapter = read(pair[0])
    for update in adapter.pairs():
        kernel = KERNELS[update.module]
        assert update.kind is (Kind.CONVOLUTION if kernel else Kind.LINEAR)
        assert update.rank == RANKS[update.module]
        assert update.shape == SHAPES[update.module]
        out, columns = update.matrix_shape
        assert (out, columns) == (SHAPES[update.module][0], np.prod(SHAPES[update.module][1:]))
        ((b, a),) = update.matrices()
        assert (update.scale * b @ a).reshape(update.shape) == pytest.approx(
            deltas(adapter)[update.module]
        )


def test_its_delta_is_the_one_that_peft_merges(pair: tuple[Path, Path]) -> None:
    model = PeftModel.from_pretrained(cast("Any", Convolutions()), str(pair[0])).double()
    for module, delta in deltas(read(pair[0])).items():
        layer = cast("Any", model.get_submodule(f"base_model.model.{module}"))
        wanted = layer.get_delta_weight("default").detach().numpy()
        assert delta == pytest.approx(wanted, abs=1e-12)


def test_inspect_and_validate_find_nothing_wrong(pair: tuple[Path, Path]) -> None:
    found = inspect(pair[0])
    assert found.problems == ()
    assert found.ranks == {2: 1, 3: 1, 4: 2}
    codes = {finding.code for finding in validate(pair[0]).findings if finding.severity == "error"}
    assert codes == set()


def test_a_declared_rank_that_is_another_is_still_said(tmp_path: Path) -> None:
    path = trained(tmp_path / "a", 1)
    text = (path / "adapter_config.json").read_text()
    (path / "adapter_config.json").write_text(text.replace('"volume": 3', '"volume": 5'))
    assert inspect(path).problems == ("volume: the config declares rank 5, the tensors have 3",)


def test_diff_measures_the_folded_matrix(pair: tuple[Path, Path]) -> None:
    first, second = (deltas(read(path)) for path in pair)
    for row in diff(*pair).modules:
        wanted = np.linalg.norm(second[row.module] - first[row.module])
        assert row.relative_error == pytest.approx(wanted / np.linalg.norm(first[row.module]))


@pytest.mark.parametrize("outtype", ["auto", "f32", "bf16"])
def test_convert_writes_what_peft_runs(
    pair: tuple[Path, Path], outtype: str, tmp_path: Path
) -> None:
    convert(pair[0], tmp_path / "new", outtype=outtype)
    allowed = {"auto": 1e-9, "f32": 1e-6, "bf16": 1e-2}[outtype]
    assert apart(outputs(pair[0]), outputs(tmp_path / "new")) < allowed
    shapes = {name: tuple(t.shape) for name, t in load(tmp_path / "new").items()}
    assert shapes == {name: tuple(t.shape) for name, t in load(pair[0]).items()}


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("target", ["gguf", "mlx"])
def test_engines_without_convolutions_are_refused_by_name(target: str, tmp_path: Path) -> None:
    names = ["line", "image", "volume"]
    path = trained(tmp_path / "a", 1, target_modules=names, rank_pattern={"volume": 3})
    with pytest.raises(LossyConversionError) as caught:
        convert(path, tmp_path / "new", to=target)
    codes = {loss.code: loss for loss in caught.value.losses}
    assert {key.module for key in codes["convolution"].drops} == set(names)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "new").exists()


def test_audit_measures_the_folded_matrix(pair: tuple[Path, Path]) -> None:
    wanted = deltas(read(pair[0]))
    for row in audit(*pair).modules:
        matrix = wanted[row.module].reshape(len(wanted[row.module]), -1)
        assert row.shape == matrix.shape
        values = np.linalg.svd(matrix, compute_uv=False)[: RANKS[row.module]]
        assert row.singular_values == pytest.approx(values, rel=1e-9)


def test_compress_is_the_truncated_decomposition_and_peft_runs_it(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    compress_file(pair[0], tmp_path / "small", rank=2)
    small, large = deltas(read(tmp_path / "small")), deltas(read(pair[0]))
    for module, delta in large.items():
        matrix = delta.reshape(len(delta), -1)
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :2] * values[:2]) @ vt[:2]
        assert small[module].reshape(matrix.shape) == pytest.approx(best, abs=1e-9)
    assert apart(applied(small), outputs(tmp_path / "small")) < 1e-10
    kept = compress(read(pair[0]), rank=4).adapter
    assert deltas(kept).keys() == large.keys()


def applied(found: dict[str, np.ndarray[Any, Any]]) -> list[torch.Tensor]:
    """Return the outputs of layers whose weights have the updates in them."""
    model = Convolutions()
    with torch.no_grad():
        for module, delta in found.items():
            model.get_submodule(module).weight += torch.from_numpy(delta)
        return model(inputs())


METHODS = [spec.name for spec in merge_methods()]


def flat(adapter: AdapterTensorSet) -> AdapterTensorSet:
    """Return the adapter with every kernel folded into the columns of a linear layer."""
    return AdapterTensorSet.of(
        [
            Update(
                pair.module,
                LazyTensor.of(pair.a.numpy().reshape(pair.rank, -1)),
                LazyTensor.of(pair.b.numpy().reshape(-1, pair.rank)),
                pair.scale,
            )
            for pair in adapter.pairs()
        ],
        {},
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_to_a_kernel_what_it_does_to_the_folded_matrix(
    pair: tuple[Path, Path], method: str
) -> None:
    adapters = [read(path) for path in pair]
    found = merge(adapters, weights=[0.7, 0.4], method=method).adapter
    wanted = merge([flat(each) for each in adapters], weights=[0.7, 0.4], method=method).adapter
    matrices = deltas(wanted)
    assert found.modules == wanted.modules
    for module, delta in deltas(found).items():
        assert delta.reshape(matrices[module].shape) == pytest.approx(matrices[module], abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_merged_adapters_keep_the_layout_of_convolutions(
    pair: tuple[Path, Path], method: str
) -> None:
    merged = merge([read(path) for path in pair], weights=[0.7, 0.4], method=method).adapter
    for update in merged.pairs():
        assert update.kind is (Kind.CONVOLUTION if KERNELS[update.module] else Kind.LINEAR)
        assert update.shape == SHAPES[update.module]
        assert update.sound


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_merged_adapters_give_the_sum_of_peft_s_outputs(
    pair: tuple[Path, Path], method: str, tmp_path: Path
) -> None:
    merge_files(pair, tmp_path / "m", weights=[0.7, 0.4], method=method)
    wanted = outputs(*pair, weights=(0.7, 0.4))
    assert apart(wanted, outputs(tmp_path / "m")) < 1e-10


def checkpoint(base: Path) -> Path:
    base.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    (base / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.contiguous() for name, tensor in Convolutions().state_dict().items()}
    save_file(weights, base / "model.safetensors")
    return base


@pytest.mark.parametrize("method", ["ties", "dare", "della", "breadcrumbs", "sce"])
def test_a_rule_into_a_checkpoint_is_the_rule_on_the_folded_matrix(
    pair: tuple[Path, Path], method: str, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base")
    merge_into(pair, base, tmp_path / "m", weights=[0.7, 0.4], method=method)
    adapters = [flat(read(path)) for path in pair]
    whole = merge(adapters, weights=[0.7, 0.4], method=method, rank=24).adapter
    found = load_file(tmp_path / "m" / "model.safetensors")
    for module, delta in deltas(whole).items():
        change = (
            found[f"{module}.weight"] - load_file(base / "model.safetensors")[f"{module}.weight"]
        )
        assert change.numpy().reshape(delta.shape) == pytest.approx(delta, abs=1e-6)


def test_merged_into_a_checkpoint_it_is_what_peft_adds(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base")
    merge_into(pair, base, tmp_path / "m", weights=[0.7, 0.4])
    model = Convolutions()
    model.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))
    with torch.no_grad():
        assert apart(outputs(*pair, weights=(0.7, 0.4)), model(inputs())) < 1e-6


def test_a_convolution_and_a_linear_layer_are_not_merged(pair: tuple[Path, Path]) -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 24)), random.standard_normal((10, 2))
    update = Update("image", LazyTensor.of(a), LazyTensor.of(b), 1.0)
    with pytest.raises(IncompatibleBaseError, match="a convolution of 10 x 4 x 3 x 2"):
        merge([read(pair[0]), AdapterTensorSet.of([update], {})])


def test_grouped_convolutions_are_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.warns(UserWarning, match="groups > 1"):
        tuned = get_peft_model(cast("Any", model), LoraConfig(target_modules=["0"], r=4))
    tuned.save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError, match="0: is a convolution of 2 groups"):
        read(tmp_path / "a")


def test_factors_that_do_not_multiply_are_a_defect(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "a"
    convert(pair[0], path)
    stored = load(path)
    name = "base_model.model.image.lora_B.weight"
    save_file(
        {**stored, name: stored[name][:, :3].contiguous()}, path / "adapter_model.safetensors"
    )
    with pytest.raises(
        FormatError, match=r"image: ranks disagree, A is \[4, 4, 3, 2\], B is \[10, 3"
    ):
        convert(path, tmp_path / "b")


def test_axes_do_not_make_a_convolution() -> None:
    shapes = {Role.LORA_A: (4, 6, 3), Role.LORA_B: (10, 4, 1)}
    tensors = {
        TensorKey("line", role): LazyTensor.of(np.ones(shape)) for role, shape in shapes.items()
    }
    with pytest.raises(FormatError, match="not that of a factor of a linear layer"):
        audit(AdapterTensorSet(tensors=tensors, scales={"line": 1.0}))
    said = AdapterTensorSet(tensors=tensors, scales={}, kinds={"line": Kind.CONVOLUTION})
    assert audit(said).modules[0].shape == (10, 18)
