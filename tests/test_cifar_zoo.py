"""The thirteen CIFAR networks: the authors' logits and feature maps from the authors' keys, and timm's conventions."""

import json
import math
import zlib

import numpy as np
import pytest
import timm
import torch
from conftest import GOLDEN
from tools import make_backbone, make_run

import common
import hub

MODELS = {k: v for k, v in json.loads((GOLDEN / "zoo" / "cifar_models.json").read_text()).items() if k[0] != "_"}
FORWARD = np.load(GOLDEN / "zoo" / "cifar_forward.npz")
MAPPED = ("feat", "preact")


def official_state(keys: list, rule: str) -> dict[str, torch.Tensor]:
    """The recorded rules (cifar_models.json, init_rules): every tensor a function of its official name."""
    state = {}
    for key, shape in keys:
        draw = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape))
        kind = key.rpartition(".")[2]
        if len(shape) > 1:
            value = draw * math.sqrt(2 / math.prod(shape[1:]))
        elif rule == "plain":
            value = np.full(shape, kind in ("weight", "running_var"))
        elif kind == "num_batches_tracked":
            value = np.zeros(shape)
        else:
            value = (kind == "weight") + 0.1 * draw if kind != "running_var" else 1 + 0.5 * np.abs(draw)
        state[key] = torch.from_numpy(np.asarray(value, np.float32))
    return state


def create(official: str, **options) -> torch.nn.Module:
    name = official.removesuffix("_repdistiller")
    return timm.create_model(common.OFFICIAL_NAMES.get(name, name), **options)


def test_the_zoo_is_whole():
    assert len(MODELS) == 14 and len(common.ZOO) == 13
    assert {common.OFFICIAL_NAMES.get(n, n) for n in MODELS if "_rep" not in n} == set(common.ZOO)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["plain", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_feature_maps_are_the_authors(name, rule):
    model, keys = create(name, num_classes=100), MODELS[name]["state_dict"]
    if "_rep" not in name:
        assert [[k, list(v.shape)] for k, v in model.state_dict().items()] == keys
    model.load_state_dict(official_state(keys, rule))
    record, x = f"{name}/{rule}/", torch.from_numpy(FORWARD["x"])
    if f"{record}f32/logits" in FORWARD:  # logits reach 1e5 under the plain rule
        theirs = FORWARD[f"{record}f32/logits"]
        np.testing.assert_allclose(model.eval()(x).numpy(), theirs, rtol=1e-5, atol=1e-5 * abs(theirs).max())
    model.double().eval()
    theirs = FORWARD[f"{record}f64/logits"]
    np.testing.assert_allclose(model(x.double()).numpy(), theirs, rtol=1e-9, atol=1e-12 * abs(theirs).max())
    for kind in MAPPED:
        final, maps = model.forward_intermediates(x.double(), preact=kind == "preact")
        maps.append(model.forward_head(final, pre_logits=True))
        np.testing.assert_allclose(maps[-1].numpy(), FORWARD[f"{record}pooled"], rtol=1e-9, atol=1e-9)
        assert [list(m.shape[1:]) for m in maps] == MODELS[name][f"{kind}_shapes"]
        np.testing.assert_allclose([m.norm().item() for m in maps], FORWARD[f"{record}{kind}_norms"], rtol=1e-9)
        first = np.stack([m.flatten()[:8].numpy() for m in maps])
        np.testing.assert_allclose(first, FORWARD[f"{record}{kind}_first8"], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_training_pass_moves_the_statistics_as_the_authors_does(name):
    model = create(name, num_classes=100)
    model.load_state_dict(official_state(MODELS[name]["state_dict"], "plain"))
    logits = model.double().train()(torch.from_numpy(FORWARD["x"]).double())
    record = f"{name}/plain_train/"
    np.testing.assert_allclose(logits.numpy(), FORWARD[f"{record}f64/logits"], rtol=1e-9, atol=1e-9)
    buffers = dict(model.named_buffers())
    for key, norm in zip(FORWARD[f"{record}bn_names"], FORWARD[f"{record}bn_norms"], strict=True):
        np.testing.assert_allclose(buffers[key].double().norm().item(), norm, rtol=1e-9, atol=1e-12, err_msg=key)


@torch.no_grad()
def test_wide_resnets_preactivations_are_a_second_pass_through_three_norms():
    model = create("wrn_16_2").train()
    model.forward_intermediates(torch.rand(4, 3, 32, 32), preact=True)
    tracked = {n: m.num_batches_tracked.item() for n, m in model.named_modules() if hasattr(m, "num_batches_tracked")}
    assert {n for n, count in tracked.items() if count == 2} == {"block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"}


@pytest.mark.parametrize("name", common.ZOO)
def test_parameters_behind_the_feature_maps_are_not_trained_first(name):
    """get_feat_modules of the authors: what the last map does not depend on is left out."""
    model = timm.create_model(name)
    first = {id(p) for m in model.feature_modules() for p in m.parameters()}
    maps = model.forward_intermediates(torch.rand(2, 3, 32, 32), intermediates_only=True)
    maps[-1].sum().backward()
    assert first == {id(p) for p in model.parameters() if p.grad is not None} and first


@torch.no_grad()
@pytest.mark.parametrize("name", common.ZOO)
@pytest.mark.parametrize("side", [16, 32, 64])
def test_timms_conventions(name, side):
    x = torch.rand(2, 3, side, side)
    model = timm.create_model(name, num_classes=7).eval()
    assert model(x).shape == (2, 7) == (2, model.num_classes)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(features), model(x))
    model.reset_classifier(0)
    assert torch.equal(model(x), features) and features.shape == (2, model.num_features)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    maps = timm.create_model(name, features_only=True)(x)
    wanted = [(2, i["num_chs"]) for i in model.feature_info]
    assert [m.shape[:2] for m in maps] == wanted and len(wanted) == type(model).num_maps
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 32, 32) and config["classifier"] == type(model).head_name
    assert isinstance(model.get_submodule(config["first_conv"]), torch.nn.Conv2d)


