"""`nbdev_export` and `nbdev_clean` change nothing: package and notebooks agree, and every exported file still
has its notebook."""
import hashlib, re, subprocess, sys
from pathlib import Path
from book import finish, notebooks, package, root

def state():
    "Hash of every exported file and notebook."
    files = [*package.rglob('*.py'), *notebooks(reports=True)]
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

def orphans():
    "Exported files whose notebook is gone, and files that nobody exported."
    for f in package.rglob('*.py'):
        made = re.search(r'File to edit: (\S+\.ipynb)', f.read_text(encoding='utf-8'))
        if made and not (f.parent / made[1]).resolve().exists():
            yield f'{f.relative_to(root)}: its notebook {made[1]} is gone'
        if not made and f.name not in ('_modidx.py', '__init__.py'):
            yield f'{f.relative_to(root)}: not exported from a notebook'

if sys.argv[1:]: sys.exit(__doc__)   # it writes: never by accident
before = state()
for tool in 'nbdev_export', 'nbdev_clean':
    subprocess.run([Path(sys.executable).parent/tool], cwd=root, check=True)
after = state()
changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
finish(
    [f'{f}: changed by nbdev_export or nbdev_clean; commit the result' for f in changed] + list(orphans()),
    f'{len(after)} files are as nbdev writes them',
)
