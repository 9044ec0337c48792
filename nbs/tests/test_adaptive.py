"""Methods that learn: interrupted at any step they go on to the same bytes; an objective that is no number
stops; frozen parameters and foreign coefficients."""
import inspect
import shutil
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

from fusionbook.core.errors import FusionError
from fusionbook.method.base import fuse
from fusionbook.method.check import StoppingTasks, ToyPool, ToyTasks
from fusionbook.method.map import family_methods

# learning steps of every stage, small batches; what a method does not know is left out
SMALL = dict(
    max_steps=4,
    max_adamerging_steps=4,
    surgery_steps=3,
    gossip_max_steps=2,
    max_iters=3,
    ada_iters=2,
    dataset_size=8,
    batch_size=4,
    width=2,
)
# texts with answers need words: on these inputs it learns by the entropy
MORE = {
    'LayerWiseAdaMergingForLlamaSFT': dict(objective='entropy', start_layer_idx=0, average_attntion=False)
}
METHODS = {c.__name__: c for c in family_methods('fusionbook.method.adaptive')}
KEPT = {n: c for n, c in METHODS.items() if 'checkpoint' in {f.name for f in fields(c)}}


class Deep(nn.Module):
    "Numbers (n, 6) -> logits (n, 6) through two numbered layers and a norm; a scale that is frozen."
    def __init__(self, seed):
        super().__init__()
        self.layers, self.norm, self.head = (
            nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]),
            nn.LayerNorm(6),
            nn.Linear(6, 6),
        )
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for k, p in self.named_parameters():
                p.copy_((k in ("norm.weight", "scale")) + 0.3 * torch.randn(p.shape, generator=g))
    def forward(self, x):
        for layer in self.layers: x = x + layer(x).tanh()
        return self.head(self.norm(x)) * self.scale
    def recipe(self): return {}


class Threads(ToyTasks):
    "Heads that note how many threads of the processor there are."
    found = frozenset()
    def logits(self, task):
        def head(model, x):
            self.found = self.found | {torch.get_num_threads()}
            return model(x)
        return head


class Doubled(ToyTasks):
    "Another head."
    def logits(self, task): return lambda model, x: 2 * model(x)


def pool(tasks=None, spoil=1., names='abc', seeds=(1, 2, 3)):
    "Three experts, with other inputs of each kind for each task."
    g = torch.Generator().manual_seed(9)
    kinds = 'train_datasets', 'val_datasets', 'test_datasets'
    data = {k: {n: spoil * torch.randn(12, 6, generator=g) for n in 'abc'} for k in kinds}
    models = dict(zip('abc', map(Deep, seeds), strict=True))
    return ToyPool({n: models[n] for n in names}, Deep(0), **data).attach(tasks or ToyTasks())


def made(name, **more):
    cls = METHODS[name]
    known = {f.name for f in fields(cls)} - cls.unused.keys()
    return cls(**{k: v for k, v in SMALL.items() if k in known} | MORE.get(name, {}) | more)


def state(result):
    return {k: v.clone() for k, v in result.state_dict().items()}


@pytest.mark.parametrize('name', KEPT)
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(name, tmp_path):
    whole = StoppingTasks()
    wanted = state(fuse(made(name), pool(whole)))
    file = str(tmp_path/'state.safetensors')
    for after in sorted({round(i * (whole.calls - 1) / 4) for i in range(5)}):
        with pytest.raises(KeyboardInterrupt): fuse(made(name, checkpoint=file), pool(StoppingTasks(after)))
        for left in tmp_path.rglob('*'): assert left.is_dir() or left.suffix == '.safetensors'
        again = state(fuse(made(name, checkpoint=file), pool()))
        assert again.keys() == wanted.keys() and all(again[k].equal(v) for k, v in wanted.items()), after
        for left in tmp_path.rglob('*.safetensors'): left.unlink()


@pytest.mark.parametrize('name', KEPT)
def test_a_checkpoint_of_another_run_is_refused(name, tmp_path):
    file = str(tmp_path/'state.safetensors')
    fuse(made(name, checkpoint=file), pool())
    kept = {f: f.read_bytes() for f in tmp_path.rglob('*.safetensors')}
    assert kept
    for other, said in [
        (pool(spoil=2.), 'task_inputs'),
        (pool(names='acb'), 'order'),
        (pool(seeds=(1, 3, 2)), 'models'),
        (pool(Doubled()), 'task_heads'),
    ]:
        with pytest.raises(
            FusionError, match=f'expected the checkpoint of this run, got .* of one with another .*{said}'
        ):
            fuse(made(name, checkpoint=file), other)
    with pytest.raises(
        FusionError, match='expected the checkpoint of this run, got .* of one with another .*seed'
    ):
        fuse(made(name, checkpoint=file, seed=1), pool())
    assert {f: f.read_bytes() for f in tmp_path.rglob('*.safetensors')} == kept


def others(name):
    """What else a method may be told that a checkpoint could forget: each switch the other way, coefficients
    that are given."""
    plain = made(name)
    for f in fields(KEPT[name]):
        if isinstance(value := getattr(plain, f.name), bool): yield {f.name: not value}
        if f.name == 'weights': yield from ({f.name: [x] * 3} for x in (.1, .2))


def test_a_switch_of_symerge_is_no_head_of_a_task(tmp_path):
    "Heads that learn and heads that do not are two runs, whatever the heads of the pool are called."
    file = str(tmp_path/'state.safetensors')
    fuse(made('SyMerge', heads=True, checkpoint=file), pool())
    with pytest.raises(
        FusionError, match='expected the checkpoint of this run, got .* of one with another heads;'
    ):
        fuse(made('SyMerge', heads=False, checkpoint=file), pool())


