"""Data as they come: damaged, odd and contradictory data sets give a right number or one line that names task
and row; experts of one's own tables merge."""
import io, json, random

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from torch import nn

from fusionbook.core.errors import FusionError
from fusionbook.data.classes import class_list
from fusionbook.data.datasets import (
    Images,
    class_names,
    data_fingerprint,
    head,
    labels_of,
    load,
    split_off,
    take,
)
from fusionbook.taskpool import ClassificationTaskPool, TextClassificationTaskPool
from fusionbook.taskpool.clip import task_prompts

NET = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
ODD = (
    None,
    'cat',
    '',
    b'x',
    0.5,
    float('nan'),
    float('inf'),
    -1,
    3,
    10**6,
    2**70,
    [],
    [1],
    {},
    {'a': 1},
    (0, 1),
    'two\nlines',
    object(),
)
WORDS = {
    'sports': 'match goal team won',
    'money': 'bank shares fell profit',
    'good': 'lovely warm great fun',
    'bad': 'dull boring awful slow',
    'rain': 'wet cloud storm umbrella',
    'sun': 'hot bright beach sky',
}


def picture(seed=0, size=(5, 4)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image, kind='PNG', **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def odd_pictures(draw):
    "Things that stand where a picture is meant."
    whole = encoded(picture(1, (40, 40)))
    cut = Image.open(io.BytesIO(whole[:draw.randrange(50, len(whole) - 50)]))
    frames = Image.open(io.BytesIO(encoded(picture(), 'GIF', save_all=True, append_images=[picture(3)])))
    modes = [picture().convert(m) for m in ('1', 'L', 'P', 'LA', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I', 'F')]
    arrays = [
        np.zeros(s, t)
        for s in ((2, 2), (2, 2, 1), (2, 2, 3), (2, 2, 4), (3, 2, 2), (2, 2, 2), (2,), (0, 0, 3), ())
        for t in ('u1', 'f4', '?', 'u2')
    ]
    return [*ODD, cut, frames, *modes, *arrays]


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    from fusionbook.models.text import text_encoder, tiny_text
    folder = tiny_text(tmp_path_factory.mktemp('encoder')/'base', [*WORDS.values(), *WORDS])
    return folder, text_encoder(folder)


def told(call, *names, plain=False):
    """Run it: a result with as many answers as rows, or one line that has the names. Returns whether it was
    refused."""
    try: call()
    except FusionError as e:
        text = str(e)
        assert '\n' not in text and len(text) < 600, text
        for name in names: assert name in text, (name, text)
        return True
    return False


def images_trial(rows, at):
    pool = ClassificationTaskPool({'odd task': rows}, size=4, batch_size=2)
    def call():
        found = pool.predict(NET, 'odd task')
        assert len(found['labels']) == len(rows) and np.isfinite(found['losses']).all()
    return told(call, 'odd task')


def test_damaged_rows_name_task_and_row(encoder):
    "At least 150 inputs: every odd value in the place of a picture, a label, a row, a text, a name."
    draw, count, refusals = random.Random(7), 0, 0
    for bad in odd_pictures(draw):
        at = draw.randrange(4)
        rows = [dict(image=picture(i), label=i % 3) for i in range(4)]
        rows[at]['image'] = bad
        refusals += images_trial(rows, at)
        count += 1
    for bad in ODD:
        at = draw.randrange(1, 4)
        rows = [dict(image=picture(i), label=i % 3) for i in range(4)]
        for broken in ({**rows[at], 'label': bad}, {'image': rows[at]['image']}, bad):
            trial = [*rows[:at], broken, *rows[at + 1:]]
            refusals += images_trial(trial, at)
            count += 1
    folder, model = encoder
    for bad in ODD:
        at = draw.randrange(4)
        for key in ('text', 'label'):
            rows = [dict(text='bank fell', label=i % 2) for i in range(4)]
            rows[at][key] = bad

            def call():
                assert (
                    len(
                        TextClassificationTaskPool(
                            {'odd task': dict(dataset=rows, sentences=['bank', 'goal'])}, str(folder)
                        ).predict(model, 'odd task')['labels']
                    )
                    == 4
                )
            refusals += told(call, 'odd task')
            count += 1
        refusals += told(lambda: class_list(['a', bad], 'odd task'), 'odd task') + told(
            lambda: class_list({0: 'a', 1: bad}, 'odd task'), 'odd task'
        )
        count += 2
    assert count >= 150 and refusals > count / 2, (count, refusals)


@pytest.mark.parametrize(
    'content', [b'', b'no picture', encoded(picture(1, (40, 40)))[:300], b'\x89PNG\r\n\x1a\n' + b'\0' * 90]
)
def test_a_broken_file_is_named(tmp_path, content):
    for c, name in enumerate(('cat', 'dog')):
        for i in range(2):
            (tmp_path/'test'/name).mkdir(parents=True, exist_ok=True)
            (tmp_path/'test'/name/f'{i}.png').write_bytes(encoded(picture(i)))
    (tmp_path/'test'/'dog'/'1.png').write_bytes(content)
    with pytest.raises(FusionError, match=r'^pets: .*row 3') as e:
        ClassificationTaskPool({'pets': str(tmp_path)}, size=4).predict(NET, 'pets')
    assert '\n' not in str(e.value)


def test_labels_that_are_wrong_numbers():
    def rows(*labels): return [dict(image=picture(), label=l) for l in labels]
    pool = ClassificationTaskPool({'t': rows(1., '2', True)}, size=4)
    assert pool.predict(NET, 't')['labels'].tolist() == [1, 2, 1]
    for bad in (rows(0, .9), rows(0, '0.9'), rows(0, -1), rows(0, 3), rows(0, float('nan'))):
        with pytest.raises(FusionError, match='^t: '):
            ClassificationTaskPool({'t': bad}, size=4).predict(NET, 't')


def test_folders_called_by_numbers_get_the_names_of_their_numbers(tmp_path, caplog):
    for c in range(12):
        (tmp_path/'test'/str(c)).mkdir(parents=True)
        picture(c).save(tmp_path/'test'/str(c)/'0.png')
    rows = load(tmp_path)
    assert class_names(rows)[:3] == ['0', '1', '10']
    table = [f'sign number {i}' for i in range(12)]
    prompts = task_prompts('signs', {'classnames': table}, class_names(rows))
    for row in rows:
        assert prompts['classnames'][row['label']] == f"sign number {class_names(rows)[row['label']]}"
    assert 'in the order 0, 1, 10' in caplog.text
    with pytest.raises(FusionError, match='would become `a photo of a 0.`'):
        task_prompts('signs', {}, class_names(rows))


@pytest.mark.parametrize(
    'names, given, want',
    [
        (['b', 'a'], {'a': 'apple', 'b': 'bean'}, ['bean', 'apple']),
        (None, {1: 'dog', 0: 'cat'}, ['cat', 'dog']),
        (None, {'dog': '1', 'cat': '0'}, ['cat', 'dog']),
    ],
)
def test_mappings_of_names(names, given, want):
    assert task_prompts('food', {'classnames': given}, names)['classnames'] == want


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl', 'json', 'parquet'])
def test_single_tables(tmp_path, kind):
    rows = Dataset.from_dict(dict(text=['a', 'b', 'c'], label=[0, 1, 0]))
    file = tmp_path/f'table.{kind}'
    if kind == 'parquet':
        rows.to_parquet(file)
    elif kind in ('csv', 'tsv'):
        file.write_text(
            ''.join(
                '\t,'[kind == 'csv'].join(map(str, r)) + '\n'
                for r in [('text', 'label'), *zip(rows['text'], rows['label'], strict=True)]
            )
        )
    else: file.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert load(file)['text'] == ['a', 'b', 'c'] and labels_of(load(file)).tolist() == [0, 1, 0]
    file.write_bytes(b'\xff\xfe\x00{"')
    with pytest.raises(FusionError, match=r'table\.') as e: load(file)
    assert '\n' not in str(e.value)


def test_sources_stay_together_and_change_no_hash():
    scans = Images(np.zeros((40, 2, 2, 3), 'u1'), np.arange(40) % 2, ['a', 'b'], clusters=np.arange(40) // 4)
    assert data_fingerprint(scans) == data_fingerprint(Images(scans.images, scans.labels, scans.classnames))
    for seed in range(20):
        rest, part = split_off(scans, .2, seed=seed)
        assert len(part) == 8 and not set(rest.clusters) & set(part.clusters)
    assert head(scans, 9).clusters.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2] and take(
        scans, [39]
    ).clusters.tolist() == [9]


def test_three_tables_of_ones_own_become_a_merge(here, encoder, tmp_path):
    "As a user types it: three texts tables, three experts, one merge, a sweep on validation."
    draw, args = np.random.default_rng(0), ['--base', encoder[0], '--epochs', 8, '--learning_rate', '1e-3']
    for name, kinds in dict(news=('sports', 'money'), films=('good', 'bad'), weather=('rain', 'sun')).items():
        lines = [f"{' '.join(draw.choice(WORDS[k].split(), 4))} {i},{k}" for i, k in enumerate(kinds * 50)]
        (tmp_path/f'{name}.csv').write_text('\n'.join(['text,label', *lines]) + '\n')
        done = here('finetune', *args, '--data', f'{name}.csv', '--name', name)
        assert done.status == 0, done.err
    merge = next(l for l in done.out.splitlines() if l.startswith('merge')).split()[2:]
    done = here(*merge)
    assert done.status == 0, done.err
    rows = {(r['role'], r['task']): r for r in done.report['rows'] if r['metric'] == 'accuracy'}
    assert all(
        rows['expert', t]['value'] >= 0.8 and rows['merged', t]['n'] == 9
        for t in ('news', 'films', 'weather')
    )
    again = here('finetune', *args, '--data', 'news.csv', '--name', 'news')
    assert again.status == 0 and 'validation' in again.out
    assert here('finetune', *args, '--data', 'news.csv', '--name', 'news', '--seed', 9).line.endswith(
        'or remove the folder'
    )
    card = (tmp_path/'experts'/'news'/'README.md').read_text()
    assert 'validation accuracy, expert' in card and 'training rows' in card
