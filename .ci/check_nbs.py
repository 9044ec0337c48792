"""House limits for notebooks: size, title, imports apart, a lesson for every public name, small pictures,
strict `zip`, lines of few nodes. `--table` prints the sizes."""
import ast, builtins, io, re, statistics, symtable, sys
from collections import Counter
from tokenize import OP, TokenError, generate_tokens
from book import cells, directive, finish, module, modules, nbs, notebooks, root, source

CELL, MEDIAN, CELLS, STATEMENTS, IMAGE, WIDTH, NODES = 25, 12, 60, 250, 100_000, 110, 24
# statements of a cell, of the median cell, cells, exported statements of a notebook, bytes of a picture,
# characters and syntax nodes of a line
IMPORT = ast.Import, ast.ImportFrom

def tree(src):
    try: return ast.parse(src).body
    except SyntaxError: return []

def size(src):
    """Statements of a cell, nested ones too, without docstrings and annotated fields: what there is to read,
    however it is laid out."""
    found = [
        n
        for b in tree(src)
        for n in ast.walk(b)
        if isinstance(n, ast.stmt) and not isinstance(n, ast.AnnAssign)
    ]
    return sum(not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in found)

def outputs(cell):
    "Faults of stored outputs."
    for o in cell.get('outputs', []):
        image = ''.join(o.get('data', {}).get('image/png', ''))
        if len(image)*3//4 > IMAGE: yield f'a picture of {len(image)*3//4:,} bytes, over {IMAGE:,}'
        if o['output_type'] == 'error': yield f'a stored error: {o["ename"]}'

def of_private(node):
    "Whether a function is a method that `@patch` gives to a private class."
    first = node.args.args[:1] if isinstance(node, ast.FunctionDef) else []
    return (
        bool(first) and isinstance(first[0].annotation, ast.Name) and first[0].annotation.id.startswith('_')
    )

def joined(src):
    "Statements that stand on one line with others."
    kept = (t for t in generate_tokens(io.StringIO(src).readline) if t.type == OP and t.string == ';')
    try: return [f'statements joined by a semicolon in line {t.start[0]}' for t in kept]
    except (TokenError, IndentationError): return []

def wide(src):
    "Lines of code over the width of a page; what a parameter's comment or a docstring says is not code."
    inside = set()
    for b in tree(src):
        for n in ast.walk(b):
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.end_lineno > n.lineno:
                inside |= {*range(n.lineno, n.end_lineno + 1)}
    for i, line in enumerate(src.splitlines(), 1):
        code = re.sub(r'\s+# .*$', '', line)
        if len(code) > WIDTH and i not in inside and not re.fullmatch(r'\s*".*"', code):
            yield f'a line of {len(code)} characters: {code.strip()[:60]} …'

def dense(src):
    """Lines of more syntax nodes than are read at a glance: part of such a line needs a name. A node counts
    where it starts."""
    lines = src.splitlines()
    found = Counter(n.lineno for b in tree(src) for n in ast.walk(b) if hasattr(n, 'lineno'))
    for i, count in sorted(found.items()):
        if count > NODES: yield f'a line of {count} syntax nodes, over {NODES}: {lines[i - 1].strip()[:60]} …'

def open_zips(src):
    "Calls of `zip` that do not say whether their iterables have one length."
    for call in (n for b in tree(src) for n in ast.walk(b) if isinstance(n, ast.Call)):
        several = len(call.args) > 1 or any(isinstance(a, ast.Starred) for a in call.args)
        if (
            getattr(call.func, 'id', '') == 'zip'
            and several
            and all(k.arg != 'strict' for k in call.keywords)
        ):
            yield f'a zip without `strict`: {ast.unparse(call)[:60]}'

def lessons(code, exported):
    "Public names without a later cell that asserts something about them."
    for i, c in enumerate(code):
        later = [
            d['src']
            for d in code[i + 1 :]
            if d not in exported and re.search(r'test_\w+\(|assert |expect_fail|check_method', d['src'])
        ]
        for b in tree(c['src']) if c in exported else []:
            if (
                isinstance(b, (ast.FunctionDef, ast.ClassDef))
                and not b.name.startswith('_')
                and not of_private(b)
            ):
                if not any(re.search(rf'\b{b.name}\b', s) for s in later):
                    yield f'`{b.name}` has no asserted lesson'

