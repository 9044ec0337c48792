"""Experts that cannot be merged, tensors that lie in memory in other ways, too little memory and numbers at
their ends: every method that needs no data says in one line what is wrong, with the tensor's name, or gives
the result that is right."""
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from fusionbook.core.engine import check_memory
from fusionbook.core.errors import FusionError
from fusionbook.core.state_dict import generator
from fusionbook.method.base import BaseAlgorithm, fuse, load_algorithm_from_config
from fusionbook.method.check import ToyPool
from fusionbook.method.map import family_methods

FAMILIES = 'average', 'task_vector', 'subspace'
ELSEWHERE = 'passthrough', 'depth_upscaling' # which take one network of their own kind, see their pages
NAMES = sorted(
    {n for f in FAMILIES for c in family_methods(f'fusionbook.method.{f}') for n in c.config_names}
    - {*ELSEWHERE}
)
QUICK = dict(iter_num=3, max_iter=5, K=2)
SHAPES = {
    'embed.weight': (6, 4),
    'layers.0.weight': (5, 4),
    'layers.0.bias': (5,),
    'layers.1.weight': (4, 5),
    'layers.1.bias': (4,),
}
ODD = 'layers.1.weight'


class Network(nn.Module):
    "Tensors as the parameters of a network, for methods that build one."
    def __init__(self, tensors):
        super().__init__()
        for name, t in tensors.items():
            at = self
            for part in name.split('.')[:-1]:
                if not hasattr(at, part): at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.register_parameter(name.rpartition('.')[2], nn.Parameter(t))


def method_of(name, **more):
    method = load_algorithm_from_config(dict(name=name))
    return replace(method, **{k: v for k, v in QUICK.items() if k in {f.name for f in fields(method)}} | more)


def drawn(count):
    "A base and experts near it."
    g = generator(0, 'models')
    base = {k: torch.randn(s, generator=g) for k, s in SHAPES.items()}
    return base, [
        {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in base.items()} for _ in range(count)
    ]


def pool_of(method, base, experts):
    made = Network if method.build else dict
    return ToyPool({n: made(e) for n, e in zip('abc', experts)}, made(base))


def found(method, base, experts):
    "The tensors of whatever a method makes."
    result = fuse(method, pool_of(method, base, experts))
    several = (
        result.experts() if hasattr(result, 'experts') else result if isinstance(result, list) else [result]
    )
    states = [r.state_dict() if isinstance(r, nn.Module) else r for r in several]
    return {f'{i}.{k}': t.clone() for i, s in enumerate(states) for k, t in s.items()}


def count_of(name):
    "How many experts a method takes: three, two or one."
    for count in (3, 2, 1):
        try: found(method_of(name), *drawn(count))
        except FusionError as e:
            if count == 1 or 'expert' not in str(e): raise
        else: return count


counts = {}


@pytest.fixture
def good(name):
    "A method's experts and their merge."
    if name not in counts: counts[name] = count_of(name)
    base, experts = drawn(counts[name])
    return base, experts, found(method_of(name), base, experts)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('wrong', ['missing', 'another rank', 'NaN', 'infinite'])
def test_an_expert_that_cannot_be_merged_is_named(name, wrong, good):
    base, experts, _ = good
    last = experts[-1] = {k: v.clone() for k, v in experts[-1].items()}
    if wrong == 'missing': del last[ODD]
    elif wrong == 'another rank': last[ODD] = last[ODD][None]
    else: last[ODD][0, 0] = float(wrong[:3])
    # deals tensors out as they are; none is computed
    if name == 'model_recombination' and wrong in ('NaN', 'infinite'): return
    with pytest.raises(FusionError) as e: found(method_of(name), base, experts)
    assert ODD in str(e.value) and '\n' not in str(e.value)


def turned(state):
    "The same numbers, no tensor of which lies in one piece."
    return {k: t.T.contiguous().T if t.dim() > 1 else torch.stack([t, t], 1)[:, 0] for k, t in state.items()}


@pytest.mark.parametrize('name', NAMES)
def test_views_and_slices_are_merged_as_what_they_show(name, good):
    base, experts, merged = good
    assert not any(t.is_contiguous() for t in turned(base).values())
    again = found(method_of(name), turned(base), [turned(e) for e in experts])
    assert again.keys() == merged.keys() and all(torch.equal(again[k], t) for k, t in merged.items())


STREAMS = [n for n in NAMES if type(m := method_of(n)).run is BaseAlgorithm.run and m.build is None]


@pytest.mark.parametrize('name', STREAMS)
def test_too_little_memory_is_said_before_the_start(name, good):
    "With the tensor that needs most."
    base, experts, _ = good
    method = method_of(name)
    merged = method.merge(pool_of(method, base, experts))
    with pytest.raises(FusionError) as e: check_memory(merged, 10)
    assert any(f'`{k}`' in str(e.value) for k in SHAPES) and 'max_memory' in str(e.value)
    check_memory(merged, 10 ** 9)


@pytest.mark.parametrize('name', NAMES)
def test_numbers_at_their_ends_are_refused_or_give_finite_weights(name, good):
    "No density, all of it, nothing kept, a step of length zero and one the other way."
    base, experts, _ = good
    for f in fields(method_of(name)):
        value = getattr(method_of(name), f.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)): continue
        for end in (0, 1, -1):
            try:
                merged = found(method_of(name, **{f.name: end}), base, experts)
            except FusionError as e:
                assert '\n' not in str(e), (f.name, end, e)
            else:
                assert all(torch.isfinite(t).all() for t in merged.values() if t.is_floating_point()), (
                    f.name,
                    end,
                )