def test_timms_own_networks_keep_their_names():
    assert timm.models.is_model_pretrained("vgg13.tv_in1k")
    assert timm.model_entrypoint("vgg13").__module__ == "timm.models.vgg"
    assert isinstance(common.create_backbone("vgg13", num_classes=100), common.CifarNetwork)  # the zoo's name for it


@torch.no_grad()
@pytest.mark.parametrize("name", ["wrn_16_2", "mobilenetv2_cifar", "resnet50_cifar"])
def test_a_release_gives_the_same_network(name, tmp_path):
    backbone = make_backbone(name, num_classes=10)
    make_run(tmp_path / "run", backbone)
    release, x = hub.build_release(tmp_path / "run"), torch.rand(2, 3, 32, 32)
    normalised = (x - backbone.input_mean) / backbone.input_std
    loaded = timm.create_model(f"local-dir:{release}", pretrained=True).eval()
    torch.testing.assert_close(loaded(normalised), backbone(x))
    features = timm.create_model(f"local-dir:{release}", pretrained=True, num_classes=0).eval()(normalised)
    stages, logits = common.forward_stages(backbone, x)
    torch.testing.assert_close(features, stages[-1])
    torch.testing.assert_close(logits, backbone(x))
    teacher = hub.load_teacher(tmp_path / "run", num_classes=10)
    torch.testing.assert_close(teacher(x), backbone(x))
    assert "import common" in (release / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto"])
def test_one_pass_gives_any_networks_maps_features_and_logits(name):
    model, x = common.create_backbone(name, num_classes=10).eval(), torch.rand(2, 3, 64, 64)
    (*maps, features), logits = common.forward_stages(model, x)
    torch.testing.assert_close(logits, model(x))
    headless = common.create_backbone(name).eval()
    headless.load_state_dict({k: v for k, v in model.state_dict().items() if k in headless.state_dict()})
    torch.testing.assert_close(features, headless(x))
    assert len(maps) >= 4 and all(m.ndim == 4 for m in maps)
