"""What stands where a block was: `Passing`, which gives what it is given, by the block's `Form`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from secateur.codec.ops import find_op
from secateur.graph.blocks import Form, Pass, passes_in
from secateur.graph.nested import tensors_in
from secateur.graph.replay import replay_of

Forms = Mapping[str, Form]
"""Path of a block -> what is given in its place."""

Renumbered = Mapping[str, Mapping[tuple[str, int], int]]
"""Module -> (function, ordinal) -> its ordinal once blocks have gone."""


class Passing(nn.Module):
    """Gives what a residual block gives when all that it adds is 0; takes whatever arguments the block took.

    The modules that stay keep their paths. So do plain attributes of the block and of the modules in it, which the
    model around it may read, as `nn.TransformerEncoder` does.

    >>> import torch
    >>> block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> Passing(block, (Pass("x", 0), None))(torch.ones(2), scale=3)
    (tensor([1., 1.]), None)
    """

    def __init__(self, block: nn.Module, form: Form) -> None:
        super().__init__()
        self.form = form
        for step in (step for each in passes_in(form) for step in each.steps):
            if step.module:
                _put(self, step.module, block.get_submodule(step.module))
        self.training = block.training
        shell = vars(_shell(block))
        vars(self).update({name: shell[name] for name in shell if name not in vars(self) and not hasattr(self, name)})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What goes on, as the block would give it."""
        return fill(self.form, lambda each: self._pass(each, args, kwargs))

    def _pass(self, each: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        value = passed(each, args, kwargs)
        for step in each.steps:
            if step.module:
                value = self.get_submodule(step.module)(value)
            else:
                value = find_op(step.op)(value, *step.args, **dict(step.kwargs))
        return value

    def extra_repr(self) -> str:
        """Which arguments go on."""
        passes = list(passes_in(self.form))
        ops = [str(step) for each in passes for step in each.steps if not step.module]
        then = f", {', '.join(ops)}" if ops else ""
        return ", ".join(each.argument or str(each.position) for each in passes) + then


def fill(form: Form, make: Callable[[Pass], Any]) -> Any:
    """The form with each pass in it replaced."""
    if isinstance(form, Pass):
        return make(form)
    if isinstance(form, dict):
        return {key: fill(item, make) for key, item in form.items()}
    if isinstance(form, tuple | list):
        return type(form)([fill(item, make) for item in form])
    return form


def passed(each: Pass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that goes on, among the arguments of a call."""
    value: Any = kwargs[each.argument] if each.position is None or each.argument in kwargs else args[each.position]
    for key in each.place:
        value = value[key]
    assert isinstance(value, Tensor)
    return value


def leave_out(model: nn.Module, forms: Forms, renumbered: Renumbered = MappingProxyType({})) -> None:
    """Put a `Passing` wherever each block stands, in place.

    Args:
        model: ours to change.
        forms: of the blocks.
        renumbered: for the calls that `graph.replay` gives sizes in the modules around them.

    Raises:
        AttributeError: the model has no such module.
    """
    for name, form in forms.items():
        block = model.get_submodule(name)
        passing = Passing(block, form)
        for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is block]:
            model.set_submodule(path, passing)
    for name, ordinals in renumbered.items():
        replay = replay_of(model.get_submodule(name))
        if replay is not None:
            replay.changes = {(f, ordinals.get((f, n), n)): sizes for (f, n), sizes in replay.changes.items()}


def goes(path: str, forms: Forms) -> bool:
    """Whether the module at a path goes with the blocks, or the call that one of its hooks changes.

    >>> [goes(path, {"a": Pass("x", 0)}) for path in ("a", "a.conv", "ab")]
    [False, True, False]
    """
    for name, form in forms.items():
        stay = tuple(f"{name}.{step.module}." for each in passes_in(form) for step in each.steps if step.module)
        if path.startswith(f"{name}.") and not f"{path}.".startswith(stay):
            return True
    return False


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hang a module in at a path, in containers where there is nothing yet."""
    *homes, name = path.split(".")
    for home in homes:
        if home not in root._modules:
            root.add_module(home, nn.ModuleDict())
        root = root.get_submodule(home)
    root.add_module(name, module)


def _shell(module: nn.Module) -> SimpleNamespace:
    """The plain attributes of a module and of those in it."""
    own = {name: value for name, value in vars(module).items() if _is_plain(value)}
    return SimpleNamespace(**own, **{name: _shell(child) for name, child in module.named_children()})


def _is_plain(value: Any) -> bool:
    """Whether a value holds neither tensors nor modules, as far as can be seen."""
    if callable(value) or isinstance(value, Tensor | nn.Module):
        return False
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list | set) else ()
    return not any(callable(item) for item in inner) and next(tensors_in(value), None) is None


