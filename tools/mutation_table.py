"""The mutations: what is broken, and which tests have to notice.

Each names the file, a text that occurs in it exactly once, what takes its place, and the tests.
Keep the tests few and fast; they all have to pass on the unchanged tree.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


DEVICE = (
    "tests/pallas_kernels/test_block_sparse_attention.py::test_matches_the_oracle_for_odd_sizes",
)
ROWS = ("tests/pallas_kernels/test_block_sparse_triton.py::test_a_layer_among_several",)
MERGE = ("tests/pallas_kernels/test_merge_states.py",)
HOST = ("tests/host_ops/test_equivalence.py::test_random_cases",)
APPEND = ("tests/host_ops/test_equivalence_append.py::test_append",)
COLLECT = ("tests/host_ops/test_equivalence_append.py::test_collect_flushes",)
STEP = (
    "tests/attention/test_decode_attention.py"
    "::test_full_budget_equals_full_attention[float32-host-native]",
)

SCORING_KERNEL = ("tests/pallas_kernels/test_scoring_triton.py::test_scores_equal_the_oracle",)
TENSOR_CORES = "tests/pallas_kernels/test_block_sparse_triton_mma.py::test_"
SELECTION_KERNEL = ("tests/pallas_kernels/test_scoring_and_selection.py",)
COST_MODEL = ("tests/attention/test_cost_model.py",)
SELECTOR = ("tests/policy/test_selector.py",)
SCHEDULER = (
    "tests/policy/test_scheduler.py::test_both_rates_are_found_and_a_slower_host_is_relieved",
)
SKETCH = ("tests/cache/test_sketch.py::test_a_run_that_arrives_in_parts_holds_all_its_blocks",)

MUTATIONS = (
    # Block-sparse attention on tensor cores.
    Mutation(
        "tensor cores: queries in two parts",
        "pallas_kernels/block_sparse_triton_mma.py",
        "cut_float32(q.astype(jnp.float32) * scale, parts=3)",
        "cut_float32(q.astype(jnp.float32) * scale, parts=2)",
        (TENSOR_CORES + "matches_the_oracle[4-128-interpreted]",),
    ),
    Mutation(
        "tensor cores: what is not finite is left as it is",
        "pallas_kernels/block_sparse_triton_mma.py",
        "@pl.when(jnp.logical_not(finite))",
        "@pl.when(finite & False)",
        (TENSOR_CORES + "nan_surfaces_where_it_is_selected_and_nowhere_else[interpreted]",),
    ),
    Mutation(
        "tensor cores: entries after the last count",
        "pallas_kernels/block_sparse_triton_mma.py",
        "in_share = entry < share.end",
        "in_share = entry >= 0",
        (TENSOR_CORES + "entries_after_the_last_of_a_table_mean_nothing[True]",),
    ),
    Mutation(
        "block list: the bits of a chunk start at its first word's rank",
        "pallas_kernels/block_list_triton.py",
        "jnp.where(every < chunk * CHUNK_WORDS, in_word, 0)",
        "jnp.where(every <= chunk * CHUNK_WORDS, in_word, 0)",
        (TENSOR_CORES + "the_table_lists_every_selected_block_once_in_order[True]",),
    ),
    Mutation(
        "shares: a task's last blocks are dropped",
        "pallas_kernels/shares.py",
        "of_task = (total + blocks - 1) // blocks",
        "of_task = total // blocks",
        ("tests/pallas_kernels/test_shares.py",),
    ),
    # Kernels of the selection, and the split by a cost model.
    Mutation(
        "scoring kernel: low bounds for positive queries",
        "pallas_kernels/scoring_triton.py",
        "_products(low, negative) + _products(high, positive)",
        "_products(high, negative) + _products(low, positive)",
        SCORING_KERNEL,
    ),
    Mutation(
        "selection kernel: ties go to the highest ids",
        "pallas_kernels/selection_triton.py",
        "jnp.where(tied, (last - block) ^ _LOWEST, _LOWEST)",
        "jnp.where(tied, block ^ _LOWEST, _LOWEST)",
        SELECTION_KERNEL,
    ),
    Mutation(
        "selection kernel: a group ranks by its own head",
        "pallas_kernels/selection_triton.py",
        "exists & (shared != 0)",
        "exists & (shared == 0)",
        SELECTION_KERNEL,
    ),
    Mutation(
        "summary kernels: upper bounds are rounded down",
        "pallas_kernels/update_summaries.py",
        "return low >> shift, -(-high >> shift)",
        "return low >> shift, high >> shift",
        ("tests/pallas_kernels/test_update_summaries.py",),
    ),
    Mutation(
        "summary kernels: the first block of a unit folds too",
        "pallas_kernels/update_summaries.py",
        "(block & ((1 << level) - 1)) != 0, channel.shape",
        "block >= 0, channel.shape",
        ("tests/pallas_kernels/test_update_summaries.py",),
    ),
    Mutation(
        "list of blocks: the boundary's own word is left out",
        "pallas_kernels/block_list_triton.py",
        "jnp.where(below < WORD_BITS,",
        "jnp.where(below < 1,",
        (TENSOR_CORES + "the_listed_blocks_are_those_from_the_boundary_on",),
    ),
    Mutation(
        "layer's end: exponents grow after an error",
        "pallas_kernels/finish_layer.py",
        "jnp.where(failed, old, grown)",
        "jnp.where(failed, grown, grown)",
        ("tests/pallas_kernels/test_finish_layer.py",),
    ),
    Mutation(
        "layer's end: summaries follow an error of another layer",
        "pallas_kernels/finish_layer.py",
        "status = status_ref[0]",
        "status = earlier[0][0]",
        ("tests/pallas_kernels/test_finish_layer.py",),
    ),
    Mutation(
        "window kernel: a failed step goes on",
        "pallas_kernels/window_step.py",
        "active_ref[0] * (1 - jnp.clip(status_ref[0], 0, 1))",
        "active_ref[0]",
        ("tests/pallas_kernels/test_window_step.py",),
    ),
    Mutation(
        "window kernel: one token too many is among the newest",
        "pallas_kernels/window_step.py",
        "position > length - newest_tokens",
        "position >= length - newest_tokens",
        (
            "tests/pallas_kernels/test_window_step.py"
            "::test_scores_of_sinks_and_of_the_newest_at_every_length",
        ),
    ),
    Mutation(
        "submit: results are taken for delivered that were not",
        "host_ops/csrc/operations.cc",
        "if (request.delivers() && !out.delivered) status |= kInvalid;",
        "",
        (
            "tests/host_ops/test_native_programs.py"
            "::test_a_slot_alone_is_no_tick_of_a_submit_that_has_named_the_results_memory",
        ),
    ),
    Mutation(
        "decode: the device scores before the host begins",
        "fluxion_jax/attention.py",
        "on_device, tick = on_device._replace(q8=q8), tick._replace(slot=slot)",
        "tick = tick._replace(slot=slot)",
        (
            "tests/attention/test_programs_for_gpu.py"
            "::test_the_host_begins_before_the_device_reads_its_memory",
        ),
    ),
    Mutation(
        "native host: a failed step goes on",
        "host_ops/csrc/request.cc",
        "if (failed(work)) std::fill",
        "if (false) std::fill",
        ("tests/host_ops/test_equivalence.py",),
    ),
    Mutation(
        "copied blocks: the last token of a block for its first",
        "pallas_kernels/copy_blocks.py",
        "row % tokens, place",
        "tokens - 1 - row % tokens, place",
        ("tests/pallas_kernels/test_copy_blocks.py",),
    ),
    Mutation(
        "cost model: the fixed costs change places",
        "fluxion_jax/policy/cost_model.py",
        "(self.device_fixed_s - self.host_fixed_s) * pcie",
        "(self.host_fixed_s - self.device_fixed_s) * pcie",
        COST_MODEL,
    ),
    Mutation(
        "split: small ranges are kept",
        "fluxion_jax/policy/split.py",
        "too_little = (part < least) | (size - part < least)",
        "too_little = (part < 0) | (size - part < 0)",
        COST_MODEL,
    ),
    Mutation(
        "divide work: equal tasks in the wrong order",
        "pallas_kernels/divide_work.py",
        "((others == mine) & tie)",
        "((others == mine) & ~tie)",
        ("tests/pallas_kernels/test_divide_work.py",),
    ),
    Mutation(
        "divide work: heads of a group always select apart",
        "pallas_kernels/divide_work.py",
        "jnp.where(load(shared_ref, task) != 0, most, total)",
        "jnp.where(load(shared_ref, task) > 1, most, total)",
        ("tests/pallas_kernels/test_divide_work.py",),
    ),
    Mutation(
        "divide work: cut downwards",
        "pallas_kernels/divide_work.py",
        "floor + jnp.where(up, 1, 0)",
        "floor",
        ("tests/pallas_kernels/test_divide_work.py",),
    ),
    Mutation(
        "predictor: on a GPU what is not a number becomes the smallest",
        "fluxion_jax/policy/head_predictor.py",
        "jnp.where(standard == standard, jnp.clip(standard, -_CLIP, _CLIP), standard)",
        "jnp.clip(standard, -_CLIP, _CLIP)",
        ("tests/policy/test_fluxion_policy.py::test_the_kernels_plan_what_xla_plans",),
    ),
    # The policy.
    Mutation(
        "head statistics: negative queries meet the upper bounds",
        "pallas_kernels/head_statistics_triton.py",
        "with_queries(jnp.maximum(-queries, 0.0), load(2))",
        "with_queries(jnp.maximum(-queries, 0.0), load(3))",
        ("tests/pallas_kernels/test_head_statistics.py",),
    ),
    Mutation(
        "by sequence: heads that do not exist are among the largest",
        "pallas_kernels/by_sequence.py",
        "jnp.max(self._among_all(x, -jnp.inf))",
        "jnp.max(self._among_all(x, 0))",
        ("tests/pallas_kernels/test_by_sequence.py",),
    ),
    Mutation(
        "finish layer: only the first status of many counts",
        "pallas_kernels/finish_layer.py",
        "    if size == 1:\n        return ref[0]",
        "    if size:\n        return ref[0]",
        ("tests/pallas_kernels/test_finish_layer.py",),
    ),
    Mutation(
        "dense layer: never activated",
        "pallas_kernels/dense_layer.py",
        "    y = y / (1.0 + jnp.exp(-y))",
        "    y = y + 0.0",
        ("tests/pallas_kernels/test_dense_layer.py",),
    ),
    Mutation(
        "selector: summaries cost nothing beside K/V",
        "fluxion_jax/policy/selector.py",
        "cost = units * summary + read * token",
        "cost = units + read * token",
        SELECTOR,
    ),
    Mutation(
        "scheduler: a device that nobody waited for keeps its rate",
        "fluxion_jax/policy/scheduler.py",
        "unseen = jnp.minimum(device, pace[1] - _SLOWER_LOG2)",
        "unseen = jnp.minimum(device, pace[1])",
        SCHEDULER,
    ),
    Mutation(
        "sketch: a run is begun anew by each of its blocks",
        "fluxion_jax/cache/sketch.py",
        "new = jnp.where(started[:, :, None, None, None], fresh, grown)",
        "new = fresh",
        SKETCH,
    ),
    # Swapping K and V.
    Mutation(
        "device: V in the place of K",
        "pallas_kernels/block_sparse_attention.py",
        "tile_k = take_rows(keys, first_task + task, block)",
        "tile_k = take_rows(values, first_task + task, block)",
        DEVICE,
    ),
    Mutation(
        "native host: V in the place of K",
        "host_ops/csrc/tasks.cc",
        "args.k = static_cast<const char*>(request_->cache_.k) + offset * bytes;",
        "args.k = static_cast<const char*>(request_->cache_.v) + offset * bytes;",
        HOST,
    ),
    Mutation(
        "native host: the flush writes K into V",
        "host_ops/csrc/append.cc",
        "std::memcpy(static_cast<char*>(cache.v) + to, static_cast<const char*>(flush.v) + from,",
        "std::memcpy(static_cast<char*>(cache.v) + to, static_cast<const char*>(flush.k) + from,",
        APPEND,
    ),
    Mutation(
        "XLA host: K in the place of V",
        "host_ops/xla_attend.py",
        "values = v[task // kv_heads, task % kv_heads, ids]",
        "values = k[task // kv_heads, task % kv_heads, ids]",
        HOST,
    ),
    Mutation(
        "window: V enters in the place of K",
        "fluxion_jax/attention.py",
        "((cache.window_k, k_new), (cache.window_v, v_new))",
        "((cache.window_k, v_new), (cache.window_v, v_new))",
        STEP,
    ),
    # Another layer of a stacked cache.
    Mutation(
        "device: blocks of the first layer in the place of the layer's own",
        "pallas_kernels/cache_rows.py",
        "return tuple(ref[0] + task // kv_heads for ref in row_refs)",
        "return tuple(task // kv_heads + 0 * ref[0] for ref in row_refs)",
        ROWS,
    ),
    # Dropping the merge.
    Mutation(
        "step: the host's share is not merged",
        "fluxion_jax/attention.py",
        'states += [host_state] if split.sides != "device" else []',
        'states += [host_state] if split.sides == "host" else []',
        STEP,
    ),
    Mutation(
        "device: merging keeps only the first state",
        "pallas_kernels/merge_states.py",
        "merged = functools.reduce(jnp.add, weighted) / divisor[..., None]",
        "merged = weighted[0] / divisor[..., None]",
        MERGE,
    ),
    # Shifting a block table by one.
    Mutation(
        "device: every block is the one before it",
        "pallas_kernels/block_sparse_attention.py",
        "tile_v = take_rows(values, first_task + task, block)",
        "tile_v = take_rows(values, first_task + task, jnp.maximum(block - 1, 0))",
        DEVICE,
    ),
    Mutation(
        "native host: every block is the one before it",
        "host_ops/csrc/union_impl.h",
        "blocks[listed] = static_cast<int32_t>(w * 32 + bit);",
        "blocks[listed] = static_cast<int32_t>(w * 32 + bit - (w + bit > 0));",
        HOST,
    ),
    Mutation(
        "XLA host: every flushed block lands one further",
        "host_ops/xla_append.py",
        "block = flush.first_block[b] + i",
        "block = flush.first_block[b] + i + 1",
        APPEND,
    ),
    Mutation(
        "step: every leaving block is announced one further",
        "fluxion_jax/cache/append.py",
        "first_block = host_tokens(layout, lengths) // BLOCK_TOKENS",
        "first_block = host_tokens(layout, lengths) // BLOCK_TOKENS + 1",
        STEP,
    ),
    # Forgetting one flushed block.
    Mutation(
        "step: the last leaving block is forgotten",
        "fluxion_jax/cache/append.py",
        "num_blocks = num_leaving(layout, lengths, count)",
        "num_blocks = jnp.maximum(num_leaving(layout, lengths, count) - 1, 0)",
        STEP,
    ),
    Mutation(
        "native host: the last flushed block is forgotten",
        "host_ops/csrc/append.cc",
        "  const int64_t count = flush.num_blocks[b];\n  if (count == 0) return;",
        "  const int64_t count = flush.num_blocks[b] - 1;\n  if (count <= 0) return;",
        APPEND + COLLECT,
    ),
    Mutation(
        "XLA host: the last flushed block is forgotten",
        "host_ops/xla_append.py",
        "counts = jnp.where(enabled, flush.num_blocks, 0)\n    if k.dtype",
        "counts = jnp.where(enabled, jnp.maximum(flush.num_blocks - 1, 0), 0)\n    if k.dtype",
        APPEND + COLLECT,
    ),
)
