"""Checkpoints of training scripts: numpy's values and argparse's options are read and named."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from terminal import TINY

import adapterkit
from adapterkit.containers.torch_zip import read_torch_zip
from adapterkit.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path


SCALARS = {
    "float16": np.float16(1.5),
    "float32": np.float32(0.1),
    "float64": np.float64(1.5),
    "int8": np.int8(-3),
    "int64": np.int64(3),
    "uint32": np.uint32(4_000_000_000),
    "bool": np.bool_(True),  # noqa: FBT003  (a value)
    "big endian": np.dtype(">i4").type(7),
}


def saved(path: Path, value: object) -> Any:
    torch.save(value, path)
    return read_torch_zip(path).root


def test_scalars_are_the_numbers_that_they_are(tmp_path: Path) -> None:
    assert saved(tmp_path / "a.pt", SCALARS) == {n: v.item() for n, v in SCALARS.items()}


def test_options_and_arrays_are_data(tmp_path: Path) -> None:
    options = argparse.Namespace(lr=1e-4, steps=np.int64(3), inner=argparse.Namespace(a=1))
    root = saved(tmp_path / "a.pt", {"args": options, "losses": np.arange(3.0)})
    assert root["args"] == {"lr": 1e-4, "steps": 3, "inner": {"a": 1}}
    assert np.arange(3.0).tobytes() in root["losses"]


def test_a_scalar_without_its_bytes_is_malformed(tmp_path: Path) -> None:
    class Cut:
        def __reduce__(self) -> tuple[Any, ...]:
            return np.float64(1).__reduce__()[0], (np.dtype("f8"), b"1234")

    with pytest.raises(FormatError, match="a numpy scalar of 4 bytes that is f8"):
        saved(tmp_path / "a.pt", {"loss": Cut()})


@pytest.mark.parametrize("place", ["model", ""])
def test_a_checkpoint_of_a_script_is_the_adapter_in_it(place: str, tmp_path: Path) -> None:
    tensors = adapterkit.torch.to_state_dict(adapterkit.read(TINY))[0]
    beside = {"args": argparse.Namespace(lr=1e-4), "best_val_loss": np.float64(1.5)}
    torch.save({place: tensors, **beside} if place else tensors | beside, tmp_path / "a.pt")
    report = adapterkit.inspect(tmp_path / "a.pt", alpha=8)
    assert report.modules == 6
    note = "2 values left out: state of the training run (args and best_val_loss)"
    assert note in "; ".join(map(str, report.notes)).replace("args, best", "args and best")
