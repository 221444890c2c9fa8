"""Makes the demo's larger picture-caption set, about twenty thousand pairs, from icon collections published on npm.

In: the npm packages of `COLLECTIONS`: SVG drawings with names, and where the collection has them tags, search terms or
categories. Out: `<out>/icons`, a `datasets.Dataset` written by `save_to_disk`, with a data card that states every
collection's licence. Nothing is split or encoded here; to split, keep a `group` on one side.

Columns as in `demo.data`'s sets: `id` ("collection/name"), `image`, `caption` (name in words, then up to six tags),
`group` (the concept: the name in words, shared by all collections), `category` (the collection).

    python -m demo.data icons [--out build/data] [--force]
"""

import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cairosvg.parser import Tree
from cairosvg.surface import PNGSurface
from datasets import Dataset
from PIL import Image as Pillow
from tqdm import tqdm

from demo.data import (
    CLOCK_FACES,
    DEFAULT_OUT,
    FEATURES,
    GENDER_SIGNS,
    GENDERED_PEOPLE,
    MAX_TAGS,
    _is_done,
    _key,
    _say,
    square_on_white,
)
from demo.packages import DEFAULT_CACHE, Package, fetch_npm, new_folder

RENDER_WIDTH = 256

# Last words of a name that only say how another drawing of the collection was altered: "calendar-off", "bell-outline".
ALTERED = set(
    "24px activity add alert arrow ban bluetooth bold bolt box broken cancel check circle clock code cog cogs crossed "
    "cursor dashed disabled dollar dot dots down edit exclamation fast fill filled flash flat flip heart horizontal "
    "key large left line lock marker medium minus mono multiple negative network off open outline outlined output "
    "pause pencil pin play plus question refresh remove reverse right round rounded search settings share shared sharp "
    "slash small solid square star stop swap sync text thick thin times to undo unlocked up user variant vertical wave "
    "x".split()
)
FRAMES = {"badge", "box", "circle", "diamond", "file", "folder", "hexagon", "octagon", "square"}  # as first words
# Names that begin with one of these are letters, digits, arrows or marks of text layout, not things.
ABSTRACT_STARTS = set(
    "abstract align alpha angle angles arrow arrows between border caret carets chevron chevrons code corner currency "
    "distribute fast-forward flip format gender grid hexagon-letter hexagon-number indent justify keyboard-arrow "
    "layout letter letters list math move number numbers numeric percentage relation resize rotate sort square-letter "
    "stretch subscript superscript switch-horizontal text transition-bottom variable vector view wifi-strength "
    "zodiac".split()
)
BRAND_WORDS = {"logo", "logos", "brand", "brands"}
# Words that tell two drawings of a concept apart, but name nothing.
DRAWING_WORDS = {"variant", "alt", "alternate", "alternative", "filled", "outline"}
VAGUE_TAGS = {"interface essential", "content", "design", "symbols", "objects"}  # categories that say nothing

EMOJI_LEFT_OUT_GROUPS = {None, 2, 8, 9}  # regional letters, components, symbols, flags


class Drawing(NamedTuple):
    """One icon as its collection has it."""

    name: str  # words joined by "-"
    label: str
    tags: tuple[str, ...]
    topics: tuple[str, ...]
    svg: bytes


class Icon(NamedTuple):
    """One picture, not yet drawn, and its caption."""

    id: str
    svg: bytes
    caption: str
    group: str
    category: str


class Collection(NamedTuple):
    """Where a collection comes from, under which licence, and how it is read."""

    name: str
    package: str
    licence: str
    credit: str
    read: Callable[[Package, Package], Iterable[Drawing]]
    left_out: frozenset[str] = frozenset()  # its categories of brands, letters, digits, arrows and marks of text layout


# --- names, captions and concepts -----------------------------------------------------------------


