"""Object detection and instance segmentation: a checkpoint as the backbone of Faster or Mask R-CNN, fine-tuned whole.

    L = L_objectness + L_rpn_box + L_class + L_box (+ L_mask)                     arXiv:1506.01497, arXiv:1703.06870
    AP = mean over classes and IoU 0.50, 0.55, ..., 0.95 of the precision at 101 recalls           COCO, pycocotools

`--detector c4` is DisCo's and MoCo's: proposals on a ResNet's stride-16 map, its last stage and an extra BatchNorm on
each of them, BatchNorm synchronised and trained. `--detector fpn` puts a feature pyramid on any timm network that has
feature maps. Everything but the last layers is the checkpoint's and nothing is frozen. The parts are torchvision's.
Reference code: github.com/facebookresearch/moco @ 64444f4, detection/; github.com/Yuting-Gao/DisCo-pytorch @ 1d732c8 for
its settings, the defaults here. Both run on Detectron2. Differences from them:
  D1. torchvision's parts where they differ: smooth L1 (beta 1/9) on boxes, there L1; RoIAlign of 2 x 2 samples a bin
      without the half-pixel shift, there as many as the box asks for, with it; masks cropped from bitmaps, not polygons;
      the last layers start as torch's Linear does, there from N(0, 0.01) and N(0, 0.001).
  D2. Every loss is a mean over what was drawn from the global batch, there from a GPU's; images are padded to the largest
      of the global batch, because BatchNorm sees the padding. Which anchors and proposals are drawn follows from (seed,
      epoch, image). Images are not grouped by aspect ratio.
  D3. The BatchNorm statistics that the training left, there measured anew on 200 batches ("precise BN").
  D4. Inputs are normalised as in pre-training. DisCo's pascal_voc_R_50_C4_24k_moco.yaml states that too, but under the
      first of two MODEL keys, of which YAML keeps the last; the first BatchNorm undoes most of it. STRIDE_IN_1X1 is lost
      with it; here a bottleneck's stride is where the checkpoint has it.
  D5. AP is COCO's on VOC as well. AP50_11point is VOC 2007's metric as far as COCO's matching allows (precision at 11
      recalls, difficult objects left out): near the authors' AP50, not the official tool's.

Run:  accelerate launch trainers/eval_detection.py --config configs/eval_detection/voc0712_c4.toml --data VOCDEVKIT --checkpoint runs/disco
Results: configs/eval_detection/*.toml record command, hardware, time and AP of each run.
"""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/eval_detection")
    """where checkpoints, metrics.jsonl, the resolved flags and the release folder are written"""
    seed: int = 0
    """seeds weights, data order and views; equal flags on one machine give equal losses"""
    resume: bool = False
    """continue exactly from run_dir's newest checkpoint, with its flags; at step 0 if it has none yet"""
    save_every: int = 1000
    """steps between checkpoints; one more is written at the end and on SIGTERM"""
    keep: int = 2
    """newest checkpoints to keep"""
    log_every: int = 10
    """steps between lines of metrics.jsonl; a smaller number waits for the GPU more often"""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """mirror metrics.jsonl to this tracker (an extra: pip install -e .[track])"""
    pictures: int = 8
    """evaluation images to draw into run_dir/pictures: true boxes green, found ones (score 0.5 and above) red"""

    # --- data ---
    data: str = ""
    """folder in PASCAL VOC's or COCO's layout, or any datasets layout with a column of objects; + joins splits"""
    data_config: str = ""
    """configuration of a datasets layout or Hub data set that has several; org/name:config says it too"""
    split: str = ""
    """split to train on, where "train" is not it; "." takes all folders of a folder for classes"""
    query_split: str = ""
    """split to evaluate on, where it is not the usual one (validation, val, valid, test)"""
    image_column: str = ""
    """image column, where it cannot be told by its type"""
    objects_column: str = ""
    """column of boxes and their classes, where it cannot be told by its fields"""
    box_format: Literal["xywh", "xyxy"] = "xywh"
    """what a column's boxes are: corner and size, or two corners; VOC's and COCO's files need no telling"""
    num_workers: int = 8
    """data workers per process for images that do not stay in memory (above 96 px)"""
    max_megapixels: float = 179
    """images of more pixels, in millions, count as unreadable: a small file may unpack to more than the memory"""
    min_sizes: tuple[int, ...] = (400, 480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """shorter sides of training images, pixels, one drawn for each image of an epoch [DisCo pascal_voc_R_50_C4_24k.yaml]"""
    test_size: int = 800
    """shorter side of evaluation images, pixels [Detectron2]"""
    max_size: int = 1333
    """longest side of any image, pixels; wins over the shorter side [Detectron2]"""

    # --- models ---
    checkpoint: str | None = None
    """network to evaluate: the same forms as --teacher"""
    detector: Literal["c4", "fpn"] = "c4"
    """c4: one map of stride 16, the last stage on each region, ResNets only; fpn: a pyramid, any network with feature maps"""
    masks: bool = False
    """instance segmentation as well (Mask R-CNN); the data must hold segmentations, as COCO's files do"""

    # --- method ---
    anchor_scale: float = 8.0
    """side of a square anchor in strides of its map; c4 has it x 1/4, 1/2, 1, 2 and 4 [Detectron2: 32 to 512 px]"""
    rpn_samples: int = 256
    """anchors per image in the loss of the proposals, half of them positive if there are as many [Detectron2]"""
    roi_samples: int = 512
    """proposals per image in the losses of the regions, a quarter of them positive [Detectron2]"""
    pre_nms: tuple[int, int] = (12000, 6000)
    """best anchors per map before non-maximum suppression, in training and evaluation [Detectron2 C4; its FPN 2000 1000]"""
    post_nms: tuple[int, int] = (2000, 1000)
    """proposals per image after it [Detectron2 C4; its FPN 1000 1000]"""

    # --- optimisation ---
    epochs: float = 0.0
    """passes over the data; the schedule's length unless --total-steps is given"""
    total_steps: int = 48_000
    """optimizer steps; 0: derived from --epochs, otherwise it wins"""
    batch_size: int = 32
    """images per optimizer step, over all processes"""
    base_lr: float = 0.01
    """SGD learning rate, not scaled by the batch [DisCo Base-RCNN-C4-BN.yaml; MoCo 0.02 for 16 images]"""
    warmup_steps: int = 200
    """steps of linear warm-up from a thousandth [DisCo; MoCo 100 on VOC, 1000 on COCO]"""
    milestones: tuple[int, ...] = (18_000, 22_000)
    """steps at which the learning rate decays [MoCo and DisCo, pascal_voc_R_50_C4_24k.yaml]"""
    lr_decay: float = 0.1
    """its factor [Detectron2]"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters but the normalisations' [Detectron2]"""


class Scenes(common.Crops):
    """Image `index` with its boxes, resized and flipped as (seed, epoch, index) say; runs in the data workers.

    Without `min_sizes` the image alone, as it is, for evaluation.
    """

    def __init__(self, annotated: common.Annotated, seed=0, min_sizes=(), max_size=0, masks=False):
        super().__init__(annotated.source, (), seed)
        self.objects, self.min_sizes, self.max_size, self.masks = annotated.objects, min_sizes, max_size, masks
        self.stated = annotated.sizes

    def __getitem__(self, key: tuple[int, int]) -> tuple[dict, list[tuple[int, str]]]:
        epoch, index = key
        image, read, bad = self.decode(index)
        if not self.min_sizes:
            return {"image": image, "index": index}, bad
        index = read  # where one is unreadable the next, with its own boxes
        height, width = image.shape[1:]
        if self.stated and height != width and self.stated[index] == (width, height):
            why = (
                f"the boxes are of {height} x {width} px, the upright image has {width} x {height} (EXIF orientation)"
            )
            bad.append((index, f"{self.source.where(index)}: {why}"))
        size, flip = common.uniforms(self.seed, epoch, torch.tensor([index]), 0, 2)[0].tolist()
        side = self.min_sizes[int(size * len(self.min_sizes))]
        scale = min(side / min(height, width), self.max_size / max(height, width))
        new = [round(height * scale), round(width * scale)]
        things = common.usable_objects(self.objects[index])
        boxes = box_convert(torch.tensor([t["bbox"] for t in things], dtype=torch.float64), "xywh", "xyxy")
        boxes, inside = common.boxes_inside(boxes, height, width)
        kept, outside = (rows.nonzero().flatten().tolist() for rows in (inside, ~inside))
        for box in [things[i]["bbox"] for i in outside]:
            why = f"the box {box} lies outside the image of {width} x {height} px (--box-format?)"
            bad.append((index, f"{self.source.where(index)}: {why}"))
        boxes, things = boxes[kept], [things[i] for i in kept]
        boxes *= torch.tensor([new[1] / width, new[0] / height] * 2)
        scene = {"image": tvf.resize(image, new, antialias=True), "boxes": boxes, "index": index}
        scene["labels"] = torch.tensor([t["category_id"] for t in things], dtype=torch.int64)
        if self.masks:
            masks = [common.object_bitmap(t["segmentation"], height, width) for t in things]
            masks = torch.stack(masks) if things else torch.zeros(0, height, width, dtype=torch.uint8)
            scene["masks"] = tvf.resize(masks, new, tvf.InterpolationMode.NEAREST)
        if flip < 0.5:
            boxes[:, [0, 2]] = new[1] - boxes[:, [2, 0]]
            scene |= {name: scene[name].flip(2) for name in ("image", "masks") if name in scene}
        return scene, bad

    @staticmethod
    def collate(samples: list) -> tuple[list[dict], Tensor, list[tuple[int, str]]]:
        return [s for s, _ in samples], torch.zeros(len(samples), 3), [b for _, bad in samples for b in bad]


class SceneBatches(common.Batches):
    """common.Batches whose samples are whole images with their boxes."""

    def __init__(self, annotated: common.Annotated, args: Args, **options):
        views = [(None, max(args.min_sizes))]
        super().__init__(annotated.source, views, args.batch_size, seed=args.seed, **options)
        self.annotated, self.args = annotated, args

    def samples(self) -> Scenes:
        return Scenes(self.annotated, self.seed, self.args.min_sizes, self.args.max_size, self.args.masks)

    def scenes(self, step: int) -> tuple[list[Tensor], list[dict[str, Tensor]], Tensor]:
        """This process's share of a step: images (3, H, W) in [0, 1], torchvision's targets, (B, 2) seeds to draw with."""
        scenes, dtype = self._streamed(step)[0], torch.get_default_dtype()
        indices = torch.tensor([scene.pop("index") for scene in scenes])
        seeds = (common.uniforms(self.seed, self.epoch(step), indices, 1, 2) * 2**53).long()
        scenes = [{k: v.to(self.device, non_blocking=True) for k, v in scene.items()} for scene in scenes]
        for scene in scenes:
            scene["boxes"] = scene["boxes"].to(dtype)
        return [scene.pop("image").to(dtype).div_(255) for scene in scenes], scenes, seeds


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's choice of anchors or proposals, but drawn for each image from its own seed, in `seeds`.

    The numbers come from the CPU: every device and any number of processes choose the same. `positive` (drawn,) bool says
    of the last choice, in the order of the images, which are.
    """

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen = []
        for each, seed in zip(labels, self.seeds, strict=True):
            draw = torch.rand(len(each), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            draw = draw.to(each.device)
            positive = first(each >= 1, draw, int(self.batch_size_per_image * self.positive_fraction))
            chosen.append((positive, first(each == 0, draw, self.batch_size_per_image - positive.sum())))
        self.positive = torch.cat([p[p | n] for p, n in chosen])
        positives, negatives = map(list, zip(*chosen, strict=True))
        return positives, negatives


def first(among: Tensor, draw: Tensor, count: int | Tensor) -> Tensor:
    """The `count` members with the smallest numbers. among (N,) bool, draw (N,) -> (N,) bool."""
    return among & (draw.masked_fill(~among, 2.0).argsort().argsort() < count)


class Transform(GeneralizedRCNNTransform):
    """torchvision's; training images come resized and are padded to the largest of the global batch, D2."""

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        return (image, target) if self.training else super().resize(image, target)

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        sides = torch.tensor([image.shape[1:] for image in images], device=images[0].device)
        sides = (common.gather(sides) if self.training else sides).amax(0)
        height, width = (-(-side // size_divisible) * size_divisible for side in sides.tolist())
        return torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])


class Res5(nn.Module):
    """The c4 head: last stage and extra norm on each region, then the mean; (R, C, 14, 14) -> (R, D)."""

    def __init__(self, stage: nn.Module, width: int, masks: bool):
        super().__init__()
        self.stage, self.norm, self.masks, self.maps = stage, nn.BatchNorm2d(width), masks, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stage(x))
        self.maps = x if self.masks else None
        return x.mean((2, 3))


