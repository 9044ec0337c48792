"""Sweeps, comparisons and seeds as a user meets them: grids, a choice on validation data, kills, refusals."""
import json, shutil, time
from pathlib import Path

import pytest

import warm
from conftest import EXPERTS

SCALES = 'method.scaling_factor=0:0.6:0.2'
POOL = '''# Images that nobody is tested on.
_target_: fusionbook.taskpool.CLIPVisionModelTaskPool
_recursive_: false
clip_model: openai/clip-vit-base-patch32
dataloader_kwargs: {batch_size: 128, num_workers: 0}
test_datasets:
'''


@pytest.fixture
def mine(here, world):
    "A folder of configurations with a validation pool: the training images."
    entry = '  {task}: {{_target_: datasets.load_dataset, _args_: [{task}], split: train}}\n'
    (Path('mine')/'taskpool').mkdir(parents=True)
    Path('mine/taskpool/ours_validation.yaml').write_text(
        POOL + ''.join(entry.format(task=t) for t in EXPERTS)
    )
    return ['--config-dir', 'mine', 'validation=ours_validation']


def scores(folder):
    "What a sweep found, without its times."
    return [
        {k: v for k, v in p.items() if k != 'seconds'}
        for p in json.loads((folder / 'sweep.json').read_text())['points']
    ]


@pytest.fixture
def sweep(here, two, mine):
    def call(*args):
        "What a test names itself is not named twice."
        own = {a.partition('=')[0] for a in args}
        return here('sweep', *(w for w in (*two, *mine) if w.partition('=')[0] not in own), *args)
    return call


def test_sweep_chooses_on_validation_and_reports_on_test(sweep, here, two):
    done = sweep(SCALES)
    assert done.status == 0, done.err
    facts, report = json.loads((done.folder/'sweep.json').read_text()), done.report
    points = facts['points']
    assert [p['point']['method.scaling_factor'] for p in points] == ['0.0', '0.2', '0.4', '0.6']
    best = max(range(4), key=lambda i: (points[i]['accuracy'], -i))
    assert (
        facts['chosen'] == points[best]['point']
        and facts['chosen_on'] == report['sweep']['chosen_on'] == 'validation'
    )
    assert report['config']['method']['scaling_factor'] == float(facts['chosen']['method.scaling_factor'])
    plain = here(*two, f'method.scaling_factor={facts["chosen"]["method.scaling_factor"]}').report
    assert report['rows'] == plain['rows'] and report['hashes'] == plain['hashes']
    assert (
        report['hashes']['data'] != points[0]['hashes']['data']
        and report['hashes']['models'] == points[0]['hashes']['models']
    )
    assert (done.folder / 'sweep.png').read_bytes().startswith(b'\x89PNG') and sorted(
        f.name for f in (done.folder / 'points').iterdir()
    ) == [f'000{i}.json' for i in range(4)]
    for word in (
        'chosen   method.scaling_factor=',
        'on ours_validation',
        'report   _runs/sweep_',
        'curve    _runs/sweep_',
    ):
        assert word in done.out


def test_sweep_over_groups_and_choices(sweep):
    done = sweep(
        'method=task_arithmetic,ties_merging',
        SCALES.replace('0.6', '0.2'),
        'taskpool.dataloader_kwargs.batch_size=8,16',
        'references=false',
    )
    assert done.status == 0, done.err
    points = json.loads((done.folder/'sweep.json').read_text())['points']
    assert (
        len(points) == 8
        and [p['point']['method'] for p in points] == ['task_arithmetic'] * 4 + ['ties_merging'] * 4
    )
    # the batch changes nothing
    for a, b in zip(points[::2], points[1::2], strict=True): assert a['accuracy'] == b['accuracy']
    assert points[0]['accuracy'] == points[4]['accuracy'] # at scale 0 both are the base


def test_a_choice_on_test_is_marked(here, two):
    done = here('sweep', *two, SCALES, 'validation=test')
    assert done.status == 0, done.err
    assert done.report['sweep']['chosen_on'] == 'test' and 'chosen on the test data' in done.out


