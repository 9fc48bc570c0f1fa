"""``python -m pdmem_lib``: a chat with a memory, and the few steps that the pipeline takes outside a notebook."""

import argparse
import json
import logging
import sys

from . import chat, experiment
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
    talk = commands.add_parser("chat", help="talk to a memory that stays between runs (/help says how)")
    talk.add_argument("--adapter", help="a trained adapter: a folder, or its name on the model hub")
    talk.add_argument("--memory", help="folder that the memory is kept in (default: in your data folder)")
    talk.add_argument("--backbone", help="of a new memory without an adapter, or to check that it is this one")
    talk.add_argument("--no-text", action="store_true", help="keep hashes of what is said, not the words: /forget then "
                      "cannot be exact")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if given.command == "chat":
            chat.run(given.memory, given.adapter, given.backbone, keep_text=not given.no_text)
            return 0
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
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
