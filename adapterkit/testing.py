"""Checks for formats: what an adapter has is written, or named as a loss; nothing else.

The author of a plug-in runs them in a test of their own; adapterkit's own formats pass them too.

    from adapterkit.testing import check_format

    def test_my_format(tmp_path):
        check_format(MY_FORMAT, tmp_path)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.formats.builtin import BUILTIN
from adapterkit.formats.protocol import FormatOptions
from adapterkit.formats.spec import FormatSpec
from adapterkit.keys import Role, TensorKey
from adapterkit.model import AdapterTensorSet, BesideFile, BesideKind, Kind, Update
from adapterkit.model.defects import problems
from adapterkit.notes import BaseReference
from adapterkit.proof import prove
from adapterkit.tensor import LazyTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# What belongs to the file that was read, and to no other.
OF_THE_FILE = frozenset({"source", "provenance"})
_TABLE, _QUERY = "model.embed_tokens", "model.layers.0.self_attn.q_proj"
_SEED, _RANK, _WIDTH, _VOCABULARY = 0, 4, 8, 16


def small_adapter() -> AdapterTensorSet:
    """Return LoRA of rank 4 on two projections of width 8 of a model with 16 tokens, in float32."""
    import numpy as np

    draw = np.random.default_rng(_SEED).standard_normal
    updates = [
        Update(
            module,
            LazyTensor.of(draw((_RANK, _WIDTH)).astype(np.float32)),
            LazyTensor.of(draw((_WIDTH, _RANK)).astype(np.float32)),
            2.0,
        )
        for module in (_QUERY, _QUERY.replace("q_proj", "v_proj"))
    ]
    return AdapterTensorSet(tensors={}, scales={}).updated(updates)


def variants(folder: Path) -> Mapping[str, Callable[[AdapterTensorSet], AdapterTensorSet]]:
    """Return, by field of `AdapterTensorSet`, how an adapter is made to have something in it.

    Args:
        folder: where the file may be put that lies beside an adapter.
    """
    return {
        "tensors": _with_saved_module,
        "scales": lambda adapter: adapter.replace(scales=dict.fromkeys(adapter.scales, 0.75)),
        "kinds": _with_convolution,
        "base": lambda adapter: adapter.replace(base=BaseReference(name="org/name")),
        "initialisation": lambda adapter: adapter.replace(initialisation="pissa"),
        "layer_replication": lambda adapter: adapter.replace(layer_replication=((0, 1), (0, 2))),
        "invocation_tokens": lambda adapter: adapter.replace(invocation_tokens=(5, 6)),
        "token_indices": _with_token_rows,
        "pooled_inputs": lambda adapter: adapter.replace(pooled_inputs=2),
        "tied": _with_tied_table,
        "engine_layout": lambda adapter: adapter.replace(engine_layout={_QUERY: "blk.0.attn_q"}),
        "rank_conflicts": lambda adapter: adapter.replace(
            rank_conflicts={_first(adapter): (_RANK + 1, _RANK)}
        ),
        "unstored": lambda adapter: adapter.replace(unstored={"use_dora": (_first(adapter),)}),
        "undeclared": lambda adapter: adapter.replace(undeclared={"use_dora": (_first(adapter),)}),
        "unplaced": lambda adapter: adapter.replace(
            unplaced={_first(adapter): "is no module of a model that is known"}
        ),
        "beside": lambda adapter: adapter.replace(beside=(_head(folder),)),
        "metadata": lambda adapter: adapter.replace(metadata={"ss_epoch": "3"}),
    }


def check_format(
    spec: FormatSpec,
    folder: Path,
    *,
    adapter: AdapterTensorSet | None = None,
    options: FormatOptions | None = None,
) -> None:
    """Check that a format writes every field of an adapter, or names it as a loss.

    Args:
        spec: the format, which can be read and written.
        folder: an empty directory to write into.
        adapter: one that the format holds whole; `small_adapter` by default.
        options: `base` where the format needs one.

    Raises:
        AssertionError: names the field and what became of it.
    """
    adapter = adapter or small_adapter()
    options = options or FormatOptions()
    check_round_trip(spec, folder / "plain", adapter=adapter, options=options)
    for field in variants(folder):
        check_field(spec, field, folder / field, adapter=adapter, options=options)


def check_round_trip(
    spec: FormatSpec, folder: Path, *, adapter: AdapterTensorSet, options: FormatOptions
) -> None:
    """Check that an adapter comes back with the same update, and is told by what was written."""
    path = _destination(spec, folder)
    lost = [loss for loss in spec.losses(adapter, options) if loss.blocks]
    _hold(not lost, f"{spec.name} cannot hold the plain adapter: {lost}")
    again = _written(spec, adapter, path, options)
    prove(adapter, again, path=path)
    if spec.name not in {known.name for known in BUILTIN}:
        from adapterkit.registry import claims

        _hold(claims(spec, path), f"{spec.name} does not recognise what it wrote")
    twice = _written(spec, again, _destination(spec, folder / "twice"), options)
    _hold(type(twice.source) is type(again.source), "it has another source when written again")


def check_field(
    spec: FormatSpec, field: str, folder: Path, *, adapter: AdapterTensorSet, options: FormatOptions
) -> None:
    """Check that one field of an adapter is held by a format, or named as a loss."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = variants(folder)[field](adapter)
    _hold(getattr(changed, field) != getattr(adapter, field), f"{field} is not changed")
    lost = set(spec.losses(changed, options)) - set(spec.losses(adapter, options))
    named = lost and field in {"metadata", "base"}  # left out without asking, which is said
    if any(loss.blocks for loss in lost) or named or problems(changed):
        return  # refused, by the format or as broken before any format is asked
    if field == "pooled_inputs":  # decided by the base where there is one
        again = _written(spec, changed, _destination(spec, folder), options, FormatOptions())
        _hold(again.pooled_inputs == changed.pooled_inputs, f"{spec.name} lost what is pooled")
        return
    if field == "engine_layout":  # undone by the base where there is one
        again = _written(spec, changed, _destination(spec, folder), options, FormatOptions())
        held = {name: again.engine_layout.get(name) for name in changed.engine_layout}
        _hold(held == changed.engine_layout, f"{spec.name} wrote rows in an order that is lost")
        return
    again = _written(spec, changed, _destination(spec, folder), options)
    if field == "tied" and not again.tied:  # under all its names: the same without a base
        prove(changed, again, path=folder)
        names = {name for table, others in changed.tied.items() for name in (table, *others)}
        _hold(names <= set(again.modules), f"{spec.name} wrote not all names of a tied table")
        return
    if field == "scales":  # may have gone into the factors
        prove(changed, again, path=folder)
        return
    held, wanted = _comparable(again, field), _comparable(changed, field)
    _hold(held == wanted, f"{spec.name} turned {field} {wanted!r} into {held!r}, and named no loss")


