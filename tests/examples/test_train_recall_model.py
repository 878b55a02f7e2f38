"""The trainer of the shipped model: its prompts, its weights in the library, its resumption."""

import importlib
import itertools
import json
import random
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from fluxion_jax.evaluation.samples import fit
from fluxion_jax.evaluation.tasks import TASKS
from fluxion_jax.models import load_model

_EXAMPLES = str(Path(__file__).parents[2] / "examples")
_LENGTH = 2048


def _module(name):
    if _EXAMPLES not in sys.path:
        sys.path.insert(0, _EXAMPLES)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    text, batches = _module("recall_model.text"), _module("recall_model.batches")
    root = tmp_path_factory.mktemp("package")
    for i in range(120):
        lines = [f"value_{i}_{j} = {i * j}  # entry {j} of file {i}" for j in range(60)]
        (root / f"file_{i}.py").write_text("\n".join(lines), encoding="utf-8")
    corpus = text.read_corpus(10**9, [root])
    tokenizer = text.train_tokenizer(corpus.train, 2048, 10**6)
    ids = text.encode_documents(tokenizer, corpus.train)
    return batches.Data(tokenizer, ids, corpus.train), corpus


def test_files_are_held_out_by_name(data):
    _, corpus = data
    assert len(corpus.train) + len(corpus.held_out) == 120
    assert corpus.held_out
    assert not set(corpus.train) & set(corpus.held_out)


def test_every_digit_is_a_token(data):
    tokenizer = data[0].tokenizer
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("is 90210, x7").ids]
    assert [p for p in pieces if re.search(r"\d", p)] == list("902107")


def _form(prompt):
    """A prompt without what is drawn: keys, values, names, and hay."""
    prompt = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", prompt)
    prompt = re.sub(r"\b[a-z]+-[a-z]+\b", "KEY", prompt)
    prompt = re.sub(r"\d{5,7}", "NUMBER", prompt)
    return re.sub(r"\b[A-Z]{5}\b", "NAME", re.sub(r"\b[A-Z]{3}\b(?<!VAR)", "SHORT", prompt))


class _Encoder:
    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("task", [name for name in TASKS if name.startswith("niah")])
def test_needle_drills_have_the_form_of_the_evaluation(task, data):
    from fluxion_jax.evaluation.needles import VARIANTS

    drills, v = _module("recall_model.drills"), VARIANTS[task]
    prompt = fit(TASKS[task], _Encoder(data[0].tokenizer), _LENGTH, 7).prompt
    rng = random.Random(3)
    hay = None
    separator = "\n"
    if v.haystack != "needle":
        hay, separator = drills.hay_of(rng, v.haystack, 20, [])
    drill = drills.needles(
        rng, 9, 3, hay=hay, separator=separator, key=v.key, value=v.value,
        num_keys=v.num_keys, num_values=v.num_values, num_queries=v.num_queries,
    )  # fmt: skip
    ours, theirs = _form(drill.context + drill.turns[0][0]), _form(prompt)
    # The hay differs in length and the needles in place; head, needles and question must not.
    assert ours.split("\n")[0] == theirs.split("\n")[0]
    assert ours.split("\n")[-2:] == theirs.split("\n")[-2:]
    needle = r"One of the special magic \S+ for \S+ is: \S+\."
    assert set(re.findall(needle, ours)) == set(re.findall(needle, theirs))
    if v.haystack != "needle":
        assert len(re.findall(needle, ours)) == len(re.findall(needle, theirs))
    between = set(_lines(ours, separator, needle)) ^ set(_lines(theirs, separator, needle))
    assert v.haystack == "essay" or not between


def _lines(prompt, separator, needle):
    body = prompt.split("\n", 1)[1].rsplit("\n", 2)[0]
    return [line for line in body.split(separator) if not re.fullmatch(needle, line)]


def test_needle_answers_are_in_the_context(data):
    drills = _module("recall_model.drills")
    drill = drills.needles(
        random.Random(1), 5, 9, hay=["Hay."] * 30, separator=" ", key="word", value="number",
        num_keys=6, num_values=3, num_queries=2,
    )  # fmt: skip
    assert len(drill.turns) == 3
    pairs = re.findall(r"for (\S+) is: (\d+)\.", drill.context)
    for question, answer in drill.turns:
        asked = re.search(r"for (\S+), and (\S+) mentioned", question).groups()
        wanted = [v for key in asked for k, v in pairs if k == key]
        assert len(wanted) == 6
        assert re.findall(r"\d+", answer) == wanted


