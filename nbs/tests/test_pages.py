"""Commands in prose work as typed: every `fusionbook …` of README and the tutorials is composed, or its words
are read by its command."""
import json, re, shlex
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1]
PAGES = [NBS/'index.ipynb', *sorted((NBS/'97_tutorials').glob('*.ipynb'))]


def prose(page):
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']


def commands():
    "Lines of shell blocks and inline code that begin with the program's name."
    for page in PAGES:
        for text in prose(page):
            blocks = re.findall(r'(?ms)^```bash\n(.*?)^```', text)
            lines = [l for b in blocks for l in b.splitlines()] + re.findall(
                r'`(fusionbook(?: [^`]*)?)`', re.sub(r'(?ms)^```.*?^```', '', text)
            )
            yield from (
                pytest.param(l.split(' #')[0].strip(), id=f'{page.stem}: {l[:60]}')
                for l in lines
                if re.match(r'fusionbook( |$)', l)
            )


@pytest.mark.parametrize('line', list(commands()))
def test_commands_in_prose_work_as_typed(here, line, monkeypatch):
    words = shlex.split(line)[1:]
    if (
        any(w.endswith('.yaml') or w.isupper() for w in words)
        or 'method=unanimous' in words
        or 'modelpool=experts' in words
    ):
        pytest.skip('names a file or a method of the reader')
    if words[:1] == ['experiment']:
        from fusionbook.bench.batch import experiment_arguments
        from fusionbook.bench.experiment import check_parameters, find_experiment
        asked = experiment_arguments(words[1:])
        assert set(asked['fixed']) <= set(check_parameters(find_experiment(asked['name']), asked['fixed']))
    elif words[:1] == ['train']:
        import fusionbook.bench.train as train
        monkeypatch.setattr(train, 'check_device', lambda name: name)
        assert train.train_arguments(words[1:]).experiment_name
    # files of the reader's; its flags are known
    elif words[:1] and words[0] in ('merge', 'merge-adapters', 'extract-lora'):
        told = here(words[0], '--help')
        assert told.status == 0 and all(w.partition('=')[0] in told.out for w in words if w.startswith('--'))
    elif words[:1] == ['board']:
        from fusionbook.bench.board import board_arguments
        assert board_arguments(words[1:])
    elif words[:1] == ['finetune']:
        from fusionbook.bench.finetune import finetune_arguments
        assert finetune_arguments(words[1:]).base
    elif words[:1] == ['compare']:
        done = here(*words)
        assert done.status == 2 and 'A/report.json' in done.line # the reader's own reports
    elif words[:1] == ['path/to/model']:
        done = here(*words)
        assert done.status == 2 and 'path/to/model' in done.line # the reader's own model
    elif words in (['sweep'], ['analyse']): assert here(*words, '--help').status == 0 # named, not typed
    elif words[:1] == ['sweep']:
        done = here(*words, '--cfg', 'job')
        assert done.status == 0, done.err
    elif words[:1] == ['list'] or '--help' in words: assert here(*words).status == 0
    else:
        device = [] if not any(w.startswith('device=') for w in words) else ['device=cpu'] # no GPU here
        done = here(*[w for w in words if not w.startswith('device=')], *device, 'dry_run=true')
        assert done.status == 0, done.err
        assert 'method   ' in done.out and not list(done.cwd.glob('_runs/*'))


def test_every_tutorial_and_report_is_linked_from_the_first_page():
    text = '\n'.join(prose(PAGES[0]))
    missing = [
        f.name
        for folder in ('95_reports', '97_tutorials')
        for f in (NBS / folder).glob('[!_.]*.ipynb')
        if f'{folder}/{f.name}' not in text
    ]
    assert not missing


def families():
    "Folders of methods: those that export to a sub-package of `fusionbook.method`."
    exports = [
        (f.parent, re.search(r'#\| default_exp method\.\w+\.\w+', f.read_text(encoding='utf-8')))
        for f in NBS.glob('[67]?_*/[!_.]*.ipynb')
    ]
    return sorted({folder for folder, found in exports if found})


def test_every_family_opens_with_a_map_that_the_first_page_links():
    "The table of families is computed: README holds what the first page shows."
    text = (NBS.parent/'README.md').read_text(encoding='utf-8')
    assert len(families()) >= 5
    assert not [
        f.name
        for f in families()
        if not (f / '00_map.ipynb').exists() or f'{f.name}/00_map.ipynb' not in text
    ]


def test_the_first_page_has_two_set_up_commands():
    blocks = re.findall(r'(?m)^python3 -m venv .*$', '\n'.join(prose(PAGES[0])))
    assert len(blocks) == 2 and "'.[dev]'" in blocks[1] and blocks[0].endswith('.venv/bin/fusionbook')


def test_names_in_code_of_prose_exist():
    "`fusionbook.a.b` in prose is a module or a name of one."
    from importlib import import_module
    for page in PAGES:
        for name in re.findall(r'`(fusionbook(?:\.\w+)+)`', '\n'.join(prose(page))):
            module, _, last = name.rpartition('.')
            try: import_module(name)
            except ModuleNotFoundError: assert hasattr(import_module(module), last), name


def test_the_template_runs_as_it_is():
    "What a reader copies keeps the contract of today."
    cells = json.loads((NBS/'60_method'/'_template.ipynb').read_text(encoding='utf-8'))['cells']
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    names = dict(__name__='template')
    exec(code, names)
    assert names['MyMethod'].config_names == ('my_method',)
