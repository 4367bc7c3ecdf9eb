"""Detection: the same set in three formats, one figure; draws that belong to an image; losses of the global batch."""

import dataclasses
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from runs import run_pair
from scenes import SIDE, coloured_digits, tiny_imagenet, write_scenes
from together import run_here
from tools import make_backbone, make_run, stop_message
from torch import nn
from torchvision.io import decode_image, read_file, write_png
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import MultiScaleRoIAlign

import common
from trainers import eval_detection

TINY = common.parse_args(eval_detection.Args, ["--config", str(ROOT / "configs" / "eval_detection" / "tiny.toml")])


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    return write_scenes(tmp_path_factory.mktemp("sets"), coloured_digits(), train=16, val=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "run"
    make_run(folder, make_backbone("test_resnet"))
    return folder


def arguments(tiny: Path, data: Path, run_dir: Path, **flags) -> eval_detection.Args:
    return dataclasses.replace(TINY, checkpoint=str(tiny), data=str(data), run_dir=run_dir, **flags)


def words(args: eval_detection.Args) -> list[str]:
    """The command line that gives these flags."""
    found = ["--config", str(args.config)]
    for name, value in vars(args).items():
        if value != getattr(TINY, name):
            found += [
                f"--{name}",
                *([] if value is True else map(str, value if isinstance(value, tuple) else [value])),
            ]
    return found


def logged(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def write_column(coco: Path, folder: Path, box_format: str) -> Path:
    """The set of a COCO folder as parquet files of images and a column of objects."""
    folder.mkdir()
    for split in ("train", "val"):
        content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        names = {each["id"]: each["name"] for each in content["categories"]}
        kinds = datasets.ClassLabel(names=list(names.values()))
        rows = {"image": [], "things": []}
        for image in content["images"]:
            things = [each for each in content["annotations"] if each["image_id"] == image["id"]]
            boxes = [each["bbox"] for each in things]
            if box_format == "xyxy":
                boxes = [[x, y, x + width, y + height] for x, y, width, height in boxes]
            labels = [kinds.str2int(names[each["category_id"]]) for each in things]
            rows["image"].append(str(coco / "images" / split / image["file_name"]))
            rows["things"].append({"bbox": boxes, "category": labels})
        things = datasets.Sequence({"bbox": datasets.Sequence(datasets.Value("float32"), 4), "category": kinds})
        features = datasets.Features({"image": datasets.Image(), "things": things})
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Where boxes come from
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box_format", ["xywh", "xyxy"])
def test_one_set_is_the_same_in_three_formats(sets, tmp_path, box_format):
    column = write_column(sets[1], tmp_path / "column", box_format)
    names = ["blue four", "green one", "red zero"]
    for role, classes in (("train", ()), ("eval", names)):  # the few images to evaluate on may lack one
        voc, coco = (common.open_objects(str(data), role, classes=classes) for data in sets)
        table = common.open_objects(str(column), role, classes=classes, box_format=box_format)
        assert voc.classes == coco.classes == table.classes == names
        assert len(voc) == {"train": 16, "eval": 4}[role] and coco.sizes == [(SIDE, SIDE)] * len(voc)
        plain = [[{k: v for k, v in t.items() if k != "segmentation"} for t in things] for things in coco.objects]
        assert voc.objects == plain == table.objects
        assert sum(map(len, plain)) >= 2 * len(voc) and {t["category_id"] for ts in plain for t in ts} <= {1, 2, 3}
        for i in range(len(voc)):
            assert torch.equal(voc.source.decode(i), coco.source.decode(i))
            assert torch.equal(voc.source.decode(i), table.source.decode(i))


def write_devkit(folder: Path, **lists: str) -> Path:
    """VOC2007 and VOC2012 with lists of names; every image has a cat, a difficult dog and a part with a box of its own."""
    for year in ("VOC2007", "VOC2012"):
        for path in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / year / path).mkdir(parents=True)
        for name, stems in lists.items():
            (folder / year / "ImageSets" / "Main" / f"{name}.txt").write_text(stems)
        for stem in {stem for stems in lists.values() for stem in stems.split()} - {"1", "-1"}:
            write_png(torch.zeros(3, 40, 60, dtype=torch.uint8), str(folder / year / "JPEGImages" / f"{stem}.jpg"))
            box = "<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>60</xmax><ymax>40.0</ymax></bndbox>"
            part = f"<part><name>head</name>{box.replace('60', '9')}</part>"
            (folder / year / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><object><name>cat</name>{part}{box}</object>"
                f"<object><name>dog</name><difficult>1</difficult>{box}</object></annotation>"
            )
    return folder


def test_a_voc_devkit_has_years_lists_difficult_objects_and_pixels_from_one(tmp_path):
    devkit = write_devkit(tmp_path, trainval="a b\n", test="c\n", cat_trainval="a 1\nb -1\n")
    joined = common.open_objects(str(devkit), "train", split="VOC2007/trainval+VOC2012/trainval")
    assert len(joined) == 4 and [Path(joined.source.where(i)).stem for i in range(4)] == ["a", "b", "a", "b"]
    assert joined.source.decode(3).shape == (3, 40, 60) and joined.classes == ["cat", "dog"]
    cat, dog = joined.objects[0]
    assert cat["bbox"] == dog["bbox"] == [0, 2, 60, 38] and cat["area"] == 60 * 38
    assert (cat["difficult"], dog["difficult"]) == (0, 1) and [cat["category_id"], dog["category_id"]] == [1, 2]
    assert common.usable_objects([cat, dog]) == [cat, dog]
    one_year = common.open_objects(str(devkit / "VOC2007"), "eval", classes=["dog", "cat"])
    assert len(one_year) == 1 and [t["category_id"] for t in one_year.objects[0]] == [2, 1]
    message = stop_message(common.open_objects, str(devkit), "train")
    assert "--split" in message and "VOC2007/trainval, VOC2012/test" in message and "+" in message
    message = stop_message(common.open_objects, str(devkit), "train", split="VOC2007/trainval+VOC2010/trainval")
    assert "--split VOC2007/trainval+VOC2010/trainval" in message and "no VOC2010/trainval" in message
    assert "1 classes" in (message := stop_message(common.open_objects, str(devkit / "VOC2007"), classes=["cat"]))
    assert message.endswith("dog")


def test_crowds_and_empty_boxes_are_not_trained_on():
    things = [{"iscrowd": c, "difficult": 0, "bbox": [1, 1, w, 5]} for c, w in ((0, 4), (1, 4), (0, 0), (0, 2))]
    assert common.usable_objects(things) == [things[0], things[3]]


def test_segmentations_in_all_spellings_give_one_bitmap():
    polygon = [[2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]]
    expected = torch.zeros(5, 8, dtype=torch.uint8)
    expected[1:4, 2:6] = 1
    runs, last = [], 0
    for value in expected.T.flatten().tolist():  # column by column, beginning with zeros
        runs[-1:] = [runs[-1] + 1] if runs and value == last else [*runs[-1:], 1]
        last = value
    assert torch.equal(common.object_bitmap(polygon, 5, 8), expected)
    assert torch.equal(common.object_bitmap({"counts": runs, "size": [5, 8]}, 5, 8), expected)
    halves = [[2.0, 1.0, 4.0, 1.0, 4.0, 4.0, 2.0, 4.0], [4.0, 1.0, 6.0, 1.0, 6.0, 4.0, 4.0, 4.0]]
    assert torch.equal(common.object_bitmap(halves, 5, 8), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What found boxes are worth
# ---------------------------------------------------------------------------------------------------------------------


def annotated(objects: list[list[tuple]], classes=("a", "b")) -> common.Annotated:
    """Images whose objects are (class, box) or (class, box, difficult)."""
    things = [
        [
            {"category_id": label, "bbox": list(box), "area": box[2] * box[3], "iscrowd": 0, "difficult": sum(more)}
            for label, box, *more in image
        ]
        for image in objects
    ]
    return common.Annotated(common.Source("x", len(objects)), things, list(classes))


def result(image: int, label: int, box: tuple, score: float) -> dict:
    return {"image_id": image, "category_id": label, "bbox": list(box), "score": score}


BOX, OTHER = (10, 10, 40, 40), (80, 80, 20, 20)


def test_average_precision_of_cases_worked_out_by_hand():
    truth = annotated([[(1, BOX), (1, OTHER)], [(2, BOX)]])
    every = [result(0, 1, BOX, 0.9), result(0, 1, OTHER, 0.8), result(1, 2, BOX, 0.7)]
    perfect = common.average_precision(truth, every, "bbox")
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP50_11point")
    assert perfect == pytest.approx(dict.fromkeys(names, 100))
    half = common.average_precision(truth, every[1:], "bbox")  # class a: recall up to 0.5 at precision 1
    assert half["AP"] == pytest.approx(100 * (51 / 101 + 1) / 2)
    assert half["AP50_11point"] == pytest.approx(100 * (6 / 11 + 1) / 2)
    wrong = [result(0, 1, (60, 10, 20, 20), 0.95), *every]  # precision 1/2, then 2/3, at most 2/3 at any recall
    assert common.average_precision(truth, wrong, "bbox")["AP50"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    shifted = [*every[:2], result(1, 2, (10, 10, 40, 28), 0.7)]  # IoU 0.7: right at 0.50 to 0.70, five of ten
    shifted = common.average_precision(truth, shifted, "bbox")
    assert shifted["AP"] == pytest.approx(75) and (shifted["AP50"], shifted["AP75"]) == pytest.approx((100, 50))
    assert set(common.average_precision(truth, [], "bbox").values()) == {0.0}


def test_a_difficult_object_is_neither_missed_nor_wrong():
    truth = annotated([[(1, BOX), (1, OTHER, 1)]], classes=["a"])
    assert common.average_precision(truth, [result(0, 1, BOX, 0.5)], "bbox")["AP"] == pytest.approx(100)
    found = [result(0, 1, OTHER, 0.9), result(0, 1, BOX, 0.5)]
    assert common.average_precision(truth, found, "bbox")["AP"] == pytest.approx(100)
    # a box around it is no crowd's member: it is wrong
    found[0] = result(0, 1, (85, 85, 5, 5), 0.9)
    assert common.average_precision(truth, found, "bbox")["AP"] == pytest.approx(50)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and draws belong to (seed, epoch, image)
# ---------------------------------------------------------------------------------------------------------------------


def test_boxes_and_masks_follow_the_image(sets, tmp_path):
    """A red rectangle on black: wherever the image goes, its red pixels, its box and its mask say the same."""
    image = torch.zeros(3, 90, 150, dtype=torch.uint8)
    image[0, 20:50, 20:110] = 255
    write_png(image, str(tmp_path / "a.png"))
    corners = [[20, 20, 110, 20, 110, 50, 20, 50]]
    thing = {"bbox": [20.0, 20.0, 90.0, 30.0], "category_id": 1, "iscrowd": 0, "segmentation": corners}
    source = common.Source("x", 1, lambda _: (tmp_path / "a.png").read_bytes())
    found = common.Annotated(source, [[thing]], ["a"])
    scenes = eval_detection.Scenes(found, seed=3, min_sizes=(90, 180, 200), max_size=300, masks=True)
    shapes, sides = set(), set()
    for epoch in range(40):
        scene, bad = scenes[epoch, 0]
        again, _ = scenes[epoch, 0]
        assert not bad and all(torch.equal(torch.as_tensor(scene[k]), torch.as_tensor(again[k])) for k in scene)
        red = (scene["image"][0] > 127).nonzero()
        low, high = red.amin(0), red.amax(0) + 1
        x0, y0, x1, y1 = scene["boxes"][0].tolist()
        assert (y0, x0) == pytest.approx(low.tolist(), abs=1) and (y1, x1) == pytest.approx(high.tolist(), abs=1)
        marked = scene["masks"][0].nonzero()
        assert (marked.amin(0) - low).abs().max() <= 1 and (marked.amax(0) + 1 - high).abs().max() <= 1
        shapes.add(tuple(scene["image"].shape[1:]))
        sides.add(x0 < scene["image"].shape[2] - x1)
    assert shapes == {(90, 150), (180, 300)} and len(sides) == 2  # 200 would be longer than 300; flipped and not


def sampler_of(kind, labels, seeds=None):
    made = kind(16, 0.25)
    made.seeds = seeds
    return [torch.stack([torch.as_tensor(each).bool() for each in part]) for part in made(labels)]


def test_draws_are_as_many_as_torchvisions_and_fair():
    g = torch.Generator().manual_seed(0)
    for share in (0.0, 0.02, 0.5, 1.0):  # of positives, in 60 anchors of which some are ignored
        labels = [(torch.rand(60, generator=g) < share).long() for _ in range(3)]
        for each in labels:
            each[torch.rand(60, generator=g) < 0.6] = -1
        ours = sampler_of(eval_detection.Sampler, labels, [1, 2, 3])
        theirs = sampler_of(BalancedPositiveNegativeSampler, labels)
        for a, b, wanted in zip(ours, theirs, (1, 0), strict=True):
            assert a.sum(1).tolist() == b.sum(1).tolist()
            assert all((each[chosen] == wanted).all() for each, chosen in zip(labels, a, strict=True))
    labels = [torch.tensor([1] * 8 + [0] * 24)] * 4000
    positive, negative = sampler_of(eval_detection.Sampler, labels, list(range(4000)))
    shares = torch.cat([positive[:, :8].double().mean(0), negative[:, 8:].double().mean(0)])
    assert shares[:8].sub(0.5).abs().max() < 0.04 and shares[8:].sub(0.5).abs().max() < 0.04


def test_an_images_draw_depends_on_its_seed_alone():
    labels = [torch.tensor([1, 0, 0, -1] * 30), torch.tensor([0, 1, -1, 0] * 40)]
    sampler = eval_detection.Sampler(16, 0.25)
    sampler.seeds = [5, 6]
    together = sampler(labels)
    order = sampler.positive
    assert len(order) == 32 and order.sum() == 8
    for i, seed in ((1, 6), (0, 5)):
        torch.manual_seed(i)  # the global generator is not asked
        sampler.seeds = [seed]
        (positive,), (negative,) = sampler(labels[i : i + 1])
        assert torch.equal(positive, together[0][i]) and torch.equal(negative, together[1][i])
        assert torch.equal(sampler.positive, order[16 * i : 16 * i + 16])
    sampler.seeds = [7]
    assert not torch.equal(sampler(labels[:1])[0][0], together[0][0])


# ---------------------------------------------------------------------------------------------------------------------
# The detector
# ---------------------------------------------------------------------------------------------------------------------


def make_detector(name="test_resnet", **flags):
    backbone = make_backbone(name)
    return eval_detection.create_detector(backbone, 3, dataclasses.replace(TINY, **flags)), backbone


def batch(masks=False, sides=((96, 128), (128, 96))):
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *side, generator=g) for side in sides]
    targets = []
    for height, width in sides:
        boxes = torch.tensor([[10.0, 12, 60, 70], [40, 30, 90, 95]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 3])}
        if masks:
            target["masks"] = torch.zeros(2, height, width, dtype=torch.uint8)
            target["masks"][:, 30:60, 40:60] = 1
        targets.append(target)
    return images, targets


