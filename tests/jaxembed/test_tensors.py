"""Weights on disk: what is read must be exactly what was written, and what is broken must be refused."""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from jaxembed.errors import CheckpointNotFoundError, CorruptCheckpointError, PickledCheckpointError
from jaxembed.tensors import Tensors

ARRAYS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4) - 5.5,
    "bias": np.array([1.5, -2.0, np.inf], np.float32),
    "half": np.array([[0.1, 65504.0]], np.float16),
    "double": np.array([1e300]),
    "ids": np.array([2**40, -1]),
    "bytes": np.arange(5, dtype=np.uint8),
    "flags": np.array([True, False]),
    "scalar": np.array(3.5, np.float32),
    "nothing": np.zeros((0, 4), np.float32),
}


def write(file: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file from its parts, right or wrong."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def index(folder: Path, weight_map: Any) -> None:
    """The index of a sharded checkpoint."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(tensors: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and bits."""
    assert set(tensors) == set(expected)
    assert len(tensors) == len(expected)
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype, name
        np.testing.assert_array_equal(tensors[name], array, strict=True)


def test_a_single_file(tmp_path: Path) -> None:
    """Every dtype, a scalar and an empty array, with the metadata that savers add."""
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(Tensors(tmp_path), ARRAYS)


def test_arrays_are_views_that_nobody_can_write_to(tmp_path: Path) -> None:
    """Nothing is copied into memory, and the file is safe from its readers."""
    save_file(ARRAYS, tmp_path / "model.safetensors")
    weight = Tensors(tmp_path)["weight"]
    assert not weight.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        weight[0, 0] = 1.0


def test_bfloat16(tmp_path: Path) -> None:
    """Bit for bit what torch wrote."""
    stored = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_torch_file({"weight": stored}, tmp_path / "model.safetensors")
    weight = Tensors(tmp_path)["weight"]
    assert weight.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weight.astype(np.float32), stored.float().numpy())


def test_empty_arrays_alone(tmp_path: Path) -> None:
    """A file with no bytes behind its header is whole."""
    empty = {"nothing": np.zeros((0, 4), np.float32), "none": np.zeros((3, 0), np.int64)}
    save_file(empty, tmp_path / "model.safetensors")
    assert_same(Tensors(tmp_path), empty)


def test_shards(tmp_path: Path) -> None:
    """Several files under one index read as one."""
    names = sorted(ARRAYS)
    parts = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, held in parts.items():
        save_file({name: ARRAYS[name] for name in held}, tmp_path / file)
    index(tmp_path, {name: file for file, held in parts.items() for name in held})
    assert_same(Tensors(tmp_path), ARRAYS)


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As transformers has it."""
    save_file({"weight": ARRAYS["weight"]}, tmp_path / "model.safetensors")
    index(tmp_path, {"bias": "gone.safetensors"})
    assert set(Tensors(tmp_path)) == {"weight"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """And only the one that is missing."""
    save_file({"weight": ARRAYS["weight"]}, tmp_path / "here.safetensors")
    index(tmp_path, {"weight": "here.safetensors", "bias": "gone.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"shards that are not there: gone.safetensors$"):
        Tensors(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """Which of the two is right cannot be known."""
    save_file({"weight": ARRAYS["weight"]}, tmp_path / "a.safetensors")
    save_file({"weight": ARRAYS["weight"] + 1, "bias": ARRAYS["bias"]}, tmp_path / "b.safetensors")
    index(tmp_path, {"weight": "a.safetensors", "bias": "b.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"b.safetensors holds 'weight', which another shard holds too"):
        Tensors(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/{}/outside.safetensors", "x/../../outside.safetensors"])
def test_an_index_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    """A path in a file that somebody else wrote opens nothing outside the checkpoint."""
    save_file({"weight": ARRAYS["weight"]}, tmp_path / "outside.safetensors")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    index(folder, {"weight": name.format(tmp_path)})
    with pytest.raises(CorruptCheckpointError, match=r"not there: outside.safetensors"):
        Tensors(folder)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": []}}']
)
def test_a_broken_index(content: bytes, tmp_path: Path) -> None:
    """Not JSON, or JSON of another kind."""
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match="is not a safetensors index"):
        Tensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 30, -1])
def test_a_truncated_file(keep: int, tmp_path: Path) -> None:
    """Cut anywhere, from an empty file to one that lacks its last byte."""
    file = tmp_path / "model.safetensors"
    save_file(ARRAYS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptCheckpointError, match=re.escape(str(file))):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe not text",
        b"{'weight'}",
        [],
        3,
        {"weight": 3},
        {"weight": "F32"},
        {"weight": {"dtype": "F32", "shape": [4]}},
        {"weight": {"dtype": "F7", "shape": [4], "data_offsets": [0, 16]}},
        {"weight": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}},
        {"weight": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 16]}},
        {"weight": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}},
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]}},
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]}},
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}},
        {"weight": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},
    ],
    ids=repr,
)
def test_a_malformed_header(header: Any, tmp_path: Path) -> None:
    """Whatever stands in the header, the error is ours and names the file."""
    file = tmp_path / "model.safetensors"
    write(file, header, b"\0" * 16)
    with pytest.raises(CorruptCheckpointError, match=re.escape(str(file))):
        Tensors(tmp_path)


def test_a_header_that_claims_to_be_huge(tmp_path: Path) -> None:
    """The size is checked before that much is read."""
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CorruptCheckpointError, match="no safetensors file, or is cut short"):
        Tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5"])
def test_a_pickle_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    """Loading one may run code; the message says how to convert it."""
    (tmp_path / name).write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PickledCheckpointError, match=f"{name}, which may run code .*save_pretrained"):
        Tensors(tmp_path)


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    """Many repositories carry both."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    save_file({"weight": ARRAYS["weight"]}, tmp_path / "model.safetensors")
    assert set(Tensors(tmp_path)) == {"weight"}


def test_no_weights_at_all(tmp_path: Path) -> None:
    """The message says what was looked for."""
    with pytest.raises(CheckpointNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        Tensors(tmp_path)
