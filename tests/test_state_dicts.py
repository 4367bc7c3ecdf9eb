"""Other people's state dicts and folders: wrapped, without a name for what they are, or not to be believed."""

import json
import shutil
import zipfile

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from tools import disturb_batch_norm, make_backbone, stop_message
from torch import Tensor, nn

import common
import hub
from trainers.shared.run import save_backbone, save_head


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None, num_classes=10)
    disturb_batch_norm(network)
    return network.eval()


def features(network: nn.Module, x: Tensor) -> Tensor:
    trunk = nn.Sequential(*list(network.children())[:-1], nn.Flatten())
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    return trunk((x - mean) / std)


def under(prefix: str, state: dict) -> dict:
    return {f"{prefix}{k}": v for k, v in state.items()}


def wrapped(kind: str, network: nn.Module) -> dict:
    whole = network.state_dict()
    trunk = {k: v for k, v in whole.items() if not k.startswith("fc.")}
    numbered = nn.Sequential(*list(network.children())[:-1]).state_dict()
    head = {"0.weight": torch.zeros(8, 512), "0.bias": torch.zeros(8)}
    return {
        "compiled": under("_orig_mod.", whole),
        "compiled inside": under("module._orig_mod.", whole),
        "model.": {"model_state_dict": under("model.", whole)},
        "net.": {"epoch": 3, "net": under("net.", whole)},
        "backbone.": {"state_dict": under("backbone.", trunk)},
        "backbone and classifier": {"state_dict": {**under("backbone.", trunk), "fc.weight": whole["fc.weight"], "fc.bias": whole["fc.bias"]}},
        "encoder.": under("encoder.", trunk),
        "four deep": {"model": {"state_dict": under("module.model._orig_mod.backbone.", trunk)}},
        "Lightning": {"pytorch-lightning_version": "2.4.0", "state_dict": under("model.net.", whole), "callbacks": {}},
        "averaged": {"ema": {**under("module.", whole), "n_averaged": torch.tensor(5)}},
        "timm": {"state_dict_ema": whole, "state_dict": {k: v * 0 for k, v in whole.items()}, "arch": "resnet18"},
        "solo-learn": {"state_dict": {**under("backbone.", trunk), **under("projector.", head), **under("predictor.", head), **under("momentum_backbone.", trunk), "classifier.weight": whole["fc.weight"]}},
        "solo-learn, older": {"state_dict": {**under("encoder.", trunk), **under("projector.", head), **under("momentum_encoder.", trunk)}},
        "lightly": {"state_dict": {**under("backbone.", numbered), **under("projection_head.layers.", head), **under("prediction_head.layers.", head), **under("backbone_momentum.", numbered)}},
    }[kind]  # fmt: skip