REPORTS = dict(compare_methods='compare_methods_mini8')   # an experiment whose report has a name of its own

def recipe(nb, every):
    """Faults of an experiment: it is stored without results, says where its report is, and makes both ends of
    it."""
    report = f'../95_reports/{REPORTS.get(nb.stem, nb.stem)}.ipynb'
    if any(c.get('outputs') for c in every):
        yield 'an experiment is stored without outputs: its report keeps them'
    if every[1]['cell_type'] != 'markdown' or report not in every[1]['src']:
        yield f'the second cell does not link its report {report}'
    code = '\n'.join(c['src'] for c in every if c['cell_type'] == 'code')
    for call, what in (
        ('page.say(', 'the sentences that its report opens with'),
        ('page.provenance()', 'the provenance that it ends with'),
    ):
        if call not in code: yield f'an experiment makes {what}: `{call}` of `ReportPage`'

def unfolded(nb):
    "Code of a report that is not folded; the values that it ran with stay open."
    shown = [
        c
        for c in cells(nb)
        if c['cell_type'] == 'code' and 'injected-parameters' not in c['metadata'].get('tags', [])
    ]
    if any('#| code-fold: true' not in c['src'] for c in shown):
        yield f'{nb.relative_to(nbs)}: a report folds its code'

METHODS = '61_', '62_', '63_', '64_', '65_', '66_', '67_', '68_', '70_'   # folders of families

def page(nb, every):
    """Faults of a method's page: an equation before the class, a question with a folded answer, its row on
    the board, what is only contract at the end."""
    texts = [c['src'] for c in every if c['cell_type'] == 'markdown']
    first = next(
        i
        for i, c in enumerate(every)
        if directive(c, 'exports?') and re.search(r'^    .*\bconfig_names\b.*=', c['src'], re.M)
    )
    if not any('$$' in c['src'] for c in every[:first]): yield 'no display equation before the class'
    asked = [
        i
        for i, c in enumerate(every)
        if c['cell_type'] == 'markdown' and re.search(r'^(#+ |\*)Try it', c['src'], re.M)
    ]
    folded = ('<details>' in every[i]['src'] or '#| code-fold: true' in every[i+1]['src'] for i in asked)
    if not any(folded): yield 'no *Try it* with a folded answer'
    if not any('rows_of_page' in c['src'] for c in every): yield 'not on the board'
    if not any(t.startswith('## Contract') for t in texts): yield 'no section *Contract*'

def is_page(nb, exported):
    "Whether a notebook is the page of a method that has a name of its own."
    return (
        nb.parent.name.startswith(METHODS)
        and not nb.stem[0].isdigit()
        and any(re.search(r'^    .*\bconfig_names\b.*=', c['src'], re.M) for c in exported)
    )

def check(nb):
    "Sizes of a notebook and its faults."
    every = cells(nb)
    code = [c for c in every if c['cell_type'] == 'code']
    exported = [c for c in code if directive(c, 'exports?', 'exporti')]
    sizes = [size(c['src']) for c in exported] or [0]
    row = dict(
        cells=len(every),
        exported=len(exported),
        median=statistics.median(sizes),
        max=max(sizes),
        statements=sum(sizes),
    )
    out = [
        *lessons(code, exported),
        *(f for c in code for f in [*outputs(c), *wide(c['src'])]),
        *(f for c in exported for kind in (joined, dense, open_zips) for f in kind(c['src'])),
    ]
    if not any(re.match(r'# .+\n\s*\n?> .+', c['src']) for c in every[:2] if c['cell_type'] == 'markdown'):
        out.append('no `# title` with `> sentence`')
    if max(sizes) > CELL: out.append(f'{sum(s > CELL for s in sizes)} exported cells over {CELL} statements')
    if row['median'] > MEDIAN: out.append(f'median exported cell over {MEDIAN} statements')
    if len(every) > CELLS or sum(sizes) > STATEMENTS:
        out.append(f'over {CELLS} cells or {STATEMENTS} exported statements')
    if nb.parent.name == '90_experiments': out += recipe(nb, every)
    if is_page(nb, exported): out += page(nb, every)
    for c in code:
        kinds = [isinstance(b, IMPORT) for b in tree(c['src'])]
        # nbdev runs such a cell to build the page
        deep = c not in exported and any(isinstance(n, IMPORT) for b in tree(c['src']) for n in ast.walk(b))
        if (any(kinds) or deep) and not all(kinds): out.append(f'cell {c["id"]} mixes imports with code')
    return row, out

