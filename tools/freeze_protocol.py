"""Adds the hashes of a model's prompts to a protocol, before anything is measured with it.

python tools/freeze_protocol.py benchmarks/protocol.json MODEL
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fluxion_jax.evaluation.protocol import first_prompts, frozen_for, load_protocol
from fluxion_jax.models import load_model


def main() -> None:
    path, name = Path(sys.argv[1]), sys.argv[2]
    settings, _ = load_protocol(path)
    model = load_model(name)
    document = json.loads(path.read_text())
    document["prompts_sha256"][frozen_for(model)] = first_prompts(model, settings)
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
