"""Images of the dataset itself, drawn at random: what every distilled set is compared with."""

import kdkit

from ._random import chosen


class Random(kdkit.DataDistiller):
    """Images of each class that are drawn at random, with their labels."""

    name = "random"

    class Options(kdkit.DataDistillerOptions):
        """How many."""

    options: Options

    def distill(self, material: kdkit.Material) -> kdkit.DistilledData:
        return chosen(material, self.options.images_per_class)


@kdkit.hookimpl
def kdkit_distillers() -> list[type[kdkit.DataDistiller]]:
    return [Random]