def _hold(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _written(
    spec: FormatSpec,
    adapter: AdapterTensorSet,
    path: Path,
    options: FormatOptions,
    reading: FormatOptions | None = None,
) -> AdapterTensorSet:
    spec.write(adapter, path, options)
    return spec.read(path, reading or options)


def _destination(spec: FormatSpec, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"adapter{next(iter(spec.suffixes), '')}"


def _comparable(adapter: AdapterTensorSet, field: str) -> Any:
    value = getattr(adapter, field)
    if field == "tensors":
        return {key: tensor.numpy().tolist() for key, tensor in value.items()}
    return value.name if field == "base" else value


def _first(adapter: AdapterTensorSet) -> str:
    return next(adapter.pairs()).module


def _head(folder: Path) -> BesideFile:
    path = folder / "value_head.bin"
    path.write_bytes(bytes(_VOCABULARY))
    return BesideFile(path.name, BesideKind.HEAD, "a trained value head", _VOCABULARY, path)


def _ones(*shape: int) -> LazyTensor:
    import numpy as np

    return LazyTensor.of(np.ones(shape, np.float32))


def _with_saved_module(adapter: AdapterTensorSet) -> AdapterTensorSet:
    return adapter.updated([], {TensorKey("score.weight", Role.FULL): _ones(3)})


def _with_convolution(adapter: AdapterTensorSet) -> AdapterTensorSet:
    update = Update("model.conv", _ones(2, 3, 4), _ones(5, 2, 1), 1.0, Kind.CONVOLUTION)
    return adapter.updated([update])


def _with_token_rows(adapter: AdapterTensorSet) -> AdapterTensorSet:
    rows = {TensorKey(_TABLE, Role.TOKEN_ROWS): _ones(2, _WIDTH)}
    return adapter.updated([], rows).replace(token_indices=(3, 5))


def _with_tied_table(adapter: AdapterTensorSet) -> AdapterTensorSet:
    factors = _ones(2, _VOCABULARY), _ones(_WIDTH, 2)
    table = Update(_TABLE, *factors, 1.0, Kind.EMBEDDING)
    return adapter.updated([table]).replace(tied={_TABLE: ("lm_head",)})
