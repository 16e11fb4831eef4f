"""Build emoji world: npm packages of open emoji art → one parquet file of 64×64 RGBA renders.

python -m training.build_dataset [--cache DIR] [--extra N]

Every tarball is checked against npm's sha512 and every licence against `sources.toml`; the same bytes come out each
time.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image, ImageFilter
from scipy.ndimage import distance_transform_edt, gaussian_filter, maximum_filter, minimum_filter, sobel

HERE = Path(__file__).parent
OUT = HERE.parent / "src" / "expunge" / "embedded" / "emoji-world.parquet"
EXTRA = HERE / ".cache" / "extra.parquet"
LICENCES = {"Apache-2.0", "MIT", "CC-BY-4.0"}
SIZE = 64
SMOOTH = 256  # side at which lines and relief are drawn
HELD_OUT_PER_STYLE = 6
THINGS = {3, 4, 5, 6, 7}  # emojibase's groups of animals, food, places, activities, objects


@dataclass(frozen=True)
class Concept:
    """What to draw: our name for it, and how emoji sets find it."""

    name: str
    code: str
    label: str
    category: str
    synonyms: tuple[str, str]


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


def open_art(folder: Path) -> IconSet | BitmapSet:
    """Read a package's art by the form it comes in."""
    return BitmapSet(folder) if (folder / "assets").exists() else IconSet(folder)


Hand = tuple[dict[str, Any], IconSet | BitmapSet]