def test_chain_drills_have_the_form_of_the_evaluation(data):
    drills = _module("recall_model.drills")
    theirs = _form(fit(TASKS["vt"], _Encoder(data[0].tokenizer), _LENGTH, 7).prompt)
    drill = drills.chains(random.Random(2), 9, 5, num_chains=1, hops=4, example=True)
    ours = _form(drill.context + drill.turns[0][0])
    assert set(ours.split("\n")) == set(theirs.split("\n"))
    assert sorted(ours.split("\n\n")[0].split("\n")) == sorted(theirs.split("\n\n")[0].split("\n"))
    (value,) = re.findall(r"\d{5}", drill.turns[0][0].split("value")[1])
    names = drill.turns[0][1].split()
    assert f"VAR {names[0]} = {value}" in drill.context
    assert all(f"VAR {b} = VAR {a}" in drill.context for a, b in itertools.pairwise(names))


@pytest.mark.parametrize("task", ["key_value", "code_completion", "fwe", "passkey"])
def test_drills_of_the_evaluation_begin_with_its_prompt(task):
    from fluxion_jax.evaluation.samples import Request

    drills = _module("recall_model.drills")
    drill = drills.evaluation_drill(random.Random(4), 12, 4, task=task, room_tokens=_LENGTH)
    draft = TASKS[task].build(Request(random.Random(4), 12, _LENGTH, None))
    assert drill.context + drill.turns[0][0] == draft.prompt
    assert all(ref in drill.turns[0][1] for ref in draft.references)
    for question, answer in drill.turns:
        if task == "key_value":
            key = re.findall(r'"([^"]{36})"', question)[-1]
            assert f'"{key}": "{answer}' in drill.context
        if task == "code_completion":
            assert question.rsplit("\n", 2)[-2] + "\n" + answer in drill.context
    assert len(drill.turns) == (4 if task in ("key_value", "code_completion") else 1)


def test_common_words_are_answered_in_order_of_appearance():
    from fluxion_jax.evaluation.samples import Request

    drills = _module("recall_model.drills")
    draft = TASKS["cwe"].build(Request(random.Random(4), 12, _LENGTH, None))
    answer = drills.answer_text("cwe", draft.prompt, draft.references)
    words = re.findall(r"\d+\. (\S+)", answer)
    listed = re.findall(r"\d+\. (\S+)", draft.prompt[draft.prompt.rindex("remember") :])
    assert sorted(words) == sorted(draft.references)
    assert [listed.index(w) for w in words] == sorted(listed.index(w) for w in words)


@pytest.mark.parametrize("length", [256, 2048])
def test_rows_are_full_and_repeatable(length, data):
    batches = _module("recall_model.batches")
    tokens, kinds = batches.Rows(data[0]).batch("1:2", 24, length)
    again, _ = batches.Rows(data[0]).batch("1:2", 24, length)
    assert tokens.shape == kinds.shape == (24, length)
    np.testing.assert_array_equal(tokens, again)
    assert set(np.unique(kinds)) == {0, 1, 2}


def test_long_rows_hold_several_drills(data):
    batches = _module("recall_model.batches")
    _, kinds = batches.Rows(data[0]).batch("3:4", 60, 2048)
    # An answer whose question comes behind a text window or another drill.
    ends = [np.flatnonzero(np.diff((row == batches.ANSWER).astype(int)) == -1) for row in kinds]
    assert sum(len(e) > 1 and np.ptp(e) > 1024 for e in ends) > 5


def test_several_values_are_trained_as_often_as_they_need(data):
    rows = _module("recall_model.batches").Rows(data[0])
    made = [rows.drill(random.Random(i), "niah", 2048) for i in range(100)]
    texts = [data[0].tokenizer.decode(drill[0].tolist()) for drill in made if drill]
    several = [t for t in texts if re.search(r"all the special magic \w+ for [\w-]+ mentioned", t)]
    assert len(several) > 0.25 * len(texts)