def test_a_choice_on_test_under_another_name_is_refused(here, two, mine):
    file = Path('mine/taskpool/ours_validation.yaml')
    file.write_text(file.read_text().replace('split: train', 'split: test'))
    refused = here('sweep', *two, *mine, SCALES)
    assert (
        refused.status == 2
        and 'of the 20 test examples of' in refused.line
        and 'in `ours_validation`' in refused.line
    )
    assert not list(Path('_runs').glob('sweep_*/points'))
    asked = here('sweep', *two, *mine, SCALES, 'allow_overlap=true')
    assert asked.status == 0, asked.err
    assert asked.report['sweep']['chosen_on'] == 'validation, partly test' and asked.report['sweep'][
        'meets'
    ] == {'svhn': 20, 'mnist': 20}
    assert (
        'chosen on validation, partly test' in asked.out
        and 'test examples among those to choose on: 20 of svhn, 20 of mnist' in asked.out
    )


def test_models_and_data_are_opened_once(sweep, monkeypatch):
    from fusionbook.bench import sweep as module
    built, kinds = module.build_part, []
    monkeypatch.setattr(module, 'build_part', lambda cfg, kind: kinds.append(kind) or built(cfg, kind))
    assert sweep(SCALES).status == 0
    # the test data, compared with those to choose on, and these
    assert (kinds.count('modelpool'), kinds.count('taskpool')) == (1, 2)


def test_a_killed_sweep_goes_on_with_the_same_numbers(two, mine, tmp_path, sweep):
    whole = sweep('method.scaling_factor=0:1:0.05')
    assert whole.status == 0, whole.err
    want, report = scores(whole.folder), whole.report
    shutil.rmtree(whole.folder)
    words = ['sweep', *two, *mine, 'method.scaling_factor=0:1:0.05']
    child = warm.Started(*words, cwd=tmp_path)
    there, end = [], time.monotonic() + 150
    while len(there) < 3 and child.poll() is None and time.monotonic() < end:
        time.sleep(.005)
        there = sorted((whole.folder/'points').glob('[0-9]*.json'))
    child.kill(); child.wait()
    there = sorted((whole.folder/'points').glob('[0-9]*.json'))
    assert 3 <= len(there) < 21 and not (whole.folder/'sweep.json').exists()
    for file in there: json.loads(file.read_text()) # none is half written
    again = sweep('method.scaling_factor=0:1:0.05')
    assert f'resumed  {len(there)} of 21 points were already there' in again.out
    assert (
        again.folder == whole.folder
        and scores(again.folder) == want
        and again.report['rows'] == report['rows']
    )


def test_other_models_under_the_same_name_are_measured_again(sweep, world, hub, two):
    done = sweep(SCALES)
    kept, file = scores(done.folder), world/'svhn'/'model.safetensors'
    file = file if file.exists() else next((world/'svhn').glob('*.safetensors'))
    old = file.read_bytes()
    try:
        shutil.copy(next((world/'mnist').glob('*.safetensors')), file)
        again = sweep(SCALES)
    finally:
        file.write_bytes(old)
    assert 'resumed' not in again.out and scores(again.folder) != kept


@pytest.mark.parametrize(
    'words, told',
    [
        ([], 'expected a grid'),
        (['method.scaling_factor=1:0:.1'], 'which is empty'),
        (['method.scaling_factor=0:1:0'], 'which is empty'),
        (['method.scaling_factor=0:1'], 'start:stop:step'),
        (['method.scaling_factor=0.1,,0.2'], 'between commas'),
        (['method.scaling_factor=0:2:0.001'], 'at most 1,000 points'),
        (['method.scaling_facto=0:1:0.1'], 'did you mean `scaling_factor`'),
        (['sede=0,1'], '`seed`'),
        (['method=task_arithmetic,ties_mergin'], 'did you mean `ties_merging`'),
        ([SCALES, 'validation=mini8_valid'], 'did you mean `mini8_validation`'),
        (['method=ties_merging', 'method.merge_func=sum,meen'], 'expected `merge_func` as one of'),
        (['-m', SCALES], 'expected a sweep without `-m`'),
    ],
)
def test_sweeps_that_are_refused_before_any_work(sweep, monkeypatch, words, told):
    monkeypatch.setattr('fusionbook.bench.sweep._walk', lambda *args: pytest.fail('work was begun'))
    done = sweep(*words)
    assert done.status == 2 and told in done.line and not Path('_runs').exists()