def to_words(name: str) -> str:
    """ "Address-Book_2" -> "address book 2"; "FoodDrinks" -> "food drinks"."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.findall(r"[^\W_]+(?:['’.][^\W_]+)*", name.casefold()))


def concept_of(label: str) -> str:
    """The concept a label names: its words without numbers at the end and words like "variant"."""
    words = to_words(label).split()
    kept = [word for word in words if word not in DRAWING_WORDS] or words
    while len(kept) > 1 and kept[-1].isdigit():
        kept.pop()
    return " ".join(kept)


def make_caption(concept: str, tags: Iterable[str]) -> str:
    """ "dog", ["pet", "dogs", "Pet", "guide_dog"] -> "dog, pet, guide dog": at most six tags that each add a word."""
    caption, said = [concept], _stems(concept)
    for tag in map(concept_of, tags):
        if len(caption) > MAX_TAGS:
            break
        stems = _stems(tag)
        if tag.isascii() and any(character.isalpha() for character in tag) and not (tag in VAGUE_TAGS or stems <= said):
            caption.append(tag)
            said |= stems
    return ", ".join(caption)


def _stems(words: str) -> set[str]:
    return {word.removesuffix("s") for word in words.split()}


def reason_to_leave_out(drawing: Drawing, names: set[str], topics: frozenset[str] = frozenset()) -> str | None:
    """Why a drawing says little, or None. `names` are all names of its collection, `topics` those it leaves out."""
    words = drawing.name.split("-")
    concept = concept_of(drawing.label).split()
    if topics & set(drawing.topics):
        return "in a category of brands, letters, digits, arrows or text layout"
    if BRAND_WORDS & {*words, *map(str.casefold, drawing.tags)}:
        return "brands"
    if any(drawing.name == start or drawing.name.startswith(f"{start}-") for start in ABSTRACT_STARTS):
        return "letters, digits, arrows and text layout, by name"
    if not any(len(word) > 1 and word.isalpha() for word in concept):
        return "letters, digits, arrows and text layout, by name"
    stem = words
    while len(stem) > 1 and (stem[-1] in ALTERED or stem[-1].isdigit()):
        stem = stem[:-1]
        if "-".join(stem) in names and not words[-1].isdigit():
            return "altered copies of another icon (off, plus, outline, ...)"
    if len(words) > 1 and words[0] in FRAMES and "-".join(words[1:]) in names:
        return "altered copies of another icon (off, plus, outline, ...)"
    return None


# --- collections ----------------------------------------------------------------------------------


def _read_json(package: Package, path: str):
    return json.loads((package.path / "package" / path).read_text("utf-8"))


def _iconify_svgs(package: Package) -> dict[str, bytes]:
    """The visible icons of an Iconify JSON package, as whole SVG files."""
    icons = _read_json(package, "icons.json")
    svgs = {}
    for name, icon in sorted(icons["icons"].items()):
        box = [icon.get(side, icons.get(side, default)) for side, default in (("left", 0), ("top", 0))]
        box += [icon.get(side, icons.get(side, 16)) for side in ("width", "height")]
        if not icon.get("hidden"):
            svgs[name] = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
            ).encode()
    return svgs


def read_iconify(package: Package, _emojibase: Package) -> Iterator[Drawing]:
    """Iconify JSON: names, and in some collections categories, which are the only tags."""
    topics: dict[str, list[str]] = {}
    for topic, names in _read_json(package, "metadata.json").get("categories", {}).items():
        for name in names:
            topics.setdefault(name, []).append(topic)
    for name, svg in _iconify_svgs(package).items():
        own = tuple(topics.get(name, ()))
        yield Drawing(name, name, own, own, svg)


def read_emoji(package: Package, emojibase: Package) -> Iterator[Drawing]:
    """Iconify JSON of emoji, with emojibase's labels and tags: one drawing an emoji, no skin tones and no genders."""
    svgs, characters = _iconify_svgs(package), _read_json(package, "chars.json")
    by_codes = {_key(codes.split("-")): name for codes, name in characters.items()}
    for entry in _read_json(emojibase, "en/data.json"):
        key = _key(entry["hexcode"].lower().split("-"))
        codes = set(key)
        if entry.get("group") in EMOJI_LEFT_OUT_GROUPS or codes & CLOCK_FACES or codes & GENDER_SIGNS:
            continue
        if "200d" in codes and codes & GENDERED_PEOPLE:
            continue
        if by_codes.get(key) in svgs:
            label = to_words(entry["label"])
            yield Drawing(by_codes[key], label, tuple(entry.get("tags", ())), (), svgs[by_codes[key]])


