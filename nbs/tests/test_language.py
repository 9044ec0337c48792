"""Language models on the command line: methods that learn from texts, with task pools that make the tokens;
tiny models made on the fly."""
import json

import pytest

from conftest import mirror
from fusionbook.core.checkpoint import Checkpoint
from fusionbook.core.legacy import build

TEXTS = [
    'the film is fine',
    'the film is not fine at all',
    'what is two plus two',
    'it is four',
    'two plus one',
    'three is more',
]
GLUE = 'sentence', 'sentence1', 'sentence2', 'question', 'question1', 'question2', 'premise', 'hypothesis'


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Models by kind with their words, a table with the columns of GLUE, and questions with answers."
    import transformers
    from datasets import Dataset
    from fusionbook.models.hub import tiny_hub
    from fusionbook.models.text import tiny_text
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp('language')
    words = (
        'yes no acceptable unacceptable entailment neutral contradiction positive negative is this '
        'sentence'
    ).split()
    tiny_text(root/'words', [*TEXTS, *words])
    size = json.loads((root/'words'/'config.json').read_text())['vocab_size']
    found = {}
    for kind in ('gpt2_classes', 't5', 'llama'):
        found[kind] = [
            tiny_hub(
                root / f'{kind}{i}',
                kind,
                seed=i,
                vocab_size=size,
                **({'n_positions': 512} if 'gpt' in kind else {}),
            )
            for i in range(3)
        ]
        for folder in found[kind]:
            for file in (root/'words').glob('*tok*'): (folder/file.name).write_bytes(file.read_bytes())
            for file in (root/'words').glob('vocab*'): (folder/file.name).write_bytes(file.read_bytes())
    table = Dataset.from_dict({c: TEXTS for c in GLUE} | {'label': [0, 1] * 3})
    for split in ('train', 'validation', 'validation_matched'):
        table.to_parquet(root / 'glue' / 'data' / f'{split}-00000-of-00001.parquet')
    for n in ('math', 'code', 'instruction'):
        lines = [
            dict(instruction=q, input='' if n == 'math' else 'now', output=a)
            for q, a in zip(TEXTS[::2], TEXTS[1::2], strict=True)
        ]
        (root/f'{n}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    return {k: [str(f) for f in v] for k, v in found.items()} | {
        'glue': str(root / 'glue'),
        'root': root,
        'words': str(root / 'words'),
    }


def stand_ins(pool, made, kind):
    "Hub names of a pool, its words and its data, as local folders."
    from fusionbook.core.compose import compose_words
    from fusionbook.core.config import plain
    models = plain(compose_words([f'+modelpool={pool}'], name=None))['modelpool']['models']
    names = [v if isinstance(v, str) else v['base'] for v in models.values()]
    hub = {n: made[kind][i % 3] for i, n in enumerate(dict.fromkeys(names))}
    return hub | {'nyu-mll/glue': made['glue']}


def learned(done):
    assert done.status == 0, done.err
    return done.report


def numbers(report, metric):
    return {(r['model'], r['task']): r['value'] for r in report['rows'] if r['metric'] == metric}


def test_gpt2_on_glue(here, made):
    hub = stand_ins('gpt-2_glue', made, 'gpt2_classes') | {'openai-community/gpt2': made['gpt2_classes'][0]}
    call = [
        'method=adamerging/layer_wise_gpt2',
        'method.max_steps=2',
        'method.batch_size=4',
        'method.data=train',
        'modelpool=gpt-2_glue',
        'taskpool=gpt-2_glue',
        mirror(hub),
    ]
    report = learned(here(*call))
    accuracy = numbers(report, 'accuracy')
    assert {t for m, t in accuracy if m == 'merged'} == {
        'cola',
        'mnli',
        'mrpc',
        'qnli',
        'qqp',
        'rte',
        'sst2',
    } and all(0 <= v <= 1 for v in accuracy.values())
    assert 'train' in report['uses'] and 'labels' not in report['uses']


