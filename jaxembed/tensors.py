"""safetensors files as memory-mapped numpy arrays: nothing is copied until a device asks for it.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header size N, N bytes of JSON
{name: {dtype, shape, data_offsets}}, then the bytes. The library's own numpy loader has no bfloat16; a view
as ml_dtypes.bfloat16 has, and copies nothing.
"""

import json
import math
import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from jaxembed.errors import CheckpointNotFoundError, CorruptCheckpointError, PickledCheckpointError

__all__ = ["Tensors"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5", "flax_model.msgpack")
HEADER_LIMIT = 100 * 2**20

DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Tensors(Mapping[str, npt.NDArray[Any]]):
    """The arrays of a folder's checkpoint, single or sharded, by name; each a read-only view of the file.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards; or one safetensors file.

    Raises:
        CheckpointNotFoundError: no weights in the folder.
        PickledCheckpointError: weights only in a format that may run code when loaded.
        CorruptCheckpointError: a file is cut short, malformed, or a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        for file in shards(folder):
            for name, array in read(file).items():
                if name in self._arrays:
                    raise CorruptCheckpointError(f"{file.name} holds {name!r}, which another shard holds too")
                self._arrays[name] = array

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order, or the one given; the errors are those of `Tensors`."""
    if folder.is_file():
        return [folder]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted({Path(name).name for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CorruptCheckpointError(f"{index} is not a safetensors index: {error!r}") from None
        # Only the last part of a name counts: it comes from a file that somebody else wrote, and stays in the folder.
        files = [folder / name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CorruptCheckpointError(f"{index} names shards that are not there: {', '.join(missing)}")
        return files
    pickled = [name for name in PICKLES if (folder / name).is_file()]
    if pickled:
        way = "transformers.AutoModel.from_pretrained(folder).save_pretrained(folder)"
        config = folder / "config.json"
        named = config.is_file() and b'"model_type"' in config.read_bytes()
        if pickled[0] == "pytorch_model.bin" and not named:
            # A module of sentence-transformers, such as Dense.
            stored = f"torch.load(folder + '/{pickled[0]}', weights_only=True)"
            way = f"safetensors.torch.save_file({stored}, folder + '/{SINGLE}')"
        raise PickledCheckpointError(
            f"{folder} holds its weights only as {pickled[0]}, which may run code when loaded. Convert it once, "
            f"where you trust the file: {way}"
        )
    raise CheckpointNotFoundError(f"{folder} holds no weights: neither {SINGLE} nor {INDEX}")


def read(file: Path) -> dict[str, npt.NDArray[Any]]:
    """Map one safetensors file.

    Raises:
        CorruptCheckpointError: the file is cut short or malformed.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(HEADER_LIMIT, size - 8):
            raise CorruptCheckpointError(f"{file} is no safetensors file, or is cut short ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise CorruptCheckpointError(f"the header of {file} is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CorruptCheckpointError(f"the header of {file} must be a JSON object, not {type(header).__name__}")
    start = 8 + length
    arrays: dict[str, npt.NDArray[Any]] = {}
    # numpy cannot map an empty stretch; a file of no bytes after its header has only empty arrays.
    data = np.memmap(file, np.uint8, mode="r", offset=start) if size > start else np.empty(0, np.uint8)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = np.dtype(DTYPES[entry["dtype"]])
            shape = tuple(map(operator.index, entry["shape"]))
            begin, end = map(operator.index, entry["data_offsets"])
            if min(shape, default=0) < 0:
                raise ValueError(shape)
        except (KeyError, TypeError, ValueError):
            raise CorruptCheckpointError(f"{file}: {name!r} has the unreadable entry {entry!r}") from None
        if not 0 <= begin <= end <= len(data):
            raise CorruptCheckpointError(
                f"{file} is cut short: {name!r} ends at byte {start + end}, the file has {size}"
            )
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise CorruptCheckpointError(f"{file}: {name!r} has {end - begin} bytes, which is not {dtype} {shape}")
        arrays[name] = data[begin:end].view(dtype).reshape(shape)
    return arrays
