"""The Space: the folder that is written for the Hub, and its page in a real headless Chromium."""

import base64
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_bert, tiny_processors, tiny_vit
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from huggingface_hub import SpaceCard
from PIL import Image
from test_endpoint import tiny_wav2vec2, wav
from transformers import Wav2Vec2FeatureExtractor

from modeling_altmoe import AltMoEModel, AltMoEProcessor, LatentStore
from modeling_altmoe.confidence_altmoe import Calibration
from modeling_altmoe.scoring_altmoe import Postprocessing
from modeling_altmoe.search_altmoe import LatentIndex
from trainer.space import SPACE, write_space

COLORS = "red green blue orange purple black cyan gray".split()
CAPTIONS = [f"a {color} square" for color in COLORS[:-1]] + ["<b>a gray</b> & <script>square</script>"]
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A model of three modalities, stores of coloured pictures and their captions, and the data set."""
    root = tmp_path_factory.mktemp("space")
    processors = {**tiny_processors(root), "audio": Wav2Vec2FeatureExtractor()}
    torch.manual_seed(1)
    model = AltMoEModel.from_encoders(
        {"image": tiny_vit(), "text": tiny_bert(), "audio": tiny_wav2vec2()},
        ["image->text", "text->image", "audio->image", "audio->text"],
        processors=processors,
        base="none",
        hidden_size=16,
        moe_intermediate_size=8,
        num_experts=6,
        top_k=2,
    ).eval()
    model.set_scoring("text->image", Postprocessing(scales={"text->image": 1.0}))
    # so that a query is sure where its best score is above one half
    calibration = Calibration([0.0, 0.0, 0.0, 0.0], bias=-1.0, threshold=0.5)
    model.config.scoring["text->image"]["confidence"] = calibration.as_dict()
    model.save_pretrained(root / "model", self_contained=True)
    processor = AltMoEProcessor(processors)
    processor.save_pretrained(root / "model")
    pictures = [Image.new("RGB", (40, 30), color) for color in COLORS]
    for modality, items in (("image", pictures), ("text", CAPTIONS)):
        latents = model.encode(modality, processor.batch(modality, [processor.read(modality, item) for item in items]))
        with LatentStore.create(
            root / "stores" / modality, modality, model.config.encoders[modality], columns={"caption": "string"}
        ) as store:
            store.append(COLORS, latents, caption=CAPTIONS)
    kinds = {"id": Value("string"), "image": ImageFeature(), "caption": Value("string")}
    data = {"id": COLORS, "image": pictures, "caption": CAPTIONS}
    Dataset.from_dict(data, Features(kinds)).save_to_disk(root / "data")
    return root


@pytest.fixture(scope="module")
def folder(project):
    stores = {m: project / "stores" / m for m in ("image", "text")}
    return write_space(project / "space", project / "model", stores, project / "data", title="Colours & <shapes>")


def best(project, direction: str, query) -> list[str]:
    """Ids in the order in which the package itself finds them."""
    source, _, target = direction.partition("->")
    model = AltMoEModel.from_pretrained(project / "model")
    processor = AltMoEProcessor.from_pretrained(project / "model", trust_remote_code=True)
    latents = model.encode(source, processor.batch(source, [processor.read(source, query)]))
    store = LatentStore.open(project / "stores" / target)
    return [hit.id for hit in LatentIndex(model, store, direction).search(latents, 8)[0]]


# ---------------------------------------------------------------- the folder


def test_a_space_is_complete(folder, project):
    card = SpaceCard.load(folder / "README.md").data.to_dict()
    assert (card["title"], card["sdk"], card["app_file"]) == ("Colours & <shapes>", "gradio", "app.py")
    assert f"gradio=={card['sdk_version']}" in (folder / "requirements.txt").read_text().splitlines()
    assert "models" not in card and "datasets" not in card  # nothing here is on the Hub
    kept = json.loads((folder / "space.json").read_text())["stores"]
    assert kept == {"image": "stores/image", "text": "stores/text"}
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".lock")]
    assert str(project) not in "".join(p.read_text() for p in folder.glob("*.*") if p.is_file())


def test_a_space_of_hub_names_only_names_them(tmp_path):
    names = {"image": "me/latents", "text": "me/latents"}
    folder = write_space(tmp_path / "space", "me/model", names, "me/pictures", title="T", examples=["a cat"])
    card = SpaceCard.load(folder / "README.md").data.to_dict()
    assert card["models"] == ["me/model"] and card["datasets"] == ["me/latents", "me/pictures"]
    settings = json.loads((folder / "space.json").read_text())
    assert settings["model"] == "me/model" and settings["examples"] == ["a cat"]
    assert "[me/pictures](/datasets/me/pictures)" in (folder / "README.md").read_text()
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["modeling_altmoe"]


def test_a_space_that_could_not_run_is_refused(tmp_path, project):
    with pytest.raises(FileNotFoundError, match=r"no folder '\.\./no/such/folder': expected a trained model"):
        write_space(tmp_path / "a", "../no/such/folder", {"image": "me/latents"})
    with pytest.raises(ValueError, match="'me--you' is neither a folder here nor a Hub name"):
        write_space(tmp_path / "a", "me--you", {"image": "me/latents"})
    with pytest.raises(ValueError, match="No store"):
        write_space(tmp_path / "b", "me/model", {})
    with pytest.raises(ValueError, match="not the name of a modality"):
        write_space(tmp_path / "c", "me/model", {"../image": "me/latents"})
    shutil.copytree(project / "model", tmp_path / "model")
    place = tmp_path / "model" / "config.json"
    config = json.loads(place.read_text())
    config["encoders"]["image"].update(self_contained=False, name_or_path=str(tmp_path))
    place.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="encoders lie on this machine only"):
        write_space(tmp_path / "d", tmp_path / "model", {"image": "me/latents"})


def python(code: str, *arguments, place) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_a_space_runs_its_own_copy_of_the_code(folder, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import engine, handler, modeling_altmoe as m; "
    run = python(code + "print(m.__file__, handler.__file__, engine.read_image.__module__)", folder, place=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [
        str(folder / "modeling_altmoe" / "__init__.py"),
        str(folder / "handler.py"),
        "handler",
    ]


def test_the_engine_in_the_repository_answers(project, tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no picture")
    code = """
