"""Every preset of `AutoModelPool` on tiny random models: merged by the command line, opened by plain
`transformers`, the same answers."""
import json, os, subprocess, sys

import pytest
import torch

transformers = pytest.importorskip('transformers')
from fusionbook.core.checkpoint import Checkpoint, save  # noqa: E402
from fusionbook.core.errors import FusionError  # noqa: E402
from fusionbook.models.hub import TINY_MODELS, tiny_hub  # noqa: E402

PRESETS = { # class -> (architecture, auto class that opens what is saved, names that stay the host's)
    'CausalLMPool': ('llama', 'AutoModelForCausalLM', ''),
    'CausalLMBackbonePool': ('gpt2', 'AutoModelForCausalLM', 'transformer.wte'),
    'Seq2SeqLMPool': ('t5', 'AutoModelForSeq2SeqLM', ''),
    'SequenceClassificationModelPool': ('bert', 'AutoModelForSequenceClassification', ''),
    'GPT2ForSequenceClassificationPool': ('gpt2_classes', 'AutoModelForSequenceClassification', 'score'),
    'ResNetForImageClassificationPool': ('resnet', 'AutoModelForImageClassification', 'classifier'),
    'ConvNextForImageClassificationPool': ('convnext', 'AutoModelForImageClassification', 'classifier'),
    'Dinov2ForImageClassificationPool': ('dinov2', 'AutoModelForImageClassification', 'classifier'),
    'AutoModelPool': ('vit', 'AutoModelForImageClassification', '')}


