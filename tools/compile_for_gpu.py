"""Compiles the library's programs for an H100 where there is none, and looks at the result.

Needs the CUDA plugin of JAX (`jax-cuda13-plugin` and `jax-cuda13-pjrt` of the version of JAX) and
`ptxas`; neither a GPU nor a driver. It shows what XLA makes of a program: how long it compiles,
how many kernels a layer launches, and whether XLA computes on the host or copies there.

    python tools/compile_for_gpu.py            # all programs
    python tools/compile_for_gpu.py decode     # those whose name contains the word
    python tools/compile_for_gpu.py decode --hlo FOLDER
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from jax._src import compiler
from jax._src.lib import _jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

import fluxion_jax as fx
from fluxion_jax.policy import parse_split

DEVICE_KIND = "NVIDIA H100 80GB HBM3"
# What the compiler wants to know of the GPU, in the text format of its GpuTargetConfigProto.
TARGET = f"""
platform_name: "CUDA"
device_description_str: "{DEVICE_KIND}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  name: "{DEVICE_KIND}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  pcie_bandwidth: 34359738368 device_address_bits: 64 ecc_enabled: true
}}
"""

_KERNELS = ("triton", "mosaic", "triton_mma", "wgmma")
_HANDED_ON = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "custom-call")
_NOTHING = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all")


def lower(trace: Callable[..., Any], *args: Any) -> Any:
    """Lowers for CUDA what `trace(*args)` traces, as if the default device were an H100."""
    device = AbstractDevice(device_kind=DEVICE_KIND, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return trace(*args).lower(lowering_platforms=("cuda",))


@functools.cache
def gpu() -> Any:
    """A device to compile for, on which nothing can run."""
    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=TARGET)
    return topology.devices[0]


def compile_for_gpu(trace: Callable[..., Any], *args: Any) -> str:
    """Compiles what `trace(*args)` traces; returns the optimised HLO."""
    module = lower(trace, *args).compiler_ir()
    # Not through Lowered.compile: JAX knows no memory kinds of a device that is not here.
    executable = gpu().client.compile(
        module, _jax.DeviceList((gpu(),)), compiler.get_compile_options(1, 1)
    )
    text: str = executable.hlo_modules()[0].to_string()
    return text


def kernels(hlo: str) -> collections.Counter[str]:
    """Counts what the program enqueues, by kind; a loop's body and each branch count once."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            entry = name if line.startswith("ENTRY") else entry
            computations[name] = []
        elif name and line.startswith(" "):
            computations[name].append(line)
    found: collections.Counter[str] = collections.Counter()
    pending = [entry]
    while pending:
        for line in computations[pending.pop()]:
            match = re.match(r"\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([\w\-]+)\(", line)
            if match is None or match[1] in _NOTHING:
                continue
            kind = match[1]
            if kind in ("while", "conditional", "call"):
                pending += re.findall(
                    r"(?:body|condition|to_apply|\w+_computations?)=\{?%?([\w.\-]+)", line
                )
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                if branches:
                    pending += [x.strip().lstrip("%") for x in branches[1].split(",")[1:]]
            if kind == "custom-call":
                kind = re.search(r'custom_call_target="([^"]*)"', line)[1]  # type: ignore[index]
            found[kind] += 1
    return found


