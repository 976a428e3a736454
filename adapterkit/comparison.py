"""Two adapters of any formats compared, with a diagnosis where the difference has a known cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.base import BaseModel
from adapterkit.diagnosis import diagnose
from adapterkit.errors import UncheckableError
from adapterkit.loading import Need, load_all
from adapterkit.model import AdapterTensorSet
from adapterkit.model.adapter import SETTINGS
from adapterkit.model.losses import other_tables
from adapterkit.page import natural, page, shown, table
from adapterkit.passes.declaration import settled
from adapterkit.passes.naming import missing_prefix
from adapterkit.passes.protocol import Context
from adapterkit.proof import Comparison, compare, tolerance_for
from adapterkit.text import PLAIN, Pen, Shown, columns, count, printable, short
from adapterkit.work import watchable

# Modules that are listed unless all are asked for.
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """How far one module's update in B is from that in A.

    Attributes:
        module: Hugging Face path.
        relative_error: ‖ΔW_B - ΔW_A‖ / ‖ΔW_A‖, Frobenius.
        cosine: of the two updates, None if one is zero.
        norm_ratio: ‖ΔW_B‖ / ‖ΔW_A‖, None if A's is zero.
    """

    module: str
    relative_error: float
    cosine: float | None
    norm_ratio: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class DiffReport(Shown):
    """Two adapters compared.

    Attributes:
        a: first path.
        b: second path.
        equal: whether every update agrees within `tolerance`, none is missing, and no setting
            gives the same tensors another meaning.
        tolerance: relative error that counts as equal.
        max_relative_error: largest error of a module that both have; None without any.
        modules: every module that both have, worst first.
        only_in_a: modules with an update in A alone.
        only_in_b: modules with an update in B alone.
        diagnosis: what explains the difference, one sentence each.
    """

    a: str
    b: str
    equal: bool
    tolerance: float
    max_relative_error: float | None
    modules: tuple[ModuleDifference, ...]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    diagnosis: tuple[str, ...] = ()
    _entries = "modules"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return the verdict, why, and the modules that differ most."""
        modules = count(len(self.modules), "module")
        verdict = "equal" if self.equal else "different"
        error = short(self.max_relative_error)
        lines = [f"{verdict}: {modules} compared, largest relative error {error}"]
        lines += map(printable, self.diagnosis)
        lines += [] if self.equal else _worst(self, pen)
        for name, alone in (("A", self.only_in_a), ("B", self.only_in_b)):
            lines += _shortened([f"only in {name}: {printable(each)}" for each in alone], pen)
        return "\n".join(lines)

    def page(self) -> str:
        """Return the comparison as one self-contained HTML page."""
        verdict = "equal" if self.equal else "different"
        rows = [
            (
                module.module,
                (short(module.relative_error), module.relative_error),
                (short(module.cosine), module.cosine),
                (short(module.norm_ratio), module.norm_ratio),
            )
            for module in sorted(self.modules, key=lambda module: natural(module.module))
        ]
        causes = "".join(f"<li>{shown(cause)}</li>" for cause in self.diagnosis)
        alone = "".join(
            f"<h2>Only in {name}</h2><ul><li>{'<li>'.join(map(shown, names))}</ul>"
            for name, names in (("A", self.only_in_a), ("B", self.only_in_b))
            if names
        )
        kind = "good" if self.equal else ""
        body = (
            f"<h1>{shown(self.a)} and {shown(self.b)}</h1>"
            f'<ul class="health"><li class="{kind}">{verdict}: largest relative error '
            f"{short(self.max_relative_error)}, of which {self.tolerance:.3g} counts as equal</li>"
            f"{causes}</ul><h2>Every module</h2>"
            + table(("module", "relative error", "cosine", "norm ratio"), rows)
            + alone
        )
        return page(f"Comparison: {self.a} and {self.b}", body)


def _worst(report: DiffReport, pen: Pen) -> list[str]:
    """Return a table of the modules that differ most; those that agree are left out."""
    # NaN is no agreement either.
    apart = [m for m in report.modules if not m.relative_error <= report.tolerance]
    if not apart:
        return []
    rows = [
        (
            module.module,
            short(module.relative_error),
            "-" if module.cosine is None else f"{module.cosine:.6f}",
            "-" if module.norm_ratio is None else f"{module.norm_ratio:.6g}",
        )
        for module in apart
    ]
    header = ("module", "relative error", "cosine", "norm ratio")
    first, *lines = columns(rows, header=header, pen=pen).split("\n")
    return ["", first, *_shortened(lines, pen)]


def _shortened(lines: list[str], pen: Pen) -> list[str]:
    shown = list(pen.shown(lines, _SHOWN))
    more = len(lines) - len(shown)
    return [*shown, f"and {more:,} more; --json or -v lists all"] if more else shown


