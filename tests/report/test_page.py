"""The page: well-formed, self-contained, escaped, in order, and small enough for long models."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from secateur.errors import RunError
from secateur.measure.sparsity import SparsityRow, SparsityTable
from secateur.report.ledger import ChannelRow, CheckRow, FrozenRow, Ledger, LedgerRow, RunRecord
from secateur.report.page import page_html, summary_text, write_page

VOID = frozenset({"meta", "link", "br", "hr", "img", "input", "wbr"})
SECTIONS = ["ledger", "notes", "channels", "sparsity", "proof", "training", "frozen", "conditions", "recipe"]


class Balance(HTMLParser):
    """Fails at the first tag that does not close what is open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def sections(html: str) -> list[str]:
    return re.findall(r'<section id="(\w+)">', html)


@pytest.fixture(scope="module")
def page(demo) -> str:
    return page_html(demo)


def test_well_formed_and_in_order(page):
    assert Balance(page).open == []
    assert sections(page) == SECTIONS
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_nothing_is_asked_of_the_network(page):
    assert "http" not in page.replace("http-equiv", "")
    parsed = Balance(page)
    assert {"script", "link", "img", "iframe", "object", "form", "base"}.isdisjoint(tag for tag, _ in parsed.tags)
    for _, attributes in parsed.tags:
        assert (attributes.get("href") or "#").startswith("#")
        assert "src" not in attributes
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_headline_and_ledger_are_shown(page, demo):
    text = Balance(page).text
    for figure in demo.ledger.headline:
        assert figure.value in text
        assert figure.detail.replace("->", "→") in text
    assert "The head was changed from 1,000 to 10 classes" in text
    assert "All 3 checks passed." in text
    assert demo.recipe.strip() in text


def test_both_schemes_and_both_widths(page):
    assert "prefers-color-scheme: dark" in page
    assert page.count('<div class="wide"><svg') == page.count('<div class="narrow"><svg') == 4


def test_everything_a_user_supplies_is_escaped(demo):
    bad = "<script>alert(1)</script>"
    row = demo.ledger.rows[0]
    record = RunRecord(
        title=bad,
        created=bad,
        ledger=Ledger((LedgerRow(bad, bad, row.measurement, 0.0), replace(row, step=bad + "2"))),
        recipe=bad,
        conditions=((bad, bad),),
        notes=(bad,),
        sparsity=SparsityTable((SparsityRow(bad, 1, 2),)),
        channels=(ChannelRow(bad, 4, 3),),
        frozen=(FrozenRow(bad, bad),),
        certificate=(CheckRow(bad, bad, False),),
        histories=((bad, demo.histories[0][1]),),
    )
    html = page_html(record)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 10
    assert Balance(html).open == []
    assert sections(html) == SECTIONS


def test_sections_without_data_are_left_out():
    html = page_html(RunRecord("tiny", "2024-05-01", Ledger(())))
    assert sections(html) == []
    assert "Nothing was measured." in html
    assert "1 May 2024" in html
    assert Balance(html).open == []


def test_a_failed_proof_is_said_first(demo):
    failed = (*demo.certificate, CheckRow("outputs equal", "off by 0.5", False))
    html = page_html(RunRecord("t", "not a date", Ledger(()), certificate=failed))
    assert "1 of 4 checks failed (outputs equal). Do not rely on the smaller model." in html
    assert "checks passed" not in html
    assert "not a date" in html


def test_long_models_stay_small(long_demo, tmp_path):
    path = tmp_path / "report.html"
    write_page(long_demo, path)
    assert 100_000 < path.stat().st_size < 1_500_000
    html = path.read_text(encoding="utf-8")
    assert Balance(html).open == []
    assert "features.<wbr>149.<wbr>conv2.<wbr>weight" in html
    assert 'class="scroll long"' in html


def test_same_record_same_page(demo, page):
    assert page_html(demo) == page


def test_missing_folder(tmp_path):
    with pytest.raises(RunError, match=r"could not write .*report.html: there is no folder"):
        write_page(RunRecord("tiny", "2024-05-01", Ledger(())), tmp_path / "missing" / "report.html")


def test_summary_text_has_what_the_page_has(demo):
    text = summary_text(demo)
    assert text.startswith(f"{demo.title}\n{demo.ledger.verdict}\n\nLedger\n")
    for part in ("Proof", "masked equals cut", "What could not be cut", "note: The head was changed"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100
    assert max(map(len, summary_text(demo, width=80).splitlines())) <= 80
