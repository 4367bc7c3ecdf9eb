"""The authors' released files, built here with their exact keys and shapes, and how they are fetched."""

import hashlib
import http.server
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from tools import disturb_batch_norm, stop_message
from torch import Tensor, nn

import common
import hub
from trainers.shared import official

# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def head(kind: str, width: int) -> nn.Sequential:
    """A projection head as its authors build it, (B, width) -> (B, 128)."""
    linear, last = nn.Linear(width, width), nn.Linear(width, 128)
    return {
        "mlp": nn.Sequential(linear, nn.ReLU(), last),  # MoCo v2, SEED, DisCo
        "batchnorm": nn.Sequential(linear, nn.BatchNorm1d(width), nn.ReLU(), last),  # SwAV, SEED's SimCLR
        "dropout": nn.Sequential(linear, nn.ReLU(), nn.Dropout(0.5), last),  # small-SSL
        "deep": nn.Sequential(linear, nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last),
    }[kind]


def prefixed(prefix: str, *modules: nn.Module | dict) -> dict[str, Tensor]:
    return {f"{prefix}{k}": v for m in modules for k, v in (m if isinstance(m, dict) else m.state_dict()).items()}


def queue(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(1) if name.endswith("ptr") else torch.zeros(128, 64) for name in names}


def content(layout: str, backbone: nn.Module, projection: nn.Module) -> dict:
    """What the authors' script saves, from golden/NOTES_ssl.md section 13 and the code that it names."""
    projection.eval()
    fc, teacher = prefixed("fc.", projection), torchvision.models.resnet18(weights=None)
    swav = prefixed("module.", backbone, prefixed("projection_head.", projection))
    container = {"epoch": 200, "arch": "resnet18", "optimizer": {}}
    return {
        "SEED": {**container, "state_dict": prefixed("module.", prefixed("student.", backbone, fc), prefixed("teacher.", teacher), queue("queue", "queue_ptr", "small_queue"))},
        "SEED, one GPU": {**container, "state_dict": {**prefixed("student.", backbone, fc), **prefixed("teacher.", teacher), **queue("queue", "queue_ptr")}},
        "DisCo": {**container, "state_dict": prefixed("module.", prefixed("encoder_q.", backbone, fc), prefixed("encoder_k.", backbone, fc), prefixed("teacher_encoder_q.", teacher), prefixed("teacher_encoder_k.", teacher), queue("queue", "queue_ptr"))},
        "small-SSL": {**container, "state_dict": prefixed("module.", prefixed("encoder_q.", backbone, fc), prefixed("encoder_k.", backbone, fc), queue("queue", "queue_ptr"))},
        "SMD": {**container, "state_dict": prefixed("module.encoder.", backbone, fc)},
        "SwAV": {**swav, "module.prototypes.weight": torch.zeros(3000, 128)},
        "SwAV, in training": {"epoch": 9, "optimizer": {}, "state_dict": {**swav, "module.prototypes.weight": torch.zeros(3000, 128)}},
        "DeepCluster-v2": {**swav, **{f"module.prototypes.prototypes{i}.weight": torch.zeros(3000, 128) for i in range(3)}},
        "SimCLR, SEED's": {"model": prefixed("module.module.module.", backbone, fc)},
        "SimCLR, VISSL": {"phase_idx": 999, "classy_state_dict": {"base_model": {"model": {"trunk": prefixed("_feature_blocks.", backbone), "heads": {f"{i}.clf.0.{k}": v for i, j in ((0, 0), (1, 2)) for k, v in projection[j].state_dict().items()} if len(projection) == 3 else {}}}}},
        "DINO": prefixed("", backbone),
        "DINO, in training": {"epoch": 9, "student": {}, "teacher": prefixed("module.", prefixed("backbone.", backbone), prefixed("head.mlp.", projection))},
        "linear probe": {**container, "best_acc1": torch.tensor(67.7), "state_dict": prefixed("module.", backbone, prefixed("fc.", nn.Linear(512, 128)))},
    }[layout]  # fmt: skip


LAYOUTS = [
    ("SEED", "SEED", "mlp"),
    ("SEED, one GPU", "SEED", "mlp"),
    ("DisCo", "MoCo", "mlp"),
    ("small-SSL", "MoCo", "dropout"),
    ("small-SSL", "MoCo", "deep"),
    ("SMD", "SimSiam", "mlp"),
    ("SwAV", "SwAV", "batchnorm"),
    ("SwAV", "SwAV", "mlp"),  # as the head of w5 is said to be, without BatchNorm
    ("SwAV, in training", "SwAV", "batchnorm"),
    ("DeepCluster-v2", "SwAV", "batchnorm"),
    ("SimCLR, SEED's", "torchvision", "batchnorm"),
    ("SimCLR, VISSL", "VISSL", "mlp"),
    ("DINO", "torchvision", None),
    ("DINO, in training", "DINO", None),
    ("linear probe", "torchvision", None),
]


