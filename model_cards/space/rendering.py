"""Answers as HTML. Everything that comes from data or users is escaped; pictures travel inside the page."""

import base64
import io
from html import escape

from engine import Answer, Found
from PIL import Image

EMPTY = '<div class="note empty"><b>Nothing asked yet.</b> Type a few words, give a picture, or click an example.</div>'


def error(message: str) -> str:
    """A message for the user."""
    return f'<div class="note error" role="alert"><b>That did not work.</b> {escape(message)}</div>'


def inline(picture: Image.Image) -> str:
    """A picture as a `data:` URL."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def status(answer: Answer) -> str:
    """How sure the model is, and how long each stage took."""
    if answer.confidence is None:
        verdict = '<span class="verdict">The nearest, best first. This model is not calibrated.</span>'
    elif answer.sure:
        verdict = f'<span class="verdict sure"><b>{answer.confidence:.0%}</b> sure that the first is a match</span>'
    else:
        verdict = (
            f'<span class="verdict unsure"><b>Nothing found.</b> Only {answer.confidence:.0%} sure of the first, '
            f"{answer.threshold:.0%} is asked for. These are the nearest:</span>"
        )
    times = "".join(
        f'<span class="chip">{escape(name)} <b>{value:.1f} ms</b></span>' for name, value in answer.milliseconds.items()
    )
    return f'<div class="status">{verdict}<span class="times">{times}</span></div>'


def card(place: int, item: Found, first_is_match: bool) -> str:
    """One result with its picture."""
    best = " best" if place == 1 and first_is_match else ""
    return (
        f'<figure class="card{best}"><img alt="{escape(item.caption, quote=True)}" src="{inline(item.picture)}">'
        f'<figcaption><span class="caption">{escape(item.caption)}</span>'
        f'<span class="score" title="larger is better">{place}. &nbsp;score {item.score:.2f}</span></figcaption></figure>'
    )


def line(place: int, item: Found, first_is_match: bool) -> str:
    """One result as words, with a small picture that the words belong to, if there is one."""
    best = " best" if place == 1 and first_is_match else ""
    small = (
        f'<img alt="" title="the picture these words were written for" src="{inline(item.picture)}">'
        if item.picture is not None
        else ""
    )
    return (
        f'<li class="line{best}"><span class="score">{place}.</span>{small}<span class="caption">{escape(item.caption)}</span>'
        f'<span class="score" title="larger is better">score {item.score:.2f}</span></li>'
    )


def results(answer: Answer, as_pictures: bool) -> str:
    """All results: a gallery of pictures, or a list of words."""
    numbered = list(enumerate(answer.found, 1))
    if as_pictures and all(item.picture is not None for item in answer.found):
        shown = "".join(card(place, item, answer.sure) for place, item in numbered)
        body = f'<div class="found">{shown}</div>'
    else:
        body = f'<ol class="lines">{"".join(line(place, item, answer.sure) for place, item in numbered)}</ol>'
    return f'<section class="answer" data-direction="{escape(answer.direction)}">{status(answer)}{body}</section>'


def gates(answer: Answer) -> str:
    """Bar plots: the weight of every expert, one plot a gate."""
    plots, highest = [], max(max(weights) for weights in answer.gates.values())
    for gate, weights in answer.gates.items():
        chosen = "; ".join(f"expert {number}: {weight:.0%}" for number, weight in enumerate(weights, 1) if weight)
        bars = "".join(
            f'<span class="bar{" on" if weight else ""}" title="expert {number}: {weight:.1%}">'
            f"<b>{f'{weight:.0%}' if weight else ''}</b>"
            f'<i style="height:{70 * weight / highest:.1f}%"></i><em>{number}</em></span>'
            for number, weight in enumerate(weights, 1)
        )
        plots.append(
            f'<figure class="gate"><figcaption>{escape(gate)}</figcaption>'
            f'<div class="bars" role="img" aria-label="{escape(f"{gate}: {chosen}")}">{bars}</div></figure>'
        )
    first = next(iter(answer.gates.values()))
    used = sum(1 for weight in first if weight)
    note = (
        f"{escape(answer.direction.replace('->', ' → '))}: each gate chose {used} of {len(first)} experts; their weights "
        f"sum to one. The experts' correction of the closed form is trusted to {answer.trust:.0%}, as chosen on validation."
    )
    return f'<section class="router"><h3>Which experts fired</h3><div class="gates">{"".join(plots)}</div><p>{note}</p></section>'
