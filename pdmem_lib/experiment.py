"""One run of the study, from its parameters to its files: what the notebooks and the command line share.

A run is an `Experiment`: backbone, data, method, capacity, seed and a preset, any of whose settings may be overridden.
It leaves a folder with tidy tables, the trained adapter and ``record.json``, written last: a folder with a record is a
finished run.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import cards, locomo
from .backbone import TINY_NAMES, Backbone, resolve_backbone, use_bf16
from .evaluation import Evaluation, EvaluateSettings, frozen_answers, sample_questions
from .estimates import FORMAT, LORA
from .files import as_path, atomic_path, file_checksum, is_file, load_json, read_bytes, save_json
from .locomo import Conversation
from .lora import LoRAModel
from .memory import MemoryModel
from .methods import METHODS, MemorySettings, method_name
from .references import ask_references, prompt_references
from .settings import Settings
from .states import encode_all
from .synthetic import synthetic_conversations
from .training import TrainSettings

if TYPE_CHECKING:
    import pandas

SYNTHETIC_SEED = 0
RUN_BYTES = 10_000_000_000  # of a GPU's memory that a run of a backbone of 135 million parameters takes: up to 9.9e9, measured
RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pandas", "scipy", "peft")


@dataclass(frozen=True)
class Preset:
    """A size of the study: which runs, and the settings of each. Settings not named keep the protocol's values [C].

    ``methods`` are names of the registry and of what is trained beside them: "slot.format", "slot.lora" (`Experiment`).
    Runs are made in their order: the longest of ``quick`` first, so that no core waits for it at the end.
    """

    about: str
    methods: tuple[str, ...]
    capacities: tuple[int, ...]
    seeds: tuple[int, ...]
    train: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # a method's own training settings, over ``train``
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[int, ...] = (64, 640)  # tokens that BM25 may fill: as many as the banks have entries [D]
    last: int | None = None  # tokens that the last turns may fill; None: the window
    synthetic: tuple[int, int] = (10, 24)  # conversations and sessions each, where the data is synthetic
    train_conversations: int | None = None  # train on the first so many of the training split; None: on all [C]
    run_gb: float = 3.5  # of main memory that a run takes, at most: measured with SmolLM2-135M, on a CPU
    backbone: str = "auto"  # what "auto" stands for
    data: str = "auto"


CONTROLS = (f"slot{FORMAT}", f"slot{LORA}")
PRESETS = {
    "smoke": Preset(
        "every path once: tiny random model, synthetic data, six methods at both capacities, controls; about 90 seconds",
        methods=("baseline", *METHODS, *CONTROLS), capacities=(1, 10), seeds=(42,), synthetic=(5, 2),
        train=dict(epochs=1, max_questions=48, lr=1e-3, warmup_steps=2),
        evaluate=dict(questions_per_bucket=4, knowledge_points=2, max_new_tokens=8), budgets=(64,), last=256,
        backbone="tiny-gpt2", data="synthetic"),
    "quick": Preset(
        "a pretrained model, six methods, the baseline and controls at 1x, about 10 minutes on 2 cores: a first look",
        methods=("baseline", *METHODS, *CONTROLS), capacities=(1,), seeds=(42,), synthetic=(5, 16), train_conversations=2,
        train=dict(epochs=1, max_questions=256, lr=1e-3, warmup_steps=2),
        evaluate=dict(questions_per_bucket=16, knowledge_points=2, answered=("own", "zero", "off", "other")),
        budgets=(64, 256), last=1024),
    "full": Preset(
        "the published protocol: six methods and the baseline, 1x and 10x, three seeds, every question",
        methods=("baseline", *METHODS, *(f"{name}{FORMAT}" for name in METHODS), f"slot{LORA}", f"gated{LORA}"),
        capacities=(1, 10), seeds=(42, 43, 44), run_gb=7.5),
    "tuned": Preset(
        "the published protocol, rate and epochs chosen on a training conversation held out (notebooks/95_learning_rates)",
        methods=METHODS, capacities=(1, 10), seeds=(42, 43, 44), run_gb=7.5,
        # of M.1's trials three are as good as one another, and a machine moves them by more (figures/README.md)
        chosen={method: dict(lr=lr, epochs=epochs, warmup_steps=20 * epochs) for method, lr, epochs in (
            ("prefix", 0.1, 2), ("cross_attention", 0.0003, 10), ("kv_extension", 0.0003, 5), ("hebbian", 0.0003, 5),
            ("gated", 0.001, 2), ("slot", 0.0003, 5))}),
}


@dataclass(frozen=True)
class Experiment(Settings):
    """The parameters of one run. ``None`` stands for the preset's value, or else the protocol's [C].

    ``method`` is a name of the registry, or one with a suffix for what is trained beside it: "slot.format", the same
    adapter trained and read with P_0 in place of every bank, so that it can learn nothing but the form of an answer;
    "slot.lora", LoRA of as many parameters and no memory at all [D].
    """

    backbone: str = "auto"
    data: str = "auto"  # "locomo", "synthetic", a LoCoMo-format JSON file, or "auto": LoCoMo where it can be had
    method: str = "slot"
    capacity: int = 1
    seed: int = 42
    preset: str = "quick"
    output_dir: str = "data/runs/example"
    # memory
    num_entries: int | None = None
    d_h: int | None = None
    top_k: int | None = None
    gamma: float | None = None
    read_gate: bool | None = None
    read_norm: bool | None = None
    # training
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup_steps: int | None = None
    clip: float | None = None
    max_questions: int | None = None
    # evaluation
    max_new_tokens: int | None = None
    questions_per_bucket: int | None = None
    knowledge_points: int | None = None

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "method", run_method(self.method))
        if split_name(self.method)[1] and self.method.startswith("baseline"):
            raise ValueError(f"{self.method!r}: the baseline has no adapter to train; name one of {', '.join(METHODS)}")
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}: known are {', '.join(PRESETS)}")
        chosen = PRESETS[self.preset].chosen
        if chosen and self.method not in (known := ["baseline", *chosen, *(method + FORMAT for method in chosen)]):
            raise ValueError(f"the preset {self.preset!r} has settings chosen for {', '.join(known)} and none for "
                             f"{self.method}: choose them first (notebooks/95_learning_rates)")
        self.memory_settings, self.train_settings, self.evaluate_settings  # noqa: B018 - refuse bad ones now

    def _given(self, *kinds: type) -> dict[str, Any]:
        names = {f.name for kind in kinds for f in fields(kind)} & {f.name for f in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def memory_settings(self) -> MemorySettings:
        """The memory's: what this run gives, else the protocol's."""
        return MemorySettings(**{**self._given(MemorySettings), "method": split_name(self.method)[0]})

    @property
    def train_settings(self) -> TrainSettings:
        """Training's: what this run gives, else the preset's, else the protocol's."""
        preset = PRESETS[self.preset]
        chosen = preset.chosen.get(split_name(self.method)[0], {})
        return TrainSettings.from_mapping({**preset.train, **chosen, **self._given(TrainSettings), **self._reads})

    @property
    def evaluate_settings(self) -> EvaluateSettings:
        """Evaluation's: what this run gives, else the preset's, else the protocol's."""
        given = {k: v for k, v in self._given(EvaluateSettings).items() if k != "batch_size"}  # that is training's
        return EvaluateSettings.from_mapping({**PRESETS[self.preset].evaluate, **given, **self._reads})

    @property
    def _reads(self) -> dict[str, str]:
        return {"memory": "initial"} if self.method.endswith(FORMAT) else {}

    @property
    def checkpoint(self) -> Path:
        """Where this run's training is kept until `save_run` is done, so that a killed run goes on from there."""
        return Path(self.output_dir) / "checkpoint.safetensors"

    @property
    def evaluated(self) -> Path:
        """Where this run's answers are kept likewise."""
        return Path(self.output_dir) / "evaluated.json"

    def build(self, backbone: Backbone) -> MemoryModel:
        """The model that this run trains and measures."""
        model = MemoryModel(backbone, **asdict(self.memory_settings))
        return LoRAModel(backbone, model.num_trainable, self.seed) if self.method.endswith(LORA) else model


