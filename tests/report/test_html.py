"""The report page: its text, and its behavior in headless Chromium."""

import json
import re
from html.parser import HTMLParser

import pytest
from fixtures import records as made
from fixtures.browser import CHROMIUM, Browser

from tq_lightning.cli import report as command
from tq_lightning.report import figures


class Outline(HTMLParser):
    """Collect images, ids, link targets and every URL that would be fetched."""

    def __init__(self):
        super().__init__()
        self.images, self.ids, self.targets, self.fetched = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids.add(attributes.get("id"))
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.targets.append(attributes["href"])
        self.fetched += [
            v for k, v in attrs if k in ("src", "srcset", "data") or (k == "href" and tag == "link")
        ]


def outline(text):
    made = Outline()
    made.feed(text)
    return made


def test_page_is_self_contained(tmp_path, monkeypatch, make):
    monkeypatch.setattr(
        figures, "FIGURES", {name: figures.FIGURES[name] for name in ("qt_gap", "pareto")}
    )
    record = make.run(
        "floor",
        0,
        command="fit </script><script>alert(1)</script>",
        data_name="<b>x</b>",
        loss=float("nan"),
    )
    make.write(tmp_path / "runs", record, make.run("round", 0, data_name="<b>x</b>"))
    command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--title", "<i>t</i>"])
    text = (tmp_path / "out" / "index.html").read_text()
    found = outline(text)
    assert found.images
    assert all(len(image["alt"]) > 40 for image in found.images)
    assert all(where.startswith("data:") for where in found.fetched)
    assert all(
        target[1:] in found.ids if target[0] == "#" else (tmp_path / "out" / target).is_file()
        for target in found.targets
    )
    assert "<b>x</b>" not in text
    assert "<i>t</i>" not in text
    assert text.count("<script") == 2  # the records, and the data of the page
    data = json.loads(
        re.search(r'id="records">(.*?)</script>', text, re.S)[1],
        parse_constant=lambda name: pytest.fail(name),
    )
    assert data[record["id"]]["config"]["model"]["quantizer"] == "floor"
    assert data[record["id"]]["record"]["loss"] == "NaN"


def test_accuracies_come_first_with_units_and_defined_terms(tmp_path, monkeypatch, make):
    monkeypatch.setattr(figures, "FIGURES", {})
    make.write(tmp_path / "runs", *make.pair(noise=0.0), make.inspect())
    command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    message = "Truncated to 2 bits, round goes from 84.0 to 24.0 % and floor stays at 84.0 % top-1"
    assert f"<h1>{message} (resnet20_cifar · cifar10)</h1>" in text
    body = text[text.index("<main") :]
    order = ['id="t-headline"', "<dt>Arm</dt>", "<dt>QT gap</dt>", 'id="findings"', 'id="figures"']
    places = [body.index(part) for part in order]
    assert places == sorted(places)
    heads = re.findall(r"<th [^>]*>(?:<button[^>]*>)?([^<]+)<", body)
    assert {"8 bits [%]", "4 bits [%]", "2 bits [%]", "1 bit [%]", "time [s]"} <= set(heads)
    assert not [head for head in heads if re.fullmatch(r"\d+|seconds|bytes|pJ|total", head)]
    words = re.sub(r"<[^>]+>", " ", body[: body.index('id="records"')])
    assert not re.findall(r"\b[A-Z]{3,} [A-Z]{3,}\b", words)