def read_mdi(package: Package, _emojibase: Package) -> Iterator[Drawing]:
    """Material Design Icons: aliases, then categories such as "Food / Drink"."""
    for icon in _read_json(package, "meta.json"):
        if not icon["deprecated"]:
            tags = (*icon["aliases"], *(part for topic in icon["tags"] for part in re.split(r" [/+] ", topic)))
            svg = package.path / "package" / "svg" / f"{icon['name']}.svg"
            yield Drawing(icon["name"], icon["name"], tags, tuple(icon["tags"]), svg.read_bytes())


def read_tabler(package: Package, _emojibase: Package) -> Iterator[Drawing]:
    """Tabler: tags and a category; the filled drawing where there is one."""
    for name, icon in sorted(_read_json(package, "icons.json").items()):
        style = "filled" if "filled" in icon["styles"] else "outline"
        svg = package.path / "package" / "icons" / style / f"{name}.svg"
        yield Drawing(name, name, tuple(map(str, icon["tags"])), (icon["category"],), svg.read_bytes())


def read_lucide(package: Package, _emojibase: Package) -> Iterator[Drawing]:
    """Lucide: tags."""
    for name, tags in sorted(_read_json(package, "tags.json").items()):
        svg = package.path / "package" / "icons" / f"{name}.svg"
        yield Drawing(name, name, tuple(tags), (), svg.read_bytes())


def read_phosphor(package: Package, _emojibase: Package) -> Iterator[Drawing]:
    """Phosphor, filled: tags and categories, from the package's type declarations (its only plain list of them)."""
    declared = (package.path / "package" / "dist" / "icons.d.ts").read_text("utf-8")
    pattern = (
        r'readonly name: "([^"]+)";.*?readonly categories: readonly \[(.*?)\];.*?readonly tags: readonly \[(.*?)\];'
    )
    for name, topics, tags in re.findall(pattern, declared, re.DOTALL):
        svg = package.path / "package" / "assets" / "fill" / f"{name}-fill.svg"
        words = [tag for tag in json.loads(f"[{tags}]") if not tag.startswith("*")]  # "*new*" is news, not a tag
        yield Drawing(name, name, tuple(words), tuple(re.findall(r"IconCategory\.(\w+)", topics)), svg.read_bytes())


def read_fontawesome(package: Package, _emojibase: Package) -> Iterator[Drawing]:
    """Font Awesome Free, solid: labels and search terms."""
    for name, icon in sorted(_read_json(package, "metadata/icon-families.json").items()):
        if any(style["style"] == "solid" for style in icon["familyStylesByLicense"]["free"]):
            svg = package.path / "package" / "svgs" / "solid" / f"{name}.svg"
            yield Drawing(name, icon["label"], tuple(map(str, icon["search"]["terms"])), (), svg.read_bytes())


def read_carbon(package: Package, _emojibase: Package) -> Iterator[Drawing]:
    """Carbon's pictograms: friendly names, aliases and a category."""
    for icon in _read_json(package, "metadata.json")["icons"]:
        name = re.sub(r"-+", "-", icon["name"])
        label = icon.get("friendlyName") or name
        tags = (*map(str, icon.get("aliases") or ()), icon.get("category") or "")
        yield Drawing(name, label, tags, (icon.get("category") or "",), icon["assets"][0]["source"].encode())


STREAMLINE_LEFT_OUT = frozenset({"ArrowsDiagrams", "Logos"})
CARBON_LEFT_OUT = frozenset({"IBM", "Red Hat", "Systems", "Third-party logos", "watsonx"})
TABLER_LEFT_OUT = frozenset(
    ("Arrows", "Brand", "Currencies", "Extensions", "Gender", "Letters", "Logic", "Math", "Numbers", "Text", "Zodiac")
)
MDI_LEFT_OUT = frozenset(
    ("Alpha / Numeric", "Arrange", "Arrow", "Brand / Logo", "Form", "Math", "Text / Content / Format", "Vector")
)

