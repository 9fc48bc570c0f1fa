"""Checkpoints: a run killed at any moment goes on to the weights and answers that it would have had [D].

Of training it is one safetensors file with the trained weights, the optimizer's moments, the history so far and, in its
metadata, what run it is of; what it goes on to is the same bit for bit. The place in the data is the number of steps
done: the order of all epochs follows from the seed, so that the generator is brought to where it was by drawing again,
and the learning rate follows from the step. Of an evaluation it is a JSON file with the results of its calls so far.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from . import prompts
from .backbone import use_bf16
from .files import as_path, checksum, file_checksum, load_json, load_tensors, save_json, save_tensors
from .locomo import Conversation, data_sha256
from .memory import MemoryModel
from .methods import State
from .settings import Settings
from .sources import registered_code

log = logging.getLogger(__name__)
COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "seconds")
CODE = ("backbone", "checkpoints", "frozen", "lora", "memory", "methods", "prompts", "seam", "states", "training", "write")
ASKING = ("decoding", "evaluation")  # and these decide what is answered


def identity(model: MemoryModel, conversations: Iterable[Conversation], banks: Mapping[str, State],
             settings: Settings) -> dict[str, Any]:
    """What decides the weights that a training ends with; taken before its first step."""
    return _identity(model, conversations, "training", settings, CODE) | {
        "banks": _banks(banks), "initial_weights": _weights(model)}


def identity_of_asking(model: MemoryModel, conversations: Iterable[Conversation], banks: Mapping[str, State],
                       settings: Settings) -> dict[str, Any]:
    """What decides the answers and scores of an evaluation; ``banks`` are those that it asks under, by any names."""
    return _identity(model, conversations, "evaluation", settings, (*CODE, *ASKING)) | {
        "banks": _banks(banks), "weights": _weights(model)}


def _identity(model: MemoryModel, conversations: Iterable[Conversation], of: str, settings: Settings,
              code: Iterable[str]) -> dict[str, Any]:
    return {
        "backbone": model.frozen.cache_key[:16], "data": data_sha256(list(conversations))[:16],
        "model": type(model).__name__, **asdict(model.settings), "trainable_parameters": model.num_trainable,
        **{f"{of} {name}": value for name, value in asdict(settings).items() if name not in ("progress", "autocast")},
        "bf16": use_bf16(settings.autocast, model.backbone.device), "device": model.backbone.device.type,
        "torch": torch.__version__, "prompt": [prompts.PROMPT, prompts.ANSWER],  # as they are now: one may have set them
        "method_code": registered_code(type(model.adapter), code),
        "code": _checksums(code),
    }


def _banks(banks: Mapping[str, State]) -> str:
    return checksum({f"{id}/{name}": tensor for id, bank in banks.items() for name, tensor in bank.items()})


def _weights(model: MemoryModel) -> str:
    return checksum({f"{i}": p for i, p in enumerate(model.parameters())})


def steps_done(file: str | Path) -> int:
    """How many steps the checkpoint ``file`` holds; 0 where there is none, it is damaged or of other code of the library."""
    try:
        tensors, metadata = load_tensors(file)
        return len(tensors["history"]) if json.loads(metadata["run"])["code"] == _checksums(CODE) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _checksums(modules: Iterable[str]) -> str:
    return "".join(file_checksum(Path(__file__).with_name(f"{name}.py")) for name in modules)


class Checkpoint:
    """The checkpoint ``file`` of the training that ``run`` names; kept at most every ``seconds``."""

    def __init__(self, file: str | Path, seconds: float, run: Mapping[str, Any],
                 parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer):
        self.file, self.seconds, self.run = as_path(file), seconds, json.loads(json.dumps(run))
        self.parameters, self.optimizer = parameters, optimizer
        self.kept = monotonic()

    @torch.no_grad()
    def restore(self) -> list[dict[str, float]]:
        """The history so far, with weights and optimizer as they were after it; [] where training starts anew.

        A damaged file is said in a warning and training starts anew. One of another run is a ValueError.
        """
        try:
            tensors, metadata = load_tensors(self.file)
        except FileNotFoundError:
            return []
        except (ValueError, OSError) as error:
            log.warning("training starts anew: %s", error)
            return []
        theirs = json.loads(metadata.get("run", "{}"))
        differs = [f"{name}: {theirs.get(name)!r} there, {value!r} here" for name, value in self.run.items()
                   if theirs.get(name) != value]
        if differs:
            raise ValueError(f"{self.file} is no checkpoint of this training ({'; '.join(differs)}): delete it to start "
                             "anew, or give another path")
        state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in range(len(self.parameters))}
        for name, tensor in tensors.items():
            if name != "history":
                number, what = name.split(".", 1)
                state[int(number)][what] = tensor.clone()  # off the mapped file, which the next checkpoint replaces
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(state[i].pop("weight"))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in tensors["history"].tolist()]
        return [row | {"step": int(row["step"]), "epoch": int(row["epoch"])} for row in rows]

    def keep(self, rows: Sequence[Mapping[str, float]], now: bool = False) -> None:
        """Write the checkpoint if it is due, or ``now``; whole or not at all (`files.atomic_path`)."""
        if not now and monotonic() < self.kept + self.seconds:
            return
        tensors = {"history": torch.tensor([[row[name] for name in COLUMNS] for row in rows], dtype=torch.float64, device="cpu")}
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}.weight"] = parameter.detach()
            tensors |= {f"{i}.{what}": tensor for what, tensor in self.optimizer.state[parameter].items()}
        save_tensors(self.file, tensors, {"run": json.dumps(self.run)})
        self.kept = monotonic()


class Results:
    """The results of the calls of an evaluation, always the same calls in the same order; kept in ``file`` after each.

    Results are what JSON holds. Those of the evaluation that ``run`` names are given back, in their order, before any is
    made; a file of another one, or a damaged one, is said in a warning and made again. Without a ``file`` all are made.
    """

    def __init__(self, file: str | Path | None = None, run: Mapping[str, Any] | None = None):
        self.file, self.run = None if file is None else as_path(file), json.loads(json.dumps(run or {}))
        self.made: list[Any] = self._restore() if self.file else []
        self.given = 0

    def _restore(self) -> list[Any]:
        try:
            kept = load_json(self.file)
            if kept["run"] == self.run:
                return list(kept["results"])
            log.warning("%s is of another evaluation, which is made again", self.file)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("the evaluation is made again: %s", error)
        return []

    @property
    def known(self) -> bool:
        """Whether the next result need not be made."""
        return self.given < len(self.made)

    def of(self, make: Callable[[], Any]) -> Any:
        """The next result, made by ``make`` and kept unless it is known."""
        if not self.known:
            self.made.append(make())
            if self.file:
                save_json(self.file, {"run": self.run, "results": self.made})
        self.given += 1
        return self.made[self.given - 1]
