"""Damaged model files, seeded: headers, indices, pickles, configurations. A merge with one gives the right
numbers or one line that names the file; never other numbers."""
import json, random, shutil, struct, zipfile
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from fusionbook.core.errors import FusionError
from fusionbook.method import SimpleAverage, TaskArithmetic
from fusionbook.modelpool import BaseModelPool

g = torch.Generator().manual_seed(0)
GOOD = {
    'embed.weight': torch.randn(40, 8, generator=g),
    'layer.weight': torch.randn(8, 8, generator=g),
    'layer.bias': torch.randn(8, generator=g),
    'norm': torch.randn(8, generator=g).bfloat16(),
    'steps': torch.tensor(3),
    'mask': torch.tensor([True, False]),
}
BASE = {k: torch.zeros_like(t) if t.is_floating_point() else t for k, t in GOOD.items()}
RIGHT = {k: (t.float() / 2).to(t.dtype) if t.is_floating_point() else t for k, t in GOOD.items()}
JUNK = [
    '',
    '{',
    '[]',
    'null',
    '3',
    '"x"',
    '{"a": }',
    '[' * 50_000,
    '{"a": NaN',
    '\x00\x01',
    '{"a": ' + '9' * 5000 + '}',
    '{"weight_map": 3}',
]


class Tally:
    "What became of every case."
    def __init__(self): self.counts, self.odd = Counter(), []
    def merge(self, case, path):
        "Merge the base with what lies at `path`."
        try:
            merged = TaskArithmetic(.5).run(BaseModelPool({'_pretrained_': BASE, 'a': str(path)}))
            outcome, said = (
                ('right', '')
                if merged.keys() == RIGHT.keys() and all(torch.equal(merged[k], v) for k, v in RIGHT.items())
                else ('wrong', '')
            )
        except FusionError as e:
            outcome, said = ('refused' if '\n' not in str(e) and len(str(e)) < 1500 else 'raw'), str(e)
        except Exception as e:
            outcome, said = 'raw', f'{type(e).__name__}: {e}'
        self.counts[outcome] += 1
        if outcome in ('wrong', 'raw'): self.odd.append((case, outcome, said[:200]))
    def check(self, at_least):
        total = sum(self.counts.values())
        print(dict(self.counts), self.odd)
        assert total >= at_least and not self.counts['wrong'] and self.counts['raw'] <= total / 100, (
            self.counts,
            self.odd,
        )
        assert self.counts['refused'] > total / 3, self.counts


@pytest.fixture
def tally(): return Tally()


def flipped(data, draw, first, last):
    "One to three bytes between two places replaced."
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)): data[draw.randrange(first, last)] = draw.randrange(256)
    return bytes(data)


