"""A network as one file that runs without this repository: ONNX, TorchScript or torch.export's. A chapter of hub.py.

The file takes (B, 3, S, S) float32 for any B and one side S and gives (B, D) float32. It is written beside its place,
opened by its own runtime, compared with the network that it stands for and only then renamed. Its metadata say what it
is (`facts`), and it holds no path of this machine: the exporters write a stack trace to every operation.
"""

import importlib.util
import io
import json
import logging
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from trainers.shared.files import one_line
from trainers.shared.folders import first_line
from trainers.shared.views import LEAST_PX

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts", "pt2": ".pt2"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
OPSET = 20  # ONNX 1.15 and later
MOST_PX = 4096  # a side; every library's memory ends not far above
TOLERANCE = 1e-4  # of the largest feature


class Deployed(nn.Module):
    """What a file computes: features, or what `head` makes of them, of images normalised before or, if asked, inside."""

    def __init__(self, network: nn.Module, head: bool, normalise: bool):
        super().__init__()
        self.backbone, self.head, self.normalise = network.backbone, network.head if head else None, normalise
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(network.backbone, f"input_{name}"), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if self.normalise:
            image = (image - self.mean) / self.std
        features = self.backbone.forward(image)  # not through __call__: our backbones normalise in a hook
        return features if self.head is None else self.head(features)


def export(
    network: nn.Module,
    target: Path,
    format: str = "onnx",
    *,
    side: int,
    head: bool = False,
    normalise: bool = False,
    int8_knn: Callable[[], Callable] | None = None,
    max_loss: float = 1.0,
) -> dict[str, float]:
    """Write a teacher of `hub.load_teacher`, on the CPU, to `target`; prints and returns what was measured.

    `head` adds its projection head. The file's input is normalised with the backbone's mean and standard deviation, or
    in [0, 1] with `normalise`. With `int8_knn` an ONNX file's weights are 8-bit and its activations quantised as they
    come, if kNN loses at most `max_loss` points: it opens data and gives what measures a function of images, in percent. Raises SystemExit
    with one line and leaves no file: a missing package, a network that the format cannot hold, features off by more
    than TOLERANCE, accuracy lost, a full disk.
    """
    if missing := [name for name in NEEDS.get(format, ()) if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"--format {format}: needs {', '.join(missing)}; pip install -e .[export]")
    if int8_knn and format != "onnx":
        raise SystemExit(f"--int8: quantises ONNX files, not --format {format}; leave one of the two out")
    if target.is_dir():
        raise SystemExit(f"--to {target}: is a folder; name a file in it")
    top1 = int8_knn() if int8_knn else None
    if not isinstance(side, int) or not LEAST_PX <= side <= MOST_PX:
        raise SystemExit(f"--image-size {one_line(side)}: must be between {LEAST_PX} and {MOST_PX} pixels")
    own = network.backbone.input_side or side
    if side != own:
        raise SystemExit(
            f"--image-size {side}: {network.facts['architecture']} takes images of {own} px; leave it out"
        )
    deployed = Deployed(network, head, normalise).eval().requires_grad_(False)
    pixels = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(0))  # in [0, 1]
    inputs = pixels if normalise else (pixels - deployed.mean) / deployed.std
    with torch.no_grad():
        expected = network(pixels)  # as everyone else uses it, through the hook
        expected = network.head(expected) if head else expected
    facts = {key: str(network.facts.get(key, "unknown")) for key in ("source", "architecture", "licence")} | {
        "input": f"(B, 3, {side}, {side}) " + ("in [0, 1]" if normalise else "in [0, 1], less mean, divided by std"),
        "output": f"(B, {expected.shape[1]})",
        "mean": str([round(v, 6) for v in deployed.mean.flatten().tolist()]),
        "std": str([round(v, 6) for v in deployed.std.flatten().tolist()]),
    }

    beside = target.with_name(f".{target.name}")  # keeps the suffix, which torch.export asks for
    whole = target.with_name(f".whole_{target.name}")
    try:
        with _quietly():
            save = _program(deployed, format, inputs[:2], facts)
            _written(target, save, beside)
            run = open_exported(beside, format)
            found = torch.cat([run(inputs[:1]), run(inputs[:5])])  # neither is the two images of the example
            difference = (found - torch.cat([expected[:1], expected])).abs().max().item()
            largest = max(expected.abs().max().item(), 1e-30)
            figures = {"difference": difference, "relative": difference / largest, "MB": beside.stat().st_size / 1e6}
            if not figures["relative"] <= TOLERANCE:
                raise SystemExit(
                    f"{target}: not written: features differ by {difference:.2g} where the largest is {largest:.2g} "
                    f"(at most {TOLERANCE:g} of it); try another --format"
                )
            figures |= {"ms torch": _latency(deployed, inputs), f"ms {format}": _latency(run, inputs)}
            if top1:
                os.replace(beside, whole)
                _written(target, partial(_quantise, whole), beside)
                figures |= _cost_of_int8(deployed, run, beside, top1, inputs)
                lost = figures["knn"] - figures["knn int8"]
                if not lost <= max_loss:
                    raise SystemExit(
                        f"{target}: not written: int8 loses {lost:.2f} points of kNN ({figures['knn']:.2f} -> "
                        f"{figures['knn int8']:.2f} %), more than --max-loss {max_loss:g}; export without --int8"
                    )
        _written(target, partial(os.replace, dst=target), beside)
    finally:
        for file in (beside, whole):
            with suppress(OSError):  # not there, or no place to be in
                file.unlink()
    _say(target, format, facts, figures)
    return figures


