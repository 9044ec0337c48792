"""Everything a user can get wrong: one line that says what was expected, no traceback, the right exit status;
with --debug the traceback."""
import json, os, pickle, shutil, signal
from pathlib import Path

import pytest
import torch

import warm
from conftest import mirror, run_program, tower_of


@pytest.fixture
def refused(here, monkeypatch):
    "Run the program; it must refuse with one line that has `words`, and raise under --debug."
    def call(*args, words=(), status=2):
        from fusionbook.bench.cli import main
        from fusionbook.core.errors import FusionError
        done = here(*args)
        assert done.status == status, (done.status, done.err)
        assert done.line.startswith('fusionbook: ') and len(done.line) < 1000
        for word in words: assert word in done.line, (word, done.line)
        with pytest.raises((FusionError, OSError)) as caught: main([*map(str, args), '--debug'])
        assert len(caught.traceback) > 2
        return done
    return call


@pytest.fixture
def damaged(world, tmp_path):
    "A copy of the svhn expert whose file `change` rewrites; the argument that puts it into the pool."
    def call(change):
        shutil.copytree(world/'svhn', tmp_path/'damaged')
        change(tmp_path/'damaged'/'model.safetensors')
        return f'modelpool.models.svhn={tmp_path}/damaged'
    return call


def rewritten(change):
    "A change of the tensors of a file."
    def call(file):
        from safetensors.torch import load_file, save_file
        sd = load_file(file)
        change(sd)
        save_file(sd, file)
    return call


def no_work(monkeypatch):
    "Make every step of a run fail loudly."
    def never(*args, **kwargs): raise AssertionError('work was begun')
    monkeypatch.setattr('fusionbook.bench.configured.build', never)
    monkeypatch.setattr('fusionbook.bench.configured.fusion', never)


# ---- models

def test_missing_model(refused, two):
    refused(*two, 'modelpool.models.svhn=/no/such/folder', words=['/no/such/folder', 'does not exist'])
    refused(
        *two,
        'modelpool.models.svhn=somebody/unknown-model',
        words=['somebody/unknown-model', 'hub_mirror={somebody/unknown-model: /a/folder}'],
    )
    os.mkdir('empty')
    refused(*two, 'modelpool.models.svhn=empty', words=['expected a folder with a checkpoint', '`empty`'])


def test_truncated_file(refused, two, damaged):
    done = refused(
        *two,
        damaged(lambda f: f.write_bytes(f.read_bytes()[:-1000])),
        words=['damaged or cut', 'damaged/model.safetensors'],
    )
    assert not done.runs # nothing to keep


@pytest.mark.parametrize('size', [0, 5, 300])
def test_nearly_empty_file(refused, two, damaged, size):
    refused(
        *two,
        damaged(lambda f: f.write_bytes(f.read_bytes()[:size])),
        words=['damaged or cut', 'model.safetensors'],
    )


@pytest.mark.parametrize('at, new', [(0, b'\xff' * 8), (8, b'garbage!'), (40, b'\x00' * 8)])
def test_corrupted_header(refused, two, damaged, at, new):
    def corrupt(file):
        data = bytearray(file.read_bytes())
        data[at:at + len(new)] = new
        file.write_bytes(data)
    refused(*two, damaged(corrupt), words=['damaged or cut', 'model.safetensors'])


def test_a_shard_is_lost(refused, two, world, tmp_path):
    from fusionbook.core.checkpoint import Checkpoint, save

    save(
        Checkpoint(world / 'svhn'),
        tmp_path / 'parts',
        shard_size=30000,
        extras={'config.json': (world / 'svhn' / 'config.json').read_text()},
    )
    (tmp_path/'parts'/'model-00002-of-00004.safetensors').unlink()
    refused(
        *two,
        f'modelpool.models.svhn={tmp_path}/parts',
        words=['expected the shards', 'model-00002-of-00004.safetensors'],
    )


@pytest.mark.parametrize('change', [dict(layers=3), dict(width=48), dict(patch_size=16)])
def test_other_architecture(refused, two, tmp_path, change):
    from fusionbook.models.clip import tiny_clip
    tiny_clip(tmp_path/'other', ['a'], **change)
    refused(
        *two,
        f'modelpool.models.mnist={tmp_path}/other',
        words=[
            '`mnist`',
            'names and shapes of the base',
            'encoder.layers.2' if 'layers' in change else 'embeddings',
        ],
    )


def test_not_clip(refused, two, tmp_path):
    (tmp_path/'bert').mkdir()
    (tmp_path/'bert'/'config.json').write_text('{"model_type": "bert"}')
    from fusionbook.core.checkpoint import save
    save({'bert.embeddings.weight': torch.ones(2)}, tmp_path/'bert'/'model.safetensors')
    refused(*two, f'modelpool.models.mnist={tmp_path}/bert', words=['bert', 'expected a CLIP'])


