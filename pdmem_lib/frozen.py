"""Linear maps of a frozen model whose weights are cast once, and not at every call [D].

Under ``torch.autocast`` a linear map casts its weight each time it is called: torch keeps casts of weights that train
only. Here the cast of a frozen weight is kept, so that a pass gives the same numbers, bit for bit, in less time. It
costs the casts' memory: half of the float32 weights', from the first pass under autocast on.
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def cast_once(model: nn.Module) -> None:
    """Let the linear maps of ``model`` keep the casts of their frozen weights, in place; weights and names stay."""
    kinds = _kinds()
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))


def _cast(module: nn.Module, x: Tensor) -> Tensor:
    """The weight as a product with ``x`` wants it: as autocast would cast it, if it is frozen."""
    weight, kind = module.weight, x.device.type
    if weight.requires_grad or weight.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return weight
    key = torch.get_autocast_dtype(kind), weight.device, weight.data_ptr(), weight._version  # moved or changed: anew
    kept = module.__dict__.get("_kept_cast")
    if kept is None or kept[0] != key:
        with torch.inference_mode(False):  # a pass with gradients may use it later
            kept = module.__dict__["_kept_cast"] = key, weight.detach().to(key[0])
    return kept[1]


@cache
def _kinds() -> dict[type, type]:
    """Which class stands in for which: torch's, and GPT-2's own."""
    from transformers.pytorch_utils import Conv1D  # here: importing pdmem stays fast

    class FrozenLinear(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return linear(input, _cast(self, input), self.bias)

    class FrozenConv1D(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.flatten(0, -2), _cast(self, x)).unflatten(0, x.shape[:-1])

    return {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}
