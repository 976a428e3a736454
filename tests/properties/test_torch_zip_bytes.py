"""Whatever torch saved is read bit by bit; whatever else is in a file ends in one of our errors."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.containers.torch_zip import TorchFile, flatten, read_torch_zip
from adapterkit.errors import AdapterKitError, FormatError
from adapterkit.tensor import LazyTensor
from fixtures.generators import torch_zip as build

pytestmark = pytest.mark.slow

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def bits(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    # Not contiguous(): it keeps the odd stride of an axis of size 1, which view() then refuses.
    dense = torch.clone(tensor.detach(), memory_format=torch.contiguous_format)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype and bits: whole, transposed, sliced, or a Parameter."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel() * dtype.itemsize
    if count:
        raw = bytearray(draw(st.binary(min_size=count, max_size=count)))
        if dtype is torch.bool:
            raw = bytearray(byte % 2 for byte in raw)
        tensor = torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    else:
        tensor = torch.empty(shape, dtype=dtype)
    tensor = tensor.permute(draw(st.permutations(range(tensor.ndim))))
    if tensor.ndim and draw(st.booleans()):
        start, step = draw(st.integers(0, 2)), draw(st.integers(1, 2))
        tensor = tensor[start::step]
    if dtype.is_floating_point and dtype.itemsize > 1 and draw(st.booleans()):
        tensor = torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.binary(max_size=6),
)
KEYS = st.one_of(st.text("ab.é", max_size=4), st.integers(0, 3))


@st.composite
def trees(draw: st.DrawFn) -> object:
    """Nested containers in which some tensors occur twice, or view one storage."""
    known = draw(st.lists(tensors(), min_size=1, max_size=3))
    known += [tensor.detach().t() for tensor in known if tensor.ndim == 2]
    leaves = st.one_of(st.sampled_from(known), st.sampled_from(known), SCALARS)
    containers = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(KEYS, inner, max_size=3),
            st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        ),
        max_leaves=8,
    )
    return draw(st.dictionaries(KEYS, containers, max_size=5))


def saved(value: object, protocol: int = 2) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def assert_same(ours: object, theirs: object) -> None:
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, LazyTensor)
        assert (str(ours.dtype), ours.shape) == (DTYPES[theirs.dtype], tuple(theirs.shape))
        assert bytes(ours.tobytes()) == bits(theirs)
    elif isinstance(theirs, dict):
        assert type(ours) is dict
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs)
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


@settings(max_examples=100, deadline=None)
@given(tree=trees(), protocol=st.integers(2, 5))
def test_whatever_torch_saves_is_read_bit_by_bit(tree: object, protocol: int) -> None:
    data = saved(tree, protocol)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(data)
        root = read_torch_zip(path).root
        assert_same(root, tree)
        assert_same(root, torch.load(io.BytesIO(data), weights_only=False))


SOUND = saved(
    {
        "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "half": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        "fp8": torch.zeros(4, dtype=torch.float8_e4m3fn),
        "config": {"targets": {"q_proj"}, "alpha": 16, "list": [1, 2.5, None, True]},
        "shape": torch.Size([2, 3]),
    }
)
# The part that is parsed: the pickle, and the list of members at the end.
PICKLED = pickle.dumps({"a": [1, 2.5, "x", None, (True, b"y")], "b": {1, 2}}, protocol=4)


def leaves(root: object) -> list[LazyTensor]:
    try:
        return list(flatten(root).values())
    except FormatError:  # two paths meet
        return []


def assert_ends_well(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(data)
        file = attempt(path)
        if isinstance(file, AdapterKitError):
            assert file.exit_code == 3
            return
        for tensor in leaves(file.root):
            assert tensor.nbytes <= len(data)
            tensor.numpy()


@st.composite
def mutations(draw: st.DrawFn, sound: bytes) -> bytes:
    """`sound` with a few bytes changed, cut or added."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change"] * 4 + ["cut", "add", "end"]))
        if kind == "change" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 8))]
        elif kind == "add":
            data[place:place] = draw(st.binary(max_size=8))
        else:
            del data[place + 1 :]
    return bytes(data)


@settings(max_examples=100, deadline=None)
@given(data=mutations(SOUND))
def test_a_damaged_file_ends_in_an_error_of_ours(data: bytes) -> None:
    assert_ends_well(data)


@settings(max_examples=100, deadline=None)
@given(pickled=mutations(build.state(weight=build.tensor())) | mutations(PICKLED))
def test_a_damaged_pickle_ends_in_an_error_of_ours(pickled: bytes) -> None:
    assert_ends_well(build.archive(pickled))


FRAGMENTS = st.sampled_from(
    [
        *(bytes([code]) for code in b"(.tRbQN)]}uaes\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94012lo"),
        *(build.get(0), build.put(0), build.get(1), build.put(1), build.text("a"), b"K\x02"),
        *(build.storage(), build.tensor(), build.number(-1), build.number(1 << 60)),
        build.name("collections", "OrderedDict"),
        build.name("torch._utils", "_rebuild_tensor_v2"),
        build.name("torch._utils", "_rebuild_tensor_v3"),
        build.name("torch._utils", "_rebuild_parameter"),
        build.name("torch._tensor", "_rebuild_from_type_v2"),
        *(build.name("torch", name) for name in ("Size", "device", "Tensor", "uint8")),
        *(build.name("builtins", name) for name in ("set", "frozenset", "bytearray", "bytes")),
        build.name("_codecs", "encode"),
        build.many(build.text("a"), build.text("latin1")),
    ]
)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(FRAGMENTS, max_size=40))
def test_random_opcodes_end_in_an_error_of_ours(parts: list[bytes]) -> None:
    assert_ends_well(build.archive(build.PROTO_2 + b"".join(parts) + build.STOP))


SIZES = st.integers(0, 3) | st.integers(-1, 7) | st.just(1 << 62)
# What we refuse and torch takes, by a part of the message.
STRICTER = ("repeats elements", "larger than memory", "impossible size")


@settings(max_examples=100, deadline=None)
@given(axes=st.lists(st.tuples(SIZES, SIZES), max_size=3), offset=st.integers(-1, 7))
def test_a_view_is_judged_as_torch_judges_it(axes: list[tuple[int, int]], offset: int) -> None:
    shape, stride = tuple(axis[0] for axis in axes), tuple(axis[1] for axis in axes)
    view = build.tensor(shape, stride, offset)
    data = build.archive(build.PROTO_2 + build.mapping(("w", view)) + build.STOP)
    try:
        theirs = torch.load(io.BytesIO(data), weights_only=True)["w"]
    except (RuntimeError, pickle.UnpicklingError):
        theirs = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(data)
        ours = attempt(path)
        if isinstance(ours, AdapterKitError):
            assert ours.where == "w"
            # torch lets a stride be negative where no second element is reached.
            stricter = min(stride, default=0) < 0 or any(part in ours.message for part in STRICTER)
            assert theirs is None or stricter
        else:
            assert_same(ours.tensors["w"], theirs)


def attempt(path: Path) -> TorchFile | AdapterKitError:
    try:
        return read_torch_zip(path)
    except AdapterKitError as error:
        return error


@settings(max_examples=50, deadline=None)
@given(begin=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05"]), rest=st.binary())
def test_random_bytes_end_in_an_error_of_ours(begin: bytes, rest: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        path.write_bytes(begin + rest)
        with pytest.raises(AdapterKitError):
            read_torch_zip(path)