def fit(image: Image.Image, side: int = 56) -> Image.Image:
    """Crop to the drawing, scale its longer side to `side` pixels and centre it on a 64×64 canvas."""
    drawing = image.crop(image.getbbox())
    scale = side / max(drawing.size)
    drawing = drawing.resize(tuple(max(1, round(s * scale)) for s in drawing.size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(drawing, tuple((SIZE - s) // 2 for s in drawing.size))
    return canvas


def padded(image: Image.Image) -> Image.Image:
    """Crop to the drawing and centre it on a square with room for a stroke around it."""
    drawing = image.crop(image.getbbox())
    side = round(max(drawing.size) * 1.1)
    square = Image.new("RGBA", (side, side))
    square.paste(drawing, tuple((side - s) // 2 for s in drawing.size))
    return square


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


def line_art(image: Image.Image) -> Image.Image:
    """Black pen strokes where the art is dark or changes abruptly; nothing in between."""
    image = image.resize((SMOOTH, SMOOTH), Image.Resampling.LANCZOS)
    rgba = np.asarray(image, np.float32) / 255
    # transparent counts as white, so that the outline is a change too
    flat = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]
    soft = gaussian_filter(flat, (1.5, 1.5, 0))
    slope = np.hypot(sobel(soft, 0), sobel(soft, 1)).max(-1)
    light = soft @ np.array([0.299, 0.587, 0.114], np.float32)
    stroke = np.clip((maximum_filter(slope, 7) - 0.35) / 0.4, 0, 1)
    outline = maximum_filter(rgba[..., 3], 5) - minimum_filter(rgba[..., 3], 7)
    pen = np.maximum.reduce([stroke * 0.999, outline, np.clip((0.36 - light) / 0.1, 0, 1)])
    black = np.dstack([np.full((SMOOTH, SMOOTH, 3), 0.09), gaussian_filter(pen, 1)])
    return Image.fromarray((black * 255).round().astype(np.uint8), "RGBA")


def relief(image: Image.Image) -> Image.Image:
    """Light from the upper left on a rounded body: shaded rim, soft highlight, stronger colour."""
    image = image.resize((SMOOTH, SMOOTH), Image.Resampling.LANCZOS)
    rgba = np.asarray(image, np.float32) / 255
    inside = rgba[..., 3] > 0.5
    light = gaussian_filter(rgba[..., :3] * rgba[..., 3:], (3, 3, 0)).mean(-1)
    height = np.sqrt(1 - (1 - np.clip(distance_transform_edt(inside) / 42, 0, 1)) ** 2) * 34 + light * 14
    height = gaussian_filter(height, 3)
    normal = np.dstack([-np.gradient(height, axis=1), -np.gradient(height, axis=0), np.ones_like(height)])
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    sun = np.array([-0.45, -0.6, 0.66])
    diffuse = np.clip(normal @ sun, 0, 1)[..., None]
    halfway = sun + np.array([0, 0, 1])  # between light and eye
    shine = np.clip(normal @ halfway / np.linalg.norm(halfway), 0, 1)[..., None] ** 24
    colour = rgba[..., :3] * (0.45 + 0.75 * diffuse) + 0.3 * shine
    return Image.fromarray((np.dstack([np.clip(colour, 0, 1), rgba[..., 3]]) * 255).round().astype(np.uint8), "RGBA")


TREATMENTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda art: fit(art),
    "sepia tone": lambda art: sepia(fit(art)),
    "white die-cut outline": lambda art: sticker(fit(art, 52)),
    "line art": lambda art: fit(line_art(padded(art))),
    "relief shading": lambda art: fit(relief(padded(art))),
}


def png(image: Image.Image) -> bytes:
    """PNG bytes."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def hold_out(rows: list[dict[str, Any]], styles: list[str]) -> None:
    """Mark style × concept pairs that no generator may see: at most one a concept, only where every hand drew it."""
    hands: dict[str, set[str]] = {}
    for row in rows:
        hands.setdefault(row["name"], set()).add(row["package"])
    most = max(map(len, hands.values()))
    taken: set[str] = set()
    for style in styles:
        free = [name for name, drew in hands.items() if len(drew) == most and name not in taken]
        free.sort(key=lambda name: hashlib.sha256(f"{name}|{style}".encode()).digest())
        chosen = set(free[:HELD_OUT_PER_STYLE])
        taken |= chosen
        for row in rows:
            if row["style"] == style and row["name"] in chosen:
                row["split"] = "held_out"


def ours(labels: list[dict[str, Any]]) -> list[Concept]:
    """Concepts of emoji world, from concepts.csv."""
    codes = {entry["label"]: bare(entry["hexcode"]) for entry in labels}
    with (HERE / "concepts.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        Concept(row["name"], codes[row["emoji"]], row["emoji"], row["category"], (row["synonym_1"], row["synonym_2"]))
        for row in rows
    ]


def others(labels: list[dict[str, Any]], hands: list[Hand], count: int) -> list[Concept]:
    """Things outside emoji world that every hand drew, in an order of hashes: more to learn styles from."""
    known = {concept.code for concept in ours(labels)}
    found = []
    for entry in labels:
        label, code = entry["label"].lower(), bare(entry["hexcode"])
        if entry.get("group") in THINGS and code not in known and re.fullmatch(r"[a-z]+( [a-z]+){0,2}", label):
            found.append(Concept(label, code, entry["label"], "other", (label, label)))
    found.sort(key=lambda concept: hashlib.sha256(concept.name.encode()).digest())
    whole = (c for c in found if all(drawing(art, c) is not None for _, art in hands))
    return list(islice(whole, count))


def drawing(art: IconSet | BitmapSet, concept: Concept) -> Image.Image | None:
    """One hand's picture of a concept, or None."""
    slug = concept.label.lower().replace(" ", "-")
    return art.draw(concept.code, [slug, f"{slug}-face"])


def build(cache: Path, extra: int = 0) -> list[dict[str, Any]]:
    """Render emoji world, or `extra` other things, in every style by every hand that draws them."""
    config = tomllib.loads((HERE / "sources.toml").read_text())
    labels = json.loads((fetch(config["names"], cache) / "en" / "data.json").read_text())
    hands = [(source, open_art(fetch(source, cache))) for source in config["source"]]
    concepts = others(labels, hands, extra) if extra else ours(labels)
    rows = []
    for style, (source, art) in product(config["order"], hands):
        treatment = source["styles"].get(style)
        for concept in concepts if treatment else ():
            picture = drawing(art, concept)
            if picture is None:
                continue
            row = {"name": concept.name, "synonyms": list(concept.synonyms), "category": concept.category}
            row |= {"style": style, "emoji": concept.code, "split": "train"}
            row |= {"png": png(TREATMENTS[treatment](picture)), "treatment": treatment}
            row |= {key: source[key] for key in ("package", "version", "licence", "attribution")}
            rows.append(row)
    if not extra:
        hold_out(rows, config["order"])
    return rows


def main() -> None:
    """Write the dataset and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=HERE / ".cache" / "npm")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--extra", type=int, default=0, help="draw so many other things instead, for training only")
    args = parser.parse_args()
    args.out = args.out or (EXTRA if args.extra else OUT)
    rows = build(args.cache, args.extra)
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
