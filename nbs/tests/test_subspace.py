"""What the methods that merge matrix by matrix promise, on experts that are drawn: hypothesis looks for the
ones for which it is not so."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

import fusionbook.method as methods
from fusionbook.core.state_dict import generator
from fusionbook.method.check import ToyPool

TIES = dict(options=dict(threshold=40, scaling_factor=1., merge_func='mean', tie='plus'))


def make(name, **how): return lambda: getattr(methods, name)(**how)


# turned inputs and outputs turn the merge
TURNED = {
    'WUDI, closed form': make('WUDIClosedForm'),
    'WUDI, Tikhonov': make('WUDIClosedForm', filter='tikhonov'),
    'WUDI, Landweber': make('WUDIClosedForm', filter='landweber'),
    'SWUDI': make('SWUDI'),
    'SWUDI-soft': make('SWUDISoft', exp_time=10.),
    'ASWUDI': make('ASWUDI'),
    'CART': make('CART', rank_ratio=.4, scaling_factor=2.),
    'ActMerge': make('ActMerge'),
    'DC-Merge': make('DCMerge', density=.3),
    'DC-Merge, smoothed': make('DCMerge', density=.3, smoothing='linear'),
    'ResMerge': make('ResMerge'),
    'Core Space with TIES': make('CoreSpace', **TIES),
    'OrthoMerge': make('OrthoMerge'),
    'TSV-M': make('TaskSingularVectorMerging'),
    'Iso-C': make('ISO_C_Merge'),
    'Iso-CTS': make('ISO_CTS_Merge', common_space_fraction=.5),
    'singular value calibration': make('SingularValueCalibrationWithBaseMethod'),
    'singular value calibration of TSV-M': make('CalibratedTSV'),
}
OTHERS = {
    'WUDI': make('WUDIMerging', iter_num=20, lr=.01),
    'ACE-Merging': make('ACEMerging'),
    'ACE-Merging, corrected': make('ACEMerging', threshold=0),
    'KnOTS with TIES': make('KnOTS', eps=0., **TIES),
}
EVERY = TURNED | OTHERS
SHIFTED = [n for n in EVERY if n != 'OrthoMerge'] # its rotation is one of the base
SCALED = [*TURNED, 'KnOTS with TIES']
# experts whose rows and columns do not meet are all recovered
APART = {
    n: EVERY[n] for n in ('WUDI', 'WUDI, closed form', 'SWUDI', 'SWUDI-soft', 'ASWUDI', 'ActMerge', 'TSV-M')
}
APART['DC-Merge, all entries'] = make('DCMerge', density=1.)
# copies of one expert give it back
ALIKE = ('WUDI, closed form', 'ActMerge', 'CART')

few = settings(max_examples=5, deadline=None, derandomize=True)
seeds = st.integers(0, 10 ** 6)


def drawn(seed, rows=6, columns=5, count=3):
    "A base, and what experts changed, in float64: what is tested is the formula, not its rounding."
    g = generator(seed, 'matrices')
    base = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    shared = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return base, .5 * torch.randn(count, rows, columns, generator=g, dtype=torch.float64) + .2 * shared


def change(name, base, tau):
    "What a merge changed in the matrix."
    pool = ToyPool([{'w': base + t} for t in tau], {'w': base})
    return EVERY.get(name, APART.get(name))().merge(pool)['w'] - base


def turn(seed, n):
    g = generator(seed, 'turn')
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]


def close(a, b, tolerance=1e-6):
    assert torch.allclose(a, b, rtol=tolerance, atol=tolerance), (a - b).abs().max()


@pytest.mark.parametrize('name', TURNED)
@few
@given(seed=seeds)
def test_turned_experts_turn_the_merge(name, seed):
    base, tau = drawn(seed)
    P, Q = turn(seed, 6), turn(seed + 1, 5)
    close(change(name, P @ base @ Q, P @ tau @ Q), P @ change(name, base, tau) @ Q)


@pytest.mark.parametrize('name', SCALED)
@few
@given(seed=seeds, factor=st.floats(.01, 100))
def test_all_models_scale(name, seed, factor):
    base, tau = drawn(seed)
    close(change(name, factor * base, factor * tau) / factor, change(name, base, tau))


@pytest.mark.parametrize('name', SHIFTED)
@few
@given(seed=seeds, shift=st.floats(-3, 3))
def test_a_constant_changes_nothing(name, seed, shift):
    base, tau = drawn(seed)
    close(change(name, base + shift, tau), change(name, base, tau))


@pytest.mark.parametrize('name', EVERY)
@few
@given(seed=seeds, order=st.permutations(range(3)))
def test_the_order_of_experts_is_irrelevant(name, seed, order):
    base, tau = drawn(seed)
    close(change(name, base, tau[list(order)]), change(name, base, tau))


@pytest.mark.parametrize('name', APART)
@few
@given(seed=seeds, rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_experts_that_do_not_meet_are_recovered(name, seed, rows, columns):
    base, tau = drawn(seed, 6, 6, 2)
    tau[0, rows:], tau[0, :, columns:], tau[1, :rows], tau[1, :, :columns] = 0, 0, 0, 0
    if 'DC' in name or 'TSV' in name:  # half of the directions for each: blocks of rank three at most
        tau[0, 3:], tau[0, :, 3:], tau[1, :3], tau[1, :, :3] = 0, 0, 0, 0
    close(change(name, base, tau), tau.sum(0))


@pytest.mark.parametrize('name', ALIKE)
@few
@given(seed=seeds, count=st.integers(1, 4))
def test_copies_of_an_expert_give_it_back(name, seed, count):
    base, tau = drawn(seed, count=1)
    close(change(name, base, tau.expand(count, -1, -1)), tau[0])
