"""The Space: search pictures with words, words with a picture, and both with a sound where the model knows sounds.

    python model_cards/space/app.py --model build/hub/altmoe-stamps --store image=build/stores/stamps/image \
        --store text=build/stores/stamps/text --data build/data/stamps
"""

import argparse
import os
import tempfile
import traceback
from html import escape
from pathlib import Path

import gradio as gr
import rendering
from engine import MAX_BYTES, MAX_CHARACTERS, Engine
from settings import HERE, settings

TABS = {"text": "Words", "image": "Picture", "audio": "Sound"}
WAYS = {"text": "words", "image": "a picture", "audio": "a sound"}
NOUNS = {"image": "pictures", "text": "captions", "audio": "sounds"}


def heading(engine: Engine, title: str) -> str:
    """Title, one sentence, and what is searched."""
    sizes = engine.sizes()
    ways = " or ".join(dict.fromkeys(WAYS[kind] for kind in engine.kinds().values()))
    facts = "".join(
        f'<span class="chip"><b>{count:,}</b> {escape(NOUNS.get(modality, modality))}</span>'
        for modality, count in sizes.items()
    )
    name = escape(os.path.basename(engine.name.rstrip("/")) if os.path.isdir(engine.name) else engine.name)
    return (
        f"<h1>{escape(title)}</h1><p>Ask with {escape(ways)}. Frozen encoders, joined by a small mixture-of-experts "
        f'connector, find what matches.</p><div class="facts"><span class="chip">model <b>{name}</b></span>{facts}</div>'
    )


def example_files(engine: Engine, folder: Path) -> list[str]:
    """Pictures of the data set as files that the page can offer."""
    names = []
    for number, (_, picture) in enumerate(engine.examples()):
        if picture is not None:
            names.append(str(folder / f"example-{number}.png"))
            picture.convert("RGB").save(names[-1])
    return names


def build(engine: Engine, options: argparse.Namespace, folder: Path) -> gr.Blocks:
    """The page.

    Args:
        engine: what answers.
        options: see [`settings`].
        folder: where example pictures may be written.
    """

    def ask(modality: str):
        def run(query: str, target: str):
            try:
                answer = engine.search(modality, query, target, options.results)
            except ValueError as error:
                return rendering.error(str(error)), ""
            except Exception:  # the visitor gets a sentence, the log the whole story
                traceback.print_exc()
                return rendering.error("Something went wrong here. Try another query."), ""
            as_pictures = target not in engine.processor.processors or engine.processor.kind(target) != "text"
            return rendering.results(answer, as_pictures), rendering.gates(answer)

        return run

    captions = [
        [text] for text in options.examples or dict.fromkeys(c for c, _ in engine.examples() if 0 < len(c) < 60)
    ]
    files = [[name] for name in example_files(engine, folder)]
    with gr.Blocks(title=options.title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(heading(engine, options.title), elem_id="title")
        inputs = []
        with gr.Tabs():
            for modality, kind in engine.kinds().items():
                label = TABS[kind] if modality == kind else modality.capitalize()
                with gr.Tab(label, id=modality):
                    inputs.append((modality, *tab(engine, modality, kind, {"text": captions, "image": files})))
        answer = gr.HTML(rendering.EMPTY, elem_id="answer", min_height=120)
        router = gr.HTML("", elem_id="router")
        for modality, query, target, events, offered in inputs:
            shared = {"show_progress": "minimal", "concurrency_id": "search", "api_visibility": "private"}
            gr.on(events, ask(modality), [query, target], [answer, router], **shared)
            if offered is not None:  # an example is put in place and asked at once
                offered.load_input_event.then(ask(modality), [query, target], [answer, router], **shared)
            if hasattr(query, "clear"):
                query.clear(lambda: (rendering.EMPTY, ""), None, [answer, router], api_visibility="private")
    return page


def tab(engine: Engine, modality: str, kind: str, examples: dict) -> tuple:
    """One kind of query: its input, the choice of a target, the events that ask, and examples."""
    offered, targets = None, engine.targets(modality)
    if kind == "text":
        with gr.Row(equal_height=True):
            query = gr.Textbox(
                placeholder="What are you looking for?",
                max_length=MAX_CHARACTERS,
                show_label=False,
                container=False,
                scale=5,
                elem_id=f"query-{modality}",
                autofocus=True,
            )
            button = gr.Button("Search", variant="primary", scale=1, min_width=110, elem_id=f"search-{modality}")
        events = [query.submit, button.click]
    elif kind == "image":
        query = gr.Image(
            sources=["upload", "clipboard"], type="filepath", height=240, show_label=False, elem_id=f"query-{modality}"
        )
        # the engine alone reads the file, within its limits and with a clear message if it is no picture
        query.preprocess = lambda payload: payload.path if payload is not None else None
        events = [query.upload]
    else:
        query = gr.Audio(
            sources=["upload", "microphone"], type="filepath", show_label=False, elem_id=f"query-{modality}"
        )
        events = [query.upload, query.stop_recording]
    target = gr.Radio(
        targets, value=targets[0], label="Search in", visible=len(targets) > 1, elem_id=f"target-{modality}"
    )
    if len(targets) > 1:
        events.append(target.input)
    if examples.get(kind):
        offered = gr.Examples(examples[kind], query, cache_examples=False, label="Try one", api_visibility="private")
    return query, target, events, offered


def main(arguments: list[str] | None = None) -> None:
    """Load everything, then serve."""
    options = settings(arguments)
    try:
        engine = Engine(options.model, options.stores, options.data)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        page = build(engine, options, Path(folder))
        page.queue(max_size=32, default_concurrency_limit=1).launch(
            server_port=options.port,
            max_file_size=MAX_BYTES,
            css_paths=[HERE / "style.css"],
            theme=gr.themes.Soft(
                primary_hue="indigo",
                neutral_hue="slate",
                font=["ui-sans-serif", "system-ui", "sans-serif"],
                font_mono=["ui-monospace", "monospace"],
            ).set(
                body_text_color_subdued="*neutral_500",
                body_text_color_subdued_dark="*neutral_400",
                button_primary_background_fill="*primary_600",
                button_primary_background_fill_hover="*primary_700",
            ),
            footer_links=["gradio"],
            share=False,
            ssr_mode=False,
            allowed_paths=[folder],
        )


if __name__ == "__main__":
    main()
