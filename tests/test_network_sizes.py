"""What a release says is what was trained: networks of fixed input size at the sizes of the views."""

import json

import pytest
import timm
import torch
from tools import make_backbone, make_run
from torch.utils.flop_counter import FlopCounterMode

import common
import hub
from trainers import eval_detection
from trainers.eval_metrics import cost
from trainers.shared.run import save_backbone

# name, arguments that keep it small, sides of the views, the side that it takes (None: any)
NETWORKS = [
    ("vit_tiny_patch16_224", {"depth": 1}, 32, 32),
    ("vit_tiny_patch16_224", {"depth": 1}, 96, 96),
    ("vit_tiny_patch16_224", {"depth": 1}, 40, 48),  # the nearest multiple of the patch
    ("vit_tiny_patch16_224", {"depth": 1}, (96, 64), None),
    ("vit_small_patch14_dinov2", {"depth": 1}, 224, 224),
    ("vit_small_patch14_dinov2", {"depth": 1}, 32, 28),
    ("vit_small_patch14_dinov2", {"depth": 1}, (224, 96), 224),
    ("vit_small_patch14_reg4_dinov2", {"depth": 1}, 56, 56),
    ("deit_tiny_distilled_patch16_224", {"depth": 1}, 64, 64),
    ("eva02_tiny_patch14_224", {"depth": 1}, 56, 56),
    ("swin_tiny_patch4_window7_224", {"depths": [1, 1, 1, 1], "embed_dim": 24}, 64, 64),
    ("swinv2_tiny_window8_256", {"depths": [1, 1, 1, 1], "embed_dim": 24}, 96, 96),
    ("crossvit_9_240", {}, 32, 240),  # takes no other size
    ("mobilevit_xxs", {}, 96, None),
    ("efficientnet_lite0", {}, 64, None),
    ("convnext_atto", {"depths": [1, 1, 1, 1]}, 96, None),
]


@pytest.mark.parametrize("name, small, sides, side", NETWORKS, ids=lambda v: str(v)[:40])
@torch.no_grad()
def test_timm_rebuilds_from_a_release_the_network_that_was_trained(name, small, sides, side, tmp_path):
    backbone = make_backbone(name, image_size=sides, **small)
    assert backbone.input_side == side
    largest = sides if isinstance(sides, int) else max(sides)
    save_backbone(tmp_path, backbone, largest)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.rand(2, 3, side or largest, side or largest, generator=torch.Generator().manual_seed(0))
    features = backbone.requires_grad_(False)(x)  # torch 2.6 multiplies in another order where gradients are wanted
    difference = loaded((x - backbone.input_mean) / backbone.input_std) - features
    assert difference.abs().max() < 1e-5 and features.std() > 1e-3
    assert torch.equal(hub.load_teacher(tmp_path)(x), features)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["input_size"][1:] == list(x.shape[2:])


def test_a_view_of_32_px_costs_a_patch_16_network_four_tokens(capsys):
    backbone = common.create_backbone("vit_tiny_patch16_224", image_size=32, depth=1)
    assert backbone.pos_embed.shape[1] == 5  # and the class token
    assert "built for images of 32 px instead of 224" in capsys.readouterr().out


def test_a_size_that_timm_cannot_set_is_said_with_its_cost(capsys):
    common.create_backbone("crossvit_9_240", image_size=32)
    said = capsys.readouterr().out
    assert "crossvit_9_240: takes images of 240 px" in said and "1.84 G multiply-adds" in said


@torch.no_grad()
def test_a_teacher_runs_at_the_views_size_where_timm_can_resample_its_weights(tmp_path, capsys):
    trained = make_backbone("vit_tiny_patch16_224", depth=1)
    save_backbone(tmp_path, trained, 224)
    teacher = hub.load_teacher(tmp_path, image_size=96)
    wanted = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=96).eval()
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher(x), wanted((x - trained.input_mean) / trained.input_std), rtol=0, atol=1e-5)
    assert teacher.backbone.input_side == 96 and "96 px instead of 224" in capsys.readouterr().out
    assert hub.load_teacher(tmp_path).backbone.input_side == 224

    fixed = make_backbone("mixer_s32_224")  # its tokens' mixing cannot be resampled
    save_backbone(tmp_path, fixed, 224)
    assert hub.load_teacher(tmp_path, image_size=64).backbone.input_side == 224
    assert "takes images of 224 px, those of 64 px are resized" in capsys.readouterr().out


@torch.no_grad()
def test_what_starts_from_a_release_keeps_its_size(tmp_path):
    make_run(tmp_path / "run", make_backbone("vit_tiny_patch16_224", image_size=64, depth=1), image_size=64)
    start = hub.load_teacher(tmp_path / "run")
    again = common.create_backbone("vit_tiny_patch16_224", num_classes=3, **common.how_built(start.backbone))
    assert again.pos_embed.shape == start.backbone.pos_embed.shape
    other = common.create_backbone("vit_tiny_patch16_224", image_size=96, depth=1)
    hub.load_weights(other, tmp_path / "run")  # resampled
    assert torch.equal(other.blocks[0].mlp.fc1.weight, start.backbone.blocks[0].mlp.fc1.weight)
    args = eval_detection.Args(checkpoint=tmp_path / "run", detector="fpn")
    assert eval_detection.create_detector(start.backbone, 2, args)


def test_attention_costs_the_same_whether_torch_fuses_it_or_not(monkeypatch):
    backbone = make_backbone("test_vit")
    fused = cost(backbone, 160, 0, 1)["multiply_adds"]
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, 160, 160))
    assert cost(backbone, 160, 0, 1)["multiply_adds"] == fused == counter.get_total_flops() // 2


def test_a_transformer_of_torchs_own_is_counted():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True).eval()
    network = torch.nn.Sequential(torch.nn.Unflatten(3, (16, 1)), torch.nn.Flatten(3), torch.nn.Flatten(1, 2), layer)
    tokens, linear = 3 * 16, 4 * 16 * 16 + 2 * 16 * 32
    assert common.multiply_adds(network, 16) == tokens * linear + 2 * tokens * tokens * 16
