import base64
import re
from html.parser import HTMLParser

import pytest

from slidetune.traces import page
from slidetune.traces.report import Knob, Study, Sweep, WhatIf, write_report
from slidetune.units import format_bytes

EVIL = '<script>alert("x")</script> & Söhne'
VOID = {"meta", "img", "link", "br", "hr"}


class Reader(HTMLParser):
    """Collects what a browser would load, and checks that elements close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.tags, self.text, self.alts = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.alts += [value for name, value in attrs if name == "alt"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data.strip())


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def everything(spilled, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "deep" / "er"
    points = [(2, 300.0), (4, spilled.tokens_per_s), (8, 900.0)]
    return write_report(
        directory,
        prediction=spilled,
        title=f"llama on {EVIL}",
        subtitle=EVIL,
        facts=[("Throughput", f"{spilled.tokens_per_s:,.0f} tokens/s"), (EVIL, EVIL)],
        knobs=[
            Knob(name="window", value=2, meaning="Weight slots.", why=EVIL),
            Knob(name="clip_norm", value=None, meaning="Norm."),
            Knob(name="chunk_bytes", value=67108864, meaning=EVIL),
        ],
        whatif=[
            WhatIf(change="twice the link", tokens_per_s=spilled.tokens_per_s * 1.1, limiter="CPU Adam"),
            WhatIf(change=EVIL, tokens_per_s=spilled.tokens_per_s * 2),
        ],
        study=Study(
            trials=[{"number": 0, "value": 500.0, "feasible": True, "origin": "sampler"}],
            importances={"window": 0.5},
        ),
        sweep=Sweep(points=points, chosen=points[1], bounds={"GPU compute": [(b, 1e3) for b, _ in points]}),
        assumptions=[EVIL],
    )


def test_the_page_loads_nothing_from_elsewhere(everything):
    reader = read(everything)
    assert reader.loaded
    assert all(value.startswith("data:image/png;base64,") for value in reader.loaded)
    style = re.search(r"<style>(.*?)</style>", everything.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_everything_from_outside_is_escaped(everything):
    reader = read(everything)
    assert "script" not in reader.tags
    assert sum(EVIL in text for text in reader.text) >= 6


def test_the_pictures_lie_beside_the_page_and_in_it(everything):
    names = {path.name for path in everything.parent.iterdir()}
    pictures = {"timeline", "lanes", "memory", "throughput", "study", "knobs"}
    assert names == {"index.html"} | {f"{name}.png" for name in pictures}
    inside = {base64.b64decode(value.partition(",")[2]) for value in read(everything).loaded}
    assert inside == {(everything.parent / f"{name}.png").read_bytes() for name in pictures}
    assert len([alt for alt in read(everything).alts if alt]) == len(pictures)


def test_the_numbers_are_there(everything, spilled):
    text = read(everything).text
    assert f"{spilled.tokens_per_s:,.0f} tokens/s" in text
    for tier in spilled.memory.values():
        assert format_bytes(tier.peak_bytes) in text
    assert "+10.0%" in text
    assert "+100.0%" in text
    assert text.index("+100.0%") < text.index("+10.0%")  # What helps most comes first.
    assert "67,108,864" in text
    assert any(spilled.limiter in part for part in text)
    for name in spilled.bounds_s:
        assert name in text


def test_every_figure_of_the_machine_has_its_kind_and_source(everything, spilled):
    text = read(everything).text
    figures = list(spilled.profile.figures())
    for path, figure in figures:
        at = text.index(path)
        assert text[at + 2] == figure.kind
    assert any(part.startswith(f"The machine's {len(figures)} figures:") for part in text)


def test_without_a_search_its_sections_are_left_out(plain, tmp_path):
    path = write_report(tmp_path, prediction=plain, title="t", facts=[])
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "timeline.png", "lanes.png", "memory.png"}
    text = read(path).text
    assert "Memory" in text
    for absent in ("The search", "Throughput and batch", "What would help", "The plan"):
        assert absent not in text


def test_the_same_report_twice_is_the_same_file(plain, tmp_path):
    one, two = (write_report(tmp_path / n, prediction=plain, title="t", facts=[]) for n in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_elements_escape_what_is_not_markup():
    assert page.tag("td", "<b>", page.Html("<i></i>"), class_='a"b') == '<td class="a&quot;b">&lt;b&gt;<i></i></td>'
    assert page.table(("a",), []) == ""
    assert page.section("Empty", "", intro="never seen") == ""
    assert page.anchor("What limits it?") == "what-limits-it"