def set_seeds(detector, seeds=((1, 2), (3, 4))):
    for part, column in zip((detector.rpn, detector.roi_heads), zip(*seeds, strict=True), strict=True):
        part.fg_bg_sampler.seeds = list(column)


NETWORKS = [
    ("c4", "test_resnet", False), ("c4", "test_resnet", True), ("fpn", "test_resnet", True),
    ("fpn", "test_efficientnet", False), ("fpn", "test_convnext", False), ("fpn", "test_byobnet", False),
    ("fpn", "test_vit", False), ("fpn", "test_vit3", True),
    ("fpn", "mobilenetv3_small_050", False), ("fpn", "resnet18_small", False),
]  # fmt: skip


@pytest.mark.parametrize("detector, name, masks", NETWORKS)
def test_every_parameter_is_trained_and_every_network_finds_something(detector, name, masks):
    """A parameter without a gradient would stop DistributedDataParallel."""
    model, _ = make_detector(name, detector=detector, masks=masks)
    set_seeds(model)
    losses = model(*batch(masks))
    assert set(losses) == set(eval_detection.UNITS) - (set() if masks else {"loss_mask"})
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.requires_grad]
    assert not idle and len(list(model.parameters())) > 20
    before = dict(make_backbone(name).named_parameters())
    kept = {n: p for n, p in model.named_parameters() if ".backbone." in n or ".stage." in n}
    names = [n.rpartition(".backbone.")[2].replace("roi_heads.box_head.stage.", "layer4.") for n in kept]
    assert len(kept) > 10 and all(torch.equal(p, before[n]) for n, p in zip(names, kept.values(), strict=True))
    model.eval()
    model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        out = model(batch()[0][:1])[0]
    assert len(out["boxes"]) > 0 and out["labels"].min() >= 1 and ("masks" in out) == masks
    if masks:
        assert out["masks"].shape[1:] == (1, 96, 128)


