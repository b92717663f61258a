"""Archives of torch: tensors are read as they were, and nothing that a file names is ever run."""

import collections
import io
import os
import pickle
import pickletools
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from kvjax import torch_file
from kvjax.errors import UserError
from kvjax.torch_file import read_torch

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "bool": "BoolStorage",
}


def _fake(module, name):
    """A class that pickles under a name of torch's."""
    made = type(name, (), {"__module__": module, "__qualname__": name})
    setattr(sys.modules[module], name, made)
    return made


class Tensor:
    """A tensor of a flat storage, pickled as torch pickles it."""

    def __init__(self, storage, *, offset=0, sizes=None, strides=None, count=None, key=None):
        self.storage, self.offset, self.key = np.asarray(storage), offset, key
        self.sizes = (self.storage.size,) if sizes is None else sizes
        self.strides = (1,) * len(self.sizes) if strides is None else strides
        self.count = self.storage.size if count is None else count

    def __reduce__(self):
        function = sys.modules["torch._utils"]._rebuild_tensor_v2
        rest = (False, collections.OrderedDict())
        return function, (Storage(self), self.offset, self.sizes, self.strides, *rest)


class Storage:
    """What the pickler writes as a persistent id."""

    def __init__(self, tensor):
        self.tensor = tensor


class Pickler(pickle.Pickler):
    """Collects the storages that tensors refer to."""

    def __init__(self, file, storages, protocol=2):
        super().__init__(file, protocol=protocol)
        self.storages = storages

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        tensor, key = obj.tensor, str(len(self.storages))
        self.storages[key] = tensor.storage
        kind = getattr(sys.modules["torch"], STORAGES[tensor.storage.dtype.name])
        return ("storage", kind, tensor.key or key, "cpu", tensor.count)


@pytest.fixture
def torch(monkeypatch):
    """Modules of torch's names, for as long as a test writes."""
    for name in ("torch", "torch._utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name in (*STORAGES.values(), "StringStorage"):
        _fake("torch", name)
    _fake("torch._utils", "_rebuild_tensor_v2")


def write(path, content, *, folder="archive", protocol=2, order=b"little", data=None, compression=zipfile.ZIP_STORED):
    """An archive of an object, or of a pickle's own bytes."""
    buffer, storages = io.BytesIO(), {}
    if isinstance(content, bytes):
        buffer.write(content)
    else:
        Pickler(buffer, storages, protocol).dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", buffer.getvalue())
        archive.writestr(f"{folder}/byteorder", order)
        for key, storage in (data or storages).items():
            archive.writestr(f"{folder}/data/{key}", storage.tobytes())
    return path


def refusal(path):
    """The message of a refusal, which is one line."""
    with pytest.raises(UserError) as caught:
        read_torch(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path} cannot be read as tensors (")
    assert "nothing in it was run. Expected is a file that torch.save wrote" in message
    return message


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("kvzip.qwen2.5-7b-scbench_qa_eng-0.pt", (28, 4), "bfloat16"),
        ("kvzip.qwen2.5-14b-scbench_qa_eng-0.pt", (48, 8), "bfloat16"),
        ("kvzip.llama3.1-8b-scbench_qa_eng-0.pt", (32, 8), "float16"),
        ("kvzip.duo-scbench_qa_eng-0.pt", (32, 8), "float16"),
    ],
)
def test_real_head_scores(shared_data, name, shape, dtype):
    path = shared_data / "head-patterns" / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the tree")
    table = read_torch(path)
    assert (table.shape, table.dtype.name) == (shape, dtype)
    wide = table.astype(np.float32)
    assert 0 <= wide.min() < wide.max() <= 1.01
    with zipfile.ZipFile(path) as archive:
        (data,) = [archive.read(entry) for entry in archive.namelist() if entry.endswith("/data/0")]
    np.testing.assert_array_equal(table.reshape(-1).view(np.uint16), np.frombuffer(data, "<u2")[: table.size])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", STORAGES)
def test_tensors_of_every_dtype(tmp_path, torch, dtype, protocol):
    numbers = np.asarray([0, 1, 2.5, -3, 100, 1], dtype)
    content = {"a": Tensor(numbers, sizes=(2, 3), strides=(3, 1)), "b": [1, 2.5, "c", None, True, (3,)]}
    read = read_torch(write(tmp_path / "x.pt", content, protocol=protocol))
    assert read["a"].dtype == numbers.dtype
    np.testing.assert_array_equal(read["a"], numbers.reshape(2, 3))
    assert read["b"] == content["b"]


