"""A tutorial in JupyterLab, in a real browser, as a reader opens it: every cell runs, none fails, the
pictures are on the page.

Chromium is driven over its own debugging protocol, with the WebSocket client that Jupyter's server brings: no
driver, no download.
"""
import http.client, json, os, secrets, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.browser
TUTORIALS = Path(__file__).resolve().parents[1]/'97_tutorials'
CHROMIUM = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
QUIET = (
    '--headless=new',
    '--disable-gpu',
    '--disable-dev-shm-usage',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-extensions',
    '--no-first-run',
    '--no-default-browser-check',
    '--metrics-recording-only',
    '--mute-audio',
    '--hide-scrollbars',
    '--window-size=1200,1600',
    '--remote-debugging-port=0',
)

# What the page tells: the notebook's own model for cells and outputs, the document for what is drawn.
READ = '''(() => {
  const panel = [...window.jupyterapp.shell.widgets('main')].find(w => w.sessionContext && w.content && w.content.model);
  const cells = [...panel.content.model.cells].filter(c => c.type === 'code');
  const outputs = cells.map(c => c.outputs ? [...Array(c.outputs.length).keys()].map(i => c.outputs.get(i).toJSON()) : []);
  return {idle: panel.sessionContext.kernelDisplayStatus, ready: panel.sessionContext.isReady, dirty: cells.some(c => c.isDirty),
          numbers: cells.map(c => c.executionCount),
          errors: outputs.flat().filter(o => o.output_type === 'error').map(o => `${o.ename}: ${o.evalue}`),
          stored: outputs.flat().filter(o => o.data && o.data['image/png']).length,
          drawn: [...panel.node.querySelectorAll('.jp-OutputArea-output img')].filter(i => i.complete && i.naturalWidth > 100 && i.getBoundingClientRect().width > 100).length};
})()'''
RUN = (
    '''(() => { const app = window.jupyterapp; app.commands.execute('notebook:run-all-cells'); return '''
    '''true; })()'''
)
READY = '''(() => { const app = window.jupyterapp; if (!app) return false;
  const panel = [...app.shell.widgets('main')].find(w => w.sessionContext && w.content && w.content.model);
  return Boolean(panel && panel.sessionContext.isReady && panel.sessionContext.session?.kernel?.status === 'idle' && panel.content.model.cells.length); })()'''


def until(what, condition, seconds, every=.3):
    "Wait until a condition holds, and return what it returned."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition(): return found
        time.sleep(every)
    raise TimeoutError(f'{what}: not within {seconds} s')


class Page:
    "A page of the browser."
    def __init__(self, address):
        import websocket
        self.socket, self.count = websocket.create_connection(address, suppress_origin=True, timeout=60), 0
    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get('id') == self.count: break
        assert 'error' not in answer, answer
        return answer['result']
    def js(self, expression):
        "The value of an expression; None while the page is being replaced or throws."
        return self.call('Runtime.evaluate', expression=expression, returnByValue=True)['result'].get('value')


def stop(process):
    "End a process and what it started."
    try: os.killpg(process.pid, signal.SIGTERM); process.wait(10)
    except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL); process.wait(10)
    except ProcessLookupError: pass


def started(command, log, env):
    "A process in a group of its own, writing to a log."
    with open(log, 'wb') as out:
        return subprocess.Popen(
            [str(c) for c in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )


def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]


