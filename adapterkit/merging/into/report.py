"""What a merge into a base did; every field is a number, a text or a list of these."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from adapterkit.notes import Loss
from adapterkit.text import PLAIN, Pen, Shown, count, line, printable, short, size

# What shaped rounding is told by, and what each says of a tensor.
_MEASURES = (
    ("output_error", "what a layer's output is off by, as a share of what the adapter adds to it"),
    ("direction_error", "the same, if inputs were only what the adapter listens to"),
    ("survival", "how much of the update the stored weights hold"),
    ("noise", "the output error if inputs were anything, which they are not: it may grow"),
)
# Where rounding is shaped: the largest error along the adapter's own directions.
MOST_ERROR = 0.5
# Below this the error of the stored change says nothing.
_EXACT = 5e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestReport:
    """What nearest rounding would have left of the same update.

    Attributes:
        survival: as in `TensorReport`.
        noise: the same.
        direction_error: the same.
        output_error: the same.
    """

    survival: float
    noise: float
    direction_error: float
    output_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """One tensor of the base that was changed.

    Attributes:
        tensor: stored name.
        modules: adapter modules that went into it.
        stored: type in the base.
        dtype: type in the output.
        relative_norm: ‖ΔW‖ / ‖W‖, Frobenius; None where W is zero.
        survival: ⟨W' - W, ΔW⟩ / ‖ΔW‖², the share of the update that is still there in what was
            stored; None where ΔW is zero.
        rounding: `nearest` or `shaped`.
        noise: ‖(W' - W) - ΔW‖ / ‖ΔW‖, over all directions of the inputs alike; shaped rounding
            makes it larger.
        direction_error: the same along the inputs that the adapter listens to (the rows of A),
            which is what the model sees of it; None for nearest rounding.
        output_error: ‖((W' - W) - ΔW) h‖ / ‖ΔW h‖ for the inputs h of the text or imatrix, or of
            the tokens that the base draws: what the layer's output is off by, as a share of what
            the adapter adds to it; None where no inputs are known.
        nearest: what nearest rounding would have left, where rounding is shaped.
        quantised: ‖W - W₄‖ / ‖W‖, where W₄ are the quantised weights that the adapter was trained
            on, decoded; None where these are not at hand.
    """

    tensor: str
    modules: tuple[str, ...]
    stored: str
    dtype: str
    relative_norm: float | None
    survival: float | None
    rounding: str = "nearest"
    noise: float | None = None
    direction_error: float | None = None
    output_error: float | None = None
    nearest: NearestReport | None = None
    quantised: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MergeIntoReport(Shown):
    """A whole merge into a base.

    Attributes:
        sources: paths of the adapters.
        weights: one for each.
        base: path of the base.
        destination: path that was written.
        format: `safetensors` or `gguf`.
        tensors: every changed tensor, in the base's order.
        untouched: tensors of the base that no adapter changes; copied as bytes, unless the whole
            model is stored as another type.
        decoded: tensors that no adapter changes, and that were quantised.
        left_out: tensors of a quantised base that are about activations or the cache, and have no
            place in the output.
        bytes: size of the output.
        min_survival: smallest of the tensors; None where nothing was changed.
        max_noise: largest of the tensors, ‖(W' - W) - ΔW‖ / ‖ΔW‖, what the stored change is off by;
            above 1 the rounding is larger than the update, even where survival is 1.
        losses: what was dropped, with `allow_lossy`.
        warnings: what the user should know.
        notes: what was normalised on the way.
    """

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    base: str
    destination: str
    format: str
    tensors: tuple[TensorReport, ...]
    untouched: int
    bytes: int
    min_survival: float | None
    max_noise: float | None = None
    decoded: int = 0
    left_out: tuple[str, ...] = ()
    losses: tuple[Loss, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _entries = "tensors"

    def text(self, pen: Pen = PLAIN) -> str:
        """Return what was written, how large the update is, and what rounding left of it."""
        del pen
        written = line(
            self.destination,
            self.format,
            f"{count(len(self.tensors), 'tensor')} changed",
            f"{self.decoded:,} decoded" if self.decoded else "",
            f"{self.untouched:,} unchanged",
            size(self.bytes),
        )
        return "\n".join([written, self._update(), *self._shaped()])

    def _update(self) -> str:
        norms = [t.relative_norm for t in self.tensors if t.relative_norm is not None]
        low, high = (short(f(norms)) if norms else "-" for f in (min, max))
        said = f"‖ΔW‖/‖W‖ {low if low == high else f'{low} to {high}'}"
        if self.min_survival is None:
            return said
        worst = next(t for t in self.tensors if t.survival == self.min_survival)
        share = f"{min(max(self.min_survival, 0.0), 1.0):.1%}"
        where = "" if share == "100.0%" else f" ({printable(worst.tensor)})"
        kept = f"at least {share} of the update is left after rounding{where}"
        return f"{said}; {kept}{self._noise()}"

    def _noise(self) -> str:
        """Return what the stored change is off by, where rounding is to nearest."""
        found = [(t.noise, t.tensor) for t in self.tensors if t.noise and t.nearest is None]
        if not found:
            return ""
        noise, tensor = max(found)
        if noise < _EXACT:
            return f"; the change stored is within {_EXACT:.2%} of it"
        share = f"{noise:.1%}" if noise < 1 else f"{noise:.0%}"
        return f"; the change stored is off by up to {share} of it ({printable(tensor)})"

    def _shaped(self) -> list[str]:
        """Return what shaped rounding did, beside what nearest would have done."""
        shaped = [(t, t.nearest) for t in self.tensors if t.nearest is not None]
        if not shaped:
            return []
        found = ["shaped rounding, medians of the tensors:"]
        for name, meaning in _MEASURES:
            pairs = [(getattr(t, name), getattr(nearest, name)) for t, nearest in shaped]
            known = [(ours, other) for ours, other in pairs if None not in {ours, other}]
            if known:
                ours, other = (median(each) for each in zip(*known, strict=True))
                label = f"  {name.replace('_', ' ')} {ours:.0%} (nearest rounding {other:.0%})"
                found.append(f"{label}: {meaning}")
        return found
