"""A choice of images: what every distiller is compared with, and where most of them begin."""

import kdkit


def chosen(material: kdkit.Material, images_per_class: int) -> kdkit.DistilledData:
    """Return images of each class that are drawn at random, with their labels."""
    places = material.drawn(images_per_class)
    return kdkit.DistilledData(material.images[places], material.labels[places])