@pytest.fixture(scope="module")
def page(tmp_path_factory, request):
    """Open a report of many arms from disk."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    folder = tmp_path_factory.mktemp("page")
    records = [
        *made.pair(),
        made.run("floor", 3, "resnet8_cifar"),
        made.inspect(),
        made.run("round", 9, status="failed"),
    ]
    made.write(folder / "runs", *records)
    command.main([str(folder / "runs"), "--out", str(folder / "report")])
    browser = Browser(folder / "profile")
    request.addfinalizer(browser.close)
    browser.open((folder / "report" / "index.html").as_uri())
    return browser


SHOWN = "[...document.querySelectorAll('#t-runs tbody tr')].filter(r => r.offsetParent !== null)"
TYPE = (
    "(box => {{ box.value = {!r}; box.dispatchEvent(new Event('input')); }})"
    "(document.querySelector('[aria-controls=t-runs]'))"
)

CHOOSE = (
    "(pick => {{ pick.value = {1!r}; pick.dispatchEvent(new Event('input')); }})"
    "([...document.querySelectorAll('[data-name=runs] label')]"
    ".find(label => label.textContent.startsWith({0!r})).querySelector('select'))"
)


def column(page, name):
    """Return the texts of a column of the run table, visible rows from top to bottom."""
    where = (
        f"[...document.querySelectorAll('#t-runs th')].findIndex(h => h.textContent === {name!r})"
    )
    return page.run(f"{SHOWN}.map(r => r.cells[{where}].textContent)")


def head(name):
    return f"[...document.querySelectorAll('#t-runs th')].find(h => h.textContent === {name!r})"


@pytest.mark.slow
class TestChromium:
    def test_filter_by_words_and_by_selection(self, page):
        assert len(column(page, "quantizer")) == 7
        page.run(TYPE.format("floor RESNET20"))
        assert column(page, "quantizer") == ["floor"] * 3
        assert (
            page.run("document.querySelector('[data-name=runs] output').textContent")
            == "3 of 7 rows"
        )
        page.run(TYPE.format("nothing like it"))
        assert column(page, "quantizer") == []
        page.run(TYPE.format(""))
        page.run(CHOOSE.format("quantizer", "round"))
        assert column(page, "quantizer") == ["round"] * 3
        page.run(CHOOSE.format("quantizer", ""))
        assert len(column(page, "quantizer")) == 7

    def test_sort_by_numbers_and_by_words(self, page):
        before = column(page, "2 bits [%]")
        page.run(f"{head('2 bits [%]')}.querySelector('button').click()")
        up = [float(x) for x in column(page, "2 bits [%]")]
        assert up == sorted(up)
        assert page.run(f"{head('2 bits [%]')}.getAttribute('aria-sort')") == "ascending"
        page.run(f"{head('2 bits [%]')}.querySelector('button').click()")
        assert [float(x) for x in column(page, "2 bits [%]")] == up[::-1]
        assert [float(x) for x in before] != up[::-1]
        page.run(f"{head('model')}.querySelector('button').click()")
        assert column(page, "model")[0] == "resnet8_cifar"  # before resnet20: digits are numbers
        assert page.run(f"{head('2 bits [%]')}.getAttribute('aria-sort')") == "none"

    def test_every_figure_has_a_text_alternative_and_is_visible(self, page):
        images = page.run(
            "[...document.images].map(i => [i.alt.length, i.naturalWidth, "
            "!!i.closest('figure').querySelector('figcaption')])"
        )
        assert len(images) > 4
        assert all(alt > 40 and width > 0 and captioned for alt, width, captioned in images)

    def test_run_opens_with_one_key_press(self, page):
        page.run("document.querySelector('button.run').focus()")
        run = page.run("document.activeElement.dataset.run")
        page.key("Enter", 13, "\r")
        assert page.run("document.getElementById('details').open")
        words = page.run("document.getElementById('details').innerText")
        assert run in words
        assert '"quantizer": "' in words
        assert "0123456789abcdef" in words
        assert "torch 2.8.0" in words
        page.key("Escape", 27)
        assert not page.run("document.getElementById('details').open")
        assert page.run("document.activeElement.dataset.run") == run  # focus returns

    def test_tab_reaches_link_button_filter_and_head_in_turn_with_a_visible_focus(self, page):
        page.run("document.activeElement.blur(), scrollTo(0, 0)")
        page.run("document.querySelector('.skip').focus()")
        reached = []
        for _ in range(400):
            page.key("Tab", 9)
            reached.append(
                page.run(
                    "(e => e.tagName + (e.closest('th') ? '-HEAD' : ''))(document.activeElement)"
                )
            )
            assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
            if {"A", "BUTTON", "INPUT", "SELECT", "BUTTON-HEAD", "SUMMARY"} <= set(reached):
                break
        else:
            pytest.fail(f"not all reached: {sorted(set(reached))}")
        page.run("document.querySelector('#t-runs th button').focus()")
        page.key("Enter", 13, "\r")
        assert (
            page.run("document.querySelector('#t-runs th').getAttribute('aria-sort')")
            == "ascending"
        )

    def test_colors_follow_the_system(self, page):
        def background(scheme):
            page.send(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            return page.run("getComputedStyle(document.body).backgroundColor")

        assert background("light") == "rgb(255, 255, 255)"
        assert background("dark") == "rgb(21, 23, 26)"

    def test_narrow_window_scrolls_the_table_not_the_page(self, page):
        page.send(
            "Emulation.setDeviceMetricsOverride",
            width=390,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        assert page.run("document.documentElement.scrollWidth") <= 390
        first = "document.getElementById('t-headline')"
        assert page.run(f"{first}.scrollWidth <= {first}.parentElement.clientWidth")
        page.send("Emulation.clearDeviceMetricsOverride")

    def test_click_opens_a_large_figure(self, page):
        page.run("document.querySelector('a.frame').click()")
        assert page.run("document.getElementById('details').open")
        shown = page.run("document.querySelector('dialog img').getBoundingClientRect().width")
        assert shown >= 1000
        page.key("Escape", 27)
        assert not page.run("document.getElementById('details').open")

    def test_left_out_records_are_on_the_page(self, page):
        assert "unfinished: status failed" in page.run(
            "document.getElementById('left_out').innerText"
        )

    def test_zz_page_causes_no_console_errors_or_requests(self, page):
        assert page.problems() == []
