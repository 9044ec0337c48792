"""The command line as a user meets it: FusionBench's calls, files in both schemas, every key of a run, what a
run leaves."""
import json, subprocess, sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
import yaml

from conftest import BASE, EXPERTS, TA8, mirror, tower_of

HEAVY = ('torch', 'transformers', 'datasets', 'hydra', 'matplotlib', 'sklearn', 'numpy')

LEGACY = '''method:
  name: task_arithmetic
  scaling_factor: 0.5
modelpool:
  type: huggingface_clip_vision
  models:
  - name: _pretrained_
    path: openai/clip-vit-base-patch32
  - name: svhn
    path: tanganke/clip-vit-base-patch32_svhn
  - name: mnist
    path: tanganke/clip-vit-base-patch32_mnist
taskpool:
  type: clip_vit_classification
  name: clip-vit-base-patch32_svhn_and_mnist
  dataset_type: huggingface_image_classification
  tasks:
  - name: svhn
    dataset:
      type: instantiate
      name: svhn
      object:
        _target_: datasets.load_dataset
        _args_:
        - svhn
        - cropped_digits
        split: test
  - name: mnist
    dataset:
      name: mnist
      split: test
  clip_model: openai/clip-vit-base-patch32
  batch_size: 128
  num_workers: 16
  fast_dev_run: ${fast_dev_run}
fast_dev_run: false
print_config: true
save_report: false
'''

NEWER = f'''_target_: fusion_bench.programs.FabricModelFusionProgram
_recursive_: false
method:
  _target_: fusion_bench.method.TaskArithmeticAlgorithm
  scaling_factor: 0.5
modelpool:
  _target_: fusion_bench.modelpool.CLIPVisionModelPool
  _recursive_: false
  models:
    _pretrained_: {BASE}
    svhn:
      _target_: transformers.CLIPVisionModel.from_pretrained
      pretrained_model_name_or_path: {EXPERTS["svhn"]}
    mnist: {EXPERTS["mnist"]}
  processor:
    _target_: transformers.CLIPProcessor.from_pretrained
    pretrained_model_name_or_path: {BASE}
taskpool:
  _target_: fusion_bench.taskpool.CLIPVisionModelTaskPool
  _recursive_: false
  test_datasets:
    svhn: {{_target_: datasets.load_dataset, _args_: [svhn, cropped_digits], split: test}}
    mnist: {{_target_: datasets.load_dataset, path: mnist, split: test}}
  base_model: {BASE}
  clip_model:
    _target_: transformers.CLIPModel.from_pretrained
    pretrained_model_name_or_path: ${{..base_model}}
  processor:
    _target_: transformers.CLIPProcessor.from_pretrained
    pretrained_model_name_or_path: ${{..base_model}}
  dataloader_kwargs: {{batch_size: 128, num_workers: 0}}
  fast_dev_run: ${{fast_dev_run}}
fabric: {{devices: 1, strategy: auto}}
path: {{log_dir: outputs}}
seed: null
fast_dev_run: false
print_config: false
report_save_path: false
merged_model_save_path: null
merged_model_save_kwargs: null
'''


def numbers(report):
    "What was measured: (role, task) -> accuracy, loss, number of examples."
    found = {}
    for r in report['rows']: found.setdefault((r['role'], r['task']), {})[r['metric']] = r
    return {k: (by['accuracy']['value'], by['loss']['value'], by['accuracy']['n']) for k, by in found.items()}


# ---- without torch

