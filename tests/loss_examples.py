"""Options with which the conformance tests build a loss that cannot be tried with its defaults on one pair of layers called `a`."""

ONE, TWO = {"student": "a", "teacher": "a"}, {"student": "b", "teacher": "b"}
OPTIONS = {
    "afd": {"layers": [ONE, TWO]},
    "cirkd_memory": {"pixels_per_image": 2, "pixel_rows": 16, "region_rows": 8, "pixel_contrast": 80, "region_contrast": 40},
    "crd": {"layers": [ONE], "negatives": 8, "size": 4},
    "ctkd": {"reversal": 1.0},
    "frskd": {"layers": [ONE, TWO]},
    "fsp": {"layers": [ONE, TWO]},
    "irg": {"layers": [ONE, TWO]},
    "kdsvd": {"layers": [ONE, TWO]},
    "review": {"layers": [ONE, TWO], "width": 4},
    "seed": {"layers": [ONE], "queue": 16},
    "semckd": {"layers": [ONE, TWO]},
    "vitkd": {"layers": [ONE, TWO]},
}