@pytest.mark.parametrize(
    'method, value',
    [
        ('task_arithmetic', float('nan')),
        ('ties_merging', float('inf')),
        ('simple_average', float('nan')),
        ('weighted_average', float('-inf')),
    ],
)
def test_numbers_that_are_none(refused, two, damaged, method, value):
    name = 'vision_model.encoder.layers.1.mlp.fc1.weight'
    def spoil(sd): sd[name][3, 4] = value
    done = refused(*two[1:], f'method={method}', damaged(rewritten(spoil)), 'merged_model_save_path=model',
                   words=['NaN or infinity', '`encoder.layers.1.mlp.fc1.weight`', '`svhn`'])
    assert '`mnist`' not in done.line and not Path('model').exists()


def test_a_base_that_is_no_number(refused, two, world, tmp_path):
    shutil.copytree(world/'base', tmp_path/'nan')
    def spoil(sd): sd['vision_model.post_layernorm.bias'][0] = float('nan')
    rewritten(spoil)(tmp_path/'nan'/'model.safetensors')
    refused(
        *two, f'modelpool.models._pretrained_={tmp_path}/nan', words=['`post_layernorm.bias`', 'the base']
    )
    refused(
        'modelpool=clip-vit-base-patch32_svhn_and_mnist',
        two[2],
        two[3],
        f'modelpool.models._pretrained_={tmp_path}/nan',
        words=['NaN'],
    )


# ---- names and values

@pytest.mark.parametrize(
    'args, words',
    [
        (
            ['method=task_aritmetic'],
            ['expected a method, got `task_aritmetic`', 'did you mean `task_arithmetic`', 'fusionbook list'],
        ),
        (
            ['method=linear/weigthed_average'],
            ['`linear/weigthed_average`', 'did you mean `linear/weighted_average`'],
        ),
        (
            ['modelpool=clip-vit-base-patch32_svnh_and_mnist'],
            ['expected a modelpool', 'clip-vit-base-patch32_svhn_and_mnist'],
        ),
        (['taskpool=clip-vit-base-patch32_TA9'], ['expected a taskpool', '`clip-vit-base-patch32_TA8`']),
        (['method.scalling_factor=1'], ['got `scalling_factor`', 'did you mean `scaling_factor`?']),
        (['+method.scalling_factor=1'], ['got `scalling_factor`', 'did you mean `scaling_factor`?']),
        (['sede=1'], ['got `sede`', '`seed`']),
        (['+sede=1'], ['got `sede`', '`seed`']),
        (['dtype=float15'], ['expected `dtype`', 'got `float15`']),
        (['device=gpu'], ['expected `device`', 'did you mean `cuda`']),
        (['method=ties_merging', 'method.threshold=0'], ['`threshold` in (0, 100]', 'got 0']),
        (['method=ties_merging', 'method.threshold=-5'], ['`threshold`', 'got -5']),
        (['method=ties_merging', 'method.threshold=101'], ['`threshold`', 'got 101']),
        (['method=ties_merging', 'method.merge_func=man'], ['`merge_func`', 'mean', 'got `man`']),
        (['method=weighted_average', 'method.weights=[1,2,3]'], ['expected 2 weights', 'got 3']),
        (['method=task_arithmetic', 'method.weights=[1]'], ['expected 2 weights', 'got 1']),
        (['method=weighted_average', 'method.weights=[1,-1]'], ['sum to zero']),
        (['taskpool.test_datasets.svhn.path=nowhere'], ['nowhere']),
        (['taskpool.test_datasets.svhn.split=tets'], ["got 'tets'", '`test`']),
        (['+taskpool.test_datasets.svhn.label=digit'], ["label column named 'digit'", 'image, label']),
        (['+taskpool.test_datasets.svhn.image=picture'], ["image column named 'picture'", 'image, label']),
        (['+taskpool.test_datasets.svhn.classnames=[a,b]'], ['svhn', '10 classes']),
        (['--config-name', 'nowhere', '--config-path', '.'], ['nowhere.yaml']),
        (['nowhere.yaml'], ['nowhere.yaml']),
        (['--config-path'], ['expected a value after `--config-path`']),
        (['list', 'metods'], ['did you mean `methods`?']),
        (['experiment', 'no_such'], ['expected an experiment, got `no_such`']),
    ],
)
def test_misspelt_or_out_of_range(refused, two, args, words):
    alone = args[0] in ('list', 'experiment') or args[0].startswith('--') or args[0].endswith('.yaml')
    groups = [a.split('=')[0] for a in args]
    refused(*([] if alone else [t for t in two if t.split('=')[0] not in groups]), *args, words=words)