import json, sys; sys.path.insert(0, sys.argv[1])
from engine import Engine
root = sys.argv[2]
engine = Engine(root + "/model", {m: f"{root}/stores/{m}" for m in ("image", "text")}, root + "/data")
answer = engine.search("text", "a red square", "image", 3)
told = []
for query in (("image", "text.png", "text"), ("text", "", "image"), ("text", "a" * 501, "image"), ("text", "a", "text")):
    try:
        engine.search(*query)
    except ValueError as error:
        told.append(str(error))
same = engine.search("image", "red.png", "text", 8)
print("ANSWER" + json.dumps([[f.id for f in answer.found], answer.confidence, answer.sure, answer.milliseconds,
                             answer.gates, told, [f.caption for f in same.found], same.confidence]))
"""
    run = python(code, SPACE, project, place=tmp_path)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.partition("ANSWER")[2])
    found, confidence, sure, milliseconds, gates, told, captions, uncalibrated = answer
    assert found == best(project, "text->image", "a red square")[:3]
    assert confidence == pytest.approx(1 / (1 + np.exp(1))) and sure is False and uncalibrated is None
    assert list(milliseconds) == ["encode", "connector", "search"] and min(milliseconds.values()) > 0
    assert list(gates) == ["contrastive gate", "regression gate"]
    for weights in gates.values():
        assert len(weights) == 6 and sum(weights) == pytest.approx(1) and sum(weight > 0 for weight in weights) == 2
    for words, message in zip(
        ("not a readable image", "Type a few words", "501 characters", "text->text"), told, strict=True
    ):
        assert words in message
    assert captions == [
        CAPTIONS[COLORS.index(name)] for name in best(project, "image->text", Image.new("RGB", (9, 9), "red"))
    ]


# ---------------------------------------------------------------- the page

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """The Space's own folder, started as the Hub starts it: `python app.py` in it."""
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -c constraints.txt -e '.[space]')")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("served") / "log.txt", "w+")
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH" and not name.startswith("ALTMOE_")}
    environment.update(OMP_NUM_THREADS="1", GRADIO_SERVER_PORT=str(port), HF_TOKEN="hf_secret_for_this_test")
    process = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (log.seek(0), log.read()[-3000:])
                time.sleep(0.25)
        yield url
        log.seek(0)
        assert "hf_secret" not in log.read()
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the 'test' extra has it)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(served, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(served, wait_until="domcontentloaded")
    page.wait_for_selector("#query-text textarea, #query-text input")
    page.wait_for_selector(".note.empty")
    yield page
    page.close()
    assert not errors


def words(page, text: str) -> None:
    page.fill("#query-text textarea, #query-text input", text)
    page.click("#search-text")


@needs_browser
def test_words_find_pictures(page, project):
    assert page.inner_text("#title h1") == "Colours & <shapes>"
    words(page, "a red square")
    page.wait_for_selector('.answer[data-direction="text->image"]')
    ids = best(project, "text->image", "a red square")
    assert page.locator(".card .caption").all_inner_texts() == [CAPTIONS[COLORS.index(name)] for name in ids]
    assert page.locator(".card img").first.evaluate("image => image.complete && image.naturalWidth") == 40
    status = page.inner_text(".status")
    assert "Nothing found" in status and "27%" in status and "50% is asked for" in status
    assert re.findall(r"(\w+) \d+\.\d ms", status) == ["encode", "connector", "search"]
    assert page.locator(".gate").count() == 2 and page.locator(".gate .bar.on").count() == 4
    assert re.search(r"contrastive gate: expert \d+: \d+%", page.locator(".bars").first.get_attribute("aria-label"))


@needs_browser
def test_an_example_is_asked_by_one_click(page):
    page.get_by_role("button", name=CAPTIONS[0]).click()
    page.wait_for_selector('.answer[data-direction="text->image"]')
    assert page.locator("#query-text textarea, #query-text input").input_value() == CAPTIONS[0]


@needs_browser
def test_a_picture_finds_words(page, project, tmp_path):
    Image.new("RGB", (64, 48), "green").save(tmp_path / "green.jpg")
    page.get_by_role("tab", name="Picture").click()
    page.set_input_files("#query-image input[type=file]", tmp_path / "green.jpg")
    page.wait_for_selector('.answer[data-direction="image->text"]')
    ids = best(project, "image->text", Image.open(tmp_path / "green.jpg"))
    assert page.locator(".line .caption").all_inner_texts() == [CAPTIONS[COLORS.index(name)] for name in ids]
    assert "not calibrated" in page.inner_text(".status")
    assert page.locator(".answer script").count() == 0  # a caption's tags are text


@needs_browser
def test_a_sound_finds_both(page, tmp_path):
    pytest.importorskip("soundfile", reason="soundfile is not installed: no sound can be decoded")
    (tmp_path / "tone.wav").write_bytes(base64.b64decode(wav()))
    page.get_by_role("tab", name="Sound").click()
    page.set_input_files("#query-audio input[type=file]", tmp_path / "tone.wav")
    page.wait_for_selector('.answer[data-direction="audio->image"]')
    page.locator("#target-audio").get_by_label("text", exact=True).check()
    page.wait_for_selector('.answer[data-direction="audio->text"]')


@needs_browser
def test_bad_input_is_told(page, tmp_path):
    words(page, "   ")
    page.wait_for_selector(".note.error")
    assert "Type a few words first" in page.inner_text(".note.error")
    words(page, "a cat")  # it goes on
    page.wait_for_selector(".answer")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (6000, 5000)).save(tmp_path / "large.png")
    (tmp_path / "huge.png").write_bytes(b"0" * 10_000_001)
    page.get_by_role("tab", name="Picture").click()
    for name, told in (("text.png", "not a readable image"), ("large.png", "6000 x 5000 pixels")):
        page.set_input_files("#query-image input[type=file]", tmp_path / name)
        page.wait_for_selector(f".note.error:has-text('{told}')")
        page.locator("#query-image").get_by_role("button", name=re.compile("clear|remove", re.I)).first.click()
        page.wait_for_selector(".note.empty")
    page.set_input_files("#query-image input[type=file]", tmp_path / "huge.png")
    page.wait_for_selector("text=/exceeds|too large|maximum/i")
    assert page.locator(".answer").count() == 0


