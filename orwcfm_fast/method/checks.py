"""What a trainer refuses before it begins."""

from orwcfm_fast.distributed import ProcessGroup
from orwcfm_fast.errors import UserError
from orwcfm_fast.method.objectives import METHODS
from orwcfm_fast.networks.policy import Policy
from orwcfm_fast.settings import Finetune


def check_trainable(policy: Policy, settings: Finetune, ranks: ProcessGroup) -> None:
    """Refuse settings that this policy, this method or this many processes cannot have.

    Raises:
        UserError: says which, and what would be right.
    """
    for name in ("rollout", "probe", "eval_n"):
        if (n := getattr(settings, name)) < ranks.world:
            raise UserError(
                f"--{name.replace('_', '-')} {n}: is less than a sample for each of {ranks.world} ranks"
            )
    if settings.shard and ranks.world == 1:
        raise UserError(
            "--shard: spreads a model over several ranks, and there is one; start them by torchrun, or add --no-shard"
        )
    if settings.shard and settings.compile:
        raise UserError("--compile: is not for a model in shards; leave it out, or --shard")
    if policy.conditions and settings.rollout % settings.group:
        near = settings.rollout - settings.rollout % settings.group or settings.group
        raise UserError(
            f"--rollout {settings.rollout}: is no multiple of --group {settings.group}, so the last samples would be "
            f"compared with those of the next round; use {near}"
        )
    row = METHODS.get(settings.method)
    if settings.coupling == "ot" and settings.method != "orw":
        raise UserError(
            f"coupling 'ot': its plan needs the positive weights of --method orw, not {settings.method}'s"
        )
    if settings.target_w2 is not None and not row.uses_alpha:
        raise UserError(
            f"--target-w2: sets α, which --method {settings.method} does not have; use orw-centred"
        )
    if settings.coupling == "ot" and settings.batch < 2:
        raise UserError("coupling 'ot' needs a batch of at least 2")
    if settings.coupling == "ot" and policy.conditions and len(policy.conditions) > 1:
        raise UserError(
            "coupling 'ot': would pair noise across prompts, which skews them; use --coupling independent"
        )
