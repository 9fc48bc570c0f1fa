"""LoRA in place of a memory: what as many parameters bring in the weights of the blocks [D]."""

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import seam
from .backbone import Backbone, load_backbone, required
from .files import as_path, atomic_path, is_file, load_tensors, read_bytes, save_tensors
from .memory import Memory, MemoryModel
from .prompts import AnswerScore


class LoRAModel(MemoryModel):
    """The ``backbone`` with LoRA on every linear map of its blocks and no memory: what parameters alone bring [D].

    The rank is the one whose number of parameters is nearest to ``num_parameters`` (at least 1), lora_alpha twice the
    rank, no dropout. The weights lie in a copy: ``backbone`` itself stays as it is, and memory="off" asks it; "own" and
    "zero" ask the copy. `train` trains it like any other; ``method`` is "baseline", ``state`` is empty.
    """

    def __init__(self, backbone: Backbone, num_parameters: int, seed: int = 42):
        if num_parameters < 1:
            raise ValueError(f"num_parameters={num_parameters}: give the number of parameters to match, at least 1")
        required(backbone)
        adapted = _Adapted(backbone.name, backbone.family, copy.deepcopy(backbone.model), backbone.tokenizer)
        super().__init__(adapted, "baseline", seed=seed)
        self._bare = MemoryModel(backbone, "baseline")
        maps = _linear_maps(adapted.model)
        self.rank = max(1, round(num_parameters / sum(sum(weight.shape) for weight in maps.values())))
        self._inject(sorted({name.rpartition(".")[2] for name in maps}), seed)

    def _inject(self, names: list[str], seed: int) -> None:
        import peft

        config = peft.LoraConfig(base_model_name_or_path=self.backbone.name, r=self.rank, lora_alpha=2 * self.rank,
                                 lora_dropout=0.0, target_modules=names, fan_in_fan_out=self.backbone.family == "gpt2")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # PEFT draws from the global generator, before it
            torch.default_generator.manual_seed(seed)  # moves what it drew; leave it and other devices' as they were
            peft.inject_adapter_in_model(config, self.backbone.model)
        self.backbone.model.eval()

    def __repr__(self) -> str:
        return f"LoRAModel({self.backbone.name}, rank={self.rank}, {self.num_trainable:,} trainable parameters)"

    @property
    def frozen(self) -> Backbone:
        """The bare frozen model, without LoRA's layers."""
        return self._bare.backbone

    def parameters(self) -> list[torch.nn.Parameter]:
        """LoRA's parameters, the only ones that are ever trained."""
        return [p for p in self.backbone.model.parameters() if p.requires_grad]

    def _forward(self, text: str, memory: Memory, **collected: list[Tensor]) -> tuple[Tensor, seam.Injection]:
        return (self._bare if memory == "off" else super())._forward(text, memory, **collected)

    def token_log_probs_under(self, memories: Sequence[Memory], *asked, **options) -> tuple[list[str], Tensor]:
        return (self._bare if "off" in memories else super()).token_log_probs_under(memories, *asked, **options)

    def score_pairs(self, memories: Sequence[Memory], *asked, **options) -> AnswerScore:
        return (self._bare if "off" in memories else super()).score_pairs(memories, *asked, **options)

    def scores_under(self, memories: Sequence[Memory], *asked, **options) -> AnswerScore:
        return (self._bare if "off" in memories else super()).scores_under(memories, *asked, **options)

    def answers_under(self, memories: Sequence[Memory], *asked, **options) -> list[list[str]]:
        return (self._bare if "off" in memories else super()).answers_under(memories, *asked, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write LoRA's weights and settings in PEFT's own format: ``peft.PeftModel.from_pretrained`` reads them too."""
        import peft

        model, folder = self.backbone.model, as_path(folder)
        weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        save_tensors(folder / "adapter_model.safetensors",
                     {f"base_model.model.{name}": weight for name, weight in weights.items()},
                     {"format": "pt", "backbone_fingerprint": self.frozen.fingerprint})
        with tempfile.TemporaryDirectory() as workshop, atomic_path(folder / "adapter_config.json") as partial:
            model.peft_config["default"].save_pretrained(workshop)
            partial.write_text((Path(workshop) / "adapter_config.json").read_text())

    @classmethod
    def from_pretrained(cls, folder: str | Path, backbone: Backbone | None = None) -> "LoRAModel":
        """The saved model; ``backbone`` None loads the one it was trained on by its name."""
        import peft

        folder = as_path(folder)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not is_file(folder / file):
                raise FileNotFoundError(f"{folder} holds no {file}: give a folder written by save_pretrained")
        try:
            config = json.loads(read_bytes(folder / "adapter_config.json"))
            rank, name = int(config["r"]), str(config["base_model_name_or_path"])
            tensors, metadata = load_tensors(folder / "adapter_model.safetensors")
            fingerprint = metadata["backbone_fingerprint"]
            weights = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is damaged or no LoRA of pdmem ({error}): save it again") from error
        backbone = load_backbone(name) if backbone is None else required(backbone)
        if backbone.fingerprint != fingerprint:
            raise ValueError(f"{folder} was trained on {name} (fingerprint {fingerprint[:12]}), not on this "
                             f"{backbone.name} ({backbone.fingerprint[:12]}): load it with its own backbone")
        model = cls(backbone, rank * sum(sum(weight.shape) for weight in _linear_maps(backbone.model).values()))
        result = peft.set_peft_model_state_dict(model.backbone.model, weights)
        if result.unexpected_keys or len(weights) != len(model.parameters()):
            raise ValueError(f"{folder} holds other weights than LoRA of rank {rank} on {name} has: save it again")
        return model


class _Adapted(Backbone):
    """A backbone whose weights move: its fingerprint and key are taken each time they are asked for."""

    fingerprint = property(Backbone.fingerprint.func)
    cache_key = property(Backbone.cache_key.func)


def _linear_maps(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights of all linear maps in the blocks, by block and name; GPT-2's are transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return {f"{layer}.{name}": module.weight for layer, block in enumerate(seam.blocks(model))
            for name, module in block.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