def test_heads_of_classifiers_learn_with_the_merge(here, made):
    hub = stand_ins('gpt-2_glue', made, 'gpt2_classes') | {'openai-community/gpt2': made['gpt2_classes'][0]}
    call = [
        'method=symerge',
        'method.max_steps=2',
        'method.batch_size=4',
        'method.data=unlabeled_test',
        'modelpool=gpt-2_glue',
        'taskpool=gpt-2_glue',
        mirror(hub),
    ]
    report = learned(here(*call))
    assert {'unlabeled_test', 'task_identity'} <= set(report['uses'])


def test_flan_t5_on_glue_by_the_first_word(here, made):
    pool = 'Seq2SeqLMPool/flan-t5-base_glue_tta'
    hub = stand_ins(pool, made, 't5')
    call = [
        'method=adamerging/layer_wise_flan_t5',
        'method.max_steps=2',
        'method.data=unlabeled_test',
        f'modelpool={pool}',
        'taskpool=flan-t5_glue_text_generation',
        mirror(hub),
    ]
    report = learned(here(*call))
    # stsb is lent
    assert {t for m, t in numbers(report, 'accuracy') if m == 'merged'} == {
        f'glue-{t}' for t in ('cola', 'mnli', 'mrpc', 'qnli', 'qqp', 'rte', 'sst2')
    }
    done = here(*call[:-1], mirror({k: v for k, v in hub.items() if 'glue' not in k or 'tanganke' in k}))
    assert done.status and 'nyu-mll/glue' in done.line


POOL = 'CausalLMPool/Qwen2.5-1.5B_three_models'


def llama_call(made, *more, test=True):
    data = ', '.join(f'{n}: {made["root"]}/{n}.jsonl' for n in ('math', 'code', 'instruction'))
    call = [
        'method=adamerging/llama_sft',
        'method.max_steps=3',
        'method.batch_size=2',
        'method.lr=0.05',
        'method.start_layer_idx=0',
    ]
    call += [
        f'modelpool={POOL}',
        f'+modelpool.train_datasets={{{data}}}',
        'taskpool=causal_lm',
        mirror(stand_ins(POOL, made, 'llama')),
    ]
    return call + ([f'taskpool.test_datasets={{{data}}}'] if test else []) + list(more)


def test_llama_on_questions_and_answers(here, made):
    report = learned(here(*llama_call(made, 'merged_model_save_path=out')))
    perplexity = numbers(report, 'perplexity')
    assert {t for m, t in perplexity if m == 'merged'} == {'math', 'code', 'instruction'} and all(
        v > 1 for v in perplexity.values()
    )
    assert {'train', 'labels'} <= set(report['uses'])
    assert len(Checkpoint('out')) > 4


def test_llama_without_data_to_measure(here, made):
    report = learned(here(*llama_call(made, test=False)))
    assert not [r for r in report['rows'] if r['role'] == 'merged']


@pytest.mark.parametrize(
    'change, said',
    [
        (['taskpool.prompt="{instruction}"'], '`answer` beside `prompt`'),
        (
            ['taskpool.prompt="{questio}"', 'taskpool.answer="{output}"'],
            'got no `questio` among instruction, input, output',
        ),
        (['~modelpool.train_datasets.code'], '`modelpool.train_datasets.code`'),
        (['taskpool.tokenizer=null'], 'expected `tokenizer`'),
    ],
)
def test_what_is_missing_is_said_in_one_line(here, made, change, said):
    done = here(*llama_call(made, *change))
    assert done.status and said in done.line


def test_texts_are_measured_as_they_are_alone(made):
    cfg = {
        '_target_': 'fusionbook.taskpool.CausalLMTaskPool',
        'tokenizer': made['words'],
        'test_datasets': {'a': f'{made["root"]}/math.jsonl'},
    }
    import transformers
    net = transformers.AutoModelForCausalLM.from_pretrained(made['llama'][0]).eval()
    many, one = (build(cfg | {'dataloader_kwargs': {'batch_size': n}}, 'taskpool') for n in (8, 1))
    x, y = many.predict(net, 'a'), one.predict(net, 'a')
    assert (x['labels'] == y['labels']).all() and abs(x['losses'] - y['losses']).max() < 1e-5
    assert many.fingerprint('a') == one.fingerprint('a')
