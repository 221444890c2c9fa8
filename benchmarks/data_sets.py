"""The data sets of the quality benchmark, and how their stores are made where they are missing.

In: a name, or stores of anybody's. Out: `{modality: folder of a LatentStore}`. Everything that is run is printed as the
command that it is.
"""

import subprocess
import sys
from pathlib import Path

from datasets import load_from_disk

from modeling_altmoe import LatentStore
from trainer.encode import read_skipped

BUILD = Path("build")
ENCODERS = {
    "text": ("text", "minilm-l6"),
    "image": ("image", "efficientnet-lite0"),
    "speech": ("audio", "whisper-tiny-encoder"),
}
PICTURES = {"image": "image", "text": "caption"}
# name: {modality: column of the data set}
DATA = {
    "stamps": PICTURES,
    "twemoji": PICTURES,
    "icons": PICTURES,
    "stamps-speech": {**PICTURES, "speech": "speech"},
    # the same captions in four further languages: six modalities, thirty directions
    "stamps-languages": {
        **PICTURES,
        **{f"text_{language}": f"caption_{language}" for language in ("de", "es", "fr", "it")},
    },
}
# the same items by several layers of the same encoders, side by side: pictures alone, or captions, too
SEVERAL = {
    "image": ("-blocks", ("--layers", "-7", "-5", "-3", "-2", "-1", "--combine", "concat", "--pooling", "mean+std")),
    "text": ("-layers", ("--layers", "0", "2", "4", "6", "--combine", "concat")),
}
ENDINGS = {"-blocks": ("image",), "-layers": ("image", "text")}
FOLDERS = {"stamps-languages": "stamps-speech"}  # where it lies, if not below its own name


def plain_name(name: str) -> tuple[str, tuple[str, ...]]:
    """The data set that a name is a variant of, and the modalities whose latents are of several layers in it."""
    for ending, modalities in ENDINGS.items():
        if name.endswith(ending):
            return name.removesuffix(ending), modalities
    return name, ()


def store_folders(name: str) -> dict[str, str]:
    """`{modality: folder}` of a known data set, or of stores that lie below `build/stores/<name>`.

    Raises:
        ValueError: neither known nor there.
    """
    place, (plain, wider) = BUILD / "stores" / FOLDERS.get(name, name), plain_name(name)
    if wider and plain in DATA:
        several = {m: str(BUILD / "stores" / f"{plain}{SEVERAL[m][0]}" / m) for m in wider}
        return {**store_folders(plain), **several}
    if name in DATA:
        return {modality: str(place / modality) for modality in sorted(DATA[name])}
    found = sorted(path.parent.name for path in place.glob("*/store.json"))
    if len(found) < 2:
        raise ValueError(
            f"data set '{name}': known are {', '.join(DATA)} (each with {' and '.join(ENDINGS)}, too); or put two stores or more "
            f"below {place}, or name them with --stores image=FOLDER text=FOLDER."
        )
    return {modality: str(place / modality) for modality in found}


def is_there(name: str) -> bool:
    """Whether all stores of a known data set exist."""
    return all((Path(folder) / "store.json").exists() for folder in store_folders(name).values())


def prepare(name: str) -> dict[str, str]:
    """The stores of a data set; what is missing of a known one, or not finished, is fetched and encoded first."""
    folders, (plain, wider) = store_folders(name), plain_name(name)
    if plain not in DATA:
        return folders  # somebody's own
    folder = FOLDERS.get(plain, plain)
    for modality, store in folders.items():
        if not _is_whole(store, BUILD / "data" / folder):
            which, encoder = ENCODERS[modality.partition("_")[0]]
            _run("-m", "demo.encoders", which)
            _run("-m", "demo.data", folder)
            _run(
                *("-m", "trainer.cli", "encode", "--data", f"build/data/{folder}", "--column", DATA[plain][modality]),
                *("--modality", modality, "--encoder", f"build/encoders/{encoder}", "--out", store),
                *(SEVERAL[modality][1] if modality in wider else ()),
            )
    return folders


def _is_whole(store: str, data: Path) -> bool:
    """Whether a store has all items of the data it is made from; one that was brought here without its data has."""
    if not (Path(store) / "store.json").exists():
        return False
    if not data.exists():
        return True
    opened = LatentStore.open(store)
    return len(opened) + len(read_skipped(opened)) >= len(load_from_disk(str(data)))


def given_stores(pairs: list[str]) -> dict[str, str]:
    """`["image=FOLDER", "text=user/name"]` -> folders; what is no folder is taken for a store on the Hub.

    Raises:
        ValueError: not of that form, fewer than two, or one modality twice.
        OSError: no such store.
    """
    folders: dict[str, str] = {}
    for pair in pairs:
        modality, equals, place = pair.partition("=")
        if not (modality and equals and place) or modality in folders:
            raise ValueError(f"--stores {pair}: expected MODALITY=FOLDER or MODALITY=HUB_NAME, each modality once.")
        folders[modality] = place if Path(place).exists() else str(LatentStore.from_hub(place).path)
    if len(folders) < 2:
        raise ValueError(f"--stores {' '.join(pairs)}: a benchmark needs at least two modalities.")
    return dict(sorted(folders.items()))


def _run(*words: str) -> None:
    print("\n$ python " + " ".join(words), flush=True)
    subprocess.run([sys.executable, *words], check=True)