def test_a_file_that_is_no_run(refused):
    Path('a.yaml').write_text('method: {name: dummy}\nmodel_pool: {}\n')
    refused('a.yaml', words=['got `model_pool`', 'did you mean `modelpool`?'])
    Path('b.yaml').write_text('method: {name: dummy}\n')
    refused('b.yaml', words=['expected a run with a `modelpool`'])
    Path('c.yaml').write_text('method: [unclosed\n')
    refused('c.yaml', words=['expected YAML', 'c.yaml', 'line 2'])


# ---- places

def test_unwritable_places_are_found_before_any_work(refused, two, monkeypatch):
    no_work(monkeypatch)
    Path('a_file').write_text('mine')
    Path('folder/sub').mkdir(parents=True)
    for key, place in [
        ('save_report', 'a_file/report.json'),
        ('save_report', 'folder'),
        ('save_report', '/proc/nowhere/report.json'),
        ('merged_model_save_path', 'a_file/model'),
        ('merged_model_save_path', 'folder'),
        ('merged_model_save_path', '.'),
    ]:
        refused(*two, f'{key}={place}', words=['expected', place.split('/')[0]])
    assert Path('a_file').read_text() == 'mine' and Path('folder/sub').is_dir()
    with pytest.raises(AssertionError, match='work was begun'): from_fusion(*two)


def from_fusion(*args):
    from fusionbook.bench.cli import main
    main([*args, '--debug'])


def test_a_folder_of_runs_that_cannot_be_made(refused, two, monkeypatch):
    no_work(monkeypatch)
    Path('_runs').write_text('a file in the way')
    refused(*two, words=['the folder of the run'])


def limited(bytes_, *args, cwd):
    "The program in a process that cannot write files larger than `bytes_`."
    return warm.run(
        *args,
        code=f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_}, {bytes_})); {warm.CODE}',
        cwd=cwd,
    )


def test_full_disk_while_the_model_is_written(here, two, hub):
    call = [two[1], 'method=simple_average', mirror(hub), 'merged_model_save_path=model']
    assert here(*call).status == 0
    before = {f.name: f.read_bytes() for f in Path('model').iterdir()}
    # the model has 96 kB
    done = limited(50_000, two[1], two[0], mirror(hub), 'merged_model_save_path=model', cwd=Path.cwd())
    assert done.returncode == 2, done.stderr
    assert 'Traceback' not in done.stderr and done.stderr.count('\n') == 1 and 'File too large' in done.stderr
    assert {f.name: f.read_bytes() for f in Path('model').iterdir()} == before
    assert sorted(f.name for f in Path.cwd().iterdir()) == ['_runs', 'model'] # nothing half-written remains


def test_full_disk_while_the_report_is_written(refused, two, monkeypatch):
    def full(self, text, *args, **kwargs):
        if self.name == 'report.json': raise OSError(28, 'No space left on device', str(self))
        return written(self, text, *args, **kwargs)
    written = Path.write_text
    monkeypatch.setattr(Path, 'write_text', full)
    refused(*two, words=['No space left on device', 'report.json'])


# ---- Ctrl-C

def test_interrupted_evaluation_keeps_what_was_measured(here, two, monkeypatch, tmp_path):
    from fusionbook.taskpool import CLIPVisionModelTaskPool
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'cache'))
    predict, asked = CLIPVisionModelTaskPool.predict, []
    def slow(self, model, task):
        asked.append(task)
        # Ctrl-C in the second task of the merged model
        if len(asked) == 6: os.kill(os.getpid(), signal.SIGINT)
        return predict(self, model, task)
    monkeypatch.setattr(CLIPVisionModelTaskPool, 'predict', slow)
    earlier = '{"rows": [], "method": "an earlier report"}'
    Path('mine.json').write_text(earlier)
    done = here(*two, 'save_report=mine.json')
    assert done.status == 130
    assert done.line == 'fusionbook: interrupted; what was measured is in the folder of the run'
    report = done.report
    assert report['interrupted'] is True and Path('mine.json').read_text() == earlier
    assert [(r['role'], r['task']) for r in report['rows'] if r['metric'] == 'loss'] == [
        ('pretrained', 'svhn'),
        ('pretrained', 'mnist'),
        ('expert', 'svhn'),
        ('expert', 'mnist'),
        ('merged', 'svhn'),
    ]
    assert (
        set(report) >= {'config', 'versions', 'hashes', 'cost', 'seed'}
        and (done.folder / 'report.png').exists()
    )
    asked.clear()
    whole = here(*two)
    assert whole.status == 0 and len(asked) == 2 # base and experts were kept
    assert whole.report['rows'][:len(report['rows'])] == report['rows'] and 'interrupted' not in whole.report


