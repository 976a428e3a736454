"""What an MLX-LM adapter_config.json says of the tensors beside it.

mlx-lm saves all its training arguments; `num_layers`, `fine_tune_type` and `lora_parameters` are
what its loader reads (mlx_lm/tuner/utils.py, load_adapters).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapterkit.errors import UnsupportedError
from adapterkit.formats.mlx.spelling import in_block
from adapterkit.tables import TEXT, Table, listed, number, shown, whole

if TYPE_CHECKING:
    from adapterkit.notes import BaseReference


_RANK = whole(0, 1 << 20, integral=True)
_COUNT = whole(-(1 << 20), 1 << 20)
_KEYS = listed(TEXT)


@dataclass(frozen=True, slots=True)
class MLXConfig:
    """An adapter_config.json of mlx-lm, unsloth or mlx-vlm.

    Attributes:
        raw: the whole document.
        path: the file, or the weights where there is none, for messages.
    """

    raw: Mapping[str, Any]
    path: Path

    def __post_init__(self) -> None:
        kind = self.fields.get("fine_tune_type", TEXT, "lora")
        if kind == "full":
            raise UnsupportedError(
                "fine_tune_type is full: the file holds whole weights, not an adapter; serve "
                "it as a model of its own",
                path=self.path,
            )
        if kind not in {"lora", "dora"}:
            raise UnsupportedError(
                f"fine_tune_type {shown(kind)} is unknown; known are lora and dora", path=self.path
            )

    @property
    def fields(self) -> Table:
        """The document, to be asked field by field."""
        return Table(self.raw, self.path)

    @property
    def base(self) -> str | None:
        """Hub id or path of the model, if stated."""
        return self.fields.optional("model", TEXT)

    @property
    def parameters(self) -> Table:
        """`lora_parameters`, empty if absent."""
        return self.fields.table("lora_parameters") or self.fields.inner("lora_parameters", {})

    @property
    def rank(self) -> int | None:
        """The one rank of all modules, if stated."""
        holder = self.parameters if "rank" in self.parameters.fields else self.fields
        return holder.optional("rank", _RANK)

    def denied_by(self, module: str, layers: int | None) -> str | None:
        """Return the field for which mlx-lm does not adapt a module; None if it may.

        Of its last `num_layers` blocks it adapts what `keys` name relative to the block, all where
        there are none, and of the whole model what they name in full.

        Args:
            module: MLX path.
            layers: blocks of the base; None if unknown: then no block is denied.
        """
        keys = self.parameters.optional("keys", _KEYS)
        if keys is not None and module in keys:
            return None
        place = in_block(module)
        if keys is not None and (place is None or place[2] not in keys):
            return "keys"
        count = self.fields.optional("num_layers", _COUNT)
        if place is None or layers is None or count is None or count <= 0:
            return None
        return "num_layers" if place[1] < layers - count else None

    @property
    def leaves_scale_open(self) -> bool:
        """Whether some rank has no scale, or two, by this config alone."""
        parameters = self.parameters.fields
        return "scale" not in parameters or "alpha" in parameters

    def scale(self, rank: int, alpha: float | None) -> float:
        """Return the multiplier of a · b.

        Args:
            rank: that of the module.
            alpha: given by the user, for a file that does not settle it: then alpha / rank.

        Raises:
            UnsupportedError: if the file does not settle it.
        """
        if alpha is not None:
            return alpha / rank
        scale = self.parameters.optional("scale", number())
        old = self.parameters.optional("alpha", number())
        if scale is None:
            raise UnsupportedError(self._without_scale(rank), path=self.path, needs="alpha")
        # mlx-lm multiplied by scale * alpha / rank until June 2024 and ignores alpha since. The
        # count of layers got its present name later, so a file that uses it is of the second kind.
        if old is not None and old != rank and "num_layers" not in self.raw:
            raise UnsupportedError(
                f"has scale {scale:g} and alpha {old:g}: mlx-lm before June 2024 multiplied by "
                f"both (--alpha {scale * old:g}), later versions by the scale alone "
                f"(--alpha {scale * rank:g}); choose with --alpha",
                path=self.path,
                needs="alpha",
            )
        return scale

    def _without_scale(self, rank: int) -> str:
        alpha = self.fields.optional("alpha", number())
        if alpha is None:
            return "holds no scale; give scale times rank with --alpha"
        return (
            f"has alpha {alpha:g} and no scale: mlx-vlm multiplied by alpha itself "
            f"(--alpha {alpha * rank:g}), later by alpha / rank (--alpha {alpha:g}); choose with "
            "--alpha"
        )


def targeting(modules: Collection[str], layers: int | None) -> tuple[int, list[str]]:
    """Return `num_layers` and `keys` with which mlx-lm adapts exactly these modules.

    Its loader goes over the last `num_layers` blocks and adapts what a key names relative to the
    block, then over the whole model and adapts what a key names in full. Relative keys say it where
    the same names are adapted in all of the last blocks: they are what users write and what other
    readers of the format know. Anything else takes full paths, which hold for no other module.
    A module that is adapted without a tensor in the file keeps b = 0 and changes nothing, so where
    the number of blocks is unknown all of them (-1) is right for every model.

    Args:
        modules: MLX paths.
        layers: blocks of the base, if known.
    """
    names: dict[str, set[int]] = {}
    blocks: set[str] = set()
    outside: list[str] = []
    for module in modules:
        if place := in_block(module):
            blocks.add(place[0])
            names.setdefault(place[2], set()).add(place[1])
        else:
            outside.append(module)
    spans = {frozenset(span) for span in names.values()}
    if len(spans) == 1 and len(blocks) == 1:
        span = sorted(spans.pop())
        if layers is not None and span == list(range(span[0], layers)):
            return layers - span[0], [*sorted(names), *sorted(outside)]
        if layers is None and span == list(range(len(span))):
            return -1, [*sorted(names), *sorted(outside)]
    return -1 if layers is None else layers, sorted(modules)


def written(
    source: Mapping[str, Any],
    base: BaseReference,
    *,
    dora: bool,
    parameters: Mapping[str, Any],
    layers: int,
) -> dict[str, Any]:
    """Return the adapter_config.json to write; an MLX source's other arguments are kept."""
    config = {"model": base.name, **source} if base.name else dict(source)
    old = source.get("lora_parameters")
    kept = cast("dict[str, Any]", old) if isinstance(old, dict) else {}
    kept = {"dropout": 0.0, **{name: kept[name] for name in ("dropout",) if name in kept}}
    return {
        **config,
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": {**kept, **parameters},
    }
