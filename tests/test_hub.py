"""Checkpoints come in from the authors' files and go out to timm and to the Hub, and stay the same network."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from hub_server import BAD_TOKEN, CALLS, READ_TOKEN, WRITE_TOKEN, HubServer, run_together, said
from huggingface_hub import ModelCard
from runs import photographs
from tools import disturb_batch_norm, make_backbone, make_run, stop_message
from torch import Tensor, nn

import common
import hub
from trainers import moco, supervised
from trainers.shared.card import contradicts, inherited, read_licence
from trainers.shared.run import save_head

HUB = str(common.ROOT / "hub.py")


def images(count: int = 2, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def normalised(x: Tensor) -> Tensor:
    """ImageNet's mean and deviation, applied as our backbones do."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (common.IMAGENET_MEAN, common.IMAGENET_STD))
    return (x - mean) / std


# ---------------------------------------------------------------------------------------------------------------------
# The authors' files
# ---------------------------------------------------------------------------------------------------------------------


class SimSiamFile(nn.Module):
    """The modules of SimSiam's main_simsiam.py, by the names in its checkpoints: the projector is the encoder's fc."""

    def __init__(self, arch: str, dim: int):
        super().__init__()
        self.encoder = torchvision.models.get_model(arch, weights=None, num_classes=dim)
        width = self.encoder.fc.in_features
        self.encoder.fc = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(),
            self.encoder.fc, nn.BatchNorm1d(dim, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(dim, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, dim)
        )


class MoCoFile(nn.Module):
    """The modules of MoCo's main_moco.py: v1 has a Linear for a head, v2 a two-layer MLP."""

    def __init__(self, arch: str, mlp: bool):
        super().__init__()
        self.encoder_q, self.encoder_k = (
            torchvision.models.get_model(arch, weights=None, num_classes=128) for _ in range(2)
        )
        for encoder in (self.encoder_q, self.encoder_k):
            width = encoder.fc.in_features
            if mlp:
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        self.register_buffer("queue", torch.randn(128, 65536))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


def official_content(layout: str, arch: str) -> tuple[dict, nn.Module]:
    """What the authors' script would have saved, and the encoder whose weights these are."""
    network = SimSiamFile(arch, 256) if layout == "simsiam" else MoCoFile(arch, mlp=layout == "moco_v2")
    disturb_batch_norm(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()  # leaves momentum buffers behind
    state = {f"module.{k}": v for k, v in network.state_dict().items()}
    content = {"epoch": 100, "arch": arch, "state_dict": state, "optimizer": optimizer.state_dict()}
    return content, network.encoder if layout == "simsiam" else network.encoder_q


OFFICIAL = [(layout, arch) for arch in ("resnet18", "resnet50") for layout in ("simsiam", "moco_v1", "moco_v2")]


@pytest.fixture(scope="module", params=OFFICIAL, ids="-".join)
def official(request, tmp_path_factory):
    layout, arch = request.param
    content, encoder = official_content(layout, arch)
    file = tmp_path_factory.mktemp("official") / "checkpoint_0099.pth.tar"
    torch.save(content, file)
    yield layout, arch, encoder.eval(), hub.load_teacher(file)
    file.unlink()


@pytest.mark.parametrize("layout, fits", [("moco_v2", True), ("moco_v1", False)])
def test_init_from_takes_the_head_where_it_fits(layout, fits, tmp_path):
    content, encoder = official_content(layout, "resnet18")
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    backbone, head = (
        common.create_backbone("resnet18"),
        nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128)),
    )
    before = head[0].weight.clone()
    assert hub.load_weights(backbone, tmp_path / "checkpoint.pth.tar", head) is fits
    assert torch.equal(backbone.conv1.weight, encoder.conv1.weight)
    assert torch.equal(head[0].weight, encoder.fc[0].weight if fits else before)


@torch.no_grad()
def test_an_official_file_gives_the_original_networks_features_and_head(official):
    layout, arch, encoder, teacher = official
    embedding = encoder(normalised(images()))
    head, encoder.fc = encoder.fc, nn.Identity()
    expected = encoder(normalised(images()))
    encoder.fc = head
    features = teacher(images())
    assert features.shape == (2, teacher.num_features) == (2, {"resnet18": 512, "resnet50": 2048}[arch])
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.head(features), embedding, rtol=1e-5, atol=1e-5)
    assert teacher.facts["architecture"] == arch
    assert teacher.facts["format"] == {"simsiam": "SimSiam"}.get(layout, "MoCo")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_a_file_without_an_architecture_name_is_recognised_by_its_keys(tmp_path):
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    teacher = hub.load_teacher(tmp_path / "plain.pth")
    assert teacher.facts["architecture"] == "resnet18" and teacher.facts["format"] == "torchvision"
    with torch.no_grad():
        torch.testing.assert_close(teacher.head(teacher(images())), network(normalised(images())))