@pytest.mark.parametrize("layout, name, kind", LAYOUTS)
@torch.no_grad()
def test_every_layout_gives_its_networks_features_and_head(layout, name, kind, tmp_path):
    backbone = torchvision.models.resnet18(weights=None)
    backbone.fc = nn.Identity()
    disturb_batch_norm(backbone)
    projection = head(kind or "mlp", 512).eval()
    torch.save(content(layout, backbone.eval(), projection), tmp_path / "file.pth.tar")
    teacher = hub.load_teacher(tmp_path / "file.pth.tar")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    std = (0.228, 0.224, 0.225) if name == "SwAV" else common.IMAGENET_STD
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (common.IMAGENET_MEAN, std))
    expected = backbone((x - mean) / std)
    torch.testing.assert_close(teacher(x), expected, rtol=1e-5, atol=1e-5)
    assert teacher.facts["format"] == name and teacher.facts["architecture"] == "resnet18"
    if kind is not None:
        torch.testing.assert_close(teacher.head(expected), projection(expected), rtol=1e-5, atol=1e-5)
    elif layout != "linear probe":
        assert teacher.head is None


@pytest.mark.parametrize("layout, _, kind", [x for x in LAYOUTS if x[0] != "DINO"])
def test_a_key_that_a_layout_does_not_have_is_named(layout, _, kind, tmp_path):
    backbone = torchvision.models.resnet18(weights=None)
    backbone.fc = nn.Identity()
    found = content(layout, backbone, head(kind or "mlp", 512))
    states = found.get("state_dict") or found.get("model") or found.get("teacher") or found
    if "classy_state_dict" in found:
        states = found["classy_state_dict"]["base_model"]["model"]["trunk"]
    key = next(k for k in states if k.endswith("layer3.0.conv1.weight"))
    states[f"{key}_old"] = states.pop(key)
    torch.save(found, tmp_path / "file.pth.tar")
    message = stop_message(hub.load_teacher, tmp_path / "file.pth.tar")
    assert "1 missing" in message and "layer3.0.conv1.weight_old" in message


@pytest.mark.parametrize("arch, name", [("mobilenetv3", "mobilenetv3_large_100"), ("efficientb0", "efficientnet_b0")])
def test_discos_small_students_load_under_their_names_there(arch, name, tmp_path):
    network = timm.create_model(name, num_classes=128)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("classifier.")}
    encoder = {**state, **prefixed("classifier.", head("mlp", 1280))}
    state_dict = prefixed("module.", prefixed("encoder_q.", encoder), prefixed("encoder_k.", encoder), queue("queue"))
    torch.save({"arch": arch, "state_dict": state_dict}, tmp_path / "file.pth.tar")
    teacher = hub.load_teacher(tmp_path / "file.pth.tar")
    assert teacher.facts["architecture"] == name and teacher.head[2].out_features == 128
    assert torch.equal(teacher.backbone.state_dict()["conv_head.weight"], network.conv_head.weight)


# EfficientNet-PyTorch's names of timm's, in the order in which its blocks register them
INNER = {
    "conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1", "se.conv_reduce": "_se_reduce",
    "se.conv_expand": "_se_expand", "conv_pwl": "_project_conv", "bn3": "_bn2",
}  # fmt: skip
FIRST = {**INNER, "conv_pw": "_project_conv", "bn1": "_bn1", "bn2": "_bn2"}
OUTER = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}


@pytest.mark.parametrize("name, blocks", [("efficientnet_b0", 16), ("efficientnet_b1", 23)])
@torch.no_grad()
def test_the_efficientnets_of_seed_and_smd_load_into_tensorflows(name, blocks, tmp_path):
    network = timm.create_model(f"tf_{name}", num_classes=0)
    disturb_batch_norm(network)
    state, numbers = {}, {}
    for key, tensor in network.state_dict().items():
        owner, kind = key.rsplit(".", 1)
        if found := re.fullmatch(r"blocks\.(\d+\.\d+)\.(.+)", owner):
            number = numbers.setdefault(found[1], len(numbers))
            names = FIRST if found[1].startswith("0.") else INNER
            owner = f"_blocks.{number}.{names[found[2]]}"
        else:
            owner = OUTER[owner]
        state[f"module.student.{owner}.{kind}"] = tensor
    assert len(numbers) == blocks and len(state) == len(network.state_dict())
    state |= prefixed("module.student.", prefixed("fc.", head("mlp", 1280)))
    torch.save({"arch": name, "state_dict": state}, tmp_path / "file.pth.tar")
    teacher = hub.load_teacher(tmp_path / "file.pth.tar")
    assert teacher.facts["architecture"] == f"tf_{name}" and teacher.head[2].out_features == 128
    for key, tensor in network.state_dict().items():
        assert torch.equal(teacher.backbone.state_dict()[key], tensor), key