def test_interrupted_while_merging(here, two, monkeypatch):
    from fusionbook.method import TaskArithmetic
    def merge(self, pool): os.kill(os.getpid(), signal.SIGINT); return dict(pool.pretrained())
    monkeypatch.setattr(TaskArithmetic, 'merge', merge)
    done = here(*two, 'merged_model_save_path=model')
    assert done.status == 130 and done.line.startswith('fusionbook: interrupted')
    assert list(Path.cwd().iterdir()) == []


# ---- code that must not run

class Bomb:
    "Unpickled, it makes a file."
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f'touch {self.file}',)


@pytest.mark.parametrize('modern', [True, False])
def test_code_in_a_pickle_is_refused(refused, two, world, tmp_path, modern):
    (tmp_path/'pickled').mkdir()
    shutil.copy(world/'svhn'/'config.json', tmp_path/'pickled')
    bomb, file = {'vision_model.x': Bomb(tmp_path/'ran')}, tmp_path/'pickled'/'pytorch_model.bin'
    if modern: torch.save(bomb, file)
    else: file.write_bytes(pickle.dumps(bomb))
    refused(
        *two,
        f'modelpool.models.svhn={tmp_path}/pickled',
        words=['expected a file of tensors', 'pytorch_model.bin'],
    )
    assert not (tmp_path/'ran').exists()
    if modern:
        torch.load(file, weights_only=False)
        assert (tmp_path/'ran').exists() # it was a real one


def test_honest_pickles_are_read(here, two, world, tmp_path):
    (tmp_path/'pickled').mkdir()
    shutil.copy(world/'svhn'/'config.json', tmp_path/'pickled')
    torch.save(
        {f'vision_model.{k}': v for k, v in tower_of(world / 'svhn').items()},
        tmp_path / 'pickled' / 'pytorch_model.bin',
    )
    a, b = here(*two), here(*two, f'modelpool.models.svhn={tmp_path}/pickled')
    assert b.status == 0, b.err
    assert a.report['rows'] == b.report['rows'] and a.report['hashes'] == b.report['hashes']


def test_remote_code_is_refused(refused, two):
    for key in ('taskpool.test_datasets.svhn', 'modelpool.train_datasets.mnist', 'modelpool'):
        refused(*two, f'+{key}.trust_remote_code=true', words=['trust_remote_code'])


@pytest.mark.parametrize(
    'target',
    [
        'os.system',
        'subprocess.run',
        'builtins.eval',
        'posix.system',
        'torch.load',
        'fusionbook.core.checkpoint.os.system',
        'fusionbook.core.checkpoint.shutil.rmtree',
        'fusionbook.core.config.import_module',
        'fusionbook.bench.provenance.subprocess.run',
        'transformers.utils.os.system',
        'datasets.load_from_disk',
    ],
)
def test_targets_that_are_not_ours_are_refused(refused, two, tmp_path, target):
    argument = f'touch {tmp_path}/ran'
    bad = {'_target_': target, '_args_': [argument]}
    for name, method, models in [('method', bad, {}), ('model', {'name': 'dummy'}, {'a': bad})]:
        Path(f'{name}.yaml').write_text(
            json.dumps(
                dict(
                    method=method,
                    modelpool={'_target_': 'fusionbook.modelpool.BaseModelPool', 'models': models},
                )
            )
        )
        refused(f'{name}.yaml', words=[target])
    refused(
        *two, f'++taskpool.test_datasets.svhn={{_target_: {target}, _args_: ["{argument}"]}}', words=[target]
    )
    assert not (tmp_path/'ran').exists()


# ---- the traceback

def test_debug_shows_where(two, tmp_path):
    plain, debug = (
        run_program(*two, 'modelpool.models.svhn=/no/such', *extra, cwd=tmp_path)
        for extra in ([], ['--debug'])
    )
    assert plain.status == 2 and plain.line.startswith('fusionbook: expected a checkpoint')
    assert debug.status == 1 and debug.err.startswith('Traceback') and 'fusionbook/core/' in debug.err
    assert debug.err.strip().splitlines()[-1].endswith(plain.line.removeprefix('fusionbook: '))
    assert not plain.runs # nothing to keep


def test_a_defect_of_ours_is_one_line_too(here, two, monkeypatch):
    from fusionbook.method import TaskArithmetic
    def merge(self, pool): return 1 / 0
    monkeypatch.setattr(TaskArithmetic, 'merge', merge)
    done = here(*two)
    assert (
        done.status == 1
        and done.line == 'fusionbook: ZeroDivisionError: division by zero (--debug shows where)'
    )
    assert 'Traceback' in (done.folder/'run.log').read_text()
