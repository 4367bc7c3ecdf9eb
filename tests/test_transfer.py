"""What a checkpoint is worth elsewhere: the probe's transfer recipes, fine-tuning against a loop of torch's own parts."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from runs import metrics, photographs
from tools import make_backbone, stop_message
from torchvision.io import write_png
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

import common
import hub
from trainers import eval_finetune, eval_linear
from trainers.shared.run import save_backbone


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A release folder of a small random network."""
    folder = tmp_path_factory.mktemp("release")
    save_backbone(folder, make_backbone("test_resnet"), 32)
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    return folder


def linear_args(checkpoint, run_dir, **flags) -> eval_linear.Args:
    usual = {"image_size": 16, "subset": "320", "optimizer": "sgd", "batch_size": 64, "total_steps": 3, "log_every": 1}
    return eval_linear.Args(checkpoint=str(checkpoint), run_dir=run_dir, num_workers=0, **(usual | flags))


def tune_args(checkpoint, run_dir, **flags) -> eval_finetune.Args:
    usual = {"image_size": 16, "subset": "320", "batch_size": 64, "total_steps": 3, "log_every": 1}
    return eval_finetune.Args(checkpoint=str(checkpoint), run_dir=run_dir, num_workers=0, **(usual | flags))


MAKERS = {eval_linear: linear_args, eval_finetune: tune_args}


# --- views ---


@pytest.mark.parametrize("trainer", MAKERS, ids=lambda t: t.__name__.split(".")[-1])
def test_views_follow_the_flags(trainer, tmp_path):
    plain = trainer.recipes(trainer.Args())
    assert plain == (common.LINEAR, common.EVAL)
    flags = {"crop_scale": (0.6, 1.0), "interpolation": "bicubic", "crop_pct": 1.0}
    train, test = trainer.recipes(trainer.Args(**flags))
    assert (train.scale, train.flip, train.ratio) == ((0.6, 1.0), 0.5, common.LINEAR.ratio)
    assert train.interpolation == test.interpolation == "bicubic" and (test.crop_pct, test.flip) == (1.0, 0.0)
    small = trainer.Args(image_size=32, augmentation="none", interpolation="bicubic")
    train, test = trainer.recipes(small)
    assert train == test and (test.crop, test.crop_pct, test.interpolation) == ("centre", 1.0, "bicubic")


def write_noise(folder: Path) -> Path:
    """Images of noise, too large to stay in memory: what smooths least tells two ways of resampling apart."""
    g = torch.Generator().manual_seed(0)
    for i in range(20):
        path = folder / ("val" if i % 5 == 0 else "train") / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(torch.randint(64, 192, (3, 100 + i, 120), generator=g, dtype=torch.uint8), str(path))
    return folder


@pytest.mark.parametrize("data", ["digits", "noise"])
@pytest.mark.parametrize("trainer", MAKERS, ids=lambda t: t.__name__.split(".")[-1])
def test_the_network_sees_these_views(trainer, data, release, tmp_path, monkeypatch):
    """The last view that it sees is the evaluation's: all of the image, bicubic, in memory and streamed."""
    seen, original = [], common._normalise_input

    def spy(model, inputs):
        seen.append(inputs[0].detach().clone())
        return original(model, inputs)

    monkeypatch.setattr(common, "_normalise_input", spy)
    data, subset = (str(write_noise(tmp_path / "noise")), "") if data == "noise" else (data, "32")
    flags = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_scale": (0.6, 1.0), "batch_size": 8, "total_steps": 1}
    if trainer is eval_linear:  # it extracts before it trains
        flags |= {"augmentation": "none", "crop_scale": None}
    flags |= {"data": data, "subset": subset, "image_size": 40}
    trainer.main(MAKERS[trainer](release, tmp_path / "run", **flags))
    queries = common.open_source(data, "eval")
    last = len(queries) - 1
    image = queries.decode(last)
    expected = tvf.resize(image.float() / 255, [40], InterpolationMode.BICUBIC, antialias=True)
    expected = tvf.center_crop(expected, [40, 40]).clamp(0, 1)
    assert min((x[-1] - expected).abs().max().item() for x in seen) < 1.5 / 255  # streamed views are bytes
    bilinear = tvf.center_crop(tvf.resize(image.float() / 255, [40], antialias=True), [40, 40])
    assert (expected - bilinear).abs().max() > 6 / 255


# --- the probe ---


