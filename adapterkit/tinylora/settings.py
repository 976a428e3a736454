"""What the coefficients alone do not say: rank, scale, tie groups, seed and targets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from adapterkit.dtype import DType
from adapterkit.errors import UsageError
from adapterkit.tables import NAME, Kind, Table, listed, number, one_of, whole
from adapterkit.tinylora.groups import PACK_MODES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SETTINGS_FILE = "tinylora.json"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
# torch takes seeds of 64 bits; a module adds up to 99999.
_MAX_SEED = 1 << 62
_DTYPES = {"float32": DType.F32, "float16": DType.F16, "bfloat16": DType.BF16}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySettings:
    """How an ANRGUSC run was set up, by the names of its own configuration; None is unknown.

    Attributes:
        frozen_rank: singular triplets kept per module.
        projection_dim: u, coefficients per group.
        alpha: numerator of the scale, alpha / u.
        tie_mode: `none`, `all`, `tiled` or `structured`.
        tie_factor: modules that share one vector, in the last two modes.
        seed: of the projections.
        target_modules: last name components of the linear layers that were injected.
        dtype: type to which training rounded the base's weights, if not the stored one.
    """

    frozen_rank: int | None = None
    projection_dim: int | None = None
    alpha: float | None = None
    tie_mode: str | None = None
    tie_factor: int | None = None
    seed: int | None = None
    target_modules: tuple[str, ...] = TARGETS
    dtype: str | None = None

    @property
    def weights_dtype(self) -> DType | None:
        """The type that `dtype` names."""
        return _DTYPES[self.dtype] if self.dtype else None

    def document(self) -> dict[str, Any]:
        """Return the settings that are known, as `tinylora.json` holds them."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        return {**known, "target_modules": list(self.target_modules)}

    def updated(self, other: TinySettings) -> TinySettings:
        """Return these settings with what `other` knows filled in.

        Raises:
            UsageError: if both know something and do not agree.
        """
        changes: dict[str, Any] = {}
        for name in (item.name for item in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "target_modules" or theirs is None or mine == theirs:
                continue
            if mine is not None:
                raise UsageError(f"{name} is {mine!r} in one place and {theirs!r} in another")
            changes[name] = theirs
        return replace(self, **changes)

    def require(self, names: Iterable[str], *, path: Path) -> None:
        """Refuse to go on while one of the named settings is unknown.

        Raises:
            UsageError: naming them and where to state them.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise UsageError(
                f"the checkpoint does not hold {', '.join(missing)}; state what training used in "
                f'{SETTINGS_FILE} beside it, such as {{"frozen_rank": 2, "alpha": 1.0, '
                '"tie_mode": "tiled", "tie_factor": 13}',
                path=path,
                needs="alpha" if "alpha" in missing else "",
            )


def settings_from(document: Mapping[str, Any], path: Path) -> TinySettings:
    """Check the values of a settings document.

    Raises:
        FormatError: naming the key.
    """
    table = Table(document, path)
    table.only((*_KINDS, "schema", "witness"), "setting")
    found = {name: table.optional(name, kind) for name, kind in _KINDS.items()}
    return TinySettings(**{name: value for name, value in found.items() if value is not None})


SEED = whole(-_MAX_SEED, _MAX_SEED)
_TIE_MODE = one_of(*PACK_MODES)
_KINDS: dict[str, Kind[Any]] = {
    "frozen_rank": whole(1, 1 << 20),
    "projection_dim": whole(1, 1 << 32),
    "alpha": number(),
    "tie_mode": Kind(
        _TIE_MODE.expected,
        lambda value: _TIE_MODE.read(value.lower() if isinstance(value, str) else value),
    ),
    "tie_factor": whole(1, 1 << 32),
    "seed": SEED,
    "target_modules": listed(NAME),
    "dtype": one_of(*_DTYPES),
}
