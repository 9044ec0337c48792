"Every config/method/**/*.yaml is what its dataclass writes, and every method of the package has one."
from importlib import import_module
from omegaconf import OmegaConf
from book import finish, modules, package
from fusionbook.method.base import BaseAlgorithm, method_yaml

def locate(f):
    "The class that a YAML file names, or None."
    module, _, name = str(OmegaConf.load(f).get('_target_', '')).rpartition('.')
    return getattr(import_module(module), name, None) if module.startswith('fusionbook.method') else None

def methods():
    "Public methods, with what a method needs to run: its own `merge` or `run`."
    for mod in (m for m in modules() if m.startswith('method.')):
        for cls in vars(import_module(f'fusionbook.{mod}')).values():
            ours = isinstance(cls, type) and issubclass(cls, BaseAlgorithm) and cls.__module__ == f'fusionbook.{mod}'
            if ours and not cls.__name__.startswith('_') and (cls.merge, cls.run) != (BaseAlgorithm.merge, BaseAlgorithm.run): yield cls

files = {f: locate(f) for f in sorted((package/'config'/'method').rglob('*.yaml'))}
bad = [f'{f.relative_to(package)}: names no class of fusionbook.method' for f, cls in files.items() if cls is None]
bad += [f'{f.relative_to(package)}: differs from what {cls.__name__} writes; run its notebook' for f, cls in files.items()
        if cls and f.read_text(encoding='utf-8') != method_yaml(cls)]
bad += [f'{cls.__name__}: no file in config/method' for cls in methods() if cls not in files.values()]
finish(bad, f'{len(files)} method files are what their classes write')