def answers(port, path):
    "Whether something answers at a port of this machine."
    try:
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=5)
        connection.request('GET', path)
        return connection.getresponse().status == 200
    except OSError: return False


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on the loopback address, with folders and a token of its own, open on a copy of the
    tutorials: its address."""
    pytest.importorskip('jupyterlab', reason='JupyterLab is not installed')
    work, token, port = tmp_path/'work', secrets.token_hex(16), free_port()
    shutil.copytree(TUTORIALS, work, ignore=shutil.ignore_patterns('.*'))
    private = {
        f'JUPYTER_{k}_DIR': str(tmp_path / 'jupyter' / k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')
    } | {
        'JUPYTERLAB_SETTINGS_DIR': str(tmp_path / 'settings'),
        'JUPYTERLAB_WORKSPACES_DIR': str(tmp_path / 'workspaces'),
        'IPYTHONDIR': str(tmp_path / 'ipython'),
        'JUPYTER_PLATFORM_DIRS': '1',
    }
    overrides = tmp_path/'jupyter'/'config'/'labconfig'/'default_setting_overrides.json'
    overrides.parent.mkdir(parents=True)
    # draw what is out of sight, too
    overrides.write_text(
        json.dumps(
            {
                '@jupyterlab/notebook-extension:tracker': {'windowingMode': 'none'},
                '@jupyterlab/apputils-extension:notification': {
                    'checkForUpdates': False,
                    'fetchNews': 'false',
                },
            }
        )
    )
    env = (
        os.environ
        | private
        | {
            'PYTHONPATH': os.pathsep.join(
                filter(None, [str(TUTORIALS.parents[1]), os.environ.get('PYTHONPATH')])
            ),
            'FUSIONBOOK_PROGRESS': 'auto',
        }
    )
    process = started(
        [
            sys.executable,
            '-m',
            'jupyterlab',
            '--no-browser',
            '--ip=127.0.0.1',
            f'--port={port}',
            f'--ServerApp.root_dir={work}',
            f'--IdentityProvider.token={token}',
            '--allow-root',
            '--expose-app-in-browser',
            '--ServerApp.port_retries=0',
            '--ServerApp.open_browser=False',
        ],
        tmp_path / 'lab.log',
        env,
    )
    try:
        until(
            'JupyterLab starts',
            lambda: process.poll() is not None or answers(port, f'/api/status?token={token}'),
            180,
        )
        assert process.poll() is None, (tmp_path/'lab.log').read_text()
        yield f'http://127.0.0.1:{port}/lab/tree/%s?token={token}&reset'
    finally: stop(process)


@pytest.fixture
def page(tmp_path):
    "An empty page of a headless Chromium with a profile of its own."
    if not CHROMIUM:
        pytest.skip('no Chromium: expected one of chromium, chromium-browser, google-chrome on the path')
    pytest.importorskip('websocket', reason='websocket-client, which JupyterLab brings, is not installed')
    profile = tmp_path/'chromium'
    sandbox = ['--no-sandbox'] if hasattr(os, 'geteuid') and os.geteuid() == 0 else []
    process = started(
        [CHROMIUM, *QUIET, *sandbox, f'--user-data-dir={profile}', 'about:blank'],
        tmp_path / 'chromium.log',
        os.environ | {'HOME': str(tmp_path)},
    )
    try:
        note = profile/'DevToolsActivePort'
        until(
            'Chromium starts',
            lambda: process.poll() is not None or (note.exists() and len(note.read_text().split()) > 1),
            90,
        )
        assert process.poll() is None, (tmp_path/'chromium.log').read_text()
        connection = http.client.HTTPConnection('127.0.0.1', int(note.read_text().split()[0]), timeout=10)
        connection.request('PUT', '/json/new?about:blank')
        yield Page(json.loads(connection.getresponse().read())['webSocketDebuggerUrl'])
    finally: stop(process)


@pytest.mark.parametrize('name,pictures', [('a_first_merge', 4)])
def test_tutorial_in_jupyterlab(page, lab, name, pictures):
    page.call('Page.navigate', url=lab % f'{name}.ipynb')
    until('the notebook opens and its kernel is idle', lambda: page.js(READY), 180)
    time.sleep(1)  # a command sent in the same moment is sometimes lost
    page.js(
        (
            '''(() => { window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs'); return '''
            '''true; })()'''
        )
    )
    assert (
        until('outputs are cleared', lambda: (s := page.js(READ)) and s['stored'] == 0 and s, 60)['drawn']
        == 0
    )
    for attempt in range(3):
        page.js(RUN)
        try: until('a cell starts', lambda: any((s := page.js(READ))['numbers']) or s['errors'], 40); break
        except TimeoutError:
            if attempt == 2: raise
    def over():
        state = page.js(READ)
        return state if state['errors'] or all(state['numbers']) else None
    state = until('all cells have run', over, 400)
    assert not state['errors'], state['errors']
    state = until(
        'the pictures are on the page', lambda: (s := page.js(READ)) and s['drawn'] >= pictures and s, 60
    )
    assert state['stored'] == state['drawn'] == pictures