@watchable
def diff(
    a: AdapterTensorSet | Path | str,
    b: AdapterTensorSet | Path | str,
    *,
    base: BaseModel | Path | str | None = None,
    tolerance: float | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    as_format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DiffReport:
    """Compare two adapters module by module, from factors alone.

    Args:
        a: the reference, of any format, or one in memory.
        b: the other.
        base: base model that both are for, where a format's row order or an initialisation that
            changed the base depends on it.
        tolerance: relative error that counts as equal; by default what rounding to the coarser of
            the two files' dtypes explains.
        dialect: key grammar of the hand-written one of the two, where its file cannot tell.
        alpha: scale numerator, where a file does not hold it.
        as_format: name of the format to read both as, where their content does not tell.
        progress: told how many modules of how many are done, stage by stage.

    Raises:
        FormatError: if a file is malformed or its factors do not pair up.
        LossyConversionError: if a file holds what its config denies.
        UncheckableError: if row orders differ, or the updates are those of another base, and no
            base is known to undo that.
    """
    del progress  # told by `watchable`
    one, other = load_all(
        [a, b], base=base, dialect=dialect, alpha=alpha, as_format=as_format, need=Need.FITTED
    )
    first, second = (settled(each.adapter, Context()).adapter for each in (one, other))
    _check_comparable(first, second)
    first, second, spelling = _spelled_alike(first, second)
    comparison = compare(first, second, other_tables([*one.losses, *other.losses]))
    _check_plain(first, second, comparison)
    stored = (t.dtype for adapter in (first, second) for t in adapter.tensors.values())
    allowed = tolerance_for(stored) if tolerance is None else tolerance
    settings = tuple(_other_settings(first, second))
    causes = diagnose(first, second, comparison, one.options)
    report = _report(one.label, other.label, comparison, allowed, settings, causes)
    return replace(report, diagnosis=(*spelling, *report.diagnosis))


def _spelled_alike(
    first: AdapterTensorSet, second: AdapterTensorSet
) -> tuple[AdapterTensorSet, AdapterTensorSet, tuple[str, ...]]:
    """Return two adapters with one name for each module, where one alone has a prefix; say so."""
    prefix = missing_prefix(first.modules, second.modules)
    if not prefix:
        return first, second, ()
    longer = any(name.startswith(prefix) for name in first.modules)
    short = second if longer else first
    spelled = short.renamed({name: prefix + name for name in short.modules})
    said = (
        f"names: {'B' if longer else 'A'} leaves out {prefix!r} before every module, as a model "
        "without its head has them; what looks for the very path finds one of the two"
    )
    return (first, spelled, (said,)) if longer else (spelled, second, (said,))


def _check_comparable(first: AdapterTensorSet, second: AdapterTensorSet) -> None:
    layouts = [adapter.engine_layout for adapter in (first, second)]
    alone = set(layouts[0]) ^ set(layouts[1])
    if alone:
        raise UncheckableError(
            "is in llama.cpp's layout in one of the two; give the base model with --base",
            where=min(alone),
        )


def _check_plain(first: AdapterTensorSet, second: AdapterTensorSet, comparison: Comparison) -> None:
    """Refuse to measure B · A where it is not the update; what is the same is the same anyway."""
    inits = [adapter.initialisation for adapter in (first, second)]
    alike = inits[0] == inits[1] and comparison.worst[1] == 0
    if any(inits) and not alike:
        raise UncheckableError(
            f"init_lora_weights = {inits[0] or inits[1]!r} changed the base, so B · A is not the "
            "update; give the original base's directory with --base"
        )


def _other_settings(first: AdapterTensorSet, second: AdapterTensorSet) -> Iterator[str]:
    """Say which settings differ; initialisations do so in their updates, or are refused."""
    for field, name in SETTINGS.items():
        values = [adapter.settings.get(name) for adapter in (first, second)]
        if field != "initialisation" and values[0] != values[1]:
            yield f"{name} differs: {values[0] or 'none'} and {values[1] or 'none'}"


def _report(
    a: str,
    b: str,
    comparison: Comparison,
    allowed: float,
    settings: tuple[str, ...],
    causes: tuple[str, ...],
) -> DiffReport:
    worst, error = comparison.worst
    alone = bool(comparison.only_in_first or comparison.only_in_second)
    equal = not (alone or settings) and error <= allowed
    modules = [
        ModuleDifference(name, found.relative_error, found.cosine, found.norm_ratio)
        for name, found in comparison.differences.items()
    ]
    # NaN sorts first, as the worst there is.
    modules.sort(key=lambda m: (m.relative_error == m.relative_error, -m.relative_error))
    return DiffReport(
        a=a,
        b=b,
        equal=equal,
        tolerance=allowed,
        max_relative_error=error if worst is not None else None,
        modules=tuple(modules),
        only_in_a=comparison.only_in_first,
        only_in_b=comparison.only_in_second,
        diagnosis=() if equal else (*settings, *causes),
    )
