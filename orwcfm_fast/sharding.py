"""Weights in shards, one for each rank: FSDP2, and what its collectives require of ranks with unequal work.

Every call of a sharded network gathers its weights from all ranks, so that all must make it. Ranks with less to do,
fewer chunks of a rollout, say, join the calls of the others with a row of their own, and forget what it gives.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from orwcfm_fast.distributed import ProcessGroup, rank_loss_reported

if TYPE_CHECKING:  # a second of imports, for many ranks alone
    from torch.distributed.fsdp import FSDPModule

    from orwcfm_fast.networks.policy import Policy

Files = dict[str, dict[str, Tensor]]  # of a checkpoint: tensors by name, by file


class ShardedNetworks:
    """The networks of some policies in shards; keeps the ranks' calls of them in step.

    `ProcessGroup.together` calls `finish` where a rank's own work ends.

    Args:
        policies: trained and reference; those that share a network are sharded once.
    """

    def __init__(self, policies: "list[Policy]", ranks: ProcessGroup) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self.roots: list[FSDPModule] = []
        self._inputs: list[tuple[Policy, tuple[Any, ...], dict[str, Any]]] = []
        self._joining, self._joined = False, list[Tensor]()
        mesh = init_device_mesh(policies[0].device.type, (ranks.world,))
        for policy in {id(p.network): p for p in policies}.values():
            how: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
            if (
                policy.precision != torch.float32
            ):  # autocast would cast weights to it anyway; times stay exact
                how["mp_policy"] = MixedPrecisionPolicy(
                    param_dtype=policy.precision, reduce_dtype=torch.float32, cast_forward_inputs=False
                )
            for p in policy.network.parameters():
                p.data = p.data.contiguous()  # FSDP shards no weights in channels_last
            for root, args, named in called(policy):
                for module in (*blocks(root), root):
                    module.register_forward_hook(lambda *call: without_views(call[-1]))
                    fully_shard(module, **how)
                self.roots.append(cast("FSDPModule", root))
                self._inputs.append((policy, args, named))
        for number, gathering in enumerate(self.roots):
            for part in cast(nn.Module, gathering).modules():
                if isinstance(part, FSDPModule):  # the sum over ranks, where FSDP takes the mean
                    part.set_gradient_divide_factor(1.0)
                    part.set_force_sum_reduction_for_comms(True)
            with torch.no_grad():  # buffers made in inference mode could not be trained with
                self._call(number)
            cast(nn.Module, gathering).register_forward_pre_hook(
                lambda *_, k=number: self._before(k), prepend=True
            )
        ranks.finish = torch.no_grad()(self.finish)  # a step's backward pass calls it with gradient

    def _next(self, wanted: int) -> int:
        """The number of the network that all ranks call next: the lowest that one of them wants."""
        found = torch.tensor(wanted)
        with rank_loss_reported():
            dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found)

    def _before(self, number: int) -> None:
        while not self._joining and (following := self._next(number)) != number:
            self._call(following)

    def _call(self, number: int) -> None:
        policy, args, named = self._inputs[number]
        self._joining = True
        try:
            with policy.autocast():
                found = cast(nn.Module, self.roots[number])(*args, **named)
        finally:
            self._joining = False
        self._joined += [x for x in _tensors(found) if x.requires_grad]

    def finish(self) -> list[Tensor]:
        """Join the calls that other ranks have still to make; what all joined calls gave that a backward pass must
        include."""
        while (number := self._next(len(self.roots))) < len(self.roots):
            self._call(number)
        joined, self._joined = self._joined, []
        return joined


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def without_views(value: Any) -> Any:
    """Copies in place of views: an operation in place on a view would skip FSDP's hook on the backward pass."""
    if isinstance(value, Tensor):
        return value.clone() if value._is_view() else value
    if isinstance(value, list | tuple):
        return type(value)(map(without_views, value))
    return value


def called(policy: "Policy") -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The modules that a velocity calls, each with the arguments of such a call for one sample."""
    modules = [*policy.pipeline.denoisers.values()] if policy.pipeline else [policy.network]
    found: dict[int, Any] = {}

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.setdefault(id(module), (module, args, named))

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    x = torch.zeros(1, *policy.shape, device=policy.device)
    row = None if policy.conditions is None else torch.zeros(1, dtype=torch.int64, device=policy.device)
    with torch.no_grad():
        for t in (0.05, 0.95):  # some pipelines have a transformer for each end
            policy.velocity(t, x, row)
    for hook in hooks:
        hook.remove()
    return [*found.values()]


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at once: the members of a network's outermost lists of modules."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            for member in child:
                if isinstance(member, nn.ModuleList | nn.ModuleDict):
                    yield from blocks(member)
                elif any(True for _ in member.parameters()):
                    yield member
        else:
            yield from blocks(child)


def is_sharded(value: Tensor) -> bool:
    """Whether each rank has a shard of the tensor, which is a DTensor then."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """A tensor of which each rank has a shard, on every rank; called on all."""
    return cast(Any, value).full_tensor() if is_sharded(value) else value


def like(value: Tensor, own: Tensor) -> Tensor:
    """This rank's shard of a whole tensor where `own` is in shards, else the tensor as it is."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    of = cast(DTensor, own)
    return distribute_tensor(
        value.to(of.to_local().device), of.device_mesh, of.placements, src_data_rank=None
    )


def all_like(values: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict of whole tensors, in shards where the network's are."""
    own = network.state_dict()
    return {key: like(v, own[key]) if key in own else v for key, v in values.items()}


def gathered(files: Files, keep: bool) -> Files:
    """Copies in host memory of whole tensors, one after the other; called on all ranks, kept where `keep`."""
    found: Files = {stem: {} for stem in files}
    for stem, tensors in sorted(files.items()):
        for name, value in sorted(
            tensors.items()
        ):  # in one order on all ranks, whatever was read from a file
            with rank_loss_reported():
                full = whole(value.detach())
            if keep:
                found[stem][name] = full.to("cpu", copy=True)
    return found
