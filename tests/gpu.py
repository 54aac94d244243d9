"""A GPU without one: tensors that say "cuda", compute on the CPU, and mind its rules.

    python tests/gpu.py grpo.py --steps 2 --out RUN     # from the repository root

runs a program of the repository as if there were a GPU. What CUDA refuses is refused:
an operation on tensors of both devices (a CPU tensor of no dimension may join in), a
CPU tensor indexed by a tensor of the device, `numpy()`. `torch.cuda` is replaced where
the programs ask it. What makes the host wait for the device is counted, by the line of
the repository that asked for it; `counts` holds the numbers.

Attention is computed by its formula, which PyTorch has for every device; a call that
would leave CUDA's fused kernels (a mask, and heads in groups) is refused.
"""

import collections
import contextlib
import math
import runpy
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda:0")
aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# (file, function) of the repository, and the operation → how often the host waited
counts: collections.Counter = collections.Counter()


class OnDevice(Tensor):
    """A tensor of the device; `held` computes for it.

    Only Python is told "cuda": PyTorch's own code, which has none, sees a CPU.
    """

    device, is_cuda, is_cpu = CUDA, True, False

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(),
            storage_offset=held.storage_offset(), dtype=held.dtype)
        made.held = held
        return made

    def __repr__(self, **_) -> str:
        return f"OnDevice({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), named=None):
        leaves, form = tree_flatten((arguments, named or {}))
        packet, host = operation.overloadpacket, not isinstance(arguments[0], OnDevice)
        copying = packet is aten.copy_  # from one device to the other, too
        if not copying:
            check_devices(packet, arguments,
                          [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        count_waiting(packet, arguments)
        own = {id(leaf.held): leaf for leaf in leaves if isinstance(leaf, OnDevice)}
        inner, inner_named = tree_unflatten(
            [leaf.held if isinstance(leaf, OnDevice) else leaf for leaf in leaves],
            form)
        result = operation(*inner, **inner_named)
        if copying and host:
            return arguments[0]

        def outer(x):  # what was changed in place is still the tensor that it was
            if not isinstance(x, Tensor):
                return x
            return own[id(x)] if id(x) in own else OnDevice(x)

        return tree_map(outer, result)


def check_devices(packet, arguments: tuple, tensors: list[Tensor]) -> None:
    """Raise what CUDA raises when tensors of both devices meet."""
    if packet in INDEXING:
        if not isinstance(arguments[0], OnDevice):
            raise RuntimeError("indices should be either on cpu or on the same device "
                               "as the indexed tensor (cpu)")
        tensors = [arguments[0], *arguments[2:3]]  # indices may lie on either
        tensors = [x for x in tensors if isinstance(x, Tensor)]
    away = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
    if away:
        raise RuntimeError("Expected all tensors to be on the same device, but found "
                           f"at least two devices, cuda:0 and cpu! ({packet})")


def count_waiting(packet, arguments: tuple) -> None:
    """Count an operation whose result the host must see before it can go on."""
    waits = packet in (aten._local_scalar_dense, aten.nonzero, aten.masked_select,
                       aten.equal, aten._unique2, aten.repeat_interleave)
    waits |= packet is aten.copy_ and not isinstance(arguments[0], OnDevice)
    if packet in INDEXING:  # a mask becomes indices first
        waits |= any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
                     for i in arguments[1])
    if waits:
        count(str(packet))


def count(what: str) -> None:
    """The host has waited, for the line of the repository that is at work."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            counts[str(path.relative_to(ROOT)), frame.name, what] += 1
            return


class Gpu(TorchFunctionMode):
    """While it is active, "cuda" names the device."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = dict(named or {})
        name = getattr(function, "__name__", "")
        first = arguments[0] if arguments else None
        if isinstance(first, OnDevice) and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use "
                            "Tensor.cpu() to copy the tensor to host memory first.")
        if isinstance(first, OnDevice) and name == "tolist":
            count("tolist")
            return first.held.tolist()
        if function is F.scaled_dot_product_attention:
            return attention(*arguments, **named)
        if isinstance(first, Tensor) and name in ("to", "cpu", "cuda"):
            return move(function, name, arguments, named)
        if "device" not in named or isinstance(named["device"], type(None)):
            return function(*arguments, **named)
        away = torch.device(named["device"]).type == "cuda"
        if away:
            named["device"] = "cpu"
        made = function(*arguments, **named)
        return OnDevice(made) if away and not isinstance(made, OnDevice) else made


def move(function, name: str, arguments: tuple, named: dict) -> Tensor:
    """`to`, `cpu` and `cuda`: over to the other device first, then the rest of it."""
    tensor, *rest = arguments
    places = [torch.device(x) for x in (*rest, named.pop("device", None))
              if isinstance(x, (str, torch.device))]
    places += [x.device for x in rest if isinstance(x, Tensor)]
    place = name if name != "to" else (places[0].type if places else None)
    if place == "cuda" and not isinstance(tensor, OnDevice):
        tensor = ToDevice.apply(tensor)
    elif place == "cpu" and isinstance(tensor, OnDevice):
        count("to the CPU")
        tensor = ToHost.apply(tensor)
    rest = [x.dtype if isinstance(x, Tensor) else x for x in rest
            if not isinstance(x, (str, torch.device))]
    named.pop("non_blocking", None)
    return tensor.to(*rest, **named) if place is None or rest or named else tensor


class ToDevice(torch.autograd.Function):
    """A copy on the device; its gradient comes back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return OnDevice(x.detach().clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.held


class ToHost(torch.autograd.Function):
    """A copy on the CPU; its gradient goes back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.held.detach().clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return OnDevice(grad)


def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False) -> Tensor:
    """Attention by its formula; refused where no fused kernel of CUDA would do."""
    if isinstance(q, OnDevice) and attn_mask is not None and (
            q.shape[1] != k.shape[1] or q.shape[3] != v.shape[3]):
        raise RuntimeError("a mask and heads in groups: no fused kernel for attention")
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if is_causal:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        attn_mask = OnDevice(attn_mask) if isinstance(q, OnDevice) else attn_mask
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    return scores.softmax(-1) @ v


@contextlib.contextmanager
def gpu():
    """Let the programs see a GPU; nothing that exists already moves there."""
    replaced = {"is_available": lambda: True, "mem_get_info": lambda *_: (10**12,) * 2,
                "get_device_capability": lambda *_: (7, 0),  # none for Triton
                "synchronize": lambda *_: None}
    before = {name: getattr(torch.cuda, name) for name in replaced}
    for name, stand_in in replaced.items():
        setattr(torch.cuda, name, stand_in)
    try:
        with Gpu():
            yield
    finally:
        for name, inner in before.items():
            setattr(torch.cuda, name, inner)


def main() -> None:
    """Run a program, then print what made the host wait."""
    sys.path.insert(0, str(ROOT))
    program, sys.argv = sys.argv[1], sys.argv[1:]
    with gpu():
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    for place, count in counts.most_common():
        print(f"{count:6d}  {' '.join(place)}", file=sys.stderr)


if __name__ == "__main__":
    main()
