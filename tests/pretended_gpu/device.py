"""A CUDA device without a GPU: tensors that say cuda:N, are dispatched as CUDA's and compute on the CPU.

`with pretend() as seen:` makes torch believe in one device. Every op on a pretended tensor passes through `handle`, which
raises on operands of two devices as CUDA would, and notes in `seen` the ops of every step and whatever would make the
host wait. Dispatch, autocast, fused optimisers, GradScaler and autograd's device threads are torch's own; guard.cpp stands in
for the driver and is compiled when first needed. What a GPU alone shows, speed, memory and its kernels' own rounding, is
not here.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # noqa: F401  (before anything is patched)
import torchvision  # noqa: F401
from filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
aten = torch.ops.aten
INDEX = int(os.environ.get("LOCAL_RANK", 0))
CUDA = torch.device("cuda", INDEX)


class NotHere(Exception):
    """Why no device can be pretended: no compiler, or a torch that the stand-in does not fit."""


def install() -> None:
    """Put guard.cpp's stand-in in the place of CUDA's driver, for this process. Raises NotHere."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise NotHere("no g++")
    library = (
        Path(tempfile.gettempdir()) / f"pretended_gpu_{os.getuid()}_{torch.__version__}_{HERE.stat().st_mtime_ns}.so"
    )
    torch_dir = Path(torch.__file__).parent
    with FileLock(f"{library}.lock"):
        if not library.exists():
            include = torch_dir / "include"
            words = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", f"-I{include}"]
            words += [f"-I{include}/torch/csrc/api/include", str(HERE.with_name("guard.cpp")), "-o", f"{library}.new"]
            words += [f"-L{torch_dir}/lib", "-lc10", "-ltorch_cpu"]
            built = subprocess.run(words, capture_output=True, text=True)
            if built.returncode:
                raise NotHere(f"guard.cpp does not fit torch {torch.__version__}: {built.stderr[-300:]}")
            os.replace(f"{library}.new", library)
    try:
        ctypes.CDLL(str(library)).install()
    except OSError as error:
        raise NotHere(str(error)) from None