def test_strides_offsets_and_sizes(tmp_path, torch):
    """A transposed view, every other number, a scalar, an empty tensor, and one of a larger storage."""
    numbers = np.arange(24, dtype=np.float32)
    content = collections.OrderedDict(
        transposed=Tensor(numbers, sizes=(4, 6), strides=(1, 4)),
        spread=Tensor(numbers, offset=3, sizes=(5,), strides=(4,)),
        scalar=Tensor(numbers, offset=23, sizes=(), strides=()),
        empty=Tensor(numbers, sizes=(3, 0), strides=(1, 1)),
        small=Tensor(numbers, offset=2, sizes=(2, 2), strides=(6, 1), count=12),
    )
    read = read_torch(write(tmp_path / "x.pt", content, folder="a name with spaces"))
    assert list(read) == list(content)
    np.testing.assert_array_equal(read["transposed"], numbers.reshape(6, 4).T)
    np.testing.assert_array_equal(read["spread"], numbers[3::4][:5])
    np.testing.assert_array_equal(read["small"], [[2, 3], [8, 9]])
    assert (read["scalar"].shape, float(read["scalar"]), read["empty"].shape) == ((), 23.0, (3, 0))
    read["spread"][0] = -1  # an array of one's own
    assert read["transposed"][3, 0] == 3


def test_attributes_of_a_state_dict_are_left_out(tmp_path, torch):
    """As `Module.state_dict()` has them; they cannot replace a method either."""
    content = collections.OrderedDict(weight=Tensor(np.ones(2, np.float32)))
    content._metadata = {"": {"version": 1}}
    content.get = "none"
    read = read_torch(write(tmp_path / "x.pt", content))
    assert read.get("weight").tolist() == [1, 1]
    assert not hasattr(read, "_metadata")


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_nothing_is_executed(tmp_path, torch, protocol):
    target = tmp_path / "target"
    calls = [
        (os.system, f"touch {target}"),
        (eval, f"open({str(target)!r}, 'w')"),
        (exec, f"open({str(target)!r}, 'w')"),
        (open, str(target), "w"),
        (os.mkdir, str(target)),
        (__import__, "os"),
        (io.open, str(target), "w"),
        (np.save, str(target), 1),
    ]
    for index, (function, *arguments) in enumerate(calls):
        content = {"stats": [Tensor(np.ones(2, np.float32)), Calls(function, *arguments)]}
        message = refusal(write(tmp_path / f"{index}.pt", content, protocol=protocol))
        assert f"{function.__name__}, which is not read" in message
        assert not target.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "builtins getattr",
        "collections OrderedDict.__init__.__globals__",
        "collections namedtuple",
        "torch._utils _rebuild_tensor_v2.__globals__",
        "torch FloatStorage.dtype",
        "torch load",
        "torch.storage _load_from_bytes",
        "numpy dtype",
        "kvjax.torch_file pickle.loads",
        "os system",
    ],
)
def test_names_outside_the_list_are_refused(tmp_path, name):
    """Dotted names too, which a lookup by attributes would follow."""
    module, attribute = name.split(" ")
    short = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, attribute))
    for pickled in (b"\x80\x04" + short + b"\x93.", b"c" + name.replace(" ", "\n").encode() + b"\n."):
        assert f"it names {module}.{attribute}, which is not read" in refusal(write(tmp_path / "x.pt", pickled))
    newline = b"\x80\x04\x8c\x02os\x8c\x09sys\n\ntem!\x93."
    assert "names os.sys tem!" in refusal(write(tmp_path / "x.pt", newline))


REBUILD, STORAGE = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"


@pytest.mark.parametrize(
    "named", [REBUILD, STORAGE, b"ccollections\nOrderedDict\n"], ids=["rebuild", "storage", "dict"]
)
@pytest.mark.parametrize("slots", [False, True])
def test_a_file_cannot_change_what_reads_it(tmp_path, named, slots):
    """Attributes set on what the list has (opcode BUILD) are refused, and later files are read as before."""
    before = {name: dict(vars(value)) for name, value in vars(torch_file).items() if hasattr(value, "__dict__")}
    state = b"}(X\x0c\x00\x00\x00__defaults__K\x05X\x08\x00\x00\x00__call__K\x01X\x05\x00\x00\x00dtypeK\x01u"
    pickled = b"\x80\x02" + named + (b"(N" + state + b"t" if slots else state) + b"b."
    pickletools.dis(pickled, out=io.StringIO())
    refusal(write(tmp_path / "x.pt", pickled))
    after = {name: dict(vars(value)) for name, value in vars(torch_file).items() if hasattr(value, "__dict__")}
    assert after == before
    assert torch_file._rebuild.__defaults__ is None