def split_name(name: str) -> tuple[str, str]:
    """("slot", ".format") of "slot.format", ("slot", "") of "slot"."""
    suffix = next((suffix for suffix in (FORMAT, LORA) if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def run_method(name: str) -> str:
    """A run's method by its registered name: "slot.format" of "M.6.format"; ValueError for an unknown one."""
    method, suffix = split_name(name)
    return method_name(method) + suffix


def grid(methods: Sequence[str], capacities: Sequence[int], seeds: Sequence[int]) -> list[tuple[str, int, int]]:
    """(method, capacity, seed) of the runs that these make, in the order in which they are made.

    The baseline and LoRA have no memory to make larger: one run a seed, at 1x.
    """
    return list(dict.fromkeys((method, 1 if method == "baseline" or method.endswith(LORA) else capacity, seed)
                              for seed in seeds for capacity in capacities for method in map(run_method, methods)))


def run_of(name: str) -> tuple[str, int, int]:
    """(method, capacity, seed) of a run's folder: ("slot.format", 10, 42) of "slot.format-10x-seed42", or with M.6."""
    found = re.fullmatch(r"([\w.]+)-(\d+)x-seed(\d+)", name)
    if found is None:
        raise ValueError(f"{name!r} names no run: give a method, a capacity and a seed as in slot-1x-seed42")
    return run_method(found[1]), int(found[2]), int(found[3])


@dataclass(frozen=True)
class Data:
    """Conversations by split, with what identifies them."""

    name: str  # "locomo", "synthetic", or a file
    train: list[Conversation]
    test: list[Conversation]
    sha256: str

    @property
    def conversations(self) -> list[Conversation]:
        """Those to train on, then those to test on."""
        return self.train + self.test


def load_data(name: str = "auto", preset: str = "quick") -> Data:
    """LoCoMo, the preset's synthetic conversations, or a file in LoCoMo's format, split into train and test.

    The checksum is that of all conversations, whatever part of the training split the preset uses.
    """
    name, _ = resolve_data(name, preset)
    if name == "locomo":
        conversations = locomo.load_locomo()
    elif name == "synthetic":
        conversations = synthetic_conversations(*PRESETS[preset].synthetic, seed=SYNTHETIC_SEED)
    else:
        conversations = locomo.load_locomo(name)
    train, test = locomo.split(conversations)
    train = train[: PRESETS[preset].train_conversations]
    return Data(name, train, test, locomo.data_sha256(conversations))


def resolve_data(name: str = "auto", preset: str = "quick") -> tuple[str, str]:
    """What a data name stands for on this machine, and why, in one line."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: known are {', '.join(PRESETS)}")
    if name == "auto" and PRESETS[preset].data != "auto":
        return PRESETS[preset].data, f"data {PRESETS[preset].data}: what the preset {preset} uses"
    if name == "auto":
        available, why = locomo.locomo_available()
        if not available and os.environ.get("PDMEM_LOCOMO"):
            raise FileNotFoundError(f"PDMEM_LOCOMO is set, but {why} Unset it to go on with synthetic conversations.")
        return ("locomo", f"data locomo: {why}") if available else ("synthetic", f"data synthetic, not LoCoMo: {why}")
    if name not in ("locomo", "synthetic") and not os.path.isfile(name):
        raise FileNotFoundError(f"unknown data {name!r}: known are 'auto', 'locomo', 'synthetic', or an existing file in "
                                "LoCoMo's format")
    return name, f"data {name}: asked for"


def resolve(backbone: str = "auto", data: str = "auto", preset: str = "quick") -> tuple[str, str, list[str]]:
    """(backbone, data, why): what "auto" stands for here, with one line of reason for each. Loads nothing."""
    data, why_data = resolve_data(data, preset)
    if backbone == "auto" and PRESETS[preset].backbone != "auto":
        backbone = PRESETS[preset].backbone
        why_backbone = f"backbone {backbone}: what the preset {preset} uses"
    else:
        backbone, why_backbone = resolve_backbone(backbone)
    return backbone, data, [why_data, why_backbone]


def encode(backbone: Backbone, data: Data, experiment: Experiment) -> int:
    """Fill the caches that all runs share: turns' hidden states and the frozen model's own answers. Returns tokens."""
    states = encode_all(backbone, data.conversations)
    evaluate = experiment.evaluate_settings
    frozen_answers(backbone, [q for *_, q in sample_questions(data.test, evaluate.questions_per_bucket)], evaluate)
    return sum(s.num_tokens for s in states.values())


def runs_per_gpu() -> int:
    """How many runs the first GPU's memory holds at a time, at least 1, at `RUN_BYTES` each; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    return max(1, torch.cuda.get_device_properties(0).total_memory // RUN_BYTES)


def reference_points(backbone: Backbone, data: Data, experiment: Experiment) -> "pandas.DataFrame":
    """The run's questions, asked with pieces of the conversation in the prompt: `references.ask_references`."""
    settings = experiment.evaluate_settings
    asked = sample_questions(data.test, settings.questions_per_bucket)
    points = prompt_references(PRESETS[experiment.preset].budgets, PRESETS[experiment.preset].last)
    return ask_references(backbone, data.test, asked, points, settings)


def title(backbone: str, preset: str, data: str, seeds: Sequence[int] = ()) -> str:
    """What stands under every figure's title: where its numbers come from."""
    words = [f"backbone {backbone}", f"preset {preset}", "LoCoMo" if data == "locomo" else f"data {Path(data).name}"]
    if data == "synthetic":
        words[-1] = "SYNTHETIC conversations, not LoCoMo"
    if backbone in TINY_NAMES:
        words[0] += " (random weights)"
    if seeds:
        words.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    return " · ".join(words)


def save_run(experiment: Experiment, model: MemoryModel, data: Data, history: "pandas.DataFrame",
             evaluation: Evaluation, started: float, references: "pandas.DataFrame | None" = None) -> dict[str, Any]:
    """Write a finished run into ``experiment.output_dir``; ``started`` is the `time.time` of its begin. Returns the record,
    whose seconds count what killed processes spent on what was taken from their checkpoints.

    Tables (each row says which run it is of): per_question.parquet, forgetting.csv, knowledge.csv, categories.csv,
    summary.csv, history.csv, turns.csv, and references.parquet where given; ``adapter/`` with its model card; and last
    record.json.
    """
    folder = Path(experiment.output_dir)
    run = {"method": experiment.method, "capacity": experiment.capacity, "seed": experiment.seed}
    tables = {"forgetting": evaluation.forgetting_curve(), "knowledge": evaluation.knowledge_curve(),
              "categories": evaluation.by_category(), "summary": evaluation.summary(), "history": history,
              "turns": evaluation.turns}
    for name, table in tables.items():
        with atomic_path(folder / f"{name}.csv") as partial:
            _labelled(table, run).to_csv(partial, index=False)
    with atomic_path(folder / "per_question.parquet") as partial:
        _labelled(evaluation.per_question, run).to_parquet(partial, index=False)
    (folder / "references.parquet").unlink(missing_ok=True)  # of another run that was here
    if references is not None:
        with atomic_path(folder / "references.parquet") as partial:
            _labelled(references, run).to_parquet(partial, index=False)
    model.save_pretrained(folder / "adapter")
    earlier = history.attrs.get("earlier", 0.0) + evaluation.earlier
    record = run_record(experiment, model, data, time.time() - started + earlier)
    with atomic_path(folder / "adapter" / "README.md") as partial:
        partial.write_text(cards.model_card(record, evaluation.summary(), evaluation.estimates()), encoding="utf-8")
    written = [*(f"{name}.csv" for name in tables), "per_question.parquet", *["references.parquet"][: references is not None]]
    record["files"] = {name: file_checksum(folder / name) for name in written}
    save_json(folder / "record.json", record, indent=2)
    experiment.checkpoint.unlink(missing_ok=True)
    experiment.evaluated.unlink(missing_ok=True)
    return record


def load_record(folder: str | Path) -> dict[str, Any]:
    """The record of the finished run in ``folder``; ValueError where it or a table that it names is damaged,
    FileNotFoundError where either is missing."""
    file = as_path(folder) / "record.json"
    record = read_record(file)
    written = record.get("files", {})
    if not isinstance(written, dict):
        raise ValueError(f"{file} is damaged (its files are a {type(written).__name__}): make the run again")
    for name, checksum in written.items():
        if not is_file(file.with_name(name)):
            raise FileNotFoundError(f"{file.parent} holds no {name}, which its record names: make the run again")
        if file_checksum(file.with_name(name)) != checksum:
            raise ValueError(f"{file.with_name(name)} is damaged (its checksum differs): make the run again")
    return record


def read_record(file: str | Path) -> dict[str, Any]:
    """A record alone, wherever it lies; ValueError where it is damaged.

    One written before records carried checksums is taken at its word.
    """
    if not is_file(as_path(file)):
        raise FileNotFoundError(f"there is no record {file}: make the run, or correct the path")
    try:
        record = json.loads(read_bytes(Path(file)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): make the run again") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged (it holds a {type(record).__name__}): make the run again")
    checked = "checksum" in record
    return load_json(file, "make the run again") if checked else record


def run_record(experiment: Experiment, model: MemoryModel, data: Data, seconds: float) -> dict[str, Any]:
    """Everything that a number needs to be traced to its run."""
    return {
        "data": data.name if data.name in ("locomo", "synthetic") else Path(data.name).name,
        "data_sha256": data.sha256,
        "preset": experiment.preset,
        "method": experiment.method,
        "capacity": experiment.capacity,
        "seed": experiment.seed,
        "settings": {"memory": asdict(experiment.memory_settings), "train": asdict(experiment.train_settings),
                     "evaluate": asdict(experiment.evaluate_settings) | {
                         "answered": list(experiment.evaluate_settings.answered)},
                     "train_conversations": [c.id for c in data.train],
                     "test_conversations": [c.id for c in data.test]},
        "precision": {name: "bfloat16" if use_bf16(settings.autocast, model.frozen.device) else "float32"  # what "auto" was
                      for name, settings in (("train", experiment.train_settings), ("evaluate", experiment.evaluate_settings))},
        "trainable_parameters": model.num_trainable,
        **circumstances(model.frozen, seconds),
    }


def circumstances(backbone: Backbone, seconds: float) -> dict[str, Any]:
    """Of any run: the backbone, versions, commit, machine, seconds, and the largest memory of this process so far."""
    return {
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "versions": {"pdmem": version("pdmem"), "python": platform.python_version(),
                     **{name: version(name) for name in RECORDED_PACKAGES}},
        "commit": _commit(),
        "hardware": _hardware(backbone.device),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": _peak_memory(),
    }


def _labelled(table: "pandas.DataFrame", run: Mapping[str, Any]) -> "pandas.DataFrame":
    table = table.copy()
    for place, (name, value) in enumerate(run.items()):
        table.insert(place, name, value)
    return table


def _commit() -> str | None:
    """The repository's commit, "+changes" behind it where the working tree differs; None outside a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed library may lie within somebody else's
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _hardware(device: torch.device) -> dict[str, Any]:
    cpu = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor() or platform.machine())
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
            "system": platform.system()}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
