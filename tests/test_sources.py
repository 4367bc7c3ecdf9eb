"""SEED's TSV files, subsets by name and by share, beside what the training and evaluation tests read."""

import base64
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import metrics, photographs, tiny_run
from test_bad_input import write_parquet
from tools import stop_message

import common
from trainers.shared import sources


def jpeg(i: int, side: int = 32) -> bytes:
    pixels = np.random.RandomState(i).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    box = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(box, "JPEG", quality=90)
    return box.getvalue()


def write_tsv(file: Path, count: int = 24, index: bool = True, extra: str = "", label=lambda i: str(i % 3)) -> Path:
    """SEED's format, tools/tsv_io.py there: key, label, perhaps more, base64 JPEG; the lines' offsets beside it."""
    rows = [f"{i:04d}\t{label(i)}\t{extra}{base64.b64encode(jpeg(i)).decode()}\n" for i in range(count)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(rows))
    if index:
        offsets = np.cumsum([0, *map(len, rows)][:-1])
        file.with_suffix(".lineidx").write_text("".join(f"{n}\n" for n in offsets))
    return file


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("extra", ["", "a caption\t"])
def test_a_tsv_file_gives_the_images_and_labels_that_were_written(tmp_path, index, extra):
    file = write_tsv(tmp_path / "train.tsv", index=index, extra=extra)
    source = common.open_source(str(file), resident=False)
    assert len(source) == 24 and source.labels.tolist() == [i % 3 for i in range(24)]
    assert all(source.read(i) == jpeg(i) for i in range(24)), "the bytes of the file, not others"
    assert torch.equal(source.decode(5), common.decode_rgb(jpeg(5)))
    assert common.open_source(str(file), "eval") is None
    resident = common.open_source(str(file))
    assert resident.pixels.shape == (24, 3, 32, 32) and torch.equal(resident.pixels[7], source.decode(7))


def test_a_folder_of_tsv_files_has_their_names_as_splits(tmp_path):
    write_tsv(tmp_path / "train.tsv", 24)
    write_tsv(tmp_path / "test.tsv", 8, label=lambda i: "dog" if i % 2 else "cat")
    assert len(common.open_source(str(tmp_path))) == 24
    queries = common.open_source(str(tmp_path), "eval")
    assert len(queries) == 8 and list(queries.classes) == ["cat", "dog"] and queries.labels.tolist() == [0, 1] * 4
    assert "train" in stop_message(common.open_source, str(tmp_path), split="val")


def test_a_trainer_learns_from_a_tsv_file(tmp_path, tiny_teacher):
    write_tsv(tmp_path / "data" / "train.tsv", 64)
    tiny_run("seed", tmp_path / "run", tiny_teacher, data=str(tmp_path / "data"), total_steps=2, log_every=1)
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1] and all(np.isfinite(line["loss"]) for line in lines)


def test_a_stale_index_or_another_format_is_told(tmp_path):
    file = write_tsv(tmp_path / "train.tsv")
    file.write_text(file.read_text().replace("0000\t", "first\t", 1))
    assert "delete train.lineidx" in stop_message(common.open_source, str(file))
    (tmp_path / "words.tsv").write_text("no tabs in here\nnone here\n")
    message = stop_message(common.open_source, str(tmp_path / "words.tsv"))
    assert "words.tsv" in message and "name, label, image" in message
    (tmp_path / "empty.tsv").write_text("")
    assert "no lines" in stop_message(common.open_source, str(tmp_path / "empty.tsv"))
    (tmp_path / "nothing.tsv").write_text("".join(f"{i}\t0\tnot base64!\n" for i in range(9)))
    assert "cannot be read" in stop_message(common.open_source, str(tmp_path / "nothing.tsv"))


def test_a_damaged_line_is_a_bad_image_not_a_lost_run(tmp_path):
    file = write_tsv(tmp_path / "train.tsv", 150, index=False)
    lines = file.read_text().splitlines()
    lines[9] = lines[9][:-40]
    file.write_text("\n".join(lines) + "\n")
    source = common.open_source(str(file))
    assert len(source) == 149 and list(source.bad) == [9] and "row 9" in source.bad[9]


