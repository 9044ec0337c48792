"""Networks of another architecture: built by a method, saved with a recipe, opened by a process that knows
nothing of the run."""
import json, shutil, subprocess, sys

import pytest
import torch
from conftest import run_program

import fusionbook
from fusionbook.core.checkpoint import Checkpoint
from fusionbook.core.errors import FusionError
from fusionbook.method.ensemble.ensemble import Ensemble, SimpleEnsemble
from fusionbook.modelpool.base import BaseModelPool, fill
from fusionbook.models.clip import vision_model, vision_state
from fusionbook.models.mlp import MLP

MEMBERS = 'digits', 'letters', 'shapes'
RUN = f"""
method: {{name: ensemble/simple_ensemble}}
modelpool:
  _target_: fusionbook.modelpool.CLIPVisionModelPool
  models: {{_pretrained_: mini8/pretrained, {', '.join(f'{n}: mini8/{n}' for n in MEMBERS)}}}
merged_model_save_path: out
"""
OPEN = """
import sys, fusionbook
assert not {'torch', 'transformers'} & {*sys.modules}
net = fusionbook.open_model(sys.argv[1])
import torch
with torch.inference_mode(): torch.save(net(torch.load(sys.argv[2])).pooler_output, sys.argv[3])
"""


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "The folder of an ensemble that the program saved."
    cwd = tmp_path_factory.mktemp('ensemble')
    (cwd/'run.yaml').write_text(RUN)
    done = run_program('run.yaml', cwd=cwd)
    assert done.status == 0, done.err
    return cwd/'out'


def test_saved_by_the_program_opened_elsewhere(saved, tmp_path):
    "A fresh process gives the answers of the members, to the byte."
    assert sorted(f.name for f in saved.iterdir()) == ['README.md', 'fusionbook.json', 'model.safetensors']
    told = json.loads((saved/'fusionbook.json').read_text())
    assert [m['_target_'] for m in told['network']['members']] == ['transformers.CLIPVisionModel'] * 3
    assert told['method'] == 'ensemble/simple_ensemble' and told['hyperparameters']['quantity'] == 'features'
    assert {*MEMBERS} < {*told['sources']} and told['versions']['torch'] == torch.__version__
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path/'x.pt')
    subprocess.run(
        [sys.executable, '-c', OPEN, saved, tmp_path / 'x.pt', tmp_path / 'y.pt'], check=True, timeout=60
    )
    towers = [fill(vision_model(f'mini8/{n}'), vision_state(f'mini8/{n}')) for n in MEMBERS]
    with torch.inference_mode(): want = Ensemble(towers)(x).pooler_output
    assert torch.load(tmp_path/'y.pt').equal(want)


def test_switches_over_text_encoders_are_saved(tmp_path):
    "An encoder is made without the layer that pools, which no configuration says: the recipe does."
    from fusionbook.method import EMRMerging
    from fusionbook.modelpool import TextEncoderPool
    from fusionbook.models.text import tiny_text

    models = {
        n: str(tiny_text(tmp_path / n, ['one two three'], seed=i))
        for i, n in enumerate(('_pretrained_', 'a', 'b'))
    }
    pool, words = TextEncoderPool(models), torch.tensor([[1, 2, 3]])
    made = EMRMerging().run(pool)
    pool.save_model(made, tmp_path/'out', built=True)
    again = fusionbook.open_model(tmp_path/'out')
    for task in 'ab':
        for net in (made, again): net.set_task(task)
        with torch.inference_mode():
            assert made(words).last_hidden_state.equal(again(words).last_hidden_state)
    assert json.loads((tmp_path / 'out' / 'fusionbook.json').read_text())['network']['network'][
        'switches'
    ] == {'add_pooling_layer': False}


def test_a_member_twice_is_stored_once(tmp_path):
    net = MLP([4, 3, 2])
    twice = Ensemble([net, net, MLP([4, 2])])
    BaseModelPool([net]).save_model(twice, tmp_path/'m', built=True)
    again, x = fusionbook.open_model(tmp_path/'m'), torch.randn(3, 4)
    assert (tmp_path/'m'/'model.safetensors').stat().st_size < 4 * (23 + 10) + 1500
    assert again(x).equal(twice(x)) and again.members[0].fc1.weight is again.members[1].fc1.weight
    assert sum(p.numel() for p in again.parameters()) == 23 + 10


def member(told, **changes): told['network']['members'][0] |= changes

def config(told, **changes): told['network']['members'][1]['config'] |= changes

