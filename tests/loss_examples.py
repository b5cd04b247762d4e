"""Options with which the conformance tests build a loss that cannot be tried with its defaults on one pair of layers called `a`."""

ONE, TWO = {"student": "a", "teacher": "a"}, {"student": "b", "teacher": "b"}
OPTIONS = {
    "afd": {"layers": [ONE, TWO]},
    "crd": {"layers": [ONE], "negatives": 8, "size": 4},
    "ctkd": {"reversal": 1.0},
    "frskd": {"layers": [ONE, TWO]},
    "fsp": {"layers": [ONE, TWO]},
    "irg": {"layers": [ONE, TWO]},
    "kdsvd": {"layers": [ONE, TWO]},
    "review": {"layers": [ONE, TWO], "width": 4},
    "semckd": {"layers": [ONE, TWO]},
    "vitkd": {"layers": [ONE, TWO]},
}