def test_a_sweep_without_validation_data_says_what_to_do(here, two):
    line = here('sweep', *two, SCALES).line
    assert 'no `clip-vit-base-patch32_svhn_and_mnist_validation`' in line and 'validation=test' in line


def test_full_disk_in_a_sweep(sweep, monkeypatch):
    from fusionbook.bench import sweep as module
    real, seen = module.write_record, []
    def write(file, *args, **kwargs):
        seen.append(file)
        if len(seen) == 3: raise OSError(28, 'No space left on device')
        return real(file, *args, **kwargs)
    monkeypatch.setattr(module, 'write_record', write)
    done = sweep(SCALES)
    assert done.status == 2 and 'No space left on device' in done.line
    monkeypatch.setattr(module, 'write_record', real)
    again = sweep(SCALES)
    assert again.status == 0 and 'resumed  2 of 4 points' in again.out


# ---- answers and comparisons

def test_answers_lie_beside_every_report(here, two):
    from fusionbook.bench.compare import with_answers
    done = here(*two, 'save_report=out/mine.json')
    assert done.status == 0, done.err
    for file in (done.folder/'report.json', Path('out/mine.json')):
        report = with_answers(file)
        assert len(report.answers) == 6 and all(len(a['labels']) == 20 for a in report.answers)
    assert (done.folder/'predictions.parquet').exists() and Path('out/mine.predictions.parquet').exists()


def test_compare(here, two):
    a, b = (here(*two, f'method.scaling_factor={s}').folder for s in (.3, 1))
    done = here('compare', a/'report.json', b/'report.json', '-o', 'out')
    assert done.status == 0, done.err
    found, reports = (
        json.loads(Path('out/comparison.json').read_text()),
        [json.loads((f / 'report.json').read_text()) for f in (a, b)],
    )
    (pair,) = found['pairs']
    assert (pair['first'], pair['second']) == (
        'task_arithmetic scaling_factor=0.3',
        'task_arithmetic scaling_factor=1',
    )
    for task in ('svhn', 'mnist', 'average'):
        d = pair['differences'][task]
        assert (
            d['difference']
            == pytest.approx(reports[1][task]['accuracy'] - reports[0][task]['accuracy'], abs=1e-12)
            and d['low'] <= d['difference'] <= d['high']
        )
    assert (
        Path('out/comparison.png').read_bytes().startswith(b'\x89PNG')
        and '|average|' in Path('out/comparison.md').read_text()
    )
    assert 'mean rank' in done.out and 'table    out/comparison.md' in done.out
    same = here('compare', a, a, '-o', 'same')
    assert same.status == 0 and all(
        d['low'] == d['high'] == 0
        for d in json.loads(Path('same/comparison.json').read_text())['pairs'][0]['differences'].values()
    )


