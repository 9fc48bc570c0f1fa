"""GPT-2 at its full size through the whole pipeline, where no hub can be reached: ``python tests/full_size.py``.

What is real is the architecture, its 124,439,808 parameters, the shape of its vocabulary and of its files. What is not
are the weights, which are random, and the vocabulary: a byte-level BPE of 50,257 tokens trained on this environment's own
text. So it shows that everything runs with ``BACKBONE=gpt2``, how long a step takes and how much memory a run needs; its
answers mean nothing.

The files lie in build/gpt2 as the hub has them, and once more as a hub's cache has them. The smoke preset runs with
``BACKBONE=build/gpt2/files`` (every run), and with ``gpt2`` and ``auto`` offline from the cache (one run each must be found
there). figures/full_size.csv gets a row a run: method, capacity, seconds_a_step (without the first), seconds,
peak_memory_bytes and the record's backbone, fingerprint, versions of torch and transformers, cpu, cores, commit.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
VOCABULARY = 50_257  # 256 bytes, 50,000 merges, and the token that ends a text
END = "<|endoftext|>"
CHARACTERS = 40_000_000
SHA = "0" * 40  # a cache names a snapshot by its commit


def text() -> Iterator[str]:
    """Words and code at hand: sources of the standard library, and of installed packages, `CHARACTERS` in all."""
    read = 0
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*.py")):
            if read < CHARACTERS:
                yield (one := path.read_text(encoding="utf-8", errors="replace"))
                read += len(one)


def make_files(folder: Path, seed: int = 0) -> None:
    """What the hub's repository gpt2 holds, under the same names: config, weights, vocab.json and merges.txt."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(text(), vocab_size=VOCABULARY - 1, min_frequency=2, show_progress=False)
    bpe.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert len(vocabulary) == VOCABULARY - 1, f"too little text here: {len(vocabulary)} tokens"
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {END: VOCABULARY - 1}, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024}))
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config())  # the defaults are GPT-2's 124M
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    model.save_pretrained(folder)


def make_cache(home: Path, files: Path) -> None:
    """The same files as ``HF_HOME`` has them after a download."""
    repository = home / "hub" / "models--gpt2"
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(SHA)
    for file in files.iterdir():
        (snapshot / file.name).unlink(missing_ok=True)
        os.link(file, snapshot / file.name)


def reproduce(folder: Path, backbone: str, methods: str = "", **environment: str) -> tuple[list[Path], str]:
    """The smoke preset's runs with ``backbone``: their folders, and what was said."""
    command = [sys.executable, "notebooks/reproduce.py", "--preset=smoke", f"--backbone={backbone}", f"--methods={methods}",
               f"--runs={folder / 'runs'}", f"--figures={folder / 'figures'}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment | {"PDMEM_CACHE": str(folder / "cache")},
                          stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(done.returncode)
    return sorted(path.parent for path in (folder / "runs").glob("*/*/record.json")), done.stdout


def row(run: Path) -> dict:
    """What a run cost, as its own record and history say."""
    record = json.loads((run / "record.json").read_text())
    history = pd.read_csv(run / "history.csv")
    steps = history["seconds"].diff().dropna() if len(history) else pd.Series(dtype=float)
    return {key: record[key] for key in ("method", "capacity", "seed")} | {
        "seconds_a_step": round(steps.mean(), 3) if len(steps) else None,
        **{key: record[key] for key in ("seconds", "peak_memory_bytes", "trainable_parameters")},
        "backbone": "GPT-2 124M, random weights", "fingerprint": record["backbone_fingerprint"][:16],
        **{name: record["versions"][name] for name in ("torch", "transformers")},
        "cpu": record["hardware"]["cpu"], "cores": record["hardware"]["cores"], "commit": record["commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="", help="comma list; empty: all that the smoke preset has")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpt2")
    parser.add_argument("--csv", type=Path, default=ROOT / "figures" / "full_size.csv")
    given = parser.parse_args()
    folder = given.folder.resolve()
    files, home = folder / "files", folder / "home"
    if not (files / "model.safetensors").is_file():
        make_files(files)
    make_cache(home, files)

    runs, _ = reproduce(folder / "from files", str(files), given.methods)
    found = pd.DataFrame([row(run) for run in runs]).sort_values(["capacity", "method"])
    assert found["fingerprint"].nunique() == 1
    for name in ("gpt2", "auto"):
        offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        if name == "auto":  # the smoke preset's own "auto" is a tiny model, so the library is asked
            code = "import pdmem_lib as p; b = p.load_backbone(); print(b.name, b.fingerprint[:16])"
            said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | offline, check=True,
                                  capture_output=True, text=True)
            print(said.stderr + said.stdout)
            assert said.stdout.split() == ["gpt2", found["fingerprint"].iloc[0]]
        else:
            cached, said = reproduce(folder / "from cache", name, "slot", **offline)
            assert {json.loads((run / "record.json").read_text())["backbone"] for run in cached} == {"gpt2"}
            assert {row(run)["fingerprint"] for run in cached} == set(found["fingerprint"])
    found.to_csv(given.csv, index=False)
    print(found.drop(columns=["backbone", "fingerprint", "torch", "transformers", "cpu", "cores", "commit"]).to_string(index=False))


if __name__ == "__main__":
    main()