@pytest.mark.slow
def test_trains_resumes_exports_and_loads(tmp_path):
    train = _module("train_recall_model")
    model, storage = _module("recall_model.model"), _module("recall_model.storage")
    arguments = ["--output", str(tmp_path), "--preset", "tiny", "--workers", "1"]
    arguments += ["--seconds", "1000", "--steps-per-stage", "2"]
    train.main(arguments)
    first = json.loads((tmp_path / "training.json").read_text())
    train.main(arguments)
    second = json.loads((tmp_path / "training.json").read_text())
    assert (first["steps"], second["steps"]) == (6, 12)
    assert second["curve"][: len(first["curve"])] == first["curve"]
    assert second["weights_sha256"] != first["weights_sha256"]
    assert {point["length"] for point in second["curve"]} == {256, 1024, 2048}
    assert set(second["exact_answers"]["1024"]) == set(TASKS)
    assert second["text_tokens"] > first["text_tokens"] > 0
    assert len(list(tmp_path.iterdir())) == 8
    train.main([*arguments, "--export-only"])

    loaded = load_model(tmp_path, dtype="float32")
    assert loaded.tokenizer.eos_ids == (0,)
    graph, abstract = storage.abstract_model(train.PRESETS["tiny"].sizes)
    params, _ = storage.load(tmp_path, abstract)
    params = train.jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    trainer = train.nnx.merge(graph, params)
    assert isinstance(trainer, model.RecallModel)
    tokens = jnp.asarray([loaded.tokenizer.encode("def f(x):\n    return 12 * x\n" * 4)])
    np.testing.assert_allclose(
        loaded.model(tokens), trainer(tokens, dtype=jnp.float32), rtol=2e-4, atol=2e-4
    )

    # The exported weights are what another run starts from.
    started, record = storage.load_exported(tmp_path, train.PRESETS["tiny"].sizes)
    assert record["steps"] == 12
    for ours, theirs in zip(
        train.jax.tree.leaves(started), train.jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="got others"):
        storage.load_exported(tmp_path, train.PRESETS["tiny"].sizes)


def test_resumption_goes_on_exactly(tmp_path):
    train, storage = _module("train_recall_model"), _module("recall_model.storage")
    training, sizes = _module("recall_model.training"), train.PRESETS["tiny"].sizes
    graph, _ = storage.abstract_model(sizes)
    params = train.nnx.state(_module("recall_model.model").RecallModel(sizes, train.nnx.Rngs(3)))
    moments = training.optimizer().init(params)
    step = training.make_step(graph, micro_rows=2, dtype=jnp.float32, implementation="xla")
    rng = np.random.default_rng(0)

    def batch():
        tokens = rng.integers(1, sizes.vocab_size, (2, 64)).astype(np.uint16)
        return tokens, rng.integers(1, 3, (2, 64)).astype(np.uint8), np.float32(1e-3)

    params, moments, _ = step(params, moments, *batch())
    storage.save(tmp_path, params, moments, {"steps": 1})
    loaded, record = storage.load(tmp_path, params)
    kept = storage.load_moments(tmp_path, moments, record)
    later = batch()
    fresh = training.optimizer().init(loaded)
    from_fresh, _, _ = step(train.jax.tree.map(jnp.array, loaded), fresh, *later)
    resumed, _, _ = step(loaded, kept, *later)
    params, _, _ = step(params, moments, *later)
    for ours, theirs in zip(
        train.jax.tree.leaves(resumed), train.jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(from_fresh["embedding"][...], params["embedding"][...])
    assert storage.load_moments(tmp_path, kept, {**record, "weights_sha256": "other"}) is None
    (tmp_path / "moments.npz").unlink()
    assert storage.load_moments(tmp_path, kept, record) is None


def test_weights_of_another_moment_are_refused(tmp_path):
    storage = _module("recall_model.storage")
    state = {"a": jnp.arange(8.0), "b": jnp.ones((3, 2))}
    storage.save(tmp_path, state, state, {"steps": 1})
    loaded, record = storage.load(tmp_path, state)
    assert record["steps"] == 1
    np.testing.assert_array_equal(loaded["b"], state["b"])
    (tmp_path / "weights_1.f32").write_bytes(bytes(16))
    with pytest.raises(ValueError, match="got others"):
        storage.load(tmp_path, state)


def test_learning_rate_rises_stays_and_falls():
    rate = _module("recall_model.training").learning_rate
    peak = _module("recall_model.training").PEAK_RATE
    assert rate(peak, 0.0, 0, False) < 0.01 * peak
    assert rate(peak, 0.03, 9, False) == rate(peak, 0.6, 9, False) == peak
    assert rate(peak, 0.8, 9, False) == pytest.approx(0.51 * peak)
    assert rate(peak, 0.5, 0, True) == pytest.approx(peak / 100)
