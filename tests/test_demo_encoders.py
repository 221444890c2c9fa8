"""The conversion of EfficientNet-Lite0 against a plain reference, on random weights."""

import pytest
import torch

from demo import encoders


@pytest.fixture(scope="module")
def lite0_source() -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the published file and random values, batch statistics included."""
    generator = torch.Generator().manual_seed(1)
    source = {}

    def conv(name, *shape):
        fan_in = shape[1] * shape[2] * shape[3]
        source[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5

    def norm(name, width):
        source[f"{name}.weight"] = torch.rand(width, generator=generator) + 0.5
        source[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.1
        source[f"{name}.running_mean"] = torch.randn(width, generator=generator) * 0.1
        source[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
        source[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    width, i = 32, 0
    stages = [(1, 16, 3), (2, 24, 3), (2, 40, 5), (3, 80, 3), (3, 112, 5), (4, 192, 5), (1, 320, 3)]
    for blocks, out, kernel in stages:
        for _ in range(blocks):
            block, inner = f"_blocks.{i}", width if i == 0 else 6 * width
            if i > 0:
                conv(f"{block}._expand_conv", inner, width, 1, 1)
                norm(f"{block}._bn0", inner)
            conv(f"{block}._depthwise_conv", inner, 1, kernel, kernel)
            norm(f"{block}._bn1", inner)
            conv(f"{block}._project_conv", out, inner, 1, 1)
            norm(f"{block}._bn2", out)
            width, i = out, i + 1
    conv("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    source["_fc.weight"], source["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return source


def test_conversion_equals_the_plain_reference(lite0_source):
    assert encoders.check_lite0(encoders.convert_lite0(lite0_source), lite0_source) < encoders.TOLERANCE


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.pop("_blocks.7._bn1.running_var"), r"not in the source.*blocks\.7\.depthwise_conv"),
        (lambda s: s.update({"_blocks.3._se_reduce.weight": torch.zeros(1)}), r"does not have.*_se_reduce"),
        (lambda s: s.update({"_blocks.0._expand_conv.weight": torch.zeros(1)}), r"does not have.*_blocks\.0\._expand"),
        (lambda s: s.update({"_bn0.extra": torch.zeros(1)}), r"not in the target.*batchnorm\.extra"),
        (lambda s: s.update({"_conv_stem.weight": torch.zeros(32, 3, 5, 5)}), r"of another shape.*embeddings"),
    ],
)
def test_conversion_refuses_a_source_that_does_not_fit(lite0_source, damage, message):
    source = dict(lite0_source)
    damage(source)
    with pytest.raises(encoders.ConversionError, match=message):
        encoders.convert_lite0(source)


def test_the_check_finds_a_wrong_weight_a_closed_gate_and_nan(lite0_source):
    for name, change in [
        ("encoder.blocks.9.projection.project_bn.running_mean", lambda value: value + 0.05),
        ("encoder.blocks.9.squeeze_excite.expand.bias", lambda value: value * 0),
        ("encoder.top_bn.bias", lambda value: value * float("nan")),
    ]:
        model = encoders.convert_lite0(lite0_source)
        tensor = model.state_dict()[name]
        tensor.copy_(change(tensor))
        with pytest.raises(encoders.ConversionError, match="differs from the plain torch reference"):
            encoders.check_lite0(model, lite0_source)
