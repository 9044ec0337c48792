"""Every configuration of the families that merge weights, on every kind of model and on experts of every
kind.

A merge keeps names, shapes, types, integers and ties, and its numbers are finite; what cannot be merged is
refused in one line. No network is evaluated: whether the numbers are right is the lesson of each method's
page.
"""
from functools import cache
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip('transformers')
from omegaconf import OmegaConf  # noqa: E402

import fusionbook  # noqa: E402
from conftest import save_tower, tower_of  # noqa: E402
from fusionbook.core.config import instantiate  # noqa: E402
from fusionbook.core.errors import FusionError  # noqa: E402
from fusionbook.core.state_dict import generator, shared  # noqa: E402
from fusionbook.method.base import fuse  # noqa: E402
from fusionbook.method.map import family_methods  # noqa: E402
from fusionbook.modelpool import AutoModelPool, CLIPVisionModelPool  # noqa: E402
from fusionbook.models.clip import tiny_clip  # noqa: E402
from fusionbook.models.hub import tiny_hub  # noqa: E402

CONFIG = Path(fusionbook.__file__).parent/'config'/'method'
FAMILIES = 'average', 'task_vector', 'subspace'
NAMES = sorted(n for f in FAMILIES for c in family_methods(f'fusionbook.method.{f}') for n in c.config_names)
QUICK = dict(iter_num=3, max_iter=5, steps=5)
ONE, TWO = 'expected a base and one expert, got ', 'expected two experts, or a base and one expert, got '
# what a method says to pools of another number of experts, or without the layers that it wants; no other is
# refused
REFUSALS = {
    'arcee_fusion': ONE,
    'nearswap': ONE,
    'linear/linear_interpolation': TWO,
    'slerp/slerp': TWO,
    'slerp/slerp_lm': TWO,
    'nuslerp': 'expected two experts, got ',
    'depth_upscaling': 'expected one model to make deeper, got ',
    'model_stock/model_stock': 'expected two experts at least, whose angle decides, got ',
    'passthrough': 'expected `slices` as a list with at least one slice, got ',
    **dict.fromkeys(
        ('doge_ta/doge_ta', 'resmerge'), 'expected a model with matrices, got none among '
    ),  # convolutions are none unless `matrices` says so
}
STAYS = {  # cases in which a merge is the base: one expert has no consensus
    'tall_mask/consensus_task_arithmetic': ('one expert',),
    'tall_mask/consensus_ties_merging': ('one expert',),
}
NEVER = 'passthrough', # whose slices name the models of one pool
KINDS = {
    'clip': None,
    'residual network': ('resnet', {}),
    'tied language model': ('gpt2', {}),
    'bfloat16': ('bert', dict(dtype='bfloat16')),
}
CASES = {kind: (kind, 'abc') for kind in KINDS} # letters of experts; 0 is one that is the base
CASES |= {
    'one expert': ('tied language model', 'a'),
    'still': ('residual network', 'ab0'),
    'equal': ('residual network', 'aa'),
}


def changed(state, letter, scale=.02):
    "An expert's tensors; `0` for those of the base."
    if letter == '0': return state
    noise = {k: torch.randn(t.shape, generator=generator(ord(letter), k)) for k, t in state.items()}
    return {k: (t + scale * noise[k]).to(t.dtype) if t.is_floating_point() else t for k, t in state.items()}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "kind -> the folder of one model of it, which is made when first asked for."
    room = tmp_path_factory.mktemp('models')

    @cache
    def folder(kind, letter):
        if kind == 'clip':
            base = tiny_clip(room/kind/'base', ['cat', 'dog'])
            return save_tower(changed(tower_of(base), letter), room/kind/letter, base)
        name, settings = KINDS[kind]
        base = tiny_hub(room/kind/'base', name)
        network = getattr(
            transformers, transformers.AutoConfig.from_pretrained(base).architectures[0]
        ).from_pretrained(base)
        network.to(getattr(torch, settings.get('dtype', 'float32')))
        with torch.no_grad():
            for k, t in changed(dict(network.state_dict()), letter).items(): network.state_dict()[k].copy_(t)
        network.save_pretrained(room/kind/letter)
        return str(room/kind/letter)

    return folder


@pytest.fixture(scope='module')
def pools(folders):
    "kind, letters -> a pool, and the tensors of its base."
    @cache
    def pool(kind, letters):
        found = pool_of(kind, letters, folders)
        return found, found.load_pretrained_model().state_dict()
    return pool


def pool_of(kind, letters, folders):
    names = [f'{i}{letter}' for i, letter in enumerate(letters)]
    pool = CLIPVisionModelPool if kind == 'clip' else AutoModelPool
    return pool({'_pretrained_': folders(kind, '0')} | {n: folders(kind, n[1:]) for n in names})


def method_of(name):
    config = OmegaConf.load(CONFIG/f'{name}.yaml')
    config = OmegaConf.merge(config, {k: v for k, v in QUICK.items() if k in config})
    return instantiate(config)


def check_merged(base, merged):
    """Finite numbers; what has a name of the base has its shape and type, integers are the base's, tied
    tensors are one tensor."""
    found = merged.state_dict()
    bad = [k for k, t in found.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    assert not bad, bad
    if not found.keys() >= base.keys(): return # a network that holds several models, or more layers
    for k, t in base.items():
        assert (found[k].shape, found[k].dtype) == (t.shape, t.dtype), k
        if not t.is_floating_point(): assert torch.equal(found[k], t), k
    for k, first in shared(base).items(): assert (found[k].data_ptr() == found[first].data_ptr()), k


def moved(base, merged):
    "Whether the merge is another model than the base."
    found = merged.state_dict()
    return not found.keys() >= base.keys() or any(not torch.equal(found[k], t) for k, t in base.items())


@pytest.mark.parametrize('name', NAMES)
def test_every_method_on_every_kind(name, pools):
    merged = 0
    for case, (kind, letters) in CASES.items():
        pool, base = pools(kind, letters)
        try: network = fuse(method_of(name), pool)
        except FusionError as e:
            assert 'expected' in str(e) and '\n' not in str(e), (case, e)
            assert name in REFUSALS and str(e).startswith(REFUSALS[name]), (case, e)
            continue
        check_merged(base, network)
        assert moved(base, network) != (case in STAYS.get(name, ())), case
        merged += 1
    assert merged or name in NEVER, 'refused in every case'
