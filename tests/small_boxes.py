"""Small images with boxes for tests of detection's datasets, and what a dataset gives of them."""

from PIL import Image

from kdkit.recipe import registry

SIZE = (40, 30)  # width and height


def picture(path, size=SIZE, mode="RGB", exif=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **({"exif": exif} if exif else {}))


def turned():
    """The EXIF data of a photograph that is to be turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def source(name, **options):
    found = registry.load().datasets[name]
    return found(found.Options(**options))


def items(dataset, part="train"):
    """The boxes, labels and `ignored` of each image, as lists."""
    split = dataset.split(part)
    targets = [split[place][1] for place in range(len(split))]
    return [tuple(target[key].tolist() for key in ("boxes", "labels", "ignored")) for target in targets]