class Cuda(torch.Tensor):
    """Holds its numbers in `elem` on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem, requires_grad=False):
        with torch._C._DisableTorchDispatch():
            n = elem.untyped_storage().nbytes() // elem.element_size()
            meta = torch.empty(n, dtype=elem.dtype, device="meta").as_strided(
                elem.size(), elem.stride(), elem.storage_offset()
            )
            self = torch.Tensor._make_subclass(
                cls, meta, requires_grad, dispatch_device=True, device_for_backend_keys=CUDA
            )
        self.elem = elem
        return self

    def __init__(self, *_, **__):
        pass

    @property
    def device(self):
        return CUDA

    def tolist(self):
        SEEN.sync("tolist (device to host)")
        return self.elem.tolist()

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def data_ptr(self):
        return self.elem.data_ptr()

    def __deepcopy__(self, memo):
        new = Cuda(self.elem.clone(), self.requires_grad)
        if getattr(self, "_is_param", False):
            new._is_param = True
        memo[id(self)] = new
        return new

    def __reduce_ex__(self, proto):  # in a checkpoint: as one that was loaded to the CPU
        return self.elem.detach().clone().__reduce_ex__(proto)

    def __repr__(self, **_):
        return f"Cuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return handle(func, args, kwargs or {})


class Seen:
    def __init__(self):
        self.phase, self.step = "setup", None
        self.ops = defaultdict(Counter)  # (step, phase) -> op -> count, without views
        self.syncs = []  # (step, phase, what, where)
        self.copies = []  # pageable host to device copies that do not block
        self.low = Counter()  # (where, op, dtype) of low-precision ops issued by a trainer file itself
        self.lines = defaultdict(Counter)  # phase -> line -> ops
        self.errors = []

    def where(self, depth=2):
        frames = []
        f = sys._getframe(1)
        while f is not None:
            name = f.f_code.co_filename
            if name.startswith(f"{ROOT}/") and not name.startswith(f"{ROOT}/tests/") and "site-packages" not in name:
                frames.append(f"{name[len(str(ROOT)) + 1 :]}:{f.f_lineno}")
            f = f.f_back
        return " < ".join(frames[:depth]) or "torch/accelerate only"

    def outside(self):
        """The innermost frame of a known library, where no line of the project is on the stack right above it."""
        f = sys._getframe(1)
        while f is not None:
            name = f.f_code.co_filename
            if (
                name != str(HERE)
                and "_python_dispatch" not in name
                and "_ops.py" not in name
                and "functional.py" not in name
            ):
                return f"{'/'.join(name.split('/')[-2:])}:{f.f_lineno}"
            f = f.f_back

    def sync(self, what):
        if self.step is not None:
            self.syncs.append((self.step, self.phase, what, self.where(), self.outside()))


SEEN = Seen()
FREE = {  # no kernel
    "aten::detach", "aten::alias", "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty", "aten::new_empty_strided", "aten::lift_fresh", "aten::_reshape_alias", "aten::set_", "aten::is_same_size",
}  # fmt: skip
WAITS = {  # need a number from the device, or copy one there by themselves
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::bincount",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::repeat_interleave", "aten::histc", "aten::linalg_eigh",
    "aten::_linalg_eigh", "aten::_linalg_svd", "aten::masked_scatter_", "torchvision::nms", "aten::multinomial",
}  # fmt: skip
MIXED_OK = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put_",
    "aten::index_put",
    "aten::_index_put_impl_",
}
KERNELS = {}  # CUDA's own kernels, by equivalent ones


def unwrap(x):
    return x.elem if isinstance(x, Cuda) else x


def is_cuda_device(d):
    return d is not None and torch.device(d).type == "cuda"


PINNED = set()


def handle(func, args, kwargs):
    name = func._schema.name
    if func is torch.ops.prim.device.default:
        return CUDA
    flat, spec = tree_flatten((args, kwargs))
    ours = [x for x in flat if isinstance(x, Cuda)]
    target = kwargs.get("device")
    if not ours and not is_cuda_device(target):
        return func(*args, **kwargs)
    host = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Cuda)]
    leaves_device = target is not None and not is_cuda_device(target) and ours
    if ours and any(x.dim() for x in host) and name not in MIXED_OK and not name.startswith("c10d"):
        shapes = [
            f"{'cuda' if isinstance(x, Cuda) else 'cpu'}{tuple(x.shape)}" for x in flat if isinstance(x, torch.Tensor)
        ]
        message = f"Expected all tensors to be on the same device: {name} of {', '.join(shapes)}"
        SEEN.errors.append((SEEN.step, SEEN.phase, message, SEEN.where(4)))
        raise RuntimeError(message)
    if name.startswith("aten::_fused"):  # CUDA's multi-tensor kernels refuse operands whose strides differ
        for row in zip(*(x for x in args[:3] if isinstance(x, (list, tuple)) and x), strict=True):
            if len({tuple(n for n, size in zip(t.stride(), t.shape, strict=True) if size > 1) for t in row}) > 1:
                SEEN.errors.append(
                    (SEEN.step, SEEN.phase, f"{name} of strides {[t.stride() for t in row]}", SEEN.where(4))
                )
    # host waits
    if name in WAITS and ours:
        SEEN.sync(name)
    elif name in ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_") and ours:
        indices = [i for i in args[1] if i is not None]
        fills = (
            name != "aten::index" and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        )  # becomes masked_fill
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices) and not fills:
            SEEN.sync(f"{name} with a boolean mask (nonzero)")
        elif any(not isinstance(i, Cuda) and i.dim() for i in indices):
            SEEN.sync(f"{name} with indices on the host (copied, blocking)")
        if name != "aten::index" and not isinstance(args[2], Cuda) and args[2].dim():
            raise RuntimeError(f"{name}: values on the host")
    elif name == "aten::copy_" and len({isinstance(x, Cuda) for x in args[:2]}) == 2:
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        transfer(args[1], isinstance(args[0], Cuda), blocking)
    elif name == "aten::_to_copy":
        source, to_cuda = args[0], is_cuda_device(target)
        if isinstance(source, Cuda) != to_cuda and target is not None:
            transfer(source, to_cuda, not kwargs.get("non_blocking"))
    if not (func.is_view or name in FREE):
        SEEN.ops[SEEN.step, SEEN.phase][name] += 1
        if SEEN.step is not None:
            where = SEEN.where(1)
            SEEN.lines[SEEN.phase][where] += 1
            low = [x.dtype for x in ours if x.dtype in (torch.bfloat16, torch.float16)]
            if low and where.startswith("trainers/") and SEEN.phase == "forward":
                SEEN.low[where, name, str(low[0])] += 1
    new_kwargs = dict(kwargs)
    if is_cuda_device(target):
        new_kwargs["device"] = torch.device("cpu")
    if new_kwargs.get("pin_memory"):
        new_kwargs["pin_memory"] = False
    a, k = tree_map(unwrap, (args, new_kwargs))
    kernel = KERNELS.get(name)
    out = kernel(*a, **k) if kernel else func(*a, **k)
    if leaves_device:
        return out if not any(out is unwrap(x) for x in ours) else out.clone()
    back = {id(x.elem): x for x in ours}
    if func._schema.is_mutable and not name.startswith("c10d"):
        for x in ours:  # metadata may have changed with resize_
            if x.shape != x.elem.shape:
                raise RuntimeError(f"{name} changed the shape of its argument in place; not emulated")

    def wrap(t):
        if not isinstance(t, torch.Tensor) or isinstance(t, Cuda):
            return t
        if id(t) in back:
            return back[id(t)]
        for h in host:
            if t is h:
                return t
        return Cuda(t)

    return tree_map(wrap, out)


def transfer(source, to_cuda, blocking):
    size = source.numel() * source.element_size()
    if not to_cuda:
        SEEN.sync(f"device to host copy of {size} bytes" + ("" if blocking else ", non_blocking"))
    elif blocking:
        SEEN.sync(f"host to device copy of {size} bytes, blocking")
    elif SEEN.step is not None and source.data_ptr() not in PINNED and not source.is_pinned():
        SEEN.copies.append((SEEN.step, SEEN.phase, size, SEEN.where()))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return handle(func, args, kwargs or {})


# --- CUDA's own kernels ---


def cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    return (
        *aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps),
        torch.empty(0, dtype=torch.uint8),
    )


def cudnn_batch_norm_backward(x, grad, weight, mean, var, save_mean, save_var, eps, _):
    return aten.native_batch_norm_backward(
        grad, x, weight, mean, var, save_mean, save_var, True, eps, [True, True, True]
    )


def batch_norm_stats(x, eps):
    over = [d for d in range(x.dim()) if d != 1]
    x = x.float()
    return x.mean(over), (x.var(over, correction=0) + eps).rsqrt()


def gather_stats_with_counts(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    n = counts.view(-1, 1).float()
    total = n.sum()
    m = (mean.float() * n).sum(0) / total
    var = ((invstd.float() ** -2 - eps + (mean.float() - m) ** 2) * n).sum(0) / total
    if running_mean is not None:
        running_mean.lerp_(m.to(running_mean.dtype), momentum)
        running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
    return m, (var + eps).rsqrt()


def shaped(v, x):
    return v.view([1, -1] + [1] * (x.dim() - 2))


def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
    y = (x.float() - shaped(mean, x)) * shaped(invstd, x)
    y = y if weight is None else y * shaped(weight, x) + shaped(bias, x)
    return y.to(x.dtype)


def batch_norm_backward_reduce(grad, x, mean, invstd, weight, input_g, weight_g, bias_g):
    over = [d for d in range(x.dim()) if d != 1]
    g, centred = grad.float(), x.float() - shaped(mean, x)
    sum_dy, sum_dy_xmu = g.sum(over), (g * centred).sum(over)
    wd = weight.dtype if weight is not None else torch.float32
    return (
        sum_dy,
        sum_dy_xmu,
        (sum_dy_xmu * invstd).to(wd) if weight is not None else torch.empty(0),
        sum_dy.to(wd) if weight is not None else torch.empty(0),
    )


def batch_norm_backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    n = count.sum().float()
    w = invstd if weight is None else invstd * weight.float()
    g = grad.float() - shaped(sum_dy / n, x) - (x.float() - shaped(mean, x)) * shaped(invstd**2 * sum_dy_xmu / n, x)
    return (g * shaped(w, x)).to(x.dtype)


def unscale(tensors, found_inf, inv_scale):
    for t in tensors:
        if not t.isfinite().all():
            found_inf.fill_(1)
        t.mul_(inv_scale.to(t.dtype))


def update_scale(scale, growth, found, up, down, interval):
    if found.item():
        scale.mul_(down)
        growth.zero_()
    else:
        growth.add_(1)
        if growth.item() == interval:
            scale.mul_(up)
            growth.zero_()
    return scale


def exact(func):
    """A low-precision product as tensor cores do it: sums in float32, one rounding (the CPU's own bf16 kernels have faults)."""

    def kernel(*args, **kwargs):
        flat, spec = tree_flatten((args, kwargs))
        low = {x.dtype for x in flat if isinstance(x, torch.Tensor)} & {torch.bfloat16, torch.float16}
        if not low:
            return func(*args, **kwargs)
        a, k = tree_unflatten([x.float() if isinstance(x, torch.Tensor) and x.dtype in low else x for x in flat], spec)
        return tree_map(lambda x: x.to(next(iter(low))) if isinstance(x, torch.Tensor) else x, func(*a, **k))

    return kernel


for each in (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
    KERNELS[f"aten::{each.__name__}"] = exact(each)
KERNELS |= {
    "aten::cudnn_batch_norm": cudnn_batch_norm,
    "aten::cudnn_batch_norm_backward": cudnn_batch_norm_backward,
    "aten::batch_norm_stats": batch_norm_stats,
    "aten::batch_norm_gather_stats_with_counts": gather_stats_with_counts,
    "aten::batch_norm_elemt": batch_norm_elemt,
    "aten::batch_norm_backward_reduce": batch_norm_backward_reduce,
    "aten::batch_norm_backward_elemt": batch_norm_backward_elemt,
    "aten::_amp_foreach_non_finite_check_and_unscale_": unscale,
    "aten::_amp_update_scale_": update_scale,
}


class Event:  # DataLoader's, DDP's and the like
    def __init__(self, *_, **__):
        pass

    def __getattr__(self, _):
        return lambda *_, **__: None


@contextlib.contextmanager
def pretend(count=1):
    """torch believes in `count` CUDA devices."""
    global SEEN
    SEEN = Seen()

    def pin(self, *_, **__):
        PINNED.add(self.data_ptr())
        KEEP.append(self)
        return self

    def built(real):  # copies what it was given by itself, below any mode
        def function(data, *args, device=None, **kwargs):
            if device is None or not is_cuda_device(device) or isinstance(data, Cuda):
                return real(data, *args, **kwargs) if device is None else real(data, *args, device=device, **kwargs)
            return real(data, *args, **kwargs).to(device)

        return function

    def none(*_, **__):
        return None

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: count, "current_device": lambda: INDEX, "set_device": none,
            "get_device_name": lambda *_: "pretended", "_lazy_init": none, "is_initialized": lambda: True,
            "is_bf16_supported": lambda *_, **__: True, "manual_seed": none, "manual_seed_all": none, "synchronize": none,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": none, "empty_cache": none,
            "get_device_capability": lambda *_: (8, 0), "Event": Event, "is_current_stream_capturing": lambda: False,
            "current_stream": Event, "mem_get_info": lambda *_: (60 << 30, 80 << 30),
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", lambda: True))
        stack.enter_context(
            mock.patch.object(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
        )
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, built(getattr(torch, name))))
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(Mode())
        yield SEEN


KEEP = []