@pytest.fixture(scope="module")
def small_official():
    """Files to damage, without the optimizer and most of the queue, which only take time to write."""
    contents = {layout: official_content(layout, "resnet18")[0] for layout in ("simsiam", "moco_v2")}
    contents["moco_v2"]["state_dict"]["module.queue"] = torch.zeros(128, 64)
    return {layout: {**content, "optimizer": {}} for layout, content in contents.items()}


DAMAGED = [
    ("simsiam", "module.encoder.layer3.0.conv1.weight"),
    ("simsiam", "module.encoder.bn1.running_mean"),
    ("simsiam", "module.encoder.fc.3.weight"),
    ("simsiam", "module.encoder.fc.6.bias"),
    ("simsiam", "module.encoder.fc.7.running_mean"),
    ("moco_v2", "module.encoder_q.layer4.1.bn2.weight"),
    ("moco_v2", "module.encoder_q.fc.0.weight"),
    ("moco_v2", "module.encoder_q.fc.2.bias"),
]


@pytest.mark.parametrize("layout, key", DAMAGED)
def test_one_renamed_key_fails_by_its_name(small_official, tmp_path, layout, key):
    content = dict(small_official[layout])
    content["state_dict"] = {k if k != key else f"{k}_old": v for k, v in content["state_dict"].items()}
    torch.save(content, tmp_path / "renamed.pth.tar")
    message = stop_message(hub.load_teacher, tmp_path / "renamed.pth.tar")
    assert "renamed.pth.tar" in message and f"{key.split('.', 2)[2]}_old" in message


@pytest.mark.parametrize("layout, key", DAMAGED)
def test_one_tensor_of_a_wrong_shape_fails_by_its_name(small_official, tmp_path, layout, key):
    content = dict(small_official[layout])
    tensor = content["state_dict"][key]
    wrong = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1)
    content["state_dict"] = {**content["state_dict"], key: wrong}
    torch.save(content, tmp_path / "misshapen.pth.tar")
    message = stop_message(hub.load_teacher, tmp_path / "misshapen.pth.tar")
    assert f"{key.split('.', 2)[2]} {tuple(wrong.shape)}" in message


@pytest.mark.parametrize("kind", ["missing", "stray"])
def test_a_lost_or_a_foreign_tensor_fails_by_its_name(small_official, tmp_path, kind):
    content = dict(small_official["simsiam"])
    state = dict(content["state_dict"])
    if kind == "missing":
        del state["module.encoder.layer2.0.downsample.0.weight"]
    else:
        state["module.memory.layer2.0.downsample.0.weight"] = torch.zeros(3)
    torch.save({**content, "state_dict": state}, tmp_path / "file.pth.tar")
    assert "layer2.0.downsample.0.weight" in stop_message(hub.load_teacher, tmp_path / "file.pth.tar")


