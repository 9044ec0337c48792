"""Batches of experiments from the command line: killed and started again, a failure in the middle, refusals,
pages of the book."""
import json, os, signal, time
import pytest
import warm

CELLS = [
    ('markdown', {}, '# Slow squares\n\n> A number, squared after a nap.'),
    ('code', {'tags': ['parameters']}, "x = 1\nnap = 0\nout_json = ''"),
    (
        'code',
        {},
        (
            'import json, pathlib, random, time\ntime.sleep(nap)\nassert x < 9\ny = x * x\nprint(y, '
            'pathlib.Path.cwd())'
        ),
    ),
    (
        'code',
        {},
        (
            "pathlib.Path('order.txt').open('a').write(f'{x}\\n')\nif out_json: "
            "pathlib.Path(out_json).write_text(json.dumps({'average': {'accuracy': y / 100}}))"
        ),
    ),
]


@pytest.fixture
def squares(tmp_path):
    "An experiment of one number, in the folder one works in."
    cells = [
        dict(cell_type=kind, id=f'c{i}', metadata=meta, source=text)
        | ({} if kind == 'markdown' else dict(outputs=[], execution_count=None))
        for i, (kind, meta, text) in enumerate(CELLS)
    ]
    (tmp_path / 'squares.ipynb').write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')},
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )
    return tmp_path


def copies(folder): return {f.name: f.read_bytes() for f in folder.rglob('_runs/*/x=*.ipynb')}


def whole(data):
    "Whether a copy says of itself that it is finished."
    try: return json.loads(data)['metadata']['fusionbook']['state'] == 'finished'
    except ValueError: return False


def test_killed_batch_goes_on(squares, cli):
    words = ['experiment', 'squares.ipynb', '--grid', 'x=2,3,4', '-p', 'nap', '1.5']
    process = warm.Started(*words, cwd=squares, apart=True)
    order, end = squares/'order.txt', time.monotonic() + 120
    while time.monotonic() < end and not any(whole(c) for c in copies(squares).values()): time.sleep(.1)
    time.sleep(.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {n: c for n, c in copies(squares).items() if whole(c)}
    assert 1 <= len(before) < 3 and 'waiting' in next(squares.rglob('summary.ipynb')).read_text()
    done = cli(*words)
    assert done.status == 0, done.err
    after = copies(squares)
    assert (
        len(after) == 3 and all(map(whole, after.values())) and all(after[n] == c for n, c in before.items())
    )
    assert [json.loads(f.read_text())['average']['accuracy'] for f in sorted(squares.rglob('x=*.json'))] == [
        0.04,
        0.09,
        0.16,
    ]
    assert order.read_text().split()[:1] == ['2'] and f'{len(before)} kept' in done.out
    page = next(squares.rglob('summary.ipynb'))
    assert (
        f'summary  {page.relative_to(squares)}' in done.out
        and '|4|[finished](x%3D4.ipynb)|' in page.read_text()
    )


def test_a_failure_stops_only_itself(squares, cli):
    done = cli('experiment', 'squares.ipynb', '--grid', 'x=9,2')
    assert (
        done.status == 2 and 'expected 2 runs to finish, got 1 that failed: x=9 (AssertionError' in done.line
    )
    assert (
        'Slow squares: x = 2' in next(squares.rglob('x=2.ipynb')).read_text()
        and 'An Exception was encountered' in next(squares.rglob('x=9.ipynb')).read_text()
    )


LAST = "import atexit, os\natexit.register(lambda: os.write(2, b'last words\\n'))"
DEATH = "import os\nos.abort()"


def test_words_of_a_kernel_are_not_ours(squares, cli):
    page = json.loads((squares/'squares.ipynb').read_text())
    def told(text):
        page['cells'][2]['source'] = f'import json, pathlib\n{text}\ny = 1'
        (squares/'squares.ipynb').write_text(json.dumps(page))
        return cli('experiment', 'squares.ipynb')
    done = told(LAST)
    assert done.status == 0 and done.err == ''
    said = told(DEATH).line
    assert 'expected `squares` to run, got' in said and 'died' in said, said


def test_full_disk_in_a_batch(squares, here, monkeypatch):
    from fusionbook.bench import experiment as module
    real, words = module._stamp, ['experiment', 'squares.ipynb', '--grid', 'x=2,3']
    def stamp(copy, **note):
        if copy.stem == 'x=3': raise OSError(28, 'No space left on device')
        real(copy, **note)
    monkeypatch.setattr(module, '_stamp', stamp)
    done = here(*words)
    assert done.status == 2 and 'No space left on device' in done.line
    first = next(squares.rglob('x=2.ipynb')).read_bytes()
    assert whole(first) and not whole(next(squares.rglob('x=3.ipynb')).read_bytes())
    monkeypatch.setattr(module, '_stamp', real)
    again = here(*words)
    assert again.status == 0 and '1 finished' in again.out and '1 kept' in again.out
    assert next(squares.rglob('x=2.ipynb')).read_bytes() == first and whole(
        next(squares.rglob('x=3.ipynb')).read_bytes()
    )


@pytest.mark.parametrize(
    'words,told',
    [
        (['squares.ipynb', '--grid', 'y=1,2'], 'expected a parameter of `squares`, got `y`'),
        (['squares.ipynb', '--grid', 'x='], 'got `x=`'),
        (['square', '--grid', 'x=1'], 'expected an experiment, got `square`'),
        (['squares.ipynb', '--grid', 'x=1', '-p', 'x', '2'], 'got both'),
        (['compare_method'], 'did you mean `compare_methods`?'),
        (['squares.ipynb', '--grid', 'x=[1'], 'expected a value in YAML'),
    ],
)
def test_refused_before_the_start(squares, here, words, told):
    done = here('experiment', *words)
    assert done.status == 2 and told in done.line
    assert not (squares/'_runs').exists()


def test_pages_of_the_book(squares, here, tmp_path, monkeypatch):
    from fusionbook.bench import batch, experiment
    (reports := tmp_path/'reports').mkdir()
    monkeypatch.setattr(batch, 'REPORTS', reports)
    for f in experiment.publish, batch.publish_batch:
        monkeypatch.setattr(
            f,
            '__defaults__',
            tuple(
                reports if d == experiment.EXPERIMENTS.parent / '95_reports' else d for d in f.__defaults__
            ),
        )
    assert here('experiment', 'squares.ipynb', '-p', 'x', 3).status == 0 and not list(reports.iterdir())
    assert here('experiment', 'squares.ipynb', '-p', 'x', 3, '--report').status == 0
    text = (reports/'squares_x=3.ipynb').read_text()
    assert '# Slow squares: x = 3' in text and '9 ' in text and str(tmp_path) not in text
