"""Files that are kept to save time, damaged in every way that a seed can think of: no number changes, nothing
is raised, what was damaged is computed again."""
import json, random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as as_bytes

from fusionbook.core.cached import read_record, write_record


# ---- damages

def flipped(data, draw):
    "One to three bits."
    data = bytearray(data)
    for _ in range(draw.randint(1, 3)): data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)

def cut(data, draw): return data[:draw.randrange(len(data))]
def longer(data, draw): return data + bytes(draw.randrange(256) for _ in range(draw.randint(1, 64)))
def zeroed(data, draw): return bytes(len(data))
def zero_tail(data, draw): return data[:(at := draw.randrange(len(data)))] + bytes(len(data) - at)
def noise(data, draw): return draw.randbytes(len(data))
def nothing(data, draw): return b''
BYTES = flipped, flipped, cut, longer, zeroed, zero_tail, noise, nothing


def rewritten(change):
    "A damage of the tensors that leaves a file which safetensors finds right, and its note as it was."
    def damage(file, data, draw):
        with safe_open(file, 'pt') as f: tensors, note = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
        return as_bytes(change(tensors, draw), note)
    return damage

def one(tensors, draw): return draw.choice(sorted(tensors))
def fewer(tensors, draw):
    return {k: v for k, v in tensors.items() if k != one(tensors, draw)} or {'x': torch.ones(1)}
def more(tensors, draw): return tensors | {'extra': torch.ones(3)}
def renamed(tensors, draw):
    return {(k + '_' if k == one(tensors, draw) else k): v for k, v in tensors.items()} | {'y': torch.ones(1)}
def another_shape(tensors, draw):
    k = one(tensors, draw)
    return tensors | {k: tensors[k].reshape(1, -1).clone()}
def shorter(tensors, draw): k = one(tensors, draw); return tensors | {k: tensors[k].reshape(-1)[:-1].clone()}
def another_type(tensors, draw): k = one(tensors, draw); return tensors | {k: tensors[k].to(torch.float16)}
def all_zeros(tensors, draw): return {k: torch.zeros_like(v) for k, v in tensors.items()}
def exchanged(tensors, draw):
    names = sorted(tensors)
    return dict(zip(names, [tensors[k].clone() for k in names[1:] + names[:1]], strict=True))
TENSORS = [
    rewritten(f) for f in (fewer, more, renamed, another_shape, shorter, another_type, all_zeros, exchanged)
]


def digits(data, draw):
    "Another digit in a text, if there is one."
    places = [i for i, c in enumerate(data) if chr(c).isdigit()]
    if not places: return b'{}'
    at = draw.choice(places)
    return data[:at] + str((int(chr(data[at])) + draw.randint(1, 9)) % 10).encode() + data[at + 1:]

def other_json(data, draw):
    return draw.choice(
        [
            b'{}',
            b'[]',
            b'null',
            b'1',
            b'"a"',
            b'NaN',
            b'[' * 5000,
            b'{"kind": 1}',
            b'\xff\xfe',
            b'{"content": {}}',
        ]
    )
TEXTS = digits, digits, other_json, *BYTES


class Trials:
    "Damage a file, ask again, and see that the answer is the old one."

    def __init__(self, seed):
        self.draw, self.count, self.changed, self.raised = random.Random(seed), 0, [], []
    def __call__(self, file, how, ask, right):
        whole = Path(file).read_bytes()
        data = how(whole, self.draw) if how in TEXTS else how(file, whole, self.draw)
        if data == whole: return
        Path(file).write_bytes(data)
        self.count += 1
        try: same = right(ask())
        except Exception as e: self.raised.append((how, f'{type(e).__name__}: {e}')); same = True
        if not same: self.changed.append(how)
        Path(file).write_bytes(whole)
    def check(self, least):
        assert not self.changed and not self.raised, (
            self.changed[:3],
            self.raised[:3],
            len(self.changed),
            len(self.raised),
        )
        assert self.count >= least, self.count


# ---- answers and features

class Network(torch.nn.Module):
    "Which of two numbers is larger."
    def __init__(self): super().__init__(); self.weight = torch.nn.Parameter(torch.eye(2))
    def forward(self, x): return x @ self.weight

def tasks():
    from fusionbook.taskpool.base import BaseTaskPool
    class Tasks(BaseTaskPool):
        task_names = 'a', 'b'
        def fingerprint(self, task): return f'lesson {task}'
        def predict(self, model, task):
            x = torch.randn(40, 2, generator=torch.Generator().manual_seed(ord(task)))
            y, logits = (x[:, 0] < .1 * x[:, 1]).long(), model(x).detach()
            loss = torch.nn.functional.cross_entropy(logits, y, reduction='none')
            return dict(labels=y.numpy(), predictions=logits.argmax(1).numpy(), losses=loss.double().numpy())
    return Tasks()


def test_answers(tmp_path, monkeypatch):
    from fusionbook.bench.run import cached_predictions
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path))
    pool, trials = tasks(), Trials(0)
    def ask(task='a', model='m'): return cached_predictions(pool, Network, task, model_hash=model)
    first = ask()
    file, = tmp_path.rglob('*.safetensors')
    others = [ask('b'), ask('a', 'n')]
    swaps = [f.read_bytes() for f in tmp_path.rglob('*.safetensors') if f != file]
    assert 0 < (first['labels'] == first['predictions']).mean() < 1 and len(swaps) == len(others)

    def right(found):
        return found.keys() == first.keys() and all(np.array_equal(found[k], first[k]) for k in first)
    for how in (*BYTES, *TENSORS) * 14: trials(file, how, ask, right)
    for swap in swaps * 5:
        file.write_bytes(swap)
        trials.count += 1
        assert right(ask())
    trials.check(210)


