"""A cache in a file: saved whole or not at all, loaded bit for bit or not at all.

The file is a sequence of sections, each followed by the SHA-256 of its name and content: first the
manifest (JSON: layout, sizes, lengths), then the arrays, of which only what sequences reach is
written. It is written beside its destination and renamed when it lies on the disk, so that a reader
finds the old file or the new one, whenever the writer dies. Axes: B batch, K KV heads, P host
blocks, U summary units.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

import host_ops
from fluxion_jax.cache.host_kv import HostKV, require_buffers
from fluxion_jax.cache.layout import BLOCK_TOKENS, GRANULARITIES_TOKENS, KVLayout, host_tokens
from fluxion_jax.cache.placement import BY_HEAD
from fluxion_jax.cache.sketch import Sketch, empty_sketch
from fluxion_jax.errors import ConfigError, IntegrityError, UnsupportedError, require_path
from fluxion_jax.whole_files import replaced

_MAGIC = b"fluxion kv cache"
_FORMAT = 1
_DIGEST_BYTES = hashlib.sha256().digest_size
_SIZE_BYTES = 8
# Far above any manifest, so that a damaged size is not taken for one.
_LARGEST_MANIFEST_BYTES = 1 << 26
_SKETCH_FIELDS = tuple(f"sketch.{name}" for name in Sketch._fields)


def save(cache: HostKV, path: str | Path) -> None:
    """See `HostKV.save`."""
    require_buffers(cache)
    leaves = jax.tree.leaves(cache)
    if not all(x.is_fully_addressable for x in leaves):
        raise UnsupportedError(
            "expected a cache whose devices all belong to this process, got one of several "
            "processes; save needs a cache of one process"
        )
    if cache.stacked:
        raise UnsupportedError(
            "expected a cache with arrays for each layer, got a stacked one; save needs a cache "
            "that was allocated with stacked=False"
        )
    jax.block_until_ready(leaves)
    require_path(path, "the file to write")
    target = Path(path).expanduser()
    if target.is_dir():
        raise ConfigError(f"expected the name of a file, got the directory {target}; name a file")
    lengths = np.asarray(cache.lengths).tolist()
    manifest = {
        "format": _FORMAT,
        "layout": dataclasses.asdict(cache.layout),
        "max_tokens": cache.max_tokens,
        "lengths": lengths,
        "sketched": bool(cache.sketch),
        "content_bytes": 0,
    }
    sections = list(_sections(cache.layout, cache.max_tokens, lengths, bool(cache.sketch)))
    manifest["content_bytes"] = sum(section.content_bytes for section in sections)
    with replaced(target) as file:
        text = json.dumps(manifest).encode()
        file.write(_MAGIC + len(text).to_bytes(_SIZE_BYTES, "little"))
        file.write(text + hashlib.sha256(b"manifest" + text).digest())
        for section in sections:
            parts = _parts(section, cache)
            digest = hashlib.sha256(section.name.encode())
            for index in section.indices():
                piece = np.ascontiguousarray(parts[index[0]][0][index[1:]]).reshape(-1)
                raw = piece.view(np.uint8).data
                digest.update(raw)
                file.write(raw)
            file.write(digest.digest())


def load(
    path: str | Path, *, mesh: jax.sharding.Mesh | None = None, axis: str | None = None
) -> HostKV:
    """See `HostKV.load`."""
    require_path(path, "a file that HostKV.save wrote")
    source = Path(path).expanduser()
    if not source.is_file():
        raise ConfigError(f"expected a file that HostKV.save wrote, got {source}; check the path")
    with open(source, "rb") as file:
        manifest = _read_manifest(file, source)
        layout = KVLayout(
            **manifest["layout"] | {"sliding_layers": tuple(manifest["layout"]["sliding_layers"])}
        )
        lengths, max_tokens = manifest["lengths"], manifest["max_tokens"]
        sections = list(_sections(layout, max_tokens, lengths, manifest["sketched"]))
        content = sum(section.content_bytes for section in sections)
        expected = file.tell() + content + _DIGEST_BYTES * len(sections)
        size = source.stat().st_size
        if size != expected or content != manifest["content_bytes"]:
            raise IntegrityError(
                f"expected {expected} bytes in {source}, got {size}; it is truncated or was "
                "written by another version, save the cache again"
            )
        cache = HostKV.allocate(layout, len(lengths), max_tokens, mesh=mesh, axis=axis)
        jax.block_until_ready(jax.tree.leaves(cache))
        values: dict[str, Any] = {name: [] for name in (*BY_HEAD, *_SKETCH_FIELDS)}
        for section in sections:
            parts = _parts(section, cache, fresh=True)
            digest = hashlib.sha256(section.name.encode())
            for index in section.indices():
                piece = np.empty(section.piece_shape, section.dtype)
                raw = piece.reshape(-1).view(np.uint8).data
                file.readinto(raw)
                digest.update(raw)
                for part in parts[index[0]]:
                    part[index[1:]] = piece
            if file.read(_DIGEST_BYTES) != digest.digest():
                raise IntegrityError(
                    f"expected {section.name} of {source} as it was saved, got other bytes; the "
                    "file is damaged, restore it or fill the cache again"
                )
            array = _array(section, cache, parts)
            if section.layer is None:
                values[section.field] = array
            else:
                values[section.field].append(array)
    # Over several devices there is no sketch; where none was saved, an empty one would mislead.
    kept = zip(*(values.pop(name) for name in _SKETCH_FIELDS), strict=True)
    sketch = tuple(Sketch(*arrays) for arrays in kept) if cache.sketch else ()
    arrays = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return cache.replace(**arrays, sketch=sketch).at_home()


@dataclasses.dataclass(frozen=True)
class _Section:
    """One array of a cache and the part of it that sequences reach.

    Attributes:
      field: name of the cache's field.
      layer: index within a field of many arrays, or None.
      shape: of the whole array.
      dtype: of its elements.
      rows: indices along the third axis that are kept, or None for the whole array.
    """

    field: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: Any
    rows: np.ndarray | slice | None

    @property
    def name(self) -> str:
        return self.field if self.layer is None else f"{self.field}[{self.layer}]"

    @property
    def piece_shape(self) -> tuple[int, ...]:
        if self.rows is None:
            return self.shape
        kept = self.rows.stop if isinstance(self.rows, slice) else len(self.rows)
        return (kept, *self.shape[3:])

    @property
    def content_bytes(self) -> int:
        pieces = 1 if self.rows is None else self.shape[0] * self.shape[1]
        return pieces * int(np.prod(self.piece_shape)) * np.dtype(self.dtype).itemsize

    def indices(self) -> Iterator[tuple[Any, ...]]:
        """Part and place in it of each piece, in the order of the file: by row, then by head."""
        if self.rows is None:
            yield 0, ...
            return
        for row in range(self.shape[0]):
            for head in range(self.shape[1]):
                yield head, row, self.rows


def _sections(
    layout: KVLayout, max_tokens: int, lengths: list[int], sketched: bool
) -> Iterator[_Section]:
    batch, capacity = len(lengths), layout.host_blocks(max_tokens)
    used = max(host_tokens(layout, n) for n in lengths) // BLOCK_TOKENS
    rows: dict[str, Any] = {
        "k": slice(0, used),
        "v": slice(0, used),
        "summaries": _summary_rows(capacity, used),
    }
    for field, (layers, shape, dtype) in layout.array_shapes(batch, max_tokens).items():
        for layer in range(layers):
            yield _Section(field, layer, shape, dtype, rows.get(field))
    if sketched:
        shapes = jax.eval_shape(lambda: empty_sketch(layout, batch, capacity))
        for layer in range(len(layout.global_layers)):
            for field, x in zip(_SKETCH_FIELDS, shapes, strict=True):
                yield _Section(field, layer, x.shape, x.dtype, None)
    yield _Section("pace", None, (2,), np.float32, None)
    yield _Section("lengths", None, (batch,), np.int32, None)
    yield _Section("active", None, (batch,), np.bool_, None)
    yield _Section("status", None, (1,), np.int32, None)


def _summary_rows(capacity: int, used: int) -> np.ndarray:
    """Rows of the summaries, of every granularity, that stand for the first `used` blocks."""
    rows, first = [], 0
    for granularity in GRANULARITIES_TOKENS:
        span = granularity // BLOCK_TOKENS
        rows.append(np.arange(first, first + -(-used // span)))
        first += capacity // span
    return np.concatenate(rows)


def _parts(section: _Section, cache: HostKV, *, fresh: bool = False) -> list[list[np.ndarray]]:
    """NumPy arrays that the section's pieces index, one per KV head or one for the whole array.

    What lies in host memory is a view; the rest is a copy, or zeros where it is to be filled. Each
    comes as often as devices of a mesh repeat it; all of these are to be filled.
    """
    if fresh and section.field in _SKETCH_FIELDS:
        # Read and checked even where the cache has no use for it.
        return [[np.zeros(section.shape, section.dtype)]]
    array = _field(section, cache)
    if array.sharding.memory_kind != "pinned_host":
        whole = np.zeros(section.shape, section.dtype) if fresh else np.array(array)
        if section.rows is None:
            return [[whole]]
        return [[whole[:, head]] for head in range(section.shape[1])]
    heads: list[list[np.ndarray]] = [[] for _ in range(section.shape[1])]
    for shard in array.addressable_shards:
        view = host_ops.host_view(shard.data)
        first = shard.index[1].start or 0
        for head in range(view.shape[1]):
            heads[first + head].append(view[:, head])
    return heads


def _array(section: _Section, cache: HostKV, parts: list[list[np.ndarray]]) -> jax.Array:
    """The array that the filled parts make up; what lies in host memory was filled in place."""
    if section.field in _SKETCH_FIELDS:
        return jnp.array(parts[0][0])
    array = _field(section, cache)
    if array.sharding.memory_kind == "pinned_host":
        return array
    filled = [part[0] for part in parts]
    whole = filled[0] if section.rows is None else np.stack(filled, axis=1)
    if cache.placement is not None:
        return jax.device_put(whole, array.sharding)
    # A copy always: JAX on the CPU would otherwise adopt NumPy's memory.
    return jnp.array(whole)


def _field(section: _Section, cache: HostKV) -> jax.Array:
    if section.layer is not None and section.field in _SKETCH_FIELDS:
        sketch: jax.Array = cache.sketch[section.layer][_SKETCH_FIELDS.index(section.field)]
        return sketch
    array = getattr(cache, section.field)
    return array if section.layer is None else array[section.layer]  # type: ignore[no-any-return]


def _read_manifest(file: BinaryIO, source: Path) -> dict[str, Any]:
    start = file.read(len(_MAGIC) + _SIZE_BYTES)
    size = int.from_bytes(start[len(_MAGIC) :], "little")
    if not start.startswith(_MAGIC) or size > _LARGEST_MANIFEST_BYTES:
        raise IntegrityError(
            f"expected a file that HostKV.save wrote, got something else or a damaged one in "
            f"{source}; check the path"
        )
    text = file.read(size)
    if file.read(_DIGEST_BYTES) != hashlib.sha256(b"manifest" + text).digest():
        raise IntegrityError(
            f"expected the manifest of {source} as it was saved, got other bytes; the file is "
            "damaged or truncated, restore it or fill the cache again"
        )
    manifest: dict[str, Any] = json.loads(text)
    if manifest["format"] != _FORMAT:
        raise IntegrityError(
            f"expected a saved cache of format {_FORMAT} in {source}, got {manifest['format']}; "
            "load it with the version of fluxion_jax that saved it"
        )
    return manifest
