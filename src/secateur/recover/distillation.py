"""Learning from a teacher, such as the model before the cut: its logits, its features, where it looks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.allocate.plan import Plan
from secateur.errors import TrainingError, UnknownName
from secateur.graph.rebuild import share
from secateur.recover.place import Place, wide


class Match(Protocol):
    """A term that compares what some layers give, of the student and of the teacher."""

    @property
    def layers(self) -> Collection[str]: ...

    @property
    def weight(self) -> float: ...

    def loss(self, layer: str, student: Tensor, teacher: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Distillation:
    """(1 - weight) * loss on the labels + weight * T^2 * KL(teacher_T, student_T) + the sum of the matches' terms.

    teacher_T and student_T are the softmax of logits / T, and KL is the mean over the batch (Hinton et al. 2015,
    Distilling the Knowledge in a Neural Network, section 2).

    Args:
        teacher: a model that takes the student's images and gives logits of the same classes; it runs in eval mode,
            without gradients, on a copy that shares its weights. Or its logits for all images, (images, classes), as
            `teacher_logits` takes them: then batches are (images, labels, numbers), each image's number in that table,
            and the teacher is not run at all. Nothing may change the images then: no augmentation, no mix.
        temperature: T, above 0.
        weight: of the teacher's logits against the labels, in [0, 1].
        matches: `Features`, `Attention`, or any `Match`; they need a teacher that runs.

    Raises:
        TrainingError: a number out of range, or matches without a teacher that runs.

    >>> teacher, student = nn.Linear(4, 2), nn.Linear(4, 2)
    >>> Distillation(teacher, temperature=2.0).logits_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item()
    0.0
    """

    teacher: nn.Module | Tensor
    temperature: float = 4.0
    weight: float = 0.9
    matches: tuple[Match, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise TrainingError(f"the temperature of a distillation is {self.temperature}; give one above 0.")
        if not 0 <= self.weight <= 1:
            raise TrainingError(f"the weight of a distillation is {self.weight}; give a number in [0, 1].")
        if self.matches and not isinstance(self.teacher, nn.Module):
            raise TrainingError("matching layers needs a teacher that runs; give the model in place of its logits.")

    def logits_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """T^2 * KL(teacher_T, student_T), the mean over the batch; both (n, classes)."""
        logs, targets = (functional.log_softmax(logits / self.temperature, 1) for logits in (student, teacher))
        return functional.kl_div(logs, targets, reduction="batchmean", log_target=True) * self.temperature**2


NOTHING = 1e-12
"""A mean square no larger than this is that of a layer that gives nothing."""


@dataclass(frozen=True)
class Features:
    """What layers give, unit by unit: the mean square of student - teacher, as a share of the teacher's mean square.

    A cut model's units are some of the teacher's, and the plan says which, so that nothing need be learned to compare
    them (FitNets, Romero et al. 2015, eq. 3, has a regressor there).

    Args:
        plan: that the student was cut by, from the teacher.
        layers: names of modules whose tensors make units; or for any module that gives a tensor, the name of one with
            the same units: `{"layer1": "layer1.0.bn2"}`. Left out: every layer that makes units.
        weight: of the sum over layers.

    Raises:
        UnknownName: a layer of which the plan knows no units.

    >>> import secateur as sc
    >>> teacher = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> plan = sc.Plan(sc.find_groups(teacher, torch.zeros(1, 4)), keep=((0, 2),))
    >>> Features(plan).loss("0", torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 9.0, 1.0]])).item()
    0.5
    """

    plan: Plan
    layers: Collection[str] | Mapping[str, str] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.layers:
            made = [s.tensor for group in self.plan.groups.groups for s in group.slots if s.role == "write"]
            object.__setattr__(self, "layers", tuple(dict.fromkeys(name.rpartition(".")[0] for name in made)))
        for source in self._sources.values():
            if source not in self._known:
                raise UnknownName("layer", source, list(self._known))

    @cached_property
    def _sources(self) -> dict[str, str]:
        """Layer -> the one whose units it gives."""
        return dict(self.layers) if isinstance(self.layers, Mapping) else {name: name for name in self.layers}

    @cached_property
    def _known(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Module -> how many channels the teacher has there, and those that stay."""
        kept = self.plan.groups.kept(self.plan.keep)
        shapes = {info.name: info.shape for info in self.plan.groups.tensors}
        out: dict[str, tuple[int, tuple[int, ...]]] = {}
        for group in self.plan.groups.groups:
            for slot in group.slots:
                if slot.role in ("write", "scale"):
                    size = shapes[slot.tensor][slot.dim]
                    stays = kept.get(slot.tensor, {}).get(slot.dim, range(size))
                    out.setdefault(slot.tensor.rpartition(".")[0], (size, tuple(stays)))
        return out

    @cached_property
    def _indices(self) -> Callable[[str, torch.device], Tensor]:
        return cache(lambda source, device: torch.tensor(self._known[source][1], device=device))

    def loss(self, layer: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The share for one layer; what it gives has the units along the one axis at which the shapes differ."""
        size, stays = self._known[self._sources[layer]]
        sizes = list(zip(student.shape, teacher.shape))
        axes = [d for d, (few, many) in enumerate(sizes) if few != many]
        if student.ndim != teacher.ndim or any(sizes[d] != (len(stays), size) for d in axes):
            raise TrainingError(
                f"layer {layer!r} gives {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}, and the plan "
                f"keeps {len(stays)} of {size} units; name the layer whose units these are, as {{layer: that}}."
            )
        if axes:
            teacher = teacher.index_select(axes[0], self._indices(self._sources[layer], teacher.device))
        whole = teacher.square().mean()
        # There is no share of nothing: divided by rounding errors, this one layer would be all of the loss.
        return (student - teacher).square().mean() / whole.clamp(min=NOTHING) * (whole > NOTHING)


@dataclass(frozen=True)
class Attention:
    """Where layers look: the mean square of the difference of maps, one for each image, (n, places).

    A map is the mean of squares over the channels, divided by its L2 norm (Zagoruyko and Komodakis 2017, Paying More
    Attention to Attention, eq. 2 with F_sum^2, in the authors' code: the mean over images and places, times beta). The
    student may have other channels; height and width must be the teacher's.

    Args:
        layers: names of modules that give (n, channels, height, width), such as the ends of stages.
        weight: beta, of the sum over layers; the paper's is 1000.

    >>> Attention(("layer1",)).loss("layer1", torch.ones(1, 4, 2, 2), torch.ones(1, 8, 2, 2)).item()
    0.0
    """

    layers: tuple[str, ...]
    weight: float = 1000.0

    def loss(self, layer: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean square for one layer."""
        if student.ndim < 3 or student.shape[2:] != teacher.shape[2:]:
            raise TrainingError(
                f"layer {layer!r} gives {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}; attention "
                "needs images of channels of the same height and width."
            )
        one, other = (functional.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher))
        return (one - other).square().mean()


@torch.no_grad()
def teacher_logits(
    teacher: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: str | torch.device = "cpu",
    bf16: bool = False,
) -> Tensor:
    """The logits of `teacher` for all images in order, (images, classes), float32 on `device`: for `Distillation`.

    Args:
        teacher: untouched.
        batches: (images, labels) of all images, in the order of their numbers.
        device, bf16: as in `fine_tune`.

    Raises:
        TrainingError: there is no batch.

    >>> teacher_logits(nn.Linear(4, 2), [(torch.zeros(3, 4), torch.zeros(3))] * 2).shape
    torch.Size([6, 2])
    """
    place = Place(device, bf16=bf16)
    run = place.runner(_still(teacher, place))
    rows = [run(place.images(place.tensor(images))).float() for images, _ in batches]
    if not rows:
        raise TrainingError("there are no batches to take the teacher's logits of; give one or more.")
    return torch.cat(rows)


@dataclass(eq=False)
class Lesson:
    """A distillation under way: runs the teacher beside the student and keeps what the matched layers gave."""

    distillation: Distillation
    student: nn.Module
    place: Place
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """Hooks on both models for as long as the lesson lasts."""
        teacher = self.distillation.teacher
        if isinstance(teacher, Tensor):
            self._table, handles = self.place.tensor(teacher), []
        else:
            memory = {parameter.data_ptr() for parameter in self.student.parameters() if parameter.numel()}
            if any(parameter.data_ptr() in memory for parameter in teacher.parameters()):
                raise TrainingError("the teacher shares weights with the model that is trained; give a copy of it.")
            still = _still(teacher, self.place)
            handles = [*self._watch(self.student, self.seen[0]), *self._watch(still, self.seen[1])]
            self._run = self.place.runner(still)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, images: Tensor, outputs: Tensor, own: Tensor, numbers: Tensor | None) -> Tensor:
        """The whole loss, from the images and logits of the student, and its loss on the labels."""
        held = self.distillation
        logits = self._logits(images, numbers).to(outputs.dtype)
        if logits.shape != outputs.shape:
            shapes = f"{tuple(logits.shape)} and the model's are {tuple(outputs.shape)}"
            raise TrainingError(f"the teacher's logits are {shapes}; they need the same classes.")
        loss = (1 - held.weight) * own + held.weight * held.logits_loss(outputs, logits)
        student, teacher = self.seen
        for match in held.matches:
            for layer in match.layers:
                for seen in self.seen:
                    if not isinstance(seen.get(layer), Tensor):
                        raise TrainingError(f"layer {layer!r} gave no tensor in this pass; match another.")
                one, other = (wide(seen[layer]) for seen in (student, teacher))
                loss = loss + match.weight * match.loss(layer, one, other)
        student.clear()
        teacher.clear()
        return loss

    @torch.no_grad()
    def _logits(self, images: Tensor, numbers: Tensor | None) -> Tensor:
        if isinstance(self.distillation.teacher, nn.Module):
            return wide(self._run(images))
        if numbers is None:
            raise TrainingError(
                "the teacher is a table of logits, so each image's number in it is needed, and the image itself: give "
                "batches of (images, labels, numbers), without a mix; or give the model as the teacher."
            )
        return self._table[numbers]

    def _watch(self, model: nn.Module, seen: dict[str, Tensor]) -> list[Any]:
        modules = dict(model.named_modules())

        def watching(name: str) -> Callable[..., None]:
            def watch(module: nn.Module, args: Any, output: Any) -> None:
                seen[name] = self.place.together.whole(output)

            return watch

        handles = []
        for name in dict.fromkeys(layer for match in self.distillation.matches for layer in match.layers):
            if name not in modules:
                raise UnknownName("layer", name, list(modules))
            handles.append(modules[name].register_forward_hook(watching(name)))
        return handles


def _still(teacher: nn.Module, place: Place) -> nn.Module:
    """A copy to run: in eval mode, frozen, there."""
    return place.move(share(teacher).eval().requires_grad_(False))
