"""Search results as one HTML file: queries, and the hits of each with scores, captions and pictures.

Comes in: results of `altmoe search`. Goes out: a page that needs nothing beside it: small pictures travel inside, no script
runs and nothing is loaded. Everything that comes from data or users is escaped.
"""

import base64
import io
from collections.abc import Callable
from html import escape
from pathlib import Path

from datasets import Image as ImageFeature
from PIL import Image

from modeling_altmoe.processing_altmoe import ItemError, read_image
from trainer.items import open_data

THUMBNAIL = 200  # pixels
PICTURES = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; background: #fff }
h1 { font-size: 1.2rem } section { border-top: 1px solid #ddd; padding: .5rem 0 1.5rem }
h2 { font-size: 1rem; display: flex; gap: .8rem; align-items: center } h2 img { max-height: 5rem; border: 1px solid #ddd }
.sure { color: #17692f } .unsure { color: #9a3b00 } .about { color: #666; font-size: .85rem }
ol { list-style: none; padding: 0; display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .8rem }
li { border: 1px solid #ddd; border-radius: 6px; padding: .6rem; overflow-wrap: anywhere }
li.match { border-color: #17692f; box-shadow: 0 0 0 1px #17692f } li img { display: block; margin: 0 auto .4rem; max-width: 100% }
"""


def _thumbnail(item) -> Image.Image | None:
    """A small picture of a file name or a picture; None for what is none."""
    try:
        picture = read_image(item)
    except (ItemError, OSError):
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def pictures_of(data: str | None, store: Path) -> Callable[[str, dict], Image.Image | None]:
    """What finds the picture of a hit, by its id and columns.

    Args:
        data: folder, file or Hub name of a data set with a column `id` that matches the store's, and one of pictures; None:
            a column of the store that names picture files (as they are, or beside the store).
        store: the store's folder.

    Raises:
        ValueError: the data set has no such columns.
        FileNotFoundError: there is no such data set.
    """
    if data is None:

        def by_name(_: str, columns: dict) -> Image.Image | None:
            names = [v for v in columns.values() if isinstance(v, str) and v.lower().endswith(PICTURES)]
            found = [place for name in names for place in (Path(name), store / name) if place.is_file()]
            return _thumbnail(str(found[0])) if found else None

        return by_name
    opened = open_data(data)
    column = next((name for name, kind in opened.features.items() if isinstance(kind, ImageFeature)), None)
    if column is None or "id" not in opened.features:
        raise ValueError(
            f"'{data}' needs a column 'id' and one of pictures, it has {', '.join(opened.features)}: nothing can be shown."
        )
    rows = {str(name): row for row, name in enumerate(opened["id"])}
    return lambda name, _: _thumbnail(opened[rows[name]][column]) if name in rows else None


def _image(picture: Image.Image | None, alt: str) -> str:
    if picture is None:
        return ""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/jpeg;base64,{content}" />'


def _hit(place: int, hit, match: bool, picture: Image.Image | None) -> str:
    caption = str(hit.columns.get("caption") or hit.id)
    about = {"id": hit.id, **{name: value for name, value in hit.columns.items() if name != "caption"}}
    told = "; ".join(f"{name}: {value}" for name, value in about.items() if value is not None)
    match = ' class="match"' if match else ""
    return (
        f"<li{match}>{_image(picture, caption)}<b>{place}. {escape(caption)}</b><br />"
        f'score {hit.score:.3f}<div class="about">{escape(told)}</div></li>'
    )


def _verdict(confidence: float | None, threshold: float | None, found: bool) -> str:
    if confidence is None:
        return ""
    if found:
        return f'<span class="sure">the first is a match with {confidence:.0%} confidence</span>'
    return f'<span class="unsure">nothing found: {confidence:.0%} confidence, {threshold:.0%} asked for; the nearest:</span>'


def contact_sheet(title: str, results: list[dict], picture_of: Callable) -> str:
    """The page.

    Args:
        title: what was searched.
        results: `[{"query", "kind", "direction", "hits", "confidence", "found"}, ...]`; a query of kind `"image"` is a file.
        picture_of: see `pictures_of`.
    """
    sections = []
    for result in results:
        hits, query = result["hits"], str(result["query"])
        asked = _image(_thumbnail(query), query) if result["kind"] == "image" else ""
        items = "".join(
            _hit(place, hit, hits.found and place == 1 and hits.confidence is not None, picture_of(hit.id, hit.columns))
            for place, hit in enumerate(hits, 1)
        )
        sections.append(
            f"<section><h2>{asked}<span>{escape(query)}</span></h2>"
            f'<p class="about">{escape(result["direction"])} {_verdict(hits.confidence, hits.threshold, hits.found)}</p>'
            f"{f'<ol>{items}</ol>' if items else '<p>No item meets the conditions.</p>'}</section>"
        )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )
