"""Trains the small long-context model that the library ships, in minutes on one GPU.

    python examples/train_recall_model.py --output run --seconds 480
    python examples/train_recall_model.py --output run --export-only

The first line trains (again, it resumes), the second writes `run/model.safetensors`, after which
`fluxion_jax.models.load_model("run")` loads the folder. Needs optax, tokenizers and safetensors.
Text comes from the installed packages, or from `--corpus build/corpus` (`build_corpus.py`). With
`--start-from run --preset continued` a new run goes on from an exported model's weights.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from recall_model import corpus, storage
from recall_model.batches import TEXT, Data, Feed
from recall_model.model import RecallModel, Sizes
from recall_model.scoring import Examination, text_loss
from recall_model.text import encode_documents, read_corpus, train_tokenizer
from recall_model.training import (
    CONTINUED_PEAK_RATE,
    CONTINUED_STAGES,
    PEAK_RATE,
    STAGES,
    Stage,
    learning_rate,
    make_scorer,
    make_step,
    optimizer,
)

_SAVE_EVERY_S = 120.0
_CURVE_EVERY_S = 5.0
_STEPS_IN_FLIGHT = 3
# Left of --total-seconds for saving and scoring.
_SCORING_S = 55.0


@dataclasses.dataclass(frozen=True)
class Preset:
    """Everything that a run's size depends on."""

    sizes: Sizes
    stages: tuple[Stage, ...]
    corpus_bytes: int
    tokenizer_bytes: int
    step_tokens_at_once: int
    scored_lengths: tuple[int, ...]
    samples: int
    peak_rate: float = PEAK_RATE


_FULL = Preset(Sizes(), STAGES, 60_000_000, 10_000_000, 131_072, (1024, 4096, 16_384), 24)
PRESETS = {
    "full": _FULL,
    # From the weights of a model that has learned with the preset above.
    "continued": dataclasses.replace(_FULL, stages=CONTINUED_STAGES, peak_rate=CONTINUED_PEAK_RATE),
    # Shows that everything works; learns nothing.
    "tiny": Preset(
        Sizes(
            vocab_size=2048,
            d_model=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            d_ff=64,
        ),
        (Stage(256, 4, 0.4), Stage(1024, 4, 0.3), Stage(2048, 2, 0.3)),
        3_000_000,
        500_000,
        2048,
        (1024,),
        2,
    ),
}


