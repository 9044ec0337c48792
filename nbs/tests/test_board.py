"""The board: killed in the middle, resumed, the same bytes; a method that fails is a line; a method of one
notebook is everywhere."""
import json, os, re, shutil, subprocess, sys, time
from pathlib import Path

import pytest

import warm
from conftest import EXPERTS
from test_sweep_compare import mine  # a validation pool in a folder of configurations

POOL = 'clip-vit-base-patch32_svhn_and_mnist'
METHODS = 'simple_average', 'task_arithmetic', 'naive_fusion'


def timeless(file):
    "A digest without what a merge cost."
    board = json.loads(Path(file).read_text())
    return board | dict(
        methods=[
            {k: v for k, v in r.items() if k not in ('cpu_seconds', 'memory_mb')} for r in board['methods']
        ]
    )


@pytest.fixture
def words(two, mine):
    "A board of three methods on local models and images."
    return ['board', POOL, *METHODS, two[-1], *mine]


def test_a_killed_board_goes_on_with_the_same_bytes(here, words, tmp_path, monkeypatch):
    cache = tmp_path/'killed'
    child = warm.Started(*words, cwd=tmp_path, env=os.environ | dict(FUSIONBOOK_CACHE=str(cache)))

    def cells():
        return (
            [f for f in (cache / 'board').glob('[0-9a-f]*') if f.is_file()]
            if (cache / 'board').exists()
            else []
        )
    end = time.monotonic() + 150
    while len(cells()) < 5 and child.poll() is None and time.monotonic() < end: time.sleep(.005)
    child.kill(); child.wait()
    assert 5 <= len(cells()) < 18 and not Path(f'_runs/board_{POOL}/board.json').exists()

    monkeypatch.setenv('FUSIONBOOK_CACHE', str(cache))
    kept = {f: f.stat().st_mtime_ns for f in cells()}
    done = here(*words)
    assert done.status == 0, done.err
    file = Path(f'_runs/board_{POOL}/board.json')
    first = file.read_bytes()
    assert all(f.stat().st_mtime_ns == at for f, at in kept.items())  # none was computed again
    assert here(*words, '-o', 'again').status == 0 and Path('again/board.json').read_bytes() == first
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'whole'))
    assert here(*words, '-o', 'whole').status == 0 and timeless('whole/board.json') == timeless(file)

    board = json.loads(first)
    rows = {r['name']: r for r in board['methods']}
    assert (
        list(rows) == sorted(METHODS)
        and board['validation'] == 'ours_validation'
        and board['tasks'] == len(EXPERTS)
    )
    assert rows['task_arithmetic']['tried'] == 15 and rows['task_arithmetic']['tuned_on'] == 'validation'
    assert (
        rows['simple_average']['tried'] == 0
        and rows['simple_average']['score'] == rows['naive_fusion']['score']
    )
    assert (file.parent/'board.png').read_bytes().startswith(b'\x89PNG')
    for word in ('task_arithmetic', 'scaling_factor=', 'board    _runs/board_'): assert word in done.out


def test_a_method_that_fails_is_a_line(here, words, monkeypatch, tmp_path):
    from fusionbook.method import NaiveFusion
    def run(self, pool): raise ValueError('no such\ntensor')
    monkeypatch.setattr(NaiveFusion, 'run', run)
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'cache'))
    done = here(*words[:2], 'naive_fusion', 'dummy', *words[-4:])
    assert done.status == 0 and 'no score naive_fusion: ValueError: no such tensor' in done.out, done.err
    rows = {r['name']: r for r in json.loads(Path(f'_runs/board_{POOL}/board.json').read_text())['methods']}
    assert rows['naive_fusion']['error'] == 'ValueError: no such tensor' and 'score' in rows['dummy']


def test_an_interruption_writes_what_was_measured(here, words, monkeypatch, tmp_path):
    from fusionbook.method import NaiveFusion
    def run(self, pool): raise KeyboardInterrupt
    monkeypatch.setattr(NaiveFusion, 'run', run)
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'cache'))
    done = here(*words[:2], 'dummy', 'naive_fusion', *words[-4:])
    assert done.status == 130 and 'interrupted' in done.err
    assert [r['name'] for r in json.loads(Path(f'_runs/board_{POOL}/board.json').read_text())['methods']] == [
        'dummy'
    ]


@pytest.mark.parametrize(
    'more, told',
    [
        (['ties_mergin'], 'did you mean `ties_merging`'),
        (['--sedes', '3'], 'expected a flag of `fusionbook board`, got `--sedes`'),
        (['validation=nothing'], 'expected a taskpool as `validation`'),
        (['fast_dev_rum=true'], 'did you mean `fast_dev_run`'),
    ],
)
def test_boards_that_are_refused_before_any_work(here, words, monkeypatch, more, told):
    def begun(*args, **kwargs): pytest.fail('work was begun')
    monkeypatch.setattr('fusionbook.bench.board.measure_board', begun)
    done = here(*words, *more)
    assert done.status == 2 and told in done.line and not Path('_runs').exists()