@pytest.mark.parametrize(
    'args, says',
    [
        (['--help'], 'fusionbook method=ties_merging'),
        (['list'], 'clip-vit-base-patch32_TA8'),
        (['--version'], 'fusionbook 0.'),
    ],
)
def test_help_and_lists_are_light(args, says):
    code = (
        f'import sys; from fusionbook.bench.cli import main; s = main({args!r}); print("HEAVY", [m '
        f'for m in {HEAVY} if m in sys.modules]); sys.exit(s)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout and 'HEAVY []' in done.stdout


def test_list_names_what_there_is(here):
    methods = here('list', 'methods').out
    assert all(
        f'  {name} ' in methods
        for name in ('dummy', 'simple_average', 'weighted_average', 'task_arithmetic', 'ties_merging')
    )
    assert 'modelpools' not in methods
    pools = here('list', 'taskpools').out
    assert all(
        name in pools
        for name in (
            'mini8',
            'clip-vit-base-patch32_svhn_and_mnist',
            'CLIPVisionModelTaskPool/clip-vit-classification_TA8',
        )
    )
    assert 'modelpools' in here('list').out and 'taskpools' in here('list').out
    assert here('list', 'method').line.endswith('did you mean `methods`?')


def test_listed_names_have_a_sentence():
    from fusionbook.bench.arguments import GROUPS, catalogue
    assert not [f'{g}/{name}' for g in GROUPS.values() for name, text in catalogue(g).items() if not text]


def test_the_console_script_is_the_same_program():
    from fusionbook.bench.cli import main
    try: found = distribution('fusionbook').entry_points.select(group='console_scripts', name='fusionbook')
    except PackageNotFoundError: pytest.skip('fusionbook is imported from a folder here, not installed')
    assert [e.load() for e in found] == [main]


# ---- FusionBench's page

def test_first_call_of_the_page(first):
    assert first.status == 0, first.err
    assert first.err == ''
    report = first.report
    assert [(r['role'], r['model'], r['task']) for r in report['rows'] if r['metric'] == 'accuracy'] == [
        ('pretrained', '_pretrained_', 'svhn'),
        ('pretrained', '_pretrained_', 'mnist'),
        ('expert', 'svhn', 'svhn'),
        ('expert', 'mnist', 'mnist'),
        ('merged', 'merged', 'svhn'),
        ('merged', 'merged', 'mnist'),
    ]
    assert report['config']['method']['scaling_factor'] == .3
    for word in ('report   _runs/', 'picture  _runs/', 'task_arithmetic', 'average'): assert word in first.out
    picture = (first.folder/'report.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) > 2000
    assert yaml.safe_load((first.folder/'config.yaml').read_text())['seed'] == 0


def test_first_call_agrees_with_transformers(first, world):
    "Merge by the formula, evaluate by `CLIPModel`: the same accuracy and loss."
    from datasets import load_dataset
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    base, experts = tower_of(world/'base'), [tower_of(world/t) for t in EXPERTS]
    merged = {
        k: b + 0.3 * sum(e[k] - b for e in experts) if b.is_floating_point() else b for k, b in base.items()
    }
    model = CLIPModel.from_pretrained(world/'base').eval()
    own = dict(model.vision_model.state_dict())
    assert {k.removeprefix('vision_model.') for k in own} == set(merged)
    model.vision_model.load_state_dict({k: merged[k.removeprefix('vision_model.')] for k in own})
    text = CLIPTokenizer.from_pretrained(world / 'base')(
        [f'a photo of the number: "{d}".' for d in range(10)], padding=True, return_tensors='pt'
    )
    prepare = CLIPImageProcessorPil.from_pretrained(world/'base')
    for task in EXPERTS:
        rows = load_dataset(str(world/f'{task}_images'), split='test')
        with torch.inference_mode():
            logits = model(
                pixel_values=prepare(list(rows['image']), return_tensors='pt')['pixel_values'], **text
            ).logits_per_image
        labels = torch.tensor(rows['label'])
        accuracy, loss, n = numbers(first.report)['merged', task]
        assert n == 20 and accuracy == (logits.argmax(1) == labels).double().mean().item()
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5)


def test_second_call_of_the_page(here, hub, world):
    every = hub | {
        f'tanganke/clip-vit-base-patch32_{t}': str(world / ('svhn' if i % 2 else 'mnist'))
        for i, t in enumerate(TA8)
    }
    done = here(
        'method=simple_average',
        'modelpool=clip-vit-base-patch32_TA8.yaml',
        'taskpool=dummy',
        mirror(every),
        'merged_model_save_path={log_dir}/model',
    )
    assert done.status == 0, done.err
    assert (
        done.report['method'] == 'simple_average'
        and done.report['rows'] == []
        and done.report['uses'] == ['experts']
    )
    assert set(done.report['hashes']['models']) == {'_pretrained_', *TA8}
    assert not (done.folder/'report.png').exists()
    got, want = tower_of(done.folder/'model'), [tower_of(world/t) for t in EXPERTS]
    for k, v in got.items(): torch.testing.assert_close(v, (want[0][k] + want[1][k]) / 2)
    assert done.report['model_info']['all_params'] == sum(v.numel() for k, v in got.items())


def test_older_schema_by_file_and_by_options(here, hub, two):
    Path('legacy.yaml').write_text(LEGACY)
    runs = [
        here('legacy.yaml', mirror(hub)),
        here('--config-path', '.', '--config-name', 'legacy', mirror(hub)),
        here('-cp', Path.cwd(), '-cn', 'legacy.yaml', mirror(hub)),
        here(*two, 'method.scaling_factor=0.5'),
    ]
    assert [r.status for r in runs] == [0] * 4, [r.err for r in runs]
    reports = [r.report for r in runs]
    for report in reports: assert report['config']['method']['scaling_factor'] == .5
    assert all(numbers(r) == numbers(reports[0]) for r in reports)
    assert reports[0]['config']['taskpool']['dataloader_kwargs'] == {'batch_size': 128, 'num_workers': 16}
    changed = here('legacy.yaml', mirror(hub), 'method.scaling_factor=0.1', 'references=false')
    assert changed.report['config']['method']['scaling_factor'] == .1
    assert [r['role'] for r in changed.report['rows'] if r['metric'] == 'loss'] == ['merged', 'merged']
    assert numbers(changed.report)['merged', 'svhn'] != numbers(reports[0])['merged', 'svhn']


def test_targets_of_fusion_bench(here, hub, two):
    Path('newer.yaml').write_text(NEWER)
    done = here('newer.yaml', mirror(hub))
    assert done.status == 0, done.err
    assert 'method   ' not in done.out # print_config: false
    assert done.report['config']['method']['_target_'] == 'fusionbook.method.TaskArithmetic'
    assert numbers(here(*two, 'method.scaling_factor=0.5').report) == numbers(done.report)


@pytest.mark.parametrize(
    'cfg, name',
    [
        (dict(_target_='fusion_bench.method.DummyAlgorithm'), 'Dummy'),
        (
            dict(_target_='fusion_bench.method.SimpleAverageAlgorithm', show_pbar=False, inplace=True),
            'SimpleAverage',
        ),
        (
            dict(_target_='fusion_bench.method.WeightedAverageAlgorithm', normalize=True, weights=[1, 3]),
            'WeightedAverage',
        ),
        (dict(_target_='fusion_bench.method.TaskArithmeticAlgorithm', scaling_factor=0.4), 'TaskArithmetic'),
        (
            dict(
                _target_='fusion_bench.method.TiesMergingAlgorithm',
                scaling_factor=0.3,
                threshold=20,
                remove_keys=[],
                merge_func='sum',
            ),
            'TiesMerging',
        ),
        (dict(name='simple_average'), 'SimpleAverage'),
        (dict(name='ties_merging', threshold=10), 'TiesMerging'),
    ],
)
def test_methods_of_both_schemas(cfg, name):
    from fusionbook.method import load_algorithm_from_config
    method = load_algorithm_from_config(cfg)
    assert type(method).__name__ == name
    assert all(
        method.config[k] == v
        for k, v in cfg.items()
        if k in ('weights', 'scaling_factor', 'threshold', 'merge_func')
    )


def test_loaders_of_the_page(hub, world):
    from fusionbook.method import load_algorithm_from_config
    from fusionbook.modelpool import load_modelpool_from_config
    from fusionbook.taskpool import load_taskpool_from_config
    for text in (LEGACY, NEWER):
        cfg = yaml.safe_load(text.replace('${fast_dev_run}', 'false').replace('${..base_model}', BASE))
        method, pool, tasks = load_algorithm_from_config(cfg['method']), *(f(cfg[k], mirror=hub) for f, k in (
            (load_modelpool_from_config, 'modelpool'), (load_taskpool_from_config, 'taskpool')))
        assert (method.scaling_factor, pool.model_names, tasks.task_names) == (
            0.5,
            ['svhn', 'mnist'],
            ('svhn', 'mnist'),
        )
        report = tasks.evaluate(method.run(pool))
        assert list(report) == ['model_info', 'svhn', 'mnist', 'average']
        assert set(report['svhn']) >= {'accuracy', 'loss'} and set(report['average']) == {
            'accuracy',
            'loss',
            'brier',
            'calibration_error',
        }
    assert load_taskpool_from_config({'type': 'dummy'}).evaluate(method.run(pool)) == {
        'model_info': report['model_info']
    }


def test_run_model_fusion(hub, tmp_path, monkeypatch, capsys):
    from fusionbook.bench.configured import run_model_fusion
    monkeypatch.chdir(tmp_path)
    cfg = yaml.safe_load(LEGACY.replace('${fast_dev_run}', 'false'))
    out = run_model_fusion(
        cfg['method'], cfg['modelpool'], cfg['taskpool'], seed=7, print_config=False, hub_mirror=hub
    )
    assert isinstance(out['merged_model'], torch.nn.Module)
    assert out['report']['seed'] == 7 and len(out['report'].rows('merged')) == 2
    assert 'method   ' not in capsys.readouterr().out
    assert 'average' not in run_model_fusion(cfg['method'], cfg['modelpool'], hub_mirror=hub)['report']
    assert 'models   2 (svhn, mnist)' in capsys.readouterr().out


# ---- composing

def test_dummies_where_only_models_are_named(here):
    shown = yaml.safe_load(here('modelpool=clip-vit-base-patch32_TA8', '--cfg', 'job').out)
    assert (shown['method']['_target_'], shown['taskpool']['_target_']) == (
        'fusionbook.method.Dummy',
        'fusionbook.taskpool.DummyTaskPool',
    )
    assert shown['modelpool']['models']['dtd'] == 'tanganke/clip-vit-base-patch32_dtd'
    half = yaml.safe_load(here('modelpool=clip-vit-base-patch32_TA8', 'method=ties_merging', '-c', 'job').out)
    assert (half['method']['_target_'], half['taskpool']['_target_']) == (
        'fusionbook.method.TiesMerging',
        'fusionbook.taskpool.CLIPVisionModelTaskPool',
    )
    own = yaml.safe_load(here('modelpool=mini8', 'method=ties_merging', '-c', 'job').out)
    assert len(own['taskpool']['test_datasets']) == 8
    alone = yaml.safe_load(
        here('modelpool=clip-vit-base-patch32_TA8_model_only', 'method=ties_merging', '-c', 'job').out
    )
    assert alone['taskpool']['_target_'] == 'fusionbook.taskpool.DummyTaskPool'
    bare = yaml.safe_load(here('--cfg', 'job').out)
    assert (
        bare['method']['_target_'],
        len(bare['modelpool']['models']),
        len(bare['taskpool']['test_datasets']),
    ) == ('fusionbook.method.TaskArithmetic', 9, 8)
    assert not list(Path.cwd().iterdir()) # showing leaves nothing behind


def test_dummies_run(here, hub):
    done = here('modelpool=clip-vit-base-patch32_svhn_and_mnist', mirror(hub))
    assert done.status == 0, done.err
    assert (done.report['method'], done.report['rows'], done.report['uses']) == ('dummy', [], ['pretrained'])
    assert done.report['model_info']['all_params'] > 0


def test_a_method_that_starts_from_another(here, two):
    done = here(
        *two,
        'method=git_rebasin',
        'method.then=task_arithmetic',
        'method.options={scaling_factor: 0.4}',
        'method.spec=[1,3,32,32]',
        'references=false',
    )
    assert done.status == 0, done.err
    assert (done.report['method'], done.report['uses']) == ('git_rebasin', ['experts', 'pretrained', 'spec'])
    assert (
        'did you mean `task_arithmetic`?'
        in here(*two, 'method=git_rebasin', 'method.then=task_arithmetics', 'references=false').line
    )


def test_multirun(here, two):
    done = here('-m', *two, 'method.scaling_factor=0.1,0.7', 'references=false')
    assert done.status == 0, done.err
    reports = [json.loads((f/'report.json').read_text()) for f in done.runs]
    assert sorted(r['config']['method']['scaling_factor'] for r in reports) == [.1, .7]
    assert numbers(reports[0]) != numbers(reports[1])
    assert all('INFO average' in (f/'run.log').read_text() for f in done.runs)
    assert sorted(f.name for f in Path.cwd().iterdir()) == ['_runs']


def test_a_folder_of_the_user(here, hub, two):
    for file, text in {
        'method/gentle.yaml': (
            '# Small steps.\n_target_: fusionbook.method.TaskArithmetic\n'
            'scaling_factor: 0.05\n'
        ),
        'modelpool/ours.yaml': (
            f'# Ours.\n_target_: fusionbook.modelpool.CLIPVisionModelPool\n_recursive_: false\n'
            f'models: {{_pretrained_: {BASE}, svhn: {EXPERTS["svhn"]}}}\n'
        ),
    }.items():
        (Path('mine')/file).parent.mkdir(parents=True)
        (Path('mine')/file).write_text(text)
    for option in (['--config-dir', 'mine'], ['--config-dir=mine'], ['-cd', 'mine']):
        done = here(*option, 'method=gentle', 'modelpool=ours', 'taskpool=dummy', mirror(hub))
        assert done.status == 0, done.err
        assert done.report['config']['method']['scaling_factor'] == .05
        assert list(done.report['hashes']['models']) == ['_pretrained_', 'svhn']
    lines = [l.split() for l in here('list', '--config-dir', 'mine', 'methods').out.splitlines()]
    at = [l[:1] for l in lines].index(['gentle'])
    assert lines[at + 1] == ['Small', 'steps.']
    assert 'did you mean `gentle`?' in here('--config-dir', 'mine', 'method=gentel', 'modelpool=ours').line
    assert here(*two, 'method=gentle').status == 2


def test_a_folder_named_config_hides_nothing(here, hub):
    Path('config/method').mkdir(parents=True)
    Path('config/method/task_arithmetic.yaml').write_text('_target_: os.system\ncommand: touch hidden\n')
    shown = here('method=task_arithmetic', 'modelpool=clip-vit-base-patch32_svhn_and_mnist', '--cfg', 'job')
    assert (
        shown.status == 0
        and yaml.safe_load(shown.out)['method']['_target_'] == 'fusionbook.method.TaskArithmetic'
    )
    assert shown.line == 'note: the folder `config` here is not searched; add --config-dir config to use it'
    assert 'note' not in here('list', 'methods').err


# ---- the merged model

@pytest.fixture
def saved(here, two):
    "Run the page's first call, save the model, return its folder."
    def call(*args):
        done = here(*two, 'references=false', 'merged_model_save_path={log_dir}/model', *args)
        assert done.status == 0, done.err
        assert f'model    {done.folder.relative_to(done.cwd)}/model' in done.out
        return done.folder/'model'
    return call


def test_the_saved_model_is_a_hugging_face_model(saved, world):
    from fusionbook.core.checkpoint import Checkpoint
    from fusionbook.core.identity import identity
    from fusionbook.core.state_dict import content_hash
    from fusionbook.modelpool import CLIPVisionModelPool
    from transformers import CLIPVisionModel
    folder = saved()
    base, experts = tower_of(world/'base'), [tower_of(world/t) for t in EXPERTS]
    ours, model = tower_of(folder), CLIPVisionModel.from_pretrained(folder)
    for k, v in model.state_dict().items():
        k = k.removeprefix('vision_model.')
        assert torch.equal(ours[k], v)
        torch.testing.assert_close(v, base[k] + .3 * sum(e[k] - base[k] for e in experts))
    card = (folder/'README.md').read_text()
    assert (
        card.startswith('---\n')
        and '# Merged by `task_arithmetic`' in card
        and '| `scaling_factor` | 0.3 |' in card
    )
    pool = CLIPVisionModelPool({})
    hashes = {t: identity(content_hash(tower_of(world/t)), pool.path_facts(world/t)) for t in EXPERTS}
    for name in EXPERTS: assert f'| `{name}` | {world/name} | `{hashes[name]}` |' in card
    lineage = json.loads(Checkpoint(folder).metadata['lineage'])
    assert (
        set(lineage['sources']) == {'_pretrained_', *EXPERTS}
        and lineage['versions']['torch'] == torch.__version__
    )
    assert yaml.safe_load(card.split('---')[1])['tags'] == ['merge', 'fusionbook']


def test_shards(saved):
    from transformers import CLIPVisionModel
    whole, parts = tower_of(saved()), saved('shard_size=30000')
    index = json.loads((parts/'model.safetensors.index.json').read_text())
    files = sorted(p.name for p in parts.glob('*.safetensors'))
    assert len(files) > 2 and set(index['weight_map'].values()) == set(files)
    assert index['metadata']['total_size'] == sum(v.numel() * v.element_size() for v in whole.values())
    assert all(p.stat().st_size < 30000 + 10000 for p in parts.glob('*.safetensors'))
    read = {
        k.removeprefix('vision_model.'): v
        for k, v in CLIPVisionModel.from_pretrained(parts).state_dict().items()
    }
    assert read.keys() == whole.keys() and all(torch.equal(read[k], whole[k]) for k in whole)
    assert not list(parts.glob('.*')) and not list(parts.parent.glob('.*'))


def test_half_precision(saved):
    single, half = tower_of(saved()), tower_of(saved('dtype=float16'))
    for k, v in single.items():
        assert half[k].dtype == (torch.float16 if v.is_floating_point() else v.dtype)
        assert torch.equal(half[k], v.to(half[k].dtype)) # computed in float32, rounded once


# ---- keys of a run

def test_print_config(here, two):
    quiet = [*two, 'dry_run=true']
    assert here(*quiet).out.startswith('method   TaskArithmetic(scaling_factor=0.3')
    assert yaml.safe_load(here(*quiet, 'print_config=full').out)['method']['scaling_factor'] == .3
    assert here(*quiet, 'print_config=false').out == ''


def test_dry_run_reads_nothing(here):
    # no such models here
    done = here(
        'modelpool=clip-vit-base-patch32_TA8',
        'taskpool=clip-vit-base-patch32_TA8',
        'method=simple_average',
        'dry_run=true',
    )
    assert done.status == 0 and 'tasks    8' in done.out
    assert list(done.cwd.iterdir()) == [] # and leaves nothing behind


def test_save_report(here, two):
    for typed in (
        'my_report.json',
        Path.cwd() / 'a new/folder/with (two) [kinds] of, brackets.json',
        '{log_dir}/program_report.json',
    ):
        done = here(*two, 'references=false', f'save_report={typed}')
        assert done.status == 0, done.err
        place = str(typed).replace('{log_dir}', str(done.folder.relative_to(done.cwd)))
        assert json.loads(Path(place).read_text()) == done.report
        assert Path(place).with_suffix('.png').exists() and f'report   {place}' in done.out
    same = here(*two, 'references=false', 'save_report=false')
    assert same.status == 0 and f'report   {same.folder.relative_to(same.cwd)}/report.json' in same.out


def test_fast_dev_run_is_one_batch(here, two):
    done = here(*two, 'fast_dev_run=true', 'taskpool.dataloader_kwargs.batch_size=8')
    assert done.status == 0, done.err
    assert {r['n'] for r in done.report['rows']} == {8}
    # not mixed up by the cache
    assert {r['n'] for r in here(*two, 'taskpool.dataloader_kwargs.batch_size=8').report['rows']} == {20}


MODULE = '''from dataclasses import dataclass
from fusionbook.data.datasets import load
from fusionbook.method.base import BaseAlgorithm
@dataclass
class Middle(BaseAlgorithm):
    "The middle of base and first expert."
    uses = ('pretrained', 'experts')
    share: float = .5
    def merge(self, pool):
        base, expert = pool.pretrained(), pool.experts()[0]
        return {k: base[k] + self.share * (expert[k] - base[k]) if base[k].is_floating_point() else base[k] for k in base}
def half(folder, split): return load(folder, split=f'{split}[:50%]')
'''


def test_foreign_targets_need_the_users_word(here, hub, two, world, monkeypatch):
    Path('fusion_of_mine.py').write_text(MODULE)
    monkeypatch.syspath_prepend(Path.cwd())
    Path('run.yaml').write_text(
        LEGACY.replace(
            'name: task_arithmetic\n  scaling_factor: 0.5', '_target_: fusion_of_mine.Middle\n  share: 0.25'
        ).replace(
            '_target_: datasets.load_dataset\n        _args_:\n        - svhn\n        - cropped_digits',
            f'_target_: fusion_of_mine.half\n        folder: {world}/svhn_images',
        )
    )
    assert 'fusion_of_mine.half' in Path('run.yaml').read_text()
    call = 'run.yaml', mirror(hub), 'merged_model_save_path={log_dir}/model'
    refused = here(*call)
    assert refused.status == 2 and 'add allow_target=' in refused.line and 'fusion_of_mine' not in sys.modules
    assert here(*call, 'allow_target=[fusion_of_mine.Middle]').status == 2
    done = here(*call, 'allow_target=[fusion_of_mine.Middle,fusion_of_mine.half]')
    assert done.status == 0, done.err
    assert [r['n'] for r in done.report['rows'] if r['role'] == 'merged' and r['metric'] == 'accuracy'] == [
        10,
        20,
    ]
    assert done.report['config']['method'] == {'_target_': 'fusion_of_mine.Middle', 'share': .25}
    base, expert = tower_of(world/'base'), tower_of(world/'svhn')
    for k, v in tower_of(done.folder / 'model').items():
        torch.testing.assert_close(v, base[k] + 0.25 * (expert[k] - base[k]))
    sys.modules.pop('fusion_of_mine')


# ---- the report

def test_report_has_what_repeats_it(first, hub):
    report = first.report
    assert set(report) >= {
        'rows',
        'config',
        'seed',
        'versions',
        'git_commit',
        'hashes',
        'uses',
        'cost',
        'average',
        'model_info',
        'method',
        'created',
        'svhn',
        'mnist',
    }
    assert 'interrupted' not in report
    assert set(report['config']) >= {'method', 'modelpool', 'taskpool'} and report['seed'] == 0
    assert report['config']['modelpool']['models'] == {'_pretrained_': hub[BASE]} | {
        t: hub[EXPERTS[t]] for t in EXPERTS
    }
    assert set(report['versions']) >= {
        'fusionbook',
        'python',
        'torch',
        'transformers',
        'datasets',
        'safetensors',
        'numpy',
    }
    assert report['git_commit'] is None or len(report['git_commit'].rstrip('+')) == 40
    assert set(report['hashes']['models']) == {'_pretrained_', *EXPERTS} and set(
        report['hashes']['data']
    ) == set(EXPERTS)
    assert all(len(h) == 16 and int(h, 16) for part in report['hashes'].values() for h in part.values())
    assert report['uses'] == ['experts', 'pretrained'] # no data
    for phase in ('loading', 'merging', 'evaluation'):
        assert report['cost'][phase]['seconds'] > 0 and report['cost'][phase]['peak_mb'] > 50, phase
    merged = [r for r in report['rows'] if r['role'] == 'merged']
    assert report['primary'] == 'accuracy' and [m['name'] for m in report['metrics']] == [
        'accuracy',
        'loss',
        'brier',
        'calibration_error',
    ]
    for metric in report['metrics']:
        key, rows = metric['name'], [r for r in merged if r['metric'] == metric['name']]
        assert report['average'][key] == pytest.approx(sum(r['value'] for r in rows) / 2)
        assert [report[t][key] for t in EXPERTS] == [r['value'] for r in rows]
    for r in report['rows']:
        assert list(r)[:10] == [
            'model',
            'role',
            'seed',
            'step',
            'task',
            'metric',
            'value',
            'low',
            'high',
            'n',
        ]
        if r['metric'] == 'calibration_error': assert r['low'] is r['high'] is None
        else: assert r['low'] <= r['value'] <= r['high']
        if r['metric'] == 'accuracy': assert 0 <= r['low'] and r['high'] <= 1
        expert = next(
            e
            for e in report['rows']
            if (e['role'], e['task'], e['metric']) == ('expert', r['task'], r['metric'])
        )
        over, under = (r, expert) if r['metric'] == 'accuracy' else (expert, r)
        assert r['normalised'] == pytest.approx(over['value'] / under['value'])


def test_report_says_how_the_model_was_made(here, two):
    config = here(*two, 'references=false', 'dtype=bfloat16', 'seed=3').report['config']
    assert (config['dtype'], config['device'], config['references'], config['seed']) == (
        'bfloat16',
        'cpu',
        False,
        3,
    )


def test_a_report_repeats_itself(here, two):
    "The configuration in a report is a run: it gives the same numbers."
    before = here(*two, 'method=ties_merging', 'method.threshold=50', 'dtype=float16', 'references=false')
    Path('again.yaml').write_text(yaml.safe_dump(before.report['config']))
    again = here('again.yaml')
    assert again.status == 0, again.err
    assert again.folder != before.folder and numbers(again.report) == numbers(before.report)
    assert again.report['config'] == before.report['config']


def test_references_are_measured_once(here, two, tmp_path, monkeypatch):
    from fusionbook.taskpool import CLIPVisionModelTaskPool
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'cache'))
    asked, predict = [], CLIPVisionModelTaskPool.predict
    def counted(self, model, task): asked.append(task); return predict(self, model, task)
    monkeypatch.setattr(CLIPVisionModelTaskPool, 'predict', counted)
    before = here(*two)
    assert before.status == 0 and len(asked) == 6
    again = here(*two)
    assert len(asked) == 8 and numbers(again.report) == numbers(before.report) # only the merged model
    other = here(*two, 'method=simple_average')
    assert (
        len(asked) == 10
        and numbers(other.report)['expert', 'svhn'] == numbers(before.report)['expert', 'svhn']
    )
    assert numbers(other.report)['merged', 'svhn'] != numbers(before.report)['merged', 'svhn']