COLLECTIONS = (
    Collection("fluent-emoji", "@iconify-json/fluent-emoji-flat", "MIT", "Microsoft Corporation", read_emoji),
    Collection("noto", "@iconify-json/noto", "Apache-2.0", "Google Inc", read_emoji),
    Collection("twemoji", "@iconify-json/twemoji", "CC-BY-4.0", "Twitter, Inc and other contributors", read_emoji),
    Collection("game-icons", "@iconify-json/game-icons", "CC-BY-3.0", "game-icons contributors", read_iconify),
    Collection(
        *("healthicons", "@iconify-json/healthicons", "MIT", "Resolve to Save Lives", read_iconify),
        frozenset({"Shapes", "Typography"}),
    ),
    Collection("flat-color-icons", "@iconify-json/flat-color-icons", "MIT", "Icons8", read_iconify),
    Collection(
        *("streamline-color", "@iconify-json/streamline-ultimate-color", "CC-BY-4.0", "Streamline", read_iconify),
        STREAMLINE_LEFT_OUT,
    ),
    Collection(
        *("streamline-freehand", "@iconify-json/streamline-freehand-color", "CC-BY-4.0", "Streamline", read_iconify),
        STREAMLINE_LEFT_OUT,
    ),
    Collection("carbon", "@carbon/pictograms", "Apache-2.0", "IBM Corp.", read_carbon, CARBON_LEFT_OUT),
    Collection("fontawesome", "@fortawesome/fontawesome-free", "CC-BY-4.0", "Fonticons, Inc.", read_fontawesome),
    Collection(
        *("phosphor", "@phosphor-icons/core", "MIT", "Phosphor Icons", read_phosphor),
        frozenset({"ARROWS", "BRAND", "EDITOR"}),
    ),
    Collection("lucide", "lucide-static", "ISC, in part MIT", "Lucide Icons and Contributors; Cole Bemis", read_lucide),
    Collection("tabler", "@tabler/icons", "MIT", "Paweł Kuna", read_tabler, TABLER_LEFT_OUT),
    Collection("mdi", "@mdi/svg", "Apache-2.0", "Pictogrammers", read_mdi, MDI_LEFT_OUT),
)


def list_icons(collection: Collection, package: Package, emojibase: Package) -> tuple[list[Icon], Counter]:
    """The icons of a collection that show something, by name, and why others are left out."""
    drawings = sorted(collection.read(package, emojibase), key=lambda drawing: drawing.name)
    names = {drawing.name for drawing in drawings}
    icons, left_out, seen = [], Counter(), set()
    for drawing in drawings:
        digest = hashlib.sha256(drawing.svg).digest()
        if reason := reason_to_leave_out(drawing, names, collection.left_out):
            left_out[reason] += 1
        elif digest in seen:
            left_out["the same drawing as an earlier one of the collection"] += 1
        else:
            seen.add(digest)
            group = concept_of(drawing.label)
            caption = make_caption(group, drawing.tags)
            icons.append(Icon(f"{collection.name}/{drawing.name}", drawing.svg, caption, group, collection.name))
    return icons, left_out


# --- drawing and writing --------------------------------------------------------------------------


def draw(svg: bytes) -> Pillow.Image:
    """The drawing, 256 pixels wide, with its transparency. Files and addresses that it names are not loaded.

    Takes the pixels from CairoSVG's surface: writing them as PNG and reading that again would double the time.
    """
    surface = PNGSurface(Tree(bytestring=svg), None, 96, output_width=RENDER_WIDTH).cairo
    size = (surface.get_width(), surface.get_height())
    # cairo keeps premultiplied BGRA ("BGRa" in Pillow's names), on little-endian machines
    raw = "BGRa" if sys.byteorder == "little" else "ARGB"
    return Pillow.frombuffer("RGBA", size, bytes(surface.get_data()), "raw", raw, surface.get_stride(), 1)


