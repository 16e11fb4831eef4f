"""The page in a real browser: it shows what it should, wide and narrow, light and dark."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000",
)  # fmt: skip


def browse(page: Path, profile: Path, *words: str) -> str:
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("no chromium here; `make browser` installs it")
    assert CHROMIUM is not None, "CI has no chromium; .ci/run installs it"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *words, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def shot(folder: Path, tmp_path: Path, width: int, *words: str, height: int = 2600) -> Float[np.ndarray, "h w c"]:
    file = tmp_path / "shot.png"
    browse(
        folder / "report.html", tmp_path / "profile", f"--window-size={width},{height}", f"--screenshot={file}", *words
    )
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=float)


def test_the_browser_sees_the_whole_page(run_folder: Path, tmp_path: Path) -> None:
    dom = browse(run_folder / "report.html", tmp_path / "profile", "--dump-dom")
    text = " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", dom, flags=re.DOTALL).split())
    for words in (
        "“strawberry”, erased three ways",
        "8 of 8 recognised",
        "What was changed",
        "Reconstruction.",
        "base",
    ):
        assert words in text
    assert dom.count("<svg") == 5 + 3  # five rates, three methods


def test_a_wide_screen_shows_pictures_plots_and_paper(run_folder: Path, tmp_path: Path) -> None:
    pixels = shot(run_folder, tmp_path, 1280)
    assert pixels.shape == (2600, 1280, 3)
    assert pixels[:30].mean() > 240  # paper
    rows_with_ink = ((pixels.min(axis=2) < 200).sum(axis=1) > 3).mean()
    assert rows_with_ink > 0.35  # no blank page, and no long gaps
    crimson = (pixels[..., 0] > 180) & (pixels[..., 1] < 60) & (pixels[..., 2] < 90)
    left, right = crimson[:, :640].sum(), crimson[:, 640:].sum()
    assert left > 5 * right > 0  # strawberries stand in the base column; right of it few survived


def test_a_phone_needs_no_sideways_scrolling(run_folder: Path, tmp_path: Path) -> None:
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    probe = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script></body>"
    # headless windows are at least 500 wide, a frame is as narrow as it is told to be
    (tmp_path / "probed.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    frame = (
        '<iframe id="f" src="probed.html" width="360" height="3000"></iframe><p id="p"></p><script>f.onload = () => '
    )
    frame += "{ p.textContent = f.contentDocument.title }</script>"
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    dom = browse(tmp_path / "frame.html", tmp_path / "profile", "--dump-dom", "--allow-file-access-from-files")
    needed, given = map(int, re.search(r'<p id="p">(\d+) of (\d+)', dom).groups())  # type: ignore[union-attr]
    assert given == 360 and needed <= given


def test_a_dark_screen_is_dark(run_folder: Path, tmp_path: Path) -> None:
    light = shot(run_folder, tmp_path, 1280, height=900)
    dark = shot(run_folder, tmp_path, 1280, "--blink-settings=preferredColorScheme=0", height=900)
    assert light[:30].mean() > 240 and dark[:30].mean() < 40
    assert (dark.min(axis=2) > 180).sum() > 2000  # its ink is light
