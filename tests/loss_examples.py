"""Options with which the conformance tests build a loss that cannot be tried with its defaults on one pair of layers called `a`."""

ONE, TWO = {"student": "a", "teacher": "a"}, {"student": "b", "teacher": "b"}
OPTIONS = {
    "afd": {"layers": [ONE, TWO]},
    "box_regression": {"overlap": 0.05},  # random boxes hardly overlap
    "cirkd_memory": {"pixels_per_image": 2, "pixel_rows": 16, "region_rows": 8, "pixel_contrast": 80, "region_contrast": 40},
    "crd": {"layers": [ONE], "negatives": 8, "size": 4},
    "crld": {"threshold": 0.3},  # the teachers of the examples are not sure
    "ctkd": {"reversal": 1.0},
    "fcfd": {"layers": [ONE, TWO]},
    "fgd": {"relation": 0.01},  # its usual weight is too small for three steps to show that parts learn
    "frskd": {"layers": [ONE, TWO]},
    "fsp": {"layers": [ONE, TWO]},
    "irg": {"layers": [ONE, TWO]},
    "kdsvd": {"layers": [ONE, TWO]},
    "luminet": {},
    "minilm_relations": {"heads": 2},
    "norm": {"layers": [ONE], "soft": 1.0},
    "proteus": {"layers": [ONE, TWO], "masked": 1.0},  # an image without hidden patches teaches the second layer nothing
    "queue_kl": {"layers": [ONE], "queue": 16},
    "review": {"layers": [ONE, TWO], "width": 4},
    "rrd": {"layers": [ONE], "queue": 16},
    "scalekd": {"layers": [ONE, TWO], "heads": 2},
    "sdd": {"layers": [ONE], "inner": "dkd"},
    "seed": {"layers": [ONE], "queue": 16},
    "semckd": {"layers": [ONE, TWO]},
    "skd": {},
    "tinybert": {"layers": [ONE, TWO, {"student": "c", "teacher": "c"}], "attention": 1, "heads": 2},
    "vitkd": {"layers": [ONE, TWO]},
}
# Losses that need real detectors, or answers whose rows belong to maps; tests/test_detection_losses.py checks what they promise.
ON_DETECTORS = ("crosskd", "detector", "ld", "pseudo_labels", "score_weighted")
