"""`fusionbook analyse` as a user types it, analyses on texts and on a pretended device, and what cannot be
analysed."""
import csv, json, os, subprocess, sys
from pathlib import Path

import pytest

MINI = 'modelpool.models={_pretrained_: mini8/pretrained, digits: mini8/digits, shapes: mini8/shapes}'


@pytest.fixture
def typed(here): return lambda line, *more: here('analyse', *line.split(), *more)


def rows(file):
    with open(file, newline='') as f: return list(csv.reader(f))


def test_tables_and_pictures_lie_in_one_folder(typed):
    done = typed('task_vector_cos_similarity modelpool=mini8 --max_points_per_model 500')
    assert done.status == 0, done.err
    assert {f.name for f in done.folder.iterdir()} == {'cosine.csv', 'cosine.png', 'findings.json', 'run.log'}
    table = rows(done.folder/'cosine.csv')
    assert len(table) == 9 and float(table[1][1]) == pytest.approx(1)
    facts = json.loads((done.folder/'findings.json').read_text())
    assert facts['analysis'] == 'task_vector_cos_similarity' and len(facts['hashes']['models']) == 9


def test_a_landscape_with_a_merged_model_keeps_its_own_facts(typed):
    done = typed(
        (
            'landscape --kind line --models digits,ties_merging --methods ties_merging --points 3 '
            '--draws 5 taskpool.fast_dev_run=true'
        )
    )
    assert done.status == 0, done.err
    facts = json.loads((done.folder/'findings.json').read_text())
    assert (facts['kind'], facts['models'], facts['tasks']) == (
        'line',
        ['digits', 'ties_merging'],
        ['digits'],
    )
    assert facts['best'].keys() == facts['barriers'].keys() == {'accuracy', 'loss'}
    assert len(facts['hashes']['models']) == 9
    assert [r[0] for r in rows(done.folder/'line.csv')[1:]] == ['-0.25', '0.0', '0.5', '1.0', '1.25']


def test_names_of_fusion_bench(typed):
    assert typed('analysis/task_vector_violin_plot --max_points_per_model 50 --out here').status == 0
    assert Path('here/values.png').is_file()


@pytest.mark.parametrize('line, says', {
    '': 'expected `fusionbook analyse NAME`',
    'landscap': 'did you mean `landscape`',
    'similarity --ranks 3': 'did you mean `--rank`',
    'similarity rank=3': 'did you mean `--rank 3`',
    'similarity method=ties_merging': 'expected --methods',
    'similarity modelpool=mini88': 'did you mean `mini8`',
    'attribution': 'expected merged models',
    'attribution --methods tise_merging': 'did you mean',
    'attribution --methods ties_merging,slerp=3': 'expected a method, got `slerp=3`',
    'landscape taskpool=dummy': 'expected tasks',
    'landscape --kind plain': 'did you mean `plane`',
    'landscape --points 2': '`points` of at least 3, got 2',
    'landscape --kind line --models digits': 'expected 2 models for a landscape of kind `line`, got 1',
    'landscape --kind plane --models digits,digits,shapes': 'got `digits` 2 times',
    'mergeability --scales half': 'numbers between commas, got `half`',
    'routing --methods task_arithmetic taskpool.fast_dev_run=true': 'expected a network with routed layers',
}.items())
def test_mistakes_are_one_line(typed, line, says):
    done = typed(line)
    assert done.status == 2 and says in done.line, done.err


def test_an_analysis_is_no_method(here):
    for line in (
        'method=analysis/task_vector_violin_plot',
        'sweep method=analysis/task_vector_violin_plot method.x=1,2',
    ):
        assert 'fusionbook analyse' in here(*line.split()).line
    from fusionbook.core.errors import FusionError
    from fusionbook.core.legacy import translate

    with pytest.raises(FusionError, match='it is an analysis'):
        translate({'_target_': 'fusion_bench.method.TaskVectorViolinPlot'}, 'method')