@pytest.mark.parametrize("name, width", [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)])
def test_c4_is_the_papers(name, width):
    """Anchors of 32 to 512 px in three shapes on the stride-16 map; res5 and an extra BatchNorm on 14 x 14 regions."""
    args = eval_detection.Args()
    detector = eval_detection.create_detector(make_backbone(name), 20, args)
    areas = detector.rpn.anchor_generator.generate_anchors((32, 64, 128, 256, 512), (0.5, 1.0, 2.0))
    assert torch.equal(detector.rpn.anchor_generator.cell_anchors[0], areas)
    assert detector.rpn.head.cls_logits.out_channels == 15
    head, pool = detector.roi_heads.box_head, detector.roi_heads.box_roi_pool
    assert pool.output_size == (14, 14) and pool.scales == [1 / 16]
    assert isinstance(head.norm, nn.BatchNorm2d) and head.norm.num_features == width
    assert not list(detector.backbone.backbone.layer4.parameters()) and list(head.stage.parameters())
    samplers = detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler
    assert [(s.batch_size_per_image, s.positive_fraction) for s in samplers] == [(256, 0.5), (512, 0.25)]
    assert (detector.rpn._pre_nms_top_n, detector.rpn._post_nms_top_n) == (
        {"training": 12000, "testing": 6000}, {"training": 2000, "testing": 1000})  # fmt: skip
    assert not [m for m in detector.modules() if "Frozen" in type(m).__name__]