@pytest.fixture(scope='module', autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def answers(network, kind):
    g = torch.Generator().manual_seed(0)
    words, image = torch.randint(2, 64, (2, 5), generator=g), torch.randn(2, 3, 16, 16, generator=g)
    if TINY_MODELS[kind][0] == 'ImageClassification': given = dict(pixel_values=image)
    else: given = dict(input_ids=words) | (dict(decoder_input_ids=words) if kind == 't5' else {})
    with torch.inference_mode(): return network.eval()(**given).logits


def mean(folders, kept):
    "The tensors of the mean, made without a pool; what is kept is the first model's."
    first, second = (dict(Checkpoint(f)) for f in folders)

    def stays(k, t):
        return (
            not t.is_floating_point()
            or kept
            and (k.startswith(kept) or kept == 'transformer.wte' and '.h.' not in k)
        )
    return {k: t if stays(k, t) else (t + second[k]) / 2 for k, t in first.items()}


@pytest.mark.parametrize('preset', PRESETS)
def test_a_mean_of_two_opens_with_transformers(preset, here, tmp_path):
    kind, auto, kept = PRESETS[preset]
    folders = [tiny_hub(tmp_path/n, kind, seed=i) for i, n in enumerate('ab')]
    (folders[0]/'tokenizer_config.json').write_text('{}')
    (tmp_path / 'run.yaml').write_text(
        json.dumps(
            {
                'method': {'name': 'simple_average'},
                'merged_model_save_path': f'{tmp_path}/out',
                'modelpool': {
                    '_target_': f'fusionbook.modelpool.{preset}',
                    'models': {f.name: str(f) for f in folders},
                },
            }
        )
    )
    done = here('run.yaml')
    assert done.status == 0, done.err
    assert {'config.json', 'tokenizer_config.json'} <= {f.name for f in (tmp_path/'out').iterdir()}
    expected = mean(folders, kept)
    cls = getattr(transformers, auto)
    reference = type(cls.from_pretrained(folders[0])).from_pretrained(
        None, config=transformers.AutoConfig.from_pretrained(folders[0]), state_dict=expected
    )
    opened, told = cls.from_pretrained(tmp_path/'out', output_loading_info=True)
    assert not any(told[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    torch.testing.assert_close(answers(opened, kind), answers(reference, kind))
    assert not torch.equal(answers(opened, kind), answers(cls.from_pretrained(folders[0]), kind))
    sizes = sum(p.numel() for p in opened.parameters())
    assert done.report['model_info']['all_params'] == sizes


def test_heads_of_other_sizes_stand_side_by_side(here, tmp_path):
    from fusionbook.modelpool import ConvNextForImageClassificationPool

    models = {
        n: str(tiny_hub(tmp_path / n, 'convnext', seed=i, num_labels=c))
        for i, (n, c) in enumerate({'_pretrained_': 4, 'pets': 3, 'cars': 5}.items())
    }
    pool = ConvNextForImageClassificationPool(models)
    from fusionbook.method import TaskArithmetic
    merged = TaskArithmetic(scaling_factor=.5).merge(pool)
    states = {n: dict(Checkpoint(p)) for n, p in models.items()}
    for task, classes in {'pets': 3, 'cars': 5}.items():
        pool.with_head(task).save_model(merged, tmp_path/f'out_{task}')
        opened = transformers.AutoModelForImageClassification.from_pretrained(tmp_path/f'out_{task}')
        assert opened.num_labels == classes
        key, base = 'convnext.embeddings.patch_embeddings.weight', states['_pretrained_']
        assert torch.equal(opened.classifier.weight, states[task]['classifier.weight'])
        torch.testing.assert_close(
            opened.state_dict()[key],
            base[key] + 0.5 * sum(states[t][key] - base[key] for t in ('pets', 'cars')),
        )
        assert torch.equal(
            answers(opened, 'convnext'), answers(pool.with_head(task).load(merged), 'convnext')
        )


def test_adapters_are_experts_of_the_pool(here, tmp_path):
    base, key = tiny_hub(tmp_path/'base', 't5'), 'encoder.block.0.layer.0.SelfAttention.q'
    g = torch.Generator().manual_seed(0)
    deltas = {}
    for n in 'ab':
        a, b = torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g)
        save(
            {f'base_model.model.{key}.lora_A.weight': a, f'base_model.model.{key}.lora_B.weight': b},
            tmp_path / n / 'adapter_model.safetensors',
        )
        (tmp_path / n / 'adapter_config.json').write_text(
            json.dumps({'peft_type': 'LORA', 'r': 2, 'lora_alpha': 6, 'base_model_name_or_path': 'x'})
        )
        deltas[n] = 3 * b @ a
    (tmp_path/'run.yaml').write_text(json.dumps({'type': 'x'}))
    cfg = {
        '_target_': 'fusion_bench.modelpool.PeftModelForSeq2SeqLMPool',
        'models': {'_pretrained_': str(base), 'a': str(tmp_path / 'a'), 'b': str(tmp_path / 'b')},
    }
    (tmp_path / 'run.yaml').write_text(
        json.dumps(
            {
                'method': {'_target_': 'fusion_bench.method.SimpleAverageAlgorithm'},
                'modelpool': cfg,
                'merged_model_save_path': f'{tmp_path}/out',
            }
        )
    )
    done = here('run.yaml')
    assert done.status == 0, done.err
    was, now = Checkpoint(base), Checkpoint(tmp_path/'out')
    torch.testing.assert_close(now[f'{key}.weight'], was[f'{key}.weight'] + (deltas['a'] + deltas['b']) / 2)
    assert all(torch.equal(was[k], now[k]) for k in was if k != f'{key}.weight')
    assert transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path/'out').config.model_type == 't5'


def test_a_merge_of_files_imports_no_transformers_and_builds_no_network(tmp_path):
    for i, n in enumerate('ab'): tiny_hub(tmp_path/n, 'llama', seed=i)
    code = (
        'import sys; from fusionbook.bench.cli import main; '
        'status = main(["method=simple_average", "modelpool=CausalLMPool/mixtral_moe_merging", "modelpool.models={a: a, b: b}", "merged_model_save_path=out"]); '
        'bad = [m for m in ("transformers", "datasets", "matplotlib") if m in sys.modules]; print("BAD", bad); raise SystemExit(status or bool(bad))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(Checkpoint(tmp_path/'out')) == len(Checkpoint(tmp_path/'a'))


def test_an_average_of_towers_imports_no_transformers(tmp_path):
    """Folders that nobody has seen, an empty cache: what a tower is follows from its configuration; torch's
    compiler takes a second, too."""
    from fusionbook.models.clip import tiny_clip
    towers = {n: tiny_clip(tmp_path/n, ['x'], width=48, seed=i) for i, n in enumerate('ab')}
    transformers.CLIPVisionModel.from_pretrained(towers['b']).save_pretrained(tmp_path/'b')
    pool = {'_target_': 'fusionbook.modelpool.CLIPVisionModelPool', 'models': {'a': 'a', 'b': 'b'}}
    (tmp_path/'run.yaml').write_text(json.dumps(dict(method={'name': 'simple_average'}, modelpool=pool)))
    code = (
        'import sys; from fusionbook.bench.cli import main; '
        'status = main(["run.yaml", "merged_model_save_path=out"]); '
        'bad = [m for m in ("transformers", "datasets", "matplotlib", "torch._dynamo") if m in sys.modules]; print("BAD", bad); raise SystemExit(status or bool(bad))'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        env=os.environ | {'FUSIONBOOK_CACHE': 'cache'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert transformers.CLIPVisionModel.from_pretrained(tmp_path/'out').config.hidden_size == 48


def test_code_beside_a_checkpoint_is_never_run(here, tmp_path):
    from fusionbook.modelpool import CausalLMPool
    folder = tiny_hub(tmp_path/'a', 'llama')
    config = json.loads((folder/'config.json').read_text())
    (folder/'modeling_x.py').write_text('raise SystemExit("code of a model folder was run")')
    (folder / 'config.json').write_text(
        json.dumps(
            config | {'auto_map': {'AutoModelForCausalLM': 'modeling_x.X', 'AutoConfig': 'modeling_x.Y'}}
        )
    )
    assert type(CausalLMPool({'a': str(folder)}).load_model('a')).__module__.startswith('transformers.')
    (folder / 'config.json').write_text(
        json.dumps(config | {'model_type': 'own_llama', 'auto_map': {'AutoModelForCausalLM': 'modeling_x.X'}})
    )
    with pytest.raises(FusionError, match='expected a `model_type` that transformers knows'):
        CausalLMPool({'a': str(folder)}).load_model('a')
    for entry in (
        {
            '_target_': 'transformers.AutoModelForCausalLM.from_pretrained',
            'pretrained_model_name_or_path': str(folder),
            'trust_remote_code': True,
        },
    ):
        done = here(
            'method=dummy',
            'modelpool=CausalLMPool/mixtral_moe_merging',
            f'modelpool.models={{a: {json.dumps(entry)}}}'.replace('"', ''),
        )
        assert done.status == 2 and 'code that comes with a checkpoint is never run' in done.line


def test_one_line_for_what_does_not_fit(here, tmp_path):
    for i, (n, kind) in enumerate({'a': 'llama', 'b': 'bert'}.items()): tiny_hub(tmp_path/n, kind, seed=i)
    tiny_hub(tmp_path/'wide', 'bert', num_labels=7)
    def refused(pool, models, *words):
        done = here(
            'method=simple_average',
            f'modelpool={pool}',
            f'modelpool.models={{{models}}}',
            f'merged_model_save_path={tmp_path}/out',
            *words,
        )
        assert done.status == 2 and not (tmp_path/'out').exists(), done.out
        return done.line
    assert 'expected `b` to have the names' in refused('CausalLMPool/mixtral_moe_merging', 'a: a, b: b')
    assert 'expected `scope` as one of' in refused('automodelpool', 'a: a', '++modelpool.scope=head')
    assert 'does not exist' in refused('automodelpool', 'a: /no/such/folder')
    wide = refused('automodelpool', 'b: b, wide: wide')
    assert 'classifier' in wide
    done = here(
        'method=simple_average',
        'modelpool=automodelpool',
        'modelpool.models={b: b, wide: wide}',
        '++modelpool.scope=backbone',
        f'merged_model_save_path={tmp_path}/out',
    )
    assert done.status == 0, done.err
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path/'out').num_labels == 2


def test_a_tokenizer_that_the_pool_names_is_saved_with_the_model(here, tmp_path):
    for i, n in enumerate('ab'): tiny_hub(tmp_path/n, 'gpt2', seed=i)
    (tmp_path/'a'/'merges.txt').write_text('a b')
    (tmp_path/'words').mkdir()
    (tmp_path/'words'/'tokenizer.json').write_text('{"model": {}}')
    done = here(
        'method=simple_average',
        'modelpool=CausalLMPool/mixtral_moe_merging',
        'modelpool.models={a: a, b: b}',
        '++modelpool.tokenizer=words',
        'merged_model_save_path=out',
    )
    assert done.status == 0, done.err
    assert {f.name for f in (tmp_path / 'out').iterdir()} == {
        'config.json',
        'generation_config.json',
        'model.safetensors',
        'README.md',
        'tokenizer.json',
    }


def test_each_task_is_measured_with_its_own_head(here, tmp_path):
    """Two classifiers of 10 digits with other heads; the run's accuracy is that of the network that was saved
    with each head."""
    from conftest import write_images
    from fusionbook.taskpool import ClassificationTaskPool
    from fusionbook.modelpool import ConvNextForImageClassificationPool

    models = {
        n: str(tiny_hub(tmp_path / n, 'convnext', seed=i, num_labels=c))
        for i, (n, c) in enumerate({'_pretrained_': 1000, 'one': 10, 'two': 12}.items())
    }
    sets = {
        t: str(write_images(tmp_path / f'{t}_images', per_class=5, seed=i))
        for i, t in enumerate(('one', 'two'))
    }
    (tmp_path / 'run.yaml').write_text(
        json.dumps(
            {
                'method': {'name': 'simple_average'},
                'modelpool': {
                    '_target_': 'fusionbook.modelpool.ConvNextForImageClassificationPool',
                    'models': models,
                },
                'taskpool': {'_target_': 'fusionbook.taskpool.ClassificationTaskPool', 'test_datasets': sets},
            }
        )
    )
    done = here('run.yaml')
    assert done.status == 0, done.err
    pool, tasks = ConvNextForImageClassificationPool(models), ClassificationTaskPool(sets)
    first, second = pool.experts()
    mean = {k: (v + second[k]) / 2 for k, v in first.items()}
    for task in sets:
        pool.with_head(task).save_model(mean, tmp_path/f'out_{task}')
        own = transformers.AutoModelForImageClassification.from_pretrained(tmp_path/f'out_{task}')
        answers = tasks.predict(own, task)
        rows = [
            r for r in done.report['rows'] if r['task'] == task and r.get('metric', 'accuracy') == 'accuracy'
        ]
        assert {r['role'] for r in rows} == {'expert', 'merged'}
        merged = next(r for r in rows if r['role'] == 'merged')
        assert (merged['value'] if 'value' in merged else merged['accuracy']) == pytest.approx(
            (answers['predictions'] == answers['labels']).mean()
        )
        loss = [
            r
            for r in done.report['rows']
            if r['task'] == task and r.get('metric') == 'loss' and r['role'] == 'merged'
        ]
        assert loss[0]['value'] == pytest.approx(answers['losses'].mean())
