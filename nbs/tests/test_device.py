"""What takes a device works on one: everything once on the processor, once on an accelerator that is made of
it."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name('on_pretend_device.py')


@pytest.fixture(scope='module')
def jobs():
    "What each job found, by name."
    done = subprocess.run(
        [sys.executable, PROGRAM], env=os.environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row.pop('job'): row for row in rows}


@pytest.mark.parametrize('kind, least', [('method', 8), ('run with', 5), ('metric', 10)])
def test_the_same_numbers_on_a_device(jobs, kind, least):
    "No tensor is forgotten on the other side, and the numbers are those of the processor."
    some = {name: found for name, found in jobs.items() if name.startswith(kind)}
    assert len(some) >= least
    assert not {name: found['error'] for name, found in some.items() if 'error' in found}
    assert all(found['names'] for found in some.values())
    assert not {name: found['gap'] for name, found in some.items() if not found['gap'] < 1e-5}


def test_the_pretend_device_refuses_what_a_gpu_refuses():
    "Else nothing would be proved."
    code = '''
import json, pretend_device, torch
a, said = torch.ones(2, device='pretend'), {}
for name, wrong in {'+': lambda: a + torch.ones(2), 'numpy': lambda: a.numpy(), 'stack': lambda: torch.stack([a, torch.ones(2)])}.items():
    try: said[name] = wrong() is None
    except Exception as e: said[name] = str(e)
print(json.dumps(said))
'''
    env = os.environ | {
        'PYTHONPATH': os.pathsep.join(filter(None, [str(PROGRAM.parent), os.environ.get('PYTHONPATH')]))
    }
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    for wrong, said in json.loads(done.stdout).items():
        assert said and ('one device' in said or 'numpy' in said), (wrong, said)