def test_an_fpn_has_the_usual_levels_and_anchors():
    detector, _ = make_detector("test_efficientnet", detector="fpn", masks=True)
    generator = detector.rpn.anchor_generator
    assert generator.sizes == ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))
    assert detector.roi_heads.box_roi_pool.scales == detector.roi_heads.mask_roi_pool.scales == [0.25, 0.125, 1 / 16, 1 / 32]  # fmt: skip


def test_mask_maps_are_those_that_the_boxes_came_from():
    detector, _ = make_detector(masks=True)
    seen = []
    detector.roi_heads.box_head.register_forward_hook(lambda m, _, out: seen.append((m.maps, out)))
    detector.roi_heads.mask_head.register_forward_hook(lambda m, _, out: seen.append(out))
    set_seeds(detector)
    detector(*batch(True))
    (maps, pooled), positive = seen
    rows = detector.roi_heads.fg_bg_sampler.positive
    assert torch.equal(positive, maps[rows]) and torch.equal(pooled, maps.mean((2, 3)))
    assert 0 < rows.sum() < len(rows) <= 32 and detector.roi_heads.box_head.maps is None


def test_inputs_are_normalised_as_the_checkpoint_says_and_pools_do_not_guess():
    detector, backbone = make_detector()
    images, targets = batch(sides=((64, 64), (64, 64)))
    made, _ = detector.transform([images[0]], [targets[0]])
    expected = (images[0] - backbone.input_mean[0]) / backbone.input_std[0]
    torch.testing.assert_close(made.tensors[0], expected)
    guessing = MultiScaleRoIAlign(["0"], 14, 2)
    maps = {"0": torch.zeros(1, 1, 16, 16)}  # a small image in a batch that was padded to 256 px
    guessing(maps, [torch.zeros(1, 4)], [(64, 64)])
    assert guessing.scales == [0.25] and detector.roi_heads.box_roi_pool.scales == [1 / 16]