@pytest.mark.parametrize('name', KEPT)
def test_a_checkpoint_of_another_setting_is_refused_or_decides_nothing(name, tmp_path):
    "A run beside a checkpoint of every other setting ends as it does without one."
    made_of = {}
    for i, more in enumerate([{}, *others(name)]):
        try: made_of[i] = more, state(fuse(made(name, **more), pool()))
        except FusionError: continue # a setting that the method does not have
        fuse(made(name, **more, checkpoint=str(tmp_path/f'{i}.safetensors')), pool())
    assert 0 in made_of
    for i in made_of:
        for more, wanted in made_of.values():
            shutil.rmtree(tmp_path/'now', ignore_errors=True)
            shutil.copytree(tmp_path, tmp_path/'now', ignore=shutil.ignore_patterns('now'))
            try:
                found = state(
                    fuse(made(name, **more, checkpoint=str(tmp_path / f'now/{i}.safetensors')), pool())
                )
            except FusionError as e:
                assert 'expected the checkpoint of this run' in str(
                    e
                ) or 'expected a checkpoint of at most' in str(e)
                continue
            assert found.keys() == wanted.keys() and all(found[k].equal(v) for k, v in wanted.items()), more


@pytest.mark.parametrize('name', KEPT)
def test_an_objective_that_is_no_number_stops_with_the_step_and_what_to_try(name):
    with pytest.raises(FusionError) as e: fuse(made(name), pool(spoil=float('nan')))
    assert 'expected a finite objective, got nan at step 1 of' in str(e.value)
    assert 'try a smaller lr' in str(e.value) and '\n' not in str(e.value) and '` ' in str(e.value)


@pytest.mark.parametrize('name', KEPT)
def test_a_frozen_parameter_stays_the_bases(name):
    found, base = state(fuse(made(name), pool())), Deep(0).state_dict()
    assert any(k.endswith('scale') for k in found)
    for k, v in found.items():
        if k.endswith('scale'): assert v.equal(base['scale'])
    moved = [
        k
        for k in base
        if any(
            f.endswith(k) and f.count('.') >= k.count('.') and not v.equal(base[k])
            for f, v in found.items()
            if v.shape == base[k].shape
        )
    ]
    assert len(moved) > 2


@pytest.mark.parametrize('name', [n for n, c in KEPT.items() if 'weights' in {f.name for f in fields(c)}])
def test_coefficients_of_other_experts_or_another_shape_are_refused(name):
    for weights, said in (
        ([[0.1] * 99] * 3, 'expected coefficients'),
        ([0.1, 0.2], 'expected coefficients'),
        (dict(experts=['a', 'c', 'b'], groups=['x'], coefficients=[[0.1]] * 3), 'for the experts a, b, c'),
    ):
        with pytest.raises(FusionError, match=said): fuse(made(name, weights=weights), pool())


@pytest.mark.parametrize('name', KEPT)
def test_a_network_is_asked_on_the_threads_of_the_method(name):
    "Also before and between the steps."
    before, tasks = torch.get_num_threads(), Threads()
    torch.set_num_threads(2)
    try:
        fuse(made(name, threads=1), pool(tasks))
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)
    assert tasks.found == {1}


def told_a_device(module):
    "Functions of a module that are told where to work."
    return {
        k: f
        for k, f in vars(module).items()
        if inspect.isfunction(f) and 'device' in inspect.signature(f).parameters
    }


@pytest.mark.parametrize('name', KEPT)
def test_everything_is_computed_on_the_device_of_the_method(name, monkeypatch):
    "Whatever the modules of a method call that may work on any device is told the method's."
    found = {}
    for module in {
        sys.modules[c.__module__] for c in KEPT[name].__mro__ if c.__module__.startswith('fusionbook.method')
    }:
        for key, f in told_a_device(module).items():
            def noted(*args, _key=key, _f=f, **how):
                call = inspect.signature(_f).bind(*args, **how)
                call.apply_defaults()
                found.setdefault(_key, set()).add(call.arguments['device'])
                return _f(*args, **how)
            monkeypatch.setattr(module, key, noted)
    state(fuse(made(name, device='cpu:0'), pool()))
    assert found and all(devices == {'cpu:0'} for devices in found.values()), found


CHANGES = dict(lr=.02, optimizer='sgd', max_steps=3, batch_size=3)


@pytest.mark.parametrize('key', CHANGES)
@pytest.mark.parametrize('name', KEPT)
def test_a_setting_of_the_loop_decides_or_is_refused(name, key):
    "Nobody tunes a number that is not used."
    def found(**more):
        method = made(name, **more)
        merged = state(fuse(method, pool()))
        return merged, method.adaptation
    plain, notes = found()
    try: other, others = found(**{key: CHANGES[key]})
    except FusionError as e:
        assert f'`{key}`' in str(e)
        return
    assert any(not other[k].equal(v) for k, v in plain.items()) or notes != others


def test_pictures_are_refused_before_a_model_is_read(here, monkeypatch):
    from fusionbook.bench import run
    monkeypatch.setattr(run, '_lineage', lambda *args: pytest.fail('models were identified'))
    refused = here('method=adamerging/llama_sft', 'modelpool=mini8', 'taskpool=mini8')
    assert refused.status == 2 and 'expected texts of `digits` to learn from' in refused.line
