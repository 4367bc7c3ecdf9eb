"""An exported file is the same network: in its own runtime, for any batch, without this repository."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ENV, tiny_run
from tools import make_backbone, make_run, stop_message
from torch import Tensor, nn

import common
import hub
from trainers.shared import export as chapter
from trainers.shared.networks import GroupedBatchNorm
from trainers.shared.run import save_head

onnx = pytest.importorskip("onnx", reason="pip install -e .[export]")
pytest.importorskip("onnxscript", reason="pip install -e .[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e .[export]")

HUB = str(common.ROOT / "hub.py")


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def normalised(x: Tensor, backbone: nn.Module) -> Tensor:
    return (x - backbone.input_mean) / backbone.input_std


def in_runtime(file, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image"] and session.get_inputs()[0].shape[0] == "batch"
    return torch.from_numpy(session.run(["features"], {"image": x.numpy()})[0])


def assert_no_path_of_this_machine(file: Path) -> None:
    content = file.read_bytes()
    assert len(content) > 100_000
    for path in (common.ROOT, sys.prefix, Path(torch.__file__).parent.parent, file.parent.parent):
        assert str(path).encode() not in content, path


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() > 0


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run without head or classifier whose network is exported in no time."""
    folder = tmp_path_factory.mktemp("small") / "run"
    make_run(folder, make_backbone("test_resnet"))
    return folder


