"""Reading the static pages in tests, and the records and predictions they are made from."""

import io
from dataclasses import replace
from html.parser import HTMLParser

from PIL import Image

from glipv2.pipeline.records import Record, Region

EVIL = "<script>alert('x')</script>"
CAPTION = f"a red square near {EVIL} & a blue circle"
SQUARE, CIRCLE = (2, 12), (CAPTION.index("blue"), len(CAPTION))
BOX_A, BOX_B = (10.0, 5.5, 60.0, 40.25), (80.0, 20.0, 150.0, 90.0)


def jpeg(width=160, height=100, color="olive"):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "JPEG")
    return buffer.getvalue()


def pair(key="p-0", score=0.75, **changes):
    record = Record(
        key=key,
        image=jpeg(),
        image_format="jpg",
        width=160,
        height=100,
        task="grounding",
        caption=CAPTION,
        regions=(
            Region(box=BOX_B, spans=(CIRCLE,), phrase="blue circle", score=0.5),
            Region(box=BOX_A, spans=(SQUARE,), phrase="red square", score=score),
        ),
        provenance={
            "source": f"web {EVIL}",
            "licence": "CC BY 4.0",
            "url": "https://example.org/x",
        },
    )
    return replace(record, **changes)


class Page(HTMLParser):
    """All elements with their attributes and own text, and all text that a reader sees."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.html = html
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, **dict(attributes), "text": ""}
        self.elements.append(element)
        self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, **dict(attributes), "text": ""})

    def handle_endtag(self, tag):
        while self._open and self._open.pop()["tag"] != tag:
            pass

    def handle_data(self, data):
        for element in self._open:
            element["text"] += data
        if not self._open or self._open[-1]["tag"] not in ("style", "title"):
            self.text += data

    def all(self, tag, **attributes):
        return [
            e
            for e in self.elements
            if e["tag"] == tag and all(e.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]


def shown(path):
    return Page(path.read_text())


def boxes(page):
    """(x0, y0, x1, y1, colour) of each box drawn over a picture."""
    found = []
    for rect in page.all("rect", class_="edge"):
        x, y, w, h = (float(rect[name]) for name in ("x", "y", "width", "height"))
        found.append((x, y, x + w, y + h, rect["stroke"]))
    return found


def assert_self_contained(page):
    """Nothing is loaded from anywhere, nothing runs."""
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for element in page.elements:
        for name, value in element.items():
            assert not name.startswith("on"), element
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith(
                    ("data:image/jpeg;base64,", "data:image/png;base64,", "#")
                ), value[:80]
    styles = "".join(e["text"] for e in page.all("style"))
    styles += "".join(e.get("style", "") for e in page.elements)
    assert "{" in styles and "url(" not in styles and "@import" not in styles


def prediction(key, *found):
    """`found` are (box, name, score)."""
    truth = [{"box": BOX_A, "name": "red square"}, {"box": BOX_B, "name": "blue circle"}]
    predicted = [{"box": box, "name": name, "score": score} for box, name, score in found]
    return {"key": key, "truth": truth, "predicted": predicted}


SQUARE_FOUND, CIRCLE_FOUND = (BOX_A, "red square", 0.9), (BOX_B, "blue circle", 0.8)
MIXED_UP = (BOX_A, "blue circle", 0.85)
