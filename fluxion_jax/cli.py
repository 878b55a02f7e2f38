"""The command line: `fluxion` or `python -m fluxion_jax`.

Results go to standard output, everything else to standard error. Exit codes: 0 for success, 1 for
an error of the work itself, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxion_jax.errors import ConfigError, FluxionError

_EXIT_ERROR = 1
_EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        report: int = arguments.run(arguments)
        return report
    except ConfigError as error:
        print(f"fluxion: {error}", file=sys.stderr)
        return _EXIT_USAGE
    except (FluxionError, OSError) as error:
        print(f"fluxion: {error}", file=sys.stderr)
        return _EXIT_ERROR
    except KeyboardInterrupt:
        print("fluxion: interrupted", file=sys.stderr)
        return _EXIT_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fluxion", description="Long-context decoding with the KV cache in host memory."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_info(commands)
    _add_generate(commands)
    _add_demo(commands)
    _add_evaluate(commands)
    _add_heads(commands)
    _add_calibrate(commands)
    _add_bench(commands)
    _add_plan(commands)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write the report (and figures) there"
    )


def _add_info(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, devices, host library, memory")
    _add_common(parser)
    parser.set_defaults(run=_info)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser("generate", help="generate text from a prompt")
    parser.add_argument(
        "--model",
        required=True,
        help="a model directory, a .gguf file, recall-12m, smollm2-135m or gemma3-270m",
    )
    parser.add_argument(
        "--prompt-file", required=True, metavar="F", help="file with the prompt; - for stdin"
    )
    parser.add_argument(
        "--policy",
        help="full, fluxion, or such as fixed:16:0.05; default fluxion for a model with calibrated "
        "weights, else full",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=0.9, help="nucleus, used above 0 only")
    parser.add_argument("--top-k", type=int, metavar="K", help="likeliest tokens to draw from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--split", help="host (default), device, model, adaptive, or the host's share, 0 to 1"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    _add_common(parser)
    parser.set_defaults(run=_generate)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser("demo", help="a real model on a long real text")
    parser.add_argument("--model", default="smollm2-135m", help="see fluxion generate --help")
    parser.add_argument("--context-tokens", type=int, default=6000, metavar="N")
    parser.add_argument("--scored-tokens", type=int, default=256, metavar="N")
    _add_common(parser)
    parser.set_defaults(run=_demo)


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="quality of policies on long-context tasks")
    parser.add_argument("--model", help="see fluxion generate --help; default recall-12m")
    for name, metavar, kind, text in (
        ("policy", "P", str, "full is always the reference; default also fixed:16:0.05"),
        ("task", "T", str, "default niah_multikey_2, vt, key_value and real_text"),
        ("length", "S", int, "tokens of prompt and answer; default 2048 and 4096"),
    ):
        parser.add_argument(
            f"--{name}", action="append", type=kind, metavar=metavar, help=f"repeatable; {text}"
        )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="per task and length; default 4, all with --data or --protocol",
    )
    parser.add_argument(
        "--data",
        metavar="FORMAT:PATH",
        help="answer published data instead: ruler:, longbench:, longbench2: or leval: and a file "
        "or folder; --task picks tasks, --length truncates in the middle",
    )
    parser.add_argument(
        "--protocol",
        type=Path,
        metavar="F",
        help="a frozen protocol says what to evaluate; --task, --length and --samples take a part "
        "of it, --policy names other policies",
    )
    parser.add_argument("--chat", action="store_true", help="prompts of --data as a user's message")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample")
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="samples at once")
    parser.add_argument("--text", type=Path, metavar="F", help="a text file for real_text")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that make the samples"
    )
    parser.add_argument(
        "--shared-prefix",
        action="store_true",
        help="answer all policies at once from one prefix on the device; oracle:TOLERANCE needs it",
    )
    _add_common(parser)
    parser.set_defaults(run=_evaluate)


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser("calibrate", help="train the policy fluxion for a model")
    parser.add_argument("--model", required=True, help="see fluxion generate --help")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="D",
        help="a text file or a folder of them, to take prose from; default the standard library",
    )
    for name, metavar, text in (
        ("length", "S", "tokens of the longest texts; default 4096"),
        ("texts", "N", "default 16, at least 3"),
        ("steps", "N", "decode steps of an answer that are looked at, at most; default 128"),
        ("training-steps", "N", "of the optimiser; default 4000"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar=metavar, help=text)
    parser.add_argument(
        "--under-budget", type=float, metavar="F", help="share that may fall short; default 0.025"
    )
    parser.add_argument(
        "--error-left",
        type=float,
        metavar="E",
        help="mean error of a step that may be left beyond the tolerance; default 0.02",
    )
    parser.add_argument(
        "--ablate", action="store_true", help="also train without each family of features"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="keep weights, report and figure there; default is where the policy fluxion looks",
    )
    parser.set_defaults(run=_calibrate)


def _add_heads(commands: Any) -> None:
    parser = commands.add_parser("heads", help="which heads of a model stream, what others need")
    parser.add_argument("--model", default="recall-12m", help="see fluxion generate --help")
    parser.add_argument("--length", type=int, default=2048, metavar="S", help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="per task")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="decode steps of each")
    _add_common(parser)
    parser.set_defaults(run=_heads)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="measure this machine, or a selection's quality")
    kinds = parser.add_subparsers(required=True, metavar="WHAT")
    host = kinds.add_parser("host", help="host kernels against the speed of memory")
    host.add_argument("--quick", action="store_true", help="one head shape, fewer repetitions")
    host.add_argument(
        "--compare", type=int, default=4, metavar="N", help="shapes to compare with other libraries"
    )
    host.add_argument("--budget-s", type=float, metavar="S", help="start no cell after S seconds")
    host.add_argument(
        "--report", type=Path, metavar="FILE", help="measure nothing, show and draw this report"
    )
    _add_common(host)
    host.set_defaults(run=_bench_host)
    machine = kinds.add_parser("machine", help="memories and buses; a report for split model:FILE")
    machine.add_argument("--quick", action="store_true", help="fewer repetitions")
    _add_common(machine)
    machine.set_defaults(run=_bench_machine)
    step = kinds.add_parser("step", help="decode steps of 8B-shaped models, against their bytes")
    sizes = step.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="the headline cells only")
    sizes.add_argument("--long", action="store_true", help="512K tokens, and nothing else")
    _add_case(step)
    step.add_argument("--budget-s", type=float, metavar="S", help="start no cell after S seconds")
    _add_common(step)
    step.set_defaults(run=_bench_step)
    policy = kinds.add_parser("policy", help="plans per head against fixed policies, 8B shapes")
    policy.add_argument("--quick", action="store_true", help="the headline cells only")
    _add_case(policy)
    policy.add_argument("--budget-s", type=float, metavar="S", help="start no cell after S seconds")
    policy.add_argument(
        "--report", type=Path, metavar="FILE", help="measure nothing, show this report"
    )
    _add_common(policy)
    policy.set_defaults(run=_bench_policy)
    prefill = kinds.add_parser("prefill", help="reading a long prompt into host memory")
    prefill.add_argument("--quick", action="store_true", help="fewer places of the prompt")
    _add_common(prefill)
    prefill.set_defaults(run=_bench_prefill)
    roundtrip = kinds.add_parser("roundtrip", help="handing a layer's work to the host and back")
    _add_common(roundtrip)
    roundtrip.set_defaults(run=_bench_roundtrip)
    device = kinds.add_parser("device", help="kernels of a GPU against the speed of its buses")
    device.add_argument("--quick", action="store_true", help="default settings of each kernel only")
    _add_common(device)
    device.set_defaults(run=_bench_device)
    selection = kinds.add_parser("selection", help="integer selection against its alternatives")
    selection.add_argument("--model", default="smollm2-135m", help="see fluxion generate --help")
    selection.add_argument("--context-tokens", type=int, default=8192, metavar="N")
    selection.add_argument("--queries", type=int, default=64, metavar="N", help="of each head")
    _add_common(selection)
    selection.set_defaults(run=_bench_selection)


def _add_case(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="this case only, such as llama-3.1-8b-32768-b4; may be repeated",
    )


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser("plan", help="what would lie where, and what a token may cost")
    parser.add_argument(
        "--model",
        required=True,
        help="8b, 70b, qwen3-8b, mistral-7b, or see fluxion generate --help",
    )
    parser.add_argument("--context", required=True, type=int, metavar="S", help="tokens")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences; default 1")
    parser.add_argument("--policy", default="fixed:16:0.05", help="full, or such as fixed:16:0.05")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--summaries", default="host", choices=("host", "device"))
    parser.add_argument("--split", default="host", choices=("host", "device", "model"))
    parser.add_argument(
        "--machine", default="h100", help="h100, or a report of fluxion bench machine"
    )
    _add_common(parser)
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from fluxion_jax import planning

    found = planning.plan(
        arguments.model,
        context_tokens=arguments.context,
        batch=arguments.batch,
        policy=arguments.policy,
        dtype=arguments.dtype,
        summaries=arguments.summaries,
        split=arguments.split,
        machine=planning.Machine.load(arguments.machine),
    )
    _emit(arguments, found.to_dict(), str(found), "plan.json")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from fluxion_jax import env

    report = env.report()
    _emit(arguments, report, env.render(report), "info.json")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from fluxion_jax.calibration.storage import default_policy
    from fluxion_jax.generation import generate
    from fluxion_jax.models.load import load_model
    from fluxion_jax.policy import check_policy, parse_policy, parse_split
    from fluxion_jax.sampling import greedy, top_p

    if arguments.policy is not None:
        check_policy(arguments.policy)
    split = parse_split(arguments.split)
    sampling = (
        top_p(arguments.top_p, temperature=arguments.temperature, top_k=arguments.top_k)
        if arguments.temperature
        else greedy()
    )
    text = _read_prompt(arguments.prompt_file)
    model = load_model(arguments.model)
    if model.tokenizer is None:
        raise ConfigError(f"expected a model with a tokenizer, got {arguments.model} without one")
    if arguments.policy is None:
        policy = default_policy(model)
    else:
        policy = parse_policy(arguments.policy, model)
    if arguments.chat:
        prompt = model.tokenizer.chat([{"role": "user", "content": text}])
    else:
        prompt = model.tokenizer.encode(text)
    result = generate(
        model,
        prompt,
        policy=policy,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        split=split,
        seed=arguments.seed,
    )
    tokens = result.tokens[0].tolist()
    answer = model.tokenizer.decode(tokens)
    print(result.stats, file=sys.stderr)
    report = {
        "model": arguments.model,
        "policy": str(policy),
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "text": answer,
        "stats": result.stats.to_dict(),
    }
    _emit(arguments, report, answer, "generate.json")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from fluxion_jax.demo import render, run_demo
    from fluxion_jax.plotting import fidelity_figure, require_matplotlib

    # Better to miss matplotlib or the folder now than after minutes of work.
    require_matplotlib()
    folder = arguments.output or Path("output")
    folder.mkdir(parents=True, exist_ok=True)
    report = run_demo(
        arguments.model,
        context_tokens=arguments.context_tokens,
        scored_tokens=arguments.scored_tokens,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    title = (
        f"{report.model}, {report.context_tokens} tokens of Python documentation, "
        f"{report.fidelity[0].num_tokens} decode steps"
    )
    figure = folder / "demo.png"
    fidelity_figure(report.fidelity, title).savefig(figure)
    _emit(arguments, report.to_dict(), render(report), "demo.json")
    print(f"figure: {figure}", file=sys.stderr)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from fluxion_jax.evaluation import runner
    from fluxion_jax.evaluation.data import load_data
    from fluxion_jax.evaluation.figures import depth_figure, quality_figure
    from fluxion_jax.evaluation.protocol import check_prompts, load_protocol, part_of
    from fluxion_jax.evaluation.report import render
    from fluxion_jax.models.load import load_model
    from fluxion_jax.plotting import require_matplotlib

    folder = arguments.output
    if folder:
        # Better to miss them now than after minutes of work.
        require_matplotlib()
        folder.mkdir(parents=True, exist_ok=True)
    settings = runner.Settings(
        policies=tuple(arguments.policy or runner.DEFAULT_POLICIES),
        tasks=tuple(arguments.task or runner.DEFAULT_TASKS)
        if arguments.data is None
        else runner.DEFAULT_TASKS,
        lengths_tokens=tuple(arguments.length or runner.DEFAULT_LENGTHS),
        samples=runner.DEFAULT_SAMPLES if arguments.samples is None else arguments.samples,
        seed=arguments.seed,
        batch=arguments.batch,
        text=None if arguments.text is None else _read_prompt(str(arguments.text)),
        shared_prefix=arguments.shared_prefix,
    )
    model: Any = arguments.model or runner.DEFAULT_MODEL
    data = None
    frozen: dict[str, Any] = {}
    if arguments.protocol is not None:
        settings, document = load_protocol(
            arguments.protocol, shared_prefix=arguments.shared_prefix
        )
        settings = part_of(
            settings,
            policies=arguments.policy,
            tasks=arguments.task,
            lengths_tokens=arguments.length,
            samples=arguments.samples,
        )
        model = load_model(model)
        checked = check_prompts(model, settings, document)
        frozen = {"protocol": {"sha256": document["sha256"], "prompts_checked": checked}}
    if arguments.data is not None:
        model = load_model(model)
        data = load_data(
            arguments.data,
            model,
            length_tokens=None if not arguments.length else max(arguments.length),
            tasks=arguments.task,
            samples=arguments.samples,
            chat=arguments.chat,
        )
    report = runner.evaluate(
        model,
        settings,
        data=data,
        folder=folder / "cells" if folder else None,
        workers=arguments.workers,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    report |= frozen
    # Samples are apart from the tables: a large evaluation has half a million of them.
    tables = {name: part for name, part in report.items() if name != "samples"}
    _emit(arguments, tables if folder else report, render(report), "evaluate.json")
    if folder:
        with gzip.open(folder / "evaluate-samples.jsonl.gz", "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(sample) + "\n" for sample in report["samples"])
        for name, figure in (("depth", depth_figure(report)), ("quality", quality_figure(report))):
            if figure is not None:
                figure.savefig(folder / f"evaluate-{name}.png")
                print(f"figure: {folder / f'evaluate-{name}.png'}", file=sys.stderr)
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from fluxion_jax.calibration import Settings, calibrate
    from fluxion_jax.calibration.report import calibration_figure, render
    from fluxion_jax.plotting import require_matplotlib

    if arguments.output:
        require_matplotlib()
    given = {
        "length_tokens": arguments.length,
        "texts": arguments.texts,
        "steps": arguments.steps,
        "training_steps": arguments.training_steps,
        "under_budget": arguments.under_budget,
        "error_left": arguments.error_left,
        "ablate": arguments.ablate,
    }
    _, report = calibrate(
        arguments.model,
        Settings(**{name: value for name, value in given.items() if value is not None}),
        data=arguments.data,
        output=arguments.output,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    _emit(arguments, report, render(report), "calibrate.json")
    if arguments.output:
        path = arguments.output / "calibrate.png"
        calibration_figure(report).savefig(path)
        print(f"figure: {path}", file=sys.stderr)
    return 0


def _heads(arguments: argparse.Namespace) -> int:
    from fluxion_jax.evaluation.heads import Study, heads_figure, render, study_heads
    from fluxion_jax.plotting import require_matplotlib

    if arguments.output:
        require_matplotlib()
    study = Study(length_tokens=arguments.length, samples=arguments.samples, steps=arguments.steps)
    report = study_heads(arguments.model, study)
    _emit(arguments, report, render(report), "heads.json")
    if arguments.output:
        heads_figure(report).savefig(arguments.output / "heads.png")
        print(f"figure: {arguments.output / 'heads.png'}", file=sys.stderr)
    return 0


def _bench_host(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import host, host_report
    from fluxion_jax.plotting import host_figure

    if arguments.report:
        report = json.loads(arguments.report.read_text(encoding="utf-8"))
    else:
        settings = host.QUICK if arguments.quick else host.Settings()
        report = host.run(
            dataclasses.replace(settings, compared_shapes=arguments.compare),
            arguments.output / "cells" if arguments.output else None,
            lambda line: print(line, file=sys.stderr, flush=True),
            budget_s=arguments.budget_s,
        )
    _emit(arguments, report, host_report.render(report), "bench-host.json")
    if arguments.output and report["rows"]:
        path = arguments.output / "bench-host.png"
        title = f"Host kernels with {report['threads']} threads ({report['variant']})"
        try:
            host_figure(report, title).savefig(path)
        except FluxionError as error:
            # What was measured is kept; another machine can draw it.
            document = arguments.output / "bench-host.json"
            again = f"fluxion bench host --report {document} --output {arguments.output}"
            print(f"no figure: {error}, then draw it by `{again}`", file=sys.stderr)
        else:
            print(f"figure: {path}", file=sys.stderr)
    return 0


def _bench_machine(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import machine

    settings = machine.Settings(repetitions=3) if arguments.quick else machine.Settings()
    report = machine.run(settings, lambda line: print(line, file=sys.stderr, flush=True))
    _emit(arguments, report, machine.render(report), "bench-machine.json")
    return 0


def _bench_step(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import step, step_report
    from fluxion_jax.bench.cells import with_cases

    settings = step.QUICK if arguments.quick else step.LONG if arguments.long else step.FULL
    report = step.run(
        with_cases(settings, arguments.case),
        arguments.output / "cells" if arguments.output else None,
        lambda line: print(line, file=sys.stderr, flush=True),
        budget_s=arguments.budget_s,
    )
    _emit(arguments, report, step_report.render(report), "bench-step.json")
    return 0


def _bench_policy(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import policy, policy_report
    from fluxion_jax.bench.cells import with_cases

    if arguments.report:
        report = json.loads(arguments.report.read_text(encoding="utf-8"))
    else:
        report = policy.run(
            with_cases(policy.QUICK if arguments.quick else policy.FULL, arguments.case),
            arguments.output / "cells" if arguments.output else None,
            lambda line: print(line, file=sys.stderr, flush=True),
            budget_s=arguments.budget_s,
        )
    _emit(arguments, report, policy_report.render(report), "bench-policy.json")
    return 0


def _bench_prefill(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import prefill

    report = prefill.run(
        prefill.QUICK if arguments.quick else prefill.Settings(),
        arguments.output / "cells" if arguments.output else None,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    _emit(arguments, report, prefill.render(report), "bench-prefill.json")
    return 0


def _bench_roundtrip(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import roundtrip

    report = roundtrip.run()
    _emit(arguments, report, roundtrip.render(report), "bench-roundtrip.json")
    return 0


def _bench_device(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import device

    cells = arguments.output / "cells" if arguments.output else None
    report = device.run(
        device.QUICK if arguments.quick else device.Settings(),
        cells,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    _emit(arguments, report, device.render(report), "bench-device.json")
    return 0


def _bench_selection(arguments: argparse.Namespace) -> int:
    from fluxion_jax.bench import selection

    report = selection.run(
        arguments.model, context_tokens=arguments.context_tokens, num_queries=arguments.queries
    )
    _emit(arguments, report, selection.render(report), "bench-selection.json")
    return 0


def _read_prompt(name: str) -> str:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8 text in {name}, got bytes that are not") from error
    if not text.strip():
        raise ConfigError(f"expected a prompt in {name}, got nothing but blanks")
    return text


def _emit(arguments: argparse.Namespace, report: dict[str, Any], text: str, file_name: str) -> None:
    document = json.dumps(report, indent=2)
    print(document if arguments.json else text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / file_name).write_text(document + "\n", encoding="utf-8")
