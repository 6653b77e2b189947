"""Direction: a unit matters as much as its readers' outputs turn without it, once batch norm is estimated anew.

Batch norm statistics that are taken again after a cut (`recover.statistics`; Li et al. 2020, EagleEye, adaptive
batch normalization) give each output its mean and variance back. What stays lost is the direction: how well the output
still correlates with what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.graph.nested import Nested
from secateur.graph.records import Groups
from secateur.score.streams import Seen, stream

NOTHING = 1e-12
"""An output of whose variance no more than this share is left has no direction."""


@dataclass(frozen=True)
class Direction:
    """By how much a unit's readers turn when it goes, after those of its group that are cheaper to lose; no labels.

    A reader computes y_o = sum_u y_ou for each output o, y_ou being what unit u adds; through the batch norm behind
    it, y_o has the variance E_o. With the units K left, and statistics estimated anew, it gives y_oK scaled to the old
    variance, and the squared error is

        lost(K) = sum_o 2 E_o (1 - corr(y_o, y_oK)).

    Without batch norm nothing is set right, and it is lost(K) = sum_o E (y_o - y_oK)^2. A reader counts as

        price(K) = lost(K) / sqrt(E V),   E = sum_o E_o,

    V being the variance of the sum that the outputs go into, the residual stream; E itself where they are added to
    nothing. Units go one by one, the cheapest first, and a unit's score is by how much the sum of the prices of its
    group's readers grows then, or the most paid before in the group: ranking by score is the order.

    Why the root: with a = sqrt(E / V), how large a reader is in the stream, and t^2 = lost / E, by how much it turns,
    price = a t^2. Whatever the correlations between the errors of readers of one stream, their sum, as a share of the
    stream, is at most sum a t (the triangle inequality), and (sum a t)^2 <= (sum a) (sum a t^2) (Cauchy and Schwarz),
    where sum a is given. Had errors no correlations, the sum of a^2 t^2 were the error itself.

    Scores of all groups are comparable and add up; rank them per cost, `sc.GlobalRanking(per_cost=True)`. Choosing in
    order, by what the readers compute from what is left, is as in ThiNet (Luo et al. 2017, section 3.2).

    Args:
        batches: model inputs, which can be gone through again and again. No labels.

    For each end, two float64 matrices of all its columns squared are held, as for `BrainSurgeon`.

    Raises:
        PlanError: there is no batch.

    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False), nn.BatchNorm1d(1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.75]]))
    >>> _ = net[1].weight.data.fill_(1.0)
    >>> from secateur.graph.groups import find_groups
    >>> groups = find_groups(net.eval(), torch.zeros(1, 2))
    >>> images = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> [round(value, 4) for value in Direction([images])(net, groups)[0].tolist()]  # second: twice the first
    [0.0129, 1.9403, 0.0468]
    """

    batches: Iterable[Nested]

    def __call__(self, model: nn.Module, groups: Groups) -> Sequence[Tensor]:
        """One score per unit."""
        ends = stream(model, groups, self.batches, products="all", joined=True)
        out = []
        for first, group in zip(groups.offsets, groups.groups):
            readers = [_Reader(seen, first, group.size) for seen in ends]
            out.append(_in_order([reader for reader in readers if len(reader.units)], group.size))
        return out


class _Reader:
    """An end while units go.

    Of each output, `kept` is the variance of what is left, and `cross` its covariance with the whole; of each output
    and unit (outputs, units), `own` is the variance of what the unit adds, `whole` its covariance with the whole
    output, `left` that with what is left. For a reader without batch norm, second moments in place of them all.
    """

    def __init__(self, seen: Seen, first: int, size: int) -> None:
        mine = (seen.units >= first) & (seen.units < first + size)
        self.units, self._columns = seen.units[mine] - first, seen.columns[mine]
        if not len(self.units):
            return
        self._normed = seen.normed
        self._moments = seen.covariance if seen.normed else seen.second
        self._weights = seen.weights if len(seen.weights) else _root(seen.reader)
        shares = (self._weights @ self._moments) * self._weights
        self.energy = shares.sum(1)
        self.kept, self.cross = self.energy, self.energy
        self.whole = self.left = self._by_unit(shares)
        self.own = torch.stack([self._with(u)[:, u] for u in range(len(self.units))], 1)
        varying = float((seen.covariance * seen.reader).sum())
        scale = (max(varying, 0.0) * max(seen.joined, 0.0)) ** 0.5
        self._scale = scale if scale > 0 else float("inf")
        self.price = 0.0

    def prices(self) -> Tensor:
        """(units,) the reader's price when one more goes; of no meaning for those that have gone."""
        cross = self.cross[:, None] - self.whole
        kept = self.kept[:, None] - 2 * self.left + self.own
        energy = self.energy[:, None]
        if self._normed:
            alike = cross / (kept.clamp(min=0) * energy).sqrt()
            lost = 2 * energy * (1 - alike.where(kept > NOTHING * energy, 0.0).clamp(-1, 1))
        else:
            lost = energy - 2 * cross + kept
        return lost.sum(0) / self._scale

    def take_out(self, unit: int) -> None:
        """One that has not gone yet."""
        for place in torch.nonzero(self.units == unit).flatten().tolist():
            self.price = float(self.prices()[place])
            self.cross = self.cross - self.whole[:, place]
            self.kept = self.kept - 2 * self.left[:, place] + self.own[:, place]
            self.left = self.left - self._with(place)

    def _with(self, place: int) -> Tensor:
        """The covariance of what a unit adds with what each unit adds, (outputs, units)."""
        at = self._columns[place][self._columns[place] >= 0]
        return self._by_unit((self._weights[:, at] @ self._moments[at]) * self._weights)

    def _by_unit(self, values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(len(values), 1)], 1)[:, self._columns].sum(2)


def _root(reader: Tensor) -> Tensor:
    """Weights whose products are these: where a reader's own differ from batch to batch."""
    values, vectors = torch.linalg.eigh(reader)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()).T
    return root


def _in_order(readers: Sequence[_Reader], size: int) -> Tensor:
    """By how much the price grows as units go, the cheapest first; none is below one paid before."""
    scores, left, paid = torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.bool), 0.0
    for _ in range(size):
        growth = torch.zeros(size, dtype=torch.float64)
        for reader in readers:
            growth.index_add_(0, reader.units, reader.prices() - reader.price)
        unit = int(growth.masked_fill(~left, float("inf")).argmin())
        paid = max(paid, float(growth[unit]))
        scores[unit], left[unit] = paid, False
        for reader in readers:
            reader.take_out(unit)
    return scores
