"""What people mistype: each line is answered by one line with the nearest right thing, before any work, and
leaves nothing behind."""
import shlex

import pytest

T = 'train --experiment_name x --model_type VGG11 --dataset_name CIFAR10'
M = 'measure --experiment_name x --model_type VGG11 --dataset_name CIFAR10'
F = 'fuse --experiment_name x --model_type VGG11 --dataset_name CIFAR10'
MISTAKES = [ # what was typed, what the answer holds
    ('swep method.scaling_factor=0:1:.1', '`sweep`'),
    ('compair a.json b.json', '`compare`'),
    ('experiments compare_methods', '`experiment`'),
    ('lst', '`list`'),
    ('tran --experiment_name x', '`train`'),
    ('run method=ties_merging', 'fusionbook method=ties_merging'),
    ('help', '`--help`'),
    ('--hepl', '`--help`'),
    ('--verison', '`--version`'),
    ('--list', '`list`'),
    ('list methdos', '`methods`'),
    ('list --method', '`methods`'),
    ('list ties_merging', 'methods, modelpools'),
    ('method ties_merging', '`method=ties_merging`'),
    ('ties_merging', '`method=ties_merging`'),
    ('method = ties_merging', '`method=ties_merging`'),
    ('method= ties_merging', '`method=ties_merging`'),
    ('method=ties-merging', '`ties_merging`'),
    ('method=TIES', '`ties_merging`'),
    ('method=TiesMerging', '`ties_merging`'),
    ('method=average', '`simple_average`'),
    ('method=adamerging', '`adamerging/clip`'),
    ('Method=ties_merging', '`method`'),
    ('model_pool=mini8', '`modelpool`'),
    ('task_pool=mini8', '`taskpool`'),
    ('scaling_factor=0.5', '`method.scaling_factor`'),
    ('scalling_factor=0.5', '`method.scaling_factor`'),
    ('method=ties_merging threshold=10', '`method.threshold`'),
    ('models.digits=mini8/mnist', '`modelpool.models.digits`'),
    ('method.scalling_factor=0.5', '`scaling_factor`'),
    ('method.scaling_factor=abc', 'number'),
    ('method.normalize=[0.1]', 'true or false'),
    ('method.scaling_factor=0,5', '0.5'),
    ('method.scaling_factor=', 'number'),
    ('method.scaling_factor=true', 'number'),
    ('method.scaling_factor=null', 'number'),
    ('method.normalize=maybe', 'true or false'),
    ('method.weights=3', 'list'),
    ('method=ties_merging method.merge_func=means', 'sum, mean, max'),
    ('method=ties_merging method.threshold=200', '(0, 100]'),
    ('method=ties_merging method.remove_keys=head', 'list'),
    ('method=clip_layer_wise_adamerging method.max_steps=1.5', 'whole number'),
    ('method=clip_layer_wise_adamerging method.max_steps=many', 'whole number'),
    ('shard_size=5XB', '5GB'),
    ('shard_size=0', 'shard_size'),
    ('shard_size=-5', 'shard_size'),
    ('threads=0', 'threads'),
    ('threads=two', 'threads'),
    ('threads=-1', 'threads'),
    ('device=gpu', '`cuda`'),
    ('device=GPU:0', '`cuda:0`'),
    ('device=cuda', '`cpu`'),
    ('device=cpuu', '`cpu`'),
    ('method.device=gpu', '`cuda`'),
    ('seed=abc', 'whole number'),
    ('seed=1.5', 'whole number'),
    ('seeds=3', '[0, 1, 2]'),
    ('seeds=[a]', 'seeds'),
    ('dtype=fp16', '`float16`'),
    ('dtype=float12', '`float16`'),
    ('modelpool=mini9', '`mini8`'),
    ('modelpool=mini8 taskpool=mini8_val', '`mini8_validation`'),
    ('modelpool.models.digits=mini8/digit', '`mini8/digits`'),
    ('modelpool.models.digits=mini8/digit dry_run=true', '`mini8/digits`'),
    ('references=no', 'true or false'),
    ('references=off', 'true or false'),
    ('dry_run=yes', 'true or false'),
    ('fast_dev_run=on', 'true or false'),
    ('print_config=ful', '`full`'),
    ('hub_mirror=/data', '{name: folder}'),
    ('no.yaml', 'no.yaml'),
    ('--config-path nowhere', 'nowhere'),
    ('--config-nam x', '`--config-name`'),
    ('method=ties_merging,task_arithmetic', '-m'),
    ('+method.colour=1', 'scaling_factor'),
    ('sweep method=task_arithmetic', 'at least one key'),
    ('sweep scaling_factor=0:1:.5', '`method.scaling_factor`'),
    ('sweep method.scalling_factor=0:1:.5', '`scaling_factor`'),
    ('sweep method.scaling_factor=0:1:.5 validation=mini8_valid', '`mini8_validation`'),
    ('compare', 'at least two'),
    ('compare no.json neither.json', 'no.json'),
    ('compare no.json neither.json --outptu x', '-o'),
    ('experiment', 'NAME'),
    ('experiment compare_method', '`compare_methods`'),
    ('experiment compare_methods -p fst true', '`fast`'),
    ('experiment compare_methods -p fast', '-p'),
    ('experiment compare_methods fast=true', '-p fast true'),
    ('experiment compare_methods --fast true', '-p fast'),
    ('train', '--experiment_name'),
    ('train --experiment-name x --model_type VGG11 --dataset_name CIFAR10', '`--experiment_name`'),
    ('train --experiment_name x --model_type vgg11 --dataset_name CIFAR10', '`VGG11`'),
    ('train --experiment_name x --model_type VGG11 --dataset_name cifar-10', '`CIFAR10`'),
    (T + ' --epochs ten', 'epochs'),
    (T + ' --device gpu', '`cuda`'),
    (T + ' epochs=3', '`--epochs 3`'),
    (M, '--device'),
    (M + ' --device gpu --seeds 2', '`cuda`'),
    (F + ' --seed 2', '`--seeds`'),
    (F + ' --seeds two', 'seeds'),
]


