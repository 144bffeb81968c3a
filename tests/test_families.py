"""The smallest model of every timm family is prepared, trained for one step and evaluated.

The table was found by walking all models of each family on the meta device and trying inputs of 32,
64, 96, ... pixels (with `img_size` if the model needs it). `depth` shortens a chain of equal
blocks. The table is complete for the version of timm that constraints.txt pins; with another
version, families that are missing on either side are skipped.
"""

import gc
from pathlib import Path

import pytest
import timm
import torch
from fixtures.dispatch import CONVOLUTIONS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tq_lightning.models import create_model
from tq_lightning.quant.bit_width import bit_width
from tq_lightning.quant.fused_weights import fused_weights
from tq_lightning.quant.layers import select_layers
from tq_lightning.quant.norm_calibration import calibrate_norms
from tq_lightning.quant.prepare import prepare
from tq_lightning.quant.quantized_tensors import original, weight_quantizers

PINNED = dict(
    line.strip().split("==")
    for line in (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    if "==" in line
)["timm"]

# family -> (smallest model, side of its input in pixels, arguments)
FAMILIES: dict[str, tuple[str, int, dict[str, int]]] = {
    "beit": ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 3}),
    "byoanet": ("halonet_h1", 256, {}),
    "byobnet": ("test_byobnet", 32, {}),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32}),
    "cifar_resnet": ("resnet8_cifar", 32, {}),
    "coat": ("coat_tiny", 32, {"img_size": 32}),
    "convit": ("convit_tiny", 32, {"img_size": 32}),
    "convmixer": ("convmixer_768_32", 32, {}),
    "convnext": ("test_convnext", 32, {}),
    "cpubone": ("cpubone_nano", 32, {}),
    "crossvit": ("crossvit_tiny_240", 32, {}),
    "csatv2": ("csatv2", 64, {}),
    "cspnet": ("cs3darknet_focus_s", 32, {}),
    "cspnext": ("cspnext_tiny", 32, {}),
    "davit": ("davit_tiny", 32, {}),
    "deepseek_vit": ("deepseek_vit_412m", 112, {"depth": 2}),
    "deit": ("deit_tiny_patch16_224", 32, {"img_size": 32}),
    "densenet": ("densenet121", 32, {}),
    "dla": ("dla46x_c", 32, {}),
    "dpn": ("dpn48b", 32, {}),
    "edgenext": ("edgenext_xx_small", 32, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 32, {"img_size": 32}),
    "efficientnet": ("test_efficientnet", 32, {}),
    "efficientvim": ("efficientvim_m1", 32, {}),
    "efficientvit_mit": ("efficientvit_b0", 32, {}),
    "efficientvit_msra": ("efficientvit_m0", 32, {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 32, {}),
    "fasternet": ("fasternet_t0", 32, {}),
    "fastvit": ("fastvit_t8", 32, {}),
    "focalnet": ("focalnet_tiny_srf", 32, {}),
    "gcvit": ("gcvit_xxtiny", 32, {"img_size": 32}),
    "gemma4_vit": ("gemma4_vit_167m", 32, {"depth": 3}),
    "ghostnet": ("ghostnet_050", 32, {}),
    "hardcorenas": ("hardcorenas_b", 32, {}),
    "hgnet": ("hgnetv2_b0", 32, {}),
    "hiera": ("hiera_tiny_224", 32, {"img_size": 32}),
    "hieradet_sam2": ("sam2_hiera_tiny", 32, {}),
    "hrnet": ("hrnet_w18_small", 32, {}),
    "iformer": ("iformer_t", 32, {}),
    "inception_next": ("inception_next_atto", 32, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 32, {}),
    "levit": ("levit_128s", 32, {"img_size": 32}),
    "lowformer": ("lowformer_b0", 32, {}),
    "mambaout": ("test_mambaout", 32, {}),
    "maxxvit": ("test_coatnet", 32, {"img_size": 32}),
    "metaformer": ("poolformerv2_s12", 32, {}),
    "mlp_mixer": ("gmlp_ti16_224", 32, {"img_size": 32}),
    "mobilenetv3": ("mobilenetv3_small_050", 32, {}),
    "mobilenetv5": ("mobilenetv5_base", 32, {}),
    "mobilevit": ("mobilevit_xxs", 32, {}),
    "mvitv2": ("mvitv2_tiny", 32, {}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 32, {"depth": 3}),
    "nasnet": ("nasnetalarge", 32, {}),
    "nest": ("nest_tiny", 32, {"img_size": 32}),
    "nextvit": ("nextvit_small", 32, {}),
    "nfnet": ("test_nfnet", 32, {}),
    "pit": ("pit_ti_224", 32, {"img_size": 32}),
    "pnasnet": ("pnasnet5large", 32, {}),
    "pvt_v2": ("pvt_v2_b0", 32, {}),
    "qwen3_vit": ("qwen3_vit_88m", 32, {"depth": 3}),
    "rdnet": ("rdnet_tiny", 32, {}),
    "regnet": ("regnetx_002", 32, {}),
    "repghost": ("repghostnet_050", 32, {}),
    "repvit": ("repvit_m1", 32, {}),
    "res2net": ("res2next50", 32, {}),
    "resnest": ("resnest14d", 32, {}),
    "resnet": ("test_resnet", 32, {}),
    "resnetv2": ("resnetv2_18", 32, {}),
    "rexnet": ("rexnet_100", 32, {}),
    "selecsls": ("selecsls42", 32, {}),
    "senet": ("legacy_seresnet18", 32, {}),
    "sequencer": ("sequencer2d_s", 32, {}),
    "shvit": ("shvit_s1", 32, {}),
    "sknet": ("skresnet18", 32, {}),
    "starnet": ("starnet_s050", 32, {}),
    "swiftformer": ("swiftformer_xs", 32, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 32, {"img_size": 32}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 32, {"img_size": 32}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 32, {"img_size": 32}),
    "tiny_vit": ("tiny_vit_5m_224", 32, {}),
    "tnt": ("tnt_s_legacy_patch16_224", 32, {"img_size": 32}),
    "tresnet": ("tresnet_m", 32, {}),
    "twins": ("twins_svt_small", 32, {}),
    "vgg": ("vgg11", 32, {}),
    "visformer": ("visformer_tiny", 32, {"img_size": 32}),
    "vision_transformer": ("test_vit", 32, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 32, {"img_size": 32}),
    "vision_transformer_relpos": ("test_vit_relpos", 32, {"img_size": 32}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 32, {"depth": 3}),
    "vitamin": ("vitamin_small_224", 32, {"img_size": 32}),
    "volo": ("volo_d1_224", 32, {"img_size": 32}),
    "vovnet": ("ese_vovnet19b_slim_dw", 32, {}),
    "xception": ("legacy_xception", 32, {}),
    "xception_aligned": ("xception41p", 32, {}),
    "xcit": ("xcit_nano_12_p8_224", 32, {}),
}
WIDTHS = (8, 4, 2, 1)
# Lookup tables that their model multiplies by a one-hot vector instead of indexing them.
TABLES = {"gemma4_vit": "position_embedding_table"}
PRODUCTS = {
    F.linear,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
}
OPERATORS = CONVOLUTIONS | PRODUCTS | {torch.lstm, torch.gru, F.multi_head_attention_forward}


