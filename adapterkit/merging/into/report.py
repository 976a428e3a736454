"""What a merge into a base did; every field is a number, a text or a list of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NearestReport:
    """What nearest rounding would have left of the same update.

    Attributes:
        survival: as in `TensorReport`.
        noise: the same.
        direction_error: the same.
    """

    survival: float
    noise: float
    direction_error: float


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
    nearest: NearestReport | None = None
    quantised: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeIntoReport:
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
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
