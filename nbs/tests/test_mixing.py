"""Mixtures are folders: every one answers with the same bytes in a process that has never seen its experts,
and a folder that was changed is refused in one line."""
import hashlib
import json
import shutil
from dataclasses import fields

import pytest
import torch
import warm

import fusionbook
from fusionbook.core.errors import FusionError
from fusionbook.method.base import fuse
from fusionbook.method.check import toy_data_pool
from fusionbook.method.map import family_methods

SMALL = dict(max_steps=2, batch_size=8, k=2, rank_k=2, rank_of_expert=2)
FAMILIES = 'smile_upscaling', 'wemoe', 'rankone_moe'   # those that take any network
METHODS = [
    c
    for c in family_methods('fusionbook.method.mixing')
    if c.build and c.config_names[0].split('/')[0] in FAMILIES
]
READER = '''
import hashlib, sys, torch, fusionbook
x = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    for path in sys.argv[2:]: print(hashlib.sha256(fusionbook.open_model(path)(x).numpy().tobytes()).hexdigest())
'''


def build(cls):
    "A small mixture of three toy experts."
    return fuse(cls(**{f.name: SMALL[f.name] for f in fields(cls) if f.name in SMALL}), toy_data_pool())


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Method -> its mixture and the folder that keeps it."
    room = tmp_path_factory.mktemp('mixtures')
    made = {c.__name__: build(c) for c in METHODS}
    return {n: (net, toy_data_pool().save_model(net, room/n, built=True)) for n, net in made.items()}


def test_the_same_bytes_in_a_fresh_process(folders, tmp_path):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path/'x.pt')
    with torch.no_grad():
        here = {n: hashlib.sha256(net(x).numpy().tobytes()).hexdigest() for n, (net, _) in folders.items()}
    done = warm.run(tmp_path/'x.pt', *[p for _, p in folders.values()], code=READER, cwd=tmp_path, check=True)
    assert dict(zip(here, done.stdout.split(), strict=True)) == here
    assert all(
        (path / 'config.json').exists() and (path / 'fusionbook.json').exists()
        for _, path in folders.values()
    )


def changed(path, to, change):
    "A copy of a mixture's folder with another recipe."
    folder = shutil.copytree(path, to)
    told = json.loads((folder/'fusionbook.json').read_text())
    (folder/'fusionbook.json').write_text(json.dumps(change(told)))
    return folder


def with_tasks(told, tasks):
    told['network']['tasks'] = tasks
    return told


@pytest.mark.parametrize('change, message', [
    (lambda told: told | dict(format=99), 'another version'),
    (lambda told: with_tasks(told, ['0', '1']), 'not ('),
    (lambda told: with_tasks(told, list('0123')), 'not ('),
])
def test_a_recipe_that_says_something_else_is_refused(folders, tmp_path, change, message):
    "Another version, or gates and experts for other tasks."
    for name, (net, path) in folders.items():
        # as many as its plan says, whatever the tasks are called
        if any('experts' in g for g in net.plan['gates'].values()): continue
        with pytest.raises(FusionError) as e: fusionbook.open_model(changed(path, tmp_path/name, change))
        assert message in str(e.value) and '\n' not in str(e.value), (name, str(e.value))


def test_a_folder_without_its_recipe_is_refused(folders, tmp_path):
    "Its `config.json` does not pass for the base's."
    for name, (_, path) in folders.items():
        folder = shutil.copytree(path, tmp_path/name)
        (folder/'fusionbook.json').unlink()
        with pytest.raises(FusionError) as e: fusionbook.open_model(folder)
        assert '\n' not in str(e.value)


def test_numbers_that_are_none_are_not_saved(folders, tmp_path):
    "A gate with NaN never becomes a folder."
    net = build(next(c for c in METHODS if c.__name__ == 'SmileUpscaling'))
    with torch.no_grad(): next(iter(net.gates.parameters())).fill_(torch.nan)
    with pytest.raises(FusionError, match='expected finite'):
        toy_data_pool().save_model(net, tmp_path / 'nan', built=True)
    with pytest.raises(FusionError, match='finite gates'): net(torch.ones(2, 6))
