"""Runs that are stopped: Ctrl-C and SIGTERM to real processes; what was measured is saved, nothing else is
touched, the status says which it was."""
import json, os, signal, time
from pathlib import Path

import pytest

import warm
from test_sweep_compare import mine  # a validation pool in a folder of configurations


SLOW = '''
import os, signal, sys
from fusionbook.taskpool import CLIPVisionModelTaskPool
predict, asked = CLIPVisionModelTaskPool.predict, []
def slow(self, model, task):
    asked.append(task)
    if len(asked) == 6: os.kill(os.getpid(), signal.SIGTERM)
    return predict(self, model, task)
CLIPVisionModelTaskPool.predict = slow
from fusionbook.bench.cli import main
raise SystemExit(main(sys.argv[1:]))
'''

@pytest.mark.parametrize('name, status', [('SIGINT', 130), ('SIGTERM', 143)])
def test_a_stopped_run_keeps_what_it_measured(tmp_path, two, name, status):
    code = SLOW.replace('SIGTERM', name)
    (tmp_path/'mine.json').write_text(earlier := '{"rows": [], "method": "an earlier report"}')
    env = os.environ | dict(FUSIONBOOK_CACHE=str(tmp_path/'cache'))
    done = warm.run(*two, 'save_report=mine.json', code=code, cwd=tmp_path, env=env)
    assert done.returncode == status, done.stderr
    assert (
        done.stderr.strip().splitlines()[-1]
        == 'fusionbook: interrupted; what was measured is in the folder of the run'
    )
    assert 'Traceback' not in done.stderr and (tmp_path/'mine.json').read_text() == earlier
    folder, = (tmp_path/'_runs').iterdir()
    report = json.loads((folder/'report.json').read_text())
    assert (
        report['interrupted'] is True and len([r for r in report['rows'] if r['metric'] == 'accuracy']) == 5
    )


TRAIN = (
    '--model_type MLP_NOBIAS --dataset_name MNIST --width 1/4 --epochs 400 --batch_size 8 '
    '--experiment_name e --data own'
).split()

def digits(folder):
    "A folder of small pictures for `train`."
    import datasets
    import numpy as np
    from PIL import Image
    draw = np.random.default_rng(0)
    for split, n in dict(train=120, test=40).items():
        rows = {
            'image': [Image.fromarray(draw.integers(0, 255, (8, 8), dtype=np.uint8)) for _ in range(n)],
            'label': [i % 10 for i in range(n)],
        }
        table = datasets.Dataset.from_dict(
            rows,
            features=datasets.Features(
                {'image': datasets.Image(), 'label': datasets.ClassLabel(num_classes=10)}
            ),
        )
        folder.mkdir(exist_ok=True)
        table.to_parquet(folder/f'{split}-00000-of-00001.parquet')


def test_stopped_training_leaves_whole_files(tmp_path):
    "SIGTERM in the middle; status 143; every pass that was done is there, and no half-written file."
    digits(tmp_path/'own')
    def start(where, *more):
        return warm.Started('train', *TRAIN, '--out', where, *more, cwd=tmp_path)
    first = start('a')
    kept = tmp_path/'a'/'e'/'e_seed1'/'checkpoints'/'parent_1'/'checkpoint_epoch5.safetensors'
    while not kept.exists() and first.poll() is None: time.sleep(.02)
    first.terminate()
    err = first.communicate(timeout=60)[1]
    assert first.returncode == 143, err
    assert 'Traceback' not in err and 5 <= len(list(kept.parent.glob('checkpoint_epoch*'))) < 400
    assert not [f for f in (tmp_path/'a').rglob('.*')] # no room is left


@pytest.mark.parametrize('name, status', [('SIGINT', 130), ('SIGTERM', 143)])
def test_a_stopped_sweep_keeps_its_points(tmp_path, two, mine, name, status):
    "The points that were scored are there, and the same call takes them."
    sweep = warm.Started(
        'sweep',
        *two,
        *mine,
        'method.scaling_factor=0:1:0.02',
        'fast_dev_run=true',
        'print_config=false',
        cwd=tmp_path,
    )
    def points(): return list(tmp_path.glob('_runs/sweep_*/points/*.json'))
    while len(points()) < 2 and sweep.poll() is None: time.sleep(.02)
    sweep.send_signal(signal.Signals[name])
    err = sweep.communicate(timeout=60)[1]
    assert sweep.returncode == status, err
    assert 'Traceback' not in err and 2 <= len(points()) < 51


def test_a_stopped_experiment_leaves_no_kernel(tmp_path):
    "SIGTERM while a cell runs: status 143, the copy does not count as finished, and the kernel is gone."
    cells = [
        dict(cell_type='markdown', id='a', metadata={}, source='# Slow\n\n> Never done.'),
        dict(
            cell_type='code',
            id='b',
            metadata={'tags': ['parameters']},
            source='x = 1',
            outputs=[],
            execution_count=None,
        ),
        dict(
            cell_type='code',
            id='c',
            metadata={},
            outputs=[],
            execution_count=None,
            source=(
                'import os, time\nopen("pid", "w").write(str(os.getpid()))\nos.rename("pid", '
                '"kernel")\ntime.sleep(600)'
            ),
        ),
    ]
    spec = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    (tmp_path / 'slow.ipynb').write_text(
        json.dumps(dict(cells=cells, metadata=spec, nbformat=4, nbformat_minor=5))
    )
    run = warm.Started('experiment', 'slow.ipynb', '-o', 'copy.ipynb', cwd=tmp_path)
    while not (tmp_path/'kernel').exists() and run.poll() is None: time.sleep(.05)
    kernel = int((tmp_path/'kernel').read_text())
    run.terminate()
    err = run.communicate(timeout=90)[1]
    assert run.returncode == 143, err
    end = time.time() + 30
    while Path(f'/proc/{kernel}').exists() and time.time() < end: time.sleep(.1)
    assert not Path(f'/proc/{kernel}').exists()
    if (tmp_path/'copy.ipynb').exists():
        assert (
            json.loads((tmp_path / 'copy.ipynb').read_text())['metadata']['fusionbook']['state'] != 'finished'
        )
