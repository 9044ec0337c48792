"What the package imports is what settings.ini asks for: nothing undeclared, nothing for show."
import ast, configparser, sys
from book import finish, package, root

# import name -> project name
NAMES = {
    'PIL': 'pillow',
    'sklearn': 'scikit-learn',
    'hydra': 'hydra-core',
    'ot': 'POT',
    'yaml': 'PyYAML',
    'open_clip': 'open_clip_torch',
}
BROUGHT = {'tokenizers', 'IPython'}   # by transformers; by the notebook whose page is being drawn

def imported():
    "Project names of the packages that the modules import, wherever the import stands."
    for f in package.rglob('*.py'):
        for node in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            # files of a package that is not imported
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'find_spec':
                yield from (NAMES.get(a.value, a.value) for a in node.args if isinstance(a, ast.Constant))
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            yield from (
                NAMES.get(top, top)
                for n in names
                if (top := n.split('.')[0]) not in sys.stdlib_module_names | BROUGHT | {package.name}
            )

def declared(key, cfg):
    "Project names of a list of requirements."
    return {r.partition('>')[0].partition('=')[0].partition('<')[0] for r in cfg[key].split()}

config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
cfg, used = config['DEFAULT'], set(imported())
needed = declared('requirements', cfg)
extra = set().union(
    *(declared(k, cfg) for k in cfg if k.endswith('_requirements') and k != 'dev_requirements')
)
bad = [
    f'{n} is imported and stands neither in requirements nor in an extra'
    for n in sorted(used - needed - extra)
]
bad += [f'{n} is required and never imported' for n in sorted(needed - used)]
finish(bad, f'{len(needed)} requirements, all used')
