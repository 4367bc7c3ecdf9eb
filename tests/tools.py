"""What several test files need: run folders without training, the one line with which something stops, the largest tensor."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import hub
from trainers import simsiam


def stop_message(call, *args, **kwargs) -> str:
    """The one line with which a call stops."""
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    message = str(stop.value)
    assert len(message) > 20 and "\n" not in message and "Traceback" not in message, message
    return message


def disturb_batch_norm(network: nn.Module) -> None:
    """Running statistics as after some training: fresh ones would hide buffers that were never loaded."""
    g = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=g)
            module.running_var.uniform_(0.5, 1.5, generator=g)
            module.num_batches_tracked.fill_(7)


def make_backbone(name: str, **kwargs) -> nn.Module:
    """A backbone of ours, the same weights every time."""
    torch.manual_seed(0)
    backbone = common.create_backbone(name, **kwargs)
    disturb_batch_norm(backbone)
    return backbone.eval()


def make_run(folder: Path, backbone: nn.Module, trainer=simsiam, **flags) -> hub.Run:
    """A run folder as a trainer leaves it behind after three steps, without the steps."""
    args = trainer.Args(run_dir=folder, **{"image_size": 32, **flags})
    run = hub.Run(args, trainer.__file__, Accelerator(cpu=True))
    run.save(3, {"model": backbone}, backbone)
    return run


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made, in the backward pass too."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out
