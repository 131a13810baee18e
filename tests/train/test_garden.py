"""The garden: captions name what images show, seeds repeat, the judge reads every attribute back."""

from __future__ import annotations

import numpy as np
import pytest

from kdc_edge.train.garden.assets import JUDGE
from kdc_edge.train.garden.judge import LABELS, load_judge
from kdc_edge.train.garden.scenes import BACKGROUNDS, SUBJECTS, Scene, draw_scenes, render, render_many, scenes


def test_captions_are_plain_english() -> None:
    assert Scene("flower", "purple", "five", "yellow", "sky").caption == (
        "a purple flower with five petals and a yellow center on a sky background"
    )
    assert Scene("flower", "orange", "six", "orange", "dark").caption.startswith(
        "an orange flower with six petals and an"
    )
    assert Scene("butterfly", "red", "spots", "white", "dark").caption == (
        "a red butterfly with white spots on a dark background"
    )
    assert Scene("fish", "orange", "plain", "none", "sand").caption == "a plain orange fish on a sand background"


def test_captions_tell_all_scenes_apart() -> None:
    every = [s for subject in SUBJECTS for s in scenes(subject)]
    assert len({s.caption for s in every}) == len(every) == 1400


@pytest.mark.parametrize("subject", SUBJECTS)
def test_about_one_combination_in_ten_is_held_out_and_never_drawn_for_training(subject: str) -> None:
    heldout = set(scenes(subject, "heldout"))
    assert 0.07 < len(heldout) / len(scenes(subject)) < 0.13
    assert heldout.isdisjoint(draw_scenes(subject, 3000, seed=5))
    assert heldout.issuperset(draw_scenes(subject, 300, seed=5, split="heldout"))
    # Whole combinations are held out, on every background, so that no image of them was ever seen.
    assert {s.background for s in heldout} == set(BACKGROUNDS)


def test_images_repeat_with_their_seed_and_differ_without() -> None:
    chosen = draw_scenes("butterfly", 3, seed=1)
    assert chosen == draw_scenes("butterfly", 3, seed=1)
    assert np.array_equal(render_many(chosen, seed=1), render_many(chosen, seed=1))
    assert not np.array_equal(render_many(chosen, seed=1), render_many(chosen, seed=2))
    assert render_many(chosen, seed=1).shape == (3, 64, 64, 3)


def test_backgrounds_are_flat_and_of_the_named_colour() -> None:
    for name, color in BACKGROUNDS.items():
        image = np.asarray(render(Scene("fish", "white", "plain", "none", name), np.random.default_rng(0)))
        assert np.array_equal(image[0, 0], color)
        assert np.array_equal(image[0], np.broadcast_to(color, (64, 3)))


def test_the_judge_is_right_99_times_in_100_on_every_attribute_of_fresh_renders() -> None:
    chosen = [s for subject in SUBJECTS for s in draw_scenes(subject, 150, seed=99, split="all")]
    found = load_judge().agreement(render_many(chosen, seed=99), chosen)
    assert {name: found[name] >= 0.99 for name in LABELS} == dict.fromkeys(LABELS, True), found
    assert JUDGE.stat().st_size < 2**20


def test_the_judge_sees_when_an_image_is_not_what_was_asked() -> None:
    red, blue = (
        Scene("flower", "red", "five", "white", "sky"),
        Scene("flower", "blue", "five", "white", "sky"),
    )
    found = load_judge().agreement(render_many([red] * 20, seed=3), [blue] * 20)
    assert found["color"] < 0.1
    assert found["detail"] > 0.9
    assert found["all"] < 0.1
