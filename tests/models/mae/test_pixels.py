"""Plain or normalised pixels: told by predictions, and a wrong declaration is refused."""

import pytest

from testtime.models.mae import MAE, Sizes
from testtime.models.mae.pixels import has_learned, mean_share, require_target


def untrained() -> MAE:
    return MAE(32, 8, Sizes(16, 1, 2), Sizes(16, 1, 2))


def test_the_share_of_patch_means_tells_them_apart(plain: MAE, normalised: MAE) -> None:
    assert mean_share(plain) > 0.5
    assert mean_share(normalised) < 0.05


def test_what_is_not_declared_is_measured(plain: MAE, normalised: MAE) -> None:
    assert require_target(plain, None) is False
    assert require_target(normalised, None) is True


def test_what_is_declared_is_taken(plain: MAE, normalised: MAE) -> None:
    assert require_target(plain, False) is False
    assert require_target(normalised, True) is True


def test_the_wrong_target_is_refused(plain: MAE, normalised: MAE) -> None:
    with pytest.raises(ValueError, match=r"declared to predict normalised pixels, .* plain ones"):
        require_target(plain, True)
    with pytest.raises(ValueError, match=r"declared to predict plain pixels, .* normalised ones"):
        require_target(normalised, False)


def test_an_untrained_decoder_contradicts_no_declaration() -> None:
    mae = untrained()
    assert mean_share(mae) < 0.3
    assert not has_learned(mae)
    assert [require_target(mae, declared) for declared in (False, True)] == [False, True]


def test_between_the_two_it_is_asked(plain: MAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testtime.models.mae.pixels.mean_share", lambda mae: 0.25)
    with pytest.raises(ValueError, match=r"0\.25 .* Pass normalised=True"):
        require_target(plain, None)
    assert require_target(plain, True) is True
