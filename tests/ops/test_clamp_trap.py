"""Parameters of temperature 0.5 carried over to 0.05 stop training, and the statistics say so."""

import pytest

from docs.figures.clamp import SETTINGS, train

CARRIED_OVER, KAPPA_ONE, KAPPA_QUARTER, AS_PUBLISHED = SETTINGS.values()


def gain(curves):
    return curves.quality[-1] - curves.quality[0]


def test_values_of_temperature_one_half_carried_over_stop_training():
    assert CARRIED_OVER == {**AS_PUBLISHED, "temperature": 0.05}
    stopped = train(CARRIED_OVER, steps=150, every=150)
    assert stopped.clamped.mean() > 0.98
    assert stopped.clamped[:10].mean() > 0.98  # from the first steps on
    assert gain(stopped) < 0.12
    at_home = train(AS_PUBLISHED, steps=150, every=150)
    assert at_home.clamped.max() == 0.0
    assert gain(at_home) > 0.4


@pytest.mark.parametrize("settings", [KAPPA_ONE, KAPPA_QUARTER], ids=["1", "0.25"])
def test_a_small_kappa_learns(settings):
    curves = train(settings, steps=150, every=150)
    assert curves.clamped[:10].mean() < 0.75
    assert curves.clamped[-50:].mean() > curves.clamped[:10].mean() + 0.2  # as it learns
    assert gain(curves) > 0.22
