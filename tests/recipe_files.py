"""The recipes in a folder of their own, beside stand-ins for the files that some of them need: of weights a plan reads the shapes."""

import json
import shutil
from pathlib import Path

import timm
import torch
from kdkit_plugins.models._cifar import registration  # noqa: F401 -- timm knows the CIFAR networks then
from PIL import Image
from safetensors.torch import save_file

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PHOTOGRAPHS = {"train": 244, "val": 153}  # of ants and bees


def lay_out(home):
    """Copy `recipes/` into the folder and put weights, photographs and ImageNet's tree where the recipes look for them."""
    shutil.copytree(RECIPES, home / "recipes")
    photographs(home, PHOTOGRAPHS)
    pets(home)
    blood_cells(home / "data" / "bccd", {"trainval": 8, "test": 1})
    coco(home / "data" / "coco")
    # at their own size, COCO's images take more memory than small machines have
    base = home / "recipes" / "coco" / "base.yaml"
    base.write_text(base.read_text().replace("image_size: [800, 1344]", "image_size: [200, 336]"))
    street_scenes(home / "data" / "camvid", (240, 180), 8)
    street_scenes(home / "data" / "camvid_full", (480, 360), 16)
    for name in ("resnet18", "resnet50"):
        hollow(backbone_file(home, name), name, num_classes=100)
    for run, classes in (("cifar100-labels-small", 100), ("cifar100_without_labels/embedding-seed0", 0)):
        place = home / "runs" / run / "student.safetensors"
        place.parent.mkdir(parents=True)
        hollow(place, "cifar_resnet20", num_classes=classes)
    weights = home / "data" / "weights" / "cifar10_resnet"
    weights.mkdir(parents=True)
    for name, file in (("resnet56", "resnet56-4bfd9763.th"), ("resnet20", "resnet20-12fca82f.th")):
        torch.save(shapes(f"cifar_{name}", num_classes=10, shortcut="pad"), weights / file)
    things(home / "data" / "cifar10_folders", {"train": 4000, "val": 10})
    (home / "data" / "cifar-10-batches-py").mkdir()
    torch.save(shapes("cifar_resnet56", num_classes=100), home / "data" / "cifar100_resnet56-f2eff4c8.pt")
    for part, count in (("train", 13), ("val", 1)):  # ImageNet's classes with a hundredth of its files
        for label in range(1000):
            place = home / "data" / "imagenet" / part / f"n{label:08d}"
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.JPEG").touch()
    return home / "recipes"


def photographs(home, counts):
    for part, count in counts.items():
        for i in range(count):
            place = home / "data" / "hymenoptera_data" / part / ("ants", "bees")[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            value = 40 + 120 * (i % 2) + i
            Image.new("RGB", (40, 36), (value % 256, 90, 255 - value % 256)).save(place / f"{i}.jpg")


def things(folder, counts):
    """CIFAR-10's images in folders of classes, all the same black one."""
    folder.mkdir()
    one = folder / "one.png"
    Image.new("RGB", (32, 32)).save(one)
    for part, count in counts.items():
        for i in range(count):
            place = folder / part / f"class {i % 10}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").hardlink_to(one)


def pets(home):
    """Pictures of heads and their table, for as many steps an epoch as a batch of 32 allows."""
    place = home / "data" / "pets"
    (place / "heads").mkdir(parents=True)
    rows = ["path,x0,y0,x1,y1,split"]
    for i in range(40):
        Image.new("RGB", (64, 64), (6 * i, 90, 255 - 6 * i)).save(place / "heads" / f"{i}.png")
        rows.append(f"heads/{i}.png,0.1,0.{i:02},0.5,0.9,{'test' if i < 8 else 'train'}")
    (place / "heads.csv").write_text("\n".join(rows) + "\n")
    boxes = [f"heads/{i}.png,6,{i},32,58,{('cat', 'dog')[i % 2]},{'test' if i < 4 else 'train'}" for i in range(20)]
    (place / "boxes.csv").write_text("\n".join(["path,x0,y0,x1,y1,class,split", *boxes]) + "\n")


def coco(folder):
    """COCO's files, for a batch of training images and one for the test: black, five boxes each, of 80 classes."""
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    boxes = [{"category_id": i, "bbox": [7 * i, 10, 60, 90], "area": 5400, "iscrowd": 0} for i in range(1, 81)]
    for part, count in (("train2017", 16), ("val2017", 1)):
        (folder / part).mkdir()
        images = [{"id": i, "file_name": f"{i:012}.jpg", "height": 480, "width": 640} for i in range(count)]
        for image in images:
            Image.new("RGB", (640, 480)).save(folder / part / image["file_name"])
        marks = [{**boxes[(5 * i + j) % 80], "id": 80 * i + j, "image_id": i} for i in range(count) for j in range(5)]
        about = {"images": images, "annotations": marks, "categories": categories}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(about))


def blood_cells(folder, counts):
    """Pictures in BCCD's layout, black, with a box of every class."""
    for place in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    cells = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin><ymin>40</ymin><xmax>{x + 90}</xmax><ymax>140</ymax></bndbox></object>"
        for name, x in (("Platelets", 10), ("RBC", 200), ("WBC", 400))
    )
    size = "<size><width>640</width><height>480</height><depth>3</depth></size>"
    for part, count in counts.items():
        names = [f"{part}{i}" for i in range(count)]
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            Image.new("RGB", (640, 480)).save(folder / "JPEGImages" / f"{name}.jpg")
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{cells}</annotation>")


def street_scenes(folder, size, count):
    """Frames of CamVid's layout, black, and masks of every class."""
    bands = Image.new("L", size)
    bands.putdata([x * 12 // size[0] for _ in range(size[1]) for x in range(size[0])])
    for part in ("train", "val", "test"):
        for place in (folder / part, folder / f"{part}annot"):
            place.mkdir(parents=True)
        for i in range(count if part == "train" else 1):
            Image.new("RGB", size).save(folder / part / f"{i}.jpg")
            bands.save(folder / f"{part}annot" / f"{i}.png")


def backbone(home, name, weights):
    """A backbone of ants and bees, where its run would leave it."""
    save_file(weights, backbone_file(home, name))


def backbone_file(home, name):
    place = home / "runs" / f"hymenoptera_backbone_{name}" / "student.safetensors"
    place.parent.mkdir(parents=True)
    return place


def shapes(model, **arguments):
    """A network's weights without numbers."""
    with torch.device("meta"):
        return timm.create_model(model, **arguments).state_dict()


def hollow(path, model, **arguments):
    """A safetensors file of a network's names and shapes, whose numbers take no room on the disk."""
    header, end = {}, 0
    for name, value in shapes(model, **arguments).items():
        dtype, begin = {torch.float32: "F32", torch.int64: "I64"}[value.dtype], end
        end += value.nbytes
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