def test_text_features(tmp_path, monkeypatch):
    from fusionbook.models.clip import text_features, tiny_clip
    monkeypatch.setenv('FUSIONBOOK_CACHE', str(tmp_path/'cache'))
    clip, trials = tiny_clip(tmp_path/'clip', ['cat', 'dog']), Trials(1)
    def ask(): return text_features(clip, ['a photo of a cat.', 'a photo of a dog.'])
    first = ask()
    file, = (tmp_path/'cache').rglob('*.safetensors')
    for how in (*BYTES, *TENSORS) * 2: trials(file, how, ask, first.equal)
    trials.check(28)


# ---- what goes on

def test_adaptation(tmp_path):
    from itertools import count
    from fusionbook.method.adaptive.adapt import adapt
    file, trials = tmp_path/'state.safetensors', Trials(2)
    def ask():
        w = torch.zeros(2, requires_grad=True)
        def objective(step):
            value = (w - torch.tensor([3., -1.])).square().sum()
            value.backward()
            return value.item()

        curve = adapt(
            {'w': w}, count, objective, steps=6, lr=0.1, checkpoint=file, every=3, identity=dict(lr=0.1)
        )
        return curve, w.detach().tolist()
    first = ask()
    for how in (*BYTES, *TENSORS) * 5: trials(file, how, ask, lambda found: found == first)
    trials.check(70)


def test_training(tmp_path):
    from fusionbook.core.state_dict import content_hash, generator
    from fusionbook.models.epochs import train_epochs
    from fusionbook.models.mlp import MLP
    x, trials = torch.randn(16, 2, generator=torch.Generator().manual_seed(0)), Trials(3)
    y = (x[:, 0] > 0).long()
    def ask():
        net = MLP([2, 3, 2])
        with torch.no_grad():
            for k, p in net.named_parameters(): p.copy_(torch.randn(p.shape, generator=generator(0, k)))
        def score(net): return dict(accuracy=(net(x).argmax(1) == y).float().mean().item())

        history = train_epochs(
            net,
            lambda rows, rng: (x[rows], y[rows]),
            16,
            score=score,
            folder=tmp_path,
            epochs=2,
            batch_size=8,
            seed=1,
        )
        return history, content_hash(net.state_dict()), (tmp_path/'initial_weights.safetensors').read_bytes()
    first = ask()
    for name in ('last', 'best_val_epoch', 'initial_weights', 'checkpoint_epoch1'):
        for how in (*BYTES, *TENSORS) * 2:
            trials(tmp_path / f'{name}.safetensors', how, ask, lambda found: found == first)
    trials.check(110)


def test_measurements(tmp_path, monkeypatch):
    import argparse
    from fusionbook.bench import measure

    rows, trials = (
        [
            dict(metric='accuracy', space='prediction_space', value=0.75),
            dict(metric='loss', space='prediction_space', value=0.1),
        ],
        Trials(4),
    )
    monkeypatch.setattr(measure, 'measure_group', lambda subject, group: [dict(r) for r in rows])
    a = argparse.Namespace(folder=tmp_path/'e', seed=0, budget=1., batch_size=10, resume=True)
    def ask(): return measure._group(a, 1, 'group', ['accuracy', 'loss'], None, ('weights',))
    ask()
    file, = tmp_path.rglob('measured_*.json')
    for how in TEXTS * 8: trials(file, how, ask, lambda found: found == rows)
    trials.check(80)


def test_records_and_points(tmp_path):
    content, key, trials = (
        dict(accuracy=0.8125, rows=[dict(n=100, loss=0.5)]),
        ['point', {'models': 'abc'}],
        Trials(5),
    )
    file = write_record(tmp_path/'0001.json', content, kind='sweep point', key=key)
    other = write_record(
        tmp_path / '0002.json', content | dict(accuracy=0.9), kind='sweep point', key=['other']
    ).read_bytes()
    def ask():
        found = read_record(file, kind='sweep point', key=key)
        return content if found is None else found['content']
    for how in TEXTS * 10: trials(file, how, ask, lambda found: found == content)
    file.write_bytes(other)
    assert read_record(file, kind='sweep point', key=key) is None
    assert read_record(tmp_path/'0002.json', kind='measurement', key=['other']) is None
    trials.check(100)


def test_finished_experiments(tmp_path):
    "A damaged copy, or a damaged file that it wrote, does not count as finished."
    from fusionbook.bench.batch import NotebookRun, finished
    from fusionbook.bench.experiment import _stamp, notebook_hash
    import nbformat
    out, copy, trials = tmp_path/'x.json', tmp_path/'x.ipynb', Trials(6)
    given = {'x': 1, 'out_json': str(out)}
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell('print(1)', outputs=[nbformat.v4.new_output('stream', text='0.875')])
        ]
    )
    content = notebook_hash(nb.cells)
    nb.metadata.fusionbook = dict(notebook=content, parameters=given, state='started')
    nbformat.write(nb, copy)
    out.write_text(json.dumps({'average': {'accuracy': .875}}))
    _stamp(copy, state='finished', seconds=1.5, error=None)
    def ask(): return finished(NotebookRun(given, given, copy), content)
    assert ask()
    whole = json.loads(copy.read_text())
    def right(said):
        if not said: return True
        try:
            return json.loads(copy.read_text()) == whole and json.loads(out.read_text()) == {
                'average': {'accuracy': 0.875}
            }
        except ValueError:
            return False
    for file in (copy, out):
        for how in TEXTS * 3: trials(file, how, ask, right)
    trials.check(55)
