"""`altmoe index` and `altmoe search`: conditions, kept indexes and the contact sheet, from the command line."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from conftest import small_model
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from modeling_altmoe import LatentStore
from modeling_altmoe.search_altmoe import Hit, Hits
from trainer.cli import main as altmoe
from trainer.contact_sheet import contact_sheet, pictures_of

NASTY = "<script>alert(\"1\")</script> & 'two'"


def hits(*columns: dict, confidence: float | None = None) -> Hits:
    found = Hits([Hit(row, f"id{row}", 3.0 - row, one) for row, one in enumerate(columns)])
    found.confidence, found.threshold = confidence, None if confidence is None else 0.5
    return found


def result(found: Hits, query: str = NASTY, kind: str = "text") -> dict:
    return {"query": query, "kind": kind, "direction": f"{kind}->image", "hits": found}


def tree(page: str) -> ElementTree.Element:
    """The page, if it is well-formed."""
    return ElementTree.fromstring(page.partition("\n")[2])


class Tags(HTMLParser):
    """How often a browser sees each tag, and what is loaded."""

    def __init__(self, page: str):
        super().__init__()
        self.count, self.sources = {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_everything_from_data_is_escaped_and_the_page_is_well_formed():
    page = contact_sheet(NASTY, [result(hits({"caption": NASTY, NASTY: NASTY, "none": None}))], lambda *_: None)
    tags = Tags(page)
    assert "script" not in tags.count and tags.count["li"] == 1
    text = "".join(tree(page).itertext())
    assert text.count(NASTY) == 6 and "none: " not in text  # title twice, query, caption, column's name and value
    assert "default-src 'none'" in page


def test_pictures_travel_inside_as_thumbnails(tmp_path):
    Image.new("RGB", (900, 300), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    columns = [{"path": "red.png"}, {"path": str(tmp_path / "red.png")}, {"path": "broken.png"}, {"path": "gone.png"}]
    query = result(hits(*columns), str(tmp_path / "red.png"), "image")
    page = contact_sheet("t", [query], pictures_of(None, tmp_path))
    sources = Tags(page).sources
    assert len(sources) == 3 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert pictures_of(None, tmp_path)("x", {"path": "red.png"}).size == (200, 67)


def test_pictures_of_a_data_set_are_found_by_id(tmp_path):
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = Dataset.from_dict({"id": ["a", "b"], "picture": pictures}).cast_column("picture", ImageFeature())
    data.save_to_disk(tmp_path / "data")
    of = pictures_of(str(tmp_path / "data"), tmp_path)
    assert of("b", {}).getpixel((4, 4)) == (0, 0, 255) and of("c", {}) is None
    Dataset.from_dict({"name": ["a"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="needs a column 'id' and one of pictures, it has name"):
        pictures_of(str(tmp_path / "other"), tmp_path)


def test_the_page_says_how_sure_the_search_was():
    one = {"caption": "x"}
    sure, unsure, nothing = hits(one, confidence=0.8), hits(one, confidence=0.2), hits(confidence=0.0)
    page = contact_sheet("t", [result(found) for found in (sure, unsure, nothing)], lambda *_: None)
    text = " ".join(tree(page).itertext())
    assert "a match with 80% confidence" in text and "nothing found: 20% confidence, 50% asked for" in text
    assert "No item meets the conditions." in text
    assert page.count('class="match"') == 1


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory, encoder_folders, processor):
    """A model with tiny encoders, and a store of its picture latents."""
    from modeling_altmoe import AltMoEModel

    root = tmp_path_factory.mktemp("search")
    torch.manual_seed(0)
    model = AltMoEModel.from_encoders(
        encoder_folders, ["text->image", "image->text"], hidden_size=16, moe_intermediate_size=8, base="none"
    )
    model.save_pretrained(root / "model", self_contained=True)
    processor.save_pretrained(root / "model")
    encoder = model.config.encoders["image"]
    with LatentStore.create(root / "store", "image", encoder, columns={"caption": "string", "n": "int32"}) as store:
        latents = torch.randn(300, encoder["latent_size"], generator=torch.Generator().manual_seed(0))
        store.append([f"i{n}" for n in range(300)], latents, caption=[f"<{n}>" for n in range(300)], n=list(range(300)))
    return root


def search(place, *more) -> list[str]:
    return ["search", str(place / "store"), "--model", str(place / "model"), "--text", "a red cat", *more]


def test_index_then_search_from_the_command_line(place, capsys, tmp_path):
    altmoe(search(place, "--json", "-k", "4"))
    exact = json.loads(capsys.readouterr().out)
    assert exact[0]["index"] == "exact, 300 rows"
    altmoe(["index", str(place / "store"), "--model", str(place / "model"), "--index", "IVF4,Flat"])
    told = capsys.readouterr().out
    assert told.startswith("text->image: made in") and "IVF4,Flat, 300 rows" in told and "image->text" not in told
    page = tmp_path / "sheet.html"
    altmoe(search(place, "-k", "4", "--html", str(page)))
    told = capsys.readouterr().out
    assert "index: IVF4,Flat, 300 rows" in told and f"written: {page}" in told
    assert len(tree(page.read_text()).findall(".//li")) == 4
    altmoe(search(place, "--json", "-k", "3", "--where", "n>=100", "--where", "n<103"))
    found = json.loads(capsys.readouterr().out)[0]["hits"]
    assert sorted(hit["columns"]["n"] for hit in found) == [100, 101, 102]
    altmoe(search(place, "--where", "caption=none"))
    assert "no item meets the conditions" in capsys.readouterr().out
    altmoe(["index", str(place / "store"), "--model", str(place / "model"), "--index", "IVF4,Flat"])
    assert "up to date" in capsys.readouterr().out
    altmoe(["index", str(place / "store"), "--model", str(place / "model"), "--index", "IVF4,Flat", "--fresh"])
    assert "made anew" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--where", "m=1"], "There is no column 'm' to filter by. Columns: id, caption, n."),
        (["--index", "IVF"], "Unknown index 'IVF'"),
        (["--html", "out.html", "--data", "nowhere"], "'nowhere' is neither a folder nor a data file here"),
    ],
)
def test_mistakes_are_one_sentence(place, capsys, monkeypatch, tmp_path, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        altmoe(search(place, *more))
    assert message in capsys.readouterr().err


def test_a_stale_index_is_an_error_unless_one_is_made_in_memory(place, capsys, tmp_path):
    model = small_model()
    with LatentStore.create(tmp_path, "image", model.config.encoders["image"]) as store:
        store.append([f"i{n}" for n in range(20)], torch.randn(20, 24))
    model.save_pretrained(tmp_path / "model")
    altmoe(["index", str(tmp_path), "--model", str(tmp_path / "model")])
    with LatentStore.open(tmp_path) as store:
        store.append(["new"], torch.randn(1, 24))
    capsys.readouterr()
    from modeling_altmoe.search_altmoe import LatentIndex

    with pytest.raises(ValueError, match="1 rows were added"):
        LatentIndex(model, LatentStore.open(tmp_path), "text->image")
    altmoe(["index", str(tmp_path), "--model", str(tmp_path / "model"), "--direction", "text->image"])
    assert "1 rows added" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        altmoe(["index", str(tmp_path), "--model", str(tmp_path / "model"), "--direction", "image->text"])
    assert "holds 'image' latents, expected 'text'" in capsys.readouterr().err
