"""Several processes, one run: `torchrun --nproc-per-node 2 grpo.py`.

Every process holds the whole model. A step's prompts are dealt out; each process
samples and scores the groups of its own prompts, all learn each other's responses and
scores, and each computes the gradient of its own groups. One sum over the processes
makes the gradient of the step, and as all then take the same step, their adapters stay
equal.

The objective's denominators are those of the whole step (`grpo.token_weights`), so the
sum of the gradients (not their mean, as DDP takes it) is that of one process up to
rounding, whatever their number. Draws depend on (seed, step, prompt) alone: they do not
change either. The first process writes the run folder and prints.

There is one tool: `all_reduce`, a sum. Whoever has nothing to say adds zeros; a process
whose groups were all dead, or which has no prompt at all, still takes part in every
sum. `gather` is made of it, too.
After Ctrl-C all finish the step and the first one saves; torchrun waits 30 seconds for
that, then it kills, and what is left is the checkpoint before.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from plumbing.files import UserError, require

# How long a process waits for the others, at most: one evaluation may be slow.
TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """The number of this process; the first one writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def together(device: str) -> Iterator[None]:
    """Join the processes that `torchrun` started, until the block ends.

    Without `torchrun`, or with one process, nothing happens.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.startswith("cuda"):
        number = int(os.environ.get("LOCAL_RANK", "0"))
        require(number < torch.cuda.device_count(), f"process {number} of this machine "
                f"has no GPU of its own; there are {torch.cuda.device_count()}")
        torch.cuda.set_device(number)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=TIMEOUT)
    silence = open(os.devnull, "w")
    try:
        with contextlib.ExitStack() as quiet:
            if rank():
                quiet.enter_context(contextlib.redirect_stdout(silence))
            yield
    finally:
        silence.close()
        dist.destroy_process_group()


def shard(items: Sequence) -> list:
    """This process's share: every size()-th item, from number rank() on."""
    return list(items[rank()::size()])


def all_reduce(*tensors: Tensor) -> None:
    """Replace every tensor by its sum over the processes: one flat all-reduce.

    Raises:
        UserError: another process has gone (gloo says so; nccl leaves it to torchrun to
            end the others).
    """
    if size() == 1:
        return
    flat = torch.cat([t.detach().flatten() for t in tensors])
    try:
        dist.all_reduce(flat)
    except RuntimeError as error:
        raise UserError("another process of this run has ended; go on from the last "
                        f"checkpoint with --resume RUN ({error})") from error
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]),
                             strict=True):
        tensor.copy_(total.view_as(tensor))


def gather(own: Tensor, total: int) -> Tensor:
    """Everybody's items in their order: this process's `shard` (n, …) → (total, …).

    Each process writes its items into a table of zeros, and the tables are added up.
    """
    if size() == 1:
        return own
    table = torch.zeros(total, *own.shape[1:], dtype=own.dtype, device=own.device)
    table[rank()::size()] = own
    all_reduce(table)
    return table


def all_reduce_gradients(parameters: list[Tensor]) -> None:
    """The gradients of the whole step; a parameter without one counts as zero."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    all_reduce(*(p.grad for p in parameters))


def progress(total: int = 1) -> dict:
    """Where a progress bar goes: to stderr, from the first process, if any work is."""
    return {"file": sys.stderr, "disable": rank() > 0 or not total}
