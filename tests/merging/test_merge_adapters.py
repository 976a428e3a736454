"""Merging adapters in memory: what goes in, what is refused, and what the report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import merge_oracle as oracle
import ml_dtypes
import numpy as np
import pytest

from adapterkit import merge
from adapterkit.dtype import DType
from adapterkit.errors import (
    BaseRequiredError,
    FormatError,
    IncompatibleBaseError,
    UnsupportedError,
    UsageError,
)
from adapterkit.keys import Role, TensorKey
from adapterkit.model import Kind
from adapterkit.model.adapter import SETTINGS
from adapterkit.notes import BaseReference, Provenance
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from adapterkit.model import AdapterTensorSet

pytestmark = pytest.mark.slow

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
SHAPES = {Q: (12, 10), UP: (14, 10)}


def plain(seed: int, shapes: Any = SHAPES, rank: int = 3, **fields: Any) -> AdapterTensorSet:
    return oracle.adapter(oracle.random_parts(seed, shapes, rank, 0.5), **fields)


def named(adapter: AdapterTensorSet, name: str) -> AdapterTensorSet:
    return adapter.replace(provenance=Provenance(Path(name), "peft"))


def factors(array: Any, module: str, role: Role) -> dict[TensorKey, LazyTensor]:
    return {TensorKey(module, role): LazyTensor.of(np.asarray(array))}


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-6])
def test_the_measured_error_of_updates_that_cancel_is_the_true_one(share: float) -> None:
    parts = [oracle.random_parts(seed, {Q: (60, 50)}, 4, 0.5) for seed in (1, 2)]
    one = oracle.adapter(parts[0])
    first, second = (next(iter(oracle.adapter(each).pairs())) for each in parts)
    b = first.b.numpy() + share * second.b.numpy()
    near = one.updated([replace(first, b=LazyTensor.of(b))])
    result = merge([one, near], weights=[1.0, -1.0], dtype=DType.F32)
    true = oracle.deltas(one)[Q] - oracle.deltas(near)[Q]
    wanted = oracle.relative(oracle.deltas(result.adapter)[Q], true)
    assert result.report.max_measured_error == pytest.approx(wanted, rel=1e-2)
    assert 1e-8 < wanted < 1e-7


class TestWeights:
    def test_they_are_one_each_for_sums_and_shares_for_means(self) -> None:
        pair = [plain(1), plain(2)]
        assert merge(pair, method="linear").report.weights == (1.0, 1.0)
        assert merge(pair, method="slerp").report.weights == (0.5, 0.5)

    def test_they_are_not_normalised_unless_asked(self) -> None:
        pair = [plain(1), plain(2)]
        x, y = (oracle.deltas(one)[Q] for one in pair)
        once = oracle.deltas(merge(pair, weights=[3.0, -1.0]).adapter)[Q]
        assert oracle.relative(once, 3 * x - y) < 1e-12
        result = merge(pair, weights=[3.0, -1.0], normalize=True)
        assert oracle.relative(oracle.deltas(result.adapter)[Q], (3 * x - y) / 2) < 1e-12
        assert result.report.modules[0].weights == (1.5, -0.5)

    def test_a_pattern_gives_modules_their_own(self) -> None:
        pair = [plain(1), plain(2)]
        result = merge(pair, weights=[1.0, 1.0], module_weights=[{"q_proj": 0.25}, {}])
        x, y = (oracle.deltas(one) for one in pair)
        found = oracle.deltas(result.adapter)
        assert oracle.relative(found[Q], 0.25 * x[Q] + y[Q]) < 1e-12
        assert oracle.relative(found[UP], x[UP] + y[UP]) < 1e-12
        assert [module.weights for module in result.report.modules] == [(0.25, 1.0), (1.0, 1.0)]

    def test_the_first_pattern_that_matches_counts(self) -> None:
        patterns = {r"layers\.1\..*": 5.0, ".*_proj": 2.0}
        result = merge([plain(1)], module_weights=[patterns])
        assert [module.weights for module in result.report.modules] == [(2.0,), (5.0,)]

    def test_a_pattern_for_nothing_is_a_typo(self) -> None:
        with pytest.raises(UsageError, match=r"no module of adapter 1 matches .* 'k_proj'"):
            merge([plain(1)], module_weights=[{"k_proj": 2.0}])
        with pytest.raises(UsageError, match=r"'\(' is no regular"):
            merge([plain(1)], module_weights=[{"(": 2.0}])


class TestWhatIsMerged:
    def test_a_module_that_one_adapter_lacks_is_no_update_there(self) -> None:
        pair = [plain(1, {Q: SHAPES[Q]}), plain(2)]
        result = merge(pair, weights=[0.5, 0.5])
        assert (
            oracle.relative(oracle.deltas(result.adapter)[UP], 0.5 * oracle.deltas(pair[1])[UP])
            < 1e-12
        )
        assert result.report.modules[1].ranks == (0, 3)
        assert f"adapter 1 has no {UP}; taken as no update there" in result.report.warnings

    def test_or_an_error_if_wanted(self) -> None:
        with pytest.raises(UsageError, match=f"adapter 1 has no {UP}, and missing is error"):
            merge([plain(1, {Q: SHAPES[Q]}), plain(2)], missing="error")

    @pytest.mark.parametrize("method", ["svd", "cat", "slerp", "ties", "core", "tsv"])
    def test_experts_are_merged_one_by_one(self, method: str) -> None:
        stacks, singles = [], []
        for seed in (1, 2):
            parts = [oracle.random_parts(10 * seed + e, {Q: (9, 8)}, 2, 0.5)[Q] for e in range(3)]
            stack = tuple(np.stack([part[i] for part in parts]) for i in (0, 1))
            stacks.append(oracle.adapter({Q: (*stack, 0.5)}, kinds={Q: Kind.EXPERTS}))
            singles.append([oracle.adapter({Q: part}) for part in parts])
        options: dict[str, Any] = {"method": method, "weights": [0.6, 0.7]}
        if method == "ties":
            options |= {"rank": 8}
        found = oracle.deltas(merge(stacks, **options).adapter)[Q]
        assert found.shape == (3, 9, 8)
        for expert in range(3):
            pair = [singles[0][expert], singles[1][expert]]
            wanted = oracle.deltas(merge(pair, **options).adapter)[Q]
            assert oracle.relative(found[expert], wanted) < 1e-10

    @pytest.mark.parametrize("method", ["svd", "cat", "karcher", "knots", "ties", "linear-peft"])
    def test_an_embedding_is_merged_as_its_table(self, method: str) -> None:
        # The table is (vocabulary, width) = (20, 6), its factors B (6, r) and A (r, 20).
        module = "model.embed_tokens"
        turned, straight = [], []
        for seed in (1, 2):
            b, a, _ = oracle.random_parts(seed, {module: (6, 20)}, 3)[module]
            turned.append(oracle.adapter({module: (b, a, 0.5 * seed)}, embeddings=[module]))
            straight.append(oracle.adapter({module: (a.T, b.T, 0.5 * seed)}))
        options: dict[str, Any] = {"method": method, "weights": [0.6, 0.7]}
        if method == "ties":
            options |= {"rank": 6}
        merged = merge(turned, **options).adapter
        assert [key.role for key in merged.tensors] == [Role.EMBEDDING_A, Role.EMBEDDING_B]
        found = oracle.deltas(merged)[module]
        wanted = oracle.deltas(merge(straight, **options).adapter)[module]
        assert found.shape == (20, 6)
        if method != "linear-peft":  # whose split of the scale depends on the side
            assert oracle.relative(found, wanted) < 1e-10
        assert oracle.relative(
            found, oracle.weighted([oracle.deltas(one)[module] for one in turned], [0.6, 0.7])
        ) < 1e-10 or method not in {"svd", "cat"}

    def test_a_bias_of_b_is_summed_with_its_scale(self) -> None:
        bias = np.arange(12.0)
        first = plain(1, tensors=factors(bias, Q, Role.LORA_BIAS))
        second = plain(2, {UP: SHAPES[UP]})
        result = merge([first, second], weights=[0.7, 0.3])
        merged = result.adapter
        assert merged.scales == {Q: 2.0, UP: 1.0}
        key = TensorKey(Q, Role.LORA_BIAS)
        found = merged.scales[Q] * merged.tensors[key].numpy()
        np.testing.assert_allclose(found, 0.7 * 0.5 * bias, rtol=1e-12)
        # All modules have one or none: where there was none, zero is exact.
        assert not merged.tensors[TensorKey(UP, Role.LORA_BIAS)].numpy().any()
        assert result.report.beside[str(key)] == "weighted sum"
        with pytest.raises(UnsupportedError, match="slerp does not sum; use svd"):
            merge([first, second], method="slerp")

    def test_whole_parameters_are_averaged_when_their_weights_add_up(self) -> None:
        head = "lm_head.weight"
        pair = [
            plain(seed, tensors=factors(np.full((4, 3), float(seed)), head, Role.FULL))
            for seed in (1, 2)
        ]
        result = merge(pair, weights=[0.7, 0.3])
        found = result.adapter.tensors[TensorKey(head, Role.FULL)].numpy()
        np.testing.assert_allclose(found, 0.7 * 1 + 0.3 * 2, rtol=1e-12)
        with pytest.raises(UnsupportedError, match=r"adapter 1: lm_head.weight.full: .* to 2: "):
            merge(pair)
        with pytest.raises(UnsupportedError, match="ties is no weighted sum"):
            merge(pair, method="ties")

    def test_a_whole_parameter_of_one_adapter_is_copied_at_weight_one(self) -> None:
        head = TensorKey("lm_head.weight", Role.FULL)
        values = np.ones((4, 3), dtype=ml_dtypes.bfloat16)
        pair = [plain(1, tensors={head: LazyTensor.of(values)}), plain(2)]
        result = merge(pair, weights=[1.0, 0.3], method="ties")
        assert result.adapter.tensors[head].dtype is DType.BF16
        assert result.report.beside[str(head)] == "copied from adapter 1"
        with pytest.raises(UnsupportedError, match=r"add up to 0\.5"):
            merge(pair, weights=[0.5, 0.5])

    def test_token_rows_need_the_same_tokens(self) -> None:
        rows = factors(np.ones((2, 3)), "model.embed_tokens", Role.TOKEN_ROWS)

        def holder(*tokens: int) -> AdapterTensorSet:
            return plain(1, tensors=rows, token_indices=tokens)

        merged = merge([holder(5, 6), holder(5, 6)], weights=[0.5, 0.5]).adapter
        assert merged.token_indices == (5, 6)
        with pytest.raises(UnsupportedError, match="rows of other tokens than adapter 1"):
            merge([holder(5, 6), holder(5, 7)], weights=[0.5, 0.5])

    def test_token_rows_of_two_modules_are_no_rows_of_one_list(self) -> None:
        """The tokens of both would have to be kept, and where tables are tied say another thing."""
        embedding = factors(np.ones((2, 3)), "model.embed_tokens", Role.TOKEN_ROWS)
        output = factors(np.ones((1, 3)), "lm_head", Role.TOKEN_ROWS)
        pair = [
            plain(1, tensors=embedding, token_indices=(5, 6)),
            plain(2, tensors=output, token_indices={"lm_head": (7,)}),
        ]
        for adapters in (pair, pair[::-1]):
            with pytest.raises(UnsupportedError, match="rows of other tokens than adapter 1"):
                merge(adapters)
        named = plain(3, tensors=embedding, token_indices={"embed_tokens": (5, 6)})
        assert merge([pair[0], named], weights=[0.5, 0.5]).adapter.token_indices == (5, 6)

    def test_the_weight_of_a_module_is_that_of_its_whole_parameters_too(self) -> None:
        keys = [TensorKey(f"lm_head.{name}", Role.FULL) for name in ("weight", "bias")]
        pair = [
            plain(seed, tensors={key: LazyTensor.of(np.full((4, 3), float(seed))) for key in keys})
            for seed in (1, 2)
        ]
        own = [{"lm_head": 1.0}, {"lm_head": 0.0}]
        merged = merge(pair, weights=[0.5, 0.5], module_weights=own).adapter
        assert all((merged.tensors[key].numpy() == 1).all() for key in keys)

    def test_what_the_base_owns_is_passed_on(self) -> None:
        copy = factors(np.ones((2, 3)), "model.embed_tokens", Role.BASE_COPY)
        result = merge([plain(1), plain(2, tensors=copy)])
        assert set(copy) <= set(result.adapter.tensors)

    def test_base_and_settings_travel(self) -> None:
        base = BaseReference(name="org/model", revision="1")
        replicated = ((0, 2), (1, 2))
        merged = merge([plain(1), plain(2, base=base)]).adapter
        assert merged.base == base
        pair = [plain(seed, layer_replication=replicated) for seed in (1, 2)]
        assert merge(pair).adapter.layer_replication == replicated


class TestRefusals:
    def refuse(
        self, error: type[Exception], message: str, *adapters: AdapterTensorSet, **more: Any
    ) -> None:
        with pytest.raises(error) as caught:
            merge([named(one, name) for one, name in zip(adapters, "ab", strict=True)], **more)
        assert str(caught.value).startswith(message)

    def test_another_shape(self) -> None:
        other = plain(2, {Q: (12, 11)})
        message = f"b: {Q}: updates 12 x 11, and 12 x 10 in a; are they made for the same model?"
        self.refuse(IncompatibleBaseError, message, plain(1), other)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("method", ["svd", "cat", "ties", "slerp", "core"])
    def test_what_is_not_finite(self, value: float, method: str) -> None:
        parts = oracle.random_parts(2, SHAPES, 3)
        parts[UP][1][0, 3] = value
        message = f"b: {UP}: A holds NaN or infinity"
        self.refuse(FormatError, message, plain(1), oracle.adapter(parts), method=method)

    def test_a_half(self) -> None:
        half = plain(2, tensors=factors(np.ones((3, 10)), "model.layers.2.x", Role.LORA_A))
        message = "b: model.layers.2.x.lora_A: has no lora_B beside it"
        self.refuse(FormatError, message, plain(1), half)

    def test_dora(self) -> None:
        dora = plain(2, tensors=factors(np.ones(12), Q, Role.MAGNITUDE))
        self.refuse(UnsupportedError, f"b: {Q}: has a DoRA magnitude", plain(1), dora)

    def test_an_initialisation_that_changed_the_base(self) -> None:
        pissa = plain(2, initialisation="pissa")
        self.refuse(UnsupportedError, "b: init_lora_weights = 'pissa'", plain(1), pissa)

    def test_other_bases(self) -> None:
        pair = [plain(s, base=BaseReference(name=n)) for s, n in ((1, "x/One"), (2, "x/Two"))]
        message = "b: is made for x/Two, and a for x/One; pass --any-base"
        self.refuse(IncompatibleBaseError, message, *pair)
        assert merge(pair, any_base=True).adapter.base.name == "x/One"

    @pytest.mark.parametrize("name", ["somewhere/llama-3-8b", "Llama 3 8B", "x\\Llama_3_8B/"])
    def test_but_spelling_is_no_other_base(self, name: str) -> None:
        pair = [plain(s, base=BaseReference(name=n)) for s, n in ((1, "x/Llama-3-8B"), (2, name))]
        assert merge(pair).report.modules

    @pytest.mark.parametrize("setting", ["layer_replication", "invocation_tokens"])
    def test_settings_that_not_all_have(self, setting: str) -> None:
        other = plain(2, **{setting: ((1, 2),)})
        shown = SETTINGS[setting]
        with pytest.raises(UnsupportedError, match=rf"^b: .*\({shown}\), and not all others do"):
            merge([named(plain(1), "a"), named(other, "b")])

    def test_rows_in_two_orders(self) -> None:
        engine = plain(1, engine_layout={Q: "blk.0.attn_q"})
        self.refuse(BaseRequiredError, f"a: {Q}: is in llama.cpp's row order", engine, plain(2))
        both = [engine, plain(2, engine_layout={Q: "blk.0.attn_q"})]
        assert merge(both).adapter.engine_layout == {Q: "blk.0.attn_q"}

    def test_the_same_modules_under_other_names(self) -> None:
        renamed = plain(2, {name.removeprefix("model."): shape for name, shape in SHAPES.items()})
        message = f"b: {Q.removeprefix('model.')}: no module is called as in a, which has {Q}"
        self.refuse(IncompatibleBaseError, message, plain(1), renamed)

    def test_disjoint_targets_are_fine(self) -> None:
        pair = [plain(1, {Q: SHAPES[Q]}), plain(2, {UP: SHAPES[UP]})]
        assert len(merge(pair).report.modules) == 2

    def test_parameters_that_only_end_alike_are_disjoint(self) -> None:
        norm = factors(np.ones(3), "model.norm.weight", Role.FULL)
        head = factors(np.ones((4, 3)), "lm_head.weight", Role.FULL)
        first = plain(1, {Q: SHAPES[Q]}, tensors=norm)
        merged = merge([first, plain(2, {UP: SHAPES[UP]}, tensors=head)]).adapter
        assert {*norm, *head} <= set(merged.tensors)

    def test_overflow_of_the_stored_type(self) -> None:
        large = oracle.adapter({Q: (np.full((12, 1), 1e5), np.full((1, 10), 1e5), 1.0)})
        with pytest.raises(UnsupportedError, match=f"{Q}: overflows F16; store it as f32"):
            merge([large], dtype=DType.F16)


class TestReport:
    def test_an_elementwise_rule_warns_of_the_energy_that_a_rank_loses(self) -> None:
        pair = [plain(1, {Q: (60, 50)}), plain(2, {Q: (60, 50)})]
        report = merge(pair, method="dare", density=0.2, seed=1).report
        module = report.modules[0]
        assert module.rank == 6
        assert module.retained_energy < 0.9
        assert module.retained_energy == pytest.approx(1 - module.predicted_error**2)
        assert f"{Q} {module.retained_energy:.0%} at rank 6" in report.warnings[-1]
        assert "knots or core" in report.warnings[-1]
        assert not merge(pair, method="dare", density=0.2, space="core-balanced").report.warnings

    @pytest.mark.parametrize("shape", [(60, 50), (300, 270), (270, 300)])
    @pytest.mark.parametrize("bound", [{"tol": 0.15}, {"energy": 0.96}, {"tol": 0}])
    def test_an_elementwise_rule_raises_the_rank_until_the_error_is_kept(
        self, bound: dict[str, float], shape: tuple[int, int]
    ) -> None:
        pair = [plain(1, {Q: shape}), plain(2, {Q: shape})]
        report = merge(pair, method="ties", density=0.3, **bound).report
        allowed = bound.get("tol", 0.2)
        assert report.max_measured_error <= max(allowed, 1e-12)
        assert "modules need more than the sum of the ranks" in report.warnings[-1]
        if allowed:
            smaller = merge(
                pair, method="ties", density=0.3, rank=report.modules[0].rank - 1
            ).report
            assert smaller.max_measured_error > allowed

    def test_it_holds_the_settings(self) -> None:
        report = merge([plain(1), plain(2)], method="della", density=0.6, seed=7).report
        assert (report.method, report.space, report.seed) == ("della", "delta", 7)
        assert report.parameters == {"density": 0.6, "epsilon": 0.1}
        assert report.adapters == ("adapter 1", "adapter 2")
        assert not report.basis_dependent
        assert merge([plain(1), plain(2)], method="linear-peft").report.basis_dependent

    def test_totals_are_those_of_the_modules(self) -> None:
        report = merge([plain(1), plain(2)], rank=2).report
        assert report.max_predicted_error == max(m.predicted_error for m in report.modules)
        lost = sum(m.norm**2 * m.predicted_error**2 for m in report.modules)
        whole = sum(m.norm**2 for m in report.modules)
        assert report.retained_energy == pytest.approx(1 - lost / whole)


class TestStorage:
    def kinds(self, *dtypes: Any, method: str = "svd", weights: Any = None) -> set[DType]:
        adapters = []
        for seed, dtype in enumerate(dtypes):
            parts = oracle.random_parts(seed, {Q: SHAPES[Q]}, 3)
            adapters.append(
                oracle.adapter(
                    {m: (b.astype(dtype), a.astype(dtype), s) for m, (b, a, s) in parts.items()}
                )
            )
        merged = merge(adapters, method=method, weights=weights).adapter
        return {tensor.dtype for tensor in merged.tensors.values()}

    def test_the_widest_source_decides(self) -> None:
        bf16, f16, f32, f64 = ml_dtypes.bfloat16, np.float16, np.float32, np.float64
        assert self.kinds(bf16, bf16) == {DType.BF16}
        assert self.kinds(f16, f16) == {DType.F16}
        assert self.kinds(bf16, f16) == {DType.F32}
        assert self.kinds(bf16, f32) == {DType.F32}
        assert self.kinds(f32, f64) == {DType.F64}
        assert self.kinds(ml_dtypes.float8_e4m3fn) == {DType.F32}

    def test_cat_keeps_bits_and_widens_b_where_a_weight_would_be_rounded(self) -> None:
        bf16 = ml_dtypes.bfloat16
        assert self.kinds(bf16, bf16, method="cat") == {DType.BF16}
        assert self.kinds(bf16, bf16, method="cat", weights=[0.7, 1]) == {DType.BF16, DType.F32}

    def test_one_alpha_serves_all_modules(self) -> None:
        # Ranks 6 and 3, so scales 1 and 2: alpha = scale · rank is one number.
        pair = [plain(1), plain(2, {Q: SHAPES[Q]})]
        merged = merge(pair).adapter
        assert {pair.rank: pair.scale for pair in merged.pairs()} == {6: 1.0, 3: 2.0}
        assert {pair.rank * pair.scale for pair in merged.pairs()} == {6.0}

    def test_a_given_rank_is_the_rank_of_all(self) -> None:
        pair = [plain(1), plain(2, {Q: SHAPES[Q]})]
        merged = merge(pair, rank=5).adapter
        assert {(pair.rank, pair.scale) for pair in merged.pairs()} == {(5, 1.0)}

    def test_rounding_shows_in_the_measured_error_only(self) -> None:
        module = merge([plain(1)], dtype=DType.BF16).report.modules[0]
        assert module.predicted_error == 0
        assert 1e-4 < module.measured_error < 1e-2

    def test_a_merged_adapter_does_not_change_when_it_is_read_twice(self) -> None:
        merged = merge([plain(1), plain(2)]).adapter
        for tensor in merged.tensors.values():
            assert bytes(tensor.tobytes()) == bytes(tensor.tobytes())