def test_training_images_keep_their_size_and_evaluation_resizes():
    detector, _ = make_detector(test_size=64, max_size=80)
    images, targets = batch(sides=((90, 100), (70, 40)))
    made, same = detector.transform(images, targets)
    assert made.image_sizes == [(90, 100), (70, 40)] and made.tensors.shape[2:] == (96, 128)
    assert torch.equal(same[0]["boxes"], targets[0]["boxes"]) and not made.tensors[1, :, 70:].any()
    made, _ = detector.eval().transform(images[:1])
    assert made.image_sizes == [(64, 71)]


def test_normalisations_are_not_decayed_and_the_rest_is(sets, tiny, tmp_path, monkeypatch):
    groups = {}
    make = common.create_optimizer

    def spy(name, params, lr, **kwargs):
        groups["all"] = params
        return make(name, params, lr, **kwargs)

    monkeypatch.setattr(common, "create_optimizer", spy)
    eval_detection.main(arguments(tiny, sets[0], tmp_path / "run", total_steps=1))
    others, norms = (group["params"] for group in groups["all"])
    assert [group["weight_decay"] for group in groups["all"]] == [1e-4, 0]
    assert all(p.ndim == 1 for p in norms) and len(norms) > 10 and any(p.ndim == 4 for p in others)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(sets, tiny, tmp_path_factory) -> tuple[Path, dict]:
    """A short run on the VOC folder."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, eval_detection.main(arguments(tiny, sets[0], run_dir))


def test_a_run_leaves_its_record_and_a_picture(whole):
    run_dir, figures = whole
    lines = logged(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    parts = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[name] for name in parts), rel=1e-5)
    assert [line["lr"] for line in lines] == pytest.approx([1e-5, 0.01 * (0.001 + 0.999 / 2), 0.01, 0.001])
    results = json.loads((run_dir / "results.json").read_text())
    assert results["box_AP"] == figures["box_AP"] and results["flags"]["roi_samples"] == 16
    assert results["train_images"] == 16 and results["query_images"] == 4
    assert results["trainer"] == "eval_detection" and results["architecture"] == "test_resnet"
    assert len(results["data_fingerprint"]) == 8 and results["versions"]["torch"] == torch.__version__
    assert decode_image(read_file(str(run_dir / "pictures" / "0000.png"))).shape == (3, 512, 512)
    assert len(list((run_dir / "pictures").iterdir())) == 1 and not (run_dir / "release").exists()


def test_both_formats_train_alike_and_give_the_same_figure(whole, sets, tiny, tmp_path):
    run_dir, figures = whole
    assert eval_detection.main(arguments(tiny, sets[1], tmp_path / "run")) == figures
    assert logged(tmp_path / "run") == logged(run_dir)


def test_a_resumed_run_repeats_the_uninterrupted_one(whole, sets, tiny, tmp_path):
    run_dir, figures = whole
    resumed = tmp_path / "resumed"
    shutil.copytree(run_dir, resumed)
    shutil.rmtree(resumed / "step_00000004")
    torch.manual_seed(99)
    assert eval_detection.main(arguments(tiny, sets[0], resumed, resume=True)) == figures
    assert logged(resumed) == logged(run_dir)
    ours, theirs = (torch.load(r / "step_00000004" / "state.pt")["state"] for r in (resumed, run_dir))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


ON_TWO = {"masks": {"masks": True}, "fpn": {"detector": "fpn", "min_sizes": (64, 96), "total_steps": 3}}


@pytest.fixture(scope="module")
def on_two(sets, tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("on_two")
    cases = [words(arguments(tiny, sets[1], folder / name, post_nms=(6, 20), **ON_TWO[name])) for name in ON_TWO]
    run_pair(folder, [("eval_detection", case, True) for case in cases])
    return folder


@pytest.mark.parametrize("name", ON_TWO)
def test_two_processes_train_and_find_as_one(name, on_two, sets, tiny, tmp_path):
    """Images of two sizes, so that padding differs; fewer regions on some than on others; masks on some only."""
    runs = tmp_path, on_two / name
    run_here("eval_detection", words(arguments(tiny, sets[1], tmp_path, post_nms=(6, 20), **ON_TWO[name])))
    facts = [json.loads((run / "environment.json").read_text())["num_processes"] for run in runs]
    assert facts == [1, 2]
    one, two = map(logged, runs)
    assert len(one) == len(two) == ON_TWO[name].get("total_steps", 4)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() >= {"loss", "loss_classifier", "lr"}
        # float64 all through but for torchvision's objectness, whose labels are float32
        assert list(b.values()) == pytest.approx(list(a.values()), rel=1e-6)
    figures = [{k: v for k, v in json.loads((r / "results.json").read_text()).items() if "_AP" in k} for r in runs]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6) and len(figures[0]) >= 4


def test_a_mean_over_the_global_batch_is_not_the_mean_of_the_processes(monkeypatch):
    """Two images with 16 and 4 regions: the second process's loss counts a quarter of the first's."""
    detector, _ = make_detector(masks=True)
    detector.rpn.fg_bg_sampler.positive = torch.tensor([True] * 4)
    detector.roi_heads.fg_bg_sampler.positive = torch.tensor([True, False, False, False])
    fake = type("Two", (), {"num_processes": 2, "device": "cpu"})()
    fake.reduce = lambda counts, _: counts + torch.tensor([12.0, 16.0, 0.0])
    losses = {name: torch.tensor(1.0) for name in eval_detection.UNITS}
    weighted = eval_detection.global_means(losses, detector, fake)
    assert {k: v.item() for k, v in weighted.items()} == pytest.approx(
        {
            "loss_objectness": 0.5,
            "loss_rpn_box_reg": 0.5,
            "loss_classifier": 0.4,
            "loss_box_reg": 0.4,
            "loss_mask": 2.0,
        }
    )


def test_bf16_trains(sets, tiny, tmp_path, precision):
    precision("bf16")
    eval_detection.main(arguments(tiny, sets[1], tmp_path / "run", masks=True, total_steps=2))
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["mixed_precision"] == "bf16"
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


LEARN = {
    "min_sizes": (SIDE,), "test_size": SIDE, "max_size": SIDE, "rpn_samples": 256, "roi_samples": 24, "pre_nms": (300, 300),
    "post_nms": (100, 100), "total_steps": 150, "base_lr": 0.05, "warmup_steps": 10, "milestones": (120,),
    "save_every": 150, "log_every": 10, "pictures": 2,
}  # fmt: skip


def learn(pictures: dict, folder: Path, network="resnet10_scenes", **flags) -> tuple[dict, dict]:
    """Train on one format, evaluate the same detector before and after on both; returns (before, after)."""
    voc, coco = write_scenes(folder / "sets", pictures, train=64, val=16)
    make_run(folder / "net", make_backbone(network))
    data, kinds = (coco, ("bbox", "segm")) if flags.get("masks") else (voc, ("bbox",))
    args = dataclasses.replace(arguments(folder / "net", data, folder / "run"), **{**LEARN, **flags})
    torch.manual_seed(0)
    trained = eval_detection.main(args)
    tests = [common.open_objects(str(each), "eval", classes=sorted(pictures["train"])) for each in (coco, voc)]
    detector = eval_detection.create_detector(make_backbone(network), len(pictures["train"]), args)
    figures = []
    for state in (None, folder / "run" / f"step_{args.total_steps:08}" / "state.pt"):
        if state:
            detector.load_state_dict(torch.load(state)["state"]["detector"])
        found = eval_detection.detect(detector, tests[0], Accelerator(cpu=True), 0)
        values = {kind: common.average_precision(tests[0], found, kind) for kind in kinds}
        assert common.average_precision(tests[1], found, "bbox") == values["bbox"]
        names = zip(("box", "mask"), values.values(), strict=False)
        figures.append({f"{name}_{key}": value for name, each in names for key, value in each.items()})
    if not flags.get("masks"):
        assert eval_detection.detect(detector, tests[1], Accelerator(cpu=True), 0) == found
    assert figures[1] == trained
    return tuple(figures)


def test_a_short_run_learns_to_find_and_cut_out_digits(tmp_path):
    untrained, trained = learn(coloured_digits(), tmp_path, masks=True)
    assert untrained["box_AP50"] < 5 and trained["box_AP50"] > 50 and trained["box_AP"] > 20
    assert untrained["mask_AP50"] < 5 and trained["mask_AP50"] > 50  # measured: boxes 63.7 (AP 31.5), masks 64.0


def test_a_pyramid_on_no_resnet_learns_too(tmp_path):
    flags = {"min_sizes": (64,), "test_size": 64, "max_size": 64, "anchor_scale": 4.0}
    flags |= {"detector": "fpn", "total_steps": 80, "milestones": (64,), "base_lr": 0.02, "roi_samples": 32}
    untrained, trained = learn(coloured_digits(), tmp_path, "test_efficientnet", **flags)
    assert untrained["box_AP50"] < 5 and trained["box_AP50"] > 20  # measured: 73.9 (AP 34.5)


def test_a_short_run_learns_to_find_real_images(real_images, tmp_path):
    untrained, trained = learn(tiny_imagenet(), tmp_path)
    assert untrained["box_AP50"] < 5 and trained["box_AP50"] > 20  # measured: 0.3 and 37.1


def small_table(folder: Path) -> Path:
    """A parquet file without objects."""
    write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(folder / "a.png"))
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [str(folder / "a.png")] * 4, "caption": ["x"] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "rows.parquet"))
    return folder / "rows.parquet"


MISTAKES = {
    "no data": ({"data": ""}, "--data is missing", "VOC", "COCO"),
    "a folder that is not there": ({"data": "./nowhere"}, "--data ./nowhere", "no such file or folder"),
    "no checkpoint": ({"checkpoint": None}, "--checkpoint is missing", "timm/"),
    "a split that is not there": ({"split": "test"}, "--split test", "train, val"),
    "a query split that is not there": ({"query_split": "test"}, "--query-split test", "train, val"),
    "masks of boxes": ({"masks": True}, "--masks", "no segmentation"),
    "epochs and steps": ({"epochs": 2.0}, "--epochs 2.0", "--total-steps 4 wins"),
    "no anchors": ({"rpn_samples": 0}, "--rpn-samples 0", "at least 1"),
    "no regions": ({"roi_samples": 0}, "--roi-samples 0", "at least 1"),
    "no proposals": ({"post_nms": (0, 5)}, "--post-nms 0 5", "at least 1"),
    "no candidates": ({"pre_nms": (5, 0)}, "--pre-nms 5 0", "at least 1"),
    "no sizes": ({"min_sizes": ()}, "--min-sizes", "at least 32"),
    "a small size": ({"min_sizes": (16, 64)}, "--min-sizes 16 64", "at least 32"),
    "a small evaluation size": ({"test_size": 8}, "--test-size 8", "at least 32"),
    "no longest side": ({"max_size": 0}, "--max-size 0", "at least 32"),
    "no anchor scale": ({"anchor_scale": 0.0}, "--anchor-scale 0.0", "above 0"),
    "a negative warm-up": ({"warmup_steps": -1}, "--warmup-steps -1", "at least 0"),
    "negative pictures": ({"pictures": -1}, "--pictures -1", "at least 0"),
    "a batch above the data": ({"batch_size": 33}, "--batch-size 33", "16 images"),
    "a learning rate that blows up": ({"base_lr": 1e30, "warmup_steps": 0}, "not finite", "--base-lr"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_the_remedy(sets, tiny, tmp_path, mistake):
    flags, *parts = MISTAKES[mistake]
    args = dataclasses.replace(arguments(tiny, sets[0], tmp_path / "run"), **flags)
    message = stop_message(eval_detection.main, args)
    assert all(part in message for part in parts), message


def test_a_missing_pycocotools_is_named(sets, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = stop_message(eval_detection.main, arguments(tiny, sets[0], tmp_path / "run"))
    assert "pycocotools" in message and "pip install -e .[detection]" in message


@pytest.mark.parametrize(
    "name, flags, parts",
    [
        ("test_efficientnet", {}, ("--detector c4", "test_efficientnet", "--detector fpn")),
        ("test_vit", {}, ("--detector c4", "test_vit", "--detector fpn")),
        ("resnet20", {"detector": "fpn"}, ("resnet20", "prune_intermediate_layers", "choose another")),
        ("test_maxvit", {"detector": "fpn"}, ("test_maxvit", "any size")),
    ],
)
def test_a_network_that_does_not_fit_is_named(name, flags, parts):
    message = stop_message(eval_detection.create_detector, make_backbone(name), 3, dataclasses.replace(TINY, **flags))
    assert all(part in message for part in parts), message


def test_files_that_are_not_what_they_should_be_are_named(sets, tmp_path):
    voc, coco = tmp_path / "voc", tmp_path / "coco"
    shutil.copytree(sets[0], voc)
    shutil.copytree(sets[1], coco)
    table = small_table(tmp_path)
    assert "caption" in (message := stop_message(common.open_objects, str(table))) and "bbox" in message
    assert "--objects-column caption" in stop_message(common.open_objects, str(table), objects_column="caption")
    file = voc / "train" / "Annotations" / "0003.xml"
    for text in ("<annotation><object></annotation>", "<annotation><object><name>a</name></object></annotation>"):
        file.write_text(text)
        assert "0003.xml is no VOC annotation" in stop_message(common.open_objects, str(voc))
    file.unlink()
    (voc / "train" / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "train" / "ImageSets" / "Main" / "some.txt").write_text("0002\n0003\n")
    message = stop_message(common.open_objects, str(voc / "train"), split="some")
    assert "0003.xml is no VOC annotation" in message and "No such file" in message
    file = coco / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    for key in ("category_id", "image_id"):
        strange = {**content["annotations"][0], key: 999}
        file.write_text(json.dumps({**content, "annotations": [strange]}))
        message = stop_message(common.open_objects, str(coco))
        assert "instances_train.json is no COCO file" in message
        assert "annotation 1 is of a category or an image that is not listed" in message
    file.write_text(json.dumps(content))
    shutil.rmtree(coco / "images" / "train")
    assert "0000.png of instances_train.json is not in" in stop_message(common.open_objects, str(coco))
    content["annotations"] = []
    file.write_text(json.dumps(content))
    shutil.copytree(sets[1] / "images" / "train", coco / "images" / "train")
    assert "no object" in stop_message(common.open_objects, str(coco))
    del content["categories"]
    file.write_text(json.dumps(content))
    assert "no 'categories'" in stop_message(common.open_objects, str(coco))
    file.write_text("{")
    assert "instances_train.json is no COCO file" in stop_message(common.open_objects, str(coco))
    for split in ("train", "val"):
        (coco / "annotations" / f"instances_{split}.json").rename(coco / "annotations" / f"{split}_boxes.json")
    message = stop_message(common.open_objects, str(coco))
    assert "--split" in message and "train_boxes, val_boxes" in message


def test_images_that_cannot_be_read_are_skipped_and_listed(sets, tiny, tmp_path):
    """In training the next image with its own boxes; in evaluation an image in which nothing is found."""
    voc = tmp_path / "voc"
    shutil.copytree(sets[0], voc)
    for split, name in (("train", "0002"), ("val", "0001")):
        (voc / split / "JPEGImages" / f"{name}.png").write_bytes(b"no image")
    eval_detection.main(arguments(tiny, voc, tmp_path / "run"))
    bad = (tmp_path / "run" / "bad_images.txt").read_text()
    assert "train/JPEGImages/0002.png" in bad and "val/JPEGImages/0001.png" in bad
    found = common.open_objects(str(voc))
    scene, bad = eval_detection.Scenes(found, 0, (256,), 300)[0, 2]
    whole, _ = eval_detection.Scenes(found, 0, (256,), 300)[0, 3]
    assert len(bad) == 1 and all(torch.equal(torch.as_tensor(scene[k]), torch.as_tensor(whole[k])) for k in scene)


def change_boxes(voc: Path, split: str, name: str, corners: tuple[int, ...] | None) -> None:
    """Give an image's first object other corners; None: take the image away."""
    if corners is None:
        (voc / split / "JPEGImages" / f"{name}.png").unlink()
        return
    file = voc / split / "Annotations" / f"{name}.xml"
    text = file.read_text()
    for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
        text = re.sub(f"<{key}>.*?</{key}>", f"<{key}>{value}</{key}>", text, count=1)
    file.write_text(text)


