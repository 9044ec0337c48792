"""FusionBench's configurations under their names: each composes without a network, and a few of each kind run
on tiny stand-ins."""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import mirror
from omegaconf import OmegaConf

from fusionbook.core.compose import CONFIG, compose_words
from fusionbook.core.config import check_keys, check_targets
from fusionbook.core.hub import named_sources
from fusionbook.core.legacy import translate
from fusionbook.core.resolve import plain


def names(group):
    return sorted(
        f.relative_to(CONFIG / group).with_suffix('').as_posix() for f in (CONFIG / group).rglob('*.yaml')
    )


def together(words, size=25):
    "Composed in batches: what stands under each key."
    found = {}
    for i in range(0, len(words), size): found |= dict(compose_words(words[i:i + size], name=None))
    return found


def test_every_model_pool_composes_and_its_class_takes_its_keys():
    every = names('modelpool')
    found = together([f'+modelpool@p{i}={n}' for i, n in enumerate(every)])
    kinds = Counter()
    for i, name in enumerate(every):
        cfg = found[f'p{i}']
        if name.endswith('corrupted'): continue # its root key `corruption` stands elsewhere in a batch
        if '???' in str(cfg): cfg = OmegaConf.to_container(cfg, resolve=False) | {'models': {}}
        cfg = translate(cfg, 'modelpool')
        check_targets(cfg)
        check_keys(cfg)
        kinds[cfg['_target_'].rpartition('.')[2]] += 1
    assert (
        sum(kinds.values()) >= 200
        and kinds['CausalLMPool'] == 29
        and kinds['ResNetForImageClassificationPool'] == 60
    )
    assert (
        kinds['CLIPVisionModelPool'] > 80
        and kinds['OpenCLIPVisionModelPool'] == 7
        and kinds['Seq2SeqLMPool'] == 7
    )


def test_every_data_set_and_every_model_composes_and_names_what_the_hub_could_have():
    from huggingface_hub.utils import validate_repo_id

    sets = [
        (f.parent.relative_to(CONFIG), f.stem)
        for f in (CONFIG / 'dataset').rglob('*.yaml')
        if 'corrupted' not in str(f) and 'mini8' not in str(f)
    ]
    models = [(f.parent.relative_to(CONFIG), f.stem) for f in (CONFIG/'model').rglob('*.yaml')]
    assert len(sets) > 90 and len(models) == 113
    for group in (sets, models):
        found = together([f'+{folder}@x{i}={stem}' for i, (folder, stem) in enumerate(group)])
        for i in range(len(group)):
            tree = plain(found[f'x{i}'])
            assert tree
            check_targets(tree)
            for _, source in named_sources({'models' if group is models else 'test_datasets': tree}):
                # a place of ours, or a name of the hub
                if not (Path(source).is_absolute() or source.startswith('_runs/')): validate_repo_id(source)


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory):
    "Tiny models by kind, an adapter of T5, and one table of images with twenty columns' worth of classes."
    import transformers
    from fusionbook.core.checkpoint import save
    from fusionbook.models.hub import tiny_hub
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp('stand_ins')
    found = {
        kind: [str(tiny_hub(root / f'{kind}{i}', kind, seed=i)) for i in range(2)]
        for kind in ('llama', 't5', 'gpt2_classes', 'bert')
    }
    found |= {
        kind: [str(tiny_hub(root / kind, kind, num_labels=1000))] for kind in ('resnet', 'convnext', 'dinov2')
    }
    key, draw = 'encoder.block.0.layer.0.SelfAttention.q', np.random.default_rng(0)
    import torch

    factors = {
        f'base_model.model.{key}.lora_{n}.weight': torch.from_numpy(draw.normal(size=s).astype('float32'))
        for n, s in (('A', (2, 32)), ('B', (32, 2)))
    }
    save(factors, root/'lora'/'adapter_model.safetensors')
    (root/'lora'/'adapter_config.json').write_text(json.dumps({'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4}))
    return found | {'lora': str(root/'lora')}


SAMPLE = { # pool -> (kind of its models, method, whether there are experts)
    'CausalLMPool/Qwen2.5-1.5B_three_models': ('llama', 'ties_merging'),
    'CausalLMPool/mergebench/gemma-2-2b': ('llama', 'task_arithmetic'),
    'CausalLMPool/vicuna-7b-v1.5': ('llama', 'simple_average'),
    'CausalLMPool/llama_codealpaca': ('llama', 'dummy'),
    'smile_mistral_exp_v4': ('llama', 'simple_average'),
    'Seq2SeqLMPool/flan-t5-base_glue': ('t5', 'simple_average'),
    'Seq2SeqLMPool/flan-t5-large_glue_lora16': ('t5', 'task_arithmetic'),
    'Seq2SeqLMPool/flan-t5-base_glue_tta': ('t5', 'simple_average'),
    'gpt-2_glue': ('gpt2_classes', 'task_arithmetic'),
    'SequenceClassificationModelPool/single_reward_model': ('bert', 'dummy'),
    'ResNetForImageClassification/transformers/resnet18_gtsrb': ('resnet', 'dummy'),
    'ConvNextForImageClassification/convnext-base-224_8-tasks': ('convnext', 'simple_average'),
    'Dinov2ForImageClassification/dinov2-base-imagenet1k-1-layer': ('dinov2', 'dummy')}


@pytest.mark.parametrize('pool', SAMPLE)
def test_a_pool_runs_on_stand_ins(pool, here, stand_ins):
    kind, method = SAMPLE[pool]
    cfg = plain(compose_words([f'+modelpool={pool}'], name=None))['modelpool']
    hub = {}
    for i, (key, name) in enumerate(x for x in named_sources(cfg) if 'datasets' not in x[0]):
        hub[name] = stand_ins['lora'] if 'lora-16' in name else stand_ins[kind][i % len(stand_ins[kind])]
    done = here(
        f'method={method}', f'modelpool={pool}', 'taskpool=dummy', 'merged_model_save_path=out', mirror(hub)
    )
    assert done.status == 0, done.err
    assert (
        done.report['hashes']['models'].keys() == cfg['models'].keys()
        and (done.cwd / 'out' / 'config.json').exists()
    )
    if kind == 'resnet': assert len(json.loads((done.cwd/'out'/'config.json').read_text())['id2label']) == 43


def test_files_of_openclip_run_from_their_folder(here, tmp_path, monkeypatch):
    import torch
    for n in ('zeroshot', 'Cars/finetuned', 'DTD/finetuned'):
        (file := tmp_path/f'ViT-B-32/{n}.pt').parent.mkdir(parents=True, exist_ok=True)
        torch.save({'model.visual.proj': torch.full((2, 2), float(len(n)))}, file)
    monkeypatch.setenv('FUSIONBOOK_OPENCLIP', str(tmp_path))
    done = here(
        'method=simple_average',
        'modelpool=OpenCLIPVisionModelPool/ViT-B-32_TA_cars_dtd',
        'merged_model_save_path=out.safetensors',
    )
    assert done.status == 0, done.err
    from fusionbook.core.checkpoint import Checkpoint

    assert (
        Checkpoint(done.cwd / 'out.safetensors')['model.visual.proj'].unique().item()
        == (len('Cars/finetuned') + len('DTD/finetuned')) / 2
    )
