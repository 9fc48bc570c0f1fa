"""Linear maps of a frozen model whose weights are cast once, and not at every call [D].

Under ``torch.autocast`` a linear map casts its weight each time it is called: torch keeps casts of weights that train
only. Here the cast of a frozen weight is kept, so that a pass gives the same numbers, bit for bit, in less time. It
costs the casts' memory: half of the float32 weights', from the first pass under autocast on.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D


def cast_once(model: nn.Module) -> None:
    """Let the linear maps of ``model``, torch's and GPT-2's own, keep the casts of their frozen weights, in place; weights
    and names stay."""
    kinds = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))


def _cast(module: nn.Module, x: Tensor) -> Tensor:
    """The weight as a product with ``x`` wants it: as autocast would cast it, if it is frozen."""
    weight, kind = module.weight, x.device.type
    if weight.requires_grad or weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return weight
    key = torch.get_autocast_dtype(kind), weight.device, weight.data_ptr(), weight._version  # moved or changed: anew
    kept = module.__dict__.get("_kept_cast")
    if kept is None or kept[0] is not weight or kept[1] != key:
        with torch.inference_mode(False):  # a pass with gradients may use it later
            kept = module.__dict__["_kept_cast"] = weight, key, weight.detach().to(key[0])
    return kept[2]


class FrozenLinear(nn.Linear):
    """A linear map that keeps its weight's cast."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, _cast(self, input), self.bias)


class FrozenConv1D(Conv1D):
    """GPT-2's linear map, which keeps its weight's cast."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), _cast(self, x)).unflatten(0, x.shape[:-1])
