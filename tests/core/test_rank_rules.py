"""Rules from spectra to ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.core import InputError
from fullrank.core.rank_rules import (
    Energy,
    Fixed,
    FractionOfBreakEven,
    LayerSpectrum,
    ParamRatio,
    PerKind,
    Value,
    apply_rule,
)

sizes = st.integers(1, 40)


@st.composite
def layers(draw):
    m, n = draw(sizes), draw(sizes)
    values = draw(
        st.lists(st.floats(0, 1e6), min_size=min(m, n), max_size=min(m, n)).map(
            lambda v: sorted(v, reverse=True)
        )
    )
    return LayerSpectrum(np.array(values), (m, n))


rules = st.one_of(
    st.builds(Fixed, st.integers(1, 50)),
    st.builds(FractionOfBreakEven, st.floats(0.01, 1)),
    st.builds(ParamRatio, st.floats(1, 20)),
    st.builds(Energy, st.floats(0.01, 1)),
    st.builds(Value, st.floats(0, 1e6)),
)


@given(rules, st.dictionaries(st.sampled_from("abc"), layers(), min_size=1))
def test_every_rule_gives_a_rank_that_a_matrix_can_have(rule, spectra):
    for name, rank in apply_rule(rule, spectra).items():
        assert rank is None or 1 <= rank <= min(spectra[name].shape)


@given(layers(), st.floats(0.01, 1))
def test_energy_is_the_smallest_rank_that_holds_the_share(layer, tau):
    rank = Energy(tau)(layer.values, *layer.shape)
    energy = np.cumsum(layer.values**2)
    if not energy[-1] > 0:
        assert rank is None
        return
    assert energy[rank - 1] >= tau * energy[-1]
    assert rank == 1 or energy[rank - 2] < tau * energy[-1]


@given(layers(), st.floats(1, 20))
def test_param_ratio_never_exceeds_its_share(layer, ratio):
    m, n = layer.shape
    rank = ParamRatio(ratio)(layer.values, m, n)
    assert rank is None or rank * (m + n) * ratio <= m * n * (1 + 1e-9)


def test_value_counts_components():
    spectrum = np.array([3.0, 2.0, 1.0])
    assert Value(2.0)(spectrum, 3, 3) == 2
    assert Value(0.0)(spectrum, 3, 3) == 3
    assert Value(9.0)(spectrum, 3, 3) is None


def test_kinds_go_by_the_first_pattern_that_matches():
    layer = LayerSpectrum(np.ones(4), (4, 4))
    rule = PerKind({"0.*": None, "*.query": 3, "*": Fixed(2)})
    spectra = dict.fromkeys(["0.query", "1.query", "1.key"], layer)
    assert apply_rule(rule, spectra) == {"0.query": None, "1.query": 3, "1.key": 2}
    with pytest.raises(InputError, match=r"named like '\*\.value'"):
        apply_rule(PerKind({"*.value": 2}), spectra)
    with pytest.raises(InputError, match="the rank 5"):
        apply_rule(PerKind({"*": 5}), spectra)


def test_a_rule_may_be_any_function():
    layer = LayerSpectrum(np.ones(4), (4, 4))
    assert apply_rule(lambda values, m, n: m // 2, {"a": layer}) == {"a": 2}
    for bad in (0, 5, -1):
        with pytest.raises(InputError, match=r"must lie in \[1, 4\]"):
            apply_rule(lambda values, m, n, rank=bad: rank, {"a": layer})


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (Fixed, 0),
        (FractionOfBreakEven, 0.0),
        (FractionOfBreakEven, 1.5),
        (ParamRatio, 0.5),
        (ParamRatio, float("nan")),
        (Energy, 0.0),
        (Energy, 1.01),
        (Energy, float("nan")),
        (Value, -1.0),
        (Value, float("nan")),
    ],
)
def test_bad_settings(rule, bad):
    with pytest.raises(InputError):
        rule(bad)