NETWORKS = {  # name: side
    "resnet18": 64,
    "mobilenetv3_large_100": 64,
    "efficientnet_b0": 64,
    "vit_tiny_patch16_224": 224,
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_features_equal_torchs_for_any_batch(tmp_path, name):
    backbone, side = make_backbone(name), NETWORKS[name]
    make_run(tmp_path / "run", backbone, image_size=side)
    hub._export(str(tmp_path / "run"))
    file = tmp_path / "run" / "release" / "model.onnx"
    found = sorted(f.name for f in file.parent.iterdir())
    assert found == ["README.md", "config.json", "model.onnx", "model.safetensors"]
    for count in (1, 5):
        x = images(count, side)
        assert_same(in_runtime(file, normalised(x, backbone)), backbone(x))
    assert_no_path_of_this_machine(file)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", chapter.OPSET)]
    facts = {p.key: p.value for p in model.metadata_props}
    assert facts["architecture"] == name and facts["input"].startswith(f"(B, 3, {side}, {side})")
    assert facts["output"] == f"(B, {backbone.num_features})"


@torch.no_grad()
def test_a_student_with_grouped_batch_norm_and_a_head(tmp_path, capsys):
    backbone = make_backbone("resnet18_small")
    common.set_batch_norm_groups(backbone, 2, 4)
    assert isinstance(backbone.bn1, GroupedBatchNorm)
    make_run(tmp_path / "run", backbone)
    release = hub.build_release(tmp_path / "run")
    head = nn.Sequential(nn.Linear(512, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)).eval()
    head[1].running_mean.uniform_(-1, 1)
    save_head(release, head)
    hub._export(str(release), head=True, normalise=True, to=tmp_path / "deep" / "er" / "net.onnx")
    x = images(5, 32)
    assert_same(in_runtime(tmp_path / "deep" / "er" / "net.onnx", x), head(backbone(x)))  # normalised inside
    assert "(B, 8)" in capsys.readouterr().out
    hub._export(str(release), head=True, format="torchscript")
    assert_same(torch.jit.load(str(release / "model_head.ts"))(normalised(x, backbone)), head(backbone(x)))


@torch.no_grad()
def test_a_classifier_gives_logits_with_head_and_features_without(tmp_path):
    backbone = make_backbone("resnet8x4", num_classes=7)
    make_run(tmp_path / "run", backbone)
    x = images(5, 32)
    hub._export(str(tmp_path / "run"), head=True)
    logits = in_runtime(tmp_path / "run" / "release" / "model_head.onnx", normalised(x, backbone))
    assert logits.shape == (5, 7)
    assert_same(logits, backbone(x))
    hub._export(str(tmp_path / "run"), format="torchscript")
    features = torch.jit.load(str(tmp_path / "run" / "release" / "model.ts"))(normalised(x, backbone))
    assert_same(features, hub.load_teacher(tmp_path / "run")(x))
    assert_same(backbone.get_classifier()(features), logits)


CONSUMER = """
import json, sys, torch
x, facts = torch.load("x.pt"), {"facts.json": ""}
ts = torch.jit.load("run/release/model.ts", _extra_files=facts)
torch.save([ts(x[:1]), ts(x)], "ts.pt")
more = {"facts.json": ""}
pt2 = torch.export.load("run/release/model.pt2", extra_files=more).module()
torch.save([pt2(x[:1]), pt2(x)], "pt2.pt")
print(json.dumps([json.loads(f["facts.json"]) for f in (facts, more)]))
assert not {"timm", "common", "hub", "trainers"} & set(sys.modules)
"""


@torch.no_grad()
def test_torchscript_and_pt2_run_in_a_process_that_knows_nothing_of_ours(tmp_path):
    backbone = make_backbone("test_resnet")
    make_run(tmp_path / "run", backbone)
    for format in ("torchscript", "pt2"):
        hub._export(str(tmp_path / "run"), format=format)
        assert_no_path_of_this_machine(tmp_path / "run" / "release" / f"model{chapter.SUFFIXES[format]}")
    x = images(5, 32)
    torch.save(normalised(x, backbone), tmp_path / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", CONSUMER], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for facts in json.loads(done.stdout):
        assert facts["architecture"] == "test_resnet" and facts["output"] == "(B, 96)"
    for name in ("ts.pt", "pt2.pt"):
        one, five = torch.load(tmp_path / name)
        assert_same(one, backbone(x[:1]))
        assert_same(five, backbone(x))


def test_int8_keeps_knn_on_the_digits_and_is_refused_where_it_does_not(tmp_path, capsys, monkeypatch):
    run, release = tmp_path / "run", tmp_path / "run" / "release"
    learns = {"augmentation": "digits", "optimizer": "adamw", "base_lr": 0.016, "batch_size": 64}
    tiny_run("supervised", run, run, total_steps=200, **learns, log_every=50)
    hub._export(str(run), int8=True, subset="800", max_loss=2.0)  # 360 queries: a point is 3.6 of them
    said = capsys.readouterr().out
    found = re.search(r"kNN top-1 (\S+) % before, (\S+) % after", said)
    before, after = map(float, found.groups())
    assert before > 60 and after >= before - 2.0, said
    file = release / "model_int8.onnx"
    assert {n.op_type for n in onnx.load(file).graph.node} >= {"ConvInteger", "DynamicQuantizeLinear"}
    x, teacher = images(64, 16), hub.load_teacher(run)  # frozen: no gradients to think of
    found, expected = in_runtime(file, normalised(x, teacher.backbone)), teacher(x)
    assert torch.cosine_similarity(found, expected).min() > 0.98
    assert not torch.allclose(found, expected, rtol=1e-4), "nothing was quantised"

    file.unlink()
    kept = {f.name for f in release.iterdir()}
    monkeypatch.setattr(common, "knn_accuracy", lambda *_, **__: next(answers))
    answers = iter((80.0, 77.5))
    message = stop_message(hub._export, str(run), int8=True, subset="40", max_loss=2.4)
    assert "2.50 points" in message and "80.00 -> 77.50" in message and "without --int8" in message
    assert {f.name for f in release.iterdir()} == kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's always-full device")
@pytest.mark.parametrize("format", chapter.SUFFIXES)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(small_run, tmp_path, format):
    target = tmp_path / f"net{chapter.SUFFIXES[format]}"
    target.with_name(f".{target.name}").symlink_to("/dev/full")  # where the file is first written
    message = stop_message(hub._export, str(small_run), format=format, to=target)
    assert message.startswith(f"{target}: not written (") and "No space left" in message and "--to FILE" in message
    assert not list(tmp_path.iterdir())


def test_the_command_line_exports_and_says_what_it_measured(small_run, tmp_path):
    target = tmp_path / "net.ts"
    words = [sys.executable, HUB, "export", str(small_run), "--format", "torchscript", "--to", str(target)]
    done = subprocess.run(words, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert target.exists()
    for part in ("largest difference", " MB", " ms", "(B, 3, 32, 32)", "(B, 96)"):
        assert part in done.stdout


@pytest.mark.parametrize("broken", [1e-3, float("nan")])
def test_a_file_whose_features_differ_is_not_kept(small_run, tmp_path, monkeypatch, broken):
    forward = chapter.Deployed.forward
    monkeypatch.setattr(chapter.Deployed, "forward", lambda self, image: forward(self, image) * (1 + broken))
    target = tmp_path / "net.ts"
    message = stop_message(hub._export, str(small_run), format="torchscript", to=target)
    assert "features differ by" in message and str(target) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", chapter.SUFFIXES)
def test_a_network_that_a_format_cannot_hold_is_one_line(small_run, tmp_path, monkeypatch, format):
    def fail(*_, **__):
        raise RuntimeError("no such operation\nand a page of advice")

    for owner, name in ((torch.onnx, "export"), (torch.jit, "trace"), (torch.export, "export")):
        monkeypatch.setattr(owner, name, fail)
    message = stop_message(hub._export, str(small_run), format=format, to=tmp_path / "net")
    assert f"--format {format}" in message and "test_resnet (no such operation)" in message
    assert not list(tmp_path.iterdir())


REFUSED = {
    "--head": ({"head": True}, "neither a projection head nor a classifier"),
    "--int8": ({"int8": True, "format": "pt2", "data": "digits"}, "--format pt2"),
    "--data": ({"int8": True}, "--data is missing"),
    "--subset": ({"int8": True, "data": "digits", "subset": "many"}, "--subset many"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_one_line(small_run, tmp_path, monkeypatch, case):
    flags, part = REFUSED[case]
    args = small_run / "args.json"
    text = args.read_text()
    args.write_text(json.dumps({**json.loads(text), "data": "photos"}))
    assert part in stop_message(hub._export, str(small_run), to=tmp_path / "net", **flags)
    assert not list(tmp_path.iterdir())
    args.write_text(text)


def test_a_wrong_side_a_missing_target_and_a_missing_package_are_one_line(tmp_path, small_run, monkeypatch):
    vit = hub.Teacher(make_backbone("vit_tiny_patch16_224"), {"architecture": "vit_tiny_patch16_224"})
    assert "takes images of 224 px" in stop_message(chapter.export, vit, tmp_path / "net.onnx", side=64)
    torch.save(make_backbone("resnet18", num_classes=3).state_dict(), tmp_path / "plain.pth")
    assert "--to FILE" in stop_message(hub._export, str(tmp_path / "plain.pth"))
    assert "is a folder" in stop_message(hub._export, str(small_run), to=tmp_path)
    below_a_file = tmp_path / "plain.pth" / "net.ts"
    assert "not written (" in stop_message(hub._export, str(small_run), format="torchscript", to=below_a_file)
    assert "export nowhere" in stop_message(hub._export, "nowhere")
    monkeypatch.setattr(chapter.importlib.util, "find_spec", lambda name: None)
    message = stop_message(hub._export, str(small_run))
    assert "onnx, onnxscript, onnxruntime" in message and "pip install -e .[export]" in message