class Res5Maps(nn.Module):
    """The c4 mask head: in training the positive regions of what the boxes are predicted from, as in Detectron2."""

    def __init__(self, res5: Res5, sampler: Sampler):
        super().__init__()
        self.others = res5, sampler  # a tuple: they are the box head's parameters

    def forward(self, x: Tensor) -> Tensor:
        res5, sampler = self.others
        if not self.training:
            res5(x)
        maps, res5.maps = res5.maps, None
        return maps[sampler.positive] if self.training else maps


def create_detector(backbone: nn.Module, num_classes: int, args: Args) -> FasterRCNN:
    """Faster or Mask R-CNN, classes from 1, on a backbone that becomes part of it. Raises SystemExit if it cannot be."""
    sampler, classes = Sampler(args.roi_samples, 0.25), num_classes + 1
    if args.detector == "c4":
        if not isinstance(backbone, ResNet):
            name = backbone.pretrained_cfg["architecture"]
            raise SystemExit(f"--detector c4: {name} is no ResNet, whose last stage it takes; use --detector fpn")
        width = backbone.num_features
        res5 = Res5(backbone.layer4, width, args.masks)
        maps = body = common.FeatureMaps(backbone, stage=3)
        body.out_channels = maps.channels[0]
        heads = {"box_head": res5, "box_predictor": FastRCNNPredictor(width, classes)}
        if args.masks:
            heads |= {"mask_head": Res5Maps(res5, sampler), "mask_predictor": MaskRCNNPredictor(width, 256, classes)}
        sides = [[scale * args.anchor_scale * maps.strides[0] for scale in (0.25, 0.5, 1, 2, 4)]]
        resolution = {"box": 14, "mask": 14}
    else:
        maps = common.FeatureMaps(backbone)
        body = nn.Sequential(maps, FeaturePyramidNetwork(maps.channels, 256, extra_blocks=LastLevelMaxPool()))
        body.out_channels, heads = 256, {"num_classes": classes}
        sides = [[args.anchor_scale * stride] for stride in (*maps.strides, 2 * maps.strides[-1])]
        resolution = {"box": 7, "mask": 14}
    levels = {str(i): torch.zeros(1, 1, 256 // stride, 256 // stride) for i, stride in enumerate(maps.strides)}
    for kind in ("box", "mask")[: 1 + args.masks]:
        pool = MultiScaleRoIAlign(list(levels), resolution[kind], sampling_ratio=2)
        pool(levels, [torch.zeros(1, 4)], [(256, 256)])  # it keeps the scales that it infers first: not from padding
        heads[f"{kind}_roi_pool"] = pool
    detector = (MaskRCNN if args.masks else FasterRCNN)(
        body,
        rpn_anchor_generator=AnchorGenerator(tuple(map(tuple, sides)), ((0.5, 1.0, 2.0),) * len(sides)),
        rpn_pre_nms_top_n_train=args.pre_nms[0],
        rpn_pre_nms_top_n_test=args.pre_nms[1],
        rpn_post_nms_top_n_train=args.post_nms[0],
        rpn_post_nms_top_n_test=args.post_nms[1],
        **heads,
    )
    mean, std = (value.flatten().tolist() for value in (maps.backbone.input_mean, maps.backbone.input_std))
    detector.transform = Transform(args.test_size, args.max_size, mean, std)
    detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler = Sampler(args.rpn_samples, 0.5), sampler
    return detector.requires_grad_(True).train()


# what each loss is a mean over: anchors drawn, regions drawn, positive regions
UNITS = {"loss_objectness": 0, "loss_rpn_box_reg": 0, "loss_classifier": 1, "loss_box_reg": 1, "loss_mask": 2}


def global_means(losses: dict[str, Tensor], detector: FasterRCNN, accelerator: Accelerator) -> dict[str, Tensor]:
    """Losses whose average over the processes is the mean over the global batch, D2."""
    anchors, regions = (part.fg_bg_sampler.positive for part in (detector.rpn, detector.roi_heads))
    counts = torch.stack([torch.ones_like(anchors).sum(), torch.ones_like(regions).sum(), regions.sum()])
    total = accelerator.reduce(counts, "sum") if accelerator.num_processes > 1 else counts
    weights = counts * (accelerator.num_processes / total.clamp(min=1).to(torch.get_default_dtype()))
    return {name: loss * weights[UNITS[name]] for name, loss in losses.items()}


@torch.no_grad()
def detect(
    detector: FasterRCNN, annotated: common.Annotated, accelerator: Accelerator, num_workers: int
) -> list[dict]:
    """COCO's result objects for every image, on every process; each image alone, so that nothing depends on the others."""
    from pycocotools import mask

    detector.eval()
    rank, world, found = accelerator.process_index, accelerator.num_processes, []
    keys = [(0, i) for i in range(rank, len(annotated), world)]
    for scene, bad in common.read_batches(Scenes(annotated), keys, num_workers, single=True):
        annotated.source.bad.update(bad)
        common.check_bad(annotated.source.name, annotated.source.bad, len(annotated))
        image = scene["image"].to(accelerator.device, torch.get_default_dtype()).div_(255)
        with accelerator.autocast():
            (out,) = detector([image]) if not bad else ({"boxes": image.new_empty(0, 4)},)
        for i, box in enumerate(box_convert(out["boxes"], "xyxy", "xywh").tolist()):
            thing = {
                "image_id": scene["index"],
                "category_id": out["labels"][i].item(),
                "score": out["scores"][i].item(),
            }
            if "masks" in out:
                bits = (out["masks"][i, 0] > 0.5).byte().cpu().numpy()
                thing["segmentation"] = mask.encode(np.asfortranarray(bits))
            found.append({**thing, "bbox": box})
    everyones = gather_object(found) if world > 1 else found
    return sorted(everyones, key=lambda thing: thing["image_id"])


def check_flags(args: Args) -> None:
    if not importlib.util.find_spec("pycocotools"):
        raise SystemExit("eval_detection.py needs pycocotools: pip install -e .[detection]")
    if args.checkpoint is None:
        raise SystemExit(f"--checkpoint is missing: {hub.HOW_TO_GET_A_TEACHER}".replace("--teacher", "--checkpoint"))
    if args.epochs and args.total_steps:
        raise SystemExit(f"--epochs {args.epochs}: --total-steps {args.total_steps} wins; set it to 0")
    common.check_positive(args, "rpn_samples", "roi_samples")
    common.check_positive(args, "warmup_steps", "pictures", least=0)
    common.check_positive(args, "test_size", "max_size", least=32)
    common.check_above_zero(args, "anchor_scale")
    for flag, least in (("min_sizes", 32), ("pre_nms", 1), ("post_nms", 1)):
        if min(getattr(args, flag), default=0) < least:
            numbers = " ".join(map(str, getattr(args, flag)))
            raise SystemExit(f"--{flag.replace('_', '-')} {numbers}: must be numbers of at least {least}")


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    check_flags(args)
    columns = {"image_column": args.image_column, "objects_column": args.objects_column, "box_format": args.box_format}
    columns |= {"config": args.data_config, "max_pixels": common.max_pixels(args)}
    train = common.open_objects(args.data, "train", split=args.split, **columns)
    test = common.open_objects(args.data, "eval", split=args.query_split, classes=train.classes, **columns)
    if test is None:
        raise SystemExit(f"--data {args.data}: no split to evaluate on; name one with --query-split")
    unused = sum(len(things) - len(common.usable_objects(things)) for things in train.objects)
    train = train.take([i for i, things in enumerate(train.objects) if common.usable_objects(things)])
    for each in (train, test):
        if args.masks and any("segmentation" not in t for things in each.objects for t in things):
            raise SystemExit(f"--masks: objects of {args.data} have boxes but no segmentation; leave it out")
    args = common.fit_to_data(args, train.source, run, test.source)
    data = SceneBatches(train, args, device=device, num_workers=args.num_workers, rank=rank, world=world)

    network = hub.load_teacher(args.checkpoint, flag="--checkpoint")
    detector = create_detector(network.backbone, len(train.classes), args)
    detector = common.set_batch_norm_groups(detector, 0, args.batch_size)
    facts = ", ".join(f"{key} {value}" for key, value in network.facts.items())
    run.say(f"checkpoint: {facts}; {args.detector} with {len(train.classes)} classes")

    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
    scales = [p for m in detector.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)]
    others = [p for p in detector.parameters() if all(p is not scale for scale in scales)]
    groups = [{"params": others}, {"params": scales, "weight_decay": 0.0}]
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer("sgd", groups, args.base_lr, **hyper)
    detector, optimizer = accelerator.prepare(common.to_device(detector, device), optimizer)
    plain = accelerator.unwrap_model(detector)

    backbone = None  # what is trained is no checkpoint to release
    state = {"detector": detector, "optimizer": optimizer}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---
    run.say(f"{len(train)} images to train on, {epochs:.1f} passes, {len(test)} to evaluate on")
    if unused:
        run.say(f"{unused} objects are crowds or have no area: not trained on")

    for step in run.start(first_step, total_steps, data, state, backbone):
        images, targets, seeds = data.scenes(step)
        plain.rpn.fg_bg_sampler.seeds, plain.roi_heads.fg_bg_sampler.seeds = seeds.T.tolist()

        lr = common.step_schedule(step, args.base_lr, args.milestones, args.lr_decay)
        if step < args.warmup_steps:
            lr *= 0.001 + 0.999 * step / args.warmup_steps
        common.set_lr(optimizer, lr)

        losses = global_means(detector(images, targets), plain, accelerator)
        loss = sum(losses.values())

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.watch(step, loss)

        if run.log_due(step):
            run.log(step, loss=loss, **losses, lr=lr)

        # --- shared block: checkpoint ---
        stopping = run.stop_requested()
        if (step + 1) % args.save_every == 0 or step + 1 == total_steps or stopping:
            run.save(step + 1, state, backbone)
        if stopping:
            run.stop(step + 1)
        # --- end shared block ---

    found = detect(plain, test, accelerator, args.num_workers)
    figures = {}
    for kind, name in (("bbox", "box"), ("segm", "mask"))[: 1 + args.masks]:
        precision = run.same_everywhere(
            common.average_precision(test, found, kind) if accelerator.is_main_process else {}
        )
        figures |= {f"{name}_{key}": value for key, value in precision.items()}
        run.say(f"{name}  " + "  ".join(f"{key} {value:.2f}" for key, value in precision.items()))
    if accelerator.is_main_process and args.pictures:
        run.attempt("--pictures", common.draw_objects, test, found, args.pictures, run.dir / "pictures")
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    counts = {"train_images": len(train), "query_images": len(test)}
    results = {"checkpoint": args.checkpoint, **network.facts, "data": args.data, **counts, **figures, "flags": flags}
    train.source.bad = dict(enumerate([*train.source.bad.values(), *test.source.bad.values()]))
    run.finish(train, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
