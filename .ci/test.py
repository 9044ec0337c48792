"""Test the book: every notebook, then pytest. With `--checks` or FUSIONBOOK_CHECKS=1 the repository's own
checks run in between.

Two processes where there are two cores, each test file in one of them. One thread per process and passive
waiting (spinning threads make busy machines ten times slower); nothing is fetched from the hub.
"""
import os, subprocess, sys, time
from pathlib import Path

here = Path(__file__).resolve().parent
root, tools = here.parent, Path(sys.executable).parent
WORKERS = min(2, os.cpu_count() or 1)
CALM = dict(
    OMP_WAIT_POLICY='passive',
    OMP_NUM_THREADS='1',
    HF_HUB_OFFLINE='1',
    HF_HUB_DISABLE_TELEMETRY='1',
    MPLBACKEND='agg',
)
CHECKS = dict(
    export=['check_export.py'],
    order=['check_order.py'],
    requirements=['check_requirements.py'],
    sizes=['check_nbs.py', '--table'],
    yaml=['check_yaml.py'],
    configs=['check_configs.py'],
    parameters=['check_parameters.py'],
    board=['board.py', '--check'],
    readme=['readme.py', '--check'],
    pages=['pages.py'],
)

def run(name, command):
    "Run one step from the root, say how long it took, and return its name if it failed."
    print(f'\n== {name}', flush=True)
    start = time.time()
    failed = subprocess.run([str(c) for c in command], cwd=root, env=os.environ | CALM).returncode
    if name != 'pytest':
        print(f'== {name}: {"FAILED" if failed else "passed"} in {time.time() - start:.0f} s', flush=True)
    return [name] if failed else []

failed = run('notebooks', [tools/'nbdev_test', '--n_workers', WORKERS, '--timing'])
if '--checks' in sys.argv or os.environ.get('FUSIONBOOK_CHECKS') == '1':
    for name, (script, *args) in CHECKS.items(): failed += run(name, [sys.executable, here/script, *args])
# last, so that its closing line is
failed += run(
    'pytest', [sys.executable, '-m', 'pytest', 'nbs/tests', '-q', '-n', WORKERS, '--dist', 'loadfile']
)
if failed: sys.exit(f'FAILED: {", ".join(failed)}')
