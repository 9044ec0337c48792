"""Reading order and floors: who imports whom. A module imports only earlier notebooks and lower floors, and
heavy packages only inside functions."""
import ast, subprocess, sys
from book import finish, modules, package, root, source

FLOORS = dict(
    core=0,
    models=1,
    alignment=1,
    data=1,
    metrics=1,
    modelpool=2,
    __init__=2,
    method=3,
    taskpool=3,
    analysis=3,
    bench=4,
)
ALSO = {('models', 'alignment.spec'), ('metrics', 'alignment')} # siblings that may be used all the same
# all that a method may import of ours ...
METHOD = 'core', 'alignment', 'models.routed', 'models.words', 'method'
POOLED = 'method.base', 'method.check'                     # ... except the two that hand it its pool
HEAVY = {
    'transformers',
    'datasets',
    'matplotlib',
    'PIL',
    'papermill',
    'hydra',
    'ot',
    'sklearn',
    'pandas',
    'IPython',
    'ipywidgets',
    'huggingface_hub',
}
LIGHT = 'fusionbook', 'fusionbook.bench.cli'               # imported by `fusionbook --help`: without these
NEVER = 'torch', 'transformers', 'datasets', 'matplotlib'

def inside(name, top): return name == top or name.startswith(f'{top}.')

def imports(mod, tree):
    """Dotted names that the nodes of a module import, relative ones resolved; `from a import b` gives a and
    a.b."""
    here = [package.name, *mod.split('.')]
    if source(mod).name != '__init__.py': here = here[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            up = (
                '.'.join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            yield from (up, *(f'{up}.{a.name}' for a in node.names))

def order(mods, mod, names):
    "Imports of later notebooks."
    place = list(mods)
    for name in {n.removeprefix(f'{package.name}.') for n in names} & set(mods) - {mod}:
        if place.index(name) >= place.index(mod):
            yield f'{mods[mod].name} imports {name}, whose notebook comes later'

def floors(mod, names):
    "Imports of a higher floor, of a sibling, or of what a method must not know."
    part = mod.split('.')[0]
    if part not in FLOORS: yield f'{mod} stands on no floor; known are {", ".join(FLOORS)}'; return
    for name in sorted({n.removeprefix(f'{package.name}.') for n in names if inside(n, package.name)}):
        other = name.split('.')[0]
        if other not in FLOORS or other == part or any(part == a and inside(name, b) for a, b in ALSO):
            continue
        if FLOORS[other] > FLOORS[part]: yield f'{mod} imports {name} from a higher floor'
        if FLOORS[other] == FLOORS[part]: yield f'{mod} imports its sibling {name}'
        if (
            part == 'method'
            and mod not in POOLED
            and name.count('.')
            and not any(inside(name, m) for m in METHOD)
        ):
            yield f'{mod} imports {name}: a method knows only {", ".join(METHOD)}'

def heavy(mod, tree):
    "Heavy packages imported when the module is."
    top = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    for name in sorted({n.split('.')[0] for n in imports(mod, top)} & HEAVY):
        yield f'{mod} imports {name} at its top; import it inside the function'

def light():
    "Heavy packages that come with the command line's help."
    names = [m for m in LIGHT if m == package.name or source(m.removeprefix(f'{package.name}.')).exists()]
    code = f"import sys, {', '.join(names)}; print(*[m for m in {NEVER} if m in sys.modules])"
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    yield from (f'{", ".join(names)} import {m}' for m in run.stdout.split())
    if run.returncode: yield run.stderr

mods, bad, n = modules(), [], 0
for mod in mods:
    if not source(mod).exists(): bad.append(f'{mods[mod].name} has not been exported'); continue
    tree = ast.parse(source(mod).read_text(encoding='utf-8'))
    names = list(imports(mod, tree))
    n += sum(inside(name, package.name) for name in names)
    bad += [*order(mods, mod, names), *floors(mod, names), *heavy(mod, tree)]
finish(
    bad + list(light()),
    f'{len(mods)} modules, {n} imports of ours: in reading order, downwards, light at the top',
)