@pytest.mark.parametrize("augmentation", ["linear", "none"])
def test_normalised_features_are_unit_vectors_in_training_and_in_the_test(
    release, tmp_path, monkeypatch, augmentation
):
    norms, original = [], eval_linear.Heads.forward

    def spy(self, features):
        norms.append(features.norm(dim=1))
        return original(self, features)

    monkeypatch.setattr(eval_linear.Heads, "forward", spy)
    figures = {}
    for normalise in (True, False):
        norms.clear()
        args = linear_args(release, tmp_path / str(normalise), augmentation=augmentation, normalise_features=normalise)
        figures[normalise] = eval_linear.main(args)
        far = torch.cat(norms).sub(1).abs().max().item()
        assert len(norms) == 5 and (far < 1e-5) == normalise  # three steps, top-1 and top-5
    assert metrics(tmp_path / "True") != metrics(tmp_path / "False")


def config(trainer, name: str):
    path = ROOT / "configs" / trainer.__name__.split(".")[-1] / f"{name}.toml"
    return common.parse_args(trainer.Args, ["--config", str(path)])


def factors(args) -> list[float]:
    """The step schedule of a config, by epoch."""
    assert args.schedule == "step" and args.lr_per_epoch
    return [common.step_schedule(e, 1.0, args.milestones, args.lr_decay) for e in range(int(args.epochs))]


def test_configs_are_the_papers_recipes():
    disco = config(eval_linear, "sgd_halves_in1k")
    assert factors(disco)[::10] == [1, 1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 512, 1 / 1024, 1 / 1024, 1 / 2048, 1 / 2048]
    assert (disco.base_lrs, disco.optimizer, disco.weight_decay, disco.batch_size) == ((3.0,), "sgd", 0, 256)
    for share in (1, 10):
        semi = config(eval_linear, f"sgd_halves_{share}percent_in1k")
        assert (semi.subset, semi.base_lrs, semi.batch_size) == (f"{share}percent.txt", (3.0,), 256)
        assert [f for e, f in enumerate(factors(semi)) if e in (59, 60, 79, 80)] == [1, 0.5, 0.5, 0.25]
        tuned = config(eval_finetune, f"{share}percent_in1k")
        assert (tuned.base_lr, tuned.head_base_lr) == {1: (0.02, 5.0), 10: (0.01, 0.2)}[share]
        assert [f for e, f in enumerate(factors(tuned)) if e in (11, 12, 15, 16)] == pytest.approx([1, 0.2, 0.2, 0.04])
        assert len(factors(tuned)) == 20 and tuned.weight_decay == 0 and tuned.subset == f"{share}percent.txt"
    for number in (10, 100):
        constant = config(eval_linear, f"transfer_constant_cifar{number}")
        assert factors(constant) == [1] * 200 and constant.base_lrs == (3.0,)
        assert not constant.normalise_features and constant.crop_scale is None
        step = config(eval_linear, f"transfer_step_cifar{number}")
        assert step.normalise_features and step.crop_scale == (0.6, 1.0) and step.base_lrs == (30.0,)
        tuned = config(eval_finetune, f"transfer_cifar{number}")
        assert tuned.crop_scale == (0.2, 1.0) and [factors(tuned)[e] for e in (59, 60, 80)] == pytest.approx(
            [1, 0.2, 0.04]
        )
        for args in (constant, step, tuned):
            assert (args.interpolation, args.crop_pct, args.image_size) == ("bicubic", 1.0, 224)
            assert (args.batch_size, args.momentum, args.weight_decay) == (256, 0.9, 0)


# --- fine-tuning ---


def fine_tune(trainer, release, run_dir, monkeypatch) -> dict:
    """Eight steps in four epochs through `main`, in float64, and what they were made of."""
    made, original = {"batches": []}, trainer.with_classifier

    def with_classifier(start, num_classes):
        backbone, head = original(start, num_classes)
        made["head"] = {k: v.clone() for k, v in head.state_dict().items()}
        return backbone, head

    def batch(self, step, get=common.Batches.batch):
        got = get(self, step)
        views = [x.double() for x in got.views]
        made["batches"].append((views[0], got.labels))
        return dataclasses.replace(got, views=views)

    flags = {"subset": "128", "total_steps": 8, "milestones": (1, 3), "base_lr": 0.2, "head_base_lr": 0.8}
    dtype = torch.get_default_dtype()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "with_classifier", with_classifier)
        patch.setattr(common.Batches, "batch", batch)
        torch.set_default_dtype(torch.float64)
        try:
            trainer.main(tune_args(release, run_dir, **flags))
        finally:
            torch.set_default_dtype(dtype)
    made["losses"] = [line["loss"] for line in metrics(run_dir)]
    made["weights"] = torch.load(run_dir / "step_00000008" / "state.pt", weights_only=True)["state"]["model"]
    return made


