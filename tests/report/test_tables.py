"""Tables: the golden ledger, the report's Table 1, and that text and HTML show the same figures."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from secateur.measure.sparsity import SparsityRow, SparsityTable
from secateur.report import tables
from secateur.report.layout import Cell, Table, to_html, to_rich, to_text, transposed
from secateur.report.ledger import ChannelRow, CheckRow, FrozenRow, Ledger

GOLDEN = """\
Ledger
Step                        Accuracy     Top-5     Loss    Parameters          MACs            File             Latency   Sparsity     Took
───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
original                     98.89 %   99.95 %   0.0500     5,800,000       116.0 M        23.20 MB             4.00 ms     0.00 %        –
                                                                                          22.13 MiB        3.80–4.40 ms
masked                       96.11 %   99.95 %   0.2100     5,800,000       116.0 M        23.20 MB             4.10 ms    80.00 %   0.40 s
global L1, 80 %         -2.78 points                                                      22.13 MiB        3.89–4.51 ms
                                                                                                      within the spread
cut                          41.67 %   99.95 %   2.3000       250,000       5.000 M        1.002 MB             2.10 ms     0.00 %    1.3 s
channels by sparsity   -57.22 points                      23.2x fewer   23.2x fewer      0.9556 MiB        1.99–2.31 ms
                                                                                      23.2x smaller         1.9x faster
fine-tuned                   98.33 %   99.95 %   0.0612       250,000       5.000 M        1.002 MB             2.10 ms     0.00 %   41.0 s
best epoch of 20        -0.56 points                      23.2x fewer   23.2x fewer      0.9556 MiB        1.99–2.31 ms
                                                                                      23.2x smaller         1.9x faster
Accuracy (top-1) and loss on 360 images. MACs of one image; a fused multiply-add counts as one. File: MB is 10^6 bytes, MiB is 2^20. MACs
leave out: max_pool2d, relu. Latency: median, and 10th to 90th percentile, of 30 runs, batch 1, 2 threads, cpu."""  # noqa: E501

TABLE_1 = (
    (56, 1728), (6081, 36864), (12449, 73728), (29101, 147456), (68043, 294912), (164093, 589824),
    (160281, 589824), (373458, 1179648), (929979, 2359296), (934632, 2359296), (897492, 2359296),
    (905980, 2359296), (995514, 2359296), (93590467, 102760448), (10156255, 16777216), (1451421, 4096000),
)  # fmt: skip


class Texts(HTMLParser):
    """The text of each cell, and of each small line in it, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag in ("th", "td", "small"):
            self.found.append("")

    def handle_data(self, data):
        if self.found and data.strip():
            self.found[-1] += data


def cell_texts(table: Table) -> list[str]:
    return [
        *table.columns,
        *(text for row in table.rows for cell in row for text in (cell.text, *cell.notes)),
    ]


def every_table(record):
    yield tables.ledger_table(record.ledger)
    yield tables.sparsity_table(record.sparsity)
    yield tables.channels_table(record.channels)
    yield tables.frozen_table(record.frozen)
    yield tables.certificate_table(record.certificate)
    yield tables.history_table(*record.histories[0])
    yield tables.conditions_table(record.conditions)


def test_golden_ledger(demo):
    assert to_text(tables.ledger_table(demo.ledger), 139) == GOLDEN


def test_html_and_text_show_the_same(demo):
    for table in every_table(demo):
        assert Texts(to_html(table)).found == cell_texts(table), table.title
        text = to_text(table, 200)
        for shown in cell_texts(table):
            assert shown in text, (table.title, shown)


def test_every_number_of_the_html_ledger_is_in_the_text_table(demo):
    table = tables.ledger_table(demo.ledger)
    number = re.compile(r"\d[\d,.]*")
    in_html = sorted(n for text in Texts(to_html(table)).found for n in number.findall(text))
    in_text = sorted(number.findall(to_text(table, 200).split("Accuracy (top-1)")[0]))
    assert in_html == in_text
    assert len(in_html) > 60