BAD = {
    'a member less': (
        lambda t: t['network'].update(members=t['network']['members'][:2], weights=None),
        'add `members.2.',
    ),
    'a member more': (
        lambda t: t['network'].update(members=t['network']['members'] * 2, weights=None),
        'lack `members.3.',
    ),
    'no members': (lambda t: t['network'].update(members=[]), 'at least one network'),
    'members that are none': (
        lambda t: t['network'].update(members=['mini8/digits']),
        'expected networks, got str',
    ),
    'other shapes': (lambda t: config(t, hidden_size=96), 'members.1.'),
    'a width that divides nothing': (lambda t: config(t, num_attention_heads=7), 'describes a network'),
    'all memory': (lambda t: config(t, hidden_size=2**20, intermediate_size=2**24), 'members.1.'),
    'a million layers': (lambda t: config(t, num_hidden_layers=10**6), 'at most 10,000 layers'),
    'code beside it': (lambda t: config(t, auto_map={'AutoModel': 'evil.Model'}), '`auto_map`'),
    'a kernel of the hub': (lambda t: member(t, attention='me/kernel'), 'one of eager'),
    'remote code': (lambda t: config(t, trust_remote_code=True), 'trust_remote_code'),
    'a program': (lambda t: member(t, _target_='os.system'), 'expected a class of fusionbook'),
    'a loader': (lambda t: member(t, _target_='transformers.CLIPVisionModel.from_pretrained'), 'network'),
    'no network': (lambda t: member(t, _target_='fusionbook.method.SimpleEnsemble'), 'class of a network'),
    'an unknown rule': (lambda t: t['network'].update(rule='median'), 'median'),
    'a limit in words': (lambda t: t['network'].update(limit_mb='much'), 'arguments of `Ensemble`'),
    'another version': (lambda t: t.update(format=9), 'another version of fusionbook'),
    'no version': (lambda t: t.pop('format'), 'without `format`'),
    'no hash': (lambda t: t.pop('tensors'), 'expected `tensors`'),
    'another hash': (lambda t: t.update(tensors='f' * 16), 'got others'),
    'other weights': (lambda t: t['network'].update(weights=[1, 2]), 'expected 3 weights'),
}

@pytest.mark.parametrize('kind', BAD)
def test_a_recipe_that_says_something_else(saved, tmp_path, kind):
    "One line, that names the file; no class is made that the list does not know."
    change, says = BAD[kind]
    shutil.copytree(saved, tmp_path/'m')
    told = json.loads((tmp_path/'m'/'fusionbook.json').read_text())
    change(told)
    (tmp_path/'m'/'fusionbook.json').write_text(json.dumps(told))
    with pytest.raises(FusionError) as e: fusionbook.open_model(tmp_path/'m')
    assert says in str(e.value) and '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_files_that_are_not_what_they_were(saved, tmp_path):
    "No recipe, no tensors, one bit of another value."
    def tried(spoil, says):
        folder = shutil.copytree(saved, tmp_path/says.replace(' ', '-'))
        spoil(folder)
        with pytest.raises(FusionError, match=says) as e: fusionbook.open_model(folder)
        assert '\n' not in str(e.value)
    def flip(folder):
        data = bytearray((folder/'model.safetensors').read_bytes())
        data[-100] ^= 1
        (folder/'model.safetensors').write_bytes(data)
    tried(lambda folder: (folder/'fusionbook.json').unlink(), 'a folder without them')
    tried(lambda folder: (folder/'model.safetensors').unlink(), 'without .*safetensors')
    tried(flip, 'got others')


def test_what_no_recipe_describes_is_refused_before_it_is_written(tmp_path):
    "A member of the user's own class: said, and nothing is left behind."
    class Own(torch.nn.Linear): pass
    with pytest.raises(FusionError, match='got Own'):
        pool = BaseModelPool([Own(2, 1), Own(2, 1)])
        pool.save_model(SimpleEnsemble().run(pool), tmp_path/'m', built=True)
    assert not list(tmp_path.iterdir())


def test_a_merge_of_mini8_opens_too(here):
    "A merged tower is a folder of `transformers`; the numbers are those of the file."
    done = here('method=simple_average', 'taskpool=dummy', 'merged_model_save_path=out', 'references=false')
    assert done.status == 0, done.err
    net, sd = fusionbook.open_model('out'), Checkpoint('out')
    assert type(net).__name__ == 'CLIPVisionModel' and not net.training
    assert all(
        t.equal(vision_state('out')[k].float())
        for k, t in ((k.removeprefix('vision_model.'), t) for k, t in net.state_dict().items())
    )
    assert len(sd) == len(net.state_dict())