class CollectFloatWeights(TorchFunctionMode):
    """Collect the float parameters with two or more dimensions that operators multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[int, nn.Parameter] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in OPERATORS:
            for arg in [*args, *kwargs.values()]:
                for one in arg if isinstance(arg, (list, tuple)) else [arg]:
                    if isinstance(one, nn.Parameter) and one.dim() >= 2:
                        self.met[id(one)] = one
        return func(*args, **kwargs)


def float_tensors(out) -> list[Tensor]:
    """Return the float tensors of a model's output, which may be a tuple or a dict."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    out = out.values() if isinstance(out, dict) else out
    return [t for one in out for t in float_tensors(one)]


def test_every_family_has_a_row():
    if timm.__version__ != PINNED:
        pytest.skip(f"the table is that of timm {PINNED}, installed is {timm.__version__}")
    # an earlier test module may have registered a model
    installed = {module for module in timm.list_modules() if not module.startswith("test_")}
    assert sorted(FAMILIES) == sorted(installed)


@pytest.mark.slow
@pytest.mark.families
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_and_evaluates(family):
    name, side, kwargs = FAMILIES[family]
    if timm.__version__ != PINNED and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    assert name in timm.list_models(module=family)
    torch.manual_seed(0)
    model = create_model(name, **kwargs)
    skipped = {
        id(p) for layer in select_layers(model) if layer.skipped for p in layer.module.parameters()
    }
    skipped |= {
        id(p) for full, p in model.named_parameters() if full.endswith(TABLES.get(family, "!"))
    }
    prepare(model, verbose=False)
    x = torch.randn(2, 3, side, side)

    model.train()
    for bits in WIDTHS:
        with bit_width(model, bits):
            sum(t.float().square().mean() for t in float_tensors(model(x))).backward()
    for weight in weight_quantizers(model):
        full_name, module, tensor = weight.name, weight.module, weight.tensor
        gradient = original(module, tensor).grad
        assert gradient is not None and gradient.isfinite().all(), f"gradient of {full_name}"
    model.zero_grad()

    model.eval()
    calibrate_norms(model, [x])
    with torch.no_grad(), fused_weights(model):
        for bits in range(1, 9):
            with bit_width(model, bits, "quantize"):
                quantized = float_tensors(model(x))
            with bit_width(model, bits, "truncate"), CollectFloatWeights() as floats:
                truncated = float_tensors(model(x))
            assert quantized and all(t.isfinite().all() for t in quantized), f"{bits} bits"
            assert all(torch.equal(a, b) for a, b in zip(quantized, truncated, strict=True)), (
                f"{bits} bits"
            )

    share, left = quantized_share(model, floats, skipped)
    assert share >= 0.95, left
    gc.collect()


def quantized_share(
    model: nn.Module, floats: CollectFloatWeights, skipped: set[int]
) -> tuple[float, list[tuple[int, ...]]]:
    """Return the quantized share of the multiplied weights, and the shapes of the other ones."""
    done = sum(weight.original.numel() for weight in weight_quantizers(model))
    left = [p for p in floats.met.values() if id(p) not in skipped]
    return done / (done + sum(p.numel() for p in left)), [tuple(p.shape) for p in left]


def test_additional_float_layer_lowers_the_quantized_share():
    """Counter-example: the share must fall if more than the first and last layer stay in float."""
    model = create_model("test_vit").eval()
    prepare(model, skip=("first", "last", "blocks.0.*"), verbose=False)
    with torch.no_grad(), bit_width(model, 4), CollectFloatWeights() as floats:
        model(torch.randn(1, 3, 160, 160))
    ends = {
        id(p)
        for name in ("patch_embed.proj", "head")
        for p in model.get_submodule(name).parameters()
    }
    share, left = quantized_share(model, floats, ends)
    assert share < 0.95 and len(left) == 4
