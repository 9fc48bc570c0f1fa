"""``python -m pdmem_lib``: the few steps that the pipeline takes outside a notebook."""

import argparse
import json
import logging
import sys

from . import experiment
from .backbone import load_backbone


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdmem_lib", description="Persistent latent memory, command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    resolve = commands.add_parser("resolve", help="print which backbone and data 'auto' stands for here, as JSON")
    encode = commands.add_parser("encode", help="fill the caches: hidden states of turns, the frozen model's answers")
    for command in (resolve, encode):
        command.add_argument("--backbone", default="auto", help="auto, gpt2, smollm2-135m, tiny-gpt2, a hub name, a folder")
        command.add_argument("--data", default="auto", help="auto, locomo, synthetic, or a LoCoMo-format JSON file")
        command.add_argument("--preset", default="quick", help=", ".join(experiment.PRESETS))
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        backbone, data, why = experiment.resolve(given.backbone, given.data, given.preset)
        if given.command == "resolve":
            print(json.dumps({"backbone": backbone, "data": data, "why": why}))
            return 0
        loaded = experiment.load_data(data, given.preset)
        tokens = experiment.encode(load_backbone(backbone), loaded, experiment.Experiment(preset=given.preset))
        turns = sum(len(c.turns) for c in loaded.conversations)
        print(f"encoded {turns:,} turns ({tokens:,} tokens) of {data} with {backbone}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