def test_threads_change_no_result(first, two, cli, tmp_path, world):
    """The merged model is the same bit for bit; PyTorch's forward pass may round a loss differently, never an
    answer here."""
    from fusionbook.method import TaskArithmetic
    from fusionbook.modelpool import CLIPVisionModelPool

    done = cli(
        *two,
        'merged_model_save_path={log_dir}/model',
        anew=True,
        OMP_NUM_THREADS='2',
        FUSIONBOOK_CACHE=str(tmp_path / 'cache'),
    )
    assert done.status == 0, done.err
    assert (first.report['versions']['threads'], done.report['versions']['threads']) == ('1', '2')
    one, two_threads = numbers(first.report), numbers(done.report)
    assert (
        one.keys() == two_threads.keys()
        and done.report['hashes']['models'] == first.report['hashes']['models']
    )
    for k, (accuracy, loss, n) in one.items():
        assert two_threads[k] == (accuracy, pytest.approx(loss, rel=1e-6), n)
    assert torch.get_num_threads() == 1
    alone = TaskArithmetic().merge(
        CLIPVisionModelPool({'_pretrained_': str(world / 'base')} | {t: str(world / t) for t in EXPERTS})
    )
    saved = tower_of(done.folder/'model')
    assert saved.keys() == set(alone) and all(torch.equal(saved[k], alone[k]) for k in saved)


@pytest.mark.parametrize('name', ['simple_average', 'weighted_average', 'task_arithmetic', 'ties_merging'])
def test_threads_change_no_bit_of_a_larger_merge(name):
    from fusionbook.core.state_dict import content_hash
    from fusionbook.method import load_algorithm_from_config
    from fusionbook.modelpool import BaseModelPool
    draw = torch.Generator().manual_seed(0)
    pool = BaseModelPool(
        {
            n: {'a.weight': torch.randn(700, 600, generator=draw), 'b': torch.randn(7, generator=draw)}
            for n in ('_pretrained_', 'x', 'y', 'z')
        }
    )
    def merged(threads):
        old = torch.get_num_threads()
        torch.set_num_threads(threads)
        try: return content_hash(load_algorithm_from_config({'name': name}).merge(pool))
        finally: torch.set_num_threads(old)
    assert merged(1) == merged(2) == merged(3)
