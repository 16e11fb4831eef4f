"""Build emoji world: npm packages of open emoji art → one parquet file of 64×64 RGBA renders.

python -m training.build_dataset [--cache DIR]

Every tarball is checked against npm's sha512 and every licence against `sources.toml`; the same bytes come out each
time.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import subprocess
import tarfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image, ImageFilter

HERE = Path(__file__).parent
OUT = HERE.parent / "src" / "expunge" / "embedded" / "emoji-world.parquet"
LICENCES = {"Apache-2.0", "MIT", "CC-BY-4.0"}
SIZE = 64
HELD_OUT_PER_STYLE = 6


def fetch(source: dict[str, Any], cache: Path) -> Path:
    """Unpack one npm package below `cache`, refusing other bytes or another licence than `sources.toml` names."""
    cache.mkdir(parents=True, exist_ok=True)
    name = f"{source['package'].strip('@').replace('/', '-')}-{source['version']}"
    tarball, folder = cache / f"{name}.tgz", cache / name
    if not tarball.exists():
        wanted = f"{source['package']}@{source['version']}"
        subprocess.run(["npm", "pack", wanted, "--pack-destination", str(cache)], check=True, capture_output=True)
    digest = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != source["integrity"]:
        raise ValueError(f"{tarball.name}: sha512 is {digest}, sources.toml says {source['integrity']}")
    if not folder.exists():
        with tarfile.open(tarball) as tar:
            tar.extractall(folder, filter="data")
    found = json.loads((folder / "package" / "package.json").read_text())["license"]
    if found != source["licence"] or found not in LICENCES:
        raise ValueError(f"{source['package']}: licence is {found!r}, sources.toml says {source['licence']!r}")
    return folder / "package"


def bare(codepoint: str) -> str:
    """Lower-case codepoint sequence without variation selectors."""
    return "-".join(part for part in codepoint.lower().split("-") if part != "fe0f")


class IconSet:
    """Art of one iconify package, found by codepoint or, where the package has no codepoints, by name."""

    def __init__(self, folder: Path) -> None:
        """Read `icons.json` and `chars.json`."""
        self.data = json.loads((folder / "icons.json").read_text())
        self.chars = {bare(code): name for code, name in json.loads((folder / "chars.json").read_text()).items()}

    def draw(self, codepoint: str, names: Iterable[str]) -> Image.Image | None:
        """Render one emoji, or None when the package lacks it."""
        known = [self.chars[codepoint]] if codepoint in self.chars else [] if self.chars else list(names)
        for name in known:
            name = self.data.get("aliases", {}).get(name, {}).get("parent", name)
            if name in self.data["icons"]:
                return self._render(self.data["icons"][name])
        return None

    def _render(self, icon: dict[str, Any]) -> Image.Image:
        width, height = (icon.get(side, self.data.get(side, 16)) for side in ("width", "height"))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'width="256" height="256" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


class BitmapSet:
    """Art of a package that carries one webp per codepoint."""

    def __init__(self, folder: Path) -> None:
        """List the package's assets."""
        self.files = {bare(path.stem): path for path in (folder / "assets").glob("*.webp")}

    def draw(self, codepoint: str, names: Iterable[str]) -> Image.Image | None:
        """Read one emoji, or None when the package lacks it."""
        path = self.files.get(codepoint)
        return Image.open(path).convert("RGBA") if path else None


def fit(image: Image.Image, side: int = 56) -> Image.Image:
    """Crop to the drawing, scale its longer side to `side` pixels and centre it on a 64×64 canvas."""
    drawing = image.crop(image.getbbox())
    scale = side / max(drawing.size)
    drawing = drawing.resize(tuple(max(1, round(s * scale)) for s in drawing.size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(drawing, tuple((SIZE - s) // 2 for s in drawing.size))
    return canvas


def sepia(image: Image.Image) -> Image.Image:
    """Brown monochrome of the luminance, as an old photograph."""
    rgba = np.asarray(image, np.float32) / 255
    light = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
    dark, pale = np.array([0.22, 0.12, 0.04]), np.array([1.0, 0.93, 0.76])
    toned = dark + light[..., None] * (pale - dark)
    return Image.fromarray((np.dstack([toned, rgba[..., 3]]) * 255).round().astype(np.uint8), "RGBA")


def sticker(image: Image.Image) -> Image.Image:
    """White die-cut border, three pixels wide, around the drawing."""
    border = image.getchannel("A").filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(0.5))
    paper = Image.new("RGBA", image.size, "white")
    paper.putalpha(border)
    return Image.alpha_composite(paper, image)


TREATMENTS = {"none": (56, lambda image: image), "sepia tone": (56, sepia), "white die-cut outline": (52, sticker)}


def png(image: Image.Image) -> bytes:
    """PNG bytes."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def hold_out(rows: list[dict[str, Any]], styles: list[str]) -> None:
    """Mark style × concept pairs that no training may see: at most one a concept, only where all styles exist."""
    count: dict[str, int] = {}
    for row in rows:
        count[row["name"]] = count.get(row["name"], 0) + 1
    taken: set[str] = set()
    for style in styles:
        own = [r for r in rows if r["style"] == style and count[r["name"]] == len(styles) and r["name"] not in taken]
        own.sort(key=lambda r: hashlib.sha256(f"{r['name']}|{style}".encode()).digest())
        for row in own[:HELD_OUT_PER_STYLE]:
            row["split"] = "held_out"
            taken.add(row["name"])


def build(cache: Path) -> list[dict[str, Any]]:
    """Render every concept in every style that draws it."""
    config = tomllib.loads((HERE / "sources.toml").read_text())
    labels = json.loads((fetch(config["names"], cache) / "en" / "data.json").read_text())
    codes = {entry["label"]: bare(entry["hexcode"]) for entry in labels}
    with (HERE / "concepts.csv").open() as file:
        concepts = list(csv.DictReader(file))
    rows = []
    for source in config["source"]:
        folder = fetch(source, cache)
        art = BitmapSet(folder) if (folder / "assets").exists() else IconSet(folder)
        side, treat = TREATMENTS[source["treatment"]]
        for concept in concepts:
            slug = concept["emoji"].lower().replace(" ", "-")
            drawing = art.draw(codes[concept["emoji"]], [slug, f"{slug}-face"])
            if drawing is None:
                continue
            row = {"name": concept["name"], "synonyms": [concept["synonym_1"], concept["synonym_2"]]}
            row |= {"category": concept["category"], "style": source["style"], "emoji": codes[concept["emoji"]]}
            row |= {"split": "train", "png": png(treat(fit(drawing, side)))}
            row |= {key: source[key] for key in ("package", "version", "licence", "attribution", "treatment")}
            rows.append(row)
    hold_out(rows, [source["style"] for source in config["source"]])
    return rows


def main() -> None:
    """Write the dataset and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache" / "npm")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = build(args.cache)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = args.out.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows), scratch, compression="zstd")
    scratch.replace(args.out)
    styles = {style: sum(r["style"] == style for r in rows) for style in dict.fromkeys(r["style"] for r in rows)}
    held = sum(r["split"] == "held_out" for r in rows)
    digest = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f"{len(rows)} images of {len({r['name'] for r in rows})} concepts {styles}, {held} held out")
    print(f"{args.out} {args.out.stat().st_size} bytes sha256 {digest}")


if __name__ == "__main__":
    main()