def test_files_of_the_server_stay_there(served, project):
    """What a page never sends: a name of a file on the server, or a URL, as the picture that was uploaded."""
    config = json.load(urllib.request.urlopen(f"{served}/config"))
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    event = next(d for d in config["dependencies"] if [names[i] for i in d["inputs"]][:1] == ["query-image"])
    secret = project / "secret.png"
    Image.new("RGB", (9, 9), "red").save(secret)
    for number, sent in enumerate(
        ({"path": str(secret)}, {"path": "app.py"}, {"path": "a.png", "url": f"file://{secret}"}, str(secret))
    ):
        if isinstance(sent, dict):
            sent = {**sent, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [sent, "text"], "fn_index": event["id"], "session_hash": f"s{number}"}
        headers = {"Content-Type": "application/json"}
        join = urllib.request.Request(f"{served}/gradio_api/queue/join", json.dumps(body).encode(), headers)
        urllib.request.urlopen(join).close()
        with urllib.request.urlopen(f"{served}/gradio_api/queue/data?session_hash=s{number}", timeout=20) as answer:
            end = next(line for line in answer if b"process_completed" in line)
        assert json.loads(end.removeprefix(b"data:"))["success"] is False, end
    for name in (str(secret), "app.py", "space.json", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{served}/gradio_api/file={name}")


@needs_browser
def test_it_fits_a_phone(served, browser):
    page = browser.new_page(viewport={"width": 400, "height": 850})
    page.goto(served, wait_until="domcontentloaded")
    page.wait_for_selector("#search-text")
    words(page, "a blue square")
    page.wait_for_selector(".answer")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    lefts = page.locator(".card").evaluate_all(
        "cards => cards.map(card => Math.round(card.getBoundingClientRect().left))"
    )
    assert len(set(lefts)) == 2  # two pictures a row
    page.close()


# ---------------------------------------------------------------- settings


@pytest.fixture
def settings(monkeypatch):
    """The function, without gradio and without what is set outside."""
    for name in ("ALTMOE_MODEL", "ALTMOE_STORES", "ALTMOE_DATA", "ALTMOE_TITLE"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("space_settings", SPACE / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.settings


def test_settings_are_explained_and_checked(settings, tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings(["--help"], tmp_path)
    assert "--store MODALITY=NAME" in capsys.readouterr().out
    for arguments, words in (
        ([], "--model is missing"),
        (["--model", "m"], "--store is missing"),
        (["--model", "m", "--store", "image"], "expected MODALITY=NAME"),
        (["--model", "m", "--stores", "image=a"], "unrecognized arguments: --stores"),
    ):
        with pytest.raises(SystemExit):
            settings(arguments, tmp_path)
        assert words in capsys.readouterr().err


def test_what_cannot_be_opened_ends_with_one_sentence(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed (pip install -c constraints.txt -e '.[space]')")
    code = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('app', run_name='__main__')"
    run = python(code, SPACE, "--model", tmp_path / "none", "--store", "image=nowhere", place=tmp_path)
    assert run.returncode and "error:" in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_settings_come_from_arguments_then_environment_then_file(settings, folder, monkeypatch):
    stores = {modality: str(folder / "stores" / modality) for modality in ("image", "text")}
    given = settings([], folder)
    assert (given.model, given.stores, given.data) == (str(folder / "model"), stores, str(folder / "data"))
    assert given.title == "Colours & <shapes>"
    monkeypatch.setenv("ALTMOE_MODEL", "me/m")
    monkeypatch.setenv("ALTMOE_STORES", "image=a/b, text=c/d")
    given = settings([], folder)
    assert (given.model, given.stores) == ("me/m", {"image": "a/b", "text": "c/d"})
    given = settings(["--model", "x", "--store", "text=y", "--title", "z"], folder)
    assert (given.model, given.stores, given.title) == ("x", {"text": "y"}, "z")
