"""How the gradients of several processes become the gradient of their whole minibatch: by torch's own engines."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.distributed import OutOfStep, ProcessGroup, rank_loss_reported
from orwcfm_fast.method.coupling import Batch
from orwcfm_fast.sharding import ShardedNetworks

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
        # of 1×1 convolutions in channels_last, whose gradients have the same memory under other strides
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        unsynchronised: dict[str, Any] = {SYNC_BUFFERS: False}
        self.network: DistributedDataParallel = DistributedDataParallel(
            network,
            init_sync=False,  # the weights are the same from the start
            gradient_as_bucket_view=True,
            find_unused_parameters=may_skip,
            **unsynchronised,
        )
        self.network.register_comm_hook(None, summed)

    def parts(self, batch: Batch, size: int) -> list[Batch]:
        return super().parts(batch, size) or [batch.filler()]

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Raises OutOfStep where memory runs out when buckets may be on their way to other processes."""
        if not last:
            with self.network.no_sync():
                yield
            return
        try:
            with rank_loss_reported(among_others=True):
                yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = str(error).split("\n")[0] or type(error).__name__
            raise OutOfStep(
                f"out of memory while gradients were exchanged, which cannot be repeated: {reason}"
            ) from error


class ShardedGradient(LocalGradient):
    """FSDP2: every process holds a shard of all weights, and gets the sum of that shard's gradients.

    Args:
        sharded: the trained network among others.
        accumulates: whole gradients are kept until the last part; else each part's are reduced to shards at once,
            which takes less memory.
    """

    def __init__(
        self, network: nn.Module, sharded: ShardedNetworks, ranks: ProcessGroup, accumulates: bool
    ) -> None:
        super().__init__(network)
        self.sharded, self.world, self.accumulates = sharded, ranks.world, accumulates

    def parts(self, batch: Batch, size: int) -> list[Batch]:
        """As many on every process as on the one with the largest share."""
        own, largest = super().parts(batch, size), -(-batch.size // self.world)
        return [batch.filler()] * (-(-largest // size) - len(own)) + own

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        for root in self.sharded.roots:
            root.set_requires_gradient_sync(last or not self.accumulates)
        yield

    def backward(self, v: Tensor, dv: Tensor, last: bool) -> None:
        with rank_loss_reported(among_others=True):
            joined = self.sharded.finish()
            torch.autograd.backward([v, *joined], [dv, *map(torch.zeros_like, joined)])


def summed(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the sum over processes, where DDP itself takes the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
