"""A process that has imported what a run imports, and is forked for each call: a process of its own, without
four seconds of imports.

The child has its memory, folder, environment, output, signals and status for itself, and ends as Python ends.
What looks at imports, at threads, at memory or at the very first words of the program starts Python anew:
`run_program(…, anew=True)`.
"""
import atexit, json, os, signal, socket, subprocess, sys, tempfile, time
from functools import cache

CODE = 'from fusionbook.bench.cli import main; raise SystemExit(main())'
IMPORTED = (
    'torch',
    'datasets',
    'transformers.models.clip.modeling_clip',
    'fusionbook.bench.configured',
    'fusionbook.bench.sweep_command',
    'fusionbook.core.plot',
    'matplotlib.pyplot',
)


def serve(room):
    "Answer calls until the tests are gone; what a child has to run."
    children = {}
    while True:
        data, handles, _, _ = socket.recv_fds(room, 1 << 20, 2)
        if not data: os._exit(0)
        asked = json.loads(data)
        if 'wait' in asked:
            pid = asked['wait']
            if pid not in children:
                done, status = os.waitpid(pid, 0 if asked['long'] else os.WNOHANG)
                if done: children[pid] = os.waitstatus_to_exitcode(status)
            room.sendall(json.dumps(children.get(pid)).encode())
        elif pid := os.fork():
            for h in handles: os.close(h)
            room.sendall(json.dumps(pid).encode())
        else:
            room.close()
            for at, h in enumerate(handles, 1): os.dup2(h, at); os.close(h)
            if asked['apart']: os.setsid()
            os.chdir(asked['cwd'])
            os.environ.clear()
            os.environ.update(asked['env'])
            sys.argv = ['-c', *asked['words']]
            return asked['code']


@cache
def server():
    "The process, started when first asked for; it ends with this one."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        cwd=tempfile.gettempdir(),
    )
    theirs.close()
    atexit.register(lambda: (ours.close(), server.process.wait()))
    return ours


def ask(handles=(), **what):
    socket.send_fds(server(), [json.dumps(what).encode()], list(handles))
    return json.loads(server().recv(1 << 20))


class Started:
    "A call that runs: what `subprocess.Popen` tells of one."
    def __init__(self, *words, cwd, code=CODE, env=None, apart=False):
        self.files, self.returncode = [tempfile.TemporaryFile() for _ in range(2)], None
        self.pid = ask(
            [f.fileno() for f in self.files],
            words=[str(w) for w in words],
            code=code,
            cwd=str(cwd),
            env=dict(os.environ if env is None else env),
            apart=apart,
        )
    def poll(self, long=False):
        if self.returncode is None: self.returncode = ask(wait=self.pid, long=long)
        return self.returncode
    def wait(self, timeout=600):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end: self.kill(); raise subprocess.TimeoutExpired(self.pid, timeout)
            time.sleep(.01)
        return self.returncode
    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)
    def terminate(self): self.send_signal(signal.SIGTERM)
    def kill(self): self.send_signal(signal.SIGKILL)
    def communicate(self, timeout=600):
        "What it said, when it has ended."
        self.wait(timeout)
        said = []
        for f in self.files:
            f.seek(0)
            said.append(f.read().decode())
            f.close()
        return said


def run(*words, check=False, timeout=600, **how):
    "Call and wait: what `subprocess.run` tells, output as text."
    started = Started(*words, **how)
    out, err = started.communicate(timeout)
    if check and started.returncode: raise AssertionError(f'status {started.returncode}: {err}')
    return subprocess.CompletedProcess(words, started.returncode, out, err)


if __name__ == '__main__':
    from importlib import import_module
    for _name in IMPORTED: import_module(_name)
    sys.path[0] = ''   # as for `python -c`
    _code = serve(socket.socket(fileno=int(sys.argv[1])))
    exec(_code, dict(__name__='__main__'))