def plain_loop(release: Path, made: dict) -> tuple[list[float], dict]:
    """The same eight steps as SwAV's script makes them: a plain timm model, torch's SGD with two groups, MultiStepLR."""
    model = timm.create_model("test_resnet", num_classes=10).double()
    state = safetensors.torch.load_file(release / "model.safetensors")
    model.load_state_dict(state | {f"fc.{k}": v for k, v in made["head"].items()})
    trunk = [p for n, p in model.named_parameters() if not n.startswith("fc.")]
    rates = [0.2 * 64 / 256, 0.8 * 64 / 256]
    groups = [{"params": trunk}, {"params": list(model.fc.parameters()), "lr": rates[1]}]
    optimizer = torch.optim.SGD(groups, lr=rates[0], momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], gamma=0.2)
    cfg = json.loads((release / "config.json").read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(cfg[k], dtype=torch.float64).view(-1, 1, 1) for k in ("mean", "std"))
    losses = []
    model.train()
    for step, (x, labels) in enumerate(made["batches"]):
        loss = F.cross_entropy(model((x - mean) / std), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 2:
            scheduler.step()
    return losses, model.state_dict()


def test_the_steps_are_those_of_a_plain_torch_loop(release, tmp_path, monkeypatch):
    made = fine_tune(eval_finetune, release, tmp_path / "run", monkeypatch)
    losses, weights = plain_loop(release, made)
    assert len(losses) == 8 and made["losses"] == pytest.approx(losses, rel=1e-10)
    assert set(made["weights"]) == set(weights) and len(weights) > 20
    for name, value in weights.items():
        torch.testing.assert_close(made["weights"][name], value, rtol=1e-8, atol=1e-10)
    before = make_backbone("test_resnet").state_dict()
    moved = [k for k in before if not torch.equal(before[k], weights[k].to(before[k]))]
    assert len(moved) == len(before), "every weight and statistic of the network moves"


@pytest.mark.parametrize(
    "old, new",
    [
        ("return backbone, head", "return backbone.eval(), head"),  # ssl-small's frozen statistics
        ("return backbone, head", "return backbone.requires_grad_(False), head.requires_grad_()"),
        (", strict=False)", " | backbone.state_dict(), strict=False); missing = [0, 0]"),  # another network
        ("(args.base_lr, args.head_base_lr)", "(args.head_base_lr, args.base_lr)"),
        ('group["lr"] = peak_lr * factor', 'group["lr"] = peak_lr'),
        ("args.batch_size / 256", "1"),
        ("id(p) not in own", "True"),  # the classifier stepped twice
    ],
)
def test_the_plain_loop_notices(old, new, release, tmp_path, monkeypatch):
    text = Path(eval_finetune.__file__).read_text()
    assert text.count(old) == 1, "the sabotage no longer applies"
    path = tmp_path / "sabotaged_finetune.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    try:
        made = fine_tune(module, release, tmp_path / "run", monkeypatch)
    except ValueError as error:  # torch itself refuses a parameter in two groups
        assert "parameter" in str(error)
        return
    assert made["losses"] != pytest.approx(plain_loop(release, made)[0], rel=1e-6)


@pytest.mark.parametrize(
    "name", ["resnet18_small", "mobilenetv3_small_050", "test_efficientnet", "test_vit", "test_convnext"]
)
def test_any_network_of_one_linear_classifier_can_be_tuned(name):
    start = hub.Teacher(make_backbone(name, mean=(0.1, 0.2, 0.3)), {"architecture": name})
    backbone, head = eval_finetune.with_classifier(start, 70)
    bound = backbone.num_features**-0.5  # torch's Linear draws both evenly within it
    assert head.weight.shape == (70, backbone.num_features) and head.weight.abs().max() <= bound
    assert head.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1) and 0 < head.bias.abs().max() <= bound
    assert backbone.training and all(p.requires_grad for p in backbone.parameters()) and backbone.num_classes == 70
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(backbone.eval()(x), head(start(x)))


def test_a_network_of_two_classifiers_is_refused():
    name = "deit_tiny_distilled_patch16_224"
    message = stop_message(eval_finetune.with_classifier, hub.Teacher(make_backbone(name), {"architecture": name}), 7)
    assert f"{name} does not end in one linear classifier" in message


