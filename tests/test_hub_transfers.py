"""Uploads and downloads of real size over a bad connection: whole in the end, or one line and nothing half-written."""

import json
import re
from pathlib import Path

import pytest
import torch
from hub_server import CALLS, DROP, PART, WRITE_TOKEN, HubServer, run_together, said
from runs import photographs, tiny_flags
from tools import make_backbone, make_run, stop_message

import common
import hub

LOAD = """
import sys, timm, torch
model = timm.create_model("hf-hub:" + sys.argv[1], pretrained=True, num_classes=0).eval()
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""
LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full disk: no file grows beyond 8 MiB
resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
"""


def question(folder: Path) -> torch.Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, folder / "question.pt")
    return x


def test_what_a_trainer_pushes_is_what_timm_loads_elsewhere(tmp_path):
    x = question(tmp_path)
    data = photographs(tmp_path / "photos", 32, sides=(40, 40))
    flags = tiny_flags("simsiam", tmp_path / "run", None, data=data, **{"push-to-hub": "tester/trained"})
    with HubServer() as server:
        server.trouble = [("POST", "/api/repos/create", 503), ("POST", "/preupload/main", 429)]
        writer = server.environment(tmp_path / "cache", WRITE_TOKEN) | {"ACCELERATE_USE_CPU": "true"}
        trainer = str(common.ROOT / "trainers" / "simsiam.py")
        done = run_together(train=(writer, [trainer, *flags]))["train"]
        assert done.returncode == 0 and server.trouble == [], done.stderr
        assert f"pushed to {server.url}/tester/trained" in done.stdout
        reader = server.environment(tmp_path / "another cache")
        words = ["-c", LOAD, "tester/trained", str(tmp_path / "question.pt"), str(tmp_path / "answer.pt")]
        done = run_together(load=(reader, words))["load"]
        assert done.returncode == 0, done.stderr
        card = server.files("tester/trained")["README.md"].decode()
    features = hub.load_teacher(tmp_path / "run").backbone
    with torch.no_grad():
        own = features(x * features.input_std + features.input_mean)
    torch.testing.assert_close(torch.load(tmp_path / "answer.pt"), own)
    assert "hf-hub:tester/trained" in card and "ORG/NAME" not in card and str(tmp_path) not in card


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A run of 0.25 GB, and what a push with two broken connections made of it on a server that stays for the tests."""
    folder = tmp_path_factory.mktemp("large")
    question(folder)
    backbone = make_backbone("wide_resnet50_2")
    make_run(folder / "run", backbone)
    with HubServer() as server:
        server.trouble = [("PUT", "/2", DROP), ("PUT", "/5", 503)]
        environment = server.environment(folder / "cache", WRITE_TOKEN)
        words = [str(common.ROOT / "hub.py"), "push", str(folder / "run"), "tester/large"]
        done = run_together(push=(environment, words))["push"]
        yield folder, backbone, server, done


def test_a_large_upload_survives_a_dropped_connection(large):
    folder, _, server, done = large
    assert done.returncode == 0 and server.trouble == [], done.stderr
    weights = (folder / "run" / "release" / "model.safetensors").read_bytes()
    assert len(weights) > 0.2e9 and server.files("tester/large")["model.safetensors"] == weights
    parts = [path for method, path in server.requests if method == "PUT"]
    assert len(set(parts)) == -(-len(weights) // PART)
    again = {re.sub(r".*/", "", path) for path in parts if parts.count(path) == 2}
    assert again == {"2", "5"}, "only what was lost travels again"


def test_a_large_download_survives_a_dropped_connection(large):
    folder, backbone, server, _ = large
    server.trouble, server.requests[:] = [("GET", "/model.safetensors", DROP)], []
    words = ["-c", LOAD, "tester/large", str(folder / "question.pt"), str(folder / "answer.pt")]
    done = run_together(load=(server.environment(folder / "another cache"), words))["load"]
    assert done.returncode == 0 and server.trouble == [], done.stderr
    assert len([path for method, path in server.requests if method == "GET" and "safetensors" in path]) == 2
    x = torch.load(folder / "question.pt")
    with torch.no_grad():
        expected = backbone(x * backbone.input_std + backbone.input_mean)
    torch.testing.assert_close(torch.load(folder / "answer.pt"), expected, rtol=1e-4, atol=1e-4)


def test_a_full_disk_is_one_line_and_leaves_no_half_release(large, tmp_path):
    _, _, server, _ = large
    to = tmp_path / "there"
    calls = [("pull", "", "pull", ["tester/large"], {"local_dir": str(to)})]
    environment = server.environment(tmp_path / "cache")
    done = run_together(pull=(environment, ["-c", LIMITED + CALLS, json.dumps(calls)]))["pull"]
    worked, message = said(done)["pull"]
    assert not worked and "\n" not in message
    assert message.startswith("pull tester/large:") and "free space" in message and "--to" in message
    assert not (to / "model.safetensors").exists()
    assert "neither config.json + model.safetensors" in stop_message(hub.load_teacher, to)
    done = run_together(again=(environment, ["-c", CALLS, json.dumps(calls)]))["again"]
    assert said(done)["pull"] == (True, str(to)) and hub.load_teacher(to).num_features == 2048


def test_an_uploaders_full_disk_keeps_the_run_and_the_release_before(tmp_path):
    make_run(tmp_path / "run", make_backbone("resnet18"))
    hub.build_release(tmp_path / "run")
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    calls = [("push", WRITE_TOKEN, "push", [str(tmp_path / "run"), "tester/x"], {})]
    with HubServer() as server:
        environment = server.environment(tmp_path / "cache")
        done = run_together(push=(environment, ["-c", LIMITED + CALLS, json.dumps(calls)]))["push"]
        assert server.repos == {}
    worked, message = said(done)["push"]
    assert not worked and "python hub.py build" in message and "\n" not in message
    assert (tmp_path / "run" / "release" / "README.md").read_text() == card
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")) == [".lock"]


def test_a_busy_hub_is_asked_again_and_in_the_end_named_as_busy(tmp_path):
    make_run(tmp_path / "run", make_backbone("test_resnet"))
    student = [str(tmp_path / "run"), "tester/student"]
    calls = [("push", WRITE_TOKEN, "push", student, {})]
    with HubServer() as server:
        server.trouble = [("POST", "/api/repos/create", 503)] * 3  # one more than the retries here
        done = run_together(push=(server.environment(tmp_path / "cache"), ["-c", CALLS, json.dumps(calls)]))["push"]
        assert server.trouble == []
    worked, message = said(done)["push"]
    assert not worked and "the Hub is busy" in message and "503" in message
    assert done.stderr.count("trying again") == 2