def test_comparison_at_80_columns_loses_nothing(here, two, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    runs = [here(*two, f'method.scaling_factor={s}').folder for s in (.3, .6, 1)]
    out = here('compare', *runs, '-o', 'out').out
    found = json.loads(Path('out/comparison.json').read_text())
    lines = out.splitlines()
    assert (
        max(len(l) for l in lines[: next(i for i, l in enumerate(lines) if l.startswith('table'))]) <= 80
        and '…' not in out
    )
    for values in found['values'].values():
        assert all(f'{100 * a:.1f}' in out for a in values.values())
    for word in ('svhn', 'mnist', 'average', 'mean rank', 'read', 'tuned on', 'no data', '[95 %]'):
        assert word in out and word in Path('out/comparison.md').read_text()
    for p in found['pairs'][:2]:
        assert all(f'{100 * d["difference"]:+.1f}' in out for d in p['differences'].values())


def test_comparisons_that_are_refused(here, two):
    a, b = (here(*two, f'method.scaling_factor={s}').folder for s in (.3, 1))
    other = here(*two, 'taskpool.test_datasets.svhn.split=train').folder
    assert 'with other examples of `svhn`' in here('compare', a, other).line
    assert (
        'got 1' in here('compare', a).line and 'does not exist' in here('compare', a, 'no/report.json').line
    )
    shutil.copy(b/'predictions.parquet', a/'predictions.parquet')
    assert 'of another run' in here('compare', a, b).line
    (a/'predictions.parquet').unlink()
    assert 'got no file' in here('compare', b, a).line
    assert not list(Path('_runs').glob('*comparison*'))


# ---- seeds

def test_seeds(here, two, monkeypatch):
    once = here(*two, 'seeds=[0,1,2]')
    assert once.status == 0, once.err
    assert (
        once.report['seeds'] == {'values': [0, 1, 2], 'note': 'task_arithmetic has no `seed`'}
        and 'run once' in once.out
    )
    assert len([r for r in once.report['rows'] if r['role'] == 'merged' and r['metric'] == 'accuracy']) == 2
    Path('shaken.py').write_text('''from dataclasses import dataclass
import torch
from fusionbook.method.task_vector.task_arithmetic import TaskArithmetic
@dataclass
class Shaken(TaskArithmetic):
    "Task arithmetic with noise."
    seed: int = 0
    def merge(self, pool):
        sd, draw = super().merge(pool), torch.Generator().manual_seed(self.seed)
        return {k: sd[k] + (.2 * torch.randn(sd[k].shape, generator=draw) if sd[k].is_floating_point() else 0) for k in sd}
''')
    monkeypatch.syspath_prepend('.')
    toy = ['method._target_=shaken.Shaken', 'allow_target=[shaken.Shaken]']
    done = here(*two, *toy, 'seeds=[0,1,2]', 'merged_model_save_path={log_dir}/model')
    assert done.status == 0, done.err
    report = done.report
    merged = [r for r in report['rows'] if r['role'] == 'merged' and r['metric'] == 'accuracy']
    assert [r['seed'] for r in merged] == [0, 0, 1, 1, 2, 2]
    assert [r['model'] for r in merged] == [f'merged, seed {k}' for k in (0, 0, 1, 1, 2, 2)]
    losses = [
        r['value']
        for r in report['rows']
        if (r['role'], r['task'], r['metric']) == ('merged', 'svhn', 'loss')
    ]
    assert len(set(losses)) == 3 and report['svhn']['loss'] == pytest.approx(sum(losses) / 3)
    spread = report['seeds']['accuracy']['average']
    assert spread['min'] <= spread['mean'] <= spread['max'] and spread['mean'] == pytest.approx(
        report['average']['accuracy']
    )
    assert sorted(f.name for f in done.folder.glob('model*')) == [f'model_seed_{k}' for k in range(3)]
    alone = here(*two, *toy, '+method.seed=1', 'references=false').report
    assert [r['value'] for r in alone['rows'] if r['metric'] == 'accuracy'] == [
        r['value'] for r in merged[2:4]
    ]
    assert 'expected `seeds` as a list' in here(*two, 'seeds=3').line
    mixed = here('compare', done.folder, once.folder, '-o', 'out')
    assert mixed.status == 0, mixed.err
    assert 'p' not in json.loads(Path('out/comparison.json').read_text())['pairs'][0]['differences']['svhn']


# ---- reports of before

def test_an_old_report_opens():
    """A file from before metrics were declared: a column for accuracy, one for loss. Its table, average and
    remarks are those of that time."""
    from fusionbook.bench.report import comparison, read_report
    report = read_report(Path(__file__).with_name('old_report.json'))
    assert report.primary.name == 'accuracy' and list(report.metrics) == ['accuracy', 'loss']
    assert report.table()[1] == [
        ['digits', '1,000', '334', '52.8', '92.5', '60.7 [55.4, 65.8]', '65.6'],
        ['photographs', '1,000', '2', '44.0', '75.9', '46.8 [no interval]', '61.7'],
        ['average', '', '', '48.4', '84.2', '53.8 [50.7, 56.8]', '63.6']]
    assert report['average'] == {
        'accuracy': 0.5375,
        'loss': 1.1414681940602605,
        'normalised_accuracy': 0.6364085033650251,
        'low': 0.5070191107981129,
        'high': 0.5677031412889237,
    }
    assert report['digits'] == {'accuracy': 0.607, 'loss': 1.110174374340102}
    assert report.remarks() == ' (photographs: 2 sources, which the interval of the average takes as given)'
    assert comparison({'a': report})[1][1] == [
        'a',
        '60.7 −5.3 +5.1',
        '46.8 [no interval]',
        '53.8 ±3.0',
        '63.6',
        'no data',
        'nothing',
    ]
    assert [r['metric'] for r in report['rows'][:2]] == ['accuracy', 'loss'] and len(report['rows']) == 12
