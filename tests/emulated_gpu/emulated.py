"""A GPU that is not there: it finds mistakes with devices on a machine without one.

Tensors on the device "emulated" are computed on the CPU, but behave as a GPU's do where it matters:

- an operation that mixes them with the CPU's tensors fails (tensors of a single number and CPU indices are allowed, as
  on CUDA);
- a generator of the CPU cannot fill them, and NumPy cannot read them;
- ``waits`` counts where a program would wait for the GPU: ``item()``, ``tolist()``, ``if tensor``, masks used as
  indices, copies to the CPU.

``with Device(): network.to("emulated")``. To have it on in a whole process, put this folder on ``PYTHONPATH`` and set
``FACEADV_DEVICE=emulated``: Python imports ``sitecustomize`` by itself when it starts.

How it works: each tensor of the device is an ``Emulated``, a wrapper without memory of its own that holds a tensor of
the CPU. Every operation of torch reaches ``_run`` below the automatic differentiation, which unwraps what it is given,
computes on the CPU, and wraps what comes out. It uses interfaces that torch keeps for makers of new devices.
"""

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "emulated"
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}  # these may see both devices
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
waits = 0


class Backend(_DummyBackendModule):
    """What torch asks of the module ``torch.emulated``: one device, which has no native bfloat16."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, including_emulation=True):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def is_available(self):
        return True


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
DEVICE = torch.device(f"{NAME}:0")


class Emulated(torch.Tensor):
    """A tensor of the device: no memory of its own, but a tensor of the CPU inside."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def __repr__(self, **_):
        return f"Emulated({self.inner!r})"

    def __format__(self, how):
        return format(self.item(), how) if self.dim() == 0 else super().__format__(how)

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_, **__):
        self.numpy()

    def tolist(self):
        return _wait(self.inner.tolist())

    def __deepcopy__(self, memo):
        copy = Emulated(self.inner.clone(), self.requires_grad)
        return memo.setdefault(id(self), torch.nn.Parameter(copy) if isinstance(self, torch.nn.Parameter) else copy)

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)  # a file holds the numbers, as if read with map_location="cpu"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class Device(TorchFunctionMode):
    """While it is on, the device exists, and all that is made on it by name is emulated."""

    def __enter__(self):
        self.operations = _Operations()
        self.operations.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        return self.operations.__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # what C++ would finish by itself, with memory on a device that has none
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Emulated):
            return function(args[0], _index(args[1]), *args[2:])
        if function in (torch.tensor, torch.as_tensor) and _is_ours(kwargs.get("device")):
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if function is torch.Tensor.new_tensor and isinstance(args[0], Emulated):
            return torch.tensor(args[1], **{"dtype": args[0].dtype} | kwargs | {"device": "cpu"}).to(DEVICE)
        if function is torch.Tensor.tolist and isinstance(args[0], Emulated):
            return _wait(args[0].inner.tolist())
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Operations that see no tensor of the device yet, such as ``torch.zeros(3, device="emulated")``."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def _index(key):
    """Lists and arrays in an index as tensors of the CPU."""
    if isinstance(key, tuple):
        return tuple(map(_index, key))
    return torch.as_tensor(key) if isinstance(key, (list, np.ndarray)) else key


def _is_ours(device):
    return device is not None and torch.device(device).type == NAME


def _wait(value):
    global waits
    waits += 1
    return value


def _run(operation, args, kwargs):
    flat, shape = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if isinstance(t, Emulated)]
    target = kwargs.get("device")
    if not here and not _is_ours(target):
        return operation(*args, **kwargs)
    _refuse(operation, args, kwargs, here, [t for t in tensors if not isinstance(t, Emulated) and t.dim()])
    home = target is not None and torch.device(target).type == "cpu"
    masks = operation in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])
    if operation in WAITING or home or masks:
        _wait(None)
    inner_args, inner_kwargs = tree_unflatten([_unwrapped(t) for t in flat], shape)
    out = _compute(operation, inner_args, inner_kwargs)
    return out if home else _wrapped(operation, args, kwargs, out)


def _refuse(operation, args, kwargs, here, there):
    """Raise what CUDA raises for tensors of two devices, and for another device's random numbers."""
    both = operation in COPIES or (
        operation in INDEXING and isinstance(args[0], Emulated) and all(not t.is_floating_point() for t in there)
    )
    if here and there and not both:
        shapes = [tuple(t.shape) for t in there]
        raise RuntimeError(
            f"{operation}: expected all tensors to be on the same device, but found {DEVICE} and cpu: {shapes} on cpu"
        )
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{operation}: expected a '{NAME}' device type for generator but found 'cpu'")


def _unwrapped(thing):
    if isinstance(thing, Emulated):
        return thing.inner
    return torch.device("cpu") if isinstance(thing, torch.device) and thing.type == NAME else thing


def _compute(operation, args, kwargs):
    """The operation on the CPU; new devices get convolutions by names of their own."""
    if operation is aten.convolution_overrideable.default:
        return aten.convolution.default(*args, **kwargs)
    if operation is aten.convolution_backward_overrideable.default:
        g, x, w, stride, padding, dilation, transposed, output_padding, groups, mask = args
        bias = [w.shape[1] * groups if transposed else w.shape[0]]
        return aten.convolution_backward.default(
            g, x, w, bias, stride, padding, dilation, transposed, output_padding, groups, mask
        )
    return operation(*args, **kwargs)


def _wrapped(operation, args, kwargs, out):
    """The result on the device. What an operation writes into is given back itself, not a second wrapper of it."""
    written = {}
    for i, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written |= dict.fromkeys(argument.alias_info.after_set, value)

    def wrap(value, returned):
        names = returned.alias_info.after_set if returned is not None and returned.alias_info is not None else ()
        same = next((written[name] for name in names if written.get(name) is not None), None)
        if same is not None:
            return same
        new = lambda t: Emulated(t) if isinstance(t, torch.Tensor) and not isinstance(t, Emulated) else t  # noqa: E731
        return tree_map(new, value)

    returns = operation._schema.returns
    if isinstance(out, tuple) and len(returns) == len(out):
        return tuple(map(wrap, out, returns))
    return wrap(out, returns[0] if returns else None)
