"""Reading the container format of GGUF files, versions 2 and 3: metadata and tensors.

The `gguf` library knows the quantisations and dequantises; the container is parsed here, because
every offset and count is checked against the file's size before use, and arrays of a quarter of a
million strings take a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fluxion_jax.errors import IntegrityError, UnsupportedError
from fluxion_jax.models.extras import import_extra

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9
_DEFAULT_ALIGNMENT_BYTES = 32


@dataclasses.dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]  # rows first, as in Hugging Face checkpoints
    kind: int
    offset_bytes: int
    size_bytes: int


class GGUFFile:
    """The metadata of a GGUF file, and its tensors on demand.

    Attributes:
      path: the file.
      metadata: key-value pairs; arrays are lists.
      shapes: shape of every tensor by name, rows first.

    Raises:
      IntegrityError: it is no GGUF file, or a truncated or damaged one.
      UnsupportedError: its version or a quantisation is unknown.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(len(MAGIC))
        if start != MAGIC:
            raise IntegrityError(
                f"expected a GGUF file, one that starts with {MAGIC!r}, got {self.path} that "
                f"starts with {start!r}; pass a .gguf file"
            )
        self._data = np.memmap(self.path, np.uint8, "r")
        cursor = _Cursor(self._data.data, self.path)
        cursor.skip(len(MAGIC))
        version = cursor.scalar("I")
        if version not in _VERSIONS:
            raise UnsupportedError(
                f"expected a GGUF file of version 2 or 3, got version {version} in {self.path}; "
                "convert the model again with a current llama.cpp"
            )
        num_tensors, num_pairs = cursor.scalar("Q"), cursor.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        self.metadata: Mapping[str, Any] = metadata
        found = [_read_tensor(cursor) for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES))
        start_bytes = -(-cursor.position // alignment) * alignment
        self._tensors = {
            name: dataclasses.replace(tensor, offset_bytes=start_bytes + tensor.offset_bytes)
            for name, tensor in found
        }
        for name, tensor in self._tensors.items():
            end = tensor.offset_bytes + tensor.size_bytes
            if end > size:
                raise IntegrityError(
                    f"expected at least {end} bytes for tensor {name} of {self.path}, got a file "
                    f"of {size}; it is truncated, download it again"
                )
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """Dequantises a tensor to float32."""
        gguf = import_extra("gguf")
        tensor = self._tensors[name]
        raw = self._data[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        rows = math.prod(tensor.shape[:-1])
        kind = gguf.GGMLQuantizationType(tensor.kind)
        values = gguf.quants.dequantize(np.asarray(raw).reshape(rows, -1), kind)
        return np.asarray(values, np.float32).reshape(tensor.shape)


class _Cursor:
    """Reads little-endian values one after the other, never beyond the end."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self._data = data
        self._path = path
        self.position = 0

    def skip(self, count: int) -> int:
        """Moves on by `count` bytes and returns where it was."""
        start, end = self.position, self.position + count
        if end > len(self._data):
            raise IntegrityError(
                f"expected at least {end} bytes in {self._path}, got {len(self._data)}; the file "
                "is truncated or damaged, download it again"
            )
        self.position = end
        return start

    def scalar(self, code: str) -> Any:
        start = self.skip(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self._data, start)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        try:
            return str(self._data[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise IntegrityError(
                f"expected UTF-8 text at byte {start} of {self._path}, got other bytes; the file "
                "is damaged, download it again"
            ) from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise IntegrityError(
                f"expected a GGUF value type up to 12 before byte {self.position} of "
                f"{self._path}, got {kind}; the file is damaged, download it again"
            )
        element, count = self.scalar("I"), self.scalar("Q")
        if element in _SCALARS:
            code = f"<{_SCALARS[element]}"
            start = self.skip(count * struct.calcsize(code))
            return np.frombuffer(self._data, code, count, start).tolist()
        return [self.value(element) for _ in range(count)]


def _read_tensor(cursor: _Cursor) -> tuple[str, _Tensor]:
    gguf = import_extra("gguf")
    name = cursor.string()
    shape = tuple(cursor.scalar("Q") for _ in range(cursor.scalar("I")))[::-1]
    kind, offset_bytes = cursor.scalar("I"), cursor.scalar("Q")
    try:
        block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (KeyError, ValueError) as error:
        raise UnsupportedError(
            f"expected a quantisation that the gguf package knows for tensor {name}, got type "
            f"{kind}; upgrade gguf"
        ) from error
    if not shape or shape[-1] % block:
        raise IntegrityError(
            f"expected rows of tensor {name} in whole blocks of {block} values, got shape "
            f"{shape}; the file is damaged, download it again"
        )
    return name, _Tensor(shape, kind, offset_bytes, math.prod(shape) // block * block_bytes)