def test_a_box_without_area_or_outside_its_image_and_a_missing_image_are_told(sets, tiny, tmp_path, capsys):
    voc = tmp_path / "voc"
    shutil.copytree(sets[0], voc)
    change_boxes(voc, "train", "0001", (11, 11, 10, 40))  # no pixel wide
    change_boxes(voc, "train", "0002", (301, 11, 340, 40))
    change_boxes(voc, "val", "0000", None)
    whole = common.open_objects(str(sets[0]))
    found = common.open_objects(str(voc))
    assert found.fingerprint() != whole.fingerprint() and found.source.fingerprint() == whole.source.fingerprint()
    eval_detection.main(arguments(tiny, voc, tmp_path / "run", masks=False))
    assert "1 objects are crowds or have no area: not trained on" in capsys.readouterr().out
    bad = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    outside = "0002.png: the box [300.0, 10.0, 40.0, 30.0] lies outside the image of 256 x 256 px (--box-format?)"
    assert len(bad) == 2 and bad[0].endswith(outside) and "No such file" in bad[1] and "0000.png" in bad[1]
    assert [file.name for file in (tmp_path / "run" / "pictures").iterdir()] == ["0001.png"]

    for name in ("0003", "0004", "0005"):
        change_boxes(voc, "train", name, (301, 11, 340, 40))
    message = stop_message(eval_detection.main, arguments(tiny, voc, tmp_path / "more"))
    assert "images cannot be read (over 1 %)" in message and "lies outside" in message and "--box-format" in message
    for file in (voc / "train" / "Annotations").glob("*.xml"):
        file.write_text(re.sub(r"<xmax>.*?</xmax>", "<xmax>0</xmax>", file.read_text()))
    message = stop_message(common.open_objects, str(voc))
    assert "no object of some area" in message and "box format" in message


