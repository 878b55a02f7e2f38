from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
from fluxion_jax.calibration import storage
from fluxion_jax.calibration.storage import (
    kept_folder,
    load_calibration,
    make_policy,
    model_identity,
    save_calibration,
)
from fluxion_jax.models.decoder import Decoder
from fluxion_jax.policy import parse_policy
from fluxion_jax.policy.fluxion_policy import DEFAULT_TOLERANCE, Safety
from fluxion_jax.policy.head_predictor import HeadPredictor
from tests.generation import tiny

ROOT = Path(__file__).parents[2]


def policy_of(seed: int):
    predictor = HeadPredictor(2, 6, rngs=nnx.Rngs(seed))
    predictor.mean[...] = predictor.mean[...] + seed
    tolerances = np.asarray([0.05, 0.4], np.float32)
    return make_policy(predictor, Safety(tolerances, tolerances + seed, tolerances - 1), 0.4)


def assert_equal(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_is_saved_is_loaded(tmp_path, monkeypatch):
    save_calibration(tmp_path / "new", policy_of(3), "model", {"rows": [1]})
    loaded = load_calibration(tmp_path / "new", "model", 0.4)
    assert_equal(loaded, policy_of(3))
    assert jax.tree.structure(loaded) == jax.tree.structure(policy_of(3))
    kept = json.loads((tmp_path / "new" / storage.RECORD).read_text())
    assert kept["report"] == {"rows": [1]}
    # A default beyond what was calibrated.
    monkeypatch.setattr(storage, "DEFAULT_TOLERANCE", 0.5)
    assert float(load_calibration(tmp_path / "new", "model").tolerance) == np.float32(0.4)


def test_a_second_save_replaces_the_first(tmp_path):
    save_calibration(tmp_path, policy_of(1), "model", {})
    save_calibration(tmp_path, policy_of(2), "model", {})
    assert_equal(load_calibration(tmp_path, "model", 0.4), policy_of(2))
    assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.calibration.test_storage import policy_of
from fluxion_jax.calibration import storage

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "weights written":
    storage.file_checksums = die
elif sys.argv[3] == "record written":
    Path.replace = die
else:
    storage.shutil.rmtree = die
storage.save_calibration(Path(sys.argv[1]), policy_of(2), "model", {})
"""


@pytest.mark.parametrize(
    ("moment", "seed"), [("weights written", 1), ("record written", 1), ("replaced", 2)]
)
def test_a_kill_while_saving_loses_nothing(tmp_path, moment, seed):
    save_calibration(tmp_path, policy_of(1), "model", {})
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(ROOT), moment],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_equal(load_calibration(tmp_path, "model", 0.4), policy_of(seed))
    save_calibration(tmp_path, policy_of(3), "model", {})
    assert_equal(load_calibration(tmp_path, "model", 0.4), policy_of(3))
    assert len(list(tmp_path.iterdir())) == 2


def test_damage_is_noticed(tmp_path):
    save_calibration(tmp_path, policy_of(1), "model", {})
    record = tmp_path / storage.RECORD
    text = record.read_text()
    (version,) = tmp_path.glob("version-*")
    largest = max((p for p in version.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = largest.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content[:-9]):
        largest.write_bytes(changed)
        with pytest.raises(fx.IntegrityError, match="expected the files that"):
            load_calibration(tmp_path, "model")
    largest.write_bytes(content)
    for field, value in (("format", 1), ("features", ["layer"])):
        record.write_text(json.dumps({**json.loads(text), field: value}))
        with pytest.raises(
            fx.IntegrityError, match=r"expected calibration format 2.*calibrate again"
        ):
            load_calibration(tmp_path, "model")
    for broken in ("{", "[]", "{}"):
        record.write_text(broken)
        with pytest.raises(fx.IntegrityError, match="expected a calibration's record"):
            load_calibration(tmp_path, "model")
    record.unlink()
    with pytest.raises(fx.ConfigError, match="run: fluxion calibrate"):
        load_calibration(tmp_path, "model")


def test_weights_of_another_model_are_refused(tmp_path):
    save_calibration(tmp_path, policy_of(1), "another model's", {})
    with pytest.raises(fx.ConfigError, match=r"calibrated for this model \(mine\), got those"):
        load_calibration(tmp_path, "mine")


def test_an_identity_is_of_sizes_and_values_and_not_of_the_dtype():
    model = tiny.llama()
    identity = model_identity(model, model.config)
    assert identity == model_identity(Decoder.random(model.config), model.config)
    graph, params = nnx.split(model)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert identity == model_identity(nnx.merge(graph, half), model.config)
    other = Decoder.random(model.config, 1)
    assert identity != model_identity(other, model.config)


def test_a_name_finds_the_weights_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny.llama()
    identity = model_identity(model, model.config)
    save_calibration(kept_folder(identity), policy_of(1), identity, {})
    save_calibration(tmp_path / "mine", policy_of(2), identity, {})
    assert_equal(parse_policy("fluxion:tolerance=0.4", model), policy_of(1))
    assert float(parse_policy("fluxion", model).tolerance) == np.float32(DEFAULT_TOLERANCE)
    named = parse_policy(f"fluxion:tolerance=0.4:weights={tmp_path}/mine", model)
    assert_equal(named, policy_of(2))
    assert parse_policy(named) is named
    with pytest.raises(fx.ConfigError, match="within the calibrated range"):
        parse_policy("fluxion:tolerance=0.5", model)
    with pytest.raises(fx.ConfigError, match="expected weights calibrated for this model"):
        parse_policy(f"fluxion:weights={tmp_path}/mine", tiny.llama(1))


@pytest.mark.slow
def test_a_model_with_shipped_weights_generates_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(storage, "SHIPPED", tmp_path / "shipped")
    model, rows = tiny.llama(), tiny.prompts()
    options = {"max_new_tokens": 3, "chunk_tokens": tiny.CHUNK_TOKENS, "progress": False}

    def generate(**given):
        execution = fx.Execution(dense_below_tokens=0)
        return fx.generate(model, rows, execution=execution, **options, **given)

    assert generate().stats.read_fraction == 1
    other = tiny.llama(1)
    for network, seed in ((other, 1), (model, 2)):
        identity = model_identity(network, network.config)
        # Whose heads all stream.
        never = Safety(*(np.asarray(x, np.float32) for x in ([0.05, 0.4], [-99, -99], [0, 0])))
        made = dataclasses.replace(policy_of(seed), safety=never)
        save_calibration(storage.SHIPPED / identity[:16], made, identity, {})
    assert_equal(parse_policy("fluxion:tolerance=0.4", model), made)
    default, named = generate(), generate(policy="fluxion")
    for a, b in zip(default.tokens, named.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    assert default.cache.sketch
    assert default.stats.read_fraction == named.stats.read_fraction == 0
    # A cache without a sketch cannot be looked at.
    without = generate(cache=tiny.new_cache(model))
    assert without.stats.read_fraction == 1
    # The user's own weights come before those that are shipped.
    save_calibration(kept_folder(identity), policy_of(3), identity, {})
    assert_equal(parse_policy("fluxion:tolerance=0.4", model), policy_of(3))
    assert storage.default_policy(object()) == fx.full()
    (version,) = kept_folder(identity).glob("version-*")
    next(p for p in version.rglob("*") if p.is_file()).unlink()
    with pytest.raises(fx.IntegrityError, match="expected the files that"):
        generate()


def test_weights_are_shipped_by_copying_them(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("ship_weights", ROOT / "tools/ship_weights.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool.ship, "__defaults__", (tmp_path / "shipped",))
    report = {"settings": {"model": "tiny"}}
    for seed in (1, 2):
        save_calibration(tmp_path / "made", policy_of(seed), "0123456789abcdefgh", report)
        (tmp_path / "made" / "samples").mkdir(exist_ok=True)
        tool.main([str(tmp_path / "made")])
    place = tmp_path / "shipped" / "0123456789abcdef"
    assert_equal(load_calibration(place, "0123456789abcdefgh", 0.4), policy_of(2))
    assert len(list(place.iterdir())) == 2
    assert f"tiny: {place}" in capsys.readouterr().out
