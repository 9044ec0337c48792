"""FusionBench's files and calls: every kind of thing they hold, in small files written for this test."""
import copy, json, re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from conftest import BASE, EXPERTS, mirror
from fusionbook.core.errors import FusionError

PROGRAM = 'fusion_bench.programs.FabricModelFusionProgram'
POOL, TASKS = 'fusion_bench.modelpool.CLIPVisionModelPool', 'fusion_bench.taskpool.CLIPVisionModelTaskPool'


def images(name, split='test'):
    return {'_target_': 'datasets.load_dataset', 'path': name, 'split': split}


def digits():
    return {'svhn': images('svhn'), 'mnist': images('mnist')}


@pytest.fixture
def run(here, hub, tmp_path):
    "A file of a run, and what the program says to it."
    def call(cfg, *words):
        (tmp_path / 'their.yaml').write_text(
            cfg if isinstance(cfg, str) else yaml.safe_dump(cfg, sort_keys=False)
        )
        return here('their.yaml', mirror(hub), *words)
    return call


def their(**parts):
    "A run of the newer schema: one method, three models, two tasks."
    pool = {'_target_': POOL, 'models': {'_pretrained_': BASE} | EXPERTS}
    tasks = {'_target_': TASKS, 'test_datasets': digits(), 'clip_model': BASE, 'processor': BASE}
    return {
        '_target_': PROGRAM,
        'method': {'_target_': 'fusion_bench.method.SimpleAverageAlgorithm'},
        'modelpool': pool,
        'taskpool': tasks,
    } | parts


def test_keys_that_ask_for_nothing_and_those_that_ask_for_files(run):
    pool = {
        '_target_': POOL,
        '_recursive_': False,
        'base_model': BASE,
        'corruption': 'spatter',
        'verbose': True,
        'platform': 'huggingface',
        'models': {
            '_pretrained_': {
                '_target_': 'transformers.CLIPVisionModel.from_pretrained',
                'pretrained_model_name_or_path': '${...base_model}',
            }
        }
        | EXPERTS,
        'processor': {
            '_target_': 'transformers.CLIPProcessor.from_pretrained',
            'pretrained_model_name_or_path': '${..base_model}',
        },
    }
    tasks = {
        '_target_': TASKS,
        'test_datasets': digits(),
        'clip_model': BASE,
        'layer_wise_feature_save_path': 'features',
        'layer_wise_feature_first_token_only': True,
        'layer_wise_feature_max_num': 1000,
        'move_to_device': True,
    }
    done = run(their(modelpool=pool, taskpool=tasks, fabric={'devices': 1}, print_function_call=True))
    assert done.status == 0, done.err
    from fusionbook.core.checkpoint import Checkpoint
    kept = Checkpoint(done.cwd/'features'/'svhn.safetensors')
    assert len(kept) == 2 and all(
        v.ndim == 2 and len(v) == done.report['rows'][0]['n'] for v in kept.values()
    )
    assert done.report['uses'] == ['experts'] and set(done.report['hashes']['data']) == {'svhn', 'mnist'}


def test_what_is_called_absent_is_absent():
    "A name leaves the list of absent ones when its class comes."
    import fusionbook.modelpool
    import fusionbook.taskpool
    from fusionbook.core.legacy import _ABSENT_TYPES
    def plain(name, kind): return name.lower().replace('_', '').replace('-', '').removesuffix(kind)
    for kind, module in (('modelpool', fusionbook.modelpool), ('taskpool', fusionbook.taskpool)):
        here = {plain(n, kind) for n in dir(module)}
        assert not [n for n in _ABSENT_TYPES[kind] if plain(n, kind) in here], kind


@pytest.mark.parametrize(
    'change, told',
    [
        (
            {'method': {'_target_': 'fusion_bench.method.lm_finetune.FullFinetuneSFT'}},
            'a method of FusionBench that is not here yet',
        ),
        ({'method': {'name': 'clip_finetune'}}, 'a method of FusionBench that is not here yet'),
        (
            {
                'modelpool': {
                    '_target_': 'fusion_bench.modelpool.nyuv2_modelpool.NYUv2ModelPool',
                    'models': {},
                }
            },
            'a model pool of FusionBench that is not here yet',
        ),
        (
            {
                'taskpool': {
                    '_target_': 'fusion_bench.taskpool.LMEvalHarnessTaskPool',
                    'tokenizer': '${modelpool.tokenizer}',
                }
            },
            'a task pool of FusionBench that is not here yet',
        ),
        (
            {
                'modelpool': {
                    '_target_': POOL,
                    'models': {'a': {'_target_': 'fusion_bench.models.x.load_l_lora_vision_model_hf'}},
                }
            },
            'a loader of FusionBench that is not here yet',
        ),
        ({'_target_': 'fusion_bench.programs.other.Trainer'}, 'a program of FusionBench that is not here'),
        (
            {'modelpool': {'_target_': POOL, 'models': '???'}},
            '`modelpool.models`, which the file leaves open',
        ),
    ],
)
def test_what_is_not_here_is_called_that(run, change, told):
    done = run(their(**change))
    assert done.status == 2 and told in done.line
    assert 'allow_target' not in done.line and 'did you mean' not in done.line
    assert not (done.cwd/'_runs').exists()