def test_the_release_is_the_tuned_network_with_its_classifier(release, tmp_path, capsys):
    run_dir = tmp_path / "run"
    flags = {"interpolation": "bicubic", "crop_pct": 0.9, "epochs": 1, "total_steps": 20, "batch_size": 32}
    figures = eval_finetune.main(tune_args(release, run_dir, **flags))
    folder = run_dir / "release"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    cfg = model.pretrained_cfg
    assert model.num_classes == 10 and (cfg["interpolation"], cfg["crop_pct"]) == ("bicubic", 0.9)
    queries = common.open_source("digits", "eval")
    _, recipe = eval_finetune.recipes(tune_args(release, run_dir, **flags))
    views = common.eval_batches(queries, recipe, 16, 360, torch.device("cpu"), 0)
    x = tvf.normalize(next(iter(views))[0], cfg["mean"], cfg["std"])
    with torch.no_grad():
        logits = model(x)
    ranks = logits.argsort(dim=1, descending=True) == queries.labels.view(-1, 1)
    top1, top5 = (100 * ranks[:, :n].sum().item() / 360 for n in (1, 5))
    assert figures == pytest.approx({"top1": top1, "top5": top5})
    features = hub.load_teacher(folder)(x)
    assert features.shape == (360, 96)
    card = (folder / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card and str(tmp_path) not in card and str(release) not in card
    assert f"| checkpoint | {release.name} (test_resnet) |" in card and "| checkpoint | cc-by-nc-4.0 |" in card
    results = json.loads((run_dir / "results.json").read_text())
    assert results["checkpoint"] == str(release) and results["train_images"] == 320 and results["query_images"] == 360
    assert figures.items() <= results.items() and results["flags"]["base_lr"] == 0.01
    assert f"{figures['top1']:.2f} and {figures['top5']:.2f} %" in capsys.readouterr().out


def test_tuning_beats_the_frozen_network_on_a_tenth_of_the_digits(release, tmp_path):
    probe = {"subset": "10%", "augmentation": "none", "base_lrs": (0.1, 1.0, 10.0, 100.0), "total_steps": 400}
    frozen = eval_linear.main(linear_args(release, tmp_path / "frozen", **probe, log_every=100, image_size=32))
    tuned = {"subset": "10%", "augmentation": "digits", "total_steps": 400, "optimizer": "adamw", "log_every": 100}
    rates = {"base_lr": 0.02, "head_base_lr": 0.02, "schedule": "cosine", "lr_per_epoch": False, "image_size": 32}
    tuned = eval_finetune.main(tune_args(release, tmp_path / "tuned", **tuned, **rates))
    assert tuned["top1"] > frozen["top1"] + 10, (tuned, frozen)
    assert json.loads((tmp_path / "tuned" / "results.json").read_text())["train_images"] == 575


# --- mistakes ---

MISTAKES = [
    ({"crop_scale": (0.9, 0.2)}, "--crop-scale 0.9 0.2: must be a share"),
    ({"crop_pct": 0.0}, "--crop-pct 0.0: must be a share above 0 and up to 1"),
    ({"crop_pct": 1.5}, "--crop-pct 1.5: must be a share"),
    ({"crop_scale": (0.6, 1.0), "augmentation": "none"}, "--crop-scale: --augmentation none has no random crop"),
    ({"checkpoint": None}, "--checkpoint is missing: --checkpoint takes a run or release folder"),
    ({"checkpoint": "nowhere"}, "--checkpoint nowhere: no such file, folder or name"),
    ({"query_split": "nope"}, "--query-split nope: digits has train, test"),
    ({"subset": "10 %%"}, "--subset 10 %%: give a number of images"),
    ({"batch_size": 321}, "--batch-size 321: larger than the 320 images"),
    ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
    ({"total_steps": 0, "epochs": 0}, "--epochs 0: must give at least one step"),
]


@pytest.mark.parametrize("flags, message", MISTAKES, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("trainer", MAKERS, ids=lambda t: t.__name__.split(".")[-1])
def test_mistakes_get_one_line(trainer, flags, message, release, tmp_path):
    args = dataclasses.replace(MAKERS[trainer](release, tmp_path / "run"), **flags)
    assert stop_message(trainer.main, args).startswith(message)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"crop_scale": (0.6, 1.0), "augmentation": "cifar"}, "--crop-scale: --augmentation cifar has no random crop"),
        ({"bn_group_size": 3}, "--bn-group-size 3: must divide --batch-size 64"),
        ({"base_lr": 1e30}, "step 1: the loss is not finite"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_mistakes_in_tuning_get_one_line(flags, message, release, tmp_path):
    assert stop_message(eval_finetune.main, tune_args(release, tmp_path / "run", **flags)).startswith(message)


def test_a_folder_that_cannot_be_evaluated_on_is_told(release, tmp_path):
    folder = photographs(tmp_path / "photographs", 24) / "train"
    args = tune_args(release, tmp_path / "run", data=str(folder), subset="", batch_size=8)
    assert "no split to evaluate on" in stop_message(eval_finetune.main, args)
