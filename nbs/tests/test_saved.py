"""`fusionbook FOLDER taskpool=…` as a user meets it: what a run saved is opened and measured, with the
numbers of that run; what cannot be measured is refused in one line."""
import json
import shutil

import pytest
import torch

from conftest import mirror

POOL = 'clip-vit-base-patch32_svhn_and_mnist'
MADE = {
    'merged': ['method=task_arithmetic'],
    'ensemble': ['method=ensemble/simple_ensemble'],
    'mixture': ['method=smile_upscaling/smile_upscaling', 'method.k=2', 'method.gate_k=1'],
}


@pytest.fixture(scope='module')
def saved(hub, tmp_path_factory):
    "Kind -> folder of a saved model, and the report of the run that made it."
    from fusionbook.bench.cli import main
    found = {}
    for kind, words in MADE.items():
        room = tmp_path_factory.mktemp(kind)
        more = [
            f'merged_model_save_path={room}/model',
            f'log_dir={room}/run',
            'references=false',
            'print_config=false',
        ]
        assert main([*words, f'modelpool={POOL}', f'taskpool={POOL}', mirror(hub), *more]) == 0
        found[kind] = room/'model', json.loads((room/'run'/'report.json').read_text())
    return found


def numbers(report):
    return [(r['task'], r['metric'], r['value'], r['n']) for r in report['rows'] if r['role'] == 'merged']


@pytest.mark.parametrize('kind', MADE)
def test_the_numbers_of_the_run_that_made_it(kind, saved, hub, here):
    folder, first = saved[kind]
    done = here(folder, f'taskpool={POOL}', mirror(hub))
    assert done.status == 0, done.err
    assert f'opened   {folder}: ' in done.out and first['method'] in done.out.splitlines()[0]
    assert numbers(done.report) == numbers(first) and numbers(first)
    assert done.report['opened']['method'] == first['method']
    assert done.report['model_info'] == first['model_info']
    assert sorted(f.name for f in done.folder.iterdir()) == [
        'config.yaml',
        'predictions.parquet',
        'report.json',
        'report.png',
        'run.log',
    ]
    again = here(done.folder/'config.yaml', 'print_config=false') # the run that the folder describes
    assert again.status == 0 and numbers(again.report) == numbers(first), again.err


def test_in_a_process_of_its_own(saved, hub, cli):
    folder, first = saved['mixture']
    done = cli(folder, f'taskpool={POOL}', mirror(hub), 'print_config=false')
    assert done.status == 0 and numbers(done.report) == numbers(first), done.err
    assert not done.err


def test_without_tasks_its_size_is_told(saved, here):
    done = here(saved['mixture'][0])
    assert (
        done.status == 0
        and done.report['model_info']['active_params'] < done.report['model_info']['all_params']
    )


def broken(folder, to, change):
    shutil.copytree(folder, to)
    file = to/'fusionbook.json'
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return to


def other_class(told):
    return told | {'network': told['network'] | {'_target_': 'fusionbook.models.tower.NoSuch'}}


def test_refusals(saved, hub, here, tmp_path):
    mixture, merged = saved['mixture'][0], saved['merged'][0]
    unknown = shutil.copytree(merged, tmp_path/'unknown')
    settings = json.loads((unknown/'config.json').read_text()) | {'architectures': ['NoSuchModel']}
    (unknown/'config.json').write_text(json.dumps(settings))
    (tmp_path/'empty').mkdir()
    for words, says in [
        ([tmp_path / 'nowhere', f'taskpool={POOL}'], 'does not exist'),
        (['mini8/digit', 'taskpool=mini8'], 'did you mean `mini8/digits`?'),
        ([tmp_path / 'empty', f'taskpool={POOL}'], 'got a folder without them'),
        ([broken(mixture, tmp_path / 'class', other_class), f'taskpool={POOL}'], 'NoSuch'),
        (
            [broken(mixture, tmp_path / 'version', lambda t: t | {'format': 99}), f'taskpool={POOL}'],
            'another version',
        ),
        ([unknown, f'taskpool={POOL}'], 'NoSuchModel'),
        ([mixture, f'taskpool={POOL}x'], f'did you mean `{POOL}`'),
        ([mixture, 'taskpool=mini8'], 'expected'),
        ([mixture, f'modelpool={POOL}'], 'expected a saved model as it is'),
        ([mixture, 'method=ties_merging'], 'expected a saved model as it is'),
        ([mixture, mixture], 'expected a command, a file or key=value'),
        (['mini8/digits', 'method.k=3'], 'expected a saved model as it is'),
    ]:
        done = here(*words, mirror(hub))
        assert done.status == 2 and says in done.line, (words, done.line)
        assert not done.runs


def test_a_model_of_another_kind(saved, hub, here, tmp_path):
    from fusionbook.modelpool.base import BaseModelPool
    from fusionbook.models.mlp import MLP
    pool = BaseModelPool({'a': MLP([3, 2]).eval()})
    pool.save_model(pool.load_model('a'), tmp_path/'numbers', built=True)
    done = here(tmp_path/'numbers', f'taskpool={POOL}', mirror(hub))
    assert done.status == 2 and 'expected a model that CLIPVisionModelTaskPool can ask, got MLP' in done.line
    assert not done.runs


def test_nothing_of_a_file_runs(here, tmp_path):
    torch.save({'w': torch.ones(2)}, tmp_path/'model.pth')
    done = here(tmp_path/'model.pth', 'taskpool=mini8')
    assert done.status == 2 and done.line and not done.runs


def test_gates_and_features_are_kept(saved, hub, here, tmp_path):
    "FusionBench's keys: a file of safetensors for each task; a model without gates writes none."
    from fusionbook.core.checkpoint import Checkpoint

    words = [
        'taskpool.layer_wise_routing_weights_save_path=gates',
        'taskpool.layer_wise_routing_weights_max_num=3',
        'taskpool.layer_wise_feature_save_path=features',
    ]
    for kind in ('mixture', 'merged'):
        done = here(saved[kind][0], f'taskpool={POOL}', *words, mirror(hub))
        assert done.status == 0 and numbers(done.report) == numbers(saved[kind][1]), done.err
        if kind == 'mixture':
            gates = {f.name: dict(Checkpoint(f)) for f in sorted((tmp_path / 'gates').iterdir())}
    assert sorted(gates) == ['mnist.safetensors', 'svhn.safetensors']
    for rows in gates.values():
        assert len(rows) > 4 and all(
            g.shape == (3, 2) and torch.allclose(g.sum(1), torch.ones(3), atol=1e-5) for g in rows.values()
        )
    features = Checkpoint(tmp_path/'features'/'mnist.safetensors')
    assert len(features) == 2 and all(len(v) == done.report['rows'][-1]['n'] for v in features.values())
