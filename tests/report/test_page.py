"""The page says what the run folder says, for itself alone."""

import dataclasses
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

from expunge.core.card import Card
from expunge.core.errors import InputError
from expunge.core.records import Certificate
from expunge.report import views, words
from expunge.report.page import render
from expunge.report.pictures import data_address
from report.made_run import ARMS, DETECTORS, NEIGHBOURS, write_run

VOID = {"meta", "link", "img", "br", "use", "path", "circle", "rect", "image", "stop"}


class Outline(HTMLParser):
    """Collects elements and checks that each one is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def plain(page: str) -> str:
    return " ".join(" ".join(Outline(page).text).split())


def test_it_is_one_file_that_asks_nobody(page: str) -> None:
    outline = Outline(page)
    for _, attributes in outline.elements:
        for key in ("src", "href", "xlink:href", "poster", "data", "action"):
            address = attributes.get(key, "")
            own = address.startswith(("data:", "#")) or not address
            assert own or (key == "href" and "rel" not in attributes and re.match(r"https://arxiv\.org/", address)), (
                address
            )
    assert "@import" not in page and "url(http" not in page
    assert not outline.all("script") and not outline.all("iframe")


def test_every_picture_has_words_and_bytes(page: str) -> None:
    outline = Outline(page)
    pictures = outline.all("img")
    assert len(pictures) == 4 * 8 * len(ARMS)  # target, synonyms, neighbours, styles
    for picture in pictures:
        assert picture["src"].startswith("data:image/png;base64,")
        assert re.search(r"(base|uce|esd|all_but_one): .*, seed \d+; .* recognised", picture["alt"])
    for drawing in outline.all("svg"):
        assert drawing["role"] == "img" and len(drawing["aria-label"]) > 20


def test_headings_and_columns_come_in_order(page: str) -> None:
    text = plain(page)
    titles = ("erased three ways", "What is left", "Before and after", "asked for by name", "by a synonym")
    titles += ("Neighbours that", "Styles that", "Rates with", "What was changed", "How it was done", "do not say")
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    for name in NEIGHBOURS:
        assert name in text


def test_rates_on_the_page_are_those_of_the_summary(run_folder: Path, page: str) -> None:
    (summary,) = json.loads((run_folder / "summary.json").read_text())["suites"]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", page)
    assert len(rows) == sum(len(arm["rates"]) for arm in summary["arms"])
    for arm in summary["arms"]:
        for key, rate in arm["rates"].items():
            row = next(row for row in rows if _is(row, arm, words.RATES[key]))
            cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
            assert cells[1] == words.percent(rate["value"])
            assert cells[2] == f"{words.percent(rate['low'])}–{words.percent(rate['high'])}"
            assert cells[3] == words.percent(arm["raw"][key]["value"])
            assert cells[4:6] == [str(rate["n"]), str(rate["clusters"])]
            assert cells[6:] == [rate["detector"] or arm["detector"], rate["corrected_for"] or "no"]


def _is(row: str, arm: dict[str, str], title: str) -> bool:
    return row.startswith(f"{arm['name']}</th><td>{title}</td>") and f"<td>{arm['detector']}</td>" in row


def test_what_the_detector_saw_is_marked_per_picture(run_folder: Path, page: str) -> None:
    scores = [json.loads(line) for line in (run_folder / "scores.jsonl").read_text().splitlines()]
    fired = {(row["arm"], row["case_id"]): row["fired"] for row in scores
             if row["detector"] == DETECTORS[0] and row["kind"] == "object"}  # fmt: skip
    index = [json.loads(line) for line in (run_folder / "samples/objects/esd/index.jsonl").read_text().splitlines()]
    cases = {(case["prompt"], case["seed"]): case["case_id"] for case in index}
    checked = 0
    for alt in (picture["alt"] for picture in Outline(page).all("img")):
        arm, prompt, seed, verdict = re.fullmatch(r"(\w+): (.*), seed (\d+); (.*)", alt).groups()  # type: ignore[union-attr]
        assert ("not recognised" not in verdict) == fired[arm, cases[prompt, int(seed)]]
        checked += "not recognised" in verdict
    assert checked > 5  # both verdicts occur, or this would test nothing


def test_a_reconstruction_is_called_one_wherever_it_stands(page: str) -> None:
    assert words.RECONSTRUCTION in plain(page)
    assert page.count('<a class="dagger"') == 1 + 4 + 1 + 1  # glance, four grids, changes, method card
    assert "all_but_one †" in page  # in the plots
    assert "esd †" not in page


def test_without_a_reconstruction_nothing_is_marked(tmp_path: Path) -> None:
    page = render(write_run(tmp_path / "run", arms=("base", "esd")))
    assert "†" not in page and words.RECONSTRUCTION not in plain(page)
    assert "“strawberry”, erased with esd" in plain(page)


def test_the_base_model_alone_has_a_page(tmp_path: Path) -> None:
    text = plain(render(write_run(tmp_path / "run", arms=("base",))))
    assert "“strawberry”, before erasing" in text and "What was changed" not in text


def test_uncalibrated_rates_say_so(tmp_path: Path) -> None:
    page = render(write_run(tmp_path / "run", arms=("base", "esd"), calibrated=False))
    corrected = re.findall(r"<td>(\w+)</td></tr>", page)
    assert corrected and set(corrected) == {"no"}


def test_an_anchor_is_shown_only_where_it_had_an_effect(page: str) -> None:
    sent = dict(
        re.findall(r"<h3>(\w+)(?:<a.*?</a>)?</h3>\s*<p>Invented.*?<dt>Sent to</dt><dd>(.*?)</dd>", page, re.DOTALL)
    )
    assert sent == {
        "all_but_one": "nothing (unconditional)",
        "esd": "no anchor: the method uses none",
        "uce": "banana",
    }


def test_embedded_models_credit_every_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", arms=("base", "esd"))
    assert words.CREDITS not in plain(render(folder))
    (tmp_path / "embedded" / "tiny-unet").mkdir(parents=True)
    monkeypatch.setattr(views, "EMBEDDED", tmp_path / "embedded")
    assert words.CREDITS in plain(render(folder))


def test_the_credits_are_those_of_the_dataset() -> None:
    table = read_table(Path(views.__file__).parent.parent / "embedded" / "emoji-world.parquet")
    hands = set(zip(table["licence"].to_pylist(), table["attribution"].to_pylist(), strict=True))
    assert len(hands) >= 4
    for licence, attribution in hands:
        assert licence.replace("CC-BY-4.0", "CC-BY 4.0") in words.CREDITS
        named = attribution.replace("(c) ", "").replace("Copyright ", "").replace("copyright ", "")
        assert any(word in words.CREDITS for word in re.split(r"[,;/]| and ", named) if len(word) > 5), attribution


def test_limits_promise_nothing(page: str) -> None:
    text = plain(page)
    for name, _ in words.LIMITS:
        assert name in text
    assert "leakage" not in text and "≤" not in text and "guarantee" not in text


def test_words_from_outside_are_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arms=("base", "esd"))
    for index in folder.glob("samples/*/*/index.jsonl"):
        index.write_text(index.read_text().replace("on white", "on <script>alert(1)</script> & white"))
    page = render(folder)
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page


def test_the_same_folder_gives_the_same_bytes(run_folder: Path, page: str) -> None:
    assert render(run_folder) == page


def test_two_artifacts_of_one_method_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arms=("base", "esd"))
    (folder / "again" / "artifact").mkdir(parents=True)
    (folder / "again" / "artifact" / "card.json").write_bytes((folder / "esd" / "artifact" / "card.json").read_bytes())
    with pytest.raises(InputError, match="two artifacts of method 'esd'"):
        render(folder)


def test_certificates_stand_beside_the_change_they_are_about(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arms=("base", "esd", "uce"))
    assert "What holds without a picture" not in render(folder)
    said = Certificate(name="residual", statement="Ends within 0.25.", value=0.25, assumptions=("These.", "No."))
    file = folder / "uce" / "artifact" / "card.json"
    file.write_text(dataclasses.replace(Card.from_json(file.read_text()), certificates=(said,)).to_json())
    page = render(folder)
    assert page.count("What holds without a picture") == 1
    card = page[page.index("<h3>uce") :]
    assert "Ends within 0.25." in card and "These. No." in card


@pytest.mark.parametrize("file", ["summary.json", "scores.jsonl", "samples/objects/esd/index.jsonl"])
def test_missing_and_torn_files_are_named(file: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arms=("base", "esd"))
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=Path(file).name):
        render(folder)
    (folder / file).unlink()
    with pytest.raises(InputError, match="no such file"):
        render(folder)


def test_large_pictures_are_scaled(tmp_path: Path) -> None:
    from PIL import Image

    Image.effect_noise((1024, 768), 60).convert("RGB").save(tmp_path / "large.png")
    address = data_address(tmp_path / "large.png")
    assert address.startswith("data:image/webp;base64,")
    assert len(address) < (tmp_path / "large.png").stat().st_size / 10


def test_rendering_needs_no_torch(run_folder: Path) -> None:
    program = (
        f"import sys; from pathlib import Path; from expunge.report.page import render; "
        f"page = render(Path({str(run_folder)!r})); print(len(page), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    size, torch = done.stdout.split()
    assert int(size) > 50_000 and torch == "False"


@pytest.mark.parametrize(
    "value, text", [(0.0, "0"), (1.0, "100"), (0.004, "0.4"), (0.996, "99.6"), (0.126, "13"), (0.01, "1")]
)
def test_percentages_never_round_to_a_promise(value: float, text: str) -> None:
    assert words.percent(value) == text
