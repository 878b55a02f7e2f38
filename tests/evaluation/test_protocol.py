"""The frozen protocol is complete, and changed prompts are noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fluxion_jax import cli
from fluxion_jax.errors import ConfigError, IntegrityError
from fluxion_jax.evaluation import TASKS, runner
from fluxion_jax.evaluation.protocol import check_prompts, first_prompts, frozen_for, load_protocol
from fluxion_jax.models import load_model
from fluxion_jax.policy import parse_policy
from tests.cli.conftest import model as model

PROTOCOL = Path(__file__).parents[2] / "benchmarks" / "protocol.json"


def test_the_protocol_holds_the_headline_table():
    settings, document = load_protocol(PROTOCOL)
    assert set(settings.tasks) == set(TASKS)
    assert settings.samples >= 400
    assert settings.seed >= 1_000_000
    for policy in settings.policies:
        assert str(parse_policy(policy)) == policy
    names = {f"{t}:{n}" for t in settings.tasks for n in settings.lengths_tokens}
    assert document["prompts_sha256"]
    assert all(set(hashes) == names for hashes in document["prompts_sha256"].values())


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_the_fidelity_protocols_have_real_text(name):
    settings, document = load_protocol(PROTOCOL.with_name(f"fidelity-{name}.json"))
    assert "real_text" in settings.tasks
    assert settings.seed >= 1_000_000
    names = {f"{t}:{n}" for t in settings.tasks for n in settings.lengths_tokens}
    assert document["prompts_sha256"]
    assert all(set(hashes) == names for hashes in document["prompts_sha256"].values())


def test_changed_prompts_are_refused(capsys, monkeypatch, tmp_path, model):
    loaded = load_model(model)
    document = json.loads(PROTOCOL.read_text())
    document |= {"tasks": ["passkey"], "lengths_tokens": [640], "prompts_sha256": {}}
    path = tmp_path / "protocol.json"
    path.write_text(json.dumps(document))
    settings, read = load_protocol(path)
    assert not check_prompts(loaded, settings, read)
    frozen = {frozen_for(loaded): first_prompts(loaded, settings)}
    path.write_text(json.dumps({**document, "prompts_sha256": frozen}))
    settings, read = load_protocol(path)
    assert check_prompts(loaded, settings, read)
    seen = []
    empty = {"rows": [], "text_rows": [], "settings": {"model": "m", "policies": ["full"]}}
    monkeypatch.setattr(runner, "evaluate", lambda _, s, **__: seen.append(s) or dict(empty))
    arguments = ["evaluate", "--json", "--model", str(model), "--protocol", str(path)]
    assert cli.main(arguments) == 0
    assert seen == [settings]
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert protocol == {"sha256": read["sha256"], "prompts_checked": True}
    part = ["--policy", "fixed:16:0.3", "--task", "passkey", "--length", "640", "--samples", "8"]
    assert cli.main([*arguments, *part]) == 0
    assert seen[1:] == [dataclasses.replace(settings, policies=("fixed:16:0.3",), samples=8)]
    assert json.loads(capsys.readouterr().out)["protocol"] == protocol
    for option, value in (("--task", "vt"), ("--length", "1024"), ("--samples", "401")):
        assert cli.main([*arguments, option, value]) == 2
        assert "of the protocol" in capsys.readouterr().err or option == "--samples"
    assert len(seen) == 2
    path.write_text(json.dumps({**document, "seed": 7, "prompts_sha256": frozen}))
    with pytest.raises(IntegrityError, match="got others for passkey:640"):
        check_prompts(loaded, *load_protocol(path))
    texts = dataclasses.replace(settings, tasks=("real_text",))
    first, again = (first_prompts(loaded, dataclasses.replace(texts, seed=seed)) for seed in (0, 1))
    assert set(first) == {"real_text:640"}
    assert first != again
    path.write_text("{}")
    with pytest.raises(ConfigError, match="expected policies in the protocol"):
        load_protocol(path)
