"""What a base and an adapter should answer, and what the usual mistakes would."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from adapterkit.architectures.transforms import inverse, rope
from adapterkit.doctor.llama import llama_cpp
from adapterkit.factors import take_rows
from adapterkit.loading import Need, load
from adapterkit.registry import spec
from adapterkit.saving import admitted, save

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Mapping, Sequence

    from adapterkit.base import BaseModel
    from adapterkit.doctor.distributions import Distribution, Expected
    from adapterkit.doctor.llama import Ask
    from adapterkit.loading import Loaded
    from adapterkit.model import AdapterTensorSet, Update

# Strength of what is not asked for in full.
_ONE = 1.0
# Projections whose rows llama.cpp has in another order, and the sizes that tell how many heads.
_HEADS = {"q_proj": "heads", "k_proj": "kv_heads"}


class Reference:
    """An adapter on its base, as the engine of the base's kind runs it."""

    def __init__(self, loaded: Loaded, base: BaseModel, *, by_text: bool) -> None:
        """Describe a reference; nothing is run yet.

        Args:
            loaded: the adapter, fitted to the base.
            base: GGUF file, or directory of Hugging Face.
            by_text: whether tokens are told by their text, not by their number.
        """
        self._loaded = loaded
        self._base = base
        self._by_text = by_text

    @contextmanager
    def expected(self, prompts: Sequence[str]) -> Generator[Expected]:
        """Yield what it answers at a strength.

        Raises:
            UncheckableError: if the engine is not installed, or does not take the files.
            UnsupportedError: if the adapter cannot be written for the engine.
        """
        if self._base.kind == "gguf":
            with self._engine([self._loaded.adapter]) as ask:
                yield lambda strength: [ask(prompt, {0: strength}) for prompt in prompts]
            return
        from adapterkit.doctor.transformers import transformers_model

        with TemporaryDirectory(prefix="adapterkit-") as folder:
            path = Path(folder) / "adapter"
            self._write(self._loaded.adapter, path, "peft")
            place = self._base.path if self._base.path.is_dir() else self._base.path.parent
            with transformers_model(place, path, by_text=self._by_text) as ask:
                yield lambda strength: [ask(prompt, strength) for prompt in prompts]

    def mistaken(self, prompts: Sequence[str]) -> Mapping[str, Sequence[Distribution]]:
        """Return what the usual mistakes would answer, by what they are.

        They are known for GGUF alone, where rows of q and k have another order and a missing tensor
        is no error.
        """
        if self._base.kind != "gguf":
            return {}
        wrong = dict(self._mistakes())
        with self._engine(list(wrong.values())) as ask:
            return {name: [ask(p, {i: _ONE}) for p in prompts] for i, name in enumerate(wrong)}

    def _mistakes(self) -> Generator[tuple[str, AdapterTensorSet]]:
        adapter = self._loaded.adapter
        leaves = {pair.module.rpartition(".")[2] for pair in adapter.pairs()}
        ordered = sorted(leaves & _HEADS.keys())
        for some in [*([ordered] if len(ordered) > 1 else []), *([leaf] for leaf in ordered)]:
            which = " and ".join(some)
            changed = _unordered(adapter, self._base, some)
            yield f"the rows of {which} are not in llama.cpp's order", changed
        for leaf in sorted(leaves) if len(leaves) > 1 else ():
            kept = {k: t for k, t in adapter.tensors.items() if k.module.rpartition(".")[2] != leaf}
            yield f"nothing of {leaf} is applied", adapter.replace(tensors=kept)

    @contextmanager
    def _engine(self, adapters: Sequence[AdapterTensorSet]) -> Generator[Ask]:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="adapterkit-")))
            files = [folder / f"{number}.gguf" for number in range(len(adapters))]
            for adapter, file in zip(adapters, files, strict=True):
                self._write(adapter, file, "gguf")
            engine = llama_cpp(self._base.path, files, by_text=self._by_text)
            yield stack.enter_context(engine)

    def _write(self, adapter: AdapterTensorSet, path: Path, name: str) -> None:
        target, options = spec(name), replace(self._loaded.options, unverified=True)
        ready = admitted(adapter, target, options, into=None)
        save(ready.adapter, path, target, options, making=None)


def reference(
    source: AdapterTensorSet | Path | str,
    base: BaseModel,
    *,
    by_text: bool,
    dialect: str | None,
    alpha: float | None,
    as_format: str | None,
) -> Reference:
    """Return the reference of an adapter on a base.

    Raises:
        FormatError: if the source is malformed or broken.
        UnsupportedError: if it does not fit the base.
    """
    loaded = load(
        source, base=base, dialect=dialect, alpha=alpha, as_format=as_format, need=Need.FITTED
    )
    return Reference(loaded, loaded.base or base, by_text=by_text)


def _unordered(
    adapter: AdapterTensorSet, base: BaseModel, leaves: Collection[str]
) -> AdapterTensorSet:
    """Return the adapter whose GGUF file has rows of q or k in Hugging Face's order."""
    heads = {leaf: base.sizes.get(_HEADS[leaf]) for leaf in leaves}
    changed: list[Update] = []
    for pair in adapter.pairs():
        count, rows = heads.get(pair.module.rpartition(".")[2]), pair.matrix_shape[0]
        if isinstance(count, int) and count > 0 and rows % (2 * count) == 0:
            changed.append(take_rows(pair, inverse(rope(rows, count))))
    return adapter.updated(changed)
