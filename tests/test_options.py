import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

import kdkit
from kdkit.contracts.options import Text, at_epoch

SHAPES = ["linear", "cosine", "sigmoid", "exponential"]


class Softness(kdkit.Options):
    temperature: kdkit.Rampable = Field(default=4.0, gt=0, description="T.")
    beta: kdkit.Rampable = Field(default=1.0, ge=0, le=2, description="Factor.")
    hard: bool = Field(default=False, description="Off.")


def ramp(**keys):
    return kdkit.Ramp.model_validate(keys)


class TestRamp:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_ramp_begins_at_from_and_ends_at_to(self, shape):
        r = ramp(**{"from": 1, "to": 9, "epochs": 4, "start": 2, "shape": shape})
        first = 1 + 8 * math.exp(-5) if shape == "sigmoid" else 1  # as its papers have it: not 0 at the first step
        assert [r.at(epoch) for epoch in (0, 1.99, 2)] == [1, 1, first]
        assert [r.at(epoch) for epoch in (6, 100)] == pytest.approx([9, 9])

    @pytest.mark.parametrize(
        ("shape", "middle"),
        [("linear", 5), ("cosine", 5), ("sigmoid", 1 + 8 * math.exp(-1.25)), ("exponential", 3)],
    )
    def test_ramp_midway(self, shape, middle):
        assert ramp(**{"from": 1, "to": 9, "epochs": 4, "shape": shape}).at(2) == pytest.approx(middle)

    def test_ramp_at_a_quarter_of_a_cosine(self):
        assert ramp(**{"from": 0, "to": 1, "epochs": 4, "shape": "cosine"}).at(1) == pytest.approx((1 - math.sqrt(0.5)) / 2)

    @given(
        st.sampled_from(SHAPES),
        st.floats(0.1, 100),
        st.floats(0.1, 100),
        st.floats(0.1, 50),
        st.lists(st.floats(0, 100), min_size=2, max_size=8),
    )
    def test_ramp_moves_one_way_and_stays_between_its_ends(self, shape, start, end, epochs, moments):
        r = ramp(**{"from": start, "to": end, "epochs": epochs, "shape": shape})
        values = [r.at(moment) for moment in sorted(moments)]
        assert values == sorted(values, reverse=end < start) or max(values) - min(values) < 1e-9 * max(values)
        assert all(min(start, end) - 1e-9 <= value <= max(start, end) * (1 + 1e-9) for value in values)

    @pytest.mark.parametrize(
        "keys",
        [
            {"from": 0, "to": 1, "epochs": 0},
            {"from": 0, "to": 1},
            {"from": 0, "to": 1, "epochs": 2, "start": -1},
            {"from": 0, "to": 1, "epochs": 2, "shape": "step"},
            {"from": 0, "to": 1, "epochs": 2, "shape": "exponential"},
            {"from": 1, "to": -1, "epochs": 2, "shape": "exponential"},
            {"from": 0, "to": 1, "epochs": 2, "form": "linear"},
        ],
    )
    def test_refuses(self, keys):
        with pytest.raises(ValidationError):
            ramp(**keys)

    def test_ramp_is_shown_by_its_ends(self):
        assert str(ramp(**{"from": 0.5, "to": 20, "epochs": 3})) == "0.5->20"


class TestRampable:
    def test_rampable_takes_a_number(self):
        assert Softness(temperature=3).temperature == 3.0
        assert isinstance(Softness(temperature=3).temperature, float)

    def test_rampable_takes_a_ramp_written_as_a_mapping_or_made_by_hand(self):
        written = Softness.model_validate({"temperature": {"from": 4, "to": 1, "epochs": 10}})
        assert written.temperature == ramp(**{"from": 4, "to": 1, "epochs": 10})
        assert Softness(temperature=written.temperature) == written

    @pytest.mark.parametrize("value", [0, -1, "warm", None, [1, 2]])
    def test_bounds_of_a_rampable_hold_for_a_number(self, value):
        with pytest.raises(ValidationError):
            Softness(temperature=value)

    @pytest.mark.parametrize(("key", "ends"), [("from", (0, 1)), ("to", (1, 0)), ("to", (1, -3))])
    def test_bounds_of_a_rampable_hold_at_both_ends(self, key, ends):
        with pytest.raises(ValidationError, match=f"{key}: input should be greater than 0"):
            Softness.model_validate({"temperature": {"from": ends[0], "to": ends[1], "epochs": 2}})

    def test_a_ramp_is_written_back_as_it_was_read(self):
        keys = {"from": 4.0, "to": 1.0, "epochs": 10.0, "start": 0.0, "shape": "linear"}
        assert Softness.model_validate({"temperature": keys}).model_dump(by_alias=True)["temperature"] == keys

    def test_the_schema_allows_a_number_or_a_ramp(self):
        text = str(Softness.model_json_schema()["properties"]["temperature"])
        assert "Ramp" in text and "number" in text


class TestAtEpoch:
    def test_only_ramps_change(self):
        options = Softness.model_validate({"temperature": {"from": 4, "to": 2, "epochs": 2}, "hard": True})
        assert at_epoch(options, 1) == Softness(temperature=3, hard=True)
        assert at_epoch(options, 7) == Softness(temperature=2, hard=True)

    def test_without_a_ramp_the_options_are_the_same(self):
        options = Softness()
        assert at_epoch(options, 3) is options


class TestRecipePath:
    path = TypeAdapter(kdkit.RecipePath)

    def test_path_is_beside_the_file_it_was_written_in(self, tmp_path):
        assert self.path.validate_python(Text.of("weights/teacher.safetensors", tmp_path)) == tmp_path / "weights" / "teacher.safetensors"
        assert self.path.validate_python(Text.of("../teacher.yaml", tmp_path / "recipes")) == tmp_path / "teacher.yaml"

    def test_path_may_be_absolute(self, tmp_path):
        assert self.path.validate_python(Text.of(str(tmp_path / "a"), Path("/elsewhere"))) == tmp_path / "a"

    def test_path_may_begin_at_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert self.path.validate_python(Text.of("~/a", Path("/elsewhere"))) == tmp_path / "a"

    def test_path_is_relative_to_the_current_folder_elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert self.path.validate_python("a") == tmp_path / "a"


class TestOptions:
    def test_an_unknown_option_is_an_error(self):
        with pytest.raises(ValidationError, match="temprature"):
            Softness(temprature=3)

    def test_options_do_not_change(self):
        with pytest.raises(ValidationError, match="frozen"):
            Softness().hard = True
