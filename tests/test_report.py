import json
from html.parser import HTMLParser

from llmkern.report import Report, Row, Skipped


def make_report() -> Report:
    rows = [
        Row("model.layers.0.q_proj", (64, 32), "gptq-int4-g32", "reference", 0.01, 0.5, 8192, 1280, 0.01, 512),
        Row("<b>&evil", (64, 32), "rtn-int8", "reference", None, 0.25, 8192, 2304, notes=("a < b",)),
        Row("model.layers.1.q_proj", (64, 32), "rtn-int8", "reference", float("nan"), 0.0, 8192, 2304),
    ]
    return Report("gptq-int4-g32", rows, [Skipped("lm_head", "ignored by 'lm_head'", 4096)], tokens=512)


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.open.pop() == tag


def test_json_holds_every_row_and_the_totals():
    data = json.loads(make_report().to_json())
    assert [row["name"] for row in data["rows"]] == [row.name for row in make_report().rows]
    assert data["rows"][2]["loss"] is None
    assert data["totals"]["linear_bytes_before"] == 3 * 8192
    assert data["totals"]["coverage"] == 3 * 8192 / (3 * 8192 + 4096)
    assert data["skipped"][0]["reason"] == "ignored by 'lm_head'"
    assert {"machine", "versions", "recipe"} <= data.keys()


def test_html_is_one_closed_page_that_fetches_nothing():
    page = _Page()
    page.feed(make_report().to_html())
    assert page.open == []
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 2
    assert tags.count("rect") == 3 + 2 * 3
    assert "script" not in tags
    assert not any("src" in attributes or "href" in attributes for _, attributes in page.tags)


def test_html_escapes_text():
    text = make_report().to_html()
    assert "<b>&evil" not in text
    assert "&lt;b&gt;&amp;evil" in text
    assert "a &lt; b" in text


def test_files_are_written(tmp_path):
    report = make_report()
    report.to_json(tmp_path / "report.json")
    report.to_html(tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text())["recipe"] == "gptq-int4-g32"
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_an_empty_report_renders():
    assert "<svg" in Report("bf16").to_html()