ONES = np.ones(8, np.float32)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (Tensor(ONES, sizes=(9,), strides=(1,)), "a tensor reaches beyond its storage"),
        (Tensor(ONES, offset=1), "a tensor reaches beyond its storage"),
        (Tensor(ONES, sizes=(2, 2), strides=(7, 1)), "a tensor reaches beyond its storage"),
        (Tensor(ONES, offset=8, sizes=(), strides=()), "a tensor reaches beyond its storage"),
        (Tensor(ONES, sizes=(1 << 40,), strides=(0,)), "a tensor reaches beyond its storage"),
        (Tensor(ONES, sizes=(8, 8), strides=(0, 1)), "a tensor reaches beyond its storage"),
        (Tensor(ONES, sizes=(5,), strides=(1,), count=4), "a tensor reaches beyond its storage"),
        (Tensor(ONES, sizes=(-1,)), "sizes are no whole numbers"),
        (Tensor(ONES, strides=(-1,)), "sizes are no whole numbers"),
        (Tensor(ONES, offset=-1), "sizes are no whole numbers"),
        (Tensor(ONES, sizes=(2.0,), strides=(1,)), "sizes are no whole numbers"),
        (Tensor(ONES, sizes=("2",), strides=(1,)), "sizes are no whole numbers"),
        (Tensor(ONES, sizes=(1,), strides=(1 << 80,)), "too large"),
        (Tensor(ONES, sizes=(1 << 80, 0), strides=(1, 1)), ""),
        (Tensor(ONES, sizes=(2, 2), strides=(1,)), ""),
        (Tensor(ONES, sizes=7, strides=(1,)), ""),
        (Tensor(ONES, count=9), "storage 0 is shorter than it says"),
        (Tensor(ONES, count=-1), "storage 0 is shorter than it says"),
        (Tensor(ONES, count="8"), "storage 0 is shorter than it says"),
        (Tensor(ONES, key="7"), "no item named 'archive/data/7'"),
        (Tensor(ONES, key="../data.pkl"), "no item named"),
    ],
)
def test_tensors_that_are_none(tmp_path, torch, tensor, reason):
    assert reason in refusal(write(tmp_path / "x.pt", {"a": tensor}))


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02]",
        b"\x80\x63.",
        b"\x80\x02K\x01K\x02R.",  # a call of a number
        b"\x80\x02" + STORAGE + b"K\x01\x85R.",  # of a dtype
        b"\x80\x02" + REBUILD + b")R.",  # of a tensor, without arguments
        b"\x80\x02" + REBUILD + b"K\x01K\x00K\x01\x85K\x01\x85tR.",
        b"\x80\x02" + REBUILD + b"(K\x01K\x00K\x01\x85K\x01\x85tR.",  # a storage that is a number
        b"\x80\x02" + b"K\x01Q.",  # a reference that is a number
        b"\x80\x02(X\x06\x00\x00\x00moduleNNNNtQ.",
        b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x000X\x01\x00\x00\x000NK\x01tQ.",
        b"\x80\x02\x82\x01.",  # copyreg's extensions
        b"Pname\n.",
    ],
)
def test_broken_pickles(tmp_path, pickled):
    refusal(write(tmp_path / "x.pt", pickled, data={"0": ONES}))


def test_archives_that_are_none(tmp_path, torch):
    whole = write(tmp_path / "whole.pt", {"a": Tensor(ONES)})
    data = whole.read_bytes()
    for size in (0, 1, 30, len(data) // 2, len(data) - 1):
        (tmp_path / "x.pt").write_bytes(data[:size])
        refusal(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(data.replace(ONES.tobytes(), b"\x07" * ONES.nbytes))
    assert "CRC" in refusal(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": 1}))
    assert "not a zip file" in refusal(tmp_path / "x.pt")
    assert "No such file" in refusal(tmp_path / "none.pt")
    assert "Is a directory" in refusal(tmp_path)


def test_archives_of_another_kind(tmp_path, torch):
    for names in (["archive/model.json"], ["data.pkl"], ["a/data.pkl", "b/data.pkl"], []):
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
            for name in names:
                archive.writestr(name, pickle.dumps(1))
        assert "it holds no data.pkl" in refusal(tmp_path / "x.pt")
    assert "not little-endian" in refusal(write(tmp_path / "big.pt", {"a": Tensor(ONES)}, order=b"big"))
    bomb = write(tmp_path / "bomb.pt", {"a": Tensor(np.zeros(9999, np.float32))}, compression=zipfile.ZIP_DEFLATED)
    assert "it is compressed" in refusal(bomb)


def test_bfloat16_is_read_bit_for_bit(tmp_path, torch):
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    (read,) = read_torch(write(tmp_path / "x.pt", [Tensor(bits.view(ml_dtypes.bfloat16))]))
    np.testing.assert_array_equal(read.view(np.uint16), bits)
