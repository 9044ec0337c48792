"""What is true of whole groups of methods, on experts that are drawn: hypothesis looks for the ones for which
it is not."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

import fusionbook.method as methods
from fusionbook.core.state_dict import generator
from fusionbook.method.base import BaseAlgorithm
from fusionbook.method.check import ToyPool

SHAPES = {'embed.weight': (5, 3), 'layers.0.w': (4, 3), 'layers.0.bias': (4,), 'layers.1.w': (4, 3)}


def make(name, **how): return getattr(methods, name)(**how)


# methods whose result moves with all models when a constant is added to all of them: sums with weights that
# sum to one, and steps from a base
SHIFTED = {
    'simple average': lambda: make('SimpleAverage'),
    'weighted average': lambda: make('WeightedAverage', weights=[1, [1, 3], 2]),
    'task arithmetic': lambda: make('TaskArithmetic', scaling_factor=[.2, .7]),
    'TIES': lambda: make('TiesMerging', threshold=100, merge_func='mean'),
    'ExPO': lambda: make('ExPO', extrapolation_factor=.5),
    'MultiSLERP': lambda: make('MultiSlerp'),
    'model stock': lambda: make('ModelStock', mean='cosines'),
    'model stock, angles by rows': lambda: make('ModelStock', filter_wise=True),
    'recombination': lambda: make('ModelRecombination'),
}
# methods for which an expert that is given twice counts as one with twice the weight
WEIGHED = {
    'weighted average': lambda w: make('WeightedAverage', weights=w),
    'task arithmetic': lambda w: make('TaskArithmetic', weights=w),
    'MultiSLERP': lambda w: make('MultiSlerp', weights=w),
    'Karcher mean': lambda w: make('Karcher', weights=w, max_iter=60, tol=1e-10),
}
# methods that commute with a scaling of all task vectors
SCALED = {
    'task arithmetic': lambda: make('TaskArithmetic'),
    'TIES': lambda: make('TiesMerging', threshold=100, merge_func='mean'),
    'ExPO': lambda: make('ExPO'),
    'MultiSLERP': lambda: make('MultiSlerp'),
    'model stock': lambda: make('ModelStock'),
    'model stock by rows': lambda: make('ModelStock', filter_wise=True),
}
# methods that give every expert back when all are that expert
ALIKE = SHIFTED | {
    'Karcher mean': lambda: make('Karcher'),
    'NuSLERP': lambda: make('NuSlerp'),
    'NuSLERP by rows': lambda: make('NuSlerp', nuslerp_flatten=False),
    'SLERP': lambda: make('SlerpMerge'),
    'linear interpolation': lambda: make('LinearInterpolation', t=.3),
}
del ALIKE['task arithmetic'], ALIKE['ExPO'], ALIKE['TIES'] # these go on from there, or not all the way


def drawn(seed, count, spread=1.):
    "A base and experts around it, in float64: what is tested is the formula, not its rounding."
    g = generator(seed, 'models')
    base = {k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in SHAPES.items()}

    def expert():
        return {
            k: v + spread * torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in base.items()
        }
    return base, [expert() for _ in range(count)]


def merged(method, base, experts):
    return {k: v.clone() for k, v in method.merge(ToyPool(experts, base)).items()}


def close(a, b, tolerance=1e-7):
    "Equal up to rounding; says where not."
    for k in a:
        assert torch.allclose(a[k], b[k], rtol=tolerance, atol=tolerance), (k, (a[k] - b[k]).abs().max())


few = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.mark.parametrize('name', SHIFTED)
@few
@given(seed=st.integers(0, 10 ** 6), shift=st.floats(-3, 3))
def test_a_constant_moves_everything_alike(name, seed, shift):
    base, experts = drawn(seed, 3)
    def moved(sd): return {k: v + shift for k, v in sd.items()}

    close(
        merged(SHIFTED[name](), moved(base), [moved(e) for e in experts]),
        moved(merged(SHIFTED[name](), base, experts)),
    )


@pytest.mark.parametrize('name', WEIGHED)
@few
@given(seed=st.integers(0, 10 ** 6), times=st.integers(2, 4))
def test_a_duplicate_is_a_weight(name, seed, times):
    base, (a, b) = drawn(seed, 2)
    close(
        merged(WEIGHED[name]([1.0] * times + [1.0]), base, [a] * times + [b]),
        merged(WEIGHED[name]([float(times), 1.0]), base, [a, b]),
    )


@pytest.mark.parametrize('name', SCALED)
@few
@given(seed=st.integers(0, 10 ** 6), factor=st.floats(.01, 100))
def test_task_vectors_scale(name, seed, factor):
    base, experts = drawn(seed, 3)
    def step(sd, by): return {k: base[k] + by * (v - base[k]) for k, v in sd.items()}

    close(
        merged(SCALED[name](), base, [step(e, factor) for e in experts]),
        step(merged(SCALED[name](), base, experts), factor),
        1e-6,
    )


@pytest.mark.parametrize('name', ALIKE)
@few
@given(seed=st.integers(0, 10 ** 6))
def test_one_model_many_times_is_that_model(name, seed):
    base, (expert,) = drawn(seed, 1)
    count = 3 if name in SHIFTED or name == 'Karcher mean' else 2
    close(merged(ALIKE[name](), base, [expert] * count), expert)


# steps of length one after which every expert is there, where experts changed no entry in common
APART = {
    'task arithmetic': lambda: make('TaskArithmetic', scaling_factor=1.0),
    'TIES': lambda: make('TiesMerging', scaling_factor=1.0, threshold=100, merge_func='mean'),
    'MagMax': lambda: make('MagMax', scaling_factor=1.0),
    'RAM': lambda: make('Ram', scaling_factor=1.0, epsilon=0.0),
    'breadcrumbs': lambda: make('Breadcrumbs', scaling_factor=1.0, density=1.0, gamma=0.0),
    'breadcrumbs, elected': lambda: make('BreadcrumbsTies', scaling_factor=1.0, density=1.0, gamma=0.0),
    'TIES, rescaled': lambda: make(
        'TiesMerging', scaling_factor=1.0, threshold=100, merge_func='mean', trim='tensor', rescale=True
    ),
    'DARE that drops nothing': lambda: make('DareTaskArithmetic', scaling_factor=1.0, sparsity_ratio=0.0),
    'DELLA that drops nothing': lambda: make('DellaLinear', scaling_factor=1.0, density=1.0, epsilon=0.0),
}


def disjoint(seed, count=3):
    "Experts of which each entry is changed by one at most."
    base, experts = drawn(seed, count)
    g = generator(seed, 'owners')
    owner = {k: torch.randint(count, v.shape, generator=g) for k, v in base.items()}
    return base, [
        {k: torch.where(owner[k] == i, v, base[k]) for k, v in e.items()} for i, e in enumerate(experts)
    ]


@pytest.mark.parametrize('name', APART)
@few
@given(seed=st.integers(0, 10 ** 6))
def test_experts_that_share_no_entry_are_all_recovered(name, seed):
    base, experts = disjoint(seed)
    close(
        merged(APART[name](), base, experts), {k: b + sum(e[k] - b for e in experts) for k, b in base.items()}
    )


# random droppings whose mean over seeds is the task vector
UNBIASED = {
    'DARE': lambda seed: make('DareTaskArithmetic', scaling_factor=1.0, sparsity_ratio=0.5, seed=seed),
    'DARE of the average': lambda seed: make('DareSimpleAverage', sparsity_ratio=0.5, seed=seed),
    'DELLA, by probability': lambda seed: make(
        'DellaLinear', scaling_factor=1.0, density=0.5, epsilon=0.2, rescale_by='probability', seed=seed
    ),
    'ExPO with DARE': lambda seed: make(
        'ExPOWithDareForLLama', extrapolation_factor=0.5, dare_only_on_linear_weights=False, seed=seed
    ),
}
EXACT = { # what they are without dropping
    'DARE': lambda: make('TaskArithmetic', scaling_factor=1.),
    'DARE of the average': lambda: make('SimpleAverage'),
    'DELLA, by probability': lambda: make('TaskArithmetic', scaling_factor=1.),
    'ExPO with DARE': lambda: make('ExPOAlgorithmForLlama', extrapolation_factor=.5),
}


@pytest.mark.parametrize('name', UNBIASED)
def test_random_dropping_is_repeatable_and_unbiased_over_200_seeds(name):
    base, experts = drawn(0, 2)
    method = UNBIASED[name]
    close(merged(method(3), base, experts), merged(method(3), base, experts), 0)
    exact = merged(EXACT[name](), base, experts)
    found = {
        k: torch.stack(v)
        for k, v in zip(
            base,
            zip(*(merged(method(s), base, experts).values() for s in range(200)), strict=True),
            strict=True,
        )
    }
    for k, each in found.items():
        error = each.std(0) / 200 ** .5
        assert ((each.mean(0) - exact[k]).abs() <= 4.5 * error + 1e-9).all(), k
        assert error.max() > 0, k


FEWER = {'DOGE_TA': dict(steps=40)} # of Adam: every one sees all experts
SYMMETRIC = [
    n
    for n in dir(methods)
    if isinstance(c := getattr(methods, n), type)
    and issubclass(c, BaseAlgorithm)
    and c.config_names
    and c.symmetric is True
    and isinstance(c.uses, tuple)
    and set(c.uses) <= {'pretrained', 'experts'}
    and c.build is None
    and c.__module__.split('.')[2] in ('average', 'task_vector')
]


@pytest.mark.parametrize('name', SYMMETRIC)
@few
@given(seed=st.integers(0, 10 ** 6), order=st.permutations(range(3)))
def test_the_order_of_experts_is_irrelevant(name, seed, order):
    base, experts = drawn(seed, 3)
    method = make(name, **FEWER.get(name, {}))
    try: before = merged(method, base, experts)
    except ValueError as e:
        assert 'expert' in str(e)                       # takes another number of experts
        return
    close(before, merged(method, base, [experts[i] for i in order]))


def test_symmetric_methods_were_found():
    assert {'SimpleAverage', 'Karcher', 'ModelStock', 'TaskArithmetic'} <= set(SYMMETRIC)