def make_icons(
    out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False, limit: int | None = None
) -> Path:
    """Writes `<out>/icons` and returns it. Needs npm unless the packages are in the cache already.

    With a limit, at most so many icons of each collection, evenly spaced, go to `<out>/icons-<limit>`.
    """
    target = Path(out) / ("icons" if limit is None else f"icons-{limit}")
    if _is_done(target, force):
        return target
    emojibase = fetch_npm("emojibase-data", cache)
    packages = [fetch_npm(collection.package, cache) for collection in COLLECTIONS]
    icons, left_out = [], Counter()
    for collection, package in zip(COLLECTIONS, packages, strict=True):
        found, reasons = list_icons(collection, package, emojibase)
        if not found:
            raise RuntimeError(f"{package}: no icon could be listed; the package may have changed")
        icons += found if limit is None else found[:: -(-len(found) // limit)]
        left_out += reasons
    return _write(target, icons, left_out, packages, emojibase)


def _write(target: Path, icons: list[Icon], left_out: Counter, packages: list[Package], emojibase: Package) -> Path:
    """Draws the icons, writes dataset and card to `target`; a drawing that fails is reported and left out."""
    rows, failed = [], 0
    for icon in tqdm(icons, desc=target.name, unit="icon", mininterval=1.0):
        try:
            picture = io.BytesIO()
            square_on_white(draw(icon.svg)).save(picture, format="PNG", compress_level=3)
        except Exception as error:  # cairosvg raises whatever its parsers do; one bad drawing is not the end
            failed += 1
            tqdm.write(f"[data] skipped {icon.id}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        image = {"bytes": picture.getvalue(), "path": None}
        rows.append(icon._asdict() | {"image": image})
    if not rows:
        raise RuntimeError(f"{target.name}: none of {len(icons)} drawings could be drawn; is cairo installed?")
    rows = [{column: row[column] for column in FEATURES} for row in rows]
    dataset = Dataset.from_list(rows, features=FEATURES)

    counts = Counter(row["category"] for row in rows)
    left_out = left_out + Counter({"could not be drawn": failed})
    groups = {row["group"] for row in rows}
    facts = {
        "items": len(rows),
        "groups": len(groups),
        "max_tags": MAX_TAGS,
        "emojibase": emojibase,
        "left_out": "\n".join(f"- {reason}: {count}" for reason, count in sorted(left_out.items()) if count),
        "table": "\n".join(
            f"| {name} | {package} | {licence} | {credit} | {counts[name]} |"
            for (name, _, licence, credit, *_), package in zip(COLLECTIONS, packages, strict=True)
        ),
    }
    with new_folder(target) as work:
        dataset.save_to_disk(work)
        (work / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    _say(f"{target}: {len(rows)} items, {len(groups)} groups, {failed} could not be drawn")
    return target


CARD = """\
---
license: other
language: en
pretty_name: Icons with names and tags
---
# Icons with names and tags

{items} drawings with English captions, {groups} concepts (`group`): emoji in colour, pictograms, and one-colour icons.
A caption is the icon's name in words, then up to {max_tags} of its tags, aliases or search terms.

| `category` | package | licence | by | items |
|---|---|---|---|---|
{table}

- **Names and tags of the emoji**: package {emojibase}, MIT. All others are the collection's own.
- **Licence**: each picture keeps its collection's licence (table; as the packages state it). Whoever passes pictures
  on names the collection and its makers, and says that they were changed.
- **What was changed**: drawn with CairoSVG, 256 pixels wide, one-colour icons black; transparent border cut off, on
  white, centred in a square 1.14 times the longer side. One drawing an icon: filled or in colour where there is one.
- **Columns**: `id` (collection/name), `image`, `caption`, `group` (the name in words, without a number at its end),
  `category` (collection).
- **Use**: many concepts were drawn by several collections. Split by `group`, never by row. Groups are names, not
  meanings: "dog" and "dog face" are two.
- **Made by**: `python -m demo.data icons`.

Left out:
{left_out}
"""