def test_a_mobilenet_that_timm_does_not_have_is_refused_by_its_name(tmp_path):
    """SEED's and SMD's excites before the activation, timm's after it."""
    state = {"module.student.features.0.0.weight": torch.zeros(16, 3, 3, 3)}
    torch.save({"arch": "mobilenetv3_large", "state_dict": state}, tmp_path / "file.pth.tar")
    assert "mobilenetv3_large is none that timm knows" in stop_message(hub.load_teacher, tmp_path / "file.pth.tar")


ZOO_FILES = [("wrn_16_2", "state_dict"), ("resnet20", "model"), ("vgg8", "state_dict"), ("mobilenetv2_cifar", "model")]


@pytest.mark.parametrize("name, key", ZOO_FILES)
@torch.no_grad()
def test_the_labelled_teachers_of_sskd_and_repdistiller_load_with_their_classifier(name, key, tmp_path):
    network = timm.create_model(name, num_classes=100).eval()
    disturb_batch_norm(network)
    state = network.state_dict()
    if name.startswith("mobilenet") and key == "model":  # RepDistiller's is in a Sequential
        state = {k.replace("classifier.", "classifier.0."): v for k, v in state.items()}
    torch.save({"epoch": 240, "acc": torch.tensor(75.6), key: state}, tmp_path / "best.pth")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(network.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    teacher = hub.load_teacher(tmp_path / "best.pth", num_classes=100)
    assert teacher.facts["architecture"] == name and teacher.facts["format"] == "CIFAR"
    torch.testing.assert_close(teacher(x), network((x - mean) / std), rtol=1e-5, atol=1e-5)
    features = hub.load_teacher(tmp_path / "best.pth")
    assert features(x).shape == (2, network.num_features)
    message = stop_message(hub.load_teacher, tmp_path / "best.pth", num_classes=10)
    assert "classifier of 100 classes, the data has 10" in message


def test_a_file_without_a_classifier_is_no_labelled_teacher(tmp_path):
    backbone = torchvision.models.resnet18(weights=None)
    backbone.fc = nn.Identity()
    torch.save(content("SEED", backbone, head("mlp", 512)), tmp_path / "file.pth.tar")
    assert "holds no classifier" in stop_message(hub.load_teacher, tmp_path / "file.pth.tar", num_classes=10)


# millions of parameters and features, from NOTES_ssl.md
WIDE = {"resnet50w2": (93.9, 4096), "resnet50w4": (375.4, 8192), "resnet50w5": (586.5, 10240)}


@pytest.mark.parametrize("name", WIDE)
def test_the_wide_resnets_have_swavs_shapes(name):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
        plain = torchvision.models.resnet50(weights=None)
    millions, features = WIDE[name]
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(count, 1) == millions and network.num_features == features
    scale = features // 2048
    shapes = {k: tuple(v.shape) for k, v in plain.state_dict().items() if not k.startswith("fc.")}
    for key, tensor in network.state_dict().items():
        wide = tuple(n if i > 1 or n == 3 else n * scale for i, n in enumerate(shapes.pop(key)))
        assert tuple(tensor.shape) == wide, key
    assert not shapes


def test_swavs_w2_file_loads_with_its_head(tmp_path):
    """Exact keys and shapes; every tensor is one number, so that the file is small."""
    with torch.device("meta"):
        network = timm.create_model("resnet50w2", num_classes=0)
        projection = nn.Sequential(nn.Linear(4096, 8192), nn.BatchNorm1d(8192), nn.ReLU(), nn.Linear(8192, 128))
    meta = prefixed("module.", network, prefixed("projection_head.", projection))
    meta["module.prototypes.weight"] = torch.zeros(3000, 128, device="meta")
    torch.save({k: torch.full((), 0.5).to(v.dtype).expand(v.shape) for k, v in meta.items()}, tmp_path / "w2.pth.tar")
    assert (tmp_path / "w2.pth.tar").stat().st_size < 1 << 20
    teacher = hub.load_teacher(tmp_path / "w2.pth.tar")
    assert teacher.facts["architecture"] == "resnet50w2" and teacher.facts["format"] == "SwAV"
    assert teacher.num_features == 4096 and teacher.head[3].out_features == 128
    assert torch.equal(teacher.backbone.layer4[2].conv3.weight, torch.full((4096, 1024, 1, 1), 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# The table and the download
# ---------------------------------------------------------------------------------------------------------------------


def test_every_teacher_of_the_issue_is_in_the_table_and_listed():
    families = {re.split(r"_", name)[0] for name in hub.TEACHERS}
    assert families == {"simsiam", "moco", "swav", "deepclusterv2", "selav2", "dino", "simclr"}
    assert len({t.url for t in hub.TEACHERS.values()}) == len(hub.TEACHERS) == 31
    for name, teacher in hub.TEACHERS.items():
        assert teacher.url.startswith("https://dl.fbaipublicfiles.com/") and 60 < teacher.top1 < 80 and teacher.source
        assert (teacher.licence == "cc-by-nc-4.0") == (name.split("_")[0] not in ("dino", "simclr"))
    listed = subprocess.run([sys.executable, common.ROOT / "hub.py", "list"], capture_output=True, text=True)
    assert listed.returncode == 0 and all(name in listed.stdout for name in hub.TEACHERS)
    assert "did you mean swav_r50_800ep" in stop_message(hub.load_teacher, "swav_r50_800")


class FileServer(http.server.ThreadingHTTPServer):
    """One file, with ETag and ranges; the first `drops` answers end in the middle, the next `failures` are 503s."""

    def __init__(self, data: bytes, drops: int = 0, failures: int = 0, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.drops, self.failures, self.ranges, self.sent, self.asked = data, drops, failures, ranges, 0, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/teacher.pth.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self, body: bool = False):
        server, start = self.server, 0
        if body and server.failures:
            server.failures -= 1
            return self.send_error(503)
        asked = self.headers.get("Range")
        if body:
            server.asked.append(asked)
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.md5(server.data).hexdigest()}"')
        self.send_header("Content-Length", str(len(server.data) - start))
        self.end_headers()
        if body:
            rest = server.data[start:]
            if server.drops:
                server.drops -= 1
                rest = rest[: len(rest) // 2]
            server.sent += len(rest)
            self.wfile.write(rest)

    def do_GET(self):
        self.do_HEAD(body=True)

    def log_message(self, *_):
        pass


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Serve `data` and download it into an empty cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(official.time, "sleep", lambda _: None)
    servers = []

    def run(data: bytes, md5: str = "", **options) -> tuple[Path | str, FileServer]:
        servers.append(FileServer(data, **options))
        try:
            return hub.download(servers[-1].url, md5), servers[-1]
        except SystemExit as stop:
            return str(stop), servers[-1]

    yield run
    for server in servers:
        server.shutdown()


DATA = bytes(range(256)) * 4096  # 1 MiB


def partials(folder: Path) -> list[Path]:
    return list(folder.rglob("*.part"))


def test_a_dropped_connection_is_continued_where_it_ended(fetch, tmp_path):
    file, server = fetch(DATA, hashlib.md5(DATA).hexdigest()[:8], drops=2, failures=1)
    assert file.read_bytes() == DATA and not partials(tmp_path)
    assert server.asked == [None, f"bytes={len(DATA) // 2}-", f"bytes={len(DATA) * 3 // 4}-"]
    assert server.sent == len(DATA), "every byte once"
    assert hub.download(server.url) == file and len(server.asked) == 3, "not fetched again"


def test_a_server_without_ranges_sends_it_again(fetch):
    file, server = fetch(DATA, drops=1, ranges=False)
    assert file.read_bytes() == DATA and server.sent == len(DATA) * 3 // 2


def test_a_download_that_never_ends_is_never_used_and_continues_another_time(fetch, tmp_path):
    message, server = fetch(DATA, drops=5)
    assert server.url in message and "run again to continue it" in message and len(message.splitlines()) == 1
    assert len(partials(tmp_path)) == 1 and not list(tmp_path.rglob("*.tar"))
    done = partials(tmp_path)[0].stat().st_size
    server.drops = 0
    assert hub.download(server.url).read_bytes() == DATA
    assert server.asked[-1] == f"bytes={done}-" and not partials(tmp_path)


def test_another_file_at_the_address_is_not_joined_to_the_first_ones_part(fetch, tmp_path):
    _, server = fetch(DATA, drops=5)
    server.data, server.drops = DATA[::-1], 0
    assert hub.download(server.url).read_bytes() == DATA[::-1]


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(fetch, tmp_path):
    message, _ = fetch(DATA, "00000000")
    assert "md5" in message and "00000000" in message and not partials(tmp_path) and not list(tmp_path.rglob("*.tar"))


def test_a_file_that_is_not_there_is_one_line(fetch):
    message, server = fetch(DATA)
    server.shutdown()
    server.server_close()
    gone = stop_message(hub.download, server.url.replace("teacher", "other"))
    assert "download failed" in gone and "by hand" in gone
