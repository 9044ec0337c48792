"""What the tests share: a quiet, offline environment; tiny CLIP models and image folders in place of hub
names; the program."""
import json, os, signal, subprocess, sys, tempfile
from dataclasses import dataclass
from pathlib import Path

# before torch, datasets or the hub client are imported, here and in every child
_home = tempfile.TemporaryDirectory(prefix='fusionbook-tests-')
os.environ |= dict(
    HF_HUB_OFFLINE='1',
    HF_HOME=f'{_home.name}/huggingface',
    FUSIONBOOK_CACHE=f'{_home.name}/cache',
    FUSIONBOOK_PROGRESS='none',
    OMP_NUM_THREADS='1',
    OMP_WAIT_POLICY='passive',
    MPLBACKEND='agg',
    COLUMNS='200',
)

import numpy as np
import pytest
import warm

# a shell's background job ignores Ctrl-C, and so would every child
signal.signal(signal.SIGINT, signal.default_int_handler)

ENTRY = [sys.executable, '-c', 'from fusionbook.bench.cli import main; raise SystemExit(main())']
BASE = 'openai/clip-vit-base-patch32'
EXPERTS = {'svhn': 'tanganke/clip-vit-base-patch32_svhn', 'mnist': 'tanganke/clip-vit-base-patch32_mnist'}
TA8 = ('sun397', 'stanford-cars', 'resisc45', 'eurosat', 'svhn', 'gtsrb', 'mnist', 'dtd')


def pytest_configure(config):
    config.addinivalue_line(
        'markers', 'browser: opens JupyterLab in a headless Chromium; `-m "not browser"` leaves it out'
    )


@dataclass
class Result:
    "What the program said."
    status: int
    out: str
    err: str
    cwd: Path
    # up to now
    def __post_init__(self):
        self.runs = sorted((self.cwd / '_runs').glob('*/'), key=lambda f: f.stat().st_mtime_ns)
    @property
    def folder(self): return self.runs[-1]
    @property
    def report(self): return json.loads((self.folder/'report.json').read_text())
    @property
    def line(self):
        "The one line of a refusal."
        lines = self.err.strip().splitlines()
        assert len(lines) == 1 and 'Traceback' not in self.err, self.err
        return lines[0]


def run_program(*args, cwd, timeout=180, anew=False, **env):
    "The program in a process of its own; one that imports everything itself if it is to begin `anew`."
    if anew:
        done = subprocess.run(
            [*ENTRY, *map(str, args)],
            cwd=cwd,
            env=os.environ | env,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    else: done = warm.run(*args, cwd=cwd, env=os.environ | env, timeout=timeout)
    return Result(done.returncode, done.stdout, done.stderr, Path(cwd))


@pytest.fixture
def cli(tmp_path):
    "The program in a process of its own: `cli('list', FUSIONBOOK_CACHE='')`."
    def call(*args, cwd=tmp_path, **kwargs): return run_program(*args, cwd=cwd, **kwargs)
    return call


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    "The program in this process, in an empty folder."
    from fusionbook.bench.cli import main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_NUM_THREADS', '1') # a call with threads=2 sets it; put back afterwards
    def call(*args):
        capsys.readouterr()
        status = main([str(a) for a in args])
        said = capsys.readouterr()
        return Result(status, said.out, said.err, tmp_path)
    return call


def perturbed(state, seed, scale=.05):
    "A copy of a state dict with noise on every float tensor."
    import torch
    g = torch.Generator().manual_seed(seed)
    return {
        k: v + scale * torch.randn(v.shape, generator=g) if v.is_floating_point() else v.clone()
        for k, v in state.items()
    }


def write_images(folder, splits=('train', 'test'), per_class=2, seed=0):
    "A folder split/class/n.png of ten digit classes."
    from PIL import Image
    draw = np.random.default_rng(seed)
    for split in splits:
        for digit in range(10):
            (where := folder/split/str(digit)).mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) // 2 + 12 * digit).save(
                    where / f'{i}.png'
                )
    return folder


def save_tower(state, folder, base):
    "Tensors of a vision tower in the hub's layout, with the configuration of a CLIP; the folder."
    from fusionbook.core.checkpoint import save
    from fusionbook.models.clip import vision_config

    save(
        {f'vision_model.{k}': v for k, v in state.items()},
        folder,
        extras={'config.json': vision_config(base).to_json_string(use_diff=False)},
    )
    return str(folder)


@pytest.fixture(scope='session')
def world(tmp_path_factory):
    """Folders: a tiny CLIP as `base`, two experts as vision towers in the hub's layout, and two sets of
    images."""
    from fusionbook.core.checkpoint import Checkpoint
    from fusionbook.models.clip import tiny_clip
    root = tmp_path_factory.mktemp('world')
    tiny_clip(root/'base', [str(d) for d in range(10)], ['a photo of the number: "{}".'])
    tower = tower_of(root/'base')
    for seed, task in enumerate(EXPERTS, 1):
        save_tower(perturbed(tower, seed), root/task, root/'base')
        write_images(root/f'{task}_images', seed=seed)
    assert len(Checkpoint(root/'svhn')) == len(tower)
    return root


@pytest.fixture(scope='session')
def hub(world):
    "Hub name -> local folder."
    names = (
        {BASE: world / 'base'}
        | {name: world / task for task, name in EXPERTS.items()}
        | {task: world / f'{task}_images' for task in EXPERTS}
    )
    return {k: str(v) for k, v in names.items()}


def mirror(names):
    "The argument `hub_mirror={…}`."
    return 'hub_mirror={' + ','.join(f'{k}: {v}' for k, v in names.items()) + '}'


@pytest.fixture(scope='session')
def two(hub):
    "Arguments of the page's first call, with local models and images."
    return [
        'method=task_arithmetic',
        'modelpool=clip-vit-base-patch32_svhn_and_mnist',
        'taskpool=clip-vit-base-patch32_svhn_and_mnist',
        mirror(hub),
    ]


@pytest.fixture(scope='session')
def first(two, tmp_path_factory):
    "The page's first call, once, as a shell starts it, with an empty cache."
    cwd = tmp_path_factory.mktemp('first')
    return run_program(*two, cwd=cwd, anew=True, FUSIONBOOK_CACHE=str(cwd/'cache'))


def tower_of(folder):
    "All tensors of a saved vision tower."
    from fusionbook.models.clip import vision_state
    return {k: v.clone() for k, v in vision_state(folder).items()}