def test_boxes_are_cut_at_the_images_edge():
    boxes = torch.tensor([[-5.0, 2, 10, 12], [90, 2, 110, 12], [99, 0, 199, 10], [200, 0, 210, 10], [0, 0, 100, 50]])
    cut, inside = common.boxes_inside(boxes, 50, 100)
    assert cut[:2].tolist() == [[0, 2, 10, 12], [90, 2, 100, 12]] and torch.equal(cut[4], boxes[4])
    assert inside.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("masks", [False, True])
def test_an_image_whose_boxes_are_all_outside_is_background(masks):
    thing = {"bbox": [200.0, 5.0, 20.0, 20.0], "category_id": 1, "iscrowd": 0, "segmentation": [[1, 1, 3, 1, 3, 3]]}
    source = common.Source("x", 1, pixels=torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    scenes = eval_detection.Scenes(common.Annotated(source, [[thing]], ["a"]), 0, (64,), 96, masks)
    scene, bad = scenes[0, 0]
    assert len(bad) == 1 and scene["boxes"].shape == (0, 4)
    model, _ = make_detector(masks=masks)
    set_seeds(model)
    images, targets = batch(masks, sides=((96, 128), (64, 96)))
    targets[1] = {k: v.float() if k == "boxes" else v for k, v in scene.items() if k not in ("image", "index")}
    losses = model(images, targets)
    assert all(torch.isfinite(value) for value in losses.values()) and len(losses) == 4 + masks
