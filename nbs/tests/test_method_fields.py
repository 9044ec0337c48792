"""Every field of every method meets odd values: it takes them or refuses them in one line, before a model is
opened."""
from dataclasses import fields
import pytest
import torch
import fusionbook.method as methods
from fusionbook.core.errors import FusionError
from fusionbook.method.base import BaseAlgorithm, fuse
from fusionbook.method.check import toy_data_pool

ODD = ('abc', [.1], -1, 0, float('nan'), [], {}, {'a': 1}, True, None, 1e30, [1, 2], '3')
CLASSES = [
    c
    for c in (getattr(methods, n) for n in dir(methods))
    if isinstance(c, type) and issubclass(c, BaseAlgorithm) and c.config_names
]
QUICK = dict(
    max_steps=1,
    steps=1,
    iter_num=1,
    samples=8,
    batch_size=4,
    rounds=0,
    sweeps=0,
    num_steps=1,
    max_iters=1,
    ada_iters=1,
    surgery_steps=1,
    gossip_max_steps=1,
    max_adamerging_steps=1,
    evaluations=2,
)

def refused(make):
    "What `make` returns, or the one line that it is refused with."
    try: return make()
    except FusionError as e:
        assert '\n' not in str(e) and 'expected' in str(e), e
        return str(e)

@pytest.mark.parametrize('cls', CLASSES, ids=lambda c: c.__name__)
def test_odd_values(cls, tmp_path, monkeypatch):
    """No raw exception while a method is made, and none while it runs; what runs gives finite numbers or says
    why not."""
    monkeypatch.chdir(tmp_path)  # for fields that name a file
    quick = {
        k: v for k, v in QUICK.items() if k in {f.name for f in fields(cls)} - {*getattr(cls, 'unused', ())}
    }
    for f in fields(cls):
        for value in ODD:
            if f.name in QUICK and value == 1e30: continue
            method = refused(lambda: cls(**quick | {f.name: value}))
            if isinstance(method, str): continue
            found = refused(lambda: fuse(method, toy_data_pool(2)))
            if isinstance(found, torch.nn.Module):
                bad = [
                    k
                    for k, t in found.state_dict().items()
                    if t.is_floating_point() and not torch.isfinite(t).all()
                ]
                assert not bad, (cls.__name__, f.name, value, bad)

def test_every_method_is_here(): assert len(CLASSES) >= 15
