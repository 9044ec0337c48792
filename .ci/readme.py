"""README.md from nbs/index.ipynb, the way nbdev and Quarto write it, without Quarto. `--check` fails when
README.md or a picture is not current."""
import base64, configparser, re, sys
from book import cells, finish, nbs, root

INDEX, PICTURES = nbs/'index.ipynb', nbs/'index_files'
config = configparser.ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
# pictures are seen outside of the repository's page too
RAW = 'https://raw.githubusercontent.com/{user}/{repo}/{branch}'.format(**config['DEFAULT'])
HEAD = '<!-- made by .ci/readme.py from nbs/index.ipynb: edit the notebook -->\n'

def local(match):
    "A link of the notebook as seen from the repository's root."
    text, target = match[1], match[2]
    if re.match(r'[a-z]+:|#|/', target): return match[0]
    path = (nbs/target.partition('#')[0]).resolve()
    if not path.exists(): raise SystemExit(f'{INDEX.name}: no file for the link `{target}`')
    return f'{text}({path.relative_to(root).as_posix()}{"".join(target.partition("#")[1:])})'

def linked(text): return re.sub(r'(!?\[[^\]]*\])\(([^)\s]+)\)', local, text)

def prose(src):
    "A markdown cell: front matter (`- key: value` below the title) taken out, links seen from the root."
    if src.startswith('# '): src = re.sub(r'(?m)^- [a-z_-]+:.*\n?', '', src).rstrip()
    return linked(src)

def output(o, name):
    "One output as (markdown, picture): pictures as files, markdown and HTML as they are, text indented."
    text = lambda x: re.sub(r'(?m)^(?=.)', '    ', re.sub(r'\x1b\[[0-9;]*m', '', ''.join(x)).rstrip('\n'))
    if o['output_type'] == 'stream': return text(o['text']) if o['name'] == 'stdout' else '', {}
    data = o.get('data', {})
    if 'image/png' in data:
        return f'![]({RAW}/nbs/{PICTURES.name}/{name}.png)', {
            f'{name}.png': base64.b64decode(''.join(data['image/png']))
        }
    if 'text/markdown' in data: return linked(''.join(data['text/markdown']).strip()), {}
    if 'text/html' in data: return ''.join(data['text/html']).strip(), {}
    return text(data.get('text/plain', '')), {}

def export():
    "The text of README.md and its pictures."
    parts, pictures = [], {}
    for c in cells(INDEX):
        directives = re.findall(r'(?m)^#\s*\|\s*(.+?)\s*$', c['src']) if c['cell_type'] == 'code' else []
        if any(re.match(r'(hide|default_exp|include:\s*false)\b', d) for d in directives): continue
        src = re.sub(r'(?m)^#\s*\|.*\n?', '', c['src']).strip()
        if c['cell_type'] == 'markdown': parts.append(prose(src))
        if c['cell_type'] != 'code': continue
        if src and 'echo: false' not in directives: parts.append(f'``` python\n{src}\n```')
        for i, o in enumerate(c['outputs'] if 'output: false' not in directives else ()):
            text, files = output(o, f'{c["id"]}-{i}')
            pictures |= files
            if text.strip(): parts.append(text)
    return '\n\n'.join([parts[0], HEAD.strip(), *parts[1:]]) + '\n', pictures

text, pictures = export()
files = {root/'README.md': text.encode()} | {PICTURES/name: data for name, data in pictures.items()}
stale = [f for f, data in files.items() if not f.exists() or f.read_bytes() != data]
extra = [f for f in PICTURES.glob('*') if f not in files]
if '--check' in sys.argv:
    finish(
        [f'{f.relative_to(root)} is not current; run .ci/readme.py' for f in stale + extra],
        'README.md is current',
    )
for f in extra: f.unlink()
for f in stale:
    f.parent.mkdir(exist_ok=True)
    f.write_bytes(files[f])
print(f'README.md and {len(pictures)} pictures: {len(stale)} written')