rows = {nb.relative_to(nbs): check(nb) for nb in notebooks()}
if '--table' in sys.argv:
    heads = ['cells', 'exported', 'median', 'max', 'statements']
    print(f"{'notebook':44}", *(f'{h:>8}' for h in heads))
    for nb, (row, _) in rows.items(): print(f'{str(nb):44}', *(f'{row[h]:8g}' for h in heads))
    print(
        f"{'all':44}",
        *(
            f'{sum(r[h] for r, _ in rows.values()):8g}' if h not in ('median', 'max') else ' ' * 8
            for h in heads
        ),
    )
def twice():
    "Classes of one name in one package: the later one would take over without a word."
    home = {}
    for nb in notebooks():
        if not (mod := module(nb)): continue
        exported = [c for c in cells(nb) if directive(c, 'exports?', 'exporti')]
        for b in (
            b
            for c in exported
            for b in tree(c['src'])
            if isinstance(b, ast.ClassDef) and not b.name.startswith('_')
        ):
            first = home.setdefault((mod.split('.')[0], b.name), nb)
            if first != nb:
                yield f'{nb.relative_to(nbs)}: class `{b.name}` is exported by {first.relative_to(nbs)} too'

# names that two modules may export, and why
SHARED = dict(load="a data module's own; configurations name it by its path")

def one_word():
    "Public names of two modules: one word means one thing."
    home = {}
    for mod in modules():
        file = source(mod) if source(mod).is_file() else source(mod)/'__init__.py'
        names = next(
            (
                b.value
                for b in tree(file.read_text(encoding='utf-8'))
                if isinstance(b, ast.Assign) and getattr(b.targets[0], 'id', '') == '__all__'
            ),
            None,
        )
        for name in ast.literal_eval(names) if names else ():
            if name not in SHARED and home.setdefault(name, mod) != mod:
                yield f'{mod}: `{name}` is a public name of {home[name]} too'

def borrowed():
    "Names that a module uses and only its notebook has, such as those that a lesson imports."
    for mod in modules():
        file = source(mod) if source(mod).is_file() else source(mod)/'__init__.py'
        scopes = [symtable.symtable(file.read_text(encoding='utf-8'), str(file), 'exec')]
        known = {s.get_name() for s in scopes[0].get_symbols() if s.is_assigned() or s.is_imported()} | {
            *dir(builtins),
            '__file__',
            '__class__',
        }
        for scope in scopes: scopes += scope.get_children()
        used = {
            s.get_name()
            for scope in scopes
            for s in scope.get_symbols()
            if s.is_global() and not s.is_local()
        }
        for name in sorted(used - known): yield f'{mod}: `{name}` is known to the notebook alone'

def scripts():
    "Lines over the width in the tests and in these checks."
    for file in sorted([*(root/'.ci').glob('*.py'), *(nbs/'tests').glob('*.py')]):
        name = file.relative_to(root)
        yield from (f'{name}: {fault}' for fault in wide(file.read_text(encoding='utf-8')))

reports = [
    fault for nb in notebooks(reports=True) if nb.parent.name == '95_reports' for fault in unfolded(nb)
]
finish(
    [*twice(), *one_word(), *borrowed(), *reports, *scripts()]
    + [f'{nb}: {fault}' for nb, (_, faults) in rows.items() for fault in faults],
    f'{len(rows)} notebooks keep the house limits',
)
