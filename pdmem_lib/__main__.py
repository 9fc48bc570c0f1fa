"""``python -m pdmem_lib``: a chat with a memory, and the few steps that the pipeline takes outside a notebook."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import chat, collected, experiment
from .backbone import load_backbone
from .parameters import listed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdmem_lib", description="Persistent latent memory, command line.")
    commands = parser.add_subparsers(dest="command", required=True)
    resolve = commands.add_parser("resolve", help="print which backbone and data 'auto' stands for here, as JSON")
    encode = commands.add_parser("encode", help="fill the caches: hidden states of turns, the frozen model's answers")
    foretell = commands.add_parser("foretell", help="print how long runs will take here; measures for minutes")
    foretell.add_argument("--methods", default="", help="comma lists; empty: the preset's own")
    foretell.add_argument("--capacities", default="")
    foretell.add_argument("--seeds", default="")
    foretell.add_argument("--runs", default="", help="these alone, as in slot-1x-seed42,gated-10x-seed43")
    foretell.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="runs side by side")
    foretell.add_argument("--threads", type=int, default=1, help="of one run")
    foretell.add_argument("--folder", help="of the runs: what their checkpoints hold need not be trained again")
    hold = commands.add_parser("banks", help="what a whole conversation leaves in a bank: its directions, and which are its own")
    hold.add_argument("--seeds", default="42,43,44", help="comma list")
    hold.add_argument("--out", help="a CSV file for the table")
    for command in (resolve, encode, foretell, hold):
        command.add_argument("--backbone", default="auto", help="auto, gpt2, smollm2-135m, tiny-gpt2, a hub name, a folder")
        command.add_argument("--data", default="auto", help="auto, locomo, synthetic, or a LoCoMo-format JSON file")
        command.add_argument("--preset", default="quick", help=", ".join(experiment.PRESETS))
    agree = commands.add_parser("agree", help="how far the runs of two folders lie apart: one study made on two machines, say")
    agree.add_argument("folders", nargs=2, metavar="folder", help="of runs, or of a report's figures and tables")
    agree.add_argument("--out", help="a CSV file for the table")
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
        if given.command == "agree":
            table = collected.agreement(*(collected.collect(folder, folder) for folder in given.folders))
            print(table.to_string(index=False, float_format="%.4g"))
            if given.out:
                table.to_csv(given.out, index=False, float_format="%.4g")
            return 0
        backbone, data, why = experiment.resolve(given.backbone, given.data, given.preset)
        if given.command == "resolve":
            print(json.dumps({"backbone": backbone, "data": data, "why": why, "run_gb": experiment.PRESETS[given.preset].run_gb}))
            return 0
        if given.command == "foretell":
            return _foretell(given, backbone, data)
        loaded = experiment.load_data(data, given.preset)
        if given.command == "banks":
            return _banks(given, backbone, loaded)
        tokens = experiment.encode(load_backbone(backbone), loaded, experiment.Experiment(method="baseline", preset=given.preset))
        turns = sum(len(c.turns) for c in loaded.conversations)
        print(f"encoded {turns:,} turns ({tokens:,} tokens) of {data} with {backbone}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _listed(option: str, text: str, read: Callable, default: Sequence | None = None) -> list:
    """`parameters.listed` of an option, which its ValueError names."""
    try:
        return listed(text, read, default)
    except ValueError as error:
        raise ValueError(f"--{option} {text}: {error}") from error


def _banks(given: argparse.Namespace, backbone: str, data: experiment.Data) -> int:
    import pandas

    from .banks import bank_table

    seeds = _listed("seeds", given.seeds, int)
    if given.out and not Path(given.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {given.out}: there is no such folder, make it first")
    loaded = load_backbone(backbone)
    table = pandas.concat([bank_table(loaded, data.conversations, seeds=seeds, centred=centred) for centred in (False, True)])
    table["backbone"] = backbone
    means = table.groupby(["centred", "method", "capacity"], sort=False)[["rows", "effective_rank", "row_spread", "cosine"]]
    print(means.agg(["min", "median", "max"]).drop(columns=[("rows", "min"), ("rows", "max")]).to_string(float_format="%.3g"))
    if given.out:
        table.to_csv(given.out, index=False, float_format="%.4g")
    return 0


def _foretell(given: argparse.Namespace, backbone: str, data: str) -> int:
    from .foretell import foretell, lines

    preset, say = experiment.PRESETS[given.preset], partial(print, flush=True)
    methods = _listed("methods", given.methods, lambda name: experiment.Experiment(method=name).method, preset.methods)
    capacities = _listed("capacities", given.capacities, int, preset.capacities)
    seeds = _listed("seeds", given.seeds, int, preset.seeds)
    runs = _listed("runs", given.runs, experiment.run_of, experiment.grid(methods, capacities, seeds))
    for line in lines(foretell(runs, backbone, data, given.preset, given.cores, given.threads, say, given.folder)):
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