@pytest.mark.parametrize(
    'more, old, told',
    [
        (['--seeds', '5'], {}, 'expected a board with the same `seeds` ([0, 1, 2]), got [0, 1, 2, 3, 4]'),
        (
            ['fast_dev_run=true'],
            {},
            "expected a board with the same `settings` (none), got {'fast_dev_run': 'true'}",
        ),
        ([], dict(settings={'fast_dev_run': 'true'}), 'expected a board with the same `settings`'),
        (['-o', 'taken'], {}, 'that can be written, got `taken/board.json`'),
    ],
)
def test_a_board_that_could_not_be_written_is_refused_before_any_work(
    here, words, monkeypatch, more, old, told
):
    "A folder that takes no file, and lines of an earlier board that were made another way."
    file = Path(f'_runs/board_{POOL}/board.json')
    file.parent.mkdir(parents=True)
    Path('taken').write_text('a file')
    file.write_text(
        json.dumps(
            dict(pool=POOL, tasks=len(EXPERTS), seeds=[0, 1, 2], methods=[dict(name='dummy', score=0.5)])
            | old
        )
    )
    monkeypatch.setattr(
        'fusionbook.bench.board.measure_board', lambda *args, **kwargs: pytest.fail('work was begun')
    )
    done = here(*words, *more)
    assert (
        done.status == 2 and told in done.line and [f.name for f in file.parent.iterdir()] == ['board.json']
    )


def test_lines_of_other_data_are_refused(here, words, monkeypatch, tmp_path):
    """One method, then another after the images have changed below the same names: their answers do not stand
    side by side."""
    from conftest import write_images
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'cache'))

    def call(method, images):
        return here(*words[:2], method, words[-4].replace(images_of(words), str(images)), *words[-3:])
    def images_of(words): return re.search(r'svhn: ([^,}]*svhn_images)', words[-4])[1]
    assert call('simple_average', images_of(words)).status == 0
    first = (file := Path(f'_runs/board_{POOL}/board.json')).read_bytes()
    done = call('dummy', write_images(tmp_path/'other', seed=9))
    assert (
        done.status == 2
        and 'expected a board of the same data, got `simple_average` with other data than `dummy`' in done.err
    )
    assert file.read_bytes() == first


def test_a_choice_on_test_data_is_refused(here, words):
    file = Path('mine/taskpool/ours_validation.yaml')
    file.write_text(file.read_text().replace('split: train', 'split: test'))
    assert 'of the 20 test examples of' in here(*words).line


LOOK = """
from pathlib import Path
from fusionbook.bench.board import make_board, measure_board, plan_board
from fusionbook.bench.board_rows import digest_text
from fusionbook.bench.cli import main
from fusionbook.bench.configured import restricted
from fusionbook.method.map import family_table
main(['list', 'methods'])
print(family_table('fusionbook.method.task_vector'))
plan = plan_board(['simple_average', 'magnitude_max', 'fast_dev_run=true'], seeds=[0])
plan.run, plan.choosing = (restricted(run, ['shapes', 'clocks']) for run in (plan.run, plan.choosing))
board = make_board(plan, list(measure_board(plan, folder=Path('cells'))), None, Path('cells'))
Path('nbs/board/mini8.json').write_text(digest_text(board))
"""


def test_one_notebook_is_a_method_everywhere(tmp_path):
    """What the tutorial shows, in a copy of the book: list, map, board, its page, table of the first page and
    README."""
    from fusionbook.method.board import board_places

    book, page = (
        board_places()[0].parents[1],
        board_places()[0].parent / '97_tutorials' / 'write_your_own_method.ipynb',
    )
    (cell,) = (
        s for c in json.loads(page.read_text())['cells'] if 'def in_a_copy' in (s := ''.join(c['source']))
    )
    names = dict(json=json, os=os, shutil=shutil, subprocess=subprocess, sys=sys, Path=Path)
    exec(cell, names)
    copy = tmp_path/'copy'
    run = names['in_a_copy'](book, copy)
    shutil.copy(book/'CONTRIBUTING.md', copy)
    said = run(sys.executable, '-c', LOOK)
    assert '  magnitude_max ' in said and '[MagnitudeMax](../63_task_vector/magnitude_max.ipynb)' in said
    rows = {r['name']: r for r in json.loads((copy/'nbs'/'board'/'mini8.json').read_text())['methods']}
    assert (
        rows['magnitude_max']['tried'] == 15
        and rows['magnitude_max']['score'] > rows['simple_average']['score']
    )
    run(sys.executable, '.ci/board.py')
    run(sys.executable, '.ci/readme.py')
    text = (copy/'nbs'/'63_task_vector'/'magnitude_max.ipynb').read_text()
    assert 'rows_of_page(globals())' in text and 'On mini8 `magnitude_max` is number 1 of 2' in text
    assert '|[MagnitudeMax](nbs/63_task_vector/magnitude_max.ipynb)|' in (copy/'README.md').read_text()
