"""Pictures: which there are, that they are the same every time, and that long models stay legible."""

import re

import matplotlib
import pytest

from secateur.allocate.sensitivity import Curve, Sensitivity
from secateur.errors import RunError
from secateur.measure.sparsity import SparsityRow, SparsityTable
from secateur.recover.history import EpochRow, History
from secateur.report import plots, style
from secateur.report.ledger import ChannelRow, Ledger, RunRecord


def sparsity_table(layers):
    return SparsityTable(tuple(SparsityRow(f"conv{i}.weight", i, layers + 1) for i in range(layers)))


def history(rates):
    made = History()
    for epoch, lr in enumerate(rates, start=1):
        made = made.with_row(EpochRow(epoch, lr, 1 / epoch, 1 - 0.5 / epoch, 1.1 / epoch, 1 - 0.6 / epoch, 1.0))
    return made


def test_names_follow_the_data(demo):
    assert [plot.name for plot in plots.plots(demo)] == ["ledger", "channels", "sparsity", "training-1"]
    assert plots.plots(RunRecord("none", "2024-05-01", Ledger(()), sparsity=SparsityTable(()))) == ()


def test_save_plots_writes_the_same_bytes_again(demo, tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        plots.save_plots(demo, folder)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    stems = ("channels", "ledger", "sparsity", "training-1")
    assert names == sorted(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert "prefers-color-scheme: dark" in (tmp_path / "a" / "ledger.svg").read_text(encoding="utf-8")


def test_sensitivity_has_a_line_for_each_group_and_names_the_worst():
    curves = (Curve("a", 8, (2, 4), (1.5, 3.0)), Curve("b", 4, (1, 3), (1.1, 9.0)), Curve("c", 1, (), ()))
    (axes,) = plots.draw_sensitivity(Sensitivity(1.0, curves)).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 1.5, 3.0], [1.0, 1.1, 9.0]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 0.25, 0.5], [0, 0.25, 0.75]]
    assert [text.get_text() for text in axes.texts] == ["b"]
    assert not plots.draw_sensitivity(Sensitivity(1.0, ())).axes[0].lines


def test_save_plots_into_a_missing_folder(demo, tmp_path):
    with pytest.raises(RunError, match=r"could not write .*ledger.svg: there is no folder"):
        plots.save_plots(demo, tmp_path / "missing")


def test_inline_svg_keeps_text_and_follows_the_page(demo):
    svg = plots.plots(demo)[2].svg()
    assert svg.startswith("<svg")
    assert "<text" in svg
    assert "features.0.conv1" in svg
    assert "http" not in svg
    assert "var(--plot-accent, #1f7a5c)" in svg
    assert "<metadata" not in svg


def test_ids_are_unique_over_all_pictures_and_widths(demo):
    both = [plot.svg(width) for plot in plots.plots(demo) for width in (style.WIDE, style.NARROW)]
    ids = [found for svg in both for found in re.findall(r'\bid="([^"]*)"', svg)]
    used = {found for svg in both for found in re.findall(r'(?:href="#|url\(#)([^")]*)', svg)}
    assert len(ids) == len(set(ids))
    assert used <= set(ids)
    assert used


def test_a_users_matplotlib_settings_change_nothing(demo):
    before = plots.plots(demo)[0].svg()
    with matplotlib.rc_context({"font.size": 30.0, "svg.fonttype": "path"}):
        assert plots.plots(demo)[0].svg() == before
        assert matplotlib.rcParams["font.size"] == 30.0


@pytest.mark.parametrize("layers", [1, 24, 25, 56, 121])
def test_layers_are_named_while_they_are_few(layers):
    labels = {text.get_text() for text in plots.draw_sparsity(sparsity_table(layers)).axes[0].get_xticklabels()}
    assert ("conv0" in labels) == (layers <= 24)
    assert len(labels) <= max(24, 13)


def test_sparsity_line_holds_the_table():
    table = sparsity_table(7)
    lines = plots.draw_sparsity(table).axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines if len(line.get_xdata()) == 7] == [
        [row.sparsity for row in table.rows]
    ]
    assert any(list(line.get_ydata()) == [table.sparsity] * 2 for line in lines)


@pytest.mark.parametrize("layers", [3, 60])
def test_channel_bars_hold_before_and_after(layers):
    channels = [ChannelRow(f"conv{i}", 64 + i, 32 + i) for i in range(layers)]
    bars = plots.draw_channels(channels).axes[0].containers
    lengths = [[max(bar.get_width(), bar.get_height()) for bar in group] for group in bars]
    assert lengths == [[row.before for row in channels], [row.after for row in channels]]


def test_width_turns_the_curves_below_each_other():
    wide, narrow = (plots.draw_history(history([0.1] * 3), width) for width in (style.WIDE, style.NARROW))
    assert wide.axes[0].get_gridspec().ncols == 2
    assert narrow.axes[0].get_gridspec().nrows == 2


def test_stages_are_marked_and_schedules_are_not():
    def labels(rates):
        texts = plots.draw_history(history(rates)).axes[0].texts
        return [text.get_text() for text in texts if text.get_text().startswith("lr")]

    assert labels([0.1] * 4 + [0.01] * 4) == ["lr 0.1", "lr 0.01"]
    assert labels([0.1 / epoch for epoch in range(1, 20)]) == []


def test_best_epoch_is_named():
    made = history([0.1, 0.1, 0.1])
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in plots.draw_history(made).axes]
    assert titles == ["● best epoch 3: loss 0.3667", "● best epoch 3: accuracy 80.00 %"]


def test_dollar_signs_in_names_are_no_formulas(tmp_path):
    record = RunRecord("t", "2024-05-01", Ledger(()), channels=(ChannelRow("a$b$c", 4, 2),))
    assert "a$b$c" in plots.plots(record)[0].svg()


def test_picture_has_the_format_and_width_asked_for():
    def draw(width):
        return plots.draw_sparsity(sparsity_table(3), width)

    assert style.picture(draw, "pdf").startswith(b"%PDF")
    assert b'width="547.2pt"' in style.picture(draw, "svg")
    assert b'width="266.4pt"' in style.picture(draw, "svg", style.NARROW)