def headers(data):
    "Headers of a safetensors file that contradict themselves: a word about each, and the bytes."
    size, = struct.unpack('<Q', data[:8])
    table, body = json.loads(data[8:8 + size]), data[8 + size:]
    def packed(t, rest=body, claim=None):
        text = (t if isinstance(t, str) else json.dumps(t)).encode()
        return struct.pack('<Q', len(text) if claim is None else claim) + text + rest
    def entry(name, **new): return packed(table | {name: table[name] | new})
    w, end = table['layer.weight'], len(body)
    yield 'the whole file', packed(table)
    for n in (0, 1, 7, 8, 9, size - 1, size, len(data) // 2, len(data) - 1): yield f'cut at {n}', data[:n]
    for n in (1, 8, 100): yield f'{n} bytes more', data + b'\0' * n
    for claim in (0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1):
        yield f'header of {claim} bytes', packed(table, claim=claim)
    for text in JUNK: yield f'header {text:.10}', packed(text)
    for shape in ([], [64], [8, 9], [4, 8], [-8, -8], [8.0, 8], ['8', 8], [2**63, 2], [0], None, 8):
        yield f'shape {shape}', entry('layer.weight', shape=shape)
    for dtype in ('F64', 'F16', 'I64', 'F4', 'F8_E4M3', 'f32', '', None, 32, 'X' * 1000):
        yield f'type {dtype}', entry('layer.weight', dtype=dtype)
    a, b = w['data_offsets']
    for at in (
        [b, a],
        [a, b + 4],
        [a + 4, b + 4],
        [0, b - a],
        [end, end + b - a],
        [-4, 252],
        [a],
        [],
        None,
        [a, b, b],
        [a, 2**64],
    ):
        yield f'place {at}', entry('layer.weight', data_offsets=at)
    for name in table:
        if name != '__metadata__':
            yield f'without {name}', packed({k: v for k, v in table.items() if k != name})
    yield (
        'a tensor twice',
        packed(json.dumps(table)[:-1] + ', "layer.bias": ' + json.dumps(table['norm']) + '}'),
    )
    for tied in (
        'true',
        '{"head": "head"}',
        '{"layer.weight": "embed.weight"}',
        '{"a": "b", "b": "a"}',
        '{"x": 3}',
        '[' * 50_000,
        '{"norm": "layer.bias"}',
        '{"head": "nowhere"}',
    ):
        yield f'tied {tied:.30}', packed({'__metadata__': {'tied': tied}} | table)
    for notes in ({'n': 0}, None, [], 'x', {'format': 'pt', 'format2': 'ü'}):
        yield f'metadata {notes}', packed({'__metadata__': notes} | table)


def test_headers(tmp_path, tally):
    save_file(GOOD, tmp_path/'good.safetensors')
    data, draw, file = (tmp_path/'good.safetensors').read_bytes(), random.Random(0), tmp_path/'a.safetensors'
    size, = struct.unpack('<Q', data[:8])
    offsets = data.index(b'offsets')
    cases = [
        *headers(data),
        *((f'flip {i}', flipped(data, draw, 0, 8)) for i in range(20)),
        *((f'flip text {i}', flipped(data, draw, 8, 8 + offsets)) for i in range(20)),
    ]
    for case, changed in cases:
        file.write_bytes(changed)
        tally.merge(case, file)
    tally.check(120)


def indices(promise):
    "Texts of an index, each with a word about it."
    first, second = sorted(set(promise.values()))
    def text(table, **more): return json.dumps({'metadata': {}, 'weight_map': table} | more)
    yield 'as it was', text(promise)
    for junk in JUNK: yield f'junk {junk:.10}', junk
    for table in (None, [], {}, 'x', 3, {'w': None}, {'w': ['a']}, {'w': {}}):
        yield f'map {table}', text(table)
    for shard in (
        '../good.safetensors',
        '/etc/passwd',
        '',
        '.',
        '\0',
        'x\0.safetensors',
        'a' * 300,
        'nowhere.safetensors',
        '..\\x',
        second + '/',
        first.upper(),
    ):
        yield f'shard {shard[:20]!r}', text(promise | {'norm': shard})
    for name, shard in promise.items():
        yield f'{name} in the other', text(promise | {name: first if shard == second else second})
        yield f'{name} not named', text({k: v for k, v in promise.items() if k != name})
    yield 'lost', text(promise | {'lost': first})
    yield 'all in one', text(dict.fromkeys(promise, first))
    whole = text(promise)
    for n in range(1, len(whole), len(whole) // 12): yield f'cut at {n}', whole[:n]


def test_indices(tmp_path, tally):
    names = sorted(GOOD)
    parts = {f'model-0000{i + 1}-of-00002.safetensors': names[i::2] for i in range(2)}
    for file, own in parts.items(): save_file({k: GOOD[k] for k in own}, tmp_path/file)
    index = tmp_path/'model.safetensors.index.json'
    promise = {k: f for f, own in parts.items() for k in own}
    for case, text in indices(promise):
        index.write_text(text)
        tally.merge(case, tmp_path)
    index.write_text(json.dumps({'weight_map': promise}))
    last = tmp_path/'model-00002-of-00002.safetensors'
    for case, spoil in {
        'a stale single file': lambda: save_file(BASE, tmp_path / 'model.safetensors'),
        'a stale shard': lambda: save_file(BASE, tmp_path / 'model-00003-of-00003.safetensors'),
        'a tensor twice': lambda: save_file(
            {k: GOOD[k] if k in parts[last.name] else BASE[k] for k in GOOD}, last
        ),
        'a shard cut': lambda: last.write_bytes(last.read_bytes()[:-8]),
        'an empty shard': lambda: last.write_bytes(b''),
        'a folder': lambda: (last.unlink(), last.mkdir()),
        'no shard': lambda: last.rmdir() if last.is_dir() else last.unlink(),
        'a link to nowhere': lambda: last.symlink_to(tmp_path / 'nowhere'),
    }.items():
        spoil()
        tally.merge(case, tmp_path)
        for extra in ('model.safetensors', 'model-00003-of-00003.safetensors'):
            (tmp_path / extra).unlink(missing_ok=True)
    tally.check(60)


def rewritten(source, target, change=lambda name, data: data, how=zipfile.ZIP_STORED, drop=(), twice=()):
    "A copy of an archive with other records and right checksums."
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, 'w', how) as b:
        for r in a.infolist():
            if any(r.filename.endswith(d) for d in drop): continue
            for _ in range(2 if any(r.filename.endswith(t) for t in twice) else 1):
                b.writestr(r.filename, change(r.filename, a.read(r)))


@pytest.mark.filterwarnings('ignore')
def test_pickles(tmp_path, tally):
    good, file, draw = tmp_path/'good.pth', tmp_path/'a.pth', random.Random(0)
    torch.save(GOOD, good)
    data = good.read_bytes()
    with zipfile.ZipFile(good) as z: records = {r.filename.split('/', 1)[1]: r for r in z.infolist()}
    lengths = {n: r.file_size for n, r in records.items() if n.startswith('data/')}
    for name, length in lengths.items():
        for size in {0, 1, length // 2, length - 1, length + 1, 2 * length}:
            rewritten(good, file, lambda n, d: (d * 3)[:size] if n.endswith(name) else d)
            tally.merge(f'{name} of {size} bytes', file)
    for name in records:
        rewritten(good, file, drop=[name])
        tally.merge(f'without {name}', file)
        rewritten(good, file, twice=[name])
        tally.merge(f'{name} twice', file)
    rewritten(good, file, how=zipfile.ZIP_DEFLATED)
    tally.merge('compressed', file)
    rewritten(good, file, lambda n, d: b'big' if n.endswith('byteorder') else d)
    for n in [0, 1, 3, 4, 5, 30, *range(50, len(data), len(data) // 20), len(data) - 1]:
        file.write_bytes(data[:n])
        tally.merge(f'cut at {n}', file)
    table = records['data.pkl'].header_offset
    for i in range(40):
        file.write_bytes(flipped(data, draw, table, table + 600))
        tally.merge(f'flip {i}', file)
    torch.save(GOOD, good, _use_new_zipfile_serialization=False)
    old = good.read_bytes()
    for n in [2, 10, *range(50, len(old), len(old) // 12), len(old) - 1]:
        file.write_bytes(old[:n])
        tally.merge(f'old format cut at {n}', file)
    for case, what in {
        'list': [GOOD],
        'number': 3,
        'nothing': None,
        'empty': {},
        'two': {'model': GOOD, 'ema': BASE},
        'numbers': {**GOOD, 'epoch': 3},
        'wrapped': {'net': GOOD, 'epoch': 3},
        'by number': dict(enumerate(GOOD.values())),
        'sparse': GOOD | {'layer.weight': GOOD['layer.weight'].to_sparse()},
        'prefixed': {f'module.{k}': v for k, v in GOOD.items()},
        'half prefixed': {k if k == 'norm' else f'module.{k}': v for k, v in GOOD.items()},
        'codes': GOOD | {'layer.weight': torch.ones(8, 8, dtype=torch.int8)},
        'not a number': GOOD | {'norm': torch.full((8,), torch.nan).bfloat16()},
        'view': GOOD | {'layer.weight': GOOD['layer.weight'].T.contiguous().T},
    }.items():
        torch.save(what, file)
        tally.merge(case, file)
    tally.check(150)


def test_configurations(tmp_path, tally):
    folder = tmp_path/'a'
    folder.mkdir()
    save_file(GOOD, folder/'model.safetensors')
    names = ['config.json', 'adapter_config.json', 'tokenizer.json', 'vocab.json']
    texts = [
        *JUNK,
        '{}',
        '{"quantization_config": 3}',
        '{"quantization_config": {"quant_method": "gptq"}}',
        '{"model": 3}',
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": [3, []]}}',
        '{"added_tokens": 5, "model": {"vocab": {"a": "x"}}}',
        '{"a": null, "b": [1]}',
        '{"base_model_name_or_path": 3}',
    ]
    base = tmp_path/'base'
    shutil.copytree(folder, base)
    save_file(BASE, base/'model.safetensors')
    for n in ('tokenizer.json', 'vocab.json'):
        (base / n).write_text('{"model": {"vocab": {"a": 0}}}' if n.startswith('t') else '{"a": 0}')
    for name in names:
        for text in [*texts, b'\xff\xfe{}']:
            (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
            case = f'{name} {text[:30]!r}'
            tally.merge(case, folder)
            try:
                pool = BaseModelPool({'_pretrained_': str(base), 'a': str(folder)})
                pool.save_model(SimpleAverage().merge(pool), tmp_path/'out')
                other = BaseModelPool({'a': str(folder)})
                other.save_model(SimpleAverage().merge(other), tmp_path/'out')
                tally.counts['right'] += 1
            except FusionError as e: tally.counts['refused'] += '\n' not in str(e)
            except Exception as e:
                tally.counts['raw'] += 1
                tally.odd.append((case, 'raw', f'{type(e).__name__}: {e}'[:200]))
        (folder/name).unlink()
    tally.check(150)


def settings(config):
    "Texts of a configuration: damaged, or with one setting that is none."
    whole = json.dumps(config)
    yield from JUNK
    for n in range(1, len(whole), len(whole) // 8): yield whole[:n]
    for value in (None, -1, 0, 'x', [], {}, 1e30, 10**12, True):
        yield json.dumps(config | {'num_hidden_layers': value})
    for key in (
        'hidden_size',
        'intermediate_size',
        'num_attention_heads',
        'model_type',
        'hidden_act',
        'patch_size',
        'vocab_size',
        'layer_norm_eps',
    ):
        for value in (None, -1, 'x', {}, 3): yield json.dumps(config | {key: value})


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['clip', 'text'])
def test_networks(tmp_path, tally, kind):
    from fusionbook.models.clip import tiny_clip
    from fusionbook.models.text import tiny_text
    from fusionbook.modelpool import CLIPVisionModelPool, TextEncoderPool
    base = tiny_clip(tmp_path/'base', ['a', 'b']) if kind == 'clip' else tiny_text(tmp_path/'base', ['a b'])
    shutil.copytree(base, tmp_path/'a')
    pools, file = {'clip': CLIPVisionModelPool, 'text': TextEncoderPool}[kind], tmp_path/'a'/'config.json'
    config = json.loads(file.read_text())
    tower = config.get('vision_config', config)
    right = {k: t.clone() for k, t in pools({'a': str(base)}).experts()[0].items()}
    for text in settings(tower):
        file.write_text(text)
        try:
            merged = SimpleAverage().run(pools({'a': str(tmp_path/'a'), 'b': str(base)})).state_dict()
            same = merged.keys() == right.keys() and all(torch.equal(merged[k], v) for k, v in right.items())
            tally.counts['right' if same else 'wrong'] += 1
        except FusionError as e: tally.counts['refused' if '\n' not in str(e) else 'raw'] += 1
        except Exception as e:
            tally.counts['raw'] += 1
            tally.odd.append((text[:60], 'raw', f'{type(e).__name__}: {e}'[:200]))
    tally.check(60)


def test_hyper_parameters_are_finite():
    """NaN and infinity in any number of any method are refused when the method is made, and when the number
    is set."""
    from dataclasses import fields
    import fusionbook.method as methods
    from fusionbook.core.config import published
    tried = 0
    for name in sorted(published('fusionbook.method')):
        cls = getattr(methods, name)
        numbers = (
            [
                f.name
                for f in fields(cls)
                if f.init and isinstance(f.default, (int, float)) and not isinstance(f.default, bool)
            ]
            if hasattr(cls, '__dataclass_fields__')
            else []
        )
        for key in numbers if hasattr(cls, 'merge') else ():
            for bad in (float('nan'), float('inf'), -float('inf')):
                with pytest.raises(FusionError, match=key): cls(**{key: bad})
                tried += 1
    assert tried > 100


def test_a_number_that_is_none_stops_a_run(tmp_path, here):
    refused = here(
        'method=task_arithmetic', 'method.scaling_factor=nan', f'merged_model_save_path={tmp_path}/out'
    )
    assert (
        refused.status == 2
        and 'a finite number for `scaling_factor`, got nan' in refused.line
        and not (tmp_path / 'out').exists()
    )
