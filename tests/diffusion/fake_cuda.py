"""CUDA without a GPU: tensors of it have shapes, types and a device, and no values; those of the host stay real."""

import sys
import traceback
from pathlib import Path

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
TORCH = str(Path(torch.__file__).parent)


class FakeCuda(FakeTensorMode):
    """Within a block, what is put on CUDA is a fake; mixing devices is an error, as it is on a GPU.

    What a GPU would be waited for is counted: a read gives 1 or True, a copy to the host zeros.

    Attributes:
        reads: who asked for values on the host.
        waits: who copied to the device in a way that waits for what was queued before.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.reads, self.waits = [], []
        self._within = False  # what an operation is made of

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._within:
            return super().__torch_dispatch__(func, types, args, kwargs)
        fakes = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked).type
        if not fakes and asked != "cuda":
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.namespace == "aten" and func._can_decompose():
            with self:  # what inference mode hands over in one piece
                return func.decompose(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.reads.append(_caller())
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and fakes and asked == "cpu":
            self.reads.append(_caller())
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and fakes and not isinstance(args[0], FakeTensor):
            self.reads.append(_caller())
            return args[0]
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            # Torch copies indices of the host, but none back to it; fake tensors let both pass.
            if fakes and not isinstance(args[0], FakeTensor):
                raise RuntimeError("a tensor of the host is indexed by one of the device")
            self.waits += [_caller() for index in args[1] if index is not None and not isinstance(index, FakeTensor)]
        if func is aten._to_copy.default and not fakes and not kwargs.get("non_blocking"):
            self.waits.append(_caller())
        if func is aten.copy_.default and not isinstance(args[1], FakeTensor) and not (args[2:] and args[2]):
            self.waits.append(_caller())
        self._within = True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._within = False


def _caller():
    """File and line of the innermost frame that is not torch's own."""
    frames = (frame for frame, _ in traceback.walk_stack(sys._getframe(1)))
    frame = next(f for f in frames if not f.f_code.co_filename.startswith((TORCH, __file__)))
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class _Accelerator(CPUAccelerator):
    def setup_device(self, device):
        pass


class _Strategy(SingleDeviceStrategy):
    def teardown(self):
        """Leaves the weights there: a fake cannot come back into a parameter."""


class _NoBackward:
    """Torch's engine asks the driver for streams, so gradients are what they would be in shape, type and device."""

    def backward(self, tensor, model, optimizer, *args, **kwargs):
        assert tensor.device == CUDA
        assert tensor.requires_grad
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


class _Full(_NoBackward, Precision):
    pass


class _Half(_NoBackward, MixedPrecision):
    pass


def on_cuda(precision="32-true"):
    """Settings of a trainer that takes its module to CUDA."""
    plugin = _Full() if precision == "32-true" else _Half(precision, "cuda")
    return {"accelerator": "auto", "strategy": _Strategy(CUDA, _Accelerator(), precision_plugin=plugin)}