def test_a_landscape_of_texts(tmp_path):
    "Encoders of texts, with frozen sentences as heads."
    from conftest import perturbed
    from fusionbook.analysis.landscape import LossLandscape
    from fusionbook.core.checkpoint import Checkpoint, save
    from fusionbook.modelpool.text import TextEncoderPool
    from fusionbook.models.text import tiny_text
    from fusionbook.taskpool.text import TextClassificationTaskPool
    words = ['good film', 'bad film', 'a good day', 'a bad day']
    base = tiny_text(tmp_path/'base', words)
    state = dict(Checkpoint(base))
    for seed, name in enumerate(('a', 'b')):
        folder = tiny_text(tmp_path/name, words)
        save(perturbed(state, seed, .02), folder, extras={'config.json': (base/'config.json').read_text()})
    from datasets import ClassLabel, Dataset

    rows = Dataset.from_dict(dict(text=words, label=[0, 1, 0, 1])).cast_column(
        'label', ClassLabel(names=['good', 'bad'])
    )
    pool = TextEncoderPool({'_pretrained_': str(base), 'a': str(tmp_path/'a'), 'b': str(tmp_path/'b')})
    tasks = TextClassificationTaskPool({'a': {'dataset': rows}, 'b': {'dataset': rows}}, str(base))
    found = LossLandscape(kind='line', points=3, draws=5).run(pool, tasks)
    at = found.tables['line'].column('t').index(1.)
    alone = tasks.predict(pool.load_model('b').eval(), 'a')['losses'].mean()
    assert found.tables['line'].column('loss a')[at] == pytest.approx(alone, rel=1e-6)


def test_the_same_numbers_on_a_device():
    """Nothing is forgotten on the other side; a program of its own, since the pretended device changes
    PyTorch."""
    code = '''
import pretend_device, json
from fusionbook.analysis.attribution import LayerAttribution
from fusionbook.analysis.landscape import LossLandscape
from fusionbook.analysis.similarity import TaskSimilarity
from fusionbook.analysis.spectra import SpectrumOfMerge
from fusionbook.analysis.mergeability import Mergeability
from fusionbook.data import mini8
from fusionbook.modelpool import CLIPVisionModelPool
from fusionbook.taskpool import CLIPVisionModelTaskPool
names = 'digits', 'shapes', 'clocks', 'colours'
pool = CLIPVisionModelPool({n: f'mini8/{n.strip("_")}' for n in ('_pretrained_', *names)}, val_datasets={t: mini8.load(t, 'validation') for t in names})
tasks = CLIPVisionModelTaskPool({t: {'dataset': mini8.load(t, 'test').select(slice(0, 12)), 'templates': [mini8.TEMPLATE]} for t in names}, 'mini8/clip')
one = {'one expert': pool.load_model('digits')}
def jobs(device):
    yield 'similarity', TaskSimilarity(points=20, examples=8, device=device), {}
    for kind in ('line', 'random', 'curve'):
        learned = dict(steps=2, data='validation') if kind == 'curve' else {}
        yield kind, LossLandscape(kind=kind, points=3, draws=5, device=device, **learned), {}
    yield 'attribution', LayerAttribution(tasks='shapes', draws=5, examples=8, device=device), one
    yield 'spectrum', SpectrumOfMerge(device=device), one
    yield 'mergeability', Mergeability(examples=8, draws=3, device=device), {}
def numbers(found): return [x for t in found.tables.values() for r in t.rows for x in r if isinstance(x, float) and x == x]
for (name, a, merged), (_, b, _) in zip(jobs('cpu'), jobs(pretend_device.NAME), strict=True):
    x, y = (numbers(ask.run(pool, tasks, merged)) for ask in (a, b))
    for m in merged.values(): m.cpu()
    print(json.dumps([name, len(x) == len(y) and max(abs(p - q) / (1 + abs(p)) for p, q in zip(x, y))]), flush=True)
'''
    where = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')]))
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        env=os.environ | {'PYTHONPATH': where},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-1500:]
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert len(found) == 7 and not {k: v for k, v in found.items() if v is False or not v < 1e-4}
