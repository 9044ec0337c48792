"""Every method of the package has the files in config/method that its class names, and they are what the
class says of itself; `--write` writes them.

The grids of `tune` are read the way a sweep reads them.
"""
import sys
from importlib import import_module
from book import finish, modules, package
from fusionbook.bench.sweep import axis, points
from fusionbook.core.errors import FusionError
from fusionbook.method.base import BaseAlgorithm, method_yaml
from fusionbook.method.check import wrong_facts

RUNS = 'direction', 'merge', 'run', 'build'   # what makes a class a method: one of these is its own
folder = package/'config'/'method'

def methods():
    "Public methods of the package in reading order; a class that is only there to be derived from is none."
    mods = [m for m in modules() if m.startswith('method.')]
    for mod in mods: import_module(f'fusionbook.{mod}')
    for mod in mods:
        for name, cls in vars(import_module(f'fusionbook.{mod}')).items():
            ours = (
                isinstance(cls, type)
                and issubclass(cls, BaseAlgorithm)
                and cls.__module__ == f'fusionbook.{mod}'
            )
            if (
                ours
                and not name.startswith('_')
                and any(getattr(cls, r, None) != getattr(BaseAlgorithm, r, None) for r in RUNS)
            ):
                if cls.config_names or not cls.__subclasses__(): yield cls

def facts(cls):
    "What is wrong with what a class says of itself."
    if wrong := wrong_facts(cls): yield f'{cls.__name__}: {wrong}'
    if not cls.config_names: yield f'{cls.__name__}: no name in `config_names`'
    try: points({k: axis(grid) or [] for k, grid in cls.tune.items()}) if cls.tune else None
    except FusionError as e: yield f'{cls.__name__}: {e}'

def differ(wanted):
    "Files that are not what is wanted, and files that nobody wants."
    for file, cls in wanted.items():
        name = file.relative_to(package)
        if not file.exists():
            yield f'{name}: not there; `python .ci/check_yaml.py --write` writes it'
        elif file.read_text(encoding='utf-8') != method_yaml(cls):
            said = f'differs from what {cls.__name__} says'
            yield f'{name}: {said}; `python .ci/check_yaml.py --write` writes it'
    yield from (
        f'{f.relative_to(package)}: no class of fusionbook.method names it'
        for f in sorted(folder.rglob('*.yaml'))
        if f not in wanted
    )

every = list(methods())
wanted = {folder/f'{name}.yaml': cls for cls in every for name in cls.config_names}
bad = [
    f'{name}: named by two classes'
    for name in {n for c in every for n in c.config_names}
    if sum(name in c.config_names for c in every) > 1
]
bad += [wrong for cls in every for wrong in facts(cls)]
if '--write' in sys.argv and not bad:
    for file, cls in wanted.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(method_yaml(cls), encoding='utf-8')
finish(bad + list(differ(wanted)), f'{len(wanted)} method files are what {len(every)} classes say')