@pytest.mark.parametrize('typed, told', MISTAKES, ids=[w for w, _ in MISTAKES])
def test_one_line_with_the_nearest_right_thing(here, typed, told):
    done = here(*shlex.split(typed))
    assert done.status == 2, (done.status, done.out, done.err)
    assert told in done.line and len(done.line) < 500, done.line
    assert not done.out and not list(done.cwd.iterdir())


def test_sizes_are_read(here):
    done = here('shard_size=1MB', 'references=false', 'fast_dev_run=true', 'merged_model_save_path=model')
    assert done.status == 0, done.err
    assert (
        len(list((done.cwd / 'model').glob('*.safetensors'))) > 1
        and done.report['config']['shard_size'] == 1_000_000
    )


@pytest.mark.parametrize('word', ['list', 'experiment', 'sweep', 'compare', 'train', 'fuse', 'measure'])
def test_every_command_has_help_of_its_own(here, word):
    done, whole = here(word, '--help'), here('--help')
    assert done.status == 0 and not done.err and f'fusionbook {word}' in done.out and done.out != whole.out
    assert '(default: None)' not in done.out and all(len(l) <= 125 for l in done.out.splitlines())
    for flag in (
        ('--experiment_name', '--model_type', '--dataset_name')
        if word in ('train', 'fuse', 'measure')
        else ()
    ):
        assert flag in done.out
    assert word not in ('train', 'fuse', 'measure') or '(required)' in done.out


@pytest.mark.parametrize('sign', ['', '+', '++'])
def test_models_on_the_line_are_those_and_no_others(here, tmp_path, sign):
    import torch
    from fusionbook.core.checkpoint import Checkpoint, save
    for n, x in {'a': 1., 'b': 3.}.items(): save({'w': torch.full((2,), x)}, tmp_path/f'{n}.safetensors')
    models = f'{sign}modelpool.models={{a: a.safetensors, b: b.safetensors}}'
    done = here('method=simple_average', models, 'merged_model_save_path=out.safetensors')
    assert done.status == 0, done.err
    assert list(done.report['hashes']['models']) == ['a', 'b'] and Checkpoint(tmp_path / 'out.safetensors')[
        'w'
    ].tolist() == [2, 2]
    refused = here('method=simple_average', models, 'taskpool=mini8')
    assert refused.status == 2 and 'modelpool=folders taskpool=dummy' in refused.line


def test_a_word_keeps_the_names_of_a_list_that_contain_it(here):
    gathered, some = here('list', 'modelpools').out, here('list', 'modelpools', 'resnet18').out
    assert 'resnet18_mnist' not in gathered and 'ResNetForImageClassification/...' in gathered
    assert some.startswith('modelpools (20)') and 'resnet18_mnist' in some
    assert here('list', 'modelpools', 'no such').status == 2


@pytest.mark.parametrize('words', [['list', 'methods'], ['--help'], ['list']])
def test_output_that_nobody_reads_ends_quietly(words, tmp_path):
    "As behind `| head`: no word on standard error, and the status that a shell gives to a closed pipe."
    import os, subprocess
    from conftest import ENTRY
    end, start = os.pipe()
    os.close(end)
    done = subprocess.run(
        [*ENTRY, *words],
        cwd=tmp_path,
        stdout=start,
        stderr=subprocess.PIPE,
        env=os.environ | dict(PYTHONUNBUFFERED='1'),
    )
    os.close(start)
    assert (done.returncode, done.stderr) == (141, b'')