@pytest.mark.parametrize(
    'change, told',
    [
        (
            {'method': {'_target_': 'fusion_bench.method.TaskArithmeticAlgorithm', 'scalling_factor': 1}},
            'did you mean `scaling_factor`?',
        ),
        ({'modelpool': {'_target_': POOL, 'models': {'a': '/no/such/folder'}}}, '`modelpool.models.a`'),
        (
            {'taskpool': {'_target_': TASKS, 'test_datasets': digits(), 'clip_model': '/no/such/clip'}},
            '`taskpool.clip_model`',
        ),
        (
            {
                'taskpool': {
                    '_target_': TASKS,
                    'test_datasets': {'a': {'_target_': 'datasets.load_dataset', 'pth': 'x'}},
                    'clip_model': BASE,
                }
            },
            'did you mean `path`?',
        ),
        (
            {
                'taskpool': {
                    '_target_': TASKS,
                    'test_datasets': {'a': {'_target_': 'os.system', '_args_': ['true']}},
                    'clip_model': BASE,
                }
            },
            'got `os.system`',
        ),
        ({'merged_model_save_path': '/proc/no/model'}, 'in a place that can be written'),
        ({}, ''),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_and_leaves_nothing(run, change, told):
    done = run(their(**change), 'dry_run=true')
    assert (done.status, told in done.err) == (2 if told else 0, True), done.err
    assert [f.name for f in done.cwd.iterdir()] == ['their.yaml']


def test_data_sets_join_a_group_that_is_given_beside_a_file(run, hub):
    """`+dataset/…@taskpool.test_datasets=…` belongs to the task pool of the line, not to that of the file,
    which is replaced."""
    words = [
        'taskpool=CLIPVisionModelTaskPool/clip-vit-single-task_mnist',
        '+dataset/image_classification/train@taskpool.test_datasets=svhn',
        'references=false',
    ]
    done = run(their(), *words)
    assert done.status == 0 and set(done.report['hashes']['data']) == {'mnist', 'svhn'}, done.err


def test_a_list_is_no_run(run):
    done = run('- method\n- modelpool\n')
    assert done.status == 2 and 'list' in done.line


OLDEST = f'''
use_lightning: true
fabric_logger: false
exp_name: first
trainer: {{devices: 1}}
method: {{name: simple_ensemble}}
modelpool:
  type: huggingface_clip_vision
  dtype: null
  models:
  - {{name: _pretrained_, path: {BASE}}}
  - {{name: svhn, path: {EXPERTS["svhn"]}}}
  - {{name: mnist, path: {EXPERTS["mnist"]}}}
  dataset_type: huggingface_image_classification
  tta_datasets:
  - name: svhn
    dataset: {{type: instantiate, name: svhn, object: {{_target_: datasets.load_dataset, _args_: [svhn, cropped_digits], split: test}}}}
  - {{name: mnist, dataset: {{name: mnist, split: test}}}}
taskpool:
  type: clip_vit_classification
  tasks: [{{name: mnist, dataset: {{name: mnist, split: test}}}}]
  clip_model: {BASE}
  batch_size: 16
'''


def test_the_first_releases(run):
    done = run(OLDEST, 'references=false')
    assert done.status == 0, done.err
    assert done.report['method'] == 'ensemble/simple_ensemble' and list(done.report['hashes']['data']) == [
        'mnist'
    ]
    twice = run(OLDEST.replace('{name: svhn, path', '{name: mnist, path'))
    assert twice.status == 2 and 'expected different names, got `mnist` 2 times' in twice.line


def test_a_saved_run_with_values_of_hydra(run):
    saved = their(
        path={
            'root_dir': '${oc.env:FUSION_BENCH_PROJECT_ROOT,"."}',
            'log_dir': '${.root_dir}/outputs/${hydra:job.config_name}/${now:%Y}',
        },
        report_save_path='${path.log_dir}/program_report.json',
        merged_model_save_path='${path.log_dir}/model',
    )
    done = run(saved, 'references=false')
    assert done.status == 0, done.err
    assert (done.folder/'program_report.json').exists() and (done.folder/'model').is_dir()


def test_adamerging_of_theirs_learns_on_test_inputs_with_heads_of_the_pool(run, tmp_path):
    pool = {
        '_target_': POOL,
        'models': {'_pretrained_': BASE} | EXPERTS,
        'test_datasets': digits(),
        'processor': BASE,
    }
    method = {
        'name': 'clip_layer_wise_adamerging',
        'weights': None,
        'optimizer': 'adam',
        'lr': 1e-3,
        'init_values': 0.3,
        'clamp_weights': False,
        'tie_weights': True,
        'strict': False,
        'devices': 1,
        'batch_size': 4,
        'num_workers': 8,
        'max_steps': 2,
        'save_merging_weights': 'merging_weights.pt',
        'cache_dir': 'outputs',
    }
    done = run(
        their(
            method=method,
            modelpool=pool,
            taskpool={'_target_': 'fusion_bench.taskpool.DummyTaskPool', 'model_save_path': None},
        )
    )
    assert done.status == 0, done.err
    assert (
        'unlabeled_test' in done.report['uses']
        and done.report['adaptation']['merged']['data'] == 'unlabeled_test'
    )
    learned = done.report['adaptation']['merged']
    torch.save(torch.tensor(learned['coefficients']), tmp_path/'merging_weights.pt')
    again = run(
        their(method=method | {'weights': 'merging_weights.pt'}, modelpool=pool, taskpool={'type': 'dummy'})
    )
    assert again.status == 0 and again.report['uses'] == ['experts', 'pretrained'], again.err


def test_validation_rows_and_class_tables_by_name(run):
    held = {
        '_target_': 'fusion_bench.utils.data.train_validation_split',
        'dataset': images('mnist', 'train'),
        'validation_fraction': 0.1,
        'validation_size': None,
        'random_seed': 0,
        'return_split': 'val',
    }
    numbers = {'dataset': images('mnist'), 'classnames': 'mnist'}
    done = run(
        their(
            taskpool={
                '_target_': TASKS,
                'test_datasets': {'mnist': held, 'again': numbers},
                'clip_model': BASE,
            }
        ),
        'references=false',
    )
    assert done.status == 0, done.err
    # a tenth of twenty; and `classnames: mnist` is a table, not the mirrored folder
    assert {r['task']: r['n'] for r in done.report['rows']} == {'mnist': 2, 'again': 20}


def test_mirrors_are_found_under_the_old_name_and_the_new(here, hub):
    new = {{'mnist': 'ylecun/mnist', 'svhn': 'ufldl-stanford/svhn'}.get(k, k): v for k, v in hub.items()}
    words = [
        'method=simple_average',
        'modelpool=clip-vit-base-patch32_svhn_and_mnist',
        'taskpool=clip-vit-base-patch32_svhn_and_mnist',
        'references=false',
    ]
    reports = [here(*words, mirror(names)).report for names in (hub, new)]
    assert reports[0]['hashes'] == reports[1]['hashes']


def test_every_shipped_pool_names_data_sets_that_the_library_can_ask_for():
    from huggingface_hub.utils import parse_hf_uri
    from fusionbook.core.config import CONFIG, composed
    def names(node):
        if isinstance(node, dict):
            if node.get('_target_') == 'datasets.load_dataset': yield node.get('path') or node['_args_'][0]
            for v in node.values(): yield from names(v)
    pools = [p.stem for p in (CONFIG/'modelpool').glob('clip-vit-*_TA*.yaml')]
    assert len(pools) >= 12
    found = {n for p in pools for n in names(composed(f'modelpool={p}', 'method=dummy', 'taskpool=dummy'))}
    found |= {
        n
        for p in (CONFIG / 'taskpool').glob('clip-vit-*_TA*.yaml')
        for n in names(composed('modelpool=mini8', 'method=dummy', f'taskpool={p.stem}'))
    }
    assert len(found) > 15
    assert all(parse_hf_uri(f'hf://datasets/{n}@main/README.md').id == n for n in found)


def test_adapters_become_models(run, hub, world, tmp_path):
    from fusionbook.core.checkpoint import Checkpoint, save
    key = 'encoder.layers.0.mlp.fc1'
    out, into = Checkpoint(world/'svhn')[f'vision_model.{key}.weight'].shape
    save(
        {
            f'base_model.model.{key}.lora_A.weight': torch.ones(1, into),
            f'base_model.model.{key}.lora_B.weight': torch.ones(out, 1),
        },
        tmp_path / 'lora' / 'adapter_model.safetensors',
    )
    (tmp_path/'lora'/'adapter_config.json').write_text(json.dumps(dict(peft_type='LORA', r=1, lora_alpha=.5)))
    linear = 'fusion_bench.models.linearized.vision_model'
    models = {
        '_pretrained_': {'_target_': f'{linear}.load_fft_vision_model_hf', 'model_name': BASE},
        'svhn': {
            '_target_': f'{linear}.load_lora_vision_model_hf',
            'base_model_name': BASE,
            'peft_name': str(tmp_path / 'lora'),
            'merge_and_unload': True,
        },
    }
    done = run(
        their(
            modelpool={'_target_': POOL, 'models': models},
            taskpool={'type': 'dummy'},
            merged_model_save_path='{log_dir}/model',
        )
    )
    assert done.status == 0, done.err
    base, merged = (
        Checkpoint(f)[n]
        for f, n in ((world / 'base', f'vision_model.{key}.weight'), (done.folder / 'model', f'{key}.weight'))
    )
    torch.testing.assert_close(merged - base, torch.full((out, into), .5))


def test_python_reads_what_a_run_reads(tmp_path):
    from fusionbook.core.config import instantiate
    from fusionbook.method import SimpleAverage
    from fusionbook.method.base import load_algorithm_from_config
    from fusionbook.modelpool import CLIPVisionModelPool
    from fusionbook.modelpool.base import load_modelpool_from_config
    file = tmp_path/'run.yaml'
    file.write_text(yaml.safe_dump(their(), sort_keys=False))
    assert isinstance(SimpleAverage.from_yaml(file), SimpleAverage)
    pools = [
        CLIPVisionModelPool.from_yaml(file),
        load_modelpool_from_config(their()['modelpool']),
        instantiate(their()['modelpool']),
    ]
    assert {type(p) for p in pools} == {CLIPVisionModelPool} and len(
        {json.dumps(p.config) for p in pools}
    ) == 1
    assert type(load_algorithm_from_config({'name': 'max_model_predictor'})) is type(
        instantiate({'_target_': 'fusion_bench.method.MaxModelPredictorAlgorithm'})
    )


class Network(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        with torch.no_grad(): self.layer.weight.fill_(value), self.layer.bias.fill_(-value)


def test_methods_written_for_their_pool():
    """An average over `for model in pool`, and a sum of task vectors through `get_model`, as the page about
    methods of FusionBench writes them."""
    from fusionbook.method import BaseAlgorithm, SimpleAverage, TaskArithmetic
    from fusionbook.modelpool import BaseModelPool
    class Average(BaseAlgorithm):
        def run(self, modelpool):
            models = [model for model in modelpool]
            mean = {
                name: torch.stack([m.state_dict()[name] for m in models]).mean(dim=0)
                for name in models[0].state_dict()
            }
            fused = copy.deepcopy(models[0])
            fused.load_state_dict(mean)
            return fused
    class Sum(BaseAlgorithm):
        def run(self, modelpool):
            base, total = modelpool.get_model('pretrained'), modelpool.get_model('pretrained')
            for name in modelpool.model_names:
                if name != 'pretrained':
                    with torch.no_grad():
                        for k, p in total.named_parameters():
                            p += 0.5 * (modelpool.get_model(name).get_parameter(k) - base.get_parameter(k))
            return total
    pool = BaseModelPool({'_pretrained_': Network(1.), 'a': Network(2.), 'b': Network(5.)})
    for theirs, ours in ((Average(), SimpleAverage()), (Sum(), TaskArithmetic(.5))):
        pool.seen.clear()
        got, want = theirs.run(pool).state_dict(), ours.run(pool).state_dict()
        assert got.keys() == want.keys()
        for k in got: torch.testing.assert_close(got[k], want[k])
    assert pool.seen == {'experts', 'pretrained'} and pool._models['a'].layer.weight.eq(2).all()


def test_a_parameter_registered_late_is_written(tmp_path):
    from fusionbook.method import BaseAlgorithm
    class Late(BaseAlgorithm):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.register_parameter_to_config('rank_', 'rank', 4)
        def run(self, modelpool): return None
    Late().to_yaml(tmp_path/'late.yaml')
    assert (
        yaml.safe_load((tmp_path / 'late.yaml').read_text())['rank'] == 4
        and 'rank_' not in BaseAlgorithm._config_mapping
    )


def test_models_and_what_was_found_beside_them(tmp_path, monkeypatch):
    from fusionbook.bench.run import fusion
    from fusionbook.method import BaseAlgorithm
    from fusionbook.modelpool import BaseModelPool
    class Both(BaseAlgorithm):
        def run(self, modelpool): return {'models': dict(modelpool.named_models()), 'coefficient': .25}
    report = fusion(Both(), BaseModelPool([Network(1.), Network(2.)]))
    assert report['returned'] == {'coefficient': .25} and report['model_info']['all_params'] == 6
    with pytest.raises(FusionError, match='expected one model to be saved, got 2'):
        fusion(Both(), BaseModelPool([Network(1.0), Network(2.0)]), save_path=str(tmp_path / 'm'))


FILES = Path(__file__).resolve().parents[3]/'shared/reference/foreign_yaml/fusion_bench/method'


@pytest.mark.skipif(not FILES.is_dir(), reason='FusionBench\'s own files are not beside this clone')
def test_every_file_of_theirs_that_has_our_name_has_our_class():
    from fusionbook.core.config import CONFIG, published
    from fusionbook.core.legacy import our_target
    both = [f for f in sorted(FILES.rglob('*.yaml')) if (CONFIG/'method'/f.relative_to(FILES)).exists()]
    targets = [yaml.safe_load(f.read_text()).get('_target_', '???') for f in both]
    assert len(both) > 80
    for target in targets:
        assert target == '???' or our_target(target, 'method').rpartition('.')[2] in published(
            'fusionbook.method'
        )


@pytest.mark.skipif(not FILES.is_dir(), reason='FusionBench\'s own files are not beside this clone')
def test_their_file_of_weights_by_the_input_is_read():
    from omegaconf import OmegaConf
    from fusionbook.core.legacy import build
    file = OmegaConf.load(FILES/'dawe'/'dawe_for_clip.yaml')
    method = build(OmegaConf.to_container(file, resolve=True), 'method')
    assert (method.dict_feature_extractor, method.lr, method.data, method.batch_size) == (
        'microsoft/resnet-18',
        1e-5,
        'unlabeled_test',
        1,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason='a machine with CUDA does what is asked')
def test_a_device_that_is_not_there(run, here):
    """FusionBench's files ask for CUDA by habit and work where the run does; who asks here is told before any
    work."""
    done = run(
        their(method={'_target_': 'fusion_bench.method.ISO_C_Merge', 'device': 'cuda', 'scaling_factor': 1.0})
    )
    assert done.status == 0 and '`device: cuda` of FusionBench is not used' in done.err, done.err
    for key in ('device', 'upscaling_accelerator'):
        done = here('method=smile_upscaling/smile_upscaling', f'method.{key}=cuda', 'dry_run=true')
        assert done.status == 2 and 'expected a device of this machine, got `cuda`' in done.line


POOLS = {  # their file -> the kind of tiny model in the place of each of its names
    'CausalLMPool/Qwen2.5-1.5B_three_models': 'llama',
    'ConvNextForImageClassification/convnext-base-224_8-tasks': 'convnext',
    'ResNetForImageClassification/transformers/resnet18_cifar10': 'resnet',
    'Seq2SeqLMPool/flan-t5-base_glue': 't5',
    'gpt-2_glue': 'gpt2_classes',
}


def hub_names(node):
    "What a file names as on the hub, in one word or two."
    if isinstance(node, dict): return {n for v in node.values() for n in hub_names(v)}
    if isinstance(node, list): return {n for v in node for n in hub_names(v)}
    return {node} if re.fullmatch(r'[\w.-]+/[\w.-]+|gpt2', str(node)) else set()


@pytest.mark.skipif(not FILES.is_dir(), reason='FusionBench\'s own files are not beside this clone')
@pytest.mark.parametrize('file', POOLS)
def test_their_pools_of_other_architectures_run_unchanged(here, tmp_path, file):
    from fusionbook.models.hub import tiny_hub

    files = [
        FILES.parent / 'modelpool' / f'{file}.yaml',
        *(FILES.parent / 'model' / 'flan-t5').glob('flan-t5-base*.yaml'),
    ]
    names = sorted({n for f in files for n in hub_names(yaml.safe_load(f.read_text()))})
    folders = {n: tiny_hub(tmp_path/'hub'/str(i), POOLS[file], seed=i) for i, n in enumerate(names)}
    method = 'dummy' if 'resnet' in file else 'simple_average' # that file has a base alone
    words = f'method={method}', f'modelpool={file}', 'taskpool=dummy', 'merged_model_save_path=out'
    done = here(
        '--config-path', FILES.parent, '--config-name', 'fabric_model_fusion', *words, mirror(folders)
    )
    assert done.status == 0, done.err
    assert list((tmp_path/'out').glob('*.safetensors'))