KINDS = [
    "compiled", "compiled inside", "model.", "net.", "backbone.", "backbone and classifier", "encoder.", "four deep",
    "Lightning", "averaged", "timm", "solo-learn", "solo-learn, older", "lightly",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_wrapped_network_loads_whole(kind, resnet, tmp_path):
    torch.save(wrapped(kind, resnet), tmp_path / "file.pth")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for spec in (tmp_path / "file.pth", f"resnet18.a1_in1k@{tmp_path / 'file.pth'}"):
        teacher = hub.load_teacher(spec)
        torch.testing.assert_close(teacher(x), features(resnet, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_network_with_a_lost_key_is_refused_by_its_name(kind, resnet, tmp_path):
    content = wrapped(kind, resnet)
    states = [content, *(v for v in content.values() if isinstance(v, dict))]
    states += [v for state in states for v in state.values() if isinstance(v, dict)]
    for state in states:
        for key in [k for k in state if k.endswith(("layer2.0.bn1.weight", ".5.0.bn1.weight"))]:
            state[f"{key}_old"] = state.pop(key)
        for key in [k for k, v in state.items() if isinstance(v, Tensor)]:
            state[key] = torch.zeros(()).expand(state[key].shape)  # shapes are enough, and a small file
    torch.save(content, tmp_path / "file.pth")
    message = stop_message(hub.load_teacher, tmp_path / "file.pth")
    assert "missing (layer2.0.bn1.weight" in message and "bn1.weight_old" in message


def test_a_file_that_names_no_architecture_says_how_to_name_it(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "file.pth")
    assert f"--teacher ARCH@{tmp_path / 'file.pth'}" in stop_message(hub.load_teacher, tmp_path / "file.pth")
    for flag in ("--checkpoint", "--init-from"):
        assert f"{flag} ARCH@" in stop_message(hub.load_teacher, tmp_path / "file.pth", flag=flag)
    assert "did you mean" in stop_message(hub.load_teacher, f"test_vitt@{tmp_path / 'file.pth'}")
    assert "no file" in stop_message(hub.load_teacher, f"test_vit@{tmp_path / 'other.pth'}")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "test_byobnet"])
@torch.no_grad()
def test_a_named_architecture_loads_with_and_without_its_classifier(name, suffix, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=7).eval()
    disturb_batch_norm(network)
    file, state = tmp_path / f"file.{suffix}", under("model.", network.state_dict())
    safetensors.torch.save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(network.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    teacher = hub.load_teacher(f"{name}@{file}", num_classes=7)
    torch.testing.assert_close(teacher(x), network((x - mean) / std), rtol=1e-5, atol=1e-5)
    assert hub.load_teacher(f"{name}@{file}")(x).shape == (2, teacher.num_features)
    assert "7 classes" in stop_message(hub.load_teacher, f"{name}@{file}", num_classes=10)
    del state[next(k for k in state if k.endswith("weight") and "head" not in k)]
    torch.save(state, tmp_path / "cut.pth")
    assert "1 missing" in stop_message(hub.load_teacher, f"{name}@{tmp_path / 'cut.pth'}")


@torch.no_grad()
def test_dinov2s_own_names_and_its_grid_are_brought_to_timms(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=12, img_size=112).eval()
    state = {k: torch.randn_like(v) * 0.02 for k, v in network.state_dict().items()}
    network.load_state_dict(state)
    torch.save({**state, "mask_token": torch.zeros(1, 384)}, tmp_path / "dinov2.pth")
    teacher = hub.load_teacher(f"vit_small_patch14_dinov2@{tmp_path / 'dinov2.pth'}", image_size=112)
    assert torch.equal(teacher.backbone.pos_embed, network.pos_embed) and teacher.backbone.input_side == 112
    other = hub.load_teacher(f"vit_small_patch14_dinov2@{tmp_path / 'dinov2.pth'}", image_size=56).backbone
    assert other.pos_embed.shape[1] == 4 * 4 + 1 and other.input_side == 56


def test_efficientnet_pytorchs_names_load_by_either_name_and_know_the_photographs(real_images):
    file = real_images / "teachers" / "efficientnet-lite0.pth"
    teacher = hub.load_teacher(f"efficientnet_lite0@{file}", num_classes=1000)
    folder = hub.load_teacher(real_images / "teachers" / "efficientnet_lite0", num_classes=1000)
    assert teacher.facts["architecture"] == folder.facts["architecture"] == "tf_efficientnet_lite0"
    ours, theirs = teacher.backbone.state_dict(), folder.backbone.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())
    assert torch.equal(teacher.backbone.input_std, folder.backbone.input_std)
    assert hub.load_teacher(f"tf_efficientnet_lite0@{file}").num_features == 1280


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not to be believed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    save_backbone(folder, make_backbone("test_resnet"), 32)
    save_head(folder, nn.Linear(256, 4))
    return folder


HOSTILE = {
    "architecture": [None, 7, ["test_resnet"], {"a": 1}, "", "no_such_network", "local-dir:/tmp/x", "test_resnet" * 99],
    "num_classes": [10**9, -1, "ten", 1.5, True, [10]],
    "pretrained_cfg": [None, 3, "cfg", []],
    "pretrained_cfg.mean": ["grey", None, [0.5], [0.5, 0.5, "x"], [float("nan")] * 3, [1e30] * 3, [[0.5]] * 3],
    "pretrained_cfg.std": [[0, 0.2, 0.2], [float("nan")] * 3, [-0.2] * 3, [float("inf")] * 3, [0.2, 0.2], 0.2],
    "pretrained_cfg.input_size": [[3, 10**9, 10**9], [3, 32], 224, [1, 32, 32], [3, 32.5, 32.5], [3, 0, 0]],
    "pretrained_cfg.fixed_input_size": ["yes", 2],
    "pretrained_cfg.classifier": [7, {"a": 1}, [1]],
    "model_args": [[], {"depth": 10**9}, {"img_size": 10**9}, {"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"x": {}}, {"no_such_argument": 1}],
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_a_config_that_cannot_be_is_refused_in_one_line_that_names_the_file(key, release, tmp_path):
    folder = tmp_path / "release"
    shutil.copytree(release, folder)
    for value in HOSTILE[key]:
        config = json.loads((release / "config.json").read_text())
        owner, _, name = key.rpartition(".")
        (config[owner] if owner else config)[name] = value
        (folder / "config.json").write_text(json.dumps(config))
        message = stop_message(hub.load_teacher, folder)
        assert "config.json" in message and len(message) < 500, (value, message)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"text"', "{}", "[" * 100_000, '{"a":' * 100_000, "\x00"]
)
def test_a_config_that_is_cut_or_none_is_refused_in_one_line_that_names_the_file(text, release, tmp_path):
    shutil.copytree(release, tmp_path / "release")
    (tmp_path / "release" / "config.json").write_text(text)
    assert "config.json" in stop_message(hub.load_teacher, tmp_path / "release")
    (tmp_path / "release" / "config.json").write_bytes(b'{"architecture": "\xff\xfe"}')
    assert "config.json" in stop_message(hub.load_teacher, tmp_path / "release")


HEADS = [
    {"head": torch.zeros(3)},
    {"head.weight": torch.tensor(1.0)},
    {"head.999999999.weight": torch.zeros(4, 256)},
    {"head.\u00b2.weight": torch.zeros(4, 256)},
    {"other.weight": torch.zeros(4, 256)},
    {"head.0.weight": torch.zeros(4, 7)},
]


@pytest.mark.parametrize("state", HEADS, ids=lambda s: next(iter(s)))
def test_a_head_that_cannot_be_is_refused_in_one_line_that_names_the_file(state, release, tmp_path):
    shutil.copytree(release, tmp_path / "release")
    safetensors.torch.save_file(state, tmp_path / "release" / "head.safetensors")
    assert "head.safetensors" in stop_message(hub.load_teacher, tmp_path / "release")


def test_weights_whose_header_lies_are_refused_in_one_line(release, tmp_path):
    shutil.copytree(release, tmp_path / "release")
    file = tmp_path / "release" / "model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-10], b"\xff" * 8 + whole[8:], whole[:8] + b"[" * len(whole[8:])):
        file.write_bytes(content)
        assert "model.safetensors" in stop_message(hub.load_teacher, tmp_path / "release")


def test_a_file_that_unpacks_to_more_than_it_is_is_refused_unread(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1 << 22)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    assert "unpacks to 0.0168 GB" in stop_message(hub.load_teacher, tmp_path / "bomb.pth")
