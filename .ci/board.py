"""The cells that show the board: every method's page has them, and what they and the landing page's tables
show is what registry and digest say now.

`--check` fails where that is not so; without it the cells are put in and their outputs written, which runs no
notebook.
"""
import json, pkgutil, re, sys
from book import finish, nbs
import fusionbook.method
from fusionbook.method.base import method_yaml
from fusionbook.method import board
from fusionbook.method.map import family_methods, family_table, page_of

HEAD = '''## On the board
This method between its two neighbours on [the board](../60_method/08_board.ipynb): hyper-parameters chosen on validation data, scores on test data.'''
IMPORT, CALL = 'from fusionbook.method.board import rows_of_page', 'rows_of_page(globals())'
WHAT = 'the board, the methods or their YAML'
BEFORE = r'(?m)^#+ (Try it|Contract|Against other implementations)\b'   # what a page ends with after it

def lines(text): return text.splitlines(keepends=True)

def cell(id_, kind, text):
    more = dict(execution_count=None, outputs=[]) if kind == 'code' else {}
    return dict(cell_type=kind, id=id_, metadata={}, source=lines(text)) | more

def own_cells():
    return [
        cell('on-board', 'markdown', HEAD),
        cell('on-board-import', 'code', f'#| echo: false\n{IMPORT}'),
        cell('on-board-rows', 'code', f'#| echo: false\n{CALL}'),
    ]

def source(c): return re.sub(r'(?m)^#\|.*\n?', '', ''.join(c['source'])).strip()

def placed(cells):
    "The cells of a method's page with those of the board among them, before what closes the page."
    if any(c['cell_type'] == 'code' and source(c) == CALL for c in cells): return cells
    at = next(
        (i for i, c in enumerate(cells) if c['cell_type'] == 'markdown' and re.search(BEFORE, source(c))),
        len(cells),
    )
    return [*cells[:at], *own_cells(), *cells[at:]]

def shown(text):
    return [
        dict(
            output_type='execute_result',
            execution_count=None,
            metadata={},
            data={'text/markdown': lines(text), 'text/plain': [repr(str(text))]},
        )
    ]

def refreshed(cells, found):
    "The cells with the outputs that `found` gives for what they end with showing, by the line that makes it."
    made = [
        next((found[l] for l in source(c).splitlines() if l in found), None)
        if c['cell_type'] == 'code'
        else None
        for c in cells
    ]
    return [c if how is None else c | dict(outputs=shown(how())) for c, how in zip(cells, made, strict=True)]

def families():
    "The line that makes a family's table, as maps have it -> the table."
    packages = [
        m.name for m in pkgutil.iter_modules(fusionbook.method.__path__, 'fusionbook.method.') if m.ispkg
    ]
    return {f"table = family_table('{p}')": lambda p=p: family_table(p) for p in packages}

def configured(cells, classes):
    "The cells that print nothing but the YAML of a class, with the YAML as it is now."
    def fresh(c):
        found = re.findall(r'(?m)^print\(method_yaml\((\w+)\)\)$', source(c))
        if c['cell_type'] != 'code' or len(found) != 1 or source(c).count('print(') != 1: return c
        if found[0] not in classes: return c
        text = lines(f'{method_yaml(classes[found[0]])}\n')
        others = [o for o in c['outputs'] if o.get('name') != 'stdout']
        return c | dict(outputs=[dict(output_type='stream', name='stdout', text=text), *others])
    return [fresh(c) for c in cells]

def texts(cells):
    "What cells show in words."
    def said(o): return ''.join(o.get('text') or o.get('data', {}).get('text/markdown', ''))
    return [[said(o) for o in c.get('outputs', ())] for c in cells]

def wanted():
    "Notebook -> its cells as they should be."
    pages = {}
    every = family_methods('fusionbook.method')
    for cls in every:
        pages.setdefault(nbs / page_of(cls), []).append(cls.config_names[0])
    for nb, names in sorted(pages.items()):
        own = {cls.__name__: cls for cls in every if nbs / page_of(cls) == nb}
        def page(cells, names=names, own=own):
            return configured(refreshed(placed(cells), {CALL: lambda: board.rows_of(names)}), own)
        yield nb, page
    tables = {
        'methods_table()': board.methods_table,
        'families_table()': board.families_table,
        'board_table(board)': lambda: board.board_table(board.read_board()),
    }
    for name in ('index.ipynb', '60_method/08_board.ipynb'):
        yield nbs / name, lambda cells: refreshed(cells, tables)
    for nb in sorted(nbs.glob('*/00_map.ipynb')): yield nb, lambda cells: refreshed(cells, families())
    yield nbs/'60_method'/'_template.ipynb', placed

stale = []
for nb, how in wanted():
    content = json.loads(nb.read_text(encoding='utf-8'))
    new = how(content['cells'])
    if [c['id'] for c in new] == [c['id'] for c in content['cells']] and texts(new) == texts(
        content['cells']
    ):
        continue
    stale.append(nb)
    if '--check' not in sys.argv:
        nb.write_text(
            json.dumps(content | dict(cells=new), sort_keys=True, indent=1, ensure_ascii=False) + '\n',
            encoding='utf-8',
        )
if '--check' in sys.argv:
    finish(
        [f'{nb.relative_to(nbs)} does not show {WHAT} as they are; run .ci/board.py' for nb in stale],
        'every page shows its methods, their YAML and their lines of the board as they are',
    )
print(f'{len(stale)} pages show methods and board as they are now')