def test_table_1_of_the_report():
    rows = tuple(SparsityRow(f"Layer {i}", zeros, elements) for i, (zeros, elements) in enumerate(TABLE_1))
    table = tables.sparsity_table(SparsityTable(rows))
    assert [cell.text for cell in table.rows[13]] == ["Layer 13", "93,590,467", "102,760,448", "91.08 %"]
    zeros, elements = (sum(pair[i] for pair in TABLE_1) for i in (0, 1))
    assert [cell.text for cell in table.rows[-1]] == ["Total", f"{zeros:,}", f"{elements:,}", "80.00 %"]
    assert table.total


def test_rows_match_columns(demo):
    for table in every_table(demo):
        assert len(table.align) == len(table.columns)
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_a_timing_by_turns_is_said_and_used(demo):
    rows = tuple(replace(row, speedup=3.0) for row in demo.ledger.rows)
    assert "timed by turns" not in tables.ledger_table(demo.ledger).note
    table = tables.ledger_table(Ledger(rows))
    assert "timed by turns" in table.note
    assert table.rows[-1][table.columns.index("Latency")].notes[-1] == "3.0x faster"


def test_columns_without_data_are_left_out(demo):
    rows = tuple(
        type(row)(row.step, row.note, type(row.measurement)(**{**vars(row.measurement), "latency": None}), 1.0)
        for row in demo.ledger.rows
    )
    assert "Latency" in tables.ledger_table(demo.ledger).columns
    assert "Latency" not in tables.ledger_table(Ledger(rows)).columns
    assert "Latency:" not in tables.ledger_table(Ledger(rows)).note


def test_frozen_is_grouped_by_reason_and_counted():
    frozen = [FrozenRow("fc.weight", "output"), *(FrozenRow(f"conv{i}", "unknown op") for i in range(6))]
    table = tables.frozen_table(frozen)
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["unknown op", "6", "conv0, conv1, conv2, conv3 and 2 more"],
        ["output", "1", "fc.weight"],
    ]
    assert tables.frozen_table(frozen, shown=1).rows[0][2].text == "conv0 and 5 more"


def test_a_failed_check_cannot_be_overlooked():
    table = tables.certificate_table([CheckRow("masked equals cut", "off by 0.3", False)])
    assert table.rows == ((Cell("masked equals cut"), Cell("off by 0.3"), Cell("FAILED", tone="bad")),)


def test_channels_total():
    table = tables.channels_table([ChannelRow("a", 64, 48), ChannelRow("b", 64, 64)])
    assert [cell.text for cell in table.rows[-1]] == ["Total", "128", "112", "12.50 %"]
    assert [cell.text for cell in table.rows[0]] == ["a", "64", "48", "25.00 %"]


def test_a_wide_table_is_turned_on_its_side(demo):
    table = tables.ledger_table(demo.ledger)
    turned = to_text(table, 100)
    assert turned.splitlines()[1].split() == ["Step", "original", "masked", "cut", "fine-tuned"]
    assert max(map(len, turned.splitlines())) <= 100
    assert to_rich(table, 100).row_count == len(transposed(table).rows)
    assert to_rich(table).row_count == len(table.rows)


def test_html_escapes_and_marks():
    table = Table("t", ("<b>",), ((Cell("<script>", ("a & b",), "bad"),),), ("left",), total=True)
    html = to_html(table, 'x"y')
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html
    assert 'class="x&#34;y"' in html
    assert 'class="left bad"' in html
    assert '<tr class="total">' in html


def test_best_epoch_is_marked(demo):
    name, history = demo.histories[0]
    table = tables.history_table(name, history)
    marked = [row[0].text for row in table.rows if "best" in row[0].text]
    assert marked == [f"{history.best_epoch} (best)"]
    assert [row[1].text for row in table.rows[9:11]] == ["0.001", "0.0001"]
