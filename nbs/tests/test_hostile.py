"""Files of a stranger: whatever they hold, no code runs, no secret is written, nothing crashes, and what is
refused is refused in one line.

Every case runs in this process, from a seed. A section makes its cases, hands them to `Tally`, and ends with
`tally.check(...)`: add sections below."""
import contextlib, io, itertools, json, os, random, signal, sys, time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

SECRET = 'correct-horse-battery-staple'
CANARY = '''import os
open(os.environ['FUSIONBOOK_HOSTILE_CANARY'], 'a').write('imported ')
def fire(*args, **kwargs): open(os.environ['FUSIONBOOK_HOSTILE_CANARY'], 'a').write('fired ')
class Fire:
    def __init__(self, *args, **kwargs): fire()
'''


class Hung(BaseException):
    "A case took longer than any should."


@contextlib.contextmanager
def soon(seconds=20):
    "What takes longer is stopped."
    def stop(*_): raise Hung(f'more than {seconds} seconds')
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


class Tally:
    """Outcomes of cases: done, refused (one line), raw (an exception that is no refusal), ran (code of a file
    was run)."""

    def __init__(self, name, canary):
        self.name, self.canary, self.counts, self.odd, self.slowest, self.start = (
            name,
            canary,
            Counter(),
            [],
            (0.0, ''),
            time.process_time(),
        )
    def note(self, outcome, case, said=''):
        if self.canary.exists(): outcome = 'ran'
        with contextlib.suppress(FileNotFoundError): self.canary.unlink()
        self.counts[outcome] += 1
        self.slowest = max(self.slowest, (time.process_time() - self.start, case))
        self.start = time.process_time()
        if outcome in ('raw', 'ran', 'leaked'): self.odd.append((outcome, case, said))
    def call(self, case, function):
        "Call what reads a file; a refusal is a `FusionError` or what the system says of a file."
        from fusionbook.core.errors import FusionError
        said = ''
        outcome = 'done'
        try:
            with soon(): function()
        except FusionError as e:
            outcome, said = 'refused', str(e)
            if '\n' in said.strip() or len(said) > 1500: outcome = 'raw'
        except OSError as e: outcome, said = 'refused', str(e)
        except (Exception, Hung) as e: outcome, said = 'raw', f'{type(e).__name__}: {e}'
        self.note(outcome, case, said)
    def line(self, case, *argv):
        "Run the program; its status and its one line tell the outcome."
        from fusionbook.bench.cli import main
        out, err = io.StringIO(), io.StringIO()
        try:
            with soon(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = main([str(a) for a in argv])
        # `main` lets nothing through
        except BaseException as e: return self.note('raw', case, f'{type(e).__name__}: {e}')
        said = err.getvalue().strip()
        lines = [l for l in said.splitlines() if not l.startswith(('note: ', '[transformers]'))]
        outcome = 'done' if status == 0 else 'refused' if status == 2 and len(lines) == 1 else 'raw'
        if SECRET in out.getvalue() + said: outcome = 'leaked'
        self.note(outcome, case, said)
    def check(self, least, raw=.01):
        "No code ran; at least so many cases; at most this share of raw exceptions."
        total = sum(self.counts.values())
        print(
            f'\n{self.name}: {total} cases, ' + ', '.join(f'{n} {k}' for k, n in sorted(self.counts.items()))
        )
        print(f'    slowest: {self.slowest[0]:.1f} s, {self.slowest[1]}')
        for odd in self.odd[:20]: print('   ', *(str(x)[:300] for x in odd))
        assert total >= least
        assert not self.counts['ran'] and not self.counts['leaked'], self.odd[:3]
        assert self.counts['raw'] <= raw * total, self.odd[:3]


@pytest.fixture(scope='session')
def canary(tmp_path_factory):
    "A module that leaves a file when it is imported or called; that file."
    folder = tmp_path_factory.mktemp('canary')
    (folder/'hostile_canary.py').write_text(CANARY)
    old = os.environ.copy()
    os.environ |= dict(
        FUSIONBOOK_HOSTILE_CANARY=str(folder / 'ran'), HOSTILE_SECRET=SECRET, PYTHONDONTWRITEBYTECODE='1'
    )
    sys.path.insert(0, str(folder))
    yield folder/'ran'
    sys.path.remove(str(folder))
    os.environ.clear()
    os.environ.update(old)


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty working folder with two small models, `base` and `a`."
    from fusionbook.core.checkpoint import save
    monkeypatch.chdir(tmp_path)
    for name in ('base', 'a'): save({'w': torch.ones(2)}, name)
    return tmp_path


# ---- configurations

def payloads(canary):
    "Nodes that would run something, if they were built."
    touch = f'touch {canary}'
    python = f'open({str(canary)!r}, "w")'
    yield from (
        {'_target_': t, '_args_': [touch]}
        for t in ('os.system', 'posix.system', 'subprocess.getoutput', 'subprocess.os.system', 'os.popen')
    )
    yield from (
        {'_target_': t, '_args_': [touch], 'shell': True}
        for t in ('subprocess.run', 'subprocess.Popen', 'subprocess.call', 'subprocess.check_output')
    )
    yield from (
        {'_target_': t, '_args_': [python]}
        for t in ('builtins.eval', 'builtins.exec', 'timeit.timeit', 'numpy.f2py.capi_maps.eval')
    )
    yield from (
        {'_target_': t, '_args_': ['hostile_canary']}
        for t in (
            'importlib.import_module',
            'builtins.__import__',
            'runpy.run_module',
            'hydra.utils.get_method',
            'pydoc.locate',
            'fusionbook.core.config.import_module',
            'hydra._internal.utils._locate',
        )
    )
    yield from ({'_target_': t} for t in ('hostile_canary.fire', 'hostile_canary.Fire'))
    yield {'_target_': 'functools.partial', '_args_': [{'_target_': 'os.system', '_partial_': True}, touch]}
    yield {
        '_target_': 'hydra.utils.instantiate',
        'config': {'_target_': 'os.system', '_args_': [touch]},
        '_recursive_': False,
    }
    yield {
        '_target_': 'fusionbook.core.config.instantiate',
        'cfg': {'_target_': 'os.system', '_args_': [touch]},
        'allow': ['os.system'],
    }
    yield {
        '_target_': 'fusionbook.data.datasets.opened',
        'source': {'_target_': 'os.system', '_args_': [touch]},
        'allow': ['os.system'],
        '_recursive_': False,
    }
    yield {
        '_target_': 'fusionbook.bench.cli.main',
        'argv': ['method={_target_: os.system}', 'allow_target=[os.system]'],
    }
    yield {
        '_target_': 'fusionbook.modelpool.BaseModelPool',
        'models': {'x': {'_target_': 'os.system', '_args_': [touch]}},
        'allow_target': ['os.system'],
        '_recursive_': False,
    }
    yield {'_target_': 'transformers.utils.import_utils.importlib.import_module', 'name': 'hostile_canary'}
    yield {'_target_': 'torch.utils.cpp_extension.subprocess.run', 'args': touch, 'shell': True}
    yield {'_target_': 'torch.load', 'f': 'bomb.pt', 'weights_only': False}
    yield {'_target_': 'torch.hub.load', 'repo_or_dir': '.', 'model': 'fire', 'source': 'local'}


def run_of(**changes):
    "A run that works; changed."
    run = {
        'method': {'_target_': 'fusionbook.method.SimpleAverage'},
        'modelpool': {
            '_target_': 'fusionbook.modelpool.BaseModelPool',
            'models': {'_pretrained_': 'base', 'a': 'a'},
        },
    }
    return run | {'print_config': False} | changes


def pool_of(**changes): return run_of()['modelpool'] | changes


def hidden(node, draw):
    "The node inside something harmless."
    for _ in range(draw.randrange(3)):
        node = draw.choice(
            [
                lambda n: [n],
                lambda n: {'x': n},
                lambda n: {'_target_': 'torch.tensor', 'data': n},
                lambda n: {'a': 1, 'b': [n]},
            ]
        )(node)
    return node


def doors(node, draw):
    "Configurations in which the node stands wherever one can."
    clip = 'fusionbook.taskpool.CLIPVisionModelTaskPool'
    yield 'method', run_of(method=node)
    yield (
        'method field',
        run_of(method={'_target_': 'fusionbook.method.WeightedAverage', 'weights': hidden(node, draw)}),
    )
    yield 'model', run_of(modelpool=pool_of(models={'_pretrained_': 'base', 'a': node}))
    yield 'models', run_of(modelpool=pool_of(models=hidden(node, draw)))
    yield 'pool', run_of(modelpool=node)
    yield (
        'recursive',
        run_of(modelpool=pool_of(models={'a': hidden(node, draw), '_pretrained_': 'base'}, _recursive_=True)),
    )
    yield (
        'data',
        run_of(
            modelpool=pool_of(
                **{draw.choice(['train', 'val', 'test']) + '_datasets': {'a': hidden(node, draw)}}
            )
        ),
    )
    yield 'taskpool', run_of(taskpool=node)
    yield (
        'tasks',
        run_of(
            taskpool={
                '_target_': clip,
                'test_datasets': {'a': hidden(node, draw)},
                'clip_model': 'base',
                'processor': 'base',
            }
        ),
    )
    yield (
        'processor',
        run_of(
            taskpool={
                '_target_': clip,
                'test_datasets': {'a': 'x'},
                'clip_model': hidden(node, draw),
                'processor': node,
            }
        ),
    )
    yield (
        'legacy data',
        run_of(
            taskpool={
                'type': 'clip_vit_classification',
                'tasks': [{'name': 'a', 'dataset': {'type': 'instantiate', 'name': 'a', 'object': node}}],
                'clip_model': 'base',
            }
        ),
    )
    yield (
        'root',
        run_of(
            **{draw.choice(['seed', 'dtype', 'hub_mirror', 'allow_target', 'device', 'path', 'fabric']): node}
        ),
    )


def hydras(node, draw):
    "What Hydra would build by itself: (name, file, further files)."
    log = {
        'version': 1,
        'handlers': {'h': {'()': node['_target_'], **{k: v for k, v in node.items() if k[0] != '_'}}},
        'root': {'handlers': ['h'], 'level': 'DEBUG'},
        'disable_existing_loggers': False,
    }
    blocks = {
        'callbacks': {'evil': node},
        'launcher': node,
        'sweeper': node,
        'job_logging': log,
        'hydra_logging': log,
        'searchpath': ['pkg://hostile_canary'],
        'job': {'env_set': {'LD_PRELOAD': '/tmp/x.so'}},
        'mode': 'MULTIRUN',
        'run': {'dir': f'{node["_target_"]}'},
    }
    for key, block in blocks.items():
        yield f'hydra.{key}', run_of(hydra={key: block}), {}
        text = yaml.safe_dump(block if isinstance(block, dict) else {key: block})
        yield (
            f'package hydra.{key}',
            run_of(defaults=[{'evil': 'x'}, '_self_']),
            {'evil/x.yaml': f'# @package hydra.{key}\n{text}'},
        )
        yield (
            f'global {key}',
            run_of(defaults=[{'evil': 'x'}, '_self_']),
            {'evil/x.yaml': '# @package _global_\n' + yaml.safe_dump({'hydra': {key: block}})},
        )
        yield f'moved {key}', run_of(defaults=[{f'evil@hydra.{key}': 'x'}, '_self_']), {'evil/x.yaml': text}
        yield (
            f'override {key}',
            run_of(defaults=['_self_', {f'override hydra/{key}': 'x'}]),
            {f'hydra/{key}/x.yaml': text},
        )


def sly(node, draw):
    "Texts that would become a target after a second reading, and functions that a file may not call."
    inner = '{' + ', '.join(f'{k}: {json.dumps(v)}' for k, v in node.items()) + '}'
    texts = [
        r'\${oc.create:%s}' % inner,
        '${oc.create:%s}' % inner,
        r'\\\${oc.create:%s}' % inner,
        "${oc.decode:'%s'}" % inner.replace("'", ''),
        '${oc.env:HOSTILE_SECRET}',
        r'\${oc.env:HOSTILE_SECRET}',
        '${oc.env:${oc.select:name}}',
        '${oc.${kind}:%s}' % inner,
        '${eval:1}',
        '${hydra:callbacks}',
        '${oc.select:"${oc.env:HOSTILE_SECRET}"}',
        '${oc.deprecated:method}',
        '${oc.env:NOWHERE,${oc.env:HOSTILE_SECRET}}',
        '${oc.dict.values:${oc.create:%s}}' % inner,
        '${now:${oc.env:HOSTILE_SECRET}}',
        '${a}${b',
    ]
    for text in draw.sample(texts, 4):
        yield 'text as method', run_of(method=text, name='HOSTILE_SECRET', kind='create')
        yield (
            'text as target',
            run_of(method={'_target_': text}, path={'kind': 'env', 'name': 'HOSTILE_SECRET'}),
        )
        yield 'text as model', run_of(modelpool=pool_of(models={'_pretrained_': 'base', 'a': text}))
        yield 'text as place', run_of(**{draw.choice(['save_report', 'merged_model_save_path']): text})
        yield 'text in a list', run_of(modelpool=pool_of(models=[text, hidden(text, draw)]))


def selves(node, draw):
    "Files that vouch for themselves."
    target, word = (
        node['_target_'],
        draw.choice([lambda t: [t], lambda t: t, lambda t: '${path.t}', lambda t: {'a': t}]),
    )
    yield 'allow', run_of(method=node, allow_target=word(target), path={'t': [target]}), {}
    yield (
        'allow in pool',
        run_of(modelpool=pool_of(models={'_pretrained_': 'base', 'a': node}, allow_target=[target])),
        {},
    )
    yield (
        'allow in tasks',
        run_of(
            taskpool={
                '_target_': 'fusionbook.taskpool.ClassificationTaskPool',
                'test_datasets': {'a': node},
                'allow_target': [target],
            }
        ),
        {},
    )
    yield (
        'allow in group',
        run_of(defaults=[{'evil': 'x'}, '_self_'], method=node),
        {'evil/x.yaml': '# @package _global_\n' + yaml.safe_dump({'allow_target': [target]})},
    )
    yield (
        'allow by package',
        run_of(defaults=[{'evil@allow_target': 'x'}, '_self_'], method=node),
        {'evil/x.yaml': yaml.safe_dump({target: 1})},
    )
    yield (
        'env',
        run_of(
            allow_env=True,
            modelpool=pool_of(models={'_pretrained_': 'base', 'a': '${oc.env:HOSTILE_SECRET}'}),
        ),
        {},
    )


def loaders(draw):
    "Keywords that a file may not give to what loads a model or data."
    classes = 'AutoModel CLIPVisionModel AutoTokenizer AutoConfig CLIPProcessor AutoModelForCausalLM'.split()
    hub = {'_target_': f'transformers.{draw.choice(classes)}.from_pretrained'}
    odd = [
        {'trust_remote_code': True},
        {'trust_remote_code': 'yes'},
        {'TRUST_REMOTE_CODE': 1},
        {'weights_only': False},
        {'use_safetensors': False},
        {'code_revision': 'main'},
        {'_partial_': True},
        {
            'config': {
                '_target_': 'transformers.AutoConfig.from_pretrained',
                '_args_': ['remote'],
                'trust_remote_code': True,
            }
        },
        {'state_dict': {'_target_': 'torch.load', 'f': 'bomb.pt'}},
        {'quantization_config': {'load_in_8bit': True}},
        {'attn_implementation': 'stranger/kernel'},
        {'use_kernels': True},
        {'gguf_file': 'x'},
        {'adapter_kwargs': {'trust_remote_code': True}},
        {},
    ]
    for more in odd:
        node = hub | draw.choice([{'pretrained_model_name_or_path': 'remote'}, {'_args_': ['remote']}]) | more
        yield (
            f'hub {list(more)}',
            run_of(
                modelpool=pool_of(
                    models={'_pretrained_': 'base', 'a': draw.choice([node, hidden(node, draw)])}
                )
            ),
        )
    for more in (
        {'trust_remote_code': True},
        {'features': {'_target_': 'os.getcwd'}},
        {'storage_options': {}},
        {'download_config': {}},
        {'dl_manager': 1},
        {'builder_kwargs': {}},
        {'token': True},
    ):
        node = {
            '_target_': 'datasets.load_dataset',
            'path': draw.choice(['remote', 'pandas', './remote/script.py']),
            'split': 'test',
        } | more
        yield (
            f'data {list(more)}',
            run_of(
                taskpool={
                    '_target_': 'fusionbook.taskpool.ClassificationTaskPool',
                    'test_datasets': {'a': node},
                    'inputs': {},
                }
            ),
        )
    for node in (
        {'_target_': 'torch.zeros', '_args_': [10**6, 10**6]},
        {'_target_': 'torch.eye', 'n': 10**7},
        {'_target_': 'torch.full', 'size': [10**12], 'fill_value': 0},
        {'_target_': 'torch.tensor', 'data': 1, 'dtype': 'x'},
    ):
        yield (
            'size',
            run_of(modelpool=pool_of(models={'_pretrained_': 'base', 'a': {'w': node}}, _recursive_=True)),
        )


def texts(canary):
    "YAML that is no tree of plain values, or unfolds without end."
    chain = 'a0: &a0 [x, x]\n' + ''.join(f'a{i}: &a{i} [*a{i-1}, *a{i-1}]\n' for i in range(1, 60))
    doubled = 'a0: x\n' + ''.join(f'a{i}: "${{a{i-1}}}${{a{i-1}}}"\n' for i in range(1, 60))
    tags = [
        '!!python/object/apply:os.system ["touch %s"]' % canary,
        '!!python/name:os.system',
        '!!python/module:hostile_canary',
        '!!python/object/new:hostile_canary.Fire []',
        '!!binary aaaa',
        '!!set {a}',
        '!x y',
    ]
    odd = [
        '- a',
        'word',
        '1',
        'null',
        '',
        '{',
        'a: [',
        'a: 1\na: 2',
        'x: *y',
        '\t',
        'a: &a [*a]',
        '[' * 5000,
        '{a: ' * 5000,
        '- ' * 5000,
        '"',
        'a: ' + '9' * 6000,
        '? [a, b]\n: c',
        '1: 2',
        'null: 1',
        '2026-01-01: 3',
        '\x00',
        'a: b: c',
        '&a a: *a',
        '<<: *b',
        'a: &b {c: 1}\nd: {<<: *b}',
        '%YAML 9.9\n---\na: 1',
        '--- a\n--- b',
        '---\na: 1\n---\nb: 2',
        'seed: .nan',
        'seed: 1e999',
        'seed: 0x10',
        'seed: 10:20',
        'seed: ???',
    ]
    keys = [
        'method',
        'modelpool',
        'taskpool',
        'seed',
        'seeds',
        'hub_mirror',
        'allow_target',
        'defaults',
        'hydra',
        'dtype',
        'device',
        'save_report',
        'merged_model_save_path',
        'shard_size',
    ]
    yield from (
        ('text', t)
        for t in [
            chain,
            doubled,
            *odd,
            *(f'method: {t}' for t in tags),
            *(f'modelpool: {{models: {t}}}' for t in tags),
        ]
    )
    good = yaml.safe_dump(run_of())
    for key, value in itertools.product(
        keys, ['null', '[]', '{}', '[[1]]', '{a: {b: c}}', '-1', 'yes', '"${x}"', '~']
    ):
        yield (
            f'{key} {value}',
            '\n'.join(
                [l for l in yaml.safe_dump({k: v for k, v in run_of().items() if k != key}).splitlines()]
                + [f'{key}: {value}']
            ),
        )
    yield 'latin', good.encode() + b'# \xe9\xff'
    yield 'utf-16', good.encode('utf-16')
    yield 'large', good + '#' * 5_000_000


def configurations(canary, seed):
    "Every case of this section: (name, text of the run's file, further files)."
    draw, nodes = random.Random(seed), list(payloads(canary))
    for node in nodes:
        for name, run in doors(node, draw): yield name, run, {}
    for node in draw.sample(nodes, 2): yield from hydras(node, draw)
    for node in draw.sample(nodes, 4):
        for name, run in sly(node, draw): yield name, run, {}
        yield from selves(node, draw)
    for _ in range(2):
        for name, run in loaders(draw): yield name, run, {}
    for name, text in texts(canary): yield name, text, {}


def test_configurations(place, canary):
    from fusionbook.bench.cli import main
    tally = Tally('configurations', canary)
    # a typed word may not either, without allow_target
    assert main(['method={_target_: hostile_canary.Fire}', 'modelpool=mini8']) == 2
    Path('remote').mkdir()
    for name in ('config.json', 'tokenizer_config.json', 'preprocessor_config.json', 'processor_config.json'):
        Path('remote', name).write_text(
            json.dumps(
                {
                    'model_type': 'clip',
                    'auto_map': {
                        k: 'script.Fire'
                        for k in (
                            'AutoConfig',
                            'AutoModel',
                            'AutoTokenizer',
                            'AutoProcessor',
                            'AutoModelForCausalLM',
                        )
                    },
                }
            )
        )
    for name in ('script.py', 'remote.py', 'hubconf.py'): Path('remote', name).write_text(CANARY)
    Path('hubconf.py').write_text(CANARY)
    torch.save({'w': 1}, 'bomb.pt')
    for i, (name, run, files) in enumerate(configurations(canary, seed=11)):
        folder = Path(f'case{i}')
        for file, text in (
            files | {'run.yaml': run if isinstance(run, (str, bytes)) else yaml.safe_dump(run)}
        ).items():
            (folder/file).parent.mkdir(parents=True, exist_ok=True)
            (folder/file).write_bytes(text if isinstance(text, bytes) else text.encode())
        tally.line(
            f'{i} {name}',
            folder / 'run.yaml',
            *(['-m'] if i % 5 == 0 else []),
            *(['dry_run=true'] if i % 3 == 0 else []),
        )
    for file in Path('_runs').rglob('*'):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
    tally.check(least=500)


def test_the_canary_sings(place, canary):
    "With the user's word the same file does run: the cases above would have been noticed."
    from fusionbook.bench.cli import main

    Path('run.yaml').write_text(
        yaml.safe_dump(
            run_of(
                modelpool=pool_of(models={'_pretrained_': 'base', 'a': {'_target_': 'hostile_canary.fire'}})
            )
        )
    )
    main(['run.yaml', 'allow_target=[hostile_canary.fire]'])
    assert canary.read_text().endswith('fired ')
    canary.unlink()
    sys.modules.pop('hostile_canary')


# ---- files beside a model, reports, pictures

def damaged_json(good, draw):
    "Texts made from a good one: cut, flipped, of other types, nested, not text at all."
    text = json.dumps(good)
    kind = draw.randrange(9)
    if kind == 0: return text[:draw.randrange(len(text))].encode()
    if kind == 1:
        data = bytearray(text.encode())
        for _ in range(3): data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    if kind == 2:
        return draw.choice(
            [
                b'',
                b'null',
                b'[]',
                b'1',
                b'"x"',
                b'[' * 100_000,
                b'{"a":' * 50_000,
                b'\xff\xfe{}',
                b'{"a": ' + b'9' * 10_000 + b'}',
                b'{}\x00',
                b'NaN',
            ]
        )
    changed = json.loads(text)
    for _ in range(draw.choice([1, 1, 3])):
        node = changed
        while True:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < .4: break
            node = node[key]
        node[key] = draw.choice(
            [
                None,
                -1,
                0,
                2**70,
                1e308,
                'x',
                '../../x',
                [],
                {},
                [[]],
                {'a': 1},
                True,
                'nan',
                '${oc.env:HOSTILE_SECRET}',
                {'auto_map': {'AutoConfig': 'script.Fire'}},
            ]
        )
    if kind >= 7 and isinstance(changed, dict):
        changed['auto_map'] = {
            k: 'script.Fire'
            for k in ('AutoConfig', 'AutoModel', 'AutoTokenizer', 'AutoProcessor', 'AutoImageProcessor')
        }
    return json.dumps(changed).encode()


class Pickled:
    "Unpickled, it is noticed."
    def __reduce__(self): return __import__('importlib').import_module, ('hostile_canary',)


@pytest.fixture(scope='module')
def models(world, tmp_path_factory):
    "A small CLIP and a small sentence encoder; every JSON file of theirs."
    from fusionbook.models.text import tiny_text
    text = tiny_text(tmp_path_factory.mktemp('text')/'text', ['one two three', 'four five'])
    return {'clip': world/'base', 'text': text}


def readers(folder, kind):
    "What the book does with a folder of that kind."
    from fusionbook.models.clip import Processor, text_features, vision_model, vision_state
    from fusionbook.models.text import Tokens, text_model, text_state

    if kind == 'text':
        return [lambda: text_state(folder), lambda: text_model(folder), lambda: Tokens(folder)(['one two'])]
    return [
        lambda: vision_state(folder),
        lambda: vision_model(folder),
        lambda: Processor(folder),
        lambda: text_features(folder, ['one']),
    ]


def test_files_beside_a_model(models, place, canary, monkeypatch):
    import shutil
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(place/'cache'))
    # whoever asks would be told yes
    monkeypatch.setattr('builtins.input', lambda *_: (canary.write_text('asked'), 'y')[1])
    tally, draw = Tally('files beside a model', canary), random.Random(5)
    for kind, source in models.items():
        files = sorted(
            f.name for f in source.glob('*.json') if f.name not in ('tokenizer.json', 'vocab.json')
        )
        for i in range(40):
            for name in files:
                folder = place/'odd'
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(source, folder)
                (folder/'script.py').write_text(CANARY)
                (folder/name).write_bytes(damaged_json(json.loads((source/name).read_text()), draw))
                for j, read in enumerate(readers(folder, kind)):
                    if j == i % 4 or name.startswith('tokenizer') and j > 1:
                        tally.call(f'{kind} {name} {i} {j}', read)
    tally.check(least=150)


