"""How the gradients of several processes become the gradient of their whole minibatch: by torch's own engines."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.distributed import rank_loss_reported
from orwcfm_fast.errors import WorkError
from orwcfm_fast.method.coupling import Batch

# torch 2.14's name; that of versions before warns there
SYNC_BUFFERS: Any = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class LocalGradient:
    """The gradient of this process alone: no exchange.

    Args:
        network: what is called in the forward pass.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def parts(self, batch: Batch, size: int) -> list[Batch]:
        """The parts of a batch that are taken one after the other, rows of weight 0 that fill up first."""
        return [*batch.split(size)]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and the backward pass of one part; the gradient is whole after the last."""
        yield

    def backward(self, v: Tensor, dv: Tensor, last: bool) -> None:
        v.backward(dv)


class ReplicatedGradient(LocalGradient):
    """DistributedDataParallel: every process holds all weights; buckets are summed during the backward pass.

    Args:
        may_skip: some trained parameter had no gradient, so each step must look for those.
    """

    def __init__(self, network: nn.Module, may_skip: bool) -> None:
        super().__init__(network)
        self.network: DistributedDataParallel = DistributedDataParallel(
            network,
            init_sync=False,  # the weights are the same from the start
            gradient_as_bucket_view=True,
            find_unused_parameters=may_skip,
            **{SYNC_BUFFERS: False},
        )
        self.network.register_comm_hook(None, summed)

    def parts(self, batch: Batch, size: int) -> list[Batch]:
        return super().parts(batch, size) or [batch.filler()]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        if last:
            yield
        else:
            with self.network.no_sync():
                yield

    def backward(self, v: Tensor, dv: Tensor, last: bool) -> None:
        """Raises WorkError where memory runs out when other processes have received a part of the gradient."""
        if not last:
            return v.backward(dv)
        try:
            with rank_loss_reported():
                v.backward(dv)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error).split("\n")[0] or type(error).__name__
            raise WorkError(
                f"out of memory while gradients were exchanged, which cannot be repeated: {reason}"
            ) from error


def summed(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the sum over processes, where DDP itself takes the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