def copies_in_host_memory(hlo: str) -> list[str]:
    """Operations of XLA's own whose result lies in host memory, and is no array that was there."""
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s+(?:ROOT )?%?\S+ = (\(.*?\) |\S+ )([\w\-]+)\(", line)
        if match and "S(5)" in match[1] and match[2] not in _HANDED_ON:
            found.append(line)
    return found


def _programs() -> dict[str, Callable[[], str]]:
    programs: dict[str, Callable[[], str]] = {}
    for summaries in ("host", "device"):
        for split in ("host", "device", "0.5"):
            for kernel in ("triton", "mosaic") if split != "host" else (None,):
                name = "-".join(filter(None, ("decode", summaries, split, kernel)))
                programs[name] = functools.partial(_decode, summaries, split, kernel)
            for kernel in _KERNELS if split != "host" else (None,):
                name = "-".join(filter(None, ("scan", summaries, split, kernel)))
                programs[name] = functools.partial(_scan, summaries, split, kernel)
        programs[f"scan-prefill-{summaries}"] = functools.partial(_scan_prefill, summaries)
        programs[f"prefill-{summaries}"] = functools.partial(_prefill, summaries)
        programs[f"generate-{summaries}"] = functools.partial(_generate, summaries)
    return programs


def _cache(summaries: Any, layers: int, max_tokens: int = 8192, stacked: bool = False) -> fx.HostKV:
    layout = fx.KVLayout(layers, 8, 128, "bfloat16", summaries=summaries)
    return fx.HostKV.allocate(layout, 1, max_tokens, stacked=stacked)


def _decode(summaries: str, split: str, kernel: str | None, layers: int = 2) -> str:
    """Attention of some layers, one after the other."""
    execution = fx.Execution(host="native", device=kernel)

    @fx.jit
    def step(
        cache: fx.HostKV, q: jax.Array, k: jax.Array, v: jax.Array, policy: Any, split: Any
    ) -> Any:
        for layer in range(layers):
            out, cache, _ = fx.decode_attention(
                q, k, v, cache, layer, policy, scale=0.1, split=split, execution=execution
            )
            q = out
        return q, cache.advance()

    q, kv = jnp.zeros((1, 32, 128)), jnp.zeros((1, 8, 128))
    policy = fx.parse_policy("fixed:16:0.05:group")
    cache = _cache(summaries, layers)
    return compile_for_gpu(step.trace, cache, q, kv, kv, policy, parse_split(split))  # type: ignore[attr-defined]


def _scan(summaries: str, split: str, kernel: str | None, layers: int = 3, steps: int = 8) -> str:
    """Steps of layers in a scan, over a stacked cache."""
    execution = fx.Execution(host="native", device=kernel)

    @fx.jit
    def run(
        cache: fx.HostKV, q: jax.Array, k: jax.Array, v: jax.Array, policy: Any, split: Any
    ) -> Any:
        def layer(carry: Any, index: jax.Array) -> Any:
            q, cache = carry
            q, cache, _ = fx.decode_attention(
                q, k, v, cache, index, policy, scale=0.1, split=split, execution=execution
            )
            return (q, cache), None

        def step(_: jax.Array, carry: Any) -> Any:
            (q, cache), _ = jax.lax.scan(layer, carry, jnp.arange(layers))
            return q, cache.advance()

        return jax.lax.fori_loop(0, steps, step, (q, cache))

    q, kv = jnp.zeros((1, 32, 128)), jnp.zeros((1, 8, 128))
    policy = fx.parse_policy("fixed:16:0.05:group")
    cache = _cache(summaries, layers, stacked=True)
    return compile_for_gpu(run.trace, cache, q, kv, kv, policy, parse_split(split))  # type: ignore[attr-defined]


def _scan_prefill(summaries: str, layers: int = 3) -> str:
    """A chunk of a prompt through layers in a scan, over a stacked cache."""
    from fluxion_jax.chunk_attention import prefill_attention

    @fx.jit
    def run(cache: fx.HostKV, q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> Any:
        def layer(carry: Any, index: jax.Array) -> Any:
            q, cache = carry
            out, cache = prefill_attention(q, k, v, count, cache, index, scale=0.1)
            return (out, cache), None

        (q, cache), _ = jax.lax.scan(layer, (q, cache), jnp.arange(layers))
        return q, cache.advance(count)

    q, kv = jnp.zeros((1, 1024, 32, 128)), jnp.zeros((1, 1024, 8, 128))
    cache = _cache(summaries, layers, stacked=True)
    return compile_for_gpu(run.trace, cache, q, kv, kv, jnp.full((1,), 1024, jnp.int32))  # type: ignore[attr-defined]


def _model() -> Any:
    from flax import nnx

    from fluxion_jax.models import Decoder, ModelConfig

    config = ModelConfig("llama", 256, 1024, 2, 32, 8, 128, 512, 8192)
    return nnx.split(Decoder.random(config, dtype=jnp.bfloat16))


def _prefill(summaries: str) -> str:
    from fluxion_jax.decode import prefill_chunk

    graph, params = _model()
    tokens = jnp.zeros((1, 1024), jnp.int32)
    return compile_for_gpu(
        prefill_chunk.trace,  # type: ignore[attr-defined]
        *(graph, params, _cache(summaries, 2), tokens, jnp.zeros((1,), jnp.int32)),
        fx.Execution(host="native"),
    )


def _generate(summaries: str) -> str:
    from fluxion_jax.decode import decode_chunk

    graph, params = _model()
    return compile_for_gpu(
        decode_chunk.trace,  # type: ignore[attr-defined]
        *(graph, params, _cache(summaries, 2), jnp.zeros((1,), jnp.int32)),
        *(jnp.zeros((1,), bool), jnp.full((1, 32), -1), jnp.asarray(32), jnp.asarray([-1])),
        *(jax.random.key(0), fx.parse_policy("fixed:16:0.05"), parse_split("0.5")),
        *(fx.greedy(), fx.Execution(host="native")),
    )


def main() -> int:
    """Compiles what the command line names; returns how many compute on the host or copy there."""
    parser = argparse.ArgumentParser(description="compile the library's programs for an H100")
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--hlo", type=Path, metavar="FOLDER", help="write the optimised HLO there")
    arguments = parser.parse_args()
    failures = 0
    for name, program in _programs().items():
        if arguments.word not in name:
            continue
        start = time.perf_counter()
        hlo = program()
        seconds = time.perf_counter() - start
        whole = len(copies_in_host_memory(hlo))
        on_host = hlo.count('_xla_compute_type="host"')
        failures += on_host > 0 or whole > 0
        counted = kernels(hlo)
        print(
            f"{name}: {seconds:.1f} s, {counted.total()} launches, {on_host} host computations, "
            f"{whole} copies in host memory"
        )
        print("   ", ", ".join(f"{n} {kind}" for kind, n in counted.most_common()), flush=True)
        if arguments.hlo:
            arguments.hlo.mkdir(parents=True, exist_ok=True)
            (arguments.hlo / f"{name}.hlo").write_text(hlo)
    return failures


if __name__ == "__main__":
    sys.exit(main())