class Run:
    """A training run: its data processes, its state and its record."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.preset, self.started = args, PRESETS[args.preset], time.monotonic()
        self.folder = Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resumed = (self.folder / storage.RECORD).exists()
        data = self._data()
        # Forks come first: JAX's devices must not exist yet.
        workers = args.workers or max(1, (os.cpu_count() or 2) - 2)
        shapes = [(stage.rows, stage.length) for stage in self.preset.stages]
        feed_seed = f"{args.seed}:{self._elapsed_before()}"
        self.feed = Feed(data, feed_seed, shapes, workers)
        self.examination = Examination(
            data.tokenizer, self.preset.scored_lengths, self.preset.samples
        )
        self._start_model()

    def say(self, text: str) -> None:
        """Prints a line behind the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def _elapsed_before(self) -> int:
        if not self.resumed:
            return 0
        return int(storage.read_record(self.folder)["elapsed_s"])

    def _data(self) -> Data:
        args, self.corpus_record = self.args, {}
        if args.corpus:
            texts, manifest = corpus.read(Path(args.corpus))
            self.corpus_record["files_sha256"] = manifest["files"]
        else:
            texts = read_corpus(self.preset.corpus_bytes)
        self.say(f"read {len(texts.train)} files, {len(texts.held_out)} more are held out")
        path = self.folder / "tokenizer.json"
        if self.resumed:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        else:
            if args.start_from:
                given = Path(args.start_from, "tokenizer.json")
                tokenizer = tokenizers.Tokenizer.from_file(str(given))
            else:
                tokenizer = train_tokenizer(
                    texts.train, self.preset.sizes.vocab_size, self.preset.tokenizer_bytes
                )
            tokenizer.save(str(path))
            storage.write_config(self.folder, self.preset.sizes)
        self.say(f"tokenizer of {tokenizer.get_vocab_size()} tokens")
        self.ids = {
            split: encode_documents(tokenizer, documents)
            for split, documents in texts._asdict().items()
        }
        for split, documents in texts._asdict().items():
            self.corpus_record[split] = {
                "files": len(documents),
                "bytes": sum(len(t.encode()) for t in documents),
                "tokens": len(self.ids[split]),
            }
        self.say(f"text: {self.corpus_record}")
        return Data(tokenizer, self.ids["train"], texts.train)

    def _start_model(self) -> None:
        gpu = jax.default_backend() == "gpu"
        self.how: dict[str, Any] = {
            "dtype": jnp.bfloat16 if gpu else jnp.float32,
            "implementation": "cudnn" if gpu else "xla",
        }
        self.graph, abstract = storage.abstract_model(self.preset.sizes)
        self.record: dict[str, Any] = {
            "elapsed_s": 0.0, "steps": 0, "tokens": 0, "text_tokens": 0, "curve": [],
        }  # fmt: skip
        if self.resumed:
            self.params, self.record = storage.load(self.folder, abstract)
        elif self.args.start_from:
            given = Path(self.args.start_from)
            self.params, self.record["started_from"] = storage.load_exported(
                given, self.preset.sizes
            )
            self.say(f"starts from {given}")
        else:
            self.params = nnx.state(RecallModel(self.preset.sizes, nnx.Rngs(self.args.seed)))
        # Donated buffers must not be shared.
        self.params = jax.tree.map(jnp.array, self.params)
        self.moments = jax.jit(optimizer().init)(self.params)
        kept = self.resumed and storage.load_moments(self.folder, self.moments, self.record)
        self.fresh_moments = not kept and (self.resumed or bool(self.args.start_from))
        if kept:
            self.moments = kept
        if self.resumed:
            which = "with its moments" if kept else "with fresh moments"
            self.say(f"resumed {which} after {self.record['elapsed_s']:.0f} s")
        self.record |= {
            "seed": self.args.seed,
            "seconds": self.args.seconds,
            "sizes": dataclasses.asdict(self.preset.sizes),
            "stages": [stage._asdict() for stage in self.preset.stages],
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            "corpus": self.corpus_record,
            "device": jax.devices()[0].device_kind,
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "flax": flax.__version__,
            },
        }
        self.say(f"{self.record['parameters']:,} parameters on {self.record['device']}")

    def train(self) -> None:
        """Goes through the stages until the time is up."""
        args, begin, before = self.args, time.monotonic(), self.record["elapsed_s"]
        planned = args.seconds
        if args.total_seconds:
            left = args.total_seconds - (begin - self.started) - _SCORING_S
            planned = min(planned, before + left)
        stop = planned
        if args.session_seconds:
            stop = min(planned, before + args.session_seconds)
        self.say(f"training until {stop:.0f} of {planned:.0f} s")
        first_step, end = self.record["steps"], 0.0
        for index, stage in enumerate(self.preset.stages):
            end += stage.share * planned
            last = index == len(self.preset.stages) - 1
            until = stop if last else min(end, stop)
            if before + time.monotonic() - begin >= until:
                continue
            self.feed.switch(index)
            step = self._compiled(stage)
            self._stage(index, stage, step, begin, before, planned, until, first_step)
        self._save()

    def _compiled(self, stage: Stage) -> Any:
        """The stage's program, with as few parts as the memory allows."""
        micro_rows = min(stage.rows, max(1, self.preset.step_tokens_at_once // stage.length))
        shape = (stage.rows, stage.length)
        while True:
            start = time.monotonic()
            step = make_step(self.graph, micro_rows=micro_rows, **self.how)
            compiled = step.lower(
                self.params,
                self.moments,
                jax.ShapeDtypeStruct(shape, jnp.uint16),
                jax.ShapeDtypeStruct(shape, jnp.uint8),
                jax.ShapeDtypeStruct((), jnp.float32),
            ).compile()
            usage = compiled.memory_analysis()
            needed = getattr(usage, "temp_size_in_bytes", 0)
            limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
            self.say(
                f"{stage.rows} x {stage.length} tokens, {micro_rows} rows at once: compiled in "
                f"{time.monotonic() - start:.1f} s, {needed / 2**30:.1f} GiB"
            )
            if needed < 0.9 * limit or micro_rows == 1:
                return compiled
            micro_rows //= 2

    def _stage(
        self,
        index: int,
        stage: Stage,
        step: Any,
        begin: float,
        before: float,
        planned: float,
        until: float,
        first_step: int,
    ) -> None:
        record, in_flight, batches = self.record, collections.deque(), self.feed.batches(index)
        printed = noted = saved = time.monotonic()
        tokens_printed, waited = record["tokens"], 0.0
        metrics: dict[str, Any] = {}
        rate, last_step = 0.0, record["steps"] + (self.args.steps_per_stage or math.inf)
        while True:
            asked = time.monotonic()
            tokens, kinds = next(batches)
            now = time.monotonic()
            waited += now - asked
            record["elapsed_s"] = before + now - begin
            if record["elapsed_s"] >= until or record["steps"] >= last_step:
                break
            rate = learning_rate(
                self.preset.peak_rate,
                record["elapsed_s"] / planned,
                record["steps"] - first_step,
                self.fresh_moments,
            )
            self.params, self.moments, metrics = step(
                self.params, self.moments, tokens, kinds, np.float32(rate)
            )
            record["steps"] += 1
            record["tokens"] += tokens.size
            record["text_tokens"] += int(np.count_nonzero(kinds == TEXT))
            in_flight.append(metrics)
            if len(in_flight) > _STEPS_IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
            if now - noted >= _CURVE_EVERY_S:
                noted = now
                self._note(metrics, stage.length, rate)
            if now - printed >= self.args.print_every:
                speed = (record["tokens"] - tokens_printed) / (now - printed)
                self.say(
                    f"{self._note(metrics, stage.length, rate)}, {speed / 1e6:.2f} M tokens/s, "
                    f"waited for data {waited / (now - printed):.0%}"
                )
                printed, tokens_printed, waited = now, record["tokens"], 0.0
            if now - saved >= _SAVE_EVERY_S:
                saved = now
                self._save()
        jax.block_until_ready(self.params)
        if metrics:
            self.say(f"stage ends: {self._note(metrics, stage.length, rate)}")
            self._save()

    def _note(self, metrics: dict[str, Any], length: int, rate: float) -> str:
        """Adds a point to the curve; a diverged run ends here, before it is saved."""
        values = {name: float(value) for name, value in metrics.items()}
        if not all(math.isfinite(v) for v in values.values()):
            raise FloatingPointError(f"expected finite losses, got {values}; lower the rate")
        record = self.record
        point = {"elapsed_s": round(record["elapsed_s"], 1), "step": record["steps"]}
        point |= {"tokens": record["tokens"], "length": length, "rate": rate}
        record["curve"].append({**point, **{k: round(v, 4) for k, v in values.items()}})
        return f"step {record['steps']}, {length} tokens, rate {rate:.1e}: " + ", ".join(
            f"{name} {value:.3f}" for name, value in values.items()
        )

    def _save(self) -> None:
        storage.save(self.folder, self.params, self.moments, self.record)

    def score(self) -> None:
        """Exact answers per task and length and losses on both splits; into the record."""
        scorer = make_scorer(self.graph, **self.how)
        at_once = self.preset.step_tokens_at_once
        length = self.preset.scored_lengths[min(1, len(self.preset.scored_lengths) - 1)]
        self.record["text_loss"] = {"length": length} | {
            split: text_loss(scorer, self.params, ids, length, at_once)
            for split, ids in self.ids.items()
            if len(ids) > length
        }
        self.say(f"text loss in nats per token: {self.record['text_loss']}")
        self._save()
        self.record["exact_answers"] = self.examination.mark(scorer, self.params, at_once)
        self._save()
        print(table(self.record["exact_answers"]), flush=True)

    def close(self) -> None:
        """Ends the background processes."""
        self.feed.close()
        self.examination.close()


def table(found: dict[str, dict[str, Any]]) -> str:
    """Shares of exact answers as text, a task a line."""
    lines = [f"{'task':<18}" + "".join(f"{length:>8}" for length in found)]
    for task in next(iter(found.values())):
        shares = [found[length][task]["share"] for length in found]
        cells = "".join(f"{'-' if share is None else f'{share:.0%}':>8}" for share in shares)
        lines.append(f"{task:<18}{cells}")
    return "\n".join(lines)


def export(folder: Path, preset: Preset) -> None:
    """Writes the bfloat16 model of a run's weights into the same folder."""
    graph, abstract = storage.abstract_model(preset.sizes)
    params, _ = storage.load(folder, abstract)
    storage.export(folder, nnx.merge(graph, params))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Trains the small long-context model.")
    parser.add_argument("--output", required=True, help="folder of the run's files")
    parser.add_argument("--seconds", type=float, default=480, help="training time of all sessions")
    parser.add_argument("--session-seconds", type=float, help="training time of this session")
    parser.add_argument(
        "--total-seconds", type=float, help="limit for data, training and scoring together"
    )
    parser.add_argument(
        "--no-scores", action="store_true", help="leave the marks to a later session"
    )
    parser.add_argument("--steps-per-stage", type=int, help="end each stage after so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="data processes; default: all cores but two")
    parser.add_argument("--print-every", type=float, default=20, help="seconds")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--corpus", help="folder of build_corpus.py; default: installed packages")
    parser.add_argument("--start-from", help="folder of an exported model to go on from")
    parser.add_argument("--export-only", action="store_true", help="write model.safetensors")
    args = parser.parse_args(argv)
    if args.export_only:
        export(Path(args.output), PRESETS[args.preset])
        return
    run = Run(args)
    try:
        run.train()
        if not args.no_scores:
            run.score()
    finally:
        run.close()


if __name__ == "__main__":
    main()
