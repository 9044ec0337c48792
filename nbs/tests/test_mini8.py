"""The main job, with nothing typed but the program's name; and the models that ship with it."""
import json
from pathlib import Path

import pytest

import fusionbook
from conftest import run_program

MODELS = Path(fusionbook.__file__).parent/'weights'/'mini8'
pytestmark = pytest.mark.skipif(
    not (MODELS / 'pretrained').exists(), reason='the models of mini8 are not in fusionbook/weights yet'
)


@pytest.fixture(scope='session')
def main_job(tmp_path_factory):
    "`fusionbook`, in a fresh process, folder and cache."
    cwd = tmp_path_factory.mktemp('main_job')
    return run_program(cwd=cwd, timeout=600, anew=True, FUSIONBOOK_CACHE=str(cwd/'cache'))


def test_one_word_does_it_all(main_job):
    assert main_job.status == 0, main_job.err
    assert main_job.err == ''
    said = dict(
        line.split(None, 1) for line in main_job.out.splitlines() if line.startswith(('report ', 'picture '))
    )
    report, picture = main_job.cwd/said['report'], main_job.cwd/said['picture']
    assert json.loads(report.read_text()) == main_job.report
    assert picture.read_bytes().startswith(b'\x89PNG') and picture.stat().st_size > 10_000
    assert 'average' in main_job.out and 'normalised' in main_job.out


def test_all_is_measured(main_job):
    from fusionbook.data.mini8 import TASKS
    rows = [r for r in main_job.report['rows'] if r['metric'] == 'accuracy']
    losses = [r for r in main_job.report['rows'] if r['metric'] == 'loss']
    assert [(r['role'], r['task']) for r in rows if r['role'] != 'expert'] == [
        (role, t) for role in ('pretrained', 'merged') for t in TASKS
    ]
    assert [r['task'] for r in rows if r['role'] == 'expert'] == list(TASKS) and len(TASKS) == 8
    assert all(0 < r['value'] <= 1 and r['n'] >= 100 for r in rows) and len(losses) == len(rows)
    assert all(r['value'] > 0 for r in losses)
    # two photographs
    assert all(
        r['low'] is r['high'] is None if r.get('clusters') == 2 else 0 <= r['low'] < r['high'] <= 1
        for r in rows
    )
    assert main_job.report['method'] == 'task_arithmetic' and 0 < main_job.report['average']['accuracy'] < 1


def mean(report, role):
    found = [r['value'] for r in report['rows'] if r['role'] == role and r['metric'] == 'accuracy']
    return sum(found) / len(found)


def test_the_models_leave_room_to_merge(main_job):
    "The base knows something, the experts know their task, and a merge lies between."
    base, experts, merged = (mean(main_job.report, role) for role in ('pretrained', 'expert', 'merged'))
    assert .35 <= base <= .65, base
    assert experts >= .9, experts
    assert base < merged < experts


def test_the_models_are_small():
    assert sum(f.stat().st_size for f in MODELS.rglob('*') if f.is_file()) <= 15e6
    from fusionbook.core.checkpoint import Checkpoint

    assert {
        str(t.dtype) for t in Checkpoint(MODELS / 'pretrained').meta.values() if t.is_floating_point()
    } == {'torch.float16'}
    assert len([f for f in MODELS.glob('*/config.json')]) == 9 and (MODELS/'README.md').exists()


def test_a_tower_of_mini8_is_tuned_as_the_help_says(here):
    """`--base mini8/pretrained --data mini8/TASK` needs no more: the text side and the sentence are those of
    mini8; the line that is printed merges it."""
    done = here(
        'finetune',
        '--base',
        'mini8/pretrained',
        '--data',
        'mini8/digits',
        '--name',
        'digits',
        '--steps',
        1,
        '--batch_size',
        2,
    )
    assert done.status == 0 and 'expert     experts/digits' in done.out, done.err
    line, = (l.split()[2:] for l in done.out.splitlines() if l.startswith('merge '))
    assert here(*line, 'fast_dev_run=true').status == 0
