"The repository as the checks see it: notebooks in reading order, their cells, the modules they export."
import json, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
nbs, package = root/'nbs', root/'fusionbook'
sys.path.insert(0, str(root))   # the package of this checkout, installed or not

def notebooks(reports=False):
    "Notebooks of the book in reading order, without drafts (`_name`); executed reports only on request."
    found = sorted(
        p for p in nbs.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(nbs).parts)
    )
    return [p for p in found if reports or p.parent.name != '95_reports']

def cells(nb):
    "The cells of a notebook with their text under `src`."
    return [c | {'src': ''.join(c['source'])} for c in json.loads(nb.read_text(encoding='utf-8'))['cells']]

def directive(cell, *names):
    "Whether a code cell carries one of nbdev's directives."
    return cell['cell_type'] == 'code' and bool(
        re.search(rf"(?m)^#\s*\|\s*({'|'.join(names)})\b", cell['src'])
    )

def module(nb):
    "The module a notebook exports to, such as `core.plot`, or None."
    code = '\n'.join(c['src'] for c in cells(nb) if c['cell_type'] == 'code')
    found = re.search(r'(?m)^#\s*\|\s*default_exp:?\s+(\S+)', code)
    return found and found[1]

def modules():
    "module -> its notebook, in reading order; `method.__init__` is the module `method`."
    return {m.removesuffix('.__init__'): nb for nb in notebooks() if (m := module(nb))}

def source(mod):
    "The exported file of a module."
    path = package/mod.replace('.', '/')
    return path/'__init__.py' if path.is_dir() else path.with_suffix('.py')

def finish(faults, summary):
    "Print what is wrong, or one line that says what was looked at, and leave with the right code."
    print(*faults or [summary], sep='\n')
    raise SystemExit(bool(faults))
