"""Modules of torch's test database as models with a loss, and their inputs."""

import copy
import warnings

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

SAMPLES = 20  # of each module: the database has 865 for one


class Reduced(nn.Module):
    """A module made a loss: its first floating-point input depends on a parameter, its outputs are reduced to a number."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.size = nn.Parameter(torch.zeros(()))

    def forward(self, args, kwargs):
        args = list(args)
        for index, value in enumerate(args):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_nested:
                args[index] = value * (1 - 0.1 * torch.sigmoid(self.size))
                break
        outputs = self.module(*args, **kwargs)
        numbers = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad]
        return sum((t.abs().square().mean() for t in numbers), start=0 * self.size)


def samples_of(info):
    """(description, a function that makes the module, its inputs) of the first few samples."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the database draws what fractional pooling takes for random numbers in float64
        dtype = torch.float64 if "Fractional" in info.name else torch.float32
        found = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=True)
    for number, sample in enumerate(found[:SAMPLES]):
        if sample.forward_input is None:
            continue
        made, called = sample.constructor_input, sample.forward_input

        inputs = (list(called.args), dict(called.kwargs))

        def make(made=made, inputs=inputs):
            torch.manual_seed(1)
            module = info.module_cls(*copy.deepcopy(made.args), **copy.deepcopy(made.kwargs))
            if isinstance(module, nn.modules.lazy.LazyModuleMixin):
                args, kwargs = own(inputs)
                module(*args, **kwargs)
            return Reduced(module)

        yield f"{info.name} {number} {sample.desc}".strip(), make, inputs


def own(inputs):
    """The inputs with tensors of their own: some modules write into them."""
    return tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, inputs)