# ---------------------------------------------------------------------------------------------------------------------
# --subset FILE
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["folder", "tsv", "parquet"])
def named(request, tmp_path_factory) -> tuple[str, list[str]]:
    """A data set of each kind that knows its images' names, and four of these."""
    folder = tmp_path_factory.mktemp("named")
    if request.param == "folder":
        return str(photographs(folder, 24)), ["001.jpg", "018.jpg", "009.jpg", "022.jpg"]
    if request.param == "tsv":
        return str(write_tsv(folder / "train.tsv")), ["0003", "0001", "0020", "0010"]
    return str(write_parquet(folder)), ["0003.png", "0001.JPEG", "0020.png", "0010.png"]


def test_a_list_of_names_chooses_these_images(named, tmp_path):
    data, names = named
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    whole = common.open_source(data, resident=False)
    part = common.open_source(data, subset=str(tmp_path / "names.txt"), resident=False)
    stems = [Path(name).stem for name in whole.file_names()]
    at = sorted(stems.index(Path(name).stem) for name in names)
    assert len(part) == 4 and [part.read(i) for i in range(4)] == [whole.read(i) for i in at]
    assert part.labels.tolist() == whole.labels[at].tolist()
    assert part.where(0) == whole.where(at[0])


def test_a_name_that_is_not_there_is_told_with_one_that_is(named, tmp_path):
    data, names = named
    (tmp_path / "names.txt").write_text("\n".join([*names, "n01440764_10026.JPEG"]))
    message = stop_message(common.open_source, data, subset=str(tmp_path / "names.txt"))
    assert "1 of its 5 names" in message and "n01440764_10026" in message and "one there is" in message


def test_lists_that_can_not_be_followed_are_one_line(tmp_path):
    (tmp_path / "names.txt").write_text("1.jpg\n")
    assert "digits have no names" in stop_message(common.open_source, "digits", subset=str(tmp_path / "names.txt"))
    (tmp_path / "none.txt").write_text("\n")
    photos = photographs(tmp_path / "photos", 8)
    assert "0 of its 0 names" in stop_message(common.open_source, str(photos), subset=str(tmp_path / "none.txt"))
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    assert "not a text file" in stop_message(common.open_source, str(photos), subset=str(tmp_path / "binary.txt"))
    (photos / "train" / "class2" / "001.jpg").write_bytes((photos / "train" / "class1" / "001.jpg").read_bytes())
    (tmp_path / "one.txt").write_text("001.jpg")
    assert "several images" in stop_message(common.open_source, str(photos), subset=str(tmp_path / "one.txt"))


# ---------------------------------------------------------------------------------------------------------------------
# --subset SHARE
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50] * 10, [130] * 9 + [73], [3, 3, 3, 51]], ids=str)
@pytest.mark.parametrize("share", ["1%", "10%", "33.3%", "100%"])
def test_a_share_is_drawn_from_every_class_alike(sizes, share):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]
    source = common.Source("x", len(labels), labels=labels)
    drawn = [sources._drawn(source, share, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0])) and (drawn[0] != drawn[2] or share == "100%")
    part = float(share[:-1]) / 100
    for rows in drawn:
        assert len(rows) == round(part * len(labels))
        for found, size in zip(labels[rows].bincount(minlength=len(sizes)).tolist(), sizes, strict=True):
            assert abs(found - part * size) <= 1
    whole = dataclasses.replace(source, labels=None)
    assert len(sources._drawn(whole, share, 0)) == len(drawn[0])


def test_a_count_is_drawn_whatever_the_labels():
    """Recorded runs name counts: their images stay the same."""
    source = common.open_source("digits")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(5))
    assert sources._drawn(source, "500", 5) == sorted(order[:500].tolist())
    assert sources._drawn(dataclasses.replace(source, labels=None), "500", 5) == sources._drawn(source, "500", 5)
