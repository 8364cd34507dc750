"""Online reward weighting: the paper's form, and the centred one."""

import torch

from orwcfm_fast.method.objectives.objective import Coefficients, Point, method


@method("orw", "weight", old=False, reference=True, rests=False)
def orw(at: Point) -> Coefficients:
    """w = e^{τr}, b = 0, a = α: the paper's (Fan et al., ICLR 2025)."""
    return at.signal, torch.zeros_like(at.signal), torch.full_like(at.signal, at.alpha)


@method("orw-centred", "weight", old=True, reference=True, centred=True, late=True)
def orw_centred(at: Point) -> Coefficients:
    """w = e^{τr} − c, b = c, a = α, t of density 2t: the default; only what the reward says moves the policy.

    c is the mean of e^{τr}, or less where the mean would let errors grow (`weighting.centre`).
    """
    centre = at.centre.expand_as(at.signal)
    return at.signal - centre, centre, torch.full_like(at.signal, at.alpha)
