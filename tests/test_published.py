"""The data files of evaluation: ODinW's sets and the figures of papers."""

from importlib.resources import files
from statistics import fmean

import pytest
import yaml

from glipv2.eval.odinw import odinw_mean, odinw_sets
from glipv2.eval.published import published, suites
from glipv2.pipeline.errors import DataError


def figures(suite, **wanted):
    return [p for p in published(suite) if all(getattr(p, k) == v for k, v in wanted.items())]


def test_odinw_has_13_sets_in_35_with_unlike_names():
    small, large = odinw_sets(13), odinw_sets(35)
    assert len(small) == len({own.name for own in small}) == 13
    assert len(large) == len({own.name for own in large}) == 35
    assert set(own.name for own in small) < set(own.name for own in large)
    with pytest.raises(ValueError, match="not of 14"):
        odinw_sets(14)


def test_the_sets_that_are_scored_on_a_small_validation_split_are_those_of_glip():
    tree = yaml.safe_load(files("glipv2.eval").joinpath("odinw.yaml").read_text("utf-8"))
    assert {own["name"] for own in tree["sets"] if own["split"] == "mini_val"} == {
        "DroneControl", "EgoHands_generic", "EgoHands_specific", "OxfordPets_by_breed",
        "OxfordPets_by_species", "PKLot", "UnoCards", "VehiclesOpenImages", "brackishUnderwater",
        "openPoetryVision", "websiteScreenshots",
    }  # fmt: skip
    assert tree["few_shot_seeds"] == [3, 30, 300]


PROMPTS = {
    "Aquarium": {"penguin": ("", "", ", which is black and white"),
                 "puffin": ("", "", "with orange beaks"),
                 "stingray": ("", "", "which is flat and round")},
    "CottontailRabbits": {"Cottontail-Rabbit": ("", "rabbit", "")},
    "EgoHands_generic": {"hand": ("", "", "of a person")},
    "NorthAmericaMushrooms": {"CoW": ("", "flat mushroom", ""),
                              "chanterelle": ("", "yellow mushroom", "")},
    "Packages": {"package": ("there is a", "", "on the porch")},
    "pothole": {"pothole": ("there are some", "holes", "on the road")},
}  # fmt: skip
"""Of facts D.6: what stands before, instead of, and after a category."""


@pytest.mark.parametrize("count", [13, 35])
def test_every_prompt_is_that_of_glip_and_there_is_no_other(count):
    assert {
        own.name: {name: (p.prefix, p.name, p.suffix) for name, p in own.prompts.items()}
        for own in odinw_sets(count)
        if own.prompts
    } == PROMPTS


def test_the_average_is_over_all_sets_and_no_others():
    found = {own.name: place / 10 for place, own in enumerate(odinw_sets(13))}
    found["PascalVOC"] = 9.0
    result = odinw_mean(found, 13)
    values = sorted(found.values())
    assert result.to_dict() == pytest.approx(
        {"ap": sum(values) / 13, "ap_median": values[6], "sets": 13}
    )
    with pytest.raises(DataError, match="missing or unknown: pothole"):
        odinw_mean({name: ap for name, ap in found.items() if name != "pothole"}, 13)
    with pytest.raises(DataError, match="missing or unknown: dice"):
        odinw_mean({**found, "dice": 0.1}, 13)


def test_published_averages_are_those_of_the_published_sets():
    names = {own.name for own in odinw_sets(13)}
    for model, average in [
        (p.model, p.value) for p in figures("odinw13", setting="zero-shot", tag="paper", set="")
    ]:
        single = {p.set: p.value for p in figures("odinw13", model=model) if p.set}
        assert set(single) == names
        assert fmean(single.values()) == pytest.approx(average, abs=0.1)  # A: 28.78, printed 28.7


def test_published_figures_are_what_the_papers_print():
    ((value, tag),) = [
        (p.value, p.tag)
        for p in figures("lvis-minival", model="GLIP-T", metric="ap_rare", source="facts H.1")
    ]
    assert (value, tag) == (20.8, "paper")
    tuned = figures("odinw13", model="GLIP-L", setting="prompt tuning")
    assert {p.metric: p.value for p in tuned} == {
        "ap_1_shot": 59.5, "ap_3_shot": 61.4, "ap_5_shot": 62.4, "ap_10_shot": 64.1, "ap": 67.9
    }  # fmt: skip
    answers = figures("vqav2", setting="fine-tuned test-dev", source="facts H.3")
    assert [p.value for p in answers] == [71.6, 73.1, 74.6]
    assert published("imagenet") == ()


def test_every_figure_is_told_apart_and_in_percent():
    everything = [p for suite in suites() for p in published(suite)]
    keys = [(p.model, p.suite, p.setting, p.metric, p.source, p.tag, p.set) for p in everything]
    assert len(set(keys)) == len(keys) > 300
    for own in everything:
        assert 0.4 < own.value < (150 if own.metric == "cider_d" else 100), own
        assert own.tag in ("paper", "readme", "third-party", "memory", "unstated")
