"""`apply`: cut a plan's units out of a copy of the model; shapes change."""

from __future__ import annotations

from torch import nn

from secateur.allocate.plan import Plan
from secateur.errors import PlanError
from secateur.graph.rebuild import narrow, rebuild


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller copy of `model`, of the same classes, with only the units that the plan keeps.

    Hooks, parametrizations, tied weights, dtype, device, requires_grad and memory format come along; gradients do not.

    Args:
        model: the model that the plan's groups were found on; untouched.
        plan: from `allocate`, or made by hand.

    Raises:
        PlanError: the plan was made for another model; nothing has been done then.

    >>> import torch, secateur as sc
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> groups = sc.find_groups(net, torch.zeros(1, 4))
    >>> print(apply(net, sc.Plan(groups, keep=((0, 3, 5),))))
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    check_fits(model, plan)
    return rebuild(model, narrow(model, plan.groups.kept(plan.keep)), plan.attributes(), plan.replays())


def check_fits(model: nn.Module, plan: Plan) -> None:
    """PlanError unless the model has exactly the tensors, by name and shape, that the plan was made for."""
    have = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    want = {info.name: info.shape for info in plan.groups.tensors}
    if have == want:
        return
    odd = [n for n in [*want, *have] if have.get(n) != want.get(n)]
    first = odd[0]
    raise PlanError(
        f"the plan was made for another model: {first} is {have.get(first, 'missing')} here and "
        f"{want.get(first, 'missing')} in the plan ({len(set(odd))} tensors differ). "
        "Find the groups of this model and make its plan anew."
    )
