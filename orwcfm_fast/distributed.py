"""Ranks: the processes of one torchrun, and all that they say to each other.

Everything that is drawn has a global number, so a rank takes its slice of the numbers and nothing else changes:
a slice is all there is where there is one rank, and then nothing is exchanged.
"""

import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from orwcfm_fast.device import out_of_memory
from orwcfm_fast.errors import UserError, WorkError
from orwcfm_fast.heartbeats import heartbeats

T = TypeVar("T")
OF_CONNECTIONS = ("gloo", "nccl", "connection", "socket", "peer", "broken pipe")  # in messages of torch
PATIENCE = timedelta(hours=6)  # for a rank whose reward is slow; gloo knows at once of one that died


class OutOfStep(WorkError):
    """This rank cannot go on with an exchange that the others are in."""


class RankLost(OutOfStep):
    """Another rank ended in the middle of an exchange."""


class ProcessGroup:
    """All ranks, seen from one of them.

    Args:
        rank, world: which of how many. store: of torch.distributed, where the ranks leave each other words.

    Attributes:
        first: whether this is the rank that writes files and speaks.
        finish: called where a rank's own work ends, to join what the others have still to do of it.
    """

    def __init__(self, rank: int = 0, world: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.world, self.first, self._store = rank, world, rank == 0, store
        self.finish: Callable[[], object] = lambda: None

    def share(self, n: int, rank: int | None = None) -> slice:
        """This rank's part of n things in order; parts differ by one at most, and only the first's is never empty."""
        k = self.rank if rank is None else rank
        return slice(-(-n * k // self.world), -(-n * (k + 1) // self.world))

    def gather(self, part: Tensor, n: int) -> Tensor:
        """The whole [n, …], on every rank, of which each has its share."""
        if self.world == 1:
            return part
        shares = [self.share(n, k) for k in range(self.world)]
        sizes = [share.stop - share.start for share in shares]
        padded = part.new_zeros((max(sizes), *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in sizes]
        with rank_loss_reported():
            dist.all_gather(parts, padded)
        return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)])

    def total(self, values: Tensor) -> Tensor:
        """The sum of the values over all ranks."""
        if self.world > 1:
            with rank_loss_reported():
                dist.all_reduce(values)
        return values

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the first rank's."""
        for t in tensors if self.world > 1 else ():
            whole = t.contiguous()
            with rank_loss_reported():
                dist.broadcast(whole, 0)
            t.copy_(whole)

    def all(self, value: T) -> list[T]:
        """Every rank's value, in order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with rank_loss_reported():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of each rank's own, without an exchange inside but of weights: where it fails on one, it fails on all.

        Raises:
            Exception: of the lowest rank that failed, with its number where that is not the first.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.world == 1 or isinstance(raised, OutOfStep):
                raise
            error = raised
        if self.world == 1:
            return
        self.finish()
        failed = torch.tensor(error is not None, dtype=torch.int32)
        with rank_loss_reported():
            dist.all_reduce(failed)
        if failed:
            errors = self.all(None if error is None else _portable(error))
            number, found = next((k, e) for k, e in enumerate(errors) if e)
            if number and found.args == (str(found),):
                found = type(found)(f"rank {number}: {found}")
            raise found from error

    def from_first(self, make: Callable[[], T]) -> T:
        """make() of the first rank, on all."""
        made: list[Any] = [None]
        with self.together():
            if self.first:
                made = [make()]
        if self.world > 1:
            with rank_loss_reported():
                dist.broadcast_object_list(made, 0, device=torch.device("cpu"))
        return made[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """work() on the first rank, then on the others, which find in the cache what it left there."""
        done: list[T] = []
        for turn in (True, False)[: self.world]:
            with self.together():
                if self.first is turn:
                    done.append(work())
        return done[0]

    def check_same(self, values: dict[str, Any]) -> None:
        """Raises UserError where the ranks do not have the same values; names the first that differs."""
        first, *others = self.all(values)
        for number, other in enumerate(others, 1):
            for key in first | other:
                if first.get(key) != other.get(key):
                    raise UserError(
                        f"the ranks disagree: {key} is {first.get(key)!r} on rank 0 and {other.get(key)!r} "
                        f"on rank {number}; start every rank by the same command, with the same packages"
                    )

    def device(self, device: torch.device) -> torch.device:
        """This rank's own device where `device` says which kind.

        Raises:
            UserError: one GPU is named for several ranks, or this machine has too few.
        """
        if self.world == 1 or device.type != "cuda":
            return device
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None:
            raise UserError(f"--device {device}: is one GPU for {self.world} ranks; say --device cuda")
        # each task of a scheduler may see one GPU, its own, and all call it the first
        number = 0 if there == 1 else number
        uuid = str(torch.cuda.get_device_properties(number).uuid) if number < there else ""
        seen = self.all((socket.gethostname(), uuid, there))
        for host, uuid, count in seen:
            if not uuid or seen.count((host, uuid, count)) > 1:
                raise UserError(f"--device cuda: {host} has {count} GPUs; lower --nproc-per-node to that")
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    def speaks(self) -> bool:
        """Whether this rank is the first to ask; the others keep silent of the error that ends them all."""
        if self._store is None:
            return self.first
        try:
            return self._store.add("spoken", 1) == 1
        except RuntimeError:  # it is gone with the rank that held it
            return False


SINGLE_PROCESS = ProcessGroup()


def _portable(error: Exception) -> Exception:
    """The error, or one of its text where it cannot be sent to another process."""
    try:
        sent = pickle.loads(pickle.dumps(error))
        if (type(sent), str(sent)) == (type(error), str(error)):
            return sent
    except Exception:  # whatever its class does
        pass
    return WorkError(f"{type(error).__name__}: {error}")


@contextmanager
def rank_loss_reported(among_others: bool = False) -> Iterator[None]:
    """Around collectives.

    Args:
        among_others: other work may fail there as well; only what speaks of connections is a lost rank.

    Raises:
        RankLost: one of them failed, but for lack of memory.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        other = among_others and not isinstance(error, dist.DistError)
        if out_of_memory(error) or (other and not any(word in text for word in OF_CONNECTIONS)):
            raise
        raise RankLost("lost another rank, which ended or cannot be reached; torchrun says which") from error


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _meet(store: dist.Store, rank: int, world: int) -> str:
    """A name for this start of all ranks: torchrun's store outlives a restart, and holds what ranks now dead left.

    Each writes who it is; the first calls the roll until all that it read of have answered.
    """
    me = uuid.uuid4().hex
    store.set(f"rank/{rank}", me)
    while True:
        if rank == 0:
            roll = [store.get(f"rank/{k}").decode() for k in range(world)]
            store.set("roll", " ".join(roll))
            if store.check([f"here/{me}/{who}" for who in roll[1:]]):
                return me
        else:
            roll = store.get("roll").decode().split()
            if me in roll:
                store.set(f"here/{roll[0]}/{me}", "")
                return roll[0]
        time.sleep(0.02)


@contextmanager
def joined() -> Iterator[ProcessGroup]:
    """The ranks of this launch, from torchrun's environment: gloo on CPUs, NCCL on GPUs as well.

    Raises:
        WorkError: they cannot reach each other.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield SINGLE_PROCESS
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    with rank_loss_reported():
        store, rank, world = next(iter(dist.rendezvous("env://")))
        store = dist.PrefixStore(_meet(store, rank, world), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    ranks = ProcessGroup(rank, world, store)
    try:
        with heartbeats(store, rank, world):
            yield ranks
            with ranks.together():  # nobody leaves before all have come
                pass
        dist.destroy_process_group()
    finally:
        # gloo's threads let go of the last tensors a little later; one that does so in Python's own end aborts it
        time.sleep(0.2)