def _written(target: Path, save: Callable[[Path], None], file: Path) -> None:
    """A whole file or one line: a full disk is an OSError, torch's RuntimeError or protobuf's own."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(file)
    except Exception as error:
        raise SystemExit(
            f"{target}: not written ({first_line(error)}); free space there, or choose another place: --to FILE"
        ) from None


def _program(deployed: Deployed, format: str, example: Tensor, facts: dict[str, str]) -> Callable[[Path], None]:
    """What saves the network in this format. `example` has two images: one would fix the batch size to 1."""
    batch = ({0: torch.export.Dim("batch")},)
    try:
        if format == "onnx":
            onnx = torch.onnx.export(
                deployed, (example,), dynamo=True, opset_version=OPSET, dynamic_shapes=batch,
                input_names=["image"], output_names=["features"], verbose=False,
            )  # fmt: skip
            for part in (*onnx.model.graph.all_nodes(), *onnx.model.functions.values()):
                part.metadata_props.clear()
            onnx.model.metadata_props.update(facts)
            return lambda file: onnx.save(file, external_data=False)
        if format == "torchscript":
            traced = torch.jit.trace(deployed, example, check_trace=False)  # `export` checks, on other images
            return lambda file: file.write_bytes(_torchscript_bytes(traced, facts))
        program = torch.export.export(deployed, (example,), dynamic_shapes=batch)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        content = io.BytesIO()  # torch's own writer ends the process where the disk is full
        torch.export.save(program, content, extra_files={"facts.json": json.dumps(facts)})
        return lambda file: file.write_bytes(content.getvalue())
    except Exception as error:  # each exporter has exceptions of its own
        raise SystemExit(
            f"--format {format}: cannot hold {facts['architecture']} ({first_line(error)}); try another --format"
        ) from None


def _torchscript_bytes(traced: torch.jit.ScriptModule, facts: dict[str, str]) -> bytes:
    """Without the debug records, which name source files by their path."""
    full, lean = io.BytesIO(), io.BytesIO()
    torch.jit.save(traced, full, _extra_files={"facts.json": json.dumps(facts)})
    with zipfile.ZipFile(full) as old, zipfile.ZipFile(lean, "w", zipfile.ZIP_STORED) as new:
        for record in old.infolist():
            if not record.filename.endswith(".debug_pkl"):
                new.writestr(record.filename, old.read(record))
    return lean.getvalue()


def _quantise(whole: Path, file: Path) -> None:
    """8-bit weights, a scale for every output channel where the runtime can; activations are scaled batch by batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # unsigned: the runtime's fast convolutions, and no 16-bit overflow on x86 without VNNI
    quantize_dynamic(whole, file, per_channel=True, weight_type=QuantType.QUInt8)


def open_exported(file: Path, format: str) -> Callable[[Tensor], Tensor]:
    """An exported file as a function of images, (B, 3, S, S) -> (B, D), in as many threads as torch uses now."""
    if format == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    module = torch.jit.load(str(file)) if format == "torchscript" else torch.export.load(file).module()
    return torch.no_grad()(module)


def _cost_of_int8(
    deployed: Deployed,
    run: Callable[[Tensor], Tensor],
    file: Path,
    top1: Callable[[Callable[[Tensor], Tensor]], float],
    inputs: Tensor,
) -> dict[str, float]:
    """kNN top-1 of the whole and of the 8-bit file, the latter's size and latency."""
    quantised = open_exported(file, "onnx")
    figures = {"MB int8": file.stat().st_size / 1e6, "ms int8": _latency(quantised, inputs)}
    for name, function in {"knn": run, "knn int8": quantised}.items():

        def features(x: Tensor, function=function) -> Tensor:
            return function(x if deployed.normalise else (x - deployed.mean) / deployed.std)

        figures[name] = top1(features)
    return figures


@torch.no_grad()
def _latency(function: Callable[[Tensor], Tensor], inputs: Tensor, repeats: int = 20) -> float:
    """Milliseconds for one image, the median of `repeats` after three to warm up."""
    seconds = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        function(inputs[:1])
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds[3:])


def _say(target: Path, format: str, facts: dict[str, str], figures: dict[str, float]) -> None:
    opset = f", opset {OPSET}" if format == "onnx" else ""
    print(f"{target}: {facts['architecture']}, image {facts['input']} -> features {facts['output']}{opset}")
    print(
        f"  largest difference from torch {figures['difference']:.2g}, {figures['relative']:.2g} of the largest feature"
    )
    print(f"  {figures['MB']:.1f} MB; one image on the CPU (threads: {torch.get_num_threads()}): torch {figures['ms torch']:.1f} ms, "
          f"{format} {figures[f'ms {format}']:.1f} ms")  # fmt: skip
    if "knn int8" in figures:
        print(f"  int8: {figures['MB int8']:.1f} MB, {figures['ms int8']:.1f} ms; kNN top-1 {figures['knn']:.2f} % before, "
              f"{figures['knn int8']:.2f} % after")  # fmt: skip


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' notes: each warns that the other is the newer."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