class RunsCode:
    """A pickle of this runs a shell command as soon as it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, zipped):
    file, marker = tmp_path / "evil.pth.tar", tmp_path / "it_ran"
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "args": RunsCode(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    message = stop_message(hub.load_teacher, file)
    assert "evil.pth.tar" in message and "refused" in message and "system" in message
    assert not marker.exists()


def broken_files(folder: Path) -> dict[str, Path]:
    """Files that are no checkpoint, one of each kind."""
    files = {name: folder / f"{name}.pth" for name in ("empty", "text", "html", "truncated", "cut_legacy", "a_list")}
    files["empty"].write_bytes(b"")
    files["text"].write_text("hello, this is no checkpoint\n")
    files["html"].write_text("<!DOCTYPE html><html>404 Not Found</html>\n")
    for name, zipped in (("truncated", True), ("cut_legacy", False)):
        torch.save({"weight": torch.ones(10_000)}, files[name], _use_new_zipfile_serialization=zipped)
        files[name].write_bytes(files[name].read_bytes()[:20_000])
    torch.save([torch.ones(2)], files["a_list"])
    files["no_tensors"] = folder / "no_tensors.pth"
    torch.save({"epoch": 3}, files["no_tensors"])
    files["safetensors"] = folder / "weights.safetensors"
    files["safetensors"].write_bytes(b"1234567890" * 9)
    return files


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_that_names_it(tmp_path):
    files = broken_files(tmp_path)
    assert len(files) == 8
    for file in files.values():
        assert str(file) in stop_message(hub.load_teacher, file)


@pytest.mark.parametrize("spec", ["missing.pth.tar", "/nowhere/checkpoint.pth.tar", "runs/nothing_here", "./nothing"])
def test_a_missing_teacher_is_named_and_the_ways_to_get_one_are_listed(spec):
    message = stop_message(hub.load_teacher, spec)
    assert f"--teacher {spec}" in message and "no such file" in message


def test_a_file_with_flags_and_numpy_numbers_beside_its_weights_loads(small_official, tmp_path):
    extra = {
        "args": argparse.Namespace(lr=0.03, data=Path("/data"), schedule=[120, 160]),
        "best_acc1": np.float64(67.5),
        "history": np.arange(3.0),
        "count": np.int64(7),
    }
    torch.save({**small_official["moco_v2"], **extra}, tmp_path / "with_extras.pth.tar")
    assert hub.load_teacher(tmp_path / "with_extras.pth.tar").num_features == 512


# ---------------------------------------------------------------------------------------------------------------------
# Our own folders
# ---------------------------------------------------------------------------------------------------------------------


NETWORKS = {"resnet18": 512, "resnet18_small": 512, "mobilenetv3_small_100": 1024, "efficientnet_b0": 1280}


@torch.no_grad()
@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_release_is_the_same_network_in_timm(tmp_path, name, num_classes):
    backbone = make_backbone(name, num_classes=num_classes)
    make_run(tmp_path / "run", backbone)
    release = hub.build_release(tmp_path / "run")
    assert {f.name for f in release.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    spec = f"local-dir:{release}"
    loaded = timm.create_model(spec, pretrained=True).eval()
    assert torch.equal(loaded(normalised(images())), backbone(images()))

    features = timm.create_model(spec, pretrained=True, num_classes=0).eval()(normalised(images()))
    teacher = hub.load_teacher(release)
    assert torch.equal(teacher(images()), features)
    assert torch.equal(hub.load_teacher(tmp_path / "run")(images()), features)
    config = json.loads((release / "config.json").read_text())
    assert features.shape[1] == config["num_features"] == teacher.num_features == NETWORKS[name]

    other = timm.create_model(spec, pretrained=True, num_classes=7).eval()
    assert other(normalised(images())).shape == (2, 7)
    assert torch.equal(other.forward_head(other.forward_features(normalised(images())), pre_logits=True), features)

    maps = timm.create_model(spec, pretrained=True, features_only=True).eval()(normalised(images()))
    assert len(maps) == 5 and all(m.isfinite().all() for m in maps)
    assert torch.equal(maps[-1], deepest_map(backbone, name))


def deepest_map(backbone: nn.Module, name: str) -> Tensor:
    """What timm's features_only ends in: the last stage, before a head's own convolution."""
    if name.startswith("resnet"):
        return backbone.forward_features(normalised(images()))
    x = backbone.bn1(backbone.conv_stem(normalised(images())))
    return backbone.blocks(x)


@torch.no_grad()
def test_a_supervised_run_is_a_teacher_with_and_without_its_classifier(tmp_path):
    backbone = make_backbone("test_resnet", num_classes=10)
    make_run(tmp_path / "run", backbone, supervised)
    with_classifier = hub.load_teacher(tmp_path / "run", num_classes=10)
    assert torch.equal(with_classifier(images()), backbone(images()))
    features = hub.load_teacher(tmp_path / "run")(images())
    assert torch.equal(backbone.get_classifier()(features), backbone(images()))
    assert "10 classes, the data has 7" in stop_message(hub.load_teacher, tmp_path / "run", num_classes=7)
    card = (hub.build_release(tmp_path / "run") / "README.md").read_text()
    assert "num_classes=0" in card, "the card's three lines must give features, not logits"


@torch.no_grad()
def test_training_may_start_from_a_release(tmp_path):
    make_run(tmp_path / "run", make_backbone("test_resnet"))
    fresh = common.create_backbone("test_resnet").eval()
    hub.load_weights(fresh, str(hub.build_release(tmp_path / "run")))
    assert torch.equal(fresh(images()), make_backbone("test_resnet")(images()))
    message = stop_message(hub.load_weights, common.create_backbone("resnet18"), str(tmp_path / "run"))
    assert "--init-from" in message and "does not fit resnet18" in message


@pytest.mark.parametrize("kind", ["linear", "mlp", "dropout", "deep"])
@torch.no_grad()
def test_a_runs_projection_head_comes_along_as_a_teachers(tmp_path, kind):
    backbone = make_backbone("test_resnet")
    encoder = moco.Encoder(backbone, moco.create_head(kind, backbone.num_features, 48, 32)).eval()
    args = moco.Args(run_dir=tmp_path / "run", image_size=32)
    hub.Run(args, moco.__file__, Accelerator(cpu=True)).save(3, {"encoder_q": encoder}, backbone)
    for folder in (tmp_path / "run", hub.build_release(tmp_path / "run")):
        teacher = hub.load_teacher(folder)
        embedding = F.normalize(teacher.head(teacher(images())), dim=1)
        torch.testing.assert_close(embedding, encoder(images()), rtol=1e-6, atol=1e-6)
    fresh = moco.create_head(kind, backbone.num_features, 48, 32)
    assert hub.load_weights(common.create_backbone("test_resnet"), tmp_path / "run", fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), encoder.head.parameters(), strict=True))
    spec = f"local-dir:{tmp_path / 'run' / 'release'}"
    x = (images() - backbone.input_mean) / backbone.input_std
    assert torch.equal(timm.create_model(spec, pretrained=True).eval()(x), backbone(images()))


def test_a_head_that_its_keys_do_not_describe_is_left_out(tmp_path):
    save_head(tmp_path, nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)))
    save_head(tmp_path, nn.Identity())
    save_head(tmp_path, None)
    assert not list(tmp_path.iterdir())


DAMAGES = {
    "config.json": ["{", "[]", "{}", '{"architecture": "resnet19"}', "\x00"],
    "model.safetensors": ["", "not tensors"],
}


@pytest.mark.parametrize("file, text", [(file, text) for file, texts in DAMAGES.items() for text in texts])
def test_a_damaged_release_is_refused_in_one_line(tmp_path, file, text):
    make_run(tmp_path / "run", make_backbone("test_resnet"))
    release = hub.build_release(tmp_path / "run")
    (release / file).write_text(text)
    message = stop_message(hub.load_teacher, release)
    assert "--teacher" in message or "timm has no such model" in message


def test_a_run_without_a_checkpoint_cannot_be_released(tmp_path):
    assert "no checkpoint to release" in stop_message(hub.build_release, tmp_path)
    assert "no checkpoint to release" in stop_message(hub.push, tmp_path / "nowhere", "tester/x")


# ---------------------------------------------------------------------------------------------------------------------
# Cards and licences
# ---------------------------------------------------------------------------------------------------------------------


def non_commercial_run(folder: Path) -> hub.Run:
    run = make_run(folder, make_backbone("test_resnet"), data="/srv/private/photos", init_from="/srv/private/a.pth",
                   subset="/srv/private/names.txt")  # fmt: skip
    facts = {"source": "moco_v2_r50_800ep", "licence": "cc-by-nc-4.0", "architecture": "resnet50", "format": "MoCo"}
    (folder / "teacher.json").write_text(json.dumps(facts))
    return run


def test_the_teachers_licence_reaches_the_card_and_stays_there(tmp_path):
    non_commercial_run(tmp_path / "run")
    card = (hub.build_release(tmp_path / "run") / "README.md").read_text()
    assert ModelCard(card).data.license == "cc-by-nc-4.0"
    assert "| teacher | cc-by-nc-4.0 |" in card and "| **these weights** | **cc-by-nc-4.0** |" in card
    assert "Not for commercial use" in card
    assert hub.load_teacher(tmp_path / "run").facts["licence"] == "cc-by-nc-4.0", (
        "a student of the student inherits it"
    )
    message = stop_message(hub.push, tmp_path / "run", "tester/x", licence="apache-2.0")
    assert "cc-by-nc-4.0" in message and "--accept-licence" in message
    assert (tmp_path / "run" / "release" / "README.md").read_text() == card


@pytest.mark.parametrize(
    "parts, licence",
    [
        ((), "apache-2.0"),
        (("mit", "cc-by-4.0"), "apache-2.0"),
        (("unknown",), "unknown"),
        (("gpl-3.0", "cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (("cc-by-nc-sa-4.0", "mit", "imagenet non-commercial"), "cc-by-nc-sa-4.0 and imagenet non-commercial"),
        (("cc-by-sa-4.0", "apache-2.0"), "cc-by-sa-4.0"),
    ],
)
def test_what_binds_in_a_chain_is_handed_down(parts, licence):
    assert inherited(parts) == licence
    assert not contradicts(licence, licence)
    assert contradicts("mit", licence) is (licence not in ("apache-2.0", "unknown"))


def test_a_licence_is_read_where_a_card_states_one(tmp_path):
    stated = {"license: mit\n": "mit", "license:\n- mit\n": "mit", "license:\n  - 'mit'\n": "mit", "": "unknown"}
    stated |= {"license: other\nlicense_name: a b\n": "a b", "license:\ntags:\n- x\n": "unknown"}
    for text, licence in stated.items():
        (tmp_path / "README.md").write_text(f"---\nlibrary_name: timm\n{text}tags: [x]\n---\nlicense: gpl-3.0\n")
        assert read_licence(tmp_path / "README.md") == licence, text
    assert read_licence(tmp_path / "nothing.md") == "unknown"


def test_the_datas_licence_and_the_starts_reach_the_card(tmp_path):
    table = tmp_path / "photos"
    table.mkdir()
    pixel = io.BytesIO()
    PIL.Image.new("RGB", (40, 40)).save(pixel, "png")
    images = [{"bytes": pixel.getvalue(), "path": None}] * 4
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features).to_parquet(table / "train.parquet")
    (table / "README.md").write_text("---\nlicense:\n- cc-by-nc-4.0\ntags: [x]\n---\n# Photos\n")
    source = common.open_source(str(table), "train")
    assert source.licence == "cc-by-nc-4.0" and common.open_source("digits", "train").licence == "cc-by-4.0"

    backbone = make_backbone("test_resnet")
    backbone.started_from = {"source": "theirs.pth", "licence": "gpl-3.0", "architecture": "test_resnet"}
    run = make_run(tmp_path / "run", backbone, data=str(table))
    view = (common.eval_recipe(32), 32)
    run.start(0, 1, common.Batches(source, [view], 4, seed=0, device=torch.device("cpu")))
    text = (hub.build_release(tmp_path / "run") / "README.md").read_text()
    assert "| data | photos |" in text and "| data | cc-by-nc-4.0 |" in text
    assert "| started from | theirs.pth (test_resnet) |" in text and "| started from | gpl-3.0 |" in text
    assert ModelCard(text).data.license == "cc-by-nc-4.0"


def test_a_card_names_no_path_of_the_training_machine(tmp_path):
    non_commercial_run(tmp_path / "run")
    card = (hub.build_release(tmp_path / "run") / "README.md").read_text()
    assert "/srv" not in card and str(tmp_path) not in card and str(Path.home()) not in card
    assert "| data | photos |" in card and '"subset": "names.txt"' in card


def test_a_card_shows_figures_curve_and_citation(tmp_path):
    run = make_run(tmp_path / "run", make_backbone("test_resnet"), data="digits")
    log = "".join(json.dumps({"step": i, "loss": 1 / (i + 1), "z_std": 1.0}) + "\n" for i in range(9))
    (tmp_path / "run" / "metrics.jsonl").write_text(log + '{"step": 9, "lo')  # a line that a kill cut short
    hub.finish(run, None, {"knn raw pixels": 55.5, "knn trained backbone": 93.06})
    probe = tmp_path / "probe"
    probe.mkdir()
    (probe / "results.json").write_text('{"trainer": "eval_linear", "top1": 91.25, "checkpoint": "run"}')
    release = hub.build_release(tmp_path / "run", [probe])
    found = ModelCard.load(release / "README.md").data
    metrics = {r.metric_name: r.metric_value for r in found.eval_results}
    assert metrics == {"simsiam: knn trained backbone, percent": 93.06, "probe: top1, percent": 91.25}
    assert {r.dataset_name for r in found.eval_results} == {"digits"} and "simsiam" in found.tags
    text = (release / "README.md").read_text()
    assert "| simsiam | knn raw pixels | 55.50 |" in text and "| probe | top1 | 91.25 |" in text
    assert "![training curve](training.png)" in text and PIL.Image.open(release / "training.png").width > 500
    assert "eprint = {2011.10566}" in text and "author = {Chen and He}" in text
    assert "--evals" in stop_message(hub.build_release, tmp_path / "run", [tmp_path / "nothing"])


def test_files_exported_from_the_same_weights_stay_in_the_release(tmp_path):
    run = make_run(tmp_path / "run", backbone := make_backbone("test_resnet"))
    hub.build_release(tmp_path / "run")
    (tmp_path / "run" / "release" / "model.onnx").write_bytes(b"exported")
    assert (hub.build_release(tmp_path / "run") / "model.onnx").read_bytes() == b"exported"
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    run.save(4, {"model": backbone}, backbone)
    assert not (hub.build_release(tmp_path / "run") / "model.onnx").exists()


@pytest.mark.parametrize("name", ["resnet18_small", "mobilenetv3_small_100"])
def test_only_an_architecture_of_ours_asks_for_our_code(tmp_path, capsys, name):
    hub.finish(make_run(tmp_path / "run", make_backbone(name)), None, {})
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    ours = name == "resnet18_small"
    assert ("import common" in card) is ours
    assert ("import common" in capsys.readouterr().out) is ours


# ---------------------------------------------------------------------------------------------------------------------
# The Hub: our commands and timm in processes of their own, against a local server
# ---------------------------------------------------------------------------------------------------------------------

CONSUMER = """
import sys, torch, common, hub, timm
x, out = torch.load(sys.argv[1]), {}
out["timm"] = timm.create_model("hf-hub:tester/student", pretrained=True).eval()(x["normalised"])
teacher = hub.load_teacher("tester/student")
out["teacher"], out["facts"] = teacher(x["images"]), teacher.facts
torch.save(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """One life of a release: built, pushed, pulled by others, used offline, asked for when the Hub is gone."""
    folder = tmp_path_factory.mktemp("session")
    run, licensed, question = folder / "run", folder / "licensed", folder / "question.pt"
    backbone = make_backbone("resnet18_small")
    make_run(run, backbone)
    non_commercial_run(licensed)
    torch.save({"images": images(), "normalised": normalised(images())}, question)
    other, student, nothing = str(licensed), [str(licensed), "tester/student"], "tester/nothing"
    shared = {"licence": "apache-2.0", "accept_licence": True}
    calls = [
        ("push, accepted", WRITE_TOKEN, "push", [other, "tester/licensed"], shared),
        ("push again", WRITE_TOKEN, "push", [other, "tester/licensed"], shared),
        ("push, bad token", BAD_TOKEN, "push", student, {}),
        ("push, read token", READ_TOKEN, "push", student, {}),
        ("push, no token", "", "push", student, {}),
        ("push to others", WRITE_TOKEN, "push", [other, "others/student"], {}),
        ("push, bad name", WRITE_TOKEN, "push", [other, "not a name"], {}),
        ("push, private", WRITE_TOKEN, "push", [other, "tester/secret"], {"private": True}),
        ("pull, bad token", BAD_TOKEN, "pull", ["tester/student"], {}),
        ("pull, no repo", WRITE_TOKEN, "pull", [nothing], {}),
        ("pull, no revision", WRITE_TOKEN, "pull", ["tester/student"], {"revision": "v9"}),
        ("pull, private", "", "pull", ["tester/secret"], {}),
        ("pull, own private", READ_TOKEN, "pull", ["tester/secret"], {}),
        ("teacher, no repo", "", "load_teacher", [nothing], {}),
    ]
    released = [str(run / "release"), "tester/student"]  # not rebuilt: several processes push it at once
    down = [("push", WRITE_TOKEN, "push", released, {}), ("pull", "", "pull", [nothing], {})]
    (folder / "consumer.py").write_text(CONSUMER)
    (folder / "calls.py").write_text(CALLS)

    def consume(answer: str) -> list[str]:
        return [str(folder / "consumer.py"), str(question), str(folder / answer)]

    def call(calls: list) -> list[str]:
        return [str(folder / "calls.py"), json.dumps(calls)]

    with HubServer() as server:
        reader, writer = server.environment(folder / "cache"), server.environment(folder / "cache", WRITE_TOKEN)
        done = run_together(
            help=(reader, [HUB, "--help"]),
            build=(reader, [HUB, "build", str(licensed)]),
            push=(writer, [HUB, "push", str(run), "tester/student"]),
        )
        pushed = dict(server.files("tester/student"))
        commit = {"revision": server.repos["tester/student"].commits[-1].sha}
        version = ("pull, by commit", "", "pull", ["tester/student"], commit)
        done |= run_together(
            consumer=(reader, consume("online.pt")),
            pull=(reader, [HUB, "pull", "tester/student", "--to", str(folder / "pulled")]),
            calls=(server.environment(folder / "empty cache"), call([*calls, version])),
        )
        files = {repo: server.files(repo) for repo in server.repos}
    done |= run_together(
        inspect=(reader, [HUB, "inspect", str(licensed)]),  # not above: `calls` pushes this run, which rebuilds it
        offline=({**reader, "HF_HUB_OFFLINE": "1"}, consume("offline.pt")),
        uncached=({**reader, "HF_HUB_OFFLINE": "1"}, call(down)),
        down=(server.environment(folder / "another empty cache"), call(down)),
    )
    yield argparse.Namespace(
        done=done,
        folder=folder,
        backbone=backbone,
        pushed=pushed,
        files=files,
        calls=len(calls) + 1,
        requests=server.requests,
    )
    shutil.rmtree(folder)


def test_every_command_of_hub_py_ends_well(session):
    commands = {name: session.done[name] for name in ("help", "build", "push", "pull", "inspect")}
    assert {name: p.returncode for name, p in commands.items()} == dict.fromkeys(commands, 0)
    for word in ("build", "push", "pull", "inspect", "to-detectron2"):
        assert word in commands["help"].stdout
    assert commands["build"].stdout.strip() == str(session.folder / "licensed" / "release")
    assert commands["push"].stdout.strip().endswith("/tester/student")
    assert commands["pull"].stdout.strip() == str(session.folder / "pulled")
    assert "test_resnet" in commands["inspect"].stdout and "96" in commands["inspect"].stdout


def test_push_uploads_the_release_and_pull_brings_it_back(session):
    release = {f.name: f.read_bytes() for f in (session.folder / "run" / "release").iterdir()}
    assert b"hf-hub:ORG/NAME" in release["README.md"]
    release["README.md"] = release["README.md"].replace(b"ORG/NAME", b"tester/student")  # the card names where it is
    assert len(release) == 3 and {name: session.pushed[name] for name in release} == release
    pulled = {f.name: f.read_bytes() for f in (session.folder / "pulled").iterdir() if f.is_file()}
    assert pulled == release
    assert "PUT" in {method for method, _ in session.requests}, "the weights must have gone through LFS"


@pytest.mark.parametrize("when", ["consumer", "offline"])
def test_timm_and_the_teacher_flag_load_a_pushed_student_in_a_new_process(session, when):
    process = session.done[when]
    assert process.returncode == 0, process.stderr
    got = torch.load(session.folder / {"consumer": "online.pt", "offline": "offline.pt"}[when])
    with torch.no_grad():
        expected = session.backbone(images())
    assert torch.equal(got["timm"], expected) and torch.equal(got["teacher"], expected)
    assert got["facts"]["source"] == "hf-hub:tester/student" and got["facts"]["licence"] == "apache-2.0"


REFUSED = {
    "push, bad token": ("tester/student", "401", "hf auth login"),
    "push, read token": ("tester/student", "403", "a token that may write there"),
    "push, no token": ("tester/student", "hf auth login"),
    "push to others": ("others/student", "403", "a token that may write there"),
    "push, bad name": ("not a name", "org/name"),
    "pull, bad token": ("tester/student", "401", "hf auth login"),
    "pull, no repo": ("tester/nothing", "check the name"),
    "pull, no revision": ("tester/student", "no such revision"),
    "pull, private": ("tester/secret", "log in"),
    "teacher, no repo": ("--teacher tester/nothing", "check the name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_of_the_hub_is_one_line_with_the_remedy(session, case):
    worked, message = said(session.done["calls"])[case]
    assert not worked and "\n" not in message
    assert [part for part in REFUSED[case] if part not in message] == [], message


def test_what_should_work_on_the_hub_does_and_nothing_else_was_uploaded(session):
    answers = said(session.done["calls"])
    assert len(answers) == session.calls
    assert {name for name, (worked, _) in answers.items() if not worked} == set(REFUSED)
    assert set(session.files) == {"tester/student", "tester/licensed", "tester/secret"}


def test_a_licence_that_was_taken_upon_oneself_is_the_cards(session):
    card = session.files["tester/licensed"]["README.md"].decode()
    assert ModelCard(card).data.license == "apache-2.0" and "| **these weights** | **apache-2.0** |" in card


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_a_hub_that_is_down_is_one_line_with_the_remedy(session, verb):
    worked, message = said(session.done["down"])[verb]
    assert not worked and "\n" not in message
    assert message.startswith(f"{verb} tester/") and "check the connection" in message


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_offline_mode_is_named_where_the_hub_is_needed(session, verb):
    worked, message = said(session.done["uncached"])[verb]
    assert not worked and "\n" not in message
    assert message.startswith(f"{verb} tester/") and "HF_HUB_OFFLINE is set" in message


def test_a_failed_upload_loses_no_run_and_names_the_command_to_retry(tmp_path, capsys):
    run = make_run(tmp_path / "run", make_backbone("test_resnet"))
    run.args = dataclasses.replace(run.args, push_to_hub="tester/student")
    release = hub.finish(run, None, {"knn trained": 50.0})  # HF_HUB_OFFLINE is set: no upload can succeed
    said = capsys.readouterr().out
    assert "push tester/student" in said and "the run is whole" in said
    assert f"python hub.py push {tmp_path / 'run'} tester/student" in said
    assert hub.load_teacher(release).num_features == 96
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["knn trained"] == 50.0 and results["trainer"] == "simsiam"
    assert results["versions"]["torch"] == torch.__version__ and "commit" in results["versions"]


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def test_the_list_shows_teachers_and_runs(tmp_path):
    run = make_run(tmp_path / "runs" / "done", make_backbone("test_resnet"), data="digits")
    hub.finish(run, None, {"knn trained backbone": 93.06})
    make_run(tmp_path / "runs" / "going", make_backbone("test_resnet"), data="/srv/photos")
    done = subprocess.run([sys.executable, HUB, "list", str(tmp_path / "runs")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in done.stdout.splitlines() if line}
    assert "68.10 cc-by-nc-4.0 simsiam README" == rows["simsiam_r50_100ep"]
    assert rows[f"{tmp_path}/runs/done"] == "93.06 apache-2.0 resnet50, simsiam, digits"
    assert rows[f"{tmp_path}/runs/going"] == "step 3 unknown resnet50, simsiam, photos"


def test_a_report_is_one_table_of_runs_and_evaluations(tmp_path):
    def finished(name: str, trainer: str, **results) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({"trainer": trainer, **results}))
        (tmp_path / name / "args.json").write_text('{"data": "/somewhere/photos"}')
        return str(tmp_path / name)

    runs = [
        finished("knn a", "eval_knn", checkpoint="a", data="digits", **{"backbone k=1": 90.125, "query_images": 360}),
        finished("knn b", "eval_knn", checkpoint="b", data="digits", **{"backbone k=1": 80.0}),
        finished("again", "eval_knn", checkpoint="b", data="digits", **{"backbone k=1": 81.0}),
        finished("probe", "eval_linear", checkpoint="b", data="digits", top1=70.5, uniformity=-0.25),
        finished("train", "smd", **{"knn teacher": 93.0}),
    ]
    done = subprocess.run([sys.executable, HUB, "report", *runs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert rows == [
        ["", "a", "b", runs[4]],
        ["---", "---:", "---:", "---:"],
        ["eval_knn on digits: backbone k=1", "90.12", "80.00", ""],
        ["eval_knn on digits: backbone k=1 (again)", "", "81.00", ""],
        ["eval_linear on digits: top1", "", "70.50", ""],
        ["eval_linear on digits: uniformity", "", "-0.2500", ""],
        ["smd on photos: knn teacher", "", "", "93.00"],
    ]
    assert "no results.json" in stop_message(hub.report, [tmp_path / "nowhere"])


def test_a_fingerprint_tells_data_sets_apart(tmp_path):
    one, two = common.open_source("digits"), common.open_source("digits")
    assert one.fingerprint() == two.fingerprint()
    two.pixels = two.pixels.clone()
    two.pixels[-1, 0, 0, 0] ^= 1
    relabelled = dataclasses.replace(one, labels=one.labels.flip(0))
    part = one.take(range(len(one) - 1))
    photos = common.open_source(str(photographs(tmp_path / "photos", 8)), resident=False)
    others = common.open_source(str(photographs(tmp_path / "others", 8, sides=(101, 141))), resident=False)
    prints = [source.fingerprint() for source in (one, two, relabelled, part, photos, others)]
    assert len(set(prints)) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Detectron2
# ---------------------------------------------------------------------------------------------------------------------


def detectron2_names(bottleneck: bool, blocks: tuple[int, ...]) -> dict[str, str]:
    """{Detectron2's name: ours} of a ResNet, built up from what Detectron2's ResNet is made of."""
    found, statistics = {}, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    def convolution(theirs: str, ours: str, norm: str) -> None:
        found[f"{theirs}.weight"] = f"{ours}.weight"
        found.update({f"{theirs}.norm.{name}": f"{norm}.{name}" for name in statistics})

    convolution("stem.conv1", "conv1", "bn1")
    for stage, count in enumerate(blocks, start=1):
        for i in range(count):
            theirs, ours = f"res{stage + 1}.{i}", f"layer{stage}.{i}"
            for n in (1, 2, 3) if bottleneck else (1, 2):
                convolution(f"{theirs}.conv{n}", f"{ours}.conv{n}", f"{ours}.bn{n}")
            if i == 0 and (stage > 1 or bottleneck):
                convolution(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1")
    return found


RESNETS = {"resnet18": (False, (2, 2, 2, 2)), "resnet34": (False, (3, 4, 6, 3)), "resnet50": (True, (3, 4, 6, 3))}


@pytest.mark.parametrize("name", RESNETS)
def test_a_release_becomes_detectron2s_file_key_by_key(name, tmp_path, capsys):
    backbone = make_backbone(name)
    make_run(tmp_path / "run", backbone)
    hub._to_detectron2(str(tmp_path / "run"), tmp_path / "out.pkl")
    content = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert set(content) == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True and isinstance(content["__author__"], str)
    names, state = detectron2_names(*RESNETS[name]), backbone.state_dict()
    assert set(content["model"]) == set(names) and set(names.values()) == set(state) and len(names) > 100
    for theirs, ours in names.items():
        value = content["model"][theirs]
        assert isinstance(value, np.ndarray) and np.array_equal(value, state[ours].numpy()), theirs
    said, (bottleneck, _) = capsys.readouterr().out, RESNETS[name]
    assert f"MODEL.RESNETS.DEPTH {name[6:]} " in said and f"MODEL.WEIGHTS {tmp_path / 'out.pkl'}" in said
    assert f"RES2_OUT_CHANNELS {256 if bottleneck else 64} " in said and "STRIDE_IN_1X1 False" in said
    assert 'MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]" MODEL.PIXEL_STD "[58.395, 57.12, 57.375]"' in said
    assert ("NUM_GROUPS 1 MODEL.RESNETS.WIDTH_PER_GROUP 64" in said) == bottleneck


def test_the_authors_file_keeps_its_head_under_the_stem(tmp_path):
    """Their converter takes everything below encoder_q: the projection head becomes stem.fc."""
    backbone, head = make_backbone("resnet18"), nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    state = {f"module.encoder_q.{k}": v for k, v in backbone.state_dict().items()}
    state |= {f"module.encoder_q.fc.{k}": v for k, v in head.state_dict().items()}
    state |= {"module.queue": torch.zeros(128, 4), "module.encoder_k.conv1.weight": torch.zeros(1)}
    torch.save({"arch": "resnet18", "epoch": 200, "state_dict": state}, tmp_path / "moco.pth.tar")
    hub.to_detectron2(tmp_path / "moco.pth.tar", tmp_path / "out.pkl")
    model = pickle.loads((tmp_path / "out.pkl").read_bytes())["model"]
    heads = {f"stem.fc.{k}": v for k, v in head.state_dict().items()}
    assert set(model) == set(detectron2_names(*RESNETS["resnet18"])) | set(heads) and len(heads) == 4
    assert all(np.array_equal(model[k], v) for k, v in heads.items())


@pytest.mark.parametrize(
    "name, why",
    [("test_efficientnet", "conv_stem"), ("resnet18_small", "3x3"), ("test_resnet", "conv1.0"), ("resnet18d", "conv1.0")],
)  # fmt: skip
def test_what_detectron2_has_no_names_for_is_refused(name, why, tmp_path):
    make_run(tmp_path / "run", make_backbone(name))
    message = stop_message(hub.to_detectron2, tmp_path / "run", tmp_path / "out.pkl")
    assert message.startswith(f"to-detectron2 {tmp_path / 'run'}: {name}") and why in message
    assert not (tmp_path / "out.pkl").exists()


def test_detectron2_errors_are_one_line(tmp_path):
    message = stop_message(hub.to_detectron2, "/nowhere/run", tmp_path / "out.pkl")
    assert message.startswith("to-detectron2 /nowhere/run: no such file")
    make_run(tmp_path / "run", make_backbone("resnet18"))
    message = stop_message(hub.to_detectron2, tmp_path / "run", tmp_path / "nowhere" / "out.pkl")
    assert "out.pkl: No such file" in message