def test_reports_pickles_and_pictures(place, canary):
    import pickle
    from PIL import Image
    from fusionbook.bench.report import read_report
    from fusionbook.core.checkpoint import Checkpoint, save
    from fusionbook.data.datasets import opened
    from fusionbook.method import WeightedAverage
    tally, draw = Tally('reports, pickles, pictures', canary), random.Random(6)
    row = dict(
        model='merged',
        role='merged',
        task='a',
        accuracy=0.5,
        loss=1.0,
        n=10,
        low=0.2,
        high=0.8,
        normalised_accuracy=1.0,
    )
    good = dict(
        rows=[row, row | {'task': 'b'}],
        method='x',
        config={'method': {}},
        average={'accuracy': 0.5, 'loss': 1.0},
        uses=['experts'],
        versions={},
        hashes={'data': {'a': 'x'}, 'models': {}},
    )
    tidy = dict(
        model='merged', role='merged', seed=None, step=None, metric='ppl', value=5.0, low=2.0, high=8.0, n=10
    )
    fact = dict(
        name='ppl',
        scores='losses',
        higher_is_better=False,
        interval='mean',
        link='exp',
        unit='',
        scale=1,
        decimals=2,
    )
    today = good | dict(rows=[tidy | {'task': t} for t in 'ab'], metrics=[fact], primary='ppl')
    for i in range(300):
        Path('report.json').write_bytes(damaged_json(today if i % 2 else good, draw))
        tally.call(f'report {i}', lambda: read_report('report.json'))
    bomb = pickle.dumps(Pickled())
    torch.save({'w': Pickled()}, 'modern.bin')
    modern = Path('modern.bin').read_bytes()
    for i in range(100):
        data = bytearray(draw.choice([bomb, modern]))
        for _ in range(draw.randrange(3)): data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file = Path(draw.choice(['m.bin', 'm.pt', 'm.pth', 'm.ckpt', 'm.safetensors', 'm.npy']))
        file.write_bytes(bytes(data))
        tally.call(
            f'pickle {i} {file}',
            (lambda: WeightedAverage(weights=str(file)).config)
            if file.suffix == '.npy'
            else lambda: dict(Checkpoint(file)),
        )
    index = {'metadata': {'total_size': 8}, 'weight_map': {'w': 'model-00001-of-00001.safetensors'}}
    save({'w': torch.ones(2)}, 'parts/model-00001-of-00001.safetensors')
    for i in range(150):
        Path('parts/model.safetensors.index.json').write_bytes(damaged_json(index, draw))
        tally.call(f'index {i}', lambda: dict(Checkpoint('parts')))
    for i in range(30):
        folder = Path(f'pictures{i}')
        for c in 'ab':
            (folder/'test'/c).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(folder/'test'/c/'0.png')
        data = bytearray((folder/'test'/'a'/'0.png').read_bytes())
        for _ in range(8): data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (folder / 'test' / 'a' / '0.png').write_bytes(
            draw.choice([bytes(data), bytes(data[:20]), b'', bomb, b'GIF89a', b'<svg/>'])
        )
        tally.call(f'picture {i}', lambda: [r['image'] for r in opened(str(folder))])
    tally.check(least=450)
